//! Test doubles of [`Storage`](super::Storage). They are part of the library so that integration
//! tests and other programs of this project can drive the engine without a host file.
//!
//! [`MemoryStorage`] does what a host file does, [`RecordingStorage`] remembers every change so
//! that what a crash may leave behind can be built, [`FailingStorage`] fails when told to. They
//! know nothing of qcow2.

mod failing;
mod memory;
mod recording;

pub use failing::{FailingStorage, Fault, Operation, Strike};
pub use memory::MemoryStorage;
pub use recording::{Change, Entry, Fate, RecordingStorage, Replay};
