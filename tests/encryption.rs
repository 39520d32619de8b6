//! Encrypted images: all that QEMU offers, both ways; keys that are wrong and headers that are not
//! what they seem.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use qcow2fs::crypt::Secret;
use qcow2fs::image::{Backing, Beside, Image, Options};
use qcow2fs::{Error, ErrorKind};
use support::luks::{Encryption, KEY, Parameters};
use support::qemu::{self, DataFile, Shape};
use support::{difference, host_file, scratch};

const MIB: u64 = 1 << 20;

/// An encrypted image without data.
fn make(directory: &Path, shape: Shape, encryption: Encryption) -> PathBuf {
    let path = directory.join("disk.qcow2");
    Shape { encryption, ..shape }.create(&path, None);
    path
}

fn luks() -> Encryption {
    Encryption::Luks(Parameters::new("aes", "xts-plain64", "sha256", 64))
}

fn unlock(path: &Path, key: &str) -> qcow2fs::Result<Beside> {
    let cipher = Image::unlock(&*host_file(path), &Secret::copy_of(key.as_bytes()))?;
    let data = path.with_extension("data");
    let data = data.exists().then(|| host_file(&data));
    Ok(Beside { cipher: Some(cipher), data, backing: None })
}

fn open(path: &Path) -> Arc<Image> {
    let options = Options { writable: true, ..Options::default() };
    Image::open_with(host_file(path), &options, unlock(path, KEY).unwrap()).unwrap()
}

fn read(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.virtual_size() as usize];
    image.read(0, &mut bytes).unwrap();
    bytes
}

#[track_caller]
fn assert_reads(image: &Image, expected: &[u8]) {
    if let Some(difference) = difference(&read(image), expected) {
        panic!("we read {difference}");
    }
}

/// We write and QEMU reads, QEMU writes and we read: whole clusters, parts of them, zeros.
fn exchange(path: &Path) {
    let image = open(path);
    let mut expected = vec![0; image.virtual_size() as usize];
    for (at, length, fill) in [(0, 70_000, 1), (131_072, 65_536, 2), (200_001, 777, 3)] {
        expected[at..at + length].fill(fill);
        image.write(at as u64, &expected[at..at + length]).unwrap();
    }
    image.discard(1000..2000).unwrap();
    expected[1000..2000].fill(0);
    assert_reads(&image, &expected);
    image.close().unwrap();
    qemu::assert_clean(path);
    qemu::assert_same(path, &expected);
    qemu::io(path, &["write -P 9 50000 100000".into(), "write -z 66560 3584".into()]);
    expected[50_000..150_000].fill(9);
    expected[66_560..70_144].fill(0);
    let image = open(path);
    assert_reads(&image, &expected);
    image.close().unwrap();
}

/// Every cipher, mode and IV generator, and every hash, that `qemu-img` 10.0.2 makes images with.
#[test]
fn whatever_qemu_offers_is_read_and_written_as_qemu_does() {
    let mut all = Vec::new();
    for (cipher, keys) in
        [("aes", [16, 24, 32]), ("serpent", [16, 24, 32]), ("twofish", [16, 24, 32])]
    {
        for key in keys {
            all.push(Parameters::new(cipher, "xts-plain64", "sha256", 2 * key));
            if key != 24 {
                // QEMU asserts that key material ends with a sector: 24 bytes are too many or few.
                for mode in ["cbc-plain64", "cbc-plain", "ctr-plain64", "ecb-plain64"] {
                    all.push(Parameters::new(cipher, mode, "sha256", key));
                }
                all.push(Parameters::new(cipher, "cbc-essiv:sha256", "sha1", key));
                all.push(Parameters::new(cipher, "xts-essiv:sha256", "sha1", 2 * key));
            }
        }
    }
    for mode in ["cbc-plain64", "cbc-plain", "ctr-plain64", "ecb-plain64", "cbc-essiv:md5"] {
        all.push(Parameters::new("cast5", mode, "sha256", 16));
    }
    all.push(Parameters::new("aes", "cbc-essiv:md5", "sha256", 16));
    for hash in ["md5", "ripemd160", "sha1", "sha224", "sha384", "sha512", "sm3"] {
        all.push(Parameters::new("aes", "xts-plain64", hash, 64));
    }
    // QEMU's programs wait for the disk more than they work.
    std::thread::scope(|scope| {
        for share in all.chunks(all.len().div_ceil(4)) {
            scope.spawn(move || share.iter().enumerate().for_each(offered));
        }
    });
}

fn offered((number, parameters): (usize, &Parameters)) {
    let encryption = Encryption::Luks(Parameters { slot: number % 8, ..parameters.clone() });
    println!("{encryption}");
    let directory = scratch();
    exchange(&make(directory.path(), Shape::new(16, 16, MIB), encryption));
}

#[test]
fn every_shape_is_read_and_written_as_qemu_does() {
    let plain = Shape::new(16, 16, MIB);
    for shape in [
        Shape::new(9, 16, 300_032),
        Shape::new(12, 1, 300_032),
        Shape::new(21, 16, 5 * MIB),
        Shape { version: 2, ..plain.clone() },
        Shape { extended_l2: true, ..plain.clone() },
        Shape { extended_l2: true, cluster_bits: 14, size: 300_032, ..plain.clone() },
        Shape { data_file: DataFile::Plain, ..plain.clone() },
    ] {
        for encryption in [luks(), Encryption::Aes] {
            println!("{shape} {encryption}");
            let directory = scratch();
            exchange(&make(directory.path(), shape.clone(), encryption));
        }
    }
}

/// As `qemu-img` makes it by itself, and not only as this project's tests do.
#[test]
fn an_image_made_by_qemu_alone_opens() {
    let directory = scratch();
    let path = directory.path().join("disk.qcow2");
    let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    let object = format!("secret,id=key,data={KEY}");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "--object", &object, "-o", options]);
    qemu::run(create.arg(&path).arg("1M"));
    exchange(&path);
}

/// Sectors that are written in part keep the rest, whoever else writes beside.
#[test]
fn writers_of_parts_of_a_sector_do_not_undo_each_other() {
    for encryption in [luks(), Encryption::Aes] {
        let directory = scratch();
        let path = make(directory.path(), Shape::new(16, 16, MIB), encryption);
        let image = open(&path);
        image.write(0, &[0xff; 4096]).unwrap();
        std::thread::scope(|scope| {
            for writer in 0..4u64 {
                let image = &image;
                scope.spawn(move || {
                    for round in 0..200u64 {
                        for sector in 0..4 {
                            let at = sector * 512 + writer * 128;
                            image.write(at, &[(writer * 50 + round % 50) as u8; 128]).unwrap();
                        }
                    }
                });
            }
        });
        let mut expected = vec![0; MIB as usize];
        expected[..4096].fill(0xff);
        let last = |at| (at / 128 % 4 * 50 + 49) as u8;
        (0..2048).zip(&mut expected).for_each(|(at, byte)| *byte = last(at));
        assert_reads(&image, &expected);
        image.close().unwrap();
        qemu::assert_same(&path, &expected);
    }
}

/// What is moved by compaction is encrypted for its new place, snapshots' clusters too.
#[test]
fn compaction_encrypts_anew_what_it_moves() {
    for encryption in [luks(), Encryption::Aes] {
        let directory = scratch();
        let path = make(directory.path(), Shape::new(16, 16, 8 * MIB), encryption);
        let image = open(&path);
        let mut expected: Vec<u8> = (0..8 * MIB).map(|at| (at / 4096 % 251) as u8).collect();
        image.write(0, &expected).unwrap();
        image.take_snapshot(b"then").unwrap();
        let then = expected.clone();
        image.write(7 * MIB, &[7; 100_000]).unwrap();
        expected[7 << 20..(7 << 20) + 100_000].fill(7);
        image.close().unwrap();
        qemu::assert_same(&path, &expected);
        qemu::run(qemu::on(Command::new("qemu-img").args(["snapshot", "-d", "then"]), &path));
        let image = open(&path);
        image.discard(0..6 * MIB).unwrap();
        expected[..6 << 20].fill(0);
        image.take_snapshot(b"now").unwrap();
        image.compact(|_| true).unwrap();
        let status = image.status().unwrap();
        assert!(status.recycled.moved > 0, "{status:?}");
        assert!(status.file_length < 5 * MIB, "{status:?}");
        assert_reads(&image, &expected);
        image.close().unwrap();
        qemu::assert_clean(&path);
        qemu::assert_same(&path, &expected);
        assert!(qemu::contents(&path, Some("now")) == expected, "the snapshot");
        drop(then);
    }
}

/// A LUKS header at the end of the file stays there, and the status says so.
#[test]
fn the_luks_header_is_not_moved_and_says_so() {
    let directory = scratch();
    let path = make(directory.path(), Shape::new(16, 16, MIB), luks());
    let image = open(&path);
    image.write(0, &[1; 200_000]).unwrap();
    image.discard(0..150_000).unwrap();
    image.compact(|_| true).unwrap();
    image.close().unwrap();
    qemu::assert_clean(&path);
    open(&path).close().unwrap();
}

/// Parts of a cluster that are discarded one after the other give it back in the end.
#[test]
fn discards_of_parts_add_up() {
    for shape in [Shape::new(16, 16, MIB), Shape { extended_l2: true, ..Shape::new(16, 16, MIB) }] {
        let directory = scratch();
        let image = open(&make(directory.path(), shape, luks()));
        image.write(0, &vec![5; 65_536]).unwrap();
        for at in (0..65_536).step_by(1024) {
            assert!(image.next_data(0).unwrap().is_some(), "data is left at {at}");
            image.discard(at..at + 1024).unwrap();
        }
        assert_eq!(image.next_data(0).unwrap(), None);
        image.close().unwrap();
    }
}

/// An encrypted overlay on a plain base, a plain one on an encrypted base, and both encrypted.
#[test]
fn chains_mix_encrypted_files_and_others() {
    let (luks, plain) = (luks(), Encryption::None);
    for (base, top) in [(&plain, &luks), (&luks, &plain), (&luks, &Encryption::Aes)] {
        let directory = scratch();
        let below = directory.path().join("base.qcow2");
        let shape = |encryption: &Encryption| Shape {
            encryption: encryption.clone(),
            ..Shape::new(16, 16, MIB)
        };
        shape(base).create(&below, None);
        qemu::io(&below, &["write -P 5 0 1M".into()]);
        let path = directory.path().join("top.qcow2");
        shape(top).create(&path, Some(&below));
        let beside = |path: &Path, encryption: &Encryption| Beside {
            cipher: encryption.cipher(path),
            ..Beside::default()
        };
        let read_only = Options { writable: false, ..Options::default() };
        let backing: Arc<dyn Backing> =
            Image::open_with(host_file(&below), &read_only, beside(&below, base)).unwrap();
        let beside = Beside { backing: Some(backing), ..beside(&path, top) };
        let writable = Options { writable: true, ..Options::default() };
        let image = Image::open_with(host_file(&path), &writable, beside).unwrap();
        image.write(100_000, &[6; 1000]).unwrap();
        image.discard(300_000..400_000).unwrap();
        let mut expected = vec![5; MIB as usize];
        expected[100_000..101_000].fill(6);
        expected[300_000..400_000].fill(0);
        assert_reads(&image, &expected);
        image.close().unwrap();
        if *base == plain {
            qemu::assert_clean(&path);
            qemu::assert_same(&path, &expected);
        }
    }
}

#[track_caller]
fn refused(path: &Path, key: &str) -> Error {
    let before = std::fs::read(path).unwrap();
    let error = unlock(path, key).err().expect("it opens");
    assert!(before == std::fs::read(path).unwrap(), "{error}: it was written to");
    let line = error.to_string();
    assert!(!line.contains('\n') && !line.contains(key), "{line}");
    error
}

#[test]
fn without_the_right_key_nothing_is_shown() {
    let directory = scratch();
    let path = make(directory.path(), Shape::new(16, 16, MIB), luks());
    let wrong = refused(&path, "battery horse correct");
    assert_eq!((wrong.kind(), wrong.errno()), (ErrorKind::WrongKey, libc::EKEYREJECTED));
    for writable in [false, true] {
        let options = Options { writable, ..Options::default() };
        let error = Image::open(host_file(&path), &options).err().unwrap();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::NoKey, libc::ENOKEY));
    }
    // What needs no data needs no key.
    let cipher = Some(Arc::new(qcow2fs::crypt::DataCipher::without_key()));
    let options = Options { writable: true, ..Options::default() };
    let beside = Beside { cipher, ..Beside::default() };
    let image = Image::open_with(host_file(&path), &options, beside).unwrap();
    image.take_snapshot(b"then").unwrap();
    assert_eq!(image.write(0, &[1; 512]).unwrap_err().kind(), ErrorKind::NoKey);
    image.close().unwrap();
    qemu::assert_clean(&path);
}

/// What to change in a LUKS header (where, and the bytes), and what comes of it.
type Case<'a> = (&'a [(usize, &'a [u8])], ErrorKind, &'a str);

/// An image, and the place of its LUKS header.
struct Damaged {
    bytes: Vec<u8>,
    luks: usize,
    path: PathBuf,
}

impl Damaged {
    /// The kind of error, and what it says, with bytes from `at` of the LUKS header replaced.
    fn try_with(&self, changes: &[(usize, &[u8])]) -> (ErrorKind, String) {
        let mut bytes = self.bytes.clone();
        for (at, with) in changes {
            bytes[self.luks + at..][..with.len()].copy_from_slice(with);
        }
        std::fs::write(&self.path, bytes).unwrap();
        let error = refused(&self.path, KEY);
        (error.kind(), error.to_string())
    }
}

#[test]
fn hostile_and_damaged_headers_are_refused_in_time() {
    let directory = scratch();
    let path = make(directory.path(), Shape::new(16, 16, MIB), luks());
    let bytes = std::fs::read(&path).unwrap();
    let luks = bytes.windows(6).position(|w| w == b"LUKS\xba\xbe").unwrap();
    let damaged = Damaged { bytes, luks, path };
    let max = &u32::MAX.to_be_bytes();
    let cases: &[Case] = &[
        (&[(0, b"NOPE")], ErrorKind::Corrupt, "no LUKS header"),
        (&[(6, &[0, 2])], ErrorKind::Unsupported, "LUKS version 2"),
        (&[(8, b"rot13\0")], ErrorKind::Unsupported, "rot13-xts-plain64"),
        (&[(40, b"gcm-plain64\0")], ErrorKind::Unsupported, "aes-gcm-plain64"),
        (&[(72, b"crc32\0\0")], ErrorKind::Unsupported, "the hash crc32"),
        (&[(8, &[0xff; 32])], ErrorKind::Unsupported, "is not served"),
        (&[(108, max)], ErrorKind::Corrupt, "a master key of 4294967295 bytes"),
        (&[(108, &[0; 4])], ErrorKind::Corrupt, "a master key of 0 bytes"),
        // The digest of the master key, its salt, and its rounds.
        (&[(112, &[0; 20])], ErrorKind::WrongKey, "none of its key slots"),
        (&[(132, &[0; 32])], ErrorKind::WrongKey, "none of its key slots"),
        (&[(164, max)], ErrorKind::WrongKey, "4294968295 rounds of PBKDF2"),
        (&[(164, &[0; 4])], ErrorKind::WrongKey, "key slot 0 is damaged"),
        // The first slot: empty, its rounds, salt, place and stripes, and its material.
        (&[(208, &[0; 4])], ErrorKind::WrongKey, "no key slot in use"),
        (&[(212, max)], ErrorKind::WrongKey, "key slot 0 asks for 4294968295 rounds"),
        (&[(212, &[0; 4])], ErrorKind::WrongKey, "no rounds of PBKDF2"),
        (&[(216, &[1; 32])], ErrorKind::WrongKey, "none of its key slots"),
        (&[(248, max)], ErrorKind::WrongKey, "its material is at 0x1fffffffe00"),
        (&[(248, &[0; 4])], ErrorKind::WrongKey, "its material is at 0x0"),
        (&[(252, max)], ErrorKind::WrongKey, "4294967295 stripes instead of 4000"),
        (&[(252, &[0; 4])], ErrorKind::WrongKey, "0 stripes"),
        (&[(4096 + 100_000, &[1; 64])], ErrorKind::WrongKey, "none of its key slots"),
    ];
    for (changes, kind, text) in cases {
        let (found, line) = damaged.try_with(changes);
        assert!(found == *kind && line.contains(text), "{text}: {found:?} {line}");
    }
    // Eight slots that each ask for as much as one may.
    let slots: Vec<(usize, [u8; 8])> = (0..8)
        .map(|slot| {
            let mut start = [0x00, 0xac, 0x71, 0xf3, 0, 0, 0, 0];
            start[4..].copy_from_slice(&(1u32 << 31).to_be_bytes());
            (208 + slot * 48, start)
        })
        .collect();
    let slots: Vec<(usize, &[u8])> = slots.iter().map(|(at, bytes)| (*at, &bytes[..])).collect();
    let (kind, line) = damaged.try_with(&slots);
    assert!(kind == ErrorKind::WrongKey && line.contains("rounds of PBKDF2"), "{line}");
}

/// Where the qcow2 header says that the LUKS header is, and how long.
#[test]
fn the_place_of_a_luks_header_is_not_trusted() {
    let directory = scratch();
    let path = make(directory.path(), Shape::new(16, 16, MIB), luks());
    let bytes = std::fs::read(&path).unwrap();
    let luks = bytes.windows(6).position(|w| w == b"LUKS\xba\xbe").unwrap() as u64;
    let at = bytes.windows(4).position(|w| w == 0x0537_be77u32.to_be_bytes()).unwrap() + 8;
    for (offset, length, text) in [
        (luks + 512, support::luks::LENGTH, "makes no sense"),
        (u64::MAX, support::luks::LENGTH, "makes no sense"),
        (luks, 0, "makes no sense"),
        (luks, u64::MAX, "makes no sense"),
        (luks, 592, "its material is at"),
        (0, support::luks::LENGTH, "no LUKS header"),
        (1 << 50, support::luks::LENGTH, "LUKS header"),
        (u64::MAX << 16, support::luks::LENGTH, "LUKS header"),
    ] {
        let mut changed = bytes.clone();
        changed[at..at + 8].copy_from_slice(&offset.to_be_bytes());
        changed[at + 8..at + 16].copy_from_slice(&length.to_be_bytes());
        std::fs::write(&path, changed).unwrap();
        let line = refused(&path, KEY).to_string();
        assert!(line.contains(text), "{offset:#x}, {length}: {line}");
    }
}

/// Any bytes of the header may be any others; only rounds are few, so that it takes no time.
#[test]
fn a_luks_header_of_any_bytes_opens_or_does_not() {
    let directory = scratch();
    let path = make(directory.path(), Shape::new(16, 16, MIB), luks());
    let bytes = std::fs::read(&path).unwrap();
    let luks = bytes.windows(6).position(|w| w == b"LUKS\xba\xbe").unwrap();
    let seed = support::rng::fresh_seed();
    let mut rng = support::rng::Rng::new(seed);
    for round in 0..60 {
        let mut changed = bytes.clone();
        for _ in 0..rng.within(1..5) {
            changed[luks + rng.within(0..592) as usize] = rng.within(0..256) as u8;
        }
        for rounds in std::iter::once(164).chain((0..8).map(|slot| 212 + slot * 48)) {
            changed[luks + rounds..][..2].fill(0);
        }
        std::fs::write(&path, changed).unwrap();
        if let Err(error) = unlock(&path, KEY) {
            let line = error.to_string();
            assert!(!line.contains('\n'), "seed {seed}, round {round}: {line}");
        }
    }
}

/// A slot that is damaged keeps nobody from opening another one.
#[test]
fn any_slot_opens_the_image_beside_damaged_ones() {
    let directory = scratch();
    let parameters = Parameters { slot: 5, ..Parameters::new("aes", "xts-plain64", "sha1", 64) };
    let path = make(directory.path(), Shape::new(16, 16, MIB), Encryption::Luks(parameters));
    let mut bytes = std::fs::read(&path).unwrap();
    let luks = bytes.windows(6).position(|w| w == b"LUKS\xba\xbe").unwrap();
    for (slot, stripes) in [(1, 4000u32), (2, 7)] {
        let at = luks + 208 + slot * 48;
        bytes[at..at + 8].copy_from_slice(&[0x00, 0xac, 0x71, 0xf3, 0, 0, 0, 9]);
        bytes[at + 44..at + 48].copy_from_slice(&stripes.to_be_bytes());
    }
    std::fs::write(&path, bytes).unwrap();
    let image = open(&path);
    image.write(5, b"served").unwrap();
    image.close().unwrap();
    let wrong = refused(&path, "something else").to_string();
    assert!(wrong.contains("key slot 2 is damaged"), "{wrong}");
}

/// No sector of an encrypted image stands in the file as it is on the disk.
#[test]
fn no_plain_text_reaches_the_file() {
    let marker: Vec<u8> = b"nobody must see this".iter().copied().cycle().take(3000).collect();
    for encryption in [luks(), Encryption::Aes] {
        for extended_l2 in [false, true] {
            let directory = scratch();
            let shape = Shape { extended_l2, ..Shape::new(16, 16, MIB) };
            let path = make(directory.path(), shape, encryption.clone());
            let image = open(&path);
            for at in [0, 70_001, 140_000, 300_000] {
                image.write(at, &marker).unwrap();
            }
            image.discard(100..700).unwrap();
            image.take_snapshot(b"then").unwrap();
            image.write(1000, &marker).unwrap();
            image.compact(|_| true).unwrap();
            image.close().unwrap();
            let file = host_file(&path);
            let mut bytes = vec![0; file.len().unwrap() as usize];
            file.read_at(&mut bytes, 0).unwrap();
            assert!(!bytes.windows(16).any(|w| w == &marker[3..19]), "{encryption}");
        }
    }
}
