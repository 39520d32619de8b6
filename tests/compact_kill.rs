//! Compaction that is killed: whenever that is, the image stays sound and holds what it held, and
//! the next run goes on to the end. Killed with SIGKILL are the command, many times in a row on the
//! same image, and a mount that compacts while somebody writes.
//!
//! What a kill leaves in the page cache stays written: power cuts are another test's.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use qcow2fs::image::{Beside, CompactAfter, Image, Options, RawBacking};
use support::qemu;
use support::rng::{Rng, fresh_seed};
use support::{Watchdog, difference, host_file, open_read_only, scratch, setting};

const PROGRAM: &str = env!("CARGO_BIN_EXE_qcow2fs");
const MIB: u64 = 1 << 20;
/// How many times the command is killed in its work, in a normal run.
const KILLS: u64 = 200;
/// How many times a mount is.
const MOUNT_KILLS: u64 = 20;

/// An image with its live clusters scattered over the file, and what it holds.
struct Base {
    name: &'static str,
    path: PathBuf,
    backing: Option<PathBuf>,
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    /// How long compacting it takes if nobody comes in between.
    takes: Duration,
}

/// For making a base: nothing moves.
fn still() -> Options {
    Options { writable: true, compact_after: CompactAfter::Off, ..Options::default() }
}

impl Base {
    fn create(name: &'static str, directory: &Path, options: &str, mib: u64) -> Base {
        let path = directory.join(format!("{name}.qcow2"));
        let size = format!("{mib}M");
        let create = ["create", "-q", "-f", "qcow2", "-o", options];
        qemu::run(Command::new("qemu-img").args(create).arg(&path).arg(size));
        let (disk, takes) = (Vec::new(), Duration::ZERO);
        Base { name, path, backing: None, disk, snapshots: Vec::new(), takes }
    }

    fn open(&self) -> Arc<Image> {
        let backing = self.backing.as_ref().map(|path| {
            Arc::new(RawBacking::new(host_file(path)).unwrap()) as Arc<dyn qcow2fs::image::Backing>
        });
        Image::open_over(host_file(&self.path), &still(), backing).unwrap()
    }

    /// Fills the disk with data that differs everywhere, then keeps one cluster in `one_in`.
    fn scatter(self, seed: u64, one_in: u64) -> Base {
        let image = self.open();
        let mut rng = Rng::new(seed);
        let mut data = vec![0; MIB as usize];
        for at in (0..image.virtual_size()).step_by(MIB as usize) {
            // Half of it can be compressed away.
            data.chunks_exact_mut(16)
                .for_each(|words| words[..8].copy_from_slice(&rng.next().to_le_bytes()));
            image.write(at, &data).unwrap();
        }
        image.flush().unwrap();
        self.thin(&image, &mut rng, one_in);
        image.close().unwrap();
        self
    }

    fn thin(&self, image: &Image, rng: &mut Rng, one_in: u64) {
        let step = image.cluster_size();
        for at in (0..image.virtual_size()).step_by(step as usize) {
            if !rng.one_in(one_in) {
                image.discard(at..at + step).unwrap();
            }
        }
    }

    fn snapshot(self, verb: &str, name: &str) -> Base {
        qemu::run(Command::new("qemu-img").args(["snapshot", verb, name]).arg(&self.path));
        self
    }

    /// What it holds is what it has to hold from now on.
    fn settled(mut self, snapshots: &[&str]) -> Base {
        qemu::assert_clean(&self.path);
        self.disk = qemu::contents(&self.path, None);
        let held = |name: &&str| (name.to_string(), qemu::contents(&self.path, Some(name)));
        self.snapshots = snapshots.iter().map(held).collect();
        let copy = Attempt::new(&self, "timing").path;
        let started = Instant::now();
        assert!(compact(&copy).wait().unwrap().success(), "{}", self.name);
        self.takes = started.elapsed();
        let (before, after) = (length(&self.path), length(&copy));
        assert!(after * 10 < before * 8, "{}: {before} bytes became {after}", self.name);
        self
    }
}

fn length(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

fn bases(directory: &Path) -> Vec<Base> {
    let make = |name, options, mib| Base::create(name, directory, options, mib);
    let large = make("large", "cluster_size=65536", 64).scatter(1, 4).settled(&[]);
    let small = make("small", "cluster_size=4096", 16).scatter(2, 4).settled(&[]);
    let old = make("old", "compat=0.10,cluster_size=4096", 16).scatter(3, 3).settled(&[]);
    // What a deleted snapshot held leaves holes; what is left is shared by the disk and others.
    let shared = make("shared", "cluster_size=4096", 12)
        .scatter(4, 2)
        .snapshot("-c", "first")
        .scatter(5, 4)
        .snapshot("-c", "second")
        .scatter(6, 3)
        .snapshot("-c", "third")
        .snapshot("-d", "first")
        .scatter(7, 6)
        .settled(&["second", "third"]);
    let compressed = {
        let full = make("full", "cluster_size=65536", 32).scatter(8, 1);
        let packed = directory.join("compressed.qcow2");
        let convert = ["convert", "-c", "-O", "qcow2", "-o", "cluster_size=65536"];
        qemu::run(Command::new("qemu-img").args(convert).args([&full.path, &packed]));
        let base = Base { name: "compressed", path: packed, ..full };
        let image = base.open();
        // Many share a host cluster, which is free only without all of them.
        image.discard(0..20 * MIB).unwrap();
        base.thin(&image, &mut Rng::new(9), 2);
        image.close().unwrap();
        base.settled(&[])
    };
    let overlay = {
        let below = directory.join("below.raw");
        std::fs::write(&below, vec![0x5a; 24 << 20]).unwrap();
        let path = directory.join("overlay.qcow2");
        let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=16384", "-F", "raw", "-b"];
        qemu::run(Command::new("qemu-img").args(create).args([&below, &path]).arg("32M"));
        let mut base = Base::create("fresh", directory, "cluster_size=16384", 1);
        base = Base { name: "overlay", path, backing: Some(below), ..base };
        base.scatter(10, 4).settled(&[])
    };
    vec![large, small, old, shared, compressed, overlay]
}

/// A copy of a base that is being compacted. It lies beside the base, whose backing file is there.
struct Attempt<'a> {
    base: &'a Base,
    path: PathBuf,
}

impl<'a> Attempt<'a> {
    fn new(base: &'a Base, name: &str) -> Self {
        let path = base.path.with_file_name(format!("{name}-{}.qcow2", base.name));
        qemu::run(Command::new("cp").arg("--sparse=always").args([&base.path, &path]));
        Attempt { base, path }
    }

    /// Nothing is corrupt, by QEMU's judgement and ours, and the disk holds what it held; with
    /// `thoroughly` QEMU reads it, and the snapshots too.
    fn assert_sound(&self, thoroughly: bool) {
        let name = self.base.name;
        support::verify(&*host_file(&self.path)).unwrap_or_else(|e| panic!("{name}: {e}"));
        qemu::check_allowing_leaks(&self.path).unwrap_or_else(|e| panic!("{name}: {e}"));
        let backing = self.base.backing.as_ref().map(|path| {
            Arc::new(RawBacking::new(host_file(path)).unwrap()) as Arc<dyn qcow2fs::image::Backing>
        });
        let image =
            open_read_only(host_file(&self.path), Beside { backing, ..Beside::default() }).unwrap();
        let mut found = vec![0; self.base.disk.len()];
        image.read(0, &mut found).unwrap();
        if let Some(difference) = difference(&found, &self.base.disk) {
            panic!("{name} holds {difference}");
        }
        if thoroughly {
            self.assert_same_for_qemu();
        }
    }

    fn assert_same_for_qemu(&self) {
        let held = std::iter::once((None, &self.base.disk));
        let snapshots = self.base.snapshots.iter().map(|(name, held)| (Some(&**name), held));
        for (snapshot, expected) in held.chain(snapshots) {
            let found = qemu::contents(&self.path, snapshot);
            if let Some(difference) = difference(&found, expected) {
                panic!("{} {snapshot:?} holds {difference}", self.base.name);
            }
        }
    }

    /// Runs the command to its end: as short as it gets, and nothing has leaked.
    fn finish(self) {
        let name = self.base.name;
        assert!(compact(&self.path).wait().unwrap().success(), "{name}");
        qemu::assert_clean(&self.path);
        self.assert_sound(true);
        let image = open_read_only(host_file(&self.path), Beside::default());
        if let Ok(image) = image {
            let (prospect, length) = (image.prospect().unwrap(), length(&self.path));
            let used = prospect.used * image.cluster_size();
            assert!(length <= used + 4 * image.cluster_size(), "{name}: {length} for {used}");
        }
        std::fs::remove_file(&self.path).unwrap();
    }
}

fn compact(path: &Path) -> Child {
    compact_with(&[], path)
}

fn compact_with(options: &[&str], path: &Path) -> Child {
    Command::new(PROGRAM)
        .args(["compact", "--json"])
        .args(options)
        .arg(path)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Until when to go on, if for longer than a normal run.
fn deadline() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(setting("QCOW2FS_MODEL_SECONDS")?))
}

#[test]
fn a_command_killed_at_any_moment_leaves_a_sound_image_and_the_next_one_goes_on() {
    let deadline = deadline();
    let _watchdog =
        Watchdog::new("killing compactions", 600 + setting("QCOW2FS_MODEL_SECONDS").unwrap_or(0));
    let seed = setting("QCOW2FS_SEED").unwrap_or_else(fresh_seed);
    println!("QCOW2FS_SEED={seed}");
    let mut rng = Rng::new(seed);
    let directory = scratch();
    let bases = bases(directory.path());
    let mut killed = vec![0u64; bases.len()];
    let mut lives: Vec<_> = bases.iter().map(|base| base.takes).collect();
    let (mut late, mut partial) = (0, 0);
    let started = Instant::now();
    let enough = |killed: &[u64]| killed.iter().sum::<u64>() >= KILLS;
    while !enough(&killed) || deadline.is_some_and(|at| Instant::now() < at) {
        // Those that were killed least, since some are hard to hit.
        let at = (0..bases.len()).min_by_key(|&i| killed[i]).unwrap();
        let attempt = Attempt::new(&bases[at], "killed");
        let whole = length(&attempt.path);
        for round in 0..rng.within(1..9) {
            let options: &[&str] = if rng.one_in(4) { &["--defrag"] } else { &[] };
            let mut child = compact_with(options, &attempt.path);
            std::thread::sleep(lives[at].mul_f64(rng.within(0..1000) as f64 / 1000.0));
            child.kill().unwrap();
            let ended = child.wait().unwrap();
            if ended.signal() != Some(libc::SIGKILL) {
                assert!(ended.success(), "{}: {ended}", bases[at].name);
                late += 1;
                // How long it takes depends on what else the machine does.
                lives[at] = lives[at].mul_f64(0.7);
                break;
            }
            killed[at] += 1;
            lives[at] = lives[at].mul_f64(1.1);
            attempt.assert_sound(round == 0 && killed[at].is_multiple_of(8));
            // Between the first and the last thing that changes the file's length.
            partial += u64::from(length(&attempt.path) != whole);
        }
        attempt.finish();
        assert!(late < 10 * killed.iter().sum::<u64>().max(KILLS), "the kills come too late");
    }
    let names: Vec<_> = bases.iter().map(|base| base.name).zip(killed).collect();
    println!(
        "killed {names:?}, {late} too late, {partial} at another length, in {:.1?}",
        started.elapsed()
    );
}

/// What somebody has been told that is on the disk, in blocks of 4 KiB.
struct Client {
    file: File,
    expected: Vec<u8>,
    /// What is not acknowledged yet: either content is right, in each sector.
    pending: Option<(u64, Vec<u8>)>,
    acknowledged: u64,
}

const BLOCK: u64 = 4096;

impl Client {
    /// Writes or discards a block, and waits until it is durable; `Err` when the mount is gone.
    fn step(&mut self, rng: &mut Rng, may_allocate: bool) -> std::io::Result<()> {
        let blocks = self.expected.len() as u64 / BLOCK;
        let (mut block, mut tries) = (rng.within(0..blocks), 0);
        let is_zero = |c: &Client, block: u64| c.at(block).iter().all(|byte| *byte == 0);
        while !may_allocate && is_zero(self, block) && tries < 1000 {
            (block, tries) = ((block + 1) % blocks, tries + 1);
        }
        let discard = may_allocate && rng.one_in(8);
        let mut data = vec![0; BLOCK as usize];
        if !discard {
            data.chunks_exact_mut(8)
                .for_each(|word| word.copy_from_slice(&rng.next().to_le_bytes()));
        }
        self.pending = Some((block, data.clone()));
        match discard {
            true => punch(&self.file, block * BLOCK)?,
            false => self.file.write_all_at(&data, block * BLOCK)?,
        }
        self.file.sync_data()?;
        let from = (block * BLOCK) as usize;
        self.expected[from..from + BLOCK as usize].copy_from_slice(&data);
        self.pending = None;
        self.acknowledged += 1;
        Ok(())
    }

    fn at(&self, block: u64) -> &[u8] {
        &self.expected[(block * BLOCK) as usize..][..BLOCK as usize]
    }

    /// `found` is what was acknowledged, but for what was not yet.
    fn judge(&self, found: &[u8]) -> Result<(), String> {
        let mut expected = self.expected.clone();
        if let Some((block, data)) = &self.pending {
            for sector in (0..BLOCK as usize).step_by(512) {
                let at = (block * BLOCK) as usize + sector;
                if found[at..at + 512] == data[sector..sector + 512] {
                    expected[at..at + 512].copy_from_slice(&data[sector..sector + 512]);
                }
            }
        }
        difference(found, &expected).map_or(Ok(()), Err)
    }
}

fn punch(file: &File, offset: u64) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: fallocate takes no pointers; the descriptor is open.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, BLOCK as i64) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// A mount in the foreground, which goes with this.
struct Mount {
    daemon: Child,
    point: PathBuf,
}

impl Mount {
    fn new(images: &Path, point: &Path) -> Mount {
        std::fs::create_dir_all(point).unwrap();
        let daemon = Command::new(PROGRAM)
            .args(["mount", "--foreground", "--runtime-asserts", "-o", "compact_after=1"])
            .args([images, point])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mount = Mount { daemon, point: point.to_owned() };
        let end = Instant::now() + Duration::from_secs(30);
        while !point.join(".qcow2fs/status").exists() {
            assert!(Instant::now() < end, "not mounted");
            std::thread::sleep(Duration::from_millis(5));
        }
        mount
    }

    fn moved(&self) -> u64 {
        let text = std::fs::read(self.point.join(".qcow2fs/status")).unwrap();
        let status: serde_json::Value = serde_json::from_slice(&text).unwrap();
        status["images"][0]["recycled"]["moved"].as_u64().unwrap_or(0)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        let _ = Command::new("umount").arg("-l").arg(&self.point).status();
    }
}

/// Kills a mount in the midst of compaction, with a client at work; how many of its writes were
/// acknowledged once clusters moved.
fn kill_a_mount(base: &Base, directory: &Path, seed: u64) -> u64 {
    let mut rng = Rng::new(seed);
    let (images, point) = (directory.join("images"), directory.join("mnt"));
    std::fs::create_dir_all(&images).unwrap();
    let image = images.join("disk.qcow2");
    qemu::run(Command::new("cp").arg("--sparse=always").args([&base.path, &image]));
    let mut mount = Mount::new(&images, &point);
    let file = File::options().write(true).open(point.join("disk.raw")).unwrap();
    let expected = base.disk.clone();
    let mut client = Client { file, expected, pending: None, acknowledged: 0 };
    let end = Instant::now() + Duration::from_secs(60);
    while mount.moved() == 0 {
        assert!(Instant::now() < end, "it does not begin to compact");
        // Nothing that would keep it waiting.
        client.step(&mut rng, false).unwrap();
    }
    let before = client.acknowledged;
    let life = Duration::from_micros(rng.within(0..200_000));
    let pid = mount.daemon.id() as i32;
    let killer = std::thread::spawn(move || {
        std::thread::sleep(life);
        // SAFETY: kill takes no pointers; the process is a child that nobody has waited for.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    });
    while client.step(&mut rng, true).is_ok() {}
    killer.join().unwrap();
    assert_eq!(mount.daemon.wait().unwrap().signal(), Some(libc::SIGKILL));
    drop(mount);
    support::verify(&*host_file(&image)).unwrap();
    qemu::check_allowing_leaks(&image).unwrap();
    let found = qemu::contents(&image, None);
    client.judge(&found).unwrap_or_else(|e| panic!("acknowledged data is lost: {e}"));
    assert!(compact(&image).wait().unwrap().success());
    qemu::assert_clean(&image);
    assert!(qemu::contents(&image, None) == found, "compacting changed it");
    client.acknowledged - before
}

#[test]
fn what_a_mount_has_acknowledged_is_there_when_it_is_killed_while_it_compacts() {
    let deadline = deadline();
    let _watchdog =
        Watchdog::new("killing mounts", 600 + setting("QCOW2FS_MODEL_SECONDS").unwrap_or(0));
    let seed = setting("QCOW2FS_SEED").unwrap_or_else(fresh_seed);
    println!("QCOW2FS_SEED={seed}");
    let directory = scratch();
    let bases = [
        Base::create("small", directory.path(), "cluster_size=4096", 24)
            .scatter(11, 4)
            .settled(&[]),
        Base::create("large", directory.path(), "cluster_size=65536", 96)
            .scatter(12, 4)
            .settled(&[]),
    ];
    let started = Instant::now();
    let (mut kills, mut acknowledged) = (0, 0);
    // Most of the time goes by waiting until a mount finds that it may begin.
    const AT_ONCE: u64 = 5;
    while kills < MOUNT_KILLS || deadline.is_some_and(|at| Instant::now() < at) {
        let run = |number: u64| {
            let place = directory.path().join(format!("mount{}", number % AT_ONCE));
            let base = &bases[(number % 2) as usize];
            kill_a_mount(base, &place, seed.wrapping_add(number))
        };
        acknowledged += std::thread::scope(|scope| {
            let runs: Vec<_> =
                (kills..kills + AT_ONCE).map(|number| scope.spawn(move || run(number))).collect();
            runs.into_iter().map(|run| run.join().unwrap()).sum::<u64>()
        });
        kills += AT_ONCE;
    }
    assert!(acknowledged > kills, "hardly anything was written meanwhile");
    println!(
        "{kills} mounts killed, {acknowledged} writes acknowledged while clusters moved, in {:.1?}",
        started.elapsed()
    );
}
