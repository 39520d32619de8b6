//! The persistent dirty bitmaps of an image, as they stand in its file.

use std::collections::BTreeSet;

use qcow2fs::format::{
    BitmapBits, BitmapEntry, BitmapsExtension, EXTENSION_BITMAPS, Header, bitmap_directory,
};
use qcow2fs::storage::Storage;

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
