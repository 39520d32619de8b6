//! `qcow2fs status`: what a mount says of itself.

use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::size;

/// Show the open images of a mount
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
    } else {
        print!("{}", page(&status));
    }
    0
}

/// What the mount at `mountpoint` says of itself.
///
/// # Errors
/// A line for a person.
pub(super) fn read(mountpoint: &Path) -> Result<Value, String> {
    let shown = mountpoint.display();
    let text = std::fs::read(mountpoint.join(".qcow2fs/status")).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => format!("no qcow2fs is mounted at {shown}"),
        io::ErrorKind::NotConnected => format!("the process that served {shown} is gone"),
        _ => format!("asking {shown} for its status: {e}"),
    })?;
    serde_json::from_slice(&text).map_err(|e| format!("the status of {shown} makes no sense: {e}"))
}

fn page(status: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let access = if status["read_only"] == true { ", read-only" } else { "" };
    let mut page = format!(
        "{} on {}{access}, process {}\n",
        text(&status["source"]),
        text(&status["mountpoint"]),
        status["pid"]
    );
    page += &confinement(&status["confined"]);
    let bytes = |value: &Value| value.as_u64().map_or("?".into(), size::show);
    for image in status["images"].as_array().into_iter().flatten() {
        let access = if image["writable"] == true { "written" } else { "read" };
        page += &format!(
            "{}: {access}, disk {}, file {}, on the host {}, {}\n",
            text(&image["name"]),
            bytes(&image["virtual_size"]),
            bytes(&image["file_length"]),
            bytes(&image["allocated"]),
            image["health"].as_str().or(image["error"].as_str()).unwrap_or("?"),
        );
        page += &recycler(image);
    }
    for error in status["errors"].as_array().into_iter().flatten() {
        page += &format!("last error: {}\n", text(&error["error"]));
    }
    page
}

/// What the process has not given up, in a line; nothing where it has given up all it can.
fn confinement(confined: &Value) -> String {
    let layers = confined.as_object().into_iter().flatten();
    let lacking = layers.filter(|(_, state)| **state != "on");
    let lacking: Vec<_> = lacking
        .map(|(layer, state)| format!("{layer} ({})", state.as_str().unwrap_or("?")))
        .collect();
    match lacking.is_empty() {
        true => String::new(),
        false => format!("not confined by {}\n", lacking.join(", ")),
    }
}

/// What an image's recycler has done and does, in a line; nothing where there is nothing to tell.
pub(super) fn recycler(image: &Value) -> String {
    let number = |value: &Value| value.as_u64().unwrap_or(0);
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
    if parts.is_empty() { String::new() } else { format!("  {}\n", parts.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_names_each_open_image_and_what_went_wrong() {
        let status = serde_json::json!({
            "pid": 7, "source": "/i", "mountpoint": "/m", "read_only": false,
            "images": [{"name": "a/b.raw", "writable": true, "virtual_size": 1073741824,
                        "file_length": 1048576, "allocated": 524288, "health": "ok"}],
            "errors": [{"name": "c.raw", "error": "c.qcow2: is in use"}],
        });
        let wanted = "/i on /m, process 7\n\
            a/b.raw: written, disk 1.0 GiB, file 1.0 MiB, on the host 512.0 KiB, ok\n\
            last error: c.qcow2: is in use\n";
        assert_eq!(page(&status), wanted);
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
    fn a_directory_that_is_no_mount_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).unwrap_err().starts_with("no qcow2fs is mounted at /"));
    }
}
