//! One file or directory, and the image that is open in it.
//!
//! A node's slot holds at most one open image, whatever the number of names and handles. Requests
//! reach it through [`Node::with_image`]; opening, the switch from reading to writing, and closing
//! hold the slot alone.

use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::chain::{Chains, Files, Writing};
use super::host::{self, HostId, Stamp};
use super::names;
use super::times::KeptTimes;
use crate::counters::{OperationCounts, Operations};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Beside, Image, Options};
use crate::storage::HostFile;
use crate::storage::image_lock::{self, Access};

/// A file or directory beneath the image directory.
pub struct Node {
    ino: u64,
    id: HostId,
    directory: bool,
    /// Its names on the host, relative to the image directory, the latest last.
    names: Mutex<Vec<PathBuf>>,
    /// Never held while another lock but the growth lock is taken.
    slot: RwLock<Slot>,
    /// From the end of the first opening to that of the last close. Who only looks at what is open
    /// does not wait for a first opening, which takes long where a key is tried.
    has_image: AtomicBool,
    /// Serializes changes of the virtual size. Taken before the slot.
    pub(crate) size_change: Mutex<()>,
    /// What the header said last, and the stamp as long as which it says so: none where nobody knows.
    pub(super) header: Mutex<Option<(Option<Stamp>, Header)>>,
    /// What was logged of it last: the same is not logged twice in a row.
    logged: Mutex<Option<Logged>>,
    /// Times that were set while its image is open.
    pub(super) times: KeptTimes,
    /// Closing its image failed, and no sync has told of that.
    lost: AtomicBool,
    /// Attributes may have been set that are not durable. Held while they are made so.
    pub(super) unsynced_attributes: Mutex<bool>,
    /// What was requested of it, from the first request on.
    io: OnceLock<Box<Io>>,
}

struct Logged {
    line: String,
    /// The errno, where the host had no space.
    full: Option<i32>,
}

/// The requests for an image since the kernel first asked for it.
#[derive(Debug, Default)]
pub struct Io {
    /// Reads.
    pub read: Operations,
    /// Writes.
    pub write: Operations,
    /// Discards, and what zeroes or reserves a range.
    pub discard: Operations,
    /// Flushes.
    pub flush: Operations,
}

/// What an image's requests have come to.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct IoCounts {
    /// Reads.
    pub read: OperationCounts,
    /// Writes.
    pub write: OperationCounts,
    /// Discards, and what zeroes or reserves a range.
    pub discard: OperationCounts,
    /// Flushes.
    pub flush: OperationCounts,
}

impl IoCounts {
    /// Each kind of request with its name.
    pub fn by_name(&self) -> [(&'static str, &OperationCounts); 4] {
        [
            ("read", &self.read),
            ("write", &self.write),
            ("discard", &self.discard),
            ("flush", &self.flush),
        ]
    }
}

/// What is shown of an image that is not open.
#[derive(Clone, Debug, Default)]
pub(super) struct Header {
    /// Bytes of the virtual disk, 0 when the header makes no sense.
    pub(super) virtual_size: u64,
    /// Bytes in a cluster, 0 when the header makes no sense.
    pub(super) cluster_size: u64,
    /// The name of its external data file.
    pub(super) data_file: Option<Vec<u8>>,
    /// It is encrypted, or based on what may be.
    pub(super) may_be_encrypted: bool,
}

#[derive(Default)]
struct Slot {
    open: Option<Opened>,
    handles: u32,
    /// The handles bypass the page cache. One way for all handles of a node, the first one's: pages
    /// that one handle caches while another writes past the cache could stay stale for good.
    direct: bool,
    /// The file as we left it at the last close, and those of its chain; what the kernel has cached
    /// since then holds as long as the stamps do.
    closed: Option<Vec<Stamp>>,
    /// Somebody else has changed the file, and the kernel was not told to drop what it has cached.
    stale: bool,
    /// When the kernel was told so with a handle that may still be on its way to whom it is for. It drops
    /// nothing before it gets there.
    told: Option<Instant>,
}

/// What [`Node::look`] finds.
pub(super) enum Look<R> {
    /// No image is open.
    Closed,
    /// It is being opened or closed.
    Busy,
    /// One is open, and this is what was asked of it.
    Open(R),
}

/// So long at most the answer to an open is on its way.
const ON_ITS_WAY: Duration = Duration::from_secs(10);

/// How long `status` waits for an image that is being opened or closed.
const PATIENCE: Duration = Duration::from_millis(200);

pub(super) struct Opened {
    served: Arc<Served>,
    file: Arc<HostFile>,
    /// What it needs beside itself, held as long as it is open.
    files: Arc<Files>,
    /// While it is writable.
    writing: Option<Writing>,
}

/// An open image as requests have it. Each that goes on without the slot has one more of them, so
/// that who closes the image under its hands can wait for it.
struct Served {
    image: Arc<Image>,
}

/// What a handle asks for.
#[derive(Clone, Copy, Debug)]
pub struct Opening {
    /// It will write.
    pub write: bool,
    /// It is better off without the page cache.
    pub direct: bool,
}

/// Who opens an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opener {
    /// The kernel, which hears of the [`HandleMode`].
    Kernel,
    /// A verb of ours.
    Verb,
}

/// What is to be opened.
pub(super) struct Found {
    /// The name of the image, relative to the image directory.
    pub(super) path: PathBuf,
    /// The file.
    pub(super) place: File,
    /// The backing file that it was made with, where it is an overlay of ours.
    pub(super) base: Option<PathBuf>,
    /// It may be written to, now or later.
    pub(super) may_write: bool,
}

/// What a new handle gets.
#[derive(Clone, Copy, Debug)]
pub struct HandleMode {
    /// What the kernel has cached of the file is still right.
    pub keep_cache: bool,
    /// The handle bypasses the page cache.
    pub direct: bool,
}

impl Node {
    pub(super) fn new(ino: u64, id: HostId, directory: bool, name: PathBuf) -> Self {
        Node {
            ino,
            id,
            directory,
            names: Mutex::new(vec![name]),
            slot: RwLock::default(),
            has_image: AtomicBool::new(false),
            size_change: Mutex::default(),
            header: Mutex::default(),
            logged: Mutex::default(),
            times: KeptTimes::default(),
            lost: AtomicBool::new(false),
            // Who had this file as another node may have set some.
            unsynced_attributes: Mutex::new(true),
            io: OnceLock::new(),
        }
    }

    /// The inode number. None is ever used twice.
    pub fn ino(&self) -> u64 {
        self.ino
    }

    /// Whether it is a directory; everything else is an image.
    pub fn is_directory(&self) -> bool {
        self.directory
    }

    pub(super) fn id(&self) -> HostId {
        self.id
    }

    /// The latest name on the host, relative to the image directory.
    pub(super) fn path(&self) -> PathBuf {
        self.names.lock().last().cloned().unwrap_or_default()
    }

    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.names.lock().clone()
    }

    /// The name under the mount point.
    pub fn raw_path(&self) -> PathBuf {
        let path = self.path();
        if self.directory { path } else { names::raw_path(&path) }
    }

    pub(super) fn add_name(&self, name: PathBuf) {
        let mut names = self.names.lock();
        if names.last() != Some(&name) {
            names.retain(|known| *known != name);
            names.push(name);
        }
    }

    /// Takes a name away, unless it is the last one: an open file keeps its name for the log.
    pub(super) fn remove_name(&self, name: &Path) {
        let mut names = self.names.lock();
        if names.len() > 1 {
            names.retain(|known| known != name);
        }
    }

    /// Names that lie in `from`, or are it, now lie in `to`.
    pub(super) fn move_names(&self, from: &Path, to: &Path) {
        for name in self.names.lock().iter_mut() {
            if let Ok(rest) = name.strip_prefix(from) {
                *name = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            }
        }
    }

    /// Logs what went wrong, unless that was the last thing logged of this file. A host without
    /// space is one thing, whatever for the space was.
    pub fn log(&self, error: &Error) {
        let line = format!("{}: {error}", self.path().display());
        let full = Some(error.errno()).filter(|code| matches!(*code, libc::ENOSPC | libc::EDQUOT));
        let mut logged = self.logged.lock();
        let is_same = |last: &Logged| last.line == line || full.is_some() && last.full == full;
        if !logged.as_ref().is_some_and(is_same) {
            log::error!("{line}");
            *logged = Some(Logged { line, full });
        }
    }

    /// What was logged no longer holds: the image was opened.
    pub(super) fn is_well(&self) {
        *self.logged.lock() = None;
    }

    /// The last line that was logged of this file.
    pub(super) fn last_logged(&self) -> Option<String> {
        self.logged.lock().as_ref().map(|logged| logged.line.clone())
    }

    /// Closing its image has failed: what was written may be lost, which the next sync is to tell.
    pub(super) fn has_lost(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// The guest changes its disk: times that were set no longer hold.
    pub fn is_changed(&self) {
        self.times.forget();
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// Those of [`Image::flush`]; `EIO`, once, where the image was closed since the last sync and that
    /// failed.
    pub fn sync(&self) -> Result<()> {
        let lost = match self.lost.swap(false, Ordering::AcqRel) {
            true => Err(lost()),
            false => Ok(()),
        };
        self.with_image(|image| self.io().flush.count(0, || image.flush())).and(lost)
    }

    /// Where its requests are counted.
    pub fn io(&self) -> &Io {
        self.io.get_or_init(Box::default)
    }

    /// What its requests have come to.
    pub(super) fn io_counts(&self) -> IoCounts {
        self.io.get().map_or_else(IoCounts::default, |io| IoCounts {
            read: io.read.get(),
            write: io.write.get(),
            discard: io.discard.get(),
            flush: io.flush.get(),
        })
    }

    /// Whether a request would have to wait for an open or a close of this image, or for a change of its
    /// whole disk.
    pub fn is_busy(&self) -> bool {
        let is_held = |slot: &Slot| slot.open.as_ref().is_some_and(|open| open.image().is_held());
        self.slot.try_read().is_none_or(|slot| is_held(&slot))
    }

    /// Whether opening it may take as long as trying a key does, as far as its header was looked at.
    pub fn may_need_unlocking(&self) -> bool {
        let is_open = self.slot.try_read().is_some_and(|slot| slot.open.is_some());
        let header = self.header.lock();
        !is_open && header.as_ref().is_some_and(|(_, header)| header.may_be_encrypted)
    }

    /// Runs `verb` on the open image. May wait while the image is being opened for writing.
    ///
    /// # Errors
    /// Those of `verb`; `EIO` when the image is gone after it could not be opened again.
    pub fn with_image<R>(&self, verb: impl FnOnce(&Image) -> Result<R>) -> Result<R> {
        let slot = self.slot.read();
        let opened = slot.open.as_ref().ok_or_else(gone)?;
        if !opened.is_writable() {
            // Held to the end: the switch to a writable image ends this one.
            return verb(opened.image());
        }
        // A writable image stays until the last handle is closed, and this request has one. A long
        // flush must not keep others from opening the file.
        let served = Arc::clone(&opened.served);
        drop(slot);
        verb(&served.image)
    }

    /// What `look` finds at the image while that is open; nothing while it is being opened or closed,
    /// since this waits for nobody.
    pub fn try_peek<R>(&self, look: impl FnOnce(&Image) -> R) -> Option<R> {
        let slot = self.slot.try_read()?;
        Some(look(slot.open.as_ref()?.image()))
    }

    /// The external data file while that is open.
    pub fn data_file(&self) -> Option<Arc<HostFile>> {
        let slot = self.slot.read();
        slot.open.as_ref()?.files.data.as_ref().map(|data| Arc::clone(&data.file))
    }

    /// Whether its image is open for writing, whether or not that takes writes still.
    pub fn is_open_for_writing(&self) -> bool {
        self.slot.read().open.as_ref().is_some_and(Opened::is_writable)
    }

    /// What the host says of the external data file while that is open.
    pub(super) fn look_at_data_file(&self) -> Option<Metadata> {
        let slot = self.slot.try_read()?;
        let data = slot.open.as_ref()?.files.data.as_ref()?;
        data.file.file().metadata().ok()
    }

    /// The state of the image, where one is open, and how many handles there are; does not wait long
    /// for one that is being opened or closed.
    pub(super) fn look<R>(&self, look: impl FnOnce(&Image, bool, u32) -> R) -> Look<R> {
        let Some(slot) = self.slot.try_read_for(PATIENCE) else { return Look::Busy };
        match &slot.open {
            Some(opened) => Look::Open(look(opened.image(), opened.is_writable(), slot.handles)),
            None => Look::Closed,
        }
    }

    /// The host file while it is open, for what takes long: nobody waits for it meanwhile.
    pub(super) fn open_file(&self) -> Option<Arc<HostFile>> {
        self.slot.read().open.as_ref().map(|opened| Arc::clone(&opened.file))
    }

    /// The host file and the image while they are open. Waits where they are being opened again or
    /// closed.
    pub(super) fn peek<R>(&self, look: impl FnOnce(&Image, &File, bool) -> R) -> Option<R> {
        if !self.has_image.load(Ordering::Acquire) {
            return None;
        }
        let slot = self.slot.read();
        let opened = slot.open.as_ref()?;
        Some(look(opened.image(), opened.file.file(), opened.is_writable()))
    }

    /// Counts a handle in, opening the image for it where that is due. `find` finds the file. Where
    /// files are `layered`, they are never written themselves, and what is found for writing is
    /// another file than what may have been found for reading before.
    pub(super) fn open(
        &self,
        opener: Opener,
        how: Opening,
        options: &Options,
        chains: &Chains,
        layered: bool,
        find: impl FnOnce() -> Result<Found>,
    ) -> Result<HandleMode> {
        if how.write
            && !layered
            && let Some(user) = chains.user_of(self.id)
        {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!(
                    "it is a backing or data file of {}, which is open; close that first",
                    user.display()
                ),
            ));
        }
        let options = &Options { label: self.path().display().to_string(), ..options.clone() };
        let mut slot = self.slot.write();
        match &slot.open {
            None if slot.handles > 0 => return Err(gone()),
            None => {
                self.times.forget();
                let (opened, stamp) = self.open_found(&find()?, how.write, options, chains)?;
                slot.stale |= slot.closed != Some(opened.stamps(stamp));
                slot.open = Some(opened);
                slot.direct = how.direct;
                self.has_image.store(true, Ordering::Release);
            }
            Some(opened) if how.write && !opened.is_writable() => {
                let above = if layered { Some(find()?) } else { None };
                match above.filter(|found| !opened.is_open_on(&found.place)) {
                    Some(found) => {
                        slot.move_up(self.open_found(&found, true, options, chains)?.0);
                    }
                    None => slot.make_writable(options, chains, &self.path())?,
                }
            }
            Some(opened) if how.write => opened.takes_writes()?,
            Some(_) => {}
        }
        slot.handles += 1;
        if slot.stale && opener == Opener::Kernel {
            slot.stale = false;
            slot.told = Some(Instant::now());
        }
        let has_dropped = slot.told.is_none_or(|told| told.elapsed() > ON_ITS_WAY);
        Ok(HandleMode { keep_cache: has_dropped, direct: slot.direct })
    }

    /// The kernel did not hear of the [`HandleMode`] that it was to get.
    pub fn was_not_told(&self) {
        self.slot.write().stale = true;
    }

    fn open_found(
        &self,
        found: &Found,
        write: bool,
        options: &Options,
        chains: &Chains,
    ) -> Result<(Opened, Stamp)> {
        let options = Options { writable: found.may_write, ..options.clone() };
        Opened::new(found, write, &options, chains)
    }

    /// Counts a handle out and closes the image with the last one.
    pub(super) fn release(&self) -> Result<()> {
        let mut slot = self.slot.write();
        slot.handles = slot.handles.saturating_sub(1);
        if slot.handles > 0 {
            return Ok(());
        }
        // Whoever had them has given them back.
        slot.told = None;
        self.close(&mut slot)
    }

    /// Closes the image whatever handles there are, as soon as the requests that are under way are
    /// done; later ones fail. Where they are not done by `deadline`, it is left as by a crash, but
    /// with all in it that was written by then.
    ///
    /// # Errors
    /// Those of [`Image::close`]; `TimedOut` for requests that are not done.
    pub(super) fn force_close(&self, deadline: Instant) -> Result<()> {
        let mut slot = match self.slot.try_write_until(deadline) {
            Some(slot) => slot,
            // Who reads an image that is only read does not give it up before the host has answered.
            None if self.is_only_read() => return Err(not_done()),
            // Where it is being opened or closed that comes to its end first, however long it takes: what
            // is being closed is not all in the file yet.
            None => self.slot.write(),
        };
        slot.closed = None;
        let Some(opened) = slot.open.take() else { return Ok(()) };
        self.has_image.store(false, Ordering::Release);
        // A request that is under way may wait for one that waits for the slot.
        drop(slot);
        opened.image().begin_closing();
        if opened.is_idle_by(deadline) {
            // A data file stays locked as long as it is open: the kernel itself may have it, for somebody
            // who goes on with it when this process is gone.
            return opened.finish(&self.times).and(unlock(opened.file.file()));
        }
        // What is still under way must not meet the end of the file while that is cut off.
        opened.image().flush().and(Err(not_done()))
    }

    /// Whether its image is open for reading alone, as far as nobody is opening or closing it.
    fn is_only_read(&self) -> bool {
        let slot = self.slot.try_read_recursive();
        slot.is_some_and(|slot| slot.open.as_ref().is_some_and(|open| !open.is_writable()))
    }

    fn close(&self, slot: &mut Slot) -> Result<()> {
        let closed = slot.close(&self.times);
        // It may have changed since with no other stamp.
        if let Some((stamp, _)) = &mut *self.header.lock() {
            *stamp = None;
        }
        self.has_image.store(false, Ordering::Release);
        closed
    }
}

fn not_done() -> Error {
    let errno = std::io::Error::from_raw_os_error(libc::ETIMEDOUT);
    Error::io("requests for it are still under way: it is left as by a crash", errno)
}

fn lost() -> Error {
    let errno = std::io::Error::from_raw_os_error(libc::EIO);
    Error::io("closing the image failed before: what was written then may be lost", errno)
}

fn gone() -> Error {
    let errno = std::io::Error::from_raw_os_error(libc::EIO);
    Error::io("the image was closed after an error; close the file and open it again", errno)
}

impl Slot {
    /// Replaces an image that is only read by the same one, writable; on failure it is only read
    /// again. The lock on the file is never given up in between.
    fn make_writable(&mut self, options: &Options, chains: &Chains, name: &Path) -> Result<()> {
        let Some(opened) = &self.open else { return Err(gone()) };
        let (file, before) = (Arc::clone(&opened.file), Arc::clone(opened.image()));
        let files = Arc::clone(&opened.files);
        lock_for_writing(file.file())?;
        let data = files.data.as_ref().map(|data| data.file.file());
        let release = || {
            let to_read = Some(Access::Read);
            let data = data.map(|data| image_lock::release_down_to(data, to_read));
            image_lock::release_down_to(file.file(), to_read).and(data.unwrap_or(Ok(())))
        };
        if let Some(Err(e)) = data.map(lock_for_writing) {
            release()?;
            return Err(e.context("data file"));
        }
        if let Err(e) = before.close() {
            log::warn!("closing an image that was only read: {e}");
        }
        self.open = None;
        let writable = chains
            .note_writing(file.file(), name)
            .and_then(|writing| Opened::on(&file, Some(writing), options, &files));
        match writable {
            Ok(opened) => {
                opened.image().adopt_views(&before);
                self.open = Some(opened);
                Ok(())
            }
            Err(e) => {
                release()?;
                let opened = Opened::on(&file, None, options, &files)?;
                opened.image().adopt_views(&before);
                self.open = Some(opened);
                Err(e)
            }
        }
    }

    /// Replaces an image that is only read by one that is based on it. Views of its snapshots stay:
    /// they have files of their own, which the new one keeps locked.
    fn move_up(&mut self, above: Opened) {
        if let Some(below) = self.open.replace(above)
            && let Err(e) = below.close()
        {
            log::warn!("closing an image that was only read: {e}");
        }
    }

    fn close(&mut self, times: &KeptTimes) -> Result<()> {
        let Some(opened) = self.open.take() else { return Ok(()) };
        let closed = opened.finish(times);
        // Taken before the lock goes with the file.
        let stamp = opened.file.file().metadata().ok().map(|m| Stamp::of(&m));
        let stamp = stamp.filter(|_| closed.is_ok() && !self.direct);
        self.closed = stamp
            .map(|stamp| opened.stamps(stamp))
            .filter(|stamps| stamps.iter().all(|stamp| stamp.is_fine() || stamp.is_old()));
        closed.and(opened.unlock())
    }
}

impl Opened {
    /// Opens what was found, which `options` say may be written to, for writing or not.
    pub(super) fn new(
        found: &Found,
        write: bool,
        options: &Options,
        chains: &Chains,
    ) -> Result<(Opened, Stamp)> {
        let Found { path, place, base, .. } = found;
        let access = if write { Access::Write } else { Access::Read };
        let file = open_host_file(place, write, options.writable)?;
        image_lock::acquire(&file, None, access)?;
        let metadata = file.metadata().map_err(|e| Error::io("looking at the image file", e))?;
        let file = Arc::new(HostFile::new(file));
        let opened =
            chains.open((path, base.as_deref()), &file, write, options).and_then(|files| {
                let files = Arc::new(files);
                let writing = write.then(|| chains.note_writing(file.file(), path)).transpose();
                writing
                    .and_then(|writing| Opened::on(&file, writing, options, &files))
                    .inspect_err(|_| unlock_data(&files))
            });
        match opened {
            Ok(opened) => Ok((opened, Stamp::of(&metadata))),
            Err(e) => {
                unlock(file.file())?;
                Err(e)
            }
        }
    }

    /// Opens the image in `file`, for writing where that was noted.
    fn on(
        file: &Arc<HostFile>,
        writing: Option<Writing>,
        options: &Options,
        files: &Arc<Files>,
    ) -> Result<Opened> {
        let options = Options { writable: writing.is_some(), ..options.clone() };
        let beside = Beside {
            backing: files.chain.as_ref().map(|chain| Arc::clone(&chain.backing)),
            data: files.data.as_ref().map(|data| Arc::clone(&data.file) as _),
            cipher: files.cipher.clone(),
        };
        let image = Image::open_with(Arc::clone(file) as _, &options, beside)?;
        let served = Arc::new(Served { image });
        let (file, files) = (Arc::clone(file), Arc::clone(files));
        let opened = Opened { served, file, files, writing };
        if opened.is_writable()
            && let Err(e) = opened.takes_writes()
        {
            opened.image().close()?;
            return Err(e);
        }
        Ok(opened)
    }

    fn is_writable(&self) -> bool {
        self.writing.is_some()
    }

    /// Waits until no request has the image any more; `false` where one still has at `deadline`.
    fn is_idle_by(&self, deadline: Instant) -> bool {
        while Arc::strong_count(&self.served) > 1 {
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Whether it is this file that is open.
    fn is_open_on(&self, place: &File) -> bool {
        let id = |file: &File| file.metadata().ok().map(|metadata| HostId::of(&metadata));
        id(self.file.file()) == id(place)
    }

    pub(super) fn image(&self) -> &Arc<Image> {
        &self.served.image
    }

    /// Closes the image, and then gives the lock up.
    pub(super) fn close(&self) -> Result<()> {
        let closed = self.image().close();
        closed.and(self.unlock())
    }

    /// Closes the image, whose file has `times` from then on; an error too where it became read-only
    /// while it was open.
    fn finish(&self, times: &KeptTimes) -> Result<()> {
        let failure = self.image().failure().map_or(Ok(()), Err);
        let data = self.files.data.as_ref().map(|data| data.file.file());
        times.forget_if_written(data.and_then(|data| data.metadata().ok()).as_ref());
        let closed = self.image().close();
        // One that was only read has them, and may not be the one that was meant: there may be an
        // overlay by now.
        if self.is_writable() {
            for file in std::iter::once(self.file.file()).chain(data) {
                if let Err(e) = times.apply(file) {
                    log::warn!("setting the times of an image that is closed: {e}");
                }
            }
        }
        closed.and(failure)
    }

    /// The stamp of the image file, followed by those of its data file and of its chain.
    fn stamps(&self, own: Stamp) -> Vec<Stamp> {
        let data = self.files.data.iter().filter_map(|data| data.file.file().metadata().ok());
        let chain = self.files.chain.iter().flat_map(|chain| chain.stamps.iter().copied());
        std::iter::once(own).chain(data.map(|m| Stamp::of(&m))).chain(chain).collect()
    }

    fn unlock(&self) -> Result<()> {
        unlock_data(&self.files);
        unlock(self.file.file())
    }

    /// Fails when the image takes no writes: it is marked as corrupt, or something went wrong for
    /// good since it was opened.
    fn takes_writes(&self) -> Result<()> {
        if self.image().is_writable() {
            return Ok(());
        }
        let reason = self.image().status()?.health;
        Err(Error::new(ErrorKind::ReadOnly, format!("the image is read-only: {reason}")))
    }
}

/// Opens an image or data file for writing wherever that may be needed later: a lock cannot move
/// from one open file description to another, so a handle that comes to write could not take it
/// over.
pub(super) fn open_host_file(place: &File, write: bool, may_write: bool) -> Result<File> {
    let failed = |e| Error::io("opening the file", e);
    if !may_write {
        return host::open_file(place, false).map_err(failed);
    }
    match host::open_file(place, true) {
        Ok(file) => Ok(file),
        Err(e) if write => Err(failed(e)),
        Err(_) => host::open_file(place, false).map_err(failed),
    }
}

/// Gives the lock up at once: a process that we are just starting may still share the descriptor.
fn unlock(file: &File) -> Result<()> {
    image_lock::release_down_to(file, None)
}

fn unlock_data(files: &Files) {
    if let Some(Err(e)) = files.data.as_ref().map(|data| unlock(data.file.file())) {
        log::warn!("unlocking a data file: {e}");
    }
}

/// Locks a file for writing that is locked for reading.
fn lock_for_writing(file: &File) -> Result<()> {
    is_open_for_writing(file)?;
    image_lock::acquire(file, Some(Access::Read), Access::Write)
}

fn is_open_for_writing(file: &File) -> Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: F_GETFL takes no pointer; the descriptor is open.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags & libc::O_ACCMODE == libc::O_RDWR {
        return Ok(());
    }
    match host::open_file(file, true) {
        Err(e) => Err(Error::io("opening the image file for writing", e)),
        Ok(_) => Err(Error::new(
            ErrorKind::InUse,
            "the image became writable while it was open; close its readers first",
        )),
    }
}
