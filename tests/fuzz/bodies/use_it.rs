//! Everything that is done to an image that may say anything: opened for reading and for writing, read,
//! changed, checked and repaired. It may fail as it likes, but not panic, and a repair makes nothing
//! worse.

use std::sync::Arc;
use std::time::Duration;

use qcow2fs::check::{Repair, Report, check, repair};
use qcow2fs::image::{Beside, CompactAfter, Image, Options, RawBacking};
use qcow2fs::storage::testing::MemoryStorage;

/// Bytes of the disk that are looked at.
const DISK: u64 = 256 << 10;

fn beside(file: &MemoryStorage) -> Beside {
    let Ok(summary) = Image::summarize(file) else { return Beside::default() };
    let other = || Arc::new(MemoryStorage::new(vec![7; 4096]));
    Beside {
        backing: summary.backing.map(|_| Arc::new(RawBacking::new(other()).unwrap()) as _),
        data: summary.data_file.map(|_| other() as _),
        cipher: None,
    }
}

fn read_all(file: MemoryStorage, beside: Beside) {
    let options = Options { threads: false, ..Options::default() };
    let Ok(image) = Image::open_with(Arc::new(file), &options, beside) else { return };
    let mut buf = vec![0; image.virtual_size().min(DISK) as usize];
    let _damage = image.read(0, &mut buf);
    let _damage = image.next_data(0);
    for at in [image.virtual_size(), u64::MAX >> 1, u64::MAX - 511] {
        let mut past_the_end = [1; 512];
        let read = image.read(at, &mut past_the_end);
        assert!(read.is_err() || past_the_end == [0; 512], "{at:#x} is past the end");
        let _past_the_end = image.next_data(at);
        let _past_the_end = image.next_hole(at);
    }
    for snapshot in image.snapshots().unwrap_or_default().iter().take(2) {
        if let Ok(view) = image.open_snapshot(snapshot.id.as_bytes()) {
            let size = view.info().disk_size.min(512).min(buf.len() as u64);
            let _damage = view.read(0, &mut buf[..size as usize]);
        }
    }
}

fn change(file: MemoryStorage, beside: Beside) {
    let options = Options {
        writable: true,
        keep_erased: 4096,
        compact_after: CompactAfter::Bytes(1),
        settle_after: Duration::ZERO,
        threads: false,
        ..Options::default()
    };
    let Ok(image) = Image::open_with(Arc::new(file), &options, beside) else { return };
    let end = image.virtual_size().min(DISK);
    let _refused = image.write(0, &vec![0xd7; end.min(3000) as usize & !511]);
    let _refused = image.write_zeroes(end / 4..end / 3);
    let _refused = image.discard(0..end / 2);
    let _refused = image.preallocate(end / 2..end / 2 + 2048);
    let _refused = image.take_snapshot(b"more");
    let _refused = image.write((end / 2) & !511, &[0xd8; 512]);
    let _refused = image.delete_snapshot(b"more");
    let _refused = image.compact(|_| true);
    let _refused = image.close();
    let health = image.status().unwrap().health;
    // What is corrupt may have any name.
    assert!(health.starts_with("it is corrupt") || !health.contains("defect"), "{health}");
    assert!(health.len() < 64 << 10, "{} bytes say how it is", health.len());
}

/// Does it all, each to the file as it is in `origin`.
pub fn use_it(origin: &MemoryStorage) {
    let beside = beside(origin);
    read_all(origin.fork(), beside.clone());
    change(origin.fork(), beside);
    // A flag that is missing costs a copy, and is what a repair leaves where a refcount is too narrow.
    let dangers = |report: &Report| report.corruptions - report.missing_flags;
    let before = check(origin).map(|report| dangers(&report));
    if let Ok(after) = repair(origin, Repair::All) {
        assert!(dangers(&after) <= before.unwrap(), "{:?}", after.findings);
    }
}
