//! Where an image's bytes are: the [`Storage`] trait, the host file behind it in production and how
//! a new one comes to be, and the doubles behind it in tests.
//!
//! All host I/O of the engine goes through this trait. It knows offsets and bytes, nothing of
//! qcow2. Callers coordinate: two writes to overlapping ranges at the same time have no order.

use std::io;
use std::ops::Range;

mod host_file;
pub mod image_lock;
mod new_file;
pub(crate) mod processes;
pub mod regular;
pub mod testing;

pub use host_file::HostFile;
pub use new_file::{IfTaken, NewFile, is_temporary, remove_abandoned};

/// A file that can be read, written, synced, cut and punched, from several threads at once.
///
/// Errors are the host's own, with its errno.
#[allow(clippy::len_without_is_empty)] // an image is never empty
pub trait Storage: Send + Sync {
    /// The length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset`; what lies past the end reads as zeros.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `data` at `offset`, growing the file where it ends before. Not durable until
    /// [`Storage::sync`].
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Returns when every write, punch and cut that finished before the call is on stable storage.
    /// After an error nothing is known about any of them.
    fn sync(&self) -> io::Result<()>;

    /// Cuts the file, or grows it with zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes `range` read as zeros and gives its blocks back, the length unchanged. The part of
    /// the range past the end of the file is ignored.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the host cannot; then [`Storage::zero_range`] still zeroes.
    fn punch_hole(&self, range: Range<u64>) -> io::Result<()>;

    /// Makes `range` read as zeros without giving blocks back, the length unchanged. The part of
    /// the range past the end of the file is ignored.
    fn zero_range(&self, range: Range<u64>) -> io::Result<()>;

    /// Reserves host blocks for `range`, growing the file where it ends before; contents stay.
    fn allocate(&self, range: Range<u64>) -> io::Result<()>;

    /// The first offset at or after `offset` that may hold something other than zeros, `None` when
    /// only holes follow. A host that cannot tell calls everything data.
    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>>;

    /// Bytes of host blocks that the file occupies.
    fn allocated(&self) -> io::Result<u64>;
}

/// Makes `range` read as zeros, giving its blocks back where the host can.
pub fn erase(storage: &dyn Storage, range: Range<u64>) -> io::Result<()> {
    match storage.punch_hole(range.clone()) {
        Err(e) if host_file::is_unsupported(&e) => storage.zero_range(range),
        other => other,
    }
}

/// Takes host blocks for metadata, so that writing it at a flush cannot run out of space. A host
/// that cannot do so is no error.
pub fn reserve_metadata(storage: &dyn Storage, range: Range<u64>) -> io::Result<()> {
    match storage.allocate(range) {
        Err(e) if host_file::is_unsupported(&e) => Ok(()),
        other => other,
    }
}
