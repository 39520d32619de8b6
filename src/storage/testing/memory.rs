//! A file in memory, in copy-on-write pages.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::storage::Storage;

const BLOCK: usize = MemoryStorage::BLOCK as usize;

type Page = [u8; BLOCK];

/// A file in memory that does what a host file does. Nothing in it is a hole unless it was
/// punched or never written, in pieces of [`MemoryStorage::BLOCK`] bytes.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    content: RwLock<Content>,
}

/// Bytes past `len` in the last page are zeros, so that growing needs to touch nothing.
#[derive(Debug, Default, Clone)]
struct Content {
    /// The host blocks; a hole is none.
    pages: Vec<Option<Arc<Page>>>,
    len: u64,
}

impl MemoryStorage {
    /// The size of what a hole is made of, in bytes.
    pub const BLOCK: u64 = 4096;

    /// The longest file, in bytes: past it writes fail with `EFBIG`, as they do on a host.
    pub const MAX_LEN: u64 = 1 << 36;

    /// A file that holds `bytes`, all of them allocated.
    pub fn new(bytes: Vec<u8>) -> Self {
        let storage = MemoryStorage::default();
        storage.content.write().write(&bytes, 0);
        storage
    }

    /// A copy of everything in the file.
    pub fn contents(&self) -> Vec<u8> {
        let content = self.content.read();
        let mut bytes = vec![0; content.len as usize];
        content.read(&mut bytes, 0);
        bytes
    }

    /// Another file with the same contents and holes. Costs a pointer a block; blocks are copied
    /// when either file changes them.
    #[must_use]
    pub fn fork(&self) -> Self {
        MemoryStorage { content: RwLock::new(self.content.read().clone()) }
    }
}

impl Content {
    fn resize(&mut self, len: u64) {
        if len < self.len {
            self.zero(len..self.len);
        }
        self.pages.resize(len.div_ceil(BLOCK as u64) as usize, None);
        self.len = len;
    }

    fn read(&self, buf: &mut [u8], offset: u64) {
        for (page, within, part) in pieces(offset..offset.saturating_add(buf.len() as u64)) {
            match self.pages.get(page).and_then(Option::as_ref) {
                Some(bytes) => buf[part].copy_from_slice(&bytes[within]),
                None => buf[part].fill(0),
            }
        }
    }

    fn write(&mut self, data: &[u8], offset: u64) {
        let end = offset + data.len() as u64;
        if end > self.len {
            self.resize(end);
        }
        for (page, within, part) in pieces(offset..end) {
            Arc::make_mut(present(&mut self.pages[page]))[within].copy_from_slice(&data[part]);
        }
    }

    /// Zeroes the part of `range` within the file; holes stay holes.
    fn zero(&mut self, range: Range<u64>) {
        for (page, within, _) in pieces(range.start..range.end.min(self.len)) {
            if let Some(bytes) = &mut self.pages[page] {
                Arc::make_mut(bytes)[within].fill(0);
            }
        }
    }

    fn punch(&mut self, range: Range<u64>) {
        let len = self.len;
        for (page, within, _) in pieces(range.start..range.end.min(len)) {
            let at_end = (page * BLOCK + within.end) as u64 == len;
            if within.start == 0 && (within.end == BLOCK || at_end) {
                self.pages[page] = None;
            } else if let Some(bytes) = &mut self.pages[page] {
                Arc::make_mut(bytes)[within].fill(0);
            }
        }
    }
}

/// The page, allocated if it was a hole.
fn present(page: &mut Option<Arc<Page>>) -> &mut Arc<Page> {
    page.get_or_insert_with(|| Arc::new([0; BLOCK]))
}

/// The pages that a byte range touches: the page's number, the bytes within it, and where they lie
/// in a buffer for the whole range.
fn pieces(range: Range<u64>) -> impl Iterator<Item = (usize, Range<usize>, Range<usize>)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let within = (at % BLOCK as u64) as usize;
        let n = (BLOCK - within).min((range.end - at).try_into().unwrap_or(BLOCK));
        let part = (at - range.start) as usize;
        let page = (at / BLOCK as u64) as usize;
        at += n as u64;
        Some((page, within..within + n, part..part + n))
    })
}

/// Fails with what a host says of a file that long.
fn check_len(end: Option<u64>) -> io::Result<u64> {
    end.filter(|&end| end <= MemoryStorage::MAX_LEN)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))
}

impl Storage for MemoryStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.content.read().len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.content.read().read(buf, offset);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        check_len(offset.checked_add(data.len() as u64))?;
        if !data.is_empty() {
            self.content.write().write(data, offset);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.content.write().resize(check_len(Some(len))?);
        Ok(())
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.content.write().punch(range);
        Ok(())
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.content.write().zero(range);
        Ok(())
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        check_len(Some(range.end))?;
        let mut content = self.content.write();
        if range.end > content.len {
            content.resize(range.end);
        }
        for (page, _, _) in pieces(range) {
            present(&mut content.pages[page]);
        }
        Ok(())
    }

    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let content = self.content.read();
        let first = (offset / Self::BLOCK) as usize;
        let found = (first..content.pages.len()).find(|&page| content.pages[page].is_some());
        Ok(found.map(|page| offset.max(page as u64 * Self::BLOCK)).filter(|&at| at < content.len))
    }

    fn allocated(&self) -> io::Result<u64> {
        let present = self.content.read().pages.iter().flatten().count();
        Ok(present as u64 * Self::BLOCK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_file_grows_with_zeros() {
        let storage = MemoryStorage::new(vec![7; 10_000]);
        storage.set_len(5000).unwrap();
        storage.set_len(10_000).unwrap();
        let bytes = storage.contents();
        assert!(bytes[..5000].iter().all(|&b| b == 7));
        assert!(bytes[5000..].iter().all(|&b| b == 0));
    }

    #[test]
    fn a_fork_and_its_origin_change_apart() {
        let origin = MemoryStorage::new(vec![1; 8192]);
        let fork = origin.fork();
        fork.write_at(&[2; 100], 4000).unwrap();
        origin.punch_hole(0..4096).unwrap();
        assert!(origin.contents()[4096..].iter().all(|&b| b == 1));
        assert_eq!(fork.contents()[3999..4001], [1, 2]);
        assert_eq!((origin.allocated().unwrap(), fork.allocated().unwrap()), (4096, 8192));
    }

    #[test]
    fn only_whole_blocks_and_the_file_s_end_become_holes() {
        let storage = MemoryStorage::new(vec![1; 10_000]);
        storage.punch_hole(100..9000).unwrap();
        assert_eq!(storage.allocated().unwrap(), 8192);
        assert_eq!(storage.seek_data(4096).unwrap(), Some(8192));
        storage.punch_hole(8192..20_000).unwrap();
        assert_eq!((storage.len().unwrap(), storage.seek_data(4096).unwrap()), (10_000, None));
        assert_eq!(storage.contents()[..100], [1; 100]);
        assert!(storage.contents()[100..].iter().all(|&b| b == 0));
    }
}
