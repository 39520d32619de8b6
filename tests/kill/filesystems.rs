//! ext4 and xfs on loop devices, with programs at work in them.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::daemon::{Daemon, Moment};
use crate::devices::{EXT4, Kind, LoopDevice, XFS};
use crate::lab::{Lab, assert_sound, eventually, is_mounted, pattern};
use crate::support::qemu;
use crate::support::rng::Rng;
use crate::tally::Tally;

/// xfs is no smaller.
const DISK: &str = "300M";
const KILLS_PER_IMAGE: u64 = 8;
const LONG: Duration = Duration::from_secs(60);
/// Each writer has so many files.
const FILES: usize = 32;
const WRITERS: usize = 2;
const LARGEST_FILE: u64 = 256 << 10;

const KINDS: [&Kind; 2] = [&EXT4, &XFS];

/// fio's own record of what was acknowledged: every write is durable when it is over, and the state
/// says which were.
const FIO: &str = "fio --name=kill --rw=randwrite --bs=4k --size=16M --ioengine=psync --sync=dsync \
    --verify=crc32c --verify_fatal=1 --randrepeat=1 --minimal";

/// Kills daemons until there were enough.
pub fn work(seed: u64, tally: &Tally) {
    let mut rng = Rng::new(seed);
    let mut kind = (seed >> 32) as usize;
    while tally.goes_on() {
        kind += 1;
        let mut disk = Disk::new(KINDS[kind % KINDS.len()], &mut rng);
        for _ in 0..KILLS_PER_IMAGE {
            if tally.goes_on() {
                disk.live_and_die(&mut rng, tally);
            }
        }
        disk.end();
    }
}

/// An image with a file system in it, and what was acknowledged there.
struct Disk {
    lab: Lab,
    image: PathBuf,
    kind: &'static Kind,
    writers: Vec<Writer>,
    kills: u64,
}

impl Disk {
    fn new(kind: &'static Kind, rng: &mut Rng) -> Disk {
        let lab = Lab::new();
        let cluster_size = rng.pick(&["64k", "4k", "64k,extended_l2=on"]);
        let image = lab.create("disk.qcow2", DISK, &format!("cluster_size={cluster_size}"));
        lab.subdirectory("fs");
        lab.subdirectory("state");
        let writers = (0..WRITERS).map(|n| Writer::new(n, rng.next())).collect();
        Disk { lab, image, kind, writers, kills: 0 }
    }

    /// Mounts, judges what the last kill has left, works, and is killed.
    fn live_and_die(&mut self, rng: &mut Rng, tally: &Tally) {
        let daemon = Daemon::start(&self.lab);
        let direct = if rng.one_in(2) { "on" } else { "off" };
        let device = LoopDevice::attach(&daemon.path("disk.raw"), &format!("--direct-io={direct}"));
        if self.kills == 0 {
            self.kind.make(device.path());
        } else {
            tally.mounted_again(daemon.age());
            self.judge(&device);
        }
        let moment = Moment::random(rng, 800);
        let moved = if let Moment::Moving(_) = moment {
            self.thin_out(&device);
            daemon.begin_to_move("disk.raw")
        } else {
            false
        };
        self.mount(&device, if rng.one_in(2) { "discard" } else { "noatime" });
        let acknowledged = match moment {
            Moment::Early(after) | Moment::Moving(after) => {
                let fio = self.start_fio();
                let acknowledged = self.work(|stops| {
                    thread::sleep(after);
                    stops.store(true, Ordering::Relaxed);
                    daemon.kill();
                });
                fio.wait_with_output().unwrap();
                self.take_down(device);
                acknowledged
            }
            Moment::Closing(after) => {
                let work = Duration::from_millis(rng.within(0..200));
                let acknowledged = self.work(|stops| {
                    thread::sleep(work);
                    stops.store(true, Ordering::Relaxed);
                });
                self.take_down(device);
                thread::sleep(after);
                daemon.kill();
                acknowledged
            }
        };
        tally.killed(moved, acknowledged);
        self.kills += 1;
        let sound = qemu::check_allowing_leaks(&self.image);
        sound.unwrap_or_else(|e| panic!("after {} kills: {e}", self.kills));
    }

    fn point(&self) -> PathBuf {
        self.lab.path("fs")
    }

    fn mount(&self, device: &LoopDevice, options: &str) {
        sh!("mount -o {options} {} {}", device.path().display(), self.point().display());
    }

    /// Also when the disk is gone. A child that another test has just forked may have a copy of a
    /// file that was open in it, until it executes its program.
    fn umount(&self) {
        let done = || attempt!("umount {}", self.point().display()).ok();
        eventually(LONG, done, || format!("{} is busy", self.point().display()));
    }

    fn take_down(&self, device: LoopDevice) {
        self.umount();
        device.detach();
    }

    /// What was acknowledged is there, and the file system is sound once its log is replayed.
    fn judge(&mut self, device: &LoopDevice) {
        self.mount(device, "noatime");
        let point = self.point();
        for writer in &mut self.writers {
            let place = writer.place(&point);
            writer.judge(&place).unwrap_or_else(|e| {
                let said = what_the_kernel_said(device);
                panic!("after {} kills: {e}\n{said}", self.kills)
            });
        }
        if self.fio_state().exists() {
            let arguments = self.fio_arguments();
            // It would save what it has gone through as if it had written it.
            let verify = "--verify_only --verify_state_load=1 --verify_state_save=0";
            sh!("{FIO} {arguments} {verify}");
        }
        self.umount();
        self.kind.judge(device.path());
    }

    /// Fills the file system on its first day, then deletes a part of what is in it.
    fn thin_out(&mut self, device: &LoopDevice) {
        self.mount(device, "noatime");
        let point = self.point();
        for writer in &mut self.writers {
            let place = writer.place(&point);
            writer.thin_out(&place).unwrap();
        }
        sh!("sync -f {0} && fstrim {0}", point.display());
        self.umount();
    }

    fn fio_state(&self) -> PathBuf {
        self.lab.path("state/local-kill-0-verify.state")
    }

    fn fio_arguments(&self) -> String {
        let (file, state) = (self.point().join("fio"), self.lab.path("state"));
        format!("--filename={} --aux-path={}", file.display(), state.display())
    }

    fn start_fio(&self) -> Child {
        let _ = fs::remove_file(self.fio_state());
        let arguments = self.fio_arguments();
        let mut words = FIO.split_whitespace().chain(arguments.split(' '));
        let mut fio = Command::new(words.next().expect("a program"));
        fio.args(words).args(["--do_verify=0", "--verify_state_save=1"]);
        fio.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// The writers work until they cannot any more, or are told to stop, while `meanwhile` goes on.
    /// How many fsyncs they have seen.
    fn work(&mut self, meanwhile: impl FnOnce(&AtomicBool)) -> u64 {
        let (point, stops) = (self.point(), AtomicBool::new(false));
        thread::scope(|scope| {
            let mut writers = Vec::new();
            for writer in &mut self.writers {
                let (place, stops) = (writer.place(&point), &stops);
                writers.push(scope.spawn(move || writer.work(&place, stops)));
            }
            meanwhile(&stops);
            writers.into_iter().map(|writer| writer.join().unwrap()).sum()
        })
    }

    /// Mounted once more and closed in order, nothing has leaked.
    fn end(mut self) {
        if self.kills == 0 {
            // There is no file system yet.
            return;
        }
        let daemon = Daemon::start(&self.lab);
        let device = LoopDevice::attach(&daemon.path("disk.raw"), "");
        self.judge(&device);
        daemon.wait_for_leaks();
        device.detach();
        daemon.umount();
        assert_sound(&self.image);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // After a failure.
        if is_mounted(&self.point()) {
            attempt!("umount -l {}", self.point().display());
        }
    }
}

/// The last messages about a device: an error before the kill tells that the file system was told of
/// it, and which promise it did not keep.
fn what_the_kernel_said(device: &LoopDevice) -> String {
    let name = device.path().file_name().unwrap().to_str().unwrap();
    attempt!("dmesg | grep {name} | tail -40").text()
}

/// What a file holds.
#[derive(Clone, Debug, PartialEq)]
struct Contents {
    seed: u64,
    length: u64,
}

/// One file: what is known to be durable, and what else it may be.
#[derive(Clone, Debug, Default)]
struct Slot {
    acknowledged: Option<Contents>,
    /// What was begun and not acknowledged.
    pending: Option<Option<Contents>>,
}

/// Somebody who replaces and deletes files, each time durably, in a directory of its own.
struct Writer {
    number: usize,
    rng: Rng,
    slots: Vec<Slot>,
    fsyncs: u64,
}

impl Writer {
    fn new(number: usize, seed: u64) -> Writer {
        Writer { number, rng: Rng::new(seed), slots: vec![Slot::default(); FILES], fsyncs: 0 }
    }

    fn place(&self, point: &Path) -> PathBuf {
        point.join(format!("writer-{}", self.number))
    }

    fn work(&mut self, place: &Path, stops: &AtomicBool) -> u64 {
        self.fsyncs = 0;
        // Nobody counts on it before it has a durable file.
        let _ = fs::create_dir(place);
        while self.step(place, stops).is_ok() && !stops.load(Ordering::Relaxed) {}
        self.fsyncs
    }

    /// Replaces or deletes a file. What is acknowledged when the disk is about to go is not relied
    /// on: ext4 may call an fsync done after it has given up its journal.
    fn step(&mut self, place: &Path, stops: &AtomicBool) -> io::Result<()> {
        let index = self.rng.within(0..FILES as u64) as usize;
        let path = file(place, index);
        let exists = self.slots[index].acknowledged.is_some();
        let next = match exists && self.rng.one_in(3) {
            true => None,
            false => Some(self.new_contents()),
        };
        self.slots[index].pending = Some(next.clone());
        match &next {
            Some(contents) => replace(&path, contents)?,
            None => fs::remove_file(&path)?,
        }
        File::open(place)?.sync_all()?;
        if stops.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.fsyncs += 1;
        self.slots[index] = Slot { acknowledged: next, pending: None };
        Ok(())
    }

    /// Deletes every third file after it has made those that are not there; not yet durable.
    fn thin_out(&mut self, place: &Path) -> io::Result<()> {
        let _ = fs::create_dir(place);
        for index in 0..FILES {
            if self.slots[index].acknowledged.is_none() {
                let contents = self.new_contents();
                replace(&file(place, index), &contents)?;
                self.slots[index].acknowledged = Some(contents);
            }
        }
        for index in (0..FILES).filter(|_| self.rng.one_in(3)).collect::<Vec<_>>() {
            fs::remove_file(file(place, index))?;
            self.slots[index].acknowledged = None;
        }
        Ok(())
    }

    fn new_contents(&mut self) -> Contents {
        Contents { seed: self.rng.next(), length: self.rng.within(1..LARGEST_FILE) }
    }

    /// Every file is as it was acknowledged, or as what came next would have made it.
    fn judge(&mut self, place: &Path) -> Result<(), String> {
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let found = match fs::read(file(place, index)) {
                Ok(bytes) => Some(bytes),
                Err(e) if e.kind() == io::ErrorKind::NotFound => None,
                Err(e) => return Err(format!("reading file {index}: {e}")),
            };
            let is = |contents: &Option<Contents>| found == contents.as_ref().map(Contents::bytes);
            let allowed = [Some(slot.acknowledged.clone()), slot.pending.take()];
            let held = allowed.iter().flatten().find(|contents| is(contents)).cloned();
            let length = found.as_ref().map(Vec::len);
            slot.acknowledged = held.ok_or_else(|| {
                format!("file {index} of {length:?} bytes is none of {allowed:?}")
            })?;
        }
        Ok(())
    }
}

fn file(place: &Path, index: usize) -> PathBuf {
    place.join(format!("file-{index}"))
}

impl Contents {
    fn bytes(&self) -> Vec<u8> {
        pattern(self.seed, self.length as usize)
    }
}

fn replace(path: &Path, contents: &Contents) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(&contents.bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)
}
