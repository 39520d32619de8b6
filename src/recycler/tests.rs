use std::thread;

use super::*;
use crate::format::Header;
use crate::storage::testing::{Layer, MemoryStorage};
use crate::tables::MetadataMap;

const CLUSTER: u64 = 4096;
/// All clusters that the one refcount block counts.
const CLUSTERS: u64 = CLUSTER / 2;
/// The header, the refcount table and the block, and an L1 table.
const METADATA: u64 = 4;

/// A recycler of a file of data, all clusters of which have refcount `count`.
fn recycler(count: u16) -> (Arc<MemoryStorage>, Recycler) {
    recycler_over(count, |storage| storage)
}

/// The same over what `layer` makes of the file.
fn recycler_over<S: Storage + 'static>(
    count: u16,
    layer: impl FnOnce(Arc<MemoryStorage>) -> Arc<S>,
) -> (Arc<MemoryStorage>, Recycler) {
    let storage = MemoryStorage::new(vec![7; (CLUSTERS * CLUSTER) as usize]);
    let mut header = vec![0; 512];
    for (at, bytes) in [
        (0, &b"QFI\xfb\0\0\0\x03"[..]),
        (20, &12u32.to_be_bytes()),
        (24, &(1u64 << 20).to_be_bytes()),
        (36, &1u32.to_be_bytes()),
        (40, &(3 * CLUSTER).to_be_bytes()),
        (48, &CLUSTER.to_be_bytes()),
        (56, &1u32.to_be_bytes()),
        (96, &4u32.to_be_bytes()),
        (100, &104u32.to_be_bytes()),
    ] {
        header[at..at + bytes.len()].copy_from_slice(bytes);
    }
    let header = Header::parse(&header).unwrap();
    let mut table = vec![0; CLUSTER as usize];
    table[..8].copy_from_slice(&(2 * CLUSTER).to_be_bytes());
    storage.write_at(&table, CLUSTER).unwrap();
    storage.write_at(&count.to_be_bytes().repeat(CLUSTERS as usize), 2 * CLUSTER).unwrap();
    let storage = Arc::new(storage);
    let metadata = Arc::new(MetadataMap::new(u64::MAX));
    let refcounts = Refcounts::open(storage.clone(), &header, metadata, &Arc::default()).unwrap();
    let layered = layer(storage.clone());
    (storage, Recycler::new(header.geometry, layered, Arc::new(refcounts), 0))
}

fn drop_two_references_to_each(recycler: &Recycler) {
    for cluster in METADATA..CLUSTERS {
        (0..2).for_each(|_| recycler.drop_shared(HostCluster(cluster)));
    }
}

fn settle_and_free_from_two_threads(recycler: &Recycler) {
    recycler.seal();
    recycler.settle(true);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| while recycler.free_some().unwrap() {});
        }
    });
}

fn assert_all_is_free_and_a_hole(storage: &MemoryStorage, recycler: &Recycler) {
    assert_eq!(recycler.counts(), StateCounts::default());
    for cluster in METADATA..CLUSTERS {
        assert_eq!(recycler.refcounts.get(HostCluster(cluster)).unwrap(), 0, "{cluster}");
    }
    let data = storage.seek_data(METADATA * CLUSTER).unwrap();
    assert_eq!(data, None, "freed and not punched");
}

#[test]
fn the_last_of_two_threads_that_drop_a_reference_punches() {
    let (storage, recycler) = recycler(2);
    drop_two_references_to_each(&recycler);
    settle_and_free_from_two_threads(&recycler);
    assert_all_is_free_and_a_hole(&storage, &recycler);
}

#[test]
fn a_released_cluster_that_is_counted_more_often_is_punched_with_its_last_reference() {
    let (storage, recycler) = recycler(3);
    recycler.release(METADATA..CLUSTERS);
    drop_two_references_to_each(&recycler);
    settle_and_free_from_two_threads(&recycler);
    assert_all_is_free_and_a_hole(&storage, &recycler);
    assert_eq!(recycler.work_done().freed, (CLUSTERS - METADATA) * CLUSTER);
}

#[test]
fn what_is_still_referenced_keeps_its_data() {
    let (storage, recycler) = recycler(2);
    recycler.drop_shared(HostCluster(9));
    settle_and_free_from_two_threads(&recycler);
    assert_eq!(recycler.refcounts.get(HostCluster(9)).unwrap(), 1);
    assert_eq!(storage.seek_data(9 * CLUSTER).unwrap(), Some(9 * CLUSTER));
    assert_eq!(recycler.work_done(), WorkDone::default());
}

/// A file in which two clusters cannot be punched.
struct Stuck(Arc<MemoryStorage>);

const STUCK: u64 = 20;
const STUCK_SHARED: u64 = 40;

impl Layer for Stuck {
    fn below(&self) -> &dyn Storage {
        &*self.0
    }

    fn punch_hole(&self, range: Range<u64>) -> std::io::Result<()> {
        match [STUCK, STUCK_SHARED].iter().any(|stuck| range.contains(&(stuck * CLUSTER))) {
            true => Err(std::io::Error::from_raw_os_error(libc::EIO)),
            false => self.0.punch_hole(range),
        }
    }
}

#[test]
fn what_cannot_be_punched_keeps_nothing_else_from_being_freed() {
    let (_, recycler) = recycler_over(2, |storage| Arc::new(Stuck(storage)));
    recycler.refcounts.release(10..30).unwrap();
    for cluster in (10..30).step_by(2) {
        recycler.release(cluster..cluster + 1);
    }
    // The last reference, though there was another one when it was dropped.
    recycler.refcounts.release(STUCK_SHARED..STUCK_SHARED + 1).unwrap();
    recycler.drop_shared(HostCluster(STUCK_SHARED));
    recycler.seal();
    recycler.settle(true);
    for _ in 0..20 {
        assert!(recycler.free_some().is_err(), "what is stuck is given up");
    }
    let count = |cluster| recycler.refcounts.get(HostCluster(cluster)).unwrap();
    for cluster in (10..30).step_by(2) {
        assert_eq!(count(cluster), u64::from(cluster == STUCK), "{cluster}");
    }
    assert_eq!(count(STUCK_SHARED), 1);
    assert_eq!(recycler.counts(), StateCounts { released: 2, ..StateCounts::default() });
}

/// The file ends before what was given back when it could not grow: whoever gets that next sees to it that
/// it reaches there, since an entry may be durable before the length is.
#[test]
fn the_file_reaches_what_was_given_back_when_it_could_not_grow() {
    let (storage, recycler) = recycler(1);
    let given_back = recycler.refcounts.allocate_at_end(1).unwrap();
    recycler.refcounts.release(given_back.clone()).unwrap();
    storage.set_len(given_back.start * CLUSTER).unwrap();
    let taken = recycler.take(1).unwrap();
    assert_eq!(taken.first(), HostCluster(given_back.start));
    assert!(storage.len().unwrap() >= given_back.end * CLUSTER);
}
