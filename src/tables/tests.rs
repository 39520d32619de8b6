use std::sync::Arc;

use super::*;
use crate::error::ErrorKind;
use crate::format::{COPIED, Header, Subcluster, Subclusters};
use crate::storage::testing::MemoryStorage;

const CLUSTER: u64 = 16 << 10;
/// Where the L1 table and the one L2 table are.
const L1: u64 = CLUSTER;
const L2: u64 = 2 * CLUSTER;
const ALL: u64 = 0xffff_ffff;

/// The tables of an image with extended L2 entries, the first of which are `entries`.
fn tables(entries: &[[u64; 2]], own: bool) -> Tables {
    let mut header = vec![0; 512];
    for (at, bytes) in [
        (0, &b"QFI\xfb\0\0\0\x03"[..]),
        (20, &14u32.to_be_bytes()),
        (24, &(1u64 << 24).to_be_bytes()),
        (36, &1u32.to_be_bytes()),
        (40, &L1.to_be_bytes()),
        (48, &(3 * CLUSTER).to_be_bytes()),
        (56, &1u32.to_be_bytes()),
        (72, &(1u64 << 4).to_be_bytes()),
        (96, &4u32.to_be_bytes()),
        (100, &104u32.to_be_bytes()),
    ] {
        header[at..at + bytes.len()].copy_from_slice(bytes);
    }
    let geometry = Header::parse(&header).unwrap().geometry;
    let storage = MemoryStorage::default();
    let l1 = L2 | if own { COPIED } else { 0 };
    storage.write_at(&l1.to_be_bytes(), L1).unwrap();
    let words = entries.iter().flatten().flat_map(|word| word.to_be_bytes());
    storage.write_at(&words.collect::<Vec<_>>(), L2).unwrap();
    let metadata = Arc::new(MetadataMap::new(u64::MAX));
    let storage = Arc::new(storage);
    let tables =
        Tables::open(storage, geometry, metadata, HostOffset(L1), 1, 0, &Arc::default()).unwrap();
    tables.register_metadata().unwrap();
    tables
}

fn data(cluster: u64) -> [u64; 2] {
    [COPIED | (cluster * CLUSTER), ALL]
}

#[test]
fn clusters_of_equal_subclusters_are_runs_and_others_stand_alone() {
    let mixed = [COPIED | (9 * CLUSTER), 0b1100 << 32 | 0b11];
    let tables = tables(&[data(7), data(8), mixed, [0, ALL << 32], [0, ALL << 32], [0, 0]], true);
    let run = |run, count| (Mapping::Uniform(run), count);
    let first = HostCluster(7);
    assert_eq!(tables.lookup(0..100).unwrap(), run(Run::Data { first, copied: true }, 2));
    let (Mapping::Mixed(found), 1) = tables.lookup(2..100).unwrap() else { panic!("not mixed") };
    assert_eq!((found.cluster, found.copied), (Some(HostCluster(9)), true));
    assert_eq!(found.subclusters.run(0), (Subcluster::Allocated, 2));
    assert_eq!(found.subclusters.run(2), (Subcluster::Zero, 4));
    assert_eq!(found.subclusters.run(4), (Subcluster::Unallocated, 32));
    assert_eq!(tables.lookup(3..100).unwrap(), run(Run::Zero, 2));
    assert_eq!(tables.lookup(5..100).unwrap(), run(Run::Unallocated, 95));
}

#[test]
fn what_a_shared_table_maps_is_not_to_be_written_in_place() {
    let tables = tables(&[data(7), [COPIED | (9 * CLUSTER), 1]], false);
    let run = Run::Data { first: HostCluster(7), copied: false };
    assert_eq!(tables.lookup(0..1).unwrap().0, Mapping::Uniform(run));
    let Mapping::Mixed(found) = tables.lookup(1..2).unwrap().0 else { panic!("not mixed") };
    assert!(!found.copied);
}

#[test]
fn an_update_writes_both_words_in_one_sector() {
    let tables = tables(&[data(7), data(8)], true);
    let subclusters = Subclusters::ALLOCATED.with(4..6, Subcluster::Zero);
    let new = MixedCluster { cluster: Some(HostCluster(8)), copied: true, subclusters };
    tables.update(1..2, LinkOrder::AfterSync, |_, _| Ok(Some(new.entry()))).unwrap();
    assert_eq!(tables.lookup(1..2).unwrap(), (Mapping::Mixed(new), 1));
    let dirty = tables.collect(|| ());
    assert!(dirty.barrier);
    let [(offset, bytes)] = &dirty.writes[..] else { panic!("{:?}", dirty.writes) };
    assert_eq!((*offset, bytes.len()), (L2, 512));
    let [[first, all], [second, _]] = [data(7), data(8)];
    let expected = [first, all, second, ALL & !0b11_0000 | 0b11_0000 << 32];
    assert_eq!(bytes[..32], expected.map(u64::to_be_bytes).concat());
    tables.collected(dirty, true);
}

#[test]
fn mixed_clusters_that_point_to_metadata_or_contradict_themselves_are_corrupt() {
    let both = 1 << 32 | 1;
    let tables = tables(&[[COPIED | L2, 1], [COPIED | (9 * CLUSTER), both], [0, 1]], true);
    for guest in 0..3 {
        let error = tables.lookup(guest..guest + 1).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains(&format!("L2 entry {guest} of table")), "{error}");
    }
}

#[test]
fn what_lies_behind_the_l1_table_is_absent_in_one_step() {
    let tables = tables(&[data(7)], true);
    let entries = tables.geometry.l2_entries();
    let look = tables.look(entries..1 << 55).unwrap();
    assert_eq!(look.mapping, Mapping::Uniform(Run::Unallocated));
    assert_eq!((look.count, look.bytes), ((1 << 55) - entries, 1));
}
