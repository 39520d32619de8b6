//! Making the file short: live clusters at its end move into free ones near its start, and the end
//! is cut off.
//!
//! A *pass* takes the number of clusters in use as the new end and moves whatever lies behind it,
//! column by column: an L1 index, the L2 tables that the disk and the snapshots have there, and what
//! those map. Nothing maps a host cluster back to its references, in memory or on disk: the columns
//! are walked once, and because snapshots share clusters only at the same guest cluster, a column
//! shows every reference there is. What its tables do not account for stays where it is.
//!
//! ```text
//! guard the guest clusters -> copy to free clusters -> entries in memory point to the copy,
//! the old clusters are junk -> let go
//! ... flush (which syncs the copies before the entries) -> old clusters released, punched, free
//! ```
//! A move is a copy on write to itself. While a cluster is copied its guest cluster is held
//! exclusively, so nobody ever meets a half-made move: a write or a discard that comes meanwhile
//! waits for that one copy, and one that comes later meets the new entry and is an ordinary write or
//! discard, whether the copy has been flushed or not. So a move has no states of its own and nothing
//! to cancel; before the flush the old cluster is junk, and a crash finds the old entry with the old
//! content. (The recycler that this one learned from had no lock on a mapping, and needed both.)
//!
//! An L2 table that maps nothing, and is nobody else's, is let go of on the way.
//!
//! A host cluster that holds compressed data is in use as long as one piece in it is. So a pass
//! looks first how full those are, and packs what lives in the sparse ones together; what that frees
//! is won by the pass after it.
//!
//! [`Image::compact_some`] does one small step at a time, for the recycler's thread and for the
//! command alike; how fast the steps follow each other is not its matter.

mod columns;
mod compressed;
mod defragment;
mod occupancy;
mod structures;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::Serialize;

use occupancy::Occupancy;

use super::{Image, Writer};
use crate::alloc::{Refcounts, ShrinkWalk, Usage};
use crate::error::{Error, ErrorKind, Result};
use crate::recycler::Compacted;
use crate::rules::Rule;
use crate::tables::MetadataMap;

/// Somebody who never stops allocating does not keep the file long for ever: after so many times
/// what it takes discards to settle, clusters are moved all the same.
const PATIENCE: u32 = 20;
/// What cannot be done now is looked at again no sooner.
const RETRY: Duration = Duration::from_millis(1);
/// Clusters of free space that are left where a pass ran out of it: compressed data that does not
/// fit into what is free before the end in one piece would keep all of the file.
const SLACK: u64 = 4;
/// Others who go on to drop and allocate do not keep a pass from its end: it waits for what was
/// dropped to be free no more often than this.
const MOST_WAITS: u32 = 200;
/// So long at most: the end of a flush wakes the thread.
const WAIT: Duration = Duration::from_millis(10);
/// Nor does it flush more often than this meanwhile.
const MOST_LAST_FLUSHES: u32 = 8;
/// What has failed is tried again so long afterwards, and then after twice the time, up to the last.
const FIRST_RETRY: Duration = Duration::from_secs(4);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// So much is moved between two flushes at most: what a flush by a client finds to write is bounded.
const BYTES_BETWEEN_FLUSHES: u64 = 32 << 20;

/// From how much on moving clusters is worth while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompactAfter {
    /// Never.
    Off,
    /// When the file gets so many bytes shorter.
    Bytes(u64),
    /// When it gets shorter by so many per cent of its length, and by 1 MiB at least.
    Percent(u8),
}

impl CompactAfter {
    /// The bytes to win that make a pass worth while for a file of `length` bytes.
    pub fn threshold(self, length: u64) -> Option<u64> {
        match self {
            CompactAfter::Off => None,
            CompactAfter::Bytes(bytes) => Some(bytes.max(1)),
            CompactAfter::Percent(percent) => {
                Some((length / 100).saturating_mul(u64::from(percent)).max(1 << 20))
            }
        }
    }
}

/// What there is to win by moving clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Prospect {
    /// Clusters in use, those of the pool included while it is wanted.
    pub used: u64,
    /// One more than the last cluster in use.
    pub end: u64,
    /// Clusters in use that lie behind what becomes the end, and have to move.
    pub behind: u64,
}

impl Prospect {
    /// Clusters by which the file gets shorter.
    pub fn win(&self) -> u64 {
        self.end.saturating_sub(self.used)
    }
}

/// What `status` tells of compaction.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CompactionStatus {
    /// A pass is under way.
    pub running: bool,
    /// Somebody has asked for one that is not over yet.
    pub asked: bool,
    /// Bytes that this pass has moved so far, and about how many it has to.
    pub moved: (u64, u64),
    /// The cluster that becomes the end of the file.
    pub end: u64,
    /// L1 entries walked, and how many there are.
    pub columns: (u64, u64),
    /// What stays at the end of the file, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pinned: Option<String>,
    /// Why the last pass ended early, until one goes through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

/// What is remembered from pass to pass.
#[derive(Debug)]
pub(super) struct Compaction {
    after: CompactAfter,
    settle_after: Duration,
    /// Whatever there is to win is worth it: somebody has asked.
    asked: bool,
    pass: Option<Pass>,
    /// The bytes freed that were known when the file was last looked at, and what there was to win.
    looked_at: Option<(u64, u64)>,
    due_since: Option<Instant>,
    pinned: Option<String>,
    /// A pass has begun since this was last looked at.
    has_moved: bool,
    failed: Option<String>,
    /// After a failure: not before then, and how long that was to wait.
    retry: Option<(Instant, Duration)>,
    /// The compressed bytes dropped that were known when it was last looked how full host clusters
    /// are.
    surveyed_at: Option<u64>,
    /// The last pass ran out of room and this is the first time: the next one leaves so many clusters,
    /// perhaps none.
    cramped: Option<u64>,
    /// There may be compressed data: none ever comes to an open image.
    has_compressed: bool,
}

/// One walk over the image.
#[derive(Debug)]
struct Pass {
    purpose: Purpose,
    began: Instant,
    /// What lies at or behind this cluster moves; or all before it.
    end: u64,
    /// The bytes to win that are worth moving something for.
    worth: u64,
    /// Clusters by which the file gets shorter without packing compressed data.
    win: u64,
    stage: Stage,
    /// Bytes of compressed data that had been dropped when it began.
    dropped: u64,
    /// As far as it was looked how full the host clusters with compressed data are.
    survey: Option<Occupancy>,
    /// Host clusters that compressed data is moved out of.
    dissolved: Option<Occupancy>,
    /// Something found no room before the end: others have taken it.
    is_out_of_room: bool,
    /// And it was compressed data, which needs it in one piece.
    is_fragmented: bool,
    /// The pass before it ran out of room, and this one leaves so many clusters.
    slack: Option<u64>,
    snapshots: Vec<structures::SnapshotL1>,
    /// The L1 index that is next.
    column: u64,
    /// Of the column before it: entries that point behind the end, the next one last.
    entries: Vec<u32>,
    packer: Option<compressed::Packer>,
    /// L2 tables that mapped nothing, and are gone.
    emptied: u64,
    unflushed: u64,
    moved: u64,
    /// Bytes to be moved, by the count of clusters.
    to_move: u64,
    /// Of the last stage.
    shrinking: ShrinkWalk,
    flushes: u32,
    waits: u32,
}

/// What a look at the image came to.
enum Look {
    /// A pass is due, which wins this, where so many bytes are worth it.
    Worth(Prospect, u64),
    /// What there is to wait for.
    Not(Compacted),
}

/// What a step of a pass came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Taken,
    /// Somebody else has to do something first.
    Waits,
    /// It was the last one.
    Last,
}

/// What a step of whatever pass is under way came to.
enum Stepped {
    /// There is no pass.
    None,
    Taken,
    Waits,
    /// It was the last one of this pass.
    Over(Box<Pass>),
}

/// What a pass is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// The file gets shorter.
    Shorten,
    /// Everything that is mapped leaves the file's present clusters.
    Evacuate,
}

/// How a whole pass went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ran {
    Through,
    /// Another one may win more: it has packed compressed data, or had no room for some.
    Unfinished,
    /// It was told to end.
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Survey,
    Columns,
    Structures,
    Cut,
}

impl Compaction {
    pub(super) fn new(after: CompactAfter, settle_after: Duration) -> Self {
        Compaction {
            after,
            settle_after,
            asked: false,
            pass: None,
            looked_at: None,
            due_since: None,
            pinned: None,
            has_moved: false,
            failed: None,
            retry: None,
            surveyed_at: None,
            cramped: None,
            has_compressed: true,
        }
    }

    /// Whether another pass may win more than this one has, which is over.
    fn is_unfinished(&mut self, pass: &Pass) -> bool {
        let is_first_time = pass.is_out_of_room && pass.slack.is_none();
        self.cramped = is_first_time.then_some(if pass.is_fragmented { SLACK } else { 0 });
        is_first_time || pass.dissolved.is_some() || pass.emptied > 0
    }

    /// Whether so much compressed data was dropped, of `dropped` bytes in all, that it is worth
    /// looking how full host clusters are.
    fn wants_survey(&self, dropped: u64, worth: u64) -> bool {
        let is_first = self.asked && self.surveyed_at.is_none();
        self.has_compressed && (is_first || dropped - self.surveyed_at.unwrap_or(0) >= worth)
    }

    /// What has moved is not known to be on disk after all.
    pub(super) fn note_moved(&mut self) {
        self.has_moved = true;
    }

    pub(super) fn is_under_way(&self) -> bool {
        self.pass.is_some()
    }

    fn status(&self, columns: u64) -> CompactionStatus {
        CompactionStatus {
            running: self.pass.is_some(),
            asked: self.asked,
            moved: self.pass.as_ref().map_or((0, 0), |pass| (pass.moved, pass.to_move)),
            end: self.pass.as_ref().map_or(0, |pass| pass.end),
            columns: (self.pass.as_ref().map_or(0, |pass| pass.column.min(columns)), columns),
            pinned: self.pinned.clone(),
            failed: self.failed.clone(),
        }
    }

    /// Something lies behind the end and stays there.
    fn pin(&mut self, what: impl FnOnce() -> String) {
        if self.pinned.is_none() {
            let what = what();
            log::info!("the file cannot get shorter than it is: {what}");
            self.pinned = Some(what);
        }
    }
}

impl Image {
    /// What there is to win by moving clusters, now. An image that is open read-only tells what its
    /// file says, leaked clusters counted as used.
    ///
    /// # Errors
    /// Host errors.
    pub fn prospect(&self) -> Result<Prospect> {
        Ok(self.prospect_while(|| true)?.unwrap_or_default())
    }

    /// The same, which may take long; `None` where `go_on`, which is asked now and then, said `false`.
    ///
    /// # Errors
    /// As [`Image::prospect`]; `Corrupt` where it is open read-only and its refcount table makes no
    /// sense.
    pub fn prospect_while(&self, go_on: impl FnMut() -> bool) -> Result<Option<Prospect>> {
        let usage = match &self.writer {
            Some(writer) => writer.refcounts.usage(go_on)?,
            None => self.refcounts_read()?.usage(go_on)?,
        };
        let of = |usage: Usage| Prospect { used: usage.used, end: usage.end, behind: usage.behind };
        Ok(usage.map(of))
    }

    /// The refcounts of an image that is open read-only.
    fn refcounts_read(&self) -> Result<Refcounts> {
        let header = super::open::read_header(&*self.storage)?;
        let length = self.storage.len().map_err(|e| Error::io("reading the image's length", e))?;
        let metadata = Arc::new(MetadataMap::new(self.geometry.clusters_for(length).0));
        let (file, caches) = (self.storage.clone(), self.tables.memory());
        let refcounts = Refcounts::open(file, &header, metadata, caches)?;
        // All entries may name one block, which would be read as often as there are entries.
        refcounts.register_metadata()?;
        Ok(refcounts)
    }

    /// Asks the recycler to make the file as short as it gets, at its own pace and whatever there
    /// is to win; or takes that back, which ends a pass that was asked for. `status` tells how far
    /// it is, and that it is over.
    ///
    /// # Errors
    /// `ReadOnly`.
    pub fn ask_to_compact(&self, ask: bool) -> Result<()> {
        let writer = self.writer()?;
        let mut compaction = writer.compaction.lock();
        if compaction.asked
            && !ask
            && let Some(mut pass) = compaction.pass.take()
        {
            self.close_packer(writer, &mut pass);
        }
        compaction.asked = ask;
        compaction.failed = None;
        compaction.retry = None;
        self.tell(writer, &compaction);
        drop(compaction);
        writer.recycler.wake_signal().wake();
        Ok(())
    }

    fn tell(&self, writer: &Writer, compaction: &Compaction) {
        *writer.compaction_status.lock() = compaction.status(self.tables.l1_entries() as u64);
    }

    /// Makes the file as short as it gets, without regard for anybody else; `progress` is told now
    /// and then how far it is, and ends it by answering `false`. What was moved until then stays
    /// moved.
    ///
    /// # Errors
    /// Host errors, `ReadOnly`, `Corrupt`.
    pub fn compact(&self, mut progress: impl FnMut(&CompactionStatus) -> bool) -> Result<()> {
        let mut last = u64::MAX;
        loop {
            self.settle()?;
            let writer = self.writer()?;
            // Without the lock: who is told may ask for the status.
            let go_on = || {
                let status = writer.compaction_status.lock().clone();
                progress(&status)
            };
            let Some(prospect) = self.prospect_while(go_on)? else { return Ok(()) };
            // It may have failed meanwhile.
            self.writer()?;
            let surveys = {
                let compaction = writer.compaction.lock();
                compaction.has_compressed && compaction.surveyed_at.is_none()
            };
            // Each pass is shorter than the one before, or the last one.
            if !surveys && (prospect.win() == 0 || prospect.end >= last) {
                // What became free after the last pass had cut the file.
                return writer.recycler.cut_tail();
            }
            last = match self.run_pass(Purpose::Shorten, prospect, &mut progress)? {
                Ran::Stopped => return Ok(()),
                Ran::Unfinished => u64::MAX,
                Ran::Through => prospect.end,
            };
        }
    }

    /// A whole pass at once.
    fn run_pass(
        &self,
        purpose: Purpose,
        prospect: Prospect,
        progress: &mut impl FnMut(&CompactionStatus) -> bool,
    ) -> Result<Ran> {
        let writer = self.writer()?;
        let mut compaction = writer.compaction.lock();
        self.begin_pass(writer, &mut compaction, prospect, 1)?;
        if let (Purpose::Evacuate, Some(pass)) = (purpose, &mut compaction.pass) {
            (pass.purpose, pass.stage) = (purpose, Stage::Columns);
        }
        drop(compaction);
        loop {
            let mut compaction = writer.compaction.lock();
            let stepped = self.take_step(writer, &mut compaction);
            self.tell(writer, &compaction);
            let is_unfinished = match &stepped {
                Ok((Stepped::Over(pass), _)) => compaction.is_unfinished(pass),
                _ => false,
            };
            drop(compaction);
            self.note(self.assert_states(writer))?;
            match stepped?.0 {
                Stepped::Over(_) => {
                    self.note(self.assert_counts(writer, &writer.compaction.lock()))?;
                    return Ok(if is_unfinished { Ran::Unfinished } else { Ran::Through });
                }
                Stepped::None => return Ok(Ran::Through),
                Stepped::Waits => std::thread::sleep(WAIT),
                Stepped::Taken => {}
            }
            let status = writer.compaction_status.lock().clone();
            if !progress(&status) {
                self.stop_compacting(writer);
                return Ok(Ran::Stopped);
            }
            while writer.recycler.free_some()? {}
        }
    }

    /// Brings everything that was dropped all the way to free, and the pool too.
    fn settle(&self) -> Result<()> {
        let writer = self.begin_change()?;
        // The search for leaks frees nothing before it is over.
        while writer.recycler.are_frees_held() && self.is_writable() {
            std::thread::sleep(WAIT);
        }
        // It may have found damage.
        self.writer()?;
        loop {
            self.flush()?;
            while writer.recycler.free_some()? {}
            if !writer.recycler.awaits_flush() {
                break;
            }
        }
        writer.recycler.give_up_pool()?;
        self.flush()?;
        // The recycler's thread may have some in its hands. Others may go on to drop more.
        for _ in 0..MOST_WAITS {
            if writer.recycler.is_settled() {
                break;
            }
            std::thread::sleep(WAIT);
        }
        Ok(())
    }

    /// Does the next small step of compaction, if it is time for one: no longer than a few
    /// milliseconds, or a flush. No locks are held.
    ///
    /// # Errors
    /// Host errors, `Corrupt`. The pass starts again later.
    pub(super) fn compact_some(&self, now: Instant) -> Result<Compacted> {
        let writer = self.writer()?;
        self.note(self.assert_states(writer))?;
        let mut compaction = writer.compaction.lock();
        if compaction.pass.is_none() {
            let next = match self.look(writer, &mut compaction, now)? {
                Look::Worth(prospect, worth) => {
                    return self
                        .begin_pass(writer, &mut compaction, prospect, worth)
                        .map(|()| Compacted::Moved(0));
                }
                Look::Not(next) => next,
            };
            self.tell(writer, &compaction);
            return Ok(next);
        }
        let result = match self.take_step(writer, &mut compaction) {
            Ok((Stepped::None, _)) => Ok(Compacted::Nothing),
            Ok((Stepped::Taken, moved)) => Ok(Compacted::Moved(moved)),
            Ok((Stepped::Waits, _)) => Ok(Compacted::Later(Instant::now() + WAIT)),
            Ok((Stepped::Over(pass), moved)) => {
                self.end_pass(writer, &mut compaction, &pass).map(|()| Compacted::Moved(moved))
            }
            Err(e) => Err(e),
        };
        self.tell(writer, &compaction);
        result
    }

    /// Takes the next step of the pass that is under way; what it came to, and how many bytes have
    /// moved. After an error there is no pass any more: whatever has changed in memory is whole.
    fn take_step(&self, writer: &Writer, compaction: &mut Compaction) -> Result<(Stepped, u64)> {
        let Some(mut pass) = compaction.pass.take() else { return Ok((Stepped::None, 0)) };
        let before = pass.moved;
        let step = self.note(self.advance(writer, compaction, &mut pass));
        let moved = pass.moved - before;
        writer.recycler.note_moved(moved);
        let stepped = match step {
            Ok(step @ (Step::Taken | Step::Waits)) => {
                compaction.pass = Some(pass);
                if step == Step::Taken { Stepped::Taken } else { Stepped::Waits }
            }
            Ok(Step::Last) => Stepped::Over(Box::new(pass)),
            Err(e) => {
                self.close_packer(writer, &mut pass);
                return Err(e);
            }
        };
        Ok((stepped, moved))
    }

    /// A step of compaction has failed with this. It is tried again, each time after a longer pause:
    /// on a full disk for one there is nothing to win by haste.
    pub(super) fn compaction_failed(&self, error: Error) {
        let Err(error) = self.note(Err::<(), _>(error)) else { return };
        let Some(writer) = &self.writer else { return };
        let mut compaction = writer.compaction.lock();
        // An image that takes no more writes has said so itself.
        if compaction.failed.is_none() && self.is_writable() {
            log::warn!("{}: compaction failed and is tried again: {error}", self.health.label());
        }
        let pause = compaction.retry.map_or(FIRST_RETRY, |(_, last)| (last * 2).min(LAST_RETRY));
        compaction.retry = Some((Instant::now() + pause, pause));
        compaction.looked_at = None;
        compaction.asked = false;
        compaction.failed = Some(error.to_string());
        self.tell(writer, &compaction);
    }

    /// Ends a pass that is under way: it was told to, or the image is being closed.
    pub(super) fn stop_compacting(&self, writer: &Writer) {
        let mut compaction = writer.compaction.lock();
        if self.end_moves(writer, &mut compaction) {
            // Nobody has flushed: whoever changes snapshots next has to.
            compaction.note_moved();
        }
    }

    /// Ends a pass that is under way; whether anything may have moved since this was last asked. A
    /// flush makes the tables on disk say so.
    pub(super) fn end_moves(&self, writer: &Writer, compaction: &mut Compaction) -> bool {
        if let Some(mut pass) = compaction.pass.take() {
            self.close_packer(writer, &mut pass);
            compaction.looked_at = None;
        }
        std::mem::take(&mut compaction.has_moved)
    }

    /// Whether a pass is due.
    fn look(&self, writer: &Writer, compaction: &mut Compaction, now: Instant) -> Result<Look> {
        let recycler = &writer.recycler;
        let freed = self.freed(writer);
        let length =
            self.storage.len().map_err(|e| crate::Error::io("reading the image's length", e))?;
        let threshold = match compaction.asked {
            true => Some(1),
            false => compaction.after.threshold(length),
        };
        let Some(threshold) = threshold else { return Ok(Look::Not(Compacted::Nothing)) };
        if let Some((at, _)) = compaction.retry.filter(|(at, _)| *at > now) {
            return Ok(Look::Not(Compacted::Later(at)));
        }
        // What there is to win grows by what is freed, and by nothing else.
        let (then, won) = compaction.looked_at.unwrap_or_default();
        let has_looked = compaction.looked_at.is_some() && !compaction.asked;
        if has_looked && freed - then < threshold.saturating_sub(won).max(1) {
            compaction.due_since = None;
            return Ok(Look::Not(Compacted::Nothing));
        }
        let since = *compaction.due_since.get_or_insert(now);
        let quiet_at = recycler.last_change() + compaction.settle_after;
        if self.are_snapshots_read() || recycler.are_frees_held() || !recycler.is_settled() {
            return Ok(Look::Not(Compacted::Later(now + compaction.settle_after.max(RETRY))));
        }
        let quiet_at = recycler.pool_idle_at().map_or(quiet_at, |at| at.max(quiet_at));
        if quiet_at > now && since + compaction.settle_after * PATIENCE > now {
            return Ok(Look::Not(Compacted::Later(quiet_at)));
        }
        compaction.due_since = None;
        let Some(prospect) = self.prospect_unless_closing(writer)? else {
            return Ok(Look::Not(Compacted::Nothing));
        };
        let win = prospect.win() << self.geometry.cluster_bits();
        compaction.looked_at = Some((freed, win));
        let dropped = writer.compressed_dropped.load(Ordering::Relaxed);
        if win >= threshold || compaction.wants_survey(dropped, threshold) {
            return Ok(Look::Worth(prospect, threshold));
        }
        compaction.asked = false;
        Ok(Look::Not(Compacted::Nothing))
    }

    /// What there is to win, for the recycler's thread, which whoever closes the image waits for.
    fn prospect_unless_closing(&self, writer: &Writer) -> Result<Option<Prospect>> {
        let wake = writer.recycler.wake_signal();
        self.prospect_while(|| !wake.is_stopped())
    }

    fn begin_pass(
        &self,
        writer: &Writer,
        compaction: &mut Compaction,
        prospect: Prospect,
        worth: u64,
    ) -> Result<()> {
        self.prepare_to_write(writer)?;
        if let Some(mut old) = compaction.pass.take() {
            self.close_packer(writer, &mut old);
        }
        if self.are_snapshots_read() {
            return Err(Error::new(
                ErrorKind::InUse,
                "nothing is moved while somebody reads a snapshot of the image",
            ));
        }
        let flush = self.hold_flush(writer);
        // What is read from the file below is as the last flush left it, or newer.
        if Rule::WordsBeforePass.is_kept() {
            self.flush_held(writer)?;
        }
        let snapshots = self.snapshot_l1s()?;
        drop(flush);
        compaction.pinned = None;
        compaction.has_moved = true;
        log::debug!("compacting: {} clusters become {}", prospect.end, prospect.used);
        let dropped = writer.compressed_dropped.load(Ordering::Relaxed);
        let surveys = compaction.has_compressed && compaction.surveyed_at != Some(dropped);
        let slack = compaction.cramped.take();
        compaction.pass = Some(Pass {
            purpose: Purpose::Shorten,
            began: Instant::now(),
            end: prospect.used + slack.unwrap_or(0),
            worth,
            win: prospect.win(),
            stage: if surveys { Stage::Survey } else { Stage::Columns },
            dropped,
            survey: None,
            dissolved: None,
            is_out_of_room: false,
            is_fragmented: false,
            slack,
            snapshots,
            column: 0,
            entries: Vec::new(),
            packer: None,
            emptied: 0,
            unflushed: 0,
            moved: 0,
            shrinking: ShrinkWalk::default(),
            flushes: 0,
            waits: 0,
            to_move: prospect.behind << self.geometry.cluster_bits(),
        });
        self.tell(writer, compaction);
        Ok(())
    }

    /// One step of the pass.
    fn advance(
        &self,
        writer: &Writer,
        compaction: &mut Compaction,
        pass: &mut Pass,
    ) -> Result<Step> {
        if pass.unflushed >= BYTES_BETWEEN_FLUSHES || self.tables.is_crowded() {
            pass.unflushed = 0;
            self.flush()?;
            return Ok(Step::Taken);
        }
        match pass.stage {
            Stage::Survey => return self.survey(writer, compaction, pass),
            Stage::Columns => {
                if !self.move_in_columns(writer, compaction, pass)? {
                    pass.stage = Stage::Structures;
                }
            }
            Stage::Structures if pass.purpose == Purpose::Evacuate => {
                self.close_packer(writer, pass);
                return self.flush().map(|()| Step::Last);
            }
            Stage::Structures => {
                self.close_packer(writer, pass);
                self.move_structures(writer, compaction, pass)?;
                pass.stage = Stage::Cut;
            }
            Stage::Cut => return self.cut(writer, pass),
        }
        Ok(Step::Taken)
    }

    /// Looks a little further how full the host clusters with compressed data are, and at the end
    /// whether emptying the sparse ones is worth it.
    fn survey(
        &self,
        writer: &Writer,
        compaction: &mut Compaction,
        pass: &mut Pass,
    ) -> Result<Step> {
        let mut occupancy = pass.survey.take().unwrap_or_else(|| Occupancy::new(&self.geometry));
        if self.survey_some(writer, pass, &mut occupancy)? {
            pass.survey = Some(occupancy);
            return Ok(Step::Taken);
        }
        compaction.has_compressed = occupancy.any();
        compaction.surveyed_at = Some(pass.dropped);
        (pass.column, pass.stage) = (0, Stage::Columns);
        let bits = self.geometry.cluster_bits();
        let (win, live) = self.win_by_packing(writer, &occupancy)?;
        if win << bits >= pass.worth {
            pass.to_move += live;
            pass.dissolved = Some(occupancy);
        } else if pass.win << bits < pass.worth {
            if pass.emptied == 0 {
                return Ok(Step::Last);
            }
            // What those tables free may make it worth it.
            pass.stage = Stage::Cut;
        }
        Ok(Step::Taken)
    }

    /// When all that was dropped is free, lets go of the refcount blocks that describe the end of the file,
    /// moves those that lie there, some at a time, and cuts.
    fn cut(&self, writer: &Writer, pass: &mut Pass) -> Result<Step> {
        if pass.shrinking.is_at_start()
            && let Some(step) = self.settle_before_cut(writer, pass)?
        {
            return Ok(step);
        }
        let flush = self.hold_flush(writer);
        if writer.refcounts.shrink_structure(pass.end, &mut pass.shrinking)? > 0 {
            self.flush_held(writer)?;
        }
        drop(flush);
        if !pass.shrinking.is_over() {
            return Ok(Step::Taken);
        }
        if std::mem::take(&mut pass.shrinking).freed() > 0 {
            // What has left the end may leave other blocks with nothing to describe.
            return Ok(Step::Taken);
        }
        writer.recycler.cut_tail()?;
        Ok(Step::Last)
    }

    /// What has to be done first so that all that was dropped is free; `None` when it is, or when it has
    /// been waited for long enough.
    fn settle_before_cut(&self, writer: &Writer, pass: &mut Pass) -> Result<Option<Step>> {
        if writer.recycler.awaits_flush() && pass.flushes < MOST_LAST_FLUSHES {
            pass.flushes += 1;
            self.flush()?;
            return Ok(Some(Step::Taken));
        }
        if !writer.recycler.is_settled() && pass.waits < MOST_WAITS {
            // The thread frees what waits for it before it comes back here.
            pass.waits += 1;
            return Ok(Some(match writer.recycler.are_frees_held() {
                true => Step::Last,
                false => Step::Waits,
            }));
        }
        Ok(None)
    }

    /// Bytes that have become free in any way since the image was opened.
    fn freed(&self, writer: &Writer) -> u64 {
        let clusters = writer.recycler.loosened() << self.geometry.cluster_bits();
        clusters + writer.compressed_dropped.load(Ordering::Relaxed)
    }

    fn end_pass(&self, writer: &Writer, compaction: &mut Compaction, pass: &Pass) -> Result<()> {
        self.assert_counts(writer, compaction)?;
        let Some(prospect) = self.prospect_unless_closing(writer)? else { return Ok(()) };
        let bits = self.geometry.cluster_bits();
        let win = prospect.win() << bits;
        log::debug!("compacted: {} bytes moved, {} clusters left", pass.moved, prospect.end);
        // Another may win what others have freed meanwhile, or put at the end (for which nobody who has
        // asked need wait), and what this one was not out for. What stays behind the end for no such
        // reason does so until more is freed.
        compaction.failed = None;
        let has_reached_its_end = prospect.end <= pass.end && pass.slack.unwrap_or(0) == 0;
        let is_unfinished =
            has_reached_its_end || pass.moved > win || compaction.is_unfinished(pass);
        compaction.asked &= win > 0 && is_unfinished;
        let was_alone = !writer.recycler.has_allocated_since(pass.began);
        let worth_another = win > 0 && (is_unfinished || !was_alone);
        // Where something stays at the end and others go on allocating, one after the other may move
        // nothing.
        let pause = compaction.retry.map_or(FIRST_RETRY, |(_, last)| (last * 2).min(LAST_RETRY));
        compaction.retry = (worth_another && !is_unfinished && pass.moved == 0)
            .then(|| (Instant::now() + pause, pause));
        compaction.looked_at = (!worth_another).then(|| (self.freed(writer), win));
        Ok(())
    }
}
