//! Crashes while snapshots are taken, deleted and applied. The host file is recorded; at points all
//! along the log files are built as a crash may leave them. Each must open, have no corruption but
//! COPIED flags that are missing, hold the snapshots of before or after what was under way, each
//! with its content, and the disk as it may be. Some are opened for writing: when the search for
//! leaks is over nothing at all may be wrong with them.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use qcow2fs::check::check;
use qcow2fs::image::{Image, Options};
use qcow2fs::storage::testing::{Change, Entry, Fate, MemoryStorage, RecordingStorage, Replay};

use crate::model::{small_shape, whole_disk, whole_view};
use crate::support::made::Made;
use crate::support::oracle::{After, Kind, Operation, Oracle, data};
use crate::support::rng::Rng;
use crate::support::{
    SECTOR, busy, difference, for_seeds, open_read_only, qemu, scratch, verify_clean,
};

/// Crash files are looked at for so long in one history, then the next one starts.
const SEARCH_TIME: Duration = Duration::from_secs(3);

type Snapshots = Vec<(String, Vec<u8>)>;

/// What one marked step did.
enum Step {
    Disk(Operation),
    /// The snapshots from then on.
    Snapshots(Snapshots),
    /// The disk from then on.
    Apply(Vec<u8>),
}

fn record(made: &Made, rng: &mut Rng) -> (Arc<RecordingStorage>, Vec<Step>) {
    let storage = Arc::new(RecordingStorage::new(made.file()));
    let image = made.open_on(storage.clone(), None, &busy(rng)).unwrap();
    let sectors = image.virtual_size() / SECTOR;
    let mut steps = Vec::new();
    let mut snapshots = made.snapshots().to_vec();
    for _ in 0..rng.within(20..90) {
        let number = steps.len() as u64;
        let start = rng.within(0..sectors);
        let end = (start + rng.within(1..40)).min(sectors);
        let bytes = start * SECTOR..end * SECTOR;
        let operation = |kind| Step::Disk(Operation { kind, sectors: start..end });
        storage.mark(number * 2);
        let step = match rng.within(0..100) {
            0..50 => {
                // Operation numbers of the oracle begin with 1.
                image.write(bytes.start, &data(number + 1, start..end)).unwrap();
                operation(Kind::Write)
            }
            50..62 => {
                image.discard(bytes).unwrap();
                operation(Kind::Zero)
            }
            62..66 => {
                image.flush().unwrap();
                Step::Disk(Operation { kind: Kind::Flush, sectors: 0..0 })
            }
            66..80 => {
                let name = format!("ours{number}");
                if image.take_snapshot(name.as_bytes()).is_ok() {
                    snapshots.push((name, whole_disk(&image)));
                }
                Step::Snapshots(snapshots.clone())
            }
            80..94 => {
                if !snapshots.is_empty() {
                    let gone = rng.within(0..snapshots.len() as u64) as usize;
                    image.delete_snapshot(snapshots.remove(gone).0.as_bytes()).unwrap();
                }
                Step::Snapshots(snapshots.clone())
            }
            _ => {
                let applied = rng.within(0..snapshots.len().max(1) as u64) as usize;
                let applied = snapshots.get(applied).map(|(name, _)| name.as_bytes());
                match applied.map(|name| image.apply_snapshot(name)) {
                    Some(Ok(())) => Step::Apply(whole_disk(&image)),
                    // There is none, or refcounts are too narrow.
                    None | Some(Err(_)) => {
                        image.flush().unwrap();
                        Step::Disk(Operation { kind: Kind::Flush, sectors: 0..0 })
                    }
                }
            }
        };
        storage.mark(number * 2 + 1);
        steps.push(step);
    }
    storage.mark(steps.len() as u64 * 2);
    image.close().unwrap();
    (storage, steps)
}

/// What is allowed at a point of the log.
struct Search<'a> {
    made: &'a Made,
    steps: &'a [Step],
    replay: Replay,
    disk: Oracle,
    /// The disk that is being applied.
    applying: Option<Vec<u8>>,
    before: Snapshots,
    /// The snapshots after what is under way.
    after: Option<Snapshots>,
    rng: Rng,
    tally: &'a mut Tally,
}

#[derive(Debug, Default)]
struct Tally {
    states: u64,
    missing_flags: u64,
    leaks: u64,
    mended: u64,
    judged_by_qemu: u64,
}

impl Search<'_> {
    fn run(mut self) {
        let stride = self.rng.within(1..12);
        let mut next = self.rng.within(0..stride);
        let started = Instant::now();
        for position in 0.. {
            let syncs = matches!(self.replay.peek(), Some(Entry::Sync { .. }));
            let changing = self.after.is_some() || self.applying.is_some();
            if position >= next || syncs || changing {
                next = position + stride;
                self.look(started.elapsed() < SEARCH_TIME);
            }
            match self.replay.step().unwrap() {
                Some(Entry::Mark(mark)) => self.note(mark),
                Some(_) => {}
                None => break,
            }
        }
        self.look(true);
    }

    fn note(&mut self, mark: u64) {
        let number = mark / 2 + 1;
        match (self.steps.get(mark as usize / 2), mark % 2) {
            (Some(Step::Disk(operation)), 0) => self.disk.begin(number, operation),
            (Some(Step::Disk(operation)), _) => self.disk.succeed(number, operation),
            (Some(Step::Snapshots(after)), 0) => self.after = Some(after.clone()),
            (Some(Step::Snapshots(after)), _) => {
                self.before = after.clone();
                self.after = None;
            }
            (Some(Step::Apply(disk)), 0) => self.applying = Some(disk.clone()),
            (Some(Step::Apply(disk)), _) => {
                self.disk = Oracle::new(disk, disk.len() as u64 / SECTOR);
                self.applying = None;
            }
            (None, _) => {}
        }
    }

    fn look(&mut self, thoroughly: bool) {
        let pending = self.replay.pending().len();
        self.examine("all", |_| Fate::Kept);
        if pending == 0 {
            return;
        }
        self.examine("none", |_| Fate::Lost);
        if !thoroughly {
            return;
        }
        for _ in 0..3 {
            let single = self.rng.within(0..pending as u64) as usize;
            let only = |n| if n == single { Fate::Kept } else { Fate::Lost };
            self.examine(&format!("only {single}"), only);
            let all_but = |n| if n == single { Fate::Lost } else { Fate::Kept };
            self.examine(&format!("all but {single}"), all_but);
            let mut rng = Rng::new(self.rng.next());
            let fates: Vec<Fate> = (0..pending)
                .map(|_| match rng.within(0..5) {
                    0 | 1 => Fate::Kept,
                    2 | 3 => Fate::Lost,
                    _ => Fate::Torn(rng.next()),
                })
                .collect();
            self.examine(&format!("{fates:?}"), |n| fates[n]);
        }
    }

    fn examine(&mut self, what: &str, fate: impl Fn(usize) -> Fate) {
        let file = Arc::new(self.replay.crash(&fate).unwrap());
        self.tally.states += 1;
        if let Err(complaint) = self.complaint(&file) {
            let pending: Vec<String> =
                self.replay.pending().iter().map(|change| describe(change)).collect();
            std::fs::write("/dev/shm/qcow2fs-snapshot-crash.qcow2", file.contents()).unwrap();
            panic!(
                "a crash at entry {} that keeps {what}:\n{complaint}\n{}",
                self.replay.position(),
                pending.join("\n")
            );
        }
    }

    fn complaint(&mut self, file: &Arc<MemoryStorage>) -> Result<(), String> {
        let report = check(&**file).map_err(|e| format!("checking it: {e}"))?;
        if report.corruptions > report.missing_flags {
            return Err(report.findings.join("\n"));
        }
        self.tally.missing_flags += u64::from(report.missing_flags > 0);
        self.tally.leaks += u64::from(report.leaks > 0);
        let image = open_read_only(file.clone(), self.made.beside(None))
            .map_err(|e| format!("opening it: {e}"))?;
        let disk = whole_disk(&image);
        if self.applying.as_ref() != Some(&disk) {
            self.disk.check_size(disk.len() as u64 / SECTOR)?;
            self.disk.check(&disk, 0, After::Crash)?;
        }
        self.compare_snapshots(&image)?;
        if self.tally.states.is_multiple_of(30) {
            self.tally.mended += 1;
            self.mend(file, &disk)?;
        }
        if self.tally.states.is_multiple_of(500) {
            self.tally.judged_by_qemu += 1;
            let directory = scratch();
            let path = directory.path().join("crashed.qcow2");
            std::fs::write(&path, file.contents()).unwrap();
            // QEMU mends missing flags as it mends leaks: nothing worse is there.
            qemu::repair_leaks(&path);
            qemu::check_allowing_leaks(&path)?;
        }
        Ok(())
    }

    fn compare_snapshots(&self, image: &Image) -> Result<(), String> {
        let infos = image.snapshots().map_err(|e| format!("listing snapshots: {e}"))?;
        let names: Vec<_> = infos.iter().map(|info| info.name.as_str()).collect();
        let is = |expected: &&Snapshots| {
            let mut expected: Vec<_> = expected.iter().map(|(name, _)| name.as_str()).collect();
            let mut names = names.clone();
            expected.sort();
            names.sort();
            names == expected
        };
        let expected = [Some(&self.before), self.after.as_ref()].into_iter().flatten().find(is);
        let expected = expected.ok_or_else(|| format!("the snapshots are {names:?}"))?;
        for (name, content) in expected {
            let view = image.open_snapshot(name.as_bytes()).map_err(|e| e.to_string())?;
            if let Some(difference) = difference(&whole_view(&view), content) {
                return Err(format!("snapshot {name}: {difference}"));
            }
        }
        Ok(())
    }

    /// Opened for writing, all that is wrong is found and mended in the background.
    fn mend(&mut self, file: &MemoryStorage, disk: &[u8]) -> Result<(), String> {
        let storage = Arc::new(file.fork());
        let options = Options { keep_erased: 0, ..busy(&mut self.rng) };
        let image =
            self.made.open_on(storage.clone(), None, &options).map_err(|e| e.to_string())?;
        while image.status().unwrap().searching_leaks {
            thread::sleep(Duration::from_micros(200));
        }
        self.compare_snapshots(&image)?;
        image.close().map_err(|e| format!("closing it: {e}"))?;
        verify_clean(&*storage).map_err(|e| format!("after mending: {e}"))?;
        let image = open_read_only(storage, self.made.beside(None)).map_err(|e| e.to_string())?;
        self.compare_snapshots(&image)?;
        match difference(&whole_disk(&image), disk) {
            Some(difference) => Err(format!("after mending: {difference}")),
            None => Ok(()),
        }
    }
}

fn describe(change: &Change) -> String {
    let kind = match change {
        Change::Write { .. } => "write",
        Change::SetLen(_) => "set length",
        Change::Punch(_) => "punch",
        Change::Zero(_) => "zero",
        Change::Allocate(_) => "allocate",
    };
    format!("{kind} {:x?}", change.range())
}

#[test]
fn every_crash_leaves_each_snapshot_whole_and_the_disk_old_or_new() {
    let mut tally = Tally::default();
    for_seeds("every_crash_leaves_each_snapshot_whole_and_the_disk_old_or_new", 40, |seed| {
        let directory = scratch();
        let mut rng = Rng::new(seed);
        let mut shape = small_shape(&mut rng);
        shape.cluster_bits = *rng.pick(&[9, 9, 12, 13]);
        if shape.extended_l2 {
            shape.cluster_bits = 14;
        }
        shape.size = rng.within(1..500) * SECTOR;
        println!("{seed}: {shape} {} bytes", shape.size);
        let made = Made::furnished(shape, directory.path(), &mut rng);
        let (storage, steps) = record(&made, &mut rng);
        let search = Search {
            made: &made,
            steps: &steps,
            replay: storage.replay(),
            disk: Oracle::new(&made.contents, made.contents.len() as u64 / SECTOR),
            applying: None,
            before: made.snapshots().to_vec(),
            after: None,
            rng,
            tally: &mut tally,
        };
        search.run();
    });
    println!("crash search with snapshots: {tally:?}");
}
