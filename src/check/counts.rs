//! A count for each host cluster that has one.
//!
//! The memory follows the number of counted clusters, and hardly depends on where in the file they are:
//! a bit or two for each where they lie together, and some bytes for each where they do not.

use std::ops::Range;

use roaring::RoaringTreemap;

use crate::format::HostCluster;

/// How many references host clusters have.
#[derive(Debug, Default)]
pub(super) struct ClusterCounts {
    /// Those that have any.
    counted: RoaringTreemap,
    /// How many more than one they have, in binary: plane `n` has the clusters with bit `n` set.
    planes: Vec<RoaringTreemap>,
}

impl ClusterCounts {
    /// Counts `times` more references to a cluster.
    pub(super) fn add(&mut self, cluster: HostCluster, times: u64) {
        let Some(fewer) = times.checked_sub(1) else { return };
        let is_new = self.counted.insert(cluster.0);
        let mut more = if is_new { fewer } else { times };
        // Each bit that is set in both goes on to the next plane.
        let mut bit = 0;
        while more >> bit != 0 {
            if bit == self.planes.len() {
                self.planes.push(RoaringTreemap::new());
            }
            if more >> bit & 1 == 1 && !self.planes[bit].insert(cluster.0) {
                self.planes[bit].remove(cluster.0);
                match more.checked_add(1 << bit) {
                    Some(sum) => more = sum,
                    None => return self.saturate(cluster),
                }
            }
            bit += 1;
            if bit == u64::BITS as usize {
                return;
            }
        }
    }

    /// From now on it has as many as can be counted.
    fn saturate(&mut self, cluster: HostCluster) {
        self.planes.resize_with(u64::BITS as usize, RoaringTreemap::new);
        for plane in &mut self.planes {
            plane.insert(cluster.0);
        }
    }

    /// The references to a cluster.
    pub(super) fn get(&self, cluster: HostCluster) -> u64 {
        match self.counted.contains(cluster.0) {
            true => self.count_of(|plane| self.planes[plane].contains(cluster.0)),
            false => 0,
        }
    }

    /// The counted clusters of `range` in ascending order, with their counts.
    pub(super) fn range(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut planes: Vec<_> =
            self.planes.iter().map(|plane| from(plane, range.start).peekable()).collect();
        let counted = from(&self.counted, range.start).take_while(move |next| *next < range.end);
        counted.map(move |cluster| {
            let count = self.count_of(|plane| {
                while planes[plane].next_if(|next| *next < cluster).is_some() {}
                planes[plane].next_if_eq(&cluster).is_some()
            });
            (cluster, count)
        })
    }

    /// The first cluster after all that are counted.
    pub(super) fn end(&self) -> HostCluster {
        HostCluster(self.counted.max().map_or(0, |last| last.saturating_add(1)))
    }

    /// The count of a cluster that has one, and is in the planes that `is_in` says.
    fn count_of(&self, mut is_in: impl FnMut(usize) -> bool) -> u64 {
        let bits = (0..self.planes.len()).map(|plane| u64::from(is_in(plane)) << plane);
        bits.fold(0, |more, bit| more | bit).saturating_add(1)
    }
}

/// The clusters of a set from `first` on.
fn from(clusters: &RoaringTreemap, first: u64) -> impl Iterator<Item = u64> + '_ {
    let mut clusters = clusters.iter();
    clusters.advance_to(first);
    clusters
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn counts_agree_with_a_plain_map() {
        let mut counts = ClusterCounts::default();
        let mut model = BTreeMap::new();
        let mut seed = 7u64;
        for _ in 0..5000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let cluster = seed >> 33 & 0x3ff | (seed >> 20 & 1) << 40;
            let times = seed >> 50 & 0x3f;
            counts.add(HostCluster(cluster), times);
            *model.entry(cluster).or_insert(0u64) += times;
        }
        model.retain(|_, count| *count != 0);
        assert!(model.values().any(|&n| n > 255) && model.values().any(|&n| n < 255));
        for range in [0..u64::MAX, 100..700, 5..5, 64..128] {
            let found: Vec<_> = counts.range(range.clone()).collect();
            let expected: Vec<_> = model.range(range).map(|(&c, &n)| (c, n)).collect();
            assert_eq!(found, expected);
        }
        for (&cluster, &count) in &model {
            assert_eq!(counts.get(HostCluster(cluster)), count);
        }
        assert_eq!(Some(&(counts.end().0 - 1)), model.keys().last());
    }

    #[test]
    fn a_count_saturates() {
        let mut counts = ClusterCounts::default();
        counts.add(HostCluster(3), u64::MAX);
        counts.add(HostCluster(3), 2);
        assert_eq!(counts.get(HostCluster(3)), u64::MAX);
    }
}
