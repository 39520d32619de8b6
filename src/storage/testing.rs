//! Test doubles of [`Storage`]. They are part of the library so that integration tests and other
//! programs of this project can drive the engine without a host file.

use std::io;
use std::ops::Range;

use parking_lot::RwLock;

use super::Storage;

/// A file in memory that does what a host file does. Nothing in it is a hole unless it was
/// punched or never written, in pieces of [`MemoryStorage::BLOCK`] bytes.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    content: RwLock<Content>,
}

#[derive(Debug, Default, Clone)]
struct Content {
    bytes: Vec<u8>,
    /// One flag a block: host blocks are allocated.
    present: Vec<bool>,
}

impl MemoryStorage {
    /// The size of what a hole is made of, in bytes.
    pub const BLOCK: u64 = 4096;

    /// A file that holds `bytes`, all of them allocated.
    pub fn new(bytes: Vec<u8>) -> Self {
        let present = vec![true; blocks(bytes.len() as u64)];
        MemoryStorage { content: RwLock::new(Content { bytes, present }) }
    }

    /// A copy of everything in the file.
    pub fn contents(&self) -> Vec<u8> {
        self.content.read().bytes.clone()
    }
}

fn blocks(bytes: u64) -> usize {
    bytes.div_ceil(MemoryStorage::BLOCK) as usize
}

impl Content {
    fn resize(&mut self, len: u64) {
        if (len as usize) < self.bytes.len() {
            self.bytes.truncate(len as usize);
        } else {
            self.bytes.resize(len as usize, 0);
        }
        self.present.resize(blocks(len), false);
    }

    fn zero(&mut self, range: &Range<u64>) -> Range<usize> {
        let len = self.bytes.len() as u64;
        let range = range.start.min(len) as usize..range.end.min(len) as usize;
        self.bytes[range.clone()].fill(0);
        range
    }
}

impl Storage for MemoryStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.content.read().bytes.len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let content = self.content.read();
        let start = content.bytes.len().min(offset as usize);
        let n = buf.len().min(content.bytes.len() - start);
        buf[..n].copy_from_slice(&content.bytes[start..start + n]);
        buf[n..].fill(0);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let mut content = self.content.write();
        let end = offset + data.len() as u64;
        if end > content.bytes.len() as u64 {
            content.resize(end);
        }
        content.bytes[offset as usize..end as usize].copy_from_slice(data);
        let touched = (offset / Self::BLOCK) as usize..blocks(end);
        content.present[touched].fill(true);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.content.write().resize(len);
        Ok(())
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        let mut content = self.content.write();
        let zeroed = content.zero(&range);
        if zeroed.is_empty() {
            return Ok(());
        }
        let at_end = zeroed.end == content.bytes.len();
        let first = zeroed.start.div_ceil(Self::BLOCK as usize);
        let last = if at_end { content.present.len() } else { zeroed.end / Self::BLOCK as usize };
        if first < last {
            content.present[first..last].fill(false);
        }
        Ok(())
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.content.write().zero(&range);
        Ok(())
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        let mut content = self.content.write();
        if range.end > content.bytes.len() as u64 {
            content.resize(range.end);
        }
        content.present[(range.start / Self::BLOCK) as usize..blocks(range.end)].fill(true);
        Ok(())
    }

    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let content = self.content.read();
        let first = (offset / Self::BLOCK) as usize;
        let found = (first..content.present.len()).find(|&block| content.present[block]);
        Ok(found
            .map(|block| offset.max(block as u64 * Self::BLOCK))
            .filter(|&at| at < content.bytes.len() as u64))
    }

    fn allocated(&self) -> io::Result<u64> {
        let present = self.content.read().present.iter().filter(|&&p| p).count();
        Ok(present as u64 * Self::BLOCK)
    }
}
