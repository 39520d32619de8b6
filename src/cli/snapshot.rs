//! `qcow2fs snapshot`: list, take, apply and delete the internal snapshots of one image.
//!
//! An image that a running mount has open is changed by that mount, through its `.snap/`.

use std::ffi::{OsStr, OsString};
use std::ops::{ControlFlow, Range};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use clap::Subcommand;

use super::{shown, size};
use crate::crypt::DataCipher;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Backing, Beside, CompactAfter, Image, Looks, Options, SnapshotInfo, Visit};
use crate::storage::HostFile;
use crate::storage::image_lock::{self, Access};

const EXAMPLES: &str = "Examples:
  qcow2fs snapshot create disk.qcow2 before-upgrade
  qcow2fs snapshot list disk.qcow2
  qcow2fs snapshot apply disk.qcow2 before-upgrade
  qcow2fs snapshot delete disk.qcow2 before-upgrade

Through a mount: `touch MOUNT/.snap/disk.raw/NAME` takes a snapshot, `ls` and `cp` there show what
it holds, `rm` deletes it.";

/// How often a list is read again that changes while it is read.
const ATTEMPTS: u32 = 20;

/// List, take, apply and delete the internal snapshots of an image
///
/// The image may be open in a running mount, which then takes or deletes the snapshot; applying one
/// needs an image that nobody uses. Exit code: 0 done, 1 failed.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// List the snapshots of an image, whoever uses it
    List {
        /// Print JSON, with the names that qemu-img gives
        #[arg(long)]
        json: bool,
        /// The image
        image: PathBuf,
    },
    /// Take a snapshot of the disk as it is now
    Create {
        /// The image
        image: PathBuf,
        /// The name of the new snapshot
        name: OsString,
    },
    /// Make the disk what it was when the snapshot was taken; what it holds now is lost
    Apply {
        /// The image
        image: PathBuf,
        /// The name or the id of the snapshot
        name: OsString,
    },
    /// Delete a snapshot
    Delete {
        /// The image
        image: PathBuf,
        /// The name or the id of the snapshot
        name: OsString,
    },
}

/// Runs the command; returns the exit code.
pub(super) fn run(args: &Args) -> i32 {
    let (image, done) = match &args.action {
        Action::List { json, image } => (image, list(image).and_then(|all| print(&all, *json))),
        Action::Create { image, name } => (image, create(image, name)),
        Action::Apply { image, name } => (image, apply(image, name)),
        Action::Delete { image, name } => (image, delete(image, name)),
    };
    match done {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("qcow2fs snapshot: {}: {e}", image.display());
            1
        }
    }
}

fn create(path: &Path, name: &OsStr) -> Result<()> {
    match offline(path, |image| image.take_snapshot(name.as_bytes()).map(drop)) {
        Err(e) if e.kind() == ErrorKind::InUse => {
            let shown = shown::raw_file_of(path).ok_or(e)?;
            let place = file_in(&shown, name)?;
            let created = shown::within(&place).and_then(|(mount, name)| mount.create(&name));
            created.map_err(|e| Error::io(format!("creating {}", place.display()), e))
        }
        done => done,
    }
}

fn delete(path: &Path, which: &OsStr) -> Result<()> {
    match offline(path, |image| image.delete_snapshot(which.as_bytes())) {
        Err(e) if e.kind() == ErrorKind::InUse => {
            let shown = shown::raw_file_of(path).ok_or(e)?;
            let all = list(path)?;
            let (name, bytes) = (which.to_string_lossy(), which.as_bytes());
            let found = all.iter().find(|info| info.name == name);
            let found = found.or_else(|| all.iter().find(|info| info.id.as_bytes() == bytes));
            let info = found.ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("there is no snapshot {name}"))
            })?;
            let place = file_in(&shown, OsStr::new(&info.name))
                .or_else(|_| file_in(&shown, OsStr::new(&info.id)))?;
            let removed = shown::within(&place).and_then(|(mount, name)| mount.remove(&name));
            removed.map_err(|e| Error::io(format!("removing {}", place.display()), e))
        }
        done => done,
    }
}

fn apply(path: &Path, which: &OsStr) -> Result<()> {
    match offline(path, |image| image.apply_snapshot(which.as_bytes())) {
        Err(e) if e.kind() == ErrorKind::InUse => Err(match shown::raw_file_of(path) {
            Some(shown) => e.context(format!(
                "its file {} is open: close it and detach its loop devices first",
                shown.display()
            )),
            None => e,
        }),
        done => done,
    }
}

/// Runs `change` on the image while nobody else may use it.
fn offline(path: &Path, change: impl FnOnce(&Image) -> Result<()>) -> Result<()> {
    let file = super::check::open(path, true)?;
    image_lock::acquire(&file, None, Access::Write)?;
    let file = Arc::new(HostFile::new(file));
    let summary = Image::summarize(&*file)?;
    let beside = Beside {
        backing: summary.backing.map(|_| Arc::new(Unread) as Arc<dyn Backing>),
        // No data is read or written for that either.
        cipher: summary.encryption.map(|_| Arc::new(DataCipher::without_key())),
        data: None,
    };
    let compact_after = CompactAfter::Off;
    let options = Options { writable: true, keep_erased: 0, compact_after, ..Options::default() };
    let image = Image::open_with(file, &options, beside)?;
    let done = change(&image);
    done.and(image.close())
}

/// The backing file of an image whose snapshots are changed: nothing of it is needed for that.
struct Unread;

impl Backing for Unread {
    fn size(&self) -> u64 {
        0
    }

    fn read(&self, _offset: u64, _buf: &mut [u8]) -> Result<()> {
        Err(Error::invalid("the backing file is not open"))
    }

    fn each_extent(
        &self,
        _range: Range<u64>,
        _looks: &mut Looks,
        _visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>> {
        Ok(ControlFlow::Continue(()))
    }
}

/// The snapshots of an image that others may change meanwhile.
pub(super) fn list(path: &Path) -> Result<Vec<SnapshotInfo>> {
    let file = super::check::open(path, false)?;
    let failed = |e| Error::io("reading the header", e);
    let header = || {
        let mut sector = [0; 512];
        file.read_at(&mut sector, 0).map(|_| sector).map_err(failed)
    };
    let storage = HostFile::new(file.try_clone().map_err(failed)?);
    let mut attempt = 0;
    loop {
        let before = header()?;
        let listed = Image::list_snapshots(&storage);
        attempt += 1;
        if header()? == before || attempt == ATTEMPTS {
            return listed;
        }
    }
}

/// The file that stands for a snapshot of the image that is shown as `shown`.
fn file_in(shown: &Path, name: &OsStr) -> Result<PathBuf> {
    let bytes = name.as_bytes();
    let impossible = bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/');
    match (shown.parent(), shown.file_name()) {
        (Some(directory), Some(file)) if !impossible => {
            Ok(directory.join(".snap").join(file).join(name))
        }
        _ => Err(Error::invalid("a mount has the image open and cannot name that snapshot")),
    }
}

fn print(all: &[SnapshotInfo], json: bool) -> Result<()> {
    if json {
        let all: Vec<_> = all.iter().map(as_json).collect();
        let text = serde_json::to_string_pretty(&all)
            .map_err(|e| Error::io("writing JSON", std::io::Error::other(e)))?;
        println!("{text}");
        return Ok(());
    }
    if all.is_empty() {
        return Ok(());
    }
    println!("{:<6} {:<20} {:>10} {:>10}  NAME", "ID", "DATE (UTC)", "DISK", "VM STATE");
    for info in all {
        println!(
            "{:<6} {:<20} {:>10} {:>10}  {}",
            info.id.escape_debug(),
            date(info.taken),
            size::show(info.disk_size),
            size::show(info.vm_state_size),
            info.name.escape_debug()
        );
    }
    Ok(())
}

/// A snapshot with the names that qemu-img gives.
pub(super) fn as_json(info: &SnapshotInfo) -> serde_json::Value {
    let taken = since_epoch(info.taken);
    serde_json::json!({
        "id": info.id,
        "name": info.name,
        "date-sec": taken.as_secs(),
        "date-nsec": taken.subsec_nanos(),
        "vm-state-size": info.vm_state_size,
        "disk-size": info.disk_size,
    })
}

fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// `2026-11-21 08:30:00`.
fn date(time: SystemTime) -> String {
    let seconds = since_epoch(time).as_secs();
    let (days, rest) = (seconds / 86400, seconds % 86400);
    // Years that begin with March, so that the leap day comes last; 400 of them repeat.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, later) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year + era * 400 + later;
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_709_251_199, "2024-02-29 23:59:59"),
            (1_709_251_200, "2024-03-01 00:00:00"),
            (1_735_689_599, "2024-12-31 23:59:59"),
            (u64::from(u32::MAX), "2106-02-07 06:28:15"),
        ] {
            assert_eq!(date(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_snapshot_is_a_file_beside_the_image_unless_its_name_leads_elsewhere() {
        let shown = Path::new("/mnt/a/disk.raw");
        let place = file_in(shown, OsStr::new("x y")).unwrap();
        assert_eq!(place, Path::new("/mnt/a/.snap/disk.raw/x y"));
        for elsewhere in ["", ".", "..", "../b", "/etc"] {
            assert!(file_in(shown, OsStr::new(elsewhere)).is_err(), "{elsewhere}");
        }
    }
}
