//! Keys of encrypted images as the commands take them: in files or typed at the terminal, never as
//! arguments.

use std::ffi::OsStr;
use std::io::{self, IsTerminal};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use zeroize::Zeroize;

use super::terminal::plain;
use crate::catalog::{Alone, Keys, Prompt, Typed};
use crate::crypt::Secret;
use crate::error::Error;
use crate::image::{Encryption, Image, Options};
use crate::storage::HostFile;

/// Bytes of all keys that one process types for another one, with the names of their images.
const MOST_TYPED: usize = 256 << 10;

/// What the commands that open images have in common.
#[derive(clap::Args, Clone, Debug, Default)]
#[group(id = "keys of images")]
pub(super) struct Args {
    /// The key of the encrypted image NAME is the content of FILE (repeatable). NAME is that in the
    /// image's directory, with or without its extension
    #[arg(long, value_name = "NAME=FILE", value_parser = named)]
    pub(super) key_file: Vec<(PathBuf, PathBuf)>,
    /// Keys of encrypted images are in DIR: that of a/b.qcow2 in a/b.key
    #[arg(long, value_name = "DIR")]
    pub(super) keys: Option<PathBuf>,
}

impl Args {
    /// The files and the directory that are there, by their real paths.
    pub(super) fn places(&self) -> impl Iterator<Item = PathBuf> {
        let files = self.key_file.iter().map(|(_, file)| file);
        self.keys.iter().chain(files).filter_map(|path| path.canonicalize().ok())
    }

    /// Where keys are, those that systemd passes included.
    ///
    /// # Errors
    /// A line that says what is wrong with the arguments.
    pub(super) fn keys(self) -> Result<Keys, String> {
        // Looked at when an image is opened, when the working directory is another.
        let whole = |path: PathBuf| {
            std::path::absolute(&path).map_err(|e| format!("the key {}: {e}", path.display()))
        };
        let files = self.key_file.into_iter().map(|(name, file)| Ok((name, whole(file)?)));
        let directory = self.keys.map(whole).transpose()?;
        if let Some(directory) = directory.as_ref().filter(|directory| !directory.is_dir()) {
            return Err(format!("{} is no directory with keys", directory.display()));
        }
        Ok(Keys {
            files: files.collect::<Result<_, String>>()?,
            directory,
            credentials: std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from),
            ..Keys::default()
        })
    }
}

/// [`Args::keys`], and who sits at the terminal.
pub(super) fn or_ask(args: &Args) -> Result<Keys, String> {
    Ok(Keys { prompt: Some(Prompt::new(ask)), ..args.clone().keys()? })
}

/// What commands that need no key do with one.
#[derive(clap::Args, Clone, Debug, Default)]
pub(super) struct Trial {
    /// Say whether the key of an encrypted image is right: from --key-file or --keys, which imply
    /// this, or asked for at the terminal
    #[arg(long)]
    try_key: bool,
    #[command(flatten)]
    keys: Args,
}

impl Trial {
    /// Tries the key of the image at `path`, where that is asked for; what came of it, if the image is
    /// encrypted.
    ///
    /// # Errors
    /// A line that says what is wrong with the key.
    pub(super) fn run(&self, path: &Path) -> Result<Option<&'static str>, String> {
        if !self.try_key && self.keys.key_file.is_empty() && self.keys.keys.is_none() {
            return Ok(None);
        }
        let keys = or_ask(&self.keys)?;
        let name = Path::new(path.file_name().unwrap_or_default());
        let file = super::check::open(path, false).map_err(|e| e.to_string())?;
        let tried = keys.try_on(name, &HostFile::new(file)).map_err(|e| e.to_string())?;
        Ok(tried.map(|encryption| match encryption {
            Encryption::Luks => "the key is right",
            Encryption::Aes => "nothing tells whether the key is right: AES keeps nothing of it",
        }))
    }
}

/// The keys for the image at `path` that have to be typed, as another process will need them; they
/// have been tried.
///
/// # Errors
/// A line that says what is wrong with a key, or with the image.
pub(super) fn typed_ahead(args: &Args, path: &Path, allowed: &[PathBuf]) -> Result<Typed, String> {
    let typed = Typed::default();
    if !io::stdin().is_terminal() || !needs_typing(args, path)? {
        return Ok(typed);
    }
    let kept = typed.clone();
    let ask_and_keep = move |name: &Path| {
        let secret = ask(name)?;
        kept.add(name.to_owned(), Secret::copy_of(&secret));
        Some(secret)
    };
    let keys = Keys { prompt: Some(Prompt::new(ask_and_keep)), ..args.clone().keys()? };
    let options = Options { writable: false, ..Options::default() };
    let tried = Alone::open(path, allowed, keys, &options).and_then(Alone::close);
    tried.map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(typed)
}

/// Whether the image at `path`, or what it is based on, may be encrypted without a file for its key.
fn needs_typing(args: &Args, path: &Path) -> Result<bool, String> {
    let line = |e: Error| format!("{}: {e}", path.display());
    let summary = super::check::open(path, false)
        .and_then(|file| Image::summarize(&HostFile::new(file)))
        .map_err(line)?;
    let name = Path::new(path.file_name().unwrap_or_default());
    let has_file = args.clone().keys()?.file_for(name).map_err(line)?.is_some();
    let needs = summary.backing.is_some() || summary.encryption.is_some() && !has_file;
    Ok(needs && summary.refusal.is_none())
}

/// What [`unpacked`] makes of it: each name and each key behind its length.
pub(super) fn packed(typed: &[(PathBuf, Secret)]) -> Secret {
    let parts = || typed.iter().flat_map(|(name, key)| [name.as_os_str().as_bytes(), key]);
    let mut into = Secret::zeroed(parts().map(|part| 4 + part.len()).sum());
    let mut at = 0;
    for part in parts() {
        let length = u32::try_from(part.len()).unwrap_or(u32::MAX);
        for bytes in [&length.to_be_bytes(), part] {
            into[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        }
    }
    into
}

/// Names of images, and their keys.
fn unpacked(mut bytes: &[u8]) -> Option<Vec<(PathBuf, Secret)>> {
    let mut part = || {
        let (length, rest) = bytes.split_first_chunk()?;
        let (part, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        bytes = rest;
        Some(part)
    };
    let mut typed = Vec::new();
    while let Some(name) = part() {
        typed.push((PathBuf::from(OsStr::from_bytes(name)), Secret::copy_of(part()?)));
    }
    Some(typed)
}

/// Takes the keys that another process was told, which has [`packed`] them to our standard input.
///
/// # Errors
/// A line that says why they cannot be read.
pub(super) fn read_typed(into: &Typed) -> Result<(), String> {
    let mut bytes = Secret::zeroed(MOST_TYPED);
    let mut length = 0;
    let mut input = io::stdin().lock();
    while length < bytes.len() {
        // Not through a buffer of the library's, which nobody would wipe.
        match rustix::io::read(&mut input, &mut bytes[length..]) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(format!("reading keys: {e}")),
        }
    }
    let typed = unpacked(&bytes[..length]).ok_or("the keys at the standard input make no sense")?;
    typed.into_iter().for_each(|(name, key)| into.add(name, key));
    Ok(())
}

/// `NAME=FILE`.
pub(super) fn named(value: &str) -> Result<(PathBuf, PathBuf), String> {
    match value.split_once('=') {
        Some((name, file)) if !name.is_empty() && !file.is_empty() => {
            Ok((name.into(), file.into()))
        }
        _ => Err("an image's name and a file are wanted: NAME=FILE".into()),
    }
}

/// Asks for a key at the terminal, if there is one.
fn ask(image: &Path) -> Option<Secret> {
    if !io::stdin().is_terminal() {
        return None;
    }
    let image = plain(&image.to_string_lossy());
    let mut typed = rpassword::prompt_password(format!("Key for {image}: ")).ok()?;
    let secret = Secret::copy_of(typed.as_bytes());
    typed.zeroize();
    Some(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_is_given_with_the_name_of_its_image() {
        assert_eq!(named("a/b=/k=1").unwrap(), ("a/b".into(), "/k=1".into()));
        for wrong in ["", "disk", "=file", "disk="] {
            assert!(named(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn typed_keys_reach_another_process_as_they_are() {
        let typed = [("a b.qcow2", "x\0\n"), ("c/d.qcow2", "")];
        let typed = typed.map(|(n, key)| (PathBuf::from(n), Secret::copy_of(key.as_bytes())));
        let bytes = packed(&typed);
        let found = unpacked(&bytes).unwrap();
        assert_eq!(found.len(), 2);
        for (found, expected) in found.iter().zip(&typed) {
            assert_eq!((&found.0, &*found.1), (&expected.0, &*expected.1));
        }
        assert!(unpacked(&bytes[..bytes.len() - 1]).is_none());
        assert!(unpacked(b"").unwrap().is_empty());
    }
}
