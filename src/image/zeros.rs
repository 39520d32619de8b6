//! Data that is nothing but zeros: found by reading it, and given back.

use std::ops::Range;

use super::write::is_all_zero;
use super::{Image, Writer};
use crate::error::Result;
use crate::tables::Run;

/// So much is looked at while guest clusters are held, and one cluster at least.
const STEP: u64 = 1 << 20;

impl Image {
    /// Reads the data that this image alone holds, in the order of the disk, and gives back whole
    /// clusters of zeros; an image that is open read-only only counts them. Returns their bytes, on
    /// the disk. `progress` is told now and then up to where the disk was looked at, and ends it by
    /// answering `false`.
    ///
    /// What snapshots may share is left alone: it stays in the file, whatever becomes of the disk. So
    /// is what lies in an external data file.
    ///
    /// # Errors
    /// Host errors, `Corrupt`. What was given back until then stays so.
    pub fn free_zeros(&self, mut progress: impl FnMut(u64) -> bool) -> Result<u64> {
        if self.geometry.data_file() {
            return Ok(0);
        }
        let has_snapshots = super::open::read_header(&*self.storage)?.snapshot_count > 0;
        let step = STEP.max(self.cluster_size());
        let (mut at, mut found) = (0, 0);
        // Data is far between on most disks.
        while let Some(data) = self.next_data(at)? {
            at = data - self.geometry.within(data);
            let end = self.virtual_size().min((at / step + 1) * step);
            found += match &self.writer {
                Some(_) => {
                    let writer = self.begin_change()?;
                    let _guard = self.locks.exclusive(self.geometry.guest_clusters(&(at..end)));
                    self.note(self.free_zeros_held(Some(writer), has_snapshots, at..end))?
                }
                None => self.free_zeros_held(None, has_snapshots, at..end)?,
            };
            at = end;
            if !progress(at) {
                break;
            }
        }
        Ok(found)
    }

    /// The same for `range`, whole clusters that are held exclusively where there is a `writer`.
    fn free_zeros_held(
        &self,
        writer: Option<&Writer>,
        has_snapshots: bool,
        range: Range<u64>,
    ) -> Result<u64> {
        let (mut at, mut found) = (range.start, 0);
        while at < range.end {
            let (run, run_end) = self.run_at(at, range.end)?;
            let end = match run {
                Run::Data { copied: true, .. } | Run::Compressed { .. } => {
                    run_end.min(self.cluster_end(at))
                }
                _ => run_end,
            };
            // Whether a snapshot has a compressed cluster too, no refcount tells.
            let may_be_shared = has_snapshots && matches!(run, Run::Compressed { .. });
            if !may_be_shared && self.is_own_zeros(run, at, end - at)? {
                found += end - at;
                if let Some(writer) = writer {
                    self.clear_held(writer, at..end)?;
                }
            }
            at = end;
        }
        Ok(found)
    }

    /// Whether `run` starts with a cluster of its own that holds nothing but zeros; `length` bytes of
    /// it lie within the disk.
    fn is_own_zeros(&self, run: Run, at: u64, length: u64) -> Result<bool> {
        let mut bytes = vec![0; length as usize];
        match run {
            Run::Data { first, copied: true } => {
                self.read_data(&mut bytes, self.location(first, at))?;
            }
            // Version 2 needs a data cluster of zeros instead where there is a backing file.
            Run::Compressed { offset, length }
                if self.geometry.version() > 2 || !self.is_backed(at) =>
            {
                self.read_compressed(offset, length, 0, &mut bytes)?;
            }
            _ => return Ok(false),
        }
        Ok(is_all_zero(&bytes))
    }
}
