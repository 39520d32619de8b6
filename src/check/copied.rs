//! The COPIED flags of the active tables: set exactly where the refcount is 1.

use super::pieces::{for_each_data, for_each_word};
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
    /// The refcount of what it points to.
    pub(crate) refcount: u64,
    /// `L2 entry 17 of table 0x50000`.
    pub(crate) name: String,
    /// How many L1 entries lead there.
    pub(crate) times: u64,
}

impl WrongFlag {
    /// Whether the flag is set and should not be.
    pub(crate) fn is_set(&self) -> bool {
        self.right & COPIED == 0
    }
}

/// Calls `visit` for each entry of the active tables that has a wrong COPIED flag. `refcount` says
/// what the refcount of a cluster is; where that is unknown every flag is taken to be right.
///
/// Compressed clusters never have the flag; those that do are not visited.
pub(crate) fn for_each_wrong(
    storage: &dyn Storage,
    header: &Header,
    references: &ReferenceCounts,
    mut refcount: impl FnMut(HostCluster) -> Result<Option<u64>>,
    mut visit: impl FnMut(WrongFlag) -> Result<()>,
) -> Result<()> {
    let g = &header.geometry;
    let table = header.l1_table_offset;
    let range = table.0..table.0.saturating_add(u64::from(header.l1_size) * 8);
    for_each_word(
        storage,
        range,
        || format!("reading the L1 table at {table}"),
        |at, raw| {
            let offset = HostOffset(raw & OFFSET_MASK);
            let Some(refcount) =
                (if offset.0 == 0 { None } else { refcount(g.host_cluster(offset))? })
            else {
                return Ok(());
            };
            let right = with_flag(raw, refcount);
            if raw == right {
                return Ok(());
            }
            let name = format!("L1 entry {}", (at - table.0) / 8);
            visit(WrongFlag { at: HostOffset(at), right, refcount, name, times: 1 })
        },
    )?;
    let data_file = header.incompatible_features & INCOMPATIBLE_DATA_FILE != 0;
    let size = g.l2_entry_size();
    for (&table, uses) in references.l2_tables.iter().filter(|(_, uses)| uses.active != 0) {
        let range = table..table + g.cluster_size();
        for_each_data(
            storage,
            range,
            || format!("reading the L2 table at {table:#x}"),
            |at, bytes| {
                for (i, entry) in (0..).zip(bytes.chunks_exact(size as usize)) {
                    let raw = be64(entry, 0);
                    let Some(cluster) = cluster_of(raw, header) else { continue };
                    let refcount = if data_file { Some(1) } else { refcount(cluster)? };
                    let Some(refcount) = refcount else { continue };
                    let right = with_flag(raw, refcount);
                    if raw != right {
                        let at = HostOffset(at + i * size);
                        let name =
                            format!("L2 entry {} of table {table:#x}", (at.0 - table) / size);
                        visit(WrongFlag { at, right, refcount, name, times: uses.active })?;
                    }
                }
                Ok(())
            },
        )?;
    }
    Ok(())
}

fn with_flag(raw: u64, refcount: u64) -> u64 {
    if refcount == 1 { raw | COPIED } else { raw & !COPIED }
}

/// The host cluster of an L2 entry, whatever else is wrong with the entry. In an external data file
/// the cluster says nothing, only that there is one.
fn cluster_of(raw: u64, header: &Header) -> Option<HostCluster> {
    if let Ok(L2Entry::Compressed { .. }) = L2Entry::decode(raw, &header.geometry) {
        return None;
    }
    let offset = HostOffset(raw & OFFSET_MASK);
    (offset.0 != 0).then(|| header.geometry.host_cluster(offset))
}
