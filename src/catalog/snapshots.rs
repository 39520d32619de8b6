//! The snapshots of the images: listed whether an image is open or not, opened, taken and deleted.

use std::sync::Arc;

use super::{Catalog, Node, errno, host};
use crate::error::{Error, Result};
use crate::image::{Image, SnapshotInfo, SnapshotKey, SnapshotView};
use crate::storage::HostFile;

impl Catalog {
    /// The snapshots of a node's image.
    ///
    /// # Errors
    /// `ENOTDIR` for a directory, those of [`Image::snapshots`] and of the host.
    pub fn snapshots(&self, node: &Node) -> Result<Vec<SnapshotInfo>> {
        if node.is_directory() {
            return Err(errno("listing the snapshots of a directory", libc::ENOTDIR));
        }
        if let Some(listed) = node.peek(|image, _, _| image.snapshots()) {
            return listed;
        }
        let (place, _) = self.place_of(node)?;
        let file =
            host::open_file(&place, false).map_err(|e| Error::io("opening the image file", e))?;
        Image::list_snapshots(&HostFile::new(file))
    }

    /// Opens the snapshot with that id; [`Catalog::close_snapshot`] ends it. The image is open
    /// meanwhile.
    ///
    /// # Errors
    /// Those of [`Catalog::open`] and [`Image::open_snapshot`].
    pub fn open_snapshot(&self, node: &Node, id: &str) -> Result<Arc<SnapshotView>> {
        self.open_for_verb(node, false)?;
        let opened = node.with_image(|image| image.open_snapshot(SnapshotKey::Id(id.as_bytes())));
        if opened.is_err() {
            self.release(node);
        }
        opened
    }

    /// Ends what [`Catalog::open_snapshot`] began; the view is dropped before or soon after.
    pub fn close_snapshot(&self, node: &Node) {
        self.release(node);
    }

    /// Takes a snapshot of a node's image.
    ///
    /// # Errors
    /// Those of [`Catalog::open`] and [`Image::take_snapshot`].
    pub fn take_snapshot(&self, node: &Node, name: &[u8]) -> Result<SnapshotInfo> {
        self.with_opened(node, true, |image| image.take_snapshot(name))
    }

    /// Deletes the snapshot with that id.
    ///
    /// # Errors
    /// Those of [`Catalog::open`] and [`Image::delete_snapshot`].
    pub fn delete_snapshot(&self, node: &Node, id: &str) -> Result<()> {
        self.with_opened(node, true, |image| image.delete_snapshot(SnapshotKey::Id(id.as_bytes())))
    }
}
