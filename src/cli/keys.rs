//! Keys of encrypted images as the commands take them: in files, never as arguments.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use zeroize::Zeroize;

use crate::catalog::Keys;
use crate::crypt::Secret;

/// What the commands that open images have in common.
#[derive(clap::Args, Clone, Debug, Default)]
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
            prompt: None,
        })
    }
}

/// [`Args::keys`], and who sits at the terminal.
pub(super) fn or_ask(args: &Args) -> Result<Keys, String> {
    Ok(Keys { prompt: Some(ask), ..args.clone().keys()? })
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
    if !std::io::stdin().is_terminal() {
        return None;
    }
    let mut typed = rpassword::prompt_password(format!("Key for {}: ", image.display())).ok()?;
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
}
