//! Files that are to be regular ones, looked at before they are opened. Opening a FIFO lets go of who
//! waits at its other end, and opening a device does something: a watchdog starts. So a name leads to
//! a place first (`O_PATH`), with which nothing happens, and what is looked at there is what is opened,
//! whatever has become of the name.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The place that `path` leads to, symbolic links followed.
///
/// # Errors
/// Those of the host.
pub fn place(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_PATH).open(path)
}

/// The place that has the name `path` itself; a symbolic link there is not followed, and is no
/// regular file.
///
/// # Errors
/// Those of the host.
pub fn place_itself(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)
}

/// Fails unless what is at `place` is a regular file.
///
/// # Errors
/// `Invalid` where it is something else; those of the host.
pub fn look(place: &File) -> Result<()> {
    let metadata = place.metadata().map_err(|e| Error::io("looking at the image", e))?;
    if metadata.is_file() { Ok(()) } else { Err(Error::invalid("not a regular file")) }
}

/// Opens the regular file at `place` for reading, or for both.
///
/// # Errors
/// Those of [`look`] and of the host.
pub fn open(place: &File, write: bool) -> Result<File> {
    look(place)?;
    open_place(place, write).map_err(|e| Error::io("opening the image", e))
}

/// Opens what is at `place` for reading, or for both, without a look at what it is.
///
/// # Errors
/// Those of the host.
pub fn open_place(place: &File, write: bool) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(write).custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK);
    options.open(path_of(place))
}

/// A path that leads to exactly this open file, whatever has become of its name.
pub fn path_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifo_is_looked_at_and_not_opened() {
        use rustix::fs::{CWD, Mode, inotify, mkfifoat};
        let directory = tempfile::tempdir().unwrap();
        let [fifo, link] = ["fifo", "link"].map(|name| directory.path().join(name));
        mkfifoat(CWD, &fifo, Mode::RWXU).unwrap();
        std::os::unix::fs::symlink(&fifo, &link).unwrap();
        let opens = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        inotify::add_watch(&opens, &fifo, inotify::WatchFlags::OPEN).unwrap();
        let was_opened = || rustix::io::read(&opens, &mut [0; 4096]).is_ok();
        for path in [&fifo, &link] {
            for write in [true, false] {
                let refused = open(&place(path).unwrap(), write).unwrap_err().to_string();
                assert_eq!(refused, "not a regular file");
            }
        }
        assert!(look(&place_itself(&link).unwrap()).is_err());
        assert!(!was_opened());
        drop(open_place(&place(&fifo).unwrap(), true).unwrap());
        assert!(was_opened(), "the kernel does not tell");
    }

    #[test]
    fn what_was_looked_at_is_opened_whatever_has_its_name_by_then() {
        let directory = tempfile::tempdir().unwrap();
        let [name, other] = ["name", "other"].map(|name| directory.path().join(name));
        std::fs::write(&name, "right").unwrap();
        std::fs::write(&other, "wrong").unwrap();
        let found = place(&name).unwrap();
        std::fs::rename(&other, &name).unwrap();
        assert_eq!(io::read_to_string(open(&found, false).unwrap()).unwrap(), "right");
    }
}
