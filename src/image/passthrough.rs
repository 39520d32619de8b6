//! A disk that somebody else reads and writes for us: the kernel, in the raw data file (FUSE
//! passthrough).
//!
//! A raw data file is the disk, byte for byte, and once every cluster is mapped no request changes
//! the tables any more: what is discarded or zeroed is erased in the file and stays mapped. Only its
//! size may change, by [`Image::grow_passed_through`]; the caller sees to that, and that nothing but
//! the kernel and this image writes to the file.

use super::Image;
use crate::error::{Error, Result};
use crate::tables::Run;

impl Image {
    /// Whether the external data file is the disk, for good: of its length, raw, not encrypted, every
    /// cluster mapped, and with no bitmap that is to hear of writes. Reads all L2 tables.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn is_its_data_file(&self) -> Result<bool> {
        let size = self.virtual_size();
        if !self.data.may_be_passed || size == 0 || self.data_file_length()? != size {
            return Ok(false);
        }
        self.all_runs(0..size, |run| matches!(run, Run::Data { .. }))
    }

    /// The kernel is about to write to the data file.
    ///
    /// # Errors
    /// `ReadOnly`, host errors.
    pub fn begin_passthrough(&self) -> Result<()> {
        let writer = self.begin_change()?;
        // Nobody flushes for what the kernel writes.
        if writer.flush.raw_mappings.are_durable() { Ok(()) } else { self.flush() }
    }

    /// The kernel may have written to the data file: the next flush makes that durable. Whether it has
    /// written past the end of the disk, which is cut off. Nobody changes the size meanwhile.
    ///
    /// # Errors
    /// Host errors.
    pub fn note_passthrough(&self) -> Result<bool> {
        if self.writer.is_none() {
            return Ok(false);
        }
        self.mark_data_unsynced();
        let size = self.virtual_size();
        let is_longer = self.data_file_length()? > size;
        if is_longer {
            self.cut_data_file(size)?;
        }
        Ok(is_longer)
    }

    /// Makes the disk larger while the kernel may write to it, and maps what is added, durably. What
    /// the kernel writes there before this is over may be lost.
    ///
    /// # Errors
    /// Those of [`Image::resize`]. After an error the size is the old one.
    pub fn grow_passed_through(&self, size: u64) -> Result<()> {
        let added = self.virtual_size()..size;
        self.resize(size)?;
        let mapped = self.writer().and_then(|writer| self.map_raw(writer, &added));
        mapped.inspect_err(|_| {
            if let Err(e) = self.resize(added.start) {
                self.health.latch(&format!("a part of it is not mapped that others write: {e}"));
            }
        })
    }

    fn data_file_length(&self) -> Result<u64> {
        self.data.storage.len().map_err(|e| Error::io("reading the data file's length", e))
    }
}
