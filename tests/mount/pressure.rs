//! Too little memory: a file system on a loop device on our mount has its pages written back by the
//! daemon, which must get on without waiting for that itself.

use std::fs;
use std::path::{Path, PathBuf};

use crate::devices::{FileSystem, LoopDevice};
use crate::lab::{Lab, assert_sound, pattern};

/// `PF_MEMALLOC_NOIO` and `PF_LOCAL_THROTTLE` of `linux/sched.h`: what `PR_SET_IO_FLUSHER` sets.
const FLUSHER: u64 = 0x0008_0000 | 0x0010_0000;

#[test]
fn every_thread_of_the_daemon_is_one_that_writes_back() {
    let lab = Lab::new();
    let mount = lab.mount();
    let threads = fs::read_dir(format!("/proc/{}/task", mount.pid())).unwrap();
    let flags: Vec<u64> = threads
        .map(|thread| fs::read_to_string(thread.unwrap().path().join("stat")).unwrap())
        // proc_pid_stat(5): the ninth field, the seventh after the name in parentheses.
        .map(|stat| stat.rsplit(')').next().unwrap().split_whitespace().nth(6).unwrap().to_owned())
        .map(|flags| flags.parse().unwrap())
        .collect();
    assert!(flags.len() > 8, "{flags:x?}");
    assert!(flags.iter().all(|flags| flags & FLUSHER == FLUSHER), "{flags:x?}");
    mount.umount();
}

/// A memory cgroup of either version; `None` where there is none to be had.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn new(bytes: u64) -> Option<MemoryGroup> {
        let name = format!("qcow2fs-test-{}", std::process::id());
        let root = Path::new("/sys/fs/cgroup");
        // Fails where it is on already, or not to be had.
        let _ = fs::write(root.join("cgroup.subtree_control"), "+memory");
        let kinds =
            [(root.join("memory"), "memory.limit_in_bytes"), (root.to_owned(), "memory.max")];
        kinds.into_iter().find_map(|(parent, limit)| {
            // Anywhere else it would be an ordinary directory.
            if !parent.join("cgroup.procs").exists() {
                return None;
            }
            fs::create_dir(parent.join(&name)).ok()?;
            let group = MemoryGroup(parent.join(&name));
            fs::write(group.0.join(limit), bytes.to_string()).ok().map(|()| group)
        })
    }

    fn add(&self, pid: i32) {
        fs::write(self.procs(), pid.to_string()).unwrap();
    }

    fn procs(&self) -> PathBuf {
        self.0.join("cgroup.procs")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_file_system_on_a_loop_device_is_written_back_with_little_memory() {
    const MIB: u64 = 1 << 20;
    // What is written is three times as much as there is memory for it.
    const MEMORY: u64 = 64 * MIB;
    let lab = Lab::new();
    // On tmpfs itself the image would be in that memory, too.
    let host = lab.path("host");
    sh!("truncate -s 400M {0} && mkfs.ext4 -q {0}", host.display());
    let host_device = LoopDevice::attach(&host, "");
    let host = FileSystem::mount(host_device.path(), lab.subdirectory("images/host"));
    let image = lab.create("host/disk.qcow2", "300M", "");
    let source = lab.path("source");
    fs::write(&source, pattern(1, (3 * MEMORY) as usize)).unwrap();

    let mount = lab.mount();
    // Through the page cache, on all levels.
    let device = LoopDevice::with_direct_io(&mount.path("host/disk.raw"), false);
    sh!("mkfs.ext4 -q {}", device.path().display());
    let filesystem = FileSystem::mount(device.path(), lab.subdirectory("fs"));
    let group = MemoryGroup::new(MEMORY);
    let enter = match &group {
        None => {
            println!("no memory cgroup is to be had: nothing is short");
            String::new()
        }
        Some(group) => {
            group.add(mount.pid());
            format!("echo $$ >{}", group.procs().display())
        }
    };
    let target = filesystem.point().join("file");
    let (from, to) = (source.display(), target.display());
    // Whatever takes too long is killed, and fails.
    sh!("{enter}\n dd if={from} of={to} bs=1M conv=fsync status=none; cmp {from} {to}");
    filesystem.umount();
    let filesystem = FileSystem::mount(device.path(), lab.path("fs"));
    sh!("cmp {from} {to}");
    filesystem.umount();
    device.detach();
    mount.umount();
    drop(group);
    assert_sound(&image);
    host.umount();
    host_device.detach();
}
