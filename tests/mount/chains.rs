//! Chains of backing files: where they may lie, what is refused and why, and that nobody writes to
//! a file that an overlay is reading.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;

use crate::devices::{FileSystem, LoopDevice};
use crate::discards::{open, read_all};
use crate::lab::{Lab, Mount, assert_same, assert_sound, guest_bytes, pattern, wait_until_free};
use crate::locks::Nbd;

const MIB: usize = 1 << 20;

/// An image with `data` in it, made by qemu-img; `options` as for its `convert`.
fn image_of(lab: &Lab, name: &str, data: &[u8], options: &str) -> PathBuf {
    let (source, image) = (lab.path("source"), lab.image(name));
    fs::write(&source, data).unwrap();
    sh!("qemu-img convert -f raw -O qcow2 {options} {} {}", source.display(), image.display());
    image
}

/// An overlay on whatever `backing` names, unchecked. An empty `format` is not recorded.
fn overlay_on(lab: &Lab, name: &str, backing: &str, format: &str) -> PathBuf {
    let image = lab.create(name, "2M", "");
    // Without a format this version of qemu-img makes no overlay; the extension is taken out.
    let recorded = if format.is_empty() { "raw" } else { format };
    sh!("qemu-img rebase -u -f qcow2 -b '{backing}' -F {recorded} {}", image.display());
    if format.is_empty() {
        forget_format(&image);
    }
    image
}

/// Turns the backing format into an extension that nobody knows.
fn forget_format(image: &Path) {
    let mut bytes = fs::read(image).unwrap();
    let kind = 0xe279_2aca_u32.to_be_bytes();
    let at = bytes.windows(4).position(|word| word == kind).expect("a recorded format");
    bytes[at..at + 4].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
    fs::write(image, bytes).unwrap();
}

fn errno_of(opened: io::Result<File>) -> i32 {
    opened.map(drop).expect_err("opened all the same").raw_os_error().unwrap()
}

/// Readers and writers of `overlay` get `errno`, the log says exactly `why` of it, and not a byte
/// of it changes.
fn assert_refused(lab: &Lab, mount: &Mount, overlay: &Path, errno: i32, why: &str) {
    let before = fs::read(overlay).unwrap();
    let name = overlay.strip_prefix(lab.images()).unwrap();
    let raw = mount.path(name.with_extension("raw").to_str().unwrap());
    assert_eq!(errno_of(File::open(&raw)), errno, "{raw:?} for reading");
    assert_eq!(errno_of(OpenOptions::new().write(true).open(&raw)), errno, "{raw:?} for writing");
    let line = format!("{}: {why}", name.display());
    let log = mount.log();
    assert!(log.lines().any(|l| l.ends_with(&line)), "no line ends with\n{line}\nin\n{log}");
    assert_same(&fs::read(overlay).unwrap(), &before, "the refused overlay");
}

/// A disk through the mount is what qemu reads, also when it is read by four at once.
fn assert_reads_as_qemu(mount: &Mount, raw: &str, image: &Path) {
    let expected = guest_bytes(image);
    let raw = mount.path(raw);
    thread::scope(|scope| {
        for reader in 0..4 {
            let (raw, expected) = (&raw, &expected);
            scope.spawn(move || {
                let file = File::open(raw).unwrap();
                let mut bytes = vec![0; 192 << 10];
                // Each starts elsewhere, so that they meet.
                let pieces = expected.len().div_ceil(bytes.len());
                for n in 0..pieces {
                    let at = (n + reader * pieces / 4) % pieces * bytes.len();
                    let read = file.read_at(&mut bytes, at as u64).unwrap();
                    let end = (at + bytes.len()).min(expected.len());
                    assert_same(&bytes[..read], &expected[at..end], &format!("from {at:#x}"));
                }
            });
        }
    });
}

#[test]
fn a_chain_through_subdirectories_reads_as_qemu_reads_it() {
    let lab = Lab::new();
    for name in ["images/bases", "images/layers/deep"] {
        lab.subdirectory(name);
    }
    let data = pattern(1, 3 * MIB + 512);
    fs::write(lab.image("bases/bottom.img"), &data).unwrap();
    let mut before = vec![(lab.image("bases/bottom.img"), data)];
    for (name, size, backing, format, options) in [
        ("bases/base.qcow2", "3M", "bottom.img", "raw", "compat=0.10,cluster_size=4k"),
        ("layers/middle.qcow2", "5M", "../bases/base.qcow2", "qcow2", "cluster_size=2M"),
        ("layers/deep/top.qcow2", "4M", "../middle.qcow2", "qcow2", "cluster_size=512"),
    ] {
        let image = lab.image(name);
        sh!(
            "qemu-img create -q -f qcow2 -b {backing} -F {format} -o {options} {0} {size}
             qemu-io -f qcow2 -c 'write -P 0x{1:02x} {1}k 100k' -c 'write -z 1M 70k' {0}",
            image.display(),
            size.as_bytes()[0]
        );
        before.push((image.clone(), fs::read(&image).unwrap()));
    }
    let top = before.pop().unwrap().0;
    let mut expected = guest_bytes(&top);
    let mount = lab.mount();
    assert_reads_as_qemu(&mount, "layers/deep/top.raw", &top);
    let file = open(&mount.path("layers/deep/top.raw"));
    file.write_all_at(&pattern(2, 300_001), 2_000_001).unwrap();
    expected[2_000_001..2_300_002].copy_from_slice(&pattern(2, 300_001));
    drop(file);
    mount.umount();
    assert_same(&guest_bytes(&top), &expected, "through qemu");
    assert_sound(&top);
    for (path, bytes) in before {
        assert_same(&fs::read(&path).unwrap(), &bytes, path.to_str().unwrap());
    }
}

#[test]
fn a_file_elsewhere_is_refused_until_its_directory_is_allowed() {
    let lab = Lab::new();
    let elsewhere = lab.subdirectory("elsewhere");
    let base = image_of(&lab, "../elsewhere/base.qcow2", &pattern(3, 2 * MIB), "");
    let base = fs::canonicalize(base).unwrap();
    let absolute = overlay_on(&lab, "absolute.qcow2", base.to_str().unwrap(), "qcow2");
    let relative = overlay_on(&lab, "relative.qcow2", "../elsewhere/base.qcow2", "qcow2");
    let shadow =
        overlay_on(&lab, "shadow.qcow2", "../../../../../../../../../../etc/shadow", "raw");
    let mount = lab.mount();
    for (overlay, name, parent) in [
        (&absolute, base.to_str().unwrap(), elsewhere.to_str().unwrap()),
        (&relative, "../elsewhere/base.qcow2", elsewhere.to_str().unwrap()),
        (&shadow, "../../../../../../../../../../etc/shadow", "/etc"),
    ] {
        let why = format!(
            "backing file {name}: it lies outside the image directory: mount with \
             `--allow {parent}` to trust it"
        );
        assert_refused(&lab, &mount, overlay, libc::EOPNOTSUPP, &why);
    }
    mount.umount();
    let mount = lab.mount_with(&format!("--allow {}", elsewhere.display()));
    for overlay in ["absolute", "relative"] {
        let found = read_all(&mount.path(&format!("{overlay}.raw")));
        assert_same(&found, &pattern(3, 2 * MIB), overlay);
    }
    assert!(File::open(mount.path("shadow.raw")).is_err(), "another directory is not allowed");
    mount.umount();
}

#[test]
fn names_through_a_symbolic_link_to_an_allowed_directory_are_followed() {
    let lab = Lab::new();
    lab.subdirectory("elsewhere");
    std::os::unix::fs::symlink("elsewhere", lab.path("link")).unwrap();
    image_of(&lab, "../elsewhere/base.qcow2", &pattern(3, 2 * MIB), "");
    let link = lab.path("link");
    let name = format!("{}/base.qcow2", link.display());
    overlay_on(&lab, "overlay.qcow2", &name, "qcow2");
    let mount = lab.mount_with(&format!("--allow {}", link.display()));
    assert_same(&read_all(&mount.path("overlay.raw")), &pattern(3, 2 * MIB), "overlay");
    mount.umount();
}

/// A directory of images may have another file system mounted in it.
#[test]
fn a_mount_within_the_images_can_be_allowed() {
    let lab = Lab::new();
    let inner = lab.subdirectory("images/inner");
    let disk = FileSystem::in_memory(inner.clone());
    image_of(&lab, "inner/base.qcow2", &pattern(3, 2 * MIB), "");
    overlay_on(&lab, "inner/overlay.qcow2", "base.qcow2", "qcow2");
    let mount = lab.mount();
    assert_eq!(errno_of(File::open(mount.path("inner/overlay.raw"))), libc::EXDEV);
    mount.umount();
    let mount = lab.mount_with(&format!("--allow {}", inner.display()));
    assert_same(&read_all(&mount.path("inner/overlay.raw")), &pattern(3, 2 * MIB), "overlay");
    mount.umount();
    disk.umount();
}

#[test]
fn what_is_no_file_is_never_opened_as_one() {
    let lab = Lab::new();
    lab.subdirectory("images/dir");
    image_of(&lab, "real.qcow2", &pattern(1, 2 * MIB), "");
    std::os::unix::fs::symlink("real.qcow2", lab.image("link.img")).unwrap();
    std::os::unix::fs::symlink("dir", lab.image("linked")).unwrap();
    fs::copy(lab.image("real.qcow2"), lab.image("dir/real.img")).unwrap();
    sh!("mkfifo {}; mknod {} c 1 5", lab.image("pipe").display(), lab.image("zero").display());
    let mount = {
        for (n, name) in
            ["pipe", "zero", "dir", "link.img", "linked/real.img", "missing.img"].iter().enumerate()
        {
            overlay_on(&lab, &format!("o{n}.qcow2"), name, "raw");
        }
        lab.mount()
    };
    let refuse = |n: u32, errno, why: &str| {
        assert_refused(&lab, &mount, &lab.image(&format!("o{n}.qcow2")), errno, why);
    };
    for (n, name) in ["pipe", "zero", "dir", "link.img"].iter().enumerate() {
        let why = format!("backing file {name}: it is not a regular file");
        refuse(n as u32, libc::EOPNOTSUPP, &why);
    }
    refuse(
        4,
        libc::EOPNOTSUPP,
        "backing file linked/real.img: a symbolic link leads to it, which is not followed: \
         `qemu-img rebase -u` with its real path records that",
    );
    let missing = lab.image("missing.img").canonicalize().unwrap_or(lab.image("missing.img"));
    let why = format!(
        "backing file missing.img: opening {}: No such file or directory (os error 2)",
        missing.display()
    );
    refuse(5, libc::ENOENT, &why);
    mount.umount();
}

#[test]
fn protocols_are_refused() {
    let lab = Lab::new();
    let json = r#"json:{"driver":"file","filename":"/etc/shadow"}"#;
    let names = ["nbd:localhost:10809", "nbd+unix:///disk?socket=/s", json];
    let overlays: Vec<PathBuf> = names
        .iter()
        .enumerate()
        .map(|(n, name)| overlay_on(&lab, &format!("o{n}.qcow2"), name, "raw"))
        .collect();
    let mount = lab.mount();
    for (overlay, name) in overlays.iter().zip(names) {
        let why = format!(
            "backing file {}: it is named by a protocol, which is never followed",
            name.escape_debug()
        );
        assert_refused(&lab, &mount, overlay, libc::EOPNOTSUPP, &why);
    }
    mount.umount();
}

#[test]
fn a_format_is_never_guessed() {
    let lab = Lab::new();
    image_of(&lab, "base.qcow2", &pattern(1, 2 * MIB), "");
    let unsaid = overlay_on(&lab, "unsaid.qcow2", "base.qcow2", "");
    let vmdk = overlay_on(&lab, "vmdk.qcow2", "base.qcow2", "vmdk");
    let mount = lab.mount();
    let rebase = format!("qemu-img rebase -u -b base.qcow2 -F FORMAT {}", unsaid.display());
    let why = format!(
        "backing file base.qcow2: its format is not recorded and is never guessed: `{rebase}` \
         records it"
    );
    assert_refused(&lab, &mount, &unsaid, libc::EOPNOTSUPP, &why);
    let why = "backing file base.qcow2: its format vmdk is not served; raw and qcow2 are";
    assert_refused(&lab, &mount, &vmdk, libc::EOPNOTSUPP, why);
    sh!("{}", rebase.replace("FORMAT", "qcow2"));
    assert_same(&read_all(&mount.path("unsaid.raw")), &pattern(1, 2 * MIB), "once it is recorded");
    mount.umount();
}

#[test]
fn chains_that_lead_back_to_themselves_or_are_too_long_are_refused() {
    let lab = Lab::new();
    let itself = overlay_on(&lab, "self.qcow2", "self.qcow2", "qcow2");
    overlay_on(&lab, "one.qcow2", "two.qcow2", "qcow2");
    let two = overlay_on(&lab, "two.qcow2", "one.qcow2", "qcow2");
    // Sixty-four files behind an image, and one more.
    lab.create("c0.qcow2", "2M", "");
    for n in 1..66 {
        overlay_on(&lab, &format!("c{n}.qcow2"), &format!("c{}.qcow2", n - 1), "qcow2");
    }
    let mount = lab.mount();
    let back = "the chain of backing files leads back to itself";
    let why = format!("backing file self.qcow2: {back}");
    assert_refused(&lab, &mount, &itself, libc::EIO, &why);
    let why = format!("backing file two.qcow2: {back}");
    assert_refused(&lab, &mount, &two, libc::EIO, &why);
    assert_eq!(read_all(&mount.path("c64.raw")), vec![0; 2 * MIB]);
    let why = "backing file c0.qcow2: the chain is longer than 64 files";
    assert_refused(&lab, &mount, &lab.image("c65.qcow2"), libc::EOPNOTSUPP, why);
    mount.umount();
}

#[test]
fn nobody_writes_to_a_base_while_an_overlay_is_open() {
    let lab = Lab::new();
    let base = image_of(&lab, "base.qcow2", &pattern(1, 2 * MIB), "");
    overlay_on(&lab, "one.qcow2", "base.qcow2", "qcow2");
    overlay_on(&lab, "two.qcow2", "base.qcow2", "qcow2");
    let mount = lab.mount();
    let base_raw = mount.path("base.raw");
    let write = || OpenOptions::new().write(true).open(&base_raw);
    let one = open(&mount.path("one.raw"));
    let two = File::open(mount.path("two.raw")).unwrap();
    let reader = File::open(&base_raw).expect("readers are welcome");
    assert_eq!(errno_of(write()), libc::EROFS);
    let why =
        "base.qcow2: it is a backing or data file of one.qcow2, which is open; close that first";
    assert!(mount.log().lines().any(|line| line.ends_with(why)), "{}", mount.log());
    let cut = attempt!("truncate -s 1M {}", base_raw.display());
    assert!(cut.text().contains("Read-only file system"), "{}", cut.text());
    let qemu = attempt!("qemu-io -f qcow2 -c 'write 0 512' {}", base.display());
    assert!(qemu.text().contains("lock"), "qemu wrote to it: {}", qemu.text());
    drop(one);
    assert_eq!(errno_of(write()), libc::EROFS, "the other overlay is still open");
    drop((two, reader));
    wait_until_free(&base);
    write().unwrap().write_all_at(b"written again", 0).unwrap();
    mount.umount();
    assert_eq!(&guest_bytes(&base)[..13], b"written again");
    assert_sound(&base);
}

#[test]
fn a_base_that_is_written_to_keeps_its_overlays_closed() {
    let lab = Lab::new();
    let base = image_of(&lab, "base.qcow2", &pattern(1, 2 * MIB), "");
    let overlay = overlay_on(&lab, "overlay.qcow2", "base.qcow2", "qcow2");
    let before = fs::read(&overlay).unwrap();
    let mount = lab.mount();
    let raw = mount.path("overlay.raw");
    for holder in ["qemu", "we"] {
        let nbd = (holder == "qemu").then(|| Nbd::hold(&base, &[], lab.path("socket")));
        let writer = (holder == "we").then(|| open(&mount.path("base.raw")));
        assert_eq!(errno_of(File::open(&raw)), libc::EBUSY, "{holder} writes to the base");
        let said = |line: &str| {
            line.contains("overlay.qcow2: backing file base.qcow2: ") && line.contains("in use")
        };
        assert!(mount.log().lines().any(said), "{}", mount.log());
        if let Some(nbd) = nbd {
            nbd.end();
        }
        drop(writer);
        wait_until_free(&base);
    }
    assert_same(&read_all(&raw), &pattern(1, 2 * MIB), "when it is free");
    mount.umount();
    assert_same(&fs::read(&overlay).unwrap(), &before, "the overlay");
}

/// A base changes between two uses of its overlay, whose own file stays the same.
#[test]
fn an_overlay_shows_a_base_as_it_is_not_as_it_was() {
    let lab = Lab::new();
    let base = image_of(&lab, "base.qcow2", &pattern(1, 2 * MIB), "");
    overlay_on(&lab, "overlay.qcow2", "base.qcow2", "qcow2");
    let mount = lab.mount();
    let raw = mount.path("overlay.raw");
    assert_same(&read_all(&raw), &pattern(1, 2 * MIB), "at first");
    wait_until_free(&base);
    sh!("qemu-io -f qcow2 -c 'write -P 0x5a 0 1M' {}", base.display());
    assert_same(&read_all(&raw)[..MIB], &vec![0x5a; MIB], "after the change");
    mount.umount();
}

#[test]
fn compressed_images_read_as_qemu_reads_them_by_many_at_once() {
    for kind in ["zlib", "zstd"] {
        let lab = Lab::new();
        let mut data: Vec<u8> = (0..24 * MIB).map(|at| (at / 5000 * 7) as u8).collect();
        data[8 * MIB..12 * MIB].copy_from_slice(&pattern(4, 4 * MIB));
        let options = format!("-c -o compression_type={kind},cluster_size=64k");
        let image = image_of(&lab, "small.qcow2", &data, &options);
        let mount = lab.mount();
        assert_reads_as_qemu(&mount, "small.raw", &image);
        mount.umount();
    }
}

#[test]
fn a_file_system_on_a_disk_with_snapshots_leaves_them_alone() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "256M", "");
    let mount = lab.mount();
    let device = LoopDevice::with_direct_io(&mount.path("disk.raw"), false);
    sh!("mkfs.ext4 -q {}", device.path().display());
    let filesystem = FileSystem::mount(device.path(), lab.subdirectory("fs"));
    let file = |n: u64| lab.path("fs").join(format!("file-{n}"));
    for n in 0..8 {
        fs::write(file(n), pattern(n + 1, 4 * MIB)).unwrap();
    }
    filesystem.umount();
    device.detach();
    wait_until_free(&image);
    sh!("qemu-img snapshot -c before {}", image.display());
    let before = guest_bytes(&image);

    let device = LoopDevice::with_direct_io(&mount.path("disk.raw"), false);
    let filesystem = FileSystem::mount(device.path(), lab.path("fs"));
    for n in 0..4 {
        assert_same(&fs::read(file(n)).unwrap(), &pattern(n + 1, 4 * MIB), "before");
        fs::remove_file(file(n)).unwrap();
    }
    sh!("fstrim {}", filesystem.point().display());
    for n in 8..16 {
        fs::write(file(n), pattern(n + 1, 4 * MIB)).unwrap();
    }
    for n in 4..16 {
        assert_same(&fs::read(file(n)).unwrap(), &pattern(n + 1, 4 * MIB), "after");
    }
    filesystem.umount();
    sh!("e2fsck -fn {}", device.path().display());
    device.detach();
    mount.umount();
    assert_sound(&image);
    let held = lab.path("held");
    sh!("qemu-img convert -f qcow2 -l before -O raw {} {}", image.display(), held.display());
    assert_same(&fs::read(&held).unwrap(), &before, "the snapshot");
    sh!("qemu-img snapshot -d before {}", image.display());
    assert_sound(&image);
}
