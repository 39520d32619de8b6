//! Persistent dirty bitmaps. What QEMU finds in them after our writes is exactly what was written;
//! whatever crash or host error there was, a bitmap is marked as inconsistent or lacks nothing.
//!
//! `QCOW2FS_SEED` repeats one history, `QCOW2FS_MODEL_SECONDS` makes the search longer.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod support;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use qcow2fs::format::{BitmapsExtension, EXTENSION_BITMAPS};
use qcow2fs::image::{Beside, Image, Options};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::{
    Entry, FailingStorage, Fate, Fault, MemoryStorage, Operation, RecordingStorage,
};
use support::bitmaps::{bitmaps, dirty_by_qemu, header};
use support::qemu::{self, DataFile, Shape};
use support::rng::Rng;
use support::{busy, for_seeds, host_file, open_read_only, scratch, verify, verify_clean};

/// The bytes of a disk of `size` bytes that these granules are.
fn ranges(granules: &BTreeSet<u64>, granularity: u64, size: u64) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for granule in granules {
        let (start, end) = (granule * granularity, ((granule + 1) * granularity).min(size));
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

fn add_bitmap(image: &Path, name: &str, granularity: u64, enabled: bool) {
    let granularity = granularity.to_string();
    let mut command = Command::new("qemu-img");
    command.args(["bitmap", "--add", "-g", &granularity]);
    if !enabled {
        command.arg("--disable");
    }
    qemu::run(command.arg(image).arg(name));
}

/// What a bitmap has to say.
#[derive(Clone, Debug)]
struct Expected {
    name: String,
    granularity: u64,
    enabled: bool,
    granules: BTreeSet<u64>,
}

impl Expected {
    fn note(&mut self, range: &Range<u64>) {
        if self.enabled {
            let granules = range.start / self.granularity..range.end.div_ceil(self.granularity);
            self.granules.extend(granules);
        }
    }

    /// What is cut may have been cleared before something went wrong, and what comes may be where
    /// something else was.
    fn resize(&mut self, old: u64, new: u64) {
        self.note(&(old.min(new)..old.max(new)));
        let last = new.div_ceil(self.granularity);
        self.granules.retain(|granule| *granule < last);
    }
}

/// An image with bitmaps, some of which have recorded what QEMU wrote.
fn make(path: &Path, shape: &Shape, rng: &mut Rng) -> Vec<Expected> {
    shape.create(path, None);
    // Data that no bitmap has as changed: discarding it changes the disk.
    for _ in 0..rng.within(0..4) {
        write_by_qemu(path, shape, rng);
    }
    let mut expected = Vec::new();
    for n in 0..rng.within(1..4) {
        let granularity = *rng.pick(&[512, 1024, 4096, 65536, 2 << 20]);
        let name = format!("bitmap{n}");
        add_bitmap(path, &name, granularity, true);
        expected.push(Expected { name, granularity, enabled: true, granules: BTreeSet::new() });
    }
    for _ in 0..rng.within(0..5) {
        let range = write_by_qemu(path, shape, rng);
        expected.iter_mut().for_each(|bitmap| bitmap.note(&range));
    }
    for bitmap in &mut expected {
        if rng.one_in(3) {
            qemu_img_named(path, "--disable", &bitmap.name);
            bitmap.enabled = false;
        }
    }
    expected
}

fn write_by_qemu(path: &Path, shape: &Shape, rng: &mut Rng) -> Range<u64> {
    let range = rng.range(shape.size, 100_000, &[512]);
    let (start, length) = (range.start, range.end - range.start);
    qemu::io(path, &[format!("write -P {} {start} {length}", rng.within(1..256))]);
    range
}

fn qemu_img_named(path: &Path, what: &str, name: &str) {
    qemu::run(Command::new("qemu-img").args(["bitmap", what]).arg(path).arg(name));
}

fn shape(rng: &mut Rng) -> Shape {
    let shape = Shape::random(rng, 8 << 20);
    let data_file = DataFile::None;
    Shape { version: 3, refcount_bits: 16, preallocation: "off", data_file, ..shape }
}

/// Changes the disk in one way or another.
fn change(image: &Image, expected: &mut [Expected], rng: &mut Rng) {
    let size = image.virtual_size();
    let longest = *rng.pick(&[600, 5000, 300_000]);
    let range = rng.range(size, longest, &[1, 512, 4096]);
    let mut note = |range: &Range<u64>| expected.iter_mut().for_each(|bitmap| bitmap.note(range));
    match rng.within(0..10) {
        0..5 => {
            note(&range);
            let byte = rng.next() as u8;
            image.write(range.start, &vec![byte; (range.end - range.start) as usize]).unwrap();
        }
        5..7 => {
            note(&range);
            image.discard(range).unwrap();
        }
        7 => {
            note(&range);
            image.write_zeroes(range).unwrap();
        }
        8 => image.flush().unwrap(),
        _ if rng.one_in(3) => {
            let new = rng.within(1..size / 512 + 200) * 512;
            image.resize(new).unwrap();
            expected.iter_mut().for_each(|bitmap| bitmap.resize(size, new));
        }
        _ => image.preallocate(range).unwrap(),
    }
}

#[test]
fn qemu_finds_exactly_the_granules_that_were_changed() {
    for_seeds("qemu_finds_exactly_the_granules_that_were_changed", 8, |seed| {
        let directory = scratch();
        let path = directory.path().join("disk.qcow2");
        let mut rng = Rng::new(seed);
        let shape = shape(&mut rng);
        let mut expected = make(&path, &shape, &mut rng);
        for _ in 0..rng.within(1..4) {
            let image = Image::open(host_file(&path), &busy(&mut rng)).unwrap();
            for _ in 0..rng.within(1..30) {
                change(&image, &mut expected, &mut rng);
            }
            image.close().unwrap();
            let size = image.virtual_size();
            let file = host_file(&path);
            verify_clean(&*file).unwrap();
            let found = bitmaps(&*file);
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                assert!(!found.entry.in_use, "{} is inconsistent", found.entry);
                assert_eq!(found.entry.auto, expected.enabled);
                let (granules, granularity) = (&expected.granules, expected.granularity);
                assert_eq!(&found.granules, granules, "{} ({granularity})", found.entry);
            }
            qemu::assert_clean(&path);
            let judged = &expected[rng.within(0..expected.len() as u64) as usize];
            let dirty = ranges(&judged.granules, judged.granularity, size);
            assert_eq!(dirty_by_qemu(&path, &judged.name), dirty, "{}", judged.name);
        }
    });
}

#[test]
fn bitmaps_that_do_not_record_stay_as_they_are_byte_for_byte() {
    let directory = scratch();
    let path = directory.path().join("disk.qcow2");
    qemu::run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("8M"));
    for (name, granularity) in [("old", 512), ("older", 65536), ("new", 4096)] {
        add_bitmap(&path, name, granularity, true);
    }
    qemu::io(&path, &["write 1M 700k".into()]);
    qemu_img_named(&path, "--disable", "old");
    qemu_img_named(&path, "--disable", "older");
    let before = bitmaps(&*host_file(&path));
    let image = Image::open(host_file(&path), &writable()).unwrap();
    image.write(3 << 20, &[7; 5000]).unwrap();
    let during = bitmaps(&*host_file(&path));
    assert_eq!(during.iter().map(|b| b.entry.in_use).collect::<Vec<_>>(), [false, false, true]);
    assert_eq!(during[..2], before[..2]);
    image.close().unwrap();
    let after = bitmaps(&*host_file(&path));
    assert_eq!(after[..2], before[..2]);
    let added: Vec<_> = after[2].granules.difference(&before[2].granules).copied().collect();
    assert_eq!(added, [768, 769]);
    qemu::assert_clean(&path);
}

fn writable() -> Options {
    Options { writable: true, ..Options::default() }
}

fn one_bitmap(path: &Path, size: &str) {
    qemu_img_create(path, size);
    add_bitmap(path, "b", 65536, true);
}

fn qemu_img_create(path: &Path, size: &str) {
    qemu::run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(path).arg(size));
}

#[test]
fn opening_alone_changes_no_byte() {
    let directory = scratch();
    let path = directory.path().join("disk.qcow2");
    one_bitmap(&path, "4M");
    let before = std::fs::read(&path).unwrap();
    for options in [Options::default(), writable()] {
        let image = Image::open(host_file(&path), &options).unwrap();
        image.read(0, &mut [0; 4096]).unwrap();
        image.close().unwrap();
        assert!(std::fs::read(&path).unwrap() == before, "the file has changed");
    }
}

#[test]
fn a_bitmap_in_use_when_the_image_is_opened_stays_so_and_keeps_its_clusters() {
    let directory = scratch();
    let path = directory.path().join("disk.qcow2");
    one_bitmap(&path, "4M");
    qemu::io(&path, &["write 1M 64k".into()]);
    add_bitmap(&path, "second", 4096, true);
    let image = Image::open(host_file(&path), &writable()).unwrap();
    image.write(0, &[1; 512]).unwrap();
    image.flush().unwrap();
    // As a crash leaves it.
    let crashed = std::fs::read(&path).unwrap();
    image.close().unwrap();
    std::fs::write(&path, &crashed).unwrap();
    let before = bitmaps(&*host_file(&path));
    assert!(before.iter().all(|bitmap| bitmap.entry.in_use));
    let image = Image::open(host_file(&path), &writable()).unwrap();
    for n in 0..40 {
        image.write(n << 16, &[2; 65536]).unwrap();
    }
    image.resize(64 << 20).unwrap();
    while image.status().unwrap().searching_leaks {
        std::thread::sleep(Duration::from_millis(1));
    }
    image.close().unwrap();
    assert_eq!(bitmaps(&*host_file(&path)), before);
    qemu::assert_clean(&path);
    qemu_img_named(&path, "--remove", "b");
    qemu::assert_clean(&path);
}

/// Bitmaps that QEMU itself refuses: the format has one way to say that nobody may believe in them.
#[test]
fn bitmaps_that_make_no_sense_are_void_after_the_first_change() {
    for (field, bytes) in [(17, vec![40]), (11, vec![9]), (20, vec![0, 0, 0, 8]), (15, vec![6])] {
        let directory = scratch();
        let path = directory.path().join("disk.qcow2");
        one_bitmap(&path, "4M");
        let file = host_file(&path);
        let extension = header(&*file);
        let data = extension.extension(EXTENSION_BITMAPS).unwrap();
        let at = BitmapsExtension::parse(data, &extension.geometry).unwrap().directory_offset.0;
        file.write_at(&bytes, at + field).unwrap();
        let refused = Command::new("qemu-img").arg("info").arg(&path).output().unwrap();
        assert!(!refused.status.success(), "QEMU takes {bytes:?} at {field}");
        let image = Image::open(file.clone(), &writable()).unwrap();
        assert!(image.is_writable());
        assert_eq!(header(&*file).autoclear_features, 1, "opening alone");
        image.write(5, b"data").unwrap();
        image.close().unwrap();
        assert_eq!(header(&*file).autoclear_features, 0);
        qemu::io(&path, &["read -P 0x64 5 1".into()]);
        // Its clusters have leaked: the next search returns them.
        let image = Image::open(file.clone(), &writable()).unwrap();
        while image.status().unwrap().searching_leaks {
            std::thread::sleep(Duration::from_millis(1));
        }
        image.close().unwrap();
        qemu::assert_clean(&path);
        verify_clean(&*file).unwrap();
    }
}

#[test]
fn what_takes_too_much_memory_stays_marked_and_the_rest_is_right() {
    let directory = scratch();
    let path = directory.path().join("disk.qcow2");
    qemu_img_create(&path, "400G");
    add_bitmap(&path, "fine", 512, true);
    add_bitmap(&path, "coarse", 1 << 20, true);
    let image = Image::open(host_file(&path), &writable()).unwrap();
    image.discard(0..400 << 30).unwrap();
    image.close().unwrap();
    let listed = qemu::run(Command::new("qemu-img").args(["info", "--output=json"]).arg(&path));
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let listed = &listed["format-specific"]["data"]["bitmaps"];
    assert_eq!(listed[0]["flags"], serde_json::json!(["in-use", "auto"]), "{listed}");
    assert_eq!(listed[1]["flags"], serde_json::json!(["auto"]), "{listed}");
    assert_eq!(dirty_by_qemu(&path, "coarse"), vec![0..400 << 30; 1]);
    qemu::assert_clean(&path);
}

/// Whatever stands in the bitmaps, once all references are counted: the disk is what it was, or the
/// image takes no writes. A bitmap may claim a cluster of the disk as its own.
#[test]
fn damaged_bitmaps_harm_no_data() {
    let (mut written, mut refused) = (0, 0);
    for_seeds("damaged_bitmaps_harm_no_data", 5, |seed| {
        let mut rng = Rng::new(seed);
        let History { made, first, .. } = prepare(&mut rng);
        let header = header(&made);
        let data = header.extension(EXTENSION_BITMAPS).unwrap();
        let extension = BitmapsExtension::parse(data, &header.geometry).unwrap();
        let table = bitmaps(&made)[0].entry.table_offset.0;
        let places = [
            header.extensions.iter().find(|e| e.kind == EXTENSION_BITMAPS).unwrap().offset.0..24,
            extension.directory_offset.0..24,
            table..8,
        ];
        for _ in 0..40 {
            let file = Arc::new(made.fork());
            for _ in 0..rng.within(1..3) {
                let place = rng.pick(&places).clone();
                let at = place.start + rng.within(0..place.end);
                file.write_at(&[*rng.pick(&[0, 1, 2, 4, 9, 40, 0x80, 0xff])], at).unwrap();
            }
            let Ok(image) = Image::open(file.clone(), &busy(&mut rng)) else {
                refused += 1;
                continue;
            };
            while image.status().unwrap().searching_leaks {
                std::thread::sleep(Duration::from_micros(100));
            }
            let mut expected = first.clone();
            let range = rng.range(first.len() as u64, 3000, &[512]);
            let place = &mut expected[range.start as usize..range.end as usize];
            place.fill(rng.next() as u8);
            let before = refused;
            match image.write(range.start, place) {
                Ok(()) => written += 1,
                Err(_) => refused += 1,
            }
            let is_refused = refused > before;
            let closed = image.close();
            let image = open_read_only(file.clone(), Beside::default()).unwrap();
            let mut found = vec![0; first.len()];
            image.read(0, &mut found).unwrap();
            if is_refused {
                // What was written before the error stays: each sector is as it was, or written.
                for (at, sector) in (0..).step_by(512).zip(found.chunks(512)) {
                    if sector == &first[at..at + sector.len()] {
                        expected[at..at + sector.len()].copy_from_slice(sector);
                    }
                }
            }
            if let Some(difference) = support::difference(&found, &expected) {
                panic!("after {closed:?} {difference}");
            }
        }
    });
    println!("damaged bitmaps: {written} images written to, {refused} refused");
    assert!(written > 0 && refused > 0);
}

/// A history of changes with one client, and what the disk held at first.
struct History {
    made: MemoryStorage,
    first: Vec<u8>,
    expected: Vec<Expected>,
}

fn prepare(rng: &mut Rng) -> History {
    let directory = scratch();
    let path = directory.path().join("disk.qcow2");
    let cluster_bits = *rng.pick(&[9, 9, 10, 12, 14]);
    let shape = Shape {
        cluster_bits,
        extended_l2: cluster_bits >= 14 && rng.one_in(2),
        size: rng.within(20..600) * 512,
        ..shape(rng)
    };
    let expected = make(&path, &shape, rng);
    let first = qemu::contents(&path, None);
    History { made: MemoryStorage::new(std::fs::read(&path).unwrap()), first, expected }
}

/// Each bitmap is inconsistent, or has at least what it had and every granule in which the disk is
/// not what it was at first. Whether all are consistent.
fn judge(history: &History, file: &Arc<MemoryStorage>) -> Result<bool, String> {
    verify(&**file)?;
    let image =
        open_read_only(file.clone(), Beside::default()).map_err(|e| format!("opening it: {e}"))?;
    let mut disk = vec![0; image.virtual_size() as usize];
    image.read(0, &mut disk).map_err(|e| format!("reading it: {e}"))?;
    let found = bitmaps(&**file);
    if found.len() != history.expected.len() {
        return Err(format!("{} bitmaps are left", found.len()));
    }
    for (found, expected) in found.iter().zip(&history.expected) {
        if found.entry.in_use {
            continue;
        }
        if !expected.enabled {
            let last = found.entry.bits_for(disk.len() as u64);
            let lost = expected.granules.iter().find(|g| **g < last && !found.granules.contains(g));
            // A disk that was smaller for a while has lost what was past its end.
            if let Some(lost) = lost.filter(|_| disk.len() == history.first.len()) {
                return Err(format!("granule {lost} is gone from {}", found.entry));
            }
            continue;
        }
        for at in (0..disk.len()).step_by(512) {
            let same = history.first.get(at..at + 512) == disk.get(at..at + 512);
            let granule = at as u64 / expected.granularity;
            let had = expected.granules.contains(&granule) && at < history.first.len();
            if (!same || had) && !found.granules.contains(&granule) {
                let what = if same { "was dirty" } else { "has changed" };
                return Err(format!("sector {:#x} {what}, {} has it clean", at, found.entry));
            }
        }
    }
    Ok(found.iter().all(|bitmap| !bitmap.entry.in_use))
}

/// Some changes; the first error ends them.
fn run(image: &Image, rng: &mut Rng) -> qcow2fs::Result<()> {
    for _ in 0..rng.within(1..25) {
        let size = image.virtual_size();
        let range = rng.range(size, 5000, &[512]);
        match rng.within(0..12) {
            0..6 => {
                let byte = rng.next() as u8;
                image.write(range.start, &vec![byte; (range.end - range.start) as usize])?;
            }
            6..9 => image.discard(range)?,
            9 => image.flush()?,
            10 => image.write_zeroes(range)?,
            _ => image.resize(rng.within(1..size / 512 + 100) * 512)?,
        }
    }
    Ok(())
}

#[test]
fn every_crash_leaves_a_bitmap_marked_or_complete() {
    let (mut states, mut consistent) = (0, 0);
    for_seeds("every_crash_leaves_a_bitmap_marked_or_complete", 8, |seed| {
        let mut rng = Rng::new(seed);
        let history = prepare(&mut rng);
        let storage = Arc::new(RecordingStorage::new(history.made.fork()));
        let image = Image::open(storage.clone(), &busy(&mut rng)).unwrap();
        run(&image, &mut rng).unwrap();
        image.close().unwrap();
        assert_eq!(judge(&history, &Arc::new(storage.current().fork())), Ok(true), "at the end");
        verify_clean(storage.current()).unwrap();
        let mut replay = storage.replay();
        loop {
            let pending = replay.pending().len();
            let syncs = matches!(replay.peek(), Some(Entry::Sync { .. }) | None);
            let mut look = |fate: &dyn Fn(usize) -> Fate| {
                let file = Arc::new(replay.crash(fate).unwrap());
                states += 1;
                match judge(&history, &file) {
                    Ok(all) => consistent += u64::from(all),
                    Err(complaint) => {
                        panic!("a crash at entry {}: {complaint}", replay.position())
                    }
                }
            };
            if syncs || rng.one_in(8) {
                look(&|_| Fate::Kept);
                look(&|_| Fate::Lost);
                for n in 0..pending.min(8) {
                    let n = if pending <= 8 { n } else { rng.within(0..pending as u64) as usize };
                    let mask = rng.next();
                    look(&|m| if m == n { Fate::Kept } else { Fate::Lost });
                    look(&|m| if m == n { Fate::Lost } else { Fate::Kept });
                    look(&|m| if m == n { Fate::Torn(mask) } else { Fate::Kept });
                }
            }
            if replay.step().unwrap().is_none() {
                break;
            }
        }
    });
    println!("{states} crash states, all bitmaps consistent in {consistent}");
    assert!(consistent > 0 && consistent < states);
}

#[test]
fn every_host_error_leaves_a_bitmap_marked_or_complete() {
    let (mut stored, mut marked) = (0, 0);
    for_seeds("every_host_error_leaves_a_bitmap_marked_or_complete", 8, |seed| {
        let mut rng = Rng::new(seed);
        let history = prepare(&mut rng);
        let seed = rng.next();
        for after in 0.. {
            let inner = Arc::new(history.made.fork());
            let file = Arc::new(FailingStorage::new(inner.clone()));
            let options = Options { return_leaks: false, ..busy(&mut Rng::new(seed)) };
            let image = Image::open(file.clone(), &options).unwrap();
            file.arm(Fault {
                on: if rng.one_in(2) { vec![Operation::Write] } else { Operation::CHANGES.into() },
                after,
                lasting: rng.one_in(2),
                errno: *rng.pick(&[libc::ENOSPC, libc::EIO]),
                short: rng.one_in(2),
            });
            let worked = run(&image, &mut Rng::new(seed));
            let struck_before = !file.strikes().is_empty();
            let closed = image.close();
            let strikes = file.strikes();
            let sync_failed = strikes.iter().any(|s| s.operation == Operation::Sync);
            assert!(closed.is_err() || !sync_failed, "closed without a word of the failed sync");
            assert!(worked.is_ok() || struck_before);
            match judge(&history, &inner) {
                Ok(true) => stored += 1,
                Ok(false) => marked += 1,
                Err(complaint) => panic!("fault {after}: {complaint}"),
            }
            if strikes.is_empty() {
                closed.unwrap();
                break;
            }
        }
    });
    println!("after host errors: {stored} times stored, {marked} times marked");
    assert!(stored > 0 && marked > 0);
}
