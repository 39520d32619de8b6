//! What requests mean, without FUSE: handles, and verbs on the images behind them.
//!
//! A size is a multiple of 512 bytes: what is asked for is rounded up, as `qemu-img` does.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::catalog::{AttributeChange, Catalog, Entry, HandleMode, Node, Opening};
use crate::error::{Error, Result};
use crate::image::Image;

/// Bytes in a sector, of which a virtual disk has a whole number.
const SECTOR: u64 = 512;

/// The most bytes that one read may ask for; the kernel asks for 1 MiB.
const MAX_READ: u32 = 16 << 20;

thread_local! {
    /// Each worker's own; it grows to the largest read and stays.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What an open file handle stands for.
pub(super) enum Handle {
    /// An image.
    Image {
        /// Which.
        node: Arc<Node>,
        /// The handle may write.
        write: bool,
    },
    /// A text that was made when it was opened.
    Text(Vec<u8>),
    /// A directory, as it was when reading it began.
    Directory {
        /// Which.
        node: Arc<Node>,
        /// What it lists; renewed when reading begins anew.
        entries: Mutex<Arc<Vec<Entry>>>,
    },
}

/// All that the handlers share.
pub(super) struct Verbs {
    pub(super) catalog: Arc<Catalog>,
    mountpoint: PathBuf,
    handles: RwLock<HashMap<u64, Arc<Handle>>>,
    next_handle: AtomicU64,
}

impl Verbs {
    pub(super) fn new(catalog: Arc<Catalog>, mountpoint: PathBuf) -> Self {
        let handles = RwLock::default();
        Verbs { catalog, mountpoint, handles, next_handle: AtomicU64::new(1) }
    }

    /// The handle of that number.
    ///
    /// # Errors
    /// `EBADF`.
    pub(super) fn handle(&self, number: u64) -> Result<Arc<Handle>> {
        let handle = self.handles.read().get(&number).cloned();
        handle.ok_or_else(|| errno("using a file that is not open", libc::EBADF))
    }

    pub(super) fn add_handle(&self, handle: Handle) -> u64 {
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.handles.write().insert(number, Arc::new(handle));
        number
    }

    /// Opens a node's image; [`Verbs::release`] ends it.
    pub(super) fn open(&self, ino: u64, how: Opening) -> Result<(u64, HandleMode)> {
        let node = self.catalog.node(ino)?;
        let mode = self.catalog.open(&node, how)?;
        Ok((self.add_handle(Handle::Image { node, write: how.write }), mode))
    }

    /// Opens the text that tells the state of the mount.
    pub(super) fn open_status(&self) -> Result<u64> {
        let status = self.catalog.status(&self.mountpoint);
        let mut text = serde_json::to_vec_pretty(&status)
            .map_err(|e| Error::io("writing the status", io::Error::other(e)))?;
        text.push(b'\n');
        Ok(self.add_handle(Handle::Text(text)))
    }

    /// Ends a handle.
    pub(super) fn release(&self, number: u64) {
        let handle = self.handles.write().remove(&number);
        if let Some(Handle::Image { node, .. }) = handle.as_deref() {
            self.catalog.release(node);
        }
    }

    /// Reads up to the end of the disk and passes the bytes on.
    pub(super) fn read(
        &self,
        node: &Node,
        offset: u64,
        size: u32,
        deliver: impl FnOnce(Result<&[u8]>),
    ) {
        READ_BUFFER.with_borrow_mut(|buffer| {
            let read = node.with_image(|image| {
                let left = image.virtual_size().saturating_sub(offset);
                let count = left.min(size.min(MAX_READ).into()) as usize;
                if buffer.len() < count {
                    buffer.resize(count, 0);
                }
                image.read(offset, &mut buffer[..count])?;
                Ok(count)
            });
            deliver(read.map(|count| &buffer[..count]));
        });
    }

    /// Writes; a write past the end of the disk grows it.
    pub(super) fn write(&self, node: &Node, offset: u64, data: &[u8]) -> Result<()> {
        let end = end_of(offset, data.len() as u64)?;
        node.with_image(|image| {
            grow_to(node, image, end)?;
            image.write(offset, data)
        })
    }

    /// Whether a write makes the disk larger.
    pub(super) fn grows(&self, node: &Node, offset: u64, length: usize) -> bool {
        let end = offset.saturating_add(length as u64);
        node.with_image(|image| Ok(end > image.virtual_size())).unwrap_or(false)
    }

    /// fallocate(2): reserves, discards, or zeroes.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for other modes; never for a range.
    pub(super) fn allocate(&self, node: &Node, offset: u64, length: u64, mode: i32) -> Result<()> {
        const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
        const PUNCH_KEEP: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
        const ZERO_KEEP: i32 = ZERO | KEEP;
        let end = end_of(offset, length)?;
        let range = offset..end;
        node.with_image(|image| {
            if matches!(mode, 0 | ZERO) {
                grow_to(node, image, end)?;
            }
            match mode {
                0 | KEEP => image.preallocate(range),
                PUNCH_KEEP => image.discard(range),
                ZERO | ZERO_KEEP => image.write_zeroes(range),
                _ => Err(errno("a way to allocate that is not known", libc::EOPNOTSUPP)),
            }
        })
    }

    /// lseek(2) with `SEEK_DATA` or `SEEK_HOLE`.
    ///
    /// # Errors
    /// `ENXIO` past the end and where no data follows.
    pub(super) fn seek(&self, node: &Node, offset: i64, whence: i32) -> Result<u64> {
        let nothing = || errno("seeking past the end", libc::ENXIO);
        let offset = u64::try_from(offset).map_err(|_| nothing())?;
        node.with_image(|image| {
            let size = image.virtual_size();
            if offset >= size {
                return Err(nothing());
            }
            match whence {
                libc::SEEK_DATA => {
                    image.next_data(offset)?.filter(|at| *at < size).ok_or_else(nothing)
                }
                libc::SEEK_HOLE => Ok(image.next_hole(offset)?.min(size)),
                _ => Err(errno("a way to seek that is not known", libc::EINVAL)),
            }
        })
    }

    /// Sets the size and other attributes.
    pub(super) fn set_attributes(
        &self,
        node: &Node,
        size: Option<u64>,
        change: AttributeChange,
    ) -> Result<()> {
        if let Some(size) = size {
            let size = whole_sectors(size)?;
            let _change = node.size_change.lock();
            self.catalog.with_opened(node, true, |image| match size == image.virtual_size() {
                true => Ok(()),
                false => image.resize(size),
            })?;
        }
        self.catalog.change_attributes(node, change)
    }

    /// What close(2) should hear of: an image that stopped taking writes while it was written.
    pub(super) fn closing(&self, handle: &Handle) -> Result<()> {
        let Handle::Image { node, write: true } = handle else { return Ok(()) };
        node.with_image(|image| match image.is_writable() {
            true => Ok(()),
            false => Err(errno("closing a file whose image takes no more writes", libc::EIO)),
        })
    }

    /// What a directory lists from the entry `from` on; reading from the start looks again.
    pub(super) fn entries(&self, handle: &Handle, from: u64) -> Result<Arc<Vec<Entry>>> {
        let Handle::Directory { node, entries } = handle else {
            return Err(errno("reading a file as a directory", libc::ENOTDIR));
        };
        let mut entries = entries.lock();
        if from == 0 {
            *entries = Arc::new(self.catalog.list(node)?);
        }
        Ok(Arc::clone(&entries))
    }
}

/// Makes the disk at least `end` bytes long.
fn grow_to(node: &Node, image: &Image, end: u64) -> Result<()> {
    if end <= image.virtual_size() {
        return Ok(());
    }
    let _change = node.size_change.lock();
    if end <= image.virtual_size() { Ok(()) } else { image.resize(whole_sectors(end)?) }
}

fn whole_sectors(size: u64) -> Result<u64> {
    let too_big = || errno("a size past all limits", libc::EFBIG);
    size.checked_next_multiple_of(SECTOR).ok_or_else(too_big)
}

fn end_of(offset: u64, length: u64) -> Result<u64> {
    offset.checked_add(length).ok_or_else(|| errno("a range past all limits", libc::EFBIG))
}

pub(super) fn errno(what: &str, code: i32) -> Error {
    Error::io(what, io::Error::from_raw_os_error(code))
}
