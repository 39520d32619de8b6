//! A set of host clusters that are mostly consecutive.

use std::ops::Range;

use rangemap::RangeSet;

/// A set of cluster numbers, stored as ranges; memory follows the number of ranges.
#[derive(Clone, Debug, Default)]
pub struct ClusterSet {
    ranges: RangeSet<u64>,
    count: u64,
}

impl ClusterSet {
    /// Adds clusters, none of which is in the set.
    pub fn insert(&mut self, clusters: Range<u64>) {
        debug_assert!(!self.overlaps(&clusters), "{clusters:?} is in the set already");
        if !clusters.is_empty() {
            self.count += clusters.end - clusters.start;
            self.ranges.insert(clusters);
        }
    }

    /// Removes clusters, all of which are in the set.
    pub fn remove(&mut self, clusters: Range<u64>) {
        if clusters.is_empty() {
            return;
        }
        debug_assert!(
            self.ranges.get(&clusters.start).is_some_and(|r| r.end >= clusters.end),
            "{clusters:?} is not in the set"
        );
        self.count -= clusters.end - clusters.start;
        self.ranges.remove(clusters);
    }

    /// Takes the first range out, at most `max` clusters of it.
    pub fn take_first(&mut self, max: u64) -> Option<Range<u64>> {
        let first = self.ranges.first()?.clone();
        let taken = first.start..first.end.min(first.start.saturating_add(max));
        self.remove(taken.clone());
        Some(taken)
    }

    fn from(&self, from: u64) -> impl Iterator<Item = Range<u64>> {
        self.ranges.overlapping(from..u64::MAX).map(move |r| r.start.max(from)..r.end)
    }

    /// The number of clusters at or after `from`.
    pub fn count_from(&self, from: u64) -> u64 {
        self.from(from).map(|r| r.end - r.start).sum()
    }

    /// Takes out all clusters at or after `from`.
    pub fn take_from(&mut self, from: u64) -> Vec<Range<u64>> {
        let taken: Vec<_> = self.from(from).collect();
        taken.iter().cloned().for_each(|r| self.remove(r));
        taken
    }

    /// Adds everything that `other` holds, which is empty afterwards.
    pub fn append(&mut self, other: &mut ClusterSet) {
        let other = std::mem::take(other);
        if self.count == 0 {
            *self = other;
        } else {
            other.ranges.into_iter().for_each(|r| self.insert(r));
        }
    }

    /// Whether any of `clusters` is in the set.
    pub fn overlaps(&self, clusters: &Range<u64>) -> bool {
        !clusters.is_empty() && self.ranges.overlaps(clusters)
    }

    /// Whether `cluster` is in the set.
    pub fn contains(&self, cluster: u64) -> bool {
        self.ranges.contains(&cluster)
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
        assert_eq!(set.take_first(10), Some(1..2));
        assert_eq!(set.take_first(2), Some(5..7));
        set.remove(8..9);
        assert_eq!(set.count(), 2);
        assert!(set.contains(7) && !set.contains(8) && set.contains(9));
        let mut other = ClusterSet::default();
        other.insert(20..30);
        set.append(&mut other);
        assert!(other.is_empty());
        assert_eq!(set.take_from(9), [9..10, 20..30]);
        assert_eq!(set.count(), 1);
    }
}
