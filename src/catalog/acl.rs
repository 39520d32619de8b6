//! What POSIX access control lists mean for mode bits (acl(5)).
//!
//! The mode bits of the group that the host shows of a file with a list are its mask: what the owner's
//! group and all that the list names may have at most. The list itself is not shown, so the kernel would
//! take them for what the owner's group may, which the list may deny. And whom the list names may have
//! less than those have who are in no class of their own: so nobody has more here than each of them.

use std::fs::File;
use std::io;

use rustix::io::Errno;

use super::host;

/// The bits of a mode that are the group's.
const GROUP: u32 = 0o070;
/// Those of who is neither the owner nor in that group.
const OTHERS: u32 = 0o007;
/// Those that the list decides.
const BY_LIST: u32 = GROUP | OTHERS;
/// The extended attribute that holds the list: a version and the entries, little-endian
/// (`linux/posix_acl_xattr.h`).
const ATTRIBUTE: &str = "system.posix_acl_access";
const VERSION: u32 = 2;
/// Bytes of an entry: tag and permissions, 16 bits each, and an id.
const ENTRY: usize = 8;
const NAMED_USER: u16 = 0x02;
const OWNERS_GROUP: u16 = 0x04;
const NAMED_GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// The mode of a file whose mode on the host is `mode`, with what the owner's group may indeed, and others
/// whoever they are. Where that cannot be found out, they may nothing.
pub(super) fn mode_of(file: &File, mode: u32) -> u32 {
    match list_of(file) {
        Ok(None) => mode,
        Ok(Some(list)) => mode & !BY_LIST | by_list(&list).unwrap_or(0),
        Err(e) => {
            log::debug!("reading an access control list: {e}");
            mode & !BY_LIST
        }
    }
}

/// Whether a file has a list, or may have one.
pub(super) fn has_list(file: &File) -> bool {
    !matches!(list_of(file), Ok(None))
}

/// The mode to set on a file whose mode on the host is `now`, where `asked` is asked for and `shown` was
/// shown: the mask and what others may stay where nobody asks for something else.
pub(super) fn mode_to_set(file: &File, now: u32, shown: u32, asked: u32) -> u32 {
    if !has_list(file) {
        return asked;
    }
    let kept = [GROUP, OTHERS].into_iter().filter(|class| asked & class == shown & class);
    kept.fold(asked, |mode, class| mode & !class | now & class)
}

/// The list of a file; `None` where it has none, or the host knows none.
fn list_of(file: &File) -> io::Result<Option<Vec<u8>>> {
    // Few files have one: that is found out without a buffer.
    match rustix::fs::getxattr(host::path_of(file), ATTRIBUTE, &mut [0_u8; 0][..]) {
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(e) => Err(e.into()),
        Ok(_) => host::attribute(file, ATTRIBUTE.as_ref()).map(Some),
    }
}

/// What the owner's group and others may, as bits of a mode; `None` where the list makes no sense.
fn by_list(list: &[u8]) -> Option<u32> {
    let (version, entries) = list.split_first_chunk()?;
    if u32::from_le_bytes(*version) != VERSION || entries.len() % ENTRY != 0 {
        return None;
    }
    let (mut group, mut others, mut mask) = (None, None, 0o7);
    // What all whom it names may alike, users and groups.
    let (mut users, mut groups, mut any_named) = (0o7, 0o7, false);
    for entry in entries.chunks_exact(ENTRY) {
        let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        match half(0) {
            OWNERS_GROUP => group = Some(half(2)),
            OTHER => others = Some(half(2)),
            MASK => mask = half(2),
            NAMED_USER => (users, any_named) = (users & half(2), true),
            NAMED_GROUP => (groups, any_named) = (groups & half(2), true),
            _ => {}
        }
    }
    let group = group? & mask & users;
    let others = others? & if any_named { users & groups & mask } else { 0o7 };
    Some(u32::from(group & 0o7) << 3 | u32::from(others & 0o7))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: u16 = 0x01;

    fn list(version: u32, entries: &[(u16, u16)]) -> Vec<u8> {
        let entry = |(tag, may): &(u16, u16)| {
            [tag.to_le_bytes(), may.to_le_bytes(), [0xff; 2], [0xff; 2]].concat()
        };
        [version.to_le_bytes().to_vec(), entries.iter().flat_map(entry).collect()].concat()
    }

    #[test]
    fn the_owners_group_may_what_its_entry_and_the_mask_let_it() {
        let named = [(OWNER, 6), (NAMED_USER, 7), (OWNERS_GROUP, 5), (NAMED_GROUP, 7), (OTHER, 4)];
        assert_eq!(by_list(&list(VERSION, &named)), Some(0o54));
        for (mask, may) in [(7, 0o54), (6, 0o44), (2, 0)] {
            let masked = [&named[..], &[(MASK, mask)]].concat();
            assert_eq!(by_list(&list(VERSION, &masked)), Some(may), "{mask}");
        }
    }

    #[test]
    fn nobody_may_more_than_whom_the_list_names() {
        for (name, may, group_and_others) in [
            (NAMED_USER, 0, 0),
            (NAMED_USER, 4, 0o44),
            (NAMED_GROUP, 0, 0o60),
            (NAMED_GROUP, 2, 0o60),
            (NAMED_GROUP, 7, 0o64),
        ] {
            let entries = [(OWNER, 6), (OWNERS_GROUP, 6), (name, may), (MASK, 7), (OTHER, 4)];
            assert_eq!(by_list(&list(VERSION, &entries)), Some(group_and_others), "{name} {may}");
        }
    }

    #[test]
    fn a_list_that_makes_no_sense_is_none() {
        let sound = list(VERSION, &[(OTHER, 1), (OWNERS_GROUP, 7)]);
        assert_eq!(by_list(&sound), Some(0o71));
        for cut in 0..sound.len() {
            assert_eq!(by_list(&sound[..cut]), None, "{cut} bytes");
        }
        assert_eq!(by_list(&list(1, &[(OTHER, 1), (OWNERS_GROUP, 7)])), None);
        assert_eq!(by_list(&list(VERSION, &[(OWNERS_GROUP, 7)])), None);
        assert_eq!(by_list(&list(VERSION, &[(OTHER, 7)])), None);
    }
}
