//! Times that somebody has set on an image which is open.
//!
//! What is written to the guest's disk reaches the image file later, at a flush, by the recycler, or when
//! it is closed. A time that was set in between, as `cp -p` does before it closes a file, is shown until
//! the guest writes again, and the image file has it once it is closed.

use std::fs::{File, Metadata};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;

use super::host::{self, SetTime};

/// Times of a file; `None` where none was set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Of the last access.
    pub accessed: Option<SystemTime>,
    /// Of the last change.
    pub modified: Option<SystemTime>,
}

fn modified(data: Option<&Metadata>) -> Option<SystemTime> {
    data.and_then(|data| data.modified().ok())
}

/// The times that were set since the image was opened and since the guest wrote last.
#[derive(Debug, Default)]
pub(super) struct KeptTimes {
    /// Spares writes the lock.
    any: AtomicBool,
    /// With the time when the external data file was written last by then: the kernel may write that
    /// itself, and tells nobody.
    times: Mutex<(Times, Option<SystemTime>)>,
}

impl KeptTimes {
    /// Those of `times` that are there were set; `data` is what the host says of the data file.
    pub(super) fn keep(&self, times: Times, data: Option<&Metadata>) {
        self.forget_if_written(data);
        let (kept, written) = &mut *self.times.lock();
        kept.accessed = times.accessed.or(kept.accessed);
        kept.modified = times.modified.or(kept.modified);
        *written = modified(data);
        self.any.store(*kept != Times::default(), Ordering::Release);
    }

    /// The guest writes, or the image is opened.
    pub(super) fn forget(&self) {
        self.forget_where(|_| true);
    }

    /// The guest may have written the data file without a request.
    pub(super) fn forget_if_written(&self, data: Option<&Metadata>) {
        self.forget_where(|written| written.is_some() && written != modified(data));
    }

    fn forget_where(&self, is_past: impl FnOnce(Option<SystemTime>) -> bool) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        let mut kept = self.times.lock();
        if is_past(kept.1) {
            *kept = Default::default();
            self.any.store(false, Ordering::Release);
        }
    }

    pub(super) fn get(&self) -> Times {
        self.times.lock().0
    }

    /// Sets them on the image file.
    pub(super) fn apply(&self, file: &File) -> io::Result<()> {
        let kept = self.get();
        if kept == Times::default() {
            return Ok(());
        }
        host::set_times(file, [kept.accessed, kept.modified].map(|time| time.map(SetTime::At)))
    }
}
