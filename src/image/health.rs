//! How an image is: whether it still takes writes, and why not; whether its recycler gets on.
//!
//! The first thing that goes wrong for good latches the image read-only; it stays so until it is
//! opened again. The first reason is the one that counts, and it is logged once. What goes wrong in
//! the background and is tried again is logged when it begins and when it is over.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use serde::Serialize;

use super::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Header, INCOMPATIBLE_CORRUPT};

/// How an open image is, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// Nothing is wrong.
    Ok,
    /// It serves everything, and looks for what a crash may have left.
    Recovering,
    /// It serves what it can, but something in the background fails and is tried again: on a full
    /// host no space is found or given back.
    Degraded,
    /// It takes no more writes since one failed for good.
    ReadOnly,
    /// It takes no more writes since it contradicts itself.
    Corrupt,
}

/// The latch.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// What the log calls the image.
    label: String,
    latched: AtomicBool,
    /// A sync or a header write failed: what is on disk is not known, nothing more is written.
    unknown: AtomicBool,
    corrupt: AtomicBool,
    reason: Mutex<Option<String>>,
    /// What the recycler fails at, until it gets on.
    trouble: Mutex<Option<Trouble>>,
}

#[derive(Debug)]
struct Trouble {
    errno: i32,
    text: String,
}

impl Health {
    pub(super) fn new(label: &str) -> Self {
        Health { label: label.to_owned(), ..Health::default() }
    }

    /// What the log calls the image.
    pub(super) fn label(&self) -> &str {
        if self.label.is_empty() { "the image" } else { &self.label }
    }

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
        self.latch_and_tell(reason);
    }

    /// No more writes, since the image seems to contradict itself, and the host has failed like this when
    /// that was looked at again.
    pub(super) fn latch_doubtful(&self, error: &Error) {
        self.latch_and_tell(&format!(
            "it may be corrupt, and cannot be read to make sure: {error}"
        ));
    }

    fn latch_and_tell(&self, reason: &str) {
        if self.latch(reason) {
            log::error!("{} is read-only from now on: {reason}", self.label());
        }
    }

    /// No more writes, since the image contradicts itself; whether that is the first reason.
    pub(super) fn latch_corrupt(&self, reason: &str) -> bool {
        let is_first = self.latch(reason);
        if is_first {
            self.corrupt.store(true, Ordering::Release);
        }
        is_first
    }

    /// The recycler has failed at something and will try again.
    fn note_trouble(&self, error: &Error) {
        let (errno, text) = (error.errno(), error.to_string());
        let before = self.trouble.lock().replace(Trouble { errno, text });
        if before.is_none_or(|before| before.errno != errno) {
            log::warn!("{}: its recycler fails and tries again: {error}", self.label());
        }
    }

    /// Nothing is left that the recycler has failed at.
    fn forget_trouble(&self) {
        if self.trouble.lock().take().is_some() {
            log::warn!("{}: its recycler gets on again", self.label());
        }
    }

    /// What the recycler fails at.
    fn trouble(&self) -> Option<String> {
        self.trouble.lock().as_ref().map(|trouble| trouble.text.clone())
    }
}

impl Image {
    /// How it is, and what is wrong: `ok` where nothing is.
    pub(super) fn condition(&self) -> (Condition, String) {
        if let Some(reason) = self.health.reason() {
            let is_corrupt = self.health.corrupt.load(Ordering::Acquire);
            let condition = if is_corrupt { Condition::Corrupt } else { Condition::ReadOnly };
            return (condition, reason);
        }
        let writer = self.writer.as_ref();
        let compaction = || writer?.compaction_status.lock().failed.clone();
        if let Some(trouble) = self.health.trouble().or_else(compaction) {
            return (Condition::Degraded, trouble);
        }
        let is_searching = writer.is_some_and(|writer| writer.recycler.are_frees_held());
        (if is_searching { Condition::Recovering } else { Condition::Ok }, "ok".into())
    }

    /// What has made the image read-only since it was opened, if anything has. Not to be asked any
    /// more once it is closed.
    pub fn failure(&self) -> Option<Error> {
        let reason = self.health.reason().filter(|_| !self.opened_corrupt)?;
        Some(Error::new(ErrorKind::ReadOnly, format!("it became read-only: {reason}")))
    }

    /// Passes a result on; corruption that shows in it makes the image read-only.
    pub(super) fn note<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|e| match (e.kind(), &self.writer) {
            (ErrorKind::Corrupt, _) => self.found_corrupt(e),
            (ErrorKind::Io, Some(writer)) => {
                writer.may_have_leaked.store(true, Ordering::Relaxed);
            }
            _ => {}
        })
    }

    pub(super) fn found_corrupt(&self, error: &Error) {
        if !self.health.latch_corrupt(&format!("it is corrupt: {error}")) {
            return;
        }
        log::error!(
            "{} is read-only from now on, run `qcow2fs check` on it: {error}",
            self.health.label()
        );
        if let Some(writer) = &self.writer {
            let mut features = writer.features.lock();
            if self.geometry.version() >= 3 && !self.health.is_unknown() {
                features.incompatible |= INCOMPATIBLE_CORRUPT;
                let patch = features.patch();
                // Best effort: the image is latched either way.
                if let Err(e) = self.storage.write_at(&patch.bytes, patch.offset.0) {
                    log::error!("marking {} as corrupt: {e}", self.health.label());
                }
            }
        }
    }

    /// A step of the recycler has failed with this; it is tried again unless that was for good.
    pub(super) fn note_trouble(&self, error: Error) {
        if !self.is_writable() {
            return;
        }
        if let Err(e) = self.note(Err::<(), _>(error))
            && self.is_writable()
        {
            self.health.note_trouble(&e);
        }
    }

    /// The recycler has done all that was due.
    pub(super) fn forget_trouble(&self) {
        self.health.forget_trouble();
    }
}

impl super::open::Features {
    pub(super) fn patch(&self) -> crate::format::Patch {
        Header::patch_features(self.incompatible, self.compatible, self.autoclear)
    }
}
