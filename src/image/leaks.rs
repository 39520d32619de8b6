//! Clusters that a crash has left counted though nothing refers to them, found after the next open
//! and returned.
//!
//! A crash leaks the pool and whatever was on its way (allowed: a count may be too high, never too
//! low). A thread counts the references of the image as it was opened and gives what leaked to the
//! recycler, while the image is in use already. It goes by what is on disk, which changes under it:
//!
//! - what was counted since the open is no leak ([`Refcounts::leaked`] leaves it out);
//! - what was dropped since the open is the recycler's already (it is in the cluster map);
//! - until the search is over nothing that was dropped is punched or freed, so every table that the
//!   search may still read stays as it was.
//!
//! What is left had a refcount above its references when the image was opened: nothing can refer to
//! it since, or not so often. Where a snapshot was being taken or deleted, COPIED flags may be
//! missing too; they are set in the end.
//! A refcount that is below the references is damage, and so is a COPIED flag that leads to a cluster
//! with several references: the image turns read-only, while nothing has been freed yet.
//! Bitmaps whose autoclear bit a program has cleared that knows nothing of them are such leaks: by
//! the format nobody may believe their directory any more.
//!
//! [`Refcounts::leaked`]: crate::alloc::Refcounts::leaked

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::{Image, Writer, open};
use crate::check::{copied, references};
use crate::error::{Error, Result};
use crate::format::{Header, HostCluster};
use crate::storage::Storage;

/// So many clusters are looked at while others wait. One refcount block may count millions.
const AT_ONCE: u64 = 1 << 14;

/// A search that is under way.
#[derive(Debug)]
pub(super) struct LeakSearch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl LeakSearch {
    /// Ends the search and waits for its thread; whether that went as it should.
    pub(super) fn stop(self) -> bool {
        self.stop.store(true, Ordering::Release);
        self.wait()
    }

    /// Waits for the end of the search; whether that went as it should.
    fn wait(self) -> bool {
        self.thread.join().is_ok()
    }
}

impl Image {
    /// Starts the search on an image that was just opened as `header` says.
    pub(super) fn search_leaks(self: &Arc<Self>, header: &Header) -> Result<Option<LeakSearch>> {
        let Some(writer) = &self.writer else { return Ok(None) };
        writer.refcounts.remember_counted(true);
        writer.recycler.hold_frees(true);
        let stop = Arc::new(AtomicBool::new(false));
        let storage = Stoppable { storage: self.storage.clone(), stop: stop.clone(), room: ROOM };
        let (image, header) = (Arc::downgrade(self), header.clone());
        let search = move || {
            let counted = references::count(&storage, &header);
            let counted = counted.and_then(|counts| counts.trusted().map(|()| counts));
            if let Some(image) = image.upgrade() {
                image.end_search(counted, &storage, &header);
            }
        };
        let thread = std::thread::Builder::new()
            .name("leak search".into())
            .spawn(search)
            .map_err(|e| Error::io("starting the search for leaked clusters", e))?;
        Ok(Some(LeakSearch { stop, thread }))
    }

    /// Waits for the end of the search, if there is one.
    pub(super) fn finish_search(&self, writer: &Writer) -> Result<()> {
        let search = writer.leak_search.lock().take();
        match search.is_none_or(LeakSearch::wait) {
            true => Ok(()),
            false => Err(Error::invalid("the search for leaks ended by a defect in this program")),
        }
    }

    fn end_search(
        &self,
        counted: Result<references::ReferenceCounts>,
        storage: &Stoppable,
        header: &Header,
    ) {
        let stop = &*storage.stop;
        let Some(writer) = &self.writer else { return };
        let is_stopped = stop.load(Ordering::Acquire);
        match &counted {
            Ok(counts) => {
                self.judge_bitmaps(writer, Some(|cluster| counts.get(HostCluster(cluster))));
            }
            Err(_) if is_stopped => {}
            Err(_) => self.judge_bitmaps(writer, None::<fn(u64) -> u64>),
        }
        let returned = counted.and_then(|counts| {
            let flags = Flags::read(storage, header, &counts)?;
            self.refuse_damage(writer, &counts, &flags, &storage.stop)?;
            let returned = self.return_leaked(writer, &counts, stop)?;
            if flags.any_missing {
                self.set_missing_flags(writer, stop)?;
            }
            Ok(returned)
        });
        writer.refcounts.remember_counted(false);
        writer.recycler.hold_frees(false);
        match returned {
            Ok(0) => {}
            Ok(count) => log::info!(
                "{}: {count} clusters that had leaked are being freed",
                self.health.label()
            ),
            Err(_) if stop.load(Ordering::Acquire) || !self.health.is_good() => {}
            Err(e) => log::warn!(
                "{}: clusters that may have leaked are not looked for: {e}",
                self.health.label()
            ),
        }
    }

    /// What only a damaged image has makes it read-only: a refcount that is lower than the references,
    /// since to drop one would free what others still refer to, and a flag that denies references.
    /// Nothing has been freed since the image was opened.
    fn refuse_damage(
        &self,
        writer: &Writer,
        counts: &references::ReferenceCounts,
        flags: &Flags,
        stop: &Arc<AtomicBool>,
    ) -> Result<()> {
        // What was counted while the tables changed is no proof.
        if flags.wrongly_set.is_none() && self.find_low_count(writer, counts, stop)?.is_none() {
            return Ok(());
        }
        let _flush = self.hold_flush(writer);
        let _guard = self.locks.exclusive(0..u64::MAX);
        self.flush_held(writer)?;
        let storage = Stoppable { storage: self.storage.clone(), stop: stop.clone(), room: 0 };
        let header = open::read_header(&storage)?;
        let counts = references::count(&storage, &header)?;
        let found = match self.find_low_count(writer, &counts, stop)? {
            None => Flags::read(&storage, &header, &counts)?.wrongly_set,
            found => found,
        };
        found.map_or(Ok(()), |found| self.note(Err(Error::corrupt(found))))
    }

    fn find_low_count(
        &self,
        writer: &Writer,
        counts: &references::ReferenceCounts,
        stop: &AtomicBool,
    ) -> Result<Option<String>> {
        for (cluster, references) in counts.range(0..u64::MAX) {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let count = writer.refcounts.get(cluster)?;
            if count < references {
                let at = self.geometry.host_offset(cluster);
                return Ok(Some(format!(
                    "the cluster at {at} has {references} references and refcount {count}"
                )));
            }
        }
        Ok(None)
    }

    fn return_leaked(
        &self,
        writer: &Writer,
        counts: &references::ReferenceCounts,
        stop: &AtomicBool,
    ) -> Result<u64> {
        let per_block = self.geometry.refcounts_per_block();
        let mut returned = 0;
        for block in writer.refcounts.blocks() {
            let end = (block + 1) * per_block;
            let mut from = block * per_block;
            while from < end && !stop.load(Ordering::Acquire) {
                let Some(first) = writer.refcounts.next_counted(from..end)? else { break };
                let part = first..end.min(first + AT_ONCE);
                returned += self.return_leaked_of(writer, counts, part.clone())?;
                from = part.end;
            }
        }
        if returned > 0 {
            // Freeing them is a change like any other, and the first one perhaps.
            self.prepare_to_write(writer)?;
            writer.recycler.note_change();
        }
        Ok(returned)
    }

    /// Those of some clusters, while everybody else waits.
    fn return_leaked_of(
        &self,
        writer: &Writer,
        counts: &references::ReferenceCounts,
        clusters: Range<u64>,
    ) -> Result<u64> {
        // Nobody is between dropping a cluster from a table and telling the recycler.
        let _flush = self.hold_flush(writer);
        let _guard = self.locks.exclusive(0..u64::MAX);
        let pending = writer.recycler.pending_drops(&clusters);
        let references = |cluster| {
            counts.get(HostCluster(cluster)) + pending.get(&cluster).copied().unwrap_or(0)
        };
        let take = |cluster| writer.recycler.take_leaked(cluster);
        writer.refcounts.leaked(clusters, references, take)
    }

    /// Sets the COPIED flags that are missing.
    fn set_missing_flags(&self, writer: &Writer, stop: &AtomicBool) -> Result<()> {
        self.prepare_to_write(writer)?;
        let all = 0..self.tables.l1_entries() as u64;
        self.mark_own(writer, all.take_while(|_| !stop.load(Ordering::Acquire)))
    }
}

/// What is wrong with the COPIED flags in a file.
#[derive(Default)]
struct Flags {
    any_missing: bool,
    /// The first one that denies references, in words.
    wrongly_set: Option<String>,
}

impl Flags {
    /// Looks at the tables on disk beside the references that were counted, perhaps a little earlier.
    fn read(
        storage: &dyn Storage,
        header: &Header,
        counts: &references::ReferenceCounts,
    ) -> Result<Flags> {
        let mut flags = Flags::default();
        if !counts.any_not_copied && counts.range(0..u64::MAX).all(|(_, count)| count == 1) {
            return Ok(flags);
        }
        let count = |cluster| Ok(Some(counts.get(cluster)));
        copied::for_each_wrong(storage, header, counts, &(), count, |wrong| {
            flags.any_missing |= !wrong.is_set();
            // What was allocated since has none yet; compressed clusters are flagged by nobody.
            if let Some(references @ 2..) = wrong.refcount.filter(|_| wrong.is_set()) {
                flags.wrongly_set.get_or_insert_with(|| {
                    format!(
                        "{} is marked as the only one that refers to its cluster, which has \
                         {references} references",
                        wrong.name()
                    )
                });
            }
            Ok(())
        })?;
        Ok(flags)
    }
}

/// The file grows while it is searched, and a table that leads to what is new must not look damaged:
/// it seems longer than it is.
const ROOM: u64 = 1 << 40;

/// The image file as the search reads it: it fails as soon as the search is stopped.
struct Stoppable {
    storage: Arc<dyn Storage>,
    stop: Arc<AtomicBool>,
    /// Bytes by which it seems longer.
    room: u64,
}

impl Stoppable {
    fn going_on(&self) -> io::Result<&dyn Storage> {
        match self.stop.load(Ordering::Acquire) {
            true => Err(io::Error::from_raw_os_error(libc::ECANCELED)),
            false => Ok(&*self.storage),
        }
    }
}

/// Only what reads is ever called.
impl Storage for Stoppable {
    fn len(&self) -> io::Result<u64> {
        Ok(self.going_on()?.len()?.saturating_add(self.room))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.going_on()?.read_at(buf, offset)
    }

    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.going_on()?.seek_data(offset)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.going_on()?.allocated()
    }

    fn write_at(&self, _data: &[u8], _offset: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn sync(&self) -> io::Result<()> {
        Err(read_only())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn punch_hole(&self, _range: Range<u64>) -> io::Result<()> {
        Err(read_only())
    }

    fn zero_range(&self, _range: Range<u64>) -> io::Result<()> {
        Err(read_only())
    }

    fn allocate(&self, _range: Range<u64>) -> io::Result<()> {
        Err(read_only())
    }
}

fn read_only() -> io::Error {
    io::Error::from_raw_os_error(libc::EROFS)
}
