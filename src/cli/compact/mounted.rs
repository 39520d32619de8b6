//! Compacting an image that a mount is using: the mount is asked to, and watched.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::progress::Progress;
use super::{Done, Size, Stop};
use crate::cli::{status, unmounting};

/// How often the mount is asked how far it is.
const LOOK: Duration = Duration::from_millis(200);

/// An image in use by a mount.
pub(super) struct Mounted {
    mountpoint: PathBuf,
    /// Its name beneath the mount point.
    name: String,
}

/// What a mount says of an image.
struct Report {
    size: Size,
    moved: u64,
    asked: bool,
    /// Of this pass: bytes moved, and bytes to be moved.
    progress: (u64, u64),
    pinned: Option<String>,
    failed: Option<String>,
}

impl Mounted {
    /// The mount that has the image at `path` open.
    pub(super) fn find(path: &Path) -> Option<Mounted> {
        let path = path.canonicalize().ok()?;
        unmounting::mounts_of("fuse.qcow2fs").into_iter().find_map(|(source, mountpoint)| {
            // Others are not asked: they may not answer.
            if !path.starts_with(source) {
                return None;
            }
            let status = status::read(&mountpoint).ok()?;
            let beneath = path.strip_prefix(status["source"].as_str()?).ok()?;
            let name = beneath.to_str()?.strip_suffix(".qcow2")?.to_owned() + ".raw";
            report(&status, &name).map(|_| Mounted { mountpoint, name })
        })
    }

    /// Where it is mounted.
    pub(super) fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Has the mount compact the image.
    ///
    /// # Errors
    /// A line for a person.
    pub(super) fn compact(&self, stop: &Stop, progress: &mut Progress) -> Result<Done, String> {
        let before = self.report()?;
        // The mount keeps the image open as long as this file is.
        let mut control = self.open_control()?;
        self.order(&mut control, "compact")?;
        loop {
            let now = self.report()?;
            progress.moved(now.progress);
            if let Some(failed) = now.failed {
                return Err(failed);
            }
            let stopped = stop.signal();
            if stopped.is_some() && now.asked {
                self.order(&mut control, "stop")?;
            }
            if stopped.is_some() || !now.asked {
                let now = self.report()?;
                return Ok(Done {
                    before: before.size,
                    after: now.size,
                    moved: now.moved - before.moved,
                    zeros: None,
                    pinned: now.pinned,
                    mountpoint: Some(self.mountpoint.clone()),
                    stopped,
                });
            }
            std::thread::sleep(LOOK);
        }
    }

    fn report(&self) -> Result<Report, String> {
        let status = status::read(&self.mountpoint)?;
        report(&status, &self.name).ok_or_else(|| {
            let place = self.mountpoint.join(&self.name);
            format!("{} was closed before it was done", place.display())
        })
    }

    fn open_control(&self) -> Result<File, String> {
        let place = self.mountpoint.join(".qcow2fs/control");
        File::options().write(true).open(&place).map_err(|e| self.refused(&e))
    }

    fn order(&self, control: &mut File, verb: &str) -> Result<(), String> {
        let line = format!("{verb} {}\n", self.name);
        control.write_all(line.as_bytes()).map_err(|e| self.refused(&e))
    }

    fn refused(&self, e: &io::Error) -> String {
        format!("asking the mount at {}: {e}", self.mountpoint.display())
    }
}

fn report(status: &Value, name: &str) -> Option<Report> {
    let image = status["images"].as_array()?.iter().find(|image| image["name"] == name)?;
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let compaction = &image["compaction"];
    Some(Report {
        size: Size {
            length: number(&image["file_length"]),
            allocated: number(&image["allocated"]),
        },
        moved: number(&image["recycled"]["moved"]),
        asked: compaction["asked"] == true,
        progress: (number(&compaction["moved"][0]), number(&compaction["moved"][1])),
        pinned: text(&compaction["pinned"]),
        failed: text(&compaction["failed"]),
    })
}
