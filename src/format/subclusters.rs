//! The bitmap of an extended L2 entry: what each of a cluster's 32 subclusters is.

use std::ops::Range;

/// What one subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subcluster {
    /// Nothing here: reads the backing file, or zeros without one. Where the entry has a host
    /// cluster, what lies there in its place means nothing.
    Unallocated,
    /// Reads as zeros, whatever lies in its place.
    Zero,
    /// The data is in its place in the host cluster.
    Allocated,
}

/// What each subcluster of a guest cluster is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subclusters {
    /// One bit a subcluster, the first one the lowest. No bit is set in both.
    allocated: u32,
    zero: u32,
}

impl Subclusters {
    /// Subclusters in a cluster.
    pub const COUNT: u32 = 32;
    /// All are unallocated.
    pub const UNALLOCATED: Self = Subclusters { allocated: 0, zero: 0 };
    /// All read as zeros.
    pub const ZERO: Self = Subclusters { allocated: 0, zero: u32::MAX };
    /// All have data.
    pub const ALLOCATED: Self = Subclusters { allocated: u32::MAX, zero: 0 };

    /// What the second word of an entry says: bits 0 to 31 allocated, bits 32 to 63 reads as zeros.
    /// `None` where one subcluster is both: corruption.
    pub fn from_word(word: u64) -> Option<Self> {
        let (allocated, zero) = (word as u32, (word >> 32) as u32);
        (allocated & zero == 0).then_some(Subclusters { allocated, zero })
    }

    /// The second word of the entry.
    pub fn to_word(self) -> u64 {
        u64::from(self.zero) << 32 | u64::from(self.allocated)
    }

    /// What the subcluster at `index`, below [`Subclusters::COUNT`], is.
    pub fn get(self, index: u32) -> Subcluster {
        let is_set = |bits: u32| bits.checked_shr(index).unwrap_or(0) & 1 != 0;
        match (is_set(self.allocated), is_set(self.zero)) {
            (true, _) => Subcluster::Allocated,
            (false, true) => Subcluster::Zero,
            (false, false) => Subcluster::Unallocated,
        }
    }

    /// What the subcluster at `first` is, and the first one after it that is something else.
    pub fn run(self, first: u32) -> (Subcluster, u32) {
        let kind = self.get(first);
        let end = (first + 1..Self::COUNT).find(|&index| self.get(index) != kind);
        (kind, end.unwrap_or(Self::COUNT))
    }

    /// The same with those of `range` being `kind`.
    #[must_use]
    pub fn with(self, range: Range<u32>, kind: Subcluster) -> Self {
        let mask = mask(&range);
        let set = |bits: u32, is: bool| if is { bits | mask } else { bits & !mask };
        Subclusters {
            allocated: set(self.allocated, kind == Subcluster::Allocated),
            zero: set(self.zero, kind == Subcluster::Zero),
        }
    }

    /// Whether one of `range` is `kind`.
    pub fn any(self, range: Range<u32>, kind: Subcluster) -> bool {
        let bits = match kind {
            Subcluster::Allocated => self.allocated,
            Subcluster::Zero => self.zero,
            Subcluster::Unallocated => !(self.allocated | self.zero),
        };
        bits & mask(&range) != 0
    }

    /// Whether any has data.
    pub fn any_allocated(self) -> bool {
        self.allocated != 0
    }
}

/// A bit for each of `range`.
fn mask(range: &Range<u32>) -> u32 {
    let below = |end: u32| u32::MAX.checked_shr(u32::BITS - end.min(u32::BITS)).unwrap_or(0);
    below(range.end) & !below(range.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_round_trip_and_both_bits_at_once_are_refused() {
        for word in [0, 1, 1 << 63, 0xffff_ffff, !0 << 32, 0x5555_5555_aaaa_aaaa] {
            assert_eq!(Subclusters::from_word(word).unwrap().to_word(), word, "{word:#x}");
        }
        for index in 0..32u64 {
            assert_eq!(Subclusters::from_word(1 << index | 1 << (index + 32)), None);
        }
        assert_eq!(Subclusters::ALLOCATED.to_word(), 0xffff_ffff);
        assert_eq!(Subclusters::ZERO.to_word(), 0xffff_ffff_0000_0000);
    }

    #[test]
    fn ranges_change_what_they_name_and_nothing_else() {
        for start in 0..=32 {
            for end in start..=32 {
                for (kind, others) in [
                    (Subcluster::Allocated, Subclusters::ZERO),
                    (Subcluster::Zero, Subclusters::ALLOCATED),
                    (Subcluster::Unallocated, Subclusters::ZERO),
                ] {
                    let changed = others.with(start..end, kind);
                    for index in 0..32 {
                        let inside = (start..end).contains(&index);
                        let expected = if inside { kind } else { others.get(index) };
                        assert_eq!(changed.get(index), expected, "{start}..{end}: {index}");
                    }
                    assert_eq!(changed.any(0..32, kind), start < end);
                    assert!(!changed.any(0..start, kind) && !changed.any(end..32, kind));
                    if start < end {
                        assert_eq!(changed.run(start), (kind, end));
                    }
                }
            }
        }
    }
}
