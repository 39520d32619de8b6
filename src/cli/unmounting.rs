//! What is mounted where, and taking a mount away: umount2(2), or `fusermount3` for who may not.

use std::ffi::{CString, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::busy;
use super::helper::Helper;

/// The mount that this process serves. What others have mounted in the same place, over it or after
/// it, is never touched.
pub(super) struct Served {
    mountpoint: PathBuf,
    /// Who unmounts it where this process has given up the right to.
    helper: Option<Arc<Helper>>,
    /// Nobody else's as long as the connection is up.
    device: Vec<u8>,
    connection: OwnedFd,
}

impl Served {
    /// What has just been mounted at `mountpoint`; the kernel talks to it through `connection`.
    /// With a `helper`, that one unmounts it.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn new(
        mountpoint: PathBuf,
        connection: BorrowedFd<'_>,
        helper: Option<Arc<Helper>>,
    ) -> io::Result<Served> {
        let connection = connection.try_clone_to_owned()?;
        let device = device_at(&mountpoint).ok_or_else(not_there)?;
        Ok(Served { mountpoint, helper, device, connection })
    }

    /// Lets the kernel read `bytes` ahead of who reads through the page cache from start to end.
    ///
    /// # Errors
    /// `PermissionDenied` for who is not root, and others of the host.
    pub(super) fn read_ahead(&self, bytes: u64) -> io::Result<()> {
        let mut setting = b"/sys/class/bdi/".to_vec();
        setting.extend_from_slice(&self.device);
        setting.extend_from_slice(b"/read_ahead_kb");
        fs::write(OsString::from_vec(setting), (bytes >> 10).to_string())
    }

    /// Where it is mounted.
    pub(super) fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// As [`unmount`], unless something else is what is seen there.
    ///
    /// # Errors
    /// Those of [`unmount`].
    pub(super) fn unmount(&self, lazy: bool) -> io::Result<()> {
        if !self.is_connected() {
            return Err(not_there());
        }
        match &self.helper {
            Some(helper) => helper.unmount(Some(&self.device), lazy),
            None if shows(&self.mountpoint, &self.device) => unmount(&self.mountpoint, lazy),
            None => Err(not_there()),
        }
    }

    /// Who uses something under the mount point: [`busy::users`].
    pub(super) fn users(&self) -> String {
        match &self.helper {
            Some(helper) => helper.users(),
            None => busy::users(&self.mountpoint),
        }
    }

    fn is_connected(&self) -> bool {
        let mut look = libc::pollfd { fd: self.connection.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: there is one `pollfd`, which lives through the call.
        unsafe { libc::poll(&mut look, 1, 0) == 0 }
    }
}

/// The error where a mount is not what is seen at its place.
pub(super) fn not_there() -> io::Error {
    io::Error::other("it is detached already, or something else is mounted over it")
}

/// Whether the file system of that number is what is seen at `place`.
pub(super) fn shows(place: &Path, device: &[u8]) -> bool {
    device_at(place).is_some_and(|seen| seen == device)
}

/// The number of the file system that is seen at `place`, as the kernel prints it.
fn device_at(place: &Path) -> Option<Vec<u8>> {
    // The latest one covers those before.
    mounts().into_iter().rev().find(|(_, point)| point == place).map(|(device, _)| device)
}

/// Every mount, in the order in which they were made: the number of its file system and its place.
pub(super) fn mounts() -> Vec<(Vec<u8>, PathBuf)> {
    parse(&fs::read("/proc/self/mountinfo").unwrap_or_default())
}

/// The third and the fifth field of each line of mountinfo: proc_pid_mountinfo(5).
fn parse(table: &[u8]) -> Vec<(Vec<u8>, PathBuf)> {
    let mount = |line: &[u8]| {
        let mut fields = line.split(|byte| *byte == b' ').skip(2);
        let device = fields.next()?.to_vec();
        Some((device, unescape(fields.nth(1)?)))
    };
    table.split(|byte| *byte == b'\n').filter_map(mount).collect()
}

/// The type that the mount table shows.
const KIND: &[u8] = b"fuse.qcow2fs";

/// The mounts of qcow2fs that are believed, in the order in which they were made: the source and the
/// place. Those of others are left out: what serves them may be anything.
pub(super) fn believed_mounts() -> Vec<(PathBuf, PathBuf)> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let believed = served(&table).into_iter().filter(|mount| mount.is_of(&users_believed()));
    believed.map(|mount| (mount.source, mount.place)).collect()
}

/// Whether the mount of that number is one of those.
pub(super) fn is_believed(number: u64) -> bool {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let mut mounts = served(&table).into_iter();
    mounts.any(|mount| mount.number == number && mount.is_of(&users_believed()))
}

/// Root, and who runs this.
fn users_believed() -> [u32; 2] {
    [0, rustix::process::geteuid().as_raw()]
}

/// A mount that calls itself one of qcow2fs.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    number: u64,
    source: PathBuf,
    place: PathBuf,
    /// Who has mounted it, by the kernel's word.
    users: Vec<u32>,
}

impl Mount {
    fn is_of(&self, users: &[u32]) -> bool {
        !self.users.is_empty() && self.users.iter().all(|user| users.contains(user))
    }
}

/// The mounts of that type, whoever has made them: the first and the fifth field, and of those after
/// the hyphen the second and what the third says of the user.
fn served(table: &[u8]) -> Vec<Mount> {
    let mount = |line: &[u8]| {
        let mut fields = line.split(|byte| *byte == b' ');
        let number = str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let place = unescape(fields.nth(3)?);
        fields.find(|field| *field == b"-")?;
        let is_ours = fields.next()? == KIND;
        let source = unescape(fields.next()?);
        let options = fields.next()?.split(|byte| *byte == b',');
        let users = options.filter_map(|option| option.strip_prefix(b"user_id="));
        // One that makes no sense is nobody's that is believed.
        let user = |id: &[u8]| str::from_utf8(id).ok()?.parse().ok();
        let users = users.map(|id| user(id).unwrap_or(u32::MAX)).collect();
        is_ours.then_some(Mount { number, source, place, users })
    };
    table.split(|byte| *byte == b'\n').filter_map(mount).collect()
}

/// The kernel writes blanks and backslashes as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        rest = after;
        bytes.push(match rest {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] if *first == b'\\' => {
                rest = after;
                (a - b'0') << 6 | (b - b'0') << 3 | (c - b'0')
            }
            _ => *first,
        });
    }
    OsString::from_vec(bytes).into()
}

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

/// How long somebody who is just looking at the mount, or just leaving it, may keep it busy.
pub(super) const LEAVING: Duration = Duration::from_secs(1);

/// Does `unmount` again while it says `EBUSY`, until `patience` is over.
///
/// # Errors
/// Those of `unmount`.
pub(super) fn while_busy(
    patience: Duration,
    mut unmount: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match unmount() {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && start.elapsed() < patience => {
                std::thread::sleep(Duration::from_millis(20));
            }
            done => return done,
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_just_leaving_is_waited_for_and_who_stays_is_not() {
        let busy = || io::Error::from_raw_os_error(libc::EBUSY);
        let mut tries = 0;
        let leaving = while_busy(Duration::from_secs(60), || {
            tries += 1;
            if tries < 3 { Err(busy()) } else { Ok(()) }
        });
        assert!(leaving.is_ok() && tries == 3, "{leaving:?} after {tries}");
        assert_eq!(
            while_busy(Duration::ZERO, || Err(busy())).unwrap_err().raw_os_error(),
            Some(libc::EBUSY)
        );
        let mut tries = 0;
        let other = while_busy(Duration::from_secs(60), || {
            tries += 1;
            Err(io::Error::from_raw_os_error(libc::EINVAL))
        });
        assert!(other.is_err() && tries == 1);
    }

    #[test]
    fn the_mount_table_is_read_with_any_name_and_the_latest_mount_last() {
        let table = b"29 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            31 29 0:50 / /a\\040b\\134\\012 rw shared:1 - fuse.qcow2fs /i rw,user_id=0\n\
            32 31 0:51 / /a\\040b\\134\\012 rw - fuse.qcow2fs /j rw,user_id=0,group_id=0\n";
        let mounts = parse(table);
        let place = PathBuf::from("/a b\\\n");
        let wanted =
            [("8:1", Path::new("/")), ("0:50", place.as_path()), ("0:51", place.as_path())];
        let found: Vec<_> = mounts.iter().map(|(device, at)| (&device[..], at.as_path())).collect();
        assert_eq!(found, wanted.map(|(device, at)| (device.as_bytes(), at)));
        assert!(device_at(Path::new("/")).is_some());
        let place = Path::new("/a b\\\n").to_owned();
        let ours = [(31, "/i"), (32, "/j")].map(|(number, source)| Mount {
            number,
            source: source.into(),
            place: place.clone(),
            users: vec![0],
        });
        assert_eq!(served(table), ours);
    }

    #[test]
    fn a_mount_is_believed_only_of_root_and_of_who_asks() {
        let line = |options: &str| format!("7 1 0:50 / /m rw - fuse.qcow2fs /i {options}\n");
        let is_of = |options: &str, users: &[u32]| {
            let mounts = served(line(options).as_bytes());
            assert_eq!(mounts.len(), 1, "{options}");
            mounts[0].is_of(users)
        };
        for (options, user) in [
            ("rw,user_id=0,group_id=0,default_permissions,allow_other", 0),
            ("rw,user_id=0,group_id=0", 1000),
            ("rw,user_id=1000,group_id=0", 1000),
        ] {
            assert!(is_of(options, &[0, user]), "{options}");
        }
        for (options, user) in [
            ("rw,user_id=1000,group_id=1000,allow_other", 0),
            ("rw,user_id=1001,group_id=1000,allow_other", 1000),
            ("rw,user_id=00x,group_id=0", 0),
            ("rw,user_id=1000,user_id=0", 0),
            ("rw,max_user_id=0", 0),
            ("rw", 0),
        ] {
            assert!(!is_of(options, &[0, user]), "{options}");
        }
    }
}
