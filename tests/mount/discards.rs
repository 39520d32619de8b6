//! Discards of any alignment: zeros afterwards, neighbours untouched, space and length back.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::devices::LoopDevice;
use crate::lab::{
    Lab, allocated, assert_same, assert_sound, eventually, guest_bytes, length, must, pattern,
    signal, wait_until_free,
};

const CLUSTER: usize = 64 << 10;

/// Ranges in sectors (start, length): single sectors, pages, parts of clusters, clusters, spans.
const SECTOR_RANGES: [(usize, usize); 10] = [
    (1, 1),
    (128 + 7, 3),
    (256 + 8, 8),
    (384 + 64, 64),
    (512, 128),
    (768 + 100, 128),
    (1024 + 1, 1000),
    (4096 - 8, 16),
    (8192, 4096),
    (16384 + 127, 2),
];

pub fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// `fallocate`, with the errno as the error.
pub fn fallocate(file: &File, mode: i32, offset: usize, len: usize) -> Result<(), i32> {
    let (offset, len) = (offset as libc::off_t, len as libc::off_t);
    // SAFETY: fallocate takes no pointers; the file is open.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
    }
}

pub fn read_all(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn punched_ranges_of_any_alignment_read_zeros() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "16M", "");
    let mount = lab.mount();
    let raw = mount.path("disk.raw");
    let mut expected = pattern(1, 16 << 20);
    let file = open(&raw);
    file.write_all_at(&expected, 0).unwrap();
    let odd_bytes = [(3, 1), (CLUSTER * 90 - 1, 2), (CLUSTER * 95 + 17, CLUSTER * 2 + 4)];
    for (start, len) in SECTOR_RANGES.map(|(s, l)| (s * 512, l * 512)).iter().chain(&odd_bytes) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        assert_eq!(fallocate(&file, mode, *start, *len), Ok(()), "punch {start:#x}+{len:#x}");
        expected[*start..*start + *len].fill(0);
        assert_same(&read_all(&raw), &expected, &format!("after punching {start:#x}+{len:#x}"));
    }
    drop(file);
    mount.umount();
    assert_same(&guest_bytes(&image), &expected, "through qemu");
    assert_sound(&image);
}

fn block_discards_read_zeros(direct_io: bool) {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "16M", "");
    let mount = lab.mount();
    let raw = mount.path("disk.raw");
    let mut expected = pattern(2, 16 << 20);
    open(&raw).write_all_at(&expected, 0).unwrap();
    let device = LoopDevice::with_direct_io(&raw, direct_io);
    for (index, (start, len)) in SECTOR_RANGES.map(|(s, l)| (s * 512, l * 512)).iter().enumerate() {
        let zeroout = if index % 3 == 2 { "-z" } else { "" };
        must(&format!("blkdiscard {zeroout} -o {start} -l {len} {}", device.path().display()));
        expected[*start..*start + *len].fill(0);
        assert_ne!(device.attribute("queue/discard_max_bytes"), "0", "discards were switched off");
        assert_ne!(device.attribute("queue/write_zeroes_max_bytes"), "0", "zeroing was");
    }
    assert_same(&read_all(device.path()), &expected, "through the loop device");
    device.detach();
    assert_same(&read_all(&raw), &expected, "through the mount");
    mount.umount();
    assert_same(&guest_bytes(&image), &expected, "through qemu");
    assert_sound(&image);
}

#[test]
fn block_discards_of_any_alignment_read_zeros() {
    block_discards_read_zeros(false);
}

#[test]
fn block_discards_of_any_alignment_read_zeros_with_direct_io() {
    block_discards_read_zeros(true);
}

#[test]
fn discards_smaller_than_a_cluster_add_up() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "16M", "");
    let mount = lab.mount();
    let file = open(&mount.path("disk.raw"));
    file.write_all_at(&pattern(3, 8 << 20), 0).unwrap();
    file.sync_all().unwrap();
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    for page in 0..(8 << 20) / 4096 {
        // In a scattered order, so that no discard completes a cluster before its time.
        let at = page * 1021 % 2048 * 4096;
        assert_eq!(fallocate(&file, mode, at, 4096), Ok(()));
    }
    file.sync_all().unwrap();
    eventually(
        Duration::from_secs(10),
        || allocated(&image) < 2 << 20,
        || format!("{} bytes still allocated", allocated(&image)),
    );
    drop(file);
    wait_until_free(&image);
    let map = must(&format!("qemu-img map -f qcow2 --output=json {}", image.display()));
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let data = map.as_array().unwrap().iter().any(|run| run["data"] == true);
    assert!(!data, "clusters are still mapped: {map}");
    mount.umount();
    assert_sound(&image);
}

/// What the kernel's discards leave at the file's end is cut off, with no flush by anybody: the
/// recycler makes its own. A small pool, so that it is not what makes the file long.
#[test]
fn discarding_the_end_shortens_the_file() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "256M", "");
    let mount = lab.mount_with("--keep-erased 1M");
    let file = open(&mount.path("disk.raw"));
    for chunk in 0..64 {
        file.write_all_at(&pattern(chunk, 1 << 20), chunk << 20).unwrap();
    }
    file.sync_all().unwrap();
    assert!(length(&image) >= 64 << 20);
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    assert_eq!(fallocate(&file, mode, 8 << 20, 56 << 20), Ok(()));
    eventually(
        Duration::from_secs(10),
        || length(&image) < 12 << 20 && allocated(&image) < 11 << 20,
        || format!("{} bytes long, {} allocated", length(&image), allocated(&image)),
    );
    drop(file);
    mount.umount();
    assert!(length(&image) < 11 << 20, "{} bytes long when closed", length(&image));
    assert_sound(&image);
}

/// How often each system call was made.
type Calls = HashMap<String, u64>;

/// Counts the system calls of a process, with strace.
struct Counter {
    strace: Child,
    summary: std::path::PathBuf,
}

impl Counter {
    fn attach(pid: i32, summary: std::path::PathBuf) -> Counter {
        assert!(attempt!("command -v strace").ok(), "counting system calls needs strace");
        let strace = Command::new("strace")
            .args(["-f", "-c", "-U", "name,calls", "-p", &pid.to_string(), "-o"])
            .arg(&summary)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("strace starts");
        let traced = || {
            let status = sh!("cat /proc/{pid}/task/*/status");
            !status.lines().any(|line| line == "TracerPid:\t0")
        };
        eventually(Duration::from_secs(10), traced, || "strace does not attach".into());
        Counter { strace, summary }
    }

    /// Detaches; returns how often each system call was made.
    fn finish(mut self) -> Calls {
        signal(self.strace.id() as i32, libc::SIGINT);
        let mut ended = || self.strace.try_wait().unwrap().is_some();
        eventually(Duration::from_secs(10), &mut ended, || "strace does not end".into());
        let summary = std::fs::read_to_string(&self.summary).unwrap();
        assert!(summary.contains("calls"), "strace printed no summary: {summary}");
        let count = |line: &str| {
            let (name, count) = line.trim().split_once(char::is_whitespace)?;
            Some((name.to_owned(), count.trim().parse().ok()?))
        };
        summary.lines().filter_map(count).collect()
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        if matches!(self.strace.try_wait(), Ok(None)) {
            signal(self.strace.id() as i32, libc::SIGKILL);
        }
    }
}

/// Fills a new image of `size` bytes through the mount, then times and counts one discard of all.
#[test]
fn trimming_a_full_disk_takes_seconds_and_few_calls() {
    let lab = Lab::new();
    let image = lab.create("big.qcow2", "2G", "");
    let mount = lab.mount();
    let raw = mount.path("big.raw");
    must(&format!(
        "head -c 2G /dev/zero | tr '\\0' x | \
         dd of={} bs=1M iflag=fullblock conv=notrunc,fsync status=none",
        raw.display()
    ));
    assert!(allocated(&image) >= 2 << 30);
    let device = LoopDevice::with_direct_io(&raw, true);
    let counter = Counter::attach(mount.pid(), lab.path("strace"));
    let start = Instant::now();
    must(&format!("blkdiscard {}", device.path().display()));
    let discarded = start.elapsed();
    eventually(
        Duration::from_secs(10),
        || allocated(&image) < 18 << 20,
        || format!("{} bytes still allocated", allocated(&image)),
    );
    let reclaimed = start.elapsed();
    let calls = counter.finish();
    let punches = calls.get("fallocate").copied().unwrap_or(0);
    let syncs: u64 = ["fdatasync", "fsync"].iter().filter_map(|name| calls.get(*name)).sum();
    println!(
        "2 GiB: discarded in {discarded:?}, reclaimed in {reclaimed:?}, \
         {punches} fallocates, {syncs} syncs"
    );
    assert!(discarded < Duration::from_secs(5), "the discard took {discarded:?}");
    assert!(punches <= 512, "{punches} fallocates for one discard of 32768 clusters in a row");
    assert!(syncs <= 32, "{syncs} syncs for one discard");
    device.detach();
    mount.umount();
    assert_sound(&image);
}
