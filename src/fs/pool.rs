//! The slow pool: a few threads for what may block, so that one image's slow flush never stalls
//! reads of the others. It knows nothing of what it runs.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::Mutex;

type Job = Box<dyn FnOnce() + Send>;

/// Threads that run jobs in the order of their coming. Dropping it waits until all are done.
pub(super) struct Pool {
    /// `None` only while it is dropped.
    jobs: Option<Sender<Job>>,
    queue: Receiver<Job>,
    size: usize,
    threads: OnceLock<Vec<JoinHandle<()>>>,
    /// Held by the caller that runs a job itself.
    here: Mutex<()>,
}

impl Pool {
    /// A pool of `size` threads.
    ///
    /// # Errors
    /// Those of the host when it cannot start a thread.
    pub(super) fn new(size: usize) -> io::Result<Pool> {
        let mut pool = Pool::without_threads(size);
        let threads = (0..size).map(|number| pool.start(number)).collect::<io::Result<Vec<_>>>()?;
        pool.threads = OnceLock::from(threads);
        Ok(pool)
    }

    /// A pool of `size` threads that start with the first job.
    pub(super) fn without_threads(size: usize) -> Pool {
        let (jobs, queue) = unbounded();
        Pool { jobs: Some(jobs), queue, size, threads: OnceLock::new(), here: Mutex::new(()) }
    }

    /// Runs `job` on one of the threads; here, if not one could be started.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        if self.threads.get_or_init(|| self.start_all()).is_empty() {
            return run(Box::new(job));
        }
        if let Some(jobs) = &self.jobs {
            // Fails only without a queue, which lives as long as this does.
            let _ = jobs.send(Box::new(job));
        }
    }

    /// Runs `job` on the calling thread, unless another caller does so now: then on the pool. Two
    /// changes of thread are dear beside a flush of little (a third of a 4 KiB write and its
    /// `fdatasync` on tmpfs, `scripts/bench --jobs fdatasync`), and one blocked caller leaves as many
    /// FUSE workers as there are processors.
    pub(super) fn run_here(&self, job: impl FnOnce() + Send + 'static) {
        match self.here.try_lock() {
            Some(_held) => run(Box::new(job)),
            None => self.run(job),
        }
    }

    /// As many as the host lets us: requests are waiting.
    fn start_all(&self) -> Vec<JoinHandle<()>> {
        let started = (0..self.size).map_while(|number| match self.start(number) {
            Ok(thread) => Some(thread),
            Err(e) => {
                log::warn!("only {number} threads for slow requests could be started: {e}");
                None
            }
        });
        started.collect()
    }

    fn start(&self, number: usize) -> io::Result<JoinHandle<()>> {
        let queue = self.queue.clone();
        thread::Builder::new().name(format!("slow-{number}")).spawn(move || work(&queue))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.take().into_iter().flatten() {
            let _ = thread.join();
        }
    }
}

fn work(queue: &Receiver<Job>) {
    queue.iter().for_each(run);
}

/// A defect in one request must not take the thread away from all others.
fn run(job: Job) {
    if catch_unwind(AssertUnwindSafe(job)).is_err() {
        log::error!("a request ended by a defect in this program");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_job_that_blocks_or_panics_keeps_no_other_waiting() {
        let pool = Pool::new(2).unwrap();
        let (done, finished) = crossbeam_channel::bounded(1);
        let (release, blocked) = crossbeam_channel::bounded::<()>(0);
        pool.run(move || {
            let _ = blocked.recv();
        });
        pool.run(|| panic!("a defect"));
        pool.run(move || done.send(()).unwrap());
        finished.recv_timeout(Duration::from_secs(10)).unwrap();
        drop(release);
    }

    #[test]
    fn one_caller_runs_its_job_itself_while_others_leave_theirs_to_the_pool() {
        let pool = Pool::new(1).unwrap();
        let (done, finished) = crossbeam_channel::unbounded();
        let name = || thread::current().name().map(str::to_owned);
        let (report, here) = (done.clone(), name());
        pool.run_here(move || report.send(name()).unwrap());
        assert_eq!(finished.try_recv().unwrap(), here, "the first was not run at once");

        let (release, blocked) = crossbeam_channel::bounded::<()>(0);
        let (began, running) = crossbeam_channel::bounded(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                pool.run_here(move || {
                    began.send(()).unwrap();
                    let _ = blocked.recv();
                })
            });
            running.recv_timeout(Duration::from_secs(10)).unwrap();
            pool.run_here(move || done.send(name()).unwrap());
            let ran_on = finished.recv_timeout(Duration::from_secs(10)).unwrap();
            assert_eq!(ran_on.as_deref(), Some("slow-0"));
            drop(release);
        });
    }

    #[test]
    fn dropping_the_pool_runs_what_is_queued() {
        for pool in [Pool::new(1).unwrap(), Pool::without_threads(1)] {
            let ran = Arc::new(AtomicU32::new(0));
            for _ in 0..100 {
                let ran = Arc::clone(&ran);
                pool.run(move || {
                    ran.fetch_add(1, Ordering::Relaxed);
                });
            }
            drop(pool);
            assert_eq!(ran.load(Ordering::Relaxed), 100);
        }
    }
}
