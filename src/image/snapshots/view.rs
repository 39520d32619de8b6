//! Reading a snapshot while the disk goes on being written.
//!
//! A view is a disk of its own over the snapshot's L1 table that is only read. What it reads never
//! changes: everything that a snapshot refers to is either shared, and copied before a change, or
//! its own. A snapshot is not deleted while a view of it is open, and no cluster is moved while any
//! view is open.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::table::check_l1;
use super::{Image, SnapshotKey, Snapshots, info};
use crate::error::{Error, Result};
use crate::format::Snapshot;
use crate::image::SnapshotInfo;
use crate::image::health::Health;
use crate::image::inflate::InflateCache;
use crate::locks::GuestLocks;
use crate::tables::Tables;

/// Bytes of memory for parts of a snapshot's L2 tables.
const CACHE_BYTES: u64 = 4 << 20;

/// A snapshot that is open for reading. It is open until the last reference is dropped, and it must
/// not outlive its image: once that is closed the file is others' to change.
pub struct SnapshotView {
    info: SnapshotInfo,
    id: Vec<u8>,
    disk: Image,
}

impl SnapshotView {
    /// What is told of the snapshot.
    pub fn info(&self) -> &SnapshotInfo {
        &self.info
    }

    pub(super) fn id(&self) -> &[u8] {
        &self.id
    }

    /// Fills `buf` from `offset`. What lies past the end reads as zeros.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.disk.read(offset, buf)
    }

    /// As [`Image::next_data`].
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        self.disk.next_data(offset)
    }

    /// As [`Image::next_hole`].
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn next_hole(&self, offset: u64) -> Result<u64> {
        self.disk.next_hole(offset)
    }
}

impl Image {
    /// Opens snapshot `which` for reading.
    ///
    /// # Errors
    /// `NotFound`, host errors, `Corrupt`.
    pub fn open_snapshot<'a>(
        &self,
        which: impl Into<SnapshotKey<'a>>,
    ) -> Result<Arc<SnapshotView>> {
        // A view reads the tables in the file: nothing is on its way to another place.
        let _held = self.writer.as_ref().map(|writer| self.hold_moves(writer)).transpose()?;
        let mut state = self.snapshots.state.lock();
        let entry = state.find(which)?;
        let id = state.table.entries[entry].id.clone();
        // One is enough for all who read it: each has its tables in memory. (A stranger's image may have
        // several snapshots of one id.)
        let is_only = state.table.entries.iter().filter(|entry| entry.id == id).count() == 1;
        if let Some(view) = state.open_views(Some(&id)).pop().filter(|_| is_only) {
            return Ok(view);
        }
        let entry = &state.table.entries[entry];
        let view = Arc::new(SnapshotView {
            info: info(entry, self.virtual_size()),
            id,
            disk: self.snapshot_disk(entry)?,
        });
        state.views.push(Arc::downgrade(&view));
        Ok(view)
    }

    /// The open views of `other`, the same image as it was opened before, are this one's too.
    pub fn adopt_views(&self, other: &Image) {
        let views = other.snapshots.state.lock().open_views(None);
        let views = views.iter().map(Arc::downgrade);
        self.snapshots.state.lock().views.extend(views);
    }

    /// Bytes of the disk that a snapshot holds: those of the disk where the entry says none, as QEMU
    /// takes it. What is not mapped then, since the disk has grown, is a hole.
    ///
    /// # Errors
    /// `Corrupt` where its L1 table is too short for the size that it claims, which no program makes.
    /// (It may well be longer: the state of a virtual machine lies behind the disk.)
    pub(super) fn size_of(&self, snapshot: &Snapshot) -> Result<u64> {
        let Some(size) = snapshot.disk_size() else { return Ok(self.virtual_size()) };
        let entries = u64::from(snapshot.l1_size);
        if self.geometry.l1_entries_for(size) <= entries && i64::try_from(size).is_ok() {
            return Ok(size);
        }
        Err(Error::corrupt(format!(
            "snapshot {} claims a disk of {size} bytes, more than its L1 table of {entries} entries \
             can map: nothing in it can be relied on, delete it",
            snapshot.label()
        )))
    }

    fn snapshot_disk(&self, entry: &Snapshot) -> Result<Image> {
        let size = self.size_of(entry)?;
        let tables = Tables::open(
            self.storage.clone(),
            self.geometry,
            self.tables.metadata().clone(),
            check_l1(&self.geometry, entry)?,
            entry.l1_size,
            CACHE_BYTES,
            self.tables.memory(),
        )?;
        Ok(Image {
            storage: self.storage.clone(),
            data: self.data.clone(),
            geometry: self.geometry,
            size: AtomicU64::new(size),
            locks: GuestLocks::default(),
            tables,
            requests: AtomicU64::new(0),
            health: Health::new(self.health.label()),
            opened_corrupt: false,
            backing: self.backing.clone(),
            compression: self.compression,
            inflated: InflateCache::new(self.geometry.cluster_size(), self.tables.memory()),
            snapshots: Snapshots::default(),
            writer: None,
        })
    }
}
