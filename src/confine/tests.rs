//! What a confined thread tries in vain. All that is given up belongs to the thread, so the other
//! tests keep it.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;

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
        // And what it does make works.
        std::thread::spawn(|| vec![0u8; 64 << 20]).join().unwrap();
    });
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
