//! Images that claim much: what opening and reading them takes follows what is really in the file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use qcow2fs::ErrorKind;
use qcow2fs::check::{Repair, check, repair};
use qcow2fs::format::{EXTENSION_BITMAPS, Header};
use qcow2fs::image::{Backing, CompactAfter, Image, Options};
use qcow2fs::storage::{HostFile, Storage, testing};

use crate::meter::{self, Alone, LIMIT};
use crate::support::{Watchdog, qemu, scratch};

/// Opening takes a second at most, and longer on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;
const PLAIN: &str = "cluster_size=64k";
/// Where in the sparse file the structures are that a bomb is made of.
const FAR: u64 = 1 << 30;
const COPIED: u64 = 1 << 63;

struct Bomb {
    name: &'static str,
    file: File,
    header: Header,
    alone: Alone,
}

impl Bomb {
    /// A sound image of 1 GiB with a little data in it.
    fn new(name: &'static str, options: &str) -> Bomb {
        let alone = meter::alone();
        let directory = scratch();
        let path = directory.path().join("image");
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o", options]).arg(&path).arg("1G");
        qemu::run(&mut create);
        qemu::io(&path, &["write -P 1 0 2M".to_owned()]);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let mut bytes = vec![0; Header::READ_LENGTH];
        let length = file.read_at(&mut bytes, 0).unwrap();
        let header = Header::parse(&bytes[..length]).unwrap();
        Bomb { name, file, header, alone }
    }

    fn put(self, at: u64, bytes: &[u8]) -> Bomb {
        self.file.write_all_at(bytes, at).unwrap();
        self
    }

    /// `count` words in a row; `word` makes each.
    fn words(self, at: u64, count: u64, word: impl Fn(u64) -> u64) -> Bomb {
        let bytes: Vec<u8> = (0..count).flat_map(|i| word(i).to_be_bytes()).collect();
        self.put(at, &bytes)
    }

    fn length(self, length: u64) -> Bomb {
        self.file.set_len(length).unwrap();
        self
    }

    /// The header says that the L1 table of `entries` entries is at `at`.
    fn l1(self, entries: u32, at: u64) -> Bomb {
        self.put(36, &entries.to_be_bytes()).put(40, &at.to_be_bytes())
    }

    fn refcount_table(self, at: u64, clusters: u32) -> Bomb {
        self.put(48, &at.to_be_bytes()).put(56, &clusters.to_be_bytes())
    }

    /// The dirty bit: the refcounts are rebuilt before anything is written.
    fn dirty(self) -> Bomb {
        self.put(72, &1u64.to_be_bytes())
    }

    /// The file, which fails the test once more than `most` reads were made of it.
    fn metered(&self, most: u64) -> Arc<Metered> {
        let file = HostFile::new(self.file.try_clone().unwrap());
        Arc::new(Metered { file, most, reads: AtomicU64::new(0), written: AtomicU64::new(0) })
    }

    fn snapshots(self, count: u32, at: u64) -> Bomb {
        self.put(60, &count.to_be_bytes()).put(64, &at.to_be_bytes())
    }

    /// Opens it for reading and for writing, and reads. What comes of it contains `expected`, the first one
    /// where it is only read: why it was refused, or could not be read, or how it is then.
    fn goes_off(self, expected: [&str; 2]) {
        for (writable, expected) in [false, true].into_iter().zip(expected) {
            let what = format!("{}, {}", self.name, if writable { "written" } else { "read" });
            let _watchdog = Watchdog::new(what.clone(), 60);
            let storage: Arc<dyn Storage> = Arc::new(HostFile::new(self.file.try_clone().unwrap()));
            let meter = self.alone.start();
            let started = Instant::now();
            let image = Image::open(storage, &Options { writable, ..Options::default() });
            let (took, opening) = (started.elapsed(), meter.peak());
            let verdict = match image {
                Ok(image) => {
                    let read = image.read(0, &mut vec![0; 1 << 20]);
                    // What it does in the background is bounded too.
                    let started = Instant::now();
                    while image.status().unwrap().searching_leaks && started.elapsed() < PATIENCE {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    let health = image.status().unwrap().health;
                    let _refused = image.close();
                    read.map_or_else(|e| e.to_string(), |()| health)
                }
                Err(e) => e.to_string(),
            };
            let peak = meter.peak();
            println!(
                "{what}: opened in {took:.1?} with {:.1} MiB, used with {:.1} MiB: {verdict}",
                opening as f64 / MIB as f64,
                peak as f64 / MIB as f64,
            );
            assert!(took < PATIENCE, "{what}: opening took {took:?}");
            assert!(peak < LIMIT, "{what}: {peak} bytes of memory");
            assert!(verdict.contains(expected), "{what}: {verdict}, not {expected}");
        }
    }
}

/// What the search finds in an image whose tables nobody counted.
const UNCOUNTED: &str = "has 1 references and refcount 0";
const TOO_MANY_PLACES: &str = "in more than 917504 places";
const TOO_MANY_SNAPSHOTS: &str = "the snapshot table has more than 65536 entries or 24 MiB";

/// A file that counts reads and bytes written.
struct Metered {
    file: HostFile,
    most: u64,
    reads: AtomicU64,
    written: AtomicU64,
}

impl testing::Layer for Metered {
    fn below(&self) -> &dyn Storage {
        &self.file
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let reads = self.reads.fetch_add(1, Ordering::Relaxed);
        assert!(reads < self.most, "{reads} reads");
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> std::io::Result<()> {
        self.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        self.file.write_at(data, offset)
    }
}

/// Nothing is done but what is called.
fn by_hand(writable: bool) -> Options {
    Options {
        writable,
        threads: false,
        keep_erased: 0,
        compact_after: CompactAfter::Off,
        ..Options::default()
    }
}

const L1_ENTRIES: u32 = 4 << 20;

#[test]
fn an_l1_table_that_is_a_hole() {
    Bomb::new("L1 of 32 MiB, a hole", PLAIN)
        .l1(L1_ENTRIES, FAR)
        .length(2 * FAR)
        .goes_off(["ok", UNCOUNTED]);
}

#[test]
fn one_l2_table_for_all_l1_entries() {
    let l2 = FAR + 64 * MIB;
    Bomb::new("one L2 table for all", PLAIN)
        .l1(L1_ENTRIES, FAR)
        .words(FAR, u64::from(L1_ENTRIES), |_| l2 | COPIED)
        .length(2 * FAR)
        .goes_off(["points to other metadata"; 2]);
}

/// Each within its own limit.
#[test]
fn l1_table_refcount_table_and_snapshot_table_at_once() {
    let (refcounts, table) = (FAR + 64 * MIB, FAR + 128 * MIB);
    let mut entry = vec![0; 40 + 24 + 296];
    entry[14..16].copy_from_slice(&296_u16.to_be_bytes());
    entry[39] = 24;
    for (name, l1, count, written) in [
        ("a large L1 table and much else", L1_ENTRIES / 8 * 7, 65536_u32, TOO_MANY_SNAPSHOTS),
        ("a smaller L1 table and much else", L1_ENTRIES / 2, 65536, TOO_MANY_SNAPSHOTS),
        ("a smaller L1 table and some else", L1_ENTRIES / 2, 20000, UNCOUNTED),
    ] {
        let entries = entry.repeat(count as usize);
        Bomb::new(name, PLAIN)
            .l1(l1, FAR)
            .refcount_table(refcounts, 128)
            .snapshots(count, table)
            .put(table, &entries)
            .length(4 * FAR)
            .goes_off(["ok", written]);
    }
}

#[test]
fn millions_of_clusters_far_from_each_other() {
    let (tables, l2, data) = (1 << 16, FAR + 64 * MIB, 4 * FAR);
    Bomb::new("clusters far from each other", "cluster_size=512")
        .l1(tables, FAR)
        .words(FAR, u64::from(tables), |i| (l2 + i * 512) | COPIED)
        .words(l2, u64::from(tables) * 64, |i| (data + i * 32768) | COPIED)
        .put(24, &(u64::from(tables) * 64 * 512).to_be_bytes())
        .length(data + u64::from(tables) * 64 * 32768 + 512)
        .goes_off(["ok", UNCOUNTED]);
}

/// Whoever copies such a disk asks where its data is.
#[test]
fn looking_for_data_behind_millions_of_empty_tables() {
    for (name, entry) in [("zeros", 1), ("data, cluster by cluster", (8 * MIB) | COPIED)] {
        let image = opened(&one_table_for_all(name, |_| entry).file, None);
        let _watchdog = Watchdog::new(name.to_owned(), 120);
        let started = Instant::now();
        let data = image.next_data(0).unwrap();
        let hole = image.next_hole(0).unwrap();
        println!("{name}: data at {data:x?}, hole at {hole:#x}, in {:.1?}", started.elapsed());
        match entry {
            1 => assert!(data.is_some_and(|at| at > 0) && hole == 0, "{data:x?}, {hole:#x}"),
            // A hole of no length: who copies the disk asks anew.
            _ => {
                assert!(data == Some(0) && hole > 0, "{data:x?}, {hole:#x}");
                assert_eq!(image.next_data(hole).unwrap(), Some(hole));
            }
        }
        assert!(started.elapsed() < PATIENCE, "{name}: {:?}", started.elapsed());
        let looked = bytes_looked_at(&image);
        assert!(looked <= 2 * SEARCH + MIB, "{name}: {looked} bytes");
    }
}

/// What one search for data or a hole may go through, in bytes of tables.
const SEARCH: u64 = 32 * MIB;

/// At least so many bytes of L2 tables were read or gone through: a part of a table has 4 KiB, and each
/// look counts as 64 bytes.
fn bytes_looked_at(image: &Image) -> u64 {
    let counts = image.status().unwrap().table_cache;
    counts.misses * 4096 + (counts.hits + counts.misses) * 64
}

fn opened(file: &File, backing: Option<Arc<dyn Backing>>) -> Arc<Image> {
    let storage = Arc::new(HostFile::new(file.try_clone().unwrap()));
    Image::open_over(storage, &Options::default(), backing).unwrap()
}

/// One L2 table, of entries that `entry` makes, for a disk of 2 PiB.
fn one_table_for_all(name: &'static str, entry: impl Fn(u64) -> u64) -> Bomb {
    let l2 = FAR + 64 * MIB;
    Bomb::new(name, PLAIN)
        .l1(L1_ENTRIES, FAR)
        .words(FAR, u64::from(L1_ENTRIES), |_| l2)
        .words(l2, 8192, entry)
        .put(24, &(u64::from(L1_ENTRIES) << 29).to_be_bytes())
        .length(2 * FAR)
}

#[test]
fn looking_for_data_in_a_chain_costs_no_more_than_in_one_file() {
    let base = opened(&one_table_for_all("zeros", |_| 1).file, None);
    // The size and the name of a backing file make it an overlay.
    let name = [0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 4];
    let overlay = one_table_for_all("zeros here and there", |guest| guest % 2)
        .put(8, &name)
        .put(768, b"base");
    let top = opened(&overlay.file, Some(base.clone()));
    let _watchdog = Watchdog::new("a chain".to_owned(), 120);
    let started = Instant::now();
    let data = top.next_data(0).unwrap();
    println!("a chain: data at {data:x?} in {:.1?}", started.elapsed());
    assert!(data.is_some_and(|at| at > 0), "{data:x?}");
    let looked = bytes_looked_at(&top) + bytes_looked_at(&base);
    assert!(looked <= SEARCH + MIB, "{looked} bytes");
}

/// Tables that lie in a hole cost their owner nothing.
#[test]
fn looking_for_data_through_large_tables_reads_little_of_them() {
    let bomb = Bomb::new("65536 tables of 2 MiB", "cluster_size=2M")
        .l1(1 << 16, FAR)
        .words(FAR, 1 << 16, |i| 2 * FAR + (i << 21))
        .put(24, &(1u64 << 55).to_be_bytes())
        .length(1 << 40);
    let image = opened(&bomb.file, None);
    let _watchdog = Watchdog::new("large tables".to_owned(), 120);
    let started = Instant::now();
    let data = image.next_data(0).unwrap();
    println!("large tables: data at {data:x?} in {:.1?}", started.elapsed());
    assert!(data.is_some_and(|at| at > 0), "{data:x?}");
    assert_eq!(image.next_hole(0).unwrap(), 0);
    let looked = bytes_looked_at(&image);
    assert!(looked <= 2 * SEARCH + MIB, "{looked} bytes");
}

/// What is no bomb: a disk that is large and empty.
#[test]
fn a_huge_disk_without_tables_is_one_hole() {
    let (entries, l2) = (32768, FAR + 64 * MIB);
    let bomb = Bomb::new("16 TiB without tables", PLAIN)
        .l1(entries, FAR)
        .put(24, &(16u64 << 40).to_be_bytes())
        .length(2 * FAR);
    let empty = opened(&bomb.file, None);
    assert_eq!((empty.next_data(0).unwrap(), empty.next_hole(0).unwrap()), (None, 0));
    let bomb = bomb
        .put(FAR + 8 * u64::from(entries - 1), &l2.to_be_bytes())
        .put(l2, &[0, 0, 0, 0, 0, 128]);
    let last = 16u64 << 40;
    assert_eq!(opened(&bomb.file, None).next_data(0).unwrap(), Some(last - (1 << 29)));
}

#[test]
fn snapshots_that_claim_a_huge_disk() {
    // Two L1 entries, of tables in a hole, map 1 GiB.
    let l1 = 2 * FAR;
    for (size, opens) in [
        (Some(1 << 29), true),
        (Some(1 << 30), true),
        (Some((1 << 30) + 512), false),
        (Some(1 << 62), false),
        (Some(u64::MAX), false),
        // As QEMU once made them: the size is that of the disk, which may have grown since.
        (None, true),
    ] {
        let mut entry = snapshot(l1, 2, b"s");
        match size {
            Some(size) => entry[48..56].copy_from_slice(&u64::to_be_bytes(size)),
            None => {
                entry[39] = 0;
                entry[40] = b's';
            }
        }
        let grown = 1u64 << 40;
        let bomb = Bomb::new("a snapshot of a huge disk", PLAIN)
            .l1(L1_ENTRIES, FAR)
            .put(24, &grown.to_be_bytes())
            .words(l1, 2, |i| 3 * FAR + (i << 16))
            .snapshots(1, FAR + 64 * MIB)
            .put(FAR + 64 * MIB, &entry)
            .length(4 * FAR);
        let image = opened(&bomb.file, None);
        let _watchdog = Watchdog::new(format!("{size:x?}"), 60);
        match image.open_snapshot(b"s") {
            Ok(view) => {
                assert!(opens, "{size:x?}");
                assert_eq!(view.info().disk_size, size.unwrap_or(grown));
                assert_eq!((view.next_data(0).unwrap(), view.next_hole(0).unwrap()), (None, 0));
            }
            Err(e) => {
                assert!(!opens, "{size:x?}: {e}");
                assert_eq!(e.kind(), ErrorKind::Corrupt);
                assert!(e.to_string().contains("snapshot s claims a disk of"), "{e}");
            }
        }
    }
}

#[test]
fn l2_tables_all_over_a_huge_hole() {
    Bomb::new("4 million L2 tables all over", PLAIN)
        .l1(L1_ENTRIES, FAR)
        .words(FAR, u64::from(L1_ENTRIES), |i| (2 * FAR + (i << 23)) | COPIED)
        .length(1 << 46)
        .goes_off([TOO_MANY_PLACES; 2]);
}

#[test]
fn an_l1_table_past_the_end() {
    Bomb::new("L1 past the end", PLAIN)
        .l1(L1_ENTRIES, 1 << 60)
        .goes_off(["ends past the end of the file"; 2]);
}

#[test]
fn refcount_blocks_all_over_a_huge_hole() {
    Bomb::new("a million refcount blocks", PLAIN)
        .refcount_table(FAR, 128)
        .words(FAR, 1 << 20, |i| 2 * FAR + (i << 24))
        .length(1 << 46)
        .goes_off(["ok", TOO_MANY_PLACES]);
}

#[test]
fn a_refcount_table_that_is_a_hole() {
    Bomb::new("refcount table, a hole", PLAIN)
        .refcount_table(FAR, 128)
        .length(1 << 46)
        .goes_off(["ok", UNCOUNTED]);
}

/// 2 MiB each, which count 16 million clusters, and take nothing of the host.
#[test]
fn refcount_blocks_in_holes_are_neither_read_nor_looked_through() {
    let (first, blocks) = (64, 1000);
    let bomb = Bomb::new("refcount blocks of 2 MiB in holes", "cluster_size=2M,refcount_bits=1");
    let table = bomb.header.refcount_table_offset.0;
    let mut entry = [0; 8];
    bomb.file.read_exact_at(&mut entry, table).unwrap();
    let block = u64::from_be_bytes(entry);
    // Their places are counted: the image is sound.
    let bomb = bomb
        .words(table + 8, blocks, |i| (first + i) << 21)
        .put(block + first / 8, &vec![0xff; blocks as usize / 8])
        .length((first + blocks) << 21);
    assert_eq!(check(&*bomb.metered(10_000)).unwrap().corruptions, 0);
    let _watchdog = Watchdog::new(bomb.name.to_owned(), 120);

    let read = Image::open(bomb.metered(200), &by_hand(false)).unwrap();
    let prospect = read.prospect().unwrap();
    assert!(prospect.used > blocks && prospect.end == first + blocks, "{prospect:?}");

    // The search for leaks is over when it is open.
    let written = Image::open(bomb.metered(2000), &by_hand(true)).unwrap();
    let live = written.status().unwrap().live.unwrap();
    assert_eq!(live, prospect.used << 21);
    written.compact(|_| true).unwrap();
    written.close().unwrap();
    assert!(bomb.file.metadata().unwrap().len() < first << 21, "they described nothing");
    assert_eq!(check(&*bomb.metered(10_000)).unwrap().exit_code(), 0);
}

#[test]
fn what_there_is_to_win_is_not_counted_over_and_over() {
    // All entries name the first block: only an image that is not written may be open like that.
    let bomb = Bomb::new("one refcount block for all", "cluster_size=2M,refcount_bits=1");
    let table = bomb.header.refcount_table_offset.0;
    let mut entry = [0; 8];
    bomb.file.read_exact_at(&mut entry, table).unwrap();
    let bomb = bomb.words(table, 1000, |_| u64::from_be_bytes(entry)).length(1 << 46);
    let image = Image::open(bomb.metered(1000), &by_hand(false)).unwrap();
    let error = image.prospect().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    drop(image);
    drop(bomb);

    // And who asks may lose patience.
    let bomb = Bomb::new("no patience", PLAIN);
    let image = Image::open(bomb.metered(1000), &by_hand(false)).unwrap();
    assert!(image.prospect_while(|| true).unwrap().is_some());
    assert_eq!(image.prospect_while(|| false).unwrap(), None);
}

#[test]
fn status_counts_only_what_few_refcount_blocks_say() {
    let bomb = Bomb::new("many small refcount blocks", "cluster_size=512,refcount_bits=64");
    let is_counted = |length| {
        bomb.file.set_len(length).unwrap();
        let options = Options { return_leaks: false, ..by_hand(true) };
        let image = Image::open(bomb.metered(100_000), &options).unwrap();
        image.status().unwrap().live.is_some()
    };
    assert!(is_counted(100 * MIB) && !is_counted(200 * MIB));
}

/// A rebuild has put all of them at the end of a file whose free clusters are all over it. Who goes
/// through what is taken for each block takes a hundred times as long.
#[test]
fn refcount_blocks_at_the_end_move_in_one_walk_of_small_steps() {
    let clusters = 10000u64 * 64;
    let l2_tables = clusters / 64;
    let l1 = 64 * 512;
    let l2 = l1 + (l2_tables * 8).next_multiple_of(512);
    let first = l2 / 512 + l2_tables;
    let place = |i: u64| first + i + i / 60;
    let end = place(clusters);
    let blocks = end / 64;
    let bomb = Bomb::new("refcount blocks at the end", "cluster_size=512,refcount_bits=64")
        .l1(l2_tables as u32, l1)
        .words(l1, l2_tables, |i| (l2 + i * 512) | COPIED)
        .words(l2, clusters, |i| (place(i) * 512) | COPIED)
        .put(24, &(clusters * 512).to_be_bytes())
        .dirty()
        .length(end * 512);
    let _watchdog = Watchdog::new(bomb.name.to_owned(), 300);
    let options = Options { return_leaks: false, ..by_hand(true) };
    drop(Image::open(bomb.metered(u64::MAX), &options).unwrap());
    let storage = bomb.metered(60 * blocks);
    let image = Image::open(storage.clone(), &options).unwrap();
    let (mut before, mut most) = (0, 0);
    let started = Instant::now();
    image
        .compact(|_| {
            let written = storage.written.load(Ordering::Relaxed);
            most = most.max(written - std::mem::replace(&mut before, written));
            true
        })
        .unwrap();
    let reads = storage.reads.load(Ordering::Relaxed);
    println!("{blocks} blocks: {reads} reads, {most} bytes in a step, {:.1?}", started.elapsed());
    assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
    // Most is written where the moves of a column are flushed.
    assert!(most < 3 * MIB && blocks * 512 > 4 * MIB, "{most} bytes were written in one step");
    // The refcount table stays: nowhere is room for it in one piece.
    let behind = image.prospect().unwrap().behind;
    assert!(behind < 500, "{behind} clusters stay at the end");
    image.close().unwrap();
    assert_eq!(check(&*bomb.metered(u64::MAX)).unwrap().exit_code(), 0);
}

/// A kilobyte of tables asks for a refcount block of its own with each entry.
#[test]
fn refcounts_out_of_proportion_are_not_rebuilt() {
    let (entries, apart) = (40960u64, 32 * MIB);
    let (l1, l2) = (64 * MIB, 65 * MIB);
    let bomb = Bomb::new("references far apart", "cluster_size=16k,refcount_bits=64")
        .l1(entries as u32 / 2048, l1)
        .words(l1, entries / 2048, |i| (l2 + i * 16384) | COPIED)
        .words(l2, entries, |i| (FAR + i * apart) | COPIED)
        .put(24, &(entries * 16384).to_be_bytes())
        .dirty()
        .length(FAR + entries * apart);
    let storage = bomb.metered(100_000);
    let (length, allocated) = (storage.len().unwrap(), storage.allocated().unwrap());
    let error = Image::open(storage.clone(), &by_hand(true)).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooBig);
    assert!(error.to_string().contains("qemu-img convert"), "{error}");
    let report = repair(&*storage, Repair::All).unwrap();
    let conclusion = report.findings.last().unwrap();
    assert!(conclusion.starts_with("not repairable, nothing was changed: its refcounts"));
    assert_eq!(report.exit_code(), 2);
    assert_eq!(storage.written.load(Ordering::Relaxed), 0);
    assert_eq!((storage.len().unwrap(), storage.allocated().unwrap()), (length, allocated));
    let image = Image::open(storage, &by_hand(false)).unwrap();
    image.read(0, &mut [0; 4096]).unwrap();
}

#[test]
fn snapshots_by_the_million() {
    Bomb::new("a million snapshots", PLAIN)
        .snapshots(1 << 20, FAR)
        .length(1 << 40)
        .goes_off(["ok", "at most 65536 are served"]);
    Bomb::new("65536 snapshots in a hole", PLAIN)
        .snapshots(1 << 16, FAR)
        .length(1 << 40)
        .goes_off(["ok", UNCOUNTED]);
}

/// An entry of the snapshot table.
fn snapshot(l1: u64, entries: u32, name: &[u8]) -> Vec<u8> {
    let mut entry = vec![0; 40];
    entry[..8].copy_from_slice(&l1.to_be_bytes());
    entry[8..12].copy_from_slice(&entries.to_be_bytes());
    entry[14..16].copy_from_slice(&(name.len() as u16).to_be_bytes());
    entry[39] = 24;
    entry.extend([0; 24]);
    entry.extend(name);
    entry.resize(entry.len().next_multiple_of(8), 0);
    entry
}

#[test]
fn snapshots_with_long_names() {
    let bomb = Bomb::new("65536 snapshots with long names", PLAIN);
    let table: Vec<u8> = (0..65536).flat_map(|_| snapshot(0, 0, &[b'n'; 900])).collect();
    bomb.snapshots(1 << 16, FAR)
        .put(FAR, &table)
        .length(1 << 40)
        .goes_off(["ok", TOO_MANY_SNAPSHOTS]);
}

#[test]
fn snapshots_with_l2_tables_all_over() {
    let l1 = |i: u64| 2 * FAR + i * 64 * MIB;
    let table = [snapshot(l1(0), L1_ENTRIES, b"a"), snapshot(l1(1), L1_ENTRIES, b"b")].concat();
    let mut bomb = Bomb::new("8 million L2 tables of snapshots", PLAIN);
    for one in 0..2 {
        let tables = |i: u64| 4 * FAR + ((i << 1 | one) << 23);
        bomb = bomb.words(l1(one), u64::from(L1_ENTRIES), tables);
    }
    bomb.snapshots(2, FAR).put(FAR, &table).length(1 << 47).goes_off(["ok", TOO_MANY_PLACES]);
}

#[test]
fn bitmaps_that_claim_much() {
    for (name, count, size) in [
        ("4 billion bitmaps", u32::MAX, 64 * MIB),
        ("65535 bitmaps in a hole", 65535, 64 * MIB),
        ("a directory of 2^63 bytes", 1, 1 << 63),
    ] {
        let bomb = Bomb::new(name, PLAIN);
        let at = u64::from(bomb.header.header_length);
        let mut extension = EXTENSION_BITMAPS.to_be_bytes().to_vec();
        extension.extend(24u32.to_be_bytes());
        extension.extend(count.to_be_bytes());
        extension.extend([0; 4]);
        extension.extend(size.to_be_bytes());
        extension.extend(FAR.to_be_bytes());
        extension.extend([0; 8]);
        bomb.put(at, &extension).put(95, &[1]).length(1 << 40).goes_off(["ok"; 2]);
    }
}

#[test]
fn headers_that_claim_much() {
    for (name, at, bytes, refused) in [
        ("a virtual size near 2^64", 24, &[0xff; 8][..], "a virtual size of"),
        (
            "a backing name of 4 GiB",
            8,
            &[0, 0, 0, 0, 0, 0, 2, 0, 0xff, 0xff, 0xff, 0xff],
            "name is 4294967295 bytes long",
        ),
        ("an extension of 4 GiB", 112, &[1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff], "leaves the header"),
        ("clusters of 2^63 bytes", 20, &[0, 0, 0, 63], "cluster_bits is 63"),
        ("refcounts of 2^63 bits", 96, &[0, 0, 0, 63], "refcount_order is 63"),
        ("a header of 4 GiB", 100, &[0xff; 4], "header_length is 4294967295"),
    ] {
        Bomb::new(name, PLAIN).put(at, bytes).goes_off([refused; 2]);
    }
}

/// An image whose first cluster is `compressed`.
fn compressed(name: &'static str, options: &str, compressed: &[u8]) -> Bomb {
    let bomb = Bomb::new(name, options);
    let mut l1 = [0; 8];
    bomb.file.read_exact_at(&mut l1, bomb.header.l1_table_offset.0).unwrap();
    let l2 = u64::from_be_bytes(l1) & !COPIED;
    // 64 KiB clusters: 8 bits for the sectors past the first.
    let sectors = (compressed.len() as u64).div_ceil(512) - 1;
    let entry = 1 << 62 | sectors << 54 | FAR;
    bomb.put(l2, &entry.to_be_bytes()).put(FAR, compressed).length(FAR + MIB)
}

/// A frame without its size: all of it zeros, in one block after the other.
fn zstd_zeros(window: u8, blocks: usize) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, window];
    for i in 0..blocks {
        // 128 KiB of one byte: a block of type 1.
        let header = (128 << 10 << 3) | 1 << 1 | u32::from(i + 1 == blocks);
        frame.extend(&header.to_le_bytes()[..3]);
        frame.push(0);
    }
    frame
}

#[test]
fn compressed_clusters_that_inflate_to_gigabytes() {
    use std::io::Write;
    let mut deflate = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    (0..32).for_each(|_| deflate.write_all(&[0; 1 << 20]).unwrap());
    compressed("deflate, 32 MiB", PLAIN, &deflate.finish().unwrap()).goes_off(["ok", UNCOUNTED]);
    let zstd = "compression_type=zstd";
    compressed("zstd, 1 GiB", zstd, &zstd_zeros(0x58, 8192)).goes_off(["ok", UNCOUNTED]);
    // The window is 2^(10 + 31) bytes.
    compressed("zstd, a window of 2 TiB", zstd, &zstd_zeros(0xf8, 4))
        .goes_off(["requires too much memory"; 2]);
    compressed("zstd, a window of 2 GiB", zstd, &zstd_zeros(0xa8, 4))
        .goes_off(["requires too much memory"; 2]);
}
