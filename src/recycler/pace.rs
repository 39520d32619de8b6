//! How fast clusters are moved: so that nobody notices.
//!
//! While requests come in, a step is followed by a pause of several times its length, so that moving
//! takes a small part of one processor and of the disk; with nobody there, steps follow each other.
//! A rate that the user gave bounds both.

use std::time::{Duration, Instant};

/// While others are at work, one part of the time is for moving and so many are not.
const PAUSE_PER_WORK: u32 = 9;
/// And no step comes sooner after another.
const LEAST_PAUSE: Duration = Duration::from_millis(1);
/// Nor later, however long a step has taken.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Decides when the next step may come.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Bytes a second, where the user wants no more.
    rate: Option<u64>,
    /// Requests that had come in at the end of the last step.
    requests: u64,
    next: Option<Instant>,
}

impl Pace {
    pub(super) fn new(rate: Option<u64>) -> Self {
        Pace { rate, ..Default::default() }
    }

    /// When the next step may come, where that is not now.
    pub(super) fn wait_until(&self, now: Instant) -> Option<Instant> {
        self.next.filter(|next| *next > now)
    }

    /// A step from `started` to `ended` has moved `bytes`; `requests` have come in so far.
    pub(super) fn stepped(&mut self, started: Instant, ended: Instant, bytes: u64, requests: u64) {
        let worked = ended.saturating_duration_since(started);
        let busy = requests != self.requests;
        self.requests = requests;
        let courtesy = match busy {
            true => (worked * PAUSE_PER_WORK).clamp(LEAST_PAUSE, LONGEST_PAUSE),
            false => Duration::ZERO,
        };
        let bound = self.rate.map_or(Duration::ZERO, |rate| {
            Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64).saturating_sub(worked)
        });
        self.next = Some(ended + courtesy.max(bound));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(2);

    #[test]
    fn it_steps_back_for_others_and_only_for_them() {
        let (mut pace, start) = (Pace::new(None), Instant::now());
        pace.stepped(start, start + STEP, 1 << 20, 7);
        assert_eq!(pace.wait_until(start), Some(start + STEP * (1 + PAUSE_PER_WORK)));
        let later = start + Duration::from_secs(1);
        pace.stepped(later, later + STEP, 1 << 20, 7);
        assert_eq!(pace.wait_until(later + STEP), None, "nobody has come since");
    }

    #[test]
    fn a_rate_bounds_it_with_nobody_there() {
        let (mut pace, start) = (Pace::new(Some(1 << 20)), Instant::now());
        pace.stepped(start, start + STEP, 1 << 20, 0);
        assert_eq!(pace.wait_until(start), Some(start + Duration::from_secs(1)));
    }
}
