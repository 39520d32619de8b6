//! Applying a snapshot: the disk becomes what it was.

use std::sync::atomic::Ordering;

use super::references::distinct_tables;
use super::table::read_l1;
use super::{Image, SnapshotKey, Writer};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{COPIED, HostCluster, MAX_L1_BYTES, Snapshot};
use crate::locks;
use crate::rules::Rule;

impl Image {
    /// Makes the disk what snapshot `which` holds, its size
    /// included; durable on return. What the disk held is lost. The snapshot stays.
    ///
    /// # Errors
    /// `NotFound`; `TooBig` where a refcount is at its largest; `ReadOnly`, host errors, `Corrupt`.
    /// The disk is what it was then, or (as the text says) the snapshot with clusters leaked.
    pub fn apply_snapshot<'a>(&self, which: impl Into<SnapshotKey<'a>>) -> Result<()> {
        let _change = self.snapshots.change.lock();
        let (writer, _held) = self.begin_snapshot_change()?;
        let (snapshot, all) = {
            let state = self.snapshots.state.lock();
            (state.table.entries[state.find(which)?].clone(), state.table.entries.clone())
        };
        self.note(self.refuse_low_counts_of(writer, &self.tables.l1(), &all))?;
        let old_l1 = {
            let _flush = self.hold_flush(writer);
            self.record_apply(writer, self.size_of(&snapshot)?)?;
            let _guard = self.locks.exclusive(locks::ALL);
            self.note(self.apply_held(writer, &snapshot))?
        };
        // Nothing on disk leads there any more.
        let dropped =
            self.drop_references(writer, &old_l1).and_then(|()| self.flush()).map_err(|e| {
                e.context("the snapshot is applied, clusters of the old disk may be leaked")
            });
        self.note(dropped)
    }

    /// To the bitmaps the whole disk changes, without a write.
    fn record_apply(&self, writer: &Writer, size: u64) -> Result<()> {
        let old = self.virtual_size();
        if size != old {
            self.begin_resize(writer, &(old.min(size)..old.max(size)))?;
        }
        self.record_change(writer, &(0..old.max(size)));
        Ok(())
    }

    /// Returns the L1 table that was the disk's. The flush lock and all guest clusters are held.
    fn apply_held(&self, writer: &Writer, snapshot: &Snapshot) -> Result<Vec<u64>> {
        let size = self.size_of(snapshot)?;
        let entries = self.geometry.l1_entries_for(size).max(1);
        if entries > MAX_L1_BYTES / 8 || !size.is_multiple_of(512) {
            return Err(Error::new(
                ErrorKind::TooBig,
                format!("snapshot {} has a size of {size} bytes", snapshot.label()),
            ));
        }
        if Rule::DiskBeforeApplied.is_kept() {
            self.flush_held(writer)?;
        }
        // What was dropped is no longer counted: a refcount of 1 later on means one reference.
        while Rule::DropsBeforeApplied.is_kept() && writer.recycler.free_some()? {}

        // Without what lies past the end of the disk: the state of a virtual machine.
        let mut l1 = read_l1(&*self.storage, &self.geometry, snapshot)?;
        l1.resize(entries as usize, 0);
        l1.iter_mut().for_each(|entry| *entry &= !COPIED);
        let tables = distinct_tables(&l1, &self.geometry)
            .map_err(|e| e.context(format!("snapshot {}", snapshot.label())))?;
        // QEMU leaves COPIED in tables that only one snapshot refers to.
        self.share_entries(writer, &l1, snapshot)?;
        self.raise_references(writer, &l1)?;
        let old_l1 = self.tables.l1();
        match self.switch_disk(writer, size, &l1) {
            Ok(()) => {
                // The disk may have given them up once.
                tables.into_iter().for_each(|table| {
                    self.tables.metadata().insert(table);
                });
                Ok(old_l1)
            }
            Err(e) => {
                if self.health.is_good() {
                    self.undo_raise(writer, &l1, u64::MAX);
                }
                Err(e)
            }
        }
    }

    /// Makes `l1` the L1 table of a disk of `size` bytes, durably.
    fn switch_disk(&self, writer: &Writer, size: u64, l1: &[u64]) -> Result<()> {
        let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let place = self.write_new_place(writer, &bytes)?;
        let first = HostCluster(place.start);
        let offset = self.geometry.host_offset(first);
        let switched = self.tables.replace_l1(offset, l1.to_vec(), || {
            self.write_refcounts(writer, Some(Rule::AppliedBeforeHeader))?;
            let patch = self.disk_patch(size, l1.len() as u32, first)?;
            self.patch_header(writer, &patch, Rule::AppliedSwitchBeforeReuse)
        });
        match switched {
            Ok(old) => writer.recycler.release(old),
            Err(e) => {
                self.forget_place(writer, place)?;
                return Err(e);
            }
        }
        self.inflated.forget_all();
        self.size.store(size, Ordering::Release);
        writer.clear_past_end.store(false, Ordering::Release);
        self.note_cut(writer, size);
        Ok(())
    }
}
