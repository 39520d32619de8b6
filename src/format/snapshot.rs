//! Entries of the snapshot table: contiguous, of variable length, each starting at a multiple of 8.

use super::HostOffset;
use super::header::{be32, be64};
use crate::error::{Error, Result};

/// An image has at most this many internal snapshots (QEMU's limit).
pub const MAX_SNAPSHOTS: u32 = 65536;
/// The snapshot table is at most this many bytes (QEMU's limit).
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;
/// The extra data of an entry is at most this many bytes (QEMU's limit).
const MAX_EXTRA_DATA: u32 = 1024;

/// One internal snapshot, as far as the walk over an image needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table starts. Not checked.
    pub l1_table_offset: HostOffset,
    /// Entries of its L1 table. Not checked.
    pub l1_size: u32,
    /// Bytes of extra data. Version 3 requires 16 at least.
    pub extra_data_size: u32,
    /// Its name, made safe to print.
    pub name: String,
}

impl Snapshot {
    /// Bytes of an entry's part of fixed length.
    pub const FIXED_LENGTH: usize = 40;

    /// Bytes of the whole entry that starts with `fixed`, without the padding to 8.
    ///
    /// # Errors
    /// `Corrupt` with more extra data than the format's readers accept.
    pub fn length(fixed: &[u8; Self::FIXED_LENGTH]) -> Result<usize> {
        let lengths = be32(fixed, 12);
        let extra = be32(fixed, 36);
        if extra > MAX_EXTRA_DATA {
            return Err(Error::corrupt(format!(
                "a snapshot table entry has {extra} bytes of extra data, allowed are 1024"
            )));
        }
        let (id, name) = (lengths >> 16, lengths & 0xffff);
        Ok(Self::FIXED_LENGTH + (extra + id + name) as usize)
    }

    /// The entry in `bytes`, which are as many as [`Snapshot::length`] says.
    pub fn parse(bytes: &[u8]) -> Self {
        let name_length = (be32(bytes, 12) & 0xffff) as usize;
        let name = bytes.get(bytes.len().saturating_sub(name_length)..).unwrap_or_default();
        Snapshot {
            l1_table_offset: HostOffset(be64(bytes, 0)),
            l1_size: be32(bytes, 8),
            extra_data_size: be32(bytes, 36),
            name: String::from_utf8_lossy(name).escape_debug().to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixed(extra: u32) -> [u8; 40] {
        let mut bytes = [0; 40];
        bytes[0..8].copy_from_slice(&0x50000u64.to_be_bytes());
        bytes[8..12].copy_from_slice(&7u32.to_be_bytes());
        bytes[12..14].copy_from_slice(&1u16.to_be_bytes());
        bytes[14..16].copy_from_slice(&3u16.to_be_bytes());
        bytes[36..40].copy_from_slice(&extra.to_be_bytes());
        bytes
    }

    #[test]
    fn an_entry_is_its_fixed_part_extra_data_id_and_name() {
        let length = Snapshot::length(&fixed(24)).unwrap();
        assert_eq!(length, 40 + 24 + 1 + 3);
        let mut bytes = fixed(24).to_vec();
        bytes.resize(40 + 24, 0);
        bytes.extend(b"1a\nb");
        assert_eq!(
            Snapshot::parse(&bytes),
            Snapshot {
                l1_table_offset: HostOffset(0x50000),
                l1_size: 7,
                extra_data_size: 24,
                name: "a\\nb".into()
            }
        );
    }

    #[test]
    fn extra_data_has_a_limit() {
        assert!(Snapshot::length(&fixed(1024)).is_ok());
        assert!(Snapshot::length(&fixed(1025)).is_err());
        assert!(Snapshot::length(&fixed(u32::MAX)).is_err());
    }
}
