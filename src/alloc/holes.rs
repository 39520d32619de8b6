//! Which parts of the refcount blocks may count something.
//!
//! What is a hole of the file counts nothing, and is neither read nor looked through: one block may
//! be megabytes long, and thousands of them in holes take no more of a file than the table that names
//! them. Changes that wait for a flush are in the cache alone, and part of a block all the same.

use std::ops::Range;

use super::{Refcounts, State};
use crate::error::{Error, Result};
use crate::format::refcount;

/// Bytes of a block that are read at once, while others wait.
const PIECE: u64 = 64 << 10;

/// A part of a refcount block.
pub(super) struct Piece {
    /// The cluster that its first entry counts.
    first: u64,
    bytes: Vec<u8>,
    order: u32,
}

impl Piece {
    /// The clusters that it counts, in ascending order, and their refcounts.
    pub(super) fn counted(&self) -> impl Iterator<Item = (u64, u64)> {
        refcount::in_use(&self.bytes, self.order)
            .map(|i| (self.first + i as u64, refcount::get(&self.bytes, i, self.order)))
    }

    /// The first cluster after all that it has an entry for.
    pub(super) fn end(&self) -> u64 {
        self.first + ((self.bytes.len() as u64 * 8) >> self.order)
    }
}

impl Refcounts {
    /// The next part of the block that counts the first of `clusters`, from there on, that may count
    /// something. It may begin before `clusters` and end after them.
    pub(super) fn next_piece(&self, state: &State, clusters: Range<u64>) -> Result<Option<Piece>> {
        let (order, per_block) =
            (self.geometry.refcount_order(), self.geometry.refcounts_per_block());
        let index = clusters.start / per_block;
        let start = match state.table.get(index as usize) {
            Some(0) | None => return Ok(None),
            Some(&start) => start,
        };
        // The table of an image that was found corrupt may hold anything.
        self.check_entry(index as usize, start)?;
        let first = index * per_block;
        let place = |cluster: u64| (cluster - first) << order >> 3;
        let from =
            start + place(clusters.start) / state.cache.slice_size() * state.cache.slice_size();
        let end = place(clusters.end.min(first + per_block) - 1) + 1;
        // No file reaches past the last offset that there is.
        let end = end.next_multiple_of(state.cache.slice_size()).checked_add(start);
        let Some(end) = end.filter(|end| i64::try_from(*end).is_ok()) else { return Ok(None) };
        let Some(at) = self.next_slice(state, from..end)? else { return Ok(None) };
        let bytes = self.bytes_at(state, at..end.min(at + PIECE))?;
        Ok(Some(Piece { first: first + ((at - start) << 3 >> order), bytes, order }))
    }

    /// A part of a refcount block as it is now, changes that wait for a flush included.
    pub(super) fn bytes_at(&self, state: &State, range: Range<u64>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        if !state.cache.read_cluster(range.start, &mut bytes) {
            self.read_block(&mut bytes, range.start)?;
            state.cache.read_cluster(range.start, &mut bytes);
        }
        Ok(bytes)
    }

    pub(super) fn read_block(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        let failed = |e| Error::io(format!("reading a refcount block at {at:#x}"), e);
        self.storage.read_at(bytes, at).map_err(failed)
    }

    /// The first of some slices of a block that may count something: it is in the cache, or is data in
    /// the file.
    pub(super) fn next_slice(&self, state: &State, slices: Range<u64>) -> Result<Option<u64>> {
        let Range { start, end } = slices;
        if state.cache.first_in(start..start + 1).is_some() {
            return Ok(Some(start));
        }
        let data = self.next_data(state, start)?.min(end);
        Ok(state.cache.first_in(start..data).or((data < end).then_some(data)))
    }

    /// The last one, likewise.
    pub(super) fn last_slice(&self, state: &State, slices: Range<u64>) -> Result<Option<u64>> {
        let size = state.cache.slice_size();
        let Range { start, end } = slices;
        let last = end - size;
        if state.cache.first_in(last..end).is_some() || self.next_data(state, last)? < end {
            return Ok(Some(last));
        }
        // Holes are found from their start only: halve what may hold the last data.
        let mut data = self.next_data(state, start)?;
        let mut hole = last;
        while data < end && hole - data > size {
            let middle = data + (hole - data) / size / 2 * size;
            match self.next_data(state, middle)? {
                found if found < end => data = found,
                _ => hole = middle,
            }
        }
        let after = if data < end { data + size } else { start };
        Ok(state.cache.last_in(after..end).or((data < end).then_some(data)))
    }

    /// The first slice at or after `slice` that the file may hold something of.
    fn next_data(&self, state: &State, slice: u64) -> Result<u64> {
        let failed = |e| Error::io(format!("looking for data at {slice:#x}"), e);
        let data = self.storage.seek_data(slice).map_err(failed)?;
        Ok(data.map_or(u64::MAX, |at| state.cache.key(at.max(slice))))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::format::Header;
    use crate::image::{CreateOptions, Image};
    use crate::storage::Storage;
    use crate::storage::testing::MemoryStorage;
    use crate::tables::MetadataMap;

    /// Refcounts with the first slices of a block at 1 MiB in the file or in the cache, as bits say.
    fn refcounts(in_file: u32, in_cache: u32) -> Refcounts {
        let file = Arc::new(MemoryStorage::default());
        let options = CreateOptions { virtual_size: 1 << 20, ..CreateOptions::default() };
        Image::create(&*file, &options).unwrap();
        file.set_len(2 << 20).unwrap();
        let mut start = [0; 512];
        file.read_at(&mut start, 0).unwrap();
        let header = Header::parse(&start).unwrap();
        let metadata = Arc::new(MetadataMap::new(u64::MAX));
        let refcounts = Refcounts::open(file.clone(), &header, metadata, &Arc::default()).unwrap();
        for i in 0..16 {
            let at = (1 << 20) + i * 4096;
            if in_file & 1 << i != 0 {
                file.write_at(&[1; 4096], at).unwrap();
            }
            if in_cache & 1 << i != 0 {
                refcounts.state.lock().cache.insert(at, vec![1; 4096].into());
            }
        }
        refcounts
    }

    #[test]
    fn all_that_is_in_the_file_or_in_the_cache_is_found_from_both_sides_and_no_hole() {
        let sets = [0, 1, 0x8000, 0x0180, 0x5555, 0xaaaa, 0xff00, 0x1008, 0xffff, 0x0240];
        for (in_file, in_cache) in sets.iter().flat_map(|file| sets.map(|cache| (*file, cache))) {
            let refcounts = refcounts(in_file, in_cache);
            let state = refcounts.state.lock();
            let place = |slice: u64| (1 << 20) + slice * 4096;
            for (from, to) in (0..16).flat_map(|from| (from + 1..=16).map(move |to| (from, to))) {
                let is_there = |slice: &u64| (in_file | in_cache) & 1 << slice != 0;
                let first = (from..to).find(is_there).map(place);
                let last = (from..to).rfind(is_there).map(place);
                let range = place(from)..place(to);
                let what = format!("{in_file:#x} {in_cache:#x} {from}..{to}");
                assert_eq!(refcounts.next_slice(&state, range.clone()).unwrap(), first, "{what}");
                assert_eq!(refcounts.last_slice(&state, range).unwrap(), last, "{what}");
            }
        }
    }
}
