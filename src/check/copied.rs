//! The COPIED flags of the active tables: set exactly where the refcount is 1.

use super::pieces::{for_each_data, for_each_word};
use super::progress::Watch;
use super::references::ReferenceCounts;
use crate::error::Result;
use crate::format::{
    COPIED, Header, HostCluster, HostOffset, INCOMPATIBLE_DATA_FILE, L2Entry, OFFSET_MASK, be64,
};
use crate::storage::Storage;

/// A table entry whose COPIED flag is wrong.
#[derive(Clone, Debug)]
pub(crate) struct WrongFlag {
    /// Where the entry stands.
    pub(crate) at: HostOffset,
    /// The entry with its flag as it should be.
    pub(crate) right: u64,
    /// The refcount of what it points to; none for a compressed cluster, which never has the flag.
    pub(crate) refcount: Option<u64>,
    /// Its number in its table.
    index: u64,
    /// The L2 table that it stands in; none for an entry of the L1 table.
    l2_table: Option<u64>,
    /// How many L1 entries lead there.
    pub(crate) times: u64,
}

impl WrongFlag {
    /// `L2 entry 17 of table 0x50000`.
    pub(crate) fn name(&self) -> String {
        match self.l2_table {
            Some(table) => format!("L2 entry {} of table {table:#x}", self.index),
            None => format!("L1 entry {}", self.index),
        }
    }

    /// Whether the flag is set and should not be.
    pub(crate) fn is_set(&self) -> bool {
        self.right & COPIED == 0
    }
}

/// Calls `visit` for each entry of the active tables that has a wrong COPIED flag. `refcount` says
/// what the refcount of a cluster is; where that is unknown every flag is taken to be right.
pub(crate) fn for_each_wrong(
    storage: &dyn Storage,
    header: &Header,
    references: &ReferenceCounts,
    watch: &dyn Watch,
    mut refcount: impl FnMut(HostCluster) -> Result<Option<u64>>,
    mut visit: impl FnMut(WrongFlag) -> Result<()>,
) -> Result<()> {
    let (g, size) = (&header.geometry, header.geometry.l2_entry_size());
    let l1 = header.l1_table_offset;
    let range = l1.0..l1.0.saturating_add(u64::from(header.l1_size) * 8);
    for_each_word(storage, range, reading("L1", l1.0), |at, raw| {
        let offset = HostOffset(raw & OFFSET_MASK);
        let refcount = if offset.0 == 0 { None } else { refcount(g.host_cluster(offset))? };
        let right = if refcount.is_none() { raw } else { with_flag(raw, refcount) };
        if raw == right {
            return Ok(());
        }
        let (index, l2_table) = ((at - l1.0) / 8, None);
        visit(WrongFlag { at: HostOffset(at), right, refcount, index, l2_table, times: 1 })
    })?;
    let all = references.l2_tables.len() as u64;
    let tables = (0..).zip(&references.l2_tables);
    for (done, (&table, uses)) in tables.filter(|(_, (_, uses))| uses.active != 0) {
        watch.at("checking flags", done, all);
        let range = table..table + g.cluster_size();
        for_each_data(storage, range, reading("L2", table), |start, bytes| {
            for (at, entry) in
                (start..).step_by(size as usize).zip(bytes.chunks_exact(size as usize))
            {
                let raw = be64(entry, 0);
                let Some((right, refcount)) = right_l2_entry(raw, header, &mut refcount)? else {
                    continue;
                };
                if raw != right {
                    let (index, l2_table) = ((at - table) / size, Some(table));
                    let (at, times) = (HostOffset(at), uses.active);
                    visit(WrongFlag { at, right, refcount, index, l2_table, times })?;
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// An L2 entry with its flag as it should be, and the refcount that says so (none for a compressed
/// cluster); nothing where no flag can be wrong, or where nobody can say which of two is.
fn right_l2_entry(
    raw: u64,
    header: &Header,
    mut refcount: impl FnMut(HostCluster) -> Result<Option<u64>>,
) -> Result<Option<(u64, Option<u64>)>> {
    let g = &header.geometry;
    // Whatever else may be wrong with the entry.
    let offset = HostOffset(raw & OFFSET_MASK);
    let refcount = if L2Entry::may_be_compressed_or_not(raw, g) {
        // Without COPIED it would be compressed for good, whatever it was.
        return Ok(None);
    } else if L2Entry::is_compressed(raw) {
        return Ok(Some((with_flag(raw, None), None)));
    } else if offset.0 == 0 {
        None
    } else if header.incompatible_features & INCOMPATIBLE_DATA_FILE != 0 {
        Some(1)
    } else {
        refcount(g.host_cluster(offset))?
    };
    Ok(refcount.map(|refcount| (with_flag(raw, Some(refcount)), Some(refcount))))
}

fn with_flag(raw: u64, refcount: Option<u64>) -> u64 {
    if refcount == Some(1) { raw | COPIED } else { raw & !COPIED }
}

fn reading(level: &'static str, table: u64) -> impl Fn() -> String {
    move || format!("reading the {level} table at {table:#x}")
}
