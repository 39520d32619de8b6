//! Compaction at its edges: ends of files that cannot get shorter, clients that never stop, narrow
//! refcounts, tables that take each other's places, places that blocks have left, hosts that fail;
//! and every short sequence of what can be done to a small image.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod support;

use std::io;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use qcow2fs::format::{Header, HostCluster, HostOffset};
use qcow2fs::image::{CompactAfter, Image, Options};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::{
    self, Entry, FailingStorage, Fate, Fault, MemoryStorage, Operation as Host, RecordingStorage,
};
use qcow2fs::tables::{Edit, MetadataMap, Tables};
use support::qemu;
use support::rng::Rng;
use support::{Watchdog, for_seeds, scratch, verify, verify_clean};

const KIB: u64 = 1 << 10;

/// Open for writing, nothing done by itself, everything asserted.
fn quiet() -> Options {
    Options {
        writable: true,
        flush_after: Duration::from_secs(600),
        keep_erased: 0,
        return_leaks: false,
        compact_after: CompactAfter::Off,
        runtime_asserts: true,
        ..Options::default()
    }
}

/// Open for writing, and compacting as soon as there is anything to win.
fn eager() -> Options {
    Options {
        flush_after: Duration::from_millis(10),
        compact_after: CompactAfter::Bytes(1),
        settle_after: Duration::from_millis(5),
        ..quiet()
    }
}

fn create(path: &Path, options: &str, size: u64) {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-o", options]).arg(path);
    qemu::run(command.arg(size.to_string()));
}

fn made(options: &str, size: u64) -> Vec<u8> {
    let directory = scratch();
    let path = directory.path().join("disk.qcow2");
    create(&path, options, size);
    std::fs::read(path).unwrap()
}

/// Data of which no two clusters are alike.
fn noise(seed: u64, length: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    (0..length / 8).flat_map(|_| rng.next().to_le_bytes()).collect()
}

/// Six clusters of data, each full of its number from 1, not in the order of the disk; all of it in the
/// snapshot `first` too, if there is one.
fn scattered(cluster: u64, has_snapshot: bool) -> MemoryStorage {
    let directory = scratch();
    let path = directory.path().join("disk.qcow2");
    create(&path, &format!("cluster_size={cluster}"), 6 * cluster);
    let writes =
        [5, 4, 0, 1, 2, 3].map(|n| format!("write -P {} {} {cluster}", n + 1, n * cluster));
    qemu::io(&path, &writes);
    if has_snapshot {
        qemu::run(Command::new("qemu-img").args(["snapshot", "-c", "first"]).arg(&path));
    }
    MemoryStorage::new(std::fs::read(&path).unwrap())
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.virtual_size() as usize];
    image.read(0, &mut bytes).unwrap();
    bytes
}

fn be(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

/// Where the refcount of `cluster` is in the file; refcounts have 16 bits.
fn place_of_refcount(bytes: &[u8], cluster: u64, cluster_size: u64) -> usize {
    let per_block = cluster_size / 2;
    let block = be(bytes, be(bytes, 48) + cluster / per_block * 8);
    (block + cluster % per_block * 2) as usize
}

#[test]
fn an_end_that_cannot_move_is_left_alone_after_one_pass() {
    let _watchdog = Watchdog::new("a pinned end", 60);
    let file = Arc::new(MemoryStorage::new(made("cluster_size=4096", 1024 * KIB)));
    let image = Image::open(file.clone(), &quiet()).unwrap();
    image.write(0, &noise(1, 1024 * KIB)).unwrap();
    image.close().unwrap();
    // The last cluster is counted twice, so nobody knows what else refers to it.
    let mut bytes = file.contents();
    let last = bytes.len() as u64 / 4096 - 1;
    let at = place_of_refcount(&bytes, last, 4096);
    bytes[at + 1] = 2;
    let file = Arc::new(MemoryStorage::new(bytes));
    let options = Options { keep_erased: 64 * KIB, runtime_asserts: false, ..eager() };
    let image = Image::open(file.clone(), &options).unwrap();
    // Allocates, so that there is a pool, which is given up later.
    image.discard(0..1000 * KIB).unwrap();
    image.flush().unwrap();
    image.write(0, &noise(2, 64 * KIB)).unwrap();
    image.flush().unwrap();
    std::thread::sleep(Duration::from_millis(4500));
    let prospect = image.prospect().unwrap();
    assert!(prospect.win() > 100, "{prospect:?}: the last cluster stays");
    let before = image.status().unwrap().flushes;
    std::thread::sleep(Duration::from_secs(1));
    let flushes = image.status().unwrap().flushes - before;
    assert!(flushes <= 2, "{flushes} flushes in a second of nothing");
    image.close().unwrap();
}

#[test]
fn a_pass_ends_though_a_client_never_does() {
    let _watchdog = Watchdog::new("a pass beside a client", 60);
    let file =
        Arc::new(RecordingStorage::new(MemoryStorage::new(made("cluster_size=4096", 1024 * KIB))));
    let options = Options { settle_after: Duration::from_millis(1), ..eager() };
    let image = Image::open(file, &options).unwrap();
    image.write(0, &noise(1, 1024 * KIB)).unwrap();
    image.flush().unwrap();
    let stop = AtomicBool::new(false);
    let (mut began, mut ended) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut rng = Rng::new(3);
            let data = noise(9, 4 * KIB);
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..5000 {
                    let at = rng.within(0..256) * 4096;
                    match rng.one_in(2) {
                        true => image.write(at, &data).unwrap(),
                        false => image.discard(at..at + 4096).unwrap(),
                    }
                }
                // Long enough for a pass to begin, and not for it to end.
                std::thread::sleep(Duration::from_millis(rng.within(0..150)));
            }
        });
        let started = Instant::now();
        let mut running = false;
        while (began < 3 || ended < 3) && started.elapsed() < Duration::from_secs(40) {
            let now = image.status().unwrap().compaction.running;
            began += u64::from(now && !running);
            ended += u64::from(!now && running);
            running = now;
            std::thread::sleep(Duration::from_micros(200));
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("{began} passes began, {ended} ended");
    assert!(began >= 3 && ended >= 3, "{began} passes began, {ended} ended");
    image.close().unwrap();
}

/// Makes a compressed image of clusters that are nearly all zeros, no two alike; what it holds.
fn compressed(path: &Path, options: &str, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    for (n, cluster) in bytes.chunks_mut(4096).enumerate() {
        cluster[..8].copy_from_slice(&(n as u64 + 1).to_le_bytes());
    }
    let raw = path.with_extension("raw");
    std::fs::write(&raw, &bytes).unwrap();
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-c", "-O", "qcow2", "-o", options]);
    qemu::run(convert.arg(&raw).arg(path));
    bytes
}

/// A snapshot refers to each piece of a host cluster once more.
#[test]
fn packing_leaves_room_for_a_snapshot_in_narrow_refcounts() {
    for refcount_bits in [2, 4, 8, 16] {
        let directory = scratch();
        let path = directory.path().join("disk.qcow2");
        let options = format!("cluster_size=4096,refcount_bits={refcount_bits}");
        let mut bytes = compressed(&path, &options, 4096 * KIB);
        let file = Arc::new(MemoryStorage::new(std::fs::read(&path).unwrap()));
        let image = Image::open(file.clone(), &quiet()).unwrap();
        for (n, cluster) in bytes.chunks_mut(4096).enumerate().filter(|(n, _)| n % 3 != 1) {
            image.discard(n as u64 * 4096..(n as u64 + 1) * 4096).unwrap();
            cluster.fill(0);
        }
        image.flush().unwrap();
        let before = image.prospect().unwrap();
        image.compact(|_| true).unwrap();
        let after = image.prospect().unwrap();
        println!("{refcount_bits} bits: {before:?}, {after:?}");
        assert!(after.used <= before.used, "{refcount_bits} bits: {before:?}, {after:?}");
        // Of one each nothing can be packed, of fifteen five are left.
        assert!(refcount_bits != 4 || after.used < before.used * 9 / 10, "nothing was packed");
        image.take_snapshot(b"s").unwrap_or_else(|e| panic!("{refcount_bits} bits: {e}"));
        assert!(read_all(&image) == bytes, "{refcount_bits} bits");
        image.close().unwrap();
        verify_clean(&*file).unwrap();
        std::fs::write(&path, file.contents()).unwrap();
        qemu::assert_clean(&path);
        assert!(qemu::contents(&path, Some("s")) == bytes, "{refcount_bits} bits");
    }
}

#[test]
fn compressed_data_is_packed_as_far_as_refcounts_are_wide() {
    for refcount_bits in [1u64, 2, 4, 8, 16, 64] {
        let directory = scratch();
        let path = directory.path().join("disk.qcow2");
        let options = format!("cluster_size=4096,refcount_bits={refcount_bits}");
        let mut bytes = compressed(&path, &options, 2048 * KIB);
        let file = Arc::new(MemoryStorage::new(std::fs::read(&path).unwrap()));
        let image = Image::open(file.clone(), &quiet()).unwrap();
        // What is compressed well lies behind what is discarded.
        image.discard(0..1536 * KIB).unwrap();
        bytes[..1536 * KIB as usize].fill(0);
        image.compact(|_| true).unwrap();
        assert!(read_all(&image) == bytes, "{refcount_bits} bits");
        image.close().unwrap();
        verify_clean(&*file).unwrap();
        std::fs::write(&path, file.contents()).unwrap();
        qemu::assert_clean(&path);
        qemu::assert_same(&path, &bytes);
    }
}

/// A file that calls somebody when something was done to it.
struct Hooked {
    inner: Arc<RecordingStorage>,
    after_read: Mutex<Option<Box<dyn FnMut() + Send>>>,
    before_sync: Mutex<Option<Box<dyn FnMut() + Send>>>,
}

impl Hooked {
    fn new(bytes: Vec<u8>) -> Arc<Self> {
        let inner = Arc::new(RecordingStorage::new(MemoryStorage::new(bytes)));
        Arc::new(Hooked { inner, after_read: Mutex::default(), before_sync: Mutex::default() })
    }

    /// Calls it, unless it is being called.
    fn call(hook: &Mutex<Option<Box<dyn FnMut() + Send>>>) {
        let taken = hook.lock().take();
        if let Some(mut call) = taken {
            call();
            hook.lock().get_or_insert(call);
        }
    }
}

impl testing::Layer for Hooked {
    fn below(&self) -> &dyn Storage {
        &*self.inner
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buf, offset)?;
        Self::call(&self.after_read);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Self::call(&self.before_sync);
        self.inner.sync()
    }
}

/// Every state that a crash may leave, of all changes pending, none, all but one and one alone, is
/// free of corruption.
fn assert_every_crash_is_sound(file: &RecordingStorage) -> u64 {
    let mut replay = file.replay();
    let mut states = 0;
    loop {
        let pending = replay.pending().len();
        let mut look = |what: &str, keeps: &dyn Fn(usize) -> bool| {
            let fate = |n| if keeps(n) { Fate::Kept } else { Fate::Lost };
            let crashed = replay.crash(fate).unwrap();
            states += 1;
            if let Err(why) = verify(&crashed) {
                panic!("a crash at {} that keeps {what}: {why}", replay.position());
            }
        };
        look("all", &|_| true);
        look("none", &|_| false);
        let next_is_sync = matches!(replay.peek(), Some(Entry::Sync { .. }));
        for one in (0..pending).filter(|_| next_is_sync) {
            look("one", &|n| n == one);
            look("all but one", &|n| n != one);
        }
        if replay.step().unwrap().is_none() {
            return states;
        }
    }
}

#[test]
fn the_place_of_a_block_is_nobodys_until_nothing_on_disk_leads_there() {
    // QEMU puts the first cluster of data that a new block counts before the block.
    let directory = scratch();
    let path = directory.path().join("disk.qcow2");
    create(&path, "cluster_size=512", 512 * KIB);
    qemu::io(&path, &["write -P 7 0 512k".into()]);
    let file = Hooked::new(std::fs::read(&path).unwrap());
    let image = Image::open(file.clone(), &quiet()).unwrap();
    image.discard(16 * KIB..512 * KIB).unwrap();
    image.flush().unwrap();
    let (client, mut next) = (Arc::downgrade(&image), 100 * KIB);
    let all = Arc::new(Mutex::new(Vec::new()));
    let clients = all.clone();
    *file.before_sync.lock() = Some(Box::new(move || {
        // Somebody who allocates while the recycler waits for its sync.
        let (client, at) = (client.clone(), next);
        next += 2 * KIB;
        let writes = std::thread::spawn(move || {
            if let Some(image) = client.upgrade() {
                image.write(at, &noise(at, 2 * KIB)).unwrap();
            }
        });
        let started = Instant::now();
        while !writes.is_finished() && started.elapsed() < Duration::from_millis(50) {
            std::thread::yield_now();
        }
        clients.lock().push(writes);
    }));
    image.compact(|_| true).unwrap();
    *file.before_sync.lock() = None;
    all.lock().drain(..).for_each(|client| client.join().unwrap());
    image.close().unwrap();
    let states = assert_every_crash_is_sound(&file.inner);
    assert!(states > 200, "{states}");
    verify_clean(&*file.inner).unwrap();
}

/// Tables of an image of 512-byte clusters with one L2 table at cluster 1, and an L1 table at 0.
fn tables_over(file: Arc<dyn Storage>) -> Tables {
    let geometry = Header::parse(&made("cluster_size=512", 0)).unwrap().geometry;
    let metadata = Arc::new(MetadataMap::new(u64::MAX));
    Tables::open(file, geometry, metadata, HostOffset(0), 1, 0, &Arc::default()).unwrap()
}

fn word(index: u64) -> u64 {
    (index + 100) << 9
}

#[test]
fn a_cluster_that_becomes_a_table_again_is_read_anew() {
    let file = Arc::new(MemoryStorage::new(vec![0; 64 * 512]));
    let tables = tables_over(file.clone());
    assert_eq!(tables.raw_entry(HostCluster(5), 3).unwrap(), 0, "an old table");
    file.write_at(&word(3).to_be_bytes(), 5 * 512 + 24).unwrap();
    tables.forget_table(HostCluster(5));
    assert_eq!(tables.raw_entry(HostCluster(5), 3).unwrap(), word(3), "the new one");
}

#[test]
fn a_whole_table_has_what_was_flushed_and_evicted_while_it_was_read() {
    let file = Hooked::new(vec![0; 256 * 512]);
    let tables = Arc::new(tables_over(file.clone()));
    let table = HostCluster(5);
    let edit = Edit { table, index: 3, old: 0, new: word(3) };
    assert!(tables.edit(&[edit]).unwrap());
    let (others, host) = (tables.clone(), file.inner.clone());
    *file.after_read.lock() = Some(Box::new(move || {
        let dirty = others.collect(|| ());
        dirty.writes.iter().for_each(|(at, bytes)| host.write_at(bytes, *at).unwrap());
        others.collected(dirty, true);
        for other in 100..200 {
            others.raw_entry(HostCluster(other), 0).unwrap();
        }
    }));
    let bytes = tables.read_table(table).unwrap();
    *file.after_read.lock() = None;
    assert_eq!(be(&bytes, 24), word(3));
}

#[test]
fn a_write_that_fails_while_compressed_data_moves_leaves_counts_as_they_were() {
    let directory = scratch();
    let (path, raw) = (directory.path().join("disk.qcow2"), directory.path().join("disk.raw"));
    let bytes: Vec<u8> = (0..512 * KIB).map(|i| (i / 16 % 251) as u8).collect();
    std::fs::write(&raw, &bytes).unwrap();
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-c", "-O", "qcow2", "-o", "cluster_size=4096"]);
    qemu::run(convert.arg(&raw).arg(&path));
    let mut failed = 0;
    for after in 0.. {
        let file = Arc::new(MemoryStorage::new(std::fs::read(&path).unwrap()));
        let failing = Arc::new(FailingStorage::new(file.clone()));
        let image = Image::open(failing.clone(), &quiet()).unwrap();
        image.discard(0..256 * KIB).unwrap();
        image.flush().unwrap();
        let on = vec![Host::Write];
        failing.arm(Fault { on, after, lasting: false, errno: libc::EIO, short: false });
        let result = image.compact(|_| true);
        failing.disarm();
        let strikes = failing.strikes();
        let is_here = strikes.iter().any(|strike| strike.thread == std::thread::current().id());
        assert!(result.is_ok() || !strikes.is_empty(), "{result:?}");
        assert!(result.is_err() || !is_here, "{strikes:?} and no error");
        if image.is_writable() {
            // With assertions: what is counted is referenced.
            image.compact(|_| true).unwrap();
        }
        image.close().ok();
        verify(&*file).unwrap();
        if strikes.is_empty() {
            break;
        }
        failed += 1;
    }
    assert!(failed > 20, "{failed}");
}

/// An image with snapshots and compressed clusters.
struct Shared {
    path: std::path::PathBuf,
    cluster: u64,
    size: u64,
    /// What the disk holds.
    disk: Vec<u8>,
    /// What the snapshots hold, by name.
    snapshots: Vec<(String, Vec<u8>)>,
}

impl Shared {
    /// `None` where QEMU has spoiled its own image: compressed writes of tiny clusters.
    fn new(directory: &Path, rng: &mut Rng) -> Option<Self> {
        let path = directory.join("disk.qcow2");
        let cluster = *rng.pick(&[512, 512, 1024, 4096]);
        let size = cluster * rng.within(100..500);
        create(&path, &format!("cluster_size={cluster}"), size);
        let mut snapshots = Vec::new();
        for number in 0..rng.within(1..4) {
            let commands: Vec<_> = (0..8)
                .map(|_| {
                    let range = rng.range(size, 40 * cluster, &[cluster]);
                    let (compressed, length) = match rng.one_in(3) {
                        true => ("-c ", cluster.min(size - range.start)),
                        false => ("", range.end - range.start),
                    };
                    format!("write {compressed}-P {} {} {length}", rng.within(1..256), range.start)
                })
                .collect();
            let _some_may_fail = qemu::try_io(&path, &commands);
            let name = format!("s{number}");
            let mut take = Command::new("qemu-img");
            if !take.args(["snapshot", "-c", &name]).arg(&path).output().unwrap().status.success() {
                return None;
            }
            snapshots.push((name, qemu::contents(&path, None)));
        }
        qemu::repair_leaks(&path);
        verify(&*support::host_file(&path)).ok()?;
        let disk = qemu::contents(&path, None);
        Some(Shared { path, cluster, size, disk, snapshots })
    }

    fn file(&self) -> MemoryStorage {
        MemoryStorage::new(std::fs::read(&self.path).unwrap())
    }

    /// Writes and discards here and there.
    fn change(&mut self, image: &Image, rng: &mut Rng) {
        for _ in 0..rng.within(1..12) {
            let longest = *rng.pick(&[2, 20, 200]) * self.cluster;
            let range = rng.range(self.size, longest, &[512, self.cluster]);
            let bytes = range.start as usize..range.end as usize;
            match rng.one_in(2) {
                true => {
                    let data = noise(rng.next(), range.end - range.start);
                    self.disk[bytes.clone()].copy_from_slice(&data);
                    image.write(range.start, &data).unwrap();
                }
                false => {
                    self.disk[bytes].fill(0);
                    image.discard(range).unwrap();
                }
            }
        }
    }

    /// What is wrong with a state of the image on whose disk nothing has changed.
    fn complaint(&self, file: &MemoryStorage) -> Result<(), String> {
        verify(file)?;
        let read = |file: MemoryStorage| {
            let options = Options { writable: false, ..Options::default() };
            Image::open(Arc::new(file), &options).map(|image| read_all(&image))
        };
        let disk = read(file.fork()).map_err(|e| e.to_string())?;
        support::difference(&disk, &self.disk).map_or(Ok(()), |d| Err(format!("the disk: {d}")))?;
        let bytes = file.contents();
        let mut entry = be(&bytes, 64) as usize;
        for (name, expected) in &self.snapshots {
            // A disk with the snapshot's L1 table.
            let mut header = bytes[..512].to_vec();
            header[36..40].copy_from_slice(&bytes[entry + 8..entry + 12]);
            header[40..48].copy_from_slice(&bytes[entry..entry + 8]);
            let reverted = file.fork();
            reverted.write_at(&header, 0).unwrap();
            let found = read(reverted).map_err(|e| format!("{name}: {e}"))?;
            support::difference(&found, expected)
                .map_or(Ok(()), |d| Err(format!("{name}: {d}")))?;
            let half = |at: usize| be(&bytes, at as u64) as usize >> 48;
            let extra = be(&bytes, entry as u64 + 32) as u32 as usize;
            let length = 40 + extra + half(entry + 12) + half(entry + 14);
            entry += length.next_multiple_of(8);
        }
        Ok(())
    }
}

/// Random work in many rounds, so that tables and data take each other's places again and again.
#[test]
fn snapshots_keep_their_content_through_many_passes() {
    for_seeds("snapshots_keep_their_content_through_many_passes", 10, |seed| {
        let mut rng = Rng::new(seed);
        let directory = scratch();
        let Some(mut made) = Shared::new(directory.path(), &mut rng) else { return };
        let file = Arc::new(made.file());
        let options = Options { metadata_cache: *rng.pick(&[0, 1 << 20]), ..quiet() };
        let image = Image::open(file.clone(), &options).unwrap();
        for _ in 0..8 {
            made.change(&image, &mut rng);
            let mut steps = if rng.one_in(3) { rng.within(1..20) } else { u64::MAX };
            image
                .compact(|_| {
                    steps -= 1;
                    steps > 0
                })
                .unwrap();
            assert!(read_all(&image) == made.disk);
        }
        image.close().unwrap();
        verify_clean(&*file).unwrap();
        made.complaint(&file).unwrap();
        std::fs::write(&made.path, file.contents()).unwrap();
        qemu::assert_clean(&made.path);
        qemu::assert_same(&made.path, &made.disk);
        for (name, content) in &made.snapshots {
            let found = qemu::contents(&made.path, Some(name));
            assert!(support::difference(&found, content).is_none(), "{name}");
        }
    });
}

/// Compaction changes nothing that can be read, so every state that a crash may leave reads the
/// same: the disk and each snapshot.
#[test]
fn every_crash_of_a_pass_reads_what_was_there() {
    let mut states = 0u64;
    for_seeds("every_crash_of_a_pass_reads_what_was_there", 10, |seed| {
        let mut rng = Rng::new(seed);
        let directory = scratch();
        let Some(mut made) = Shared::new(directory.path(), &mut rng) else { return };
        let file = Arc::new(made.file());
        let image = Image::open(file.clone(), &quiet()).unwrap();
        made.change(&image, &mut rng);
        image.close().unwrap();
        let file = Arc::new(RecordingStorage::new(file.fork()));
        let image = Image::open(file.clone(), &quiet()).unwrap();
        image.compact(|_| true).unwrap();
        image.close().unwrap();
        let mut replay = file.replay();
        loop {
            let pending = replay.pending().len();
            let next_is_sync = matches!(replay.peek(), Some(Entry::Sync { .. }) | None);
            let mut look = |keeps: &dyn Fn(usize) -> bool| {
                let fate = |n| if keeps(n) { Fate::Kept } else { Fate::Lost };
                states += 1;
                let crashed = replay.crash(fate).unwrap();
                if let Err(why) = made.complaint(&crashed) {
                    let kept: Vec<_> = (0..pending).map(keeps).collect();
                    panic!("a crash at {} that keeps {kept:?}: {why}", replay.position());
                }
            };
            if next_is_sync {
                look(&|_| true);
                look(&|_| false);
                for _ in 0..pending.min(6) {
                    let one = rng.within(0..pending as u64) as usize;
                    look(&|n| n == one);
                    look(&|n| n != one);
                    let some = rng.next();
                    look(&|n| some >> (n % 64) & 1 == 1);
                }
            } else if rng.one_in(8) {
                let some = rng.next();
                look(&|n| some >> (n % 64) & 1 == 1);
            }
            if replay.step().unwrap().is_none() {
                break;
            }
        }
    });
    println!("{states} states");
}

/// What is done to an image of six data clusters.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64),
    Discard(u64),
    Flush,
    CompactSome,
    Compact,
    Reopen,
}

struct Small {
    file: Arc<MemoryStorage>,
    image: Arc<Image>,
    cluster: u64,
    expected: Vec<u8>,
    writes: u8,
}

impl Small {
    fn new(full: &MemoryStorage, cluster: u64) -> Self {
        let file = Arc::new(full.fork());
        let image = Image::open(file.clone(), &quiet()).unwrap();
        let expected = read_all(&image);
        Small { file, image, cluster, expected, writes: 100 }
    }

    fn take(&mut self, step: Step) {
        let bytes = |n: u64| n * self.cluster..(n + 1) * self.cluster;
        match step {
            Step::Write(n) => {
                self.writes += 1;
                let range = bytes(n);
                let place = range.start as usize..range.end as usize;
                self.expected[place.clone()].fill(self.writes);
                self.image.write(range.start, &self.expected[place]).unwrap();
            }
            Step::Discard(n) => {
                let range = bytes(n);
                self.expected[range.start as usize..range.end as usize].fill(0);
                self.image.discard(range).unwrap();
            }
            Step::Flush => {
                self.image.flush().unwrap();
                verify(&*self.file).unwrap();
                let disk = Image::open(
                    self.file.clone(),
                    &Options { writable: false, ..Options::default() },
                );
                assert!(read_all(&disk.unwrap()) == self.expected, "on disk");
            }
            Step::CompactSome => self.image.compact(|_| false).unwrap(),
            Step::Compact => {
                self.image.compact(|_| true).unwrap();
                let mut prospect = self.image.prospect().unwrap();
                // The recycler's thread may be freeing something at this moment, which counts.
                for _ in 0..20 {
                    if prospect.win() == 0 {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(5));
                    self.image.compact(|_| true).unwrap();
                    prospect = self.image.prospect().unwrap();
                }
                assert_eq!(prospect.win(), 0, "{prospect:?}");
            }
            Step::Reopen => {
                self.image.close().unwrap();
                verify_clean(&*self.file).unwrap();
                self.image = Image::open(self.file.clone(), &quiet()).unwrap();
            }
        }
        assert!(read_all(&self.image) == self.expected, "after {step:?}");
    }
}

#[test]
fn every_short_sequence_leaves_content_and_counts_right() {
    const STEPS: [Step; 10] = [
        Step::Write(0),
        Step::Write(3),
        Step::Write(5),
        Step::Discard(0),
        Step::Discard(3),
        Step::Discard(5),
        Step::Flush,
        Step::CompactSome,
        Step::Compact,
        Step::Reopen,
    ];
    let depth = support::setting("QCOW2FS_DEPTH").unwrap_or(4) as u32;
    let mut sequences = 0;
    for (cluster, snapshot) in [(512, false), (512, true), (4096, false)] {
        let full = scattered(cluster, snapshot);
        for length in 1..=depth {
            for number in 0..STEPS.len().pow(length) {
                let steps: Vec<_> = (0..length)
                    .map(|place| STEPS[number / STEPS.len().pow(place) % STEPS.len()])
                    .collect();
                let run = || {
                    let mut small = Small::new(&full, cluster);
                    steps.iter().for_each(|&step| small.take(step));
                    small.take(Step::Reopen);
                    small.image.close().unwrap();
                };
                if std::panic::catch_unwind(AssertUnwindSafe(run)).is_err() {
                    panic!("{steps:?} on {cluster}, snapshot {snapshot}");
                }
                sequences += 1;
            }
        }
    }
    println!("{sequences} sequences");
}

/// A client's step in the midst of the recycler's.
#[derive(Clone, Copy, Debug)]
enum Act {
    Write(u64),
    Discard(u64),
    Flush,
    /// Takes a snapshot; deletes it where it is there.
    Snapshot,
}

/// An image of six data clusters whose recycler works step by step, as it is told to.
struct Stepped {
    small: Small,
    now: Instant,
    /// What the snapshots hold, by name.
    snapshots: Vec<(&'static str, Vec<u8>)>,
}

impl Stepped {
    fn new(full: &MemoryStorage, cluster: u64, keep_erased: u64, is_shared: bool) -> Self {
        let file = Arc::new(full.fork());
        let options = Options {
            keep_erased,
            threads: false,
            settle_after: Duration::ZERO,
            flush_after: Duration::ZERO,
            ..eager()
        };
        let image = Image::open(file.clone(), &options).unwrap();
        let expected = read_all(&image);
        let snapshots = if is_shared { vec![("first", expected.clone())] } else { Vec::new() };
        let small = Small { file, image, cluster, expected, writes: 100 };
        Stepped { small, now: Instant::now(), snapshots }
    }

    /// Whether there was anything to do, whatever time had to pass for it.
    fn recycle(&mut self) -> bool {
        // What is due in some seconds, and what follows from that.
        let worked = (0..4).any(|_| {
            self.now += Duration::from_secs(60);
            self.small.image.recycle(self.now).unwrap()
        });
        verify(&*self.small.file).unwrap();
        worked
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Write(n) => self.small.take(Step::Write(n)),
            Act::Discard(n) => self.small.take(Step::Discard(n)),
            Act::Flush => self.small.take(Step::Flush),
            Act::Snapshot => match self.snapshots.iter().position(|(name, _)| *name == "second") {
                Some(at) => {
                    self.small.image.delete_snapshot(b"second").unwrap();
                    self.snapshots.remove(at);
                }
                None => {
                    self.small.image.take_snapshot(b"second").unwrap();
                    self.snapshots.push(("second", self.small.expected.clone()));
                }
            },
        }
        verify(&*self.small.file).unwrap();
    }

    fn finish(mut self) {
        for steps in 0.. {
            if !self.recycle() {
                break;
            }
            assert!(steps < 1000, "the recycler does not come to an end");
        }
        let prospect = self.small.image.prospect().unwrap();
        assert_eq!(prospect.win(), 0, "{prospect:?}, {:?}", self.small.image.status().unwrap());
        assert!(read_all(&self.small.image) == self.small.expected);
        for (name, content) in &self.snapshots {
            let view = self.small.image.open_snapshot(name.as_bytes()).unwrap();
            let mut found = vec![0xee; content.len()];
            view.read(0, &mut found).unwrap();
            assert!(found == *content, "{name}");
        }
        self.small.image.close().unwrap();
        verify_clean(&*self.small.file).unwrap();
    }
}

/// Runs `script`: each time so many steps of the recycler, then one of the client's. Whether the
/// recycler had so many to do before the last one.
fn run_script(mut stepped: Stepped, script: &[(u64, Act)]) -> bool {
    // There is something to free and to move then.
    [1, 4].into_iter().for_each(|n| stepped.small.take(Step::Discard(n)));
    let mut had_so_many = true;
    for &(steps, act) in script {
        had_so_many = (0..steps).all(|_| stepped.recycle());
        stepped.act(act);
    }
    stepped.finish();
    had_so_many
}

/// Runs all scripts that `script` begins, with at most `more` acts of the client after it; how many
/// there were.
fn run_scripts(new: &dyn Fn() -> Stepped, script: &mut Vec<(u64, Act)>, more: u64) -> u64 {
    const ACTS: [Act; 6] =
        [Act::Write(0), Act::Write(4), Act::Discard(0), Act::Discard(5), Act::Flush, Act::Snapshot];
    let mut scripts = 0;
    for act in ACTS {
        for steps in 0.. {
            script.push((steps, act));
            let ran = std::panic::catch_unwind(AssertUnwindSafe(|| run_script(new(), script)));
            let Ok(had_so_many) = ran else { panic!("{script:?}") };
            scripts += 1;
            if more > 1 && had_so_many {
                scripts += run_scripts(new, script, more - 1);
            }
            script.pop();
            if !had_so_many {
                break;
            }
        }
    }
    scripts
}

/// While clusters become free, move, are flushed, released, punched and cut off.
#[test]
fn every_interleaving_of_a_client_and_the_recycler_leaves_content_and_counts_right() {
    let acts = support::setting("QCOW2FS_ACTS").unwrap_or(2);
    for (cluster, keep_erased, is_shared) in [(512, 0, false), (512, 1024, true)] {
        let full = scattered(cluster, is_shared);
        let new = || Stepped::new(&full, cluster, keep_erased, is_shared);
        let scripts = run_scripts(&new, &mut Vec::new(), acts);
        println!("{scripts} scripts, shared with a snapshot: {is_shared}");
    }
}
