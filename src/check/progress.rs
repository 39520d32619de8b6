//! How far a check is, for whoever waits for it.

/// Is told how far a check is. `()` does not care.
pub trait Watch {
    /// `step` (a present participle) has done so much of so much, in whatever it counts; it may not
    /// come to all of it.
    fn at(&self, step: &'static str, done: u64, all: u64);
}

impl Watch for () {
    fn at(&self, _step: &'static str, _done: u64, _all: u64) {}
}
