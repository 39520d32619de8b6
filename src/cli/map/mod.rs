//! `qcow2fs map`: what lies where in an image file, as a picture.

mod extents;
mod picture;
mod svg;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::live::{Every, Live};
use super::mounted::Mounted;
use super::progress::Checking;
use super::{shown, size, terminal};
use crate::check::{Survey, Watch};
use crate::error::Result;
use crate::format::MAGIC;
use extents::{Extent, Kind};
use picture::Picture;

/// An image that somebody writes is looked at again so often, as long as a look meets changes.
const ATTEMPTS: u32 = 4;

/// Show what lies where in an image file
///
/// The picture shows the file from its start to its end, line by line; each block takes the colour
/// of what fills most of it. It reads the tables and counts references, locks nothing and writes
/// nothing, so it works whoever uses the image; of an image in use it shows what has reached the
/// file. A mount that has the image open is asked to flush it first, but for --watch.
///
/// data, shared (by the disk and its snapshots, or by several), compressed; unwritten: mapped, but
/// without space on the host; metadata; junk: counted, but nothing refers to it (leaked, or on its
/// way to be free); ready: the same without space on the host, as what a mount keeps for the next
/// writes; free: not counted, but still with space on the host; hole: neither.
///
/// Exit code: 0 done; 1 failed; 2 arguments that make no sense; with --watch 128 plus the number of
/// the signal that ended it.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  qcow2fs map disk.qcow2
  qcow2fs map --svg disk.svg disk.qcow2
  qcow2fs map --json disk.qcow2
  qcow2fs map --watch --interval 0.5 images/disk.qcow2")]
pub(super) struct Args {
    /// Draw the picture into this file, as SVG
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "watch"])]
    svg: Option<PathBuf>,
    /// Print the extents of the file as JSON
    #[arg(long, conflicts_with = "watch")]
    json: bool,
    /// Show it again and again, until it is interrupted; a line each time where there is no terminal
    #[arg(long, short)]
    watch: bool,
    #[command(flatten)]
    every: Every,
    /// How much of the file one block is; without it, what makes the picture fit
    #[arg(long, value_name = "SIZE", value_parser = size::parse_some)]
    block: Option<u64>,
    /// The image
    image: PathBuf,
}

/// Runs the command; returns the exit code.
pub(super) fn run(args: &Args) -> i32 {
    let done = match args {
        Args { watch: true, .. } => watch(args),
        Args { json: true, .. } => print_json(args).map(|()| 0),
        Args { svg: Some(file), .. } => draw(args, file).map(|()| 0),
        _ => print(args).map(|()| 0),
    };
    done.unwrap_or_else(|line| {
        eprintln!("qcow2fs map: {}: {line}", args.image.display());
        1
    })
}

/// What one look at an image shows.
struct View {
    survey: Survey,
    /// Bytes of each kind.
    bytes: [u64; Kind::COUNT],
    mount: Option<Mounted>,
}

impl View {
    /// Looks at an image, and tells `see` every extent. `see` is told anew when the look has to be
    /// taken again, which `None` says.
    fn take(
        path: &Path,
        watch: &dyn Watch,
        mount: Option<Mounted>,
        mut see: impl FnMut(Option<Extent>),
    ) -> Result<View> {
        let mut attempt = 0;
        loop {
            let file = super::check::open(path, false)?;
            let mut bytes = [0; Kind::COUNT];
            see(None);
            let survey = extents::of(file, watch, |extent| {
                bytes[extent.kind as usize] += extent.length;
                see(Some(extent));
            })?;
            attempt += 1;
            if survey.damaged == 0 || attempt == ATTEMPTS {
                return Ok(View { survey, bytes, mount });
            }
        }
    }

    /// Bytes of the file that the host has blocks for.
    fn on_host(&self) -> u64 {
        let kinds = Kind::ALL.into_iter().filter(|kind| kind.takes_space());
        kinds.map(|kind| self.bytes[kind as usize]).sum()
    }

    /// The file's length once it is as short as it can be.
    fn shortest(&self) -> u64 {
        let used = self.survey.used.saturating_mul(self.survey.cluster_size);
        used.min(self.survey.file_length)
    }

    fn headline(&self, path: &Path) -> String {
        format!(
            "{}: disk {}, file {}, on the host {}",
            path.display(),
            size::show(self.survey.virtual_size),
            size::show(self.survey.file_length),
            size::show(self.on_host())
        )
    }

    fn fragmentation(&self) -> String {
        let Survey { allocated, fragmented, .. } = self.survey;
        let percent = fragmented as f64 * 100.0 / allocated.max(1) as f64;
        format!(
            "{percent:.1} % fragmented: {fragmented} of {allocated} clusters do not follow the one before"
        )
    }

    fn prospect(&self) -> String {
        let (length, shortest) = (self.survey.file_length, self.shortest());
        if length - shortest < self.survey.cluster_size {
            return "compaction: the file is as short as it can be".into();
        }
        let how = match self.survey.behind.saturating_mul(self.survey.cluster_size) {
            0 => "without moving anything".to_owned(),
            moved => format!("by moving {}", size::show(moved)),
        };
        let (less, shortest) = (size::show(length - shortest), size::show(shortest));
        format!("compaction: {less} shorter, to {shortest}, {how}")
    }

    /// The lines below the picture.
    fn summary(&self) -> Vec<String> {
        let mut lines = vec![self.fragmentation(), self.prospect()];
        if self.survey.damaged > 0 {
            lines.push(format!(
                "{} entries make no sense and are left out: see `qcow2fs check`",
                self.survey.damaged
            ));
        }
        lines
    }

    /// Which mount has it open.
    fn where_open(&self) -> Option<String> {
        let mount = self.mount.as_ref()?;
        let line =
            format!("open in the mount at {}, as {}", mount.mountpoint().display(), mount.name());
        Some(terminal::plain(&line))
    }
}

/// Has the mount write what it has in memory.
fn flush(mount: &Mounted) {
    // One that may not be opened shows the picture of what was written so far.
    let file = shown::open(&mount.raw_file(), File::options().read(true));
    let _ = file.and_then(|file| file.sync_all());
}

/// The picture and the view of an image that is looked at once.
fn look(args: &Args, room: usize) -> Result<(View, Picture), String> {
    let mount = Mounted::open_in(&args.image);
    mount.iter().for_each(flush);
    let progress = Checking::new(args.image.display().to_string(), !terminal::is_terminal());
    look_through(args, room, mount, &progress)
}

fn look_through(
    args: &Args,
    room: usize,
    mount: Option<Mounted>,
    watch: &dyn Watch,
) -> Result<(View, Picture), String> {
    let length = args.image.metadata().map_err(|e| format!("opening the image: {e}"))?.len();
    let mut picture = Picture::new(length, room, args.block);
    let view = View::take(&args.image, watch, mount, |extent| match extent {
        None => picture.clear(),
        Some(extent) => picture.add(&extent),
    });
    Ok((view.map_err(|e| e.to_string())?, picture))
}

/// How many blocks go in a line, and how many lines of text are left for the picture.
fn window(colours: bool) -> (usize, usize) {
    let (columns, lines) = terminal::size();
    let columns = columns.saturating_sub(2).clamp(16, 160);
    let lines = lines.saturating_sub(12).clamp(4, 60);
    // A character shows two blocks, one above the other, where there are colours.
    (columns, if colours { lines * 2 } else { lines })
}

fn page(args: &Args, view: &View, picture: &Picture, columns: usize, colours: bool) -> Vec<String> {
    let block = size::show(picture.block());
    let headline = terminal::plain(&view.headline(&args.image));
    let mut lines = vec![format!("{}, one block is {block}", terminal::bold(&headline, colours))];
    lines.extend(picture.lines(columns, colours).into_iter().map(|line| format!(" {line}")));
    lines.extend(picture::legend(&view.bytes, columns, colours));
    lines.extend(view.summary());
    lines.extend(view.where_open());
    lines
}

fn print(args: &Args) -> Result<(), String> {
    let colours = terminal::has_colours();
    let (columns, rows) = window(colours);
    let (view, picture) = look(args, columns * rows)?;
    let lines = page(args, &view, &picture, columns, colours);
    // A closed pipe is nobody's business here.
    let _ = writeln!(std::io::stdout(), "{}", lines.join("\n"));
    Ok(())
}

fn draw(args: &Args, file: &Path) -> Result<(), String> {
    if is_image(file) {
        let file = file.display();
        return Err(format!("{file} is an image, which a picture is not to replace"));
    }
    let (view, picture) = look(args, svg::ROOM)?;
    let name = args.image.file_name().unwrap_or(args.image.as_os_str());
    let text = svg::draw(&name.to_string_lossy(), &view, &picture);
    std::fs::write(file, text).map_err(|e| format!("writing {}: {e}", file.display()))
}

/// Whether there is a qcow2 image by that name, as where a pattern of names was meant to be one image.
fn is_image(path: &Path) -> bool {
    use std::io::Read;
    let mut start = [0; 4];
    let opened = super::check::open(path, false);
    opened.is_ok_and(|mut file| file.read_exact(&mut start).is_ok() && start == MAGIC.to_be_bytes())
}

fn print_json(args: &Args) -> Result<(), String> {
    #[derive(Serialize)]
    struct Json<'a> {
        filename: std::borrow::Cow<'a, str>,
        #[serde(flatten)]
        survey: &'a Survey,
        /// What compaction makes of the file.
        shortest: u64,
        on_host: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        mountpoint: Option<&'a Path>,
        bytes: std::collections::BTreeMap<&'static str, u64>,
        extents: &'a [Extent],
    }
    let mount = Mounted::open_in(&args.image);
    mount.iter().for_each(flush);
    let mut all: Vec<Extent> = Vec::new();
    let view = View::take(&args.image, &(), mount, |extent| match extent {
        None => all.clear(),
        Some(extent) => extents::join(&mut all, extent),
    });
    let view = view.map_err(|e| e.to_string())?;
    let json = Json {
        filename: args.image.to_string_lossy(),
        survey: &view.survey,
        shortest: view.shortest(),
        on_host: view.on_host(),
        mountpoint: view.mount.as_ref().map(Mounted::mountpoint),
        bytes: Kind::ALL.iter().map(|kind| (kind.name(), view.bytes[*kind as usize])).collect(),
        extents: &all,
    };
    let text = serde_json::to_string_pretty(&json).map_err(|e| format!("writing JSON: {e}"))?;
    let _ = writeln!(std::io::stdout(), "{text}");
    Ok(())
}

fn watch(args: &Args) -> Result<i32, String> {
    let colours = terminal::has_colours();
    Live::new(&args.every, Duration::from_secs(1))?.run(|on_screen| {
        let (columns, rows) = window(colours);
        let mount = Mounted::open_in(&args.image);
        let does = mount.as_ref().and_then(|mount| mount.status().ok());
        let does = does.map(|status| super::status::recycler(&status)).unwrap_or_default();
        let (view, picture) = look_through(args, columns * rows, mount, &())?;
        if !on_screen {
            let line = format!("{}; {}", view.headline(&args.image), view.prospect());
            return Ok(vec![terminal::plain(&line)]);
        }
        let mut lines = page(args, &view, &picture, columns, colours);
        lines.extend(does.lines().map(|line| line.trim().to_owned()));
        Ok(lines)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_says_what_compaction_would_win() {
        let survey = Survey {
            cluster_size: 65536,
            virtual_size: 1 << 30,
            file_length: 10 << 20,
            used: 32,
            behind: 8,
            allocated: 24,
            fragmented: 6,
            damaged: 0,
        };
        let mut view = View { survey, bytes: [0; Kind::COUNT], mount: None };
        assert_eq!(
            view.summary(),
            [
                "25.0 % fragmented: 6 of 24 clusters do not follow the one before",
                "compaction: 8.0 MiB shorter, to 2.0 MiB, by moving 512.0 KiB",
            ]
        );
        view.survey.behind = 0;
        let line = "compaction: 8.0 MiB shorter, to 2.0 MiB, without moving anything";
        assert_eq!(view.prospect(), line);
        view.survey.file_length = 2 << 20;
        assert_eq!(view.prospect(), "compaction: the file is as short as it can be");
    }
}
