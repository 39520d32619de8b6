//! Persistent bitmaps: an incremental backup that QEMU makes after the disk was changed on a mount
//! has all that was changed, and nothing else.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::discards::{fallocate, open};
use crate::lab::{Lab, assert_same, assert_sound, guest_bytes, pattern};

const GRANULE: usize = 64 << 10;

/// A qemu-storage-daemon that is told what to do on its standard input.
struct Daemon(Child);

impl Daemon {
    fn start() -> Self {
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"]);
        Daemon(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap())
    }

    /// Sends `commands`, then waits for a line that has `word` in it.
    fn tell(&mut self, commands: &[String], word: &str) {
        let stdin = self.0.stdin.as_mut().unwrap();
        commands.iter().for_each(|command| writeln!(stdin, "{command}").unwrap());
        let mut said = String::new();
        let mut stdout = BufReader::new(self.0.stdout.as_mut().unwrap());
        while !said.contains(word) {
            let length = stdout.read_line(&mut said).unwrap();
            assert!(length > 0 && !said.contains("\"error\""), "{word}: {said}");
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Ending its standard input does not end it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Copies what bitmap `b` of `image` has as dirty to `target`, and clears the bitmap.
fn back_up(image: &Path, target: &Path) {
    let add = |node: &str, path: &Path| {
        let file = format!(r#"{{"driver": "file", "filename": "{}"}}"#, path.display());
        let node = format!(r#""driver": "qcow2", "node-name": "{node}", "file": {file}"#);
        format!(r#"{{"execute": "blockdev-add", "arguments": {{{node}}}}}"#)
    };
    let mut daemon = Daemon::start();
    let backup = r#"{"execute": "blockdev-backup", "arguments": {"job-id": "backup",
        "device": "disk", "target": "target", "sync": "incremental", "bitmap": "b"}}"#;
    let commands = [
        r#"{"execute": "qmp_capabilities"}"#.into(),
        add("disk", image),
        add("target", target),
        backup.replace('\n', " "),
    ];
    daemon.tell(&commands, "BLOCK_JOB_COMPLETED");
    daemon.tell(&[r#"{"execute": "quit"}"#.into()], "return");
    assert!(daemon.0.wait().unwrap().success());
}

#[test]
fn incremental_backups_by_qemu_have_what_was_changed_on_the_mount() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "32M", "");
    sh!("qemu-io -f qcow2 -c 'write -P 0x11 0 16M' {}", image.display());
    let mut last = lab.path("full.qcow2");
    sh!("qemu-img convert -O qcow2 {} {}", image.display(), last.display());
    sh!("qemu-img bitmap --add -g {GRANULE} {} b", image.display());
    for round in 0..3_usize {
        let mount = lab.mount();
        let file = open(&mount.path("disk.raw"));
        let at = |granule: usize| granule * GRANULE;
        file.write_all_at(&pattern(round as u64, 3 * GRANULE), at(10 + round) as u64).unwrap();
        file.write_all_at(&pattern(7, GRANULE), at(400 + 5 * round) as u64).unwrap();
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, punch, at(50 + 20 * round), 10 * GRANULE).unwrap();
        let zero = libc::FALLOC_FL_ZERO_RANGE;
        fallocate(&file, zero, at(150 + 20 * round), 5 * GRANULE).unwrap();
        drop(file);
        mount.umount();
        assert_sound(&image);
        let next = lab.path(&format!("inc{round}.qcow2"));
        sh!("qemu-img create -q -f qcow2 -b {} -F qcow2 {}", last.display(), next.display());
        back_up(&image, &next);
        assert_same(&guest_bytes(&next), &guest_bytes(&image), "the backup");
        // Three and one granules written, ten punched, five zeroed; and the file's own metadata.
        let map = sh!("qemu-img map --output=json {}", next.display());
        let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
        let copied: u64 = map
            .iter()
            .filter(|extent| extent["depth"] == 0)
            .map(|extent| extent["length"].as_u64().unwrap())
            .sum();
        assert_eq!(copied, 19 * GRANULE as u64, "round {round}: {map:?}");
        last = next;
    }
}

#[test]
fn resized_disks_keep_their_bitmaps() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "8M", "");
    sh!("qemu-img bitmap --add -g {GRANULE} {} b", image.display());
    sh!("qemu-img bitmap --add --disable {} off", image.display());
    for size in ["3G", "1M", "40M"] {
        let mount = lab.mount();
        sh!("truncate -s {size} {}", mount.path("disk.raw").display());
        mount.umount();
        assert_sound(&image);
        // QEMU would refuse to open it, were one of them not of the size of the disk.
        let info = sh!("qemu-img info {}", image.display());
        assert!(info.contains("auto") && !info.contains("in-use"), "{info}");
    }
}
