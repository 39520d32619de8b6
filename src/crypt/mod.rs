//! Encryption of guest data: the LUKS header and its key slots, the ciphers, and the memory that keys
//! are in. It knows bytes, sectors and their numbers, nothing of clusters.
//!
//! Data is encrypted by sectors of 512 bytes, each by itself, with an IV made from the sector's
//! number. So a write of one sector touches no other, and a sector that a crash tears away from the
//! rest of a write still decrypts. The number is that of the place in the image file with LUKS, and
//! that on the disk with the older AES method ([`DataCipher::is_bound_to_place`]): `qcow2_co_encdec`
//! in QEMU's `block/qcow2-threads.c`.
//!
//! The block ciphers, the modes CBC and CTR, the hashes and PBKDF2 are those of the RustCrypto crates;
//! the rest is theirs put together as LUKS says (on-disk format specification 1.2.3) and as QEMU's
//! `crypto/` does it.
//!
//! Keys are in memory of their own that is wiped when it is given back, left out of core dumps, and
//! kept out of the swap where the limits allow ([`Secret`]).

mod cipher;
mod hash;
mod luks;
mod memory;

pub use memory::Secret;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use cipher::SectorCipher;
use memory::wipe_stack;

/// Bytes that are encrypted as one.
pub const SECTOR: usize = 512;

/// What encrypts the data of one image: its master key, ready for use.
pub struct DataCipher {
    /// `None`: the key is not there, and nothing that needs it is done.
    sectors: Option<Box<dyn SectorCipher>>,
    bound_to_place: bool,
}

/// Where data is, in bytes. Both lie equally far from the start of a sector.
#[derive(Clone, Copy, Debug)]
pub struct Location {
    /// In the file that holds it.
    pub host: u64,
    /// On the disk.
    pub guest: u64,
}

impl Location {
    /// `by` bytes further on.
    #[must_use]
    pub fn after(self, by: usize) -> Location {
        Location { host: self.host + by as u64, guest: self.guest + by as u64 }
    }
}

impl DataCipher {
    /// Opens the LUKS header in the `length` bytes of `storage` from `offset` on with a passphrase.
    ///
    /// # Errors
    /// `WrongKey`; `Corrupt` for a header that makes no sense, `Unsupported` for one that asks for
    /// what there is not, or for more work than a hostile one may cause; host errors.
    pub fn open_luks(
        storage: &dyn Storage,
        offset: u64,
        length: u64,
        passphrase: &Secret,
    ) -> Result<DataCipher> {
        let sectors = luks::open(storage, offset, length, passphrase);
        wipe_stack();
        Ok(DataCipher { sectors: Some(sectors?), bound_to_place: true })
    }

    /// The cipher that LUKS calls `name` and `mode` (as `aes` and `xts-plain64`) with a master key.
    ///
    /// # Errors
    /// `Unsupported`: there is no such cipher, or none with a key of that length.
    pub fn with_key(name: &str, mode: &str, key: &Secret) -> Result<DataCipher> {
        Ok(DataCipher { sectors: Some(cipher::new(name, mode, key)?), bound_to_place: true })
    }

    /// The older AES method: AES-128 in CBC mode, whose key is the first 16 bytes of the passphrase,
    /// with zeros behind a shorter one. Nothing in an image tells whether it is the right one.
    ///
    /// # Errors
    /// None that a passphrase could cause.
    pub fn aes(passphrase: &Secret) -> Result<DataCipher> {
        let mut key = Secret::zeroed(16);
        let length = passphrase.len().min(16);
        key[..length].copy_from_slice(&passphrase[..length]);
        let sectors = cipher::new("aes", "cbc-plain64", &key);
        wipe_stack();
        Ok(DataCipher { sectors: Some(sectors?), bound_to_place: false })
    }

    /// A cipher without its key, for who touches no data.
    #[must_use]
    pub fn without_key() -> DataCipher {
        DataCipher { sectors: None, bound_to_place: true }
    }

    /// Whether data that moves within the file has to be encrypted anew.
    #[must_use]
    pub fn is_bound_to_place(&self) -> bool {
        self.bound_to_place
    }

    /// Encrypts `data`, whole sectors that belong at `at`.
    ///
    /// # Errors
    /// `NoKey`.
    pub fn encrypt(&self, data: &mut [u8], at: Location) -> Result<()> {
        self.sectors()?.encrypt(self.number(at), data);
        Ok(())
    }

    /// Decrypts `data`, whole sectors that were read from `at`.
    ///
    /// # Errors
    /// `NoKey`.
    pub fn decrypt(&self, data: &mut [u8], at: Location) -> Result<()> {
        self.sectors()?.decrypt(self.number(at), data);
        Ok(())
    }

    fn sectors(&self) -> Result<&dyn SectorCipher> {
        self.sectors
            .as_deref()
            .ok_or_else(|| Error::new(ErrorKind::NoKey, "the image was opened without its key"))
    }

    fn number(&self, at: Location) -> u64 {
        let offset = if self.bound_to_place { at.host } else { at.guest };
        offset / SECTOR as u64
    }
}

impl std::fmt::Debug for DataCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataCipher")
            .field("bound_to_place", &self.bound_to_place)
            .finish_non_exhaustive()
    }
}
