//! Names that change while they are opened: what is reached is an image beneath the directory, or
//! nothing.

use std::ffi::{CString, OsStr};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use qcow2fs::catalog::{Alone, Catalog, Keys, Opening, Options, ROOT};
use qcow2fs::image;

use crate::support::{Watchdog, qemu, scratch};

const RIGHT: u8 = 0x11;
const SECRET: u8 = 0x99;
/// How long the two race.
const RACE: Duration = Duration::from_secs(3);

fn image(path: &Path, byte: u8) {
    let mut create = Command::new("qemu-img");
    qemu::run(create.args(["create", "-q", "-f", "qcow2"]).arg(path).arg("1M"));
    qemu::io(path, &[format!("write -P {byte} 0 1M")]);
}

/// Looks `names` up, opens the last one and reads from it; what it begins with.
fn first_byte(catalog: &Catalog, names: &[&str], write: bool) -> qcow2fs::Result<u8> {
    let mut known = Vec::new();
    let found = names.iter().try_fold(ROOT, |parent, name| {
        let found = catalog.lookup(parent, OsStr::new(name))?.ino;
        known.push(found);
        Ok(found)
    });
    let read = found.and_then(|ino| {
        let node = catalog.node(ino)?;
        catalog.open(&node, Opening { write, direct: false })?;
        let mut first = [0];
        let read = node.with_image(|image| image.read(0, &mut first));
        catalog.release(&node);
        read.map(|()| first[0])
    });
    known.iter().for_each(|ino| catalog.forget(*ino, 1));
    read
}

/// Puts one after the other in the place of `name`, in one step each, until it is told to stop.
fn swap(name: &Path, others: &[&Path], stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        for other in others {
            // Both names are there at any moment.
            let [from, to] = [other, &name].map(|path| CString::new(path.as_os_str().as_bytes()));
            let (from, to) = (from.unwrap(), to.unwrap());
            let here = libc::AT_FDCWD;
            // SAFETY: both names end in NUL and live through the call.
            let done = unsafe {
                libc::renameat2(here, from.as_ptr(), here, to.as_ptr(), libc::RENAME_EXCHANGE)
            };
            assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        }
    }
}

/// Opens again and again, while names are swapped with others, what is the right image or nothing, as
/// long as it takes for both to have happened.
fn race(swapped: &[(&Path, &[&Path])], open: impl Fn(u64) -> qcow2fs::Result<u8>) {
    let (stop, opened, refused) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let _watchdog = Watchdog::new("opening what is swapped", 120);
    std::thread::scope(|scope| {
        for (name, others) in swapped {
            scope.spawn(|| swap(name, others, &stop));
        }
        let started = Instant::now();
        let mut turn = 0;
        while started.elapsed() < RACE
            || opened.load(Ordering::Relaxed) == 0 && started.elapsed() < 10 * RACE
        {
            turn += 1;
            match open(turn) {
                Ok(byte) => {
                    // Before it fails: the other threads go on until then.
                    stop.store(byte != RIGHT, Ordering::Relaxed);
                    assert_eq!(byte, RIGHT, "another file was read");
                    opened.fetch_add(1, Ordering::Relaxed);
                }
                Err(_) => {
                    refused.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("{opened:?} times the image was opened, {refused:?} times nothing was there");
    assert!(opened.into_inner() > 0 && refused.into_inner() > 0, "there was no race");
}

#[test]
fn names_that_are_swapped_under_our_hands_lead_nowhere_else() {
    let directory = scratch();
    let [images, outside] = ["images", "outside"].map(|name| directory.path().join(name));
    fs::create_dir_all(images.join("sub")).unwrap();
    fs::create_dir(&outside).unwrap();
    image(&images.join("disk.qcow2"), RIGHT);
    image(&images.join("sub/disk.qcow2"), RIGHT);
    image(&outside.join("disk.qcow2"), SECRET);
    // What takes the place of a name: links out, a FIFO that would block, a directory.
    symlink(outside.join("disk.qcow2"), images.join("link")).unwrap();
    symlink("/proc/self/root/dev/zero", images.join("magic")).unwrap();
    symlink(&outside, images.join("way out")).unwrap();
    fs::create_dir(images.join("directory")).unwrap();
    qemu::run(Command::new("mkfifo").arg(images.join("fifo")));
    let catalog = Catalog::new(&images, Options::default()).unwrap();
    let at = |name: &str| images.join(name);
    let others = [at("link"), at("fifo"), at("magic"), at("directory")];
    let others = others.each_ref().map(|path| path.as_path());
    race(&[(&at("disk.qcow2"), &others), (&at("sub"), &[&at("way out")])], |turn| {
        let names: &[&str] =
            if turn.is_multiple_of(2) { &["disk.raw"] } else { &["sub", "disk.raw"] };
        first_byte(&catalog, names, turn.is_multiple_of(3))
    });
    assert_eq!(catalog.close_all(Duration::from_secs(60)), 0);
}

/// An image that is based on `base.raw` beside it, of which it shows the first byte.
fn first_byte_alone(image: &Path) -> qcow2fs::Result<u8> {
    let opened = Alone::open(image, &[], Keys::default(), &image::Options::default())?;
    let mut first = [0];
    let read = opened.image().read(0, &mut first);
    opened.close()?;
    read.map(|()| first[0])
}

#[test]
fn a_directory_that_is_swapped_under_our_hands_lends_no_other_its_images() {
    let directory = scratch();
    let [images, outside, link] =
        ["images", "outside", "link"].map(|name| directory.path().join(name));
    for (made, byte) in [(&images, RIGHT), (&outside, SECRET)] {
        fs::create_dir(made).unwrap();
        fs::write(made.join("base.raw"), vec![byte; 1 << 20]).unwrap();
    }
    let disk = images.join("disk.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw"]);
    qemu::run(create.arg(&disk));
    symlink(&outside, &link).unwrap();
    race(&[(&images, &[&link])], |_turn| first_byte_alone(&disk));
}
