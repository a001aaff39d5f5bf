//! For which egress /64s this node answers neighbour solicitations.

use crate::{Address6, Network, map_type};

/// Key of `NDP_ANSWERS`: there is an entry as long as this node answers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct NdpKey {
    /// Egress /64 of which an address is asked for; of a single address 0 and its stand-in.
    pub network: Network,
    /// Interface index of the uplink on which the question arrives.
    pub ifindex: u32,
}
map_type!(NdpKey, 12);

/// Value of `NDP_ANSWERS` (hash).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NdpValue {
    /// The answer: MAC of the uplink.
    pub mac: [u8; 6],
    /// 1: the agent has made the uplink take all multicast frames, without which questions would not be heard. 0: it does so
    /// anyway.
    pub multicast: u16,
}
map_type!(NdpValue, 8);

/// Lower half of the address in a /64 by which nodes ask each other who answers for it. It lies in no slice.
const SEAT: u32 = 0x000a_e915;

/// The address in a /64 by which nodes ask each other who answers for it. No pod has it, nor a router (which may have the first
/// address of a /64, RFC 4291 section 2.6.1).
#[inline(always)]
pub const fn seat(network: Network) -> Address6 {
    [network[0], network[1], 0, SEAT.to_be()]
}
