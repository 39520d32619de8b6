//! How many of the FUSE workers wait for requests at once.
//!
//! Where one request follows the other's reply, more workers than processors answer sooner: the
//! kernel wakes them in turn, and the next one is more often found where its client runs than on a
//! processor that has to be woken. Where requests queue up they only get in each other's way. Measured
//! on two processors with `examples/floor.rs`, fio and 4 KiB random reads, thousands a second with 3
//! threads and with 8: 43 and 64 at depth 1, 92 and 98 at depth 4, 262 and 187 at depth 32.
//!
//! So there are [`WORKERS`], and while they meet each other often, all but a few rest: each sleeps for
//! a moment, after its reply and holding nothing, before it looks for the next request.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// How many there are.
pub const WORKERS: usize = 8;

/// A worker looks at the others each time that it has had so many small requests, or fewer large ones,
const LOOK: u32 = 16;
/// each of which counts for as many as it has this many bytes.
const SMALL: usize = 16 << 10;
/// A request of so many bytes is better answered by few in any case: their buffers stay in the
/// processors' caches.
const LARGE: usize = 256 << 10;
/// What they have seen counts after so many requests.
const WINDOW: u32 = 2048;
/// They are too many when so many of those requests meet another one,
const CROWDED: u32 = WINDOW / 6;
/// and not any more when so few do: a few workers meet less often than many.
const QUIET: u32 = WINDOW / 80;
/// How long one rests. Whoever unmounts waits so long at most.
const REST: Duration = Duration::from_millis(100);

thread_local! {
    /// Which worker this thread is.
    static SELF: usize = {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed) % WORKERS
    };
    /// Its requests since it last looked.
    static SINCE: Cell<u32> = const { Cell::new(0) };
}

/// The workers of one mount.
#[derive(Debug)]
pub(super) struct Crew {
    /// So many are too many where requests queue up.
    spare: u32,
    workers: [Worker; WORKERS],
    resting: AtomicU32,
    /// The requests of this window, and in the upper half those that met another one.
    window: AtomicU64,
    is_crowded: AtomicBool,
}

/// In a cache line of its own: each request changes it.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Worker {
    is_serving: AtomicBool,
}

/// Marks a worker as serving until it is dropped, however the request ends.
struct Serving<'a>(&'a Worker);

impl<'a> Serving<'a> {
    fn new(worker: &'a Worker) -> Self {
        worker.is_serving.store(true, Ordering::Relaxed);
        Serving(worker)
    }
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.is_serving.store(false, Ordering::Relaxed);
    }
}

impl Crew {
    /// As many as there are, on a machine with so many processors.
    pub(super) fn new(processors: usize) -> Self {
        // One more than processors is best where requests queue up.
        let spare = WORKERS.saturating_sub(processors + 1) as u32;
        Crew {
            spare,
            workers: Default::default(),
            resting: AtomicU32::new(0),
            window: AtomicU64::new(0),
            is_crowded: AtomicBool::new(false),
        }
    }

    /// Has this worker answer a request of so many bytes, and rest where it is one too many.
    pub(super) fn serve(&self, bytes: usize, answer: impl FnOnce()) {
        let me = SELF.with(|me| *me);
        let serving = Serving::new(&self.workers[me]);
        let since = SINCE.get() + (bytes / SMALL) as u32 + 1;
        if since < LOOK {
            SINCE.set(since);
        } else {
            let others = self.workers.iter().enumerate().filter(|(other, _)| *other != me);
            let meets = others.map(|(_, w)| &w.is_serving).any(|s| s.load(Ordering::Relaxed));
            self.note(since, meets || bytes >= LARGE);
            SINCE.set(0);
        }
        answer();
        drop(serving);
        self.unless_needed(|| std::thread::sleep(REST));
    }

    /// Requests were answered, and met another one, or count as if they had, or not.
    fn note(&self, requests: u32, met: bool) {
        let added = u64::from(if met { requests } else { 0 }) << 32 | u64::from(requests);
        let before = self.window.fetch_add(added, Ordering::Relaxed) as u32;
        // One of those who come here at once ends the window.
        if before < WINDOW && before + requests >= WINDOW {
            let met = (self.window.swap(0, Ordering::Relaxed) >> 32) as u32;
            if met > CROWDED {
                self.is_crowded.store(true, Ordering::Relaxed);
            } else if met < QUIET {
                self.is_crowded.store(false, Ordering::Relaxed);
            }
        }
    }

    /// Does `rest` where this worker is one too many.
    fn unless_needed(&self, rest: impl FnOnce()) {
        let may_rest = || self.resting.load(Ordering::Relaxed) < self.spare;
        if !self.is_crowded.load(Ordering::Relaxed) || !may_rest() {
            return;
        }
        if self.resting.fetch_add(1, Ordering::Relaxed) < self.spare {
            rest();
        }
        self.resting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `times` windows of requests, of which `met` in a hundred met another one.
    fn work(crew: &Crew, times: u32, met: u32) {
        (0..times * WINDOW).for_each(|n| crew.note(1, n % 100 < met));
    }

    fn may_rest(crew: &Crew) -> bool {
        let mut rests = false;
        crew.unless_needed(|| rests = true);
        rests
    }

    #[test]
    fn workers_rest_while_they_meet_often_and_until_they_do_not() {
        let crew = Crew::new(2);
        assert!(!may_rest(&crew));
        work(&crew, 1, 10);
        assert!(!may_rest(&crew), "few meet");
        work(&crew, 1, 40);
        assert!(may_rest(&crew), "many meet");
        work(&crew, 3, 10);
        assert!(may_rest(&crew), "those that are left meet less often");
        work(&crew, 1, 0);
        assert!(!may_rest(&crew), "none meet");
    }

    #[test]
    fn requests_that_meet_are_noticed_large_ones_sooner() {
        for (bytes, requests, when_alone) in
            [(4096, WINDOW, false), (64 << 10, WINDOW / 4, false), (1 << 20, WINDOW / 64, true)]
        {
            for meet in [true, false] {
                let crew = Crew::new(2);
                let one = || crew.serve(bytes, || ());
                for _ in 0..requests {
                    if may_rest(&crew) {
                        break;
                    }
                    // Another worker does nothing but serve meanwhile.
                    let beside = |other: &Worker| other.is_serving.store(meet, Ordering::Relaxed);
                    crew.workers.iter().for_each(beside);
                    one();
                }
                let rests = meet || when_alone;
                assert_eq!(may_rest(&crew), rests, "{requests} of {bytes} bytes, {meet}");
            }
        }
    }

    #[test]
    fn as_many_go_on_as_there_are_processors_and_one() {
        for processors in [1, 2, 4, 7, 64] {
            let crew = Crew::new(processors);
            work(&crew, 1, 100);
            // Each rests while the next one asks.
            fn resting(crew: &Crew) -> usize {
                let mut more = 0;
                crew.unless_needed(|| more = 1 + resting(crew));
                more
            }
            let left = WORKERS - resting(&crew);
            assert_eq!(left, (processors + 1).min(WORKERS), "{processors} processors");
            assert_eq!(crew.resting.load(Ordering::Relaxed), 0);
        }
    }
}
