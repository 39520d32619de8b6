//! New images, made so that they appear complete or not at all.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::errno;
use super::host::HostId;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Beside, CompactAfter, CreateOptions, Image, NewDataFile, Options};
use crate::storage::image_lock::{self, Access};
use crate::storage::{HostFile, IfTaken, NewFile, Storage, regular};

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
    let data = match &options.data_file {
        Some(data) => Some(UnnamedData::new(&directory, data, options.virtual_size)?),
        None => None,
    };
    if !fill(&NewImage { file: new.file(), data: data.as_ref() })? {
        return Ok(false);
    }
    let made = HostId::of(&new.file().metadata().map_err(failed)?);
    // The image last: where it is, all is.
    let data_path = data.map(UnnamedData::publish).transpose()?;
    let published = new.publish(name, if_taken).map_err(failed);
    // It may have its name all the same, where only the directory could not be made durable.
    let is_there = || path.symlink_metadata().is_ok_and(|found| HostId::of(&found) == made);
    if let (Err(_), Some(data_path)) = (&published, data_path)
        && !is_there()
        && let Err(e) = std::fs::remove_file(&data_path)
    {
        log::warn!("removing {}: {e}", data_path.display());
    }
    drop(replaced);
    published.map(|()| true)
}

/// An image that has no name yet.
pub struct NewImage<'a> {
    file: &'a File,
    data: Option<&'a UnnamedData>,
}

impl NewImage<'_> {
    /// Opens the image for writing, with its data file where it has one, runs `verb` on it, and closes
    /// it.
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
        // Nobody else can open them: there is nothing to be locked against.
        let storage = |file: &File| -> Result<Arc<dyn Storage>> {
            let file = file.try_clone().map_err(|e| Error::io("opening the new image", e))?;
            Ok(Arc::new(HostFile::new(file)))
        };
        let data = self.data.map(|data| storage(data.file.file())).transpose()?;
        let beside = Beside { data, ..Beside::default() };
        let image = Image::open_with(storage(self.file)?, &options, beside)?;
        let done = verb(&image);
        let closed = image.close();
        done.and_then(|done| closed.map(|()| done))
    }
}

/// A data file that has no name yet.
struct UnnamedData {
    file: NewFile,
    path: PathBuf,
    /// As the image has it.
    shown: String,
}

impl UnnamedData {
    /// The data file of a new image in `directory`, as long as the disk.
    fn new(directory: &Path, data: &NewDataFile, length: u64) -> Result<Self> {
        let path = directory.join(OsStr::from_bytes(&data.name));
        let shown = crate::error::legible(&data.name);
        let failed = |e| Error::io(format!("data file {shown}: making it"), e);
        // For a long time of filling: publishing fails then as well.
        if path.symlink_metadata().is_ok() {
            return Err(is_there(&shown));
        }
        let file = NewFile::new(&directory_of(&path), MODE).map_err(failed)?;
        file.file().set_len(length).map_err(failed)?;
        Ok(UnnamedData { file, path, shown })
    }

    /// Gives it its name, and returns its path.
    fn publish(self) -> Result<PathBuf> {
        let UnnamedData { file, path, shown } = self;
        let nameless = || Error::invalid(format!("data file {shown}: a path that names no file"));
        let name = path.file_name().ok_or_else(nameless)?;
        file.publish(name, IfTaken::Fail).map_err(|e| match e.kind() {
            std::io::ErrorKind::AlreadyExists => is_there(&shown),
            _ => Error::io(format!("data file {shown}: making it"), e),
        })?;
        Ok(path)
    }
}

fn is_there(shown: &str) -> Error {
    let what = "it is there already: remove it, or choose another name";
    Error::new(ErrorKind::Exists, format!("data file {shown}: {what}"))
}

fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The file that is to be replaced, locked against everybody; `None` where there is none.
fn hold_replaced(path: &Path) -> Result<Option<File>> {
    let replacing = || format!("replacing {}", path.display());
    let place = match regular::place_itself(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        place => place.map_err(|e| Error::io(replacing(), e))?,
    };
    let file = regular::open(&place, true).map_err(|e| e.context(replacing()))?;
    image_lock::acquire(&file, None, Access::Write).map_err(|e| e.context(path.display()))?;
    Ok(Some(file))
}
