//! The rules of order that keep an image sound, by name.
//!
//! What is durable before what, and what waits for what: each rule of that kind has a name here and
//! is asked for by that name where it is kept. In a program that is built with the feature `omit`
//! one of them can be left out, so that the crash search proves that it notices
//! (`tests/omissions.rs` does that for every one). In any other program all rules are kept, and
//! asking costs nothing.

/// One rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Rule {
    /// Data in an external data file is durable before the tables that lead there are written.
    DataFileBeforeTables,
    /// The contents of refcount blocks are durable before the refcount table or the header names
    /// them.
    BlocksBeforeLinks,
    /// A refcount block is linked only after the block, durably, that counts its place.
    LinksInTurn,
    /// What an entry of a table depends on is durable before the entry is written.
    BarrierBeforeEntries,
    /// The refcount table names a block no more, durably, before its place is used again.
    LinksBeforePlaces,
    /// The place that a refcount block or table has left is given to nobody before the flush.
    LeftPlacesWait,
    /// A flush ends with a sync after tables.
    TablesSynced,
    /// A flush syncs what was written in place, though no table has changed.
    DataSynced,
    /// A flush syncs where nothing but erased clusters and junk wait for it.
    StatesSynced,
    /// A cluster that was dropped is freed only after the flush that makes that durable.
    JunkWaits,
    /// A reference to a shared cluster stays counted until the flush that makes its loss durable.
    SharedJunkWaits,
    /// A cluster is handed out as ready only after the flush that makes its count and its zeros
    /// durable.
    ErasedWaits,
    /// The place of a refcount block that was let go of is given to nobody before the flush.
    UnlinkedPlacesWait,
    /// Nor is the file cut before it.
    UnlinkedPlacesInFile,
    /// A cluster that is allocated reads zeros.
    AllocatedReadsZeros,
    /// A cluster from outside the pool is counted and zeroed durably before an entry leads there.
    AllocatedBeforeEntry,
    /// The file reaches to the end of each cluster that is handed out.
    FileReachesAllocated,
    /// A new cluster of an encrypted image is filled, durably, before an entry leads there: what it was
    /// erased to decrypts to anything.
    EncryptedBeforeEntry,
    /// A copy of older data is durable before the entry that replaces the original.
    CopyBeforeEntry,
    /// A copy of a shared L2 table is durable before the L1 entry that leads to it.
    TableCopyBeforeEntry,
    /// What a subcluster holds is durable before its allocation bit.
    SubclusterBeforeBit,
    /// A refcount has fallen to 1, durably, before COPIED says so.
    CountBeforeFlag,
    /// A cluster that moves is durable before the entries that lead to its new place.
    MoveBeforeEntry,
    /// An L2 table that moves is durable before the L1 entry that leads to its new place.
    TableMoveBeforeEntry,
    /// Other metadata that moves is durable before the word that leads to its new place.
    MoveBeforeWord,
    /// What changes within the snapshot table is in the file before the table is copied.
    WordsBeforeTableMove,
    /// What has moved of snapshots is in the file before compaction reads there what to move.
    WordsBeforePass,
    /// A new L1 table, and what it refers to, is durable before the header names it.
    L1BeforeHeader,
    /// The header names the new L1 table, durably, before the old one's place is used again.
    L1SwitchBeforeReuse,
    /// What lies past the new end is unmapped, durably, before the disk is shorter.
    CutBeforeSize,
    /// A shorter disk is durable at once.
    SizeSynced,
    /// What lies past the end is unmapped, durably, before the disk is longer.
    ClearBeforeGrowth,
    /// COPIED has gone from what will be shared, durably, before anything shares it.
    FlagsBeforeSharing,
    /// A snapshot table, and the counts of what its snapshots share, are durable before the header
    /// names it.
    SnapshotsBeforeHeader,
    /// The header names the new snapshot table, durably, before anything is freed that only the old
    /// one led to.
    SnapshotSwitchBeforeReuse,
    /// All that the disk was is in the file before another one takes its place.
    DiskBeforeApplied,
    /// What was dropped is no longer counted when what a snapshot shares is counted.
    DropsBeforeApplied,
    /// The L1 table of a snapshot that is applied, and the counts of what it shares with the
    /// snapshot, are durable before the header names it.
    AppliedBeforeHeader,
    /// The header names it, durably, before anything of the old disk is freed.
    AppliedSwitchBeforeReuse,
    /// Bitmaps are marked as in use, durably, before the disk changes.
    BitmapsMarkedFirst,
    /// Stored bitmaps are durable before the header names their directory.
    BitmapsBeforeHeader,
    /// The header names it, durably, before the old bitmaps' places are used again.
    BitmapSwitchBeforeReuse,
    /// The copies of bitmaps that move are durable before the words that lead to them.
    BitmapMoveBeforeWords,
    /// A raw data file is written only where the mapping is durable.
    RawMappingFirst,
    /// Autoclear bits that are not maintained have gone, durably, before the first change.
    AutoclearFirst,
    /// Rebuilt refcounts are durable before the header names them.
    RebuiltBeforeHeader,
    /// The header names them, durably, before they are changed.
    RebuiltSwitchBeforeUse,
    /// Counts that a repair has lowered are durable before COPIED says so.
    RepairedCountsBeforeFlags,
    /// What a repair reports is durable.
    RepairSynced,
}

impl Rule {
    /// Every rule.
    pub const ALL: [Rule; 49] = [
        Rule::DataFileBeforeTables,
        Rule::BlocksBeforeLinks,
        Rule::LinksInTurn,
        Rule::BarrierBeforeEntries,
        Rule::LinksBeforePlaces,
        Rule::LeftPlacesWait,
        Rule::TablesSynced,
        Rule::DataSynced,
        Rule::StatesSynced,
        Rule::JunkWaits,
        Rule::SharedJunkWaits,
        Rule::ErasedWaits,
        Rule::UnlinkedPlacesWait,
        Rule::UnlinkedPlacesInFile,
        Rule::AllocatedReadsZeros,
        Rule::AllocatedBeforeEntry,
        Rule::FileReachesAllocated,
        Rule::EncryptedBeforeEntry,
        Rule::CopyBeforeEntry,
        Rule::TableCopyBeforeEntry,
        Rule::SubclusterBeforeBit,
        Rule::CountBeforeFlag,
        Rule::MoveBeforeEntry,
        Rule::TableMoveBeforeEntry,
        Rule::MoveBeforeWord,
        Rule::WordsBeforeTableMove,
        Rule::WordsBeforePass,
        Rule::L1BeforeHeader,
        Rule::L1SwitchBeforeReuse,
        Rule::CutBeforeSize,
        Rule::SizeSynced,
        Rule::ClearBeforeGrowth,
        Rule::FlagsBeforeSharing,
        Rule::SnapshotsBeforeHeader,
        Rule::SnapshotSwitchBeforeReuse,
        Rule::DiskBeforeApplied,
        Rule::DropsBeforeApplied,
        Rule::AppliedBeforeHeader,
        Rule::AppliedSwitchBeforeReuse,
        Rule::BitmapsMarkedFirst,
        Rule::BitmapsBeforeHeader,
        Rule::BitmapSwitchBeforeReuse,
        Rule::BitmapMoveBeforeWords,
        Rule::RawMappingFirst,
        Rule::AutoclearFirst,
        Rule::RebuiltBeforeHeader,
        Rule::RebuiltSwitchBeforeUse,
        Rule::RepairSynced,
        Rule::RepairedCountsBeforeFlags,
    ];

    /// Whether it is kept: always, but under test.
    #[cfg(not(feature = "omit"))]
    #[inline(always)]
    pub(crate) const fn is_kept(self) -> bool {
        true
    }

    /// Whether it is kept: unless [`leave_out`] says otherwise.
    #[cfg(feature = "omit")]
    pub(crate) fn is_kept(self) -> bool {
        let left_out = switch::LEFT_OUT.load(std::sync::atomic::Ordering::Relaxed) == self as u8;
        if left_out {
            switch::MISSED.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        !left_out
    }
}

#[cfg(feature = "omit")]
pub use switch::{leave_out, missed};

#[cfg(feature = "omit")]
mod switch {
    use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

    use super::Rule;

    const NONE: u8 = u8::MAX;

    pub(super) static LEFT_OUT: AtomicU8 = AtomicU8::new(NONE);
    pub(super) static MISSED: AtomicU64 = AtomicU64::new(0);

    /// From now on `rule` is kept nowhere in this process, and all others are.
    pub fn leave_out(rule: Option<Rule>) {
        LEFT_OUT.store(rule.map_or(NONE, |rule| rule as u8), Ordering::Relaxed);
        MISSED.store(0, Ordering::Relaxed);
    }

    /// How often that rule should have been kept since.
    pub fn missed() -> u64 {
        MISSED.load(Ordering::Relaxed)
    }
}
