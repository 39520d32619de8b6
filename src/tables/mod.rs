//! The L1 and L2 tables of an open image: lookup, change, and what a flush has to write.
//!
//! The L1 table is in memory whole; L2 tables are cached by slices. Nothing here allocates
//! clusters, knows refcounts, or decides when to flush. A change is in memory only until a flush
//! collects it ([`Tables::collect`]), writes it and reports back ([`Tables::collected`]).
//!
//! Whoever changes the mapping of a guest cluster holds it exclusively in [`crate::locks`]; who
//! only looks it up and goes on to use the result holds it shared.

mod cache;
mod metadata_map;
mod moves;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

pub use cache::{SliceCache, Write};
pub use metadata_map::MetadataMap;
pub use moves::Edit;

use crate::check::pieces::for_each_word;
use crate::counters::{CacheCounts, Counter};
use crate::error::{Error, Result};
use crate::format::{
    COPIED, Geometry, GuestCluster, HostCluster, HostOffset, L1Entry, L2Entry, MixedCluster, be64,
};
use crate::memory::{Cache, Memory, Share};
use crate::rules::Rule;
use crate::storage::Storage;

/// L1 entries in one 512-byte sector, the unit in which the L1 table is written back.
const L1_ENTRIES_PER_SECTOR: usize = 64;
/// Loads of different slices wait for each other only when they meet in one of these.
const LOADERS: usize = 16;

/// What stands in an L1 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableState {
    /// No L2 table.
    Absent,
    /// A table that is marked as referenced only here.
    Own(HostCluster),
    /// A table that is not marked so.
    Shared(HostCluster),
}

/// What the tables say of consecutive guest clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// All of each cluster is the same.
    Uniform(Run),
    /// One guest cluster whose subclusters differ.
    Mixed(MixedCluster),
}

/// What a part of the disk is: consecutive guest clusters, or subclusters of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Nothing allocated, and nothing behind it: reads zeros.
    Unallocated,
    /// Nothing allocated: reads the backing file. Only an image tells this from `Unallocated`.
    Backing,
    /// Reads zeros by flag. A preallocated host cluster may stand behind it.
    Zero,
    /// Data in consecutive host clusters from `first`.
    Data {
        /// The host cluster of the first guest cluster.
        first: HostCluster,
        /// All of them are referenced exactly once: they may be written in place.
        copied: bool,
    },
    /// One guest cluster, compressed.
    Compressed {
        /// The first byte of the compressed data.
        offset: HostOffset,
        /// The bytes up to the end of the last sector that the data may reach into.
        length: u64,
    },
}

/// What one look at the tables tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// What the first guest cluster is.
    pub mapping: Mapping,
    /// How many from there on are the same.
    pub count: u64,
    /// Bytes of tables that were read for it, or gone through in memory.
    pub bytes: u64,
}

/// When a changed entry may reach the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkOrder {
    /// At any time: what it refers to is durably counted and reads as zeros or as what it should.
    Any,
    /// Only after all that was written before the change is durable: the flush syncs first.
    AfterSync,
}

impl LinkOrder {
    /// After a sync, which `rule` demands.
    pub fn as_demanded_by(rule: Rule) -> Self {
        if rule.is_kept() { LinkOrder::AfterSync } else { LinkOrder::Any }
    }
}

/// The tables of one image.
pub struct Tables {
    geometry: Geometry,
    storage: Arc<dyn Storage>,
    metadata: Arc<MetadataMap>,
    /// Lock order: after guest clusters, before refcounts and the cluster map.
    state: Arc<RwLock<State>>,
    /// Who loads a slice holds its loader, so that one slice is loaded by one thread at a time and
    /// what was evicted and changed meanwhile is never replaced by something older. It keeps the
    /// bytes of a slice that was evicted, for the next one: over a disk whose tables are larger than
    /// the cache, random reads spent a seventh of their time on allocating (`perf`).
    loaders: [Mutex<Option<Box<[u8]>>>; LOADERS],
    /// Lookups that found their part of a table in the cache.
    hits: Counter,
    /// Parts of tables that were read.
    misses: Counter,
    /// Of which the cache holds a share.
    memory: Arc<Memory>,
}

struct State {
    l1: Vec<u64>,
    l1_offset: HostOffset,
    /// Sectors of the L1 table that changed since the last flush.
    l1_dirty: BTreeSet<usize>,
    cache: SliceCache,
    /// Words of other metadata, by their offset, that are written with the tables.
    along: BTreeMap<u64, Vec<u8>>,
    /// Something linked since the last flush must not be on disk before what it refers to is: the
    /// flush syncs first.
    barrier: bool,
}

/// What a flush writes.
#[derive(Debug, Default)]
pub struct DirtyTables {
    /// Writes, in no particular order among each other.
    pub writes: Vec<Write>,
    /// Everything before must be on stable storage before the writes are made.
    pub barrier: bool,
    l1_sectors: BTreeSet<usize>,
    l2_writes: usize,
    along: usize,
}

impl Cache for RwLock<State> {
    fn shrink(&self, bytes: u64) {
        if let Some(mut state) = self.try_write() {
            state.cache.shrink(bytes);
        }
    }
}

impl Tables {
    /// The tables of an image whose L1 table of `l1_entries` entries starts at `l1_offset`.
    /// `cache_bytes` bounds what clean parts of L2 tables take of `memory`.
    ///
    /// # Errors
    /// Host errors; `Corrupt` with a table that overlaps other metadata or is no cluster.
    pub fn open(
        storage: Arc<dyn Storage>,
        geometry: Geometry,
        metadata: Arc<MetadataMap>,
        l1_offset: HostOffset,
        l1_entries: u32,
        cache_bytes: u64,
        memory: &Arc<Memory>,
    ) -> Result<Self> {
        let l1 = read_l1(&*storage, l1_offset, l1_entries)?;
        let share = Share::of(memory);
        let state = Arc::new(RwLock::new(State {
            l1,
            l1_offset,
            l1_dirty: BTreeSet::new(),
            cache: SliceCache::new(geometry.cluster_size(), cache_bytes, Arc::clone(&share)),
            along: BTreeMap::new(),
            barrier: false,
        }));
        memory.add(&share, &state);
        let tables = Tables {
            geometry,
            metadata,
            state,
            loaders: Default::default(),
            hits: Counter::default(),
            misses: Counter::default(),
            memory: Arc::clone(memory),
            storage,
        };
        Ok(tables)
    }

    /// Enters the L1 table and the L2 tables into the map of metadata.
    ///
    /// # Errors
    /// `Corrupt`: an L1 entry that is malformed, or a table that is also something else or lies
    /// past the end of the file. Everything that is in the file is entered all the same, so that
    /// the image can be served read-only. `TooBig` where the map of metadata is full.
    pub fn register_metadata(&self) -> Result<()> {
        let state = self.state.read();
        let mut result = Ok(());
        let place = self.place_of_l1(&state);
        if !self.metadata.is_in_file(&place) {
            return Err(Error::corrupt(format!(
                "the L1 table at {} ends past the end of the file",
                state.l1_offset
            )));
        }
        for cluster in place.map(HostCluster) {
            if !self.metadata.insert(cluster) && result.is_ok() {
                result = Err(Error::corrupt(format!(
                    "the L1 table at {} overlaps other metadata",
                    state.l1_offset
                )));
            }
        }
        let mut map = self.metadata.fill();
        for (index, &raw) in state.l1.iter().enumerate().filter(|(_, raw)| **raw != 0) {
            let bad = match L1Entry::decode(raw, &self.geometry) {
                Ok(L1Entry { table: Some(table), .. }) => map.enter(table)?.map(str::to_owned),
                Ok(_) => None,
                Err(bad) => Some(bad.to_string()),
            };
            if result.is_ok()
                && let Some(bad) = bad
            {
                result = Err(Error::corrupt(format!("L1 entry {index} ({raw:#x}) {bad}")));
            }
        }
        result
    }

    /// The memory that the cache holds a share of.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// How often a lookup met the cache, and how often something had to be read for it.
    pub fn cache_counts(&self) -> CacheCounts {
        CacheCounts::new(self.hits.get(), self.misses.get())
    }

    /// What the first of `clusters` is, and how many from there on are the same; at least 1, at
    /// most as far as one read of the tables tells. `clusters` must not be empty.
    ///
    /// # Errors
    /// Host errors; `Corrupt` with a malformed entry or one that points to metadata.
    pub fn lookup(&self, clusters: Range<u64>) -> Result<(Mapping, u64)> {
        let Look { mapping, count, .. } = self.look(clusters)?;
        Ok((mapping, count))
    }

    /// The same, and what it has cost.
    ///
    /// # Errors
    /// Those of [`Tables::lookup`].
    pub fn look(&self, clusters: Range<u64>) -> Result<Look> {
        let mut loaded = false;
        loop {
            {
                let state = self.state.read();
                let Some((table, own)) = self.table_of(&state, clusters.start)? else {
                    let count = self.absent_tables(&state, &clusters);
                    let mapping = Mapping::Uniform(Run::Unallocated);
                    // Entries of the L1 table are in memory, and gone through many times as fast.
                    let bytes = (count / self.geometry.l2_entries()).min(state.l1.len() as u64);
                    return Ok(Look { mapping, count, bytes });
                };
                let key = state.cache.key(self.entry_offset(table, clusters.start));
                if let Some(bytes) = state.cache.get(key) {
                    if !loaded {
                        self.hits.add(1);
                    }
                    let in_slice = self.clusters_in_slice(&state.cache, &clusters);
                    let (mapping, count) = self.run_of(bytes, key, in_slice, own)?;
                    let bytes = match loaded {
                        true => state.cache.slice_size(),
                        false => count * self.geometry.l2_entry_size(),
                    };
                    return Ok(Look { mapping, count, bytes });
                }
            }
            self.load(clusters.start)?;
            loaded = true;
        }
    }

    /// Shows `change` each of `clusters` with its entry, in ascending order; where it answers an
    /// entry, that one takes its place. All of them have an own L2 table ([`Tables::table_state`]).
    /// `order` holds for all that changes. The caller holds the clusters exclusively.
    ///
    /// # Errors
    /// Host errors, `Corrupt`, and what `change` returns; the clusters before the one it failed at
    /// are changed.
    pub fn update(
        &self,
        clusters: Range<u64>,
        order: LinkOrder,
        mut change: impl FnMut(GuestCluster, L2Entry) -> Result<Option<L2Entry>>,
    ) -> Result<()> {
        let mut at = clusters.start;
        while at < clusters.end {
            let mut state = self.state.write();
            let Some((table, true)) = self.table_of(&state, at)? else {
                return Err(Error::invalid(format!("guest cluster {at:#x} has no own L2 table")));
            };
            let key = state.cache.key(self.entry_offset(table, at));
            if state.cache.get(key).is_none() {
                drop(state);
                self.load(at)?;
                continue;
            }
            state.barrier |= order == LinkOrder::AfterSync;
            let end = self.clusters_in_slice(&state.cache, &(at..clusters.end)).end;
            for cluster in at..end {
                self.update_one(&mut state.cache, table, GuestCluster(cluster), &mut change)?;
            }
            at = end;
        }
        Ok(())
    }

    fn update_one(
        &self,
        cache: &mut SliceCache,
        table: HostCluster,
        cluster: GuestCluster,
        change: &mut impl FnMut(GuestCluster, L2Entry) -> Result<Option<L2Entry>>,
    ) -> Result<()> {
        let offset = self.entry_offset(table, cluster.0);
        let key = cache.key(offset);
        let at = (offset - key) as usize;
        let place = at..at + self.geometry.l2_entry_size() as usize;
        let Some(bytes) = cache.get(key) else { return Ok(()) };
        let entry = self.decode_l2(&bytes[place.clone()], offset)?;
        if let Some(new) = change(cluster, entry)?
            && let Some(bytes) = cache.get_mut(key, place.clone())
        {
            new.write(&mut bytes[place], &self.geometry);
        }
        Ok(())
    }

    /// What L2 table a guest cluster has.
    pub fn table_state(&self, cluster: GuestCluster) -> Result<TableState> {
        self.state_of_table(&self.state.read(), cluster)
    }

    fn state_of_table(&self, state: &State, cluster: GuestCluster) -> Result<TableState> {
        Ok(match self.table_of(state, cluster.0)? {
            None => TableState::Absent,
            Some((table, true)) => TableState::Own(table),
            Some((table, false)) => TableState::Shared(table),
        })
    }

    /// The L2 table in `table` as it is now, changes that wait for a flush included.
    ///
    /// # Errors
    /// Host errors.
    pub fn read_table(&self, table: HostCluster) -> Result<Vec<u8>> {
        let start = self.geometry.host_offset(table).0;
        let size = self.geometry.cluster_size();
        // What waits for a flush now may have been written and evicted when the file has been read.
        let before = self.state.read().cache.slices_of(start, size);
        let mut bytes = vec![0; size as usize];
        self.storage
            .read_at(&mut bytes, start)
            .map_err(|e| Error::io(format!("reading an L2 table at {start:#x}"), e))?;
        for (at, slice) in before {
            bytes[at..at + slice.len()].copy_from_slice(&slice);
        }
        self.state.read().cache.read_cluster(start, &mut bytes);
        Ok(bytes)
    }

    /// Makes `table`, whose refcount is 1, the own L2 table of a guest cluster in place of what
    /// `replaces` says; `false` when something else stands there meanwhile. In place of none it
    /// must read as zeros, in place of a shared one (or of one that is wrongly marked as our own) it is a
    /// copy, or that one itself.
    ///
    /// # Errors
    /// `Corrupt`; `Invalid` past the L1 table.
    pub fn install_table(
        &self,
        cluster: GuestCluster,
        table: HostCluster,
        replaces: TableState,
        order: LinkOrder,
    ) -> Result<bool> {
        self.install_table_if(cluster, table, replaces, order, || Ok(true))
    }

    /// The same if `is_wanted`, asked under the tables' lock.
    ///
    /// # Errors
    /// Those of [`Tables::install_table`] and of `is_wanted`.
    pub fn install_table_if(
        &self,
        cluster: GuestCluster,
        table: HostCluster,
        replaces: TableState,
        order: LinkOrder,
        is_wanted: impl FnOnce() -> Result<bool>,
    ) -> Result<bool> {
        let mut state = self.state.write();
        if self.state_of_table(&state, cluster)? != replaces || !is_wanted()? {
            return Ok(false);
        }
        if replaces != TableState::Shared(table) {
            // The cluster may have been another table once.
            let start = self.geometry.host_offset(table).0;
            state.cache.forget_cluster(start, self.geometry.cluster_size());
        }
        let index = self.geometry.l1_index(cluster) as usize;
        let entry = L1Entry { table: Some(table), copied: true };
        let Some(slot) = state.l1.get_mut(index) else {
            return Err(Error::invalid(format!("guest cluster {cluster} is past the L1 table")));
        };
        *slot = entry.encode(&self.geometry);
        state.l1_dirty.insert(index / L1_ENTRIES_PER_SECTOR);
        state.barrier |= order == LinkOrder::AfterSync;
        self.metadata.insert(table);
        Ok(true)
    }

    /// Whether anything waits for a flush.
    pub fn is_dirty(&self) -> bool {
        let state = self.state.read();
        state.cache.dirty_slices() > 0 || !state.l1_dirty.is_empty() || !state.along.is_empty()
    }

    /// Whether so much waits for a flush that the cache is short of room.
    pub fn is_crowded(&self) -> bool {
        self.state.read().cache.is_crowded()
    }

    /// Takes a copy of all that changed. `seal` runs under the same lock: what it sees of the
    /// clusters' states belongs to exactly these changes. [`Tables::collected`] must follow.
    pub fn collect(&self, seal: impl FnOnce()) -> DirtyTables {
        let mut state = self.state.write();
        let mut writes = state.cache.take_dirty();
        let l2_writes = writes.len();
        let l1_sectors = std::mem::take(&mut state.l1_dirty);
        writes.extend(l1_sectors.iter().map(|&sector| {
            let first = sector * L1_ENTRIES_PER_SECTOR;
            let last = (first + L1_ENTRIES_PER_SECTOR).min(state.l1.len());
            let bytes = state.l1[first..last].iter().flat_map(|e| e.to_be_bytes()).collect();
            (state.l1_offset.0 + sector as u64 * 512, bytes)
        }));
        let along = state.along.len();
        writes.extend(std::mem::take(&mut state.along));
        let barrier = std::mem::take(&mut state.barrier);
        seal();
        DirtyTables { writes, barrier, l1_sectors, l2_writes, along }
    }

    /// How the flush of `dirty` went. Where it failed, all of it is due again.
    pub fn collected(&self, dirty: DirtyTables, succeeded: bool) {
        let mut state = self.state.write();
        state.cache.written(&dirty.writes[..dirty.l2_writes], succeeded);
        if !succeeded {
            state.l1_dirty.extend(dirty.l1_sectors);
            let first_along = dirty.writes.len() - dirty.along;
            for (offset, bytes) in dirty.writes.into_iter().skip(first_along) {
                // What was to be written there since is newer.
                state.along.entry(offset).or_insert(bytes);
            }
            state.barrier |= dirty.barrier;
        }
    }

    /// The number of L1 entries.
    pub fn l1_entries(&self) -> usize {
        self.state.read().l1.len()
    }

    /// The L1 table as it is now, changes that wait for a flush included.
    pub fn l1(&self) -> Vec<u64> {
        self.state.read().l1.clone()
    }

    /// Which clusters hold metadata.
    pub fn metadata(&self) -> &Arc<MetadataMap> {
        &self.metadata
    }

    /// Clears COPIED in the first `entries` L1 entries: their L2 tables are about to be shared.
    pub fn share_tables(&self, entries: usize) {
        let mut state = self.state.write();
        for index in 0..state.l1.len().min(entries) {
            if state.l1[index] & COPIED != 0 {
                state.l1[index] &= !COPIED;
                state.l1_dirty.insert(index / L1_ENTRIES_PER_SECTOR);
            }
        }
    }

    /// Clears COPIED in every entry of the L2 table in `table`, whoever refers to that: what it
    /// maps is about to be shared. Nobody may change its entries meanwhile.
    ///
    /// # Errors
    /// Host errors.
    pub fn share_entries(&self, table: HostCluster) -> Result<()> {
        let start = self.geometry.host_offset(table).0;
        let slice_size = self.state.read().cache.slice_size();
        for key in (start..start + self.geometry.cluster_size()).step_by(slice_size as usize) {
            // Nobody else brings the slice into the cache meanwhile.
            let mut spare = self.loaders[(key / slice_size) as usize % LOADERS].lock();
            if self.share_slice(&mut self.state.write().cache, key) {
                continue;
            }
            let bytes = self.read_slice(key, slice_size, spare.take())?;
            if !bytes.chunks_exact(8).any(|word| be64(word, 0) & COPIED != 0) {
                // Nothing to change, perhaps: not worth a place in the cache.
                *spare = Some(bytes);
                continue;
            }
            let mut state = self.state.write();
            *spare = state.cache.insert(key, bytes);
            self.share_slice(&mut state.cache, key);
        }
        Ok(())
    }

    /// Whether the slice is in the cache, with no flags now.
    fn share_slice(&self, cache: &mut SliceCache, key: u64) -> bool {
        let size = self.geometry.l2_entry_size() as usize;
        let is_copied = |raw: u64| raw & COPIED != 0 && !L2Entry::is_compressed(raw);
        let Some(bytes) = cache.get(key) else { return false };
        let entries = bytes.chunks_exact(size).enumerate();
        let copied: Vec<usize> =
            entries.filter(|(_, entry)| is_copied(be64(entry, 0))).map(|(i, _)| i * size).collect();
        for at in copied {
            if let Some(bytes) = cache.get_mut(key, at..at + 8) {
                let raw = be64(bytes, at);
                bytes[at..at + 8].copy_from_slice(&(raw & !COPIED).to_be_bytes());
            }
        }
        true
    }

    /// Puts `l1` in place of the L1 table, at `offset`, under the tables' lock, as
    /// [`Tables::relocate_l1`] does; nothing waits for a flush. The old place is returned.
    pub fn replace_l1(
        &self,
        offset: HostOffset,
        l1: Vec<u64>,
        switch: impl FnOnce() -> Result<()>,
    ) -> Result<Range<u64>> {
        let mut state = self.state.write();
        switch()?;
        Ok(self.enter_l1(&mut state, offset, l1))
    }

    /// Moves the L1 table to `offset` with room for `entries`, under the tables' lock: `switch`
    /// makes durable what the bytes it gets refer to, writes them to the new place, makes the
    /// header point there, and makes that durable. The old place is returned; it is free then.
    ///
    /// The caller holds the flush lock.
    pub fn relocate_l1(
        &self,
        offset: HostOffset,
        entries: u32,
        switch: impl FnOnce(&[u8]) -> Result<()>,
    ) -> Result<Range<u64>> {
        let mut state = self.state.write();
        let mut l1 = state.l1.clone();
        l1.resize((entries as usize).max(l1.len()), 0);
        let bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        switch(&bytes)?;
        // Entries that had changed went along with the table.
        Ok(self.enter_l1(&mut state, offset, l1))
    }

    fn enter_l1(&self, state: &mut State, offset: HostOffset, l1: Vec<u64>) -> Range<u64> {
        let clusters = |offset: HostOffset, entries: usize| {
            let first = self.geometry.host_cluster(offset).0;
            first..first + self.geometry.clusters_for(entries as u64 * 8).0
        };
        let old = clusters(state.l1_offset, state.l1.len());
        clusters(offset, l1.len()).for_each(|c| {
            self.metadata.insert(HostCluster(c));
        });
        old.clone().for_each(|c| self.metadata.remove(HostCluster(c)));
        state.l1 = l1;
        state.l1_offset = offset;
        state.l1_dirty.clear();
        old
    }

    /// Brings the slice of a guest cluster into the cache.
    fn load(&self, cluster: u64) -> Result<()> {
        let Some((table, _)) = self.table_of(&self.state.read(), cluster)? else { return Ok(()) };
        // Another table may have taken the entry meanwhile, and other content this cluster.
        self.load_slice(self.entry_offset(table, cluster), |state| {
            Ok(self.table_of(state, cluster)?.is_some_and(|(now, _)| now == table))
        })
    }

    /// Brings the slice at host offset `offset` into the cache, if it `is_valid` once it is read.
    fn load_slice(&self, offset: u64, is_valid: impl FnOnce(&State) -> Result<bool>) -> Result<()> {
        let (key, size) = {
            let state = self.state.read();
            (state.cache.key(offset), state.cache.slice_size())
        };
        let mut spare = self.loaders[(key / size) as usize % LOADERS].lock();
        let forgotten = {
            let state = self.state.read();
            if state.cache.get(key).is_some() {
                return Ok(());
            }
            state.cache.forgotten()
        };
        self.misses.add(1);
        let bytes = self.read_slice(key, size, spare.take());
        let mut state = self.state.write();
        // What is no table any more may not even be in the file; and it may have become one again.
        if is_valid(&state)? && state.cache.forgotten() == forgotten {
            *spare = state.cache.insert(key, bytes?);
        }
        drop(state);
        self.memory.make_room();
        Ok(())
    }

    /// The slice at `key`, of `size` bytes, read into `spare` where there is one.
    fn read_slice(&self, key: u64, size: u64, spare: Option<Box<[u8]>>) -> Result<Box<[u8]>> {
        let mut bytes = spare.unwrap_or_else(|| vec![0; size as usize].into_boxed_slice());
        self.storage
            .read_at(&mut bytes, key)
            .map_err(|e| Error::io(format!("reading an L2 table at {key:#x}"), e))?;
        Ok(bytes)
    }

    /// The L2 table of a guest cluster, and whether it is marked as referenced only here.
    fn table_of(&self, state: &State, cluster: u64) -> Result<Option<(HostCluster, bool)>> {
        let index = self.geometry.l1_index(GuestCluster(cluster));
        match state.l1.get(index as usize) {
            Some(0) | None => Ok(None),
            Some(&raw) => {
                let entry = self.decode_l1(index, raw)?;
                Ok(entry.table.map(|table| (table, entry.copied)))
            }
        }
    }

    fn decode_l1(&self, index: u64, raw: u64) -> Result<L1Entry> {
        L1Entry::decode(raw, &self.geometry)
            .map_err(|bad| Error::corrupt(format!("L1 entry {index} {bad}")))
    }

    fn decode_l2(&self, bytes: &[u8], entry_offset: u64) -> Result<L2Entry> {
        let entry = L2Entry::read(bytes, &self.geometry)
            .map_err(|bad| Error::corrupt(format!("{} {bad}", self.name_entry(entry_offset))))?;
        let bad = match (entry, entry.host_cluster()) {
            (L2Entry::Compressed { offset, length }, _) => {
                let clusters = self.geometry.host_clusters(offset, length);
                self.metadata_in(HostCluster(clusters.start), clusters.end - clusters.start)
            }
            (_, Some((cluster, _))) => self.metadata_in(cluster, 1),
            (_, None) => None,
        };
        match bad {
            Some(cluster) => Err(self.points_to_metadata(cluster, entry_offset)),
            None => Ok(entry),
        }
    }

    /// The first of `count` clusters that are said to hold data but hold metadata.
    fn metadata_in(&self, first: HostCluster, count: u64) -> Option<HostCluster> {
        // A data file holds none.
        if self.geometry.data_file() { None } else { self.metadata.first_in(first, count) }
    }

    /// In an external data file every cluster is at the guest's offset, as it is.
    fn check_external(&self, entry: L2Entry, guest: u64, entry_offset: u64) -> Result<()> {
        let bad = match (entry, entry.host_cluster()) {
            (L2Entry::Compressed { .. }, _) => {
                "is compressed in an image with an external data file".into()
            }
            (_, Some((cluster, _))) if self.is_misplaced(entry, guest) => format!(
                "points to {} of the data file instead of the guest's own offset",
                self.geometry.host_offset(cluster)
            ),
            _ => return Ok(()),
        };
        Err(Error::corrupt(format!("{} {bad}", self.name_entry(entry_offset))))
    }

    /// Whether an entry keeps another place of an external data file than the guest's own.
    fn is_misplaced(&self, entry: L2Entry, guest: u64) -> bool {
        let place = entry.host_cluster();
        self.geometry.data_file() && place.is_some_and(|(cluster, _)| cluster.0 != guest)
    }

    fn points_to_metadata(&self, cluster: HostCluster, entry_offset: u64) -> Error {
        Error::corrupt(format!(
            "{} points to {}, which is metadata",
            self.name_entry(entry_offset),
            self.geometry.host_offset(cluster)
        ))
    }

    fn name_entry(&self, entry_offset: u64) -> String {
        let within = self.geometry.within(entry_offset);
        let index = within / self.geometry.l2_entry_size();
        format!("L2 entry {index} of table {:#x}", entry_offset - within)
    }

    fn entry_offset(&self, table: HostCluster, cluster: u64) -> u64 {
        let index = self.geometry.l2_index(GuestCluster(cluster));
        self.geometry.host_offset(table).0 + index * self.geometry.l2_entry_size()
    }

    /// How many of `clusters` from the first, which has none, have no L2 table.
    fn absent_tables(&self, state: &State, clusters: &Range<u64>) -> u64 {
        let entries = self.geometry.l2_entries();
        let first = (clusters.start / entries + 1) as usize;
        let last = clusters.end.div_ceil(entries).min(state.l1.len() as u64) as usize;
        // Behind the end of the L1 table there is none.
        let others = state.l1.get(first..last).unwrap_or_default();
        let present = others.iter().position(|&raw| raw != 0);
        let end = present.map_or(clusters.end, |skipped| (first + skipped) as u64 * entries);
        end.min(clusters.end) - clusters.start
    }

    /// Those of `clusters` whose entries are in the slice of the first.
    fn clusters_in_slice(&self, cache: &SliceCache, clusters: &Range<u64>) -> Range<u64> {
        let per_slice = cache.slice_size() / self.geometry.l2_entry_size();
        let end = (clusters.start / per_slice + 1) * per_slice;
        clusters.start..clusters.end.min(end)
    }

    /// The run at the start of `clusters`, all of whose entries are in the slice `bytes` at `key`.
    /// What a table that is not `own` maps may not be written in place.
    fn run_of(
        &self,
        bytes: &[u8],
        key: u64,
        clusters: Range<u64>,
        own: bool,
    ) -> Result<(Mapping, u64)> {
        let size = self.geometry.l2_entry_size();
        let start = (clusters.start * size % bytes.len() as u64) as usize;
        let mut entries = bytes[start..]
            .chunks_exact(size as usize)
            .take((clusters.end - clusters.start) as usize)
            .enumerate()
            .map(|(i, entry)| {
                L2Entry::read(entry, &self.geometry)
                    .map_err(|_| key + start as u64 + i as u64 * size)
            });
        let first_offset = key + start as u64;
        let first_bytes = &bytes[start..start + size as usize];
        let first = match entries.next() {
            Some(Ok(entry)) => entry,
            _ => return Err(self.bad_entry(first_bytes, first_offset)),
        };
        if self.geometry.data_file() {
            self.check_external(first, clusters.start, first_offset)?;
        }
        let rest = entries.enumerate();
        let (run, count) = match first {
            L2Entry::Unallocated => {
                let same = rest.take_while(|(_, e)| *e == Ok(L2Entry::Unallocated)).count();
                (Run::Unallocated, 1 + same as u64)
            }
            L2Entry::Zero { .. } => {
                let is_sound = |i: usize, entry| {
                    matches!(entry, L2Entry::Zero { .. })
                        && !self.is_misplaced(entry, clusters.start + 1 + i as u64)
                };
                let same = rest.take_while(|(i, e)| e.is_ok_and(|e| is_sound(*i, e))).count();
                (Run::Zero, 1 + same as u64)
            }
            L2Entry::Data { cluster, copied } => {
                let next = |i: usize| HostCluster(cluster.0 + 1 + i as u64);
                let count = 1 + rest
                    .take_while(|(i, e)| *e == Ok(L2Entry::Data { cluster: next(*i), copied }))
                    .count() as u64;
                let run = Run::Data { first: cluster, copied: copied && own };
                match self.metadata_in(cluster, count) {
                    Some(bad) if bad == cluster => {
                        return Err(self.points_to_metadata(bad, first_offset));
                    }
                    Some(bad) => (run, bad.0 - cluster.0),
                    None => (run, count),
                }
            }
            L2Entry::Compressed { offset, length } => {
                self.decode_l2(first_bytes, first_offset)?;
                (Run::Compressed { offset, length }, 1)
            }
            L2Entry::Mixed(mixed) => {
                self.decode_l2(first_bytes, first_offset)?;
                let copied = mixed.copied && own;
                return Ok((Mapping::Mixed(MixedCluster { copied, ..mixed }), 1));
            }
        };
        Ok((Mapping::Uniform(run), count))
    }

    fn bad_entry(&self, bytes: &[u8], entry_offset: u64) -> Error {
        self.decode_l2(bytes, entry_offset).err().unwrap_or_else(|| {
            Error::corrupt(format!("{} is not understood", self.name_entry(entry_offset)))
        })
    }
}

fn read_l1(storage: &dyn Storage, offset: HostOffset, entries: u32) -> Result<Vec<u64>> {
    let mut l1 = vec![0; entries as usize];
    let place = offset.0..offset.0.saturating_add(u64::from(entries) * 8);
    let doing = || format!("reading the L1 table at {offset}");
    for_each_word(storage, place, doing, |at, word| {
        // The last piece is read in whole sectors.
        if let Some(entry) = l1.get_mut(((at - offset.0) / 8) as usize) {
            *entry = word;
        }
        Ok(())
    })?;
    Ok(l1)
}

#[cfg(test)]
mod tests;
