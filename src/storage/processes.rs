//! A look at other processes, from `/proc`.
//!
//! A process that hangs in the kernel makes whoever looks at it hang too, and one may hang because
//! it waits for an answer of ours. So the look is taken by a thread that may be left behind.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// At most so many searches are under way, those that hang included.
const MAX_SEARCHES: usize = 8;

/// What `search` finds, if it does within `limit`. It goes on for as long as it likes.
pub(crate) fn within<T: Send + 'static>(
    limit: Duration,
    search: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);
    if UNDER_WAY.fetch_add(1, Ordering::Relaxed) >= MAX_SEARCHES {
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
        return None;
    }
    let (answer, answered) = mpsc::channel();
    let run = move || {
        let found = search();
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
        // Nobody may be waiting any more.
        let _ = answer.send(found);
    };
    if thread::Builder::new().name("search".into()).spawn(run).is_err() {
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
        return None;
    }
    answered.recv_timeout(limit).ok()
}

/// The numbers of all processes but this one.
pub(crate) fn others() -> impl Iterator<Item = u32> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| pid != std::process::id())
}

/// The name of a process, or `?`.
pub(crate) fn name(pid: u32) -> String {
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => name.trim_end().to_owned(),
        Err(_) => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_search_that_hangs_keeps_nobody_waiting() {
        let (_hold, released) = mpsc::channel::<()>();
        let started = Instant::now();
        assert_eq!(within(Duration::from_millis(50), move || released.recv().is_ok()), None);
        assert!(started.elapsed() < Duration::from_secs(10));
        assert_eq!(within(Duration::from_secs(10), || 7), Some(7));
    }
}
