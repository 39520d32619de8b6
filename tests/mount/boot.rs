//! Mounting at boot: the helper of mount(8), lines of `/etc/fstab`, and systemd's units.

use std::ffi::OsString;
use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use crate::lab::{
    Lab, Mount, PROGRAM, assert_sound, eventually, is_mounted, signal, wait_for_end, write_by_dd,
};

const SOON: Duration = Duration::from_secs(20);
const UNITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/packaging/systemd");

/// The program where mount(8) looks for helpers, under a type that nobody else has.
pub struct Helper {
    link: PathBuf,
    pub kind: String,
}

impl Helper {
    pub fn new(lab: &Lab) -> Helper {
        let unique = lab.path("").file_name().unwrap().to_str().unwrap().replace('.', "-");
        let kind = format!("qcow2fs-{unique}");
        let link = Path::new("/sbin").join(format!("mount.{kind}"));
        std::os::unix::fs::symlink(PROGRAM, &link).unwrap();
        Helper { link, kind }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.link);
    }
}

#[test]
fn the_helper_mounts_with_the_usual_options() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let helper = Helper::new(&lab);
    let (kind, images, point) = (&helper.kind, lab.images(), lab.point());
    let (images, place) = (images.display(), point.display());
    let ignored = "nofail,_netdev,noauto,nosuid,nodev,x-systemd.automount,X-mount.mkdir,user=me";
    sh!("mount -t {kind} {images} {place} -v -o ro,allow_other,uid=7,gid=8,umask=077,{ignored}");
    let mount = Mount::adopt(lab.point(), lab.path("log"));
    let metadata = fs::metadata(mount.path("disk.raw")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o777), (7, 8, 0o600));
    assert_eq!(mount.status()["read_only"], true);
    sh!("umount {place}");
    wait_for_end(mount.pid());

    // One image, as it may stand in fstab.
    let table = lab.path("fstab");
    let line = format!("{} {place} {kind} rw,noatime,nofail 0 0\n", image.display());
    fs::write(&table, line).unwrap();
    sh!("mount -T {} -a", table.display());
    let mount = Mount::adopt(lab.point(), lab.path("log"));
    write_by_dd(&mount.path("disk.raw"), b"written");
    sh!("umount {place}");
    wait_for_end(mount.pid());
    assert_sound(&image);
}

#[test]
fn an_option_that_is_not_known_is_refused_in_one_line() {
    let lab = Lab::new();
    let helper = Helper::new(&lab);
    let (images, point) = (lab.images(), lab.point());
    for option in ["frobnicate", "uid=me", "size=1G"] {
        let (images, place) = (images.display(), point.display());
        let refused = attempt!("mount -t {} {images} {place} -o rw,{option}", helper.kind);
        assert!(!refused.ok());
        let lines: Vec<_> = refused.err.lines().filter(|line| line.contains("qcow2fs:")).collect();
        assert!(lines.len() == 1 && lines[0].contains(option), "{option}: {}", refused.text());
        assert!(!is_mounted(&point));
    }
    // What mount(8) only pretends is not done.
    sh!("mount -f -t {} {} {}", helper.kind, images.display(), point.display());
    assert!(!is_mounted(&point));
}

/// What the service manager is told, as systemd listens to it.
struct Manager {
    socket: UnixDatagram,
    name: OsString,
}

impl Manager {
    fn new(lab: &Lab) -> Manager {
        let path = lab.path("notify");
        Manager::at(SocketAddr::from_pathname(&path).unwrap(), path.into())
    }

    /// Its socket is no file.
    fn without_file(lab: &Lab) -> Manager {
        let name = lab.path("notify").into_os_string().into_string().unwrap();
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        Manager::at(address, format!("@{name}").into())
    }

    fn at(address: SocketAddr, name: OsString) -> Manager {
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        Manager { socket, name }
    }

    fn is_told(&self) -> String {
        let mut text = [0; 256];
        let length = self.socket.recv(&mut text).expect("something is told");
        String::from_utf8_lossy(&text[..length]).trim().to_owned()
    }
}

/// The right side of the lines of a unit or an environment file that begin with `key=`.
fn values(file: &str, key: &str) -> Vec<String> {
    let text = fs::read_to_string(Path::new(UNITS).join(file)).unwrap();
    let lines = text.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    lines.map(str::to_owned).collect()
}

/// A command of the service, as systemd would run it with what `vms.conf` says, but for the
/// directories of the lab.
fn service_command(lab: &Lab, key: &str) -> Command {
    let line = values("qcow2fs@.service", key).remove(0);
    let line = line.trim_start_matches('-').replace("/usr/bin/qcow2fs", PROGRAM);
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("exec {line}")]);
    for name in ["SOURCE", "MOUNTPOINT", "OPTIONS"] {
        assert_eq!(values("vms.conf", name).len(), 1, "{name} in vms.conf");
    }
    shell.env("SOURCE", lab.images()).env("MOUNTPOINT", lab.point());
    shell.env("OPTIONS", values("vms.conf", "OPTIONS").remove(0));
    shell
}

fn ends(mut child: Child) -> std::process::ExitStatus {
    let mut status = None;
    let ended = || {
        status = child.try_wait().unwrap();
        status.is_some()
    };
    eventually(SOON, ended, || "it does not end".into());
    status.unwrap()
}

#[test]
fn the_service_tells_when_it_is_ready_and_its_stop_waits_for_the_images() {
    for manager in [Manager::new, Manager::without_file] {
        let lab = Lab::new();
        serve_and_stop(&lab, &manager(&lab));
    }
}

fn serve_and_stop(lab: &Lab, manager: &Manager) {
    let image = lab.create("disk.qcow2", "8M", "");
    let mut start = service_command(lab, "ExecStart");
    let daemon = start.env("NOTIFY_SOCKET", &manager.name).spawn().unwrap();
    assert_eq!(manager.is_told(), "READY=1");
    assert!(is_mounted(&lab.point()), "told before it was mounted");
    let mount = Mount::adopt(lab.point(), lab.path("log"));
    assert_eq!(mount.pid(), daemon.id() as i32, "the main process is not the daemon");
    write_by_dd(&mount.path("disk.raw"), b"written");
    let mut stop = service_command(lab, "ExecStop");
    assert!(stop.status().unwrap().success());
    assert_eq!(manager.is_told(), "STOPPING=1");
    assert!(ends(daemon).success());
    assert_sound(&image);
    assert!(service_command(lab, "ExecStopPost").status().unwrap().success());
}

#[test]
fn what_a_killed_service_leaves_is_cleaned_up() {
    let lab = Lab::new();
    let manager = Manager::new(&lab);
    let mut start = service_command(&lab, "ExecStart");
    let daemon = start.env("NOTIFY_SOCKET", &manager.name).spawn().unwrap();
    assert_eq!(manager.is_told(), "READY=1");
    signal(daemon.id() as i32, libc::SIGKILL);
    ends(daemon);
    assert!(is_mounted(&lab.point()));
    assert!(service_command(&lab, "ExecStopPost").status().unwrap().success());
    assert!(!is_mounted(&lab.point()));
}

#[test]
fn systemd_takes_the_units_and_finds_no_cycle_in_their_order() {
    let lab = Lab::new();
    let units = lab.subdirectory("units");
    for unit in ["qcow2fs@.service", "mnt-disk.mount"] {
        let text = fs::read_to_string(Path::new(UNITS).join(unit)).unwrap();
        fs::write(units.join(unit), text.replace("/usr/bin/qcow2fs", PROGRAM)).unwrap();
    }
    // As they would be enabled: the default target wants them.
    let target = units.join("multi-user.target.wants");
    fs::create_dir(&target).unwrap();
    for (link, unit) in
        [("qcow2fs@vms.service", "qcow2fs@.service"), ("mnt-disk.mount", "mnt-disk.mount")]
    {
        std::os::unix::fs::symlink(units.join(unit), target.join(link)).unwrap();
    }
    let verified = attempt!(
        "cd {}; SYSTEMD_UNIT_PATH={}: systemd-analyze verify --man=no multi-user.target \
         qcow2fs@vms.service mnt-disk.mount",
        units.display(),
        units.display()
    );
    let text = verified.text();
    let ours: Vec<_> = text.lines().filter(|line| says_of_ours(line)).collect();
    assert!(verified.ok() && ours.is_empty(), "{text}");
    // The loop mount comes after the mount that it lies on, and goes with it.
    let disk = fs::read_to_string(units.join("mnt-disk.mount")).unwrap();
    for line in ["Requires=qcow2fs@vms.service", "After=qcow2fs@vms.service"] {
        assert!(disk.lines().any(|found| found == line), "{line}");
    }
}

fn says_of_ours(line: &str) -> bool {
    ["qcow2fs", "mnt-disk", "cycle"].iter().any(|name| line.contains(name))
}

#[test]
fn the_manual_tells_of_each_file_and_option_of_a_mount() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/packaging/man/qcow2fs.5");
    let page = fs::read_to_string(page).unwrap();
    let lab = Lab::new();
    let mount = lab.mount();
    let hidden = fs::read_dir(mount.path(".qcow2fs")).unwrap();
    let names: Vec<_> = hidden.map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.len() >= 2, "{names:?}");
    for name in names {
        let line = format!(".I {}", name.to_str().unwrap());
        assert!(page.lines().any(|found| found == line), "{line}");
    }
    mount.umount();
    // The service reads what the example has, and the page says so.
    for name in ["SOURCE", "MOUNTPOINT", "OPTIONS"] {
        assert!(page.contains(&format!("{name}=")), "{name}");
    }
    // Its lines for fstab are taken as they stand, but for the places.
    let line = page.lines().find(|line| line.starts_with("/var/lib/images ")).unwrap();
    let options = line.split_whitespace().nth(3).unwrap();
    let helper = Helper::new(&lab);
    let (images, point) = (lab.images(), lab.point());
    sh!("mount -t {} -o {options} {} {}", helper.kind, images.display(), point.display());
    Mount::adopt(lab.point(), lab.path("log")).umount();
}
