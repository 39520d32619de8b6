//! Histories of operations on a new image, some of them ended by a crash, against a model: what was
//! flushed reads back, and nothing is corrupt.

use std::sync::Arc;
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use qcow2fs::check::check;
use qcow2fs::image::{CompactAfter, CreateOptions, Image, Options};
use qcow2fs::storage::testing::MemoryStorage;

const DISK: u64 = 256 << 10;

#[derive(Arbitrary, Debug)]
enum Step {
    Write {
        at: u16,
        sectors: u8,
        byte: u8,
    },
    Discard {
        at: u16,
        sectors: u8,
    },
    Zero {
        at: u16,
        sectors: u8,
    },
    Flush,
    Recycle,
    Snapshot,
    DeleteSnapshot,
    Compact,
    Reopen,
    /// Everything that was written is there, but nothing was closed.
    Crash,
}

#[derive(Arbitrary, Debug)]
struct History {
    cluster_bits: u8,
    refcount_order: u8,
    steps: Vec<Step>,
}

fn range(at: u16, sectors: u8) -> std::ops::Range<u64> {
    let start = u64::from(at) * 512 % DISK;
    start..(start + u64::from(sectors) * 512).min(DISK)
}

fn open(file: &Arc<MemoryStorage>) -> Arc<Image> {
    let options = Options {
        writable: true,
        keep_erased: 16 << 10,
        flush_after: Duration::from_millis(1),
        compact_after: CompactAfter::Off,
        threads: false,
        ..Options::default()
    };
    Image::open(file.clone(), &options).unwrap()
}

fn assert_is(image: &Image, model: &[u8]) {
    let mut found = vec![0; DISK as usize];
    image.read(0, &mut found).unwrap();
    assert!(found == model, "the disk differs from the model");
}

/// Runs the target.
pub fn run(bytes: &[u8]) {
    let Ok(history) = History::arbitrary_take_rest(Unstructured::new(bytes)) else { return };
    let mut file = Arc::new(MemoryStorage::default());
    let options = CreateOptions {
        virtual_size: DISK,
        cluster_size: 512 << (history.cluster_bits % 8),
        refcount_bits: 1 << (history.refcount_order % 7),
        ..CreateOptions::default()
    };
    if Image::create(&*file, &options).is_err() {
        return;
    }
    let mut model = vec![0; DISK as usize];
    let mut image = open(&file);
    for step in history.steps.iter().take(64) {
        match *step {
            Step::Write { at, sectors, byte } => {
                let range = range(at, sectors);
                image.write(range.start, &vec![byte; (range.end - range.start) as usize]).unwrap();
                model[range.start as usize..range.end as usize].fill(byte);
            }
            Step::Discard { at, sectors } => {
                let range = range(at, sectors);
                image.discard(range.clone()).unwrap();
                model[range.start as usize..range.end as usize].fill(0);
            }
            Step::Zero { at, sectors } => {
                let range = range(at, sectors);
                image.write_zeroes(range.clone()).unwrap();
                model[range.start as usize..range.end as usize].fill(0);
            }
            Step::Flush => image.flush().unwrap(),
            Step::Recycle => drop(image.recycle(std::time::Instant::now()).unwrap()),
            // Refcounts may be too narrow.
            Step::Snapshot => drop(image.take_snapshot(b"one")),
            Step::DeleteSnapshot => drop(image.delete_snapshot(b"one")),
            Step::Compact => image.compact(|_| true).unwrap(),
            Step::Reopen => {
                image.close().unwrap();
                assert_eq!(check(&*file).unwrap().corruptions, 0);
                image = open(&file);
            }
            Step::Crash => {
                image.flush().unwrap();
                let state = Arc::new(file.fork());
                image.close().unwrap();
                file = state;
                assert_eq!(check(&*file).unwrap().corruptions, 0);
                image = open(&file);
            }
        }
    }
    assert_is(&image, &model);
    image.close().unwrap();
    let report = check(&*file).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
}
