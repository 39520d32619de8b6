//! The directory of images as a tree of nodes: names, inode numbers, which image is open how often,
//! and what may be opened at all.
//!
//! A host file is a node for as long as the kernel knows it. Nothing is read before it is asked for,
//! so a directory of ten thousand images costs nothing to mount. Names are looked up on the host
//! each time; nothing of the tree is cached here but who is who. FUSE is not known here.
//!
//! What is shown of an image:
//! - its size is the virtual size, 0 when its header makes no sense (opening it tells why);
//! - blocks, times, mode and owner are those of the image file; options may override the owner and
//!   take mode bits away; the blocks of an external data file count, and so do its times where they
//!   are later; a time that was set while the image is open is shown until the guest writes again;
//! - where it has a POSIX access control list, the mode says what the owner's group may indeed, and others
//!   whoever they are;
//! - symbolic links, devices and other files are not shown.
//!
//! Lock order: a node's slot, the lock of names; the node table is a leaf, and so is a node's list of
//! names.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

mod acl;
mod alone;
mod chain;
mod change;
mod create;
mod host;
mod keys;
mod metrics;
mod names;
mod node;
mod overlay;
mod rename;
mod snapshots;
mod status;
#[cfg(test)]
mod tests;
mod times;

pub use alone::Alone;
pub use change::AttributeChange;
pub use create::{NewImage, create_filled_image, create_image};
pub use host::{HostSpace, SetTime};
pub use keys::{Keys, Prompt, Typed};
pub use metrics::metrics;
pub use node::{HandleMode, Io, IoCounts, Node, Opening};
pub use overlay::OverlayOptions;
pub use rename::Requester;
pub use status::{ImageStatus, MountStatus, Refusal};
pub use times::Times;

use crate::error::{Error, Result};
use crate::image::{self, Image};
use crate::storage::{self, HostFile};
use chain::Chains;
use host::{HostId, Root, Stamp};
use node::{Found, Header, Opener};
use overlay::Overlays;

/// The inode number of the image directory itself.
pub const ROOT: u64 = 1;
/// Inode numbers below are for files that are no image.
const FIRST_INO: u64 = 16;
/// So many images are closed at once when all are.
const CLOSERS: usize = 8;

/// What holds for all images of one mount.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Nothing is ever written.
    pub read_only: bool,
    /// The only image that is shown, by its name in the image directory; `None` shows all of them.
    pub only: Option<OsString>,
    /// The owner that is shown instead of the image file's.
    pub uid: Option<u32>,
    /// The group that is shown instead of the image file's.
    pub gid: Option<u32>,
    /// Mode bits that are never shown.
    pub umask: u32,
    /// Where overlays go that are written instead of the images; `None` writes to the images.
    pub overlay: Option<OverlayOptions>,
    /// Directories beside the image directory that backing and data files may lie in.
    pub allow: Vec<PathBuf>,
    /// Where the keys of encrypted images come from.
    pub keys: Keys,
    /// How images are opened; `writable` is decided here.
    pub image: image::Options,
    /// What new images are like.
    pub create: image::CreateOptions,
    /// The kernel knows that this process is what devices may wait for; only for the status.
    pub io_flusher: bool,
}

/// The tree of images beneath one directory.
pub struct Catalog {
    root: Root,
    source: PathBuf,
    chains: Chains,
    overlays: Option<Overlays>,
    options: Options,
    nodes: RwLock<Nodes>,
    /// Held alone while names change on the host and in the nodes, so that nobody who looks for a file
    /// by its name finds the one without the other.
    names: RwLock<()>,
    /// Closes that failed: data may be lost, and the exit code says so.
    close_errors: AtomicU64,
    /// Who closes all images holds it: one that comes second must not end the process under the first.
    closing: Mutex<()>,
    /// All images are being closed, or have been: none is opened or made any more.
    ended: AtomicBool,
}

struct Nodes {
    known: HashMap<u64, Known>,
    by_id: HashMap<HostId, u64>,
    next: u64,
}

struct Known {
    node: Arc<Node>,
    /// How often the kernel was told of it and has not forgotten it.
    lookups: u64,
}

/// What is shown of a file or directory.
#[derive(Clone, Debug)]
pub struct Attributes {
    /// The inode number.
    pub ino: u64,
    /// Whether it is a directory.
    pub directory: bool,
    /// Bytes in the virtual disk; those of the host's directory for a directory.
    pub size: u64,
    /// Bytes in a cluster, 0 where it is unknown.
    pub cluster_size: u64,
    /// Whether an image is open in it, so that nobody else changes it.
    pub open: bool,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The permission bits.
    pub mode: u32,
    /// The file on the host, for blocks and times.
    pub host: Metadata,
    /// Times to show instead of the host's.
    pub times: Times,
    /// Its external data file, for the same; `None` where there is none to look at.
    pub data: Option<Metadata>,
}

/// A name that stands for something.
struct Named {
    /// Its path on the host, relative to the image directory.
    path: PathBuf,
    place: File,
    metadata: Metadata,
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// The name under the mount point.
    pub name: OsString,
    /// Whether it is a directory.
    pub directory: bool,
}

impl Catalog {
    /// The tree beneath `source`, which stays open from now on; no symbolic link on its path is
    /// followed.
    ///
    /// # Errors
    /// Those of the host.
    pub fn new(source: &Path, options: Options) -> Result<Catalog> {
        let failed = |e| Error::io(format!("opening the image directory {}", source.display()), e);
        let root = Root::open_real(source).map_err(failed)?;
        let id = HostId::of(&root.directory().metadata().map_err(failed)?);
        let node = Arc::new(Node::new(ROOT, id, true, PathBuf::new()));
        let nodes = Nodes {
            known: HashMap::from([(ROOT, Known { node, lookups: 1 })]),
            by_id: HashMap::from([(id, ROOT)]),
            next: FIRST_INO,
        };
        Ok(Catalog {
            source: root.path().map_err(failed)?,
            chains: Chains::new(&root, &options.allow, options.keys.clone())?,
            overlays: options
                .overlay
                .as_ref()
                .map(|overlay| Overlays::new(&root, overlay))
                .transpose()?,
            root,
            options,
            nodes: RwLock::new(nodes),
            names: RwLock::default(),
            close_errors: AtomicU64::new(0),
            closing: Mutex::new(()),
            ended: AtomicBool::new(false),
        })
    }

    /// Paths that lead to exactly the directories that images and what they are based on lie in, as
    /// they were opened.
    pub fn directories(&self) -> Vec<PathBuf> {
        self.chains.directories().map(|root| host::path_of(root.directory())).collect()
    }

    /// The same of the directory that overlays lie in, if there are any.
    pub fn overlay_directory(&self) -> Option<PathBuf> {
        let overlays = self.overlays.as_ref()?;
        Some(host::path_of(overlays.root().directory()))
    }

    /// The node that the kernel knows as `ino`.
    ///
    /// # Errors
    /// `ESTALE` when it does not any more.
    pub fn node(&self, ino: u64) -> Result<Arc<Node>> {
        let nodes = self.nodes.read();
        nodes.known.get(&ino).map(|known| Arc::clone(&known.node)).ok_or_else(stale)
    }

    /// Finds `name` in a directory; the kernel knows it from now on, until [`Catalog::forget`].
    ///
    /// # Errors
    /// `ENOENT`, and those of the host.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Result<Attributes> {
        let parent = self.node(parent)?;
        let names = self.names.read();
        let found = self.find(&parent, name)?;
        let node = self.remember(&found.metadata, found.path.clone());
        drop(names);
        let (place, metadata) = self.with_overlay(&node, found)?;
        self.shown(&node, &place, metadata)
    }

    /// Has the host read what a look at the file `name` in `directory` will need, so that it is in
    /// memory by then. What fails here will fail then.
    pub fn read_ahead(&self, directory: u64, name: &OsStr) {
        let Ok(parent) = self.node(directory) else { return };
        let names = self.names.read();
        let found = self.find(&parent, name);
        drop(names);
        if let Ok(found) = found
            && found.metadata.is_file()
            && let Ok(file) = host::open_file(&found.place, false)
        {
            let _ = Image::summarize(&HostFile::new(file));
        }
    }

    /// What is shown as `name` in `parent`. It is looked for in the directory that the node is, whatever
    /// has that one's names by now: the kernel has looked who may search this one.
    fn find(&self, parent: &Node, name: &OsStr) -> Result<Named> {
        if !parent.is_directory() {
            return Err(errno("looking up a name", libc::ENOTDIR));
        }
        if !names::is_one(name) {
            return Err(errno("looking up what is no name", libc::EINVAL));
        }
        let Named { path: directory, place, .. } = self.place_among_names(parent)?;
        let within = Root::at(place);
        let look = |name: &OsStr| look_in(&within, name, directory.join(name));
        if let Some(image) = names::image_name(name)
            && self.shows(parent, &image)
        {
            match look(&image) {
                Ok(found) if found.metadata.is_file() => return Ok(found),
                Ok(_) => {}
                // The image's name is longer than its raw file's.
                Err(e) if matches!(e.errno(), libc::ENOENT | libc::ELOOP | libc::ENAMETOOLONG) => {}
                Err(e) => return Err(e),
            }
        }
        if !self.shows(parent, name) {
            return Err(errno("looking up a name", libc::ENOENT));
        }
        match look(name) {
            Ok(found) if found.metadata.is_dir() => Ok(found),
            Ok(_) => Err(errno("looking up a name", libc::ENOENT)),
            Err(e) if e.errno() == libc::ELOOP => Err(errno("looking up a name", libc::ENOENT)),
            Err(e) => Err(e),
        }
    }

    /// Whether the host's `name` in `directory` may be seen at all.
    fn shows(&self, directory: &Node, name: &OsStr) -> bool {
        directory.ino() != ROOT || self.options.only.as_deref().is_none_or(|only| only == name)
    }

    /// Fails where names and what they stand for stay as they are.
    fn names_may_change(&self) -> Result<()> {
        match (&self.options.only, &self.overlays) {
            (Some(_), _) => {
                Err(errno("changing names in the mount of a single image", libc::EPERM))
            }
            (None, Some(_)) => Err(errno("changing names above overlays", libc::EROFS)),
            (None, None) => Ok(()),
        }
    }

    fn place(&self, path: &Path) -> Result<Named> {
        look_in(&self.root, path.as_os_str(), path.to_owned())
    }

    fn remember(&self, metadata: &Metadata, path: PathBuf) -> Arc<Node> {
        let id = HostId::of(metadata);
        let mut nodes = self.nodes.write();
        let ino = nodes.by_id.get(&id).copied();
        if let Some(known) = ino.and_then(|ino| nodes.known.get_mut(&ino)) {
            known.lookups += 1;
            known.node.add_name(path);
            return Arc::clone(&known.node);
        }
        let ino = nodes.next;
        nodes.next += 1;
        let node = Arc::new(Node::new(ino, id, metadata.is_dir(), path));
        nodes.known.insert(ino, Known { node: Arc::clone(&node), lookups: 1 });
        nodes.by_id.insert(id, ino);
        node
    }

    /// Keeps a node that the kernel may forget, until [`Catalog::forget`].
    pub fn hold(&self, node: &Node) {
        if let Some(known) = self.nodes.write().known.get_mut(&node.ino()) {
            known.lookups += 1;
        }
    }

    /// The kernel, or who holds a node, has forgotten `lookups` of its lookups.
    pub fn forget(&self, ino: u64, lookups: u64) {
        let mut nodes = self.nodes.write();
        let Some(known) = nodes.known.get_mut(&ino) else { return };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups > 0 || ino == ROOT {
            return;
        }
        let id = known.node.id();
        nodes.known.remove(&ino);
        if nodes.by_id.get(&id) == Some(&ino) {
            nodes.by_id.remove(&id);
        }
    }

    /// What is opened and shown of a node: its overlay, where there is one, else its file.
    fn place_of(&self, node: &Node) -> Result<(File, Metadata)> {
        self.with_overlay(node, self.own_place(node)?)
    }

    /// The node's file by any of its names, as long as it still is the same file.
    fn own_place(&self, node: &Node) -> Result<Named> {
        let _names = self.names.read();
        self.place_among_names(node)
    }

    /// The same for who holds the lock of names. Its path is the name that it was found by, which need
    /// not be the node's latest.
    fn place_among_names(&self, node: &Node) -> Result<Named> {
        if node.ino() == ROOT {
            // It is held open, so it can be no other one. On overlayfs it changes who it is when the first
            // file is made in it.
            return self.place(Path::new(""));
        }
        for path in node.paths().iter().rev() {
            match self.place(path) {
                Ok(found) if HostId::of(&found.metadata) == node.id() => return Ok(found),
                Ok(_) => {}
                Err(e) if matches!(e.errno(), libc::ENOENT | libc::ENOTDIR | libc::ELOOP) => {}
                Err(e) => return Err(e),
            }
        }
        Err(stale())
    }

    /// The overlay of a node whose own file is `own`, or that where there is none, or none that could be
    /// opened: then the image is shown still.
    fn with_overlay(&self, node: &Node, own: Named) -> Result<(File, Metadata)> {
        let Named { path, place, metadata } = own;
        match &self.overlays {
            Some(overlays) if !node.is_directory() => match overlays.find(&metadata, &path) {
                Ok(None) => Ok((place, metadata)),
                Ok(Some(found)) => Ok((found.place, found.metadata)),
                Err(e) if e.kind() == crate::ErrorKind::Unsupported => {
                    node.log(&e);
                    Ok((place, metadata))
                }
                Err(e) => Err(e),
            },
            _ => Ok((place, metadata)),
        }
    }

    /// Before anything of a node is changed: where images stay as they are, it gets its overlay.
    ///
    /// # Errors
    /// `EROFS` for a directory where images stay as they are; those of the host.
    fn make_changeable(&self, node: &Node) -> Result<()> {
        match &self.overlays {
            None => Ok(()),
            Some(_) if node.is_directory() => {
                Err(errno("changing a directory above overlays", libc::EROFS))
            }
            Some(overlays) => {
                self.goes_on()?;
                let own = self.own_place(node)?;
                overlays.make(&own.path, &own.place)
            }
        }
    }

    /// What is to be opened of a node, and whether that may be written to.
    fn to_open(&self, node: &Node) -> Result<Found> {
        let Named { path, place, metadata } = self.own_place(node)?;
        let Some(overlays) = &self.overlays else {
            return Ok(Found { path, place, base: None, may_write: !self.options.read_only });
        };
        match overlays.find(&metadata, &path)? {
            None => Ok(Found { path, place, base: None, may_write: false }),
            Some(overlay) => {
                overlays.check(&overlay)?;
                let base = Some(overlays.base(&overlay));
                Ok(Found { path, place: overlay.place, base, may_write: !self.options.read_only })
            }
        }
    }

    /// What is shown of a node. One that is open is shown even when its name is gone.
    ///
    /// # Errors
    /// `ESTALE` when the name is another file's by now, and those of the host.
    pub fn attributes(&self, node: &Node) -> Result<Attributes> {
        let look = |image: &Image, file: &File, _writable: bool| {
            let host = file.metadata().map_err(|e| Error::io("looking at an image file", e))?;
            let mode = acl::mode_of(file, host.mode());
            Ok((image_header(image), host, mode))
        };
        // Names above overlays do not go.
        let open = if self.overlays.is_none() { node.peek(look) } else { None };
        if let Some(open) = open {
            let (header, host, mode) = open?;
            return Ok(self.attributes_of(node, header, host, mode, true));
        }
        let (place, metadata) = self.place_of(node)?;
        self.shown(node, &place, metadata)
    }

    fn shown(&self, node: &Node, place: &File, host: Metadata) -> Result<Attributes> {
        let mode = acl::mode_of(place, host.mode());
        if node.is_directory() {
            return Ok(self.attributes_of(node, Header::default(), host, mode, false));
        }
        if let Some(header) = node.try_peek(image_header) {
            return Ok(self.attributes_of(node, header, host, mode, true));
        }
        let header = self.header(node, place, &host);
        Ok(self.attributes_of(node, header, host, mode, false))
    }

    /// What the header of an image that is not open says, read again only after a change.
    fn header(&self, node: &Node, place: &File, host: &Metadata) -> Header {
        let stamp = Stamp::of(host);
        if let Some((seen, header)) = &*node.header.lock()
            && *seen == Some(stamp)
        {
            return header.clone();
        }
        let read = host::open_file(place, false)
            .map_err(|e| Error::io("opening the image file", e))
            .and_then(|file| Image::summarize(&HostFile::new(file)));
        let header = match read {
            Ok(summary) => Header {
                virtual_size: summary.virtual_size,
                cluster_size: summary.cluster_size,
                may_be_encrypted: summary.encryption.is_some() || summary.backing.is_some(),
                data_file: summary.data_file,
            },
            Err(e) => {
                node.log(&e);
                Header::default()
            }
        };
        *node.header.lock() = Some((Some(stamp).filter(Stamp::is_old), header.clone()));
        header
    }

    fn attributes_of(
        &self,
        node: &Node,
        header: Header,
        host: Metadata,
        mode: u32,
        open: bool,
    ) -> Attributes {
        let data = match (&header.data_file, open) {
            (_, true) => node.look_at_data_file(),
            (Some(name), false) => self.chains.look_at_data_file(&node.path(), &host, name),
            (None, false) => None,
        };
        let mode_bits = if node.is_directory() { host::DIRECTORY_MODE } else { host::FILE_MODE };
        if open {
            node.times.forget_if_written(data.as_ref());
        }
        Attributes {
            ino: node.ino(),
            directory: node.is_directory(),
            size: if node.is_directory() { host.size() } else { header.virtual_size },
            cluster_size: header.cluster_size,
            open,
            uid: self.options.uid.unwrap_or(host.uid()),
            gid: self.options.gid.unwrap_or(host.gid()),
            mode: mode & mode_bits & !self.options.umask,
            times: if open { node.times.get() } else { Times::default() },
            host,
            data,
        }
    }

    /// What a directory shows, in the order of names.
    ///
    /// # Errors
    /// `ENOTDIR`, and those of the host.
    pub fn list(&self, node: &Node) -> Result<Vec<Entry>> {
        if !node.is_directory() {
            return Err(errno("listing a directory", libc::ENOTDIR));
        }
        let (place, _) = self.place_of(node)?;
        let names = host::list(&place)
            .map_err(|e| Error::io(format!("listing {}", node.path().display()), e))?;
        if !self.options.read_only && self.names_may_change().is_ok() {
            remove_abandoned(&place, &names);
        }
        let shown = |(name, directory): (OsString, bool)| match directory {
            true => Some(Entry { name, directory }),
            false => Some(Entry { name: names::raw_name(&name)?, directory }),
        };
        let seen = names.into_iter().filter(|(name, _)| self.shows(node, name));
        let mut entries: Vec<Entry> = seen.filter_map(shown).collect();
        entries.sort();
        // An image hides a directory that has the name of its raw file.
        entries.dedup_by(|later, earlier| later.name == earlier.name);
        Ok(entries)
    }

    /// The node that is shown as `name` beneath the mount point; it is known until it is forgotten
    /// once more.
    ///
    /// # Errors
    /// `EINVAL` for a name that leads elsewhere; those of [`Catalog::lookup`].
    pub fn find_node(&self, name: &Path) -> Result<Arc<Node>> {
        let mut ino = None;
        for part in name.components() {
            let std::path::Component::Normal(part) = part else {
                return Err(errno("a name that leads out of the mount", libc::EINVAL));
            };
            let found = self.lookup(ino.unwrap_or(ROOT), part);
            if let Some(directory) = ino {
                self.forget(directory, 1);
            }
            ino = Some(found?.ino);
        }
        self.node(ino.ok_or_else(|| errno("an empty name", libc::EINVAL))?)
    }

    /// Opens a node's image for one more handle of the kernel's, which is to hear of the answer;
    /// [`Catalog::release`] or [`Catalog::release_untold`] ends it. May block long.
    ///
    /// # Errors
    /// `ReadOnly` for a writer on a read-only mount, `InUse`, those of [`Image::open`] and of the
    /// host.
    pub fn open(&self, node: &Node, how: Opening) -> Result<HandleMode> {
        self.open_for(Opener::Kernel, node, how)
    }

    /// As [`Catalog::open`], for a verb: the kernel hears nothing of it.
    ///
    /// # Errors
    /// Those of [`Catalog::open`].
    pub fn open_for_verb(&self, node: &Node, write: bool) -> Result<()> {
        self.open_for(Opener::Verb, node, Opening { write, direct: false }).map(drop)
    }

    fn open_for(&self, opener: Opener, node: &Node, how: Opening) -> Result<HandleMode> {
        if node.is_directory() {
            return Err(errno("opening a directory as a file", libc::EISDIR));
        }
        if how.write && self.options.read_only {
            return Err(read_only());
        }
        let layered = self.overlays.is_some();
        let ready = if how.write { self.make_changeable(node) } else { Ok(()) };
        let opened = ready.and_then(|()| {
            let find = || self.goes_on().and_then(|()| self.to_open(node));
            node.open(opener, how, &self.options.image, &self.chains, layered, find)
        });
        match &opened {
            Ok(_) => node.is_well(),
            Err(e) if e.errno() == libc::ESTALE => {}
            Err(e) => node.log(e),
        }
        opened
    }

    /// Ends a handle; the last one closes the image. May block long. Errors are logged and counted, and
    /// the next sync of the node tells of them.
    pub fn release(&self, node: &Node) {
        self.count_close(node, node.release());
    }

    /// Ends a handle that the kernel did not hear of.
    pub fn release_untold(&self, node: &Node) {
        node.was_not_told();
        self.release(node);
    }

    fn count_close(&self, node: &Node, closed: Result<()>) {
        if let Err(e) = closed {
            self.close_errors.fetch_add(1, Ordering::Relaxed);
            node.has_lost();
            node.log(&e.context("closing it"));
        }
    }

    /// Runs `verb` on a node's image, which is opened for it where it is not open.
    ///
    /// # Errors
    /// Those of [`Catalog::open`] and of `verb`.
    pub fn with_opened<R>(
        &self,
        node: &Node,
        write: bool,
        verb: impl FnOnce(&Image) -> Result<R>,
    ) -> Result<R> {
        self.open_for_verb(node, write)?;
        let done = node.with_image(verb);
        self.release(node);
        done
    }

    /// Closes every image, whoever still uses it; requests that are under way are waited for, but not
    /// longer than `patience` for all of them; what is being opened or closed, however long that takes.
    /// From then on no image is opened or made. Returns how many closes have failed, over all.
    pub fn close_all(&self, patience: Duration) -> u64 {
        let _alone = self.closing.lock();
        // Who opens an image looks at it with the slot held, which is waited for below.
        self.ended.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + patience;
        let nodes = Mutex::new(self.all_nodes().into_iter());
        let next = || nodes.lock().next();
        let close = || {
            while let Some(node) = next() {
                self.count_close(&node, node.force_close(deadline));
            }
        };
        // One that waits for its host keeps no other from being closed.
        thread::scope(|scope| {
            for _ in 1..CLOSERS {
                let closer = thread::Builder::new().name("close".into());
                if let Err(e) = closer.spawn_scoped(scope, close) {
                    log::debug!("no more threads to close images with: {e}");
                }
            }
            close();
        });
        self.close_errors.load(Ordering::Relaxed)
    }

    /// Fails once all images are being closed.
    fn goes_on(&self) -> Result<()> {
        match self.ended.load(Ordering::SeqCst) {
            true => Err(errno("opening or making an image while the mount ends", libc::EIO)),
            false => Ok(()),
        }
    }

    fn all_nodes(&self) -> Vec<Arc<Node>> {
        self.nodes.read().known.values().map(|known| Arc::clone(&known.node)).collect()
    }

    /// The host's space.
    ///
    /// # Errors
    /// Those of the host.
    pub fn space(&self) -> Result<HostSpace> {
        let space = match &self.overlays {
            Some(overlays) => overlays.space(),
            None => host::space(self.root.directory()),
        };
        space.map_err(|e| Error::io("asking the host for its space", e))
    }
}

/// Removes what a crash has left of images that were just being made. Nobody waits for it, so errors
/// are only told.
fn remove_abandoned(place: &File, names: &[(OsString, bool)]) {
    let is_ours = |(name, directory): &&(OsString, bool)| !directory && storage::is_temporary(name);
    for (name, _) in names.iter().filter(is_ours) {
        match storage::remove_abandoned(place, name) {
            Ok(()) => log::info!("{} was left by a crash: removed", name.display()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => log::warn!("removing {}, left by a crash: {e}", name.display()),
        }
    }
}

/// What `name` stands for in a directory; `path` is what it is to be called.
fn look_in(directory: &Root, name: &OsStr, path: PathBuf) -> Result<Named> {
    let look = || {
        let place = directory.place(name.as_ref())?;
        let metadata = place.metadata()?;
        Ok((place, metadata))
    };
    match look() {
        Ok((place, metadata)) => Ok(Named { path, place, metadata }),
        Err(e) => Err(Error::io(format!("looking at {}", path.display()), e)),
    }
}

fn image_header(image: &Image) -> Header {
    let (virtual_size, cluster_size) = (image.virtual_size(), image.cluster_size());
    Header { virtual_size, cluster_size, ..Header::default() }
}

fn errno(what: &str, code: i32) -> Error {
    Error::io(what, io::Error::from_raw_os_error(code))
}

fn stale() -> Error {
    errno("looking at a file whose name is gone", libc::ESTALE)
}

fn read_only() -> Error {
    Error::new(crate::ErrorKind::ReadOnly, "the images are mounted read-only")
}
