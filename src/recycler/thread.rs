//! The recycler's thread: which step is next.
//!
//! In this order: a flush is made when it is due; what is released is freed; the pool is filled; a
//! flush is made when the pool waits for it; a pool that nobody uses is given up; the end of the
//! file is cut when allocation has paused; clusters are moved. Otherwise it sleeps. It does not keep
//! the image alive, and an error does not end it: the image is told (which may latch it), and the
//! step is tried again later. What is due comes first, so that what cannot be freed or allocated
//! keeps nothing from being flushed.

use std::io;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::pace::Pace;
use super::{Compacted, Recycler};
use crate::error::{Error, Result};

/// An error is followed by a pause, so that a full disk is not asked a thousand times a second.
const PAUSE_AFTER_ERROR: Duration = Duration::from_secs(2);
/// The pool alone causes at most one flush in so long: a flush also waits for guest data.
const PAUSE_BETWEEN_POOL_FLUSHES: Duration = Duration::from_secs(1);

/// An image that has a recycler.
pub trait Recycled: Send + Sync + 'static {
    /// Its recycler.
    fn recycler(&self) -> &Recycler;
    /// Whether the recycler may still write.
    fn is_writable(&self) -> bool;
    /// Whether changes wait for a flush.
    fn needs_flush(&self) -> bool;
    /// Makes everything durable and lets the states advance.
    fn flush(&self) -> Result<()>;
    /// Does a small step of making the file shorter, if there is one to do.
    fn compact_some(&self, now: Instant) -> Result<Compacted>;
    /// How many requests have come in so far.
    fn requests(&self) -> u64;
    /// A step of the recycler failed; it is tried again.
    fn recycler_failed(&self, error: Error);
    /// All that was due was done, compaction aside.
    fn recycler_is_done(&self);
    /// A step of compaction failed; when to try again is the image's matter.
    fn compaction_failed(&self, error: Error);
}

/// What the thread remembers between two steps.
#[derive(Debug, Default)]
pub struct Agenda {
    flush_due: Option<Instant>,
    last_pool_flush: Option<Instant>,
    not_before: Option<Instant>,
    /// Something could not be freed: until then the thread goes on to what else there is to do.
    free_again_at: Option<Instant>,
    /// Changes wait at most so long for a flush, much junk less.
    flush_after: Duration,
    pace: Pace,
}

/// What comes after a step.
enum Next {
    Again,
    SleepUntil(Option<Instant>),
}

/// Starts the thread, which does what is on `agenda` and ends when the wake signal is stopped or the
/// image is gone.
///
/// # Errors
/// The host cannot start another thread.
pub fn spawn<T: Recycled>(image: &Arc<T>, mut agenda: Agenda) -> io::Result<JoinHandle<()>> {
    let wake = image.recycler().wake_signal().clone();
    let image = Arc::downgrade(image);
    std::thread::Builder::new().name("recycler".into()).spawn(move || {
        let mut deadline = None;
        while wake.wait(deadline) {
            deadline = match work(&image, &mut agenda) {
                Some(deadline) => deadline,
                None => return,
            };
        }
    })
}

/// Does what is due; until when to sleep then, or `None` when the image is gone.
fn work<T: Recycled>(image: &Weak<T>, agenda: &mut Agenda) -> Option<Option<Instant>> {
    loop {
        let image = image.upgrade()?;
        if !image.is_writable() {
            return Some(None);
        }
        let now = Instant::now();
        if let Some(at) = agenda.not_before.filter(|at| *at > now) {
            return Some(Some(at));
        }
        match agenda.step(&*image, now) {
            Ok(Next::Again) => {}
            Ok(Next::SleepUntil(deadline)) => {
                if agenda.free_again_at.is_none() {
                    image.recycler_is_done();
                }
                return Some(deadline);
            }
            Err(e) => {
                image.recycler_failed(e);
                agenda.not_before = Some(Instant::now() + PAUSE_AFTER_ERROR);
            }
        }
        if image.recycler().wake_signal().is_stopped() {
            return None;
        }
    }
}

impl Agenda {
    /// Nothing remembered yet. Changes wait at most `flush_after` for a flush, much junk less;
    /// clusters are moved at no more than `rate` bytes a second.
    pub fn new(flush_after: Duration, rate: Option<u64>) -> Self {
        Agenda { flush_after, pace: Pace::new(rate), ..Default::default() }
    }

    /// Does the next step that is due at `now`, which need not be the time that it is: without a
    /// thread, the caller has the recycler work. Whether there was anything to do.
    ///
    /// # Errors
    /// Those of the step, which is due again; what could not be freed is told to the image alone.
    pub fn work(&mut self, image: &impl Recycled, now: Instant) -> Result<bool> {
        self.step(image, now).map(|next| matches!(next, Next::Again))
    }

    fn step(&mut self, image: &impl Recycled, now: Instant) -> Result<Next> {
        let recycler = image.recycler();
        if self.flush_due.is_none() {
            recycler.forget_changes();
        }
        let mut flush_due = None;
        if !image.needs_flush() {
            if self.flush_due.take().is_some() {
                // Somebody else has flushed. Look again, so that the next change wakes the thread.
                return Ok(Next::Again);
            }
        } else {
            let latest = *self.flush_due.get_or_insert(now + self.flush_after);
            let due = recycler.junk_due().map_or(latest, |at| at.min(latest));
            if due <= now {
                self.flush_due = None;
                image.flush()?;
                return Ok(Next::Again);
            }
            flush_due = Some(due);
        }
        let free_again_at = self.free_again_at.filter(|at| *at > now);
        if free_again_at.is_none() {
            match recycler.free_some() {
                Ok(any) => {
                    self.free_again_at = None;
                    if any {
                        return Ok(Next::Again);
                    }
                }
                Err(e) => {
                    image.recycler_failed(e);
                    self.free_again_at = Some(now + PAUSE_AFTER_ERROR);
                    return Ok(Next::Again);
                }
            }
        }
        if recycler.is_pool_low() {
            recycler.refill()?;
            return Ok(Next::Again);
        }
        let mut pool_due = None;
        if recycler.is_pool_short() {
            let due = self.last_pool_flush.map_or(now, |at| at + PAUSE_BETWEEN_POOL_FLUSHES);
            if due <= now {
                self.last_pool_flush = Some(now);
                self.flush_due = None;
                image.flush()?;
                return Ok(Next::Again);
            }
            pool_due = Some(due);
        }
        let idle_at = recycler.pool_idle_at();
        if idle_at.is_some_and(|at| at <= now) {
            recycler.give_up_pool()?;
            return Ok(Next::Again);
        }
        let tail_due = recycler.tail_due();
        if tail_due.is_some_and(|at| at <= now) {
            recycler.cut_tail()?;
            return Ok(Next::Again);
        }
        let mut move_due = self.pace.wait_until(now);
        if move_due.is_none() {
            match image.compact_some(now) {
                Ok(Compacted::Nothing) => {}
                Ok(Compacted::Later(at)) => move_due = Some(at),
                Ok(Compacted::Moved(bytes)) => {
                    self.pace.stepped(now, Instant::now(), bytes, image.requests());
                    return Ok(Next::Again);
                }
                Err(e) => {
                    image.compaction_failed(e);
                    move_due = Some(now + PAUSE_AFTER_ERROR);
                }
            }
        }
        let due = [flush_due, free_again_at, pool_due, idle_at, tail_due, move_due];
        Ok(Next::SleepUntil(due.into_iter().flatten().min()))
    }
}
