//! Which host clusters hold metadata - header, tables, refcount blocks, bitmaps - and where the
//! file ends.
//!
//! Data is never written to, read from or punched out of a cluster that holds metadata, and none is
//! ever handed out (invariant 5). The map is built from the L1 and refcount tables at open and kept
//! up to date; a look-up is one hash and one bit. Its locks are leaves, taken one at a time.
//!
//! A cluster stays in the map until its owner has given it up and nothing is counted for it any more:
//! a refcount alone, which an image may have wrong, takes nothing out of it.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use foldhash::{HashMap, HashSet};
use parking_lot::{RwLock, RwLockWriteGuard};

use crate::error::{Error, ErrorKind, Result};
use crate::format::HostCluster;

/// Clusters in one word.
const WORD: u64 = u64::BITS as u64;
/// An image that is opened may fill so many words, which takes up to 27 MiB: as many L2 tables as
/// 1.7 TiB of data need in clusters of 4 KiB, or 400 TiB in those of 64 KiB.
const MAX_WORDS: usize = 7 << 17;

/// A set of host clusters, as words of a sparse bitmap: memory follows the number of metadata
/// clusters, wherever an image says that they are.
#[derive(Debug)]
pub struct MetadataMap {
    words: RwLock<HashMap<u64, u64>>,
    /// Those that are given up and not free yet.
    given_up: RwLock<HashSet<u64>>,
    /// The first cluster past all that were ever in the file since it was opened.
    end: AtomicU64,
}

impl MetadataMap {
    /// The map of a file of `end` clusters, the last of which need not be whole, with nothing in it.
    pub fn new(end: u64) -> Self {
        MetadataMap {
            words: RwLock::default(),
            given_up: RwLock::default(),
            end: AtomicU64::new(end),
        }
    }

    /// The file has `end` clusters at least.
    pub fn grow_to(&self, end: u64) {
        self.end.fetch_max(end, Ordering::Release);
    }

    /// Whether all of `clusters` lie within the file.
    pub fn is_in_file(&self, clusters: &Range<u64>) -> bool {
        clusters.end <= self.end.load(Ordering::Acquire)
    }

    /// Whether an image that is being opened may enter more.
    ///
    /// # Errors
    /// `TooBig`: its tables are so many, and so far from each other, that no sound image has the
    /// like.
    pub fn check_room(&self) -> Result<()> {
        check_room(&self.words.read())
    }

    /// The map for who enters all tables of an image that is being opened. Nobody else looks into it
    /// meanwhile.
    pub fn fill(&self) -> Filling<'_> {
        Filling { map: self, words: self.words.write() }
    }

    /// Marks a cluster; whether it was not marked before.
    pub fn insert(&self, cluster: HostCluster) -> bool {
        self.take_back(cluster);
        insert(&mut self.words.write(), cluster)
    }

    /// The owner of `clusters` refers to them no more: they are no metadata any more once they are free
    /// ([`MetadataMap::remove`]).
    pub fn give_up(&self, clusters: Range<u64>) {
        self.given_up.write().extend(clusters);
    }

    fn take_back(&self, cluster: HostCluster) {
        let is_given_up = self.given_up.read().contains(&cluster.0);
        if is_given_up {
            self.given_up.write().remove(&cluster.0);
        }
    }

    /// Whether the cluster holds metadata that nobody has given up.
    pub fn is_kept(&self, cluster: HostCluster) -> bool {
        self.contains(cluster) && !self.given_up.read().contains(&cluster.0)
    }

    /// The cluster is no metadata any more.
    pub fn remove(&self, cluster: HostCluster) {
        self.take_back(cluster);
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

/// See [`MetadataMap::fill`].
pub struct Filling<'a> {
    map: &'a MetadataMap,
    words: RwLockWriteGuard<'a, HashMap<u64, u64>>,
}

impl Filling<'_> {
    /// Marks a cluster, wherever it is, if it lies in the file; what is wrong with it.
    ///
    /// # Errors
    /// As [`MetadataMap::check_room`].
    pub fn enter(&mut self, cluster: HostCluster) -> Result<Option<&'static str>> {
        check_room(&self.words)?;
        Ok(if !self.map.is_in_file(&(cluster.0..cluster.0 + 1)) {
            Some("points past the end of the file")
        } else if !insert(&mut self.words, cluster) {
            Some("points to other metadata")
        } else {
            None
        })
    }
}

fn check_room(words: &HashMap<u64, u64>) -> Result<()> {
    if words.len() < MAX_WORDS {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::TooBig,
        format!(
            "the tables of the image are in more than {MAX_WORDS} places: copy it to one with \
             larger clusters, with `qemu-img convert`"
        ),
    ))
}

fn insert(words: &mut HashMap<u64, u64>, cluster: HostCluster) -> bool {
    let (at, bit) = locate(cluster);
    let word = words.entry(at).or_default();
    let is_new = *word & bit == 0;
    *word |= bit;
    is_new
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
        let map = MetadataMap::new(u64::MAX);
        for i in 0..100_000 {
            map.insert(HostCluster(i << 20));
        }
        let entry = size_of::<(u64, u64)>();
        assert!(map.words.read().capacity() * entry <= 100_000 * 4 * entry);
    }

    #[test]
    fn clusters_are_found_across_pages_and_forgotten_when_removed() {
        let map = MetadataMap::new(FAR + 10);
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
        assert!(map.is_in_file(&(0..FAR + 10)) && !map.is_in_file(&(0..FAR + 11)));
        map.grow_to(FAR + 11);
        assert!(map.is_in_file(&(0..FAR + 11)));
        map.remove(HostCluster(FAR));
        assert!(!map.contains(HostCluster(FAR)));
        assert!(map.contains(HostCluster(1 << 54)));
    }

    #[test]
    fn metadata_is_kept_until_it_is_given_up_and_again_once_it_is_back() {
        let map = MetadataMap::new(FAR);
        let cluster = HostCluster(9);
        assert!(!map.is_kept(cluster));
        map.insert(cluster);
        assert!(map.is_kept(cluster));
        map.give_up(9..10);
        assert!(!map.is_kept(cluster) && map.contains(cluster), "given up, not free yet");
        map.remove(cluster);
        map.insert(cluster);
        assert!(map.is_kept(cluster), "metadata again");
        map.give_up(9..10);
        assert!(!map.insert(cluster), "it is there");
        assert!(map.is_kept(cluster), "somebody refers to it again");
    }
}
