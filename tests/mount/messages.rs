//! Every error that a person can meet at the command line says what, where, and what to do, in a
//! line; and nothing of how this program is built.

use std::collections::BTreeMap;
use std::fs::{self, File};

use clap::Command;

use crate::lab::{Lab, Outcome};

/// What no message may say: types, traits and functions of Rust, and how a defect looks.
const FORBIDDEN: [&str; 16] = [
    "::",
    "Some(",
    "None",
    "Ok(",
    "Err(",
    "Error {",
    "ErrorKind",
    "Utf8",
    "unwrap",
    "panicked",
    "backtrace",
    "RUST_",
    "src/",
    ".rs:",
    "thread '",
    "{",
];

/// The message of a command that failed: one line that says what it is about.
fn check(script: &str, outcome: &Outcome, about: &str) -> String {
    let said = || format!("{script}\n{outcome:?}");
    assert!(matches!(outcome.code, Some(1 | 2 | 63)), "{}", said());
    let line = outcome.err.trim_end_matches('\n');
    assert!(!line.is_empty() && !line.contains('\n'), "more than a line: {}", said());
    assert!(line.len() <= 400, "too long: {}", said());
    assert!(line.starts_with("qcow2fs"), "{}", said());
    for word in FORBIDDEN {
        assert!(!line.contains(word), "{word:?} in {}", said());
    }
    assert!(line.contains(about), "it does not name {about:?}: {}", said());
    assert!(!line.ends_with(['.', ':', ' ']), "{}", said());
    line.to_owned()
}

/// Files that are no sound images, by name, and a word that each message about it has to have.
fn bad_files(lab: &Lab) -> BTreeMap<&'static str, &'static str> {
    let sound = fs::read(lab.create("sound.qcow2", "8M", "")).unwrap();
    let with = |name: &str, at: usize, bytes: &[u8]| {
        let mut image = sound.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(lab.image(name), image).unwrap();
    };
    fs::write(lab.image("empty.qcow2"), "").unwrap();
    fs::write(lab.image("text.qcow2"), "no image at all\n".repeat(100)).unwrap();
    fs::write(lab.image("short.qcow2"), &sound[..80]).unwrap();
    with("version.qcow2", 4, &7u32.to_be_bytes());
    with("clusters.qcow2", 20, &40u32.to_be_bytes());
    with("feature.qcow2", 72, &(1u64 << 40).to_be_bytes());
    with("l1.qcow2", 36, &u32::MAX.to_be_bytes());
    fs::create_dir(lab.image("directory.qcow2")).unwrap();
    sh!("mkfifo {}", lab.image("fifo.qcow2").display());
    std::os::unix::fs::symlink("nowhere", lab.image("link.qcow2")).unwrap();
    BTreeMap::from([
        ("empty.qcow2", "qcow2"),
        ("text.qcow2", "magic"),
        ("short.qcow2", "header"),
        ("version.qcow2", "version 7"),
        ("clusters.qcow2", "cluster"),
        ("feature.qcow2", "feature bit 40"),
        ("l1.qcow2", "L1"),
        ("directory.qcow2", "regular file"),
        ("fifo.qcow2", "regular file"),
        ("link.qcow2", "No such file"),
        ("missing.qcow2", "No such file"),
    ])
}

#[test]
fn a_bad_file_is_named_and_so_is_what_is_wrong_with_it() {
    let lab = Lab::new();
    let mut lines = Vec::new();
    for (name, why) in bad_files(&lab) {
        let image = lab.image(name);
        for command in [
            "info",
            "check",
            "check --repair all",
            "map",
            "map --json",
            "compact",
            "compact --dry-run",
            "snapshot list",
        ] {
            let script = format!("$qcow2fs {command} {}", image.display());
            let outcome = attempt!("{script}");
            // What only reads its header shows what it can of an image with an unknown feature.
            if outcome.ok() && name == "feature.qcow2" {
                continue;
            }
            lines.push(check(&script, &outcome, name));
            assert!(outcome.err.contains(why), "{why:?} is not said: {script}\n{outcome:?}");
        }
        for command in ["resize {} 1G", "snapshot create {} s", "snapshot delete {} s"] {
            let script = format!("$qcow2fs {}", command.replace("{}", &image.to_string_lossy()));
            lines.push(check(&script, &attempt!("{script}"), name));
        }
    }
    assert!(lines.len() > 100, "{}", lines.len());
}

#[test]
fn arguments_that_make_no_sense_are_named() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let disk = image.display();
    let images = lab.images();
    let (images, missing) = (images.display(), lab.path("missing"));
    let missing = missing.display();
    let no_mount = lab.path("");
    let no_mount = no_mount.display();
    for (arguments, about) in [
        ("frobnicate".to_owned(), "frobnicate"),
        ("info".to_owned(), "IMAGE"),
        ("info --frob x".to_owned(), "--frob"),
        (format!("resize {disk} 10X"), "10X"),
        (format!("resize {disk} 1.5"), "'1.5'"),
        (format!("resize {disk} 99999999T"), "99999999T"),
        (format!("resize {disk} 1M"), "--shrink"),
        (format!("resize {disk} 8000000T"), "disk.qcow2"),
        (format!("map --interval 0 {disk}"), "'0'"),
        (format!("map --svg x --json {disk}"), "--json"),
        (format!("map --svg {missing}/x.svg {disk}"), "missing/x.svg"),
        (format!("create {disk} 1G"), "--force"),
        (format!("create {missing}/x.qcow2 1G"), "missing/x.qcow2"),
        (format!("create {images}/x.qcow2"), "SIZE"),
        (format!("create -b y {images}/x.qcow2"), "--backing-format"),
        (format!("create --cluster-size 3K {images}/x.qcow2 1G"), "x.qcow2"),
        (format!("create --refcount-bits 5 {images}/x.qcow2 1G"), "x.qcow2"),
        (format!("create --compression-type lzo {images}/x.qcow2 1G"), "lzo"),
        (format!("create --cluster-size 512 {images}/x.qcow2 1000T"), "x.qcow2"),
        (format!("create -b base -F raw --preallocation full {images}/x.qcow2 1G"), "backing"),
        (format!("status {no_mount}"), "no qcow2fs is mounted"),
        (format!("watch {no_mount}"), "no qcow2fs is mounted"),
        (format!("umount {no_mount}"), "no qcow2fs is mounted"),
        (format!("umount {missing}"), "missing"),
        (format!("mount {missing} {no_mount}"), "missing"),
        (format!("mount {images} {missing}"), "missing"),
        (format!("mount {images} {images}"), "itself"),
        (format!("mount -o frob {images} {}", lab.point().display()), "'frob'"),
        (format!("mount --keep-erased much {images} {}", lab.point().display()), "'much'"),
        (format!("mount --compact-after 200% {images} {}", lab.point().display()), "200%"),
        (format!("mount --allow {missing} {images} {}", lab.point().display()), "missing"),
        (format!("snapshot apply {disk} no-such"), "no-such"),
        (format!("snapshot delete {disk} no-such"), "no-such"),
        (format!("compact --allow {missing} {disk}"), "missing"),
        (format!("create --data-file {missing}/x.data {images}/x.qcow2 1G"), "missing/x.data"),
        (format!("create --data-file disk.qcow2 {images}/x.qcow2 1G"), "disk.qcow2"),
        (format!("create --data-file-raw {images}/x.qcow2 1G"), "--data-file"),
        (format!("attach {missing}"), "missing"),
        (format!("attach {images}"), "neither an image"),
        (format!("attach {disk} {missing}/point"), "missing/point"),
        (format!("attach --partition 0 {disk}"), "'0'"),
        (format!("attach --partition 9 {disk}"), "9"),
        (format!("detach {missing}"), "attach"),
        ("detach".to_owned(), "IMAGE"),
        ("snapshot frob".to_owned(), "'frob'"),
        (format!("mount --ephemeral {images} {}", lab.point().display()), "--overlay"),
        (
            format!("mount --passthrough --overlay /tmp {images} {}", lab.point().display()),
            "--passthrough and --overlay exclude each other",
        ),
        (format!("mount --overlay {missing} {images} {}", lab.point().display()), "missing"),
        (format!("mount --keys {missing} {images} {}", lab.point().display()), "missing"),
        (format!("mount --key-file abc {images} {}", lab.point().display()), "NAME=FILE"),
        (format!("mount --unconfined frob {images} {}", lab.point().display()), "'frob'"),
        (format!("mount --log-file {missing}/log {images} {}", lab.point().display()), "missing"),
        (format!("mount --create-cluster-size 3K {images} {}", lab.point().display()), "3072"),
        (format!("mount -o create_compression=lzo {images} {}", lab.point().display()), "'lzo'"),
    ] {
        let script = format!("$qcow2fs {arguments}");
        check(&script, &attempt!("{script}"), about);
    }
    assert!(!lab.image("x.qcow2").exists(), "made in spite of an error");
}

#[test]
fn an_image_in_use_is_said_to_be_with_who_uses_it() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let mount = lab.mount();
    let file = File::options().write(true).open(mount.path("disk.raw")).unwrap();
    for command in ["check", "check --repair all", "compact --dry-run", "snapshot apply {} s"] {
        let command = match command.contains("{}") {
            true => command.replace("{}", &image.to_string_lossy()),
            false => format!("{command} {}", image.display()),
        };
        let script = format!("$qcow2fs {command}");
        let line = check(&script, &attempt!("{script}"), "disk.qcow2");
        assert!(line.contains("in use") && line.contains("qcow2fs"), "{line}");
    }
    let script = format!("$qcow2fs create --force {} 1G", image.display());
    assert!(check(&script, &attempt!("{script}"), "disk.qcow2").contains("in use"));
    drop(file);
    mount.umount();
}

/// The commands that do something by themselves, with the words that call them: `snapshot list`.
fn commands() -> Vec<(String, Command)> {
    let with_name = |command: &Command, before: &str| {
        (format!("{before}{}", command.get_name()), command.clone())
    };
    let program = qcow2fs::cli::command();
    let mut all = Vec::new();
    for command in program.get_subcommands() {
        let (name, _) = with_name(command, "");
        let beneath: Vec<_> = command.get_subcommands().collect();
        match beneath.is_empty() {
            true => all.push((name, command.clone())),
            false => {
                let before = format!("{name} ");
                all.extend(beneath.into_iter().map(|command| with_name(command, &before)));
            }
        }
    }
    all
}

fn has_json(command: &Command) -> bool {
    command.get_arguments().any(|argument| argument.get_long() == Some("json"))
}

#[test]
fn every_command_has_help_and_names_an_option_that_it_does_not_know() {
    let all = commands();
    assert!(all.len() > 14, "{}", all.len());
    for (name, _) in all {
        let help = attempt!("$qcow2fs {name} --help");
        assert!(help.ok() && help.err.is_empty(), "{name}: {help:?}");
        assert!(help.out.contains(&format!("Usage: qcow2fs {name}")), "{name}: {}", help.out);
        assert!(!help.out.contains('\x1b'), "{name}: colours where there is no terminal");
        let on_terminal =
            sh!("TERM=xterm NO_COLOR=1 script -qec '$qcow2fs {name} --help' /dev/null");
        assert!(!on_terminal.contains("\x1b[3"), "{name}: {on_terminal:?}");
        let script = format!("$qcow2fs {name} --frobnicate");
        let outcome = attempt!("{script}");
        check(&script, &outcome, "--frobnicate");
        // 2 would be the verdict that the image is corrupt.
        assert_eq!(outcome.code, Some(if name == "check" { 1 } else { 2 }), "{name}");
    }
}

#[test]
fn what_is_json_is_json_and_nothing_else() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let mount = lab.mount();
    let (image, point) = (image.display(), mount.point().display());
    // An attachment is made and undone elsewhere: `attach.rs` reads its JSON.
    let scripts = BTreeMap::from([
        ("attach", String::new()),
        ("check", format!("check --json {image}")),
        ("compact", format!("compact --dry-run --json {image}")),
        ("info", format!("info --json {image}")),
        ("map", format!("map --json {image}")),
        ("snapshot list", format!("snapshot list --json {image}")),
        ("status", format!("status --json {point}")),
    ]);
    let with_json = commands().into_iter().filter(|(_, command)| has_json(command));
    let names: Vec<_> = with_json.map(|(name, _)| name).collect();
    let mut known: Vec<_> = scripts.keys().copied().collect();
    known.sort_by_key(|name| names.iter().position(|other| other == name));
    assert_eq!(names, known, "commands with --json");
    for script in scripts.values().filter(|script| !script.is_empty()) {
        // How far it is goes to the other output.
        let on_terminal = format!("script -qec '$qcow2fs {script} 2>/dev/null' /dev/null");
        for run in [format!("$qcow2fs {script}"), on_terminal] {
            let text = sh!("export TERM=xterm; {run}");
            let parsed: Result<serde_json::Value, _> = serde_json::from_str(&text);
            assert!(parsed.is_ok(), "{run}: {text:?}");
        }
    }
    mount.umount();
}
