//! The options after `-o`, as mount(8) and fstab pass them. Pure.

use std::path::PathBuf;

use fuser::MountOption;

use super::{keys, size};
use crate::confine::Layer;
use crate::image::{CompactAfter, CompressionType};

/// What the options say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MountOptions {
    pub(super) read_only: bool,
    pub(super) allow_other: bool,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) umask: Option<u32>,
    pub(super) keep_erased: Option<u64>,
    pub(super) metadata_cache: Option<u64>,
    pub(super) cache_limit: Option<u64>,
    pub(super) compact_after: Option<CompactAfter>,
    pub(super) recycle_rate: Option<u64>,
    pub(super) allow: Vec<String>,
    pub(super) unconfined: Vec<Layer>,
    pub(super) key_files: Vec<(PathBuf, PathBuf)>,
    pub(super) keys: Option<PathBuf>,
    pub(super) create_cluster_size: Option<u64>,
    pub(super) create_refcount_bits: Option<u32>,
    pub(super) create_extended_l2: bool,
    pub(super) create_compression: Option<CompressionType>,
    pub(super) overlay: Option<String>,
    pub(super) ephemeral: bool,
    pub(super) passthrough: bool,
    pub(super) log_file: Option<String>,
    /// What is for the kernel.
    pub(super) kernel: Vec<MountOption>,
}

/// What mount(8), fstab and mount.fuse3 pass and what is not ours to act on. `dev` and `suid` are
/// among them: no device and no set-user-ID file is ever shown.
const IGNORED: [&str; 29] = [
    "defaults",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "_rnetdev",
    "async",
    "nosuid",
    "nodev",
    "dev",
    "suid",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "diratime",
    "nodiratime",
    "lazytime",
    "nolazytime",
    "iversion",
    "noiversion",
    "silent",
    "loud",
    "default_permissions",
];

impl MountOptions {
    /// Reads one argument of `-o`: options with commas between them; later ones count.
    ///
    /// # Errors
    /// A line that names the option that is not known or makes no sense.
    pub(super) fn add(&mut self, list: &str) -> Result<(), String> {
        list.split(',').filter(|option| !option.is_empty()).try_for_each(|option| self.one(option))
    }

    fn one(&mut self, option: &str) -> Result<(), String> {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        match (name, value) {
            ("ro", None) => self.read_only = true,
            ("rw", None) => self.read_only = false,
            ("allow_other", None) => self.allow_other = true,
            ("uid", Some(value)) => self.uid = Some(number(option, value, 10)?),
            ("gid", Some(value)) => self.gid = Some(number(option, value, 10)?),
            ("umask", Some(value)) => self.umask = Some(number(option, value, 8)?),
            ("keep_erased", Some(value)) => self.keep_erased = Some(size::parse(value)?),
            ("metadata_cache", Some(value)) => self.metadata_cache = Some(size::parse(value)?),
            ("cache_limit", Some(value)) => self.cache_limit = Some(size::parse(value)?),
            ("compact_after", Some(value)) => {
                self.compact_after = Some(size::parse_compact_after(value)?);
            }
            ("recycle_rate", Some(value)) => self.recycle_rate = Some(size::parse_rate(value)?),
            ("allow", Some(value)) => self.allow.push(value.to_owned()),
            ("unconfined", Some(value)) => self.unconfined.extend(Layer::parse(value)?),
            ("key_file", Some(value)) => self.key_files.push(keys::named(value)?),
            ("keys", Some(value)) => self.keys = Some(value.into()),
            ("create_cluster_size", Some(value)) => {
                self.create_cluster_size = Some(size::parse(value)?);
            }
            ("create_refcount_bits", Some(value)) => {
                self.create_refcount_bits = Some(number(option, value, 10)?);
            }
            ("create_extended_l2", None) => self.create_extended_l2 = true,
            ("create_compression", Some(value)) => {
                self.create_compression = Some(compression(value)?);
            }
            ("overlay", Some(value)) => self.overlay = Some(value.to_owned()),
            ("ephemeral", None) => self.ephemeral = true,
            ("passthrough", None) => self.passthrough = true,
            ("log_file", Some(value)) => self.log_file = Some(value.to_owned()),
            // Who mounted it and what it is called: mount(8) adds these.
            ("fsname" | "subtype" | "user" | "comment", Some(_)) => {}
            (name, _) if name.starts_with("x-") || name.starts_with("X-") => {}
            (name, None) => self.flag(name)?,
            _ => return Err(unknown(option)),
        }
        Ok(())
    }

    fn flag(&mut self, name: &str) -> Result<(), String> {
        let (option, opposite) = match name {
            "noexec" => (MountOption::NoExec, MountOption::Exec),
            "exec" => (MountOption::Exec, MountOption::NoExec),
            "noatime" => (MountOption::NoAtime, MountOption::Atime),
            "atime" => (MountOption::Atime, MountOption::NoAtime),
            "sync" => (MountOption::Sync, MountOption::Async),
            "dirsync" => (MountOption::DirSync, MountOption::DirSync),
            name if IGNORED.contains(&name) => return Ok(()),
            name => return Err(unknown(name)),
        };
        self.kernel.retain(|known| *known != option && *known != opposite);
        self.kernel.push(option);
        Ok(())
    }
}

/// What clusters are compressed with, in QEMU's words.
///
/// # Errors
/// A line that says what there is.
pub(super) fn compression(name: &str) -> Result<CompressionType, String> {
    match name {
        "zlib" => Ok(CompressionType::Deflate),
        "zstd" => Ok(CompressionType::Zstd),
        _ => Err(format!("'{name}' is no compression of qcow2: zlib and zstd are")),
    }
}

fn number(option: &str, value: &str, base: u32) -> Result<u32, String> {
    u32::from_str_radix(value, base)
        .map_err(|_| format!("mount option '{option}': no number in base {base}"))
}

fn unknown(option: &str) -> String {
    format!("mount option '{option}' is not known: `qcow2fs mount --help` lists those that are")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(list: &str) -> Result<MountOptions, String> {
        let mut options = MountOptions::default();
        options.add(list).map(|()| options)
    }

    #[test]
    fn our_options_are_taken() {
        let options = parse(
            "ro,allow_other,uid=7,gid=8,umask=027,keep_erased=1M,metadata_cache=3M,cache_limit=5M,\
                   log_file=/l,allow=/b,\
                   compact_after=5%,recycle_rate=2M,create_cluster_size=4K,\
                   create_refcount_bits=8,create_extended_l2,create_compression=zstd,\
                   overlay=/o,ephemeral,passthrough,keys=/k,key_file=a=/f,\
                   unconfined=landlock",
        );
        let wanted = MountOptions {
            read_only: true,
            allow_other: true,
            uid: Some(7),
            gid: Some(8),
            umask: Some(0o27),
            keep_erased: Some(1 << 20),
            metadata_cache: Some(3 << 20),
            cache_limit: Some(5 << 20),
            compact_after: Some(CompactAfter::Percent(5)),
            recycle_rate: Some(2 << 20),
            allow: vec!["/b".into()],
            unconfined: vec![Layer::Landlock],
            key_files: vec![("a".into(), "/f".into())],
            keys: Some("/k".into()),
            create_cluster_size: Some(4096),
            create_refcount_bits: Some(8),
            create_extended_l2: true,
            create_compression: Some(CompressionType::Zstd),
            overlay: Some("/o".into()),
            ephemeral: true,
            passthrough: true,
            log_file: Some("/l".into()),
            kernel: vec![],
        };
        assert_eq!(options.unwrap(), wanted);
        assert!(!parse("ro,rw").unwrap().read_only);
    }

    #[test]
    fn what_mount_and_fstab_pass_is_no_error() {
        let fstab = "rw,nosuid,nodev,noexec,noatime,nofail,_netdev,user,noauto,defaults,async,dev,\
                     suid,exec,relatime,x-systemd.automount,x-systemd.device-timeout=5,X-mount.mkdir,user=me";
        let kernel = vec![MountOption::NoAtime, MountOption::Exec];
        assert_eq!(parse(fstab).unwrap(), MountOptions { kernel, ..Default::default() });
    }

    #[test]
    fn other_options_are_refused_by_name() {
        for wrong in [
            "frobnicate",
            "rox",
            "uid=me",
            "umask=8",
            "ro=1",
            "uid",
            "keep_erased=much",
            "compact_after=soon",
            "recycle_rate=0",
            "unconfined=some",
            "unconfined",
            "create_compression=lzma",
            "create_refcount_bits=some",
        ] {
            let error = parse(&format!("rw,{wrong}")).unwrap_err();
            let named = wrong.split('=').next_back().unwrap();
            assert!(error.contains(named), "{wrong}: {error}");
        }
    }
}
