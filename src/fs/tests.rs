//! Verbs without a mount.

use std::path::Path;
use std::process::Command;

use super::verbs::Register;
use super::*;

const MIB: u64 = 1 << 20;
/// There is no kernel.
const NOBODY: Register<'_> = &|_| Err(io::Error::from(io::ErrorKind::Unsupported));

/// Verbs on a directory with the image `disk.qcow2` of 1 MiB, which is open.
struct Disk {
    _dir: tempfile::TempDir,
    verbs: Verbs,
    node: Arc<Node>,
    handle: u64,
}

impl Disk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(dir.path().join("disk.qcow2"))
            .arg("1M")
            .status();
        assert!(made.unwrap().success());
        let catalog = Arc::new(Catalog::new(dir.path(), Default::default()).unwrap());
        let ino = catalog.lookup(crate::catalog::ROOT, "disk.raw".as_ref()).unwrap().ino;
        let node = catalog.node(ino).unwrap();
        let verbs = Verbs::new(catalog, PathBuf::from("/mnt"), false);
        let how = Opening { write: true, direct: false };
        let handle = verbs.open(ino, how, NOBODY).unwrap().handle;
        Disk { _dir: dir, verbs, node, handle }
    }

    fn size(&self) -> u64 {
        self.verbs.catalog.attributes(&self.node).unwrap().size
    }

    fn read(&self, offset: u64, size: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.verbs.read(&self.node, offset, size, |read| bytes = read.unwrap().to_vec());
        bytes
    }

    fn allocate(&self, offset: u64, length: u64, mode: i32) -> Result<(), i32> {
        self.verbs.allocate(&self.node, offset, length, mode).map_err(|e| e.errno())
    }

    fn seek(&self, offset: u64, whence: i32) -> Result<u64, i32> {
        let handle = self.verbs.handle(self.handle).unwrap();
        self.verbs.seek(&handle, offset as i64, whence).map_err(|e| e.errno())
    }
}

const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;

#[test]
fn holes_read_as_zeros_whatever_was_read_before() {
    let disk = Disk::new();
    disk.verbs.write(&disk.node, 0, &[0xab; 1 << 16]).unwrap();
    disk.verbs.write(&disk.node, 4 * MIB - 1, &[0]).unwrap();
    let byte = |at| if at < 1 << 16 { 0xab } else { 0 };
    // The last but one is more than there are zeros ready.
    let ranges =
        [(1 << 16, 1 << 16), ((1 << 16) - 512, 1024), (MIB, 2 * MIB), (4 * MIB - 4096, 8192)];
    for (from, size) in ranges {
        assert!(disk.read(0, 1 << 16) == [0xab; 1 << 16], "the data");
        let expected: Vec<u8> = (from..(from + size).min(4 * MIB)).map(byte).collect();
        assert!(disk.read(from, size as u32) == expected, "{size} bytes from {from}");
    }
}

#[test]
fn reads_end_at_the_end_of_the_disk() {
    let disk = Disk::new();
    disk.verbs.write(&disk.node, MIB - 4, b"last").unwrap();
    assert_eq!(disk.read(MIB - 4, 4096), b"last");
    assert_eq!(disk.read(MIB, 4096), b"");
    assert_eq!(disk.read(u64::MAX, 1), b"");
}

#[test]
fn a_write_past_the_end_grows_the_disk_by_whole_sectors() {
    let disk = Disk::new();
    disk.verbs.write(&disk.node, MIB - 1, b"ab").unwrap();
    assert_eq!(disk.size(), MIB + 512);
    assert_eq!(disk.read(MIB - 1, 3), b"ab\0");
    let error = disk.verbs.write(&disk.node, u64::MAX, b"ab").unwrap_err();
    assert_eq!(error.errno(), libc::EFBIG);
}

#[test]
fn every_way_to_allocate_does_what_it_says() {
    let disk = Disk::new();
    let data = vec![7; 3 * 65536];
    for (mode, grows) in [(0, true), (KEEP, false)] {
        assert_eq!(disk.allocate(disk.size(), 100, mode), Ok(()));
        assert_eq!(disk.size(), MIB + 512, "mode {mode} {grows}");
    }
    for mode in [PUNCH | KEEP, ZERO | KEEP, ZERO] {
        disk.verbs.write(&disk.node, 0, &data).unwrap();
        assert_eq!(disk.allocate(1000, 100_000, mode), Ok(()));
        let read = disk.read(0, data.len() as u32);
        assert!(read[..1000].iter().chain(&read[101_000..]).all(|byte| *byte == 7), "{mode}");
        assert!(read[1000..101_000].iter().all(|byte| *byte == 0), "{mode}");
    }
    assert_eq!(disk.allocate(MIB + 512, 1, ZERO), Ok(()));
    assert_eq!(disk.size(), MIB + 1024);
    for unknown in [PUNCH, libc::FALLOC_FL_COLLAPSE_RANGE, libc::FALLOC_FL_INSERT_RANGE] {
        assert_eq!(disk.allocate(0, 4096, unknown), Err(libc::EOPNOTSUPP));
    }
    assert_eq!(disk.allocate(u64::MAX, 2, KEEP), Err(libc::EFBIG));
}

#[test]
fn seeking_finds_data_and_holes_and_the_end() {
    let disk = Disk::new();
    disk.verbs.write(&disk.node, 65536, b"x").unwrap();
    assert_eq!(disk.seek(0, libc::SEEK_DATA), Ok(65536));
    assert_eq!(disk.seek(70_000, libc::SEEK_DATA), Ok(70_000));
    assert_eq!(disk.seek(70_000, libc::SEEK_HOLE), Ok(131_072));
    assert_eq!(disk.seek(0, libc::SEEK_HOLE), Ok(0));
    assert_eq!(disk.seek(131_072, libc::SEEK_DATA), Err(libc::ENXIO));
    for whence in [libc::SEEK_DATA, libc::SEEK_HOLE] {
        assert_eq!(disk.seek(MIB, whence), Err(libc::ENXIO));
        assert_eq!(disk.seek(u64::MAX, whence), Err(libc::ENXIO));
    }
    disk.verbs.write(&disk.node, MIB - 1, b"x").unwrap();
    assert_eq!(disk.seek(MIB - 1, libc::SEEK_HOLE), Ok(MIB));
}

#[test]
fn a_size_is_rounded_up_to_whole_sectors() {
    let disk = Disk::new();
    for (asked, gets) in [(1, 512), (0, 0), (513, 1024), (2 * MIB, 2 * MIB)] {
        disk.verbs
            .set_attributes(&disk.node, Some(asked), Default::default(), Requester::US)
            .unwrap();
        assert_eq!(disk.size(), gets);
    }
    let huge =
        disk.verbs.set_attributes(&disk.node, Some(u64::MAX), Default::default(), Requester::US);
    assert_eq!(huge.unwrap_err().errno(), libc::EFBIG);
}

#[test]
fn the_status_names_the_open_images() {
    let disk = Disk::new();
    let number = disk.verbs.open_status().unwrap();
    let Handle::Text(text) = &*disk.verbs.handle(number).unwrap() else { panic!("no text") };
    let status: serde_json::Value = serde_json::from_slice(text).unwrap();
    assert_eq!(status["pid"], std::process::id());
    assert_eq!(status["mountpoint"], "/mnt");
    assert_eq!(status["images"][0]["name"], "disk.raw");
    assert_eq!(status["images"][0]["health"], "ok");
    disk.verbs.release(disk.handle);
    disk.verbs.release(number);
    assert!(disk.verbs.handle(number).is_err());
    assert!(disk.verbs.catalog.status(Path::new("/")).images.is_empty());
}

#[test]
fn close_tells_of_an_image_that_takes_no_more_writes() {
    let disk = Disk::new();
    let handle = disk.verbs.handle(disk.handle).unwrap();
    disk.verbs.closing(&handle).unwrap();
    disk.node.with_image(|image| image.close()).unwrap();
    assert_eq!(disk.verbs.closing(&handle).unwrap_err().errno(), libc::EIO);
}

#[test]
fn what_others_were_faster_to_make_is_left_to_the_kernel_to_check() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let disk = Disk::new();
    let path = disk._dir.path().join("disk.qcow2");
    let owner = std::fs::metadata(&path).unwrap().uid();
    let root = disk.verbs.catalog.node(crate::catalog::ROOT).unwrap();
    let create = |uid: u32, flags: i32| {
        let creator = Requester { uid, gid: uid };
        let made = disk.verbs.create(&root, "disk.raw".as_ref(), 0o644, creator, flags, NOBODY);
        made.map(|made| disk.verbs.release(made.opened.handle)).map_err(|e| e.errno())
    };
    let set = |mode| std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
    set(0o666);
    for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_RDWR | libc::O_TRUNC] {
        assert_eq!(create(owner + 1, flags), Err(libc::ESTALE), "{flags:#o}");
        assert_eq!(create(owner + 1, flags | libc::O_EXCL), Err(libc::EEXIST), "{flags:#o}");
    }
    assert_eq!(disk.size(), MIB, "cut by somebody who may not");
    assert_eq!(create(owner, libc::O_RDWR), Ok(()));
    assert_eq!(create(owner, libc::O_RDWR | libc::O_EXCL), Err(libc::EEXIST));
    set(0o444);
    assert_eq!(create(owner, libc::O_RDONLY), Ok(()));
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(create(owner, flags), Err(libc::ESTALE), "{flags:#o}");
    }
}
