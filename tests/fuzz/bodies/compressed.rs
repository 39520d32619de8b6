//! Any bytes as compressed data, deflate and zstd: inflated to a cluster, or an error.

use std::sync::{Arc, LazyLock};

use qcow2fs::image::{CompressionType, CreateOptions, Image, Options};
use qcow2fs::storage::Storage;
use qcow2fs::storage::testing::MemoryStorage;

const CLUSTER: u64 = 4096;

/// An image with one L2 table, and where that is.
fn image(compression: CompressionType) -> (MemoryStorage, u64) {
    let file = Arc::new(MemoryStorage::default());
    let options = CreateOptions {
        virtual_size: 64 * CLUSTER,
        cluster_size: CLUSTER,
        compression,
        ..CreateOptions::default()
    };
    Image::create(&*file, &options).unwrap();
    let image = Image::open(
        file.clone(),
        &Options { writable: true, threads: false, ..Options::default() },
    )
    .unwrap();
    image.write(0, &[1; CLUSTER as usize]).unwrap();
    image.close().unwrap();
    let word = |at: u64| {
        let mut bytes = [0; 8];
        file.read_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let l2 = word(word(40)) & 0x00ff_ffff_ffff_fe00;
    (file.fork(), l2)
}

static IMAGES: LazyLock<[(MemoryStorage, u64); 2]> =
    LazyLock::new(|| [CompressionType::Deflate, CompressionType::Zstd].map(image));

/// Runs the target.
pub fn run(bytes: &[u8]) {
    for (origin, l2) in IMAGES.iter() {
        let file = origin.fork();
        let at = file.len().unwrap().next_multiple_of(512);
        let data = &bytes[..bytes.len().min(CLUSTER as usize)];
        // 4 KiB clusters: 4 bits for the sectors past the first.
        let sectors = (data.len() as u64).div_ceil(512).saturating_sub(1);
        let entry = 1 << 62 | sectors << 58 | at;
        file.write_at(&entry.to_be_bytes(), *l2).unwrap();
        file.write_at(data, at).unwrap();
        let image = Image::open(Arc::new(file), &Options::default()).unwrap();
        let _damage = image.read(0, &mut [0; CLUSTER as usize]);
        let _damage = image.read(512, &mut [0; 512]);
    }
}
