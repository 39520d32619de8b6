//! Reading ahead of somebody who looks at one file of a directory after the other, as `ls -l` does:
//! each look needs the header of an image, and waits for the disk where that is not in memory. Who
//! only wants the names has nothing read.

use std::ffi::OsStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::pool::{NOBODY, Pool};
use crate::catalog::{Catalog, Entry};

/// Entries of a directory from which on it is worth while.
const MANY: usize = 32;
/// Reads that wait for the disk at once.
const THREADS: usize = 4;

/// What has been listed, and the threads that read ahead. Dropped, they stop.
pub(super) struct Ahead {
    /// The directory that was read last, until somebody looks at its files.
    listed: Mutex<Option<(u64, Arc<Vec<Entry>>)>>,
    stopped: Arc<AtomicBool>,
    /// What jobs hold until they are done. While there are any, no others begin: with a listing that is
    /// asked for again and again there would be more and more.
    under_way: Mutex<Weak<()>>,
    pool: Pool,
}

impl Ahead {
    /// Threads are started when they are needed.
    pub(super) fn new() -> Ahead {
        let pool = Pool::new(THREADS);
        Ahead {
            listed: Mutex::default(),
            stopped: Arc::default(),
            under_way: Mutex::default(),
            pool,
        }
    }

    /// Somebody lists a directory.
    pub(super) fn listed(&self, directory: u64, entries: &Arc<Vec<Entry>>) {
        if entries.len() >= MANY {
            *self.listed.lock() = Some((directory, Arc::clone(entries)));
        }
    }

    /// Somebody looks at a file. The second one of a listing is followed by the others.
    pub(super) fn looked_at(&self, catalog: &Arc<Catalog>, directory: u64, name: &OsStr) {
        let Some(entries) = self.following(directory, name) else { return };
        let mut under_way = self.under_way.lock();
        if under_way.strong_count() > 0 {
            return;
        }
        let until_done = Arc::new(());
        *under_way = Arc::downgrade(&until_done);
        for first in 0..THREADS {
            let (catalog, entries) = (Arc::clone(catalog), Arc::clone(&entries));
            let (stopped, until_done) = (Arc::clone(&self.stopped), Arc::clone(&until_done));
            self.pool.run(NOBODY, move || {
                let _until_done = until_done;
                for entry in entries.iter().skip(2 + first).step_by(THREADS) {
                    if stopped.load(Ordering::Relaxed) {
                        return;
                    }
                    if !entry.directory {
                        catalog.read_ahead(directory, &entry.name);
                    }
                }
            });
        }
    }

    /// The listing of `directory`, once, where `name` is the second one in it.
    fn following(&self, directory: u64, name: &OsStr) -> Option<Arc<Vec<Entry>>> {
        let mut listed = self.listed.lock();
        let is_second = listed.as_ref().is_some_and(|(listed, entries)| {
            *listed == directory && entries.get(1).is_some_and(|second| second.name == name)
        });
        listed.take_if(|_| is_second).map(|(_, entries)| entries)
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_look_at_a_long_listing_is_followed_once() {
        let entries = |count: usize| {
            let entry = |n| Entry { name: format!("{n:03}.raw").into(), directory: false };
            Arc::new((0..count).map(entry).collect::<Vec<_>>())
        };
        let ahead = Ahead::new();
        let follows = |directory, name: &str| ahead.following(directory, name.as_ref()).is_some();
        ahead.listed(7, &entries(MANY - 1));
        assert!(!follows(7, "001.raw"), "a short one");
        ahead.listed(7, &entries(MANY));
        assert!(!follows(7, "000.raw") && !follows(8, "001.raw") && !follows(7, "002.raw"));
        assert!(follows(7, "001.raw"));
        assert!(!follows(7, "001.raw"), "once is enough");
    }
}
