//! Damaged images: the same verdict as `qemu-img check`, and repairs that QEMU finds sound.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use qcow2fs::check::{Repair, Report, repair};

use super::common::*;
use super::support::for_seeds;

/// The first findings, for messages.
trait Short {
    fn short(&self) -> &[String];
}

impl Short for Report {
    fn short(&self) -> &[String] {
        &self.findings[..self.findings.len().min(4)]
    }
}

/// The image's metadata, found without the code under test.
struct Map {
    bytes: Vec<u8>,
    cluster: usize,
}

impl Map {
    fn of(path: &Path) -> Map {
        let bytes = std::fs::read(path).unwrap();
        let cluster = 1 << u32::from_be_bytes(bytes[20..24].try_into().unwrap());
        Map { bytes, cluster }
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    fn set(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    /// Offsets of the entries that are not 0 in the table at `table`.
    fn entries(&self, table: usize, count: usize) -> Vec<usize> {
        let all = (0..count).map(|i| table + i * 8);
        all.filter(|&at| at + 8 <= self.bytes.len() && self.u64(at) != 0).collect()
    }

    fn l1(&self) -> Vec<usize> {
        let size = u32::from_be_bytes(self.bytes[36..40].try_into().unwrap());
        self.entries(self.u64(40) as usize, size as usize)
    }

    fn l2(&self) -> Vec<usize> {
        let tables = self.l1().into_iter().map(|at| self.u64(at) as usize & 0x00ff_ffff_ffff_fe00);
        tables.flat_map(|table| self.entries(table, self.cluster / 8)).collect()
    }

    /// QEMU overlooks the zero flag in extended L2 entries, where it is a reserved bit.
    fn clear_overlooked(&mut self) {
        const EXTENDED_L2: u8 = 1 << 4;
        if self.bytes[79] & EXTENDED_L2 == 0 {
            return;
        }
        for at in self.l2().into_iter().filter(|at| at % 16 == 0) {
            let entry = self.u64(at);
            if entry >> 62 & 1 == 0 {
                self.set(at, entry & !1);
            }
        }
    }

    fn refcount_table(&self) -> Vec<usize> {
        self.entries(self.u64(48) as usize, self.cluster / 8)
    }

    fn refcount_block(&self) -> usize {
        self.u64(self.refcount_table()[0]) as usize
    }
}

/// Damages one thing; `kind` says what sort of thing. Returns what was done.
fn damage(map: &mut Map, kind: u64, random: &mut Random) -> String {
    let pick = |entries: Vec<usize>, random: &mut Random| {
        entries[random.below(entries.len() as u64) as usize]
    };
    let (at, value, what) = match kind {
        0 | 1 => {
            let clusters = (map.bytes.len() / map.cluster) as u64;
            let at = map.refcount_block() + 2 * random.below(clusters + 3) as usize;
            let value = if kind == 0 { random.below(4) } else { 0 } as u16;
            map.bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
            return format!("refcount at {at:#x} = {value}");
        }
        2 => (pick(map.l1(), random), 1 << random.below(64), "L1 bit"),
        3 => (pick(map.l2(), random), 1 << random.below(64), "L2 bit"),
        4 => (pick(map.l2(), random), 1 << 63, "L2 COPIED"),
        5 => (pick(map.l1(), random), 1 << 63, "L1 COPIED"),
        6 => (pick(map.refcount_table(), random), 1 << random.below(64), "refcount table bit"),
        7 => {
            let (from, to) = (pick(map.l2(), random), pick(map.l2(), random));
            (to, map.u64(from) ^ map.u64(to), "L2 entry copied")
        }
        8 => {
            let (from, to) = (pick(map.l1(), random), pick(map.l1(), random));
            (to, map.u64(from) ^ map.u64(to), "L1 entry copied")
        }
        9 => {
            let at = pick(map.refcount_table(), random);
            (at, map.u64(at), "refcount block forgotten")
        }
        _ => {
            let at = pick(map.l2(), random);
            (at, map.u64(at), "L2 entry forgotten")
        }
    };
    map.set(at, map.u64(at) ^ value);
    format!("{what} at {at:#x} ^ {value:#x}")
}

const KINDS: u64 = 11;
const SHAPES: u64 = 6;
/// So many damaged images are enough to expect something of their kinds.
const MANY: u32 = 10 * KINDS as u32;

fn base(directory: &Path, shape: u64) -> PathBuf {
    let options = [
        "cluster_size=4k",
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=16k,extended_l2=on",
    ];
    let path = varied(directory, "base.qcow2", options[shape as usize]);
    if shape == 1 || shape == 5 {
        must("qemu-img", &["snapshot", "-c", "one", path.to_str().unwrap()]);
        io(&path, &["write -P 9 0 64k"]);
    }
    if shape >= 3 {
        io(&path, &["write -c -P 9 3M 64k", "write -c -P 8 34M 16k"]);
    }
    path
}

/// Makes damaged images for `seconds`, one of each kind of damage for each seed, and hands each to
/// `judge`. Returns how many it were.
fn each_damage(test: &'static str, seconds: u64, mut judge: impl FnMut(&Path, &str)) -> u32 {
    let directory = directory();
    let mut bases = HashMap::new();
    let mut count = 0;
    for_seeds(test, seconds, |seed| {
        let mut random = Random(seed);
        let shape = seed % SHAPES;
        let (path, sound) = bases.entry(shape).or_insert_with(|| {
            let place = directory.path().join(shape.to_string());
            std::fs::create_dir(&place).unwrap();
            let path = base(&place, shape);
            let sound = std::fs::read(&path).unwrap();
            (path, sound)
        });
        for first in 0..KINDS {
            std::fs::write(&*path, &*sound).unwrap();
            let mut map = Map::of(path);
            let mut what = format!("seed {seed} shape {shape}:");
            for _ in 0..=random.below(2) {
                let kind = if what.ends_with(':') { first } else { random.below(KINDS) };
                // A first damage may leave nothing for the second one to find.
                if map.l1().is_empty() || map.l2().is_empty() || map.refcount_table().is_empty() {
                    break;
                }
                if map.refcount_block() + map.cluster > map.bytes.len() {
                    break;
                }
                what += &format!(" {}", damage(&mut map, kind, &mut random));
            }
            map.clear_overlooked();
            std::fs::write(&*path, &map.bytes).unwrap();
            judge(path, &what);
            count += 1;
        }
    });
    count
}

/// Sound, leaks or corrupt. QEMU gives up on some corrupt images.
fn class(code: i32) -> &'static str {
    match code {
        0 => "sound",
        3 => "leaks",
        1 | 2 => "corrupt",
        _ => "?",
    }
}

#[test]
fn the_verdict_on_damaged_images_is_that_of_qemu() {
    let mut seen = std::collections::BTreeMap::new();
    let all = each_damage("the_verdict_on_damaged_images", 10, |path, what| {
        let ours = our_check(path);
        let (code, json) = qemu_check(path);
        assert_eq!(class(ours.exit_code()), class(code), "{what}: {json} {:?}", ours.short());
        if code == 3 {
            assert_eq!(Some(ours.leaks), json["leaks"].as_u64(), "{what}");
        }
        *seen.entry(class(code)).or_insert(0u32) += 1;
    });
    let often = |class, one_in| seen.get(class).is_some_and(|n| n * one_in > all);
    assert!(all < MANY || often("corrupt", 4) && often("leaks", 40), "{seen:?}");
}

#[test]
fn what_is_repaired_is_sound_to_qemu_and_reads_as_before() {
    let (mut repaired, mut left) = (0, 0);
    let all = each_damage("what_is_repaired", 20, |path, what| {
        let content_before = salvaged(path);
        let bytes_before = std::fs::read(path).unwrap();
        let before = our_check(path);
        let after = repair(&open(path), Repair::All).unwrap();
        let (code, _) = qemu_check(path);
        assert_eq!(class(after.exit_code()), class(code), "{what}: {code} {:?}", after.short());
        assert!(after.corruptions <= before.corruptions, "{what}: {:?}", after.short());
        if after.exit_code() == 0 {
            repaired += u32::from(before.exit_code() != 0);
            let Some(content_after) = salvaged(path) else { panic!("{what}: QEMU opens it") };
            let changed = content_before.and_then(|before| before.first_loss(&content_after));
            assert_eq!(changed, None, "{what}");
        } else {
            left += 1;
            assert!(not_repairable(&after), "{what}: {:?}", after.short());
            let unchanged = after.findings.iter().any(|f| f.contains("nothing was changed"));
            assert!(!unchanged || std::fs::read(path).unwrap() == bytes_before, "{what}");
        }
    });
    let usual = repaired * 6 > all && left * 30 > all;
    assert!(all < MANY || usual, "{repaired} repaired, {left} left of {all}");
}

/// A bit flip made a zero cluster, which kept its host cluster, compressed. Whoever takes away COPIED
/// now takes away what tells that it is not compressed: the image would be called sound, and could
/// be read no more than before.
#[test]
fn a_cluster_that_is_both_compressed_and_copied_stays_what_it_is() {
    let directory = directory();
    let path = base(directory.path(), 3);
    let mut map = Map::of(&path);
    let table = map.u64(map.l1()[0]) as usize & 0x00ff_ffff_ffff_fe00;
    let (zero, unallocated) = (table + 29 * 8, table + 41 * 8);
    assert_eq!((map.u64(zero) >> 62, map.u64(zero) & 1, map.u64(unallocated)), (2, 1, 1));
    map.set(zero, map.u64(zero) ^ 1 << 62);
    map.set(unallocated, map.u64(unallocated) ^ 1 << 53);
    std::fs::write(&path, &map.bytes).unwrap();
    assert_eq!(content(&path), None, "what is no compressed data does not inflate");

    for what in [Repair::Leaks, Repair::All] {
        let after = repair(&open(&path), what).unwrap();
        let (code, _) = qemu_check(&path);
        assert_eq!((after.exit_code(), code), (2, 2), "{:?}", after.short());
        assert!(after.findings[0].contains("not repairable"), "{:?}", after.short());
        assert_eq!(Map::of(&path).u64(zero), map.u64(zero));
    }
    assert_eq!(Map::of(&path).u64(unallocated), 1, "the other damage is repaired");

    // COPIED by mistake, and nothing else that it could be: compressed data starts anywhere.
    let mut map = Map::of(&path);
    map.set(zero, map.u64(zero) ^ 1 << 62);
    let anywhere = |entry: u64| entry >> 62 == 1 && entry & 0xfff > 1;
    let compressed = map.l2().into_iter().find(|&at| anywhere(map.u64(at))).unwrap();
    map.set(compressed, map.u64(compressed) ^ 1 << 63);
    std::fs::write(&path, &map.bytes).unwrap();
    let before = content(&path).unwrap();
    let after = repair(&open(&path), Repair::All).unwrap();
    assert_eq!((after.exit_code(), after.corruptions_fixed), (0, 1), "{:?}", after.short());
    assert_eq!(content(&path).unwrap(), before);
}

/// A bit flip took an entry's offset away: what it led to looks leaked. It is all that is left of the
/// data, so no repair gives it to the host.
#[test]
fn what_an_entry_with_no_more_than_a_flag_led_to_is_not_freed() {
    for level in ["L1", "L2"] {
        let directory = directory();
        let path = base(directory.path(), 0);
        let mut map = Map::of(&path);
        let entry = if level == "L1" { map.l1()[0] } else { map.l2()[0] };
        assert_eq!(map.u64(entry) >> 62, 2, "{level}");
        map.set(entry, 1 << 63);
        std::fs::write(&path, &map.bytes).unwrap();
        for what in [Repair::Leaks, Repair::All] {
            let after = repair(&open(&path), what).unwrap();
            assert!(after.leaks > 0 && not_repairable(&after), "{level}: {:?}", after.short());
            assert_eq!(class(after.exit_code()), class(qemu_check(&path).0), "{level}");
            assert!(std::fs::read(&path).unwrap() == map.bytes, "{level}: {what:?} wrote");
        }
    }
}

/// What is left is said to be beyond repair, or sits in a table entry.
fn not_repairable(report: &Report) -> bool {
    let reasons = ["not repairable", "reserved bits", "subclusters"];
    report.findings.iter().any(|f| reasons.iter().any(|reason| f.contains(reason)))
}

#[test]
fn repairing_leaks_touches_nothing_else() {
    let mut repaired = 0;
    let all = each_damage("repairing_leaks", 10, |path, what| {
        let content_before = content(path);
        let before = our_check(path);
        let after = repair(&open(path), Repair::Leaks).unwrap();
        assert!(after.corruptions <= before.corruptions, "{what}: {:?}", after.short());
        assert!(after.leaks == 0 || not_repairable(&after), "{what}: {:?}", after.short());
        assert_eq!(class(after.exit_code()), class(qemu_check(path).0), "{what}");
        if let Some(content_before) = content_before {
            assert_eq!(content(path), Some(content_before), "{what}");
        }
        repaired += after.leaks_fixed;
    });
    assert!(all < MANY || repaired > 2, "{repaired}");
}

#[test]
fn a_dirty_image_is_rebuilt_and_loses_nothing() {
    let directory = directory();
    for options in ["cluster_size=64k", "cluster_size=512", "refcount_bits=1", "refcount_bits=64"] {
        let path = directory.path().join("dirty.qcow2");
        create(&path, &format!("lazy_refcounts=on,{options}"), "64M");
        let name = path.to_str().unwrap();
        let writes = ["-c", "write -P 1 0 200k", "-c", "write -P 2 40M 2M", "-c", "flush"];
        // QEMU killed: the dirty bit stays, the refcounts do not know what was written.
        let killed = [&["-f", "qcow2"], &writes[..], &["-c", "sigraise 9", name]].concat();
        assert!(!run("qemu-io", &killed).status.success());
        let theirs = qemu_check(&path);
        assert_eq!(theirs.0, 2, "{options}: the image must be broken before");
        assert_same_verdict(options, &our_check(&path), &theirs);
        let before = content(&path).unwrap();

        let after = repair(&open(&path), Repair::All).unwrap();
        assert_eq!((after.exit_code(), after.corruptions), (0, 0), "{:?}", after.short());
        assert!(after.corruptions_fixed > 0);
        assert_same_verdict(options, &after, &qemu_check(&path));
        assert_eq!(content(&path).unwrap(), before, "{options}");
        let info = must("qemu-img", &["info", "--output=json", name]);
        assert!(!info.contains("\"dirty-flag\": true"), "{info}");
    }
}
