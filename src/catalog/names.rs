//! Names: `b.qcow2` on the host is `b.raw` here. Pure.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

const IMAGE: &[u8] = b".qcow2";
const RAW: &[u8] = b".raw";

/// The image file that the raw file `name` stands for; `None` when no image could.
pub(super) fn image_name(name: &OsStr) -> Option<OsString> {
    exchange(name, RAW, IMAGE)
}

/// The raw file that stands for the image file `name`; `None` when it is no image's name.
pub(super) fn raw_name(name: &OsStr) -> Option<OsString> {
    exchange(name, IMAGE, RAW)
}

/// The path of the raw file that stands for the image at `path`.
pub(super) fn raw_path(path: &Path) -> PathBuf {
    match path.file_name().and_then(raw_name) {
        Some(name) => path.with_file_name(name),
        None => path.to_owned(),
    }
}

fn exchange(name: &OsStr, from: &[u8], to: &[u8]) -> Option<OsString> {
    let stem = name.as_bytes().strip_suffix(from)?;
    (!stem.is_empty()).then(|| OsString::from_vec([stem, to].concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(raw_path(Path::new("d.qcow2/a.qcow2")), Path::new("d.qcow2/a.raw"));
    }
}
