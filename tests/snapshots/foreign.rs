//! What others have put into a snapshot table stays there: the state of a virtual machine, extra
//! data of a later time, ids and names that are no numbers and no file names.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use qcow2fs::image::Options;
use qcow2fs::storage::testing::MemoryStorage;

use crate::model::{whole_disk, whole_view};
use crate::support::luks::Encryption;
use crate::support::made::Made;
use crate::support::qemu::{self, DataFile, Shape};
use crate::support::{scratch, verify_clean};

const DISK: usize = 2 << 20;
const WITH_STATE: usize = 8 << 20;

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// An image of 8 MiB with snapshot `vm`, whose entry is changed to one of a disk of 2 MiB: what lies
/// behind is the state of a virtual machine then. L2 tables map 2 MiB each.
fn with_vm_state(directory: &Path) -> Made {
    let shape = Shape {
        version: 3,
        cluster_bits: 12,
        refcount_bits: 16,
        size: WITH_STATE as u64,
        preallocation: "off",
        lazy_refcounts: false,
        extended_l2: false,
        encryption: Encryption::None,
        data_file: DataFile::None,
    };
    let made = Made::empty(shape, directory);
    qemu::io(&made.path, &["write -P 1 0 2M".into(), "write -P 2 2M 6M".into()]);
    qemu::run(Command::new("qemu-img").args(["snapshot", "-c", "vm"]).arg(&made.path));
    let mut file = std::fs::read(&made.path).unwrap();
    let table = be64(&file, 64) as usize;
    file.resize(file.len().max(table + 4096), 0);
    // 24 bytes of extra data, then id `1` and name `vm`.
    assert_eq!(&file[table + 64..table + 67], b"1vm");
    file[table + 40..table + 48].copy_from_slice(&((WITH_STATE - DISK) as u64).to_be_bytes());
    file[table + 48..table + 56].copy_from_slice(&(DISK as u64).to_be_bytes());
    // 16 bytes more of it, which nobody knows, and another id.
    file[table + 36..table + 40].copy_from_slice(&40u32.to_be_bytes());
    file[table + 64..table + 80].copy_from_slice(b"unknown to us 16");
    file[table + 80..table + 83].copy_from_slice(b"7vm");
    std::fs::write(&made.path, file).unwrap();
    qemu::assert_clean(&made.path);
    made
}

#[test]
fn the_state_of_a_virtual_machine_and_unknown_extra_data_stay_with_their_snapshot() {
    let directory = scratch();
    let made = with_vm_state(directory.path());
    let storage = Arc::new(made.file());
    let options = Options { writable: true, keep_erased: 0, ..Options::default() };
    let image = made.open_on(storage.clone(), None, &options).unwrap();
    let info = &image.snapshots().unwrap()[0];
    assert_eq!((info.disk_size, info.vm_state_size), (DISK as u64, (WITH_STATE - DISK) as u64));
    let view = image.open_snapshot(b"vm").unwrap();
    assert!(whole_view(&view) == vec![1; DISK]);
    drop(view);

    image.write(0, &[3; 4096]).unwrap();
    assert_eq!(image.take_snapshot(b"7").unwrap().id, "8", "above all ids");
    image.apply_snapshot(b"vm").unwrap();
    assert!(whole_disk(&image) == vec![1; DISK], "the disk is that of the snapshot");
    image.resize(WITH_STATE as u64).unwrap();
    assert!(whole_disk(&image)[DISK..] == vec![0; WITH_STATE - DISK], "no state shows");
    image.take_snapshot(b"after").unwrap();
    image.close().unwrap();
    judge(&storage, directory.path(), &[("7", "8"), ("after", "9"), ("vm", "7")]);

    // A name goes before an id: 7 is the name of one and the id of another.
    let image = made.open_on(storage.clone(), None, &options).unwrap();
    image.delete_snapshot(b"7").unwrap();
    let entry = storage.contents();
    let table = be64(&entry, 64) as usize;
    assert_eq!(&entry[table + 64..table + 83], b"unknown to us 167vm");
    image.delete_snapshot(b"7").unwrap();
    image.delete_snapshot(b"9").unwrap();
    assert!(image.snapshots().unwrap().is_empty());
    image.close().unwrap();
    judge(&storage, directory.path(), &[]);
}

fn judge(storage: &MemoryStorage, directory: &Path, expected: &[(&str, &str)]) {
    verify_clean(storage).unwrap();
    let path = directory.join("judged.qcow2");
    std::fs::write(&path, storage.contents()).unwrap();
    qemu::assert_clean(&path);
    let info = qemu::run(Command::new("qemu-img").args(["info", "--output=json"]).arg(&path));
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let mut found: Vec<(&str, &str)> = info["snapshots"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|s| (s["name"].as_str().unwrap(), s["id"].as_str().unwrap()))
        .collect();
    found.sort();
    assert_eq!(found, expected);
}
