//! Where the log goes: the terminal in the foreground, a file when one is named, else syslog(3).
//!
//! Names and images of strangers are in what is logged, and strangers decide how often something is
//! refused. So whatever is logged is one line, and what comes again and again is cut short.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};
use parking_lot::Mutex;
use simplelog::{ColorChoice, ConfigBuilder, TermLogger, TerminalMode, WriteLogger};

/// The level of `-v` and `-q`, each counted: warnings and worse without them, `-v` tells of what is
/// done, `-vv` of what it comes to, `-vvv` of each request, where it does not go to syslog.
pub(super) fn level(verbose: u8, quiet: u8) -> LevelFilter {
    match i16::from(verbose) - i16::from(quiet) {
        ..=-2 => LevelFilter::Off,
        -1 => LevelFilter::Error,
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    }
}

/// Logs to stderr.
pub(super) fn to_terminal(level: LevelFilter) {
    let (mode, colours) = (TerminalMode::Stderr, ColorChoice::Auto);
    install(level, *TermLogger::new(level, config(level), mode, colours));
}

/// Logs to the end of a file.
///
/// # Errors
/// Those of opening the file.
pub(super) fn to_file(level: LevelFilter, path: &Path) -> std::io::Result<()> {
    let file = File::options().create(true).append(true).open(path)?;
    install(level, *WriteLogger::new(level, config(level), file));
    Ok(())
}

/// Logs to syslog, over a connection that is made now: a confined process makes none any more. Where
/// nobody listens by then, nothing is logged.
pub(super) fn to_syslog(level: LevelFilter) {
    let how = libc::LOG_PID | libc::LOG_NDELAY;
    // SAFETY: the name is static and ends in NUL; openlog keeps the pointer.
    unsafe { libc::openlog(c"qcow2fs".as_ptr(), how, libc::LOG_DAEMON) };
    install(level, Syslog);
}

fn install(level: LevelFilter, to: impl Log + 'static) {
    // A second logger is refused; the first one goes on.
    if log::set_boxed_logger(Box::new(Guarded::new(to))).is_ok() {
        log::set_max_level(level);
    }
}

/// So many lines of one kind, which is a place in the code, are logged within [`PERIOD`].
const MOST: u64 = 60;
const PERIOD: Duration = Duration::from_secs(60);

/// A log in which each record is a line, and none are too many. What was asked for with `-vv` is all
/// there.
struct Guarded<L> {
    to: L,
    kinds: Mutex<HashMap<Kind, Lately>>,
}

/// The place in the code that logs it.
type Kind = (Option<&'static str>, Option<u32>);

/// What was logged of a kind within the last [`PERIOD`].
struct Lately {
    since: Instant,
    count: u64,
    /// The first one that was left out, with its level and target.
    left_out: Option<(Level, String, String)>,
}

impl<L: Log> Guarded<L> {
    fn new(to: L) -> Self {
        Guarded { to, kinds: Mutex::default() }
    }

    /// Whether a record may be logged at that time.
    fn takes(&self, record: &Record<'_>, now: Instant) -> bool {
        if record.level() > Level::Info {
            return true;
        }
        let mut kinds = self.kinds.lock();
        let lately = kinds.entry((record.file_static(), record.line())).or_insert(Lately {
            since: now,
            count: 0,
            left_out: None,
        });
        lately.count += 1;
        if lately.count > MOST && lately.left_out.is_none() {
            let (target, text) = (record.target().to_owned(), record.args().to_string());
            lately.left_out = Some((record.level(), target, text));
        }
        lately.count <= MOST
    }

    /// Tells what was left out until `now`, and forgets what is longer ago than `period`.
    fn tell_left_out(&self, now: Instant, period: Duration) {
        let is_over = |lately: &Lately| now.duration_since(lately.since) >= period;
        let over: Vec<Lately> =
            self.kinds.lock().extract_if(|_, lately| is_over(lately)).map(|(_, of)| of).collect();
        for Lately { count, left_out, .. } in over {
            let Some((level, target, text)) = left_out else { continue };
            let metadata = Metadata::builder().level(level).target(&target).build();
            let count = count - MOST;
            let text = format!("{count} more lines were left out, such as: {text}");
            self.write(&Record::builder().metadata(metadata).build(), &text);
        }
    }

    /// Writes a record like that with another text.
    fn write(&self, like: &Record<'_>, text: &str) {
        let (line, mut record) = (in_one_line(text), Record::builder());
        record.metadata(like.metadata().clone()).module_path(like.module_path());
        record.file(like.file()).line(like.line());
        self.to.log(&record.args(format_args!("{line}")).build());
    }

    fn log_at(&self, record: &Record<'_>, now: Instant) {
        self.tell_left_out(now, PERIOD);
        if self.to.enabled(record.metadata()) && self.takes(record, now) {
            self.write(record, &record.args().to_string());
        }
    }
}

impl<L: Log> Log for Guarded<L> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.to.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        self.log_at(record, Instant::now());
    }

    fn flush(&self) {
        self.tell_left_out(Instant::now(), Duration::ZERO);
        self.to.flush();
    }
}

/// The text with what would end the line, or what a terminal would act on, made visible.
fn in_one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\u{2028}' | '\u{2029}' => line.extend(c.escape_default()),
            c if c.is_control() => line.extend(c.escape_default()),
            c => line.push(c),
        }
    }
    line
}

fn config(level: LevelFilter) -> simplelog::Config {
    let mut config = ConfigBuilder::new();
    // Every request and every answer.
    if level < LevelFilter::Trace {
        config.add_filter_ignore_str("fuser");
    }
    if level < LevelFilter::Debug {
        config.set_target_level(LevelFilter::Off).set_thread_level(LevelFilter::Off);
    }
    config.set_time_format_rfc3339().build()
}

struct Syslog;

impl Log for Syslog {
    fn enabled(&self, metadata: &Metadata) -> bool {
        !metadata.target().starts_with("fuser")
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let priority = match record.level() {
            Level::Error => libc::LOG_ERR,
            Level::Warn => libc::LOG_WARNING,
            Level::Info => libc::LOG_INFO,
            Level::Debug | Level::Trace => libc::LOG_DEBUG,
        };
        let Ok(line) = CString::new(record.args().to_string().replace('\0', " ")) else { return };
        // SAFETY: the format and the line end in NUL, and the format takes just this line.
        unsafe { libc::syslog(priority, c"%s".as_ptr(), line.as_ptr()) };
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps what is logged.
    #[derive(Default)]
    struct Kept(Mutex<Vec<String>>);

    impl Log for Kept {
        fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
            true
        }

        fn log(&self, record: &Record<'_>) {
            self.0.lock().push(format!("{} {}", record.level(), record.args()));
        }

        fn flush(&self) {}
    }

    /// Logs a text from a line of this file.
    fn log(to: &Guarded<Kept>, level: Level, line: u32, text: &str, now: Instant) {
        let mut record = Record::builder();
        record.level(level).file_static(Some(file!())).line(Some(line));
        to.log_at(&record.args(format_args!("{text}")).build(), now);
    }

    #[test]
    fn a_name_makes_no_line_of_its_own_in_the_log() {
        let log_file = Guarded::new(Kept::default());
        let name =
            "a\n2026-01-01T00:00:00Z [ERROR] forged\r\u{1b}[2J\u{85}\u{2028}é\u{3b1}\\.qcow2\0";
        log(&log_file, Level::Warn, 1, name, Instant::now());
        let line = "WARN a\\n2026-01-01T00:00:00Z [ERROR] forged\\r\\u{1b}[2J\\u{85}\\u{2028}éα\\.qcow2\\u{0}";
        assert_eq!(*log_file.to.0.lock(), [line]);
    }

    #[test]
    fn what_is_refused_again_and_again_is_counted_rather_than_logged() {
        let log_file = Guarded::new(Kept::default());
        let lines = || std::mem::take(&mut *log_file.to.0.lock());
        let start = Instant::now();
        for number in 0..2000 {
            log(&log_file, Level::Warn, 1, &format!("refused {number}"), start);
        }
        assert_eq!(lines().len() as u64, MOST);
        // Another kind has its own lines, and what was asked for is all there.
        log(&log_file, Level::Error, 2, "failed", start);
        for _ in 0..MOST + 7 {
            log(&log_file, Level::Debug, 3, "done", start);
        }
        assert_eq!(lines().len() as u64, 1 + MOST + 7);
        log(&log_file, Level::Error, 2, "failed", start + PERIOD);
        let told =
            format!("WARN {} more lines were left out, such as: refused {MOST}", 2000 - MOST);
        assert_eq!(lines(), [told.as_str(), "ERROR failed"]);
        log(&log_file, Level::Warn, 1, "refused", start + PERIOD);
        assert_eq!(lines(), ["WARN refused"]);
        // At the end nothing is kept back.
        for _ in 0..MOST {
            log(&log_file, Level::Warn, 1, "refused", start);
        }
        lines();
        log_file.flush();
        assert_eq!(lines(), ["WARN 1 more lines were left out, such as: refused"]);
    }

    #[test]
    fn flags_make_the_log_longer_and_shorter() {
        assert_eq!(level(0, 0), LevelFilter::Warn);
        assert_eq!(level(2, 0), LevelFilter::Debug);
        assert_eq!(level(0, 9), LevelFilter::Off);
        assert_eq!(level(1, 1), LevelFilter::Warn);
    }
}
