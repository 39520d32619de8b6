//! What the fuzz targets do with bytes, apart from the fuzzer: `tests/hostile` runs the same on the
//! inputs in `corpus/`, in the ordinary test suite.

pub mod compressed;
pub mod crash;
pub mod history;
pub mod image;
pub mod names;
pub mod structure;
pub mod use_it;
