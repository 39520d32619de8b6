//! LUKS headers of any parameters, at once: QEMU takes seconds to make one, to find out how many
//! rounds of PBKDF2 this machine does in a given time. It opens and judges what is made here.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use qcow2fs::check::{Repair, repair};
use qcow2fs::crypt::{DataCipher, Location, Secret};
use qcow2fs::image::Image;

use super::host_file;
use super::rng::Rng;

/// The passphrase of all encrypted images.
pub const KEY: &str = "correct horse battery";

/// Bytes of a header with its eight slots, whatever the key.
pub const LENGTH: u64 = 8 * SLOT + 4096;
/// Bytes from one slot to the next.
const SLOT: u64 = 258_048;
pub const STRIPES: usize = 4000;

/// How an image is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encryption {
    None,
    Aes,
    Luks(Parameters),
}

/// What a LUKS header says of the cipher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    pub cipher: String,
    pub mode: String,
    pub hash: String,
    /// Bytes of the master key.
    pub key_bytes: usize,
    /// The slot that [`KEY`] opens; the others are empty.
    pub slot: usize,
}

impl Parameters {
    pub fn new(cipher: &str, mode: &str, hash: &str, key_bytes: usize) -> Self {
        let (cipher, mode, hash) = (cipher.into(), mode.into(), hash.into());
        Parameters { cipher, mode, hash, key_bytes, slot: 0 }
    }
}

impl Encryption {
    /// What QEMU makes by default, half of the time.
    pub fn random(rng: &mut Rng) -> Self {
        let (cipher, mode, key_bytes) = match rng.within(0..8) {
            0..4 => ("aes", "xts-plain64", 64),
            4 => ("aes", "cbc-essiv:sha256", 32),
            5 => ("serpent", "xts-plain", 64),
            _ => return Encryption::Aes,
        };
        Encryption::Luks(Parameters::new(cipher, mode, "sha256", key_bytes))
    }

    /// The cipher of the image at `path`.
    pub fn cipher(&self, path: &Path) -> Option<Arc<DataCipher>> {
        (*self != Encryption::None)
            .then(|| Image::unlock(&*host_file(path), &Secret::copy_of(KEY.as_bytes())).unwrap())
    }
}

impl fmt::Display for Encryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Encryption::None => f.write_str("not encrypted"),
            Encryption::Aes => f.write_str("AES"),
            Encryption::Luks(p) => {
                write!(f, "{}-{} {} {} bytes", p.cipher, p.mode, p.hash, p.key_bytes)
            }
        }
    }
}

/// Makes the image at `path`, which QEMU has made with the older AES method and which has no data,
/// one with LUKS. Its refcounts are put in order.
pub fn make(path: &Path, parameters: &Parameters) {
    let mut bytes = std::fs::read(path).unwrap();
    let cluster_size = 1 << u32::from_be_bytes(bytes[20..24].try_into().unwrap());
    bytes.resize(bytes.len().next_multiple_of(cluster_size), 0);
    let offset = bytes.len() as u64;
    bytes.extend(header(parameters));
    bytes.resize(bytes.len().next_multiple_of(cluster_size), 0);
    bytes[32..36].copy_from_slice(&2u32.to_be_bytes());
    add_extension(&mut bytes[..cluster_size], offset);
    std::fs::write(path, bytes).unwrap();
    repair(&*host_file(path), Repair::All).unwrap();
}

/// Adds the LUKS extension to a qcow2 header. The table of feature names goes: there may be no room.
fn add_extension(header: &mut [u8], offset: u64) {
    let word = |bytes: &[u8], at: usize| {
        u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    };
    let start = if word(header, 4) == 2 { 72 } else { word(header, 100) };
    let mut kept = 0x0537_be77u32.to_be_bytes().to_vec();
    kept.extend(16u32.to_be_bytes());
    kept.extend(offset.to_be_bytes());
    kept.extend(LENGTH.to_be_bytes());
    let mut at = start;
    while word(header, at) != 0 {
        let end = at + 8 + word(header, at + 4).next_multiple_of(8);
        if word(header, at) != 0x6803_f857 {
            kept.extend(&header[at..end]);
        }
        at = end;
    }
    kept.extend([0; 8]);
    let (name, length) = (word(header, 12), word(header, 16));
    let name_bytes = header[name..name + length].to_vec();
    header[start..].fill(0);
    header[start..start + kept.len()].copy_from_slice(&kept);
    if name != 0 {
        let name = start + kept.len();
        header[12..16].copy_from_slice(&(name as u32).to_be_bytes());
        header[name..name + length].copy_from_slice(&name_bytes);
    }
}

/// A LUKS header with its key slots.
fn header(p: &Parameters) -> Vec<u8> {
    let mut bytes = vec![0; LENGTH as usize];
    let master_key: Vec<u8> = (0..p.key_bytes).map(|n| (n * 37 + 11) as u8).collect();
    let (salt, slot_salt, rounds) = ([0x5a; 32], [0xa5; 32], 1000u32);
    bytes[..8].copy_from_slice(b"LUKS\xba\xbe\x00\x01");
    for (at, name) in [(8, &p.cipher), (40, &p.mode), (72, &p.hash)] {
        bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
    }
    bytes[104..108].copy_from_slice(&((LENGTH / 512) as u32).to_be_bytes());
    bytes[108..112].copy_from_slice(&(p.key_bytes as u32).to_be_bytes());
    let mut digest = [0; 20];
    derive(&p.hash, &master_key, &salt, rounds, &mut digest);
    bytes[112..132].copy_from_slice(&digest);
    bytes[132..164].copy_from_slice(&salt);
    bytes[164..168].copy_from_slice(&rounds.to_be_bytes());
    bytes[168..204].copy_from_slice(b"9af0b34f-5a8c-4d9e-8a37-5f1c90d2b6e1");
    for number in 0..8 {
        let slot = &mut bytes[208 + number * 48..256 + number * 48];
        let state: u32 = if number == p.slot { 0x00ac_71f3 } else { 0x0000_dead };
        slot[..4].copy_from_slice(&state.to_be_bytes());
        slot[4..8].copy_from_slice(&if number == p.slot { rounds } else { 0 }.to_be_bytes());
        slot[8..40].copy_from_slice(&slot_salt);
        let sector = (4096 + SLOT * number as u64) / 512;
        slot[40..44].copy_from_slice(&(sector as u32).to_be_bytes());
        slot[44..48].copy_from_slice(&(STRIPES as u32).to_be_bytes());
    }
    let mut material = split(p, &master_key);
    let mut slot_key = Secret::zeroed(p.key_bytes);
    derive(&p.hash, KEY.as_bytes(), &slot_salt, rounds, &mut slot_key);
    let cipher = DataCipher::with_key(&p.cipher, &p.mode, &slot_key).unwrap();
    cipher.encrypt(&mut material, Location { host: 0, guest: 0 }).unwrap();
    let at = 4096 + SLOT as usize * p.slot;
    bytes[at..at + material.len()].copy_from_slice(&material);
    bytes
}

/// The master key in stripes, all but the last two of which are counted bytes.
fn split(p: &Parameters, key: &[u8]) -> Vec<u8> {
    let mut diffused = vec![0; key.len()];
    let mut material = Vec::new();
    for stripe in 0..STRIPES - 1 {
        let bytes: Vec<u8> = (0..key.len()).map(|n| (stripe + n * 3) as u8).collect();
        diffused.iter_mut().zip(&bytes).for_each(|(d, b)| *d ^= b);
        diffused = diffuse(&p.hash, &diffused);
        material.extend(bytes);
    }
    material.extend(diffused.iter().zip(key).map(|(d, k)| d ^ k));
    material.resize(material.len().next_multiple_of(512), 0);
    material
}

fn diffuse(hash: &str, bytes: &[u8]) -> Vec<u8> {
    let length = digest(hash, &[]).len();
    let piece = |(number, piece): (u32, &[u8])| {
        let mut all = number.to_be_bytes().to_vec();
        all.extend(piece);
        let digest = digest(hash, &all);
        digest[..piece.len()].to_vec()
    };
    (0..).zip(bytes.chunks(length)).flat_map(piece).collect()
}

fn digest(hash: &str, bytes: &[u8]) -> Vec<u8> {
    use sha2::Digest;
    match hash {
        "md5" => md5::Md5::digest(bytes).to_vec(),
        "ripemd160" => ripemd::Ripemd160::digest(bytes).to_vec(),
        "sha1" => sha1::Sha1::digest(bytes).to_vec(),
        "sha224" => sha2::Sha224::digest(bytes).to_vec(),
        "sha256" => sha2::Sha256::digest(bytes).to_vec(),
        "sha384" => sha2::Sha384::digest(bytes).to_vec(),
        "sha512" => sha2::Sha512::digest(bytes).to_vec(),
        "sm3" => sm3::Sm3::digest(bytes).to_vec(),
        other => panic!("hash {other}"),
    }
}

fn derive(hash: &str, password: &[u8], salt: &[u8], rounds: u32, into: &mut [u8]) {
    let derive = match hash {
        "md5" => pbkdf2::pbkdf2_hmac::<md5::Md5>,
        "ripemd160" => pbkdf2::pbkdf2_hmac::<ripemd::Ripemd160>,
        "sha1" => pbkdf2::pbkdf2_hmac::<sha1::Sha1>,
        "sha224" => pbkdf2::pbkdf2_hmac::<sha2::Sha224>,
        "sha256" => pbkdf2::pbkdf2_hmac::<sha2::Sha256>,
        "sha384" => pbkdf2::pbkdf2_hmac::<sha2::Sha384>,
        "sha512" => pbkdf2::pbkdf2_hmac::<sha2::Sha512>,
        "sm3" => pbkdf2::pbkdf2_hmac::<sm3::Sm3>,
        other => panic!("hash {other}"),
    };
    derive(password, salt, rounds, into);
}
