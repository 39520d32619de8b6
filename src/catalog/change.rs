//! Changes of names and attributes, carried out on the image files.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use super::{Catalog, Node, SetTime, errno, host, names};
use crate::error::{Error, Result};
use crate::storage;

/// Which attributes to set; `None` leaves one as it is. The size is not among them: it is the
/// image's matter.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttributeChange {
    /// The permission bits.
    pub mode: Option<u32>,
    /// The owner.
    pub uid: Option<u32>,
    /// The group.
    pub gid: Option<u32>,
    /// The time of the last access.
    pub accessed: Option<SetTime>,
    /// The time of the last change.
    pub modified: Option<SetTime>,
}

impl Catalog {
    /// Sets attributes of a node's file on the host.
    ///
    /// # Errors
    /// `EPERM` for an owner that an option of the mount overrides, and those of the host.
    pub fn change_attributes(&self, node: &Node, change: AttributeChange) -> Result<()> {
        let overridden = |asked: Option<u32>, shown: Option<u32>| {
            asked.is_some() && shown.is_some() && asked != shown
        };
        if overridden(change.uid, self.options.uid) || overridden(change.gid, self.options.gid) {
            return Err(errno("changing an owner that the mount's options set", libc::EPERM));
        }
        self.make_changeable(node)?;
        let failed = |e| Error::io(format!("changing attributes of {}", node.path().display()), e);
        // What is open may be the image below an overlay that has just been made.
        let open = match &self.overlays {
            None => node.peek(|_, file, _| self.apply(file, change)),
            Some(_) => None,
        };
        match open {
            Some(done) => done.map_err(failed),
            None => self.apply(&self.place_of(node)?.0, change).map_err(failed),
        }
    }

    fn apply(&self, place: &File, change: AttributeChange) -> io::Result<()> {
        let path = host::path_of(place);
        let uid = change.uid.filter(|_| self.options.uid.is_none());
        let gid = change.gid.filter(|_| self.options.gid.is_none());
        if uid.is_some() || gid.is_some() {
            std::os::unix::fs::chown(&path, uid, gid)?;
        }
        if let Some(mode) = change.mode {
            fs::set_permissions(&path, Permissions::from_mode(mode & 0o777))?;
        }
        if change.accessed.is_some() || change.modified.is_some() {
            host::set_times(place, [change.accessed, change.modified])?;
        }
        Ok(())
    }

    /// Makes a directory, owned by `owner` where we may give files away.
    ///
    /// # Errors
    /// Those of the host.
    pub fn make_directory(
        &self,
        parent: &Node,
        name: &OsStr,
        mode: u32,
        owner: (u32, u32),
    ) -> Result<()> {
        self.names_may_change()?;
        let (place, _) = self.place_of(parent)?;
        let path = host::path_of(&place).join(name);
        let failed = |e| Error::io(format!("making the directory {}", shown(name)), e);
        fs::DirBuilder::new().mode(mode & 0o777).create(&path).map_err(failed)?;
        // SAFETY: geteuid takes nothing and cannot fail.
        if unsafe { libc::geteuid() } == 0 {
            std::os::unix::fs::lchown(&path, Some(owner.0), Some(owner.1)).map_err(failed)?;
        }
        Ok(())
    }

    /// Removes an image or a directory. An image that is open goes on without its name.
    ///
    /// # Errors
    /// `ENOENT`, `EISDIR`, `ENOTDIR`, and those of the host: a directory is empty only when
    /// everything in it is gone, shown here or not.
    pub fn remove(&self, parent: &Node, name: &OsStr, directory: bool) -> Result<()> {
        self.names_may_change()?;
        let (path, _, metadata) = self.find(parent, name)?;
        let failed = |e| Error::io(format!("removing {}", shown(name)), e);
        let (place, _) = self.place_of(parent)?;
        let target = host::path_of(&place).join(path.file_name().unwrap_or(name));
        match (directory, metadata.is_dir()) {
            (true, true) => fs::remove_dir(target).map_err(failed)?,
            (false, false) => fs::remove_file(target).map_err(failed)?,
            (true, false) => return Err(errno("removing a directory", libc::ENOTDIR)),
            (false, true) => return Err(errno("removing a file", libc::EISDIR)),
        }
        self.each_node(|node| node.remove_name(&path));
        Ok(())
    }

    /// Renames an image or a directory, with the flags of renameat2(2).
    ///
    /// # Errors
    /// `EPERM` for an image that would not be called `.raw`, `EINVAL` for an exchange of an image with
    /// a directory, and those of the host.
    pub fn rename(&self, from: (&Node, &OsStr), to: (&Node, &OsStr), flags: u32) -> Result<()> {
        self.names_may_change()?;
        let (path, _, metadata) = self.find(from.0, from.1)?;
        let new_name = match (metadata.is_dir(), names::image_name(to.1)) {
            (true, _) => to.1.to_owned(),
            (false, Some(image)) => image,
            (false, None) => {
                let why = format!("renaming {} to a name without .raw", shown(from.1));
                return Err(errno(&why, libc::EPERM));
            }
        };
        if flags & libc::RENAME_EXCHANGE != 0 {
            // Both names must stand for what is exchanged.
            let (target, _, _) = self.find(to.0, to.1)?;
            if target.file_name() != Some(&new_name) {
                return Err(errno("exchanging an image with a directory", libc::EINVAL));
            }
        }
        let (old_parent, _) = self.place_of(from.0)?;
        let (new_parent, _) = self.place_of(to.0)?;
        let old_name = path.file_name().unwrap_or(from.1);
        storage::rename(&old_parent, old_name, &new_parent, &new_name, flags)
            .map_err(|e| Error::io(format!("renaming {} to {}", shown(from.1), shown(to.1)), e))?;
        let new_path = to.0.path().join(new_name);
        self.names_moved(&path, &new_path, flags);
        Ok(())
    }

    fn names_moved(&self, from: &Path, to: &Path, flags: u32) {
        if flags & libc::RENAME_EXCHANGE == 0 {
            self.each_node(|node| {
                node.remove_name(to);
                node.move_names(from, to);
            });
            return;
        }
        // An impossible name keeps the one side while the other one moves.
        let aside = Path::new("/");
        self.each_node(|node| node.move_names(to, aside));
        self.each_node(|node| node.move_names(from, to));
        self.each_node(|node| node.move_names(aside, from));
    }

    fn each_node(&self, mut change: impl FnMut(&Node)) {
        self.nodes.read().known.values().for_each(|known| change(&known.node));
    }
}

fn shown(name: &OsStr) -> std::path::Display<'_> {
    Path::new(name).display()
}
