//! Defects that were found by thinking, each with the story that shows it.
#![allow(clippy::unwrap_used)]

use std::io;
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use qcow2fs::image::{Backing, Beside, Image, Options, RawBacking};
use qcow2fs::storage::testing::{
    self, Change, Entry, FailingStorage, Fate, Fault, MemoryStorage, Operation, RecordingStorage,
};
use qcow2fs::storage::{HostFile, Storage};

const CLUSTER: u64 = 65536;

/// No pool and no flush that nobody asked for.
fn quiet() -> Options {
    let flush_after = Duration::from_secs(3600);
    Options { writable: true, keep_erased: 0, flush_after, ..Options::default() }
}

/// The bytes of an image of 8 MiB that `qemu-img create` made with `options`.
fn created(options: &[&str]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-u", "-f", "qcow2"]).args(options).arg(&path).arg("8M");
    assert!(command.status().unwrap().success());
    std::fs::read(path).unwrap()
}

/// What `qemu-img check` says of an image without its backing file: 0 sound, 2 corrupt, 3 leaks.
fn checked(bytes: &[u8]) -> (Option<i32>, Output) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, bytes).unwrap();
    let output = check_command(&path).output().unwrap();
    (output.status.code(), output)
}

fn check_command(path: &Path) -> Command {
    let mut command = Command::new("qemu-img");
    let options = format!("driver=qcow2,file.filename={},backing=", path.display());
    command.args(["check", "--image-opts", &options]);
    command
}

fn be64(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

/// Where the L2 entry of guest cluster `guest` is; there must be a table.
fn l2_entry_at(bytes: &[u8], guest: u64) -> u64 {
    let l1 = be64(bytes, 40);
    (be64(bytes, l1) & 0x00ff_ffff_ffff_fe00) + guest * 8
}

/// Where the refcount of host cluster `host` is, two bytes wide, in the first block.
fn refcount_at(bytes: &[u8], host: u64) -> u64 {
    be64(bytes, be64(bytes, 48)) + host * 2
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Write(Range<u64>),
    Sync,
}

/// Memory that notes writes and syncs, can refuse to punch or to read one place, and syncs only
/// while nobody holds `gate`.
#[derive(Default)]
struct Probe {
    memory: MemoryStorage,
    steps: Mutex<Vec<Step>>,
    cannot_punch: AtomicBool,
    cannot_read: Mutex<Range<u64>>,
    gate: Mutex<()>,
}

impl Probe {
    fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Probe { memory: MemoryStorage::new(bytes), ..Probe::default() })
    }

    /// Which step first wrote the byte at `at`, and the steps.
    fn first_write(steps: &[Step], at: u64) -> usize {
        let touches = |step: &Step| matches!(step, Step::Write(range) if range.contains(&at));
        steps.iter().position(touches).unwrap()
    }
}

impl testing::Layer for Probe {
    fn below(&self) -> &dyn Storage {
        &self.memory
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if self.cannot_read.lock().unwrap().contains(&offset) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.memory.read_at(buf, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.steps.lock().unwrap().push(Step::Write(offset..offset + data.len() as u64));
        self.memory.write_at(data, offset)
    }

    fn sync(&self) -> io::Result<()> {
        let _gate = self.gate.lock().unwrap();
        self.steps.lock().unwrap().push(Step::Sync);
        self.memory.sync()
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        if self.cannot_punch.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.memory.punch_hole(range)
    }
}

/// An image whose first guest clusters are full of `byte`.
fn filled(clusters: u64, byte: u8) -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::new(created(&[])));
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    for guest in 0..clusters {
        image.write(guest * CLUSTER, &[byte; CLUSTER as usize]).unwrap();
    }
    image.close().unwrap();
    storage.contents()
}

/// An image of two guest clusters that share one host cluster, whose refcount is 2. Also the host
/// cluster.
fn with_a_shared_cluster() -> (Vec<u8>, u64) {
    let mut bytes = filled(1, 7);
    let entry = l2_entry_at(&bytes, 0);
    let data = be64(&bytes, entry) & 0x00ff_ffff_ffff_fe00;
    for guest in 0..2 {
        let at = l2_entry_at(&bytes, guest) as usize;
        bytes[at..at + 8].copy_from_slice(&data.to_be_bytes());
    }
    let count = refcount_at(&bytes, data / CLUSTER) as usize;
    bytes[count..count + 2].copy_from_slice(&2u16.to_be_bytes());
    assert_eq!(checked(&bytes).0, Some(0));
    (bytes, data / CLUSTER)
}

/// A file may end before the last cluster in use: what lies past it reads as zeros. Writing there
/// in place makes the file longer than the refcounts had thought, and cutting its free end must not
/// take that away.
#[test]
fn data_written_past_the_end_that_the_file_had_at_open_is_not_cut_off() {
    let mut bytes = filled(3, 1);
    bytes.truncate(bytes.len() - CLUSTER as usize);

    let storage = Arc::new(MemoryStorage::new(bytes));
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    image.write(2 * CLUSTER, &[2; CLUSTER as usize]).unwrap();
    image.discard(CLUSTER..2 * CLUSTER).unwrap();
    image.flush().unwrap();
    image.close().unwrap();

    let image = Image::open(storage, &Options::default()).unwrap();
    let mut read = vec![0; CLUSTER as usize];
    image.read(2 * CLUSTER, &mut read).unwrap();
    assert!(read.iter().all(|byte| *byte == 2), "the data is gone");
}

/// The end of the file is looked for once a close: not cluster by cluster through a hole of
/// terabytes.
#[test]
fn a_file_that_is_all_hole_at_its_end_closes_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, created(&["-o", "cluster_size=512"])).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    if let Err(e) = file.set_len(8 << 40) {
        println!("not tried, the host's file system has smaller files only: {e}");
        return;
    }
    let storage = Arc::new(qcow2fs::storage::HostFile::new(file));
    let image = Image::open(storage, &quiet()).unwrap();
    image.write(0, &[1; 512]).unwrap();
    let (closed, is_closed) = mpsc::channel();
    thread::spawn(move || closed.send(image.close().is_ok()));
    assert_eq!(is_closed.recv_timeout(Duration::from_secs(10)), Ok(true));
    assert!(std::fs::metadata(&path).unwrap().len() < 1 << 20);
}

/// Where the refcounts are too low, an L2 table at the end of the file looks free. It must not be
/// cut off with the end.
#[test]
fn metadata_that_nothing_counts_is_not_cut_off_with_the_end_of_the_file() {
    let storage = Arc::new(MemoryStorage::new(created(&[])));
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    image.write(0, &[1; 512]).unwrap();
    image.write(CLUSTER, &[1; 512]).unwrap();
    image.close().unwrap();
    // The L2 table moves to the end of the file, uncounted.
    let mut bytes = storage.contents();
    let l1 = be64(&bytes, 40);
    let table = be64(&bytes, l1) & 0x00ff_ffff_ffff_fe00;
    bytes.resize(bytes.len().next_multiple_of(CLUSTER as usize), 0);
    let end = bytes.len() as u64;
    bytes.extend_from_within(table as usize..(table + CLUSTER) as usize);
    bytes[l1 as usize..l1 as usize + 8].copy_from_slice(&(end | 1 << 63).to_be_bytes());

    let storage = Arc::new(MemoryStorage::new(bytes));
    // No search, which would find it.
    let image = Image::open(storage.clone(), &Options { return_leaks: false, ..quiet() }).unwrap();
    // A disk that grows changes the image, and none of its L2 tables. Free clusters at the end go then.
    image.resize(image.virtual_size() + (1 << 20)).unwrap();
    let closed = image.close().unwrap_err().to_string();
    assert!(closed.contains("holds metadata but its refcount is 0"), "{closed}");
    let len = storage.len().unwrap();
    assert!(len >= end + CLUSTER, "the L2 table was cut off: {len} bytes");
}

/// An image that was opened for writing and not written to stays as it is, free clusters at its end
/// included.
#[test]
fn an_image_that_nobody_changed_stays_as_it_is() {
    let mut bytes = created(&[]);
    bytes.resize(bytes.len().next_multiple_of(CLUSTER as usize) + 4 * CLUSTER as usize, 5);
    let storage = Arc::new(MemoryStorage::new(bytes.clone()));
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    image.read(0, &mut [0; 512]).unwrap();
    image.close().unwrap();
    assert!(storage.contents() == bytes);
}

/// Version 2 maps a cluster of zeros where a backing file would show through. Nothing is written
/// to that cluster, yet the file has to reach as far: QEMU takes what lies past it for corruption.
#[test]
fn a_cluster_that_is_mapped_and_never_written_lies_within_the_file() {
    let backing = Arc::new(MemoryStorage::new(vec![9; 4 * CLUSTER as usize]));
    let backing = Arc::new(RawBacking::new(backing).unwrap());
    let bytes = created(&["-o", "compat=0.10", "-b", "base", "-F", "raw"]);
    let storage = Arc::new(MemoryStorage::new(bytes));
    let image = Image::open_over(storage.clone(), &quiet(), Some(backing)).unwrap();
    image.discard(0..2 * CLUSTER).unwrap();
    image.flush().unwrap();
    let (code, output) = checked(&storage.contents());
    assert_eq!(code, Some(0), "{output:?}");
    image.close().unwrap();
}

/// A refcount that has fallen to 1 in memory is perhaps still 2 on disk. COPIED may not get there
/// first.
#[test]
fn copied_is_written_after_the_refcount_that_it_speaks_of() {
    let (bytes, shared) = with_a_shared_cluster();
    let (entry, count) = (l2_entry_at(&bytes, 1), refcount_at(&bytes, shared));
    let storage = Probe::new(bytes);
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    image.write(0, &[1; 512]).unwrap();
    image.flush().unwrap();
    wait_until("the reference is not dropped", || {
        let clusters = image.status().unwrap().clusters;
        clusters.junk + clusters.released == 0
    });
    thread::sleep(Duration::from_millis(50));
    storage.steps.lock().unwrap().clear();
    image.write(CLUSTER, &[2; 512]).unwrap();
    image.flush().unwrap();
    {
        let steps = storage.steps.lock().unwrap();
        let (counted, copied) =
            (Probe::first_write(&steps, count), Probe::first_write(&steps, entry));
        assert!(counted < copied, "{steps:?}");
        assert!(steps[counted..copied].contains(&Step::Sync), "{steps:?}");
    }
    image.close().unwrap();
}

/// One failure to punch is tried again, also for a cluster that lost its references one by one.
#[test]
fn a_shared_cluster_that_could_not_be_punched_is_freed_later() {
    let (bytes, _) = with_a_shared_cluster();
    let storage = Probe::new(bytes);
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    image.discard(0..2 * CLUSTER).unwrap();
    storage.cannot_punch.store(true, Ordering::SeqCst);
    image.flush().unwrap();
    thread::sleep(Duration::from_millis(200));
    storage.cannot_punch.store(false, Ordering::SeqCst);
    image.close().unwrap();
    let (code, output) = checked(&storage.memory.contents());
    assert_eq!(code, Some(0), "{output:?}");
}

/// A refcount block that cannot be read ends an allocation, but what was counted before it belongs
/// to somebody.
#[test]
fn clusters_counted_before_a_block_that_cannot_be_read_do_not_leak() {
    let small = created(&["-o", "cluster_size=512"]);
    let storage = Probe::new(small);
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    image.write(0, &[1; 300 << 10]).unwrap();
    image.discard(0..200 << 10).unwrap();
    image.close().unwrap();
    let bytes = storage.memory.contents();
    let block = be64(&bytes, be64(&bytes, 48) + 8);

    let storage = Probe::new(bytes);
    // The search for leaks reads refcounts too.
    let alone = Options { return_leaks: false, ..quiet() };
    let image = Image::open(storage.clone(), &alone).unwrap();
    *storage.cannot_read.lock().unwrap() = block..block + 512;
    image.write(0, &[1; 200 << 10]).unwrap_err();
    *storage.cannot_read.lock().unwrap() = 0..0;
    image.close().unwrap();
    let (code, output) = checked(&storage.memory.contents());
    assert_eq!(code, Some(0), "{output:?}");
}

/// A client's flush in the middle of the wait for the recycler's own must not make it forget that
/// later changes want one, too.
#[test]
fn changes_after_a_clients_flush_are_flushed_in_time() {
    let options = Options { flush_after: Duration::from_millis(400), ..quiet() };
    let image = Image::open(Arc::new(MemoryStorage::new(created(&[]))), &options).unwrap();
    let change = |guest: u64| {
        image.write(guest * CLUSTER, &[1; 512]).unwrap();
        thread::sleep(Duration::from_millis(100));
    };
    change(0);
    change(1);
    image.flush().unwrap();
    thread::sleep(Duration::from_millis(100));
    let flushes = image.status().unwrap().flushes;
    change(2);
    wait_until("no flush came", || image.status().unwrap().flushes > flushes);
    image.close().unwrap();
}

/// `blkdiscard` ends without a flush: what it frees comes back soon, not with the next flush. A little
/// junk waits, as everything does.
#[test]
fn much_junk_is_flushed_soon() {
    let storage = Arc::new(MemoryStorage::new(created(&[])));
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    image.resize(128 << 20).unwrap();
    image.write(0, &vec![1; 96 << 20]).unwrap();
    image.flush().unwrap();
    wait_until("not settled", || !image.status().unwrap().searching_leaks);
    let flushes = || image.status().unwrap().flushes;
    let before = flushes();
    image.discard(0..48 << 20).unwrap();
    thread::sleep(Duration::from_millis(1200));
    assert_eq!(flushes(), before, "48 MiB are no reason to flush");
    let started = Instant::now();
    image.discard(48 << 20..80 << 20).unwrap();
    wait_until("no flush came", || flushes() > before);
    assert!(started.elapsed() >= Duration::from_millis(400), "more could have come");
    wait_until("not freed", || storage.allocated().unwrap() < 24 << 20);
    assert!(started.elapsed() < Duration::from_secs(4), "after {:?}", started.elapsed());
    image.close().unwrap();
}

/// Copying a cluster from a backing file changes an entry and drops nothing: a change like any
/// other.
#[test]
fn a_copy_from_the_backing_file_is_flushed_in_time() {
    let backing = Arc::new(MemoryStorage::new(vec![9; 4 * CLUSTER as usize]));
    let backing = Arc::new(RawBacking::new(backing).unwrap());
    let storage = Arc::new(MemoryStorage::new(created(&["-b", "base", "-F", "raw"])));
    let options = Options { flush_after: Duration::from_millis(400), ..quiet() };
    let image = Image::open_over(storage, &options, Some(backing)).unwrap();
    image.write(0, &[1; 512]).unwrap();
    wait_until("no flush came", || image.status().unwrap().flushes > 0);
    thread::sleep(Duration::from_millis(100));
    let flushes = image.status().unwrap().flushes;
    image.write(CLUSTER, &[1; 512]).unwrap();
    wait_until("no second flush came", || image.status().unwrap().flushes > flushes);
    image.close().unwrap();
}

/// What cannot be punched or allocated is no reason to leave changes unflushed.
#[test]
fn a_recycler_that_cannot_free_flushes_all_the_same() {
    let options = Options { flush_after: Duration::from_millis(400), ..quiet() };
    let storage = Probe::new(created(&[]));
    let image = Image::open(storage.clone(), &options).unwrap();
    image.write(0, &[1; 512]).unwrap();
    image.flush().unwrap();
    storage.cannot_punch.store(true, Ordering::SeqCst);
    image.discard(0..CLUSTER).unwrap();
    image.flush().unwrap();
    thread::sleep(Duration::from_millis(100));
    let flushes = image.status().unwrap().flushes;
    image.write(CLUSTER, &[1; 512]).unwrap();
    wait_until("no flush came", || image.status().unwrap().flushes > flushes);
    storage.cannot_punch.store(false, Ordering::SeqCst);
    image.close().unwrap();
}

/// A raw backing file that grows though it should not may show anything but must not hang who looks
/// for holes.
#[test]
fn a_raw_backing_file_that_grows_does_not_hang_the_search_for_holes() {
    let base = Arc::new(MemoryStorage::new(vec![9; 1000]));
    let backing: Arc<dyn Backing> = Arc::new(RawBacking::new(base.clone()).unwrap());
    let storage = Arc::new(MemoryStorage::new(created(&["-b", "base", "-F", "raw"])));
    let image = Image::open_over(storage, &Options::default(), Some(backing)).unwrap();
    base.write_at(&[9; 8192], 1000).unwrap();
    let (found, is_found) = mpsc::channel();
    thread::spawn(move || found.send(image.next_hole(0).unwrap()));
    assert_eq!(is_found.recv_timeout(Duration::from_secs(5)), Ok(1000));
}

/// A write that waits for a cut of the disk to end must not put its data past the new end, where it
/// would show when the disk grows.
#[test]
fn a_write_that_a_cut_overtakes_leaves_nothing_past_the_end() {
    let storage = Probe::new(created(&[]));
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    image.resize(9 << 20).unwrap();
    image.write(0, &[1; CLUSTER as usize]).unwrap();
    image.flush().unwrap();
    thread::scope(|scope| {
        let gate = storage.gate.lock().unwrap();
        let cut = scope.spawn(|| image.resize(512));
        thread::sleep(Duration::from_millis(200));
        let write = scope.spawn(|| image.write(1024, &[7; 512]));
        thread::sleep(Duration::from_millis(200));
        drop(gate);
        cut.join().unwrap().unwrap();
        let _ = write.join().unwrap();
    });
    image.resize(8 << 20).unwrap();
    let mut read = [9; 512];
    image.read(1024, &mut read).unwrap();
    assert_eq!(read, [0; 512]);
    image.close().unwrap();
}

/// A host that cannot read for a moment says nothing about the image.
#[test]
fn an_image_whose_snapshots_cannot_be_read_is_not_marked_as_corrupt() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, created(&[])).unwrap();
    let taken = Command::new("qemu-img").args(["snapshot", "-c", "one"]).arg(&path).status();
    assert!(taken.unwrap().success());
    let bytes = std::fs::read(&path).unwrap();
    let snapshots = be64(&bytes, 64);

    let storage = Probe::new(bytes.clone());
    *storage.cannot_read.lock().unwrap() = snapshots..snapshots + 1;
    assert!(Image::open(storage.clone(), &quiet()).is_err());
    assert!(storage.memory.contents() == bytes, "the image was changed");
}

/// Two references and a refcount of 1: to drop one would free what the other still refers to. The
/// search after the open finds it before anything is freed.
#[test]
fn two_references_that_are_counted_once_make_an_image_read_only() {
    let (mut bytes, cluster) = with_a_shared_cluster();
    let count = refcount_at(&bytes, cluster) as usize;
    bytes[count..count + 2].copy_from_slice(&1u16.to_be_bytes());
    let storage = Arc::new(MemoryStorage::new(bytes));
    let options = Options { return_leaks: true, ..quiet() };
    let image = Image::open(storage.clone(), &options).unwrap();
    wait_until("nobody has found it", || !image.is_writable());
    let health = image.status().unwrap().health;
    assert!(health.contains("2 references and refcount 1"), "{health}");
    image.write(0, &[1; 512]).unwrap_err();
    image.discard(0..CLUSTER).unwrap_err();
    let mut read = vec![0; CLUSTER as usize];
    for guest in 0..2 {
        image.read(guest * CLUSTER, &mut read).unwrap();
        assert!(read.iter().all(|byte| *byte == 7), "guest cluster {guest}");
    }
    let _says_so_again = image.close();
    assert_ne!(storage.contents()[79] & 2, 0, "the corrupt bit");
}

/// Waits until the search after the open is over; the image is closed then. How it was, and its bytes.
fn searched(bytes: Vec<u8>) -> (String, Vec<u8>) {
    let storage = Arc::new(MemoryStorage::new(bytes));
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    wait_until("the search does not end", || !image.status().unwrap().searching_leaks);
    let health = image.status().unwrap().health;
    let _says_so_again = image.close();
    (health, storage.contents())
}

/// Where not all references can be counted, one of the others may be to the same cluster: a single entry
/// that makes no sense does not call the search off.
#[test]
fn references_that_cannot_be_counted_make_an_image_read_only() {
    let (mut bytes, _) = with_a_shared_cluster();
    let at = l2_entry_at(&bytes, 50) as usize;
    bytes[at] = 0x80;
    let (health, bytes) = searched(bytes);
    assert!(health.contains("is COPIED but has no cluster"), "{health}");
    assert_ne!(bytes[79] & 2, 0, "the corrupt bit");
}

/// Bitmaps that make no sense are void after the first change: they are no damage, and hide none.
#[test]
fn void_bitmaps_do_not_call_the_search_for_damage_off() {
    let (mut bytes, cluster) = with_a_shared_cluster();
    let extensions = u32::from_be_bytes(bytes[100..104].try_into().unwrap()) as usize;
    bytes[extensions..extensions + 40].fill(0);
    bytes[extensions..extensions + 4].copy_from_slice(&0x2385_2875u32.to_be_bytes());
    bytes[extensions + 7] = 24;
    bytes[95] = 1;
    let (health, after) = searched(bytes.clone());
    assert_eq!(health, "ok");
    assert!(after == bytes, "the image was changed");

    let count = refcount_at(&bytes, cluster) as usize;
    bytes[count..count + 2].copy_from_slice(&1u16.to_be_bytes());
    let (health, after) = searched(bytes);
    assert!(health.contains("2 references and refcount 1"), "{health}");
    assert_ne!(after[79] & 2, 0, "the corrupt bit");
}

/// A host that cannot read says nothing about the image, which stays writable. But what is freed by
/// refcounts alone stays until they are known to be right.
#[test]
fn snapshots_do_not_change_where_the_host_could_not_read_what_is_searched() {
    let (bytes, _) = with_a_shared_cluster();
    let storage = Probe::new(bytes.clone());
    let table = l2_entry_at(&bytes, 0);
    *storage.cannot_read.lock().unwrap() = table..table + 1;
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    wait_until("the search does not end", || !image.status().unwrap().searching_leaks);
    *storage.cannot_read.lock().unwrap() = 0..0;
    let refused = image.take_snapshot(b"s").unwrap_err().to_string();
    assert!(refused.contains("open it again"), "{refused}");
    assert!(image.is_writable());
    image.write(0, &[1; 512]).unwrap();
    image.close().unwrap();
    let image = Image::open(storage, &quiet()).unwrap();
    image.take_snapshot(b"s").unwrap();
    image.close().unwrap();
}

/// Applying such a snapshot would clear flags in the LUKS header: keys.
#[test]
fn a_luks_header_is_no_l2_table_of_a_snapshot() {
    let storage = Arc::new(MemoryStorage::new(created(&[])));
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    image.write(0, &[7; CLUSTER as usize]).unwrap();
    image.take_snapshot(b"s").unwrap();
    image.close().unwrap();
    let mut bytes = storage.contents();
    let luks = (bytes.len() as u64).next_multiple_of(CLUSTER);
    bytes.resize((luks + CLUSTER) as usize, 0xff);
    let mut put = |at: u64, new: &[u8]| {
        bytes[at as usize..at as usize + new.len()].copy_from_slice(new);
    };
    let extensions = 112;
    put(100, &(extensions as u32).to_be_bytes());
    put(extensions, &0x0537_be77u32.to_be_bytes());
    put(extensions + 4, &16u32.to_be_bytes());
    put(extensions + 8, &luks.to_be_bytes());
    put(extensions + 16, &CLUSTER.to_be_bytes());
    put(extensions + 24, &[0; 8]);
    let l1 = be64(&storage.contents(), be64(&storage.contents(), 64));
    put(l1, &luks.to_be_bytes());
    put(refcount_at(&storage.contents(), luks / CLUSTER), &2u16.to_be_bytes());
    let image = Image::open(Arc::new(MemoryStorage::new(bytes)), &quiet()).unwrap();
    let health = image.status().unwrap().health;
    assert!(health.contains("which is other metadata"), "{health}");
    let refused = image.apply_snapshot(b"s").unwrap_err();
    assert_eq!(refused.kind(), qcow2fs::ErrorKind::ReadOnly, "{refused}");
}

/// A raw data file reads by itself as the disk does, after a crash too: data may go only where the
/// mapping is durable, though somebody else has made it and has not flushed it.
#[test]
fn a_raw_data_file_is_not_written_through_a_mapping_that_is_not_durable() {
    let directory = tempfile::tempdir().unwrap();
    let (path, data_path) = (directory.path().join("image"), directory.path().join("data"));
    let options = format!("data_file={},data_file_raw=on", data_path.display());
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", &options]).arg(&path).arg("8M");
    assert!(create.status().unwrap().success());
    // QEMU maps everything when it makes the image, and takes that back.
    let mut discard = Command::new("qemu-io");
    discard.args(["-d", "unmap", "-c", "discard 0 8M"]).arg(&path);
    assert!(discard.output().unwrap().status.success());

    let read = |path: &Path| MemoryStorage::new(std::fs::read(path).unwrap());
    let file = Arc::new(RecordingStorage::new(read(&path)));
    let data = Arc::new(file.beside(1, read(&data_path)));
    let beside = |data: Arc<dyn Storage>| Beside { data: Some(data), ..Beside::default() };
    let image = Image::open_with(file.clone(), &quiet(), beside(data.clone())).unwrap();
    image.preallocate(CLUSTER..2 * CLUSTER).unwrap();
    image.write(CLUSTER, &[7; 512]).unwrap();

    // Power fails: what reached the data file is on disk, what no sync covers of the image is not.
    let crash = |file: &RecordingStorage, fate| {
        let mut replay = file.replay();
        while replay.step().unwrap().is_some() {}
        Arc::new(replay.crash(|_| fate).unwrap())
    };
    let (file, data) = (crash(&file, Fate::Lost), crash(&data, Fate::Kept));
    let crashed = Image::open_with(file, &Options::default(), beside(data.clone())).unwrap();
    let (mut disk, mut raw) = ([9; 512], [9; 512]);
    crashed.read(CLUSTER, &mut disk).unwrap();
    data.read_at(&mut raw, CLUSTER).unwrap();
    assert_eq!(disk, raw, "the disk and the raw file differ");
    assert_eq!(raw, [7; 512]);
    image.close().unwrap();
}

/// Compaction that is told to stop may have moved what a snapshot's L1 table leads to, in memory only.
/// Whoever deletes the snapshot then must not go by what stands in the file.
#[test]
fn a_snapshot_is_deleted_after_compaction_was_stopped_in_the_midst_of_moving_it() {
    for steps in 1..40 {
        let file = Arc::new(MemoryStorage::new(created(&["-o", "cluster_size=4096"])));
        let options = Options { threads: false, ..quiet() };
        let image = Image::open(file.clone(), &options).unwrap();
        image.write(0, &[1; 400 << 10]).unwrap();
        // Tables and data of the snapshot lie behind what becomes free.
        image.write(4 << 20, &[2; 100 << 10]).unwrap();
        image.take_snapshot(b"then").unwrap();
        image.write(4 << 20, &[3; 4096]).unwrap();
        image.delete_snapshot(b"then").unwrap();
        image.discard(0..400 << 10).unwrap();
        image.take_snapshot(b"now").unwrap();
        let mut left = steps;
        image
            .compact(|_| {
                left -= 1;
                left > 0
            })
            .unwrap();
        image.delete_snapshot(b"now").unwrap();
        image.close().unwrap();
        assert_eq!(checked(&file.contents()).0, Some(0), "stopped after {steps} steps");
    }
}

/// An image whose L1 table lies behind what compaction takes away: four L2 tables, of which the last
/// one stays, were there before the disk became so large that it got another one.
fn with_l1_last(image: &Image) {
    (0..4).for_each(|table| image.write(table << 21, &[1; 4096]).unwrap());
    image.resize(3 << 30).unwrap();
    (0..3).for_each(|table| image.discard(table << 21..(table << 21) + 4096).unwrap());
    image.flush().unwrap();
}

/// Whether a change of an image file makes the header name another L1 table.
fn switches_l1(change: &Change) -> bool {
    matches!(change, Change::Write { offset: 36..=40, .. })
}

/// What an L2 table leads to in a data file is durable before the L1 table is that leads to a moved
/// one: the switch of the L1 table waits for no flush.
#[test]
fn data_in_a_data_file_is_durable_before_the_l1_table_switches() {
    let directory = tempfile::tempdir().unwrap();
    let data_path = directory.path().join("data");
    let options = format!("cluster_size=4096,data_file={}", data_path.display());
    let file = Arc::new(RecordingStorage::new(MemoryStorage::new(created(&["-o", &options]))));
    let data = Arc::new(file.beside(1, MemoryStorage::new(vec![0; 8 << 20])));
    let beside = Beside { data: Some(data), ..Beside::default() };
    let options = Options { threads: false, ..quiet() };
    let image = Image::open_with(file.clone(), &options, beside).unwrap();
    with_l1_last(&image);
    let first = file.log().len();
    let mut at = 6 << 20;
    image
        .compact(|_| {
            at += 4096;
            image.write(at, &[2; 4096]).unwrap();
            true
        })
        .unwrap();
    image.close().unwrap();
    let (mut unsynced, mut switches) = (false, 0);
    for entry in file.log().split_off(first) {
        match entry {
            (1, Entry::Change(Change::Write { .. })) => unsynced = true,
            (1, Entry::Sync { .. }) => unsynced = false,
            (0, Entry::Change(change)) if switches_l1(&change) => {
                assert!(!unsynced, "the header names tables that lead to data on its way");
                switches += 1;
            }
            _ => {}
        }
    }
    assert_eq!(switches, 1, "the L1 table has not moved");
}

/// The host tells of a failed sync once. What compaction had moved before it may be lost, so that nothing
/// may become durable that leads there.
#[test]
fn compaction_syncs_nothing_after_a_failed_sync() {
    for steps in 1.. {
        let made = MemoryStorage::new(created(&["-o", "cluster_size=4096"]));
        let recorded = Arc::new(RecordingStorage::new(made));
        let file = Arc::new(FailingStorage::new(recorded.clone()));
        let options = Options { threads: false, ..quiet() };
        let image = Image::open(file.clone(), &options).unwrap();
        with_l1_last(&image);
        let (mut left, mut failed_at) = (steps, None);
        let compacted = image.compact(|_| {
            left -= 1;
            if left == 0 {
                let on = vec![Operation::Sync];
                file.arm(Fault { on, after: 0, lasting: false, errno: libc::EIO, short: false });
                image.write(6 << 20, &[2; 4096]).unwrap();
                image.flush().unwrap_err();
                failed_at = Some(recorded.log().len());
            }
            true
        });
        let switches = |entry: &(usize, Entry)| match entry {
            (_, Entry::Change(change)) => switches_l1(change),
            _ => false,
        };
        let Some(failed_at) = failed_at else {
            compacted.unwrap();
            let log = recorded.log();
            assert_eq!(log.iter().filter(|e| switches(e)).count(), 2, "grown, and not moved");
            return;
        };
        compacted.unwrap_err();
        image.sync_with(|| Ok(())).unwrap_err();
        image.close().unwrap_err();
        for entry in recorded.log().split_off(failed_at) {
            assert!(!switches(&entry), "the L1 table switches after the failure of step {steps}");
            assert!(!matches!(entry.1, Entry::Sync { .. }), "a sync after that of step {steps}");
        }
    }
}

/// An image of 8 MiB whose guest clusters have the L2 entries that `entry` makes, open for reading.
fn mapped(entry: impl Fn(u64) -> u64, backing: Option<Arc<dyn Backing>>) -> Arc<Image> {
    let backed = ["-b", "base", "-F", "qcow2"];
    let mut bytes = created(if backing.is_some() { &backed } else { &[] });
    let table = (bytes.len() as u64).next_multiple_of(CLUSTER);
    let l1 = be64(&bytes, 40) as usize;
    bytes[l1..l1 + 8].copy_from_slice(&table.to_be_bytes());
    bytes.resize(table as usize, 0);
    bytes.extend((0..CLUSTER / 8).flat_map(|guest| entry(guest).to_be_bytes()));
    // A cluster for data.
    bytes.extend(vec![7; CLUSTER as usize]);
    let storage = Arc::new(MemoryStorage::new(bytes));
    Image::open_over(storage, &Options::default(), backing).unwrap()
}

/// Whoever looks for data or holes looks at each file of a chain once over what the search covers: no
/// run of a file above makes it begin anew below.
#[test]
fn a_search_for_data_or_holes_looks_at_each_file_of_a_chain_once() {
    let table = (created(&[]).len() as u64).next_multiple_of(CLUSTER);
    const ZERO: u64 = 1;
    // Each data cluster is a run: none follows the one before it in the file.
    for (own, is_data) in [(ZERO, false), (table + CLUSTER, true)] {
        let base = mapped(|guest| if is_data || guest % 2 == 0 { own } else { 0 }, None);
        let mut chain = vec![base];
        for _ in 0..6 {
            let below: Arc<dyn Backing> = chain.last().unwrap().clone();
            chain.push(mapped(|guest| if guest % 2 == 0 { own } else { 0 }, Some(below)));
        }
        let top = chain.last().unwrap().clone();
        let (found, is_found) = mpsc::channel();
        thread::spawn(move || found.send((top.next_data(0).unwrap(), top.next_hole(0).unwrap())));
        let found = is_found.recv_timeout(Duration::from_secs(20)).expect("still looking");
        assert_eq!(found, if is_data { (Some(0), 8 << 20) } else { (None, 0) });
        for image in &chain {
            let counts = image.status().unwrap().table_cache;
            let looks = counts.hits + counts.misses;
            assert!(looks <= 2 * 128 + 2, "{looks} looks for 128 clusters");
        }
    }
}

/// Memory in which the search for leaks takes its time.
#[derive(Default)]
struct SlowSearch(MemoryStorage);

impl testing::Layer for SlowSearch {
    fn below(&self) -> &dyn Storage {
        &self.0
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if thread::current().name() == Some("leak search") {
            thread::sleep(Duration::from_millis(100));
        }
        self.0.read_at(buf, offset)
    }
}

/// Who closes all images waits for the requests that are under way, and these for the search.
#[test]
fn closing_ends_a_change_of_snapshots_that_waits_for_the_search() {
    let storage = Arc::new(SlowSearch(MemoryStorage::new(created(&["-o", "cluster_size=512"]))));
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    image.write(0, &vec![7; 8 << 20]).unwrap();
    image.close().unwrap();
    // It reads 256 L2 tables.
    let image = Image::open(storage, &quiet()).unwrap();
    let (done, is_done) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| done.send(image.delete_snapshot(b"none").unwrap_err().to_string()));
        assert!(is_done.recv_timeout(Duration::from_millis(300)).is_err(), "it does not wait");
        image.begin_closing();
        let refused = is_done.recv_timeout(Duration::from_secs(10)).expect("it waits still");
        assert!(refused.contains("open it again"), "{refused}");
    });
    image.close().unwrap();
}

#[test]
fn who_is_told_of_progress_may_ask_for_the_status() {
    let storage = Arc::new(MemoryStorage::new(created(&[])));
    let image = Image::open(storage, &quiet()).unwrap();
    image.write(0, &[7; CLUSTER as usize]).unwrap();
    let (done, is_done) = mpsc::channel();
    let compacted = image.clone();
    thread::spawn(move || {
        compacted.compact(|_| compacted.status().is_ok()).unwrap();
        done.send(()).unwrap();
    });
    is_done.recv_timeout(Duration::from_secs(20)).expect("it hangs");
    image.close().unwrap();
}

/// A search for holes ends where it has looked at much: who copies the disk asks anew, and the copy is no
/// longer than the data.
#[test]
fn a_copy_of_much_data_in_a_sparse_disk_is_no_longer_than_that() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let run = |arguments: &[&str], size: &str| {
        let mut qemu_img = Command::new("qemu-img");
        let done = qemu_img.args(arguments).arg(&path).arg(size).status().unwrap();
        assert!(done.success(), "{arguments:?}");
    };
    let options = "cluster_size=4k,preallocation=metadata";
    run(&["create", "-q", "-f", "qcow2", "-o", options], "17G");
    run(&["resize", "-q", "-f", "qcow2"], "1T");
    let file = std::fs::File::open(&path).unwrap();
    let image = Image::open(Arc::new(HostFile::new(file)), &Options::default()).unwrap();
    let (mut at, mut copied, mut searches) = (0, 0, 0);
    while let Some(data) = image.next_data(at).unwrap() {
        let hole = image.next_hole(data).unwrap();
        assert!(hole > data, "no way on from {data:#x}");
        (at, copied, searches) = (hole, copied + hole - data, searches + 1);
    }
    assert_eq!(copied, 17 << 30);
    assert!((2..9).contains(&searches), "{searches} searches");
}

/// Memory that the search after the open reads only while nobody holds `gate`.
#[derive(Default)]
struct Gated {
    memory: MemoryStorage,
    gate: Mutex<()>,
    /// What the search looks at again begins with the header.
    cannot_look_again: AtomicBool,
}

impl Gated {
    fn new(bytes: Vec<u8>) -> Arc<Gated> {
        Arc::new(Gated { memory: MemoryStorage::new(bytes), ..Gated::default() })
    }
}

impl testing::Layer for Gated {
    fn below(&self) -> &dyn Storage {
        &self.memory
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if thread::current().name() == Some("leak search") {
            drop(self.gate.lock().unwrap());
            if offset == 0 && self.cannot_look_again.load(Ordering::SeqCst) {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
        }
        self.memory.read_at(buf, offset)
    }
}

/// [`with_a_shared_cluster`], whose refcount is `count`.
fn with_a_shared_cluster_counted(count: u16) -> (Vec<u8>, u64) {
    let (mut bytes, cluster) = with_a_shared_cluster();
    let at = refcount_at(&bytes, cluster) as usize;
    bytes[at..at + 2].copy_from_slice(&count.to_be_bytes());
    (bytes, cluster)
}

fn guest_cluster(image: &Image, guest: u64) -> Vec<u8> {
    let mut read = vec![0; CLUSTER as usize];
    image.read(guest * CLUSTER, &mut read).unwrap();
    read
}

/// One of two references is dropped before the search comes to it: the cluster would be freed beneath the
/// other one, though what is left agrees with what is counted.
#[test]
fn a_reference_that_is_dropped_during_the_search_hides_no_other() {
    for (count, flushed) in [(1, false), (1, true), (2, false), (2, true)] {
        let (bytes, cluster) = with_a_shared_cluster_counted(count);
        let storage = Gated::new(bytes);
        let shut = storage.gate.lock().unwrap();
        let image = Image::open(storage.clone(), &quiet()).unwrap();
        image.discard(0..CLUSTER).unwrap();
        if flushed {
            image.flush().unwrap();
        }
        drop(shut);
        wait_until("the search does not end", || {
            !image.is_writable() || !image.status().unwrap().searching_leaks
        });
        let health = image.status().unwrap().health;
        match count {
            1 => assert!(health.contains("2 references and refcount 1"), "{flushed}: {health}"),
            _ => assert_eq!(health, "ok", "{flushed}"),
        }
        let _says_so_again = image.close();
        let bytes = storage.memory.contents();
        let image = Image::open(Arc::new(MemoryStorage::new(bytes.clone())), &Options::default());
        assert!(
            guest_cluster(&image.unwrap(), 1).iter().all(|byte| *byte == 7),
            "{count} {flushed}"
        );
        let at = refcount_at(&bytes, cluster) as usize;
        assert_eq!(bytes[at..at + 2], [0, 1], "{count} {flushed}");
    }
}

/// Nobody knows whether an image is damaged that seemed to be, where the host cannot read it again: the
/// cluster would be freed beneath the other reference.
#[test]
fn signs_of_damage_that_cannot_be_looked_at_again_make_an_image_read_only() {
    let (bytes, cluster) = with_a_shared_cluster_counted(1);
    let storage = Gated::new(bytes);
    storage.cannot_look_again.store(true, Ordering::SeqCst);
    let shut = storage.gate.lock().unwrap();
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    image.discard(0..CLUSTER).unwrap();
    drop(shut);
    wait_until("nobody minds", || !image.is_writable());
    let health = image.status().unwrap().health;
    assert!(health.contains("may be corrupt, and cannot be read"), "{health}");
    let _says_so_again = image.close();
    let bytes = storage.memory.contents();
    assert_eq!(bytes[79] & 2, 0, "the corrupt bit, of which nobody is sure");
    let at = refcount_at(&bytes, cluster) as usize;
    assert_eq!(bytes[at..at + 2], [0, 1]);
    let image = Image::open(Arc::new(MemoryStorage::new(bytes)), &Options::default()).unwrap();
    assert!(guest_cluster(&image, 1).iter().all(|byte| *byte == 7));
}

/// What is mapped past the end is not looked at when the disk grows again.
#[test]
fn a_preallocation_that_a_cut_overtakes_maps_nothing_past_the_end() {
    for _ in 0..10 {
        let storage = Arc::new(MemoryStorage::new(created(&["-o", "cluster_size=4k"])));
        let image = Image::open(storage.clone(), &quiet()).unwrap();
        image.resize(1 << 30).unwrap();
        thread::scope(|scope| {
            let all = scope.spawn(|| image.preallocate_metadata(0..1 << 30));
            wait_until("nothing is mapped", || image.status().unwrap().file_length > 8 << 20);
            image.resize(4096).unwrap();
            all.join().unwrap().unwrap();
        });
        image.flush().unwrap();
        // Empty L2 tables stay until compaction comes to them.
        wait_until("what was cut off is in use", || image.status().unwrap().live < Some(4 << 20));
        image.close().unwrap();
    }
}

/// What is to be freed after the search stays where the search does not come to its end.
#[test]
fn what_was_dropped_is_not_freed_when_the_search_is_called_off() {
    let (bytes, _) = with_a_shared_cluster_counted(1);
    let storage = Gated::new(bytes);
    let shut = storage.gate.lock().unwrap();
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    image.discard(0..CLUSTER).unwrap();
    image.begin_closing();
    drop(shut);
    image.close().unwrap();
    let memory = Arc::new(MemoryStorage::new(storage.memory.contents()));
    let image = Image::open(memory, &Options::default()).unwrap();
    assert!(guest_cluster(&image, 0).iter().all(|byte| *byte == 0));
    assert!(guest_cluster(&image, 1).iter().all(|byte| *byte == 7));
}

/// A close that is in no hurry lets the search come to its end, so that what was dropped is freed.
#[test]
fn what_was_dropped_before_the_search_was_over_is_freed_by_the_close() {
    let slow = Arc::new(SlowSearch(MemoryStorage::new(filled(8, 7))));
    let image = Image::open(slow.clone(), &quiet()).unwrap();
    image.discard(0..8 << 20).unwrap();
    image.close().unwrap();
    let bytes = slow.0.contents();
    assert!(bytes.len() < 8 * CLUSTER as usize, "{} bytes", bytes.len());
    assert_eq!(checked(&bytes).0, Some(0));
}

/// Something may refer to a cluster of the file that is not counted: until that is known it is nobody
/// else's.
#[test]
fn what_is_not_counted_is_not_handed_out_before_the_search_is_over() {
    let (bytes, cluster) = with_a_shared_cluster_counted(0);
    let storage = Gated::new(bytes);
    let shut = storage.gate.lock().unwrap();
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    for guest in 2..40 {
        image.write(guest * CLUSTER, &[9; CLUSTER as usize]).unwrap();
    }
    image.flush().unwrap();
    drop(shut);
    wait_until("nobody has found it", || !image.is_writable());
    let health = image.status().unwrap().health;
    assert!(health.contains("2 references and refcount 0"), "{health}");
    for guest in 0..40 {
        let expected = if guest < 2 { 7 } else { 9 };
        assert!(guest_cluster(&image, guest).iter().all(|byte| *byte == expected), "{guest}");
    }
    let bytes = storage.memory.contents();
    let at = refcount_at(&bytes, cluster) as usize;
    assert_eq!(bytes[at..at + 2], [0, 0]);
    let _says_so_again = image.close();
}

/// Each view has the tables of its snapshot in memory.
#[test]
fn all_who_read_a_snapshot_share_a_view() {
    let storage = Arc::new(MemoryStorage::new(created(&[])));
    let image = Image::open(storage, &quiet()).unwrap();
    image.take_snapshot(b"one").unwrap();
    image.take_snapshot(b"two").unwrap();
    let views = ["one", "two", "one"].map(|name| image.open_snapshot(name.as_bytes()).unwrap());
    assert!(Arc::ptr_eq(&views[0], &views[2]));
    assert_eq!((views[0].info().name.as_str(), views[1].info().name.as_str()), ("one", "two"));
    drop(views);
    image.close().unwrap();
}

#[test]
fn a_snapshot_that_could_not_be_found_again_is_not_taken() {
    let storage = Arc::new(MemoryStorage::new(created(&[])));
    let image = Image::open(storage, &quiet()).unwrap();
    assert!(image.take_snapshot(b"caf\xe9").is_err());
    assert_eq!(image.snapshots().unwrap().len(), 0);
    image.close().unwrap();
}

/// Changed tables wait in memory until a flush: who cuts off a large disk flushes on the way.
#[test]
fn cutting_a_disk_off_keeps_few_tables_in_memory() {
    let storage = Arc::new(MemoryStorage::new(created(&["-o", "cluster_size=4k"])));
    let caches = qcow2fs::memory::Memory::new(u64::MAX);
    let options = Options { metadata_cache: 0, caches: caches.clone(), ..quiet() };
    let image = Image::open(storage, &options).unwrap();
    image.resize(256 << 20).unwrap();
    image.preallocate(0..256 << 20).unwrap();
    image.flush().unwrap();
    let before = image.status().unwrap().flushes;
    image.resize(0).unwrap();
    // 128 slices of 4 KiB.
    let flushes = image.status().unwrap().flushes - before;
    assert!(flushes > 4, "{flushes} flushes");
    assert!(caches.status().held < 64 * 4096, "{:?}", caches.status());
    image.close().unwrap();
}

/// Nor is the end of the file cut off where something is that is not counted.
#[test]
fn what_is_not_counted_is_not_cut_off_when_the_search_is_called_off() {
    let mut bytes = filled(2, 7);
    let last = be64(&bytes, l2_entry_at(&bytes, 1)) & 0x00ff_ffff_ffff_fe00;
    assert_eq!(last + CLUSTER, bytes.len() as u64, "it is not the last one");
    let count = refcount_at(&bytes, last / CLUSTER) as usize;
    bytes[count..count + 2].fill(0);
    let storage = Gated::new(bytes);
    let shut = storage.gate.lock().unwrap();
    let image = Image::open(storage.clone(), &quiet()).unwrap();
    image.write(0, &[8; 512]).unwrap();
    image.begin_closing();
    drop(shut);
    image.close().unwrap();
    let memory = Arc::new(MemoryStorage::new(storage.memory.contents()));
    let image = Image::open(memory, &Options::default()).unwrap();
    assert!(guest_cluster(&image, 1).iter().all(|byte| *byte == 7));
}
