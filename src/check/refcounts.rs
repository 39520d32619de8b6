//! The refcounts on disk, and how they compare with the references.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use super::counts::ClusterCounts;
use super::pieces::{for_each_data, for_each_word};
use super::progress::Watch;
use super::references::{ReferenceCounts, is_inside};
use super::report::Report;
use crate::error::{Error, Result};
use crate::format::{
    Geometry, Header, HostCluster, HostOffset, REFCOUNT_TABLE_OFFSET_MASK, refcount,
};
use crate::storage::Storage;

/// Bytes of refcount blocks kept for [`Refcounts::get`].
const CACHE_BYTES: u64 = 64 << 20;

/// The refcount structure of an image.
pub(super) struct Refcounts<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    g: Geometry,
    /// Bytes of the file.
    length: u64,
    /// The entries of the refcount table that are not 0, by their number.
    table: BTreeMap<u64, u64>,
    /// Refcount blocks that were read, by their offset.
    cache: HashMap<u64, Vec<u8>>,
}

/// A cluster that is in use, or called so: see [`Refcounts::for_each_used`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Used {
    pub(super) cluster: HostCluster,
    /// The refcount on disk.
    pub(super) refcount: u64,
    /// What it has to be.
    pub(super) references: u64,
    /// Where the refcount stands: its block's offset and its number in the block.
    pub(super) place: Option<(HostOffset, u64)>,
}

impl<'a> Refcounts<'a> {
    /// Reads the refcount table.
    pub(super) fn load(storage: &'a dyn Storage, header: &'a Header) -> Result<Self> {
        let length = storage.len().map_err(|e| Error::io("asking for the file's length", e))?;
        let mut table = BTreeMap::new();
        let range = table_range(header);
        for_each_word(
            storage,
            range.clone(),
            || "reading the refcount table".into(),
            |at, raw| {
                table.insert((at - range.start) / 8, raw);
                Ok(())
            },
        )?;
        let (g, cache) = (header.geometry, HashMap::new());
        Ok(Refcounts { storage, header, g, length, table, cache })
    }

    /// Adds the references that the refcount structure itself makes to `references`. Returns whether
    /// the structure is sound.
    pub(super) fn count_itself(
        &self,
        references: &mut ReferenceCounts,
        report: &mut Report,
    ) -> bool {
        let before = report.corruptions;
        let counts = &mut references.counts;
        let range = table_range(self.header);
        if is_inside(range.start, range.end - range.start, self.length, &self.g) {
            let first = self.g.host_cluster(HostOffset(range.start)).0;
            for cluster in first..first + u64::from(self.header.refcount_table_clusters) {
                counts.add(HostCluster(cluster), 1);
                if counts.get(HostCluster(cluster)) != 1 {
                    report.corruption(1, || {
                        let at = self.g.host_offset(HostCluster(cluster));
                        format!("the refcount table and something else overlap at {at}")
                    });
                }
            }
        } else {
            report.corruption(1, || "the refcount table ends past the end of the file".into());
        }
        for (&index, &raw) in &self.table {
            if let Err(what) = self.count_block(raw, counts) {
                report.corruption(1, || format!("refcount table entry {index} {what}"));
            }
        }
        report.corruptions == before
    }

    /// Counts the refcount block that the table entry `raw` refers to, or says what is wrong with it.
    fn count_block(&self, raw: u64, counts: &mut ClusterCounts) -> Result<(), String> {
        let offset = raw & REFCOUNT_TABLE_OFFSET_MASK;
        let cluster = self.g.host_cluster(HostOffset(offset));
        if raw != offset {
            return Err(format!("has reserved bits set ({raw:#018x})"));
        }
        if !self.g.is_aligned(offset) {
            return Err(format!("points to {offset:#x}, which is not the start of a cluster"));
        }
        if cluster.0 >= self.g.clusters_for(self.length).0.max(counts.end().0) {
            return Err("points past the end of the file".into());
        }
        counts.add(cluster, 1);
        match counts.get(cluster) {
            1 => Ok(()),
            _ => Err(format!("points to {offset:#x}, which is something else, too")),
        }
    }

    /// The refcount of a cluster; none where the block that should say it is at no cluster's start.
    pub(super) fn get(&mut self, cluster: HostCluster) -> Result<Option<u64>> {
        let per_block = self.g.refcounts_per_block();
        let Some(&raw) = self.table.get(&(cluster.0 / per_block)) else { return Ok(Some(0)) };
        let offset = raw & REFCOUNT_TABLE_OFFSET_MASK;
        if !self.g.is_aligned(offset) {
            return Ok(None);
        }
        if offset == 0 || offset >= self.length {
            return Ok(Some(0));
        }
        if !self.cache.contains_key(&offset) {
            if self.cache.len() as u64 * self.g.cluster_size() >= CACHE_BYTES {
                self.cache.clear();
            }
            let mut block = vec![0; self.g.cluster_size() as usize];
            self.storage.read_at(&mut block, offset).map_err(|e| Error::io(reading(offset), e))?;
            self.cache.insert(offset, block);
        }
        let index = (cluster.0 % per_block) as usize;
        let order = self.g.refcount_order();
        Ok(self.cache.get(&offset).map(|block| refcount::get(block, index, order)))
    }

    /// The clusters of the refcount table and of the blocks that it names.
    pub(super) fn places(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let table = table_range(self.header);
        let table = self.g.host_cluster(HostOffset(table.start)).0
            ..self.g.clusters_for(table.end.min(self.length)).0;
        let blocks = self.table.values().map(|raw| {
            let block = self.g.host_cluster(HostOffset(raw & REFCOUNT_TABLE_OFFSET_MASK)).0;
            block..block.saturating_add(1)
        });
        std::iter::once(table).chain(blocks)
    }

    /// Calls `visit`, in ascending order, for every cluster of the file that has a reference or a
    /// refcount. A block that the table names twice, or at no cluster's start, says nothing; its
    /// clusters are left out.
    pub(super) fn for_each_used(
        &self,
        references: &ReferenceCounts,
        watch: &dyn Watch,
        mut visit: impl FnMut(Used) -> Result<()>,
    ) -> Result<()> {
        let end = self.g.clusters_for(self.length).0.max(references.end().0);
        let per_block = self.g.refcounts_per_block();
        let mut seen = HashSet::new();
        let mut next = 0;
        for (&index, &raw) in self.table.range(..end.div_ceil(per_block)) {
            watch.at("comparing refcounts", next, end);
            let block = index * per_block..end.min((index + 1) * per_block);
            without_refcounts(references, next..block.start, &mut visit)?;
            next = block.end;
            let offset = raw & REFCOUNT_TABLE_OFFSET_MASK;
            if self.g.is_aligned(offset) && seen.insert(offset) {
                self.for_each_used_in(HostOffset(offset), block, references, &mut visit)?;
            }
        }
        without_refcounts(references, next..end, &mut visit)
    }

    /// The same for the clusters that one refcount block describes.
    fn for_each_used_in(
        &self,
        block: HostOffset,
        clusters: Range<u64>,
        references: &ReferenceCounts,
        visit: &mut impl FnMut(Used) -> Result<()>,
    ) -> Result<()> {
        let order = self.g.refcount_order();
        let mut next = clusters.start;
        // No block at all: only reserved bits are set in the table's entry.
        let size = if block.0 == 0 { 0 } else { self.g.cluster_size() };
        let range = block.0..block.0.saturating_add(size);
        for_each_data(
            self.storage,
            range,
            || reading(block.0),
            |at, bytes| {
                let first = clusters.end.min(clusters.start + (((at - block.0) * 8) >> order));
                let last = clusters.end.min(first + ((bytes.len() as u64 * 8) >> order));
                without_refcounts(references, next..first, visit)?;
                next = last;
                let mut counted = references.counts.range(first..last).peekable();
                for cluster in first..last {
                    let refcount = refcount::get(bytes, (cluster - first) as usize, order);
                    let references = counted.next_if(|&(c, _)| c == cluster).map_or(0, |(_, n)| n);
                    if refcount != 0 || references != 0 {
                        let place = Some((block, cluster - clusters.start));
                        visit(Used { cluster: HostCluster(cluster), refcount, references, place })?;
                    }
                }
                Ok(())
            },
        )?;
        without_refcounts(references, next..clusters.end, visit)
    }
}

/// Visits the referenced clusters of a range that has no refcounts on disk.
fn without_refcounts(
    references: &ReferenceCounts,
    range: Range<u64>,
    visit: &mut impl FnMut(Used) -> Result<()>,
) -> Result<()> {
    references.range(range).try_for_each(|(cluster, references)| {
        visit(Used { cluster, refcount: 0, references, place: None })
    })
}

fn table_range(header: &Header) -> Range<u64> {
    let start = header.refcount_table_offset.0;
    let size = u64::from(header.refcount_table_clusters) << header.geometry.cluster_bits();
    start..start.saturating_add(size)
}

fn reading(block: u64) -> String {
    format!("reading the refcount block at {block:#x}")
}
