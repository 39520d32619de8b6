//! The persistent dirty bitmaps of an image, as they stand in its file.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::process::Command;

use qcow2fs::format::{
    BitmapBits, BitmapEntry, BitmapsExtension, EXTENSION_BITMAPS, Header, bitmap_directory,
};
use qcow2fs::storage::Storage;

use super::nbd::Nbd;
use super::qemu;

/// A bitmap as it stands in a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    pub entry: BitmapEntry,
    pub granules: BTreeSet<u64>,
    /// The bytes of its table and of its data.
    pub stored: Vec<Vec<u8>>,
}

/// The header of an image file.
pub fn header(file: &dyn Storage) -> Header {
    let mut bytes = vec![0; file.len().unwrap().min(Header::READ_LENGTH as u64) as usize];
    file.read_at(&mut bytes, 0).unwrap();
    Header::parse(&bytes).unwrap()
}

/// The bitmaps in a file; none where nobody may believe in them.
pub fn bitmaps(file: &dyn Storage) -> Vec<Found> {
    let header = header(file);
    if header.autoclear_features & 1 == 0 {
        return Vec::new();
    }
    let data = header.extension(EXTENSION_BITMAPS).expect("the autoclear bit is set");
    let extension = BitmapsExtension::parse(data, &header.geometry).unwrap();
    let mut directory = vec![0; extension.directory_size as usize];
    file.read_at(&mut directory, extension.directory_offset.0).unwrap();
    let entries = bitmap_directory(&directory, extension.count, &header).unwrap();
    entries.into_iter().map(|entry| find(file, &header, entry)).collect()
}

fn find(file: &dyn Storage, header: &Header, entry: BitmapEntry) -> Found {
    let g = &header.geometry;
    let mut table = vec![0; entry.table_entries as usize * 8];
    file.read_at(&mut table, entry.table_offset.0).unwrap();
    let mut found = Found { entry, granules: BTreeSet::new(), stored: vec![table.clone()] };
    let per_cluster = g.cluster_size() * 8;
    let last = found.entry.bits_for(header.size);
    for (first, word) in (0..).step_by(per_cluster as usize).zip(table.chunks_exact(8)) {
        let raw = u64::from_be_bytes(word.try_into().unwrap());
        let mut bits = vec![0; g.cluster_size() as usize];
        match BitmapBits::decode(raw, g).unwrap() {
            BitmapBits::Zeros => {}
            BitmapBits::Ones => bits.fill(0xff),
            BitmapBits::Stored(cluster) => {
                file.read_at(&mut bits, g.host_offset(cluster).0).unwrap();
                found.stored.push(bits.clone());
            }
        }
        let set = (0..per_cluster).filter(|n| bits[*n as usize / 8] >> (n % 8) & 1 == 1);
        found.granules.extend(set.map(|n| first + n).take_while(|n| *n < last));
    }
    found
}

/// The bytes of the disk that bitmap `name` has as dirty, as QEMU's NBD server tells its clients.
pub fn dirty_by_qemu(image: &Path, name: &str) -> Vec<Range<u64>> {
    // QEMU lists a bitmap that records only where it may write.
    let (copy, socket) = (image.with_extension("copy"), image.with_extension("socket"));
    std::fs::copy(image, &copy).unwrap();
    let server = Nbd::serve(&copy, &["-B", name], socket);
    let path = server.socket().display();
    let map = qemu::run(
        Command::new("qemu-img").args(["map", "--output=json", "--image-opts"]).arg(format!(
            "driver=nbd,server.type=unix,server.path={path},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        )),
    );
    drop(server);
    std::fs::remove_file(&copy).unwrap();
    let extents: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    let number = |extent: &serde_json::Value, field: &str| extent[field].as_u64().unwrap();
    let dirty = extents.iter().filter(|extent| extent["data"] == false);
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for extent in dirty {
        let (start, length) = (number(extent, "start"), number(extent, "length"));
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end += length,
            _ => ranges.push(start..start + length),
        }
    }
    ranges
}
