//! One image opened for a command, by the rules of a mount of the directory that it lies in: QEMU's
//! lock is held, and its backing files lie in that directory or in allowed ones.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chain::Chains;
use super::host::Root;
use super::keys::Keys;
use super::node::{Found, Opened};
use crate::error::{Error, Result};
use crate::image::{Image, Options};
use crate::storage::regular;

/// An open image that belongs to no mount.
pub struct Alone {
    opened: Opened,
}

impl Alone {
    /// Opens the image at `path`, with its key from `keys` where it is encrypted. `options` say
    /// whether for writing.
    ///
    /// # Errors
    /// `InUse`, `NoKey`, those of [`Image::open`] and of the host; `ReadOnly` with an image that takes no
    /// writes.
    pub fn open(path: &Path, allowed: &[PathBuf], keys: Keys, options: &Options) -> Result<Alone> {
        let failed = |e| Error::io("opening the image", e);
        let path = path.canonicalize().map_err(failed)?;
        let name = path.file_name().map(Path::new).unwrap_or(Path::new("/"));
        // Once, for the image and for what it is based on: somebody may put another directory in the
        // place of this one at any moment.
        let root = Root::open_real(path.parent().unwrap_or(&path)).map_err(failed)?;
        let place = root.place(name).map_err(failed)?;
        regular::look(&place)?;
        let chains = Chains::new(&root, allowed, keys)?;
        let found = Found { path: name.into(), place, base: None, may_write: options.writable };
        let (opened, _) = Opened::new(&found, options.writable, options, &chains)?;
        Ok(Alone { opened })
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        self.opened.image()
    }

    /// Closes the image and gives the lock up.
    ///
    /// # Errors
    /// Those of [`Image::close`].
    pub fn close(self) -> Result<()> {
        self.opened.close()
    }
}
