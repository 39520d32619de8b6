//! When memory is short: what is written to a loop device on the mount gets there, and nobody waits
//! for himself.

use std::fs;
use std::path::{Path, PathBuf};

use crate::devices::{FileSystem, LoopDevice};
use crate::lab::{Lab, Mount, assert_sound};

const MIB: u64 = 1 << 20;
/// Far less than what is written.
const LIMIT: u64 = 32 * MIB;
/// What the daemon is given where it may be limited: its caches, and some pages of images.
const DAEMON_LIMIT: u64 = 128 * MIB;
const WRITTEN: u64 = 160 * MIB;
/// Bits of the flags in `/proc/PID/stat` that make a thread an I/O flusher: `PF_MEMALLOC_NOIO` and
/// `PF_LOCAL_THROTTLE` of the kernel's `sched.h`.
const IO_FLUSHER: u64 = 0x0008_0000 | 0x0010_0000;
/// Which of the fields after the name has them.
const FLAGS: usize = 6;

/// A memory cgroup: who is in it has no more than its limit, pages that wait to be written included.
struct Group(PathBuf);

impl Group {
    /// One of version 1 or 2, whichever this machine has; `None` says why not on standard output.
    fn new(name: &str, limit: u64) -> Option<Group> {
        let name = format!("qcow2fs-test-{}-{name}", std::process::id());
        let roots =
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        for (root, file) in roots {
            let group = Path::new(root).join(&name);
            if !Path::new(root).join("cgroup.procs").exists() || fs::create_dir(&group).is_err() {
                continue;
            }
            let group = Group(group);
            if fs::write(group.0.join(file), limit.to_string()).is_ok() {
                return Some(group);
            }
        }
        println!("skipped: there is no memory cgroup to be had");
        None
    }

    fn processes(&self) -> PathBuf {
        self.0.join("cgroup.procs")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Who is in it goes back to all others first.
        let root = self.0.parent().unwrap().join("cgroup.procs");
        for process in fs::read_to_string(self.processes()).unwrap_or_default().lines() {
            let _gone_by_now = fs::write(&root, process);
        }
        let _ = fs::remove_dir(&self.0);
    }
}

/// Whether all threads of a process are I/O flushers, or none is.
fn is_io_flusher(pid: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let flags = threads.map(|thread| {
        let stat = fs::read_to_string(thread.unwrap().path().join("stat")).unwrap();
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        fields.split(' ').nth(FLAGS).unwrap().parse::<u64>().unwrap() & IO_FLUSHER == IO_FLUSHER
    });
    let flags: Vec<bool> = flags.collect();
    assert!(flags.windows(2).all(|pair| pair[0] == pair[1]), "{flags:?}");
    flags[0]
}

fn has_capability() -> bool {
    const SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap() >> SYS_RESOURCE & 1 == 1
}

#[test]
fn the_daemon_is_an_io_flusher_where_it_may_and_says_so() {
    for arguments in ["", "--unconfined all"] {
        let lab = Lab::new();
        lab.create("disk.qcow2", "1M", "");
        let mount = lab.mount_with(arguments);
        let expected = has_capability();
        assert_eq!(is_io_flusher(mount.pid()), expected, "{arguments}");
        assert_eq!(mount.status()["io_flusher"], expected, "{arguments}");
        let page = sh!("$qcow2fs status {}", mount.point().display());
        assert_eq!(page.contains("without CAP_SYS_RESOURCE"), !expected, "{page}");
        mount.umount();
    }
}

/// Writes far more than the group may have, and reads it back, beside a daemon that may be limited
/// itself.
fn fill(lab: &Lab, mount: &Mount, group: &Group, direct_io: bool) {
    let device = LoopDevice::with_direct_io(&mount.path("disk.raw"), direct_io);
    sh!("mkfs.ext4 -q {}", device.path().display());
    let mounted = FileSystem::mount(device.path(), lab.subdirectory("fs"));
    let (place, procs) = (mounted.point().join("file"), group.processes());
    let (place, procs) = (place.display(), procs.display());
    let written = sh!(
        "echo $$ >{procs}; head -c {WRITTEN} /dev/urandom | tee {place} | sha256sum; sync {place}"
    );
    mounted.umount();
    let mounted = FileSystem::mount(device.path(), lab.path("fs"));
    let found = sh!("echo $$ >{procs}; sha256sum <{place}");
    assert_eq!(written, found);
    mounted.umount();
    sh!("e2fsck -fn {}", device.path().display());
    device.detach();
}

#[test]
fn a_loop_device_is_written_though_memory_is_short() {
    let Some(group) = Group::new("client", LIMIT) else { return };
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "512M", "");
    let mount = lab.mount();
    // Without the capability nobody promises that it gets on.
    let daemons = if has_capability() { Group::new("daemon", DAEMON_LIMIT) } else { None };
    match &daemons {
        Some(daemons) => fs::write(daemons.processes(), mount.pid().to_string()).unwrap(),
        None => println!("skipped: the daemon itself short of memory (no CAP_SYS_RESOURCE)"),
    }
    for direct_io in [true, false] {
        fill(&lab, &mount, &group, direct_io);
    }
    mount.umount();
    assert_sound(&image);
}
