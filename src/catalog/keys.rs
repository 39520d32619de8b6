//! Where the keys of encrypted images come from: files named on the command line, a directory of
//! them, systemd's credentials, and at last somebody at a terminal.
//!
//! A key is looked for when its image is opened, and forgotten at once: a key file may be changed at
//! any time, and none need be there before. An image is known here by its name within the directory
//! that it lies in, the image directory or an allowed one.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::crypt::{DataCipher, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Encryption, Image};
use crate::storage::HostFile;

/// A key file is at most this many bytes.
const MAX_KEY_FILE: usize = 64 << 10;

/// Asks a person for the key of an image; nothing where nobody is there.
pub type Prompt = fn(&Path) -> Option<Secret>;

/// Where to look for keys. The first that is there is the one.
#[derive(Clone, Debug, Default)]
pub struct Keys {
    /// Files for single images, by the names of those: `a/b`, `a/b.qcow2` or `a/b.raw`.
    pub files: Vec<(PathBuf, PathBuf)>,
    /// A directory where the key of `a/b.qcow2` is `a/b.key`.
    pub directory: Option<PathBuf>,
    /// A directory without sub-directories where it is `a-b.key`: that of systemd's credentials.
    pub credentials: Option<PathBuf>,
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
        match self.file_for(name) {
            Some(path) => unlock_with_file(&path, file, encryption)
                .map_err(|e| e.context(format!("with the key in {}", path.display()))),
            None => match self.prompt.and_then(|prompt| prompt(name)) {
                Some(secret) => Image::unlock(file, &secret),
                None => Err(self.no_key(name, encryption)),
            },
        }
    }

    fn file_for(&self, name: &Path) -> Option<PathBuf> {
        let stem = name.with_extension("");
        let named = |(image, _): &&(PathBuf, PathBuf)| {
            *image == stem || *image == name || *image == name.with_extension("raw")
        };
        if let Some((_, file)) = self.files.iter().find(named) {
            return Some(file.clone());
        }
        let mut key = stem.into_os_string();
        key.push(".key");
        let in_directory = self.directory.as_ref().map(|directory| directory.join(&key));
        let flat = key.to_string_lossy().replace('/', "-");
        let credential = self.credentials.as_ref().map(|directory| directory.join(flat));
        in_directory.into_iter().chain(credential).find(|path| path.exists())
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

fn unlock_with_file(
    path: &Path,
    file: &HostFile,
    encryption: Encryption,
) -> Result<Arc<DataCipher>> {
    let mut secret = read_key(path)?;
    let ends_in_newline = secret.last() == Some(&b'\n');
    if ends_in_newline && encryption == Encryption::Aes {
        // Nobody would notice a wrong key, and all that is written with it would be lost.
        return Err(Error::new(
            ErrorKind::WrongKey,
            "it ends with a new line, and this encryption (AES) cannot tell whether that belongs \
             to it: write the file without, as with `printf`",
        ));
    }
    match Image::unlock(file, &secret) {
        // Most editors and `echo` add one, QEMU takes files as they are.
        Err(e) if e.kind() == ErrorKind::WrongKey && ends_in_newline => {
            secret.truncate(secret.len() - 1);
            Image::unlock(file, &secret)
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
            prompt: None,
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
            assert_eq!(keys.file_for(Path::new(image)), file, "{image}");
        }
        let no_key =
            |keys: &Keys| keys.no_key(Path::new("a/b.qcow2"), Encryption::Luks).to_string();
        assert!(no_key(&keys).ends_with("keys/a/b.key"), "{}", no_key(&keys));
        let line = no_key(&Keys::default());
        assert!(line.contains("`--key-file a/b=FILE`"), "{line}");
    }
}
