//! A program at a terminal of its own, with somebody who reads and types.

use std::ffi::CStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::lab::{PROGRAM, eventually};

/// Longer than anything takes.
const LIMIT: Duration = Duration::from_secs(120);

pub struct Terminal {
    master: File,
    child: Child,
    shown: Arc<Mutex<String>>,
    reader: JoinHandle<()>,
}

/// Both sides of a new terminal. No other child of this process gets them.
fn pair() -> (File, File) {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    let mut name = [0u8; 64];
    // SAFETY: the descriptor that the first call returns is open and nobody else's, and the name has
    // the length that is given.
    let master = unsafe {
        let master = libc::posix_openpt(flags);
        let is_made = libc::grantpt(master) == 0
            && libc::unlockpt(master) == 0
            && libc::ptsname_r(master, name.as_mut_ptr().cast(), name.len()) == 0;
        assert!(is_made, "{}", std::io::Error::last_os_error());
        File::from_raw_fd(master)
    };
    let name = CStr::from_bytes_until_nul(&name).unwrap().to_str().unwrap();
    let slave = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(name);
    (master, slave.unwrap())
}

impl Terminal {
    /// Starts `qcow2fs` with these arguments.
    pub fn run(arguments: &[&str]) -> Terminal {
        let (master, slave) = pair();
        let mut command = Command::new(PROGRAM);
        command.args(arguments).env("LC_ALL", "C").env("TERM", "dumb");
        command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap());
        command.stderr(slave);
        let take_terminal = || {
            // SAFETY: these take no pointers, and may be called between fork and exec.
            let taken = unsafe { libc::setsid() >= 0 && libc::ioctl(0, libc::TIOCSCTTY, 0) == 0 };
            if taken { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        };
        // SAFETY: the closure makes system calls only.
        unsafe { command.pre_exec(take_terminal) };
        let child = command.spawn().unwrap();
        // With it the last descriptor of the other side that is ours.
        drop(command);
        let shown = Arc::new(Mutex::new(String::new()));
        let (mut from, into) = (master.try_clone().unwrap(), Arc::clone(&shown));
        let reader = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // Ends with an error when nobody has the other side any more.
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                into.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        Terminal { master, child, shown, reader }
    }

    fn shown(&self) -> String {
        self.shown.lock().unwrap().clone()
    }

    fn echoes(&self) -> bool {
        // SAFETY: an all-zero termios is one.
        let mut state: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open and `state` lives through the call, which fills it.
        let got = unsafe { libc::tcgetattr(self.master.as_raw_fd(), &mut state) };
        got != 0 || state.c_lflag & libc::ECHO != 0
    }

    /// Waits until it says `question` and shows no longer what is typed; types `answer`.
    pub fn answer(&mut self, question: &str, answer: &str) {
        let asked = || self.shown().contains(question) && !self.echoes();
        eventually(LIMIT, asked, || self.shown());
        self.master.write_all(format!("{answer}\n").as_bytes()).unwrap();
    }

    /// How it ended, and all that was shown.
    pub fn end(mut self) -> (ExitStatus, String) {
        let mut status = None;
        let ended = || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        };
        eventually(LIMIT, ended, || self.shown.lock().unwrap().clone());
        self.reader.join().unwrap();
        (status.unwrap(), self.shown.lock().unwrap().clone())
    }
}
