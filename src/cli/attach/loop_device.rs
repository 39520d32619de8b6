//! Loop devices: setting one up on a file, its partitions, and letting go of it. By the kernel's own
//! interface (`linux/loop.h`), of which no maintained crate has `LOOP_CONFIGURE`: with it there is no
//! moment in which the device exists half set up.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cli::shown as raw_files;

const SET_FREE: libc::Ioctl = 0x4c01;
const CONFIGURE: libc::Ioctl = 0x4c0a;
const GET_FREE: libc::Ioctl = 0x4c82;
const FLAG_READ_ONLY: u32 = 1;
const FLAG_PARTITIONS: u32 = 8;
const FLAG_DIRECT_IO: u32 = 16;

/// How often another free device is asked for when somebody else takes one first.
const ATTEMPTS: u32 = 64;
/// How long device nodes may take to appear, and users of a device that come and go by themselves
/// (udev looks at each new one) to be gone.
const SETTLING: Duration = Duration::from_secs(10);

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// A loop device that is set up on a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) struct LoopDevice {
    node: PathBuf,
}

impl LoopDevice {
    /// Sets up a free device on `file`, with direct I/O and its partitions looked for.
    ///
    /// # Errors
    /// A line for a person.
    pub(super) fn set_up(file: &Path, read_only: bool) -> Result<LoopDevice, String> {
        let shown = file.display();
        let mut options = File::options();
        options.read(true).write(!read_only);
        let backing = raw_files::open(file, &options).map_err(|e| match e.raw_os_error() {
            Some(libc::EROFS) => {
                format!("{shown} can only be read: attach it with --read-only")
            }
            Some(libc::ENOKEY) => format!(
                "{shown} is encrypted, or what it is based on, and there is no key: give it \
                         with --key-file or --keys, or at a terminal"
            ),
            Some(libc::EKEYREJECTED) => {
                format!("the key of {shown} is wrong; the log says more")
            }
            _ => format!("opening {shown}: {e}; `qcow2fs status` or the log say more"),
        })?;
        let control = File::options().read(true).write(true).open("/dev/loop-control");
        let control = control.map_err(|e| {
            format!("opening /dev/loop-control: {e}: load the kernel module `loop`")
        })?;
        let config = config(&backing, file, read_only);
        for _ in 0..ATTEMPTS {
            // SAFETY: this request takes no argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), GET_FREE) };
            if number < 0 {
                let e = io::Error::last_os_error();
                return Err(format!("looking for a free loop device: {e}"));
            }
            let device = LoopDevice { node: format!("/dev/loop{number}").into() };
            let node = device.open(!read_only, 0).map_err(|e| device.says("opening", &e))?;
            // SAFETY: the request reads a `loop_config`, which lives through the call.
            if unsafe { libc::ioctl(node.as_raw_fd(), CONFIGURE, &config) } == 0 {
                return Ok(device);
            }
            match io::Error::last_os_error() {
                // Somebody else was faster.
                e if e.raw_os_error() == Some(libc::EBUSY) => {}
                e => return Err(format!("{} (Linux 5.8 has it)", device.says("setting up", &e))),
            }
        }
        Err("every free loop device was taken by somebody else first: try again".into())
    }

    /// The device that this node, whole or a partition, belongs to.
    pub(in crate::cli) fn of_node(node: &Path) -> Option<LoopDevice> {
        let name = node.strip_prefix("/dev").ok()?.to_str()?.strip_prefix("loop")?;
        let number = name.split('p').next()?;
        let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| LoopDevice { node: format!("/dev/loop{number}").into() })
    }

    /// The device that is set up on `file`, whoever did that.
    pub(super) fn on(file: &Path) -> Option<LoopDevice> {
        let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
        let nodes = devices.map(|entry| Path::new("/dev").join(entry.file_name()));
        nodes.filter_map(|node| LoopDevice::of_node(&node)).find(|device| device.is_on(file))
    }

    /// The device node.
    pub(in crate::cli) fn node(&self) -> &Path {
        &self.node
    }

    /// Whether it is set up on `file`, which may have lost its name.
    pub(super) fn is_on(&self, file: &Path) -> bool {
        let Ok(backing) = fs::read(self.system_directory().join("loop/backing_file")) else {
            return false;
        };
        let backing = backing.strip_suffix(b"\n").unwrap_or(&backing);
        let named = backing.strip_suffix(b" (deleted)").unwrap_or(backing);
        [backing, named].contains(&file.as_os_str().as_bytes())
    }

    fn system_directory(&self) -> PathBuf {
        Path::new("/sys/block").join(self.node.file_name().unwrap_or_default())
    }

    fn open(&self, write: bool, flags: i32) -> io::Result<File> {
        let start = Instant::now();
        loop {
            let opened =
                File::options().read(true).write(write).custom_flags(flags).open(&self.node);
            match opened {
                // A new device's node appears when udev has made it.
                Err(e) if e.kind() == io::ErrorKind::NotFound && start.elapsed() < SETTLING => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                opened => return opened,
            }
        }
    }

    fn says(&self, what: &str, error: &io::Error) -> String {
        format!("{what} {}: {error}", self.node.display())
    }

    /// The numbers of the partitions that the kernel has found.
    pub(super) fn partitions(&self) -> Vec<u32> {
        let entries = fs::read_dir(self.system_directory()).into_iter().flatten().flatten();
        let number = |entry: fs::DirEntry| {
            fs::read_to_string(entry.path().join("partition")).ok()?.trim().parse().ok()
        };
        let mut numbers: Vec<u32> = entries.filter_map(number).collect();
        numbers.sort_unstable();
        numbers
    }

    /// The node of a partition, once it is there.
    ///
    /// # Errors
    /// A line for a person: there is no such partition, and which there are.
    pub(super) fn partition(&self, number: u32) -> Result<PathBuf, String> {
        let there_are = self.partitions();
        if !there_are.contains(&number) {
            return Err(match there_are.as_slice() {
                [] => format!("there is no partition {number}: the disk has none at all"),
                numbers => format!("there is no partition {number}, only {}", listed(numbers)),
            });
        }
        let node = PathBuf::from(format!("{}p{number}", self.node.display()));
        let start = Instant::now();
        while !node.exists() {
            if start.elapsed() > SETTLING {
                let node = node.display();
                return Err(format!("the kernel has found {node}, but nobody has made the node"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(node)
    }

    /// Lets go of the file; it is closed when this returns.
    ///
    /// # Errors
    /// A line for a person: somebody uses the device.
    pub(super) fn release(&self, file: &Path) -> Result<(), String> {
        let start = Instant::now();
        // Exclusively: nobody has it mounted or part of something else, and nobody comes to.
        let device = loop {
            match self.open(false, libc::O_EXCL) {
                Err(e)
                    if e.raw_os_error() == Some(libc::EBUSY) && start.elapsed() < SETTLING / 5 =>
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    let node = self.node.display();
                    return Err(format!(
                        "{node} is in use: `lsblk {node}` shows by what; end that first"
                    ));
                }
                opened => break opened.map_err(|e| self.says("opening", &e))?,
            }
        };
        // SAFETY: this request takes no argument.
        let freed = unsafe { libc::ioctl(device.as_raw_fd(), SET_FREE) };
        let e = io::Error::last_os_error();
        if freed != 0 && e.raw_os_error() != Some(libc::ENXIO) {
            return Err(self.says("letting go of", &e));
        }
        // It happens when the last one closes it.
        drop(device);
        while self.is_on(file) {
            if start.elapsed() > SETTLING {
                let node = self.node.display();
                return Err(format!(
                    "{node} is still open in some process, and is let go after it"
                ));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

fn config(backing: &File, file: &Path, read_only: bool) -> LoopConfig {
    let access = if read_only { FLAG_READ_ONLY } else { 0 };
    let mut file_name = [0; 64];
    // The last byte stays NUL.
    for (to, from) in file_name[..63].iter_mut().zip(file.as_os_str().as_bytes()) {
        *to = *from;
    }
    LoopConfig {
        fd: backing.as_raw_fd().unsigned_abs(),
        block_size: 0,
        info: LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: FLAG_DIRECT_IO | FLAG_PARTITIONS | access,
            file_name,
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    }
}

/// `1, 2 and 5`.
pub(super) fn listed(numbers: &[u32]) -> String {
    let texts: Vec<String> = numbers.iter().map(u32::to_string).collect();
    match texts.as_slice() {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_names_its_whole_device() {
        let whole = LoopDevice { node: "/dev/loop12".into() };
        for node in ["/dev/loop12", "/dev/loop12p3"] {
            assert_eq!(LoopDevice::of_node(Path::new(node)).as_ref(), Some(&whole), "{node}");
        }
        for other in ["/dev/loop", "/dev/loop-control", "/dev/sda1", "/mnt/loop1", "loop1"] {
            assert_eq!(LoopDevice::of_node(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn the_structure_has_the_size_that_the_kernel_reads() {
        assert_eq!((size_of::<LoopInfo>(), size_of::<LoopConfig>()), (232, 304));
    }

    #[test]
    fn numbers_are_listed_as_people_do() {
        assert_eq!(listed(&[]), "");
        assert_eq!(listed(&[1]), "1");
        assert_eq!(listed(&[1, 2, 5]), "1, 2 and 5");
    }
}
