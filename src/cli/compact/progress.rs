//! How far it is: a bar on a terminal, now and then a line elsewhere, nothing where JSON is wanted.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::size;

/// How often a line is printed where there is no terminal.
const LINE: Duration = Duration::from_secs(10);

/// What tells of one image's progress.
pub(super) struct Progress {
    name: String,
    bar: Option<ProgressBar>,
    /// When a line was last printed; `None` where none is wanted.
    last_line: Option<Instant>,
    /// Bytes moved by earlier passes.
    before: u64,
    /// By this one.
    now: u64,
}

impl Progress {
    pub(super) fn new(name: String, json: bool) -> Self {
        let bar = std::io::stderr().is_terminal().then(ProgressBar::no_length);
        let last_line = (bar.is_none() && !json).then(Instant::now);
        let progress = Progress { name, bar, last_line, before: 0, now: 0 };
        progress.begin("starting");
        progress
    }

    /// Something begins of which nobody knows how long it takes, or something else to count.
    pub(super) fn begin(&self, what: &'static str) {
        let Some(bar) = &self.bar else { return };
        // Without length it is a spinner. A template that does not parse is a plain bar.
        let template = "{spinner} {prefix}: {msg} {bytes}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.reset();
        bar.set_prefix(self.name.clone());
        bar.set_message(what);
        bar.enable_steady_tick(Duration::from_millis(200));
    }

    /// The pass has moved so many bytes of so many.
    pub(super) fn moved(&mut self, (moved, all): (u64, u64)) {
        if moved < self.now {
            // Another pass.
            self.before += self.now;
        }
        let begins = self.before + self.now == 0 && moved > 0;
        self.now = moved;
        let moved = self.before + moved;
        let all = (self.before + all).max(moved);
        self.show("moving", moved, all, begins);
    }

    /// So many bytes of the disk, of so many, were looked at.
    pub(super) fn looked_at(&mut self, at: u64, all: u64) {
        self.show("looked at", at, all, false);
    }

    fn show(&mut self, what: &'static str, done: u64, all: u64, begins: bool) {
        if let Some(bar) = &self.bar {
            if bar.length() != Some(all) || begins {
                let template =
                    "{prefix}: {msg} [{bar:30}] {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
                if let Ok(style) = ProgressStyle::with_template(template) {
                    bar.set_style(style.progress_chars("=> "));
                }
                if begins {
                    bar.reset();
                }
                bar.set_message(what);
                bar.set_length(all);
            }
            bar.set_position(done);
        }
        if let Some(last) = &mut self.last_line
            && last.elapsed() >= LINE
        {
            *last = Instant::now();
            eprintln!("{}: {what}: {} of {}", self.name, size::show(done), size::show(all));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
