//! `.snap/` in every directory: hidden from listings, found by name. `.snap/disk.raw/` lists the
//! snapshots of `disk.raw` beside it as read-only files: their size is that of the disk then, their
//! time that of the snapshot. Creating a name there takes a snapshot, removing it deletes one.
//!
//! A snapshot whose name cannot be that of a file is shown by its id. What a snapshot holds never
//! changes, so what the kernel has cached of one stays right: an inode number stands for one
//! snapshot and no other.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{FileAttr, FileType, INodeNo, ReplyDirectory};
use parking_lot::Mutex;

use super::control::kind;
use super::reply::file_attr;
use super::verbs::{Handle, Verbs, errno};
use crate::catalog::Node;
use crate::error::{Error, Result};
use crate::image::SnapshotInfo;

/// The directory's name.
pub(super) const NAME: &str = ".snap";
/// Inode numbers from here on are ours; those of the catalog never get so far.
const FIRST_INO: u64 = 1 << 62;
/// Bytes of the longest name of a file.
const MAX_NAME: usize = 255;

/// Whether an inode number is one of ours.
pub(super) fn is_ours(ino: INodeNo) -> bool {
    ino.0 >= FIRST_INO
}

/// What an inode number of ours stands for.
#[derive(Clone)]
pub(super) enum Place {
    /// `.snap` in a directory.
    Directory(Arc<Node>),
    /// `.snap/disk.raw`.
    Image(Arc<Node>),
    /// A snapshot.
    Snapshot(Arc<Node>, SnapshotInfo),
}

/// What tells one place from all others, ever.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Directory(u64),
    Image(u64),
    Snapshot(u64, String, SystemTime),
}

/// The inode numbers that the kernel knows.
#[derive(Default)]
pub(super) struct Snaps {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    places: HashMap<u64, Counted>,
    inos: HashMap<Key, u64>,
    given: u64,
}

struct Counted {
    place: Place,
    key: Key,
    lookups: u64,
}

impl Place {
    fn key(&self) -> Key {
        match self {
            Place::Directory(node) => Key::Directory(node.ino()),
            Place::Image(node) => Key::Image(node.ino()),
            Place::Snapshot(node, info) => Key::Snapshot(node.ino(), info.id.clone(), info.taken),
        }
    }
}

impl Snaps {
    /// The number of a place, one lookup counted; whether it is new.
    fn remember(&self, place: &Place) -> (u64, bool) {
        let mut known = self.known.lock();
        let key = place.key();
        if let Some(&ino) = known.inos.get(&key)
            && let Some(counted) = known.places.get_mut(&ino)
        {
            counted.lookups += 1;
            return (ino, false);
        }
        let ino = FIRST_INO + known.given;
        known.given += 1;
        known.inos.insert(key.clone(), ino);
        known.places.insert(ino, Counted { place: place.clone(), key, lookups: 1 });
        (ino, true)
    }

    fn place(&self, ino: INodeNo) -> Result<Place> {
        let known = self.known.lock();
        let counted = known.places.get(&ino.0);
        counted.map(|counted| counted.place.clone()).ok_or_else(|| stale("a snapshot's file"))
    }

    fn forget(&self, ino: u64, lookups: u64) -> Option<Place> {
        let mut known = self.known.lock();
        let counted = known.places.get_mut(&ino)?;
        counted.lookups = counted.lookups.saturating_sub(lookups);
        if counted.lookups > 0 {
            return None;
        }
        let gone = known.places.remove(&ino)?;
        known.inos.remove(&gone.key);
        Some(gone.place)
    }
}

impl Verbs {
    /// Finds `name` in a directory, where that is `.snap` or beneath one.
    pub(super) fn snap_lookup(&self, parent: INodeNo, name: &OsStr) -> Result<FileAttr> {
        let place = match self.snap_parent(parent)? {
            None => Place::Directory(self.catalog.node(parent.0)?),
            Some(Place::Directory(directory)) => {
                let found = self.catalog.lookup(directory.ino(), name)?;
                let node = self.catalog.node(found.ino)?;
                if found.directory {
                    self.catalog.forget(found.ino, 1);
                    return Err(missing());
                }
                Place::Image(node)
            }
            Some(Place::Image(node)) => {
                let mut shown = shown(self.catalog.snapshots(&node)?);
                let found = shown.iter().position(|(shown, _)| shown.as_bytes() == name.as_bytes());
                Place::Snapshot(node, shown.swap_remove(found.ok_or_else(missing)?).1)
            }
            Some(Place::Snapshot(..)) => return Err(errno("looking up a name", libc::ENOTDIR)),
        };
        self.snap_entry(place)
    }

    fn snap_entry(&self, place: Place) -> Result<FileAttr> {
        let (ino, is_new) = self.snaps.remember(&place);
        if let (Place::Image(node), false) = (&place, is_new) {
            // One lookup of the image is enough to keep its node.
            self.catalog.forget(node.ino(), 1);
        }
        self.attributes_of(ino, &place).inspect_err(|_| self.snap_forget(INodeNo(ino), 1))
    }

    fn snap_parent(&self, parent: INodeNo) -> Result<Option<Place>> {
        if is_ours(parent) { self.snaps.place(parent).map(Some) } else { Ok(None) }
    }

    /// The kernel has forgotten `lookups` of its lookups.
    pub(super) fn snap_forget(&self, ino: INodeNo, lookups: u64) {
        if let Some(Place::Image(node)) = self.snaps.forget(ino.0, lookups) {
            self.catalog.forget(node.ino(), 1);
        }
    }

    /// The attributes of one of ours.
    pub(super) fn snap_attributes(&self, ino: INodeNo) -> Result<FileAttr> {
        self.attributes_of(ino.0, &self.snaps.place(ino)?)
    }

    fn attributes_of(&self, ino: u64, place: &Place) -> Result<FileAttr> {
        let (Place::Directory(node) | Place::Image(node) | Place::Snapshot(node, _)) = place;
        let mut attr = file_attr(&self.catalog.attributes(node)?);
        attr.ino = INodeNo(ino);
        let readable = attr.perm & 0o444;
        match place {
            Place::Directory(_) => attr.perm &= 0o555,
            Place::Image(_) => attr.perm = readable | readable >> 2 | attr.perm & 0o222,
            Place::Snapshot(_, info) => {
                attr.perm = readable;
                attr.size = info.disk_size;
                for time in [&mut attr.atime, &mut attr.mtime, &mut attr.ctime, &mut attr.crtime] {
                    *time = info.taken;
                }
            }
        }
        attr.nlink = 1;
        if !matches!(place, Place::Snapshot(..)) {
            attr.kind = FileType::Directory;
            attr.nlink = 2;
            attr.size = 0;
        }
        // The blocks are the image's.
        attr.blocks = 0;
        Ok(attr)
    }

    /// The node that `ino` stands for, or whose snapshots it is about; `None` for what is of no image.
    pub(super) fn node_behind(&self, ino: INodeNo) -> Option<Arc<Node>> {
        if !is_ours(ino) {
            return self.catalog.node(ino.0).ok();
        }
        match self.snaps.place(ino).ok()? {
            Place::Image(node) | Place::Snapshot(node, _) => Some(node),
            Place::Directory(_) => None,
        }
    }

    /// Opens a snapshot for reading.
    pub(super) fn snap_open(&self, ino: INodeNo, write: bool) -> Result<u64> {
        let Place::Snapshot(node, info) = self.snaps.place(ino)? else {
            return Err(errno("opening a directory as a file", libc::EISDIR));
        };
        if write {
            return Err(errno("opening a snapshot for writing", libc::EROFS));
        }
        let view = self.catalog.open_snapshot(&node, &info.id)?;
        Ok(self.add_handle(Handle::Snapshot { node, view }))
    }

    /// Takes a snapshot and opens it.
    pub(super) fn snap_create(&self, parent: INodeNo, name: &OsStr) -> Result<(FileAttr, u64)> {
        let Place::Image(node) = self.snaps.place(parent)? else {
            return Err(errno("creating a file where no snapshots are", libc::EPERM));
        };
        self.catalog.take_snapshot(&node, name.as_bytes())?;
        let attr = self.snap_lookup(parent, name)?;
        match self.snap_open(attr.ino, false) {
            Ok(handle) => Ok((attr, handle)),
            Err(e) => {
                self.snap_forget(attr.ino, 1);
                Err(e)
            }
        }
    }

    /// Deletes a snapshot.
    pub(super) fn snap_remove(&self, parent: INodeNo, name: &OsStr) -> Result<()> {
        let Place::Image(node) = self.snaps.place(parent)? else {
            return Err(errno("removing what is no snapshot", libc::EPERM));
        };
        let shown = shown(self.catalog.snapshots(&node)?);
        let found = shown.iter().find(|(shown, _)| shown.as_bytes() == name.as_bytes());
        let (_, info) = found.ok_or_else(missing)?;
        self.catalog.delete_snapshot(&node, &info.id)
    }

    /// Opens one of the directories, to be listed as it is now.
    pub(super) fn snap_open_directory(&self, ino: INodeNo) -> Result<u64> {
        let names: Vec<(Vec<u8>, bool)> = match self.snaps.place(ino)? {
            Place::Directory(node) => {
                let images = self.catalog.list(&node)?.into_iter().filter(|e| !e.directory);
                images.map(|entry| (entry.name.as_bytes().to_vec(), true)).collect()
            }
            Place::Image(node) => {
                let shown = shown(self.catalog.snapshots(&node)?);
                shown.into_iter().map(|(name, _)| (name.into_bytes(), false)).collect()
            }
            Place::Snapshot(..) => return Err(errno("listing a file", libc::ENOTDIR)),
        };
        Ok(self.add_handle(Handle::Names(names)))
    }
}

/// Lists the names of a directory of ours from entry `from` on.
pub(super) fn list(names: &[(Vec<u8>, bool)], from: u64, reply: &mut ReplyDirectory) {
    let dots = [(&b"."[..], true), (&b".."[..], true)];
    let named = names.iter().map(|(name, directory)| (name.as_slice(), *directory));
    for (number, (name, directory)) in (1..).zip(dots.into_iter().chain(named)) {
        if number > from
            && reply.add(super::UNKNOWN_INO, number, kind(directory), OsStr::from_bytes(name))
        {
            break;
        }
    }
}

/// Snapshots by the names that they are shown by: their own, or the id where that cannot be the name
/// of a file or is another one's too. One that cannot be shown by either is left out.
fn shown(snapshots: Vec<SnapshotInfo>) -> Vec<(String, SnapshotInfo)> {
    let mut shown: Vec<(String, SnapshotInfo)> = Vec::with_capacity(snapshots.len());
    let mut taken = std::collections::HashSet::new();
    let mut others = Vec::new();
    for info in snapshots {
        if is_file_name(&info.name) && taken.insert(info.name.clone()) {
            shown.push((info.name.clone(), info));
        } else {
            others.push(info);
        }
    }
    for info in others {
        if is_file_name(&info.id) && taken.insert(info.id.clone()) {
            shown.push((info.id.clone(), info));
        }
    }
    shown
}

fn is_file_name(name: &str) -> bool {
    let impossible = name.is_empty() || name == "." || name == ".." || name.len() > MAX_NAME;
    !impossible && !name.contains(['/', '\0'])
}

fn missing() -> Error {
    errno("looking up a name", libc::ENOENT)
}

fn stale(what: &str) -> Error {
    errno(&format!("using {what} that is forgotten"), libc::ESTALE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(id: &str, name: &str) -> SnapshotInfo {
        SnapshotInfo {
            id: id.into(),
            name: name.into(),
            taken: SystemTime::UNIX_EPOCH,
            disk_size: 0,
            vm_state_size: 0,
        }
    }

    #[test]
    fn a_name_that_no_file_can_have_or_that_is_taken_shows_as_the_id() {
        let long = "x".repeat(256);
        let snapshots = [
            info("1", "a"),
            info("2", "a/b"),
            info("3", "a"),
            info("4", ""),
            info("5", ".."),
            info("6", &long),
            info("7", "4"),
            info("8", "a\0"),
        ];
        let shown = shown(snapshots.to_vec());
        let names: Vec<_> = shown.iter().map(|(name, info)| (&name[..], &info.id[..])).collect();
        let expected =
            [("a", "1"), ("4", "7"), ("2", "2"), ("3", "3"), ("5", "5"), ("6", "6"), ("8", "8")];
        assert_eq!(names, expected, "and 4 has neither");
    }
}
