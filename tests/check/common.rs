//! Images made by QEMU, and QEMU's verdict on them.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use qcow2fs::check::{Report, check};
use qcow2fs::storage::HostFile;
use serde_json::Value;

/// A directory in memory where the machine has one.
pub fn directory() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.unwrap()
}

/// Runs a program, at most a minute.
pub fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new("timeout").arg("60").arg(program).args(args).output().unwrap();
    assert_ne!(output.status.code(), Some(124), "{program} {args:?} took too long");
    output
}

/// Runs a program that must succeed.
pub fn must(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Creates an image with these options.
pub fn create(path: &Path, options: &str, size: &str) {
    must("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), size]);
}

/// Runs qemu-io commands on an image.
pub fn io(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(path.to_str().unwrap());
    must("qemu-io", &args);
}

/// What `qemu-img check` says: its exit code and its JSON (null where it gave none).
pub fn qemu_check(path: &Path) -> (i32, Value) {
    qemu_check_with(&["-f", "qcow2", path.to_str().unwrap()])
}

/// The same for an image that needs other arguments.
pub fn qemu_check_with(image: &[&str]) -> (i32, Value) {
    let output = run("qemu-img", &[&["check", "--output=json"], image].concat());
    (output.status.code().unwrap(), serde_json::from_slice(&output.stdout).unwrap_or(Value::Null))
}

/// Our own report on an image.
pub fn our_check(path: &Path) -> Report {
    check(&open(path)).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// An image as storage.
pub fn open(path: &Path) -> HostFile {
    HostFile::new(std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap())
}

/// Our report must say what QEMU says, number by number.
pub fn assert_same_verdict(what: &str, report: &Report, (code, json): &(i32, Value)) {
    let ours = serde_json::to_value(report).unwrap();
    for key in [
        "corruptions",
        "leaks",
        "total-clusters",
        "allocated-clusters",
        "fragmented-clusters",
        "compressed-clusters",
        "image-end-offset",
    ] {
        let theirs = json.get(key).and_then(Value::as_u64).unwrap_or(0);
        assert_eq!(ours[key].as_u64(), Some(theirs), "{what}: {key}: {:?} {json}", report.findings);
    }
    assert_eq!(report.exit_code(), *code, "{what}");
}

/// An image with a bit of everything that needs no special features: data, zeros, holes, and more
/// than one L2 table.
pub fn varied(directory: &Path, name: &str, options: &str) -> PathBuf {
    let path = directory.join(name);
    create(&path, options, "64M");
    io(
        &path,
        &[
            "write -P 1 0 200k",
            "write -P 2 1M 4k",
            "write -P 3 33M 100k",
            "write -z 64k 64k",
            "discard 128k 64k",
            "write -P 4 63M 1M",
        ],
    );
    path
}

/// The guest's view of an image, if QEMU can read it.
pub fn content(path: &Path) -> Option<Vec<u8>> {
    let raw = path.with_extension("raw");
    let args =
        ["convert", "-f", "qcow2", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()];
    run("qemu-img", &args).status.success().then(|| std::fs::read(&raw).unwrap())
}

/// The guest's view of an image as far as QEMU can read it.
pub struct Salvaged {
    bytes: Vec<u8>,
    /// Sectors that cannot be read, which are zeros in `bytes`.
    unreadable: HashSet<u64>,
}

/// The guest's view of an image, if QEMU can open it.
pub fn salvaged(path: &Path) -> Option<Salvaged> {
    let raw = path.with_extension("raw");
    let (from, to) = (path.to_str().unwrap(), raw.to_str().unwrap());
    let args = ["convert", "--salvage", "-f", "qcow2", "-O", "raw", from, to];
    let output = run("qemu-img", &args);
    let messages = String::from_utf8_lossy(&output.stderr).into_owned();
    let unreadable = messages.lines().filter_map(|line| {
        let (_, rest) = line.split_once("error while reading offset ")?;
        let (offset, _) = rest.split_once(':')?;
        Some(offset.parse::<u64>().unwrap() / 512)
    });
    let unreadable = unreadable.collect();
    output.status.success().then(|| Salvaged { bytes: std::fs::read(&raw).unwrap(), unreadable })
}

impl Salvaged {
    /// The first sector that could be read here and is not the same `after`.
    pub fn first_loss(&self, after: &Salvaged) -> Option<String> {
        if self.bytes.len() != after.bytes.len() {
            return Some(format!("{} bytes became {}", self.bytes.len(), after.bytes.len()));
        }
        let sectors = self.bytes.chunks(512).zip(after.bytes.chunks(512));
        (0..).zip(sectors).find_map(|(sector, (one, other))| {
            if self.unreadable.contains(&sector) {
                return None;
            }
            match after.unreadable.contains(&sector) {
                true => Some(format!("sector {sector} can no longer be read")),
                false => (one != other).then(|| format!("sector {sector} has changed")),
            }
        })
    }
}

/// A small generator of numbers; the same seed gives the same numbers.
pub struct Random(pub u64);

impl Random {
    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}
