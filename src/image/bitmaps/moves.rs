//! Moving bitmaps away from the end of the file. Data first, then tables, then the directory:
//!
//! ```text
//! copy what lies behind the end to free clusters
//! write refcount blocks, sync
//! one word for each copy: it is there now
//! the old clusters are junk, which the next flush releases when it has synced
//! ```
//! There are few of them, so each kind is one step; whether they are in use by us does not matter.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::{Bitmaps, Directory, read_table};
use crate::error::{Error, Result};
use crate::format::{BitmapBits, Header, HostCluster, HostOffset, Patch};
use crate::image::{Image, Writer};
use crate::rules::Rule;

/// Copies that nothing refers to yet.
#[derive(Default)]
struct Copies {
    /// What makes them count, each within one sector.
    words: Vec<Patch>,
    left: Vec<Range<u64>>,
}

impl Image {
    /// Moves what of the bitmaps lies at or behind cluster `end` to before it, as far as there is
    /// room; whether all of it was moved. The flush lock is held.
    pub(in crate::image) fn move_bitmaps(&self, writer: &Writer, end: u64) -> Result<bool> {
        let Some(bitmaps) = &writer.bitmaps else { return Ok(true) };
        if bitmaps.is_distrusted.load(Ordering::Acquire) {
            return Ok(false);
        }
        let mut directory = bitmaps.directory.lock();
        let mut all = self.move_bitmap_data(writer, &directory, end)?;
        all &= self.move_bitmap_tables(writer, &mut directory, end)?;
        Ok(all & self.move_bitmap_directory(writer, bitmaps, &mut directory, end)?)
    }

    fn move_bitmap_data(&self, writer: &Writer, directory: &Directory, end: u64) -> Result<bool> {
        let (mut copies, mut all) = (Copies::default(), true);
        for bitmap in directory.entries.iter().map(|entry| &entry.bitmap) {
            let table = read_table(&*self.storage, &self.geometry, bitmap)?;
            for (index, bits) in (0..).zip(table) {
                let BitmapBits::Stored(cluster) = bits else { continue };
                let Some(new) = self.copy(writer, cluster.0..cluster.0 + 1, end, &mut copies)?
                else {
                    all &= cluster.0 < end;
                    continue;
                };
                let bits = BitmapBits::Stored(self.geometry.host_cluster(new));
                let word = bits.encode(&self.geometry).to_be_bytes().to_vec();
                let offset = HostOffset(bitmap.table_offset.0 + index * 8);
                copies.words.push(Patch { offset, bytes: word });
            }
        }
        self.settle_copies(writer, copies)?;
        Ok(all)
    }

    fn move_bitmap_tables(
        &self,
        writer: &Writer,
        directory: &mut Directory,
        end: u64,
    ) -> Result<bool> {
        let (mut copies, mut all) = (Copies::default(), true);
        let mut moved = directory.clone();
        for entry in &mut moved.entries {
            let bytes = u64::from(entry.bitmap.table_entries) * 8;
            let old = self.geometry.host_clusters(entry.bitmap.table_offset, bytes);
            let Some(new) = self.copy(writer, old.clone(), end, &mut copies)? else {
                all &= old.end <= end;
                continue;
            };
            entry.bitmap.table_offset = new;
            entry.bitmap.update(&mut moved.bytes[entry.at..]);
            // The table's offset is the first word of an entry, which starts at a multiple of 8.
            let offset = HostOffset(moved.offset.0 + entry.at as u64);
            copies.words.push(Patch { offset, bytes: new.0.to_be_bytes().to_vec() });
        }
        self.settle_copies(writer, copies)?;
        *directory = moved;
        Ok(all)
    }

    fn move_bitmap_directory(
        &self,
        writer: &Writer,
        bitmaps: &Bitmaps,
        directory: &mut Directory,
        end: u64,
    ) -> Result<bool> {
        let mut copies = Copies::default();
        let old = self.geometry.host_clusters(directory.offset, directory.bytes.len() as u64);
        let Some(new) = self.copy(writer, old.clone(), end, &mut copies)? else {
            return Ok(old.end <= end);
        };
        copies.words.push(Header::patch_bitmap_directory(&bitmaps.extension, new));
        self.settle_copies(writer, copies)?;
        directory.offset = new;
        Ok(true)
    }

    /// Copies the clusters `old`, if they end behind `end` and there is room in a row before it.
    fn copy(
        &self,
        writer: &Writer,
        old: Range<u64>,
        end: u64,
        copies: &mut Copies,
    ) -> Result<Option<HostOffset>> {
        if old.end <= end || old.is_empty() {
            return Ok(None);
        }
        let Some(place) = writer.refcounts.allocate_run_before(old.end - old.start, end)? else {
            return Ok(None);
        };
        let (from, to) = (
            self.geometry.host_offset(HostCluster(old.start)),
            self.geometry.host_offset(HostCluster(place.start)),
        );
        let mut bytes = vec![0; ((old.end - old.start) << self.geometry.cluster_bits()) as usize];
        let copied = self
            .storage
            .read_at(&mut bytes, from.0)
            .map_err(|e| Error::io(format!("reading bitmaps at {from}"), e))
            .and_then(|()| self.write_host(&bytes, to.0));
        if let Err(e) = copied {
            writer.refcounts.release(place)?;
            return Err(e);
        }
        place.map(HostCluster).for_each(|cluster| self.tables.enter_metadata(cluster));
        copies.left.push(old);
        Ok(Some(to))
    }

    /// Makes copies count instead of what they were made of.
    fn settle_copies(&self, writer: &Writer, copies: Copies) -> Result<()> {
        if copies.words.is_empty() {
            return Ok(());
        }
        self.write_refcounts(writer, Some(Rule::BitmapMoveBeforeWords))?;
        for word in &copies.words {
            self.storage.write_at(&word.bytes, word.offset.0).map_err(|e| {
                let error = Error::io(format!("linking moved bitmaps at {}", word.offset), e);
                // Which of the two counts is not known.
                self.health.latch_unknown(&error.to_string());
                error
            })?;
        }
        copies.left.into_iter().try_for_each(|old| {
            self.tables.metadata().give_up(old.clone());
            writer.recycler.drop_used(old)
        })
    }
}
