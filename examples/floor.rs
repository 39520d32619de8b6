//! The floor: the least that a FUSE server in user space can do. One raw file is shown as
//! `disk.raw`; a read is a `pread` into a buffer that is used again, a write is a `pwrite`. No
//! tables, no locks, no bookkeeping.
//!
//! `scripts/bench` runs it beside qcow2fs: what is slower than this is ours to make faster, what is
//! as fast as this is the kernel's.
//!
//! ```console
//! floor FILE MOUNTPOINT [THREADS]
//! ```
//! It serves until it is unmounted. The disk is as long as `FILE` is.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr,
    ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

const ROOT: INodeNo = INodeNo(1);
const DISK: INodeNo = INodeNo(2);
/// How long the kernel may trust what it was told: nothing here changes.
const TTL: Duration = Duration::from_secs(3600);

thread_local!(static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });

struct Floor {
    file: File,
    length: u64,
}

impl Floor {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let disk = ino == DISK;
        let time = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino,
            size: if disk { self.length } else { 0 },
            blocks: if disk { self.length / 512 } else { 0 },
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: if disk { FileType::RegularFile } else { FileType::Directory },
            perm: if disk { 0o600 } else { 0o700 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 65536,
            flags: 0,
        }
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
}

impl Filesystem for Floor {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.set_max_write(1 << 20);
        let _ = config.set_max_background(64);
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let _ = config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS);
        Ok(())
    }

    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == "disk.raw" {
            true => reply.entry(&TTL, &self.attributes(DISK), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        reply.attr(&TTL, &self.attributes(if ino == ROOT { ROOT } else { DISK }));
    }

    fn setattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.attr(&TTL, &self.attributes(ino));
    }

    fn open(&self, _request: &Request, _ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        // What is best for each: O_DIRECT past the page cache and in parallel, all else through it.
        let flags = match flags.0 & libc::O_DIRECT {
            0 => FopenFlags::FOPEN_KEEP_CACHE,
            _ => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        };
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < size as usize {
                buffer.resize(size as usize, 0);
            }
            match self.file.read_at(&mut buffer[..size as usize], offset) {
                Ok(count) => reply.data(&buffer[..count]),
                Err(e) => reply.error(errno(&e)),
            }
        });
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.file.write_at(data, offset) {
            Ok(count) => reply.written(count as u32),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn fsync(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        match self.file.sync_data() {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn fallocate(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let (offset, length) = (offset as libc::off_t, length as libc::off_t);
        // SAFETY: fallocate takes no pointers; the descriptor is open as long as `self` lives.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, length) } {
            0 => reply.ok(),
            _ => reply.error(errno(&io::Error::last_os_error())),
        }
    }
}

fn main() -> io::Result<()> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [path, mountpoint, rest @ ..] = &arguments[..] else {
        return Err(io::Error::other("usage: floor FILE MOUNTPOINT [THREADS]"));
    };
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let length = file.metadata()?.len();
    let threads = rest.first().and_then(|count| count.to_str()?.parse().ok());
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get());
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("floor".into())];
    config.n_threads = Some(threads.unwrap_or((processors + 1).min(8)));
    fuser::mount(Floor { file, length }, mountpoint, &config)
}
