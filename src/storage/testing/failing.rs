//! A file that fails when told to.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread::{self, ThreadId};

use parking_lot::Mutex;

use crate::storage::Storage;

/// What can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// [`Storage::read_at`].
    Read,
    /// [`Storage::write_at`].
    Write,
    /// [`Storage::sync`].
    Sync,
    /// [`Storage::set_len`].
    SetLen,
    /// [`Storage::punch_hole`].
    Punch,
    /// [`Storage::zero_range`].
    Zero,
    /// [`Storage::allocate`].
    Allocate,
}

impl Operation {
    /// Everything that changes the file or makes changes durable.
    pub const CHANGES: [Operation; 6] = [
        Operation::Write,
        Operation::Sync,
        Operation::SetLen,
        Operation::Punch,
        Operation::Zero,
        Operation::Allocate,
    ];
}

/// What fails, when and how.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The operations that are counted and fail.
    pub on: Vec<Operation>,
    /// How many of them succeed first.
    pub after: u64,
    /// Whether all later ones fail too, or just this one.
    pub lasting: bool,
    /// The error.
    pub errno: i32,
    /// Whether a failing write, punch or zeroing does the first half of its work, in whole
    /// 512-byte sectors. Otherwise a failing operation does nothing.
    pub short: bool,
}

/// A failure that happened.
#[derive(Clone, Copy, Debug)]
pub struct Strike {
    /// What failed.
    pub operation: Operation,
    /// In which thread.
    pub thread: ThreadId,
}

/// A file whose operations fail as a [`Fault`] says; everything else goes to the file behind it.
pub struct FailingStorage {
    inner: Arc<dyn Storage>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    fault: Option<Fault>,
    /// Operations of the fault's kinds since it was armed.
    seen: u64,
    strikes: Vec<Strike>,
}

impl FailingStorage {
    /// A file that does what `inner` does until a fault is armed.
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        FailingStorage { inner, state: Arc::default() }
    }

    /// Another file, `inner`, whose operations are counted and fail together with this one's.
    #[must_use]
    pub fn beside(&self, inner: Arc<dyn Storage>) -> Self {
        FailingStorage { inner, state: Arc::clone(&self.state) }
    }

    /// From now on `fault` is counted and happens. It takes the place of an earlier one.
    pub fn arm(&self, fault: Fault) {
        let mut state = self.state.lock();
        state.fault = Some(fault);
        state.seen = 0;
    }

    /// From now on nothing fails.
    pub fn disarm(&self) {
        self.state.lock().fault = None;
    }

    /// Operations that the fault applies to since it was armed, failed ones included.
    pub fn seen(&self) -> u64 {
        self.state.lock().seen
    }

    /// Every failure up to now.
    pub fn strikes(&self) -> Vec<Strike> {
        self.state.lock().strikes.clone()
    }

    /// The fault, if this operation is to fail.
    fn strike(&self, operation: Operation) -> Option<Fault> {
        let mut state = self.state.lock();
        let fault = state.fault.clone().filter(|fault| fault.on.contains(&operation))?;
        let number = state.seen;
        state.seen += 1;
        if number < fault.after || (number > fault.after && !fault.lasting) {
            return None;
        }
        state.strikes.push(Strike { operation, thread: thread::current().id() });
        Some(fault)
    }

    fn change(
        &self,
        operation: Operation,
        change: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        match self.strike(operation) {
            None => change(),
            Some(fault) => Err(io::Error::from_raw_os_error(fault.errno)),
        }
    }

    /// `change`, of the range that it is given: the whole, or the first half before a failure.
    fn ranged(
        &self,
        operation: Operation,
        range: Range<u64>,
        change: impl FnOnce(Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(fault) = self.strike(operation) else { return change(range) };
        let half = (range.start.midpoint(range.end) / 512 * 512).max(range.start);
        if fault.short && half > range.start {
            change(range.start..half)?;
        }
        Err(io::Error::from_raw_os_error(fault.errno))
    }
}

impl Storage for FailingStorage {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.change(Operation::Read, || self.inner.read_at(buf, offset))
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let range = offset..offset.saturating_add(data.len() as u64);
        self.ranged(Operation::Write, range, |part| {
            self.inner.write_at(&data[..(part.end - part.start) as usize], offset)
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.change(Operation::Sync, || self.inner.sync())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Operation::SetLen, || self.inner.set_len(len))
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.ranged(Operation::Punch, range, |part| self.inner.punch_hole(part))
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.ranged(Operation::Zero, range, |part| self.inner.zero_range(part))
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.change(Operation::Allocate, || self.inner.allocate(range))
    }

    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.inner.seek_data(offset)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.inner.allocated()
    }
}

#[cfg(test)]
mod tests {
    use super::super::MemoryStorage;
    use super::*;

    fn failing(after: u64, lasting: bool, short: bool) -> FailingStorage {
        let storage = FailingStorage::new(Arc::new(MemoryStorage::new(vec![0; 4096])));
        let on = vec![Operation::Write];
        storage.arm(Fault { on, after, lasting, errno: libc::ENOSPC, short });
        storage
    }

    fn errno(result: io::Result<()>) -> Option<i32> {
        result.err().and_then(|e| e.raw_os_error())
    }

    #[test]
    fn the_chosen_operation_fails_once() {
        let storage = failing(1, false, false);
        assert_eq!(errno(storage.write_at(&[1], 0)), None);
        assert_eq!(errno(storage.sync()), None, "of another kind");
        assert_eq!(errno(storage.write_at(&[2], 0)), Some(libc::ENOSPC));
        assert_eq!(errno(storage.write_at(&[3], 1)), None);
        assert_eq!((storage.seen(), storage.strikes().len()), (3, 1));
    }

    #[test]
    fn a_lasting_fault_lasts_until_it_is_disarmed() {
        let storage = failing(0, true, false);
        assert_eq!(errno(storage.write_at(&[1], 0)), Some(libc::ENOSPC));
        assert_eq!(errno(storage.write_at(&[1], 0)), Some(libc::ENOSPC));
        storage.disarm();
        assert_eq!(errno(storage.write_at(&[1], 0)), None);
    }

    #[test]
    fn a_short_failure_does_half_of_the_work() {
        let storage = failing(0, false, true);
        assert_eq!(errno(storage.write_at(&[1; 2048], 512)), Some(libc::ENOSPC));
        let mut bytes = [0; 4096];
        storage.read_at(&mut bytes, 0).unwrap();
        assert!(bytes[512..1536].iter().all(|&b| b == 1) && bytes[1536..].iter().all(|&b| b == 0));
    }
}
