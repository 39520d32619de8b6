//! Clients that write to a raw file, and remember what they were told.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

use crate::daemon::{Daemon, Moment};
use crate::lab::{Lab, assert_sound, eventually};
use crate::support::oracle::{After, Kind, Operation, Oracle, data};
use crate::support::rng::Rng;
use crate::support::{SECTOR, host_file, qemu, verify};
use crate::tally::Tally;

const DISK: u64 = 32 << 20;
const SECTORS: u64 = DISK / SECTOR;
/// Sectors in the smallest cluster: where one holds data, the others are there too.
const BLOCK: u64 = 8;
/// Bytes of a new disk that hold data.
const FILLED: u64 = 24 << 20;
const CLIENTS: u64 = 3;
/// After so many kills an image is closed in order, and another one comes.
const KILLS_PER_IMAGE: u64 = 12;

const OPTIONS: [&str; 5] = [
    "cluster_size=64k",
    "cluster_size=4k",
    "cluster_size=64k,extended_l2=on",
    "cluster_size=16k,refcount_bits=1",
    "compat=0.10,cluster_size=32k",
];

/// Sectors that are discarded at once to make room; whole clusters.
const THIN: u64 = 256;
const FLUSH: Operation = Operation { kind: Kind::Flush, sectors: 0..0 };

/// Kills daemons until there were enough.
pub fn work(seed: u64, tally: &Tally) {
    let mut rng = Rng::new(seed);
    while tally.goes_on() {
        let mut disk = Disk::new(&mut rng);
        for _ in 0..KILLS_PER_IMAGE {
            if tally.goes_on() {
                disk.live_and_die(&mut rng, tally);
            }
        }
        disk.end();
    }
}

/// One image, and what its disk may hold.
pub struct Disk {
    lab: Lab,
    image: PathBuf,
    options: &'static str,
    oracle: Oracle,
    /// What the last end was like.
    after: After,
    kills: u64,
}

impl Disk {
    pub fn new(rng: &mut Rng) -> Disk {
        let lab = Lab::new();
        let options = rng.pick(&OPTIONS);
        let image = lab.create("disk.qcow2", &DISK.to_string(), options);
        // Enough to move.
        sh!("qemu-io -f qcow2 -c 'write -P 7 0 {FILLED}' {}", image.display());
        let mut filled = vec![0; DISK as usize];
        filled[..FILLED as usize].fill(7);
        let oracle = Oracle::new(&filled, SECTORS);
        Disk { lab, image, options, oracle, after: After::Crash, kills: 0 }
    }

    /// Mounts, judges what the last kill has left, works, and is killed.
    fn live_and_die(&mut self, rng: &mut Rng, tally: &Tally) {
        let daemon = Daemon::start(&self.lab);
        let file = open(&daemon, rng.one_in(2));
        if self.kills > 0 {
            tally.mounted_again(daemon.age());
        }
        let found = self.judge(&file);
        let crew = Crew::new(&found);
        let moved = match Moment::random(rng, 300) {
            Moment::Early(after) => crew.work(&file, rng, || {
                crew.allocate();
                thread::sleep(after);
                daemon.kill();
                false
            }),
            Moment::Moving(after) => {
                crew.thin_out(&file, rng);
                crew.work(&file, rng, || {
                    let moved = daemon.begin_to_move("disk.raw");
                    crew.allocate();
                    thread::sleep(after);
                    daemon.kill();
                    moved
                })
            }
            Moment::Closing(after) => {
                let work = Duration::from_millis(rng.within(0..100));
                crew.work(&file, rng, || {
                    crew.allocate();
                    thread::sleep(work);
                    crew.stop();
                });
                drop(file);
                thread::sleep(after);
                daemon.kill();
                false
            }
        };
        tally.killed(moved, crew.fsyncs.load(Ordering::Relaxed));
        self.remember(crew, After::Crash);
        self.kills += 1;
        let sound = verify(&*host_file(&self.image))
            .and_then(|()| qemu::check_allowing_leaks(&self.image).map_err(|e| e.to_string()));
        sound.unwrap_or_else(|e| panic!("{} after {} kills: {e}", self.options, self.kills));
        if rng.one_in(8) {
            self.judge_by_qemu();
        }
    }

    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    pub fn image(&self) -> &Path {
        &self.image
    }

    /// The disk holds now what it may hold after the work of `crew`, which ended like this.
    pub fn remember(&mut self, crew: Crew, after: After) {
        self.oracle = crew.oracle.into_inner();
        self.after = after;
    }

    /// The disk holds what it may; what that is.
    pub fn judge(&self, file: &File) -> Vec<u8> {
        let mut found = vec![0; DISK as usize];
        file.read_exact_at(&mut found, 0).unwrap();
        self.assert_allowed(&found);
        found
    }

    fn judge_by_qemu(&self) {
        self.assert_allowed(&qemu::contents(&self.image, None));
    }

    fn assert_allowed(&self, found: &[u8]) {
        let allowed = self.oracle.check(found, 0, self.after);
        allowed.unwrap_or_else(|e| panic!("{} after {} kills: {e}", self.options, self.kills));
    }

    /// Mounted once more and closed in order, nothing has leaked.
    pub fn end(self) {
        let daemon = Daemon::start(&self.lab);
        let file = open(&daemon, false);
        self.judge(&file);
        daemon.wait_for_leaks();
        drop(file);
        daemon.umount();
        assert_sound(&self.image);
        self.judge_by_qemu();
    }
}

pub fn open(daemon: &Daemon, direct: bool) -> File {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let mut options = File::options();
    options.read(true).write(true).custom_flags(flags);
    options.open(daemon.path("disk.raw")).unwrap()
}

/// Clients that write to one disk at the same time, each to its own part.
pub struct Crew {
    oracle: Mutex<Oracle>,
    /// The number of the next operation.
    number: AtomicU64,
    /// The sectors of blocks that hold data, and so are allocated.
    allocated: Vec<u64>,
    may_allocate: AtomicBool,
    stops: AtomicBool,
    fsyncs: AtomicU64,
}

impl Crew {
    /// Clients of a disk that holds `found`; until they are told, they only write in place.
    pub fn new(found: &[u8]) -> Crew {
        let blocks = (0..).step_by(BLOCK as usize).zip(found.chunks((BLOCK * SECTOR) as usize));
        let holds_data = |block: &[u8]| block.iter().any(|byte| *byte != 0);
        Crew {
            oracle: Mutex::new(Oracle::new(found, SECTORS)),
            number: AtomicU64::new(1),
            allocated: blocks.filter(|(_, block)| holds_data(block)).map(|(at, _)| at).collect(),
            may_allocate: AtomicBool::new(false),
            stops: AtomicBool::new(false),
            fsyncs: AtomicU64::new(0),
        }
    }

    /// All work until the mount is gone or they are stopped; one of which `meanwhile` sees to.
    pub fn work<R>(&self, file: &File, rng: &mut Rng, meanwhile: impl FnOnce() -> R) -> R {
        thread::scope(|scope| {
            for place in 0..CLIENTS {
                let part = SECTORS * place / CLIENTS / BLOCK * BLOCK;
                let end = SECTORS * (place + 1) / CLIENTS / BLOCK * BLOCK;
                let rng = Rng::new(rng.next());
                let mut client = Client { crew: self, file, part: part..end, rng };
                scope.spawn(move || while client.step().is_ok() {});
            }
            meanwhile()
        })
    }

    /// Discards much of the disk, so that there is something to move.
    fn thin_out(&self, file: &File, rng: &mut Rng) {
        let mut client = Client { crew: self, file, part: 0..SECTORS, rng: Rng::new(rng.next()) };
        for at in (0..SECTORS).step_by(THIN as usize).filter(|_| rng.one_in(4)) {
            let thin = Operation { kind: Kind::Zero, sectors: at..at + THIN };
            client.run(&thin).unwrap();
        }
        client.run(&FLUSH).unwrap();
    }

    pub fn allocate(&self) {
        self.may_allocate.store(true, Ordering::Relaxed);
    }

    pub fn stop(&self) {
        self.stops.store(true, Ordering::Relaxed);
    }

    /// Waits until so many more operations have begun.
    pub fn wait_for_more(&self, operations: u64, limit: Duration) {
        let begun = || self.number.load(Ordering::Relaxed);
        let wanted = begun() + operations;
        eventually(limit, || begun() >= wanted, || format!("{} operations", begun()));
    }
}

struct Client<'a> {
    crew: &'a Crew,
    file: &'a File,
    part: std::ops::Range<u64>,
    rng: Rng,
}

impl Client<'_> {
    /// Does something to the disk; an error when the mount is gone, or when it is time to stop.
    fn step(&mut self) -> io::Result<()> {
        if self.crew.stops.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let operation = match self.crew.may_allocate.load(Ordering::Relaxed) {
            true => self.any_operation(),
            false => {
                // For the time of the recycler's wait; others need the processors too.
                thread::sleep(Duration::from_millis(2));
                self.write_in_place()
            }
        };
        self.run(&operation)
    }

    /// Does it, with the oracle knowing.
    fn run(&mut self, operation: &Operation) -> io::Result<()> {
        let number = self.crew.number.fetch_add(1, Ordering::Relaxed);
        self.crew.oracle.lock().begin(number, operation);
        self.perform(number, operation)?;
        self.crew.oracle.lock().succeed(number, operation);
        let is_flush = operation.kind == Kind::Flush;
        self.crew.fsyncs.fetch_add(u64::from(is_flush), Ordering::Relaxed);
        Ok(())
    }

    fn any_operation(&mut self) -> Operation {
        let kind = *self.rng.pick(&[Kind::Write, Kind::Write, Kind::Zero, Kind::Flush]);
        if kind == Kind::Flush {
            return FLUSH;
        }
        let longest = *self.rng.pick(&[8, 128, 512]);
        let range = self.rng.range(self.part.end - self.part.start, longest, &[1, BLOCK, 128]);
        Operation { kind, sectors: self.part.start + range.start..self.part.start + range.end }
    }

    /// What keeps nobody from moving clusters.
    fn write_in_place(&mut self) -> Operation {
        let from = self.crew.allocated.partition_point(|at| *at < self.part.start);
        let to = self.crew.allocated.partition_point(|at| *at < self.part.end);
        if from == to || self.rng.one_in(4) {
            return FLUSH;
        }
        let block = *self.rng.pick(&self.crew.allocated[from..to]);
        Operation { kind: Kind::Write, sectors: block..block + BLOCK }
    }

    fn perform(&mut self, number: u64, operation: &Operation) -> io::Result<()> {
        let Operation { kind, sectors } = operation;
        let offset = sectors.start * SECTOR;
        match kind {
            Kind::Write => self.file.write_all_at(&data(number, sectors.clone()), offset),
            Kind::Flush => self.file.sync_data(),
            _ => self.clear(offset, (sectors.end - sectors.start) * SECTOR),
        }
    }

    fn clear(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let mode = if self.rng.one_in(4) { libc::FALLOC_FL_ZERO_RANGE } else { punch };
        let (offset, length) = (offset as libc::off_t, length as libc::off_t);
        // SAFETY: fallocate takes no pointers; the file is open.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, length) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
