//! The checker's primitives with the faces of those that the program uses, and what runs a model.

#![allow(clippy::unwrap_used)]

use std::ops::{Deref, DerefMut};
use std::time::{Duration, Instant};

pub(crate) use loom::sync::atomic;
#[cfg(debug_assertions)]
pub(crate) use loom::thread_local;
use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Mutex(loom::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard(Some(self.0.lock().unwrap()))
    }

    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.0.try_lock().ok().map(|held| MutexGuard(Some(held)))
    }
}

/// Empty only while [`Condvar::wait`] has the guard.
#[derive(Debug)]
pub(crate) struct MutexGuard<'a, T>(Option<loom::sync::MutexGuard<'a, T>>);

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().unwrap()
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().unwrap()
    }
}

#[derive(Debug, Default)]
pub(crate) struct Condvar(loom::sync::Condvar);

impl Condvar {
    pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        let held = guard.0.take().unwrap();
        guard.0 = Some(self.0.wait(held).unwrap());
    }

    /// There is no time in a model: nothing ever times out, which hides no lost wake.
    pub(crate) fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, _: Instant) -> TimedOut {
        self.wait(guard);
        TimedOut
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}

pub(crate) struct TimedOut;

impl TimedOut {
    pub(crate) fn timed_out(&self) -> bool {
        false
    }
}

/// One who finds it made must see what was made, no more: so much is in the flag's ordering.
#[derive(Debug)]
pub(crate) struct OnceLock<T> {
    is_made: atomic::AtomicBool,
    making: Mutex<()>,
    value: std::sync::OnceLock<T>,
}

impl<T> OnceLock<T> {
    pub(crate) fn new() -> Self {
        let is_made = atomic::AtomicBool::new(false);
        OnceLock { is_made, making: Mutex::default(), value: std::sync::OnceLock::new() }
    }

    pub(crate) fn get(&self) -> Option<&T> {
        if self.is_made.load(Ordering::Acquire) { self.value.get() } else { None }
    }

    pub(crate) fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
        let _making = self.making.lock();
        let value = self.value.get_or_init(make);
        self.is_made.store(true, Ordering::Release);
        value
    }
}

/// Runs `model` in every order of its threads' steps, of those that take a thread off the processor
/// at most three times while it could go on; in all there are, where `QCOW2FS_MODEL_SECONDS` gives the
/// time. A deadlock fails, too.
pub(crate) fn explore(model: impl Fn() + Sync + Send + 'static) {
    let setting = std::env::var("QCOW2FS_MODEL_SECONDS").ok();
    let seconds = setting.map(|s| s.parse().unwrap());
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = if seconds.is_some() { None } else { Some(3) };
    builder.max_duration = Some(Duration::from_secs(seconds.unwrap_or(10)));
    builder.max_branches = 10_000;
    let orders = std::sync::Arc::new(AtomicUsize::new(0));
    let (counted, started) = (orders.clone(), Instant::now());
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        model();
    });
    println!("{} orders in {:.1?}", orders.load(Ordering::Relaxed), started.elapsed());
}
