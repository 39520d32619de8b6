//! `qcow2fs info`: what qemu-img says of the same image, whoever uses that.

use std::fs::File;

use serde_json::Value;

use crate::lab::Lab;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn info_agrees_with_qemu_img_on_every_shape() {
    let lab = Lab::new();
    lab.create("base.qcow2", "3M", "");
    let shapes = [
        ("old.qcow2", "compat=0.10"),
        ("small.qcow2", "cluster_size=4k,refcount_bits=64,lazy_refcounts=on"),
        ("zstd.qcow2", "compression_type=zstd,extended_l2=on,cluster_size=128k"),
        ("top.qcow2", "backing_file=base.qcow2,backing_fmt=qcow2"),
        ("outside.qcow2", "data_file=outside.raw,data_file_raw=on"),
    ];
    for (name, options) in shapes {
        let image = lab.image(name);
        // A relative data file is one in the working directory, for QEMU.
        sh!("cd {}; qemu-img create -q -f qcow2 -o {options} {name} 5M", lab.images().display());
        if name == "small.qcow2" {
            sh!("qemu-img snapshot -c first {}", image.display());
        }
        let theirs =
            json(&sh!("cd {}; qemu-img info --output=json {name}", lab.images().display()));
        let ours = json(&sh!("$qcow2fs info --json {}", image.display()));
        for key in [
            "virtual-size",
            "cluster-size",
            "format",
            "dirty-flag",
            "actual-size",
            "backing-filename",
            "backing-filename-format",
        ] {
            // The blocks of the data file are another file's.
            if !(key == "actual-size" && name == "outside.qcow2") {
                assert_eq!(ours[key], theirs[key], "{name}: {key}");
            }
        }
        assert_eq!(ours["snapshots"][0]["name"], theirs["snapshots"][0]["name"], "{name}");
        let (ours, theirs) = (&ours["format-specific"], &theirs["format-specific"]);
        for (key, value) in theirs["data"].as_object().unwrap() {
            let found = &ours["data"][key];
            let same = found == value
                || key == "data-file" && found.as_str().unwrap().ends_with("outside.raw");
            assert!(same, "{name}: {key} is {found}, not {value}");
        }
    }
}

#[test]
fn info_says_who_uses_an_image_and_locks_nothing() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "1M", "");
    assert_eq!(json(&sh!("$qcow2fs info --json {}", image.display()))["in-use"], Value::Null);
    let mount = lab.mount();
    let file = File::options().write(true).open(mount.path("disk.raw")).unwrap();
    let info = json(&sh!("$qcow2fs info --json {}", image.display()));
    assert_eq!(info["in-use"], "written");
    assert_eq!(info["mounted-at"], mount.path("disk.raw").to_str().unwrap());
    let page = sh!("$qcow2fs info {}", image.display());
    assert!(page.contains("written by qcow2fs (pid"), "{page}");
    drop(file);
    mount.umount();
    let refused = attempt!("$qcow2fs info {0} {0}-missing", image.display());
    assert_eq!(refused.code, Some(1));
    assert!(refused.out.contains("1.0 MiB") && refused.err.contains("-missing"), "{refused:?}");
}
