//! The lock table: which guest clusters are in use by whom.
//!
//! *Shared pins a mapping, exclusive may change it.* A read or an in-place write holds its clusters
//! shared from the lookup to the end of the data I/O, so a cluster that is being read cannot be
//! freed, reused or moved; whoever changes a mapping holds the clusters exclusively.
//!
//! A guard covers one contiguous range and a thread holds at most one guard, so no two threads can
//! wait for each other. Requests are granted in the order they came wherever they conflict: an
//! exclusive request cannot starve behind a stream of shared ones.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::sync::{Condvar, Mutex};

/// The locks of one image, by guest cluster.
#[derive(Debug, Default)]
pub struct GuestLocks {
    requests: Mutex<Requests>,
    changed: Condvar,
    /// How many hold all clusters alone or wait for them. It orders nothing.
    of_all: AtomicUsize,
}

/// All clusters.
pub const ALL: Range<u64> = 0..u64::MAX;

#[derive(Debug, Default)]
struct Requests {
    /// In the order of arrival. As many as there are threads at work, so scanning it is cheap.
    queue: Vec<Request>,
    next_id: u64,
    waiting: usize,
}

#[derive(Debug)]
struct Request {
    id: u64,
    clusters: Range<u64>,
    exclusive: bool,
}

impl Request {
    fn conflicts_with(&self, other: &Request) -> bool {
        (self.exclusive || other.exclusive)
            && self.clusters.start < other.clusters.end
            && other.clusters.start < self.clusters.end
    }
}

impl Requests {
    /// Whether no earlier request is in the way of `id`.
    fn is_granted(&self, id: u64) -> bool {
        let Some(at) = self.queue.iter().position(|r| r.id == id) else { return false };
        let (earlier, rest) = self.queue.split_at(at);
        !earlier.iter().any(|r| r.conflicts_with(&rest[0]))
    }
}

/// Holds a range of guest clusters until it is dropped.
#[derive(Debug)]
#[must_use = "dropping the guard releases the clusters"]
pub struct Guard<'a> {
    locks: &'a GuestLocks,
    id: u64,
    of_all: bool,
}

impl GuestLocks {
    /// Waits until nobody holds any of `clusters` exclusively, and holds them shared.
    pub fn shared(&self, clusters: Range<u64>) -> Guard<'_> {
        self.acquire(clusters, false)
    }

    /// Waits until nobody holds any of `clusters`, and holds them alone.
    pub fn exclusive(&self, clusters: Range<u64>) -> Guard<'_> {
        self.acquire(clusters, true)
    }

    /// Whether somebody holds [`ALL`] alone, or waits for that: who asks for any would wait.
    pub fn are_all_held(&self) -> bool {
        self.of_all.load(Ordering::Relaxed) > 0
    }

    fn acquire(&self, clusters: Range<u64>, exclusive: bool) -> Guard<'_> {
        let of_all = exclusive && clusters == ALL;
        if of_all {
            self.of_all.fetch_add(1, Ordering::Relaxed);
        }
        #[cfg(debug_assertions)]
        one_guard_a_thread::enter();
        let mut requests = self.requests.lock();
        let id = requests.next_id;
        requests.next_id += 1;
        requests.queue.push(Request { id, clusters, exclusive });
        if !requests.is_granted(id) {
            requests.waiting += 1;
            while !requests.is_granted(id) {
                self.changed.wait(&mut requests);
            }
            requests.waiting -= 1;
        }
        Guard { locks: self, id, of_all }
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        #[cfg(debug_assertions)]
        one_guard_a_thread::leave();
        if self.of_all {
            self.locks.of_all.fetch_sub(1, Ordering::Relaxed);
        }
        let mut requests = self.locks.requests.lock();
        requests.queue.retain(|r| r.id != self.id);
        if requests.waiting > 0 {
            self.locks.changed.notify_all();
        }
    }
}

#[cfg(debug_assertions)]
#[allow(clippy::missing_const_for_thread_local, reason = "the model's takes no constant")]
mod one_guard_a_thread {
    use std::cell::Cell;

    use crate::sync::thread_local;

    thread_local!(static HELD: Cell<bool> = Cell::new(false));

    pub(super) fn enter() {
        HELD.with(|held| assert!(!held.replace(true), "a thread holds two guest cluster guards"));
    }

    pub(super) fn leave() {
        HELD.with(|held| held.set(false));
    }

    /// Whether this thread holds a guard.
    pub(super) fn held() -> bool {
        HELD.with(Cell::get)
    }
}

/// Asserts, in debug builds, that this thread holds no guest clusters: it is about to flush.
pub fn assert_none_held() {
    #[cfg(debug_assertions)]
    assert!(!one_guard_a_thread::held(), "a flush starts while guest clusters are held");
}

#[cfg(all(test, feature = "model"))]
mod models;

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// Runs `second` while `first` is held; whether it had to wait for the release.
    fn waits(first: (Range<u64>, bool), second: (Range<u64>, bool)) -> bool {
        let locks = Arc::new(GuestLocks::default());
        let released = Arc::new(AtomicUsize::new(0));
        let guard = locks.acquire(first.0, first.1);
        let other = {
            let (locks, released) = (locks.clone(), released.clone());
            thread::spawn(move || {
                let _guard = locks.acquire(second.0, second.1);
                released.load(Ordering::SeqCst) == 1
            })
        };
        thread::sleep(Duration::from_millis(30));
        released.store(1, Ordering::SeqCst);
        drop(guard);
        other.join().unwrap()
    }

    #[test]
    fn shared_ranges_overlap_and_exclusive_ones_do_not() {
        assert!(!waits((0..4, false), (2..6, false)));
        assert!(waits((0..4, false), (3..4, true)));
        assert!(waits((0..4, true), (3..9, false)));
        assert!(waits((0..4, true), (0..1, true)));
        assert!(!waits((0..4, true), (4..5, true)));
    }

    #[test]
    fn it_is_told_while_all_is_held() {
        let locks = GuestLocks::default();
        for (clusters, exclusive, told) in
            [(ALL, true, true), (ALL, false, false), (0..u64::MAX - 1, true, false)]
        {
            let guard = locks.acquire(clusters.clone(), exclusive);
            assert_eq!(locks.are_all_held(), told, "{clusters:?} {exclusive}");
            drop(guard);
            assert!(!locks.are_all_held());
        }
    }

    #[test]
    fn an_exclusive_request_is_not_overtaken_by_later_shared_ones() {
        let locks = Arc::new(GuestLocks::default());
        let order = Arc::new(Mutex::new(Vec::new()));
        let first = locks.shared(0..1);
        let mut threads = Vec::new();
        for (name, exclusive) in [("exclusive", true), ("shared", false)] {
            let (locks, order) = (locks.clone(), order.clone());
            threads.push(thread::spawn(move || {
                let _guard = locks.acquire(0..1, exclusive);
                order.lock().push(name);
            }));
            thread::sleep(Duration::from_millis(30));
        }
        assert!(order.lock().is_empty(), "the later shared request waits in line");
        drop(first);
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(*order.lock(), ["exclusive", "shared"]);
    }

    #[test]
    fn many_threads_exclude_each_other() {
        let locks = Arc::new(GuestLocks::default());
        let inside: Arc<Vec<AtomicUsize>> = Arc::new((0..4).map(|_| AtomicUsize::new(0)).collect());
        let threads: Vec<_> = (0..4u64)
            .map(|t| {
                let (locks, inside) = (locks.clone(), inside.clone());
                thread::spawn(move || {
                    for i in 0..2000u64 {
                        let first = (i + t) % 4;
                        let _guard = locks.exclusive(first..4);
                        for c in &inside[first as usize..] {
                            assert_eq!(c.fetch_add(1, Ordering::SeqCst), 0);
                        }
                        for c in &inside[first as usize..] {
                            c.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
    }
}
