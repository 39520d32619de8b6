//! The host's file system when it is slow or full.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::devices::{FileSystem, LoopDevice};
use crate::discards::{open, read_all};
use crate::lab::{Lab, assert_same, assert_sound, eventually, pattern};

const SOON: Duration = Duration::from_secs(10);
/// Seconds after which a frozen file system thaws by itself.
const THAW: u64 = 4;
/// As many as there may be threads that answer the kernel.
const WRITERS: usize = 8;

/// An ext4 file system at `images/NAME`.
fn small_file_system(lab: &Lab, name: &str, size: &str) -> (LoopDevice, FileSystem) {
    let disk = lab.path(name);
    sh!("truncate -s {size} {0} && mkfs.ext4 -q {0}", disk.display());
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
