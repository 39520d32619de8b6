//! Mounting as users, `mount(8)` and `/etc/fstab` do it, and the ways a mount ends.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use crate::discards::{open, read_all};
use crate::lab::{
    Lab, Mount, PROGRAM, alive, assert_same, assert_sound, attempt, eventually, guest_bytes,
    is_mounted, pattern, signal, wait_for_end, write_by_dd,
};

/// Who neither owns the images nor is root.
const NOBODY: &str = "setpriv --reuid=65534 --regid=65534 --clear-groups";

#[test]
fn a_read_only_mount_writes_nothing() {
    for arguments in ["-o ro", "--read-only"] {
        let lab = Lab::new();
        let image = lab.create("disk.qcow2", "8M", "");
        sh!("qemu-io -f qcow2 -c 'write -P 0x42 0 1M' {}", image.display());
        let before = fs::read(&image).unwrap();
        let mount = lab.mount_with(arguments);
        let raw = mount.path("disk.raw");
        assert_eq!(read_all(&raw)[..1 << 20], vec![0x42; 1 << 20]);
        let refusal = OpenOptions::new().write(true).open(&raw).map(drop).expect_err("writable");
        assert_eq!(refusal.raw_os_error(), Some(libc::EROFS), "{refusal}");
        assert!(!attempt!("truncate -s 4M {}", raw.display()).ok(), "truncated");
        mount.umount();
        assert_same(&fs::read(&image).unwrap(), &before, "the image under a read-only mount");
    }
}

#[test]
fn the_kernel_reads_a_whole_request_ahead() {
    let lab = Lab::new();
    let mount = lab.mount();
    let point = mount.point().display();
    let setting = sh!("cat /sys/class/bdi/$(mountpoint -d {point})/read_ahead_kb");
    assert_eq!(setting.trim(), "1024");
    mount.umount();
}

#[test]
fn other_users_read_only_where_allowed() {
    let lab = Lab::new();
    lab.create("disk.qcow2", "4M", "");
    let mount = lab.mount();
    let raw = mount.path("disk.raw");
    assert!(!attempt!("{NOBODY} head -c 1 {}", raw.display()).ok(), "without allow_other");
    mount.umount();

    let mount = lab.mount_with("-o allow_other,default_permissions,uid=65534,gid=12,umask=027");
    let metadata = fs::metadata(&raw).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (65534, 12));
    assert_eq!(metadata.permissions().mode() & 0o027, 0, "umask=027");
    sh!("{NOBODY} head -c 1 {}", raw.display());
    mount.umount();
}

/// `status` and `metrics` tell the names of images.
#[test]
fn who_may_not_list_the_images_may_not_read_their_status() {
    let lab = Lab::new();
    lab.create("disk.qcow2", "4M", "");
    for (owner, mode, may_read) in
        [("0:0", "755", true), ("0:0", "700", false), ("65534:0", "500", true)]
    {
        sh!("chown {owner} {0}; chmod {mode} {0}", lab.images().display());
        let mount = lab.mount_with("-o allow_other");
        for name in ["status", "metrics"] {
            let file = mount.path(".qcow2fs").join(name);
            let read = attempt!("{NOBODY} cat {}", file.display());
            assert_eq!(read.ok(), may_read, "{name}, {owner} {mode}: {}", read.text());
            sh!("cat {}", file.display());
        }
        let ordered =
            attempt!("{NOBODY} tee {} < /dev/null", mount.path(".qcow2fs/control").display());
        assert!(!ordered.ok(), "{}", ordered.text());
        mount.umount();
    }
}

#[test]
fn each_user_may_do_what_owner_and_mode_of_the_image_allow() {
    let lab = Lab::new();
    let user = |id: u32, groups: &str| format!("setpriv --reuid={id} --regid={id} {groups}");
    let owner = user(1001, "--clear-groups");
    let member = user(1002, "--groups=1500");
    let stranger = user(1003, "--clear-groups");
    for (name, mode) in [("private", "600"), ("group", "640"), ("shared", "660"), ("open", "666")] {
        let image = lab.create(&format!("{name}.qcow2"), "1M", "");
        sh!("chown 1001:1500 {0}; chmod {mode} {0}", image.display());
    }
    let mount = lab.mount_with("-o allow_other");
    // Who, what is read and what is written of private, group, shared and open.
    for (who, read, written) in [
        (&owner, [true; 4], [true; 4]),
        (&member, [false, true, true, true], [false, false, true, true]),
        (&stranger, [false, false, false, true], [false, false, false, true]),
    ] {
        for (i, name) in ["private", "group", "shared", "open"].iter().enumerate() {
            let raw = mount.path(&format!("{name}.raw"));
            let raw = raw.display();
            assert_eq!(attempt!("{who} head -c 512 {raw}").ok(), read[i], "{who} reads {name}");
            let write = format!("{who} dd if=/dev/zero of={raw} bs=512 count=1 conv=notrunc");
            assert_eq!(attempt!("{write}").ok(), written[i], "{who} writes {name}");
            let owns = std::ptr::eq(who, &owner);
            assert_eq!(attempt!("{who} chmod g+x {raw}").ok(), owns, "{who} chmod {name}");
            assert!(!attempt!("{who} chown 1003 {raw}").ok(), "{who} gave {name} away");
        }
    }
    // What steers the mount is not for everybody.
    let control = mount.path(".qcow2fs/control");
    assert!(!attempt!("{stranger} sh -c 'echo stop open.raw > {}'", control.display()).ok());
    mount.umount();
    let mount = lab.mount();
    for who in [&owner, &member, &stranger] {
        assert!(
            !attempt!("{who} ls {}", mount.point().display()).ok(),
            "{who} without allow_other"
        );
    }
    mount.umount();
}

/// `system.posix_acl_access` of a file that its owner and user 1002 may write, the owner's group not even
/// read.
const LIST: &str = "0x02000000\
    01000600ffffffff02000600ea03000004000000ffffffff10000600ffffffff20000000ffffffff";

#[test]
fn the_owners_group_may_not_do_what_an_access_control_list_denies_it() {
    let member = "setpriv --reuid=1003 --regid=1500 --clear-groups";
    for overlay in [false, true] {
        let lab = Lab::new();
        let image = lab.create("disk.qcow2", "1M", "");
        let host = image.display();
        sh!("chown 1001:1500 {host}; setfattr -n system.posix_acl_access -v {LIST} {host}");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&image), 0o660, "the host shows the mask");
        assert!(!attempt!("{member} head -c 512 {host}").ok(), "the host lets it");
        let layered = format!("--overlay {}", lab.subdirectory("overlays").display());
        let options = if overlay { layered.as_str() } else { "" };
        let mount = lab.mount_with(&format!("-o allow_other {options}"));
        let raw = mount.path("disk.raw");
        let assert_denied = |when: &str| {
            assert_eq!(mode(&raw), 0o600, "{when}");
            assert!(!attempt!("{member} head -c 512 {}", raw.display()).ok(), "{when}");
        };
        assert_denied("closed");
        let file = open(&raw);
        assert_denied("open");
        file.write_all_at(b"data", 0).unwrap();
        assert_denied("written");
        if !overlay {
            sh!("chmod u+x {}", raw.display());
            assert_eq!(mode(&image), 0o760, "the mask stays");
            sh!("chmod g-w,g+r {}", raw.display());
            assert_eq!(mode(&image), 0o740, "unless it is set");
        }
        drop(file);
        mount.umount();
    }
}

/// The program under test where mount(8) looks for it, which takes no PATH from its caller. Before
/// /usr/local/bin, so that one installed there is left alone.
struct Installed {
    _alone: MutexGuard<'static, ()>,
}

impl Installed {
    const LINK: &str = "/usr/local/sbin/qcow2fs";

    fn new() -> Installed {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
        let left_behind =
            fs::read_link(Self::LINK).is_ok_and(|target| target == Path::new(PROGRAM));
        if !left_behind {
            std::os::unix::fs::symlink(PROGRAM, Self::LINK)
                .unwrap_or_else(|e| panic!("a link to the program at {}: {e}", Self::LINK));
        }
        Installed { _alone: alone }
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        let _ = fs::remove_file(Self::LINK);
    }
}

/// Mounts with the command `mount`, writes, and unmounts with a plain umount(8).
fn mounts_by_type(lab: &Lab, mount: &str) {
    let image = lab.create("disk.qcow2", "8M", "");
    let installed = Installed::new();
    sh!("{mount}");
    drop(installed);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mount = Mount::adopt(lab.point(), lab.path("log"));
    let shown = format!(" {} fuse.qcow2fs ", lab.point().display());
    assert!(mounts.contains(&shown), "the mount table shows another type");
    let data = pattern(3, 1 << 20);
    write_by_dd(&mount.path("disk.raw"), &data);
    sh!("umount {}", mount.point().display());
    wait_for_end(mount.pid());
    assert_same(&guest_bytes(&image)[..1 << 20], &data, "after a plain umount");
    assert_sound(&image);
}

#[test]
fn mount_knows_the_type_fuse_qcow2fs() {
    let lab = Lab::new();
    let (images, point) = (lab.images(), lab.point());
    let options = "allow_other,noatime,nosuid,nodev";
    let mount =
        format!("mount -t fuse.qcow2fs -o {options} {} {}", images.display(), point.display());
    mounts_by_type(&lab, &mount);
}

#[test]
fn an_fstab_line_mounts() {
    let lab = Lab::new();
    let table = lab.path("fstab");
    let options = "allow_other,nofail,_netdev,x-systemd.requires=network.target";
    let (images, point) = (lab.images(), lab.point());
    let line = format!("{} {} fuse.qcow2fs {options} 0 0\n", images.display(), point.display());
    fs::write(&table, line).unwrap();
    mounts_by_type(&lab, &format!("mount -T {} -a", table.display()));
}

#[test]
fn a_plain_umount_leaves_the_image_sound() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let mount = lab.mount();
    let data = pattern(4, 2 << 20);
    write_by_dd(&mount.path("disk.raw"), &data);
    let pid = mount.pid();
    sh!("umount {}", mount.point().display());
    wait_for_end(pid);
    assert_same(&guest_bytes(&image)[..2 << 20], &data, "after a plain umount");
    assert_sound(&image);
}

fn assert_mount_fails(lab: &Lab, arguments: &str, word: &str) {
    let failed = attempt!("$qcow2fs mount {arguments}");
    assert_eq!(failed.code, Some(1), "mount {arguments}: {}", failed.text());
    assert!(failed.err.contains(word), "mount {arguments} does not say {word}: {}", failed.text());
    assert!(!is_mounted(&lab.point()));
}

#[test]
fn mounts_that_cannot_work_say_why_and_fail() {
    let lab = Lab::new();
    lab.create("disk.qcow2", "8M", "");
    let (images, point) = (lab.images().display().to_string(), lab.point().display().to_string());
    assert_mount_fails(&lab, &format!("-o frobnicate {images} {point}"), "frobnicate");
    assert_mount_fails(&lab, &format!("{images}-missing {point}"), "images-missing");
    assert_mount_fails(&lab, &format!("{images} {point}/missing"), "missing");
    assert_mount_fails(&lab, &format!("{images} {images}"), "images");
    sh!("mkdir -p {point}/keys && echo secret >{point}/keys/disk.key");
    for keys in ["--keys keys", "--key-file disk=keys/disk.key", "-o keys=keys"] {
        let refused = attempt!(
            "cd {point} && timeout 20 $qcow2fs mount {keys} {images} {point} || \
             {{ code=$?; umount -l {point} 2>&1 || true; exit $code; }}"
        );
        assert!(refused.code == Some(1) && refused.err.contains("would hide it"), "{refused:?}");
    }
    lab.subdirectory("images/inside");
    assert_mount_fails(&lab, &format!("{images} {images}/inside"), "inside");
}

#[test]
fn a_mount_within_its_images_is_refused_under_any_name() {
    let lab = Lab::new();
    let (alias, inner) = (lab.subdirectory("alias"), lab.subdirectory("images/inner"));
    let (images, inner) = (lab.images(), inner.file_name().unwrap().to_owned());
    sh!("mount --bind {} {}", images.display(), alias.display());
    let place = alias.join(inner);
    let refused = attempt!("timeout 10 $qcow2fs mount {} {}", images.display(), place.display());
    attempt!("umount -l {}", place.display());
    sh!("umount -l {}", alias.display());
    assert_eq!(refused.code, Some(1), "{}", refused.text());
    assert!(refused.err.contains("beneath"), "{}", refused.text());
}

#[test]
fn sigterm_unmounts_cleanly() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let mount = lab.mount();
    let data = pattern(5, 2 << 20);
    write_by_dd(&mount.path("disk.raw"), &data);
    signal(mount.pid(), libc::SIGTERM);
    wait_for_end(mount.pid());
    assert!(!is_mounted(mount.point()), "the mount is still there");
    assert_same(&guest_bytes(&image)[..2 << 20], &data, "after SIGTERM");
    assert_sound(&image);
}

#[test]
fn the_daemon_keeps_nothing_open_that_it_was_started_with() {
    let lab = Lab::new();
    let (inherited, log) = (lab.path("inherited"), lab.path("log"));
    let (images, point) = (lab.images(), lab.point());
    sh!(
        "exec 7>{0} 200>{0}; $qcow2fs mount --log-file {1} {2} {3}",
        inherited.display(),
        log.display(),
        images.display(),
        point.display()
    );
    let mount = Mount::adopt(point, log);
    let links = fs::read_dir(format!("/proc/{}/fd", mount.pid())).unwrap();
    let open: Vec<_> = links.map(|link| fs::read_link(link.unwrap().path()).unwrap()).collect();
    assert!(open.contains(&PathBuf::from("/dev/fuse")), "{open:?}");
    assert!(!open.contains(&inherited), "{open:?}");
    mount.umount();
}

#[test]
fn the_log_tells_of_each_request_only_when_it_tells_everything() {
    for (flags, tells) in [("-v", false), ("-vv", true)] {
        let lab = Lab::new();
        // One more `-v` is there already.
        let mount = lab.mount_with(flags);
        mount.status();
        assert_eq!(mount.log().contains("fuser"), tells, "-v {flags}: {}", mount.log());
        mount.umount();
    }
}

#[test]
fn a_busy_mount_stays_and_serves() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let mount = lab.mount();
    let file = open(&mount.path("disk.raw"));
    file.write_all_at(b"before", 0).unwrap();
    let busy = attempt!("$qcow2fs umount {}", mount.point().display());
    assert!(!busy.ok(), "a busy mount was unmounted");
    assert!(busy.err.contains("busy"), "umount does not say why: {}", busy.text());
    signal(mount.pid(), libc::SIGTERM);
    // Not before it has given up waiting for the file to be closed.
    let stays = || mount.log().contains("is busy, still serving it");
    eventually(Duration::from_secs(30), stays, || mount.log());
    file.write_all_at(b"served", 0).unwrap();
    let mut found = [0; 6];
    file.read_exact_at(&mut found, 0).unwrap();
    assert_eq!(&found, b"served");
    drop(file);
    mount.umount();
    assert_eq!(&guest_bytes(&image)[..6], b"served");
    assert_sound(&image);
}

#[test]
fn a_second_sigterm_saves_everything_and_goes() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let mount = lab.mount();
    let file = open(&mount.path("disk.raw"));
    let data = pattern(6, 2 << 20);
    file.write_all_at(&data, 0).unwrap();
    signal(mount.pid(), libc::SIGTERM);
    std::thread::sleep(Duration::from_millis(500));
    signal(mount.pid(), libc::SIGTERM);
    wait_for_end(mount.pid());
    drop(file);
    assert_same(&guest_bytes(&image)[..2 << 20], &data, "after two SIGTERMs");
    assert_sound(&image);
}

/// Writes the `index`th 4 KiB of each 32 until that fails; how many there were.
fn write_on(file: &File, index: u64, one: &[u8]) -> u64 {
    (0..).take_while(|n| file.write_all_at(one, (n * 8 + index) * 4096).is_ok()).count() as u64
}

#[test]
fn what_was_acknowledged_before_the_second_sigterm_is_in_the_image() {
    const WRITERS: u64 = 4;
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "64G", "");
    let mount = lab.mount();
    let files: Vec<File> = (0..WRITERS).map(|_| open(&mount.path("disk.raw"))).collect();
    let one = pattern(8, 4096);
    let written: Vec<u64> = thread::scope(|scope| {
        let one = &one;
        let write = |(index, file)| scope.spawn(move || write_on(file, index, one));
        let writers: Vec<_> = (0..).zip(&files).map(write).collect();
        signal(mount.pid(), libc::SIGTERM);
        let stays = || mount.log().contains("is busy, still serving it");
        eventually(Duration::from_secs(30), stays, || mount.log());
        signal(mount.pid(), libc::SIGTERM);
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    wait_for_end(mount.pid());
    drop(files);
    assert!(written.iter().all(|count| *count > 0), "{written:?}");
    assert_sound(&image);
    let again = lab.mount();
    let file = open(&again.path("disk.raw"));
    for (index, count) in (0..).zip(written) {
        for n in 0..count {
            let mut found = vec![0; one.len()];
            file.read_exact_at(&mut found, (n * 8 + index) * 4096).unwrap();
            assert_same(&found, &one, &format!("write {n} of {count} by writer {index}"));
        }
    }
    drop(file);
    again.umount();
}

#[test]
fn the_end_of_one_mount_leaves_others_in_its_place_alone() {
    let lab = Lab::new();
    lab.create("below.qcow2", "1M", "");
    let below = lab.mount();
    let over = lab.subdirectory("over");
    sh!("qemu-img create -q -f qcow2 {}/over.qcow2 1M", over.display());
    let (point, log) = (lab.point(), lab.path("log-over"));
    sh!("$qcow2fs mount --log-file {} {} {}", log.display(), over.display(), point.display());
    let over = Mount::adopt(point.clone(), log);

    signal(below.pid(), libc::SIGTERM);
    std::thread::sleep(Duration::from_millis(500));
    assert!(alive(below.pid()), "it ended though its mount is still there");
    assert!(point.join("over.raw").exists(), "it unmounted what was mounted over it");

    sh!("umount {}", point.display());
    wait_for_end(over.pid());
    assert!(point.join("below.raw").exists(), "what ended unmounted what was below it");
    below.umount();
}

#[test]
fn a_foreground_daemon_serves_until_it_is_unmounted() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let mut daemon = std::process::Command::new(PROGRAM)
        .args(["mount", "--foreground"])
        .args([lab.images(), lab.point()])
        .spawn()
        .unwrap();
    let mounted = || is_mounted(&lab.point());
    eventually(Duration::from_secs(10), mounted, || "the foreground mount is not there".into());
    let mount = Mount::adopt(lab.point(), lab.path("log"));
    assert_eq!(mount.pid(), daemon.id() as i32, "it did not stay in the foreground");
    write_by_dd(&mount.path("disk.raw"), b"here");
    sh!("umount {}", mount.point().display());
    let mut code = None;
    let mut ended = || {
        code = daemon.try_wait().unwrap();
        code.is_some()
    };
    eventually(Duration::from_secs(20), &mut ended, || "the daemon does not end".into());
    assert!(code.is_some_and(|code| code.success()), "it ended with {code:?}");
    assert_sound(&image);
}

#[test]
fn what_is_hidden_cannot_be_changed() {
    let lab = Lab::new();
    let mount = lab.mount();
    let (hidden, status) = (mount.path(".qcow2fs"), mount.path(".qcow2fs/status"));
    let missing = fs::metadata(hidden.join("missing")).map(drop);
    assert_eq!(missing.unwrap_err().raw_os_error(), Some(libc::ENOENT));
    let (mode, times) = (fs::Permissions::from_mode(0o600), fs::FileTimes::new());
    for refused in [
        fs::set_permissions(&status, mode),
        File::open(&status).unwrap().set_times(times.set_modified(std::time::UNIX_EPOCH)),
        fs::remove_file(&status),
        fs::create_dir(hidden.join("new")),
    ] {
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EPERM));
    }
    mount.umount();
}

#[test]
fn status_names_what_is_open() {
    let lab = Lab::new();
    lab.create("disk.qcow2", "8M", "");
    let mount = lab.mount();
    assert_eq!(mount.status()["images"].as_array().map(Vec::len), Some(0));
    let file = File::open(mount.path("disk.raw")).unwrap();
    let status = mount.status();
    let image = &status["images"][0];
    assert!(image["name"].as_str().is_some_and(|name| name.contains("disk")), "{status}");
    assert_eq!(image["virtual_size"].as_u64(), Some(8 << 20), "{status}");
    assert_eq!(image["health"].as_str(), Some("ok"), "{status}");
    let text = attempt(&format!("$qcow2fs status {}", mount.point().display()));
    assert!(text.ok() && text.out.contains("disk"), "{}", text.text());
    assert!(!sh!("ls -a {}", mount.point().display()).contains(".qcow2fs"), "not hidden");
    drop(file);
    mount.umount();
}
