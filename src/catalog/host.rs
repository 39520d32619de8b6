//! The image directory on the host: names beneath it, and who a file is.
//!
//! Every name is opened beneath the directory that was opened at the start, without following a
//! symbolic link anywhere. What is opened first is only a place (`O_PATH`): nothing happens to a
//! device or a FIFO by looking at it. Nothing here knows qcow2.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{
    CWD, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags,
};
use rustix::io::Errno;

pub(super) use crate::storage::regular::{open_place as open_file, path_of};

/// How often an open is tried again while names are being moved about.
const ATTEMPTS: u32 = 16;

/// The mode bits of files that are shown and may be set.
pub(super) const FILE_MODE: u32 = 0o777;
/// The same of directories: who may remove what in them, and whose group new files get, too.
pub(super) const DIRECTORY_MODE: u32 = 0o3777;

/// Seconds between two times of the coarsest host (FAT).
const COARSEST: u64 = 2;
/// Nanoseconds that the times of coarse hosts are multiples of; those of others, be they as coarse as a
/// tick of the kernel's clock, hardly ever are.
const FINE: i64 = 10_000_000;

/// Which file it is, whatever its name. The time of birth tells a new file from an old one whose
/// inode number it got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct HostId {
    device: u64,
    inode: u64,
    born: Option<SystemTime>,
}

impl HostId {
    pub(super) fn of(metadata: &Metadata) -> Self {
        let born = metadata.created().ok();
        HostId { device: metadata.dev(), inode: metadata.ino(), born }
    }
}

/// Changes whenever somebody changes the file, unless that happens at the same time as the change before,
/// by the host's clock: what was read under an equal stamp still holds where it [is old](Stamp::is_old).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Stamp {
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether the file was last changed so long ago that every later change has another stamp, be the
    /// host's times as coarse as they may.
    pub(super) fn is_old(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.map_or(0, |now| now.as_secs());
        now.abs_diff(self.changed.0.unsigned_abs()) > COARSEST
    }

    /// Whether the host's times look so fine, a tick at most, that who opens and changes the file from now
    /// on is hardly done before they go on.
    pub(super) fn is_fine(&self) -> bool {
        self.changed.1 % FINE != 0
    }
}

/// The image directory.
#[derive(Debug)]
pub(super) struct Root {
    directory: File,
}

impl Root {
    /// Opens the directory; it stays open, so what is mounted over its name later changes nothing.
    pub(super) fn open(source: &Path) -> io::Result<Root> {
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        let directory = File::options().read(true).custom_flags(flags).open(source)?;
        Ok(Root { directory })
    }

    /// As [`Root::open`], for a path without symbolic links: one that is on it by now is not followed.
    pub(super) fn open_real(source: &Path) -> io::Result<Root> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let rules = ResolveFlags::NO_SYMLINKS;
        let directory = rustix::fs::openat2(CWD, source, flags, Mode::empty(), rules)?;
        Ok(Root { directory: directory.into() })
    }

    /// The same directory once more, whatever has its name by now.
    pub(super) fn try_clone(&self) -> io::Result<Root> {
        Ok(Root { directory: self.directory.try_clone()? })
    }

    /// The directory's own path, without symbolic links in it.
    pub(super) fn path(&self) -> io::Result<PathBuf> {
        fs::read_link(path_of(&self.directory))
    }

    /// A directory that was found as a place.
    pub(super) fn at(directory: File) -> Root {
        Root { directory }
    }

    /// The directory itself.
    pub(super) fn directory(&self) -> &File {
        &self.directory
    }

    /// The place `path` beneath the directory (the empty path is the directory), not yet opened
    /// for anything.
    ///
    /// # Errors
    /// Those of openat2(2); `ELOOP` where a symbolic link is on the way, `EXDEV` for a path that
    /// leads out.
    pub(super) fn place(&self, path: &Path) -> io::Result<File> {
        self.place_by(path, 0)
    }

    /// As [`Root::place`], but a path into another mount leads out too.
    pub(super) fn place_in_same_mount(&self, path: &Path) -> io::Result<File> {
        self.place_by(path, libc::RESOLVE_NO_XDEV)
    }

    fn place_by(&self, path: &Path, more_rules: u64) -> io::Result<File> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let path = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: `open_how` is a plain structure for which all zeros is a value.
        let mut how: libc::open_how = unsafe { std::mem::zeroed() };
        how.flags = (libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC) as u64;
        how.resolve = libc::RESOLVE_BENEATH
            | libc::RESOLVE_NO_SYMLINKS
            | libc::RESOLVE_NO_MAGICLINKS
            | more_rules;
        for _ in 0..ATTEMPTS {
            // SAFETY: the path ends in NUL, `how` has the size that is passed; both live on.
            let fd = unsafe {
                libc::syscall(
                    libc::SYS_openat2,
                    self.directory.as_raw_fd(),
                    path.as_ptr(),
                    &how,
                    size_of::<libc::open_how>(),
                )
            };
            if fd >= 0 {
                // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
                return Ok(unsafe { File::from_raw_fd(fd as i32) });
            }
            let error = io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) {
                return Err(error);
            }
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN))
    }
}

/// Opens a regular file or a directory, known as a place, to change its attributes. A confined process
/// changes those of what it has open only: Landlock has no rule for them, but for what is opened.
///
/// # Errors
/// Those of the host; `EACCES` also for who owns it, and may neither read nor write it.
pub(super) fn open_to_change(place: &File) -> io::Result<File> {
    open_file(place, false).or_else(|e| match e.kind() {
        io::ErrorKind::PermissionDenied => open_to_write(place).map_err(|_| e),
        _ => Err(e),
    })
}

fn open_to_write(place: &File) -> io::Result<File> {
    let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
    File::options().write(true).custom_flags(flags).open(path_of(place))
}

/// Sets an open file's times; `None` leaves one as it is.
pub(super) fn set_times(file: &File, times: [Option<SetTime>; 2]) -> io::Result<()> {
    let [last_access, last_modification] = times.map(|time| match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(SetTime::At(time)) => timespec(time),
    });
    Ok(rustix::fs::futimens(file, &Timestamps { last_access, last_modification })?)
}

/// A time to set on a file.
#[derive(Clone, Copy, Debug)]
pub enum SetTime {
    /// The host's clock.
    Now,
    /// This time.
    At(SystemTime),
}

fn timespec(time: SystemTime) -> Timespec {
    let (seconds, nanoseconds) = match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => (i64::try_from(after.as_secs()).unwrap_or(i64::MAX), after.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            let seconds = -i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
            match before.subsec_nanos() {
                0 => (seconds, 0),
                nanoseconds => (seconds - 1, 1_000_000_000 - nanoseconds),
            }
        }
    };
    Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() }
}

/// What a directory lists: names with whether each is a directory; neither links nor devices.
pub(super) fn list(place: &File) -> io::Result<Vec<(OsString, bool)>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path_of(place))? {
        let entry = entry?;
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => names.push((entry.file_name(), true)),
            Ok(kind) if kind.is_file() => names.push((entry.file_name(), false)),
            // Other kinds are not shown; a name that is gone by now neither.
            Ok(_) | Err(_) => {}
        }
    }
    Ok(names)
}

/// Every regular file beneath `root`, by its path there. What vanishes meanwhile is left out.
pub(super) fn files_beneath(root: &Root) -> io::Result<Vec<PathBuf>> {
    let (mut files, mut directories) = (Vec::new(), vec![PathBuf::new()]);
    while let Some(at) = directories.pop() {
        let listed = match root.place(&at) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ELOOP)) => continue,
            place => list(&place?)?,
        };
        for (name, is_directory) in listed {
            let list = if is_directory { &mut directories } else { &mut files };
            list.push(at.join(name));
        }
    }
    Ok(files)
}

/// What names of extended attributes begin with that are shown and may be set; the others are the
/// host's matter.
const USER: &[u8] = b"user.";
/// Bytes in the longest value, and in the longest list of names, that Linux has.
const MAX_ATTRIBUTE: usize = 64 << 10;

/// Whether it is the name of an extended attribute of the users.
pub(super) fn is_users(attribute: &OsStr) -> bool {
    attribute.as_bytes().starts_with(USER)
}

/// The names of a file's extended attributes that are the users', each with a NUL after it. None on a
/// host that knows none.
pub(super) fn user_attributes(place: &File) -> io::Result<Vec<u8>> {
    let mut names = vec![0; MAX_ATTRIBUTE];
    let length = match rustix::fs::listxattr(path_of(place), &mut names[..]) {
        Err(Errno::OPNOTSUPP) => 0,
        length => length?,
    };
    let each = names[..length].split_inclusive(|byte| *byte == 0);
    Ok(each.filter(|name| name.starts_with(USER)).flatten().copied().collect())
}

/// The value of an extended attribute.
pub(super) fn attribute(place: &File, name: &OsStr) -> io::Result<Vec<u8>> {
    let mut value = vec![0; MAX_ATTRIBUTE];
    let length = rustix::fs::getxattr(path_of(place), name, &mut value[..])?;
    value.truncate(length);
    Ok(value)
}

/// Gives `to`, which is open, the extended attributes of `from` that are the users'.
pub(super) fn copy_user_attributes(from: &File, to: &File) -> io::Result<()> {
    let names = user_attributes(from)?;
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let name = OsStr::from_bytes(name);
        let value = attribute(from, name)?;
        rustix::fs::fsetxattr(to, name, &value, XattrFlags::empty())?;
    }
    Ok(())
}

/// Figures of the host's file system, in blocks of `block` bytes and in files.
#[derive(Clone, Copy, Debug)]
pub struct HostSpace {
    /// Bytes in a block of the figures below.
    pub block: u64,
    /// Blocks in all.
    pub blocks: u64,
    /// Blocks that are free.
    pub free: u64,
    /// Blocks that are free for everybody.
    pub available: u64,
    /// Inodes in all.
    pub files: u64,
    /// Inodes that are free.
    pub files_free: u64,
    /// Bytes in the longest name.
    pub name_max: u32,
}

/// What the host's file system says of its space.
pub(super) fn space(place: &File) -> io::Result<HostSpace> {
    // SAFETY: `statvfs` is a plain structure for which all zeros is a value.
    let mut figures: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and `figures` lives through the call, which fills it.
    if unsafe { libc::fstatvfs(place.as_raw_fd(), &mut figures) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(HostSpace {
        block: figures.f_frsize,
        blocks: figures.f_blocks,
        free: figures.f_bfree,
        available: figures.f_bavail,
        files: figures.f_files,
        files_free: figures.f_ffree,
        name_max: figures.f_namemax as u32,
    })
}
