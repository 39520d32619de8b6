//! Clusters that a crash has left counted though nothing refers to them, found after the next open
//! and returned.
//!
//! A crash leaks the pool and whatever was on its way (allowed: a count may be too high, never too
//! low). A thread counts the references of the image as it was opened and gives what leaked to the
//! recycler, while the image is in use already. It goes by what is on disk, which changes under it:
//!
//! - what was counted since the open is no leak ([`Refcounts::leaked`] leaves it out);
//! - what was dropped since the open is the recycler's already (it is in the cluster map);
//! - until the search is over nothing that was dropped is punched or freed, so every table that the
//!   search may still read stays as it was.
//!
//! What is left had a refcount and no reference when the image was opened: nothing can refer to it
//! since.
//!
//! [`Refcounts::leaked`]: crate::alloc::Refcounts::leaked

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::Image;
use crate::check::references;
use crate::error::{Error, Result};
use crate::format::{AUTOCLEAR_BITMAPS, EXTENSION_BITMAPS, Header, HostCluster};
use crate::storage::Storage;

/// A search that is under way.
#[derive(Debug)]
pub(super) struct LeakSearch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl LeakSearch {
    /// Ends the search and waits for its thread; whether that went as it should.
    pub(super) fn stop(self) -> bool {
        self.stop.store(true, Ordering::Release);
        self.thread.join().is_ok()
    }
}

impl Image {
    /// Starts the search on an image that was just opened as `header` says.
    pub(super) fn search_leaks(self: &Arc<Self>, header: &Header) -> Result<Option<LeakSearch>> {
        // Bitmaps that nobody maintains look leaked, but their directory still leads to them.
        let stale_bitmaps = header.extension(EXTENSION_BITMAPS).is_some()
            && header.autoclear_features & AUTOCLEAR_BITMAPS == 0;
        if stale_bitmaps {
            return Ok(None);
        }
        let Some(writer) = &self.writer else { return Ok(None) };
        writer.refcounts.remember_counted(true);
        writer.recycler.hold_frees(true);
        let stop = Arc::new(AtomicBool::new(false));
        let storage = Stoppable { storage: self.storage.clone(), stop: stop.clone() };
        let (image, header) = (Arc::downgrade(self), header.clone());
        let search = move || {
            let counted = references::count(&storage, &header);
            let counted = counted.and_then(|counts| counts.trusted().map(|()| counts));
            if let Some(image) = image.upgrade() {
                image.end_search(counted, &storage.stop);
            }
        };
        let thread = std::thread::Builder::new()
            .name("leak search".into())
            .spawn(search)
            .map_err(|e| Error::io("starting the search for leaked clusters", e))?;
        Ok(Some(LeakSearch { stop, thread }))
    }

    fn end_search(&self, counted: Result<references::ReferenceCounts>, stop: &AtomicBool) {
        let Some(writer) = &self.writer else { return };
        let returned = counted.and_then(|counts| {
            let referenced = |cluster| counts.get(HostCluster(cluster)) > 0;
            let take = |cluster| writer.recycler.take_leaked(cluster);
            let mut returned = 0;
            for block in 0..writer.refcounts.blocks() {
                if stop.load(Ordering::Acquire) {
                    break;
                }
                // Nobody is between dropping a cluster from a table and telling the recycler.
                let _flush = self.hold_flush(writer);
                let _guard = self.locks.exclusive(0..u64::MAX);
                returned += writer.refcounts.leaked(block, referenced, take)?;
            }
            if returned > 0 {
                // Freeing them is a change like any other, and the first one perhaps.
                self.prepare_to_write(writer)?;
            }
            Ok(returned)
        });
        writer.refcounts.remember_counted(false);
        writer.recycler.hold_frees(false);
        match returned {
            Ok(0) => {}
            Ok(count) => log::info!("{count} clusters that had leaked are being freed"),
            Err(_) if stop.load(Ordering::Acquire) => {}
            Err(e) => log::warn!("clusters that may have leaked are not looked for: {e}"),
        }
    }
}

/// The image file as the search reads it: it fails as soon as the search is stopped.
struct Stoppable {
    storage: Arc<dyn Storage>,
    stop: Arc<AtomicBool>,
}

impl Stoppable {
    fn going_on(&self) -> io::Result<&dyn Storage> {
        match self.stop.load(Ordering::Acquire) {
            true => Err(io::Error::from_raw_os_error(libc::ECANCELED)),
            false => Ok(&*self.storage),
        }
    }
}

/// Only what reads is ever called.
impl Storage for Stoppable {
    /// More than there is: the file grows while it is searched, and a table that leads to what is
    /// new must not look damaged.
    fn len(&self) -> io::Result<u64> {
        const ROOM: u64 = 1 << 40;
        Ok(self.going_on()?.len()?.saturating_add(ROOM))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.going_on()?.read_at(buf, offset)
    }

    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.going_on()?.seek_data(offset)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.going_on()?.allocated()
    }

    fn write_at(&self, _data: &[u8], _offset: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn sync(&self) -> io::Result<()> {
        Err(read_only())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn punch_hole(&self, _range: Range<u64>) -> io::Result<()> {
        Err(read_only())
    }

    fn zero_range(&self, _range: Range<u64>) -> io::Result<()> {
        Err(read_only())
    }

    fn allocate(&self, _range: Range<u64>) -> io::Result<()> {
        Err(read_only())
    }
}

fn read_only() -> io::Error {
    io::Error::from_raw_os_error(libc::EROFS)
}
