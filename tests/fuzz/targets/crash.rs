//! Histories that end in losses of power, and the recovery. See `bodies/crash.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| qcow2fs_fuzz::crash::run(bytes));
