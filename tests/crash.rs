//! The crash search. Clients work on an image whose host file is recorded, with the recycler at
//! work beside them; then, for crash points all along the log, files are built as a crash may leave
//! them: of the changes that no sync covers none, all, all but one, one alone, random ones, and
//! each torn at 512 bytes. Every file must open, hold in every sector what the oracle allows, and
//! have no corruption. Some of them are judged by QEMU, some are opened for writing, written to,
//! closed, and must be clean then, without a leak.
//!
//! The search is what found that a freed cluster handed out before its unmapping is durable shows
//! another sector's data (in QEMU): the invariants in the crate's documentation are written from it.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod support;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use qcow2fs::image::{Beside, Image};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::{Change, Entry, Fate, MemoryStorage, RecordingStorage, Replay};
use support::made::Made;
use support::oracle::{After, Kind, Operation, Oracle, data};
use support::qemu::{self, DataFile, Shape};
use support::rng::Rng;
use support::{SECTOR, busy, for_seeds, open_read_only, scratch, verify, verify_clean};

/// Crash files are looked at for so long in one history, then the next one starts.
const SEARCH_TIME: Duration = Duration::from_secs(2);

/// Clients that work on one image whose file is recorded.
struct Clients {
    image: Arc<Image>,
    storage: Arc<RecordingStorage>,
    /// What each operation number is.
    operations: Mutex<HashMap<u64, Operation>>,
    next: AtomicU64,
    sectors: AtomicU64,
    may_resize: bool,
    /// The disk does not grow past so many sectors.
    most: u64,
    /// Sectors are dealt to the clients in pieces of so many.
    piece: u64,
    clients: u64,
}

impl Clients {
    /// Does one operation, with marks in the log where it begins and where it succeeds.
    fn act(&self, operation: Operation, act: impl FnOnce(u64) -> qcow2fs::Result<()>) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.operations.lock().insert(number, operation);
        self.storage.mark(number * 2);
        act(number).unwrap();
        self.storage.mark(number * 2 + 1);
    }

    fn run(&self, client: u64, mut rng: Rng) {
        for _ in 0..rng.within(5..80) {
            let sectors = self.own_sectors(client, &mut rng);
            let bytes = sectors.start * SECTOR..sectors.end * SECTOR;
            let operation = |kind| Operation { kind, sectors: sectors.clone() };
            let image = &self.image;
            match rng.within(0..100) {
                0..50 => self.act(operation(Kind::Write), |number| {
                    image.write(bytes.start, &data(number, sectors.clone()))
                }),
                50..70 => self.act(operation(Kind::Zero), |_| image.discard(bytes)),
                70..75 => self.act(operation(Kind::Zero), |_| image.write_zeroes(bytes)),
                75..78 => self.act(operation(Kind::Zero), |_| {
                    image.write(bytes.start, &vec![0; (bytes.end - bytes.start) as usize])
                }),
                78..81 => image.preallocate(bytes).unwrap(),
                81..90 => self.flush(),
                90..93 if self.may_resize => self.resize(&mut rng),
                93..96 => self.image.compact(|_| true).unwrap(),
                _ => thread::sleep(Duration::from_millis(rng.within(0..6))),
            }
        }
    }

    /// Consecutive sectors that belong to `client`; all of the disk does when there is only one.
    fn own_sectors(&self, client: u64, rng: &mut Rng) -> std::ops::Range<u64> {
        let sectors = self.sectors.load(Ordering::Relaxed);
        if self.clients == 1 {
            let start = rng.within(0..sectors);
            let longest = if rng.one_in(10) { sectors } else { 2 * self.piece };
            return start..(start + rng.within(1..longest + 1)).min(sectors);
        }
        let rounds = (sectors / (self.piece * self.clients)).max(1);
        let piece = rng.within(0..rounds) * self.clients + client;
        let start = piece * self.piece + rng.within(0..self.piece);
        let end = (piece + 1) * self.piece;
        start..if rng.one_in(2) { end } else { rng.within(start + 1..end + 1) }
    }

    fn resize(&self, rng: &mut Rng) {
        let old = self.sectors.load(Ordering::Relaxed);
        let new = rng.within(1..self.most + 1);
        let operation = Operation { kind: Kind::Resize(new), sectors: old.min(new)..old.max(new) };
        self.act(operation, |_| self.image.resize(new * SECTOR));
        self.sectors.store(new, Ordering::Relaxed);
    }

    fn flush(&self) {
        let everything = Operation { kind: Kind::Flush, sectors: 0..0 };
        self.act(everything, |_| self.image.flush());
    }
}

/// What a history left: its log, and what each marked operation was.
struct Recorded<'a> {
    made: &'a Made,
    storage: Arc<RecordingStorage>,
    /// The external data file.
    data: Option<Arc<RecordingStorage>>,
    operations: HashMap<u64, Operation>,
}

fn record<'a>(made: &'a Made, rng: &mut Rng) -> Recorded<'a> {
    let sync_takes = Duration::from_micros(*rng.pick(&[0, 0, 200, 2000]));
    let storage = Arc::new(RecordingStorage::new(made.file()).with_slow_sync(sync_takes));
    let data = made.data().map(|data| Arc::new(storage.beside(1, data)));
    let opened_data = data.clone().map(|data| data as Arc<dyn Storage>);
    let image = made.open_on(storage.clone(), opened_data, &busy(rng)).unwrap();
    let sectors = image.virtual_size() / SECTOR;
    let in_cluster = made.shape.cluster_size() / SECTOR;
    let in_subcluster = made.shape.subcluster_size() / SECTOR;
    let piece = *rng.pick(&[
        1,
        3,
        in_subcluster,
        3 * in_subcluster,
        in_cluster,
        2 * in_cluster,
        5 * in_cluster,
    ]);
    let clients = if sectors < piece * 3 || rng.one_in(3) { 1 } else { rng.within(1..4) };
    let clients = Clients {
        image: image.clone(),
        storage: storage.clone(),
        operations: Mutex::default(),
        next: AtomicU64::new(1),
        may_resize: clients == 1 && !(made.shape.version == 2 && made.has_snapshots()),
        sectors: AtomicU64::new(sectors),
        most: sectors * 2,
        piece,
        clients,
    };
    thread::scope(|scope| {
        for client in 0..clients.clients {
            let rng = Rng::new(rng.next());
            let clients = &clients;
            scope.spawn(move || clients.run(client, rng));
        }
    });
    if rng.one_in(2) {
        // The recycler cuts the file's end when allocation has paused.
        thread::sleep(Duration::from_millis(rng.within(0..700)));
    }
    let everything = Operation { kind: Kind::Flush, sectors: 0..0 };
    clients.act(everything, |_| image.close());
    Recorded { made, storage, data, operations: clients.operations.into_inner() }
}

/// One walk along a log, looking at what crashes leave.
struct Search<'a> {
    recorded: &'a Recorded<'a>,
    replay: Replay,
    /// The same walk for the external data file.
    data: Option<Replay>,
    oracle: Oracle,
    rng: Rng,
    directory: &'a Path,
    tally: &'a mut Tally,
}

#[derive(Default, Debug)]
struct Tally {
    points: u64,
    states: u64,
    judged_by_qemu: u64,
    recovered: u64,
}

impl Search<'_> {
    /// Looks at crash points all along the log.
    fn run(mut self) {
        // A sync makes much durable at once: the file just before has the most ways to be.
        let stride = self.rng.within(1..20);
        let mut next_point = self.rng.within(0..stride);
        let started = Instant::now();
        for position in 0.. {
            let due = position == next_point || self.syncs_next();
            if due {
                next_point = position + stride;
                // Every sync is looked at, however slow this machine is; the rest while time lasts.
                self.look(started.elapsed() < SEARCH_TIME);
            }
            self.data.as_mut().map(|data| data.step().unwrap());
            match self.replay.step().unwrap() {
                Some(Entry::Mark(mark)) => self.note(mark),
                Some(Entry::Change(_) | Entry::Sync { .. }) => {}
                None => break,
            }
        }
        self.look(true);
    }

    fn syncs_next(&self) -> bool {
        matches!(self.replay.peek(), Some(Entry::Sync { .. }))
    }

    fn note(&mut self, mark: u64) {
        let operation = &self.recorded.operations[&(mark / 2)];
        match mark % 2 {
            0 => self.oracle.begin(mark / 2, operation),
            _ => self.oracle.succeed(mark / 2, operation),
        }
    }

    /// Looks at the files that a crash at this point may leave.
    fn look(&mut self, thoroughly: bool) {
        self.tally.points += 1;
        let pending = self.pending().len();
        self.examine("all", |_| Fate::Kept);
        if pending == 0 {
            return;
        }
        self.examine("none", |_| Fate::Lost);
        if !thoroughly {
            return;
        }
        let singles: Vec<usize> = match pending {
            0..=12 => (0..pending).collect(),
            _ => (0..12).map(|_| self.rng.within(0..pending as u64) as usize).collect(),
        };
        for single in singles {
            let alone = |n| if n == single { Fate::Kept } else { Fate::Lost };
            self.examine(&format!("{single} alone"), alone);
            let all_but = |n| if n == single { Fate::Lost } else { Fate::Kept };
            self.examine(&format!("all but {single}"), all_but);
            let mask = self.rng.next();
            let torn = |n| if n == single { Fate::Torn(mask) } else { Fate::Kept };
            self.examine(&format!("{single} torn by {mask:#x}"), torn);
        }
        for _ in 0..8 {
            let mut rng = Rng::new(self.rng.next());
            let fates: Vec<Fate> = (0..pending).map(|_| random_fate(&mut rng)).collect();
            self.examine(&format!("{fates:?}"), |n| fates[n]);
        }
    }

    /// The changes that a crash here may lose, those of the image file first.
    fn pending(&self) -> Vec<&Change> {
        let data = self.data.iter().flat_map(|data| data.pending());
        self.replay.pending().into_iter().chain(data).collect()
    }

    fn examine(&mut self, what: &str, fate: impl Fn(usize) -> Fate) {
        let own = self.replay.pending().len();
        let crashed = Crashed {
            file: Arc::new(self.replay.crash(&fate).unwrap()),
            data: self.data.as_ref().map(|data| Arc::new(data.crash(|n| fate(own + n)).unwrap())),
        };
        let file = &crashed.file;
        self.tally.states += 1;
        if let Err(complaint) = self.complaint(&crashed) {
            let position = self.replay.position();
            let pending = self.pending();
            let list: Vec<String> = pending
                .iter()
                .enumerate()
                .map(|(n, c)| format!("{n} {:?} {c:.0?}", fate(n)))
                .collect();
            std::fs::write("/dev/shm/qcow2fs-crash-state.qcow2", file.contents()).unwrap();
            panic!(
                "a crash at entry {position} that keeps {what} of {} changes:\n{complaint}\n{}",
                pending.len(),
                list.join("\n")
            );
        }
    }

    /// What is wrong with the file that a crash left.
    fn complaint(&mut self, crashed: &Crashed) -> Result<(), String> {
        let made = self.recorded.made;
        let file = &crashed.file;
        verify(&**file)?;
        let image = open_read_only(file.clone(), crashed.beside(made))
            .map_err(|e| format!("opening it: {e}"))?;
        self.oracle.check_size(image.virtual_size() / SECTOR)?;
        let mut disk = vec![0xee; image.virtual_size() as usize];
        image.read(0, &mut disk).map_err(|e| format!("reading it: {e}"))?;
        self.oracle.check(&disk, 0, After::Crash)?;
        if let Some(data) = crashed.data.as_ref().filter(|_| made.shape.data_file == DataFile::Raw)
        {
            let mut raw = vec![0xee; disk.len()];
            data.read_at(&mut raw, 0).unwrap();
            self.oracle
                .check(&raw, 0, After::Crash)
                .map_err(|e| format!("in the raw data file by itself, {e}"))?;
        }
        if self.tally.states.is_multiple_of(400) {
            self.tally.judged_by_qemu += 1;
            let path = self.directory.join("crashed.qcow2");
            std::fs::write(&path, file.contents()).unwrap();
            if let Some(data) = &crashed.data {
                // By the name that the header has.
                std::fs::write(made.data_path().unwrap(), data.contents()).unwrap();
            }
            qemu::check_allowing_leaks(&path)?;
            if qemu::contents(&path, None) != disk {
                return Err("QEMU reads something else".into());
            }
            made.assert_snapshots(&path)?;
        }
        if self.tally.states.is_multiple_of(20) {
            self.tally.recovered += 1;
            recover(made, crashed, &disk, &mut self.rng)?;
        }
        Ok(())
    }
}

fn random_fate(rng: &mut Rng) -> Fate {
    match rng.within(0..5) {
        0 | 1 => Fate::Kept,
        2 | 3 => Fate::Lost,
        _ => Fate::Torn(rng.next()),
    }
}

/// The files that a crash left.
struct Crashed {
    file: Arc<MemoryStorage>,
    data: Option<Arc<MemoryStorage>>,
}

impl Crashed {
    fn beside(&self, made: &Made) -> Beside {
        made.beside(self.data.clone().map(|data| data as Arc<dyn Storage>))
    }
}

/// Works on the files that a crash left, and closes them: all must be sound then, without a leak
/// where the search for leaks had its time.
fn recover(made: &Made, crashed: &Crashed, disk: &[u8], rng: &mut Rng) -> Result<(), String> {
    let mut expected = disk.to_vec();
    let crashed = Crashed {
        file: Arc::new(crashed.file.fork()),
        data: crashed.data.as_ref().map(|data| Arc::new(data.fork())),
    };
    let storage = crashed.file.clone();
    let image = Image::open_with(storage.clone(), &busy(rng), crashed.beside(made))
        .map_err(|e| format!("recovering: {e}"))?;
    for _ in 0..6 {
        let range = rng.range(disk.len() as u64, 4096, &[SECTOR]);
        let bytes = range.start as usize..range.end as usize;
        let result = match rng.one_in(3) {
            true => {
                expected[bytes].fill(0);
                image.discard(range)
            }
            false => {
                let fill = rng.next() as u8;
                expected[bytes.clone()].fill(fill);
                image.write(range.start, &expected[bytes])
            }
        };
        result.map_err(|e| format!("writing after recovery: {e}"))?;
    }
    // Those who close at once leave the leaks to the next open.
    let waits = rng.one_in(2);
    while waits && image.status().unwrap().searching_leaks {
        thread::sleep(Duration::from_micros(200));
    }
    image.close().map_err(|e| format!("closing after recovery: {e}"))?;
    // A count of a shared cluster that is too high, but not altogether wrong, is not looked for.
    let verify = if waits && !made.may_share { verify_clean } else { verify };
    verify(&*storage).map_err(|e| format!("after recovery and close: {e}"))?;
    let image = open_read_only(storage, crashed.beside(made))
        .map_err(|e| format!("opening it again: {e}"))?;
    let mut found = vec![0xee; disk.len()];
    image.read(0, &mut found).map_err(|e| format!("reading it again: {e}"))?;
    if let Some(difference) = support::difference(&found, &expected) {
        return Err(format!("after recovery we read {difference}"));
    }
    match crashed.data {
        Some(data) => made.assert_raw_data(&data.contents(), &expected),
        None => Ok(()),
    }
}

/// A shape whose file is small, so that thousands of crash states a second can be looked at.
fn small_shape(rng: &mut Rng) -> Shape {
    let mut shape = Shape::random(rng, 256 << 10);
    if shape.cluster_bits > 14 {
        shape.extended_l2 = false;
        shape.cluster_bits = *rng.pick(&[9, 9, 12, 13]);
        shape.size = rng.within(1..500) * SECTOR;
    }
    shape
}

/// The same with subclusters: of one sector, mostly.
fn shape_with_subclusters(rng: &mut Rng) -> Shape {
    let mut shape = Shape::random(rng, 256 << 10);
    shape.version = 3;
    shape.extended_l2 = true;
    shape.data_file = DataFile::None;
    shape.cluster_bits = *rng.pick(&[14, 14, 14, 16]);
    shape.size = rng.within(1..(6 << shape.cluster_bits) / SECTOR) * SECTOR;
    shape
}

/// Every `backed`-th image or so has a backing file.
fn search(test: &'static str, seconds: u64, backed: u64, shape: impl Fn(&mut Rng) -> Shape) {
    let mut tally = Tally::default();
    for_seeds(test, seconds, |seed| {
        let directory = scratch();
        let mut rng = Rng::new(seed);
        let shape = shape(&mut rng).encrypted_one_in(5, &mut rng);
        println!("{seed}: {shape} {} bytes, {}", shape.size, shape.encryption);
        let backed = rng.one_in(backed);
        let made = Made::furnished_over(backed, shape, directory.path(), &mut rng);
        let recorded = record(&made, &mut rng);
        let search = Search {
            replay: recorded.storage.replay(),
            data: recorded.data.as_ref().map(|data| data.replay()),
            oracle: Oracle::new(&made.contents, made.shape.size / SECTOR * 2),
            rng,
            directory: directory.path(),
            tally: &mut tally,
            recorded: &recorded,
        };
        search.run();
    });
    println!("crash search: {tally:?}");
}

#[test]
fn every_crash_leaves_a_sound_image_with_old_or_new_data() {
    search("every_crash_leaves_a_sound_image_with_old_or_new_data", 40, 3, small_shape);
}

#[test]
fn every_crash_leaves_subclusters_with_old_or_new_data() {
    let test = "every_crash_leaves_subclusters_with_old_or_new_data";
    search(test, 20, 2, shape_with_subclusters);
}
