//! Loop devices and the file systems mounted on them, taken down when dropped.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::lab::{allocated, attempt, eventually, is_mounted};

/// How long the space of a discard may take to come back.
const RECLAIM_LIMIT: Duration = Duration::from_secs(10);

/// Whoever has just looked what is on a device lets go of it by then.
const DETACH_LIMIT: Duration = Duration::from_secs(30);

/// A loop device of our own.
pub struct LoopDevice {
    path: PathBuf,
    /// The number that the kernel gives to what a device holds: another one as soon as it is
    /// detached, whoever has it then.
    sequence: String,
}

impl LoopDevice {
    /// Sets one up on `file`; `arguments` as `losetup` takes them.
    pub fn attach(file: &Path, arguments: &str) -> LoopDevice {
        let name = sh!("losetup --find --show {arguments} {}", file.display());
        let mut device = LoopDevice { path: PathBuf::from(name.trim()), sequence: String::new() };
        device.sequence = device.attribute("diskseq");
        device
    }

    /// One whose I/O goes past the page cache of the mounted file, or not.
    pub fn with_direct_io(file: &Path, direct_io: bool) -> LoopDevice {
        let (flag, shown) = if direct_io { ("on", "1") } else { ("off", "0") };
        let device = LoopDevice::attach(file, &format!("--direct-io={flag}"));
        assert_eq!(device.attribute("loop/dio"), shown, "loop's direct I/O");
        device
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file of the device's directory in sysfs, `queue/discard_max_bytes` for one.
    pub fn attribute(&self, name: &str) -> String {
        let device = self.path.file_name().unwrap().to_str().unwrap();
        let text = fs::read_to_string(format!("/sys/block/{device}/{name}")).unwrap_or_default();
        text.trim().to_owned()
    }

    /// Detaches and waits until it is done.
    pub fn detach(self) {
        sh!("losetup -d {}", self.path.display());
        eventually(DETACH_LIMIT, || !self.is_ours(), || format!("{} busy", self.path.display()));
    }

    fn is_ours(&self) -> bool {
        self.attribute("diskseq") == self.sequence
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if std::thread::panicking() && self.is_ours() {
            attempt(&format!("losetup -d {}", self.path.display()));
        }
    }
}

/// A kind of file system: how to make one on a device, and how to judge it.
pub struct Kind {
    make: &'static str,
    judge: &'static str,
}

pub const EXT4: Kind = Kind { make: "mkfs.ext4 -q", judge: "e2fsck -fn" };
pub const XFS: Kind = Kind { make: "mkfs.xfs -q", judge: "xfs_repair -n" };
pub const BTRFS: Kind = Kind { make: "mkfs.btrfs -q", judge: "btrfs check --readonly" };

impl Kind {
    pub fn make(&self, device: &Path) {
        sh!("{} {}", self.make, device.display());
    }

    /// Panics where it is not sound.
    pub fn judge(&self, device: &Path) {
        sh!("{} {}", self.judge, device.display());
    }
}

/// A file system mounted from a block device.
pub struct FileSystem {
    point: PathBuf,
}

impl FileSystem {
    pub fn mount(device: &Path, point: PathBuf) -> FileSystem {
        sh!("mount {} {}", device.display(), point.display());
        FileSystem { point }
    }

    /// One that has no device and lives in memory.
    pub fn in_memory(point: PathBuf) -> FileSystem {
        sh!("mount -t tmpfs -o size=64m qcow2fs-test {}", point.display());
        FileSystem { point }
    }

    pub fn point(&self) -> &Path {
        &self.point
    }

    pub fn umount(self) {
        sh!("umount {}", self.point.display());
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        if is_mounted(&self.point) {
            attempt(&format!("umount -l {}", self.point.display()));
        }
    }
}

/// The runs of `file` that are data, by SEEK_DATA and SEEK_HOLE.
pub fn data_runs(file: &File) -> Vec<(u64, u64)> {
    let mut runs = Vec::new();
    let mut at = 0;
    while let Some(start) = seek(file, at, libc::SEEK_DATA) {
        let end = seek(file, start, libc::SEEK_HOLE).expect("a hole follows all data");
        runs.push((start, end));
        at = end;
    }
    runs
}

/// `lseek`, with `None` for ENXIO.
pub fn seek(file: &File, offset: u64, whence: i32) -> Option<u64> {
    use std::os::fd::AsRawFd;
    // SAFETY: lseek takes no pointers; the file is open.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset as libc::off_t, whence) };
    if found < 0 {
        let error = std::io::Error::last_os_error();
        assert_eq!(error.raw_os_error(), Some(libc::ENXIO), "lseek: {error}");
        return None;
    }
    (&mut &*file).seek(SeekFrom::Start(0)).unwrap();
    Some(found as u64)
}

/// Bytes of clusters that hold anything but zeros: what an image made from scratch would need.
pub fn live_bytes(raw: &Path, cluster_size: u64) -> u64 {
    let file = File::open(raw).unwrap();
    let mut live = 0;
    let mut cluster = vec![0; cluster_size as usize];
    for (start, end) in data_runs(&file) {
        let mut at = start / cluster_size * cluster_size;
        while at < end {
            let read = file.read_at(&mut cluster, at).unwrap();
            if cluster[..read].iter().any(|&byte| byte != 0) {
                live += cluster_size;
            }
            at += cluster_size;
        }
    }
    live
}

/// The image shrinks to its live data plus 3 % and 2 MiB, soon enough and while in use.
pub fn assert_reclaimed(image: &Path, raw: &Path, cluster_size: u64) {
    let start = std::time::Instant::now();
    let live = live_bytes(raw, cluster_size);
    let target = live + live * 3 / 100 + (2 << 20);
    let limit = RECLAIM_LIMIT.saturating_sub(start.elapsed());
    eventually(
        limit,
        || allocated(image) <= target,
        || format!("{} bytes allocated, {live} live, at most {target} allowed", allocated(image)),
    );
}
