//! Where the keys of encrypted images come from: files named on the command line, a directory of
//! them, systemd's credentials, and at last somebody at a terminal.
//!
//! A key is looked for when its image is opened, and forgotten at once: a key file may be changed at
//! any time, and none need be there before. An image is known here by its name within the directory
//! that it lies in, the image directory or an allowed one. So another name may mean another key, which
//! the older AES method would not notice: [`Keys::stays`] tells before a name changes.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;

use crate::crypt::{DataCipher, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Encryption, Image};
use crate::storage::HostFile;

/// A key file is at most this many bytes.
const MAX_KEY_FILE: usize = 64 << 10;

/// How far whoever tries a key gives way to what serves requests: so much nicer it is.
const NICER: i32 = 10;

type Ask = dyn Fn(&Path) -> Option<Secret> + Send + Sync;

/// Asks a person for the key of an image; nothing where nobody is there.
#[derive(Clone)]
pub struct Prompt(Arc<Ask>);

impl Prompt {
    /// Whoever `ask` asks.
    pub fn new(ask: impl Fn(&Path) -> Option<Secret> + Send + Sync + 'static) -> Prompt {
        Prompt(Arc::new(ask))
    }
}

impl std::fmt::Debug for Prompt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Prompt")
    }
}

/// Keys that were typed before, by the names of their images. Each serves for one opening.
#[derive(Clone, Debug, Default)]
pub struct Typed(Arc<Mutex<Vec<(PathBuf, Secret)>>>);

impl Typed {
    /// Keeps the key of the image `name`.
    pub fn add(&self, name: PathBuf, secret: Secret) {
        self.0.lock().push((name, secret));
    }

    /// All of them, which are kept no longer.
    #[must_use]
    pub fn take_all(&self) -> Vec<(PathBuf, Secret)> {
        std::mem::take(&mut *self.0.lock())
    }

    fn take(&self, name: &Path) -> Option<Secret> {
        let mut typed = self.0.lock();
        let at = typed.iter().position(|(known, _)| known == name)?;
        Some(typed.swap_remove(at).1)
    }
}

/// Where to look for keys. The first that is there is the one.
#[derive(Clone, Debug, Default)]
pub struct Keys {
    /// Files for single images, by the names of those: `a/b`, `a/b.qcow2` or `a/b.raw`.
    pub files: Vec<(PathBuf, PathBuf)>,
    /// A directory where the key of `a/b.qcow2` is `a/b.key`.
    pub directory: Option<PathBuf>,
    /// A directory without sub-directories where it is `a-b.key`: that of systemd's credentials.
    pub credentials: Option<PathBuf>,
    /// What somebody has typed already.
    pub typed: Typed,
    /// Who is asked at last.
    pub prompt: Option<Prompt>,
}

impl Keys {
    /// The cipher of the image `name`, which is open as `file` and encrypted so.
    ///
    /// # Errors
    /// `NoKey`, `WrongKey`, those of [`Image::unlock`], and of the host with a key file.
    pub(super) fn unlock(
        &self,
        name: &Path,
        file: &HostFile,
        encryption: Encryption,
    ) -> Result<Arc<DataCipher>> {
        if let Some(path) = self.file_for(name)? {
            return unlock_with_file(&path, file, encryption)
                .map_err(|e| e.context(format!("with the key in {}", path.display())));
        }
        let ask = || self.prompt.as_ref().and_then(|Prompt(ask)| ask(name));
        match self.typed.take(name).or_else(ask) {
            Some(secret) => try_key(file, encryption, &secret),
            None => Err(self.no_key(name, encryption)),
        }
    }

    /// Tries the key of the image `name` in `file`; how that is encrypted, if it is.
    ///
    /// # Errors
    /// `NoKey`, `WrongKey`, those of [`Image::unlock`], and of the host with a key file.
    pub fn try_on(&self, name: &Path, file: &HostFile) -> Result<Option<Encryption>> {
        let encryption = Image::summarize(file)?.encryption;
        if let Some(encryption) = encryption {
            self.unlock(name, file, encryption)?;
        }
        Ok(encryption)
    }

    /// Whether an image that is called `to` from now on, and was called `from`, gets no other key than
    /// before; it may get none.
    ///
    /// # Errors
    /// Those of the host with a key file.
    pub(super) fn stays(&self, from: &Path, to: &Path) -> Result<bool> {
        let Some(after) = self.file_for(to)? else { return Ok(true) };
        let Some(before) = self.file_for(from)? else { return Ok(false) };
        let read = |path: &Path| {
            read_key(path).map_err(|e| e.context(format!("the key in {}", path.display())))
        };
        Ok(before == after || *read(&before)? == *read(&after)?)
    }

    /// The file that has the key of the image `name`.
    ///
    /// # Errors
    /// Those of the host where it cannot be told whether there is one: that is not to have none, or
    /// another one might be taken for it.
    pub fn file_for(&self, name: &Path) -> Result<Option<PathBuf>> {
        let stem = name.with_extension("");
        let named = |(image, _): &&(PathBuf, PathBuf)| {
            *image == stem || *image == name || *image == name.with_extension("raw")
        };
        if let Some((_, file)) = self.files.iter().find(named) {
            return Ok(Some(file.clone()));
        }
        let mut key = stem.into_os_string();
        key.push(".key");
        let in_directory = self.directory.as_ref().map(|directory| directory.join(&key));
        let flat = key.to_string_lossy().replace('/', "-");
        let credential = self.credentials.as_ref().map(|directory| directory.join(flat));
        for path in in_directory.into_iter().chain(credential) {
            if is_there(&path)? {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    fn no_key(&self, name: &Path, encryption: Encryption) -> Error {
        let mut key = OsString::from(name.with_extension(""));
        let stem = key.to_string_lossy().into_owned();
        key.push(".key");
        let remedy = match &self.directory {
            Some(directory) => format!("put its key in {}", directory.join(key).display()),
            None => format!(
                "give its key with `--key-file {stem}=FILE`, or with `--keys DIR` and \
                 DIR/{}",
                key.display()
            ),
        };
        let text = format!("it is encrypted ({encryption}) and there is no key for it: {remedy}");
        Error::new(ErrorKind::NoKey, text)
    }
}

fn is_there(path: &Path) -> Result<bool> {
    match path.try_exists() {
        // What cannot be a path is none.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTDIR | libc::ENAMETOOLONG)) => Ok(false),
        found => {
            found.map_err(|e| Error::io(format!("looking for the key in {}", path.display()), e))
        }
    }
}

/// Tries a key. To find out takes a second or two, and with a hostile header half a minute: that is
/// done on a thread of its own, which gives way to all others.
fn try_key(file: &HostFile, encryption: Encryption, secret: &Secret) -> Result<Arc<DataCipher>> {
    if encryption == Encryption::Aes {
        return Image::unlock(file, secret);
    }
    let nicely = || {
        if let Err(e) = rustix::process::setpriority_process(None, NICER) {
            log::debug!("a key is tried at the usual priority: {e}");
        }
        Image::unlock(file, secret)
    };
    thread::scope(|scope| {
        match thread::Builder::new().name("key".into()).spawn_scoped(scope, nicely) {
            Ok(trying) => trying.join().unwrap_or_else(|_| {
                Err(Error::io("trying the key", io::Error::from_raw_os_error(libc::EIO)))
            }),
            // No more threads to be had: it is done here.
            Err(_) => Image::unlock(file, secret),
        }
    })
}

fn unlock_with_file(
    path: &Path,
    file: &HostFile,
    encryption: Encryption,
) -> Result<Arc<DataCipher>> {
    let mut secret = read_key(path)?;
    let ends_in_newline = secret.last() == Some(&b'\n');
    let wrong = |why: &str| Err(Error::new(ErrorKind::WrongKey, why));
    if secret.is_empty() {
        return wrong("the file is empty: write the passphrase to it, as with `printf`");
    }
    if ends_in_newline && encryption == Encryption::Aes {
        // Nobody would notice a wrong key, and all that is written with it would be lost.
        return wrong(
            "it ends with a new line, and this encryption (AES) cannot tell whether that belongs \
             to it: write the file without, as with `printf`",
        );
    }
    match try_key(file, encryption, &secret) {
        // Most editors and `echo` add one, QEMU takes files as they are.
        Err(e) if e.kind() == ErrorKind::WrongKey && ends_in_newline => {
            secret.truncate(secret.len() - 1);
            try_key(file, encryption, &secret)
        }
        unlocked => unlocked,
    }
}

fn read_key(path: &Path) -> Result<Secret> {
    let failed = |e| Error::io("reading the key", e);
    let mut file =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(Error::invalid("it is not a regular file"));
    }
    if metadata.mode() & 0o077 != 0 {
        log::warn!("{}: others may read this key: `chmod 600` it", path.display());
    }
    // Straight to where it may stay.
    let mut secret = Secret::zeroed(MAX_KEY_FILE + 1);
    let mut length = 0;
    loop {
        match file.read(&mut secret[length..]) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(failed(e)),
        }
    }
    if length > MAX_KEY_FILE {
        return Err(Error::invalid(format!("it is longer than {MAX_KEY_FILE} bytes")));
    }
    secret.truncate(length);
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_its_key_by_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let place = |name: &str| directory.path().join(name);
        std::fs::create_dir_all(place("keys/a")).unwrap();
        std::fs::create_dir(place("credentials")).unwrap();
        for name in ["keys/a/b.key", "keys/c.d.key", "credentials/a-b.key", "credentials/e.key"] {
            std::fs::write(place(name), "").unwrap();
        }
        let keys = Keys {
            files: vec![
                ("f".into(), "1".into()),
                ("g.qcow2".into(), "2".into()),
                ("a/h.raw".into(), "3".into()),
            ],
            directory: Some(place("keys")),
            credentials: Some(place("credentials")),
            ..Keys::default()
        };
        for (image, file) in [
            ("f.qcow2", Some("1".into())),
            ("g.qcow2", Some("2".into())),
            ("a/h.qcow2", Some("3".into())),
            ("a/f.qcow2", None),
            ("a/b.qcow2", Some(place("keys/a/b.key"))),
            ("c.d.qcow2", Some(place("keys/c.d.key"))),
            ("e.qcow2", Some(place("credentials/e.key"))),
            ("b.qcow2", None),
        ] {
            assert_eq!(keys.file_for(Path::new(image)).unwrap(), file, "{image}");
        }
        let no_key =
            |keys: &Keys| keys.no_key(Path::new("a/b.qcow2"), Encryption::Luks).to_string();
        assert!(no_key(&keys).ends_with("keys/a/b.key"), "{}", no_key(&keys));
        let line = no_key(&Keys::default());
        assert!(line.contains("`--key-file a/b=FILE`"), "{line}");
    }

    #[test]
    fn a_key_that_cannot_be_looked_for_is_not_taken_for_missing() {
        let directory = tempfile::tempdir().unwrap();
        let place = |name: &str| directory.path().join(name);
        std::fs::create_dir_all(place("keys")).unwrap();
        std::fs::create_dir(place("credentials")).unwrap();
        std::fs::write(place("credentials/loop.key"), "another").unwrap();
        std::os::unix::fs::symlink(place("keys/loop.key"), place("keys/loop.key")).unwrap();
        std::fs::write(place("keys/file"), "").unwrap();
        let keys = Keys {
            directory: Some(place("keys")),
            credentials: Some(place("credentials")),
            ..Keys::default()
        };
        let line = keys.file_for(Path::new("loop.qcow2")).unwrap_err().to_string();
        assert!(line.contains("keys/loop.key"), "{line}");
        assert_eq!(keys.file_for(Path::new("file/below.qcow2")).unwrap(), None);
        assert_eq!(keys.file_for(Path::new(&"n".repeat(254))).unwrap(), None);
    }

    #[test]
    fn a_new_name_must_not_bring_another_key() {
        let directory = tempfile::tempdir().unwrap();
        for (name, key) in [("a", "one"), ("b", "two"), ("c", "one")] {
            std::fs::write(directory.path().join(name).with_extension("key"), key).unwrap();
        }
        let keys = Keys { directory: Some(directory.path().into()), ..Keys::default() };
        for (from, to, stays) in [
            ("a", "b", false),
            ("a", "c", true),
            ("a", "a", true),
            ("a", "none", true),
            ("none", "a", false),
            ("none", "nor this", true),
        ] {
            assert_eq!(keys.stays(from.as_ref(), to.as_ref()).unwrap(), stays, "{from} to {to}");
        }
    }

    #[test]
    fn what_was_typed_serves_once() {
        let typed = Typed::default();
        typed.add("a.qcow2".into(), Secret::copy_of(b"key"));
        assert!(typed.take(Path::new("b.qcow2")).is_none());
        assert_eq!(&*typed.take(Path::new("a.qcow2")).unwrap(), b"key");
        assert!(typed.take(Path::new("a.qcow2")).is_none());
    }
}
