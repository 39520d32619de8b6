//! One open image: read, write, discard, zero, flush, resize, close.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::error::Result;
use crate::storage::Storage;

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether writes are allowed. Without it nothing is ever written to the file.
    pub writable: bool,
    /// Bytes of erased clusters kept ready so that allocation waits for nothing.
    pub keep_erased: u64,
    /// How long changes wait for a flush by a client before the recycler flushes by itself.
    pub flush_after: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options { writable: false, keep_erased: 16 << 20, flush_after: Duration::from_secs(5) }
    }
}

/// What can be told of an image from its header alone.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// Why the image cannot be opened, in one line; `None` when it can.
    pub refusal: Option<String>,
}

/// The state of an open image, for `status`.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// Bytes of the image file.
    pub file_length: u64,
    /// Bytes of host blocks that the image file occupies.
    pub allocated: u64,
    /// `ok`, or why the image is read-only.
    pub health: String,
    // cluster states follow
}

/// An open image. All methods may be called from several threads at once; each is atomic towards
/// the others on the clusters that it touches.
pub struct Image {}

impl Image {
    /// Reads the header only.
    ///
    /// # Errors
    /// A file that is not qcow2, or a header that makes no sense.
    pub fn summarize(_storage: &dyn Storage) -> Result<Summary> {
        todo!()
    }

    /// Opens an image. A writable image gets its recycler thread.
    ///
    /// # Errors
    /// As [`Image::summarize`], `Unsupported` with a feature that is not served (the line names
    /// it), `Corrupt` with tables that make no sense.
    pub fn open(_storage: Arc<dyn Storage>, _options: &Options) -> Result<Arc<Image>> {
        todo!()
    }

    /// Bytes of the virtual disk.
    pub fn virtual_size(&self) -> u64 {
        todo!()
    }

    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        todo!()
    }

    /// Fills `buf` from guest offset `offset`. What lies past the end reads as zeros.
    pub fn read(&self, _offset: u64, _buf: &mut [u8]) -> Result<()> {
        todo!()
    }

    /// Writes all of `data` at guest offset `offset`. Errors: `Invalid` past the end, `ReadOnly`,
    /// host errors.
    pub fn write(&self, _offset: u64, _data: &[u8]) -> Result<()> {
        todo!()
    }

    /// Gives the range back: it reads zeros from now on. Any alignment; what lies past the end is
    /// ignored.
    pub fn discard(&self, _range: Range<u64>) -> Result<()> {
        todo!()
    }

    /// Makes the range read zeros. Any alignment; what lies past the end is ignored.
    pub fn write_zeroes(&self, _range: Range<u64>) -> Result<()> {
        todo!()
    }

    /// Reserves clusters and host blocks for the range, so that writing there cannot run out of
    /// space. Contents stay.
    pub fn preallocate(&self, _range: Range<u64>) -> Result<()> {
        todo!()
    }

    /// Returns when everything written before the call is on stable storage.
    pub fn flush(&self) -> Result<()> {
        todo!()
    }

    /// Changes the virtual size; growing adds zeros, shrinking cuts.
    pub fn resize(&self, _size: u64) -> Result<()> {
        todo!()
    }

    /// The first offset at or after `offset` that is allocated data, `None` past the last.
    pub fn next_data(&self, _offset: u64) -> Result<Option<u64>> {
        todo!()
    }

    /// The first offset at or after `offset` that reads as zeros by the tables alone; the virtual
    /// size where data goes on to the end.
    pub fn next_hole(&self, _offset: u64) -> Result<u64> {
        todo!()
    }

    /// What `status` shows.
    pub fn status(&self) -> io::Result<Status> {
        todo!()
    }

    /// Recycles what is due, flushes, gives the pool back, cuts the file's end, and stops the
    /// recycler. After it every call but `close` fails.
    pub fn close(&self) -> Result<()> {
        todo!()
    }
}
