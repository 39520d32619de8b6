//! QEMU's image lock: whoever has an image open says so on single bytes of the image file, and
//! looks whether anyone else says what does not go with it.
//!
//! Bytes 100 to 103 are share-locked by who *uses* a permission, bytes 200 to 203 by who does *not
//! share* it (consistent read, write, write unchanged, resize), with open-file-description locks:
//! they go when the last descriptor of the open file description is closed, one in a process that is
//! just being forked included, or when they are released. Own bytes are locked
//! first and the others' looked at afterwards, so of two processes that come at the same time at
//! least one sees the other. The scheme is QEMU's (`block/file-posix.c`).
//!
//! Nothing here ever waits for a lock, and nothing reads or writes the image. Who else has it open is
//! only asked within a time limit.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::processes;
use crate::error::{Error, ErrorKind, Result};

/// What an image is locked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It is read, and nobody may write or resize it meanwhile. Readers go together.
    Read,
    /// It is written and resized by us alone.
    Write,
}

/// The byte of the first permission that is used.
const USED: i64 = 100;
/// The byte of the first permission that is not shared.
const UNSHARED: i64 = 200;
/// Permissions that nobody else may have while we read or write: write and resize.
const NOT_SHARED: [i64; 2] = [1, 3];
/// How long the search for the other process may take.
pub const SEARCH: Duration = Duration::from_millis(300);

impl Access {
    fn used(self) -> &'static [i64] {
        match self {
            Access::Read => &[0],
            Access::Write => &[0, 1, 3],
        }
    }
}

/// Locks `file` for `access`. The lock lives as long as the open file description; a file that is
/// locked for reading already is locked for writing without a moment in between when it is not.
///
/// # Errors
/// `InUse`, with the process where it can be told, when another process has the image open in a way
/// that does not go with `access`; then `file` is locked as before, for `held`.
pub fn acquire(file: &File, held: Option<Access>, access: Access) -> Result<()> {
    let locked = lock_own_bytes(file, access).and_then(|()| conflicts(file, access));
    match locked {
        Ok(false) => Ok(()),
        Ok(true) => {
            release_down_to(file, held)?;
            Err(in_use(file))
        }
        Err(e) => {
            // The first failure is what the caller has to hear of.
            let _ = release_down_to(file, held);
            Err(Error::io("locking the image file", e))
        }
    }
}

/// What another process has the image open for, without locking anything, and which one where that
/// can be told.
///
/// # Errors
/// Those of the host.
pub fn used_by(file: &File) -> Result<Option<(Access, Option<String>)>> {
    let is_used = |permission| {
        is_locked_by_other(file, USED + permission)
            .map_err(|e| Error::io("asking for the image's locks", e))
    };
    let access = match (is_used(1)?, is_used(0)?) {
        (true, _) => Access::Write,
        (false, true) => Access::Read,
        (false, false) => return Ok(None),
    };
    let holder = other_holder(file).map(|Holder { pid, name }| format!("{name} (pid {pid})"));
    Ok(Some((access, holder)))
}

/// Gives up every lock on `file` that `held` does not need.
///
/// # Errors
/// Those of the host.
pub fn release_down_to(file: &File, held: Option<Access>) -> Result<()> {
    let kept = held.map_or(&[][..], Access::used);
    let released = (0..4).filter(|p| !kept.contains(p)).map(|p| USED + p);
    let unshared = NOT_SHARED.iter().filter(|_| held.is_none()).map(|p| UNSHARED + p);
    for byte in released.chain(unshared) {
        set_lock(file, byte, libc::F_UNLCK)
            .map_err(|e| Error::io("unlocking the image file", e))?;
    }
    Ok(())
}

fn lock_own_bytes(file: &File, access: Access) -> io::Result<()> {
    let used = access.used().iter().map(|p| USED + p);
    let unshared = NOT_SHARED.iter().map(|p| UNSHARED + p);
    used.chain(unshared).try_for_each(|byte| set_lock(file, byte, libc::F_RDLCK))
}

/// Whether somebody does not share what we use, or uses what we do not share.
fn conflicts(file: &File, access: Access) -> io::Result<bool> {
    let unshared = access.used().iter().map(|p| UNSHARED + p);
    for byte in unshared.chain(NOT_SHARED.iter().map(|p| USED + p)) {
        if is_locked_by_other(file, byte)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn one_byte(byte: i64, kind: i32) -> libc::flock {
    // SAFETY: `flock` is a plain structure for which all zeros is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

fn set_lock(file: &File, byte: i64, kind: i32) -> io::Result<()> {
    let lock = one_byte(byte, kind);
    // SAFETY: the descriptor is open and `lock` lives through the call, which only reads it.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_locked_by_other(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = one_byte(byte, libc::F_WRLCK);
    // SAFETY: the descriptor is open and `lock` lives through the call, which writes into it.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } {
        0 => Ok(i32::from(lock.l_type) != libc::F_UNLCK),
        _ => Err(io::Error::last_os_error()),
    }
}

fn in_use(file: &File) -> Error {
    let who = match other_holder(file) {
        Some(Holder { pid, name }) => format!(" (pid {pid}, {name})"),
        None => String::new(),
    };
    let text = format!("in use by another process{who}; stop it there, then open it again");
    Error::new(ErrorKind::InUse, text)
}

/// A process that has a file open.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Holder {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

/// A file that somebody else may have open.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Wanted {
    device: u64,
    inode: u64,
    /// The last part of its name.
    name: Vec<u8>,
    /// Who asks, and is not meant.
    asker: u32,
}

type Search = Box<dyn Fn(&Wanted) -> Option<Holder> + Send + Sync>;

/// Who searches instead of this process, which may not look at others.
static SEARCHER: OnceLock<Search> = OnceLock::new();

/// From now on `search` finds out who has a file open, as [`find_holder`] does.
pub fn search_by(search: impl Fn(&Wanted) -> Option<Holder> + Send + Sync + 'static) {
    // A process is confined once.
    let _first = SEARCHER.set(Box::new(search));
}

/// The process that has the same file open, as far as `/proc` tells within [`SEARCH`]: an
/// open-file-description lock names no process.
///
/// To look at a process that is just becoming another program waits until it has become it, and that
/// may wait for an answer of ours, to the close of a file on our mount.
fn other_holder(file: &File) -> Option<Holder> {
    let metadata = file.metadata().ok()?;
    let own_link = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    let wanted = Wanted {
        device: metadata.dev(),
        inode: metadata.ino(),
        name: own_link.file_name()?.as_bytes().to_vec(),
        asker: std::process::id(),
    };
    let search = move || SEARCHER.get().map_or_else(|| find_holder(&wanted), |by| by(&wanted));
    processes::within(SEARCH, search).flatten()
}

/// The process that has `wanted` open, as far as this one may see.
pub fn find_holder(wanted: &Wanted) -> Option<Holder> {
    let deadline = Instant::now() + SEARCH;
    for pid in processes::others().filter(|&pid| pid != wanted.asker) {
        if Instant::now() > deadline {
            return None;
        }
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        let is_named = |to: &Path| to.file_name().is_some_and(|n| n.as_bytes() == wanted.name);
        let holds = |link: &Path| {
            // The link is compared first: looking at a file on a dead mount may never return.
            fs::read_link(link).is_ok_and(|to| is_named(&to))
                && fs::metadata(link)
                    .is_ok_and(|m| (m.dev(), m.ino()) == (wanted.device, wanted.inode))
        };
        if descriptors.flatten().any(|d| holds(&d.path())) {
            return Some(Holder { pid, name: processes::name(pid) });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::path::PathBuf;
    use std::process::{Child, ChildStdin, Command, Stdio};

    use super::*;

    struct Images {
        dir: tempfile::TempDir,
    }

    impl Images {
        fn new() -> Self {
            let images = Images { dir: tempfile::tempdir().unwrap() };
            let made = Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .arg(images.path())
                .arg("1M")
                .status();
            assert!(made.unwrap().success());
            images
        }

        fn path(&self) -> PathBuf {
            self.dir.path().join("disk.qcow2")
        }

        fn open(&self) -> File {
            File::options().read(true).write(true).open(self.path()).unwrap()
        }

        fn qemu_img_info_works(&self) -> bool {
            let info = Command::new("qemu-img").arg("info").arg(self.path()).output();
            info.unwrap().status.success()
        }
    }

    /// A qemu-io that has the image open until it is dropped.
    struct Qemu(Child, Option<ChildStdin>);

    impl Qemu {
        fn open(path: &Path, read_only: bool) -> Self {
            let mut command = Command::new("qemu-io");
            if read_only {
                command.arg("-r");
            }
            let mut child =
                command.arg(path).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let mut stdin = child.stdin.take().unwrap();
            stdin.write_all(b"length\n").unwrap();
            let mut answer = String::new();
            let mut stdout = BufReader::new(child.stdout.take().unwrap());
            while !answer.contains("MiB") {
                assert!(stdout.read_line(&mut answer).unwrap() > 0, "qemu-io ended: {answer}");
            }
            Qemu(child, Some(stdin))
        }
    }

    impl Drop for Qemu {
        fn drop(&mut self) {
            self.1.take();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_writer_in_qemu_is_seen_and_named() {
        let images = Images::new();
        let qemu = Qemu::open(&images.path(), false);
        for access in [Access::Read, Access::Write] {
            let error = acquire(&images.open(), None, access).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InUse);
            let who = format!("pid {}, qemu-io", qemu.0.id());
            assert!(error.to_string().contains(&who), "{error}");
        }
        drop(qemu);
        acquire(&images.open(), None, Access::Write).unwrap();
    }

    #[test]
    fn a_reader_in_qemu_goes_with_readers_only() {
        let images = Images::new();
        let _qemu = Qemu::open(&images.path(), true);
        let file = images.open();
        acquire(&file, None, Access::Read).unwrap();
        let error = acquire(&file, Some(Access::Read), Access::Write).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse);
        // What is left of the failed attempt does not keep other readers away.
        acquire(&images.open(), None, Access::Read).unwrap();
        assert!(images.qemu_img_info_works());
    }

    #[test]
    fn qemu_sees_our_locks() {
        let images = Images::new();
        let file = images.open();
        acquire(&file, None, Access::Read).unwrap();
        assert!(images.qemu_img_info_works());
        acquire(&file, Some(Access::Read), Access::Write).unwrap();
        assert!(!images.qemu_img_info_works());
        release_down_to(&file, Some(Access::Read)).unwrap();
        assert!(images.qemu_img_info_works());
        let write = Command::new("qemu-io").args(["-c", "write 0 512"]).arg(images.path()).output();
        assert!(!write.unwrap().status.success(), "qemu wrote an image that we read");
        release_down_to(&file, None).unwrap();
        let write = Command::new("qemu-io").args(["-c", "write 0 512"]).arg(images.path()).output();
        assert!(write.unwrap().status.success());
    }

    #[test]
    fn two_of_ours_never_write_one_image() {
        let images = Images::new();
        let (first, second) = (images.open(), images.open());
        acquire(&first, None, Access::Write).unwrap();
        assert!(acquire(&second, None, Access::Write).is_err());
        assert!(acquire(&second, None, Access::Read).is_err());
        release_down_to(&first, None).unwrap();
        acquire(&second, None, Access::Write).unwrap();
    }
}
