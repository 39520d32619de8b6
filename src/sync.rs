//! The locks and atomics of what threads share: those of `parking_lot` and of the standard library,
//! or in a model (tests with feature `model`) a checker's, which tries every order that the memory
//! model allows.
//!
//! Only modules that have a model take theirs from here.

#[cfg(not(all(test, feature = "model")))]
mod real {
    pub(crate) use std::sync::{OnceLock, atomic};
    #[cfg(debug_assertions)]
    pub(crate) use std::thread_local;

    pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard};
}
#[cfg(not(all(test, feature = "model")))]
pub(crate) use real::*;

#[cfg(all(test, feature = "model"))]
pub(crate) mod model;
#[cfg(all(test, feature = "model"))]
pub(crate) use model::*;
