//! Refcounts: allocate, free, grow, rebuild.

pub mod rebuild;
