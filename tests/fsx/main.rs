//! Several processes do whatever a file can be done to, at random and at the same time, through a
//! mount that compacts: some to one raw file, each to its own part of it, and some each to a raw
//! file of its own, which they also cut and lengthen. Each knows what it must find, and looks all
//! the time; in the end QEMU looks too.
//!
//! It takes some 25 seconds; `QCOW2FS_MODEL_SECONDS` says how many instead, `QCOW2FS_SEED` makes the
//! same choices as a run before.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

#[macro_use]
#[allow(dead_code, reason = "this program uses its own part of it")]
#[path = "../mount/lab.rs"]
mod lab;
mod mapping;
#[path = "../support/mod.rs"]
mod support;
mod worker;

use std::ops::Range;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use lab::{Lab, assert_same, assert_sound, guest_bytes};
use support::rng::fresh_seed;
use support::{Watchdog, setting};
use worker::{Task, Worker};

const SECONDS: u64 = 25;
/// Bytes of a worker's part.
const PART: u64 = 8 << 20;

/// The images: name, options, how many share it, and whether they go past the page cache.
const IMAGES: [(&str, &str, u64, bool); 5] = [
    ("shared", "cluster_size=64k", 3, false),
    ("direct", "cluster_size=64k", 2, true),
    ("small", "cluster_size=4k", 1, false),
    ("subclusters", "cluster_size=64k,extended_l2=on", 1, false),
    ("old", "compat=0.10,cluster_size=16k", 1, false),
];

/// What a process is told by its environment.
const TASK: &str = "QCOW2FS_FSX_TASK";

/// The work of one process: this program starts itself again with only this.
#[test]
#[ignore = "it is what the other test starts"]
fn worker() {
    let task = std::env::var(TASK).expect("the other test says what to do");
    let task: Task = serde_json::from_str(&task).unwrap();
    println!("{}", Worker::new(task).work());
}

fn start(task: &Task) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "worker", "--ignored", "--nocapture"])
        .env(TASK, serde_json::to_string(task).unwrap())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn processes_that_do_everything_at_once_always_find_what_they_wrote() {
    let seconds = setting("QCOW2FS_MODEL_SECONDS").unwrap_or(SECONDS);
    let seed = setting("QCOW2FS_SEED").unwrap_or_else(fresh_seed);
    println!("QCOW2FS_SEED={seed}");
    let _watchdog = Watchdog::new("what processes do at once", 300 + 2 * seconds);
    let lab = Lab::new();
    let mut tasks = Vec::new();
    for (name, options, sharers, is_direct) in IMAGES {
        lab.create(&format!("{name}.qcow2"), &(sharers * PART).to_string(), options);
        for sharer in 0..sharers {
            tasks.push(Task {
                file: lab.point().join(format!("{name}.raw")),
                part: sharer * PART..(sharer + 1) * PART,
                is_alone: sharers == 1,
                is_direct,
                expected: lab.path(&format!("{name}-{sharer}.expected")),
                seed: seed.wrapping_add(tasks.len() as u64),
                seconds,
            });
        }
    }
    let mount = lab.mount_with("--compact-after 1");
    let workers: Vec<_> = tasks.iter().map(start).collect();
    for (worker, task) in workers.into_iter().zip(&tasks) {
        let output = worker.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}{complaint}", task.file.display());
        print!("{}", said.lines().filter(|line| line.contains("times")).collect::<String>());
        println!();
    }
    mount.umount();
    for (name, ..) in IMAGES {
        let image = lab.image(&format!("{name}.qcow2"));
        assert_sound(&image);
        let found = guest_bytes(&image);
        for task in tasks.iter().filter(|task| task.file.file_stem() == Some(name.as_ref())) {
            judge(&found, &task.part, &task.expected, name);
        }
    }
}

/// What QEMU finds is what a worker has left.
fn judge(found: &[u8], part: &Range<u64>, expected: &Path, name: &str) {
    let expected = std::fs::read(expected).unwrap();
    let end = found.len().min(part.end as usize);
    assert_same(&found[part.start as usize..end], &expected, &format!("{name} from {part:?}"));
}
