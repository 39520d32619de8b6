//! What requests mean, without FUSE: handles, and verbs on the images behind them.
//!
//! A size is a multiple of 512 bytes: what is asked for is rounded up, as `qemu-img` does.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::hint::black_box;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use fuser::BackingId;
use parking_lot::{Mutex, RwLock};

use super::bypasses;
use super::control::{self, Order};
use super::passthrough::{Passthrough, takes_sectors};
use super::snap::Snaps;
use crate::catalog::{
    AttributeChange, Attributes, Catalog, Entry, HandleMode, Node, Opening, Requester, metrics,
};
use crate::error::{Error, Result};
use crate::image::{Content, Image, SnapshotView};

/// Bytes in a sector, of which a virtual disk has a whole number.
const SECTOR: u64 = 512;

/// The most bytes that one read may ask for; the kernel asks for 1 MiB.
const MAX_READ: u32 = 16 << 20;
/// What the kernel asks for at most, unless it was told otherwise.
const USUAL_READ: usize = 1 << 20;

/// So many image handles a worker remembers.
const REMEMBERED: usize = 8;

/// How often it is looked whether somebody still has a mapping of a file that was closed.
const SHORTEST_LINGER: Duration = Duration::from_millis(1);
const LONGEST_LINGER: Duration = Duration::from_millis(500);

/// How often a file is made or opened that others make and remove.
const CREATE_ATTEMPTS: u32 = 8;

/// A handle and its number.
type Numbered = (u64, Arc<Handle>);

thread_local! {
    /// Each worker's own; it grows to the largest read and stays.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    /// The image handles that it used last, each in the place that its number says.
    static LAST_HANDLES: [Cell<Option<Numbered>>; REMEMBERED] =
        const { [const { Cell::new(None) }; REMEMBERED] };
}

/// No number is ever used for another handle.
static NEXT_HANDLE: AtomicU64 = AtomicU64::new(1);

/// What an open file handle stands for.
pub(super) enum Handle {
    /// An image.
    Image {
        /// Which.
        node: Arc<Node>,
        /// The handle may write.
        write: bool,
    },
    /// A snapshot of an image.
    Snapshot {
        /// Whose.
        node: Arc<Node>,
        /// What is read.
        view: Arc<SnapshotView>,
    },
    /// A text that was made when it was opened.
    Text(Vec<u8>),
    /// A directory of snapshots as it was when it was opened: names, and whether each is a directory.
    Names(Vec<(Vec<u8>, bool)>),
    /// What takes orders, and the images that it keeps open for them.
    Control {
        /// Opened for writing.
        held: Mutex<Vec<Arc<Node>>>,
    },
    /// A directory, as it was when reading it began.
    Directory {
        /// Which.
        node: Arc<Node>,
        /// What it lists; renewed when reading begins anew.
        entries: Mutex<Arc<Vec<Entry>>>,
    },
}

/// A file that was opened by the name that it was to have.
pub(super) struct Created {
    pub(super) attributes: Attributes,
    pub(super) opened: Opened,
}

/// A new handle of an image.
pub(super) struct Opened {
    /// Its number.
    pub(super) handle: u64,
    pub(super) mode: HandleMode,
    /// The kernel reads and writes this file itself.
    pub(super) passthrough: Option<Arc<BackingId>>,
}

/// Tells the kernel of a file that it is to read and write itself.
pub(super) type Register<'a> = &'a dyn Fn(&File) -> io::Result<BackingId>;

/// As many zeros as almost all reads want at most, from the first time on that some are wanted.
#[derive(Default)]
struct Zeros(OnceLock<Vec<u8>>);

impl Zeros {
    fn first(&self, count: usize) -> Option<&[u8]> {
        // Their memory is written once: the kernel takes pages that never were one by one, under a
        // lock that all threads share (`scripts/bench --jobs hole-read-64k,hole-read-1m`: 1.16 and
        // 1.5 times as fast as with those).
        let fill = || {
            let mut bytes = vec![1; USUAL_READ];
            black_box(&mut bytes).fill(0);
            bytes
        };
        self.0.get_or_init(fill).get(..count)
    }
}

/// All that the handlers share.
pub(super) struct Verbs {
    pub(super) catalog: Arc<Catalog>,
    pub(super) snaps: Snaps,
    mountpoint: PathBuf,
    handles: RwLock<HashMap<u64, Arc<Handle>>>,
    /// What holes are answered with.
    zeros: Zeros,
    /// Where the kernel may serve disks itself.
    pub(super) passthrough: Option<Passthrough>,
}

impl Verbs {
    pub(super) fn new(catalog: Arc<Catalog>, mountpoint: PathBuf, passthrough: bool) -> Self {
        Verbs {
            catalog,
            snaps: Snaps::default(),
            mountpoint,
            handles: RwLock::default(),
            zeros: Zeros::default(),
            passthrough: passthrough.then(Passthrough::new),
        }
    }

    /// The handle of that number.
    ///
    /// # Errors
    /// `EBADF`.
    pub(super) fn handle(&self, number: u64) -> Result<Arc<Handle>> {
        let handle = self.handles.read().get(&number).cloned();
        handle.ok_or_else(|| errno("using a file that is not open", libc::EBADF))
    }

    /// Does `verb` with the handle of that number, or the error of [`Verbs::handle`]. A worker remembers
    /// the images that it used last: it shares no memory with others to find one again, which is what
    /// small requests wait for otherwise.
    pub(super) fn with_handle<R>(
        &self,
        number: u64,
        verb: impl FnOnce(std::result::Result<&Handle, &Error>) -> R,
    ) -> R {
        LAST_HANDLES.with(|last| {
            let place = &last[number as usize % REMEMBERED];
            let known = place.take().filter(|(known, _)| *known == number);
            match known.map_or_else(|| self.handle(number), |(_, handle)| Ok(handle)) {
                Ok(handle) => {
                    let done = verb(Ok(&handle));
                    if matches!(*handle, Handle::Image { .. }) {
                        place.set(Some((number, handle)));
                    }
                    done
                }
                Err(e) => verb(Err(&e)),
            }
        })
    }

    pub(super) fn add_handle(&self, handle: Handle) -> u64 {
        let number = NEXT_HANDLE.fetch_add(1, Ordering::Relaxed);
        self.handles.write().insert(number, Arc::new(handle));
        number
    }

    /// Opens a node's image; [`Verbs::release`] ends it.
    pub(super) fn open(&self, ino: u64, how: Opening, register: Register<'_>) -> Result<Opened> {
        let node = self.catalog.node(ino)?;
        let mode = self.catalog.open(&node, how)?;
        let passthrough = self.pass_through(&node, how, register);
        let passthrough = passthrough.inspect_err(|_| self.catalog.release_untold(&node))?;
        let handle = self.add_handle(Handle::Image { node, write: how.write });
        Ok(Opened { handle, mode, passthrough })
    }

    /// The file that the kernel is to read and write itself for a new handle; [`Verbs::close_image`] ends
    /// it.
    fn pass_through(
        &self,
        node: &Node,
        how: Opening,
        register: Register<'_>,
    ) -> Result<Option<Arc<BackingId>>> {
        let Some(passthrough) = &self.passthrough else { return Ok(None) };
        // What is decided holds for the size that the disk has now.
        let _size = node.size_change.lock();
        let Some(file) = passthrough.enter(node.ino(), || self.decide(passthrough, node, register))
        else {
            return Ok(None);
        };
        if how.write {
            let begun = node.with_image(|image| image.begin_passthrough());
            begun.inspect_err(|_| passthrough.leave(node.ino()))?;
        }
        // What the kernel caches of it nevertheless, reading ahead, is not to be believed later.
        node.was_not_told();
        Ok(Some(file))
    }

    /// What the kernel calls the data file of this image, if it is to read and write that itself.
    fn decide(
        &self,
        passthrough: &Passthrough,
        node: &Node,
        register: Register<'_>,
    ) -> Option<BackingId> {
        let is_its_data_file = node.with_image(|image| image.is_its_data_file());
        // What cannot be read now can be none that is used.
        if !is_its_data_file.inspect_err(|e| node.log(e)).unwrap_or(false) {
            return None;
        }
        let file = node.data_file().filter(|file| takes_sectors(file.file()))?;
        let registered = register(file.file()).inspect_err(|e| {
            if passthrough.is_first_refusal() {
                let name = node.raw_path();
                log::warn!("{}: the kernel does not take its data file: {e}", name.display());
            }
        });
        registered.ok()
    }

    /// Whether the kernel reads and writes this disk itself.
    pub(super) fn is_passed_through(&self, node: &Node) -> bool {
        self.passthrough.as_ref().is_some_and(|passthrough| passthrough.is_on(node.ino()))
    }

    /// Takes account of what the kernel may have written itself.
    ///
    /// # Errors
    /// `EFBIG` once it has written past the end of the disk, until nobody has that open; host errors.
    fn note_passthrough(&self, node: &Node) -> Result<()> {
        if !self.is_passed_through(node) {
            return Ok(());
        }
        // What somebody else adds to the disk now is not past its end.
        let _size = node.size_change.lock();
        node.with_image(|image| self.note_passthrough_of(node, image))
    }

    /// The same while the size is locked.
    fn note_passthrough_of(&self, node: &Node, image: &Image) -> Result<()> {
        let Some(passthrough) = &self.passthrough else { return Ok(()) };
        match passthrough.was_cut(node.ino(), image.note_passthrough()?) {
            true => Err(errno(
                "what was written past the end of the disk is gone, which does not grow by that \
                 while the kernel itself has it open; close it, and open it again",
                libc::EFBIG,
            )),
            false => Ok(()),
        }
    }

    /// Ends a handle of an image.
    fn close_image(&self, node: &Node) {
        if let Err(e) = self.note_passthrough(node) {
            node.log(&e);
        }
        if let Some(passthrough) = &self.passthrough {
            passthrough.leave(node.ino());
        }
        self.catalog.release(node);
    }

    /// Ends a handle; the last one of a disk that the kernel serves and somebody may write as soon as
    /// nobody has a mapping of it any more.
    pub(super) fn release_unused(self: &Arc<Self>, number: u64) {
        let (Some(passthrough), Ok(handle)) = (&self.passthrough, self.handle(number)) else {
            return self.release(number);
        };
        let Handle::Image { node, .. } = &*handle else { return self.release(number) };
        if self.has_ended(number, node) {
            return;
        }
        // All who have written past the end have closed it, and a mapping does not reach there.
        passthrough.forgive(node.ino());
        // The kernel forgets the node, but who comes is to find this one.
        self.catalog.hold(node);
        let (verbs, node) = (Arc::clone(self), Arc::clone(node));
        let linger = thread::Builder::new().name("linger".into());
        let waiting = linger.spawn(move || {
            let mut pause = SHORTEST_LINGER;
            while !verbs.has_ended(number, &node) {
                thread::sleep(pause);
                pause = (2 * pause).min(LONGEST_LINGER);
            }
            verbs.catalog.forget(node.ino(), 1);
        });
        if let Err(e) = waiting {
            log::warn!("starting a thread: {e}: a disk that may be in use stays open");
        }
    }

    /// Ends a handle, unless it is the last one of a disk that somebody has a mapping of; whether it did.
    fn has_ended(&self, number: u64, node: &Node) -> bool {
        // Nobody opens it between the look and the end.
        let size = node.size_change.lock();
        if let Some(passthrough) = &self.passthrough
            && !passthrough.leave_unless_last(node.ino())
        {
            // Where it is only read the same file may be so often, each waiting for the others.
            if let Some(file) = node.data_file().filter(|_| node.is_open_for_writing()) {
                let noted = node.with_image(|image| self.note_passthrough_of(node, image));
                noted.unwrap_or_else(|e| node.log(&e));
                if file.is_open_elsewhere() {
                    return false;
                }
            }
            passthrough.leave(node.ino());
        }
        drop(size);
        self.handles.write().remove(&number);
        self.catalog.release(node);
        true
    }

    /// Makes an image and opens it, as open(2) with `O_CREAT` and the other `flags` does.
    pub(super) fn create(
        &self,
        parent: &Node,
        name: &OsStr,
        mode: u32,
        who: Requester,
        flags: i32,
        register: Register<'_>,
    ) -> Result<Created> {
        // Who makes a file may write to it whatever its mode says, and so may we who open it next.
        let (owner, asked) = (0o600, mode & 0o777);
        let make = || self.catalog.make_image(parent, name, asked | owner, who);
        let (node, is_new) = match flags & libc::O_EXCL != 0 {
            true => (make()?, true),
            false => {
                self.make_or_find(parent, name, make, |found| owner_may_open(found, who, flags))?
            }
        };
        let write = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let how = Opening { write, direct: bypasses(flags) };
        let created = self.open(node.ino(), how, register).and_then(|opened| {
            let change = AttributeChange { mode: Some(asked), ..Default::default() };
            let finished = match is_new {
                true if asked & owner != owner => {
                    self.catalog.change_attributes(&node, change, Requester::US)
                }
                false if flags & libc::O_TRUNC != 0 => {
                    self.set_attributes(&node, Some(0), Default::default(), who)
                }
                _ => Ok(()),
            };
            let attributes = finished.and_then(|()| self.catalog.attributes(&node));
            let attributes = attributes.inspect_err(|_| {
                self.handles.write().remove(&opened.handle);
                node.was_not_told();
                self.close_image(&node);
            })?;
            Ok(Created { attributes, opened })
        });
        // The kernel does not know of it then.
        created.inspect_err(|_| self.catalog.forget(node.ino(), 1))
    }

    /// What `make` makes, or what somebody else was faster to make; and whether it is the first. The
    /// other's is found only if `may_open` says so.
    ///
    /// # Errors
    /// `ESTALE` where it does not: the kernel, which has found nothing of that name, looks again then,
    /// and checks the permissions of what it finds. Those of `make`.
    fn make_or_find(
        &self,
        parent: &Node,
        name: &OsStr,
        make: impl Fn() -> Result<Arc<Node>>,
        may_open: impl Fn(&Attributes) -> bool,
    ) -> Result<(Arc<Node>, bool)> {
        for _ in 1..CREATE_ATTEMPTS {
            match make() {
                Err(e) if e.errno() == libc::EEXIST => {}
                made => return Ok((made?, true)),
            }
            match self.catalog.lookup(parent.ino(), name) {
                // It is gone again, or never was an image.
                Err(e) if e.errno() == libc::ENOENT => {}
                Ok(found) if !may_open(&found) => {
                    self.catalog.forget(found.ino, 1);
                    return Err(errno("opening what somebody else has just made", libc::ESTALE));
                }
                found => return Ok((self.catalog.node(found?.ino)?, false)),
            }
        }
        let made = make().inspect_err(|e| {
            log::warn!("{e}; what has that name beneath the image directory is no image");
        });
        Ok((made?, true))
    }

    /// Opens the text that tells the state of the mount as JSON.
    pub(super) fn open_status(&self) -> Result<u64> {
        let status = self.catalog.status(&self.mountpoint);
        let mut text = serde_json::to_vec_pretty(&status)
            .map_err(|e| Error::io("writing the status", io::Error::other(e)))?;
        text.push(b'\n');
        Ok(self.add_handle(Handle::Text(text)))
    }

    /// Opens the same as metrics.
    pub(super) fn open_metrics(&self) -> u64 {
        let status = self.catalog.status(&self.mountpoint);
        self.add_handle(Handle::Text(metrics(&status).into_bytes()))
    }

    /// Makes what was written durable.
    pub(super) fn sync(&self, node: &Node) -> Result<()> {
        let noted = self.note_passthrough(node);
        node.sync().and(noted)
    }

    /// The same, and attributes that were set.
    pub(super) fn sync_all(&self, node: &Node) -> Result<()> {
        self.sync(node).and(self.catalog.sync_attributes(node))
    }

    /// Ends a handle.
    pub(super) fn release(&self, number: u64) {
        let handle = self.handles.write().remove(&number);
        match handle.as_deref() {
            Some(Handle::Image { node, .. }) => self.close_image(node),
            Some(Handle::Snapshot { node, .. }) => self.catalog.close_snapshot(node),
            Some(Handle::Control { held }) => {
                for node in held.lock().drain(..) {
                    self.catalog.release(&node);
                    self.catalog.forget(node.ino(), 1);
                }
            }
            _ => {}
        }
    }

    /// Does what is written to `control`.
    ///
    /// # Errors
    /// `EINVAL` for an order that makes no sense; those of opening the image.
    pub(super) fn control(&self, held: &Mutex<Vec<Arc<Node>>>, text: &[u8]) -> Result<()> {
        let orders = control::orders(text)
            .ok_or_else(|| errno("an order to the mount that is not known", libc::EINVAL))?;
        for order in orders {
            match order {
                Order::Compact(name) => {
                    let node = self.catalog.find_node(name)?;
                    if let Err(e) = self.catalog.open_for_verb(&node, true) {
                        self.catalog.forget(node.ino(), 1);
                        return Err(e);
                    }
                    held.lock().push(Arc::clone(&node));
                    node.with_image(|image| image.ask_to_compact(true))?;
                }
                Order::Stop(name) => {
                    let node = self.catalog.find_node(name)?;
                    let stopped = node.with_image(|image| image.ask_to_compact(false));
                    self.catalog.forget(node.ino(), 1);
                    stopped?;
                }
            }
        }
        Ok(())
    }

    /// Reads up to the end of the disk and passes the bytes on.
    pub(super) fn read(
        &self,
        node: &Node,
        offset: u64,
        size: u32,
        deliver: impl FnOnce(Result<&[u8]>),
    ) {
        READ_BUFFER.with_borrow_mut(|buffer| {
            let read = node.with_image(|image| {
                let count = fit(buffer, image.virtual_size(), offset, size);
                let read = || image.read_unless_zeros(offset, &mut buffer[..count]);
                let content = node.io().read.count(count as u64, read)?;
                Ok((count, content))
            });
            deliver(read.map(|(count, content)| match content {
                Content::Data => &buffer[..count],
                Content::Zeros => self.zeros.first(count).unwrap_or_else(|| {
                    buffer[..count].fill(0);
                    &buffer[..count]
                }),
            }));
        });
    }

    /// Reads up to the end of a snapshot and passes the bytes on.
    pub(super) fn read_snapshot(
        &self,
        node: &Node,
        view: &SnapshotView,
        offset: u64,
        size: u32,
        deliver: impl FnOnce(Result<&[u8]>),
    ) {
        READ_BUFFER.with_borrow_mut(|buffer| {
            // The image is open still: nobody else changes the file.
            let read = node.with_image(|_| {
                let count = fit(buffer, view.info().disk_size, offset, size);
                view.read(offset, &mut buffer[..count])?;
                Ok(count)
            });
            deliver(read.map(|count| &buffer[..count]));
        });
    }

    /// Writes; a write past the end of the disk grows it.
    pub(super) fn write(&self, node: &Node, offset: u64, data: &[u8]) -> Result<()> {
        let end = end_of(offset, data.len() as u64)?;
        node.is_changed();
        node.with_image(|image| {
            self.grow_to(node, image, end)?;
            node.io().write.count(data.len() as u64, || image.write(offset, data))
        })
    }

    /// Whether a write waits for nobody who opens or closes the image or changes all of it, and lies
    /// within the disk.
    pub(super) fn is_within(&self, node: &Node, offset: u64, length: usize) -> bool {
        let end = offset.saturating_add(length as u64);
        node.try_peek(|image| !image.is_held() && end <= image.virtual_size()) == Some(true)
    }

    /// fallocate(2): reserves, discards, or zeroes.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for other modes; never for a range.
    pub(super) fn allocate(&self, node: &Node, offset: u64, length: u64, mode: i32) -> Result<()> {
        const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
        const PUNCH_KEEP: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
        const ZERO_KEEP: i32 = ZERO | KEEP;
        let end = end_of(offset, length)?;
        let range = offset..end;
        node.is_changed();
        node.with_image(|image| {
            if matches!(mode, 0 | ZERO) {
                self.grow_to(node, image, end)?;
            }
            node.io().discard.count(length, || match mode {
                0 | KEEP => image.preallocate(range),
                PUNCH_KEEP => image.discard(range),
                ZERO | ZERO_KEEP => image.write_zeroes(range),
                _ => Err(errno("a way to allocate that is not known", libc::EOPNOTSUPP)),
            })
        })
    }

    /// lseek(2) with `SEEK_DATA` or `SEEK_HOLE`.
    ///
    /// # Errors
    /// `ENXIO` past the end and where no data follows.
    pub(super) fn seek(&self, handle: &Handle, offset: i64, whence: i32) -> Result<u64> {
        match handle {
            Handle::Image { node, .. } => node.with_image(|image| {
                let (data, hole) = (|at| image.next_data(at), |at| image.next_hole(at));
                seek(image.virtual_size(), offset, whence, data, hole)
            }),
            Handle::Snapshot { node, view } => node.with_image(|_| {
                let (data, hole) = (|at| view.next_data(at), |at| view.next_hole(at));
                seek(view.info().disk_size, offset, whence, data, hole)
            }),
            _ => Err(errno("seeking in what has no data", libc::EINVAL)),
        }
    }

    /// Sets the size and other attributes.
    pub(super) fn set_attributes(
        &self,
        node: &Node,
        size: Option<u64>,
        change: AttributeChange,
        who: Requester,
    ) -> Result<()> {
        if let Some(size) = size {
            let size = whole_sectors(size)?;
            let _change = node.size_change.lock();
            node.is_changed();
            self.catalog.with_opened(node, true, |image| match size == image.virtual_size() {
                true => Ok(()),
                false => self.resize(node, image, size),
            })?;
        }
        self.catalog.change_attributes(node, change, who)
    }

    /// Makes the disk at least `end` bytes long.
    fn grow_to(&self, node: &Node, image: &Image, end: u64) -> Result<()> {
        if end <= image.virtual_size() {
            return Ok(());
        }
        let _change = node.size_change.lock();
        if end <= image.virtual_size() {
            return Ok(());
        }
        self.resize(node, image, whole_sectors(end)?)
    }

    /// Changes the size of the disk, which nobody else does meanwhile.
    ///
    /// # Errors
    /// `EBUSY` for a smaller one while the kernel reads and writes it itself: who truncates a file goes
    /// on to write past its end, of which nobody would hear. Those of [`Image::resize`].
    fn resize(&self, node: &Node, image: &Image, size: u64) -> Result<()> {
        match self.is_passed_through(node) {
            false => image.resize(size),
            true if size > image.virtual_size() => {
                // What is there by now was past the end, and is not to become a part of the disk.
                self.note_passthrough_of(node, image)?;
                image.grow_passed_through(size)
            }
            true => Err(errno("cutting a disk that the kernel itself has open", libc::EBUSY)),
        }
    }

    /// What close(2) should hear of: an image that stopped taking writes while it was written.
    pub(super) fn closing(&self, handle: &Handle) -> Result<()> {
        let Handle::Image { node, write: true } = handle else { return Ok(()) };
        self.note_passthrough(node)?;
        node.with_image(|image| match image.is_writable() {
            true => Ok(()),
            false => Err(errno("closing a file whose image takes no more writes", libc::EIO)),
        })
    }

    /// What a directory lists from the entry `from` on; reading from the start looks again.
    pub(super) fn entries(&self, handle: &Handle, from: u64) -> Result<Arc<Vec<Entry>>> {
        let Handle::Directory { node, entries } = handle else {
            return Err(errno("reading a file as a directory", libc::ENOTDIR));
        };
        let mut entries = entries.lock();
        if from == 0 {
            *entries = Arc::new(self.catalog.list(node)?);
        }
        Ok(Arc::clone(&entries))
    }
}

/// Whether who has the user id of `who` may open the image as `flags` say since it is theirs. Of
/// others only the kernel knows: groups and privileges do not come with a request.
fn owner_may_open(found: &Attributes, who: Requester, flags: i32) -> bool {
    const READ: u32 = 0o400;
    const WRITE: u32 = 0o200;
    let access = match flags & libc::O_ACCMODE {
        libc::O_RDONLY => READ,
        libc::O_WRONLY => WRITE,
        _ => READ | WRITE,
    };
    let access = if flags & libc::O_TRUNC != 0 { access | WRITE } else { access };
    !found.directory && found.uid == who.uid && found.mode & access == access
}

/// Sees to it that `buffer` has room for a read of `size` bytes at `offset`, as far as there are so
/// many before `end`; how many there are.
fn fit(buffer: &mut Vec<u8>, end: u64, offset: u64, size: u32) -> usize {
    let count = end.saturating_sub(offset).min(size.min(MAX_READ).into()) as usize;
    if buffer.len() < count {
        buffer.resize(count, 0);
    }
    count
}

fn seek(
    size: u64,
    offset: i64,
    whence: i32,
    next_data: impl FnOnce(u64) -> Result<Option<u64>>,
    next_hole: impl FnOnce(u64) -> Result<u64>,
) -> Result<u64> {
    let nothing = || errno("seeking past the end", libc::ENXIO);
    let offset = u64::try_from(offset).ok().filter(|at| *at < size).ok_or_else(nothing)?;
    match whence {
        libc::SEEK_DATA => next_data(offset)?.filter(|at| *at < size).ok_or_else(nothing),
        libc::SEEK_HOLE => Ok(next_hole(offset)?.min(size)),
        _ => Err(errno("a way to seek that is not known", libc::EINVAL)),
    }
}

fn whole_sectors(size: u64) -> Result<u64> {
    let too_big = || errno("a size past all limits", libc::EFBIG);
    size.checked_next_multiple_of(SECTOR).ok_or_else(too_big)
}

fn end_of(offset: u64, length: u64) -> Result<u64> {
    offset.checked_add(length).ok_or_else(|| errno("a range past all limits", libc::EFBIG))
}

pub(super) fn errno(what: &str, code: i32) -> Error {
    Error::io(what, io::Error::from_raw_os_error(code))
}
