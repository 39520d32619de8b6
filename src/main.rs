//! qcow2fs: parse, log, run, exit code.
fn main() {}
