//! Who keeps a mount busy, from `/proc` and `/sys`. The mount itself is never touched.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::unmounting;
use crate::storage::processes;

/// How long the search may take.
const SEARCH: Duration = Duration::from_secs(2);
/// How many are named.
const NAMED: usize = 8;

/// Who uses something under `mountpoint`, in one line; empty when nobody is found.
pub(super) fn users(mountpoint: &Path) -> String {
    let mut users = loop_devices(mountpoint);
    users.extend(users_among_processes(mountpoint));
    users.extend(mounts(mountpoint));
    let more = users.len().saturating_sub(NAMED);
    users.truncate(NAMED);
    if more > 0 {
        users.push(format!("{more} more"));
    }
    users.join(", ")
}

/// As far as they are found in time: to look at one may wait for what it waits for, and that may be
/// the mount.
fn users_among_processes(mountpoint: &Path) -> Vec<String> {
    let found = Arc::new(Mutex::new(Vec::new()));
    let (place, finds) = (mountpoint.to_owned(), Arc::clone(&found));
    let deadline = Instant::now() + SEARCH;
    processes::within(SEARCH, move || {
        processes::others()
            .take_while(|_| Instant::now() < deadline)
            .filter(|&pid| uses(pid, &place))
            .for_each(|pid| finds.lock().push(format!("{} (pid {pid})", processes::name(pid))));
    });
    std::mem::take(&mut *found.lock())
}

fn uses(pid: u32, mountpoint: &Path) -> bool {
    // Links are read, never followed: what they lead to may be a mount that does not answer.
    let leads_there =
        |link: &Path| fs::read_link(link).is_ok_and(|target| target.starts_with(mountpoint));
    let process = Path::new("/proc").join(pid.to_string());
    let beneath = |name: &str| fs::read_dir(process.join(name)).into_iter().flatten().flatten();
    ["cwd", "root", "exe"].iter().any(|name| leads_there(&process.join(name)))
        || ["fd", "map_files"]
            .iter()
            .any(|name| beneath(name).any(|link| leads_there(&link.path())))
}

fn loop_devices(mountpoint: &Path) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let backed_here = |device: &fs::DirEntry| {
        fs::read_to_string(device.path().join("loop/backing_file"))
            .is_ok_and(|file| Path::new(file.trim_end()).starts_with(mountpoint))
    };
    let name = |device: fs::DirEntry| format!("/dev/{}", device.file_name().display());
    devices.filter(backed_here).map(name).collect()
}

fn mounts(mountpoint: &Path) -> Vec<String> {
    let places = unmounting::mounts().into_iter().map(|(_, place)| place);
    places
        .filter(|place| place != mountpoint && place.starts_with(mountpoint))
        .map(|place| format!("a mount at {}", place.display()))
        .collect()
}
