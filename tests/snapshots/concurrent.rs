//! Snapshots that are taken, read and deleted while threads write and discard: each shows the disk
//! as it was at one moment between the writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use qcow2fs::image::Image;

use crate::model::{small_shape, whole_view};
use crate::support::made::Made;
use crate::support::rng::Rng;
use crate::support::{SECTOR, busy, for_seeds, qemu, scratch, verify_clean};

const WRITERS: u64 = 3;
/// Sectors that one writer goes round.
const ROUND: u64 = 37;

/// Writes 1, 2, 3 ... to its sectors in turn, sometimes discarding the next one first.
fn write(image: &Image, writer: u64, stop: &AtomicBool, mut rng: Rng) -> u64 {
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let at = (writer * ROUND + number % ROUND) * SECTOR;
        if rng.one_in(5) {
            image.discard(at..at + SECTOR).unwrap();
        }
        let bytes: Vec<u8> = (number | writer << 56).to_le_bytes().repeat(SECTOR as usize / 8);
        image.write(at, &bytes).unwrap();
        if rng.one_in(40) {
            image.flush().unwrap();
        }
    }
    number
}

/// One moment: the last number that a writer has written, and before it all those of one round. A
/// sector that was to be written next may have been discarded.
fn assert_moment(disk: &[u8]) {
    for writer in 0..WRITERS {
        let numbers: Vec<u64> = (0..ROUND)
            .map(|sector| {
                let at = ((writer * ROUND + sector) * SECTOR) as usize;
                let words = disk[at..at + SECTOR as usize].as_chunks::<8>().0;
                assert!(words.iter().all(|word| *word == words[0]), "a torn sector");
                let number = u64::from_le_bytes(words[0]);
                assert!(number == 0 || number >> 56 == writer, "another writer's sector");
                number & !(0xff << 56)
            })
            .collect();
        let last = numbers.iter().copied().max().unwrap_or(0);
        for back in 0..ROUND.min(last) {
            let number = last - back;
            let found = numbers[(number % ROUND) as usize];
            let discarded = back == ROUND - 1 && found == 0;
            assert!(found == number || discarded, "writer {writer}: {found}, not {number}");
        }
    }
}

fn change_snapshots(image: &Arc<Image>, rng: &mut Rng, length: Duration) -> (u64, Duration) {
    let (mut taken, mut longest) = (0, Duration::ZERO);
    let started = Instant::now();
    let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
    while started.elapsed() < length {
        let name = format!("s{taken}");
        let before = Instant::now();
        image.take_snapshot(name.as_bytes()).unwrap();
        longest = longest.max(before.elapsed());
        taken += 1;
        let view = image.open_snapshot(name.as_bytes()).unwrap();
        let content = whole_view(&view);
        drop(view);
        assert_moment(&content);
        kept.push((name, content));
        if kept.len() > 4 || rng.one_in(3) {
            let (name, content) = kept.swap_remove(rng.within(0..kept.len() as u64) as usize);
            let view = image.open_snapshot(name.as_bytes()).unwrap();
            assert!(whole_view(&view) == content, "{name} has changed");
            drop(view);
            image.delete_snapshot(name.as_bytes()).unwrap();
        }
    }
    for (name, content) in kept {
        let view = image.open_snapshot(name.as_bytes()).unwrap();
        assert!(whole_view(&view) == content, "{name} has changed");
    }
    (taken, longest)
}

#[test]
fn a_snapshot_beside_writers_is_one_moment_of_the_disk() {
    for_seeds("a_snapshot_beside_writers_is_one_moment_of_the_disk", 12, |seed| {
        let directory = scratch();
        let mut rng = Rng::new(seed);
        let mut shape = small_shape(&mut rng);
        shape.size = shape.size.max(WRITERS * ROUND * SECTOR);
        shape.refcount_bits = shape.refcount_bits.max(16);
        let made = Made::empty(shape, directory.path());
        let storage = Arc::new(made.file());
        let image = made.open_on(storage.clone(), None, &busy(&mut rng)).unwrap();
        let stop = AtomicBool::new(false);
        let (taken, written) = thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS)
                .map(|writer| {
                    let (image, stop, rng) = (&image, &stop, Rng::new(rng.next()));
                    scope.spawn(move || write(image, writer, stop, rng))
                })
                .collect();
            let (taken, longest) = change_snapshots(&image, &mut rng, Duration::from_secs(2));
            stop.store(true, Ordering::Relaxed);
            let written: u64 = writers.into_iter().map(|writer| writer.join().unwrap()).sum();
            println!("{seed}: {} {taken} taken, {longest:?} at most, {written} writes", made.shape);
            (taken, written)
        });
        assert!(taken > 0 && written > 0);
        image.close().unwrap();
        verify_clean(&*storage).unwrap();
        let path = directory.path().join("judged.qcow2");
        std::fs::write(&path, storage.contents()).unwrap();
        qemu::assert_clean(&path);
    });
}
