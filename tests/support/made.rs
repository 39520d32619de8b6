//! Images as QEMU leaves them: on a backing file or not, with a data file or not, with data,
//! compressed or not, with snapshots and bitmaps.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use qcow2fs::crypt::DataCipher;
use qcow2fs::image::{Backing, Beside, Image, Options, RawBacking};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::MemoryStorage;

use super::qemu::{self, DataFile, Shape};
use super::rng::Rng;
use super::{host_file, open_read_only};

/// An image that QEMU made.
pub struct Made {
    pub path: PathBuf,
    pub shape: Shape,
    backing: Option<PathBuf>,
    /// Whether clusters may be shared, by snapshots or by compressed data.
    pub may_share: bool,
    has_bitmap: bool,
    /// What the disk holds.
    pub contents: Vec<u8>,
    snapshots: Snapshots,
    cipher: Option<Arc<DataCipher>>,
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
        let (backing, may_share, has_bitmap) = (None, false, false);
        let cipher = shape.encryption.cipher(&path);
        Made { path, shape, backing, may_share, has_bitmap, contents, snapshots, cipher }
    }

    /// An image with any of what there can be.
    pub fn furnished(shape: Shape, directory: &Path, rng: &mut Rng) -> Self {
        let backed = rng.one_in(3);
        Made::furnished_over(backed, shape, directory, rng)
    }

    /// The same, on a backing file where it is to be `backed`.
    pub fn furnished_over(backed: bool, mut shape: Shape, directory: &Path, rng: &mut Rng) -> Self {
        let path = directory.join("disk.qcow2");
        let backed = backed && shape.data_file != DataFile::Raw;
        let backing = backed.then(|| make_backing(shape.size, directory, rng));
        if backing.is_some() && !shape.extended_l2 {
            shape.preallocation = "off";
        }
        shape.create(&path, backing.as_deref());
        // `qemu-img check -r leaks` (10.0.2) forgets the snapshots of an image that has bitmaps.
        let is_inside = shape.data_file == DataFile::None;
        let has_bitmap = shape.version == 3 && is_inside && rng.one_in(4);
        if has_bitmap {
            let granularity = (512 << rng.within(0..8)).to_string();
            let mut add = Command::new("qemu-img");
            add.args(["bitmap", "--add", "-g", &granularity]);
            qemu::run(qemu::on(&mut add, &path).arg("bitmap"));
        }
        let mut may_share = false;
        if rng.one_in(2) {
            may_share = write_some(&shape, &path, rng);
        }
        if shape.extended_l2 {
            let commands: Vec<_> = (0..6).map(|_| small_command(&shape, rng)).collect();
            qemu::io(&path, &commands);
        }
        let contents = qemu::contents(&path, None);
        let snapshots = Snapshots::default();
        let takes_snapshot = !has_bitmap && is_inside && rng.one_in(2);
        may_share |= takes_snapshot;
        let cipher = shape.encryption.cipher(&path);
        let mut made =
            Made { path, shape, backing, may_share, has_bitmap, contents, snapshots, cipher };
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
            return Some(open_read_only(host_file(path), Beside::default()).unwrap());
        }
        Some(Arc::new(RawBacking::new(host_file(path)).unwrap()))
    }

    /// Opens the image in its files on the host.
    pub fn open(&self, options: &Options) -> qcow2fs::Result<Arc<Image>> {
        self.open_on(host_file(&self.path), self.data_path().map(|path| host_file(&path)), options)
    }

    /// Opens `file`, a state of this image, and `data`, one of its data file.
    pub fn open_on(
        &self,
        file: Arc<dyn Storage>,
        data: Option<Arc<dyn Storage>>,
        options: &Options,
    ) -> qcow2fs::Result<Arc<Image>> {
        Image::open_with(file, options, self.beside(data))
    }

    /// What the image needs when its data file is `data`.
    pub fn beside(&self, data: Option<Arc<dyn Storage>>) -> Beside {
        Beside { backing: self.backing(), data, cipher: self.cipher.clone() }
    }

    /// The external data file.
    pub fn data_path(&self) -> Option<PathBuf> {
        self.shape.data_path(&self.path)
    }

    /// The external data file's bytes as they are now.
    pub fn data(&self) -> Option<MemoryStorage> {
        Some(MemoryStorage::new(std::fs::read(self.data_path()?).unwrap()))
    }

    /// A raw data file reads by itself as the disk does.
    pub fn assert_raw_data(&self, data: &[u8], expected: &[u8]) -> Result<(), String> {
        match self.shape.data_file {
            DataFile::None | DataFile::Plain => Ok(()),
            // QEMU makes it longer than the disk where it allocates whole clusters at once.
            DataFile::Raw => {
                match super::difference(data.get(..expected.len()).unwrap_or(data), expected) {
                    Some(difference) => Err(format!("the raw data file holds {difference}")),
                    None => Ok(()),
                }
            }
        }
    }

    /// The file's bytes as they are now.
    pub fn file(&self) -> MemoryStorage {
        MemoryStorage::new(std::fs::read(&self.path).unwrap())
    }

    /// QEMU takes a snapshot or deletes one; the image is closed and holds `contents`.
    pub fn change_snapshots(&mut self, contents: &[u8], rng: &mut Rng) {
        if !self.has_bitmap {
            self.snapshots.change(&self.shape, &self.path, contents, rng);
        }
    }

    /// Adds a bitmap that records from now on, where there may be one and is none.
    pub fn add_bitmap(&mut self) {
        let is_inside = self.shape.data_file == DataFile::None;
        if self.shape.version == 3 && is_inside && !self.has_bitmap && !self.has_snapshots() {
            let mut add = Command::new("qemu-img");
            qemu::run(add.args(["bitmap", "--add", "-g", "512"]).arg(&self.path).arg("bitmap"));
            self.has_bitmap = true;
        }
    }

    pub fn has_bitmap(&self) -> bool {
        self.has_bitmap
    }

    pub fn has_snapshots(&self) -> bool {
        !self.snapshots.taken.is_empty()
    }

    /// The names of the snapshots, and what each holds.
    pub fn snapshots(&self) -> &[(String, Vec<u8>)] {
        &self.snapshots.taken
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
        if shape.refcount_bits < 2 || shape.data_file != DataFile::None {
            return;
        }
        if !self.taken.is_empty() && rng.one_in(2) {
            let (name, _) = self.taken.swap_remove(rng.within(0..self.taken.len() as u64) as usize);
            let mut delete = Command::new("qemu-img");
            qemu::run(qemu::on(delete.args(["snapshot", "-d", &name]), path));
            return;
        }
        self.count += 1;
        let name = format!("snapshot{}", self.count);
        let mut take = Command::new("qemu-img");
        let taken = qemu::on(take.args(["snapshot", "-c", &name]), path).output();
        // Narrow refcounts can be too narrow.
        match taken.unwrap().status.success() {
            true => self.taken.push((name, contents.to_vec())),
            false => qemu::repair_leaks(path),
        }
    }
}

/// Has QEMU write whole clusters, some of them compressed; whether any are.
///
/// One QEMU process that writes both kinds can lose data (10.0.2): compressed writes have one of
/// their own, and clusters that were never written.
fn write_some(shape: &Shape, path: &Path, rng: &mut Rng) -> bool {
    let cluster_size = shape.cluster_size();
    let (mut normal, mut compressed): (Vec<Range<u64>>, Vec<Range<u64>>) = Default::default();
    for _ in 0..6 {
        let range = rng.range(shape.size, 4 * cluster_size, &[cluster_size]);
        let is_apart = |from: &[Range<u64>]| {
            from.iter().all(|other| other.end <= range.start || range.end <= other.start)
        };
        if !is_apart(&compressed) {
            continue;
        }
        let compresses = shape.data_file == DataFile::None && rng.one_in(2);
        match compresses && is_apart(&normal) {
            true => compressed.push(range),
            false => normal.push(range),
        }
    }
    let mut commands = |ranges: &[Range<u64>], option: &str| -> Vec<String> {
        let command = |range: &Range<u64>| {
            let (start, length) = (range.start, range.end - range.start);
            format!("write {option} -P {} {start} {length}", rng.within(1..256))
        };
        ranges.iter().map(command).collect()
    };
    qemu::io(path, &commands(&normal, ""));
    if !compressed.is_empty() {
        // Narrow refcounts can be too narrow, and what is preallocated is not compressed.
        let _some_may_fail = qemu::try_io(path, &commands(&compressed, "-c"));
    }
    !compressed.is_empty()
}

/// A command for qemu-io that changes a few subclusters, or parts of them.
fn small_command(shape: &Shape, rng: &mut Rng) -> String {
    let size = shape.subcluster_size();
    let range = rng.range(shape.size, 12 * size, &[512, size]);
    let (start, length) = (range.start, range.end - range.start);
    match rng.within(0..4) {
        0 => format!("write -z {start} {length}"),
        1 => format!("discard {start} {length}"),
        _ => format!("write -P {} {start} {length}", rng.within(1..256)),
    }
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
