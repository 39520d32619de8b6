//! What shows through where an image has nothing of its own.
//!
//! An overlay's clusters that are not allocated read its backing file, and zeros past the end of
//! that. The backing file is only ever read. Which file it is and whether it may be opened is
//! decided by the caller of [`Image::open`]; nothing here follows a name.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use super::Image;
use super::seek::{Looks, Visit};
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

    /// Shows `visit` the parts of `range` that may hold something other than zeros, in ascending
    /// order, until it breaks off; all that follows once `looks` are used up.
    ///
    /// # Errors
    /// As [`Backing::read`].
    fn each_extent(
        &self,
        range: Range<u64>,
        looks: &mut Looks,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>>;
}

/// A qcow2 file, with its own backing file behind it. It must be open read-only.
impl Backing for Image {
    fn size(&self) -> u64 {
        self.virtual_size()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        Image::read(self, offset, buf)
    }

    fn each_extent(
        &self,
        range: Range<u64>,
        looks: &mut Looks,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>> {
        Image::each_extent(self, range, looks, visit)
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

    fn each_extent(
        &self,
        range: Range<u64>,
        looks: &mut Looks,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>> {
        // Not what the file has become longer by since: that is no part of the disk.
        let end = range.end.min(self.size);
        if range.start >= end {
            return Ok(ControlFlow::Continue(()));
        }
        looks.ask_host();
        let found = self.storage.seek_data(range.start);
        let found = found.map_err(|e| Error::io("looking for data in the raw backing file", e))?;
        // What follows counts as data to the end.
        let found = found.filter(|at| *at < end);
        Ok(found.map_or(ControlFlow::Continue(()), |at| visit(at..end)))
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

    /// Shows the parts of `range` in which the backing file may have data.
    pub(super) fn backing_extents(
        &self,
        range: Range<u64>,
        looks: &mut Looks,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>> {
        match &self.backing {
            Some(backing) => backing.each_extent(range, looks, visit),
            None => Ok(ControlFlow::Continue(())),
        }
    }
}
