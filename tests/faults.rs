//! Host errors: every operation of a short history on the host file fails, once or for good, as a
//! whole or half way. The client sees that errno and no other; what was acknowledged reads back;
//! when the fault is over, writing goes on, unless a sync failed: then what is on disk is not known,
//! the image takes no more writes and no flush succeeds. Whatever happened, the file that is left
//! opens, holds what the oracle allows and is not corrupt.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod support;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use qcow2fs::image::{CompactAfter, CreateOptions, Image, Options};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::{
    self, FailingStorage, Fate, Fault, MemoryStorage, Operation as Host, RecordingStorage,
};
use qcow2fs::{Error, ErrorKind};
use support::made::Made;
use support::oracle::{After, Kind, Operation, Oracle, data};
use support::qemu::{DataFile, Shape};
use support::rng::{Rng, fresh_seed};
use support::{SECTOR, Watchdog, open_read_only, scratch, setting, verify, verify_clean};

/// A client of an image on a file that may fail.
struct Client<'a> {
    made: &'a Made,
    image: Arc<Image>,
    file: Arc<FailingStorage>,
    inner: Arc<RecordingStorage>,
    /// The external data file, which fails together with the image file.
    data: Option<Arc<RecordingStorage>>,
    fault: Option<Fault>,
    oracle: Oracle,
    next: u64,
    sectors: u64,
    began: Instant,
    /// What was recorded when the first operation after which a sync had failed was over.
    at_failed_sync: Option<usize>,
}

/// The file with nothing wrong yet.
fn begin(made: &Made, keep_erased: u64) -> Client<'_> {
    let began = Instant::now();
    let inner = Arc::new(RecordingStorage::new(made.file()));
    let file = Arc::new(FailingStorage::new(inner.clone()));
    let flush_after = Duration::from_secs(600);
    let metadata_cache = 4096;
    // Nothing is in the background: which operation has which number follows from the seed.
    let return_leaks = false;
    let compact_after = CompactAfter::Off;
    let options = Options {
        writable: true,
        keep_erased,
        flush_after,
        metadata_cache,
        return_leaks,
        compact_after,
        threads: false,
        ..Options::default()
    };
    let data = made.data().map(|data| Arc::new(inner.beside(1, data)));
    let failing = data.clone().map(|data| Arc::new(file.beside(data)) as Arc<dyn Storage>);
    let image = made.open_on(file.clone(), failing, &options).unwrap();
    let sectors = image.virtual_size() / SECTOR;
    let oracle = Oracle::new(&made.contents, sectors);
    Client {
        made,
        image,
        file,
        inner,
        data,
        fault: None,
        oracle,
        next: 1,
        sectors,
        began,
        at_failed_sync: None,
    }
}

impl Client<'_> {
    /// Does an operation; a failure must be the fault's.
    fn act(
        &mut self,
        operation: Operation,
        act: impl FnOnce(&Image, u64) -> qcow2fs::Result<()>,
    ) -> qcow2fs::Result<()> {
        let number = self.next;
        self.next += 1;
        let struck_before = self.sync_failed();
        self.oracle.begin(number, &operation);
        let result = act(&self.image, number);
        match &result {
            Ok(()) if operation.kind == Kind::Flush && struck_before => {
                panic!("a flush succeeded after a sync had failed");
            }
            Ok(()) => self.oracle.succeed(number, &operation),
            Err(e) => self.assert_expected(e),
        }
        if self.sync_failed() {
            let recorded = self.inner.log().len();
            let before = *self.at_failed_sync.get_or_insert(recorded);
            assert_eq!(recorded, before, "written after a failed sync");
        }
        result
    }

    fn assert_expected(&self, error: &Error) {
        let errno = self.fault.as_ref().map(|fault| fault.errno);
        let struck = !self.file.strikes().is_empty();
        let expected = struck && Some(error.errno()) == errno;
        let latched = struck && matches!(error.errno(), libc::EROFS | libc::EIO) && self.latched();
        assert!(expected || latched, "{error} ({:?}) with {:?}", error.kind(), self.fault);
    }

    fn latched(&self) -> bool {
        !self.image.is_writable()
    }

    fn sync_failed(&self) -> bool {
        self.file.strikes().iter().any(|strike| strike.operation == Host::Sync)
    }

    fn write(&mut self, sectors: std::ops::Range<u64>) -> qcow2fs::Result<()> {
        let operation = Operation { kind: Kind::Write, sectors: sectors.clone() };
        self.act(operation, |image, number| {
            image.write(sectors.start * SECTOR, &data(number, sectors))
        })
    }

    fn clear(&mut self, sectors: std::ops::Range<u64>, discard: bool) -> qcow2fs::Result<()> {
        let bytes = sectors.start * SECTOR..sectors.end * SECTOR;
        self.act(Operation { kind: Kind::Zero, sectors }, |image, _| match discard {
            true => image.discard(bytes),
            false => image.write_zeroes(bytes),
        })
    }

    fn flush(&mut self) -> qcow2fs::Result<()> {
        self.act(Operation { kind: Kind::Flush, sectors: 0..0 }, |image, _| image.flush())
    }

    fn compact(&mut self) -> qcow2fs::Result<()> {
        self.image.compact(|_| true).inspect_err(|e| self.assert_expected(e))
    }

    /// Has the recycler work, with all due that waits or nothing. What fails there is tried again.
    fn recycle(&mut self, late: bool) -> qcow2fs::Result<()> {
        let now = self.began + Duration::from_secs(if late { 3600 } else { 0 });
        for _ in 0..20 {
            match self.image.recycle(now) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(e) => {
                    self.assert_expected(&e);
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    fn close(&mut self) -> qcow2fs::Result<()> {
        let everything = Operation { kind: Kind::Flush, sectors: 0..0 };
        let result = self.act(everything, |image, _| image.close());
        assert!(result.is_err() || !self.sync_failed(), "closed without a word of the failed sync");
        result
    }

    /// A short history that a seed fixes; errors are as they come.
    fn run(&mut self, seed: u64) {
        let mut rng = Rng::new(seed);
        for _ in 0..rng.within(8..30) {
            let start = rng.within(0..self.sectors);
            let longest = *rng.pick(&[2, 20, self.sectors]);
            let sectors = start..(start + rng.within(1..longest + 1)).min(self.sectors);
            let _seen = match rng.within(0..10) {
                0..5 => self.write(sectors),
                5 => self.clear(sectors, false),
                6 | 7 => self.clear(sectors, true),
                8 => self.flush(),
                _ if rng.one_in(3) => self.compact(),
                _ if rng.one_in(2) => {
                    let bytes = sectors.start * SECTOR..sectors.end * SECTOR;
                    self.image.preallocate(bytes).inspect_err(|e| self.assert_expected(e))
                }
                _ => self.recycle(rng.one_in(2)),
            };
        }
    }

    /// Everything reads as what was acknowledged, or as what failed later.
    fn assert_reads(&self) {
        let mut disk = vec![0xee; (self.sectors * SECTOR) as usize];
        self.image.read(0, &mut disk).unwrap();
        self.oracle.check(&disk, 0, After::Running).unwrap();
    }

    /// What has to hold when the fault is over.
    fn assert_recovers(&mut self) {
        self.file.disarm();
        self.assert_reads();
        let strikes = self.file.strikes();
        if self.sync_failed() {
            let error = self.write(0..1).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ReadOnly, "after a failed sync: {error}");
            assert!(self.flush().is_err(), "after a failed sync a flush succeeded");
            self.assert_reads();
        } else if self.latched() {
            // A header write that failed leaves it unknown what is on disk, too.
            let reason = self.image.status().unwrap().health;
            assert!(
                reason.contains("header") || reason.contains("linking"),
                "{strikes:?}: {reason}"
            );
        } else {
            self.write(0..self.sectors).unwrap();
            self.clear(1..2, true).unwrap();
            self.flush().unwrap();
            self.assert_reads();
        }
    }

    /// A crash now, the fault's traces still fresh, leaves a sound file too.
    fn assert_sound_after_crash(&self, rng: &mut Rng) {
        let walked = |storage: &Arc<RecordingStorage>| {
            let mut replay = storage.replay();
            while replay.step().unwrap().is_some() {}
            replay
        };
        let (file, data) = (walked(&self.inner), self.data.as_ref().map(walked));
        let crash = |fate: &mut dyn FnMut() -> Fate| {
            let data = data.as_ref().map(|data| data.crash(|_| fate()).unwrap());
            self.assert_sound_files(file.crash(|_| fate()).unwrap(), data);
        };
        crash(&mut || Fate::Kept);
        crash(&mut || Fate::Lost);
        for _ in 0..6 {
            crash(&mut || *rng.pick(&[Fate::Kept, Fate::Lost]));
        }
    }

    /// What is left of the image must be sound and hold what it may.
    fn assert_sound_files(&self, file: MemoryStorage, data: Option<MemoryStorage>) {
        let file = Arc::new(file);
        verify(&*file).unwrap();
        let data = data.map(|data| Arc::new(data) as Arc<dyn Storage>);
        let image = open_read_only(file, self.made.beside(data)).unwrap();
        let mut disk = vec![0xee; (self.sectors * SECTOR) as usize];
        image.read(0, &mut disk).unwrap();
        self.oracle.check(&disk, 0, After::Crash).unwrap();
    }
}

/// Says which fault it was when something is not as it should be.
struct Scene {
    seed: u64,
    fault: Fault,
    shape: Shape,
}

impl Drop for Scene {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Scene { seed, fault, shape } = self;
            eprintln!("with QCOW2FS_SEED={seed}, {shape} {} bytes: {fault:?}", shape.size);
        }
    }
}

/// One history with one fault. Whether the fault happened.
fn suffer(made: &Made, keep_erased: u64, scene: Scene, recover_first: bool) -> bool {
    let mut client = begin(made, keep_erased);
    client.fault = Some(scene.fault.clone());
    client.file.arm(scene.fault.clone());
    client.run(scene.seed);
    client.assert_sound_after_crash(&mut Rng::new(scene.seed ^ scene.fault.after));
    if recover_first {
        client.assert_recovers();
    }
    let _may_fail = client.close();
    client.assert_sound_after_crash(&mut Rng::new(scene.seed ^ scene.fault.after));
    let data = client.data.as_ref().map(|data| data.current().fork());
    client.assert_sound_files(client.inner.current().fork(), data);
    !client.file.strikes().is_empty()
}

/// Cluster bits, refcount bits and size of the images.
const SHAPES: [(u32, u32, u64); 3] = [(9, 64, 100 << 10), (12, 16, 200 << 10), (16, 1, 400 << 10)];

/// Every operation of `kinds` fails in turn, in each of the ways; for `seconds` at most.
fn fail_each(name: &str, kinds: &[Host], seconds: u64) {
    let first = setting("QCOW2FS_SEED").unwrap_or_else(fresh_seed);
    let limit = Duration::from_secs(setting("QCOW2FS_MODEL_SECONDS").unwrap_or(seconds));
    let started = std::time::Instant::now();
    let (mut runs, mut struck) = (0u64, 0u64);
    let mut seed = first;
    while started.elapsed() < limit {
        let mut rng = Rng::new(seed);
        let &(cluster_bits, refcount_bits, size) = rng.pick(&SHAPES);
        let extended_l2 = cluster_bits >= 14 && rng.one_in(2);
        let data_file = match rng.within(0..4) {
            0 if !extended_l2 => DataFile::Plain,
            1 if !extended_l2 => DataFile::Raw,
            _ => DataFile::None,
        };
        let plain = Shape::new(cluster_bits, refcount_bits, size);
        let shape = Shape { extended_l2, data_file, ..plain };
        let directory = scratch();
        let made = Made::furnished(shape, directory.path(), &mut rng);
        let keep_erased = *rng.pick(&[0, 16 << 10]);
        for after in 0.. {
            let mut any = false;
            for (errno, lasting, short, recover_first) in [
                (libc::EIO, false, false, true),
                (libc::ENOSPC, false, true, true),
                (libc::EDQUOT, true, false, true),
                (libc::EIO, true, true, false),
                (libc::ENOSPC, true, true, true),
                (libc::EINTR, false, true, true),
            ] {
                let fault = Fault { on: kinds.to_vec(), after, lasting, errno, short };
                let scene = Scene { seed, fault, shape: made.shape.clone() };
                let _watchdog = Watchdog::new(format!("{name}, seed {seed}"), 60);
                any |= suffer(&made, keep_erased, scene, recover_first);
                runs += 1;
            }
            struck += u64::from(any);
            // Until no such operation is left to fail.
            if !any || started.elapsed() > limit {
                break;
            }
        }
        seed += 1;
    }
    println!("{name}: {runs} histories, {struck} places, seeds {first}..{seed}");
    assert!(struck > 0, "nothing ever failed");
}

#[test]
fn a_failed_change_is_reported_and_leaves_the_image_sound() {
    let kinds = [Host::Write, Host::SetLen, Host::Punch, Host::Zero, Host::Allocate];
    fail_each("failed changes", &kinds, 10);
}

#[test]
fn a_failed_sync_ends_all_writing() {
    fail_each("failed syncs", &[Host::Sync], 8);
}

/// The host tells of an error once, whoever has asked.
#[test]
fn a_failed_sync_of_attributes_ends_all_writing() {
    let storage = Arc::new(MemoryStorage::default());
    let created = CreateOptions { virtual_size: 1 << 20, ..CreateOptions::default() };
    Image::create(&*storage, &created).unwrap();
    let image = Image::open(storage, &Options { writable: true, ..Options::default() }).unwrap();
    image.sync_with(|| Ok(())).unwrap();
    image.write(0, &[1; 512]).unwrap();
    let failed = image.sync_with(|| Err(io::Error::from_raw_os_error(libc::EIO))).unwrap_err();
    assert_eq!(failed.errno(), libc::EIO);
    assert_eq!(image.flush().unwrap_err().errno(), libc::EIO);
    assert!(!image.is_writable());
    let _says_so_again = image.close();
}

#[test]
fn a_failed_read_is_reported_and_leaves_the_image_sound() {
    fail_each("failed reads", &[Host::Read], 8);
}

/// A host file system that has no more than so many bytes for the file.
struct SmallDisk {
    inner: MemoryStorage,
    limit: AtomicU64,
}

impl SmallDisk {
    /// Fails where the holes in `range` need more blocks than there are.
    fn check_room(&self, range: std::ops::Range<u64>) -> io::Result<()> {
        let block = MemoryStorage::BLOCK;
        let blocks = (range.start / block..range.end.div_ceil(block)).map(|n| n * block);
        let is_hole = |at: &u64| {
            let data = self.inner.seek_data(*at).unwrap();
            data.is_none_or(|data| data >= at + block)
        };
        let needed = blocks.filter(is_hole).count() as u64 * block;
        match self.inner.allocated()? + needed <= self.limit.load(Ordering::Relaxed) || needed == 0
        {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }
}

impl testing::Layer for SmallDisk {
    fn below(&self) -> &dyn Storage {
        &self.inner
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.check_room(offset..offset + data.len() as u64)?;
        self.inner.write_at(data, offset)
    }

    fn allocate(&self, range: std::ops::Range<u64>) -> io::Result<()> {
        self.check_room(range.clone())?;
        self.inner.allocate(range)
    }
}

/// With no free byte on the host: what needs one fails with `ENOSPC`, and nothing else does. What is
/// discarded comes back, and writing goes on.
#[test]
fn a_full_host_takes_discards_and_writes_in_place_and_recovers() {
    let mut full = 0;
    for seed in 1..=40 {
        let mut rng = Rng::new(seed);
        let size = 400 << 10;
        let plain = Shape::new(*rng.pick(&[12, 13, 16]), 16, size);
        let extended_l2 = plain.cluster_bits == 16 && rng.one_in(2);
        let directory = scratch();
        let made = Made::empty(Shape { extended_l2, ..plain }, directory.path());
        let disk = Arc::new(SmallDisk { inner: made.file(), limit: AtomicU64::new(u64::MAX) });
        let keep_erased = *rng.pick(&[0, 64 << 10]);
        let options = Options {
            writable: true,
            keep_erased,
            compact_after: CompactAfter::Off,
            threads: false,
            ..Options::default()
        };
        let image = made.open_on(disk.clone(), None, &options).unwrap();
        let now = Instant::now();
        let half = (size / 2) as usize;
        image.write(0, &vec![1; half]).unwrap();
        image.flush().unwrap();
        while image.recycle(now).unwrap() {}
        disk.limit.store(disk.allocated().unwrap(), Ordering::Relaxed);

        // Until nothing is left of what was reserved beforehand.
        let mut end = size / 2;
        let failed = loop {
            let piece = rng.within(1..40) * SECTOR;
            if end + piece > size {
                break None;
            }
            match image.write(end, &vec![2; piece as usize]) {
                Ok(()) => end += piece,
                Err(e) => break Some(e),
            }
        };
        let Some(failed) = failed else { continue };
        full += 1;
        assert_eq!(failed.errno(), libc::ENOSPC, "{failed}");
        assert!(image.is_writable());
        let mut found = vec![9; size as usize];
        image.read(0, &mut found).unwrap();
        assert!(
            found[..half].iter().all(|b| *b == 1)
                && found[half..end as usize].iter().all(|b| *b == 2)
        );

        image.write(3 * SECTOR, &[3; 4096]).unwrap();
        image.flush().unwrap();
        image.discard(64 << 10..128 << 10).unwrap();
        image.flush().unwrap();
        while image.recycle(now).unwrap() {}
        assert!(
            disk.allocated().unwrap() < disk.limit.load(Ordering::Relaxed),
            "nothing came back"
        );
        image.write(end, &[4; 4096]).unwrap();
        image.flush().unwrap();
        image.close().unwrap();
        verify_clean(&disk.inner).unwrap();
        let image = open_read_only(Arc::new(disk.inner.fork()), made.beside(None)).unwrap();
        image.read(0, &mut found).unwrap();
        assert!(found[64 << 10..128 << 10].iter().all(|b| *b == 0));
        assert!(found[end as usize..end as usize + 4096].iter().all(|b| *b == 4));
    }
    println!("{full} hosts were full");
    assert!(full > 10);
}

#[test]
fn any_failure_leaves_the_image_sound() {
    let mut kinds = Host::CHANGES.to_vec();
    kinds.push(Host::Read);
    fail_each("any failure", &kinds, 8);
}
