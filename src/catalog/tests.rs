//! The tree of images without a mount: what is shown, who is who, and what is open.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::SystemTime;

use crossbeam_channel::{Sender, unbounded};

use super::*;
use crate::error::ErrorKind;
use crate::storage::IfTaken;
use crate::storage::image_lock::{self, Access};

const MIB: u64 = 1 << 20;

struct Tree {
    dir: tempfile::TempDir,
    catalog: Catalog,
}

impl Tree {
    fn new() -> Self {
        Self::with(Options::default())
    }

    fn with(options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::new(dir.path(), options).unwrap();
        Tree { dir, catalog }
    }

    /// The same images in another catalog.
    fn served_anew(self) -> Self {
        let catalog = Catalog::new(self.dir.path(), Options::default()).unwrap();
        Tree { dir: self.dir, catalog }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The images of another tree, with overlays in `overlays`.
    fn layered(dir: tempfile::TempDir, overlays: &Path, ephemeral: bool) -> Self {
        let overlay = Some(OverlayOptions { directory: overlays.to_owned(), ephemeral });
        let options = Options { overlay, ..Options::default() };
        // A child that another test is just starting may have the lock of the one before, too.
        let patience = Instant::now() + Duration::from_secs(30);
        loop {
            match Catalog::new(dir.path(), options.clone()) {
                Err(e) if e.kind() == ErrorKind::InUse && Instant::now() < patience => {
                    thread::sleep(Duration::from_millis(10));
                }
                made => return Tree { dir, catalog: made.unwrap() },
            }
        }
    }

    fn image(&self, name: &str, size: &str) {
        self.qemu_img("create", &[name, size]);
    }

    /// An image based on the image `base`, as it is to name that.
    fn overlay(&self, name: &str, base: &str) {
        self.qemu_img("create", &["-F", "qcow2", "-b", base, name]);
    }

    fn qemu_img(&self, command: &str, arguments: &[&str]) {
        let mut qemu_img = Command::new("qemu-img");
        qemu_img.args([command, "-q", "-f", "qcow2"]).args(arguments);
        assert!(qemu_img.current_dir(self.dir.path()).status().unwrap().success());
    }

    fn directory(&self, name: &str) -> Arc<Node> {
        fs::create_dir(self.path(name)).unwrap();
        self.node(name)
    }

    fn root(&self) -> Arc<Node> {
        self.catalog.node(ROOT).unwrap()
    }

    /// Writes through the raw file `name`.
    fn write(&self, name: &str, data: &[u8]) -> Result<()> {
        let node = self.node(name);
        self.catalog.with_opened(&node, true, |image| image.write(0, data))
    }

    /// The first bytes of the raw file `name`, up to where zeros follow.
    fn read(&self, name: &str) -> Vec<u8> {
        let mut data = vec![0; 8];
        let read = |image: &Image| image.read(0, &mut data);
        self.catalog.with_opened(&self.node(name), false, read).unwrap();
        while data.pop_if(|byte| *byte == 0).is_some() {}
        data
    }

    fn lookup(&self, parent: u64, name: &str) -> Result<Attributes> {
        self.catalog.lookup(parent, name.as_ref())
    }

    fn node(&self, name: &str) -> Arc<Node> {
        self.catalog.node(self.lookup(ROOT, name).unwrap().ino).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let entries = self.catalog.list(&self.root()).unwrap();
        entries.into_iter().map(|entry| entry.name.into_string().unwrap()).collect()
    }

    /// Whether somebody else could open the image so.
    fn is_free(&self, name: &str, access: Access) -> bool {
        let file = File::options().read(true).write(true).open(self.path(name)).unwrap();
        let is_free = image_lock::acquire(&file, None, access).is_ok();
        unlock(&file);
        is_free
    }
}

/// Closing the file is not enough: a child that another test is just starting has it open, too.
fn unlock(file: &File) {
    image_lock::release_down_to(file, None).unwrap();
}

const READ: Opening = Opening { write: false, direct: false };
const WRITE: Opening = Opening { write: true, direct: false };
/// Root: tests that make files run as who they are.
const ME: Requester = Requester::US;

#[test]
fn images_and_directories_are_shown_and_nothing_else() {
    let tree = Tree::new();
    tree.image("b.qcow2", "3M");
    fs::create_dir(tree.path("a")).unwrap();
    fs::create_dir(tree.path("b.raw")).unwrap();
    fs::create_dir(tree.path("d.qcow2")).unwrap();
    fs::write(tree.path("note.txt"), "").unwrap();
    symlink("b.qcow2", tree.path("link.qcow2")).unwrap();
    symlink("/", tree.path("out")).unwrap();
    assert!(Command::new("mkfifo").arg(tree.path("fifo.qcow2")).status().unwrap().success());
    assert_eq!(tree.names(), ["a", "b.raw", "d.qcow2"]);
    let image = tree.lookup(ROOT, "b.raw").unwrap();
    assert_eq!((image.directory, image.size, image.cluster_size), (false, 3 * MIB, 65536));
    assert!(tree.lookup(ROOT, "d.qcow2").unwrap().directory);
    for hidden in ["b.qcow2", "note.txt", "link.raw", "out", "fifo.raw", "d.raw", ".."] {
        assert!(tree.lookup(ROOT, hidden).is_err(), "{hidden}");
    }
}

#[test]
fn the_longest_names_are_found() {
    let tree = Tree::new();
    tree.image(&format!("{}.qcow2", "x".repeat(249)), "1M");
    fs::create_dir(tree.path(&format!("{}.raw", "d".repeat(251)))).unwrap();
    for name in tree.names() {
        tree.lookup(ROOT, &name).unwrap();
    }
    assert_eq!(tree.names().len(), 2);
}

#[test]
fn an_image_that_makes_no_sense_is_listed_empty_and_refused() {
    let tree = Tree::new();
    fs::write(tree.path("bad.qcow2"), "no image").unwrap();
    assert_eq!(tree.names(), ["bad.raw"]);
    let node = tree.node("bad.raw");
    assert_eq!(tree.catalog.attributes(&node).unwrap().size, 0);
    assert_eq!(tree.catalog.open(&node, READ).unwrap_err().kind(), ErrorKind::NotQcow2);
    let status = tree.catalog.status("/mnt".as_ref());
    assert_eq!(status.errors[0].name, "bad.raw");
    assert!(status.images.is_empty());
}

#[test]
fn a_file_is_one_node_under_all_its_names_until_it_is_replaced() {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    fs::hard_link(tree.path("a.qcow2"), tree.path("b.qcow2")).unwrap();
    let (a, b) = (tree.node("a.raw"), tree.node("b.raw"));
    assert_eq!(a.ino(), b.ino());
    fs::remove_file(tree.path("b.qcow2")).unwrap();
    assert_eq!(tree.catalog.attributes(&a).unwrap().size, MIB);
    // The new file may well get the old one's inode number on the host.
    fs::remove_file(tree.path("a.qcow2")).unwrap();
    tree.image("a.qcow2", "2M");
    let new = tree.lookup(ROOT, "a.raw").unwrap();
    assert_ne!(new.ino, a.ino());
    assert_eq!(new.size, 2 * MIB);
    assert_eq!(tree.catalog.attributes(&a).unwrap_err().errno(), libc::ESTALE);
    assert_eq!(tree.catalog.open(&a, READ).unwrap_err().errno(), libc::ESTALE);
}

#[test]
fn a_node_is_known_as_long_as_the_kernel_knows_it() {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    let ino = tree.lookup(ROOT, "a.raw").unwrap().ino;
    assert_eq!(tree.lookup(ROOT, "a.raw").unwrap().ino, ino);
    tree.catalog.forget(ino, 1);
    assert!(tree.catalog.node(ino).is_ok());
    tree.catalog.forget(ino, 1);
    assert!(tree.catalog.node(ino).is_err());
    assert_ne!(tree.lookup(ROOT, "a.raw").unwrap().ino, ino, "an inode number came back");
    tree.catalog.forget(ROOT, 100);
    assert!(tree.catalog.node(ROOT).is_ok());
}

#[test]
fn an_image_is_locked_from_the_first_open_to_the_last_close() {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    let node = tree.node("a.raw");
    assert!(tree.is_free("a.qcow2", Access::Write));
    tree.catalog.open(&node, READ).unwrap();
    tree.catalog.open(&node, READ).unwrap();
    assert!(tree.is_free("a.qcow2", Access::Read) && !tree.is_free("a.qcow2", Access::Write));
    tree.catalog.open(&node, WRITE).unwrap();
    assert!(!tree.is_free("a.qcow2", Access::Read));
    node.with_image(|image| image.write(0, b"data")).unwrap();
    tree.catalog.release(&node);
    tree.catalog.release(&node);
    assert!(!tree.is_free("a.qcow2", Access::Read));
    tree.catalog.release(&node);
    assert!(tree.is_free("a.qcow2", Access::Write));
    assert_eq!(tree.catalog.close_all(Duration::ZERO), 0);
}

#[test]
fn a_writer_that_is_refused_leaves_the_readers_alone() {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    let node = tree.node("a.raw");
    tree.catalog.open(&node, READ).unwrap();
    let other = File::open(tree.path("a.qcow2")).unwrap();
    image_lock::acquire(&other, None, Access::Read).unwrap();
    assert_eq!(tree.catalog.open(&node, WRITE).unwrap_err().kind(), ErrorKind::InUse);
    node.with_image(|image| image.read(0, &mut [0; 512])).unwrap();
    unlock(&other);
    tree.catalog.open(&node, WRITE).unwrap();
    node.with_image(|image| image.write(0, b"data")).unwrap();
    assert!(tree.catalog.status("/".as_ref()).errors.is_empty(), "the error is over");
}

#[test]
fn an_image_that_is_marked_corrupt_is_read_and_never_written() {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    let file = File::options().write(true).open(tree.path("a.qcow2")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[2], 79).unwrap();
    let node = tree.node("a.raw");
    assert_eq!(tree.catalog.open(&node, WRITE).unwrap_err().errno(), libc::EROFS);
    assert!(tree.is_free("a.qcow2", Access::Write));
    tree.catalog.open(&node, READ).unwrap();
    assert_eq!(tree.catalog.open(&node, WRITE).unwrap_err().errno(), libc::EROFS);
    node.with_image(|image| image.read(0, &mut [0; 512])).unwrap();
    assert!(tree.is_free("a.qcow2", Access::Read), "readers are kept away");
}

#[test]
fn what_the_kernel_has_cached_counts_until_somebody_else_writes() {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    let node = tree.node("a.raw");
    let reopened = |how: Opening| {
        let mode = tree.catalog.open(&node, how).unwrap();
        tree.catalog.release(&node);
        mode.keep_cache
    };
    assert!(!reopened(READ), "nothing is known of the first");
    assert!(reopened(WRITE));
    assert!(reopened(READ));
    let write = ["-c", "write -P 7 0 512"];
    assert!(Command::new("qemu-io").args(write).arg(tree.path("a.qcow2")).output().is_ok());
    assert!(!reopened(READ), "stale pages were kept");
    assert!(reopened(READ));
}

#[test]
fn what_others_have_written_is_told_to_the_kernel_whoever_opens_it_first() {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    let node = tree.node("a.raw");
    let keeps_cache = || {
        let mode = tree.catalog.open(&node, READ).unwrap();
        tree.catalog.release(&node);
        mode.keep_cache
    };
    assert!(!keeps_cache() && keeps_cache());
    let others_write = || {
        let write = ["-f", "qcow2", "-c", "write -P 7 0 512"];
        let mut qemu_io = Command::new("qemu-io");
        assert!(qemu_io.args(write).arg(tree.path("a.qcow2")).output().unwrap().status.success());
    };
    others_write();
    tree.catalog.with_opened(&node, true, |image| image.resize(2 * MIB)).unwrap();
    assert!(!keeps_cache() && keeps_cache(), "after a verb that is over");
    others_write();
    tree.catalog.open_for_verb(&node, false).unwrap();
    assert!(!keeps_cache(), "during one");
    tree.catalog.release(&node);
    assert!(keeps_cache());
    others_write();
    assert!(!tree.catalog.open(&node, READ).unwrap().keep_cache);
    tree.catalog.release_untold(&node);
    assert!(!keeps_cache() && keeps_cache(), "the kernel did not hear of it");
    others_write();
    tree.catalog.open(&node, READ).unwrap();
    assert!(!keeps_cache(), "the first who opens it may not have been told yet");
    tree.catalog.release(&node);
    assert!(keeps_cache());
}

#[test]
fn the_first_handle_decides_whether_the_cache_is_bypassed() {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    let node = tree.node("a.raw");
    for first in [true, false] {
        for direct in [first, !first] {
            let mode = tree.catalog.open(&node, Opening { write: true, direct }).unwrap();
            assert_eq!(mode.direct, first);
        }
        tree.catalog.release(&node);
        tree.catalog.release(&node);
    }
}

#[test]
fn a_read_only_mount_never_opens_for_writing() {
    let tree = Tree::with(Options { read_only: true, ..Default::default() });
    tree.image("a.qcow2", "1M");
    let node = tree.node("a.raw");
    assert_eq!(tree.catalog.open(&node, WRITE).unwrap_err().errno(), libc::EROFS);
    tree.catalog.open(&node, READ).unwrap();
    let writable = node.peek(|_, file, _| io::Write::write(&mut &*file, b"x").is_ok());
    assert_eq!(writable, Some(false));
}

#[test]
fn a_removed_image_goes_on_while_it_is_open() {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    let (root, node) = (tree.catalog.node(ROOT).unwrap(), tree.node("a.raw"));
    tree.catalog.open(&node, WRITE).unwrap();
    tree.catalog.remove(&root, "a.raw".as_ref(), false, ME).unwrap();
    assert!(tree.names().is_empty());
    node.with_image(|image| image.write(0, b"data")).unwrap();
    assert_eq!(tree.catalog.attributes(&node).unwrap().size, MIB);
    tree.catalog.release(&node);
    assert_eq!(tree.catalog.close_all(Duration::ZERO), 0);
}

#[test]
fn names_are_changed_on_the_images() {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    tree.image("b.qcow2", "2M");
    let (root, a) = (tree.catalog.node(ROOT).unwrap(), tree.node("a.raw"));
    tree.catalog.make_directory(&root, "d".as_ref(), 0o755, ME).unwrap();
    let d = tree.node("d");
    tree.catalog.rename((&root, "a.raw".as_ref()), (&d, "c.raw".as_ref()), 0, ME).unwrap();
    tree.catalog.rename((&root, "d".as_ref()), (&root, "e".as_ref()), 0, ME).unwrap();
    assert!(tree.path("e/c.qcow2").exists());
    // Known nodes go on under their new names without another lookup.
    assert_eq!(tree.catalog.attributes(&a).unwrap().size, MIB);
    assert_eq!(a.raw_path(), PathBuf::from("e/c.raw"));
    let b = tree.node("b.raw");
    let exchange = libc::RENAME_EXCHANGE;
    tree.catalog.rename((&root, "b.raw".as_ref()), (&d, "c.raw".as_ref()), exchange, ME).unwrap();
    assert_eq!(tree.catalog.attributes(&a).unwrap().size, MIB);
    assert_eq!(tree.catalog.attributes(&b).unwrap().size, 2 * MIB);
    assert_eq!(b.raw_path(), PathBuf::from("e/c.raw"));
    let unnamed = tree.catalog.rename((&root, "b.raw".as_ref()), (&root, "b.img".as_ref()), 0, ME);
    assert_eq!(unnamed.unwrap_err().errno(), libc::EPERM);
    let remove = |name: &str, directory| tree.catalog.remove(&root, name.as_ref(), directory, ME);
    assert_eq!(remove("e", true).unwrap_err().errno(), libc::ENOTEMPTY);
    assert_eq!(remove("e", false).unwrap_err().errno(), libc::EISDIR);
    assert_eq!(remove("b.raw", true).unwrap_err().errno(), libc::ENOTDIR);
}

#[test]
fn what_is_not_shown_is_not_replaced() {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    fs::create_dir(tree.path("d")).unwrap();
    symlink("elsewhere", tree.path("link.qcow2")).unwrap();
    symlink("elsewhere", tree.path("link")).unwrap();
    assert!(Command::new("mkfifo").arg(tree.path("fifo.qcow2")).status().unwrap().success());
    let root = tree.catalog.node(ROOT).unwrap();
    for (from, to) in [("a.raw", "link.raw"), ("a.raw", "fifo.raw"), ("d", "link")] {
        let refused = tree.catalog.rename((&root, from.as_ref()), (&root, to.as_ref()), 0, ME);
        assert_eq!(refused.unwrap_err().errno(), libc::EEXIST, "{from} to {to}");
    }
    for name in ["link.qcow2", "link"] {
        assert!(tree.path(name).is_symlink(), "{name}");
    }
    assert!(tree.path("fifo.qcow2").exists());
    assert_eq!(tree.names(), ["a.raw", "d"]);
    // What is shown is replaced as ever.
    tree.image("b.qcow2", "2M");
    tree.catalog.rename((&root, "b.raw".as_ref()), (&root, "a.raw".as_ref()), 0, ME).unwrap();
    assert_eq!(tree.lookup(ROOT, "a.raw").unwrap().size, 2 * MIB);
}

#[test]
fn options_override_owner_and_mode() {
    let tree =
        Tree::with(Options { uid: Some(70), gid: Some(80), umask: 0o077, ..Default::default() });
    tree.image("a.qcow2", "1M");
    let shown = tree.lookup(ROOT, "a.raw").unwrap();
    assert_eq!((shown.uid, shown.gid, shown.mode & 0o077), (70, 80, 0));
    let node = tree.node("a.raw");
    let owner = |uid| AttributeChange { uid: Some(uid), ..Default::default() };
    assert_eq!(
        tree.catalog.change_attributes(&node, owner(71), ME).unwrap_err().errno(),
        libc::EPERM
    );
    tree.catalog.change_attributes(&node, owner(70), ME).unwrap();
}

#[test]
fn attributes_are_set_on_the_image_file() {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    let node = tree.node("a.raw");
    for seconds in [1_000_000_000, 5] {
        let time = SetTime::At(
            std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds),
        );
        let change =
            AttributeChange { mode: Some(0o4640), modified: Some(time), ..Default::default() };
        tree.catalog.change_attributes(&node, change, ME).unwrap();
        let shown = tree.catalog.attributes(&node).unwrap();
        assert_eq!(shown.mode, 0o640, "set-user-ID bits are not for images");
        use std::os::unix::fs::MetadataExt;
        assert_eq!(shown.host.mtime() as u64, seconds);
        // The second time with the image open.
        tree.catalog.open(&node, READ).unwrap();
    }
}

#[test]
fn an_image_with_two_names_has_one_overlay() {
    for ephemeral in [false, true] {
        let overlays = tempfile::tempdir().unwrap();
        let tree = Tree::new();
        tree.image("a.qcow2", "1M");
        fs::create_dir(tree.path("d")).unwrap();
        let tree = Tree::layered(tree.dir, overlays.path(), ephemeral);
        tree.write("a.raw", b"one ").unwrap();
        // The other name comes when there is an overlay already, and another one when there are two.
        for (link, data) in [("b", b"two "), ("c", b"more")] {
            let names = [tree.path("a.qcow2"), tree.path(&format!("{link}.qcow2"))];
            fs::hard_link(&names[0], &names[1]).unwrap();
            tree.write(&format!("{link}.raw"), data).unwrap();
            assert_eq!(tree.read("a.raw"), data);
        }
        assert_eq!(tree.read("b.raw"), b"more");
        if !ephemeral {
            assert_eq!(fs::read_dir(overlays.path()).unwrap().count(), 1);
        }
    }
}

#[test]
fn another_mount_finds_the_overlay_of_an_image_under_its_other_name() {
    let overlays = tempfile::tempdir().unwrap();
    let tree = Tree::new();
    fs::create_dir(tree.path("d")).unwrap();
    tree.image("d/a.qcow2", "1M");
    fs::hard_link(tree.path("d/a.qcow2"), tree.path("b.qcow2")).unwrap();
    let tree = Tree::layered(tree.dir, overlays.path(), false);
    let first = tree.lookup(tree.lookup(ROOT, "d").unwrap().ino, "a.raw").unwrap().ino;
    let node = tree.catalog.node(first).unwrap();
    tree.catalog.with_opened(&node, true, |image| image.write(0, b"here")).unwrap();
    let Tree { dir, catalog } = tree;
    drop(catalog);
    let tree = Tree::layered(dir, overlays.path(), false);
    assert_eq!(tree.read("b.raw"), b"here");
    tree.write("b.raw", b"more").unwrap();
    assert!(!overlays.path().join("b.qcow2").exists());
    let Tree { dir, catalog } = tree;
    drop(catalog);
    // Two overlays, which an older version may have made, are two disks.
    fs::copy(overlays.path().join("d/a.qcow2"), overlays.path().join("b.qcow2")).unwrap();
    let tree = Tree::layered(dir, overlays.path(), false);
    let node = tree.node("b.raw");
    for how in [READ, WRITE] {
        let refused = tree.catalog.open(&node, how).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        assert!(refused.to_string().contains("move one of these away"), "{refused}");
    }
}

#[test]
fn what_is_no_overlay_of_ours_is_not_touched() {
    let overlays = tempfile::tempdir().unwrap();
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    let foreign = overlays.path().join("a.qcow2");
    tree.qemu_img("create", &[foreign.to_str().unwrap(), "1M"]);
    let before = fs::metadata(&foreign).unwrap();
    let tree = Tree::layered(tree.dir, overlays.path(), false);
    let node = tree.node("a.raw");
    let name = OsStr::new("user.x");
    let change = AttributeChange { mode: Some(0o400), ..Default::default() };
    for refused in [
        tree.write("a.raw", b"data"),
        tree.catalog.change_attributes(&node, change, ME),
        tree.catalog.set_extended_attribute(&node, name, b"y", 0),
        tree.catalog.remove_extended_attribute(&node, name),
    ] {
        let refused = refused.unwrap_err();
        assert!(refused.to_string().contains("is not based on"), "{refused}");
    }
    assert_eq!(Stamp::of(&fs::metadata(&foreign).unwrap()), Stamp::of(&before));
}

#[test]
fn an_overlay_has_the_extended_attributes_of_its_image() {
    let overlays = tempfile::tempdir().unwrap();
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    let name = OsStr::new("user.origin");
    let attribute = |tree: &Tree| tree.catalog.extended_attribute(&tree.node("a.raw"), name);
    let node = tree.node("a.raw");
    tree.catalog.set_extended_attribute(&node, name, b"there", 0).unwrap();
    let tree = Tree::layered(tree.dir, overlays.path(), false);
    assert_eq!(attribute(&tree).unwrap(), b"there");
    tree.write("a.raw", b"data").unwrap();
    assert!(overlays.path().join("a.qcow2").exists());
    assert_eq!(attribute(&tree).unwrap(), b"there");
    assert_eq!(tree.catalog.extended_attributes(&tree.node("a.raw")).unwrap(), b"user.origin\0");
}

#[test]
fn a_directory_with_what_an_open_image_is_based_on_keeps_its_name() {
    let tree = Tree::new();
    let (bases, other) = (tree.directory("bases"), tree.directory("other"));
    fs::create_dir(tree.path("bases/old")).unwrap();
    tree.image("bases/old/base.qcow2", "1M");
    tree.overlay("top.qcow2", "bases/old/base.qcow2");
    let (root, top) = (tree.root(), tree.node("top.raw"));
    tree.catalog.open(&top, READ).unwrap();
    const EXCHANGE: u32 = libc::RENAME_EXCHANGE;
    let name = |name: &'static str| OsStr::new(name);
    for (from, to, flags) in [
        ((&*root, name("bases")), (&*root, name("moved")), 0),
        ((&*root, name("bases")), (&*other, name("moved")), 0),
        ((&*bases, name("old")), (&*bases, name("new")), 0),
        ((&*root, name("bases")), (&*root, name("other")), EXCHANGE),
        ((&*root, name("other")), (&*root, name("bases")), EXCHANGE),
    ] {
        let refused = tree.catalog.rename(from, to, flags, ME).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InUse, "{:?} to {:?}", from.1, to.1);
        assert!(refused.to_string().contains("base.qcow2 is a backing or data file of top.qcow2"));
    }
    tree.catalog.rename((&root, name("other")), (&root, name("else")), 0, ME).unwrap();
    tree.catalog.release(&top);
    tree.catalog.rename((&root, name("bases")), (&root, name("moved")), 0, ME).unwrap();
}

#[test]
fn a_directory_moves_only_with_all_that_its_images_need() {
    let tree = Tree::new();
    for directory in ["leaves", "stays", "stays/deep", "to"] {
        fs::create_dir(tree.path(directory)).unwrap();
    }
    tree.image("base.qcow2", "1M");
    tree.image("stays/base.qcow2", "1M");
    tree.qemu_img("create", &["-u", "-F", "qcow2", "-b", "../base.qcow2", "leaves/a.qcow2", "1M"]);
    let inside = ["-u", "-F", "qcow2", "-b", "../base.qcow2", "stays/deep/a.qcow2", "1M"];
    tree.qemu_img("create", &inside);
    let absolute = tree.path("base.qcow2");
    let absolute = ["-u", "-F", "qcow2", "-b", absolute.to_str().unwrap(), "stays/b.qcow2", "1M"];
    tree.qemu_img("create", &absolute);
    let (root, to) = (tree.root(), tree.node("to"));
    let rename = |from: (&Node, &str), to: (&Node, &str), flags| {
        tree.catalog.rename((from.0, from.1.as_ref()), (to.0, to.1.as_ref()), flags, ME)
    };
    let refused = rename((&root, "leaves"), (&to, "leaves"), 0).unwrap_err();
    assert_eq!(refused.errno(), libc::EPERM);
    assert!(refused.to_string().contains("leaves/a.qcow2: its backing file ../base"), "{refused}");
    rename((&root, "leaves"), (&root, "left"), 0).unwrap();
    rename((&root, "stays"), (&to, "stays"), 0).unwrap();
    for (from, to) in [((&*root, "left"), (&*to, "stays")), ((&*to, "stays"), (&*root, "left"))] {
        let refused = rename(from, to, libc::RENAME_EXCHANGE).unwrap_err();
        assert_eq!(refused.errno(), libc::EPERM);
    }
}

#[test]
fn a_base_that_is_written_here_is_said_to_be() {
    let tree = Tree::new();
    tree.image("base.qcow2", "1M");
    tree.overlay("top.qcow2", "base.qcow2");
    let (base, top) = (tree.node("base.raw"), tree.node("top.raw"));
    for from_reading in [false, true] {
        if from_reading {
            tree.catalog.open(&base, READ).unwrap();
        }
        tree.catalog.open(&base, WRITE).unwrap();
        let refused = tree.catalog.open(&top, READ).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InUse);
        let text = refused.to_string();
        assert!(text.contains("base.qcow2 is open for writing; close that"), "{text}");
        tree.catalog.release(&base);
        if from_reading {
            tree.catalog.release(&base);
        }
    }
    tree.catalog.open(&top, READ).unwrap();
    tree.catalog.release(&top);
}

/// A tree with an image that is open for writing, in which a request is under way while `meanwhile`
/// goes on; that gets what lets the request go on to its end, a write.
fn during_a_request(meanwhile: impl FnOnce(&Tree, &Sender<()>)) -> (Tree, Arc<Node>) {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    let node = tree.node("a.raw");
    tree.catalog.open(&node, WRITE).unwrap();
    let ((began, begun), (goes_on, wait)) = (unbounded(), unbounded());
    thread::scope(|scope| {
        let request = scope.spawn(|| {
            node.with_image(|image| {
                image.write(0, b"done")?;
                began.send(()).unwrap();
                wait.recv().unwrap();
                image.write(4, b"late")
            })
        });
        begun.recv().unwrap();
        meanwhile(&tree, &goes_on);
        let _too_late_or_not = request.join().unwrap();
    });
    (tree, node)
}

#[test]
fn images_that_are_closed_by_force_take_what_is_under_way() {
    let (tree, node) = during_a_request(|tree, goes_on| {
        let (ended, end) = unbounded();
        thread::scope(|scope| {
            // The end of the session and a signal: neither may end the process under the other.
            for _ in 0..2 {
                let close_all = || tree.catalog.close_all(Duration::from_secs(60));
                let ended = ended.clone();
                scope.spawn(move || ended.send(close_all()).unwrap());
            }
            // Long enough for a close that does not wait; for one that does it makes no difference.
            assert!(end.recv_timeout(Duration::from_millis(500)).is_err(), "closed under a write");
            goes_on.send(()).unwrap();
            assert_eq!([end.recv().unwrap(), end.recv().unwrap()], [0, 0]);
        });
    });
    assert_eq!(node.with_image(|image| image.write(0, b"lost")).unwrap_err().errno(), libc::EIO);
    tree.catalog.release(&node);
    assert!(tree.is_free("a.qcow2", Access::Write));
    assert_eq!(tree.served_anew().read("a.raw"), b"donelate");
}

#[test]
fn no_image_is_opened_or_made_once_all_are_closed() {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    tree.image("b.qcow2", "1M");
    let (a, b) = (tree.node("a.raw"), tree.node("b.raw"));
    tree.catalog.open(&a, READ).unwrap();
    assert_eq!(tree.catalog.close_all(Duration::ZERO), 0);
    for (node, how) in [(&a, READ), (&a, WRITE), (&b, READ), (&b, WRITE)] {
        assert_eq!(tree.catalog.open(node, how).unwrap_err().errno(), libc::EIO, "{how:?}");
    }
    tree.catalog.release(&a);
    assert_eq!(tree.catalog.open(&a, WRITE).unwrap_err().errno(), libc::EIO, "all are released");
    let made = tree.catalog.make_image(&tree.root(), "c.raw".as_ref(), 0o600, ME);
    assert_eq!(made.err().map(|e| e.errno()), Some(libc::EIO));
    assert!(!tree.path("c.qcow2").exists());
    assert!(tree.is_free("a.qcow2", Access::Write) && tree.is_free("b.qcow2", Access::Write));
}

#[test]
fn overlays_are_not_made_once_all_images_are_closed() {
    let (below, overlays) = (Tree::new(), tempfile::tempdir().unwrap());
    below.image("a.qcow2", "1M");
    let tree = Tree::layered(below.dir, overlays.path(), false);
    let node = tree.node("a.raw");
    tree.catalog.close_all(Duration::ZERO);
    let count = || fs::read_dir(overlays.path()).unwrap().count();
    let before = count();
    assert_eq!(tree.catalog.open(&node, WRITE).unwrap_err().errno(), libc::EIO);
    assert_eq!(count(), before);
}

#[test]
fn who_never_ends_keeps_no_image_from_being_left() {
    let (tree, node) = during_a_request(|tree, goes_on| {
        assert_eq!(tree.catalog.close_all(Duration::from_millis(50)), 1);
        goes_on.send(()).unwrap();
    });
    tree.catalog.release(&node);
    // The file is closed when the last thread that has the image lets go of it.
    let patience = Instant::now() + Duration::from_secs(30);
    while !tree.is_free("a.qcow2", Access::Write) {
        assert!(Instant::now() < patience, "it stays locked");
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(tree.served_anew().read("a.raw")[..4], *b"done");
}

#[test]
fn an_image_appears_filled_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let options = image::CreateOptions { virtual_size: MIB, ..Default::default() };
    let count = || fs::read_dir(dir.path()).unwrap().count();
    let make = |if_taken, fill: &dyn Fn(&NewImage<'_>) -> Result<bool>| {
        create_filled_image(&path, &options, if_taken, fill)
    };
    let write = |new: &NewImage<'_>| new.with_opened(|image| image.write(0, b"data"));
    let failed = make(IfTaken::Fail, &|new| write(new).and(Err(read_only())));
    assert!(failed.is_err() && count() == 0);
    assert!(!make(IfTaken::Fail, &|new| write(new).map(|()| false)).unwrap() && count() == 0);
    // Somebody else takes the name meanwhile.
    let taken = make(IfTaken::Fail, &|new| {
        fs::write(&path, "other").unwrap();
        write(new).map(|()| true)
    });
    assert_eq!(taken.unwrap_err().errno(), libc::EEXIST);
    assert_eq!(fs::read(&path).unwrap(), b"other");
    let replaces = |new: &NewImage<'_>| {
        assert_eq!(fs::read(&path).unwrap(), b"other");
        write(new).map(|()| true)
    };
    assert!(make(IfTaken::Replace, &replaces).unwrap() && count() == 1);
    let tree = Tree { catalog: Catalog::new(dir.path(), Options::default()).unwrap(), dir };
    assert_eq!(tree.read("a.raw"), b"data");
}

/// Two users who are not root, and another one who asks for something.
const ONE: u32 = 1001;
const OTHER: u32 = 1002;

impl Tree {
    fn give(&self, name: &str, uid: u32, mode: u32) {
        std::os::unix::fs::lchown(self.path(name), Some(uid), Some(uid)).unwrap();
        fs::set_permissions(self.path(name), Permissions::from_mode(mode)).unwrap();
    }
}

#[test]
fn a_name_is_followed_for_who_may_open_what_it_leads_to() {
    for data_file in [false, true] {
        let tree = Tree::new();
        fs::create_dir(tree.path("in")).unwrap();
        tree.image("in/victim.qcow2", "1M");
        match data_file {
            // A raw file that anybody could be made to write to.
            true => {
                fs::write(tree.path("in/victim.qcow2"), [0; 1 << 20]).unwrap();
                let options = "data_file=in/victim.qcow2,data_file_raw=on";
                tree.qemu_img("create", &["-o", options, "evil.qcow2", "1M"]);
            }
            false => tree.overlay("evil.qcow2", "in/victim.qcow2"),
        }
        let everybody = if data_file { 0o666 } else { 0o644 };
        for (asks, directory, owner, mode, may) in [
            (OTHER, 0o755, ONE, 0o600, false),
            (OTHER, 0o755, ONE, everybody, true),
            (OTHER, 0o700, ONE, everybody, false),
            (OTHER, 0o755, ONE, everybody & 0o660, false),
            (OTHER, 0o755, OTHER, 0o600, true),
            (OTHER, 0o755, 0, 0o600, false),
            (0, 0o700, ONE, 0o600, true),
        ] {
            tree.give("evil.qcow2", asks, 0o600);
            tree.give("in", 0, directory);
            tree.give("in/victim.qcow2", owner, mode);
            let node = tree.node("evil.raw");
            let what = format!("{asks} {directory:o} {owner} {mode:o}, data file {data_file}");
            match tree.catalog.open(&node, WRITE) {
                Ok(_) => {
                    assert!(may, "{what}");
                    tree.catalog.release(&node);
                }
                Err(e) => {
                    assert!(!may && e.to_string().contains("an image of user 1002"), "{what}: {e}");
                }
            }
        }
        // Who may write to an image may have written the name.
        for (group, mode, victim, may) in [
            (ONE, 0o660, 0o600, false),
            (ONE, 0o660, 0o660, true),
            (OTHER, 0o660, 0o660, false),
            (ONE, 0o640, 0o600, true),
            (ONE, 0o602, 0o660, false),
            (ONE, 0o602, everybody, true),
        ] {
            tree.give("evil.qcow2", 0, mode);
            tree.give("in", 0, 0o755);
            tree.give("in/victim.qcow2", 0, victim);
            for name in ["evil.qcow2", "in/victim.qcow2"] {
                let group = if name == "evil.qcow2" { group } else { ONE };
                std::os::unix::fs::lchown(tree.path(name), None, Some(group)).unwrap();
            }
            let node = tree.node("evil.raw");
            let opened = tree.catalog.open(&node, WRITE);
            assert_eq!(opened.is_ok(), may, "{group} {mode:o} {victim:o}, data file {data_file}");
            opened.is_ok().then(|| tree.catalog.release(&node));
        }
        // Who allows a directory trusts all images.
        tree.give("in/victim.qcow2", ONE, 0o600);
        tree.give("evil.qcow2", OTHER, 0o600);
        let allow = vec![tree.path("in")];
        let tree = Tree {
            catalog: Catalog::new(tree.dir.path(), Options { allow, ..Default::default() })
                .unwrap(),
            dir: tree.dir,
        };
        tree.catalog.open(&tree.node("evil.raw"), WRITE).unwrap();
        tree.catalog.release(&tree.node("evil.raw"));
    }
}

#[test]
fn what_leads_on_is_followed_for_all_whose_images_led_there() {
    let tree = Tree::new();
    tree.image("secret.qcow2", "1M");
    tree.overlay("middle.qcow2", "secret.qcow2");
    tree.overlay("top.qcow2", "middle.qcow2");
    tree.give("secret.qcow2", ONE, 0o600);
    for (top, middle, may) in
        [(OTHER, ONE, false), (ONE, OTHER, false), (0, OTHER, false), (0, ONE, true)]
    {
        tree.give("top.qcow2", top, 0o644);
        tree.give("middle.qcow2", middle, 0o644);
        let node = tree.node("top.raw");
        let opened = tree.catalog.open(&node, READ);
        assert_eq!(opened.is_ok(), may, "{top} {middle}");
        opened.is_ok().then(|| tree.catalog.release(&node));
    }
}

#[test]
fn names_are_looked_for_in_the_directory_that_was_meant() {
    let tree = Tree::new();
    let mine = tree.directory("mine");
    let rename = |from: &str, to: &str| fs::rename(tree.path(from), tree.path(to)).unwrap();
    rename("mine", "other");
    assert_eq!(tree.lookup(ROOT, "other").unwrap().ino, mine.ino());
    rename("other", "mine");
    // Its latest name is another directory's from now on.
    fs::create_dir(tree.path("secret")).unwrap();
    tree.image("secret/x.qcow2", "1M");
    rename("secret", "other");
    assert_eq!(tree.lookup(mine.ino(), "x.raw").unwrap_err().errno(), libc::ENOENT);
    tree.image("mine/x.qcow2", "2M");
    assert_eq!(tree.lookup(mine.ino(), "x.raw").unwrap().size, 2 * MIB);
}

#[test]
fn an_overlay_is_that_of_the_image_that_was_meant() {
    let overlays = tempfile::tempdir().unwrap();
    let tree = Tree::layered(tempfile::tempdir().unwrap(), overlays.path(), false);
    tree.image("a.qcow2", "1M");
    let meant = tree.node("a.raw");
    let rename = |from: &str, to: &str| fs::rename(tree.path(from), tree.path(to)).unwrap();
    rename("a.qcow2", "b.qcow2");
    assert_eq!(tree.node("b.raw").ino(), meant.ino());
    rename("b.qcow2", "a.qcow2");
    tree.image("b.qcow2", "2M");
    tree.catalog.with_opened(&meant, true, |image| image.write(0, b"data")).unwrap();
    assert!(overlays.path().join("a.qcow2").exists());
    assert!(!overlays.path().join("b.qcow2").exists());
}

#[test]
fn only_who_owns_a_file_by_now_changes_its_attributes() {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    tree.give("a.qcow2", ONE, 0o600);
    let node = tree.node("a.raw");
    let mode = AttributeChange { mode: Some(0o666), ..Default::default() };
    let time = |time| AttributeChange { modified: Some(time), ..Default::default() };
    let change = |change, uid| {
        let who = Requester { uid, gid: uid };
        tree.catalog.change_attributes(&node, change, who).map_err(|e| e.errno())
    };
    let past = SetTime::At(SystemTime::UNIX_EPOCH);
    for uid in [ONE, 0] {
        change(mode, uid).unwrap();
        change(time(past), uid).unwrap();
    }
    tree.give("a.qcow2", 0, 0o600);
    assert_eq!(change(mode, ONE), Err(libc::EPERM));
    assert_eq!(change(time(past), ONE), Err(libc::EPERM));
    // Who may write to it may do this, which the kernel has looked at.
    change(time(SetTime::Now), ONE).unwrap();
    assert_eq!(fs::metadata(tree.path("a.qcow2")).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn in_a_sticky_directory_others_names_are_not_taken_away() {
    let tree = Tree::new();
    tree.give("", 0, 0o1777);
    for name in ["mine.qcow2", "theirs.qcow2"] {
        tree.image(name, "1M");
    }
    tree.give("mine.qcow2", ONE, 0o600);
    tree.give("theirs.qcow2", OTHER, 0o600);
    let root = tree.root();
    let who = Requester { uid: ONE, gid: ONE };
    let rename = |from: &str, to: &str, who| {
        let done = tree.catalog.rename((&root, from.as_ref()), (&root, to.as_ref()), 0, who);
        done.map_err(|e| e.errno())
    };
    let remove = |name: &str, who| {
        tree.catalog.remove(&root, name.as_ref(), false, who).map_err(|e| e.errno())
    };
    assert_eq!(rename("mine.raw", "theirs.raw", who), Err(libc::EPERM));
    assert_eq!(rename("theirs.raw", "new.raw", who), Err(libc::EPERM));
    assert_eq!(remove("theirs.raw", who), Err(libc::EPERM));
    rename("mine.raw", "new.raw", who).unwrap();
    remove("new.raw", who).unwrap();
    tree.give("", ONE, 0o1777);
    remove("theirs.raw", who).unwrap();
}

#[test]
fn an_overlay_of_ours_leads_to_its_image_whoever_owns_them() {
    let overlays = tempfile::tempdir().unwrap();
    let tree = Tree::layered(tempfile::tempdir().unwrap(), overlays.path(), false);
    fs::create_dir(tree.path("in")).unwrap();
    tree.image("in/a.qcow2", "1M");
    tree.give("in/a.qcow2", ONE, 0o600);
    // Where a group lets its members in.
    tree.give("in", 0, 0o750);
    let node = |tree: &Tree| {
        let directory = tree.lookup(ROOT, "in").unwrap().ino;
        tree.catalog.node(tree.lookup(directory, "a.raw").unwrap().ino).unwrap()
    };
    let write = |image: &Image| image.write(0, b"data").and_then(|()| image.flush());
    tree.catalog.with_opened(&node(&tree), true, write).unwrap();
    let change = AttributeChange { uid: Some(OTHER), ..Default::default() };
    tree.catalog.change_attributes(&node(&tree), change, ME).unwrap();
    let Tree { dir, catalog } = tree;
    drop(catalog);
    let tree = Tree::layered(dir, overlays.path(), false);
    tree.give("in/a.qcow2", 0, 0o600);
    let mut found = [0; 4];
    tree.catalog.with_opened(&node(&tree), true, |image| image.read(0, &mut found)).unwrap();
    assert_eq!(&found, b"data");
}

#[test]
fn what_is_below_the_image_of_an_overlay_is_followed_for_its_owner() {
    let overlays = tempfile::tempdir().unwrap();
    let tree = Tree::layered(tempfile::tempdir().unwrap(), overlays.path(), false);
    tree.image("secret.qcow2", "1M");
    tree.overlay("a.qcow2", "secret.qcow2");
    tree.give("secret.qcow2", ONE, 0o600);
    tree.give("a.qcow2", OTHER, 0o600);
    let refused = tree.catalog.open(&tree.node("a.raw"), WRITE).unwrap_err().to_string();
    assert!(refused.contains("an image of user 1002"), "{refused}");
    tree.give("a.qcow2", ONE, 0o600);
    tree.catalog.open(&tree.node("a.raw"), WRITE).unwrap();
    tree.catalog.release(&tree.node("a.raw"));
}

/// Who only reads holds the image to the end, and may wait for a host that does not answer.
#[test]
fn who_never_ends_reading_keeps_no_other_image_from_being_closed() {
    let tree = Tree::new();
    let names: Vec<String> = (0..2 * CLOSERS).map(|n| format!("{n}.raw")).collect();
    let nodes: Vec<_> = names
        .iter()
        .map(|name| {
            tree.image(&name.replace("raw", "qcow2"), "1M");
            let node = tree.node(name);
            tree.catalog.open(&node, WRITE).unwrap();
            node
        })
        .collect();
    tree.image("stuck.qcow2", "1M");
    let stuck = tree.node("stuck.raw");
    tree.catalog.open(&stuck, READ).unwrap();
    let ((began, begun), (goes_on, wait)) = (unbounded(), unbounded());
    thread::scope(|scope| {
        scope.spawn(|| {
            let read = stuck.with_image(|_| {
                began.send(()).unwrap();
                wait.recv().unwrap();
                Ok(())
            });
            read.unwrap();
        });
        begun.recv().unwrap();
        let (ended, end) = unbounded();
        let close_all = || tree.catalog.close_all(Duration::from_millis(50));
        scope.spawn(move || ended.send(close_all()).unwrap());
        let failed = end.recv_timeout(Duration::from_secs(10));
        goes_on.send(()).unwrap();
        assert_eq!(failed, Ok(1));
    });
    for name in &names {
        assert!(tree.is_free(&name.replace("raw", "qcow2"), Access::Write), "{name}");
    }
    nodes.iter().chain([&stuck]).for_each(|node| tree.catalog.release(node));
}
