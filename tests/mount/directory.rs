//! The directory of images as it is seen through the mount, while it changes.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::discards::{open, read_all};
use crate::lab::{
    Lab, assert_same, assert_sound, eventually, length, pattern, signal, wait_until_free,
};

const SOON: Duration = Duration::from_secs(5);

#[test]
fn subdirectories_are_shown_and_other_files_are_not() {
    let lab = Lab::new();
    lab.subdirectory("images/a/b");
    let image = lab.create("a/b/deep.qcow2", "8M", "");
    lab.create("top.qcow2", "4M", "");
    fs::write(lab.image("notes.txt"), "not an image").unwrap();
    fs::write(lab.image("disk.raw"), "not an image either").unwrap();
    let secret = lab.create("../secret.qcow2", "4M", "");
    std::os::unix::fs::symlink(&secret, lab.image("link.qcow2")).unwrap();
    let mount = lab.mount();
    let found = sh!("cd {} && find . | sort", mount.point().display());
    assert_eq!(
        found.split_whitespace().collect::<Vec<_>>(),
        [".", "./a", "./a/b", "./a/b/deep.raw", "./top.raw"]
    );
    assert!(!mount.path("link.raw").exists(), "a symbolic link leads out of the directory");
    let data = pattern(1, 1 << 20);
    open(&mount.path("a/b/deep.raw")).write_all_at(&data, 0).unwrap();
    assert_same(&read_all(&mount.path("a/b/deep.raw"))[..1 << 20], &data, "a nested image");
    mount.umount();
    assert_sound(&image);
}

#[test]
fn images_appear_vanish_and_are_replaced() {
    let lab = Lab::new();
    lab.create("first.qcow2", "4M", "");
    let mount = lab.mount();
    let (first, second) = (mount.path("first.raw"), mount.path("second.raw"));
    assert_eq!(length(&first), 4 << 20);
    assert!(!second.exists());

    lab.create("second.qcow2", "8M", "");
    eventually(SOON, || second.exists(), || "a new image does not appear".into());
    assert_eq!(length(&second), 8 << 20);
    assert!(sh!("ls {}", mount.point().display()).contains("second.raw"));

    let old = open(&first);
    old.write_all_at(b"old", 0).unwrap();
    let new = lab.create("new.qcow2.tmp", "16M", "");
    sh!("qemu-io -f qcow2 -c 'write -P 0x77 0 4k' {}", new.display());
    fs::rename(&new, lab.image("first.qcow2")).unwrap();
    eventually(SOON, || length(&first) == 16 << 20, || "the old size stays".into());
    assert_eq!(read_all(&first)[..4096], [0x77; 4096], "the new image's bytes");
    let mut bytes = [0; 3];
    old.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"old", "an open handle stays with its file");
    old.write_all_at(b"OLD", 0).unwrap();
    drop(old);
    assert_eq!(read_all(&first)[..4096], [0x77; 4096], "the old handle wrote elsewhere");

    fs::remove_file(lab.image("second.qcow2")).unwrap();
    eventually(SOON, || !second.exists(), || "a removed image stays".into());
    mount.umount();
    assert_sound(&lab.image("first.qcow2"));
}

#[test]
fn an_image_rewritten_by_others_is_read_anew() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "4M", "");
    let mount = lab.mount();
    let raw = mount.path("disk.raw");
    open(&raw).write_all_at(&pattern(1, 4 << 20), 0).unwrap();
    assert_same(&read_all(&raw), &pattern(1, 4 << 20), "as written");
    wait_until_free(&image);
    sh!("qemu-io -f qcow2 -c 'write -P 0x31 1M 1M' {}", image.display());
    let mut expected = pattern(1, 4 << 20);
    expected[1 << 20..2 << 20].fill(0x31);
    assert_same(&read_all(&raw), &expected, "after qemu wrote into it");
    mount.umount();
    assert_sound(&image);
}

fn open_images(pid: i32, images: &Path) -> Vec<String> {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let targets = links.filter_map(|link| fs::read_link(link.ok()?.path()).ok());
    let within = targets.filter(|target| target.starts_with(images) && target != images);
    within.map(|target| target.display().to_string()).collect()
}

#[test]
fn ten_thousand_images_mount_at_once_and_none_is_held_open() {
    let lab = Lab::new();
    let template = lab.create("00000.qcow2", "1M", "cluster_size=512");
    let bytes = fs::read(template).unwrap();
    for index in 1..10_000 {
        fs::write(lab.image(&format!("{index:05}.qcow2")), &bytes).unwrap();
    }
    let start = Instant::now();
    let mount = lab.mount();
    let elapsed = start.elapsed();
    assert!(elapsed < Duration::from_secs(1), "mounting took {elapsed:?}");
    assert_eq!(open_images(mount.pid(), &lab.images()), [""; 0]);
    assert_eq!(sh!("ls -U {} | wc -l", mount.point().display()).trim(), "10000");
    assert_eq!(sh!("ls -l {} | grep -c 1048576", mount.point().display()).trim(), "10000");
    let no_image = || open_images(mount.pid(), &lab.images()).is_empty();
    eventually(SOON, no_image, || open_images(mount.pid(), &lab.images()).join(" "));
    assert_eq!(read_all(&mount.path("09999.raw")), vec![0; 1 << 20]);
    eventually(SOON, no_image, || open_images(mount.pid(), &lab.images()).join(" "));
    mount.umount();
}

#[test]
fn many_images_are_open_at_once() {
    let lab = Lab::new();
    for index in 0..100 {
        lab.create(&format!("{index}.qcow2"), "4M", "");
    }
    let mount = lab.mount();
    let path = |index| mount.path(&format!("{index}.raw"));
    let files: Vec<_> = (0..100).map(|index| open(&path(index))).collect();
    for (index, file) in (0..).zip(&files) {
        file.write_all_at(&pattern(index, 1 << 20), 1 << 20).unwrap();
    }
    for (index, file) in (0..).zip(&files) {
        let mut found = vec![0; 1 << 20];
        file.read_exact_at(&mut found, 1 << 20).unwrap();
        assert_same(&found, &pattern(index, 1 << 20), &format!("image {index}"));
    }
    let images = mount.status()["images"].as_array().map(Vec::len);
    assert_eq!(images, Some(100), "status lists what is open");
    drop(files);
    mount.umount();
    for index in 0..100 {
        sh!("qemu-img check -q -f qcow2 {}", lab.image(&format!("{index}.qcow2")).display());
    }
}

#[test]
fn hard_links_are_one_image() {
    let lab = Lab::new();
    let image = lab.create("one.qcow2", "4M", "");
    fs::hard_link(&image, lab.image("two.qcow2")).unwrap();
    let mount = lab.mount();
    let (one, two) = (mount.path("one.raw"), mount.path("two.raw"));
    let (first, second) = (open(&one), open(&two));
    first.write_all_at(b"by the first name", 4096).unwrap();
    let mut found = [0; 17];
    second.read_exact_at(&mut found, 4096).unwrap();
    assert_eq!(&found, b"by the first name");
    assert_eq!(fs::metadata(&one).unwrap().ino(), fs::metadata(&two).unwrap().ino());
    drop((first, second));
    mount.umount();
    assert_sound(&image);
}

#[test]
fn a_listing_of_a_thousand_images_opens_none_for_writing() {
    const IMAGES: usize = 1000;
    let lab = Lab::new();
    let one = fs::read(lab.create("0.qcow2", "8M", "cluster_size=4k")).unwrap();
    for number in 1..IMAGES {
        fs::write(lab.image(&format!("{number}.qcow2")), &one).unwrap();
    }
    let stamp = |number: usize| {
        let found = fs::metadata(lab.image(&format!("{number}.qcow2"))).unwrap();
        (found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec(), found.len())
    };
    let before: Vec<_> = (0..IMAGES).map(stamp).collect();
    let mount = lab.mount();
    let trace = lab.path("trace");
    let mut strace = Command::new("strace")
        .args(["-f", "-y", "-e", "trace=openat,pread64", "-o"])
        .args([trace.as_path(), Path::new("-p"), Path::new(&mount.pid().to_string())])
        .spawn()
        .expect("tests need strace");
    let traced = || fs::read_to_string(&trace).unwrap_or_default();
    // Images are opened by their descriptors.
    let written = || {
        let text = traced();
        let opened = text.lines().filter(|line| line.contains("\"/proc/self/fd/"));
        opened.filter(|line| line.contains("O_RDWR") || line.contains("O_WRONLY")).count()
    };
    let images_read = || {
        let text = traced();
        let files =
            text.lines().filter_map(|line| line.split_once("pread64(")?.1.split('>').next());
        let images = files.filter(|file| file.ends_with(".qcow2"));
        images.filter_map(|file| file.rsplit('/').next()).collect::<BTreeSet<_>>().len()
    };
    let is_traced = || {
        let status = fs::read_to_string(format!("/proc/{}/status", mount.pid())).unwrap();
        status.contains(&format!("TracerPid:\t{}\n", strace.id()))
    };
    eventually(Duration::from_secs(20), is_traced, || "strace does not attach".into());
    // Who wants the names gets no more; who looks at the second file will look at the others.
    assert_eq!(sh!("ls {}", mount.point().display()).lines().count(), IMAGES);
    assert!(fs::metadata(mount.path("0.raw")).is_ok() && images_read() < 2);
    assert!(fs::metadata(mount.path("1.raw")).is_ok());
    let soon = Duration::from_secs(60);
    eventually(soon, || images_read() == IMAGES, || format!("{} are read", images_read()));
    let listing = sh!("ls -l {}", mount.point().display());
    assert_eq!(listing.lines().filter(|line| line.contains(" 8388608 ")).count(), IMAGES);
    assert_eq!(written(), 0);
    // It would be seen.
    drop(open(&mount.path("0.raw")));
    eventually(Duration::from_secs(20), || written() > 0, || "strace sees nothing".into());
    signal(strace.id() as i32, libc::SIGINT);
    strace.wait().unwrap();
    mount.umount();
    assert!((1..IMAGES).all(|number| stamp(number) == before[number]), "an image has changed");
}
