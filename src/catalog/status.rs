//! What the mount says of itself: the open images, and those that could not be served.

use serde::{Deserialize, Serialize};

use super::node::Look;
use super::{Catalog, IoCounts};
use crate::confine;
use crate::image;
use crate::memory::MemoryStatus;

/// A whole mount.
#[derive(Clone, Debug, Serialize)]
pub struct MountStatus {
    /// The process that serves it.
    pub pid: u32,
    /// The image directory.
    pub source: String,
    /// Where it is mounted.
    pub mountpoint: String,
    /// Nothing is written.
    pub read_only: bool,
    /// The kernel knows that devices may wait for this process, and does not let it wait for their
    /// pages when memory is short.
    pub io_flusher: bool,
    /// What the process has given up; nothing where it was told to keep everything.
    pub confined: Option<&'static confine::Report>,
    /// The directory of the overlays that are written instead of the images; nothing where the
    /// images are written.
    pub overlay: Option<String>,
    /// The overlays are thrown away at the end.
    pub ephemeral: bool,
    /// The caches of all open images.
    pub caches: MemoryStatus,
    /// How many times closing an image has failed.
    pub close_errors: u64,
    /// The images that are open.
    pub images: Vec<ImageStatus>,
    /// The last error of each image that had one.
    pub errors: Vec<Refusal>,
}

/// An open image.
#[derive(Clone, Debug, Serialize)]
pub struct ImageStatus {
    /// The name under the mount point.
    pub name: String,
    /// It is open for writing.
    pub writable: bool,
    /// How many times it is open.
    pub handles: u32,
    /// The requests for it since the kernel first asked for it.
    pub io: IoCounts,
    /// What the image says of itself.
    #[serde(flatten)]
    pub image: Option<image::Status>,
    /// Why the image says nothing of itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What went wrong with an image last.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Refusal {
    /// The name under the mount point.
    pub name: String,
    /// The line that was logged.
    pub error: String,
}

impl Catalog {
    /// The state of the mount.
    pub fn status(&self, mountpoint: &std::path::Path) -> MountStatus {
        let mut nodes = self.all_nodes();
        nodes.sort_by_key(|node| node.path());
        let name = |node: &super::Node| node.raw_path().display().to_string();
        let image = |node: &super::Node| {
            let name = name(node);
            let found = node.look(|image, writable, handles| (image.status(), writable, handles));
            let (status, writable, handles) = match found {
                Look::Closed => return None,
                Look::Busy => (Err("it is being opened or closed".into()), false, 0),
                Look::Open((status, writable, handles)) => {
                    (status.map_err(|e| e.to_string()), writable, handles)
                }
            };
            let (image, error) = match status {
                Ok(status) => (Some(status), None),
                Err(error) => (None, Some(error)),
            };
            Some(ImageStatus { name, writable, handles, io: node.io_counts(), image, error })
        };
        let refusal = |node: &super::Node| {
            let error = node.last_logged()?;
            Some(Refusal { name: name(node), error })
        };
        let overlay = self.options.overlay.as_ref();
        MountStatus {
            pid: std::process::id(),
            source: self.source.display().to_string(),
            mountpoint: mountpoint.display().to_string(),
            read_only: self.options.read_only,
            io_flusher: self.options.io_flusher,
            caches: self.options.image.caches.status(),
            confined: confine::report(),
            overlay: overlay.map(|overlay| overlay.directory.display().to_string()),
            ephemeral: overlay.is_some_and(|overlay| overlay.ephemeral),
            close_errors: self.close_errors.load(std::sync::atomic::Ordering::Relaxed),
            images: nodes.iter().filter_map(|node| image(node)).collect(),
            errors: nodes.iter().filter_map(|node| refusal(node)).collect(),
        }
    }
}
