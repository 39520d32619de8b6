//! The tree of images without a mount: what is shown, who is who, and what is open.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use super::*;
use crate::error::ErrorKind;
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

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self, name: &str, size: &str) {
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(self.path(name))
            .arg(size)
            .status();
        assert!(made.unwrap().success());
    }

    fn lookup(&self, parent: u64, name: &str) -> Result<Attributes> {
        self.catalog.lookup(parent, name.as_ref())
    }

    fn node(&self, name: &str) -> Arc<Node> {
        self.catalog.node(self.lookup(ROOT, name).unwrap().ino).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let root = self.catalog.node(ROOT).unwrap();
        let entries = self.catalog.list(&root).unwrap();
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
const ME: Creator = Creator { uid: 0, gid: 0 };

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
    assert_eq!(tree.catalog.close_all(), 0);
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
    tree.catalog.remove(&root, "a.raw".as_ref(), false).unwrap();
    assert!(tree.names().is_empty());
    node.with_image(|image| image.write(0, b"data")).unwrap();
    assert_eq!(tree.catalog.attributes(&node).unwrap().size, MIB);
    tree.catalog.release(&node);
    assert_eq!(tree.catalog.close_all(), 0);
}

#[test]
fn names_are_changed_on_the_images() {
    let tree = Tree::new();
    tree.image("a.qcow2", "1M");
    tree.image("b.qcow2", "2M");
    let (root, a) = (tree.catalog.node(ROOT).unwrap(), tree.node("a.raw"));
    tree.catalog.make_directory(&root, "d".as_ref(), 0o755, ME).unwrap();
    let d = tree.node("d");
    tree.catalog.rename((&root, "a.raw".as_ref()), (&d, "c.raw".as_ref()), 0).unwrap();
    tree.catalog.rename((&root, "d".as_ref()), (&root, "e".as_ref()), 0).unwrap();
    assert!(tree.path("e/c.qcow2").exists());
    // Known nodes go on under their new names without another lookup.
    assert_eq!(tree.catalog.attributes(&a).unwrap().size, MIB);
    assert_eq!(a.raw_path(), PathBuf::from("e/c.raw"));
    let b = tree.node("b.raw");
    let exchange = libc::RENAME_EXCHANGE;
    tree.catalog.rename((&root, "b.raw".as_ref()), (&d, "c.raw".as_ref()), exchange).unwrap();
    assert_eq!(tree.catalog.attributes(&a).unwrap().size, MIB);
    assert_eq!(tree.catalog.attributes(&b).unwrap().size, 2 * MIB);
    assert_eq!(b.raw_path(), PathBuf::from("e/c.raw"));
    let unnamed = tree.catalog.rename((&root, "b.raw".as_ref()), (&root, "b.img".as_ref()), 0);
    assert_eq!(unnamed.unwrap_err().errno(), libc::EPERM);
    let remove = |name: &str, directory| tree.catalog.remove(&root, name.as_ref(), directory);
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
        let refused = tree.catalog.rename((&root, from.as_ref()), (&root, to.as_ref()), 0);
        assert_eq!(refused.unwrap_err().errno(), libc::EEXIST, "{from} to {to}");
    }
    for name in ["link.qcow2", "link"] {
        assert!(tree.path(name).is_symlink(), "{name}");
    }
    assert!(tree.path("fifo.qcow2").exists());
    assert_eq!(tree.names(), ["a.raw", "d"]);
    // What is shown is replaced as ever.
    tree.image("b.qcow2", "2M");
    tree.catalog.rename((&root, "b.raw".as_ref()), (&root, "a.raw".as_ref()), 0).unwrap();
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
    assert_eq!(tree.catalog.change_attributes(&node, owner(71)).unwrap_err().errno(), libc::EPERM);
    tree.catalog.change_attributes(&node, owner(70)).unwrap();
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
        tree.catalog.change_attributes(&node, change).unwrap();
        let shown = tree.catalog.attributes(&node).unwrap();
        assert_eq!(shown.mode, 0o640, "set-user-ID bits are not for images");
        use std::os::unix::fs::MetadataExt;
        assert_eq!(shown.host.mtime() as u64, seconds);
        // The second time with the image open.
        tree.catalog.open(&node, READ).unwrap();
    }
}
