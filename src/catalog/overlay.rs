//! Overlays: what is written to images that stay as they are.
//!
//! An overlay is a qcow2 image of its own whose backing file is the image. It is made before the
//! image is first opened for writing, appears complete and durable or not at all, and is what is
//! opened from then on. Kept overlays lie in a directory under the names of their images and are
//! used again by later mounts; ephemeral ones have no name there, so that nothing is left of them
//! whatever ends the mount. An image that has several names (hard links) has one overlay, under
//! the name by which it was made.

use std::collections::HashMap;
use std::fs::{self, File, Metadata, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use super::acl;
use super::host::{self, HostId, HostSpace, Root};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{BackingFile, CreateOptions, Image};
use crate::storage::{HostFile, IfTaken, NewFile};

/// Where overlays go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayOptions {
    /// The directory, outside the image directory.
    pub directory: PathBuf,
    /// They are thrown away at the end of the mount.
    pub ephemeral: bool,
}

/// The overlays of one mount.
pub(super) struct Overlays {
    root: Root,
    directory: PathBuf,
    /// The image directory, and its real path.
    images: Root,
    source: PathBuf,
    kind: Kind,
    /// One is made at a time. Taken before `Ephemeral`'s.
    making: Mutex<()>,
}

enum Kind {
    /// In a directory that no other mount writes overlays to.
    Kept {
        #[expect(dead_code, reason = "only held")]
        lock: File,
        /// The names of all overlays by the image that each belongs to, from the moment on when an
        /// image with several names is met. A leaf.
        names: Mutex<Option<HashMap<HostId, Vec<PathBuf>>>>,
    },
    /// By the image that each belongs to.
    Ephemeral(Mutex<HashMap<HostId, (PathBuf, NewFile)>>),
}

/// An overlay that is there.
pub(super) struct Overlay {
    /// The file, not yet opened for anything where it has a name.
    pub(super) place: File,
    pub(super) metadata: Metadata,
    /// The name of the image, of those that it has, which it was made by.
    name: PathBuf,
}

impl Overlays {
    /// Those of the images in the directory `images`.
    ///
    /// # Errors
    /// `InUse` for the directory of another mount, and those of the host.
    pub(super) fn new(images: &Root, options: &OverlayOptions) -> Result<Overlays> {
        let shown = options.directory.display();
        let failed = |e| Error::io(format!("opening the overlay directory {shown}"), e);
        let root = Root::open(&options.directory).map_err(failed)?;
        let kind = match options.ephemeral {
            true => Kind::Ephemeral(Mutex::default()),
            false => {
                let lock = lock(&root).map_err(|e| match e.kind() {
                    io::ErrorKind::WouldBlock => Error::new(
                        ErrorKind::InUse,
                        format!(
                            "another mount has the overlay directory {shown}: give each its own"
                        ),
                    ),
                    _ => failed(e),
                })?;
                Kind::Kept { lock, names: Mutex::default() }
            }
        };
        Ok(Overlays {
            directory: root.path().map_err(failed)?,
            root,
            images: images.try_clone().map_err(failed)?,
            source: images.path().map_err(failed)?,
            kind,
            making: Mutex::default(),
        })
    }

    /// The overlay of an image, which is at `path` beneath the image directory.
    ///
    /// # Errors
    /// Those of the host; `Unsupported` for a name there that is no regular file, and for an image
    /// that has several.
    pub(super) fn find(&self, image: &Metadata, path: &Path) -> Result<Option<Overlay>> {
        let failed = |e| Error::io(format!("looking at the overlay {}", self.place(path)), e);
        let (place, name) = match &self.kind {
            Kind::Ephemeral(made) => match made.lock().get(&HostId::of(image)) {
                Some((name, new)) => (new.file().try_clone().map_err(failed)?, name.clone()),
                None => return Ok(None),
            },
            Kind::Kept { names, .. } => {
                let name = self.name(names, image, path)?;
                match self.root.place(&name) {
                    Ok(place) => (place, name),
                    Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                        return Ok(None);
                    }
                    Err(e) => return Err(failed(e)),
                }
            }
        };
        let metadata = place.metadata().map_err(failed)?;
        match metadata.is_file() {
            true => Ok(Some(Overlay { place, metadata, name })),
            false => Err(Error::new(
                ErrorKind::Unsupported,
                format!("the overlay {} is not a regular file", self.place(&name)),
            )),
        }
    }

    /// The name that the overlay of an image has: that of the image, or another one of it.
    fn name(
        &self,
        names: &Mutex<Option<HashMap<HostId, Vec<PathBuf>>>>,
        image: &Metadata,
        path: &Path,
    ) -> Result<PathBuf> {
        let mut names = names.lock();
        if image.nlink() < 2 && names.is_none() {
            return Ok(path.to_owned());
        }
        let known = match &mut *names {
            Some(known) => known,
            none => none.insert(self.all_names().map_err(|e| {
                Error::io(format!("looking for overlays in {}", self.directory.display()), e)
            })?),
        };
        // The host may have given the place of an image that is gone to another one.
        let is_its = |name: &&PathBuf| {
            let found = self.images.place(name).and_then(|found| found.metadata());
            found.is_ok_and(|found| HostId::of(&found) == HostId::of(image))
        };
        let names: Vec<&PathBuf> =
            known.get(&HostId::of(image)).into_iter().flatten().filter(is_its).collect();
        match names[..] {
            [] => Ok(path.to_owned()),
            [name] => Ok(name.clone()),
            [first, second, ..] => Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "it is one image with several names, of which two have overlays, {} and {}: \
                     move one of these away",
                    self.place(first),
                    self.place(second)
                ),
            )),
        }
    }

    /// The names of all overlays by the images of the same names.
    fn all_names(&self) -> io::Result<HashMap<HostId, Vec<PathBuf>>> {
        let mut names = HashMap::<HostId, Vec<PathBuf>>::new();
        for name in host::files_beneath(&self.root)? {
            // Without an image of that name it is nobody's.
            if let Ok(image) = self.images.place(&name).and_then(|image| image.metadata())
                && image.is_file()
            {
                names.entry(HostId::of(&image)).or_default().push(name);
            }
        }
        Ok(names)
    }

    /// Fails unless the overlay is one on its image, of the kind that is made here: with another
    /// one, names in its header would decide which files are opened and how.
    ///
    /// # Errors
    /// `Unsupported`; those of [`Image::summarize`] and of the host.
    pub(super) fn check(&self, overlay: &Overlay) -> Result<()> {
        let path = &overlay.name;
        let file = host::open_file(&overlay.place, false)
            .map_err(|e| Error::io(format!("opening the overlay {}", self.place(path)), e))?;
        let summary = Image::summarize(&HostFile::new(file))
            .map_err(|e| e.context(format!("the overlay {}", self.place(path))))?;
        let ours = self.backing(path);
        let fault = match &summary.backing {
            Some(backing) if backing.name == ours.name => {
                let is_ours = summary.data_file.is_none() && *backing == ours;
                (!is_ours).then(|| "is no overlay of ours".to_owned())
            }
            _ => Some(format!("is not based on {}", self.image(path).display())),
        };
        let Some(fault) = fault else { return Ok(()) };
        let text = format!("the overlay {} {fault}: move it away", self.place(path));
        Err(Error::new(ErrorKind::Unsupported, text))
    }

    /// The image that an overlay is based on.
    pub(super) fn base(&self, overlay: &Overlay) -> PathBuf {
        self.image(&overlay.name)
    }

    /// The whole path of the image `name`.
    fn image(&self, name: &Path) -> PathBuf {
        self.source.join(name)
    }

    /// The backing file of the overlay of `path`: the image.
    fn backing(&self, path: &Path) -> BackingFile {
        let name = self.image(path).into_os_string().into_vec();
        BackingFile { name, format: Some("qcow2".into()) }
    }

    /// Makes the overlay of an image, unless there is one.
    ///
    /// # Errors
    /// Those of [`Overlays::find`], [`Overlays::check`], [`Image::summarize`] and [`Image::create`];
    /// `Unsupported` for an image that is not served.
    pub(super) fn make(&self, path: &Path, image: &File) -> Result<()> {
        let _making = self.making.lock();
        let failed = |e| Error::io(format!("making the overlay {}", self.place(path)), e);
        let file = host::open_file(image, false).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let summary = Image::summarize(&HostFile::new(file))?;
        if let Some(reason) = summary.refusal {
            return Err(Error::new(ErrorKind::Unsupported, reason));
        }
        if summary.encryption.is_some() {
            let text = "the image is encrypted, and what is written to its overlay would not be: \
                        mount it without `--overlay`, or read it only";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        if let Some(overlay) = self.find(&metadata, path)? {
            return self.check(&overlay);
        }
        let options = CreateOptions {
            virtual_size: summary.virtual_size,
            backing: Some(self.backing(path)),
            ..CreateOptions::default()
        };
        let directory = match self.kind {
            Kind::Kept { .. } => self.make_directories(path).map_err(failed)?,
            Kind::Ephemeral(_) => self.root.place(Path::new("")).map_err(failed)?,
        };
        let new = NewFile::new(&host::path_of(&directory), 0o600).map_err(failed)?;
        let storage = HostFile::new(new.file().try_clone().map_err(failed)?);
        Image::create(&storage, &options)?;
        let mode = acl::mode_of(image, metadata.mode());
        look_like(new.file(), &metadata, mode).map_err(failed)?;
        self.copy_attributes(path, image, new.file());
        let id = HostId::of(&metadata);
        match &self.kind {
            Kind::Kept { names, .. } => {
                let name = path.file_name().unwrap_or_default();
                new.publish(name, IfTaken::Fail).map_err(failed)?;
                if let Some(known) = &mut *names.lock() {
                    let names = known.entry(id).or_default();
                    // Who has just looked through the directory may have found it.
                    if !names.iter().any(|name| name == path) {
                        names.push(path.to_owned());
                    }
                }
            }
            Kind::Ephemeral(made) => {
                made.lock().insert(id, (path.to_owned(), new));
            }
        }
        Ok(())
    }

    /// Gives a new overlay the extended attributes of its image. The host of the overlays may know
    /// none, or have less room for them: that keeps nobody from writing.
    fn copy_attributes(&self, path: &Path, image: &File, overlay: &File) {
        if let Err(e) = host::copy_user_attributes(image, overlay) {
            let place = self.place(path);
            log::warn!("the overlay {place} lacks extended attributes of its image: {e}");
        }
    }

    /// The directory that the overlay of `path` lies in, made where it is missing.
    fn make_directories(&self, path: &Path) -> io::Result<File> {
        let mut at = PathBuf::new();
        for part in path.parent().unwrap_or(Path::new("")).components() {
            let parent = self.root.place(&at)?;
            // The daemon has no umask, and only the daemon needs to get in.
            match fs::DirBuilder::new().mode(0o700).create(host::path_of(&parent).join(part)) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => at.push(part),
            }
        }
        self.root.place(&at)
    }

    /// The host's space where overlays lie.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn space(&self) -> io::Result<HostSpace> {
        host::space(self.root.directory())
    }

    /// The directory that they lie in.
    pub(super) fn root(&self) -> &Root {
        &self.root
    }

    fn place(&self, path: &Path) -> String {
        match self.kind {
            Kind::Kept { .. } => self.directory.join(path).display().to_string(),
            Kind::Ephemeral(_) => format!("of {} in {}", path.display(), self.directory.display()),
        }
    }
}

/// Locks a directory as long as the file is open.
fn lock(directory: &Root) -> io::Result<File> {
    let file = File::open(host::path_of(directory.directory()))?;
    // SAFETY: flock takes no pointers; the descriptor is open.
    match unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives an overlay the owner of its image, where we may, and `mode`.
fn look_like(file: &File, image: &Metadata, mode: u32) -> io::Result<()> {
    // SAFETY: geteuid takes nothing and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        std::os::unix::fs::fchown(file, Some(image.uid()), Some(image.gid()))?;
    }
    file.set_permissions(Permissions::from_mode(mode))
}
