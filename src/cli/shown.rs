//! Which raw file of which mount stands for an image, and which image stands behind a raw file.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use super::mountpoint::MountPoint;
use super::{status, unmounting};

const IMAGE: &str = "qcow2";
const RAW: &str = "raw";

/// The raw file through which a running mount writes to this image; `None` where no mount shows it,
/// or only with an overlay on it.
pub(super) fn raw_file_of(image: &Path) -> Option<PathBuf> {
    let image = image.canonicalize().ok()?;
    let mut mounts = unmounting::believed_mounts();
    // The latest one covers those before.
    mounts.reverse();
    mounts.into_iter().find_map(|(source, place)| {
        let raw = raw_file_in(&image, &source.canonicalize().ok()?, &place)?;
        let overlay = status::read_ours(&place).ok()?["overlay"].is_string();
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

/// The image behind a file of a mount; `None` for a file that no qcow2fs serves which is believed.
pub(super) fn image_of(raw: &Path) -> Option<PathBuf> {
    let (source, place) = mount_of(raw)?;
    image_in(raw, &source, &place)
}

/// Opens a file of a mount, by its whole path.
///
/// # Errors
/// Those of [`within`] and of [`MountPoint::open`].
pub(super) fn open(file: &Path, options: &OpenOptions) -> io::Result<File> {
    let (mount, name) = within(file)?;
    mount.open(&name, options)
}

/// The mount that a file of a mount lies in, and its name there.
///
/// # Errors
/// One that says so where it lies in no mount that is believed; those of [`MountPoint::of_ours`].
pub(super) fn within(file: &Path) -> io::Result<(MountPoint, PathBuf)> {
    let beneath = |(_, place): (PathBuf, PathBuf)| {
        let name = file.strip_prefix(&place).ok()?.to_owned();
        Some((place, name))
    };
    let found = mount_of(file).and_then(beneath);
    let (place, name) =
        found.ok_or_else(|| io::Error::other("it lies in no mount of root's or of yours"))?;
    Ok((MountPoint::of_ours(&place)?, name))
}

/// The source and the place of the mount that a file lies in.
fn mount_of(file: &Path) -> Option<(PathBuf, PathBuf)> {
    let mounts = unmounting::believed_mounts();
    let beneath =
        |place: &Path| file.strip_prefix(place).ok().map(|rest| rest.components().count());
    let nearest = mounts.into_iter().rev().filter(|(_, place)| beneath(place).is_some());
    nearest.min_by_key(|(_, place)| beneath(place))
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
