//! A new file that gets its name when it is complete and durable, so that no crash leaves half of
//! one under that name.
//!
//! Until then it has no name at all (`O_TMPFILE`), or, where the host's file system has no such
//! files and while it replaces another one, a temporary one beside it. Who makes a file holds
//! flock(2) on it, so a temporary name that a crash has left behind is told from one in use.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, FlockOperation, RenameFlags};

/// What temporary names start with.
const TEMPORARY: &str = ".qcow2fs-new.";
/// How many temporary names are tried.
const ATTEMPTS: u32 = 64;

/// A file that has no name yet. Dropped, it is gone.
#[derive(Debug)]
pub struct NewFile {
    directory: File,
    file: File,
    temporary: Option<OsString>,
}

/// What to do where the name is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfTaken {
    /// Fail with `EEXIST`.
    Fail,
    /// Take the place of the file that has it, in one step.
    Replace,
}

impl NewFile {
    /// A file in `directory` with mode `mode`, less the process's umask, open for reading and
    /// writing.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn new(directory: &Path, mode: u32) -> io::Result<NewFile> {
        let flags = libc::O_DIRECTORY | libc::O_CLOEXEC;
        let directory = File::options().read(true).custom_flags(flags).open(directory)?;
        let unnamed = File::options()
            .read(true)
            .write(true)
            .mode(mode)
            .custom_flags(libc::O_TMPFILE)
            .open(by_descriptor(&directory));
        match unnamed {
            Ok(file) => Ok(NewFile { directory, file, temporary: None }),
            // EISDIR is what a kernel says that does not know the flag.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
                NewFile::with_temporary_name(directory, mode)
            }
            Err(e) => Err(e),
        }
    }

    fn with_temporary_name(directory: File, mode: u32) -> io::Result<NewFile> {
        for _ in 0..ATTEMPTS {
            let name = temporary_name();
            let path = by_descriptor(&directory).join(&name);
            let made =
                File::options().read(true).write(true).create_new(true).mode(mode).open(path);
            let file = match made {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(e),
            };
            lock(&file)?;
            // It may have been taken for abandoned before it was locked.
            if file.metadata()?.nlink() > 0 {
                return Ok(NewFile { directory, file, temporary: Some(name) });
            }
        }
        Err(io::Error::from_raw_os_error(libc::EEXIST))
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes the file durable, gives it `name` in its directory, and makes that durable too.
    ///
    /// # Errors
    /// `EEXIST` for a name that is taken and is to stay so, and those of the host. The name is as it
    /// was, unless it is only the directory that could not be made durable.
    pub fn publish(mut self, name: &OsStr, if_taken: IfTaken) -> io::Result<()> {
        self.file.sync_all()?;
        match (&self.temporary, if_taken) {
            (None, IfTaken::Fail) => self.link(name)?,
            (None, IfTaken::Replace) => {
                lock(&self.file)?;
                self.link_temporarily()?;
                self.rename(name, RenameFlags::empty())?;
            }
            (Some(_), IfTaken::Fail) => self.rename(name, RenameFlags::NOREPLACE)?,
            (Some(_), IfTaken::Replace) => self.rename(name, RenameFlags::empty())?,
        }
        self.directory.sync_all()
    }

    fn link_temporarily(&mut self) -> io::Result<()> {
        for _ in 0..ATTEMPTS {
            let name = temporary_name();
            match self.link(&name) {
                Ok(()) => {
                    self.temporary = Some(name);
                    return Ok(());
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
            }
        }
        Err(io::Error::from_raw_os_error(libc::EEXIST))
    }

    /// Gives an unnamed file its name, which must be free.
    fn link(&self, name: &OsStr) -> io::Result<()> {
        let path = by_descriptor(&self.file);
        Ok(rustix::fs::linkat(CWD, &path, &self.directory, name, AtFlags::SYMLINK_FOLLOW)?)
    }

    /// Exchanges the temporary name for `name`.
    fn rename(&mut self, name: &OsStr, flags: RenameFlags) -> io::Result<()> {
        let Some(temporary) = &self.temporary else { return Ok(()) };
        rustix::fs::renameat_with(&self.directory, temporary, &self.directory, name, flags)?;
        self.temporary = None;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(name) = self.temporary.take()
            && let Err(e) = remove(&self.directory, &name)
        {
            log::warn!("removing the temporary file {}: {e}", name.display());
        }
    }
}

/// Whether `name` is one that a crash may have left behind.
pub fn is_temporary(name: &OsStr) -> bool {
    let is_number = |part: &[u8]| !part.is_empty() && part.iter().all(u8::is_ascii_digit);
    let numbers = name.as_bytes().strip_prefix(TEMPORARY.as_bytes());
    let mut parts = numbers.unwrap_or_default().split(|byte| *byte == b'.');
    // Exactly what `temporary_name` makes: other names that start so belong to others.
    let numbered = [parts.next(), parts.next()].into_iter().all(|part| part.is_some_and(is_number));
    numbered && parts.next().is_none()
}

/// Removes the file with the temporary name `name` in `directory`, unless somebody is making it.
///
/// # Errors
/// `EWOULDBLOCK` where somebody is, `ESTALE` where the name went to another file meanwhile, and those
/// of the host.
pub fn remove_abandoned(directory: &File, name: &OsStr) -> io::Result<()> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let path = by_descriptor(directory).join(name);
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    lock(&file)?;
    let opened = rustix::fs::fstat(&file)?;
    let named = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if (opened.st_dev, opened.st_ino) != (named.st_dev, named.st_ino) {
        return Err(io::Error::from_raw_os_error(libc::ESTALE));
    }
    remove(directory, name)
}

fn temporary_name() -> OsString {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{TEMPORARY}{}.{number}", std::process::id()).into()
}

fn remove(directory: &File, name: &OsStr) -> io::Result<()> {
    Ok(rustix::fs::unlinkat(directory, name, AtFlags::empty())?)
}

fn lock(file: &File) -> io::Result<()> {
    Ok(rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive)?)
}

/// A path that leads to exactly this open file.
fn by_descriptor(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Both kinds of new files, each with an `x` in it.
    fn both(directory: &Path) -> [NewFile; 2] {
        let opened = File::open(directory).unwrap();
        let files = [
            NewFile::new(directory, 0o600).unwrap(),
            NewFile::with_temporary_name(opened, 0o600).unwrap(),
        ];
        assert!(files[0].temporary.is_none() && files[1].temporary.is_some());
        for new in &files {
            new.file().write_all(b"x").unwrap();
        }
        files
    }

    #[test]
    fn a_file_gets_its_name_only_when_it_is_complete() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        for new in both(directory.path()) {
            assert!(!path.exists());
            new.publish("new".as_ref(), IfTaken::Fail).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"x");
            std::fs::remove_file(&path).unwrap();
        }
        drop(both(directory.path()));
        assert_eq!(names(directory.path()), [""; 0]);
    }

    #[test]
    fn a_name_that_is_taken_stays_unless_it_is_to_be_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        for new in both(directory.path()) {
            std::fs::write(&path, "old").unwrap();
            let refused = new.publish("new".as_ref(), IfTaken::Fail).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EEXIST));
            assert_eq!(std::fs::read(&path).unwrap(), b"old");
        }
        for new in both(directory.path()) {
            std::fs::write(&path, "old").unwrap();
            new.publish("new".as_ref(), IfTaken::Replace).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"x");
        }
        assert_eq!(names(directory.path()), ["new"]);
    }

    #[test]
    fn only_names_that_are_made_here_are_temporary() {
        assert!(is_temporary(&temporary_name()));
        let others =
            ["", "1", "1.", ".1", "1.2.3", "1.2.", "1.2.qcow2", "1.x", "+1.2", "notes", "1.2 "];
        for rest in others {
            let name = format!("{TEMPORARY}{rest}");
            assert!(!is_temporary(name.as_ref()), "{name}");
        }
        assert!(!is_temporary("1.2".as_ref()) && !is_temporary("x.qcow2".as_ref()));
    }

    #[test]
    fn only_what_nobody_is_making_is_taken_for_abandoned() {
        let directory = tempfile::tempdir().unwrap();
        let [_, new] = both(directory.path());
        let name = new.temporary.clone().unwrap();
        assert!(is_temporary(&name));
        let opened = File::open(directory.path()).unwrap();
        let busy = remove_abandoned(&opened, &name).unwrap_err();
        assert_eq!(busy.raw_os_error(), Some(libc::EWOULDBLOCK));
        let abandoned = format!("{TEMPORARY}1.2");
        std::fs::write(directory.path().join(&abandoned), "").unwrap();
        remove_abandoned(&opened, abandoned.as_ref()).unwrap();
        assert_eq!(names(directory.path()), [name.to_str().unwrap()]);
    }
}
