//! Images that read what they have not written themselves: compressed clusters, backing files,
//! clusters shared with internal snapshots. Writing and discarding here changes nothing there.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::discards::{fallocate, open, read_all};
use crate::lab::{Lab, Mount, assert_same, assert_sound, guest_bytes, pattern};
use crate::refusals::make;

/// Writes and punches at odd places of `raw`, through which `expected` is seen.
fn change(raw: &Path, expected: &mut [u8]) {
    let file = open(raw);
    file.write_all_at(&pattern(1, 100_000), 1_000_001).unwrap();
    expected[1_000_001..1_100_001].copy_from_slice(&pattern(1, 100_000));
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    assert_eq!(fallocate(&file, mode, 2_000_001, 300_000), Ok(()));
    expected[2_000_001..2_300_001].fill(0);
    assert_same(&read_all(raw), expected, "after writing and punching");
}

fn change_and_umount(mount: Mount, name: &str, image: &Path, mut expected: Vec<u8>) {
    assert_same(&read_all(&mount.path(name)), &expected, "as qemu made it");
    change(&mount.path(name), &mut expected);
    mount.umount();
    assert_same(&guest_bytes(image), &expected, "through qemu");
    assert_sound(image);
}

fn assert_compressed_is_served(kind: &str) {
    let lab = Lab::new();
    let image = make(
        &lab,
        "small.qcow2",
        &format!(
            "seq 600000 >DIR/text.img; truncate -s 4M DIR/text.img
             qemu-img convert -c -f raw -O qcow2 -o compression_type={kind} DIR/text.img IMAGE"
        ),
    );
    let expected = fs::read(lab.image("text.img")).unwrap();
    change_and_umount(lab.mount(), "small.raw", &image, expected);
}

#[test]
fn deflated_images_are_served() {
    assert_compressed_is_served("zlib");
}

#[test]
fn zstd_images_are_served() {
    assert_compressed_is_served("zstd");
}

/// An image of 4 MiB with data all over, shorter than what will lie on it.
fn make_base(lab: &Lab, name: &str) -> (std::path::PathBuf, Vec<u8>) {
    let (base, data) = (lab.image(name), pattern(7, 4 << 20));
    fs::write(lab.path("data"), &data).unwrap();
    sh!("qemu-img convert -f raw -O qcow2 {} {}", lab.path("data").display(), base.display());
    (base, data)
}

#[test]
fn an_overlay_reads_its_backing_file_and_never_writes_it() {
    let lab = Lab::new();
    let (base, mut expected) = make_base(&lab, "base.qcow2");
    let overlay =
        make(&lab, "overlay.qcow2", "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 IMAGE 6M");
    let before = fs::read(&base).unwrap();
    expected.resize(6 << 20, 0);
    change_and_umount(lab.mount(), "overlay.raw", &overlay, expected);
    assert_same(&fs::read(&base).unwrap(), &before, "the backing file");
}

#[test]
fn a_backing_file_elsewhere_needs_allow() {
    let lab = Lab::new();
    let elsewhere = lab.subdirectory("elsewhere");
    let (base, expected) = make_base(&lab, "../elsewhere/base.qcow2");
    let before = fs::read(&base).unwrap();
    let overlay = make(
        &lab,
        "overlay.qcow2",
        "qemu-img create -q -f qcow2 -b DIR/../elsewhere/base.qcow2 -F qcow2 IMAGE",
    );
    let mount = lab.mount_with(&format!("--allow {}", elsewhere.display()));
    change_and_umount(mount, "overlay.raw", &overlay, expected);
    assert_same(&fs::read(&base).unwrap(), &before, "the backing file");
}

#[test]
fn internal_snapshots_keep_what_they_hold() {
    let lab = Lab::new();
    let (image, expected) = make_base(&lab, "disk.qcow2");
    sh!("qemu-img snapshot -c before {}", image.display());
    change_and_umount(lab.mount(), "disk.raw", &image, expected.clone());
    let held = lab.path("held");
    sh!("qemu-img convert -f qcow2 -l before -O raw {} {}", image.display(), held.display());
    assert_same(&fs::read(&held).unwrap(), &expected, "the snapshot");
}
