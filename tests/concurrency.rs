//! Many threads on one image, and on many images at once, with the recycler at work beside them.
//!
//! Every sector belongs to one writer, which knows what it holds and looks after every operation;
//! writers share clusters. Readers look at any sector at any time: it must hold one of the values
//! that its writer had put there between the last one acknowledged before the read and the last
//! one begun before its end. In the end QEMU finds the image sound and reads what the writers wrote.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod support;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use qcow2fs::image::Image;
use support::made::Made;
use support::oracle::{data, describe, number_of, pattern};
use support::qemu::{self, DataFile, Shape};
use support::rng::Rng;
use support::{SECTOR, Watchdog, busy, difference, scratch, setting};

/// A sector's value is the number of the operation that made it, with this bit if that zeroed it;
/// or 0 for what it held at first.
const ZEROED: u64 = 1 << 63;

/// The number of the next operation on any image.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// What readers may know of a sector.
struct Sector {
    /// The last operation that its writer has begun.
    begun: AtomicU64,
    /// The last operation that is over.
    over: AtomicU64,
}

struct Arena<'a> {
    image: Arc<Image>,
    /// What the disk held at first.
    initial: &'a [u8],
    sectors: Vec<Sector>,
    writers: u64,
    /// Sectors are dealt to the writers in pieces of so many.
    piece: u64,
    stop: AtomicBool,
}

impl<'a> Arena<'a> {
    fn new(image: Arc<Image>, initial: &'a [u8], writers: u64, piece: u64) -> Self {
        let fresh = || Sector { begun: 0.into(), over: 0.into() };
        let sectors = (0..image.virtual_size() / SECTOR).map(|_| fresh()).collect();
        Arena { image, initial, sectors, writers, piece, stop: AtomicBool::new(false) }
    }

    /// Some consecutive sectors that belong to `writer`.
    fn own(&self, writer: u64, rng: &mut Rng) -> Range<u64> {
        let rounds = self.sectors.len() as u64 / (self.piece * self.writers);
        let start = (rng.within(0..rounds) * self.writers + writer) * self.piece;
        let first = start + if rng.one_in(2) { 0 } else { rng.within(0..self.piece) };
        let end = start + self.piece;
        first..if rng.one_in(2) { end } else { rng.within(first + 1..end + 1) }
    }

    fn write(&self, writer: u64, mut rng: Rng) {
        while !self.stop.load(Ordering::Relaxed) {
            let own = self.own(writer, &mut rng);
            let bytes = own.start * SECTOR..own.end * SECTOR;
            match rng.within(0..100) {
                0..55 => {
                    let number = NEXT.fetch_add(1, Ordering::Relaxed);
                    let data = data(number, own.clone());
                    self.act(&own, number, || {
                        self.image.write(bytes.start, &data).unwrap();
                    });
                }
                55..85 => {
                    let number = NEXT.fetch_add(1, Ordering::Relaxed);
                    let discards = rng.one_in(2);
                    self.act(&own, number | ZEROED, || match discards {
                        true => self.image.discard(bytes).unwrap(),
                        false => self.image.write_zeroes(bytes).unwrap(),
                    });
                }
                85..88 => self.image.preallocate(bytes).unwrap(),
                88..90 => self.image.flush().unwrap(),
                90..92 => {
                    self.image.next_data(bytes.start).unwrap();
                    self.image.next_hole(bytes.start).unwrap();
                }
                _ => {}
            }
            self.look_at_own(&own);
        }
    }

    fn act(&self, own: &Range<u64>, value: u64, act: impl FnOnce()) {
        let sectors = &self.sectors[own.start as usize..own.end as usize];
        sectors.iter().for_each(|s| s.begun.store(value, Ordering::SeqCst));
        act();
        sectors.iter().for_each(|s| s.over.store(value, Ordering::SeqCst));
    }

    /// A writer's own sectors hold what it put there.
    fn look_at_own(&self, own: &Range<u64>) {
        let mut found = vec![0xee; ((own.end - own.start) * SECTOR) as usize];
        self.image.read(own.start * SECTOR, &mut found).unwrap();
        for (sector, bytes) in own.clone().zip(found.chunks_exact(SECTOR as usize)) {
            let value = self.sectors[sector as usize].over.load(Ordering::SeqCst);
            let right = self.holds(value, sector, bytes);
            assert!(right, "sector {sector} holds {}, not {value:x}", describe(bytes));
        }
    }

    /// Any sectors hold something that their writers put there at the time.
    fn read(&self, mut rng: Rng) {
        while !self.stop.load(Ordering::Relaxed) {
            let total = self.sectors.len() as u64;
            let first = rng.within(0..total);
            let sectors = first..(first + rng.within(1..200)).min(total);
            let range = sectors.start as usize..sectors.end as usize;
            let before: Vec<u64> =
                self.sectors[range.clone()].iter().map(|s| s.over.load(Ordering::SeqCst)).collect();
            let mut found = vec![0xee; range.len() * SECTOR as usize];
            self.image.read(first * SECTOR, &mut found).unwrap();
            let chunks = found.chunks_exact(SECTOR as usize);
            for ((sector, bytes), over) in sectors.zip(chunks).zip(before) {
                let begun = self.sectors[sector as usize].begun.load(Ordering::SeqCst);
                let allowed = self.may_hold(over, begun, sector, bytes);
                let what = describe(bytes);
                assert!(allowed, "sector {sector} holds {what}, between {over:x} and {begun:x}");
            }
        }
    }

    fn flush(&self, mut rng: Rng) {
        while !self.stop.load(Ordering::Relaxed) {
            self.image.flush().unwrap();
            self.image.status().unwrap();
            thread::sleep(Duration::from_millis(rng.within(0..10)));
        }
    }

    /// What a sector held at first.
    fn initially(&self, sector: u64) -> &[u8] {
        let at = (sector * SECTOR) as usize;
        &self.initial[at..at + SECTOR as usize]
    }

    fn holds(&self, value: u64, sector: u64, bytes: &[u8]) -> bool {
        match value {
            0 => bytes == self.initially(sector),
            value if value & ZEROED != 0 => bytes.iter().all(|&b| b == 0),
            value => bytes == pattern(value, sector),
        }
    }

    /// Whether a sector may be read so when `over` was acknowledged before the read and nothing
    /// after `begun` had begun at its end.
    fn may_hold(&self, over: u64, begun: u64, sector: u64, bytes: &[u8]) -> bool {
        if over == begun {
            return self.holds(over, sector, bytes);
        }
        // An operation was under way. A read of what is being written in place may meet old and new
        // words, as it does in any file; nothing else.
        let numbers = (over & !ZEROED)..=(begun & !ZEROED);
        let initially = self.initially(sector).chunks_exact(8);
        (0..).zip(bytes.chunks_exact(8)).zip(initially).all(|((n, bytes), first)| {
            let word = bytes.iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte));
            let is_written = match n {
                1 => word == sector,
                _ => numbers.contains(&number_of(word, n, sector)),
            };
            word == 0 || is_written || (over == 0 && bytes == first)
        })
    }

    /// What the disk holds when nobody works on it.
    fn expected(&self) -> Vec<u8> {
        let contents = |(sector, state): (u64, &Sector)| match state.over.load(Ordering::SeqCst) {
            0 => self.initially(sector).to_vec(),
            value if value & ZEROED != 0 => vec![0; SECTOR as usize],
            value => pattern(value, sector).to_vec(),
        };
        (0..).zip(&self.sectors).flat_map(contents).collect()
    }
}

/// Images of these shapes are worked on at once for some seconds, then judged.
fn stress(name: &str, shapes: &[Shape], writers: u64, seconds: u64) {
    let seed = setting("QCOW2FS_SEED").unwrap_or_else(support::rng::fresh_seed);
    let seconds = setting("QCOW2FS_MODEL_SECONDS").unwrap_or(seconds);
    println!("{name}: QCOW2FS_SEED={seed}");
    let mut rng = Rng::new(seed);
    let directory = scratch();
    let images: Vec<Made> = (0..)
        .zip(shapes)
        .map(|(n, shape)| {
            let own = directory.path().join(format!("{n}"));
            std::fs::create_dir(&own).unwrap();
            Made::furnished(shape.clone(), &own, &mut rng)
        })
        .collect();
    let rounds = 3;
    let mut held: Vec<Option<Vec<Sector>>> = shapes.iter().map(|_| None).collect();
    for _ in 0..rounds {
        let _watchdog = Watchdog::new(format!("{name} with QCOW2FS_SEED={seed}"), seconds + 60);
        let mut arenas = Vec::new();
        for (made, held) in images.iter().zip(&mut held) {
            let image = made.open(&busy(&mut rng)).unwrap();
            let in_cluster = made.shape.cluster_size() / SECTOR;
            let pieces = [1, 3, in_cluster, 2 * in_cluster + 1];
            let most = image.virtual_size() / SECTOR / writers;
            let mut arena =
                Arena::new(image, &made.contents, writers, (*rng.pick(&pieces)).min(most));
            if let Some(sectors) = held.take() {
                arena.sectors = sectors;
            }
            arenas.push(arena);
        }
        work(&arenas, &mut rng, Duration::from_millis(seconds * 1000 / rounds));
        for ((arena, made), held) in arenas.into_iter().zip(&images).zip(&mut held) {
            judge(&arena, made);
            *held = Some(arena.sectors);
        }
    }
}

fn work(arenas: &[Arena<'_>], rng: &mut Rng, time: Duration) {
    thread::scope(|scope| {
        for arena in arenas {
            for writer in 0..arena.writers {
                let rng = Rng::new(rng.next());
                scope.spawn(move || stopping(arena, || arena.write(writer, rng)));
            }
            let (first, second, third) = (rng.next(), rng.next(), rng.next());
            scope.spawn(move || stopping(arena, || arena.read(Rng::new(first))));
            scope.spawn(move || stopping(arena, || arena.read(Rng::new(second))));
            scope.spawn(move || stopping(arena, || arena.flush(Rng::new(third))));
        }
        let end = Instant::now() + time;
        while Instant::now() < end && arenas.iter().all(|a| !a.stop.load(Ordering::Relaxed)) {
            thread::sleep(Duration::from_millis(20));
        }
        arenas.iter().for_each(|arena| arena.stop.store(true, Ordering::Relaxed));
    });
}

/// Does something; a failure stops the others too.
fn stopping(arena: &Arena, act: impl FnOnce()) {
    struct Stop<'a>(&'a Arena<'a>);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                self.0.stop.store(true, Ordering::Relaxed);
            }
        }
    }
    let _stop = Stop(arena);
    act();
}

fn judge(arena: &Arena, made: &Made) {
    let expected = arena.expected();
    let mut found = vec![0xee; expected.len()];
    arena.image.read(0, &mut found).unwrap();
    assert_eq!(difference(&found, &expected), None);
    arena.image.close().unwrap();
    qemu::assert_clean(&made.path);
    qemu::assert_same(&made.path, &expected);
    made.assert_snapshots(&made.path).unwrap();
}

fn shape(cluster_bits: u32, refcount_bits: u32, size: u64) -> Shape {
    Shape::new(cluster_bits, refcount_bits, size)
}

#[test]
fn threads_that_share_small_clusters_do_not_meet() {
    stress("small clusters", &[shape(12, 16, 2 << 20)], 6, 8);
}

#[test]
fn threads_that_share_large_clusters_do_not_meet() {
    stress("large clusters", &[shape(16, 16, 8 << 20)], 4, 6);
}

#[test]
fn threads_that_share_clusters_of_subclusters_do_not_meet() {
    let shapes = [14, 16].map(|bits| Shape { extended_l2: true, ..shape(bits, 16, 2 << 20) });
    stress("subclusters", &shapes, 4, 6);
}

#[test]
fn threads_that_make_tables_grow_do_not_meet() {
    stress("growing tables", &[shape(9, 64, 4 << 20)], 4, 8);
}

#[test]
fn many_images_at_once_do_not_meet() {
    let shapes = [
        shape(9, 1, 1 << 20),
        shape(12, 8, 3 << 20),
        shape(16, 16, 6 << 20),
        shape(21, 64, 8 << 20),
        Shape { data_file: DataFile::Plain, ..shape(12, 16, 2 << 20) },
        Shape { data_file: DataFile::Raw, ..shape(9, 16, 1 << 20) },
    ];
    stress("many images", &shapes, 2, 8);
}

/// The end of the disk comes and goes while others work before it.
#[test]
fn a_disk_is_resized_while_it_is_written() {
    let directory = scratch();
    let size = 1 << 20;
    let made = Made::empty(shape(9, 16, size), directory.path());
    let _watchdog = Watchdog::new("resizing", 60);
    let mut rng = Rng::new(support::rng::fresh_seed());
    let image = made.open(&busy(&mut rng)).unwrap();
    let arena = Arena::new(image.clone(), &made.contents, 3, 5);
    thread::scope(|scope| {
        for writer in 0..3 {
            let rng = Rng::new(rng.next());
            let arena = &arena;
            scope.spawn(move || stopping(arena, || arena.write(writer, rng)));
        }
        stopping(&arena, || {
            let end = Instant::now() + Duration::from_secs(3);
            while Instant::now() < end && !arena.stop.load(Ordering::Relaxed) {
                let more = size + rng.within(2..2000) * SECTOR;
                image.resize(more).unwrap();
                assert_eq!(image.virtual_size(), more);
                image.write(more - 700, &[9; 700]).unwrap();
                image.resize(size).unwrap();
                image.resize(more).unwrap();
                let mut tail = [1; 700];
                image.read(more - 700, &mut tail).unwrap();
                assert_eq!(tail, [0; 700], "what was cut off came back");
            }
        });
        arena.stop.store(true, Ordering::Relaxed);
    });
    image.resize(size).unwrap();
    judge(&arena, &made);
}
