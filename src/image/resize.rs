//! Changing the virtual size.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::{Image, Writer};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Header, HostCluster, MAX_L1_BYTES, Patch};

impl Image {
    /// Changes the virtual size to `size` bytes, durably; growing adds zeros, shrinking cuts.
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
        if self.geometry.version() < 3 && writer.has_snapshots {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "an image of version 2 that has snapshots cannot be resized: they do not record \
                 their size; `qemu-img amend -o compat=1.1` makes it version 3",
            ));
        }
        let _flush = self.hold_flush(writer);
        let old = self.virtual_size();
        self.note(match size.cmp(&old) {
            std::cmp::Ordering::Less => self.shrink(writer, size..old),
            std::cmp::Ordering::Greater => self.grow(writer, old..size),
            std::cmp::Ordering::Equal => Ok(()),
        })
    }

    /// Cuts `cut` off. The flush lock is held.
    fn shrink(&self, writer: &Writer, cut: Range<u64>) -> Result<()> {
        let _guard = self.locks.exclusive(self.geometry.guest_clusters(&cut));
        self.clear_held(writer, cut.clone())?;
        self.flush_held(writer)?;
        self.patch_header(writer, &Header::patch_size(cut.start))?;
        self.size.store(cut.start, Ordering::Release);
        Ok(())
    }

    /// Adds `added`. The flush lock is held.
    fn grow(&self, writer: &Writer, added: Range<u64>) -> Result<()> {
        // The new size counts for others when all of it is durable; until then nobody gets there.
        let _guard = self.locks.exclusive(self.geometry.guest_clusters(&added));
        let entries = self.geometry.l1_entries_for(added.end);
        if entries > self.tables.l1_entries() as u64 {
            self.grow_l1(writer, entries as u32)?;
        }
        // Whatever there may be past the end (the rest of the last cluster, the state of a virtual
        // machine, a backing file that is longer) does not become part of the disk.
        self.clear_held(writer, added.start..added.end.next_multiple_of(self.cluster_size()))?;
        self.flush_held(writer)?;
        self.patch_header(writer, &Header::patch_size(added.end))?;
        self.size.store(added.end, Ordering::Release);
        Ok(())
    }

    fn grow_l1(&self, writer: &Writer, entries: u32) -> Result<()> {
        let clusters = self.geometry.clusters_for(u64::from(entries) * 8);
        let place = writer.refcounts.allocate_at_end(clusters.0)?;
        let offset = self.geometry.host_offset(HostCluster(place.start));
        let switched = self.tables.relocate_l1(offset, entries, |bytes| {
            self.storage
                .write_at(bytes, offset.0)
                .map_err(|e| Error::io(format!("writing the new L1 table at {offset}"), e))?;
            // With everything that the table refers to, and its own clusters' refcounts.
            self.write_refcounts(writer, true)?;
            self.patch_header(writer, &Header::patch_l1(entries, offset))
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

    /// Writes a part of the header, durably. Where that fails what is on disk is not known.
    fn patch_header(&self, writer: &Writer, patch: &Patch) -> Result<()> {
        self.storage.write_at(&patch.bytes, patch.offset.0).map_err(|e| {
            let error = Error::io(format!("writing the header at {}", patch.offset), e);
            self.health.latch_unknown(&error.to_string());
            error
        })?;
        self.sync(writer)
    }
}
