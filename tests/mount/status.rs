//! What a mount tells of itself: `status`, `.qcow2fs/metrics`, `qcow2fs watch`.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::lab::{Lab, Mount, eventually, pattern};

/// The samples of a page of metrics by name and labels, after a strict look at its form.
fn metrics(text: &str) -> BTreeMap<String, f64> {
    assert!(text.ends_with('\n') && !text.contains("\n\n"), "{text}");
    let mut samples = BTreeMap::new();
    let mut families: HashSet<&str> = HashSet::new();
    let (mut family, mut kind) = ("", "");
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, words) = help.split_once(' ').unwrap();
            assert!(is_name(name) && !words.is_empty() && families.insert(name), "{line}");
            let (typed, is) =
                lines.next().unwrap().strip_prefix("# TYPE ").unwrap().split_once(' ').unwrap();
            assert!(typed == name && ["counter", "gauge", "histogram"].contains(&is), "{line}");
            assert_eq!(is == "counter", name.ends_with("_total"), "{line}");
            (family, kind) = (name, is);
            continue;
        }
        let (key, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = key.split_once('{').unwrap_or((key, "}"));
        let suffix = name.strip_prefix(family).unwrap_or_else(|| panic!("{line} after {family}"));
        let suffixes: &[&str] =
            if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
        assert!(suffixes.contains(&suffix), "{line}");
        check_labels(labels.strip_suffix('}').unwrap());
        let value: f64 = value.parse().unwrap_or_else(|e| panic!("{line}: {e}"));
        assert!(value.is_finite() && value >= 0.0, "{line}");
        assert!(samples.insert(key.to_owned(), value).is_none(), "{line} stands there twice");
    }
    check_histograms(text, &samples);
    samples
}

fn is_name(name: &str) -> bool {
    !name.starts_with(|c: char| c.is_ascii_digit())
        && !name.is_empty()
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn check_labels(mut labels: &str) {
    while !labels.is_empty() {
        let (name, rest) = labels.split_once("=\"").unwrap_or_else(|| panic!("{labels}"));
        assert!(is_name(name), "{labels}");
        let mut end = None;
        let mut chars = rest.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '\\' => assert!(matches!(chars.next(), Some((_, '\\' | '"' | 'n'))), "{labels}"),
                '"' => {
                    end = Some(at);
                    break;
                }
                _ => {}
            }
        }
        let rest = &rest[end.unwrap_or_else(|| panic!("{labels}")) + 1..];
        labels = rest.strip_prefix(',').unwrap_or(rest);
    }
}

/// Buckets grow with their bounds, and the last one has all.
fn check_histograms(text: &str, samples: &BTreeMap<String, f64>) {
    let mut last: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    for line in text.lines().filter(|line| line.contains("_bucket{")) {
        let (key, value) = line.rsplit_once(' ').unwrap();
        let (rest, bound) = key.split_once(",le=\"").unwrap();
        let (bound, value) = (bound.strip_suffix("\"}").unwrap(), value.parse::<f64>().unwrap());
        let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse().unwrap() };
        let before = last.insert(rest.to_owned(), (bound, value)).unwrap_or((0.0, 0.0));
        assert!(before.0 < bound && before.1 <= value, "{line}");
    }
    for (rest, (bound, value)) in last {
        let of = |suffix| samples[&(rest.replace("_bucket{", suffix) + "}")];
        assert_eq!((bound, value), (f64::INFINITY, of("_count{")), "{rest}");
        assert!(of("_sum{") >= 0.0);
    }
}

fn page(mount: &Mount) -> String {
    fs::read_to_string(mount.path(".qcow2fs/metrics")).unwrap()
}

#[test]
fn metrics_say_what_was_requested_and_other_programs_can_read_them() {
    let lab = Lab::new();
    let directory = lab.subdirectory("images/a \"b\\");
    fs::rename(lab.create("disk.qcow2", "64M", ""), directory.join("d.qcow2")).unwrap();
    let mount = lab.mount();
    assert_eq!(metrics(&page(&mount))["qcow2fs_images_open"], 0.0);
    let file = File::options().read(true).write(true).open(mount.path("a \"b\\/d.raw")).unwrap();
    for megabyte in 0..4u64 {
        file.write_all_at(&pattern(megabyte, 1 << 20), megabyte << 20).unwrap();
        file.sync_all().unwrap();
    }
    sh!("fallocate -p -o 0 -l 1M '{}'", mount.path("a \"b\\/d.raw").display());
    sh!("dd if='{}' of=/dev/null bs=1M iflag=direct", mount.path("a \"b\\/d.raw").display());
    let text = page(&mount);
    let samples = metrics(&text);
    let of = |name: &str, more: &str| {
        samples[&format!("qcow2fs_{name}{{image=\"a \\\"b\\\\/d.raw\"{more}}}")]
    };
    assert_eq!(samples["qcow2fs_images_open"], 1.0);
    assert_eq!(of("image_healthy", ""), 1.0);
    assert_eq!(of("image_virtual_bytes", ""), 67108864.0);
    let requested = |what: &str, request: &str| of(what, &format!(",request=\"{request}\""));
    assert_eq!(requested("image_request_bytes_total", "write"), 4194304.0);
    assert_eq!(requested("image_request_bytes_total", "discard"), 1048576.0);
    assert!(requested("image_request_bytes_total", "read") > 0.0);
    assert!(requested("image_request_seconds_count", "flush") >= 4.0);
    assert!(requested("image_request_seconds_sum", "write") > 0.0);
    assert_eq!(requested("image_request_errors_total", "write"), 0.0);
    assert!(of("image_live_bytes", "") >= 3145728.0, "{text}");
    let tables = of("image_cache_lookups_total", ",cache=\"tables\",result=\"hit\"");
    assert!(tables > 0.0, "{text}");

    // The same page, read by others.
    fs::write(lab.path("metrics"), &text).unwrap();
    let script = "import sys\n\
        try: from prometheus_client.parser import text_string_to_metric_families as parse\n\
        except ImportError: sys.exit(3)\n\
        n = sum(len(f.samples) for f in parse(open(sys.argv[1]).read()))\n\
        print(n)\n";
    fs::write(lab.path("parse.py"), script).unwrap();
    // A Python that is not the system's may not have what the system has.
    let system = std::path::Path::new("/usr/bin/python3");
    let ours = attempt!("python3 {0}/parse.py {0}/metrics", lab.path("").display());
    let parsed = match ours.code {
        Some(3) if system.exists() => {
            attempt!("{1} {0}/parse.py {0}/metrics", lab.path("").display(), system.display())
        }
        _ => ours,
    };
    match parsed.code {
        Some(0) => assert_eq!(parsed.out.trim(), samples.len().to_string()),
        Some(3 | 127) => eprintln!("no Prometheus parser here: only our own look at the form"),
        _ => panic!("{parsed:?}"),
    }
    drop(file);
    mount.umount();
}

#[test]
fn status_tells_requests_caches_and_what_is_live() {
    let lab = Lab::new();
    let image = lab.create("disk.qcow2", "64M", "");
    sh!("qemu-io -f qcow2 -c 'write -c -P 1 0 64k' {}", image.display());
    let mount = lab.mount();
    let file = File::options().read(true).write(true).open(mount.path("disk.raw")).unwrap();
    file.write_all_at(&pattern(1, 2 << 20), 1 << 20).unwrap();
    file.sync_all().unwrap();
    let raw = mount.path("disk.raw");
    sh!("dd if={} of=/dev/null bs=4k count=16 iflag=direct", raw.display());
    let status = mount.status();
    let told = &status["images"][0];
    let number = |place: &str| told.pointer(place).and_then(|v| v.as_u64()).unwrap();
    assert_eq!(number("/io/write/bytes"), 2 << 20);
    assert_eq!(number("/io/write/errors"), 0);
    assert!(number("/io/write/median") <= number("/io/write/longest"));
    assert!(number("/live") >= 2 << 20 && number("/live") < 4 << 20, "{told:#}");
    assert!(number("/inflated_cache/misses") >= 1, "{told:#}");
    let page = sh!("$qcow2fs status {}", mount.point().display());
    for part in ["live ", "  write: ", "half within ", "tables cached ", ", ok"] {
        assert!(page.contains(part), "{part}: {page}");
    }
    drop(file);
    mount.umount();
}

#[test]
fn tables_in_memory_are_bounded() {
    let lab = Lab::new();
    lab.create("disk.qcow2", "1G", "cluster_size=4k,preallocation=metadata");
    // Two looks at more tables than 64 KiB hold.
    let misses_after_two_looks = |arguments: &str| {
        let mount = lab.mount_with(arguments);
        let file = File::open(mount.path("disk.raw")).unwrap();
        let mut byte = [0];
        // Past what the kernel has read already.
        for offset in [0, 3 << 19] {
            for part in 0..128 {
                file.read_exact_at(&mut byte, (part << 23) + offset).unwrap();
            }
        }
        let misses = mount.status()["images"][0]["table_cache"]["misses"].as_u64().unwrap();
        drop(file);
        mount.umount();
        misses
    };
    assert_eq!(misses_after_two_looks(""), 128);
    for bounded in ["--metadata-cache 64K", "-o metadata_cache=64K"] {
        assert!(misses_after_two_looks(bounded) > 200, "{bounded}");
    }
}

#[test]
fn the_caches_of_all_images_have_a_limit_and_those_that_lie_idle_give_way() {
    let lab = Lab::new();
    let names: Vec<String> = (0..8).map(|i| format!("disk{i}")).collect();
    for name in &names {
        lab.create(&format!("{name}.qcow2"), "1G", "cluster_size=4k,preallocation=metadata");
    }
    let mount = lab.mount_with("--cache-limit 1M");
    let files: Vec<_> =
        names.iter().map(|name| File::open(mount.path(&format!("{name}.raw"))).unwrap()).collect();
    // Another place of the same 128 pieces of tables each time: nothing that the kernel has read.
    let look = |file: &File, time: u64| {
        for part in 0..128 {
            file.read_exact_at(&mut [0], (part << 23) + (time << 17)).unwrap();
        }
    };
    let held = || mount.status()["caches"]["held"].as_u64().unwrap();
    files.iter().for_each(|file| look(file, 0));
    assert!((700 << 10..1100 << 10).contains(&held()), "{}", held());
    let misses = || {
        let status = mount.status();
        let images = status["images"].as_array().unwrap();
        let last = images.iter().find(|image| image["name"] == "disk7.raw").unwrap();
        last["table_cache"]["misses"].as_u64().unwrap()
    };
    (1..4).for_each(|time| look(&files[7], 3 * time));
    let before = misses();
    look(&files[7], 15);
    assert_eq!(misses(), before, "the disk in use has lost what those that lie idle could give");
    assert!(held() < 1100 << 10, "{}", held());
    drop(files);
    mount.umount();
}

#[test]
fn watch_prints_lines_where_there_is_no_terminal_and_draws_where_there_is() {
    let lab = Lab::new();
    lab.create("disk.qcow2", "64M", "");
    let mount = lab.mount();
    let place = mount.point().display();
    let quiet = sh!("$qcow2fs watch --count 1 {place}");
    assert_eq!(quiet, "no image is open\n");
    let file = File::options().read(true).write(true).open(mount.path("disk.raw")).unwrap();
    file.write_all_at(&pattern(1, 1 << 20), 0).unwrap();
    let lines = sh!("$qcow2fs watch --count 3 --interval 0.1 {place}");
    assert_eq!(lines.lines().filter(|line| line.starts_with("disk.raw: file ")).count(), 3);
    assert!(!lines.contains('\x1b'), "{lines:?}");
    for (setting, coloured) in [("NO_COLOR=", true), ("NO_COLOR=1", false)] {
        let drawn = sh!(
            "TERM=xterm {setting} script -qec '$qcow2fs watch --count 2 --interval 0.1 {place}' /dev/null"
        );
        assert!(drawn.contains("disk.raw") && drawn.contains("\x1b[H"), "{drawn:?}");
        assert!(drawn.contains("\x1b[?1049l"), "the terminal stays as it was: {drawn:?}");
        assert_eq!(drawn.contains("\x1b[38;5;"), coloured, "{setting}: {drawn:?}");
    }
    // Interrupted, it ends in order.
    let ended = attempt!(
        "exec >{0}; $qcow2fs watch --interval 60 {place} & sleep 0.3; \
         for i in $(seq 100); do [ -s {0} ] && break; sleep 0.1; done; \
         kill -TERM $!; wait $!",
        lab.path("lines").display()
    );
    assert_eq!(ended.code, Some(143), "{ended:?}");
    eventually(Duration::from_secs(10), || mount.status()["images"][0].is_object(), String::new);
    drop(file);
    mount.umount();
}
