//! External data files: that guest data goes there and nowhere else, that holes come back there,
//! which files may be one, and that nobody else has them meanwhile.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::discards::{open, read_all};
use crate::lab::{
    Lab, Mount, allocated, assert_same, assert_sound, eventually, guest_bytes, length, pattern,
    wait_until_free,
};
use crate::locks::Nbd;

const MIB: usize = 1 << 20;
/// As long as any name that a test puts in its place.
const LONG_NAME: &str =
    "a-name-that-is-longer-than-all-that-are-put-in-its-place-in-the-header.data";

/// An image whose data file lies beside it.
fn image_with_data(lab: &Lab, name: &str, options: &str) -> (PathBuf, PathBuf) {
    let data = lab.image(name).with_extension("data");
    let options = format!("data_file={},{options}", data.display());
    (lab.create(name, "16M", &options), data)
}

/// An image that says that its data file is `name`, which is not touched; and how it says so.
fn image_naming(lab: &Lab, image: &str, name: &str) -> (PathBuf, String) {
    let directory = lab.path("scrap");
    fs::create_dir_all(&directory).unwrap();
    let path = lab.image(image);
    sh!(
        "cd {} && qemu-img create -q -f qcow2 -o data_file={LONG_NAME} {} 2M",
        directory.display(),
        path.display()
    );
    let missing = LONG_NAME.len() - name.len();
    let padded = match name {
        absolute if absolute.starts_with('/') => format!("{}{name}", "/".repeat(missing)),
        protocol if protocol.starts_with("nbd:") => format!("{name}{}", "1".repeat(missing)),
        _ => format!(".{}{name}", "/".repeat(missing - 1)),
    };
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(LONG_NAME.len()).position(|w| w == LONG_NAME.as_bytes()).unwrap();
    bytes[at..at + padded.len()].copy_from_slice(padded.as_bytes());
    fs::write(&path, bytes).unwrap();
    (path, padded)
}

fn errno_of(opened: io::Result<File>) -> i32 {
    opened.map(drop).expect_err("opened all the same").raw_os_error().unwrap()
}

/// Readers and writers get `errno`, the log says `why`, and the image stays as it is.
fn assert_refused(mount: &Mount, image: &Path, errno: i32, why: &str) {
    let before = fs::read(image).unwrap();
    let raw = mount.path(image.with_extension("raw").file_name().unwrap().to_str().unwrap());
    assert_eq!(errno_of(File::open(&raw)), errno, "{raw:?} for reading");
    assert_eq!(errno_of(OpenOptions::new().write(true).open(&raw)), errno, "{raw:?} for writing");
    let log = mount.log();
    assert!(log.lines().any(|line| line.contains(why)), "no line has\n{why}\nin\n{log}");
    assert_same(&fs::read(image).unwrap(), &before, "the refused image");
}

#[test]
fn data_goes_to_the_data_file_and_comes_back_from_there() {
    for options in ["cluster_size=64k", "data_file_raw=on", "data_file_raw=on,cluster_size=4k"] {
        let lab = Lab::new();
        let (image, data) = image_with_data(&lab, "disk.qcow2", options);
        let is_raw = options.contains("raw");
        let mount = lab.mount();
        let raw = mount.path("disk.raw");
        let file = open(&raw);
        let mut expected = vec![0; 16 * MIB];
        for (seed, at, len) in [(1, 0, 5 * MIB), (2, 7 * MIB + 4321, 3 * MIB), (3, 15 * MIB, MIB)] {
            let bytes = pattern(seed, len);
            file.write_all_at(&bytes, at as u64).unwrap();
            expected[at..at + len].copy_from_slice(&bytes);
        }
        file.sync_all().unwrap();
        assert!(allocated(&data) >= 9 * MIB as u64, "{} in the data file", allocated(&data));
        assert!(allocated(&image) < MIB as u64, "data went to the image");
        assert!(length(&image) < 2 * MIB as u64, "room for data in the image");
        let shown = || fs::metadata(&raw).unwrap().blocks() * 512;
        assert_eq!(shown(), allocated(&data) + allocated(&image));
        let status = mount.status();
        let told = status["images"][0]["allocated"].as_u64().unwrap();
        assert_eq!(told, shown(), "{status}");
        sh!("fallocate -p -o 1M -l 3M {}", raw.display());
        sh!("fallocate -p -o {} -l 100 {}", 15 * MIB + 10, raw.display());
        expected[MIB..4 * MIB].fill(0);
        expected[15 * MIB + 10..15 * MIB + 110].fill(0);
        file.sync_all().unwrap();
        assert!(allocated(&data) < 7 * MIB as u64, "{} after the discard", allocated(&data));
        assert_same(&read_all(&raw), &expected, "through the mount");
        sh!("truncate -s 20M {}", raw.display());
        expected.resize(20 * MIB, 0);
        file.write_all_at(b"the end", 20 * MIB as u64 - 7).unwrap();
        expected[20 * MIB - 7..].copy_from_slice(b"the end");
        drop(file);
        mount.umount();
        assert_eq!(length(&data), 20 * MIB as u64);
        assert_same(&guest_bytes(&image), &expected, "through qemu");
        if is_raw {
            assert_same(&fs::read(&data).unwrap(), &expected, "the raw data file by itself");
            assert!(sh!("qemu-img info -U {}", image.display()).contains("data file raw: true"));
        }
        assert_sound(&image);
        sh!(
            "qemu-io -f qcow2 -d unmap -c 'write -P 9 1M 1M' -c 'discard 8M 1M' -c 'write -z 0 70000' \
             {}",
            image.display()
        );
        let expected = guest_bytes(&image);
        let mount = lab.mount_with("-o ro");
        assert_same(&read_all(&mount.path("disk.raw")), &expected, "what qemu wrote");
        mount.umount();
    }
}

#[test]
fn a_data_file_is_found_beside_its_image_and_beneath_other_images() {
    let lab = Lab::new();
    let deep = lab.subdirectory("images/deep");
    let bytes = pattern(7, 2 * MIB);
    fs::write(lab.path("source"), &bytes).unwrap();
    // QEMU takes a relative name for one in its own working directory.
    sh!(
        "cd {} && qemu-img convert -f raw -O qcow2 -o data_file=base.data ../../source base.qcow2",
        deep.display()
    );
    let top = lab.create("top.qcow2", "2M", "");
    sh!("qemu-img rebase -u -f qcow2 -b deep/base.qcow2 -F qcow2 {}", top.display());
    let before = fs::read(deep.join("base.data")).unwrap();
    let mount = lab.mount();
    assert_same(&read_all(&mount.path("deep/base.raw")), &bytes, "the base");
    let top = open(&mount.path("top.raw"));
    top.write_all_at(b"written", 5000).unwrap();
    let mut expected = bytes.clone();
    expected[5000..5007].copy_from_slice(b"written");
    assert_same(&read_all(&mount.path("top.raw")), &expected, "the overlay");
    let base = OpenOptions::new().write(true).open(mount.path("deep/base.raw"));
    assert_eq!(errno_of(base), libc::EROFS, "the base of an open overlay");
    drop(top);
    mount.umount();
    assert_same(&fs::read(deep.join("base.data")).unwrap(), &before, "the base's data");
}

#[test]
fn a_data_file_that_may_not_be_opened_is_refused_by_name() {
    let lab = Lab::new();
    let elsewhere = lab.subdirectory("elsewhere");
    fs::write(elsewhere.join("x.data"), vec![0; 2 * MIB]).unwrap();
    fs::write(lab.image("real.data"), vec![0; 2 * MIB]).unwrap();
    std::os::unix::fs::symlink("real.data", lab.image("link.data")).unwrap();
    std::os::unix::fs::symlink(".", lab.image("links")).unwrap();
    sh!("mkfifo {}", lab.image("pipe.data").display());
    let inside = format!("{}/x.data", elsewhere.canonicalize().unwrap().display());
    let allow = |dir: &str| {
        format!("it lies outside the image directory: mount with `--allow {dir}` to trust it")
    };
    let elsewhere = elsewhere.canonicalize().unwrap();
    let cases = [
        ("/etc/shadow", libc::EOPNOTSUPP, allow("/etc")),
        ("../elsewhere/x.data", libc::EOPNOTSUPP, allow(elsewhere.to_str().unwrap())),
        ("nbd:localhost:1", libc::EOPNOTSUPP, "it is named by a protocol".into()),
        ("link.data", libc::EOPNOTSUPP, "it is not a regular file".into()),
        ("links/x.data", libc::EOPNOTSUPP, "a symbolic link leads to it".into()),
        ("pipe.data", libc::EOPNOTSUPP, "it is not a regular file".into()),
        ("missing.data", libc::ENOENT, "missing.data: No such file or directory".into()),
        ("n7.qcow2", libc::EIO, "it is the image itself".into()),
    ];
    let images: Vec<_> = (0..)
        .zip(&cases)
        .map(|(n, (name, ..))| image_naming(&lab, &format!("n{n}.qcow2"), name))
        .collect();
    let mount = lab.mount();
    for ((image, named), (_, errno, why)) in images.iter().zip(&cases) {
        assert_refused(&mount, image, *errno, &format!("data file {named}: "));
        assert_refused(&mount, image, *errno, why);
    }
    mount.umount();
    let allowed = image_naming(&lab, "allowed.qcow2", "../elsewhere/x.data").0;
    let mount = lab.mount_with(&format!("--allow {}", elsewhere.display()));
    open(&mount.path("allowed.raw")).write_all_at(b"trusted", 0).unwrap();
    mount.umount();
    assert_eq!(&fs::read(inside).unwrap()[..7], b"trusted");
    sh!("$qcow2fs check {}", allowed.display());
}

#[test]
fn nobody_else_has_a_data_file_that_is_written_to() {
    let lab = Lab::new();
    let (image, data) = image_with_data(&lab, "one.qcow2", "cluster_size=64k");
    image_naming(&lab, "two.qcow2", "one.data");
    let mount = lab.mount();
    // Readers share it, a writer has it alone.
    let (one_raw, two_raw) = (mount.path("one.raw"), mount.path("two.raw"));
    let reader = File::open(&one_raw).unwrap();
    let other = File::open(&two_raw).expect("readers share it");
    let write = |path: &Path| OpenOptions::new().write(true).open(path);
    assert_eq!(errno_of(write(&one_raw)), libc::EBUSY, "two.qcow2 reads it");
    drop(other);
    let mut writer = Err(io::Error::other("not tried"));
    let mut opens = || {
        writer = write(&one_raw);
        writer.is_ok()
    };
    eventually(Duration::from_secs(10), &mut opens, || "two.qcow2 is not closed".into());
    let writer = writer.unwrap();
    assert_eq!(errno_of(File::open(&two_raw)), libc::EBUSY);
    let why = "it is a file of one.qcow2, which is open; close that";
    assert!(mount.log().contains(why), "{}", mount.log());
    let qemu = attempt!("qemu-io -f raw -c 'write 0 512' {}", data.display());
    assert!(qemu.text().contains("lock"), "qemu wrote to it: {}", qemu.text());
    writer.write_all_at(b"one's", 0).unwrap();
    drop((reader, writer));
    wait_until_free(&image);
    let nbd = Nbd::hold(&image, &[], lab.path("socket"));
    assert_eq!(errno_of(File::open(&one_raw)), libc::EBUSY, "qemu writes it");
    drop(nbd);
    mount.umount();
    assert_eq!(&guest_bytes(&image)[..5], b"one's");
}

#[test]
fn a_time_that_was_set_before_the_close_is_that_of_both_files() {
    const THEN: i64 = 1_000_000_000;
    let lab = Lab::new();
    let (image, data) = image_with_data(&lab, "disk.qcow2", "data_file_raw=on");
    let mount = lab.mount();
    let raw = mount.path("disk.raw");
    let file = open(&raw);
    file.write_all_at(&pattern(1, MIB), 0).unwrap();
    sh!("touch -d @{THEN} {}", raw.display());
    drop(file);
    let closed = || mount.status()["images"].as_array().is_some_and(Vec::is_empty);
    eventually(Duration::from_secs(10), closed, || mount.status().to_string());
    assert_eq!(fs::metadata(&raw).unwrap().mtime(), THEN);
    mount.umount();
    for file in [image, data] {
        assert_eq!(fs::metadata(&file).unwrap().mtime(), THEN, "{}", file.display());
    }
}
