//! `qcow2fs umount`: ends a mount and waits until its images are closed.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{busy, status, unmounting};

/// How long the images may take to be closed.
const CLOSING: Duration = Duration::from_secs(60);

/// Unmount, and wait until every image is closed
///
/// Exit code: 0 when all images were closed in order; 1 when the mount is busy, when an image could
/// not be closed, or when that takes more than a minute. Linux before 6.15 does not tell how the daemon
/// ended: a line says so where only the log knows whether all images were closed in order.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  qcow2fs umount /mnt/raw")]
pub(super) struct Args {
    /// Where it is mounted
    mountpoint: PathBuf,
}

/// Runs the command; returns the exit code.
pub(super) fn run(args: &Args) -> i32 {
    match unmount(&args.mountpoint, unmounting::LEAVING) {
        Ok(()) => 0,
        Err(line) => {
            eprintln!("qcow2fs: {line}");
            1
        }
    }
}

/// Unmounts, and waits for the process. A mount that is busy may cease to be within `patience`.
///
/// # Errors
/// A line for a person.
pub(super) fn unmount(given: &Path, patience: Duration) -> Result<(), String> {
    let shown = given.display();
    if is_dead(given) {
        // Nothing is left to wait for.
        let given = std::path::absolute(given).map_err(|e| e.to_string())?;
        return unmounting::unmount(&given, true).map_err(|e| format!("unmounting {shown}: {e}"));
    }
    let mountpoint = given.canonicalize().map_err(|e| format!("{shown}: {e}"))?;
    let status = status::read(&mountpoint)?;
    let pid = status["pid"].as_i64().unwrap_or(0);
    // Opened while the process surely lives: afterwards its number may be another's.
    let process = Process::open(pid)
        .map_err(|e| format!("finding the process {pid} that serves {shown}: {e}"))?;
    let unmounted = unmounting::while_busy(patience, || unmounting::unmount(&mountpoint, false));
    unmounted.map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY) => match busy::users(&mountpoint) {
            users if users.is_empty() => format!(
                "{shown} is busy; SIGTERM twice to process {pid} closes its images all the same"
            ),
            users => format!("{shown} is busy: in use by {users}; end that first"),
        },
        _ => format!("unmounting {shown}: {e}"),
    })?;
    let failed = |e| format!("{shown} is unmounted, but waiting for process {pid} failed: {e}");
    let failed_before = status["close_errors"].as_u64().is_some_and(|count| count > 0);
    match Outcome::of(process.wait(CLOSING).map_err(failed)?, failed_before) {
        Outcome::Closed => Ok(()),
        Outcome::Untold => {
            eprintln!(
                "qcow2fs: {shown} is unmounted; this kernel does not tell whether all images were closed \
                 in order: see the log, the system's or that of --log-file"
            );
            Ok(())
        }
        Outcome::Failed => {
            Err(format!("{shown} is unmounted, but an image was not closed in order: see the log"))
        }
        Outcome::Closing => Err(format!(
            "{shown} is unmounted, but process {pid} is still closing its images after a minute"
        )),
    }
}

/// What has become of the images.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Closed,
    Failed,
    /// They are being closed still.
    Closing,
    /// Nobody tells.
    Untold,
}

impl Outcome {
    /// As far as the end of the daemon tells, and what it said before of closes that had failed.
    fn of(ended: Ended, failed_before: bool) -> Self {
        match ended {
            Ended::No => Outcome::Closing,
            Ended::Code(0) => Outcome::Closed,
            Ended::Code(_) => Outcome::Failed,
            Ended::Unknown if failed_before => Outcome::Failed,
            Ended::Unknown => Outcome::Untold,
        }
    }
}

/// Whether a mount is there whose process is gone.
pub(super) fn is_dead(mountpoint: &Path) -> bool {
    mountpoint.metadata().is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN))
}

/// A process that is not our child.
struct Process {
    fd: OwnedFd,
    pid: libc::pid_t,
}

enum Ended {
    No,
    /// With this wait status.
    Code(i32),
    /// The kernel does not tell.
    Unknown,
}

impl Process {
    fn open(pid: i64) -> io::Result<Process> {
        let pid = libc::pid_t::try_from(pid).ok().filter(|pid| *pid > 0);
        let pid = pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        // SAFETY: pidfd_open takes no pointers.
        match unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
            fd => Ok(Process { fd: unsafe { OwnedFd::from_raw_fd(fd as i32) }, pid }),
        }
    }

    fn wait(&self, limit: Duration) -> io::Result<Ended> {
        let mut wait = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: there is one `pollfd`, which lives through the call.
        match unsafe { libc::poll(&mut wait, 1, limit.as_millis() as i32) } {
            -1 => Err(io::Error::last_os_error()),
            0 => Ok(Ended::No),
            _ => Ok(self.wait_status()),
        }
    }

    /// How the process ended, where the kernel (6.15 and later) keeps that for who has it open.
    fn wait_status(&self) -> Ended {
        /// `struct pidfd_info` of `linux/pidfd.h` in its first form.
        #[repr(C)]
        #[derive(Default)]
        struct PidfdInfo {
            mask: u64,
            cgroup: u64,
            ids: [u32; 11],
            exit_code: i32,
        }
        /// `_IOWR(0xff, 11, struct pidfd_info)`.
        const GET_INFO: libc::Ioctl = 0xc040_ff0b_u32 as libc::Ioctl;
        const EXIT: u64 = 1 << 3;
        let mut info = PidfdInfo { mask: EXIT, ..Default::default() };
        // A zombie has its wait status in /proc; this tells when the parent has taken notice of it.
        for _ in 0..100 {
            if let Some(code) = zombie_status(self.pid) {
                return Ended::Code(code);
            }
            // SAFETY: the number says the size of the structure, which lives through the call.
            let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), GET_INFO, &mut info) };
            if done == 0 && info.mask & EXIT != 0 {
                return Ended::Code(info.exit_code);
            }
            if done != 0 {
                break;
            }
            info.mask = EXIT;
            std::thread::sleep(Duration::from_millis(10));
        }
        Ended::Unknown
    }
}

/// The wait status of a process that has ended and of which its parent has not taken notice.
fn zombie_status(pid: libc::pid_t) -> Option<i32> {
    let line = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = line.rsplit_once(") ")?;
    fields.starts_with('Z').then(|| fields.split_whitespace().last()?.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_not_said_to_be_closed_where_nobody_tells() {
        for failed_before in [true, false] {
            let outcome = |ended| Outcome::of(ended, failed_before);
            assert_eq!(outcome(Ended::No), Outcome::Closing);
            assert_eq!(outcome(Ended::Code(0)), Outcome::Closed);
            assert_eq!(outcome(Ended::Code(256)), Outcome::Failed);
        }
        assert_eq!(Outcome::of(Ended::Unknown, true), Outcome::Failed);
        assert_eq!(Outcome::of(Ended::Unknown, false), Outcome::Untold);
    }

    #[test]
    fn a_process_is_waited_for_within_the_limit_and_its_failure_is_seen() {
        for reaped in [true, false] {
            let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
            let process = Process::open(child.id().into()).unwrap();
            assert!(matches!(process.wait(Duration::from_millis(20)).unwrap(), Ended::No));
            child.kill().unwrap();
            let mut reap = || assert!(!child.wait().unwrap().success());
            if reaped {
                reap();
            }
            match process.wait(Duration::from_secs(10)).unwrap() {
                Ended::Code(code) => assert_eq!(code, libc::SIGKILL),
                Ended::Unknown => assert!(reaped, "only old kernels forget who was reaped"),
                Ended::No => panic!("not ended"),
            }
            if !reaped {
                reap();
            }
        }
    }
}
