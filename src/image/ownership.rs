//! COPIED flags, looked at before they are believed.
//!
//! A flag says that nothing else refers to a cluster, so that it may be written in place. Where the
//! refcount says otherwise, such a write would change what a snapshot has too, or a cluster that is
//! free and may be somebody else's in a moment. So before the first change that goes by a flag the
//! refcount is looked at, once for each cluster: afterwards the flag and the refcount are this
//! program's own doing. Two references to a cluster that is counted once are not seen here, but by
//! the search after the open ([`super::leaks`]).

use std::ops::Range;

use parking_lot::RwLock;
use roaring::RoaringTreemap;

use super::{Image, Writer};
use crate::error::Result;
use crate::format::HostCluster;

/// Clusters whose flag and refcount were seen to agree.
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
    /// Sees to it that nothing but the entry that marks them as its own refers to `clusters`, before
    /// they are changed in place or given back.
    ///
    /// # Errors
    /// `Corrupt` where a refcount is 0, host errors.
    pub(super) fn check_copied(&self, writer: &Writer, clusters: Range<u64>) -> Result<()> {
        // Nothing is counted in a data file.
        if self.data.is_external || writer.trusted.has(&clusters) {
            return Ok(());
        }
        clusters.clone().try_for_each(|cluster| self.check_own(writer, HostCluster(cluster)))?;
        writer.trusted.add(clusters);
        Ok(())
    }

    /// The same for an L2 table.
    ///
    /// # Errors
    /// Those of [`Image::check_copied`].
    pub(super) fn check_own_table(&self, writer: &Writer, table: HostCluster) -> Result<()> {
        let cluster = table.0..table.0 + 1;
        if !writer.trusted.has(&cluster) {
            self.check_own(writer, table)?;
            writer.trusted.add(cluster);
        }
        Ok(())
    }

    fn check_own(&self, writer: &Writer, cluster: HostCluster) -> Result<()> {
        match writer.refcounts.get(cluster)? {
            0 => Err(self.uncounted(cluster)),
            // A higher count is left to the search for leaks: beside snapshots that come and go it was
            // seen for a moment where nothing was wrong.
            _ => Ok(()),
        }
    }
}
