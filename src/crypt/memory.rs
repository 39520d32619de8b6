//! Memory for keys: pages of their own, kept out of swap, core dumps and child processes where the kernel
//! allows, and wiped before they are given back.

use std::io;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use zeroize::Zeroize;

/// Whole pages that hold nothing else.
#[derive(Debug)]
struct Pages {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the pages belong to this value alone, and are plain memory.
unsafe impl Send for Pages {}
// SAFETY: as above; through a shared reference they are only read.
unsafe impl Sync for Pages {}

impl Pages {
    /// Zeroed pages with room for `bytes`.
    fn new(bytes: usize) -> Pages {
        let length = bytes.max(1).next_multiple_of(4096);
        let (access, kind) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, access, kind, -1, 0) };
        let start = match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => start,
            _ => std::alloc::handle_alloc_error(
                std::alloc::Layout::from_size_align(length, 4096)
                    .unwrap_or(std::alloc::Layout::new::<u8>()),
            ),
        };
        let pages = Pages { start, length };
        // SAFETY: the range is the mapping that was just made.
        let locked = unsafe { libc::mlock(pages.start.as_ptr().cast(), length) };
        if locked != 0 {
            // Best effort: the limit may be low for a user who is not root.
            log::debug!("keys may be swapped out: {}", io::Error::last_os_error());
        }
        for advice in [libc::MADV_DONTDUMP, libc::MADV_WIPEONFORK] {
            // SAFETY: as above. A kernel that cannot do it leaves the pages in core dumps and children.
            unsafe { libc::madvise(pages.start.as_ptr().cast(), length, advice) };
        }
        pages
    }

    fn bytes(&self, length: usize) -> &[u8] {
        // SAFETY: the mapping is at least `length` bytes long, initialized, and ours.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), length.min(self.length)) }
    }

    fn bytes_mut(&mut self, length: usize) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), length.min(self.length)) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let length = self.length;
        self.bytes_mut(length).zeroize();
        // SAFETY: the mapping is ours, and nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), length) };
    }
}

/// Bytes that nobody else may see: a passphrase or a key. They are not shown by `Debug`.
pub struct Secret {
    pages: Pages,
    length: usize,
}

impl Secret {
    /// `length` zeros, to be filled.
    #[must_use]
    pub fn zeroed(length: usize) -> Secret {
        Secret { pages: Pages::new(length), length }
    }

    /// A copy of `bytes`, which the caller wipes.
    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Secret {
        let mut secret = Secret::zeroed(bytes.len());
        secret.copy_from_slice(bytes);
        secret
    }

    /// Drops all but the first `length` bytes.
    pub fn truncate(&mut self, length: usize) {
        let length = length.min(self.length);
        self[length..].zeroize();
        self.length = length;
    }
}

impl Deref for Secret {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.pages.bytes(self.length)
    }
}

impl DerefMut for Secret {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.pages.bytes_mut(self.length)
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// A value in memory for keys: the round keys of a cipher.
pub(super) struct Kept<T> {
    pages: Pages,
    value: PhantomData<T>,
}

impl<T> Kept<T> {
    pub(super) fn new(value: T) -> Kept<T> {
        assert!(align_of::<T>() <= 4096, "pages are aligned well enough for any cipher");
        let pages = Pages::new(size_of::<T>());
        // SAFETY: the pages have room for a value, are aligned for it, and hold nothing yet.
        unsafe { pages.start.as_ptr().cast::<T>().write(value) };
        Kept { pages, value: PhantomData }
    }
}

impl<T> Deref for Kept<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `new` has put a value there, which nothing has moved.
        unsafe { self.pages.start.cast::<T>().as_ref() }
    }
}

impl<T> Drop for Kept<T> {
    fn drop(&mut self) {
        // SAFETY: the value is there, and is not used again: the pages are wiped after this.
        unsafe { self.pages.start.as_ptr().cast::<T>().drop_in_place() };
    }
}

/// Wipes what a key was derived on: the part of this thread's stack that functions called before
/// have used. Best effort: registers and what the compiler has spilled elsewhere stay.
#[inline(never)]
pub(super) fn wipe_stack() {
    let mut frame = [0u8; 64 << 10];
    frame.zeroize();
    std::hint::black_box(&mut frame);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_holds_its_bytes_and_shows_them_to_nobody() {
        let mut secret = Secret::copy_of(b"correct horse");
        assert_eq!(&*secret, b"correct horse");
        secret.truncate(7);
        assert_eq!(&*secret, b"correct");
        assert_eq!(secret.pages.bytes(16), b"correct\0\0\0\0\0\0\0\0\0");
        assert_eq!(format!("{secret:?}"), "Secret");
        assert!(Secret::copy_of(b"").is_empty());
    }

    #[test]
    fn neither_a_child_process_nor_a_core_dump_gets_it() {
        let secret = Secret::copy_of(b"correct horse");
        let at = secret.pages.start.as_ptr() as usize;
        let contains = |line: &str| {
            let (start, end) = line.split(' ').next()?.split_once('-')?;
            let number = |text| usize::from_str_radix(text, 16).ok();
            Some((number(start)?..number(end)?).contains(&at))
        };
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let own = maps.lines().skip_while(|line| contains(line) != Some(true));
        let flags = own.filter_map(|line| line.strip_prefix("VmFlags:")).next().unwrap_or_default();
        let own: Vec<&str> = flags.split(' ').collect();
        assert!(own.contains(&"wf") && own.contains(&"dd"), "{own:?}");
    }

    #[test]
    fn a_kept_value_is_dropped_once() {
        let shared = std::sync::Arc::new(7);
        let kept = Kept::new(shared.clone());
        assert_eq!((**kept, std::sync::Arc::strong_count(&shared)), (7, 2));
        drop(kept);
        assert_eq!(std::sync::Arc::strong_count(&shared), 1);
    }
}
