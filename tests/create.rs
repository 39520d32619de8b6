//! New images, judged by QEMU: every shape that the format has, and what cannot be.

// Here a panic is how a test fails, in its helpers too.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Command;

use qcow2fs::ErrorKind;
use qcow2fs::catalog::create_image;
use qcow2fs::catalog::{Alone, Keys};
use qcow2fs::check::check;
use qcow2fs::image::{
    BackingFile, Beside, CompressionType, CreateOptions, Image, NewDataFile, Options,
};
use qcow2fs::storage::{HostFile, IfTaken};
use support::{host_file, qemu, scratch};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

/// What `qemu-img info` says of the image.
fn info(path: &Path) -> serde_json::Value {
    let text = qemu::run(Command::new("qemu-img").args(["info", "--output=json"]).arg(path));
    serde_json::from_str(&text).unwrap()
}

/// QEMU finds exactly what was asked for, and so do we; neither finds anything wrong.
#[track_caller]
fn assert_is(path: &Path, options: &CreateOptions) {
    qemu::assert_clean(path);
    let report = check(&HostFile::new(std::fs::File::open(path).unwrap())).unwrap();
    assert!(report.exit_code() == 0, "{options:?}: {report:?}");
    let info = info(path);
    assert_eq!(info["virtual-size"], options.virtual_size, "{options:?}");
    assert_eq!(info["cluster-size"], options.cluster_size, "{options:?}");
    let data = &info["format-specific"]["data"];
    let compat = if options.version == 2 { "0.10" } else { "1.1" };
    assert_eq!(data["compat"], compat, "{options:?}");
    assert_eq!(data["refcount-bits"], options.refcount_bits, "{options:?}");
    if options.version == 3 {
        assert_eq!(data["lazy-refcounts"], options.lazy_refcounts, "{options:?}");
        assert_eq!(data["extended-l2"], options.extended_l2, "{options:?}");
        let is_zstd = options.compression == CompressionType::Zstd;
        assert_eq!(data["compression-type"], if is_zstd { "zstd" } else { "zlib" }, "{options:?}");
    }
}

/// Any shape that `number` picks for clusters of `cluster_size` bytes.
fn shape(cluster_size: u64, number: usize) -> CreateOptions {
    let plain = CreateOptions { cluster_size, ..Default::default() };
    match number % 9 {
        0 => CreateOptions { version: 2, ..plain },
        1 => CreateOptions { lazy_refcounts: true, compression: CompressionType::Zstd, ..plain },
        order => CreateOptions {
            refcount_bits: 1 << (order - 2),
            extended_l2: cluster_size >= 16 * KIB && number.is_multiple_of(2),
            ..plain
        },
    }
}

#[test]
fn every_geometry_is_what_qemu_takes_it_for() {
    let directory = scratch();
    let path = directory.path().join("new.qcow2");
    let mut number = 0;
    for cluster_bits in 9..=21 {
        let cluster_size = 1u64 << cluster_bits;
        // The last one is the most that 512-byte clusters can hold; then as much as they can, up to
        // 64 TiB.
        let most = (64 * TIB).min((4 * MIB) * (cluster_size / 16) * cluster_size);
        for virtual_size in [0, 512, cluster_size * 100 + 512, 10 << 30, most] {
            let options = CreateOptions { virtual_size, ..shape(cluster_size, number) };
            number += 1;
            create_image(&path, &options, IfTaken::Replace).unwrap();
            assert_is(&path, &options);
            assert!(std::fs::metadata(&path).unwrap().len() <= 64 * MIB, "{options:?}");
        }
    }
}

#[test]
fn every_refcount_width_counts_the_largest_tables() {
    let directory = scratch();
    for order in 0..=6 {
        let path = directory.path().join("new.qcow2");
        let options = CreateOptions {
            virtual_size: 128 << 30,
            cluster_size: 512,
            refcount_bits: 1 << order,
            ..Default::default()
        };
        create_image(&path, &options, IfTaken::Replace).unwrap();
        assert_is(&path, &options);
    }
}

#[test]
fn what_is_written_to_a_new_image_qemu_reads() {
    let directory = scratch();
    for (number, cluster_bits) in (9..=21).step_by(2).enumerate() {
        let path = directory.path().join(format!("{cluster_bits}.qcow2"));
        let size = 3 * MIB + 512;
        let options = CreateOptions { virtual_size: 0, ..shape(1 << cluster_bits, number) };
        create_image(&path, &options, IfTaken::Fail).unwrap();
        let writable = Options { writable: true, ..Default::default() };
        let image = Image::open(host_file(&path), &writable).unwrap();
        image.resize(size).unwrap();
        let mut expected = vec![0; size as usize];
        for at in [0, MIB - 512, size - 512] {
            let data = [at as u8 ^ 0x5a; 512];
            image.write(at, &data).unwrap();
            expected[at as usize..][..512].copy_from_slice(&data);
        }
        image.close().unwrap();
        qemu::assert_clean(&path);
        qemu::assert_same(&path, &expected);
    }
}

#[test]
fn a_backing_file_is_recorded_as_it_is_named() {
    let directory = scratch();
    std::fs::write(directory.path().join("base.raw"), [7; 64 << 10]).unwrap();
    for (version, cluster_size) in [(2, 64 * KIB), (3, 64 * KIB), (3, 512)] {
        let path = directory.path().join("overlay.qcow2");
        let backing = BackingFile { name: b"base.raw".to_vec(), format: Some("raw".into()) };
        let options = CreateOptions {
            virtual_size: 64 * KIB,
            version,
            cluster_size,
            backing: Some(backing.clone()),
            ..Default::default()
        };
        create_image(&path, &options, IfTaken::Replace).unwrap();
        assert_is(&path, &options);
        assert_eq!(info(&path)["backing-filename"], "base.raw");
        assert_eq!(info(&path)["backing-filename-format"], "raw");
        let summary = Image::summarize(&*host_file(&path)).unwrap();
        assert_eq!(summary.backing, Some(backing));
        assert_eq!(qemu::contents(&path, None), [7; 64 << 10]);
    }
}

#[test]
fn a_data_file_is_made_with_its_image() {
    let directory = scratch();
    for (raw, extended_l2) in [(false, false), (true, false), (false, true), (true, true)] {
        let path = directory.path().join(format!("{raw}-{extended_l2}.qcow2"));
        let data = path.with_extension("data");
        let name = data.to_str().unwrap().as_bytes().to_vec();
        let options = CreateOptions {
            virtual_size: MIB,
            extended_l2,
            data_file: Some(NewDataFile { name, raw }),
            ..Default::default()
        };
        create_image(&path, &options, IfTaken::Fail).unwrap();
        assert_is(&path, &options);
        assert_eq!(info(&path)["format-specific"]["data"]["data-file-raw"], raw);
        assert_eq!(std::fs::metadata(&data).unwrap().len(), MIB);
        let writable = Options { writable: true, ..Default::default() };
        let beside = Beside { data: Some(host_file(&data)), ..Beside::default() };
        let image = Image::open_with(host_file(&path), &writable, beside).unwrap();
        image.write(4096, &[9; 4096]).unwrap();
        image.close().unwrap();
        let mut expected = vec![0; MIB as usize];
        expected[4096..8192].fill(9);
        qemu::assert_same(&path, &expected);
        qemu::assert_clean(&path);
        let again = create_image(&path, &options, IfTaken::Replace).unwrap_err();
        assert_eq!(again.kind(), ErrorKind::Exists, "{again}");
        qemu::assert_same(&path, &expected);
    }
}

#[test]
fn nothing_is_overwritten_unless_asked() {
    let directory = scratch();
    let path = directory.path().join("new.qcow2");
    std::fs::write(&path, "precious").unwrap();
    let data = directory.path().join("new.data");
    let with_data = CreateOptions {
        data_file: Some(NewDataFile { name: b"new.data".to_vec(), raw: false }),
        ..Default::default()
    };
    for options in [CreateOptions::default(), with_data] {
        let refused = create_image(&path, &options, IfTaken::Fail).unwrap_err();
        assert_eq!(refused.errno(), libc::EEXIST, "{refused}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert!(!data.exists());
    }
    create_image(&path, &CreateOptions::default(), IfTaken::Replace).unwrap();
    qemu::assert_clean(&path);
    std::os::unix::fs::symlink(&path, &data).unwrap();
    let link = create_image(&data, &CreateOptions::default(), IfTaken::Replace).unwrap_err();
    assert_eq!(link.kind(), ErrorKind::Invalid, "{link}");
}

#[test]
fn an_image_in_use_is_not_replaced() {
    let directory = scratch();
    let path = directory.path().join("new.qcow2");
    create_image(&path, &CreateOptions::default(), IfTaken::Fail).unwrap();
    let allowed = [];
    let reader = Alone::open(&path, &allowed, Keys::default(), &Options::default()).unwrap();
    let refused = create_image(&path, &CreateOptions::default(), IfTaken::Replace).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InUse, "{refused}");
    reader.close().unwrap();
    create_image(&path, &CreateOptions::default(), IfTaken::Replace).unwrap();
}

#[test]
fn options_that_do_not_go_together_are_refused_and_leave_nothing() {
    let directory = scratch();
    let path = directory.path().join("new.qcow2");
    let plain = CreateOptions::default;
    let data_file = |raw| Some(NewDataFile { name: b"data".to_vec(), raw });
    let backing = |name: &[u8]| Some(BackingFile { name: name.to_vec(), format: None });
    let refused = [
        CreateOptions { version: 4, ..plain() },
        CreateOptions { cluster_size: 256, ..plain() },
        CreateOptions { cluster_size: 4 << 20, ..plain() },
        CreateOptions { cluster_size: 65537, ..plain() },
        CreateOptions { cluster_size: 0, ..plain() },
        CreateOptions { refcount_bits: 0, ..plain() },
        CreateOptions { refcount_bits: 128, ..plain() },
        CreateOptions { refcount_bits: 3, ..plain() },
        CreateOptions { version: 2, refcount_bits: 8, ..plain() },
        CreateOptions { version: 2, extended_l2: true, ..plain() },
        CreateOptions { version: 2, lazy_refcounts: true, ..plain() },
        CreateOptions { version: 2, compression: CompressionType::Zstd, ..plain() },
        CreateOptions { version: 2, data_file: data_file(false), ..plain() },
        CreateOptions { extended_l2: true, cluster_size: 8192, ..plain() },
        CreateOptions { virtual_size: 511, ..plain() },
        CreateOptions { backing: backing(b""), ..plain() },
        CreateOptions { backing: backing(b"a\0b"), ..plain() },
        CreateOptions { backing: backing(&[b'x'; 1024]), ..plain() },
        CreateOptions { backing: backing(&[b'x'; 600]), cluster_size: 512, ..plain() },
        CreateOptions { backing: backing(b"a"), data_file: data_file(true), ..plain() },
    ];
    for options in refused {
        let error = create_image(&path, &options, IfTaken::Fail).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{options:?}: {error}");
    }
    let small = CreateOptions { cluster_size: 512, virtual_size: (128 << 30) + 512, ..plain() };
    for options in [small, CreateOptions { virtual_size: u64::MAX - 511, ..plain() }] {
        let error = create_image(&path, &options, IfTaken::Fail).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooBig, "{options:?}: {error}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}
