//! Telling data from holes, through a chain of files.
//!
//! A search goes through the runs of the disk, and through those of the backing file where it shows, no
//! further than it shows: each file of a chain is looked at once over what the search covers, however
//! many short runs the files above it have.
//!
//! Images come from strangers, and one of a few KiB may have runs beyond number: a search has what
//! [`Looks`] says for all files of the chain together.

use std::ops::{ControlFlow, Range};

use super::Image;
use crate::error::Result;
use crate::format::HostCluster;
use crate::tables::{Look, Run};

/// What one search may go through, in bytes of L2 tables: those of 256 GiB in clusters of 64 KiB. That
/// takes about a tenth of a second where the host has them in memory, and keeps one thread busy.
const MOST_BYTES: u64 = 32 << 20;
/// Each look takes as long as going through so many bytes, beside those that it goes through.
const ONE_LOOK: u64 = 64;
/// And asking the host where a file has data.
const ONE_HOST_LOOK: u64 = 512;

/// What is left of what one search may look at, in all files of a chain. What follows when it is used up
/// counts as data, of which the first offset is where data begins. Who looks for a hole is told that there
/// is one, of no length, and asks anew: whoever copies the disk looks for data there, and for the next
/// hole then.
#[derive(Debug)]
pub struct Looks {
    bytes: u64,
    /// From here on nobody has looked.
    used_up_at: Option<u64>,
}

impl Looks {
    fn new() -> Self {
        Looks { bytes: MOST_BYTES, used_up_at: None }
    }

    /// Whether none is left, at guest offset `at`.
    fn are_used_up_at(&mut self, at: u64) -> bool {
        let are_used_up = self.bytes == 0;
        if are_used_up {
            self.used_up_at.get_or_insert(at);
        }
        are_used_up
    }

    fn spend(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// The host is asked where a file has data.
    pub(super) fn ask_host(&mut self) {
        self.spend(ONE_HOST_LOOK);
    }
}

/// Is shown one range of data after the other, and says whether to go on.
pub type Visit<'a> = dyn FnMut(Range<u64>) -> ControlFlow<()> + 'a;

impl Image {
    /// The first offset at or after `offset` that is data, here or in the backing file; `None`
    /// where only holes follow. What follows very many of them counts as data.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        let mut found = None;
        let _ended = self.each_extent(offset..u64::MAX, &mut Looks::new(), &mut |extent| {
            found = Some(extent.start);
            ControlFlow::Break(())
        })?;
        Ok(found)
    }

    /// The first offset at or after `offset` that reads as zeros by the tables alone; the virtual
    /// size where data goes on to the end. After data in very many places it is a hole of no length.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn next_hole(&self, offset: u64) -> Result<u64> {
        let (mut at, mut looks) = (offset, Looks::new());
        let _ended = self.each_extent(offset..u64::MAX, &mut looks, &mut |extent| {
            if extent.start > at {
                return ControlFlow::Break(());
            }
            at = extent.end;
            ControlFlow::Continue(())
        })?;
        // Who asks anew there must get on.
        let nobody_looked = looks.used_up_at.filter(|end| *end > offset).unwrap_or(u64::MAX);
        Ok(at.min(nobody_looked).min(self.virtual_size()))
    }

    /// Shows `visit` the ranges of data in `range`, in ascending order, here and in the backing file.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub(super) fn each_extent(
        &self,
        range: Range<u64>,
        looks: &mut Looks,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>> {
        let range = self.within_disk(range);
        let mut at = range.start;
        while at < range.end {
            if looks.are_used_up_at(at) {
                return Ok(visit(at..range.end));
            }
            let (run, end) = self.look_at(at, range.end, looks)?;
            let flow = match run {
                // Where every cluster has its place, holes in the file are as good as those in
                // the tables, unless they are encrypted.
                Run::Data { first, .. } if self.data.is_external && self.data.cipher.is_none() => {
                    self.extent_in_file(first, at..end, looks, visit)?
                }
                Run::Data { .. } | Run::Compressed { .. } => visit(at..end),
                Run::Backing => self.backing_extents(at..end, looks, visit)?,
                Run::Unallocated | Run::Zero => ControlFlow::Continue(()),
            };
            if flow.is_break() {
                return Ok(flow);
            }
            at = end;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The run at guest offset `at` and where it ends, at most `end`.
    fn look_at(&self, at: u64, end: u64, looks: &mut Looks) -> Result<(Run, u64)> {
        // Entries are decoded whole under the tables' lock and nothing is read through them,
        // so no guest clusters need to be held.
        let clusters = self.geometry.guest_clusters(&(at..end));
        let Look { mapping, count, bytes } = self.note(self.tables.look(clusters))?;
        looks.spend(ONE_LOOK + bytes);
        let (mapping, end) = self.shown(mapping, count, at, end);
        Ok(self.run_of(mapping, at, end))
    }

    /// Shows what follows the first data that the external data file has in `range`, whose first cluster
    /// is `first`.
    fn extent_in_file(
        &self,
        first: HostCluster,
        range: Range<u64>,
        looks: &mut Looks,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>> {
        looks.ask_host();
        let found = self.seek_data(self.host_offset(first, range.start))?;
        let found = found.filter(|start| *start < range.end);
        Ok(found.map_or(ControlFlow::Continue(()), |start| visit(start..range.end)))
    }
}
