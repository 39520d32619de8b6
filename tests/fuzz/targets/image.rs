//! Any bytes as an image. See `bodies/image.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| qcow2fs_fuzz::image::run(bytes));
