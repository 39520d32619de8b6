//! `.qcow2fs/` at the root: hidden from listings, found by name. `status` in it tells the state of
//! the mount as JSON, `metrics` for Prometheus. `control` takes orders, one a line, from whoever serves the mount and from
//! root:
//!
//! - `compact NAME` has the image behind the raw file `NAME` made as short as it gets; it stays open
//!   as long as `control` is. It goes on in the background, and `status` tells how far it is.
//! - `stop NAME` takes that back.
//!
//! `status` and `metrics` name images: whoever may list the image directory may read them.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::SystemTime;

use fuser::{FileAttr, FileType, INodeNo, ReplyDirectory};

use crate::catalog::{Catalog, ROOT};

/// The directory's name.
pub(super) const NAME: &str = ".qcow2fs";
/// The directory's inode number, below those of images.
pub(super) const DIRECTORY: INodeNo = INodeNo(2);
/// The inode number of `status`.
pub(super) const STATUS: INodeNo = INodeNo(3);

/// The inode number of `control`.
pub(super) const CONTROL: INodeNo = INodeNo(4);

/// The inode number of `metrics`.
pub(super) const METRICS: INodeNo = INodeNo(5);

const METRICS_NAME: &str = "metrics";
const STATUS_NAME: &str = "status";
const CONTROL_NAME: &str = "control";

/// What is written to `control`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order<'a> {
    Compact(&'a Path),
    Stop(&'a Path),
}

/// The orders in what was written at once: whole lines, the last one with or without its end.
/// `None` where one makes no sense.
pub(super) fn orders(text: &[u8]) -> Option<Vec<Order<'_>>> {
    let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines
        .map(|line| {
            let space = line.iter().position(|byte| *byte == b' ')?;
            let name = Path::new(OsStr::from_bytes(&line[space + 1..]));
            match &line[..space] {
                b"compact" => Some(Order::Compact(name)),
                b"stop" => Some(Order::Stop(name)),
                _ => None,
            }
        })
        .collect()
}

/// Which one is found under `name`, where that is one of ours.
pub(super) fn find(parent: INodeNo, name: &OsStr) -> Option<INodeNo> {
    match (parent, name) {
        (INodeNo(ROOT), name) if name == NAME => Some(DIRECTORY),
        (DIRECTORY, name) if name == STATUS_NAME => Some(STATUS),
        (DIRECTORY, name) if name == METRICS_NAME => Some(METRICS),
        (DIRECTORY, name) if name == CONTROL_NAME => Some(CONTROL),
        _ => None,
    }
}

/// Whether it is one of ours.
pub(super) fn is_ours(ino: INodeNo) -> bool {
    matches!(ino, DIRECTORY | STATUS | METRICS | CONTROL)
}

/// Who owns a file, and what its mode is.
struct Access {
    uid: u32,
    gid: u32,
    mode: u32,
}

impl Access {
    /// That of the image directory, as it is shown; where that cannot be told, whoever serves the
    /// mount and nobody else.
    fn of_directory(catalog: &Catalog) -> Access {
        let shown = catalog.node(ROOT).and_then(|root| catalog.attributes(&root));
        match shown {
            Ok(shown) => Access { uid: shown.uid, gid: shown.gid, mode: shown.mode },
            Err(_) => Access { mode: 0o500, ..Access::to_give_orders() },
        }
    }

    fn to_give_orders() -> Access {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        Access { uid: uid.as_raw(), gid: gid.as_raw(), mode: 0o200 }
    }
}

/// The attributes of one of ours.
pub(super) fn attributes(catalog: &Catalog, ino: INodeNo) -> Option<FileAttr> {
    let (directory, mask) = match ino {
        DIRECTORY => (true, 0o555),
        STATUS | METRICS => (false, 0o444),
        CONTROL => (false, 0o200),
        _ => return None,
    };
    let Access { uid, gid, mode } = match ino {
        CONTROL => Access::to_give_orders(),
        _ => Access::of_directory(catalog),
    };
    let perm = (mode & mask) as u16;
    let now = SystemTime::now();
    Some(FileAttr {
        ino,
        size: 0,
        blocks: 0,
        atime: now,
        mtime: now,
        ctime: now,
        crtime: now,
        kind: kind(directory),
        perm,
        nlink: if directory { 2 } else { 1 },
        uid,
        gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    })
}

/// Lists the directory from entry `from` on.
pub(super) fn list(from: u64, reply: &mut ReplyDirectory) {
    let entries = [
        (DIRECTORY, true, "."),
        (INodeNo(ROOT), true, ".."),
        (STATUS, false, STATUS_NAME),
        (METRICS, false, METRICS_NAME),
        (CONTROL, false, CONTROL_NAME),
    ];
    for (number, (ino, directory, name)) in (1..).zip(entries) {
        if number > from && reply.add(ino, number, kind(directory), name) {
            break;
        }
    }
}

/// The kind of file that FUSE knows it as.
pub(super) fn kind(directory: bool) -> FileType {
    if directory { FileType::Directory } else { FileType::RegularFile }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_lines_of_a_verb_and_a_name() {
        let name = Path::new("a b/c.raw");
        let both = Some(vec![Order::Compact(name), Order::Stop(name)]);
        assert_eq!(orders(b"compact a b/c.raw\nstop a b/c.raw\n"), both);
        assert_eq!(orders(b"compact a b/c.raw"), Some(vec![Order::Compact(name)]));
        for wrong in ["compact", "erase x", "compact x\nfoo\n", "Compact x"] {
            assert_eq!(orders(wrong.as_bytes()), None, "{wrong}");
        }
    }
}
