//! Deleting a snapshot.

use super::table::read_l1;
use super::{Image, SnapshotKey, Writer};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Snapshot;

impl Image {
    /// Deletes snapshot `which`; durable on return. What only it
    /// refers to is given back in the background.
    ///
    /// # Errors
    /// `NotFound`; `InUse` while somebody reads it; `ReadOnly`, host errors, `Corrupt`. The snapshot
    /// may be gone then, with clusters leaked that only it referred to: the text says so.
    pub fn delete_snapshot<'a>(&self, which: impl Into<SnapshotKey<'a>>) -> Result<()> {
        let _change = self.snapshots.change.lock();
        let (writer, _held) = self.begin_snapshot_change()?;
        let snapshot = self.take_out(which)?;
        let l1 = match self.note(self.unlink_snapshot(writer, &snapshot)) {
            Ok(l1) => l1,
            Err(e) => {
                self.put_back();
                return Err(e);
            }
        };
        // Nothing on disk leads there any more.
        let dropped = self
            .drop_references(writer, &l1)
            .and_then(|()| {
                let used = (0u64..).zip(&l1).filter(|(_, raw)| **raw != 0);
                self.mark_own(writer, used.map(|(index, _)| index))
            })
            .and_then(|()| self.flush())
            .map_err(|e| e.context("the snapshot is deleted, clusters of it may be leaked"));
        self.note(dropped)
    }

    /// Takes the entry out of sight, so that nobody opens it any more.
    fn take_out<'a>(&self, which: impl Into<SnapshotKey<'a>>) -> Result<Snapshot> {
        let mut state = self.snapshots.state.lock();
        let index = state.find(which)?;
        let id = state.table.entries[index].id.clone();
        if !state.open_views(Some(&id)).is_empty() {
            let name = state.table.entries[index].label();
            return Err(Error::new(ErrorKind::InUse, format!("snapshot {name} is being read")));
        }
        let snapshot = state.table.entries.remove(index);
        state.taken_out = Some((index, snapshot.clone()));
        Ok(snapshot)
    }

    fn put_back(&self) {
        let mut state = self.snapshots.state.lock();
        if let Some((index, snapshot)) = state.taken_out.take() {
            state.table.entries.insert(index, snapshot);
        }
    }

    /// Makes the header name a snapshot table without `snapshot`, durably, and gives the places of
    /// its L1 table and of the old snapshot table back. Returns the L1 table.
    fn unlink_snapshot(&self, writer: &Writer, snapshot: &Snapshot) -> Result<Vec<u64>> {
        let l1 = read_l1(&*self.storage, &self.geometry, snapshot)?;
        let entries = self.snapshots.state.lock().table.entries.clone();
        self.refuse_low_counts_of(
            writer,
            &l1,
            &[std::slice::from_ref(snapshot), &entries].concat(),
        )?;
        let _flush = self.hold_flush(writer);
        let old = self.switch_table(writer, entries)?;
        self.snapshots.state.lock().taken_out = None;
        writer.recycler.release(old);
        let bytes = l1.len() as u64 * 8;
        if bytes > 0 {
            let place = self.geometry.host_clusters(snapshot.l1_table_offset, bytes);
            self.tables.metadata().give_up(place.clone());
            writer.recycler.release_used(place)?;
        }
        Ok(l1)
    }
}
