//! Repairs that are cut off: whatever is lost of the writes since the last sync, the image is no
//! worse than it was.

use std::io;
use std::ops::Range;
use std::sync::Mutex;

use qcow2fs::check::{Repair, Report, check, repair};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::MemoryStorage;

use super::common::*;

/// What a storage was told to do.
enum Step {
    Write(u64, Vec<u8>),
    Punch(Range<u64>),
    Sync,
}

/// A file in memory that notes every change.
struct Recorder {
    file: MemoryStorage,
    steps: Mutex<Vec<Step>>,
}

impl Recorder {
    fn note(&self, step: Step) {
        self.steps.lock().unwrap().push(step);
    }
}

impl Storage for Recorder {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, offset)
    }
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.note(Step::Write(offset, data.to_vec()));
        self.file.write_at(data, offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.note(Step::Sync);
        Ok(())
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        panic!("a repair does not cut the file")
    }
    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.note(Step::Punch(range.clone()));
        self.file.punch_hole(range)
    }
    fn zero_range(&self, _: Range<u64>) -> io::Result<()> {
        panic!("a repair does not zero")
    }
    fn allocate(&self, _: Range<u64>) -> io::Result<()> {
        Ok(())
    }
    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.file.seek_data(offset)
    }
    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }
}

/// One thing that is lost or kept as a whole: at most a sector of a write.
fn pieces(step: &Step) -> Vec<Step> {
    match step {
        Step::Write(offset, data) => {
            let mut pieces = Vec::new();
            let (mut at, mut rest) = (*offset, &data[..]);
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(rest.len().min(512 - (at % 512) as usize));
                pieces.push(Step::Write(at, piece.to_vec()));
                (at, rest) = (at + piece.len() as u64, after);
            }
            pieces
        }
        Step::Punch(range) => vec![Step::Punch(range.clone())],
        Step::Sync => Vec::new(),
    }
}

fn apply(bytes: &mut Vec<u8>, step: &Step) {
    match step {
        Step::Write(offset, data) => {
            let end = *offset as usize + data.len();
            bytes.resize(bytes.len().max(end), 0);
            bytes[*offset as usize..end].copy_from_slice(data);
        }
        Step::Punch(range) => {
            let end = bytes.len().min(range.end as usize);
            bytes[(range.start as usize).min(end)..end].fill(0);
        }
        Step::Sync => {}
    }
}

/// Corruptions that can lose data. A COPIED flag that is missing only costs a copy.
fn dangers(report: &Report) -> u64 {
    assert_eq!(report.findings_left_out, 0);
    report.corruptions
        - report.findings.iter().filter(|f| f.contains("is not COPIED")).count() as u64
}

/// Repairs the image and cuts that off everywhere.
fn cut_off(what: &str, image: Vec<u8>, mode: Repair) {
    let before = check(&MemoryStorage::new(image.clone())).unwrap();
    assert_ne!(before.exit_code(), 0, "{what}: nothing to repair");
    let recorder = Recorder { file: MemoryStorage::new(image.clone()), steps: Mutex::default() };
    let after = repair(&recorder, mode).unwrap();
    assert_eq!(after.exit_code(), 0, "{what}: {:?}", after.findings);
    let steps = recorder.steps.into_inner().unwrap();
    assert!(matches!(steps.last(), Some(Step::Sync)), "{what}: what is repaired is not durable");

    let judge = |bytes: Vec<u8>, when: String| {
        let report = check(&MemoryStorage::new(bytes)).unwrap();
        let few = &report.findings[..report.findings.len().min(4)];
        assert!(dangers(&report) <= dangers(&before), "{what} {when}: {few:?}");
    };
    let mut durable = image;
    let mut random = Random(11);
    for (number, epoch) in steps.split(|step| matches!(step, Step::Sync)).enumerate() {
        let parts: Vec<Step> = epoch.iter().flat_map(pieces).collect();
        for kept in 0..=parts.len() {
            let mut bytes = durable.clone();
            parts[..kept].iter().for_each(|part| apply(&mut bytes, part));
            judge(bytes, format!("epoch {number}, the first {kept} parts"));
        }
        for round in 0..40 {
            let mut bytes = durable.clone();
            for part in &parts {
                if random.below(2) == 0 {
                    apply(&mut bytes, part);
                }
            }
            judge(bytes, format!("epoch {number}, random parts {round}"));
        }
        parts.iter().for_each(|part| apply(&mut durable, part));
    }
    assert_eq!(durable, recorder.file.contents(), "the replay must end where the repair did");
}

fn u64_at(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

/// A small image and where its first refcount block and its first L2 table are.
fn image(options: &str) -> (Vec<u8>, u64, u64) {
    let directory = directory();
    let path = directory.path().join("i.qcow2");
    create(&path, &format!("cluster_size=4k,{options}"), "8M");
    io(&path, &["write -P 1 0 60k", "write -P 2 4M 20k"]);
    let bytes = std::fs::read(&path).unwrap();
    let block = u64_at(&bytes, u64_at(&bytes, 48));
    let l2 = u64_at(&bytes, u64_at(&bytes, 40)) & 0x00ff_ffff_ffff_fe00;
    (bytes, block, l2)
}

#[test]
fn a_rebuild_for_refcounts_that_are_too_low() {
    let (mut bytes, block, _) = image("refcount_bits=16");
    bytes[block as usize + 10..block as usize + 30].fill(0);
    bytes[79] |= 1; // the dirty bit
    cut_off("too low", bytes, Repair::All);
}

#[test]
fn a_rebuild_for_a_lost_refcount_block() {
    for options in ["refcount_bits=16", "refcount_bits=1", "refcount_bits=64"] {
        let (mut bytes, _, l2) = image(options);
        let table = u64_at(&bytes, 48) as usize;
        bytes[table..table + 8].fill(0);
        // A flag that has to be set, and must not be before the refcount is there.
        bytes[l2 as usize] &= 0x7f;
        cut_off(options, bytes, Repair::All);
    }
}

#[test]
fn two_guest_clusters_that_share_one_that_both_call_their_own() {
    let (mut bytes, _, l2) = image("refcount_bits=16");
    bytes.copy_within(l2 as usize..l2 as usize + 8, l2 as usize + 8);
    cut_off("shared", bytes, Repair::All);
}

#[test]
fn refcounts_that_are_too_high_and_flags_that_are_missing() {
    for mode in [Repair::Leaks, Repair::All] {
        let (mut bytes, block, l2) = image("refcount_bits=16");
        let clusters = bytes.len() as u64 / 4096;
        for (cluster, value) in [(7, 2), (9, 3), (12, 2), (clusters - 1, 9)] {
            bytes[(block + cluster * 2 + 1) as usize] = value;
        }
        for entry in 0..15 {
            bytes[(l2 + entry * 8) as usize] &= 0x7f;
        }
        cut_off("too high", bytes, mode);
    }
}
