//! Making everything durable, in the order that keeps the invariants: the only place that does.
//!
//! ```text
//! take a copy of dirty L2 and L1 sectors, seal what is junk or erased
//! sync the external data file, where there is one that was written to
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

use std::sync::atomic::Ordering;

use super::{Image, Writer};
use crate::error::{Error, Result};
use crate::format::{HostCluster, HostOffset};
use crate::locks;
use crate::rules::Rule;
use crate::storage::Storage;
use crate::sync::MutexGuard;
use crate::tables::Write;

impl Image {
    /// Returns when everything that was written before the call is on stable storage.
    ///
    /// # Errors
    /// Host errors. After a failed sync what is on disk is not known: the image is read-only from
    /// then on, and every later flush fails.
    pub fn flush(&self) -> Result<()> {
        let Some(writer) = &self.writer else { return Ok(()) };
        locks::assert_none_held();
        writer.flush.flush(|| self.flush_held(writer))
    }

    /// The flush lock, for what must not meet a flush.
    pub(super) fn hold_flush<'a>(&self, writer: &'a Writer) -> MutexGuard<'a, u64> {
        locks::assert_none_held();
        writer.flush.hold()
    }

    /// Flushes; the caller holds the flush lock.
    pub(super) fn flush_held(&self, writer: &Writer) -> Result<()> {
        self.refuse_unknown()?;
        let unsynced = writer.flush.unsynced.take();
        let (mut settles, mut data_unsynced) = (false, false);
        let raw_mappings = writer.flush.raw_mappings.made();
        let dirty = self.tables.collect(|| {
            settles = writer.recycler.seal();
            // Under the tables' lock: the data that an entry leads to was written before it.
            data_unsynced = writer.flush.data_unsynced.take();
        });
        let result = self.sync_data_if(writer, data_unsynced).and_then(|()| {
            let unsynced = unsynced && Rule::DataSynced.is_kept();
            let settles = settles && Rule::StatesSynced.is_kept();
            self.write_out(writer, &dirty.writes, dirty.barrier, unsynced || settles)
        });
        let succeeded = result.is_ok();
        self.tables.collected(dirty, succeeded);
        writer.recycler.settle(succeeded);
        if succeeded {
            writer.flush.count_flush();
            writer.flush.raw_mappings.flushed(raw_mappings);
        } else {
            self.mark_unsynced();
            if data_unsynced {
                writer.flush.data_unsynced.mark();
            }
        }
        result
    }

    /// Makes durable, in the external data file, what the tables in memory lead to: before one of them
    /// is on another way than by a flush. For all of it the tables' lock is held.
    pub(super) fn sync_data_before_tables(&self, writer: &Writer) -> Result<()> {
        let unsynced = writer.flush.data_unsynced.take();
        self.sync_data_if(writer, unsynced).inspect_err(|_| writer.flush.data_unsynced.mark())
    }

    /// Refuses to go on after a failed sync. The host tells of the failure once: the next sync would
    /// succeed, and what depends on what was lost would become durable.
    fn refuse_unknown(&self) -> Result<()> {
        if !self.health.is_unknown() {
            return Ok(());
        }
        let reason = self.health.reason().unwrap_or_default();
        let latched = std::io::Error::from_raw_os_error(libc::EIO);
        Err(Error::io(format!("the image cannot be flushed any more: {reason}"), latched))
    }

    fn write_out(
        &self,
        writer: &Writer,
        tables: &[Write],
        barrier: bool,
        must_sync: bool,
    ) -> Result<()> {
        let before = barrier.then_some(Rule::BarrierBeforeEntries);
        let wrote_refcounts = self.write_refcounts(writer, before)?;
        self.write_all(tables, "writing a table")?;
        let wrote = barrier || wrote_refcounts || !tables.is_empty();
        if must_sync || wrote && Rule::TablesSynced.is_kept() {
            self.sync(writer)?;
        }
        Ok(())
    }

    /// Writes all refcounts; where `before` names a rule, they and everything before are durable
    /// afterwards. Whether there were any.
    pub(super) fn write_refcounts(&self, writer: &Writer, before: Option<Rule>) -> Result<bool> {
        self.refuse_unknown()?;
        let dirty = writer.refcounts.collect();
        let any = !dirty.blocks.is_empty() || !dirty.links.is_empty();
        let result = self.write_all(&dirty.blocks, "writing a refcount block").and_then(|()| {
            for links in &dirty.links {
                self.sync_for(writer, Rule::BlocksBeforeLinks)?;
                self.write_all(links, "linking a refcount block").inspect_err(|e| {
                    self.health.latch_unknown(&e.to_string());
                })?;
            }
            // A place that only the old links led to may be taken as soon as this is over.
            let frees_places = dirty.frees_places().then_some(Rule::LinksBeforePlaces);
            before.or(frees_places).map_or(Ok(()), |rule| self.sync_for(writer, rule))
        });
        let left = writer.refcounts.collected(dirty, result.is_ok());
        // Junk like any other: released once the next flush has made the switch durable for sure.
        let dropped = left.into_iter().try_for_each(|place| match Rule::LeftPlacesWait.is_kept() {
            true => writer.recycler.drop_used(place),
            false => writer.recycler.release_used(place),
        });
        result.and(dropped).map(|()| any)
    }

    fn write_all(&self, writes: &[Write], what: &str) -> Result<()> {
        writes.iter().try_for_each(|(offset, bytes)| {
            self.check_table_places(*offset, bytes.len(), what)?;
            self.storage
                .write_at(bytes, *offset)
                .map_err(|e| Error::io(format!("{what} at {offset:#x}"), e))
        })
    }

    /// What comes before every write of tables: nothing else is there. (Tables in clusters next to each
    /// other are written at once.)
    fn check_table_places(&self, offset: u64, length: usize, what: &str) -> Result<()> {
        let mut clusters = self.geometry.host_clusters(HostOffset(offset), length as u64);
        if clusters.all(|cluster| self.tables.is_metadata(HostCluster(cluster))) {
            return Ok(());
        }
        let error = Error::corrupt(format!("{what} at {offset:#x}, where no table is"));
        self.found_corrupt(&error);
        Err(error)
    }

    /// Syncs the host file. A failure latches the image: what reached the disk is not known.
    pub(super) fn sync(&self, writer: &Writer) -> Result<()> {
        self.sync_file(writer, &*self.storage, "syncing the image")
    }

    /// Syncs the host file as `rule` demands.
    pub(super) fn sync_for(&self, writer: &Writer, rule: Rule) -> Result<()> {
        if rule.is_kept() { self.sync(writer) } else { Ok(()) }
    }

    /// The same for the external data file, if anything was written there.
    fn sync_data_if(&self, writer: &Writer, unsynced: bool) -> Result<()> {
        match unsynced && Rule::DataFileBeforeTables.is_kept() {
            true => self.sync_file(writer, &*self.data.storage, "syncing the data file"),
            false => Ok(()),
        }
    }

    fn sync_file(&self, writer: &Writer, file: &dyn Storage, what: &str) -> Result<()> {
        writer.flush.sync_alone(|| self.synced(what, || file.sync()))
    }

    /// Syncs, unless a sync has failed before. After a failure nobody knows what is durable.
    fn synced(&self, what: &str, sync: impl FnOnce() -> std::io::Result<()>) -> Result<()> {
        self.refuse_unknown()?;
        sync().map_err(|e| {
            let error = Error::io(what, e);
            self.health.latch_unknown(&error.to_string());
            error
        })
    }

    /// Runs `sync`, which syncs the image file in another way than a flush does, while no flush is under
    /// way. The host tells of an error once: after a failure no flush succeeds either.
    ///
    /// # Errors
    /// That of `sync`; `EIO` after an earlier failure.
    pub fn sync_with(&self, sync: impl FnOnce() -> std::io::Result<()>) -> Result<()> {
        let sync = || self.synced("syncing the image file", sync);
        let Some(writer) = &self.writer else { return sync() };
        let _flush = self.hold_flush(writer);
        writer.flush.sync_alone(sync)
    }

    /// Something was written to the image file: the next flush syncs it.
    pub(super) fn mark_unsynced(&self) {
        if let Some(writer) = &self.writer {
            writer.flush.unsynced.mark();
        }
    }

    /// Something was written to the file that data is in: the next flush syncs it.
    pub(super) fn mark_data_unsynced(&self) {
        if let Some(writer) = &self.writer {
            match self.data.is_external {
                true => writer.flush.data_unsynced.mark(),
                false => writer.flush.unsynced.mark(),
            }
        }
    }

    /// Whether metadata in memory differs from what is on disk.
    pub(super) fn needs_flush(&self) -> bool {
        self.writer.as_ref().is_some_and(|writer| {
            self.tables.is_dirty() || writer.refcounts.is_dirty() || writer.recycler.awaits_flush()
        })
    }
}

impl Image {
    /// Has the recycler of an image that was opened without threads ([`super::Options::threads`])
    /// do its next step, as it would at `now`, which may lie in the future; whether there was one to
    /// do.
    ///
    /// # Errors
    /// `ReadOnly`; host errors, `Corrupt`. The step is due again.
    pub fn recycle(&self, now: std::time::Instant) -> Result<bool> {
        let writer = self.writer()?;
        let worked = writer.agenda.lock().work(self, now);
        self.note(worked)
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

    fn compact_some(&self, now: std::time::Instant) -> Result<crate::recycler::Compacted> {
        Image::compact_some(self, now)
    }

    fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    fn recycler_failed(&self, error: Error) {
        self.note_trouble(error);
    }

    fn recycler_is_done(&self) {
        self.forget_trouble();
    }

    fn compaction_failed(&self, error: Error) {
        Image::compaction_failed(self, error);
    }
}
