//! The LUKS header, version 1, and what its key slots keep: the master key, split in many stripes
//! and encrypted with a key that is derived from a passphrase.
//!
//! A header is not trusted. Stripes are 4000, as everywhere, so the material of a slot is at most
//! 256 KB; and no more rounds of PBKDF2 are done than [`MOST_WORK`] for all slots together.

use zeroize::Zeroize;

use super::SECTOR;
use super::cipher::{self, SectorCipher};
use super::hash::Hash;
use super::memory::Secret;
use crate::error::{Error, ErrorKind, Result};
use crate::format::be32;
use crate::storage::Storage;

const LENGTH: usize = 592;
const MAGIC: &[u8; 8] = b"LUKS\xba\xbe\x00\x01";
const SLOTS: usize = 8;
const SLOT_ENABLED: u32 = 0x00ac_71f3;
const STRIPES: u32 = 4000;
const DIGEST: usize = 20;
/// Bytes of the longest master key: XTS with two of 256 bits.
const MAX_KEY: u32 = 64;
/// Rounds of PBKDF2, times the digests that one key takes: half a minute or so. QEMU makes slots of
/// about 20 million in all, by default and on a fast machine.
const MOST_WORK: u64 = 1 << 28;

/// A LUKS header, whose bytes make sense.
struct Header {
    cipher: String,
    mode: String,
    hash: Hash,
    key_bytes: usize,
    digest: [u8; DIGEST],
    salt: [u8; 32],
    rounds: u32,
    /// Those that are in use, with their numbers.
    slots: Vec<(usize, Slot)>,
}

/// A key slot as it stands in the header.
struct Slot {
    rounds: u32,
    salt: [u8; 32],
    /// Where its material starts, in bytes from the header's start.
    offset: u64,
    stripes: u32,
}

/// Opens the header in the `length` bytes from `offset` on: the cipher of the data.
pub(super) fn open(
    storage: &dyn Storage,
    offset: u64,
    length: u64,
    passphrase: &[u8],
) -> Result<Box<dyn SectorCipher>> {
    let mut bytes = vec![0; LENGTH];
    storage
        .read_at(&mut bytes, offset)
        .map_err(|e| Error::io(format!("reading the LUKS header at {offset:#x}"), e))?;
    let header = Header::parse(&bytes)?;
    let mut work = Budget(MOST_WORK);
    let mut complaint = None;
    for (number, slot) in &header.slots {
        let slot_is_bad = |what: String| format!("key slot {number} {what}");
        if let Err(what) = header.check_slot(slot, length, &mut work) {
            complaint.get_or_insert(slot_is_bad(what));
            continue;
        }
        let mut material = Secret::zeroed(header.material_bytes(slot.stripes));
        let at = offset + slot.offset;
        storage
            .read_at(&mut material, at)
            .map_err(|e| Error::io(format!("reading key slot {number} at {at:#x}"), e))?;
        if let Some(key) = header.try_slot(slot, &mut material, passphrase)? {
            return cipher::new(&header.cipher, &header.mode, &key);
        }
    }
    Err(header.not_opened(complaint))
}

/// How much more work may be done.
struct Budget(u64);

impl Budget {
    fn spend(&mut self, work: u64) -> bool {
        let rest = self.0.checked_sub(work);
        self.0 = rest.unwrap_or(self.0);
        rest.is_some()
    }
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Header> {
        if bytes.get(..6) != MAGIC.get(..6) {
            return Err(Error::corrupt("there is no LUKS header where the image says"));
        }
        let version = u16::from_be_bytes([bytes[6], bytes[7]]);
        if version != 1 {
            let text = format!("LUKS version {version} is not served, only 1, which QEMU makes");
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let name = text(&bytes[72..104]);
        let hash = Hash::named(&name).ok_or_else(|| {
            let name = name.escape_debug();
            Error::new(ErrorKind::Unsupported, format!("LUKS: the hash {name} is not served"))
        })?;
        let key_bytes = be32(bytes, 108);
        if key_bytes == 0 || key_bytes > MAX_KEY {
            return Err(Error::corrupt(format!("LUKS header: a master key of {key_bytes} bytes")));
        }
        let slots = (0..SLOTS).map(|slot| (slot, &bytes[208 + slot * 48..256 + slot * 48]));
        let enabled = slots.filter(|(_, slot)| be32(slot, 0) == SLOT_ENABLED);
        let header = Header {
            cipher: text(&bytes[8..40]),
            mode: text(&bytes[40..72]),
            hash,
            key_bytes: key_bytes as usize,
            digest: array(&bytes[112..132]),
            salt: array(&bytes[132..164]),
            rounds: be32(bytes, 164),
            slots: enabled.map(|(number, slot)| (number, Slot::parse(slot))).collect(),
        };
        // Before anything is derived: it may not be served at all.
        cipher::new(&header.cipher, &header.mode, &vec![0; header.key_bytes])
            .map_err(|e| e.context("LUKS"))?;
        Ok(header)
    }

    /// What is wrong with a slot of a header of `length` bytes in all, or too much of it.
    fn check_slot(&self, slot: &Slot, length: u64, work: &mut Budget) -> Result<(), String> {
        if slot.stripes != STRIPES {
            return Err(format!("is damaged: {} stripes instead of {STRIPES}", slot.stripes));
        }
        let end = slot.offset + self.material_bytes(slot.stripes) as u64;
        if slot.offset < LENGTH as u64 || end > length {
            return Err(format!("is damaged: its material is at {:#x}", slot.offset));
        }
        if slot.rounds == 0 || self.rounds == 0 {
            return Err("is damaged: no rounds of PBKDF2".into());
        }
        let rounds = |rounds: u32, bytes: usize| {
            u64::from(rounds) * bytes.div_ceil(self.hash.length()) as u64
        };
        if !work.spend(rounds(slot.rounds, self.key_bytes) + rounds(self.rounds, DIGEST)) {
            let count = u64::from(slot.rounds) + u64::from(self.rounds);
            return Err(format!(
                "asks for {count} rounds of PBKDF2, more than are done for an image that may be \
                 hostile"
            ));
        }
        Ok(())
    }

    /// Bytes of a slot's material, up to the end of the last sector.
    fn material_bytes(&self, stripes: u32) -> usize {
        (self.key_bytes * stripes as usize).next_multiple_of(SECTOR)
    }

    /// The master key, where `passphrase` opens the slot with this material.
    fn try_slot(
        &self,
        slot: &Slot,
        material: &mut [u8],
        passphrase: &[u8],
    ) -> Result<Option<Secret>> {
        let mut slot_key = Secret::zeroed(self.key_bytes);
        self.hash.derive(passphrase, &slot.salt, slot.rounds, &mut slot_key);
        cipher::new(&self.cipher, &self.mode, &slot_key)?.decrypt(0, material);
        let stripes = &material[..self.key_bytes * slot.stripes as usize];
        let key = merge(self.hash, stripes, self.key_bytes);
        let mut digest = [0; DIGEST];
        self.hash.derive(&key, &self.salt, self.rounds, &mut digest);
        let is_right = digest == self.digest;
        digest.zeroize();
        Ok(is_right.then_some(key))
    }

    fn not_opened(&self, complaint: Option<String>) -> Error {
        let text = match (self.slots.len(), complaint) {
            (0, _) => "its LUKS header has no key slot in use: nothing can open it".into(),
            (_, Some(complaint)) => format!("the key opens no key slot, and {complaint}"),
            (_, None) => "the key opens none of its key slots".into(),
        };
        Error::new(ErrorKind::WrongKey, text)
    }
}

impl Slot {
    fn parse(bytes: &[u8]) -> Slot {
        Slot {
            rounds: be32(bytes, 4),
            salt: array(&bytes[8..40]),
            offset: u64::from(be32(bytes, 40)) * SECTOR as u64,
            stripes: be32(bytes, 44),
        }
    }
}

/// Puts a key together that was split in stripes (the anti-forensic splitter).
fn merge(hash: Hash, stripes: &[u8], key_bytes: usize) -> Secret {
    let mut key = Secret::zeroed(key_bytes);
    let mut diffused = Secret::zeroed(key_bytes.next_multiple_of(hash.length()));
    let mut stripes = stripes.chunks_exact(key_bytes).peekable();
    while let Some(stripe) = stripes.next() {
        key.iter_mut().zip(stripe).for_each(|(byte, other)| *byte ^= other);
        if stripes.peek().is_none() {
            break;
        }
        let pieces = (0u32..).zip(key.chunks(hash.length()));
        for ((number, piece), into) in pieces.zip(diffused.chunks_mut(hash.length())) {
            hash.digest_into(&[&number.to_be_bytes(), piece], into);
        }
        let length = key.len();
        key.copy_from_slice(&diffused[..length]);
    }
    key
}

/// The name in a field that zeros follow.
fn text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

/// The bytes of a field, whose length the caller has right.
fn array<const N: usize>(field: &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.iter_mut().zip(field).for_each(|(byte, other)| *byte = *other);
    bytes
}
