//! New images, made so that they appear complete or not at all.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::errno;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Beside, CompactAfter, CreateOptions, Image, NewDataFile, Options};
use crate::storage::image_lock::{self, Access};
use crate::storage::{HostFile, IfTaken, NewFile};

/// The mode of new files, less the umask.
const MODE: u32 = 0o666;

/// Makes an empty image at `path`, and its external data file where `options` have one: a new file,
/// as long as the disk, its name relative to the image's directory or absolute. The backing file is
/// neither looked at nor needed. Returns when the image is durable; whatever happens before, there is
/// no part of one.
///
/// # Errors
/// Those of [`Image::create`]; `EEXIST` where `path` is taken and is not to be replaced; `Exists` for
/// a data file that is there already; `InUse` for an image that is to be replaced while somebody has
/// it open; `Invalid` for a path that is to be replaced and is no regular file; those of the host.
pub fn create_image(path: &Path, options: &CreateOptions, if_taken: IfTaken) -> Result<()> {
    create_filled_image(path, options, if_taken, |_| Ok(true)).map(drop)
}

/// As [`create_image`], but `fill` gets the image before it has its name: it appears filled, or, where
/// `fill` fails or answers `false`, not at all. Whether it was made.
///
/// # Errors
/// Those of [`create_image`] and of `fill`.
pub fn create_filled_image(
    path: &Path,
    options: &CreateOptions,
    if_taken: IfTaken,
    fill: impl FnOnce(&NewImage<'_>) -> Result<bool>,
) -> Result<bool> {
    let name = path.file_name().ok_or_else(|| Error::invalid("a path that names no file"))?;
    let directory = directory_of(path);
    options.check()?;
    let replaced = match if_taken {
        IfTaken::Replace => hold_replaced(path)?,
        IfTaken::Fail if path.symlink_metadata().is_ok() => {
            return Err(errno(&format!("making {}", path.display()), libc::EEXIST));
        }
        IfTaken::Fail => None,
    };
    let failed = |e| Error::io(format!("making {}", path.display()), e);
    let new = NewFile::new(&directory, MODE).map_err(failed)?;
    let storage = HostFile::new(new.file().try_clone().map_err(failed)?);
    Image::create(&storage, options)?;
    if !fill(&NewImage { file: new.file() })? {
        return Ok(false);
    }
    let data = options.data_file.as_ref().map(|data| (data_path(&directory, data), data));
    if let Some((data_path, data)) = &data {
        make_data_file(data_path, options.virtual_size)
            .map_err(|e| e.context(format!("data file {}", shown(data))))?;
    }
    let published = new.publish(name, if_taken).map_err(failed);
    if let (Err(_), Some((data_path, _))) = (&published, &data)
        && let Err(e) = std::fs::remove_file(data_path)
    {
        log::warn!("removing {}: {e}", data_path.display());
    }
    drop(replaced);
    published.map(|()| true)
}

/// An image that has no name yet.
pub struct NewImage<'a> {
    file: &'a File,
}

impl NewImage<'_> {
    /// Opens the image for writing, with nothing beside it, runs `verb` on it, and closes it.
    ///
    /// # Errors
    /// Those of [`Image::open_with`], of `verb` and of [`Image::close`].
    pub fn with_opened<R>(&self, verb: impl FnOnce(&Image) -> Result<R>) -> Result<R> {
        let options = Options {
            writable: true,
            keep_erased: 0,
            return_leaks: false,
            compact_after: CompactAfter::Off,
            ..Options::default()
        };
        let file = self.file.try_clone().map_err(|e| Error::io("opening the new image", e))?;
        // Nobody else can open it: there is nothing to be locked against.
        let storage = Arc::new(HostFile::new(file));
        let image = Image::open_with(storage, &options, Beside::default())?;
        let done = verb(&image);
        let closed = image.close();
        done.and_then(|done| closed.map(|()| done))
    }
}

fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn shown(data: &NewDataFile) -> String {
    String::from_utf8_lossy(&data.name).escape_debug().to_string()
}

/// The file that is to be replaced, locked against everybody; `None` where there is none.
fn hold_replaced(path: &Path) -> Result<Option<File>> {
    let failed = |e| Error::io(format!("replacing {}", path.display()), e);
    match path.symlink_metadata() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
        Ok(metadata) if !metadata.is_file() => {
            return Err(Error::invalid(format!("{} is not a regular file", path.display())));
        }
        Ok(_) => {}
    }
    let file = File::options().read(true).write(true).open(path).map_err(failed)?;
    image_lock::acquire(&file, None, Access::Write).map_err(|e| e.context(path.display()))?;
    Ok(Some(file))
}

fn data_path(directory: &Path, data: &NewDataFile) -> PathBuf {
    directory.join(OsStr::from_bytes(&data.name))
}

fn make_data_file(path: &Path, length: u64) -> Result<()> {
    let name = path.file_name().ok_or_else(|| Error::invalid("a path that names no file"))?;
    let failed = |e| Error::io("making it", e);
    let new = NewFile::new(&directory_of(path), MODE).map_err(failed)?;
    new.file().set_len(length).map_err(failed)?;
    new.publish(name, IfTaken::Fail).map_err(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Error::new(ErrorKind::Exists, "it is there already: remove it, or choose another name")
        }
        _ => failed(e),
    })
}
