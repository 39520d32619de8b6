//! Encrypted images on real mounts: file systems on loop devices, where keys come from, and what is
//! left of them.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use super::lab::*;

/// The passphrase, long enough to be found nowhere by chance.
const KEY: &str = "a passphrase that stands nowhere else 7f3d9c";

/// As QEMU makes it. The older method is made at once.
fn create(lab: &Lab, name: &str, format: &str, size: &str) -> std::path::PathBuf {
    let image = lab.image(name);
    fs::create_dir_all(image.parent().unwrap()).unwrap();
    let iterations = if format == "luks" { ",encrypt.iter-time=10" } else { "" };
    sh!(
        "qemu-img create -q -f qcow2 --object secret,id=key,data='{KEY}' \
         -o encrypt.format={format},encrypt.key-secret=key{iterations} {} {size}",
        image.display()
    );
    image
}

fn key_file(path: &Path, key: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, key).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// The disk as QEMU reads it, which finds the image sound.
fn judged(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("judge");
    sh!(
        "key='secret,id=key,data={KEY}'
         image=driver=qcow2,encrypt.key-secret=key,file.filename={image}
         qemu-img check --object \"$key\" --image-opts $image
         qemu-img convert --object \"$key\" --image-opts -O raw $image {raw}",
        image = image.display(),
        raw = raw.display()
    );
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(&raw).unwrap();
    sh!("$qcow2fs check {}", image.display());
    bytes
}

fn refusal(path: &Path) -> Option<i32> {
    File::open(path).map(drop).expect_err("opened").raw_os_error()
}

#[test]
fn a_file_system_lives_on_an_encrypted_image() {
    for format in ["luks", "aes"] {
        let lab = Lab::new();
        let image = create(&lab, "disk.qcow2", format, "256M");
        key_file(&lab.path("keys/disk.key"), KEY);
        let mount = lab.mount_with(&format!("--keys {}", lab.path("keys").display()));
        let place = lab.subdirectory("place");
        sh!(
            "loop=$(losetup -f --show --direct-io=on {raw})
             trap 'umount {place} || true; losetup -d $loop' EXIT
             mkfs.ext4 -q $loop
             mount $loop {place}
             head -c 40M /dev/urandom > {place}/gone
             head -c 20M /dev/urandom > {place}/kept
             sync -f {place}
             rm {place}/gone
             sync -f {place}
             fstrim {place}
             sha256sum < {place}/kept > {sum}
             umount {place}
             mount $loop {place}
             sha256sum < {place}/kept | cmp - {sum}
             umount {place}
             fsck.ext4 -fn $loop",
            raw = mount.path("disk.raw").display(),
            place = place.display(),
            sum = lab.path("sum").display()
        );
        let expected = fs::read(mount.path("disk.raw")).unwrap();
        mount.umount();
        assert_same(&judged(&image), &expected, format);
        assert!(allocated(&image) < 60 << 20, "{} bytes are left", allocated(&image));
    }
}

/// Files of single images, a directory, systemd's credentials; and none, or a wrong one.
#[test]
fn keys_come_from_files_and_never_show() {
    let lab = Lab::new();
    let luks = create(&lab, "a/luks.qcow2", "luks", "4M");
    for name in ["file", "a/dir", "a/cred", "none", "line", "wrong"] {
        if ["line", "wrong"].contains(&name) {
            fs::copy(&luks, lab.image(&format!("{name}.qcow2"))).unwrap();
        } else {
            create(&lab, &format!("{name}.qcow2"), "aes", "4M");
        }
    }
    let keys = lab.path("keys");
    key_file(&lab.path("single"), KEY);
    key_file(&keys.join("a/dir.key"), KEY);
    key_file(&keys.join("a/luks.key"), KEY);
    key_file(&keys.join("line.key"), &format!("{KEY}\n"));
    key_file(&keys.join("wrong.key"), "quite another one");
    key_file(&lab.path("credentials/a-cred.key"), KEY);
    let log = lab.path("log");
    sh!(
        "CREDENTIALS_DIRECTORY={} $qcow2fs mount -vv --log-file {} --keys {} \
         --key-file file={} {} {}",
        lab.path("credentials").display(),
        log.display(),
        keys.display(),
        lab.path("single").display(),
        lab.images().display(),
        lab.point().display()
    );
    let mount = Mount::adopt(lab.point(), log);
    for name in ["file", "a/dir", "a/cred", "a/luks", "line"] {
        let path = mount.path(&format!("{name}.raw"));
        let file = OpenOptions::new().write(true).read(true).open(&path);
        file.unwrap_or_else(|e| panic!("{name}: {e}")).write_all_at(b"here", 5000).unwrap();
    }
    assert_eq!(refusal(&mount.path("none.raw")), Some(libc::ENOKEY));
    assert_eq!(refusal(&mount.path("wrong.raw")), Some(libc::EKEYREJECTED));
    let log = mount.log();
    assert!(log.contains("none.qcow2: it is encrypted (AES) and there is no key"), "{log}");
    assert!(log.contains("the key opens none of its key slots"), "{log}");
    assert!(!log.contains("passphrase that stands"), "the key is in the log: {log}");
    // It is put right while the mount goes on.
    key_file(&keys.join("wrong.key"), KEY);
    File::open(mount.path("wrong.raw")).unwrap();
    mount.umount();
    for name in ["file", "a/dir", "a/cred", "a/luks", "line"] {
        assert_eq!(&judged(&lab.image(&format!("{name}.qcow2")))[5000..5004], b"here", "{name}");
    }
}

/// Chains are opened with a key for each file that needs one.
#[test]
fn an_encrypted_backing_file_has_a_key_of_its_own() {
    let lab = Lab::new();
    let base = create(&lab, "base.qcow2", "aes", "4M");
    sh!(
        "qemu-img create -q -u -f qcow2 -b base.qcow2 -F qcow2 {} 4M
         qemu-io --object secret,id=key,data='{KEY}' -c 'write -P 7 1M 1M' \
         --image-opts driver=qcow2,encrypt.key-secret=key,file.filename={}",
        lab.image("top.qcow2").display(),
        base.display()
    );
    let mount = lab.mount();
    assert_eq!(refusal(&mount.path("top.raw")), Some(libc::ENOKEY));
    assert!(mount.log().contains("--key-file base=FILE"), "{}", mount.log());
    mount.umount();
    key_file(&lab.path("keys/base.key"), KEY);
    let mount = lab.mount_with(&format!("--keys {}", lab.path("keys").display()));
    let mut expected = vec![0; 4 << 20];
    expected[1 << 20..2 << 20].fill(7);
    let file = OpenOptions::new().read(true).write(true).open(mount.path("top.raw")).unwrap();
    file.write_all_at(&[9; 1000], 1_500_000).unwrap();
    expected[1_500_000..1_501_000].fill(9);
    drop(file);
    assert_same(&fs::read(mount.path("top.raw")).unwrap(), &expected, "the chain");
    mount.umount();
}

#[test]
fn images_that_nobody_has_open_are_checked_without_a_key_and_compacted_with_one() {
    let lab = Lab::new();
    let image = create(&lab, "disk.qcow2", "luks", "16M");
    key_file(&lab.path("keys/disk.key"), KEY);
    let keys = format!("--keys {}", lab.path("keys").display());
    let mount = lab.mount_with(&format!("{keys} --compact-after off"));
    let file = OpenOptions::new().write(true).open(mount.path("disk.raw")).unwrap();
    file.write_all_at(&pattern(3, 8 << 20), 0).unwrap();
    drop(file);
    sh!("fallocate -p -o 0 -l 6M {}", mount.path("disk.raw").display());
    mount.umount();
    let before = length(&image);
    sh!("$qcow2fs check {}; $qcow2fs snapshot create {0} then", image.display());
    let refused = attempt!("$qcow2fs compact {}", image.display());
    assert!(!refused.ok() && refused.err.contains("--key-file disk=FILE"), "{}", refused.text());
    sh!("$qcow2fs snapshot delete {} then", image.display());
    sh!("$qcow2fs compact {keys} {}", image.display());
    assert!(length(&image) < before, "{} bytes", length(&image));
    let mut expected = vec![0; 16 << 20];
    expected[6 << 20..8 << 20].copy_from_slice(&pattern(3, 8 << 20)[6 << 20..]);
    assert_same(&judged(&image), &expected, "after compacting");
}

/// Whether a process has `needle` in memory that can be read.
fn has_in_memory(pid: i32, needle: &[u8]) -> bool {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    maps.lines().filter(|line| line.contains(" rw")).any(|line| {
        let (start, rest) = line.split_once('-').unwrap();
        let end = rest.split(' ').next().unwrap();
        let offset = |text| u64::from_str_radix(text, 16).unwrap();
        let (start, end) = (offset(start), offset(end));
        let mut bytes = Vec::new();
        let readable = memory.seek(SeekFrom::Start(start)).is_ok();
        // Some mappings cannot be read.
        let _whole = readable && (&memory).take(end - start).read_to_end(&mut bytes).is_ok();
        bytes.windows(needle.len()).any(|window| window == needle)
    })
}

/// Best effort: what the processor and the kernel keep is not looked at. With the older method the
/// passphrase is the master key, too.
#[test]
fn no_key_is_found_in_memory_after_the_image_is_closed() {
    for format in ["luks", "aes"] {
        let lab = Lab::new();
        create(&lab, "disk.qcow2", format, "4M");
        lab.create("other.qcow2", "4M", "");
        key_file(&lab.path("keys/disk.key"), KEY);
        let mount = lab.mount_with(&format!("--keys {}", lab.path("keys").display()));
        let file = OpenOptions::new().read(true).write(true).open(mount.path("disk.raw")).unwrap();
        file.write_all_at(&[1; 70_000], 1000).unwrap();
        file.sync_all().unwrap();
        let key = &KEY.as_bytes()[..16];
        if format == "aes" {
            // The first round key is the key: so the search can find something.
            assert!(has_in_memory(mount.pid(), key), "while it is open");
        }
        drop(file);
        let is_closed = || mount.status()["images"].as_array().is_none_or(|open| open.is_empty());
        eventually(std::time::Duration::from_secs(20), is_closed, || mount.status().to_string());
        // What a cipher has left on the stack of a thread goes with that thread's next work.
        let is_gone = || {
            for _ in 0..32 {
                let other = OpenOptions::new().read(true).write(true).open(mount.path("other.raw"));
                let other = other.unwrap();
                other.write_all_at(&[1; 70_000], 1000).unwrap();
                other.sync_all().unwrap();
            }
            !has_in_memory(mount.pid(), key)
        };
        let limit = std::time::Duration::from_secs(60);
        eventually(limit, is_gone, || format!("{format}: the key is there after it was closed"));
        mount.umount();
    }
}

/// What is written to an overlay would be in plain text, also to one that was made when the image
/// was not encrypted.
#[test]
fn encrypted_images_get_no_overlays() {
    let lab = Lab::new();
    lab.create("disk.qcow2", "4M", "");
    key_file(&lab.path("keys/disk.key"), KEY);
    let overlays = lab.subdirectory("overlays");
    let arguments =
        format!("--overlay {} --keys {}", overlays.display(), lab.path("keys").display());
    let open = |mount: &crate::lab::Mount| {
        OpenOptions::new().read(true).write(true).open(mount.path("disk.raw"))
    };
    let mount = lab.mount_with(&arguments);
    open(&mount).unwrap().write_all_at(&[1; 4096], 0).unwrap();
    mount.umount();
    let plain = std::fs::read(overlays.join("disk.qcow2")).unwrap();
    std::fs::remove_file(lab.image("disk.qcow2")).unwrap();
    create(&lab, "disk.qcow2", "luks", "4M");
    for is_there in [true, false] {
        if !is_there {
            std::fs::remove_file(overlays.join("disk.qcow2")).unwrap();
        }
        let mount = lab.mount_with(&arguments);
        let refused = open(&mount).map(drop).expect_err("opened for writing");
        assert_eq!(refused.raw_os_error(), Some(libc::EOPNOTSUPP), "{refused}");
        if is_there {
            assert_eq!(std::fs::read(overlays.join("disk.qcow2")).unwrap(), plain);
        }
        mount.umount();
    }
}
