//! The mount is taken away, or stands still, while clients write: nothing hangs, and what was
//! acknowledged is there, whether or not it was synced, since the daemon closes its images itself.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::daemon::Daemon;
use crate::lab::{Lab, assert_sound, eventually, is_mounted, signal};
use crate::raw::{Crew, Disk, open};
use crate::support::oracle::After;
use crate::support::rng::Rng;

/// Whoever waits for something is through by then.
const LIMIT: Duration = Duration::from_secs(10);

/// A way to take a mount away from those who use it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// `umount -l`: it is there for those who have it open, until they close it.
    Lazily,
    /// `umount -f`: the connection is cut, and the mount stays as long as it is used.
    ByForce,
    /// Through `/sys/fs/fuse/connections`.
    Aborted,
    /// `SIGTERM` twice.
    Told,
}

impl Way {
    fn take(self, daemon: &Daemon, lab: &Lab) {
        let point = lab.point();
        match self {
            Way::Lazily => drop(sh!("umount -l {}", point.display())),
            // It says that it is busy, after it has cut the connection.
            Way::ByForce => drop(attempt!("umount -f {}", point.display())),
            Way::Aborted => abort(&point, &lab.subdirectory("connections")),
            Way::Told => {
                signal(daemon.pid(), libc::SIGTERM);
                let log = || fs::read_to_string(lab.path("log")).unwrap();
                eventually(LIMIT, || log().contains("is busy, still serving it"), log);
                signal(daemon.pid(), libc::SIGTERM);
            }
        }
    }
}

/// Cuts the connection of the mount at `point`; `place` is for the file system that can.
fn abort(point: &Path, place: &Path) {
    let number = libc::minor(fs::metadata(point).unwrap().dev());
    sh!("mount -t fusectl none {}", place.display());
    fs::write(place.join(format!("{number}/abort")), "1").unwrap();
    sh!("umount {}", place.display());
}

/// A disk and a daemon with clients at work; `meanwhile` ends that, and says when.
fn with_clients(meanwhile: impl FnOnce(&Crew, &Daemon, &Lab) -> Instant) -> (Disk, Daemon) {
    let seed = crate::support::rng::fresh_seed();
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let mut disk = Disk::new(&mut rng);
    let daemon = Daemon::start(disk.lab());
    let file = open(&daemon, rng.one_in(2));
    let crew = Crew::new(&disk.judge(&file));
    let ended = crew.work(&file, &mut rng, || {
        crew.allocate();
        crew.wait_for_more(200, LIMIT);
        meanwhile(&crew, &daemon, disk.lab())
    });
    assert!(ended.elapsed() < LIMIT, "clients hang for {:?}", ended.elapsed());
    drop(file);
    disk.remember(crew, After::Running);
    (disk, daemon)
}

fn nothing_is_lost_or_hangs(way: Way) {
    let (disk, mut daemon) = with_clients(|crew, daemon, lab| {
        way.take(daemon, lab);
        if way == Way::Lazily {
            crew.wait_for_more(100, LIMIT);
            crew.stop();
        }
        Instant::now()
    });
    let ended = daemon.wait_for_end(LIMIT);
    assert!(ended.success(), "{way:?}: {ended}");
    assert!(!is_mounted(&disk.lab().point()), "{way:?}: still mounted");
    drop(daemon);
    // Closed in order: sound, with nothing leaked, and all that was acknowledged is there.
    assert_sound(disk.image());
    disk.end();
}

#[test]
fn a_mount_that_is_detached_serves_on_until_it_is_not_used_any_more() {
    nothing_is_lost_or_hangs(Way::Lazily);
}

#[test]
fn a_mount_that_is_taken_by_force_closes_its_images_in_order() {
    nothing_is_lost_or_hangs(Way::ByForce);
}

#[test]
fn a_mount_whose_connection_is_cut_closes_its_images_in_order() {
    nothing_is_lost_or_hangs(Way::Aborted);
}

#[test]
fn a_daemon_that_is_told_to_go_closes_its_images_in_order() {
    nothing_is_lost_or_hangs(Way::Told);
}

#[test]
fn a_daemon_that_stood_still_goes_on() {
    let (disk, daemon) = with_clients(|crew, daemon, _| {
        signal(daemon.pid(), libc::SIGSTOP);
        thread::sleep(Duration::from_millis(500));
        signal(daemon.pid(), libc::SIGCONT);
        crew.wait_for_more(100, LIMIT);
        crew.stop();
        Instant::now()
    });
    daemon.umount();
    assert_sound(disk.image());
    disk.end();
}
