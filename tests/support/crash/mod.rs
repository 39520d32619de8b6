//! The crash search: a history is recorded ([`history`]), then the files are judged that a crash at
//! any point of it may leave ([`search`]).
//!
//! Of the changes that no sync covers any subset may be on disk, each whole or torn at 512 bytes.
//! Where there are few, every subset is looked at, else none, all, all but one, one alone, those
//! before a point in time, and random ones. Each file must have no corruption, open, show the
//! snapshots of before or after what was under way, and in every sector what the oracle allows. Some
//! are judged by QEMU, which reads all of them. Some are opened for writing, worked on and closed,
//! and must be clean then; that work is recorded and crashed in turn, three deep.

// Every test program that searches compiles this for itself and uses its own part of it.
#![allow(dead_code)]

mod faults;
pub mod history;
pub mod saved;
pub mod search;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use qcow2fs::storage::testing::MemoryStorage;

use history::{Files, Plan, Recorded, record};
use search::{Finding, Search, Tally};

use crate::support::made::Made;
use crate::support::qemu::Shape;
use crate::support::rng::{Rng, fresh_seed};
use crate::support::{Watchdog, scratch, setting};

/// However slow the machine is, the search ends after so many times the seconds it is given.
const PATIENCE: u32 = 3;

/// What a search has found to be wrong.
pub struct Trouble {
    pub shape: Shape,
    pub complaint: String,
    /// The files that are wrong, and how they came to be, where a crash left them.
    at: Option<(Finding, Recorded)>,
}

/// One test that searches.
pub struct Campaign {
    /// Its name.
    pub test: &'static str,
    pub plan: Plan,
    /// One image in so many, or so, has a backing file.
    pub backed: u64,
    /// Whether each image that can has a bitmap, not only some.
    pub bitmaps: bool,
    /// What is done to the file that QEMU made.
    pub prepare: fn(&MemoryStorage),
    /// About so many files are looked at in one history.
    pub states_of_history: u64,
    /// It goes on for so many seconds, or `QCOW2FS_MODEL_SECONDS`,
    pub seconds: u64,
    /// and until so many files were looked at, where that variable is not set.
    pub states: u64,
}

impl Campaign {
    /// Searches with new seeds, or once with `QCOW2FS_SEED`, or once in the recording that
    /// `QCOW2FS_CRASH_RECORDING` names.
    pub fn run(&self, shape: impl Fn(&mut Rng) -> Shape) {
        let (seed, limit) = (setting("QCOW2FS_SEED"), setting("QCOW2FS_MODEL_SECONDS"));
        let seconds = Duration::from_secs(limit.unwrap_or(self.seconds));
        let first = seed.unwrap_or_else(fresh_seed);
        let (started, mut tally) = (Instant::now(), Tally::default());
        loop {
            let seed = first.wrapping_add(tally.histories);
            let _watchdog = Watchdog::new(format!("{} with QCOW2FS_SEED={seed}", self.test), 300);
            let _again = Again(self.command(seed, None));
            if let Err(trouble) = self.examine(seed, &shape, &mut tally) {
                self.report(seed, *trouble);
            }
            tally.histories += 1;
            let is_enough = limit.is_some() || tally.states >= self.states;
            let elapsed = started.elapsed();
            if setting("QCOW2FS_SEED").is_some()
                || elapsed >= seconds && (is_enough || elapsed >= seconds * PATIENCE)
            {
                break;
            }
        }
        println!("{}: {tally:?} from seed {first} in {:.1?}", self.test, started.elapsed());
        let is_full = seed.is_none() && limit.is_none();
        assert!(
            !is_full || tally.states >= self.states / 2,
            "{} files were looked at, far fewer than {}",
            tally.states,
            self.states
        );
    }

    /// Looks at the history of one seed.
    ///
    /// # Errors
    /// What is wrong.
    pub fn examine(
        &self,
        seed: u64,
        shape: &impl Fn(&mut Rng) -> Shape,
        tally: &mut Tally,
    ) -> Result<(), Box<Trouble>> {
        let directory = scratch();
        let mut rng = Rng::new(seed);
        let shape = shape(&mut rng);
        let backed = rng.one_in(self.backed);
        let mut made = Made::furnished_over(backed, shape, directory.path(), &mut rng);
        if self.bitmaps {
            made.add_bitmap();
        }
        let trouble =
            |complaint| Box::new(Trouble { shape: made.shape.clone(), complaint, at: None });
        let snapshots = made.snapshots().to_vec();
        let recorded = match std::env::var("QCOW2FS_CRASH_RECORDING") {
            Ok(path) => saved::load(&path),
            Err(_) => {
                let files = Files { image: made.file(), data: made.data() };
                (self.prepare)(&files.image);
                record(&made, files, &snapshots, self.plan, &mut rng).map_err(trouble)?
            }
        };
        tally.struck += recorded.struck;
        let search = Search::new(
            &made,
            &recorded,
            &made.contents,
            &snapshots,
            self.plan.mix,
            Rng::new(seed.wrapping_mul(3)),
            directory.path(),
            tally,
        );
        search.run(self.states_of_history).map_err(|finding| {
            Box::new(Trouble {
                shape: made.shape.clone(),
                complaint: format!("a crash at entry {}:\n{}", finding.position, finding.complaint),
                at: Some((*finding, recorded.clone())),
            })
        })
    }

    /// Keeps what shows the trouble, and says how to see it again.
    fn report(&self, seed: u64, trouble: Trouble) -> ! {
        let Trouble { shape, complaint, at } = trouble;
        let directory = kept_files();
        let mut recording = None;
        let mut fates = String::new();
        if let Some((finding, recorded)) = at {
            let path = directory.join(format!("crash-{seed}.qcow2"));
            std::fs::write(&path, finding.files.image.contents()).unwrap();
            if let Some(data) = &finding.files.data {
                std::fs::write(path.with_extension("data"), data.contents()).unwrap();
            }
            recording = self.plan.threads.then(|| saved::save(&recorded, &directory, seed));
            fates = format!(
                "of the changes since the last sync:\n{}\nthe file is {}\n",
                finding.fates,
                path.display()
            );
        }
        if recording.is_some() {
            eprintln!("{}", self.command(seed, recording));
        }
        panic!("{shape} {} bytes: {complaint}\n{fates}", shape.size);
    }

    /// The command that makes it happen again.
    fn command(&self, seed: u64, recording: Option<PathBuf>) -> String {
        let recording =
            recording.map(|path| format!("QCOW2FS_CRASH_RECORDING={} ", path.display()));
        format!(
            "again: {}QCOW2FS_SEED={seed} cargo test --release --test crash {}",
            recording.unwrap_or_default(),
            self.test
        )
    }
}

/// Says how to see a panic of the program itself again.
struct Again(String);

impl Drop for Again {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}

/// Where files are kept that show a failure.
fn kept_files() -> PathBuf {
    std::env::var_os("QCOW2FS_TEST_KEEP")
        .or_else(|| std::env::var_os("QCOW2FS_TEST_DIR"))
        .map_or_else(std::env::temp_dir, PathBuf::from)
}
