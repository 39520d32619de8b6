//! Going to the background, and what a process that serves block devices sets up for itself.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// What the process in the background has to tell the one that waits for it.
pub(super) struct Parent(UnixStream);

/// Forks. In the child the way to the parent is returned; the parent waits until the child says how
/// it went or ends, and exits: 0 when it is mounted, else 1 with the child's line.
///
/// Not to be called once a thread was started.
///
/// # Errors
/// Those of fork(2) and of making the pipe.
pub(super) fn fork() -> io::Result<Parent> {
    let (mut parent_end, child_end) = UnixStream::pair()?;
    // SAFETY: no thread but this one exists, so the child may go on with all of the memory.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(parent_end);
            // SAFETY: setsid takes nothing; it cannot fail in a child that leads no group.
            unsafe { libc::setsid() };
            close_inherited(&child_end);
            Ok(Parent(child_end))
        }
        _ => {
            drop(child_end);
            let mut said = String::new();
            let read = parent_end.read_to_string(&mut said);
            std::process::exit(match (read, said.as_str()) {
                (Ok(_), READY) => 0,
                (Ok(_), "") | (Err(_), _) => {
                    eprintln!("qcow2fs: the process in the background ended at its start");
                    1
                }
                (Ok(_), line) => {
                    eprintln!("qcow2fs: {line}");
                    1
                }
            })
        }
    }
}

/// Closes what the process was started with beyond the standard three, and keeps `kept`: whoever waits
/// for the end of a pipe that it happened to have open would wait as long as the mount is there.
fn close_inherited(kept: &impl AsRawFd) {
    let kept = kept.as_raw_fd().unsigned_abs();
    for (first, last) in [(3, kept - 1), (kept + 1, libc::c_uint::MAX)] {
        if first <= last {
            // SAFETY: nothing in this process owns a descriptor but the standard ones and `kept`: it
            // has just forked, and has opened no other before. Where the kernel does not know the
            // call, they stay open.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0 as libc::c_uint) };
        }
    }
}

const READY: &str = "\0";

impl Parent {
    /// It is mounted: the parent exits, and this process lets go of what it had from it.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn ready(mut self) -> io::Result<()> {
        std::env::set_current_dir("/")?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        for standard in 0..3 {
            // SAFETY: dup2 takes two descriptors; the first is open.
            if unsafe { libc::dup2(null.as_raw_fd(), standard) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        self.0.write_all(READY.as_bytes())
    }

    /// It is not mounted, and why.
    pub(super) fn failed(mut self, line: &str) {
        // If the parent is gone nobody wants to know.
        let _ = self.0.write_all(line.as_bytes());
    }
}

/// `PR_SET_IO_FLUSHER` of `linux/prctl.h`.
const SET_IO_FLUSHER: libc::c_int = 57;
const UNUSED: libc::c_ulong = 0;

/// Lets this process do without what it serves, make files with exactly the modes that are asked for,
/// and open as many images as it may. Threads that are started later get all of it. Whether the first
/// was granted.
pub(super) fn set_up() -> bool {
    rustix::process::umask(rustix::fs::Mode::empty());
    // SAFETY: prctl with these takes no pointers. Without the privilege it fails, which is all
    // right: it matters only for loop devices under memory pressure.
    let is_io_flusher =
        unsafe { libc::prctl(SET_IO_FLUSHER, 1 as libc::c_ulong, UNUSED, UNUSED, UNUSED) } == 0;
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` lives through both calls; the first fills it, the second reads it.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
    is_io_flusher
}
