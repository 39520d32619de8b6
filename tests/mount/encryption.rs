//! Encrypted images on real mounts: file systems on loop devices, where keys come from, and what is
//! left of them.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use super::lab::*;
use super::terminal::Terminal;

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

/// Kilobytes of a process that are kept out of the swap.
fn locked_memory(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmLck:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Best effort: what the processor and the kernel keep is not looked at. With the older method the
/// passphrase is the master key, too; with LUKS it is forgotten once the image is open.
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
        // The first round key is the key: so the search can find something.
        assert_eq!(has_in_memory(mount.pid(), key), format == "aes", "{format}, while it is open");
        assert!(
            locked_memory(mount.pid()) > 0,
            "{format}: what it is ciphered with can be swapped"
        );
        drop(file);
        mount.wait_until_closed(Duration::from_secs(20));
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
        assert_eq!(locked_memory(mount.pid()), 0, "{format}: memory for keys was not given back");
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

/// Makes the only key slot of a LUKS image ask for so many rounds that to try a key takes as long as it
/// may.
fn slow_down(image: &Path) {
    const ROUNDS_OF_FIRST_SLOT: usize = 212;
    let mut bytes = fs::read(image).unwrap();
    let luks = bytes.windows(6).position(|window| window == b"LUKS\xba\xbe").unwrap();
    let most = (1u32 << 27) - (1 << 22);
    bytes[luks + ROUNDS_OF_FIRST_SLOT..][..4].copy_from_slice(&most.to_be_bytes());
    fs::write(image, bytes).unwrap();
}

/// It takes half a minute or so, and it is opened more often than there are threads for slow requests.
#[test]
fn a_key_that_is_being_tried_keeps_no_other_image_waiting() {
    let lab = Lab::new();
    let slow = create(&lab, "slow.qcow2", "luks", "4M");
    slow_down(&slow);
    create(&lab, "other.qcow2", "luks", "4M");
    for name in ["plain.qcow2", "open.qcow2"] {
        lab.create(name, "4M", "");
    }
    for name in ["slow", "other"] {
        key_file(&lab.path(&format!("keys/{name}.key")), KEY);
    }
    let mount = lab.mount_with(&format!("--keys {}", lab.path("keys").display()));
    let (pid, slow) = (mount.pid(), mount.path("slow.raw"));
    let open = OpenOptions::new().write(true).open(mount.path("open.raw")).unwrap();
    let openers: Vec<_> = (0..12)
        .map(|_| {
            let slow = slow.clone();
            std::thread::spawn(move || File::open(slow).map(drop))
        })
        .collect();
    let is_tried = || {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        let names = threads.map(|thread| fs::read_to_string(thread.path().join("comm")));
        names.flatten().any(|name| name == "key\n")
    };
    eventually(std::time::Duration::from_secs(60), is_tried, || mount.log());
    assert_eq!(fs::metadata(&slow).unwrap().len(), 4 << 20);
    assert_eq!(fs::read_dir(mount.path(".snap/slow.raw")).unwrap().count(), 0);
    open.write_all_at(&[1; 4096], 0).unwrap();
    open.sync_all().unwrap();
    for name in ["plain.raw", "other.raw"] {
        File::open(mount.path(name)).unwrap();
    }
    let waiting = openers.iter().filter(|opener| !opener.is_finished()).count();
    assert_eq!(waiting, openers.len(), "all others waited for a key to be tried");
    // Nobody waits for the end of that.
    drop(open);
    signal(pid, libc::SIGKILL);
    for opener in openers {
        assert!(opener.join().unwrap().is_err());
    }
}

/// It would not notice, and what is written then would be lost for the right key.
#[test]
fn a_new_name_brings_no_other_key_to_an_image_that_would_not_notice() {
    let lab = Lab::new();
    let image = create(&lab, "disk.qcow2", "aes", "4M");
    create(&lab, "luks.qcow2", "luks", "4M");
    let keys = lab.path("keys");
    for (name, key) in
        [("disk", KEY), ("same", KEY), ("other", "quite another"), ("b/disk", "third")]
    {
        key_file(&keys.join(format!("{name}.key")), key);
    }
    let mount = lab.mount_with(&format!("--keys {}", keys.display()));
    let [disk, other, same, none] =
        ["disk.raw", "other.raw", "same.raw", "none.raw"].map(|name| mount.path(name));
    let refused = |done: std::io::Result<()>| done.unwrap_err().raw_os_error();
    let file = OpenOptions::new().read(true).write(true).open(&disk).unwrap();
    file.write_all_at(b"here", 5000).unwrap();
    assert_eq!(refused(fs::rename(&disk, &other)), Some(libc::EPERM), "while it is open");
    drop(file);
    mount.wait_until_closed(Duration::from_secs(10));
    assert_eq!(refused(fs::rename(&disk, &other)), Some(libc::EPERM));
    assert_eq!(refused(fs::hard_link(&disk, &other)), Some(libc::EPERM));
    assert!(mount.log().contains("would get another key"), "{}", mount.log());
    // The same key, none, and encryption that notices.
    fs::rename(&disk, &same).unwrap();
    fs::rename(&same, &none).unwrap();
    assert_eq!(refusal(&none), Some(libc::ENOKEY));
    assert_eq!(refused(fs::rename(&none, &other)), Some(libc::EPERM), "from no key to another");
    key_file(&keys.join("none.key"), KEY);
    fs::rename(mount.path("luks.raw"), &other).unwrap();
    let exchange = rustix::fs::RenameFlags::EXCHANGE;
    let cwd = rustix::fs::CWD;
    let exchanged = rustix::fs::renameat_with(cwd, &none, cwd, &other, exchange);
    assert_eq!(exchanged, Err(rustix::io::Errno::PERM));
    // Directories take all that is in them along.
    fs::create_dir(mount.path("a")).unwrap();
    key_file(&keys.join("a/disk.key"), KEY);
    fs::rename(&none, mount.path("a/disk.raw")).unwrap();
    assert_eq!(refused(fs::rename(mount.path("a"), mount.path("b"))), Some(libc::EPERM));
    fs::rename(mount.path("a"), mount.path("c")).unwrap();
    key_file(&keys.join("c/disk.key"), KEY);
    let mut bytes = [0; 4];
    File::open(mount.path("c/disk.raw")).unwrap().read_exact_at(&mut bytes, 5000).unwrap();
    assert_eq!(&bytes, b"here");
    mount.umount();
    fs::rename(lab.image("c/disk.qcow2"), &image).unwrap();
    assert_eq!(&judged(&image)[5000..5004], b"here");
}

/// What key files may look like, and be like.
#[test]
fn a_key_file_that_is_not_one_is_refused_with_the_reason() {
    let lab = Lab::new();
    let luks = create(&lab, "luks.qcow2", "luks", "4M");
    let aes = create(&lab, "aes.qcow2", "aes", "4M");
    let key = lab.path("key");
    let complaint = |image: &Path| {
        let name = image.file_stem().unwrap().to_str().unwrap();
        let outcome =
            attempt!("$qcow2fs info --key-file {name}={} {}", key.display(), image.display());
        assert_eq!(outcome.err.lines().count(), 1, "{}", outcome.text());
        outcome.err
    };
    for image in [&luks, &aes] {
        assert!(complaint(image).contains("No such file"), "{}", complaint(image));
        key_file(&key, "");
        assert!(complaint(image).contains("the file is empty"), "{}", complaint(image));
        fs::remove_file(&key).unwrap();
        fs::create_dir(&key).unwrap();
        assert!(complaint(image).contains("not a regular file"), "{}", complaint(image));
        fs::remove_dir(&key).unwrap();
    }
    key_file(&key, "another");
    assert!(complaint(&luks).contains("none of its key slots"), "{}", complaint(&luks));
    key_file(&key, &format!("{KEY}\n"));
    assert!(complaint(&aes).contains("ends with a new line"), "{}", complaint(&aes));
    let right = sh!("$qcow2fs info --key-file luks={} {}", key.display(), luks.display());
    assert!(right.contains("the key is right"), "{right}");
    let right = sh!("$qcow2fs check --key-file luks={} {}", key.display(), luks.display());
    assert!(right.contains("the key is right"), "{right}");
}

/// An image whose name no other test's has, since attachments are told apart in one place.
fn unique(lab: &Lab) -> String {
    lab.path("").file_name().unwrap().to_str().unwrap().replace('.', "-")
}

/// Asks only where a key is needed, or to be tried; shows nothing of what is typed.
#[test]
fn keys_are_asked_for_at_a_terminal() {
    let lab = Lab::new();
    let name = unique(&lab);
    let image = create(&lab, &format!("{name}.qcow2"), "luks", "16M");
    let path = image.to_str().unwrap();
    let question = format!("Key for {name}.qcow2: ");
    let asked = |arguments: &[&str], key: &str| {
        let mut terminal = Terminal::run(arguments);
        terminal.answer(&question, key);
        let (status, shown) = terminal.end();
        assert!(!shown.contains(key), "{arguments:?} shows the key: {shown}");
        (status.code(), shown)
    };
    for command in ["check", "info", "map"] {
        let (status, shown) = Terminal::run(&[command, path]).end();
        assert!(status.success() && !shown.contains("Key for"), "{command}: {shown}");
    }
    for command in ["check", "info"] {
        let (code, shown) = asked(&[command, "--try-key", path], KEY);
        assert!(code == Some(0) && shown.contains("the key is right"), "{command}: {shown}");
        let (code, shown) = asked(&[command, "--try-key", path], "wrong");
        assert!(code == Some(1) && shown.contains("none of its key slots"), "{command}: {shown}");
    }
    assert_eq!(asked(&["compact", path], KEY).0, Some(0));
    assert_eq!(asked(&["resize", path, "+1M"], KEY).0, Some(0));
    let (code, shown) = asked(&["attach", path], "wrong");
    assert!(code == Some(1) && shown.contains("none of its key slots"), "{shown}");
    let (code, shown) = asked(&["attach", path], KEY);
    let detached = attempt!("$qcow2fs detach {path}");
    assert!(code == Some(0) && shown.contains("/dev/loop") && detached.ok(), "{shown}");
    let refused = attempt!("$qcow2fs attach {path}");
    let line = refused.err.trim();
    assert!(refused.code == Some(1) && line.contains("there is no key"), "{}", refused.text());
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(attempt!("$qcow2fs detach {path}").code != Some(0), "an attachment was left");
}

/// The one that is typed is for the backing file.
#[test]
fn the_key_of_a_backing_file_is_asked_for_too() {
    let lab = Lab::new();
    let name = unique(&lab);
    let base = create(&lab, "base.qcow2", "luks", "16M");
    let top = lab.image(&format!("{name}.qcow2"));
    sh!(
        "qemu-io --object secret,id=key,data='{KEY}' -c 'write -P 7 0 1M' \
         --image-opts driver=qcow2,encrypt.key-secret=key,file.filename={}
         qemu-img create -q -u -f qcow2 -b base.qcow2 -F qcow2 {} 16M",
        base.display(),
        top.display()
    );
    let mut terminal = Terminal::run(&["attach", top.to_str().unwrap()]);
    terminal.answer("Key for base.qcow2: ", KEY);
    let (status, shown) = terminal.end();
    let device =
        shown.lines().find_map(|line| line.trim().strip_prefix("/dev/loop")).map(str::to_owned);
    let first = device.map(|number| sh!("head -c 1M /dev/loop{number} | tr -d '\\007' | wc -c"));
    attempt!("$qcow2fs detach {}", top.display());
    assert!(status.success(), "{shown}");
    assert_eq!(first.as_deref().map(str::trim), Some("0"), "{shown}");
}
