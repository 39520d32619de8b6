//! The manual pages and completions, checked against the definition of the command line and the code,
//! and the package that they go into.

// Here a panic is how a test fails.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

#[path = "../examples/documents.rs"]
#[allow(dead_code)]
mod documents;

const FORMAT_PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/packaging/man/qcow2fs.5");

/// The text of a page as people see it, on one line, hyphens as they are typed. Complaints of the
/// formatter are failures.
fn formatted(page: &Path) -> String {
    let output = Command::new("groff")
        .args(["-man", "-ww", "-Tascii", "-P-c", "-P-b", "-P-u", "-rLL=400n"])
        .arg(page)
        .output()
        .expect("tests need groff");
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && complaints.is_empty(), "{}: {complaints}", page.display());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn each_command_has_a_page_that_tells_all_of_its_options() {
    let dir = tempfile::tempdir().unwrap();
    documents::write(dir.path()).unwrap();
    let commands = documents::commands();
    let pages = fs::read_dir(dir.path().join("man1")).unwrap().count();
    assert_eq!(pages, commands.len());
    for command in &commands {
        let title = documents::title(command);
        let text = formatted(&dir.path().join("man1").join(format!("{title}.1")));
        assert!(text.contains(" NAME "), "{title}");
        for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
            let long = argument.get_long().map(|long| format!("--{long}"));
            let short = argument.get_short().map(|short| format!("-{short}"));
            for option in [long, short].into_iter().flatten() {
                assert!(text.contains(&option), "{title} does not tell of {option}");
            }
        }
        let examples = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        for line in examples.lines().filter(|line| line.starts_with("  ")) {
            let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(text.contains(&line), "{title} does not show: {line}");
        }
    }
    let program = formatted(&dir.path().join("man1/qcow2fs.1"));
    for command in commands.iter().skip(1) {
        assert!(program.contains(&documents::title(command)), "qcow2fs(1) does not lead on");
    }
}

#[test]
fn completions_know_each_command_and_their_shells_take_them() {
    let dir = tempfile::tempdir().unwrap();
    documents::write(dir.path()).unwrap();
    let script = |name: &str| dir.path().join("completions").join(name);
    for name in ["qcow2fs.bash", "_qcow2fs", "qcow2fs.fish"] {
        let text = fs::read_to_string(script(name)).unwrap();
        for command in documents::commands() {
            assert!(text.contains(command.get_name()), "{name}: {}", command.get_name());
        }
    }
    // What bash would offer after `qcow2fs at`.
    let complete = "source \"$1\"; COMP_WORDS=(qcow2fs at); COMP_CWORD=1; _qcow2fs qcow2fs at qcow2fs; \
                    echo \"${COMPREPLY[@]}\"";
    let mut bash = Command::new("bash");
    let output = bash.args(["-c", complete, "-"]).arg(script("qcow2fs.bash")).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "attach");
}

#[test]
fn the_page_of_the_files_is_well_formed_and_leads_to_pages_that_exist() {
    let text = formatted(Path::new(FORMAT_PAGE));
    let titles: Vec<String> = documents::commands().iter().map(documents::title).collect();
    for reference in text.split(' ').filter_map(|word| word.split_once("(1)")) {
        let ours = reference.0.starts_with("qcow2fs");
        assert!(!ours || titles.iter().any(|title| title == reference.0), "{}", reference.0);
    }
}

/// What the package has: each file with its mode.
fn contents(package: &str) -> BTreeMap<String, String> {
    let listing = run(Command::new("dpkg-deb").args(["--contents", package]));
    let lines = listing.lines().map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        assert_eq!(fields[1], "root/root", "{line}");
        let name = fields[5].trim_start_matches("./").to_owned();
        (name, fields[0].to_owned())
    });
    lines.filter(|(name, _)| !name.ends_with('/') && !name.is_empty()).collect()
}

fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_package_has_the_program_and_all_that_belongs_to_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let built = run(Command::new(root.join("scripts/package")).current_dir(root));
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), PathBuf::from);
    let package = target.join("package").join(built.trim().rsplit('/').next().unwrap());
    let package = package.to_str().unwrap();
    let files = contents(package);
    let mut expected = vec![
        ("usr/bin/qcow2fs".to_owned(), "-rwxr-xr-x"),
        ("usr/sbin/mount.qcow2fs".to_owned(), "lrwxrwxrwx"),
        ("usr/sbin/mount.fuse.qcow2fs".to_owned(), "lrwxrwxrwx"),
        ("usr/share/man/man8/mount.qcow2fs.8.gz".to_owned(), "lrwxrwxrwx"),
    ];
    let plain = [
        "usr/lib/systemd/system/qcow2fs@.service",
        "usr/share/bash-completion/completions/qcow2fs",
        "usr/share/zsh/vendor-completions/_qcow2fs",
        "usr/share/fish/vendor_completions.d/qcow2fs.fish",
        "usr/share/doc/qcow2fs/copyright",
        "usr/share/doc/qcow2fs/changelog.gz",
        "usr/share/doc/qcow2fs/examples/vms.conf",
        "usr/share/doc/qcow2fs/examples/mnt-disk.mount",
        "usr/share/man/man5/qcow2fs.5.gz",
    ];
    expected.extend(plain.map(|name| (name.to_owned(), "-rw-r--r--")));
    for command in documents::commands() {
        let page = format!("usr/share/man/man1/{}.1.gz", documents::title(&command));
        expected.push((page, "-rw-r--r--"));
    }
    for (name, mode) in expected {
        assert_eq!(files.get(&name).map(String::as_str), Some(mode), "{name} in {files:#?}");
    }
    // Only what belongs there, and unchanged.
    assert!(files.keys().all(|name| name.starts_with("usr/")), "{files:#?}");
    let field = |name: &str| run(Command::new("dpkg-deb").args(["--field", package, name]));
    assert_eq!(field("Package").trim(), "qcow2fs");
    assert_eq!(field("Version").trim(), env!("CARGO_PKG_VERSION"));
    assert!(field("Depends").starts_with("libc6 (>= 2."), "{}", field("Depends"));
    let dir = tempfile::tempdir().unwrap();
    run(Command::new("dpkg-deb").args(["--raw-extract", package]).arg(dir.path()));
    let sums = dir.path().join("DEBIAN/md5sums");
    run(Command::new("md5sum").args(["--check", "--quiet"]).arg(sums).current_dir(dir.path()));
    let version = run(Command::new(dir.path().join("usr/bin/qcow2fs")).arg("--version"));
    assert_eq!(version.trim(), concat!("qcow2fs ", env!("CARGO_PKG_VERSION")));
}
