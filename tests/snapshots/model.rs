//! Internal snapshots against a model: random histories of writes, discards, snapshots taken,
//! deleted and applied, on images as QEMU leaves them, every snapshot compared byte for byte by us
//! and by QEMU.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::support::luks::Encryption;
use crate::support::made::Made;
use crate::support::qemu::{self, DataFile, Shape};
use crate::support::rng::Rng;
use crate::support::{SECTOR, busy, difference, for_seeds, scratch, verify, verify_clean};
use qcow2fs::ErrorKind;
use qcow2fs::image::{Image, Options, SnapshotView};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::MemoryStorage;

/// What the image should be: the disk, and each snapshot's name and content.
#[derive(Clone)]
struct Model {
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

/// An image that is worked on, beside its model.
struct History<'a> {
    made: &'a Made,
    storage: Arc<MemoryStorage>,
    image: Arc<Image>,
    model: Model,
    /// Snapshots that are being read.
    views: Vec<(Arc<SnapshotView>, String)>,
    taken: u64,
    rng: Rng,
}

pub fn whole_view(view: &SnapshotView) -> Vec<u8> {
    let mut bytes = vec![0xee; view.info().disk_size as usize];
    view.read(0, &mut bytes).unwrap();
    bytes
}

pub fn whole_disk(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.virtual_size() as usize];
    image.read(0, &mut bytes).unwrap();
    bytes
}

#[track_caller]
fn assert_same(what: &str, found: &[u8], expected: &[u8]) {
    if let Some(difference) = difference(found, expected) {
        panic!("{what}: {difference}");
    }
}

impl<'a> History<'a> {
    fn new(made: &'a Made, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let storage = Arc::new(made.file());
        let image = made.open_on(storage.clone(), None, &busy(&mut rng)).unwrap();
        let model = Model { disk: made.contents.clone(), snapshots: made.snapshots().to_vec() };
        History { made, storage, image, model, views: Vec::new(), taken: 0, rng }
    }

    fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            match self.rng.within(0..100) {
                0..55 => self.write(),
                55..75 => self.discard(),
                75..82 => self.image.flush().unwrap(),
                82..88 => self.take(),
                88..92 => self.delete(),
                92..94 => self.apply(),
                94..96 => self.open_view(),
                96..97 => self.compare(),
                97..98 => self.resize(),
                98..99 => thread::sleep(Duration::from_millis(self.rng.within(0..4))),
                _ => self.reopen(),
            }
        }
    }

    fn range(&mut self) -> std::ops::Range<usize> {
        let most = 3 * self.made.shape.cluster_size();
        let range = self.rng.range(self.model.disk.len() as u64, most, &[SECTOR, 4096]);
        range.start as usize..range.end as usize
    }

    fn write(&mut self) {
        let range = self.range();
        let fill = self.rng.next() as u8;
        let bytes = &mut self.model.disk[range.clone()];
        bytes.iter_mut().zip(0u8..=255).for_each(|(byte, n)| *byte = fill.wrapping_add(n));
        self.image.write(range.start as u64, &self.model.disk[range]).unwrap();
    }

    fn discard(&mut self) {
        let range = self.range();
        self.model.disk[range.clone()].fill(0);
        self.image.discard(range.start as u64..range.end as u64).unwrap();
    }

    fn take(&mut self) {
        self.taken += 1;
        let name = format!("ours{}", self.taken);
        match self.image.take_snapshot(name.as_bytes()) {
            Ok(info) => {
                assert_eq!(
                    (info.name.as_str(), info.disk_size),
                    (&*name, self.model.disk.len() as u64)
                );
                let again = self.image.take_snapshot(name.as_bytes()).unwrap_err();
                assert_eq!(again.kind(), ErrorKind::Exists);
                self.model.snapshots.push((name, self.model.disk.clone()));
            }
            Err(e) => self.refused(&e),
        }
    }

    /// Only refcounts that are too narrow may refuse a snapshot.
    fn refused(&self, error: &qcow2fs::Error) {
        assert!(self.made.shape.refcount_bits < 8, "{}: {error}", self.made.shape);
        assert!(matches!(error.kind(), ErrorKind::TooBig | ErrorKind::Unsupported), "{error}");
        assert!(self.image.is_writable());
    }

    fn some_snapshot(&mut self) -> Option<usize> {
        let count = self.model.snapshots.len() as u64;
        (count > 0).then(|| self.rng.within(0..count) as usize)
    }

    fn delete(&mut self) {
        let Some(index) = self.some_snapshot() else { return };
        let name = self.model.snapshots[index].0.clone();
        let deleted = self.image.delete_snapshot(name.as_bytes());
        if self.views.iter().any(|(_, open)| *open == name) {
            assert_eq!(deleted.unwrap_err().kind(), ErrorKind::InUse);
            self.views.retain(|(_, open)| *open != name);
            self.image.delete_snapshot(name.as_bytes()).unwrap();
        } else {
            deleted.unwrap();
        }
        self.model.snapshots.remove(index);
        let gone = self.image.open_snapshot(name.as_bytes()).err().unwrap();
        assert_eq!(gone.kind(), ErrorKind::NotFound);
    }

    fn apply(&mut self) {
        let Some(index) = self.some_snapshot() else { return };
        let (name, content) = self.model.snapshots[index].clone();
        match self.image.apply_snapshot(name.as_bytes()) {
            Ok(()) => self.model.disk = content,
            Err(e) => self.refused(&e),
        }
        assert_same("the disk after applying", &whole_disk(&self.image), &self.model.disk);
    }

    fn open_view(&mut self) {
        let Some(index) = self.some_snapshot() else { return };
        let name = self.model.snapshots[index].0.clone();
        let view = self.image.open_snapshot(name.as_bytes()).unwrap();
        self.views.push((view, name));
    }

    fn resize(&mut self) {
        if self.made.shape.version < 3 {
            return;
        }
        let size = self.rng.within(1..self.made.shape.size / SECTOR * 2 + 2) * SECTOR;
        self.image.resize(size).unwrap();
        self.model.disk.resize(size as usize, 0);
    }

    fn compare(&mut self) {
        assert_same("the disk", &whole_disk(&self.image), &self.model.disk);
        let infos = self.image.snapshots().unwrap();
        let names: Vec<_> = infos.iter().map(|info| info.name.as_str()).collect();
        let mut expected: Vec<_> = self.model.snapshots.iter().map(|(n, _)| n.as_str()).collect();
        expected.sort();
        let mut sorted = names.clone();
        sorted.sort();
        assert_eq!(sorted, expected);
        for (name, content) in &self.model.snapshots {
            let view = self.image.open_snapshot(name.as_bytes()).unwrap();
            assert_same(name, &whole_view(&view), content);
        }
        for (view, name) in &self.views {
            let content = &self.model.snapshots.iter().find(|(n, _)| n == name).unwrap().1;
            assert_same(&format!("{name}, long open"), &whole_view(view), content);
        }
    }

    fn reopen(&mut self) {
        self.views.clear();
        self.image.close().unwrap();
        verify(&*self.storage).unwrap();
        let image = self.made.open_on(self.storage.clone(), None, &busy(&mut self.rng)).unwrap();
        self.image = image;
    }

    /// Closes the image and lets QEMU judge it, its list, and what it reads from each snapshot.
    fn finish(mut self, directory: &Path) {
        self.compare();
        self.views.clear();
        self.image.close().unwrap();
        verify_clean(&*self.storage).unwrap();
        let path = directory.join("judged.qcow2");
        std::fs::write(&path, self.storage.contents()).unwrap();
        qemu::assert_clean(&path);
        let list = qemu::run(qemu::on(Command::new("qemu-img").args(["snapshot", "-l"]), &path));
        for (name, _) in &self.model.snapshots {
            assert!(list.split_whitespace().any(|word| word == name), "no {name} in {list}");
        }
        let lines = list.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_digit()));
        assert_eq!(lines.count(), self.model.snapshots.len(), "{list}");
        for (name, content) in &self.model.snapshots {
            // QEMU reads snapshots at the size that the disk has now.
            let found = qemu::contents(&path, Some(name));
            let common = found.len().min(content.len());
            assert_same(&format!("QEMU's {name}"), &found[..common], &content[..common]);
        }
        if let Some(index) = self.some_snapshot() {
            let (name, content) = &self.model.snapshots[index];
            let mut apply = Command::new("qemu-img");
            let applied = qemu::on(apply.args(["snapshot", "-a", name]), &path).output().unwrap();
            if applied.status.success() {
                assert_same("what QEMU applied", &qemu::contents(&path, None), content);
                qemu::assert_clean(&path);
            } else {
                // Refcounts that are too narrow for so many snapshots, or what QEMU does not do.
                let has_bitmaps = b"Device has active dirty bitmaps";
                let stderr = &applied.stderr;
                let refused = stderr.windows(has_bitmaps.len()).any(|part| part == has_bitmaps);
                assert!(refused || self.made.shape.refcount_bits < 8, "{applied:?}");
            }
        }
    }
}

pub fn small_shape(rng: &mut Rng) -> Shape {
    let mut shape = Shape::random(rng, 1 << 20);
    if shape.cluster_bits > 16 {
        shape.cluster_bits = *rng.pick(&[9, 12, 16]);
        shape.size = rng.within(1..2000) * SECTOR;
    }
    shape.extended_l2 &= shape.cluster_bits >= 14;
    shape.data_file = DataFile::None;
    shape.encrypted_one_in(6, rng)
}

#[test]
fn snapshots_keep_what_the_disk_held_whatever_becomes_of_the_disk() {
    for_seeds("snapshots_keep_what_the_disk_held_whatever_becomes_of_the_disk", 25, |seed| {
        let directory = scratch();
        let mut rng = Rng::new(seed);
        let made = Made::furnished(small_shape(&mut rng), directory.path(), &mut rng);
        println!("{seed}: {} {} bytes", made.shape, made.shape.size);
        let mut history = History::new(&made, rng.next());
        history.run(rng.within(50..400));
        history.finish(directory.path());
    });
}

#[test]
fn refcounts_of_one_bit_and_data_files_refuse_a_snapshot_before_anything_changes() {
    for (refcount_bits, data_file) in [(1, DataFile::None), (16, DataFile::Plain)] {
        refuses_a_snapshot(Shape {
            version: 3,
            cluster_bits: 12,
            refcount_bits,
            size: 1 << 20,
            preallocation: "off",
            lazy_refcounts: false,
            extended_l2: false,
            encryption: Encryption::None,
            data_file,
        });
    }
}

fn refuses_a_snapshot(shape: Shape) {
    let directory = scratch();
    let made = Made::empty(shape, directory.path());
    let storage = Arc::new(made.file());
    let image = made
        .open_on(
            storage.clone(),
            made.data().map(|data| Arc::new(data) as Arc<dyn Storage>),
            &Options { writable: true, keep_erased: 0, return_leaks: false, ..Options::default() },
        )
        .unwrap();
    image.write(0, &[7; 10000]).unwrap();
    image.flush().unwrap();
    let before = storage.contents();
    let error = image.take_snapshot(b"a").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(!error.to_string().contains('\n'));
    assert!(before == storage.contents());
    image.close().unwrap();
}
