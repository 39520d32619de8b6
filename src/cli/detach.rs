//! `qcow2fs detach`: undoes what `attach` has done.

use std::path::{Path, PathBuf};

use super::attach::{Attachment, Turn};
use super::signals;

/// Undo what `attach` has done
///
/// Unmounts what it mounted, lets go of the loop device, and ends the mount that it made, if any.
/// When something is in use it says by what, and may be run again. What `attach` has not done is left
/// alone: a mount that was there before stays. Exit code: 0 done, 1 failed.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  qcow2fs detach /mnt/disk
  qcow2fs detach /dev/loop0
  qcow2fs detach images/disk.qcow2")]
pub(super) struct Args {
    /// The mount point, the device, the image, or its raw file
    #[arg(required = true, value_name = "MOUNTPOINT|DEVICE|IMAGE")]
    places: Vec<PathBuf>,
}

/// Runs the command; returns the exit code.
pub(super) fn run(args: &Args) -> i32 {
    // An interrupted one would be half done.
    let _finishing = signals::block();
    let mut code = 0;
    for place in &args.places {
        if let Err(line) = detach(place) {
            eprintln!("qcow2fs: {line}");
            code = 1;
        }
    }
    code
}

fn detach(given: &Path) -> Result<(), String> {
    let shown = given.display();
    // A mount that does not answer any more is known by the name that it was given.
    let path = given.canonicalize().or_else(|_| std::path::absolute(given));
    let path = path.map_err(|e| format!("{shown}: {e}"))?;
    // SAFETY: geteuid takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return Err(format!("detaching needs root: sudo qcow2fs detach {shown}"));
    }
    let _turn = Turn::wait()?;
    let attachment = Attachment::all().into_iter().find(|attachment| attachment.is_named(&path));
    attachment
        .ok_or_else(|| format!("{shown} is nothing that `qcow2fs attach` has attached"))?
        .take_down()
}
