//! `qcow2fs mount`: from arguments to a mount that is served until it is unmounted.

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fuser::{Config, MountOption, Session, SessionACL};

use super::daemon::{self, Parent};
use super::helper::Helper;
use super::manager::{Manager, State};
use super::options::{MountOptions, compression};
use super::umount::is_dead;
use super::unmounting::{self, Served};
use super::{keys, logging, signals, size};
use crate::catalog::{self, Catalog, OverlayOptions};
use crate::confine::{self, Layer, Place};
use crate::fs::Filesys;
use crate::image;
use crate::memory::Memory;
use crate::storage::image_lock;

/// Mount a directory of qcow2 images
///
/// images/a/b.qcow2 is shown as a/b.raw: a flat raw disk to read, write, loop-mount and fstrim. The
/// mount is served by a process in the background, which logs to syslog unless --log-file says
/// otherwise. `qcow2fs umount` ends it, and so does SIGTERM; where the mount is busy, a second SIGTERM
/// closes the images under their users' hands, with all in them that was written.
///
/// Exit code: 0 mounted (with --foreground: unmounted in order); 1 failed, also where options
/// contradict each other; 2 arguments that are not known or no values.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  qcow2fs mount images/ /mnt/raw
  qcow2fs mount --read-only -o allow_other images/ /mnt/raw
  qcow2fs mount --foreground -v --allow /srv/bases images/ /mnt/raw
  qcow2fs mount --compact-after 5% --recycle-rate 20M images/ /mnt/raw")]
pub(super) struct Args {
    /// The directory with the images, or one image, to show nothing else
    source: PathBuf,
    /// The directory where to show them
    mountpoint: PathBuf,
    /// Serve in the foreground and log to the terminal
    #[arg(short, long)]
    foreground: bool,
    /// Write nothing to any image
    #[arg(long)]
    read_only: bool,
    /// Keep this much erased space ready in each image that is written [default: 64M]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    keep_erased: Option<u64>,
    /// Keep at most this much of each image's L2 tables in memory; 32M map 256G of a disk with clusters
    /// of 64K [default: 128M]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    metadata_cache: Option<u64>,
    /// Let the caches of all images together take at most this much memory; those of disks that are in
    /// use are the last to shrink [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    cache_limit: Option<u64>,
    /// Move clusters so that an image file gets shorter, once discards have settled and it wins this
    /// much: a size, a part of the file (and 1M at least), or off [default: 1%]
    #[arg(long, value_name = "SIZE|PERCENT|off", value_parser = size::parse_compact_after)]
    compact_after: Option<image::CompactAfter>,
    /// Move at most this much a second in each image [default: whatever nobody notices]
    #[arg(long, value_name = "SIZE", value_parser = size::parse_rate)]
    recycle_rate: Option<u64>,
    /// Check at every step of the recycler that each cluster has one state and that none is lost:
    /// slow, for tests
    #[arg(long)]
    runtime_asserts: bool,
    /// Trust this directory too: backing and data files named by an image may lie in it (repeatable)
    #[arg(long, value_name = "DIR")]
    allow: Vec<PathBuf>,
    /// Once mounted, the process gives up capabilities, files elsewhere, the network and system calls
    /// that serving does not need. Keep one of capabilities, no-new-privs (and seccomp and landlock
    /// with it), landlock, seccomp, or all of them (repeatable)
    #[arg(long, value_name = "LAYER", value_parser = Layer::parse, value_delimiter = ',')]
    unconfined: Vec<&'static [Layer]>,
    /// Let the kernel itself read and write a disk that is a raw data file, all of it mapped: as fast as
    /// the file, but while it is open it gets no smaller and writes past its end do not make it larger.
    /// Needs root; the process keeps CAP_SYS_ADMIN
    #[arg(long)]
    passthrough: bool,
    #[command(flatten)]
    keys: keys::Args,
    /// Take keys that another command was told from the standard input
    #[arg(long, hide = true)]
    typed_keys: bool,
    #[command(flatten)]
    create: CreateArgs,
    /// Write to qcow2 overlays in this directory, and leave the images as they are
    #[arg(long, value_name = "DIR")]
    overlay: Option<PathBuf>,
    /// Throw the overlays away at the end; those that lie in the directory are not used
    #[arg(long)]
    ephemeral: bool,
    /// Log to the end of this file
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Say more in the log (repeatable)
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Say less in the log (repeatable)
    #[arg(short, long, action = clap::ArgAction::Count)]
    quiet: u8,
    /// ro, rw, allow_other, uid=N, gid=N, umask=N, keep_erased=SIZE, metadata_cache=SIZE,
    /// cache_limit=SIZE, compact_after=SIZE|PERCENT|off, recycle_rate=SIZE, allow=DIR,
    /// create_cluster_size=SIZE, create_refcount_bits=N, create_extended_l2,
    /// create_compression=zlib|zstd, overlay=DIR, ephemeral, passthrough, unconfined=LAYER, keys=DIR, key_file=NAME=FILE, log_file=FILE, noatime,
    /// noexec, sync, and what mount(8) and fstab pass
    #[arg(short, value_name = "OPTION[,OPTION]...")]
    options: Vec<String>,
}

/// What all caches together may hold, in bytes: eight images whose L2 tables are all in use.
const CACHE_LIMIT: u64 = 1 << 30;
/// What the kernel may read ahead, in bytes. Its own 128 KiB are two clusters, so that somebody who
/// copies a compressed image waits for the inflating and it for him: measured with
/// `scripts/bench --jobs compressed-copy`.
const READ_AHEAD: u64 = 1 << 20;

/// How long the last requests of a mount that is gone are waited for, which are flushes of much.
const LAST_REQUESTS: Duration = Duration::from_secs(600);

/// What images are like that are made through the mount.
#[derive(clap::Args)]
struct CreateArgs {
    /// Bytes in a cluster of new images, 512 to 2M [default: 64K]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    create_cluster_size: Option<u64>,
    /// Width of the refcounts of new images, 1 to 64 [default: 16]
    #[arg(long, value_name = "BITS")]
    create_refcount_bits: Option<u32>,
    /// Divide the clusters of new images into 32 subclusters
    #[arg(long)]
    create_extended_l2: bool,
    /// What clusters of new images are compressed with when somebody compresses them: zlib or zstd
    /// [default: zlib]
    #[arg(long, value_name = "TYPE", value_parser = compression)]
    create_compression: Option<image::CompressionType>,
}

impl CreateArgs {
    /// The options of new images; what `-o` says counts where these say nothing.
    ///
    /// # Errors
    /// A line that says which do not go together.
    fn options(&self, others: &MountOptions) -> Result<image::CreateOptions, String> {
        let usual = image::CreateOptions::default();
        let size = self.create_cluster_size.or(others.create_cluster_size);
        let bits = self.create_refcount_bits.or(others.create_refcount_bits);
        let compression = self.create_compression.or(others.create_compression);
        let options = image::CreateOptions {
            cluster_size: size.unwrap_or(usual.cluster_size),
            refcount_bits: bits.unwrap_or(usual.refcount_bits),
            extended_l2: self.create_extended_l2 || others.create_extended_l2,
            compression: compression.unwrap_or(usual.compression),
            ..usual
        };
        options.check().map_err(|e| format!("new images: {e}"))?;
        Ok(options)
    }
}

/// A mount that is asked for: everything checked that can be before anything is done.
struct Plan {
    /// As the mount table shows it: a directory, or the only image that is shown.
    source: PathBuf,
    /// The image directory.
    directory: PathBuf,
    mountpoint: PathBuf,
    log_file: Option<PathBuf>,
    level: log::LevelFilter,
    catalog: catalog::Options,
    /// Keys are to be had from the standard input.
    typed_keys: bool,
    options: MountOptions,
    /// This process gives up what it does not need, but for these layers; `None` is all of them.
    confine: Option<Vec<Layer>>,
}

/// A mount that is there.
struct Started {
    session: Session<Filesys>,
    catalog: Arc<Catalog>,
    /// Only where this process has given up the right to unmount.
    helper: Option<Arc<Helper>>,
    manager: Manager,
}

/// Runs the command; returns the exit code.
pub(super) fn run(args: Args) -> i32 {
    let foreground = args.foreground;
    let plan = match Plan::new(args) {
        Ok(plan) => plan,
        Err(line) => return complain(&line),
    };
    if foreground {
        return match plan.serve(None) {
            Ok(code) => code,
            Err((line, _)) => complain(&line),
        };
    }
    let parent = match daemon::fork() {
        Ok(parent) => parent,
        Err(e) => return complain(&format!("going to the background: {e}")),
    };
    match plan.serve(Some(parent)) {
        Ok(code) => code,
        Err((line, parent)) => {
            if let Some(parent) = parent {
                parent.failed(&line);
            }
            1
        }
    }
}

fn complain(line: &str) -> i32 {
    eprintln!("qcow2fs: {line}");
    1
}

impl Plan {
    fn new(args: Args) -> Result<Plan, String> {
        let mut options = MountOptions::default();
        args.options.iter().try_for_each(|list| options.add(list))?;
        options.read_only |= args.read_only;
        options.passthrough |= args.passthrough;
        let Source { shown: source, directory: images, only } = Source::find(&args.source)?;
        let mountpoint = directory(&args.mountpoint, "the mount point")?;
        refuse_nesting(&images, &mountpoint)?;
        let create = args.create.options(&options)?;
        let mut image = image::Options::default();
        if let Some(bytes) = args.keep_erased.or(options.keep_erased) {
            image.keep_erased = bytes;
        }
        if let Some(bytes) = args.metadata_cache.or(options.metadata_cache) {
            image.metadata_cache = bytes;
        }
        let limit = args.cache_limit.or(options.cache_limit);
        image.caches = Memory::new(limit.unwrap_or(CACHE_LIMIT));
        if let Some(after) = args.compact_after.or(options.compact_after) {
            image.compact_after = after;
        }
        image.runtime_asserts = args.runtime_asserts;
        image.recycle_rate = args.recycle_rate.or(options.recycle_rate);
        let allow = args.allow.into_iter().chain(options.allow.drain(..).map(PathBuf::from));
        let allow = allow.map(|path| allowed(&path)).collect::<Result<Vec<_>, _>>()?;
        let unconfined = args.unconfined.concat().into_iter().chain(options.unconfined.drain(..));
        let confine = confinement(unconfined.collect());
        let mut keys = args.keys;
        keys.key_file.append(&mut options.key_files);
        keys.keys = keys.keys.or(options.keys.take());
        refuse_keys_beneath(&mountpoint, &keys)?;
        let overlay = args.overlay.or(options.overlay.take().map(PathBuf::from));
        let overlay = overlay_options(overlay, args.ephemeral || options.ephemeral)?;
        if options.passthrough && overlay.is_some() {
            let why = "the kernel would write to the image itself";
            return Err(format!("--passthrough and --overlay exclude each other: {why}"));
        }
        if let Some(overlay) = &overlay {
            refuse_mixing(&overlay.directory, &[&images, &mountpoint])?;
        }
        let log_file = args.log_file.or(options.log_file.take().map(PathBuf::from));
        let log_file = log_file.map(std::path::absolute).transpose();
        Ok(Plan {
            source,
            directory: images,
            mountpoint,
            log_file: log_file.map_err(|e| format!("the log file's path: {e}"))?,
            level: logging::level(args.verbose, args.quiet),
            catalog: catalog::Options {
                read_only: options.read_only,
                only,
                uid: options.uid,
                gid: options.gid,
                umask: options.umask.unwrap_or(0),
                allow,
                keys: keys.keys()?,
                overlay,
                image,
                create,
                // Asked for when it is served.
                io_flusher: false,
            },
            typed_keys: args.typed_keys,
            options,
            confine,
        })
    }

    /// Mounts, tells the parent, and serves until it is unmounted. An error before the parent was
    /// told comes back with the way to it.
    fn serve(self, parent: Option<Parent>) -> Result<i32, (String, Option<Parent>)> {
        let in_background = parent.is_some();
        match self.start(in_background) {
            Err(line) => Err((line, parent)),
            Ok(started) => {
                match parent.map(Parent::ready) {
                    Some(Err(e)) => log::error!("letting go of the terminal: {e}"),
                    Some(Ok(())) => {}
                    None => started.manager.tell(State::Ready),
                }
                log::info!("{} is mounted at {}", self.source.display(), self.mountpoint.display());
                Ok(self.run(started))
            }
        }
    }

    fn start(&self, in_background: bool) -> Result<Started, String> {
        self.start_log(in_background)?;
        let manager = Manager::connect();
        let io_flusher = daemon::set_up();
        let signals = signals::block();
        if self.typed_keys {
            // Not before the fork: memory that is locked stays so only in the process that locks it.
            keys::read_typed(&self.catalog.keys.typed)?;
        }
        // The images are opened beneath the directory as it is now, whatever is mounted later.
        let options = catalog::Options { io_flusher, ..self.catalog.clone() };
        let catalog = Catalog::new(&self.directory, options);
        let catalog = Arc::new(catalog.map_err(|e| e.to_string())?);
        let passthrough = self.options.passthrough;
        let files = Filesys::new(Arc::clone(&catalog), self.mountpoint.clone(), passthrough);
        let session = Session::new(files, &self.mountpoint, &self.config())
            .map_err(|e| cannot_mount(&self.mountpoint, &e))?;
        let helper = self.confine.as_ref().map(|_| Helper::start(&self.mountpoint)).transpose();
        let helper =
            helper.map_err(|e| format!("starting the process that unmounts: {e}"))?.map(Arc::new);
        let mount = Served::new(self.mountpoint.clone(), session.as_fd(), helper.clone())
            .map_err(|e| format!("looking for the mount at {}: {e}", self.mountpoint.display()))?;
        if let Err(e) = mount.read_ahead(READ_AHEAD) {
            log::debug!("the kernel's own limit of what it reads ahead stays: {e}");
        }
        if let (Some(without), Some(helper)) = (&self.confine, &helper) {
            // No thread has been started yet: what is given up now, all of them lack.
            self.give_up(without, helper, &catalog);
        }
        signals.serve(mount, Arc::clone(&catalog)).map_err(starting_a_thread)?;
        Ok(Started { session, catalog, helper, manager })
    }

    /// Gives up what serving the mount does not need, but for the layers in `without`.
    fn give_up(&self, without: &[Layer], helper: &Arc<Helper>, catalog: &Catalog) {
        let searcher = Arc::clone(helper);
        image_lock::search_by(move |wanted| searcher.holder(wanted));
        let overlay = catalog.overlay_directory();
        let write = !self.options.read_only && overlay.is_none();
        let directories = catalog.directories().into_iter();
        let mut places: Vec<Place> = directories.map(|path| Place { path, write }).collect();
        places.extend(overlay.map(|path| Place { path, write: true }));
        let read = |path: &Path| Place { path: path.to_owned(), write: false };
        let keys = &self.catalog.keys;
        places.extend(keys.directory.iter().chain(&keys.credentials).map(|path| read(path)));
        places.extend(keys.files.iter().map(|(_, file)| read(place_of_key(file))));
        // The time of day in syslog(3) and in the log.
        places.push(read(Path::new("/etc/localtime")));
        // Where the standard descriptors lead once the terminal is let go of.
        places.push(Place { path: "/dev/null".into(), write: true });
        places.retain(|place| place.path.exists());
        confine::confine(without, &places, self.options.passthrough);
    }

    fn start_log(&self, in_background: bool) -> Result<(), String> {
        match &self.log_file {
            Some(path) => logging::to_file(self.level, path)
                .map_err(|e| format!("opening the log file {}: {e}", path.display()))?,
            None if in_background => logging::to_syslog(self.level),
            None => logging::to_terminal(self.level),
        }
        Ok(())
    }

    fn run(&self, Started { session, catalog, helper, manager }: Started) -> i32 {
        let ended = serve_to_the_end(session);
        manager.tell(State::Stopping);
        if let Err(e) = &ended {
            log::error!("the connection to the kernel ended: {e}");
        }
        let failed = catalog.close_all(LAST_REQUESTS);
        if failed > 0 {
            log::error!(
                "closing has failed {failed} times: run `qcow2fs check` on those named above"
            );
        }
        if is_dead(&self.mountpoint)
            && let Err(e) = self.detach(helper.as_deref())
        {
            log::warn!("cannot detach {}: {e}", self.mountpoint.display());
        }
        log::info!("{} is no longer served", self.mountpoint.display());
        log::logger().flush();
        i32::from(failed > 0 || ended.is_err())
    }

    fn detach(&self, helper: Option<&Helper>) -> io::Result<()> {
        match helper {
            Some(helper) => helper.unmount(None, true),
            None => unmounting::unmount(&self.mountpoint, true),
        }
    }

    fn config(&self) -> Config {
        let mut config = Config::default();
        config.mount_options = self.options.kernel.clone();
        config.mount_options.extend([
            MountOption::FSName(self.source_name()),
            MountOption::CUSTOM("subtype=qcow2fs".into()),
            // The kernel checks mode and owner as on any file system; nobody gets at an image
            // through the mount who may not on the host.
            MountOption::DefaultPermissions,
        ]);
        if self.options.read_only {
            config.mount_options.push(MountOption::RO);
        }
        if self.options.allow_other {
            config.acl = SessionACL::All;
        }
        config.n_threads = Some(crate::fs::WORKERS);
        config
    }

    /// The source as the mount table shows it. `fusermount3` takes commas for ends of options.
    fn source_name(&self) -> String {
        let name = self.source.display().to_string();
        // SAFETY: geteuid takes nothing and cannot fail.
        match unsafe { libc::geteuid() } {
            0 => name,
            _ => name.replace('\\', "\\\\").replace(',', "\\,"),
        }
    }
}

/// Serves until the connection to the kernel ends.
///
/// A session that is dropped unmounts what is at its mount point, whether or not that is its own
/// mount: by then it may be the one that was below, or one that somebody has made since. So what
/// would do that is never dropped.
fn serve_to_the_end(session: Session<Filesys>) -> io::Result<()> {
    let nothing = std::thread::spawn(|| Ok(()));
    let session = Box::leak(Box::new(session.spawn()?));
    let served = std::mem::replace(&mut session.guard, nothing).join();
    served.unwrap_or_else(|_| Err(io::Error::other("a defect in this program")))
}

/// Why there is no mount: what is not found is not the mount point, which was looked at before.
fn cannot_mount(mountpoint: &Path, error: &io::Error) -> String {
    let why = match error.kind() {
        io::ErrorKind::NotFound if !Path::new("/dev/fuse").exists() => {
            "there is no /dev/fuse: `modprobe fuse` as root makes it".into()
        }
        io::ErrorKind::NotFound if !rustix::process::geteuid().is_root() => {
            "only root can do without fusermount3: install the package fuse3".into()
        }
        _ => error.to_string(),
    };
    format!("mounting at {}: {why}", mountpoint.display())
}

/// What is to be mounted.
struct Source {
    /// As the mount table shows it.
    shown: PathBuf,
    /// The image directory.
    directory: PathBuf,
    /// The only image that is shown.
    only: Option<OsString>,
}

impl Source {
    /// A directory, or an image that stands for its directory with nothing else in it.
    fn find(path: &Path) -> Result<Source, String> {
        if !path.metadata().is_ok_and(|metadata| metadata.is_file()) {
            let images = directory(path, "the image directory")?;
            return Ok(Source { shown: images.clone(), directory: images, only: None });
        }
        let given = path.display();
        let image = path.canonicalize().map_err(|e| format!("the image {given}: {e}"))?;
        match (image.parent(), image.file_name(), image.extension()) {
            (Some(images), Some(name), Some(ending)) if ending == "qcow2" => Ok(Source {
                directory: images.to_owned(),
                only: Some(name.to_owned()),
                shown: image,
            }),
            _ => Err(format!("the image {given} has no name that ends in .qcow2: rename it")),
        }
    }
}

/// The directory's path without links in it.
fn directory(path: &Path, what: &str) -> Result<PathBuf, String> {
    let shown = path.display();
    let found = path.canonicalize().and_then(|path| Ok((path.metadata()?.is_dir(), path)));
    match found {
        Ok((true, path)) => Ok(path),
        Ok((false, _)) => Err(format!("{what} {shown} is no directory")),
        Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => Err(format!(
            "{what} {shown} is a mount whose process is gone; `qcow2fs umount {shown}` removes it"
        )),
        Err(e) => Err(format!("{what} {shown}: {}", plain(&e))),
    }
}

fn plain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such directory".into(),
        _ => error.to_string(),
    }
}

/// A directory that must exist, by the name it was given: images may have recorded that one.
pub(super) fn allowed(path: &Path) -> Result<PathBuf, String> {
    directory(path, "the allowed directory")?;
    std::path::absolute(path).map_err(|e| format!("the allowed directory {}: {e}", path.display()))
}

fn overlay_options(
    path: Option<PathBuf>,
    ephemeral: bool,
) -> Result<Option<OverlayOptions>, String> {
    match path {
        Some(path) => {
            let directory = directory(&path, "the overlay directory")?;
            Ok(Some(OverlayOptions { directory, ephemeral }))
        }
        None if ephemeral => {
            Err("--ephemeral needs --overlay DIR, for the room that it takes".into())
        }
        None => Ok(None),
    }
}

/// What has to stay within reach for a key file, which need not be there yet.
fn place_of_key(file: &Path) -> &Path {
    if file.exists() { file } else { file.parent().unwrap_or(file) }
}

/// The layers to leave out; `None` where that is all of them.
fn confinement(without: Vec<Layer>) -> Option<Vec<Layer>> {
    let is_any_left = Layer::ALL.iter().any(|layer| !without.contains(layer));
    is_any_left.then_some(without)
}

fn starting_a_thread(error: io::Error) -> String {
    format!("starting a thread: {error}")
}

/// Overlays among images would be shown as such.
fn refuse_mixing(overlays: &Path, others: &[&Path]) -> Result<(), String> {
    let other =
        others.iter().find(|other| is_within(overlays, other) || is_within(other, overlays));
    other.map_or(Ok(()), |other| {
        let (overlays, other) = (overlays.display(), other.display());
        Err(format!("the overlay directory {overlays} and {other} must lie apart"))
    })
}

/// A mount over its own images could never be answered. A bind mount may give either of them a
/// second name.
fn refuse_nesting(source: &Path, mountpoint: &Path) -> Result<(), String> {
    let (images, place) = (source.display(), mountpoint.display());
    if is_within(source, mountpoint) && is_within(mountpoint, source) {
        return Err(format!("{place} cannot be mounted over itself: mount it somewhere else"));
    }
    if is_within(source, mountpoint) {
        return Err(format!("{images} lies beneath the mount point {place}, which would hide it"));
    }
    if is_within(mountpoint, source) {
        return Err(format!("the mount point {place} lies beneath the image directory {images}"));
    }
    Ok(())
}

/// Keys beneath the mount point would be looked for in the mount that needs them.
fn refuse_keys_beneath(mountpoint: &Path, keys: &keys::Args) -> Result<(), String> {
    let hidden = keys.places().find(|place| is_within(place, mountpoint));
    hidden.map_or(Ok(()), |place| {
        let (place, mountpoint) = (place.display(), mountpoint.display());
        Err(format!("{place} lies beneath the mount point {mountpoint}, which would hide it"))
    })
}

/// Whether `path` is `directory` or lies beneath it, by whatever name.
fn is_within(path: &Path, directory: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |path: &Path| path.metadata().ok().map(|m| (m.dev(), m.ino()));
    let wanted = id(directory);
    path.starts_with(directory)
        || wanted.is_some() && path.ancestors().any(|parent| id(parent) == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_and_its_images_are_apart() {
        let refused = [("/a", "/a"), ("/a/b", "/a"), ("/a", "/a/b/c")];
        for (source, mountpoint) in refused {
            assert!(refuse_nesting(source.as_ref(), mountpoint.as_ref()).is_err(), "{source}");
        }
        refuse_nesting("/a".as_ref(), "/ab".as_ref()).unwrap();
        refuse_nesting("/a/b".as_ref(), "/a/c".as_ref()).unwrap();
    }

    #[test]
    fn what_is_no_directory_is_refused_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.qcow2");
        std::fs::write(&file, "").unwrap();
        let line = directory(&file, "the mount point").unwrap_err();
        assert!(line.ends_with("a.qcow2 is no directory"), "{line}");
        let other = dir.path().join("a.img");
        std::fs::write(&other, "").unwrap();
        let line = Source::find(&other).err().unwrap();
        assert!(line.ends_with("a.img has no name that ends in .qcow2: rename it"), "{line}");
        let source = Source::find(&file).ok().unwrap();
        assert_eq!(source.directory.join(source.only.unwrap()), source.shown);
        let line = directory(&dir.path().join("no"), "the mount point").unwrap_err();
        assert!(line.ends_with("there is no such directory"), "{line}");
    }
}
