//! The verifier, the repairs and the rebuild of refcounts, judged by QEMU.

#![allow(clippy::unwrap_used)]

mod command;
mod common;
mod crash;
mod damage;
mod hostile;
mod rebuild;
mod shapes;
#[path = "../support/mod.rs"]
mod support;
