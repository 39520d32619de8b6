//! A directory of images, the program that serves it, and commands with a time limit.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_qcow2fs");

/// Seconds that one command may take.
const COMMAND_LIMIT: u32 = 240;

/// How long one daemon may live before it is taken for hung and killed.
const DAEMON_LIMIT: Duration = Duration::from_secs(420);

/// Runs a shell script that must succeed; returns what it printed.
macro_rules! sh {
    ($($arg:tt)*) => { $crate::lab::must(&format!($($arg)*)) };
}

/// Runs a shell script that may fail.
macro_rules! attempt {
    ($($arg:tt)*) => { $crate::lab::attempt(&format!($($arg)*)) };
}

/// How a command ended.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Outcome {
    pub fn ok(&self) -> bool {
        self.code == Some(0)
    }

    /// Both outputs, for messages that may come on either.
    pub fn text(&self) -> String {
        format!("{}{}", self.out, self.err)
    }
}

/// Runs `script` in bash, with `$qcow2fs` as the program under test. Its output goes to files, so
/// that a daemon that keeps them open does not keep us waiting.
pub fn attempt(script: &str) -> Outcome {
    let (mut out, mut err) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    // A path for the program itself would have it looked for in a copy of this process, which is large.
    let whole = format!("PATH=$PATH:/usr/sbin:/sbin\n{script}");
    let status = Command::new("timeout")
        .args(["-k", "10", &COMMAND_LIMIT.to_string(), "bash", "-eo", "pipefail", "-c", &whole])
        .env("qcow2fs", PROGRAM)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(out.try_clone().unwrap())
        .stderr(err.try_clone().unwrap())
        .status()
        .expect("timeout(1) and bash run");
    assert_ne!(status.code(), Some(124), "longer than {COMMAND_LIMIT} s: {script}");
    Outcome { code: status.code(), out: contents(&mut out), err: contents(&mut err) }
}

/// [`attempt`], with failure as a panic.
pub fn must(script: &str) -> String {
    let outcome = attempt(script);
    let text: String = outcome.text().chars().take(2000).collect();
    assert!(outcome.ok(), "{script}\ncode {:?}\n{text}", outcome.code);
    outcome.out
}

fn contents(file: &mut File) -> String {
    file.rewind().unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Waits until `done`, else panics with what `state` says.
pub fn eventually(limit: Duration, mut done: impl FnMut() -> bool, state: impl Fn() -> String) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < limit, "not within {limit:?}: {}", state());
        thread::sleep(Duration::from_millis(50));
    }
}

/// Bytes of host blocks that `path` occupies.
pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// The length of `path` in bytes.
pub fn length(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

/// Bytes that look random and are the same for the same seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The image is sound and loses no cluster, by QEMU's judgement and by our own.
pub fn assert_sound(image: &Path) {
    sh!("qemu-img check -f qcow2 {}", image.display());
    sh!("$qcow2fs check {}", image.display());
}

/// Waits until nobody holds QEMU's lock on the image: the kernel closes files in its own time.
pub fn wait_until_free(image: &Path) {
    let free = || attempt!("qemu-io -f qcow2 -c 'read 0 512' {}", image.display()).ok();
    eventually(Duration::from_secs(10), free, || format!("{} still locked", image.display()));
}

/// Writes the start of a file from another process, so that no process that we fork meanwhile has a
/// copy of the open file.
pub fn write_by_dd(file: &Path, data: &[u8]) {
    let mut source = tempfile::NamedTempFile::new().unwrap();
    source.write_all(data).unwrap();
    sh!("dd if={} of={} bs=64k conv=notrunc", source.path().display(), file.display());
}

/// The bytes of the virtual disk, read by QEMU.
pub fn guest_bytes(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("judge");
    sh!("qemu-img convert -f qcow2 -O raw {} {}", image.display(), raw.display());
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(&raw).unwrap();
    bytes
}

/// Panics where `found` is not `expected`, saying where, not printing megabytes.
pub fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        panic!("{what}: byte {at:#x} is {:#x} instead of {:#x}", found[at], expected[at]);
    }
}

/// Whether a process lives (a zombie does not).
pub fn alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").trim_start().starts_with('Z'))
}

/// Waits until a process has ended.
pub fn wait_for_end(pid: i32) {
    eventually(Duration::from_secs(30), || !alive(pid), || format!("process {pid} still lives"));
}

/// Whether something is mounted at exactly `point`.
pub fn is_mounted(point: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().any(|line| line.split(' ').nth(1) == point.to_str())
}

fn temporary_directory() -> TempDir {
    let shm = Path::new("/dev/shm");
    let base = match std::env::var_os("QCOW2FS_TEST_DIR") {
        Some(dir) => PathBuf::from(dir),
        None if roomy(shm) => shm.to_owned(),
        None => std::env::temp_dir(),
    };
    tempfile::Builder::new().prefix("qcow2fs-test.").tempdir_in(base).unwrap()
}

fn roomy(dir: &Path) -> bool {
    let free = attempt!("echo $(( $(stat -f -c '%a * %S' {}) >> 30 ))", dir.display());
    free.out.trim().parse::<u64>().is_ok_and(|gibibytes| gibibytes >= 8)
}

/// One temporary directory with `images/`, the mount point `mnt/`, and room for more.
pub struct Lab {
    dir: TempDir,
}

impl Lab {
    /// Panics where the machine cannot do such tests at all.
    pub fn new() -> Lab {
        // SAFETY: geteuid has no conditions.
        assert_eq!(unsafe { libc::geteuid() }, 0, "tests of real mounts need root");
        assert!(Path::new("/dev/fuse").exists(), "tests of real mounts need /dev/fuse");
        assert!(attempt!("command -v qemu-img qemu-io").ok(), "tests need qemu-utils");
        let dir = temporary_directory();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let lab = Lab { dir };
        lab.subdirectory("images");
        lab.subdirectory("mnt");
        lab
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn subdirectory(&self, name: &str) -> PathBuf {
        fs::create_dir_all(self.path(name)).unwrap();
        self.path(name)
    }

    pub fn images(&self) -> PathBuf {
        self.path("images")
    }

    pub fn point(&self) -> PathBuf {
        self.path("mnt")
    }

    /// Where the image `name` is.
    pub fn image(&self, name: &str) -> PathBuf {
        self.images().join(name)
    }

    /// Makes an empty image with qemu-img; `options` as after its `-o`.
    pub fn create(&self, name: &str, size: &str, options: &str) -> PathBuf {
        let image = self.image(name);
        let options = if options.is_empty() { "compat=1.1" } else { options };
        sh!("qemu-img create -q -f qcow2 -o {options} {} {size}", image.display());
        image
    }

    pub fn mount(&self) -> Mount {
        self.mount_with("")
    }

    /// Mounts `images/` with further arguments.
    pub fn mount_with(&self, arguments: &str) -> Mount {
        let log = self.path("log");
        sh!(
            "$qcow2fs mount -v --log-file {} {arguments} {} {}",
            log.display(),
            self.images().display(),
            self.point().display()
        );
        Mount::adopt(self.point(), log)
    }
}

/// A mounted directory of images. Dropped on failure, it is detached and its daemon ended.
pub struct Mount {
    point: PathBuf,
    log: PathBuf,
    pid: i32,
    watchdog: Option<mpsc::Sender<()>>,
}

impl Mount {
    /// Takes over what somebody else has mounted at `point`.
    pub fn adopt(point: PathBuf, log: PathBuf) -> Mount {
        assert!(is_mounted(&point), "{} is not mounted", point.display());
        let mut mount = Mount { point, log, pid: 0, watchdog: None };
        mount.pid = mount.status()["pid"].as_i64().expect("status has a pid") as i32;
        let (pid, (alarm, silence)) = (mount.pid, mpsc::channel::<()>());
        thread::spawn(move || {
            // Searches may be told to take longer.
            let seconds = std::env::var("QCOW2FS_MODEL_SECONDS").ok();
            let longer = seconds.and_then(|text| text.parse().ok()).unwrap_or(0);
            let limit = DAEMON_LIMIT + Duration::from_secs(longer);
            if silence.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("daemon {pid} has taken {limit:?}: killed");
                signal(pid, libc::SIGKILL);
            }
        });
        mount.watchdog = Some(alarm);
        mount
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.point.join(name)
    }

    pub fn point(&self) -> &Path {
        &self.point
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// What `qcow2fs status --json` says.
    pub fn status(&self) -> serde_json::Value {
        let text = sh!("$qcow2fs status --json {}", self.point.display());
        serde_json::from_str(&text).expect("status is JSON")
    }

    /// Waits until no image is open: the kernel closes files in its own time, and a child that another
    /// test has just forked has a copy of every file that was open.
    pub fn wait_until_closed(&self, limit: Duration) {
        let closed = || self.status()["images"].as_array().is_some_and(Vec::is_empty);
        eventually(limit, closed, || self.status().to_string());
    }

    /// Unmounts as users do, and checks that nothing is left. For a moment the mount may be busy
    /// by our own doing: a child that another test has just forked, not yet executing its program,
    /// has a copy of every file that was open.
    pub fn umount(self) {
        let last = std::cell::RefCell::new(String::new());
        let done = || {
            let outcome = attempt!("$qcow2fs umount {}", self.point.display());
            *last.borrow_mut() = outcome.text();
            assert!(outcome.ok() || outcome.text().contains("busy"), "umount: {}", outcome.text());
            outcome.ok()
        };
        eventually(Duration::from_secs(5), done, || last.borrow().clone());
        assert!(!is_mounted(&self.point), "still mounted after umount");
        assert!(!alive(self.pid), "umount returned before the daemon had ended");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("log of {}:\n{}", self.point.display(), self.log());
        }
        if is_mounted(&self.point) {
            attempt!("umount -l {}", self.point.display());
        }
        let start = Instant::now();
        while self.pid > 0 && alive(self.pid) {
            let patience = start.elapsed() < Duration::from_secs(5);
            signal(self.pid, if patience { libc::SIGTERM } else { libc::SIGKILL });
            thread::sleep(Duration::from_millis(200));
        }
    }
}

/// Sends a signal to a process that a test has started.
pub fn signal(pid: i32, signal: i32) {
    // SAFETY: kill takes no pointers.
    unsafe { libc::kill(pid, signal) };
}
