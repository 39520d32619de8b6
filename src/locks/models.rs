#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use loom::thread;

use super::*;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::model::explore;

/// Who is at a cluster: each shared holder counts 1, an exclusive one more than all those can.
const EXCLUSIVE: usize = 100;

/// A disk of two clusters, where everybody finds out whether somebody else is.
#[derive(Default)]
struct Disk {
    locks: GuestLocks,
    /// Relaxed: what orders the accesses is the lock table.
    inside: [AtomicUsize; 2],
}

impl Disk {
    fn visit(&self, clusters: Range<u64>, exclusive: bool) {
        let _guard = self.locks.acquire(clusters.clone(), exclusive);
        let weight = if exclusive { EXCLUSIVE } else { 1 };
        let inside = &self.inside[clusters.start as usize..clusters.end as usize];
        for cluster in inside {
            let others = cluster.fetch_add(weight, Ordering::Relaxed);
            assert!(others < EXCLUSIVE, "somebody is alone here");
            assert!(!exclusive || others == 0, "alone among {others}");
        }
        for cluster in inside {
            cluster.fetch_sub(weight, Ordering::Relaxed);
        }
    }
}

/// Each thread visits these clusters one after the other; a lost wake would be a deadlock.
fn all_exclude_each_other<const N: usize>(threads: [&'static [(Range<u64>, bool)]; N]) {
    explore(move || {
        let disk = Arc::new(Disk::default());
        let run = |visits: &'static [(Range<u64>, bool)]| {
            let disk = disk.clone();
            move || visits.iter().for_each(|(clusters, alone)| disk.visit(clusters.clone(), *alone))
        };
        let (first, rest) = threads.split_first().unwrap();
        let others: Vec<_> = rest.iter().map(|visits| thread::spawn(run(visits))).collect();
        run(first)();
        others.into_iter().for_each(|other| other.join().unwrap());
    });
}

#[test]
fn exclusive_holders_are_alone() {
    all_exclude_each_other([&[(0..2, true)], &[(0..1, true)], &[(1..2, true)]]);
}

#[test]
fn shared_holders_are_among_themselves() {
    all_exclude_each_other([&[(0..1, false)], &[(0..2, false)], &[(0..2, true)]]);
}

#[test]
fn whoever_comes_again_waits_in_line() {
    all_exclude_each_other([&[(0..2, true), (0..1, false)], &[(0..1, false), (0..2, true)]]);
}

/// Those who conflict are served in the order of their numbers, which is that of their arrival.
#[test]
fn nobody_is_overtaken() {
    explore(|| {
        let locks = Arc::new(GuestLocks::default());
        let served = Arc::new(Mutex::new(Vec::new()));
        let serve = |exclusive| {
            let (locks, served) = (locks.clone(), served.clone());
            move || {
                let guard = locks.acquire(0..1, exclusive);
                served.lock().push((guard.id, exclusive));
            }
        };
        let others = [true, false].map(|exclusive| thread::spawn(serve(exclusive)));
        serve(false)();
        others.into_iter().for_each(|other| other.join().unwrap());
        let served = served.lock();
        let (alone, at) =
            (0..).zip(&*served).find(|(_, (_, alone))| *alone).map(|(n, s)| (s.0, n)).unwrap();
        assert_eq!(alone, at, "{served:?}");
    });
}
