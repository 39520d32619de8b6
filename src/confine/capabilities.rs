//! Capabilities: those that reading and changing other users' image files needs stay.

use caps::{CapSet, Capability, CapsHashSet};

/// Images belong to anybody: they are opened, made for their users, and get modes, owners and times.
const NEEDED: [Capability; 4] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
];

/// What it takes to have the kernel read and write a file itself, and to learn whether anybody still
/// has a mapping of it.
const FOR_PASSTHROUGH: [Capability; 2] = [Capability::CAP_SYS_ADMIN, Capability::CAP_LEASE];

/// Gives up all others, for good.
///
/// # Errors
/// A line that says what failed.
pub(super) fn drop_all_but_needed(passthrough: bool) -> Result<(), String> {
    let mut needed = CapsHashSet::from(NEEDED);
    needed.extend(FOR_PASSTHROUGH.into_iter().filter(|_| passthrough));
    let had = caps::read(None, CapSet::Permitted).map_err(|e| e.to_string())?;
    let kept: CapsHashSet = had.intersection(&needed).copied().collect();
    // While the right to do so is there.
    if had.contains(&Capability::CAP_SETPCAP) {
        let bound = caps::read(None, CapSet::Bounding).map_err(|e| e.to_string())?;
        for capability in bound.difference(&needed) {
            caps::drop(None, CapSet::Bounding, *capability).map_err(|e| e.to_string())?;
        }
    }
    let none = CapsHashSet::new();
    for (set, kept) in
        [(CapSet::Inheritable, &none), (CapSet::Effective, &kept), (CapSet::Permitted, &kept)]
    {
        caps::set(None, set, kept).map_err(|e| e.to_string())?;
    }
    Ok(())
}
