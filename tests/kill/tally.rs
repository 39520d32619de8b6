//! How many kills there were, what they met, and how long it took to be there again.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long mounting again may take, until the disk can be written, in the median.
const SOON: Duration = Duration::from_secs(1);

/// What all workers have done together.
pub struct Tally {
    wanted: u64,
    until: Instant,
    started: Instant,
    failed: AtomicBool,
    kills: AtomicU64,
    moving: AtomicU64,
    acknowledged: AtomicU64,
    mounts: Mutex<Vec<Duration>>,
}

impl Tally {
    pub fn new(wanted: u64, seconds: u64) -> Tally {
        let started = Instant::now();
        Tally {
            wanted,
            until: started + Duration::from_secs(seconds),
            started,
            failed: AtomicBool::new(false),
            kills: AtomicU64::new(0),
            moving: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
            mounts: Mutex::default(),
        }
    }

    /// Whether to go on.
    pub fn goes_on(&self) -> bool {
        let enough = self.kills.load(Ordering::Relaxed) >= self.wanted;
        !self.failed.load(Ordering::Relaxed) && (!enough || Instant::now() < self.until)
    }

    /// A daemon was killed, with clusters moved by then or not, after so many acknowledged fsyncs.
    pub fn killed(&self, moved: bool, acknowledged: u64) {
        self.kills.fetch_add(1, Ordering::Relaxed);
        self.moving.fetch_add(u64::from(moved), Ordering::Relaxed);
        self.acknowledged.fetch_add(acknowledged, Ordering::Relaxed);
    }

    /// From the start of the daemon after a kill until its disk could be written.
    pub fn mounted_again(&self, took: Duration) {
        self.mounts.lock().push(took);
    }

    /// Sees to it that a worker that fails keeps no other at work.
    pub fn ends_on_panic(&self) -> impl Drop + '_ {
        struct Ends<'a>(&'a AtomicBool);
        impl Drop for Ends<'_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.store(true, Ordering::Relaxed);
                }
            }
        }
        Ends(&self.failed)
    }

    /// The median and the longest of the times that mounting again took.
    fn mounting(&self) -> (Duration, Duration) {
        let mut mounts = self.mounts.lock();
        mounts.sort();
        let median = mounts.get(mounts.len() / 2).copied().unwrap_or_default();
        (median, mounts.last().copied().unwrap_or_default())
    }

    pub fn assert_well_done(&self) {
        let (median, _) = self.mounting();
        assert!(median < SOON, "mounting again takes {median:?} in the median");
        let (kills, moving) = (self.kills.load(Ordering::Relaxed), &self.moving);
        assert!(moving.load(Ordering::Relaxed) * 10 >= kills, "hardly anything moved: {self}");
        assert!(self.acknowledged.load(Ordering::Relaxed) > 0, "nothing was acknowledged: {self}");
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |of: &AtomicU64| of.load(Ordering::Relaxed);
        let (median, longest) = self.mounting();
        write!(
            f,
            "{} kills, {} of them after clusters moved, {} fsyncs acknowledged, \
             mounted again in {median:.3?} (median; {longest:.3?} at most), in {:.1?}",
            number(&self.kills),
            number(&self.moving),
            number(&self.acknowledged),
            self.started.elapsed()
        )
    }
}
