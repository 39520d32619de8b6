//! Every kind of image that QEMU makes, against QEMU: all legal combinations of version, cluster
//! size, refcount width, subclusters, compression, backing files and data file.
//!
//! Each image is made and written by QEMU, and reads the same through the engine; then a random
//! history through the engine leaves it sound, by QEMU's judgement, with what a plain vector of
//! bytes holds; then QEMU writes to it again, and the engine reads that.
//!
//! A run takes combinations in random order for half a minute. `QCOW2FS_MATRIX=all` takes every one,
//! `QCOW2FS_MATRIX` with a name and `QCOW2FS_SEED` repeat a single one. What the engine says that it
//! does not serve is counted and left out.
//!
//! QEMU 10.0.2 itself can lose data where one process mixes normal and compressed writes after
//! discards: here each kind has a process of its own, and compressed data goes only to clusters that
//! were never written.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod support;

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use qcow2fs::image::{Backing, Beside, Image, RawBacking};
use support::qemu;
use support::rng::{Rng, fresh_seed, mix};
use support::{Watchdog, busy, difference, host_file, open_read_only, scratch, setting};

/// How long the sample of a normal run takes, in seconds.
const SAMPLE: u64 = 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Below {
    Nothing,
    Raw,
    Qcow2,
    /// Four files, of other cluster sizes and lengths.
    Chain,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Data {
    Inside,
    External,
    /// External, and the raw disk by itself.
    Raw,
}

/// One kind of image.
#[derive(Clone, Copy, Debug)]
struct Kind {
    version: u32,
    cluster_bits: u32,
    refcount_bits: u32,
    subclusters: bool,
    zstd: bool,
    below: Below,
    data: Data,
}

impl Kind {
    /// Whether there can be such images.
    fn is_legal(&self) -> bool {
        let version_2 = self.refcount_bits == 16
            && !self.subclusters
            && !self.zstd
            && self.data == Data::Inside;
        (self.version == 3 || version_2)
            && (!self.subclusters || self.cluster_bits >= 14)
            && (self.data != Data::Raw || self.below == Below::Nothing)
            // There is no compressed data in a data file.
            && (self.data == Data::Inside || !self.zstd)
    }

    fn all() -> Vec<Kind> {
        let mut kinds = Vec::new();
        for (version, cluster_bits) in
            [2, 3].into_iter().flat_map(|v| [9, 12, 16, 21].map(|c| (v, c)))
        {
            for (refcount_bits, subclusters) in
                [1, 16, 64].into_iter().flat_map(|r| [false, true].map(|s| (r, s)))
            {
                for (zstd, below) in [false, true].into_iter().flat_map(|z| {
                    [Below::Nothing, Below::Raw, Below::Qcow2, Below::Chain].map(|b| (z, b))
                }) {
                    for data in [Data::Inside, Data::External, Data::Raw] {
                        kinds.push(Kind {
                            version,
                            cluster_bits,
                            refcount_bits,
                            subclusters,
                            zstd,
                            below,
                            data,
                        });
                    }
                }
            }
        }
        kinds.retain(Kind::is_legal);
        kinds
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// A disk of a few to some hundred clusters; its end is often not that of a cluster.
    fn size(&self, rng: &mut Rng) -> u64 {
        let clusters = rng.within(3..5 + ((512 << 10) >> self.cluster_bits).min(300));
        let partial = if rng.one_in(2) { rng.within(0..self.cluster_size() / 512) } else { 0 };
        clusters * self.cluster_size() - partial * 512
    }

    /// As options for `qemu-img create -o`; `path` is the image's.
    fn options(&self, path: &Path) -> String {
        let mut options = format!(
            "compat={},cluster_size={},refcount_bits={}",
            if self.version == 2 { "0.10" } else { "1.1" },
            self.cluster_size(),
            self.refcount_bits
        );
        if self.subclusters {
            options += ",extended_l2=on";
        }
        if self.zstd {
            options += ",compression_type=zstd";
        }
        if self.data != Data::Inside {
            options += &format!(",data_file={}", path.with_extension("data").display());
        }
        if self.data == Data::Raw {
            options += ",data_file_raw=on";
        }
        options
    }
}

/// The name by which `QCOW2FS_MATRIX` selects it.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Kind { version, cluster_bits, refcount_bits, .. } = self;
        write!(f, "v{version}-cluster{cluster_bits}-refcount{refcount_bits}")?;
        write!(f, "{}", if self.subclusters { "-subclusters" } else { "" })?;
        write!(f, "{}", if self.zstd { "-zstd" } else { "-zlib" })?;
        match self.below {
            Below::Nothing => {}
            Below::Raw => write!(f, "-raw")?,
            Below::Qcow2 => write!(f, "-qcow2")?,
            Below::Chain => write!(f, "-chain")?,
        }
        match self.data {
            Data::Inside => Ok(()),
            Data::External => write!(f, "-data"),
            Data::Raw => write!(f, "-rawdata"),
        }
    }
}

/// A range as qemu-io takes it.
fn words(range: &Range<u64>) -> String {
    format!("{} {}", range.start, range.end - range.start)
}

/// Has QEMU write normal data and zeros, here and there.
fn write_by_qemu(path: &Path, size: u64, grains: &[u64], rng: &mut Rng) -> Vec<Range<u64>> {
    let mut touched = Vec::new();
    let mut commands = Vec::new();
    for _ in 0..rng.within(3..10) {
        let longest = *rng.pick(grains) * 3;
        let range = rng.range(size, longest.min(3 << 20), grains);
        commands.push(match rng.within(0..5) {
            0 => format!("write -z {}", words(&range)),
            1 => format!("write -z -u {}", words(&range)),
            _ => format!("write -P {} {}", rng.within(1..256), words(&range)),
        });
        touched.push(range);
    }
    qemu::io(path, &commands);
    touched
}

/// A disk that others can be made on: its files from the bottom up, the last one's format.
struct Layers {
    files: Vec<PathBuf>,
}

impl Layers {
    fn make(kind: &Kind, size: u64, directory: &Path, rng: &mut Rng) -> Self {
        let mut layers = Layers { files: Vec::new() };
        let formats: &[&str] = match kind.below {
            Below::Nothing => &[],
            Below::Raw => &["raw"],
            Below::Qcow2 => &["qcow2"],
            Below::Chain => &["raw", "qcow2", "qcow2", "qcow2"],
        };
        for (n, format) in formats.iter().enumerate() {
            let path = directory.join(format!("layer{n}.{format}"));
            // Shorter or longer than what is made on it.
            let size = rng.within(1..size / 512 * 5 / 4 + 2) * 512;
            if *format == "raw" {
                std::fs::write(&path, scattered(size, rng)).unwrap();
            } else {
                let bits = *rng.pick(&[9, 12, 14, 16]);
                create(&path, &format!("cluster_size={}", 1 << bits), size, layers.files.last());
                write_by_qemu(&path, size, &[512, 1 << bits, 70_000 / 512 * 512], rng);
            }
            layers.files.push(path);
        }
        layers
    }

    /// What the topmost file shows, open.
    fn open(&self) -> Option<Arc<dyn Backing>> {
        let mut below: Option<Arc<dyn Backing>> = None;
        for path in &self.files {
            let file = host_file(path);
            below = Some(match is_raw(path) {
                true => Arc::new(RawBacking::new(file).unwrap()),
                false => {
                    open_read_only(file, Beside { backing: below, ..Beside::default() }).unwrap()
                }
            });
        }
        below
    }
}

fn is_raw(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "raw")
}

/// Data and holes.
fn scattered(size: u64, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    for chunk in bytes.chunks_mut(5000) {
        if rng.one_in(2) {
            let first = rng.next() as u8;
            chunk.iter_mut().zip(0u8..=255).for_each(|(byte, n)| *byte = first ^ n);
        }
    }
    bytes
}

fn create(path: &Path, options: &str, size: u64, below: Option<&PathBuf>) {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-o", options]);
    if let Some(below) = below {
        let format = if is_raw(below) { "raw" } else { "qcow2" };
        command.args(["-F", format, "-b"]).arg(below);
    }
    qemu::run(command.arg(path).arg(size.to_string()));
}

/// One image of a kind, and what its disk holds.
struct Subject {
    kind: Kind,
    path: PathBuf,
    layers: Layers,
    expected: Vec<u8>,
    grains: [u64; 4],
    rng: Rng,
}

impl Subject {
    /// Made and written by QEMU.
    fn make(kind: Kind, directory: &Path, mut rng: Rng) -> Self {
        let path = directory.join("disk.qcow2");
        let size = kind.size(&mut rng);
        let layers = Layers::make(&kind, size, directory, &mut rng);
        create(&path, &kind.options(&path), size, layers.files.last());
        let grains = [1, 512, 4096, kind.cluster_size()];
        let touched = write_by_qemu(&path, size, &grains, &mut rng);
        if kind.data == Data::Inside {
            compress_by_qemu(&path, size, kind.cluster_size(), touched, &mut rng);
        }
        let expected = qemu::contents(&path, None);
        Subject { kind, path, layers, expected, grains, rng }
    }

    fn beside(&self) -> Beside {
        let data = match self.kind.data {
            Data::Inside => None,
            Data::External | Data::Raw => Some(host_file(&self.data_path())),
        };
        Beside { backing: self.layers.open(), data, cipher: None }
    }

    fn data_path(&self) -> PathBuf {
        self.path.with_extension("data")
    }

    fn open(&mut self) -> Arc<Image> {
        let options = busy(&mut self.rng);
        Image::open_with(host_file(&self.path), &options, self.beside()).unwrap()
    }

    fn range(&mut self) -> Range<u64> {
        let cluster_size = self.kind.cluster_size();
        let longest = *self.rng.pick(&[600, 5000, cluster_size, 5 * cluster_size]);
        self.rng.range(self.expected.len() as u64, longest.min(3 << 20), &self.grains)
    }

    fn assert_read(&self, image: &Image, when: &str) {
        let mut found = vec![0xee; self.expected.len()];
        image.read(0, &mut found).unwrap();
        if let Some(difference) = difference(&found, &self.expected) {
            panic!("{when} we read {difference}");
        }
    }

    /// A random history through the engine.
    fn work(&mut self) {
        let mut image = self.open();
        for _ in 0..self.rng.within(20..60) {
            let range = self.range();
            let bytes = range.start as usize..range.end as usize;
            match self.rng.within(0..20) {
                0..9 => {
                    let first = self.rng.next() as u8;
                    let data = &mut self.expected[bytes];
                    data.iter_mut().zip(0u8..=255).for_each(|(byte, n)| *byte = first ^ n);
                    image.write(range.start, data).unwrap();
                }
                9..11 => {
                    let mut found = vec![0xee; bytes.len()];
                    image.read(range.start, &mut found).unwrap();
                    assert_eq!(difference(&found, &self.expected[bytes]), None, "{range:x?}");
                }
                11..15 => {
                    image.discard(range).unwrap();
                    self.expected[bytes].fill(0);
                }
                15..17 => {
                    image.write_zeroes(range).unwrap();
                    self.expected[bytes].fill(0);
                }
                17 | 18 => image.flush().unwrap(),
                _ => {
                    image.close().unwrap();
                    image = self.open();
                }
            }
        }
        self.assert_read(&image, "after our own writes");
        image.close().unwrap();
    }

    /// QEMU finds it sound and reads the same.
    fn judge(&self) {
        qemu::assert_clean(&self.path);
        qemu::assert_same(&self.path, &self.expected);
        if self.kind.data == Data::Raw {
            let data = std::fs::read(self.data_path()).unwrap();
            let disk = data.get(..self.expected.len()).expect("as long as the disk");
            assert_eq!(difference(disk, &self.expected), None, "the raw data file by itself");
        }
    }

    fn run(mut self) {
        let reader = open_read_only(host_file(&self.path), self.beside()).unwrap();
        self.assert_read(&reader, "of what QEMU made");
        drop(reader);
        self.work();
        self.judge();
        let (size, grains) = (self.expected.len() as u64, self.grains);
        write_by_qemu(&self.path, size, &grains, &mut self.rng);
        self.expected = qemu::contents(&self.path, None);
        self.work();
        self.judge();
    }
}

/// Has QEMU write compressed clusters where nothing was `touched`.
fn compress_by_qemu(
    path: &Path,
    size: u64,
    cluster_size: u64,
    mut touched: Vec<Range<u64>>,
    rng: &mut Rng,
) {
    let mut commands = Vec::new();
    for _ in 0..8 {
        let range = rng.range(size, 2 * cluster_size, &[cluster_size]);
        // The cluster that a normal write touched in part is allocated as a whole.
        let is_fresh = touched.iter().all(|t| {
            t.end.next_multiple_of(cluster_size) <= range.start
                || range.end <= t.start / cluster_size * cluster_size
        });
        if is_fresh {
            commands.push(format!("write -c -P {} {}", rng.within(1..256), words(&range)));
            touched.push(range);
        }
    }
    if !commands.is_empty() {
        // A refcount of one bit is too narrow for two compressed clusters in one.
        let _some_may_fail = qemu::try_io(path, &commands);
        qemu::repair_leaks(path);
    }
}

/// Says how to run it again when something is not as it should be.
struct Replayable(Kind, u64);

impl Drop for Replayable {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Replayable(kind, seed) = self;
            eprintln!(
                "again: QCOW2FS_MATRIX={kind} QCOW2FS_SEED={seed} cargo test --release --test matrix"
            );
        }
    }
}

fn try_kind(kind: Kind, seed: u64) {
    let _replayable = Replayable(kind, seed);
    let _watchdog = Watchdog::new(format!("QCOW2FS_MATRIX={kind} QCOW2FS_SEED={seed}"), 120);
    let directory = scratch();
    let subject = Subject::make(kind, directory.path(), Rng::new(seed));
    let refusal = Image::summarize(&*host_file(&subject.path)).unwrap().refusal;
    assert_eq!(refusal, None, "{kind} is refused");
    subject.run();
}

#[test]
fn qemu_and_we_read_and_write_every_kind_of_image_alike() {
    let wanted = std::env::var("QCOW2FS_MATRIX").ok();
    let first = setting("QCOW2FS_SEED").unwrap_or_else(fresh_seed);
    let mut kinds = Kind::all();
    let whole = kinds.len();
    if let Some(name) = wanted.as_deref().filter(|name| *name != "all") {
        kinds.retain(|kind| kind.to_string() == name);
        assert!(!kinds.is_empty(), "no kind of image is called {name}");
    }
    let mut rng = Rng::new(first);
    for at in (1..kinds.len()).rev() {
        kinds.swap(at, rng.within(0..at as u64 + 1) as usize);
    }
    let limit = wanted.is_none().then_some(Duration::from_secs(SAMPLE));
    let started = Instant::now();
    let mut tried = 0;
    for (n, kind) in (0u64..).zip(&kinds) {
        if limit.is_some_and(|limit| started.elapsed() > limit) {
            break;
        }
        let seed = if kinds.len() == 1 { first } else { mix(first ^ n) };
        tried += 1;
        try_kind(*kind, seed);
    }
    println!("matrix: {tried} of {whole} kinds from seed {first}, in {:.1?}", started.elapsed());
}
