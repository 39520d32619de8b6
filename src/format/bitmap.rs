//! Dirty bitmaps: the header extension, the entries of the bitmap directory and of a bitmap table.

use super::header::{be32, be64};
use super::{BadEntry, Geometry, Header, HostCluster, HostOffset, OFFSET_MASK};
use crate::error::{Error, Result};

/// The bitmap directory is at most this many bytes (QEMU's limit).
const MAX_DIRECTORY_BYTES: u64 = 1024 * 65535;
/// A bitmap is at most this many bytes (QEMU's limit).
const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// Bytes of a directory entry's part of fixed length.
const ENTRY_FIXED_LENGTH: usize = 24;
/// Directory entry flags that are defined, of those a reader may accept: in use, auto.
const KNOWN_FLAGS: u32 = 0b11;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Where the bitmap table starts: a multiple of the cluster size.
    pub table_offset: HostOffset,
    /// Entries of the bitmap table: within the format's limits.
    pub table_entries: u32,
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
        let (name_size, extra_size) = (lengths & 0xffff, be32(bytes, 20));
        let entry = BitmapEntry {
            table_offset: HostOffset(be64(bytes, 0)),
            table_entries: be32(bytes, 8),
            length: (ENTRY_FIXED_LENGTH + name_size as usize).next_multiple_of(8),
        };
        let bitmap_bytes = u64::from(entry.table_entries) << g.cluster_bits();
        let covered = (u128::from(bitmap_bytes) * 8) << granularity_bits.min(31);
        let sound = bytes.len() >= entry.length
            && extra_size == 0
            && kind == 1
            && name_size <= 1023
            && (9..=31).contains(&granularity_bits)
            && be32(bytes, 12) & !KNOWN_FLAGS == 0
            && entry.table_offset.0 != 0
            && g.is_aligned(entry.table_offset.0)
            && entry.table_entries != 0
            && bitmap_bytes <= MAX_BITMAP_BYTES
            && u128::from(header.size) <= covered;
        if sound {
            Ok(entry)
        } else {
            Err(Error::corrupt("an entry of the bitmap directory makes no sense"))
        }
    }
}

/// The cluster of bitmap data that an entry of a bitmap table points to; none where the bits are all
/// zeros or all ones.
///
/// # Errors
/// An entry that the format does not allow.
pub fn bitmap_table_cluster(
    raw: u64,
    geometry: &Geometry,
) -> std::result::Result<Option<HostCluster>, BadEntry> {
    let offset = raw & OFFSET_MASK;
    // Bit 0, all ones, is only defined where there is no offset.
    let allowed = OFFSET_MASK | u64::from(offset == 0);
    if raw & !allowed != 0 {
        return Err(BadEntry::ReservedBits(raw));
    }
    if !geometry.is_aligned(offset) {
        return Err(BadEntry::Unaligned(HostOffset(offset)));
    }
    Ok((offset != 0).then(|| geometry.host_cluster(HostOffset(offset))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmap_table_entries_decode() {
        let g = Geometry::new(3, 16, 4, false);
        assert_eq!(bitmap_table_cluster(0, &g), Ok(None));
        assert_eq!(bitmap_table_cluster(1, &g), Ok(None));
        assert_eq!(bitmap_table_cluster(0x50000, &g), Ok(Some(HostCluster(5))));
        assert!(bitmap_table_cluster(0x50001, &g).is_err());
        assert!(bitmap_table_cluster(0x200, &g).is_err());
        assert!(bitmap_table_cluster(1 << 60, &g).is_err());
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
