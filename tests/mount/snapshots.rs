//! Internal snapshots as files in `.snap/`, and the command for them, beside a mount that is in use.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::discards::{open, read_all};
use crate::lab::{Lab, assert_same, assert_sound, guest_bytes, pattern, wait_until_free};

const SIZE: usize = 8 << 20;

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn errno(result: std::io::Result<impl Sized>) -> i32 {
    result.map(drop).unwrap_err().raw_os_error().unwrap()
}

#[test]
fn a_name_created_in_snap_is_a_snapshot_that_keeps_what_the_disk_held() {
    let lab = Lab::new();
    lab.subdirectory("images/a");
    let image = lab.create("a/disk.qcow2", "8M", "");
    let mount = lab.mount();
    let (disk, snaps) = (mount.path("a/disk.raw"), mount.path("a/.snap/disk.raw"));
    let first = pattern(1, SIZE);
    let file = open(&disk);
    file.write_all_at(&first, 0).unwrap();
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    sh!("touch {}", snaps.join("first").display());
    let second = pattern(2, SIZE / 2);
    file.write_all_at(&second, 1 << 20).unwrap();
    sh!("fallocate -p -o 0 -l 1M {}", disk.display());

    assert_eq!(names(&mount.path("a")), ["disk.raw"], ".snap is not listed");
    assert_eq!(names(&mount.path("a/.snap")), ["disk.raw"]);
    let kept = snaps.join("first");
    let looks = fs::metadata(&kept).unwrap();
    assert_eq!((looks.len(), looks.mode() & 0o777), (SIZE as u64, 0o444));
    assert!((before..before + 60).contains(&looks.mtime()), "{} {before}", looks.mtime());
    for _ in 0..2 {
        assert_same(&read_all(&kept), &first, "the snapshot");
    }
    let mut now = first.clone();
    now[1 << 20..(1 << 20) + SIZE / 2].copy_from_slice(&second);
    now[..1 << 20].fill(0);
    assert_same(&read_all(&disk), &now, "the disk");

    assert_eq!(errno(File::options().write(true).open(&kept)), libc::EROFS);
    assert_eq!(errno(File::create_new(&kept)), libc::EEXIST);
    assert_eq!(errno(fs::create_dir(snaps.join("x"))), libc::EPERM);
    assert_eq!(errno(fs::remove_dir(mount.path("a/.snap"))), libc::EPERM);
    assert_eq!(errno(fs::rename(&kept, snaps.join("x"))), libc::EPERM);
    assert_eq!(errno(fs::remove_file(snaps.join("missing"))), libc::ENOENT);
    assert_eq!(errno(fs::metadata(mount.path(".snap/missing.raw"))), libc::ENOENT);

    let reading = File::open(&kept).unwrap();
    reading.sync_all().unwrap();
    reading.sync_data().unwrap();
    assert_eq!(errno(fs::remove_file(&kept)), libc::EBUSY);
    drop(reading);
    crate::lab::eventually(
        std::time::Duration::from_secs(5),
        || fs::remove_file(&kept).is_ok(),
        || "the snapshot stays".into(),
    );
    for name in names(&snaps) {
        fs::remove_file(snaps.join(name)).unwrap();
    }
    assert_eq!(names(&snaps).len(), 0);
    drop(file);
    mount.umount();
    assert_sound(&image);
    assert_same(&guest_bytes(&image), &now, "what QEMU reads");
}

#[test]
fn snapshots_of_qemu_are_shown_and_read_while_the_disk_is_written() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "compat=1.1,cluster_size=4k");
    let first = pattern(3, SIZE);
    let raw = lab.path("first");
    fs::write(&raw, &first).unwrap();
    let at = image.display();
    sh!("qemu-img convert -n -f raw -O qcow2 {} {at}", raw.display());
    sh!("qemu-img snapshot -c plain {at} && qemu-img snapshot -c with/slash {at}");
    let mount = lab.mount();
    let (disk, snaps) = (mount.path("disk.raw"), mount.path(".snap/disk.raw"));
    assert_eq!(names(&snaps), ["2", "plain"], "one is shown by its id");

    // Opened for reading first: it goes on when the image becomes writable.
    let early = File::open(snaps.join("plain")).unwrap();
    let file = open(&disk);
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..20u64 {
                file.write_all_at(&pattern(round + 10, SIZE / 2), round * 65536).unwrap();
            }
        });
        for _ in 0..5 {
            let mut bytes = vec![0; SIZE];
            early.read_exact_at(&mut bytes, 0).unwrap();
            assert_same(&bytes, &first, "a snapshot while the disk is written");
            let direct = sh!(
                "dd if={} bs=1M iflag=direct status=none | sha256sum",
                snaps.join("2").display()
            );
            assert_eq!(direct, sh!("sha256sum < {}", raw.display()));
        }
    });
    assert_eq!(errno(fs::remove_file(snaps.join("plain"))), libc::EBUSY);
    drop((early, file));
    wait_until_free(&image);
    fs::remove_file(snaps.join("2")).unwrap();
    mount.umount();
    assert_sound(&image);
    sh!("qemu-img convert -f qcow2 -O raw -l plain {at} {}", lab.path("plain").display());
    assert_same(&fs::read(lab.path("plain")).unwrap(), &first, "what QEMU reads");
}

#[test]
fn the_command_works_on_closed_images_and_on_those_that_a_mount_has_open() {
    let lab = Lab::new();
    let base = lab.create("base.qcow2", "4M", "");
    sh!("qemu-io -f qcow2 -c 'write -P 0x11 0 1M' {}", base.display());
    let image = lab.image("disk.qcow2");
    let at = image.display().to_string();
    sh!("qemu-img create -q -f qcow2 -F qcow2 -b {} {at}", base.display());
    sh!("$qcow2fs snapshot create {at} closed");
    sh!("qemu-io -f qcow2 -c 'write -P 0x22 0 512k' {at}");
    let listed = sh!("$qcow2fs snapshot list --json {at}");
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let theirs = sh!("qemu-img info --output=json {at}");
    let theirs: serde_json::Value = serde_json::from_str(&theirs).unwrap();
    for key in ["id", "name", "date-sec", "date-nsec", "vm-state-size"] {
        assert_eq!(listed[0][key], theirs["snapshots"][0][key], "{key}");
    }
    assert_eq!(listed[0]["disk-size"], 4 << 20);

    let mount = lab.mount();
    let file = open(&mount.path("disk.raw"));
    file.write_all_at(&[0x33; 4096], 0).unwrap();
    sh!("$qcow2fs snapshot create {at} 'while open'");
    file.write_all_at(&[0x44; 4096], 0).unwrap();
    let again = attempt!("$qcow2fs snapshot create {at} 'while open'");
    assert_eq!(again.code, Some(1));
    assert!(again.err.contains("exists") && again.err.lines().count() == 1, "{}", again.err);
    assert!(sh!("$qcow2fs snapshot list {at}").contains("while open"));
    let refused = attempt!("$qcow2fs snapshot apply {at} closed");
    assert_eq!(refused.code, Some(1));
    assert!(
        refused.err.contains("disk.raw") && refused.err.lines().count() == 1,
        "{}",
        refused.err
    );
    sh!("$qcow2fs snapshot create {at} gone && $qcow2fs snapshot delete {at} gone");
    assert_eq!(names(&mount.path(".snap/disk.raw")), ["closed", "while open"]);
    drop(file);
    wait_until_free(&image);

    // Closed, but mounted: what the kernel has cached of it is forgotten.
    sh!("$qcow2fs snapshot apply {at} closed");
    assert_eq!(read_all(&mount.path("disk.raw"))[..1 << 20], [0x11; 1 << 20]);
    wait_until_free(&image);
    sh!("$qcow2fs snapshot apply {at} 2");
    assert_eq!(read_all(&mount.path("disk.raw"))[..8192], [[0x33; 4096], [0x22; 4096]].concat());
    mount.umount();
    sh!("$qcow2fs snapshot delete {at} closed && $qcow2fs snapshot delete {at} 2");
    assert_eq!(sh!("$qcow2fs snapshot list {at}"), "");
    for (arguments, code) in [("delete {} 7", 1), ("list /nonexistent", 1), ("create {}", 2)] {
        let arguments = arguments.replace("{}", &at);
        let refused = attempt!("$qcow2fs snapshot {arguments}");
        assert_eq!(refused.code, Some(code), "{arguments}: {}", refused.text());
    }
    assert_sound(&image);
    assert_eq!(guest_bytes(&image)[..4096], [0x33; 4096]);
}

#[test]
fn a_snapshot_of_a_file_system_is_mounted_beside_it() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "64M", "");
    let mount = lab.mount();
    let disk = mount.path("disk.raw");
    let (now, then) = (lab.subdirectory("now"), lab.subdirectory("then"));
    sh!("mkfs.ext4 -q {d} && mount -o loop {d} {}", now.display(), d = disk.display());
    fs::write(now.join("file"), pattern(5, 1 << 20)).unwrap();
    let kept = mount.path(".snap/disk.raw/kept");
    let script = attempt!("sync -f {} && touch {}", now.display(), kept.display());
    fs::write(now.join("file"), "something else").unwrap();
    fs::write(now.join("more"), pattern(6, 4 << 20)).unwrap();
    sh!("sync -f {}", now.display());
    let looked = attempt!(
        "mount -o loop,ro,noload {} {t} && sha256sum < {t}/file && ls {t} && umount {t}",
        kept.display(),
        t = then.display()
    );
    sh!("umount {}", now.display());
    assert!(script.ok() && looked.ok(), "{} {}", script.text(), looked.text());
    let expected = lab.path("expected");
    fs::write(&expected, pattern(5, 1 << 20)).unwrap();
    assert!(looked.out.starts_with(&sh!("sha256sum < {}", expected.display())), "{}", looked.out);
    assert!(!looked.out.contains("more"), "{}", looked.out);
    mount.umount();
    assert_sound(&image);
}
