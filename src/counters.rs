//! Counters and latencies that threads add to without getting in each other's way: each thread has
//! its own cache line, so that counting costs a few nanoseconds, and reading sums them up.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

/// More threads than this share lines.
const LINES: usize = 16;
/// The bound of the first bucket of latencies is 2 to the power of this, in nanoseconds.
const FIRST_BITS: u32 = 10;
/// Buckets with a bound; each is twice that of the one before it. The last one is 8.6 s.
const BUCKETS: usize = 24;

/// The line of this thread.
fn line() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static LINE: usize = NEXT.fetch_add(1, Ordering::Relaxed) % LINES);
    LINE.with(|line| *line)
}

/// Alone in what processors fetch at once.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Line<T>(pub(crate) T);

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter {
    lines: [Line<AtomicU64>; LINES],
}

impl Counter {
    /// Adds `count`.
    pub fn add(&self, count: u64) {
        self.lines[line()].0.fetch_add(count, Ordering::Relaxed);
    }

    /// All that was added.
    pub fn get(&self) -> u64 {
        self.lines.iter().map(|line| line.0.load(Ordering::Relaxed)).sum()
    }
}

/// How a cache does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CacheCounts {
    /// What was asked for and was there.
    pub hits: u64,
    /// What had to be brought.
    pub misses: u64,
}

impl CacheCounts {
    /// So many of each.
    pub fn new(hits: u64, misses: u64) -> Self {
        CacheCounts { hits, misses }
    }
}

/// How often something was done, with how many bytes, how often it failed, and how long it took.
#[derive(Debug, Default)]
pub struct Operations {
    lines: [Line<Counts>; LINES],
}

#[derive(Debug, Default)]
struct Counts {
    bytes: AtomicU64,
    errors: AtomicU64,
    nanoseconds: AtomicU64,
    /// By how long they took; the last one has no bound.
    buckets: [AtomicU64; BUCKETS + 1],
}

/// What [`Operations`] have come to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OperationCounts {
    /// How many there were, those that failed included.
    pub count: u64,
    /// How many failed.
    pub errors: u64,
    /// Bytes of those that did not fail.
    pub bytes: u64,
    /// Nanoseconds that all took.
    pub nanoseconds: u64,
    /// The nanoseconds that half of them took at most, by the bound of a bucket, as the next two.
    pub median: u64,
    /// What 99 of 100 took at most.
    pub percentile_99: u64,
    /// What the longest one took at most.
    pub longest: u64,
    /// How many took at most [`bound`] of a bucket's number, and longer than the one before; the last
    /// ones took longer than any bound.
    #[serde(skip)]
    pub buckets: Vec<u64>,
}

/// The longest time, in nanoseconds, that belongs to a bucket; `None` for the last one.
pub fn bound(bucket: usize) -> Option<u64> {
    (bucket < BUCKETS).then(|| 1 << (FIRST_BITS as usize + bucket))
}

impl Operations {
    /// Runs `work` on `bytes` bytes and counts it.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn count<T, E>(&self, bytes: u64, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let begin = Instant::now();
        let done = work();
        self.add(begin.elapsed(), done.is_ok().then_some(bytes));
        done
    }

    /// Counts one that took `time`, with its bytes unless it failed.
    fn add(&self, time: Duration, bytes: Option<u64>) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let counts = &self.lines[line()].0;
        counts.buckets[bucket(nanoseconds)].fetch_add(1, Ordering::Relaxed);
        counts.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
        match bytes {
            Some(bytes) => counts.bytes.fetch_add(bytes, Ordering::Relaxed),
            None => counts.errors.fetch_add(1, Ordering::Relaxed),
        };
    }

    /// The sums. Of what goes on meanwhile a part may be in some of them and not yet in others.
    pub fn get(&self) -> OperationCounts {
        let sum = |field: fn(&Counts) -> &AtomicU64| {
            self.lines.iter().map(|line| field(&line.0).load(Ordering::Relaxed)).sum()
        };
        let mut buckets = vec![0u64; BUCKETS + 1];
        for line in &self.lines {
            for (sum, count) in buckets.iter_mut().zip(&line.0.buckets) {
                *sum += count.load(Ordering::Relaxed);
            }
        }
        OperationCounts {
            count: buckets.iter().sum(),
            errors: sum(|counts| &counts.errors),
            bytes: sum(|counts| &counts.bytes),
            nanoseconds: sum(|counts| &counts.nanoseconds),
            median: at_most(&buckets, 0.5),
            percentile_99: at_most(&buckets, 0.99),
            longest: at_most(&buckets, 1.0),
            buckets,
        }
    }
}

/// The bucket that a time belongs to.
fn bucket(nanoseconds: u64) -> usize {
    let bits = u64::BITS - nanoseconds.saturating_sub(1).leading_zeros();
    (bits.saturating_sub(FIRST_BITS) as usize).min(BUCKETS)
}

/// What a part of all took at most: the bound of the bucket that the last of them is in, the largest
/// bound for what is longer than any, 0 where there are none.
fn at_most(buckets: &[u64], part: f64) -> u64 {
    let all: u64 = buckets.iter().sum();
    let wanted = (all as f64 * part).ceil() as u64;
    let mut sum = 0;
    let found = buckets.iter().position(|count| {
        sum += count;
        sum >= wanted && sum > 0
    });
    found.map_or(0, |found| bound(found.min(BUCKETS - 1)).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_many_threads_count_adds_up() {
        let (counter, operations) = (Counter::default(), Operations::default());
        std::thread::scope(|scope| {
            for _ in 0..40 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        counter.add(3);
                        let _: Result<(), ()> = operations.count(512, || Ok(()));
                    }
                    operations.count(512, || Err::<(), _>(())).unwrap_err();
                });
            }
        });
        assert_eq!(counter.get(), 40 * 300);
        let sums = operations.get();
        assert_eq!((sums.count, sums.errors, sums.bytes), (4040, 40, 4000 * 512));
        assert_eq!(sums.buckets.iter().sum::<u64>(), 4040);
        assert!(sums.median <= sums.percentile_99 && sums.percentile_99 <= sums.longest);
    }

    #[test]
    fn a_time_falls_into_the_first_bucket_that_is_no_shorter() {
        for (nanoseconds, expected) in
            [(0, 0), (1, 0), (1024, 0), (1025, 1), (2048, 1), (2049, 2), (u64::MAX, BUCKETS)]
        {
            assert_eq!(bucket(nanoseconds), expected, "{nanoseconds}");
        }
        for number in 0..BUCKETS {
            assert_eq!(bucket(bound(number).unwrap()), number);
        }
        assert_eq!(bound(BUCKETS), None);
        let operations = Operations::default();
        assert_eq!(operations.get().longest, 0, "of none");
        for microseconds in [1u64; 98].into_iter().chain([100, 3000]) {
            operations.add(Duration::from_micros(microseconds), None);
        }
        let sums = operations.get();
        assert_eq!((sums.median, sums.percentile_99), (1024, 131_072));
        assert_eq!(sums.longest, 4_194_304);
    }
}
