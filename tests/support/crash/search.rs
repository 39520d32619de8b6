//! The walk along a recording: at crash points all along it files are built as a crash may leave
//! them, and each is judged.

use std::path::Path;
use std::sync::Arc;

use qcow2fs::check::check;
use qcow2fs::image::{Beside, Image};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::{Change, Entry, Fate, MemoryStorage, Replay};

use super::history::{
    Files, Mix, Plan, Recorded, Snapshots, Step, most_sectors, record, whole_disk,
};
use crate::support::bitmaps::bitmaps;
use crate::support::made::Made;
use crate::support::oracle::{After, Oracle};
use crate::support::qemu::{self, DataFile};
use crate::support::rng::{Rng, mix};
use crate::support::{SECTOR, difference, open_read_only, verify_clean};

/// So many changes that no sync covers, and every subset of them is looked at.
const FEW: usize = 6;
/// The same, at some of the points.
const SOMETIMES_FEW: usize = 8;
/// Recovery is crashed, and what follows from that, so many times over.
const DEEPEST: usize = 3;
/// One file in so many is judged by QEMU, which takes as long as hundreds of others.
const PER_QEMU: u64 = 500;
/// One file in so many is recovered, at each depth.
const PER_RECOVERY: [u64; DEEPEST] = [60, 10, 10];
/// Files that are looked at where recovery was crashed.
const STATES_OF_RECOVERY: u64 = 16;

/// How much was looked at.
#[derive(Default, Debug)]
pub struct Tally {
    pub histories: u64,
    /// Operations of the host that failed in them.
    pub struck: u64,
    pub points: u64,
    /// Points all of whose files were looked at, but for torn writes.
    pub exhausted: u64,
    pub states: u64,
    pub leaks: u64,
    pub missing_flags: u64,
    pub judged_by_qemu: u64,
    /// Recoveries at each depth: of the history's own crashes, of those of their recovery, ...
    pub recovered: [u64; DEEPEST],
}

/// What is wrong with a file that a crash left, and where that was.
pub struct Finding {
    /// Entries of the log before the crash.
    pub position: usize,
    pub complaint: String,
    /// What was kept of what.
    pub fates: String,
    pub files: Crashed,
}

/// The files that a crash left.
#[derive(Clone)]
pub struct Crashed {
    pub image: Arc<MemoryStorage>,
    pub data: Option<Arc<MemoryStorage>>,
}

impl Crashed {
    fn beside(&self, made: &Made) -> Beside {
        made.beside(self.data.clone().map(|data| data as Arc<dyn Storage>))
    }

    fn fork(&self) -> Files {
        Files { image: self.image.fork(), data: self.data.as_ref().map(|data| data.fork()) }
    }
}

/// What a disk and its snapshots may be.
struct Expected {
    disk: Oracle,
    /// The disk that is being applied.
    applying: Option<Vec<u8>>,
    before: Snapshots,
    /// The snapshots after what is under way.
    after: Option<Snapshots>,
    most: u64,
    /// COPIED flags may be missing: snapshots have come or gone.
    may_miss_flags: bool,
}

impl Expected {
    fn note(&mut self, number: u64, step: &Step, is_over: bool) {
        match (step, is_over) {
            (Step::Disk(operation), false) => self.disk.begin(number, operation),
            (Step::Disk(operation), true) => self.disk.succeed(number, operation),
            (Step::Snapshots(after), false) => self.after = Some(after.clone()),
            (Step::Snapshots(after), true) => {
                self.before = after.clone();
                self.after = None;
            }
            (Step::Apply(disk), false) => self.applying = Some(disk.clone()),
            (Step::Apply(disk), true) => {
                self.disk = Oracle::new(disk, self.most.max(disk.len() as u64 / SECTOR));
                self.applying = None;
            }
        }
        self.may_miss_flags |= !matches!(step, Step::Disk(_));
    }

    fn check_disk(&self, disk: &[u8], after: After) -> Result<(), String> {
        if self.applying.as_deref() == Some(disk) {
            return Ok(());
        }
        self.disk.check_size(disk.len() as u64 / SECTOR)?;
        self.disk.check(disk, 0, after)
    }

    /// The snapshots that an image with those names may have.
    fn snapshots(&self, names: &[String]) -> Option<&Snapshots> {
        let is = |expected: &&Snapshots| {
            let mut expected: Vec<_> = expected.iter().map(|(name, _)| name).collect();
            let mut names: Vec<_> = names.iter().collect();
            expected.sort();
            names.sort();
            names == expected
        };
        [Some(&self.before), self.after.as_ref()].into_iter().flatten().find(is)
    }

    /// Each snapshot holds what it should; which there are.
    fn check_snapshots(&self, image: &Image) -> Result<Snapshots, String> {
        let infos = image.snapshots().map_err(|e| format!("listing snapshots: {e}"))?;
        let names: Vec<_> = infos.into_iter().map(|info| info.name).collect();
        let expected =
            self.snapshots(&names).ok_or_else(|| format!("the snapshots are {names:?}"))?;
        for (name, content) in expected {
            let view = image.open_snapshot(name.as_bytes()).map_err(|e| e.to_string())?;
            let mut found = vec![0xee; view.info().disk_size as usize];
            view.read(0, &mut found).map_err(|e| format!("reading snapshot {name}: {e}"))?;
            if let Some(difference) = difference(&found, content) {
                return Err(format!("snapshot {name} holds {difference}"));
            }
        }
        Ok(expected.clone())
    }
}

/// One walk along a recording.
pub struct Search<'a> {
    made: &'a Made,
    recorded: &'a Recorded,
    image: Replay,
    /// The same walk along the external data file.
    data: Option<Replay>,
    expected: Expected,
    rng: Rng,
    directory: &'a Path,
    tally: &'a mut Tally,
    /// Crashes before this history.
    depth: usize,
    /// What recovery does, so that it can be crashed.
    mix: Mix,
    /// The first entry of the log that is looked at.
    first: usize,
}

impl<'a> Search<'a> {
    /// A walk along what was `recorded` on an image that holds `disk` and `snapshots` at first.
    #[allow(clippy::too_many_arguments, reason = "each is used by itself")]
    pub fn new(
        made: &'a Made,
        recorded: &'a Recorded,
        disk: &[u8],
        snapshots: &Snapshots,
        mix: Mix,
        rng: Rng,
        directory: &'a Path,
        tally: &'a mut Tally,
    ) -> Self {
        let most = most_sectors(made).max(disk.len() as u64 / SECTOR);
        Search {
            made,
            recorded,
            image: recorded.image.replay(),
            data: recorded.data.as_ref().map(|data| data.replay()),
            expected: Expected {
                disk: Oracle::new(disk, most),
                applying: None,
                before: snapshots.clone(),
                after: None,
                most,
                may_miss_flags: !snapshots.is_empty(),
            },
            rng,
            directory,
            tally,
            depth: 0,
            mix,
            first: 0,
        }
    }

    /// The same, but recovering nothing.
    pub fn without_recovery(self) -> Self {
        Search { depth: DEEPEST, ..self }
    }

    /// The same, but looking at nothing before entry `first` of the recording.
    pub fn starting_at(self, first: usize) -> Self {
        Search { first, ..self }
    }

    /// Looks at about `states` files along the whole recording.
    pub fn run(mut self, states: u64) -> Result<(), Box<Finding>> {
        let log = self.recorded.image.log().split_off(self.first);
        let is_sync = |(_, entry): &&(usize, Entry)| matches!(entry, Entry::Sync { .. });
        let syncs = log.iter().filter(is_sync).count() as u64;
        // A look takes some thirty files.
        let looks = (states / 30).max(1);
        let stride = (log.len() as u64 / looks).max(1);
        let seed = self.rng.next();
        for position in 0.. {
            // What is looked at follows from the place alone, not from what was found before.
            self.rng = Rng::new(mix(seed ^ position));
            // A sync makes much durable at once: the file just before has the most ways to be.
            let is_sync = matches!(self.image.peek(), Some(Entry::Sync { .. }));
            let is_due = self.rng.within(0..stride * 2) == 0
                || is_sync && self.rng.within(0..syncs.max(1)) < looks / 2 + 1;
            if is_due && position >= self.first as u64 {
                self.look()?;
            }
            if let Some(data) = &mut self.data {
                data.step().unwrap();
            }
            match self.image.step().unwrap() {
                Some(Entry::Mark(mark)) => {
                    let recorded = self.recorded;
                    self.expected.note(mark / 2, &recorded.steps[&(mark / 2)], mark % 2 == 1);
                }
                Some(Entry::Change(_) | Entry::Sync { .. }) => {}
                None => break,
            }
        }
        self.look()
    }

    /// Looks at the files that a crash at this point may leave.
    fn look(&mut self) -> Result<(), Box<Finding>> {
        self.tally.points += 1;
        let pending = self.pending().len();
        let few = if self.rng.one_in(4) { SOMETIMES_FEW } else { FEW };
        if pending <= few {
            self.tally.exhausted += 1;
            for kept in 0..1usize << pending {
                self.examine(&|n| if kept >> n & 1 == 1 { Fate::Kept } else { Fate::Lost })?;
            }
        } else {
            self.examine(&|_| Fate::Kept)?;
            self.examine(&|_| Fate::Lost)?;
        }
        let singles: Vec<usize> = match pending {
            0..=8 => (0..pending).collect(),
            _ => (0..8).map(|_| self.rng.within(0..pending as u64) as usize).collect(),
        };
        for single in singles {
            let mask = self.rng.next();
            self.examine(&|n| if n == single { Fate::Torn(mask) } else { Fate::Kept })?;
            if pending > few {
                self.examine(&|n| if n == single { Fate::Kept } else { Fate::Lost })?;
                self.examine(&|n| if n == single { Fate::Lost } else { Fate::Kept })?;
            }
        }
        // In the order of time all up to one of them, and any.
        for _ in 0..if pending > 1 { 3 } else { 0 } {
            let last = self.rng.within(0..pending as u64) as usize;
            self.examine(&|n| if n <= last { Fate::Kept } else { Fate::Lost })?;
            let fates: Vec<Fate> = (0..pending).map(|_| random_fate(&mut self.rng)).collect();
            self.examine(&|n| fates[n])?;
        }
        Ok(())
    }

    /// The changes that a crash here may lose, those of the image file first.
    fn pending(&self) -> Vec<&Change> {
        let data = self.data.iter().flat_map(|data| data.pending());
        self.image.pending().into_iter().chain(data).collect()
    }

    fn examine(&mut self, fate: &dyn Fn(usize) -> Fate) -> Result<(), Box<Finding>> {
        let own = self.image.pending().len();
        let crashed = Crashed {
            image: Arc::new(self.image.crash(fate).unwrap()),
            data: self.data.as_ref().map(|data| Arc::new(data.crash(|n| fate(own + n)).unwrap())),
        };
        self.tally.states += 1;
        let Err(complaint) = self.judge(&crashed) else { return Ok(()) };
        let pending = self.pending();
        let describe = |(n, change): (usize, &&Change)| format!("  {:?} {change:.0?}", fate(n));
        let fates: Vec<_> = pending.iter().enumerate().map(describe).collect();
        Err(Box::new(Finding {
            position: self.image.position(),
            complaint,
            fates: fates.join("\n"),
            files: crashed,
        }))
    }

    /// What is wrong with the files that a crash left.
    fn judge(&mut self, crashed: &Crashed) -> Result<(), String> {
        let report = check(&*crashed.image).map_err(|e| format!("checking it: {e}"))?;
        let allowed = if self.expected.may_miss_flags { report.missing_flags } else { 0 };
        if report.corruptions > allowed {
            return Err(format!("it is corrupt:\n  {}", report.findings.join("\n  ")));
        }
        self.tally.leaks += u64::from(report.leaks > 0);
        self.tally.missing_flags += u64::from(report.missing_flags > 0);
        let image = open_read_only(crashed.image.clone(), crashed.beside(self.made))
            .map_err(|e| format!("opening it: {e}"))?;
        let disk = whole_disk(&image).map_err(|e| format!("reading it: {e}"))?;
        self.expected.check_disk(&disk, After::Crash)?;
        self.check_raw_data(crashed, disk.len())?;
        self.check_bitmaps(&*crashed.image, &disk)?;
        let snapshots = self.expected.check_snapshots(&image)?;
        drop(image);
        if self.tally.states.is_multiple_of(PER_QEMU) {
            self.judge_by_qemu(crashed, &disk, &snapshots)?;
        }
        match PER_RECOVERY.get(self.depth) {
            Some(&n) if !self.is_wide(&disk) && self.rng.one_in(n) => {
                self.recover(crashed, &disk, &snapshots)
            }
            _ => Ok(()),
        }
    }

    /// A disk larger than those that histories are made for.
    fn is_wide(&self, disk: &[u8]) -> bool {
        disk.len() as u64 / SECTOR > most_sectors(self.made)
    }

    /// A raw data file holds by itself what the disk may hold.
    fn check_raw_data(&self, crashed: &Crashed, length: usize) -> Result<(), String> {
        let Some(data) = &crashed.data else { return Ok(()) };
        if self.made.shape.data_file != DataFile::Raw {
            return Ok(());
        }
        let mut raw = vec![0xee; length];
        data.read_at(&mut raw, 0).unwrap();
        self.expected
            .disk
            .check(&raw, 0, After::Crash)
            .map_err(|e| format!("in the raw data file by itself, {e}"))
    }

    /// A bitmap that is not marked as in use has every granule that differs from what it was made
    /// for.
    fn check_bitmaps(&self, file: &dyn Storage, disk: &[u8]) -> Result<(), String> {
        if !self.made.has_bitmap() {
            return Ok(());
        }
        let before = &self.made.contents;
        let sector_before = |n: usize| before.get(n * 512..(n + 1) * 512).unwrap_or(&[0; 512]);
        for found in bitmaps(file).iter().filter(|b| b.entry.auto && !b.entry.in_use) {
            let changed =
                disk.chunks_exact(512).enumerate().filter(|(n, s)| *s != sector_before(*n));
            for (sector, _) in changed {
                let granule = (sector as u64 * SECTOR) >> found.entry.granularity_bits;
                if !found.granules.contains(&granule) {
                    let bitmap = &found.entry;
                    return Err(format!("sector {sector} has changed, {bitmap} does not say so"));
                }
            }
        }
        Ok(())
    }

    fn judge_by_qemu(
        &mut self,
        crashed: &Crashed,
        disk: &[u8],
        snapshots: &Snapshots,
    ) -> Result<(), String> {
        self.tally.judged_by_qemu += 1;
        let path = self.directory.join("crashed.qcow2");
        std::fs::write(&path, crashed.image.contents()).unwrap();
        if let Some(data) = &crashed.data {
            // By the name that the header has.
            std::fs::write(self.made.data_path().unwrap(), data.contents()).unwrap();
        }
        if !self.expected.may_miss_flags {
            qemu::check_allowing_leaks(&path)?;
        } else if !self.made.has_bitmap() {
            // QEMU mends missing flags as it mends leaks: nothing worse is there. (10.0.2 forgets
            // the snapshots where there are bitmaps.)
            qemu::repair_leaks(&path);
            qemu::check_allowing_leaks(&path)?;
        }
        if let Some(difference) = difference(&qemu::contents(&path, None), disk) {
            return Err(format!("QEMU reads {difference}"));
        }
        for (name, expected) in snapshots {
            let found = qemu::contents(&path, Some(name));
            // QEMU reads snapshots at the size that the disk has now.
            let common = found.len().min(expected.len());
            if let Some(difference) = difference(&found[..common], &expected[..common]) {
                return Err(format!("QEMU reads from snapshot {name} {difference}"));
            }
        }
        Ok(())
    }

    /// Works on the files that a crash left, and closes them: all must be sound then, without a
    /// leak. Then has that work crash as well, at some of its points.
    fn recover(
        &mut self,
        crashed: &Crashed,
        disk: &[u8],
        snapshots: &Snapshots,
    ) -> Result<(), String> {
        self.tally.recovered[self.depth] += 1;
        let plan = Plan { mix: self.mix, actions: (0, 8), threads: false, faults: false };
        let mut rng = Rng::new(self.rng.next());
        let recorded = record(self.made, crashed.fork(), snapshots, plan, &mut rng)
            .map_err(|e| format!("working on it: {e}"))?;
        let mut deeper = Search::new(
            self.made,
            &recorded,
            disk,
            snapshots,
            self.mix,
            rng,
            self.directory,
            self.tally,
        );
        deeper.depth = self.depth + 1;
        deeper.expected.may_miss_flags |= self.expected.may_miss_flags;
        deeper.run(STATES_OF_RECOVERY).map_err(|finding| {
            let Finding { position, complaint, fates, .. } = *finding;
            format!("recovered and crashed again at entry {position}: {complaint}\n{fates}")
        })?;
        let closed = Crashed {
            image: Arc::new(recorded.image.current().fork()),
            data: recorded.data.as_ref().map(|data| Arc::new(data.current().fork())),
        };
        verify_clean(&*closed.image).map_err(|e| format!("after recovery and close: {e}"))
    }
}

fn random_fate(rng: &mut Rng) -> Fate {
    match rng.within(0..5) {
        0 | 1 => Fate::Kept,
        2 | 3 => Fate::Lost,
        _ => Fate::Torn(rng.next()),
    }
}
