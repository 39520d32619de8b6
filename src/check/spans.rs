//! Tables that may lie over each other: which bytes of the file are how many tables' part.
//!
//! In a sound image tables do not overlap. In a hostile one thousands may share the same bytes, so
//! the bytes are read once and what they say counts as often as tables cover them.

use std::collections::BTreeMap;
use std::ops::Range;

/// How many tables cover something: all, and of those the active ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Uses {
    /// All tables.
    pub(super) total: u64,
    /// Tables of the active disk, not of snapshots.
    pub(super) active: u64,
}

impl Uses {
    /// As many uses more.
    pub(super) fn add(&mut self, other: Uses) {
        self.total = self.total.saturating_add(other.total);
        self.active = self.active.saturating_add(other.active);
    }
}

/// Byte ranges of the file, each a table.
#[derive(Debug, Default)]
pub(super) struct Spans {
    /// At each offset where something changes: tables that start there less those that end.
    changes: BTreeMap<u64, (i64, i64)>,
}

impl Spans {
    /// Adds the table that lies in `range`.
    pub(super) fn add(&mut self, range: Range<u64>, active: bool) {
        for (at, change) in [(range.start, 1), (range.end, -1)] {
            let (total, actives) = self.changes.entry(at).or_default();
            *total += change;
            *actives += if active { change } else { 0 };
        }
    }

    /// Disjoint ranges in ascending order, each with its uses, which are not 0.
    pub(super) fn segments(&self) -> impl Iterator<Item = (Range<u64>, Uses)> + '_ {
        let (mut start, mut total, mut active) = (0, 0i64, 0i64);
        let segments = self.changes.iter().map(move |(&at, change)| {
            let uses = Uses { total: total as u64, active: active as u64 };
            let range = start..at;
            (start, total, active) = (at, total + change.0, active + change.1);
            (range, uses)
        });
        segments.filter(|(range, uses)| uses.total != 0 && !range.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_tables_become_disjoint_segments() {
        let mut spans = Spans::default();
        spans.add(0..100, true);
        spans.add(50..150, false);
        spans.add(50..60, false);
        spans.add(200..300, false);
        spans.add(7..7, false);
        let found: Vec<_> = spans.segments().map(|(r, u)| (r, u.total, u.active)).collect();
        assert_eq!(
            found,
            [
                (0..7, 1, 1),
                (7..50, 1, 1),
                (50..60, 3, 1),
                (60..100, 2, 1),
                (100..150, 1, 0),
                (200..300, 1, 0),
            ]
        );
    }
}
