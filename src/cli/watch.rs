//! `qcow2fs watch`: the state of a mount, again and again.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::live::{Every, Live};
use super::{size, status, terminal};

/// Show what a mount does, live
///
/// On a terminal it is drawn over and over until Ctrl-C; elsewhere each look prints a line for each
/// open image. Rates are those since the look before; latencies are those since the image was first
/// opened: what half of the requests and what 99 of 100 took at most.
///
/// Exit code: 0 after --count looks; 1 nothing is mounted there, or it does not answer; 2 arguments
/// that make no sense; 128 plus the number of the signal that ended it.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  qcow2fs watch /mnt/raw
  qcow2fs watch --interval 0.5 /mnt/raw
  qcow2fs watch --count 10 /mnt/raw            # ten looks, for a log")]
pub(super) struct Args {
    #[command(flatten)]
    every: Every,
    /// Where it is mounted
    mountpoint: PathBuf,
}

/// Runs the command; returns the exit code.
pub(super) fn run(args: &Args) -> i32 {
    let done = Live::new(&args.every, Duration::from_secs(1)).and_then(|live| {
        let mut before = Before::default();
        live.run(|on_screen| {
            let status = status::read(&args.mountpoint)?;
            let lines = match on_screen {
                true => screen(&status, &before, terminal::has_colours()),
                false => lines(&status, &before),
            };
            before = Before::of(&status);
            Ok(lines)
        })
    });
    done.unwrap_or_else(|line| {
        eprintln!("qcow2fs: {line}");
        1
    })
}

/// What was counted at the look before.
#[derive(Default)]
pub(super) struct Before {
    at: Option<Instant>,
    /// By the image and what is counted.
    counts: HashMap<(String, String), u64>,
}

/// What is counted, and where it stands in an image's status.
const COUNTED: [(&str, &str); 8] = [
    ("read", "/io/read/bytes"),
    ("reads", "/io/read/count"),
    ("written", "/io/write/bytes"),
    ("writes", "/io/write/count"),
    ("discarded", "/io/discard/bytes"),
    ("flushes", "/io/flush/count"),
    ("punched", "/recycled/punched"),
    ("moved", "/recycled/moved"),
];

impl Before {
    /// What is counted now.
    pub(super) fn of(status: &Value) -> Before {
        let mut counts = HashMap::new();
        for image in images(status) {
            for (what, place) in COUNTED {
                counts.insert((name(image), what.to_owned()), number(image, place));
            }
        }
        Before { at: Some(Instant::now()), counts }
    }

    /// How much was counted a second since then; 0 for what is new, or was opened anew.
    pub(super) fn rate(&self, image: &Value, what: &str) -> u64 {
        let place = COUNTED.iter().find(|(counted, _)| *counted == what).map(|(_, place)| *place);
        let before = self.counts.get(&(name(image), what.to_owned()));
        let (Some(place), Some(before), Some(at)) = (place, before, self.at) else { return 0 };
        let more = number(image, place).saturating_sub(*before);
        (more as f64 / at.elapsed().as_secs_f64().max(0.001)) as u64
    }
}

fn images(status: &Value) -> impl Iterator<Item = &Value> {
    status["images"].as_array().into_iter().flatten()
}

fn name(image: &Value) -> String {
    terminal::plain(image["name"].as_str().unwrap_or("?"))
}

fn number(image: &Value, place: &str) -> u64 {
    image.pointer(place).and_then(Value::as_u64).unwrap_or(0)
}

/// A line for each image.
fn lines(status: &Value, before: &Before) -> Vec<String> {
    let line = |image: &Value| {
        let rate = |what| size::show(before.rate(image, what));
        format!(
            "{}: file {}, on the host {}, read {}/s, written {}/s, discarded {}/s, punched {}/s, \
             moved {}/s, {}",
            name(image),
            size::show(number(image, "/file_length")),
            size::show(number(image, "/allocated")),
            rate("read"),
            rate("written"),
            rate("discarded"),
            rate("punched"),
            rate("moved"),
            status::condition(image)
        )
    };
    match images(status).next() {
        Some(_) => images(status).map(line).collect(),
        None => vec!["no image is open".into()],
    }
}

/// The whole screen.
fn screen(status: &Value, before: &Before, colours: bool) -> Vec<String> {
    let mut page = vec![terminal::bold(&terminal::plain(&status::headline(status)), colours)];
    if images(status).next().is_none() {
        page.push("no image is open".into());
    }
    for image in images(status) {
        page.push(String::new());
        page.extend(block(image, before, colours));
    }
    let errors = status["errors"].as_array().into_iter().flatten();
    for error in errors.filter_map(|error| error["error"].as_str()) {
        let line = format!("last error: {}", terminal::plain(error));
        page.push(terminal::coloured(&line, terminal::RED, colours));
    }
    page
}

/// What is shown of one image.
fn block(image: &Value, before: &Before, colours: bool) -> Vec<String> {
    let show = |place| size::show(number(image, place));
    let rate = |what| before.rate(image, what);
    let mut lines = vec![
        format!(
            "{}  {}",
            terminal::bold(&name(image), colours),
            status::coloured_condition(image, colours)
        ),
        format!("  {}", bar(image, colours)),
        format!(
            "  disk {}   file {}   on the host {}",
            show("/virtual_size"),
            show("/file_length"),
            show("/allocated")
        ),
    ];
    for (request, bytes, count) in [("read", "read", "reads"), ("write", "written", "writes")] {
        lines.push(format!(
            "  {request:<8}{:>10}/s {:>8} requests/s   {}",
            size::show(rate(bytes)),
            rate(count),
            status::latency(&image["io"][request])
        ));
    }
    lines.push(format!(
        "  discard {:>10}/s   flush {:>4}/s   {}",
        size::show(rate("discarded")),
        rate("flushes"),
        status::latency(&image["io"]["flush"])
    ));
    lines.push(format!(
        "  recycler {:>9}/s punched   {}/s moved   {}",
        size::show(rate("punched")),
        size::show(rate("moved")),
        status::caches(image)
    ));
    lines.extend(status::recycler(image).lines().map(|line| terminal::plain(line.trim_end())));
    lines
}

/// How much of the file's length takes space on the host.
fn bar(image: &Value, colours: bool) -> String {
    const WIDTH: u64 = 40;
    let (allocated, length) = (number(image, "/allocated"), number(image, "/file_length"));
    let filled =
        (allocated.min(length) as u128 * u128::from(WIDTH) / u128::from(length.max(1))) as usize;
    let (full, rest) = ("█".repeat(filled), "░".repeat(WIDTH as usize - filled));
    let percent = allocated as f64 * 100.0 / length.max(1) as f64;
    format!(
        "{}{rest} {percent:.0} % of the file's length",
        terminal::coloured(&full, terminal::BLUE, colours)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(read: u64) -> Value {
        serde_json::json!({
            "source": "/i", "mountpoint": "/m", "pid": 7,
            "images": [{
                "name": "a\u{1b}.raw", "file_length": 1 << 20, "allocated": 1 << 19,
                "condition": "ok", "health": "ok",
                "io": {"read": {"bytes": read, "count": 3, "median": 2048, "percentile_99": 4096}},
            }],
        })
    }

    #[test]
    fn rates_are_those_since_the_look_before_and_names_cannot_move_the_cursor() {
        let first = lines(&status(5000), &Before::default());
        assert!(first[0].contains("read 0 B/s"), "{first:?}");
        assert!(first[0].starts_with("a\u{fffd}.raw: file 1.0 MiB, on the host 512.0 KiB"));
        let mut before = Before::of(&status(0));
        before.at = before.at.and_then(|at| at.checked_sub(Duration::from_secs(1000)));
        let second = lines(&status(5_000_000), &before);
        assert!(second[0].contains("read 4.9 KiB/s"), "{second:?}");
        assert_eq!(lines(&serde_json::json!({}), &before), ["no image is open"]);
        let page = screen(&status(5000), &Before::default(), false).join("\n");
        assert!(!page.contains('\u{1b}') && page.contains("50 % of the file"), "{page}");
    }
}
