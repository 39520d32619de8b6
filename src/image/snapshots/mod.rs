//! Internal snapshots: list, read, take, apply, delete, while the disk is in use.
//!
//! A snapshot has an L1 table of its own and shares L2 tables and data with the disk by refcounts
//! above 1; what is shared is copied before it is changed. So what a snapshot refers to never
//! changes, and reading one needs no lock against the disk's writers.
//!
//! No change of refcounts, COPIED flags and the snapshot table is atomic together. The order makes
//! every state in between a sound one:
//!
//! | change | one after the other, each durable before the next |
//! |---|---|
//! | take | COPIED flags of the disk go; refcounts rise, the new L1 and snapshot tables are written; the header switches |
//! | delete | a new snapshot table is written; the header switches; refcounts fall; COPIED flags return |
//! | apply | COPIED flags of the snapshot's tables go; refcounts rise, a new L1 table is written; the header switches; the old tables' refcounts fall |
//!
//! So a refcount is never lower than the references, and COPIED never stands where a refcount is
//! above 1. What a crash can leave is refcounts that are too high (leaks) and refcounts of 1
//! without COPIED (which a write finds and mends; until then `qemu-img check` calls it an error and
//! `-r leaks` mends it). The search for leaks after the next open mends both ([`super::leaks`]). The
//! header's dirty bit is not used: version 2 has none, and it would make the next open wait until
//! all refcounts are built anew.
//!
//! # What it costs
//! Taking a snapshot holds the whole disk from clearing the flags to the header switch: every L2
//! table is read and, where it maps anything that was not shared already, written once, and each
//! mapped cluster's refcount is raised in memory and written. Nothing is copied but the L1 table.
//! Deleting holds one L2 table's part of the disk at a time, applying the whole disk until the
//! header has switched.
//!
//! The state of a virtual machine that QEMU keeps in a snapshot lies past the end of the disk; it
//! stays with its snapshot, whatever happens to the disk, and is never shown or applied.
//!
//! Moving clusters ([`super::compact`]) and snapshots keep out of each other's way: while snapshots
//! change nothing moves, and no pass begins while somebody reads a snapshot.
//!
//! Lock order: the lock of changes, that of compaction, then as in the crate's documentation.

mod apply;
mod create;
mod delete;
mod references;
mod table;
mod view;

use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use parking_lot::{Mutex, MutexGuard};
use serde::Serialize;

use super::compact::Compaction;
use super::open::read_header;
use super::{Image, Writer};
use crate::error::{Error, ErrorKind, Result, legible};
use crate::format::{Header, HostCluster, HostOffset, Snapshot};
use crate::rules::Rule;
use crate::storage::Storage;

pub(super) use table::{Table, read_bytes, read_entries};
pub use view::SnapshotView;

/// Bytes of the longest name that is given here: that of a file.
const MAX_NAME: usize = 255;

/// What is told of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SnapshotInfo {
    /// Its id. No other snapshot of the image has it.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was taken.
    #[serde(skip)]
    pub taken: SystemTime,
    /// Bytes of the disk.
    pub disk_size: u64,
    /// Bytes of the state of a virtual machine that belongs to it.
    pub vm_state_size: u64,
}

/// How a snapshot is named.
#[derive(Clone, Copy, Debug)]
pub enum SnapshotKey<'a> {
    /// By its name, or else by its id.
    NameOrId(&'a [u8]),
    /// By its id only.
    Id(&'a [u8]),
}

impl<'a> From<&'a [u8]> for SnapshotKey<'a> {
    fn from(which: &'a [u8]) -> Self {
        SnapshotKey::NameOrId(which)
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for SnapshotKey<'a> {
    fn from(which: &'a [u8; N]) -> Self {
        SnapshotKey::NameOrId(which)
    }
}

/// The snapshots of an open image.
#[derive(Default)]
pub(super) struct Snapshots {
    /// Held while snapshots are changed. Lock order: before the flush lock.
    change: Mutex<()>,
    /// Lock order: a leaf, never held across I/O but for opening a view.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    table: Table,
    /// Why the table could not be read.
    damage: Option<Error>,
    /// Those that are being read, perhaps with some that are not any more.
    views: Vec<Weak<SnapshotView>>,
    /// One that is being deleted, and where it stood.
    taken_out: Option<(usize, Snapshot)>,
}

impl Snapshots {
    /// The snapshots of an image that is being opened.
    pub(super) fn new(table: Result<Table>) -> Self {
        let (table, damage) = match table {
            Ok(table) => (table, None),
            Err(e) => (Table::default(), Some(e)),
        };
        let state = State { table, damage, ..State::default() };
        Snapshots { state: Mutex::new(state), ..Snapshots::default() }
    }

    /// Whether there are any.
    pub(super) fn any(&self) -> bool {
        !self.state.lock().table.entries.is_empty()
    }
}

impl State {
    fn sound(&self) -> Result<()> {
        self.damage.as_ref().map_or(Ok(()), |damage| Err(damage.duplicate()))
    }

    /// The entry of a snapshot.
    fn find<'a>(&self, key: impl Into<SnapshotKey<'a>>) -> Result<usize> {
        self.sound()?;
        let entries = &self.table.entries;
        let with_id = |id: &[u8]| entries.iter().position(|entry| entry.id == id);
        let (found, which) = match key.into() {
            SnapshotKey::Id(id) => (with_id(id), id),
            SnapshotKey::NameOrId(which) => {
                let named = entries.iter().position(|entry| entry.name == which);
                (named.or_else(|| with_id(which)), which)
            }
        };
        found.ok_or_else(|| {
            let which = legible(which);
            Error::new(ErrorKind::NotFound, format!("there is no snapshot {which}"))
        })
    }

    /// The open views of the snapshot with that id, of all snapshots for `None`.
    fn open_views(&mut self, id: Option<&[u8]>) -> Vec<Arc<SnapshotView>> {
        self.views.retain(|view| view.strong_count() > 0);
        let open = self.views.iter().filter_map(Weak::upgrade);
        open.filter(|view| id.is_none_or(|id| view.id() == id)).collect()
    }
}

impl Image {
    /// The snapshots in the order of the snapshot table.
    ///
    /// # Errors
    /// `Corrupt` or `TooBig` where the snapshot table makes no sense.
    pub fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        let state = self.snapshots.state.lock();
        state.sound()?;
        Ok(state.table.entries.iter().map(|entry| info(entry, self.virtual_size())).collect())
    }

    /// The snapshots of an image that is not open here: header and snapshot table only are read.
    ///
    /// # Errors
    /// Those of [`Image::summarize`] and [`Image::snapshots`].
    pub fn list_snapshots(storage: &dyn Storage) -> Result<Vec<SnapshotInfo>> {
        let header = read_header(storage)?;
        let table = Table::read(storage, &header, u64::MAX)?;
        Ok(table.entries.iter().map(|entry| info(entry, header.size)).collect())
    }

    /// What a change of snapshots begins with. Nothing moves meanwhile: the lock is that of
    /// compaction. The search for leaks ends first: it cannot tell what a whole disk gains or loses, and
    /// what it has found says whether refcounts may be believed when much is freed by them.
    fn begin_snapshot_change(&self) -> Result<(&Writer, MutexGuard<'_, Compaction>)> {
        self.require_search(self.writer()?)?;
        let writer = self.begin_change()?;
        let held = self.hold_moves(writer)?;
        // What moved clusters may have failed.
        let writer = self.writer()?;
        self.snapshots.state.lock().sound()?;
        Ok((writer, held))
    }

    /// Ends what moves clusters, until the lock is let go, and makes the tables on disk say where
    /// everything is now. Where an image takes no writes any more, everything is still where they say.
    fn hold_moves<'a>(&self, writer: &'a Writer) -> Result<MutexGuard<'a, Compaction>> {
        let mut compaction = writer.compaction.lock();
        if self.end_moves(writer, &mut compaction) {
            let flushed = self.flush().or_else(|e| match self.health.is_good() {
                true => Err(e),
                false => Ok(()),
            });
            let reread = flushed.and_then(|()| self.reread_snapshots());
            if reread.is_err() || !self.health.is_good() {
                compaction.note_moved();
            }
            reread?;
        }
        Ok(compaction)
    }

    /// The snapshot table may have moved, and the L1 tables: what is known of them is what stands in
    /// the file, where a flush has just brought it, or none brings anything any more.
    pub(super) fn reread_snapshots(&self) -> Result<()> {
        let header = read_header(&*self.storage)?;
        let table = Table::read(&*self.storage, &header, u64::MAX)?;
        self.snapshots.state.lock().table = table;
        Ok(())
    }

    /// Whether somebody reads a snapshot, so that nothing may move: a view believes that what its
    /// tables say stays as it is.
    pub(super) fn are_snapshots_read(&self) -> bool {
        !self.snapshots.state.lock().open_views(None).is_empty()
    }

    /// Writes a snapshot table with `entries` and makes the header name it, with all refcounts
    /// before; returns the place of the old one. The flush lock is held. After an error
    /// the old table is what counts, unless the image is latched.
    fn switch_table(&self, writer: &Writer, entries: Vec<Snapshot>) -> Result<Range<u64>> {
        let bytes = Table::encode(&entries)?;
        let clusters = self.write_new_place(writer, &bytes)?;
        let offset = match bytes.is_empty() {
            true => HostOffset(0),
            false => self.geometry.host_offset(HostCluster(clusters.start)),
        };
        let patch = Header::patch_snapshots(entries.len() as u32, offset);
        let switched = self
            .write_refcounts(writer, Some(Rule::SnapshotsBeforeHeader))
            .and_then(|_| self.patch_header(writer, &patch, Rule::SnapshotSwitchBeforeReuse));
        if let Err(e) = switched {
            self.forget_place(writer, clusters)?;
            return Err(e);
        }
        clusters.clone().for_each(|cluster| {
            self.tables.metadata().insert(HostCluster(cluster));
        });
        let table = Table { clusters, entries };
        let old = std::mem::replace(&mut self.snapshots.state.lock().table, table);
        self.tables.metadata().give_up(old.clusters.clone());
        Ok(old.clusters)
    }

    /// New clusters that hold `bytes` and then zeros, counted in memory, written and not synced.
    fn write_new_place(&self, writer: &Writer, bytes: &[u8]) -> Result<Range<u64>> {
        let count = self.geometry.clusters_for(bytes.len() as u64).0;
        if count == 0 {
            return Ok(0..0);
        }
        let mut place = writer.refcounts.allocate(count)?.clusters;
        if place.end - place.start < count {
            writer.refcounts.release(place)?;
            place = writer.refcounts.allocate_at_end(count)?;
        }
        let mut padded = bytes.to_vec();
        padded.resize((count << self.geometry.cluster_bits()) as usize, 0);
        let offset = self.geometry.host_offset(HostCluster(place.start));
        match self.write_host(&padded, offset.0) {
            Ok(()) => Ok(place),
            Err(e) => {
                self.forget_place(writer, place)?;
                Err(e.context("a table of a snapshot"))
            }
        }
    }

    /// Gives clusters back that nothing refers to, unless it is not known whether the header does.
    fn forget_place(&self, writer: &Writer, place: Range<u64>) -> Result<()> {
        if self.health.is_good() { writer.refcounts.release(place) } else { Ok(()) }
    }
}

/// What is told of an entry of the snapshot table; `disk_size` is the disk's, which QEMU takes where
/// the entry says none.
fn info(entry: &Snapshot, disk_size: u64) -> SnapshotInfo {
    let taken = Duration::new(u64::from(entry.seconds), 0)
        + Duration::from_nanos(u64::from(entry.nanoseconds));
    SnapshotInfo {
        id: String::from_utf8_lossy(&entry.id).into_owned(),
        name: String::from_utf8_lossy(&entry.name).into_owned(),
        taken: SystemTime::UNIX_EPOCH + taken,
        disk_size: entry.disk_size().unwrap_or(disk_size),
        vm_state_size: entry.vm_state_size(),
    }
}
