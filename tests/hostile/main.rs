//! Images made to hurt, opened as the engine opens them: no byte of their metadata makes it panic,
//! hang, take memory that nothing stands for, or write outside the image.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

#[path = "../support/mod.rs"]
mod support;

mod bombs;
mod meter;
mod mutation;
mod names;
mod ownership;
mod replay;
mod shapes;
mod unsafe_code;
