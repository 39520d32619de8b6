//! Test doubles of [`Storage`](super::Storage). They are part of the library so that integration
//! tests and other programs of this project can drive the engine without a host file.
//!
//! [`MemoryStorage`] does what a host file does, [`RecordingStorage`] remembers every change so
//! that what a crash may leave behind can be built, [`FailingStorage`] fails when told to; a [`Layer`]
//! does one thing otherwise than the storage below it. They
//! know nothing of qcow2.

mod failing;
mod layer;
mod memory;
mod recording;

pub use failing::{FailingStorage, Fault, Operation, Strike};
pub use layer::Layer;
pub use memory::MemoryStorage;
pub use recording::{Change, Entry, Fate, RecordingStorage, Replay};
