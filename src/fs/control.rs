//! `.qcow2fs/` at the root: hidden from listings, found by name. `status` in it tells the state of
//! the mount as JSON.

use std::ffi::OsStr;
use std::time::SystemTime;

use fuser::{FileAttr, FileType, INodeNo, ReplyDirectory};

use crate::catalog::ROOT;

/// The directory's name.
pub(super) const NAME: &str = ".qcow2fs";
/// The directory's inode number, below those of images.
pub(super) const DIRECTORY: INodeNo = INodeNo(2);
/// The inode number of `status`.
pub(super) const STATUS: INodeNo = INodeNo(3);

const STATUS_NAME: &str = "status";

/// What is found under `name`, where that is one of ours.
pub(super) fn lookup(parent: INodeNo, name: &OsStr) -> Option<FileAttr> {
    match (parent, name) {
        (INodeNo(ROOT), name) if name == NAME => attributes(DIRECTORY),
        (DIRECTORY, name) if name == STATUS_NAME => attributes(STATUS),
        _ => None,
    }
}

/// The attributes of one of ours.
pub(super) fn attributes(ino: INodeNo) -> Option<FileAttr> {
    let (directory, perm) = match ino {
        DIRECTORY => (true, 0o555),
        STATUS => (false, 0o444),
        _ => return None,
    };
    // SAFETY: these take nothing and cannot fail.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
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
    let entries =
        [(DIRECTORY, true, "."), (INodeNo(ROOT), true, ".."), (STATUS, false, STATUS_NAME)];
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
