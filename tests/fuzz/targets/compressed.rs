//! Any bytes as compressed data. See `bodies/compressed.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| qcow2fs_fuzz::compressed::run(bytes));
