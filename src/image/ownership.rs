//! COPIED flags, looked at before they are believed.
//!
//! A flag says that a cluster is in use by one reference alone, so that it may be written in place.
//! Where its refcount is 0, such a write would change a cluster that is free and may be somebody else's
//! in a moment: that is corruption. Where the refcount is higher, it would perhaps change what a
//! snapshot has too: the cluster is taken for a shared one and copied, which harms nobody, whether the
//! flag is wrong or the refcount. (QEMU raises refcounts before it clears flags when it takes a
//! snapshot: if it is killed between the two, the refcount is, and the image is sound.) The search after
//! the open tells the two apart: it lowers a refcount that is too high, and turns the image read-only
//! where there are more references in fact ([`super::leaks`]).
//!
//! So before the first change that goes by a flag the refcount is looked at, once for each cluster:
//! afterwards the flag and the refcount are this program's own doing. Two references to a cluster that
//! is counted once are not seen here, but by that search. A cluster that was copied before the search
//! came to it, since its refcount was too high, is leaked until the image is opened again.

use std::ops::Range;

use parking_lot::RwLock;
use roaring::RoaringTreemap;

use super::{Image, Writer};
use crate::error::Result;
use crate::format::{HostCluster, MixedCluster};
use crate::tables::{Mapping, Run};

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

    fn add(&self, cluster: u64) {
        self.0.write().insert(cluster);
    }

    /// All are looked at again: counts rise for many.
    pub(super) fn forget_all(&self) {
        self.0.write().clear();
    }
}

impl Image {
    /// [`Image::mapping_at`] for who changes what is there: it is marked as ours alone where it is.
    pub(super) fn mapping_to_change(
        &self,
        writer: &Writer,
        at: u64,
        end: u64,
    ) -> Result<(Mapping, u64)> {
        let (mapping, end) = self.mapping_at(at, end)?;
        // Nothing is counted in a data file.
        if self.data.is_external {
            return Ok((mapping, end));
        }
        match mapping {
            Mapping::Uniform(Run::Data { first, copied: true }) => {
                let (copied, count) =
                    self.own_start(writer, self.clusters_of_run(first, at, end))?;
                let start = at - self.geometry.within(at);
                let end = end.min(start + (count << self.geometry.cluster_bits()));
                Ok((Mapping::Uniform(Run::Data { first, copied }), end))
            }
            Mapping::Mixed(mixed @ MixedCluster { cluster: Some(cluster), copied: true, .. }) => {
                let copied = self.is_own(writer, cluster)?;
                Ok((Mapping::Mixed(MixedCluster { copied, ..mixed }), end))
            }
            other => Ok((other, end)),
        }
    }

    /// [`Image::run_at`] in the same way.
    pub(super) fn run_to_change(&self, writer: &Writer, at: u64, end: u64) -> Result<(Run, u64)> {
        let (mapping, end) = self.mapping_to_change(writer, at, end)?;
        Ok(self.run_of(mapping, at, end))
    }

    /// Whether the first of `clusters`, which are marked as ours alone, is that, and how many from
    /// there on are the same; at least 1. `clusters` must not be empty.
    fn own_start(&self, writer: &Writer, clusters: Range<u64>) -> Result<(bool, u64)> {
        if writer.trusted.has(&clusters) {
            return Ok((true, clusters.end - clusters.start));
        }
        let first = self.is_own(writer, HostCluster(clusters.start))?;
        let mut end = clusters.start + 1;
        while end < clusters.end && self.is_own(writer, HostCluster(end))? == first {
            end += 1;
        }
        Ok((first, end - clusters.start))
    }

    /// Whether nothing else refers to a cluster, data or an L2 table, that is marked so.
    ///
    /// # Errors
    /// `Corrupt` where the refcount is 0, host errors.
    pub(super) fn is_own(&self, writer: &Writer, cluster: HostCluster) -> Result<bool> {
        if writer.trusted.has(&(cluster.0..cluster.0 + 1)) {
            return Ok(true);
        }
        match writer.refcounts.get(cluster)? {
            0 => Err(self.uncounted(cluster)),
            1 => {
                writer.trusted.add(cluster.0);
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}
