//! Histories of operations against a model. See `bodies/history.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| qcow2fs_fuzz::history::run(bytes));
