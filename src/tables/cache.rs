//! A bounded cache of metadata: slices of the L2 tables or of the refcount blocks.
//!
//! A slice is a piece of a metadata cluster, [`SliceCache::slice_size`] bytes, kept as it stands
//! on disk. Changes mark 512-byte sectors dirty; a flush takes a copy of the dirty sectors, writes
//! it without any lock, and says how it went. A slice that is dirty or being written is never
//! evicted, so a load from disk can never see less than the cache had.
//!
//! The cache does no I/O and has no lock of its own.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use foldhash::{HashMap, HashMapExt};

use crate::memory::Share;

/// What one metadata write is: this content at this host offset, whole sectors.
pub type Write = (u64, Vec<u8>);

const SECTOR: usize = 512;
/// Small enough that a random read loads little, large enough that a scan makes few reads.
const MAX_SLICE: u64 = 4096;
/// How far one insertion looks for something to evict. Where most of the cache is dirty it stays
/// over its capacity until the next flush rather than looking through it all each time.
const MAX_EVICTION_STEPS: usize = 64;
/// However short memory is, so many slices stay: [`KEPT`](crate::memory::KEPT) where they are largest.
const MIN_SLICES: usize = 16;

/// The cache. Keys are the host offsets of slices.
#[derive(Debug)]
pub struct SliceCache {
    slice_size: u64,
    /// Clean slices beyond this number are evicted.
    capacity: usize,
    slices: HashMap<u64, Slice>,
    /// Second-chance order of eviction.
    clock: VecDeque<u64>,
    dirty: BTreeSet<u64>,
    forgotten: u64,
    /// The bytes of all slices.
    share: Arc<Share>,
}

#[derive(Debug)]
struct Slice {
    bytes: Box<[u8]>,
    /// One bit a sector, changed since the last [`SliceCache::take_dirty`].
    dirty: u8,
    /// One bit a sector, in a flush that is under way.
    writing: u8,
    used: AtomicBool,
}

impl SliceCache {
    /// An empty cache for metadata clusters of `cluster_size` bytes that keeps about `bytes` bytes
    /// of clean slices, and tells `share` what it holds.
    pub fn new(cluster_size: u64, bytes: u64, share: Arc<Share>) -> Self {
        let slice_size = cluster_size.min(MAX_SLICE);
        SliceCache {
            slice_size,
            capacity: (bytes / slice_size).max(MIN_SLICES as u64) as usize,
            slices: HashMap::new(),
            clock: VecDeque::new(),
            dirty: BTreeSet::new(),
            forgotten: 0,
            share,
        }
    }

    /// Bytes in a slice.
    pub fn slice_size(&self) -> u64 {
        self.slice_size
    }

    /// The key of the slice that host offset `offset` lies in.
    pub fn key(&self, offset: u64) -> u64 {
        offset & !(self.slice_size - 1)
    }

    /// The bytes of the slice at `key`.
    pub fn get(&self, key: u64) -> Option<&[u8]> {
        let slice = self.slices.get(&key)?;
        if !slice.used.load(Ordering::Relaxed) {
            slice.used.store(true, Ordering::Relaxed);
        }
        Some(&slice.bytes)
    }

    /// The first slice that is here of those that start in `range`, which starts with one.
    pub fn first_in(&self, range: Range<u64>) -> Option<u64> {
        self.keys(range).find(|key| self.slices.contains_key(key))
    }

    /// The last one, likewise.
    pub fn last_in(&self, range: Range<u64>) -> Option<u64> {
        self.keys(range).rfind(|key| self.slices.contains_key(key))
    }

    fn keys(&self, range: Range<u64>) -> impl DoubleEndedIterator<Item = u64> {
        let size = self.slice_size;
        (range.start / size..range.end.div_ceil(size)).map(move |slice| slice * size)
    }

    /// Changes the slice at `key`, whose bytes `changed` will differ; `None` when it is not here.
    pub fn get_mut(&mut self, key: u64, changed: Range<usize>) -> Option<&mut [u8]> {
        let slice = self.slices.get_mut(&key)?;
        slice.dirty |= sectors(&changed);
        self.dirty.insert(key);
        Some(&mut slice.bytes)
    }

    /// Puts a slice here as it stands on disk. A slice that is here already stays: it is newer.
    /// Returns the bytes of one that is here no more, for the next load to read into.
    pub fn insert(&mut self, key: u64, bytes: Box<[u8]>) -> Option<Box<[u8]>> {
        self.add(key, bytes, 0)
    }

    /// Puts a new metadata cluster here, all zeros and to be written whole. Nothing of it may be
    /// in the cache.
    pub fn insert_zeroed_cluster(&mut self, offset: u64, cluster_size: u64) {
        for key in (offset..offset + cluster_size).step_by(self.slice_size as usize) {
            debug_assert!(!self.slices.contains_key(&key), "stale slice at {key:#x}");
            let bytes = vec![0; self.slice_size as usize].into_boxed_slice();
            self.add(key, bytes, sectors(&(0..self.slice_size as usize)));
            self.dirty.insert(key);
        }
    }

    /// Puts a whole metadata cluster here, to be written whole. Nothing of it may be in the cache.
    pub fn insert_dirty_cluster(&mut self, offset: u64, bytes: &[u8]) {
        let size = self.slice_size as usize;
        for (piece, key) in bytes.chunks(size).zip((offset..).step_by(size)) {
            debug_assert!(!self.slices.contains_key(&key), "stale slice at {key:#x}");
            self.add(key, piece.into(), sectors(&(0..size)));
            self.dirty.insert(key);
        }
    }

    /// Overwrites those parts of `bytes`, the metadata cluster at `offset` as it stands on disk,
    /// that are here; whether all were.
    pub fn read_cluster(&self, offset: u64, bytes: &mut [u8]) -> bool {
        let size = self.slice_size as usize;
        let mut all = true;
        // The pieces first: behind the last one there may be no offset.
        for (piece, key) in bytes.chunks_mut(size).zip((offset..).step_by(size)) {
            match self.slices.get(&key) {
                Some(slice) => piece.copy_from_slice(&slice.bytes),
                None => all = false,
            }
        }
        all
    }

    /// Copies of the slices that are here of the metadata cluster at `offset`, and where in it each
    /// begins.
    pub fn slices_of(&self, offset: u64, cluster_size: u64) -> Vec<(usize, Box<[u8]>)> {
        let keys = (offset..offset + cluster_size).step_by(self.slice_size as usize);
        keys.filter_map(|key| Some(((key - offset) as usize, self.slices.get(&key)?.bytes.clone())))
            .collect()
    }

    /// Returns bytes that are no longer needed, where there are some.
    fn add(&mut self, key: u64, bytes: Box<[u8]>, dirty: u8) -> Option<Box<[u8]>> {
        debug_assert_eq!(bytes.len() as u64, self.slice_size);
        if self.slices.contains_key(&key) {
            return Some(bytes);
        }
        let evicted = self.evict();
        self.share.grow(self.slice_size);
        self.slices.insert(key, Slice { bytes, dirty, writing: 0, used: AtomicBool::new(true) });
        self.clock.push_back(key);
        evicted
    }

    /// Makes room for one more slice where clean ones can go. Returns the bytes of one that went.
    fn evict(&mut self) -> Option<Box<[u8]>> {
        let mut evicted = None;
        for _ in 0..MAX_EVICTION_STEPS {
            if self.slices.len() < self.capacity {
                break;
            }
            evicted = self.step().or(evicted);
        }
        evicted
    }

    /// Gives about `bytes` of clean slices up, or as much as is found soon. What was put here since the
    /// last time stays: somebody is about to use it.
    pub fn shrink(&mut self, bytes: u64) {
        let enough = self.share.held().saturating_sub(bytes);
        for _ in 0..self.clock.len().min(MAX_EVICTION_STEPS) {
            if self.slices.len() <= MIN_SLICES || self.share.held() <= enough {
                break;
            }
            self.step();
        }
    }

    /// Lets go of the slice whose turn it is, unless it is dirty or was used since its last turn.
    /// Returns its bytes.
    fn step(&mut self) -> Option<Box<[u8]>> {
        let key = self.clock.pop_front()?;
        let slice = self.slices.get(&key)?;
        let pinned = slice.dirty | slice.writing != 0;
        if pinned || slice.used.swap(false, Ordering::Relaxed) {
            self.clock.push_back(key);
            return None;
        }
        self.remove(key).map(|slice| slice.bytes)
    }

    fn remove(&mut self, key: u64) -> Option<Slice> {
        let slice = self.slices.remove(&key)?;
        self.share.give_back(self.slice_size);
        Some(slice)
    }

    /// Drops everything of the metadata cluster at `offset`, dirty or not: it is no metadata any
    /// more. Not while a flush is under way.
    pub fn forget_cluster(&mut self, offset: u64, cluster_size: u64) {
        self.forgotten += 1;
        for key in (offset..offset + cluster_size).step_by(self.slice_size as usize) {
            if let Some(slice) = self.remove(key) {
                debug_assert_eq!(slice.writing, 0, "slice {key:#x} is being written");
            }
            self.dirty.remove(&key);
        }
    }

    /// How often [`SliceCache::forget_cluster`] was called: what was read from the file before is not
    /// to be put here after it.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// Slices that wait to be written.
    pub fn dirty_slices(&self) -> usize {
        self.dirty.len()
    }

    /// Whether so much is dirty that a flush should make room.
    pub fn is_crowded(&self) -> bool {
        self.dirty.len() > self.capacity / 2
    }

    /// A copy of all dirty sectors, in ascending order, neighbours joined. They count as being
    /// written until [`SliceCache::written`].
    pub fn take_dirty(&mut self) -> Vec<Write> {
        let mut writes: Vec<Write> = Vec::new();
        for key in std::mem::take(&mut self.dirty) {
            let Some(slice) = self.slices.get_mut(&key) else { continue };
            debug_assert_eq!(slice.writing, 0, "two flushes at a time");
            slice.writing = std::mem::take(&mut slice.dirty);
            for (i, sector) in slice.bytes.chunks(SECTOR).enumerate() {
                if slice.writing & 1 << i == 0 {
                    continue;
                }
                let offset = key + (i * SECTOR) as u64;
                match writes.last_mut() {
                    Some((start, bytes)) if *start + bytes.len() as u64 == offset => {
                        bytes.extend_from_slice(sector);
                    }
                    _ => writes.push((offset, sector.to_vec())),
                }
            }
        }
        writes
    }

    /// The flush that took `writes` is over. Where it failed the sectors are dirty again.
    pub fn written(&mut self, writes: &[Write], succeeded: bool) {
        let keys = writes.iter().flat_map(|(offset, bytes)| {
            let size = self.slice_size;
            (offset & !(size - 1)..offset + bytes.len() as u64).step_by(size as usize)
        });
        for key in keys {
            let Some(slice) = self.slices.get_mut(&key) else { continue };
            let sectors = std::mem::take(&mut slice.writing);
            if !succeeded && sectors != 0 {
                slice.dirty |= sectors;
                self.dirty.insert(key);
            }
        }
    }
}

/// The sectors that a range of bytes within a slice touches, one bit each.
fn sectors(bytes: &Range<usize>) -> u8 {
    (bytes.start / SECTOR..bytes.end.div_ceil(SECTOR)).fold(0, |bits, i| bits | 1 << i)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(cluster_size: u64, bytes: u64) -> SliceCache {
        SliceCache::new(cluster_size, bytes, Share::of(&Arc::default()))
    }

    fn filled(cache: &SliceCache, byte: u8) -> Box<[u8]> {
        vec![byte; cache.slice_size() as usize].into_boxed_slice()
    }

    #[test]
    fn dirty_sectors_are_taken_once_joined_and_in_order() {
        let mut cache = cache(65536, 1 << 20);
        for key in [8192, 4096] {
            let bytes = filled(&cache, 1);
            cache.insert(key, bytes);
        }
        cache.get_mut(8192, 0..8).unwrap()[0] = 2;
        cache.get_mut(4096, 4088..4096).unwrap()[4095] = 3;
        cache.get_mut(4096, 0..8).unwrap()[0] = 4;
        let writes = cache.take_dirty();
        let shape: Vec<_> = writes.iter().map(|(at, bytes)| (*at, bytes.len())).collect();
        assert_eq!(shape, [(4096, 512), (4096 + 3584, 1024)]);
        assert!(cache.take_dirty().is_empty());
        cache.written(&writes, false);
        assert_eq!(cache.take_dirty(), writes, "a failed write is due again");
    }

    #[test]
    fn dirty_and_writing_slices_survive_any_pressure() {
        let mut cache = cache(512, 0);
        for key in 0..4 {
            let bytes = filled(&cache, 1);
            cache.insert(key * 512, bytes);
            cache.get_mut(key * 512, 0..1).unwrap()[0] = 9;
        }
        let writes = cache.take_dirty();
        cache.get_mut(0, 0..1);
        for key in 4..200 {
            let bytes = filled(&cache, 1);
            cache.insert(key * 512, bytes);
        }
        assert!((0..4).all(|key| cache.get(key * 512).is_some()));
        assert!(cache.slices.len() <= 17, "{} slices", cache.slices.len());
        cache.written(&writes, true);
        for key in 200..400 {
            let bytes = filled(&cache, 1);
            cache.insert(key * 512, bytes);
        }
        assert!(cache.get(0).is_some(), "dirty again while it was written");
        assert!(cache.get(512).is_none(), "clean, so it could go");
    }

    #[test]
    fn what_shrinks_keeps_what_is_dirty_or_in_use_and_says_what_it_holds() {
        let memory = Arc::default();
        let mut cache = SliceCache::new(512, 1 << 20, Share::of(&memory));
        for key in 0..400 {
            let bytes = filled(&cache, 1);
            cache.insert(key * 512, bytes);
        }
        cache.get_mut(0, 0..1).unwrap()[0] = 9;
        cache.forget_cluster(512, 512);
        assert_eq!(cache.share.held(), 399 * 512);
        while cache.slices.contains_key(&(2 * 512)) {
            cache.shrink(100 * 512);
            // Used again and again.
            assert!(cache.get(399 * 512).is_some());
        }
        assert!(cache.share.held() > 300 * 512, "more went than was asked for, and at once");
        (0..100).for_each(|_| cache.shrink(u64::MAX));
        assert_eq!(cache.slices.len(), MIN_SLICES);
        assert_eq!(cache.share.held(), MIN_SLICES as u64 * 512);
        assert!(cache.get(0).is_some(), "dirty");
        assert!(cache.clock.len() <= MIN_SLICES + 1);
        drop(cache);
        assert_eq!(memory.status().held, 0);
    }

    #[test]
    fn what_was_just_put_here_stays_though_all_else_is_dirty() {
        let mut cache = cache(512, 0);
        for key in 0..=MIN_SLICES as u64 {
            let bytes = filled(&cache, 1);
            cache.insert(key * 512, bytes);
            if key < MIN_SLICES as u64 {
                cache.get_mut(key * 512, 0..1);
            }
        }
        cache.shrink(u64::MAX);
        assert!(cache.get(MIN_SLICES as u64 * 512).is_some());
    }
}
