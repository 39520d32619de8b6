//! Entries of the L1 and L2 tables, decoded once into values to match on.

use std::fmt;

use super::{Geometry, HostCluster, HostOffset, Subclusters};

/// Bit 63 of an L1 or L2 entry: the refcount of what it points to is exactly 1.
pub const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry of version 3: reads as zeros. With extended L2 entries it does not exist.
pub const ZERO: u64 = 1;
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
    /// The bitmap says that a subcluster is allocated and reads as zeros, or is allocated where
    /// there is no host cluster, or it belongs to a compressed cluster.
    Subclusters(u64),
}

impl fmt::Display for BadEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadEntry::ReservedBits(raw) => write!(f, "has reserved bits set ({raw:#018x})"),
            BadEntry::Unaligned(offset) => {
                write!(f, "points to {offset}, which is not the start of a cluster")
            }
            BadEntry::Subclusters(word) => {
                write!(f, "has a subcluster bitmap that makes no sense ({word:#018x})")
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
/// With extended L2 entries it has a second word, the bitmap of its [`Subclusters`], and the first
/// word has no *reads as zeros* bit. A cluster whose subclusters all are the same is the same value
/// with and without them; only where they differ it is [`L2Entry::Mixed`].
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
    /// The subclusters differ, or none of them is allocated though there is a host cluster. Only
    /// with extended L2 entries.
    Mixed(MixedCluster),
}

/// A guest cluster whose subclusters are looked at one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MixedCluster {
    /// The host cluster in which each subcluster has its place; one is allocated only where there
    /// is a cluster.
    pub cluster: Option<HostCluster>,
    /// That cluster's refcount is exactly 1.
    pub copied: bool,
    /// What each subcluster is.
    pub subclusters: Subclusters,
}

impl MixedCluster {
    /// A cluster with nothing in it.
    pub const UNALLOCATED: Self =
        MixedCluster { cluster: None, copied: false, subclusters: Subclusters::UNALLOCATED };

    /// The entry that says so.
    pub fn entry(self) -> L2Entry {
        let MixedCluster { cluster, copied, subclusters } = self;
        match (cluster, subclusters) {
            (None, Subclusters::UNALLOCATED) => L2Entry::Unallocated,
            (preallocated, Subclusters::ZERO) => L2Entry::Zero { preallocated, copied },
            (Some(cluster), Subclusters::ALLOCATED) => L2Entry::Data { cluster, copied },
            _ => L2Entry::Mixed(self),
        }
    }
}

impl L2Entry {
    /// The entry in `bytes`: 8 of them, 16 with extended L2 entries.
    ///
    /// # Errors
    /// [`BadEntry`].
    pub fn read(bytes: &[u8], geometry: &Geometry) -> Result<Self, BadEntry> {
        let word = |bytes: Option<&[u8; 8]>| bytes.map_or(0, |b| u64::from_be_bytes(*b));
        let bitmap = if geometry.extended_l2() { word(bytes.last_chunk()) } else { 0 };
        L2Entry::decode(word(bytes.first_chunk()), bitmap, geometry)
    }

    /// Puts the entry into `bytes`: 8 of them, 16 with extended L2 entries.
    pub fn write(self, bytes: &mut [u8], geometry: &Geometry) {
        let words = self.encode(geometry);
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_be_bytes());
        }
    }

    /// The host cluster that the entry refers to and whether it is marked as COPIED; none where
    /// there is none or the data is compressed.
    pub fn host_cluster(self) -> Option<(HostCluster, bool)> {
        match self {
            L2Entry::Data { cluster, copied } => Some((cluster, copied)),
            L2Entry::Zero { preallocated: cluster, copied }
            | L2Entry::Mixed(MixedCluster { cluster, copied, .. }) => cluster.map(|c| (c, copied)),
            L2Entry::Unallocated | L2Entry::Compressed { .. } => None,
        }
    }

    /// The entry of the same guest cluster whose host cluster is now `to`; one that has none stays
    /// as it is.
    #[must_use]
    pub fn moved_to(self, to: HostCluster, copied: bool) -> Self {
        match self {
            L2Entry::Data { .. } => L2Entry::Data { cluster: to, copied },
            L2Entry::Zero { preallocated: Some(_), .. } => {
                L2Entry::Zero { preallocated: Some(to), copied }
            }
            L2Entry::Mixed(MixedCluster { cluster: Some(_), subclusters, .. }) => {
                L2Entry::Mixed(MixedCluster { cluster: Some(to), copied, subclusters })
            }
            other => other,
        }
    }

    /// The entry as its subclusters; none of a compressed one.
    pub fn subclusters(self) -> Option<MixedCluster> {
        let (cluster, copied, subclusters) = match self {
            L2Entry::Unallocated => (None, false, Subclusters::UNALLOCATED),
            L2Entry::Zero { preallocated, copied } => (preallocated, copied, Subclusters::ZERO),
            L2Entry::Data { cluster, copied } => (Some(cluster), copied, Subclusters::ALLOCATED),
            L2Entry::Mixed(mixed) => return Some(mixed),
            L2Entry::Compressed { .. } => return None,
        };
        Some(MixedCluster { cluster, copied, subclusters })
    }

    /// Whether `raw` is the entry of a compressed cluster.
    pub fn is_compressed(raw: u64) -> bool {
        raw & COMPRESSED != 0
    }

    /// Whether `raw` is the entry of a compressed cluster that makes as much sense as that of one
    /// which is not compressed and COPIED. Only one of the two flags can be right, and the entry
    /// does not say which; what it refers to is the same host cluster either way.
    pub fn may_be_compressed_or_not(raw: u64, geometry: &Geometry) -> bool {
        let standard = L2Entry::decode(raw & !COMPRESSED, 0, geometry);
        let has_cluster = standard.is_ok_and(|entry| entry.host_cluster().is_some());
        raw & COMPRESSED != 0 && raw & COPIED != 0 && has_cluster
    }

    /// The entry whose words are `raw` and, with extended L2 entries, `bitmap` (0 without).
    ///
    /// # Errors
    /// [`BadEntry`].
    pub fn decode(raw: u64, bitmap: u64, geometry: &Geometry) -> Result<Self, BadEntry> {
        if raw & COMPRESSED != 0 {
            if bitmap != 0 {
                return Err(BadEntry::Subclusters(bitmap));
            }
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
        // Offset 0 is as good as any other in a data file: COPIED says that it is one.
        let first = (geometry.data_file() && copied).then_some(HostCluster(0));
        if geometry.extended_l2() {
            let cluster = cluster.or(first);
            let subclusters = Subclusters::from_word(bitmap)
                .filter(|subclusters| cluster.is_some() || !subclusters.any_allocated())
                .ok_or(BadEntry::Subclusters(bitmap))?;
            return Ok(MixedCluster { cluster, copied, subclusters }.entry());
        }
        Ok(match cluster.or(first) {
            _ if raw & ZERO != 0 => L2Entry::Zero { preallocated: cluster, copied },
            Some(cluster) => L2Entry::Data { cluster, copied },
            None => L2Entry::Unallocated,
        })
    }

    /// The words of the entry as they stand in the table; the second one only with extended L2
    /// entries.
    ///
    /// Compressed entries are only read by this program, never made: they encode to what they were
    /// decoded from.
    pub fn encode(self, geometry: &Geometry) -> [u64; 2] {
        if let L2Entry::Compressed { offset, length } = self {
            let x = 62 - (geometry.cluster_bits() - 8);
            let sectors = (length + offset.0 % 512) / 512 - 1;
            return [COMPRESSED | sectors << x | offset.0, 0];
        }
        let (host, bitmap) = match self.subclusters() {
            Some(MixedCluster { cluster, copied, subclusters }) => {
                let host = cluster.map_or(0, |c| geometry.host_offset(c).0);
                (host | flag(copied, COPIED), subclusters.to_word())
            }
            None => (0, 0),
        };
        if geometry.extended_l2() {
            return [host, bitmap];
        }
        [host | flag(matches!(self, L2Entry::Zero { .. }), ZERO), 0]
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

    fn extended() -> Geometry {
        Geometry::new(3, 16, 4, true)
    }

    #[test]
    fn standard_entries_survive_a_round_trip() {
        let g = geometry(3, 16);
        for raw in [0, 1, COPIED | 0x50000, 0x50000, COPIED | 0x50000 | 1, 0x50001] {
            assert_eq!(L2Entry::decode(raw, 0, &g).unwrap().encode(&g), [raw, 0], "{raw:#x}");
        }
    }

    #[test]
    fn compressed_entries_survive_a_round_trip_at_every_cluster_size() {
        for bits in 9..=21 {
            let g = geometry(3, bits);
            let x = 62 - (bits - 8);
            let raw = COMPRESSED | 1 << x | 0x12345;
            let entry = L2Entry::decode(raw, 0, &g).unwrap();
            let L2Entry::Compressed { offset, length } = entry else { panic!("{entry:?}") };
            assert_eq!(offset.0, 0x12345);
            assert_eq!((offset.0 + length) % 512, 0);
            assert_eq!(entry.encode(&g), [raw, 0]);
        }
    }

    #[test]
    fn copied_tells_the_first_cluster_of_a_data_file_from_none() {
        let g = geometry(3, 16).with_data_file(true);
        let first = L2Entry::Data { cluster: HostCluster(0), copied: true };
        assert_eq!(L2Entry::decode(COPIED, 0, &g), Ok(first));
        assert_eq!(first.encode(&g), [COPIED, 0]);
        assert_eq!(L2Entry::decode(0, 0, &g), Ok(L2Entry::Unallocated));
        let zero = L2Entry::Zero { preallocated: None, copied: true };
        assert_eq!(L2Entry::decode(COPIED | ZERO, 0, &g), Ok(zero));
        assert_eq!(L2Entry::decode(COPIED, 0, &geometry(3, 16)), Ok(L2Entry::Unallocated));
    }

    #[test]
    fn version_2_has_no_zero_flag() {
        assert_eq!(
            L2Entry::decode(1, 0, &geometry(2, 16)),
            Err(BadEntry::ReservedBits(1)),
            "the zero flag is a reserved bit there"
        );
    }

    #[test]
    fn reserved_bits_and_unaligned_offsets_are_corruption() {
        let g = geometry(3, 16);
        assert_eq!(L2Entry::decode(2, 0, &g), Err(BadEntry::ReservedBits(2)));
        assert_eq!(L2Entry::decode(1 << 60, 0, &g), Err(BadEntry::ReservedBits(1 << 60)));
        assert_eq!(L2Entry::decode(0x200, 0, &g), Err(BadEntry::Unaligned(HostOffset(0x200))));
        assert_eq!(L1Entry::decode(1, &g), Err(BadEntry::ReservedBits(1)));
    }

    const ALL: u64 = 0xffff_ffff;

    #[test]
    fn extended_entries_survive_a_round_trip() {
        let g = extended();
        for host in [0, 0x50000, COPIED | 0x50000] {
            for bitmap in [0, ALL, ALL << 32, 1, 0xf0, 1 << 32, 1 << 63 | 1, !ALL] {
                if host == 0 && bitmap & ALL != 0 {
                    continue;
                }
                let mut bytes = [0xee; 16];
                let entry = L2Entry::decode(host, bitmap, &g).unwrap();
                entry.write(&mut bytes, &g);
                assert_eq!(bytes[..8], host.to_be_bytes(), "{host:#x} {bitmap:#x}");
                assert_eq!(bytes[8..], bitmap.to_be_bytes(), "{host:#x} {bitmap:#x}");
                assert_eq!(L2Entry::read(&bytes, &g), Ok(entry));
            }
        }
    }

    #[test]
    fn subclusters_that_are_all_the_same_are_an_entry_like_any_other() {
        let g = extended();
        let (cluster, copied) = (HostCluster(5), true);
        let decode = |host: u64, bitmap| L2Entry::decode(host, bitmap, &g).unwrap();
        assert_eq!(decode(0, 0), L2Entry::Unallocated);
        assert_eq!(decode(0, ALL << 32), L2Entry::Zero { preallocated: None, copied: false });
        assert_eq!(
            decode(COPIED | 0x50000, ALL << 32),
            L2Entry::Zero { preallocated: Some(cluster), copied }
        );
        assert_eq!(decode(COPIED | 0x50000, ALL), L2Entry::Data { cluster, copied });
        for (host, bitmap, is) in [
            (COPIED | 0x50000, 0, "a preallocation without data"),
            (COPIED | 0x50000, 6, "partly allocated"),
            (0, 6 << 32, "partly zero"),
        ] {
            assert!(matches!(decode(host, bitmap), L2Entry::Mixed(_)), "{is}");
        }
    }

    #[test]
    fn bitmaps_that_contradict_themselves_are_corruption() {
        let g = extended();
        for (host, bitmap) in [
            (COPIED | 0x50000, 1 << 32 | 1),
            (0, 1),
            (COMPRESSED | 0x50000, 1),
            (COMPRESSED | 0x50000, 1 << 40),
        ] {
            let bad = Err(BadEntry::Subclusters(bitmap));
            assert_eq!(L2Entry::decode(host, bitmap, &g), bad, "{host:#x} {bitmap:#x}");
        }
        let zero_flag = Err(BadEntry::ReservedBits(0x50001));
        assert_eq!(L2Entry::decode(0x50001, 0, &g), zero_flag, "there is no such flag");
    }

    #[test]
    fn a_move_changes_the_host_cluster_and_nothing_else() {
        let g = extended();
        for (raw, bitmap) in
            [(COPIED | 0x50000, ALL), (0x50000, ALL << 32), (0x50000, 5), (0, 5 << 32)]
        {
            let entry = L2Entry::decode(raw, bitmap, &g).unwrap();
            let moved = entry.moved_to(HostCluster(9), true);
            let host = if raw == 0 { 0 } else { COPIED | 0x90000 };
            assert_eq!(moved.encode(&g), [host, bitmap], "{entry:?}");
            assert_eq!(moved.host_cluster(), (raw != 0).then_some((HostCluster(9), true)));
        }
    }
}
