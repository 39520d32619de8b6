//! The command: exit codes.

use qcow2fs::check::Repair;
use qcow2fs::cli::check::{Args, run};

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
    // COPIED of that cluster is wrong then, too, unless it is no data: the L1 table is none.
    std::fs::write(&leaky, &bytes).unwrap();
    bytes[block + 21] = 0;
    let corrupt = directory.path().join("corrupt.qcow2");
    std::fs::write(&corrupt, &bytes).unwrap();
    let missing = directory.path().join("missing.qcow2");
    let fifo = directory.path().join("fifo");
    must("mkfifo", &[fifo.to_str().unwrap()]);

    let code = |images: &[&std::path::PathBuf], repair| {
        let images = images.iter().map(|path| path.to_path_buf()).collect();
        run(&Args { repair, json: true, images })
    };
    for image in [&sound, &leaky, &corrupt] {
        assert_eq!(code(&[image], None), qemu_check(image).0, "{}", image.display());
    }
    assert_eq!(run_qemu_probing(&text), code(&[&text], None));
    assert_eq!(code(&[&text], None), 63);
    assert_eq!(code(&[&missing], None), 1);
    assert_eq!(code(&[&fifo], None), 1);
    assert_eq!(code(&[&sound, &corrupt, &leaky], None), 2);
    assert_eq!(code(&[&missing, &corrupt, &text], None), 1);
    assert_eq!(code(&[&sound, &leaky, &corrupt], Some(Repair::All)), 0);
    for image in [&sound, &leaky, &corrupt] {
        assert_eq!(qemu_check(image).0, 0, "{}", image.display());
    }
}

fn run_qemu_probing(path: &std::path::Path) -> i32 {
    qemu_check_with(&[path.to_str().unwrap()]).0
}
