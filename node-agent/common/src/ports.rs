//! Exact port bitmaps, one per (egress address, origin, protocol) and 2,048 ports.

use crate::map_type;

/// Ports of a block: eight slices.
pub const PORTS_PER_BLOCK: u32 = 2048;
/// Words of a block's bitmap: four per slice.
pub const WORDS_PER_BLOCK: usize = 32;
/// Blocks of an address: block = port >> 11.
pub const BLOCKS_PER_ADDRESS: u32 = 32;

/// Key of `BLOCKS` (non-LRU hash).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BlockKey {
    /// Egress address.
    pub egress: u32,
    /// Origin's address.
    pub remote: u32,
    /// Origin's port; 0 for ICMP echo.
    pub remote_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Egress port >> 11.
    pub block: u8,
}
map_type!(BlockKey, 12);

/// Value of `BLOCKS`.
///
/// Word `w` holds slice `w >> 2` of the block; within a slice the 256 places are a keyed permutation of its ports,
/// so that the next port cannot be guessed from the last one (RFC 6056) while whole slices can still be masked.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockValue {
    /// The block's own key: an allocator that found this memory reused for another block undoes its claim.
    pub key: BlockKey,
    /// Next place to try (0..2048); starts at random, then one past the last place taken.
    pub cursor: u32,
    /// Ports in use. [`BLOCK_DEAD`] is set while the sweeper removes the block.
    pub used: u32,
    /// Highest value of `used` since the agent last read and reset it (see [`PeakKey`](crate::PeakKey)).
    pub high: u32,
    /// Bit `w` is set while word `w` has no free place.
    pub full: u32,
    /// Second at which a port was last taken or freed.
    pub last_used: u32,
    /// Set bit = port in use.
    pub words: [u64; WORDS_PER_BLOCK],
}
map_type!(BlockValue, 288);

/// Flag in [`BlockValue::used`]: the block is being removed; whoever sees it looks the block up again.
pub const BLOCK_DEAD: u32 = 1 << 31;

/// Whether so much of something is in use that more is wanted: 60 %.
#[inline(always)]
pub fn is_high(used: u32, all: u32) -> bool {
    used * HIGH_WATER.1 > all * HIGH_WATER.0
}

/// Share of the ports above which more slices are wanted.
pub const HIGH_WATER: (u32, u32) = (6, 10);

/// Value of `PRESSURE` (per-CPU array; index: as in `ALLOCATIONS`): new flows that found no port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PressureValue {
    /// Refused, since none is to be expected.
    pub refused: u64,
    /// Dropped, since more slices are about to come. Each packet counts.
    pub waited: u64,
}
map_type!(PressureValue, 16);

/// Seconds for which a sign of life of the agent counts (see `PULSE`).
pub const PULSE_LIFE: u32 = 5;

/// The words of a block that belong to slices (bit `s` = slice `s` of the block): bit `w` = word `w`.
#[inline(always)]
pub fn words_of(slices: u32) -> u32 {
    // Spread eight bits four apart, then fill each group.
    let mut spread = slices & 0xff;
    spread = (spread | spread << 12) & 0x000f_000f;
    spread = (spread | spread << 6) & 0x0303_0303;
    spread = (spread | spread << 3) & 0x1111_1111;
    spread * 15
}

/// The blocks of an address in which slices are set: bit `b` = block `b`.
#[inline(always)]
pub fn blocks_of(slices: &[u64; 4]) -> u32 {
    let mut blocks = 0;
    let mut at = 0;
    while at < 4 {
        // Eight bytes, one for each block: gather in each byte's lowest bit whether any is set, then those bits.
        let mut word = slices[at];
        word |= word >> 4;
        word |= word >> 2;
        word |= word >> 1;
        word &= 0x0101_0101_0101_0101;
        blocks |= ((word.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u32) << (at * 8);
        at += 1;
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_counts_if_it_has_any_slice() {
        assert_eq!(blocks_of(&[0; 4]), 0);
        assert_eq!(blocks_of(&[u64::MAX; 4]), u32::MAX);
        for slice in 0..256u32 {
            let mut slices = [0; 4];
            slices[(slice >> 6) as usize] = 1 << (slice & 63);
            assert_eq!(blocks_of(&slices), 1 << (slice / 8), "slice {slice}");
        }
        assert_eq!(blocks_of(&[0x81 << 8, 0, 1 << 63, 3]), 1 << 1 | 1 << 23 | 1 << 24);
    }

    #[test]
    fn each_slice_has_its_four_words() {
        for slices in 0..=255u32 {
            let expected =
                (0..8).filter(|slice| slices >> slice & 1 != 0).map(|slice| 0xf << (slice * 4)).sum();
            assert_eq!(words_of(slices), expected, "slices {slices:#010b}");
        }
        assert_eq!(words_of(0x100), 0);
    }
}
