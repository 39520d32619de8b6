//! Repairing what can be repaired without losing data, so that a crash at any moment leaves the
//! image no worse than it was.
//!
//! The tables are the truth, refcounts and COPIED flags are made to fit them. Where the tables
//! themselves make no sense nothing is changed: guessing would give clusters away that may hold
//! data, and what QEMU repairs there it repairs by forgetting.

use std::ops::Range;

use super::copied::{self, WrongFlag};
use super::refcounts::{Refcounts, Used};
use super::references::{self, ReferenceCounts};
use super::{Examination, Report, Watch, examine, read_header};
use crate::alloc::rebuild::{rebuild, refuse_too_big};
use crate::error::{Error, Result};
use crate::format::{
    Geometry, Header, HostOffset, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY, refcount,
};
use crate::rules::Rule;
use crate::storage::Storage;

/// What a repair may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Repair {
    /// Lower refcounts that are too high.
    Leaks,
    /// Everything that loses no data.
    All,
}

/// Repairs an image and checks it again. The report is that of the second check, and says how much
/// was repaired.
///
/// # Errors
/// As [`super::check`], and host errors while writing.
pub fn repair(storage: &dyn Storage, what: Repair) -> Result<Report> {
    repair_watched(storage, what, &())
}

/// The same, telling `watch` how far the checks are.
///
/// # Errors
/// As [`repair`].
pub fn repair_watched(storage: &dyn Storage, what: Repair, watch: &dyn Watch) -> Result<Report> {
    let mut header = read_header(storage)?;
    let before = examine(storage, &header, watch)?;
    let mut references = references::count(storage, &header)?;
    let mut untrusted = match what == Repair::All && before.needs_rebuild {
        true => refuse_too_big(storage, &header, &references).err(),
        false => None,
    };
    if what == Repair::All && references.distrust.is_none() && untrusted.is_none() {
        forget_preallocations(storage, &header, &references)?;
        references = references::count(storage, &header)?;
    }
    untrusted = untrusted.or_else(|| references.trusted().err());
    if what == Repair::Leaks && !before.sound_structure {
        // What it says where a refcount block is may be anything, data too.
        let reason = "the refcount structure is broken, which only `--repair all` repairs";
        untrusted.get_or_insert_with(|| Error::corrupt(reason));
    }
    if untrusted.is_none() {
        let repairs = Repairs { storage, references: &references };
        header = match what {
            Repair::Leaks => repairs.leaks(header, &before)?,
            Repair::All => repairs.all(header, &before)?,
        };
    }
    let mut after = examine(storage, &header, watch)?.report;
    if after.corruptions == 0 {
        clear_features(storage, &header, INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT)?;
    }
    if let Some(reason) = untrusted {
        after.conclude(format!("not repairable, nothing was changed: {reason}"));
    }
    after.corruptions_fixed = before.report.corruptions.saturating_sub(after.corruptions);
    after.leaks_fixed = before.report.leaks.saturating_sub(after.leaks);
    Ok(after)
}

struct Repairs<'a> {
    storage: &'a dyn Storage,
    references: &'a ReferenceCounts,
}

impl Repairs<'_> {
    /// Refcounts become what they have to be, and then the flags if nothing else is wrong.
    fn leaks(&self, header: Header, before: &Examination) -> Result<Header> {
        if before.report.leaks != 0 {
            self.lower_refcounts(&header)?;
        }
        if before.report.corruptions == before.wrong_flags {
            self.set_flags(&header, |_| true)?;
            sync(self.storage, Rule::RepairSynced)?;
        }
        Ok(header)
    }

    /// The order is what makes it safe: a flag is cleared before a refcount can say 2 and set after
    /// a refcount durably says 1.
    fn all(&self, header: Header, before: &Examination) -> Result<Header> {
        // Building anew syncs them before the new counts are in force.
        self.set_flags(&header, WrongFlag::is_set)?;
        let header = if before.needs_rebuild {
            rebuild(self.storage, &header, self.references)?
        } else {
            self.lower_refcounts(&header)?;
            header
        };
        self.set_flags(&header, |_| true)?;
        sync(self.storage, Rule::RepairSynced)?;
        Ok(header)
    }

    /// Makes those wrong COPIED flags right that `which` picks; not synced.
    fn set_flags(&self, header: &Header, which: impl Fn(&WrongFlag) -> bool) -> Result<()> {
        let references = self.references;
        let refcount = |cluster| Ok(Some(references.get(cluster)));
        copied::for_each_wrong(self.storage, header, references, &(), refcount, |wrong| {
            if which(&wrong) {
                write(self.storage, &wrong.right.to_be_bytes(), wrong.at, "a table entry")?;
            }
            Ok(())
        })
    }

    /// Lowers every refcount that is too high, durably, and gives the space of the clusters that
    /// nothing refers to back to the host.
    fn lower_refcounts(&self, header: &Header) -> Result<()> {
        let g = header.geometry;
        let refcounts = Refcounts::load(self.storage, header)?;
        // The structure itself is referenced, too; the report of what is wrong with it was made.
        let mut references = references::count(self.storage, header)?;
        refcounts.count_itself(&mut references, &mut Report::default());
        let mut sector = Sector::default();
        let mut freed = 0..0;
        refcounts.for_each_used(&references, &(), |used| {
            let Used { refcount, references, place: Some((block, index)), .. } = used else {
                return Ok(());
            };
            if refcount <= references {
                return Ok(());
            }
            sector.set(self.storage, &g, block, index, references)?;
            if references == 0 {
                let start = g.host_offset(used.cluster).0;
                if freed.end != start {
                    punch(self.storage, std::mem::replace(&mut freed, start..start))?;
                }
                freed.end = start + g.cluster_size();
            }
            Ok(())
        })?;
        sector.write(self.storage)?;
        punch(self.storage, freed)?;
        sync(self.storage, Rule::RepairedCountsBeforeFlags)
    }
}

/// One sector of a refcount block, changed in memory until the next one is needed.
#[derive(Default)]
struct Sector {
    offset: u64,
    /// Empty before the first sector is read.
    bytes: Vec<u8>,
}

impl Sector {
    const SIZE: u64 = 512;

    fn set(
        &mut self,
        storage: &dyn Storage,
        g: &Geometry,
        block: HostOffset,
        index: u64,
        value: u64,
    ) -> Result<()> {
        let order = g.refcount_order();
        let per_sector = (Self::SIZE * 8) >> order;
        let offset = block.0 + index / per_sector * Self::SIZE;
        if self.bytes.is_empty() || offset != self.offset {
            self.write(storage)?;
            self.bytes.resize(Self::SIZE as usize, 0);
            self.offset = offset;
            let failed = |e| Error::io(format!("reading the refcount block at {block}"), e);
            storage.read_at(&mut self.bytes, offset).map_err(failed)?;
        }
        refcount::set(&mut self.bytes, (index % per_sector) as usize, order, value);
        Ok(())
    }

    fn write(&self, storage: &dyn Storage) -> Result<()> {
        write(storage, &self.bytes, HostOffset(self.offset), "a refcount block")
    }
}

/// L2 entries that have no data and keep a cluster that makes no sense forget the cluster. What
/// reads as zeros, and what does not, stays as it is.
fn forget_preallocations(
    storage: &dyn Storage,
    header: &Header,
    references: &ReferenceCounts,
) -> Result<()> {
    // With extended L2 entries the bitmap says it, in a word of its own.
    let reads_as_zeros = u64::from(!header.geometry.extended_l2());
    for &at in &references.bad_preallocations {
        write(storage, &reads_as_zeros.to_be_bytes(), at, "an L2 entry")?;
    }
    match references.bad_preallocations.is_empty() {
        true => Ok(()),
        false => sync(storage, Rule::RepairSynced),
    }
}

/// Clears incompatible features, durably.
fn clear_features(storage: &dyn Storage, header: &Header, features: u64) -> Result<()> {
    let incompatible = header.incompatible_features & !features;
    if incompatible == header.incompatible_features {
        return Ok(());
    }
    let (compatible, autoclear) = (header.compatible_features, header.autoclear_features);
    let patch = Header::patch_features(incompatible, compatible, autoclear);
    write(storage, &patch.bytes, patch.offset, "the header")?;
    sync(storage, Rule::RepairSynced)
}

/// Gives a range back to the host. A host that cannot keeps it; that is no error.
fn punch(storage: &dyn Storage, range: Range<u64>) -> Result<()> {
    match storage.punch_hole(range.clone()) {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
        other => other.map_err(|e| {
            Error::io(format!("punching {:#x} to {:#x} out of the file", range.start, range.end), e)
        }),
    }
}

fn write(storage: &dyn Storage, bytes: &[u8], at: HostOffset, what: &str) -> Result<()> {
    storage.write_at(bytes, at.0).map_err(|e| Error::io(format!("writing {what} at {at}"), e))
}

fn sync(storage: &dyn Storage, rule: Rule) -> Result<()> {
    if !rule.is_kept() {
        return Ok(());
    }
    storage.sync().map_err(|e| Error::io("syncing the image", e))
}
