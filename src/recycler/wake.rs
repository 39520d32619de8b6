//! Waking the recycler: many causes, one signal.

use std::time::Instant;

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Condvar, Mutex};

/// A signal that coalesces: any number of wakes before the sleeper looks are one. Its lock is the
/// last in the order.
#[derive(Debug, Default)]
pub struct WakeSignal {
    /// Set by [`WakeSignal::wake`], so that waking one who is awake costs one atomic access.
    pending: AtomicBool,
    stopped: Mutex<bool>,
    changed: Condvar,
}

impl WakeSignal {
    /// There is work.
    pub fn wake(&self) {
        if !self.pending.swap(true, Ordering::AcqRel) {
            // Taking the lock orders this wake after the sleeper's look at `pending`.
            let _stopped = self.stopped.lock();
            self.changed.notify_all();
        }
    }

    /// There will be no more work.
    pub fn stop(&self) {
        *self.stopped.lock() = true;
        self.changed.notify_all();
    }

    /// Whether [`WakeSignal::stop`] was called.
    pub fn is_stopped(&self) -> bool {
        *self.stopped.lock()
    }

    /// Sleeps until there is work, or until `deadline`; `false` when stopped.
    pub fn wait(&self, deadline: Option<Instant>) -> bool {
        let mut stopped = self.stopped.lock();
        loop {
            if *stopped {
                return false;
            }
            if self.pending.swap(false, Ordering::AcqRel) {
                return true;
            }
            match deadline {
                None => self.changed.wait(&mut stopped),
                Some(at) => {
                    if self.changed.wait_until(&mut stopped, at).timed_out() {
                        return !*stopped;
                    }
                }
            }
        }
    }
}

#[cfg(all(test, feature = "model"))]
mod models;

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_wake_before_the_wait_is_not_lost_and_counts_once() {
        let signal = WakeSignal::default();
        signal.wake();
        signal.wake();
        let soon = || Some(Instant::now() + Duration::from_millis(20));
        let start = Instant::now();
        assert!(signal.wait(Some(start + Duration::from_secs(30))));
        assert!(start.elapsed() < Duration::from_secs(10));
        let start = Instant::now();
        assert!(signal.wait(soon()), "a deadline is no stop");
        assert!(start.elapsed() >= Duration::from_millis(20), "one signal, one wake");
    }

    #[test]
    fn stop_ends_a_wait() {
        let signal = Arc::new(WakeSignal::default());
        let sleeper = {
            let signal = signal.clone();
            thread::spawn(move || signal.wait(None))
        };
        thread::sleep(Duration::from_millis(20));
        signal.stop();
        assert!(!sleeper.join().unwrap());
    }
}
