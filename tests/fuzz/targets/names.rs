//! Names, attributes and offsets of requests. See `bodies/names.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| qcow2fs_fuzz::names::run(bytes));
