//! Compacting an image that a mount is using: the mount is asked to, and watched.

use std::fs::File;
use std::io::{self, Write};
use std::time::Duration;

use serde_json::Value;

use super::{Done, Size, Stop};
use crate::cli::mounted::Mounted;
use crate::cli::progress::Progress;
use crate::cli::shown;

/// How often the mount is asked how far it is.
const LOOK: Duration = Duration::from_millis(200);

/// What a mount says of an image.
struct Report {
    size: Size,
    moved: u64,
    asked: bool,
    /// Of this pass: bytes moved, and bytes to be moved.
    progress: (u64, u64),
    pinned: Option<String>,
    /// Why it does not come to its end.
    failed: Option<String>,
}

/// Has the mount compact the image.
///
/// # Errors
/// A line for a person.
pub(super) fn compact(
    mount: &Mounted,
    stop: &Stop,
    progress: &mut Progress,
) -> Result<Done, String> {
    let before = report(mount)?;
    // The mount keeps the image open as long as this file is.
    let mut control = open_control(mount)?;
    order(mount, &mut control, "compact")?;
    loop {
        let now = report(mount)?;
        progress.moved(now.progress);
        if let Some(failed) = now.failed {
            return Err(failed);
        }
        let stopped = stop.signal();
        if stopped.is_some() && now.asked {
            order(mount, &mut control, "stop")?;
        }
        if stopped.is_some() || !now.asked {
            let now = report(mount)?;
            return Ok(Done {
                before: before.size,
                after: now.size,
                moved: now.moved - before.moved,
                zeros: None,
                pinned: now.pinned,
                mountpoint: Some(mount.mountpoint().to_owned()),
                stopped,
            });
        }
        std::thread::sleep(LOOK);
    }
}

fn open_control(mount: &Mounted) -> Result<File, String> {
    let place = mount.mountpoint().join(".qcow2fs/control");
    shown::open(&place, File::options().write(true)).map_err(|e| refused(mount, &e))
}

fn order(mount: &Mounted, control: &mut File, verb: &str) -> Result<(), String> {
    let line = format!("{verb} {}\n", mount.name());
    control.write_all(line.as_bytes()).map_err(|e| refused(mount, &e))
}

fn refused(mount: &Mounted, e: &io::Error) -> String {
    let shown = mount.mountpoint().display();
    match e.kind() {
        io::ErrorKind::PermissionDenied => {
            format!("only root and the user that serves the mount at {shown} may have it compacted")
        }
        _ => format!("asking the mount at {shown}: {e}"),
    }
}

fn report(mount: &Mounted) -> Result<Report, String> {
    let image = mount.status()?;
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let compaction = &image["compaction"];
    Ok(Report {
        size: Size {
            length: number(&image["file_length"]),
            allocated: number(&image["allocated"]),
        },
        moved: number(&image["recycled"]["moved"]),
        asked: compaction["asked"] == true,
        progress: (number(&compaction["moved"][0]), number(&compaction["moved"][1])),
        pinned: text(&compaction["pinned"]),
        failed: match image["writable"] == true {
            true => text(&compaction["failed"]),
            // The recycler has stopped.
            false => text(&image["health"]),
        },
    })
}
