//! Counting the references to every host cluster: what its refcount has to be.
//!
//! The walk starts at the header and believes nothing that it reads. It never writes, and never
//! reads refcounts: those are compared with its result elsewhere. The old refcount
//! structure is not counted here, so that a new one can be built from the result.

mod extensions;

use std::collections::BTreeMap;
use std::ops::Range;

use roaring::RoaringTreemap;

use super::counts::ClusterCounts;
use super::pieces::{for_each_data, for_each_word};
use super::progress::Watch;
use super::report::Report;
use super::spans::{Spans, Uses};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    BadEntry, COPIED, Geometry, Header, HostCluster, HostOffset, INCOMPATIBLE_DATA_FILE, L2Entry,
    MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS, OFFSET_MASK, Snapshot, be64,
};
use crate::storage::Storage;

/// All tables of snapshots, and all bitmap tables, are at most this many bytes together, wherever
/// the file has holes: far past any real image, and what bounds the work on a hostile one.
const MAX_TABLES_BYTES: u64 = 8 << 30;

/// The references to each host cluster, everything but the refcount table and the refcount blocks.
#[derive(Debug, Default)]
pub struct ReferenceCounts {
    pub(super) counts: ClusterCounts,
    /// The L2 tables by their offset.
    pub(super) l2_tables: BTreeMap<u64, Uses>,
    /// The first reason why the counts cannot be relied on.
    pub(super) distrust: Option<String>,
    /// Some entry of the active tables points to a cluster and is not COPIED.
    pub(crate) any_not_copied: bool,
    /// Where the L2 entries stand that have no data but keep a cluster which makes no sense.
    pub(super) bad_preallocations: Vec<HostOffset>,
    /// What the clusters hold, where that is wanted.
    pub(super) contents: Option<Contents>,
}

/// Clusters that hold something other than plain data. L2 tables and refcounts are not among them.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) metadata: RoaringTreemap,
    pub(super) compressed: RoaringTreemap,
}

impl ReferenceCounts {
    /// The references to a cluster.
    pub fn get(&self, cluster: HostCluster) -> u64 {
        self.counts.get(cluster)
    }

    /// The referenced clusters of `range` in ascending order, with their counts.
    pub fn range(&self, range: Range<u64>) -> impl Iterator<Item = (HostCluster, u64)> + '_ {
        self.counts.range(range).map(|(cluster, count)| (HostCluster(cluster), count))
    }

    /// The first cluster after all that are referenced.
    pub fn end(&self) -> HostCluster {
        self.counts.end()
    }

    /// Whether every reference could be followed and no two structures overlap.
    ///
    /// # Errors
    /// `Corrupt`, saying the first thing that is wrong: refcounts made from these counts would call
    /// clusters free that may hold somebody's data.
    pub fn trusted(&self) -> Result<()> {
        match (&self.distrust, self.bad_preallocations.first()) {
            (Some(reason), _) => Err(Error::corrupt(reason.clone())),
            (None, Some(at)) => Err(Error::corrupt(format!(
                "the L2 entry at {at} has no data but keeps a cluster that makes no sense"
            ))),
            (None, None) => Ok(()),
        }
    }
}

/// Counts the references in the image that has `header`.
///
/// # Errors
/// Host errors, and `Corrupt` or `TooBig` where a structure cannot be read at all. References that
/// make no sense are no errors here: see [`ReferenceCounts::trusted`].
pub fn count(storage: &dyn Storage, header: &Header) -> Result<ReferenceCounts> {
    count_into(storage, header, &mut Report::default(), &(), None)
}

/// The same, telling `report` what is wrong and `watch` how far it is, and filling in `contents`.
pub(super) fn count_into(
    storage: &dyn Storage,
    header: &Header,
    report: &mut Report,
    watch: &dyn Watch,
    contents: Option<Contents>,
) -> Result<ReferenceCounts> {
    let length = storage.len().map_err(|e| Error::io("asking for the file's length", e))?;
    let mut counter = Counter {
        storage,
        header,
        g: header.geometry,
        data_file: header.incompatible_features & INCOMPATIBLE_DATA_FILE != 0,
        length,
        report,
        watch,
        structures: Vec::new(),
        l1_indices: BTreeMap::new(),
        result: ReferenceCounts { contents, ..ReferenceCounts::default() },
    };
    counter.structure(HostOffset(0), counter.g.cluster_size(), "the header");
    counter.l1_tables()?;
    counter.l2_tables()?;
    counter.luks_header()?;
    counter.bitmaps()?;
    counter.overlaps();
    Ok(counter.result)
}

/// Whether the `size` bytes at `offset` end less than a cluster past the end of a file of `length`
/// bytes: the last cluster of a file need not be there in full.
pub(super) fn is_inside(offset: u64, size: u64, length: u64, g: &Geometry) -> bool {
    offset.checked_add(size).is_some_and(|end| end < length.saturating_add(g.cluster_size()))
}

/// A structure whose clusters nothing else may refer to.
struct Structure {
    what: &'static str,
    offset: HostOffset,
    clusters: Range<u64>,
}

struct Counter<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    g: Geometry,
    data_file: bool,
    /// Bytes of the file.
    length: u64,
    report: &'a mut Report,
    watch: &'a dyn Watch,
    structures: Vec<Structure>,
    /// With an external data file, the first index of each L2 table in the disk's L1 table: it says
    /// where the data of its entries has its place.
    l1_indices: BTreeMap<u64, u64>,
    result: ReferenceCounts,
}

impl Counter<'_> {
    /// Reports a corruption after which the counts cannot be relied on.
    fn distrust(&mut self, times: u64, text: String) {
        self.result.distrust.get_or_insert_with(|| text.clone());
        self.report.corruption(times, || text);
    }

    /// Counts `times` references to each cluster of a byte range; `false` if it is not in the file.
    fn refer(&mut self, offset: HostOffset, size: u64, times: u64) -> bool {
        let inside = is_inside(offset.0, size, self.length, &self.g);
        if inside && size != 0 {
            for cluster in self.clusters(offset, size) {
                self.result.counts.add(HostCluster(cluster), times);
            }
        }
        inside
    }

    fn note_metadata(&mut self, clusters: Range<u64>) {
        if let Some(contents) = &mut self.result.contents {
            contents.metadata.insert_range(clusters);
        }
    }

    fn clusters(&self, offset: HostOffset, size: u64) -> Range<u64> {
        self.g.host_cluster(offset).0..self.g.clusters_for(offset.0 + size).0
    }

    /// Counts a structure that has its clusters for itself; `false` if it is not in the file.
    fn structure(&mut self, offset: HostOffset, size: u64, what: &'static str) -> bool {
        let inside = self.refer(offset, size, 1);
        if inside {
            let clusters = self.clusters(offset, size);
            self.note_metadata(clusters.clone());
            self.structures.push(Structure { what, offset, clusters });
        } else {
            self.distrust(1, format!("{what} at {offset} ends past the end of the file"));
        }
        inside
    }

    /// Counts the L1 tables of the disk and of its snapshots, and finds the L2 tables.
    fn l1_tables(&mut self) -> Result<()> {
        let mut spans = Spans::default();
        let (offset, size) = (self.header.l1_table_offset, u64::from(self.header.l1_size) * 8);
        if size != 0 {
            self.structure(offset, size, "the L1 table");
            spans.add(offset.0..offset.0.saturating_add(size), true);
        }
        let mut budget = MAX_TABLES_BYTES;
        for snapshot in self.snapshots()? {
            let (offset, size) = (snapshot.l1_table_offset, u64::from(snapshot.l1_size) * 8);
            if !self.g.is_aligned(offset.0) || size > MAX_L1_BYTES {
                self.distrust(
                    1,
                    format!(
                        "the L1 table of snapshot {} makes no sense: {} entries at {offset}",
                        snapshot.label(),
                        snapshot.l1_size
                    ),
                );
                continue;
            }
            budget = budget.checked_sub(size).ok_or_else(|| too_big("L1 tables of snapshots"))?;
            if size != 0 && self.structure(offset, size, "a snapshot's L1 table") {
                spans.add(offset.0..offset.0 + size, false);
            }
        }
        let storage = self.storage;
        for (range, uses) in spans.segments() {
            let doing = || format!("reading the L1 table at {:#x}", range.start);
            for_each_word(storage, range.clone(), doing, |at, raw| {
                self.l1_entry(at, raw, uses);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// The snapshot table's entries; counts the table.
    fn snapshots(&mut self) -> Result<Vec<Snapshot>> {
        let (count, start) = (self.header.snapshot_count, self.header.snapshots_offset);
        if count > MAX_SNAPSHOTS {
            return Err(Error::new(
                ErrorKind::TooBig,
                format!("header: {count} snapshots, at most {MAX_SNAPSHOTS} are served"),
            ));
        }
        if count != 0 && self.data_file {
            self.report.corruption(1, || "snapshots in an image with an external data file".into());
        }
        let mut snapshots = Vec::new();
        let mut size = 0;
        for index in 0..count {
            // The last entry is not padded.
            size = u64::next_multiple_of(size, 8);
            let (snapshot, length) = self.snapshot(start.0.saturating_add(size))?;
            size += length;
            if size > MAX_SNAPSHOT_TABLE_BYTES {
                return Err(too_big("entries of the snapshot table"));
            }
            if self.g.version() >= 3 && !snapshot.is_complete() {
                self.report.corruption(1, || format!("snapshot table entry {index} is incomplete"));
            }
            snapshots.push(snapshot);
        }
        if size != 0 {
            self.structure(start, size, "the snapshot table");
        }
        Ok(snapshots)
    }

    fn snapshot(&self, at: u64) -> Result<(Snapshot, u64)> {
        let failed = |e| Error::io("reading the snapshot table", e);
        let mut fixed = [0; Snapshot::FIXED_LENGTH];
        if at < self.length {
            self.storage.read_at(&mut fixed, at).map_err(failed)?;
        }
        let mut bytes = vec![0; Snapshot::length(&fixed)?];
        if at < self.length {
            self.storage.read_at(&mut bytes, at).map_err(failed)?;
        }
        Ok((Snapshot::parse(&bytes), bytes.len() as u64))
    }

    fn l1_entry(&mut self, at: u64, raw: u64, uses: Uses) {
        let table = self.header.l1_table_offset.0;
        let name = || match uses.active {
            0 => format!("the entry at {at:#x} of a snapshot's L1 table"),
            _ => format!("L1 entry {}", (at - table) / 8),
        };
        if raw & !(COPIED | OFFSET_MASK) != 0 {
            let bad = BadEntry::ReservedBits(raw);
            self.report.corruption(uses.total, || format!("{} {bad}", name()));
        }
        let offset = HostOffset(raw & OFFSET_MASK);
        if offset.0 == 0 {
            // It had one: what that refers to may be all that is left of it.
            self.distrust(uses.total, format!("{} has flags but no table", name()));
            return;
        }
        self.result.any_not_copied |= uses.active != 0 && raw & COPIED == 0;
        if self.data_file && uses.active != 0 {
            self.l1_indices.entry(offset.0).or_insert((at - table) / 8);
        }
        let inside = self.refer(offset, self.g.cluster_size(), uses.total);
        if !self.g.is_aligned(offset.0) {
            self.distrust(uses.total, format!("{} {}", name(), BadEntry::Unaligned(offset)));
        } else if !inside {
            self.distrust(uses.total, format!("{} points past the end of the file", name()));
        } else {
            self.result.l2_tables.entry(offset.0).or_default().add(uses);
        }
    }

    fn l2_tables(&mut self) -> Result<()> {
        let tables: Vec<_> = self.result.l2_tables.iter().map(|(&at, &uses)| (at, uses)).collect();
        let (storage, g) = (self.storage, self.g);
        let entry_size = g.l2_entry_size();
        let all = tables.len() as u64;
        for (done, (table, uses)) in (0..).zip(tables) {
            self.watch.at("counting references", done, all);
            let doing = || format!("reading the L2 table at {table:#x}");
            let range = table..table + g.cluster_size();
            let mut expected = None;
            for_each_data(storage, range, doing, |offset, bytes| {
                let first = (offset - table) / entry_size;
                for (index, entry) in (first..).zip(bytes.chunks_exact(entry_size as usize)) {
                    let (raw, bitmap) = (be64(entry, 0), be64(entry, 8));
                    if raw | bitmap != 0 {
                        let entry = Entry { table, index, raw, bitmap, uses };
                        let data = self.l2_entry(&entry);
                        self.fragmentation(&mut expected, data, uses);
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Counts what an L2 entry refers to. Returns where its data is, if that is not compressed.
    fn l2_entry(&mut self, entry: &Entry) -> Option<HostOffset> {
        let Entry { raw, bitmap, uses, .. } = *entry;
        // The first word by itself: what is wrong with the bitmap comes after.
        let decoded = L2Entry::decode(raw, 0, &self.g).or_else(|bad| {
            self.entry_corruption(entry, &bad.to_string());
            // Its offset is all that counts here.
            L2Entry::decode(raw & (COPIED | OFFSET_MASK), 0, &self.g)
        });
        let cluster = match decoded {
            Ok(L2Entry::Compressed { offset, length }) => {
                self.compressed(entry, offset, length);
                return None;
            }
            Ok(L2Entry::Unallocated) => {
                if raw & COPIED != 0 {
                    // QEMU sees nothing wrong. But there was a cluster, which may look leaked now.
                    let text = format!("{} is COPIED but has no cluster", entry.name());
                    self.result.distrust.get_or_insert(text);
                }
                if bitmap as u32 != 0 {
                    self.entry_corruption(entry, "is unallocated but has allocated subclusters");
                }
                return None;
            }
            Ok(entry) => match entry.host_cluster() {
                Some((cluster, _)) => cluster,
                None => return None,
            },
            Err(_) => {
                let offset = HostOffset(raw & OFFSET_MASK);
                self.refer(offset, self.g.cluster_size(), uses.total);
                self.unusable(entry, "points into the middle of a cluster");
                return Some(offset);
            }
        };
        self.result.any_not_copied |= uses.active != 0 && raw & COPIED == 0;
        if (bitmap >> 32) as u32 & bitmap as u32 != 0 {
            self.entry_corruption(entry, "has subclusters both allocated and zero");
        }
        let offset = self.g.host_offset(cluster);
        if self.is_misplaced(entry, cluster) {
            let what = "of the data file instead of the guest's own offset";
            self.entry_corruption(entry, &format!("points to {offset} {what}"));
        }
        if !self.data_file && !self.refer(offset, self.g.cluster_size(), uses.total) {
            self.report.corruption(uses.total, || {
                format!("{} points past the end of the file", entry.name())
            });
            self.unusable(entry, "points past the end of the file");
        }
        Some(offset)
    }

    /// Whether an entry keeps another place of an external data file than the guest's own.
    fn is_misplaced(&self, entry: &Entry, cluster: HostCluster) -> bool {
        let first = |&index: &u64| index * self.g.l2_entries();
        let first = self.l1_indices.get(&entry.table).map(first);
        first.is_some_and(|first| cluster.0 != first + entry.index)
    }

    fn compressed(&mut self, entry: &Entry, offset: HostOffset, length: u64) {
        self.report.allocated_clusters += entry.uses.active;
        self.report.compressed_clusters += entry.uses.active;
        self.report.fragmented_clusters += entry.uses.active;
        if entry.raw & COPIED != 0 {
            let what = match L2Entry::may_be_compressed_or_not(entry.raw, &self.g) {
                false => "is compressed and COPIED",
                true => {
                    "is compressed and COPIED, one of which is wrong: not repairable, but \
                     `qemu-img check -r all` takes it for compressed"
                }
            };
            self.entry_corruption(entry, what);
        }
        if self.data_file {
            self.entry_corruption(entry, "is compressed in an image with an external data file");
        } else if entry.bitmap != 0 {
            self.entry_corruption(entry, "is compressed and has subclusters");
        }
        if self.data_file {
            return;
        }
        if !self.refer(offset, length, entry.uses.total) {
            let text = format!("{} points past the end of the file", entry.name());
            return self.distrust(entry.uses.total, text);
        }
        let clusters = self.clusters(offset, length);
        if let Some(contents) = &mut self.result.contents {
            contents.compressed.insert_range(clusters);
        }
    }

    fn entry_corruption(&mut self, entry: &Entry, what: &str) {
        self.report.corruption(entry.uses.total, || format!("{} {what}", entry.name()));
    }

    /// Notes an entry, reported already, whose host cluster makes no sense. Where it has no data
    /// there anyway nothing is lost by forgetting the cluster.
    fn unusable(&mut self, entry: &Entry, why: &str) {
        let has_no_data = match self.g.extended_l2() {
            true => entry.raw & !(OFFSET_MASK | COPIED) == 0 && entry.bitmap as u32 == 0,
            false => {
                let flags = L2Entry::decode(entry.raw & !OFFSET_MASK, 0, &self.g);
                matches!(flags, Ok(L2Entry::Zero { .. }))
            }
        };
        if has_no_data {
            let at = entry.table + entry.index * self.g.l2_entry_size();
            self.result.bad_preallocations.push(HostOffset(at));
        } else {
            self.result.distrust.get_or_insert_with(|| format!("{} {why}", entry.name()));
        }
    }

    /// Counts an allocated cluster, and whether it lies where the one before it lets expect.
    fn fragmentation(&mut self, expected: &mut Option<u64>, data: Option<HostOffset>, uses: Uses) {
        let Some(offset) = data else { return };
        self.report.allocated_clusters += uses.active;
        if expected.is_some_and(|expected| expected != offset.0) {
            self.report.fragmented_clusters += uses.active;
        }
        *expected = Some(offset.0 + self.g.cluster_size());
    }

    /// Finds structures that share clusters with anything else.
    fn overlaps(&mut self) {
        for structure in std::mem::take(&mut self.structures) {
            let mut clusters = self.result.counts.range(structure.clusters);
            if let Some((cluster, _)) = clusters.find(|&(_, count)| count != 1) {
                drop(clusters);
                let at = self.g.host_offset(HostCluster(cluster));
                let Structure { what, offset, .. } = structure;
                self.distrust(1, format!("{what} at {offset} and something else overlap at {at}"));
            }
        }
        let counts = &self.result.counts;
        let shared = |(&at, uses): (&u64, &Uses)| {
            let count = counts.get(self.g.host_cluster(HostOffset(at)));
            (count != uses.total).then_some(at)
        };
        let shared: Vec<_> = self.result.l2_tables.iter().filter_map(shared).collect();
        for at in shared {
            self.distrust(1, format!("the L2 table at {at:#x} and something else overlap"));
        }
    }
}

/// An L2 entry that is not all zeros, and where it stands.
struct Entry {
    table: u64,
    index: u64,
    raw: u64,
    bitmap: u64,
    uses: Uses,
}

impl Entry {
    fn name(&self) -> String {
        format!("L2 entry {} of table {:#x}", self.index, self.table)
    }
}

fn too_big(what: &str) -> Error {
    Error::new(ErrorKind::TooBig, format!("the {what} are too long to be checked"))
}
