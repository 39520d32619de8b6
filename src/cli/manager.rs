//! The service manager that has started this process, if one has: systemd, with `Type=notify`.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The way to it: sd_notify(3).
pub(super) struct Manager(Option<UnixDatagram>);

/// What it is told of this process.
#[derive(Clone, Copy, Debug)]
pub(super) enum State {
    /// It serves.
    Ready,
    /// It will end.
    Stopping,
}

impl Manager {
    /// Connects to it, before this process is confined and cannot any more.
    pub(super) fn connect() -> Manager {
        let socket = std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty());
        match socket.map(|socket| connected(&socket)).transpose() {
            Ok(socket) => Manager(socket),
            Err(e) => {
                log::warn!("connecting to the service manager: {e}");
                Manager(None)
            }
        }
    }

    /// Tells it, where there is one.
    pub(super) fn tell(&self, state: State) {
        let line = match state {
            State::Ready => "READY=1",
            State::Stopping => "STOPPING=1",
        };
        if let Some(socket) = &self.0
            && let Err(e) = socket.send(line.as_bytes())
        {
            log::warn!("telling the service manager: {e}");
        }
    }
}

/// A socket that is connected to the one of this name: a path, or `@` and a name that is no file's.
fn connected(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(socket)
}
