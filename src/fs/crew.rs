//! How many of the FUSE workers wait for requests at once.
//!
//! Where one request follows the other's reply, more workers than processors answer sooner: the
//! kernel wakes them in turn, and the next one is more often found where its client runs than on a
//! processor that has to be woken. Where requests wait for the host's disk, so many are on their way
//! there at once. Where they queue up and processors are what is short, workers only get in each
//! other's way. Measured on two processors with `examples/floor.rs`, fio and 4 KiB random reads of
//! what is in memory, thousands a second with 3 threads and with 8: 43 and 64 at depth 1, 92 and 98 at
//! depth 4, 262 and 187 at depth 32.
//!
//! So there are [`WORKERS`], and while they meet each other often and none waits for long, all but the
//! first few rest: each sleeps for a moment, after its reply and holding nothing, before it looks for
//! the next request. They are always the same who rest: where they took turns, reads at depth 32 were
//! 10 % slower. Only who has had one and the same request for as long as one rests waits for something
//! else than a processor, and another one takes its place.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::counters::Line;

/// How many there are.
pub const WORKERS: usize = 8;

/// A worker looks at the others each time that it has had so many small requests, or fewer large ones,
const LOOK: u32 = 16;
/// each of which counts for as many as it has this many bytes.
const SMALL: usize = 16 << 10;
/// A request of so many bytes is better answered by few in any case: their buffers stay in the
/// processors' caches.
const LARGE: usize = 256 << 10;
/// Who has needed longer than this for each small request has waited for the host or for requests.
const SLOW: Duration = Duration::from_micros(100);
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
    /// When that was.
    static LOOKED: Cell<Option<Instant>> = const { Cell::new(None) };
    /// What each of the others did when this one last asked whether it is one too many, and since when
    /// that has been so.
    static SEEN: Cell<[Option<(u32, Instant)>; WORKERS]> = const { Cell::new([None; WORKERS]) };
}

/// The workers of one mount.
#[derive(Debug)]
pub(super) struct Crew {
    /// So many go on where requests queue up.
    active: usize,
    /// How often each of them has begun or ended a request. In lines of their own: each request changes
    /// one.
    turns: [Line<AtomicU32>; WORKERS],
    /// The requests of this window, and in the upper half those that met another one.
    window: AtomicU64,
    is_crowded: AtomicBool,
}

/// Whether a worker that has begun or ended a request so often is serving one.
fn is_serving(turn: u32) -> bool {
    turn % 2 == 1
}

/// Marks a worker as serving until it is dropped, however the request ends.
struct Serving<'a>(&'a AtomicU32);

impl<'a> Serving<'a> {
    fn new(turns: &'a AtomicU32) -> Self {
        next_turn(turns);
        Serving(turns)
    }
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        next_turn(self.0);
    }
}

/// Nobody else changes them.
fn next_turn(turns: &AtomicU32) {
    turns.store(turns.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

impl Crew {
    /// As many as there are, on a machine with so many processors.
    pub(super) fn new(processors: usize) -> Self {
        Crew {
            // One more than processors is best where requests queue up.
            active: processors + 1,
            turns: Default::default(),
            window: AtomicU64::new(0),
            is_crowded: AtomicBool::new(false),
        }
    }

    /// Has this worker answer a request of so many bytes, and rest where it is one too many.
    pub(super) fn serve(&self, bytes: usize, answer: impl FnOnce()) {
        let me = SELF.with(|me| *me);
        let serving = Serving::new(&self.turns[me].0);
        let since = SINCE.get() + (bytes / SMALL) as u32 + 1;
        if since < LOOK {
            SINCE.set(since);
        } else {
            let now = Instant::now();
            let took = LOOKED.replace(Some(now)).map_or(Duration::ZERO, |looked| now - looked);
            let is_slow = took >= SLOW * since;
            self.note(since, !is_slow && (bytes >= LARGE || self.meets_another(me)));
            SINCE.set(0);
        }
        answer();
        drop(serving);
        if self.is_too_many(me) {
            std::thread::sleep(REST);
        }
    }

    fn meets_another(&self, me: usize) -> bool {
        let mut others = self.turns.iter().enumerate().filter(|(other, _)| *other != me);
        others.any(|(_, turns)| is_serving(turns.0.load(Ordering::Relaxed)))
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

    /// Whether this worker, who asks, had better rest.
    fn is_too_many(&self, worker: usize) -> bool {
        worker >= self.active
            && self.is_crowded.load(Ordering::Relaxed)
            && worker - self.stuck_before(worker) >= self.active
    }

    /// How many of those before `worker`, who asks, have served one and the same request for long.
    fn stuck_before(&self, worker: usize) -> usize {
        let (now, mut seen) = (Instant::now(), SEEN.get());
        let mut stuck = 0;
        for (turns, seen) in self.turns.iter().zip(&mut seen).take(worker) {
            let turn = turns.0.load(Ordering::Relaxed);
            match *seen {
                Some((same, since)) if same == turn => {
                    stuck += usize::from(is_serving(turn) && now - since >= REST);
                }
                _ => *seen = Some((turn, now)),
            }
        }
        SEEN.set(seen);
        stuck
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAST: usize = WORKERS - 1;

    /// `times` windows of requests, of which `met` in a hundred met another one.
    fn work(crew: &Crew, times: u32, met: u32) {
        (0..times * WINDOW).for_each(|n| crew.note(1, n % 100 < met));
    }

    #[test]
    fn workers_rest_while_they_meet_often_and_until_they_do_not() {
        let crew = Crew::new(2);
        assert!(!crew.is_too_many(LAST));
        work(&crew, 1, 10);
        assert!(!crew.is_too_many(LAST), "few meet");
        work(&crew, 1, 40);
        assert!(crew.is_too_many(LAST), "many meet");
        work(&crew, 3, 10);
        assert!(crew.is_too_many(LAST), "those that are left meet less often");
        work(&crew, 1, 0);
        assert!(!crew.is_too_many(LAST), "none meet");
    }

    /// Whether workers rest after `requests` of so many bytes, while others are serving or not, each
    /// of which takes `time`.
    fn rest_after(requests: u32, bytes: usize, meet: bool, time: Duration) -> bool {
        let crew = Crew::new(WORKERS);
        for _ in 0..requests {
            // Others do nothing but serve meanwhile.
            let turn = u32::from(meet);
            crew.turns.iter().for_each(|other| other.0.store(turn, Ordering::Relaxed));
            crew.serve(bytes, || std::thread::sleep(time));
        }
        crew.is_crowded.load(Ordering::Relaxed)
    }

    #[test]
    fn requests_that_meet_are_noticed_large_ones_sooner() {
        for (bytes, requests, when_alone) in
            [(4096, WINDOW, false), (64 << 10, WINDOW / 4, false), (1 << 20, WINDOW / 64, true)]
        {
            for meet in [true, false] {
                let rests = rest_after(requests + LOOK, bytes, meet, Duration::ZERO);
                assert_eq!(rests, meet || when_alone, "{requests} of {bytes} bytes, {meet}");
            }
        }
    }

    #[test]
    fn requests_that_wait_for_the_host_do_not_count_as_many() {
        let large = 1 << 20;
        let each = SLOW * (large / SMALL) as u32 * 2;
        assert!(!rest_after(WINDOW / 64 + LOOK, large, true, each));
    }

    #[test]
    fn another_one_takes_the_place_of_who_waits_for_the_host() {
        let crew = Crew::new(2);
        work(&crew, 1, 40);
        crew.turns[..3].iter().for_each(|turns| next_turn(&turns.0));
        assert!(crew.is_too_many(3), "their requests have just begun");
        std::thread::sleep(REST);
        next_turn(&crew.turns[1].0);
        assert_eq!([3, 4, 5].map(|worker| crew.is_too_many(worker)), [false, false, true]);
        crew.turns[..3].iter().for_each(|turns| next_turn(&turns.0));
        assert!(crew.is_too_many(3), "those that were done began others");
    }

    #[test]
    fn as_many_go_on_as_there_are_processors_and_one() {
        for processors in [1, 2, 4, 7, 64] {
            let crew = Crew::new(processors);
            work(&crew, 1, 100);
            let left = (0..WORKERS).filter(|worker| !crew.is_too_many(*worker)).count();
            assert_eq!(left, (processors + 1).min(WORKERS), "{processors} processors");
        }
    }
}
