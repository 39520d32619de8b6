//! `qcow2fs compact` as users run it: on files, through the mount that has them open, and stopped.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::discards::open;
use crate::lab::{
    Lab, PROGRAM, allocated, assert_same, assert_sound, eventually, guest_bytes, length, pattern,
    signal,
};

const MIB: u64 = 1 << 20;

/// An image whose file is long and nearly empty: every eighth cluster of 64 KiB holds data.
pub fn scattered(lab: &Lab, name: &str, mib: u64, options: &str) -> std::path::PathBuf {
    let image = lab.create(name, &format!("{mib}M"), options);
    let raw = lab.path("scattered.raw");
    fs::write(&raw, pattern(mib, (mib * MIB) as usize)).unwrap();
    let discards: String = (0..mib * 16)
        .filter(|cluster| cluster % 8 != 3)
        .map(|cluster| format!("discard {}k 64k\n", cluster * 64))
        .collect();
    let commands = lab.path("scattered.commands");
    fs::write(&commands, format!("write -s {} 0 {mib}M\n{discards}", raw.display())).unwrap();
    sh!("qemu-io -f qcow2 -d unmap {} <{} >/dev/null", image.display(), commands.display());
    image
}

fn assert_short(image: &Path, live: u64) {
    let slack = MIB;
    let (long, large) = (length(image), allocated(image));
    assert!(long <= live + slack && large <= live + slack, "{long}, {large}, {live} live");
}

#[test]
fn a_closed_image_becomes_short_in_place() {
    let lab = Lab::new();
    let image = scattered(&lab, "disk.qcow2", 64, "cluster_size=64k");
    let (before, disk) = (fs::read(&image).unwrap(), guest_bytes(&image));
    let dry = sh!("$qcow2fs compact --dry-run --json {}", image.display());
    let dry: serde_json::Value = serde_json::from_str(&dry).unwrap();
    assert_same(&fs::read(&image).unwrap(), &before, "after a dry run");
    let inode = sh!("stat -c %i {}", image.display());
    let line = sh!("$qcow2fs compact {}", image.display());
    assert!(line.contains("64.3 MiB -> 8."), "{line}");
    assert_eq!(sh!("stat -c %i {}", image.display()), inode, "it was replaced");
    assert_short(&image, 8 * MIB);
    assert_eq!(dry["after"]["length"].as_u64(), Some(length(&image)), "{dry}");
    assert!(dry["moved"].as_u64().is_some_and(|moved| moved > 6 * MIB), "{dry}");
    assert_same(&guest_bytes(&image), &disk, "compacted");
    assert_sound(&image);
    let again = sh!("$qcow2fs compact {}", image.display());
    assert!(again.contains(" 0 B moved"), "{again}");
}

#[test]
fn clusters_of_zeros_are_given_back_where_that_is_asked_for() {
    for options in ["cluster_size=64k", "compat=0.10", "cluster_size=64k,extended_l2=on"] {
        for backed in [false, true] {
            let lab = Lab::new();
            let base = lab.create("base.qcow2", "16M", "");
            sh!("qemu-io -f qcow2 -c 'write -P 7 0 16M' {}", base.display());
            let image = lab.image("disk.qcow2");
            let backing = if backed { "-F qcow2 -b base.qcow2" } else { "" };
            sh!("qemu-img create -q -f qcow2 -o {options} {backing} {} 16M", image.display());
            // Zeros, zeros in part, compressed zeros, and the last cluster.
            sh!(
                "qemu-io -f qcow2 -c 'write -P 9 0 1M' -c 'write -P 0 1M 6M' -c 'write -P 1 4M 4k' \
                 -c 'write -c -P 0 8M 64k' -c 'write -c -P 5 9M 64k' -c 'write -P 0 15M 1M' {}",
                image.display()
            );
            let disk = guest_bytes(&image);
            let counted = sh!("$qcow2fs compact -n --json --detect-zeroes {}", image.display());
            let text = sh!("$qcow2fs compact --json --detect-zeroes {}", image.display());
            let done: serde_json::Value = serde_json::from_str(&text).unwrap();
            let counted: serde_json::Value = serde_json::from_str(&counted).unwrap();
            assert_eq!(done["zeros"], counted["zeros"]);
            assert!(done["zeros"].as_u64().is_some_and(|zeros| zeros >= 7 * MIB - 65536), "{text}");
            let freed = allocated(&image);
            assert!(freed < 2 * MIB, "{options} {backed}: {freed}");
            assert_same(&guest_bytes(&image), &disk, "without its zeros");
            assert_sound(&image);
        }
    }
}

#[test]
fn what_is_zero_on_the_disk_and_not_in_a_snapshot_stays_in_the_snapshot() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "cluster_size=64k");
    sh!(
        "qemu-io -f qcow2 -c 'write -P 0 0 4M' -c 'write -c -P 0 5M 64k' {0}; \
         qemu-img snapshot -c s {0}; qemu-io -f qcow2 -c 'write -P 0 2M 1M' {0}",
        image.display()
    );
    let done = sh!("$qcow2fs compact --json --detect-zeroes {}", image.display());
    assert!(done.contains("\"zeros\":1048576"), "only what the disk alone has: {done}");
    assert_sound(&image);
    sh!("qemu-img convert -l s {} {}", image.display(), lab.path("s.raw").display());
    assert_eq!(fs::read(lab.path("s.raw")).unwrap(), vec![0; 8 << 20]);
}

#[test]
fn a_closed_image_is_laid_out_in_the_order_of_the_disk() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "cluster_size=64k");
    // From its end to its start.
    let writes = (0..128).rev().map(|n| format!("-c 'write -P {n} {}k 64k' ", n * 64));
    sh!("qemu-io -f qcow2 {} {}", writes.collect::<String>(), image.display());
    let disk = guest_bytes(&image);
    let extents = || {
        let map = sh!("qemu-img map --output=json {}", image.display());
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        map.as_array().map_or(0, Vec::len)
    };
    assert!(extents() > 100, "{}", extents());
    sh!("$qcow2fs compact --defrag {}", image.display());
    assert_eq!(extents(), 1);
    assert_sound(&image);
    assert_same(&guest_bytes(&image), &disk, "in another order");
}

#[test]
fn an_image_that_a_mount_has_open_is_compacted_by_it() {
    let lab = Lab::new();
    lab.subdirectory("images/sub");
    let image = scattered(&lab, "sub/disk.qcow2", 64, "cluster_size=64k");
    let disk = guest_bytes(&image);
    for write in [true, false] {
        let mount = lab.mount_with("--compact-after off --runtime-asserts");
        let raw = mount.path("sub/disk.raw");
        let file = File::options().read(true).write(write).open(&raw).unwrap();
        let mut bytes = vec![0; 1 << 16];
        file.read_exact_at(&mut bytes, 3 << 16).unwrap();
        for option in ["--detect-zeroes", "--defrag"] {
            let refused = attempt!("$qcow2fs compact {option} '{}'", image.display());
            assert_eq!(refused.code, Some(1), "{}", refused.text());
            assert!(refused.err.contains(option), "{}", refused.text());
        }
        let line = sh!("$qcow2fs compact '{}'", image.display());
        assert!(line.contains("by the mount at"), "{line}");
        assert_short(&image, 8 * MIB);
        let mut again = vec![0; 1 << 16];
        file.read_exact_at(&mut again, 3 << 16).unwrap();
        assert_same(&again, &bytes, "read through the same file");
        drop(file);
        mount.umount();
        assert_same(&guest_bytes(&image), &disk, "compacted by the mount");
        assert_sound(&image);
        if write {
            fs::remove_file(&image).unwrap();
            scattered(&lab, "sub/disk.qcow2", 64, "cluster_size=64k");
        }
    }
}

#[test]
fn an_image_that_others_use_is_left_alone() {
    let lab = Lab::new();
    let image = scattered(&lab, "disk.qcow2", 16, "cluster_size=64k");
    let start = || {
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["-f", "qcow2", "-c", "sleep 60000"]).arg(&image);
        qemu_io.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let mut other = start();
    let refused = || attempt!("$qcow2fs compact {}", image.display());
    let is_locked = || {
        // Who comes first has it: it ends where that were we.
        if other.try_wait().unwrap().is_some() {
            other = start();
        }
        refused().err.contains("qemu-io")
    };
    eventually(Duration::from_secs(10), is_locked, || refused().text());
    let before = fs::read(&image).unwrap();
    let refusal = refused();
    assert_eq!((refusal.code, refusal.err.lines().count()), (Some(1), 1), "{}", refusal.text());
    other.kill().unwrap();
    other.wait().unwrap();
    assert_same(&fs::read(&image).unwrap(), &before, "refused");
    for (name, content) in [("text.qcow2", "no image"), ("empty.qcow2", "")] {
        fs::write(lab.image(name), content).unwrap();
        let refusal = attempt!("$qcow2fs compact {}", lab.image(name).display());
        assert_eq!(refusal.code, Some(1), "{}", refusal.text());
    }
    let missing = attempt!("$qcow2fs compact {} {0}-missing", image.display());
    assert_eq!(missing.code, Some(1));
    assert!(missing.err.contains("missing") && missing.out.contains("->"), "{}", missing.text());
}

#[test]
fn a_signal_stops_it_in_order() {
    let lab = Lab::new();
    let image = scattered(&lab, "disk.qcow2", 256, "cluster_size=4k");
    let disk = guest_bytes(&image);
    let (mut stopped, mut shrank) = (0, 0);
    for delay in (0..).map(|n| Duration::from_millis(5 + 10 * n)) {
        let mut child =
            Command::new(PROGRAM).arg("compact").arg(&image).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(delay);
        signal(child.id() as i32, if stopped % 2 == 0 { libc::SIGINT } else { libc::SIGTERM });
        match child.wait().unwrap().code() {
            Some(0) => break,
            Some(130 | 143) => {
                stopped += 1;
                sh!("qemu-img check -f qcow2 {}", image.display());
                shrank += i32::from(length(&image) < 250 * MIB);
            }
            // It came before it was looked for.
            None => {}
            other => panic!("exit code {other:?}"),
        }
    }
    assert!(stopped > 1, "it was never stopped ({shrank})");
    assert_short(&image, 32 * MIB);
    assert_same(&guest_bytes(&image), &disk, "stopped {stopped} times");
    assert_sound(&image);
}

#[test]
fn the_control_file_takes_orders_and_refuses_others() {
    let lab = Lab::new();
    let image = scattered(&lab, "disk.qcow2", 32, "cluster_size=64k");
    let mount = lab.mount_with("-o compact_after=off,recycle_rate=1M");
    let control = mount.path(".qcow2fs/control");
    let order = |line: &str| fs::write(&control, line).map_err(|e| e.raw_os_error());
    assert_eq!(order("compact missing.raw"), Err(Some(libc::ENOENT)));
    assert_eq!(order("compact ../disk.raw"), Err(Some(libc::EINVAL)));
    assert_eq!(order("erase disk.raw"), Err(Some(libc::EINVAL)));
    assert!(fs::read(&control).is_err(), "there is nothing to read");
    let file = open(&mount.path("disk.raw"));
    order("compact disk.raw").unwrap();
    let compaction = || mount.status()["images"][0]["compaction"].clone();
    let moves = || compaction()["moved"][0].as_u64() > Some(0);
    eventually(Duration::from_secs(20), moves, || compaction().to_string());
    let status = sh!("$qcow2fs status {}", mount.point().display());
    assert!(status.contains("compacting"), "{status}");
    order("stop disk.raw").unwrap();
    assert!(compaction()["running"] == false && compaction()["asked"] == false);
    std::thread::sleep(Duration::from_millis(100));
    assert!(length(&image) > 30 * MIB, "it went on");
    drop(file);
    mount.umount();
    assert_sound(&image);
}
