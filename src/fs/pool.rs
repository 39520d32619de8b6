//! The slow pool: threads for what may block, so that one image's slow flush never stalls reads of
//! the others, nor the requests of one user those of another. Each user's jobs are run in the order of
//! their coming by so many threads at once; where that makes more than there may be in all, users take
//! turns. The pool knows nothing of what it runs.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::{Condvar, Mutex, MutexGuard};

type Job = Box<dyn FnOnce() + Send>;

/// Whose jobs those are that nobody in particular waits for. The kernel closes files for this one.
pub(super) const NOBODY: u32 = u32::MAX;
/// So many users may have all of their threads at once.
const FULL_SHARES: usize = 4;

/// Threads that run jobs. Each is started when there is a job for it. Dropping the pool waits until all
/// jobs are done.
pub(super) struct Pool {
    shared: Arc<Shared>,
    /// Held by the caller that runs a job itself.
    here: Mutex<()>,
}

struct Shared {
    /// Threads that run the jobs of one user at once.
    share: usize,
    state: Mutex<State>,
    /// There is a job that may be run, or the pool is dropped.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    users: HashMap<u32, Jobs>,
    /// The users who have jobs waiting; whose turn it is comes first.
    turns: VecDeque<u32>,
    threads: Vec<JoinHandle<()>>,
    running: usize,
    is_dropped: bool,
}

/// The jobs of one user, of which there are some.
#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    running: usize,
}

impl Pool {
    /// A pool with `share` threads for each user.
    pub(super) fn new(share: usize) -> Pool {
        let shared = Shared { share, state: Mutex::default(), changed: Condvar::new() };
        Pool { shared: Arc::new(shared), here: Mutex::new(()) }
    }

    /// Runs `job`, which `user` waits for, on one of the threads; here, if not one could be started.
    pub(super) fn run(&self, user: u32, job: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.state.lock();
        if state.threads.is_empty() && !self.start(&mut state) {
            drop(state);
            return run(Box::new(job));
        }
        state.add(user, Box::new(job));
        let idle = state.threads.len() - state.running;
        let most = FULL_SHARES * self.shared.share;
        if state.runnable(self.shared.share) > idle && state.threads.len() < most {
            self.start(&mut state);
        }
        self.shared.changed.notify_one();
    }

    /// Runs `job` on the calling thread, unless another caller does so now: then on the pool. Two
    /// changes of thread are dear beside a flush of little (a third of a 4 KiB write and its
    /// `fdatasync` on tmpfs, `scripts/bench --jobs fdatasync`), and one blocked caller leaves as many
    /// FUSE workers as there are processors.
    pub(super) fn run_here(&self, user: u32, job: impl FnOnce() + Send + 'static) {
        match self.here.try_lock() {
            Some(_held) => run(Box::new(job)),
            None => self.run(user, job),
        }
    }

    /// Starts one more thread; whether the host lets us.
    fn start(&self, state: &mut State) -> bool {
        let number = state.threads.len();
        let shared = Arc::clone(&self.shared);
        match thread::Builder::new().name(format!("slow-{number}")).spawn(move || shared.work()) {
            Ok(thread) => state.threads.push(thread),
            Err(e) => log::warn!("only {number} threads for slow requests could be started: {e}"),
        }
        state.threads.len() > number
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.is_dropped = true;
        let threads = std::mem::take(&mut state.threads);
        drop(state);
        self.shared.changed.notify_all();
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// What each thread does.
    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some((user, job)) = state.take(self.share) {
                if state.runnable(self.share) > 0 {
                    self.changed.notify_one();
                }
                MutexGuard::unlocked(&mut state, || run(job));
                state.ended(user);
            } else if state.is_dropped && state.turns.is_empty() {
                // Those who wait for what one user may run no sooner.
                self.changed.notify_all();
                return;
            } else {
                self.changed.wait(&mut state);
            }
        }
    }
}

impl State {
    fn add(&mut self, user: u32, job: Job) {
        let jobs = self.users.entry(user).or_default();
        if jobs.waiting.is_empty() {
            self.turns.push_back(user);
        }
        jobs.waiting.push_back(job);
    }

    /// How many of the jobs that wait may be run now, with `share` threads for each user.
    fn runnable(&self, share: usize) -> usize {
        let of_user = |jobs: &Jobs| jobs.waiting.len().min(share.saturating_sub(jobs.running));
        self.turns.iter().filter_map(|user| self.users.get(user)).map(of_user).sum()
    }

    /// The next job and whose it is. It counts as running until [`State::ended`].
    fn take(&mut self, share: usize) -> Option<(u32, Job)> {
        for turn in 0..self.turns.len() {
            let user = self.turns[turn];
            let Some(jobs) = self.users.get_mut(&user) else { continue };
            if jobs.running >= share {
                continue;
            }
            let Some(job) = jobs.waiting.pop_front() else { continue };
            jobs.running += 1;
            self.running += 1;
            self.turns.remove(turn);
            if !jobs.waiting.is_empty() {
                self.turns.push_back(user);
            }
            return Some((user, job));
        }
        None
    }

    fn ended(&mut self, user: u32) {
        self.running -= 1;
        let Some(jobs) = self.users.get_mut(&user) else { return };
        jobs.running -= 1;
        if jobs.running == 0 && jobs.waiting.is_empty() {
            self.users.remove(&user);
        }
    }
}

/// A defect in one request must not take the thread away from all others.
fn run(job: Job) {
    if catch_unwind(AssertUnwindSafe(job)).is_err() {
        log::error!("a request ended by a defect in this program");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use crossbeam_channel::{bounded, unbounded};

    use super::*;

    const SOON: Duration = Duration::from_secs(10);
    const ALICE: u32 = 1000;
    const BOB: u32 = 1001;

    #[test]
    fn a_job_that_blocks_or_panics_keeps_no_other_waiting() {
        let pool = Pool::new(2);
        let (done, finished) = bounded(1);
        let (release, blocked) = bounded::<()>(0);
        pool.run(ALICE, move || {
            let _ = blocked.recv();
        });
        pool.run(ALICE, || panic!("a defect"));
        pool.run(ALICE, move || done.send(()).unwrap());
        finished.recv_timeout(SOON).unwrap();
        drop(release);
    }

    #[test]
    fn a_user_whose_jobs_all_block_keeps_nobody_else_waiting() {
        let pool = Pool::new(2);
        let (release, blocked) = bounded::<()>(0);
        let (report, began) = unbounded();
        for _ in 0..10 {
            let (blocked, report) = (blocked.clone(), report.clone());
            pool.run(ALICE, move || {
                report.send(ALICE).unwrap();
                let _ = blocked.recv();
            });
        }
        assert_eq!([began.recv_timeout(SOON), began.recv_timeout(SOON)], [Ok(ALICE), Ok(ALICE)]);
        for _ in 0..10 {
            let report = report.clone();
            pool.run(BOB, move || report.send(BOB).unwrap());
        }
        for _ in 0..10 {
            assert_eq!(
                began.recv_timeout(SOON),
                Ok(BOB),
                "more than two of the other's were begun"
            );
        }
        drop((release, blocked));
        for _ in 0..8 {
            assert_eq!(began.recv_timeout(SOON), Ok(ALICE));
        }
    }

    #[test]
    fn there_are_as_many_threads_as_full_shares_and_users_take_turns_for_them() {
        let pool = Pool::new(1);
        let (release, blocked) = bounded::<()>(0);
        let (report, began) = unbounded();
        for user in 0..FULL_SHARES as u32 + 2 {
            for _ in 0..2 {
                let (blocked, report) = (blocked.clone(), report.clone());
                pool.run(user, move || {
                    report.send(user).unwrap();
                    let _ = blocked.recv();
                });
            }
        }
        let mut order: Vec<_> =
            (0..FULL_SHARES).map(|_| began.recv_timeout(SOON).unwrap()).collect();
        assert!(began.recv_timeout(Duration::from_millis(50)).is_err(), "a thread too many");
        assert_eq!(pool.shared.state.lock().threads.len(), FULL_SHARES);
        release.send(()).unwrap();
        order.push(began.recv_timeout(SOON).unwrap());
        order.sort_unstable();
        assert_eq!(order, [0, 1, 2, 3, 4], "who has had a turn comes before who has had none");
        drop((release, blocked));
    }

    #[test]
    fn one_caller_runs_its_job_itself_while_others_leave_theirs_to_the_pool() {
        let pool = Pool::new(1);
        let (done, finished) = unbounded();
        let name = || thread::current().name().map(str::to_owned);
        let (report, here) = (done.clone(), name());
        pool.run_here(ALICE, move || report.send(name()).unwrap());
        assert_eq!(finished.try_recv().unwrap(), here, "the first was not run at once");

        let (release, blocked) = bounded::<()>(0);
        let (began, running) = bounded(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                pool.run_here(ALICE, move || {
                    began.send(()).unwrap();
                    let _ = blocked.recv();
                })
            });
            running.recv_timeout(SOON).unwrap();
            pool.run_here(ALICE, move || done.send(name()).unwrap());
            let ran_on = finished.recv_timeout(SOON).unwrap();
            assert_eq!(ran_on.as_deref(), Some("slow-0"));
            drop(release);
        });
    }

    #[test]
    fn dropping_the_pool_runs_what_is_queued() {
        let pool = Pool::new(1);
        let ran = Arc::new(AtomicUsize::new(0));
        for user in [ALICE, BOB].repeat(50) {
            let ran = Arc::clone(&ran);
            pool.run(user, move || {
                ran.fetch_add(1, Ordering::Relaxed);
            });
        }
        drop(pool);
        assert_eq!(ran.load(Ordering::Relaxed), 100);
        drop(Pool::new(1));
    }
}
