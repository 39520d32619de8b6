//! What shows through where an image has nothing of its own.
//!
//! An overlay's clusters that are not allocated read its backing file, and zeros past the end of
//! that. The backing file is only ever read. Which file it is and whether it may be opened is
//! decided by the caller of [`Image::open`]; nothing here follows a name.

use std::sync::Arc;

use super::Image;
use crate::error::{Error, Result};
use crate::format::GuestOffset;
use crate::storage::Storage;

/// A disk that an overlay was made on. It does not change while an overlay uses it.
pub trait Backing: Send + Sync {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`; what lies past the end reads as zeros.
    ///
    /// # Errors
    /// Host errors; `Corrupt` where the tables of a qcow2 file make no sense.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// The first offset at or after `offset` that may hold something other than zeros.
    ///
    /// # Errors
    /// As [`Backing::read`].
    fn next_data(&self, offset: u64) -> Result<Option<u64>>;

    /// The first offset at or after `offset` that is known to read as zeros; the size where there
    /// is none.
    ///
    /// # Errors
    /// As [`Backing::read`].
    fn next_hole(&self, offset: u64) -> Result<u64>;
}

/// A qcow2 file, with its own backing file behind it. It must be open read-only.
impl Backing for Image {
    fn size(&self) -> u64 {
        self.virtual_size()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        Image::read(self, offset, buf)
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        Image::next_data(self, offset)
    }

    fn next_hole(&self, offset: u64) -> Result<u64> {
        Image::next_hole(self, offset)
    }
}

/// A raw file.
pub struct RawBacking {
    storage: Arc<dyn Storage>,
    size: u64,
}

impl RawBacking {
    /// The disk that `storage` is, as long as it is now.
    ///
    /// # Errors
    /// Host errors.
    pub fn new(storage: Arc<dyn Storage>) -> Result<Self> {
        let size = storage.len().map_err(|e| Error::io("reading the backing file's length", e))?;
        Ok(RawBacking { storage, size })
    }
}

impl Backing for RawBacking {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.storage
            .read_at(buf, offset)
            .map_err(|e| Error::io(format!("reading the raw backing file at {offset:#x}"), e))
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        let found = self.storage.seek_data(offset);
        // Not what the file has become longer by since: `next_hole` knows nothing of that.
        found
            .map(|found| found.filter(|at| *at < self.size))
            .map_err(|e| Error::io("looking for data in the raw backing file", e))
    }

    fn next_hole(&self, _offset: u64) -> Result<u64> {
        // Callers look for the next data first; what follows it counts as data to the end.
        Ok(self.size)
    }
}

impl Image {
    /// Guest clusters before this one show the backing file where they are not allocated.
    pub(super) fn backed_clusters(&self) -> u64 {
        let size = self.backing.as_ref().map_or(0, |backing| backing.size());
        self.geometry.clusters_for(size).0
    }

    /// Whether the cluster of guest offset `at` shows the backing file where it is not allocated.
    pub(super) fn is_backed(&self, at: u64) -> bool {
        self.backing.is_some()
            && self.geometry.guest_cluster(GuestOffset(at)).0 < self.backed_clusters()
    }

    /// Fills `buf` from the backing file.
    pub(super) fn read_backing(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        match &self.backing {
            Some(backing) => backing.read(at, buf).map_err(|e| e.context("in the backing file")),
            None => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    /// Whether the backing file may have data in part of `at..end`: the first such offset, and
    /// where it ends.
    pub(super) fn backing_data(&self, at: u64, end: u64) -> Result<Option<(u64, u64)>> {
        let Some(backing) = &self.backing else { return Ok(None) };
        match backing.next_data(at)?.filter(|found| *found < end) {
            Some(found) => Ok(Some((found, backing.next_hole(found)?.min(end)))),
            None => Ok(None),
        }
    }
}
