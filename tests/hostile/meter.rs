//! What the engine takes of memory: an allocator that counts, for all threads of this program.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// What opening an image and using it may take at most, whatever the image says.
pub const LIMIT: usize = 64 << 20;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// Who measures one thing alone holds it exclusively.
static ALONE: RwLock<()> = RwLock::new(());

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: everything is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps the rules of this very call.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps the rules of this very call.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the rules of this very call.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both are there for a moment, at worst.
        count(size);
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the rules of this very call.
        unsafe { System.realloc(place, layout, size) }
    }
}

fn count(bytes: usize) {
    let now = NOW.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(now, Ordering::Relaxed);
}

/// The most that all of this program had at once since the last call, but for what was measured
/// alone, in bytes.
pub fn peak_of_all() -> usize {
    PEAK.swap(NOW.load(Ordering::Relaxed), Ordering::Relaxed)
}

/// Keeps those away who want to measure alone.
pub fn among_others() -> RwLockReadGuard<'static, ()> {
    ALONE.read()
}

/// Waits until nobody else does anything, and keeps them from it.
pub fn alone() -> Alone {
    Alone(ALONE.write())
}

/// Nobody else does anything.
pub struct Alone(
    #[allow(dead_code, reason = "dropping it lets the others go on")] RwLockWriteGuard<'static, ()>,
);

impl Alone {
    /// The peak from now on.
    pub fn start(&self) -> Meter {
        let before = NOW.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        Meter { before }
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        PEAK.store(NOW.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

/// What is measured alone.
pub struct Meter {
    before: usize,
}

impl Meter {
    /// The most that was in use since it was started, beyond what was in use then, in bytes.
    pub fn peak(&self) -> usize {
        PEAK.load(Ordering::Relaxed).saturating_sub(self.before)
    }
}
