//! The process that keeps its privileges while the one that serves the mount gives them up
//! ([`crate::confine`]): it unmounts, and finds out who uses something.
//!
//! It is forked once the mount is there, has none of its descriptors, never sees an image, and does
//! nothing but what [`Order`] lists. It ends with the process that serves the mount.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{busy, unmounting};
use crate::storage::image_lock::{self, Holder, Wanted};

/// What it can be asked to do.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// Unmount what this mount point shows, if its file system has this number, or whatever it is.
    Unmount { device: Option<Vec<u8>>, lazy: bool },
    /// Tell who uses something beneath the mount point.
    Users,
    /// Tell who has a file open.
    Holder(Wanted),
}

/// How to reach it. One line there, one back.
pub(super) struct Helper {
    /// Unmounting must not wait for a search, which may take long.
    unmounting: Mutex<UnixStream>,
    searching: Mutex<UnixStream>,
}

/// A failed system call on its way back.
#[derive(Serialize, Deserialize)]
struct Failure {
    errno: Option<i32>,
    text: String,
}

impl Helper {
    /// Forks it. Only for a process with a single thread.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn start(mountpoint: &Path) -> io::Result<Helper> {
        let (unmounting, for_unmounting) = UnixStream::pair()?;
        let (searching, for_searching) = UnixStream::pair()?;
        // SAFETY: no thread but this one exists, so the child may go on with all of the memory.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                // The descriptor of the log is closed as well; another one may get its number.
                log::set_max_level(log::LevelFilter::Off);
                let streams = [for_unmounting.as_raw_fd(), for_searching.as_raw_fd()];
                let code = i32::from(serve(streams, mountpoint).is_err());
                // SAFETY: _exit does not return; nothing of the parent's is run or flushed.
                unsafe { libc::_exit(code) }
            }
            _ => {
                Ok(Helper { unmounting: Mutex::new(unmounting), searching: Mutex::new(searching) })
            }
        }
    }

    /// As [`unmounting::unmount`], for the file system of this number only, where one is given.
    ///
    /// # Errors
    /// Those of [`unmounting::unmount`].
    pub(super) fn unmount(&self, device: Option<&[u8]>, lazy: bool) -> io::Result<()> {
        let order = Order::Unmount { device: device.map(<[u8]>::to_vec), lazy };
        let done: Result<(), Failure> = ask(&self.unmounting, &order)?;
        done.map_err(|failure| match failure.errno {
            Some(errno) => io::Error::from_raw_os_error(errno),
            None => io::Error::other(failure.text),
        })
    }

    /// As [`busy::users`].
    pub(super) fn users(&self) -> String {
        ask(&self.unmounting, &Order::Users).unwrap_or_default()
    }

    /// As [`image_lock::find_holder`].
    pub(super) fn holder(&self, wanted: &Wanted) -> Option<Holder> {
        // The one that was asked before may take its time: then nobody is found.
        let stream = self.searching.try_lock_for(image_lock::SEARCH)?;
        exchange(&stream, &Order::Holder(wanted.clone())).ok()?
    }
}

fn ask<T: DeserializeOwned>(stream: &Mutex<UnixStream>, order: &Order) -> io::Result<T> {
    exchange(&stream.lock(), order)
}

fn exchange<T: DeserializeOwned>(mut stream: &UnixStream, order: &Order) -> io::Result<T> {
    let mut line = serde_json::to_vec(order)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = Vec::new();
    // Nothing comes but the answer, so nothing is lost with the buffer.
    BufReader::new(stream).read_until(b'\n', &mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}

/// Answers until the other side is gone.
fn serve(streams: [RawFd; 2], mountpoint: &Path) -> io::Result<()> {
    let [unmounting, searching] = keep_only(streams)?;
    std::env::set_current_dir("/")?;
    let place = mountpoint.to_owned();
    std::thread::Builder::new().name("search".into()).spawn(move || answer(&searching, &place))?;
    answer(&unmounting, mountpoint)
}

/// Closes everything but these, which become the first after the three standard ones; those become
/// `/dev/null`. The connection to the kernel must end with the process that serves it.
fn keep_only(streams: [RawFd; 2]) -> io::Result<[UnixStream; 2]> {
    use std::os::fd::IntoRawFd;
    const FIRST: RawFd = 3;
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?.into_raw_fd();
    // Out of the way of the places that they go to.
    let copy = |fd: RawFd| {
        // SAFETY: F_DUPFD takes a number; the descriptor is open.
        match unsafe { libc::fcntl(fd, libc::F_DUPFD, FIRST + 2) } {
            -1 => Err(io::Error::last_os_error()),
            copy => Ok(copy),
        }
    };
    let [one, other, null] = [copy(streams[0])?, copy(streams[1])?, copy(null)?];
    for (from, to) in [(null, 0), (null, 1), (null, 2), (one, FIRST), (other, FIRST + 1)] {
        // SAFETY: dup2 takes two numbers; the first is open.
        if unsafe { libc::dup2(from, to) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // Not every C library has a function for it.
    let (first, last) = (FIRST as libc::c_uint + 2, libc::c_uint::MAX);
    // SAFETY: nothing that owns one of these is used or dropped in this process any more.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both were made above, and nobody else owns them.
    Ok(unsafe { [UnixStream::from_raw_fd(FIRST), UnixStream::from_raw_fd(FIRST + 1)] })
}

fn answer(mut stream: &UnixStream, mountpoint: &Path) -> io::Result<()> {
    let mut orders = BufReader::new(stream.try_clone()?);
    loop {
        let mut line = Vec::new();
        if orders.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let mut answer = match serde_json::from_slice(&line)? {
            Order::Unmount { device, lazy } => {
                serde_json::to_vec(&unmount(mountpoint, device.as_deref(), lazy))
            }
            Order::Users => serde_json::to_vec(&busy::users(mountpoint)),
            Order::Holder(wanted) => serde_json::to_vec(&image_lock::find_holder(&wanted)),
        }?;
        answer.push(b'\n');
        stream.write_all(&answer)?;
    }
}

fn unmount(mountpoint: &Path, device: Option<&[u8]>, lazy: bool) -> Result<(), Failure> {
    let seen = device.is_none_or(|device| unmounting::shows(mountpoint, device));
    let done = match seen {
        true => unmounting::unmount(mountpoint, lazy),
        false => Err(unmounting::not_there()),
    };
    done.map_err(|e| Failure { errno: e.raw_os_error(), text: e.to_string() })
}
