//! The qcow2 on-disk format: bytes to values and back, pure.
//!
//! No I/O, no locks, no policy: what a field means and what it may hold is said here once, and
//! everything above works with the types of this room. The rules are those of QEMU's
//! `docs/interop/qcow2.rst`.

mod address;
mod bitmap;
mod entry;
mod header;
pub mod refcount;
mod snapshot;
mod subclusters;

pub use address::{ClusterCount, Geometry, GuestCluster, GuestOffset, HostCluster, HostOffset};
pub use bitmap::{BitmapBits, BitmapEntry, BitmapsExtension, MAX_BITMAP_BYTES, bitmap_directory};
pub use entry::{
    BadEntry, COPIED, L1Entry, L2Entry, MixedCluster, OFFSET_MASK, REFCOUNT_TABLE_OFFSET_MASK, ZERO,
};
pub use header::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW, COMPATIBLE_LAZY_REFCOUNTS,
    EXTENSION_BACKING_FORMAT, EXTENSION_BITMAPS, EXTENSION_DATA_FILE, EXTENSION_FEATURE_NAMES,
    EXTENSION_LUKS, Extension, Header, INCOMPATIBLE_COMPRESSION, INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_DIRTY, INCOMPATIBLE_EXTENDED_L2, INCOMPATIBLE_KNOWN,
    MAGIC, MAX_BACKING_NAME, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, Patch, feature_names,
};
pub use snapshot::{MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS, Snapshot};
pub use subclusters::{Subcluster, Subclusters};

pub(crate) use header::{be32, be64};
