//! The command: exit codes.

use std::path::PathBuf;

use super::common::*;

#[test]
fn exit_codes_are_those_of_qemu_and_the_worst_image_counts() {
    let directory = directory();
    let sound = varied(directory.path(), "sound.qcow2", "cluster_size=4k");
    let mut bytes = std::fs::read(&sound).unwrap();
    let text = directory.path().join("text");
    std::fs::write(&text, "no image\n").unwrap();
    let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap()) as usize;
    bytes[block + 21] += 1;
    let leaky = directory.path().join("leaky.qcow2");
    std::fs::write(&leaky, &bytes).unwrap();
    bytes[block + 21] = 0;
    let corrupt = directory.path().join("corrupt.qcow2");
    std::fs::write(&corrupt, &bytes).unwrap();
    let missing = directory.path().join("missing.qcow2");
    let fifo = directory.path().join("fifo");
    must("mkfifo", &[fifo.to_str().unwrap()]);

    let code = |images: &[&PathBuf], options: &[&str]| {
        let images = images.iter().map(|path| path.to_str().unwrap());
        let args: Vec<&str> =
            ["check"].into_iter().chain(options.iter().copied()).chain(images).collect();
        run(env!("CARGO_BIN_EXE_qcow2fs"), &args).status.code().unwrap()
    };
    for image in [&sound, &leaky, &corrupt] {
        assert_eq!(code(&[image], &[]), qemu_check(image).0, "{}", image.display());
    }
    assert_eq!(run_qemu_probing(&text), code(&[&text], &[]));
    assert_eq!(code(&[&text], &[]), 63);
    assert_eq!(code(&[&missing], &[]), 1);
    assert_eq!(code(&[&fifo], &[]), 1);
    assert_eq!(code(&[&sound, &corrupt, &leaky], &[]), 2);
    assert_eq!(code(&[&missing, &corrupt, &text], &[]), 1);
    assert_eq!(code(&[&sound, &leaky, &corrupt], &["--repair", "all"]), 0);
    for image in [&sound, &leaky, &corrupt] {
        assert_eq!(qemu_check(image).0, 0, "{}", image.display());
    }
}

fn run_qemu_probing(path: &std::path::Path) -> i32 {
    qemu_check_with(&[path.to_str().unwrap()]).0
}

#[test]
fn json_has_the_names_of_qemu() {
    let directory = directory();
    let path = varied(directory.path(), "i.qcow2", "cluster_size=4k");
    let name = path.to_str().unwrap();
    let ours = must(env!("CARGO_BIN_EXE_qcow2fs"), &["check", "--json", name]);
    let ours: serde_json::Value = serde_json::from_str(&ours).unwrap();
    let (_, theirs) = qemu_check(&path);
    for (key, value) in theirs.as_object().unwrap() {
        // Of the check's own errors there are none here: then it exits with 1 and gives no JSON.
        if key != "check-errors" {
            assert_eq!(&ours[key], value, "{key}");
        }
    }
}

#[test]
fn an_image_that_qemu_writes_to_is_not_repaired() {
    let directory = directory();
    let path = varied(directory.path(), "i.qcow2", "cluster_size=4k");
    let mut holder = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", path.to_str().unwrap()])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let repair = || {
        let args = ["check", "--repair", "all", path.to_str().unwrap()];
        run(env!("CARGO_BIN_EXE_qcow2fs"), &args)
    };
    // Until QEMU has opened the image, and at most ten seconds.
    let refused = (0..100).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(100));
        repair().status.code() == Some(1)
    });
    drop(holder.stdin.take());
    holder.wait().unwrap();
    assert!(refused);
    assert_eq!(repair().status.code(), Some(0));
}
