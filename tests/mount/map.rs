//! `qcow2fs map`: what it says of a file agrees with what the file holds.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;

use crate::lab::{Lab, allocated, length, pattern};

fn map(image: &Path) -> Value {
    let text = sh!("$qcow2fs map --json {}", image.display());
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// The extents cover the file once, and their sums are those that are told. Returns the bytes of a
/// kind.
fn bytes_of<'a>(map: &'a Value, image: &Path) -> impl Fn(&str) -> u64 + use<'a> {
    let mut next = 0;
    let mut sums = std::collections::BTreeMap::new();
    for extent in map["extents"].as_array().unwrap() {
        let number = |key: &str| extent[key].as_u64().unwrap();
        assert_eq!(number("start"), next, "{extent}");
        next += number("length");
        *sums.entry(extent["kind"].as_str().unwrap().to_owned()).or_insert(0) += number("length");
    }
    assert_eq!(next, length(image), "all of the file");
    for (kind, bytes) in map["bytes"].as_object().unwrap() {
        assert_eq!(bytes.as_u64().unwrap(), sums.get(kind).copied().unwrap_or(0), "{kind}");
    }
    // Metadata may be holes in part.
    assert!(map["on_host"].as_u64().unwrap() >= allocated(image) / 4096 * 4096, "{map:#}");
    move |kind| map["bytes"][kind].as_u64().unwrap()
}

#[test]
fn every_kind_of_cluster_is_found() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "64M", "cluster_size=64k");
    // 16 clusters, then 8 compressed ones, then 4 that a discard frees.
    sh!(
        "qemu-io -f qcow2 -d unmap -c 'write -P 1 0 1M' -c 'write -P 7 2M 256k' \
         -c 'write -c -P 3 8M 512k' -c 'discard 2M 256k' {}",
        image.display()
    );
    let before = map(&image);
    let bytes = bytes_of(&before, &image);
    assert_eq!(bytes("data"), 1 << 20);
    assert_eq!((bytes("shared"), bytes("junk"), bytes("ready")), (0, 0, 0), "{before:#}");
    assert!((1..=65536).contains(&bytes("compressed")), "{before:#}");
    assert_eq!(bytes("free") + bytes("hole"), 256 << 10, "{before:#}");
    assert!(bytes("metadata") >= 5 << 16, "{before:#}");
    assert_eq!(before["extents"][0]["kind"], "metadata");

    sh!("qemu-img snapshot -c s {0}; qemu-io -f qcow2 -c 'write -P 2 0 256k' {0}", image.display());
    let after = map(&image);
    let bytes = bytes_of(&after, &image);
    // Four clusters are the snapshot's alone by now, and four the disk's.
    assert_eq!((bytes("shared"), bytes("data")), (768 << 10, 512 << 10), "{after:#}");
    assert!(after["fragmented"].as_u64().unwrap() > 0);
}

#[test]
fn what_compaction_would_win_is_what_it_wins() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "16M", "cluster_size=64k");
    let commands: String = (0..16).map(|n| format!(" -c 'discard {n}M 768k'")).collect();
    sh!("qemu-io -f qcow2 -d unmap -c 'write -P 5 0 16M' {commands} {}", image.display());
    let told = map(&image);
    let dry = sh!("$qcow2fs compact --dry-run --json {}", image.display());
    let dry: Value = serde_json::from_str(&dry).unwrap();
    assert_eq!(told["shortest"], dry["after"]["length"]);
    assert_eq!(told["behind"].as_u64().unwrap() << 16, dry["moved"].as_u64().unwrap());
    sh!("$qcow2fs compact {}", image.display());
    assert_eq!(told["shortest"].as_u64(), Some(length(&image)));
    let page = sh!("$qcow2fs map {}", image.display());
    assert!(page.contains("as short as it can be"), "{page}");
}

#[test]
fn an_image_in_use_is_shown_as_it_is_and_stays_in_use() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "64M", "cluster_size=64k");
    let mount = lab.mount_with("--compact-after off --keep-erased 1M");
    let file = File::options().read(true).write(true).open(mount.path("disk.raw")).unwrap();
    file.write_all_at(&pattern(3, 3 << 20), 1 << 20).unwrap();
    // Nothing but the map has it flushed.
    let told = map(&image);
    assert_eq!(bytes_of(&told, &image)("data"), 3 << 20, "{told:#}");
    assert_eq!(told["mountpoint"], mount.point().to_str().unwrap());
    let page = sh!("NO_COLOR=1 $qcow2fs map {}", image.display());
    assert!(page.contains("open in the mount at") && page.contains("DDDD"), "{page}");
    assert!(!page.contains('\x1b'), "colours where there is no terminal: {page:?}");
    let lines = sh!("$qcow2fs map --watch --interval 0.1 --count 3 {}", image.display());
    assert_eq!(lines.lines().count(), 3, "{lines}");
    assert!(lines.lines().all(|line| line.contains("file ")), "{lines}");
    file.write_all_at(&pattern(4, 4096), 0).unwrap();
    drop(file);
    mount.umount();
    sh!("qemu-img check -q {}", image.display());
}

#[test]
fn a_picture_is_drawn_that_others_can_read() {
    let lab = Lab::new();
    let image = lab.image("a<&>b.qcow2");
    fs::rename(lab.create("disk.qcow2", "16M", "cluster_size=64k"), &image).unwrap();
    sh!("qemu-io -f qcow2 -c 'write -P 5 0 3M' '{}'", image.display());
    let svg = lab.path("picture.svg");
    sh!("$qcow2fs map --block 64K --svg {} '{}'", svg.display(), image.display());
    let text = fs::read_to_string(&svg).unwrap();
    assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"), "{text}");
    assert!(text.contains("a&lt;&amp;&gt;b.qcow2") && text.contains("data 3.0 MiB"), "{text}");
    // As many rectangles as there are blocks, or parts of them.
    let data = text.lines().find(|line| line.contains("#2f7fd1") && line.contains("<path"));
    assert_eq!(data.unwrap().matches('M').count(), 48, "{text}");
    let parsed = attempt!(
        "python3 -c 'import sys, xml.dom.minidom as m; m.parse(sys.argv[1])' {}",
        svg.display()
    );
    let without_python = parsed.code == Some(127);
    assert!(parsed.ok() || without_python, "{parsed:?}");
    let other = lab.create("other.qcow2", "1M", "");
    let kept = attempt!("$qcow2fs map --svg {} '{}'", other.display(), image.display());
    assert!(kept.code == Some(1) && kept.err.contains("other.qcow2 is an image"), "{kept:?}");
    assert!(fs::read(&other).unwrap().starts_with(b"QFI"));
    let nowhere = attempt!("$qcow2fs map --svg {}/no/x.svg '{}'", svg.display(), image.display());
    assert!(nowhere.code == Some(1) && nowhere.err.contains("x.svg"), "{nowhere:?}");
}

#[test]
fn leaked_clusters_are_junk_or_ready_as_they_take_space_or_not() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "16M", "cluster_size=64k");
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let mut table = [0; 8];
    file.read_exact_at(&mut table, 48).unwrap();
    let mut block = [0; 8];
    file.read_exact_at(&mut block, u64::from_be_bytes(table)).unwrap();
    // Refcounts of 16 bits: clusters 20 and 21 count, and only the first one has blocks.
    file.write_all_at(&[0, 1, 0, 1], u64::from_be_bytes(block) + 2 * 20).unwrap();
    file.set_len(23 << 16).unwrap();
    file.write_all_at(&pattern(1, 1 << 16), 20 << 16).unwrap();
    file.write_all_at(&pattern(2, 1 << 16), 22 << 16).unwrap();
    drop(file);
    let leaks = attempt!("qemu-img check -f qcow2 {}", image.display());
    assert!(leaks.out.contains("2 leaked clusters"), "{leaks:?}");
    let told = map(&image);
    let bytes = bytes_of(&told, &image);
    assert_eq!((bytes("junk"), bytes("ready"), bytes("free")), (1 << 16, 1 << 16, 1 << 16));
    assert_eq!(told["shortest"].as_u64().unwrap(), told["used"].as_u64().unwrap() << 16);
}
