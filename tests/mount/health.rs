//! What goes wrong with an image is told: by `status`, as text and as JSON, by the log, once, and by
//! the exit code at the end.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::devices::{FileSystem, LoopDevice};
use crate::discards::open;
use crate::lab::{Lab, Mount, assert_sound, eventually, is_mounted, pattern, wait_for_end};

const MIB: usize = 1 << 20;

/// A host file system on a disk that stops taking writes when [`Dying::die`] says so: what was
/// written reaches it when it is synced, and is refused there.
struct Dying {
    filesystem: FileSystem,
    device: LoopDevice,
    memory: FileSystem,
}

impl Dying {
    /// One that is mounted at `point`.
    fn new(lab: &Lab, point: PathBuf) -> Dying {
        let memory = FileSystem::in_memory(lab.subdirectory("memory"));
        let disk = memory.point().join("disk");
        sh!("truncate -s 256M {0} && mkfs.ext4 -q -O ^has_journal {0}", disk.display());
        let device = LoopDevice::attach(&disk, "");
        let filesystem = FileSystem::mount(device.path(), point);
        Dying { filesystem, device, memory }
    }

    fn die(&self) {
        attempt!("cat /dev/zero >{}", self.filler().display());
    }

    fn recover(&self) {
        fs::remove_file(self.filler()).unwrap();
    }

    fn filler(&self) -> PathBuf {
        self.memory.point().join("filler")
    }

    fn take_down(self) {
        self.filesystem.umount();
        self.device.detach();
        self.memory.umount();
    }
}

/// Unmounts a mount on which something has gone wrong; the command must say so.
fn assert_ends_with_failure(mount: Mount) {
    let outcome = attempt!("$qcow2fs umount {}", mount.point().display());
    assert_eq!(outcome.code, Some(1), "{}", outcome.text());
    assert!(outcome.err.contains("was not closed in order"), "{}", outcome.text());
    assert!(!is_mounted(mount.point()));
    wait_for_end(mount.pid());
}

/// How many lines of the log say `text`.
fn logged(mount: &Mount, text: &str) -> usize {
    mount.log().lines().filter(|line| line.contains(text)).count()
}

fn assert_condition(mount: &Mount, name: &str, condition: &str, why: &str) {
    let status = mount.status();
    let images = status["images"].as_array().unwrap();
    let image = images.iter().find(|image| image["name"] == name).expect("it is open");
    assert_eq!(image["condition"], condition, "{image:#}");
    assert!(image["health"].as_str().is_some_and(|health| health.contains(why)), "{image:#}");
    let text = sh!("$qcow2fs status {}", mount.point().display());
    let line = text.lines().find(|line| line.starts_with(name)).expect("it is named");
    assert!(line.contains(condition) && line.contains(why), "{line}");
}

#[test]
fn an_image_that_cannot_be_synced_is_read_only_and_everybody_is_told() {
    let lab = Lab::new();
    let sound = lab.create("sound.qcow2", "8M", "");
    let dying = Dying::new(&lab, lab.subdirectory("images/dying"));
    lab.create("dying/disk.qcow2", "128M", "");
    let mount = lab.mount();
    let other = open(&mount.path("sound.raw"));
    let file = open(&mount.path("dying/disk.raw"));
    file.write_all_at(&pattern(1, MIB), 0).unwrap();
    file.sync_all().unwrap();
    assert_condition(&mount, "dying/disk.raw", "ok", "ok");

    dying.die();
    // A flush in the background may notice meanwhile.
    let _written_or_refused = file.write_all_at(&pattern(2, 32 * MIB), 0);
    file.sync_all().expect_err("nothing can be synced");
    file.sync_all().expect_err("what was lost once stays lost");
    let refused = file.write_all_at(b"late", 0).expect_err("written after that");
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS), "{refused}");
    assert_condition(&mount, "dying/disk.raw", "read-only", "syncing the image");
    assert_eq!(logged(&mount, "dying/disk.qcow2 is read-only from now on"), 1, "{}", mount.log());
    assert_condition(&mount, "sound.raw", "ok", "ok");
    other.write_all_at(b"still served", 0).unwrap();
    other.sync_all().unwrap();

    drop((file, other));
    assert_ends_with_failure(mount);
    assert_sound(&sound);
    dying.take_down();
}

#[test]
fn what_a_failed_close_has_lost_is_told_to_the_next_sync() {
    let lab = Lab::new();
    let dying = Dying::new(&lab, lab.subdirectory("images/dying"));
    lab.create("dying/disk.qcow2", "128M", "");
    let mount = lab.mount();
    let raw = mount.path("dying/disk.raw");
    let file = open(&raw);
    file.write_all_at(&pattern(1, MIB), 0).unwrap();
    file.sync_all().unwrap();
    dying.die();
    let _written_or_refused = file.write_all_at(&pattern(2, 32 * MIB), 0);
    drop(file);
    let closed = || mount.status()["close_errors"] == 1;
    eventually(Duration::from_secs(10), closed, || mount.status().to_string());
    dying.recover();

    let file = open(&raw);
    let lost = file.sync_data().expect_err("the close has failed, and nobody has heard of it");
    assert_eq!(lost.raw_os_error(), Some(libc::EIO), "{lost}");
    file.sync_all().expect("it was told");
    drop(file);
    assert_ends_with_failure(mount);
    dying.take_down();
}

/// Makes the L2 entry of the first cluster lead to where no cluster starts.
fn corrupt(image: &Path) {
    let file = open(image);
    let word = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    let l2 = word(word(40)) & OFFSET;
    let entry = word(l2) | 512;
    file.write_all_at(&entry.to_be_bytes(), l2).unwrap();
}

#[test]
fn an_image_that_turns_out_corrupt_is_read_only_and_everybody_is_told() {
    let served = |write| {
        let lab = Lab::new();
        let image = lab.create("disk.qcow2", "8M", "");
        sh!("qemu-io -f qcow2 -c 'write -P 5 0 1M' {}", image.display());
        corrupt(&image);
        let mount = lab.mount();
        let file = File::options().read(true).write(write).open(mount.path("disk.raw"));
        // The search that begins with the open may be over before that is.
        let is_over = |e: &io::Error| write && e.raw_os_error() == Some(libc::EROFS);
        (!file.as_ref().is_err_and(is_over)).then(|| (lab, image, mount, file.unwrap()))
    };
    for write in [true, false] {
        let served = (0..20).find_map(|_| served(write));
        let (_lab, image, mount, file) = served.expect("an open before the search is over");
        for _ in 0..3 {
            let refused = file.read_exact_at(&mut [0; 512], 0).expect_err("read");
            assert_eq!(refused.raw_os_error(), Some(libc::EIO), "{refused}");
        }
        assert_condition(&mount, "disk.raw", "corrupt", "L2 entry 0");
        assert_eq!(logged(&mount, "disk.qcow2 is read-only from now on"), 1, "{}", mount.log());
        assert!(mount.log().contains("qcow2fs check"), "what to do: {}", mount.log());
        drop(file);
        assert_ends_with_failure(mount);
        let is_marked = fs::read(&image).unwrap()[79] & 2 != 0;
        assert_eq!(is_marked, write, "QEMU's mark");
    }
}

#[test]
fn an_image_that_was_marked_as_corrupt_is_shown_as_such_and_is_no_failure_of_the_mount() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    open(&image).write_all_at(&[2], 79).unwrap();
    let mount = lab.mount();
    let file = File::open(mount.path("disk.raw")).unwrap();
    assert_condition(&mount, "disk.raw", "corrupt", "qcow2fs check --repair all");
    drop(file);
    mount.umount();
}
