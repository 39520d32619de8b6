//! Making everything durable, in the order that keeps the invariants: the only place that does.
//!
//! ```text
//! take a copy of dirty L2 and L1 sectors, seal what is junk or erased
//! write refcount blocks, and a refcount table that has moved
//! sync, if blocks or a table are new; then write what links them in
//! sync, if an entry depends on what was written so far
//! write L2 and L1 sectors
//! sync
//! what was sealed moves on: junk -> released, erased -> available
//! ```
//! Entries that link clusters from the pool depend on nothing, so the usual flush syncs once.
//! Counts in memory are never too low for any table on disk, so refcount blocks need no order
//! towards the tables beyond that.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard};

use super::{Image, Writer};
use crate::error::{Error, Result};
use crate::locks;
use crate::tables::Write;

/// One flush at a time; a caller whose changes a flush has covered meanwhile needs none of its own.
#[derive(Debug, Default)]
pub(super) struct FlushLock {
    /// Lock order: before guest clusters.
    covered: Mutex<u64>,
    requests: AtomicU64,
    /// Something was written, and finished, since the last flush began.
    unsynced: AtomicBool,
    flushes: AtomicU64,
    syncs: AtomicU64,
}

impl FlushLock {
    pub(super) fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    pub(super) fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }
}

impl Image {
    /// Returns when everything that was written before the call is on stable storage.
    ///
    /// # Errors
    /// Host errors. After a failed sync what is on disk is not known: the image is read-only from
    /// then on, and every later flush fails.
    pub fn flush(&self) -> Result<()> {
        let Some(writer) = &self.writer else { return Ok(()) };
        locks::assert_none_held();
        let request = writer.flush.requests.fetch_add(1, Ordering::AcqRel) + 1;
        let mut covered = writer.flush.covered.lock();
        if *covered >= request {
            return Ok(());
        }
        let covers = writer.flush.requests.load(Ordering::Acquire);
        self.flush_held(writer)?;
        *covered = covers;
        Ok(())
    }

    /// The flush lock, for what must not meet a flush.
    pub(super) fn hold_flush<'a>(&self, writer: &'a Writer) -> MutexGuard<'a, u64> {
        locks::assert_none_held();
        writer.flush.covered.lock()
    }

    /// Flushes; the caller holds the flush lock.
    pub(super) fn flush_held(&self, writer: &Writer) -> Result<()> {
        if self.health.is_unknown() {
            let reason = self.health.reason().unwrap_or_default();
            let latched = std::io::Error::from_raw_os_error(libc::EIO);
            return Err(Error::io(
                format!("the image cannot be flushed any more: {reason}"),
                latched,
            ));
        }
        let unsynced = writer.flush.unsynced.swap(false, Ordering::AcqRel);
        let mut settles = false;
        let dirty = self.tables.collect(|| settles = writer.recycler.seal());
        let result = self.write_out(writer, &dirty.writes, dirty.barrier, unsynced || settles);
        let succeeded = result.is_ok();
        self.tables.collected(dirty, succeeded);
        writer.recycler.settle(succeeded);
        if succeeded {
            writer.flush.flushes.fetch_add(1, Ordering::Relaxed);
        } else {
            self.mark_unsynced();
        }
        result
    }

    fn write_out(
        &self,
        writer: &Writer,
        tables: &[Write],
        barrier: bool,
        must_sync: bool,
    ) -> Result<()> {
        let wrote_refcounts = self.write_refcounts(writer, barrier)?;
        self.write_all(tables, "writing a table")?;
        if must_sync || barrier || wrote_refcounts || !tables.is_empty() {
            self.sync(writer)?;
        }
        Ok(())
    }

    /// Writes all refcounts; with `barrier` they and everything before are durable afterwards.
    /// Whether there were any.
    pub(super) fn write_refcounts(&self, writer: &Writer, barrier: bool) -> Result<bool> {
        let dirty = writer.refcounts.collect();
        let any = !dirty.blocks.is_empty() || !dirty.links.is_empty();
        let result = self.write_all(&dirty.blocks, "writing a refcount block").and_then(|()| {
            if !dirty.links.is_empty() {
                self.sync(writer)?;
                self.write_all(&dirty.links, "linking a refcount block").inspect_err(|e| {
                    self.health.latch_unknown(&e.to_string());
                })?;
            }
            if barrier { self.sync(writer) } else { Ok(()) }
        });
        let left = writer.refcounts.collected(dirty, result.is_ok());
        // Junk like any other: released once the next flush has made the switch durable for sure.
        let dropped = left.into_iter().try_for_each(|place| writer.recycler.drop_used(place));
        result.and(dropped).map(|()| any)
    }

    fn write_all(&self, writes: &[Write], what: &str) -> Result<()> {
        writes.iter().try_for_each(|(offset, bytes)| {
            self.storage
                .write_at(bytes, *offset)
                .map_err(|e| Error::io(format!("{what} at {offset:#x}"), e))
        })
    }

    /// Syncs the host file. A failure latches the image: what reached the disk is not known.
    pub(super) fn sync(&self, writer: &Writer) -> Result<()> {
        writer.flush.syncs.fetch_add(1, Ordering::Relaxed);
        self.storage.sync().map_err(|e| {
            let error = Error::io("syncing the image", e);
            self.health.latch_unknown(&error.to_string());
            error
        })
    }

    /// Something was written to the host file: the next flush syncs.
    pub(super) fn mark_unsynced(&self) {
        if let Some(writer) = &self.writer
            && !writer.flush.unsynced.load(Ordering::Acquire)
        {
            writer.flush.unsynced.store(true, Ordering::Release);
        }
    }

    /// Whether metadata in memory differs from what is on disk.
    pub(super) fn needs_flush(&self) -> bool {
        self.writer.as_ref().is_some_and(|writer| {
            self.tables.is_dirty() || writer.refcounts.is_dirty() || writer.recycler.awaits_flush()
        })
    }
}

impl crate::recycler::thread::Recycled for Image {
    fn recycler(&self) -> &crate::recycler::Recycler {
        match &self.writer {
            Some(writer) => &writer.recycler,
            None => unreachable!("only writable images have a recycler thread"),
        }
    }

    fn is_writable(&self) -> bool {
        Image::is_writable(self)
    }

    fn needs_flush(&self) -> bool {
        Image::needs_flush(self)
    }

    fn flush(&self) -> Result<()> {
        Image::flush(self)
    }

    fn recycler_failed(&self, error: Error) {
        if !self.is_writable() {
            return;
        }
        match self.note(Err::<(), _>(error)) {
            Err(e) if self.is_writable() => {
                log::warn!("recycling freed clusters failed and is tried again: {e}");
            }
            _ => {}
        }
    }
}
