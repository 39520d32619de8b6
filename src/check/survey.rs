//! What every host cluster of an image holds, for whoever draws or describes it.
//!
//! It counts references like the check and judges nothing: what makes no sense is left out. So it
//! may be taken of an image that others are writing; then it shows what had reached the file.

use std::ops::Range;

use serde::Serialize;

use super::progress::Watch;
use super::refcounts::Refcounts;
use super::references::{self, Contents, ReferenceCounts};
use super::report::Report;
use super::{Result, read_header};
use crate::format::{HostCluster, HostOffset};
use crate::storage::Storage;

/// What a host cluster holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Content {
    /// The header, tables, refcounts, bitmaps.
    Metadata,
    /// Data of the disk or of one snapshot.
    Data,
    /// Data that the disk and snapshots share.
    Shared,
    /// Compressed data, also where several guest clusters share a host cluster.
    Compressed,
    /// Counted and referred to by nothing: leaked, or on its way to be free or used.
    Unreferenced,
    /// Nothing: its refcount is 0.
    Free,
}

/// An image as a whole.
#[derive(Clone, Debug, Serialize)]
pub struct Survey {
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// Bytes of the image file.
    pub file_length: u64,
    /// Host clusters that something refers to.
    pub used: u64,
    /// Those of them that lie behind the first `used` clusters of the file, and would have to move
    /// to make it as short as it can be.
    pub behind: u64,
    /// Guest clusters of the disk that have a host cluster.
    pub allocated: u64,
    /// Those that do not follow the one before them in the file.
    pub fragmented: u64,
    /// Entries that make no sense, and were left out. Of an image that others write there may be
    /// some for a moment.
    pub damaged: u64,
}

/// Calls `visit` with the content of consecutive host clusters, in ascending order, from the first
/// one to the end of the file, neighbours that hold the same not always joined.
///
/// # Errors
/// As [`super::check`], and those of `visit`.
pub fn survey(
    storage: &dyn Storage,
    watch: &dyn Watch,
    mut visit: impl FnMut(Range<u64>, Content) -> Result<()>,
) -> Result<Survey> {
    let header = read_header(storage)?;
    let g = header.geometry;
    let file_length =
        storage.len().map_err(|e| crate::Error::io("asking for the file's length", e))?;
    let mut report = Report::default();
    let contents = Some(Contents::default());
    let mut references = references::count_into(storage, &header, &mut report, watch, contents)?;
    let refcounts = Refcounts::load(storage, &header)?;
    refcounts.count_itself(&mut references, &mut report);
    let contents = contents_of(&mut references, &refcounts, |at| g.host_cluster(HostOffset(at)).0);
    let end = g.clusters_for(file_length).0;
    let mut next = 0;
    refcounts.for_each_used(&references, watch, |used| {
        let cluster = used.cluster.0;
        if cluster >= end {
            return Ok(());
        }
        if next < cluster {
            visit(next..cluster, Content::Free)?;
        }
        next = cluster + 1;
        visit(cluster..next, content(&contents, cluster, used.references))
    })?;
    if next < end {
        visit(next..end, Content::Free)?;
    }
    let used = references.range(0..end).count() as u64;
    Ok(Survey {
        cluster_size: g.cluster_size(),
        virtual_size: header.size,
        file_length,
        used,
        behind: references.range(used..end).count() as u64,
        allocated: report.allocated_clusters,
        fragmented: report.fragmented_clusters,
        damaged: report.corruptions,
    })
}

/// What is known of the clusters' contents, the tables that only now are known included.
fn contents_of(
    references: &mut ReferenceCounts,
    refcounts: &Refcounts<'_>,
    cluster_at: impl Fn(u64) -> u64,
) -> Contents {
    let mut contents = references.contents.take().unwrap_or_default();
    let tables = references.l2_tables.keys().map(|at| cluster_at(*at));
    contents.metadata.extend(tables);
    for clusters in refcounts.places() {
        // A table entry may name a block far past the end of the file.
        let counted = references.range(clusters).map(|(HostCluster(cluster), _)| cluster);
        contents.metadata.extend(counted);
    }
    contents
}

fn content(contents: &Contents, cluster: u64, references: u64) -> Content {
    match references {
        0 => Content::Unreferenced,
        _ if contents.metadata.contains(cluster) => Content::Metadata,
        _ if contents.compressed.contains(cluster) => Content::Compressed,
        1 => Content::Data,
        _ => Content::Shared,
    }
}
