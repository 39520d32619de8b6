//! A repair that is cut off: whatever is lost, the image is no worse than it was, and once the repair
//! is over it is sound.

use std::process::Command;
use std::sync::Arc;

use qcow2fs::check::{Repair, Report, check, repair};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::{Fate, MemoryStorage, RecordingStorage};

use crate::crash_search::search::Tally;
use crate::support::rng::Rng;
use crate::support::{qemu, scratch};

/// Offsets of words in the header.
const L1_TABLE: u64 = 40;
const REFCOUNT_TABLE: u64 = 48;
const CLUSTER: u64 = 4096;

/// Repairs an image whose refcounts are too high and whose flags are missing, and crashes that.
pub fn cut_off(tally: &mut Tally) -> Result<(), String> {
    let damaged = damaged();
    let before = dangers(&check(&damaged).unwrap());
    let recording = Arc::new(RecordingStorage::new(damaged));
    let after = repair(&*recording, Repair::All).map_err(|e| e.to_string())?;
    assert_eq!(after.exit_code(), 0, "{:?}", after.findings);
    let (mut replay, mut rng) = (recording.replay(), Rng::new(1));
    loop {
        for round in 0..20 {
            tally.states += 1;
            let mut fate = |_| if round == 0 || rng.one_in(2) { Fate::Kept } else { Fate::Lost };
            let report = check(&replay.crash(&mut fate).unwrap()).unwrap();
            if dangers(&report) > before {
                return Err(format!("it is worse: {}", report.findings.join(" ")));
            }
        }
        if replay.step().unwrap().is_none() {
            break;
        }
    }
    let durable = check(&replay.crash(|_| Fate::Lost).unwrap()).unwrap();
    match durable.exit_code() {
        0 => Ok(()),
        _ => Err(format!("what is repaired is not durable: {}", durable.findings.join(" "))),
    }
}

fn damaged() -> MemoryStorage {
    let directory = scratch();
    let path = directory.path().join("disk.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"]);
    qemu::run(create.arg(&path).arg("8M"));
    qemu::io(&path, &["write -P 1 0 60k".to_owned(), "write -P 2 4M 20k".to_owned()]);
    let file = MemoryStorage::new(std::fs::read(&path).unwrap());
    let block = word(&file, word(&file, REFCOUNT_TABLE));
    let table = word(&file, word(&file, L1_TABLE)) & 0x00ff_ffff_ffff_fe00;
    for entry in 0..15 {
        let at = table + entry * 8;
        let without_flag = word(&file, at) & !(1 << 63);
        let cluster = without_flag / CLUSTER;
        file.write_at(&without_flag.to_be_bytes(), at).unwrap();
        file.write_at(&3u16.to_be_bytes(), block + cluster * 2).unwrap();
    }
    file
}

fn word(file: &MemoryStorage, at: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

/// Corruptions that can lose data. A COPIED flag that is missing only costs a copy.
fn dangers(report: &Report) -> u64 {
    report.corruptions - report.missing_flags
}
