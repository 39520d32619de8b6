//! Ciphers by sector: a block cipher, a mode, and where the IV comes from.

use ::cipher::consts::{U8, U16};
use ::cipher::{
    Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt,
    BlockSizeUser, InnerIvInit, KeyInit, StreamCipher,
};

use super::SECTOR;
use super::hash::Hash;
use super::memory::Kept;
use crate::error::{Error, ErrorKind, Result};

/// Encrypts and decrypts whole sectors, from the one numbered `first` on.
pub(super) trait SectorCipher: Send + Sync {
    fn encrypt(&self, first: u64, data: &mut [u8]);
    fn decrypt(&self, first: u64, data: &mut [u8]);
}

/// A block cipher as the crates have them.
trait Cipher:
    BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser + KeyInit + Send + Sync + 'static
{
}

impl<C> Cipher for C where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser + KeyInit + Send + Sync + 'static
{
}

/// The cipher that a LUKS header calls `name` and `mode` (as `xts-plain64` or `cbc-essiv:sha256`).
///
/// # Errors
/// `Unsupported` for what there is not.
pub(super) fn new(name: &str, mode: &str, key: &[u8]) -> Result<Box<dyn SectorCipher>> {
    let spelled = || format!("{}-{}", name.escape_debug(), mode.escape_debug());
    let (mode, iv) = mode.split_once('-').unwrap_or((mode, "plain64"));
    let built = new_iv(name, iv, key).and_then(|iv| match (name, key.len()) {
        ("cast5", 16) => with_short_blocks::<cast5::Cast5>(mode, key, iv),
        _ => {
            let halves = if mode == "xts" { 2 } else { 1 };
            match (name, key.len() / halves, key.len() % halves) {
                ("aes", 16, 0) => with_blocks::<aes::Aes128>(mode, key, iv),
                ("aes", 24, 0) => with_blocks::<aes::Aes192>(mode, key, iv),
                ("aes", 32, 0) => with_blocks::<aes::Aes256>(mode, key, iv),
                ("serpent", 16 | 24 | 32, 0) => with_blocks::<serpent::Serpent>(mode, key, iv),
                ("twofish", 16 | 24 | 32, 0) => with_blocks::<twofish::Twofish>(mode, key, iv),
                _ => None,
            }
        }
    });
    built.ok_or_else(|| {
        let bits = key.len() * 8;
        let text = format!("the cipher {} with a key of {bits} bits is not served", spelled());
        Error::new(ErrorKind::Unsupported, text)
    })
}

fn with_blocks<C: Cipher<BlockSize = U16>>(
    mode: &str,
    key: &[u8],
    iv: Iv,
) -> Option<Box<dyn SectorCipher>> {
    if mode == "xts" {
        let (data, tweak) = key.split_at(key.len() / 2);
        return Some(Box::new(Xts { data: keyed::<C>(data)?, tweak: keyed::<C>(tweak)?, iv }));
    }
    let cipher = keyed::<C>(key)?;
    Some(match mode {
        "cbc" => Box::new(Cbc { cipher, iv }),
        "ecb" => Box::new(Ecb { cipher }),
        "ctr" => Box::new(Ctr { cipher, iv }),
        _ => return None,
    })
}

/// For blocks of 8 bytes.
fn with_short_blocks<C: Cipher<BlockSize = U8>>(
    mode: &str,
    key: &[u8],
    iv: Iv,
) -> Option<Box<dyn SectorCipher>> {
    let cipher = keyed::<C>(key)?;
    Some(match mode {
        "cbc" => Box::new(Cbc { cipher, iv }),
        "ecb" => Box::new(Ecb { cipher }),
        "ctr" => Box::new(ShortCtr { cipher, iv }),
        _ => return None,
    })
}

fn keyed<C: Cipher>(key: &[u8]) -> Option<Kept<C>> {
    Some(Kept::new(C::new_from_slice(key).ok()?))
}

/// How a sector's number becomes its IV.
enum Iv {
    /// Its low 32 bits, little-endian, then zeros.
    Plain,
    /// All of it, little-endian, then zeros.
    Plain64,
    /// The same encrypted by a hash of the key.
    Essiv(Box<dyn BlockEncryptor>),
}

/// A block cipher that encrypts single blocks.
trait BlockEncryptor: Send + Sync {
    fn encrypt(&self, block: &mut [u8]);
}

impl<C: Cipher> BlockEncryptor for Kept<C> {
    fn encrypt(&self, block: &mut [u8]) {
        if let Ok(block) = block.try_into() {
            self.encrypt_block(block);
        }
    }
}

impl Iv {
    /// That of sector `number`; as long as a block.
    fn of<B: ::cipher::array::ArraySize>(&self, number: u64) -> Array<u8, B> {
        let number = if let Iv::Plain = self { number & 0xffff_ffff } else { number };
        let mut iv = Array::<u8, B>::default();
        iv[..8].copy_from_slice(&number.to_le_bytes());
        if let Iv::Essiv(salted) = self {
            salted.encrypt(&mut iv);
        }
        iv
    }
}

fn new_iv(cipher: &str, generator: &str, key: &[u8]) -> Option<Iv> {
    match (generator, generator.strip_prefix("essiv:")) {
        ("plain", _) => Some(Iv::Plain),
        ("plain64", _) => Some(Iv::Plain64),
        (_, Some(hash)) => {
            // The hash decides the length of the key, as in dm-crypt.
            let salt = Hash::named(hash)?.digest(&[key]);
            let salted: Box<dyn BlockEncryptor> = match (cipher, salt.len()) {
                ("aes", 16) => Box::new(keyed::<aes::Aes128>(&salt)?),
                ("aes", 24) => Box::new(keyed::<aes::Aes192>(&salt)?),
                ("aes", 32) => Box::new(keyed::<aes::Aes256>(&salt)?),
                ("serpent", 16 | 24 | 32) => Box::new(keyed::<serpent::Serpent>(&salt)?),
                ("twofish", 16 | 24 | 32) => Box::new(keyed::<twofish::Twofish>(&salt)?),
                ("cast5", 16) => Box::new(keyed::<cast5::Cast5>(&salt)?),
                _ => return None,
            };
            Some(Iv::Essiv(salted))
        }
        _ => None,
    }
}

/// The sectors of `data` with their numbers.
fn sectors(first: u64, data: &mut [u8]) -> impl Iterator<Item = (u64, &mut [u8])> {
    (first..).zip(data.chunks_exact_mut(SECTOR))
}

/// XTS (IEEE 1619) over whole sectors. The blocks of a sector are handed to the cipher together,
/// several times as fast as one by one, which is all that the crate for XTS does; that one judges
/// this one in the tests.
struct Xts<C> {
    data: Kept<C>,
    tweak: Kept<C>,
    iv: Iv,
}

/// The tweaks of one sector, a block each.
type Tweaks = [u128; SECTOR / 16];

impl<C: Cipher<BlockSize = U16>> Xts<C> {
    fn tweaks(&self, number: u64) -> Tweaks {
        let mut first = self.iv.of::<U16>(number);
        self.tweak.encrypt_block(&mut first);
        let mut next = u128::from_le_bytes(first.0);
        [(); SECTOR / 16].map(|()| {
            let tweak = next;
            // Doubled in the field of 2^128 elements.
            next = (tweak << 1) ^ if tweak >> 127 == 1 { 0x87 } else { 0 };
            tweak
        })
    }
}

fn add_tweaks(sector: &mut [u8], tweaks: &Tweaks) {
    let (blocks, _) = sector.as_chunks_mut::<16>();
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
    }
}

impl<C: Cipher<BlockSize = U16>> SectorCipher for Xts<C> {
    fn encrypt(&self, first: u64, data: &mut [u8]) {
        for (number, sector) in sectors(first, data) {
            let tweaks = self.tweaks(number);
            add_tweaks(sector, &tweaks);
            self.data.encrypt_blocks(Array::slice_as_chunks_mut(sector).0);
            add_tweaks(sector, &tweaks);
        }
    }

    fn decrypt(&self, first: u64, data: &mut [u8]) {
        for (number, sector) in sectors(first, data) {
            let tweaks = self.tweaks(number);
            add_tweaks(sector, &tweaks);
            self.data.decrypt_blocks(Array::slice_as_chunks_mut(sector).0);
            add_tweaks(sector, &tweaks);
        }
    }
}

struct Cbc<C> {
    cipher: Kept<C>,
    iv: Iv,
}

impl<C: Cipher> SectorCipher for Cbc<C> {
    fn encrypt(&self, first: u64, data: &mut [u8]) {
        for (number, sector) in sectors(first, data) {
            let iv = self.iv.of::<C::BlockSize>(number);
            cbc::Encryptor::<&C>::inner_iv_init(&self.cipher, &iv)
                .encrypt_blocks(Array::slice_as_chunks_mut(sector).0);
        }
    }

    fn decrypt(&self, first: u64, data: &mut [u8]) {
        for (number, sector) in sectors(first, data) {
            let iv = self.iv.of::<C::BlockSize>(number);
            cbc::Decryptor::<&C>::inner_iv_init(&self.cipher, &iv)
                .decrypt_blocks(Array::slice_as_chunks_mut(sector).0);
        }
    }
}

/// Every block by itself: of no use to anybody, but QEMU makes such images.
struct Ecb<C> {
    cipher: Kept<C>,
}

impl<C: Cipher> SectorCipher for Ecb<C> {
    fn encrypt(&self, _first: u64, data: &mut [u8]) {
        self.cipher.encrypt_blocks(Array::slice_as_chunks_mut(data).0);
    }

    fn decrypt(&self, _first: u64, data: &mut [u8]) {
        self.cipher.decrypt_blocks(Array::slice_as_chunks_mut(data).0);
    }
}

/// Counter mode, with blocks of 16 bytes.
struct Ctr<C> {
    cipher: Kept<C>,
    iv: Iv,
}

impl<C: Cipher<BlockSize = U16>> SectorCipher for Ctr<C> {
    fn encrypt(&self, first: u64, data: &mut [u8]) {
        for (number, sector) in sectors(first, data) {
            let core = ctr::CtrCore::inner_iv_init(&*self.cipher, &self.iv.of::<U16>(number));
            ctr::Ctr128BE::<&C>::from_core(core).apply_keystream(sector);
        }
    }

    fn decrypt(&self, first: u64, data: &mut [u8]) {
        self.encrypt(first, data);
    }
}

/// Counter mode, with blocks of 8 bytes.
struct ShortCtr<C> {
    cipher: Kept<C>,
    iv: Iv,
}

impl<C: Cipher<BlockSize = U8>> SectorCipher for ShortCtr<C> {
    fn encrypt(&self, first: u64, data: &mut [u8]) {
        for (number, sector) in sectors(first, data) {
            let core = ctr::CtrCore::inner_iv_init(&*self.cipher, &self.iv.of::<U8>(number));
            ctr::Ctr64BE::<&C>::from_core(core).apply_keystream(sector);
        }
    }

    fn decrypt(&self, first: u64, data: &mut [u8]) {
        self.encrypt(first, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> Vec<u8> {
        (0..4 * SECTOR as u32).map(|i| (i / 7 % 251) as u8).collect()
    }

    #[test]
    fn xts_is_that_of_the_crate_for_xts() {
        let key: Vec<u8> = (0..64).collect();
        let half = |at: usize| aes::Aes256::new_from_slice(&key[at..at + 32]).unwrap();
        let judge = xts_mode::Xts128::new(half(0), half(32));
        let ours = new("aes", "xts-plain64", &key).unwrap();
        for first in [0, 1, 0x1234_5678_9abc] {
            let (mut found, mut expected) = (content(), content());
            ours.encrypt(first, &mut found);
            let tweak = xts_mode::get_tweak_default;
            judge.encrypt_area(&mut expected, SECTOR, u128::from(first), tweak);
            assert!(found == expected, "from sector {first:#x}");
            ours.decrypt(first, &mut found);
            assert!(found == content(), "from sector {first:#x}");
        }
    }

    #[test]
    fn each_cipher_takes_back_what_it_did_by_sector() {
        for (name, key) in [("aes", 16), ("serpent", 32), ("twofish", 24), ("cast5", 16)] {
            for mode in ["cbc-plain", "cbc-plain64", "ctr-plain64", "ecb-plain64", "cbc-essiv:md5"]
            {
                let cipher = new(name, mode, &vec![3; key]).unwrap();
                let mut data = content();
                cipher.encrypt(7, &mut data);
                assert!(data != content(), "{name}-{mode}");
                // Sector by sector from behind.
                for at in (0..4).rev() {
                    cipher.decrypt(7 + at as u64, &mut data[at * SECTOR..(at + 1) * SECTOR]);
                }
                assert!(data == content(), "{name}-{mode}");
            }
        }
    }

    #[test]
    fn plain_ivs_wrap_and_the_others_do_not() {
        let sector = |mode: &str, number| {
            let mut data = vec![0; SECTOR];
            new("aes", mode, &[1; 16]).unwrap().encrypt(number, &mut data);
            data
        };
        assert!(sector("cbc-plain", 5) == sector("cbc-plain", 5 + (1 << 32)));
        assert!(sector("cbc-plain64", 5) != sector("cbc-plain64", 5 + (1 << 32)));
        assert!(sector("cbc-essiv:sha256", 5) != sector("cbc-essiv:sha256", 5 + (1 << 32)));
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        for (name, mode, length) in [
            ("aes", "xts-plain64", 16),
            ("aes", "xts-plain64", 33),
            ("aes", "lrw-benbi", 32),
            ("aes", "cbc-essiv:sha1", 16),
            ("aes", "cbc-essiv", 16),
            ("cast5", "xts-plain64", 32),
            ("sm4", "cbc-plain64", 16),
            ("twofish", "cbc-plain64", 64),
            ("", "", 0),
        ] {
            let Err(error) = new(name, mode, &vec![0; length]) else {
                panic!("{name}-{mode} with {length} bytes")
            };
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(&format!("{name}-{mode}")), "{error}");
        }
    }
}
