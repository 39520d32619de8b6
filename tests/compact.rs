//! Compaction: after discards the file gets as short as its content, whatever the content is, and
//! reads what it read before.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use qcow2fs::check;
use qcow2fs::image::{CompactAfter, Image, Options};
use support::bitmaps::dirty_by_qemu;
use support::qemu;
use support::rng::Rng;
use support::{Watchdog, host_file, scratch};

const MIB: u64 = 1 << 20;

/// Open for writing, and compacting as soon as there is anything to win.
fn eager() -> Options {
    Options {
        writable: true,
        compact_after: CompactAfter::Bytes(1),
        settle_after: Duration::from_millis(50),
        flush_after: Duration::from_millis(50),
        ..Options::default()
    }
}

struct Scattered {
    directory: tempfile::TempDir,
    path: PathBuf,
    size: u64,
    cluster_size: u64,
}

impl Scattered {
    fn new(options: &str, size: u64, cluster_size: u64) -> Self {
        let directory = scratch();
        let path = directory.path().join("disk.qcow2");
        let options = format!("cluster_size={cluster_size},{options}");
        let options = options.trim_end_matches(',');
        qemu::run(
            Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2", "-o", options])
                .arg(&path)
                .arg(size.to_string()),
        );
        Scattered { directory, path, size, cluster_size }
    }

    fn open(&self, options: &Options) -> Arc<Image> {
        Image::open(host_file(&self.path), options).unwrap()
    }

    /// Fills the disk with data that differs everywhere, and discards all but about one cluster in
    /// `one_in`.
    fn fill_and_empty(&self, image: &Image, seed: u64, one_in: u64) {
        let mut rng = Rng::new(seed);
        let step = self.cluster_size.max(65536);
        let mut data = vec![0; step as usize];
        for at in (0..self.size).step_by(step as usize) {
            for word in data.chunks_exact_mut(512) {
                word[..8].copy_from_slice(&rng.next().to_le_bytes());
                word[8..16].copy_from_slice(&at.to_le_bytes());
            }
            image.write(at, &data).unwrap();
        }
        image.flush().unwrap();
        for at in (0..self.size).step_by(self.cluster_size as usize) {
            if !rng.one_in(one_in) {
                image.discard(at..at + self.cluster_size).unwrap();
            }
        }
        image.flush().unwrap();
    }

    /// What `qemu-img convert` makes of the content.
    fn converted(&self, content: &[u8]) -> PathBuf {
        let raw = self.directory.path().join("content.raw");
        let fresh = self.directory.path().join("fresh.qcow2");
        std::fs::write(&raw, content).unwrap();
        qemu::run(
            Command::new("qemu-img")
                .args(["convert", "-f", "raw", "-O", "qcow2", "-o"])
                .arg(format!("cluster_size={}", self.cluster_size))
                .args([&raw, &fresh]),
        );
        std::fs::remove_file(raw).unwrap();
        fresh
    }
}

fn lengths(path: &Path) -> (u64, u64) {
    let metadata = std::fs::metadata(path).unwrap();
    (metadata.len(), metadata.blocks() * 512)
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read(0, &mut bytes).unwrap();
    bytes
}

/// The file is as long, and takes as much, as its clusters in use are, with `slack` to spare; and
/// QEMU finds it sound.
fn assert_short(path: &Path, slack: u64) {
    qemu::assert_clean(path);
    let file = host_file(path);
    let report = check::check(&*file).unwrap();
    let used = used_clusters(path);
    let (length, allocated) = lengths(path);
    assert!(length <= used + slack, "{length} bytes long, {used} in use: {report:?}");
    assert!(allocated <= used + slack, "{allocated} bytes allocated, {used} in use");
}

/// Bytes of the clusters that are counted at all.
fn used_clusters(path: &Path) -> u64 {
    let image = Image::open(host_file(path), &Options { writable: true, ..eager() }).unwrap();
    let used = image.prospect().unwrap().used * image.cluster_size();
    image.close().unwrap();
    used
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> Result<(), String>) {
    let end = Instant::now() + Duration::from_secs(60);
    while let Err(why) = is_so() {
        assert!(Instant::now() < end, "{what} never came: {why}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_disk_emptied_at_random_becomes_as_short_as_a_converted_one_by_itself() {
    let _watchdog = Watchdog::new("compaction by itself", 300);
    for (cluster_size, size) in [(4096, 64 * MIB), (65536, 512 * MIB), (2 * MIB, 1024 * MIB)] {
        let disk = Scattered::new("", size, cluster_size);
        let image = disk.open(&eager());
        disk.fill_and_empty(&image, 7 + cluster_size, 20);
        let expected = read_all(&image);
        let before = size;
        let live = lengths(&disk.converted(&expected));
        let goal = |bytes: u64| bytes + bytes / 50 + MIB.max(2 * cluster_size);
        wait_until("a short file", || {
            let (length, allocated) = lengths(&disk.path);
            let is_short = length <= goal(live.0) && allocated <= goal(live.1);
            is_short.then_some(()).ok_or_else(|| {
                format!(
                    "{length} and {allocated}, goal {live:?}: {:?} {:?}",
                    image.prospect(),
                    image.status()
                )
            })
        });
        assert!(before > 4 * lengths(&disk.path).0, "there was something to win");
        assert!(read_all(&image) == expected);
        image.close().unwrap();
        qemu::assert_clean(&disk.path);
        qemu::assert_same(&disk.path, &expected);
    }
}

#[test]
fn what_snapshots_share_moves_once_and_stays_shared() {
    for options in ["", "compat=0.10", "refcount_bits=8"] {
        let disk = Scattered::new(options, 128 * MIB, 65536);
        let mut held = Vec::new();
        for round in 0..3u64 {
            let image = disk.open(&Options { writable: true, ..Options::default() });
            disk.fill_and_empty(&image, round, 4);
            held.push((format!("s{round}"), read_all(&image)));
            image.close().unwrap();
            let name = format!("s{round}");
            qemu::run(Command::new("qemu-img").args(["snapshot", "-c", &name]).arg(&disk.path));
        }
        // What no snapshot has goes, and what only the disk has is little.
        let image = disk.open(&Options { writable: true, ..Options::default() });
        disk.fill_and_empty(&image, 99, 40);
        let expected = read_all(&image);
        image.close().unwrap();
        qemu::run(Command::new("qemu-img").args(["snapshot", "-d", "s0"]).arg(&disk.path));
        qemu::run(Command::new("qemu-img").args(["snapshot", "-d", "s1"]).arg(&disk.path));
        held.drain(0..2);
        let image = disk.open(&Options { compact_after: CompactAfter::Off, ..eager() });
        let before = image.prospect().unwrap();
        assert!(before.win() > before.used / 2, "{before:?} leaves something to move");
        image.compact(|_| true).unwrap();
        assert!(read_all(&image) == expected);
        image.close().unwrap();
        assert_short(&disk.path, 4 * 65536);
        qemu::assert_same(&disk.path, &expected);
        for (name, content) in &held {
            assert!(qemu::contents(&disk.path, Some(name)) == *content, "{name}");
        }
    }
}

#[test]
fn compressed_clusters_are_packed_again() {
    for kind in ["zlib", "zstd"] {
        let disk = Scattered::new("", 64 * MIB, 65536);
        let image = disk.open(&Options { writable: true, ..Options::default() });
        disk.fill_and_empty(&image, 3, 1);
        image.close().unwrap();
        let packed = disk.path.with_file_name("packed.qcow2");
        let option = format!("compression_type={kind}");
        qemu::run(
            Command::new("qemu-img")
                .args(["convert", "-c", "-O", "qcow2", "-o", &option])
                .args([&disk.path, &packed]),
        );
        let whole = lengths(&packed).0;
        let open = || Image::open(host_file(&packed), &eager()).unwrap();
        let image = open();
        for at in (0..disk.size).step_by(65536) {
            if at < disk.size / 10 * 9 || at / 65536 % 10 == 3 {
                image.discard(at..at + 65536).unwrap();
            }
        }
        let expected = read_all(&image);
        image.compact(|_| true).unwrap();
        assert!(read_all(&image) == expected, "{kind}");
        image.close().unwrap();
        assert_short(&packed, 20 * 65536);
        assert!(lengths(&packed).0 < whole / 2, "{} of {whole}", lengths(&packed).0);
        qemu::assert_same(&packed, &expected);
    }
}

/// Of each host cluster with several compressed ones a piece may be left, anywhere in the file.
#[test]
fn what_is_left_of_compressed_clusters_is_packed_together() {
    let disk = Scattered::new("", 64 * MIB, 65536);
    let image = disk.open(&Options { writable: true, ..Options::default() });
    let mut rng = Rng::new(5);
    for at in (0..disk.size).step_by(65536) {
        // Two fifths cannot be compressed.
        let mut data = vec![0; 65536];
        data[..26000]
            .chunks_exact_mut(8)
            .for_each(|w| w.copy_from_slice(&rng.next().to_le_bytes()));
        image.write(at, &data).unwrap();
    }
    image.close().unwrap();
    let packed = disk.path.with_file_name("packed.qcow2");
    let ideal = disk.path.with_file_name("ideal.qcow2");
    let convert = |format, from: &Path, to: &Path| {
        let mut convert = Command::new("qemu-img");
        qemu::run(convert.args(["convert", "-c", "-f", format, "-O", "qcow2"]).args([from, to]));
    };
    for by_itself in [false, true] {
        convert("qcow2", &disk.path, &packed);
        let image = Image::open(host_file(&packed), &eager()).unwrap();
        for at in (0..disk.size).step_by(65536) {
            if !rng.one_in(10) {
                image.discard(at..at + 65536).unwrap();
            }
        }
        image.flush().unwrap();
        let expected = read_all(&image);
        let raw = disk.path.with_file_name("disk.raw");
        std::fs::write(&raw, &expected).unwrap();
        convert("raw", &raw, &ideal);
        let goal = lengths(&ideal).0 * 51 / 50 + MIB;
        match by_itself {
            true => wait_until("a short file", || match lengths(&packed) {
                (length, allocated) if length <= goal && allocated <= goal => Ok(()),
                both => Err(format!("{both:?} bytes, not {goal}: {:?}", image.status().unwrap())),
            }),
            false => image.compact(|_| true).unwrap(),
        }
        assert!(read_all(&image) == expected, "by itself: {by_itself}");
        image.close().unwrap();
        let length = lengths(&packed).0;
        assert!(length <= goal, "{length} bytes, not {goal}; by itself: {by_itself}");
        qemu::assert_clean(&packed);
        qemu::assert_same(&packed, &expected);
    }
}

#[test]
fn a_defragmented_file_is_in_the_order_of_the_disk() {
    for options in ["", "extended_l2=on", "compressed", "snapshot"] {
        let extended = if options == "extended_l2=on" { options } else { "" };
        let disk = Scattered::new(extended, 16 * MIB, 16384);
        let image = disk.open(&Options { writable: true, ..Options::default() });
        let mut rng = Rng::new(9);
        for _ in 0..700 {
            let at = rng.within(0..disk.size / 16384) * 16384;
            let mut data = vec![0; 16384];
            data[..6000]
                .chunks_exact_mut(8)
                .for_each(|w| w.copy_from_slice(&rng.next().to_le_bytes()));
            image.write(at, &data).unwrap();
        }
        let expected = read_all(&image);
        image.close().unwrap();
        if options == "compressed" {
            // As QEMU writes them when the disk is written in any order.
            let plain = disk.path.with_file_name("plain.qcow2");
            std::fs::rename(&disk.path, &plain).unwrap();
            qemu::run(
                Command::new("qemu-img")
                    .args([
                        "convert",
                        "-c",
                        "-W",
                        "-m",
                        "16",
                        "-O",
                        "qcow2",
                        "-o",
                        "cluster_size=16k",
                    ])
                    .args([&plain, &disk.path]),
            );
        }
        if options == "snapshot" {
            qemu::run(Command::new("qemu-img").args(["snapshot", "-c", "s"]).arg(&disk.path));
        }
        let still = Options { keep_erased: 0, compact_after: CompactAfter::Off, ..eager() };
        let moved = |image: &Image| image.status().unwrap().recycled.moved;
        let image = disk.open(&still);
        image.defragment(|_| true).unwrap();
        assert!(read_all(&image) == expected, "{options}");
        assert!(moved(&image) > 0, "{options}");
        image.close().unwrap();
        // What is in order is left alone.
        let image = disk.open(&still);
        image.defragment(|_| true).unwrap();
        assert_eq!(moved(&image), 0, "{options}");
        image.close().unwrap();
        assert_short(&disk.path, 0);
        qemu::assert_same(&disk.path, &expected);
        let offsets = host_offsets(&disk.path);
        // QEMU does not tell where compressed ones are.
        assert!(offsets.len() > 100 || options == "compressed", "{options}");
        let turn = offsets.windows(2).find(|pair| pair[0] > pair[1]);
        assert_eq!(turn, None, "{options}");
    }
}

/// Where QEMU says that the plain data clusters are, in the order of the disk.
fn host_offsets(path: &Path) -> Vec<u64> {
    let map = Command::new("qemu-img").args(["map", "--output=json"]).arg(path).output().unwrap();
    let map: serde_json::Value = serde_json::from_slice(&map.stdout).unwrap();
    map.as_array().unwrap().iter().filter_map(|extent| extent["offset"].as_u64()).collect()
}

#[test]
fn bitmaps_at_the_end_of_the_file_move_with_their_content() {
    let disk = Scattered::new("", 64 * MIB, 4096);
    let image = disk.open(&Options { writable: true, ..Options::default() });
    disk.fill_and_empty(&image, 5, 1);
    image.close().unwrap();
    let qemu_bitmap = |what: &[&str]| {
        qemu::run(Command::new("qemu-img").arg("bitmap").args(what).arg(&disk.path).arg("b"));
    };
    qemu_bitmap(&["--add", "-g", "512"]);
    // Some of it is stored at the end of the file.
    for at in (0..64).step_by(3) {
        let commands = [format!("write -P {} {} 9000", 1 + at, at * MIB + 4096)];
        qemu::io(&disk.path, &commands);
    }
    let recorded = dirty_by_qemu(&disk.path, "b");
    assert!(recorded.len() > 10, "{recorded:?}");
    qemu_bitmap(&["--disable"]);
    let image = disk.open(&Options { compact_after: CompactAfter::Off, ..eager() });
    image.discard(0..disk.size - MIB).unwrap();
    let before = image.prospect().unwrap();
    assert!(before.end > 16000, "{before:?}");
    image.compact(|_| true).unwrap();
    let expected = read_all(&image);
    image.close().unwrap();
    assert_short(&disk.path, 64 << 10);
    qemu::assert_same(&disk.path, &expected);
    assert_eq!(dirty_by_qemu(&disk.path, "b"), recorded);
}

#[test]
fn subclusters_keep_their_state_when_their_cluster_moves() {
    let disk = Scattered::new("extended_l2=on", 256 * MIB, 65536);
    let image = disk.open(&Options { writable: true, ..Options::default() });
    disk.fill_and_empty(&image, 11, 30);
    // Parts of clusters that lie far behind in the file.
    let mut rng = Rng::new(1);
    for at in (0..disk.size).step_by(MIB as usize) {
        let part = 2048 * rng.within(0..32);
        image.write(at + part, &[at as u8 | 1; 3000]).unwrap();
        image.discard(at + 2048 * 7..at + 2048 * 9).unwrap();
    }
    let expected = read_all(&image);
    image.compact(|_| true).unwrap();
    assert!(read_all(&image) == expected);
    image.close().unwrap();
    assert_short(&disk.path, 4 * 65536);
    qemu::assert_same(&disk.path, &expected);
}
