//! FUSE requests to verbs of the catalog and the images, and the replies.
//!
//! Reads, writes and looks at names are answered by the FUSE workers themselves ([`WORKERS`], of which
//! most rest where requests queue up). What may block (opening, closing, flushing, discarding,
//! resizing) goes to a small pool, in which one user's requests do not keep those of another waiting. To
//! another one go reads and writes that meet an image which is being opened or all of whose disk is being
//! changed, and a write that makes the disk larger, which waits for a flush; one flush at a time is done
//! by the worker that took it. What opens an image that may be
//! encrypted goes to a pool of its own: to find the key out from a passphrase takes a second or two,
//! with a header that was made for it half a minute. Nothing of qcow2 is known here.
//!
//! A write that is to be synchronous (`O_DSYNC`, `RWF_DSYNC` and the like) is answered when it is
//! durable. The kernel asks for an fsync after those that go through its page cache, not after others;
//! where it does, that one finds nothing left to do.
//!
//! How the page cache is used: handles go through it, and what it holds is kept from one open to
//! the next as long as nobody else has touched the image file. The first handle of a file decides
//! for those that come while it is open: if it was opened with `O_DIRECT`, all bypass the cache and
//! may write at the same time; if not, none bypasses it, and `O_DIRECT` is the kernel's own, which
//! keeps the cache right. A mixture would leave stale pages: the kernel drops the pages of a range
//! before it sends a bypassing write, not after, and a reader may bring them back in between.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, PollEvents,
    PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

mod ahead;
mod control;
mod crew;
mod passthrough;
mod pool;
mod reply;
mod snap;
#[cfg(test)]
mod tests;
mod verbs;

use crate::catalog::{AttributeChange, Catalog, HandleMode, Node, Opening, Requester, SetTime};
use crate::error::{Error, Result};
use crate::image::SnapshotView;
use ahead::Ahead;
use crew::Crew;
pub use crew::WORKERS;
use pool::{NOBODY, Pool};
use reply::{ENTRY_TTL, attribute_ttl, fail, file_attr};
use verbs::{Created, Handle, Opened, Verbs};

/// Threads for what may block, for each user.
const SLOW_THREADS: usize = 8;
/// Threads for opening what may be encrypted, for each user: so many such images are opened at once
/// before one of them waits for another.
const UNLOCKING_THREADS: usize = 16;
/// Requests that the kernel may have on the way in the background (readahead, asynchronous I/O).
const MAX_BACKGROUND: u16 = 64;
/// Bytes in the largest write.
const MAX_WRITE: u32 = 1 << 20;
/// What loop devices take for their discard granularity.
const BLOCK: u64 = 4096;
/// Inode numbers are never used again, so there is one generation.
const GENERATION: Generation = Generation(0);
/// What readdir says for an inode number that is not known before the name is looked up.
const UNKNOWN_INO: INodeNo = INodeNo(0xffff_ffff);

/// The file system that the kernel talks to.
pub struct Filesys {
    verbs: Arc<Verbs>,
    ahead: Ahead,
    crew: Crew,
    pool: Pool,
    /// For reads and writes that have to wait: for an image to be opened, for a change of its whole disk,
    /// or for room. Those of one image keep no fsync of another waiting.
    waiting: Pool,
    /// For what opens images that may be encrypted.
    unlocking: Pool,
}

impl Filesys {
    /// Serves `catalog`. Threads start with the first request that needs them: not before the daemon
    /// has forked, and has given its privileges up. With `passthrough` the kernel reads and writes disks
    /// itself where it can.
    pub fn new(catalog: Arc<Catalog>, mountpoint: PathBuf, passthrough: bool) -> Filesys {
        let verbs = Arc::new(Verbs::new(catalog, mountpoint, passthrough));
        let [pool, waiting] = [SLOW_THREADS; 2].map(Pool::new);
        let unlocking = Pool::new(UNLOCKING_THREADS);
        let processors = std::thread::available_parallelism().map_or(1, |count| count.get());
        let (ahead, crew) = (Ahead::new(), Crew::new(processors));
        Filesys { verbs, ahead, crew, pool, waiting, unlocking }
    }

    /// The pool for what opens the image that `ino` stands for.
    fn pool_for_opening(&self, ino: INodeNo) -> &Pool {
        match self.verbs.node_behind(ino) {
            Some(node) if node.may_need_unlocking() => &self.unlocking,
            _ => &self.pool,
        }
    }

    fn node(&self, ino: INodeNo) -> Result<Arc<Node>, Errno> {
        if control::is_ours(ino) || snap::is_ours(ino) {
            // Nothing of ours can be changed.
            return Err(Errno::EPERM);
        }
        self.verbs.catalog.node(ino.0).map_err(|e| fail(None, &e))
    }

    /// The image that an open handle stands for.
    fn image_node(&self, handle: FileHandle) -> Result<Arc<Node>, Errno> {
        self.verbs.with_handle(handle.0, |open| image_of(open).cloned())
    }

    /// The node of a directory in which `name` can be changed.
    fn parent(&self, ino: INodeNo, name: &OsStr) -> Result<Arc<Node>, Errno> {
        let is_control = ino.0 == crate::catalog::ROOT && name == control::NAME;
        if name == snap::NAME || is_control { Err(Errno::EPERM) } else { self.node(ino) }
    }

    /// The node whose extended attributes are meant; what is ours has none.
    fn with_attributes(&self, ino: INodeNo, none: Errno) -> Result<Arc<Node>, Errno> {
        self.node(ino).map_err(|e| if e == Errno::EPERM { none } else { e })
    }

    /// Runs `verb`, which is asked for by `request`, on the pool and answers with nothing.
    fn slowly(
        &self,
        request: &Request,
        node: Result<Arc<Node>, Errno>,
        reply: ReplyEmpty,
        verb: impl FnOnce(&Verbs, &Node) -> Result<()> + Send + 'static,
    ) {
        let node = match node {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        let verbs = Arc::clone(&self.verbs);
        self.pool.run(request.uid(), move || answer(verb(&verbs, &node), Some(&node), reply));
    }
}

fn answer(done: Result<()>, node: Option<&Node>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(fail(node, &e)),
    }
}

fn answer_entry(verbs: &Verbs, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
    let ours = control::find(parent, name);
    if let Some(attr) = ours.and_then(|ino| control::attributes(&verbs.catalog, ino)) {
        return reply.entry(&ENTRY_TTL, &attr, GENERATION);
    }
    if parent == control::DIRECTORY {
        return reply.error(Errno::ENOENT);
    }
    match verbs.catalog.lookup(parent.0, name) {
        Ok(found) => {
            reply.entry_with_ttls(
                &attribute_ttl(&found),
                &ENTRY_TTL,
                &file_attr(&found),
                GENERATION,
            );
        }
        Err(e) => reply.error(fail(None, &e)),
    }
}

fn answer_attributes(verbs: &Verbs, node: &Node, reply: ReplyAttr) {
    match verbs.catalog.attributes(node) {
        Ok(found) => reply.attr(&attribute_ttl(&found), &file_attr(&found)),
        Err(e) => reply.error(fail(Some(node), &e)),
    }
}

fn answer_snap_attributes(verbs: &Verbs, ino: INodeNo, reply: ReplyAttr) {
    match verbs.snap_attributes(ino) {
        Ok(attr) => reply.attr(&ENTRY_TTL, &attr),
        Err(e) => reply.error(fail(None, &e)),
    }
}

fn answer_written(done: Result<()>, node: &Node, length: usize, reply: ReplyWrite) {
    match done {
        Ok(()) => reply.written(length as u32),
        Err(e) => reply.error(fail(Some(node), &e)),
    }
}

/// Whether a write is to be durable before it is answered. Who writes pages back has been answered
/// already, and asks for an fsync where one is due.
fn is_synchronous(how: WriteFlags, flags: OpenFlags) -> bool {
    flags.0 & libc::O_DSYNC != 0 && !how.contains(WriteFlags::FUSE_WRITE_CACHE)
}

fn answer_orders(verbs: &Verbs, handle: FileHandle, text: &[u8], reply: ReplyWrite) {
    let done = verbs.handle(handle.0).and_then(|open| match &*open {
        Handle::Control { held } => verbs.control(held, text),
        _ => Err(verbs::errno("giving an order through another file", libc::EBADF)),
    });
    match done {
        Ok(()) => reply.written(text.len() as u32),
        Err(e) => reply.error(fail(None, &e)),
    }
}

fn answer_created(made: Result<Created>, reply: ReplyCreate) {
    match made {
        Ok(Created { attributes, opened: Opened { handle, mode, passthrough } }) => {
            let (attr, handle) = (file_attr(&attributes), FileHandle(handle));
            match passthrough {
                Some(file) => {
                    let flags = FopenFlags::empty();
                    reply.created_passthrough(&ENTRY_TTL, &attr, GENERATION, handle, flags, &file);
                }
                None => reply.created(&ENTRY_TTL, &attr, GENERATION, handle, open_flags(mode)),
            }
        }
        Err(e) => reply.error(fail(None, &e)),
    }
}

/// Whether a file opened with these flags bypasses the page cache. One that is only written might do
/// without it, too; but who maps the disk meanwhile could write an old page back over what was written
/// past it.
fn bypasses(flags: i32) -> bool {
    flags & libc::O_DIRECT != 0
}

/// What the kernel is told of an open image.
fn open_flags(mode: HandleMode) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    flags.set(FopenFlags::FOPEN_KEEP_CACHE, mode.keep_cache);
    let bypass = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
    flags.set(bypass, mode.direct);
    flags
}

/// Answers with an extended attribute or the list of them, or with its length where `size` is 0.
fn answer_attribute(found: Result<Vec<u8>>, size: u32, reply: ReplyXattr) {
    match found {
        Ok(bytes) if size == 0 => reply.size(bytes.len() as u32),
        Ok(bytes) if bytes.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(bytes) => reply.data(&bytes),
        Err(e) => reply.error(fail(None, &e)),
    }
}

fn requester(request: &Request) -> Requester {
    Requester { uid: request.uid(), gid: request.gid() }
}

fn answer_read(verbs: &Verbs, node: &Node, offset: u64, size: u32, reply: ReplyData) {
    verbs.read(node, offset, size, |read| match read {
        Ok(bytes) => reply.data(bytes),
        Err(e) => reply.error(fail(Some(node), &e)),
    });
}

fn answer_snap_read(
    verbs: &Verbs,
    node: &Node,
    view: &SnapshotView,
    (offset, size): (u64, u32),
    reply: ReplyData,
) {
    verbs.read_snapshot(node, view, offset, size, |read| match read {
        Ok(bytes) => reply.data(bytes),
        Err(e) => reply.error(fail(Some(node), &e)),
    });
}

/// The image that a handle stands for.
fn image_of<'a>(open: Result<&'a Handle, &Error>) -> Result<&'a Arc<Node>, Errno> {
    match open.map_err(|e| fail(None, e))? {
        Handle::Image { node, .. } => Ok(node),
        Handle::Snapshot { .. } => Err(Errno::EROFS),
        _ => Err(Errno::EINVAL),
    }
}

impl Filesystem for Filesys {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Where the kernel offers less, it stays with less.
        let _ = config.set_max_write(MAX_WRITE);
        let _ = config.set_max_background(MAX_BACKGROUND);
        for wanted in [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
            // A write takes set-user-ID bits and capabilities away: no file here has any. Without this
            // the kernel looks for them before each write.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        ] {
            let _ = config.add_capabilities(wanted);
        }
        if let Some(passthrough) = &self.verbs.passthrough {
            // The files that it is to read and write lie on no stack of file systems.
            let _ = config.set_max_stack_depth(1);
            match config.add_capabilities(InitFlags::FUSE_PASSTHROUGH) {
                Ok(()) => passthrough.offer(),
                Err(_) => log::warn!("this kernel knows no passthrough: all is served here"),
            }
        }
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if snap::is_ours(parent) || name == snap::NAME && parent != control::DIRECTORY {
            let (verbs, name) = (Arc::clone(&self.verbs), name.to_owned());
            return self.pool.run(request.uid(), move || match verbs.snap_lookup(parent, &name) {
                Ok(attr) => reply.entry(&ENTRY_TTL, &attr, GENERATION),
                Err(e) => reply.error(fail(None, &e)),
            });
        }
        self.ahead.looked_at(&self.verbs.catalog, parent.0, name);
        answer_entry(&self.verbs, parent, name, reply);
    }

    fn forget(&self, _request: &Request, ino: INodeNo, lookups: u64) {
        match snap::is_ours(ino) {
            true => self.verbs.snap_forget(ino, lookups),
            false => self.verbs.catalog.forget(ino.0, lookups),
        }
    }

    fn getattr(
        &self,
        request: &Request,
        ino: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        if let Some(attr) = control::attributes(&self.verbs.catalog, ino) {
            return reply.attr(&ENTRY_TTL, &attr);
        }
        if snap::is_ours(ino) {
            let verbs = Arc::clone(&self.verbs);
            return self
                .pool
                .run(request.uid(), move || answer_snap_attributes(&verbs, ino, reply));
        }
        match self.node(ino) {
            Ok(node) if node.is_busy() => {
                let verbs = Arc::clone(&self.verbs);
                self.pool.run(request.uid(), move || answer_attributes(&verbs, &node, reply));
            }
            Ok(node) => answer_attributes(&self.verbs, &node, reply),
            Err(e) => reply.error(e),
        }
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if snap::is_ours(ino) {
            let changes = size.is_some() || mode.is_some() || uid.is_some() || gid.is_some();
            if changes {
                return reply.error(Errno::EROFS);
            }
            // What touch(1) sets after it has made the file: the time stays that of the snapshot.
            let verbs = Arc::clone(&self.verbs);
            return self
                .pool
                .run(request.uid(), move || answer_snap_attributes(&verbs, ino, reply));
        }
        // A shell's `>` cuts the file first.
        if ino == control::CONTROL
            && size == Some(0)
            && let Some(attr) = control::attributes(&self.verbs.catalog, ino)
        {
            return reply.attr(&ENTRY_TTL, &attr);
        }
        let node = match self.node(ino) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        let set = |time: TimeOrNow| match time {
            TimeOrNow::SpecificTime(time) => SetTime::At(time),
            TimeOrNow::Now => SetTime::Now,
        };
        let (accessed, modified) = (atime.map(set), mtime.map(set));
        let change = AttributeChange { mode, uid, gid, accessed, modified };
        let (verbs, who) = (Arc::clone(&self.verbs), requester(request));
        // Only a new size needs the image itself.
        let pool = if size.is_some() { self.pool_for_opening(ino) } else { &self.pool };
        pool.run(request.uid(), move || match verbs.set_attributes(&node, size, change, who) {
            Ok(()) => answer_attributes(&verbs, &node, reply),
            Err(e) => reply.error(fail(Some(&node), &e)),
        });
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let verbs = Arc::clone(&self.verbs);
        self.pool_for_opening(ino).run(request.uid(), move || {
            if ino == control::CONTROL {
                let handle = verbs.add_handle(Handle::Control { held: Default::default() });
                return reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO);
            }
            if ino == control::STATUS {
                return match verbs.open_status() {
                    Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO),
                    Err(e) => reply.error(fail(None, &e)),
                };
            }
            if ino == control::METRICS {
                let handle = verbs.open_metrics();
                return reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO);
            }
            let write = flags.acc_mode() != OpenAccMode::O_RDONLY;
            if snap::is_ours(ino) {
                return match verbs.snap_open(ino, write) {
                    Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::FOPEN_KEEP_CACHE),
                    Err(e) => reply.error(fail(None, &e)),
                };
            }
            let how = Opening { write, direct: bypasses(flags.0) };
            match verbs.open(ino.0, how, &|file| reply.open_backing(file)) {
                Ok(Opened { handle, passthrough: Some(file), .. }) => {
                    reply.opened_passthrough(FileHandle(handle), FopenFlags::empty(), &file);
                }
                Ok(Opened { handle, mode, .. }) => {
                    reply.opened(FileHandle(handle), open_flags(mode));
                }
                // Logged where it was opened.
                Err(e) => reply.error(fail(None, &e)),
            }
        });
    }

    fn read(
        &self,
        request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.crew.serve(size as usize, || {
            self.verbs.with_handle(handle.0, |open| match open {
                Ok(Handle::Image { node, .. }) if node.is_busy() => {
                    let (verbs, node) = (Arc::clone(&self.verbs), Arc::clone(node));
                    let answer = move || answer_read(&verbs, &node, offset, size, reply);
                    self.waiting.run(request.uid(), answer);
                }
                Ok(Handle::Image { node, .. }) => {
                    answer_read(&self.verbs, node, offset, size, reply);
                }
                Ok(Handle::Text(text)) => {
                    let rest = text.get(offset as usize..).unwrap_or_default();
                    reply.data(&rest[..rest.len().min(size as usize)]);
                }
                Ok(Handle::Snapshot { node, view }) if node.is_busy() => {
                    let (verbs, node) = (Arc::clone(&self.verbs), Arc::clone(node));
                    let view = Arc::clone(view);
                    self.waiting.run(request.uid(), move || {
                        answer_snap_read(&verbs, &node, &view, (offset, size), reply);
                    });
                }
                Ok(Handle::Snapshot { node, view }) => {
                    answer_snap_read(&self.verbs, node, view, (offset, size), reply);
                }
                Ok(Handle::Control { .. }) => reply.error(Errno::EBADF),
                Ok(Handle::Names(_) | Handle::Directory { .. }) => reply.error(Errno::EISDIR),
                Err(e) => reply.error(fail(None, e)),
            });
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        how: WriteFlags,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if ino == control::CONTROL {
            let (verbs, text) = (Arc::clone(&self.verbs), data.to_vec());
            return self
                .pool
                .run(request.uid(), move || answer_orders(&verbs, handle, &text, reply));
        }
        let (synchronous, length) = (is_synchronous(how, flags), data.len());
        let answer = |node: &Arc<Node>, reply: ReplyWrite| {
            if !self.verbs.is_within(node, offset, length) {
                let (verbs, node) = (Arc::clone(&self.verbs), Arc::clone(node));
                let data = data.to_vec();
                return self.waiting.run(request.uid(), move || {
                    let written = verbs.write(&node, offset, &data);
                    let done = match synchronous {
                        true => written.and_then(|()| verbs.sync(&node)),
                        false => written,
                    };
                    answer_written(done, &node, length, reply);
                });
            }
            let written = self.verbs.write(node, offset, data);
            if written.is_err() || !synchronous {
                return answer_written(written, node, length, reply);
            }
            let (verbs, node) = (Arc::clone(&self.verbs), Arc::clone(node));
            self.pool.run_here(request.uid(), move || {
                answer_written(verbs.sync(&node), &node, length, reply)
            });
        };
        self.crew.serve(length, || {
            self.verbs.with_handle(handle.0, |open| match image_of(open) {
                Ok(node) => answer(node, reply),
                Err(e) => reply.error(e),
            });
        });
    }

    fn flush(
        &self,
        request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        let verbs = Arc::clone(&self.verbs);
        let open = match verbs.handle(handle.0) {
            Ok(open) => open,
            Err(e) => return reply.error(fail(None, &e)),
        };
        let waits = image_of(Ok(&open)).is_ok_and(|node| verbs.is_passed_through(node));
        let close = move || answer(verbs.closing(&open), None, reply);
        match waits {
            true => self.pool.run(request.uid(), close),
            false => close(),
        }
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let verbs = Arc::clone(&self.verbs);
        // The kernel says of nobody that it was their handle.
        self.pool.run(NOBODY, move || {
            verbs.release_unused(handle.0);
            reply.ok();
        });
    }

    fn fsync(
        &self,
        request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let node = match self.verbs.handle(handle.0).as_deref() {
            Ok(Handle::Image { node, .. }) => Arc::clone(node),
            // What it shows is durable since it was taken.
            Ok(Handle::Snapshot { .. }) => return reply.ok(),
            Ok(_) => return reply.error(Errno::EINVAL),
            Err(e) => return reply.error(fail(None, e)),
        };
        let verbs = Arc::clone(&self.verbs);
        self.pool.run_here(request.uid(), move || {
            let synced = if datasync { verbs.sync(&node) } else { verbs.sync_all(&node) };
            answer(synced, Some(&node), reply);
        });
    }

    fn fallocate(
        &self,
        request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.slowly(request, self.image_node(handle), reply, move |verbs, node| {
            verbs.allocate(node, offset, length, mode)
        });
    }

    fn lseek(
        &self,
        request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let verbs = Arc::clone(&self.verbs);
        self.pool.run(request.uid(), move || {
            let handle = verbs.handle(handle.0);
            match handle.and_then(|handle| verbs.seek(&handle, offset, whence)) {
                Ok(found) => reply.offset(found as i64),
                Err(e) => reply.error(fail(None, &e)),
            }
        });
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if ino == control::DIRECTORY {
            return reply.opened(FileHandle(0), FopenFlags::empty());
        }
        if snap::is_ours(ino) {
            let verbs = Arc::clone(&self.verbs);
            return self.pool.run(request.uid(), move || match verbs.snap_open_directory(ino) {
                Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
                Err(e) => reply.error(fail(None, &e)),
            });
        }
        match self.node(ino) {
            Ok(node) => {
                let directory = Handle::Directory { node, entries: Default::default() };
                let handle = self.verbs.add_handle(directory);
                reply.opened(FileHandle(handle), FopenFlags::empty());
            }
            Err(e) => reply.error(e),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if ino == control::DIRECTORY {
            control::list(offset, &mut reply);
            return reply.ok();
        }
        let open = self.verbs.handle(handle.0);
        if let Ok(Handle::Names(names)) = open.as_deref() {
            snap::list(names, offset, &mut reply);
            return reply.ok();
        }
        let listed = open.and_then(|open| self.verbs.entries(&open, offset));
        let entries = match listed {
            Ok(entries) => entries,
            Err(e) => return reply.error(fail(None, &e)),
        };
        if offset == 0 {
            self.ahead.listed(ino.0, &entries);
        }
        let at_root = ino.0 == crate::catalog::ROOT;
        let hidden = |name: &OsStr| name == snap::NAME || at_root && name == control::NAME;
        let dots =
            [(".", true), ("..", true)].map(|(name, directory)| (OsStr::new(name), directory));
        let named = entries.iter().map(|entry| (entry.name.as_os_str(), entry.directory));
        for (number, (name, directory)) in (1..).zip(dots.into_iter().chain(named)) {
            if number <= offset || hidden(name) {
                continue;
            }
            if reply.add(UNKNOWN_INO, number, control::kind(directory), name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.verbs.release(handle.0);
        reply.ok();
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let parent_node = match self.parent(parent, name) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        let made = self.verbs.catalog.make_directory(&parent_node, name, mode, requester(request));
        match made {
            Ok(()) => answer_entry(&self.verbs, parent, name, reply),
            Err(e) => reply.error(fail(Some(&parent_node), &e)),
        }
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        if snap::is_ours(parent) {
            let verbs = Arc::clone(&self.verbs);
            let pool = self.pool_for_opening(parent);
            return pool
                .run(request.uid(), move || answer(verbs.snap_remove(parent, &name), None, reply));
        }
        let who = requester(request);
        self.slowly(request, self.parent(parent, &name), reply, move |verbs, parent| {
            verbs.catalog.remove(parent, &name, false, who)
        });
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (name, who) = (name.to_owned(), requester(request));
        self.slowly(request, self.parent(parent, &name), reply, move |verbs, parent| {
            verbs.catalog.remove(parent, &name, true, who)
        });
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let to = match self.parent(new_parent, new_name) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        let (name, new_name, who) = (name.to_owned(), new_name.to_owned(), requester(request));
        self.slowly(request, self.parent(parent, &name), reply, move |verbs, parent| {
            verbs.catalog.rename((parent, &name), (&to, &new_name), flags.bits(), who)
        });
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.verbs.catalog.space() {
            Ok(host) => {
                let blocks = |count: u64| count.saturating_mul(host.block) / BLOCK;
                reply.statfs(
                    blocks(host.blocks),
                    blocks(host.free),
                    blocks(host.available),
                    host.files,
                    host.files_free,
                    BLOCK as u32,
                    host.name_max,
                    BLOCK as u32,
                );
            }
            Err(e) => reply.error(fail(None, &e)),
        }
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (verbs, name, who) = (Arc::clone(&self.verbs), name.to_owned(), requester(request));
        if !snap::is_ours(parent) {
            let parent = match self.parent(parent, &name) {
                Ok(node) => node,
                Err(e) => return reply.error(e),
            };
            return self.pool.run(request.uid(), move || {
                let register = |file: &File| reply.open_backing(file);
                let created = verbs.create(&parent, &name, mode, who, flags, &register);
                answer_created(created, reply);
            });
        }
        self.pool_for_opening(parent).run(request.uid(), move || {
            match verbs.snap_create(parent, &name) {
                Ok((attr, handle)) => {
                    let (handle, flags) = (FileHandle(handle), FopenFlags::FOPEN_KEEP_CACHE);
                    reply.created(&ENTRY_TTL, &attr, GENERATION, handle, flags);
                }
                Err(e) => reply.error(fail(None, &e)),
            }
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _device: u32,
        reply: ReplyEntry,
    ) {
        let parent_node = match self.parent(parent, name) {
            Ok(node) if mode & libc::S_IFMT == libc::S_IFREG => node,
            Ok(_) => return reply.error(Errno::EPERM),
            Err(e) => return reply.error(e),
        };
        let (verbs, name, who) = (Arc::clone(&self.verbs), name.to_owned(), requester(request));
        self.pool.run(request.uid(), move || {
            match verbs.catalog.make_image(&parent_node, &name, mode, who) {
                Ok(node) => {
                    // The look that follows counts one more.
                    verbs.catalog.forget(node.ino(), 1);
                    answer_entry(&verbs, parent, &name, reply);
                }
                Err(e) => reply.error(fail(Some(&parent_node), &e)),
            }
        });
    }

    fn symlink(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &std::path::Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn link(
        &self,
        request: &Request,
        ino: INodeNo,
        parent: INodeNo,
        name: &OsStr,
        reply: ReplyEntry,
    ) {
        let nodes = self.node(ino).and_then(|node| Ok((node, self.parent(parent, name)?)));
        let (node, parent_node) = match nodes {
            Ok(nodes) => nodes,
            Err(e) => return reply.error(e),
        };
        let (verbs, name) = (Arc::clone(&self.verbs), name.to_owned());
        self.pool.run(request.uid(), move || {
            match verbs.catalog.link(&node, &parent_node, &name) {
                Ok(()) => answer_entry(&verbs, parent, &name, reply),
                Err(e) => reply.error(fail(Some(&parent_node), &e)),
            }
        });
    }

    fn fsyncdir(
        &self,
        request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        if control::is_ours(ino) || snap::is_ours(ino) {
            return reply.ok();
        }
        self.slowly(request, self.node(ino), reply, |verbs, node| {
            verbs.catalog.sync_directory(node)
        });
    }

    fn getxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let node = match self.with_attributes(ino, Errno::ENODATA) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        let (verbs, name) = (Arc::clone(&self.verbs), name.to_owned());
        let answer = move |node: &Node| {
            answer_attribute(verbs.catalog.extended_attribute(node, &name), size, reply);
        };
        match node.is_busy() {
            true => self.pool.run(request.uid(), move || answer(&node)),
            false => answer(&node),
        }
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let node = match self.node(ino) {
            Ok(node) => node,
            // What is ours has none.
            Err(_) => return answer_attribute(Ok(Vec::new()), size, reply),
        };
        let verbs = Arc::clone(&self.verbs);
        let answer = move |node: &Node| {
            answer_attribute(verbs.catalog.extended_attributes(node), size, reply);
        };
        match node.is_busy() {
            true => self.pool.run(request.uid(), move || answer(&node)),
            false => answer(&node),
        }
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (name, value) = (name.to_owned(), value.to_owned());
        self.slowly(request, self.node(ino), reply, move |verbs, node| {
            verbs.catalog.set_extended_attribute(node, &name, &value, flags as u32)
        });
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        let node = self.with_attributes(ino, Errno::ENODATA);
        self.slowly(request, node, reply, move |verbs, node| {
            verbs.catalog.remove_extended_attribute(node, &name)
        });
    }

    // What is not there. The kernel remembers ENOSYS and does not ask again; it falls back to reading
    // and writing for copies.

    fn access(&self, _: &Request, _: INodeNo, _: fuser::AccessFlags, reply: ReplyEmpty) {
        // The kernel checks permissions itself (default_permissions) and asks only without it.
        reply.ok();
    }

    fn bmap(&self, _: &Request, _: INodeNo, _: u32, _: u64, reply: ReplyBmap) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: PollNotifier,
        _: PollEvents,
        _: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }
}
