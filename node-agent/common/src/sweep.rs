//! What the agent hands to the `sweep` program: [`SWEEP_HEADER`] bytes that begin with a `u32` kind, then up to
//! [`SWEEP_BATCH`] keys.

/// The keys are `FlowKey`s of `FORWARD`.
pub const SWEEP_FLOWS: u32 = 0;
/// The keys are `BlockKey`s.
pub const SWEEP_BLOCKS: u32 = 1;
/// Bytes before the first key.
pub const SWEEP_HEADER: usize = 16;
/// Keys of one run: the packet of a test run is limited to about 3,500 bytes.
pub const SWEEP_BATCH: usize = 64;
/// Seconds without a change after which an empty block is removed.
pub const BLOCK_IDLE: u32 = 60;
