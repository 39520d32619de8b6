//! Writing: in place where the cluster is ours alone, else into new clusters.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::data_file::Place;
use super::{Image, Writer};
use crate::error::{Error, Result};
use crate::format::{GuestCluster, GuestOffset, HostCluster, HostOffset, L2Entry};
use crate::rules::Rule;
use crate::storage::reserve_metadata;
use crate::tables::{LinkOrder, Mapping, Run, TableState};

impl Image {
    /// Writes all of `data` at guest offset `offset`. Zeros onto unallocated clusters allocate
    /// nothing.
    ///
    /// # Errors
    /// `Invalid` past the end of the disk, `ReadOnly`, host errors, `Corrupt`. What was written
    /// before the error stays; no cluster is half linked.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let writer = self.begin_change()?;
        let end =
            offset
                .checked_add(data.len() as u64)
                .filter(|end| *end <= self.virtual_size())
                .ok_or_else(|| Error::invalid(format!("a write at {offset:#x} is past the end")))?;
        let range = offset..end;
        self.map_raw(writer, &range)?;
        self.record_change(writer, &range);
        let mut at = if self.is_writable_by_many(&range) {
            let _guard = self.locks.shared(self.geometry.guest_clusters(&range));
            // The disk may have been cut while nothing was held.
            let within_disk = offset..end.min(self.virtual_size()).max(offset);
            self.note(self.write_in_place(writer, &within_disk, data))?
        } else {
            offset
        };
        if at < end {
            let _guard = self.locks.exclusive(self.geometry.guest_clusters(&(at..end)));
            // The disk may have been cut while nothing was held.
            let end = end.min(self.virtual_size()).max(at);
            while at < end {
                let rest = &data[(at - offset) as usize..(end - offset) as usize];
                at = self.note(self.write_some(writer, at, rest))?;
            }
        }
        Ok(())
    }

    /// What every change of the disk begins with: the image takes writes, its header is ready for
    /// them, and the table cache has room. No guest clusters are held.
    pub(super) fn begin_change(&self) -> Result<&Writer> {
        let writer = self.writer()?;
        self.prepare_to_write(writer)?;
        self.begin_recording(writer)?;
        if self.tables.is_crowded() {
            self.flush()?;
        }
        Ok(writer)
    }

    /// Writes the start of `range` as far as its clusters may be written in place; returns where
    /// that ends. The clusters are held.
    fn write_in_place(&self, writer: &Writer, range: &Range<u64>, data: &[u8]) -> Result<u64> {
        let mut at = range.start;
        while at < range.end {
            let (run, end) = self.run_to_change(writer, at, range.end)?;
            let Run::Data { first, copied: true } = run else { break };
            let piece = &data[(at - range.start) as usize..(end - range.start) as usize];
            self.write_data(piece, self.location(first, at))?;
            at = end;
        }
        Ok(at)
    }

    /// Writes the first run of `data` at `at`, whatever is there; returns where that ends. The
    /// clusters are held exclusively.
    pub(super) fn write_some(&self, writer: &Writer, at: u64, data: &[u8]) -> Result<u64> {
        let (mapping, end) = self.mapping_to_change(writer, at, at + data.len() as u64)?;
        let run = match self.told_apart(mapping) {
            Mapping::Uniform(run) => run,
            Mapping::Mixed(mixed) => {
                let end = end.min(self.cluster_end(at));
                self.write_subclusters(writer, at, &data[..(end - at) as usize], &mixed)?;
                return Ok(end);
            }
        };
        let data = &data[..(end - at) as usize];
        match run {
            Run::Data { first, copied: true } => {
                self.write_data(data, self.location(first, at))?;
                Ok(end)
            }
            Run::Data { copied: false, .. } | Run::Compressed { .. } | Run::Backing => {
                let end = end.min(self.cluster_end(at));
                self.rewrite(writer, at, run, &data[..(end - at) as usize])?;
                Ok(end)
            }
            Run::Unallocated | Run::Zero => self.write_new(writer, at, data),
        }
    }

    /// Writes `data` at `at`, where nothing is allocated, as far as consecutive clusters were to be
    /// had.
    fn write_new(&self, writer: &Writer, at: u64, data: &[u8]) -> Result<u64> {
        let (zeros, data_end) = self.measure_zeros(at, data);
        if zeros > 0 {
            return Ok(at + zeros);
        }
        let first = self.geometry.guest_cluster(GuestOffset(at));
        self.ensure_table(writer, first)?;
        // One table holds all that is linked at a time.
        let table_end = self.table_end(first);
        let wanted = self.geometry.guest_clusters(&(at..data_end)).end.min(table_end) - first.0;
        let place = self.take_place(writer, first, wanted)?;
        let taken_end = (first.0 + place.count()) << self.geometry.cluster_bits();
        let end = data_end.min(taken_end);
        self.clear_around(&place, &(at..end))?;
        self.write_data(&data[..(end - at) as usize], self.location(place.first(), at))?;
        self.link(writer, first, place)?;
        Ok(end)
    }

    /// How many bytes at the start of `data`, which begins at guest offset `at`, are whole clusters'
    /// parts of nothing but zeros; and the guest offset where the non-zero ones after them end.
    fn measure_zeros(&self, at: u64, data: &[u8]) -> (u64, u64) {
        let end = at + data.len() as u64;
        let is_zero = |from: u64| {
            let to = self.cluster_end(from).min(end);
            is_all_zero(&data[(from - at) as usize..(to - at) as usize])
        };
        let next = |from: u64| self.cluster_end(from).min(end);
        let mut from = at;
        while from < end && is_zero(from) {
            from = next(from);
        }
        let zeros = from - at;
        while from < end && !is_zero(from) {
            from = next(from);
        }
        (zeros, from)
    }

    /// Makes `place` the clusters of the guest clusters from `first` on, which have a table and no
    /// data.
    pub(super) fn link(
        &self,
        writer: &Writer,
        first: GuestCluster,
        place: Place<'_>,
    ) -> Result<()> {
        let (host, count) = (place.first(), place.count());
        let mut linked = 0;
        let mut replaced = Vec::new();
        let guest = first.0..first.0 + count;
        let order = self.order_of_new(place.order());
        let result = self.tables.update(guest, order, |_, entry| {
            replaced.extend(entry.host_cluster().map(|(old, _)| old));
            let cluster = HostCluster(host.0 + linked);
            linked += 1;
            Ok(Some(L2Entry::Data { cluster, copied: true }))
        });
        place.linked(linked);
        writer.recycler.note_change();
        let dropped = replaced.into_iter().try_for_each(|old| self.drop_data(writer, old));
        result.and(dropped)
    }

    /// Sees to it that a guest cluster has an L2 table that may be changed: a new one, or a copy of
    /// one that is shared.
    pub(super) fn ensure_table(&self, writer: &Writer, cluster: GuestCluster) -> Result<()> {
        loop {
            let state = self.tables.table_state(cluster)?;
            let installed = match state {
                TableState::Absent => self.new_table(writer, cluster, state)?,
                TableState::Shared(table) => self.unshare_table(writer, cluster, table, state)?,
                TableState::Own(table) => match self.is_own(writer, table) {
                    Ok(true) => return Ok(()),
                    Ok(false) => self.unshare_table(writer, cluster, table, state)?,
                    Err(_) if self.tables.table_state(cluster)? != state => false,
                    Err(e) => return Err(e),
                },
            };
            writer.recycler.note_change();
            if installed {
                return Ok(());
            }
        }
    }

    fn new_table(
        &self,
        writer: &Writer,
        cluster: GuestCluster,
        replaces: TableState,
    ) -> Result<bool> {
        let rooted = writer.recycler.take(1)?;
        let table = rooted.first();
        // Host blocks now, so that a flush cannot run out of space for them.
        let start = self.geometry.host_offset(table).0;
        reserve_metadata(&*self.storage, start..start + self.geometry.cluster_size())
            .map_err(|e| Error::io(format!("reserving an L2 table at {start:#x}"), e))?;
        let installed = self.tables.install_table(cluster, table, replaces, rooted.order())?;
        if installed {
            rooted.linked(1);
        }
        Ok(installed)
    }

    fn unshare_table(
        &self,
        writer: &Writer,
        cluster: GuestCluster,
        table: HostCluster,
        replaces: TableState,
    ) -> Result<bool> {
        // Others hold clusters of the table, too. Who has unshared it meanwhile has let go of it: it
        // may be free by now, or anything else.
        let bytes = match self.read_shared_table(writer, table) {
            Ok(Some(bytes)) => bytes,
            // It is ours, only the flag may be missing.
            Ok(None) if replaces == TableState::Own(table) => return Ok(true),
            Ok(None) => {
                let order = LinkOrder::as_demanded_by(Rule::CountBeforeFlag);
                return self.tables.install_table(cluster, table, replaces, order);
            }
            Err(_) if self.tables.table_state(cluster)? != replaces => return Ok(false),
            Err(e) => return Err(e),
        };
        let rooted = writer.recycler.take(1)?;
        let copy = rooted.first();
        self.write_host(&bytes, self.geometry.host_offset(copy).0)?;
        // The copy must be durable before the entry that leads to it.
        let order = LinkOrder::as_demanded_by(Rule::TableCopyBeforeEntry);
        // Who has found meanwhile that the table is ours after all has changed it.
        let is_shared =
            || Ok(replaces != TableState::Own(table) || writer.refcounts.get(table)? > 1);
        let installed = self.tables.install_table_if(cluster, copy, replaces, order, is_shared)?;
        if installed {
            rooted.linked(1);
            self.tables.metadata().give_up(table.0..table.0 + 1);
            self.drop_reference(writer, table)?;
        }
        Ok(installed)
    }

    /// An L2 table that is shared, by its flag or its refcount; `None` where nothing else refers to it
    /// after all, which is not known before the search for damage is over.
    fn read_shared_table(&self, writer: &Writer, table: HostCluster) -> Result<Option<Vec<u8>>> {
        match writer.refcounts.get(table)? {
            0 => Err(self.uncounted(table)),
            1 if !writer.recycler.are_frees_held() => Ok(None),
            _ => self.tables.read_table(table).map(Some),
        }
    }

    /// Writes `data` at `at` into a cluster that may not be written in place: it is not marked as
    /// ours alone, compressed, or in the backing file. `old` is the run that starts with it.
    pub(super) fn rewrite(&self, writer: &Writer, at: u64, old: Run, data: &[u8]) -> Result<()> {
        let guest = self.geometry.guest_cluster(GuestOffset(at));
        if let Run::Data { first, .. } = old {
            let count = if self.data.is_external { 1 } else { writer.refcounts.get(first)? };
            match count {
                0 => return Err(self.uncounted(first)),
                1 if self.data.is_external || !writer.recycler.are_frees_held() => {
                    // It is ours, only the flag was missing. On disk the refcount may still be
                    // higher: it goes first.
                    self.ensure_table(writer, guest)?;
                    let entry = L2Entry::Data { cluster: first, copied: true };
                    let order = LinkOrder::as_demanded_by(Rule::CountBeforeFlag);
                    self.set_entry(guest, order, entry)?;
                    writer.recycler.note_change();
                    return self.write_data(data, self.location(first, at));
                }
                _ => {}
            }
        }
        let mut copy = vec![0; self.geometry.cluster_size() as usize];
        if data.len() < copy.len() {
            self.read_cluster(at, old, &mut copy)?;
        }
        let within = self.geometry.within(at) as usize;
        copy[within..within + data.len()].copy_from_slice(data);
        self.ensure_table(writer, guest)?;
        let place = self.take_place(writer, guest, 1)?;
        let cluster = place.first();
        self.write_data(&copy, self.location(cluster, guest.0 << self.geometry.cluster_bits()))?;
        // The copy must be durable before the entry that replaces the original.
        let entry = L2Entry::Data { cluster, copied: true };
        self.set_entry(guest, place.order_of_copy(), entry)?;
        place.linked(1);
        writer.recycler.note_change();
        self.drop_old(writer, old)
    }

    /// Fills `cluster` with the guest cluster that `at` lies in and `run` starts with.
    fn read_cluster(&self, at: u64, run: Run, cluster: &mut [u8]) -> Result<()> {
        match run {
            Run::Data { first, .. } => {
                self.read_data(cluster, self.location(first, at - self.geometry.within(at)))
            }
            Run::Compressed { offset, length } => self.read_compressed(offset, length, 0, cluster),
            Run::Backing => self.read_backing(at - self.geometry.within(at), cluster),
            Run::Unallocated | Run::Zero => {
                cluster.fill(0);
                Ok(())
            }
        }
    }

    /// The first guest cluster of `run` refers to its data no more.
    pub(super) fn drop_old(&self, writer: &Writer, run: Run) -> Result<()> {
        match run {
            Run::Data { first, .. } => self.drop_data(writer, first),
            Run::Compressed { offset, length } => self.drop_compressed(writer, offset, length),
            Run::Unallocated | Run::Zero | Run::Backing => Ok(()),
        }
    }

    /// The tables refer to compressed data one time less: one reference for each host cluster that
    /// it touches.
    pub(super) fn drop_compressed(
        &self,
        writer: &Writer,
        offset: HostOffset,
        length: u64,
    ) -> Result<()> {
        writer.compressed_dropped.fetch_add(length, Ordering::Relaxed);
        self.release_compressed(writer, offset, length)
    }

    /// The same where it has only moved.
    pub(super) fn release_compressed(
        &self,
        writer: &Writer,
        offset: HostOffset,
        length: u64,
    ) -> Result<()> {
        self.inflated.forget(offset);
        self.geometry
            .host_clusters(offset, length)
            .try_for_each(|cluster| self.drop_reference(writer, HostCluster(cluster)))
    }

    pub(super) fn set_entry(
        &self,
        cluster: GuestCluster,
        order: LinkOrder,
        entry: L2Entry,
    ) -> Result<()> {
        self.tables.update(cluster.0..cluster.0 + 1, order, |_, _| Ok(Some(entry)))
    }

    /// The tables refer to a host cluster one time less. What else refers to it, its refcount says.
    pub(super) fn drop_reference(&self, writer: &Writer, cluster: HostCluster) -> Result<()> {
        match writer.refcounts.get(cluster)? {
            0 => Err(self.uncounted(cluster)),
            1 => writer.recycler.drop_used(cluster.0..cluster.0 + 1),
            _ => {
                writer.recycler.drop_shared(cluster);
                Ok(())
            }
        }
    }

    pub(super) fn uncounted(&self, cluster: HostCluster) -> Error {
        Error::corrupt(format!(
            "the cluster at {} is referenced but its refcount is 0",
            self.geometry.host_offset(cluster)
        ))
    }

    /// Reserves clusters and host blocks for `range`, so that writing there cannot run out of
    /// space. Contents stay; what lies past the end of the disk is ignored.
    ///
    /// # Errors
    /// `ReadOnly`, host errors, `Corrupt`.
    pub fn preallocate(&self, range: Range<u64>) -> Result<()> {
        self.preallocate_as(range, true)
    }

    /// Maps all of `range` to clusters, for which the host may have no space yet. Contents stay; what
    /// lies past the end of the disk is ignored.
    ///
    /// # Errors
    /// As [`Image::preallocate`].
    pub fn preallocate_metadata(&self, range: Range<u64>) -> Result<()> {
        self.preallocate_as(range, false)
    }

    fn preallocate_as(&self, range: Range<u64>, with_space: bool) -> Result<()> {
        let range = self.within_disk(range);
        let mut at = range.start;
        while at < range.end {
            let writer = self.begin_change()?;
            let step = at..range.end.min(self.step_end(at));
            self.map_raw(writer, &step)?;
            let _guard = self.locks.exclusive(self.geometry.guest_clusters(&step));
            // The disk may have been cut meanwhile: nothing is mapped past its end.
            let end = step.end.min(self.virtual_size());
            if at >= end {
                return Ok(());
            }
            while at < end {
                at = self.note(self.preallocate_some(writer, at, end, with_space))?;
            }
        }
        Ok(())
    }

    fn preallocate_some(
        &self,
        writer: &Writer,
        at: u64,
        end: u64,
        with_space: bool,
    ) -> Result<u64> {
        let (mapping, run_end) = self.mapping_at(at, end)?;
        let first = self.geometry.guest_cluster(GuestOffset(at));
        let clusters = self.geometry.guest_clusters(&(at..run_end));
        let run = match self.told_apart(mapping) {
            Mapping::Uniform(run) => run,
            Mapping::Mixed(mixed) => {
                self.preallocate_subclusters(writer, first, &mixed)?;
                return Ok(run_end.min(self.cluster_end(at)));
            }
        };
        match run {
            Run::Data { first: host, .. } => {
                if with_space {
                    self.reserve_host(host, clusters.end - clusters.start)?;
                }
                return Ok(run_end);
            }
            Run::Compressed { .. } | Run::Backing => {
                self.rewrite(writer, at, run, &[])?;
                return Ok(run_end.min(self.cluster_end(at)));
            }
            Run::Unallocated | Run::Zero => {}
        }
        self.ensure_table(writer, first)?;
        let place = self.take_place(writer, first, clusters.end - clusters.start)?;
        let linked = place.count();
        let start = self.geometry.guest_offset(first).0;
        self.clear_around(&place, &(start..start))?;
        if with_space {
            self.reserve_host(place.first(), linked)?;
        }
        self.link(writer, first, place)?;
        Ok(run_end.min((first.0 + linked) << self.geometry.cluster_bits()))
    }

    pub(super) fn reserve_host(&self, first: HostCluster, count: u64) -> Result<()> {
        let start = self.geometry.host_offset(first).0;
        let mut end = start + (count << self.geometry.cluster_bits());
        if self.data.is_external {
            // A data file does not become longer than the disk.
            end = end.min(self.virtual_size());
        }
        self.check_place(start..end)?;
        match self.data.storage.allocate(start..end) {
            Ok(()) => {
                self.mark_data_unsynced();
                Ok(())
            }
            Err(e) => Err(Error::io(format!("reserving host blocks at {start:#x}"), e)),
        }
    }

    /// Writes to the image file, which guest data is not in where there is a data file.
    pub(super) fn write_host(&self, data: &[u8], offset: u64) -> Result<()> {
        let written = self
            .storage
            .write_at(data, offset)
            .map_err(|e| Error::io(format!("writing at {offset:#x}"), e));
        self.mark_unsynced();
        written
    }

    /// The first guest cluster after those that share an L2 table with `cluster`.
    pub(super) fn table_end(&self, cluster: GuestCluster) -> u64 {
        (self.geometry.l1_index(cluster) + 1) * self.geometry.l2_entries()
    }

    /// The host clusters of the guest offsets from `at`, which is in `first`, to `end`.
    pub(super) fn clusters_of_run(&self, first: HostCluster, at: u64, end: u64) -> Range<u64> {
        let guest = self.geometry.guest_clusters(&(at..end));
        first.0..first.0 + (guest.end - guest.start)
    }

    /// The end of the cluster that guest offset `at` lies in.
    pub(super) fn cluster_end(&self, at: u64) -> u64 {
        at - self.geometry.within(at) + self.geometry.cluster_size()
    }

    /// Where a change of a large range that starts at `at` lets go of the clusters and goes on with
    /// the next: at the end of the L2 table, or earlier.
    pub(super) fn step_end(&self, at: u64) -> u64 {
        const MAX_CLUSTERS: u64 = 8192;
        let step = self.geometry.l2_entries().min(MAX_CLUSTERS) << self.geometry.cluster_bits();
        (at / step + 1) * step
    }
}

pub(super) fn is_all_zero(bytes: &[u8]) -> bool {
    // Chunks, so that the compiler compares many bytes at a time; data usually ends it at once.
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::super::{CreateOptions, Options};
    use super::*;
    use crate::storage::testing::MemoryStorage;

    #[test]
    fn a_table_that_somebody_else_has_unshared_meanwhile_is_looked_up_again() {
        let storage = Arc::new(MemoryStorage::new(Vec::new()));
        let created = CreateOptions { virtual_size: 1 << 20, ..CreateOptions::default() };
        Image::create(&*storage, &created).unwrap();
        let options = Options { writable: true, threads: false, ..Options::default() };
        let image = Image::open(storage, &options).unwrap();
        let writer = image.writer().unwrap();
        image.write(0, b"old").unwrap();
        image.take_snapshot(b"s").unwrap();
        let cluster = GuestCluster(1);
        let TableState::Shared(table) = image.tables.table_state(cluster).unwrap() else {
            panic!("a snapshot shares no table");
        };
        // The other one is through, whatever that leads to.
        image.write(0, b"new").unwrap();
        image.delete_snapshot(b"s").unwrap();
        let later = Instant::now() + Duration::from_secs(60);
        while image.recycle(later).unwrap() {}
        assert_eq!(writer.refcounts.get(table).unwrap(), 0);
        let was = TableState::Shared(table);
        assert!(!image.unshare_table(writer, cluster, table, was).unwrap());
        image.close().unwrap();
    }
}
