//! The extents of an image file: what the image says of its clusters, and the host of its blocks.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use serde::Serialize;

use crate::check::{self, Content, Survey, Watch};
use crate::error::{Error, Result};
use crate::storage::{HostFile, Storage};

/// What a part of the file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    Metadata,
    Data,
    Shared,
    Compressed,
    /// Data that reads as zeros and takes no space.
    Unwritten,
    Junk,
    /// Counted, referred to by nothing, and without space on the host.
    Ready,
    Free,
    Hole,
}

impl Kind {
    pub(super) const COUNT: usize = 9;
    /// In the order of the legend.
    pub(super) const ALL: [Kind; Kind::COUNT] = [
        Kind::Metadata,
        Kind::Data,
        Kind::Shared,
        Kind::Compressed,
        Kind::Unwritten,
        Kind::Junk,
        Kind::Ready,
        Kind::Free,
        Kind::Hole,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Metadata => "metadata",
            Kind::Data => "data",
            Kind::Shared => "shared",
            Kind::Compressed => "compressed",
            Kind::Unwritten => "unwritten",
            Kind::Junk => "junk",
            Kind::Ready => "ready",
            Kind::Free => "free",
            Kind::Hole => "hole",
        }
    }

    /// Whether the host has blocks for it.
    pub(super) fn takes_space(self) -> bool {
        !matches!(self, Kind::Unwritten | Kind::Ready | Kind::Hole)
    }

    fn of(content: Content, has_blocks: bool) -> Kind {
        match (content, has_blocks) {
            // A table may be a hole in part; that it is one says more.
            (Content::Metadata, _) => Kind::Metadata,
            (Content::Data, true) => Kind::Data,
            (Content::Shared, true) => Kind::Shared,
            (Content::Compressed, true) => Kind::Compressed,
            (Content::Data | Content::Shared | Content::Compressed, false) => Kind::Unwritten,
            (Content::Unreferenced, true) => Kind::Junk,
            (Content::Unreferenced, false) => Kind::Ready,
            (Content::Free, true) => Kind::Free,
            (Content::Free, false) => Kind::Hole,
        }
    }
}

/// A part of the file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Extent {
    pub(super) start: u64,
    pub(super) length: u64,
    pub(super) kind: Kind,
}

/// Adds an extent to those before it, as a part of the last one where it goes on.
pub(super) fn join(all: &mut Vec<Extent>, extent: Extent) {
    match all.last_mut() {
        Some(last) if last.kind == extent.kind && last.start + last.length == extent.start => {
            last.length += extent.length;
        }
        _ => all.push(extent),
    }
}

/// Tells `see` the extents of the image in ascending order.
///
/// # Errors
/// Those of [`check::survey`] and of the host.
pub(super) fn of(file: File, watch: &dyn Watch, mut see: impl FnMut(Extent)) -> Result<Survey> {
    let host = |e| Error::io("asking the host for the file's blocks", e);
    let mut blocks = Blocks::new(file.try_clone().map_err(host)?);
    let storage = HostFile::new(file);
    let length = storage.len().map_err(host)?;
    let mut cluster_bits = None;
    check::survey(&storage, watch, |clusters, content| {
        let bits = match cluster_bits {
            Some(bits) => bits,
            None => {
                let bits = crate::image::Image::header(&storage)?.geometry.cluster_bits();
                *cluster_bits.insert(bits)
            }
        };
        let (mut at, end) = (clusters.start << bits, (clusters.end << bits).min(length));
        while at < end {
            let (has_blocks, until) = blocks.at(at).map_err(host)?;
            let until = until.min(end);
            see(Extent { start: at, length: until - at, kind: Kind::of(content, has_blocks) });
            at = until;
        }
        Ok(())
    })
}

/// Where a file has blocks on the host, asked in ascending order.
struct Blocks {
    file: File,
    /// Where the last look was, and whether there are blocks.
    known: (Range<u64>, bool),
}

impl Blocks {
    fn new(file: File) -> Blocks {
        Blocks { file, known: (0..0, false) }
    }

    /// Whether there are blocks at `offset`, and up to where that is so.
    fn at(&mut self, offset: u64) -> io::Result<(bool, u64)> {
        if !self.known.0.contains(&offset) {
            let data = self.seek(offset, libc::SEEK_DATA)?;
            self.known = match data == offset {
                true => (offset..self.seek(offset, libc::SEEK_HOLE)?.max(offset + 1), true),
                false => (offset..data, false),
            };
        }
        Ok((self.known.1, self.known.0.end))
    }

    /// lseek(2); past the last data the end of all files, and all is data where the host cannot tell.
    fn seek(&self, offset: u64, whence: i32) -> io::Result<u64> {
        let from = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        // SAFETY: lseek takes no pointers. It moves the file position, which nothing here uses.
        let found = unsafe { libc::lseek(self.file.as_raw_fd(), from, whence) };
        if let Ok(found) = u64::try_from(found) {
            return Ok(found);
        }
        let error = io::Error::last_os_error();
        match (error.raw_os_error(), whence) {
            (Some(libc::ENXIO), _) | (Some(libc::EINVAL), libc::SEEK_HOLE) => Ok(u64::MAX),
            (Some(libc::EINVAL), _) => Ok(offset),
            _ => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_that_go_on_are_joined() {
        let mut all = Vec::new();
        let extent = |start, length, kind| Extent { start, length, kind };
        for next in [
            extent(0, 10, Kind::Metadata),
            extent(10, 5, Kind::Data),
            extent(15, 5, Kind::Data),
            extent(20, 1, Kind::Hole),
            extent(30, 1, Kind::Hole),
        ] {
            join(&mut all, next);
        }
        let lengths: Vec<_> = all.iter().map(|extent| (extent.start, extent.length)).collect();
        assert_eq!(lengths, [(0, 10), (10, 10), (20, 1), (30, 1)]);
    }

    #[test]
    fn blocks_and_holes_of_a_file_are_told_apart() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 << 20).unwrap();
        file.write_all_at(&[1; 65536], 1 << 20).unwrap();
        let mut blocks = Blocks::new(file);
        assert_eq!(blocks.at(0).unwrap(), (false, 1 << 20));
        assert_eq!(blocks.at(4096).unwrap(), (false, 1 << 20));
        let (has_blocks, until) = blocks.at(1 << 20).unwrap();
        assert!(has_blocks && ((1 << 20) + 65536..=2 << 20).contains(&until), "{until}");
        assert_eq!(blocks.at(until).unwrap(), (false, u64::MAX));
    }
}
