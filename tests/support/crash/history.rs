//! What clients do on an image whose files are recorded.
//!
//! A history of one client, with nothing in the background, follows from its seed alone; where
//! several work beside each other, or the recycler in its thread, it does not.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use qcow2fs::image::{Image, Options};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::{MemoryStorage, RecordingStorage};
use qcow2fs::{Error, ErrorKind};
use serde::{Deserialize, Serialize};

use super::faults::Faults;
use crate::support::made::Made;
use crate::support::oracle::{Kind, Operation, data};
use crate::support::rng::Rng;
use crate::support::{SECTOR, busy};

/// The names of the snapshots that there are, and what each holds.
pub type Snapshots = Vec<(String, Vec<u8>)>;

/// Bytes of the image file and of the external data file, where there is one.
pub struct Files {
    pub image: MemoryStorage,
    pub data: Option<MemoryStorage>,
}

/// What one marked step did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Step {
    Disk(Operation),
    /// The snapshots from then on.
    Snapshots(Snapshots),
    /// The disk from then on.
    Apply(Vec<u8>),
}

/// What a client may do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Write,
    /// Writes everything from one sector to the end of the disk.
    Fill,
    Discard,
    WriteZeroes,
    /// Writes bytes that are zeros.
    WriteZeros,
    Preallocate,
    /// The same without space on the host.
    PreallocateMetadata,
    Flush,
    Resize,
    Compact,
    /// Compacts or defragments, and stops in the midst of it.
    CompactSome,
    /// Asks the recycler to compact, and leaves it in the midst of that.
    BeginPass,
    Defragment,
    /// Gives back data that is zeros.
    FreeZeros,
    /// Has the recycler work, or waits for it where it has a thread.
    Recycle,
    Take,
    Delete,
    Apply,
}

/// How often a client does what: parts of the whole.
pub type Mix = &'static [(u64, Action)];

/// Everything but changes of snapshots.
pub const WRITES: Mix = &[
    (45, Action::Write),
    (1, Action::Fill),
    (20, Action::Discard),
    (5, Action::WriteZeroes),
    (3, Action::WriteZeros),
    (2, Action::Preallocate),
    (1, Action::PreallocateMetadata),
    (9, Action::Flush),
    (3, Action::Resize),
    (2, Action::Compact),
    (1, Action::CompactSome),
    (2, Action::BeginPass),
    (1, Action::Defragment),
    (1, Action::FreeZeros),
    (12, Action::Recycle),
];

/// Everything, snapshots most of all.
pub const SNAPSHOTS: Mix = &[
    (36, Action::Write),
    (12, Action::Discard),
    (2, Action::WriteZeroes),
    (2, Action::Preallocate),
    (4, Action::Flush),
    (2, Action::Resize),
    (2, Action::Compact),
    (1, Action::CompactSome),
    (3, Action::BeginPass),
    (1, Action::Defragment),
    (1, Action::FreeZeros),
    (8, Action::Recycle),
    (14, Action::Take),
    (12, Action::Delete),
    (6, Action::Apply),
];

/// Everything.
pub const EVERYTHING: Mix = &[
    (40, Action::Write),
    (1, Action::Fill),
    (16, Action::Discard),
    (3, Action::WriteZeroes),
    (2, Action::WriteZeros),
    (2, Action::Preallocate),
    (1, Action::PreallocateMetadata),
    (9, Action::Flush),
    (3, Action::Resize),
    (3, Action::Compact),
    (1, Action::CompactSome),
    (2, Action::BeginPass),
    (1, Action::Defragment),
    (1, Action::FreeZeros),
    (12, Action::Recycle),
    (4, Action::Take),
    (3, Action::Delete),
    (2, Action::Apply),
];

/// What makes clusters and tables move.
pub const MOVES: Mix = &[
    (30, Action::Write),
    (3, Action::Fill),
    (30, Action::Discard),
    (6, Action::Flush),
    (8, Action::Compact),
    (2, Action::CompactSome),
    (3, Action::BeginPass),
    (3, Action::Defragment),
    (19, Action::Recycle),
];

/// The same with snapshots.
pub const MOVES_OF_SNAPSHOTS: Mix = &[
    (30, Action::Write),
    (25, Action::Discard),
    (5, Action::Flush),
    (10, Action::Compact),
    (2, Action::CompactSome),
    (3, Action::BeginPass),
    (3, Action::Defragment),
    (10, Action::Recycle),
    (10, Action::Take),
    (6, Action::Delete),
];

/// What changes the size of the disk.
pub const SIZES: Mix = &[
    (40, Action::Write),
    (20, Action::Discard),
    (10, Action::Flush),
    (20, Action::Resize),
    (10, Action::Recycle),
];

/// What is to happen in a history.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub mix: Mix,
    /// How many actions each client does.
    pub actions: (u64, u64),
    /// Whether several clients and the recycler's threads may be at work at once.
    pub threads: bool,
    /// Whether the host fails now and then.
    pub faults: bool,
}

/// What a history left: its logs, and what each marked step was.
#[derive(Clone)]
pub struct Recorded {
    pub image: Arc<RecordingStorage>,
    /// The external data file.
    pub data: Option<Arc<RecordingStorage>>,
    pub steps: HashMap<u64, Step>,
    /// How many operations of the host failed.
    pub struck: u64,
}

/// Clients that work on one image whose file is recorded.
struct Clients<'a> {
    plan: Plan,
    made: &'a Made,
    image: Arc<Image>,
    storage: Arc<RecordingStorage>,
    /// What makes the files fail, where they do.
    faults: Option<Faults>,
    /// What was done, in the order in which it was begun, for messages.
    taken: Mutex<Vec<(Action, Range<u64>)>>,
    /// What each step number is.
    steps: Mutex<HashMap<u64, Step>>,
    next: AtomicU64,
    sectors: AtomicU64,
    snapshots: Mutex<Snapshots>,
    /// The disk does not grow past so many sectors.
    most: u64,
    /// Sectors are dealt to the clients in pieces of so many.
    piece: u64,
    clients: u64,
    /// Nothing that waits for a pause is due at this moment.
    began: Instant,
    /// The recycler was told to work so many hours later.
    hours: AtomicU64,
}

/// Records a history on `files`, a state of the image that was `made`, which has `snapshots`.
///
/// # Errors
/// What went wrong where nothing should.
pub fn record(
    made: &Made,
    files: Files,
    snapshots: &Snapshots,
    plan: Plan,
    rng: &mut Rng,
) -> Result<Recorded, String> {
    let began = Instant::now();
    let sync_takes = match plan.threads {
        true => Duration::from_micros(*rng.pick(&[0, 0, 200, 2000])),
        false => Duration::ZERO,
    };
    let storage = Arc::new(RecordingStorage::new(files.image).with_slow_sync(sync_takes));
    let data = files.data.map(|data| Arc::new(storage.beside(1, data)));
    let options = Options { threads: plan.threads, ..busy(rng) };
    let faults = plan.faults.then(|| Faults::new(storage.clone()));
    let (opened, opened_data) = match &faults {
        Some(faults) => (faults.file(), data.clone().map(|data| faults.beside(data))),
        None => (storage.clone() as Arc<dyn Storage>, data.clone().map(|data| data as _)),
    };
    let image = made
        .open_on(opened, opened_data, &options)
        .map_err(|e| format!("opening for writing: {e}"))?;
    let sectors = image.virtual_size() / SECTOR;
    let piece = piece(made, rng);
    let alone = !plan.threads || sectors < piece * 3 || rng.one_in(3);
    let clients = if alone { 1 } else { rng.within(2..4) };
    let clients = Clients {
        plan,
        made,
        image,
        storage: storage.clone(),
        faults,
        taken: Mutex::default(),
        steps: Mutex::default(),
        next: AtomicU64::new(1),
        sectors: AtomicU64::new(sectors),
        snapshots: Mutex::new(snapshots.clone()),
        most: most_sectors(made),
        piece,
        clients,
        began,
        hours: AtomicU64::new(1),
    };
    clients.run_all(rng).map_err(|e| format!("{e}, after {:?}", clients.taken.lock()))?;
    let struck = clients.faults.as_ref().map_or(0, Faults::struck);
    let steps = clients.steps.into_inner();
    Ok(Recorded { image: storage, data, steps, struck })
}

/// Sectors that the disk of a history may grow to.
pub fn most_sectors(made: &Made) -> u64 {
    made.shape.size / SECTOR * 2
}

/// Sectors in one piece that a client takes at a time.
fn piece(made: &Made, rng: &mut Rng) -> u64 {
    let in_cluster = made.shape.cluster_size() / SECTOR;
    let in_subcluster = made.shape.subcluster_size() / SECTOR;
    *rng.pick(&[1, 3, in_subcluster, 3 * in_subcluster, in_cluster, 2 * in_cluster, 5 * in_cluster])
}

/// What all of the disk holds.
pub fn whole_disk(image: &Image) -> qcow2fs::Result<Vec<u8>> {
    let mut disk = vec![0xee; image.virtual_size() as usize];
    image.read(0, &mut disk)?;
    Ok(disk)
}

impl Clients<'_> {
    fn run_all(&self, rng: &mut Rng) -> qcow2fs::Result<()> {
        if self.clients == 1 {
            self.run(0, Rng::new(rng.next()))?;
        } else {
            thread::scope(|scope| {
                let running: Vec<_> = (0..self.clients)
                    .map(|client| {
                        let rng = Rng::new(rng.next());
                        scope.spawn(move || self.run(client, rng))
                    })
                    .collect();
                running.into_iter().try_for_each(|client| client.join().unwrap())
            })?;
        }
        if rng.one_in(2) {
            // The recycler cuts the file's end when allocation has paused.
            let recycled = self.recycle(rng, 700);
            self.endure(recycled)?;
        }
        if let Some(faults) = self.faults.as_ref().filter(|_| rng.one_in(2)) {
            faults.end();
        }
        let closed = self.act(flush(), |_| self.image.close());
        self.endure(closed)
    }

    /// Does what `step` says, with marks in the log where it begins and where it succeeds.
    fn act(&self, step: Step, act: impl FnOnce(u64) -> qcow2fs::Result<()>) -> qcow2fs::Result<()> {
        self.find_out(|number| match act(number) {
            Ok(()) => Ok(step),
            Err(error) => Err((step, error)),
        })
    }

    /// The same where what the step is shows only when it is over; a failure says what it may have
    /// been.
    fn find_out(
        &self,
        act: impl FnOnce(u64) -> Result<Step, (Step, Error)>,
    ) -> qcow2fs::Result<()> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.storage.mark(number * 2);
        let (step, result) = match act(number) {
            Ok(step) => (step, Ok(())),
            Err((step, error)) => (step, Err(error)),
        };
        self.steps.lock().insert(number, step);
        if result.is_ok() {
            self.storage.mark(number * 2 + 1);
        }
        result
    }

    /// Goes on where an error is that of a fault.
    fn endure(&self, result: qcow2fs::Result<()>) -> qcow2fs::Result<()> {
        match (&self.faults, result) {
            (Some(faults), Err(error)) => faults.excuse(error, !self.image.is_writable()),
            (_, result) => result,
        }
    }

    fn run(&self, client: u64, mut rng: Rng) -> qcow2fs::Result<()> {
        let (fewest, most) = self.plan.actions;
        for _ in 0..rng.within(fewest..most) {
            if let Some(faults) = &self.faults {
                faults.go_on(&mut rng);
            }
            let action = self.pick(&mut rng);
            let taken = self.take_action(action, client, &mut rng);
            self.endure(taken)?;
        }
        Ok(())
    }

    fn pick(&self, rng: &mut Rng) -> Action {
        let mut left = rng.within(0..self.plan.mix.iter().map(|(parts, _)| parts).sum());
        for &(parts, action) in self.plan.mix {
            if left < parts {
                return action;
            }
            left -= parts;
        }
        unreachable!("the parts have a sum")
    }

    fn take_action(&self, action: Action, client: u64, rng: &mut Rng) -> qcow2fs::Result<()> {
        let sectors = self.own_sectors(action, client, rng);
        let bytes = sectors.start * SECTOR..sectors.end * SECTOR;
        self.taken.lock().push((action, sectors.clone()));
        let image = &self.image;
        let step = |kind| Step::Disk(Operation { kind, sectors: sectors.clone() });
        match action {
            Action::Write | Action::Fill => self.act(step(Kind::Write), |number| {
                image.write(bytes.start, &data(number, sectors.clone()))
            }),
            Action::Discard => self.act(step(Kind::Zero), |_| image.discard(bytes)),
            Action::WriteZeroes => self.act(step(Kind::Zero), |_| image.write_zeroes(bytes)),
            Action::WriteZeros => self.act(step(Kind::Zero), |_| {
                image.write(bytes.start, &vec![0; (bytes.end - bytes.start) as usize])
            }),
            Action::Preallocate => image.preallocate(bytes),
            Action::PreallocateMetadata => image.preallocate_metadata(bytes),
            Action::Flush => self.act(flush(), |_| image.flush()),
            Action::Resize => self.resize(rng),
            Action::Compact => image.compact(|_| true),
            Action::CompactSome => self.compact_some(rng),
            Action::BeginPass => {
                image.ask_to_compact(true)?;
                self.recycle_steps(rng.within(1..12))
            }
            Action::Defragment => image.defragment(|_| true),
            Action::FreeZeros => image.free_zeros(|_| true).map(|_| ()),
            Action::Recycle => self.recycle(rng, 6),
            // What every snapshot holds is known only where nobody else writes, and while it is
            // known what is on disk.
            Action::Take | Action::Delete | Action::Apply
                if self.clients > 1 || !image.is_writable() =>
            {
                Ok(())
            }
            Action::Take => self.take_snapshot(),
            Action::Delete => self.delete_snapshot(rng),
            Action::Apply => self.apply_snapshot(rng),
        }
    }

    /// Consecutive sectors that belong to `client`; all of the disk does when there is only one.
    fn own_sectors(&self, action: Action, client: u64, rng: &mut Rng) -> Range<u64> {
        let sectors = self.sectors.load(Ordering::Relaxed);
        if self.clients == 1 {
            let start = rng.within(0..sectors);
            let longest = match action {
                Action::Fill => return start..sectors,
                _ if rng.one_in(10) => sectors,
                _ => 2 * self.piece,
            };
            return start..(start + rng.within(1..longest + 1)).min(sectors);
        }
        let rounds = (sectors / (self.piece * self.clients)).max(1);
        let piece = rng.within(0..rounds) * self.clients + client;
        let start = piece * self.piece + rng.within(0..self.piece);
        let end = (piece + 1) * self.piece;
        start..if rng.one_in(2) { end } else { rng.within(start + 1..end + 1) }
    }

    fn resize(&self, rng: &mut Rng) -> qcow2fs::Result<()> {
        let has_snapshots = !self.snapshots.lock().is_empty();
        if self.clients > 1 || self.made.shape.version == 2 && has_snapshots {
            return Ok(());
        }
        let old = self.sectors.load(Ordering::Relaxed);
        let new = rng.within(1..self.most + 1);
        let sectors = old.min(new)..old.max(new);
        // What it is must be known when it has only begun, too.
        let step = Step::Disk(Operation { kind: Kind::Resize(new), sectors });
        self.act(step, |_| self.image.resize(new * SECTOR))?;
        self.sectors.store(new, Ordering::Relaxed);
        Ok(())
    }

    /// Lets time pass for the recycler: up to `most` milliseconds, or as far as that brings it
    /// where nothing depends on time.
    fn recycle(&self, rng: &mut Rng, most: u64) -> qcow2fs::Result<()> {
        if self.plan.threads {
            thread::sleep(Duration::from_millis(rng.within(0..most)));
            return Ok(());
        }
        // All that waits for a flush or a pause is due, or nothing.
        let hours = if rng.one_in(2) { self.hours.fetch_add(1, Ordering::Relaxed) } else { 0 };
        let now = self.began + Duration::from_secs(3600 * hours);
        for _ in 0..*rng.pick(&[1, 2, 3, 20]) {
            if !self.image.recycle(now)? {
                break;
            }
        }
        Ok(())
    }

    /// Has the recycler do so many steps of what is due, or leaves it to its thread.
    fn recycle_steps(&self, steps: u64) -> qcow2fs::Result<()> {
        if self.plan.threads {
            return Ok(());
        }
        let hours = self.hours.fetch_add(1, Ordering::Relaxed);
        let now = self.began + Duration::from_secs(3600 * hours);
        for _ in 0..steps {
            if !self.image.recycle(now)? {
                break;
            }
        }
        Ok(())
    }

    fn compact_some(&self, rng: &mut Rng) -> qcow2fs::Result<()> {
        let mut left = rng.within(0..30);
        let goes_on = |_: &_| {
            left = left.saturating_sub(1);
            left > 0
        };
        if rng.one_in(2) { self.image.compact(goes_on) } else { self.image.defragment(goes_on) }
    }

    fn take_snapshot(&self) -> qcow2fs::Result<()> {
        self.find_out(|number| {
            let name = format!("ours{number}");
            let mut snapshots = self.snapshots.lock();
            let before = snapshots.clone();
            let disk = self.whole_disk().map_err(|e| (Step::Snapshots(before.clone()), e))?;
            let mut with_it = before.clone();
            with_it.push((name.clone(), disk));
            match self.image.take_snapshot(name.as_bytes()) {
                Ok(_) => *snapshots = with_it.clone(),
                // Refcounts may be too narrow.
                Err(_) if self.faults.is_none() => return Ok(Step::Snapshots(before)),
                Err(e) if is_refusal(&e) => return Ok(Step::Snapshots(before)),
                Err(e) => return Err((Step::Snapshots(with_it), e)),
            }
            Ok(Step::Snapshots(with_it))
        })
    }

    fn delete_snapshot(&self, rng: &mut Rng) -> qcow2fs::Result<()> {
        self.find_out(|_| {
            let mut snapshots = self.snapshots.lock();
            if snapshots.is_empty() {
                return Ok(Step::Snapshots(Vec::new()));
            }
            let mut without = snapshots.clone();
            let (name, _) = without.remove(rng.within(0..snapshots.len() as u64) as usize);
            let step = Step::Snapshots(without.clone());
            match self.image.delete_snapshot(name.as_bytes()) {
                Err(e) if self.has_snapshot(&name) => return Err((step, e)),
                // What fails when it has gone leaks, and that is all.
                result => self.endure(result).map_err(|e| (step.clone(), e))?,
            }
            *snapshots = without;
            Ok(step)
        })
    }

    fn has_snapshot(&self, name: &str) -> bool {
        self.image.snapshots().is_ok_and(|all| all.iter().any(|info| info.name == name))
    }

    fn apply_snapshot(&self, rng: &mut Rng) -> qcow2fs::Result<()> {
        let applied = {
            let snapshots = self.snapshots.lock();
            let applied = rng.within(0..snapshots.len().max(1) as u64) as usize;
            snapshots.get(applied).cloned()
        };
        let Some((name, content)) = applied else {
            return self.act(flush(), |_| self.image.flush());
        };
        self.find_out(|_| {
            let step = Step::Apply(content);
            match self.image.apply_snapshot(name.as_bytes()) {
                // Refcounts are too narrow.
                Err(e) if self.faults.is_none() || is_refusal(&e) => {
                    return self.image.flush().map(|()| flush()).map_err(|e| (flush(), e));
                }
                Err(e) if !e.to_string().contains("is applied") => return Err((step, e)),
                // What fails when it is applied leaks, and that is all.
                result => self.endure(result).map_err(|e| (step.clone(), e))?,
            }
            let disk = self.whole_disk().map_err(|e| (step, e))?;
            self.sectors.store(disk.len() as u64 / SECTOR, Ordering::Relaxed);
            Ok(Step::Apply(disk))
        })
    }

    /// What all of the disk holds.
    fn whole_disk(&self) -> qcow2fs::Result<Vec<u8>> {
        match &self.faults {
            Some(faults) => faults.pause(|| whole_disk(&self.image)),
            None => whole_disk(&self.image),
        }
    }
}

/// Nothing is wrong but that refcounts are too narrow.
fn is_refusal(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::TooBig | ErrorKind::Unsupported)
}

fn flush() -> Step {
    Step::Disk(Operation { kind: Kind::Flush, sectors: 0..0 })
}
