//! A mounted image behaves as any sparse raw file does.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::devices::{LoopDevice, data_runs};
use crate::discards::{fallocate, open, read_all};
use crate::lab::{
    Lab, allocated, assert_same, assert_sound, eventually, guest_bytes, length, pattern, signal,
    wait_for_end, wait_until_free,
};

const CLUSTER: usize = 64 << 10;

fn virtual_size(image: &Path) -> u64 {
    let info = sh!("qemu-img info -f qcow2 --output=json {}", image.display());
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    info["virtual-size"].as_u64().unwrap()
}

#[test]
fn sizes_are_virtual_and_blocks_are_allocated() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "1G", "");
    let mount = lab.mount();
    let raw = mount.path("disk.raw");
    let file = open(&raw);
    file.write_all_at(&pattern(1, 10 << 20), 0).unwrap();
    file.sync_all().unwrap();
    eventually(
        Duration::from_secs(5),
        || allocated(&raw) >= 10 << 20,
        || format!("{} bytes in blocks", allocated(&raw)),
    );
    let metadata = fs::metadata(&raw).unwrap();
    assert_eq!(metadata.len(), 1 << 30);
    assert_eq!(metadata.blksize(), CLUSTER as u64);
    assert!(metadata.blocks() * 512 <= 13 << 20, "{} blocks", metadata.blocks());
    let du: u64 = sh!("du --block-size=1 {} | cut -f1", raw.display()).trim().parse().unwrap();
    assert!((10 << 20..=13 << 20).contains(&du), "du counts {du} bytes");
    assert_eq!(sh!("ls {}", mount.point().display()).trim(), "disk.raw");
    assert!(sh!("ls -l {}", mount.point().display()).contains(" 1073741824 "));
    drop(file);
    mount.umount();
    assert_sound(&image);
}

#[test]
fn holes_agree_with_qemu_img_map() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "64M", "");
    let mount = lab.mount();
    let file = open(&mount.path("disk.raw"));
    for cluster in [0_usize, 1, 5, 100, 101, 102, 777, 1023] {
        file.write_all_at(&pattern(9, 4096), (cluster * CLUSTER) as u64 + 512).unwrap();
    }
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    assert_eq!(fallocate(&file, mode, 101 * CLUSTER, CLUSTER), Ok(()));
    file.sync_all().unwrap();
    let runs = data_runs(&file);
    drop(file);
    wait_until_free(&image);
    let map = sh!("qemu-img map -f qcow2 --output=json {}", image.display());
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let mut expected: Vec<(u64, u64)> = Vec::new();
    for run in map.as_array().unwrap().iter().filter(|run| run["data"] == true) {
        let start = run["start"].as_u64().unwrap();
        let end = start + run["length"].as_u64().unwrap();
        match expected.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => expected.push((start, end)),
        }
    }
    assert_eq!(runs, expected, "SEEK_DATA and SEEK_HOLE against qemu-img map");
    assert_eq!(runs.len(), 6, "written at six places: {runs:x?}");
    mount.umount();
}

#[test]
fn truncate_grows_with_zeros_and_shrinks_for_good() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let mount = lab.mount();
    let raw = mount.path("disk.raw");
    let data = pattern(4, 8 << 20);
    open(&raw).write_all_at(&data, 0).unwrap();
    sh!("truncate -s 12M {}", raw.display());
    let mut expected = data.clone();
    expected.resize(12 << 20, 0);
    assert_same(&read_all(&raw), &expected, "after growing");
    sh!("truncate -s 3000320 {}", raw.display());
    assert_eq!(length(&raw), 3_000_320);
    sh!("truncate -s 16M {}", raw.display());
    let mut expected = data[..3_000_320].to_vec();
    expected.resize(16 << 20, 0);
    assert_same(&read_all(&raw), &expected, "after shrinking and growing again");
    mount.umount();
    assert_eq!(virtual_size(&image), 16 << 20);
    assert_same(&guest_bytes(&image), &expected, "through qemu");
    assert_sound(&image);
}

#[test]
fn fallocate_does_what_its_modes_say() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let mount = lab.mount();
    let raw = mount.path("disk.raw");
    let file = open(&raw);
    let mut expected = pattern(5, 4 << 20);
    expected.resize(8 << 20, 0);
    file.write_all_at(&expected[..4 << 20], 0).unwrap();
    let keep = libc::FALLOC_FL_KEEP_SIZE;
    let zero = libc::FALLOC_FL_ZERO_RANGE;

    assert_eq!(fallocate(&file, 0, 2 << 20, 4 << 20), Ok(()));
    assert_same(&read_all(&raw), &expected, "a plain fallocate changes no byte");
    assert!(allocated(&image) >= 6 << 20, "and reserves: {}", allocated(&image));
    assert_eq!(fallocate(&file, keep, 7 << 20, 3 << 20), Ok(()));
    assert_eq!(length(&raw), 8 << 20, "KEEP_SIZE keeps the size");
    for (mode, start, len) in [(zero, 4096, 100_000), (zero | keep, 1 << 20, 65_536 + 512)] {
        assert_eq!(fallocate(&file, mode, start, len), Ok(()));
        expected[start..start + len].fill(0);
        assert_same(&read_all(&raw), &expected, "ZERO_RANGE zeroes");
    }
    assert_eq!(fallocate(&file, libc::FALLOC_FL_PUNCH_HOLE | keep, 777, 9999), Ok(()));
    expected[777..777 + 9999].fill(0);
    assert_same(&read_all(&raw), &expected, "PUNCH_HOLE zeroes");
    let collapse = fallocate(&file, libc::FALLOC_FL_COLLAPSE_RANGE, 0, 1 << 20);
    assert_eq!(collapse, Err(libc::EOPNOTSUPP));
    assert_eq!(fallocate(&file, 0, 8 << 20, 1 << 20), Ok(()), "past the end it grows");
    assert_eq!(length(&raw), 9 << 20);
    expected.resize(9 << 20, 0);
    drop(file);
    mount.umount();
    assert_same(&guest_bytes(&image), &expected, "through qemu");
    assert_sound(&image);
}

#[test]
fn writes_of_any_alignment_land_where_they_belong() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let mount = lab.mount();
    let raw = mount.path("disk.raw");
    let file = open(&raw);
    let mut expected = vec![0; 8 << 20];
    for step in 0..400_usize {
        let at = step * 7_919_123 % (8 << 20);
        let len = (step * step * 37 % 200_000 + 1).min((8 << 20) - at);
        let data = pattern(step as u64, len);
        file.write_all_at(&data, at as u64).unwrap();
        expected[at..at + len].copy_from_slice(&data);
    }
    assert_same(&read_all(&raw), &expected, "through the mount");
    drop(file);
    mount.umount();
    assert_same(&guest_bytes(&image), &expected, "through qemu");
    assert_sound(&image);
}

/// A mapping of a whole file, unmapped when dropped.
pub struct Mapping {
    start: *mut libc::c_void,
    len: usize,
}

impl Mapping {
    pub fn new(file: &File, len: usize, flags: i32) -> Mapping {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; the file is open.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), len, protection, flags, file.as_raw_fd(), 0)
        };
        assert_ne!(start, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Mapping { start, len }
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is `len` bytes, readable and writable, and ours alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.len) }
    }

    fn sync(&self) {
        // SAFETY: the range is the mapping that we own.
        assert_eq!(unsafe { libc::msync(self.start, self.len, libc::MS_SYNC) }, 0);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the mapping that we own; no slice of it outlives `self`.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

#[test]
fn shared_mappings_write_the_image_and_private_ones_do_not() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "4M", "");
    let mount = lab.mount();
    let raw = mount.path("disk.raw");
    let file = open(&raw);
    let mut expected = pattern(6, 4 << 20);
    file.write_all_at(&expected, 0).unwrap();
    {
        let mut private = Mapping::new(&file, 4 << 20, libc::MAP_PRIVATE);
        private.bytes()[100_000..200_000].fill(0xee);
        let mut shared = Mapping::new(&file, 4 << 20, libc::MAP_SHARED);
        assert_same(shared.bytes(), &expected, "the shared mapping before it is written");
        shared.bytes()[300_001..400_003].fill(0xaa);
        shared.sync();
        expected[300_001..400_003].fill(0xaa);
        assert_same(&read_all(&raw), &expected, "read(2) sees the shared mapping's bytes");
    }
    drop(file);
    mount.umount();
    assert_same(&guest_bytes(&image), &expected, "through qemu");
    assert_sound(&image);
}

#[test]
fn direct_and_cached_io_see_each_other() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let mount = lab.mount();
    let raw = mount.path("disk.raw");
    let (mut expected, source) = (pattern(7, 8 << 20), lab.path("source"));
    fs::write(&source, &expected).unwrap();
    sh!("dd if={} of={} bs=1M oflag=direct conv=notrunc", source.display(), raw.display());
    assert_same(&read_all(&raw), &expected, "cached after direct");
    open(&raw).write_all_at(&[0x55; 8192], 20_480).unwrap();
    expected[20_480..28_672].fill(0x55);
    let copy = lab.path("copy");
    sh!("dd if={} of={} bs=64k iflag=direct", raw.display(), copy.display());
    assert_same(&fs::read(&copy).unwrap(), &expected, "direct after cached");
    fs::write(&source, pattern(8, 4096)).unwrap();
    sh!("dd if={} of={} bs=4k seek=9 oflag=direct conv=notrunc", source.display(), raw.display());
    expected[36_864..40_960].copy_from_slice(&pattern(8, 4096));
    assert_same(&read_all(&raw), &expected, "cached after direct over cached");
    mount.umount();
    assert_same(&guest_bytes(&image), &expected, "through qemu");
    assert_sound(&image);
}

#[test]
fn cp_keeps_holes_in_both_directions() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "256M", "");
    let mount = lab.mount();
    let raw = mount.path("disk.raw");
    let file = open(&raw);
    for mebibyte in [0, 100, 255] {
        file.write_all_at(&pattern(mebibyte, 1 << 20), mebibyte << 20).unwrap();
    }
    drop(file);
    for when in ["auto", "always"] {
        let copy = lab.path(when);
        sh!("cp --sparse={when} {} {}", raw.display(), copy.display());
        assert!(allocated(&copy) < 5 << 20, "--sparse={when}: {} bytes", allocated(&copy));
        sh!("cmp {} {}", raw.display(), copy.display());
    }
    let target = lab.create("target.qcow2", "256M", "");
    sh!("cp --sparse=always {} {}", lab.path("auto").display(), mount.path("target.raw").display());
    sh!("cmp {} {}", lab.path("auto").display(), mount.path("target.raw").display());
    mount.umount();
    assert!(allocated(&target) < 5 << 20, "copied in: {} bytes", allocated(&target));
    sh!("qemu-img compare -f qcow2 -F raw {} {}", target.display(), lab.path("auto").display());
    assert_sound(&image);
    assert_sound(&target);
}

fn verify_with_fio(file: &Path, extra: &str) {
    sh!(
        "fio --name=verify --filename={} --size=64M --rw=randrw --bsrange=512-128k --blockalign=512 \
         --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randrepeat=1 --runtime=30 {extra}",
        file.display()
    );
}

#[test]
fn fio_verifies_the_raw_file() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "64M", "");
    let mount = lab.mount();
    verify_with_fio(&mount.path("disk.raw"), "--ioengine=psync");
    verify_with_fio(&mount.path("disk.raw"), "--ioengine=libaio --iodepth=16 --direct=1");
    mount.umount();
    assert_sound(&image);
}

#[test]
fn fio_verifies_a_loop_device() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "64M", "");
    let mount = lab.mount();
    let device = LoopDevice::with_direct_io(&mount.path("disk.raw"), true);
    verify_with_fio(device.path(), "--ioengine=libaio --iodepth=16 --direct=1");
    device.detach();
    mount.umount();
    assert_sound(&image);
}

/// Writes, syncs, writes more, and kills the daemon; the image and what was synced at its start.
fn kill_while_writing(lab: &Lab) -> (PathBuf, Vec<u8>) {
    let image = lab.create("disk.qcow2", "64M", "");
    let mount = lab.mount();
    let file = open(&mount.path("disk.raw"));
    let synced = pattern(11, 8 << 20);
    file.write_all_at(&synced, 0).unwrap();
    file.sync_all().unwrap();
    file.write_all_at(&pattern(12, 8 << 20), 16 << 20).unwrap();
    signal(mount.pid(), libc::SIGKILL);
    wait_for_end(mount.pid());
    drop(file);
    sh!("umount -l {}", mount.point().display());
    (image, synced)
}

#[test]
fn what_was_synced_outlives_a_killed_daemon() {
    let lab = Lab::new();
    let (image, synced) = kill_while_writing(&lab);
    let check = attempt!("qemu-img check -f qcow2 {}", image.display());
    assert!(matches!(check.code, Some(0 | 3)), "only leaks are allowed: {}", check.text());
    assert_same(&guest_bytes(&image)[..8 << 20], &synced, "what was synced");
    sh!("$qcow2fs check --repair leaks {}", image.display());
    assert_same(&guest_bytes(&image)[..8 << 20], &synced, "after the repair");
    assert_sound(&image);
}

/// Memory that `O_DIRECT` takes.
#[repr(align(4096))]
struct Page([u8; 4096]);

/// `pwritev2` of one page.
fn write_page(file: &File, page: &Page, at: u64, flags: i32) {
    let part = libc::iovec { iov_base: page.0.as_ptr().cast_mut().cast(), iov_len: page.0.len() };
    // SAFETY: the one part is memory that lives through the call and is only read.
    let written = unsafe { libc::pwritev2(file.as_raw_fd(), &part, 1, at as libc::off_t, flags) };
    assert_eq!(written, page.0.len() as isize, "{}", std::io::Error::last_os_error());
}

/// The daemon is killed as soon as a page is written in a cluster that had no data, and one past the end.
#[track_caller]
fn assert_synchronous(open_flags: i32, write_flags: i32) {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let mount = lab.mount();
    let mut options = File::options();
    options.read(true).write(true).custom_flags(open_flags);
    let file = options.open(mount.path("disk.raw")).unwrap();
    for (seed, at) in [(0x51, 4 << 20), (0x52, 8 << 20)] {
        write_page(&file, &Page([seed; 4096]), at, write_flags);
    }
    signal(mount.pid(), libc::SIGKILL);
    wait_for_end(mount.pid());
    drop(file);
    sh!("umount -l {}", mount.point().display());
    let found = guest_bytes(&image);
    let what = format!("opened with {open_flags:#o}, written with {write_flags:#x}");
    assert_same(&found[4 << 20..][..4096], &[0x51; 4096], &what);
    assert_eq!(found.len(), (8 << 20) + 4096, "{what}");
    assert_same(&found[8 << 20..], &[0x52; 4096], &what);
}

#[test]
fn synchronous_writes_outlive_a_killed_daemon() {
    for direct in [libc::O_DIRECT, 0] {
        for synchronous in [libc::O_DSYNC, libc::O_SYNC] {
            assert_synchronous(direct | synchronous, 0);
        }
        for synchronous in [libc::RWF_DSYNC, libc::RWF_SYNC] {
            assert_synchronous(direct, synchronous);
        }
    }
}

#[test]
fn what_a_killed_daemon_left_is_served_and_written_again() {
    let lab = Lab::new();
    let (image, synced) = kill_while_writing(&lab);
    let mount = lab.mount();
    open(&mount.path("disk.raw")).write_all_at(&synced, 32 << 20).unwrap();
    mount.umount();
    let bytes = guest_bytes(&image);
    assert_same(&bytes[..8 << 20], &synced, "what was synced before the kill");
    assert_same(&bytes[32 << 20..40 << 20], &synced, "what was written after it");
    // The search for what the kill leaked may have been cut short by the close.
    sh!("$qcow2fs check --repair leaks {}", image.display());
    assert_same(&guest_bytes(&image), &bytes, "after the repair");
    assert_sound(&image);
}
