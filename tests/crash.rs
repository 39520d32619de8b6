//! The crash search on seeded histories: data, subclusters, snapshots, and several threads.
//! `support/crash` says how it goes.
//!
//! The search is what found that a freed cluster handed out before its unmapping is durable shows
//! another sector's data (in QEMU): the invariants in the crate's documentation are written from it.
//! That it would find each rule of order broken is shown by `tests/omissions.rs`.
//!
//! A history of one client follows from its seed, which `QCOW2FS_SEED` repeats. One with threads
//! does not: when it fails its recording is saved (in `QCOW2FS_TEST_KEEP`, else in
//! `QCOW2FS_TEST_DIR`), and the message has the command that looks at it again.
//! `QCOW2FS_MODEL_SECONDS` makes the search as long as one likes.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

#[path = "support/crash/mod.rs"]
mod crash_search;
mod support;

use crash_search::Campaign;
use crash_search::history::{Action, EVERYTHING, Mix, Plan, SNAPSHOTS, WRITES};
use crash_search::search::Tally;
use support::SECTOR;
use support::qemu::{DataFile, Shape};
use support::rng::Rng;

/// A shape whose file is small, so that thousands of crash states a second can be looked at.
fn small_shape(rng: &mut Rng) -> Shape {
    let mut shape = Shape::random(rng, 256 << 10);
    if shape.cluster_bits > 14 {
        shape.extended_l2 = false;
        shape.cluster_bits = *rng.pick(&[9, 9, 12, 13]);
        shape.size = rng.within(1..500) * SECTOR;
    }
    shape
}

/// The same with subclusters: of one sector, mostly.
fn shape_with_subclusters(rng: &mut Rng) -> Shape {
    let mut shape = Shape::random(rng, 256 << 10);
    shape.version = 3;
    shape.extended_l2 = true;
    shape.data_file = DataFile::None;
    shape.cluster_bits = *rng.pick(&[14, 14, 14, 16]);
    shape.size = rng.within(1..(6 << shape.cluster_bits) / SECTOR) * SECTOR;
    shape
}

/// The same where snapshots can be taken.
fn shape_with_snapshots(rng: &mut Rng) -> Shape {
    let mut shape = small_shape(rng);
    shape.data_file = DataFile::None;
    shape.refcount_bits = shape.refcount_bits.max(2);
    shape
}

#[test]
fn every_crash_leaves_a_sound_image_with_old_or_new_data() {
    Campaign {
        test: "every_crash_leaves_a_sound_image_with_old_or_new_data",
        plan: Plan { mix: WRITES, actions: (20, 150), threads: false, faults: false },
        backed: 3,
        bitmaps: false,
        prepare: |_| (),
        states_of_history: 900,
        seconds: 22,
        states: 18_000,
    }
    .run(|rng| small_shape(rng).encrypted_one_in(8, rng));
}

/// What [`WRITES`] was when the first seed below was found.
const FIRST_WRITES: Mix = &[
    (45, Action::Write),
    (1, Action::Fill),
    (20, Action::Discard),
    (5, Action::WriteZeroes),
    (3, Action::WriteZeros),
    (3, Action::Preallocate),
    (9, Action::Flush),
    (3, Action::Resize),
    (3, Action::Compact),
    (12, Action::Recycle),
];

/// And the second one.
const SECOND_WRITES: Mix = &[
    (45, Action::Write),
    (1, Action::Fill),
    (20, Action::Discard),
    (5, Action::WriteZeroes),
    (3, Action::WriteZeros),
    (2, Action::Preallocate),
    (1, Action::PreallocateMetadata),
    (9, Action::Flush),
    (3, Action::Resize),
    (2, Action::Compact),
    (1, Action::CompactSome),
    (2, Action::BeginPass),
    (1, Action::Defragment),
    (1, Action::FreeZeros),
    (12, Action::Recycle),
];

/// Searches the history of `seed`, which once showed a defect.
fn search_again(test: &'static str, mix: Mix, seed: u64) {
    let campaign = Campaign {
        test,
        plan: Plan { mix, actions: (20, 150), threads: false, faults: false },
        backed: 3,
        bitmaps: false,
        prepare: |_| (),
        states_of_history: 900,
        seconds: 0,
        states: 0,
    };
    let shape = |rng: &mut Rng| small_shape(rng).encrypted_one_in(8, rng);
    let found = campaign.examine(seed, &shape, &mut Tally::default());
    assert!(found.is_ok(), "it is back: {:?}", found.err().map(|trouble| trouble.complaint));
}

/// A refcount block that had moved was linked and the one that counts its place was not, which had
/// moved as well.
#[test]
fn a_refcount_block_is_linked_after_the_one_that_counts_its_place() {
    let test = "a_refcount_block_is_linked_after_the_one_that_counts_its_place";
    search_again(test, FIRST_WRITES, 1_795_270_163_391_651);
}

/// The data file of an encrypted image was cut while tables on disk still led to its end.
#[test]
fn an_encrypted_data_file_is_cut_once_no_table_on_disk_leads_to_its_end() {
    let test = "an_encrypted_data_file_is_cut_once_no_table_on_disk_leads_to_its_end";
    search_again(test, SECOND_WRITES, 1_795_282_136_940_058);
}

#[test]
fn every_crash_leaves_each_snapshot_whole_and_the_disk_old_or_new() {
    Campaign {
        test: "every_crash_leaves_each_snapshot_whole_and_the_disk_old_or_new",
        plan: Plan { mix: SNAPSHOTS, actions: (20, 120), threads: false, faults: false },
        backed: 4,
        bitmaps: false,
        prepare: |_| (),
        states_of_history: 900,
        seconds: 22,
        states: 18_000,
    }
    .run(|rng| shape_with_snapshots(rng).encrypted_one_in(8, rng));
}

#[test]
fn every_crash_leaves_subclusters_with_old_or_new_data() {
    Campaign {
        test: "every_crash_leaves_subclusters_with_old_or_new_data",
        plan: Plan { mix: WRITES, actions: (20, 120), threads: false, faults: false },
        backed: 2,
        bitmaps: false,
        prepare: |_| (),
        states_of_history: 900,
        seconds: 20,
        states: 7_000,
    }
    .run(|rng| shape_with_subclusters(rng).encrypted_one_in(8, rng));
}

#[test]
fn every_crash_in_the_midst_of_several_threads_leaves_a_sound_image() {
    Campaign {
        test: "every_crash_in_the_midst_of_several_threads_leaves_a_sound_image",
        plan: Plan { mix: WRITES, actions: (10, 80), threads: true, faults: false },
        backed: 3,
        bitmaps: false,
        prepare: |_| (),
        states_of_history: 900,
        seconds: 22,
        states: 8_000,
    }
    .run(|rng| small_shape(rng).encrypted_one_in(8, rng));
}

/// The host fails now and then, and the history goes on.
#[test]
fn every_crash_after_faults_leaves_a_sound_image_with_what_was_acknowledged() {
    Campaign {
        test: "every_crash_after_faults_leaves_a_sound_image_with_what_was_acknowledged",
        plan: Plan { mix: EVERYTHING, actions: (20, 150), threads: false, faults: true },
        backed: 4,
        bitmaps: false,
        prepare: |_| (),
        states_of_history: 900,
        seconds: 12,
        states: 4_000,
    }
    .run(|rng| {
        let shape = if rng.one_in(4) { shape_with_subclusters(rng) } else { small_shape(rng) };
        shape.encrypted_one_in(8, rng)
    });
}
