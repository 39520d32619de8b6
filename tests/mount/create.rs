//! `qcow2fs create`, judged by QEMU.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use serde_json::Value;

use crate::lab::{
    Lab, PROGRAM, allocated, assert_same, assert_sound, eventually, guest_bytes, pattern, signal,
};

fn info(image: &std::path::Path) -> Value {
    serde_json::from_str(&sh!("qemu-img info --output=json {}", image.display())).unwrap()
}

#[test]
fn images_are_what_was_asked_for() {
    let lab = Lab::new();
    let image = lab.image("disk.qcow2");
    sh!(
        "$qcow2fs create --cluster-size 128K --extended-l2 --compression-type zstd --refcount-bits 32 {} 1000001",
        image.display()
    );
    let found = info(&image);
    let data = &found["format-specific"]["data"];
    assert_eq!(found["virtual-size"], 1000448, "whole sectors");
    assert_eq!(found["cluster-size"], 131072);
    assert_eq!((&data["extended-l2"], &data["refcount-bits"]), (&true.into(), &32.into()));
    assert_eq!(data["compression-type"], "zstd");
    assert_sound(&image);
    let taken = attempt!("$qcow2fs create {} 1G", image.display());
    assert_eq!((taken.code, taken.err.lines().count()), (Some(1), 1), "{taken:?}");
    assert!(taken.err.contains("--force") && info(&image)["virtual-size"] == 1000448, "{taken:?}");
    sh!("$qcow2fs create --force {} 1G", image.display());
    assert_eq!(info(&image)["virtual-size"], 1 << 30);
}

#[test]
fn an_image_does_not_replace_what_it_is_based_on() {
    let lab = Lab::new();
    let images = lab.images();
    let images = images.display();
    sh!("cd {images}; $qcow2fs create a.qcow2 1M; ln a.qcow2 same.qcow2; \
         $qcow2fs create -b same.qcow2 -F qcow2 b.qcow2; qemu-io -c 'write -P 7 0 1M' a.qcow2");
    for base in ["a.qcow2", "same.qcow2", "b.qcow2"] {
        let refused =
            attempt!("cd {images}; $qcow2fs create --force -b {base} -F qcow2 a.qcow2 1M");
        assert_eq!((refused.code, refused.err.lines().count()), (Some(1), 1), "{refused:?}");
        assert!(refused.err.contains("would be replaced"), "{refused:?}");
        assert!(guest_bytes(&lab.image("a.qcow2")).iter().all(|byte| *byte == 7));
    }
    sh!("cd {images}; $qcow2fs create --force -b a.qcow2 -F qcow2 b.qcow2");
}

#[test]
fn an_overlay_is_as_large_as_its_backing_file_and_shows_it() {
    let lab = Lab::new();
    lab.subdirectory("images/bases");
    let disk = pattern(5, 3 << 20);
    fs::write(lab.image("bases/base.raw"), &disk).unwrap();
    sh!("cd {}; qemu-img convert -O qcow2 base.raw base.qcow2", lab.image("bases").display());
    for format in ["raw", "qcow2"] {
        let image = lab.image(&format!("over-{format}.qcow2"));
        sh!("$qcow2fs create -b bases/base.{format} -F {format} {}", image.display());
        assert_eq!(info(&image)["backing-filename-format"], format);
        assert_same(&guest_bytes(&image), &disk, format);
        assert_sound(&image);
    }
    let refused =
        attempt!("$qcow2fs create -b bases/base.qcow2 {}", lab.image("x.qcow2").display());
    assert_eq!(refused.code, Some(2), "the format has to be said: {refused:?}");
    let missing = attempt!("$qcow2fs create -b no -F raw {}", lab.image("x.qcow2").display());
    assert!(missing.code == Some(1) && missing.err.contains("/no: "), "{missing:?}");
    assert!(!lab.image("x.qcow2").exists());
}

#[test]
fn preallocation_takes_what_it_says() {
    let lab = Lab::new();
    let clusters = |image: &std::path::Path| {
        let map = sh!("$qcow2fs map --json {}", image.display());
        let map: Value = serde_json::from_str(&map).unwrap();
        map["allocated"].as_u64().unwrap()
    };
    for (mode, options) in [
        ("off", ""),
        ("metadata", ""),
        ("metadata", "--extended-l2"),
        ("falloc", ""),
        ("full", "--cluster-size 4K"),
    ] {
        let image = lab.image("disk.qcow2");
        sh!("$qcow2fs create --force --preallocation {mode} {options} {} 100M", image.display());
        let (space, mapped) = (allocated(&image), clusters(&image));
        match mode {
            "off" => assert!(mapped == 0 && space < 1 << 20, "{mode}: {mapped}, {space}"),
            "metadata" => assert!(mapped == 1600 && space < 8 << 20, "{mode}: {mapped}, {space}"),
            _ => assert!(mapped >= 1600 && space >= 100 << 20, "{mode}: {mapped}, {space}"),
        }
        let disk = guest_bytes(&image);
        assert!(disk.len() == 100 << 20 && disk.iter().all(|byte| *byte == 0), "{mode}");
        assert_sound(&image);
    }
}

/// A process that makes `image` with `arguments`, as soon as it is filling it.
fn filling(image: &Path, arguments: &str) -> Child {
    let mut child = Command::new(PROGRAM)
        .args(["create", "--preallocation", "full"])
        .args(arguments.split_whitespace())
        .arg(image)
        .arg("300G")
        .spawn()
        .unwrap();
    let descriptors = format!("/proc/{}/fd", child.id());
    let device = image.parent().unwrap().metadata().unwrap().dev();
    let is_growing =
        |file: Metadata| file.is_file() && file.dev() == device && file.len() > 9 << 20;
    let begun = || {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        let open = fs::read_dir(&descriptors).unwrap().flatten();
        open.filter_map(|link| fs::metadata(link.path()).ok()).any(is_growing)
    };
    eventually(Duration::from_secs(60), begun, || "nothing is filled".into());
    child
}

#[test]
fn an_image_that_is_not_filled_to_its_end_never_has_a_name() {
    let lab = Lab::new();
    let image = lab.image("stopped.qcow2");
    let other = lab.create("other.qcow2", "1M", "");
    let before = fs::read(&other).unwrap();
    for kind in [libc::SIGINT, libc::SIGTERM, libc::SIGKILL] {
        for (image, arguments) in [(&image, ""), (&other, "--force")] {
            let mut child = filling(image, arguments);
            assert!(!lab.image("stopped.qcow2").exists(), "half an image has a name");
            signal(child.id() as i32, kind);
            let ended = child.wait().unwrap();
            let by_itself = (kind != libc::SIGKILL).then_some(128 + kind);
            assert_eq!(ended.code(), by_itself, "{ended:?}");
            assert_eq!(fs::read_dir(lab.images()).unwrap().count(), 1, "something is left");
            assert_same(&fs::read(&other).unwrap(), &before, "what was to be replaced");
        }
    }
}

#[test]
fn data_files_are_what_qemu_would_make() {
    let lab = Lab::new();
    lab.subdirectory("images/data");
    let (image, data) = (lab.image("disk.qcow2"), lab.image("data/disk.data"));
    let create = |options: &str| {
        sh!("$qcow2fs create --data-file data/disk.data {options} {} 1.5M", image.display());
    };
    for (options, is_raw, is_mapped) in [
        ("", false, false),
        ("--data-file-raw", true, true),
        ("--preallocation falloc", false, true),
        ("--data-file-raw --preallocation full", true, true),
    ] {
        create(options);
        let found = info(&image);
        assert_eq!(found["virtual-size"], 3 << 19, "{options}");
        let found = &found["format-specific"]["data"];
        assert_eq!(found["data-file"], "data/disk.data", "{options}");
        assert_eq!(found["data-file-raw"], is_raw, "{options}");
        // QEMU takes the name for one in its own working directory.
        let map = sh!("cd {}; qemu-img map --output=json disk.qcow2", lab.images().display());
        let map: Value = serde_json::from_str(&map).unwrap();
        let piece = &map.as_array().unwrap()[0];
        assert_eq!((&piece["data"], &piece["length"]), (&is_mapped.into(), &(3 << 19).into()));
        assert_eq!(fs::metadata(&data).unwrap().len(), 3 << 19, "{options}");
        let has_space = options.contains("preallocation");
        assert_eq!(allocated(&data) >= 3 << 19, has_space, "{options}: {}", allocated(&data));
        sh!("$qcow2fs check {}", image.display());
        fs::remove_file(&image).unwrap();
        let taken = attempt!("$qcow2fs create --data-file data/disk.data {} 1M", image.display());
        assert!(taken.code == Some(1) && taken.err.contains("data/disk.data"), "{taken:?}");
        fs::remove_file(&data).unwrap();
        assert!(!image.exists());
    }
}

#[test]
fn of_an_interrupted_create_neither_image_nor_data_file_is_left() {
    let lab = Lab::new();
    let (image, data) = (lab.image("disk.qcow2"), lab.path("elsewhere.data"));
    let stopped = attempt!(
        "$qcow2fs create --data-file {data} --preallocation full {image} 300G & \
         for i in $(seq 600); do [ -s {data} ] && [ $(stat -c %b {data}) -gt 9000 ] && break; sleep 0.05; done; \
         kill -INT $!; wait $!",
        data = data.display(),
        image = image.display()
    );
    assert_eq!(stopped.code, Some(130), "{stopped:?}");
    assert!(!image.exists() && !data.exists(), "something is left");
}
