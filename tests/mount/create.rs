//! `qcow2fs create`, judged by QEMU.

use std::fs;

use serde_json::Value;

use crate::lab::{Lab, allocated, assert_same, assert_sound, guest_bytes, pattern};

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
    let image = lab.image("stopped.qcow2");
    let stopped = attempt!(
        "$qcow2fs create --preallocation full {0} 300G & \
         for i in $(seq 600); do [ -e {0} ] && break; sleep 0.05; done; \
         kill -INT $!; wait $!",
        image.display()
    );
    assert_eq!(stopped.code, Some(130), "{stopped:?}");
    assert!(!image.exists(), "half an image is left");
}

#[test]
fn a_file_that_took_the_place_of_half_an_image_stays() {
    let lab = Lab::new();
    let (image, other) = (lab.image("stopped.qcow2"), lab.image("other.qcow2"));
    fs::write(&other, "other").unwrap();
    // Once the file grows, the image is open and being filled.
    let stopped = attempt!(
        "$qcow2fs create --preallocation full {0} 300G & \
         for i in $(seq 600); do [ \"$(stat -c %s {0} 2>/dev/null || echo 0)\" -gt 9000000 ] && break; sleep 0.05; done; \
         mv {1} {0}; kill -INT $!; wait $!",
        image.display(),
        other.display()
    );
    assert_eq!(stopped.code, Some(1), "{stopped:?}");
    assert!(stopped.err.contains("another file is called"), "{stopped:?}");
    assert_eq!(fs::read(&image).unwrap(), b"other");
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
