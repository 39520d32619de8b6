//! A set of granules that many threads add to at once, without a lock.
//!
//! Memory is taken in chunks, where something is added, and out of a budget that several sets
//! share. What does not fit makes the set *lost*: nobody may believe then what is missing in it.

use std::ops::Range;
use std::sync::Arc;

use crate::sync::OnceLock;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const WORD: u64 = u64::BITS as u64;
/// Granules in a chunk, which takes 32 KiB.
const CHUNK: u64 = if cfg!(all(test, feature = "model")) { 128 } else { 1 << 18 };
const CHUNKS_IN_GROUP: u64 = if cfg!(all(test, feature = "model")) { 2 } else { 128 };
const GROUP: u64 = CHUNK * CHUNKS_IN_GROUP;
/// Together as many granules as the largest bitmap has bits.
const GROUPS: u64 = if cfg!(all(test, feature = "model")) { 2 } else { 128 };
/// What a chunk takes of the budget, and a group, which is smaller.
const COST: u64 = CHUNK / 8;

/// Bytes of memory that are left for one set: its own share, out of what is left for all.
#[derive(Debug)]
pub(super) struct Budget {
    own: AtomicU64,
    all: Arc<AtomicU64>,
}

impl Budget {
    /// Shares `bytes` among sets that may come to have so many granules: a large set does not keep
    /// a small one from having what it needs.
    pub(super) fn share(bytes: u64, granules: &[u64]) -> Vec<Budget> {
        let all = Arc::new(AtomicU64::new(bytes));
        let mut by_need: Vec<usize> = (0..granules.len()).collect();
        by_need.sort_by_key(|&n| granules[n]);
        let mut shares = vec![0; granules.len()];
        let (mut rest, mut sets) = (bytes, granules.len() as u64);
        for n in by_need {
            shares[n] = rest / sets;
            rest -= shares[n].min(full_size(granules[n]).saturating_mul(2));
            sets -= 1;
        }
        let budget = |own| Budget { own: AtomicU64::new(own), all: all.clone() };
        shares.into_iter().map(budget).collect()
    }

    /// Takes what a chunk costs; whether there was so much.
    fn take(&self) -> bool {
        let less = |left: u64| left.checked_sub(COST);
        let take = |from: &AtomicU64| {
            from.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
        };
        take(&self.own) && take(&self.all)
    }
}

/// Bytes that a set of all granules takes.
fn full_size(granules: u64) -> u64 {
    (granules.div_ceil(CHUNK) + granules.div_ceil(GROUP)) * COST
}

type Chunk = Box<[AtomicU64]>;
type Group = Box<[OnceLock<Chunk>]>;

/// The granules of one disk that were changed.
#[derive(Debug)]
pub(super) struct GranuleSet {
    groups: Box<[OnceLock<Group>]>,
    budget: Budget,
    lost: AtomicBool,
}

impl GranuleSet {
    pub(super) fn new(budget: Budget) -> Self {
        GranuleSet { groups: slots(GROUPS), budget, lost: AtomicBool::new(false) }
    }

    /// Adds granules. Costs next to nothing where they are in the set already.
    pub(super) fn insert(&self, granules: Range<u64>) {
        let mut at = granules.start;
        while at < granules.end {
            let end = granules.end.min((at / CHUNK + 1) * CHUNK);
            let Some(chunk) = self.make_chunk(at) else {
                self.lost.store(true, Ordering::Relaxed);
                return;
            };
            insert_within(chunk, at % CHUNK..at % CHUNK + (end - at));
            at = end;
        }
    }

    /// Whether something was to be added that did not fit.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Whether any of `granules` may be in the set, as far as is told without looking at each.
    pub(super) fn may_have(&self, granules: &Range<u64>) -> bool {
        let first = granules.start / CHUNK;
        (first..granules.end.div_ceil(CHUNK)).any(|n| {
            let chunk = self.chunk(n * CHUNK);
            chunk.is_some_and(|words| {
                let start = granules.start.max(n * CHUNK) - n * CHUNK;
                let end = granules.end.min((n + 1) * CHUNK) - n * CHUNK;
                let words = &words[(start / WORD) as usize..end.div_ceil(WORD) as usize];
                words.iter().any(|word| word.load(Ordering::Relaxed) != 0)
            })
        })
    }

    /// Sets those bits of `bits`, whole words, that are for granules of the set; the first one is
    /// for granule `first`, a multiple of 64.
    pub(super) fn add_to(&self, first: u64, bits: &mut [u8]) {
        for (n, bytes) in (first / WORD..).zip(bits.chunks_exact_mut(8)) {
            let at = n * WORD;
            let Some(chunk) = self.chunk(at) else { continue };
            let word = chunk[(at % CHUNK / WORD) as usize].load(Ordering::Relaxed);
            bytes.iter_mut().zip(word.to_le_bytes()).for_each(|(byte, more)| *byte |= more);
        }
    }

    fn chunk(&self, granule: u64) -> Option<&Chunk> {
        let group = self.groups.get((granule / GROUP) as usize)?.get()?;
        group[(granule % GROUP / CHUNK) as usize].get()
    }

    fn make_chunk(&self, granule: u64) -> Option<&Chunk> {
        let group = self.groups.get((granule / GROUP) as usize)?;
        let group = get_or_make(group, &self.budget, || slots(CHUNKS_IN_GROUP))?;
        let chunk = &group[(granule % GROUP / CHUNK) as usize];
        get_or_make(chunk, &self.budget, || (0..CHUNK / WORD).map(|_| AtomicU64::new(0)).collect())
    }
}

fn slots<T>(count: u64) -> Box<[OnceLock<T>]> {
    (0..count).map(|_| OnceLock::new()).collect()
}

/// What is in the slot, if the budget allows for it. Two threads that come at the same time may both
/// take from the budget.
fn get_or_make<'a, T>(
    slot: &'a OnceLock<T>,
    budget: &Budget,
    make: impl FnOnce() -> T,
) -> Option<&'a T> {
    if let Some(made) = slot.get() {
        return Some(made);
    }
    budget.take().then(|| slot.get_or_init(make))
}

fn insert_within(words: &[AtomicU64], bits: Range<u64>) {
    let mut at = bits.start;
    while at < bits.end {
        let end = bits.end.min((at / WORD + 1) * WORD);
        let mask = (u64::MAX >> (WORD - (end - at))) << (at % WORD);
        let word = &words[(at / WORD) as usize];
        // Looking first keeps the word in every core's cache.
        if word.load(Ordering::Relaxed) & mask != mask {
            word.fetch_or(mask, Ordering::Relaxed);
        }
        at = end;
    }
}

#[cfg(all(test, feature = "model"))]
mod models;

#[cfg(test)]
mod tests {
    use super::*;

    fn set(bytes: u64) -> GranuleSet {
        GranuleSet::new(Budget::share(bytes, &[1]).remove(0))
    }

    fn granules(set: &GranuleSet, within: Range<u64>) -> Vec<u64> {
        let first = within.start / WORD * WORD;
        let mut bits = vec![0; ((within.end - first).next_multiple_of(WORD) / 8) as usize];
        set.add_to(first, &mut bits);
        let is_set = |n: &u64| bits[(n - first) as usize / 8] >> (n % 8) & 1 == 1;
        within.filter(is_set).collect()
    }

    #[test]
    fn what_was_added_is_there_across_words_chunks_and_groups_and_nothing_else() {
        let set = set(1 << 30);
        for range in [0..1, 63..65, 100..300, CHUNK - 1..CHUNK + 1, GROUP - 70..GROUP + 70] {
            set.insert(range.clone());
            assert!(set.may_have(&range));
            let around = range.start.saturating_sub(200)..range.end + 200;
            let found: Vec<u64> = granules(&set, around)
                .into_iter()
                .filter(|n| *n >= range.start && *n < range.end)
                .collect();
            assert_eq!(found, range.collect::<Vec<_>>());
        }
        let expected: Vec<u64> = [0..1, 63..65, 100..300].into_iter().flatten().collect();
        assert_eq!(granules(&set, 0..1000), expected);
        assert!(!set.may_have(&(2 * CHUNK..3 * CHUNK)) && !set.may_have(&(320..640)));
        assert!(!set.is_lost());
    }

    #[test]
    fn threads_that_add_at_once_lose_nothing() {
        let set = set(1 << 30);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let set = &set;
                scope.spawn(move || {
                    (0..5000).for_each(|n| set.insert(n * 8 + thread..n * 8 + thread + 1));
                });
            }
        });
        let expected: Vec<u64> = (0..40_000).filter(|n| n % 8 < 4).collect();
        assert_eq!(granules(&set, 0..40_000), expected);
    }

    #[test]
    fn what_does_not_fit_the_budget_or_the_format_is_told() {
        let small = set(80 << 10);
        small.insert(0..10);
        assert!(!small.is_lost());
        small.insert(5 * CHUNK..5 * CHUNK + 1);
        assert!(small.is_lost());
        let set = set(1 << 30);
        set.insert((1 << 32) - 1..1 << 32);
        assert!(!set.is_lost());
        set.insert(1 << 32..(1 << 32) + 1);
        assert!(set.is_lost());
    }
    #[test]
    fn large_sets_leave_small_ones_what_they_need() {
        let granules = [100 * GROUP, CHUNK, 3 * CHUNK, 200 * GROUP];
        let budgets = Budget::share(64 << 20, &granules);
        let sets: Vec<GranuleSet> = budgets.into_iter().map(GranuleSet::new).collect();
        for (set, granules) in sets.iter().zip(granules) {
            set.insert(0..granules);
        }
        let lost: Vec<bool> = sets.iter().map(GranuleSet::is_lost).collect();
        assert_eq!(lost, [true, false, false, true]);
    }
}
