//! Random histories against a vector of bytes: whatever a client does to a disk, the disk reads
//! what the vector holds, through us and through QEMU, and QEMU finds the image sound.
//!
//! `QCOW2FS_SEED` repeats one history, `QCOW2FS_MODEL_SECONDS` and `QCOW2FS_MODEL_STEPS` make the
//! search longer.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod support;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use qcow2fs::ErrorKind;
use qcow2fs::image::Image;
use support::made::Made;
use support::qemu::{self, DataFile, Shape};
use support::rng::Rng;
use support::{busy, difference, for_seeds, scratch, setting};

/// An image, what it should hold, and what to do with it next.
struct History {
    rng: Rng,
    made: Made,
    image: Arc<Image>,
    expected: Vec<u8>,
    /// Sizes and offsets are often multiples of these.
    grains: [u64; 5],
    /// The disk does not grow past so many bytes.
    most: u64,
    done: Vec<String>,
}

impl History {
    fn begin(seed: u64, made: Made, most: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x5eed);
        qemu::assert_clean(&made.path);
        let image = made.open(&busy(&mut rng)).unwrap();
        let shape = &made.shape;
        assert_eq!(image.virtual_size(), shape.size);
        assert_eq!(image.cluster_size(), shape.cluster_size());
        let grains = [1, 512, 4096, shape.cluster_size(), shape.subcluster_size()];
        let expected = made.contents.clone();
        History { rng, made, image, expected, grains, most, done: Vec::new() }
    }

    fn size(&self) -> u64 {
        self.expected.len() as u64
    }

    fn range(&mut self) -> Range<u64> {
        let [_, _, _, cluster_size, subcluster_size] = self.grains;
        let longest =
            *self.rng.pick(&[600, 5000, 3 * subcluster_size, cluster_size, 5 * cluster_size]);
        self.rng.range(self.size(), longest.min(4 << 20), &self.grains)
    }

    fn step(&mut self) {
        match self.rng.within(0..100) {
            0..35 => self.write(),
            35..50 => self.read(),
            50..65 => self.clear(true),
            65..75 => self.clear(false),
            75..80 => self.preallocate(),
            80..85 => self.seek(),
            85..91 => self.image.flush().unwrap(),
            91..94 => self.resize(),
            94 => self.compact(),
            95 => self.reopen(),
            96 => self.judge(),
            97 => self.let_qemu_write(),
            98 => self.discard_everything(),
            _ => std::thread::sleep(Duration::from_millis(self.rng.within(1..20))),
        }
    }

    fn compact(&mut self) {
        self.note("compact".into());
        self.image.compact(|_| true).unwrap();
        let found = {
            let mut found = vec![0; self.expected.len()];
            self.image.read(0, &mut found).unwrap();
            found
        };
        if let Some(difference) = difference(&found, &self.expected) {
            panic!("after compacting: {difference}");
        }
    }

    fn note(&mut self, what: String) {
        self.done.push(what);
    }

    fn write(&mut self) {
        let range = self.range();
        let mut data = vec![0; (range.end - range.start) as usize];
        let kind = self.rng.within(0..8);
        self.note(format!("write {range:x?} of kind {kind}"));
        match kind {
            0 => {}
            1 => self.scatter(&mut data),
            _ => self.fill(&mut data),
        }
        self.image.write(range.start, &data).unwrap();
        self.expected[bytes(&range)].copy_from_slice(&data);
    }

    fn fill(&mut self, data: &mut [u8]) {
        for chunk in data.chunks_mut(8) {
            chunk.copy_from_slice(&self.rng.next().to_le_bytes()[..chunk.len()]);
        }
    }

    /// Mostly zeros.
    fn scatter(&mut self, data: &mut [u8]) {
        for _ in 0..3 {
            let at = self.rng.within(0..data.len() as u64) as usize;
            data[at] = 0x77;
        }
    }

    fn read(&mut self) {
        let range = self.range();
        self.note(format!("read {range:x?}"));
        // What is in the buffer before must not show.
        let mut found = vec![0xee; (range.end - range.start) as usize];
        self.image.read(range.start, &mut found).unwrap();
        self.assert_read(&found, &self.expected[bytes(&range)]);
        if self.rng.one_in(10) {
            let mut past = vec![0xee; 5000];
            self.image.read(self.size() - 300, &mut past).unwrap();
            self.assert_read(&past[..300], &self.expected[self.expected.len() - 300..]);
            assert!(past[300..].iter().all(|&b| b == 0), "past the end there are zeros");
        }
    }

    fn clear(&mut self, discard: bool) {
        let mut range = self.range();
        if self.rng.one_in(10) {
            range.end += self.rng.within(0..1 << 20);
        }
        self.note(format!("{} {range:x?}", if discard { "discard" } else { "zero" }));
        let result = match discard {
            true => self.image.discard(range.clone()),
            false => self.image.write_zeroes(range.clone()),
        };
        result.unwrap();
        let within = range.start..range.end.min(self.size());
        self.expected[bytes(&within)].fill(0);
        if discard && !self.maps_zeros() {
            self.assert_unmapped(&within);
        }
    }

    /// Whole clusters, or subclusters, within a range that was just discarded are holes.
    fn assert_unmapped(&self, range: &Range<u64>) {
        let unit = self.made.shape.subcluster_size();
        let start = range.start.next_multiple_of(unit);
        let end = match range.end == self.size() {
            true => range.end,
            false => range.end / unit * unit,
        };
        if start < end {
            assert_eq!(self.image.next_hole(start).unwrap(), start, "{range:x?} is discarded");
            let data = self.image.next_data(start).unwrap();
            assert!(data.is_none_or(|at| at >= end), "{range:x?} is discarded, data at {data:x?}");
        }
    }

    fn preallocate(&mut self) {
        let range = self.range();
        self.note(format!("preallocate {range:x?}"));
        self.image.preallocate(range).unwrap();
    }

    /// Data and holes alternate up to the end, and what is called a hole reads as zeros.
    fn seek(&mut self) {
        let mut at = self.rng.within(0..self.size());
        self.note(format!("seek from {at:x}"));
        for _ in 0..20 {
            let data = self.image.next_data(at).unwrap();
            let hole_end = data.unwrap_or(self.size());
            assert!(hole_end >= at && hole_end <= self.size(), "{at:x}: data at {hole_end:x}");
            let hole = &self.expected[at as usize..hole_end as usize];
            assert!(hole.iter().all(|&b| b == 0), "{at:x}..{hole_end:x} is no hole");
            let Some(data) = data else { break };
            at = self.image.next_hole(data).unwrap();
            assert!(at > data && at <= self.size(), "the data at {data:x} ends at {at:x}");
            if at == self.size() {
                break;
            }
        }
    }

    fn resize(&mut self) {
        if self.made.has_snapshots() && self.made.shape.version == 2 {
            return;
        }
        let grain = *self.rng.pick(&[512, self.grains[3].min(self.most)]);
        let size = (self.rng.within(1..self.most + 1)).next_multiple_of(grain).min(self.most);
        self.note(format!("resize {:x} to {size:x}", self.size()));
        self.image.resize(size).unwrap();
        assert_eq!(self.image.virtual_size(), size);
        self.expected.resize(size as usize, 0);
        self.refuse_past_end();
    }

    fn refuse_past_end(&self) {
        let past = self.image.write(self.size() - 1, &[1, 2]).unwrap_err();
        assert_eq!(past.kind(), ErrorKind::Invalid, "{past}");
    }

    fn discard_everything(&mut self) {
        self.note("discard everything".into());
        self.image.discard(0..self.size()).unwrap();
        self.expected.fill(0);
        if !self.maps_zeros() {
            assert_eq!(self.image.next_data(0).unwrap(), None);
        }
    }

    /// Whether zeros stay mapped.
    fn maps_zeros(&self) -> bool {
        (self.made.is_backed() && self.made.shape.version == 2)
            || self.made.shape.data_file == DataFile::Raw
    }

    fn close(&mut self) {
        self.note("close".into());
        self.image.close().unwrap();
    }

    fn open(&mut self) {
        let options = busy(&mut self.rng);
        self.note(format!("open with {options:?}"));
        self.image = self.made.open(&options).unwrap();
        assert_eq!(self.image.virtual_size(), self.size());
    }

    fn reopen(&mut self) {
        self.close();
        self.open();
    }

    /// QEMU finds the closed image sound and reads the same from it.
    fn judge(&mut self) {
        self.close();
        qemu::assert_clean(&self.made.path);
        qemu::assert_same(&self.made.path, &self.expected);
        self.made.assert_snapshots(&self.made.path).unwrap();
        if let Some(data) = self.made.data_path() {
            self.made.assert_raw_data(&std::fs::read(data).unwrap(), &self.expected).unwrap();
        }
        if self.rng.one_in(3) {
            self.note("QEMU takes or deletes a snapshot".into());
            self.made.change_snapshots(&self.expected, &mut self.rng);
        }
        qemu::assert_clean(&self.made.path);
        self.open();
        self.assert_all_read();
    }

    /// The other direction: QEMU writes into what we wrote, and we read it.
    fn let_qemu_write(&mut self) {
        self.close();
        let mut commands = Vec::new();
        for _ in 0..self.rng.within(1..12) {
            let range = self.range();
            let (start, length) = (range.start, range.end - range.start);
            let byte = self.rng.within(1..256) as u8;
            let (command, byte) = match self.rng.within(0..4) {
                0 => (format!("write -z -u {start} {length}"), 0),
                1 => (format!("write -z {start} {length}"), 0),
                _ => (format!("write -P {byte} {start} {length}"), byte),
            };
            self.expected[bytes(&range)].fill(byte);
            self.note(format!("qemu-io {command}"));
            commands.push(command);
        }
        qemu::io(&self.made.path, &commands);
        if self.rng.one_in(2) && self.made.shape.data_file == DataFile::None {
            self.let_qemu_compress();
        }
        qemu::assert_clean(&self.made.path);
        self.open();
        self.assert_all_read();
    }

    fn let_qemu_compress(&mut self) {
        let range = self.rng.range(self.size(), self.grains[3] * 4, &self.grains[3..4]);
        let (start, length) = (range.start, range.end - range.start);
        let byte = self.rng.within(1..256) as u8;
        let command = format!("write -c -P {byte} {start} {length}");
        self.note(format!("qemu-io {command}"));
        qemu::io(&self.made.path, &[format!("write -z -u {start} {length}")]);
        self.expected[bytes(&range)].fill(0);
        if qemu::try_io(&self.made.path, &[command]).is_ok() {
            self.expected[bytes(&range)].fill(byte);
        } else {
            // Some of its clusters may have been written.
            self.expected = qemu::contents(&self.made.path, None);
            qemu::repair_leaks(&self.made.path);
        }
    }

    fn assert_all_read(&self) {
        let mut found = vec![0xee; self.expected.len()];
        self.image.read(0, &mut found).unwrap();
        self.assert_read(&found, &self.expected);
    }

    #[track_caller]
    fn assert_read(&self, found: &[u8], expected: &[u8]) {
        if let Some(difference) = difference(found, expected) {
            panic!("we read {difference}");
        }
    }

    fn end(mut self) {
        self.assert_all_read();
        self.judge();
        self.close();
        let error = self.image.write(0, &[1]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
    }
}

/// On failure, what was done.
impl Drop for History {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let last = self.done.len().saturating_sub(80);
            eprintln!("the last steps:\n  {}", self.done[last..].join("\n  "));
        }
    }
}

fn bytes(range: &Range<u64>) -> Range<usize> {
    range.start as usize..range.end as usize
}

fn steps(rng: &mut Rng) -> u64 {
    setting("QCOW2FS_MODEL_STEPS").unwrap_or_else(|| rng.within(20..300))
}

#[test]
fn disks_of_any_shape_hold_what_was_written() {
    for_seeds("disks_of_any_shape_hold_what_was_written", 12, |seed| {
        let directory = scratch();
        let mut rng = Rng::new(seed);
        let shape = Shape::random(&mut rng, 16 << 20).encrypted_one_in(4, &mut rng);
        println!("{seed}: {shape} {} bytes, {}", shape.size, shape.encryption);
        let most = shape.size.max(4 * shape.cluster_size()) * 3 / 2 / 512 * 512;
        let made = Made::furnished(shape, directory.path(), &mut rng);
        let mut history = History::begin(seed, made, most);
        for _ in 0..steps(&mut rng) {
            history.step();
        }
        history.end();
    });
}

/// Subclusters of 512 bytes to 64 KiB, with all that there can be around them.
#[test]
fn disks_with_subclusters_hold_what_was_written() {
    for_seeds("disks_with_subclusters_hold_what_was_written", 12, |seed| {
        let directory = scratch();
        let mut rng = Rng::new(seed);
        let mut shape = Shape::random(&mut rng, 1 << 20);
        shape.version = 3;
        shape.cluster_bits = *rng.pick(&[14, 14, 14, 14, 16, 16, 16, 21]);
        shape.extended_l2 = true;
        shape.data_file = DataFile::None;
        shape.size = (shape.cluster_size() * rng.within(1..12) - rng.within(0..32) * 512).max(512);
        let shape = shape.encrypted_one_in(4, &mut rng);
        println!("{seed}: {shape} {} bytes, {}", shape.size, shape.encryption);
        let most = shape.size.max(4 * shape.cluster_size()) * 3 / 2 / 512 * 512;
        // Short histories: what shows through is soon hidden.
        let backed = !rng.one_in(3);
        let made = Made::furnished_over(backed, shape, directory.path(), &mut rng);
        let mut history = History::begin(seed, made, most);
        for _ in 0..steps(&mut rng).min(60) {
            history.step();
        }
        history.end();
    });
}

/// With 512-byte clusters a refcount block counts 32 KiB to 2 MiB of the file, an L2 table maps
/// 32 KiB and a cluster of the refcount table leads to 2 MiB at the widest: all must grow often.
#[test]
fn tables_of_small_clusters_grow() {
    for_seeds("tables_of_small_clusters_grow", 10, |seed| {
        let directory = scratch();
        let mut rng = Rng::new(seed);
        let refcount_bits = *rng.pick(&[64, 64, 32, 16, 8, 1]);
        let (cluster_bits, size) = *rng.pick(&[(9, 6 << 20), (10, 12 << 20)]);
        let shape = Shape::new(cluster_bits, refcount_bits, size);
        println!("{seed}: {shape} {} bytes", shape.size);
        let made = Made::empty(shape, directory.path());
        let mut history = History::begin(seed, made, 2 * size);
        for _ in 0..steps(&mut rng) {
            if history.rng.one_in(3) {
                history.write_much();
            }
            history.step();
        }
        history.end();
    });
}

impl History {
    fn write_much(&mut self) {
        let range = self.rng.range(self.size(), 1 << 20, &self.grains);
        self.note(format!("write {range:x?}"));
        let mut data = vec![0; (range.end - range.start) as usize];
        self.fill(&mut data);
        self.image.write(range.start, &data).unwrap();
        self.expected[bytes(&range)].copy_from_slice(&data);
    }
}
