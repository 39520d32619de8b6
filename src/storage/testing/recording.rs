//! A file that remembers how it came to be, and the crash states that follow from it.
//!
//! What a crash leaves: every change before the call of the last sync that returned, and of the
//! changes since then any subset, each whole, not at all, or torn at 512-byte sectors. Kept
//! changes apply in the order they were made in: a host never puts an older write over a newer
//! one. Files that are recorded together ([`RecordingStorage::beside`]) share one log; a sync of one
//! covers only its own changes.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::MemoryStorage;
use crate::storage::Storage;

/// What is written whole or not at all, in bytes.
const SECTOR: u64 = 512;

/// One change of a file.
#[derive(Clone, Debug)]
pub enum Change {
    /// Bytes were written.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Arc<[u8]>,
    },
    /// A range was punched out.
    Punch(Range<u64>),
    /// A range was zeroed.
    Zero(Range<u64>),
    /// A range was given blocks.
    Allocate(Range<u64>),
    /// The file was cut or grown to so many bytes.
    SetLen(u64),
}

/// What a crash does to a change that no sync covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is on disk.
    Kept,
    /// It is not.
    Lost,
    /// Of the sectors that it touches, number `n` (from its first) is on disk exactly if bit
    /// `n % 64` is set. A new length is never torn: it is on disk.
    Torn(u64),
}

impl Change {
    /// Makes the change in `file`, as far as `fate` lets it.
    fn apply(&self, file: &MemoryStorage, fate: Fate) -> io::Result<()> {
        match (fate, self) {
            (Fate::Lost, _) => Ok(()),
            (_, Change::SetLen(len)) => file.set_len(*len),
            (Fate::Kept, Change::Write { offset, data }) => file.write_at(data, *offset),
            (Fate::Kept, Change::Punch(range)) => file.punch_hole(range.clone()),
            (Fate::Kept, Change::Zero(range)) => file.zero_range(range.clone()),
            (Fate::Kept, Change::Allocate(range)) => file.allocate(range.clone()),
            (Fate::Torn(mask), change) => {
                for (n, sector) in sectors(change.range()).enumerate() {
                    if mask >> (n % 64) & 1 == 1 {
                        change.part(sector).apply(file, Fate::Kept)?;
                    }
                }
                Ok(())
            }
        }
    }

    /// The bytes that it touches; none for a new length.
    pub fn range(&self) -> Range<u64> {
        match self {
            Change::Write { offset, data } => *offset..*offset + data.len() as u64,
            Change::Punch(range) | Change::Zero(range) | Change::Allocate(range) => range.clone(),
            Change::SetLen(_) => 0..0,
        }
    }

    /// The part of it within `piece`, which lies within its range.
    fn part(&self, piece: Range<u64>) -> Change {
        match self {
            Change::Write { offset, data } => {
                let data = &data[(piece.start - offset) as usize..(piece.end - offset) as usize];
                Change::Write { offset: piece.start, data: data.into() }
            }
            Change::Punch(_) => Change::Punch(piece),
            Change::Zero(_) => Change::Zero(piece),
            Change::Allocate(_) => Change::Allocate(piece),
            Change::SetLen(len) => Change::SetLen(*len),
        }
    }
}

/// The sectors of the file that a range touches, the first and last cut to the range.
fn sectors(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    (range.start / SECTOR..range.end.div_ceil(SECTOR))
        .map(move |n| (n * SECTOR).max(range.start)..((n + 1) * SECTOR).min(range.end))
}

/// The log of one file or of several.
type Log = Arc<Mutex<Vec<Logged>>>;

/// An entry, and the number of the file that it is of.
#[derive(Clone, Debug)]
struct Logged {
    file: usize,
    entry: Entry,
}

/// One entry of the log.
#[derive(Clone, Debug)]
pub enum Entry {
    /// The file changed.
    Change(Change),
    /// A sync returned; it covers the entries before number `covers`.
    Sync {
        /// The length of the log when the sync was called.
        covers: usize,
    },
    /// The caller's own mark, see [`RecordingStorage::mark`].
    Mark(u64),
}

/// A file in memory with a log of everything that was ever done to it.
#[derive(Debug)]
pub struct RecordingStorage {
    initial: MemoryStorage,
    current: MemoryStorage,
    /// Which of the log's files this is.
    file: usize,
    /// Held while a change is made, so that the log has the order of the changes.
    log: Log,
    sync_takes: Duration,
}

impl RecordingStorage {
    /// A file that holds what `initial` holds, durably.
    pub fn new(initial: MemoryStorage) -> Self {
        let current = initial.fork();
        let log = Log::default();
        RecordingStorage { initial, current, file: 0, log, sync_takes: Duration::ZERO }
    }

    /// Another file, number `file` of those that are recorded in this one's log (number 0). What a
    /// crash leaves of it follows from its own [`RecordingStorage::replay`], walked in step.
    #[must_use]
    pub fn beside(&self, file: usize, initial: MemoryStorage) -> Self {
        let current = initial.fork();
        let log = Arc::clone(&self.log);
        RecordingStorage { initial, current, file, log, sync_takes: self.sync_takes }
    }

    /// The same with syncs that take so long, so that other threads' changes fall into them.
    #[must_use]
    pub fn with_slow_sync(self, sync_takes: Duration) -> Self {
        RecordingStorage { sync_takes, ..self }
    }

    /// Puts the caller's mark into the log, in order with everything else that happens.
    pub fn mark(&self, mark: u64) {
        self.push(&mut self.log.lock(), Entry::Mark(mark));
    }

    /// The log up to now, ready to be walked.
    pub fn replay(&self) -> Replay {
        let log = self.log.lock().clone();
        Replay { log, file: self.file, at: 0, applied: 0, durable: self.initial.fork() }
    }

    /// What was done so far to this file and to those beside it, each with the file's number.
    pub fn log(&self) -> Vec<(usize, Entry)> {
        self.log.lock().iter().map(|logged| (logged.file, logged.entry.clone())).collect()
    }

    /// Puts an entry of another recording's [`RecordingStorage::log`] at the end of this one's, with
    /// its change made.
    ///
    /// # Errors
    /// None but those of a log that no file could have.
    pub fn append(&self, entry: Entry) -> io::Result<()> {
        let mut log = self.log.lock();
        if let Entry::Change(change) = &entry {
            change.apply(&self.current, Fate::Kept)?;
        }
        self.push(&mut log, entry);
        Ok(())
    }

    /// The file as it was at first.
    pub fn initial(&self) -> &MemoryStorage {
        &self.initial
    }

    /// The file as it is now.
    pub fn current(&self) -> &MemoryStorage {
        &self.current
    }

    fn record(&self, change: Change) -> io::Result<()> {
        let mut log = self.log.lock();
        change.apply(&self.current, Fate::Kept)?;
        self.push(&mut log, Entry::Change(change));
        Ok(())
    }

    fn push(&self, log: &mut Vec<Logged>, entry: Entry) {
        log.push(Logged { file: self.file, entry });
    }
}

impl Storage for RecordingStorage {
    fn len(&self) -> io::Result<u64> {
        self.current.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.current.read_at(buf, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.record(Change::Write { offset, data: data.into() })
    }

    fn sync(&self) -> io::Result<()> {
        let covers = self.log.lock().len();
        if !self.sync_takes.is_zero() {
            std::thread::sleep(self.sync_takes);
        }
        self.push(&mut self.log.lock(), Entry::Sync { covers });
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.record(Change::SetLen(len))
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.record(Change::Punch(range))
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.record(Change::Zero(range))
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.record(Change::Allocate(range))
    }

    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.current.seek_data(offset)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.current.allocated()
    }
}

/// A walk along a log: at each place, what a crash there may leave.
#[derive(Debug)]
pub struct Replay {
    log: Vec<Logged>,
    /// The file that is of interest.
    file: usize,
    /// Entries walked past.
    at: usize,
    /// Entries that a sync covers; they are in `durable`.
    applied: usize,
    durable: MemoryStorage,
}

impl Replay {
    /// Walks past the next entry and returns it; `None` at the end.
    ///
    /// # Errors
    /// None but those of a log that no file could have.
    pub fn step(&mut self) -> io::Result<Option<Entry>> {
        let Some(Logged { file, entry }) = self.log.get(self.at).cloned() else { return Ok(None) };
        self.at += 1;
        if let Entry::Sync { covers } = entry
            && file == self.file
        {
            for change in self.changes(self.applied..covers) {
                change.apply(&self.durable, Fate::Kept)?;
            }
            self.applied = self.applied.max(covers);
        }
        Ok(Some(entry))
    }

    /// The next entry, without walking past it.
    pub fn peek(&self) -> Option<&Entry> {
        self.log.get(self.at).map(|logged| &logged.entry)
    }

    /// Entries walked past.
    pub fn position(&self) -> usize {
        self.at
    }

    /// The changes that a crash here may lose, in their order.
    pub fn pending(&self) -> Vec<&Change> {
        self.changes(self.applied..self.at)
    }

    /// The changes of the file among some entries.
    fn changes(&self, entries: Range<usize>) -> Vec<&Change> {
        let own = self.log.get(entries).unwrap_or_default().iter().filter(|l| l.file == self.file);
        own.filter_map(|logged| match &logged.entry {
            Entry::Change(change) => Some(change),
            Entry::Sync { .. } | Entry::Mark(_) => None,
        })
        .collect()
    }

    /// The file that a crash here leaves when `fate` befalls each of the [`Replay::pending`]
    /// changes, given by its number.
    ///
    /// # Errors
    /// None but those of a log that no file could have.
    pub fn crash(&self, mut fate: impl FnMut(usize) -> Fate) -> io::Result<MemoryStorage> {
        let file = self.durable.fork();
        for (n, change) in self.pending().into_iter().enumerate() {
            change.apply(&file, fate(n))?;
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walked(storage: &RecordingStorage) -> Replay {
        let mut replay = storage.replay();
        while replay.step().unwrap().is_some() {}
        replay
    }

    #[test]
    fn a_sync_makes_what_came_before_it_safe_and_nothing_else() {
        let storage = RecordingStorage::new(MemoryStorage::new(vec![0; 2048]));
        storage.write_at(&[1; 512], 0).unwrap();
        storage.sync().unwrap();
        storage.write_at(&[2; 512], 512).unwrap();
        let replay = walked(&storage);
        assert_eq!(replay.pending().len(), 1);
        let lost = replay.crash(|_| Fate::Lost).unwrap().contents();
        assert_eq!((lost[0], lost[512]), (1, 0));
        assert_eq!(replay.crash(|_| Fate::Kept).unwrap().contents(), storage.current().contents());
    }

    #[test]
    fn a_change_during_a_sync_is_not_covered_by_it() {
        let storage = RecordingStorage::new(MemoryStorage::new(vec![0; 2048]))
            .with_slow_sync(Duration::from_millis(200));
        std::thread::scope(|scope| {
            let syncing = scope.spawn(|| storage.sync());
            std::thread::sleep(Duration::from_millis(50));
            storage.write_at(&[1; 512], 0).unwrap();
            syncing.join().unwrap().unwrap();
        });
        assert_eq!(walked(&storage).pending().len(), 1);
    }

    #[test]
    fn a_sync_covers_its_own_file_only() {
        let first = RecordingStorage::new(MemoryStorage::new(vec![0; 512]));
        let second = first.beside(1, MemoryStorage::new(vec![0; 512]));
        first.write_at(&[1; 512], 0).unwrap();
        second.write_at(&[2; 512], 0).unwrap();
        first.sync().unwrap();
        let lost = |storage| walked(storage).crash(|_| Fate::Lost).unwrap().contents()[0];
        assert_eq!((lost(&first), lost(&second)), (1, 0));
        assert_eq!((walked(&first).position(), walked(&second).position()), (3, 3));
        assert_eq!((first.current().contents()[0], second.current().contents()[0]), (1, 2));
    }

    #[test]
    fn a_torn_write_keeps_whole_sectors() {
        let storage = RecordingStorage::new(MemoryStorage::new(vec![0; 2048]));
        storage.write_at(&[1; 1024], 256).unwrap();
        let file = walked(&storage).crash(|_| Fate::Torn(0b101)).unwrap().contents();
        let ones: Vec<usize> = (0..2048).filter(|&i| file[i] == 1).collect();
        assert_eq!(ones, (256..512).chain(1024..1280).collect::<Vec<_>>());
    }

    #[test]
    fn a_lost_growth_leaves_the_file_short() {
        let storage = RecordingStorage::new(MemoryStorage::new(vec![1; 512]));
        storage.set_len(4096).unwrap();
        storage.punch_hole(0..512).unwrap();
        let replay = walked(&storage);
        let file = replay.crash(|n| if n == 0 { Fate::Lost } else { Fate::Kept }).unwrap();
        assert_eq!(file.contents(), vec![0; 512]);
    }
}
