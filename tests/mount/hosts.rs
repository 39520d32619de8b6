//! The host's file system when it is slow or full.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::compact::scattered;
use crate::devices::{FileSystem, LoopDevice};
use crate::discards::{open, read_all};
use crate::lab::{Lab, assert_same, assert_sound, eventually, guest_bytes, length, pattern};

const SOON: Duration = Duration::from_secs(10);
/// For what comes after pauses of its own.
const LONG: Duration = Duration::from_secs(120);
/// Seconds after which a frozen file system thaws by itself.
const THAW: u64 = 4;
/// As many as there may be threads that answer the kernel.
const WRITERS: usize = 8;

/// An ext4 file system at `images/NAME`.
fn small_file_system(lab: &Lab, name: &str, size: &str) -> (LoopDevice, FileSystem) {
    file_system_with(lab, name, size, "")
}

/// The same, made with further arguments.
fn file_system_with(
    lab: &Lab,
    name: &str,
    size: &str,
    arguments: &str,
) -> (LoopDevice, FileSystem) {
    let disk = lab.path(name);
    sh!("truncate -s {size} {0} && mkfs.ext4 -q {arguments} {0}", disk.display());
    let device = LoopDevice::attach(&disk, "");
    let point = lab.subdirectory(&format!("images/{name}"));
    let mounted = FileSystem::mount(device.path(), point);
    (device, mounted)
}

/// A file system on which every write waits until this is dropped, at most [`THAW`] seconds long. No
/// process may be started meanwhile: it would close the files that it got from us, and wait.
struct Frozen(Child);

impl Frozen {
    fn new(point: &Path) -> Frozen {
        let point = point.display();
        // Thaws even if we are gone.
        let script =
            format!("fsfreeze -f {point} && {{ echo; read -t {THAW}; fsfreeze -u {point}; }}");
        let mut bash = Command::new("bash");
        let child = bash.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut frozen = Frozen(child.unwrap());
        frozen.0.stdout.take().unwrap().read_exact(&mut [0]).expect("fsfreeze works");
        frozen
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn disks_that_cannot_grow_just_now_keep_no_other_waiting() {
    let lab = Lab::new();
    lab.create("other.qcow2", "8M", "");
    let (device, slow) = small_file_system(&lab, "slow", "64M");
    let images: Vec<PathBuf> =
        (0..WRITERS).map(|n| lab.create(&format!("slow/{n}.qcow2"), "1M", "")).collect();
    let mount = lab.mount();
    let other = open(&mount.path("other.raw"));
    let growing: Vec<_> =
        (0..WRITERS).map(|n| open(&mount.path(&format!("slow/{n}.raw")))).collect();
    // The first change of an image prepares it.
    growing.iter().for_each(|file| file.write_all_at(b"first", 0).unwrap());

    let frozen = Frozen::new(slow.point());
    let writers: Vec<_> = growing
        .into_iter()
        .map(|file| thread::spawn(move || file.write_all_at(b"grown", 2 << 20).unwrap()))
        .collect();
    thread::sleep(Duration::from_millis(500));
    let (read, answered) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = [1; 4096];
        other.read_exact_at(&mut bytes, 1 << 20).unwrap();
        read.send(bytes).unwrap();
    });
    let answer = answered.recv_timeout(Duration::from_secs(THAW / 2));
    drop(frozen);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    assert_eq!(answer.expect("a read of another image waits for them"), [0; 4096]);

    for n in 0..WRITERS {
        assert_eq!(&read_all(&mount.path(&format!("slow/{n}.raw")))[2 << 20..][..5], b"grown");
    }
    mount.umount();
    images.iter().for_each(|image| assert_sound(image));
    slow.umount();
    device.detach();
}

/// A snapshot holds all of its disk while it is taken.
#[test]
fn a_disk_whose_snapshot_takes_long_keeps_no_other_waiting() {
    let lab = Lab::new();
    lab.create("other.qcow2", "8M", "");
    let (device, slow) = small_file_system(&lab, "slow", "64M");
    let image = lab.create("slow/disk.qcow2", "8M", "");
    let mount = lab.mount();
    let other = open(&mount.path("other.raw"));
    // Past the page cache, so that reads come to us.
    let mut past_cache = File::options();
    past_cache.read(true).write(true).custom_flags(libc::O_DIRECT);
    let disk = past_cache.open(mount.path("slow/disk.raw")).unwrap();
    disk.write_all_at(&pattern(3, 4 << 20), 0).unwrap();
    disk.sync_all().unwrap();
    let names = mount.path("slow/.snap/disk.raw");

    let frozen = Frozen::new(slow.point());
    let taker = thread::spawn(move || File::create_new(names.join("one")).map(|_| ()));
    thread::sleep(Duration::from_millis(300));
    let readers: Vec<_> = (0..2 * WRITERS as u64)
        .map(|n| {
            let disk = disk.try_clone().unwrap();
            thread::spawn(move || disk.read_exact_at(&mut [0; 4096], n << 18).unwrap())
        })
        .collect();
    thread::sleep(Duration::from_millis(300));
    let (done, answered) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = [1; 4096];
        other.read_exact_at(&mut bytes, 1 << 20).unwrap();
        other.write_all_at(b"written", 0).unwrap();
        done.send(other.sync_all().map(|()| bytes)).unwrap();
    });
    let answer = answered.recv_timeout(Duration::from_secs(THAW / 2));
    let waited = !taker.is_finished() && readers.iter().any(|reader| !reader.is_finished());
    drop(frozen);
    taker.join().unwrap().unwrap();
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    assert_eq!(answer.expect("another image waits for the snapshot").unwrap(), [0; 4096]);
    assert!(waited, "nobody had to wait: this tests nothing");
    drop(disk);
    mount.umount();
    assert_sound(&image);
    slow.umount();
    device.detach();
}

#[test]
fn a_full_disk_loses_nothing_and_a_discard_makes_room() {
    const MIB: usize = 1 << 20;
    let lab = Lab::new();
    let (device, small) = small_file_system(&lab, "small", "64M");
    let image = lab.create("small/disk.qcow2", "256M", "");
    let mount = lab.mount();
    let data = pattern(9, 96 * MIB);
    let file = open(&mount.path("small/disk.raw"));
    file.write_all_at(&data[..16 * MIB], 0).unwrap();
    file.sync_all().unwrap();

    let full = (16 * MIB..data.len()).step_by(MIB).find_map(|at| {
        let written = file.write_all_at(&data[at..at + MIB], at as u64);
        written.err().map(|error| (at, error))
    });
    let (end, error) = full.expect("64 MiB took 96 MiB");
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
    file.write_all_at(&data[MIB..2 * MIB], 0).unwrap();
    file.sync_all().unwrap();

    sh!("fallocate -p -o 8M -l 8M {}", mount.path("small/disk.raw").display());
    file.sync_all().unwrap();
    let again = || file.write_all_at(&data[..4 * MIB], 128 << 20).is_ok();
    eventually(SOON, again, || "what was discarded made no room".into());
    drop(file);
    mount.umount();
    assert_sound(&image);

    let mount = lab.mount();
    let found = read_all(&mount.path("small/disk.raw"));
    assert_same(&found[..MIB], &data[MIB..2 * MIB], "written in place on a full disk");
    assert_same(&found[MIB..8 * MIB], &data[MIB..8 * MIB], "before the discard");
    assert_same(&found[8 * MIB..16 * MIB], &vec![0; 8 * MIB], "discarded");
    assert_same(&found[16 * MIB..end], &data[16 * MIB..end], "written until it was full");
    assert_same(&found[128 * MIB..132 * MIB], &data[..4 * MIB], "written when there was room");
    mount.umount();
    small.umount();
    device.detach();
}

#[test]
fn changes_within_one_second_are_seen_on_a_host_whose_times_are_whole_seconds() {
    const MIB: u64 = 1 << 20;
    let lab = Lab::new();
    // Inodes without room for parts of seconds.
    let (device, host) = file_system_with(&lab, "coarse", "64M", "-I 128 -b 4096");
    let image = lab.create("coarse/disk.qcow2", "1M", "");
    sh!("qemu-io -f qcow2 -c 'write 0 64k' {}", image.display());
    let mount = lab.mount();
    let raw = mount.path("coarse/disk.raw");
    for round in 1..=5_u64 {
        sh!("truncate -s {}M {}", 2 * round, raw.display());
        assert_eq!(length(&raw), 2 * round * MIB, "set through the mount");
        let resize = || attempt!("qemu-img resize -f qcow2 {} {}M", image.display(), 2 * round + 1);
        eventually(SOON, || resize().ok(), || "it is locked".into());
        assert_eq!(length(&raw), (2 * round + 1) * MIB, "set beside the mount");
    }
    for round in 1..=5_u8 {
        let write = || attempt!("qemu-io -f qcow2 -c 'write -P {round} 0 64k' {}", image.display());
        eventually(SOON, || write().ok(), || "it is locked".into());
        assert_same(&read_all(&raw)[..65536], &[round; 65536], "written beside the mount");
    }
    mount.umount();
    host.umount();
    device.detach();
}

#[test]
fn attributes_outlive_a_power_cut_once_they_are_synced() {
    let lab = Lab::new();
    let (device, host) = small_file_system(&lab, "host", "64M");
    // Nothing reaches the disk by itself.
    sh!("mount -o remount,commit=300 {}", host.point().display());
    lab.create("host/disk.qcow2", "1M", "");
    let mount = lab.mount();
    let raw = mount.path("host/disk.raw");
    let file = open(&raw);
    file.write_all_at(b"data", 0).unwrap();
    file.sync_all().unwrap();
    sh!("chmod 0617 {0}; chown 12:34 {0}; touch -d @1000000000 {0}", raw.display());
    sh!("setfattr -n user.key -v value {}", raw.display());
    file.sync_all().unwrap();

    let (copy, found) = (lab.path("copy"), lab.subdirectory("found"));
    sh!("cp {} {}", lab.path("host").display(), copy.display());
    let copied = LoopDevice::attach(&copy, "");
    let after = FileSystem::mount(copied.path(), found);
    let image = after.point().join("disk.qcow2");
    let looks = sh!("stat -c '%a %u %g %Y' {}", image.display());
    assert_eq!(looks.trim(), "617 12 34 1000000000");
    let key = sh!("getfattr -n user.key --only-values {}", image.display());
    assert_eq!(key.trim(), "value");
    after.umount();
    copied.detach();
    drop(file);
    mount.umount();
    host.umount();
    device.detach();
}

#[test]
fn a_full_host_is_told_of_once_and_when_it_is_over() {
    const MIB: usize = 1 << 20;
    let lab = Lab::new();
    let (device, small) = small_file_system(&lab, "small", "64M");
    let image = scattered(&lab, "small/disk.qcow2", 32, "");
    sh!("qemu-img resize -q -f qcow2 {} 256M", image.display());
    let disk = guest_bytes(&image);
    let filler = small.point().join("filler");
    attempt!("cat /dev/zero >{}", filler.display());
    let mount = lab.mount_with("--compact-after 1");
    let file = open(&mount.path("small/disk.raw"));
    let look = || mount.status()["images"][0].clone();
    let lines = |text: &str| mount.log().lines().filter(|line| line.contains(text)).count();

    // Clusters cannot move, since there is no room for the copy.
    let failed = || look()["compaction"]["failed"].is_string();
    eventually(LONG, failed, || format!("{:#}", look()));
    assert_eq!(look()["condition"], "degraded", "{:#}", look());
    let full: Vec<_> = (0..32)
        .map(|n| file.write_all_at(&pattern(n, MIB), (64 + n) << 20))
        .filter_map(|written| written.err()?.raw_os_error())
        .collect();
    assert!(full.len() > 16 && full.iter().all(|code| *code == libc::ENOSPC), "{full:?}");
    // In place: data, and what is there already to count and to map it.
    file.write_all_at(&pattern(99, 4096), 3 << 16).unwrap();
    file.sync_all().unwrap();
    assert_same(
        &read_all(&mount.path("small/disk.raw"))[11 << 16..12 << 16],
        &disk[11 << 16..12 << 16],
        "read on a full host",
    );
    // Longer than it takes to try again.
    thread::sleep(Duration::from_secs(5));
    assert_eq!(lines("compaction failed"), 1, "{}", mount.log());
    assert!(lines("recycler fails") <= 2 && lines("No space left") <= 6, "{}", mount.log());

    sh!("rm {}", filler.display());
    let again = || file.write_all_at(&pattern(100, MIB), 128 << 20).is_ok();
    eventually(SOON, again, || "there is space again".into());
    file.sync_all().unwrap();
    // Somebody who asks for it need not wait until it is tried again.
    sh!("$qcow2fs compact {}", image.display());
    eventually(LONG, || look()["condition"] == "ok", || format!("{:#}\n{}", look(), mount.log()));
    drop(file);
    mount.umount();
    assert_sound(&image);
    let found = guest_bytes(&image);
    assert_same(&found[3 << 16..(3 << 16) + 4096], &pattern(99, 4096), "written on a full host");
    assert_same(&found[(3 << 16) + 4096..32 << 20], &disk[(3 << 16) + 4096..32 << 20], "the rest");
    assert_same(&found[128 << 20..129 << 20], &pattern(100, MIB), "written when there was room");
    small.umount();
    device.detach();
}
