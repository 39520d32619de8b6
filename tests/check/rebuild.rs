//! Rebuilding refcounts, as the engine does it when it opens an image that is marked dirty: what it
//! makes is sound, and what it must not touch it refuses.

use qcow2fs::ErrorKind;
use qcow2fs::alloc::rebuild::rebuild_dirty;
use qcow2fs::check::{Repair, check, repair};
use qcow2fs::format::{Header, INCOMPATIBLE_DIRTY};
use qcow2fs::storage::testing::MemoryStorage;

use super::common::*;

/// An image that is marked dirty, all its refcounts lost; where its first L2 table is.
fn dirty(options: &str) -> (Vec<u8>, usize) {
    let directory = directory();
    let path = directory.path().join("d.qcow2");
    create(&path, &format!("cluster_size=4k,{options}"), "8M");
    io(&path, &["write -P 1 0 60k", "write -P 2 4M 20k"]);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = |bytes: &[u8], at: usize| {
        (u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00) as usize
    };
    let table = at(&bytes, 48);
    bytes[table..table + 8].fill(0);
    bytes[79] |= 1;
    let l2 = at(&bytes, at(&bytes, 40));
    (bytes, l2)
}

#[test]
fn a_rebuilt_image_is_sound_and_no_longer_dirty() {
    for options in ["refcount_bits=1", "refcount_bits=16", "refcount_bits=64", "extended_l2=on"] {
        let options = options.replace("extended_l2=on", "extended_l2=on,cluster_size=16k");
        let (mut bytes, _) = dirty(&options);
        // Something that no table refers to: nothing may be written there either.
        bytes.extend([0xaa; 40 << 10]);
        let storage = MemoryStorage::new(bytes.clone());
        let header = Header::parse(&storage.contents()).unwrap();
        let new = rebuild_dirty(&storage, &header).unwrap();
        let report = check(&storage).unwrap();
        assert_eq!(report.exit_code(), 0, "{options}: {:?}", report.findings);
        assert!(storage.contents()[512..bytes.len()] == bytes[512..], "{options}: written within");
        let on_disk = Header::parse(&storage.contents()).unwrap();
        for header in [new, on_disk] {
            assert_eq!(header.incompatible_features & INCOMPATIBLE_DIRTY, 0, "{options}");
        }
    }
}

/// The rebuild must refuse, for this reason, and write nothing.
fn refused(bytes: Vec<u8>, reason: &str) {
    let storage = MemoryStorage::new(bytes.clone());
    let header = Header::parse(&bytes).unwrap();
    let error = rebuild_dirty(&storage, &header).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains(reason), "{error}");
    assert!(storage.contents() == bytes, "{reason}: something was written");
}

#[test]
fn clusters_that_two_call_their_own_are_refused() {
    let (mut bytes, l2) = dirty("refcount_bits=16");
    bytes.copy_within(l2..l2 + 8, l2 + 8);
    refused(bytes.clone(), "--repair all");
    let storage = MemoryStorage::new(bytes);
    assert_eq!(repair(&storage, Repair::All).unwrap().exit_code(), 0);
    assert_eq!(check(&storage).unwrap().exit_code(), 0);
}

#[test]
fn data_over_tables_is_refused_and_corrupt_even_if_counted() {
    for (what, offset) in [("L2 table", None), ("header", Some(0x0)), ("L1 table", Some(40))] {
        let (mut bytes, l2) = dirty("refcount_bits=16");
        let over = match offset {
            None => l2 as u64,
            Some(0) => 0,
            Some(at) => u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()),
        };
        // No COPIED flag: with refcounts of 2 it is a shared cluster like any other.
        let entry = if over == 0 { 0x4000_0000_0000_0000 } else { over };
        bytes[l2..l2 + 8].copy_from_slice(&entry.to_be_bytes());
        let report = check(&MemoryStorage::new(bytes.clone())).unwrap();
        let found = report.findings.iter().any(|f| f.contains("overlap") && f.contains(what));
        assert!(found, "{what}: {:?}", &report.findings[..2]);
        refused(bytes.clone(), "overlap");
        let storage = MemoryStorage::new(bytes.clone());
        assert_eq!(repair(&storage, Repair::All).unwrap().exit_code(), 2);
        assert!(storage.contents() == bytes, "{what}: something was written");
    }
}

#[test]
fn entries_that_lead_out_of_the_file_are_refused() {
    for entry in [0x8000_0000_4000_0000u64, 0x8000_0000_0000_0200, 0x00ff_ffff_ffff_f000] {
        let (mut bytes, l2) = dirty("refcount_bits=16");
        bytes[l2 + 16..l2 + 24].copy_from_slice(&entry.to_be_bytes());
        refused(bytes, "L2 entry 2 of table");
    }
}

#[test]
fn more_references_than_a_refcount_can_say_are_refused() {
    let (mut bytes, l2) = dirty("refcount_bits=1");
    bytes[l2] &= 0x7f;
    bytes.copy_within(l2..l2 + 8, l2 + 8);
    let storage = MemoryStorage::new(bytes.clone());
    let error = rebuild_dirty(&storage, &Header::parse(&bytes).unwrap()).unwrap_err();
    assert!(error.to_string().contains("more than a refcount can say"), "{error}");
    assert_eq!(storage.contents()[..512], bytes[..512], "the header");
}
