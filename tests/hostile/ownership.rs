//! COPIED flags that their refcounts contradict, made by hand: nothing is written or given back that
//! somebody else may have. Where the cluster looks free the request fails, and the image says so; where
//! it is counted more often it is copied, until the search for leaks tells who is right.

use std::ops::Range;
use std::sync::Arc;

use qcow2fs::ErrorKind;
use qcow2fs::check::check;
use qcow2fs::format::{COPIED, Header, INCOMPATIBLE_CORRUPT};
use qcow2fs::image::{CreateOptions, Image, Options};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::MemoryStorage;

use crate::support::verify_clean;

const CLUSTER: u64 = 16 << 10;
const OFFSETS: u64 = 0x00ff_ffff_ffff_fe00;

/// Nothing happens but what is asked for.
fn alone() -> Options {
    Options {
        writable: true,
        keep_erased: 0,
        return_leaks: false,
        threads: false,
        ..Options::default()
    }
}

/// An image whose first two clusters are written, half of each.
struct Victim {
    file: MemoryStorage,
    extended_l2: bool,
}

impl Victim {
    fn new(extended_l2: bool) -> Victim {
        Victim::of(64 * CLUSTER, extended_l2)
    }

    fn of(virtual_size: u64, extended_l2: bool) -> Victim {
        let file = Arc::new(MemoryStorage::default());
        let options = CreateOptions {
            virtual_size,
            cluster_size: CLUSTER,
            extended_l2,
            ..CreateOptions::default()
        };
        Image::create(&*file, &options).unwrap();
        let image = Image::open(file.clone(), &alone()).unwrap();
        for guest in 0..2 {
            image.write(guest * CLUSTER, &[7; CLUSTER as usize / 2]).unwrap();
        }
        image.close().unwrap();
        Victim { file: file.fork(), extended_l2 }
    }

    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    }

    fn header(&self) -> Header {
        Header::parse(&self.file.contents()).unwrap()
    }

    /// Where the only L2 table is.
    fn table(&self) -> u64 {
        self.word(self.header().l1_table_offset.0) & OFFSETS
    }

    /// Where the data of a guest cluster is; its flag is set.
    fn data(&self, guest: u64) -> u64 {
        let entry = self.word(self.table() + guest * if self.extended_l2 { 16 } else { 8 });
        assert_ne!(entry & COPIED, 0, "{entry:#x}");
        entry & OFFSETS
    }

    /// The same with a snapshot that shares everything.
    fn with_a_snapshot(self) -> Victim {
        let file = Arc::new(self.file);
        let image = Image::open(file.clone(), &alone()).unwrap();
        image.take_snapshot(b"s").unwrap();
        image.close().unwrap();
        Victim { file: file.fork(), ..self }
    }

    /// The image with another refcount for what is at `host`: 16 bits, in the first block.
    fn with_refcount(&self, host: u64, count: u16) -> Arc<MemoryStorage> {
        let file = self.file.fork();
        let block = self.word(self.header().refcount_table_offset.0);
        file.write_at(&count.to_be_bytes(), block + host / CLUSTER * 2).unwrap();
        Arc::new(file)
    }
}

type Act = fn(&Image) -> qcow2fs::Result<()>;

/// What goes by the flag of the first cluster.
const ACTS: [(&str, Act); 6] = [
    ("a write in place", |image| image.write(512, &[1; 512])),
    ("a write of all", |image| image.write(0, &[1; CLUSTER as usize])),
    ("a discard of a part", |image| image.discard(512..1024)),
    ("a discard of a subcluster", |image| image.discard(0..1024)),
    ("a discard of all", |image| image.discard(0..CLUSTER)),
    ("zeroing", |image| image.write_zeroes(0..CLUSTER)),
];

/// Does `act` to the image, which must fail and change none of the bytes of `kept`.
fn assert_refused(what: &str, file: &Arc<MemoryStorage>, act: Act, kept: Range<u64>) {
    let image = Image::open(file.clone(), &alone()).unwrap();
    let error = act(&image).expect_err(what);
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
    assert_eq!(error.errno(), libc::EIO, "{what}");
    assert!(!image.is_writable(), "{what}");
    let status = image.status().unwrap();
    assert!(status.health.contains("refcount"), "{what}: {}", status.health);
    // What is read is still what it was.
    let mut read = vec![0; CLUSTER as usize];
    for guest in 0..2 {
        image.read(guest * CLUSTER, &mut read).unwrap();
        let (written, rest) = read.split_at(CLUSTER as usize / 2);
        assert!(written.iter().all(|byte| *byte == 7), "{what}: guest cluster {guest}");
        assert!(rest.iter().all(|byte| *byte == 0), "{what}: guest cluster {guest}");
    }
    let _says_so_again = image.close();
    let mut after = vec![0; (kept.end - kept.start) as usize];
    file.read_at(&mut after, kept.start).unwrap();
    assert!(after[..CLUSTER as usize / 2].iter().all(|byte| *byte == 7), "{what}: the data");
    let header = Header::parse(&file.contents()).unwrap();
    assert_ne!(header.incompatible_features & INCOMPATIBLE_CORRUPT, 0, "{what}");
}

#[test]
fn what_is_marked_as_referenced_once_and_looks_free_is_not_changed() {
    for extended_l2 in [false, true] {
        let victim = Victim::new(extended_l2);
        let data = victim.data(0);
        for (what, act) in ACTS {
            let what = format!("{what}, subclusters {extended_l2}");
            let file = victim.with_refcount(data, 0);
            assert_refused(&what, &file, act, data..data + CLUSTER);
        }
    }
}

/// A table that is counted nowhere looks free, and may be overwritten in a moment.
#[test]
fn a_table_that_looks_free_is_not_changed() {
    let victim = Victim::new(false);
    let (table, data) = (victim.table(), victim.data(0));
    let file = victim.with_refcount(table, 0);
    let act: Act = |image| image.write(9 * CLUSTER, &[1; 512]);
    assert_refused("a new cluster", &file, act, data..data + CLUSTER);
}

/// All of the disk.
fn content(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read(0, &mut bytes).unwrap();
    bytes
}

fn bytes_at(file: &MemoryStorage, range: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    file.read_at(&mut bytes, range.start).unwrap();
    bytes
}

/// Does `act` to a sound image and to `file`, in which somebody else may have what is at `kept`; the disk
/// is the same afterwards, and what is kept is as it was. Half a cluster of it has data.
fn assert_copied(
    what: &str,
    sound: &MemoryStorage,
    file: &Arc<MemoryStorage>,
    act: Act,
    kept: u64,
) {
    let after = |file: Arc<MemoryStorage>| {
        let image = Image::open(file, &alone()).unwrap();
        act(&image).expect(what);
        let content = content(&image);
        image.close().expect(what);
        content
    };
    let kept = kept..kept + CLUSTER / 2;
    let corruptions = || check(&**file).unwrap().corruptions;
    let (before, wrong) = (bytes_at(file, kept.clone()), corruptions());
    assert!(after(file.clone()) == after(Arc::new(sound.fork())), "{what}: the disk");
    assert!(bytes_at(file, kept) == before, "{what}: what somebody else may have");
    assert!(corruptions() <= wrong, "{what}");
}

#[test]
fn what_is_marked_as_referenced_once_and_counted_more_often_is_copied() {
    for extended_l2 in [false, true] {
        let victim = Victim::new(extended_l2);
        let (data, table) = (victim.data(0), victim.table());
        for (what, act) in ACTS {
            let what = format!("{what}, subclusters {extended_l2}");
            for kept in [data, table] {
                let file = victim.with_refcount(kept, 2);
                assert_copied(&what, &victim.file, &file, act, kept);
            }
        }
    }
}

fn searching() -> Options {
    Options { return_leaks: true, ..alone() }
}

#[test]
fn a_refcount_that_is_too_high_for_a_flag_is_lowered() {
    let victim = Victim::new(false);
    let file = victim.with_refcount(victim.data(0), 2);
    let image = Image::open(file.clone(), &searching()).unwrap();
    image.write(0, &[1; 512]).unwrap();
    image.close().unwrap();
    assert_eq!(bytes_at(&file, victim.data(0)..victim.data(0) + 512), [1; 512], "in place");
    verify_clean(&*file).unwrap();
}

#[test]
fn a_flag_that_denies_a_snapshot_is_found() {
    for extended_l2 in [false, true] {
        let victim = Victim::new(extended_l2);
        let file = Arc::new(victim.file.fork());
        let image = Image::open(file.clone(), &alone()).unwrap();
        image.take_snapshot(b"s").unwrap();
        // A table of its own, whose other entry shares its cluster with the snapshot.
        image.write(0, &[1; 512]).unwrap();
        image.close().unwrap();
        let victim = Victim { file: file.fork(), extended_l2 };
        let (table, size) = (victim.table(), if extended_l2 { 16 } else { 8 });
        let entry = victim.word(table + size);
        assert_eq!(entry & COPIED, 0, "{entry:#x}");
        victim.file.write_at(&(entry | COPIED).to_be_bytes(), table + size).unwrap();

        let file = Arc::new(victim.file.fork());
        let image = Image::open(file.clone(), &alone()).unwrap();
        image.write(CLUSTER, &[9; 512]).unwrap();
        let view = image.open_snapshot(b"s").unwrap();
        let mut kept = [0; 512];
        view.read(CLUSTER, &mut kept).unwrap();
        assert_eq!(kept, [7; 512], "the snapshot's data");
        drop(view);
        image.close().unwrap();

        let file = Arc::new(victim.file);
        let image = Image::open(file.clone(), &searching()).unwrap();
        let health = image.status().unwrap().health;
        assert!(health.contains("2 references"), "{health}");
        let refused = image.write(CLUSTER, &[9; 512]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ReadOnly, "{refused}");
        let _says_so_again = image.close();
        let header = Header::parse(&file.contents()).unwrap();
        assert_ne!(header.incompatible_features & INCOMPATIBLE_CORRUPT, 0);
    }
}

const CHANGES: [(&str, Act); 2] = [
    ("deleting", |image| image.delete_snapshot(b"s")),
    ("applying", |image| image.apply_snapshot(b"s")),
];

/// Does `change` to the snapshot of an image that says `why` it refuses: the tables and the data are
/// what they were.
fn assert_snapshot_refused(what: &str, file: &Arc<MemoryStorage>, options: &Options, change: Act) {
    let before = file.contents();
    let header = Header::parse(&before).unwrap();
    let image = Image::open(file.clone(), options).unwrap();
    let error = change(&image).expect_err(what);
    assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::ReadOnly), "{what}: {error}");
    assert!(!image.is_writable(), "{what}");
    assert_eq!(image.snapshots().unwrap().len(), 1, "{what}: the snapshot");
    let _says_so_again = image.close();
    let after = file.contents();
    assert_ne!(after[79] & INCOMPATIBLE_CORRUPT as u8, 0, "{what}");
    // The features apart, and the block of refcounts, whose content does not matter any more.
    let l1 = header.l1_table_offset.0 as usize;
    assert_eq!(after[l1..l1 + 8], before[l1..l1 + 8], "{what}: the L1 table");
    let table = (u64::from_be_bytes(after[l1..l1 + 8].try_into().unwrap()) & OFFSETS) as usize;
    assert!(after[table..table + 16] == before[table..table + 16], "{what}: the L2 table");
    let data = u64::from_be_bytes(after[table..table + 8].try_into().unwrap()) & OFFSETS;
    assert!(bytes_at(file, data..data + 512).iter().all(|byte| *byte == 7), "{what}: the data");
}

/// Freeing it with the snapshot would make room for data in a table of the disk.
#[test]
fn a_table_that_a_snapshot_shares_and_is_counted_once_is_not_freed_with_it() {
    let victim = Victim::new(false).with_a_snapshot();
    for (what, change) in CHANGES {
        let file = victim.with_refcount(victim.table(), 1);
        assert_snapshot_refused(what, &file, &alone(), change);
    }
}

/// The table alone does not tell. The search does, and nobody who is quick is spared it.
#[test]
fn snapshots_wait_for_the_search_and_do_not_change_where_it_finds_damage() {
    let victim = Victim::new(false).with_a_snapshot();
    let entry = victim.word(victim.table());
    assert_eq!(entry & COPIED, 0, "shared");
    for (what, change) in CHANGES {
        let file = victim.with_refcount(entry & OFFSETS, 1);
        let at_once = Options { threads: true, ..searching() };
        assert_snapshot_refused(what, &file, &at_once, change);
    }
}

/// As in the L1 table of the disk: nobody makes that, and it would be work without end.
#[test]
fn a_snapshot_whose_l1_entries_lead_to_one_table_does_not_change() {
    const ENTRIES: u64 = 4;
    let table_maps = CLUSTER / 8 * CLUSTER;
    let victim = Victim::of(ENTRIES * table_maps, false).with_a_snapshot();
    let l1 = victim.word(victim.header().snapshots_offset.0);
    let entry = victim.word(l1);
    for index in 1..ENTRIES {
        victim.file.write_at(&entry.to_be_bytes(), l1 + index * 8).unwrap();
    }
    // All of it is counted as it should be.
    let table = entry & OFFSETS;
    let mut file = victim.file.fork();
    for host in [table, victim.word(table) & OFFSETS, victim.word(table + 8) & OFFSETS] {
        let counted = Victim { file, extended_l2: false };
        file = counted.with_refcount(host, 1 + ENTRIES as u16).fork();
    }
    for (what, change) in CHANGES {
        assert_snapshot_refused(what, &Arc::new(file.fork()), &alone(), change);
    }
}
