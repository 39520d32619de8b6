//! What the process that serves a mount has given up, as the kernel tells it; that `status` says the same;
//! that each layer can be left out; and that what a mount is used for still works.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use crate::discards::read_all;
use crate::lab::{Lab, Mount, alive, assert_sound, eventually, is_mounted, signal};

const LAYERS: [&str; 4] = ["capabilities", "no_new_privs", "landlock", "seccomp"];

/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID: what other users' images need.
const KEPT: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4;

/// What `status` says of each layer.
fn said(mount: &Mount) -> [String; 4] {
    let status = mount.status();
    LAYERS.map(|layer| status["confined"][layer].as_str().expect("a state").to_owned())
}

/// A field of every thread's `/proc/PID/task/TID/status`.
fn of_threads(pid: i32, field: &str) -> Vec<u64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    // A thread may be gone by now.
    let texts = threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok());
    let value = |text: String| {
        let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap().to_owned();
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    texts.map(value).collect()
}

/// Every thread is as `status` says.
fn assert_as_said(mount: &Mount) {
    let [capabilities, no_new_privs, _, seccomp] = said(mount);
    let all = |field: &str, holds: &dyn Fn(u64) -> bool| {
        let found = of_threads(mount.pid(), field);
        assert!(found.len() > 3, "{found:?}");
        assert!(found.iter().all(|value| holds(*value)), "{field} {found:x?}");
    };
    let is_on = |state: &str| state == "on";
    all("CapEff:", &|set| (set & !KEPT == 0) == is_on(&capabilities));
    all("CapBnd:", &|set| (set & !KEPT == 0) == is_on(&capabilities));
    all("NoNewPrivs:", &|set| (set == 1) == is_on(&no_new_privs));
    all("Seccomp:", &|mode| (mode == 2) == is_on(&seccomp));
}

/// Everything that is done to a mount, in short.
fn use_it(lab: &Lab, mount: &Mount) {
    let raw = mount.path("disk.raw");
    sh!("dd if=/dev/urandom of={} bs=1M count=3 conv=notrunc,fsync", raw.display());
    sh!("fallocate -p -o 1M -l 1M {}", raw.display());
    sh!("touch {}", mount.path(".snap/disk.raw/first").display());
    // An image that comes later.
    lab.create("later.qcow2", "1M", "");
    assert_eq!(read_all(&mount.path("later.raw")), vec![0; 1 << 20]);
    sh!("chmod 640 {0}; chown 7:8 {0}; touch -d @7 {0}", mount.path("later.raw").display());
}

#[test]
fn every_thread_has_given_up_what_status_says() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let mount = lab.mount();
    use_it(&lab, &mount);
    assert_as_said(&mount);
    for (layer, state) in LAYERS.iter().zip(said(&mount)) {
        // Every kernel has the first two; what it lacks otherwise is said.
        println!("{layer}: {state}");
        assert!(state == "on" || !["capabilities", "no_new_privs"].contains(layer), "{state}");
        assert!(state == "on" || state.starts_with("not available"), "{layer}: {state}");
    }
    mount.umount();
    assert_sound(&image);
}

#[test]
fn each_layer_can_be_left_out() {
    for left_out in LAYERS {
        let lab = Lab::new();
        let image = lab.create("disk.qcow2", "8M", "");
        let mount = lab.mount_with(&format!("--unconfined {left_out}"));
        use_it(&lab, &mount);
        assert_as_said(&mount);
        for (layer, state) in LAYERS.iter().zip(said(&mount)) {
            let off = state == "switched off";
            assert_eq!(off, *layer == left_out, "{layer} without {left_out}: {state}");
        }
        let page = sh!("$qcow2fs status {}", lab.point().display());
        assert!(page.contains("not confined by "), "{page}");
        assert!(page.contains(&format!("{left_out} (switched off)")), "{page}");
        mount.umount();
        assert_sound(&image);
    }
    let refused = attempt!("$qcow2fs mount --unconfined some /tmp /mnt");
    assert!(!refused.ok() && refused.text().contains("landlock, seccomp"), "{}", refused.text());
}

#[test]
fn everything_can_be_kept() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let mount = lab.mount_with("-o unconfined=all");
    use_it(&lab, &mount);
    assert!(mount.status()["confined"].is_null());
    let page = sh!("$qcow2fs status {}", lab.point().display());
    assert!(page.contains("not confined\n"), "{page}");
    let of_this = |field: &str| of_threads(std::process::id().cast_signed(), field)[0];
    for field in ["CapEff:", "CapBnd:", "NoNewPrivs:", "Seccomp:"] {
        let found = of_threads(mount.pid(), field);
        assert!(found.iter().all(|value| *value == of_this(field)), "{field} {found:x?}");
    }
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", mount.pid()));
    assert_eq!(children.unwrap().trim(), "", "a helper was started");
    mount.umount();
    assert_sound(&image);
}

#[test]
fn the_helper_ends_with_the_process_that_it_helps() {
    for signals in [[libc::SIGTERM].as_slice(), &[libc::SIGKILL]] {
        let lab = Lab::new();
        lab.create("disk.qcow2", "8M", "");
        let mount = lab.mount();
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", mount.pid()));
        let helper: i32 = children.unwrap().trim().parse().expect("one helper");
        let open = fs::read_dir(format!("/proc/{helper}/fd")).unwrap().flatten();
        let targets: Vec<_> = open.filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
        let is_harmless = |target: &std::path::PathBuf| {
            let target = target.to_string_lossy();
            target == "/dev/null" || target.starts_with("socket:")
        };
        assert!(targets.iter().all(is_harmless), "{targets:?}");
        // Signals to a whole group do not reach it: who is asked to unmount needs it.
        [libc::SIGTERM, libc::SIGINT, libc::SIGHUP]
            .iter()
            .for_each(|number| signal(helper, *number));
        signals.iter().for_each(|number| signal(mount.pid(), *number));
        let ended = || !alive(mount.pid()) && !alive(helper);
        eventually(Duration::from_secs(20), ended, || format!("{helper} lives"));
        assert_eq!(is_mounted(&lab.point()), signals == [libc::SIGKILL]);
        attempt!("umount -l {}", lab.point().display());
    }
}

/// In a mount namespace of its own, where `/dev` has little but the socket of syslog(3): mounts, changes
/// something, unmounts.
const WITH_SYSLOG: &str = r#"
    for node in null fuse; do
        touch $lab/dev/$node
        mount --bind /dev/$node $lab/dev/$node
    done
    mkdir $lab/dev/shm
    mount --rbind /dev/shm $lab/dev/shm
    mount --rbind $lab/dev /dev
    $qcow2fs mount -v $lab/images $lab/mnt
    trap "umount -l $lab/mnt 2>/dev/null || true" EXIT
    chmod 640 $lab/mnt/disk.raw
    $qcow2fs umount $lab/mnt
"#;

#[test]
fn what_happens_after_the_confinement_reaches_syslog() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    let socket = UnixDatagram::bind(lab.subdirectory("dev").join("log")).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let reader = std::thread::spawn(move || {
        let (mut told, mut line) = (String::new(), [0; 4096]);
        while !told.contains("is no longer served") {
            let Ok(length) = socket.recv(&mut line) else { break };
            told += &format!("{}\n", String::from_utf8_lossy(&line[..length]));
        }
        told
    });
    let script = lab.path("script");
    fs::write(&script, format!("lab={}\n{WITH_SYSLOG}", lab.path("").display())).unwrap();
    sh!("timeout 60 unshare -m --propagation private bash -euo pipefail {}", script.display());
    let told = reader.join().unwrap();
    let ends: Vec<_> = told.lines().filter(|line| line.contains("no longer served")).collect();
    assert!(ends.len() == 1 && ends[0].contains("qcow2fs["), "{told}");
    assert!(told.contains("is mounted at"), "{told}");
    assert_sound(&image);
}

/// What a user does who is not root, in a mount namespace of their own where `/dev/fuse` is for everybody,
/// as most distributions have it: mounts, writes, prints the status and that of the daemon's threads,
/// unmounts.
const ROOTLESS: &str = r#"
    mknod -m 666 $lab/fuse c 10 229
    mount --bind $lab/fuse /dev/fuse
    cd $lab
    cp $qcow2fs program
    user="setpriv --reuid=65534 --regid=65534 --clear-groups"
    $user ./program create images/disk.qcow2 8M
    $user ./program mount images mnt
    trap "umount -l mnt 2>/dev/null || true" EXIT
    $user dd if=/dev/urandom of=written bs=1M count=2 status=none
    $user dd if=written of=mnt/disk.raw bs=1M conv=notrunc,fsync status=none
    $user cmp -n 2M written mnt/disk.raw
    ls mnt 2>/dev/null && exit 3
    $user ./program status --json mnt >status
    pid=$(grep -oP '"pid": *\K[0-9]+' status)
    cat /proc/$pid/task/*/status | grep -E '^(Uid|CapEff|NoNewPrivs|Seccomp):' | sort | uniq -c
    $user ./program umount mnt
    mountpoint -q mnt && exit 4
    exit 0
"#;

#[test]
fn without_root_all_layers_hold_as_well() {
    let lab = Lab::new();
    let home = lab.path("");
    sh!("chown -R 65534:65534 {}", home.display());
    let script = lab.path("script");
    fs::write(&script, format!("lab={}\n{ROOTLESS}", home.display())).unwrap();
    let found =
        sh!("timeout 60 unshare -m --propagation private bash -euo pipefail {}", script.display());
    let status = fs::read_to_string(lab.path("status")).unwrap();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    for layer in LAYERS {
        let state = status["confined"][layer].as_str().expect("a state");
        assert!(state == "on" || state.starts_with("not available"), "{layer}: {state}");
    }
    assert!(!alive(status["pid"].as_i64().expect("a pid") as i32), "the daemon outlives its mount");
    // All threads are the same.
    let lines: Vec<Vec<&str>> =
        found.lines().map(|line| line.split_whitespace().collect()).collect();
    let values: Vec<_> = lines.iter().map(|line| (line[1], line[2])).collect();
    assert_eq!(
        values,
        [
            ("CapEff:", "0000000000000000"),
            ("NoNewPrivs:", "1"),
            ("Seccomp:", "2"),
            ("Uid:", "65534")
        ]
    );
    let threads: u32 = lines[0][0].parse().unwrap();
    assert!(threads > 3, "{found}");
    assert_sound(&lab.image("disk.qcow2"));
}
