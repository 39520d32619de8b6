//! Extended L2 entries: what QEMU makes of a disk we read the same, and what we make QEMU reads the
//! same, at the grain of subclusters; and the entries themselves say no more than they must.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use qcow2fs::ErrorKind;
use qcow2fs::check::{Repair, check, repair};
use qcow2fs::image::{Beside, Image, Options, RawBacking};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::MemoryStorage;
use support::{difference, host_file, qemu, scratch};

/// Bytes of every disk here.
const SIZE: u64 = 1 << 20;
const COPIED: u64 = 1 << 63;
const ALL: u64 = 0xffff_ffff;

/// No pool and no flush that nobody asked for.
fn quiet() -> Options {
    let flush_after = Duration::from_secs(3600);
    Options { writable: true, keep_erased: 0, flush_after, ..Options::default() }
}

/// An image, and perhaps a raw backing file of bytes 0x11.
struct Disk {
    path: PathBuf,
    backing: Option<PathBuf>,
    cluster: u64,
    _directory: tempfile::TempDir,
}

impl Disk {
    fn new(cluster: u64, backed: bool) -> Self {
        let directory = scratch();
        let path = directory.path().join("disk.qcow2");
        let backing = backed.then(|| directory.path().join("base.raw"));
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o"]);
        create.arg(format!("extended_l2=on,cluster_size={cluster}"));
        if let Some(backing) = &backing {
            std::fs::write(backing, vec![0x11; SIZE as usize]).unwrap();
            create.args(["-F", "raw", "-b"]).arg(backing);
        }
        qemu::run(create.arg(&path).arg(SIZE.to_string()));
        Disk { path, backing, cluster, _directory: directory }
    }

    /// Bytes in a subcluster.
    fn sub(&self) -> u64 {
        self.cluster / 32
    }

    fn io(&self, commands: &[String]) {
        qemu::io(&self.path, commands);
    }

    fn open(&self, file: Arc<dyn Storage>) -> Arc<Image> {
        let backing = self.backing.as_deref().map(host_file);
        let backing = backing.map(|file| Arc::new(RawBacking::new(file).unwrap()) as Arc<_>);
        Image::open_over(file, &quiet(), backing).unwrap()
    }

    /// Does something to the image, and closes it: QEMU must find it sound.
    fn change(&self, change: impl FnOnce(&Image)) {
        let image = self.open(host_file(&self.path));
        change(&image);
        image.close().unwrap();
        qemu::assert_clean(&self.path);
    }

    /// What we read.
    fn contents(&self) -> Vec<u8> {
        let image = self.open(host_file(&self.path));
        let mut disk = vec![0xee; SIZE as usize];
        image.read(0, &mut disk).unwrap();
        image.close().unwrap();
        disk
    }

    #[track_caller]
    fn assert_same(&self) -> Vec<u8> {
        let (ours, theirs) = (self.contents(), qemu::contents(&self.path, None));
        assert_eq!(difference(&ours, &theirs), None);
        ours
    }

    /// The words of the L2 entry of a guest cluster.
    fn entry(&self, guest: u64) -> [u64; 2] {
        let bytes = std::fs::read(&self.path).unwrap();
        let at = entry_at(&bytes, guest);
        [be64(&bytes, at), be64(&bytes, at + 8)]
    }
}

fn be64(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

fn entry_at(bytes: &[u8], guest: u64) -> u64 {
    (be64(bytes, be64(bytes, 40)) & 0x00ff_ffff_ffff_fe00) + guest * 16
}

fn at(start: u64, length: u64) -> std::ops::Range<usize> {
    start as usize..(start + length) as usize
}

fn each(mut test: impl FnMut(Disk)) {
    for cluster in [16 << 10, 64 << 10] {
        for backed in [false, true] {
            test(Disk::new(cluster, backed));
        }
    }
}

#[test]
fn what_qemu_makes_of_subclusters_reads_the_same_here() {
    each(|disk| {
        let (c, s) = (disk.cluster, disk.sub());
        disk.io(&[
            format!("write -P 1 0 {}", 5 * s),
            format!("write -P 2 {} {}", c + s + 100, 3 * s),
            format!("write -z {} {}", 2 * c + 4 * s, 8 * s),
            format!("write -P 3 {} {}", 3 * c, 2 * c),
            format!("write -z {} {}", 3 * c + 3 * s, 2 * s),
            format!("discard {} {}", 4 * c + 7 * s, 9 * s),
            format!("discard {} {s}", 5 * s / 2),
            format!("write -z -u {} {c}", 6 * c),
            format!("write -P 4 {} 512", 6 * c + s),
        ]);
        disk.assert_same();
        qemu::run(Command::new("qemu-img").args(["snapshot", "-c", "one"]).arg(&disk.path));
        let kept = qemu::contents(&disk.path, Some("one"));
        disk.io(&[format!("write -P 5 {} {s}", 2 * s), format!("write -P 6 {} 10", c + 7 * s)]);
        // Fresh ranges, and a process of its own: QEMU 10.0 mixes them badly with others.
        disk.io(&[format!("write -c -P 7 {} {c}", 8 * c)]);
        disk.io(&[format!("write -P 8 {} 512", 8 * c + 3 * s)]);
        disk.io(&[format!("write -c -P 9 {} {c}", 9 * c)]);
        // And on from there by us: clusters that the snapshot shares, compressed ones, and ours.
        let mut expected = disk.assert_same();
        disk.change(|image| {
            for start in (0..10).map(|guest| guest * c) {
                image.write(start + 2 * s + 7, &[0xaa; 700]).unwrap();
                expected[at(start + 2 * s + 7, 700)].fill(0xaa);
                image.discard(start + 9 * s..start + 12 * s).unwrap();
                expected[at(start + 9 * s, 3 * s)].fill(0);
                image.write_zeroes(start + 20 * s + 5..start + 22 * s + 5).unwrap();
                expected[at(start + 20 * s + 5, 2 * s)].fill(0);
            }
        });
        assert_eq!(difference(&disk.assert_same(), &expected), None);
        assert_eq!(difference(&qemu::contents(&disk.path, Some("one")), &kept), None);
    });
}

#[test]
fn a_small_write_over_a_backing_file_copies_one_subcluster() {
    each(|disk| {
        let (c, s) = (disk.cluster, disk.sub());
        disk.change(|image| image.write(c + 3 * s + 100, &[7; 10]).unwrap());
        let [host, bitmap] = disk.entry(1);
        // Without a backing file the whole new cluster reads zeros already.
        let bits = if disk.backing.is_some() { 1 << 3 } else { ALL };
        assert_eq!((host & COPIED, bitmap), (COPIED, bits));
        disk.change(|image| image.write(c + 30 * s + 1, &vec![8; 2 * s as usize - 2]).unwrap());
        assert_eq!(disk.entry(1), [host, bits | 0b11 << 30]);

        let around = if disk.backing.is_some() { 0x11 } else { 0 };
        let mut expected = vec![around; SIZE as usize];
        expected[at(c + 3 * s + 100, 10)].fill(7);
        expected[at(c + 30 * s + 1, 2 * s - 2)].fill(8);
        assert_eq!(difference(&disk.assert_same(), &expected), None);
    });
}

#[test]
fn discards_of_subclusters_unmap_them_and_the_last_one_drops_the_cluster() {
    each(|disk| {
        let (c, s) = (disk.cluster, disk.sub());
        disk.io(&[format!("write -P 1 0 {c}"), format!("write -P 1 {c} {}", 4 * s)]);
        let backed = disk.backing.is_some();
        let zeros = |bits: u64| if backed { bits << 32 } else { 0 };
        disk.change(|image| {
            image.discard(s / 2..4 * s).unwrap();
            assert_eq!(image.next_hole(0).unwrap(), s);
            assert_eq!(image.next_data(s).unwrap(), Some(4 * s));
        });
        assert_eq!(disk.entry(0)[1], (ALL & !0b1110) | zeros(0b1110));
        disk.change(|image| {
            image.discard(c..c + 4 * s).unwrap();
            assert_eq!(image.next_hole(c).unwrap(), c);
        });
        // What was not discarded still shows the backing file.
        assert_eq!(disk.entry(1), [0, zeros(0b1111)]);
        let contents = disk.assert_same();
        let rest = contents[(c + 4 * s) as usize];
        assert_eq!(rest, if backed { 0x11 } else { 0 });
        disk.change(|image| image.discard(0..2 * c).unwrap());
        for guest in 0..2 {
            assert_eq!(disk.entry(guest), [0, zeros(ALL)]);
        }
    });
}

#[test]
fn discards_of_parts_of_a_subcluster_add_up() {
    for backed in [false, true] {
        let disk = Disk::new(256 << 10, backed);
        let s = disk.sub();
        disk.io(&[format!("write -P 1 0 {}", 4 * s)]);
        let bits = disk.entry(0)[1];
        disk.change(|image| image.discard(s..s + s / 2).unwrap());
        assert_eq!(disk.entry(0)[1], bits, "half of it has data");
        disk.change(|image| image.discard(s + s / 2..2 * s).unwrap());
        let zero = if backed { 0b10 << 32 } else { 0 };
        assert_eq!(disk.entry(0)[1], bits & !0b10 | zero);
        disk.assert_same();
    }
}

#[test]
fn clusters_move_with_their_bitmaps() {
    each(|disk| {
        let (c, s) = (disk.cluster, disk.sub());
        let (half, guests) = (SIZE / 2, SIZE / c);
        disk.io(&[format!("write -P 1 0 {half}")]);
        disk.change(|image| {
            for start in (guests / 2..guests).map(|guest| guest * c) {
                image.write(start + 3 * s + 9, &[5; 100]).unwrap();
                image.write_zeroes(start + 7 * s..start + 9 * s).unwrap();
            }
        });
        disk.change(|image| image.discard(0..half).unwrap());
        qemu::run(Command::new("qemu-img").args(["snapshot", "-c", "one"]).arg(&disk.path));
        let kept = qemu::contents(&disk.path, Some("one"));
        let mut expected = disk.assert_same();
        // A cluster that is shared though the bitmaps differ, and one that is not any more.
        let (shared, own) = (guests - 1, guests - 2);
        disk.change(|image| {
            image.write_zeroes(shared * c + 4 * s..shared * c + 5 * s).unwrap();
            expected[at(shared * c + 4 * s, s)].fill(0);
            image.write(own * c + 20 * s, &vec![6; s as usize]).unwrap();
            expected[at(own * c + 20 * s, s)].fill(6);
        });
        let length = || std::fs::metadata(&disk.path).unwrap().len();
        let (entries, long) = ([shared, own].map(|guest| disk.entry(guest)), length());
        assert_eq!(difference(&disk.assert_same(), &expected), None);
        disk.change(|image| image.compact(|_| true).unwrap());
        assert!(length() + SIZE / 8 < long, "{} of {long} bytes", length());
        let [[old, bitmap], [_, own_bitmap]] = entries;
        assert_eq!((disk.entry(shared)[1], disk.entry(own)[1]), (bitmap, own_bitmap));
        assert_ne!(disk.entry(shared)[0], old, "it has not moved");
        assert_eq!(difference(&disk.assert_same(), &expected), None);
        assert_eq!(difference(&qemu::contents(&disk.path, Some("one")), &kept), None);
    });
}

/// QEMU leaves the old data in the place of a subcluster that it only marks.
#[test]
fn what_lies_in_the_place_of_an_unallocated_subcluster_never_shows() {
    for cluster in [16 << 10, 64 << 10] {
        let disk = Disk::new(cluster, true);
        let s = disk.sub();
        disk.io(&[format!("write -P 0x55 0 {cluster}")]);
        let mut bytes = std::fs::read(&disk.path).unwrap();
        // Subcluster 1 reads zeros, subcluster 2 the backing file, both in front of stale data.
        let second = entry_at(&bytes, 0) as usize + 8;
        let word = (ALL & !0b110) | 0b010 << 32;
        bytes[second..second + 8].copy_from_slice(&word.to_be_bytes());
        std::fs::write(&disk.path, &bytes).unwrap();
        qemu::assert_clean(&disk.path);

        let mut expected = vec![0x11; SIZE as usize];
        expected[at(0, cluster)].fill(0x55);
        expected[at(s, s)].fill(0);
        expected[at(2 * s, s)].fill(0x11);
        assert_eq!(difference(&disk.assert_same(), &expected), None);
        disk.change(|image| {
            for sub in [1, 2] {
                let start = sub * s + 200;
                image.write(start, &[9; 50]).unwrap();
                expected[at(start, 50)].fill(9);
            }
        });
        assert_eq!(difference(&disk.assert_same(), &expected), None);
        assert_eq!(disk.entry(0)[1], ALL);
    }
}

/// A power cut after any part of what was written: the new bit never shows what lay there before.
#[test]
fn an_allocation_bit_is_durable_only_after_its_data() {
    let disk = Disk::new(64 << 10, true);
    disk.io(&["write -P 0x55 0 512".into()]);
    let memory = Arc::new(MemoryStorage::new(std::fs::read(&disk.path).unwrap()));
    let image = disk.open(memory.clone());
    image.write(10 * disk.sub(), &[9; 512]).unwrap();
    let on_disk = |memory: &MemoryStorage| {
        let bytes = memory.contents();
        be64(&bytes, entry_at(&bytes, 0) + 8)
    };
    assert_eq!(on_disk(&memory), 1, "only a flush writes tables");
    let syncs = image.status().unwrap().syncs;
    image.flush().unwrap();
    assert_eq!(on_disk(&memory), 1 | 1 << 10);
    assert_eq!(image.status().unwrap().syncs - syncs, 2, "data first, then the entry");
    image.close().unwrap();
}

#[test]
fn preallocation_keeps_what_shows_and_is_used_by_later_writes() {
    each(|disk| {
        let (c, s) = (disk.cluster, disk.sub());
        let before = disk.assert_same();
        disk.change(|image| image.preallocate(0..2 * c).unwrap());
        let [host, bitmap] = disk.entry(0);
        assert_eq!(host & COPIED, COPIED);
        assert_eq!(bitmap, if disk.backing.is_some() { 0 } else { ALL });
        assert_eq!(difference(&disk.assert_same(), &before), None);
        disk.change(|image| image.write(s, &vec![3; s as usize]).unwrap());
        let expected = if disk.backing.is_some() { 0b10 } else { ALL };
        assert_eq!(disk.entry(0), [host, expected]);
        disk.assert_same();
    });
}

#[test]
fn contradicting_bits_are_refused_and_stop_all_writing() {
    for (first, second) in [(None, 1 << 32 | ALL), (Some(0), 1), (Some(1 << 62 | 0x50000), 1)] {
        let disk = Disk::new(64 << 10, false);
        disk.io(&[format!("write -P 1 0 {}", 2 * disk.cluster)]);
        let mut bytes = std::fs::read(&disk.path).unwrap();
        let at = entry_at(&bytes, 0) as usize;
        if let Some(first) = first {
            bytes[at..at + 8].copy_from_slice(&u64::to_be_bytes(first));
        }
        bytes[at + 8..at + 16].copy_from_slice(&u64::to_be_bytes(second));
        let memory = Arc::new(MemoryStorage::new(bytes));
        assert_eq!(check(&*memory).unwrap().exit_code(), 2);
        let image = disk.open(memory);
        image.read(disk.cluster, &mut [0; 512]).unwrap();
        let error = image.read(0, &mut [0; 512]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains("L2 entry 0"), "{error}");
        assert!(!image.is_writable());
        let _unwritten = image.close();
    }
}

#[test]
fn repairing_a_flag_keeps_the_bitmap() {
    let disk = Disk::new(16 << 10, true);
    disk.io(&["write -P 1 0 1k".into(), "write -z 4k 1k".into()]);
    let [host, bitmap] = disk.entry(0);
    assert!(bitmap >> 32 != 0 && bitmap & ALL != 0);
    let mut bytes = std::fs::read(&disk.path).unwrap();
    let at = entry_at(&bytes, 0) as usize;
    bytes[at] &= 0x7f;
    std::fs::write(&disk.path, bytes).unwrap();
    repair_all(&disk.path);
    assert_eq!(disk.entry(0), [host, bitmap]);
    qemu::assert_clean(&disk.path);
}

fn repair_all(path: &Path) {
    let report = repair(&*host_file(path), Repair::All).unwrap();
    assert_eq!(report.exit_code(), 0, "{:?}", report.findings);
}

/// An entry without data whose cluster makes no sense forgets it, and shows what it showed.
#[test]
fn repairing_a_preallocation_keeps_what_shows() {
    let disk = Disk::new(16 << 10, true);
    disk.change(|image| {
        image.write_zeroes(1024..4096).unwrap();
        image.preallocate(0..disk.cluster).unwrap();
    });
    let shown = disk.assert_same();
    let mut bytes = std::fs::read(&disk.path).unwrap();
    let at = entry_at(&bytes, 0) as usize;
    let bitmap = be64(&bytes, at as u64 + 8);
    assert!(be64(&bytes, at as u64) != 0 && bitmap != 0 && bitmap & ALL == 0);
    bytes[at + 2] ^= 0x40;
    std::fs::write(&disk.path, bytes).unwrap();
    repair_all(&disk.path);
    assert_eq!(disk.entry(0), [0, bitmap]);
    qemu::assert_clean(&disk.path);
    assert_eq!(difference(&disk.assert_same(), &shown), None);
}

/// In a data file every cluster has its own place: through an entry that keeps another cluster's, that
/// one would be erased.
#[test]
fn an_entry_that_keeps_another_place_of_the_data_file_is_corrupt() {
    const CLUSTER: u64 = 64 << 10;
    let directory = scratch();
    let (path, data) = (directory.path().join("disk.qcow2"), directory.path().join("data"));
    let options = format!("extended_l2=on,cluster_size={CLUSTER},data_file={}", data.display());
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", &options]).arg(&path);
    qemu::run(create.arg(SIZE.to_string()));
    qemu::io(&path, &["write -P 1 0 256k".into(), "write -z 256k 64k".into()]);
    let before = std::fs::read(&data).unwrap();
    let made = std::fs::read(&path).unwrap();
    let at = entry_at(&made, 5) as usize;
    for bitmap in [0xffff, 0, ALL, ALL << 32, 0xffff << 32 | 0xffff_0000] {
        let mut bytes = made.clone();
        bytes[at..at + 8].copy_from_slice(&(COPIED | CLUSTER).to_be_bytes());
        bytes[at + 8..at + 16].copy_from_slice(&u64::to_be_bytes(bitmap));
        let file = MemoryStorage::new(bytes);
        let report = check(&file).unwrap();
        assert_eq!(report.corruptions, 1, "{bitmap:#x}: {:?}", report.findings);
        assert!(report.findings[0].contains("the guest's own offset"), "{:?}", report.findings);
        for clears in [true, false] {
            let beside = Beside { data: Some(host_file(&data)), ..Beside::default() };
            let file = Arc::new(MemoryStorage::new(file.contents()));
            let image = Image::open_with(file, &quiet(), beside).unwrap();
            let error = match clears {
                true => image.discard(5 * CLUSTER..5 * CLUSTER + 4096).unwrap_err(),
                // From the cluster before on, which reads zeros and is sound.
                false => image.read(4 * CLUSTER, &mut [0; 2 * CLUSTER as usize]).unwrap_err(),
            };
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{bitmap:#x}: {error}");
            assert!(error.to_string().contains("L2 entry 5 of table"), "{bitmap:#x}: {error}");
            let _unwritten = image.close();
        }
        assert_eq!(difference(&std::fs::read(&data).unwrap(), &before), None, "{bitmap:#x}");
    }
}
