//! Dirty bitmaps: the header extension, the entries of the bitmap directory and of a bitmap table.

use std::fmt;

use super::header::{be32, be64};
use super::{BadEntry, Geometry, Header, HostCluster, HostOffset, OFFSET_MASK};
use crate::error::{Error, Result, legible};

/// The bitmap directory is at most this many bytes (QEMU's limit).
const MAX_DIRECTORY_BYTES: u64 = 1024 * 65535;
/// A bitmap is at most this many bytes (QEMU's limit).
pub const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// Bytes of a directory entry's part of fixed length.
const ENTRY_FIXED_LENGTH: usize = 24;
/// Where in a directory entry its flags stand.
const FLAGS_AT: usize = 12;
/// The bitmap was not stored since the image was last changed: what is in the file is stale.
const FLAG_IN_USE: u32 = 1 << 0;
/// The bitmap records every change of the disk.
const FLAG_AUTO: u32 = 1 << 1;
/// Directory entry flags that are defined, of those a reader may accept.
const KNOWN_FLAGS: u32 = FLAG_IN_USE | FLAG_AUTO;

/// The bitmaps header extension: where the bitmap directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Entries of the directory.
    pub count: u32,
    /// Where it starts.
    pub directory_offset: HostOffset,
    /// Its bytes.
    pub directory_size: u64,
}

impl BitmapsExtension {
    /// The extension with this data.
    ///
    /// # Errors
    /// `Corrupt` with anything that the format does not allow.
    pub fn parse(data: &[u8], geometry: &Geometry) -> Result<Self> {
        let extension = BitmapsExtension {
            count: be32(data, 0),
            directory_size: be64(data, 8),
            directory_offset: HostOffset(be64(data, 16)),
        };
        let sound = data.len() == 24
            && be32(data, 4) == 0
            && (1..=65535).contains(&extension.count)
            && geometry.is_aligned(extension.directory_offset.0)
            && (1..=MAX_DIRECTORY_BYTES).contains(&extension.directory_size);
        if sound {
            Ok(extension)
        } else {
            Err(Error::corrupt("header: the bitmaps extension makes no sense"))
        }
    }
}

/// An entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Where the bitmap table starts: a multiple of the cluster size.
    pub table_offset: HostOffset,
    /// Entries of the bitmap table: within the format's limits.
    pub table_entries: u32,
    /// What is stored is stale: the image was changed since, or is open for that.
    pub in_use: bool,
    /// Every change of the disk is to be recorded.
    pub auto: bool,
    /// log2 of the bytes of the disk that one bit is for, 9 to 31.
    pub granularity_bits: u32,
    /// What it is called, as raw bytes.
    pub name: Vec<u8>,
    /// Bytes of this directory entry with its padding.
    pub length: usize,
}

impl BitmapEntry {
    /// The first entry in `bytes`, the rest of the directory of the image that has `header`.
    ///
    /// # Errors
    /// `Corrupt` with an entry that leaves the directory or that the format does not allow.
    pub fn parse(bytes: &[u8], header: &Header) -> Result<Self> {
        let g = &header.geometry;
        let lengths = be32(bytes, 16);
        let (kind, granularity_bits) = (lengths >> 24, lengths >> 16 & 0xff);
        let (name_size, extra_size) = ((lengths & 0xffff) as usize, be32(bytes, 20));
        let flags = be32(bytes, FLAGS_AT);
        let name = bytes.get(ENTRY_FIXED_LENGTH..ENTRY_FIXED_LENGTH + name_size);
        let entry = BitmapEntry {
            table_offset: HostOffset(be64(bytes, 0)),
            table_entries: be32(bytes, 8),
            in_use: flags & FLAG_IN_USE != 0,
            auto: flags & FLAG_AUTO != 0,
            granularity_bits,
            name: name.unwrap_or_default().to_vec(),
            length: (ENTRY_FIXED_LENGTH + name_size).next_multiple_of(8),
        };
        let bitmap_bytes = u64::from(entry.table_entries) << g.cluster_bits();
        let covered = (u128::from(bitmap_bytes) * 8) << granularity_bits.min(31);
        let sound = bytes.len() >= entry.length
            && extra_size == 0
            && kind == 1
            && name_size <= 1023
            && (9..=31).contains(&granularity_bits)
            && flags & !KNOWN_FLAGS == 0
            && entry.table_offset.0 != 0
            && g.is_aligned(entry.table_offset.0)
            && entry.table_entries != 0
            && bitmap_bytes <= MAX_BITMAP_BYTES
            // A stale one may be of a size that the disk once had.
            && (entry.in_use || u128::from(header.size) <= covered);
        if sound {
            Ok(entry)
        } else {
            Err(Error::corrupt("an entry of the bitmap directory makes no sense"))
        }
    }

    /// Writes what can change (where the table is, and the flags) to `bytes`, which start with the
    /// entry as it was.
    pub fn update(&self, bytes: &mut [u8]) {
        bytes[0..8].copy_from_slice(&self.table_offset.0.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.table_entries.to_be_bytes());
        let in_use = if self.in_use { FLAG_IN_USE } else { 0 };
        let flags = in_use | if self.auto { FLAG_AUTO } else { 0 };
        bytes[FLAGS_AT..FLAGS_AT + 4].copy_from_slice(&flags.to_be_bytes());
    }

    /// The number of bits that a disk of `size` bytes has.
    pub fn bits_for(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.granularity_bits)
    }

    /// The entries that its table needs for a disk of `size` bytes.
    pub fn table_entries_for(&self, size: u64, geometry: &Geometry) -> u64 {
        geometry.clusters_for(self.bits_for(size).div_ceil(8)).0
    }
}

/// As a person reads it: its name.
impl fmt::Display for BitmapEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bitmap {}", legible(&self.name))
    }
}

/// The directory that `bytes` are, of `count` entries.
///
/// # Errors
/// As [`BitmapEntry::parse`]; `Corrupt` where there are fewer or more than `count`.
pub fn bitmap_directory(bytes: &[u8], count: u32, header: &Header) -> Result<Vec<BitmapEntry>> {
    let mut entries = Vec::new();
    let mut rest = bytes;
    for _ in 0..count {
        let entry = BitmapEntry::parse(rest, header)?;
        rest = &rest[entry.length..];
        entries.push(entry);
    }
    match rest.is_empty() {
        true => Ok(entries),
        false => Err(Error::corrupt("the bitmap directory has more entries than the header says")),
    }
}

/// What an entry of a bitmap table says of the bits that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapBits {
    /// All of them are zeros.
    Zeros,
    /// All of them are ones.
    Ones,
    /// They are in this cluster: bit `n` is bit `n % 8`, from the least significant one, of byte
    /// `n / 8`.
    Stored(HostCluster),
}

impl BitmapBits {
    /// The entry that reads `raw`.
    ///
    /// # Errors
    /// An entry that the format does not allow.
    pub fn decode(raw: u64, geometry: &Geometry) -> std::result::Result<Self, BadEntry> {
        let offset = raw & OFFSET_MASK;
        // Bit 0, all ones, is only defined where there is no offset.
        let allowed = OFFSET_MASK | u64::from(offset == 0);
        if raw & !allowed != 0 {
            return Err(BadEntry::ReservedBits(raw));
        }
        if !geometry.is_aligned(offset) {
            return Err(BadEntry::Unaligned(HostOffset(offset)));
        }
        Ok(match raw {
            0 => BitmapBits::Zeros,
            1 => BitmapBits::Ones,
            _ => BitmapBits::Stored(geometry.host_cluster(HostOffset(offset))),
        })
    }

    /// The entry as it stands in the file.
    pub fn encode(self, geometry: &Geometry) -> u64 {
        match self {
            BitmapBits::Zeros => 0,
            BitmapBits::Ones => 1,
            BitmapBits::Stored(cluster) => geometry.host_offset(cluster).0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmap_table_entries_are_what_they_were_when_they_come_back() {
        let g = Geometry::new(3, 16, 4, false);
        let stored = BitmapBits::Stored(HostCluster(5));
        for (raw, bits) in [(0, BitmapBits::Zeros), (1, BitmapBits::Ones), (0x50000, stored)] {
            assert_eq!(BitmapBits::decode(raw, &g), Ok(bits));
            assert_eq!(bits.encode(&g), raw);
        }
        for bad in [0x50001, 0x200, 2, 1 << 60] {
            assert!(BitmapBits::decode(bad, &g).is_err(), "{bad:#x}");
        }
    }

    #[test]
    fn an_extension_of_the_wrong_length_is_refused() {
        let g = Geometry::new(3, 16, 4, false);
        let mut data = [0; 24];
        data[3] = 1;
        data[15] = 32;
        data[21] = 5;
        let extension = BitmapsExtension::parse(&data, &g).unwrap();
        assert_eq!(extension.directory_offset, HostOffset(0x50000));
        assert!(BitmapsExtension::parse(&data[..23], &g).is_err());
        data[23] = 1;
        assert!(BitmapsExtension::parse(&data, &g).is_err());
    }
}
