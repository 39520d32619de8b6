//! The running mount that an image belongs to, and what that says of it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{shown, status, unmounting};

/// An image that a running mount shows.
pub(super) struct Mounted {
    mountpoint: PathBuf,
    name: String,
}

impl Mounted {
    /// The mount that has the image at `path` open.
    pub(super) fn open_in(path: &Path) -> Option<Mounted> {
        let path = path.canonicalize().ok()?;
        let mounts = unmounting::believed_mounts();
        // The latest one covers those before.
        mounts.into_iter().rev().find_map(|(source, mountpoint)| {
            // Others are not asked: they may not answer.
            if !path.starts_with(source) {
                return None;
            }
            let status = status::read_ours(&mountpoint).ok()?;
            if status["overlay"].is_string() {
                return None;
            }
            let source = Path::new(status["source"].as_str()?);
            let raw = shown::raw_file_in(&path, source, &mountpoint)?;
            let name = raw.strip_prefix(&mountpoint).ok()?.to_str()?.to_owned();
            image(&status, &name)?;
            Some(Mounted { mountpoint, name })
        })
    }

    /// Where it is mounted.
    pub(super) fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Its name beneath the mount point.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The raw file.
    pub(super) fn raw_file(&self) -> PathBuf {
        self.mountpoint.join(&self.name)
    }

    /// What the mount says of the image.
    ///
    /// # Errors
    /// A line for a person, also when the mount has closed the image.
    pub(super) fn status(&self) -> Result<Value, String> {
        let mut status = status::read_ours(&self.mountpoint)?;
        image_mut(&mut status, &self.name)
            .map(Value::take)
            .ok_or_else(|| format!("{} was closed before it was done", self.raw_file().display()))
    }
}

fn image<'a>(status: &'a Value, name: &str) -> Option<&'a Value> {
    status["images"].as_array()?.iter().find(|image| image["name"] == name)
}

fn image_mut<'a>(status: &'a mut Value, name: &str) -> Option<&'a mut Value> {
    status["images"].as_array_mut()?.iter_mut().find(|image| image["name"] == name)
}
