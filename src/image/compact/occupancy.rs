//! How full the host clusters are that hold compressed data.
//!
//! Such a cluster holds pieces of several compressed clusters, and it is in use as long as one of
//! them is. Discards leave clusters with a single piece: too little to see in refcounts, which count
//! pieces and not bytes, so the entries are walked. What is found are estimates to choose by; whoever
//! moves a piece looks at everything again.

use std::ops::Range;

use crate::format::Geometry;

/// Entries tell lengths in sectors.
const SECTOR: u64 = 512;
/// Host clusters that are looked at, from the first on: 64 MiB of memory, 2 TiB of compressed data
/// in clusters of 64 KiB.
const MOST_CLUSTERS: u64 = 32 << 20;
/// A cluster is worth emptying when an eighth of it is dead: seven bytes are copied at most for each
/// that is won.
const DEAD_SHARE: u64 = 8;

/// Sectors of compressed data in use, by host cluster.
#[derive(Debug, Default)]
pub(super) struct Occupancy {
    sectors: Vec<u16>,
    per_cluster: u64,
}

impl Occupancy {
    pub(super) fn new(geometry: &Geometry) -> Self {
        Occupancy { sectors: Vec::new(), per_cluster: geometry.cluster_size() / SECTOR }
    }

    /// Compressed data lies in `bytes` of the host file.
    pub(super) fn add(&mut self, bytes: &Range<u64>) {
        let (mut at, end) = (bytes.start / SECTOR, bytes.end.div_ceil(SECTOR));
        while at < end {
            let cluster = at / self.per_cluster;
            let cluster_end = end.min((cluster + 1) * self.per_cluster);
            if cluster >= MOST_CLUSTERS {
                return;
            }
            let index = cluster as usize;
            if self.sectors.len() <= index {
                self.sectors.resize(index + 1, 0);
            }
            // Neighbours share a sector, and damaged entries may share all of them.
            let sum = u64::from(self.sectors[index]) + (cluster_end - at);
            self.sectors[index] = sum.min(self.per_cluster) as u16;
            at = cluster_end;
        }
    }

    /// Host cluster `cluster` is not what it was.
    pub(super) fn forget(&mut self, cluster: u64) {
        if let Some(sectors) = self.sectors.get_mut(cluster as usize) {
            *sectors = 0;
        }
    }

    /// Whether there is any compressed data.
    pub(super) fn any(&self) -> bool {
        !self.sectors.is_empty()
    }

    /// Whether so much of a host cluster is dead that what lives in it is worth moving.
    pub(super) fn is_sparse(&self, cluster: u64) -> bool {
        let sectors = usize::try_from(cluster).ok().and_then(|index| self.sectors.get(index));
        sectors.is_some_and(|sectors| self.is_worth_emptying(u64::from(*sectors)))
    }

    fn is_worth_emptying(&self, sectors: u64) -> bool {
        sectors > 0 && sectors * DEAD_SHARE <= self.per_cluster * (DEAD_SHARE - 1)
    }

    /// The host clusters that are worth emptying, and the sectors in use of each.
    pub(super) fn sparse(&self) -> impl Iterator<Item = (u64, u64)> {
        let all = (0..).zip(self.sectors.iter().map(|sectors| u64::from(*sectors)));
        all.filter(|(_, sectors)| self.is_worth_emptying(*sectors))
    }

    /// Host clusters that emptying the sparse ones frees, those for what is packed taken off, and
    /// the bytes to be packed.
    pub(super) fn win(&self) -> (u64, u64) {
        let (count, live) = self
            .sparse()
            .fold((0u64, 0), |(count, live), (_, sectors)| (count + 1, live + sectors));
        (count.saturating_sub(live.div_ceil(self.per_cluster.max(1))), live * SECTOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn occupancy() -> Occupancy {
        Occupancy { sectors: Vec::new(), per_cluster: 8 }
    }

    #[test]
    fn a_cluster_is_sparse_when_an_eighth_is_dead() {
        let mut all = occupancy();
        all.add(&(0..7 * 512));
        all.add(&(4096..2 * 4096));
        all.add(&(2 * 4096 + 1..2 * 4096 + 2));
        assert_eq!(
            (0..5).map(|c| all.is_sparse(c)).collect::<Vec<_>>(),
            [true, false, true, false, false]
        );
        assert!(!all.is_sparse(u64::MAX));
        assert_eq!(all.win(), (1, 8 * 512), "two sparse clusters become one");
        all.forget(0);
        assert!(!all.is_sparse(0), "forgotten");
    }

    #[test]
    fn what_crosses_a_border_counts_in_both_clusters() {
        let mut all = occupancy();
        all.add(&(4096 - 512..4096 + 100));
        assert!(all.is_sparse(0) && all.is_sparse(1));
        assert_eq!(all.win(), (1, 2 * 512));
    }

    #[test]
    fn what_overlaps_fills_no_more_than_there_is() {
        let mut all = occupancy();
        (0..1000).for_each(|_| all.add(&(0..4096)));
        assert!(!all.is_sparse(0));
        all.add(&(u64::MAX - 5000..u64::MAX));
        assert_eq!(all.win(), (0, 0));
    }
}
