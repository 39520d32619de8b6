//! Where the log goes: the terminal in the foreground, a file when one is named, else syslog(3).

use std::ffi::CString;
use std::fs::File;
use std::path::Path;

use log::{Level, LevelFilter, Log, Metadata, Record};
use simplelog::{ColorChoice, ConfigBuilder, TermLogger, TerminalMode, WriteLogger};

/// The level of `-v` and `-q`, each counted: warnings and worse without them, `-v` tells of what is
/// done, `-vv` of what it comes to, `-vvv` of each request.
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
    // A second logger is refused; the first one goes on.
    let _ = TermLogger::init(level, config(level), TerminalMode::Stderr, ColorChoice::Auto);
}

/// Logs to the end of a file.
///
/// # Errors
/// Those of opening the file.
pub(super) fn to_file(level: LevelFilter, path: &Path) -> std::io::Result<()> {
    let file = File::options().create(true).append(true).open(path)?;
    let _ = WriteLogger::init(level, config(level), file);
    Ok(())
}

/// Logs to syslog, over a connection that is made now: a confined process makes none any more.
pub(super) fn to_syslog(level: LevelFilter) {
    let how = libc::LOG_PID | libc::LOG_NDELAY;
    // SAFETY: the name is static and ends in NUL; openlog keeps the pointer.
    unsafe { libc::openlog(c"qcow2fs".as_ptr(), how, libc::LOG_DAEMON) };
    if log::set_logger(&Syslog).is_ok() {
        log::set_max_level(level);
    }
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

    #[test]
    fn flags_make_the_log_longer_and_shorter() {
        assert_eq!(level(0, 0), LevelFilter::Warn);
        assert_eq!(level(2, 0), LevelFilter::Debug);
        assert_eq!(level(0, 9), LevelFilter::Off);
        assert_eq!(level(1, 1), LevelFilter::Warn);
    }
}
