//! Names, attributes and offsets as the kernel may pass them, and as it never would: nothing appears
//! outside the image directory, nothing there but images and directories.

use std::ffi::OsStr;
use std::fs;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use qcow2fs::catalog::{AttributeChange, Catalog, Options, ROOT, Requester};
use qcow2fs::image::{CreateOptions, Image};

/// A part of a name.
#[derive(Arbitrary, Debug)]
enum Part<'a> {
    Raw,
    Qcow2,
    Dot,
    DotDot,
    Slash,
    Nul,
    A,
    Snap,
    Bytes(&'a [u8]),
    Long(u8),
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Lookup(Vec<Part<'a>>),
    Make {
        name: Vec<Part<'a>>,
        mode: u16,
    },
    Directory {
        name: Vec<Part<'a>>,
        mode: u16,
    },
    Remove {
        name: Vec<Part<'a>>,
        directory: bool,
    },
    Rename {
        from: Vec<Part<'a>>,
        to: Vec<Part<'a>>,
        flags: u8,
    },
    Link(Vec<Part<'a>>),
    /// The directory that steps are in from now on.
    Enter(Vec<Part<'a>>),
    GetAttribute(Vec<Part<'a>>),
    SetAttribute {
        name: Vec<Part<'a>>,
        length: u16,
        flags: u8,
    },
    RemoveAttribute(Vec<Part<'a>>),
    Mode(u32),
    List,
    Write {
        offset: u64,
        length: u16,
    },
    Read {
        offset: u64,
        length: u16,
    },
    Discard {
        start: u64,
        end: u64,
    },
    Allocate {
        start: u64,
        end: u64,
    },
    Seek(u64),
    Resize(u64),
}

fn name(parts: &[Part<'_>]) -> Vec<u8> {
    let mut name = Vec::new();
    for part in parts.iter().take(8) {
        match part {
            Part::Raw => name.extend(b".raw"),
            Part::Qcow2 => name.extend(b".qcow2"),
            Part::Dot => name.push(b'.'),
            Part::DotDot => name.extend(b".."),
            Part::Slash => name.push(b'/'),
            Part::Nul => name.push(0),
            Part::A => name.push(b'a'),
            Part::Snap => name.extend(b".snap"),
            Part::Bytes(bytes) => name.extend(*bytes),
            Part::Long(length) => name.extend(vec![b'x'; usize::from(*length)]),
        }
    }
    name
}

/// The kernel passes no offset past the largest file.
fn range(start: u64, end: u64) -> Range<u64> {
    const LARGEST: u64 = i64::MAX as u64;
    let (start, end) = (start & LARGEST, end & LARGEST);
    start.min(end)..start.max(end)
}

/// What is done to the image that is open: nothing that it is told makes it do anything past its end.
fn use_image(image: &Image, step: &Step<'_>) {
    match *step {
        Step::Write { offset, length } => {
            let end = offset.checked_add(u64::from(length));
            let written = image.write(offset, &vec![1; length.into()]);
            let fits = end.is_some_and(|end| end <= image.virtual_size());
            assert!(fits || written.is_err(), "written past the end");
        }
        Step::Read { offset, length } => {
            let mut bytes = vec![1; length.into()];
            let read = image.read(offset, &mut bytes);
            let fits = image.virtual_size().saturating_sub(offset).min(u64::from(length));
            let past_the_end = &bytes[fits as usize..];
            assert!(read.is_err() || past_the_end.iter().all(|byte| *byte == 0), "past the end");
        }
        Step::Discard { start, end } => image.discard(range(start, end)).unwrap(),
        // Not more than there is room for.
        Step::Allocate { start, end } => {
            let range = range(start, end);
            let _refused = image.preallocate(range.start..range.end.min(range.start + (1 << 20)));
        }
        Step::Seek(offset) => {
            let _past_the_end = image.next_data(offset);
            let _past_the_end = image.next_hole(offset);
        }
        // Any table that is made has to be written.
        Step::Resize(size) if size >> 56 == 0 => drop(image.resize(size >> 20)),
        Step::Resize(size) => assert!(image.resize(size).is_err(), "{size:#x} bytes"),
        _ => {}
    }
}

/// One step in the directory `parent`, to which `Enter` gives another.
fn act(catalog: &Catalog, parent: &mut u64, step: &Step<'_>) {
    let Ok(directory) = catalog.node(*parent) else { return };
    let Ok(file) = catalog.lookup(ROOT, OsStr::new("disk.raw")) else { return };
    let node = catalog.node(file.ino).unwrap();
    match step {
        Step::Lookup(parts) => {
            let _nothing = catalog.lookup(*parent, OsStr::from_bytes(&name(parts)));
        }
        Step::Make { name: parts, mode } => {
            let name = name(parts);
            let name = OsStr::from_bytes(&name);
            let _refused = catalog.make_image(&directory, name, u32::from(*mode), Requester::US);
        }
        Step::Directory { name: parts, mode } => {
            let (name, mode) = (name(parts), u32::from(*mode) | 0o700);
            let _refused =
                catalog.make_directory(&directory, OsStr::from_bytes(&name), mode, Requester::US);
        }
        Step::Remove { name: parts, directory: is_directory } => {
            let name = name(parts);
            let name = OsStr::from_bytes(&name);
            let _refused = catalog.remove(&directory, name, *is_directory, Requester::US);
        }
        Step::Rename { from, to, flags } => {
            let (from, to) = (name(from), name(to));
            let (from, to) = (OsStr::from_bytes(&from), OsStr::from_bytes(&to));
            let root = catalog.node(ROOT).unwrap();
            let (from, to) = ((&*directory, from), (&*root, to));
            let _refused = catalog.rename(from, to, u32::from(*flags), Requester::US);
        }
        Step::Link(parts) => {
            let name = name(parts);
            let _refused = catalog.link(&node, &directory, OsStr::from_bytes(&name));
        }
        Step::Enter(parts) => {
            let name = name(parts);
            *parent = catalog
                .lookup(*parent, OsStr::from_bytes(&name))
                .ok()
                .filter(|found| found.directory)
                .map_or(ROOT, |found| found.ino);
        }
        Step::GetAttribute(parts) => {
            let name = name(parts);
            let _none = catalog.extended_attribute(&node, OsStr::from_bytes(&name));
        }
        Step::SetAttribute { name: parts, length, flags } => {
            let (name, value) = (name(parts), vec![7; usize::from(*length)]);
            let (name, flags) = (OsStr::from_bytes(&name), u32::from(*flags));
            let _refused = catalog.set_extended_attribute(&node, name, &value, flags);
            let _none = catalog.extended_attributes(&node);
        }
        Step::RemoveAttribute(parts) => {
            let name = name(parts);
            let _none = catalog.remove_extended_attribute(&node, OsStr::from_bytes(&name));
        }
        Step::Mode(mode) => {
            let change = AttributeChange { mode: Some(*mode), ..AttributeChange::default() };
            let _refused = catalog.change_attributes(&node, change, Requester::US);
        }
        Step::List => drop(catalog.list(&directory)),
        step => {
            let _refused = catalog.with_opened(&node, true, |image| {
                use_image(image, step);
                Ok(())
            });
        }
    }
}

/// Whether there is nothing but images and directories beneath `directory`.
fn assert_tidy(directory: &Path) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() {
            assert_tidy(&path);
        } else {
            assert!(kind.is_file(), "{}", path.display());
            assert_eq!(path.extension(), Some(OsStr::new("qcow2")), "{}", path.display());
        }
    }
}

/// Runs the target.
pub fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let Ok(steps) = Vec::<Step<'_>>::arbitrary(&mut input) else { return };
    let lab = tempfile::Builder::new().tempdir_in("/dev/shm").unwrap();
    let images = lab.path().join("images");
    fs::create_dir(&images).unwrap();
    fs::write(lab.path().join("kept.raw"), "kept").unwrap();
    let create = CreateOptions { virtual_size: 1 << 20, ..CreateOptions::default() };
    let file = fs::File::create_new(images.join("disk.qcow2")).unwrap();
    Image::create(&qcow2fs::storage::HostFile::new(file), &create).unwrap();
    let image = qcow2fs::image::Options { threads: false, ..Default::default() };
    let options = Options { image, ..Options::default() };
    let catalog = Catalog::new(&images, options).unwrap();
    let mut parent = ROOT;
    for step in steps.iter().take(24) {
        act(&catalog, &mut parent, step);
    }
    catalog.close_all(Duration::from_secs(60));
    assert_tidy(&images);
    let outside: Vec<_> = fs::read_dir(lab.path()).unwrap().flatten().collect();
    assert_eq!(outside.len(), 2, "{outside:?}");
    assert_eq!(fs::read(lab.path().join("kept.raw")).unwrap(), b"kept");
}
