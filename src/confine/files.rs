//! Landlock: files beneath a few places, no network, no signals to other processes.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus,
    Scope,
};

use super::Place;

/// The newest rules that are asked for; an older kernel gets those that it knows.
const NEWEST: ABI = ABI::V6;

/// Confines this thread and those that it starts to `places`.
///
/// # Errors
/// A line that says why it did not come to that, or only in part.
pub(super) fn restrict(places: &[Place]) -> Result<(), String> {
    match enforce(places) {
        Ok(RestrictionStatus { ruleset: RulesetStatus::FullyEnforced, .. }) => Ok(()),
        // Files are what matters; later kernels know more.
        Ok(RestrictionStatus { ruleset: RulesetStatus::PartiallyEnforced, .. }) => Ok(()),
        Ok(_) => Err("the kernel has no Landlock, or has it switched off".to_owned()),
        Err(why) => Err(why),
    }
}

fn enforce(places: &[Place]) -> Result<RestrictionStatus, String> {
    let failed = |e: RulesetError| e.to_string();
    let mut rules = Ruleset::default()
        // The first kernels with Landlock never let files move from one directory to another.
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::Refer)
        .map(|rules| rules.set_compatibility(CompatLevel::BestEffort))
        .and_then(|rules| rules.handle_access(AccessFs::from_all(NEWEST)))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(NEWEST)))
        // Neither others by signals, nor sockets that are no files, but for those that are connected.
        .and_then(|rules| rules.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .map_err(failed)?;
    for Place { path, write } in places {
        let place = PathFd::new(path).map_err(|e| e.to_string())?;
        let access = access(*write, path.is_dir());
        rules = rules.add_rule(PathBeneath::new(place, access)).map_err(failed)?;
    }
    rules.restrict_self().map_err(failed)
}

/// What may be done beneath a place, or to a file. Nothing is ever executed, and no device, socket,
/// FIFO or symbolic link made.
fn access(write: bool, is_directory: bool) -> BitFlags<AccessFs> {
    let to_read = AccessFs::ReadFile | AccessFs::ReadDir;
    let to_write = AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::Refer;
    let all = if write { to_read | to_write } else { to_read };
    if is_directory { all } else { all & AccessFs::from_file(NEWEST) }
}
