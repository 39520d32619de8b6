//! Blocks that stand for parts of the file, and how they look in a terminal.

use super::extents::{Extent, Kind};
use crate::cli::{size, terminal};

/// The smallest part of a file that a block stands for.
const SMALLEST: u64 = 4096;

/// A file as blocks of the same size.
pub(super) struct Picture {
    length: u64,
    block: u64,
    /// Bytes of each kind in each block.
    blocks: Vec<[u64; Kind::COUNT]>,
}

impl Picture {
    /// A file of `length` bytes in at most `room` blocks, or in blocks of `block` bytes.
    pub(super) fn new(length: u64, room: usize, block: Option<u64>) -> Picture {
        let least = length.div_ceil(room.max(1) as u64).max(SMALLEST);
        let fitting = least.checked_next_power_of_two().unwrap_or(least);
        // However many blocks are asked for, they are bounded.
        let block = block.map_or(fitting, |block| block.max(length >> 20).max(1));
        let mut picture = Picture { length, block, blocks: Vec::new() };
        picture.clear();
        picture
    }

    /// Nothing is known yet.
    pub(super) fn clear(&mut self) {
        let count = self.length.div_ceil(self.block) as usize;
        self.blocks = vec![[0; Kind::COUNT]; count];
    }

    /// Bytes of the file that a block stands for.
    pub(super) fn block(&self) -> u64 {
        self.block
    }

    /// Bytes of each kind, block by block.
    pub(super) fn blocks(&self) -> &[[u64; Kind::COUNT]] {
        &self.blocks
    }

    /// Enters an extent; what lies past the end of the file as it was is left out.
    pub(super) fn add(&mut self, extent: &Extent) {
        let end = (extent.start + extent.length).min(self.length);
        let mut at = extent.start;
        while at < end {
            let index = at / self.block;
            let until = end.min((index + 1).saturating_mul(self.block));
            if let Some(block) = self.blocks.get_mut(index as usize) {
                block[extent.kind as usize] += until - at;
            }
            at = until;
        }
    }

    /// The picture as lines of `columns` blocks: two rows of blocks a line where there are colours,
    /// else a letter each.
    pub(super) fn lines(&self, columns: usize, colours: bool) -> Vec<String> {
        let kinds: Vec<_> = self.blocks.iter().map(main_kind).collect();
        let rows: Vec<_> = kinds.chunks(columns).collect();
        match colours {
            true => rows.chunks(2).map(coloured_line).collect(),
            false => {
                rows.iter().map(|row| row.iter().map(|kind| letter(*kind)).collect()).collect()
            }
        }
    }
}

/// The kind that fills most of a block; of two the one that comes first in the legend.
fn main_kind(block: &[u64; Kind::COUNT]) -> Kind {
    let most = block.iter().copied().max().unwrap_or(0);
    let kind = Kind::ALL.into_iter().find(|kind| block[*kind as usize] == most);
    kind.filter(|_| most > 0).unwrap_or(Kind::Hole)
}

/// Two rows in one line: the upper one as the colour of half a block, the lower one behind it.
fn coloured_line(rows: &[&[Kind]]) -> String {
    let upper = rows.first().copied().unwrap_or_default();
    let lower = rows.get(1).copied().unwrap_or_default();
    let mut line = String::new();
    let mut last = None;
    for (index, kind) in upper.iter().enumerate() {
        let colours = (colour(*kind), lower.get(index).map(|kind| colour(*kind)));
        if last != Some(colours) {
            line += &anstyle::Reset.render().to_string();
            line += &terminal::style(Some(colours.0), colours.1);
            last = Some(colours);
        }
        line.push('▀');
    }
    line + &anstyle::Reset.render().to_string()
}

/// What there is of each kind, with its colour or letter, in lines of at most `columns` characters.
pub(super) fn legend(bytes: &[u64; Kind::COUNT], columns: usize, colours: bool) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut width = columns;
    for kind in Kind::ALL.into_iter().filter(|kind| bytes[*kind as usize] > 0) {
        let text = format!(" {} {}", kind.name(), size::show(bytes[kind as usize]));
        let mark = match colours {
            true => terminal::coloured("■", colour(kind), true),
            false => letter(kind).to_string(),
        };
        let needed = text.chars().count() + 4;
        if width + needed > columns {
            lines.push(String::new());
            width = 0;
        }
        if let Some(line) = lines.last_mut() {
            *line += if width > 0 { "   " } else { " " };
            *line += &mark;
            *line += &text;
        }
        width += needed;
    }
    lines
}

/// Its number among the 256 colours of terminals, legible on dark and on light ones.
fn colour(kind: Kind) -> u8 {
    match kind {
        Kind::Metadata => 178,
        Kind::Data => 32,
        Kind::Shared => 97,
        Kind::Compressed => 36,
        Kind::Unwritten => 110,
        Kind::Junk => 167,
        Kind::Ready => 138,
        Kind::Free => 246,
        Kind::Hole => 238,
    }
}

fn letter(kind: Kind) -> char {
    match kind {
        Kind::Metadata => 'M',
        Kind::Data => 'D',
        Kind::Shared => 'S',
        Kind::Compressed => 'C',
        Kind::Unwritten => 'u',
        Kind::Junk => 'J',
        Kind::Ready => 'r',
        Kind::Free => 'f',
        Kind::Hole => '.',
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    fn picture(length: u64, room: usize, block: Option<u64>) -> Picture {
        let mut picture = Picture::new(length, room, block);
        let extent = |start, length, kind| Extent { start, length, kind };
        picture.add(&extent(0, 8 * KIB, Kind::Metadata));
        picture.add(&extent(8 * KIB, 28 * KIB, Kind::Data));
        picture.add(&extent(36 * KIB, 1 << 40, Kind::Hole));
        picture
    }

    #[test]
    fn each_block_shows_what_fills_most_of_it() {
        let shown = picture(64 * KIB, 1000, Some(4 * KIB)).lines(6, false);
        assert_eq!(shown, ["MMDDDD", "DDD...", "...."]);
        let shown = picture(64 * KIB, 1000, Some(16 * KIB)).lines(80, false);
        assert_eq!(shown, ["MD.."], "of two that are as large the first one of the legend");
        assert!(picture(0, 10, None).lines(80, false).is_empty());
    }

    #[test]
    fn a_picture_fits_its_room_in_blocks_of_a_round_size() {
        for (length, room) in [(1 << 40, 2000), (100, 1), (12345678, 64), (u64::MAX >> 1, 512)] {
            let picture = Picture::new(length, room, None);
            assert!(picture.blocks().len() <= room && picture.block().is_power_of_two());
        }
        assert!(Picture::new(1 << 62, 10, Some(1)).blocks().len() <= (1 << 20) + 1);
    }

    #[test]
    fn colours_show_two_rows_a_line_and_end_where_the_line_does() {
        let lines = picture(64 * KIB, 1000, Some(4 * KIB)).lines(6, true);
        assert_eq!(lines.len(), 2);
        for line in lines {
            assert!(line.ends_with("\x1b[0m") && line.contains('▀'), "{line:?}");
        }
        let mut bytes = [0; Kind::COUNT];
        bytes[Kind::Data as usize] = 3 << 20;
        assert_eq!(legend(&bytes, 80, false), [" D data 3.0 MiB"]);
    }
}
