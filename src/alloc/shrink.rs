//! What makes the file short needs of the refcounts: how much is used, free clusters before a given
//! end, refcount blocks and a refcount table that move there, and blocks that describe nothing any
//! more.
//!
//! Nothing here is durable before the next flush, which keeps the order of the module above: the
//! contents of a block that has moved, then the table's entry, then what depends on it. The block's
//! old place keeps its refcount until the entry is durable. A block in the range that it describes
//! takes its own refcount along when it goes: such a place is *unlinked* until the flush is
//! through, which nobody gets and behind which the file is not cut.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::{Allocated, Refcounts, State};
use crate::error::Result;
use crate::format::HostCluster;
use crate::rules::Rule;

/// So many blocks move, or are looked at, in one step at most: a flush may have to link each in a turn
/// of its own.
const BLOCKS_AT_ONCE: u64 = 128;
/// And blocks of so many bytes, which the flush writes.
const BYTES_AT_ONCE: u64 = 32 << 20;

/// How far the steps of [`Refcounts::shrink_structure`] have got.
#[derive(Clone, Copy, Debug, Default)]
pub struct ShrinkWalk {
    stage: ShrinkStage,
    /// The next block to be looked at.
    index: usize,
    /// Blocks move to ascending places: the next one is at or after this.
    place: u64,
    freed: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ShrinkStage {
    #[default]
    Unlink,
    Move,
    Table,
    Over,
}

impl ShrinkWalk {
    /// No step was taken yet.
    pub fn is_at_start(&self) -> bool {
        self.stage == ShrinkStage::Unlink && self.index == 0
    }

    /// The last step was taken.
    pub fn is_over(&self) -> bool {
        self.stage == ShrinkStage::Over
    }

    /// Clusters that all steps so far have freed.
    pub fn freed(&self) -> u64 {
        self.freed
    }

    fn enter(&mut self, stage: ShrinkStage) {
        (self.stage, self.index) = (stage, 0);
    }
}

/// Which clusters of a file are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// How many.
    pub used: u64,
    /// One more than the last of them.
    pub end: u64,
    /// How many of them lie at or after cluster `used`: as many as are free before it.
    pub behind: u64,
}

impl Refcounts {
    /// How many clusters of the file are counted, and which. Others get to the refcounts between two
    /// pieces of a block, so the sum may be of no single moment. `None` where `go_on`, which is asked
    /// at each of them, said `false`.
    ///
    /// # Errors
    /// Host errors.
    pub fn usage(&self, mut go_on: impl FnMut() -> bool) -> Result<Option<Usage>> {
        let per_block = self.geometry.refcounts_per_block();
        let file_end = self.end_in(&self.state.lock())?;
        let (mut used, mut end) = (0, 0);
        // The clusters that the blocks before one count, by the block; those that count nothing are
        // left out.
        let mut before = BTreeMap::new();
        for index in self.blocks().into_iter().take_while(|i| i * per_block < file_end) {
            let used_before = used;
            let block = index * per_block..file_end.min((index + 1) * per_block);
            let is_whole = self.counted_in(block, &mut go_on, |cluster| {
                used += 1;
                end = cluster + 1;
            })?;
            if !is_whole {
                return Ok(None);
            }
            if used > used_before {
                before.insert(index, used_before);
            }
        }
        // Those in the blocks before the one that the end falls into, and the first ones in that.
        let block = used / per_block;
        let mut below = before.range(block..).next().map_or(used, |(_, count)| *count);
        let is_whole = self.counted_in(block * per_block..used, &mut go_on, |_| below += 1)?;
        Ok(is_whole.then(|| Usage { used, end, behind: used.saturating_sub(below) }))
    }

    /// Calls `each` for every cluster of `range` that is counted, in ascending order, all of which one
    /// block counts; whether `go_on` let it get through.
    fn counted_in(
        &self,
        range: Range<u64>,
        go_on: &mut impl FnMut() -> bool,
        mut each: impl FnMut(u64),
    ) -> Result<bool> {
        let mut from = range.start;
        while from < range.end {
            if !go_on() {
                return Ok(false);
            }
            let piece = self.next_piece(&self.state.lock(), from..range.end)?;
            let Some(piece) = piece else { break };
            let clusters = piece.counted().map(|(cluster, _)| cluster);
            clusters.filter(|cluster| range.contains(cluster)).for_each(&mut each);
            from = piece.end();
        }
        Ok(true)
    }

    /// Tells of each cluster that is counted: its number, its refcount, and whether it is a refcount
    /// block or a part of the refcount table.
    ///
    /// # Errors
    /// Host errors, and what `tell` returns.
    pub fn for_each_counted(
        &self,
        mut tell: impl FnMut(u64, u64, bool) -> Result<()>,
    ) -> Result<()> {
        let state = self.state.lock();
        let bits = self.geometry.cluster_bits();
        let per_block = self.geometry.refcounts_per_block();
        let first = self.geometry.host_cluster(state.table_offset).0;
        let table = first..first + self.geometry.clusters_for(state.table.len() as u64 * 8).0;
        let blocks: BTreeSet<u64> = state.table.iter().map(|offset| offset >> bits).collect();
        for index in 0..state.table.len() as u64 {
            let (mut from, end) = (index * per_block, (index + 1) * per_block);
            while from < end {
                let Some(piece) = self.next_piece(&state, from..end)? else { break };
                for (cluster, count) in piece.counted() {
                    // Offset 0 in the table means none.
                    let is_structure =
                        cluster > 0 && (table.contains(&cluster) || blocks.contains(&cluster));
                    tell(cluster, count, is_structure)?;
                }
                from = piece.end();
            }
        }
        Ok(())
    }

    /// As [`Refcounts::allocate`], of the clusters before `end` only; `None` when none is free.
    ///
    /// # Errors
    /// As [`Refcounts::allocate`].
    pub fn allocate_before(&self, wanted: u64, end: u64) -> Result<Option<Allocated>> {
        self.allocate_until(wanted, end)
    }

    /// Takes `wanted` consecutive free clusters before `end`; `None` when there are no such.
    ///
    /// # Errors
    /// Host errors; `Corrupt` where metadata is found free.
    pub fn allocate_run_before(&self, wanted: u64, end: u64) -> Result<Option<Range<u64>>> {
        let mut state = self.state.lock();
        self.find_run(&mut state, wanted, 0..end)
    }

    /// The first run of free clusters that have blocks within `range`; they are counted now.
    fn find_run(
        &self,
        state: &mut State,
        wanted: u64,
        range: Range<u64>,
    ) -> Result<Option<Range<u64>>> {
        let per_block = self.geometry.refcounts_per_block();
        let mut first = range.start;
        if first <= state.first_free {
            // Who looks next need not go through what is taken again.
            state.first_free = self.first_free(state, state.first_free)?;
            first = state.first_free;
        }
        loop {
            first = self.first_free(state, first)?;
            let run = first..first + wanted;
            if run.end > range.end.min(state.end) {
                return Ok(None);
            }
            let mut unfit = None;
            for cluster in run.clone() {
                if !self.has_block(state, cluster) {
                    unfit = Some((cluster / per_block + 1) * per_block);
                } else if !self.is_free(state, cluster)? {
                    unfit = Some(cluster + 1);
                } else {
                    continue;
                }
                break;
            }
            match unfit {
                Some(next) => first = next,
                None => {
                    for cluster in run.clone() {
                        self.check_unused(cluster)?;
                    }
                    for cluster in run.clone() {
                        self.write(state, cluster, 1)?;
                    }
                    return Ok(Some(run));
                }
            }
        }
    }

    /// Raises the refcount of a cluster by `by`.
    ///
    /// # Errors
    /// `TooBig` past the width of refcounts; `Corrupt` for a cluster that is not counted; host
    /// errors.
    pub fn raise(&self, cluster: HostCluster, by: u64) -> Result<()> {
        self.raise_in(&mut self.state.lock(), cluster.0, by)
    }

    /// The next step of a walk that lets go of blocks which describe nothing at or after `from`, then
    /// moves those that lie there to free clusters before it, and in the end the refcount table. How
    /// many clusters that frees, after the next flush.
    ///
    /// The caller holds the flush lock, and nothing of an earlier step waits for a flush: so blocks
    /// never come to lie in clusters that count each other in a circle, and can be linked in turns.
    /// Blocks move in ascending order to ascending places: a block that comes later is counted by the
    /// same one or a later one, so following who counts whom among them never leads back. New ones,
    /// which others may make between two blocks of a step as they may before it, are counted by
    /// themselves or by one before them.
    ///
    /// # Errors
    /// Host errors; `Corrupt` where metadata is found free.
    pub fn shrink_structure(&self, from: u64, walk: &mut ShrinkWalk) -> Result<u64> {
        let before = walk.freed;
        let most = (BYTES_AT_ONCE >> self.geometry.cluster_bits()).clamp(1, BLOCKS_AT_ONCE);
        for _ in 0..most {
            // Nobody who wants a refcount waits for more than one block.
            let mut state = self.state.lock();
            walk.freed += match walk.stage {
                ShrinkStage::Unlink => self.unlink_next(&mut state, from, walk)?,
                ShrinkStage::Move => self.move_next(&mut state, from, walk)?,
                ShrinkStage::Table => {
                    walk.enter(ShrinkStage::Over);
                    self.move_table(&mut state, from)?
                }
                ShrinkStage::Over => break,
            };
        }
        Ok(walk.freed - before)
    }

    /// Lets go of the next block that describes clusters from `from` on, if none of them is in use.
    fn unlink_next(&self, state: &mut State, from: u64, walk: &mut ShrinkWalk) -> Result<u64> {
        // The first block stays, whatever it describes.
        let first = from.div_ceil(self.geometry.refcounts_per_block()).max(1) as usize;
        let Some(index) = next_block(state, walk.index.max(first), |_| true) else {
            walk.enter(ShrinkStage::Move);
            return Ok(0);
        };
        walk.index = index + 1;
        let place = state.table[index] >> self.geometry.cluster_bits();
        if !self.describes_nothing(state, index as u64, place)? {
            return Ok(0);
        }
        self.unlink_block(state, index, place);
        Ok(1)
    }

    /// Moves the next block that lies at or after `from`.
    fn move_next(&self, state: &mut State, from: u64, walk: &mut ShrinkWalk) -> Result<u64> {
        let bits = self.geometry.cluster_bits();
        let Some(index) = next_block(state, walk.index, |offset| offset >> bits >= from) else {
            walk.enter(ShrinkStage::Table);
            return Ok(0);
        };
        walk.index = index + 1;
        let place = state.table[index] >> bits;
        match self.move_block(state, index, place, walk.place..from)? {
            Some(target) => {
                walk.place = target + 1;
                Ok(1)
            }
            // There is no room for the others either.
            None => {
                walk.enter(ShrinkStage::Table);
                Ok(0)
            }
        }
    }

    /// Whether block `index` counts no cluster but perhaps its own, `place`.
    fn describes_nothing(&self, state: &State, index: u64, place: u64) -> Result<bool> {
        let per_block = self.geometry.refcounts_per_block();
        let (mut from, end) = (index * per_block, (index + 1) * per_block);
        while from < end {
            let Some(piece) = self.next_piece(state, from..end)? else { break };
            if piece.counted().any(|(cluster, _)| cluster != place) {
                return Ok(false);
            }
            from = piece.end();
        }
        Ok(true)
    }

    fn unlink_block(&self, state: &mut State, index: usize, place: u64) {
        let per_block = self.geometry.refcounts_per_block();
        state.cache.forget_cluster(state.table[index], self.geometry.cluster_size());
        state.table[index] = 0;
        state.table_dirty.insert(index);
        if place / per_block == index as u64 {
            state.unlinked.insert(place);
        } else {
            state.left.push(place..place + 1);
        }
    }

    /// Moves block `index` from `place` to a free cluster in `range`, where there is one: which.
    fn move_block(
        &self,
        state: &mut State,
        index: usize,
        place: u64,
        range: Range<u64>,
    ) -> Result<Option<u64>> {
        let Some(target) = self.find_run(state, 1, range)? else { return Ok(None) };
        // The block itself may count the target: its content is taken after that.
        let moved = self.reserve(target.clone()).and_then(|()| self.block_bytes(state, index));
        let bytes = match moved {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(None),
            Err(e) => {
                self.write(state, target.start, 0)?;
                return Err(e);
            }
        };
        let (old, size) = (state.table[index], self.geometry.cluster_size());
        let offset = target.start << self.geometry.cluster_bits();
        state.cache.forget_cluster(old, size);
        state.cache.insert_dirty_cluster(offset, &bytes);
        state.table[index] = offset;
        state.table_dirty.insert(index);
        self.metadata.insert(HostCluster(target.start));
        // Counted, wherever its count stands now, until the entry is durable.
        state.left.push(place..place + 1);
        Ok(Some(target.start))
    }

    /// Moves the refcount table where it lies at or after `end`, as short as it can be; the
    /// clusters that frees.
    fn move_table(&self, state: &mut State, end: u64) -> Result<u64> {
        let per_cluster = self.geometry.cluster_size() / 8;
        let first = self.geometry.host_cluster(state.table_offset).0;
        let old = state.table.len() as u64 / per_cluster;
        let last = state.table.iter().rposition(|&entry| entry != 0).unwrap_or(0) as u64;
        let clusters = (last + 1).div_ceil(per_cluster);
        if first + old <= end || !state.moved_from.is_empty() {
            return Ok(0);
        }
        let Some(place) = self.find_run(state, clusters, 0..end)? else { return Ok(0) };
        if let Err(e) = self.reserve(place.clone()) {
            for cluster in place {
                self.write(state, cluster, 0)?;
            }
            return Err(e);
        }
        for cluster in place.clone() {
            self.metadata.insert(HostCluster(cluster));
        }
        state.table.resize((clusters * per_cluster) as usize, 0);
        state.table_offset = self.geometry.host_offset(HostCluster(place.start));
        state.moved_from.push(first..first + old);
        Ok(old)
    }

    /// Block `index` as it is now, changes that wait for a flush included; `None` without one.
    fn block_bytes(&self, state: &State, index: usize) -> Result<Option<Vec<u8>>> {
        let start = match state.table.get(index) {
            Some(0) | None => return Ok(None),
            Some(&start) => start,
        };
        // The table of an image that was found corrupt may hold anything.
        self.check_entry(index, start)?;
        self.bytes_at(state, start..start + self.geometry.cluster_size()).map(Some)
    }

    /// Whether a cluster may be handed out: not counted, and no place that a block has just left.
    pub(super) fn is_free(&self, state: &mut State, cluster: u64) -> Result<bool> {
        Ok(!is_kept_back(state, cluster) && self.read(state, cluster)? == 0)
    }

    /// The flush is through that wrote the entries of the blocks that were at `unlinked`.
    pub(super) fn forget_unlinked(&self, state: &mut State, unlinked: &BTreeSet<u64>) {
        for place in unlinked {
            // A new block may have taken the place meanwhile.
            if state.unlinked.remove(place) {
                self.metadata.remove(HostCluster(*place));
                state.freed(*place);
            }
        }
    }
}

/// The first block from `index` on that lies where `is_wanted` says of its offset.
fn next_block(state: &State, index: usize, is_wanted: impl Fn(u64) -> bool) -> Option<usize> {
    let rest = state.table.iter().enumerate().skip(index);
    rest.filter(|(_, offset)| **offset != 0 && is_wanted(**offset)).map(|(index, _)| index).next()
}

/// Whether a block that was let go of has just left a cluster, which is not counted any more.
pub(super) fn is_kept_back(state: &State, cluster: u64) -> bool {
    Rule::UnlinkedPlacesWait.is_kept() && state.unlinked.contains(&cluster)
}
