//! The memory that the caches of all open images take together.
//!
//! Each cache has a bound of its own, and there may be thousands of images. So whoever brings something
//! into a cache while all of them hold more than they may ([`Memory::make_room`]) lets one of them give
//! something up: the one that holds most of those that were looked at, a few each time, in turn. One that
//! nothing was brought into while so much was brought as the memory holds lies idle, or has all that it
//! needs and more: what it holds counts many times. So images that lie idle do not keep memory from those
//! that work, and who fills the caches of many images takes it from himself first. What is dirty stays
//! until a flush has written it, and so does a little of each cache, so that its image gets on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use serde::Serialize;

/// So many caches are looked at each time.
const LOOKS: usize = 8;
/// Bytes that are left to each.
pub const KEPT: u64 = 64 << 10;
/// Bytes that are brought into a cache at once, mostly.
const PIECE: u64 = 4096;
/// How many times what lies idle counts.
const IDLE: u64 = 16;
/// The most that one is asked for at a time: whoever brings a few KiB in waits for it.
const MOST_AT_ONCE: u64 = 1 << 20;

/// What can give memory up. It is no more than the cache itself, for it may outlive its image by a
/// moment, and files are to be closed by then.
pub trait Cache: Send + Sync {
    /// Gives about `bytes` up, as far as it may. It waits for nobody: who has it locked needs what is in
    /// it.
    fn shrink(&self, bytes: u64);
}

/// The memory of some caches.
#[derive(Debug)]
pub struct Memory {
    limit: u64,
    held: AtomicU64,
    /// How often something was brought into a cache.
    brought: AtomicU64,
    caches: Mutex<Caches>,
}

#[derive(Debug, Default)]
struct Caches {
    all: Vec<(Weak<Share>, Weak<dyn Cache>)>,
    /// Which one was looked at last.
    last: usize,
    /// Which one had most to give of those that were looked at.
    richest: usize,
    /// Those that are gone are looked for when there are so many.
    sweep_at: usize,
}

/// What one cache holds.
#[derive(Debug)]
pub struct Share {
    memory: Arc<Memory>,
    held: AtomicU64,
    /// [`Memory::brought`] when something was brought into this one last.
    brought: AtomicU64,
}

/// For `status`: how much there is.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct MemoryStatus {
    /// Bytes that caches hold.
    pub held: u64,
    /// Bytes that they may hold.
    pub limit: u64,
}

impl Memory {
    /// Memory of `limit` bytes.
    pub fn new(limit: u64) -> Arc<Memory> {
        Arc::new(Memory { limit, ..Memory::default() })
    }

    /// How much of it there is.
    pub fn status(&self) -> MemoryStatus {
        MemoryStatus { held: self.held.load(Ordering::Relaxed), limit: self.limit }
    }

    /// From now on `cache`, which holds `share`, is asked to give something up, as long as it is there.
    pub fn add<C: Cache + 'static>(&self, share: &Arc<Share>, cache: &Arc<C>) {
        let cache: Weak<C> = Arc::downgrade(cache);
        let mut caches = self.caches.lock();
        if caches.all.len() >= caches.sweep_at {
            caches.all.retain(|(_, cache)| cache.strong_count() > 0);
            caches.sweep_at = 2 * caches.all.len() + LOOKS;
        }
        caches.all.push((Arc::downgrade(share), cache));
    }

    /// Lets a cache give something up where all of them hold too much. It waits for no lock.
    pub fn make_room(&self) {
        let held = self.held.load(Ordering::Relaxed);
        if held > self.limit
            && let Some(cache) = self.caches.try_lock().and_then(|mut caches| caches.richest())
        {
            cache.shrink((held - self.limit).min(MOST_AT_ONCE));
        }
    }
}

impl Default for Memory {
    /// Memory without a limit.
    fn default() -> Self {
        Memory {
            limit: u64::MAX,
            held: AtomicU64::new(0),
            brought: AtomicU64::new(0),
            caches: Mutex::default(),
        }
    }
}

impl Caches {
    /// The one that has most to give, as far as is known.
    fn richest(&mut self) -> Option<Arc<dyn Cache>> {
        let spare = |place: usize| {
            let share = self.all.get(place).and_then(|(share, _)| share.upgrade());
            share.map_or(0, |share| share.spare())
        };
        let mut most = spare(self.richest);
        for _ in 0..LOOKS.min(self.all.len()) {
            self.last = (self.last + 1) % self.all.len();
            let found = spare(self.last);
            if found > most {
                (most, self.richest) = (found, self.last);
            }
        }
        self.all.get(self.richest)?.1.upgrade()
    }
}

impl Share {
    /// The share of a cache that is empty.
    pub fn of(memory: &Arc<Memory>) -> Arc<Share> {
        let (held, brought) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Share { memory: Arc::clone(memory), held, brought })
    }

    /// Bytes that the cache holds.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// What the cache could give, as that counts.
    fn spare(&self) -> u64 {
        let spare = self.held().saturating_sub(KEPT);
        let brought = |at: &AtomicU64| at.load(Ordering::Relaxed);
        let age = brought(&self.memory.brought).saturating_sub(brought(&self.brought));
        if age > self.memory.limit / PIECE { spare * IDLE } else { spare }
    }

    /// The cache holds `bytes` more.
    pub fn grow(&self, bytes: u64) {
        let brought = self.memory.brought.fetch_add(1, Ordering::Relaxed) + 1;
        self.brought.store(brought, Ordering::Relaxed);
        self.held.fetch_add(bytes, Ordering::Relaxed);
        self.memory.held.fetch_add(bytes, Ordering::Relaxed);
    }

    /// It holds `bytes` less.
    pub fn give_back(&self, bytes: u64) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
        self.memory.held.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.memory.held.fetch_sub(*self.held.get_mut(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Pile(Arc<Share>);

    impl Cache for Pile {
        fn shrink(&self, bytes: u64) {
            self.0.give_back(bytes.min(self.0.held().saturating_sub(KEPT)));
        }
    }

    fn piles(memory: &Arc<Memory>, count: usize) -> Vec<Arc<Pile>> {
        let pile = |_| {
            let pile = Arc::new(Pile(Share::of(memory)));
            memory.add(&pile.0, &pile);
            pile
        };
        (0..count).map(pile).collect()
    }

    const PART: u64 = 64 << 10;

    #[test]
    fn who_holds_most_gives_up_what_is_too_much_whoever_brings_it() {
        let memory = Memory::new(4000 * PART);
        let piles = piles(&memory, 3 * LOOKS);
        piles[17].0.grow(3900 * PART);
        for (i, pile) in piles.iter().enumerate().filter(|(i, _)| *i != 17) {
            pile.0.grow(20 * PART);
            // All have been looked at after so many.
            (0..3).for_each(|_| memory.make_room());
            let held = memory.status().held;
            assert!(held <= memory.limit + MOST_AT_ONCE, "after {i}: {held}");
        }
        (0..100).for_each(|_| memory.make_room());
        assert!(memory.status().held <= memory.limit);
        // Others were asked until it was found.
        let too_much = 20 * (3 * LOOKS as u64 - 1) - 100;
        let given = (3900 * PART - piles[17].0.held()) / PART;
        assert!((too_much - 2 * 20..=too_much).contains(&given), "{given} of {too_much}");
    }

    #[test]
    fn who_lies_idle_gives_up_before_who_works() {
        let memory = Memory::new(100 * PART);
        let piles = piles(&memory, 3);
        piles[0].0.grow(20 * PART);
        piles[1].0.grow(3 * KEPT);
        for _ in 0..memory.limit / PIECE {
            piles[2].0.grow(0);
        }
        piles[2].0.grow(79 * PART);
        (0..100).for_each(|_| memory.make_room());
        assert_eq!(piles[2].0.held(), 79 * PART);
        assert_eq!(memory.status().held, memory.limit);
        // Who has nothing to spare is not asked in vain.
        piles[2].0.grow(100 * PART);
        (0..100).for_each(|_| memory.make_room());
        assert_eq!(memory.status().held, memory.limit);
        assert!(piles[..2].iter().all(|pile| (KEPT..4 * KEPT).contains(&pile.0.held())));
    }

    #[test]
    fn what_a_cache_held_is_free_when_it_is_gone() {
        let memory = Memory::new(1000);
        for _ in 0..100 {
            let piles = piles(&memory, 10);
            piles.iter().for_each(|pile| pile.0.grow(90));
            drop(piles);
            assert_eq!(memory.status().held, 0);
        }
        assert!(memory.caches.lock().all.len() <= 2 * 10 + LOOKS, "those that are gone stay");
        memory.make_room();
    }
}
