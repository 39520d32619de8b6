//! What an attachment consists of, step by step, and how it is taken down.
//!
//! Each has a directory beneath [`DIRECTORY`], which only root may look into: a record of what has
//! been done so far, and the mount point of its own mount, if it has one. The record is written after
//! each step and read by `detach`, which undoes what it says in reverse; so does an attachment that
//! fails halfway. What somebody else has undone meanwhile is left alone.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::loop_device::LoopDevice;
use crate::cli::{busy, keys, umount, unmounting};
use crate::crypt::Secret;

/// Where attachments are recorded. Gone after a restart, as they are.
pub(super) const DIRECTORY: &str = "/run/qcow2fs/attached";
const RECORD: &str = "record.json";
/// How long another one may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a mount of our own may stay busy after its loop device was let go.
const SETTLING: Duration = Duration::from_secs(10);

/// One image on a loop device, and what is mounted of it.
pub(in crate::cli) struct Attachment {
    directory: PathBuf,
    pub(super) record: Record,
}

/// What has been done.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub(super) struct Record {
    /// The image file; nothing where it is unknown.
    pub(super) image: Option<PathBuf>,
    /// Its raw file in a mount.
    pub(super) raw: PathBuf,
    /// The mount of this image alone that was made for it.
    pub(super) own_mount: Option<PathBuf>,
    /// The whole loop device.
    pub(super) device: Option<PathBuf>,
    /// What of it is mounted.
    pub(super) mounted: Option<Mounted>,
}

/// A file system on the loop device.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub(super) struct Mounted {
    /// The device or its partition.
    pub(super) device: PathBuf,
    /// Where it is mounted.
    pub(super) mountpoint: PathBuf,
    /// The number of its file system in the mount table, which need not be that of the device; empty
    /// before it is mounted.
    #[serde(default)]
    pub(super) number: String,
}

/// The right to attach and to detach; one process at a time has it, or two could put one disk on two
/// loop devices.
pub(in crate::cli) struct Turn(#[allow(dead_code, reason = "closing it ends the turn")] fs::File);

impl Turn {
    /// Waits for it.
    ///
    /// # Errors
    /// A line for a person.
    pub(in crate::cli) fn wait() -> Result<Turn, String> {
        let failed = |e: io::Error| format!("locking {DIRECTORY}: {e}");
        make_directory().map_err(failed)?;
        let directory = fs::File::open(DIRECTORY).map_err(failed)?;
        let end = Instant::now() + PATIENCE;
        loop {
            match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Turn(directory)),
                Err(Errno::WOULDBLOCK) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(Errno::WOULDBLOCK) => {
                    return Err("another attach or detach is at work: try again later".into());
                }
                Err(e) => return Err(failed(e.into())),
            }
        }
    }
}

/// Makes [`DIRECTORY`], where it is missing.
fn make_directory() -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).recursive(true).create(DIRECTORY)
}

impl Attachment {
    /// A new one, of which nothing has been done yet.
    ///
    /// # Errors
    /// A line for a person.
    pub(super) fn begin(image: Option<PathBuf>) -> Result<Attachment, String> {
        let failed = |e| format!("making a directory beneath {DIRECTORY}: {e}");
        make_directory().map_err(failed)?;
        let mut private = fs::DirBuilder::new();
        private.mode(0o700);
        for number in 1u32.. {
            let directory = Path::new(DIRECTORY).join(number.to_string());
            match private.create(&directory) {
                Ok(()) => {
                    let record = Record { image, ..Record::default() };
                    return Ok(Attachment { directory, record });
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(failed(e)),
            }
        }
        Err(format!("{DIRECTORY} is full"))
    }

    /// All that there are. One that is just beginning may be missing.
    pub(in crate::cli) fn all() -> Vec<Attachment> {
        let entries = fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
        let read = |directory: PathBuf| {
            let text = fs::read(directory.join(RECORD)).ok()?;
            let record = serde_json::from_slice(&text).ok()?;
            Some(Attachment { directory, record })
        };
        entries.filter_map(|entry| read(entry.path())).collect()
    }

    /// Whether `path` names it: its image, its raw file, its device or a partition of it, or what is
    /// mounted of it.
    pub(in crate::cli) fn is_named(&self, path: &Path) -> bool {
        let Record { image, raw, device, mounted, .. } = &self.record;
        let whole = LoopDevice::of_node(path);
        image.as_deref() == Some(path)
            || raw == path
            || whole.is_some_and(|whole| device.as_deref() == Some(whole.node()))
            || mounted.as_ref().is_some_and(|mounted| mounted.mountpoint == path)
    }

    /// In a few words, for a message.
    pub(super) fn whereabouts(&self) -> String {
        let Record { device, mounted, raw, .. } = &self.record;
        match (mounted, device) {
            (Some(mounted), _) => {
                format!("{} on {}", mounted.device.display(), mounted.mountpoint.display())
            }
            (None, Some(device)) => device.display().to_string(),
            (None, None) => raw.display().to_string(),
        }
    }

    /// The next step: a mount that shows nothing but the image; `arguments` are further ones of
    /// `qcow2fs mount`, and `typed` are keys for it.
    ///
    /// # Errors
    /// A line for a person.
    pub(super) fn mount_image(
        &mut self,
        image: &Path,
        arguments: &[String],
        typed: &[(PathBuf, Secret)],
    ) -> Result<(), String> {
        let mountpoint = self.directory.join("raw");
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&mountpoint)
            .map_err(|e| format!("making {}: {e}", mountpoint.display()))?;
        let program = std::env::current_exe().map_err(|e| format!("finding this program: {e}"))?;
        let mut mount = Command::new(program);
        mount.arg("mount").args(arguments).arg(image).arg(&mountpoint);
        if typed.is_empty() {
            run(mount)?;
        } else {
            mount.arg("--typed-keys");
            run_with(mount, &keys::packed(typed))?;
        }
        let raw = Path::new(image.file_name().unwrap_or_default()).with_extension("raw");
        self.record.raw = mountpoint.join(raw);
        self.record.own_mount = Some(mountpoint);
        self.save()
    }

    /// The next step: a loop device on the raw file.
    ///
    /// # Errors
    /// A line for a person.
    pub(super) fn set_up_loop(
        &mut self,
        raw: &Path,
        read_only: bool,
    ) -> Result<LoopDevice, String> {
        self.record.raw = raw.to_owned();
        let device = LoopDevice::set_up(raw, read_only)?;
        self.record.device = Some(device.node().to_owned());
        self.save()?;
        if device.partitions().is_empty() {
            // Kernels are built without some kinds of tables; that there is none at all is no error.
            let mut partx = Command::new("partx");
            partx.arg("--add").arg(device.node());
            run(partx).unwrap_or_else(|line| log::debug!("partx: {line}"));
        }
        Ok(device)
    }

    /// The last step: mounts the device; `arguments` are further ones of mount(8).
    ///
    /// # Errors
    /// A line for a person.
    pub(super) fn mount_device(
        &mut self,
        mut mounted: Mounted,
        arguments: &[String],
    ) -> Result<(), String> {
        let mut mount = Command::new("mount");
        mount.args(arguments).arg("--").arg(&mounted.device).arg(&mounted.mountpoint);
        run(mount)?;
        let mounts = unmounting::mounts();
        let topmost = mounts.iter().rev().find(|(_, point)| *point == mounted.mountpoint);
        let number = topmost.map(|(number, _)| String::from_utf8_lossy(number).into_owned());
        mounted.number = number.unwrap_or_default();
        self.record.mounted = Some(mounted);
        self.save()
    }

    fn save(&self) -> Result<(), String> {
        let new = self.directory.join("record.new");
        let text = serde_json::to_vec_pretty(&self.record).map_err(io::Error::other);
        text.and_then(|text| fs::write(&new, text))
            .and_then(|()| fs::rename(&new, self.directory.join(RECORD)))
            .map_err(|e| format!("recording what was done in {}: {e}", self.directory.display()))
    }

    /// Undoes everything, the last step first. After an error it may be tried again.
    ///
    /// # Errors
    /// A line for a person: what is in the way.
    pub(in crate::cli) fn take_down(mut self) -> Result<(), String> {
        let raw = &self.record.raw;
        let device = self.record.device.as_deref().and_then(LoopDevice::of_node);
        // Otherwise somebody has let go of it, and what is on it now is not ours.
        let device = device.filter(|device| device.is_on(raw));
        if let Some(mounted) = &self.record.mounted {
            if device.is_some() {
                mounted.unmount()?;
            }
            self.record.mounted = None;
            self.save()?;
        }
        if self.record.device.is_some() {
            if let Some(device) = device {
                device.release(&self.record.raw)?;
            }
            self.record.device = None;
            self.save()?;
        }
        if let Some(place) = self.record.own_mount.take() {
            let is_there = unmounting::mounts().iter().any(|(_, point)| *point == place);
            if is_there {
                umount::unmount(&place, SETTLING)?;
            }
        }
        // Not recursively: whatever else lies there is nobody's to remove.
        let gone = |done: io::Result<()>| match done {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        };
        gone(fs::remove_dir(self.directory.join("raw")))
            .and_then(|()| gone(fs::remove_file(self.directory.join(RECORD))))
            .and_then(|()| gone(fs::remove_dir(&self.directory)))
            .map_err(|e| format!("removing {}: {e}", self.directory.display()))
    }
}

impl Mounted {
    /// Unmounts it, unless that has happened, or something else is mounted over it.
    fn unmount(&self) -> Result<(), String> {
        let (device, place) = (self.device.display(), self.mountpoint.display());
        let mounts = unmounting::mounts();
        let mut here = mounts.iter().filter(|(_, point)| *point == self.mountpoint);
        let Some((topmost, _)) = here.next_back() else { return Ok(()) };
        let is_ours = |shown: &[u8]| shown == self.number.as_bytes();
        if !is_ours(topmost) {
            return match here.any(|(shown, _)| is_ours(shown)) {
                true => Err(format!(
                    "something else is mounted over {device} at {place}: unmount that first"
                )),
                false => Ok(()),
            };
        }
        unmounting::unmount(&self.mountpoint, false).map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => match busy::users(&self.mountpoint) {
                users if users.is_empty() => format!("{place} is busy: leave it first"),
                users => format!("{place} is busy: in use by {users}"),
            },
            _ => format!("unmounting {place}: {e}"),
        })
    }
}

/// Runs a command that says in one line what is wrong.
fn run(command: Command) -> Result<(), String> {
    run_with(command, b"")
}

/// The same, with something to read.
fn run_with(mut command: Command, input: &[u8]) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let failed = |e: io::Error| format!("running {name}: {e}");
    command.stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() });
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(failed)?;
    if let Some(mut pipe) = child.stdin.take() {
        // One that does not read it says why it has ended.
        let _ = pipe.write_all(input);
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    Err(match said.as_slice() {
        [] => format!("{name} failed and did not say why"),
        lines => lines.join(" ").trim_start_matches("qcow2fs: ").to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attachment_is_known_by_each_of_its_names() {
        let record = Record {
            image: Some("/i/a.qcow2".into()),
            raw: "/run/x/raw/a.raw".into(),
            own_mount: Some("/run/x/raw".into()),
            device: Some("/dev/loop7".into()),
            mounted: Some(Mounted {
                device: "/dev/loop7p1".into(),
                mountpoint: "/mnt".into(),
                number: "259:1".into(),
            }),
        };
        let attachment = Attachment { directory: "/run/x".into(), record };
        for name in ["/i/a.qcow2", "/run/x/raw/a.raw", "/dev/loop7", "/dev/loop7p2", "/mnt"] {
            assert!(attachment.is_named(Path::new(name)), "{name}");
        }
        for other in ["/i", "/dev/loop70", "/dev/loop", "/mnt/a", "/run/x"] {
            assert!(!attachment.is_named(Path::new(other)), "{other}");
        }
    }

    #[test]
    fn a_command_that_fails_says_why_in_one_line() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo qcow2fs: no >&2; echo; echo '  never' >&2; exit 3"]);
        assert_eq!(run(shell).unwrap_err(), "no never");
        assert_eq!(run(Command::new("false")).unwrap_err(), "false failed and did not say why");
        assert!(run(Command::new("/nonexistent")).unwrap_err().starts_with("running /nonexistent"));
    }
}
