//! A part of a file in memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Pages of a file, shared with whoever else has them.
pub struct Mapping {
    start: *mut libc::c_void,
    length: usize,
}

impl Mapping {
    /// Maps `range`, whole pages within the file.
    pub fn new(file: &File, range: Range<u64>) -> io::Result<Mapping> {
        let length = (range.end - range.start) as usize;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (fd, offset) = (file.as_raw_fd(), range.start as libc::off_t);
        // SAFETY: the kernel chooses where; nothing else is there.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, fd, offset)
        };
        match start {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            start => Ok(Mapping { start, length }),
        }
    }

    /// Its bytes from `at` on.
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= self.length);
        // SAFETY: the range lies within the mapping, and `bytes` is memory of our own.
        unsafe {
            let from = self.start.cast::<u8>().add(at);
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len());
        }
    }

    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.length);
        // SAFETY: as above; no reference to the mapping's bytes is ever made.
        unsafe {
            let to = self.start.cast::<u8>().add(at);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    /// Writes it back and waits until that is durable.
    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: the range is the mapping.
        match unsafe { libc::msync(self.start, self.length, libc::MS_SYNC) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the mapping, and nothing refers to it any more.
        unsafe { libc::munmap(self.start, self.length) };
    }
}
