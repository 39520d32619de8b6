//! The header's words: what nobody knows is kept, autoclear bits go before the first write and not
//! earlier, and the dirty bit means that refcounts are rebuilt before anything else.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use qcow2fs::format::{Header, INCOMPATIBLE_DIRTY};
use qcow2fs::image::{Beside, CompactAfter, Image, Options};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::{Change, Entry, Fate, MemoryStorage, RecordingStorage};
use support::rng::Rng;
use support::{busy, for_seeds, open_read_only, qemu, scratch, verify, verify_clean};

/// Where the autoclear features are in the header.
const AUTOCLEAR: usize = 88;

fn create(path: &Path, options: &str, size: &str) {
    let mut command = Command::new("qemu-img");
    qemu::run(command.args(["create", "-q", "-f", "qcow2", "-o", options]).arg(path).arg(size));
}

fn writable() -> Options {
    Options { writable: true, ..Options::default() }
}

fn header(file: &dyn Storage) -> Header {
    let mut bytes = vec![0; file.len().unwrap().min(Header::READ_LENGTH as u64) as usize];
    file.read_at(&mut bytes, 0).unwrap();
    Header::parse(&bytes).unwrap()
}

/// The bytes of a header and of the rest of its cluster, with an unknown extension before the end of
/// the others and an unknown field after the header's own.
fn with_unknown_parts(mut cluster: Vec<u8>) -> Vec<u8> {
    let word = |bytes: &[u8], at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let length = word(&cluster, 100) as usize;
    // Eight bytes more for the header; everything after it moves.
    let mut end = length;
    while word(&cluster, end) != 0 {
        end += 8 + (word(&cluster, end + 4) as usize).next_multiple_of(8);
    }
    let known = cluster[length..end].to_vec();
    cluster[100..104].copy_from_slice(&(length as u32 + 8).to_be_bytes());
    let mut tail = b"unknown!".to_vec();
    tail.extend(0x1234_5678_u32.to_be_bytes());
    tail.extend(13u32.to_be_bytes());
    tail.extend(b"kept as it is\x01\x02\x03"); // padding that is not zeros, too
    tail.extend(known);
    tail.extend([0; 8]);
    cluster[length..length + tail.len()].copy_from_slice(&tail);
    cluster
}

#[test]
fn what_nobody_knows_in_a_header_is_kept_byte_for_byte() {
    let directory = scratch();
    let path = directory.path().join("disk.qcow2");
    create(&path, "cluster_size=1024,refcount_bits=64", "100k");
    let mut bytes = std::fs::read(&path).unwrap();
    let cluster = with_unknown_parts(bytes[..1024].to_vec());
    bytes[..1024].copy_from_slice(&cluster);
    bytes[87] |= 0x40; // an unknown compatible feature
    std::fs::write(&path, &bytes).unwrap();
    qemu::assert_clean(&path);
    let file = Arc::new(MemoryStorage::new(bytes.clone()));
    let options = Options { compact_after: CompactAfter::Off, ..writable() };
    let image = Image::open(file.clone(), &options).unwrap();
    let before = header(&*file);
    // A new L1 table, a new refcount table, a new size.
    image.resize(64 << 20).unwrap();
    image.write(0, &vec![0x5a; 24 << 20]).unwrap();
    image.close().unwrap();
    let after = header(&*file);
    assert_ne!(after.l1_table_offset, before.l1_table_offset);
    assert_ne!(after.refcount_table_offset, before.refcount_table_offset);
    assert_eq!(after.compatible_features, before.compatible_features);
    let mut expected = bytes[..1024].to_vec();
    let now = file.contents()[..1024].to_vec();
    // Size, L1 table, refcount table.
    expected[24..60].copy_from_slice(&now[24..60]);
    assert!(now == expected, "{:?}", support::difference(&now, &expected));
    verify_clean(&*file).unwrap();
    std::fs::write(&path, file.contents()).unwrap();
    qemu::assert_clean(&path);
}

#[test]
fn headers_of_every_length_are_taken_that_qemu_takes() {
    let directory = scratch();
    let path = directory.path().join("disk.qcow2");
    create(&path, "compat=1.1", "1M");
    let template = std::fs::read(&path).unwrap();
    let first = 112..65536;
    // The length, whether zstd is flagged and named; the extensions stay where they end.
    for (length, zstd, taken) in [
        (104u32, None, true),
        (104, Some(1u8), false),
        (112, None, true),
        (112, Some(1), true),
        (112, Some(0), false),
        (120, Some(1), true),
        (65528, None, true),
        (65536, None, true),
        (65544, None, false),
        (96, None, false),
        (0, None, false),
    ] {
        let mut bytes = template.clone();
        bytes[first.clone()].fill(0);
        bytes[100..104].copy_from_slice(&length.to_be_bytes());
        if let Some(kind) = zstd {
            bytes[79] |= 8;
            bytes[104] = kind;
        }
        std::fs::write(&path, &bytes).unwrap();
        let by_qemu = Command::new("qemu-img").arg("info").arg(&path).output().unwrap();
        assert_eq!(by_qemu.status.success(), taken, "QEMU: {length} {zstd:?}");
        let file = Arc::new(MemoryStorage::new(bytes));
        let ours = open_read_only(file, Beside::default());
        assert_eq!(ours.is_ok(), taken, "{length} {zstd:?}: {:?}", ours.err());
    }
}

#[test]
fn unknown_autoclear_bits_go_before_the_first_change_and_not_earlier() {
    let directory = scratch();
    let path = directory.path().join("disk.qcow2");
    create(&path, "compat=1.1", "1M");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[AUTOCLEAR] = 0x80;
    bytes[AUTOCLEAR + 7] = 0x24;
    let file = Arc::new(RecordingStorage::new(MemoryStorage::new(bytes)));
    let image = Image::open(file.clone(), &writable()).unwrap();
    image.read(0, &mut [0; 512]).unwrap();
    image.flush().unwrap();
    image.close().unwrap();
    let changes = |entry: &Entry| matches!(entry, Entry::Change(_));
    let mut replay = file.replay();
    while let Some(entry) = replay.step().unwrap() {
        assert!(!changes(&entry), "without a write there was {entry:?}");
    }
    let image = Image::open(file.clone(), &writable()).unwrap();
    image.write(0, &[1; 512]).unwrap();
    image.close().unwrap();
    let mut replay = file.replay();
    let mut next = || loop {
        match replay.step().unwrap() {
            Some(entry @ (Entry::Change(_) | Entry::Sync { .. })) => break entry,
            Some(_) => {}
            None => panic!("the log is over"),
        }
    };
    // Whatever the close before has synced.
    let first = loop {
        let entry = next();
        if changes(&entry) {
            break entry;
        }
    };
    let Entry::Change(Change::Write { offset, data }) = first else { panic!("{first:?}") };
    let cleared = offset as usize..offset as usize + data.len();
    assert!(cleared.start <= AUTOCLEAR && AUTOCLEAR + 8 <= cleared.end, "{cleared:?}");
    assert_eq!(data[AUTOCLEAR - cleared.start..][..8], [0; 8]);
    assert!(matches!(next(), Entry::Sync { .. }), "something else before that is durable");
}

/// Images that QEMU leaves behind when it is killed with lazy refcounts on.
fn dirty(directory: &Path, rng: &mut Rng) -> (Vec<u8>, Vec<u8>) {
    let path = directory.join("disk.qcow2");
    let cluster_size = *rng.pick(&[512, 4096, 65536]);
    create(&path, &format!("lazy_refcounts=on,cluster_size={cluster_size}"), "1M");
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qcow2"]);
    for _ in 0..rng.within(1..8) {
        let range = rng.range(1 << 20, 60_000, &[512]);
        let (start, length) = (range.start, range.end - range.start);
        command.arg("-c").arg(format!("write -P {} {start} {length}", rng.within(1..256)));
    }
    let killed = command.args(["-c", "flush", "-c", "abort"]).arg(&path).output().unwrap();
    assert!(!killed.status.success());
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes[79], 1, "QEMU has left the image dirty");
    let before = qemu::contents(&path, None);
    (bytes, before)
}

#[test]
fn every_crash_on_the_way_from_a_dirty_image_leaves_a_dirty_or_a_sound_one() {
    let (mut dirty_states, mut sound_states) = (0, 0);
    for_seeds("every_crash_on_the_way_from_a_dirty_image", 10, |seed| {
        let directory = scratch();
        let mut rng = Rng::new(seed);
        let (bytes, before) = dirty(directory.path(), &mut rng);
        let storage = Arc::new(RecordingStorage::new(MemoryStorage::new(bytes)));
        let image = Image::open(storage.clone(), &busy(&mut rng)).unwrap();
        let mut after = before.clone();
        for _ in 0..10 {
            let range = rng.range(1 << 20, 20_000, &[512]);
            let bytes = &mut after[range.start as usize..range.end as usize];
            bytes.fill(rng.next() as u8);
            image.write(range.start, bytes).unwrap();
        }
        image.close().unwrap();
        verify_clean(storage.current()).unwrap();
        let mut replay = storage.replay();
        loop {
            let pending = replay.pending().len() as u64;
            for n in 0..4 {
                let one = rng.within(0..pending.max(1)) as usize;
                let file = Arc::new(
                    replay
                        .crash(|m| match n {
                            0 => Fate::Kept,
                            1 => Fate::Lost,
                            2 if m == one => Fate::Lost,
                            3 if m != one => Fate::Lost,
                            _ => Fate::Kept,
                        })
                        .unwrap(),
                );
                if header(&*file).incompatible_features & INCOMPATIBLE_DIRTY == 0 {
                    sound_states += 1;
                    verify(&*file).unwrap();
                    continue;
                }
                dirty_states += 1;
                // Nothing but the rebuild is done while the bit is set.
                let image = Image::open(file.clone(), &writable()).unwrap();
                assert_eq!(header(&*file).incompatible_features & INCOMPATIBLE_DIRTY, 0);
                let mut found = vec![0; 1 << 20];
                image.read(0, &mut found).unwrap();
                assert_eq!(support::difference(&found, &before), None);
                image.write(0, &[3; 70_000]).unwrap();
                image.close().unwrap();
                verify(&*file).unwrap();
            }
            if replay.step().unwrap().is_none() {
                break;
            }
        }
        assert_eq!(
            open_read_only(Arc::new(storage.current().fork()), Beside::default())
                .map(|image| {
                    let mut found = vec![0; 1 << 20];
                    image.read(0, &mut found).unwrap();
                    support::difference(&found, &after)
                })
                .unwrap(),
            None
        );
    });
    println!("{dirty_states} dirty states, {sound_states} sound ones");
    assert!(dirty_states > 0 && sound_states > 0);
}

#[test]
fn the_dirty_bit_is_never_set_by_us_whatever_lazy_refcounts_allow() {
    let directory = scratch();
    let path = directory.path().join("disk.qcow2");
    create(&path, "lazy_refcounts=on,cluster_size=4096", "1M");
    let file = MemoryStorage::new(std::fs::read(&path).unwrap());
    let storage = Arc::new(RecordingStorage::new(file));
    let image = Image::open(storage.clone(), &busy(&mut Rng::new(1))).unwrap();
    for n in 0..100u64 {
        image.write((n * 37 % 200) * 5000, &[n as u8; 5000]).unwrap();
        image.discard((n * 53 % 200) * 5000..(n * 53 % 200 + 3) * 5000).unwrap();
        if n % 7 == 0 {
            image.flush().unwrap();
        }
    }
    image.close().unwrap();
    assert_eq!(header(storage.current()).compatible_features, 1, "still allowed");
    let mut replay = storage.replay();
    loop {
        let file = replay.crash(|_| Fate::Kept).unwrap();
        assert_eq!(header(&file).incompatible_features, 0);
        if replay.step().unwrap().is_none() {
            break;
        }
    }
}
