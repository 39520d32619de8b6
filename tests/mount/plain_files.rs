//! Files are made, renamed, linked and removed through the mount as on any file system, and the
//! images follow.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink,
};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::discards::{open, read_all};
use crate::lab::{
    Lab, Mount, allocated, assert_same, assert_sound, eventually, guest_bytes, length, pattern,
    signal, wait_for_end, wait_until_free,
};

const MIB: usize = 1 << 20;

/// Who neither owns anything nor is root.
const NOBODY: &str = "setpriv --reuid=65534 --regid=65534 --clear-groups";

pub fn errno<T>(done: io::Result<T>) -> Option<i32> {
    done.err().and_then(|e| e.raw_os_error())
}

/// Makes a file and writes `data` to its start.
fn make(path: &Path, data: &[u8]) -> File {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
    file.write_all_at(data, 0).unwrap();
    file
}

/// The log says so by now.
fn assert_logged(mount: &Mount, why: &str) {
    let log = mount.log();
    assert!(log.lines().any(|line| line.contains(why)), "no '{why}' in:\n{log}");
}

/// What lies in `directory` on the host, hidden files too.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Renames with the flags of renameat2(2).
fn rename(from: &Path, to: &Path, flags: u32) -> io::Result<()> {
    let path = |path: &Path| std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let (from, to) = (path(from), path(to));
    let here = libc::AT_FDCWD;
    // SAFETY: both paths end in NUL.
    match unsafe { libc::renameat2(here, from.as_ptr(), here, to.as_ptr(), flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[test]
fn the_usual_tools_make_images() {
    let lab = Lab::new();
    let mount = lab.mount();
    let data = pattern(1, 3 * MIB);
    let source = lab.path("source");
    fs::write(&source, &data).unwrap();
    sh!(
        "cd {}
         truncate -s 10G truncated.raw
         cp {source} copied.raw
         dd if={source} of=written.raw bs=100k status=none
         cat {source} > redirected.raw
         touch touched.raw
         fallocate -l 4M allocated.raw
         install -m 600 {source} installed.raw",
        mount.point().display(),
        source = source.display()
    );
    assert_eq!(length(&mount.path("truncated.raw")), 10 << 30);
    assert_eq!(length(&mount.path("touched.raw")), 0);
    assert_eq!(length(&mount.path("allocated.raw")), 4 << 20);
    let written = ["copied", "written", "redirected", "installed"];
    for name in written {
        assert_same(&read_all(&mount.path(&format!("{name}.raw"))), &data, name);
    }
    let mode = fs::metadata(lab.image("installed.qcow2")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o600);
    mount.umount();
    for name in written {
        assert_same(&guest_bytes(&lab.image(&format!("{name}.qcow2"))), &data, name);
    }
    for name in written.iter().chain(&["truncated", "touched", "allocated"]) {
        assert_sound(&lab.image(&format!("{name}.qcow2")));
    }
    assert_eq!(names(&lab.images()).len(), 7, "{:?}", names(&lab.images()));
}

#[test]
fn new_images_are_what_the_options_say() {
    let lab = Lab::new();
    let long = "--create-cluster-size 32K --create-refcount-bits 8 --create-extended-l2 \
                --create-compression zstd";
    let short = "-o create_cluster_size=32K,create_refcount_bits=8,create_extended_l2,\
                 create_compression=zstd";
    for (name, arguments) in [("long", long), ("short", short)] {
        let mount = lab.mount_with(arguments);
        sh!("truncate -s 5G {}", mount.path(&format!("{name}.raw")).display());
        mount.umount();
        let image = lab.image(&format!("{name}.qcow2"));
        let info = sh!("qemu-img info --output=json {}", image.display());
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        let data = &info["format-specific"]["data"];
        assert_eq!(info["virtual-size"], 5u64 << 30);
        assert_eq!(info["cluster-size"], 32 << 10);
        assert_eq!(data["refcount-bits"], 8);
        assert_eq!(data["extended-l2"], true);
        assert_eq!(data["compression-type"], "zstd");
        assert_sound(&image);
    }
    let point = lab.point();
    let refused = attempt!(
        "$qcow2fs mount --create-extended-l2 --create-cluster-size 4K {} {}",
        lab.images().display(),
        point.display()
    );
    assert!(refused.err.contains("new images: extended L2 entries"), "{}", refused.text());
}

#[test]
fn zeros_written_to_a_new_file_allocate_nothing() {
    let lab = Lab::new();
    let mount = lab.mount();
    let raw = mount.path("new.raw");
    sh!("dd if=/dev/zero of={} bs=1M count=256 status=none", raw.display());
    assert_eq!(length(&raw), 256 << 20);
    mount.umount();
    let image = lab.image("new.qcow2");
    assert!(allocated(&image) < 1 << 20, "{} bytes for zeros", allocated(&image));
    assert_sound(&image);
}

#[test]
fn names_that_are_no_raw_files_are_refused_with_the_reason() {
    let lab = Lab::new();
    fs::write(lab.image("x.raw"), "somebody's raw file").unwrap();
    fs::create_dir(lab.image("d.qcow2")).unwrap();
    symlink("/etc/passwd", lab.image("l.qcow2")).unwrap();
    let mount = lab.mount();
    for name in ["foo", "foo.img", "foo.qcow2", ".raw", "foo.RAW"] {
        assert_eq!(errno(File::create(mount.path(name))), Some(libc::EPERM), "{name}");
        assert_logged(&mount, &format!("making {name}: only raw files can be made here"));
    }
    let reserved = [".snap", ".qcow2fs", "d.qcow2/.snap"];
    for name in reserved {
        let path = mount.path(name);
        assert!(errno(fs::create_dir(&path)).is_some(), "{name}");
        assert!(errno(fs::rename(mount.path("d.qcow2"), &path)).is_some(), "{name}");
        assert!(errno(File::create(&path)).is_some(), "{name}");
    }
    // The host has something else under the image's name: it stays.
    assert_eq!(errno(File::create(mount.path("d.raw"))), Some(libc::EEXIST));
    assert_eq!(errno(File::create(mount.path("l.raw"))), Some(libc::EEXIST));
    assert_logged(
        &mount,
        "l.qcow2: File exists (os error 17); what has that name beneath the image",
    );
    let long = "x".repeat(250);
    let too_long = File::create(mount.path(&format!("{long}.raw")));
    assert_eq!(errno(too_long), Some(libc::ENAMETOOLONG), "the image's name is longer");
    // A raw file beside an image is another file, which nobody sees here.
    make(&mount.path("x.raw"), b"the image");
    assert_eq!(fs::read(lab.image("x.raw")).unwrap(), b"somebody's raw file");
    // A directory has the name that the raw file would have.
    fs::create_dir(mount.path("y.raw")).unwrap();
    assert_eq!(errno(File::create(mount.path("y.raw"))), Some(libc::EISDIR));
    assert_eq!(errno(fs::create_dir(mount.path("x.raw"))), Some(libc::EEXIST));
    assert_eq!(errno(symlink("x.raw", mount.path("s.raw"))), Some(libc::EPERM));
    assert!(!attempt!("mkfifo {}", mount.path("p.raw").display()).ok());
    mount.umount();
    let expected = ["d.qcow2", "l.qcow2", "x.qcow2", "x.raw", "y.raw"];
    assert_eq!(names(&lab.images()), expected);
}

#[test]
fn a_file_can_be_made_only_once() {
    let lab = Lab::new();
    let mount = lab.mount();
    let raw = mount.path("new.raw");
    let created: usize = thread::scope(|scope| {
        let make = || OpenOptions::new().write(true).create_new(true).open(&raw).is_ok();
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(make)).collect();
        threads.into_iter().map(|thread| usize::from(thread.join().unwrap())).sum()
    });
    assert_eq!(created, 1, "with O_EXCL");
    thread::scope(|scope| {
        let make = |index: u64| {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(mount.path("all.raw"));
            file.unwrap().write_all_at(&pattern(index, 4096), index * 4096).unwrap();
        };
        (0..8).for_each(|index| drop(scope.spawn(move || make(index))));
    });
    let all = read_all(&mount.path("all.raw"));
    for index in 0..8 {
        assert_same(&all[index * 4096..][..4096], &pattern(index as u64, 4096), "without O_EXCL");
    }
    mount.umount();
    assert_eq!(names(&lab.images()), ["all.qcow2", "new.qcow2"]);
    assert_sound(&lab.image("all.qcow2"));
}

#[test]
fn what_is_removed_or_replaced_while_open_stays_usable() {
    let lab = Lab::new();
    let mount = lab.mount();
    let (removed, replaced) = (mount.path("removed.raw"), mount.path("replaced.raw"));
    let old = [&removed, &replaced].map(|path| make(path, &pattern(1, MIB)));
    make(&mount.path("new.raw"), &pattern(2, MIB));
    let inode = fs::metadata(mount.path("new.raw")).unwrap().ino();
    fs::remove_file(&removed).unwrap();
    fs::rename(mount.path("new.raw"), &replaced).unwrap();
    assert!(!removed.exists());
    assert_eq!(fs::metadata(&replaced).unwrap().ino(), inode, "a name has moved, not a file");
    // A new file by the old name is another one.
    make(&removed, &pattern(3, MIB));
    for file in &old {
        file.write_all_at(&pattern(4, MIB), MIB as u64).unwrap();
        file.sync_all().unwrap();
        file.set_len(3 * MIB as u64).unwrap();
        file.set_permissions(Permissions::from_mode(0o640)).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o777), (3 * MIB as u64, 0o640));
        assert_eq!(metadata.nlink(), 0);
        let mut found = vec![0; 3 * MIB];
        file.read_exact_at(&mut found, 0).unwrap();
        let expected = [pattern(1, MIB), pattern(4, MIB), vec![0; MIB]].concat();
        assert_same(&found, &expected, "through the old handle");
    }
    assert_same(&read_all(&removed), &pattern(3, MIB), "the new file");
    assert_same(&read_all(&replaced), &pattern(2, MIB), "what replaced the old one");
    drop(old);
    mount.wait_until_closed(Duration::from_secs(10));
    assert_eq!(mount.status()["close_errors"], 0);
    mount.umount();
    assert_eq!(names(&lab.images()), ["removed.qcow2", "replaced.qcow2"]);
    assert_sound(&lab.image("removed.qcow2"));
    assert_same(&guest_bytes(&lab.image("replaced.qcow2")), &pattern(2, MIB), "through QEMU");
}

#[test]
fn names_move_with_everything_that_moves() {
    let lab = Lab::new();
    let mount = lab.mount();
    let path = |name: &str| mount.path(name);
    fs::create_dir(path("d")).unwrap();
    let a = make(&path("a.raw"), b"a");
    drop(make(&path("b.raw"), b"b"));
    let keep = libc::RENAME_NOREPLACE;
    assert_eq!(errno(rename(&path("a.raw"), &path("b.raw"), keep)), Some(libc::EEXIST));
    rename(&path("a.raw"), &path("d/a.raw"), keep).unwrap();
    assert!(lab.image("d/a.qcow2").exists() && !lab.image("a.qcow2").exists());
    fs::rename(path("d"), path("e")).unwrap();
    rename(&path("e/a.raw"), &path("b.raw"), libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(&read_all(&path("b.raw"))[..1], b"a");
    assert_eq!(&read_all(&path("e/a.raw"))[..1], b"b");
    a.write_all_at(b"A", 0).unwrap();
    assert_eq!(&read_all(&path("b.raw"))[..1], b"A", "the open file moved along");
    let open = mount.status()["images"][0]["name"].clone();
    assert_eq!(open, "b.raw", "status shows the name of today");
    for (from, to, expected) in [
        ("b.raw", "b.img", libc::EPERM),
        ("b.raw", "e", libc::EISDIR),
        ("e", "b.raw", libc::ENOTDIR),
        ("missing.raw", "b.raw", libc::ENOENT),
        ("e", "e/f", libc::EINVAL),
    ] {
        assert_eq!(errno(fs::rename(path(from), path(to))), Some(expected), "{from} to {to}");
    }
    let mixed = rename(&path("b.raw"), &path("e"), libc::RENAME_EXCHANGE);
    assert!(errno(mixed).is_some(), "an image is no directory");
    assert_logged(&mount, "renaming b.raw to b.img: the name of a raw file ends in .raw");
    // rmdir and rm.
    assert_eq!(errno(fs::remove_dir(path("e"))), Some(libc::ENOTEMPTY));
    assert_eq!(errno(fs::remove_file(path("e"))), Some(libc::EISDIR));
    assert_eq!(errno(fs::remove_dir(path("b.raw"))), Some(libc::ENOTDIR));
    fs::remove_file(path("e/a.raw")).unwrap();
    fs::write(lab.image("e/notes.txt"), "unseen").unwrap();
    assert_eq!(errno(fs::remove_dir(path("e"))), Some(libc::ENOTEMPTY));
    assert_logged(&mount, "removing e: there are files in it, shown here or not");
    fs::remove_file(lab.image("e/notes.txt")).unwrap();
    fs::remove_dir(path("e")).unwrap();
    drop(a);
    mount.umount();
    assert_eq!(names(&lab.images()), ["b.qcow2"]);
    assert_sound(&lab.image("b.qcow2"));
}

#[test]
fn what_an_open_overlay_is_based_on_keeps_its_name() {
    let lab = Lab::new();
    lab.create("base.qcow2", "4M", "");
    sh!("qemu-io -f qcow2 -c 'write -P 7 0 4M' {}", lab.image("base.qcow2").display());
    let overlay = lab.image("overlay.qcow2");
    sh!("qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 {}", overlay.display());
    let mount = lab.mount();
    fs::create_dir(mount.path("d")).unwrap();
    make(&mount.path("other.raw"), b"other");
    let (base, raw) = (mount.path("base.raw"), mount.path("overlay.raw"));
    let file = open(&raw);
    for refused in [
        fs::remove_file(&base),
        fs::rename(&base, mount.path("renamed.raw")),
        fs::rename(mount.path("other.raw"), &base),
        rename(&mount.path("other.raw"), &base, libc::RENAME_EXCHANGE),
    ] {
        assert_eq!(errno(refused), Some(libc::EBUSY));
    }
    let why = "removing base.qcow2: it is a backing or data file of overlay.qcow2, which is open";
    assert_logged(&mount, why);
    // The overlay itself may go, but not to where it does not find its base.
    let moved = fs::rename(&raw, mount.path("d/overlay.raw"));
    assert_eq!(errno(moved), Some(libc::EPERM));
    assert_logged(&mount, "its backing file base.qcow2 is named relative to the directory");
    let linked = fs::hard_link(&raw, mount.path("d/overlay.raw"));
    assert_eq!(errno(linked), Some(libc::EPERM));
    fs::rename(&raw, mount.path("still.raw")).unwrap();
    drop(file);
    wait_until_free(&lab.image("base.qcow2"));
    assert_eq!(read_all(&mount.path("still.raw")), vec![7; 4 * MIB]);
    let free = || fs::remove_file(&base).is_ok();
    eventually(Duration::from_secs(10), free, || "the base cannot be removed".into());
    mount.umount();
}

#[test]
fn a_data_file_outlives_its_image_and_the_log_says_so() {
    let lab = Lab::new();
    let image = lab.image("disk.qcow2");
    let data = lab.image("disk.data");
    sh!("qemu-img create -q -f qcow2 -o data_file={} {} 4M", data.display(), image.display());
    let mount = lab.mount();
    fs::remove_file(mount.path("disk.raw")).unwrap();
    assert_logged(&mount, "disk.qcow2 is gone, its data file");
    mount.umount();
    assert!(data.exists() && !image.exists());
}

#[test]
fn attributes_of_every_kind_are_those_of_the_image() {
    let lab = Lab::new();
    let mount = lab.mount();
    let (raw, image) = (mount.path("disk.raw"), lab.image("disk.qcow2"));
    let file = make(&raw, b"data");
    // With the image open, and closed.
    for round in ["open", "closed"] {
        sh!(
            "cd {}
             chmod 640 disk.raw
             chown 1234:2345 disk.raw
             touch -d '2001-02-03 04:05:06 UTC' disk.raw
             setfattr -n user.comment -v '{round}' disk.raw
             setfattr -n user.empty disk.raw",
            mount.point().display()
        );
        let host = fs::metadata(&image).unwrap();
        assert_eq!((host.mode() & 0o7777, host.uid(), host.gid()), (0o640, 1234, 2345), "{round}");
        assert_eq!(host.mtime(), 981_173_106, "{round}");
        let shown = fs::metadata(&raw).unwrap();
        assert_eq!((shown.uid(), shown.gid(), shown.mtime()), (1234, 2345, 981_173_106));
        let dump =
            |path: &Path| sh!("getfattr --absolute-names -d {} | tail -n +2", path.display());
        assert_eq!(dump(&raw), dump(&image), "{round}");
        assert!(dump(&raw).contains(&format!("user.comment=\"{round}\"")), "{round}");
        sh!("setfattr -x user.empty {}", raw.display());
        let gone = attempt!("getfattr -n user.empty {}", raw.display());
        assert!(gone.err.contains("No such attribute"), "{}", gone.text());
        let others = attempt!("setfattr -n trusted.x -v y {}", raw.display());
        assert!(others.err.contains("not supported"), "{}", others.text());
        if round == "open" {
            fs::rename(&raw, mount.path("moved.raw")).unwrap();
            fs::rename(mount.path("moved.raw"), &raw).unwrap();
            file.sync_all().unwrap();
        }
    }
    drop(file);
    // Directories too, with the bits that say who may remove what.
    fs::DirBuilder::new().mode(0o750).create(mount.path("d")).unwrap();
    fs::set_permissions(mount.path("d"), Permissions::from_mode(0o1777)).unwrap();
    assert_eq!(fs::metadata(lab.image("d")).unwrap().mode() & 0o7777, 0o1777);
    assert_eq!(fs::metadata(mount.path("d")).unwrap().mode() & 0o7777, 0o1777);
    sh!("setfattr -n user.x -v y {0} && getfattr -d {0} | grep user.x", mount.path("d").display());
    // What is not an image has none, and no trouble with them.
    sh!("cd {} && ls -l .qcow2fs && getfattr -d .qcow2fs", mount.point().display());
    File::open(mount.point()).unwrap().sync_all().unwrap();
    mount.umount();
    assert_sound(&image);
}

#[test]
fn hard_links_are_made_and_counted() {
    let lab = Lab::new();
    let mount = lab.mount();
    let (one, two) = (mount.path("one.raw"), mount.path("two.raw"));
    drop(make(&one, b"both"));
    fs::hard_link(&one, &two).unwrap();
    assert_eq!(fs::metadata(&one).unwrap().nlink(), 2);
    assert_eq!(fs::metadata(&one).unwrap().ino(), fs::metadata(&two).unwrap().ino());
    assert_eq!(errno(fs::hard_link(&one, &two)), Some(libc::EEXIST));
    assert_eq!(errno(fs::hard_link(&one, mount.path("three.img"))), Some(libc::EPERM));
    fs::remove_file(&one).unwrap();
    assert_eq!(&read_all(&two)[..4], b"both");
    assert_eq!(fs::metadata(&two).unwrap().nlink(), 1);
    mount.umount();
    assert_eq!(names(&lab.images()), ["two.qcow2"]);
}

#[test]
fn a_file_may_be_written_by_who_makes_it_whatever_its_mode() {
    let lab = Lab::new();
    let mount = lab.mount();
    let raw = mount.path("locked.raw");
    let file = OpenOptions::new().write(true).create_new(true).mode(0o400).open(&raw).unwrap();
    file.write_all_at(&pattern(1, MIB), 0).unwrap();
    assert_eq!(fs::metadata(&raw).unwrap().mode() & 0o7777, 0o400);
    drop(file);
    sh!("umask 027; cd {}; touch masked.raw; mkdir dir", mount.point().display());
    assert_eq!(fs::metadata(lab.image("masked.qcow2")).unwrap().mode() & 0o7777, 0o640);
    assert_eq!(fs::metadata(lab.image("dir")).unwrap().mode() & 0o7777, 0o750);
    // Whatever the mask of who has mounted is.
    sh!("umask 0; cd {}; touch open.raw; mkdir wide", mount.point().display());
    assert_eq!(fs::metadata(lab.image("open.qcow2")).unwrap().mode() & 0o7777, 0o666);
    assert_eq!(fs::metadata(lab.image("wide")).unwrap().mode() & 0o7777, 0o777);
    mount.umount();
    assert_same(&guest_bytes(&lab.image("locked.qcow2")), &pattern(1, MIB), "as written");
}

#[test]
fn other_users_do_here_what_they_may_do_on_the_host() {
    let lab = Lab::new();
    fs::set_permissions(lab.images(), Permissions::from_mode(0o1777)).unwrap();
    lab.subdirectory("images/closed");
    let shared = lab.subdirectory("images/shared");
    std::os::unix::fs::chown(&shared, None, Some(4321)).unwrap();
    fs::set_permissions(&shared, Permissions::from_mode(0o2777)).unwrap();
    lab.create("roots.qcow2", "4M", "");
    let mount = lab.mount_with("-o allow_other");
    let point = mount.point().display();
    sh!("cd {point} && {NOBODY} bash -c 'umask 022; truncate -s 1M mine.raw; mkdir mine'");
    sh!("cd {point} && {NOBODY} touch shared/group.raw");
    let owner = |name: &str| {
        let metadata = fs::metadata(lab.image(name)).unwrap();
        (metadata.uid(), metadata.gid())
    };
    assert_eq!(owner("mine.qcow2"), (65534, 65534));
    assert_eq!(owner("mine"), (65534, 65534));
    assert_eq!(owner("shared/group.qcow2"), (65534, 4321), "the group of the directory");
    for forbidden in [
        "touch closed/new.raw",
        "rm -f roots.raw",
        "mv roots.raw theirs.raw",
        "mv mine.raw roots.raw",
        "chmod 777 roots.raw",
        "chown 65534 roots.raw",
        "truncate -s 1M roots.raw",
        "setfattr -n user.x -v y roots.raw",
        "rmdir closed",
    ] {
        let done = attempt!("cd {point} && {NOBODY} {forbidden} < /dev/null");
        assert!(!done.ok(), "{forbidden}: {}", done.text());
    }
    sh!("cd {point} && {NOBODY} bash -c 'chmod 600 mine.raw; mv mine.raw mine/; rm -r mine'");
    mount.umount();
    assert_eq!(names(&lab.images()), ["closed", "roots.qcow2", "shared"]);
}

/// A daemon that is not root may open only what its user may, but a file's maker may write to it
/// whatever the mode says. In a mount namespace of its own, where everybody may use FUSE.
#[test]
fn without_root_files_are_made_too() {
    let lab = Lab::new();
    let (program, script) = (lab.path("program"), lab.path("script"));
    fs::copy(crate::lab::PROGRAM, &program).unwrap();
    let unopened = lab.create("unopened.qcow2", "1M", "");
    for path in [lab.images(), lab.point(), unopened] {
        std::os::unix::fs::chown(path, Some(65534), Some(65534)).unwrap();
    }
    let text = format!(
        "cd {directory}
         mkdir dev && mount -t tmpfs -o dev,mode=755 tmpfs dev
         mknod -m 666 dev/fuse c 10 229 && mount --bind dev/fuse /dev/fuse
         {NOBODY} {program} mount --log-file images/log images mnt
         {NOBODY} bash -ec 'umask 277 && head -c 1M /dev/urandom > mnt/locked.raw'
         {NOBODY} bash -ec 'cd mnt && mkdir d && mv locked.raw d && touch new.raw'
         {NOBODY} bash -ec 'cd mnt && setfattr -n user.x -v y new.raw && chmod 640 new.raw'
         ! {NOBODY} bash -c 'echo more >> mnt/d/locked.raw'
         # What its owner may write to can be opened, what they may neither read nor write cannot.
         {NOBODY} chmod 200 mnt/unopened.raw && {NOBODY} chmod 0 mnt/unopened.raw
         ! {NOBODY} chmod 640 mnt/unopened.raw
         stat -c %a,%U images/d/locked.qcow2 images/new.qcow2 images/unopened.qcow2
         {NOBODY} {program} umount mnt",
        directory = lab.path("").display(),
        program = program.display(),
    );
    fs::write(&script, text).unwrap();
    let said = sh!("unshare -m bash -e {}", script.display());
    assert_eq!(
        said.split_whitespace().collect::<Vec<_>>(),
        ["400,nobody", "640,nobody", "0,nobody"]
    );
    assert_eq!(guest_bytes(&lab.image("d/locked.qcow2")).len(), MIB);
    assert_sound(&lab.image("d/locked.qcow2"));
}

#[test]
fn a_read_only_mount_changes_no_name() {
    let lab = Lab::new();
    lab.create("disk.qcow2", "4M", "");
    lab.subdirectory("images/d");
    let abandoned = lab.image(".qcow2fs-new.1.2");
    fs::write(&abandoned, "").unwrap();
    let mount = lab.mount_with("--read-only");
    let path = |name: &str| mount.path(name);
    for refused in [
        File::create(path("new.raw")).map(drop),
        fs::create_dir(path("e")),
        fs::remove_file(path("disk.raw")),
        fs::remove_dir(path("d")),
        fs::rename(path("disk.raw"), path("new.raw")),
        fs::hard_link(path("disk.raw"), path("new.raw")),
        fs::set_permissions(path("disk.raw"), Permissions::from_mode(0o600)),
    ] {
        assert_eq!(errno(refused), Some(libc::EROFS));
    }
    let attribute = attempt!("setfattr -n user.x -v y {}", path("disk.raw").display());
    assert!(attribute.err.contains("Read-only file system"), "{}", attribute.text());
    assert_eq!(sh!("ls {}", mount.point().display()).split_whitespace().count(), 2);
    mount.umount();
    assert!(abandoned.exists());
}

#[test]
fn copies_and_archives_keep_holes() {
    let lab = Lab::new();
    let mount = lab.mount();
    let raw = mount.path("disk.raw");
    let file = make(&raw, &pattern(1, MIB));
    file.set_len(128 << 20).unwrap();
    for mebibyte in [100, 127] {
        file.write_all_at(&pattern(mebibyte, MIB), mebibyte << 20).unwrap();
    }
    drop(file);
    fs::create_dir(mount.path("back")).unwrap();
    let (point, out) = (mount.point().display(), lab.subdirectory("out"));
    let (source, target) = (raw.display(), out.display());
    sh!("cd {target}
         cp --sparse=auto {source} copy.raw
         tar -S -C {point} -cf archive.tar disk.raw
         mkdir untarred && tar -S -C untarred -xf archive.tar
         tar -S -C {point}/back -xf archive.tar
         cp {source} {point}/back/copy.raw
         cp --sparse=auto copy.raw {point}/back/again.raw");
    let mut outside = vec![out.join("copy.raw"), out.join("untarred/disk.raw")];
    let mut inside = vec!["disk", "copy", "again"];
    assert!(length(&out.join("archive.tar")) < 5 << 20, "the archive holds the holes");
    if attempt!("command -v rsync").ok() {
        // Into the mount it writes under a temporary name first.
        sh!(
            "cd {target} && rsync -S {source} rsynced.raw && rsync -S copy.raw {point}/back/rsynced.raw"
        );
        sh!("cd {target} && rsync -aS --inplace copy.raw {point}/back/inplace.raw");
        outside.push(out.join("rsynced.raw"));
        inside.extend(["rsynced", "inplace"]);
    }
    for copy in &outside {
        assert!(allocated(copy) < 5 << 20, "{}: {}", copy.display(), allocated(copy));
        sh!("cmp {source} {}", copy.display());
    }
    for name in &inside {
        sh!("cmp {source} {point}/back/{name}.raw");
    }
    mount.umount();
    for name in &inside {
        let image = lab.image(&format!("back/{name}.qcow2"));
        assert!(allocated(&image) < 5 << 20, "{name}: {}", allocated(&image));
        assert_sound(&image);
    }
    assert_eq!(names(&lab.image("back")).len(), inside.len());
}

/// When a file was changed, in seconds.
fn modified(path: &Path) -> i64 {
    fs::metadata(path).unwrap().mtime()
}

#[test]
fn copies_keep_the_times_that_were_set() {
    const THEN: i64 = 1_000_000_000;
    let lab = Lab::new();
    let (out, mount) = (lab.subdirectory("out"), lab.mount());
    fs::write(out.join("untarred.raw"), pattern(1, 4 * MIB)).unwrap();
    let (from, to) = (out.display(), mount.point().display());
    sh!("touch -d @{THEN} {from}/untarred.raw && tar -C {from} -cf {from}/a.tar untarred.raw");
    sh!("cp -p {from}/untarred.raw {to}/copied.raw && tar -C {to} -xf {from}/a.tar");
    let mut names = vec!["copied", "untarred"];
    if attempt!("command -v rsync").ok() {
        sh!("rsync -a {from}/untarred.raw {to}/synced.raw");
        sh!("rsync -a --inplace {from}/untarred.raw {to}/inplace.raw");
        names.extend(["synced", "inplace"]);
    }
    mount.wait_until_closed(Duration::from_secs(10));
    for name in &names {
        assert_eq!(modified(&mount.path(&format!("{name}.raw"))), THEN, "{name}");
    }
    mount.umount();
    for name in &names {
        let image = lab.image(&format!("{name}.qcow2"));
        assert_eq!(modified(&image), THEN, "{name}");
        assert_sound(&image);
    }
}

#[test]
fn a_time_that_was_set_holds_until_the_guest_writes_again() {
    const THEN: i64 = 1_000_000_000;
    let lab = Lab::new();
    let mount = lab.mount();
    let (raw, image) = (mount.path("disk.raw"), lab.image("disk.qcow2"));
    let file = make(&raw, &pattern(1, 4 * MIB));
    let set = || sh!("touch -d @{THEN} {}", raw.display());
    for change in [
        "dd if=/dev/zero bs=4k count=1 conv=notrunc of=",
        "fallocate -p -l 64k ",
        "truncate -s 8M ",
    ] {
        set();
        file.sync_all().unwrap();
        eventually(Duration::from_secs(10), || modified(&image) > THEN, || change.into());
        // Longer than the kernel takes what it was told for true.
        thread::sleep(Duration::from_millis(1500));
        assert_eq!(modified(&raw), THEN, "what was written before is written out");
        sh!("{change}{}", raw.display());
        thread::sleep(Duration::from_millis(1500));
        assert!(modified(&raw) > THEN, "{change}");
    }
    set();
    drop(file);
    mount.umount();
    assert_eq!(modified(&image), THEN);
}

#[test]
fn a_file_under_a_temporary_name_is_the_one_that_gets_the_name() {
    let lab = Lab::new();
    let mount = lab.mount();
    let (temporary, last) = (mount.path(".disk.raw.X1y2Z3"), mount.path("disk.raw"));
    drop(make(&temporary, b"new"));
    assert!(lab.image(".disk.raw.X1y2Z3.qcow2").exists());
    assert_eq!(sh!("ls -A {}", mount.point().display()).trim(), ".disk.raw.X1y2Z3");
    fs::rename(&temporary, &last).unwrap();
    assert_eq!(&read_all(&last)[..3], b"new");
    mount.umount();
    assert_eq!(names(&lab.images()), ["disk.qcow2"]);
}

#[test]
fn a_crash_while_images_are_made_leaves_whole_images_only() {
    let lab = Lab::new();
    let stop = AtomicBool::new(false);
    for _ in 0..3 {
        stop.store(false, Ordering::Relaxed);
        let mount = lab.mount();
        let before = names(&lab.images()).len();
        thread::scope(|scope| {
            for worker in 0..2 {
                let (point, stop) = (mount.point().to_owned(), &stop);
                scope.spawn(move || make_images_until(stop, &point, worker));
            }
            let some = || names(&lab.images()).len() > before + 20;
            eventually(Duration::from_secs(60), some, || "no images are made".into());
            signal(mount.pid(), libc::SIGKILL);
            wait_for_end(mount.pid());
            stop.store(true, Ordering::Relaxed);
            sh!("umount -l {}", mount.point().display());
        });
    }
    // What hosts without unnamed files can be left with.
    fs::write(lab.image(".qcow2fs-new.77.1"), "half of an image").unwrap();
    let mount = lab.mount();
    let shown = sh!("ls -A {} | wc -l", mount.point().display());
    let found = names(&lab.images());
    assert!(found.iter().all(|name| name.ends_with(".qcow2")), "{found:?}");
    assert_eq!(shown.trim(), found.len().to_string());
    mount.umount();
    for name in found {
        sh!("qemu-img check -q -f qcow2 {} || [ $? = 3 ]", lab.image(&name).display());
    }
}

fn make_images_until(stop: &AtomicBool, point: &Path, worker: u32) {
    for number in 0.. {
        let path = point.join(format!("{worker}-{}-{number}.raw", std::process::id()));
        let made = File::options().write(true).create(true).truncate(false).open(path);
        let written = made.and_then(|file| file.write_all_at(b"some", 0));
        if written.is_err() || stop.load(Ordering::Relaxed) {
            return;
        }
    }
}

#[test]
fn names_change_while_files_are_opened_written_and_removed() {
    let lab = Lab::new();
    let mount = lab.mount();
    fs::create_dir(mount.path("d")).unwrap();
    let places: Vec<PathBuf> =
        ["a.raw", "b.raw", "d/a.raw", "d/b.raw"].map(|name| mount.path(name)).into();
    thread::scope(|scope| {
        for worker in 0..4usize {
            let places = &places;
            scope.spawn(move || {
                for step in 0..120 {
                    churn(places, worker, step);
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..60 {
                let _may_be_busy = fs::rename(mount.path("d"), mount.path("e"));
                let _may_be_busy = fs::rename(mount.path("e"), mount.path("d"));
            }
        });
    });
    mount.wait_until_closed(Duration::from_secs(20));
    assert_eq!(mount.status()["close_errors"], 0);
    let log = mount.log();
    assert!(!log.contains("[ERROR]"), "{log}");
    mount.umount();
    for directory in [lab.images(), lab.image("d")] {
        for name in names(&directory).iter().filter(|name| name.ends_with(".qcow2")) {
            assert_sound(&directory.join(name));
        }
    }
}

/// One step of several that run at once: names vanish under each of them, and nothing else may go
/// wrong.
fn churn(places: &[PathBuf], worker: usize, step: usize) {
    let (one, other) = (&places[(worker + step) % 4], &places[(worker * 3 + step / 2) % 4]);
    let gone = |e: &io::Error| {
        matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESTALE | libc::EEXIST))
    };
    let done = match (worker + step) % 3 {
        0 => {
            File::options().read(true).write(true).create(true).truncate(false).open(one).and_then(
                |file| {
                    let data = pattern((worker * 1000 + step) as u64, 8192);
                    let at = worker as u64 * 65536;
                    file.write_all_at(&data, at)?;
                    if step.is_multiple_of(8) {
                        file.sync_all()?;
                    }
                    file.metadata().map(drop)
                },
            )
        }
        1 => fs::rename(one, other),
        _ => fs::remove_file(one),
    };
    assert!(done.as_ref().err().is_none_or(gone), "{one:?} {other:?}: {done:?}");
}

#[test]
fn a_listing_opens_no_image_for_writing() {
    let lab = Lab::new();
    for index in 0..10 {
        lab.create(&format!("{index}.qcow2"), "3M", "");
    }
    // Here nothing can be opened for writing, though the mount would write.
    let images = lab.images();
    sh!("mount --bind {0} {0} && mount -o remount,bind,ro {0}", images.display());
    let mount = lab.mount();
    let listed = attempt!("ls -l {} | grep -c 3145728", mount.point().display());
    let new = File::create(mount.path("new.raw"));
    mount.umount();
    sh!("umount {}", images.display());
    assert_eq!(listed.out.trim(), "10", "{}", listed.text());
    assert_eq!(errno(new), Some(libc::EROFS));
}
