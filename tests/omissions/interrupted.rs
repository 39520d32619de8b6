//! Histories in which somebody acts at one moment of somebody else's work, and others that random
//! actions do not come to.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use qcow2fs::check::check;
use qcow2fs::image::{Beside, CompactAfter, Image, Options};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::{self, Entry, Fate, MemoryStorage, RecordingStorage};

use crate::crash_search::history::{MOVES, Recorded, Snapshots, Step, whole_disk};
use crate::crash_search::search::{Search, Tally};
use crate::support::made::Made;
use crate::support::oracle::{Kind, Operation, data};
use crate::support::qemu::{self, Shape};
use crate::support::rng::Rng;
use crate::support::{SECTOR, open_read_only, scratch};

/// Whoever interrupts and waits for what the interrupted one holds is let wait after so long.
const PATIENCE: Duration = Duration::from_millis(30);

/// What a storage is asked to do, as far as it can be interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Write,
    Sync,
    Punch,
}

type Act = Box<dyn FnOnce() + Send>;

/// A recorded file; before one of its operations somebody else acts.
struct Interrupting {
    inner: Arc<RecordingStorage>,
    /// What comes before how many more operations of which kinds.
    next: Mutex<Option<(Vec<At>, u64, Act)>>,
    /// Who acts, or has, and how long the recording was when that began.
    acting: Mutex<Option<(usize, JoinHandle<()>)>>,
}

impl Interrupting {
    fn new(file: MemoryStorage) -> Arc<Self> {
        Arc::new(Interrupting {
            inner: Arc::new(RecordingStorage::new(file)),
            next: Mutex::default(),
            acting: Mutex::default(),
        })
    }

    /// Lets `act` happen before operation `number` of `kinds` from now.
    fn interrupt(&self, kinds: &[At], number: u64, act: impl FnOnce() + Send + 'static) {
        *self.next.lock() = Some((kinds.to_vec(), number, Box::new(act)));
    }

    /// Waits for what was let happen; at which entry of the recording it did, if it did.
    fn happened(&self) -> Option<usize> {
        *self.next.lock() = None;
        let (entry, acting) = self.acting.lock().take()?;
        acting.join().unwrap();
        Some(entry)
    }

    fn before(&self, at: At) {
        let act = {
            let mut next = self.next.lock();
            match &mut *next {
                Some((kinds, 0, _)) if kinds.contains(&at) => next.take().map(|(_, _, act)| act),
                Some((kinds, left, _)) if kinds.contains(&at) => {
                    *left -= 1;
                    None
                }
                _ => None,
            }
        };
        let Some(act) = act else { return };
        let (over, is_over) = mpsc::channel();
        let entry = self.inner.log().len();
        let acting = thread::spawn(move || {
            act();
            let _nobody_waits = over.send(());
        });
        *self.acting.lock() = Some((entry, acting));
        let _or_it_waits_for_us = is_over.recv_timeout(PATIENCE);
    }
}

impl testing::Layer for Interrupting {
    fn below(&self) -> &dyn Storage {
        &*self.inner
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.before(At::Write);
        self.inner.write_at(data, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.before(At::Sync);
        self.inner.sync()
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.before(At::Punch);
        self.inner.punch_hole(range)
    }
}

/// A client whose steps are marked in the recording.
#[derive(Clone)]
struct Client {
    image: Arc<Image>,
    file: Arc<Interrupting>,
    steps: Arc<Mutex<HashMap<u64, Step>>>,
}

impl Client {
    fn open(made: &Made, file: MemoryStorage, keep_erased: u64) -> Self {
        let file = Interrupting::new(file);
        let options = Options {
            writable: true,
            keep_erased,
            flush_after: Duration::from_secs(600),
            compact_after: CompactAfter::Off,
            threads: false,
            ..Options::default()
        };
        let image = made.open_on(file.clone(), None, &options).unwrap();
        Client { image, file, steps: Arc::default() }
    }

    fn act(
        &self,
        kind: Kind,
        sectors: Range<u64>,
        act: impl FnOnce(&Image, u64, Range<u64>) -> qcow2fs::Result<()>,
    ) {
        let number = {
            let mut steps = self.steps.lock();
            let number = steps.len() as u64 + 1;
            steps.insert(number, Step::Disk(Operation { kind, sectors: sectors.clone() }));
            number
        };
        self.file.inner.mark(number * 2);
        act(&self.image, number, sectors.start * SECTOR..sectors.end * SECTOR).unwrap();
        self.file.inner.mark(number * 2 + 1);
    }

    fn write(&self, sectors: Range<u64>) {
        self.act(Kind::Write, sectors.clone(), |image, number, bytes| {
            image.write(bytes.start, &data(number, sectors))
        });
    }

    fn discard(&self, sectors: Range<u64>) {
        self.act(Kind::Zero, sectors, |image, _, bytes| image.discard(bytes));
    }

    fn flush(&self) {
        self.act(Kind::Flush, 0..0, |image, _, _| image.flush());
    }

    /// Has the recycler do all there is to do at `now`.
    fn recycle(&self, now: Instant) {
        while self.image.recycle(now).unwrap() {}
    }

    /// Looks at about `states` files along the recording, from entry `first` on.
    fn search(
        &self,
        made: &Made,
        tally: &mut Tally,
        first: usize,
        states: u64,
    ) -> Result<(), String> {
        self.search_with(made, &Vec::new(), tally, first, states)
    }

    /// The same for an image that has these snapshots.
    fn search_with(
        &self,
        made: &Made,
        snapshots: &Snapshots,
        tally: &mut Tally,
        first: usize,
        states: u64,
    ) -> Result<(), String> {
        let recorded = Recorded {
            image: self.file.inner.clone(),
            data: None,
            steps: self.steps.lock().clone(),
            struck: 0,
        };
        let directory = scratch();
        let rng = Rng::new(1);
        let search = Search::new(
            made,
            &recorded,
            &made.contents,
            snapshots,
            MOVES,
            rng,
            directory.path(),
            tally,
        );
        search
            .starting_at(first)
            .without_recovery()
            .run(states)
            .map_err(|finding| format!("{}\n{}", finding.complaint, finding.fates))
    }
}

/// An image whose refcount blocks QEMU has put in the midst of what they count, where they take their
/// own counts along when they are let go of, and which count nothing but data.
fn made_by_qemu(directory: &Path) -> Made {
    let mut made = Made::empty(Shape::new(9, 64, 300 * SECTOR), directory);
    let tables = (0..5).map(|n| format!("write -P 7 {} 512", n * 64 * SECTOR));
    qemu::io(&made.path, &tables.collect::<Vec<_>>());
    qemu::io(&made.path, &[format!("write -P 8 0 {}", 300 * SECTOR)]);
    made.contents = qemu::contents(&made.path, None);
    made
}

/// The image of [`made_by_qemu`] with its refcount blocks behind all else: rebuilt, which puts them there,
/// and the table put back to where it was.
fn with_blocks_last(made: &Made) -> MemoryStorage {
    const TABLE: usize = 48;
    let file = Arc::new(made.file());
    crate::mark_dirty(&file);
    let options = Options { writable: true, threads: false, ..Options::default() };
    made.open_on(file.clone(), None, &options).unwrap().close().unwrap();
    let mut bytes = file.contents();
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let (old, new) = (word(&bytes, TABLE) as usize, 512);
    let set_count = |bytes: &mut [u8], cluster: usize, count: u64| {
        let block = word(bytes, new + cluster / 64 * 8) as usize + cluster % 64 * 8;
        bytes[block..block + 8].copy_from_slice(&count.to_be_bytes());
    };
    bytes.copy_within(old..old + 512, new);
    bytes[TABLE..TABLE + 8].copy_from_slice(&(new as u64).to_be_bytes());
    set_count(&mut bytes, 1, 1);
    set_count(&mut bytes, old / 512, 0);
    let file = MemoryStorage::new(bytes);
    let report = check(&file).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    file
}

/// Where the tables of an image lie that is compacted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Before all data: what describes the end of the file describes nothing but data.
    TablesFirst,
    /// Among the data.
    TablesAmongData,
    /// Before all data, but for the refcount blocks, which lie behind it, as rebuilding leaves them:
    /// several move in one flush, to places that one of them counts.
    BlocksLast,
}

/// What somebody else does in the midst of compaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Other {
    Writes,
    Flushes,
    /// Has the recycler free what it may, and fill the pool.
    Frees,
    /// Has the recycler cut the end of the file as well.
    Cuts,
}

/// At one moment of compaction, each in turn, somebody else acts.
pub fn compaction(layout: Layout, other: Other, tally: &mut Tally) -> Result<(), String> {
    let directory = scratch();
    let made = match layout {
        Layout::TablesFirst | Layout::BlocksLast => made_by_qemu(directory.path()),
        Layout::TablesAmongData => {
            let shape = Shape::new(9, 64, 300 * SECTOR);
            Made::empty(Shape { preallocation: "full", ..shape }, directory.path())
        }
    };
    let before = match layout {
        Layout::BlocksLast => with_blocks_last(&made),
        _ => made.file(),
    };
    for number in 0.. {
        let client = Client::open(&made, before.fork(), 0);
        let now = Instant::now();
        match (layout, other) {
            (Layout::TablesAmongData, Other::Flushes) => {
                // So that the last table is not empty when it moves.
                client.write(280..290);
                client.discard(30..280);
            }
            (Layout::BlocksLast, _) => {
                // Room in what the second block counts, for all that is left behind. Something is
                // left of each table: one that went would leave a place more.
                [70..120, 180..190, 193..250, 257..300].into_iter().for_each(|s| client.discard(s));
            }
            _ => client.discard(30..300),
        }
        client.flush();
        client.recycle(now);
        let first = client.file.inner.log().len();
        let by = client.clone();
        client.file.interrupt(&[At::Write, At::Sync], number, move || match other {
            Other::Writes => by.write(30..280),
            Other::Flushes => by.flush(),
            Other::Frees => by.recycle(now),
            Other::Cuts => by.recycle(now + Duration::from_secs(500)),
        });
        client.image.compact(|_| true).unwrap();
        let happened = client.file.happened();
        client.flush();
        client.image.close().unwrap();
        // What comes before is looked at where it happens later, or not at all.
        client.search(&made, tally, happened.unwrap_or(first), 300)?;
        if happened.is_none() {
            break;
        }
    }
    Ok(())
}

/// Somebody asks for compaction while the recycler has begun with it, and takes a step between what the
/// two do.
pub fn compaction_by_two(tally: &mut Tally) -> Result<(), String> {
    let directory = scratch();
    let mut made = Made::empty(Shape::new(9, 64, 300 * SECTOR), directory.path());
    let now = Instant::now();
    // A snapshot with tables of its own lies behind what is free.
    let (file, snapshots) = {
        let client = Client::open(&made, made.file(), 0);
        client.write(0..128);
        client.write(256..300);
        client.discard(0..128);
        client.image.take_snapshot(b"one").unwrap();
        let snapshot = whole_disk(&client.image).unwrap();
        client.write(256..258);
        client.flush();
        client.recycle(now);
        made.contents = whole_disk(&client.image).unwrap();
        client.image.close().unwrap();
        (client.file.inner.current().fork(), vec![("one".to_string(), snapshot)])
    };
    let client = Client::open(&made, file, 0);
    let later = now + Duration::from_secs(100);
    let is_compacting = |client: &Client| client.image.status().unwrap().compaction.running;
    client.recycle(now);
    client.image.ask_to_compact(true).unwrap();
    while !is_compacting(&client) && client.image.recycle(later).unwrap() {}
    assert!(is_compacting(&client), "the recycler has not begun");
    // Whoever compacts flushes first, twice; meanwhile something is written that the second one syncs,
    // and while it does the recycler moves the snapshot.
    client.write(256..257);
    let by = client.clone();
    client.file.interrupt(&[At::Sync], 0, move || {
        by.write(256..257);
        let file = by.file.clone();
        file.interrupt(&[At::Sync], 0, move || {
            let has_moved = || by.image.status().unwrap().compaction.moved.0 > 0;
            while !has_moved() && by.image.recycle(later).unwrap() {}
        });
    });
    client.image.compact(|_| true).map_err(|e| e.to_string())?;
    assert!(client.file.happened().is_some(), "nobody was at work in between");
    client.image.close().map_err(|e| e.to_string())?;
    let report = check(client.file.inner.current()).unwrap();
    if (report.corruptions, report.leaks) != (0, 0) {
        return Err(format!("{report:?}"));
    }
    client.search_with(&made, &snapshots, tally, 0, 400)
}

/// What the pool hands out before a flush is not counted yet.
pub fn pool(tally: &mut Tally) -> Result<(), String> {
    let directory = scratch();
    let made = Made::empty(Shape::new(9, 16, 300 * SECTOR), directory.path());
    let client = Client::open(&made, made.file(), 16 * 512);
    client.write(200..201);
    client.flush();
    client.recycle(Instant::now());
    client.write(210..216);
    client.flush();
    client.image.close().unwrap();
    client.search(&made, tally, 0, 400)
}

/// A bitmap that records nothing yet, of a disk that can be written in place.
pub fn bitmap(tally: &mut Tally) -> Result<(), String> {
    let directory = scratch();
    let mut made = made_by_qemu(directory.path());
    made.add_bitmap();
    let client = Client::open(&made, made.file(), 0);
    client.write(10..13);
    client.flush();
    client.image.close().unwrap();
    client.search(&made, tally, 0, 400)
}

/// Free clusters hold old data, as QEMU leaves it. Between the count of those that are to be in the
/// pool and their erasure a flush makes the count durable.
pub fn pool_of_old_data(tally: &mut Tally) -> Result<(), String> {
    let directory = scratch();
    let made = Made::empty(Shape::new(9, 16, 300 * SECTOR), directory.path());
    let file = made.file();
    let with_old_data = {
        let client = Client::open(&made, file, 0);
        client.write(0..100);
        client.flush();
        let full = client.file.inner.current().contents();
        client.discard(10..90);
        client.image.close().unwrap();
        let left = client.file.inner.current().fork();
        let mut bytes = left.contents();
        let old = full.chunks_exact(512).zip(bytes.chunks_exact_mut(512));
        old.filter(|(_, now)| now.iter().all(|b| *b == 0))
            .for_each(|(old, now)| now.copy_from_slice(old));
        MemoryStorage::new(bytes)
    };
    let disk = open_read_only(Arc::new(with_old_data.fork()), Beside::default()).unwrap();
    let mut contents = vec![0; made.contents.len()];
    disk.read(0, &mut contents).unwrap();
    let mut made = made;
    made.contents = contents;
    let client = Client::open(&made, with_old_data, 16 * 512);
    let now = Instant::now();
    client.write(200..201);
    client.flush();
    let other = client.clone();
    client.file.interrupt(&[At::Punch], 0, move || other.flush());
    client.recycle(now);
    assert!(client.file.happened().is_some(), "the pool was not filled");
    client.flush();
    client.write(210..216);
    client.flush();
    client.image.close().unwrap();
    client.search(&made, tally, 0, 400)
}

/// Autoclear bits that this program does not know say that something else in the file is in step with
/// the disk: as soon as the disk has changed they must be gone.
pub fn autoclear(tally: &mut Tally) -> Result<(), String> {
    const AUTOCLEAR: u64 = 88;
    let directory = scratch();
    let made = Made::empty(Shape::new(9, 16, 300 * SECTOR), directory.path());
    let file = made.file();
    file.write_at(&[0x40], AUTOCLEAR).unwrap();
    let client = Client::open(&made, file, 0);
    client.write(0..3);
    client.flush();
    client.image.close().unwrap();
    let mut replay = client.file.inner.replay();
    loop {
        for kept in 0..=replay.pending().len() {
            tally.states += 1;
            let fate = |n| if n + 1 == kept { Fate::Kept } else { Fate::Lost };
            let crashed = replay.crash(fate).unwrap();
            let mut bit = [0];
            crashed.read_at(&mut bit, AUTOCLEAR).unwrap();
            let kept_change = replay.pending().get(kept.wrapping_sub(1)).map(|c| c.range());
            let is_other = kept_change.is_some_and(|range| !range.contains(&AUTOCLEAR));
            if bit != [0] && is_other {
                return Err("something has changed, and the autoclear bit is still set".into());
            }
        }
        if let None | Some(Entry::Mark(3)) = replay.step().unwrap() {
            return Ok(());
        }
    }
}
