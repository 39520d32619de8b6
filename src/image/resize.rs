//! Changing the virtual size.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::{Image, Writer};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Header, HostCluster, MAX_L1_BYTES, Patch};
use crate::rules::Rule;
use crate::tables::{Mapping, Run};

impl Image {
    /// Changes the virtual size to `size` bytes; growing adds zeros and is durable after the next
    /// flush, shrinking cuts and is durable at once.
    ///
    /// # Errors
    /// `Invalid` for a size that is no multiple of 512, `TooBig` past the largest L1 table,
    /// `ReadOnly`, host errors. After an error the size is the old one; content past a smaller
    /// size may be gone.
    pub fn resize(&self, size: u64) -> Result<()> {
        if !size.is_multiple_of(512) {
            return Err(Error::invalid(format!("a size of {size} bytes is no multiple of 512")));
        }
        if self.geometry.l1_entries_for(size) > MAX_L1_BYTES / 8 {
            return Err(Error::new(
                ErrorKind::TooBig,
                format!(
                    "a size of {size} bytes is too much for clusters of {} bytes",
                    self.cluster_size()
                ),
            ));
        }
        let writer = self.begin_change()?;
        if self.geometry.version() < 3 && self.snapshots.any() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "an image of version 2 that has snapshots cannot be resized: they do not record \
                 their size; `qemu-img amend -o compat=1.1` makes it version 3",
            ));
        }
        let _flush = self.hold_flush(writer);
        // The flush that was waited for may have failed.
        let writer = self.writer()?;
        let old = self.virtual_size();
        if size != old {
            self.begin_resize(writer, &(old.min(size)..old.max(size)))?;
        }
        self.note(match size.cmp(&old) {
            std::cmp::Ordering::Less => self.shrink(writer, size..old),
            std::cmp::Ordering::Greater => self.grow(writer, old..size),
            std::cmp::Ordering::Equal => Ok(()),
        })
    }

    /// Cuts `cut` off. The flush lock is held.
    fn shrink(&self, writer: &Writer, cut: Range<u64>) -> Result<()> {
        let _guard = self.locks.exclusive(self.geometry.guest_clusters(&cut));
        match self.geometry.version() < 3 && self.is_backed(cut.start) {
            true => self.clear_mapped(writer, &cut)?,
            false => self.clear_in_steps(writer, cut.clone())?,
        }
        if self.data.is_external && self.data.cipher.is_some() {
            // What is cut off and still mapped after a crash reads as zeros, which decrypt to anything.
            self.flush_held(writer)?;
        }
        // Before the header, so that the disk keeps its size where this fails.
        self.cut_data_file(cut.start)?;
        if Rule::CutBeforeSize.is_kept() {
            self.flush_held(writer)?;
        }
        self.patch_header(writer, &Header::patch_size(cut.start), Rule::SizeSynced)?;
        self.size.store(cut.start, Ordering::Release);
        self.note_cut(writer, cut.start);
        Ok(())
    }

    /// Clears what is mapped of `cut` and leaves what shows the backing file: nobody sees that past the
    /// end of the disk, and who makes the disk larger hides it. To hide it now would take a cluster for
    /// each one, since version 2 has no other zeros.
    fn clear_mapped(&self, writer: &Writer, cut: &Range<u64>) -> Result<()> {
        writer.clear_past_end.store(false, Ordering::Release);
        let mut at = cut.start;
        while at < cut.end {
            let (mapping, end) = self.mapping_at(at, cut.end)?;
            if mapping != Mapping::Uniform(Run::Backing) {
                self.clear_in_steps(writer, at..end)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Adds `added`. The flush lock is held.
    ///
    /// Who writes a file from its start makes it grow with every write. So what must be durable
    /// before the disk is larger is done once, for all that lies past the end, and the new size
    /// itself becomes durable with the next flush, like the data written there.
    fn grow(&self, writer: &Writer, added: Range<u64>) -> Result<()> {
        let _guard = self.locks.exclusive(added.start >> self.geometry.cluster_bits()..u64::MAX);
        let entries = self.geometry.l1_entries_for(added.end);
        if entries > self.tables.l1_entries() as u64 {
            self.grow_l1(writer, self.roomy_l1(added.end))?;
        }
        if !writer.clear_past_end.load(Ordering::Acquire) {
            self.clear_past_end(writer, &added)?;
        }
        if self.data.is_raw {
            // What it may be longer than the disk by does not become part of that.
            self.erase_data(added.clone())?;
        }
        self.lengthen_data_file(added.end)?;
        self.write_header(&Header::patch_size(added.end))?;
        self.mark_unsynced();
        self.size.store(added.end, Ordering::Release);
        Ok(())
    }

    /// Whatever there may be past the end (the rest of the last cluster, the state of a virtual
    /// machine, a backing file that is longer) does not become part of the disk.
    fn clear_past_end(&self, writer: &Writer, added: &Range<u64>) -> Result<()> {
        let mapped = self.tables.l1_entries() as u64 * self.geometry.l2_entries();
        let mapped_end = mapped.saturating_mul(self.cluster_size());
        // In version 2 hiding a backing file takes clusters: no more of it than needed.
        let hides_little = self.geometry.version() < 3 && self.is_backed(added.end);
        let whole = added.end.next_multiple_of(self.cluster_size());
        let end = if hides_little { whole } else { mapped_end };
        self.clear_in_steps(writer, added.start..end)?;
        if Rule::ClearBeforeGrowth.is_kept() {
            self.flush_held(writer)?;
        }
        let is_all = !hides_little && self.backed_clusters() <= mapped;
        writer.clear_past_end.store(is_all, Ordering::Release);
        Ok(())
    }

    /// Clears a range of any size, whose clusters and the flush lock are held, and flushes on the way
    /// where too many changed tables would wait in memory.
    fn clear_in_steps(&self, writer: &Writer, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let (mapping, end) = self.mapping_at(at, range.end)?;
            if mapping == Mapping::Uniform(Run::Unallocated) {
                at = end;
                continue;
            }
            let end = range.end.min(self.step_end(at));
            self.clear_held(writer, at..end)?;
            if self.tables.is_crowded() {
                self.flush_held(writer)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Entries of an L1 table for a disk that has grown to `size` bytes and may go on growing by one
    /// write after the other.
    fn roomy_l1(&self, size: u64) -> u32 {
        let half_as_many_again = self.tables.l1_entries() as u64 * 3 / 2;
        let wanted = self.geometry.l1_entries_with_room(size).max(half_as_many_again);
        wanted.min(MAX_L1_BYTES / 8) as u32
    }

    fn grow_l1(&self, writer: &Writer, entries: u32) -> Result<()> {
        let clusters = self.geometry.clusters_for(u64::from(entries) * 8);
        let place = writer.refcounts.allocate_at_end(clusters.0)?;
        self.switch_l1(writer, place, entries)
    }

    /// Moves the L1 table to `place`, whose clusters are counted, with room for `entries`. The
    /// flush lock is held.
    pub(super) fn switch_l1(&self, writer: &Writer, place: Range<u64>, entries: u32) -> Result<()> {
        let offset = self.geometry.host_offset(HostCluster(place.start));
        // Most of it now: inside everybody waits.
        self.sync_data_before_tables(writer)?;
        let switched = self.tables.relocate_l1(offset, entries, |bytes| {
            self.sync_data_before_tables(writer)?;
            self.storage
                .write_at(bytes, offset.0)
                .map_err(|e| Error::io(format!("writing the new L1 table at {offset}"), e))?;
            // With everything that the table refers to, and its own clusters' refcounts.
            self.write_refcounts(writer, Some(Rule::L1BeforeHeader))?;
            let patch = Header::patch_l1(entries, offset);
            self.patch_header(writer, &patch, Rule::L1SwitchBeforeReuse)
        });
        match switched {
            Ok(old) => writer.recycler.release(old),
            Err(e) => {
                if self.health.is_good() {
                    writer.refcounts.release(place)?;
                }
                return Err(e);
            }
        }
        Ok(())
    }

    /// Writes a part of the header, durably, as `rule` demands.
    pub(super) fn patch_header(&self, writer: &Writer, patch: &Patch, rule: Rule) -> Result<()> {
        self.write_header(patch)?;
        self.sync_for(writer, rule)
    }

    /// Writes a part of the header. Where that fails what is on disk is not known.
    fn write_header(&self, patch: &Patch) -> Result<()> {
        self.storage.write_at(&patch.bytes, patch.offset.0).map_err(|e| {
            let error = Error::io(format!("writing the header at {}", patch.offset), e);
            self.health.latch_unknown(&error.to_string());
            error
        })
    }
}
