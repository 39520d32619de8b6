//! COPIED flags, looked at before they are believed.
//!
//! A flag says that a cluster is in use by one reference alone, so that it may be written in place.
//! Where its refcount is 0, such a write would change a cluster that is free and may be somebody else's
//! in a moment. So before the first change that goes by a flag the refcount is looked at, once for each
//! cluster: afterwards the flag and the refcount are this program's own doing. Refcounts that are too
//! high, and two references to a cluster that is counted once, are not seen here, but by the search
//! after the open ([`super::leaks`]).

use std::ops::Range;

use parking_lot::RwLock;
use roaring::RoaringTreemap;

use super::{Image, Writer};
use crate::error::Result;
use crate::format::HostCluster;

/// Clusters whose refcount was looked at.
///
/// Lock order: a leaf.
#[derive(Debug, Default)]
pub(super) struct Trusted(RwLock<RoaringTreemap>);

impl Trusted {
    fn has(&self, clusters: &Range<u64>) -> bool {
        let seen = self.0.read();
        clusters.clone().all(|cluster| seen.contains(cluster))
    }

    fn add(&self, clusters: Range<u64>) {
        self.0.write().insert_range(clusters);
    }

    /// All are looked at again: counts have changed for many.
    pub(super) fn forget_all(&self) {
        self.0.write().clear();
    }
}

impl Image {
    /// Sees to it that `clusters`, which an entry marks as its own, are in use, before they are changed
    /// in place or given back.
    ///
    /// # Errors
    /// `Corrupt` where a refcount is 0, host errors.
    pub(super) fn check_copied(&self, writer: &Writer, clusters: Range<u64>) -> Result<()> {
        // Nothing is counted in a data file.
        if self.data.is_external { Ok(()) } else { self.check_counted(writer, clusters) }
    }

    /// The same for an L2 table.
    ///
    /// # Errors
    /// Those of [`Image::check_copied`].
    pub(super) fn check_own_table(&self, writer: &Writer, table: HostCluster) -> Result<()> {
        self.check_counted(writer, table.0..table.0 + 1)
    }

    fn check_counted(&self, writer: &Writer, clusters: Range<u64>) -> Result<()> {
        if writer.trusted.has(&clusters) {
            return Ok(());
        }
        for cluster in clusters.clone().map(HostCluster) {
            if writer.refcounts.get(cluster)? == 0 {
                return Err(self.uncounted(cluster));
            }
        }
        writer.trusted.add(clusters);
        Ok(())
    }
}
