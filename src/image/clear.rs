//! Discarding and zeroing. Both make a range read as zeros and give back what they can.
//!
//! Whole clusters are unmapped. Parts of a cluster are punched out of the host file in place, or
//! overwritten with encrypted zeros; a cluster that has become a hole, or all zeros, as a whole is
//! unmapped too, so trims smaller than a cluster add up. Where there are subclusters, those that a part covers are unmapped ([`super::subclusters`]).

use std::ops::Range;

use super::{Image, Writer};
use crate::error::Result;
use crate::format::{GuestCluster, GuestOffset, HostCluster, L2Entry};
use crate::tables::{LinkOrder, Mapping, Run};

impl Image {
    /// Gives `range` back: it reads zeros from now on. Any alignment; what lies past the end of the
    /// disk is ignored.
    ///
    /// # Errors
    /// `ReadOnly`, host errors, `Corrupt`. What was done before the error stays done.
    pub fn discard(&self, range: Range<u64>) -> Result<()> {
        self.clear(range)
    }

    /// Makes `range` read zeros. Any alignment; what lies past the end of the disk is ignored.
    ///
    /// # Errors
    /// As [`Image::discard`].
    pub fn write_zeroes(&self, range: Range<u64>) -> Result<()> {
        self.clear(range)
    }

    fn clear(&self, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let writer = self.begin_change()?;
            let end = range.end.min(self.step_end(at));
            let _guard = self.locks.exclusive(self.geometry.guest_clusters(&(at..end)));
            // Within the disk as it is now that the clusters are held.
            let step = self.within_disk(at..end);
            if step.is_empty() {
                return Ok(());
            }
            self.record_change(writer, &step);
            self.note(self.clear_held(writer, step))?;
            at = end;
        }
        Ok(())
    }

    /// Clears a range whose clusters are held exclusively.
    pub(super) fn clear_held(&self, writer: &Writer, range: Range<u64>) -> Result<()> {
        let size = self.geometry.cluster_size();
        let first = range.start.next_multiple_of(size);
        // The last cluster of the disk counts as whole where the disk ends within it.
        let last = match range.end == self.virtual_size() {
            true => range.end.next_multiple_of(size),
            false => range.end - self.geometry.within(range.end),
        };
        if first >= last {
            // Within one cluster, or the end of one and the start of the next.
            let middle = first.min(range.end);
            self.clear_part(writer, range.start..middle)?;
            return self.clear_part(writer, middle..range.end);
        }
        self.clear_part(writer, range.start..first)?;
        self.clear_clusters(writer, self.geometry.guest_clusters(&(first..last)))?;
        self.clear_part(writer, last.min(range.end)..range.end)
    }

    /// Makes whole guest clusters, which are held exclusively, read zeros, and drops what they
    /// refer to.
    fn clear_clusters(&self, writer: &Writer, clusters: Range<u64>) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        let (mut at, end) = (clusters.start << bits, clusters.end << bits);
        while at < end {
            let (mapping, run_end) = self.mapping_to_change(writer, at, end)?;
            // Version 2 has no zero flag: what a backing file would show through must be mapped.
            let must_map = self.is_backed(at) && self.geometry.version() < 3;
            at = match mapping {
                Mapping::Uniform(Run::Unallocated) => run_end,
                // The mapping stays, so that the file by itself and the tables never differ.
                _ if self.data.is_raw => {
                    self.erase_data(at..run_end)?;
                    run_end
                }
                Mapping::Uniform(run) if must_map => {
                    self.map_zeros(writer, at, run)?;
                    self.cluster_end(at)
                }
                Mapping::Uniform(_) | Mapping::Mixed(_) => {
                    let guest = self.geometry.guest_cluster(GuestOffset(at));
                    self.ensure_table(writer, guest)?;
                    let table_end = self.table_end(guest).min(run_end >> bits);
                    let is_plain = self.data.cipher.is_none();
                    if self.data.is_external
                        && is_plain
                        && mapping != Mapping::Uniform(Run::Backing)
                    {
                        // At once: whatever the tables on disk say, it reads as it did or zeros.
                        self.erase_data(at..table_end << bits)?;
                    }
                    self.unmap(writer, guest.0..table_end)?;
                    table_end << bits
                }
            };
        }
        Ok(())
    }

    /// Makes one guest cluster, which `run` starts with, a data cluster of zeros.
    fn map_zeros(&self, writer: &Writer, at: u64, run: Run) -> Result<()> {
        let guest = self.geometry.guest_cluster(GuestOffset(at));
        let start = guest.0 << self.geometry.cluster_bits();
        if let Run::Data { first, copied: true } = run {
            return self.zero_data(self.location(first, start), self.cluster_size());
        }
        self.ensure_table(writer, guest)?;
        let rooted = writer.recycler.take(1)?;
        let entry = L2Entry::Data { cluster: rooted.first(), copied: true };
        if self.data.cipher.is_some() {
            self.zero_data(self.location(rooted.first(), start), self.cluster_size())?;
        }
        self.set_entry(guest, self.order_of_new(rooted.order()), entry)?;
        rooted.linked(1);
        writer.recycler.note_change();
        self.drop_old(writer, run)
    }

    /// Unmaps guest clusters, which have one own table: to nothing, or to the zero flag where a backing
    /// file would show through.
    fn unmap(&self, writer: &Writer, clusters: Range<u64>) -> Result<()> {
        let backed = self.backed_clusters();
        self.clear_entries(writer, clusters, |guest, _| match guest.0 < backed {
            true => L2Entry::Zero { preallocated: None, copied: false },
            false => L2Entry::Unallocated,
        })
    }

    /// Makes the entries of guest clusters, which have one own table, what `clear` makes of them,
    /// and drops the host clusters that they refer to no more. What changes reads zeros afterwards.
    pub(super) fn clear_entries(
        &self,
        writer: &Writer,
        clusters: Range<u64>,
        clear: impl Fn(GuestCluster, L2Entry) -> L2Entry,
    ) -> Result<()> {
        let mut dropped: Vec<Range<u64>> = Vec::new();
        let mut uncertain = Vec::new();
        let mut compressed = Vec::new();
        let result = self.tables.update(clusters, LinkOrder::Any, |guest, entry| {
            let cleared = clear(guest, entry);
            if let L2Entry::Compressed { offset, length } = entry {
                compressed.push((offset, length));
            }
            match entry.host_cluster() {
                // Nothing to give back: the place in the data file remains the cluster's own.
                _ if self.data.is_external => {}
                Some(kept) if cleared.host_cluster() == Some(kept) => {}
                Some((cluster, true)) if self.is_own(writer, cluster)? => {
                    match dropped.last_mut() {
                        Some(run) if run.end == cluster.0 => run.end += 1,
                        _ => dropped.push(cluster.0..cluster.0 + 1),
                    }
                }
                Some((cluster, _)) => uncertain.push(cluster),
                None => {}
            }
            Ok((entry != cleared).then_some(cleared))
        });
        // After the tables: what is junk when a flush looks has gone from the tables it takes.
        let dropped = dropped
            .into_iter()
            .try_for_each(|run| writer.recycler.drop_used(run))
            .and_then(|()| uncertain.into_iter().try_for_each(|c| self.drop_reference(writer, c)))
            .and_then(|()| {
                compressed
                    .into_iter()
                    .try_for_each(|(offset, length)| self.drop_compressed(writer, offset, length))
            });
        writer.recycler.note_change();
        result.and(dropped)
    }

    /// Makes a part of one guest cluster, which is held exclusively, read zeros.
    fn clear_part(&self, writer: &Writer, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        if self.geometry.extended_l2() {
            return self.clear_subclusters(writer, range);
        }
        let guest = self.geometry.guest_cluster(GuestOffset(range.start));
        let run = self.run_to_change(writer, range.start, range.end)?.0;
        match run {
            Run::Unallocated | Run::Zero => Ok(()),
            Run::Data { first, copied: true } => self.punch_part(writer, guest, first, range),
            Run::Data { copied: false, .. } | Run::Compressed { .. } | Run::Backing => {
                self.rewrite_zeros(writer, range, run)
            }
        }
    }

    /// Writes zeros to a part of one guest cluster, which `run` starts with and which may not be
    /// written in place.
    pub(super) fn rewrite_zeros(&self, writer: &Writer, range: Range<u64>, run: Run) -> Result<()> {
        let zeros = vec![0; (range.end - range.start) as usize];
        self.rewrite(writer, range.start, run, &zeros)
    }

    fn punch_part(
        &self,
        writer: &Writer,
        guest: GuestCluster,
        cluster: HostCluster,
        range: Range<u64>,
    ) -> Result<()> {
        if self.data.is_raw {
            return self.zero_data(self.location(cluster, range.start), range.end - range.start);
        }
        let start = guest.0 << self.geometry.cluster_bits();
        let whole = start..start + self.cluster_size();
        match self.zero_part(&whole, &range, self.geometry.host_offset(cluster).0)? {
            true => self.clear_clusters(writer, guest.0..guest.0 + 1),
            false => Ok(()),
        }
    }

    /// Whether a range of the file that data is in has none, as far as the host can tell.
    pub(super) fn is_hole(&self, range: Range<u64>) -> Result<bool> {
        Ok(self.seek_data(range.start)?.is_none_or(|at| at >= range.end))
    }
}
