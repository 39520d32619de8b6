//! `qcow2fs create`: new, empty images.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use clap::ValueEnum;

use super::progress::Progress;
use super::{signals, size};
use crate::catalog::{NewImage, create_filled_image};
use crate::error::{Error, ErrorKind};
use crate::image::{BackingFile, CompressionType, CreateOptions, Image, NewDataFile};
use crate::storage::{HostFile, IfTaken};

/// The longest chain that is looked through.
const LONGEST_CHAIN: usize = 64;

/// Bytes in a sector, of which a disk has a whole number.
const SECTOR: u64 = 512;
/// Bytes that are preallocated between two looks at the progress.
const STEP: u64 = 64 << 20;
/// Bytes that are written at once.
const PIECE: usize = 1 << 20;

/// Make an empty image
///
/// It appears complete and durable, or not at all. A size is rounded up to whole sectors of 512
/// bytes; an overlay without one is as large as its backing file. The names of a backing and of a data
/// file are recorded as they are given: relative to the directory of the new image, or absolute.
///
/// A data file is a new, sparse file that holds the data, while the image says which of it is in use.
/// With --data-file-raw it reads as the disk by itself at any time, and all of it is mapped from the
/// start.
///
/// Preallocation: metadata maps all of the disk to clusters without space on the host; falloc
/// reserves that space, too; full also writes zeros there. Interrupted or failed, no image is left, and
/// one that was to be replaced stays.
///
/// Exit code: 0 done; 1 failed, also where options contradict each other; 2 arguments that are not known
/// or no values; 128 plus the number of the signal that ended it.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  qcow2fs create disk.qcow2 10G
  qcow2fs create -b base.qcow2 -F qcow2 overlay.qcow2
  qcow2fs create --cluster-size 128K --extended-l2 --compression-type zstd disk.qcow2 1TiB
  qcow2fs create --preallocation falloc disk.qcow2 1.5G
  qcow2fs create --data-file disk.data --data-file-raw disk.qcow2 10G")]
pub(super) struct Args {
    /// What is read where the image has nothing of its own
    #[arg(long, short, value_name = "FILE", requires = "backing_format")]
    backing: Option<PathBuf>,
    /// The format of the backing file
    #[arg(long, short = 'F', value_name = "FORMAT", requires = "backing")]
    backing_format: Option<BackingFormat>,
    /// Keep the data in this new file, not in the image
    #[arg(long, value_name = "FILE")]
    data_file: Option<PathBuf>,
    /// The data file is to read as the disk by itself
    #[arg(long, requires = "data_file", conflicts_with = "backing")]
    data_file_raw: bool,
    /// Bytes in a cluster: a power of 2 from 512 to 2M
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "64K")]
    cluster_size: u64,
    /// Divide clusters into 32 subclusters, which makes small writes over a backing file cheap
    #[arg(long)]
    extended_l2: bool,
    /// What clusters are compressed with, by who compresses them
    #[arg(long, value_name = "TYPE", default_value = "zlib")]
    compression_type: Compression,
    /// Bits of a refcount: a power of 2 from 1 to 64
    #[arg(long, value_name = "BITS", default_value = "16")]
    refcount_bits: u32,
    /// What is allocated from the start
    #[arg(long, value_name = "MODE", default_value = "off")]
    preallocation: Preallocation,
    /// Replace the image that has this name, and all that is on it
    #[arg(long)]
    force: bool,
    /// The image
    image: PathBuf,
    /// The size of the disk
    #[arg(value_parser = size::parse, required_unless_present = "backing")]
    size: Option<u64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum BackingFormat {
    Raw,
    Qcow2,
}

#[derive(Clone, Copy, ValueEnum)]
enum Compression {
    #[value(alias = "deflate")]
    Zlib,
    Zstd,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Preallocation {
    Off,
    Metadata,
    Falloc,
    Full,
}

/// Runs the command; returns the exit code.
pub(super) fn run(args: &Args) -> i32 {
    let done = signals::block()
        .note()
        .map_err(|e| format!("starting a thread: {e}"))
        .and_then(|signal| create(args, &signal));
    match done {
        Ok(0) => 0,
        Ok(signal) => 128 + signal,
        Err(line) => {
            eprintln!("qcow2fs create: {}: {line}", args.image.display());
            1
        }
    }
}

/// Returns the signal that ended it, 0 for none.
fn create(args: &Args, signal: &Arc<AtomicI32>) -> Result<i32, String> {
    if args.preallocation != Preallocation::Off && args.backing.is_some() {
        return Err("preallocation would hide the backing file: leave one of them out".into());
    }
    let options = options(args)?;
    if args.force {
        refuse_losing_base(args)?;
    }
    let if_taken = if args.force { IfTaken::Replace } else { IfTaken::Fail };
    let mode = match args.preallocation {
        // As QEMU has it: otherwise the first write to each L2 table would wait for its mapping.
        Preallocation::Off if args.data_file_raw => Preallocation::Metadata,
        mode => mode,
    };
    let prepare = |new: &NewImage<'_>| match mode {
        Preallocation::Off => Ok(true),
        _ => new.with_opened(|image| fill(args, mode, image, signal)),
    };
    let made = create_filled_image(&args.image, &options, if_taken, prepare);
    let made = made.map_err(|e| match (e.kind(), e.errno()) {
        (ErrorKind::Io, libc::EEXIST) => "it is there already: --force replaces it".to_owned(),
        _ => e.to_string(),
    })?;
    Ok(if made { 0 } else { signal.load(Ordering::Acquire) })
}

fn options(args: &Args) -> Result<CreateOptions, String> {
    let backing = match (&args.backing, args.backing_format) {
        (Some(name), Some(format)) => Some((name, format)),
        _ => None,
    };
    let size = match (args.size, backing) {
        (Some(size), _) => size,
        (None, Some((name, format))) => size_of_backing(&args.image, name, format)?,
        (None, None) => return Err("say how large the disk is to be".into()),
    };
    let too_much = || format!("{size} bytes are too much for a disk");
    Ok(CreateOptions {
        virtual_size: size.checked_next_multiple_of(SECTOR).ok_or_else(too_much)?,
        cluster_size: args.cluster_size,
        refcount_bits: args.refcount_bits,
        extended_l2: args.extended_l2,
        compression: match args.compression_type {
            Compression::Zlib => CompressionType::Deflate,
            Compression::Zstd => CompressionType::Zstd,
        },
        backing: backing.map(|(name, format)| BackingFile {
            name: OsStr::as_bytes(name.as_os_str()).to_vec(),
            format: Some(format.name().to_owned()),
        }),
        data_file: args.data_file.as_ref().map(|name| NewDataFile {
            name: OsStr::as_bytes(name.as_os_str()).to_vec(),
            raw: args.data_file_raw,
        }),
        ..CreateOptions::default()
    })
}

impl BackingFormat {
    fn name(self) -> &'static str {
        match self {
            BackingFormat::Raw => "raw",
            BackingFormat::Qcow2 => "qcow2",
        }
    }
}

/// Where a file is that an image names.
fn beside(image: &Path, name: &Path) -> PathBuf {
    image.parent().unwrap_or(Path::new("")).join(name)
}

/// An image that replaces what it is based on, or what that is based on, would have nothing beneath it.
fn refuse_losing_base(args: &Args) -> Result<(), String> {
    use std::os::unix::fs::MetadataExt;
    let id = |path: &Path| path.metadata().ok().map(|file| (file.dev(), file.ino()));
    let Some(replaced) = id(&args.image) else { return Ok(()) };
    let (Some(mut name), Some(mut format)) = (args.backing.clone(), args.backing_format) else {
        return Ok(());
    };
    let mut image = args.image.clone();
    for _ in 0..LONGEST_CHAIN {
        image = beside(&image, &name);
        if id(&image) == Some(replaced) {
            let base = image.display();
            return Err(format!("{base} would be replaced, and the image is to be based on it"));
        }
        // What cannot be looked at is told of when the image is opened.
        let BackingFormat::Qcow2 = format else { break };
        let Ok(file) = super::check::open(&image, false) else { break };
        let Ok(summary) = Image::summarize(&HostFile::new(file)) else { break };
        let Some(next) = summary.backing else { break };
        name = PathBuf::from(OsStr::from_bytes(&next.name));
        format = match next.format.as_deref() {
            Some("qcow2") => BackingFormat::Qcow2,
            _ => BackingFormat::Raw,
        };
    }
    Ok(())
}

fn size_of_backing(image: &Path, name: &Path, format: BackingFormat) -> Result<u64, String> {
    let path = beside(image, name);
    let of_it = |e: Error| format!("backing file {}: {e}", path.display());
    let file = super::check::open(&path, false).map_err(of_it)?;
    let size = match format {
        BackingFormat::Raw => {
            file.metadata().map(|file| file.len()).map_err(|e| Error::io("looking at it", e))
        }
        BackingFormat::Qcow2 => {
            Image::summarize(&HostFile::new(file)).map(|summary| summary.virtual_size)
        }
    };
    size.map_err(of_it)
}

/// Allocates all of the disk, until a signal comes; whether it came to the end.
fn fill(
    args: &Args,
    mode: Preallocation,
    image: &Image,
    signal: &AtomicI32,
) -> crate::Result<bool> {
    let mut progress = Progress::new(args.image.display().to_string(), false);
    let zeros = vec![0; if mode == Preallocation::Full { PIECE } else { 0 }];
    let end = image.virtual_size();
    let mut at = 0;
    while at < end && signal.load(Ordering::Acquire) == 0 {
        let next = end.min(at + STEP);
        match mode {
            Preallocation::Off => {}
            Preallocation::Metadata => image.preallocate_metadata(at..next)?,
            Preallocation::Falloc => image.preallocate(at..next)?,
            Preallocation::Full => {
                image.preallocate(at..next)?;
                write_zeros(image, at..next, &zeros)?;
            }
        }
        at = next;
        progress.written("allocated", at, end);
    }
    Ok(at == end)
}

fn write_zeros(image: &Image, range: std::ops::Range<u64>, zeros: &[u8]) -> crate::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let count = (range.end - at).min(zeros.len() as u64);
        image.write(at, &zeros[..count as usize])?;
        at += count;
    }
    Ok(())
}
