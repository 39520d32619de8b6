//! What header extensions refer to: the LUKS header and the bitmaps.

use super::super::pieces::for_each_word;
use super::super::spans::Spans;
use super::{Counter, MAX_TABLES_BYTES, too_big};
use crate::error::{Error, Result};
use crate::format::{
    AUTOCLEAR_BITMAPS, BitmapBits, BitmapEntry, BitmapsExtension, EXTENSION_BITMAPS,
};

impl Counter<'_> {
    /// Counts the LUKS header.
    pub(super) fn luks_header(&mut self) -> Result<()> {
        let Some((offset, size)) = self.header.luks()? else { return Ok(()) };
        if size != 0 {
            self.structure(offset, size, "the LUKS header");
        }
        Ok(())
    }

    /// Counts the bitmaps, unless a program that knows nothing of them has written to the image:
    /// then they are gone, as QEMU sees it, and their clusters leaked.
    pub(super) fn bitmaps(&mut self) -> Result<()> {
        let Some(data) = self.header.extension(EXTENSION_BITMAPS) else { return Ok(()) };
        if self.header.autoclear_features & AUTOCLEAR_BITMAPS == 0 {
            return Ok(());
        }
        let extension = BitmapsExtension::parse(data, &self.g)?;
        let (start, size) = (extension.directory_offset, extension.directory_size);
        if !self.structure(start, size, "the bitmap directory") {
            return Ok(());
        }
        let mut directory = vec![0; size.min(self.length - start.0.min(self.length)) as usize];
        let failed = |e| Error::io("reading the bitmap directory", e);
        self.storage.read_at(&mut directory, start.0).map_err(failed)?;
        let mut spans = Spans::default();
        let mut budget = MAX_TABLES_BYTES;
        let mut rest = directory.as_slice();
        for _ in 0..extension.count {
            let entry = match BitmapEntry::parse(rest, self.header) {
                Ok(entry) => entry,
                Err(e) => {
                    self.distrust(1, e.to_string());
                    rest = &[];
                    break;
                }
            };
            rest = rest.get(entry.length..).unwrap_or_default();
            let (table, size) = (entry.table_offset, u64::from(entry.table_entries) * 8);
            budget = budget.checked_sub(size).ok_or_else(|| too_big("bitmap tables"))?;
            if self.structure(table, size, "a bitmap table") {
                spans.add(table.0..table.0 + size, false);
            }
        }
        if !rest.is_empty() {
            self.distrust(1, "the bitmap directory has more entries than the header says".into());
        }
        self.bitmap_data(&spans)
    }

    fn bitmap_data(&mut self, tables: &Spans) -> Result<()> {
        let (storage, g) = (self.storage, self.g);
        for (range, uses) in tables.segments() {
            for_each_word(
                storage,
                range,
                || "reading a bitmap table".into(),
                |at, raw| {
                    let name = || format!("the bitmap table's entry at {at:#x}");
                    match BitmapBits::decode(raw, &g) {
                        Ok(BitmapBits::Zeros | BitmapBits::Ones) => {}
                        Ok(BitmapBits::Stored(cluster)) => {
                            self.note_metadata(cluster.0..cluster.0.saturating_add(1));
                            if !self.refer(g.host_offset(cluster), g.cluster_size(), uses.total) {
                                let text = format!("{} points past the end of the file", name());
                                self.distrust(uses.total, text);
                            }
                        }
                        Err(bad) => self.distrust(uses.total, format!("{} {bad}", name())),
                    }
                    Ok(())
                },
            )?;
        }
        Ok(())
    }
}
