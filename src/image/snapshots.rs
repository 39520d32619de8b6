//! Internal snapshots of an image that is open: what of it is theirs.
//!
//! A snapshot has an L1 table of its own and shares L2 tables and data with the disk by refcounts
//! above 1; what shares is copied before it is changed. The tables of snapshots are never changed.

use std::collections::BTreeSet;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Geometry, Header, HostCluster, HostOffset, L1Entry, MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES,
    MAX_SNAPSHOTS, Snapshot, be64,
};
use crate::storage::Storage;
use crate::tables::MetadataMap;

/// The L1 tables of all snapshots together are at most this many bytes: two of the largest.
const MAX_ALL_L1_BYTES: u64 = 2 * MAX_L1_BYTES;

/// Enters the snapshot table, and the L1 and L2 tables of the snapshots, into the map of metadata.
///
/// # Errors
/// Host errors; `Corrupt` with a table that makes no sense, `TooBig` past the limits.
pub(super) fn register_metadata(
    storage: &dyn Storage,
    header: &Header,
    metadata: &MetadataMap,
) -> Result<()> {
    let geometry = &header.geometry;
    let snapshots = read_table(storage, header, |bytes| {
        mark(metadata, geometry, header.snapshots_offset, bytes);
    })?;
    let mut budget = MAX_ALL_L1_BYTES;
    for snapshot in snapshots {
        let bytes = u64::from(snapshot.l1_size) * 8;
        budget = budget.checked_sub(bytes).ok_or_else(|| {
            Error::new(ErrorKind::TooBig, "the L1 tables of the snapshots have more than 64 MiB")
        })?;
        mark(metadata, geometry, snapshot.l1_table_offset, bytes);
        for table in l2_tables(storage, geometry, &snapshot)? {
            metadata.insert(table);
        }
    }
    Ok(())
}

/// The entries of the snapshot table; `size` is told how many bytes it has.
fn read_table(
    storage: &dyn Storage,
    header: &Header,
    size: impl FnOnce(u64),
) -> Result<Vec<Snapshot>> {
    let failed =
        |e| Error::io(format!("reading the snapshot table at {}", header.snapshots_offset), e);
    if header.snapshot_count > MAX_SNAPSHOTS {
        return Err(Error::new(
            ErrorKind::TooBig,
            format!("{} snapshots, at most {MAX_SNAPSHOTS} are served", header.snapshot_count),
        ));
    }
    let start = header.snapshots_offset.0;
    let mut snapshots = Vec::new();
    let mut at = start;
    for _ in 0..header.snapshot_count {
        let mut fixed = [0; Snapshot::FIXED_LENGTH];
        storage.read_at(&mut fixed, at).map_err(failed)?;
        let mut bytes = vec![0; Snapshot::length(&fixed)?];
        storage.read_at(&mut bytes, at).map_err(failed)?;
        snapshots.push(Snapshot::parse(&bytes));
        at = at.saturating_add((bytes.len() as u64).next_multiple_of(8));
        if at - start > MAX_SNAPSHOT_TABLE_BYTES {
            return Err(Error::new(ErrorKind::TooBig, "the snapshot table has more than 64 MiB"));
        }
    }
    size(at - start);
    Ok(snapshots)
}

/// The L2 tables of a snapshot, each once.
fn l2_tables(
    storage: &dyn Storage,
    geometry: &Geometry,
    snapshot: &Snapshot,
) -> Result<BTreeSet<HostCluster>> {
    let offset = snapshot.l1_table_offset;
    if !geometry.is_aligned(offset.0) {
        return Err(Error::corrupt(format!(
            "the L1 table of snapshot {} at {offset} does not start a cluster",
            snapshot.name
        )));
    }
    let mut l1 = vec![0; snapshot.l1_size as usize * 8];
    storage
        .read_at(&mut l1, offset.0)
        .map_err(|e| Error::io(format!("reading the L1 table of snapshot {}", snapshot.name), e))?;
    let entries = l1.chunks_exact(8).map(|word| {
        L1Entry::decode(be64(word, 0), geometry).map_err(|bad| {
            Error::corrupt(format!("an L1 entry of snapshot {} {bad}", snapshot.name))
        })
    });
    entries.filter_map(|entry| entry.map(|e| e.table).transpose()).collect()
}

fn mark(metadata: &MetadataMap, geometry: &Geometry, offset: HostOffset, bytes: u64) {
    for cluster in geometry.host_clusters(offset, bytes) {
        metadata.insert(HostCluster(cluster));
    }
}
