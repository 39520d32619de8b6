//! How far it is: a bar on a terminal, now and then a line elsewhere, nothing where JSON is wanted.

use std::cell::RefCell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::size;
use crate::check;

/// How often what is told often is shown.
const REDRAW: Duration = Duration::from_millis(200);
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
        bar.set_prefix(self.name.clone());
        bar.set_message(what);
        // Without length it is a spinner.
        style(bar, "{spinner} {prefix}: {msg} {bytes}");
        bar.reset();
        bar.enable_steady_tick(Duration::from_millis(200));
    }

    /// `what` has done so many of so many, whatever it counts.
    pub(super) fn counted(&mut self, what: &'static str, done: u64, all: u64) {
        if let Some(bar) = &self.bar {
            if bar.length() != Some(all) || bar.message() != what {
                bar.set_message(what);
                bar.set_length(all);
                style(bar, "{prefix}: {msg} [{bar:30}] {percent} %, {eta} left");
                bar.reset();
            }
            bar.set_position(done);
        }
        self.line(|name| format!("{name}: {what}: {} %", done * 100 / all.max(1)));
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

    /// `what` has been done to so many bytes of so many.
    pub(super) fn written(&mut self, what: &'static str, done: u64, all: u64) {
        self.show(what, done, all, false);
    }

    fn show(&mut self, what: &'static str, done: u64, all: u64, begins: bool) {
        if let Some(bar) = &self.bar {
            if bar.length() != Some(all) || begins {
                style(
                    bar,
                    "{prefix}: {msg} [{bar:30}] {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left",
                );
                if begins {
                    bar.reset();
                }
                bar.set_message(what);
                bar.set_length(all);
            }
            bar.set_position(done);
        }
        self.line(|name| format!("{name}: {what}: {} of {}", size::show(done), size::show(all)));
    }

    /// Prints a line where that is due.
    fn line(&mut self, text: impl FnOnce(&str) -> String) {
        if let Some(last) = &mut self.last_line
            && last.elapsed() >= LINE
        {
            *last = Instant::now();
            eprintln!("{}", text(&self.name));
        }
    }
}

/// What a check tells goes to the bar, now and then; nothing of one that is over soon.
pub(super) struct Checking {
    name: String,
    json: bool,
    state: RefCell<State>,
}

struct State {
    /// Made when it is first shown.
    progress: Option<Progress>,
    shown: Instant,
}

impl Checking {
    pub(super) fn new(name: String, json: bool) -> Self {
        let state = State { progress: None, shown: Instant::now() };
        Checking { name, json, state: RefCell::new(state) }
    }
}

impl check::Watch for Checking {
    fn at(&self, step: &'static str, done: u64, all: u64) {
        let state = &mut *self.state.borrow_mut();
        if state.shown.elapsed() >= REDRAW {
            let new = || Progress::new(self.name.clone(), self.json);
            state.progress.get_or_insert_with(new).counted(step, done, all);
            state.shown = Instant::now();
        }
    }
}

/// A template that does not parse leaves the bar as it was.
fn style(bar: &ProgressBar, template: &str) {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
