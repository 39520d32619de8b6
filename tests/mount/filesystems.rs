//! File systems on loop devices on mounted images: what they lose, they get back; what they keep,
//! they keep.

use std::fs;
use std::path::Path;

use crate::devices::{BTRFS, EXT4, FileSystem, Kind, LoopDevice, XFS, assert_reclaimed};
use crate::lab::{
    Lab, allocated, assert_same, assert_sound, eventually, length, pattern, wait_until_free,
};

const CLUSTER: u64 = 64 << 10;
const FILES: u64 = 48;
const KEPT: u64 = 8;
const FILE_BYTES: usize = 4 << 20;

fn file_name(point: &Path, index: u64) -> std::path::PathBuf {
    point.join(format!("file-{index:02}"))
}

fn write_files(point: &Path) {
    for index in 0..FILES {
        fs::write(file_name(point, index), pattern(index + 1, FILE_BYTES)).unwrap();
    }
    sh!("sync -f {}", point.display());
}

fn verify_kept_files(point: &Path) {
    for index in 0..KEPT {
        let found = fs::read(file_name(point, index)).unwrap();
        assert_same(&found, &pattern(index + 1, FILE_BYTES), &format!("file {index}"));
    }
}

/// The whole life: make, fill, delete, trim, shrink, verify, fsck; then again on a new mount.
fn keeps_data_and_returns_space(kind: &Kind, direct_io: bool) {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "3G", "cluster_size=64k");
    let mount = lab.mount();
    let raw = mount.path("disk.raw");
    let device = LoopDevice::with_direct_io(&raw, direct_io);
    kind.make(device.path());
    let filesystem = FileSystem::mount(device.path(), lab.subdirectory("fs"));

    write_files(filesystem.point());
    let (full, full_length) = (allocated(&image), length(&image));
    assert!(full >= FILES * FILE_BYTES as u64, "only {full} bytes allocated for all files");
    for index in KEPT..FILES {
        fs::remove_file(file_name(filesystem.point(), index)).unwrap();
    }
    sh!("sync -f {0}; fstrim {0}", filesystem.point().display());
    assert_reclaimed(&image, &raw, CLUSTER);
    assert!(allocated(&image) < full / 2, "{} of {full} bytes left", allocated(&image));
    sh!("echo 3 >/proc/sys/vm/drop_caches");
    verify_kept_files(filesystem.point());
    filesystem.umount();
    kind.judge(device.path());
    device.detach();
    mount.umount();
    let (closed, slack) = (length(&image), 2 << 20);
    assert!(closed <= full_length + slack, "{closed} bytes when closed, {full_length} when full");
    assert_sound(&image);

    let mount = lab.mount();
    let device = LoopDevice::with_direct_io(&mount.path("disk.raw"), direct_io);
    let filesystem = FileSystem::mount(device.path(), lab.path("fs"));
    verify_kept_files(filesystem.point());
    filesystem.umount();
    device.detach();
    let copy = lab.path("copy.raw");
    sh!("cp --sparse=always {} {}", mount.path("disk.raw").display(), copy.display());
    wait_until_free(&image);
    sh!("qemu-img compare -f qcow2 -F raw {} {}", image.display(), copy.display());
    mount.umount();
    assert_sound(&image);
}

#[test]
fn ext4_keeps_data_and_returns_space() {
    keeps_data_and_returns_space(&EXT4, false);
}

#[test]
fn ext4_with_direct_io_keeps_data_and_returns_space() {
    keeps_data_and_returns_space(&EXT4, true);
}

#[test]
fn xfs_keeps_data_and_returns_space() {
    keeps_data_and_returns_space(&XFS, false);
}

#[test]
fn xfs_with_direct_io_keeps_data_and_returns_space() {
    keeps_data_and_returns_space(&XFS, true);
}

#[test]
fn btrfs_keeps_data_and_returns_space() {
    keeps_data_and_returns_space(&BTRFS, false);
}

#[test]
fn btrfs_with_direct_io_keeps_data_and_returns_space() {
    keeps_data_and_returns_space(&BTRFS, true);
}

/// A master boot record with Linux partitions: first sector and number of sectors of each.
pub fn boot_record(partitions: &[(u32, u32)]) -> Vec<u8> {
    let mut record = vec![0; 512];
    for (entry, (start, sectors)) in record[446..].chunks_exact_mut(16).zip(partitions) {
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..].copy_from_slice(&sectors.to_le_bytes());
    }
    record[510..].copy_from_slice(&[0x55, 0xaa]);
    record
}

#[test]
fn partitions_are_found_and_hold_a_file_system() {
    let lab = Lab::new();
    let image = lab.create("parted.qcow2", "512M", "");
    let mount = lab.mount();
    let raw = mount.path("parted.raw");
    {
        use std::os::unix::fs::FileExt;
        let file = fs::OpenOptions::new().write(true).open(&raw).unwrap();
        file.write_all_at(&boot_record(&[(2048, 900_000)]), 0).unwrap();
    }
    let device = LoopDevice::attach(&raw, "-P");
    let partition = device
        .path()
        .with_file_name(format!("{}p1", device.path().file_name().unwrap().to_str().unwrap()));
    // A kernel built without partition tables leaves reading them to partx.
    if !partition.exists() {
        sh!("partx -a {}", device.path().display());
    }
    let there = || partition.exists();
    eventually(std::time::Duration::from_secs(5), there, || "no partition".into());
    EXT4.make(&partition);
    let filesystem = FileSystem::mount(&partition, lab.subdirectory("fs"));
    write_files(filesystem.point());
    for index in KEPT..FILES {
        fs::remove_file(file_name(filesystem.point(), index)).unwrap();
    }
    sh!("sync -f {0}; fstrim {0}", filesystem.point().display());
    assert_reclaimed(&image, &raw, CLUSTER);
    verify_kept_files(filesystem.point());
    filesystem.umount();
    EXT4.judge(&partition);
    device.detach();
    mount.umount();
    assert_sound(&image);
}

#[test]
fn a_mount_that_discards_at_once_stays_small() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "2G", "");
    let mount = lab.mount();
    let raw = mount.path("disk.raw");
    let device = LoopDevice::with_direct_io(&raw, true);
    EXT4.make(device.path());
    let filesystem = FileSystem::mount(device.path(), lab.subdirectory("fs"));
    sh!("mount -o remount,discard {}", filesystem.point().display());
    for round in 0..4 {
        write_files(filesystem.point());
        for index in 0..FILES {
            fs::remove_file(file_name(filesystem.point(), index)).unwrap();
        }
        sh!("sync -f {}", filesystem.point().display());
        assert_ne!(device.attribute("queue/discard_max_bytes"), "0", "round {round}");
    }
    assert_reclaimed(&image, &raw, CLUSTER);
    filesystem.umount();
    EXT4.judge(device.path());
    device.detach();
    mount.umount();
    assert_sound(&image);
}
