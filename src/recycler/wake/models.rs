#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use loom::thread;

use super::*;
use crate::sync::model::explore;

/// The sleeper sees all work, however the wakes fall: a lost one would leave it asleep.
#[test]
fn no_wake_is_lost_between_the_look_and_the_sleep() {
    explore(|| {
        let signal = Arc::new(WakeSignal::default());
        // Relaxed, and not under a lock: the signal alone has to see to it that it is seen.
        let work = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
        let wakers = [0, 1].map(|n| {
            let (signal, work) = (signal.clone(), work.clone());
            thread::spawn(move || {
                work[n].store(true, Ordering::Relaxed);
                signal.wake();
            })
        });
        while !work.iter().all(|work| work.load(Ordering::Relaxed)) {
            assert!(signal.wait(None), "nobody stops it");
        }
        wakers.into_iter().for_each(|waker| waker.join().unwrap());
    });
}

#[test]
fn stop_ends_the_wait_whatever_else_wakes() {
    explore(|| {
        let signal = Arc::new(WakeSignal::default());
        let other = |act: fn(&WakeSignal)| {
            let signal = signal.clone();
            thread::spawn(move || act(&signal))
        };
        let others = [other(WakeSignal::wake), other(WakeSignal::stop)];
        let mut waits = 0;
        while signal.wait(None) {
            waits += 1;
            assert!(waits <= 1, "one wake, one return");
        }
        assert!(signal.is_stopped());
        others.into_iter().for_each(|other| other.join().unwrap());
        assert!(!signal.wait(None), "and every later one");
    });
}
