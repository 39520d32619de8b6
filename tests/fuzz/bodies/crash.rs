//! Histories that end in a loss of power, of which the input says what is left, and in the recovery,
//! which may end so too: no corruption, and every sector reads what was flushed, or something that was
//! written since.

use std::sync::Arc;
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use qcow2fs::check::check;
use qcow2fs::image::{CompactAfter, CreateOptions, Image, Options};
use qcow2fs::storage::testing::{Fate, MemoryStorage, RecordingStorage};

const SECTOR: usize = 512;
const SECTORS: usize = 128;

#[derive(Arbitrary, Debug)]
enum Step {
    Write {
        at: u8,
        sectors: u8,
        byte: u8,
    },
    Discard {
        at: u8,
        sectors: u8,
    },
    Zero {
        at: u8,
        sectors: u8,
    },
    Flush,
    Recycle,
    Snapshot,
    DeleteSnapshot,
    Compact,
    /// Power is lost; what is open is opened again.
    Crash {
        kept: u64,
        torn: u64,
    },
}

#[derive(Arbitrary, Debug)]
struct History {
    cluster_bits: u8,
    refcount_order: u8,
    steps: Vec<Step>,
}

fn options() -> Options {
    Options {
        writable: true,
        keep_erased: 16 << 10,
        flush_after: Duration::from_secs(3600),
        compact_after: CompactAfter::Off,
        threads: false,
        ..Options::default()
    }
}

fn range(at: u8, sectors: u8) -> std::ops::Range<usize> {
    let start = usize::from(at) % SECTORS;
    start..(start + usize::from(sectors)).min(SECTORS)
}

fn bytes(range: &std::ops::Range<usize>) -> std::ops::Range<u64> {
    (range.start * SECTOR) as u64..(range.end * SECTOR) as u64
}

/// What each sector may read after a crash; the last of them is what it reads now.
struct Model(Vec<Vec<u8>>);

impl Model {
    fn write(&mut self, range: std::ops::Range<usize>, byte: u8) {
        self.0[range].iter_mut().for_each(|sector| sector.push(byte));
    }

    /// All that was written is durable.
    fn flush(&mut self) {
        for sector in &mut self.0 {
            let last = *sector.last().unwrap();
            *sector = vec![last];
        }
    }

    fn assert_now(&self, disk: &[u8]) {
        for (number, sector) in disk.chunks_exact(SECTOR).enumerate() {
            let expected = *self.0[number].last().unwrap();
            assert!(sector.iter().all(|byte| *byte == expected), "sector {number}");
        }
    }

    /// What a sector reads after a crash is what it reads from now on, though perhaps not durably.
    fn crash(&mut self, disk: &[u8]) {
        for (number, sector) in disk.chunks_exact(SECTOR).enumerate() {
            let found = sector[0];
            assert!(sector.iter().all(|byte| *byte == found), "sector {number} is torn");
            let possible = &mut self.0[number];
            assert!(possible.contains(&found), "sector {number}: {found} of {possible:?}");
            possible.push(found);
        }
    }
}

fn read(image: &Image) -> Vec<u8> {
    let mut disk = vec![0; SECTORS * SECTOR];
    image.read(0, &mut disk).unwrap();
    disk
}

/// No more than flags that are not set.
fn assert_sound(file: &MemoryStorage) {
    let report = check(file).unwrap();
    assert_eq!(report.corruptions, report.missing_flags, "{:?}", report.findings);
}

fn lose_power(recorded: &RecordingStorage, kept: u64, torn: u64) -> MemoryStorage {
    let mut replay = recorded.replay();
    while replay.step().unwrap().is_some() {}
    let fate = |n: usize| match (kept >> (n % 64) & 1, torn >> (n % 64) & 1) {
        (1, _) => Fate::Kept,
        (_, 1) => Fate::Torn(kept.rotate_left(n as u32) ^ torn),
        _ => Fate::Lost,
    };
    replay.crash(fate).unwrap()
}

fn open(file: MemoryStorage) -> (Arc<RecordingStorage>, Arc<Image>) {
    let recorded = Arc::new(RecordingStorage::new(file));
    let image = Image::open(recorded.clone(), &options()).unwrap();
    (recorded, image)
}

/// Runs the target.
pub fn run(input: &[u8]) {
    let Ok(history) = History::arbitrary_take_rest(Unstructured::new(input)) else { return };
    let file = MemoryStorage::default();
    let create = CreateOptions {
        virtual_size: (SECTORS * SECTOR) as u64,
        cluster_size: 512 << (history.cluster_bits % 6),
        refcount_bits: 1 << (history.refcount_order % 7),
        ..CreateOptions::default()
    };
    if Image::create(&file, &create).is_err() {
        return;
    }
    let mut model = Model(vec![vec![0]; SECTORS]);
    let (mut recorded, mut image) = open(file);
    for step in history.steps.iter().take(48) {
        match *step {
            Step::Write { at, sectors, byte } => {
                let range = range(at, sectors);
                let data = vec![byte; range.len() * SECTOR];
                image.write(bytes(&range).start, &data).unwrap();
                model.write(range, byte);
            }
            Step::Discard { at, sectors } => {
                let range = range(at, sectors);
                image.discard(bytes(&range)).unwrap();
                model.write(range, 0);
            }
            Step::Zero { at, sectors } => {
                let range = range(at, sectors);
                image.write_zeroes(bytes(&range)).unwrap();
                model.write(range, 0);
            }
            Step::Flush => {
                image.flush().unwrap();
                model.flush();
            }
            Step::Recycle => drop(image.recycle(std::time::Instant::now()).unwrap()),
            // Refcounts may be too narrow.
            Step::Snapshot => drop(image.take_snapshot(b"one")),
            Step::DeleteSnapshot => drop(image.delete_snapshot(b"one")),
            Step::Compact => image.compact(|_| true).unwrap(),
            Step::Crash { kept, torn } => {
                let left = lose_power(&recorded, kept, torn);
                assert_sound(&left);
                let _closed_in_another_world = image.close();
                (recorded, image) = open(left);
                model.crash(&read(&image));
            }
        }
        model.assert_now(&read(&image));
    }
    image.close().unwrap();
    let report = check(recorded.current()).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
}
