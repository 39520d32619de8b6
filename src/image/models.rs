//! What threads that use an image share, in every order.

#![allow(clippy::unwrap_used)]

use std::convert::Infallible;
use std::sync::Arc;

use loom::thread;

use super::flush_lock::FlushLock;
use super::inflate::InflateCache;
use crate::format::HostOffset;
use crate::locks::GuestLocks;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::model::explore;

/// A file: what was written, and what of it is durable. The host locks it for each call.
#[derive(Default)]
struct File(Mutex<([u8; 2], [u8; 2])>);

impl File {
    fn write(&self, at: usize) {
        self.0.lock().0[at] = 1;
    }

    fn sync(&self) {
        let mut file = self.0.lock();
        file.1 = file.0;
    }

    fn is_durable(&self, at: usize) -> bool {
        self.0.lock().1[at] == 1
    }
}

#[derive(Default)]
struct Flushed {
    lock: FlushLock,
    file: File,
    /// Whether the first sync fails.
    fails: AtomicBool,
}

impl Flushed {
    fn write(&self, at: usize) {
        self.file.write(at);
        self.lock.unsynced.mark();
    }

    fn flush(&self) -> Result<(), ()> {
        self.lock.flush(|| {
            if !self.lock.unsynced.take() {
                return Ok(());
            }
            if self.fails.swap(false, Ordering::AcqRel) {
                self.lock.unsynced.mark();
                return Err(());
            }
            self.file.sync();
            Ok(())
        })
    }
}

fn what_was_written_before_a_flush_is_durable_after_it(fails: bool) {
    explore(move || {
        let image = Arc::new(Flushed { fails: AtomicBool::new(fails), ..Default::default() });
        let client = |at| {
            let image = image.clone();
            move || {
                image.write(at);
                let result = image.flush();
                assert!(result.is_err() || image.file.is_durable(at), "flushed and not there");
                result.is_err()
            }
        };
        let other = thread::spawn(client(1));
        let bystander = {
            let image = image.clone();
            thread::spawn(move || image.flush().is_err())
        };
        let failed = [client(0)(), other.join().unwrap(), bystander.join().unwrap()];
        let failures = failed.into_iter().filter(|failed| *failed).count();
        assert!(failures <= usize::from(fails), "one sync fails, one caller is told");
        assert!(image.flush().is_ok());
        assert!(image.file.is_durable(0) && image.file.is_durable(1));
    });
}

#[test]
fn a_flush_returns_after_one_that_began_after_its_request() {
    what_was_written_before_a_flush_is_durable_after_it(false);
}

#[test]
fn a_failed_flush_covers_nobody() {
    what_was_written_before_a_flush_is_durable_after_it(true);
}

/// Guest cluster 0 has compressed data; while it is read it is overwritten, and the place of the
/// data comes to be that of guest cluster 1's.
#[test]
fn nobody_reads_what_was_inflated_before_it_was_forgotten() {
    const OLD: usize = 1;
    const NEW: usize = 2;
    const PLACE: HostOffset = HostOffset(0x5000);

    #[derive(Default)]
    struct Disk {
        locks: GuestLocks,
        /// What the place holds. Relaxed: the locks alone order the accesses.
        place: AtomicUsize,
        /// Which guest clusters have their data there.
        mapped: [AtomicBool; 2],
    }

    impl Disk {
        fn read(&self, cache: &InflateCache, cluster: u64, expected: usize) {
            let _guard = self.locks.shared(cluster..cluster + 1);
            if !self.mapped[cluster as usize].load(Ordering::Relaxed) {
                return;
            }
            let inflate = || {
                let byte = self.place.load(Ordering::Relaxed) as u8;
                Ok::<_, Infallible>(vec![byte].into_boxed_slice())
            };
            let Ok(()) = cache.with(PLACE, inflate, |data| {
                assert_eq!(usize::from(data[0]), expected, "another cluster's data");
            });
        }

        fn overwrite(&self, cache: &InflateCache) {
            {
                let _guard = self.locks.exclusive(0..1);
                self.mapped[0].store(false, Ordering::Relaxed);
                cache.forget(PLACE);
            }
            let _guard = self.locks.exclusive(1..2);
            self.place.store(NEW, Ordering::Relaxed);
            self.mapped[1].store(true, Ordering::Relaxed);
        }
    }

    explore(|| {
        let disk = Disk::default();
        disk.place.store(OLD, Ordering::Relaxed);
        disk.mapped[0].store(true, Ordering::Relaxed);
        let shared = Arc::new((disk, InflateCache::new(1 << 16, &Arc::default())));
        let other = |act: fn(&Disk, &InflateCache)| {
            let shared = shared.clone();
            thread::spawn(move || act(&shared.0, &shared.1))
        };
        let others = [
            other(|disk, cache| disk.read(cache, 0, OLD)),
            other(|disk, cache| disk.overwrite(cache)),
        ];
        shared.0.read(&shared.1, 1, NEW);
        others.into_iter().for_each(|other| other.join().unwrap());
        shared.0.read(&shared.1, 1, NEW);
    });
}
