//! `qcow2fs resize`: makes disks larger or smaller, of closed images and of open ones.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::mounted::Mounted;
use super::size::{self, NewSize};
use super::{keys, shown};
use crate::catalog::Alone;
use crate::error::{Error, ErrorKind};
use crate::image::{CompactAfter, Image, Options};

/// Bytes in a sector, of which a disk has a whole number.
const SECTOR: u64 = 512;

/// Make the disk of an image larger or smaller
///
/// An image that a mount has open is resized by that mount, while it is in use; tell a loop device
/// on it with `losetup -c`. What is added reads as zeros. Making a disk smaller cuts off what is at
/// its end, for good: shrink the partitions and file systems on it first. A size is rounded up to
/// whole sectors of 512 bytes.
///
/// Exit code: 0 done; 1 failed: `qcow2fs info` tells the size, which is what it was unless the host failed
/// in the middle; 2 arguments that are not known or no values.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  qcow2fs resize disk.qcow2 20G
  qcow2fs resize disk.qcow2 +512M
  qcow2fs resize --shrink disk.qcow2 10G
  qcow2fs resize --shrink disk.qcow2 -1GiB")]
pub(super) struct Args {
    /// Allow a smaller disk: what lies past its new end is lost
    #[arg(long)]
    shrink: bool,
    /// Trust this directory too: backing and data files named by the image may lie in it (repeatable)
    #[arg(long, value_name = "DIR")]
    allow: Vec<PathBuf>,
    #[command(flatten)]
    keys: keys::Args,
    /// The image
    image: PathBuf,
    /// The new size, or with + or - what to add or cut off
    #[arg(value_name = "[+|-]SIZE", value_parser = size::parse_new_size, allow_hyphen_values = true)]
    size: NewSize,
}

/// Runs the command; returns the exit code.
pub(super) fn run(args: &Args) -> i32 {
    match resize(args) {
        Ok((before, after)) => {
            let show = size::show_exactly;
            println!("{}: {} -> {}", args.image.display(), show(before), show(after));
            0
        }
        Err(line) => {
            eprintln!("qcow2fs resize: {}: {line}", args.image.display());
            1
        }
    }
}

/// The sizes before and after.
fn resize(args: &Args) -> Result<(u64, u64), String> {
    let line = |e: Error| e.to_string();
    let allowed = args.allow.iter().map(|path| super::mount::allowed(path));
    let allowed = allowed.collect::<Result<Vec<_>, _>>()?;
    let keys = keys::or_ask(&args.keys)?;
    let options = Options {
        writable: true,
        keep_erased: 0,
        compact_after: CompactAfter::Off,
        ..Options::default()
    };
    let opened = match Alone::open(&args.image, &allowed, keys, &options) {
        Err(e) if e.kind() == ErrorKind::InUse => match Mounted::open_in(&args.image) {
            Some(mount) => return in_mount(&mount.raw_file(), args),
            None => return Err(line(e)),
        },
        opened => opened.map_err(line)?,
    };
    let done = alone(opened.image(), args);
    opened.close().map_err(line)?;
    done
}

fn alone(image: &Image, args: &Args) -> Result<(u64, u64), String> {
    let before = image.virtual_size();
    let after = wanted(before, args)?;
    // The mark of an image that is corrupt has the reason with it.
    image.resize(after).and_then(|()| image.flush()).map_err(|e| e.to_string())?;
    Ok((before, after))
}

fn in_mount(raw: &Path, args: &Args) -> Result<(u64, u64), String> {
    let failed = |e| format!("resizing it through the mount as {}: {e}", raw.display());
    let file = shown::open(raw, File::options().write(true)).map_err(failed)?;
    let before = file.metadata().map_err(failed)?.len();
    let after = wanted(before, args)?;
    file.set_len(after).and_then(|()| file.sync_all()).map_err(failed)?;
    Ok((before, after))
}

/// The new size, in whole sectors.
fn wanted(before: u64, args: &Args) -> Result<u64, String> {
    let after = args.size.from(before).and_then(|size| size.checked_next_multiple_of(SECTOR));
    let after = after.ok_or_else(|| {
        format!("a disk that has {} cannot become so large or small", size::show_exactly(before))
    })?;
    if after < before && !args.shrink {
        return Err(format!(
            "{} would cut off {} of the disk: say --shrink if that is meant",
            size::show_exactly(after),
            size::show(before - after)
        ));
    }
    Ok(after)
}
