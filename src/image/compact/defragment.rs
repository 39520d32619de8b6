//! Laying the file out in guest order.
//!
//! All that the disk maps is first moved behind the end of the file, in any order. Then nothing but
//! a few structures is left before it, and an ordinary pass, which walks the disk from its start and
//! takes the first free cluster each time, brings everything back in the disk's order. Each half is
//! made of the moves that compaction is made of, so this may be killed at any moment as well. On the
//! host the image takes little more than before, since what was moved is punched as it goes; its
//! length doubles meanwhile.

use super::{CompactionStatus, Prospect, Purpose, Ran};
use crate::error::Result;
use crate::image::Image;
use crate::tables::Run;

impl Image {
    /// Lays the disk's clusters out in its own order, and makes the file as short as it gets.
    /// `progress` is told now and then how far it is, and ends it by answering `false`. Nobody else
    /// should use the image meanwhile, or the order is not kept.
    ///
    /// # Errors
    /// As [`Image::compact`].
    pub fn defragment(&self, mut progress: impl FnMut(&CompactionStatus) -> bool) -> Result<()> {
        self.settle()?;
        let prospect = self.prospect()?;
        if prospect.win() > 0 || !self.is_in_guest_order()? {
            let everything = Prospect { used: prospect.end, behind: prospect.used, ..prospect };
            let ran = self.run_pass(Purpose::Evacuate, everything, &mut progress)?;
            if ran == Ran::Stopped {
                return Ok(());
            }
        }
        self.compact(progress)
    }

    fn is_in_guest_order(&self) -> Result<bool> {
        let (mut at, mut last, size) = (0, 0, self.virtual_size());
        while at < size {
            let (run, end) = self.note(self.run_at(at, size))?;
            let place = match run {
                Run::Data { first, .. } if !self.data.is_external => {
                    self.geometry.host_offset(first).0
                }
                Run::Compressed { offset, .. } => offset.0,
                _ => last,
            };
            if place < last {
                return Ok(false);
            }
            last = place;
            at = end;
        }
        Ok(true)
    }
}
