//! Failures of the host while snapshots are taken, deleted and applied: every operation on the file
//! fails in turn. What is left is sound, the snapshots are those of before or after, and where the
//! image still takes writes, the same change succeeds once the failure is over.

use std::sync::Arc;

use qcow2fs::check::check;
use qcow2fs::image::{Image, Options};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::{FailingStorage, Fault, MemoryStorage, Operation as Host};

use crate::model::{whole_disk, whole_view};
use crate::support::luks::Encryption;
use crate::support::made::Made;
use crate::support::qemu::{DataFile, Shape};
use crate::support::{difference, open_read_only, scratch, verify_clean};

const SIZE: usize = 200 << 10;

type Change = fn(&Image) -> qcow2fs::Result<()>;

/// The changes, with the snapshots and the disk that they lead to.
const CHANGES: [(&str, Change, &[u8], u8); 3] = [
    ("take", |image| image.take_snapshot(b"c").map(drop), b"abc", b'c'),
    ("delete", |image| image.delete_snapshot(b"a"), b"b", b'c'),
    ("apply", |image| image.apply_snapshot(b"a"), b"ab", b'a'),
];

/// What snapshot `name` holds, and the disk where it is the same.
fn content(name: u8) -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    bytes[..100 << 10].fill(b'a');
    if name >= b'b' {
        bytes[20 << 10..50 << 10].fill(b'b');
    }
    if name >= b'c' {
        bytes[30 << 10..120 << 10].fill(b'c');
        bytes[..5000].fill(0);
    }
    bytes
}

/// An open image with snapshots `a` and `b`, and a disk that differs from both.
fn begin(made: &Made) -> (Arc<MemoryStorage>, Arc<FailingStorage>, Arc<Image>) {
    let inner = Arc::new(made.file());
    let file = Arc::new(FailingStorage::new(inner.clone()));
    let options = Options {
        writable: true,
        keep_erased: 0,
        metadata_cache: 4096,
        return_leaks: false,
        ..Options::default()
    };
    let image = made.open_on(file.clone(), None, &options).unwrap();
    for name in [b'a', b'b', b'c'] {
        image.write(0, &content(name)).unwrap();
        if name < b'c' {
            image.take_snapshot(&[name]).unwrap();
        }
    }
    image.discard(0..5000).unwrap();
    image.flush().unwrap();
    (inner, file, image)
}

/// Each snapshot and the disk hold what they may, before the change or after it.
fn assert_old_or_new(image: &Image, after: &[u8], disk: u8) {
    let names: Vec<u8> =
        image.snapshots().unwrap().iter().flat_map(|info| info.name.bytes()).collect();
    assert!(names == b"ab" || names == after, "{:?}", String::from_utf8_lossy(&names));
    for name in names {
        let view = image.open_snapshot(&[name]).unwrap();
        assert_eq!(difference(&whole_view(&view), &content(name)), None, "snapshot {name}");
    }
    let found = whole_disk(image);
    assert!(found == content(b'c') || found == content(disk), "the disk is something else");
}

fn assert_sound(file: MemoryStorage, made: &Made, after: &[u8], disk: u8) {
    let report = check(&file).unwrap();
    assert_eq!(report.corruptions, report.missing_flags, "{}", report.findings.join("\n"));
    let image = open_read_only(Arc::new(file), made.beside(None)).unwrap();
    assert_old_or_new(&image, after, disk);
}

/// One change with one fault. Whether the fault happened.
fn suffer(made: &Made, change: (&str, Change, &[u8], u8), fault: Fault) -> bool {
    let (what, change, after, disk) = change;
    let (inner, file, image) = begin(made);
    file.arm(fault.clone());
    let result = change(&image);
    file.disarm();
    let struck = !file.strikes().is_empty();
    assert!(struck || result.is_ok(), "{what}: {result:?} without a failure");
    assert_sound(inner.fork(), made, after, disk);
    assert_old_or_new(&image, after, disk);
    if image.is_writable() && result.is_err() {
        let names: Vec<u8> =
            image.snapshots().unwrap().iter().flat_map(|info| info.name.bytes()).collect();
        if what == "apply" || names != after {
            change(&image).unwrap_or_else(|e| panic!("{what} again after {fault:?}: {e}"));
        }
    }
    let writable = image.is_writable();
    let closed = image.close();
    if writable {
        closed.unwrap();
        // What could not be done after the change itself is left to the search for leaks.
        let options = Options { writable: true, ..Options::default() };
        let image = made.open_on(inner.clone(), None, &options).unwrap();
        while image.status().unwrap().searching_leaks {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        image.close().unwrap();
        verify_clean(&*inner).unwrap();
    }
    assert!(inner.len().unwrap() > 0);
    assert_sound(inner.fork(), made, after, disk);
    struck
}

/// Compaction moves the snapshots, and one of its syncs fails: what it has moved is where the file says,
/// though nobody can ask for a flush any more.
#[test]
fn snapshots_that_have_moved_are_read_after_a_failed_sync() {
    let directory = scratch();
    let made = Made::empty(Shape::new(9, 16, 2 * SIZE as u64), directory.path());
    let second_half = SIZE as u64..2 * SIZE as u64;
    for after in 0.. {
        let file = Arc::new(FailingStorage::new(Arc::new(made.file())));
        let options = Options { writable: true, threads: false, ..Options::default() };
        let image = made.open_on(file.clone(), None, &options).unwrap();
        image.write(0, &vec![b'x'; SIZE]).unwrap();
        image.write(second_half.start, &content(b'c')).unwrap();
        image.discard(0..second_half.start).unwrap();
        image.take_snapshot(b"a").unwrap();
        image.write_zeroes(second_half.clone()).unwrap();
        image.flush().unwrap();
        let fault =
            Fault { on: vec![Host::Sync], after, lasting: false, errno: libc::EIO, short: false };
        file.arm(fault);
        let compacted = image.compact(|_| true);
        file.disarm();
        let view = image.open_snapshot(b"a").unwrap();
        let mut found = vec![0; SIZE];
        view.read(second_half.start, &mut found).unwrap();
        assert_eq!(difference(&found, &content(b'c')), None, "after sync {after}");
        if compacted.is_ok() {
            assert!(after > 3, "nothing was moved");
            return;
        }
    }
}

#[test]
fn whatever_fails_while_snapshots_change_leaves_them_whole() {
    let mut kinds = Host::CHANGES.to_vec();
    kinds.push(Host::Read);
    let mut runs = 0u64;
    for (version, cluster_bits, refcount_bits) in [(3, 12, 16), (2, 9, 16), (3, 9, 4)] {
        let shape = Shape {
            version,
            cluster_bits,
            refcount_bits,
            size: SIZE as u64,
            preallocation: "off",
            lazy_refcounts: false,
            extended_l2: false,
            encryption: Encryption::None,
            data_file: DataFile::None,
        };
        let directory = scratch();
        let made = Made::empty(shape, directory.path());
        for change in CHANGES {
            for after in 0.. {
                let mut any = false;
                for (errno, lasting) in
                    [(libc::ENOSPC, false), (libc::EIO, false), (libc::EIO, true)]
                {
                    let short = errno == libc::ENOSPC;
                    let fault = Fault { on: kinds.clone(), after, lasting, errno, short };
                    any |= suffer(&made, change, fault);
                    runs += 1;
                }
                if !any {
                    break;
                }
            }
        }
    }
    println!("{runs} failures of the host while snapshots changed");
    assert!(runs > 100);
}
