//! `qcow2fs resize`, of images that are closed and of those that a mount has open.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::lab::{Lab, Mount, allocated, assert_same, assert_sound, guest_bytes, pattern};

fn virtual_size(image: &Path) -> u64 {
    let info = sh!("qemu-img info -U --output=json {}", image.display());
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    info["virtual-size"].as_u64().unwrap()
}

#[test]
fn a_disk_gets_larger_and_smaller_closed_or_open() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "4M", "cluster_size=4k");
    let data = pattern(1, 4 << 20);
    let raw = lab.path("data");
    fs::write(&raw, &data).unwrap();
    sh!("qemu-img convert -n -f raw -O qcow2 {} {}", raw.display(), image.display());
    for open in [false, true] {
        let mount = open.then(|| lab.mount());
        let file = mount
            .as_ref()
            .map(|mount| File::options().read(true).write(true).open(mount.path("disk.raw")));
        let resize = |args: &str| attempt!("$qcow2fs resize {} {args}", image.display());
        let line = resize("+1000");
        assert!(line.ok() && line.out.contains("4.0 MiB -> "), "{line:?}");
        assert_eq!(virtual_size(&image), (4 << 20) + 1024, "whole sectors");
        let refused = resize("2M");
        assert_eq!((refused.code, refused.err.lines().count()), (Some(1), 1), "{refused:?}");
        assert!(refused.err.contains("--shrink"), "{refused:?}");
        assert!(!resize("-1T").ok() && !resize("--shrink -- -1T").ok());
        assert_eq!(virtual_size(&image), (4 << 20) + 1024, "refused");
        assert!(resize("--shrink 2M").ok());
        assert_eq!(virtual_size(&image), 2 << 20);
        assert!(resize("4M").ok());
        if let Some(file) = file {
            let mut bytes = vec![1; 4 << 20];
            file.unwrap().read_exact_at(&mut bytes, 0).unwrap();
            assert_same(&bytes[..2 << 20], &data[..2 << 20], "what stayed");
            assert!(bytes[2 << 20..].iter().all(|byte| *byte == 0), "what was cut came back");
        }
        mount.into_iter().for_each(|mount| mount.umount());
        assert_sound(&image);
        let disk = guest_bytes(&image);
        assert_same(&disk[..2 << 20], &data[..2 << 20], "what stayed");
        assert!(disk[2 << 20..].iter().all(|byte| *byte == 0), "what was cut came back");
    }
    let too_much = attempt!("$qcow2fs resize {} 1000000T", image.display());
    assert_eq!(too_much.code, Some(1), "{too_much:?}");
    assert!(too_much.err.contains("disk.qcow2"), "{too_much:?}");
}

#[test]
fn an_overlay_of_version_2_gets_smaller_without_taking_space() {
    let lab = Lab::new();
    let data = pattern(2, 32 << 20);
    fs::write(lab.image("base.raw"), &data).unwrap();
    let image = lab.image("disk.qcow2");
    let make = || {
        sh!(
            "cd {}; qemu-img create -q -f qcow2 -o compat=0.10 -b base.raw -F raw disk.qcow2; \
             qemu-io -f qcow2 -c 'write -P 7 16M 128k' disk.qcow2",
            lab.images().display()
        )
    };
    let resize = |args: &str| sh!("$qcow2fs resize {} {args}", image.display());
    make();
    resize("--shrink 1000K");
    assert!(allocated(&image) < 2 << 20, "{} bytes for what was cut", allocated(&image));
    // QEMU refuses: in version 2 it has no zeros for what the backing file would show.
    resize("32M");
    let disk = guest_bytes(&image);
    assert_same(&disk[..1000 << 10], &data[..1000 << 10], "what stayed");
    assert!(disk[1000 << 10..].iter().all(|byte| *byte == 0), "what was cut came back");
    assert_sound(&image);
    make();
    let mount = lab.mount();
    let file = File::options().read(true).write(true).open(mount.path("disk.raw")).unwrap();
    // Once it is larger than its backing file, nothing is mapped past its end.
    for size in [48 << 20, 1 << 20, 32 << 20] {
        file.set_len(size).unwrap();
    }
    let mut bytes = vec![1; 32 << 20];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[1 << 20..].iter().all(|byte| *byte == 0), "what was cut came back");
    drop(file);
    mount.umount();
    assert_sound(&image);
}

#[test]
fn nothing_is_done_through_a_mount_of_somebody_else_that_nobody_has_named() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "4M", "");
    let (images, point, log) = (lab.images(), lab.point(), lab.path("log"));
    // To the kernel it is who is nobody that mounts, as through `fusermount3`.
    sh!(
        "setpriv --ruid=65534 $qcow2fs mount -o allow_other --log-file {} {} {}",
        log.display(),
        images.display(),
        point.display()
    );
    let mount = Mount::adopt(point, log);
    assert!(sh!("grep -F {} /proc/self/mountinfo", images.display()).contains("user_id=65534"));
    let raw = mount.path("disk.raw");
    let file = File::options().read(true).write(true).open(&raw).unwrap();
    file.write_all_at(b"written", 0).unwrap();
    for command in
        ["resize {} 8M", "compact {}", "snapshot create {} one", "snapshot delete {} one"]
    {
        let command = command.replace("{}", &image.display().to_string());
        let refused = attempt!("$qcow2fs {command}");
        assert_eq!((refused.code, refused.err.lines().count()), (Some(1), 1), "{refused:?}");
        assert!(refused.err.contains("in use"), "{refused:?}");
    }
    let refused = attempt!("$qcow2fs attach {}", raw.display());
    let why = "is neither a qcow2 image nor a file of a qcow2fs mount";
    assert!(refused.code == Some(1) && refused.err.contains(why), "{refused:?}");
    for command in ["info", "map"] {
        let told = sh!("$qcow2fs {command} {}", image.display());
        assert!(!told.contains("mount"), "{told}");
    }
    assert_eq!(file.metadata().unwrap().len(), 4 << 20);
    assert!(sh!("$qcow2fs status {}", mount.point().display()).contains("disk.raw"), "named");
    drop(file);
    mount.umount();
    assert_sound(&image);
}
