//! A `qemu-nbd` that serves an image on a socket.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The server; it ends with this, at the latest.
pub struct Nbd {
    pub child: Child,
    socket: PathBuf,
}

impl Nbd {
    /// Serves the qcow2 image `image` on `socket`, to one client after the other. It takes connections
    /// from now on, which wait until the image is open.
    pub fn serve(image: &Path, arguments: &[&str], socket: PathBuf) -> Nbd {
        let child = Command::new("qemu-nbd")
            .args(["--persistent", "-f", "qcow2", "-k"])
            .arg(&socket)
            .args(arguments)
            .arg(image)
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-nbd starts");
        let mut nbd = Nbd { child, socket };
        let started = Instant::now();
        while !is_listening(&nbd.socket) {
            let ended = nbd.child.try_wait().expect("qemu-nbd is a child");
            assert!(ended.is_none(), "qemu-nbd: {ended:?}");
            assert!(started.elapsed() < Duration::from_secs(20), "qemu-nbd does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        nbd
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Whether connections to a socket are taken: its name is there a moment before they are.
fn is_listening(socket: &Path) -> bool {
    const LISTENING: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").expect("the kernel lists its sockets");
    let name = socket.to_str().expect("tests choose plain names");
    sockets
        .lines()
        .any(|line| line.ends_with(name) && line.split_ascii_whitespace().nth(3) == Some(LISTENING))
}
