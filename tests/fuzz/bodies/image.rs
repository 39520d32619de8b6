//! Any bytes as an image.
//!
//! The corpus starts with images that QEMU made (`tests/fuzz/seeds`), so that what is mutated has a
//! structure.

use qcow2fs::storage::testing::MemoryStorage;

use super::use_it::use_it;

/// Runs the target.
pub fn run(bytes: &[u8]) {
    use_it(&MemoryStorage::new(bytes.to_vec()));
}
