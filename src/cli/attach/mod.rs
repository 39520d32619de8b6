//! `qcow2fs attach`: an image on a loop device, and mounted, in one step.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};

mod attachment;
mod loop_device;
mod plan;

use attachment::Mounted;
pub(super) use attachment::{Attachment, Turn};
use loop_device::{LoopDevice, listed};

use super::{keys, shown, signals};
use crate::catalog::Typed;
use crate::storage::regular;

const EXAMPLES: &str = "Examples:
  qcow2fs attach images/disk.qcow2 /mnt/disk                  # no mount needed before
  qcow2fs attach /mnt/raw/disk.raw --partition 1 /mnt/disk
  qcow2fs attach --read-only images/disk.qcow2                # only the loop device
  qcow2fs detach /mnt/disk                                    # or the image, or /dev/loop0";

/// Set up a loop device on an image, and mount what is on it
///
/// An image that no mount shows yet gets one of its own, beneath /run, which shows nothing else. The
/// loop device does direct I/O, and has its partitions. Prints the device, and where it is mounted.
/// When a step fails, those before it are undone. Needs root; without, it says what root would do.
/// `qcow2fs detach` undoes exactly this. Exit code: 0 done, 1 failed.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// The image, or its raw file in a mount
    #[arg(value_name = "IMAGE|RAW")]
    file: PathBuf,
    /// Where to mount it; without this only the device is set up
    mountpoint: Option<PathBuf>,
    /// The partition that is meant, instead of the whole disk
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    partition: Option<u32>,
    /// Write nothing to the image
    #[arg(short, long)]
    read_only: bool,
    /// Mount options of the file system, as for mount(8)
    #[arg(short, value_name = "OPTION[,OPTION]...", requires = "mountpoint")]
    options: Option<String>,
    /// The type of the file system, as for mount(8), which finds it out otherwise
    #[arg(short = 't', long = "type", value_name = "TYPE", requires = "mountpoint")]
    kind: Option<String>,
    /// Trust this directory too, as for `qcow2fs mount` (repeatable)
    #[arg(long, value_name = "DIR")]
    allow: Vec<PathBuf>,
    #[command(flatten)]
    keys: keys::Args,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What is to be attached.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    /// A file of a mount, with the image behind it.
    Raw { raw: PathBuf, image: PathBuf },
    /// An image that no mount shows.
    Image(PathBuf),
}

/// Runs the command; returns the exit code.
pub(super) fn run(args: &Args) -> i32 {
    let done = Target::find(&args.file).and_then(|target| {
        // SAFETY: geteuid takes nothing and cannot fail.
        if unsafe { libc::geteuid() } != 0 {
            plan::print(&plan::commands(args, &target));
            return Err("attaching an image needs root, who would run the above".into());
        }
        attach(args, &target)
    });
    match done {
        Ok(text) => {
            println!("{text}");
            0
        }
        Err(line) => {
            eprintln!("qcow2fs: {line}");
            1
        }
    }
}

impl Target {
    /// By what the file is, not by what it is called.
    fn find(given: &Path) -> Result<Target, String> {
        let shown = given.display();
        let failed = |e| format!("{shown}: {e}");
        let place = regular::place(given).map_err(failed)?;
        if !place.metadata().map_err(failed)?.is_file() {
            return Err(format!("{shown} is neither an image nor a file of a mount"));
        }
        // That of what was looked at, whatever has its name by now.
        let path = regular::path_of(&place).read_link().map_err(failed)?;
        if let Some(image) = shown::image_of(&path) {
            return Ok(Target::Raw { raw: path, image });
        }
        let mut magic = [0; 4];
        let reading = |e| format!("reading {shown}: {e}");
        let mut file = regular::open(&place, false).map_err(|e| reading(e.to_string()))?;
        let read = file.read_exact(&mut magic);
        let is_short = read.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::UnexpectedEof);
        if is_short || read.is_ok() && magic != *b"QFI\xfb" {
            return Err(format!("{shown} is neither a qcow2 image nor a file of a qcow2fs mount"));
        }
        read.map_err(|e| reading(e.to_string()))?;
        Ok(match shown::raw_file_of(&path) {
            Some(raw) => Target::Raw { raw, image: path },
            None => Target::Image(path),
        })
    }

    fn image(&self) -> &Path {
        match self {
            Target::Raw { image, .. } | Target::Image(image) => image,
        }
    }
}

fn attach(args: &Args, target: &Target) -> Result<String, String> {
    let mountpoint = args.mountpoint.as_deref().map(existing).transpose()?;
    let typed = typed_keys(args, target)?;
    let _turn = Turn::wait()?;
    refuse_second(target)?;
    let thread = |e| format!("starting a thread: {e}");
    let stop = signals::block().note().map_err(thread)?;
    let mut attachment = Attachment::begin(Some(target.image().to_owned()))?;
    match set_up(&mut attachment, args, target, (mountpoint, typed), &stop) {
        Ok(place) => Ok(report(&attachment, &place, args.json)),
        Err(line) => Err(match attachment.take_down() {
            Ok(()) => line,
            Err(left) => format!("{line}; and what was done by then is still there: {left}"),
        }),
    }
}

/// What has to be asked for at the terminal, before anybody waits for this command: the mount of a
/// single image is made in the background, where nobody can be asked.
fn typed_keys(args: &Args, target: &Target) -> Result<Typed, String> {
    let Target::Image(image) = target else { return Ok(Typed::default()) };
    let allowed = args.allow.iter().map(|path| super::mount::allowed(path));
    keys::typed_ahead(&args.keys, image, &allowed.collect::<Result<Vec<_>, _>>()?)
}

/// Does one step after the other; returns the device or partition that is meant.
fn set_up(
    attachment: &mut Attachment,
    args: &Args,
    target: &Target,
    (mountpoint, typed): (Option<PathBuf>, Typed),
    stop: &AtomicI32,
) -> Result<PathBuf, String> {
    let go_on = || match stop.load(Ordering::Acquire) {
        0 => Ok(()),
        signal => Err(format!("stopped by signal {signal}")),
    };
    let raw = match target {
        Target::Raw { raw, .. } => raw.clone(),
        Target::Image(image) => {
            let typed = typed.take_all();
            attachment.mount_image(image, &plan::image_arguments(args)?, &typed)?;
            attachment.record.raw.clone()
        }
    };
    go_on()?;
    let device = attachment.set_up_loop(&raw, args.read_only)?;
    go_on()?;
    let node = match args.partition {
        Some(number) => device.partition(number)?,
        None => device.node().to_owned(),
    };
    let Some(mountpoint) = mountpoint else { return Ok(node) };
    if args.partition.is_none() && !device.partitions().is_empty() {
        let numbers = listed(&device.partitions());
        return Err(format!("the disk has partitions: choose one of {numbers} with --partition"));
    }
    let mounted = Mounted { device: node.clone(), mountpoint, number: String::new() };
    attachment.mount_device(mounted, &plan::device_arguments(args))?;
    Ok(node)
}

/// Two loop devices on one disk would not know of each other's caches.
fn refuse_second(target: &Target) -> Result<(), String> {
    let image = target.image();
    if let Some(other) = Attachment::all().iter().find(|other| other.is_named(image)) {
        let (image, place) = (image.display(), other.whereabouts());
        return Err(format!("{image} is attached already: {place}; `qcow2fs detach` it first"));
    }
    match target {
        Target::Raw { raw, .. } => match LoopDevice::on(raw) {
            Some(device) => {
                let (raw, device) = (raw.display(), device.node().display());
                Err(format!("{raw} is on {device} already: `losetup -d {device}` first"))
            }
            None => Ok(()),
        },
        Target::Image(_) => Ok(()),
    }
}

fn existing(directory: &Path) -> Result<PathBuf, String> {
    let shown = directory.display();
    let path = directory.canonicalize().map_err(|e| format!("the mount point {shown}: {e}"))?;
    if path.is_dir() { Ok(path) } else { Err(format!("the mount point {shown} is no directory")) }
}

fn report(attachment: &Attachment, node: &Path, json: bool) -> String {
    let record = &attachment.record;
    if json {
        let mountpoint = record.mounted.as_ref().map(|mounted| &mounted.mountpoint);
        let report = serde_json::json!({
            "image": record.image,
            "raw": record.raw,
            "device": node,
            "mountpoint": mountpoint,
        });
        return format!("{report:#}");
    }
    match &record.mounted {
        Some(_) => attachment.whereabouts(),
        None => node.display().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_image_is_not_attached() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.qcow2");
        std::fs::write(&file, "QFI\u{fb} is not these bytes in UTF-8").unwrap();
        let line = Target::find(&file).unwrap_err();
        assert!(line.ends_with("is neither a qcow2 image nor a file of a qcow2fs mount"), "{line}");
        std::fs::write(&file, b"QFI\xfb").unwrap();
        let image = file.canonicalize().unwrap();
        assert_eq!(Target::find(&file).unwrap(), Target::Image(image));
        assert!(Target::find(dir.path()).is_err());
        assert!(Target::find(&dir.path().join("none")).is_err());
    }
}
