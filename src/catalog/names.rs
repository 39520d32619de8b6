//! Names: `b.qcow2` on the host is `b.raw` here. Pure.
//!
//! One kind of name is the same on both sides but for the ending: `.b.raw.X1y2Z3` here is
//! `.b.raw.X1y2Z3.qcow2`. rsync and others write a file under such a name first and rename it then.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

const IMAGE: &[u8] = b".qcow2";
const RAW: &[u8] = b".raw";

/// The image file that the raw file `name` stands for; `None` when no image could.
pub(super) fn image_name(name: &OsStr) -> Option<OsString> {
    if is_temporary(name.as_bytes()) {
        return Some(OsString::from_vec([name.as_bytes(), IMAGE].concat()));
    }
    exchange(name, RAW, IMAGE).filter(|image| raw_name(image).as_deref() == Some(name))
}

/// The raw file that stands for the image file `name`; `None` when it is no image's name.
pub(super) fn raw_name(name: &OsStr) -> Option<OsString> {
    match name.as_bytes().strip_suffix(IMAGE) {
        Some(stem) if is_temporary(stem) => Some(OsString::from_vec(stem.to_vec())),
        _ => exchange(name, IMAGE, RAW),
    }
}

/// The path of the raw file that stands for the image at `path`.
pub(super) fn raw_path(path: &Path) -> PathBuf {
    match path.file_name().and_then(raw_name) {
        Some(name) => path.with_file_name(name),
        None => path.to_owned(),
    }
}

/// Whether it is the name of something within a directory, and no path. The kernel passes no other,
/// but what is made, removed and renamed by name must not depend on that.
pub(super) fn is_one(name: &OsStr) -> bool {
    let name = name.as_bytes();
    !matches!(name, b"" | b"." | b"..") && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}

/// Whether a raw file goes by `name`, which does not end in `.raw`, for a while: `.NAME.raw.SUFFIX`.
fn is_temporary(name: &[u8]) -> bool {
    let mut parts = name.rsplitn(2, |byte| *byte == b'.');
    let (suffix, rest) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let stem = rest.strip_prefix(b".").and_then(|rest| rest.strip_suffix(RAW));
    !suffix.is_empty() && suffix != &RAW[1..] && stem.is_some_and(|stem| !stem.is_empty())
}

fn exchange(name: &OsStr, from: &[u8], to: &[u8]) -> Option<OsString> {
    let stem = name.as_bytes().strip_suffix(from)?;
    (!stem.is_empty()).then(|| OsString::from_vec([stem, to].concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_no_name() {
        for path in ["", ".", "..", "/", "a/b.raw", "../a.raw", "a.raw/", "a\0.raw"] {
            assert!(!is_one(path.as_ref()), "{path:?}");
        }
        for name in ["a.raw", "...", "..raw", " ", "\u{1f600}"] {
            assert!(is_one(name.as_ref()), "{name:?}");
        }
    }

    #[test]
    fn an_image_and_its_raw_file_name_each_other() {
        for (raw, image) in [("a.raw", "a.qcow2"), ("a.qcow2.raw", "a.qcow2.qcow2")] {
            assert_eq!(image_name(raw.as_ref()).unwrap(), image);
            assert_eq!(raw_name(image.as_ref()).unwrap(), raw);
        }
        for neither in ["", "a", ".raw", ".qcow2", "a.raw ", "a.RAW", "raw"] {
            assert_eq!(image_name(neither.as_ref()), None, "{neither}");
            assert_eq!(raw_name(neither.as_ref()), None, "{neither}");
        }
        for name in [".a.raw.X1y2Z3", ".a.qcow2.raw.x"] {
            let image = format!("{name}.qcow2");
            assert_eq!(image_name(name.as_ref()).unwrap(), *image);
            assert_eq!(raw_name(image.as_ref()).unwrap(), name);
            // A second name for the same image there is none.
            assert_eq!(image_name(format!("{name}.raw").as_ref()), None);
        }
        for neither in [".a.raw.", "..raw.x", "a.raw.x", ".a.x", ".raw.x"] {
            assert_eq!(image_name(neither.as_ref()), None, "{neither}");
        }
        assert_eq!(image_name(".a.raw.raw".as_ref()).unwrap(), ".a.raw.qcow2");
        assert_eq!(raw_path(Path::new("d.qcow2/a.qcow2")), Path::new("d.qcow2/a.raw"));
    }
}
