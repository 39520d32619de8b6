//! New refcount blocks and a larger refcount table, in memory; a flush makes them durable.

use std::ops::Range;

use super::{MAX_HOST_OFFSET, Refcounts, State};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{HostCluster, HostOffset, MAX_REFCOUNT_TABLE_BYTES};
use crate::storage::reserve_metadata;

impl Refcounts {
    /// Sees to it that `cluster` has a refcount block; whether one had to be made. A new block is
    /// the first cluster of the range that it describes: without a block all of it is free.
    pub(super) fn make_block_for(&self, state: &mut State, cluster: u64) -> Result<bool> {
        if self.has_block(state, cluster) {
            return Ok(false);
        }
        self.check_limit(cluster)?;
        let per_block = self.geometry.refcounts_per_block();
        let index = cluster / per_block;
        if index >= state.table.len() as u64 {
            self.grow_table(state, index)?;
            return Ok(true);
        }
        let place = index * per_block;
        if place == 0 {
            return Err(Error::corrupt(
                "the first refcount block is missing: run `qcow2fs check --repair all`",
            ));
        }
        if !state.unlinked.contains(&place) {
            self.check_unused(place)?;
        }
        self.reserve(place..place + 1)?;
        // Where a block has just been let go of, the new one is that one again.
        state.unlinked.remove(&place);
        self.enter_block(state, index as usize, place);
        self.write(state, place, 1)?;
        self.reach(state, place + 1);
        Ok(true)
    }

    /// `wanted` consecutive clusters at the end of the file, with the blocks that they need before
    /// them.
    pub(super) fn append(&self, state: &mut State, wanted: u64) -> Result<Range<u64>> {
        let per_block = self.geometry.refcounts_per_block();
        loop {
            let plan = self.plan_append(state, wanted)?;
            let last_block = (plan.end() - 1) / per_block;
            if last_block < state.table.len() as u64 {
                return self.carry_out(state, &plan);
            }
            self.grow_table(state, last_block)?;
        }
    }

    /// A larger refcount table, with room for block `index` and its own clusters, at the end of
    /// the file. The old one stays what the header points to until the flush has switched.
    fn grow_table(&self, state: &mut State, index: u64) -> Result<()> {
        let per_block = self.geometry.refcounts_per_block();
        let entries_per_cluster = self.geometry.cluster_size() / 8;
        let old_clusters = state.table.len() as u64 / entries_per_cluster;
        // Half as much again, so that growing stays rare.
        let mut clusters = (old_clusters * 3).div_ceil(2).max(1);
        clusters = clusters.max((index + 1).div_ceil(entries_per_cluster));
        let plan = loop {
            if clusters > MAX_REFCOUNT_TABLE_BYTES >> self.geometry.cluster_bits() {
                let limit = MAX_REFCOUNT_TABLE_BYTES >> self.geometry.cluster_bits();
                if old_clusters >= limit || (index + 1).div_ceil(entries_per_cluster) > limit {
                    return Err(too_big());
                }
                clusters = limit;
            }
            let plan = self.plan_append(state, clusters)?;
            let needed = ((plan.end() - 1) / per_block + 1).div_ceil(entries_per_cluster);
            if needed <= clusters {
                break plan;
            }
            if clusters >= MAX_REFCOUNT_TABLE_BYTES >> self.geometry.cluster_bits() {
                return Err(too_big());
            }
            clusters = needed;
        };
        let old_table = state.table.clone();
        state.table.resize((clusters * entries_per_cluster) as usize, 0);
        let place = match self.carry_out(state, &plan) {
            Ok(place) => place,
            Err(e) => {
                state.table = old_table;
                return Err(e);
            }
        };
        let first = self.geometry.host_cluster(state.table_offset).0;
        state.moved_from.push(first..first + old_clusters);
        place.clone().for_each(|c| {
            self.metadata.insert(HostCluster(c));
        });
        state.table_offset = self.geometry.host_offset(HostCluster(place.start));
        Ok(())
    }

    /// Where `wanted` clusters at the end of the file go, and the blocks that they need.
    fn plan_append(&self, state: &mut State, wanted: u64) -> Result<Plan> {
        let mut start = state.end;
        let mut blocks = 0;
        loop {
            let plan = Plan { start, blocks, wanted };
            self.check_limit(plan.end())?;
            // Past the end of the file refcounts may be left over from a crash: step over them.
            if let Some(used) = self.last_used(state, start..plan.end())? {
                start = self.first_free(state, used + 1)?;
                continue;
            }
            let missing = self.missing_blocks(state, start..plan.end()).len() as u64;
            if missing == blocks {
                return Ok(plan);
            }
            blocks = missing;
        }
    }

    fn carry_out(&self, state: &mut State, plan: &Plan) -> Result<Range<u64>> {
        for cluster in plan.start..plan.end() {
            self.check_unused(cluster)?;
        }
        self.reserve(plan.start..plan.end())?;
        let missing = self.missing_blocks(state, plan.start..plan.end());
        // Counts in blocks that exist come first: reading those can fail, nothing after can.
        let (counted, uncounted): (Vec<_>, Vec<_>) =
            (plan.start..plan.end()).partition(|&cluster| self.has_block(state, cluster));
        for &cluster in &counted {
            if let Err(e) = self.write(state, cluster, 1) {
                for undone in counted.iter().take_while(|&&c| c != cluster) {
                    self.write(state, *undone, 0)?;
                }
                return Err(e);
            }
        }
        for (index, place) in missing.into_iter().zip(plan.start..) {
            self.enter_block(state, index as usize, place);
        }
        for cluster in uncounted {
            self.write(state, cluster, 1)?;
        }
        self.reach(state, plan.end());
        Ok(plan.start + plan.blocks..plan.end())
    }

    /// The indices of the blocks that `clusters` need and do not have.
    fn missing_blocks(&self, state: &State, clusters: Range<u64>) -> Vec<u64> {
        let per_block = self.geometry.refcounts_per_block();
        (clusters.start / per_block..clusters.end.div_ceil(per_block))
            .filter(|index| !self.has_block(state, index * per_block))
            .collect()
    }

    fn last_used(&self, state: &mut State, clusters: Range<u64>) -> Result<Option<u64>> {
        for cluster in clusters.rev() {
            if !self.is_free(state, cluster)? {
                return Ok(Some(cluster));
            }
        }
        Ok(None)
    }

    /// Makes `place` block `index`, all zeros, in memory.
    fn enter_block(&self, state: &mut State, index: usize, place: u64) {
        let offset = place << self.geometry.cluster_bits();
        state.cache.insert_zeroed_cluster(offset, self.geometry.cluster_size());
        state.table[index] = offset;
        state.table_dirty.insert(index);
        self.metadata.insert(HostCluster(place));
    }

    /// Takes host blocks for metadata now, so that writing it at a flush cannot run out of space.
    pub(super) fn reserve(&self, clusters: Range<u64>) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        let bytes = clusters.start << bits..clusters.end << bits;
        reserve_metadata(&*self.storage, bytes).map_err(|e| {
            let at = HostOffset(clusters.start << bits);
            Error::io(format!("reserving space for refcounts at {at}"), e)
        })
    }

    fn check_limit(&self, cluster: u64) -> Result<()> {
        if cluster < MAX_HOST_OFFSET >> self.geometry.cluster_bits() {
            Ok(())
        } else {
            Err(too_big())
        }
    }
}

/// New blocks first, then the clusters that were wanted.
struct Plan {
    start: u64,
    blocks: u64,
    wanted: u64,
}

impl Plan {
    fn end(&self) -> u64 {
        self.start + self.blocks + self.wanted
    }
}

pub(super) fn too_big() -> Error {
    Error::new(
        ErrorKind::TooBig,
        "the image file cannot grow any further: its refcount table is at its largest",
    )
}
