//! Any bytes as an image: opened for reading and for writing, read, changed, checked and repaired.
//!
//! The corpus starts with images that QEMU made (`tests/fuzz/seeds`), so that what is mutated has a
//! structure.

#![no_main]

use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use qcow2fs::check::{Repair, check, repair};
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
    }
}

fuzz_target!(|bytes: &[u8]| {
    let origin = MemoryStorage::new(bytes.to_vec());
    let file = Arc::new(origin.fork());
    let beside_it = beside(&origin);
    if let Ok(image) = Image::open_with(file, &Options::default(), beside_it.clone()) {
        let mut buf = vec![0; image.virtual_size().min(DISK) as usize];
        let _damage = image.read(0, &mut buf);
        let _damage = image.next_data(0);
        for snapshot in image.snapshots().unwrap_or_default().iter().take(2) {
            if let Ok(view) = image.open_snapshot(snapshot.id.as_bytes()) {
                let _damage = view.read(0, &mut buf[..view.info().disk_size.min(512) as usize]);
            }
        }
    }
    let options = Options {
        writable: true,
        keep_erased: 4096,
        compact_after: CompactAfter::Bytes(1),
        settle_after: Duration::ZERO,
        ..Options::default()
    };
    let file = Arc::new(origin.fork());
    if let Ok(image) = Image::open_with(file.clone(), &options, beside_it) {
        let end = image.virtual_size().min(DISK);
        let _refused = image.write(0, &vec![0xd7; end.min(3000) as usize & !511]);
        let _refused = image.discard(0..end / 2);
        let _refused = image.take_snapshot(b"more");
        let _refused = image.compact(|_| true);
        let _refused = image.close();
        let health = image.status().unwrap().health;
        assert!(!health.contains("defect"), "{health}");
    }
    let before = check(&origin).map(|report| report.corruptions);
    if let Ok(after) = repair(&origin, Repair::All) {
        assert!(after.corruptions <= before.unwrap());
    }
});
