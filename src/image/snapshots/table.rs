//! The snapshot table as it stands on disk, and what of an image belongs to its snapshots.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::check::pieces::for_each_word;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Geometry, Header, HostCluster, HostOffset, L1Entry, MAX_L1_BYTES, MAX_SNAPSHOTS, Snapshot, be64,
};
use crate::storage::Storage;
use crate::tables::MetadataMap;

/// The snapshot table is at most so many bytes, since it is kept in memory. As QEMU makes entries,
/// the most that there can be, with the longest names, have less. (It reads up to 64 MiB.)
const MAX_TABLE_BYTES: u64 = 24 << 20;
/// The L1 tables of all snapshots together are at most this many bytes: two of the largest.
pub(super) const MAX_ALL_L1_BYTES: u64 = 2 * MAX_L1_BYTES;

/// The snapshot table.
#[derive(Debug, Default)]
pub(in crate::image) struct Table {
    /// The clusters that it takes in the file.
    pub(super) clusters: Range<u64>,
    /// Its entries, in their order.
    pub(super) entries: Vec<Snapshot>,
}

impl Table {
    /// Reads the snapshot table that `header` names, which may take so many bytes of memory.
    ///
    /// # Errors
    /// Host errors; `Corrupt` with an entry that makes no sense, `TooBig` past the limits.
    pub(in crate::image) fn read(
        storage: &dyn Storage,
        header: &Header,
        mut memory: u64,
    ) -> Result<Self> {
        let failed =
            |e| Error::io(format!("reading the snapshot table at {}", header.snapshots_offset), e);
        if header.snapshot_count > MAX_SNAPSHOTS {
            return Err(Error::new(
                ErrorKind::TooBig,
                format!("{} snapshots, at most {MAX_SNAPSHOTS} are served", header.snapshot_count),
            ));
        }
        let start = header.snapshots_offset.0;
        let mut entries = Vec::with_capacity(header.snapshot_count as usize);
        let mut at = start;
        for _ in 0..header.snapshot_count {
            let mut fixed = [0; Snapshot::FIXED_LENGTH];
            storage.read_at(&mut fixed, at).map_err(failed)?;
            let mut bytes = vec![0; Snapshot::length(&fixed)?];
            storage.read_at(&mut bytes, at).map_err(failed)?;
            let takes = (size_of::<Snapshot>() + bytes.len()) as u64;
            memory = memory.checked_sub(takes).ok_or_else(too_long)?;
            entries.push(Snapshot::parse(&bytes));
            at = at.saturating_add((bytes.len() as u64).next_multiple_of(8));
            if at - start > MAX_TABLE_BYTES {
                return Err(too_long());
            }
        }
        let clusters = header.geometry.host_clusters(header.snapshots_offset, at - start);
        Ok(Table { clusters: if at > start { clusters } else { 0..0 }, entries })
    }

    /// The table with these entries, as it is written.
    ///
    /// # Errors
    /// `TooBig` past the limits.
    pub(super) fn encode(entries: &[Snapshot]) -> Result<Vec<u8>> {
        let bytes: Vec<u8> = entries.iter().flat_map(Snapshot::encode).collect();
        let l1_bytes: u64 = entries.iter().map(|entry| u64::from(entry.l1_size) * 8).sum();
        if bytes.len() as u64 > MAX_TABLE_BYTES || entries.len() > MAX_SNAPSHOTS as usize {
            return Err(too_long());
        }
        if l1_bytes > MAX_ALL_L1_BYTES {
            return Err(too_many_tables());
        }
        Ok(bytes)
    }

    /// Enters the snapshot table, and the L1 and L2 tables of the snapshots, into the map of
    /// metadata, which has the header and the active tables of `header` already.
    ///
    /// # Errors
    /// Host errors; `Corrupt` with a table that overlaps other metadata or makes no sense, `TooBig`
    /// past the limits.
    pub(in crate::image) fn register_metadata(
        &self,
        storage: &dyn Storage,
        header: &Header,
        metadata: &MetadataMap,
    ) -> Result<()> {
        let geometry = &header.geometry;
        let active = geometry.host_clusters(header.l1_table_offset, u64::from(header.l1_size) * 8);
        let mut structures: BTreeSet<u64> = active.chain([0]).collect();
        if let Some((offset, length)) = header.luks()? {
            structures.extend(geometry.host_clusters(offset, length));
        }
        let mut own = |clusters: Range<u64>, what: &str| {
            if !metadata.is_in_file(&clusters) {
                return Err(Error::corrupt(format!("{what} ends past the end of the file")));
            }
            for cluster in clusters {
                structures.insert(cluster);
                if !metadata.insert(HostCluster(cluster)) {
                    return Err(Error::corrupt(format!("{what} overlaps other metadata")));
                }
            }
            Ok(())
        };
        own(self.clusters.clone(), "the snapshot table")?;
        let mut budget = MAX_ALL_L1_BYTES;
        for snapshot in &self.entries {
            let bytes = u64::from(snapshot.l1_size) * 8;
            budget = budget.checked_sub(bytes).ok_or_else(too_many_tables)?;
            let clusters = geometry.host_clusters(snapshot.l1_table_offset, bytes);
            let clusters = if bytes == 0 { 0..0 } else { clusters };
            own(clusters, &format!("the L1 table of snapshot {}", snapshot.label()))?;
        }
        for snapshot in &self.entries {
            for_each_table(storage, geometry, snapshot, |table| {
                metadata.check_room()?;
                let bad = |what| {
                    let (name, at) = (snapshot.label(), geometry.host_offset(table));
                    let text =
                        format!("an L1 entry of snapshot {name} points to {at}, which is {what}");
                    Err(Error::corrupt(text))
                };
                if !metadata.is_in_file(&(table.0..table.0 + 1)) {
                    return bad("past the end of the file");
                }
                // An L2 table is in the map already where the disk or another snapshot has it too.
                if !metadata.insert(table) && structures.contains(&table.0) {
                    return bad("other metadata");
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// The entries of the snapshot table, each with its place in the file.
///
/// # Errors
/// As [`Table::read`].
pub(in crate::image) fn read_entries(
    storage: &dyn Storage,
    header: &Header,
) -> Result<Vec<(HostOffset, Snapshot)>> {
    let mut at = header.snapshots_offset.0;
    let placed = Table::read(storage, header, u64::MAX)?.entries.into_iter().map(|snapshot| {
        let entry = HostOffset(at);
        at += snapshot.encode().len() as u64;
        (entry, snapshot)
    });
    Ok(placed.collect())
}

/// The snapshot table as it stands in the file.
///
/// # Errors
/// As [`Table::read`].
pub(in crate::image) fn read_bytes(storage: &dyn Storage, header: &Header) -> Result<Vec<u8>> {
    Table::encode(&Table::read(storage, header, u64::MAX)?.entries)
}

/// The L1 table of a snapshot.
///
/// # Errors
/// Host errors; `Corrupt` where it does not start a cluster, `TooBig` past the limit.
pub(super) fn read_l1(
    storage: &dyn Storage,
    geometry: &Geometry,
    snapshot: &Snapshot,
) -> Result<Vec<u64>> {
    let offset = check_l1(geometry, snapshot)?;
    let mut l1 = vec![0; snapshot.l1_size as usize * 8];
    storage.read_at(&mut l1, offset.0).map_err(|e| {
        Error::io(format!("reading the L1 table of snapshot {}", snapshot.label()), e)
    })?;
    Ok(l1.chunks_exact(8).map(|word| be64(word, 0)).collect())
}

/// Calls `visit` with each L2 table that the L1 table of a snapshot refers to, perhaps repeatedly.
pub(super) fn for_each_table(
    storage: &dyn Storage,
    geometry: &Geometry,
    snapshot: &Snapshot,
    mut visit: impl FnMut(HostCluster) -> Result<()>,
) -> Result<()> {
    let start = check_l1(geometry, snapshot)?.0;
    let end = start.saturating_add(u64::from(snapshot.l1_size) * 8);
    let doing = || format!("reading the L1 table of snapshot {}", snapshot.label());
    for_each_word(storage, start..end, doing, |at, raw| {
        // The last piece is read in whole sectors.
        let entry = if at < end { raw } else { 0 };
        let entry = L1Entry::decode(entry, geometry).map_err(|bad| {
            Error::corrupt(format!("an L1 entry of snapshot {} {bad}", snapshot.label()))
        })?;
        entry.table.map_or(Ok(()), &mut visit)
    })
}

/// Where the L1 table of a snapshot is.
pub(super) fn check_l1(geometry: &Geometry, snapshot: &Snapshot) -> Result<HostOffset> {
    let offset = snapshot.l1_table_offset;
    if !geometry.is_aligned(offset.0) {
        return Err(Error::corrupt(format!(
            "the L1 table of snapshot {} at {offset} does not start a cluster",
            snapshot.label()
        )));
    }
    if u64::from(snapshot.l1_size) * 8 > MAX_L1_BYTES {
        return Err(too_many_tables());
    }
    Ok(offset)
}

/// The L2 tables that a snapshot's L1 table refers to, each once.
pub(super) fn l2_tables(
    l1: &[u64],
    geometry: &Geometry,
    snapshot: &Snapshot,
) -> Result<BTreeSet<HostCluster>> {
    let entries = l1.iter().map(|&raw| {
        L1Entry::decode(raw, geometry).map_err(|bad| {
            Error::corrupt(format!("an L1 entry of snapshot {} {bad}", snapshot.label()))
        })
    });
    entries.filter_map(|entry| entry.map(|e| e.table).transpose()).collect()
}

fn too_long() -> Error {
    Error::new(ErrorKind::TooBig, "the snapshot table has more than 65536 entries or 24 MiB")
}

fn too_many_tables() -> Error {
    Error::new(ErrorKind::TooBig, "the L1 tables of the snapshots have more than 64 MiB")
}
