//! The crash search finds what it is for: with any one rule of order left out ([`Rule`]) it finds a
//! file that is wrong, and with all of them kept it finds none on the same grounds. Built with the
//! feature `omit` only: `cargo test --release --features omit --test omissions`.
//!
//! `QCOW2FS_OMIT` names rules (`A,B`) to leave out, one after the other, `QCOW2FS_MODEL_SECONDS` the
//! seconds that the hunt for each lasts at most.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

#[path = "support/crash/mod.rs"]
mod crash_search;
mod support;

#[path = "omissions/interrupted.rs"]
mod interrupted;
#[path = "omissions/repair.rs"]
mod repair;

use interrupted::{Layout, Other};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use crash_search::Campaign;
use crash_search::history::{MOVES, MOVES_OF_SNAPSHOTS, Mix, Plan, SIZES, SNAPSHOTS, WRITES};
use crash_search::search::Tally;
use qcow2fs::rules::{Rule, leave_out, missed};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::MemoryStorage;
use support::luks::Encryption;
use support::qemu::{DataFile, Shape};
use support::rng::Rng;
use support::{SECTOR, setting};

/// A hunt lasts so long at most: minutes where everything else goes first.
const HUNT: u64 = 600;
/// Histories on each ground while all rules are kept.
const CONTROLS: u64 = 1;

/// Where breaking a rule shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ground {
    /// Random histories of a mix of actions.
    Random(Kind),
    /// Somebody else is at work in the midst of compaction.
    Compaction(Layout, Other),
    /// Two compact at once.
    CompactionByTwo,
    /// The pool is filled and used at once.
    Pool,
    /// A flush falls into the filling of the pool.
    PoolOfOldData,
    /// A bitmap is about to record.
    Bitmap,
    /// The header has autoclear bits that nobody knows.
    Autoclear,
    /// A damaged image is repaired.
    Repair,
}

/// What is special about random histories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Writes,
    Moves,
    Sizes,
    Snapshots,
    MovesOfSnapshots,
    DataFile,
    RawDataFile,
    Subclusters,
    Bitmaps,
    MovesOfBitmaps,
    Dirty,
    Encrypted,
}

const KINDS: [Kind; 12] = [
    Kind::Writes,
    Kind::Moves,
    Kind::Sizes,
    Kind::Snapshots,
    Kind::MovesOfSnapshots,
    Kind::DataFile,
    Kind::RawDataFile,
    Kind::Subclusters,
    Kind::Bitmaps,
    Kind::MovesOfBitmaps,
    Kind::Dirty,
    Kind::Encrypted,
];

fn ground(rule: Rule) -> Ground {
    Ground::Random(match rule {
        Rule::BlocksBeforeLinks
        | Rule::BarrierBeforeEntries
        | Rule::DataSynced
        | Rule::JunkWaits
        | Rule::AllocatedReadsZeros
        | Rule::AllocatedBeforeEntry
        | Rule::FileReachesAllocated
        | Rule::CopyBeforeEntry => Kind::Writes,
        Rule::MoveBeforeEntry => Kind::Moves,
        Rule::L1BeforeHeader
        | Rule::L1SwitchBeforeReuse
        | Rule::CutBeforeSize
        | Rule::SizeSynced
        | Rule::ClearBeforeGrowth => Kind::Sizes,
        Rule::TablesSynced
        | Rule::SharedJunkWaits
        | Rule::TableCopyBeforeEntry
        | Rule::CountBeforeFlag
        | Rule::FlagsBeforeSharing
        | Rule::SnapshotsBeforeHeader
        | Rule::SnapshotSwitchBeforeReuse
        | Rule::AppliedBeforeHeader
        | Rule::DiskBeforeApplied
        | Rule::DropsBeforeApplied
        | Rule::AppliedSwitchBeforeReuse => Kind::Snapshots,
        Rule::MoveBeforeWord | Rule::WordsBeforeTableMove => Kind::MovesOfSnapshots,
        Rule::DataFileBeforeTables => Kind::DataFile,
        Rule::RawMappingFirst => Kind::RawDataFile,
        Rule::SubclusterBeforeBit => Kind::Subclusters,
        Rule::EncryptedBeforeEntry => Kind::Encrypted,
        Rule::BitmapsBeforeHeader | Rule::BitmapSwitchBeforeReuse => Kind::Bitmaps,
        Rule::BitmapMoveBeforeWords => Kind::MovesOfBitmaps,
        Rule::RebuiltBeforeHeader | Rule::RebuiltSwitchBeforeUse => Kind::Dirty,
        Rule::LinksBeforePlaces | Rule::UnlinkedPlacesWait => {
            return Ground::Compaction(Layout::TablesFirst, Other::Writes);
        }
        Rule::UnlinkedPlacesInFile => {
            return Ground::Compaction(Layout::TablesFirst, Other::Cuts);
        }
        Rule::TableMoveBeforeEntry => {
            return Ground::Compaction(Layout::TablesAmongData, Other::Flushes);
        }
        Rule::LinksInTurn | Rule::LeftPlacesWait => {
            return Ground::Compaction(Layout::BlocksLast, Other::Frees);
        }
        Rule::WordsBeforePass => return Ground::CompactionByTwo,
        Rule::ErasedWaits => return Ground::Pool,
        Rule::StatesSynced => return Ground::PoolOfOldData,
        Rule::BitmapsMarkedFirst => return Ground::Bitmap,
        Rule::AutoclearFirst => return Ground::Autoclear,
        Rule::RepairedCountsBeforeFlags | Rule::RepairSynced => return Ground::Repair,
    })
}

impl Kind {
    fn mix(self) -> Mix {
        match self {
            Kind::Writes | Kind::DataFile | Kind::RawDataFile | Kind::Subclusters => WRITES,
            Kind::Dirty | Kind::Bitmaps | Kind::Encrypted => WRITES,
            Kind::Moves | Kind::MovesOfBitmaps => MOVES,
            Kind::Sizes => SIZES,
            Kind::Snapshots => SNAPSHOTS,
            Kind::MovesOfSnapshots => MOVES_OF_SNAPSHOTS,
        }
    }

    fn shape(self, rng: &mut Rng) -> Shape {
        let mut shape = Shape::random(rng, 64 << 10);
        shape.data_file = DataFile::None;
        shape.extended_l2 = false;
        shape.cluster_bits = *rng.pick(&[9, 9, 10, 12]);
        shape.size = rng.within(40..300) * SECTOR;
        match self {
            Kind::Writes | Kind::Moves | Kind::Sizes => return shape,
            Kind::Snapshots | Kind::MovesOfSnapshots => {
                shape.refcount_bits = shape.refcount_bits.max(4);
                return shape;
            }
            Kind::DataFile => shape.data_file = DataFile::Plain,
            Kind::RawDataFile => shape.data_file = DataFile::Raw,
            Kind::Subclusters => {
                shape.extended_l2 = true;
                shape.cluster_bits = 14;
            }
            // The older method: no LUKS header of 2 MB in each file that is looked at.
            Kind::Encrypted => shape = shape.encrypted(Encryption::Aes),
            Kind::Bitmaps | Kind::MovesOfBitmaps | Kind::Dirty => {}
        }
        shape.version = 3;
        shape
    }

    fn campaign(self) -> Campaign {
        Campaign {
            test: "omissions",
            plan: Plan { mix: self.mix(), actions: (10, 80), threads: false, faults: false },
            backed: 4,
            bitmaps: matches!(self, Kind::Bitmaps | Kind::MovesOfBitmaps),
            prepare: if self == Kind::Dirty { mark_dirty } else { |_| () },
            states_of_history: 400,
            seconds: HUNT,
            states: 0,
        }
    }
}

/// Sets the header's dirty bit.
fn mark_dirty(file: &MemoryStorage) {
    const LOWEST_BYTE_OF_INCOMPATIBLE_FEATURES: u64 = 79;
    let mut byte = [0];
    file.read_at(&mut byte, LOWEST_BYTE_OF_INCOMPATIBLE_FEATURES).unwrap();
    file.write_at(&[byte[0] | 1], LOWEST_BYTE_OF_INCOMPATIBLE_FEATURES).unwrap();
}

/// What the search finds in one history on a ground, if anything.
fn search(ground: Ground, seed: u64, tally: &mut Tally) -> Option<String> {
    let found = catch_unwind(AssertUnwindSafe(|| match ground {
        Ground::Random(kind) => {
            let campaign = kind.campaign();
            let shape = |rng: &mut Rng| kind.shape(rng);
            campaign.examine(seed, &shape, tally).map_err(|trouble| trouble.complaint)
        }
        Ground::Compaction(layout, other) => interrupted::compaction(layout, other, tally),
        Ground::CompactionByTwo => interrupted::compaction_by_two(tally),
        Ground::Pool => interrupted::pool(tally),
        Ground::PoolOfOldData => interrupted::pool_of_old_data(tally),
        Ground::Bitmap => interrupted::bitmap(tally),
        Ground::Autoclear => interrupted::autoclear(tally),
        Ground::Repair => repair::cut_off(tally),
    }));
    // What this program asserts of itself finds it too.
    found.unwrap_or_else(|_| Err("a panic".into())).err()
}

#[test]
fn the_search_finds_every_rule_that_is_left_out() {
    let only = std::env::var("QCOW2FS_OMIT").ok();
    let limit = Duration::from_secs(setting("QCOW2FS_MODEL_SECONDS").unwrap_or(HUNT));
    let names = Rule::ALL.map(|rule| format!("{rule:?}"));
    for one in only.iter().flat_map(|only| only.split(',')) {
        assert!(names.iter().any(|name| name == one), "there is no rule {one}: {names:?}");
    }
    let mut missing = Vec::new();
    for rule in Rule::ALL {
        let name = format!("{rule:?}");
        if only.as_ref().is_some_and(|only| !only.split(',').any(|one| one == name)) {
            continue;
        }
        leave_out(Some(rule));
        let (started, mut tally, mut found) = (Instant::now(), Tally::default(), None);
        while found.is_none() && started.elapsed() < limit {
            tally.histories += 1;
            found = search(ground(rule), tally.histories, &mut tally);
        }
        let (histories, states) = (tally.histories, tally.states);
        let (broken, took) = (missed(), started.elapsed());
        leave_out(None);
        let outcome = match &found {
            Some(complaint) => complaint.lines().take(2).collect::<Vec<_>>().join(" "),
            None => "NOT FOUND".into(),
        };
        let outcome: String = outcome.chars().take(100).collect();
        println!(
            "{rule:?} broken {broken} times: history {histories}, file {states}, {took:.1?}: {outcome}"
        );
        if found.is_none() || broken == 0 {
            missing.push(rule);
        }
    }
    assert!(missing.is_empty(), "left out and not found: {missing:?}");
}

/// The grounds themselves are sound: what is found there is found because a rule is left out.
#[test]
fn nothing_is_found_on_these_grounds_while_all_rules_are_kept() {
    // One process has one switch: the other test leaves rules out in a process of its own.
    if std::env::var_os("QCOW2FS_CONTROL").is_none() {
        let mut control = std::process::Command::new(std::env::current_exe().unwrap());
        control.args(["--exact", "nothing_is_found_on_these_grounds_while_all_rules_are_kept"]);
        control.args(["--nocapture"]).env("QCOW2FS_CONTROL", "1");
        assert!(control.status().unwrap().success());
        return;
    }
    let random = KINDS.map(Ground::Random);
    let directed = [
        Ground::Compaction(Layout::TablesFirst, Other::Writes),
        Ground::Compaction(Layout::TablesFirst, Other::Cuts),
        Ground::Compaction(Layout::TablesAmongData, Other::Flushes),
        Ground::Compaction(Layout::BlocksLast, Other::Frees),
        Ground::CompactionByTwo,
        Ground::Pool,
        Ground::PoolOfOldData,
        Ground::Bitmap,
        Ground::Autoclear,
        Ground::Repair,
    ];
    let mut tally = Tally::default();
    for ground in random.into_iter().chain(directed) {
        for seed in 1..=CONTROLS {
            let found = search(ground, seed, &mut tally);
            assert_eq!(found, None, "{ground:?}, history {seed}");
        }
    }
    println!("with all rules kept: {tally:?}");
}
