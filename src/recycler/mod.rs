//! The recycler: the states of freed clusters, the pool of erased ones, and the thread that moves
//! them on and makes the file short.
//!
//! [`ClusterMap`] holds the states and decides nothing about I/O; [`Recycler`] does the work, one
//! step at a time; [`thread`] decides which step is next. It never touches guest data that is in
//! use, and it never flushes by itself: the image does, at its request.
//!
//! Moving live clusters down so that the file can be cut shorter is the image's, since that follows
//! its tables; the thread does it when nothing else is left to do, at the pace that `pace` allows.

mod cluster_map;
mod pace;
pub mod thread;
mod wake;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;

pub use cluster_map::{ClusterMap, Dropped, NotInUse, StateCounts};
pub use wake::WakeSignal;

use crate::alloc::{Allocated, Refcounts};
use crate::error::{Error, Result};
use crate::format::{Geometry, HostCluster};
use crate::rules::Rule;
use crate::storage::Storage;
use crate::tables::LinkOrder;

/// A pool holds at least this many clusters, whatever its size in bytes. It begins with so many, so
/// that little data does not lie behind a large pool, and grows whenever it runs low.
const MIN_POOL: u64 = 16;
/// Nobody needs a pool who has not allocated for so long.
const POOL_IDLE: Duration = Duration::from_secs(3);
/// One step punches at most so much, so that a stop or an allocation need not wait for more.
const PUNCH_BYTES: u64 = 1 << 30;
/// Free space in small pieces: one refill takes at most so many.
const PIECES_PER_REFILL: u64 = 1024;
/// So much junk is flushed as soon as no more comes for [`PAUSE`], so that discards that no flush
/// follows give their space back soon.
const MUCH_JUNK: u64 = 64 << 20;
/// Allocation has paused when there was none for so long.
const PAUSE: Duration = Duration::from_millis(500);

/// What a step of compaction came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compacted {
    /// There is nothing to do until something is freed.
    Nothing,
    /// There may be something to do then.
    Later(Instant),
    /// So many bytes were moved, and there is more to do.
    Moved(u64),
}

/// The freed and the ready clusters of one image.
pub struct Recycler {
    geometry: Geometry,
    storage: Arc<dyn Storage>,
    refcounts: Arc<Refcounts>,
    /// Lock order: after the refcounts. No I/O under it.
    map: Mutex<ClusterMap>,
    wake: Arc<WakeSignal>,
    /// Clusters to keep ready at most.
    max_pool: u64,
    /// Clusters to keep ready.
    pool_size: AtomicU64,
    /// Somebody allocates: a pool is worth having.
    pool_wanted: AtomicBool,
    /// Something was freed since the file's end was last looked at.
    tail_may_be_free: AtomicBool,
    /// How many are about to free something.
    freeing: AtomicU64,
    /// Nothing is freed for now.
    frees_held: AtomicBool,
    /// The thread knows that a flush is due some time.
    change_noted: AtomicBool,
    opened: Instant,
    last_allocation_ms: AtomicU64,
    last_drop_ms: AtomicU64,
    work: Work,
}

#[derive(Debug, Default)]
struct Work {
    /// Clusters that became free in any way, also those that nobody had used.
    loosened: AtomicU64,
    punched: AtomicU64,
    freed: AtomicU64,
    cut: AtomicU64,
    moved: AtomicU64,
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
    /// Moved towards the start of the file.
    pub moved: u64,
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
        let max_pool = match keep_erased {
            0 => 0,
            bytes => geometry.clusters_for(bytes).0.max(MIN_POOL),
        };
        Recycler {
            geometry,
            storage,
            refcounts,
            map: Mutex::default(),
            wake: Arc::default(),
            max_pool,
            pool_size: AtomicU64::new(max_pool.min(MIN_POOL)),
            pool_wanted: AtomicBool::new(false),
            tail_may_be_free: AtomicBool::new(false),
            freeing: AtomicU64::new(0),
            frees_held: AtomicBool::new(false),
            change_noted: AtomicBool::new(false),
            opened: Instant::now(),
            last_allocation_ms: AtomicU64::new(0),
            last_drop_ms: AtomicU64::new(0),
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
            (map.take_available(wanted), map.pool() <= self.pool_size() / 2)
        };
        if is_low && self.max_pool > 0 {
            self.wake.wake();
        }
        if let Some(clusters) = taken {
            return Ok(Rooted { recycler: self, clusters, order: LinkOrder::Any });
        }
        let clusters = self.allocate_zeroed(wanted)?;
        self.map.lock().add_rooted(clusters.clone());
        let order = LinkOrder::as_demanded_by(Rule::AllocatedBeforeEntry);
        Ok(Rooted { recycler: self, clusters, order })
    }

    /// Consecutive free clusters before `end`, at least 1 and at most `wanted`, past the pool; `None`
    /// when there is none.
    ///
    /// # Errors
    /// As [`Recycler::take`].
    pub fn take_before(&self, wanted: u64, end: u64) -> Result<Option<Rooted<'_>>> {
        let Some(allocated) = self.refcounts.allocate_before(wanted, end)? else {
            return Ok(None);
        };
        let clusters = self.zeroed(allocated)?;
        self.map.lock().add_rooted(clusters.clone());
        Ok(Some(Rooted { recycler: self, clusters, order: LinkOrder::AfterSync }))
    }

    /// Exactly `count` consecutive clusters at the end of the file, which read as zeros.
    ///
    /// # Errors
    /// As [`Recycler::take`].
    pub fn take_at_end(&self, count: u64) -> Result<Rooted<'_>> {
        let clusters = self.refcounts.allocate_at_end(count)?;
        if let Err(e) = self.refcounts.extend_file() {
            self.refcounts.release(clusters)?;
            return Err(e);
        }
        let clusters = self.zeroed(Allocated { clusters, is_new: false })?;
        self.tail_may_be_free.store(true, Ordering::Relaxed);
        self.map.lock().add_rooted(clusters.clone());
        Ok(Rooted { recycler: self, clusters, order: LinkOrder::AfterSync })
    }

    /// Exactly `count` consecutive clusters, of any content, for metadata: from the pool, else at the
    /// end of the file.
    ///
    /// # Errors
    /// As [`Recycler::take`].
    pub fn take_run(&self, count: u64) -> Result<Rooted<'_>> {
        let rooted = self.take(count)?;
        if rooted.count() == count {
            return Ok(rooted);
        }
        drop(rooted);
        let clusters = self.refcounts.allocate_at_end(count)?;
        self.map.lock().add_rooted(clusters.clone());
        Ok(Rooted { recycler: self, clusters, order: LinkOrder::AfterSync })
    }

    /// The tables in memory refer to `clusters` no more, which nothing else refers to.
    ///
    /// # Errors
    /// `Corrupt`: they were not in use.
    pub fn drop_used(&self, clusters: Range<u64>) -> Result<()> {
        let (dropped, is_now_much) = {
            let mut map = self.map.lock();
            let before = map.junk();
            let dropped = map.drop_used(clusters.clone());
            (dropped, !self.is_much(before) && self.is_much(map.junk()))
        };
        self.note_drop();
        if is_now_much {
            self.wake.wake();
        }
        dropped.map_err(|NotInUse| self.counted_once(&clusters))
    }

    /// The tables on disk refer to `clusters` no more, which nothing else refers to.
    ///
    /// # Errors
    /// `Corrupt`: they were not in use.
    pub fn release_used(&self, clusters: Range<u64>) -> Result<()> {
        let released = self.map.lock().release_used(clusters.clone());
        self.note_drop();
        released.map_err(|NotInUse| self.counted_once(&clusters))
    }

    fn counted_once(&self, clusters: &Range<u64>) -> Error {
        let at = self.geometry.host_offset(HostCluster(clusters.start));
        Error::corrupt(format!("a cluster at or after {at} is referenced twice, counted once"))
    }

    /// The tables in memory dropped one reference to a cluster that has others.
    pub fn drop_shared(&self, cluster: HostCluster) {
        self.map.lock().drop_shared(cluster.0);
        self.note_drop();
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
        let has_work = {
            let mut map = self.map.lock();
            map.settle(succeeded);
            map.awaits_freeing()
        };
        if has_work {
            self.wake.wake();
        }
    }

    /// Whether nothing that was dropped is on its way to being free.
    pub fn is_settled(&self) -> bool {
        let map = self.map.lock();
        let counts = map.counts();
        // What somebody has taken to free is in no state any more a moment before it is free.
        counts.junk + counts.released + counts.rooted == 0
            && self.freeing.load(Ordering::Acquire) == 0
    }

    /// Whether a client has allocated at `then` or later.
    pub fn has_allocated_since(&self, then: Instant) -> bool {
        // It is known to the millisecond.
        self.last_allocation() + Duration::from_millis(1) > then
    }

    /// When a cluster was last allocated or dropped.
    pub fn last_change(&self) -> Instant {
        let last = |at: &AtomicU64| at.load(Ordering::Relaxed);
        let ms = last(&self.last_allocation_ms).max(last(&self.last_drop_ms));
        self.opened + Duration::from_millis(ms)
    }

    /// Whether a flush would advance anything.
    pub fn awaits_flush(&self) -> bool {
        self.map.lock().awaits_flush()
    }

    /// When a flush is due for the sake of junk: much of it waits, and no more comes until then.
    pub fn junk_due(&self) -> Option<Instant> {
        let last = Duration::from_millis(self.last_drop_ms.load(Ordering::Relaxed));
        self.is_much(self.map.lock().junk()).then(|| self.opened + last + PAUSE)
    }

    fn is_much(&self, junk: u64) -> bool {
        junk << self.geometry.cluster_bits() >= MUCH_JUNK
    }

    /// How many clusters are in which state.
    pub fn counts(&self) -> StateCounts {
        self.map.lock().counts()
    }

    /// Two states that have a cluster in common, which none must.
    pub fn overlap(&self) -> Option<(&'static str, &'static str)> {
        self.map.lock().overlap()
    }

    /// Whether a cluster is in any state but used or free, or has lost a reference that is still
    /// counted.
    pub fn is_on_its_way(&self, cluster: u64) -> bool {
        self.map.lock().is_on_its_way(cluster)
    }

    /// What was done so far.
    pub fn work_done(&self) -> WorkDone {
        WorkDone {
            punched: self.work.punched.load(Ordering::Relaxed),
            freed: self.work.freed.load(Ordering::Relaxed),
            cut: self.work.cut.load(Ordering::Relaxed),
            moved: self.work.moved.load(Ordering::Relaxed),
        }
    }

    /// Live clusters of so many bytes were moved.
    pub fn note_moved(&self, bytes: u64) {
        self.work.moved.fetch_add(bytes, Ordering::Relaxed);
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

    /// See [`ClusterMap::pending_drops`].
    pub fn pending_drops(&self, clusters: &Range<u64>) -> HashMap<u64, u64> {
        self.map.lock().pending_drops(clusters)
    }

    /// See [`ClusterMap::dropped`].
    pub fn dropped(&self) -> Dropped {
        self.map.lock().dropped()
    }

    /// Punches and frees one run of released clusters; `false` when there is none.
    ///
    /// # Errors
    /// Host errors; the run stays released.
    pub fn free_some(&self) -> Result<bool> {
        if self.frees_held.load(Ordering::Acquire) {
            return Ok(false);
        }
        self.freeing.fetch_add(1, Ordering::AcqRel);
        let freed = self.free_next();
        self.freeing.fetch_sub(1, Ordering::AcqRel);
        freed
    }

    fn free_next(&self) -> Result<bool> {
        let shared = self.map.lock().take_shared();
        let failed = match shared.map(|cluster| (cluster, self.drop_one_of_several(cluster))) {
            None => None,
            Some((_, Ok(()))) => return Ok(true),
            Some((cluster, Err(e))) => {
                self.map.lock().release_shared(cluster);
                Some(e)
            }
        };
        // What has failed keeps nothing else waiting.
        let freed = self.free_released();
        failed.map_or(freed, Err)
    }

    fn free_released(&self) -> Result<bool> {
        let max = (PUNCH_BYTES >> self.geometry.cluster_bits()).max(1);
        let Some(clusters) = self.map.lock().take_released(max) else { return Ok(false) };
        let mut done = clusters.start;
        let result = self.free(clusters.clone(), &mut done);
        self.map.lock().not_freed(done..clusters.end);
        result.map(|()| true)
    }

    /// Punches and frees `clusters`, which are out of the map's released ones; those before `done` are
    /// through, whatever the result. The map is told before they are free, since from then on they may
    /// be handed out, linked and dropped again at any time.
    fn free(&self, clusters: Range<u64>, done: &mut u64) -> Result<()> {
        self.tail_may_be_free.store(true, Ordering::Relaxed);
        while *done < clusters.end {
            let mut end = *done;
            while end < clusters.end && self.refcounts.get(HostCluster(end))? == 1 {
                end += 1;
            }
            let run = *done..end;
            if run.is_empty() {
                // It has lost its link, but not yet all that is counted for it.
                let mut map = self.map.lock();
                map.freed(*done..*done + 1);
                map.release_shared(*done);
                *done += 1;
                continue;
            }
            self.punch_freed(run.clone())?;
            *done = end;
            self.map.lock().freed(run.clone());
            self.refcounts.release(run)?;
        }
        Ok(())
    }

    /// Drops one reference to a cluster that had others when this one was dropped from the tables. They
    /// may be gone by now, and other threads drop them at the same time: whoever has the last one
    /// punches.
    fn drop_one_of_several(&self, cluster: u64) -> Result<()> {
        self.tail_may_be_free.store(true, Ordering::Relaxed);
        if self.refcounts.release_shared(HostCluster(cluster))? {
            return Ok(());
        }
        self.punch_freed(cluster..cluster + 1)?;
        self.refcounts.release(cluster..cluster + 1)
    }

    /// Punches clusters that are about to be free.
    fn punch_freed(&self, clusters: Range<u64>) -> Result<()> {
        self.refcounts.refuse_kept(clusters.clone())?;
        self.punch(clusters.clone())?;
        self.work.freed.fetch_add(self.bytes(&clusters), Ordering::Relaxed);
        self.work.loosened.fetch_add(clusters.end - clusters.start, Ordering::Relaxed);
        Ok(())
    }

    /// Whether the pool should be filled up.
    pub fn is_pool_low(&self) -> bool {
        self.pool_wanted.load(Ordering::Relaxed)
            && self.max_pool > 0
            && self.map.lock().pool() <= self.pool_size() / 2
    }

    /// Whether the pool is so low that a flush should make what is erased available.
    pub fn is_pool_short(&self) -> bool {
        let counts = self.counts();
        counts.erased > 0 && counts.available <= self.pool_size() / 4
    }

    /// Fills the pool up from the free clusters nearest to the start of the file. What is taken is
    /// available after the next flush.
    ///
    /// # Errors
    /// As [`Recycler::take`].
    pub fn refill(&self) -> Result<()> {
        // It ran low in use, or even dry: more next time.
        let growth = if self.map.lock().pool() == 0 { 8 } else { 2 };
        self.pool_size.store((self.pool_size() * growth).min(self.max_pool), Ordering::Relaxed);
        for _ in 0..PIECES_PER_REFILL {
            let missing = self.pool_size().saturating_sub(self.map.lock().pool());
            if missing == 0 {
                break;
            }
            let clusters = self.allocate_zeroed(missing)?;
            self.map.lock().add_erased(clusters);
        }
        Ok(())
    }

    fn pool_size(&self) -> u64 {
        self.pool_size.load(Ordering::Relaxed)
    }

    fn last_allocation(&self) -> Instant {
        self.opened + Duration::from_millis(self.last_allocation_ms.load(Ordering::Relaxed))
    }

    /// When the pool is given up, if nobody allocates until then.
    pub fn pool_idle_at(&self) -> Option<Instant> {
        let has_one = self.pool_wanted.load(Ordering::Relaxed) || self.map.lock().pool_from(0) > 0;
        has_one.then(|| self.last_allocation() + POOL_IDLE)
    }

    /// Gives the pool up: nobody allocates any more, and it would lie between the data and the end
    /// of the file.
    ///
    /// # Errors
    /// Host errors.
    pub fn give_up_pool(&self) -> Result<()> {
        self.pool_wanted.store(false, Ordering::Relaxed);
        self.pool_size.store(self.max_pool.min(MIN_POOL), Ordering::Relaxed);
        self.tail_may_be_free.store(true, Ordering::Relaxed);
        self.release_pool_from(0)
    }

    /// Frees the clusters of the pool that lie at or after `from`. After an error those that it did not
    /// come to are released, and freed another time.
    fn release_pool_from(&self, from: u64) -> Result<()> {
        let mut pool = self.map.lock().take_pool_from(from).into_iter();
        let freed = pool.by_ref().try_for_each(|clusters| {
            self.work.loosened.fetch_add(clusters.end - clusters.start, Ordering::Relaxed);
            self.refcounts.release(clusters)
        });
        pool.for_each(|clusters| self.map.lock().release(clusters));
        freed
    }

    /// How many clusters have become free since the image was opened.
    pub fn loosened(&self) -> u64 {
        self.work.loosened.load(Ordering::Relaxed)
    }

    /// When the end of the file should be looked at; `None` when nothing was freed since.
    pub fn tail_due(&self) -> Option<Instant> {
        self.tail_may_be_free.load(Ordering::Relaxed).then(|| self.last_allocation() + PAUSE)
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
            self.release_pool_from(end)?;
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
        self.release_pool_from(0)?;
        let cut = self.refcounts.cut_tail()?;
        self.work.cut.fetch_add(cut, Ordering::Relaxed);
        Ok(())
    }

    /// Free clusters, counted now, that read as zeros and lie within the file.
    fn allocate_zeroed(&self, wanted: u64) -> Result<Range<u64>> {
        let allocated = self.refcounts.allocate(wanted)?;
        self.zeroed(allocated)
    }

    fn zeroed(&self, allocated: Allocated) -> Result<Range<u64>> {
        let zeroed = match allocated.is_new {
            true => {
                self.tail_may_be_free.store(true, Ordering::Relaxed);
                self.reach_allocated()
            }
            false => {
                let punched = match Rule::AllocatedReadsZeros.is_kept() {
                    true => self.punch(allocated.clusters.clone()),
                    false => Ok(()),
                };
                // What was given back when the file could not grow lies past its end still.
                punched.and_then(|()| self.reach_allocated())
            }
        };
        if let Err(e) = zeroed {
            self.refcounts.release(allocated.clusters)?;
            return Err(e);
        }
        Ok(allocated.clusters)
    }

    fn reach_allocated(&self) -> Result<()> {
        match Rule::FileReachesAllocated.is_kept() {
            true => self.refcounts.extend_file(),
            false => Ok(()),
        }
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

    fn note_drop(&self) {
        self.note_time(&self.last_drop_ms);
        self.note_change();
    }

    fn note_time(&self, at: &AtomicU64) {
        let now = self.opened.elapsed().as_millis() as u64;
        if at.load(Ordering::Relaxed) != now {
            at.store(now, Ordering::Relaxed);
        }
    }

    fn note_allocation(&self) {
        self.note_time(&self.last_allocation_ms);
        if !self.pool_wanted.load(Ordering::Relaxed) {
            self.pool_wanted.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests;
