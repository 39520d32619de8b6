//! Disks that the kernel reads and writes itself (FUSE passthrough): requests for them do not come
//! here.
//!
//! That is possible where a file of the host is the disk byte for byte and stays so
//! ([`Image::is_its_data_file`](crate::image::Image::is_its_data_file)), and only where the mount was
//! asked to, since this process has to keep `CAP_SYS_ADMIN` for it. The kernel wants all handles of
//! a file that are open at a time to be alike, so the first one decides for those that come while it
//! is open. As long as there are any, the disk grows by being told to, and not by being written past
//! its end, of which the kernel tells nobody: that is cut off again, and fsync and close fail from
//! then on, whoever calls them. Discards still come here, and so do flushes.
//!
//! Who has such a file open reads and writes it even when this process is gone. Nobody else does
//! meanwhile: what the kernel holds is the open file that QEMU's locks are on. A mapping in memory
//! is one of the host's file, of which the kernel says nothing when the handle is closed, so the last
//! handle of a disk that is open for writing stays as long as anybody but this process has the host's
//! file open.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::BackingId;
use parking_lot::Mutex;
use rustix::fs::{AtFlags, StatxFlags, statx};

/// Loop devices on a file of FUSE take this for the alignment that direct I/O needs.
const SECTOR: u32 = 512;

/// What was decided for the files that are open.
pub(super) struct Passthrough {
    /// The kernel can.
    offered: AtomicBool,
    /// It was said that it will not.
    refused: AtomicBool,
    /// By inode number. A leaf; entries come while the size of the file is locked.
    decided: Mutex<HashMap<u64, Decided>>,
}

struct Decided {
    handles: usize,
    /// What the kernel calls the file of the host; `None` where requests come here.
    file: Option<Arc<BackingId>>,
    /// Something was written past the end.
    was_cut: bool,
}

impl Passthrough {
    pub(super) fn new() -> Self {
        // Who opens the host's file while we look whether anybody has it open makes the kernel send us
        // this, which would end the process.
        // SAFETY: no function of ours becomes a handler.
        unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
        Passthrough {
            offered: AtomicBool::new(false),
            refused: AtomicBool::new(false),
            decided: Mutex::default(),
        }
    }

    /// The kernel has said that it can.
    pub(super) fn offer(&self) {
        self.offered.store(true, Ordering::Release);
    }

    /// The kernel does not take a file; whether it is the first.
    pub(super) fn is_first_refusal(&self) -> bool {
        !self.refused.swap(true, Ordering::Relaxed)
    }

    /// Counts a handle in; the file of the host, where the kernel is to serve it. `decide` says that of
    /// the first handle and those that come while it is open. The caller has locked the file's size.
    pub(super) fn enter(
        &self,
        ino: u64,
        decide: impl FnOnce() -> Option<BackingId>,
    ) -> Option<Arc<BackingId>> {
        if let Some(known) = self.decided.lock().get_mut(&ino) {
            known.handles += 1;
            return known.file.clone();
        }
        // It may take a while, and others do not wait for it.
        let offered = self.offered.load(Ordering::Acquire);
        let file = offered.then(decide).flatten().map(Arc::new);
        let first = Decided { handles: 1, file: file.clone(), was_cut: false };
        self.decided.lock().insert(ino, first);
        file
    }

    /// Counts a handle out.
    pub(super) fn leave(&self, ino: u64) {
        count_out(&mut self.decided.lock(), ino);
    }

    /// Whether the kernel serves the file.
    pub(super) fn is_on(&self, ino: u64) -> bool {
        self.decided.lock().get(&ino).is_some_and(|known| known.file.is_some())
    }

    /// Counts a handle out, unless it is the last one of a file that the kernel serves; whether it did.
    pub(super) fn leave_unless_last(&self, ino: u64) -> bool {
        let mut decided = self.decided.lock();
        match decided.get_mut(&ino) {
            Some(known) if known.file.is_some() && known.handles == 1 => false,
            _ => {
                count_out(&mut decided, ino);
                true
            }
        }
    }

    /// What was written past the end of the file is no fault of those who open it from now on.
    pub(super) fn forgive(&self, ino: u64) {
        if let Some(known) = self.decided.lock().get_mut(&ino) {
            known.was_cut = false;
        }
    }

    /// Something may have been written past the end of the file; whether that has ever been.
    pub(super) fn was_cut(&self, ino: u64, now: bool) -> bool {
        self.decided.lock().get_mut(&ino).is_some_and(|known| {
            known.was_cut |= now;
            known.was_cut
        })
    }
}

fn count_out(decided: &mut HashMap<u64, Decided>, ino: u64) {
    if let Some(known) = decided.get_mut(&ino) {
        known.handles -= 1;
        if known.handles == 0 {
            decided.remove(&ino);
        }
    }
}

/// Whether the host's file takes direct I/O as a file of ours does. Where the file system does not
/// say, it is taken to.
pub(super) fn takes_sectors(file: &File) -> bool {
    let Ok(found) = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) else {
        return true;
    };
    let fits = |alignment| (1..=SECTOR).contains(&alignment);
    found.stx_mask & StatxFlags::DIOALIGN.bits() == 0
        || fits(found.stx_dio_offset_align) && fits(found.stx_dio_mem_align)
}
