//! Sound images of every shape that QEMU makes: the same numbers as `qemu-img check`.

use super::common::*;

fn same(path: &std::path::Path, what: &str) {
    let theirs = qemu_check(path);
    assert_eq!(theirs.0, 0, "{what}: QEMU must call it sound: {}", theirs.1);
    assert_same_verdict(what, &our_check(path), &theirs);
}

#[test]
fn every_version_cluster_size_and_refcount_width() {
    let directory = directory();
    for size in ["512", "4k", "64k", "2M"] {
        for width in ["1", "2", "4", "8", "16", "32", "64"] {
            let options = format!("compat=1.1,cluster_size={size},refcount_bits={width}");
            same(&varied(directory.path(), "v3.qcow2", &options), &options);
        }
        let options = format!("compat=0.10,cluster_size={size}");
        same(&varied(directory.path(), "v2.qcow2", &options), &options);
    }
}

#[test]
fn snapshots_share_clusters() {
    let directory = directory();
    let extended = "extended_l2=on,cluster_size=16k";
    for options in ["compat=1.1", "compat=0.10", "cluster_size=512", "refcount_bits=2", extended] {
        let path = varied(directory.path(), "s.qcow2", options);
        let name = path.to_str().unwrap();
        must("qemu-img", &["snapshot", "-c", "first", name]);
        io(&path, &["write -P 7 0 64k", "discard 1M 64k"]);
        must("qemu-img", &["snapshot", "-c", "second", name]);
        io(&path, &["write -P 8 40M 64k", "write -P 9 30k 3k"]);
        same(&path, options);
        must("qemu-img", &["snapshot", "-d", "first", name]);
        same(&path, options);
    }
}

#[test]
fn compressed_clusters_count_every_host_cluster_that_they_touch() {
    let directory = directory();
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=4k",
        "compression_type=zstd",
        "cluster_size=2M,compression_type=zstd",
        "extended_l2=on",
    ] {
        let path = directory.path().join("c.qcow2");
        create(&path, options, "64M");
        let writes: Vec<_> = (0..12).map(|i| format!("write -c -P {i} {}M 2M", i * 4)).collect();
        io(&path, &writes.iter().map(String::as_str).collect::<Vec<_>>());
        io(&path, &["write -P 99 5M 64k", "write -P 98 9M 1k"]);
        assert_ne!(our_check(&path).compressed_clusters, 0);
        same(&path, options);
    }
}

#[test]
fn bitmaps_extended_l2_backing_and_preallocation() {
    let directory = directory();
    let path = varied(directory.path(), "b.qcow2", "cluster_size=4k");
    for name in ["one", "two"] {
        must("qemu-img", &["bitmap", "--add", "-g", "4k", path.to_str().unwrap(), name]);
    }
    io(&path, &["write -P 5 2M 1M"]);
    same(&path, "bitmaps");

    same(&varied(directory.path(), "e.qcow2", "extended_l2=on"), "extended L2");
    same(&varied(directory.path(), "e.qcow2", "extended_l2=on,cluster_size=16k"), "extended L2");

    for kind in ["metadata", "falloc", "full"] {
        let options = format!("extended_l2=on,cluster_size=16k,preallocation={kind}");
        same(&varied(directory.path(), "e.qcow2", &options), &options);
    }

    let overlay = directory.path().join("o.qcow2");
    let base = path.to_str().unwrap();
    let overlay_name = overlay.to_str().unwrap();
    must("qemu-img", &["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay_name]);
    io(&overlay, &["write -P 5 2M 1M", "write -z 0 1M", "discard 33M 1M"]);
    same(&overlay, "backing file");

    for kind in ["metadata", "falloc", "full"] {
        let options = format!("preallocation={kind},cluster_size=4k");
        same(&varied(directory.path(), "p.qcow2", &options), kind);
    }
}

#[test]
fn external_data_files_are_not_counted() {
    let directory = directory();
    for raw in ["on", "off"] {
        let data = directory.path().join("data.raw");
        let options = format!("data_file={},data_file_raw={raw}", data.display());
        let path = varied(directory.path(), "d.qcow2", &options);
        assert_ne!(our_check(&path).allocated_clusters, 0);
        same(&path, &options);
        std::fs::remove_file(data).unwrap();
    }
}

#[test]
fn the_luks_header_is_counted_and_needs_no_key() {
    let directory = directory();
    let path = directory.path().join("l.qcow2");
    let secret = "secret,id=s,data=abc";
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let name = path.to_str().unwrap();
    must(
        "qemu-img",
        &["create", "-q", "--object", secret, "-f", "qcow2", "-o", options, name, "64M"],
    );
    let image = format!("driver=qcow2,file.filename={name},encrypt.key-secret=s");
    must("qemu-io", &["--object", secret, "--image-opts", &image, "-c", "write 0 1M"]);
    let theirs = qemu_check_with(&["--object", secret, "--image-opts", &image]);
    assert_eq!(theirs.0, 0);
    assert_same_verdict("LUKS", &our_check(&path), &theirs);
}
