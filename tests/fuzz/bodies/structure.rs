//! A sound image, made as the first bytes say, whose fields are then changed by what they are: entries
//! that point to other structures, counts one off, sizes at their limits. A mutation of bytes hardly
//! ever comes by these.

use std::ops::Range;
use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use qcow2fs::format::{Header, Snapshot};
use qcow2fs::image::{CreateOptions, Image, Options};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::MemoryStorage;

use super::use_it::use_it;

const DISK: u64 = 128 << 10;
const OFFSETS: u64 = 0x00ff_ffff_ffff_fe00;

#[derive(Arbitrary, Debug)]
struct Shape {
    cluster_bits: u8,
    refcount_order: u8,
    extended_l2: bool,
    snapshots: u8,
    writes: [u8; 4],
}

#[derive(Arbitrary, Debug)]
enum Place {
    Header,
    L1,
    L2,
    RefcountTable,
    RefcountBlock,
    SnapshotTable,
    SnapshotL1,
}

#[derive(Arbitrary, Debug)]
enum Change {
    Set(u64),
    Add(i8),
    Flip {
        bit: u8,
    },
    /// The offset of another structure, the flags as they are.
    PointTo(Place),
    /// What stands in another field of the same structure.
    CopyOf(u8),
    /// The end of the file, or so many clusters after it.
    PastEnd(u8),
}

#[derive(Arbitrary, Debug)]
struct Edit {
    place: Place,
    field: u8,
    change: Change,
}

#[derive(Arbitrary, Debug)]
struct Input {
    shape: Shape,
    edits: Vec<Edit>,
}

fn word(file: &MemoryStorage, at: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

/// An image with some data and snapshots; `None` where the shape cannot be.
fn build(shape: &Shape) -> Option<MemoryStorage> {
    let file = Arc::new(MemoryStorage::default());
    let bits = if shape.extended_l2 { 14 } else { 9 + shape.cluster_bits % 5 };
    let options = CreateOptions {
        virtual_size: DISK,
        cluster_size: 1 << bits,
        refcount_bits: 1 << (shape.refcount_order % 7),
        extended_l2: shape.extended_l2,
        ..CreateOptions::default()
    };
    Image::create(&*file, &options).ok()?;
    let options = Options { writable: true, keep_erased: 0, threads: false, ..Options::default() };
    let image = Image::open(file.clone(), &options).unwrap();
    for (number, sector) in shape.writes.iter().enumerate() {
        let at = u64::from(*sector) * 512 % DISK;
        image.write(at, &[number as u8 + 1; 512]).unwrap();
        if number < usize::from(shape.snapshots % 3) {
            let _narrow_refcounts = image.take_snapshot(&[b'a' + number as u8]);
        }
    }
    image.close().unwrap();
    Some(file.fork())
}

/// Where each structure is; empty where there is none.
struct Map(Header, Vec<Snapshot>, MemoryStorage);

impl Map {
    fn of(file: &MemoryStorage) -> Map {
        let bytes = file.contents();
        let header = Header::parse(&bytes).unwrap();
        let mut at = header.snapshots_offset.0 as usize;
        let mut snapshots = Vec::new();
        for _ in 0..header.snapshot_count {
            let fixed = bytes[at..][..Snapshot::FIXED_LENGTH].try_into().unwrap();
            let length = Snapshot::length(fixed).unwrap();
            snapshots.push(Snapshot::parse(&bytes[at..at + length]));
            at += length.next_multiple_of(8);
        }
        Map(header, snapshots, file.fork())
    }

    fn place(&self, place: &Place) -> Range<u64> {
        let Map(header, snapshots, file) = self;
        let size = header.geometry.cluster_size();
        let l1 = header.l1_table_offset.0;
        let cluster = |at: u64| at..at + if at == 0 { 0 } else { size };
        match place {
            Place::Header => 0..112,
            Place::L1 => l1..l1 + u64::from(header.l1_size) * 8,
            Place::L2 => {
                let entries = (0..u64::from(header.l1_size)).map(|i| word(file, l1 + i * 8));
                cluster(entries.map(|entry| entry & OFFSETS).find(|at| *at != 0).unwrap_or(0))
            }
            Place::RefcountTable => cluster(header.refcount_table_offset.0),
            Place::RefcountBlock => cluster(word(file, header.refcount_table_offset.0) & OFFSETS),
            Place::SnapshotTable if snapshots.is_empty() => 0..0,
            Place::SnapshotTable => header.snapshots_offset.0..header.snapshots_offset.0 + 80,
            Place::SnapshotL1 => snapshots.first().map_or(0..0, |snapshot| {
                let at = snapshot.l1_table_offset.0;
                at..at + u64::from(snapshot.l1_size) * 8
            }),
        }
    }

    /// The new value of a word.
    fn changed(&self, old: u64, change: &Change, place: &Range<u64>) -> u64 {
        let end = self.2.len().unwrap();
        match change {
            Change::Set(value) => *value,
            Change::Add(by) => old.wrapping_add_signed(i64::from(*by)),
            Change::Flip { bit } => old ^ 1 << (bit % 64),
            Change::PointTo(other) => old & !OFFSETS | self.place(other).start,
            Change::CopyOf(field) => word(&self.2, field_at(place, *field)),
            Change::PastEnd(clusters) => {
                let size = self.0.geometry.cluster_size();
                (old & !OFFSETS) | (end.next_multiple_of(size) + u64::from(*clusters) * size)
            }
        }
    }
}

/// Where field `number` of a structure is: few have as many words as a number can count.
fn field_at(place: &Range<u64>, number: u8) -> u64 {
    let words = (place.end - place.start) / 8;
    place.start + u64::from(number) % words * 8
}

/// Runs the target.
pub fn run(bytes: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(bytes)) else { return };
    let Some(file) = build(&input.shape) else { return };
    let map = Map::of(&file);
    for Edit { place, field, change } in input.edits.iter().take(16) {
        let place = map.place(place);
        if place.is_empty() {
            continue;
        }
        let at = field_at(&place, *field);
        let new = map.changed(word(&file, at), change, &place);
        file.write_at(&new.to_be_bytes(), at).unwrap();
    }
    use_it(&file);
}
