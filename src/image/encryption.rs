//! Encrypted data: between the guest's bytes and the sectors in the file.
//!
//! What decrypts to zeros is not zeros in the file, so much that is cheap elsewhere is not here:
//!
//! - a cluster of the pool reads as zeros on the host and as anything through the cipher. Whoever
//!   takes one fills all of it, with encrypted zeros where there is no data, and the entry that leads
//!   there reaches the disk only after that ([`Rule::EncryptedBeforeEntry`]);
//! - a part of a cluster cannot be punched: encrypted zeros are written to it. Whether a cluster has
//!   become all zeros, and can be unmapped, is seen by decrypting it;
//! - a hole in a data file says nothing, and none is made;
//! - data that moves is decrypted and encrypted anew with LUKS, where the IV comes from the place in
//!   the file.
//!
//! Compressed clusters are not encrypted: QEMU neither makes them beside encryption with `qemu-img
//! convert` nor decrypts them where they are.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use super::Image;
use super::write::is_all_zero;
use crate::crypt::{DataCipher, Location, SECTOR, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Header, HostCluster};
use crate::rules::Rule;
use crate::storage::Storage;
use crate::tables::LinkOrder;

/// So much is encrypted and written at a time: what the processor's cache holds.
const PIECE: usize = 256 << 10;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// How an image is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// The older AES method, which cannot tell a wrong key from the right one.
    Aes,
    /// LUKS, version 1.
    Luks,
}

impl Encryption {
    pub(super) fn of(header: &Header) -> Option<Encryption> {
        match header.crypt_method {
            1 => Some(Encryption::Aes),
            2 => Some(Encryption::Luks),
            _ => None,
        }
    }
}

impl std::fmt::Display for Encryption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Encryption::Aes => "AES",
            Encryption::Luks => "LUKS",
        })
    }
}

impl Image {
    /// The cipher of the encrypted image in `storage`, for [`super::Beside`]. Takes a second or
    /// so.
    ///
    /// # Errors
    /// `WrongKey`, as far as that can be told; `Invalid` for an image that is not encrypted;
    /// `Corrupt` and `Unsupported` for a LUKS header that is not served; host errors.
    pub fn unlock(storage: &dyn Storage, passphrase: &Secret) -> Result<Arc<DataCipher>> {
        let header = super::open::read_header(storage)?;
        let cipher = match Encryption::of(&header) {
            Some(Encryption::Aes) => DataCipher::aes(passphrase),
            Some(Encryption::Luks) => match header.luks()? {
                Some((offset, length)) => {
                    DataCipher::open_luks(storage, offset.0, length, passphrase)
                }
                None => Err(Error::corrupt("header: it does not say where the LUKS header is")),
            },
            None => Err(Error::invalid("the image is not encrypted")),
        };
        cipher.map(Arc::new)
    }

    /// Whether a range may be written in place beside others who do: no sector has to be read for
    /// what is around it.
    pub(super) fn is_writable_by_many(&self, range: &Range<u64>) -> bool {
        self.data.cipher.is_none() || is_aligned(range.start) && is_aligned(range.end)
    }

    /// When an entry that leads to a new cluster may reach the disk, where it could be so by `order`
    /// if zeros were zeros.
    pub(super) fn order_of_new(&self, order: LinkOrder) -> LinkOrder {
        let waits = self.data.cipher.is_some() && Rule::EncryptedBeforeEntry.is_kept();
        if waits { LinkOrder::AfterSync } else { order }
    }

    pub(super) fn read_encrypted(
        &self,
        cipher: &DataCipher,
        buf: &mut [u8],
        place: Location,
    ) -> Result<()> {
        let (before, middle, after) = split(buf.len(), place.host);
        let (head, rest) = buf.split_at_mut(before);
        let (whole, tail) = rest.split_at_mut(middle);
        if !head.is_empty() {
            let (sector, within) = self.read_sector(cipher, place)?;
            head.copy_from_slice(&sector[within..within + before]);
        }
        if !whole.is_empty() {
            let place = place.after(before);
            self.read_plain(whole, place.host)?;
            cipher.decrypt(whole, place)?;
        }
        if !tail.is_empty() {
            let (sector, _) = self.read_sector(cipher, place.after(before + middle))?;
            tail.copy_from_slice(&sector[..after]);
        }
        Ok(())
    }

    /// The sector that `at` lies in, and how far from its start.
    fn read_sector(&self, cipher: &DataCipher, place: Location) -> Result<([u8; SECTOR], usize)> {
        let within = place.host as usize % SECTOR;
        let start = sector_start(place);
        let mut sector = [0; SECTOR];
        self.read_plain(&mut sector, start.host)?;
        cipher.decrypt(&mut sector, start)?;
        Ok((sector, within))
    }

    /// Parts of sectors are read and written back: nobody else may write them meanwhile.
    pub(super) fn write_encrypted(
        &self,
        cipher: &DataCipher,
        data: &[u8],
        place: Location,
    ) -> Result<()> {
        let (before, middle, _) = split(data.len(), place.host);
        let (head, rest) = data.split_at(before);
        let (whole, tail) = rest.split_at(middle);
        self.write_in_sector(cipher, head, place)?;
        self.write_sectors(cipher, whole, place.after(before))?;
        self.write_in_sector(cipher, tail, place.after(before + middle))
    }

    fn write_in_sector(&self, cipher: &DataCipher, data: &[u8], place: Location) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let (mut sector, within) = self.read_sector(cipher, place)?;
        sector[within..within + data.len()].copy_from_slice(data);
        self.write_sectors(cipher, &sector, sector_start(place))
    }

    fn write_sectors(&self, cipher: &DataCipher, data: &[u8], place: Location) -> Result<()> {
        thread_local!(static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
        BUFFER.with_borrow_mut(|buffer| {
            data.chunks(PIECE).enumerate().try_for_each(|(number, piece)| {
                let place = place.after(number * PIECE);
                buffer.clear();
                buffer.extend_from_slice(piece);
                cipher.encrypt(buffer, place)?;
                self.write_plain(buffer, place.host)
            })
        })
    }

    /// Makes `length` bytes at `at`, which are in use and may be written in place, read zeros.
    pub(super) fn zero_data(&self, place: Location, length: u64) -> Result<()> {
        let Some(cipher) = &self.data.cipher else {
            return self.erase_data(place.host..place.host + length);
        };
        let mut done = 0;
        while done < length {
            // To the end of a sector, so that no sector is written twice.
            let most = ZEROS.len() as u64 - (place.host + done) % SECTOR as u64;
            let piece = (length - done).min(most);
            self.write_encrypted(cipher, &ZEROS[..piece as usize], place.after(done as usize))?;
            done += piece;
        }
        Ok(())
    }

    /// Makes `cleared` of the clusters or subclusters in use at `unit` (guest offsets, the start of
    /// both of which is at `host` and so many bytes on) read zeros. Whether all of `unit` does so
    /// now, as far as that can be told.
    pub(super) fn zero_part(
        &self,
        unit: &Range<u64>,
        cleared: &Range<u64>,
        host: u64,
    ) -> Result<bool> {
        let place = Location { host, guest: unit.start };
        let part = place.after((cleared.start - unit.start) as usize);
        let length = cleared.end - cleared.start;
        if self.data.cipher.is_none() {
            self.zero_data(part, length)?;
            return self.is_hole(host..host + (unit.end - unit.start));
        }
        let mut bytes = vec![0; (unit.end - unit.start) as usize];
        self.read_data(&mut bytes, place)?;
        bytes[(cleared.start - unit.start) as usize..][..length as usize].fill(0);
        if is_all_zero(&bytes) {
            // Whoever unmaps it need not write it.
            return Ok(true);
        }
        self.zero_data(part, length).map(|()| false)
    }

    /// Makes bytes that were read from one host cluster what they have to be in another.
    pub(super) fn carry(&self, bytes: &mut [u8], from: HostCluster, to: HostCluster) -> Result<()> {
        let Some(cipher) = self.data.cipher.as_ref().filter(|c| c.is_bound_to_place()) else {
            return Ok(());
        };
        let place = |cluster| Location { host: self.geometry.host_offset(cluster).0, guest: 0 };
        cipher.decrypt(bytes, place(from))?;
        cipher.encrypt(bytes, place(to))
    }

    /// Whether what is in a host cluster depends on where that is.
    pub(super) fn is_bound_to_place(&self) -> bool {
        self.data.cipher.as_ref().is_some_and(|cipher| cipher.is_bound_to_place())
    }
}

/// The cipher for opening an image that has `header`.
pub(super) fn fitting(
    header: &Header,
    cipher: Option<Arc<DataCipher>>,
) -> Result<Option<Arc<DataCipher>>> {
    match (Encryption::of(header), &cipher) {
        (Some(encryption), None) => Err(Error::new(
            ErrorKind::NoKey,
            format!("the image is encrypted ({encryption}) and there is no key for it"),
        )),
        (None, Some(_)) => Err(Error::invalid("a key for an image that is not encrypted")),
        _ => Ok(cipher),
    }
}

fn is_aligned(offset: u64) -> bool {
    offset.is_multiple_of(SECTOR as u64)
}

fn sector_start(place: Location) -> Location {
    let within = place.host % SECTOR as u64;
    Location { host: place.host - within, guest: place.guest - within }
}

/// How `length` bytes from `offset` on lie in sectors: a part of the first, whole ones, a part of
/// the last.
fn split(length: usize, offset: u64) -> (usize, usize, usize) {
    let within = offset as usize % SECTOR;
    let before = if within == 0 { 0 } else { length.min(SECTOR - within) };
    let middle = (length - before) / SECTOR * SECTOR;
    (before, middle, length - before - middle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_split_at_sectors() {
        for (offset, length, parts) in [
            (0, 0, (0, 0, 0)),
            (0, 512, (0, 512, 0)),
            (1024, 1025, (0, 1024, 1)),
            (1, 5, (5, 0, 0)),
            (1, 511, (511, 0, 0)),
            (1, 512, (511, 0, 1)),
            (511, 1026, (1, 1024, 1)),
        ] {
            assert_eq!(split(length, offset), parts, "{length} bytes at {offset}");
        }
    }
}
