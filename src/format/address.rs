//! Addresses, one type for each space, and the geometry that converts between them.

use std::fmt;
use std::ops::{Add, Range};

use super::Subclusters;
use crate::error::{Error, Result};

/// Bytes in a cluster, least and most.
const CLUSTER_SIZES: std::ops::RangeInclusive<u64> = 512..=2 << 20;
/// Bytes in the smallest cluster that extended L2 entries can divide.
const EXTENDED_L2_CLUSTER_SIZE: u64 = 16 << 10;

/// Entries of an L1 table that is large enough for most disks.
const ROOMY_L1_ENTRIES: u64 = (64 << 10) / 8;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// A byte offset into the virtual disk.
    GuestOffset
}
address! {
    /// A byte offset into the image file.
    HostOffset
}
address! {
    /// The number of a cluster of the virtual disk.
    GuestCluster
}
address! {
    /// The number of a cluster of the image file.
    HostCluster
}
address! {
    /// A number of clusters.
    ClusterCount
}

impl Add<ClusterCount> for HostCluster {
    type Output = HostCluster;
    fn add(self, count: ClusterCount) -> HostCluster {
        HostCluster(self.0 + count.0)
    }
}

impl Add<ClusterCount> for GuestCluster {
    type Output = GuestCluster;
    fn add(self, count: ClusterCount) -> GuestCluster {
        GuestCluster(self.0 + count.0)
    }
}

/// The sizes that an image's header fixes, and the conversions that follow from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    version: u32,
    cluster_bits: u32,
    refcount_order: u32,
    extended_l2: bool,
    data_file: bool,
}

impl Geometry {
    /// The geometry for header fields that [`super::Header::parse`] has checked.
    pub(super) fn new(
        version: u32,
        cluster_bits: u32,
        refcount_order: u32,
        extended_l2: bool,
    ) -> Self {
        Geometry { version, cluster_bits, refcount_order, extended_l2, data_file: false }
    }

    /// The geometry of a new image.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a combination that the format does not have.
    pub fn of_new_image(
        version: u32,
        cluster_size: u64,
        refcount_bits: u32,
        extended_l2: bool,
    ) -> Result<Self> {
        if !(2..=3).contains(&version) {
            return Err(Error::invalid(format!(
                "there is no qcow2 version {version}; 2 and 3 are"
            )));
        }
        if !cluster_size.is_power_of_two() || !CLUSTER_SIZES.contains(&cluster_size) {
            return Err(Error::invalid(format!(
                "a cluster size of {cluster_size} bytes; allowed are powers of 2 from 512 to 2M"
            )));
        }
        if !refcount_bits.is_power_of_two() || refcount_bits > 64 {
            return Err(Error::invalid(format!(
                "refcounts of {refcount_bits} bits; allowed are 1, 2, 4, 8, 16, 32 and 64"
            )));
        }
        if version < 3 && (refcount_bits != 16 || extended_l2) {
            return Err(Error::invalid(
                "version 2 has refcounts of 16 bits and no extended L2 entries; version 3 does",
            ));
        }
        if extended_l2 && cluster_size < EXTENDED_L2_CLUSTER_SIZE {
            return Err(Error::invalid(format!(
                "extended L2 entries with clusters of {cluster_size} bytes; they need 16K at least"
            )));
        }
        let (cluster_bits, order) = (cluster_size.trailing_zeros(), refcount_bits.trailing_zeros());
        Ok(Geometry::new(version, cluster_bits, order, extended_l2))
    }

    /// The same for an image whose data is in an external data file.
    #[must_use]
    pub fn with_data_file(self, data_file: bool) -> Self {
        Geometry { data_file, ..self }
    }

    /// 2 or 3. Version 2 has no zero flag.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// log2 of the cluster size in bytes, 9 to 21.
    pub fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of a refcount's width in bits, 0 to 6.
    pub fn refcount_order(&self) -> u32 {
        self.refcount_order
    }

    /// The largest refcount that fits.
    pub fn max_refcount(&self) -> u64 {
        match self.refcount_order {
            6 => u64::MAX,
            order => (1 << (1 << order)) - 1,
        }
    }

    /// Refcounts in one refcount block.
    pub fn refcounts_per_block(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// Whether L2 entries are 16 bytes with a subcluster bitmap.
    pub fn extended_l2(&self) -> bool {
        self.extended_l2
    }

    /// Whether host clusters of data are in an external data file, each at the guest's offset.
    pub fn data_file(&self) -> bool {
        self.data_file
    }

    /// Bytes of one L2 entry: 8, or 16 with subclusters.
    pub fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries in one L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Bytes in a subcluster, the part of a cluster that an L2 entry tells from the others: the
    /// whole cluster without extended L2 entries.
    pub fn subcluster_size(&self) -> u64 {
        let parts = if self.extended_l2 { u64::from(Subclusters::COUNT) } else { 1 };
        self.cluster_size() / parts
    }

    /// The subclusters that a byte range within one cluster touches.
    pub fn subclusters(&self, bytes: &Range<u64>) -> Range<u32> {
        let (size, start) = (self.subcluster_size(), self.within(bytes.start));
        let end = (start + (bytes.end - bytes.start)).min(self.cluster_size());
        (start / size) as u32..end.div_ceil(size) as u32
    }

    /// The number of L1 entries that a virtual disk of `size` bytes needs.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        self.clusters_for(size).0.div_ceil(self.l2_entries())
    }

    /// The number of L1 entries for a disk of `size` bytes that is to grow a little without a larger
    /// table: as many as go into the table's last cluster, or into 64 KiB of a larger one.
    pub fn l1_entries_with_room(&self, size: u64) -> u64 {
        let step = (self.cluster_size() / 8).min(ROOMY_L1_ENTRIES);
        self.l1_entries_for(size).max(1).next_multiple_of(step)
    }

    /// Clusters that `bytes` bytes need, rounded up.
    pub fn clusters_for(&self, bytes: u64) -> ClusterCount {
        ClusterCount(bytes.div_ceil(self.cluster_size()))
    }

    /// Bytes in `count` clusters.
    pub fn bytes(&self, count: ClusterCount) -> u64 {
        count.0 << self.cluster_bits
    }

    /// The cluster that a guest offset lies in.
    pub fn guest_cluster(&self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.cluster_bits)
    }

    /// The first byte of a guest cluster.
    pub fn guest_offset(&self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    /// The guest clusters that a byte range touches; empty for an empty range.
    pub fn guest_clusters(&self, bytes: &Range<u64>) -> Range<u64> {
        let first = bytes.start >> self.cluster_bits;
        if bytes.is_empty() { first..first } else { first..self.clusters_for(bytes.end).0 }
    }

    /// The cluster that a host offset lies in.
    pub fn host_cluster(&self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.cluster_bits)
    }

    /// The first byte of a host cluster.
    pub fn host_offset(&self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// The host clusters that `length` bytes from `offset` touch.
    pub fn host_clusters(&self, offset: HostOffset, length: u64) -> Range<u64> {
        let end = offset.0.saturating_add(length);
        offset.0 >> self.cluster_bits..end.div_ceil(self.cluster_size())
    }

    /// How far into its cluster a byte offset lies.
    pub fn within(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Whether a byte offset is the start of a cluster.
    pub fn is_aligned(&self, offset: u64) -> bool {
        self.within(offset) == 0
    }

    /// The L1 entry that leads to a guest cluster.
    pub fn l1_index(&self, cluster: GuestCluster) -> u64 {
        cluster.0 / self.l2_entries()
    }

    /// The entry of its L2 table that a guest cluster has.
    pub fn l2_index(&self, cluster: GuestCluster) -> u64 {
        cluster.0 % self.l2_entries()
    }
}
