//! `qcow2fs compact`: makes image files as short as their content, in place.

mod mounted;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use serde::Serialize;

use super::mounted::Mounted;
use super::progress::Progress;
use super::{keys, logging, signals, size};
use crate::catalog::Alone;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{CompactAfter, CompactionStatus, Image, Options};

/// How often a search for leaked clusters is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Make images as short as their content, in place
///
/// Clusters in use at the end of the file move into free ones before it, whatever they hold: data,
/// compressed data, snapshots, tables. Then the end is cut off. Nothing is copied that need not
/// move, and no second file is made. An image that a mount has open is compacted by that mount,
/// while it is in use.
///
/// It may be stopped at any moment, even by a power cut: the image stays sound, what was moved stays
/// moved, and the next run goes on from there. The first Ctrl-C or SIGTERM ends it in order.
///
/// Exit code: 0 done; 1 an image could not be compacted; 2 arguments that make no sense; 128 plus the
/// signal's number, as 130 for Ctrl-C, when it was stopped.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  qcow2fs compact disk.qcow2
  qcow2fs compact --dry-run images/*.qcow2
  qcow2fs compact --detect-zeroes --json disk.qcow2
  qcow2fs compact --defrag disk.qcow2
  qcow2fs compact --allow /srv/bases overlay.qcow2")]
pub(super) struct Args {
    /// Only tell what there is to win; change nothing
    #[arg(long, short = 'n', conflicts_with = "defrag")]
    dry_run: bool,
    /// Read all data too, and give back clusters of zeros, but for what snapshots may share
    #[arg(long, alias = "detect-zeros")]
    detect_zeroes: bool,
    /// Lay the file out in the order of the disk as well: everything is moved twice, and the file is
    /// twice as long meanwhile, though it takes little more on the host
    #[arg(long)]
    defrag: bool,
    /// Trust this directory too: backing files named by an image may lie in it (repeatable)
    #[arg(long, value_name = "DIR")]
    allow: Vec<PathBuf>,
    #[command(flatten)]
    keys: keys::Args,
    /// Print a JSON object for each image
    #[arg(long)]
    json: bool,
    /// The images
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
}

/// What an image file takes.
#[derive(Clone, Copy, Debug, Serialize)]
struct Size {
    length: u64,
    allocated: u64,
}

impl Size {
    fn of(image: &Image) -> Result<Size> {
        let status = image.status()?;
        Ok(Size { length: status.file_length, allocated: status.allocated })
    }
}

/// What became of an image, or would.
#[derive(Debug, Serialize)]
struct Done {
    before: Size,
    after: Size,
    /// Bytes of clusters that were moved.
    moved: u64,
    /// Bytes of the disk that were nothing but zeros in data clusters.
    #[serde(skip_serializing_if = "Option::is_none")]
    zeros: Option<u64>,
    /// What keeps the file from getting shorter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pinned: Option<String>,
    /// The mount that has done it.
    #[serde(skip_serializing_if = "Option::is_none")]
    mountpoint: Option<PathBuf>,
    /// The signal that stopped it.
    #[serde(skip_serializing_if = "Option::is_none")]
    stopped: Option<i32>,
}

/// Whether a signal has come.
struct Stop(Arc<AtomicI32>);

impl Stop {
    fn signal(&self) -> Option<i32> {
        Some(self.0.load(Ordering::Acquire)).filter(|signal| *signal != 0)
    }
}

/// Runs the command; returns the exit code.
pub(super) fn run(args: &Args) -> i32 {
    let stop = match signals::block().note() {
        Ok(signal) => Stop(signal),
        Err(e) => {
            eprintln!("qcow2fs compact: starting a thread: {e}");
            return 1;
        }
    };
    logging::to_terminal(log::LevelFilter::Warn);
    let mut code = 0;
    for path in &args.images {
        let done = one(path, args, &stop);
        if let Some(signal) = stop.signal() {
            code = 128 + signal;
        }
        match done {
            Ok(done) => print(path, &done, args),
            Err(line) => {
                eprintln!("qcow2fs compact: {}: {line}", path.display());
                code = code.max(1);
            }
        }
        if stop.signal().is_some() {
            break;
        }
    }
    code
}

fn one(path: &Path, args: &Args, stop: &Stop) -> Result<Done, String> {
    let mut progress = Progress::new(path.display().to_string(), args.json);
    let line = |e: Error| e.to_string();
    let allowed = args.allow.iter().map(|path| super::mount::allowed(path));
    let allowed = allowed.collect::<Result<Vec<_>, _>>()?;
    let keys = keys::or_ask(&args.keys)?;
    let options = Options {
        writable: !args.dry_run,
        keep_erased: 0,
        // Not by itself: when and how fast is this command's matter.
        compact_after: CompactAfter::Off,
        ..Options::default()
    };
    let opened = match Alone::open(path, &allowed, keys, &options) {
        Err(e) if e.kind() == ErrorKind::InUse && !args.dry_run => {
            let Some(mount) = Mounted::open_in(path) else { return Err(line(e)) };
            let closed_only = [(args.detect_zeroes, "--detect-zeroes"), (args.defrag, "--defrag")];
            if let Some((_, option)) = closed_only.iter().find(|(given, _)| *given) {
                let place = mount.mountpoint().display();
                return Err(format!("{option} needs the image closed, and {place} has it open"));
            }
            return mounted::compact(&mount, stop, &mut progress);
        }
        opened => opened.map_err(line)?,
    };
    let image = opened.image();
    let done = match args.dry_run {
        true => look(image, args, stop, &mut progress),
        false => compact(image, args, stop, &mut progress),
    };
    // What was done until an error is worth closing in order too.
    let image = Arc::clone(image);
    let closed = opened.close();
    let mut done = done.map_err(line)?;
    closed.map_err(line)?;
    if !args.dry_run {
        done.after = Size::of(&image).map_err(line)?;
    }
    Ok(done)
}

/// What there is to win.
fn look(image: &Image, args: &Args, stop: &Stop, progress: &mut Progress) -> Result<Done> {
    let before = Size::of(image)?;
    let zeros = args.detect_zeroes.then(|| free_zeros(image, stop, progress)).transpose()?;
    let prospect = image.prospect_while(|| stop.signal().is_none())?;
    let used = prospect.map_or(u64::MAX, |p| p.used * image.cluster_size() - zeros.unwrap_or(0));
    let after = Size { length: used.min(before.length), allocated: before.allocated.min(used) };
    let moved = prospect.map_or(0, |p| p.behind * image.cluster_size());
    Ok(Done { before, after, moved, zeros, pinned: None, mountpoint: None, stopped: stop.signal() })
}

fn compact(image: &Image, args: &Args, stop: &Stop, progress: &mut Progress) -> Result<Done> {
    let before = Size::of(image)?;
    // What has leaked counts as used until it is found.
    progress.begin("looking for leaked clusters");
    while image.status()?.searching_leaks && stop.signal().is_none() {
        std::thread::sleep(LOOK);
    }
    let mut zeros = None;
    if args.detect_zeroes && stop.signal().is_none() {
        zeros = Some(free_zeros(image, stop, progress)?);
    }
    if stop.signal().is_none() {
        progress.begin("looking for free clusters");
        let tell = |status: &CompactionStatus| {
            progress.moved(status.moved);
            stop.signal().is_none()
        };
        match args.defrag {
            true => image.defragment(tell)?,
            false => image.compact(tell)?,
        }
    }
    let status = image.status()?;
    let (moved, pinned) = (status.recycled.moved, status.compaction.pinned);
    Ok(Done {
        before,
        after: before,
        moved,
        zeros,
        pinned,
        mountpoint: None,
        stopped: stop.signal(),
    })
}

fn free_zeros(image: &Image, stop: &Stop, progress: &mut Progress) -> Result<u64> {
    progress.begin("looking for zeros");
    image.free_zeros(|at| {
        progress.looked_at(at, image.virtual_size());
        stop.signal().is_none()
    })
}

fn print(path: &Path, done: &Done, args: &Args) {
    if args.json {
        #[derive(Serialize)]
        struct Named<'a> {
            filename: std::borrow::Cow<'a, str>,
            dry_run: bool,
            #[serde(flatten)]
            done: &'a Done,
        }
        let named = Named { filename: path.to_string_lossy(), dry_run: args.dry_run, done };
        match serde_json::to_string(&named) {
            Ok(text) => println!("{text}"),
            Err(e) => eprintln!("qcow2fs compact: {}: {e}", path.display()),
        }
        return;
    }
    let mut out = io::stdout().lock();
    // A closed pipe is nobody's business here.
    let _ = io::Write::write_all(&mut out, line(path, done, args.dry_run).as_bytes());
}

fn line(path: &Path, done: &Done, dry_run: bool) -> String {
    let (before, after) = (done.before, done.after);
    let show = size::show;
    let mut line = format!(
        "{}: {}length {} -> {}, on the host {} -> {}, {} moved",
        path.display(),
        if dry_run { "would be: " } else { "" },
        show(before.length),
        show(after.length),
        show(before.allocated),
        show(after.allocated),
        show(done.moved),
    );
    if let Some(zeros) = done.zeros {
        line += &format!(", {} were zeros", show(zeros));
    }
    if let Some(mountpoint) = &done.mountpoint {
        line += &format!(", by the mount at {}", mountpoint.display());
    }
    if let Some(pinned) = &done.pinned {
        line += &format!("; it could get no shorter: {pinned}");
    }
    if done.stopped.is_some() {
        line += "; stopped before the end, run it again to go on";
    }
    line + "\n"
}
