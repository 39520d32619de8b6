//! `qcow2fs status`: what a mount says of itself.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::mountpoint::MountPoint;
use super::watch::Before;
use super::{size, terminal};

/// How long after the first look a second one tells rates.
const SECOND_LOOK: Duration = Duration::from_millis(300);

/// Show the open images of a mount
///
/// Of each: the size of its disk, the length of its file, its space on the host and what of that is
/// live, its health with the reason, how often and how fast it is read and written, how often caches
/// have what is asked for, and what its recycler does. The same is in MOUNTPOINT/.qcow2fs/status as
/// JSON, and in MOUNTPOINT/.qcow2fs/metrics for Prometheus.
///
/// Exit code: 0 done; 1 nothing is mounted there, or it does not answer; 2 arguments that make no
/// sense.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  qcow2fs status /mnt/raw
  qcow2fs status --json /mnt/raw")]
pub(super) struct Args {
    /// Where it is mounted
    mountpoint: PathBuf,
    /// Print what the mount says as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command; returns the exit code.
pub(super) fn run(args: &Args) -> i32 {
    let status = match read(&args.mountpoint) {
        Ok(status) => status,
        Err(line) => {
            eprintln!("qcow2fs: {line}");
            return 1;
        }
    };
    if args.json {
        println!("{status:#}");
        return 0;
    }
    let rates = if is_recycling(&status) { rates(&args.mountpoint, &status) } else { vec![] };
    print!("{}", page(&status, &rates, terminal::has_colours()));
    0
}

/// Whether some image's recycler has work under way.
fn is_recycling(status: &Value) -> bool {
    images(status).any(|image| {
        let waiting = ["junk", "released"].map(|state| number(&image["clusters"][state]));
        image["compaction"]["running"] == true || waiting.iter().any(|count| *count > 0)
    })
}

/// What the recycler of each image does in a second, by a second look.
fn rates(mountpoint: &Path, status: &Value) -> Vec<String> {
    let before = Before::of(status);
    std::thread::sleep(SECOND_LOOK);
    // A mount that is gone by now has no rates.
    let now = read(mountpoint).unwrap_or_default();
    images(status)
        .map(|image| {
            let later = images(&now).find(|later| later["name"] == image["name"]);
            let rate = |what| later.map_or(0, |later| before.rate(later, what));
            match (rate("punched"), rate("moved")) {
                (0, 0) => String::new(),
                (punched, moved) => format!(
                    "  recycling now: {}/s punched, {}/s moved\n",
                    size::show(punched),
                    size::show(moved)
                ),
            }
        })
        .collect()
}

fn images(status: &Value) -> impl Iterator<Item = &Value> {
    status["images"].as_array().into_iter().flatten()
}

/// What the mount at `mountpoint` says of itself, whoever has made it.
///
/// # Errors
/// A line for a person.
pub(super) fn read(mountpoint: &Path) -> Result<Value, String> {
    read_from(mountpoint, MountPoint::of_anybody(mountpoint))
}

/// The same of a mount that root or who runs this has made.
///
/// # Errors
/// A line for a person, also where it is somebody else's.
pub(super) fn read_ours(mountpoint: &Path) -> Result<Value, String> {
    read_from(mountpoint, MountPoint::of_ours(mountpoint))
}

fn read_from(mountpoint: &Path, mount: io::Result<MountPoint>) -> Result<Value, String> {
    let shown = mountpoint.display();
    let read = |mount: MountPoint| {
        let mut text = Vec::new();
        let mut file = mount.open(".qcow2fs/status".as_ref(), File::options().read(true))?;
        file.read_to_end(&mut text).map(|_| text)
    };
    let text = mount.and_then(read).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => format!("no qcow2fs is mounted at {shown}"),
        io::ErrorKind::NotConnected => format!(
            "the process that served {shown} is gone: `qcow2fs umount {shown}` removes the mount"
        ),
        io::ErrorKind::PermissionDenied => format!(
            "{shown} is another user's mount: ask as that user, or mount with -o allow_other"
        ),
        _ => format!("asking {shown} for its status: {e}"),
    })?;
    serde_json::from_slice(&text).map_err(|e| format!("the status of {shown} makes no sense: {e}"))
}

/// The whole page; `rates` has a line or nothing for each image.
fn page(status: &Value, rates: &[String], colours: bool) -> String {
    let mut page = headline(status) + "\n" + &confinement(&status["confined"]);
    if status["io_flusher"] == false {
        page += "without CAP_SYS_RESOURCE, so loop devices on it may hang when memory is short\n";
    }
    let no_rates = std::iter::repeat_with(|| "");
    let rates = rates.iter().map(String::as_str).chain(no_rates);
    for (image, rate) in images(status).zip(rates) {
        page += &sizes(image, colours);
        page += &requests(image);
        page += &recycler(image);
        page += rate;
    }
    if let Some(failed @ 1..) = status["close_errors"].as_u64() {
        page += &format!(
            "closing images has failed ({failed} times): the log names them, \
             run `qcow2fs check` on each\n"
        );
    }
    for error in status["errors"].as_array().into_iter().flatten() {
        page += &format!("last error: {}\n", text(&error["error"]));
    }
    page
}

/// Whether the process is confined, and by what not, in a line.
fn confinement(confined: &Value) -> String {
    let layers = confined.as_object().into_iter().flatten();
    let lacking = layers.filter(|(_, state)| **state != "on");
    let lacking: Vec<_> = lacking
        .map(|(layer, state)| format!("{layer} ({})", state.as_str().unwrap_or("?")))
        .collect();
    match (confined.is_object(), lacking.is_empty()) {
        (false, _) => "not confined\n".into(),
        (true, true) => "confined\n".into(),
        (true, false) => format!("not confined by {}\n", lacking.join(", ")),
    }
}

fn text(value: &Value) -> String {
    terminal::plain(value.as_str().unwrap_or("?"))
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// What is mounted where, by whom.
pub(super) fn headline(status: &Value) -> String {
    format!(
        "{} on {}{}, process {}",
        text(&status["source"]),
        text(&status["mountpoint"]),
        if status["read_only"] == true { ", read-only" } else { "" },
        status["pid"]
    )
}

/// How an image is: a word, and the reason where it is not well.
pub(super) fn condition(image: &Value) -> String {
    let known = |key: &str| image[key].as_str().is_some();
    match image["health"].as_str() {
        Some("ok") if known("condition") => text(&image["condition"]),
        Some(_) if known("condition") => {
            format!("{}: {}", text(&image["condition"]), text(&image["health"]))
        }
        _ => text(&image["error"]),
    }
}

/// The same as it is shown.
pub(super) fn coloured_condition(image: &Value, colours: bool) -> String {
    let condition = condition(image);
    let is_well = matches!(condition.as_str(), "ok" | "recovering");
    let colour = if is_well { terminal::GREEN } else { terminal::RED };
    terminal::coloured(&condition, colour, colours)
}

fn sizes(image: &Value, colours: bool) -> String {
    if image["error"].is_string() {
        return format!("{}: {}\n", text(&image["name"]), coloured_condition(image, colours));
    }
    let bytes = |key: &str| image[key].as_u64().map_or("?".into(), size::show);
    let access = if image["writable"] == true { "written" } else { "read" };
    let live = match image["live"].as_u64() {
        Some(live) => format!(", live {}", size::show(live)),
        None => String::new(),
    };
    format!(
        "{}: {access}, disk {}, file {}, on the host {}{live}, {}\n",
        text(&image["name"]),
        bytes("virtual_size"),
        bytes("file_length"),
        bytes("allocated"),
        coloured_condition(image, colours),
    )
}

/// The requests for an image in a line each; nothing where there were none.
fn requests(image: &Value) -> String {
    let mut page = String::new();
    for kind in ["read", "write", "discard", "flush"] {
        let counts = &image["io"][kind];
        if number(&counts["count"]) == 0 {
            continue;
        }
        page += &format!("  {kind}: {} requests", counts["count"]);
        if number(&counts["bytes"]) > 0 {
            page += &format!(", {}", size::show(number(&counts["bytes"])));
        }
        if number(&counts["errors"]) > 0 {
            page += &format!(", {} failed", counts["errors"]);
        }
        page += &format!(", {}\n", latency(counts));
    }
    match caches(image) {
        caches if caches.is_empty() => page,
        caches => page + &format!("  {caches}\n"),
    }
}

/// What half of an operation's requests took at most, and what 99 of 100 did.
pub(super) fn latency(counts: &Value) -> String {
    match number(&counts["median"]) {
        0 => String::new(),
        median => format!(
            "half within {}, 99 % within {}",
            time(median),
            time(number(&counts["percentile_99"]))
        ),
    }
}

/// How often caches had what was asked for, as far as anything was.
pub(super) fn caches(image: &Value) -> String {
    let rate = |(name, key): (&str, &str)| {
        let (hits, misses) = (number(&image[key]["hits"]), number(&image[key]["misses"]));
        let all = hits.saturating_add(misses);
        let percent = hits as f64 * 100.0 / all as f64;
        (all > 0).then(|| format!("{name} cached {percent:.1} %"))
    };
    let rates = [("tables", "table_cache"), ("inflated clusters", "inflated_cache")];
    rates.into_iter().filter_map(rate).collect::<Vec<_>>().join(", ")
}

/// Nanoseconds in the unit that fits.
fn time(nanoseconds: u64) -> String {
    let value = nanoseconds as f64;
    match nanoseconds {
        0..1_000_000 => format!("{:.0} us", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.0} ms", value / 1e6),
        _ => format!("{:.1} s", value / 1e9),
    }
}

/// What an image's recycler has done and does, in a line; nothing where there is nothing to tell.
pub(super) fn recycler(image: &Value) -> String {
    let (done, clusters) = (&image["recycled"], &image["clusters"]);
    let compaction = &image["compaction"];
    let mut parts = Vec::new();
    for (what, key) in
        [("punched", "punched"), ("freed", "freed"), ("moved", "moved"), ("cut off", "cut")]
    {
        if number(&done[key]) > 0 {
            parts.push(format!("{} {what}", size::show(number(&done[key]))));
        }
    }
    let states = ["junk", "released", "erased", "available"];
    for state in states.iter().filter(|state| number(&clusters[**state]) > 0) {
        parts.push(format!("{} clusters {state}", number(&clusters[*state])));
    }
    if image["searching_leaks"] == true {
        parts.push("looking for leaked clusters".into());
    }
    if compaction["running"] == true {
        let (moved, all) = (number(&compaction["moved"][0]), number(&compaction["moved"][1]));
        parts.push(format!("compacting: {} of {} moved", size::show(moved), size::show(all)));
    } else if compaction["asked"] == true {
        parts.push("compacts when it is quiet".into());
    }
    for (what, key) in [("gets no shorter", "pinned"), ("compaction failed", "failed")] {
        if let Some(why) = compaction[key].as_str() {
            parts.push(format!("{what}: {why}"));
        }
    }
    if parts.is_empty() {
        String::new()
    } else {
        format!("  {}\n", terminal::plain(&parts.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_names_each_open_image_and_what_went_wrong() {
        let status = serde_json::json!({
            "pid": 7, "source": "/i", "mountpoint": "/m", "read_only": false,
            "confined": {"landlock": "on", "seccomp": "switched off"},
            "images": [{"name": "a/b.raw", "writable": true, "virtual_size": 1073741824,
                        "file_length": 1048576, "allocated": 524288,
                        "condition": "ok", "health": "ok"},
                       {"name": "d.raw", "writable": true, "virtual_size": 512,
                        "file_length": 512, "allocated": 512,
                        "condition": "read-only", "health": "syncing the image: I/O error"},
                       {"name": "e.raw", "error": "it is being opened or closed"}],
            "close_errors": 2,
            "errors": [{"name": "c.raw", "error": "c.qcow2: is in use"}],
        });
        let wanted = "/i on /m, process 7\n\
            not confined by seccomp (switched off)\n\
            a/b.raw: written, disk 1.0 GiB, file 1.0 MiB, on the host 512.0 KiB, ok\n\
            d.raw: written, disk 512 B, file 512 B, on the host 512 B, \
            read-only: syncing the image: I/O error\n\
            e.raw: it is being opened or closed\n\
            closing images has failed (2 times): the log names them, run `qcow2fs check` on each\n\
            last error: c.qcow2: is in use\n";
        assert_eq!(page(&status, &[], false), wanted);
    }

    #[test]
    fn the_page_tells_what_the_recycler_does() {
        let image = serde_json::json!({
            "clusters": {"junk": 3, "released": 0, "erased": 0, "available": 16, "rooted": 0},
            "recycled": {"punched": 1048576, "freed": 65536, "cut": 0, "moved": 4096},
            "compaction": {"running": true, "asked": true, "moved": [4096, 8192], "end": 7},
            "searching_leaks": false,
        });
        let wanted = "  1.0 MiB punched, 64.0 KiB freed, 4.0 KiB moved, 3 clusters junk, \
            16 clusters available, compacting: 4.0 KiB of 8.0 KiB moved\n";
        assert_eq!(recycler(&image), wanted);
        assert_eq!(recycler(&serde_json::json!({"name": "a.raw"})), "");
    }

    #[test]
    fn the_page_tells_of_requests_and_how_long_they_took() {
        let image = serde_json::json!({
            "io": {
                "read": {"count": 3, "bytes": 12288, "errors": 1, "median": 2048,
                         "percentile_99": 33554432},
                "flush": {"count": 0},
            },
            "table_cache": {"hits": 999, "misses": 1},
            "inflated_cache": {"hits": 0, "misses": 0},
        });
        let wanted = "  read: 3 requests, 12.0 KiB, 1 failed, half within 2 us, 99 % within 34 ms\n\
            \x20 tables cached 99.9 %\n";
        assert_eq!(requests(&image), wanted);
        assert_eq!(requests(&serde_json::json!({})), "");
        assert_eq!([time(1024), time(8 << 30)], ["1 us", "8.6 s"]);
    }

    #[test]
    fn a_directory_that_is_no_mount_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).unwrap_err().starts_with("no qcow2fs is mounted at /"));
    }
}
