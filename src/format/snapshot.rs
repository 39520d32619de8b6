//! Entries of the snapshot table: contiguous, of variable length, each starting at a multiple of 8.

use std::time::Duration;

use super::HostOffset;
use super::header::{be32, be64};
use crate::error::{Error, Result, legible};

/// An image has at most this many internal snapshots (QEMU's limit).
pub const MAX_SNAPSHOTS: u32 = 65536;
/// The snapshot table is at most this many bytes (QEMU's limit).
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;
/// The extra data of an entry is at most this many bytes (QEMU's limit).
const MAX_EXTRA_DATA: u32 = 1024;

/// Version 3 wants at least this much extra data.
const V3_EXTRA_DATA: usize = 16;
/// The first 8 bytes of the extra data: bytes of the state of the virtual machine.
const VM_STATE_SIZE_64: usize = 0;
/// The second 8 bytes of the extra data: bytes of the virtual disk.
const DISK_SIZE: usize = 8;

/// One internal snapshot: an entry of the snapshot table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table starts. Not checked.
    pub l1_table_offset: HostOffset,
    /// Entries of its L1 table. Not checked.
    pub l1_size: u32,
    /// Its id, as raw bytes; QEMU makes it a number.
    pub id: Vec<u8>,
    /// Its name, as raw bytes.
    pub name: Vec<u8>,
    /// When it was taken: seconds since 1970.
    pub seconds: u32,
    /// And nanoseconds.
    pub nanoseconds: u32,
    /// How long the virtual machine had been running, in nanoseconds.
    pub vm_clock: u64,
    /// Bytes of the virtual machine's state, where the extra data does not say.
    vm_state_size: u32,
    /// The extra data, what is not known of it included.
    pub extra_data: Vec<u8>,
}

impl Snapshot {
    /// Bytes of an entry's part of fixed length.
    pub const FIXED_LENGTH: usize = 40;

    /// A snapshot of a disk of `disk_size` bytes, without the state of a virtual machine. Version 2
    /// images get the same extra data as those of version 3, as QEMU does it.
    pub fn new(id: Vec<u8>, name: Vec<u8>, disk_size: u64, taken: Duration) -> Self {
        let no_instruction_count = u64::MAX;
        let extra_data = [0, disk_size, no_instruction_count].map(u64::to_be_bytes).concat();
        Snapshot {
            l1_table_offset: HostOffset(0),
            l1_size: 0,
            id,
            name,
            seconds: u32::try_from(taken.as_secs()).unwrap_or(u32::MAX),
            nanoseconds: taken.subsec_nanos(),
            vm_clock: 0,
            vm_state_size: 0,
            extra_data,
        }
    }

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
        let lengths = be32(bytes, 12);
        let mut rest = bytes.get(Self::FIXED_LENGTH..).unwrap_or_default();
        let mut take = |length: u32| {
            let (taken, left) = rest.split_at(rest.len().min(length as usize));
            rest = left;
            taken.to_vec()
        };
        Snapshot {
            l1_table_offset: HostOffset(be64(bytes, 0)),
            l1_size: be32(bytes, 8),
            extra_data: take(be32(bytes, 36)),
            id: take(lengths >> 16),
            name: take(lengths & 0xffff),
            seconds: be32(bytes, 16),
            nanoseconds: be32(bytes, 20),
            vm_clock: be64(bytes, 24),
            vm_state_size: be32(bytes, 32),
        }
    }

    /// The entry as it stands in the table, padded to 8 bytes. Id and name are at most 65535 bytes
    /// long.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::FIXED_LENGTH + self.extra_data.len() + 64);
        bytes.extend(self.l1_table_offset.0.to_be_bytes());
        bytes.extend(self.l1_size.to_be_bytes());
        bytes.extend((self.id.len() as u16).to_be_bytes());
        bytes.extend((self.name.len() as u16).to_be_bytes());
        bytes.extend(self.seconds.to_be_bytes());
        bytes.extend(self.nanoseconds.to_be_bytes());
        bytes.extend(self.vm_clock.to_be_bytes());
        bytes.extend(self.vm_state_size.to_be_bytes());
        bytes.extend((self.extra_data.len() as u32).to_be_bytes());
        bytes.extend(&self.extra_data);
        bytes.extend(&self.id);
        bytes.extend(&self.name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    /// Bytes of the virtual disk, where the entry says.
    pub fn disk_size(&self) -> Option<u64> {
        let says = self.extra_data.len() >= DISK_SIZE + 8;
        says.then(|| be64(&self.extra_data, DISK_SIZE))
    }

    /// The virtual disk has `size` bytes, where the entry has room to say so.
    pub fn set_disk_size(&mut self, size: u64) {
        if let Some(field) = self.extra_data.get_mut(DISK_SIZE..DISK_SIZE + 8) {
            field.copy_from_slice(&size.to_be_bytes());
        }
    }

    /// Bytes of the state of the virtual machine; it lies past the end of the disk.
    pub fn vm_state_size(&self) -> u64 {
        match self.extra_data.len() >= VM_STATE_SIZE_64 + 8 {
            true => be64(&self.extra_data, VM_STATE_SIZE_64),
            false => self.vm_state_size.into(),
        }
    }

    /// Whether the entry has all the extra data that version 3 wants.
    pub fn is_complete(&self) -> bool {
        self.extra_data.len() >= V3_EXTRA_DATA
    }

    /// Its name, made safe to print.
    pub fn label(&self) -> String {
        legible(&self.name)
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
        bytes.extend([9, 0x8000, 7].map(u64::to_be_bytes).concat());
        bytes.extend(b"1a\nb");
        let snapshot = Snapshot::parse(&bytes);
        assert_eq!(snapshot.l1_table_offset, HostOffset(0x50000));
        assert_eq!(snapshot.l1_size, 7);
        assert_eq!((&snapshot.id[..], &snapshot.name[..]), (&b"1"[..], &b"a\nb"[..]));
        assert_eq!(snapshot.label(), "a\\nb");
        assert_eq!((snapshot.vm_state_size(), snapshot.disk_size()), (9, Some(0x8000)));
        bytes.resize(72, 0);
        assert_eq!(snapshot.encode(), bytes, "with padding");
    }

    #[test]
    fn an_entry_that_is_written_reads_back_whatever_its_extra_data() {
        let taken = Duration::new(1_700_000_000, 123_456_789);
        let mut snapshot = Snapshot::new(b"12".to_vec(), b"before upgrade".to_vec(), 4096, taken);
        for extra in [0, 8, 16, 17, 24, 1024] {
            snapshot.extra_data.resize(extra, 0xab);
            let bytes = snapshot.encode();
            assert_eq!(bytes.len() % 8, 0);
            let length = Snapshot::length(bytes.first_chunk().unwrap()).unwrap();
            assert_eq!(Snapshot::parse(&bytes[..length]), snapshot);
            assert_eq!(snapshot.is_complete(), extra >= 16);
        }
    }

    #[test]
    fn extra_data_has_a_limit() {
        assert!(Snapshot::length(&fixed(1024)).is_ok());
        assert!(Snapshot::length(&fixed(1025)).is_err());
        assert!(Snapshot::length(&fixed(u32::MAX)).is_err());
    }
}
