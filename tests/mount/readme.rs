//! README, followed word by word: the lines after `#` in its sessions are typed one after the other,
//! and what it shows of their output is what comes. Only paths and loop devices are others.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::boot::Helper;
use crate::lab::{Lab, Mount, PROGRAM, attempt, eventually, is_mounted};

const README: &str = include_str!("../../README.md");
/// How far a number in the output may be from the one that README shows: file systems differ.
const TOLERANCE: f64 = 0.15;
const SMALL: f64 = 2.0;
/// What only looks at files is repeated until it shows what it should: space comes back in its own
/// time.
const LOOKS: [&str; 2] = ["du ", "ls "];
const SOON: Duration = Duration::from_secs(60);

/// The fenced blocks of README in one language, in their order.
fn blocks(language: &str) -> Vec<&'static str> {
    let fences: Vec<_> = README.split("```").collect();
    let inside = fences.iter().skip(1).step_by(2);
    inside.filter_map(|block| block.strip_prefix(language)?.strip_prefix('\n')).collect()
}

/// A command, without the remark at its end, and the lines that README shows after it.
struct Step {
    command: &'static str,
    output: Vec<&'static str>,
}

fn steps(block: &'static str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for line in block.lines() {
        match (line.strip_prefix("# "), steps.last_mut()) {
            (Some(line), _) => {
                let command = line.split("  #").next().unwrap().trim();
                steps.push(Step { command, output: Vec::new() });
            }
            (None, Some(last)) if line != "  ..." => last.output.push(line),
            (None, last) => assert!(last.is_some(), "{line:?} is no output of a command"),
        }
    }
    steps
}

/// The number in a word and what stands around it: `(9.7G` is 9.7 between `(` and `G`.
fn number(word: &str) -> Option<(&str, f64, &str)> {
    let start = word.find(|c: char| c.is_ascii_digit())?;
    let is_number = |c: char| c.is_ascii_digit() || c == '.';
    let end = word[start..].find(|c| !is_number(c)).map_or(word.len(), |length| start + length);
    Some((&word[..start], word[start..end].parse().ok()?, &word[end..]))
}

fn is_like(shown: &str, came: &str) -> bool {
    match (number(shown), number(came)) {
        (Some((a, shown, b)), Some((c, came, d))) => {
            (a, b) == (c, d) && (shown - came).abs() <= (shown * TOLERANCE).max(SMALL)
        }
        _ => shown == came,
    }
}

/// A newcomer at a terminal, with a directory of their own.
struct Session {
    lab: Lab,
    /// What README writes, and what it is here.
    names: BTreeMap<String, String>,
}

impl Session {
    fn new() -> Session {
        let lab = Lab::new();
        let places = ["/mnt/raw", "/mnt/disk", "/mnt/then"];
        let here = |place: &str| lab.path(&place[1..].replace('/', "-")).display().to_string();
        let mut names: BTreeMap<_, _> =
            places.iter().map(|place| ((*place).to_owned(), here(place))).collect();
        names.insert("/images".to_owned(), lab.images().display().to_string());
        // It is made by the first line.
        fs::remove_dir(lab.images()).unwrap();
        Session { lab, names }
    }

    fn here(&self, text: &str) -> String {
        let replace = |text: String, (theirs, ours): (&String, &String)| text.replace(theirs, ours);
        self.names.iter().rev().fold(text.to_owned(), replace)
    }

    fn type_in(&mut self, step: &Step) {
        let directory = self.lab.path("");
        let program = std::path::Path::new(PROGRAM).parent().unwrap().display();
        let script = format!(
            "cd {}; PATH={program}:$PATH; {}",
            directory.display(),
            self.here(step.command)
        );
        let last = RefCell::new(String::new());
        let mut shows = || {
            let outcome = attempt(&script);
            assert!(outcome.ok(), "{}: {}", step.command, outcome.text());
            let shown = step.output.is_empty() || self.is_shown(&step.output, &outcome.text());
            *last.borrow_mut() = outcome.text();
            shown
        };
        let state = || format!("{}:\n{:?}\n{}", step.command, step.output, last.borrow());
        match LOOKS.iter().any(|look| step.command.starts_with(look)) {
            true => eventually(SOON, shows, state),
            false => assert!(shows(), "{}", state()),
        }
    }

    /// Whether `came` is what README shows. A loop device has another number here, from then on.
    fn is_shown(&mut self, shown: &[&str], came: &str) -> bool {
        let came: Vec<_> = came.lines().collect();
        let lines = shown.iter().zip(&came);
        let mut same = shown.len() == came.len();
        for (shown, came) in lines {
            let (shown, came) = (shown.split_whitespace(), came.split_whitespace());
            let (shown, came): (Vec<_>, Vec<_>) = (shown.collect(), came.collect());
            same &= shown.len() == came.len();
            for (shown, came) in shown.iter().zip(came) {
                let is_device = |word: &str| word.starts_with("/dev/loop");
                if is_device(shown) && is_device(came) {
                    self.names.insert((*shown).to_owned(), came.to_owned());
                }
                same &= is_like(&self.here(shown), came);
            }
        }
        same
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // What a session that failed has left.
        let (images, disk) = (self.lab.images(), self.here("/mnt/disk"));
        for point in [self.here("/mnt/then"), disk] {
            if is_mounted(point.as_ref()) {
                attempt!("umount -l {point}");
            }
        }
        attempt!(
            "$qcow2fs detach {}/disk.qcow2 || true; \
             for device in $(losetup -n -O NAME,BACK-FILE | grep {}/ | cut -d' ' -f1); \
             do losetup -d $device; done",
            images.display(),
            self.here("/mnt/raw")
        );
        let raw = self.here("/mnt/raw");
        if is_mounted(raw.as_ref()) {
            attempt!("umount -l {raw}");
        }
    }
}

#[test]
fn the_sessions_of_readme_go_as_it_says() {
    let mut session = Session::new();
    let steps: Vec<_> = blocks("console").into_iter().flat_map(steps).collect();
    assert!(steps.len() > 25, "README has only {} steps", steps.len());
    let with_output = steps.iter().filter(|step| !step.output.is_empty()).count();
    assert!(with_output > 4, "README shows only {with_output} outputs");
    for step in &steps {
        session.type_in(step);
    }
    for place in ["/mnt/raw", "/mnt/disk", "/mnt/then"] {
        assert!(!is_mounted(session.here(place).as_ref()), "{place} is left");
    }

    // Its lines for fstab mount what the sessions have left.
    let helper = Helper::new(&session.lab);
    let lines = session.here(blocks("fstab")[0]).replace("fuse.qcow2fs", &helper.kind);
    let table = session.lab.path("fstab");
    fs::write(&table, lines).unwrap();
    sh!("mount -T {} -a -t {},ext4", table.display(), helper.kind);
    assert!(is_mounted(session.here("/mnt/disk").as_ref()));
    let mount = Mount::adopt(session.here("/mnt/raw").into(), session.lab.path("log"));
    sh!("umount {}", session.here("/mnt/disk"));
    mount.umount();
}

#[test]
fn readme_leads_to_files_and_options_that_exist() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let links = README.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    for link in links.filter(|link| !link.starts_with("http")) {
        match link.strip_prefix('#') {
            None => assert!(root.join(link).exists(), "{link}"),
            Some(anchor) => {
                let headings = README.lines().filter_map(|line| line.strip_prefix("## "));
                let mut anchors = headings.map(|h| h.to_lowercase().replace(' ', "-"));
                assert!(anchors.any(|found| found == anchor), "{link}");
            }
        }
    }
    let ran = |arguments: &[&str]| Command::new(PROGRAM).args(arguments).output().unwrap();
    let commands = README.match_indices("`qcow2fs ").map(|(at, _)| &README[at + 9..]);
    for command in commands.filter_map(|text| text.split(['`', ' ']).next()) {
        assert!(ran(&[command, "--help"]).status.success(), "qcow2fs {command}");
    }
    // Each option is one of some command's, or of a script's.
    let help = |name: &str| String::from_utf8_lossy(&ran(&[name, "--help"]).stdout).into_owned();
    let names = [
        "mount", "umount", "status", "watch", "create", "check", "info", "map", "resize",
        "compact", "attach", "detach", "snapshot",
    ];
    let all: String = names.map(help).concat();
    let scripts = ["--static", "--long", "--out", "--path", "--sparse"];
    let options = README.match_indices("`--").map(|(at, _)| &README[at + 1..]);
    for option in options.filter_map(|text| text.split(['`', ' ', '=']).next()) {
        assert!(all.contains(option) || scripts.contains(&option), "{option}");
    }
}
