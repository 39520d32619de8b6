//! One error for the whole crate: what kind it is, what was being done, and what to do.
//!
//! Errors are built where the fact is known and logged once, at the edge. The kind is what code
//! matches on; the text is one line for a person: lower case, no full stop, offsets in hex, the
//! structure named. The errno that a file system caller sees is decided here and nowhere else.

use std::fmt;
use std::io;

/// The result of everything that can fail in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What an error is, for code that has to decide something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// A host operation failed; the source has its errno.
    Io,
    /// The file is not a qcow2 image, or its header makes no sense.
    NotQcow2,
    /// Something inside the image contradicts the format or itself.
    Corrupt,
    /// The image is sound but uses a feature that is not served.
    Unsupported,
    /// Another process uses the image, or somebody reads the snapshot.
    InUse,
    /// The image is encrypted and its key was not given.
    NoKey,
    /// The image is encrypted with another key.
    WrongKey,
    /// A snapshot of that name or id is not there.
    NotFound,
    /// A snapshot of that name is there already.
    Exists,
    /// The image or the mount may not be written to.
    ReadOnly,
    /// What was asked for makes no sense (ranges, sizes, options).
    Invalid,
    /// A size past what the format or the limits allow.
    TooBig,
}

/// A name of an image, which may be 64 KiB of anything, as a message shows it: in one line, of which
/// that is a part.
pub fn legible(name: &[u8]) -> String {
    /// As long as a file's name with its path may be in an image.
    const MOST: usize = 1023;
    let start = &name[..name.len().min(MOST)];
    let rest = if name.len() > MOST { "..." } else { "" };
    format!("{}{rest}", String::from_utf8_lossy(start).escape_debug())
}

/// An error: see the module's documentation for how the text reads.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<io::Error>,
}

impl Error {
    /// An error of `kind` that reads `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into(), source: None }
    }

    /// The image contradicts the format or itself.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Error::new(ErrorKind::Corrupt, message)
    }

    /// What the caller asked for makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Error::new(ErrorKind::Invalid, message)
    }

    /// A host operation failed while doing `what` (a present participle: `writing L2 table at
    /// 0x50000`).
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        Error { kind: ErrorKind::Io, message: what.into(), source: Some(source) }
    }

    /// The same error, with what it concerns put in front (`disk.qcow2`).
    #[must_use]
    pub fn context(mut self, subject: impl fmt::Display) -> Self {
        self.message = format!("{subject}: {}", self.message);
        self
    }

    /// What kind of error it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The errno that a file system caller sees.
    pub fn errno(&self) -> i32 {
        match self.kind {
            ErrorKind::Io => {
                self.source.as_ref().and_then(io::Error::raw_os_error).unwrap_or(libc::EIO)
            }
            ErrorKind::NotQcow2 | ErrorKind::Invalid => libc::EINVAL,
            ErrorKind::Corrupt => libc::EIO,
            ErrorKind::Unsupported => libc::EOPNOTSUPP,
            ErrorKind::InUse => libc::EBUSY,
            ErrorKind::NoKey => libc::ENOKEY,
            ErrorKind::WrongKey => libc::EKEYREJECTED,
            ErrorKind::NotFound => libc::ENOENT,
            ErrorKind::Exists => libc::EEXIST,
            ErrorKind::ReadOnly => libc::EROFS,
            ErrorKind::TooBig => libc::EFBIG,
        }
    }

    /// Another error that says the same, for a second caller of one failed operation.
    pub fn duplicate(&self) -> Self {
        let source = self.source.as_ref().map(|e| match e.raw_os_error() {
            Some(code) => io::Error::from_raw_os_error(code),
            None => io::Error::new(e.kind(), e.to_string()),
        });
        Error { kind: self.kind, message: self.message.clone(), source }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Some(source) => write!(f, "{}: {source}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|e| e as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_name_a_part_is_shown_in_one_line() {
        assert_eq!(legible(b"a name\n"), "a name\\n");
        let long = legible(&[0; 65535]);
        assert!(long.len() < 8192 && long.ends_with("..."), "{} bytes", long.len());
        assert_eq!(legible(&[b'a'; 1023]).len(), 1023);
    }
}
