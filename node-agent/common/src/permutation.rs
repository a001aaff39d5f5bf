//! The order in which the ports of a slice are handed out.

use crate::BlockKey;

/// Place (0..256) of a slice -> low byte of the port. A four-round Feistel network on two nibbles: a bijection for any
/// key, so that each place is exactly one port and the way back is the same network in reverse (RFC 6056 section
/// 3.3: an observer of one port does not learn the next).
#[inline(always)]
pub fn port_of_place(place: u8, key: u32) -> u8 {
    let (mut left, mut right) = (place >> 4, place & 15);
    let mut round = 0;
    while round < 4 {
        let next = left ^ scramble(right, key, round);
        left = right;
        right = next;
        round += 1;
    }
    left << 4 | right
}

/// The way back: low byte of the port -> place.
#[inline(always)]
pub fn place_of_port(port: u8, key: u32) -> u8 {
    let (mut left, mut right) = (port >> 4, port & 15);
    let mut round = 4;
    while round > 0 {
        round -= 1;
        let next = right ^ scramble(left, key, round);
        right = left;
        left = next;
    }
    left << 4 | right
}

#[inline(always)]
fn scramble(half: u8, key: u32, round: u32) -> u8 {
    let mixed = (u32::from(half) + 1).wrapping_mul(0x9e37_79b1) ^ key.rotate_left(round * 8);
    (mixed.wrapping_mul(0x85eb_ca6b) >> 28) as u8
}

/// Key of the permutation of one slice of a block.
#[inline(always)]
pub fn permutation_key(seed: u32, block: &BlockKey, slice: u32) -> u32 {
    let mut key = mix(seed ^ block.egress);
    key = mix(key ^ block.remote);
    mix(key ^ (u32::from(block.remote_port) << 16 | u32::from(block.protocol) << 8 | slice & 255))
}

/// A 32-bit finaliser (murmur3's): every input bit changes every output bit with about even odds.
#[inline(always)]
pub const fn mix(mut value: u32) -> u32 {
    value ^= value >> 16;
    value = value.wrapping_mul(0x85eb_ca6b);
    value ^= value >> 13;
    value = value.wrapping_mul(0xc2b2_ae35);
    value ^ value >> 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_gives_a_bijection_with_its_inverse() {
        for key in [0, 1, 0xdead_beef, u32::MAX, 0x1234_5678] {
            let mut seen = [false; 256];
            for place in 0..=255u8 {
                let port = port_of_place(place, key);
                assert_eq!(place_of_port(port, key), place);
                assert!(!core::mem::replace(&mut seen[usize::from(port)], true));
            }
        }
    }

    #[test]
    fn the_order_depends_on_the_seed_and_the_origin() {
        let block = BlockKey { egress: 1, remote: 2, remote_port: 443, protocol: 6, block: 1 };
        let other = BlockKey { remote: 3, ..block };
        let order = |seed, block: &BlockKey| {
            core::array::from_fn::<u8, 256, _>(|place| {
                port_of_place(place as u8, permutation_key(seed, block, 8))
            })
        };
        assert_ne!(order(1, &block), order(2, &block));
        assert_ne!(order(1, &block), order(1, &other));
    }
}
