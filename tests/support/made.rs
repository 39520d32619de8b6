//! Images as QEMU leaves them: on a backing file or not, with data, compressed or not, and with
//! snapshots.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use qcow2fs::image::{Backing, Image, Options, RawBacking};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::MemoryStorage;

use super::qemu::{self, Shape};
use super::rng::Rng;
use super::{host_file, open_read_only};

/// An image that QEMU made.
pub struct Made {
    pub path: PathBuf,
    pub shape: Shape,
    backing: Option<PathBuf>,
    /// Whether clusters may be shared, by snapshots or by compressed data.
    pub may_share: bool,
    /// What the disk holds.
    pub contents: Vec<u8>,
    snapshots: Snapshots,
}

/// The internal snapshots that an image has, and what each holds.
#[derive(Default)]
pub struct Snapshots {
    taken: Vec<(String, Vec<u8>)>,
    count: u64,
}

impl Made {
    /// An image with nothing in it.
    pub fn empty(shape: Shape, directory: &Path) -> Self {
        let path = directory.join("disk.qcow2");
        shape.create(&path, None);
        let contents = vec![0; shape.size as usize];
        let snapshots = Snapshots::default();
        Made { path, shape, backing: None, may_share: false, contents, snapshots }
    }

    /// An image with any of what there can be.
    pub fn furnished(mut shape: Shape, directory: &Path, rng: &mut Rng) -> Self {
        let path = directory.join("disk.qcow2");
        let backing = rng.one_in(3).then(|| make_backing(shape.size, directory, rng));
        if backing.is_some() {
            shape.preallocation = "off";
        }
        shape.create(&path, backing.as_deref());
        let mut may_share = rng.one_in(2);
        if may_share {
            let commands: Vec<_> = (0..6).map(|_| write_command(&shape, rng)).collect();
            let _some_may_fail = qemu::try_io(&path, &commands);
        }
        let contents = qemu::contents(&path, None);
        let snapshots = Snapshots::default();
        let takes_snapshot = rng.one_in(2);
        may_share |= takes_snapshot;
        let mut made = Made { path, shape, backing, may_share, contents, snapshots };
        if takes_snapshot {
            made.snapshots.change(&made.shape, &made.path, &made.contents, rng);
        }
        qemu::repair_leaks(&made.path);
        made
    }

    /// Whether unallocated clusters may read as something other than zeros.
    pub fn is_backed(&self) -> bool {
        self.backing.is_some()
    }

    /// The open backing file, if there is one.
    pub fn backing(&self) -> Option<Arc<dyn Backing>> {
        let path = self.backing.as_ref()?;
        if path.extension().is_some_and(|e| e == "qcow2") {
            return Some(open_read_only(host_file(path), None).unwrap());
        }
        Some(Arc::new(RawBacking::new(host_file(path)).unwrap()))
    }

    /// Opens `file`, a state of this image.
    pub fn open(&self, file: Arc<dyn Storage>, options: &Options) -> qcow2fs::Result<Arc<Image>> {
        Image::open_over(file, options, self.backing())
    }

    /// The file's bytes as they are now.
    pub fn file(&self) -> MemoryStorage {
        MemoryStorage::new(std::fs::read(&self.path).unwrap())
    }

    /// QEMU takes a snapshot or deletes one; the image is closed and holds `contents`.
    pub fn change_snapshots(&mut self, contents: &[u8], rng: &mut Rng) {
        self.snapshots.change(&self.shape, &self.path, contents, rng);
    }

    pub fn has_snapshots(&self) -> bool {
        !self.snapshots.taken.is_empty()
    }

    /// QEMU reads from the snapshots of `file`, a state of this image, what they held when they
    /// were taken.
    pub fn assert_snapshots(&self, file: &Path) -> Result<(), String> {
        for (name, expected) in &self.snapshots.taken {
            let found = qemu::contents(file, Some(name));
            // QEMU reads snapshots at the size that the disk has now.
            let common = found.len().min(expected.len());
            if let Some(difference) = super::difference(&found[..common], &expected[..common]) {
                return Err(format!("snapshot {name} holds {difference}"));
            }
        }
        Ok(())
    }
}

impl Snapshots {
    fn change(&mut self, shape: &Shape, path: &Path, contents: &[u8], rng: &mut Rng) {
        if shape.refcount_bits < 2 {
            return;
        }
        if !self.taken.is_empty() && rng.one_in(2) {
            let (name, _) = self.taken.swap_remove(rng.within(0..self.taken.len() as u64) as usize);
            qemu::run(Command::new("qemu-img").args(["snapshot", "-d", &name]).arg(path));
            return;
        }
        self.count += 1;
        let name = format!("snapshot{}", self.count);
        let taken = Command::new("qemu-img").args(["snapshot", "-c", &name]).arg(path).output();
        // Narrow refcounts can be too narrow.
        match taken.unwrap().status.success() {
            true => self.taken.push((name, contents.to_vec())),
            false => qemu::repair_leaks(path),
        }
    }
}

/// A command for qemu-io that writes whole clusters, some of them compressed.
fn write_command(shape: &Shape, rng: &mut Rng) -> String {
    let cluster_size = shape.cluster_size();
    let range = rng.range(shape.size, 4 * cluster_size, &[cluster_size]);
    let (start, length) = (range.start, range.end - range.start);
    let byte = rng.within(1..256);
    let compressed = if rng.one_in(2) { "-c " } else { "" };
    format!("write {compressed}-P {byte} {start} {length}")
}

/// A disk shorter or longer than `size`, with data and holes, raw or qcow2.
fn make_backing(size: u64, directory: &Path, rng: &mut Rng) -> PathBuf {
    let size = rng.within(1..size / 256 + 2) * 512;
    let mut bytes = vec![0; size as usize];
    for chunk in bytes.chunks_mut(4096) {
        if rng.one_in(2) {
            continue;
        }
        let first = rng.next() as u8;
        chunk.iter_mut().zip(0u8..=255).for_each(|(byte, n)| *byte = first ^ n);
    }
    let raw = directory.join("base.raw");
    std::fs::write(&raw, bytes).unwrap();
    if rng.one_in(2) {
        return raw;
    }
    let path = directory.join("base.qcow2");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096"]);
    qemu::run(convert.arg(&raw).arg(&path));
    path
}
