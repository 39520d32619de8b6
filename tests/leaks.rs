//! What a killed process leaves counted and unreferenced is returned after the next open, while the
//! disk is in use, and nothing else is.
//!
//! `QCOW2FS_SEED` repeats one history, `QCOW2FS_MODEL_SECONDS` makes the search longer.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod support;

use std::io;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use qcow2fs::image::{Condition, Image, Options};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::{self, MemoryStorage};
use support::qemu::{self, DataFile, Shape};
use support::rng::Rng;
use support::{busy, difference, for_seeds, scratch};

/// A file that the search reads slowly, so that much happens meanwhile, and not while the gate is
/// shut.
struct SlowToSearch {
    file: Arc<MemoryStorage>,
    gate: Mutex<()>,
}

impl SlowToSearch {
    fn new(file: &Arc<MemoryStorage>) -> Arc<Self> {
        Arc::new(SlowToSearch { file: file.clone(), gate: Mutex::default() })
    }
}

impl testing::Layer for SlowToSearch {
    fn below(&self) -> &dyn Storage {
        &*self.file
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if std::thread::current().name() == Some("leak search") {
            std::thread::sleep(Duration::from_millis(3));
            drop(self.gate.lock());
        }
        self.file.read_at(buf, offset)
    }
}

/// Changes the disk and the vector alike.
fn work(rng: &mut Rng, image: &Image, expected: &mut [u8], steps: u64) {
    let size = expected.len() as u64;
    let cluster_size = image.cluster_size();
    for _ in 0..steps {
        let longest = *rng.pick(&[600, cluster_size, 4 * cluster_size]);
        let range = rng.range(size, longest.min(1 << 20), &[512, cluster_size]);
        let place = &mut expected[range.start as usize..range.end as usize];
        match rng.within(0..10) {
            0..6 => {
                place.fill(rng.within(1..256) as u8);
                image.write(range.start, place).unwrap();
            }
            6..9 => {
                place.fill(0);
                image.discard(range).unwrap();
            }
            _ => image.flush().unwrap(),
        }
    }
}

fn pool(rng: &mut Rng) -> Options {
    Options { keep_erased: *rng.pick(&[64 << 10, 1 << 20]), ..busy(rng) }
}

#[test]
fn what_a_killed_process_leaked_is_returned_while_the_disk_is_in_use() {
    let mut leaked = 0;
    for_seeds("leaks", 10, |seed| {
        let mut rng = Rng::new(seed);
        let directory = scratch();
        let path = directory.path().join("disk.qcow2");
        let shape = Shape { data_file: DataFile::None, ..Shape::random(&mut rng, 16 << 20) };
        shape.create(&path, None);
        let mut expected = vec![0; shape.size as usize];

        let before = Arc::new(MemoryStorage::new(std::fs::read(&path).unwrap()));
        let killed = Image::open(before.clone(), &pool(&mut rng)).unwrap();
        let steps = rng.within(1..60);
        work(&mut rng, &killed, &mut expected, steps);
        killed.flush().unwrap();
        // The file as it is at this instant: what was in memory alone is lost.
        let left = before.contents();
        std::fs::write(&path, &left).unwrap();
        let has_snapshot = shape.refcount_bits >= 16 && rng.one_in(2);
        if has_snapshot {
            qemu::run(Command::new("qemu-img").args(["snapshot", "-c", "kept"]).arg(&path));
        }
        let kept = expected.clone();
        let left = std::fs::read(&path).unwrap();
        leaked += qcow2fs::check::check(&MemoryStorage::new(left.clone())).unwrap().leaks;

        let storage = Arc::new(MemoryStorage::new(left));
        let slow = SlowToSearch::new(&storage);
        let image = Image::open(slow, &pool(&mut rng)).unwrap();
        // A larger L1 table moves, and the place that it leaves is freed while the search reads it.
        if shape.cluster_bits <= 12 && !has_snapshot && rng.one_in(2) {
            expected.resize(expected.len() + (8 << 20), 0);
            image.resize(expected.len() as u64).unwrap();
        }
        let steps = rng.within(0..60);
        work(&mut rng, &image, &mut expected, steps);
        let started = Instant::now();
        while image.status().unwrap().searching_leaks {
            assert!(started.elapsed() < Duration::from_secs(20), "the search does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut found = vec![0xff; expected.len()];
        image.read(0, &mut found).unwrap();
        assert_eq!(difference(&found, &expected), None);
        image.close().unwrap();
        assert!(image.status().unwrap().health.contains("closed"), "nothing went wrong before");
        killed.close().unwrap();

        std::fs::write(&path, storage.contents()).unwrap();
        qemu::assert_clean(&path);
        qemu::assert_same(&path, &expected);
        if has_snapshot {
            assert_eq!(difference(&qemu::contents(&path, Some("kept")), &kept), None);
        }
    });
    assert!(leaked > 0, "no history has leaked anything: this tests nothing");
}

#[test]
fn a_search_that_is_cut_short_by_a_close_changes_nothing() {
    for_seeds("cut-short", 3, |seed| {
        let mut rng = Rng::new(seed);
        let directory = scratch();
        let path = directory.path().join("disk.qcow2");
        let shape = Shape { data_file: DataFile::None, ..Shape::random(&mut rng, 16 << 20) };
        shape.create(&path, None);
        let mut expected = vec![0; shape.size as usize];
        let storage = Arc::new(MemoryStorage::new(std::fs::read(&path).unwrap()));
        for _ in 0..10 {
            let image = Image::open(storage.clone(), &pool(&mut rng)).unwrap();
            let steps = rng.within(0..4);
            work(&mut rng, &image, &mut expected, steps);
            image.close().unwrap();
        }
        std::fs::write(&path, storage.contents()).unwrap();
        qemu::assert_clean(&path);
        qemu::assert_same(&path, &expected);
    });
}

#[test]
fn the_status_says_that_leaks_are_looked_for() {
    let directory = scratch();
    let path = directory.path().join("disk.qcow2");
    Shape::new(16, 16, 1 << 20).create(&path, None);
    let file = Arc::new(MemoryStorage::new(std::fs::read(&path).unwrap()));
    let slow = SlowToSearch::new(&file);
    let shut = slow.gate.lock().unwrap();
    let options = Options { writable: true, ..Options::default() };
    let image = Image::open(slow.clone(), &options).unwrap();
    let status = image.status().unwrap();
    assert_eq!(status.condition, Condition::Recovering);
    assert_eq!(status.health, "ok", "nothing is wrong");
    drop(shut);
    let started = Instant::now();
    while image.status().unwrap().condition != Condition::Ok {
        assert!(started.elapsed() < Duration::from_secs(20), "the search does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
    image.close().unwrap();
}
