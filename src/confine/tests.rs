//! What a confined thread tries in vain. All that is given up belongs to the thread, so the other
//! tests keep it.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown, fchown, lchown};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, XattrFlags};

use super::*;

/// Runs `attempts` in a thread of its own, confined to `places`.
fn confined(without: &[Layer], places: Vec<Place>, attempts: impl FnOnce(Report) + Send) {
    std::thread::scope(|scope| {
        let run = || attempts(give_up(without, &places, false));
        // Its own message says what went wrong.
        scope.spawn(run).join().unwrap();
    });
}

fn errno(result: io::Result<impl Sized>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

/// What a system call without pointers says.
fn call(number: libc::c_long, arguments: [libc::c_long; 5]) -> io::Result<libc::c_long> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: the callers pass nothing that the kernel would take for an address in use.
    match unsafe { libc::syscall(number, a, b, c, d, e) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

fn on(state: &str) -> bool {
    if state != ON {
        println!("not tried on this machine: {state}");
    }
    state == ON
}

#[test]
fn files_elsewhere_are_out_of_reach() {
    let directory = tempfile::tempdir().unwrap();
    let [inside, other, read_only] = ["inside", "other", "read-only"].map(|name| {
        fs::create_dir(directory.path().join(name)).unwrap();
        fs::write(directory.path().join(name).join("file"), "text").unwrap();
        directory.path().join(name)
    });
    let places = vec![
        Place { path: inside.clone(), write: true },
        Place { path: read_only.clone(), write: false },
    ];
    confined(&[Layer::Capabilities, Layer::Seccomp], places, |report| {
        if !on(&report.landlock) {
            return;
        }
        let denied = Some(libc::EACCES);
        assert_eq!(errno(File::open("/etc/passwd")), denied);
        assert_eq!(errno(File::open(other.join("file"))), denied);
        assert_eq!(errno(fs::read_dir("/")), denied);
        assert_eq!(errno(fs::write(other.join("new"), "")), denied);
        assert_eq!(errno(fs::read(read_only.join("file"))), None);
        assert_eq!(errno(fs::write(read_only.join("file"), "")), denied);
        assert_eq!(errno(fs::write(inside.join("new"), "text")), None);
        assert_eq!(errno(fs::rename(inside.join("new"), inside.join("newer"))), None);
        assert_eq!(errno(fs::create_dir(inside.join("directory"))), None);
        assert_eq!(errno(fs::rename(inside.join("newer"), inside.join("directory/new"))), None);
        // Out of it, by whatever name.
        let out = errno(fs::rename(inside.join("file"), other.join("gone")));
        assert!(matches!(out, Some(libc::EACCES | libc::EXDEV)), "{out:?}");
        assert!(fs::hard_link(other.join("file"), inside.join("link")).is_err());
        assert_eq!(errno(std::os::unix::fs::symlink("/etc", inside.join("link"))), denied);
        let path = CString::new(inside.join("fifo").as_os_str().as_bytes()).unwrap();
        // SAFETY: the path ends in NUL.
        assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, -1);
        assert!(Command::new("/bin/true").status().is_err(), "a program was started");
        assert!(TcpListener::bind("127.0.0.1:0").is_err(), "a port was opened");
    });
    assert!(!Path::new(&inside).join("link").exists());
}

#[test]
fn system_calls_that_serving_does_not_make_fail() {
    confined(&[Layer::Capabilities, Layer::Landlock], Vec::new(), |report| {
        assert_eq!(report.landlock, SWITCHED_OFF);
        if !on(&report.seccomp) {
            return;
        }
        let forbidden = Some(libc::EPERM);
        assert_eq!(errno(Command::new("/bin/true").status()), forbidden);
        assert_eq!(errno(TcpListener::bind("127.0.0.1:0")), forbidden);
        for (what, number) in [
            ("ptrace", libc::SYS_ptrace),
            ("mount", libc::SYS_mount),
            ("umount2", libc::SYS_umount2),
            ("unshare", libc::SYS_unshare),
            ("setns", libc::SYS_setns),
            ("setuid", libc::SYS_setuid),
            ("kill", libc::SYS_kill),
            ("io_uring_setup", libc::SYS_io_uring_setup),
            ("bpf", libc::SYS_bpf),
            ("keyctl", libc::SYS_keyctl),
            ("init_module", libc::SYS_init_module),
            ("process_vm_readv", libc::SYS_process_vm_readv),
            ("open_by_handle_at", libc::SYS_open_by_handle_at),
            ("execveat", libc::SYS_execveat),
            ("memfd_create", libc::SYS_memfd_create),
            ("personality", libc::SYS_personality),
            ("socket", libc::SYS_socket),
            ("connect", libc::SYS_connect),
            ("sendto", libc::SYS_sendto),
            ("sendmsg", libc::SYS_sendmsg),
            ("fchmodat", libc::SYS_fchmodat),
            ("fchmodat2", libc::SYS_fchmodat2),
            ("fchownat", libc::SYS_fchownat),
            ("utimensat", libc::SYS_utimensat),
        ] {
            assert_eq!(errno(call(number, [-1; 5])), forbidden, "{what}");
        }
        // As on an older kernel, whatever this one has.
        for newer in [453, 470, 1 << 20, 0x4000_0001] {
            assert_eq!(errno(call(newer, [-1; 5])), Some(libc::ENOSYS), "{newer}");
        }
        let (page, code) = (4096, libc::c_long::from(libc::PROT_READ | libc::PROT_EXEC));
        let private = libc::c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        assert_eq!(errno(call(libc::SYS_mmap, [0, page, code, private, -1])), forbidden);
        // What it is asked for cannot be seen; the C library goes on with `clone`.
        assert_eq!(errno(call(libc::SYS_clone3, [-1; 5])), Some(libc::ENOSYS));
        // And what it does make works.
        std::thread::spawn(|| vec![0u8; 64 << 20]).join().unwrap();
    });
}

#[test]
fn neither_processes_nor_namespaces_are_made() {
    confined(&[Layer::Capabilities, Layer::Landlock], Vec::new(), |report| {
        if !on(&report.seccomp) {
            return;
        }
        for (what, namespaces) in [
            ("none", 0),
            ("mounts", libc::CLONE_NEWNS),
            ("cgroups", libc::CLONE_NEWCGROUP),
            ("names", libc::CLONE_NEWUTS),
            ("IPC", libc::CLONE_NEWIPC),
            ("users", libc::CLONE_NEWUSER),
            ("processes", libc::CLONE_NEWPID),
            ("network", libc::CLONE_NEWNET),
            ("users and network", libc::CLONE_NEWUSER | libc::CLONE_NEWNET),
        ] {
            assert_eq!(errno(fork_into(namespaces)), Some(libc::EPERM), "{what}");
            // A thread with them: the kernel knows of none, but the filter comes first.
            if namespaces != 0 {
                let flags = namespaces | libc::CLONE_THREAD;
                let thread = call(libc::SYS_clone, [flags.into(), 0, 0, 0, 0]);
                assert_eq!(errno(thread), Some(libc::EPERM), "{what}");
            }
        }
    });
}

/// Makes a process that ends at once, in new namespaces of these kinds.
fn fork_into(namespaces: libc::c_int) -> io::Result<()> {
    match call(libc::SYS_clone, [libc::c_long::from(namespaces | libc::SIGCHLD), 0, 0, 0, 0])? {
        // SAFETY: _exit does not return; nothing of the parent's is run or flushed.
        0 => unsafe { libc::_exit(0) },
        // To be seen where the filter lets it pass.
        _ => Ok(()),
    }
}

/// A file and a directory.
fn file_and_directory(at: &Path) -> [PathBuf; 2] {
    let [file, directory] = [at.join("file"), at.join("directory")];
    fs::write(&file, "text").unwrap();
    fs::create_dir(&directory).unwrap();
    [file, directory]
}

fn times() -> Timestamps {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    Timestamps { last_access: now, last_modification: now }
}

/// What fails of the ways to change attributes of what has this name.
fn changes_by_name(path: &Path) -> Vec<(&'static str, Option<i32>)> {
    let set = XattrFlags::empty();
    let name = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the path ends in NUL.
    let utime = match unsafe { libc::utimes(name.as_ptr(), std::ptr::null()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    vec![
        ("chmod", errno(fs::set_permissions(path, PermissionsExt::from_mode(0o777)))),
        ("chown", errno(chown(path, Some(1), Some(1)))),
        ("lchown", errno(lchown(path, Some(1), Some(1)))),
        ("fchownat", errno(of(rustix::fs::chownat(CWD, path, None, None, AtFlags::empty())))),
        ("utimensat", errno(of(rustix::fs::utimensat(CWD, path, &times(), AtFlags::empty())))),
        ("utimes", errno(utime)),
        ("setxattr", errno(of(rustix::fs::setxattr(path, "user.x", b"y", set)))),
        ("lsetxattr", errno(of(rustix::fs::lsetxattr(path, "user.x", b"y", set)))),
        ("removexattr", errno(of(rustix::fs::removexattr(path, "user.x")))),
        ("lremovexattr", errno(of(rustix::fs::lremovexattr(path, "user.x")))),
    ]
}

/// What fails of the ways to change attributes of what is open.
fn changes_by_descriptor(file: &File) -> Vec<(&'static str, Option<i32>)> {
    let uid = rustix::process::geteuid().as_raw();
    vec![
        ("fchmod", errno(file.set_permissions(PermissionsExt::from_mode(0o750)))),
        ("fchown", errno(fchown(file, Some(uid), None))),
        ("futimens", errno(of(rustix::fs::futimens(file, &times())))),
        ("fsetxattr", errno(of(rustix::fs::fsetxattr(file, "user.x", b"y", XattrFlags::empty())))),
        ("fgetxattr", errno(of(rustix::fs::fgetxattr(file, "user.x", &mut [0_u8; 9][..])))),
        ("fremovexattr", errno(of(rustix::fs::fremovexattr(file, "user.x")))),
    ]
}

fn of<T>(result: rustix::io::Result<T>) -> io::Result<T> {
    Ok(result?)
}

#[test]
fn attributes_change_of_what_is_open_only() {
    let directory = tempfile::tempdir().unwrap();
    let [inside, outside] = ["inside", "outside"].map(|name| {
        fs::create_dir(directory.path().join(name)).unwrap();
        directory.path().join(name)
    });
    let [inside_all, outside_all] = [&inside, &outside].map(|at| file_and_directory(at));
    let modes = || outside_all.each_ref().map(|path| fs::metadata(path).unwrap().permissions());
    let before = modes();
    let places = vec![Place { path: inside, write: true }];
    confined(&[Layer::Capabilities], places, |report| {
        if !on(&report.seccomp) {
            return;
        }
        for path in inside_all.iter().chain(&outside_all) {
            for (what, failed) in changes_by_name(path) {
                assert_eq!(failed, Some(libc::EPERM), "{what} {}", path.display());
            }
        }
        for path in &inside_all {
            for (what, failed) in changes_by_descriptor(&File::open(path).unwrap()) {
                assert_eq!(failed, None, "{what} {}", path.display());
            }
        }
        for path in &outside_all {
            // What is only a place is anywhere, and nothing changes by it.
            let place = File::options().read(true).custom_flags(libc::O_PATH).open(path).unwrap();
            for (what, failed) in changes_by_descriptor(&place) {
                assert_eq!(failed, Some(libc::EBADF), "{what} {}", path.display());
            }
            if on(&report.landlock) {
                assert_eq!(errno(File::open(path)), Some(libc::EACCES));
                assert_eq!(errno(File::open(by_descriptor(&place))), Some(libc::EACCES));
            }
        }
    });
    assert_eq!(modes(), before);
}

fn by_descriptor(file: &File) -> PathBuf {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

#[test]
fn only_sockets_that_are_connected_by_then_reach_anybody() {
    let directory = tempfile::tempdir().unwrap();
    let [log, other, stream] = ["log", "other", "stream"].map(|name| directory.path().join(name));
    let [log_end, other_end] = [&log, &other].map(|path| UnixDatagram::bind(path).unwrap());
    let _listener = UnixListener::bind(&stream).unwrap();
    let [connected, unconnected] = [(), ()].map(|()| UnixDatagram::unbound().unwrap());
    connected.connect(&log).unwrap();
    confined(&[Layer::Capabilities, Layer::Landlock], Vec::new(), |report| {
        if !on(&report.seccomp) {
            return;
        }
        let forbidden = Some(libc::EPERM);
        assert_eq!(errno(UnixStream::connect(&stream)), forbidden);
        assert_eq!(errno(UnixDatagram::unbound()), forbidden);
        assert_eq!(errno(unconnected.connect(&other)), forbidden);
        for socket in [&unconnected, &connected] {
            assert_eq!(errno(socket.send_to(b"text", &other)), forbidden);
        }
        assert_eq!(errno(connected.send(b"text")), None);
    });
    let mut text = [0; 9];
    assert_eq!(log_end.recv(&mut text).unwrap(), 4);
    other_end.set_nonblocking(true).unwrap();
    assert_eq!(errno(other_end.recv(&mut text)), Some(libc::EAGAIN));
}

#[test]
fn capabilities_are_gone_for_good() {
    // SAFETY: geteuid takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        println!("not tried: only root has any");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    std::os::unix::fs::chown(&file, Some(1), Some(1)).unwrap();
    let only = [Layer::NoNewPrivs, Layer::Landlock, Layer::Seccomp];
    confined(&only, Vec::new(), |report| {
        assert_eq!(report.capabilities, ON);
        assert!(report.seccomp.contains("switched off"), "{}", report.seccomp);
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        let sets = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap()
        };
        // CHOWN, DAC_OVERRIDE, FOWNER, FSETID.
        let left = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4;
        for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
            assert_eq!(sets(set) & !left, 0, "{set} {:#x}", sets(set));
        }
        assert_eq!(errno(call(libc::SYS_sethostname, [0; 5])), Some(libc::EPERM));
        assert_eq!(errno(call(libc::SYS_setuid, [7; 5])), Some(libc::EPERM));
        // Other people's images are still served.
        fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        assert_eq!(errno(fs::read(&file)), None);
        std::os::unix::fs::chown(&file, Some(2), Some(2)).unwrap();
    });
}

#[test]
fn layers_are_named_and_found() {
    for layer in Layer::ALL {
        assert_eq!(Layer::parse(layer.name()), Ok(&[*layer][..]));
    }
    assert_eq!(Layer::parse("no-new-privs"), Ok(&[Layer::NoNewPrivs][..]));
    assert_eq!(Layer::parse("all"), Ok(Layer::ALL));
    assert!(Layer::parse("selinux").unwrap_err().contains("landlock, seccomp"));
}
