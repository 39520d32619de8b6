//! QEMU's image lock, in both directions: a VM and a mount never write one image at once.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::discards::{open, read_all};
use crate::lab::{Lab, assert_sound, eventually, signal, wait_until_free};

const SOON: Duration = Duration::from_secs(10);

#[path = "../support/nbd.rs"]
mod nbd;

/// A qemu-nbd that serves an image, as a VM would hold it.
pub struct Nbd(nbd::Nbd);

impl Nbd {
    pub fn hold(image: &Path, arguments: &[&str], socket: PathBuf) -> Nbd {
        let nbd = nbd::Nbd::serve(image, arguments, socket);
        // It listens before it opens the image, and answers after.
        sh!("timeout 60 qemu-img info 'nbd+unix:///?socket={}'", nbd.socket().display());
        Nbd(nbd)
    }

    pub fn end(mut self) {
        signal(self.0.child.id() as i32, libc::SIGTERM);
        let ended = || self.0.child.try_wait().unwrap().is_some();
        eventually(SOON, ended, || "qemu-nbd does not end".into());
    }
}

#[test]
fn what_qemu_writes_cannot_be_opened_here() {
    let lab = Lab::new();
    let image = lab.create("vm.qcow2", "8M", "");
    let mount = lab.mount();
    let raw = mount.path("vm.raw");
    let nbd = Nbd::hold(&image, &[], lab.path("socket"));
    for options in [OpenOptions::new().read(true), OpenOptions::new().write(true)] {
        let refusal = options.open(&raw).map(drop).expect_err("opened all the same");
        assert_eq!(refusal.raw_os_error(), Some(libc::EBUSY), "{refusal}");
    }
    assert_eq!(fs::metadata(&raw).unwrap().len(), 8 << 20, "it can still be looked at");
    assert!(mount.log().contains("in use"), "the log does not say why: {}", mount.log());
    nbd.end();
    drop(open(&raw));
    mount.umount();
    assert_sound(&image);
}

#[test]
fn what_qemu_only_reads_can_be_read_here_too() {
    let lab = Lab::new();
    let image = lab.create("vm.qcow2", "8M", "");
    let mount = lab.mount();
    let raw = mount.path("vm.raw");
    let nbd = Nbd::hold(&image, &["--read-only"], lab.path("socket"));
    assert_eq!(read_all(&raw), vec![0; 8 << 20]);
    let refusal = OpenOptions::new().write(true).open(&raw).map(drop).expect_err("writable");
    assert_eq!(refusal.raw_os_error(), Some(libc::EBUSY), "{refusal}");
    nbd.end();
    drop(open(&raw));
    mount.umount();
    assert_sound(&image);
}

fn assert_locked(command: &str, image: &Path) {
    let refused = attempt!("{command} {}", image.display());
    assert!(!refused.ok(), "{command} went through");
    assert!(refused.text().contains("lock"), "{command}: {}", refused.text());
}

#[test]
fn what_is_open_here_cannot_be_opened_by_qemu() {
    let lab = Lab::new();
    let image = lab.create("vm.qcow2", "8M", "");
    let mount = lab.mount();
    let raw = mount.path("vm.raw");
    wait_until_free(&image);

    let writer = open(&raw);
    assert_locked("qemu-img info -f qcow2", &image);
    assert_locked("qemu-io -f qcow2 -c 'write 0 512'", &image);
    assert_locked("qemu-io -r -f qcow2 -c 'read 0 512'", &image);
    sh!("qemu-img info -U -f qcow2 {}", image.display());
    drop(writer);
    wait_until_free(&image);

    let reader = File::open(&raw).unwrap();
    assert_locked("qemu-io -f qcow2 -c 'write 0 512'", &image);
    sh!("qemu-io -r -f qcow2 -c 'read 0 512' {}", image.display());
    drop(reader);
    wait_until_free(&image);
    sh!("qemu-io -f qcow2 -c 'write -P 1 0 512' {}", image.display());
    assert_eq!(read_all(&raw)[..512], [1; 512]);
    mount.umount();
    assert_sound(&image);
}

#[test]
fn a_reader_becomes_a_writer_and_back() {
    let lab = Lab::new();
    let image = lab.create("vm.qcow2", "8M", "");
    let mount = lab.mount();
    let raw = mount.path("vm.raw");
    use std::os::unix::fs::FileExt;
    let reader = File::open(&raw).unwrap();
    let writer = open(&raw);
    writer.write_all_at(b"seen by both", 1 << 20).unwrap();
    let mut found = [0; 12];
    reader.read_exact_at(&mut found, 1 << 20).unwrap();
    assert_eq!(&found, b"seen by both");
    drop(writer);
    reader.read_exact_at(&mut found, 1 << 20).unwrap();
    assert_eq!(&found, b"seen by both");
    drop(reader);
    wait_until_free(&image);
    mount.umount();
    assert_sound(&image);
}
