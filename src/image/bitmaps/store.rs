//! Storing the bitmaps when the image is closed.
//!
//! ```text
//! new clusters: bitmap data that has changed, a table for each bitmap, a directory
//! write refcount blocks, sync
//! one word of the header: the directory is there now
//! sync
//! the old directory, the old tables, and the data that was replaced are free
//! ```
//! Until that word is durable the old directory counts, which says that the bitmaps are in use;
//! from then on the new one, which is complete. So an error anywhere leaves them inconsistent, at
//! worst, and never wrong.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::{Bitmaps, Directory, Recording, UNTOUCHED, read_table};
use crate::error::{Error, Result};
use crate::format::{BitmapBits, BitmapEntry, Header, HostCluster, HostOffset, MAX_BITMAP_BYTES};
use crate::image::{Image, Writer};
use crate::recycler::{Recycler, Rooted};
use crate::rules::Rule;

/// What a directory that is not in force yet refers to, and what it does not refer to any more.
#[derive(Default)]
struct Change<'a> {
    taken: Vec<Rooted<'a>>,
    left: Vec<Range<u64>>,
}

impl<'a> Change<'a> {
    /// Consecutive clusters for `bytes` bytes.
    fn take(&mut self, recycler: &'a Recycler, bytes: u64, cluster_size: u64) -> Result<u64> {
        let rooted = recycler.take_run(bytes.div_ceil(cluster_size))?;
        let first = rooted.first().0;
        self.taken.push(rooted);
        Ok(first)
    }
}

impl Image {
    /// Stores what was recorded and marks the bitmaps as in use no more. Everything else is durable;
    /// nothing changes the disk any more. What cannot be stored stays marked.
    pub(in crate::image) fn store_bitmaps(&self, writer: &Writer) {
        let Some(bitmaps) = &writer.bitmaps else { return };
        if bitmaps.marked.swap(UNTOUCHED, Ordering::AcqRel) == UNTOUCHED {
            return;
        }
        if bitmaps.is_distrusted.load(Ordering::Acquire) {
            log::warn!(
                "the image's bitmaps are inconsistent from now on: something else refers to their \
                 clusters too, run `qcow2fs check`"
            );
            return;
        }
        let mut directory = bitmaps.directory.lock();
        if let Err(e) = self.store_directory(writer, bitmaps, &mut directory) {
            log::warn!(
                "the image's bitmaps are inconsistent from now on, storing them failed: {e}"
            );
        }
    }

    fn store_directory(
        &self,
        writer: &Writer,
        bitmaps: &Bitmaps,
        directory: &mut Directory,
    ) -> Result<()> {
        let mut new = directory.clone();
        let mut change = Change::default();
        let mut any = false;
        for (index, entry) in new.entries.iter_mut().enumerate().filter(|(_, e)| e.is_ours) {
            let recording = bitmaps.recording.iter().find(|r| r.index == index);
            if self.store_bitmap(writer, bitmaps, recording, &mut entry.bitmap, &mut change)? {
                entry.bitmap.in_use = false;
                entry.is_ours = false;
                entry.bitmap.update(&mut new.bytes[entry.at..]);
                any = true;
            } else {
                log::warn!("{} is inconsistent from now on: it is too large", entry.bitmap);
            }
        }
        if !any {
            return Ok(());
        }
        let length = new.bytes.len() as u64;
        new.offset = self.store_run(writer, &mut change, &new.bytes)?;
        change.left.push(self.geometry.host_clusters(directory.offset, length));
        self.write_refcounts(writer, Some(Rule::BitmapsBeforeHeader))?;
        self.switch(writer, bitmaps, change, new.offset)?;
        *directory = new;
        Ok(())
    }

    /// Puts the new directory in force.
    fn switch(
        &self,
        writer: &Writer,
        bitmaps: &Bitmaps,
        change: Change<'_>,
        directory: HostOffset,
    ) -> Result<()> {
        let patch = Header::patch_bitmap_directory(&bitmaps.extension, directory);
        let written = self.storage.write_at(&patch.bytes, patch.offset.0);
        // Whichever directory it is after an error, what it refers to is there.
        for rooted in change.taken {
            let count = rooted.count();
            rooted.linked(count);
        }
        written.map_err(|e| Error::io("writing the header's bitmaps extension", e))?;
        self.sync_for(writer, Rule::BitmapSwitchBeforeReuse)?;
        change.left.into_iter().for_each(|clusters| {
            self.tables.metadata().give_up(clusters.clone());
            writer.recycler.release(clusters);
        });
        Ok(())
    }

    /// Stores one bitmap anew, as far as it differs from what is stored, for the disk as large as it
    /// is now. `false` where that is too large, or not all was recorded.
    fn store_bitmap<'a>(
        &self,
        writer: &'a Writer,
        bitmaps: &Bitmaps,
        recording: Option<&Recording>,
        bitmap: &mut BitmapEntry,
        change: &mut Change<'a>,
    ) -> Result<bool> {
        let size = self.virtual_size();
        let entries = bitmap.table_entries_for(size, &self.geometry);
        let is_complete = !bitmap.auto || recording.is_some_and(|r| !r.changed.is_lost());
        if entries == 0
            || entries > MAX_BITMAP_BYTES >> self.geometry.cluster_bits()
            || !is_complete
        {
            return Ok(false);
        }
        let old = read_table(&*self.storage, &self.geometry, bitmap)?;
        let old_bits = bitmap.bits_for(bitmaps.least_size.load(Ordering::Acquire));
        let bits = bitmap.bits_for(size);
        let mut table = Vec::new();
        for (n, first) in (0..entries).zip((0..bits).step_by(self.bits_per_cluster() as usize)) {
            let piece = Piece {
                stored: old.get(n as usize).copied().unwrap_or(BitmapBits::Zeros),
                bits: first..bits.min(first + self.bits_per_cluster()),
                stored_end: old_bits,
            };
            table.push(self.store_piece(writer, recording, &piece, change)?);
        }
        let kept = table.iter().chain(std::iter::repeat(&BitmapBits::Zeros));
        let replaced = old.iter().zip(kept).filter(|(old, new)| old != new);
        change.left.extend(replaced.filter_map(|(old, _)| match old {
            BitmapBits::Stored(cluster) => Some(cluster.0..cluster.0 + 1),
            BitmapBits::Zeros | BitmapBits::Ones => None,
        }));
        if table != old {
            let old_bytes = old.len() as u64 * 8;
            change.left.push(self.geometry.host_clusters(bitmap.table_offset, old_bytes));
            let words = table.iter().map(|bits| bits.encode(&self.geometry).to_be_bytes());
            let bytes = words.flatten().collect::<Vec<_>>();
            bitmap.table_offset = self.store_run(writer, change, &bytes)?;
            bitmap.table_entries = entries as u32;
        }
        Ok(true)
    }

    /// What a table has to say of one cluster's worth of bits.
    fn store_piece<'a>(
        &self,
        writer: &'a Writer,
        recording: Option<&Recording>,
        piece: &Piece,
        change: &mut Change<'a>,
    ) -> Result<BitmapBits> {
        let changed = recording.map(|r| &r.changed).filter(|set| set.may_have(&piece.bits));
        let is_cut = piece.stored_end < piece.bits.end && piece.stored != BitmapBits::Zeros;
        if changed.is_none() && !is_cut {
            return Ok(piece.stored);
        }
        let old = self.stored_bits(piece.stored)?;
        let mut new = old.clone();
        clear_from(&mut new, piece.stored_end.saturating_sub(piece.bits.start));
        if let Some(set) = changed {
            set.add_to(piece.bits.start, &mut new);
        }
        let count = piece.bits.end - piece.bits.start;
        clear_from(&mut new, count);
        if new.iter().all(|&byte| byte == 0) {
            return Ok(BitmapBits::Zeros);
        }
        if new.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>() == count {
            return Ok(BitmapBits::Ones);
        }
        if new == old {
            return Ok(piece.stored);
        }
        let place = self.store_run(writer, change, &new)?;
        Ok(BitmapBits::Stored(self.geometry.host_cluster(place)))
    }

    fn stored_bits(&self, stored: BitmapBits) -> Result<Vec<u8>> {
        let size = self.geometry.cluster_size() as usize;
        match stored {
            BitmapBits::Zeros => Ok(vec![0; size]),
            BitmapBits::Ones => Ok(vec![0xff; size]),
            BitmapBits::Stored(cluster) => {
                let at = self.geometry.host_offset(cluster);
                let mut bytes = vec![0; size];
                self.storage
                    .read_at(&mut bytes, at.0)
                    .map_err(|e| Error::io(format!("reading bitmap data at {at}"), e))?;
                Ok(bytes)
            }
        }
    }

    /// Writes `bytes` to new clusters, the rest of the last one zeros; where they start.
    fn store_run<'a>(
        &self,
        writer: &'a Writer,
        change: &mut Change<'a>,
        bytes: &[u8],
    ) -> Result<HostOffset> {
        let size = self.geometry.cluster_size();
        let first = change.take(&writer.recycler, bytes.len() as u64, size)?;
        let at = self.geometry.host_offset(HostCluster(first));
        let mut whole = bytes.to_vec();
        whole.resize(whole.len().next_multiple_of(size as usize), 0);
        self.storage
            .write_at(&whole, at.0)
            .map_err(|e| Error::io(format!("writing bitmaps at {at}"), e))?;
        Ok(at)
    }

    fn bits_per_cluster(&self) -> u64 {
        self.geometry.cluster_size() * 8
    }
}

/// One cluster's worth of a bitmap.
struct Piece {
    /// What is stored of it.
    stored: BitmapBits,
    /// The bits that it has.
    bits: Range<u64>,
    /// The bit of the bitmap from which on nothing is stored, whatever is there.
    stored_end: u64,
}

/// Clears the bits from number `first` on.
fn clear_from(bits: &mut [u8], first: u64) {
    let whole = first.div_ceil(8).min(bits.len() as u64) as usize;
    bits[whole..].fill(0);
    if let Some(last) = bits.get_mut((first / 8) as usize)
        && !first.is_multiple_of(8)
    {
        *last &= u8::MAX >> (8 - first % 8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_cleared_from_any_number_on() {
        for first in 0..=40 {
            let mut bits = vec![0xff; 4];
            clear_from(&mut bits, first);
            let set = bits.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
            assert_eq!(set, first.min(32));
            assert_eq!(u32::from_le_bytes(bits.try_into().unwrap()).trailing_ones() as u64, set);
        }
    }
}
