//! `qcow2fs status`: what a mount says of itself.

use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::size;

/// Show the open images of a mount
#[derive(clap::Args)]
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
    }
    for error in status["errors"].as_array().into_iter().flatten() {
        page += &format!("last error: {}\n", text(&error["error"]));
    }
    page
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
    fn a_directory_that_is_no_mount_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).unwrap_err().starts_with("no qcow2fs is mounted at /"));
    }
}
