//! Reading, and telling data from holes.

use std::cell::RefCell;
use std::ops::Range;

use super::{Image, inflate};
use crate::error::{Error, Result};
use crate::format::HostOffset;
use crate::tables::Run;

impl Image {
    /// Fills `buf` from guest offset `offset`. What lies past the end reads as zeros.
    ///
    /// # Errors
    /// Host errors; `Corrupt` where the tables make no sense.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let range = self.within_disk(offset..offset.saturating_add(buf.len() as u64));
        let (buf, past_end) = buf.split_at_mut((range.end - range.start) as usize);
        past_end.fill(0);
        // Where nothing is ever written, as in a backing file, no mapping needs to be pinned.
        let _guard =
            self.writer.is_some().then(|| self.locks.shared(self.geometry.guest_clusters(&range)));
        let mut at = range.start;
        while at < range.end {
            let (run, end) = self.note(self.run_at(at, range.end))?;
            let piece = &mut buf[(at - range.start) as usize..(end - range.start) as usize];
            match run {
                Run::Data { first, .. } => {
                    let host = self.host_offset(first, at);
                    self.storage
                        .read_at(piece, host)
                        .map_err(|e| Error::io(format!("reading data at {host:#x}"), e))?;
                }
                Run::Compressed { offset, length } => {
                    self.read_compressed(offset, length, self.geometry.within(at), piece)?;
                }
                Run::Backing => self.read_backing(at, piece)?,
                Run::Unallocated | Run::Zero => piece.fill(0),
            }
            at = end;
        }
        Ok(())
    }

    /// The first offset at or after `offset` that is data, here or in the backing file; `None`
    /// where only holes follow.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        Ok(self.next_extent(offset)?.map(|extent| extent.start))
    }

    /// The first offset at or after `offset` that reads as zeros by the tables alone; the virtual
    /// size where data goes on to the end.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn next_hole(&self, offset: u64) -> Result<u64> {
        let mut at = offset;
        while let Some(extent) = self.next_extent(at)? {
            if extent.start > at {
                break;
            }
            at = extent.end;
        }
        Ok(at.min(self.virtual_size()))
    }

    /// The first range of data that ends after `offset`, as far as one look tells.
    fn next_extent(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let size = self.virtual_size();
        let mut at = offset;
        while at < size {
            // Entries are decoded whole under the tables' lock and nothing is read through them,
            // so no guest clusters need to be held.
            let (run, end) = self.note(self.run_at(at, size))?;
            match run {
                Run::Data { .. } | Run::Compressed { .. } => return Ok(Some(at..end)),
                Run::Backing => {
                    if let Some((start, end)) = self.backing_data(at, end)? {
                        return Ok(Some(start..end));
                    }
                }
                Run::Unallocated | Run::Zero => {}
            }
            at = end;
        }
        Ok(None)
    }

    /// Fills `buf` from the compressed cluster at `offset`, from its byte `within` on.
    pub(super) fn read_compressed(
        &self,
        offset: HostOffset,
        length: u64,
        within: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        if buf.len() as u64 == self.cluster_size() {
            return self.inflate(offset, length, buf);
        }
        let inflate = || {
            let mut cluster = vec![0; self.cluster_size() as usize].into_boxed_slice();
            self.inflate(offset, length, &mut cluster).map(|()| cluster)
        };
        let within = within as usize;
        self.inflated.with(offset, inflate, |cluster| {
            buf.copy_from_slice(&cluster[within..within + buf.len()])
        })
    }

    /// Reads and inflates a whole cluster into `cluster`.
    fn inflate(&self, offset: HostOffset, length: u64, cluster: &mut [u8]) -> Result<()> {
        thread_local!(static COMPRESSED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
        COMPRESSED.with_borrow_mut(|compressed| {
            compressed.resize(length as usize, 0);
            self.storage
                .read_at(compressed, offset.0)
                .map_err(|e| Error::io(format!("reading compressed data at {offset}"), e))?;
            inflate::inflate(self.compression, compressed, cluster)
                .map_err(|e| Error::io(format!("inflating the compressed cluster at {offset}"), e))
        })
    }
}
