//! Images made to hurt: the check must neither panic, nor hang, nor take memory that nothing in the
//! file stands for.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use qcow2fs::check::{Repair, check, repair};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::MemoryStorage;

use super::common::*;

/// Checks and repairs within a limit, whatever comes out.
fn survive(what: &str, storage: &dyn Storage) {
    let start = Instant::now();
    let checked = check(storage).map(|report| report.exit_code()).map_err(|e| e.to_string());
    let repaired = repair(storage, Repair::All).map(|r| r.exit_code()).map_err(|e| e.to_string());
    let took = start.elapsed();
    assert!(took < Duration::from_secs(60), "{what} took {took:?}: {checked:?} {repaired:?}");
    assert_ne!(checked, Ok(0), "{what} is not sound");
}

fn patched(directory: &Path, options: &str, patches: &[(u64, &[u8])]) -> File {
    let path = directory.join("h.qcow2");
    create(&path, options, "1G");
    io(&path, &["write -P 1 0 2M"]);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    patches.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
    file
}

fn storage(file: File) -> qcow2fs::storage::HostFile {
    qcow2fs::storage::HostFile::new(file)
}

#[test]
fn headers_that_claim_much() {
    let directory = directory();
    let max = [0xff; 8];
    for (what, at, bytes) in [
        ("4 billion snapshots", 60, &max[..4]),
        ("a snapshot table at the end of the world", 60, &[0, 0, 0, 1, 0x7f, 0xff, 0xff, 0xff][..]),
        ("the largest L1 table", 36, &[0, 0x40, 0, 0][..]),
        (
            "an L1 table at the end of the world",
            40,
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0][..],
        ),
        ("a refcount table there", 48, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0][..]),
        ("the largest refcount table", 56, &[0, 0, 0, 0x80][..]),
        ("a virtual size near 2^64", 24, &max[..]),
    ] {
        survive(what, &storage(patched(directory.path(), "cluster_size=64k", &[(at, bytes)])));
    }
}

#[test]
fn sixty_thousand_snapshots_in_one_place() {
    // The snapshot table lies in a hole: every entry is all zeros and 40 bytes long.
    let directory = directory();
    let file = patched(directory.path(), "cluster_size=64k", &[(60, &65536u32.to_be_bytes())]);
    file.write_all_at(&(1u64 << 30).to_be_bytes(), 64).unwrap();
    file.set_len(1 << 40).unwrap();
    survive("snapshots of nothing", &storage(file));
}

#[test]
fn every_l1_entry_leads_to_the_same_l2_table_full_of_entries() {
    let directory = directory();
    let file = patched(directory.path(), "cluster_size=2M", &[]);
    let (l1, l2, clusters) = (1u64 << 30, (1u64 << 30) + (32 << 20), 1u64 << 18);
    file.write_all_at(&0x40_0000u32.to_be_bytes(), 36).unwrap();
    file.write_all_at(&l1.to_be_bytes(), 40).unwrap();
    let entries = |value: &dyn Fn(u64) -> u64, n: u64| -> Vec<u8> {
        (0..n).flat_map(|i| value(i).to_be_bytes()).collect()
    };
    file.write_all_at(&entries(&|_| l2 | 1 << 63, 1 << 22), l1).unwrap();
    file.write_all_at(&entries(&|i| i << 21 | 1 << 63, clusters), l2).unwrap();
    file.set_len(1 << 39).unwrap();
    survive("a billion ways to each cluster", &storage(file));
}

#[test]
fn a_refcount_table_that_names_one_block_a_million_times() {
    let directory = directory();
    let file = patched(directory.path(), "cluster_size=2M,refcount_bits=1", &[]);
    let (table, block) = (1u64 << 30, (1u64 << 30) + (8 << 20));
    let entries: Vec<u8> = (0..1 << 20).flat_map(|_| block.to_be_bytes()).collect();
    file.write_all_at(&entries, table).unwrap();
    file.write_all_at(&[0xff; 4096], block).unwrap();
    file.write_all_at(&table.to_be_bytes(), 48).unwrap();
    file.write_all_at(&4u32.to_be_bytes(), 56).unwrap();
    file.set_len(1 << 42).unwrap();
    survive("one block for everything", &storage(file));
}

#[test]
fn a_huge_sparse_file_takes_no_time() {
    let directory = directory();
    let path = directory.path().join("s.qcow2");
    create(&path, "cluster_size=64k,preallocation=metadata", "256G");
    let start = Instant::now();
    assert_same_verdict("256 GiB", &our_check(&path), &qemu_check(&path));
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    let peak = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = peak.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 1 << 20, "{kib} KiB of memory");
}

/// Small images of several shapes with random bytes of metadata changed.
#[test]
fn no_change_of_metadata_makes_it_panic() {
    let directory = directory();
    for (shape, options) in
        ["cluster_size=512", "cluster_size=4k", "extended_l2=on,cluster_size=16k"]
            .iter()
            .enumerate()
    {
        let path = directory.path().join("f.qcow2");
        create(&path, options, "2M");
        io(&path, &["write -P 1 0 40k", "write -P 2 1M 100k", "write -c -P 3 512k 64k"]);
        let name = path.to_str().unwrap();
        must("qemu-img", &["bitmap", "--add", "-g", "4k", name, "b"]);
        must("qemu-img", &["snapshot", "-c", "s", name]);
        io(&path, &["write -P 4 0 4k"]);
        let sound = std::fs::read(&path).unwrap();
        let mut random = Random(shape as u64);
        for round in 0..1500 {
            let mut bytes = sound.clone();
            for _ in 0..1 + random.below(4) {
                // Data is all the same; what differs from its neighbour is metadata.
                let at = loop {
                    let at = random.below(bytes.len() as u64 - 1) as usize;
                    if bytes[at] != bytes[at + 1] || (at < 200 && random.below(8) == 0) {
                        break at;
                    }
                };
                bytes[at] = random.below(256) as u8;
            }
            let start = Instant::now();
            let file = MemoryStorage::new(bytes);
            let before = check(&file).map(|report| report.corruptions);
            if let Ok(after) = repair(&file, Repair::All) {
                let again = check(&file).unwrap();
                assert_eq!(again.corruptions, after.corruptions, "{options} round {round}");
                assert!(after.corruptions <= before.unwrap(), "{options} round {round}");
            }
            assert!(start.elapsed() < Duration::from_secs(5), "{options} round {round}");
        }
    }
}
