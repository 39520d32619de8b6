//! Reading tables piece by piece, holes of the file left out.
//!
//! A table's size is what a field claims; what is really read follows what the file really holds.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::format::be64;
use crate::storage::Storage;

/// Bytes read at once.
const PIECE: u64 = 64 << 10;

/// Calls `visit` with the offset and the bytes of each part of `range` that may hold something
/// other than zeros, in ascending order. Parts start and end at multiples of 512, which no table
/// entry crosses; `range` starts at one.
///
/// # Errors
/// Those of the host while `doing` (`reading L2 table at 0x50000`), and those of `visit`.
pub(super) fn for_each_data(
    storage: &dyn Storage,
    range: Range<u64>,
    doing: impl Fn() -> String,
    mut visit: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let failed = |e| Error::io(doing(), e);
    let length = storage.len().map_err(failed)?;
    let end = range.end.min(length.div_ceil(512).saturating_mul(512));
    let mut buffer = Vec::new();
    let mut at = range.start;
    while at < end {
        let Some(data) = storage.seek_data(at).map_err(failed)? else { break };
        at = at.max(data & !511);
        if at >= end {
            break;
        }
        let piece = (end - at).min(PIECE);
        buffer.resize(piece as usize, 0);
        storage.read_at(&mut buffer, at).map_err(failed)?;
        visit(at, &buffer)?;
        at += piece;
    }
    Ok(())
}

/// The same for a table of big-endian words: calls `visit` with the offset of each word that is
/// not 0 and its value.
pub(crate) fn for_each_word(
    storage: &dyn Storage,
    range: Range<u64>,
    doing: impl Fn() -> String,
    mut visit: impl FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    for_each_data(storage, range, doing, |offset, bytes| {
        for (index, word) in bytes.chunks_exact(8).enumerate() {
            match be64(word, 0) {
                0 => {}
                value => visit(offset + index as u64 * 8, value)?,
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::testing::MemoryStorage;

    #[test]
    fn words_are_found_at_their_offsets_and_holes_are_not_read() {
        let storage = MemoryStorage::default();
        storage.set_len(64 << 20).unwrap();
        for offset in [512u64, 70_000 * 8, (64 << 20) - 8] {
            storage.write_at(&offset.to_be_bytes(), offset).unwrap();
        }
        let mut bytes = 0;
        let mut found = Vec::new();
        for_each_data(&storage, 512..1 << 40, String::new, |_, data| {
            bytes += data.len();
            Ok(())
        })
        .unwrap();
        for_each_word(&storage, 512..1 << 40, String::new, |at, word| {
            found.push((at, word));
            Ok(())
        })
        .unwrap();
        assert_eq!(found, [512, 70_000 * 8, (64 << 20) - 8].map(|at| (at, at)));
        assert!(bytes <= 3 * PIECE as usize, "{bytes} bytes read");
    }

    #[test]
    fn a_part_past_the_end_of_the_file_is_left_out() {
        let storage = MemoryStorage::new(vec![0xff; 1000]);
        let mut seen = 0;
        for_each_data(&storage, 512..u64::MAX, String::new, |at, data| {
            seen += data.len();
            assert_eq!((at, data[487], data[488]), (512, 0xff, 0));
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, 512);
    }
}
