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
//! with several references: the image turns read-only, while nothing has been freed yet. References that
//! were dropped meanwhile are counted still, so they are references here: a cluster that was counted once
//! and has lost one of two would be freed beneath the other. But the search may have read their tables
//! before. So clusters that have too many in this way are looked for once more, after a flush: what
//! leads to them then was not dropped. Nor is a cluster of the file that is not counted handed out, or
//! cut off with the file's end, before the end of the search: something may refer to it.
//! References that cannot be counted are damage too: one of them may be the second to somebody's data.
//! Only a host that cannot read says nothing about the image; snapshots, which are changed by refcounts
//! alone, stay as they are then. Where it cannot read again what seemed to be damaged, the image turns
//! read-only as well.
//! Bitmaps whose autoclear bit a program has cleared that knows nothing of them are such leaks: by
//! the format nobody may believe their directory any more. Those that make no sense are void after the
//! first change, and such leaks after the next open; until then they are left alone, and not counted.
//!
//! [`Refcounts::leaked`]: crate::alloc::Refcounts::leaked

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{Image, Writer, open};
use crate::check::copied;
use crate::check::references::{self, ReferenceCounts};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{AUTOCLEAR_BITMAPS, EXTENSION_BITMAPS, Header, HostCluster};
use crate::locks;
use crate::recycler::Dropped;
use crate::storage::Storage;

/// So long who closes the image waits for the search, where something is to be freed after it; and where
/// at most the close itself drops something.
const PATIENCE: Duration = Duration::from_secs(10);
const LITTLE_PATIENCE: Duration = Duration::from_secs(1);
/// So many clusters are looked at while others wait. One refcount block may count millions.
const AT_ONCE: u64 = 1 << 14;

/// The search of an image: none, one that is under way, or how it went.
#[derive(Debug, Default)]
pub(super) struct LeakSearch {
    stop: Arc<AtomicBool>,
    /// Until somebody has waited for it, who holds the lock meanwhile: nobody goes on before its end.
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Why it could not rule out that the image is damaged.
    failed: Mutex<Option<Error>>,
}

impl LeakSearch {
    /// Has the search end soon.
    pub(super) fn ask_to_stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// Ends the search and waits for its thread; whether that went as it should.
    pub(super) fn stop(&self) -> bool {
        self.ask_to_stop();
        self.wait()
    }

    /// Waits for the end of the search, but not for long, and less where nothing `is_dropped`.
    pub(super) fn wait_a_little(&self, is_dropped: bool) {
        let deadline = Instant::now() + if is_dropped { PATIENCE } else { LITTLE_PATIENCE };
        let is_over = || {
            self.thread
                .try_lock()
                .is_some_and(|thread| thread.as_ref().is_none_or(|thread| thread.is_finished()))
        };
        while !is_over() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for the end of the search; whether that went as it should.
    fn wait(&self) -> bool {
        let mut thread = self.thread.lock();
        thread.take().is_none_or(|thread| thread.join().is_ok())
    }
}

/// What the search reads.
struct Searched {
    storage: Stoppable,
    header: Header,
    /// The bitmaps make no sense and are void after the first change: they are not counted, and since
    /// they are still there nothing is returned.
    void_bitmaps: bool,
}

impl Searched {
    fn count(&self) -> Result<ReferenceCounts> {
        let mut header = self.header.clone();
        if self.void_bitmaps {
            header.autoclear_features &= !AUTOCLEAR_BITMAPS;
        }
        references::count(&self.storage, &header)
    }
}

/// What the search has found in an image that is not damaged.
struct Sound {
    counts: ReferenceCounts,
    /// Some COPIED flags are missing.
    misses_flags: bool,
    /// Clusters with more references than are counted, if those that were dropped meanwhile were not
    /// among those that were found.
    suspects: Vec<HostCluster>,
}

impl Image {
    /// Starts the search on an image that was just opened as `header` says.
    pub(super) fn search_leaks(self: &Arc<Self>, header: &Header) -> Result<()> {
        let Some(writer) = &self.writer else { return Ok(()) };
        writer.refcounts.distrust(true);
        writer.recycler.hold_frees(true);
        let stop = writer.leak_search.stop.clone();
        let has_bitmaps = header.autoclear_features & AUTOCLEAR_BITMAPS != 0
            && header.extension(EXTENSION_BITMAPS).is_some();
        let searched = Searched {
            storage: Stoppable { storage: self.storage.clone(), stop },
            header: header.clone(),
            void_bitmaps: has_bitmaps && writer.bitmaps.is_none(),
        };
        let image = Arc::downgrade(self);
        let search = move || {
            let counted = searched.count();
            if let Some(image) = image.upgrade() {
                image.end_search(counted, searched);
            }
        };
        let thread = std::thread::Builder::new()
            .name("leak search".into())
            .spawn(search)
            .map_err(|e| Error::io("starting the search for leaked clusters", e))?;
        *writer.leak_search.thread.lock() = Some(thread);
        Ok(())
    }

    /// Waits for the end of the search, if there is one.
    pub(super) fn finish_search(&self, writer: &Writer) -> Result<()> {
        match writer.leak_search.wait() {
            true => Ok(()),
            false => Err(Error::invalid("the search for leaks ended by a defect in this program")),
        }
    }

    /// Waits for the end of the search before a change that goes by refcounts alone.
    ///
    /// # Errors
    /// Where the search has found damage, or could not rule it out.
    pub(super) fn require_search(&self, writer: &Writer) -> Result<()> {
        if let Err(e) = self.finish_search(writer) {
            self.health.latch(&e.to_string());
        }
        self.writer()?;
        writer.leak_search.failed.lock().as_ref().map_or(Ok(()), |e| {
            Err(e.duplicate().context("it is not known whether the image is sound, open it again"))
        })
    }

    fn end_search(&self, counted: Result<ReferenceCounts>, mut searched: Searched) {
        let Some(writer) = &self.writer else { return };
        let stop = searched.storage.stop.clone();
        let found = counted.and_then(|counts| {
            let dropped = self.dropped(writer);
            self.judge(writer, &searched, counts, &dropped)
        });
        let mut is_doubtful = found.as_ref().is_err_and(is_damage);
        let found = found.and_then(|sound| match sound.suspects.as_slice() {
            [] => Ok(sound),
            suspects => {
                is_doubtful = true;
                self.clear_suspects(writer, &mut searched, suspects).map(|()| sound)
            }
        });
        let found = match found {
            Err(e) if is_damage(&e) => self.judge_again(writer, &mut searched),
            other => other,
        };
        match &found {
            Ok(Sound { counts, .. }) => {
                self.judge_bitmaps(writer, Some(|cluster| counts.get(HostCluster(cluster))));
            }
            Err(_) if stop.load(Ordering::Acquire) => {}
            Err(_) => self.judge_bitmaps(writer, None::<fn(u64) -> u64>),
        }
        *writer.leak_search.failed.lock() = found.as_ref().err().map(Error::duplicate);
        let returned = found.and_then(|sound| match searched.void_bitmaps {
            true => Ok(0),
            false => self.mend(writer, &sound, &stop),
        });
        if let Err(e) = &returned {
            let is_stopped = stop.load(Ordering::Acquire);
            if is_doubtful && !is_stopped {
                self.health.latch_doubtful(e);
            }
            if is_stopped || !self.health.is_good() {
                // The image is being closed, or damaged. What it cannot be known of whether somebody else
                // refers to it is a leak from now on.
                return;
            }
        }
        writer.refcounts.distrust(false);
        writer.recycler.hold_frees(false);
        match returned {
            Ok(0) => {}
            Ok(count) => log::info!(
                "{}: {count} clusters that had leaked are being freed",
                self.health.label()
            ),
            Err(e) => log::warn!(
                "{}: clusters that may have leaked are not looked for: {e}",
                self.health.label()
            ),
        }
    }

    /// Returns what has leaked and sets the flags that are missing; how many clusters leaked.
    fn mend(&self, writer: &Writer, sound: &Sound, stop: &AtomicBool) -> Result<u64> {
        let returned = self.return_leaked(writer, &sound.counts, stop)?;
        if sound.misses_flags {
            self.set_missing_flags(writer, stop)?;
        }
        Ok(returned)
    }

    /// What only a damaged image has: references that cannot be counted, a refcount that is lower than
    /// the references, since to drop one would free what others still refer to, and a flag that denies
    /// references. Nothing has been freed since the image was opened.
    ///
    /// # Errors
    /// The damage ([`is_damage`]), host errors.
    fn judge(
        &self,
        writer: &Writer,
        searched: &Searched,
        counts: ReferenceCounts,
        dropped: &Dropped,
    ) -> Result<Sound> {
        counts.trusted()?;
        let suspects = self.refuse_low_counts(writer, &searched.storage, &counts, dropped)?;
        let flags = Flags::read(&searched.storage, &searched.header, &counts)?;
        match flags.wrongly_set {
            Some(wrong) => Err(Error::corrupt(wrong)),
            None => Ok(Sound { counts, misses_flags: flags.any_missing, suspects }),
        }
    }

    /// What was dropped by now. Nobody is between dropping a cluster from a table and telling the recycler.
    fn dropped(&self, writer: &Writer) -> Dropped {
        let _flush = self.hold_flush(writer);
        let _guard = self.locks.exclusive(locks::ALL);
        writer.recycler.dropped()
    }

    /// Counts once more, after a flush. References were dropped from the `suspects` before that: those
    /// that are found now are others.
    ///
    /// # Errors
    /// As [`Image::judge`].
    fn clear_suspects(
        &self,
        writer: &Writer,
        searched: &mut Searched,
        suspects: &[HostCluster],
    ) -> Result<()> {
        self.flush()?;
        let dropped = self.dropped(writer);
        searched.header = open::read_header(&searched.storage)?;
        let counts = searched.count()?;
        counts.trusted()?;
        self.refuse_suspects(writer, suspects, &counts, &dropped)
    }

    /// Fails where fewer references to one of `suspects` are counted than were found and dropped.
    fn refuse_suspects(
        &self,
        writer: &Writer,
        suspects: &[HostCluster],
        counts: &ReferenceCounts,
        dropped: &Dropped,
    ) -> Result<()> {
        suspects.iter().try_for_each(|suspect| {
            self.refuse_low(writer, *suspect, counts.get(*suspect) + dropped.to(suspect.0))
        })
    }

    /// Counts and judges once more while nothing changes, since what was counted while the tables
    /// changed is no proof. Damage makes the image read-only.
    fn judge_again(&self, writer: &Writer, searched: &mut Searched) -> Result<Sound> {
        let _flush = self.hold_flush(writer);
        let _guard = self.locks.exclusive(locks::ALL);
        self.flush_held(writer)?;
        searched.header = open::read_header(&searched.storage)?;
        let dropped = writer.recycler.dropped();
        let found = searched.count();
        let found = found.and_then(|counts| self.judge(writer, searched, counts, &dropped));
        let found = found.and_then(|sound| {
            self.refuse_suspects(writer, &sound.suspects, &sound.counts, &dropped)?;
            Ok(sound)
        });
        match found {
            Err(e) if is_damage(&e) => self.note(Err(Error::corrupt(e.to_string()))),
            other => other,
        }
    }

    /// Refuses clusters with more references than are counted; those that have more together with the
    /// references that were dropped and are counted still.
    fn refuse_low_counts(
        &self,
        writer: &Writer,
        storage: &Stoppable,
        counts: &ReferenceCounts,
        dropped: &Dropped,
    ) -> Result<Vec<HostCluster>> {
        let mut suspects = Vec::new();
        for (cluster, references) in counts.range(0..u64::MAX) {
            storage.going_on().map_err(|e| Error::io("comparing refcounts", e))?;
            self.refuse_low(writer, cluster, references)?;
            let dropped = dropped.to(cluster.0);
            if dropped > 0 && self.refuse_low(writer, cluster, references + dropped).is_err() {
                suspects.push(cluster);
            }
        }
        Ok(suspects)
    }

    /// Fails where fewer references to a cluster are counted.
    fn refuse_low(&self, writer: &Writer, cluster: HostCluster, references: u64) -> Result<()> {
        let count = writer.refcounts.get(cluster)?;
        if count >= references {
            return Ok(());
        }
        let at = self.geometry.host_offset(cluster);
        Err(Error::corrupt(format!(
            "the cluster at {at} has {references} references and refcount {count}"
        )))
    }

    fn return_leaked(
        &self,
        writer: &Writer,
        counts: &ReferenceCounts,
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
        counts: &ReferenceCounts,
        clusters: Range<u64>,
    ) -> Result<u64> {
        // Nobody is between dropping a cluster from a table and telling the recycler.
        let _flush = self.hold_flush(writer);
        let _guard = self.locks.exclusive(locks::ALL);
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

/// Whether an error of the search says that the image is damaged: not the host's, which also say that the
/// search was stopped, nor that a sound image is too large to be looked through.
fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotQcow2)
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
    fn read(storage: &dyn Storage, header: &Header, counts: &ReferenceCounts) -> Result<Flags> {
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
        Ok(self.going_on()?.len()?.saturating_add(ROOM))
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
