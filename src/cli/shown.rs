//! Which raw file of which mount stands for an image, and which image stands behind a raw file.

use std::path::{Path, PathBuf};

use super::{status, unmounting};

/// The type that the mount table shows.
const KIND: &str = "fuse.qcow2fs";
const IMAGE: &str = "qcow2";
const RAW: &str = "raw";

/// The raw file through which a running mount writes to this image; `None` where no mount shows it,
/// or only with an overlay on it.
pub(super) fn raw_file_of(image: &Path) -> Option<PathBuf> {
    let image = image.canonicalize().ok()?;
    let mut mounts = unmounting::mounts_of(KIND);
    // The latest one covers those before.
    mounts.reverse();
    mounts.into_iter().find_map(|(source, place)| {
        let raw = raw_file_in(&image, &source.canonicalize().ok()?, &place)?;
        let overlay = status::read(&place).ok()?["overlay"].is_string();
        (!overlay).then_some(raw)
    })
}

/// What a mount of `source` (a directory, or just one image) at `place` shows the image as.
pub(super) fn raw_file_in(image: &Path, source: &Path, place: &Path) -> Option<PathBuf> {
    if image.extension()? != IMAGE {
        return None;
    }
    let beneath = match image.strip_prefix(source).ok()? {
        itself if itself.as_os_str().is_empty() => Path::new(image.file_name()?),
        beneath => beneath,
    };
    Some(place.join(beneath).with_extension(RAW))
}

/// The image behind a file of a mount; `None` for a file that no qcow2fs serves.
pub(super) fn image_of(raw: &Path) -> Option<PathBuf> {
    let mounts = unmounting::mounts_of(KIND);
    let beneath = |place: &Path| raw.strip_prefix(place).ok().map(|rest| rest.components().count());
    let nearest = mounts.iter().rev().filter(|(_, place)| beneath(place).is_some());
    let (source, place) = nearest.min_by_key(|(_, place)| beneath(place))?;
    image_in(raw, source, place)
}

fn image_in(raw: &Path, source: &Path, place: &Path) -> Option<PathBuf> {
    if raw.extension()? != RAW {
        return None;
    }
    let beneath = raw.strip_prefix(place).ok()?.with_extension(IMAGE);
    let is_single = source.is_file();
    Some(if is_single { source.to_owned() } else { source.join(beneath) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_and_the_raw_file_of_a_mount_lead_to_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("a.b.qcow2");
        std::fs::write(&image, "").unwrap();
        let (directory, place) = (dir.path(), Path::new("/mnt/x y"));
        let raw = Path::new("/mnt/x y/a.b.raw");
        for source in [directory, &image] {
            assert_eq!(raw_file_in(&image, source, place).unwrap(), raw);
            assert_eq!(image_in(raw, source, place).unwrap(), image);
        }
        assert_eq!(raw_file_in(&image, Path::new("/elsewhere"), place), None);
        assert_eq!(raw_file_in(&directory.join("a.img"), directory, place), None);
        assert_eq!(image_in(Path::new("/mnt/x y/.qcow2fs/status"), directory, place), None);
    }
}
