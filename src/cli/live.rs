//! Commands that show something again and again: on a screen of their own, or as lines where there
//! is no terminal.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use super::terminal::{self, Screen};
use super::{signals, size};

/// How often a signal is looked for.
const LOOK: Duration = Duration::from_millis(50);

/// How often, and how many times.
#[derive(clap::Args)]
pub(super) struct Every {
    /// Seconds from one look to the next [default: 1]
    #[arg(long, value_name = "SECONDS", value_parser = size::parse_seconds)]
    interval: Option<Duration>,
    /// End after so many looks, not only when it is interrupted
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

/// What is shown until a signal comes.
pub(super) struct Live {
    interval: Duration,
    count: Option<u64>,
    signal: Arc<AtomicI32>,
}

impl Live {
    /// Signals are taken from now on.
    ///
    /// # Errors
    /// A line for a person.
    pub(super) fn new(every: &Every, interval: Duration) -> Result<Live, String> {
        let signal = signals::block().note().map_err(|e| format!("starting a thread: {e}"))?;
        Ok(Live { interval: every.interval.unwrap_or(interval), count: every.count, signal })
    }

    /// Shows the lines that `look` makes, which is told whether there is a screen, until a signal
    /// comes or it has been done often enough; the exit code.
    ///
    /// # Errors
    /// Those of `look`, at the first time; later ones are shown.
    pub(super) fn run(
        &self,
        mut look: impl FnMut(bool) -> Result<Vec<String>, String>,
    ) -> Result<i32, String> {
        let first = look(terminal::is_terminal())?;
        let screen = terminal::is_terminal().then(Screen::take);
        let mut lines = Ok(first);
        let mut looks = 1;
        loop {
            let began = Instant::now();
            match &screen {
                Some(screen) => screen.draw(&lines.unwrap_or_else(|line| vec![line])),
                // Nobody is left to read it.
                None if print(&lines?).is_err() => return Ok(0),
                None => {}
            }
            if self.count.is_some_and(|count| looks >= count) {
                return Ok(0);
            }
            if let Some(signal) = self.wait(began) {
                return Ok(128 + signal);
            }
            lines = look(screen.is_some());
            looks += 1;
        }
    }

    /// Waits for the next look; the signal that has come instead.
    fn wait(&self, since: Instant) -> Option<i32> {
        loop {
            let signal = self.signal.load(Ordering::Acquire);
            if signal != 0 {
                return Some(signal);
            }
            let left = self.interval.saturating_sub(since.elapsed());
            if left.is_zero() {
                return None;
            }
            std::thread::sleep(left.min(LOOK));
        }
    }
}

fn print(lines: &[String]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    lines.iter().try_for_each(|line| writeln!(out, "{line}")).and_then(|()| out.flush())
}
