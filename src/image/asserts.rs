//! What must hold while an image is in use, checked at run time where that was asked for
//! ([`Options::runtime_asserts`](super::Options)): for tests, and for whoever wants to be sure.
//!
//! After each step of the recycler the states of clusters are disjoint. After a pass of compaction
//! and before the image is closed, nothing leaks and nothing is free that is referenced: the
//! references in the file, counted by the independent verifier, are as many as the refcounts in
//! memory say, but for clusters that are on their way. An image that a crash has left with leaks, or
//! whose host has failed since, is only asserted to have no count that is too low.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::compact::Compaction;
use super::{Image, Writer, open};
use crate::check::references;
use crate::error::{Error, Result};
use crate::format::{AUTOCLEAR_BITMAPS, EXTENSION_BITMAPS, Header, HostCluster};
use crate::locks;

/// A leak is one that is found so many times.
const LOOKS: usize = 4;
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

impl Image {
    /// The cheap part, after each step.
    pub(super) fn assert_states(&self, writer: &Writer) -> Result<()> {
        if !writer.runtime_asserts {
            return Ok(());
        }
        match writer.recycler.overlap() {
            Some((one, other)) => Err(defect(format!("clusters are both {one} and {other}"))),
            None => Ok(()),
        }
    }

    /// Whether nothing has leaked in the image that was just opened.
    pub(super) fn note_leaks_at_open(&self, writer: &Writer) -> Result<()> {
        if writer.runtime_asserts {
            let leaks = self.compare_counts(writer)?.is_some();
            writer.may_have_leaked.store(leaks, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The expensive part: reads all tables, while nobody else does anything, and no pass is under
    /// way, which may hold clusters of its own.
    pub(super) fn assert_counts(&self, writer: &Writer, compaction: &Compaction) -> Result<()> {
        let skip = writer.recycler.are_frees_held() || compaction.is_under_way();
        if !writer.runtime_asserts || skip {
            return Ok(());
        }
        // The recycler's thread may be between counting a cluster for the pool and putting it there:
        // what has leaked still has when it is looked at again.
        let mut found = None;
        for _ in 0..LOOKS {
            let flush = self.hold_flush(writer);
            let guard = self.locks.exclusive(locks::ALL);
            self.flush_held(writer)?;
            found = self.compare_counts(writer)?;
            if found.is_none() || writer.may_have_leaked.load(Ordering::Relaxed) {
                return Ok(());
            }
            drop((guard, flush));
            std::thread::sleep(BETWEEN_LOOKS);
        }
        found.map_or(Ok(()), |leak| Err(defect(leak)))
    }

    /// The first cluster that has leaked.
    ///
    /// # Errors
    /// A refcount that is too low; host errors.
    fn compare_counts(&self, writer: &Writer) -> Result<Option<String>> {
        let header = open::read_header(&*self.storage)?;
        if has_stale_bitmaps(&header) {
            return Ok(None);
        }
        let counts = references::count(&*self.storage, &header)?;
        counts.trusted()?;
        let mut leak = None;
        writer.refcounts.for_each_counted(|cluster, count, is_structure| {
            let references = counts.get(HostCluster(cluster)) + u64::from(is_structure);
            let at = self.geometry.host_offset(HostCluster(cluster));
            if count < references {
                return Err(defect(format!(
                    "the cluster at {at} has {references} references and refcount {count}"
                )));
            }
            if count > references && leak.is_none() && !writer.recycler.is_on_its_way(cluster) {
                leak = Some(format!(
                    "the cluster at {at} has leaked: refcount {count}, {references} references"
                ));
            }
            Ok(())
        })?;
        Ok(leak)
    }
}

/// Bitmaps that became void have leaked, until the search after the next open.
fn has_stale_bitmaps(header: &Header) -> bool {
    header.extension(EXTENSION_BITMAPS).is_some()
        && header.autoclear_features & AUTOCLEAR_BITMAPS == 0
}

fn defect(what: String) -> Error {
    Error::corrupt(format!("runtime assertion failed: {what}"))
}
