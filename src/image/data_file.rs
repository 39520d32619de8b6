//! Where guest data is: in clusters of the image file, or in an external data file.
//!
//! In an external data file every guest cluster has its own place, at the guest's offset. Nothing
//! is allocated there, nothing is counted, shared, compressed or moved; L2 tables say only which
//! places are in use. What that is worth:
//!
//! - a sector of the data file never holds another sector's data, so what is discarded is punched
//!   at once: whatever the tables on disk still say, old data or zeros are read;
//! - a flush syncs the data file before it writes anything else, so an entry that leads there may
//!   be written at any time after;
//! - what stands in a place that is not in use may be anything, an older content of the same
//!   sectors too: it is erased before the place is used.
//!
//! A data file that is marked as *raw* reads by itself as the disk does, after a crash too. So there
//! no cluster is ever unmapped, zeroing erases the file, and before data goes to a cluster that is
//! not mapped (QEMU maps all when it makes the image, and unmaps what it discards) the whole L2
//! table is filled and flushed. The file is at least as long as the disk.
//! Where the data is encrypted the file by itself says nothing, so that mark goes with the first
//! write, no zeros are punched, and what is discarded keeps its blocks.
//!
//! Which file it is and whether it may be opened is decided by the caller of [`Image::open_with`];
//! nothing here follows a name.

use std::ops::Range;
use std::sync::Arc;

use super::{Image, Writer};
use crate::crypt::{DataCipher, Location};
use crate::error::{Error, Result};
use crate::format::{GuestCluster, GuestOffset, HostCluster, HostOffset, L2Entry, MixedCluster};
use crate::recycler::Rooted;
use crate::rules::Rule;
use crate::storage::{self, Storage};
use crate::tables::{LinkOrder, Mapping, Run};

/// The file that guest data is in.
#[derive(Clone)]
pub(super) struct DataFile {
    /// That file; the image file where there is no other.
    pub(super) storage: Arc<dyn Storage>,
    /// It is not the image file.
    pub(super) is_external: bool,
    /// It reads as the disk by itself.
    pub(super) is_raw: bool,
    /// It is raw, and nobody keeps account of what changes: who writes it need not say so.
    pub(super) may_be_passed: bool,
    /// What encrypts the data, wherever it is.
    pub(super) cipher: Option<Arc<DataCipher>>,
}

/// Where new guest clusters get their data, in consecutive host clusters. Those of the image file
/// read as zeros, unless the image is encrypted; those of a data file as anything.
#[must_use = "what is not linked goes back to where it came from"]
pub(super) enum Place<'a> {
    /// Clusters of the image file.
    Pool(Rooted<'a>),
    /// Their own places in the data file.
    External(Range<u64>),
}

impl Place<'_> {
    pub(super) fn first(&self) -> HostCluster {
        match self {
            Place::Pool(rooted) => rooted.first(),
            Place::External(clusters) => HostCluster(clusters.start),
        }
    }

    pub(super) fn count(&self) -> u64 {
        match self {
            Place::Pool(rooted) => rooted.count(),
            Place::External(clusters) => clusters.end - clusters.start,
        }
    }

    /// When entries that lead there may reach the disk, as far as the place itself is concerned.
    pub(super) fn order(&self) -> LinkOrder {
        match self {
            Place::Pool(rooted) => rooted.order(),
            Place::External(_) => LinkOrder::Any,
        }
    }

    /// When entries that lead to a copy of older data may reach the disk.
    pub(super) fn order_of_copy(&self) -> LinkOrder {
        match self {
            Place::Pool(_) => LinkOrder::as_demanded_by(Rule::CopyBeforeEntry),
            Place::External(_) => LinkOrder::Any,
        }
    }

    /// The first `count` of them are in use now.
    pub(super) fn linked(self, count: u64) {
        if let Place::Pool(rooted) = self {
            rooted.linked(count);
        }
    }
}

impl Image {
    /// A place for guest clusters from `first` on, at least one and at most `wanted`.
    pub(super) fn take_place<'a>(
        &self,
        writer: &'a Writer,
        first: GuestCluster,
        wanted: u64,
    ) -> Result<Place<'a>> {
        match self.data.is_external {
            true => Ok(Place::External(first.0..first.0 + wanted)),
            false => writer.recycler.take(wanted).map(Place::Pool),
        }
    }

    /// Sees to it that all of `range` is mapped, durably, where data may be written nowhere else: to
    /// a raw data file. No guest clusters are held.
    pub(super) fn map_raw(&self, writer: &Writer, range: &Range<u64>) -> Result<()> {
        if !self.data.is_raw {
            return Ok(());
        }
        let mut at = range.start;
        while at < range.end {
            let table_end = self.table_end(self.geometry.guest_cluster(GuestOffset(at)));
            let end = range.end.min(table_end << self.geometry.cluster_bits());
            if !self.is_mapped(at..end)? {
                self.note(self.fill_table(writer, at))?;
            }
            at = end;
        }
        // What another thread has mapped may be no more durable than what was mapped here.
        let is_durable = writer.flush.raw_mappings.are_durable();
        if is_durable || !Rule::RawMappingFirst.is_kept() { Ok(()) } else { self.flush() }
    }

    fn is_mapped(&self, range: Range<u64>) -> Result<bool> {
        self.all_runs(range, |run| !matches!(run, Run::Unallocated | Run::Zero))
    }

    /// Whether all that `range` consists of is so.
    pub(super) fn all_runs(&self, range: Range<u64>, is_so: impl Fn(Run) -> bool) -> Result<bool> {
        let _guard = self.locks.shared(self.geometry.guest_clusters(&range));
        let mut at = range.start;
        while at < range.end {
            let (run, end) = self.note(self.run_at(at, range.end))?;
            if !is_so(run) {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
    }

    /// Maps every cluster of the disk that shares its L2 table with guest offset `at`.
    fn fill_table(&self, writer: &Writer, at: u64) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        let table_end = self.table_end(self.geometry.guest_cluster(GuestOffset(at)));
        let clusters = table_end - self.geometry.l2_entries()..table_end;
        let _guard = self.locks.exclusive(clusters.clone());
        let end = clusters.end.min(self.geometry.clusters_for(self.virtual_size()).0) << bits;
        let filled = self.fill_clusters(writer, clusters.start << bits..end);
        writer.flush.raw_mappings.note();
        filled
    }

    /// Maps whole guest clusters, held exclusively, of one L2 table.
    fn fill_clusters(&self, writer: &Writer, range: Range<u64>) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        let (mut at, end) = (range.start, range.end);
        while at < end {
            let (mapping, run_end) = self.mapping_at(at, end)?;
            let first = self.geometry.guest_cluster(GuestOffset(at));
            match mapping {
                Mapping::Uniform(Run::Unallocated | Run::Zero) => {
                    self.ensure_table(writer, first)?;
                    let place = Place::External(first.0..run_end >> bits);
                    self.clear_around(&place, &(at..at))?;
                    self.link(writer, first, place)?;
                }
                Mapping::Uniform(_) => {}
                Mapping::Mixed(mixed) => self.fill_cluster(writer, first, &mixed)?,
            }
            at = run_end;
        }
        Ok(())
    }

    /// Allocates all subclusters of a cluster, those that were not reading zeros as before.
    fn fill_cluster(
        &self,
        writer: &Writer,
        guest: GuestCluster,
        mixed: &MixedCluster,
    ) -> Result<()> {
        let start = guest.0 << self.geometry.cluster_bits();
        let (mut at, end) = (start, start + self.cluster_size());
        while at < end {
            let (run, run_end) = self.piece_at(mixed, at, end);
            if !matches!(run, Run::Data { .. }) {
                self.erase_data(at..run_end)?;
            }
            at = run_end;
        }
        self.ensure_table(writer, guest)?;
        let entry = L2Entry::Data { cluster: HostCluster(guest.0), copied: true };
        self.set_entry(guest, LinkOrder::Any, entry)?;
        writer.recycler.note_change();
        Ok(())
    }

    /// Makes the parts of `place` zeros that will not be written: `written` are the guest offsets
    /// that will.
    pub(super) fn clear_around(&self, place: &Place<'_>, written: &Range<u64>) -> Result<()> {
        if self.data.cipher.is_none() && matches!(place, Place::Pool(_)) {
            return Ok(());
        }
        let start = written.start - self.geometry.within(written.start);
        let end = start + (place.count() << self.geometry.cluster_bits());
        let first = self.location(place.first(), start);
        self.zero_data(first, written.start - start)?;
        self.zero_data(first.after((written.end - start) as usize), end - written.end)
    }

    /// Makes a range of the file that data is in zeros, in place.
    pub(super) fn erase_data(&self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let erased = storage::erase(&*self.data.storage, range.clone())
            .map_err(|e| Error::io(format!("erasing data at {:#x}", range.start), e));
        self.mark_data_unsynced();
        erased
    }

    /// Writes data that belongs at `at`.
    pub(super) fn write_data(&self, data: &[u8], at: Location) -> Result<()> {
        match &self.data.cipher {
            None => self.write_plain(data, at.host),
            Some(cipher) => self.write_encrypted(cipher, data, at),
        }
    }

    /// Writes bytes as they stand in the file that data is in.
    pub(super) fn write_plain(&self, data: &[u8], offset: u64) -> Result<()> {
        self.check_place(offset..offset + data.len() as u64)?;
        let written = self
            .data
            .storage
            .write_at(data, offset)
            .map_err(|e| Error::io(format!("writing data at {offset:#x}"), e));
        self.mark_data_unsynced();
        written
    }

    /// What comes before every write of data: no metadata is there, and what lies past the end that
    /// the file has had so far is counted, so that it is a part of the image.
    pub(super) fn check_place(&self, range: Range<u64>) -> Result<()> {
        let Some(writer) = self.writer.as_ref().filter(|_| !self.data.is_external) else {
            return Ok(());
        };
        let metadata = self.tables.metadata();
        let clusters =
            self.geometry.host_clusters(HostOffset(range.start), range.end - range.start);
        let count = clusters.end - clusters.start;
        if let Some(cluster) = metadata.first_in(HostCluster(clusters.start), count) {
            return Err(Error::corrupt(format!(
                "data would be written to {}, which is metadata",
                self.geometry.host_offset(cluster)
            )));
        }
        if !metadata.is_in_file(&clusters) {
            for cluster in clusters.clone().map(HostCluster) {
                if writer.refcounts.get(cluster)? == 0 {
                    return Err(self.uncounted(cluster));
                }
            }
            metadata.grow_to(clusters.end);
        }
        Ok(())
    }

    /// Reads the data at `at`.
    pub(super) fn read_data(&self, buf: &mut [u8], at: Location) -> Result<()> {
        match &self.data.cipher {
            None => self.read_plain(buf, at.host),
            Some(cipher) => self.read_encrypted(cipher, buf, at),
        }
    }

    /// Reads bytes as they stand in the file that data is in.
    pub(super) fn read_plain(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.data
            .storage
            .read_at(buf, offset)
            .map_err(|e| Error::io(format!("reading data at {offset:#x}"), e))
    }

    /// The first offset at or after `offset` of the file that data is in which may hold something
    /// other than zeros.
    pub(super) fn seek_data(&self, offset: u64) -> Result<Option<u64>> {
        let found = self.data.storage.seek_data(offset);
        found.map_err(|e| Error::io(format!("looking for data at {offset:#x}"), e))
    }

    /// The tables refer to a cluster of data one time less.
    pub(super) fn drop_data(&self, writer: &Writer, cluster: HostCluster) -> Result<()> {
        match self.data.is_external {
            true => Ok(()),
            false => self.drop_reference(writer, cluster),
        }
    }

    /// Makes an external data file at least as long as a disk of `size` bytes, with zeros.
    pub(super) fn lengthen_data_file(&self, size: u64) -> Result<()> {
        self.set_data_file_length(size, |old| old < size)
    }

    /// Cuts what an external data file is longer by than a disk of `size` bytes.
    pub(super) fn cut_data_file(&self, size: u64) -> Result<()> {
        // What decrypts to zeros behind the end of the disk stays.
        let size = match self.data.cipher {
            Some(_) => size.next_multiple_of(self.cluster_size()),
            None => size,
        };
        self.set_data_file_length(size, |old| old > size)
    }

    fn set_data_file_length(&self, size: u64, applies: impl FnOnce(u64) -> bool) -> Result<()> {
        if !self.data.is_external {
            return Ok(());
        }
        let storage = &self.data.storage;
        let changed = storage.len().and_then(|old| match applies(old) {
            true => storage.set_len(size),
            false => Ok(()),
        });
        self.mark_data_unsynced();
        changed.map_err(|e| Error::io(format!("making the data file {size} bytes long"), e))
    }
}
