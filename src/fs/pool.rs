//! The slow pool: a few threads for what may block, so that one image's slow flush never stalls
//! reads of the others. It knows nothing of what it runs.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, unbounded};

type Job = Box<dyn FnOnce() + Send>;

/// Threads that run jobs in the order of their coming. Dropping it waits until all are done.
pub(super) struct Pool {
    /// `None` only while it is dropped.
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` threads.
    ///
    /// # Errors
    /// Those of the host when it cannot start a thread.
    pub(super) fn new(threads: usize) -> io::Result<Pool> {
        let (jobs, queue) = unbounded();
        let start = |number: usize| {
            let queue = queue.clone();
            thread::Builder::new().name(format!("slow-{number}")).spawn(move || work(&queue))
        };
        Ok(Pool { jobs: Some(jobs), threads: (0..threads).map(start).collect::<io::Result<_>>()? })
    }

    /// Runs `job` on one of the threads.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        if let Some(jobs) = &self.jobs {
            // Fails only when every thread is gone; then the job's reply answers with an error.
            let _ = jobs.send(Box::new(job));
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn work(queue: &Receiver<Job>) {
    for job in queue {
        // A defect in one request must not take the thread away from all others.
        if catch_unwind(AssertUnwindSafe(job)).is_err() {
            log::error!("a request ended by a defect in this program");
        }
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
    fn dropping_the_pool_runs_what_is_queued() {
        let ran = Arc::new(AtomicU32::new(0));
        let pool = Pool::new(1).unwrap();
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
