//! IPv6: /64s whose slices are nodes, and the addresses of pods in them.
//!
//! Addresses are `[u32; 4]` in network byte order, read natively; the upper half of one ([`Network`]) names a /64. All of these
//! tables are beside those of IPv4. A /64 has an index in the same numbering as IPv4 addresses, so that `SLOTS` says who holds
//! which slice; classes and verdicts of the policy are the same too.

use crate::{FIN, FRAGMENT_LIFE, RST, SYN, Timeouts, map_type};

/// An IPv6 address.
pub type Address6 = [u32; 4];
/// The first 64 bits of one.
pub type Network = [u32; 2];

/// The /64 that contains an address.
#[inline(always)]
pub const fn network_of(address: &Address6) -> Network {
    [address[0], address[1]]
}

/// Value of `CONFIG6` (array of one).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config6 {
    /// 1: IPv6 packets are looked at. 0: they pass untouched, as nothing stands that would carry a policy out.
    pub active: u32,
    /// Entries of `pod_ranges` that are set.
    pub pod_range_count: u32,
    /// Ranges from which this node's pods get their IPv6 addresses.
    pub pod_ranges: [PodRange6; MAX_POD_RANGES6],
    /// 1: there may be single egress addresses, or flows of some.
    pub singles: u32,
    /// Zero.
    pub pad: u32,
}
map_type!(Config6, 272);

/// Ranges in [`Config6::pod_ranges`].
pub const MAX_POD_RANGES6: usize = 8;

/// A range of pod addresses: an address belongs to it when `address & mask == network`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodRange6 {
    /// First address of the range.
    pub network: Address6,
    /// Net mask, in the same byte order.
    pub mask: Address6,
}
map_type!(PodRange6, 32);

/// Value of `NETWORKS` (hash; key: [`Network`]): an egress /64.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetworkValue {
    /// Epoch of the `EgressAddress` this was made from.
    pub epoch: u64,
    /// Which allocation it is dedicated to, see [`AllocationValue::identity`](crate::AllocationValue); 0 = none.
    pub identity: u64,
    /// Index of the /64: who holds a slice is in `SLOTS[index << 8 | slice]`.
    pub index: u32,
    /// This node's slice for new flows, 0 if it has none.
    pub slice: u16,
    /// 1: this node may open new flows from its slice.
    pub open: u16,
    /// Seconds after the renewal of the node's Lease from which on no flow is opened; 0 = never.
    pub soft: u32,
    /// The same for any packet.
    pub hard: u32,
}
map_type!(NetworkValue, 32);

/// Key of `PODS6` (hash).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Pod6Key {
    /// Generation of the policy.
    pub generation: u32,
    /// Pod's address.
    pub address: Address6,
}
map_type!(Pod6Key, 20);

/// Value of `PODS6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pod6Value {
    /// As in [`PodValue`](crate::PodValue).
    pub class: u32,
    /// As in [`PodValue`](crate::PodValue).
    pub incarnation: u32,
    /// Last 32 bits of its address in every egress /64, in network byte order.
    pub suffix: u32,
    /// As in [`PodValue`](crate::PodValue).
    pub mac: [u8; 6],
    /// Zero.
    pub pad: u16,
}
map_type!(Pod6Value, 20);

/// Value of `SUFFIXES` (hash; key: suffix): the pod that has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SuffixValue {
    /// Its address.
    pub address: Address6,
}
map_type!(SuffixValue, 16);

/// Data of the LPM key of `DESTINATIONS6`: the prefix length counts the 32 bits of the generation too.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Destination6Key {
    /// Generation of the policy (any fixed byte order: it is matched in full).
    pub generation: u32,
    /// Destination address.
    pub address: Address6,
}
map_type!(Destination6Key, 20);

/// Value of `ALLOCATIONS6` (array; index as in `ALLOCATIONS`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allocation6Value {
    /// Egress /64s from which this node may open flows; a pod starts at `suffix % count`.
    pub networks: [Network; NETWORKS_PER_ALLOCATION],
    /// As in [`AllocationValue`](crate::AllocationValue). A /64 whose own says otherwise is not used.
    pub identity: u64,
    /// How many of them are set.
    pub count: u32,
    /// Zero.
    pub pad: u32,
}
map_type!(Allocation6Value, 144);

/// /64s one allocation can use on one node.
pub const NETWORKS_PER_ALLOCATION: usize = 16;

/// Key of `FLOWS6` (LRU hash): a flow of a pod, or a datagram of which the first fragment has left ([`FRAGMENTED`]).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flow6Key {
    /// Pod.
    pub local: Address6,
    /// Where it talks to.
    pub remote: Address6,
    /// Pod's port in the upper half, the other one in the lower; an ICMPv6 identifier counts as the pod's port; of a datagram
    /// its identification; 0 of protocols without ports.
    pub ports: u32,
    /// IP protocol number, or [`FRAGMENTED`].
    pub protocol: u32,
}
map_type!(Flow6Key, 40);

/// [`Flow6Key::protocol`] of a datagram in fragments: the fragment header's own number.
pub const FRAGMENTED: u32 = 44;

/// Value of `FLOWS6`: what the first packet chose. Later ones keep it, whatever the policy has become, for as long as the /64 is
/// the same allocation's and the slice this node's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow6Value {
    /// Incarnation of the pod (see [`incarnation`](crate::incarnation)): a later pod with its address has flows of its own.
    ///
    /// It is the first field, and read last: an entry that becomes another flow's while a program reads it is noticed by it.
    pub incarnation: u32,
    /// Second of the last packet from the pod.
    pub last_seen: u32,
    /// The /64. Of a datagram that leaves from a single address: 0, and its stand-in.
    pub network: Network,
    /// The allocation that it was dedicated to.
    pub identity: u64,
    /// The slice.
    pub slice: u16,
    /// What the pod's segments say of a TCP connection: `FLOW6_*`.
    pub state: u16,
    /// Number of the flow's meter.
    pub meter: u32,
}
map_type!(Flow6Value, 32);

/// Value of `FRAGMENTED6_IN` (LRU hash; key: a [`Flow6Key`] of a datagram that came in): the flow of its first fragment.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Datagram6Value {
    /// As in [`Flow6Key::ports`].
    pub ports: u32,
    /// As in [`Flow6Key::protocol`].
    pub protocol: u32,
    /// Second at which the first fragment came.
    pub seen: u32,
}
map_type!(Datagram6Value, 12);

/// No more than its SYN has been sent. (Or it is no TCP.)
pub const FLOW6_OPENING: u16 = 0;
/// More has been sent.
pub const FLOW6_OPEN: u16 = 1;
/// The pod has sent a FIN or RST.
pub const FLOW6_CLOSING: u16 = 2;

/// What becomes of [`Flow6Value::state`] with a segment that has these flags.
#[inline(always)]
pub const fn flow6_state(state: u16, flags: u8) -> u16 {
    if flags & (FIN | RST) != 0 {
        FLOW6_CLOSING
    } else if flags & SYN != 0 {
        FLOW6_OPENING
    } else if state == FLOW6_CLOSING {
        state
    } else {
        FLOW6_OPEN
    }
}

/// Seconds after its last packet for which a flow counts as live. Protocols without a time-out of their own have that of UDP.
pub const fn flow6_timeout(protocol: u32, state: u16, timeouts: &Timeouts) -> u32 {
    match (protocol, state) {
        (6, FLOW6_OPEN) => timeouts.tcp_established,
        (6, _) => timeouts.tcp_transitory,
        (58, _) => timeouts.icmp,
        // The first fragment was a packet of a flow, too.
        (FRAGMENTED, _) => FRAGMENT_LIFE,
        _ => timeouts.udp,
    }
}

/// Largest IPv6 packet that can be sent through the tunnel is the same as of IPv4, but no link may be narrower than this
/// (RFC 8200 section 5).
pub const MIN_MTU6: u32 = 1280;

/// Sum of the 16-bit words of these words, folded to one (RFC 1071). It does not matter in which byte order all of them are.
#[inline(always)]
const fn sum(words: &[u32]) -> u32 {
    let (mut sum, mut at) = (0u64, 0);
    while at < words.len() {
        sum += words[at] as u64;
        at += 1;
    }
    // A word is its upper half times 0x10000, which is 1 in ones' complement.
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u32
}

/// A word of two halves, as it is in a packet.
#[inline(always)]
const fn word(first: u16, second: u16) -> u32 {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// Address of a pod in an egress /64. Bits 64 to 79 are the node's slice, 96 to 127 the pod's suffix; bits 80 to 95 make the
/// checksum of whatever the packet carries come out the same (RFC 6296 section 3.1).
#[inline(always)]
pub const fn egress_address(pod: &Address6, network: Network, slice: u16, suffix: u32) -> Address6 {
    let slice = slice.to_be();
    let new = sum(&[network[0], network[1], slice as u32, suffix]);
    let difference = sum(pod) + (!new & 0xffff);
    let folded = (difference & 0xffff) + (difference >> 16);
    // Both are zero in ones' complement; one of them is enough.
    let neutral = if folded == 0xffff { 0 } else { folded as u16 };
    [network[0], network[1], word(slice, neutral), suffix]
}

/// Slice of an address in an egress /64.
#[inline(always)]
pub const fn slice_of(address: &Address6) -> u16 {
    let [high, low, ..] = address[2].to_ne_bytes();
    u16::from_be_bytes([high, low])
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::Ipv6Addr;

    fn raw(text: &str) -> Address6 {
        let octets = text.parse::<Ipv6Addr>().unwrap().octets();
        core::array::from_fn(|at| {
            u32::from_ne_bytes([octets[4 * at], octets[4 * at + 1], octets[4 * at + 2], octets[4 * at + 3]])
        })
    }

    fn text(address: Address6) -> Ipv6Addr {
        let mut octets = [0; 16];
        for (at, word) in address.iter().enumerate() {
            octets[4 * at..4 * at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        Ipv6Addr::from(octets)
    }

    /// Sum of an address in ones' complement, the long way.
    fn plain(address: Address6) -> u32 {
        let sum: u32 = text(address).segments().iter().map(|word| u32::from(*word)).sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        (folded & 0xffff) + (folded >> 16)
    }

    #[test]
    fn the_example_of_rfc_6296_comes_out() {
        // Section 3.1: FD01:0203:0405::/48 to 2001:0DB8:0001::/48, of which the sums differ by D54F. (There it is added to a word.)
        let pod = raw("fd01:203:405:1::1234");
        let egress = egress_address(&pod, network_of(&raw("2001:db8:1:1::")), 0, pod[3]);
        assert_eq!(text(egress), "2001:db8:1:1:0:d54f:0:1234".parse::<Ipv6Addr>().unwrap());
    }

    #[test]
    fn the_sum_stays_and_the_parts_are_where_they_belong() {
        let pods = [
            "fd00::1",
            "fd00:10:244:1::5",
            "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            "::1",
            "2001:db8::a:b",
        ];
        let networks = ["2001:db8:1:2::", "2001:db8::", "fdff:ffff:ffff:ffff::", "2001::"];
        for pod in pods.map(raw) {
            for network in networks.map(|it| network_of(&raw(it))) {
                for slice in [4u16, 17, 255] {
                    for suffix in [0, pod[3], u32::MAX, 0x0100_0000] {
                        let egress = egress_address(&pod, network, slice, suffix);
                        // 0 and 0xffff are the same sum.
                        assert_eq!(plain(egress) % 0xffff, plain(pod) % 0xffff, "{}", text(egress));
                        assert_eq!((network_of(&egress), slice_of(&egress)), (network, slice));
                        assert_eq!(egress[3], suffix);
                        assert_ne!(text(egress).segments()[5], 0xffff);
                    }
                }
            }
        }
    }
}
