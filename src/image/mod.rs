//! One open image: read, write, discard, zero, flush, resize, close.
//!
//! This room puts the others together and owns the rules between them: which guest clusters are
//! held while what is done, what is durable before what ([`flush`](Image::flush)), and when an
//! image stops taking writes. It knows nothing of FUSE, names or inodes.

mod asserts;
mod backing;
mod bitmaps;
mod clear;
mod compact;
mod create;
mod data_file;
mod encryption;
mod flush;
mod flush_lock;
mod health;
mod inflate;
mod leaks;
#[cfg(all(test, feature = "model"))]
mod models;
mod open;
mod ownership;
mod passthrough;
mod read;
mod resize;
mod seek;
mod snapshots;
mod subclusters;
mod write;
mod zeros;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;

use crate::alloc::Refcounts;
use crate::counters::CacheCounts;
use crate::crypt::Location;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Geometry, GuestOffset};
use crate::locks::GuestLocks;
use crate::memory::Memory;
use crate::recycler::thread::Agenda;
use crate::recycler::{Recycler, StateCounts, WorkDone};
use crate::storage::Storage;
use crate::tables::{Mapping, Run, Tables};

pub use backing::{Backing, RawBacking};
pub use compact::{CompactAfter, CompactionStatus, Prospect};
pub use create::{CompressionType, CreateOptions, NewDataFile};
pub use encryption::Encryption;
pub use health::Condition;
pub use open::{BackingFile, Beside, Summary};
pub use read::Content;
pub use seek::{Looks, Visit};
pub use snapshots::{SnapshotInfo, SnapshotKey, SnapshotView};

/// `status` counts the clusters in use of a file that has at most so many: some milliseconds.
const MOST_COUNTED: u64 = 1 << 20;
/// And whose refcounts are at most so many blocks, each of which is looked for in the file.
const MOST_BLOCKS_COUNTED: u64 = 1 << 12;

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether writes are allowed. Without it nothing is ever written to the file.
    pub writable: bool,
    /// Bytes of erased clusters kept ready so that allocation waits for nothing.
    pub keep_erased: u64,
    /// How long changes wait for a flush by a client before the recycler flushes by itself.
    pub flush_after: Duration,
    /// Bytes of memory for parts of L2 tables that could be read again.
    pub metadata_cache: u64,
    /// The memory that the caches of this image share with those of others.
    pub caches: Arc<Memory>,
    /// Whether clusters that a crash has leaked are looked for after the open, in the background.
    pub return_leaks: bool,
    /// From how much on it is worth while to move clusters so that the file gets shorter.
    pub compact_after: CompactAfter,
    /// Nothing was allocated or dropped for so long before clusters are moved.
    pub settle_after: Duration,
    /// Bytes a second that are moved at most; `None` leaves it to the recycler.
    pub recycle_rate: Option<u64>,
    /// What the log calls the image: its name.
    pub label: String,
    /// Whether what works in the background does so in threads of its own. Without them the search
    /// for leaks is over when the image is open, and the recycler works when it is told to
    /// ([`Image::recycle`]): what happens depends on the calls alone, and can be repeated.
    pub threads: bool,
    /// Whether the states of clusters are checked at each step, and all counts from time to time. A
    /// violation is a defect of this program; the image turns read-only.
    pub runtime_asserts: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            writable: false,
            keep_erased: 64 << 20,
            flush_after: Duration::from_secs(5),
            metadata_cache: 128 << 20,
            caches: Arc::default(),
            return_leaks: true,
            compact_after: CompactAfter::Percent(1),
            settle_after: Duration::from_secs(1),
            recycle_rate: None,
            label: String::new(),
            threads: true,
            runtime_asserts: false,
        }
    }
}

/// The state of an open image, for `status`.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// Bytes of the image file.
    pub file_length: u64,
    /// Bytes of host blocks that the image file occupies, and its external data file with it.
    pub allocated: u64,
    /// Bytes of the external data file, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file_length: Option<u64>,
    /// How the image is, in a word.
    pub condition: Condition,
    /// `ok`, or what is wrong.
    pub health: String,
    /// Whether it is open for writing.
    pub writable: bool,
    /// Clusters by state.
    pub clusters: StateCounts,
    /// What the recycler has done since the image was opened.
    pub recycled: WorkDone,
    /// Where making the file shorter stands.
    pub compaction: CompactionStatus,
    /// Clusters that a crash may have leaked are being looked for; nothing is freed meanwhile.
    pub searching_leaks: bool,
    /// Bytes of clusters in use; left out where counting them would take long, and of an image that is
    /// only read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub live: Option<u64>,
    /// The cache of L2 tables.
    pub table_cache: CacheCounts,
    /// The cache of inflated clusters: reads of parts of compressed ones.
    pub inflated_cache: CacheCounts,
    /// Completed flushes, those that several callers shared counted once.
    pub flushes: u64,
    /// Syncs of the host file, and of the external data file.
    pub syncs: u64,
}

/// An open image. All methods may be called from several threads at once. What changes the mapping
/// of a cluster has it alone, so a read sees it before or after. Writes in place do not: a read that
/// meets one, or another write of the same sectors, may find a part of each, down to single bytes, as
/// in any file. Who needs more of that takes turns.
pub struct Image {
    storage: Arc<dyn Storage>,
    data: data_file::DataFile,
    geometry: Geometry,
    size: AtomicU64,
    locks: GuestLocks,
    tables: Tables,
    /// Reads and writes that have come in.
    requests: AtomicU64,
    health: health::Health,
    /// It was marked as corrupt already when it was opened.
    opened_corrupt: bool,
    backing: Option<Arc<dyn Backing>>,
    compression: inflate::Compression,
    inflated: inflate::InflateCache,
    snapshots: snapshots::Snapshots,
    /// What only a writable image has.
    writer: Option<Writer>,
}

struct Writer {
    refcounts: Arc<Refcounts>,
    recycler: Recycler,
    /// COPIED flags that may be believed.
    trusted: ownership::Trusted,
    /// Lock order: before guest clusters.
    flush: flush_lock::FlushLock,
    /// Lock order: before the flush lock.
    compaction: Mutex<compact::Compaction>,
    /// Bytes of compressed data that tables refer to no more, since the image was opened.
    compressed_dropped: AtomicU64,
    /// A leaf.
    compaction_status: Mutex<CompactionStatus>,
    features: Mutex<open::Features>,
    /// Those that are consistent with the disk, or can become so.
    bitmaps: Option<bitmaps::Bitmaps>,
    runtime_asserts: bool,
    /// There were leaks when it was opened, or the host has failed since, which may leave some.
    may_have_leaked: AtomicBool,
    /// Nothing is mapped past the end of the disk, on disk neither: it can grow without more ado.
    clear_past_end: AtomicBool,
    /// The header is as the first write wants it.
    prepared: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// What the recycler's thread would remember, where there is none.
    agenda: Mutex<Agenda>,
    leak_search: leaks::LeakSearch,
}

impl Image {
    /// Bytes of the virtual disk.
    pub fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.geometry.cluster_size()
    }

    /// Whether somebody changes all of the disk at once, as who takes a snapshot does: reads and writes
    /// wait. One that comes together with them may hear of it too late.
    pub fn is_held(&self) -> bool {
        self.locks.are_all_held()
    }

    /// Whether writes are taken; if not, [`Status::health`] says why.
    pub fn is_writable(&self) -> bool {
        self.writer.is_some() && self.health.is_good()
    }

    /// What `status` shows.
    ///
    /// # Errors
    /// Host errors.
    pub fn status(&self) -> Result<Status> {
        let host = |e| Error::io("reading the image's length", e);
        let writer = self.writer.as_ref();
        let external = self.data.is_external.then_some(&self.data.storage);
        let in_data_file = external.map_or(Ok(0), |data| data.allocated()).map_err(host)?;
        let (condition, health) = self.condition();
        Ok(Status {
            virtual_size: self.virtual_size(),
            cluster_size: self.cluster_size(),
            file_length: self.storage.len().map_err(host)?,
            allocated: self.storage.allocated().map_err(host)? + in_data_file,
            data_file_length: external.map(|data| data.len()).transpose().map_err(host)?,
            condition,
            health,
            writable: self.is_writable(),
            clusters: writer.map(|w| w.recycler.counts()).unwrap_or_default(),
            recycled: writer.map(|w| w.recycler.work_done()).unwrap_or_default(),
            compaction: writer.map(|w| w.compaction_status.lock().clone()).unwrap_or_default(),
            searching_leaks: self.is_writable()
                && writer.is_some_and(|w| w.recycler.are_frees_held()),
            live: writer.and_then(|w| self.live(w)),
            table_cache: self.tables.cache_counts(),
            inflated_cache: self.inflated.counts(),
            flushes: writer.map_or(0, |w| w.flush.flushes()),
            syncs: writer.map_or(0, |w| w.flush.syncs()),
        })
    }

    /// Bytes of clusters that are counted and neither on their way to be free nor kept ready. `None`
    /// where there is much to count, or where that fails: who asks wants to know how the image is, not
    /// to make it worse.
    fn live(&self, writer: &Writer) -> Option<u64> {
        let length = self.storage.len().ok()?;
        let clusters = length >> self.geometry.cluster_bits();
        let blocks = clusters.div_ceil(self.geometry.refcounts_per_block());
        if clusters > MOST_COUNTED || blocks > MOST_BLOCKS_COUNTED {
            return None;
        }
        let used = writer.refcounts.usage(|| true).ok()??.used;
        let counts = writer.recycler.counts();
        let idle = counts.junk + counts.released + counts.erased + counts.available;
        Some(used.saturating_sub(idle) << self.geometry.cluster_bits())
    }

    /// [`Image::close`] follows as soon as nobody uses the image any more: what takes long, and can be left
    /// where it is, ends.
    pub fn begin_closing(&self) {
        if let Some(writer) = &self.writer {
            writer.leak_search.ask_to_stop();
            writer.recycler.wake_signal().stop();
        }
    }

    /// Recycles what is due, flushes, gives the pool back, cuts the file's end, and stops the
    /// recycler. Nothing may be read or written afterwards; a second close does nothing.
    ///
    /// # Errors
    /// Host errors; an image that was latched read-only with changes unwritten says so again.
    pub fn close(&self) -> Result<()> {
        let Some(writer) = &self.writer else { return Ok(()) };
        if writer.prepared.load(Ordering::Acquire) && self.health.is_good() {
            // Else what was dropped, and what the close drops itself, would not be freed.
            writer.leak_search.wait_a_little(!writer.recycler.is_settled());
        }
        self.begin_closing();
        let searched = writer.leak_search.stop();
        if let Some(thread) = writer.thread.lock().take()
            && thread.join().is_err() | !searched
        {
            self.health.latch("its recycler thread ended by a defect in this program");
        }
        let result = self.settle_everything(writer);
        self.health.latch("it is closed");
        self.note(result)
    }

    fn settle_everything(&self, writer: &Writer) -> Result<()> {
        if !writer.prepared.load(Ordering::Acquire) {
            // Nobody has changed anything: the file stays as it is, whatever is at its end.
            return Ok(());
        }
        if !self.health.is_good() {
            // It says so if a sync failed before, even if nothing but data was to be made durable.
            return self.flush();
        }
        self.stop_compacting(writer);
        self.assert_counts(writer, &writer.compaction.lock())?;
        self.flush()?;
        if writer.recycler.awaits_flush() {
            // What the flush itself dropped: the place of a table that it moved.
            self.flush()?;
        }
        self.store_bitmaps(writer);
        if !self.health.is_good() {
            return self.flush();
        }
        if writer.recycler.awaits_flush() {
            // The place of a refcount table that had to grow for the bitmaps.
            self.flush()?;
        }
        writer.recycler.give_back()?;
        self.flush()
    }

    fn writer(&self) -> Result<&Writer> {
        match &self.writer {
            Some(writer) if self.health.is_good() => Ok(writer),
            _ => Err(Error::new(
                ErrorKind::ReadOnly,
                match self.health.reason() {
                    Some(reason) => format!("the image is read-only: {reason}"),
                    None => "the image is open read-only".into(),
                },
            )),
        }
    }

    /// The run at guest offset `at` and the offset where it ends, at most `end`, subclusters told
    /// apart; the guest clusters are held.
    fn run_at(&self, at: u64, end: u64) -> Result<(Run, u64)> {
        let (mapping, end) = self.mapping_at(at, end)?;
        Ok(self.run_of(mapping, at, end))
    }

    /// The run that a mapping is at guest offset `at`, and where it ends, at most `end`.
    fn run_of(&self, mapping: Mapping, at: u64, end: u64) -> (Run, u64) {
        match mapping {
            Mapping::Uniform(run) => (run, end),
            Mapping::Mixed(mixed) => self.piece_at(&mixed, at, end),
        }
    }

    /// The same with a guest cluster whose subclusters differ as one, for who changes it.
    fn mapping_at(&self, at: u64, end: u64) -> Result<(Mapping, u64)> {
        let clusters = self.geometry.guest_clusters(&(at..end));
        let (mapping, count) = self.tables.lookup(clusters)?;
        Ok(self.shown(mapping, count, at, end))
    }

    /// What the tables' mapping of `count` clusters, the first of which is that of guest offset `at`,
    /// shows there, and where that ends, at most `end`.
    fn shown(&self, mapping: Mapping, count: u64, at: u64, end: u64) -> (Mapping, u64) {
        let first = self.geometry.guest_cluster(GuestOffset(at)).0;
        let run_end = end.min((first + count) << self.geometry.cluster_bits());
        if mapping == Mapping::Uniform(Run::Unallocated) && self.is_backed(at) {
            let backed = self.backed_clusters() << self.geometry.cluster_bits();
            return (Mapping::Uniform(Run::Backing), run_end.min(backed));
        }
        (mapping, run_end)
    }

    /// The part of `range` that lies within the virtual disk.
    fn within_disk(&self, range: std::ops::Range<u64>) -> std::ops::Range<u64> {
        let size = self.virtual_size();
        range.start.min(size)..range.end.min(size)
    }

    /// Where guest offset `at` and its data are when its cluster is `cluster`, and those after it
    /// follow.
    fn location(&self, cluster: crate::format::HostCluster, at: u64) -> Location {
        Location { host: self.host_offset(cluster, at), guest: at }
    }

    /// Where guest offset `at` is in the file when its cluster is `cluster`.
    fn host_offset(&self, cluster: crate::format::HostCluster, at: u64) -> u64 {
        self.geometry.host_offset(cluster).0 + self.geometry.within(at)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Some(writer) = &self.writer {
            writer.recycler.wake_signal().stop();
            if self.needs_flush() && self.health.is_good() {
                log::error!(
                    "an image was dropped without being closed: unflushed changes are lost"
                );
            }
        }
    }
}
