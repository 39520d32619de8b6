//! The recycler: the states of freed clusters, the pool of erased ones, and the thread that moves
//! them on and makes the file short.
//!
//! [`ClusterMap`] holds the states and decides nothing about I/O; [`Recycler`] does the work, one
//! step at a time; [`thread`] decides which step is next. It never touches guest data that is in
//! use, and it never flushes by itself: the image does, at its request.
//!
//! Moving live clusters down so that the file can be cut shorter belongs here too, and is not
//! there yet.

mod cluster_map;
mod cluster_set;
pub mod thread;
mod wake;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;

pub use cluster_map::{ClusterMap, NotInUse, StateCounts};
pub use wake::WakeSignal;

use crate::alloc::Refcounts;
use crate::error::{Error, Result};
use crate::format::{Geometry, HostCluster};
use crate::storage::Storage;
use crate::tables::LinkOrder;

/// A pool holds at least this many clusters, whatever its size in bytes.
const MIN_POOL: u64 = 16;
/// One step punches at most so much, so that a stop or an allocation need not wait for more.
const PUNCH_BYTES: u64 = 1 << 30;
/// Free space in small pieces: one refill takes at most so many.
const PIECES_PER_REFILL: u64 = 1024;
/// Allocation has paused when there was none for so long.
const PAUSE: Duration = Duration::from_millis(500);

/// The freed and the ready clusters of one image.
pub struct Recycler {
    geometry: Geometry,
    storage: Arc<dyn Storage>,
    refcounts: Arc<Refcounts>,
    /// Lock order: after the refcounts. No I/O under it.
    map: Mutex<ClusterMap>,
    wake: Arc<WakeSignal>,
    /// Clusters to keep ready.
    pool_size: u64,
    /// Somebody allocates: a pool is worth having.
    pool_wanted: AtomicBool,
    /// Something was freed since the file's end was last looked at.
    tail_may_be_free: AtomicBool,
    /// Nothing is freed for now.
    frees_held: AtomicBool,
    /// The thread knows that a flush is due some time.
    change_noted: AtomicBool,
    opened: Instant,
    last_allocation_ms: AtomicU64,
    work: Work,
}

#[derive(Debug, Default)]
struct Work {
    punched: AtomicU64,
    freed: AtomicU64,
    cut: AtomicU64,
}

/// What the recycler has done since the image was opened, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WorkDone {
    /// Punched out of the file.
    pub punched: u64,
    /// Clusters whose refcount came to 0.
    pub freed: u64,
    /// Cut off the file's end.
    pub cut: u64,
}

/// Consecutive clusters that were handed out and are not linked yet. They read as zeros and are
/// counted; what is not linked goes back when this is dropped.
#[must_use = "clusters that are not linked go back to the recycler"]
pub struct Rooted<'a> {
    recycler: &'a Recycler,
    clusters: Range<u64>,
    order: LinkOrder,
}

impl Rooted<'_> {
    /// The first cluster.
    pub fn first(&self) -> HostCluster {
        HostCluster(self.clusters.start)
    }

    /// How many there are, at least 1.
    pub fn count(&self) -> u64 {
        self.clusters.end - self.clusters.start
    }

    /// When a reference to them may reach the disk.
    pub fn order(&self) -> LinkOrder {
        self.order
    }

    /// The first `count` of them are in use now.
    pub fn linked(mut self, count: u64) {
        let linked = self.clusters.start..self.clusters.start + count;
        self.clusters.start = linked.end;
        self.recycler.map.lock().linked(linked);
    }
}

impl Drop for Rooted<'_> {
    fn drop(&mut self) {
        if !self.clusters.is_empty() {
            self.recycler.map.lock().abandoned(self.clusters.clone());
            self.recycler.wake.wake();
        }
    }
}

impl Recycler {
    /// A recycler that keeps about `keep_erased` bytes of clusters ready.
    pub fn new(
        geometry: Geometry,
        storage: Arc<dyn Storage>,
        refcounts: Arc<Refcounts>,
        keep_erased: u64,
    ) -> Self {
        let pool_size = match keep_erased {
            0 => 0,
            bytes => geometry.clusters_for(bytes).0.max(MIN_POOL),
        };
        Recycler {
            geometry,
            storage,
            refcounts,
            map: Mutex::default(),
            wake: Arc::default(),
            pool_size,
            pool_wanted: AtomicBool::new(false),
            tail_may_be_free: AtomicBool::new(false),
            frees_held: AtomicBool::new(false),
            change_noted: AtomicBool::new(false),
            opened: Instant::now(),
            last_allocation_ms: AtomicU64::new(0),
            work: Work::default(),
        }
    }

    /// What wakes the thread.
    pub fn wake_signal(&self) -> &Arc<WakeSignal> {
        &self.wake
    }

    /// Consecutive clusters, at least 1 and at most `wanted`, that read as zeros: from the pool,
    /// else straight from the free ones, whose links then wait for a sync.
    ///
    /// # Errors
    /// As [`Refcounts::allocate`], and host errors.
    pub fn take(&self, wanted: u64) -> Result<Rooted<'_>> {
        self.note_allocation();
        let (taken, is_low) = {
            let mut map = self.map.lock();
            (map.take_available(wanted), map.pool() <= self.pool_size / 2)
        };
        if is_low && self.pool_size > 0 {
            self.wake.wake();
        }
        if let Some(clusters) = taken {
            return Ok(Rooted { recycler: self, clusters, order: LinkOrder::Any });
        }
        let clusters = self.allocate_zeroed(wanted)?;
        self.map.lock().add_rooted(clusters.clone());
        Ok(Rooted { recycler: self, clusters, order: LinkOrder::AfterSync })
    }

    /// The tables in memory refer to `clusters` no more, which nothing else refers to.
    ///
    /// # Errors
    /// `Corrupt`: they were not in use.
    pub fn drop_used(&self, clusters: Range<u64>) -> Result<()> {
        let dropped = self.map.lock().drop_used(clusters.clone());
        self.note_change();
        dropped.map_err(|NotInUse| {
            let at = self.geometry.host_offset(HostCluster(clusters.start));
            Error::corrupt(format!("a cluster at or after {at} is referenced twice, counted once"))
        })
    }

    /// The tables in memory dropped one reference to a cluster that has others.
    pub fn drop_shared(&self, cluster: HostCluster) {
        self.map.lock().drop_shared(cluster.0);
        self.note_change();
    }

    /// Nothing in memory or on disk refers to `clusters` any more.
    pub fn release(&self, clusters: Range<u64>) {
        self.map.lock().release(clusters);
        self.wake.wake();
    }

    /// Something in memory has changed that a flush has to write: the thread makes sure that one
    /// comes. Called after the change.
    pub fn note_change(&self) {
        if !self.change_noted.load(Ordering::Acquire)
            && !self.change_noted.swap(true, Ordering::AcqRel)
        {
            self.wake.wake();
        }
    }

    /// The thread is about to look whether a flush is needed: later changes wake it again.
    pub fn forget_changes(&self) {
        self.change_noted.store(false, Ordering::Release);
    }

    /// See [`ClusterMap::seal`].
    pub fn seal(&self) -> bool {
        self.map.lock().seal()
    }

    /// See [`ClusterMap::settle`].
    pub fn settle(&self, succeeded: bool) {
        self.map.lock().settle(succeeded);
        self.wake.wake();
    }

    /// Whether a flush would advance anything.
    pub fn awaits_flush(&self) -> bool {
        self.map.lock().awaits_flush()
    }

    /// How many clusters are in which state.
    pub fn counts(&self) -> StateCounts {
        self.map.lock().counts()
    }

    /// What was done so far.
    pub fn work_done(&self) -> WorkDone {
        WorkDone {
            punched: self.work.punched.load(Ordering::Relaxed),
            freed: self.work.freed.load(Ordering::Relaxed),
            cut: self.work.cut.load(Ordering::Relaxed),
        }
    }

    /// While it holds, nothing is punched or freed: somebody reads tables that may be dropped.
    pub fn hold_frees(&self, hold: bool) {
        self.frees_held.store(hold, Ordering::Release);
        self.wake.wake();
    }

    /// Whether [`Recycler::hold_frees`] holds.
    pub fn are_frees_held(&self) -> bool {
        self.frees_held.load(Ordering::Acquire)
    }

    /// Takes over a cluster that nothing refers to, to free it; how many that are: 0 when it is on
    /// its way already.
    pub fn take_leaked(&self, cluster: u64) -> u64 {
        u64::from(self.map.lock().take_leaked(cluster))
    }

    /// Punches and frees one run of released clusters; `false` when there is none.
    ///
    /// # Errors
    /// Host errors; the run stays released.
    pub fn free_some(&self) -> Result<bool> {
        if self.frees_held.load(Ordering::Acquire) {
            return Ok(false);
        }
        let shared = self.map.lock().take_shared();
        if let Some(cluster) = shared {
            let not_in_the_map = |_| ();
            return self
                .free(cluster..cluster + 1, &mut cluster.clone(), not_in_the_map)
                .inspect_err(|_| self.map.lock().shared_not_freed(cluster))
                .map(|()| true);
        }
        let max = (PUNCH_BYTES >> self.geometry.cluster_bits()).max(1);
        let Some(clusters) = self.map.lock().take_released(max) else { return Ok(false) };
        let mut done = clusters.start;
        let result = self.free(clusters.clone(), &mut done, |freed| self.map.lock().freed(freed));
        self.map.lock().not_freed(done..clusters.end);
        result.map(|()| true)
    }

    /// Drops a reference from each of `clusters`; those that had only that one are punched first.
    /// Those before `done` are through, whatever the result; `forget` is told of them before they
    /// are free, since from then on they may be handed out, linked and dropped again at any time.
    fn free(
        &self,
        clusters: Range<u64>,
        done: &mut u64,
        forget: impl Fn(Range<u64>),
    ) -> Result<()> {
        self.tail_may_be_free.store(true, Ordering::Relaxed);
        while *done < clusters.end {
            let mut end = *done;
            while end < clusters.end && self.refcounts.get(HostCluster(end))? == 1 {
                end += 1;
            }
            if end > *done {
                self.punch(*done..end)?;
                self.work.freed.fetch_add(self.bytes(&(*done..end)), Ordering::Relaxed);
            }
            let punched = *done..end.max(*done + 1);
            *done = punched.end;
            forget(punched.clone());
            self.refcounts.release(punched)?;
        }
        Ok(())
    }

    /// Whether the pool should be filled up.
    pub fn is_pool_low(&self) -> bool {
        self.pool_wanted.load(Ordering::Relaxed)
            && self.pool_size > 0
            && self.map.lock().pool() <= self.pool_size / 2
    }

    /// Whether the pool is so low that a flush should make what is erased available.
    pub fn is_pool_short(&self) -> bool {
        let counts = self.counts();
        counts.erased > 0 && counts.available <= self.pool_size / 4
    }

    /// Fills the pool up from the free clusters nearest to the start of the file. What is taken is
    /// available after the next flush.
    ///
    /// # Errors
    /// As [`Recycler::take`].
    pub fn refill(&self) -> Result<()> {
        for _ in 0..PIECES_PER_REFILL {
            let missing = self.pool_size.saturating_sub(self.map.lock().pool());
            if missing == 0 {
                break;
            }
            let clusters = self.allocate_zeroed(missing)?;
            self.map.lock().add_erased(clusters);
        }
        Ok(())
    }

    /// When the end of the file should be looked at; `None` when nothing was freed since.
    pub fn tail_due(&self) -> Option<Instant> {
        let last = Duration::from_millis(self.last_allocation_ms.load(Ordering::Relaxed));
        self.tail_may_be_free.load(Ordering::Relaxed).then(|| self.opened + last + PAUSE)
    }

    /// Cuts free clusters off the end of the file. Clusters of the pool that lie there are given
    /// up where the pool can be filled with others before them.
    ///
    /// # Errors
    /// Host errors.
    pub fn cut_tail(&self) -> Result<()> {
        self.tail_may_be_free.store(false, Ordering::Relaxed);
        let end = self.refcounts.used_end(|cluster| self.map.lock().is_in_pool(cluster))?;
        let spare = self.map.lock().pool_from(end);
        if spare > 0 && self.refcounts.has_free_before(end, spare)? {
            let pool = self.map.lock().take_pool_from(end);
            pool.into_iter().try_for_each(|clusters| self.refcounts.release(clusters))?;
            self.wake.wake();
        }
        let cut = self.refcounts.cut_tail()?;
        self.work.cut.fetch_add(cut, Ordering::Relaxed);
        Ok(())
    }

    /// Frees everything that can be, the pool included, and cuts the file's end: the image is
    /// being closed, and a flush has just succeeded.
    ///
    /// # Errors
    /// Host errors.
    pub fn give_back(&self) -> Result<()> {
        while self.free_some()? {}
        let pool = self.map.lock().take_pool_from(0);
        pool.into_iter().try_for_each(|clusters| self.refcounts.release(clusters))?;
        let cut = self.refcounts.cut_tail()?;
        self.work.cut.fetch_add(cut, Ordering::Relaxed);
        Ok(())
    }

    /// Free clusters, counted now, that read as zeros and lie within the file.
    fn allocate_zeroed(&self, wanted: u64) -> Result<Range<u64>> {
        let allocated = self.refcounts.allocate(wanted)?;
        let zeroed = match allocated.is_new {
            true => self.refcounts.extend_file(),
            false => self.punch(allocated.clusters.clone()),
        };
        if let Err(e) = zeroed {
            self.refcounts.release(allocated.clusters)?;
            return Err(e);
        }
        Ok(allocated.clusters)
    }

    /// Makes clusters that nobody refers to read as zeros, and gives their blocks back where the
    /// host can.
    fn punch(&self, clusters: Range<u64>) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        let bytes = clusters.start << bits..clusters.end << bits;
        self.work.punched.fetch_add(self.bytes(&clusters), Ordering::Relaxed);
        crate::storage::erase(&*self.storage, bytes.clone())
            .map_err(|e| Error::io(format!("erasing clusters at {:#x}", bytes.start), e))
    }

    fn bytes(&self, clusters: &Range<u64>) -> u64 {
        (clusters.end - clusters.start) << self.geometry.cluster_bits()
    }

    fn note_allocation(&self) {
        let now = self.opened.elapsed().as_millis() as u64;
        if self.last_allocation_ms.load(Ordering::Relaxed) != now {
            self.last_allocation_ms.store(now, Ordering::Relaxed);
        }
        if !self.pool_wanted.load(Ordering::Relaxed) {
            self.pool_wanted.store(true, Ordering::Relaxed);
        }
    }
}
