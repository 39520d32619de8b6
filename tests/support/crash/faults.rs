//! A host that fails now and then in the midst of a history, which goes on.

use std::sync::Arc;

use parking_lot::Mutex;
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::{FailingStorage, Fault, Operation, RecordingStorage};
use qcow2fs::{Error, ErrorKind};

use crate::support::rng::Rng;

const ERRNOS: [i32; 4] = [libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::EINTR];

/// The files of a history, and what makes their operations fail.
pub struct Faults {
    file: Arc<FailingStorage>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The fault that is to come, or goes on.
    armed: Option<Fault>,
    /// How many operations had failed when it was armed.
    struck_before: usize,
    /// The errors of all faults so far.
    errnos: Vec<i32>,
}

impl Faults {
    /// Nothing fails yet.
    pub fn new(image: Arc<RecordingStorage>) -> Self {
        Faults { file: Arc::new(FailingStorage::new(image)), state: Mutex::default() }
    }

    /// The image file, as the host shows it.
    pub fn file(&self) -> Arc<dyn Storage> {
        self.file.clone()
    }

    /// A file that fails together with it.
    pub fn beside(&self, data: Arc<RecordingStorage>) -> Arc<dyn Storage> {
        Arc::new(self.file.beside(data))
    }

    /// How many operations have failed.
    pub fn struck(&self) -> u64 {
        self.file.strikes().len() as u64
    }

    /// Between two actions: there may be a fault some time from now on, and one that lasts may be
    /// over.
    pub fn go_on(&self, rng: &mut Rng) {
        let mut state = self.state.lock();
        let struck = self.file.strikes().len();
        match &state.armed {
            None if rng.one_in(4) => {
                let fault = any_fault(rng);
                state.errnos.push(fault.errno);
                self.file.arm(fault.clone());
                (state.armed, state.struck_before) = (Some(fault), struck);
            }
            Some(fault) if struck > state.struck_before && (!fault.lasting || rng.one_in(6)) => {
                self.file.disarm();
                state.armed = None;
            }
            None | Some(_) => {}
        }
    }

    /// Lets nothing fail during `act`; what was to come is counted anew.
    pub fn pause<R>(&self, act: impl FnOnce() -> R) -> R {
        self.file.disarm();
        let result = act();
        if let Some(fault) = &self.state.lock().armed {
            self.file.arm(fault.clone());
        }
        result
    }

    /// Nothing fails from now on.
    pub fn end(&self) {
        self.file.disarm();
    }

    /// What a fault explains is no error: its own errno, and once it has `latched` the image that
    /// this is read-only, or that a sync has failed.
    pub fn excuse(&self, error: Error, latched: bool) -> qcow2fs::Result<()> {
        let is_its_own = self.state.lock().errnos.contains(&error.errno());
        let is_latch = latched && matches!(error.errno(), libc::EROFS | libc::EIO);
        let excused = self.struck() > 0 && error.kind() != ErrorKind::Corrupt;
        if excused && (is_its_own || is_latch) { Ok(()) } else { Err(error) }
    }
}

fn any_fault(rng: &mut Rng) -> Fault {
    let mut on = Operation::CHANGES.to_vec();
    match rng.within(0..8) {
        // A failed sync ends all writing: mostly something else fails.
        0 => {}
        1 => on = vec![Operation::Sync],
        2 => on.push(Operation::Read),
        3 => on = vec![*rng.pick(&Operation::CHANGES)],
        _ => on.retain(|operation| *operation != Operation::Sync),
    }
    let most = *rng.pick(&[10, 60, 300]);
    let (after, lasting) = (rng.within(0..most), rng.one_in(3));
    Fault { on, after, lasting, errno: *rng.pick(&ERRNOS), short: rng.one_in(2) }
}
