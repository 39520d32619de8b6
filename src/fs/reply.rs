//! What the kernel is told: attributes, times to live, errnos.

use std::time::Duration;

use fuser::{Errno, FileAttr, FileType, INodeNo};

use crate::catalog::{Attributes, Node};
use crate::error::{Error, ErrorKind};

/// How long the kernel may trust a name: not at all, since names change on the host.
pub(super) const ENTRY_TTL: Duration = Duration::ZERO;
/// How long the kernel may trust attributes of an image that only we change.
const OPEN_TTL: Duration = Duration::from_secs(1);

/// Block sizes that `stat` shows, whatever the cluster size: what copying programs take for their
/// buffers.
const BLOCK_SIZES: std::ops::RangeInclusive<u64> = 4096..=2 << 20;

/// How long the kernel may trust `attributes`: those of an image that is not open can be changed by
/// others at any time.
pub(super) fn attribute_ttl(attributes: &Attributes) -> Duration {
    if attributes.open { OPEN_TTL } else { Duration::ZERO }
}

pub(super) fn file_attr(attributes: &Attributes) -> FileAttr {
    use std::os::unix::fs::MetadataExt;
    let host = &attributes.host;
    let time = |seconds: i64, nanoseconds: i64| {
        let whole = Duration::from_secs(seconds.unsigned_abs());
        let rest = Duration::from_nanos(nanoseconds.unsigned_abs());
        let epoch = std::time::SystemTime::UNIX_EPOCH;
        let whole = if seconds < 0 { epoch.checked_sub(whole) } else { epoch.checked_add(whole) };
        whole.and_then(|time| time.checked_add(rest)).unwrap_or(epoch)
    };
    let data = attributes.data.as_ref();
    let later = |own: (i64, i64), its: fn(&std::fs::Metadata) -> (i64, i64)| {
        let (seconds, nanoseconds) = data.map_or(own, |data| own.max(its(data)));
        time(seconds, nanoseconds)
    };
    let set = attributes.times;
    let modified = later((host.mtime(), host.mtime_nsec()), |m| (m.mtime(), m.mtime_nsec()));
    let modified = set.modified.unwrap_or(modified);
    let block = attributes.cluster_size.clamp(*BLOCK_SIZES.start(), *BLOCK_SIZES.end());
    FileAttr {
        ino: INodeNo(attributes.ino),
        size: attributes.size,
        blocks: host.blocks() + data.map_or(0, |data| data.blocks()),
        atime: set.accessed.unwrap_or(time(host.atime(), host.atime_nsec())),
        mtime: modified,
        ctime: later((host.ctime(), host.ctime_nsec()), |m| (m.ctime(), m.ctime_nsec())),
        crtime: modified,
        kind: if attributes.directory { FileType::Directory } else { FileType::RegularFile },
        perm: attributes.mode as u16,
        nlink: host.nlink() as u32,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: block as u32,
        flags: 0,
    }
}

/// The errno to answer with; what a person should hear of is logged.
pub(super) fn fail(node: Option<&Node>, error: &Error) -> Errno {
    let code = match error.errno() {
        // The kernel takes this one for "never ask again".
        libc::ENOSYS => libc::EIO,
        code => code,
    };
    let expected = !matches!(code, libc::EIO | libc::ENOSPC | libc::EDQUOT | libc::EFBIG)
        && !matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Unsupported);
    match node {
        Some(node) if !expected => node.log(error),
        _ => log::debug!("{error}"),
    }
    Errno::from_i32(code)
}
