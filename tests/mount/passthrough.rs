//! Disks that the kernel reads and writes itself: that it does where it may and only there, that what
//! it has written is the disk, and that nothing is lost where the disk is more than its data file.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::Duration;

use crate::devices::{FileSystem, LoopDevice};
use crate::discards::{open, read_all};
use crate::files::Mapping;
use crate::lab::{
    Lab, Mount, allocated, assert_same, assert_sound, eventually, guest_bytes, length, pattern,
    signal, wait_for_end, wait_until_free,
};
use crate::plain_files::errno;

const MIB: usize = 1 << 20;
/// A data file beside the image is called DATA.
const RAW: &str = "data_file=DATA,data_file_raw=on";

/// An image of 16 MiB that QEMU has made with `options`.
fn create(lab: &Lab, options: &str) -> PathBuf {
    let data = lab.image("disk.data").display().to_string();
    lab.create("disk.qcow2", "16M", &options.replace("DATA", &data))
}

/// A mount with passthrough of one that is its data file.
fn passed(lab: &Lab) -> Mount {
    create(lab, RAW);
    lab.mount_with("--passthrough")
}

/// Reads and writes that came to the process that serves the mount.
fn requests(mount: &Mount) -> u64 {
    let status = mount.status();
    let io = &status["images"][0]["io"];
    ["read", "write"].iter().map(|kind| io[kind]["count"].as_u64().expect("a count")).sum()
}

fn is_passed(mount: &Mount, file: &File) -> bool {
    let before = requests(mount);
    file.write_all_at(b"some", 4096).unwrap();
    file.sync_all().unwrap();
    requests(mount) == before
}

#[test]
fn what_the_kernel_writes_is_the_disk() {
    let lab = Lab::new();
    let mount = passed(&lab);
    let (image, data) = (lab.image("disk.qcow2"), lab.image("disk.data"));
    let raw = mount.path("disk.raw");
    let file = open(&raw);
    assert!(is_passed(&mount, &file));
    let mut expected = vec![0; 16 * MIB];
    expected[4096..4100].copy_from_slice(b"some");
    let bytes = pattern(1, 5 * MIB);
    file.write_all_at(&bytes, 3 * MIB as u64 + 77).unwrap();
    expected[3 * MIB + 77..8 * MIB + 77].copy_from_slice(&bytes);
    sh!("fallocate -p -o 4M -l 2M {}", raw.display());
    sh!("fallocate -z -o 7M -l 512 {}", raw.display());
    expected[4 * MIB..6 * MIB].fill(0);
    expected[7 * MIB..7 * MIB + 512].fill(0);
    assert!(allocated(&data) < 4 * MIB as u64, "{} after the discard", allocated(&data));
    assert_same(&read_all(&raw), &expected, "through the mount");
    // Where it was discarded it is written again, and nobody maps it anew.
    file.write_all_at(&pattern(2, MIB), 5 * MIB as u64).unwrap();
    expected[5 * MIB..6 * MIB].copy_from_slice(&pattern(2, MIB));
    let syncs = || mount.status()["images"][0]["syncs"].as_u64().expect("a count");
    let before = syncs();
    file.sync_all().unwrap();
    assert!(syncs() > before, "what the kernel wrote is not synced");
    assert_same(&fs::read(&data).unwrap(), &expected, "the data file by itself");
    // What is durable outlives the process, which had nothing to do with it.
    signal(mount.pid(), libc::SIGKILL);
    wait_for_end(mount.pid());
    drop(file);
    drop(mount);
    assert_same(&guest_bytes(&image), &expected, "through qemu");
    assert_sound(&image);
}

#[test]
fn a_disk_that_is_more_than_its_data_file_is_served_here() {
    let bitmap = "qemu-img bitmap --add disk.qcow2 one";
    let hole = "qemu-io -f qcow2 -d unmap -c 'discard 8M 64k' disk.qcow2";
    let longer = "truncate -s 17M disk.data";
    for (options, then) in [
        ("compat=1.1", "true"),
        ("data_file=DATA", "true"),
        (RAW, bitmap),
        (RAW, hole),
        (RAW, longer),
    ] {
        let lab = Lab::new();
        create(&lab, options);
        sh!("cd {} && {then}", lab.images().display());
        let mount = lab.mount_with("--passthrough");
        let file = open(&mount.path("disk.raw"));
        assert!(!is_passed(&mount, &file), "{options} {then}");
        drop(file);
        mount.umount();
        assert_same(&guest_bytes(&lab.image("disk.qcow2"))[4096..4100], b"some", options);
    }
    // Nor any disk where nobody asked for it.
    let lab = Lab::new();
    create(&lab, RAW);
    let mount = lab.mount();
    assert!(!is_passed(&mount, &open(&mount.path("disk.raw"))));
}

#[test]
fn the_first_handle_decides_for_all_and_readers_see_what_writers_write() {
    let lab = Lab::new();
    let mount = passed(&lab);
    let raw = mount.path("disk.raw");
    let reader = File::open(&raw).unwrap();
    let mut byte = [0; 1];
    reader.read_exact_at(&mut byte, 9).unwrap();
    let writer = open(&raw);
    let direct = sh!(
        "dd if=/dev/zero of={} bs=4096 count=1 seek=3 oflag=direct conv=notrunc \
         status=none && echo done",
        raw.display()
    );
    assert_eq!(direct.trim(), "done");
    writer.write_all_at(b"x", 9).unwrap();
    reader.read_exact_at(&mut byte, 9).unwrap();
    assert_eq!(&byte, b"x");
    assert!(is_passed(&mount, &writer));
}

#[test]
fn what_the_kernel_has_cached_of_a_disk_that_it_serves_now_and_then_is_never_old() {
    let lab = Lab::new();
    create(&lab, RAW);
    sh!("qemu-io -f qcow2 -d unmap -c 'discard 8M 64k' {}", lab.image("disk.qcow2").display());
    let mount = lab.mount_with("--passthrough");
    let raw = mount.path("disk.raw");
    // Not all of it is mapped yet, so pages come here.
    assert_same(&read_all(&raw)[MIB..][..5], &[0; 5], "the new disk");
    sh!("printf mapped | dd of={} bs=1M seek=8 conv=notrunc", raw.display());
    let file = open(&raw);
    assert!(is_passed(&mount, &file));
    file.write_all_at(b"hello", MIB as u64).unwrap();
    drop(file);
    wait_until_free(&lab.image("disk.qcow2"));
    // Once it has a part that is not mapped it is served here again.
    let longer = CString::new(raw.as_os_str().as_bytes()).unwrap();
    // SAFETY: the path is a string that lives through the call.
    assert_eq!(unsafe { libc::truncate(longer.as_ptr(), 17 << 20) }, 0);
    assert_same(&read_all(&raw)[MIB..][..5], b"hello", "what the kernel has written");
    assert!(!is_passed(&mount, &open(&raw)));
}

#[test]
fn such_a_disk_grows_when_it_is_told_to_and_is_never_cut_unawares() {
    let lab = Lab::new();
    let mount = passed(&lab);
    let (image, data) = (lab.image("disk.qcow2"), lab.image("disk.data"));
    let raw = mount.path("disk.raw");
    let file = open(&raw);
    file.write_all_at(b"first", 0).unwrap();
    let truncated = OpenOptions::new().write(true).truncate(true).open(&raw);
    assert_eq!(errno(truncated), Some(libc::EBUSY));
    assert_eq!(errno(file.set_len(MIB as u64)), Some(libc::EBUSY));
    file.set_len(20 * MIB as u64).unwrap();
    file.write_all_at(b"added", 20 * MIB as u64 - 5).unwrap();
    sh!("fallocate -l 24M {}", raw.display());
    file.write_all_at(b"again", 24 * MIB as u64 - 5).unwrap();
    file.sync_all().unwrap();
    assert!(is_passed(&mount, &file));
    // Past the end: whoever makes sure of it hears of it, whoever was there before, and the disk is as
    // it was.
    file.write_all_at(b"-- too far", 24 * MIB as u64 - 2).unwrap();
    drop(File::open(&raw).unwrap());
    for _ in 0..2 {
        assert_eq!(errno(file.sync_all()), Some(libc::EFBIG));
    }
    assert_eq!(length(&data), 24 * MIB as u64);
    drop(file);
    wait_until_free(&image);
    let file = open(&raw);
    file.sync_all().unwrap();
    // Nor does it become a part of the disk when that grows.
    file.write_all_at(b"too far", 25 * MIB as u64).unwrap();
    assert_eq!(errno(file.set_len(26 * MIB as u64)), Some(libc::EFBIG));
    drop(file);
    wait_until_free(&image);
    let file = open(&raw);
    let closed = attempt!("printf 'too far' | dd of={} bs=1M seek=24 conv=notrunc", raw.display());
    assert!(!closed.ok() && closed.text().contains("File too large"), "{}", closed.text());
    drop(file);
    mount.umount();
    assert_eq!(length(&data), 24 * MIB as u64);
    let disk = guest_bytes(&image);
    assert_eq!(disk.len(), 24 * MIB);
    assert_same(&disk, &fs::read(&data).unwrap(), "image and data file");
    assert_same(&disk[..5], b"first", "what was there");
    assert_same(&disk[20 * MIB - 5..20 * MIB], b"added", "where it was made larger");
    assert_same(&disk[24 * MIB - 5..], b"aga--", "where it was made larger once more");
    assert_sound(&image);
}

#[test]
fn the_process_keeps_what_it_takes_and_no_more() {
    const NEEDED: u64 = 1 << 21 | 1 << 28; // SYS_ADMIN, LEASE
    let effective = |mount: &Mount| {
        let status = fs::read_to_string(format!("/proc/{}/status", mount.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    let lab = Lab::new();
    let with = passed(&lab);
    let kept = effective(&with);
    let raw = with.path("disk.raw");
    // The kernel lets go of the file each time, so another decision can follow.
    for _ in 0..3 {
        assert!(is_passed(&with, &open(&raw)));
    }
    with.umount();
    let without = lab.mount();
    assert_eq!(kept & NEEDED, NEEDED);
    assert_eq!(kept & !NEEDED, effective(&without));
}

#[test]
fn a_mapping_keeps_others_out_after_the_file_is_closed() {
    let lab = Lab::new();
    let mount = passed(&lab);
    let image = lab.image("disk.qcow2");
    let raw = mount.path("disk.raw");
    let others = || attempt!("qemu-io -f qcow2 -c 'write 1M 512' {}", image.display()).ok();
    let file = open(&raw);
    let mut mapping = Mapping::new(&file, 16 * MIB, libc::MAP_SHARED);
    drop(file);
    std::thread::sleep(Duration::from_secs(1));
    assert!(!others(), "two write one disk");
    mapping.bytes()[..5].copy_from_slice(b"hello");
    // Who comes meanwhile sees it.
    assert_same(&read_all(&raw)[..5], b"hello", "what was written to the mapping");
    assert!(is_passed(&mount, &open(&raw)));
    drop(mapping);
    wait_until_free(&image);
    assert!(others());
    // So does who reads the data file itself, but nobody on the mount; and an unmount closes it.
    let reader = File::open(lab.image("disk.data")).unwrap();
    drop(open(&raw));
    std::thread::sleep(Duration::from_secs(1));
    assert!(!others());
    // The kernel may forget the file meanwhile.
    sh!("echo 2 > /proc/sys/vm/drop_caches");
    assert!(is_passed(&mount, &open(&raw)));
    sh!("touch -d @7 {}", raw.display());
    drop(reader);
    wait_until_free(&image);
    assert_eq!(fs::metadata(lab.image("disk.data")).unwrap().mtime(), 7, "closed in order");
    mount.umount();
    assert_same(&guest_bytes(&image)[..5], b"hello", "what was written to the mapping");
}

#[test]
fn a_time_that_was_set_holds_until_the_kernel_writes() {
    let lab = Lab::new();
    let mount = passed(&lab);
    let raw = mount.path("disk.raw");
    let modified = || fs::metadata(&raw).unwrap().mtime();
    let file = open(&raw);
    file.write_all_at(b"some", 0).unwrap();
    sh!("touch -d @7 {}", raw.display());
    assert_eq!(modified(), 7);
    std::thread::sleep(Duration::from_millis(50));
    file.write_all_at(b"more", 0).unwrap();
    let shown = || format!("{}", modified());
    eventually(Duration::from_secs(5), || modified() > 7, shown);
    drop(file);
    mount.umount();
    assert!(fs::metadata(lab.image("disk.data")).unwrap().mtime() > 7);
}

#[test]
fn a_data_file_that_takes_no_sectors_is_served_here() {
    let lab = Lab::new();
    let disk = lab.path("coarse");
    sh!("truncate -s 64M {}", disk.display());
    let device = LoopDevice::attach(&disk, "--sector-size 4096");
    sh!("mkfs.ext4 -q {}", device.path().display());
    let coarse = FileSystem::mount(device.path(), lab.images());
    let image = create(&lab, RAW);
    let mount = lab.mount_with("--passthrough");
    let file = open(&mount.path("disk.raw"));
    assert!(!is_passed(&mount, &file));
    sh!(
        "dd if=/dev/zero of={} bs=512 count=1 oflag=direct conv=notrunc",
        mount.path("disk.raw").display()
    );
    drop(file);
    mount.umount();
    assert_sound(&image);
    coarse.umount();
    device.detach();
}

#[test]
fn nobody_else_gets_at_a_disk_while_the_kernel_has_it_for_whom_this_process_is_gone() {
    for signals in [&[libc::SIGKILL][..], &[libc::SIGTERM, libc::SIGTERM]] {
        let lab = Lab::new();
        let mount = passed(&lab);
        let image = lab.image("disk.qcow2");
        let file = open(&mount.path("disk.raw"));
        file.write_all_at(b"first", 0).unwrap();
        let others = || attempt!("qemu-io -f qcow2 -c 'write 1M 512' {}", image.display());
        for number in signals {
            signal(mount.pid(), *number);
            std::thread::sleep(Duration::from_millis(300));
        }
        wait_for_end(mount.pid());
        file.write_all_at(b"later", 4096).unwrap();
        assert!(!others().ok(), "{signals:?}: two write one disk");
        drop(file);
        drop(mount);
        wait_until_free(&image);
        assert!(others().ok(), "{}", others().text());
        let disk = guest_bytes(&image);
        assert_eq!((&disk[..5], &disk[4096..4101]), (&b"first"[..], &b"later"[..]));
        assert_sound(&image);
    }
}

#[test]
fn two_images_of_one_data_file_that_are_only_read_do_not_wait_for_each_other() {
    let lab = Lab::new();
    create(&lab, RAW);
    sh!("cd {} && cp disk.qcow2 copy.qcow2", lab.images().display());
    let mount = lab.mount_with("--passthrough");
    let readers = ["disk.raw", "copy.raw"].map(|name| File::open(mount.path(name)).unwrap());
    drop(readers);
    for name in ["disk.qcow2", "copy.qcow2"] {
        let image = lab.image(name);
        let written = || attempt!("qemu-io -f qcow2 -c 'write 0 512' {}", image.display()).ok();
        eventually(Duration::from_secs(10), written, || format!("{name} is locked still"));
    }
}
