//! Seccomp: the system calls that serving a mount makes.

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

/// What is allowed with any arguments, on every machine.
const ALLOWED: &[c_long] = &[
    // Reading and writing what is open.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_splice,
    libc::SYS_copy_file_range,
    libc::SYS_lseek,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fadvise64,
    libc::SYS_flock,
    libc::SYS_fcntl,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    // Files and directories by name; Landlock says which.
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_chdir,
    libc::SYS_umask,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_linkat,
    libc::SYS_renameat2,
    libc::SYS_getxattr,
    libc::SYS_listxattr,
    // Attributes of what is open: Landlock minds no change of them, but what is opened.
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fsetxattr,
    libc::SYS_fremovexattr,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    // Threads and time.
    // Which another filter answers.
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_futex,
    libc::SYS_membarrier,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_setpriority,
    libc::SYS_getcpu,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    // Signals.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_wait4,
    // Who and where this process is.
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrusage,
    libc::SYS_getrandom,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_capget,
    // The process that this one asks.
    libc::SYS_recvfrom,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
];

/// The older ways to say the same, which this machine has besides.
#[cfg(target_arch = "x86_64")]
const OLDER: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_dup2,
    libc::SYS_pipe,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_unlink,
    libc::SYS_link,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_time,
    libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[c_long] = &[libc::SYS_renameat];

/// What new threads have in common with the one that starts them: the process. A new one would outlive
/// this one, and one in namespaces of its own would have all capabilities there.
const OF_THREADS: libc::c_int = libc::CLONE_THREAD;
const OF_NAMESPACES: libc::c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

/// Of what a terminal is asked for, how wide it is and whether it is one.
const TERMINAL: [libc::Ioctl; 2] = [libc::TCGETS, libc::TIOCGWINSZ];

/// Tells the kernel of a file that it is to read and write itself, and that it need not any more:
/// `FUSE_DEV_IOC_BACKING_OPEN` and `_CLOSE` of linux/fuse.h.
const PASSTHROUGH: [libc::Ioctl; 2] = [libc::_IOW::<[u64; 2]>(229, 1), libc::_IOW::<u32>(229, 2)];

/// The last system call that was there when the list was made, `fchmodat2` of Linux 6.6: from 424 on
/// they have the same numbers on all machines.
const NEWEST: u32 = 452;

/// From now on all other system calls of this thread, and of those that it starts, fail with `EPERM`,
/// or with `ENOSYS` where they are newer than the list. The kernel's log names them.
///
/// # Errors
/// A line that says what failed.
pub(super) fn restrict(passthrough: bool) -> Result<(), String> {
    seccompiler::apply_filter(&without_clone3()).map_err(|e| e.to_string())?;
    let program = program(passthrough).map_err(|e| e.to_string())?;
    match apply_logged(&program) {
        // Linux before 4.14 does not know the flag.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            seccompiler::apply_filter(&program).map_err(|e| e.to_string())
        }
        done => done.map_err(|e| e.to_string()),
    }
}

/// Has the kernel log what it refuses.
fn apply_logged(program: &BpfProgram) -> io::Result<()> {
    let length = program.len().try_into().map_err(io::Error::other)?;
    // The two types are one structure of the kernel, which reads it alone.
    let filter = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut().cast() };
    let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_LOG);
    // SAFETY: the program and the structure that leads to it live through the call, which copies them;
    // each instruction is as the kernel defines it (`struct sock_filter`).
    match unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const filter) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn program(passthrough: bool) -> Result<BpfProgram, seccompiler::BackendError> {
    let machine = TargetArch::try_from(std::env::consts::ARCH)?;
    let forbidden = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(rules(passthrough)?, forbidden, SeccompAction::Allow, machine)?;
    let listed: BpfProgram = filter.try_into()?;
    Ok(unknown(libc::BPF_JGT, NEWEST).into_iter().chain(listed).collect())
}

/// What comes first in a filter: calls whose number compares so to `number` are as if the kernel did not
/// know them. Jumps are relative, so what follows is not touched.
fn unknown(comparison: u32, number: u32) -> [sock_filter; 3] {
    /// `offsetof(struct seccomp_data, nr)`.
    const NUMBER: u32 = 0;
    let unknown = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, NUMBER),
        step(libc::BPF_JMP | comparison | libc::BPF_K, 0, 1, number),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, unknown),
    ]
}

/// A filter of its own, which the kernel does not log: C libraries try `clone3` for each thread, and use
/// `clone` where it is not known. What it is asked for lies in memory, where no filter looks.
fn without_clone3() -> BpfProgram {
    let others = step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW);
    unknown(libc::BPF_JEQ, libc::SYS_clone3 as u32).into_iter().chain([others]).collect()
}

fn step(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn rules(passthrough: bool) -> Result<Rules, seccompiler::BackendError> {
    let mut rules: Rules = ALLOWED.iter().chain(OLDER).map(|call| (*call, Vec::new())).collect();
    let mut only = |call: c_long, argument: u8, rule: SeccompCmpOp, values: &[u64]| {
        let one = |value: &u64| {
            let width = SeccompCmpArgLen::Dword;
            SeccompRule::new(vec![SeccompCondition::new(argument, width, rule.clone(), *value)?])
        };
        let any = values.iter().map(one).collect::<Result<Vec<_>, _>>()?;
        rules.insert(call, any);
        Ok::<_, seccompiler::BackendError>(())
    };
    let executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    only(libc::SYS_mmap, 2, executable.clone(), &[0])?;
    only(libc::SYS_mprotect, 2, executable, &[0])?;
    let threads = SeccompCmpOp::MaskedEq((OF_THREADS | OF_NAMESPACES) as u64);
    only(libc::SYS_clone, 0, threads, &[OF_THREADS as u64])?;
    let requests = TERMINAL.into_iter().chain(PASSTHROUGH.into_iter().filter(|_| passthrough));
    let requests: Vec<_> = requests.map(|request| u64::from(request as u32)).collect();
    only(libc::SYS_ioctl, 1, SeccompCmpOp::Eq, &requests)?;
    // Names of threads and of memory.
    let names = [libc::PR_SET_NAME as u64, libc::PR_SET_VMA as u64];
    only(libc::SYS_prctl, 0, SeccompCmpOp::Eq, &names)?;
    // To read a limit, not to set one.
    only(libc::SYS_prlimit64, 2, SeccompCmpOp::Eq, &[0])?;
    // To end by a defect.
    only(libc::SYS_tgkill, 0, SeccompCmpOp::Eq, &[u64::from(std::process::id())])?;
    // Times of what is open, not of what has a name.
    rules.insert(libc::SYS_utimensat, no_address(1)?);
    // To where a socket was connected before, as for syslog(3), not to any other.
    rules.insert(libc::SYS_sendto, no_address(4)?);
    Ok(rules)
}

/// The call with a null pointer as this argument.
fn no_address(argument: u8) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let is_null = SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    Ok(vec![SeccompRule::new(vec![is_null])?])
}
