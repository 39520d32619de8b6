//! Whether an image still takes writes, and why not.
//!
//! The first thing that goes wrong for good latches the image read-only; it stays so until it is
//! opened again. The first reason is the one that counts, and it is logged once.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Header, INCOMPATIBLE_CORRUPT};

/// The latch.
#[derive(Debug, Default)]
pub(super) struct Health {
    latched: AtomicBool,
    /// A sync or a header write failed: what is on disk is not known, nothing more is written.
    unknown: AtomicBool,
    reason: Mutex<Option<String>>,
}

impl Health {
    pub(super) fn is_good(&self) -> bool {
        !self.latched.load(Ordering::Acquire)
    }

    /// Whether it is not known what is on disk.
    pub(super) fn is_unknown(&self) -> bool {
        self.unknown.load(Ordering::Acquire)
    }

    pub(super) fn reason(&self) -> Option<String> {
        self.reason.lock().clone()
    }

    /// No more writes, for this reason; whether it is the first.
    pub(super) fn latch(&self, reason: &str) -> bool {
        let mut first = self.reason.lock();
        let is_first = first.is_none();
        if is_first {
            *first = Some(reason.to_owned());
        }
        self.latched.store(true, Ordering::Release);
        is_first
    }

    pub(super) fn latch_unknown(&self, reason: &str) {
        self.unknown.store(true, Ordering::Release);
        if self.latch(reason) {
            log::error!("the image is read-only from now on: {reason}");
        }
    }
}

impl Image {
    /// Passes a result on; corruption that shows in it makes the image read-only.
    pub(super) fn note<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|e| {
            if e.kind() == ErrorKind::Corrupt {
                self.found_corrupt(e);
            }
        })
    }

    pub(super) fn found_corrupt(&self, error: &Error) {
        if !self.health.latch(&format!("it is corrupt: {error}")) {
            return;
        }
        log::error!("the image is read-only from now on, run `qcow2fs check` on it: {error}");
        if let Some(writer) = &self.writer {
            let mut features = writer.features.lock();
            if self.geometry.version() >= 3 && !self.health.is_unknown() {
                features.incompatible |= INCOMPATIBLE_CORRUPT;
                let patch = features.patch();
                // Best effort: the image is latched either way.
                if let Err(e) = self.storage.write_at(&patch.bytes, patch.offset.0) {
                    log::error!("marking the image as corrupt: {e}");
                }
            }
        }
    }
}

impl super::open::Features {
    pub(super) fn patch(&self) -> crate::format::Patch {
        Header::patch_features(self.incompatible, self.compatible, self.autoclear)
    }
}
