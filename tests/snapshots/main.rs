//! Internal snapshots: taken, read, applied and deleted while the disk is written; against a model,
//! QEMU, crashes and failures of the host.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

#[path = "../support/mod.rs"]
mod support;

mod concurrent;
mod crash;
mod faults;
mod foreign;
mod model;
