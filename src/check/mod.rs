//! The independent verifier: reads an image, trusts nothing, and says what is wrong.
//!
//! It counts the references to every host cluster ([`references`]), compares them with the refcounts
//! on disk and the COPIED flags with both, and gives the verdict that `qemu-img check` gives. It
//! goes by [`mod@crate::format`] alone and uses nothing of the engine's, so that an error of those cannot
//! hide itself; the engine counts references with it, too. Checking never writes; [`repair()`] does, and
//! only what loses no data: to rebuild the refcounts is what it asks [`crate::alloc`] for.
//!
//! Where it is stricter than QEMU: structures that overlap are corrupt even if refcounts say that
//! the clusters are shared, and the zero flag in a version 2 image, or in one with extended L2
//! entries, is a reserved bit.

pub(crate) mod copied;
mod counts;
pub(crate) mod pieces;
mod progress;
mod refcounts;
pub mod references;
mod repair;
mod report;
mod spans;
mod survey;

pub use progress::Watch;
pub use references::ReferenceCounts;
pub use repair::{Repair, repair, repair_watched};
pub use report::Report;
pub use survey::{Content, Survey, survey};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Header, INCOMPATIBLE_KNOWN};
use crate::storage::Storage;
use refcounts::Refcounts;

/// Checks an image, without writing to it.
///
/// # Errors
/// Where the check cannot be done: host errors, `NotQcow2`, `Unsupported` with an unknown feature,
/// `Corrupt` or `TooBig` with a header or a snapshot table that cannot be read. Everything else that
/// is wrong is in the report.
pub fn check(storage: &dyn Storage) -> Result<Report> {
    check_watched(storage, &())
}

/// The same, telling `watch` how far it is.
///
/// # Errors
/// As [`check`].
pub fn check_watched(storage: &dyn Storage, watch: &dyn Watch) -> Result<Report> {
    examine(storage, &read_header(storage)?, watch).map(|found| found.report)
}

/// A report, and what a repair has to know besides.
struct Examination {
    report: Report,
    /// Every refcount block is where the refcount table says, and nothing else is there.
    sound_structure: bool,
    /// The refcount structure is broken or says less than there is: it must be built anew.
    needs_rebuild: bool,
    /// Corruptions that are no more than a wrong COPIED flag.
    wrong_flags: u64,
}

/// The header of the image, every incompatible feature of which is known.
fn read_header(storage: &dyn Storage) -> Result<Header> {
    let failed = |e| Error::io("reading the header", e);
    let length = storage.len().map_err(failed)?.min(Header::READ_LENGTH as u64);
    let mut bytes = vec![0; length as usize];
    storage.read_at(&mut bytes, 0).map_err(failed)?;
    let header = Header::parse(&bytes)?;
    let unknown = header.incompatible_features & !INCOMPATIBLE_KNOWN;
    if unknown != 0 {
        let bit = unknown.trailing_zeros();
        let name = header.incompatible_feature_name(bit).unwrap_or_else(|| "no name".into());
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("header: unknown incompatible feature bit {bit} ({name})"),
        ));
    }
    Ok(header)
}

fn examine(storage: &dyn Storage, header: &Header, watch: &dyn Watch) -> Result<Examination> {
    let g = header.geometry;
    let mut report = Report { total_clusters: g.clusters_for(header.size).0, ..Report::default() };
    let mut references = references::count_into(storage, header, &mut report, watch, None)?;
    let mut refcounts = Refcounts::load(storage, header)?;
    let sound_structure = refcounts.count_itself(&mut references, &mut report);

    let mut needs_rebuild = !sound_structure;
    refcounts.for_each_used(&references, watch, |used| {
        let (refcount, expected) = (used.refcount, used.references);
        // A refcount cannot say more than fits; each reference past that is one that it lacks.
        let countable = expected.min(g.max_refcount());
        let at = g.host_offset(used.cluster);
        if expected > countable {
            report.corruption(expected - countable, || {
                format!("cluster at {at} has {expected} references, more than a refcount can say")
            });
        }
        report.image_end_offset = at.0 + g.cluster_size();
        let line = || format!("cluster at {at} has refcount {refcount} and {expected} references");
        match refcount.cmp(&countable) {
            std::cmp::Ordering::Less => {
                needs_rebuild = true;
                report.corruption(1, line);
            }
            std::cmp::Ordering::Equal => {}
            std::cmp::Ordering::Greater => report.leak(|| format!("leaked: {}", line())),
        }
        Ok(())
    })?;

    let mut wrong_flags = 0;
    let refcount = |cluster| refcounts.get(cluster);
    copied::for_each_wrong(storage, header, &references, watch, refcount, |wrong| {
        wrong_flags += wrong.times;
        // That of a compressed cluster stands in the report already.
        let Some(refcount) = wrong.refcount else { return Ok(()) };
        report.missing_flags += if wrong.is_set() { 0 } else { wrong.times };
        report.corruption(wrong.times, || {
            let flag = if wrong.is_set() { "is COPIED" } else { "is not COPIED" };
            format!("{} {flag}, the refcount is {refcount}", wrong.name())
        });
        Ok(())
    })?;
    Ok(Examination { report, sound_structure, needs_rebuild, wrong_flags })
}
