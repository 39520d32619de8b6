//! Building the refcount structure anew from the references that the tables make.
//!
//! For images whose refcounts may be too low: the dirty bit is set, or the check found it so. The
//! new structure is written behind the end of the file, where nothing is; then one write of the
//! header's first sector switches to it. Before that write the image is what it was, after it it is
//! sound, at any moment.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::check::{ReferenceCounts, copied, references};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Header, HostCluster, HostOffset, INCOMPATIBLE_DIRTY, MAX_REFCOUNT_TABLE_BYTES, Patch, refcount,
};
use crate::rules::Rule;
use crate::storage::Storage;

/// What a change of the header is written in: old or new, never half.
const SECTOR: usize = 512;
/// A new structure of so many bytes is made in any case; a longer one only where the file has as much
/// on the host already. That is far from any sound image: each reference stands in a table entry of 8
/// bytes, its refcount takes 8 at most, and the old structure takes as much as the new one. Only where
/// references are strewn over a file of holes, one in the range of each block, a few kilobytes of
/// tables ask for gigabytes of blocks.
const ALWAYS_BUILT: u64 = 64 << 20;

/// Makes the refcounts of an image whose dirty bit is set right. Returns the new header.
///
/// # Errors
/// As [`rebuild`], and where the references cannot be counted at all.
pub fn rebuild_dirty(storage: &dyn Storage, header: &Header) -> Result<Header> {
    rebuild(storage, header, &references::count(storage, header)?)
}

/// Builds a new refcount structure that says what `references` says, of itself that it is used and
/// of the old one nothing, and clears the dirty bit. Durable on return. Returns the new header.
///
/// # Errors
/// `Corrupt` where the tables cannot be believed: references that could not be followed, structures
/// that overlap, a COPIED flag on a cluster with several references, more references than a refcount
/// can say. `TooBig` where the refcount table would pass its limit, or the whole structure would be out
/// of proportion to what the file takes on the host. Host errors. After an error the image is what it
/// was, if perhaps longer.
pub fn rebuild(
    storage: &dyn Storage,
    header: &Header,
    references: &ReferenceCounts,
) -> Result<Header> {
    references.trusted()?;
    refuse_shared_copied(storage, header, references)?;
    let plan = plan(storage, header, references)?;
    plan.write(storage, header, references)?;
    sync(storage, Rule::RebuiltBeforeHeader)?;
    let new = switch(storage, header, &plan)?;
    sync(storage, Rule::RebuiltSwitchBeforeUse)?;
    Ok(new)
}

/// Whether [`rebuild`] would refuse to build for what it would take; nothing is written.
///
/// # Errors
/// `TooBig`, as [`rebuild`]; host errors.
pub fn refuse_too_big(
    storage: &dyn Storage,
    header: &Header,
    references: &ReferenceCounts,
) -> Result<()> {
    plan(storage, header, references).map(drop)
}

/// Where a new structure goes, if it is not out of proportion.
fn plan(storage: &dyn Storage, header: &Header, references: &ReferenceCounts) -> Result<Plan> {
    let length = storage.len().map_err(|e| Error::io("asking for the file's length", e))?;
    let allocated = storage.allocated().map_err(|e| Error::io("asking for the file's space", e))?;
    let first = header.geometry.clusters_for(length).0.max(references.end().0);
    let plan = Plan::new(header, references, first)?;
    let clusters = plan.clusters.end - plan.clusters.start;
    let bytes = header.geometry.bytes(crate::format::ClusterCount(clusters));
    if bytes > ALWAYS_BUILT.max(allocated) {
        return Err(Error::new(
            ErrorKind::TooBig,
            format!(
                "its refcounts have to be rebuilt, which would take {} MiB, more than all that the \
                 file takes on the host ({} MiB); copy the image with `qemu-img convert`",
                bytes >> 20,
                allocated >> 20
            ),
        ));
    }
    Ok(plan)
}

/// A cluster that is COPIED would be written in place though others refer to it.
fn refuse_shared_copied(
    storage: &dyn Storage,
    header: &Header,
    references: &ReferenceCounts,
) -> Result<()> {
    let count = |cluster| Ok(Some(references.get(cluster)));
    copied::for_each_wrong(storage, header, references, &(), count, |wrong| match wrong.refcount {
        Some(count) if wrong.is_set() => Err(Error::corrupt(format!(
            "{} is COPIED, but there are {count} references to its cluster; repair the image \
                 with `qcow2fs check --repair all`",
            wrong.name()
        ))),
        _ => Ok(()),
    })
}

/// Where the parts of the new structure go: blocks first, then the table, in one run.
struct Plan {
    /// The refcount blocks that have to be, by their number.
    blocks: BTreeMap<u64, HostCluster>,
    table: HostCluster,
    table_clusters: u64,
    /// All clusters of the new structure.
    clusters: Range<u64>,
}

impl Plan {
    /// The plan for a structure that starts at cluster `first`. It counts itself, so it grows until
    /// it covers itself.
    fn new(header: &Header, references: &ReferenceCounts, first: u64) -> Result<Self> {
        let g = header.geometry;
        let per_block = g.refcounts_per_block();
        let mut blocks = BTreeMap::new();
        let mut next = 0;
        while let Some((cluster, _)) = references.range(next..u64::MAX).next() {
            blocks.insert(cluster.0 / per_block, HostCluster(0));
            next = (cluster.0 / per_block + 1) * per_block;
        }
        let mut size = 0;
        loop {
            let last = first + size;
            blocks.extend((first / per_block..=last / per_block).map(|n| (n, HostCluster(0))));
            let table_bytes = (last / per_block + 1) * 8;
            if table_bytes > MAX_REFCOUNT_TABLE_BYTES {
                return Err(Error::new(
                    ErrorKind::TooBig,
                    "the refcount table would be longer than 8 MiB; copy the image with \
                     `qemu-img convert` to one with larger clusters",
                ));
            }
            let table_clusters = g.clusters_for(table_bytes).0;
            let needed = blocks.len() as u64 + table_clusters;
            if needed == size {
                let table = HostCluster(first + blocks.len() as u64);
                for (cluster, (_, place)) in (first..).zip(blocks.iter_mut()) {
                    *place = HostCluster(cluster);
                }
                return Ok(Plan { blocks, table, table_clusters, clusters: first..first + size });
            }
            size = needed;
        }
    }

    fn write(
        &self,
        storage: &dyn Storage,
        header: &Header,
        references: &ReferenceCounts,
    ) -> Result<()> {
        let g = header.geometry;
        let mut bytes = vec![0; g.cluster_size() as usize];
        for (&number, &place) in &self.blocks {
            bytes.fill(0);
            self.fill_block(number, header, references, &mut bytes)?;
            write(storage, &bytes, g.host_offset(place), "a refcount block")?;
        }
        let mut table = vec![0; g.bytes(crate::format::ClusterCount(self.table_clusters)) as usize];
        for (&number, &place) in &self.blocks {
            table[number as usize * 8..][..8]
                .copy_from_slice(&g.host_offset(place).0.to_be_bytes());
        }
        write(storage, &table, g.host_offset(self.table), "the refcount table")
    }

    fn fill_block(
        &self,
        number: u64,
        header: &Header,
        references: &ReferenceCounts,
        bytes: &mut [u8],
    ) -> Result<()> {
        let g = header.geometry;
        let block = number * g.refcounts_per_block()..(number + 1) * g.refcounts_per_block();
        let own = self.clusters.start.max(block.start)..self.clusters.end.min(block.end);
        let own = own.map(|cluster| (HostCluster(cluster), 1));
        for (cluster, count) in references.range(block.clone()).chain(own) {
            if count > g.max_refcount() {
                return Err(Error::corrupt(format!(
                    "the cluster at {} has {count} references, more than a refcount can say; copy \
                     the image with `qemu-img convert`",
                    g.host_offset(cluster)
                )));
            }
            refcount::set(bytes, (cluster.0 - block.start) as usize, g.refcount_order(), count);
        }
        Ok(())
    }
}

/// Makes the header name the new structure, and clears the dirty bit, in one write.
fn switch(storage: &dyn Storage, header: &Header, plan: &Plan) -> Result<Header> {
    let failed = |e| Error::io("reading the header", e);
    let length = storage.len().map_err(failed)?.min(Header::READ_LENGTH as u64);
    let mut bytes = vec![0; length as usize];
    storage.read_at(&mut bytes, 0).map_err(failed)?;
    let table = header.geometry.host_offset(plan.table);
    patch(&mut bytes, &Header::patch_refcount_table(table, plan.table_clusters as u32));
    if header.incompatible_features & INCOMPATIBLE_DIRTY != 0 {
        patch(
            &mut bytes,
            &Header::patch_features(
                header.incompatible_features & !INCOMPATIBLE_DIRTY,
                header.compatible_features,
                header.autoclear_features,
            ),
        );
    }
    let new = Header::parse(&bytes)?;
    bytes.truncate(SECTOR);
    write(storage, &bytes, HostOffset(0), "the header")?;
    Ok(new)
}

fn patch(bytes: &mut [u8], patch: &Patch) {
    let at = patch.offset.0 as usize;
    bytes[at..at + patch.bytes.len()].copy_from_slice(&patch.bytes);
}

fn write(storage: &dyn Storage, bytes: &[u8], at: HostOffset, what: &str) -> Result<()> {
    storage.write_at(bytes, at.0).map_err(|e| Error::io(format!("writing {what} at {at}"), e))
}

fn sync(storage: &dyn Storage, rule: Rule) -> Result<()> {
    if !rule.is_kept() {
        return Ok(());
    }
    storage.sync().map_err(|e| Error::io("syncing the image", e))
}
