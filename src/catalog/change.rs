//! Changes of attributes, carried out on the image files.

use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use rustix::fs::XattrFlags;

use super::{Catalog, Node, Requester, SetTime, Times, acl, errno, host};
use crate::error::{Error, Result};

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
    /// `EPERM` for an owner that an option of the mount overrides, and for who is not the owner; those
    /// of the host.
    pub fn change_attributes(
        &self,
        node: &Node,
        change: AttributeChange,
        who: Requester,
    ) -> Result<()> {
        let overridden = |asked: Option<u32>, shown: Option<u32>| {
            asked.is_some() && shown.is_some() && asked != shown
        };
        if overridden(change.uid, self.options.uid) || overridden(change.gid, self.options.gid) {
            return Err(errno("changing an owner that the mount's options set", libc::EPERM));
        }
        self.make_changeable(node)?;
        let changed = self.at_opened(node, "changing attributes", |file| {
            self.may_change(file, change, who)?;
            self.apply(node, file, change)
        });
        note_change(node);
        changed
    }

    /// The kernel goes by the owner that it was last told of, and the host may have another one by now.
    fn may_change(&self, file: &File, change: AttributeChange, who: Requester) -> io::Result<()> {
        let is_time = |time: Option<SetTime>| matches!(time, Some(SetTime::At(_)));
        let is_owners = change.mode.is_some()
            || change.uid.is_some()
            || change.gid.is_some()
            || is_time(change.accessed)
            || is_time(change.modified);
        match !is_owners || self.may_as_owner(who, &file.metadata()?) {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::EPERM)),
        }
    }

    /// Runs `verb` on a node's file on the host, which may be open for nothing. One that is open in an
    /// image is found even when its name is gone.
    fn at_place<R>(
        &self,
        node: &Node,
        what: &str,
        verb: impl Fn(&File) -> io::Result<R>,
    ) -> Result<R> {
        self.at(node, what, Ok, verb)
    }

    /// The same, for what changes attributes: the file is open.
    fn at_opened<R>(
        &self,
        node: &Node,
        what: &str,
        verb: impl Fn(&File) -> io::Result<R>,
    ) -> Result<R> {
        self.at(node, what, |place| host::open_to_change(&place), verb)
    }

    fn at<R>(
        &self,
        node: &Node,
        what: &str,
        open: impl Fn(File) -> io::Result<File>,
        verb: impl Fn(&File) -> io::Result<R>,
    ) -> Result<R> {
        let done = match self.at_image(node, &verb) {
            Some(done) => done,
            None => open(self.place_of(node)?.0).and_then(|file| verb(&file)),
        };
        done.map_err(|e| Error::io(format!("{what} of {}", node.path().display()), e))
    }

    /// Runs `verb` on a node's file on the host where that is open in an image, and is the one whose
    /// attributes are meant.
    fn at_image<R>(&self, node: &Node, verb: impl Fn(&File) -> R) -> Option<R> {
        match &self.overlays {
            None => node.peek(|_, file, _| verb(file)),
            // What is open may be the image below an overlay that has just been made.
            Some(_) => None,
        }
    }

    fn apply(&self, node: &Node, file: &File, change: AttributeChange) -> io::Result<()> {
        let uid = change.uid.filter(|_| self.options.uid.is_none());
        let gid = change.gid.filter(|_| self.options.gid.is_none());
        if uid.is_some() || gid.is_some() {
            std::os::unix::fs::fchown(file, uid, gid)?;
        }
        if let Some(mode) = change.mode {
            let metadata = file.metadata()?;
            let bits = if metadata.is_dir() { host::DIRECTORY_MODE } else { host::FILE_MODE };
            let shown = acl::mode_of(file, metadata.mode()) & !self.options.umask;
            let mode = acl::mode_to_set(file, metadata.mode(), shown, mode & bits);
            file.set_permissions(Permissions::from_mode(mode))?;
        }
        if change.accessed.is_some() || change.modified.is_some() {
            host::set_times(file, [change.accessed, change.modified])?;
            let now = file.metadata()?;
            let times = Times {
                accessed: change.accessed.and_then(|_| now.accessed().ok()),
                modified: change.modified.and_then(|_| now.modified().ok()),
            };
            node.times.keep(times, node.look_at_data_file().as_ref());
        }
        Ok(())
    }

    /// The value of an extended attribute of a node's file on the host.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for one that is not the users', `ENODATA`, and those of the host.
    pub fn extended_attribute(&self, node: &Node, name: &OsStr) -> Result<Vec<u8>> {
        is_users(name)?;
        self.at_place(node, "reading an extended attribute", |file| host::attribute(file, name))
    }

    /// The names of the extended attributes of a node's file, each with a NUL after it.
    ///
    /// # Errors
    /// Those of the host.
    pub fn extended_attributes(&self, node: &Node) -> Result<Vec<u8>> {
        self.at_place(node, "listing the extended attributes", host::user_attributes)
    }

    /// Sets an extended attribute of a node's file, with the flags of setxattr(2).
    ///
    /// # Errors
    /// `EOPNOTSUPP` for one that is not the users', and those of the host.
    pub fn set_extended_attribute(
        &self,
        node: &Node,
        name: &OsStr,
        value: &[u8],
        flags: u32,
    ) -> Result<()> {
        is_users(name)?;
        self.make_changeable(node)?;
        let flags = XattrFlags::from_bits_retain(flags);
        self.at_opened(node, "setting an extended attribute", |file| {
            Ok(rustix::fs::fsetxattr(file, name, value, flags)?)
        })?;
        note_change(node);
        Ok(())
    }

    /// Removes an extended attribute of a node's file.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for one that is not the users', `ENODATA`, and those of the host.
    pub fn remove_extended_attribute(&self, node: &Node, name: &OsStr) -> Result<()> {
        is_users(name)?;
        self.make_changeable(node)?;
        self.at_opened(node, "removing an extended attribute", |file| {
            Ok(rustix::fs::fremovexattr(file, name)?)
        })?;
        note_change(node);
        Ok(())
    }

    /// Makes the attributes of a node's file durable that were set here.
    ///
    /// # Errors
    /// Those of the host.
    pub fn sync_attributes(&self, node: &Node) -> Result<()> {
        let mut unsynced = node.unsynced_attributes.lock();
        if !*unsynced {
            return Ok(());
        }
        // What is open may be the image below an overlay that has them.
        match node.open_file().filter(|_| self.overlays.is_none()) {
            Some(open) => {
                node.with_image(|image| image.sync_with(|| open.file().sync_all()))?;
            }
            None => host::open_file(&self.place_of(node)?.0, false)
                .and_then(|file| file.sync_all())
                .map_err(|e| {
                    let name = node.path();
                    Error::io(format!("syncing the attributes of {}", name.display()), e)
                })?,
        }
        *unsynced = false;
        Ok(())
    }

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// Those of the host.
    pub fn sync_directory(&self, node: &Node) -> Result<()> {
        self.at_place(node, "syncing the names", |place| {
            File::open(host::path_of(place))?.sync_all()
        })
    }
}

fn note_change(node: &Node) {
    *node.unsynced_attributes.lock() = true;
}

fn is_users(name: &OsStr) -> Result<()> {
    match host::is_users(name) {
        true => Ok(()),
        false => Err(errno("an extended attribute that is not the users'", libc::EOPNOTSUPP)),
    }
}
