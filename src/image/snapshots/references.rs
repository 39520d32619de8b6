//! What an L1 table refers to, as a whole: counted up, counted down, marked as its own again.
//!
//! An L1 table that leads to one L2 table twice is damaged, as that of the disk is
//! ([`crate::tables::Tables::register_metadata`]): nobody makes one, and the work would be as much as it
//! claims. So each L2 table is read once.

use std::ops::Range;

use super::table::for_each_table;
use super::{Image, Writer};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Geometry, GuestCluster, HostCluster, L1Entry, L2Entry, Snapshot, be64};
use crate::rules::Rule;
use crate::tables::{LinkOrder, TableState};

/// The L2 tables that an L1 table leads to, in ascending order.
///
/// # Errors
/// `Corrupt` where it leads to one of them twice, or an entry is malformed.
pub(super) fn distinct_tables(l1: &[u64], geometry: &Geometry) -> Result<Vec<HostCluster>> {
    let mut tables = Vec::new();
    for (index, &raw) in l1.iter().enumerate().filter(|(_, raw)| **raw != 0) {
        tables.extend(decode(index, raw, geometry)?.table);
    }
    tables.sort_unstable();
    match tables.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(tables),
        Some(pair) => Err(Error::corrupt(format!(
            "two entries of one L1 table lead to the L2 table at {}",
            geometry.host_offset(pair[0])
        ))),
    }
}

fn decode(index: usize, raw: u64, geometry: &Geometry) -> Result<L1Entry> {
    L1Entry::decode(raw, geometry).map_err(|bad| Error::corrupt(format!("L1 entry {index} {bad}")))
}

impl Image {
    /// Refuses to give up what `l1` refers to where L2 tables of it are counted less often than the L1
    /// tables of the disk and of `snapshots`, which are all there are, lead to them: one would be freed
    /// that is still in use. Snapshots do not change meanwhile.
    ///
    /// # Errors
    /// `Corrupt`, host errors.
    pub(super) fn refuse_low_counts_of(
        &self,
        writer: &Writer,
        l1: &[u64],
        snapshots: &[Snapshot],
    ) -> Result<()> {
        // The counts first: where the disk leaves a table meanwhile, its count falls afterwards.
        let mut left = Vec::new();
        for table in distinct_tables(l1, &self.geometry)? {
            left.push((table, writer.refcounts.get(table)?));
        }
        let lead_to = |table: HostCluster| {
            let Ok(found) = left.binary_search_by_key(&table, |(table, _)| *table) else {
                return Ok(());
            };
            left[found].1 = left[found].1.checked_sub(1).ok_or_else(|| {
                Error::corrupt(format!(
                    "the L2 table at {} has more references than its refcount says",
                    self.geometry.host_offset(table)
                ))
            })?;
            Ok(())
        };
        self.for_each_table_of(snapshots, lead_to)
    }

    /// Shows `visit` each L2 table that the L1 tables of the disk and of `snapshots` lead to, once for
    /// each of them.
    fn for_each_table_of(
        &self,
        snapshots: &[Snapshot],
        mut visit: impl FnMut(HostCluster) -> Result<()>,
    ) -> Result<()> {
        for (index, raw) in self.tables.l1().into_iter().enumerate().filter(|(_, raw)| *raw != 0) {
            decode(index, raw, &self.geometry)?.table.map_or(Ok(()), &mut visit)?;
        }
        snapshots.iter().try_for_each(|snapshot| {
            for_each_table(&*self.storage, &self.geometry, snapshot, &mut visit)
        })
    }

    /// Gives up those L2 tables of `l1`, of a disk or snapshot that is gone, that no L1 table leads to.
    fn give_up_tables(&self, l1: &[u64]) -> Result<()> {
        let tables = distinct_tables(l1, &self.geometry)?;
        let mut kept = vec![false; tables.len()];
        let snapshots = self.snapshots.state.lock().table.entries.clone();
        self.for_each_table_of(&snapshots, |table| {
            if let Ok(found) = tables.binary_search(&table) {
                kept[found] = true;
            }
            Ok(())
        })?;
        for (table, _) in tables.iter().zip(kept).filter(|(_, kept)| !kept) {
            self.tables.metadata().give_up(table.0..table.0 + 1);
        }
        Ok(())
    }

    /// Adds a reference to everything that `l1` refers to, in memory.
    ///
    /// # Errors
    /// `TooBig` where a refcount is at its largest, `Corrupt`, host errors. Nothing has changed then
    /// (or refcounts are too high, where what could be read before cannot be read again).
    pub(super) fn raise_references(&self, writer: &Writer, l1: &[u64]) -> Result<()> {
        let mut raised = 0;
        let result = self.for_each_reference(l1, u64::MAX, |clusters| {
            writer.refcounts.raise_each(clusters)?;
            raised += 1;
            Ok(())
        });
        if result.is_err() {
            self.undo_raise(writer, l1, raised);
        }
        result
    }

    /// Takes the first `raised` steps of [`Image::raise_references`] back.
    pub(super) fn undo_raise(&self, writer: &Writer, l1: &[u64], raised: u64) {
        let undone = self.for_each_reference(l1, raised, |mut clusters| {
            clusters.try_for_each(|cluster| {
                writer.refcounts.release_shared(HostCluster(cluster)).map(|_| ())
            })
        });
        if let Err(e) = undone {
            log::warn!("clusters stay counted for a snapshot that is not there: {e}");
        }
    }

    /// Drops a reference from everything that `l1` refers to, which no table on disk leads to any
    /// more, durably. What nothing else refers to goes to the recycler, which refuses L2 tables that some
    /// L1 table still leads to. Snapshots do not change meanwhile.
    ///
    /// # Errors
    /// `Corrupt`, host errors; what was not reached is leaked.
    pub(super) fn drop_references(&self, writer: &Writer, l1: &[u64]) -> Result<()> {
        self.give_up_tables(l1)?;
        self.for_each_reference(l1, u64::MAX, |clusters| {
            let mut last = clusters.start..clusters.start;
            for cluster in clusters {
                if writer.refcounts.release_shared(HostCluster(cluster))? {
                    release_used(writer, std::mem::replace(&mut last, cluster + 1..cluster + 1))?;
                }
                last.end = cluster + 1;
            }
            release_used(writer, last)
        })
    }

    /// Shows `visit` the clusters that `l1` refers to, one run for each reference, those of an L2
    /// table before the table itself; at most `limit` runs.
    fn for_each_reference(
        &self,
        l1: &[u64],
        limit: u64,
        visit: impl FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let mut walk = Walk { image: self, left: limit, run: 0..0, visit };
        for (index, &raw) in l1.iter().enumerate().filter(|(_, raw)| **raw != 0) {
            if walk.left == 0 {
                break;
            }
            if let Some(table) = decode(index, raw, &self.geometry)?.table {
                self.refuse_closing()?;
                walk.table(table)?;
            }
        }
        Ok(())
    }

    /// Ends a long walk where somebody waits with closing the image.
    fn refuse_closing(&self) -> Result<()> {
        let is_closing = |writer: &Writer| writer.recycler.wake_signal().is_stopped();
        match self.writer.as_ref().is_some_and(is_closing) {
            true => Err(Error::new(ErrorKind::ReadOnly, "the image is being closed")),
            false => Ok(()),
        }
    }

    /// Gives those entries of the disk their COPIED flag back that are the only ones to refer to
    /// their cluster, in the L2 tables of the L1 entries `indices`. No guest clusters are held.
    ///
    /// # Errors
    /// `Corrupt`, host errors.
    pub(in crate::image) fn mark_own(
        &self,
        writer: &Writer,
        indices: impl Iterator<Item = u64>,
    ) -> Result<()> {
        let entries = self.geometry.l2_entries();
        for index in indices.filter(|&index| index < self.tables.l1_entries() as u64) {
            self.refuse_closing()?;
            if self.tables.is_crowded() {
                self.flush()?;
            }
            let clusters = index * entries..(index + 1) * entries;
            let _guard = self.locks.exclusive(clusters.clone());
            self.mark_own_held(writer, clusters)?;
        }
        Ok(())
    }

    /// The same for one L2 table, whose clusters are held exclusively.
    fn mark_own_held(&self, writer: &Writer, clusters: Range<u64>) -> Result<()> {
        let first = GuestCluster(clusters.start);
        let mut changed = false;
        match self.tables.table_state(first)? {
            TableState::Absent => return Ok(()),
            TableState::Own(_) => {}
            TableState::Shared(table) => {
                if writer.refcounts.get(table)? != 1 {
                    return Ok(());
                }
                let shared = TableState::Shared(table);
                let order = LinkOrder::as_demanded_by(Rule::CountBeforeFlag);
                self.tables.install_table(first, table, shared, order)?;
                changed = true;
            }
        }
        // On disk the refcounts may still be higher: they go first.
        let order = LinkOrder::as_demanded_by(Rule::CountBeforeFlag);
        self.tables.update(clusters, order, |_, entry| {
            let Some((cluster, false)) = entry.host_cluster() else { return Ok(None) };
            let is_own = writer.refcounts.get(cluster)? == 1;
            changed |= is_own;
            Ok(is_own.then_some(entry.moved_to(cluster, true)))
        })?;
        if changed {
            writer.recycler.note_change();
        }
        Ok(())
    }
}

fn release_used(writer: &Writer, clusters: Range<u64>) -> Result<()> {
    if clusters.is_empty() { Ok(()) } else { writer.recycler.release_used(clusters) }
}

struct Walk<'a, V> {
    image: &'a Image,
    left: u64,
    /// Clusters of data that follow each other, not shown yet.
    run: Range<u64>,
    visit: V,
}

impl<V: FnMut(Range<u64>) -> Result<()>> Walk<'_, V> {
    fn table(&mut self, table: HostCluster) -> Result<()> {
        let geometry = &self.image.geometry;
        let bytes = self.image.tables.read_table(table)?;
        let size = geometry.l2_entry_size() as usize;
        for (index, entry) in bytes.chunks_exact(size).enumerate() {
            if be64(entry, 0) == 0 {
                continue;
            }
            let name = || {
                let table = geometry.host_offset(table);
                format!("L2 entry {index} of table {table}")
            };
            let entry = L2Entry::read(entry, geometry)
                .map_err(|bad| Error::corrupt(format!("{} {bad}", name())))?;
            if let L2Entry::Compressed { offset, length } = entry {
                let clusters = geometry.host_clusters(offset, length);
                self.show_run()?;
                clusters.clone().try_for_each(|cluster| self.check(HostCluster(cluster), name))?;
                self.show(clusters)?;
            } else if let Some((cluster, _)) = entry.host_cluster() {
                self.data(cluster, name)?;
            }
        }
        self.show_run()?;
        self.show(table.0..table.0 + 1)
    }

    fn data(&mut self, cluster: HostCluster, name: impl Fn() -> String) -> Result<()> {
        self.check(cluster, name)?;
        if self.run.is_empty() || self.run.end != cluster.0 {
            self.show_run()?;
            self.run = cluster.0..cluster.0;
        }
        self.run.end += 1;
        Ok(())
    }

    fn check(&self, cluster: HostCluster, name: impl Fn() -> String) -> Result<()> {
        if !self.image.tables.metadata().contains(cluster) {
            return Ok(());
        }
        let at = self.image.geometry.host_offset(cluster);
        Err(Error::corrupt(format!("{} points to {at}, which is metadata", name())))
    }

    fn show_run(&mut self) -> Result<()> {
        let run = std::mem::replace(&mut self.run, 0..0);
        if run.is_empty() { Ok(()) } else { self.show(run) }
    }

    fn show(&mut self, clusters: Range<u64>) -> Result<()> {
        if self.left == 0 {
            return Ok(());
        }
        self.left -= 1;
        (self.visit)(clusters)
    }
}
