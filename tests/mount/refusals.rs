//! Images that are not served, or not written: a plain errno, a reason in the log, no byte changed.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::discards::{open, read_all};
use crate::lab::{Lab, assert_same, assert_sound, guest_bytes, pattern};

/// Makes an image with `script`, in which `IMAGE` stands for its path and `DIR` for its directory.
pub fn make(lab: &Lab, name: &str, script: &str) -> PathBuf {
    let image = lab.image(name);
    let script = script.replace("IMAGE", image.to_str().unwrap());
    sh!("{}", script.replace("DIR", lab.images().to_str().unwrap()));
    image
}

/// The image is listed; opening it (or, at the latest, reading all of it) fails with EOPNOTSUPP;
/// the log has `word`; and the file is as it was.
fn assert_refused(script: &str, word: &str) {
    let lab = Lab::new();
    let image = make(&lab, "refused.qcow2", script);
    let before = fs::read(&image).unwrap();
    let mount = lab.mount();
    let raw = mount.path("refused.raw");
    assert!(sh!("ls {}", mount.point().display()).contains("refused.raw"), "not listed");
    assert!(fs::metadata(&raw).is_ok(), "cannot be looked at");
    for options in [OpenOptions::new().read(true), OpenOptions::new().read(true).write(true)] {
        let refusal = options.open(&raw).map(drop).expect_err("opened all the same");
        assert_eq!(refusal.raw_os_error(), Some(libc::EOPNOTSUPP), "{refusal}");
    }
    let log = mount.log().to_lowercase();
    assert!(log.contains(word), "the log does not say why: {log}");
    mount.umount();
    assert_same(&fs::read(&image).unwrap(), &before, "the refused file");
}

#[test]
fn backing_files_outside_the_directory_are_refused() {
    assert_refused(
        "qemu-img create -q -f qcow2 DIR/../base.qcow2 8M
         qemu-img create -q -f qcow2 -b ../base.qcow2 -F qcow2 IMAGE",
        "backing",
    );
    assert_refused("qemu-img create -q -f qcow2 -u -b /etc/shadow -F raw IMAGE 8M", "/etc/shadow");
}

#[test]
fn backing_files_by_protocol_are_refused() {
    assert_refused(
        "qemu-img create -q -f qcow2 -u -b nbd:localhost:10809 -F raw IMAGE 8M",
        "backing",
    );
}

#[test]
fn encrypted_images_are_refused() {
    assert_refused(
        "qemu-img create -q -f qcow2 --object secret,id=key,data=secret \
         -o encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10 IMAGE 8M",
        "encrypt",
    );
}

#[test]
fn external_data_files_are_refused() {
    assert_refused("qemu-img create -q -f qcow2 -o data_file=DIR/data.img IMAGE 8M", "data file");
}

#[test]
fn extended_l2_entries_are_refused() {
    assert_refused("qemu-img create -q -f qcow2 -o extended_l2=on IMAGE 8M", "extended");
}

#[test]
fn bitmaps_are_refused() {
    assert_refused(
        "qemu-img create -q -f qcow2 IMAGE 8M; qemu-img bitmap --add IMAGE changes",
        "bitmap",
    );
}

#[test]
fn what_is_no_image_is_refused_and_harms_no_other() {
    let lab = Lab::new();
    fs::write(lab.image("text.qcow2"), "this is no qcow2 image").unwrap();
    fs::write(lab.image("empty.qcow2"), "").unwrap();
    let sound = lab.create("sound.qcow2", "4M", "");
    let mount = lab.mount();
    for name in ["text.raw", "empty.raw"] {
        let refusal = File::open(mount.path(name)).map(drop).expect_err("opened all the same");
        assert_eq!(refusal.raw_os_error(), Some(libc::EINVAL), "{name}: {refusal}");
    }
    assert_eq!(read_all(&mount.path("sound.raw")), vec![0; 4 << 20]);
    mount.umount();
    assert_eq!(fs::read(lab.image("text.qcow2")).unwrap(), b"this is no qcow2 image");
    assert_sound(&sound);
}

#[test]
fn a_dirty_image_is_rebuilt_and_served() {
    let lab = Lab::new();
    let image = lab.create("dirty.qcow2", "16M", "lazy_refcounts=on");
    let killed = attempt!(
        "qemu-io -f qcow2 -c 'write -P 0x5a 1M 2M' -c flush -c 'sigraise 9' {}",
        image.display()
    );
    assert!(!killed.ok());
    let dirty = attempt!("qemu-img check -f qcow2 {}", image.display());
    assert_eq!(dirty.code, Some(2), "the image is not dirty: {}", dirty.text());
    let mount = lab.mount();
    let file = open(&mount.path("dirty.raw"));
    let mut expected = vec![0; 16 << 20];
    expected[1 << 20..3 << 20].fill(0x5a);
    assert_same(&read_all(&mount.path("dirty.raw")), &expected, "after the rebuild");
    file.write_all_at(&pattern(1, 1 << 20), 2 << 20).unwrap();
    expected[2 << 20..3 << 20].copy_from_slice(&pattern(1, 1 << 20));
    file.write_all_at(&pattern(2, 1 << 20), 8 << 20).unwrap();
    expected[8 << 20..9 << 20].copy_from_slice(&pattern(2, 1 << 20));
    drop(file);
    mount.umount();
    assert_same(&guest_bytes(&image), &expected, "through qemu");
    assert_sound(&image);
}

#[test]
fn an_image_marked_corrupt_is_read_only() {
    let lab = Lab::new();
    let image = lab.create("corrupt.qcow2", "8M", "");
    sh!("qemu-io -f qcow2 -c 'write -P 0x21 0 1M' {}", image.display());
    let corrupt_bit = [2];
    open(&image).write_all_at(&corrupt_bit, 79).unwrap();
    let before = fs::read(&image).unwrap();
    let mount = lab.mount();
    let raw = mount.path("corrupt.raw");
    assert_eq!(read_all(&raw)[..1 << 20], vec![0x21; 1 << 20], "it can be read");
    let attempt = OpenOptions::new().write(true).open(&raw);
    let refusal = attempt.and_then(|file| file.write_all_at(b"x", 0)).expect_err("written to");
    assert_eq!(refusal.raw_os_error(), Some(libc::EROFS), "{refusal}");
    assert!(mount.log().to_lowercase().contains("corrupt"), "log: {}", mount.log());
    mount.umount();
    assert_same(&fs::read(&image).unwrap(), &before, "the corrupt file");
}
