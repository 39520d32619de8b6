//! A daemon that is going to be killed, and the moment of it.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::lab::{Lab, PROGRAM, attempt, eventually, is_mounted};
use crate::support::rng::Rng;

/// Generous: other tests run beside this one.
const LONG: Duration = Duration::from_secs(60);

/// When it is killed.
#[derive(Clone, Copy, Debug)]
pub enum Moment {
    /// So long after it has begun to serve; it may be looking for leaks.
    Early(Duration),
    /// So long after clusters began to move, where there is any to move.
    Moving(Duration),
    /// So long after the image began to be closed.
    Closing(Duration),
}

impl Moment {
    /// Most come soon, since most is begun then; after `longest` milliseconds at the latest.
    pub fn random(rng: &mut Rng, longest: u64) -> Moment {
        let within = |rng: &mut Rng, ms: u64| Duration::from_micros(rng.within(0..ms * 1000));
        let soon = *rng.pick(&[10, longest / 4, longest]);
        match rng.within(0..10) {
            0..5 => Moment::Early(within(rng, soon)),
            5..9 => Moment::Moving(within(rng, soon)),
            _ => Moment::Closing(within(rng, 30)),
        }
    }
}

/// A mount of a lab's images, served in the foreground by a child.
pub struct Daemon {
    child: Child,
    point: PathBuf,
    started: Instant,
}

impl Daemon {
    /// Starts it and waits until it serves. Whatever there is to win is worth moving for.
    pub fn start(lab: &Lab) -> Daemon {
        let log = File::options().create(true).append(true).open(lab.path("log")).unwrap();
        let started = Instant::now();
        let child = Command::new(PROGRAM)
            .args(["mount", "--foreground", "-v", "--compact-after", "1"])
            .args([lab.images(), lab.point()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let daemon = Daemon { child, point: lab.point(), started };
        let status = daemon.point.join(".qcow2fs/status");
        while !status.exists() {
            assert!(started.elapsed() < LONG, "not mounted");
            thread::sleep(Duration::from_millis(1));
        }
        daemon
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Since it was started.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.point.join(name)
    }

    fn status(&self) -> serde_json::Value {
        let text = fs::read(self.path(".qcow2fs/status")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    /// Has the image behind raw file `name`, the only one that is open, made short, and waits until
    /// clusters move; `false` when there is nothing to move.
    pub fn begin_to_move(&self, name: &str) -> bool {
        fs::write(self.path(".qcow2fs/control"), format!("compact {name}")).unwrap();
        let begun = Instant::now();
        loop {
            let status = self.status();
            let image = &status["images"][0];
            if image["recycled"]["moved"].as_u64().is_some_and(|moved| moved > 0) {
                return true;
            }
            if image["compaction"]["asked"] == false {
                return false;
            }
            assert!(begun.elapsed() < LONG, "it does not begin to compact: {status:#}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until what kills have leaked is found and returned.
    pub fn wait_for_leaks(&self) {
        let found = || self.status()["images"][0]["searching_leaks"] == false;
        eventually(LONG, found, || format!("still looking for leaks: {:#}", self.status()));
    }

    /// Waits until it has ended by itself.
    pub fn wait_for_end(&mut self, limit: Duration) -> ExitStatus {
        let mut ended = None;
        let has_ended = || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        };
        eventually(limit, has_ended, || "the daemon does not end".into());
        ended.expect("it has ended")
    }

    /// Kills it, and waits until nothing of it is left.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        let ended = self.child.wait().unwrap();
        assert_eq!(ended.signal(), Some(libc::SIGKILL), "it ended by itself: {ended}");
    }

    /// Unmounts in order.
    pub fn umount(mut self) {
        let done = || attempt!("$qcow2fs umount {}", self.point.display()).ok();
        eventually(LONG, done, || format!("{} cannot be unmounted", self.point.display()));
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        detach(&self.point);
    }
}

fn detach(point: &Path) {
    if is_mounted(point) {
        attempt(&format!("umount -l {}", point.display()));
    }
}
