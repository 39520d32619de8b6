//! Moving what is not in a column: the L1 tables, the snapshot table, bitmaps.

use std::ops::Range;

use super::{Compaction, Pass};
use crate::error::{Error, Result};
use crate::format::{Geometry, Header, HostCluster, HostOffset, OFFSET_MASK, be64};
use crate::image::{Image, Writer, snapshots};
use crate::rules::Rule;
use crate::tables::Tables;

/// The L1 table of a snapshot.
#[derive(Debug)]
pub(super) struct SnapshotL1 {
    pub(super) entries: Vec<u64>,
    offset: HostOffset,
    /// Where its entry in the snapshot table starts, with the offset of the L1 table.
    entry: HostOffset,
}

impl SnapshotL1 {
    /// Where entry `column` points to `old`, it points to the copy `new` from now on.
    pub(super) fn replace(
        &mut self,
        column: u64,
        old: HostCluster,
        new: HostCluster,
        geometry: &Geometry,
        tables: &Tables,
    ) {
        let Some(entry) = self.entries.get_mut(column as usize) else { return };
        if *entry & OFFSET_MASK != geometry.host_offset(old).0 {
            return;
        }
        *entry = *entry & !OFFSET_MASK | geometry.host_offset(new).0;
        tables.enter_metadata(new);
        tables.write_along((self.offset.0 + column * 8, entry.to_be_bytes().to_vec()));
    }

    fn clusters(&self, geometry: &Geometry) -> Range<u64> {
        geometry.host_clusters(self.offset, self.entries.len() as u64 * 8)
    }
}

impl Image {
    /// The L1 tables of the snapshots as they stand in the file. The flush lock is held, and a
    /// flush has just been made.
    pub(super) fn snapshot_l1s(&self) -> Result<Vec<SnapshotL1>> {
        let header = self.reread_header()?;
        let mut l1s = Vec::new();
        for (entry, snapshot) in snapshots::read_entries(&*self.storage, &header)? {
            let offset = snapshot.l1_table_offset;
            let mut bytes = vec![0; snapshot.l1_size as usize * 8];
            self.storage.read_at(&mut bytes, offset.0).map_err(|e| {
                Error::io(format!("reading the L1 table of snapshot {}", snapshot.label()), e)
            })?;
            let entries = bytes.chunks_exact(8).map(|word| be64(word, 0)).collect();
            l1s.push(SnapshotL1 { entries, offset, entry });
        }
        Ok(l1s)
    }

    fn reread_header(&self) -> Result<Header> {
        crate::image::open::read_header(&*self.storage)
    }

    /// Moves the structures that lie behind the end, but those of the refcounts. Only a few clusters, so
    /// it is one step. What a copy is made of is in memory, or in the file and nothing on its way there;
    /// what the copy leads to is durable before anything leads to the copy: the L1 table's switch sees to
    /// that itself, and the words that lead to others come with a flush.
    pub(super) fn move_structures(
        &self,
        writer: &Writer,
        compaction: &mut Compaction,
        pass: &mut Pass,
    ) -> Result<()> {
        let _flush = self.hold_flush(writer);
        self.move_l1(writer, compaction, pass)?;
        for snapshot in &mut pass.snapshots {
            let old = snapshot.clusters(&self.geometry);
            let bytes: Vec<u8> = snapshot.entries.iter().flat_map(|e| e.to_be_bytes()).collect();
            if let Some(new) = self.copy_structure(writer, compaction, pass.end, old, &bytes)? {
                snapshot.offset = new;
                self.tables.write_along((snapshot.entry.0, new.0.to_be_bytes().to_vec()));
            }
        }
        // What changes within the snapshot table is in the file before the table is copied.
        if Rule::WordsBeforeTableMove.is_kept() {
            self.flush_held(writer)?;
        }
        self.move_snapshot_table(writer, compaction, pass)?;
        if !self.move_bitmaps(writer, pass.end)? {
            compaction.pin(|| "no room for bitmaps, or something else refers to them".into());
        }
        if let Some((at, length)) = self.reread_header()?.luks()?
            && self.geometry.host_clusters(at, length).end > pass.end
        {
            compaction.pin(|| format!("the LUKS header at {at}, which stays where it is"));
        }
        Ok(())
    }

    fn move_l1(&self, writer: &Writer, compaction: &mut Compaction, pass: &Pass) -> Result<()> {
        let old = self.tables.l1_place();
        if old.end <= pass.end {
            return Ok(());
        }
        match writer.refcounts.allocate_run_before(old.end - old.start, pass.end)? {
            Some(place) => self.switch_l1(writer, place, self.tables.l1_entries() as u32),
            None => {
                compaction.pin(|| format!("no room in a row for the L1 table at {old:?}"));
                Ok(())
            }
        }
    }

    fn move_snapshot_table(
        &self,
        writer: &Writer,
        compaction: &mut Compaction,
        pass: &mut Pass,
    ) -> Result<()> {
        let header = self.reread_header()?;
        let bytes = snapshots::read_bytes(&*self.storage, &header)?;
        let old = self.geometry.host_clusters(header.snapshots_offset, bytes.len() as u64);
        if let Some(new) = self.copy_structure(writer, compaction, pass.end, old, &bytes)? {
            let patch = Header::patch_snapshots(header.snapshot_count, new);
            self.tables.write_along((patch.offset.0, patch.bytes));
        }
        Ok(())
    }

    /// Copies a structure that takes whole clusters, `old`, to before `end`, where it lies behind
    /// that and there is room; what refers to it is the caller's.
    fn copy_structure(
        &self,
        writer: &Writer,
        compaction: &mut Compaction,
        end: u64,
        old: Range<u64>,
        bytes: &[u8],
    ) -> Result<Option<HostOffset>> {
        if old.end <= end || old.is_empty() {
            return Ok(None);
        }
        for cluster in old.clone().map(HostCluster) {
            if !self.is_all_of(writer, compaction, cluster, 1)? {
                return Ok(None);
            }
        }
        let count = old.end - old.start;
        let Some(place) = writer.refcounts.allocate_run_before(count, end)? else {
            compaction.pin(|| format!("no room in a row for {count} clusters of metadata"));
            return Ok(None);
        };
        let offset = self.geometry.host_offset(HostCluster(place.start));
        if let Err(e) = self.write_host(bytes, offset.0) {
            writer.refcounts.release(place)?;
            return Err(e);
        }
        place.map(HostCluster).for_each(|cluster| self.tables.enter_metadata(cluster));
        self.tables.metadata().give_up(old.clone());
        writer.recycler.drop_used(old)?;
        Ok(Some(offset))
    }
}
