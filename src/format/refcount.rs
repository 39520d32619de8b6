//! Refcounts in a refcount block: 1 to 64 bits wide, big-endian; widths under 8 bits count from
//! the least significant bit of a byte.

use std::iter;

/// The refcount of entry `index` of `block`, whose entries are `1 << order` bits wide.
pub fn get(block: &[u8], index: usize, order: u32) -> u64 {
    match order {
        0..=2 => {
            let (byte, shift, mask) = locate(index, order);
            u64::from(block[byte] >> shift & mask)
        }
        _ => {
            let width = 1 << (order - 3);
            let bytes = &block[index * width..][..width];
            bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
        }
    }
}

/// The first entry of `block` from `index` on that is not 0.
pub fn next_used(block: &[u8], mut index: usize, order: u32) -> Option<usize> {
    while index < (block.len() * 8) >> order {
        let byte = (index << order) / 8;
        let zeros = block[byte..].iter().position(|byte| *byte != 0)?;
        if zeros > 0 {
            index = ((byte + zeros) * 8) >> order;
        }
        if get(block, index, order) != 0 {
            return Some(index);
        }
        index += 1;
    }
    None
}

/// All entries of `block` that are not 0, in ascending order.
pub fn in_use(block: &[u8], order: u32) -> impl Iterator<Item = usize> {
    iter::successors(next_used(block, 0, order), move |last| next_used(block, last + 1, order))
}

/// Sets the refcount of entry `index` of `block`. `value` must fit `1 << order` bits.
pub fn set(block: &mut [u8], index: usize, order: u32, value: u64) {
    debug_assert!(order == 6 || value >> (1 << order) == 0, "refcount {value} does not fit");
    match order {
        0..=2 => {
            let (byte, shift, mask) = locate(index, order);
            block[byte] = block[byte] & !(mask << shift) | (value as u8 & mask) << shift;
        }
        _ => {
            let width = 1 << (order - 3);
            block[index * width..][..width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
        }
    }
}

/// Byte, shift and mask of an entry narrower than a byte.
fn locate(index: usize, order: u32) -> (usize, u32, u8) {
    let per_byte = 8 >> order;
    let shift = (index % per_byte) as u32 * (1 << order);
    (index / per_byte, shift, ((1u16 << (1 << order)) - 1) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_neighbours_apart() {
        for order in 0..=6 {
            let max = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
            let mut block = [0u8; 64];
            let entries = (64 * 8) >> order;
            for i in 0..entries {
                set(&mut block, i, order, max);
                for j in 0..entries {
                    let expected = if i == j { max } else { 0 };
                    assert_eq!(get(&block, j, order), expected, "order {order} {i} {j}");
                }
                set(&mut block, i, order, 0);
            }
        }
    }

    #[test]
    fn the_next_entry_in_use_is_found_from_everywhere() {
        for order in 0..=6 {
            let entries = (64 * 8) >> order;
            for used in [vec![], vec![0], vec![entries - 1], vec![1, 2, entries / 2]] {
                let mut block = [0u8; 64];
                used.iter().for_each(|i| set(&mut block, *i, order, 1));
                assert_eq!(in_use(&block, order).collect::<Vec<_>>(), used);
                for from in 0..entries + 2 {
                    let expected = used.iter().copied().find(|i| *i >= from);
                    assert_eq!(next_used(&block, from, order), expected, "{order} {used:?} {from}");
                }
            }
        }
    }

    #[test]
    fn narrow_refcounts_count_from_the_least_significant_bit() {
        let mut block = [0u8; 2];
        set(&mut block, 1, 0, 1);
        assert_eq!(block, [0b10, 0]);
        set(&mut block, 3, 1, 2);
        assert_eq!(block, [0b1000_0010, 0]);
        let mut block = [0u8; 4];
        set(&mut block, 1, 4, 0x1234);
        assert_eq!(block, [0, 0, 0x12, 0x34]);
    }
}
