//! Persistent dirty bitmaps: they go on recording what changes while the image is open here, so
//! that an incremental backup made afterwards is right.
//!
//! The life of a bitmap, as QEMU's documents have it and with its own marks in the file:
//!
//! ```text
//! opened for writing: its clusters are entered into the map of metadata, nothing is written
//! first change:       IN_USE is set in the directory, durably, before anything else changes
//! each change:        the granules are remembered in memory, before the data is written
//! close:              new clusters get what was stored together with what is remembered (`store`)
//! ```
//! A crash in between leaves IN_USE set: such a bitmap is *inconsistent*, nobody believes it, and
//! only removing it helps. One that is so when the image is opened stays so. Only *auto* bitmaps
//! record; the others stay as they are, unless the disk is resized, which all of them follow.
//!
//! The autoclear bit stays set as long as all this is done. Where a directory makes no sense it is
//! cleared before the first change, which makes everybody forget the bitmaps.
//!
//! What is remembered takes at most 64 MiB; a bitmap that needs more stays inconsistent, with a
//! warning.

mod granules;
mod moves;
mod store;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use parking_lot::Mutex;

use self::granules::{Budget, GranuleSet};
use super::{Image, Writer};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    AUTOCLEAR_BITMAPS, BitmapBits, BitmapEntry, BitmapsExtension, EXTENSION_BITMAPS, Extension,
    Geometry, Header, HostCluster, HostOffset, be64, bitmap_directory,
};
use crate::rules::Rule;
use crate::storage::Storage;
use crate::tables::MetadataMap;

/// Bytes of memory for what all bitmaps of an image record.
const MAX_RECORDED_BYTES: u64 = 64 << 20;
/// At most so many bitmaps record.
const MAX_RECORDING: usize = 1024;
/// The tables of all bitmaps have at most so many bytes, which is what a sound image needs for
/// 16 TiB in granules of 64 KiB, ten times over.
const MAX_TABLES_BYTES: u64 = 2 << 20;
/// The directory has at most so many bytes: thousands of bitmaps with the longest names.
const MAX_DIRECTORY_BYTES: u64 = 4 << 20;

/// Nothing in the file says that bitmaps are in use.
const UNTOUCHED: u8 = 0;
/// Those that record are marked as in use.
const RECORDING: u8 = 1;
/// All are, since the disk was resized.
const RESIZED: u8 = 2;

/// The bitmaps of an image that is open for writing.
#[derive(Debug)]
pub(super) struct Bitmaps {
    extension: Extension,
    recording: Vec<Recording>,
    /// What the file says of them: [`UNTOUCHED`], [`RECORDING`] or [`RESIZED`].
    marked: AtomicU8,
    /// The smallest size that the disk has had since it was opened: what is stored says nothing of
    /// what lies past it.
    least_size: AtomicU64,
    /// The clusters that they are in, as the image was opened: what the search for leaks judges, which
    /// ends before anything moves.
    clusters: Vec<Range<u64>>,
    /// Something else may refer to those clusters too: none of them is ever freed.
    is_distrusted: AtomicBool,
    /// Lock order: after the flush lock; no guest clusters are held.
    directory: Mutex<Directory>,
}

/// A bitmap that records.
#[derive(Debug)]
struct Recording {
    /// Which entry of the directory it is.
    index: usize,
    granularity_bits: u32,
    changed: GranuleSet,
}

/// The bitmap directory as it stands in the file.
#[derive(Clone, Debug)]
struct Directory {
    offset: HostOffset,
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    /// Where in the directory it starts.
    at: usize,
    bitmap: BitmapEntry,
    /// In use by us.
    is_ours: bool,
}

impl Bitmaps {
    /// The bitmaps of the image that `header` belongs to; `None` where there are none, or none that
    /// are consistent with the disk.
    ///
    /// # Errors
    /// Host errors; `Corrupt` and `TooBig` with bitmaps that make no sense.
    fn read(storage: &dyn Storage, header: &Header) -> Result<Option<Bitmaps>> {
        let extension = header.extensions.iter().find(|e| e.kind == EXTENSION_BITMAPS);
        let Some(extension) = extension else { return Ok(None) };
        if header.autoclear_features & AUTOCLEAR_BITMAPS == 0 {
            return Ok(None);
        }
        let g = &header.geometry;
        let fields = BitmapsExtension::parse(&extension.data, g)?;
        let directory = Directory::read(storage, &fields, header)?;
        let mut clusters = vec![g.host_clusters(fields.directory_offset, fields.directory_size)];
        let mut budget = MAX_TABLES_BYTES;
        for Entry { bitmap, .. } in &directory.entries {
            let bytes = u64::from(bitmap.table_entries) * 8;
            budget = budget.checked_sub(bytes).ok_or_else(|| {
                Error::new(ErrorKind::TooBig, "the bitmap tables have more than 2 MiB")
            })?;
            let needed = bitmap.table_entries_for(header.size, g);
            if !bitmap.in_use && needed != u64::from(bitmap.table_entries) {
                return Err(Error::corrupt(format!("{bitmap} is not of the size of the disk")));
            }
            clusters.push(g.host_clusters(bitmap.table_offset, bytes));
            for bits in read_table(storage, g, bitmap)? {
                if let BitmapBits::Stored(cluster) = bits {
                    clusters.push(cluster.0..cluster.0 + 1);
                }
            }
        }
        let recording = directory.recording(header.size);
        let bitmaps = Bitmaps {
            extension: extension.clone(),
            recording,
            marked: AtomicU8::new(UNTOUCHED),
            least_size: AtomicU64::new(header.size),
            clusters,
            is_distrusted: AtomicBool::new(false),
            directory: Mutex::new(directory),
        };
        Ok(Some(bitmaps))
    }

    /// The same, for an image that is served all the same when its bitmaps make no sense, with their
    /// clusters entered into the map of metadata.
    ///
    /// # Errors
    /// Host errors; `Corrupt` where bitmaps and other metadata, or two bitmaps, overlap.
    pub(super) fn open(
        storage: &dyn Storage,
        header: &Header,
        metadata: &MetadataMap,
    ) -> Result<Option<Bitmaps>> {
        let bitmaps = match Bitmaps::read(storage, header) {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(None),
            Err(e) if e.kind() == ErrorKind::Io => return Err(e),
            Err(e) => {
                log::warn!("the first change makes the image's bitmaps void: {e}");
                return Ok(None);
            }
        };
        if bitmaps.clusters.iter().any(|clusters| !metadata.is_in_file(clusters)) {
            log::warn!("the first change makes the image's bitmaps void: one ends past the file");
            return Ok(None);
        }
        for cluster in bitmaps.clusters.iter().cloned().flatten() {
            if !metadata.insert(HostCluster(cluster)) {
                return Err(Error::corrupt(format!(
                    "a bitmap and other metadata overlap at {}",
                    header.geometry.host_offset(HostCluster(cluster))
                )));
            }
        }
        Ok(Some(bitmaps))
    }

    /// Remembers that the bytes in `range` of the disk change.
    fn record(&self, range: &Range<u64>) {
        for bitmap in &self.recording {
            let bits = bitmap.granularity_bits;
            let granules = range.start >> bits..range.end.div_ceil(1 << bits);
            bitmap.changed.insert(granules);
        }
    }
}

impl Directory {
    fn read(storage: &dyn Storage, fields: &BitmapsExtension, header: &Header) -> Result<Self> {
        let offset = fields.directory_offset;
        let failed = |e| Error::io(format!("reading the bitmap directory at {offset}"), e);
        let length = storage.len().map_err(failed)?;
        if offset.0.saturating_add(fields.directory_size) > length {
            return Err(Error::corrupt("the bitmap directory ends past the end of the file"));
        }
        if fields.directory_size > MAX_DIRECTORY_BYTES {
            return Err(Error::new(ErrorKind::TooBig, "the bitmap directory has more than 4 MiB"));
        }
        let mut bytes = vec![0; fields.directory_size as usize];
        storage.read_at(&mut bytes, offset.0).map_err(failed)?;
        let mut at = 0;
        let entries = bitmap_directory(&bytes, fields.count, header)?.into_iter().map(|bitmap| {
            let entry = Entry { at, bitmap, is_ours: false };
            at += entry.bitmap.length;
            entry
        });
        let entries = entries.collect();
        Ok(Directory { offset, bytes, entries })
    }

    /// The bitmaps that are to record, for a disk of `size` bytes.
    fn recording(&self, size: u64) -> Vec<Recording> {
        let bitmaps = self.entries.iter().map(|entry| &entry.bitmap).enumerate();
        let auto = bitmaps.filter(|(_, bitmap)| bitmap.auto && !bitmap.in_use);
        let auto: Vec<_> = auto.take(MAX_RECORDING).collect();
        let bits: Vec<u64> = auto.iter().map(|(_, bitmap)| bitmap.bits_for(size)).collect();
        let budgets = Budget::share(MAX_RECORDED_BYTES, &bits);
        let record = |((index, bitmap), budget): ((usize, &BitmapEntry), Budget)| Recording {
            index,
            granularity_bits: bitmap.granularity_bits,
            changed: GranuleSet::new(budget),
        };
        auto.into_iter().zip(budgets).map(record).collect()
    }

    /// Marks entries as in use by us: all that record, with `all` also those that do not. Whether
    /// there were any.
    fn mark(&mut self, all: bool) -> bool {
        let mut any = false;
        for entry in &mut self.entries {
            if !entry.bitmap.in_use && (all || entry.bitmap.auto) {
                entry.bitmap.in_use = true;
                entry.is_ours = true;
                entry.bitmap.update(&mut self.bytes[entry.at..]);
                any = true;
            }
        }
        any
    }
}

impl Image {
    /// The bytes in `range` of the disk are about to change. Costs next to nothing without bitmaps.
    pub(super) fn record_change(&self, writer: &Writer, range: &Range<u64>) {
        if let Some(bitmaps) = &writer.bitmaps {
            bitmaps.record(range);
        }
    }

    /// Sees to it that the file says of all bitmaps that record that they are in use. Before the
    /// first change, with no guest clusters held.
    pub(super) fn begin_recording(&self, writer: &Writer) -> Result<()> {
        match &writer.bitmaps {
            Some(bitmaps) if bitmaps.marked.load(Ordering::Acquire) == UNTOUCHED => {
                self.mark_bitmaps(writer, bitmaps, RECORDING)
            }
            _ => Ok(()),
        }
    }

    /// The disk is about to be cut or to grow: `changing` is what goes or comes. Bitmaps that do not
    /// record follow too. What comes is recorded: it may be where something else was before.
    pub(super) fn begin_resize(&self, writer: &Writer, changing: &Range<u64>) -> Result<()> {
        let Some(bitmaps) = &writer.bitmaps else { return Ok(()) };
        if bitmaps.marked.load(Ordering::Acquire) != RESIZED {
            self.mark_bitmaps(writer, bitmaps, RESIZED)?;
        }
        bitmaps.record(changing);
        Ok(())
    }

    /// What a walk through the whole image has found: `references` tells how many there are to a
    /// cluster, or there is no telling.
    pub(super) fn judge_bitmaps(&self, writer: &Writer, references: Option<impl Fn(u64) -> u64>) {
        let Some(bitmaps) = &writer.bitmaps else { return };
        let mut clusters = bitmaps.clusters.iter().cloned().flatten();
        if !references.is_some_and(|count| clusters.all(|cluster| count(cluster) == 1)) {
            bitmaps.is_distrusted.store(true, Ordering::Release);
        }
    }

    /// The disk was cut to `size` bytes.
    pub(super) fn note_cut(&self, writer: &Writer, size: u64) {
        if let Some(bitmaps) = &writer.bitmaps {
            bitmaps.least_size.fetch_min(size, Ordering::AcqRel);
        }
    }

    fn mark_bitmaps(&self, writer: &Writer, bitmaps: &Bitmaps, wanted: u8) -> Result<()> {
        let mut directory = bitmaps.directory.lock();
        if bitmaps.marked.load(Ordering::Acquire) >= wanted {
            return Ok(());
        }
        let mut marked = directory.clone();
        if marked.mark(wanted == RESIZED) {
            // Torn anywhere it is right: each flag is within one sector.
            self.storage
                .write_at(&marked.bytes, marked.offset.0)
                .map_err(|e| Error::io("marking bitmaps as in use", e))?;
            self.sync_for(writer, Rule::BitmapsMarkedFirst)?;
        }
        if bitmaps.marked.load(Ordering::Acquire) == UNTOUCHED {
            marked.warn_of_stale();
        }
        *directory = marked;
        bitmaps.marked.store(wanted, Ordering::Release);
        Ok(())
    }
}

impl Directory {
    fn warn_of_stale(&self) {
        for entry in self.entries.iter().filter(|e| e.bitmap.in_use && !e.is_ours) {
            log::warn!(
                "{} is inconsistent since an earlier crash and stays so: `qemu-img bitmap \
                 --remove` deletes it",
                entry.bitmap
            );
        }
    }
}

/// The bitmap table of `bitmap`.
fn read_table(
    storage: &dyn Storage,
    geometry: &Geometry,
    bitmap: &BitmapEntry,
) -> Result<Vec<BitmapBits>> {
    let at = bitmap.table_offset;
    let mut bytes = vec![0; bitmap.table_entries as usize * 8];
    storage
        .read_at(&mut bytes, at.0)
        .map_err(|e| Error::io(format!("reading the bitmap table at {at}"), e))?;
    let decode = |word: &[u8]| {
        BitmapBits::decode(be64(word, 0), geometry)
            .map_err(|bad| Error::corrupt(format!("an entry of the table of {bitmap} {bad}")))
    };
    bytes.chunks_exact(8).map(decode).collect()
}
