//! What this process gives up once it serves a mount: whoever takes it over, by a defect that an image
//! finds, gets no further than what serving images needs.
//!
//! | layer | what is left |
//! |---|---|
//! | capabilities | those that reading and changing other users' files needs, none for who is not root; `CAP_SYS_ADMIN` and `CAP_LEASE` where the kernel is to serve files itself |
//! | no_new_privs | no program that is started gains anything |
//! | Landlock | files beneath the image directory and the allowed ones; no network, no signals to others |
//! | seccomp | the system calls that serving makes; no program or process is started, no socket made or connected, no memory is executable |
//!
//! Landlock says what is opened, made, renamed and removed, but not whose mode, owner, times and extended
//! attributes are changed, nor which socket that is a file is connected to. So seccomp leaves of those
//! calls only the ones on a descriptor, which Landlock has let open, be it to read only; and what this
//! process talks to, it is connected to before: the log (syslog(3)), the service manager, the process
//! that it asks.
//!
//! Each is used where the kernel has it, and each can be left out. A system call that is not on the
//! list fails rather than to kill the process: that has other people's unwritten data, and a kernel or
//! a C library that is newer than the list must not cost anybody that. It fails with `EPERM`, and the
//! kernel's log names it; one that is newer than the list fails with `ENOSYS`, as on an older kernel,
//! so that a newer C library does what it does there.
//!
//! All of it holds for the calling thread and those that it starts, so it is done before there are
//! others. What still needs privileges (to unmount, to find out who uses a file) is asked of a process
//! that keeps them and knows nothing else.

mod capabilities;
mod files;
mod system_calls;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::OnceLock;

use serde::Serialize;

/// One of the things that are given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Capabilities: capabilities(7).
    Capabilities,
    /// The right to gain any: `PR_SET_NO_NEW_PRIVS` of prctl(2). Seccomp needs it.
    NoNewPrivs,
    /// Files and network: landlock(7).
    Landlock,
    /// System calls: seccomp(2).
    Seccomp,
}

impl Layer {
    /// All of them.
    pub const ALL: &'static [Layer] =
        &[Layer::Capabilities, Layer::NoNewPrivs, Layer::Landlock, Layer::Seccomp];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Layer::Capabilities => "capabilities",
            Layer::NoNewPrivs => "no_new_privs",
            Layer::Landlock => "landlock",
            Layer::Seccomp => "seccomp",
        }
    }

    /// The layer of that name, a hyphen or an underscore between words, or `all` of them.
    ///
    /// # Errors
    /// A line that names those that there are.
    pub fn parse(name: &str) -> Result<&'static [Layer], String> {
        let name = name.replace('-', "_");
        if name == "all" {
            return Ok(Layer::ALL);
        }
        let found = Layer::ALL.iter().find(|layer| layer.name() == name);
        found.map(std::slice::from_ref).ok_or_else(|| {
            let names: Vec<_> = Layer::ALL.iter().map(|layer| layer.name()).collect();
            format!("'{name}' is none of {}, all", names.join(", "))
        })
    }
}

/// A directory or file that stays within reach, with all that is beneath it.
#[derive(Clone, Debug)]
pub struct Place {
    /// Where it is.
    pub path: PathBuf,
    /// Whether files beneath it are changed, made and removed.
    pub write: bool,
}

/// How each layer went: `on`, or why it is not.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`Layer::Capabilities`].
    pub capabilities: String,
    /// [`Layer::NoNewPrivs`].
    pub no_new_privs: String,
    /// [`Layer::Landlock`].
    pub landlock: String,
    /// [`Layer::Seccomp`].
    pub seccomp: String,
}

const ON: &str = "on";
const SWITCHED_OFF: &str = "switched off";

/// A process is confined once.
static REPORT: OnceLock<Report> = OnceLock::new();

/// Gives up everything but the layers in `without`; only `places` stay within reach, and with
/// `passthrough` what it takes to have the kernel serve files itself. The caller is the only thread.
pub fn confine(without: &[Layer], places: &[Place], passthrough: bool) -> &'static Report {
    let report = give_up(without, places, passthrough);
    for (layer, state) in report.layers() {
        match state {
            ON => log::debug!("{layer}: {state}"),
            SWITCHED_OFF => log::info!("{layer}: {state}"),
            _ => log::warn!("this process stays more powerful than it need be: {layer}: {state}"),
        }
    }
    REPORT.get_or_init(|| report)
}

fn give_up(without: &[Layer], places: &[Place], passthrough: bool) -> Report {
    let asked = |layer: Layer, done: &dyn Fn() -> Result<(), String>| match without.contains(&layer)
    {
        true => SWITCHED_OFF.to_owned(),
        false => done().map_or_else(|why| format!("not available: {why}"), |()| ON.to_owned()),
    };
    let needs_no_new_privs =
        |done: &dyn Fn() -> Result<(), String>| match without.contains(&Layer::NoNewPrivs) {
            true => Err("it needs no_new_privs, which is switched off".to_owned()),
            false => done(),
        };
    // In this order: each may forbid what those before it do.
    let no_new_privs = asked(Layer::NoNewPrivs, &set_no_new_privs);
    let landlock = asked(Layer::Landlock, &|| needs_no_new_privs(&|| files::restrict(places)));
    let capabilities =
        asked(Layer::Capabilities, &|| capabilities::drop_all_but_needed(passthrough));
    let seccomp =
        asked(Layer::Seccomp, &|| needs_no_new_privs(&|| system_calls::restrict(passthrough)));
    Report { capabilities, no_new_privs, landlock, seccomp }
}

impl Report {
    /// Each layer's name and how it went.
    pub fn layers(&self) -> [(&'static str, &str); 4] {
        [
            (Layer::Capabilities.name(), &self.capabilities),
            (Layer::NoNewPrivs.name(), &self.no_new_privs),
            (Layer::Landlock.name(), &self.landlock),
            (Layer::Seccomp.name(), &self.seccomp),
        ]
    }
}

/// What this process has given up; `None` where it was told to keep everything.
pub fn report() -> Option<&'static Report> {
    REPORT.get()
}

fn set_no_new_privs() -> Result<(), String> {
    const SET: libc::c_ulong = 1;
    const UNUSED: libc::c_ulong = 0;
    // SAFETY: prctl with these takes no pointers.
    match unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, SET, UNUSED, UNUSED, UNUSED) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().to_string()),
    }
}
