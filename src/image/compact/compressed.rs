//! Moving compressed clusters: each is copied alone, byte for byte, packed behind the one before.
//!
//! A host cluster holds pieces of several compressed clusters, and one of those may reach into the
//! next host cluster, so host clusters cannot move by themselves without all that they touch. One
//! compressed cluster can: its references go over to the host clusters that its copy touches.
//!
//! An entry says only how many 512-byte sectors the data reaches into. To pack the copies without
//! gaps their exact length is needed: the cluster is inflated, which also keeps a damaged one from
//! being moved.
//!
//! **Narrow refcounts.** A host cluster counts a reference for each piece in it, and a snapshot doubles
//! them. So that one can still be taken, packing fills a cluster with no more references than half of
//! what its refcount can count; or with as many as the cluster had that a piece comes from, if that is
//! more.

use std::ops::Range;

use super::columns::Use;
use super::occupancy::Occupancy;
use super::{Compaction, Pass};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{HostCluster, HostOffset, L2Entry};
use crate::image::{Image, Writer, inflate};

/// Refcounts of 16 bits (2 to the 4th) count every piece that fits into a cluster, and many snapshots.
const WIDE_ENOUGH: u32 = 4;

/// Where the next copy goes. The packer holds a reference of its own to each of its clusters, so
/// that none is freed while it is being filled, whatever happens to the data in it.
#[derive(Debug)]
pub(super) struct Packer {
    clusters: Range<u64>,
    /// The next free byte of the file, within `clusters`.
    next: u64,
}

impl Image {
    /// Moves one compressed cluster. The guest cluster is held.
    pub(super) fn move_compressed(
        &self,
        writer: &Writer,
        compaction: &mut Compaction,
        pass: &mut Pass,
        index: u64,
        one: &Use,
    ) -> Result<()> {
        let Some(&(_, raw)) = one.entries.first() else { return Ok(()) };
        let decoded = L2Entry::decode(raw, 0, &self.geometry);
        let Ok(L2Entry::Compressed { offset, length }) = decoded else { return Ok(()) };
        let old = self.geometry.host_clusters(offset, length);
        let mut most = self.most_packed();
        for cluster in old.map(HostCluster) {
            let count = writer.refcounts.get(cluster)?;
            most = most.max(count);
            if count < one.paths || self.tables.is_metadata(cluster) {
                return Err(Error::corrupt(format!(
                    "compressed data at {offset} reaches into {}, which has refcount {count} or is \
                     metadata",
                    self.geometry.host_offset(cluster)
                )));
            }
        }
        let mut bytes = vec![0; length as usize];
        self.storage
            .read_at(&mut bytes, offset.0)
            .map_err(|e| Error::io(format!("reading compressed data at {offset}"), e))?;
        let mut cluster = vec![0; self.cluster_size() as usize];
        let Ok(exact) = inflate::inflate(self.compression, &bytes, &mut cluster) else {
            // Damaged: it stays what it is, for whoever tries to save it.
            return Ok(());
        };
        // Where the data does not say where it ends, a copy may reach into one sector more than an
        // entry can say.
        if exact as u64 + 511 > 2 * self.cluster_size() {
            return Ok(());
        }
        if one.paths >= self.geometry.max_refcount() {
            compaction.pin(|| format!("refcounts are too narrow to pack the data at {offset}"));
            return Ok(());
        }
        let Some((place, touched)) =
            self.pack_referenced(writer, pass, exact as u64, one.paths, most)?
        else {
            // Others may fit into less.
            (pass.is_out_of_room, pass.is_fragmented) = (true, true);
            return Ok(());
        };
        let sectors = (place.0 + exact as u64 - 1) / 512 - place.0 / 512 + 1;
        let entry = L2Entry::Compressed { offset: place, length: sectors * 512 - place.0 % 512 };
        let [new, _] = entry.encode(&self.geometry);
        let linked = self.write_host(&bytes[..exact], place.0).and_then(|()| {
            self.redirect(index, one.entries.iter().map(|&(table, old)| (table, old, new)))
        });
        if let Err(e) = linked {
            for cluster in touched.map(HostCluster) {
                self.lower(writer, cluster, one.paths);
            }
            return Err(e);
        }
        pass.note_moved(length);
        for _ in 0..one.paths {
            self.release_compressed(writer, offset, length)?;
        }
        Ok(())
    }

    /// The place for a copy of `length` bytes, and the host clusters that it touches, which count
    /// `paths` references more, at most `most` then; `None` where there is no room before the end.
    fn pack_referenced(
        &self,
        writer: &Writer,
        pass: &mut Pass,
        length: u64,
        paths: u64,
        most: u64,
    ) -> Result<Option<(HostOffset, Range<u64>)>> {
        loop {
            let Some(place) = self.pack(writer, pass, length)? else { return Ok(None) };
            let touched = self.geometry.host_clusters(place, length);
            let mut raised = touched.start..touched.start;
            let result: Result<()> = touched.clone().try_for_each(|cluster| {
                self.raise_packed(writer, HostCluster(cluster), paths, most)?;
                raised.end = cluster + 1;
                Ok(())
            });
            let Err(e) = result else { return Ok(Some((place, touched))) };
            raised.map(HostCluster).for_each(|cluster| self.lower(writer, cluster, paths));
            match &mut pass.packer {
                // The cluster has room for more data but not for more references: the next one has.
                Some(packer) if e.kind() == ErrorKind::TooBig => {
                    packer.next = (touched.start + 1) << self.geometry.cluster_bits();
                }
                _ => return Err(e),
            }
        }
    }

    /// Counts `paths` references more to a cluster that is being filled.
    ///
    /// # Errors
    /// `TooBig` where that would be more than `most`; those of raising a refcount.
    fn raise_packed(
        &self,
        writer: &Writer,
        cluster: HostCluster,
        paths: u64,
        most: u64,
    ) -> Result<()> {
        // One of them is the packer's own.
        if writer.refcounts.get(cluster)?.saturating_sub(1) + paths > most {
            return Err(Error::new(ErrorKind::TooBig, "snapshots need room in a refcount"));
        }
        writer.refcounts.raise(cluster, paths)
    }

    /// How many references to a host cluster packing leaves room beside.
    fn most_packed(&self) -> u64 {
        match self.geometry.refcount_order() < WIDE_ENOUGH {
            true => self.geometry.max_refcount() / 2,
            false => u64::MAX,
        }
    }

    /// Host clusters that emptying the sparse ones frees, those for what is packed taken off, and the
    /// bytes to be packed.
    pub(super) fn win_by_packing(
        &self,
        writer: &Writer,
        occupancy: &Occupancy,
    ) -> Result<(u64, u64)> {
        let (win, live) = occupancy.win();
        if self.most_packed() == u64::MAX {
            return Ok((win, live));
        }
        let (mut clusters, mut references) = (0u64, 0u64);
        for (cluster, _) in occupancy.sparse() {
            clusters += 1;
            references += writer.refcounts.get(HostCluster(cluster))?;
        }
        let needed = references.div_ceil(self.most_packed().max(1));
        Ok((win.min(clusters.saturating_sub(needed)), live))
    }

    /// The place for a copy of `length` bytes; `None` where there is no room before the end.
    fn pack(&self, writer: &Writer, pass: &mut Pass, length: u64) -> Result<Option<HostOffset>> {
        let bits = self.geometry.cluster_bits();
        let fits = |packer: &Packer| packer.next + length <= packer.clusters.end << bits;
        if !pass.packer.as_ref().is_some_and(fits) {
            let wanted = length.div_ceil(self.cluster_size());
            let rooted = match self.take_target(writer, pass, wanted)? {
                // A file without free clusters grows before it gets shorter.
                None if pass.dissolved.is_some() => writer.recycler.take_at_end(wanted)?,
                None => return Ok(None),
                Some(rooted) => rooted,
            };
            let clusters = rooted.first().0..rooted.first().0 + rooted.count();
            rooted.linked(clusters.end - clusters.start);
            if let Some(sparse) = &mut pass.dissolved {
                clusters.clone().for_each(|cluster| sparse.forget(cluster));
            }
            self.fill_next(writer, pass, clusters);
        }
        Ok(pass.packer.as_mut().map(|packer| {
            let place = HostOffset(packer.next);
            packer.next += length;
            place
        }))
    }

    /// `clusters` are filled next, without a gap where they follow those before.
    fn fill_next(&self, writer: &Writer, pass: &mut Pass, clusters: Range<u64>) {
        let bits = self.geometry.cluster_bits();
        match pass.packer.take() {
            Some(old) if old.clusters.end == clusters.start => {
                let rest = old.next >> bits;
                self.let_go(writer, old.clusters.start..rest);
                pass.packer = Some(Packer { clusters: rest..clusters.end, next: old.next });
            }
            old => {
                pass.packer = old;
                self.close_packer(writer, pass);
                let next = clusters.start << bits;
                pass.packer = Some(Packer { clusters, next });
            }
        }
    }

    /// Lets go of the clusters that were being filled.
    pub(super) fn close_packer(&self, writer: &Writer, pass: &mut Pass) {
        if let Some(packer) = pass.packer.take() {
            self.let_go(writer, packer.clusters);
        }
    }

    fn let_go(&self, writer: &Writer, clusters: Range<u64>) {
        for cluster in clusters {
            let _ = self.drop_reference(writer, HostCluster(cluster));
        }
    }
}
