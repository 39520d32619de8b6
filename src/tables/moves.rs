//! What moving clusters needs of the tables: whole L2 tables as raw words, wherever they are
//! referenced from, and words of other metadata that change along with them.
//!
//! Entries are handled as they stand on disk, so that whatever else an entry says (subclusters,
//! flags) goes along. All of it waits for the next flush like any change, which syncs first: what
//! has moved is durable before what leads to it.

use std::ops::Range;

use super::{L1_ENTRIES_PER_SECTOR, SliceCache, State, Tables, Write};
use crate::error::Result;
use crate::format::{COPIED, HostCluster, L1Entry, OFFSET_MASK, be64};
use crate::rules::Rule;

/// A change of one entry of an L2 table, its first word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edit {
    /// The table.
    pub table: HostCluster,
    /// The entry's number within its table.
    pub index: u64,
    /// What stands there.
    pub old: u64,
    /// What takes its place.
    pub new: u64,
}

impl Tables {
    /// The L2 table that L1 entry `index` points to.
    ///
    /// # Errors
    /// `Corrupt`: the entry is malformed.
    pub fn table_at(&self, index: u64) -> Result<Option<L1Entry>> {
        let raw = self.state.read().l1.get(index as usize).copied().unwrap_or(0);
        self.decode_l1(index, raw).map(|entry| (raw != 0).then_some(entry))
    }

    /// Where the L1 table is, in clusters.
    pub fn l1_place(&self) -> Range<u64> {
        self.place_of_l1(&self.state.read())
    }

    pub(super) fn place_of_l1(&self, state: &State) -> Range<u64> {
        let first = self.geometry.host_cluster(state.l1_offset).0;
        first..first + self.geometry.clusters_for(state.l1.len() as u64 * 8).0
    }

    /// The first word of entry `index` of the L2 table at `table`, which stays what it is meanwhile.
    ///
    /// # Errors
    /// Host errors.
    pub fn raw_entry(&self, table: HostCluster, index: u64) -> Result<u64> {
        let at = self.raw_offset(table, index);
        loop {
            {
                let state = self.state.read();
                let key = state.cache.key(at);
                if let Some(bytes) = state.cache.get(key) {
                    return Ok(be64(bytes, (at - key) as usize));
                }
            }
            self.load_slice(at, |_| Ok(true))?;
        }
    }

    fn raw_offset(&self, table: HostCluster, index: u64) -> u64 {
        self.geometry.host_offset(table).0 + index * self.geometry.l2_entry_size()
    }

    /// Drops what is cached of a cluster that is no table and becomes one.
    pub fn forget_table(&self, cluster: HostCluster) {
        let start = self.geometry.host_offset(cluster).0;
        self.state.write().cache.forget_cluster(start, self.geometry.cluster_size());
    }

    /// Whether a host cluster holds metadata.
    pub fn is_metadata(&self, cluster: HostCluster) -> bool {
        self.metadata.contains(cluster)
    }

    /// A host cluster holds metadata from now on.
    pub fn enter_metadata(&self, cluster: HostCluster) {
        self.metadata.insert(cluster);
    }

    /// Makes all of `edits`, or none if an entry is not what its edit says; whether it did. The
    /// caller holds what the entries map exclusively, for every L1 table that leads there.
    ///
    /// # Errors
    /// Host errors; nothing has changed then.
    pub fn edit(&self, edits: &[Edit]) -> Result<bool> {
        loop {
            let mut state = self.state.write();
            let cache = &mut state.cache;
            let place = |edit: &Edit, cache: &SliceCache| {
                let at = self.raw_offset(edit.table, edit.index);
                let key = cache.key(at);
                (key, (at - key) as usize)
            };
            let mut missing = None;
            for edit in edits {
                let (key, within) = place(edit, cache);
                match cache.get(key) {
                    Some(bytes) if be64(bytes, within) == edit.old => {}
                    Some(_) => return Ok(false),
                    None => missing = Some(key),
                }
            }
            if let Some(key) = missing {
                drop(state);
                self.load_slice(key, |_| Ok(true))?;
                continue;
            }
            for edit in edits {
                let (key, within) = place(edit, cache);
                if let Some(bytes) = cache.get_mut(key, within..within + 8) {
                    bytes[within..within + 8].copy_from_slice(&edit.new.to_be_bytes());
                }
            }
            state.barrier |= Rule::MoveBeforeEntry.is_kept();
            return Ok(true);
        }
    }

    /// Makes L1 entry `index` point to `new`, a copy of what it points to, which others refer to as
    /// well where it `is_shared`. The caller holds all that the table maps exclusively.
    pub fn move_table(&self, index: u64, new: HostCluster, is_shared: bool) {
        let mut state = self.state.write();
        let start = self.geometry.host_offset(new).0;
        state.cache.forget_cluster(start, self.geometry.cluster_size());
        let Some(entry) = state.l1.get_mut(index as usize) else { return };
        let replaced = if is_shared { OFFSET_MASK | COPIED } else { OFFSET_MASK };
        *entry = *entry & !replaced | start;
        state.l1_dirty.insert(index as usize / L1_ENTRIES_PER_SECTOR);
        state.barrier |= Rule::TableMoveBeforeEntry.is_kept();
        self.metadata.insert(new);
    }

    /// Makes L1 entry `index` point to no table. The caller holds all that the table maps exclusively,
    /// which is nothing, and gives its cluster back.
    pub fn remove_table(&self, index: u64) {
        let mut state = self.state.write();
        let Some(entry) = state.l1.get_mut(index as usize) else { return };
        *entry = 0;
        state.l1_dirty.insert(index as usize / L1_ENTRIES_PER_SECTOR);
    }

    /// Writes `write`, a few bytes within one sector of other metadata, along with the tables at
    /// the next flush.
    pub fn write_along(&self, write: Write) {
        let mut state = self.state.write();
        state.along.insert(write.0, write.1);
        state.barrier |= Rule::MoveBeforeWord.is_kept();
    }

    /// The number of guest clusters that one L2 table maps, from L1 entry `index` on.
    pub fn clusters_of(&self, index: u64) -> Range<u64> {
        let entries = self.geometry.l2_entries();
        index * entries..(index + 1) * entries
    }
}
