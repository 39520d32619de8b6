//! `qcow2fs check`: what is wrong with images, and repairs.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::keys;
use super::progress::Checking;
use crate::check::{self, Repair, Report};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::image_lock::{self, Access};
use crate::storage::{HostFile, regular};

/// The check could not be done.
const FAILED: i32 = 1;
/// The file is of no format that can be checked.
const NOT_CHECKABLE: i32 = 63;

/// Check qcow2 images, and repair them
///
/// A check writes nothing and may be stopped at any moment; so may a repair, after which the image is
/// no worse than before. An image that somebody writes cannot be checked: an open mount or a virtual
/// machine says so. An encrypted one is checked without its key.
///
/// Exit code: 0 sound, 2 corrupt, 3 leaked clusters only, 1 the check could not be done, the key is wrong
/// or the arguments make no sense, 63 not a qcow2 image. Of several images the worst: 1, 63, 2, 3, 0.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  qcow2fs check disk.qcow2
  qcow2fs check --json images/a.qcow2 images/b.qcow2
  qcow2fs check --repair leaks disk.qcow2
  qcow2fs check --try-key disk.qcow2             # asks for the key of an encrypted image")]
pub struct Args {
    /// Give leaked clusters back, or repair everything that loses no data
    #[arg(long, short, value_enum)]
    pub repair: Option<Repair>,
    /// Print a JSON object for each image
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    trial: keys::Trial,
    /// The images
    #[arg(required = true)]
    pub images: Vec<PathBuf>,
}

/// Checks every image and prints what was found. Returns the exit code.
pub fn run(args: &Args) -> i32 {
    let mut worst = 0;
    for path in &args.images {
        let code = match check_image(path, args) {
            Ok(report) => {
                print(path, &report, args);
                let code = try_key(path, args);
                std::cmp::max_by_key(report.exit_code(), code, |&code| severity(code))
            }
            Err(e) => {
                eprintln!("qcow2fs check: {}: {e}", path.display());
                if e.kind() == ErrorKind::NotQcow2 { NOT_CHECKABLE } else { FAILED }
            }
        };
        worst = std::cmp::max_by_key(worst, code, |&code| severity(code));
    }
    worst
}

/// Tries the key of an image, where that is asked for, and says what came of it.
fn try_key(path: &Path, args: &Args) -> i32 {
    match args.trial.run(path) {
        Ok(Some(verdict)) if !args.json => println!("Encrypted, and {verdict}."),
        Ok(_) => {}
        Err(line) => {
            eprintln!("qcow2fs check: {}: {line}", path.display());
            return FAILED;
        }
    }
    0
}

fn severity(code: i32) -> u8 {
    match code {
        0 => 0,
        3 => 1,
        2 => 2,
        NOT_CHECKABLE => 3,
        _ => 4,
    }
}

fn check_image(path: &Path, args: &Args) -> Result<Report> {
    let file = open(path, args.repair.is_some())?;
    let access = if args.repair.is_some() { Access::Write } else { Access::Read };
    image_lock::acquire(&file, None, access)?;
    let storage = HostFile::new(file);
    let progress = Checking::new(path.display().to_string(), args.json);
    match args.repair {
        Some(what) => check::repair_watched(&storage, what, &progress),
        None => check::check_watched(&storage, &progress),
    }
}

/// Opens a regular file; nothing happens to what is something else.
pub(super) fn open(path: &Path, writable: bool) -> Result<File> {
    let place = regular::place(path).map_err(|e| Error::io("opening the image", e))?;
    regular::open(&place, writable)
}

fn print(path: &Path, report: &Report, args: &Args) {
    if args.json {
        print_json(path, report);
        return;
    }
    if args.images.len() > 1 {
        println!("{}:", path.display());
    }
    for finding in &report.findings {
        println!("{finding}");
    }
    if report.findings_left_out != 0 {
        println!("... and {} more", report.findings_left_out);
    }
    print_summary(report);
}

fn print_json(path: &Path, report: &Report) {
    #[derive(serde::Serialize)]
    struct Named<'a> {
        filename: std::borrow::Cow<'a, str>,
        format: &'static str,
        #[serde(flatten)]
        report: &'a Report,
    }
    let named = Named { filename: path.to_string_lossy(), format: "qcow2", report };
    match serde_json::to_string_pretty(&named) {
        Ok(text) => println!("{text}"),
        Err(e) => eprintln!("qcow2fs check: {}: {e}", path.display()),
    }
}

fn print_summary(report: &Report) {
    if report.corruptions_fixed != 0 || report.leaks_fixed != 0 {
        println!(
            "Repaired: {} errors, {} leaked clusters. What is left:",
            report.corruptions_fixed, report.leaks_fixed
        );
    }
    if report.corruptions != 0 {
        println!("{} errors were found on the image.", report.corruptions);
        println!("Data may be corrupted, or further writes to the image may corrupt it.");
    }
    if report.leaks != 0 {
        println!("{} leaked clusters were found on the image.", report.leaks);
        println!("This means waste of disk space, but no harm to data.");
    }
    if report.corruptions == 0 && report.leaks == 0 {
        println!("No errors were found on the image.");
    }
    let percent = |part: u64, of: u64| part as f64 * 100.0 / of.max(1) as f64;
    println!(
        "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
        report.allocated_clusters,
        report.total_clusters,
        percent(report.allocated_clusters, report.total_clusters),
        percent(report.fragmented_clusters, report.allocated_clusters),
        percent(report.compressed_clusters, report.allocated_clusters),
    );
    println!("Image end offset: {}", report.image_end_offset);
}
