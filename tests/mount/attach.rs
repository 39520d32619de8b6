//! `attach` and `detach`: an image on a loop device in one step, and nothing left of it afterwards.

use std::fs;
use std::path::{Path, PathBuf};

use crate::filesystems::boot_record;
use crate::lab::{Lab, assert_sound, is_mounted, write_by_dd};
use crate::locks::Nbd;

const NOBODY: &str = "setpriv --reuid=65534 --regid=65534 --clear-groups";

/// An image in a lab that is detached however the test ends.
struct Attached {
    image: PathBuf,
}

impl Attached {
    fn new(image: &Path) -> Attached {
        Attached { image: image.to_owned() }
    }

    /// Every loop device and every mount whose source or place names the image or the lab.
    fn traces(&self) -> String {
        let lab = self.image.parent().unwrap().parent().unwrap().display().to_string();
        let all = sh!(
            "losetup -l -n -O NAME,BACK-FILE; cat /proc/self/mounts; grep -rs {lab} /run/qcow2fs || true"
        );
        let raw = self.image.with_extension("raw");
        let raw = raw.file_name().unwrap().to_str().unwrap();
        let ours = all.lines().filter(|line| line.contains(&lab) || line.contains(raw));
        ours.collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        attempt!("$qcow2fs detach {}", self.image.display());
    }
}

/// A name that no other test's image has, since attachments are told apart in one place.
fn image(lab: &Lab, size: &str) -> (PathBuf, Attached) {
    let unique = lab.path("").file_name().unwrap().to_str().unwrap().replace('.', "-");
    let image = lab.create(&format!("{unique}.qcow2"), size, "");
    let attached = Attached::new(&image);
    (image, attached)
}

fn make_file_system(image: &Path) {
    let device = sh!("$qcow2fs attach {}", image.display());
    sh!("mkfs.ext4 -q {}", device.trim());
    sh!("$qcow2fs detach {}", device.trim());
}

fn make_partitions(image: &Path) {
    let device = sh!("$qcow2fs attach {}", image.display());
    write_by_dd(Path::new(device.trim()), &boot_record(&[(2048, 32768), (40960, 81920)]));
    sh!("$qcow2fs detach {}", device.trim());
    let second = sh!("$qcow2fs attach -p 2 {}", image.display());
    assert!(second.trim().ends_with("p2"), "{second}");
    sh!("mkfs.ext4 -q {}", second.trim());
    sh!("$qcow2fs detach {}", second.trim());
}

#[test]
fn an_image_without_a_mount_is_attached_and_nothing_is_left_of_it() {
    let lab = Lab::new();
    let (image, attached) = image(&lab, "64M");
    let other = lab.create("other.qcow2", "8M", "");
    make_file_system(&image);
    let disk = lab.subdirectory("disk");
    let said = sh!("$qcow2fs attach {} {}", image.display(), disk.display());
    let (device, place) = said.trim().split_once(" on ").unwrap();
    assert_eq!(Path::new(place), disk);
    assert!(is_mounted(&disk));
    assert_eq!(sh!("losetup -n -O DIO {device}").trim(), "1", "no direct I/O");
    // The mount shows this image alone, and to root alone.
    let raw = sh!("losetup -n -O BACK-FILE {device}");
    let raw = Path::new(raw.trim());
    let own = raw.parent().unwrap();
    assert_eq!(fs::read_dir(own).unwrap().count(), 1);
    assert!(!own.join("other.raw").exists(), "{} shows", other.display());
    assert!(!attempt!("{NOBODY} ls {}", own.display()).ok());
    assert!(!attempt!("mkdir {}/new", own.display()).ok(), "names can be changed");
    assert!(!attempt!("mv {} {}", raw.display(), own.join("b.raw").display()).ok());
    // A second one finds it in use; the first one goes on.
    let again = attempt!("$qcow2fs attach {}", image.display());
    assert!(again.err.contains(&format!("attached already: {device} on")), "{}", again.text());
    sh!("echo kept > {}/file", disk.display());

    sh!("$qcow2fs detach {}", disk.display());
    assert!(!is_mounted(&disk));
    assert_eq!(attached.traces(), "");
    assert_sound(&image);
    sh!("$qcow2fs attach -o noatime {} {}", image.display(), disk.display());
    assert_eq!(fs::read_to_string(disk.join("file")).unwrap(), "kept\n");
    sh!("$qcow2fs detach {}", image.display());
    assert_eq!(attached.traces(), "");
}

#[test]
fn a_partition_of_a_file_of_a_mount_is_attached_and_the_mount_stays() {
    let lab = Lab::new();
    let (image, attached) = image(&lab, "80M");
    make_partitions(&image);
    let mount = lab.mount();
    let raw = mount.path(image.with_extension("raw").file_name().unwrap().to_str().unwrap());
    let disk = lab.subdirectory("disk");
    let (raw, place) = (raw.display(), disk.display());
    let whole = attempt!("$qcow2fs attach {raw} {place}");
    assert!(whole.err.contains("choose one of 1 and 2 with --partition"), "{}", whole.text());
    let third = attempt!("$qcow2fs attach {raw} -p 3 {place}");
    assert!(third.err.contains("no partition 3, only 1 and 2"), "{}", third.text());
    // The image, as it is shown already, needs no mount of its own.
    let said = sh!("$qcow2fs attach --json -p 2 {} {place}", image.display());
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["raw"].as_str(), Some(raw.to_string().as_str()));
    assert_eq!(said["mountpoint"].as_str(), Some(place.to_string().as_str()));
    let device = said["device"].as_str().unwrap();
    assert!(device.ends_with("p2"), "{device}");
    assert!(sh!("grep {place} /proc/self/mounts").starts_with(device));
    sh!("echo kept > {place}/file");
    sh!("$qcow2fs detach {device}");
    assert!(mount.status()["images"].as_array().unwrap().is_empty(), "the image is still open");
    mount.umount();
    assert_eq!(attached.traces(), "");
    assert_sound(&image);
}

#[test]
fn a_step_that_fails_undoes_those_before_it() {
    let lab = Lab::new();
    let (image, attached) = image(&lab, "64M");
    let disk = lab.subdirectory("disk");
    let (shown, place) = (image.display(), disk.display());
    // No file system, no such type, no such partition, no such mount point, a lock held by another.
    for arguments in [
        format!("{shown} {place}"),
        format!("{shown} {place} -t nosuchfs"),
        format!("{shown} -p 1"),
        format!("{shown} {place}/none"),
        format!("{place}"),
    ] {
        let outcome = attempt!("$qcow2fs attach {arguments}");
        assert_eq!((outcome.code, outcome.out.as_str()), (Some(1), ""), "{arguments}");
        assert_eq!(outcome.err.lines().count(), 1, "{arguments}: {}", outcome.err);
        assert_eq!(attached.traces(), "", "after {arguments}");
    }
    let qemu = Nbd::hold(&image, &[], lab.path("socket"));
    let locked = attempt!("$qcow2fs attach {shown}");
    assert!(locked.err.contains("busy"), "{}", locked.err);
    qemu.end();
    assert_eq!(attached.traces(), "");
    assert_sound(&image);
}

#[test]
fn what_is_in_use_is_not_detached_and_what_others_have_undone_is_no_error() {
    let lab = Lab::new();
    let (image, attached) = image(&lab, "64M");
    make_file_system(&image);
    let disk = lab.subdirectory("disk");
    let (shown, place) = (image.display(), disk.display());
    sh!("$qcow2fs attach {shown} {place}");
    let held = fs::File::create(disk.join("held")).unwrap();
    let busy = attempt!("$qcow2fs detach {shown}");
    let pid = format!("pid {}", std::process::id());
    assert!(busy.err.contains("busy: in use by") && busy.err.contains(&pid), "{}", busy.text());
    assert!(is_mounted(&disk));
    drop(held);
    // A copy of the file may be in a child that another test is just starting.
    crate::lab::eventually(
        std::time::Duration::from_secs(10),
        || attempt!("umount {place}").ok(),
        || sh!("cat /proc/self/mounts"),
    );
    let device =
        sh!("losetup -n -O NAME,BACK-FILE | grep {}", image.file_stem().unwrap().display());
    sh!("losetup -d {}", device.split_whitespace().next().unwrap());
    sh!("$qcow2fs detach {shown}");
    assert_eq!(attached.traces(), "");
    let nothing = attempt!("$qcow2fs detach {shown}");
    assert!(nothing.err.contains("nothing that `qcow2fs attach` has attached"), "{}", nothing.err);
}

#[test]
fn a_read_only_attachment_writes_nothing() {
    let lab = Lab::new();
    let (image, attached) = image(&lab, "64M");
    make_file_system(&image);
    let before = fs::read(&image).unwrap();
    let disk = lab.subdirectory("disk");
    sh!("$qcow2fs attach --read-only {} {}", image.display(), disk.display());
    assert!(!attempt!("touch {}/file", disk.display()).ok());
    sh!("ls {}/lost+found", disk.display());
    sh!("$qcow2fs detach {}", disk.display());
    assert_eq!(fs::read(&image).unwrap(), before);
    assert_eq!(attached.traces(), "");
}

#[test]
fn without_root_it_says_what_root_would_do_and_that_works() {
    let lab = Lab::new();
    let (image, attached) = image(&lab, "64M");
    make_file_system(&image);
    let disk = lab.subdirectory("disk");
    let place = disk.display();
    let outcome = attempt!("{NOBODY} $qcow2fs attach {} {place}", image.display());
    assert_eq!(outcome.code, Some(1));
    assert!(outcome.err.contains("needs root"), "{}", outcome.err);
    let own = lab.subdirectory("own");
    let commands = outcome.out.replace("/run/qcow2fs/attached/1/raw", own.to_str().unwrap());
    let bin = lab.subdirectory("bin");
    sh!("ln -s $qcow2fs {}/qcow2fs", bin.display());
    sh!("PATH={}:$PATH\n{commands}", bin.display());
    assert!(is_mounted(&disk), "{commands}");
    sh!("device=$(findmnt -n -o SOURCE {place}); umount {place}; losetup -d $device");
    sh!("$qcow2fs umount {}", own.display());
    assert_eq!(attached.traces(), "");
}

/// btrfs has a number of its own in the mount table, not that of its device.
#[test]
fn a_file_system_with_a_number_of_its_own_is_detached() {
    let lab = Lab::new();
    let (image, attached) = image(&lab, "256M");
    let device = sh!("$qcow2fs attach {}", image.display());
    sh!("mkfs.btrfs -q {}", device.trim());
    sh!("$qcow2fs detach {}", image.display());
    let disk = lab.subdirectory("disk");
    sh!("$qcow2fs attach {} {}", image.display(), disk.display());
    assert!(is_mounted(&disk));
    sh!("$qcow2fs detach {}", disk.display());
    assert!(!is_mounted(&disk));
    assert_eq!(attached.traces(), "");
    assert_sound(&image);
}

/// What has been mounted since from the same loop device is another's.
#[test]
fn a_device_that_somebody_else_has_by_now_is_left_alone() {
    let lab = Lab::new();
    let (image, attached) = image(&lab, "64M");
    make_file_system(&image);
    let (disk, others) = (lab.subdirectory("disk"), lab.path("others.raw"));
    sh!("truncate -s 16M {0}; mkfs.ext4 -q {0}", others.display());
    // A test beside this one may be quicker to take the device.
    let device = (0..20).find_map(|_| {
        let said = sh!("$qcow2fs attach {} {}", image.display(), disk.display());
        let device = said.trim().split_once(" on ").unwrap().0.to_owned();
        sh!("umount {}; losetup -d {device}", disk.display());
        let is_taken = attempt!("losetup {device} {}", others.display()).ok();
        if !is_taken {
            sh!("$qcow2fs detach {}", image.display());
        }
        is_taken.then_some(device)
    });
    let device = device.unwrap();
    sh!("mount {device} {}", disk.display());
    sh!("$qcow2fs detach {}", image.display());
    assert!(is_mounted(&disk), "unmounted what is not its own");
    sh!("umount {}; losetup -d {device}", disk.display());
    assert_eq!(attached.traces(), "");
}

#[test]
fn of_two_at_once_one_attaches() {
    let lab = Lab::new();
    let (image, attached) = image(&lab, "64M");
    let mount = lab.mount();
    let raw = mount.path(image.with_extension("raw").file_name().unwrap().to_str().unwrap());
    let attach = || attempt!("$qcow2fs attach {}", raw.display()).ok();
    let succeeded = std::thread::scope(|scope| {
        let others: Vec<_> = (0..4).map(|_| scope.spawn(attach)).collect();
        others.into_iter().map(|other| other.join().unwrap()).filter(|ok| *ok).count()
    });
    assert_eq!(succeeded, 1);
    sh!("$qcow2fs detach {}", image.display());
    mount.umount();
    assert_eq!(attached.traces(), "");
}
