//! Moving what the L2 tables map, and the tables themselves.

use std::collections::BTreeSet;
use std::ops::Range;

use super::occupancy::Occupancy;
use super::{Compaction, Pass, Purpose};
use crate::error::{Error, Result};
use crate::format::{COPIED, HostCluster, L2Entry, OFFSET_MASK, ZERO, be64};
use crate::image::write::is_all_zero;
use crate::image::{Image, Writer};
use crate::recycler::Rooted;
use crate::tables::Edit;

/// So much is copied at most while guest clusters are held, and one cluster at least.
const BYTES_AT_A_TIME: u64 = 256 << 10;
/// Holes of a cluster stay holes in pieces of this size: the blocks of common host file systems.
const BLOCK: usize = 4096;

/// An L2 table of a column, and how many L1 tables point to it.
#[derive(Clone, Debug)]
struct Table {
    cluster: HostCluster,
    paths: u64,
}

/// A use of host clusters at one place of a column: a data cluster, or the pieces of some that hold
/// one compressed cluster.
#[derive(Debug)]
pub(super) struct Use {
    /// Which host clusters, and where compressed data starts.
    key: u64,
    /// The tables that use them, and what stands in their entries.
    pub(super) entries: Vec<(HostCluster, u64)>,
    /// The L1 tables that lead there.
    pub(super) paths: u64,
}

impl Image {
    /// Looks how full the host clusters with compressed data are in the next column, and lets go of
    /// a table that maps nothing; `false` when all columns are through.
    pub(super) fn survey_some(
        &self,
        writer: &Writer,
        pass: &mut Pass,
        occupancy: &mut Occupancy,
    ) -> Result<bool> {
        let Some((column, tables)) = self.next_column(pass)? else { return Ok(false) };
        let size = self.geometry.l2_entry_size() as usize;
        // What snapshots share with the disk they share at the same place.
        let mut found = BTreeSet::new();
        let mut is_empty = true;
        for table in tables {
            let bytes = self.tables.read_table(table.cluster)?;
            is_empty &= is_all_zero(&bytes);
            let words = bytes.chunks_exact(size).map(|entry| be64(entry, 0)).enumerate();
            found.extend(words.filter(|(_, raw)| L2Entry::is_compressed(*raw)));
        }
        for (_, raw) in found {
            let decoded = L2Entry::decode(raw, 0, &self.geometry);
            if let Ok(L2Entry::Compressed { offset, length }) = decoded {
                occupancy.add(&(offset.0..offset.0.saturating_add(length)));
            }
        }
        if is_empty {
            self.drop_empty_table(writer, pass, column)?;
        }
        Ok(true)
    }

    /// Moves the next few clusters; `false` when all columns are through.
    pub(super) fn move_in_columns(
        &self,
        writer: &Writer,
        compaction: &mut Compaction,
        pass: &mut Pass,
    ) -> Result<bool> {
        if let Some(first) = pass.entries.pop() {
            let most = (BYTES_AT_A_TIME >> self.geometry.cluster_bits()).max(1);
            let mut end = first + 1;
            while pass.entries.last() == Some(&end) && u64::from(end - first) < most {
                pass.entries.pop();
                end += 1;
            }
            let column = pass.column - 1;
            self.move_entries(writer, compaction, pass, column, u64::from(first)..u64::from(end))?;
            if pass.entries.is_empty() {
                self.move_tables(writer, compaction, pass, column)?;
            }
            return Ok(true);
        }
        // A step looks at one column.
        let Some((column, tables)) = self.next_column(pass)? else { return Ok(false) };
        let is_empty;
        (pass.entries, is_empty) = self.entries_to_move(&tables, pass)?;
        if is_empty && self.drop_empty_table(writer, pass, column)? {
            return Ok(true);
        }
        if pass.entries.is_empty() && tables.iter().any(|t| pass.moves(t.cluster)) {
            self.move_tables(writer, compaction, pass, column)?;
        }
        Ok(true)
    }

    /// The next column that has L2 tables, however many empty L1 entries there are before it.
    fn next_column(&self, pass: &mut Pass) -> Result<Option<(u64, Vec<Table>)>> {
        let columns = pass.snapshots.iter().map(|s| s.entries.len()).max().unwrap_or(0);
        let columns = columns.max(self.tables.l1_entries()) as u64;
        while pass.column < columns {
            let column = pass.column;
            pass.column += 1;
            let tables = self.tables_of(pass, column)?;
            if !tables.is_empty() {
                return Ok(Some((column, tables)));
            }
        }
        Ok(None)
    }

    /// The L2 tables of a column, each once.
    fn tables_of(&self, pass: &Pass, column: u64) -> Result<Vec<Table>> {
        let active = self.tables.table_at(column)?.and_then(|entry| entry.table);
        let others = pass.snapshots.iter().filter_map(|snapshot| {
            let raw = *snapshot.entries.get(column as usize)? & OFFSET_MASK;
            (raw != 0).then(|| HostCluster(raw >> self.geometry.cluster_bits()))
        });
        let mut tables: Vec<Table> = Vec::new();
        for cluster in active.into_iter().chain(others) {
            match tables.iter_mut().find(|table| table.cluster == cluster) {
                Some(table) => table.paths += 1,
                None => tables.push(Table { cluster, paths: 1 }),
            }
        }
        Ok(tables)
    }

    /// The entries of `tables` that use what is to be moved, in descending order, and whether no
    /// table maps anything. Nothing is held: they are looked at again.
    fn entries_to_move(&self, tables: &[Table], pass: &Pass) -> Result<(Vec<u32>, bool)> {
        let size = self.geometry.l2_entry_size() as usize;
        let mut found = Vec::new();
        let mut is_empty = true;
        for table in tables {
            let bytes = self.tables.read_table(table.cluster)?;
            is_empty &= is_all_zero(&bytes);
            for (index, entry) in bytes.chunks_exact(size).enumerate() {
                if self.is_moved(be64(entry, 0), pass) {
                    found.push(index as u32);
                }
            }
        }
        found.sort_unstable_by(|a, b| b.cmp(a));
        found.dedup();
        Ok((found, is_empty))
    }

    /// Lets go of the L2 table of a column where it maps nothing and is nobody else's: without one the
    /// column reads the same. Whether it did.
    fn drop_empty_table(&self, writer: &Writer, pass: &mut Pass, column: u64) -> Result<bool> {
        let _guard = self.locks.exclusive(self.tables.clusters_of(column));
        let Some(table) = self.tables.table_at(column)?.and_then(|entry| entry.table) else {
            return Ok(false);
        };
        let is_only_one = matches!(self.tables_of(pass, column)?[..], [Table { paths: 1, .. }]);
        if !is_only_one
            || !is_all_zero(&self.tables.read_table(table)?)
            || writer.refcounts.get(table)? != 1
        {
            return Ok(false);
        }
        self.tables.remove_table(column);
        pass.emptied += 1;
        self.tables.metadata().give_up(table.0..table.0 + 1);
        writer.recycler.drop_used(table.0..table.0 + 1)?;
        Ok(true)
    }

    fn is_moved(&self, raw: u64, pass: &Pass) -> bool {
        let is_compressed = L2Entry::is_compressed(raw);
        self.host_clusters_of(raw).is_some_and(|used| pass.moves_any(&used, is_compressed))
    }

    /// The host clusters of the image file that an entry of an L2 table uses; none where it is
    /// malformed.
    fn host_clusters_of(&self, raw: u64) -> Option<Range<u64>> {
        if self.geometry.data_file() {
            // Those are places in the data file, where nothing moves.
            return None;
        }
        if L2Entry::is_compressed(raw) {
            return match L2Entry::decode(raw, 0, &self.geometry) {
                Ok(L2Entry::Compressed { offset, length }) => {
                    Some(self.geometry.host_clusters(offset, length))
                }
                _ => None,
            };
        }
        let offset = raw & OFFSET_MASK;
        (offset != 0 && self.geometry.is_aligned(offset)).then(|| {
            let cluster = offset >> self.geometry.cluster_bits();
            cluster..cluster + 1
        })
    }

    /// Moves what entries `indices` of a column map, where that lies behind the end.
    fn move_entries(
        &self,
        writer: &Writer,
        compaction: &mut Compaction,
        pass: &mut Pass,
        column: u64,
        indices: Range<u64>,
    ) -> Result<()> {
        let clusters = self.tables.clusters_of(column);
        // Where tables may be shared a copy on write of one must not meet a move within it.
        let is_own = self.tables.table_at(column)?.is_some_and(|entry| entry.copied);
        let held = match pass.snapshots.is_empty() && is_own {
            true => clusters.start + indices.start..clusters.start + indices.end,
            false => clusters,
        };
        let _guard = self.locks.exclusive(held);
        let tables = self.tables_of(pass, column)?;
        for table in &tables {
            if !self.is_all_of(writer, compaction, table.cluster, table.paths)? {
                return Ok(());
            }
        }
        for index in indices {
            for one in self.uses_of(&tables, index, pass)? {
                match L2Entry::is_compressed(one.key) {
                    true => self.move_compressed(writer, compaction, pass, index, &one)?,
                    false => self.move_data(writer, compaction, pass, index, &one)?,
                }
            }
        }
        Ok(())
    }

    /// What entry `index` of the tables uses that is to be moved, each once.
    fn uses_of(&self, tables: &[Table], index: u64, pass: &Pass) -> Result<Vec<Use>> {
        let mut uses: Vec<Use> = Vec::new();
        for table in tables {
            let raw = self.tables.raw_entry(table.cluster, index)?;
            if !self.is_moved(raw, pass) {
                continue;
            }
            let key = if L2Entry::is_compressed(raw) { raw } else { raw & OFFSET_MASK };
            let one = match uses.iter_mut().position(|one| one.key == key) {
                Some(at) => &mut uses[at],
                None => {
                    uses.push(Use { key, entries: Vec::new(), paths: 0 });
                    let last = uses.len() - 1;
                    &mut uses[last]
                }
            };
            one.entries.push((table.cluster, raw));
            one.paths += table.paths;
        }
        Ok(uses)
    }

    /// Moves one data cluster, all of whose references `one` shows. The guest cluster is held.
    fn move_data(
        &self,
        writer: &Writer,
        compaction: &mut Compaction,
        pass: &mut Pass,
        index: u64,
        one: &Use,
    ) -> Result<()> {
        let source = HostCluster(one.key >> self.geometry.cluster_bits());
        if self.tables.is_metadata(source) {
            return Err(Error::corrupt(format!(
                "L2 entry {index} of a table points to {}, which is metadata",
                self.geometry.host_offset(source)
            )));
        }
        if !self.is_all_of(writer, compaction, source, one.paths)? {
            return Ok(());
        }
        if one.entries.iter().all(|(_, raw)| self.reads_zeros(*raw)) {
            // Kept for a guest cluster that reads zeros: nobody misses it.
            let edits = one.entries.iter().map(|&(table, raw)| (table, raw, raw & ZERO));
            self.redirect(index, edits)?;
            return self.drop_all(writer, source, one.paths);
        }
        let Some(target) = self.take_target(writer, pass, 1)? else {
            pass.no_room();
            return Ok(());
        };
        let cluster = target.first();
        self.copy_cluster(source, cluster)?;
        if one.paths > 1 {
            writer.refcounts.raise(cluster, one.paths - 1)?;
        }
        let place = self.geometry.host_offset(cluster).0;
        // Where it is shared a flag would be wrong, and the new cluster may be trusted.
        let replaced = if one.paths > 1 { OFFSET_MASK | COPIED } else { OFFSET_MASK };
        let edits = one.entries.iter().map(|&(table, raw)| (table, raw, raw & !replaced | place));
        self.redirect(index, edits).inspect_err(|_| self.lower(writer, cluster, one.paths - 1))?;
        target.linked(1);
        pass.note_moved(self.cluster_size());
        self.drop_all(writer, source, one.paths)
    }

    /// Exactly `wanted` clusters in a row to move something to, which read zeros; `None` where there is
    /// no room for them. No more than needed: what is free before the end may just suffice for
    /// everybody.
    pub(super) fn take_target<'a>(
        &self,
        writer: &'a Writer,
        pass: &Pass,
        wanted: u64,
    ) -> Result<Option<Rooted<'a>>> {
        if pass.purpose == Purpose::Evacuate {
            return writer.recycler.take_at_end(wanted).map(Some);
        }
        let before = writer.recycler.take_before(wanted, pass.end)?;
        Ok(before.filter(|rooted| rooted.count() >= wanted))
    }

    /// Whether an entry reads zeros by its flag.
    fn reads_zeros(&self, raw: u64) -> bool {
        self.geometry.version() >= 3 && !self.geometry.extended_l2() && raw & ZERO != 0
    }

    /// Whether `paths` references to a cluster are all that its refcount knows of.
    pub(super) fn is_all_of(
        &self,
        writer: &Writer,
        compaction: &mut Compaction,
        cluster: HostCluster,
        paths: u64,
    ) -> Result<bool> {
        let count = writer.refcounts.get(cluster)?;
        let at = self.geometry.host_offset(cluster);
        if count < paths {
            return Err(Error::corrupt(format!(
                "the cluster at {at} has refcount {count} and {paths} references"
            )));
        }
        if count > paths {
            compaction.pin(|| {
                format!("the cluster at {at} has refcount {count}, and only {paths} references are known")
            });
        }
        Ok(count == paths)
    }

    /// Makes entry `index` of each table say something else: table, old and new word. Nobody else
    /// changes these entries meanwhile.
    pub(super) fn redirect(
        &self,
        index: u64,
        edits: impl Iterator<Item = (HostCluster, u64, u64)>,
    ) -> Result<()> {
        let edits: Vec<_> =
            edits.map(|(table, old, new)| Edit { table, index, old, new }).collect();
        match self.tables.edit(&edits)? {
            true => Ok(()),
            false => Err(Error::invalid("an L2 entry changed while its guest cluster was held")),
        }
    }

    /// The tables refer to a cluster `paths` times less, which is all there was.
    pub(super) fn drop_all(&self, writer: &Writer, cluster: HostCluster, paths: u64) -> Result<()> {
        if paths == 1 {
            return writer.recycler.drop_used(cluster.0..cluster.0 + 1);
        }
        for _ in 0..paths {
            writer.recycler.drop_shared(cluster);
        }
        Ok(())
    }

    /// Takes back `by` references to a cluster that were counted for entries which did not come.
    pub(super) fn lower(&self, writer: &Writer, cluster: HostCluster, by: u64) {
        (0..by).for_each(|_| writer.recycler.drop_shared(cluster));
    }

    /// Copies a cluster to one that reads zeros. Blocks of zeros are not written.
    fn copy_cluster(&self, source: HostCluster, target: HostCluster) -> Result<()> {
        let mut bytes = vec![0; self.cluster_size() as usize];
        let from = self.geometry.host_offset(source).0;
        self.storage
            .read_at(&mut bytes, from)
            .map_err(|e| Error::io(format!("reading data at {from:#x}"), e))?;
        let place = self.geometry.host_offset(target).0;
        if self.is_bound_to_place() {
            // What is zeros here need not be zeros there.
            self.carry(&mut bytes, source, target)?;
            return self.write_host(&bytes, place);
        }
        self.write_blocks(&bytes, place)
    }

    fn write_blocks(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let is_zero = |block: &[u8]| block.iter().fold(0, |all, byte| all | byte) == 0;
        let mut at = 0;
        while at < bytes.len() {
            let mut end = at;
            while end < bytes.len() && !is_zero(&bytes[end..bytes.len().min(end + BLOCK)]) {
                end = bytes.len().min(end + BLOCK);
            }
            if end > at {
                self.write_host(&bytes[at..end], offset + at as u64)?;
            }
            at = end + BLOCK;
        }
        Ok(())
    }

    /// Moves those L2 tables of a column that lie behind the end.
    fn move_tables(
        &self,
        writer: &Writer,
        compaction: &mut Compaction,
        pass: &mut Pass,
        column: u64,
    ) -> Result<()> {
        let _guard = self.locks.exclusive(self.tables.clusters_of(column));
        for table in self.tables_of(pass, column)? {
            if !pass.moves(table.cluster)
                || !self.is_all_of(writer, compaction, table.cluster, table.paths)?
            {
                continue;
            }
            let Some(target) = self.take_target(writer, pass, 1)? else {
                pass.no_room();
                return Ok(());
            };
            let bytes = self.tables.read_table(table.cluster)?;
            let cluster = target.first();
            // It may have been another table once.
            self.tables.forget_table(cluster);
            self.write_host(&bytes, self.geometry.host_offset(cluster).0)?;
            if table.paths > 1 {
                writer.refcounts.raise(cluster, table.paths - 1)?;
            }
            if self.tables.table_at(column)?.is_some_and(|e| e.table == Some(table.cluster)) {
                self.tables.move_table(column, cluster, table.paths > 1);
            }
            for snapshot in &mut pass.snapshots {
                snapshot.replace(column, table.cluster, cluster, &self.geometry, &self.tables);
            }
            target.linked(1);
            pass.note_moved(self.cluster_size());
            self.tables.metadata().give_up(table.cluster.0..table.cluster.0 + 1);
            self.drop_all(writer, table.cluster, table.paths)?;
        }
        Ok(())
    }
}

impl Pass {
    /// Whether something at a host cluster, not compressed data, is to be moved.
    fn moves(&self, cluster: HostCluster) -> bool {
        self.moves_any(&(cluster.0..cluster.0 + 1), false)
    }

    fn moves_any(&self, used: &Range<u64>, is_compressed: bool) -> bool {
        match self.purpose {
            Purpose::Evacuate => used.start < self.end,
            Purpose::Shorten => used.end > self.end || is_compressed && self.dissolves(used),
        }
    }

    fn dissolves(&self, used: &Range<u64>) -> bool {
        let dissolved = self.dissolved.as_ref();
        dissolved.is_some_and(|sparse| used.clone().any(|cluster| sparse.is_sparse(cluster)))
    }

    /// Nothing before the end is free any more: somebody else has taken it. What is left stays.
    pub(super) fn no_room(&mut self) {
        self.entries.clear();
        self.column = u64::MAX;
        self.is_out_of_room = true;
    }

    pub(super) fn note_moved(&mut self, bytes: u64) {
        self.moved += bytes;
        self.unflushed += bytes;
    }
}
