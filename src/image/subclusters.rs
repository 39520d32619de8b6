//! Changing guest clusters whose subclusters are told apart (extended L2 entries).
//!
//! A write into a cluster of ours fills the subclusters it touches and sets their allocation bits:
//! what it does not cover of one that had no data is copied from the backing file or written as
//! zeros, since what lies in its place may be anything, and the bits reach the disk only after the
//! data. Clearing whole subclusters changes their bits alone, and punches where the cluster is
//! ours; a host cluster in which nothing is allocated any more is dropped.
//!
//! Where data is encrypted nothing is punched, and every subcluster that is written to is filled.
//!
//! Clusters that read zeros as a whole are written as without subclusters, all of the new cluster
//! allocated: it reads zeros where nothing is written, and later writes find their place ready.

use std::borrow::Cow;
use std::ops::Range;

use super::write::is_all_zero;
use super::{Image, Writer};
use crate::error::Result;
use crate::format::{
    GuestCluster, GuestOffset, HostCluster, L2Entry, MixedCluster, Subcluster, Subclusters,
};
use crate::rules::Rule;
use crate::tables::{LinkOrder, Mapping, Run};

impl Image {
    /// What the part of a cluster at guest offset `at` is, and where that ends, at most `end`.
    pub(super) fn piece_at(&self, mixed: &MixedCluster, at: u64, end: u64) -> (Run, u64) {
        let size = self.geometry.subcluster_size();
        let (kind, piece_end) = mixed.subclusters.run((self.geometry.within(at) / size) as u32);
        let cluster_start = at - self.geometry.within(at);
        let end = end.min(cluster_start + u64::from(piece_end) * size);
        let run = match (kind, mixed.cluster) {
            (Subcluster::Allocated, Some(first)) => Run::Data { first, copied: mixed.copied },
            (Subcluster::Zero, _) => Run::Zero,
            _ if self.is_backed(at) => Run::Backing,
            _ => Run::Unallocated,
        };
        (run, end)
    }

    /// The same mapping, with a cluster that shows the backing file looked at by its subclusters
    /// where there are any: a write there need not copy all of it.
    pub(super) fn told_apart(&self, mapping: Mapping) -> Mapping {
        match mapping {
            Mapping::Uniform(Run::Backing) if self.geometry.extended_l2() => {
                Mapping::Mixed(MixedCluster::UNALLOCATED)
            }
            other => other,
        }
    }

    /// Writes `data` at `at` into the one guest cluster `old`, which is held exclusively.
    pub(super) fn write_subclusters(
        &self,
        writer: &Writer,
        at: u64,
        data: &[u8],
        old: &MixedCluster,
    ) -> Result<()> {
        let range = at..at + data.len() as u64;
        let touched = self.geometry.subclusters(&range);
        let shows_backing =
            self.is_backed(at) && old.subclusters.any(touched.clone(), Subcluster::Unallocated);
        let has_data = old.subclusters.any(touched.clone(), Subcluster::Allocated);
        if !shows_backing && !has_data && is_all_zero(data) {
            return Ok(());
        }
        let guest = self.geometry.guest_cluster(GuestOffset(at));
        let subclusters = old.subclusters.with(touched, Subcluster::Allocated);
        if let Some(cluster) = self.own_cluster(writer, guest, old)? {
            let (start, bytes) = self.with_edges(&range, data, old, true)?;
            self.ensure_table(writer, guest)?;
            self.write_data(&bytes, self.location(cluster, start))?;
            let new = MixedCluster { cluster: Some(cluster), copied: true, subclusters };
            if new != *old {
                let order = LinkOrder::as_demanded_by(Rule::SubclusterBeforeBit);
                self.set_entry(guest, order, new.entry())?;
                writer.recycler.note_change();
            }
            return Ok(());
        }
        self.ensure_table(writer, guest)?;
        let rooted = writer.recycler.take(1)?;
        let cluster = rooted.first();
        if let Some(source) = old.cluster {
            let kept = self.not_covered(old.subclusters, &range);
            self.copy_allocated(source, cluster, guest, kept)?;
        }
        // The new cluster reads zeros, if not through a cipher: only what comes from the backing file
        // has to be filled in.
        let (start, bytes) = self.with_edges(&range, data, old, self.data.cipher.is_some())?;
        self.write_data(&bytes, self.location(cluster, start))?;
        // Copies must be durable before the entry that replaces the originals.
        let order = match old.cluster.is_some() || shows_backing {
            true => LinkOrder::as_demanded_by(Rule::CopyBeforeEntry),
            false => self.order_of_new(rooted.order()),
        };
        let new = MixedCluster { cluster: Some(cluster), copied: true, subclusters };
        self.set_entry(guest, order, new.entry())?;
        rooted.linked(1);
        writer.recycler.note_change();
        old.cluster.map_or(Ok(()), |old| self.drop_reference(writer, old))
    }

    /// The host cluster, where it may be written in place; its flag may be missing. In a data file
    /// there always is one.
    fn own_cluster(
        &self,
        writer: &Writer,
        guest: GuestCluster,
        mixed: &MixedCluster,
    ) -> Result<Option<HostCluster>> {
        if self.data.is_external {
            return Ok(Some(HostCluster(guest.0)));
        }
        let Some(cluster) = mixed.cluster else { return Ok(None) };
        if mixed.copied {
            return Ok(Some(cluster));
        }
        match writer.refcounts.get(cluster)? {
            0 => Err(self.uncounted(cluster)),
            // Not known before the search for damage is over.
            1 if !writer.recycler.are_frees_held() => Ok(Some(cluster)),
            _ => Ok(None),
        }
    }

    /// `data` for `range`, continued to the ends of those subclusters at its ends that have no
    /// data: with what the backing file has there, and with zeros where `zeros` are wanted. And
    /// where that starts.
    fn with_edges<'a>(
        &self,
        range: &Range<u64>,
        data: &'a [u8],
        old: &MixedCluster,
        zeros: bool,
    ) -> Result<(u64, Cow<'a, [u8]>)> {
        let size = self.geometry.subcluster_size();
        let is_wanted = |at: u64| match self.piece_at(old, at, at + 1).0 {
            Run::Backing => true,
            Run::Unallocated | Run::Zero => zeros,
            Run::Data { .. } | Run::Compressed { .. } => false,
        };
        let (mut start, mut end) = (range.start, range.end);
        if !start.is_multiple_of(size) && is_wanted(start) {
            start -= start % size;
        }
        if !end.is_multiple_of(size) && is_wanted(end) {
            end = end.next_multiple_of(size);
        }
        if (start..end) == *range {
            return Ok((start, Cow::Borrowed(data)));
        }
        let mut bytes = vec![0; (end - start) as usize];
        let (before, rest) = bytes.split_at_mut((range.start - start) as usize);
        let (middle, after) = rest.split_at_mut(data.len());
        middle.copy_from_slice(data);
        for (at, edge) in [(start, before), (range.end, after)] {
            if !edge.is_empty() && self.piece_at(old, at, at + 1).0 == Run::Backing {
                self.read_backing(at, edge)?;
            }
        }
        Ok((start, Cow::Owned(bytes)))
    }

    /// Those of `subclusters` that `range`, within their cluster, does not cover in full; the
    /// others count as unallocated.
    fn not_covered(&self, subclusters: Subclusters, range: &Range<u64>) -> Subclusters {
        let size = self.geometry.subcluster_size();
        let whole = range.start.next_multiple_of(size)..range.end - range.end % size;
        if whole.start >= whole.end {
            return subclusters;
        }
        subclusters.with(self.geometry.subclusters(&whole), Subcluster::Unallocated)
    }

    /// Copies the subclusters of `guest` that are allocated from one host cluster to another.
    fn copy_allocated(
        &self,
        from: HostCluster,
        to: HostCluster,
        guest: GuestCluster,
        subclusters: Subclusters,
    ) -> Result<()> {
        let size = self.geometry.subcluster_size();
        let mut first = 0;
        while first < Subclusters::COUNT {
            let (kind, end) = subclusters.run(first);
            if kind == Subcluster::Allocated {
                let (start, length) = (u64::from(first) * size, u64::from(end - first) * size);
                let at = (guest.0 << self.geometry.cluster_bits()) + start;
                let mut bytes = vec![0; length as usize];
                self.read_data(&mut bytes, self.location(from, at))?;
                self.write_data(&bytes, self.location(to, at))?;
            }
            first = end;
        }
        Ok(())
    }

    /// Gives a guest cluster, held exclusively, a host cluster with room for all its subclusters;
    /// what they are does not change.
    pub(super) fn preallocate_subclusters(
        &self,
        writer: &Writer,
        guest: GuestCluster,
        old: &MixedCluster,
    ) -> Result<()> {
        if let Some(cluster) = old.cluster {
            return self.reserve_host(cluster, 1);
        }
        self.ensure_table(writer, guest)?;
        let place = self.take_place(writer, guest, 1)?;
        self.reserve_host(place.first(), 1)?;
        let new = MixedCluster { cluster: Some(place.first()), copied: true, ..*old };
        self.set_entry(guest, place.order(), new.entry())?;
        place.linked(1);
        writer.recycler.note_change();
        Ok(())
    }

    /// Makes a part of one guest cluster, which is held exclusively, read zeros; the subclusters that
    /// it covers are unmapped.
    pub(super) fn clear_subclusters(&self, writer: &Writer, range: Range<u64>) -> Result<()> {
        if self.data.is_raw {
            // The mapping stays, so that the file by itself and the tables never differ.
            return self.erase_data(range);
        }
        let (mapping, _) = self.mapping_at(range.start, range.end)?;
        if let Mapping::Uniform(run @ Run::Compressed { .. }) = mapping {
            self.rewrite_zeros(writer, range.clone(), run)?;
        }
        let size = self.geometry.subcluster_size();
        let first = range.start.next_multiple_of(size);
        // The last subcluster of the disk counts as whole where the disk ends within it.
        let last = match range.end == self.virtual_size() {
            true => range.end.next_multiple_of(size),
            false => range.end - range.end % size,
        };
        if first >= last {
            // Within one subcluster, or the end of one and the start of the next.
            let middle = first.min(range.end);
            self.clear_edge(writer, range.start..middle)?;
            return self.clear_edge(writer, middle..range.end);
        }
        self.clear_whole(writer, first..last)?;
        self.clear_edge(writer, range.start..first)?;
        self.clear_edge(writer, last.min(range.end)..range.end)
    }

    /// Makes a part of one subcluster read zeros.
    fn clear_edge(&self, writer: &Writer, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        match self.run_to_change(writer, range.start, range.end)?.0 {
            Run::Unallocated | Run::Zero => Ok(()),
            Run::Data { first, copied: true } => {
                let size = self.geometry.subcluster_size();
                let start = range.start - range.start % size;
                let whole = start..start + size;
                match self.zero_part(&whole, &range, self.host_offset(first, start))? {
                    true => self.clear_whole(writer, whole),
                    false => Ok(()),
                }
            }
            Run::Data { copied: false, .. } | Run::Compressed { .. } | Run::Backing => {
                let zeros = vec![0; (range.end - range.start) as usize];
                self.write_some(writer, range.start, &zeros).map(|_| ())
            }
        }
    }

    /// Makes whole subclusters of one guest cluster, which is not compressed, read zeros.
    fn clear_whole(&self, writer: &Writer, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        let mut any = false;
        while at < range.end {
            let (run, end) = self.run_to_change(writer, at, range.end)?;
            // A hole would not be zeros as long as the entry on disk is the old one.
            if let Run::Data { first, copied: true } = run
                && self.data.cipher.is_none()
            {
                let host = self.host_offset(first, at);
                self.erase_data(host..host + (end - at))?;
            }
            any |= !matches!(run, Run::Unallocated | Run::Zero);
            at = end;
        }
        if !any {
            return Ok(());
        }
        let guest = self.geometry.guest_cluster(GuestOffset(range.start));
        let cleared = self.geometry.subclusters(&range);
        let kind = match self.is_backed(range.start) {
            true => Subcluster::Zero,
            false => Subcluster::Unallocated,
        };
        self.ensure_table(writer, guest)?;
        self.clear_entries(writer, guest.0..guest.0 + 1, |_, entry| {
            entry.subclusters().map_or(entry, |old| without(&old, cleared.clone(), kind))
        })
    }
}

/// The entry of `old` with those of `range` being `kind`, and without a host cluster where nothing
/// is allocated any more.
fn without(old: &MixedCluster, range: Range<u32>, kind: Subcluster) -> L2Entry {
    let subclusters = old.subclusters.with(range, kind);
    match subclusters.any_allocated() {
        true => MixedCluster { subclusters, ..*old },
        false => MixedCluster { subclusters, ..MixedCluster::UNALLOCATED },
    }
    .entry()
}
