//! Taking a mount away: umount2(2), or `fusermount3` for who may not.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Unmounts `mountpoint`; `lazy` detaches it now and ends it when nobody uses it any more.
///
/// # Errors
/// `EBUSY` while it is used, `EINVAL` when nothing is mounted there, and others of umount2(2).
pub(super) fn unmount(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    let path = CString::new(mountpoint.as_os_str().as_bytes())?;
    let flags = libc::UMOUNT_NOFOLLOW | if lazy { libc::MNT_DETACH } else { 0 };
    // SAFETY: the path ends in NUL.
    if unsafe { libc::umount2(path.as_ptr(), flags) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::EPERM) => with_helper(mountpoint, lazy),
        e => Err(e),
    }
}

fn with_helper(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    let mut helper = Command::new("fusermount3");
    helper.arg(if lazy { "-uz" } else { "-u" }).arg("--").arg(mountpoint);
    let output = helper.stdin(Stdio::null()).output().map_err(|e| {
        io::Error::new(e.kind(), format!("unmounting needs root or fusermount3: {e}"))
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.to_lowercase().contains("busy") {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    Err(io::Error::other(said.trim().to_owned()))
}
