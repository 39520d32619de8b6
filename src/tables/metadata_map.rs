//! Which host clusters hold metadata: header, tables, refcount blocks.
//!
//! Data is never written to, read from or punched out of such a cluster, and none is ever handed
//! out (invariant 5). The map is built from the L1 and refcount tables at open and kept up to date;
//! a look-up is one hash and one bit. Its lock is a leaf.

use std::collections::HashMap;
use std::ops::Range;

use parking_lot::RwLock;

use crate::format::HostCluster;

const WORDS: usize = 64;
const PAGE_BITS: u64 = (WORDS * 64) as u64;

/// A set of host clusters, as a paged bitmap: memory follows the number of metadata clusters.
#[derive(Debug, Default)]
pub struct MetadataMap {
    pages: RwLock<HashMap<u64, Box<[u64; WORDS]>>>,
}

impl MetadataMap {
    /// Marks a cluster; whether it was not marked before.
    pub fn insert(&self, cluster: HostCluster) -> bool {
        let (page, word, bit) = locate(cluster);
        let mut pages = self.pages.write();
        let word = &mut pages.entry(page).or_insert_with(|| Box::new([0; WORDS]))[word];
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }

    /// The cluster is no metadata any more.
    pub fn remove(&self, cluster: HostCluster) {
        let (page, word, bit) = locate(cluster);
        let mut pages = self.pages.write();
        if let Some(words) = pages.get_mut(&page) {
            words[word] &= !bit;
            if words.iter().all(|w| *w == 0) {
                pages.remove(&page);
            }
        }
    }

    /// Whether the cluster holds metadata.
    pub fn contains(&self, cluster: HostCluster) -> bool {
        let (page, word, bit) = locate(cluster);
        self.pages.read().get(&page).is_some_and(|words| words[word] & bit != 0)
    }

    /// Whether any of `clusters` holds metadata, however many they are.
    pub fn any_in(&self, clusters: &Range<u64>) -> bool {
        self.pages.read().iter().any(|(page, words)| {
            let first = page * PAGE_BITS;
            let mut within = clusters.start.max(first)..clusters.end.min(first + PAGE_BITS);
            within.any(|cluster| {
                let (_, word, bit) = locate(HostCluster(cluster));
                words[word] & bit != 0
            })
        })
    }

    /// The first of `count` clusters from `first` that holds metadata.
    pub fn first_in(&self, first: HostCluster, count: u64) -> Option<HostCluster> {
        let pages = self.pages.read();
        let mut cached: Option<(u64, Option<&Box<[u64; WORDS]>>)> = None;
        (first.0..first.0 + count).map(HostCluster).find(|cluster| {
            let (page, word, bit) = locate(*cluster);
            let words = match cached {
                Some((p, words)) if p == page => words,
                _ => cached.insert((page, pages.get(&page))).1,
            };
            words.is_some_and(|words| words[word] & bit != 0)
        })
    }
}

fn locate(cluster: HostCluster) -> (u64, usize, u64) {
    let within = cluster.0 % PAGE_BITS;
    (cluster.0 / PAGE_BITS, (within / 64) as usize, 1 << (within % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_are_found_across_pages_and_forgotten_when_removed() {
        let map = MetadataMap::default();
        for cluster in [0, 63, 64, PAGE_BITS - 1, PAGE_BITS, 1 << 54] {
            assert!(map.insert(HostCluster(cluster)));
            assert!(!map.insert(HostCluster(cluster)), "already there");
        }
        assert!(!map.contains(HostCluster(1)));
        assert_eq!(map.first_in(HostCluster(1), 62), None);
        assert_eq!(map.first_in(HostCluster(1), 63), Some(HostCluster(63)));
        assert_eq!(map.first_in(HostCluster(65), PAGE_BITS), Some(HostCluster(PAGE_BITS - 1)));
        assert!(!map.any_in(&(65..PAGE_BITS - 1)));
        assert!(map.any_in(&(65..PAGE_BITS)) && map.any_in(&(PAGE_BITS + 1..u64::MAX)));
        map.remove(HostCluster(PAGE_BITS));
        assert!(!map.contains(HostCluster(PAGE_BITS)));
        assert!(map.contains(HostCluster(1 << 54)));
    }
}
