//! QEMU's own tools: they make the images and judge what became of them.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::luks::{Encryption, KEY};
use super::rng::Rng;

/// Where an image's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataFile {
    /// In the image.
    None,
    /// In an external data file.
    Plain,
    /// In one that is the raw disk by itself.
    Raw,
}

/// What an image is made with.
#[derive(Clone, Debug)]
pub struct Shape {
    /// 2 or 3.
    pub version: u32,
    pub cluster_bits: u32,
    /// 1 to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// Bytes of the virtual disk, a multiple of 512.
    pub size: u64,
    /// QEMU's word for what is allocated at once.
    pub preallocation: &'static str,
    pub lazy_refcounts: bool,
    pub data_file: DataFile,
    /// Whether L2 entries tell subclusters apart; version 3, cluster_bits 14 at least.
    pub extended_l2: bool,
    pub encryption: Encryption,
}

impl Shape {
    /// Version 3, with nothing special.
    pub fn new(cluster_bits: u32, refcount_bits: u32, size: u64) -> Self {
        let (version, preallocation, lazy_refcounts) = (3, "off", false);
        let (data_file, extended_l2) = (DataFile::None, false);
        Shape {
            version,
            cluster_bits,
            refcount_bits,
            size,
            preallocation,
            lazy_refcounts,
            data_file,
            extended_l2,
            encryption: Encryption::None,
        }
    }

    /// The data file of the image at `path`.
    pub fn data_path(&self, path: &Path) -> Option<PathBuf> {
        (self.data_file != DataFile::None).then(|| path.with_extension("data"))
    }

    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The smallest part of the disk that can be mapped.
    pub fn subcluster_size(&self) -> u64 {
        self.cluster_size() / if self.extended_l2 { 32 } else { 1 }
    }

    /// Any shape, of a few to a hundred clusters but not above `most` bytes; the virtual size is
    /// often no multiple of the cluster size.
    pub fn random(rng: &mut Rng, most: u64) -> Self {
        let cluster_bits = rng.within(9..22) as u32;
        let version = if rng.one_in(4) { 2 } else { 3 };
        let refcount_bits = if version == 2 { 16 } else { 1 << rng.within(0..7) };
        let cluster_size = 1 << cluster_bits;
        let longest = (most / cluster_size).clamp(2, 100);
        let clusters = rng.within(1..longest + 1);
        let partial = if rng.one_in(2) { rng.within(0..cluster_size / 512) * 512 } else { 0 };
        let size = (clusters * cluster_size - partial).max(512);
        let preallocation = match rng.within(0..8) {
            0 => "metadata",
            1 => "falloc",
            2 => "full",
            _ => "off",
        };
        let lazy_refcounts = version == 3 && rng.one_in(8);
        let extended_l2 = version == 3 && cluster_bits >= 14 && rng.one_in(2);
        let data_file = match rng.within(0..10) {
            0 | 1 if version == 3 => DataFile::Plain,
            2 if version == 3 => DataFile::Raw,
            _ => DataFile::None,
        };
        let plain = Shape::new(cluster_bits, refcount_bits, size);
        Shape { version, preallocation, lazy_refcounts, extended_l2, data_file, ..plain }
    }

    /// The same shape, encrypted in some way one time in `n`.
    pub fn encrypted_one_in(self, n: u64, rng: &mut Rng) -> Self {
        if rng.one_in(n) { self.encrypted(Encryption::random(rng)) } else { self }
    }

    /// The same shape, encrypted.
    pub fn encrypted(mut self, encryption: Encryption) -> Self {
        self.encryption = encryption;
        // What QEMU then allocates reads as anything, for it as for us.
        self.preallocation = "off";
        if self.data_file == DataFile::Raw {
            self.data_file = DataFile::Plain;
        }
        self
    }

    /// Makes the image at `path`, on `backing` where there is one.
    pub fn create(&self, path: &Path, backing: Option<&Path>) {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "-o", &self.to_string()]);
        if let Some(data) = self.data_path(path) {
            command.args(["-o", &format!("data_file={}", data.display())]);
        }
        if let Some(backing) = backing {
            let qcow2 = backing.extension().is_some_and(|e| e == "qcow2");
            command.args(["-F", if qcow2 { "qcow2" } else { "raw" }, "-b"]).arg(backing);
        }
        if self.encryption != Encryption::None {
            command.args([
                "--object",
                &secret(),
                "-o",
                "encrypt.format=aes,encrypt.key-secret=key",
            ]);
        }
        run(command.arg(path).arg(self.size.to_string()));
        if let Encryption::Luks(parameters) = &self.encryption {
            super::luks::make(path, parameters);
        }
    }
}

/// As options for `qemu-img create -o`.
impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        write!(f, "compat={compat},cluster_size={}", self.cluster_size())?;
        write!(f, ",refcount_bits={},preallocation={}", self.refcount_bits, self.preallocation)?;
        if self.lazy_refcounts {
            write!(f, ",lazy_refcounts=on")?;
        }
        if self.extended_l2 {
            write!(f, ",extended_l2=on")?;
        }
        if self.data_file == DataFile::Raw {
            write!(f, ",data_file_raw=on")?;
        }
        Ok(())
    }
}

fn secret() -> String {
    format!("secret,id=key,data={KEY}")
}

/// A QEMU command on the image at `path`, with its key where it is encrypted.
pub fn on<'a>(command: &'a mut Command, path: &Path) -> &'a mut Command {
    match is_encrypted(path) {
        false => command.args(["-f", "qcow2"]).arg(path),
        true => command.args(["--object", &secret(), "--image-opts"]).arg(options(path)),
    }
}

fn is_encrypted(path: &Path) -> bool {
    let mut header = [0; 36];
    std::fs::File::open(path).unwrap().read_exact(&mut header).unwrap();
    header[35] != 0
}

fn options(path: &Path) -> String {
    format!("driver=qcow2,encrypt.key-secret=key,file.filename={}", path.display())
}

/// Runs a tool that must succeed.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = finish(command);
    let text = text(&output);
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    text
}

fn finish(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

fn text(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!("{}{}", String::from_utf8_lossy(out), String::from_utf8_lossy(err))
}

/// Neither corruption nor a leak.
#[track_caller]
pub fn assert_clean(path: &Path) {
    let output = finish(on(Command::new("qemu-img").arg("check"), path));
    let complaint = text(&output);
    assert_eq!(output.status.code(), Some(0), "qemu-img check {path:?}:\n{complaint}");
}

/// Removes leaks: QEMU leaves one where a compressed write or a snapshot fails.
pub fn repair_leaks(path: &Path) {
    run(on(Command::new("qemu-img").args(["check", "-q", "-r", "leaks"]), path));
}

/// No corruption; leaks may be there. The error is what qemu-img says.
pub fn check_allowing_leaks(path: &Path) -> Result<(), String> {
    let output = finish(on(Command::new("qemu-img").arg("check"), path));
    match output.status.code() {
        Some(0 | 3) => Ok(()),
        _ => Err(text(&output)),
    }
}

/// QEMU reads from the image exactly what `expected` holds, and sees the same size.
#[track_caller]
pub fn assert_same(path: &Path, expected: &[u8]) {
    let raw = path.with_extension("expected");
    std::fs::write(&raw, expected).unwrap();
    let mut command = Command::new("qemu-img");
    command.args(["compare", "--object", &secret(), "--image-opts"]);
    let raw_options = format!("driver=raw,file.filename={}", raw.display());
    let key = if is_encrypted(path) { "encrypt.key-secret=key," } else { "" };
    let file = path.display();
    run(command.arg(raw_options).arg(format!("driver=qcow2,{key}file.filename={file}")));
    std::fs::remove_file(&raw).unwrap();
    // Without strict mode, which also compares what is allocated, zeros at the end are no
    // difference.
    let info = run(Command::new("qemu-img").args(["info", "--output=json"]).arg(path));
    let size = format!("\"virtual-size\": {},", expected.len());
    assert!(info.contains(&size), "not {} bytes: {info}", expected.len());
}

/// The contents of the image as QEMU reads them; of snapshot `snapshot` where one is named.
pub fn contents(path: &Path, snapshot: Option<&str>) -> Vec<u8> {
    let raw = path.with_extension("converted");
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-O", "raw"]);
    if let Some(name) = snapshot {
        command.args(["-l", &format!("snapshot.name={name}")]);
    }
    run(on(&mut command, path).arg(&raw));
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(&raw).unwrap();
    bytes
}

/// Has qemu-io do `commands` on the image.
#[track_caller]
pub fn io(path: &Path, commands: &[String]) {
    if let Err(said) = try_io(path, commands) {
        panic!("qemu-io {commands:?}:\n{said}");
    }
}

/// The same, where some may fail: QEMU does not write compressed data over a cluster that is
/// allocated. The error is what it says.
pub fn try_io(path: &Path, commands: &[String]) -> Result<(), String> {
    let mut command = Command::new("qemu-io");
    command.args(["-d", "unmap"]);
    for line in commands {
        command.args(["-c", line]);
    }
    let output = finish(on(&mut command, path));
    let said = text(&output);
    let failed = ["failed", "error", "not supported"].iter().any(|word| said.contains(word));
    if output.status.success() && !failed { Ok(()) } else { Err(said) }
}
