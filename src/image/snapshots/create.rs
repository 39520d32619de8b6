//! Taking a snapshot.

use std::time::{Duration, SystemTime};

use super::table::l2_tables;
use super::{Image, MAX_NAME, SnapshotInfo, Writer, info};
use crate::error::{Error, ErrorKind, Result, legible};
use crate::format::{COPIED, Header, HostCluster, MAX_SNAPSHOTS, Snapshot};
use crate::locks;
use crate::rules::Rule;

/// Refcounts of 16 bits (2 to the 4th) count more snapshots than an image is likely to have: they
/// are tried without asking first.
const WIDE_ENOUGH: u32 = 4;

impl Image {
    /// Takes a snapshot of the disk as it is between the writes that have returned and those that
    /// come later; durable on return. Other requests for the disk wait (the module says how long).
    ///
    /// # Errors
    /// `Exists`; `Invalid` with a name that is empty, longer than 255 bytes or no UTF-8; `Unsupported` with
    /// refcounts of 1 bit; `TooBig` where a refcount or the number of snapshots is at its largest;
    /// `ReadOnly`, host errors, `Corrupt`. There is no snapshot then, unless the image is latched.
    pub fn take_snapshot(&self, name: &[u8]) -> Result<SnapshotInfo> {
        let _change = self.snapshots.change.lock();
        let (writer, _held) = self.begin_snapshot_change()?;
        let snapshot = self.new_entry(name)?;
        let taken = {
            let _flush = self.hold_flush(writer);
            // Most of it now, while requests go on.
            self.note(self.flush_held(writer))?;
            let _guard = self.locks.exclusive(locks::ALL);
            self.note(self.take_held(writer, snapshot))
        };
        if taken.is_err() && self.health.is_good() {
            let all = 0..self.tables.l1_entries() as u64;
            if let Err(e) = self.note(self.mark_own(writer, all)) {
                log::warn!("after a snapshot that failed: {e}");
            }
        }
        taken
    }

    /// The entry of a new snapshot of that name, without its L1 table.
    fn new_entry(&self, name: &[u8]) -> Result<Snapshot> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(Error::invalid("the name of a snapshot has 1 to 255 bytes"));
        }
        // By another name it could not be found again.
        if std::str::from_utf8(name).is_err() {
            return Err(Error::invalid("the name of a snapshot is UTF-8"));
        }
        if self.data.is_external {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the data is in an external data file, which snapshots cannot share; `qemu-img \
                 convert -O qcow2` makes an image with the data in it",
            ));
        }
        if self.geometry.max_refcount() < 2 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "refcounts of 1 bit cannot share clusters with a snapshot; `qemu-img convert -O \
                 qcow2` makes an image with wider ones",
            ));
        }
        let state = self.snapshots.state.lock();
        let entries = &state.table.entries;
        if entries.iter().any(|entry| entry.name == name) {
            let name = legible(name);
            return Err(Error::new(ErrorKind::Exists, format!("snapshot {name} is there already")));
        }
        if entries.len() >= MAX_SNAPSHOTS as usize {
            let message = format!("there are {MAX_SNAPSHOTS} snapshots, as many as can be");
            return Err(Error::new(ErrorKind::TooBig, message));
        }
        let id = entries.iter().map(|entry| numeric(&entry.id)).max().unwrap_or(0) + 1;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let (id, now) = (id.to_string().into_bytes(), now.unwrap_or(Duration::ZERO));
        Ok(Snapshot::new(id, name.to_vec(), self.virtual_size(), now))
    }

    /// The flush lock and all guest clusters are held.
    fn take_held(&self, writer: &Writer, mut snapshot: Snapshot) -> Result<SnapshotInfo> {
        let disk_size = self.virtual_size();
        snapshot.set_disk_size(disk_size);
        // What lies past the end of the disk is no part of it.
        let mut l1 = self.tables.l1();
        l1.truncate(self.geometry.l1_entries_for(disk_size) as usize);
        l1.resize(l1.len().max(1), 0);
        l1.iter_mut().for_each(|entry| *entry &= !COPIED);

        if self.geometry.refcount_order() < WIDE_ENOUGH {
            // Where it does not fit, nothing has changed.
            self.raise_references(writer, &l1)?;
            self.undo_raise(writer, &l1, u64::MAX);
        }
        self.tables.share_tables(l1.len());
        self.share_entries(writer, &l1, &snapshot)?;
        self.raise_references(writer, &l1)?;
        match self.link_snapshot(writer, snapshot, &l1) {
            Ok(taken) => Ok(taken),
            Err(e) => {
                if self.health.is_good() {
                    self.undo_raise(writer, &l1, u64::MAX);
                }
                Err(e)
            }
        }
    }

    /// Clears COPIED in the L2 tables of `l1`, durably, with whatever else has changed. The flush
    /// lock and all guest clusters are held.
    pub(super) fn share_entries(
        &self,
        writer: &Writer,
        l1: &[u64],
        snapshot: &Snapshot,
    ) -> Result<()> {
        writer.trusted.forget_all();
        for table in l2_tables(l1, &self.geometry, snapshot)? {
            self.tables.share_entries(table)?;
            if self.tables.is_crowded() {
                self.flush_held(writer)?;
            }
        }
        if Rule::FlagsBeforeSharing.is_kept() { self.flush_held(writer) } else { Ok(()) }
    }

    fn link_snapshot(
        &self,
        writer: &Writer,
        mut snapshot: Snapshot,
        l1: &[u64],
    ) -> Result<SnapshotInfo> {
        let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let place = self.write_new_place(writer, &bytes)?;
        snapshot.l1_table_offset = self.geometry.host_offset(HostCluster(place.start));
        snapshot.l1_size = l1.len() as u32;
        let taken = info(&snapshot, self.virtual_size());
        let mut entries = self.snapshots.state.lock().table.entries.clone();
        entries.push(snapshot);
        match self.switch_table(writer, entries) {
            Ok(old) => {
                place.for_each(|cluster| {
                    self.tables.metadata().insert(HostCluster(cluster));
                });
                writer.recycler.release(old);
                Ok(taken)
            }
            Err(e) => {
                self.forget_place(writer, place)?;
                Err(e)
            }
        }
    }

    /// The header's fields of an L1 table and the size of the disk, in one write.
    pub(super) fn disk_patch(
        &self,
        size: u64,
        entries: u32,
        place: HostCluster,
    ) -> Result<crate::format::Patch> {
        const CRYPT_METHOD: u64 = 32;
        let mut crypt_method = [0; 4];
        self.storage
            .read_at(&mut crypt_method, CRYPT_METHOD)
            .map_err(|e| Error::io("reading the header", e))?;
        let offset = self.geometry.host_offset(place);
        Ok(Header::patch_disk(size, u32::from_be_bytes(crypt_method), entries, offset))
    }
}

/// The number that an id starts with; 0 where it starts with none.
fn numeric(id: &[u8]) -> u64 {
    let digits = id.iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(0u64, |number, digit| {
        number.saturating_mul(10).saturating_add(u64::from(digit - b'0')).min(u64::MAX - 1)
    })
}
