//! Changes of names: what is made, removed, renamed and linked, carried out on the image files.
//!
//! A file that an open image uses as a backing or data file keeps its name, and so do the directories
//! that it lies in: the image would not be opened again. What closed images are based on nobody knows
//! without opening all of them. Nor does an image get another key by its name where it would not
//! notice.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, RenameFlags};
use rustix::io::Errno;

use super::host::{self, HostId, Root};
use super::{Catalog, Named, Node, errno, names, read_only};
use crate::error::{Error, ErrorKind, Result, legible};
use crate::image::{Image, Summary};
use crate::storage::{HostFile, IfTaken, NewFile};

/// Who asks for a change.
#[derive(Clone, Copy, Debug)]
pub struct Requester {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

impl Requester {
    /// Who may do everything that the host lets this process do.
    pub const US: Requester = Requester { uid: 0, gid: 0 };
}

impl Catalog {
    /// Makes an empty image with virtual size 0, as the mount's options say, owned by who asks where
    /// we may give files away. It is known to the kernel from now on, as after a lookup.
    ///
    /// # Errors
    /// `EPERM` for a name that no raw file has and where names may not change, `EEXIST`, `ReadOnly`,
    /// `EIO` while the mount ends, those of [`Image::create`] and of the host.
    pub fn make_image(
        &self,
        parent: &Node,
        name: &OsStr,
        mode: u32,
        who: Requester,
    ) -> Result<Arc<Node>> {
        if self.options.read_only {
            return Err(read_only());
        }
        self.goes_on()?;
        self.names_may_change()?;
        let Some(image) = names::image_name(name) else {
            let why = "only raw files can be made here: a file NAME.raw makes the image NAME.qcow2";
            return Err(refused(format!("making {}: {why}", shown(name)), libc::EPERM));
        };
        if self.found(parent, name)?.is_some() {
            return Err(errno(&format!("making {}", shown(name)), libc::EEXIST));
        }
        let directory = self.own_place(parent)?;
        let failed = |e| Error::io(format!("making {}", shown(&image)), e);
        let new = NewFile::new(&host::path_of(&directory.place), mode & host::FILE_MODE)
            .map_err(failed)?;
        let storage = HostFile::new(new.file().try_clone().map_err(failed)?);
        Image::create(&storage, &self.options.create)?;
        let [uid, gid] = self.owner_of_new(&directory.metadata, who);
        std::os::unix::fs::fchown(new.file(), uid, gid).map_err(failed)?;
        // Giving a file away takes mode bits away, and a default ACL may do so too.
        let exact = Permissions::from_mode(mode & host::FILE_MODE);
        new.file().set_permissions(exact).map_err(failed)?;
        let metadata = new.file().metadata().map_err(failed)?;
        new.publish(&image, IfTaken::Fail).map_err(failed)?;
        let _names = self.names.read();
        Ok(self.remember(&metadata, directory.path.join(image)))
    }

    /// Makes a directory, owned by who asks where we may give files away.
    ///
    /// # Errors
    /// `EEXIST`, and those of the host.
    pub fn make_directory(
        &self,
        parent: &Node,
        name: &OsStr,
        mode: u32,
        who: Requester,
    ) -> Result<()> {
        self.names_may_change()?;
        let _names = self.names.write();
        let failed = |e| Error::io(format!("making the directory {}", shown(name)), e);
        if self.found(parent, name)?.is_some() {
            return Err(errno(&format!("making the directory {}", shown(name)), libc::EEXIST));
        }
        let directory = self.place_among_names(parent)?;
        let owner = self.owner_of_new(&directory.metadata, who);
        make_owned_directory(directory.place, name, mode & 0o777, owner).map_err(failed)
    }

    /// Whom something new in `directory` is given to; nothing of what the host or an option decides.
    fn owner_of_new(&self, directory: &Metadata, who: Requester) -> [Option<u32>; 2] {
        if !rustix::process::geteuid().is_root() {
            return [None, None];
        }
        let inherits = directory.mode() & libc::S_ISGID != 0;
        let uid = Some(who.uid).filter(|_| self.options.uid.is_none());
        let gid = Some(who.gid).filter(|_| self.options.gid.is_none() && !inherits);
        [uid, gid]
    }

    /// Removes an image or a directory. An image that is open goes on without its name. An external
    /// data file stays: the name of one inside an image is not trusted so far.
    ///
    /// # Errors
    /// `ENOENT`, `EISDIR`, `ENOTDIR`, `InUse` for what an open image is based on, and those of the
    /// host: a directory is empty only when everything in it is gone, shown here or not.
    pub fn remove(
        &self,
        parent: &Node,
        name: &OsStr,
        directory: bool,
        who: Requester,
    ) -> Result<()> {
        self.names_may_change()?;
        // The host frees a removed file's blocks with its last descriptor, which takes long: not before
        // the lock is given up.
        let found: Named;
        let _names = self.names.write();
        found = self.found(parent, name)?.ok_or_else(|| errno("removing a name", libc::ENOENT))?;
        match (directory, found.metadata.is_dir()) {
            (true, false) => return Err(errno("removing a directory", libc::ENOTDIR)),
            (false, true) => return Err(errno("removing a file", libc::EISDIR)),
            (true, true) => {}
            (false, false) => self.is_no_ones_base(&found, "removing")?,
        }
        let parent = self.place_among_names(parent)?;
        self.may_take_away(&parent, &found, who)?;
        let host_name = found.path.file_name().unwrap_or(name);
        let target = host::path_of(&parent.place).join(host_name);
        let removed = if directory { fs::remove_dir(target) } else { fs::remove_file(target) };
        removed.map_err(|e| match e.raw_os_error() {
            Some(libc::ENOTEMPTY) => refused(
                format!("removing {}: there are files in it, shown here or not", shown(name)),
                libc::ENOTEMPTY,
            ),
            _ => Error::io(format!("removing {}", shown(name)), e),
        })?;
        tell_of_data_file(&found);
        for node in self.nodes_at(&[&found]) {
            node.remove_name(&found.path);
        }
        Ok(())
    }

    /// Renames an image or a directory, with the flags of renameat2(2).
    ///
    /// # Errors
    /// `EPERM` for an image that would not be called `.raw`, that names other files relative to the
    /// directory which it would leave, or that would get another key and not notice, and for a
    /// directory with such images; `EINVAL` for an exchange of an image with a directory; `EEXIST`
    /// where the host has the new name for something that is not shown; `InUse` for what an open image
    /// is based on, and for a directory with that in it; and those of the host.
    pub fn rename(
        &self,
        from: (&Node, &OsStr),
        to: (&Node, &OsStr),
        flags: u32,
        who: Requester,
    ) -> Result<()> {
        self.names_may_change()?;
        let flags = RenameFlags::from_bits_retain(flags);
        let what = format!("renaming {} to {}", shown(from.1), shown(to.1));
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(errno(&what, libc::EINVAL));
        }
        let moves = from.0.ino() != to.0.ino();
        if moves {
            self.directory_stands_alone(from, &what)?;
        }
        if moves && flags.contains(RenameFlags::EXCHANGE) {
            self.directory_stands_alone(to, &what)?;
        }
        // As above: the blocks of a file that is replaced.
        let target: Option<Named>;
        let _names = self.names.write();
        let source = self.found(from.0, from.1)?.ok_or_else(|| errno(&what, libc::ENOENT))?;
        target = self.found(to.0, to.1)?;
        let new_name = self.name_after_rename(&source, to.1, &what)?;
        if let Some(target) = &target {
            may_take_place(&source, target, &new_name, flags, &what)?;
        }
        for found in std::iter::once(&source).chain(&target) {
            self.is_no_ones_base(found, "renaming or replacing")?;
        }
        if moves {
            stands_alone(&source, None, &what)?;
        }
        if moves && flags.contains(RenameFlags::EXCHANGE) {
            target.as_ref().map_or(Ok(()), |target| stands_alone(target, None, &what))?;
        }
        let old_parent = self.place_among_names(from.0)?;
        let new_parent = self.place_among_names(to.0)?;
        self.may_take_away(&old_parent, &source, who)?;
        if let Some(target) = &target {
            self.may_take_away(&new_parent, target, who)?;
        }
        let new_path = new_parent.path.join(&new_name);
        self.keeps_keys(&source, &source.path, &new_path, &what)?;
        if let Some(target) = target.as_ref().filter(|_| flags.contains(RenameFlags::EXCHANGE)) {
            self.keeps_keys(target, &target.path, &source.path, &what)?;
        }
        let old_name = source.path.file_name().unwrap_or(from.1);
        let old = (&old_parent.place, old_name);
        let new = (&new_parent.place, new_name.as_os_str());
        match target.is_some() || !flags.is_empty() {
            true => rustix::fs::renameat_with(old.0, old.1, new.0, new.1, flags),
            false => rename_to_free_name(old, new),
        }
        .map_err(|e| Error::io(what, e.into()))?;
        let found: Vec<_> = std::iter::once(&source).chain(&target).collect();
        self.names_moved(&self.nodes_at(&found), &source.path, &new_path, flags);
        if !flags.contains(RenameFlags::EXCHANGE) {
            target.iter().for_each(tell_of_data_file);
        }
        Ok(())
    }

    fn name_after_rename(&self, source: &Named, name: &OsStr, what: &str) -> Result<OsString> {
        if source.metadata.is_dir() {
            return Ok(name.to_owned());
        }
        names::image_name(name).ok_or_else(|| {
            refused(format!("{what}: the name of a raw file ends in .raw"), libc::EPERM)
        })
    }

    /// Gives an image one more name, a hard link on the host.
    ///
    /// # Errors
    /// `EPERM` for a directory, for a name that no raw file has, and for an image that names other files
    /// relative to another directory, or would have two keys and not notice; `EEXIST`, and those of the
    /// host.
    pub fn link(&self, node: &Node, parent: &Node, name: &OsStr) -> Result<()> {
        self.names_may_change()?;
        let _names = self.names.write();
        let what = format!("linking {} to {}", node.path().display(), shown(name));
        let found = self.place_among_names(node)?;
        let directory = self.place_among_names(parent)?;
        if found.metadata.is_dir() {
            return Err(errno(&what, libc::EPERM));
        }
        let image = self.name_after_rename(&found, name, &what)?;
        if found.path.parent() != Some(&directory.path) {
            stands_alone(&found, None, &what)?;
        }
        self.keeps_keys(&found, &found.path, &directory.path.join(&image), &what)?;
        if self.found(parent, name)?.is_some() {
            return Err(errno(&what, libc::EEXIST));
        }
        let old = host::path_of(&found.place);
        rustix::fs::linkat(CWD, &old, &directory.place, &image, AtFlags::SYMLINK_FOLLOW)
            .map_err(|e| Error::io(what, e.into()))
    }

    /// Fails where `found`, or an image beneath it, would get another key when `from` becomes `to`, and
    /// not notice: what was written then would be lost for the right one.
    fn keeps_keys(&self, found: &Named, from: &Path, to: &Path, what: &str) -> Result<()> {
        if !self.chains.have_keys() {
            return Ok(());
        }
        if !found.metadata.is_dir() {
            let encryption = || summary_of(found).and_then(|summary| summary.encryption);
            return match self.chains.keeps_key([from, to], encryption)? {
                true => Ok(()),
                false => Err(refused(
                    format!(
                        "{what}: as {} the image {} would get another key, which its encryption \
                         (AES) would not notice: give that name the same key first, or none",
                        to.display(),
                        from.display()
                    ),
                    libc::EPERM,
                )),
            };
        }
        let names = host::list(&found.place)
            .map_err(|e| Error::io(format!("listing {}", from.display()), e))?;
        for (name, is_directory) in names {
            if is_directory || names::raw_name(&name).is_some() {
                let path = from.join(&name);
                let below = match self.place(&path) {
                    // It is gone by now.
                    Err(e) if e.errno() == libc::ENOENT => continue,
                    found => found?,
                };
                self.keeps_keys(&below, &path, &to.join(&name), what)?;
            }
        }
        Ok(())
    }

    /// What `name` stands for; `None` where it stands for nothing.
    fn found(&self, parent: &Node, name: &OsStr) -> Result<Option<Named>> {
        match self.find(parent, name) {
            Ok(found) => Ok(Some(found)),
            Err(e) if e.errno() == libc::ENOENT => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Whether every image in a directory finds what it needs when that moves elsewhere. It takes a look
    /// at all of their headers, so other names may change meanwhile.
    fn directory_stands_alone(&self, (parent, name): (&Node, &OsStr), what: &str) -> Result<()> {
        let found = self.found(parent, name)?.filter(|found| found.metadata.is_dir());
        let Some(Named { path: directory, place, .. }) = found else { return Ok(()) };
        let root = Root::at(place);
        let failed = |e| Error::io(format!("looking through {}", directory.display()), e);
        let is_image = |path: &PathBuf| path.file_name().and_then(names::raw_name).is_some();
        for within in host::files_beneath(&root).map_err(failed)?.into_iter().filter(is_image) {
            // What is gone by now needs nothing.
            let Ok(place) = root.place(&within) else { continue };
            let metadata = place.metadata().map_err(failed)?;
            if !metadata.is_file() {
                continue;
            }
            let image = Named { path: directory.join(&within), place, metadata };
            let depth = within.components().count() - 1;
            stands_alone(&image, Some(depth), &format!("{what}: {}", image.path.display()))?;
        }
        Ok(())
    }

    /// Whether `who` may do what only the owner of a file may, as far as it is for us to say: the host
    /// looks itself at what a daemon does that is not root's.
    pub(super) fn may_as_owner(&self, who: Requester, file: &Metadata) -> bool {
        let host_looks = who.uid == 0 || !rustix::process::geteuid().is_root();
        host_looks || who.uid == self.options.uid.unwrap_or(file.uid())
    }

    /// In a directory with the sticky bit only who owns it or the file takes a name away. The kernel has
    /// looked, but the name may have become another file's since.
    fn may_take_away(&self, directory: &Named, found: &Named, who: Requester) -> Result<()> {
        let is_sticky = directory.metadata.mode() & libc::S_ISVTX != 0;
        let owns = |one: &Named| self.may_as_owner(who, &one.metadata);
        match !is_sticky || owns(found) || owns(directory) {
            true => Ok(()),
            false => {
                let what = format!("taking away {}, another user's", found.path.display());
                Err(errno(&what, libc::EPERM))
            }
        }
    }

    fn is_no_ones_base(&self, found: &Named, what: &str) -> Result<()> {
        let id = HostId::of(&found.metadata);
        let used = match found.metadata.is_dir() {
            true => {
                self.chains.used_beneath(id).map(|(file, user)| (file.display().to_string(), user))
            }
            false => self.chains.user_of(id).map(|user| ("it".to_owned(), user)),
        };
        let Some((file, user)) = used else { return Ok(()) };
        let error = Error::new(
            ErrorKind::InUse,
            format!(
                "{what} {}: {file} is a backing or data file of {}, which is open; close that first",
                found.path.display(),
                user.display()
            ),
        );
        log::warn!("{error}");
        Err(error)
    }

    /// The nodes whose names change with those of `found`: where there is a directory, all may.
    fn nodes_at(&self, found: &[&Named]) -> Vec<Arc<Node>> {
        if found.iter().any(|found| found.metadata.is_dir()) {
            return self.all_nodes();
        }
        let nodes = self.nodes.read();
        let inos = found.iter().filter_map(|f| nodes.by_id.get(&HostId::of(&f.metadata)));
        let known = inos.filter_map(|ino| nodes.known.get(ino));
        known.map(|known| Arc::clone(&known.node)).collect()
    }

    fn names_moved(&self, nodes: &[Arc<Node>], from: &Path, to: &Path, flags: RenameFlags) {
        let each = |change: &dyn Fn(&Node)| nodes.iter().for_each(|node| change(node));
        if !flags.contains(RenameFlags::EXCHANGE) {
            each(&|node| node.remove_name(to));
            each(&|node| node.move_names(from, to));
            return;
        }
        // An impossible name keeps the one side while the other one moves.
        let aside = Path::new("/");
        each(&|node| node.move_names(to, aside));
        each(&|node| node.move_names(from, to));
        each(&|node| node.move_names(aside, from));
    }
}

/// Makes a directory that belongs to `owner`, where that is said.
///
/// It is given away by a descriptor, and only if that surely is what was made: who may change names
/// there could put another directory in its place, to be given that.
///
/// # Errors
/// `ESTALE` where something else has the name by now; those of the host.
fn make_owned_directory(
    parent: File,
    name: &OsStr,
    mode: u32,
    [uid, gid]: [Option<u32>; 2],
) -> io::Result<()> {
    let path = host::path_of(&parent).join(name);
    if uid.is_none() && gid.is_none() {
        return fs::DirBuilder::new().mode(mode).create(path);
    }
    // By the host's clock, whoever keeps it.
    let before = NewFile::new(&host::path_of(&parent), 0o600)?.file().metadata()?;
    fs::DirBuilder::new().mode(mode).create(path)?;
    let made = Root::at(parent).place(Path::new(name))?;
    if !is_made_since(&made, &before)? {
        return Err(io::Error::from_raw_os_error(libc::ESTALE));
    }
    std::os::unix::fs::fchown(host::open_to_change(&made)?, uid, gid)
}

/// Whether `made` is an empty directory of ours that is no older than `before`, a file of ours. Where
/// the host keeps no times of birth, an older one that is empty is taken for one too.
fn is_made_since(made: &File, before: &Metadata) -> io::Result<bool> {
    let metadata = made.metadata()?;
    let is_older = match (metadata.created(), before.created()) {
        (Ok(born), Ok(before)) => born < before,
        _ => false,
    };
    if !metadata.is_dir() || metadata.uid() != before.uid() || is_older {
        return Ok(false);
    }
    Ok(fs::read_dir(host::path_of(made))?.next().is_none())
}

/// Renames where nothing is known to have the new name: what is not shown, or has just appeared,
/// keeps it, and the error is `EEXIST`.
fn rename_to_free_name(old: (&File, &OsStr), new: (&File, &OsStr)) -> rustix::io::Result<()> {
    let rename = |flags| rustix::fs::renameat_with(old.0, old.1, new.0, new.1, flags);
    match rename(RenameFlags::NOREPLACE) {
        // Some of the host's file systems do not know the flag.
        Err(Errno::INVAL | Errno::NOSYS) => {
            match rustix::fs::statat(new.0, new.1, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(_) => Err(Errno::EXIST),
                Err(Errno::NOENT) => rename(RenameFlags::empty()),
                Err(e) => Err(e),
            }
        }
        renamed => renamed,
    }
}

/// Whether `source` may be renamed to what is `target`'s now.
fn may_take_place(
    source: &Named,
    target: &Named,
    new_name: &OsStr,
    flags: RenameFlags,
    what: &str,
) -> Result<()> {
    if flags.contains(RenameFlags::NOREPLACE) {
        return Err(errno(what, libc::EEXIST));
    }
    match (source.metadata.is_dir(), target.metadata.is_dir()) {
        (true, false) | (false, true) if flags.contains(RenameFlags::EXCHANGE) => {
            Err(errno("exchanging an image with a directory", libc::EINVAL))
        }
        (true, false) => Err(errno(what, libc::ENOTDIR)),
        (false, true) => Err(errno(what, libc::EISDIR)),
        // Both are of one kind, so that the names on the host are too.
        _ => {
            debug_assert_eq!(target.path.file_name(), Some(new_name));
            Ok(())
        }
    }
}

/// An image that names others relative to its directory does not find them from another one. Where it
/// moves with a directory in which it lies `depth` directories deep, only those outside of that count.
fn stands_alone(found: &Named, depth: Option<usize>, what: &str) -> Result<()> {
    let Some(summary) = summary_of(found) else { return Ok(()) };
    let backing = summary.backing.map(|backing| ("backing", "rebase -u -b", backing.name));
    let data = summary.data_file.map(|name| ("data", "amend -o data_file=", name));
    let stays_behind =
        |name: &[u8]| !name.starts_with(b"/") && depth.is_none_or(|depth| leads_out(name, depth));
    let relative = backing.into_iter().chain(data).find(|(_, _, name)| stays_behind(name));
    match relative {
        None => Ok(()),
        Some((kind, remedy, name)) => Err(refused(
            format!(
                "{what}: its {kind} file {} is named relative to the directory that it lies in; \
                 `qemu-img {remedy}` with the whole path lets it go elsewhere",
                legible(&name)
            ),
            libc::EPERM,
        )),
    }
}

/// Whether a relative name that is followed `depth` directories deep in a directory leads out of it.
fn leads_out(name: &[u8], depth: usize) -> bool {
    let deeper = |depth: usize, part| match part {
        Component::ParentDir => depth.checked_sub(1),
        Component::CurDir => Some(depth),
        _ => depth.checked_add(1),
    };
    Path::new(OsStr::from_bytes(name)).components().try_fold(depth, deeper).is_none()
}

/// Says that what the removed image kept its data in is still there.
fn tell_of_data_file(found: &Named) {
    if found.metadata.nlink() > 1 {
        return;
    }
    if let Some(name) = summary_of(found).and_then(|summary| summary.data_file) {
        let name = legible(&name);
        let path = found.path.display();
        log::warn!("{path} is gone, its data file {name} is not: remove it if nobody needs it");
    }
}

/// What an image's header says; `None` of a directory, and where it makes no sense.
fn summary_of(found: &Named) -> Option<Summary> {
    if found.metadata.is_dir() {
        return None;
    }
    let file = host::open_file(&found.place, false).ok()?;
    Image::summarize(&HostFile::new(file)).ok()
}

/// An error that a person should hear of, logged.
fn refused(text: String, code: i32) -> Error {
    let error = errno(&text, code);
    log::warn!("{error}");
    error
}

fn shown(name: &OsStr) -> std::path::Display<'_> {
    Path::new(name).display()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_made_just_now_is_taken_for_it() {
        let parent = tempfile::tempdir().unwrap();
        let path = |name: &str| parent.path().join(name);
        let place = |name: &str| Root::open(parent.path()).unwrap().place(name.as_ref()).unwrap();
        fs::create_dir(path("old")).unwrap();
        // Times of birth may be as coarse as a tick of the host's clock.
        std::thread::sleep(std::time::Duration::from_millis(50));
        let before = File::create_new(path("before")).unwrap().metadata().unwrap();
        assert!(before.created().is_ok(), "the host of this test keeps no times of birth");
        for name in ["new", "full", "theirs"] {
            fs::create_dir(path(name)).unwrap();
        }
        fs::write(path("full/file"), "").unwrap();
        let owner = fs::metadata(path("full/file")).unwrap().uid();
        assert_eq!(owner, 0, "tests that give files away need root");
        std::os::unix::fs::chown(path("theirs"), Some(65534), None).unwrap();
        for (name, is_new) in
            [("new", true), ("old", false), ("full", false), ("theirs", false), ("before", false)]
        {
            assert_eq!(is_made_since(&place(name), &before).unwrap(), is_new, "{name}");
        }
    }

    #[test]
    fn names_lead_out_of_a_directory_or_stay_in_it() {
        for (name, depth) in [("../x", 0), ("a/../../x", 0), ("../../a/b", 1), ("../a/../../x", 1)]
        {
            assert!(leads_out(name.as_bytes(), depth), "{name} from {depth}");
        }
        for (name, depth) in [("x", 0), ("./a/../x", 0), ("../x", 1), ("../../x/../y", 2)] {
            assert!(!leads_out(name.as_bytes(), depth), "{name} from {depth}");
        }
    }
}
