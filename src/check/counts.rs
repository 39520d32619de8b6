//! A count for each host cluster that has one.
//!
//! The memory follows the number of counted clusters, wherever in the file they are: about two
//! bytes each when they lie together, and no more than some hundred each when they do not.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::format::HostCluster;

/// Counts in one page.
const PAGE: u64 = 64;
/// A byte in a page that says: the count is in `large`.
const LARGE: u8 = u8::MAX;

/// How many references host clusters have.
#[derive(Debug, Default)]
pub(super) struct ClusterCounts {
    /// Pages by the number of their first cluster divided by [`PAGE`].
    pages: BTreeMap<u64, [u8; PAGE as usize]>,
    /// The counts that do not fit a byte of a page.
    large: BTreeMap<u64, u64>,
}

impl ClusterCounts {
    /// Counts `times` more references to a cluster.
    pub(super) fn add(&mut self, cluster: HostCluster, times: u64) {
        let page = self.pages.entry(cluster.0 / PAGE).or_insert([0; PAGE as usize]);
        let slot = &mut page[(cluster.0 % PAGE) as usize];
        match u64::from(*slot).saturating_add(times) {
            _ if *slot == LARGE => {
                let count = self.large.entry(cluster.0).or_default();
                *count = count.saturating_add(times);
            }
            sum if sum < u64::from(LARGE) => *slot = sum as u8,
            sum => {
                *slot = LARGE;
                self.large.insert(cluster.0, sum);
            }
        }
    }

    /// The references to a cluster.
    pub(super) fn get(&self, cluster: HostCluster) -> u64 {
        match self.pages.get(&(cluster.0 / PAGE)) {
            Some(page) => self.value(cluster.0, page[(cluster.0 % PAGE) as usize]),
            None => 0,
        }
    }

    /// The counted clusters of `range` in ascending order, with their counts.
    pub(super) fn range(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u64)> + '_ {
        let pages = match range.is_empty() {
            true => 0..0,
            false => range.start / PAGE..range.end.div_ceil(PAGE),
        };
        self.pages
            .range(pages)
            .flat_map(|(number, page)| {
                (0..PAGE).zip(page).map(move |(i, byte)| (number * PAGE + i, *byte))
            })
            .filter(move |(cluster, byte)| *byte != 0 && range.contains(cluster))
            .map(|(cluster, byte)| (cluster, self.value(cluster, byte)))
    }

    /// The first cluster after all that are counted.
    pub(super) fn end(&self) -> HostCluster {
        let last = self.pages.last_key_value().and_then(|(number, page)| {
            (0..PAGE).rev().find(|&i| page[i as usize] != 0).map(|i| number * PAGE + i + 1)
        });
        HostCluster(last.unwrap_or(0))
    }

    fn value(&self, cluster: u64, byte: u8) -> u64 {
        match byte {
            LARGE => self.large.get(&cluster).copied().unwrap_or(u64::from(LARGE)),
            byte => u64::from(byte),
        }
    }
}

#[cfg(test)]
mod tests {
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
