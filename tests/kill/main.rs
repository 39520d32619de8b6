//! The daemon is killed with SIGKILL, again and again, at any moment of its work: what it has
//! acknowledged is there afterwards, by the judgement of whoever wrote it, of fio, of the checks of
//! ext4 and xfs, and of `qemu-img check`; and mounting again takes no time.
//!
//! Some are killed under clients that write to the raw files ([`raw`]), some under file systems on
//! loop devices ([`filesystems`]). In [`gone`] it is the mount that is taken
//! away. The image directories live on from kill to kill, so that each
//! one meets what the one before has left, and clusters move at most of them.
//!
//! `QCOW2FS_KILLS` says how many kills there are at least (300), `QCOW2FS_MODEL_SECONDS` for how
//! long they go on at least, `QCOW2FS_SEED` makes the same choices as a run before. What a kill
//! leaves in the host's page cache stays written: power cuts are simulated by `tests/crash.rs`.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

#[macro_use]
#[allow(dead_code, reason = "this program uses its own part of it")]
#[path = "../mount/lab.rs"]
mod lab;
mod daemon;
#[allow(dead_code, reason = "this program uses its own part of it")]
#[path = "../mount/devices.rs"]
mod devices;
mod filesystems;
mod gone;
mod raw;
#[path = "../support/mod.rs"]
mod support;
mod tally;

use support::rng::fresh_seed;
use support::{Watchdog, setting};
use tally::Tally;

/// How many kills there are without being told.
const KILLS: u64 = 300;
/// One kill in so many happens under a file system: that takes several times as long.
const FILE_SYSTEM_SHARE: u64 = 5;
/// Mostly they wait: for the recycler to find that it may begin, and for the moment of the kill.
const RAW_AT_ONCE: u64 = 8;
const FILE_SYSTEMS_AT_ONCE: u64 = 4;

/// Kills with several workers at once until there are enough; what came of it.
fn kill_often(what: &str, kills: u64, at_once: u64, work: impl Fn(u64, &Tally) + Sync) {
    let seconds = setting("QCOW2FS_MODEL_SECONDS").unwrap_or(0);
    let limit = 600 + 2 * seconds + 10 * kills;
    let _watchdog = Watchdog::new(format!("killing under {what}"), limit);
    let seed = setting("QCOW2FS_SEED").unwrap_or_else(fresh_seed);
    println!("{what}: QCOW2FS_SEED={seed}");
    let tally = Tally::new(kills, seconds);
    std::thread::scope(|scope| {
        let (work, tally) = (&work, &tally);
        for worker in 0..at_once {
            scope.spawn(move || {
                let _ended = tally.ends_on_panic();
                work(seed.wrapping_add(worker << 32), tally);
            });
        }
    });
    println!("{what}: {tally}");
    tally.assert_well_done();
}

fn kills() -> u64 {
    setting("QCOW2FS_KILLS").unwrap_or(KILLS)
}

#[test]
fn what_is_acknowledged_on_raw_files_outlives_the_daemon() {
    let kills = kills() - kills() / FILE_SYSTEM_SHARE;
    kill_often("raw files", kills, RAW_AT_ONCE, raw::work);
}

#[test]
fn file_systems_on_loop_devices_outlive_the_daemon() {
    let kills = kills() / FILE_SYSTEM_SHARE;
    kill_often("file systems", kills, FILE_SYSTEMS_AT_ONCE, filesystems::work);
}
