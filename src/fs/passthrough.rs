//! Disks that the kernel reads and writes itself (FUSE passthrough): requests for them do not come
//! here.
//!
//! That is possible where a file of the host is the disk byte for byte and stays so
//! ([`Image::is_its_data_file`](crate::image::Image::is_its_data_file)), and only where the mount was
//! asked to, since this process has to keep `CAP_SYS_ADMIN` for it. The kernel wants all handles of
//! a file that are open at a time to be alike, so the first one decides for those that come while it
//! is open. As long as there are any, the disk grows by being told to, and not by being written past
//! its end, of which the kernel tells nobody: that is cut off again, and the next fsync or close
//! fails. Discards still come here, and so do flushes. What the kernel has in its page cache of such a
//! file it drops when it hears that it is to serve it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::BackingId;
use parking_lot::Mutex;

/// What was decided for the files that are open.
#[derive(Default)]
pub(super) struct Passthrough {
    /// The kernel can.
    offered: AtomicBool,
    /// By inode number. Taken while a change of the size is locked out.
    decided: Mutex<HashMap<u64, Decided>>,
}

struct Decided {
    handles: usize,
    /// What the kernel calls the file of the host; `None` where requests come here.
    file: Option<Arc<BackingId>>,
}

impl Passthrough {
    /// The kernel has said that it can.
    pub(super) fn is_offered(&self) {
        self.offered.store(true, Ordering::Release);
    }

    /// Counts a handle in; the file of the host, where the kernel is to serve it. `decide` says that of
    /// the first handle and those that come while it is open.
    pub(super) fn enter(
        &self,
        ino: u64,
        decide: impl FnOnce() -> Option<BackingId>,
    ) -> Option<Arc<BackingId>> {
        let mut decided = self.decided.lock();
        if let Some(known) = decided.get_mut(&ino) {
            known.handles += 1;
            return known.file.clone();
        }
        let offered = self.offered.load(Ordering::Acquire);
        let file = offered.then(decide).flatten().map(Arc::new);
        decided.insert(ino, Decided { handles: 1, file: file.clone() });
        file
    }

    /// Counts a handle out.
    pub(super) fn leave(&self, ino: u64) {
        let mut decided = self.decided.lock();
        if let Some(known) = decided.get_mut(&ino) {
            known.handles -= 1;
            if known.handles == 0 {
                decided.remove(&ino);
            }
        }
    }

    /// Whether the kernel serves the file.
    pub(super) fn is_on(&self, ino: u64) -> bool {
        self.decided.lock().get(&ino).is_some_and(|known| known.file.is_some())
    }
}
