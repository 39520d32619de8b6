//! Entries of the L1 and L2 tables, decoded once into values to match on.

use std::fmt;

use super::{Geometry, HostCluster, HostOffset};

/// Bit 63 of an L1 or L2 entry: the refcount of what it points to is exactly 1.
pub const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Bits 9 to 55 of an L1 or L2 entry (unless compressed) or of a bitmap table's entry: a host offset.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits 9 to 63 of a refcount table entry: the offset of a refcount block.
pub const REFCOUNT_TABLE_OFFSET_MASK: u64 = !0x1ff;

/// A table entry that the format does not allow: corruption.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadEntry {
    /// Bits are set that must be zero.
    ReservedBits(u64),
    /// The offset is no multiple of the cluster size.
    Unaligned(HostOffset),
}

impl fmt::Display for BadEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadEntry::ReservedBits(raw) => write!(f, "has reserved bits set ({raw:#018x})"),
            BadEntry::Unaligned(offset) => {
                write!(f, "points to {offset}, which is not the start of a cluster")
            }
        }
    }
}

/// An entry of the L1 table: where an L2 table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry {
    /// The L2 table's cluster; none where nothing is allocated.
    pub table: Option<HostCluster>,
    /// The table's refcount is exactly 1.
    pub copied: bool,
}

impl L1Entry {
    /// The entry for `raw`.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Self, BadEntry> {
        if raw & !(COPIED | OFFSET_MASK) != 0 {
            return Err(BadEntry::ReservedBits(raw));
        }
        let table = cluster_at(raw & OFFSET_MASK, geometry)?;
        Ok(L1Entry { table, copied: raw & COPIED != 0 })
    }

    /// The entry as it stands in the table.
    pub fn encode(self, geometry: &Geometry) -> u64 {
        self.table.map_or(0, |c| geometry.host_offset(c).0) | flag(self.copied, COPIED)
    }
}

/// An entry of an L2 table: what a guest cluster is.
///
/// With extended L2 entries this is the first of the two words; the bitmap stands in the second
/// and the *reads as zeros* bit does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// Nothing here: reads the backing file, or zeros without one.
    Unallocated,
    /// Reads as zeros, whatever `preallocated` holds.
    Zero {
        /// A host cluster that is kept for this guest cluster.
        preallocated: Option<HostCluster>,
        /// That cluster's refcount is exactly 1.
        copied: bool,
    },
    /// The data is in a host cluster.
    Data {
        /// Where.
        cluster: HostCluster,
        /// That cluster's refcount is exactly 1: it may be written in place.
        copied: bool,
    },
    /// The data is compressed.
    Compressed {
        /// The first byte of the compressed data, at any alignment.
        offset: HostOffset,
        /// The bytes from `offset` to the end of the last 512-byte sector that it covers. The
        /// compressed data ends somewhere in the last sector.
        length: u64,
    },
}

impl L2Entry {
    /// Whether `raw` is the entry of a compressed cluster.
    pub fn is_compressed(raw: u64) -> bool {
        raw & COMPRESSED != 0
    }

    /// The entry for `raw` (the first word, with extended L2 entries).
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Self, BadEntry> {
        if raw & COMPRESSED != 0 {
            // COPIED is never set on one; QEMU ignores it there, and so does this.
            let x = 62 - (geometry.cluster_bits() - 8);
            let offset = raw & ((1 << x) - 1);
            let sectors = (raw & (COMPRESSED - 1)) >> x;
            let length = (sectors + 1) * 512 - offset % 512;
            return Ok(L2Entry::Compressed { offset: HostOffset(offset), length });
        }
        let has_zero_flag = geometry.version() >= 3 && !geometry.extended_l2();
        let allowed = COPIED | OFFSET_MASK | flag(has_zero_flag, ZERO);
        if raw & !allowed != 0 {
            return Err(BadEntry::ReservedBits(raw));
        }
        let cluster = cluster_at(raw & OFFSET_MASK, geometry)?;
        let copied = raw & COPIED != 0;
        Ok(match cluster {
            _ if raw & ZERO != 0 => L2Entry::Zero { preallocated: cluster, copied },
            Some(cluster) => L2Entry::Data { cluster, copied },
            None => L2Entry::Unallocated,
        })
    }

    /// The entry as it stands in the table.
    ///
    /// Compressed entries are only read by this program, never made: they encode to what they were
    /// decoded from.
    pub fn encode(self, geometry: &Geometry) -> u64 {
        match self {
            L2Entry::Unallocated => 0,
            L2Entry::Zero { preallocated, copied } => {
                preallocated.map_or(0, |c| geometry.host_offset(c).0) | flag(copied, COPIED) | ZERO
            }
            L2Entry::Data { cluster, copied } => {
                geometry.host_offset(cluster).0 | flag(copied, COPIED)
            }
            L2Entry::Compressed { offset, length } => {
                let x = 62 - (geometry.cluster_bits() - 8);
                let sectors = (length + offset.0 % 512) / 512 - 1;
                COMPRESSED | sectors << x | offset.0
            }
        }
    }
}

fn flag(set: bool, bit: u64) -> u64 {
    if set { bit } else { 0 }
}

fn cluster_at(offset: u64, geometry: &Geometry) -> Result<Option<HostCluster>, BadEntry> {
    if !geometry.is_aligned(offset) {
        return Err(BadEntry::Unaligned(HostOffset(offset)));
    }
    Ok((offset != 0).then(|| geometry.host_cluster(HostOffset(offset))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(version: u32, cluster_bits: u32) -> Geometry {
        Geometry::new(version, cluster_bits, 4, false)
    }

    #[test]
    fn standard_entries_survive_a_round_trip() {
        let g = geometry(3, 16);
        for raw in [0, 1, COPIED | 0x50000, 0x50000, COPIED | 0x50000 | 1, 0x50001] {
            assert_eq!(L2Entry::decode(raw, &g).unwrap().encode(&g), raw, "{raw:#x}");
        }
    }

    #[test]
    fn compressed_entries_survive_a_round_trip_at_every_cluster_size() {
        for bits in 9..=21 {
            let g = geometry(3, bits);
            let x = 62 - (bits - 8);
            let raw = COMPRESSED | 1 << x | 0x12345;
            let entry = L2Entry::decode(raw, &g).unwrap();
            let L2Entry::Compressed { offset, length } = entry else { panic!("{entry:?}") };
            assert_eq!(offset.0, 0x12345);
            assert_eq!((offset.0 + length) % 512, 0);
            assert_eq!(entry.encode(&g), raw);
        }
    }

    #[test]
    fn version_2_has_no_zero_flag() {
        assert_eq!(
            L2Entry::decode(1, &geometry(2, 16)),
            Err(BadEntry::ReservedBits(1)),
            "the zero flag is a reserved bit there"
        );
    }

    #[test]
    fn reserved_bits_and_unaligned_offsets_are_corruption() {
        let g = geometry(3, 16);
        assert_eq!(L2Entry::decode(2, &g), Err(BadEntry::ReservedBits(2)));
        assert_eq!(L2Entry::decode(1 << 60, &g), Err(BadEntry::ReservedBits(1 << 60)));
        assert_eq!(L2Entry::decode(0x200, &g), Err(BadEntry::Unaligned(HostOffset(0x200))));
        assert_eq!(L1Entry::decode(1, &g), Err(BadEntry::ReservedBits(1)));
    }
}
