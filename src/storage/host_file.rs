//! A regular file of the host: the one place that talks to the kernel about an image file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use super::Storage;

/// Zeros written where the host can neither punch nor zero.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A regular file of the host, opened by the caller.
#[derive(Debug)]
pub struct HostFile {
    file: File,
}

impl HostFile {
    /// The storage that `file` is. Writes need a file opened for writing.
    pub fn new(file: File) -> Self {
        HostFile { file }
    }

    /// The file itself, for locks and identity.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether anybody has it open by another opening, a mapping in memory included. Where the file
    /// system or the kernel does not say (this needs the owner or `CAP_LEASE`), nobody has. Who opens
    /// it meanwhile has the kernel send this process `SIGIO`.
    pub fn is_open_elsewhere(&self) -> bool {
        // SAFETY: F_SETLEASE takes no pointer; the descriptor is open as long as `self` lives.
        let lease = |kind: i32| unsafe { libc::fcntl(self.fd(), libc::F_SETLEASE, kind) };
        let granted = lease(libc::F_WRLCK);
        let refused = io::Error::last_os_error().raw_os_error();
        if granted == 0 {
            lease(libc::F_UNLCK);
        }
        granted != 0 && refused == Some(libc::EAGAIN)
    }

    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn fallocate(&self, mode: i32, range: &Range<u64>) -> io::Result<()> {
        let (offset, length) = (as_off(range.start)?, as_off(range.end - range.start)?);
        // SAFETY: fallocate takes no pointers; the descriptor is open as long as `self` lives.
        retry(|| unsafe { libc::fallocate(self.fd(), mode, offset, length) }.into())?;
        Ok(())
    }

    /// `range` without what lies past the end of the file.
    fn within_file(&self, range: Range<u64>) -> io::Result<Range<u64>> {
        let len = self.len()?;
        Ok(range.start.min(len)..range.end.min(len))
    }
}

impl Storage for HostFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.file.read_at(buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    return Ok(());
                }
                Ok(n) => {
                    buf = &mut buf[n..];
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        // Short writes go on where they stopped; a write of nothing is ENOSPC's other face.
        self.file.write_all_at(data, offset).map_err(|e| match e.kind() {
            io::ErrorKind::WriteZero => io::Error::from_raw_os_error(libc::ENOSPC),
            _ => e,
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        let range = self.within_file(range)?;
        if range.is_empty() {
            return Ok(());
        }
        self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, &range)
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        let range = self.within_file(range)?;
        if range.is_empty() {
            return Ok(());
        }
        let zeroed = self.fallocate(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, &range);
        match zeroed {
            Err(e) if is_unsupported(&e) => write_zeros(self, range),
            other => other,
        }
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() { Ok(()) } else { self.fallocate(0, &range) }
    }

    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        // SAFETY: lseek takes no pointers. It moves the file position, which nothing here uses.
        match retry(|| unsafe {
            libc::lseek(self.fd(), as_off_saturating(offset), libc::SEEK_DATA)
        }) {
            Ok(found) => Ok(Some(found as u64)),
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(e) if is_unsupported(&e) || e.raw_os_error() == Some(libc::EINVAL) => {
                Ok(Some(offset))
            }
            Err(e) => Err(e),
        }
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }
}

/// Whether the host says that it cannot do such a thing at all.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

fn write_zeros(storage: &HostFile, range: Range<u64>) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let n = (range.end - at).min(ZEROS.len() as u64);
        storage.write_at(&ZEROS[..n as usize], at)?;
        at += n;
    }
    Ok(())
}

fn as_off(value: u64) -> io::Result<libc::off_t> {
    value.try_into().map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

fn as_off_saturating(value: u64) -> libc::off_t {
    value.try_into().unwrap_or(libc::off_t::MAX)
}

/// The result of a system call, made again while a signal interrupts it.
fn retry(mut call: impl FnMut() -> i64) -> io::Result<i64> {
    loop {
        let result = call();
        if result >= 0 {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
