//! A few of the combinations that `tests/matrix.rs` tries, through the kernel.

use std::os::unix::fs::FileExt;

use crate::discards::{open, read_all};
use crate::lab::{Lab, assert_same, assert_sound, guest_bytes, pattern};

const MIB: usize = 1 << 20;

/// What images are made with: options, and the format of what they are made on.
const COMBINATIONS: [(&str, &str); 8] = [
    ("compat=0.10,cluster_size=512", ""),
    ("compat=0.10,cluster_size=64k", "qcow2"),
    ("compat=1.1,cluster_size=512,refcount_bits=64", "raw"),
    ("compat=1.1,cluster_size=4k,refcount_bits=1,compression_type=zstd", ""),
    ("compat=1.1,cluster_size=2M,refcount_bits=1", "qcow2"),
    ("compat=1.1,cluster_size=64k,refcount_bits=16,compression_type=zstd", "qcow2"),
    ("compat=1.1,cluster_size=4k,refcount_bits=64,data_file=DATA", "qcow2"),
    ("compat=1.1,cluster_size=64k,refcount_bits=1,data_file=DATA,data_file_raw=on", ""),
];

#[test]
fn combinations_are_read_and_written_side_by_side() {
    let lab = Lab::new();
    let (raw, qcow2) = (lab.image("base.img"), lab.image("base.qcow2"));
    std::fs::write(&raw, pattern(1, 3 * MIB + 512)).unwrap();
    sh!(
        "qemu-img create -q -f qcow2 -o cluster_size=32k -b {raw} -F raw {qcow2} 5M
         qemu-io -f qcow2 -c 'write -P 7 100k 1M' -c 'write -z 2M 300k' {qcow2}",
        raw = raw.display(),
        qcow2 = qcow2.display()
    );
    let images: Vec<_> = (0..)
        .zip(COMBINATIONS)
        .map(|(n, (options, below))| {
            let data = lab.image(&format!("disk{n}.data"));
            let options = options.replace("DATA", data.to_str().unwrap());
            let name = format!("disk{n}.qcow2");
            let image = lab.image(&name);
            let below = match below {
                "" => String::new(),
                "raw" => format!("-F raw -b {}", raw.display()),
                _ => format!("-F qcow2 -b {}", qcow2.display()),
            };
            let image_path = image.display();
            sh!("qemu-img create -q -f qcow2 -o {options} {below} {image_path} 4M");
            sh!("qemu-io -f qcow2 -c 'write -P {} 1M 150k' {image_path}", n + 1);
            if data.exists() {
                sh!("qemu-io -f qcow2 -c 'write -z 1100k 10k' {image_path}");
            } else {
                sh!("qemu-io -f qcow2 -c 'write -c -P 99 2M 2M' {image_path}");
            }
            (image.clone(), guest_bytes(&image))
        })
        .collect();
    let mount = lab.mount();
    let expected: Vec<_> = (0..)
        .zip(&images)
        .map(|(n, (image, before))| {
            let raw = mount.path(&format!("disk{n}.raw"));
            let mut expected = before.clone();
            assert_same(&read_all(&raw), &expected, &format!("{}", image.display()));
            let file = open(&raw);
            let written = pattern(n + 5, 700_001);
            file.write_all_at(&written, 900_001).unwrap();
            expected[900_001..1_600_002].copy_from_slice(&written);
            sh!("fallocate -p -o 1200k -l 1500001 {}", raw.display());
            expected[1200 << 10..(1200 << 10) + 1_500_001].fill(0);
            file.sync_all().unwrap();
            drop(file);
            assert_same(&read_all(&raw), &expected, &format!("{} written", image.display()));
            expected
        })
        .collect();
    mount.umount();
    for ((image, _), expected) in images.iter().zip(&expected) {
        assert_same(&guest_bytes(image), expected, &format!("{} through qemu", image.display()));
        assert_sound(image);
    }
    assert_same(
        &std::fs::read(lab.image("disk7.data")).unwrap(),
        &expected[7],
        "the raw data file",
    );
}
