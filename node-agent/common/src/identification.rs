//! Which identifications a node may give to IPv4 packets that can be fragmented.
//!
//! All that leaves from an egress address has one source, whichever node and pod it comes from, and fragments of two datagrams
//! with the same identification would be taken for parts of one (RFC 6864 section 4.3, RFC 4963). So the identifications of an
//! address are cut into slices like its ports, and a node uses those of the slices that it holds.

/// Counters of identifications: pairs of egress address and origin share them, which harms none of them.
pub const COUNTERS_OF_IDENTIFICATIONS: u32 = 4096;

/// The `nth` of the slices (bit `s & 63` of word `s >> 6`), counted from 0 and from the beginning again after the last one;
/// `None` if there are none.
#[inline(always)]
pub fn nth_slice(slices: &[u64; 4], nth: u32) -> Option<u32> {
    let mut count = 0;
    let mut at = 0;
    while at < 4 {
        count += slices[at].count_ones();
        at += 1;
    }
    if count == 0 {
        return None;
    }
    let mut left = nth % count;
    let mut at = 0;
    while at < 4 {
        let here = slices[at].count_ones();
        if left < here {
            return Some((at as u32) << 6 | nth_bit(slices[at], left));
        }
        left -= here;
        at += 1;
    }
    None
}

/// Place of the `nth` bit that is set, of a word with more than `nth` of them.
#[inline(always)]
fn nth_bit(word: u64, nth: u32) -> u32 {
    let (mut word, mut left, mut place) = (word, nth, 0);
    let mut half = 32;
    while half != 0 {
        let lower = (word & ((1 << half) - 1)).count_ones();
        if left >= lower {
            left -= lower;
            word >>= half;
            place += half;
        }
        half >>= 1;
    }
    place
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slice_has_its_turn() {
        let all: [u32; 252] = core::array::from_fn(|slice| slice as u32 + 4);
        let some: [u32; 15] = core::array::from_fn(|slice| 100 + 7 * slice as u32);
        let edges = [63, 64, 127, 128, 191, 192, 255];
        for slices in [&[8][..], &[4, 5, 6, 7], &edges, &all, &some] {
            let mut words = [0; 4];
            for slice in slices {
                words[(slice >> 6) as usize] |= 1 << (slice & 63);
            }
            let count = slices.len() as u32;
            for nth in 0..3 * count {
                assert_eq!(nth_slice(&words, nth), Some(slices[(nth % count) as usize]), "{slices:?} {nth}");
            }
        }
        assert_eq!(nth_slice(&[0; 4], 7), None);
    }
}
