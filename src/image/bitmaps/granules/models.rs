#![allow(clippy::unwrap_used)]

use loom::thread;

use super::*;
use crate::sync::model::explore;

fn set(bytes: u64) -> Arc<GranuleSet> {
    Arc::new(GranuleSet::new(Budget::share(bytes, &[2 * GROUP]).remove(0)))
}

fn has(set: &GranuleSet, granules: Range<u64>) -> bool {
    granules.into_iter().all(|granule| {
        let mut bits = [0; 8];
        set.add_to(granule / WORD * WORD, &mut bits);
        let is_there = u64::from_le_bytes(bits) >> (granule % WORD) & 1 == 1;
        is_there && set.may_have(&(granule..granule + 1))
    })
}

/// Two add ranges that share words and chunks; whoever comes after both finds all of it.
fn both_are_found(bytes: u64, may_be_lost: bool) {
    explore(move || {
        let set = set(bytes);
        let ranges = [64..66, CHUNK - 1..CHUNK + 1];
        let other = {
            let (set, ranges) = (set.clone(), ranges.clone());
            thread::spawn(move || ranges.into_iter().for_each(|range| set.insert(range)))
        };
        set.insert(63..65);
        other.join().unwrap();
        let all_there = ranges.into_iter().all(|range| has(&set, range)) && has(&set, 63..65);
        assert!(all_there || set.is_lost(), "something is missing and nobody says so");
        assert!(may_be_lost || !set.is_lost(), "there was room for all");
    });
}

#[test]
fn threads_that_add_at_once_lose_nothing() {
    // Each may pay for what the other has made meanwhile.
    both_are_found(8 * COST, false);
}

#[test]
fn what_does_not_fit_is_told_whoever_comes_first() {
    both_are_found(2 * COST, true);
    both_are_found(COST, true);
}
