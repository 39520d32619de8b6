//! Small images of several shapes, made by QEMU, and where their metadata is.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use qcow2fs::format::{
    BitmapBits, BitmapsExtension, EXTENSION_BITMAPS, Header, Snapshot, bitmap_directory,
};
use qcow2fs::image::{Beside, Image, RawBacking};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::MemoryStorage;

use crate::support::{qemu, scratch};

/// Bytes of a mutated disk that are read and written at most.
pub const DISK: u64 = 256 << 10;

/// What an image is made like.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    pub name: &'static str,
    /// For `qemu-img create -o`.
    options: &'static str,
    is_backed: bool,
    has_data_file: bool,
    has_bitmap: bool,
    has_snapshots: bool,
    is_compressed: bool,
}

const PLAIN: Recipe = Recipe {
    name: "plain",
    options: "cluster_size=512",
    is_backed: false,
    has_data_file: false,
    has_bitmap: false,
    has_snapshots: false,
    is_compressed: false,
};

/// Every structure that the format has is in one of them.
pub const RECIPES: [Recipe; 8] = [
    Recipe {
        name: "everything",
        has_bitmap: true,
        has_snapshots: true,
        is_compressed: true,
        ..PLAIN
    },
    Recipe {
        name: "version 2",
        options: "compat=0.10,cluster_size=512",
        has_snapshots: true,
        ..PLAIN
    },
    Recipe {
        name: "backed, zstd",
        options: "cluster_size=1k,compression_type=zstd",
        is_backed: true,
        is_compressed: true,
        ..PLAIN
    },
    Recipe { name: "wide refcounts", options: "cluster_size=512,refcount_bits=64", ..PLAIN },
    Recipe {
        name: "narrow refcounts",
        options: "cluster_size=512,refcount_bits=1,lazy_refcounts=on",
        has_bitmap: true,
        ..PLAIN
    },
    Recipe { name: "data file", options: "cluster_size=512", has_data_file: true, ..PLAIN },
    Recipe {
        name: "raw data file",
        options: "cluster_size=512,data_file_raw=on",
        has_data_file: true,
        ..PLAIN
    },
    Recipe {
        name: "subclusters",
        options: "cluster_size=16k,extended_l2=on",
        is_backed: true,
        has_snapshots: true,
        is_compressed: true,
        ..PLAIN
    },
];

/// An image that is sound.
pub struct Sound {
    pub recipe: Recipe,
    pub file: MemoryStorage,
    data: Option<MemoryStorage>,
    backing: Option<Arc<MemoryStorage>>,
    /// Byte ranges of the file that hold metadata.
    pub metadata: Vec<Range<u64>>,
}

impl Sound {
    pub fn make(recipe: Recipe) -> Sound {
        let directory = scratch();
        let at = |name: &str| directory.path().join(name);
        let path = at("image");
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o", recipe.options]);
        if recipe.is_backed {
            std::fs::write(at("base.raw"), vec![0xbb; 40 << 10]).unwrap();
            create.args(["-F", "raw", "-b"]).arg(at("base.raw"));
        }
        if recipe.has_data_file {
            create.arg("-o").arg(format!("data_file={}", at("data").display()));
        }
        qemu::run(create.arg(&path).arg("100k"));
        if recipe.has_bitmap {
            qemu::run(
                Command::new("qemu-img").args(["bitmap", "--add", "-g", "1k"]).arg(&path).arg("b"),
            );
        }
        let io = |commands: &[&str]| {
            let commands: Vec<String> = commands.iter().map(|&c| c.to_owned()).collect();
            qemu::io(&path, &commands);
        };
        io(&["write -P 1 3k 9k", "write -P 2 64k 5k", "write -z 32k 16k"]);
        if recipe.is_compressed {
            io(&["write -c -P 3 80k 16k"]);
        }
        for name in ["first", "second"].iter().take(if recipe.has_snapshots { 2 } else { 0 }) {
            qemu::run(Command::new("qemu-img").args(["snapshot", "-c", name]).arg(&path));
            io(&["write -P 4 4k 2k", "discard 64k 2k"]);
        }
        let file = read(&path);
        let mut sound = Sound {
            recipe,
            data: recipe.has_data_file.then(|| read(&at("data"))),
            backing: recipe.is_backed.then(|| Arc::new(read(&at("base.raw")))),
            metadata: Vec::new(),
            file,
        };
        sound.metadata = metadata(&sound.file);
        sound
    }

    /// What an image that says this needs beside itself.
    pub fn beside(&self, file: &dyn Storage) -> Beside {
        let Ok(summary) = Image::summarize(file) else { return Beside::default() };
        let none = || Arc::new(MemoryStorage::new(vec![7; 4096]));
        let backing = summary.backing.map(|_| {
            let raw = self.backing.clone().unwrap_or_else(none);
            Arc::new(RawBacking::new(raw).unwrap()) as _
        });
        let data = summary.data_file.map(|_| match &self.data {
            Some(data) => Arc::new(data.fork()) as _,
            None => none() as _,
        });
        Beside { backing, data, cipher: None }
    }
}

fn read(path: &Path) -> MemoryStorage {
    MemoryStorage::new(std::fs::read(path).unwrap())
}

/// Where the metadata of a sound image is: whole clusters, but for a header's.
fn metadata(file: &MemoryStorage) -> Vec<Range<u64>> {
    let bytes = file.contents();
    let header = Header::parse(&bytes).unwrap();
    let g = header.geometry;
    let size = g.cluster_size();
    let words = |at: u64, count: u64| -> Vec<u64> {
        let word = |i: u64| bytes[(at + i * 8) as usize..][..8].try_into().unwrap();
        (0..count).map(|i| u64::from_be_bytes(word(i))).collect()
    };
    let offset = |word: &u64| word & 0x00ff_ffff_ffff_fe00;
    let mut clusters = BTreeSet::new();
    let mut enter = |at: u64, length: u64| clusters.extend(at / size..(at + length).div_ceil(size));
    enter(0, 1);
    let (table, in_table) =
        (header.refcount_table_offset.0, u64::from(header.refcount_table_clusters) * size);
    enter(table, in_table);
    words(table, in_table / 8).iter().filter(|w| **w != 0).for_each(|w| enter(*w, 1));
    let mut l1_tables = vec![(header.l1_table_offset.0, u64::from(header.l1_size))];
    let mut at = header.snapshots_offset.0;
    for _ in 0..header.snapshot_count {
        let fixed = bytes[at as usize..][..Snapshot::FIXED_LENGTH].try_into().unwrap();
        let length = Snapshot::length(fixed).unwrap() as u64;
        let snapshot = Snapshot::parse(&bytes[at as usize..(at + length) as usize]);
        l1_tables.push((snapshot.l1_table_offset.0, u64::from(snapshot.l1_size)));
        enter(at, length);
        at += length.next_multiple_of(8);
    }
    for (at, entries) in l1_tables {
        enter(at, entries * 8);
        words(at, entries).iter().map(offset).filter(|at| *at != 0).for_each(|at| enter(at, 1));
    }
    if let Some(extension) = header.extension(EXTENSION_BITMAPS) {
        let fields = BitmapsExtension::parse(extension, &g).unwrap();
        let (at, length) = (fields.directory_offset.0, fields.directory_size);
        enter(at, length);
        let directory = &bytes[at as usize..(at + length) as usize];
        for bitmap in bitmap_directory(directory, fields.count, &header).unwrap() {
            let (at, entries) = (bitmap.table_offset.0, u64::from(bitmap.table_entries));
            enter(at, entries * 8);
            for word in words(at, entries) {
                if let BitmapBits::Stored(cluster) = BitmapBits::decode(word, &g).unwrap() {
                    enter(g.host_offset(cluster).0, 1);
                }
            }
        }
    }
    clusters.iter().map(|c| c * size..((c + 1) * size).min(bytes.len() as u64)).collect()
}
