//! Backing and data files: which file a name inside an image may lead to, and who uses it.
//!
//! A name inside an image is not trusted. It is opened only beneath the image directory or a
//! directory that was allowed on the command line, through no symbolic link and into no other
//! mount (so never into our own), a regular file only, and as what the image says that it is:
//! nothing is probed. Protocols (`nbd:`, `json:`) are not names of files. A backing file is only
//! ever read; an external data file is written when its image is, and then nobody else has it.
//!
//! Nor is it trusted as somebody else's: this process may open what the owner of an image may not.
//! Beneath the image directory a name is followed only where the owner of each image that leads there
//! could have opened the file: it is theirs, or for everybody, and so are the directories on the way.
//! What groups may does not count, since nobody here knows who is in them. Images of root and of who
//! runs this are followed everywhere, and all images into a directory that was allowed. Whoever else may
//! write to an image may have written the name: where that is its group, that group too must be let to
//! the file, and where it is everybody, everybody.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::acl;
use super::host::{self, HostId, Root, Stamp};
use super::keys::Keys;
use super::node::open_host_file;
use crate::crypt::DataCipher;
use crate::error::{Error, ErrorKind, Result, legible};
use crate::image::{Backing, BackingFile, Beside, Encryption, Image, Options, RawBacking, Summary};
use crate::storage::HostFile;
use crate::storage::image_lock::{self, Access};

/// The longest chain that is followed.
const MAX_DEPTH: usize = 64;

/// What everybody may do to a file, as bits of its mode, and to a directory.
const READ: u32 = 0o4;
const WRITE: u32 = 0o2;
const SEARCH: u32 = 0o1;
/// Where the same bits of the group are.
const OF_GROUP: u32 = 3;

/// What records the real path of a backing file, and of a data file.
const REBASE: &str = "`qemu-img rebase -u` with its real path records that";
const AMEND: &str = "`qemu-img amend -o data_file=` with its real path records that";

/// The directories that such files may lie in, and the files that are in use as such.
pub(super) struct Chains {
    /// By their real paths, the image directory first; then the allowed ones by the paths they were
    /// given by, which images may have recorded: a symbolic link may be on those.
    roots: Vec<(PathBuf, Root)>,
    users: Arc<Users>,
    writers: Arc<Writers>,
    keys: Keys,
}

/// By whom each such file is used.
type Users = Mutex<HashMap<HostId, Vec<Use>>>;

/// The images that are open for writing, by their names.
type Writers = Mutex<HashMap<HostId, PathBuf>>;

/// One use of a file by an open image.
struct Use {
    /// The name of the image.
    user: PathBuf,
    /// The whole path of the file.
    file: PathBuf,
}

/// Says of an image that it is open for writing, until this is dropped.
pub(super) struct Writing {
    writers: Arc<Writers>,
    id: HostId,
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.writers.lock().remove(&self.id);
    }
}

/// An image's backing file with all that is behind it, open and held against writers.
pub(super) struct Chain {
    /// What the image reads where it has nothing of its own.
    pub(super) backing: Arc<dyn Backing>,
    /// Each file as it was when it was opened: what was read through the image holds as long as
    /// these do.
    pub(super) stamps: Vec<Stamp>,
    /// Counts the files out when the image is closed.
    _uses: Uses,
}

/// An image's external data file, open and locked like the image itself.
pub(super) struct DataFile {
    pub(super) file: Arc<HostFile>,
    /// Counts the file out when the image is closed.
    _uses: Uses,
}

/// What belongs to an image beside its own file.
#[derive(Default)]
pub(super) struct Files {
    /// What it is based on; `None` when it stands alone.
    pub(super) chain: Option<Chain>,
    /// Its external data file; `None` when the data is in the image.
    pub(super) data: Option<DataFile>,
    /// What its data is encrypted with; `None` when it is not.
    pub(super) cipher: Option<Arc<DataCipher>>,
}

/// What has been opened of a chain so far.
struct Opened {
    /// The image itself first.
    seen: Vec<HostId>,
    /// Whose images have led here.
    authors: Vec<Author>,
    stamps: Vec<Stamp>,
    uses: Uses,
}

/// A data file, open and locked.
struct OpenedData {
    file: Arc<HostFile>,
    id: HostId,
    /// Its whole path.
    path: PathBuf,
}

struct Uses {
    users: Arc<Users>,
    user: PathBuf,
    files: Vec<HostId>,
}

impl Uses {
    fn add(&mut self, id: HostId, file: &Path) {
        self.files.push(id);
        let one = Use { user: self.user.clone(), file: file.to_owned() };
        self.users.lock().entry(id).or_default().push(one);
    }
}

impl Drop for Uses {
    fn drop(&mut self) {
        let mut users = self.users.lock();
        for id in &self.files {
            if let Some(uses) = users.get_mut(id) {
                if let Some(at) = uses.iter().position(|one| one.user == self.user) {
                    uses.swap_remove(at);
                }
                if uses.is_empty() {
                    users.remove(id);
                }
            }
        }
    }
}

impl Chains {
    /// Files may lie beneath `source` and the `allowed` directories; `keys` open those that are
    /// encrypted.
    ///
    /// # Errors
    /// Those of the host for a directory that cannot be opened.
    pub(super) fn new(source: &Root, allowed: &[PathBuf], keys: Keys) -> Result<Chains> {
        let failed = |e| Error::io("opening the image directory", e);
        let images = source.path().and_then(|path| Ok((path, source.try_clone()?)));
        let allowed = allowed.iter().map(|path| open_allowed(path));
        let (real, given): (Vec<_>, Vec<_>) =
            allowed.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let images = std::iter::once(images.map_err(failed)?);
        let roots = images.chain(real).chain(given).collect();
        Ok(Chains { roots, users: Arc::default(), writers: Arc::default(), keys })
    }

    /// The directories that such files may lie in, the image directory first.
    pub(super) fn directories(&self) -> impl Iterator<Item = &Root> {
        self.roots.iter().map(|(_, root)| root)
    }

    /// The name of an open image that uses this file as a backing or data file.
    pub(super) fn user_of(&self, id: HostId) -> Option<PathBuf> {
        self.users.lock().get(&id)?.first().map(|one| one.user.clone())
    }

    /// A file beneath the directory `id` that an open image uses as a backing or data file, and the
    /// name of that image.
    pub(super) fn used_beneath(&self, id: HostId) -> Option<(PathBuf, PathBuf)> {
        let is_it = |path: &Path| path.metadata().is_ok_and(|metadata| HostId::of(&metadata) == id);
        let uses: Vec<(PathBuf, PathBuf)> = {
            let users = self.users.lock();
            users.values().flatten().map(|one| (one.file.clone(), one.user.clone())).collect()
        };
        // By what the directories are, not by their names: an allowed one may have several.
        uses.into_iter().find(|(file, _)| file.ancestors().skip(1).any(is_it))
    }

    /// The image `file`, called `name`, is open for writing from now on.
    pub(super) fn note_writing(&self, file: &File, name: &Path) -> Result<Writing> {
        let id = HostId::of(&look(file)?);
        self.writers.lock().insert(id, name.to_owned());
        Ok(Writing { writers: Arc::clone(&self.writers), id })
    }

    /// Opens what the image at `path` (beneath the image directory), open as `file`, needs beside
    /// itself: its data file, for writing where `write` says so and otherwise wherever `options`
    /// let it come to that later, and what it is based on. An overlay of ours names its `base` on our
    /// behalf, not on that of its owner.
    ///
    /// # Errors
    /// `Unsupported` for a name that may not be followed or a format that is not said; `InUse`
    /// when somebody writes to a file of the chain or has the data file; `Corrupt` for a chain that
    /// leads back to itself; those of [`Image::open`] and of the host.
    pub(super) fn open(
        &self,
        (path, base): (&Path, Option<&Path>),
        file: &HostFile,
        write: bool,
        options: &Options,
    ) -> Result<Files> {
        let summary = Image::summarize(file)?;
        if summary.refusal.is_some() {
            return Ok(Files::default());
        }
        let cipher = self.unlock(path, file, &summary)?;
        if summary.backing.is_none() && summary.data_file.is_none() {
            return Ok(Files { cipher, ..Files::default() });
        }
        let metadata =
            file.file().metadata().map_err(|e| Error::io("looking at the image file", e))?;
        let is_ours = summary.data_file.is_none()
            && base
                .zip(summary.backing.as_ref())
                .is_some_and(|(base, named)| base.as_os_str().as_bytes() == named.name);
        let mut opened = Opened {
            seen: vec![HostId::of(&metadata)],
            authors: match is_ours {
                true => Vec::new(),
                false => authors(&metadata, || acl::has_list(file.file())),
            },
            stamps: Vec::new(),
            uses: self.no_uses(path),
        };
        let image = self.whole(path);
        let data = match &summary.data_file {
            Some(name) => {
                let may_write = options.writable;
                let mut uses = self.no_uses(path);
                let file = self.data_file(&image, name, [write, may_write], &mut opened)?;
                uses.add(file.id, &file.path);
                Some(DataFile { file: file.file, _uses: uses })
            }
            None => None,
        };
        let followed = summary.backing.map(|needed| {
            self.follow(&image, &needed, options, &mut opened).inspect_err(|_| {
                // At once: a process that we are just starting may still share the descriptor.
                if let Some(data) = &data {
                    let _released = image_lock::release_down_to(data.file.file(), None);
                }
            })
        });
        let backing = followed.transpose()?;
        let (stamps, uses) = (opened.stamps, opened.uses);
        let chain = backing.map(|backing| Chain { backing, stamps, _uses: uses });
        Ok(Files { chain, data, cipher })
    }

    /// The cipher of an encrypted image, which is called `name`.
    fn unlock(
        &self,
        name: &Path,
        file: &HostFile,
        summary: &Summary,
    ) -> Result<Option<Arc<DataCipher>>> {
        let unlock = |encryption| self.keys.unlock(name, file, encryption);
        summary.encryption.map(unlock).transpose()
    }

    /// Whether there is any place that keys may come from.
    pub(super) fn have_keys(&self) -> bool {
        let Keys { files, directory, credentials, .. } = &self.keys;
        !files.is_empty() || directory.is_some() || credentials.is_some()
    }

    /// Whether an image may have the name `to` instead of `from` as far as its key is concerned: a wrong
    /// one would be noticed, or it stays what it was.
    pub(super) fn keeps_key(
        &self,
        [from, to]: [&Path; 2],
        encryption: impl FnOnce() -> Option<Encryption>,
    ) -> Result<bool> {
        Ok(self.keys.stays(from, to)? || encryption() != Some(Encryption::Aes))
    }

    /// What the host says of the data file `name` of the image at `path`, of which it says `image`,
    /// without opening it; nothing where it may not be looked at.
    pub(super) fn look_at_data_file(
        &self,
        path: &Path,
        image: &Metadata,
        name: &[u8],
    ) -> Option<Metadata> {
        let path = whole_path(&self.whole(path), name).ok()?;
        // It is not worth while to look for a list.
        let authors = authors(image, || true);
        self.find(&path, &authors, READ, AMEND).and_then(|place| look(&place)).ok()
    }

    fn no_uses(&self, user: &Path) -> Uses {
        Uses { users: Arc::clone(&self.users), user: user.to_owned(), files: Vec::new() }
    }

    /// The whole path of an image at `path` beneath the image directory.
    fn whole(&self, path: &Path) -> PathBuf {
        self.roots.first().map_or_else(|| path.to_owned(), |(root, _)| root.join(path))
    }

    /// Opens and locks the data file that `image` (a whole path) names.
    fn data_file(
        &self,
        image: &Path,
        name: &[u8],
        [write, may_write]: [bool; 2],
        opened: &mut Opened,
    ) -> Result<OpenedData> {
        let open = || {
            let path = whole_path(image, name)?;
            let find = |wanted| self.find(&path, &opened.authors, wanted, AMEND);
            let (place, may_write) = match may_write.then(|| find(READ | WRITE)) {
                Some(Ok(place)) => (place, true),
                Some(Err(e)) if write => return Err(e),
                _ => (find(READ)?, false),
            };
            let file = open_host_file(&place, write, may_write)?;
            let id = HostId::of(&look(&file)?);
            if opened.seen.contains(&id) {
                return Err(Error::corrupt("it is the image itself, or one of its other files"));
            }
            let access = if write { Access::Write } else { Access::Read };
            image_lock::acquire(&file, None, access).map_err(|e| self.name_user(e, id))?;
            Ok(OpenedData { file: Arc::new(HostFile::new(file)), id, path })
        };
        let name = legible(name);
        let data = open().map_err(|e| e.context(format!("data file {name}")))?;
        opened.seen.push(data.id);
        Ok(data)
    }

    /// Says which image of ours it is that keeps a file from being locked.
    pub(super) fn name_user(&self, error: Error, id: HostId) -> Error {
        if error.kind() != ErrorKind::InUse {
            return error;
        }
        let writer = || self.writers.lock().get(&id).cloned();
        let text = match self.user_of(id) {
            Some(user) => format!("it is a file of {}, which is open; close that", user.display()),
            None => match writer() {
                Some(name) => format!("{} is open for writing; close that", name.display()),
                None => return error,
            },
        };
        Error::new(ErrorKind::InUse, text)
    }

    /// Opens the backing file that `image` (a whole path) needs, and those behind it.
    fn follow(
        &self,
        image: &Path,
        needed: &BackingFile,
        options: &Options,
        opened: &mut Opened,
    ) -> Result<Arc<dyn Backing>> {
        let name = legible(&needed.name);
        let in_file = |e: Error| e.context(format!("backing file {name}"));
        if opened.seen.len() > MAX_DEPTH {
            return Err(in_file(unsupported(format!(
                "the chain is longer than {MAX_DEPTH} files"
            ))));
        }
        let path = whole_path(image, &needed.name).map_err(in_file)?;
        let file = self.open_file(&path, &opened.authors).map_err(in_file)?;
        let metadata = look(&file).map_err(in_file)?;
        let id = HostId::of(&metadata);
        if opened.seen.contains(&id) {
            return Err(in_file(Error::corrupt("the chain of backing files leads back to itself")));
        }
        opened.seen.push(id);
        opened.authors.extend(authors(&metadata, || acl::has_list(&file)));
        let locked = image_lock::acquire(&file, None, Access::Read);
        locked.map_err(|e| in_file(self.name_user(e, id)))?;
        opened.uses.add(id, &path);
        // Not before the lock keeps writers away.
        opened.stamps.push(Stamp::of(&look(&file).map_err(in_file)?));
        let file = Arc::new(HostFile::new(file));
        match needed.format.as_deref() {
            Some("raw") => Ok(Arc::new(RawBacking::new(file).map_err(in_file)?)),
            Some("qcow2") => {
                let summary = Image::summarize(&*file).map_err(in_file)?;
                let mut beside = Beside::default();
                if summary.refusal.is_none() {
                    let name = self.name_of(&path);
                    beside.cipher = self.unlock(name, &file, &summary).map_err(in_file)?;
                }
                if let Some(name) = summary.data_file.filter(|_| summary.refusal.is_none()) {
                    let read_only = [false, false];
                    let data = self.data_file(&path, &name, read_only, opened);
                    let data = data.map_err(in_file)?;
                    opened.uses.add(data.id, &data.path);
                    opened.stamps.push(Stamp::of(&look(data.file.file()).map_err(in_file)?));
                    beside.data = Some(data.file);
                }
                if let Some(next) = summary.backing {
                    beside.backing = Some(self.follow(&path, &next, options, opened)?);
                }
                let options = Options { writable: false, ..options.clone() };
                Ok(Image::open_with(file, &options, beside).map_err(in_file)?)
            }
            Some(other) => {
                let other = legible(other.as_bytes());
                Err(in_file(unsupported(format!(
                    "its format {other} is not served; raw and qcow2 are"
                ))))
            }
            None => Err(in_file(unsupported(format!(
                "its format is not recorded and is never guessed: `qemu-img rebase -u -b {name} \
                 -F FORMAT {}` records it",
                image.display()
            )))),
        }
    }

    /// The name of a file within the nearest directory that it may lie in.
    fn name_of<'a>(&self, path: &'a Path) -> &'a Path {
        let names = self.roots.iter().filter_map(|(root, _)| path.strip_prefix(root).ok());
        names.min_by_key(|name| name.components().count()).unwrap_or(path)
    }

    /// Opens a file for reading if it lies where it may, for the `authors` of the images that lead to it.
    fn open_file(&self, path: &Path, authors: &[Author]) -> Result<File> {
        let place = self.find(path, authors, READ, REBASE)?;
        host::open_file(&place, false)
            .map_err(|e| Error::io(format!("opening {}", path.display()), e))
    }

    /// Finds a regular file, without opening it, if it lies where it may and the `authors` of the images
    /// that lead to it may do to it what is `wanted`. `remedy` says how an image comes to name it by its
    /// real path.
    fn find(&self, path: &Path, authors: &[Author], wanted: u32, remedy: &str) -> Result<File> {
        let beneath = self.roots.iter().filter_map(|(root, directory)| {
            path.strip_prefix(root).ok().map(|rest| (directory, rest))
        });
        // The nearest one: a directory on a mount of its own is reached only from itself.
        let found = beneath.min_by_key(|(_, rest)| rest.components().count());
        let Some((directory, rest)) = found else {
            let parent = path.parent().unwrap_or(path).display();
            return Err(unsupported(format!(
                "it lies outside the image directory: mount with `--allow {parent}` to trust it"
            )));
        };
        let failed = |e: std::io::Error| match e.raw_os_error() {
            Some(libc::ELOOP) => {
                unsupported(format!("a symbolic link leads to it, which is not followed: {remedy}"))
            }
            _ => Error::io(format!("opening {}", path.display()), e),
        };
        let is_allowed = self.roots.iter().skip(1).any(|(root, _)| path.starts_with(root));
        let authors = if is_allowed { &[] } else { authors };
        let reach = |directory: &Root, part: &Path, wanted: u32| {
            let place = directory.place_in_same_mount(part).map_err(failed)?;
            match who_may_not(&place, wanted, authors).map_err(failed)? {
                Some(author) => Err(not_for(author, path)),
                None => Ok(place),
            }
        };
        let mut parent = None;
        for part in rest.parent().into_iter().flat_map(Path::components) {
            let within = parent.as_ref().unwrap_or(directory);
            let place = reach(within, Path::new(&part), SEARCH)?;
            // A place may be the link itself.
            if place.metadata().map_err(failed)?.is_symlink() {
                return Err(failed(std::io::Error::from_raw_os_error(libc::ELOOP)));
            }
            parent = Some(Root::at(place));
        }
        let name = Path::new(rest.file_name().unwrap_or_default());
        let place = reach(parent.as_ref().unwrap_or(directory), name, wanted)?;
        // Not opened if it is something else: opening a FIFO or a device does something.
        if !place.metadata().map_err(failed)?.is_file() {
            return Err(unsupported("it is not a regular file"));
        }
        Ok(place)
    }
}

fn look(file: &File) -> Result<Metadata> {
    file.metadata().map_err(|e| Error::io("looking at it", e))
}

/// Who may have written the names in an image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Author {
    User(u32),
    Group(u32),
    Anybody,
}

/// Who may have written the names in an image of which the host says this.
fn authors(image: &Metadata, has_list: impl FnOnce() -> bool) -> Vec<Author> {
    let mut authors = vec![Author::User(image.uid())];
    if image.mode() & WRITE << OF_GROUP != 0 {
        // With an access control list that is the most that anybody of it may.
        authors.push(if has_list() { Author::Anybody } else { Author::Group(image.gid()) });
    }
    if image.mode() & WRITE != 0 {
        authors.push(Author::Anybody);
    }
    authors
}

impl Author {
    /// Whether it may do everything anyway.
    fn is_trusted(self) -> bool {
        match self {
            Author::User(user) => user == 0 || user == rustix::process::geteuid().as_raw(),
            Author::Group(group) => group == 0,
            Author::Anybody => false,
        }
    }
}

/// The first of `authors` who could not do to a file or directory what is wanted.
fn who_may_not(place: &File, wanted: u32, authors: &[Author]) -> std::io::Result<Option<Author>> {
    let mut strangers = authors.iter().copied().filter(|author| !author.is_trusted()).peekable();
    if strangers.peek().is_none() {
        return Ok(None);
    }
    let metadata = place.metadata()?;
    let mode = acl::mode_of(place, metadata.mode());
    let may = |author: &Author| match *author {
        Author::User(user) => user == metadata.uid(),
        Author::Group(group) => group == metadata.gid() && mode >> OF_GROUP & wanted == wanted,
        Author::Anybody => false,
    };
    let is_for_everybody = mode & wanted == wanted;
    Ok(strangers.find(|author| !is_for_everybody && !may(author)))
}

fn not_for(author: Author, path: &Path) -> Error {
    let who = match author {
        Author::User(user) => format!("an image of user {user}"),
        Author::Group(group) => format!("an image that group {group} may write"),
        Author::Anybody => "an image that others than its owner may write".to_owned(),
    };
    let parent = path.parent().unwrap_or(path).display();
    unsupported(format!(
        "{who} leads to it, who may not open it: let everybody, or mount with `--allow {parent}` to \
         trust the images"
    ))
}

/// An allowed directory by its real path, and by the path that it was given by. It is opened once.
fn open_allowed(given: &Path) -> Result<((PathBuf, Root), (PathBuf, Root))> {
    let open = || {
        let root = Root::open(given)?;
        let real = (root.path()?, root.try_clone()?);
        Ok((real, (std::path::absolute(given)?, root)))
    };
    open().map_err(|e| Error::io(format!("opening the directory {}", given.display()), e))
}

/// The whole path that `name` means inside the file at `image`, `.` and `..` resolved by name: no
/// symbolic link is followed later, so that is what they mean.
fn whole_path(image: &Path, name: &[u8]) -> Result<PathBuf> {
    let before_slash = name.split(|byte| *byte == b'/').next().unwrap_or_default();
    if before_slash.contains(&b':') {
        return Err(unsupported("it is named by a protocol, which is never followed"));
    }
    if name.is_empty() || name.contains(&0) {
        return Err(Error::corrupt("the image names it, but with no name that a file can have"));
    }
    let name = Path::new(std::ffi::OsStr::from_bytes(name));
    let mut path = PathBuf::new();
    for part in image.parent().unwrap_or(Path::new("/")).join(name).components() {
        match part {
            Component::ParentDir => {
                path.pop();
            }
            Component::CurDir => {}
            other => path.push(other),
        }
    }
    Ok(path)
}

fn unsupported(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_they_say_beside_the_image_that_holds_them() {
        let at = |name: &str| whole_path(Path::new("/images/a/top.qcow2"), name.as_bytes());
        for (name, path) in [
            ("base.qcow2", "/images/a/base.qcow2"),
            ("../base.raw", "/images/base.raw"),
            ("./b/../c.raw", "/images/a/c.raw"),
            ("/other/base.raw", "/other/base.raw"),
            ("../../../../etc/shadow", "/etc/shadow"),
            ("dir/with:colon", "/images/a/dir/with:colon"),
        ] {
            assert_eq!(at(name).unwrap(), Path::new(path), "{name}");
        }
        for name in ["nbd:localhost:1", "json:{\"file\":\"/etc/shadow\"}", "file:base", "", "a\0b"]
        {
            assert!(at(name).is_err(), "{name:?}");
        }
    }
}
