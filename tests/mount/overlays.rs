//! Overlays: what is written through the mount goes to them, and the images stay as they are.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::discards::read_all;
use crate::lab::{
    Lab, Mount, assert_same, assert_sound, eventually, guest_bytes, is_mounted, pattern, signal,
    wait_for_end, write_by_dd,
};

const SIZE: usize = 8 << 20;

/// A lab with an image in a sub-directory that holds data, its content as bytes of the file, and a
/// directory for overlays.
fn layered() -> (Lab, PathBuf, Vec<u8>) {
    let lab = Lab::new();
    lab.subdirectory("images/a");
    let image = lab.create("a/disk.qcow2", "8M", "");
    sh!("qemu-io -f qcow2 -c 'write -P 0x42 0 1M' {}", image.display());
    lab.subdirectory("overlays");
    let before = fs::read(&image).unwrap();
    (lab, image, before)
}

fn mount(lab: &Lab, more: &str) -> Mount {
    lab.mount_with(&format!("--overlay {} {more}", lab.path("overlays").display()))
}

/// How the daemon has the file open, as O_RDONLY and so on; empty when it has not.
fn access_modes(mount: &Mount, file: &Path) -> Vec<i32> {
    let directory = format!("/proc/{}/fd", mount.pid());
    let open = fs::read_dir(directory).unwrap().flatten();
    let ours = open.filter(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == file));
    let flags = |fd: fs::DirEntry| {
        let info = format!("/proc/{}/fdinfo/{}", mount.pid(), fd.file_name().to_str().unwrap());
        let info = fs::read_to_string(info).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
        (flags & libc::O_PATH == 0).then_some(flags & libc::O_ACCMODE)
    };
    ours.filter_map(flags).collect()
}

#[test]
fn what_is_written_goes_to_an_overlay_that_is_used_again() {
    let (lab, image, before) = layered();
    let overlay = lab.path("overlays/a/disk.qcow2");
    let first = mount(&lab, "");
    let raw = first.path("a/disk.raw");
    let reader = File::open(&raw).unwrap();
    let mut byte = [0];
    reader.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(access_modes(&first, &image), [libc::O_RDONLY]);
    assert!(!overlay.exists(), "made by reading");

    let data = pattern(5, 300_000);
    write_by_dd(&raw, &data);
    let mut seen = vec![0; data.len()];
    reader.read_exact_at(&mut seen, 0).unwrap();
    assert_same(&seen, &data, "through a file that was open before");
    assert!(access_modes(&first, &image).iter().all(|mode| *mode == libc::O_RDONLY));
    assert_eq!(first.status()["overlay"].as_str(), lab.path("overlays").to_str());
    drop(reader);
    first.umount();
    assert_same(&fs::read(&image).unwrap(), &before, "the image");
    assert_sound(&overlay);

    let second = mount(&lab, "");
    let all = read_all(&second.path("a/disk.raw"));
    assert_same(&all[..data.len()], &data, "through the next mount");
    assert!(all[data.len()..1 << 20].iter().all(|byte| *byte == 0x42), "what the image holds");
    sh!("truncate -s 9M {}", second.path("a/disk.raw").display());
    second.umount();
    let third = mount(&lab, "--read-only");
    assert_eq!(fs::metadata(third.path("a/disk.raw")).unwrap().len(), 9 << 20);
    third.umount();
    let judged = guest_bytes(&overlay);
    assert_same(&judged[..SIZE], &all, "as QEMU reads the overlay");
    assert_same(&fs::read(&image).unwrap(), &before, "the image");
}

#[test]
fn what_was_synced_before_a_crash_is_in_the_overlay() {
    let (lab, image, before) = layered();
    let mounted = mount(&lab, "");
    let file = OpenOptions::new().write(true).open(mounted.path("a/disk.raw")).unwrap();
    let data = pattern(6, 1 << 20);
    file.write_all_at(&data, 3 << 20).unwrap();
    file.sync_all().unwrap();
    signal(mounted.pid(), libc::SIGKILL);
    wait_for_end(mounted.pid());
    drop(file);
    sh!("$qcow2fs umount {}", lab.point().display());
    drop(mounted);
    let again = mount(&lab, "");
    let all = read_all(&again.path("a/disk.raw"));
    assert_same(&all[3 << 20..4 << 20], &data, "what was synced");
    again.umount();
    assert_same(&fs::read(&image).unwrap(), &before, "the image");
}

#[test]
fn nothing_is_left_of_ephemeral_overlays() {
    let (lab, image, before) = layered();
    let overlays = lab.path("overlays");
    for is_killed in [false, true] {
        let mounted = mount(&lab, "--ephemeral");
        let raw = mounted.path("a/disk.raw");
        write_by_dd(&raw, &pattern(7, 1 << 20));
        // Closed and opened again, it still is there.
        assert_same(&read_all(&raw)[..1 << 20], &pattern(7, 1 << 20), "what was written");
        if is_killed {
            signal(mounted.pid(), libc::SIGKILL);
            wait_for_end(mounted.pid());
            sh!("$qcow2fs umount {}", lab.point().display());
        } else {
            mounted.umount();
        }
        assert_eq!(fs::read_dir(&overlays).unwrap().count(), 0);
        assert_same(&fs::read(&image).unwrap(), &before, "the image");
    }
    let next = mount(&lab, "-o ephemeral");
    assert_eq!(read_all(&next.path("a/disk.raw"))[0], 0x42, "written by another mount");
    next.umount();
}

#[test]
fn attributes_change_on_the_overlay_and_names_do_not() {
    let (lab, image, before) = layered();
    let mounted = mount(&lab, "");
    let raw = mounted.path("a/disk.raw");
    let reader = File::open(&raw).unwrap();
    let metadata = fs::metadata(&image).unwrap();
    sh!("chmod 640 {0}; touch -d 2001-02-03 {0}", raw.display());
    assert_eq!(sh!("stat -c '%a %y' {} | cut -c 1-14", raw.display()), "640 2001-02-03\n");
    let untouched = fs::metadata(&image).unwrap();
    assert_eq!(untouched.modified().unwrap(), metadata.modified().unwrap());
    assert_eq!(untouched.permissions(), metadata.permissions());
    assert_eq!(sh!("stat -c %a {}/a", lab.path("overlays").display()), "700\n");
    drop(reader);
    for command in ["rm a/disk.raw", "mv a/disk.raw b.raw", "mkdir b", "rmdir a", "chmod 700 a"] {
        let refused = attempt!("cd {}; {command}", mounted.point().display());
        assert!(refused.err.contains("Read-only file system"), "{command}: {}", refused.text());
    }
    mounted.umount();
    assert_same(&fs::read(&image).unwrap(), &before, "the image");
}

#[test]
fn overlays_that_would_mix_things_up_are_refused_in_one_line() {
    let (lab, image, _) = layered();
    let (images, point) = (lab.images(), lab.point());
    let place = lab.path("overlays");
    let refusal = |arguments: &str| {
        let refused =
            attempt!("$qcow2fs mount {arguments} {} {}", images.display(), point.display());
        assert!(!refused.ok() && !is_mounted(&point), "{arguments}: {}", refused.text());
        assert_eq!(refused.err.lines().count(), 1, "{}", refused.err);
        refused.err
    };
    for inside in [images.clone(), image.parent().unwrap().to_owned(), lab.path("")] {
        let said = refusal(&format!("--overlay {}", inside.display()));
        assert!(said.contains("must lie apart"), "{said}");
    }
    assert!(refusal("--overlay /nonexistent").contains("there is no such directory"));
    assert!(refusal("--ephemeral").contains("--overlay"));

    let mounted = mount(&lab, "");
    let other = lab.subdirectory("other");
    let second = attempt!(
        "$qcow2fs mount --overlay {} {} {}",
        place.display(),
        images.display(),
        other.display()
    );
    assert!(second.err.contains("another mount has the overlay directory"), "{}", second.text());
    mounted.umount();

    // An overlay on something else is not taken for one on this image.
    fs::create_dir(place.join("a")).unwrap();
    let data = format!("-o data_file={}", place.join("data").display());
    for (options, expected) in [
        ("".to_owned(), "is not based on"),
        (format!("-b {} -F raw", image.display()), "is no overlay of ours"),
        (format!("-b {} -F qcow2 {data}", image.display()), "is no overlay of ours"),
    ] {
        sh!("qemu-img create -q -f qcow2 {options} {}/a/disk.qcow2 8M", place.display());
        let mounted = mount(&lab, "");
        for write in [false, true] {
            let opened =
                OpenOptions::new().read(true).write(write).open(mounted.path("a/disk.raw"));
            assert!(opened.is_err(), "{options}");
        }
        let said = || mounted.log().contains(expected);
        eventually(Duration::from_secs(10), said, || mounted.log());
        mounted.umount();
    }
}
