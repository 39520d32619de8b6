//! Every byte of the metadata of small images, changed to many values.
//!
//! Each changed image is opened, read, its snapshots too, and checked; some are opened for writing,
//! written, discarded, snapshotted and compacted. `QCOW2FS_MATRIX=all` (`scripts/test --long`) takes
//! sixteen values everywhere; else bytes that are zero among zeros, of which tables are full, get
//! one.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use qcow2fs::check::check;
use qcow2fs::image::{CompactAfter, Image, Options};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::{self, MemoryStorage};

use crate::meter;
use crate::shapes::{DISK, RECIPES, Sound};
use crate::support::Watchdog;
use crate::support::rng::Rng;

/// Values that a byte gets.
const VALUES: usize = 16;
/// Those that differ in what makes formats go wrong: bits at the ends, signs, borders.
const TELLING: [u8; 10] = [0, 1, 2, 3, 0x10, 0x40, 0x7f, 0x80, 0xfe, 0xff];
/// No open, read and check may take longer, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);
/// A file may grow so much while a little is written to it.
const GROWTH: u64 = 8 << 20;
/// What guests write: nothing in a sound image looks like that.
const MARK: u8 = 0xd7;

/// An image file that remembers whether anything was written far outside it.
struct Fenced {
    file: MemoryStorage,
    fence: u64,
    /// One more than the offset of the first write that was wrong; 0 without any.
    wrong: AtomicU64,
}

impl Fenced {
    fn new(file: MemoryStorage) -> Self {
        let fence = file.len().unwrap() + GROWTH;
        Fenced { file, fence, wrong: AtomicU64::new(0) }
    }

    fn allow(&self, range: Range<u64>) -> io::Result<()> {
        if range.end <= self.fence {
            return Ok(());
        }
        let _first =
            self.wrong.compare_exchange(0, range.start + 1, Ordering::Relaxed, Ordering::Relaxed);
        Err(io::Error::from_raw_os_error(libc::EFBIG))
    }
}

impl testing::Layer for Fenced {
    fn below(&self) -> &dyn Storage {
        &self.file
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.allow(offset..offset.saturating_add(data.len() as u64))?;
        self.file.write_at(data, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.allow(0..len)?;
        self.file.set_len(len)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.allow(range.clone())?;
        self.file.allocate(range)
    }
}

/// The parts of a disk that are looked at: its start, and its end.
fn parts(size: u64) -> [Range<u64>; 2] {
    let start = size.min(DISK);
    [0..start, size.saturating_sub(4096).max(start)..size]
}

/// Opens it for reading and reads all; whether it was opened.
fn read_through(sound: &Sound, file: Arc<MemoryStorage>) -> bool {
    let beside = sound.beside(&*file);
    let Ok(image) = Image::open_with(file, &Options::default(), beside) else { return false };
    let mut buf = vec![0; DISK as usize];
    for part in parts(image.virtual_size()) {
        for at in part.clone().step_by(16 << 10) {
            let length = (part.end - at).min(16 << 10) as usize;
            let _damage = image.read(at, &mut buf[..length]);
        }
        let _damage = image.next_data(part.start);
        let _damage = image.next_hole(part.start);
    }
    for snapshot in image.snapshots().unwrap_or_default().iter().take(3) {
        if let Ok(view) = image.open_snapshot(snapshot.id.as_bytes()) {
            let length = view.info().disk_size.min(DISK) as usize;
            let _damage = view.read(0, &mut buf[..length]);
            let _damage = view.next_data(0);
        }
    }
    true
}

/// Opens it for writing and does what guests and their owner do; whether it took writes.
fn use_it(sound: &Sound, file: Arc<Fenced>, rng: &mut Rng) -> bool {
    let options = Options {
        writable: true,
        keep_erased: 16 << 10,
        flush_after: Duration::from_millis(1),
        compact_after: CompactAfter::Bytes(1),
        settle_after: Duration::ZERO,
        ..Options::default()
    };
    let beside = sound.beside(&*file);
    let Ok(image) = Image::open_with(file, &options, beside) else { return false };
    let took = image.is_writable();
    let data = [MARK; 8 << 10];
    for _ in 0..6 {
        let [start, end] = parts(image.virtual_size());
        let part = if rng.one_in(4) { end } else { start };
        if part.is_empty() {
            continue;
        }
        let at = rng.within(part.clone()) & !511;
        let end = (at + rng.within(1..16) * 512).min(part.end);
        let _refused = match rng.within(0..8) {
            0 | 1 => image.discard(at..end),
            2 => image.write_zeroes(at..end),
            3 => image.flush(),
            4 if rng.one_in(2) => image.take_snapshot(b"more").map(drop),
            4 => image.delete_snapshot(b"1"),
            _ => image.write(at, &data[..(end - at) as usize]),
        };
    }
    if rng.one_in(2) {
        let _refused = image.compact(|_| true);
    }
    let _refused = image.close();
    let health = image.status().unwrap().health;
    assert!(!health.contains("defect"), "{health}");
    took
}

/// The values for the byte at `at`.
fn values(bytes: &[u8], at: usize, all: bool, rng: &mut Rng) -> Vec<u8> {
    let old = bytes[at];
    let near = &bytes[at.saturating_sub(16)..(at + 17).min(bytes.len())];
    let count = if all || near.iter().any(|byte| *byte != 0) { VALUES } else { 1 };
    let mut values = Vec::with_capacity(VALUES);
    let bits = (0..8).map(|bit| old ^ 1 << bit);
    let steps = [old.wrapping_add(1), old.wrapping_sub(1)];
    for value in bits.chain(steps).chain(TELLING) {
        if value != old && !values.contains(&value) {
            values.push(value);
        }
    }
    while values.len() > count {
        values.swap_remove(rng.within(0..values.len() as u64) as usize);
    }
    while values.len() < count {
        let value = rng.next() as u8;
        if value != old && !values.contains(&value) {
            values.push(value);
        }
    }
    values
}

/// Fails when it took too long, or too much memory.
fn assert_bounded(what: &str, started: Instant) {
    let (took, peak) = (started.elapsed(), meter::peak_of_all());
    assert!(took < PATIENCE, "{what} took {took:?}");
    // Of as many images as are open at a time.
    let limit = meter::LIMIT * std::thread::available_parallelism().map_or(1, |count| count.get());
    assert!(peak < limit, "{what} took {peak} bytes of memory");
}

#[derive(Default)]
struct Tally {
    bytes: u64,
    mutations: u64,
    opened: u64,
    written: u64,
}

fn mutate(sound: &Sound) -> Tally {
    let name = sound.recipe.name;
    let bytes = sound.file.contents();
    let all = std::env::var("QCOW2FS_MATRIX").is_ok_and(|kinds| kinds == "all");
    let mut tally = Tally::default();
    for at in sound.metadata.iter().cloned().flatten() {
        let _watchdog = at
            .is_multiple_of(256)
            .then(|| Watchdog::new(format!("{name}, bytes from {at:#x}"), 120));
        let mut rng = Rng::new(at);
        tally.bytes += 1;
        let values = values(&bytes, at as usize, all, &mut rng);
        // One value of each byte, but few of those that stand for nothing.
        let written = rng.within(0..VALUES as u64) as usize;
        for (i, value) in values.into_iter().enumerate() {
            let what = format!("{name}: byte {at:#x} is {value:#04x}");
            let started = Instant::now();
            let file = sound.file.fork();
            file.write_at(&[value], at).unwrap();
            tally.mutations += 1;
            let file = Arc::new(file);
            tally.opened += u64::from(read_through(sound, Arc::clone(&file)));
            let _verdict = check(&*file);
            if i == written {
                let file = Arc::new(Fenced::new(file.fork()));
                tally.written += u64::from(use_it(sound, Arc::clone(&file), &mut rng));
                let wrong = file.wrong.load(Ordering::Relaxed);
                assert_eq!(wrong, 0, "{what}: a write at {:#x} outside the image", wrong - 1);
                let mut start = [0; 512];
                file.read_at(&mut start, 0).unwrap();
                assert_ne!(start[..16], [MARK; 16], "{what}: the header was overwritten");
            }
            assert_bounded(&what, started);
        }
    }
    tally
}

fn survives(name: &str) {
    let _others = meter::among_others();
    let recipe = RECIPES.into_iter().find(|recipe| recipe.name == name).unwrap();
    let sound = Sound::make(recipe);
    assert_eq!(check(&sound.file).unwrap().corruptions, 0, "{name}");
    let started = Instant::now();
    let Tally { bytes, mutations, opened, written } = mutate(&sound);
    println!(
        "{name}: {mutations} changes of {bytes} bytes of metadata, {opened} of them opened, \
         {written} written to, in {:.1?}",
        started.elapsed()
    );
    assert!(opened > 0 && written > 0, "{name}: nothing was tried");
}

macro_rules! shapes {
    ($($test:ident: $name:literal),* $(,)?) => {
        $(#[test]
        fn $test() {
            survives($name);
        })*
    };
}

shapes! {
    no_byte_of_an_image_with_everything_does_harm: "everything",
    no_byte_of_a_version_2_image_does_harm: "version 2",
    no_byte_of_a_backed_image_does_harm: "backed, zstd",
    no_byte_of_wide_refcounts_does_harm: "wide refcounts",
    no_byte_of_narrow_refcounts_does_harm: "narrow refcounts",
    no_byte_beside_a_data_file_does_harm: "data file",
    no_byte_beside_a_raw_data_file_does_harm: "raw data file",
    no_byte_of_subclusters_does_harm: "subclusters",
}
