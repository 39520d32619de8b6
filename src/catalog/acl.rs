//! What POSIX access control lists mean for mode bits (acl(5)).
//!
//! The mode bits of the group that the host shows of a file with a list are its mask: what the owner's
//! group and all that the list names may have at most. The list itself is not shown, so the kernel would
//! take them for what the owner's group may, which the list may deny.

use std::fs::File;
use std::io;

use rustix::io::Errno;

use super::host;

/// The bits of a mode that are the group's.
const GROUP: u32 = 0o070;
/// The extended attribute that holds the list: a version and the entries, little-endian
/// (`linux/posix_acl_xattr.h`).
const ATTRIBUTE: &str = "system.posix_acl_access";
const VERSION: u32 = 2;
/// Bytes of an entry: tag and permissions, 16 bits each, and an id.
const ENTRY: usize = 8;
const OWNERS_GROUP: u16 = 0x04;
const MASK: u16 = 0x10;

/// The mode of a file whose mode on the host is `mode`, with what the owner's group may indeed. Where
/// that cannot be found out, it may nothing.
pub(super) fn mode_of(file: &File, mode: u32) -> u32 {
    match list_of(file) {
        Ok(None) => mode,
        Ok(Some(list)) => mode & !GROUP | owners_group(&list).unwrap_or(0) << 3,
        Err(e) => {
            log::debug!("reading an access control list: {e}");
            mode & !GROUP
        }
    }
}

/// The mode to set on a file whose mode on the host is `now`, where `asked` is asked for and `shown` was
/// shown: the mask stays where nobody asks for another one.
pub(super) fn mode_to_set(file: &File, now: u32, shown: u32, asked: u32) -> u32 {
    let has_list = !matches!(list_of(file), Ok(None));
    if has_list && asked & GROUP == shown & GROUP { asked & !GROUP | now & GROUP } else { asked }
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

/// What the owner's group may, as the last three bits; `None` where the list makes no sense.
fn owners_group(list: &[u8]) -> Option<u32> {
    let (version, entries) = list.split_first_chunk()?;
    if u32::from_le_bytes(*version) != VERSION || entries.len() % ENTRY != 0 {
        return None;
    }
    let (mut group, mut mask) = (None, 0o7);
    for entry in entries.chunks_exact(ENTRY) {
        let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        match half(0) {
            OWNERS_GROUP => group = Some(half(2)),
            MASK => mask = half(2),
            _ => {}
        }
    }
    Some(u32::from(group? & mask & 0o7))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: u16 = 0x01;
    const USER: u16 = 0x02;
    const NAMED_GROUP: u16 = 0x08;
    const OTHER: u16 = 0x20;

    fn list(version: u32, entries: &[(u16, u16)]) -> Vec<u8> {
        let entry = |(tag, may): &(u16, u16)| {
            [tag.to_le_bytes(), may.to_le_bytes(), [0xff; 2], [0xff; 2]].concat()
        };
        [version.to_le_bytes().to_vec(), entries.iter().flat_map(entry).collect()].concat()
    }

    #[test]
    fn the_owners_group_may_what_its_entry_and_the_mask_let_it() {
        let named = [(OWNER, 6), (USER, 7), (OWNERS_GROUP, 5), (NAMED_GROUP, 7), (OTHER, 4)];
        assert_eq!(owners_group(&list(VERSION, &named)), Some(5));
        for (mask, may) in [(7, 5), (6, 4), (2, 0)] {
            let masked = [&named[..], &[(MASK, mask)]].concat();
            assert_eq!(owners_group(&list(VERSION, &masked)), Some(may), "{mask}");
        }
    }

    #[test]
    fn a_list_that_makes_no_sense_is_none() {
        let sound = list(VERSION, &[(OWNERS_GROUP, 7)]);
        assert_eq!(owners_group(&sound), Some(7));
        for cut in 0..sound.len() {
            assert_eq!(owners_group(&sound[..cut]), None, "{cut} bytes");
        }
        assert_eq!(owners_group(&list(1, &[(OWNERS_GROUP, 7)])), None);
        assert_eq!(owners_group(&list(VERSION, &[(OWNER, 7)])), None);
    }
}
