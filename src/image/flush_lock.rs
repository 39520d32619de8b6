//! One flush at a time, and no more of them than are needed.

use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard};

/// One flush at a time; a caller whose changes a flush has covered meanwhile needs none of its own.
#[derive(Debug, Default)]
pub(super) struct FlushLock {
    /// The last request that a flush has covered. Lock order: before guest clusters.
    covered: Mutex<u64>,
    requests: AtomicU64,
    /// Of the image file.
    pub(super) unsynced: Unsynced,
    /// Of the external data file.
    pub(super) data_unsynced: Unsynced,
    pub(super) raw_mappings: RawMappings,
    /// Lock order: a leaf.
    syncing: Mutex<()>,
    flushes: AtomicU64,
    syncs: AtomicU64,
}

impl FlushLock {
    /// Returns when a flush that began after this call is over, another caller's or this one's.
    ///
    /// # Errors
    /// Those of `flush`. Another caller's failure covers nothing: each finds out for itself.
    pub(super) fn flush<E>(&self, flush: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let request = self.requests.fetch_add(1, Ordering::AcqRel) + 1;
        let mut covered = self.covered.lock();
        if *covered >= request {
            return Ok(());
        }
        let covers = self.requests.load(Ordering::Acquire);
        flush()?;
        *covered = covers;
        Ok(())
    }

    /// Keeps flushes away.
    pub(super) fn hold(&self) -> MutexGuard<'_, u64> {
        self.covered.lock()
    }

    /// Does `sync`, one at a time: the host tells one of those who sync at once of a failure, and the
    /// others must know of it before they go on.
    pub(super) fn sync_alone<R>(&self, sync: impl FnOnce() -> R) -> R {
        let _alone = self.syncing.lock();
        self.syncs.fetch_add(1, Ordering::Relaxed);
        sync()
    }

    /// Flushes so far.
    pub(super) fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    pub(super) fn count_flush(&self) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
    }

    /// Syncs so far.
    pub(super) fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }
}

/// Whether something was written to a file, and finished, since the last flush began.
#[derive(Debug, Default)]
pub(super) struct Unsynced(AtomicBool);

impl Unsynced {
    /// Something was written.
    pub(super) fn mark(&self) {
        // Looking first keeps the flag in every core's cache.
        if !self.0.load(Ordering::Acquire) {
            self.0.swap(true, Ordering::AcqRel);
        }
    }

    /// Whether something was written since this was last asked. A sync must follow.
    pub(super) fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }
}

/// Which mappings of a raw data file are durable: data may be written through no others.
#[derive(Debug, Default)]
pub(super) struct RawMappings {
    made: AtomicU64,
    durable: AtomicU64,
}

impl RawMappings {
    /// Clusters were mapped; their guest clusters are still held exclusively, so whoever finds them
    /// mapped finds this too.
    pub(super) fn note(&self) {
        self.made.fetch_add(1, Ordering::AcqRel);
    }

    /// What a flush that begins now makes durable.
    pub(super) fn made(&self) -> u64 {
        self.made.load(Ordering::Acquire)
    }

    /// A flush has succeeded that covers all that were `made`.
    pub(super) fn flushed(&self, made: u64) {
        self.durable.fetch_max(made, Ordering::AcqRel);
    }

    pub(super) fn are_durable(&self) -> bool {
        self.durable.load(Ordering::Acquire) == self.made.load(Ordering::Acquire)
    }
}
