//! Images that are not served, or not written: a plain errno, a reason in the log, no byte changed.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use crate::discards::{open, read_all};
use crate::lab::{Lab, assert_same, assert_sound, guest_bytes, pattern};

/// Makes an image with `script`, in which `IMAGE` stands for its path and `DIR` for its directory.
pub fn make(lab: &Lab, name: &str, script: &str) -> PathBuf {
    let image = lab.image(name);
    let script = script.replace("IMAGE", image.to_str().unwrap());
    sh!("{}", script.replace("DIR", lab.images().to_str().unwrap()));
    image
}

/// The image is listed; opening it (or, at the latest, reading all of it) fails with EOPNOTSUPP;
/// the log has `word`; and the file is as it was.
fn assert_refused(script: &str, word: &str) {
    let lab = Lab::new();
    let image = make(&lab, "refused.qcow2", script);
    let before = fs::read(&image).unwrap();
    let mount = lab.mount();
    let raw = mount.path("refused.raw");
    assert!(sh!("ls {}", mount.point().display()).contains("refused.raw"), "not listed");
    assert!(fs::metadata(&raw).is_ok(), "cannot be looked at");
    for options in [OpenOptions::new().read(true), OpenOptions::new().read(true).write(true)] {
        let refusal = options.open(&raw).map(drop).expect_err("opened all the same");
        assert_eq!(refusal.raw_os_error(), Some(libc::EOPNOTSUPP), "{refusal}");
    }
    let log = mount.log().to_lowercase();
    assert!(log.contains(word), "the log does not say why: {log}");
    mount.umount();
    assert_same(&fs::read(&image).unwrap(), &before, "the refused file");
}

#[test]
fn backing_files_outside_the_directory_are_refused() {
    assert_refused(
        "qemu-img create -q -f qcow2 DIR/../base.qcow2 8M
         qemu-img create -q -f qcow2 -b ../base.qcow2 -F qcow2 IMAGE",
        "backing",
    );
    assert_refused("qemu-img create -q -f qcow2 -u -b /etc/shadow -F raw IMAGE 8M", "/etc/shadow");
}

#[test]
fn backing_files_by_protocol_are_refused() {
    assert_refused(
        "qemu-img create -q -f qcow2 -u -b nbd:localhost:10809 -F raw IMAGE 8M",
        "backing",
    );
}

#[test]
fn external_data_files_outside_the_directory_are_refused() {
    assert_refused(
        "qemu-img create -q -f qcow2 -o data_file=DIR/../data.img IMAGE 8M",
        "data file",
    );
}

/// The line of the log that the next open of a file brings.
const ANOTHER: &str = "`qemu-img convert -O qcow2` makes an image without it";

/// What to change in an image (bytes and where), the errno of an open, and the line in the log.
type Refusal = (&'static [(usize, &'static [u8])], i32, &'static str);

const REFUSALS: &[Refusal] = &[
    (&[(0, b"PFI\xfb")], libc::EINVAL, "not a qcow2 image: no qcow2 magic number at its start"),
    (&[(7, &[1])], libc::EINVAL, "not a qcow2 image: qcow2 version 1; 2 and 3 are known"),
    (&[(7, &[4])], libc::EINVAL, "not a qcow2 image: qcow2 version 4; 2 and 3 are known"),
    (&[(23, &[8])], libc::EIO, "header: cluster_bits is 8, allowed are 9 to 21"),
    (&[(23, &[22])], libc::EIO, "header: cluster_bits is 22, allowed are 9 to 21"),
    (
        &[(24, &[0xff; 8])],
        libc::EIO,
        "header: a virtual size of 18446744073709551615 bytes needs 34359738368 L1 entries, there \
         are 1",
    ),
    (
        &[(28, &[0x20, 0, 0, 1])],
        libc::EIO,
        "header: a virtual size of 536870913 bytes needs 2 L1 entries, there are 1",
    ),
    (
        &[(36, &[0, 0x40, 0, 1])],
        libc::EFBIG,
        "header: the L1 table has 4194305 entries, at most 4194304 are served",
    ),
    (&[(46, &[2])], libc::EIO, "header: the L1 table at 0x30200 does not start a cluster"),
    (&[(40, &[0; 8])], libc::EIO, "header: the L1 table would lie over the header"),
    (&[(54, &[1])], libc::EIO, "header: the refcount table at 0x10100 does not start a cluster"),
    (&[(48, &[0; 8])], libc::EIO, "header: there is no refcount table"),
    (&[(56, &[0; 4])], libc::EIO, "header: there is no refcount table"),
    (
        &[(56, &[0, 0, 0, 129])],
        libc::EFBIG,
        "header: the refcount table has 129 clusters, at most 8 MiB are served",
    ),
    (&[(71, &[8])], libc::EIO, "header: the snapshot table at 0x8 does not start a cluster"),
    (&[(99, &[7])], libc::EIO, "header: refcount_order is 7, allowed are 0 to 6"),
    (&[(103, &[96])], libc::EIO, "header: header_length is 96, @LENGTH"),
    (&[(103, &[108])], libc::EIO, "header: header_length is 108, @LENGTH"),
    (&[(100, &[0, 1, 0, 8])], libc::EIO, "header: header_length is 65544, @LENGTH"),
    (&[(79, &[8])], libc::EIO, "header: compression_type is 0 but its feature bit is set"),
    (&[(104, &[1])], libc::EIO, "header: compression_type is 1 but its feature bit is not set"),
    (&[(79, &[8]), (104, &[2])], libc::EOPNOTSUPP, "compression type 2 is not known: @ANOTHER"),
    (
        &[(74, &[1])],
        libc::EOPNOTSUPP,
        "incompatible feature bit 40 (no name given) is not known: @ANOTHER",
    ),
    // The first name of the feature name table becomes that of bit 41.
    (
        &[(74, &[2]), (121, &[41]), (122, b"quantum clusters\0\x1b")],
        libc::EOPNOTSUPP,
        "incompatible feature bit 41 (quantum clusters) is not known: @ANOTHER",
    ),
    (&[(35, &[1])], libc::ENOKEY, "it is encrypted (AES) and there is no key for it: @KEY"),
    (&[(35, &[2])], libc::ENOKEY, "it is encrypted (LUKS) and there is no key for it: @KEY"),
    (&[(35, &[3])], libc::EOPNOTSUPP, "encryption method 3 is not known: @ANOTHER"),
    (
        &[(14, &[2]), (18, &[4])],
        libc::EIO,
        "header: the backing file's name is 1024 bytes long, allowed are 1023",
    ),
    (
        &[(12, &[0, 0, 0xff, 0xff]), (19, &[2])],
        libc::EIO,
        "header: the backing file's name at 0xffff leaves the first cluster",
    ),
    (
        &[(116, &[1])],
        libc::EIO,
        "header extension 0x6803f857 at 0x70 is 16777600 bytes long and leaves the header",
    ),
];

/// What the short forms in a line stand for.
fn whole_line(line: &str) -> String {
    let key = "give its key with `--key-file @NAME=FILE`, or with `--keys DIR` and DIR/@NAME.key";
    let length = "allowed are multiples of 8 from 104 to the end of the first cluster";
    line.replace("@ANOTHER", ANOTHER).replace("@KEY", key).replace("@LENGTH", length)
}

#[test]
fn every_refused_header_has_its_line_and_its_errno_and_is_not_written_to() {
    let lab = Lab::new();
    let template = fs::read(lab.create("sound.qcow2", "8M", "")).unwrap();
    let mut cases: Vec<(PathBuf, i32, String)> = Vec::new();
    let mut add = |bytes: &[u8], errno, line: String| {
        let image = lab.image(&format!("case{}.qcow2", cases.len()));
        fs::write(&image, bytes).unwrap();
        cases.push((image, errno, line));
    };
    for (changes, errno, line) in REFUSALS {
        let mut bytes = template.clone();
        changes.iter().for_each(|(at, new)| bytes[*at..at + new.len()].copy_from_slice(new));
        add(&bytes, *errno, whole_line(line));
    }
    for length in [0, 3, 71] {
        let line = "not a qcow2 image: shorter than a header";
        add(&template[..length], libc::EINVAL, line.into());
    }
    let line = "header: the file ends inside the version 3 header";
    add(&template[..100], libc::EIO, line.into());
    let before: Vec<_> = cases.iter().map(|(image, ..)| state(image)).collect();
    let mount = lab.mount();
    for (image, errno, line) in &cases {
        let name = image.file_stem().unwrap().to_str().unwrap();
        let raw = mount.path(&format!("{name}.raw"));
        for options in [OpenOptions::new().read(true), OpenOptions::new().read(true).write(true)] {
            let refusal = options.open(&raw).map(drop).expect_err(line);
            assert_eq!(refusal.raw_os_error(), Some(*errno), "{line}");
        }
        let line = format!("{name}.qcow2: {}", line.replace("@NAME", name));
        let log = mount.log();
        let of_it = format!(" {name}.qcow2: ");
        let said: Vec<&str> = log.lines().filter(|l| l.contains(&of_it)).collect();
        assert!(said.iter().any(|l| l.ends_with(&line)), "no line ends with\n{line}\nin {said:#?}");
    }
    assert_eq!(read_all(&mount.path("sound.raw")).len(), 8 << 20);
    mount.umount();
    for ((image, _, line), before) in cases.iter().zip(before) {
        assert!(state(image) == before, "written to: {line}");
    }
}

/// A file's bytes and when it was changed.
fn state(image: &std::path::Path) -> (Vec<u8>, i64, i64) {
    let metadata = fs::metadata(image).unwrap();
    (fs::read(image).unwrap(), metadata.mtime(), metadata.mtime_nsec())
}

#[test]
fn more_snapshots_than_are_served_keep_writers_away() {
    let lab = Lab::new();
    let many = lab.create("many.qcow2", "8M", "");
    open(&many).write_all_at(&[0, 1, 0, 1], 60).unwrap();
    let before = state(&many);
    let mount = lab.mount();
    let raw = mount.path("many.raw");
    let refusal = OpenOptions::new().write(true).open(&raw).expect_err("opened for writing");
    assert_eq!(refusal.raw_os_error(), Some(libc::EFBIG), "{refusal}");
    let line = "many.qcow2: 65537 snapshots, at most 65536 are served";
    assert!(mount.log().lines().any(|l| l.ends_with(line)), "{}", mount.log());
    mount.umount();
    assert!(state(&many) == before, "written to");
}

#[test]
fn what_is_no_image_is_refused_and_harms_no_other() {
    let lab = Lab::new();
    fs::write(lab.image("text.qcow2"), "this is no qcow2 image").unwrap();
    fs::write(lab.image("empty.qcow2"), "").unwrap();
    let sound = lab.create("sound.qcow2", "4M", "");
    let mount = lab.mount();
    for name in ["text.raw", "empty.raw"] {
        let refusal = File::open(mount.path(name)).map(drop).expect_err("opened all the same");
        assert_eq!(refusal.raw_os_error(), Some(libc::EINVAL), "{name}: {refusal}");
    }
    assert_eq!(read_all(&mount.path("sound.raw")), vec![0; 4 << 20]);
    mount.umount();
    assert_eq!(fs::read(lab.image("text.qcow2")).unwrap(), b"this is no qcow2 image");
    assert_sound(&sound);
}

#[test]
fn a_dirty_image_is_rebuilt_and_served() {
    let lab = Lab::new();
    let image = lab.create("dirty.qcow2", "16M", "lazy_refcounts=on");
    let killed = attempt!(
        "qemu-io -f qcow2 -c 'write -P 0x5a 1M 2M' -c flush -c 'sigraise 9' {}",
        image.display()
    );
    assert!(!killed.ok());
    let dirty = attempt!("qemu-img check -f qcow2 {}", image.display());
    assert_eq!(dirty.code, Some(2), "the image is not dirty: {}", dirty.text());
    let mount = lab.mount();
    let file = open(&mount.path("dirty.raw"));
    let mut expected = vec![0; 16 << 20];
    expected[1 << 20..3 << 20].fill(0x5a);
    assert_same(&read_all(&mount.path("dirty.raw")), &expected, "after the rebuild");
    file.write_all_at(&pattern(1, 1 << 20), 2 << 20).unwrap();
    expected[2 << 20..3 << 20].copy_from_slice(&pattern(1, 1 << 20));
    file.write_all_at(&pattern(2, 1 << 20), 8 << 20).unwrap();
    expected[8 << 20..9 << 20].copy_from_slice(&pattern(2, 1 << 20));
    drop(file);
    mount.umount();
    assert_same(&guest_bytes(&image), &expected, "through qemu");
    assert_sound(&image);
}

#[test]
fn an_image_marked_corrupt_is_read_only() {
    let lab = Lab::new();
    let image = lab.create("corrupt.qcow2", "8M", "");
    sh!("qemu-io -f qcow2 -c 'write -P 0x21 0 1M' {}", image.display());
    let corrupt_bit = [2];
    open(&image).write_all_at(&corrupt_bit, 79).unwrap();
    let before = fs::read(&image).unwrap();
    let mount = lab.mount();
    let raw = mount.path("corrupt.raw");
    assert_eq!(read_all(&raw)[..1 << 20], vec![0x21; 1 << 20], "it can be read");
    let attempt = OpenOptions::new().write(true).open(&raw);
    let refusal = attempt.and_then(|file| file.write_all_at(b"x", 0)).expect_err("written to");
    assert_eq!(refusal.raw_os_error(), Some(libc::EROFS), "{refusal}");
    assert!(mount.log().to_lowercase().contains("corrupt"), "log: {}", mount.log());
    mount.umount();
    assert_same(&fs::read(&image).unwrap(), &before, "the corrupt file");
}
