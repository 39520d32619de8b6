//! What lies under a disk: backing files in chains, compressed clusters, and disks to start from,
//! all made by QEMU.
//!
//! Each sector of a disk that is not empty says which disk and which sector it is, so that none can
//! pass for another.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use qcow2fs::format::{Header, Snapshot};
use qcow2fs::image::{Backing, Image, Options, RawBacking};
use qcow2fs::storage::testing::MemoryStorage;
use qcow2fs::storage::{HostFile, Storage};

use super::SECTOR;
use super::qemu::{self, Shape};
use super::rng::Rng;

/// A disk of `size` bytes with something in it: stretches that are empty, that compress well and
/// that do not compress at all.
pub fn plausible_disk(rng: &mut Rng, size: u64) -> Vec<u8> {
    let mut disk = vec![0; size as usize];
    let tag = rng.next() | 1;
    let mut at = 0;
    while at < size {
        let end = (at + rng.within(1..size / 4 + 2 * SECTOR)).next_multiple_of(SECTOR).min(size);
        let kind = rng.within(0..4);
        for sector in at / SECTOR..end.div_ceil(SECTOR) {
            let start = (sector * SECTOR) as usize;
            let bytes = &mut disk[start..(start + SECTOR as usize).min(size as usize)];
            match kind {
                0 => {}
                1 => super::fill(rng, bytes),
                _ => identify(bytes, tag, sector),
            }
        }
        at = end;
    }
    disk
}

fn identify(sector: &mut [u8], tag: u64, number: u64) {
    sector.fill(tag as u8);
    sector[..8].copy_from_slice(&tag.to_le_bytes());
    sector[8..16].copy_from_slice(&number.to_le_bytes());
}

/// Backing files, each the next one's, and what the last one reads.
pub struct Chain {
    /// Path and format, the bottom first.
    files: Vec<(PathBuf, &'static str)>,
    disk: Vec<u8>,
}

impl Chain {
    /// One to `most` files in `directory`, for an overlay of about `size` bytes: shorter and longer
    /// ones, of any cluster size, raw at the bottom or not, some with compressed clusters.
    pub fn random(rng: &mut Rng, directory: &Path, size: u64, most: u64) -> Chain {
        let mut chain = Chain { files: Vec::new(), disk: Vec::new() };
        for layer in 0..rng.within(1..most + 1) {
            let path = directory.join(format!("b{layer}"));
            let shape = chain.shape(rng, size);
            match layer {
                0 => chain.bottom(rng, &path, &shape),
                _ => chain.overlay(rng, &path, &shape),
            }
        }
        chain
    }

    /// Of up to twice the overlay's size.
    fn shape(&self, rng: &mut Rng, size: u64) -> Shape {
        let mut shape = Shape::random(rng, 4 << 20);
        shape.size = rng.within(1..2 * size / SECTOR + 2) * SECTOR;
        shape.preallocation = "off";
        shape.cluster_bits = shape.cluster_bits.clamp(9, 18);
        shape
    }

    fn bottom(&mut self, rng: &mut Rng, path: &Path, shape: &Shape) {
        self.disk = plausible_disk(rng, shape.size);
        let format = match rng.within(0..3) {
            0 => {
                write_sparse(path, &self.disk);
                "raw"
            }
            compressed => {
                shape.convert(path, &self.disk, compression(rng, shape, compressed == 1));
                "qcow2"
            }
        };
        self.files.push((path.to_owned(), format));
    }

    fn overlay(&mut self, rng: &mut Rng, path: &Path, shape: &Shape) {
        shape.make(path, None, Some(self.top()));
        self.disk.resize(shape.size as usize, 0);
        let commands = random_changes(rng, &mut self.disk, shape, true);
        qemu::io(path, &commands);
        self.files.push((path.to_owned(), "qcow2"));
    }

    /// The file that an overlay is made on, and its format.
    pub fn top(&self) -> (&Path, &str) {
        let (path, format) = &self.files[self.files.len() - 1];
        (path, format)
    }

    /// What a new overlay of `size` bytes reads.
    pub fn disk(&self, size: u64) -> Vec<u8> {
        let mut disk = self.disk.clone();
        disk.resize(size as usize, 0);
        disk
    }

    /// Opens it the way a mount does, read-only down to the file descriptor.
    pub fn open(&self) -> Arc<dyn Backing> {
        let mut behind: Option<Arc<dyn Backing>> = None;
        for (path, format) in &self.files {
            let file: Arc<dyn Storage> = Arc::new(HostFile::new(File::open(path).unwrap()));
            behind = Some(match *format {
                "raw" => Arc::new(RawBacking::new(file).unwrap()),
                _ => Image::open_over(file, &Options::default(), behind).unwrap(),
            });
        }
        behind.unwrap()
    }
}

/// A way to compress that `shape` can say.
pub fn compression(rng: &mut Rng, shape: &Shape, compressed: bool) -> Option<&'static str> {
    match (compressed, shape.version) {
        (false, _) => None,
        (true, 2) => Some("zlib"),
        (true, _) => Some(if rng.one_in(2) { "zlib" } else { "zstd" }),
    }
}

impl Shape {
    /// Makes an image at `path` that holds `disk`, with every cluster that gets smaller compressed
    /// where a way to do so is given.
    pub fn convert(&self, path: &Path, disk: &[u8], compression: Option<&str>) {
        let raw = path.with_extension("source");
        write_sparse(&raw, disk);
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "raw", "-O", "qcow2", "-o", &self.to_string()]);
        match compression {
            Some("zstd") => _ = command.args(["-c", "-o", "compression_type=zstd"]),
            Some(_) => _ = command.arg("-c"),
            None => {}
        }
        qemu::run(command.arg(&raw).arg(path));
        std::fs::remove_file(&raw).unwrap();
    }
}

/// Leaves holes where there are zeros.
fn write_sparse(path: &Path, disk: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(disk.len() as u64).unwrap();
    for (n, page) in (0..).zip(disk.chunks(4096)) {
        if page.iter().any(|&byte| byte != 0) {
            file.write_all_at(page, n * 4096).unwrap();
        }
    }
}

/// Commands for qemu-io that change an image of this shape, done to `disk` too. Clusters are also
/// compressed if `compress`, which cannot be done over data behind an image of version 2.
pub fn random_changes(
    rng: &mut Rng,
    disk: &mut [u8],
    shape: &Shape,
    compress: bool,
) -> Vec<String> {
    let cluster_size = shape.cluster_size();
    let grains = [1, 512, 4096, cluster_size];
    let mut commands = Vec::new();
    for _ in 0..rng.within(1..12) {
        let longest = *rng.pick(&[600, 5000, cluster_size, 5 * cluster_size]);
        let range = rng.range(disk.len() as u64, longest.min(4 << 20), &grains);
        let byte = rng.within(1..256) as u8;
        let kinds = if compress && shape.version > 2 { 6 } else { 4 };
        commands.extend(match rng.within(0..kinds) {
            0 => change(disk, "write -z -u".into(), &range, 0),
            1 => change(disk, "write -z".into(), &range, 0),
            2 | 3 => change(disk, format!("write -P {byte}"), &range, byte),
            _ => compress_clusters(rng, disk, &range, cluster_size),
        });
    }
    commands
}

fn change(disk: &mut [u8], command: String, range: &Range<u64>, byte: u8) -> Vec<String> {
    disk[range.start as usize..range.end as usize].fill(byte);
    vec![format!("{command} {} {}", range.start, range.end - range.start)]
}

/// The clusters that `range` touches, each compressed by itself. Only a cluster without a host
/// cluster can be.
fn compress_clusters(
    rng: &mut Rng,
    disk: &mut [u8],
    range: &Range<u64>,
    cluster_size: u64,
) -> Vec<String> {
    let mut commands = Vec::new();
    for cluster in range.start / cluster_size..range.end.div_ceil(cluster_size) {
        let start = cluster * cluster_size;
        let cluster = start..(start + cluster_size).min(disk.len() as u64);
        let byte = rng.within(1..256) as u8;
        commands.extend(change(disk, "discard".into(), &cluster, 0));
        commands.extend(change(disk, format!("write -c -P {byte}"), &cluster, byte));
    }
    commands
}

/// What internal snapshot number `n` of `file` reads, whose disk has `size` bytes: the file is read
/// with that snapshot's L1 table for its own.
pub fn snapshot_disk(
    file: &MemoryStorage,
    n: usize,
    size: u64,
    backing: Option<Arc<dyn Backing>>,
) -> Result<Vec<u8>, String> {
    let snapshot = find_snapshot(file, n).map_err(|e| format!("finding snapshot {n}: {e}"))?;
    let seen = file.fork();
    let l1 = Header::patch_l1(snapshot.l1_size, snapshot.l1_table_offset);
    for patch in [l1, Header::patch_size(size)] {
        seen.write_at(&patch.bytes, patch.offset.0).unwrap();
    }
    let failed = |e| format!("reading snapshot {n}: {e}");
    let image = Image::open_over(Arc::new(seen), &Options::default(), backing).map_err(failed)?;
    let mut disk = vec![0xee; size as usize];
    image.read(0, &mut disk).map_err(failed)?;
    Ok(disk)
}

fn find_snapshot(file: &MemoryStorage, n: usize) -> qcow2fs::Result<Snapshot> {
    let mut header = vec![0; file.len().unwrap().min(4096) as usize];
    file.read_at(&mut header, 0).unwrap();
    let mut at = Header::parse(&header)?.snapshots_offset.0;
    let mut left = n;
    loop {
        let mut fixed = [0; Snapshot::FIXED_LENGTH];
        file.read_at(&mut fixed, at).unwrap();
        let length = Snapshot::length(&fixed)?;
        if left == 0 {
            return Ok(Snapshot::parse(&fixed));
        }
        left -= 1;
        at += (length as u64).next_multiple_of(8);
    }
}
