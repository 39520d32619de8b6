//! A set of host clusters.

use std::ops::Range;

use roaring::RoaringTreemap;

/// A set of cluster numbers, as compressed bitmaps: however scattered they are, 65,536 consecutive
/// clusters take at most 8 KiB (with 64 KiB clusters a byte for each 512 KiB of the file), and a
/// long run of them next to nothing.
#[derive(Clone, Debug, Default)]
pub struct ClusterSet {
    clusters: RoaringTreemap,
    count: u64,
}

impl ClusterSet {
    /// Adds clusters, none of which is in the set.
    pub fn insert(&mut self, clusters: Range<u64>) {
        let wanted = clusters.end.saturating_sub(clusters.start);
        let inserted = self.clusters.insert_range(clusters.clone());
        debug_assert_eq!(inserted, wanted, "some of {clusters:?} are in the set already");
        self.count += inserted;
    }

    /// Adds a cluster that may be in the set.
    pub fn add(&mut self, cluster: u64) {
        self.count += u64::from(self.clusters.insert(cluster));
    }

    /// Removes clusters, all of which are in the set.
    pub fn remove(&mut self, clusters: Range<u64>) {
        let wanted = clusters.end.saturating_sub(clusters.start);
        let removed = self.clusters.remove_range(clusters.clone());
        debug_assert_eq!(removed, wanted, "some of {clusters:?} are not in the set");
        self.count -= removed;
    }

    /// Takes the first run at or after `from` out, at most `max` clusters of it.
    pub fn take_first_from(&mut self, from: u64, max: u64) -> Option<Range<u64>> {
        let first = self.runs_from(from).next()?;
        let taken = first.start..first.end.min(first.start.saturating_add(max));
        self.remove(taken.clone());
        Some(taken)
    }

    /// The runs at or after `from`, a run at most as long as one step of anything is.
    fn runs_from(&self, from: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        const LONGEST: u64 = 1 << 16;
        let mut rest = self.clusters.iter();
        rest.advance_to(from);
        let mut rest = rest.peekable();
        std::iter::from_fn(move || {
            let start = rest.next()?;
            let mut end = start + 1;
            while end - start < LONGEST && rest.next_if_eq(&end).is_some() {
                end += 1;
            }
            Some(start..end)
        })
    }

    /// The number of clusters at or after `from`.
    pub fn count_from(&self, from: u64) -> u64 {
        match from.checked_sub(1) {
            Some(before) => self.count - self.clusters.rank(before),
            None => self.count,
        }
    }

    /// Takes out all clusters at or after `from`.
    pub fn take_from(&mut self, from: u64) -> Vec<Range<u64>> {
        let taken: Vec<_> = self.runs_from(from).collect();
        taken.iter().cloned().for_each(|run| self.remove(run));
        taken
    }

    /// Adds everything that `other` holds, which is empty afterwards.
    pub fn append(&mut self, other: &mut ClusterSet) {
        let other = std::mem::take(other);
        if self.count == 0 {
            *self = other;
        } else {
            self.count += other.count;
            self.clusters |= other.clusters;
            debug_assert_eq!(self.count, self.clusters.len(), "a cluster was in both sets");
        }
    }

    /// Whether any of `clusters` is in the set.
    pub fn overlaps(&self, clusters: &Range<u64>) -> bool {
        if self.count == 0 || clusters.is_empty() {
            return false;
        }
        let mut rest = self.clusters.iter();
        rest.advance_to(clusters.start);
        rest.next().is_some_and(|next| next < clusters.end)
    }

    /// Whether it has a cluster in common with `other`.
    pub fn meets(&self, other: &ClusterSet) -> bool {
        !self.clusters.is_disjoint(&other.clusters)
    }

    /// Whether `cluster` is in the set.
    pub fn contains(&self, cluster: u64) -> bool {
        self.clusters.contains(cluster)
    }

    /// The number of clusters.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_follow_inserts_removals_and_takes() {
        let mut set = ClusterSet::default();
        set.insert(5..8);
        set.insert(8..10);
        set.insert(1..2);
        assert_eq!(set.count(), 6);
        assert_eq!(set.take_first_from(0, 10), Some(1..2));
        assert_eq!(set.take_first_from(0, 2), Some(5..7));
        set.remove(8..9);
        assert_eq!(set.count(), 2);
        assert!(set.contains(7) && !set.contains(8) && set.contains(9));
        let mut other = ClusterSet::default();
        other.insert(20..30);
        set.append(&mut other);
        assert!(other.is_empty());
        assert_eq!(set.count_from(9), 11);
        assert_eq!(set.take_from(9), [9..10, 20..30]);
        assert_eq!(set.count(), 1);
    }

    #[test]
    fn scattered_clusters_take_less_than_a_byte_for_each_32_kib_of_the_file() {
        let mut set = ClusterSet::default();
        let clusters = 1 << 20;
        (0..clusters).step_by(2).for_each(|c| set.insert(c..c + 1));
        let file = clusters << 16;
        assert!((set.clusters.serialized_size() as u64) * 8 < file / 32768, "eight sets of a map");
    }

    #[test]
    fn overlaps_are_seen_at_both_ends_of_a_range_and_nowhere_else() {
        let mut set = ClusterSet::default();
        set.insert(1 << 33..(1 << 33) + 10);
        let at = 1 << 33;
        for (range, overlaps) in [
            (0..at, false),
            (0..at + 1, true),
            (at + 9..at + 10, true),
            (at + 10..u64::MAX, false),
            (at + 5..at + 5, false),
        ] {
            assert_eq!(set.overlaps(&range), overlaps, "{range:?}");
        }
    }
}
