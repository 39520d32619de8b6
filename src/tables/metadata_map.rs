//! Which host clusters hold metadata: header, tables, refcount blocks.
//!
//! Data is never written to, read from or punched out of such a cluster, and none is ever handed
//! out (invariant 5). The map is built from the L1 and refcount tables at open and kept up to date;
//! a look-up is one hash and one bit. Its lock is a leaf.

use std::collections::HashMap;
use std::ops::Range;

use parking_lot::RwLock;

use crate::format::HostCluster;

/// Clusters in one word.
const WORD: u64 = u64::BITS as u64;

/// A set of host clusters, as words of a sparse bitmap: memory follows the number of metadata
/// clusters, wherever an image says that they are.
#[derive(Debug, Default)]
pub struct MetadataMap {
    words: RwLock<HashMap<u64, u64>>,
}

impl MetadataMap {
    /// Marks a cluster; whether it was not marked before.
    pub fn insert(&self, cluster: HostCluster) -> bool {
        let (at, bit) = locate(cluster);
        let mut words = self.words.write();
        let word = words.entry(at).or_default();
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }

    /// The cluster is no metadata any more.
    pub fn remove(&self, cluster: HostCluster) {
        let (at, bit) = locate(cluster);
        let mut words = self.words.write();
        if let Some(word) = words.get_mut(&at) {
            *word &= !bit;
            if *word == 0 {
                words.remove(&at);
            }
        }
    }

    /// Whether the cluster holds metadata.
    pub fn contains(&self, cluster: HostCluster) -> bool {
        let (at, bit) = locate(cluster);
        self.words.read().get(&at).is_some_and(|word| word & bit != 0)
    }

    /// Whether any of `clusters` holds metadata, however many they are.
    pub fn any_in(&self, clusters: &Range<u64>) -> bool {
        self.words.read().iter().any(|(at, word)| {
            let first = at * WORD;
            first < clusters.end
                && clusters.start < first + WORD
                && (0..WORD).any(|i| word & 1 << i != 0 && clusters.contains(&(first + i)))
        })
    }

    /// The first of `count` clusters from `first` that holds metadata.
    pub fn first_in(&self, first: HostCluster, count: u64) -> Option<HostCluster> {
        let words = self.words.read();
        let mut cached: Option<(u64, u64)> = None;
        (first.0..first.0 + count).map(HostCluster).find(|cluster| {
            let (at, bit) = locate(*cluster);
            let word = match cached {
                Some((cached_at, word)) if cached_at == at => word,
                _ => cached.insert((at, words.get(&at).copied().unwrap_or_default())).1,
            };
            word & bit != 0
        })
    }
}

/// The word that a cluster is in, and its bit.
fn locate(cluster: HostCluster) -> (u64, u64) {
    (cluster.0 / WORD, 1 << (cluster.0 % WORD))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAR: u64 = 4096;

    #[test]
    fn tables_that_an_image_scatters_take_no_more_memory_than_those_in_a_row() {
        let map = MetadataMap::default();
        for i in 0..100_000 {
            map.insert(HostCluster(i << 20));
        }
        let entry = size_of::<(u64, u64)>();
        assert!(map.words.read().capacity() * entry <= 100_000 * 4 * entry);
    }

    #[test]
    fn clusters_are_found_across_pages_and_forgotten_when_removed() {
        let map = MetadataMap::default();
        for cluster in [0, 63, 64, FAR - 1, FAR, 1 << 54] {
            assert!(map.insert(HostCluster(cluster)));
            assert!(!map.insert(HostCluster(cluster)), "already there");
        }
        assert!(!map.contains(HostCluster(1)));
        assert_eq!(map.first_in(HostCluster(1), 62), None);
        assert_eq!(map.first_in(HostCluster(1), 63), Some(HostCluster(63)));
        assert_eq!(map.first_in(HostCluster(65), FAR), Some(HostCluster(FAR - 1)));
        assert!(!map.any_in(&(65..FAR - 1)));
        assert!(map.any_in(&(65..FAR)) && map.any_in(&(FAR + 1..u64::MAX)));
        map.remove(HostCluster(FAR));
        assert!(!map.contains(HostCluster(FAR)));
        assert!(map.contains(HostCluster(1 << 54)));
    }
}
