//! Refcounts: which host clusters of the image file are used. Allocate, free, grow, rebuild.
//!
//! The counts in memory are never lower than what any table that may be on disk refers to: they go
//! up before a cluster is handed out, and down only after the write that dropped the last reference
//! is durable (the caller sees to that). So refcount blocks may be written at any time, in any
//! order; only *new* blocks and a *new* refcount table have an order, and a flush keeps it:
//!
//! 1. contents of refcount blocks, new ones included, and a whole new refcount table;
//! 2. sync, when 3 has anything to do;
//! 3. entries of the refcount table, or the one header write that switches to the new table;
//! 4. sync, before any L1 or L2 entry that depends on it.
//!
//! **Lazy refcounts** (compatible bit 0) allow a writer to leave refcounts behind while the dirty bit
//! is set, and to rebuild them after a crash. Nothing here sets that bit: a flush writes the
//! refcounts that changed in the same sync as everything else, so there is nothing to gain, and
//! whoever opens the image after a crash need not read all of its tables first. An image that
//! another program left dirty is rebuilt ([`rebuild`]) before anything of it is used.
//!
//! **Self-describing blocks.** A new block lies in the range that it describes, so making one never
//! needs another one. A new table lies at the end of the file, behind the blocks that its own
//! clusters need, which describe themselves and the table; they are referenced only from the new
//! table, so an error anywhere before the header write leaves the old structure whole. Nothing
//! recurses. (After Kevin Wolf's rewrite of QEMU's `alloc_refcount_block`.)

mod cluster_set;
mod grow;
mod holes;
pub mod rebuild;
mod shrink;

pub use cluster_set::ClusterSet;
use shrink::is_kept_back;

pub use shrink::{ShrinkWalk, Usage};

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::check::pieces::for_each_word;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Geometry, Header, HostCluster, HostOffset, REFCOUNT_TABLE_OFFSET_MASK, refcount,
};
use crate::memory::{Cache, Memory, Share};
use crate::rules::Rule;
use crate::storage::Storage;
use crate::tables::{MetadataMap, SliceCache, Write};

/// Memory for clean parts of refcount blocks, in bytes.
const CACHE_BYTES: u64 = 4 << 20;
/// A file that grows gets at most so many bytes of hole behind its last cluster.
const MAX_ROOM: u64 = 4 << 20;
/// Host offsets in tables have 56 bits.
const MAX_HOST_OFFSET: u64 = 1 << 56;

/// The refcounts of one image.
pub struct Refcounts {
    geometry: Geometry,
    storage: Arc<dyn Storage>,
    metadata: Arc<MetadataMap>,
    /// Lock order: after the tables, before the cluster map.
    state: Arc<Mutex<State>>,
    /// Of which the cache holds a share.
    memory: Arc<Memory>,
}

struct State {
    /// Offsets of refcount blocks, 0 where there is none.
    table: Vec<u64>,
    /// Where the table is, or will be once the flush has moved it there.
    table_offset: HostOffset,
    /// Entries whose blocks were made since the last flush.
    table_dirty: BTreeSet<usize>,
    /// The table has moved in memory: the places it leaves, where one of them is it on disk.
    moved_from: Vec<Range<u64>>,
    /// Places that blocks have left since the last flush, which are still counted.
    left: Vec<Range<u64>>,
    /// Places of blocks that were let go of and took their own counts along: nobody gets them
    /// before a flush is through.
    unlinked: BTreeSet<u64>,
    cache: SliceCache,
    /// Nothing at or after this cluster is known to be used; the file may end before it.
    end: u64,
    /// The file is at least so many clusters long.
    file_end: u64,
    /// No cluster before this one is free.
    first_free: u64,
    /// What has happened since it was asked for.
    since: Option<Since>,
}

struct Since {
    /// Clusters that were counted.
    counted: ClusterSet,
    /// Nothing was known to be used at or after this cluster.
    end: u64,
    /// No cluster from there up to this one is free.
    first_free: u64,
}

impl State {
    /// No cluster that may be handed out lies before this one; and the first one that may.
    fn hint(&mut self) -> (&mut u64, u64) {
        match &mut self.since {
            Some(since) => (&mut since.first_free, since.end),
            None => (&mut self.first_free, 0),
        }
    }

    /// A cluster is free.
    fn freed(&mut self, cluster: u64) {
        self.first_free = self.first_free.min(cluster);
        if let Some(since) = &mut self.since {
            since.first_free = since.first_free.min(cluster.max(since.end));
        }
    }
}

/// Consecutive clusters whose refcount has just become 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocated {
    /// The clusters.
    pub clusters: Range<u64>,
    /// They lie past the old end of the file, so they read as zeros; others hold old content.
    pub is_new: bool,
}

/// What a flush writes for the refcounts, in the order of the module's documentation.
#[derive(Debug, Default)]
pub struct DirtyRefcounts {
    /// Step 1.
    pub blocks: Vec<Write>,
    /// Step 3: entries of the table, or the header's new pointer. A sync comes before each turn: a
    /// block may lie in a cluster that another one counts, which is linked first.
    pub links: Vec<Vec<Write>>,
    block_writes: usize,
    entries: BTreeSet<usize>,
    moved_from: Vec<Range<u64>>,
    left: Vec<Range<u64>>,
    unlinked: BTreeSet<u64>,
}

impl DirtyRefcounts {
    /// Whether places become free once the links are durable.
    pub fn frees_places(&self) -> bool {
        !self.unlinked.is_empty()
    }
}

impl Cache for Mutex<State> {
    fn shrink(&self, bytes: u64) {
        if let Some(mut state) = self.try_lock() {
            state.cache.shrink(bytes);
        }
    }
}

impl Refcounts {
    /// The refcounts of the image that `header` belongs to. Parts of their blocks are kept in `memory`.
    ///
    /// # Errors
    /// Host errors.
    pub fn open(
        storage: Arc<dyn Storage>,
        header: &Header,
        metadata: Arc<MetadataMap>,
        memory: &Arc<Memory>,
    ) -> Result<Self> {
        let geometry = header.geometry;
        let at = header.refcount_table_offset;
        let clusters = u64::from(header.refcount_table_clusters);
        let size = clusters << geometry.cluster_bits();
        let mut table = vec![0; (size / 8) as usize];
        let doing = || format!("reading the refcount table at {at}");
        for_each_word(&*storage, at.0..at.0.saturating_add(size), doing, |place, word| {
            table[((place - at.0) / 8) as usize] = word;
            Ok(())
        })?;
        let len = storage.len().map_err(|e| Error::io("reading the image's length", e))?;
        let share = Share::of(memory);
        let state = State {
            table,
            table_offset: at,
            table_dirty: BTreeSet::new(),
            moved_from: Vec::new(),
            left: Vec::new(),
            unlinked: BTreeSet::new(),
            cache: SliceCache::new(geometry.cluster_size(), CACHE_BYTES, Arc::clone(&share)),
            end: geometry.clusters_for(len).0.max(1),
            file_end: len >> geometry.cluster_bits(),
            first_free: 0,
            since: None,
        };
        let state = Arc::new(Mutex::new(state));
        memory.add(&share, &state);
        Ok(Refcounts { geometry, storage, metadata, state, memory: Arc::clone(memory) })
    }

    /// Enters the refcount table and its blocks into the map of metadata.
    ///
    /// # Errors
    /// `Corrupt`: a malformed entry, or a block that is also something else or lies past the end
    /// of the file. `TooBig` where the map of metadata is full.
    pub fn register_metadata(&self) -> Result<()> {
        let state = self.state.lock();
        let first = self.geometry.host_cluster(state.table_offset).0;
        let place = first..first + self.geometry.clusters_for(state.table.len() as u64 * 8).0;
        if !self.metadata.is_in_file(&place) {
            return Err(Error::corrupt("the refcount table ends past the end of the file"));
        }
        for cluster in place {
            if !self.metadata.insert(HostCluster(cluster)) {
                return Err(Error::corrupt("the refcount table overlaps other metadata"));
            }
        }
        for (index, &entry) in state.table.iter().enumerate().filter(|(_, e)| **e != 0) {
            self.check_entry(index, entry)?;
            let block = self.geometry.host_cluster(HostOffset(entry));
            if !self.metadata.is_in_file(&(block.0..block.0 + 1)) {
                return Err(Error::corrupt(format!(
                    "refcount table entry {index} points to {entry:#x}, which is past the end of \
                     the file"
                )));
            }
            self.metadata.check_room()?;
            if !self.metadata.insert(block) {
                return Err(Error::corrupt(format!(
                    "refcount table entry {index} points to {entry:#x}, which is other metadata"
                )));
            }
        }
        Ok(())
    }

    /// Whether a block can lie where an entry of the refcount table says.
    fn check_entry(&self, index: usize, entry: u64) -> Result<()> {
        if entry & !REFCOUNT_TABLE_OFFSET_MASK == 0 && self.geometry.is_aligned(entry) {
            return Ok(());
        }
        Err(Error::corrupt(format!("refcount table entry {index} ({entry:#x}) is malformed")))
    }

    /// The refcount of a cluster.
    pub fn get(&self, cluster: HostCluster) -> Result<u64> {
        self.read(&mut self.state.lock(), cluster.0)
    }

    /// Takes the first free clusters of the file: consecutive ones, at least 1 and at most
    /// `wanted`, the file growing where nothing before its end is free. Their refcount is 1 from
    /// now on, in memory. While [`Refcounts::distrust`] holds they lie past the end that the file had
    /// then.
    ///
    /// # Errors
    /// Host errors; `Corrupt` where metadata is found free; `TooBig` at the format's limits.
    pub fn allocate(&self, wanted: u64) -> Result<Allocated> {
        let mut state = self.state.lock();
        let allocated = match self.allocate_in(&mut state, wanted, u64::MAX) {
            // There is no other place.
            Err(e) if e.kind() == ErrorKind::TooBig && state.since.is_some() => {
                let since = state.since.take();
                let allocated = self.allocate_in(&mut state, wanted, u64::MAX);
                state.since = since;
                if let (Ok(Some(allocated)), Some(since)) = (&allocated, &mut state.since) {
                    allocated.clusters.clone().for_each(|cluster| since.counted.add(cluster));
                }
                allocated
            }
            other => other,
        };
        allocated?.ok_or_else(grow::too_big)
    }

    fn allocate_until(&self, wanted: u64, end: u64) -> Result<Option<Allocated>> {
        self.allocate_in(&mut self.state.lock(), wanted, end)
    }

    fn allocate_in(&self, state: &mut State, wanted: u64, end: u64) -> Result<Option<Allocated>> {
        let first = loop {
            let from = *state.hint().0;
            let first = self.first_free(state, from)?;
            let (hint, trusted) = state.hint();
            *hint = first;
            if first >= end {
                return Ok(None);
            }
            let per_block = self.geometry.refcounts_per_block();
            if !self.has_block(state, first) && first / per_block * per_block < trusted {
                // The block would lie where something may be that is not counted.
                *state.hint().0 = trusted.next_multiple_of(per_block);
                continue;
            }
            if !self.make_block_for(state, first)? {
                break first;
            }
            // The new block took a place of its own range: look again.
        };
        let is_new = first >= state.end;
        let limit = if is_new { first + wanted } else { (first + wanted).min(state.end) };
        let limit = limit.min(end);
        let mut last = first;
        while last < limit && self.has_block(state, last) {
            match self.take_free(state, last) {
                Ok(true) => last += 1,
                // What comes after an error is asked for again; what came before is taken.
                Err(e) if last == first => return Err(e),
                Ok(false) | Err(_) => break,
            }
        }
        *state.hint().0 = last;
        self.reach(state, last);
        Ok(Some(Allocated { clusters: first..last, is_new }))
    }

    /// Clusters before `end` may be in use from now on.
    fn reach(&self, state: &mut State, end: u64) {
        state.end = state.end.max(end);
        self.metadata.grow_to(end);
    }

    /// Counts a cluster that has a block, if it is free; whether it was.
    fn take_free(&self, state: &mut State, cluster: u64) -> Result<bool> {
        if !self.is_free(state, cluster)? {
            return Ok(false);
        }
        self.check_unused(cluster)?;
        self.write(state, cluster, 1).map(|()| true)
    }

    /// Takes `wanted` consecutive clusters at the end of the file.
    ///
    /// # Errors
    /// As [`Refcounts::allocate`].
    pub fn allocate_at_end(&self, wanted: u64) -> Result<Range<u64>> {
        let mut state = self.state.lock();
        self.append(&mut state, wanted)
    }

    /// Drops one reference from each of `clusters`. What comes to 0 is free at once: no table on
    /// disk may refer to it any more.
    ///
    /// # Errors
    /// Host errors; `Corrupt` where a refcount is 0 already, or would become 0 of metadata that nobody
    /// has given up. The clusters before it are freed.
    pub fn release(&self, clusters: Range<u64>) -> Result<()> {
        let mut state = self.state.lock();
        for cluster in clusters {
            let count = self.read(&mut state, cluster)?;
            let Some(less) = count.checked_sub(1) else {
                return Err(Error::corrupt(format!(
                    "cluster at {} is freed but its refcount is 0",
                    self.geometry.host_offset(HostCluster(cluster))
                )));
            };
            if less == 0 {
                self.refuse_kept(cluster..cluster + 1)?;
            }
            self.write(&mut state, cluster, less)?;
            if less == 0 {
                // It may have been a table.
                self.metadata.remove(HostCluster(cluster));
                state.freed(cluster);
            }
        }
        Ok(())
    }

    /// Refuses to free metadata whose owner has not given it up, whatever is counted for it.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn refuse_kept(&self, mut clusters: Range<u64>) -> Result<()> {
        match clusters.find(|cluster| self.metadata.is_kept(HostCluster(*cluster))) {
            None => Ok(()),
            Some(kept) => Err(Error::corrupt(format!(
                "the last reference to the cluster at {} is dropped, which is metadata in use",
                self.geometry.host_offset(HostCluster(kept))
            ))),
        }
    }

    /// Adds one reference to each of `clusters`.
    ///
    /// # Errors
    /// As [`Refcounts::raise`]. Nothing has changed then.
    pub fn raise_each(&self, clusters: Range<u64>) -> Result<()> {
        let mut state = self.state.lock();
        for cluster in clusters.clone() {
            if let Err(e) = self.raise_in(&mut state, cluster, 1) {
                for undone in clusters.start..cluster {
                    let count = self.read(&mut state, undone)?;
                    self.write(&mut state, undone, count.saturating_sub(1))?;
                }
                return Err(e);
            }
        }
        Ok(())
    }

    fn raise_in(&self, state: &mut State, cluster: u64, by: u64) -> Result<()> {
        match self.read(state, cluster)? {
            0 => Err(Error::corrupt(format!(
                "the cluster at {} is referenced but its refcount is 0",
                self.geometry.host_offset(HostCluster(cluster))
            ))),
            count => self.write(state, cluster, count.saturating_add(by)),
        }
    }

    /// Drops one of several references to a cluster, as [`Refcounts::release`] does; `false` where
    /// there is only one, which stays.
    ///
    /// # Errors
    /// Host errors; `Corrupt` where the refcount is 0 already.
    pub fn release_shared(&self, cluster: HostCluster) -> Result<bool> {
        let mut state = self.state.lock();
        match self.read(&mut state, cluster.0)? {
            0 => Err(Error::corrupt(format!(
                "a reference to the cluster at {} is dropped but its refcount is 0",
                self.geometry.host_offset(cluster)
            ))),
            1 => Ok(false),
            count => self.write(&mut state, cluster.0, count - 1).map(|()| true),
        }
    }

    /// One more than the last cluster of the file that is in use and not `spare`.
    ///
    /// # Errors
    /// Host errors; `Corrupt` where metadata after it is found free.
    pub fn used_end(&self, spare: impl Fn(u64) -> bool) -> Result<u64> {
        self.find_end(&mut self.state.lock(), spare)
    }

    /// Cuts the free clusters at the end of the file off; returns the bytes that it is shorter.
    ///
    /// # Errors
    /// Host errors; `Corrupt` where metadata is found free.
    pub fn cut_tail(&self) -> Result<u64> {
        let mut state = self.state.lock();
        let end = self.find_end(&mut state, |_| false)?;
        state.file_end = state.file_end.min(end);
        let cut = self.set_file_length(end, |old, new| new < old)?;
        state.end = end;
        Ok(cut)
    }

    /// Makes the file as long as its last allocated cluster reaches, so that no reference can ever
    /// be durable that points past its end. It becomes longer than that, by a hole, so that a file
    /// that grows cluster by cluster is not told its length each time; the hole is cut off with the
    /// file's free end.
    pub fn extend_file(&self) -> Result<()> {
        let mut state = self.state.lock();
        let end = state.end;
        if end <= state.file_end {
            return Ok(());
        }
        let room = (MAX_ROOM >> self.geometry.cluster_bits()).min(end / 8);
        // A host file system has a largest file, too.
        let reached = match self.set_file_length(end + room, |old, new| new > old) {
            Ok(_) => end + room,
            Err(_) if room > 0 => {
                self.set_file_length(end, |old, new| new > old)?;
                end
            }
            Err(e) => return Err(e),
        };
        state.file_end = reached;
        Ok(())
    }

    /// See [`Refcounts::used_end`].
    fn find_end(&self, state: &mut State, spare: impl Fn(u64) -> bool) -> Result<u64> {
        let file_end = self.end_in(state)?;
        let end = self.last_used_before(state, file_end, spare)?.map_or(1, |last| last + 1);
        // What a refcount table on disk may still point to stays within the file.
        let unlinked = state.unlinked.last().filter(|_| Rule::UnlinkedPlacesInFile.is_kept());
        let end = unlinked.map_or(end, |last| end.max(last + 1));
        // Something may refer to what is not counted.
        let distrusted = state.since.as_ref().map_or(0, |since| since.end.min(file_end));
        let end = end.max(distrusted);
        if self.metadata.any_in(&(end..file_end)) {
            return Err(Error::corrupt(
                "a cluster at the end holds metadata but its refcount is 0",
            ));
        }
        Ok(end)
    }

    /// No cluster after this one is in use. Past the end of the file refcounts may be left over from a
    /// crash, or anything.
    fn end_in(&self, state: &State) -> Result<u64> {
        // A cluster may have been in use past the end that the file had when it was opened; being
        // written in place it made the file longer since.
        Ok(state.end.max(self.geometry.clusters_for(self.file_length()?).0))
    }

    /// The last cluster before `end` that is counted and not `spare`. What has no refcount block, or
    /// whose counts are a hole of the file, is passed over as a whole.
    fn last_used_before(
        &self,
        state: &mut State,
        mut end: u64,
        spare: impl Fn(u64) -> bool,
    ) -> Result<Option<u64>> {
        let (order, per_block) =
            (self.geometry.refcount_order(), self.geometry.refcounts_per_block());
        end = end.min(state.table.len() as u64 * per_block);
        while end > 0 {
            let last = end - 1;
            let block_first = last / per_block * per_block;
            let Some((key, _)) = self.locate(state, last) else {
                end = block_first;
                continue;
            };
            let block = state.table[(last / per_block) as usize];
            let slices = block..key + state.cache.slice_size();
            let Some(slice) = self.last_slice(state, slices)? else {
                end = block_first;
                continue;
            };
            self.load(state, slice)?;
            let counts = state.cache.get(slice).unwrap_or_default();
            let first = block_first + ((slice - block) << 3 >> order);
            let entries = (end - first).min((counts.len() as u64 * 8) >> order);
            let is_used =
                |i: &u64| refcount::get(counts, *i as usize, order) != 0 && !spare(first + i);
            if let Some(used) = (0..entries).rev().find(is_used) {
                return Ok(Some(first + used));
            }
            end = first;
        }
        Ok(None)
    }

    fn file_length(&self) -> Result<u64> {
        self.storage.len().map_err(|e| Error::io("reading the image's length", e))
    }

    /// Gives the file the length of `end` clusters where `applies` to its old length and that one;
    /// returns the bytes that it is shorter. All writes are to clusters before the end, so this
    /// cannot cut one off.
    fn set_file_length(&self, end: u64, applies: impl Fn(u64, u64) -> bool) -> Result<u64> {
        let old = self.file_length()?;
        let new = end << self.geometry.cluster_bits();
        if !applies(old, new) {
            return Ok(0);
        }
        self.storage
            .set_len(new)
            .map_err(|e| Error::io(format!("making the image {new} bytes long"), e))?;
        Ok(old.saturating_sub(new))
    }

    /// Whether at least `wanted` clusters before `end` are free.
    pub fn has_free_before(&self, end: u64, wanted: u64) -> Result<bool> {
        let mut state = self.state.lock();
        let (mut at, mut found) = (*state.hint().0, 0);
        while found < wanted {
            at = self.first_free(&mut state, at)?;
            if at >= end {
                return Ok(false);
            }
            found += 1;
            at += 1;
        }
        Ok(true)
    }

    /// Whether anything waits for a flush.
    pub fn is_dirty(&self) -> bool {
        let state = self.state.lock();
        state.cache.dirty_slices() > 0
            || !state.table_dirty.is_empty()
            || !state.moved_from.is_empty()
            || !state.left.is_empty()
    }

    /// Takes a copy of all that changed. [`Refcounts::collected`] must follow.
    pub fn collect(&self) -> DirtyRefcounts {
        let mut state = self.state.lock();
        let mut dirty = DirtyRefcounts { blocks: state.cache.take_dirty(), ..Default::default() };
        dirty.block_writes = dirty.blocks.len();
        dirty.entries = std::mem::take(&mut state.table_dirty);
        dirty.moved_from = std::mem::take(&mut state.moved_from);
        dirty.left = std::mem::take(&mut state.left);
        // They stay where they are kept from everybody; what joins meanwhile waits for its flush.
        dirty.unlinked = state.unlinked.clone();
        if !dirty.moved_from.is_empty() {
            let bytes: Vec<u8> = state.table.iter().flat_map(|e| e.to_be_bytes()).collect();
            let clusters = self.geometry.clusters_for(bytes.len() as u64).0 as u32;
            let patch = Header::patch_refcount_table(state.table_offset, clusters);
            dirty.blocks.push((state.table_offset.0, bytes));
            dirty.links.push(vec![(patch.offset.0, patch.bytes)]);
        } else {
            let entry = |i: usize| {
                (state.table_offset.0 + i as u64 * 8, state.table[i].to_be_bytes().to_vec())
            };
            let turns = self.turns(&state, &dirty.entries);
            dirty.links = turns.into_iter().map(|t| t.into_iter().map(entry).collect()).collect();
        }
        dirty
    }

    /// The order in which new entries of the table become durable: each after that of the block
    /// which counts the place that it leads to.
    fn turns(&self, state: &State, entries: &BTreeSet<usize>) -> Vec<Vec<usize>> {
        let mut turns = Vec::new();
        let mut left = entries.clone();
        while !left.is_empty() {
            let depends = |i: &usize| {
                let counting = self.counted_by(state, *i);
                Rule::LinksInTurn.is_kept() && counting.is_some_and(|c| left.contains(&c))
            };
            let mut turn: Vec<_> = left.iter().copied().filter(|i| !depends(i)).collect();
            if turn.is_empty() {
                // Blocks that count each other, of which there are none: `shrink_structure`.
                turn = left.iter().copied().collect();
            }
            turn.iter().for_each(|i| {
                left.remove(i);
            });
            turns.push(turn);
        }
        turns
    }

    /// The index of the block that counts the place of block `index`, if that is another one.
    fn counted_by(&self, state: &State, index: usize) -> Option<usize> {
        let place = *state.table.get(index)? >> self.geometry.cluster_bits();
        let counting = usize::try_from(place / self.geometry.refcounts_per_block()).ok()?;
        (place != 0 && counting != index).then_some(counting)
    }

    /// How the flush of `dirty` went. Where it failed, all of it is due again; where it succeeded,
    /// the places are returned that a refcount table or block has left. They are free once the
    /// switch is durable.
    pub fn collected(&self, dirty: DirtyRefcounts, succeeded: bool) -> Vec<Range<u64>> {
        let mut state = self.state.lock();
        state.cache.written(&dirty.blocks[..dirty.block_writes], succeeded);
        if !succeeded {
            state.table_dirty.extend(dirty.entries);
            state.moved_from.extend(dirty.moved_from);
            state.left.extend(dirty.left);
            return Vec::new();
        }
        self.forget_unlinked(&mut state, &dirty.unlinked);
        let left: Vec<_> = dirty.moved_from.into_iter().chain(dirty.left).collect();
        for cluster in left.iter().cloned().flatten() {
            self.metadata.remove(HostCluster(cluster));
        }
        left
    }

    /// From now on, or no longer, what is in the file is not relied on: a cluster that is not counted may
    /// be referred to, so none of those is handed out or cut off; and it is remembered which clusters are
    /// counted.
    pub fn distrust(&self, distrust: bool) {
        let mut state = self.state.lock();
        let end = state.end;
        state.since =
            distrust.then(|| Since { counted: ClusterSet::default(), end, first_free: end });
    }

    /// The indices of the refcount blocks that there are.
    pub fn blocks(&self) -> Vec<u64> {
        let state = self.state.lock();
        (0u64..).zip(&state.table).filter(|(_, offset)| **offset != 0).map(|(i, _)| i).collect()
    }

    /// The first cluster of `range` whose refcount is not 0. Others get to the refcounts meanwhile.
    ///
    /// # Errors
    /// Host errors.
    pub fn next_counted(&self, range: Range<u64>) -> Result<Option<u64>> {
        first_counted(range, |rest| self.look_for_counted(&mut self.state.lock(), rest))
    }

    /// Lowers the counts of the clusters of `range` that are too high, as far as they are what they were
    /// when [`Refcounts::distrust`] was called; a cluster that should not be counted at all
    /// stays at 1 and is passed to `take`. `references` says how many references there are; what is
    /// metadata and has none is left alone, since none leads to refcount blocks and the refcount
    /// table. Returns how many clusters that concerned: what `take` answers, and 1 for each other.
    ///
    /// # Errors
    /// Host errors.
    pub fn leaked(
        &self,
        range: Range<u64>,
        references: impl Fn(u64) -> u64,
        take: impl Fn(u64) -> u64,
    ) -> Result<u64> {
        let mut state = self.state.lock();
        let mut found = 0;
        let mut from = range.start;
        while let Some(cluster) = self.next_counted_in(&mut state, from..range.end)? {
            from = cluster + 1;
            let count = self.read(&mut state, cluster)?;
            let wanted = references(cluster);
            if count <= wanted {
                continue;
            }
            let since = state.since.as_ref();
            let is_new = since.is_none_or(|since| since.counted.contains(cluster));
            if is_new || wanted == 0 && self.metadata.contains(HostCluster(cluster)) {
                continue;
            }
            if count > wanted.max(1) {
                self.write(&mut state, cluster, wanted.max(1))?;
            }
            found += if wanted == 0 { take(cluster) } else { 1 };
        }
        Ok(found)
    }

    fn next_counted_in(&self, state: &mut State, range: Range<u64>) -> Result<Option<u64>> {
        first_counted(range, |rest| self.look_for_counted(state, rest))
    }

    /// Looks for the first cluster of `range` that is counted, in one slice at most.
    fn look_for_counted(&self, state: &mut State, range: Range<u64>) -> Result<Looked> {
        let order = self.geometry.refcount_order();
        let per_block = self.geometry.refcounts_per_block();
        let block_first = range.start / per_block * per_block;
        let Some((key, index)) = self.locate(state, range.start) else {
            return Ok(Looked::NoneBefore(block_first + per_block));
        };
        let block = state.table[(range.start / per_block) as usize];
        let slices = key..block + self.geometry.cluster_size();
        let Some(slice) = self.next_slice(state, slices)? else {
            return Ok(Looked::NoneBefore(block_first + per_block));
        };
        self.load(state, slice)?;
        let counts = state.cache.get(slice).unwrap_or_default();
        let first = block_first + ((slice - block) << 3 >> order);
        let index = if slice == key { index } else { 0 };
        Ok(match refcount::next_used(counts, index, order) {
            Some(used) => Looked::Counted(first + used as u64),
            None => Looked::NoneBefore(first + ((counts.len() as u64 * 8) >> order)),
        })
    }

    /// The first cluster from `from` on whose refcount is 0; clusters without a block are free.
    fn first_free(&self, state: &mut State, from: u64) -> Result<u64> {
        let order = self.geometry.refcount_order();
        let mut cluster = from;
        while let Some((key, index)) = self.locate(state, cluster) {
            self.load(state, key)?;
            let per_slice = ((state.cache.slice_size() * 8) >> order) as usize;
            let counts = state.cache.get(key).unwrap_or_default();
            let is_free = |&i: &usize| {
                refcount::get(counts, i, order) == 0
                    && !is_kept_back(state, cluster + (i - index) as u64)
            };
            match (index..per_slice).find(is_free) {
                Some(free) => return Ok(cluster + (free - index) as u64),
                None => cluster += (per_slice - index) as u64,
            }
        }
        Ok(cluster)
    }

    fn has_block(&self, state: &State, cluster: u64) -> bool {
        let index = cluster / self.geometry.refcounts_per_block();
        state.table.get(index as usize).is_some_and(|offset| *offset != 0)
    }

    /// Where the refcount of `cluster` is: the slice, and the entry within the slice.
    fn locate(&self, state: &State, cluster: u64) -> Option<(u64, usize)> {
        let per_block = self.geometry.refcounts_per_block();
        let block = *state.table.get((cluster / per_block) as usize)?;
        if block & REFCOUNT_TABLE_OFFSET_MASK == 0 {
            return None;
        }
        let slice_size = state.cache.slice_size();
        let per_slice = (slice_size * 8) >> self.geometry.refcount_order();
        let index = cluster % per_block;
        Some((block + index / per_slice * slice_size, (index % per_slice) as usize))
    }

    fn read(&self, state: &mut State, cluster: u64) -> Result<u64> {
        let Some((key, index)) = self.locate(state, cluster) else { return Ok(0) };
        self.load(state, key)?;
        let order = self.geometry.refcount_order();
        Ok(state.cache.get(key).map_or(0, |bytes| refcount::get(bytes, index, order)))
    }

    /// Sets the refcount of a cluster that has a block.
    fn write(&self, state: &mut State, cluster: u64, value: u64) -> Result<()> {
        let Some((key, index)) = self.locate(state, cluster) else {
            return Err(Error::corrupt(format!("cluster {cluster:#x} has no refcount block")));
        };
        if value > self.geometry.max_refcount() {
            return Err(Error::new(
                ErrorKind::TooBig,
                format!("refcount {value} does not fit the image's refcount width"),
            ));
        }
        self.load(state, key)?;
        let order = self.geometry.refcount_order();
        let byte = (index << order) / 8;
        let width = 1 << order.saturating_sub(3);
        if let Some(bytes) = state.cache.get_mut(key, byte..byte + width) {
            refcount::set(bytes, index, order, value);
        }
        if value > 0
            && let Some(since) = &mut state.since
        {
            since.counted.add(cluster);
        }
        Ok(())
    }

    fn load(&self, state: &mut State, key: u64) -> Result<()> {
        if state.cache.get(key).is_some() {
            return Ok(());
        }
        let mut bytes = vec![0; state.cache.slice_size() as usize].into_boxed_slice();
        self.read_block(&mut bytes, key)?;
        state.cache.insert(key, bytes);
        self.memory.make_room();
        Ok(())
    }

    fn check_unused(&self, cluster: u64) -> Result<()> {
        if !self.metadata.contains(HostCluster(cluster)) {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "the cluster at {} holds metadata but its refcount is 0",
            self.geometry.host_offset(HostCluster(cluster))
        )))
    }
}

/// What a look for a counted cluster came to.
enum Looked {
    Counted(u64),
    /// Go on with this one.
    NoneBefore(u64),
}

/// The first cluster of `range` that is counted, found by one look after the other.
fn first_counted(
    range: Range<u64>,
    mut look: impl FnMut(Range<u64>) -> Result<Looked>,
) -> Result<Option<u64>> {
    let mut from = range.start;
    while from < range.end {
        match look(from..range.end)? {
            Looked::Counted(found) => return Ok((found < range.end).then_some(found)),
            Looked::NoneBefore(next) => from = next,
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{CreateOptions, Image};
    use crate::storage::testing::MemoryStorage;

    /// A new image, with its header.
    fn image() -> (Arc<MemoryStorage>, Header) {
        let file = Arc::new(MemoryStorage::default());
        let options = CreateOptions { virtual_size: 1 << 20, ..CreateOptions::default() };
        Image::create(&*file, &options).unwrap();
        let mut start = [0; 512];
        file.read_at(&mut start, 0).unwrap();
        (file, Header::parse(&start).unwrap())
    }

    /// Found by fuzzing: the status of an image that was found corrupt looks at all blocks.
    #[test]
    fn no_block_is_read_at_a_malformed_offset() {
        let (file, header) = image();
        let entry = REFCOUNT_TABLE_OFFSET_MASK.to_be_bytes();
        file.write_at(&entry, header.refcount_table_offset.0).unwrap();
        let metadata = Arc::new(MetadataMap::new(u64::MAX));
        let refcounts = Refcounts::open(file, &header, metadata, &Arc::default()).unwrap();
        let error = refcounts.usage(|| true).unwrap_err().to_string();
        assert!(error.contains("malformed"), "{error}");
    }

    #[test]
    fn metadata_is_not_freed_before_its_owner_gives_it_up() {
        let (file, header) = image();
        let metadata = Arc::new(MetadataMap::new(u64::MAX));
        let refcounts = Refcounts::open(file, &header, metadata.clone(), &Arc::default()).unwrap();
        let table = refcounts.allocate(1).unwrap().clusters;
        let cluster = HostCluster(table.start);
        metadata.insert(cluster);
        let error = refcounts.release(table.clone()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(metadata.contains(cluster) && refcounts.get(cluster).unwrap() == 1);
        metadata.give_up(table.clone());
        refcounts.release(table).unwrap();
        assert!(!metadata.contains(cluster) && refcounts.get(cluster).unwrap() == 0);
    }
}
