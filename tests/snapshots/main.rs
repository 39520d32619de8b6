//! Internal snapshots: taken, read, applied and deleted while the disk is written; against a model,
//! QEMU and failures of the host. Their crashes are searched in `tests/crash.rs`.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

#[path = "../support/mod.rs"]
mod support;

mod concurrent;
mod faults;
mod foreign;
mod model;
