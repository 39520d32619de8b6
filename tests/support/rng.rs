//! Pseudo-random numbers that a seed fixes.

use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

/// A splitmix64 generator: small, and good enough to choose what to do next.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number in the range, which must not be empty.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// True in one of `n` cases.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.within(0..from.len() as u64) as usize]
    }

    /// A range within `0..size` of at most `longest` bytes, not empty; its ends are multiples of
    /// one of `grains` (or the end of the disk).
    pub fn range(&mut self, size: u64, longest: u64, grains: &[u64]) -> Range<u64> {
        let grain = *self.pick(grains);
        let length = 1 + self.next() % longest.max(1);
        let start = self.within(0..size) / grain * grain;
        let end = (start + length).next_multiple_of(grain).min(size);
        start..end
    }
}

/// Spreads a number's bits over all 64.
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A seed that no earlier run had.
pub fn fresh_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64 / 1000
}
