//! What lies over another storage.

use std::io;
use std::ops::Range;

use crate::storage::Storage;

/// A [`Storage`] over another one: what it does not do itself is done by that one.
pub trait Layer: Send + Sync {
    /// The one below.
    fn below(&self) -> &dyn Storage;

    /// As [`Storage::read_at`].
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.below().read_at(buf, offset)
    }

    /// As [`Storage::write_at`].
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.below().write_at(data, offset)
    }

    /// As [`Storage::sync`].
    fn sync(&self) -> io::Result<()> {
        self.below().sync()
    }

    /// As [`Storage::set_len`].
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.below().set_len(len)
    }

    /// As [`Storage::punch_hole`].
    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.below().punch_hole(range)
    }

    /// As [`Storage::allocate`].
    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.below().allocate(range)
    }
}

impl<L: Layer> Storage for L {
    fn len(&self) -> io::Result<u64> {
        self.below().len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        Layer::read_at(self, buf, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        Layer::write_at(self, data, offset)
    }

    fn sync(&self) -> io::Result<()> {
        Layer::sync(self)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        Layer::set_len(self, len)
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        Layer::punch_hole(self, range)
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.below().zero_range(range)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        Layer::allocate(self, range)
    }

    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.below().seek_data(offset)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.below().allocated()
    }
}
