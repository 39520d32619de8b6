//! The states of host clusters between two uses: pure, no I/O, no lock of its own.
//!
//! ```text
//! used --dropped--> junk --flush--> released --punch, refcount 0--> free
//! free --refcount 1, punched--> erased --flush--> available --take--> rooted --link--> used
//! ```
//! Free clusters are those whose refcount is 0; every other state here has refcount 1, in memory at
//! least. A cluster that is in none of the sets and not free is in use.
//!
//! The way from junk to available goes through *free*, though the design lets released clusters
//! into the pool directly: so the pool always takes the clusters nearest to the start of the file
//! wherever they were freed, and what lies near its end can be cut off. It costs nothing on disk,
//! since a refcount that falls to 0 and rises to 1 between two flushes is not written.
//!
//! A flush *seals* what is junk or erased when it takes its copy of the tables, and *settles* that
//! when it is durable: what joins meanwhile waits for the next one.

use std::collections::HashMap;
use std::ops::Range;

use serde::Serialize;

use crate::alloc::ClusterSet;
use crate::rules::Rule;

/// Every cluster that is on its way, by state. The sets are disjoint.
#[derive(Debug, Default)]
pub struct ClusterMap {
    junk: ClusterSet,
    junk_sealed: ClusterSet,
    /// References dropped from clusters that have others. Not a set: one cluster can lose several.
    shared: Vec<u64>,
    shared_sealed: Vec<u64>,
    shared_released: Vec<u64>,
    released: ClusterSet,
    /// Released ones before this cluster could not be freed when it was tried last.
    released_next: u64,
    /// Released, and being punched by the recycler.
    punching: ClusterSet,
    erased: ClusterSet,
    erased_sealed: ClusterSet,
    available: ClusterSet,
    rooted: ClusterSet,
}

/// How many clusters are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StateCounts {
    /// Dropped in memory, perhaps still referenced on disk.
    pub junk: u64,
    /// Dropped on disk, waiting to be punched and freed.
    pub released: u64,
    /// Counted and zeroed in memory, not yet durably so.
    pub erased: u64,
    /// Ready to be handed out.
    pub available: u64,
    /// Handed out, not linked yet.
    pub rooted: u64,
}

/// References that were dropped and are counted still.
#[derive(Debug)]
pub struct Dropped {
    last: ClusterSet,
    /// Those to clusters that have others, by cluster.
    one_of_several: HashMap<u64, u64>,
}

impl Dropped {
    /// How many of them led to `cluster`.
    pub fn to(&self, cluster: u64) -> u64 {
        let one_of_several = self.one_of_several.get(&cluster).copied().unwrap_or(0);
        u64::from(self.last.contains(cluster)) + one_of_several
    }
}

/// A cluster that is dropped although it is not in use: two references claimed it.
#[derive(Debug, PartialEq, Eq)]
pub struct NotInUse;

impl ClusterMap {
    /// used -> junk: the last references to `clusters` are gone from the tables in memory.
    ///
    /// # Errors
    /// [`NotInUse`]; nothing has changed then.
    pub fn drop_used(&mut self, clusters: Range<u64>) -> Result<(), NotInUse> {
        if self.sets().iter().any(|set| set.overlaps(&clusters)) {
            return Err(NotInUse);
        }
        match Rule::JunkWaits.is_kept() {
            true => self.junk.insert(clusters),
            false => self.released.insert(clusters),
        }
        Ok(())
    }

    /// One of several references to a cluster is gone from the tables in memory.
    pub fn drop_shared(&mut self, cluster: u64) {
        match Rule::SharedJunkWaits.is_kept() {
            true => self.shared.push(cluster),
            false => self.shared_released.push(cluster),
        }
    }

    /// A flush takes its copy of the tables now. Whether it has anything to settle.
    pub fn seal(&mut self) -> bool {
        self.junk_sealed.append(&mut self.junk);
        self.shared_sealed.append(&mut self.shared);
        self.erased_sealed.append(&mut self.erased);
        !(self.junk_sealed.is_empty()
            && self.shared_sealed.is_empty()
            && self.erased_sealed.is_empty())
    }

    /// The flush is over: junk -> released and erased -> available where it succeeded.
    pub fn settle(&mut self, succeeded: bool) {
        if succeeded {
            self.released.append(&mut self.junk_sealed);
            self.shared_released.append(&mut self.shared_sealed);
            self.available.append(&mut self.erased_sealed);
        } else {
            self.junk.append(&mut self.junk_sealed);
            self.shared.append(&mut self.shared_sealed);
            self.erased.append(&mut self.erased_sealed);
        }
    }

    /// Clusters that nothing on disk refers to any more join the released ones directly.
    pub fn release(&mut self, clusters: Range<u64>) {
        self.released.insert(clusters);
    }

    /// used -> released: the last references to `clusters` are gone from the tables on disk.
    ///
    /// # Errors
    /// [`NotInUse`]; nothing has changed then.
    pub fn release_used(&mut self, clusters: Range<u64>) -> Result<(), NotInUse> {
        if self.sets().iter().any(|set| set.overlaps(&clusters)) {
            return Err(NotInUse);
        }
        self.released.insert(clusters);
        Ok(())
    }

    /// leaked -> released, unless the cluster is in some state already; whether it was not.
    pub fn take_leaked(&mut self, cluster: u64) -> bool {
        let is_leaked = !self.sets().iter().any(|set| set.contains(cluster));
        if is_leaked {
            self.released.insert(cluster..cluster + 1);
        }
        is_leaked
    }

    /// How many references to each of `clusters` that has others were dropped and are counted still.
    pub fn pending_drops(&self, clusters: &Range<u64>) -> HashMap<u64, u64> {
        let mut drops = HashMap::new();
        let all = self.shared.iter().chain(&self.shared_sealed).chain(&self.shared_released);
        for cluster in all.filter(|cluster| clusters.contains(cluster)) {
            *drops.entry(*cluster).or_default() += 1;
        }
        drops
    }

    /// All references that were dropped and are counted still.
    pub fn dropped(&self) -> Dropped {
        let mut last = ClusterSet::default();
        for set in [&self.junk, &self.junk_sealed, &self.released, &self.punching] {
            last.append(&mut set.clone());
        }
        Dropped { last, one_of_several: self.pending_drops(&(0..u64::MAX)) }
    }

    /// Takes released clusters to punch and free, at most `max`; [`ClusterMap::freed`] or
    /// [`ClusterMap::not_freed`] follows.
    pub fn take_released(&mut self, max: u64) -> Option<Range<u64>> {
        let next = std::mem::take(&mut self.released_next);
        let taken = match self.released.take_first_from(next, max) {
            None if next > 0 => self.released.take_first_from(0, max)?,
            taken => taken?,
        };
        if taken.start >= next {
            self.released_next = next;
        }
        self.punching.insert(taken.clone());
        Some(taken)
    }

    /// Takes a cluster that has lost one of several references, durably.
    pub fn take_shared(&mut self) -> Option<u64> {
        self.shared_released.pop()
    }

    /// One of several references to a cluster is gone from the tables on disk, and is still counted.
    /// It is the last of them to be taken.
    pub fn release_shared(&mut self, cluster: u64) {
        self.shared_released.insert(0, cluster);
    }

    /// released -> free.
    pub fn freed(&mut self, clusters: Range<u64>) {
        self.punching.remove(clusters);
    }

    /// Freeing failed: back to released, and the others come first.
    pub fn not_freed(&mut self, clusters: Range<u64>) {
        if clusters.is_empty() {
            return;
        }
        self.released_next = clusters.end;
        self.punching.remove(clusters.clone());
        self.released.insert(clusters);
    }

    /// free -> erased: counted and zeroed, in memory.
    pub fn add_erased(&mut self, clusters: Range<u64>) {
        match Rule::ErasedWaits.is_kept() {
            true => self.erased.insert(clusters),
            false => self.available.insert(clusters),
        }
    }

    /// available -> rooted: the first consecutive clusters of the pool, at most `wanted`.
    pub fn take_available(&mut self, wanted: u64) -> Option<Range<u64>> {
        let taken = self.available.take_first_from(0, wanted)?;
        self.rooted.insert(taken.clone());
        Some(taken)
    }

    /// free -> rooted, past the pool.
    pub fn add_rooted(&mut self, clusters: Range<u64>) {
        self.rooted.insert(clusters);
    }

    /// rooted -> used.
    pub fn linked(&mut self, clusters: Range<u64>) {
        self.rooted.remove(clusters);
    }

    /// rooted -> released: it never came to a link, but may hold data now.
    pub fn abandoned(&mut self, clusters: Range<u64>) {
        self.rooted.remove(clusters.clone());
        self.released.insert(clusters);
    }

    /// Takes those clusters out of the pool that lie at or after `from`, to be freed.
    pub fn take_pool_from(&mut self, from: u64) -> Vec<Range<u64>> {
        let mut taken = self.available.take_from(from);
        taken.extend(self.erased.take_from(from));
        taken
    }

    /// Clusters that a flush would release.
    pub fn junk(&self) -> u64 {
        self.junk.count()
    }

    /// Clusters in the pool, available or about to be.
    pub fn pool(&self) -> u64 {
        self.available.count() + self.erased.count() + self.erased_sealed.count()
    }

    /// Those of them that lie at or after `from` and could be taken out.
    pub fn pool_from(&self, from: u64) -> u64 {
        self.available.count_from(from) + self.erased.count_from(from)
    }

    /// Whether `cluster` is in the pool, available or about to be.
    pub fn is_in_pool(&self, cluster: u64) -> bool {
        self.available.contains(cluster) || self.erased.contains(cluster)
    }

    /// Whether a flush would advance anything.
    pub fn awaits_flush(&self) -> bool {
        !(self.junk.is_empty() && self.shared.is_empty() && self.erased.is_empty())
    }

    /// Whether released clusters wait to be freed.
    pub fn awaits_freeing(&self) -> bool {
        !(self.released.is_empty() && self.shared_released.is_empty())
    }

    /// How many clusters are in which state.
    pub fn counts(&self) -> StateCounts {
        let shared = self.shared.len() + self.shared_sealed.len();
        StateCounts {
            junk: self.junk.count() + self.junk_sealed.count() + shared as u64,
            released: self.released.count()
                + self.punching.count()
                + self.shared_released.len() as u64,
            erased: self.erased.count() + self.erased_sealed.count(),
            available: self.available.count(),
            rooted: self.rooted.count(),
        }
    }

    /// Two states that have a cluster in common, which none must.
    pub fn overlap(&self) -> Option<(&'static str, &'static str)> {
        const NAMES: [&str; 8] = [
            "junk",
            "junk in a flush",
            "released",
            "being punched",
            "erased",
            "erased in a flush",
            "available",
            "rooted",
        ];
        let sets = self.sets();
        let pairs = (0..sets.len()).flat_map(|i| (0..i).map(move |j| (i, j)));
        pairs.into_iter().find(|&(i, j)| sets[i].meets(sets[j])).map(|(i, j)| (NAMES[j], NAMES[i]))
    }

    /// Whether a cluster is in any state, or has lost a reference that is still counted.
    pub fn is_on_its_way(&self, cluster: u64) -> bool {
        let shared = [&self.shared, &self.shared_sealed, &self.shared_released];
        self.sets().iter().any(|set| set.contains(cluster))
            || shared.iter().any(|dropped| dropped.contains(&cluster))
    }

    fn sets(&self) -> [&ClusterSet; 8] {
        [
            &self.junk,
            &self.junk_sealed,
            &self.released,
            &self.punching,
            &self.erased,
            &self.erased_sealed,
            &self.available,
            &self.rooted,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_goes_the_whole_way_round() {
        let mut map = ClusterMap::default();
        map.drop_used(4..6).unwrap();
        assert!(map.seal());
        map.drop_used(9..10).unwrap();
        map.settle(true);
        assert_eq!(map.counts(), StateCounts { junk: 1, released: 2, ..Default::default() });
        assert_eq!(map.take_released(10), Some(4..6));
        assert_eq!(map.take_released(10), None, "9 has not seen a flush");
        map.freed(4..6);
        map.add_erased(4..5);
        assert_eq!(map.take_available(1), None, "not durably erased yet");
        map.seal();
        map.settle(true);
        assert_eq!(map.take_available(3), Some(4..5));
        map.linked(4..5);
        assert_eq!(map.counts(), StateCounts { released: 1, ..Default::default() });
    }

    #[test]
    fn a_cluster_in_two_states_is_found() {
        let mut map = ClusterMap::default();
        map.drop_used(4..6).unwrap();
        map.add_rooted(6..7);
        assert_eq!(map.overlap(), None);
        map.add_erased(5..6);
        assert_eq!(map.overlap(), Some(("junk", "erased")));
        map.drop_shared(9);
        assert!(map.is_on_its_way(6) && map.is_on_its_way(9) && !map.is_on_its_way(7));
    }

    #[test]
    fn a_failed_flush_advances_nothing() {
        let mut map = ClusterMap::default();
        map.drop_used(1..3).unwrap();
        map.add_erased(7..8);
        map.seal();
        map.settle(false);
        assert_eq!(map.counts(), StateCounts { junk: 2, erased: 1, ..Default::default() });
        assert!(map.awaits_flush() && !map.awaits_freeing());
    }

    #[test]
    fn dropping_a_cluster_that_is_not_in_use_is_noticed_in_every_state() {
        let mut map = ClusterMap::default();
        map.drop_used(0..1).unwrap();
        map.seal();
        map.settle(true);
        map.take_released(1);
        map.release(1..2);
        map.drop_used(2..3).unwrap();
        map.add_erased(3..4);
        map.seal();
        map.drop_used(4..5).unwrap();
        map.add_erased(5..6);
        map.add_rooted(6..7);
        for cluster in 0..7 {
            assert_eq!(map.drop_used(cluster..cluster + 1), Err(NotInUse), "{cluster}");
        }
        assert_eq!(map.drop_used(7..8), Ok(()));
    }

    #[test]
    fn what_is_given_up_is_punched_before_it_is_used_again() {
        let mut map = ClusterMap::default();
        map.add_rooted(3..5);
        map.abandoned(3..5);
        assert_eq!(map.take_available(1), None);
        assert_eq!(map.take_released(9), Some(3..5));
    }
}
