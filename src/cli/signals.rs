//! SIGTERM, SIGINT and SIGHUP: the first one unmounts; when the mount is busy, the next one closes
//! every image and ends the process. Requests that are under way are done first, and later ones fail,
//! so that all is in the images that anybody was told is written.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use super::unmounting::{self, Served};
use crate::catalog::Catalog;

/// How long requests that are under way are waited for.
const CLOSING: Duration = Duration::from_secs(10);

/// The signals, kept from every thread that is started after [`block`].
pub(super) struct Signals(libc::sigset_t);

/// Blocks the signals; [`Signals::serve`] takes them from then on.
pub(super) fn block() -> Signals {
    // SAFETY: an empty set is made before it is used, and all calls get pointers to it alone.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        Signals(set)
    }
}

impl Signals {
    /// Starts the thread that takes the signals.
    ///
    /// # Errors
    /// Those of the host when it cannot start a thread.
    pub(super) fn serve(self, mount: Served, catalog: Arc<Catalog>) -> io::Result<()> {
        let serve = move || {
            let mut busy = false;
            loop {
                self.wait();
                if busy {
                    end(&mount, &catalog);
                }
                busy = !unmount(&mount);
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(serve).map(drop)
    }

    /// Starts a thread that puts the number of the first signal into the answer, 0 until then; the
    /// second one ends the process as if nobody had taken it.
    ///
    /// # Errors
    /// Those of the host when it cannot start a thread.
    pub(super) fn note(self) -> io::Result<Arc<AtomicI32>> {
        let first = Arc::new(AtomicI32::new(0));
        let noted = Arc::clone(&first);
        let note = move || {
            noted.store(self.wait(), Ordering::Release);
            std::process::exit(128 + self.wait());
        };
        std::thread::Builder::new().name("signals".into()).spawn(note)?;
        Ok(first)
    }

    fn wait(&self) -> i32 {
        let mut signal = 0;
        // SAFETY: both pointers are valid through the call.
        while unsafe { libc::sigwait(&self.0, &mut signal) } != 0 {}
        signal
    }
}

/// Unmounts; the session ends with it. Says who is in the way when it is busy.
fn unmount(mount: &Served) -> bool {
    let error = match unmounting::while_busy(unmounting::LEAVING, || mount.unmount(false)) {
        Ok(()) => return true,
        Err(e) => e,
    };
    let place = mount.mountpoint().display();
    if error.raw_os_error() == Some(libc::EBUSY) {
        let users = mount.users();
        log::error!(
            "{place} is busy, still serving it; another signal ends it. In use by: {users}"
        );
    } else {
        log::error!("cannot unmount {place}, another signal ends it: {error}");
    }
    false
}

/// Closes every image under its users' hands and ends the process.
fn end(mount: &Served, catalog: &Catalog) -> ! {
    if let Err(e) = mount.unmount(true) {
        log::error!("cannot detach {}: {e}", mount.mountpoint().display());
    }
    let failed = catalog.close_all(CLOSING);
    std::process::exit(i32::from(failed > 0))
}
