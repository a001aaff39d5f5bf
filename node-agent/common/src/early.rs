//! Later fragments that reach their meeting point before the first of their datagram: on their way to the agent.

use crate::{FragmentKey, map_type};

/// Bytes of the largest frame that is kept: what the kernel takes back in one page (`BPF_F_TEST_XDP_LIVE_FRAMES`).
pub const EARLY_FRAME: usize = 3072;

/// Fragments that one CPU keeps in a second at most: whoever sends more without ever a first one does not keep the agent busy.
pub const EARLY_PER_SECOND: u32 = 8192;

/// What comes before the frame in a record of `EARLY`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EarlyHeader {
    /// Its datagram.
    pub key: FragmentKey,
    /// Index of the egress address.
    pub address: u32,
    /// Device on which it came.
    pub ifindex: u32,
    /// Second at which it came.
    pub seen: u32,
    /// Bytes of the frame, which follows.
    pub length: u32,
}
map_type!(EarlyHeader, 28);

/// Where a CPU puts a record of `EARLY` together: it is too large for the stack.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct EarlyScratch {
    /// Fragments that this CPU has kept in `second`.
    pub kept: u32,
    /// See `kept`.
    pub second: u32,
    /// The record: what it is ...
    pub header: EarlyHeader,
    /// ... and Ethernet header and IP packet, as much of it as there is.
    pub frame: [u8; EARLY_FRAME],
}
