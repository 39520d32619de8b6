//! What is beneath the mount point of a running mount, opened so that nothing else is reached.
//!
//! Whoever may use `fusermount3` can mount a server of their own that calls itself qcow2fs, says what
//! it likes of its source and its images, and shows symbolic links in the place of raw files. So what
//! a command finds by itself is believed only of mounts that root or its own user has made, and
//! nothing but a regular file of that very mount is opened.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};

use super::unmounting;
use crate::storage::regular;

/// A directory that something is mounted on, as it is seen now; what is mounted over it later changes
/// nothing.
pub(super) struct MountPoint {
    directory: File,
}

impl MountPoint {
    /// Whatever is seen at `place`, whoever has mounted it: for a place that a person has named.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn of_anybody(place: &Path) -> io::Result<MountPoint> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(place, flags, Mode::empty())?;
        Ok(MountPoint { directory: directory.into() })
    }

    /// The qcow2fs that is seen at `place`, which root or who runs this has mounted.
    ///
    /// # Errors
    /// One that says so where it is somebody else's, and those of the host.
    pub(super) fn of_ours(place: &Path) -> io::Result<MountPoint> {
        let mount = MountPoint::of_anybody(place)?;
        // While it is open, no other mount gets its number.
        match unmounting::is_believed(mount.number()?) {
            true => Ok(mount),
            false => Err(io::Error::other("it is a mount of neither root's nor yours")),
        }
    }

    /// The number of the mount: proc_pid_fdinfo(5). The mount itself is not asked.
    fn number(&self) -> io::Result<u64> {
        use std::os::fd::AsRawFd;
        let info = format!("/proc/self/fdinfo/{}", self.directory.as_raw_fd());
        let info = std::fs::read_to_string(info)?;
        let number =
            info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
        number.ok_or_else(|| io::Error::other("the kernel does not tell which mount that is"))
    }

    /// Opens the regular file `name`.
    ///
    /// # Errors
    /// `ELOOP` where a symbolic link is on the way, `EXDEV` where that leads out, one that says so
    /// where it is no regular file, and those of the host.
    pub(super) fn open(&self, name: &Path, options: &OpenOptions) -> io::Result<File> {
        let place = self.reach(name, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())?;
        match place.metadata()?.is_file() {
            true => options.open(regular::path_of(&place)),
            false => Err(io::Error::other("it is not a regular file")),
        }
    }

    /// Makes the file `name`, which is new.
    ///
    /// # Errors
    /// As with [`MountPoint::open`]; `EEXIST` where it is there.
    pub(super) fn create(&self, name: &Path) -> io::Result<()> {
        const MODE: Mode = Mode::from_raw_mode(0o666);
        self.reach(name, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL, MODE).map(drop)
    }

    /// Removes the file `name`.
    ///
    /// # Errors
    /// As with [`MountPoint::open`].
    pub(super) fn remove(&self, name: &Path) -> io::Result<()> {
        let (Some(parent), Some(last)) = (name.parent(), name.file_name()) else {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let parent = self.reach(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        Ok(rustix::fs::unlinkat(parent, last, AtFlags::empty())?)
    }

    fn reach(&self, name: &Path, flags: OFlags, mode: Mode) -> io::Result<File> {
        let rules = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        let flags = flags | OFlags::CLOEXEC;
        let open = || rustix::fs::openat2(&self.directory, name, flags, mode, rules);
        Ok(rustix::io::retry_on_intr(open)?.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn nothing_but_regular_files_beneath_a_mount_point_is_reached() {
        let directory = tempfile::tempdir().unwrap();
        let [outside, place] = ["outside", "place"].map(|name| directory.path().join(name));
        for made in [&outside, &place, &place.join("sub")] {
            fs::create_dir(made).unwrap();
        }
        let secret = outside.join("secret");
        fs::write(&secret, "secret").unwrap();
        fs::write(place.join("sub/disk.raw"), "disk").unwrap();
        symlink(&secret, place.join("link.raw")).unwrap();
        symlink(&outside, place.join("way out")).unwrap();
        symlink("sub", place.join("beneath")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, place.join("fifo"), Mode::RWXU).unwrap();
        let mount = MountPoint::of_anybody(&place).unwrap();
        let to_write = || File::options().write(true).clone();
        assert!(mount.open("sub/disk.raw".as_ref(), &to_write()).is_ok());
        let secret_by_name = secret.to_str().unwrap();
        for name in [
            "link.raw",
            "way out/secret",
            "beneath/disk.raw",
            "../outside/secret",
            secret_by_name,
            "fifo",
            "sub",
        ] {
            assert!(mount.open(name.as_ref(), &to_write()).is_err(), "{name}");
        }
        for name in ["way out/new", "link.raw", "../outside/new"] {
            assert!(mount.create(name.as_ref()).is_err(), "{name}");
        }
        for name in ["way out/secret", "../outside/secret"] {
            assert!(mount.remove(name.as_ref()).is_err(), "{name}");
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(fs::read(&secret).unwrap(), b"secret");
        mount.create("sub/new".as_ref()).unwrap();
        mount.remove("sub/new".as_ref()).unwrap();
        assert!(!place.join("sub/new").exists());
        // What no qcow2fs serves is not believed, be it root's.
        assert!(MountPoint::of_ours(&place).is_err());
    }
}
