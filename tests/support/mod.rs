//! What the programs that try to break the engine share: seeds, limits on waiting, images made
//! and judged by QEMU, and the oracle of what a sector may hold.

// Every test program compiles this for itself and uses its own part of it.
#![allow(dead_code)]

pub mod bitmaps;
pub mod luks;
pub mod made;
pub mod nbd;
pub mod oracle;
pub mod qemu;
pub mod rng;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use rng::Rng;

use qcow2fs::check::{Report, check};
use qcow2fs::image::{Beside, CompactAfter, Image, Options};
use qcow2fs::memory::Memory;
use qcow2fs::storage::{HostFile, Storage};

/// Bytes in a sector.
pub const SECTOR: u64 = 512;

/// A directory in memory, removed when it is dropped.
pub fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("qcow2fs-").tempdir_in("/dev/shm").unwrap()
}

/// The host file at `path`, open for writing.
pub fn host_file(path: &Path) -> Arc<dyn Storage> {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    Arc::new(HostFile::new(file))
}

/// The number in environment variable `name`.
pub fn setting(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {value:?}")))
}

/// For writing, with a pool and a cache so small that they run out, and a recycler that is quick
/// to flush.
pub fn busy(rng: &mut Rng) -> Options {
    let keep_erased = *rng.pick(&[0, 8 << 10, 256 << 10, 4 << 20]);
    let flush_after = Duration::from_millis(*rng.pick(&[1, 10, 100]));
    let metadata_cache = *rng.pick(&[0, 4096, 1 << 20]);
    Options {
        writable: true,
        keep_erased,
        flush_after,
        metadata_cache,
        // None of it for caches: each load lets something go.
        caches: Memory::new(if keep_erased == 0 { 0 } else { u64::MAX }),
        return_leaks: true,
        compact_after: *rng.pick(&[CompactAfter::Off, CompactAfter::Bytes(1)]),
        settle_after: Duration::from_millis(*rng.pick(&[0, 2, 20])),
        recycle_rate: None,
        label: String::new(),
        threads: true,
        runtime_asserts: rng.one_in(2),
    }
}

/// Opens for reading.
pub fn open_read_only(storage: Arc<dyn Storage>, beside: Beside) -> qcow2fs::Result<Arc<Image>> {
    Image::open_with(storage, &Options { writable: false, ..Options::default() }, beside)
}

/// No corruption, as far as this project's verifier can tell; leaks may be there.
pub fn verify(file: &dyn Storage) -> Result<(), String> {
    find(file, |report| report.corruptions)
}

/// Neither corruption nor a leak.
pub fn verify_clean(file: &dyn Storage) -> Result<(), String> {
    find(file, |report| report.corruptions + report.leaks)
}

fn find(file: &dyn Storage, bad: impl Fn(&Report) -> u64) -> Result<(), String> {
    let report = check(file).map_err(|e| format!("checking it: {e}"))?;
    match bad(&report) {
        0 => Ok(()),
        n => Err(format!("{n} things are wrong:\n  {}", report.findings.join("\n  "))),
    }
}

/// Aborts the program with a message unless it is dropped in time.
#[must_use]
pub struct Watchdog(#[allow(dead_code, reason = "dropping it calls the dog off")] Sender<()>);

impl Watchdog {
    /// `what` must be over in `seconds`.
    pub fn new(what: impl Into<String>, seconds: u64) -> Self {
        let what = what.into();
        let (sender, receiver) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            let limit = Duration::from_secs(seconds);
            if receiver.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                eprintln!("watchdog: {what} is not over after {seconds} s");
                std::process::abort();
            }
        });
        Watchdog(sender)
    }
}

/// Says on failure which seed makes it happen again.
struct Replayable {
    test: &'static str,
    seed: u64,
}

impl Drop for Replayable {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{} failed: run it again with QCOW2FS_SEED={}", self.test, self.seed);
        }
    }
}

/// Runs `history` with new seeds for `seconds` (or `QCOW2FS_MODEL_SECONDS`), at least once; or
/// exactly once with `QCOW2FS_SEED`. Each run may take a minute at most.
pub fn for_seeds(test: &'static str, seconds: u64, mut history: impl FnMut(u64)) {
    let limit = Duration::from_secs(setting("QCOW2FS_MODEL_SECONDS").unwrap_or(seconds));
    let started = Instant::now();
    let mut runs = 0u64;
    let fixed = setting("QCOW2FS_SEED");
    let first = fixed.unwrap_or_else(rng::fresh_seed);
    loop {
        let seed = first.wrapping_add(runs);
        let _replayable = Replayable { test, seed };
        let _watchdog = Watchdog::new(format!("{test} with QCOW2FS_SEED={seed}"), 60);
        history(seed);
        runs += 1;
        if fixed.is_some() || started.elapsed() >= limit {
            break;
        }
    }
    println!("{test}: {runs} histories from seed {first} in {:.1?}", started.elapsed());
}

/// The first place where two byte strings differ, for a message; `None` when they are the same.
pub fn difference(found: &[u8], expected: &[u8]) -> Option<String> {
    if found.len() != expected.len() {
        return Some(format!("{} bytes instead of {}", found.len(), expected.len()));
    }
    let at = (0..found.len()).find(|&i| found[i] != expected[i])?;
    let end = found.len().min(at + 16);
    let count = (0..found.len()).filter(|&i| found[i] != expected[i]).count();
    Some(format!(
        "at {at:#x} {:02x?} instead of {:02x?}; {count} bytes differ",
        &found[at..end],
        &expected[at..end]
    ))
}
