//! A sound image whose fields are changed by what they are. See `bodies/structure.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| qcow2fs_fuzz::structure::run(bytes));
