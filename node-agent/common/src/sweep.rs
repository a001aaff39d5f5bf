//! What the agent hands to the `sweep` program: [`SWEEP_HEADER`] bytes that begin with a `u32` kind, then up to
//! [`SWEEP_BATCH`] keys.

use crate::{BlockKey, LoadKey, map_type};

/// The keys are `FlowKey`s of `FORWARD`.
pub const SWEEP_FLOWS: u32 = 0;
/// The keys are `BlockKey`s.
pub const SWEEP_BLOCKS: u32 = 1;
/// The keys are `FlowKey`s of `REVERSE`, which may have no flow any more.
pub const SWEEP_REVERSE: u32 = 2;
/// The keys are `FlowKey`s of `FORWARD`, whose slices may be another node's.
pub const SWEEP_REVOKED: u32 = 4;
/// The keys are `FlowKey`s of `FORWARD`, whose ports rest: to be counted.
pub const SWEEP_RESTING: u32 = 5;
/// The same, to be used again before they have rested.
pub const SWEEP_CUT_SHORT: u32 = 6;
/// The keys are [`PeakKey`]s.
pub const SWEEP_PEAKS: u32 = 3;
/// The keys are [`LoadFix`]es.
pub const SWEEP_LOADS: u32 = 7;
/// Bytes before the first key.
pub const SWEEP_HEADER: usize = 16;
/// Keys of one run: the packet of a test run is limited to about 3,500 bytes.
pub const SWEEP_BATCH: usize = 64;
/// Seconds without a change after which an empty block is removed.
pub const BLOCK_IDLE: u32 = 60;

/// A block whose high-water mark has been read, to be begun anew.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeakKey {
    /// The block.
    pub block: BlockKey,
    /// What was read. A mark that has risen since is left alone, so that no peak goes unseen.
    pub high: u32,
}
map_type!(PeakKey, 16);

/// What is wrong with the counts of an entry of `LOADS`, or of `ALL_LOADS` (the account 0). With nothing wrong, it is to be looked
/// at whether the entry is still needed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadFix {
    /// The entry.
    pub key: LoadKey,
    /// By how much it counts too many flows.
    pub flows: i32,
    /// By how much it counts too many bitmaps of ports.
    pub blocks: i32,
}
map_type!(LoadFix, 24);
