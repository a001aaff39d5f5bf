//! For which egress addresses this node answers ARP.

use crate::map_type;

/// Devices on which one node answers ARP, at most, times the addresses it knows.
pub const MAX_ARP_ANSWERS: u32 = crate::MAX_ADDRESSES * 4;

/// Key of `ARP_ANSWERS`: there is an entry as long as this node answers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ArpKey {
    /// Egress address that is asked for.
    pub address: u32,
    /// Interface index of the uplink on which the question arrives.
    pub ifindex: u32,
}
map_type!(ArpKey, 8);

/// Value of `ARP_ANSWERS` (hash).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArpValue {
    /// The answer: MAC of the uplink.
    pub mac: [u8; 6],
    /// Zero.
    pub pad: u16,
}
map_type!(ArpValue, 8);
