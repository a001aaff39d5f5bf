//! Single IPv6 addresses: egress addresses whose ports are cut into slices, as those of IPv4 are.
//!
//! Ports, flows, blocks, holdings and sweeps know addresses of 32 bits. A single address has a *stand-in* for them: 28 bits of a
//! hash in 240.0.0.0/4, of which nobody has an address (RFC 1112 section 4). So has the origin of each of its flows; for the pod
//! stands its suffix (see [`Pod6Value::suffix`](crate::Pod6Value::suffix)), which the node has given to nobody else. So keys of
//! flows over IPv6 are told from those over IPv4 by their origin, or by their egress address.
//!
//! Which egress address a stand-in is of, `SINGLES` says; the agent lets no two have one. Two origins may: their flows share
//! ports then, which is no fault, and neither can send to the other's flows: conntrack knows whole addresses.

use crate::{Address6, Flow6Key, FlowKey, map_type, mix};

/// Value of `SINGLES` and `ORIGINS6` (key: stand-in): whose it is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SingleValue {
    /// The address.
    pub address: Address6,
}
map_type!(SingleValue, 16);

/// The first four bits of a stand-in, as the maps hold addresses.
const CLASS_E: u32 = 0xf000_0000u32.to_be();

/// In place of an IPv6 address. Of egress addresses `seed` is 0, so that all nodes and agents find the same; of origins it is the
/// data plane's secret, so that nobody can choose addresses that have one stand-in.
#[inline(always)]
pub const fn stand_in(address: &Address6, seed: u32) -> u32 {
    let [a, b, c, d] = *address;
    mix(mix(mix(mix(a ^ seed) ^ b) ^ c) ^ d) & !CLASS_E | CLASS_E
}

/// Whether an address of 32 bits is a stand-in.
#[inline(always)]
pub const fn is_stand_in(address: u32) -> bool {
    address & CLASS_E == CLASS_E
}

/// Protocol numbers of ICMP and ICMPv6, whose echoes are the same thing in the tables.
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// The number in the tables of a protocol over IPv6.
#[inline(always)]
pub const fn single_protocol(protocol: u32) -> u8 {
    if protocol == ICMPV6 as u32 { ICMP } else { protocol as u8 }
}

/// The inverse of [`single_protocol`].
#[inline(always)]
pub const fn protocol_of_single(protocol: u8) -> u8 {
    if protocol == ICMP { ICMPV6 } else { protocol }
}

/// Key in `FORWARD` of a flow from a single address; the pod has this suffix, `seed` is the data plane's secret.
#[inline(always)]
pub const fn single_flow(flow: &Flow6Key, suffix: u32, seed: u32) -> FlowKey {
    FlowKey {
        local: suffix,
        remote: stand_in(&flow.remote, seed),
        local_port: (flow.ports >> 16) as u16,
        remote_port: flow.ports as u16,
        protocol: single_protocol(flow.protocol),
        pad: [0; 3],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stand_ins_are_of_no_range_that_anybody_uses() {
        let address = [0x2001_0db8u32.to_be(), 0, 0, 7u32.to_be()];
        let octets = stand_in(&address, 0).to_ne_bytes();
        assert!(octets[0] >= 240 && is_stand_in(stand_in(&address, 0)));
        for octets in [[203, 0, 113, 7], [239, 255, 255, 255], [10, 244, 1, 5], [0, 0, 0, 240]] {
            assert!(!is_stand_in(u32::from_ne_bytes(octets)), "{octets:?}");
        }
    }

    #[test]
    fn each_word_and_the_seed_matter() {
        let address = [1u32, 2, 3, 4];
        let first = stand_in(&address, 5);
        assert_ne!(first, stand_in(&address, 6));
        for at in 0..4 {
            let mut other = address;
            other[at] ^= 0x0100_0000;
            assert_ne!(first, stand_in(&other, 5), "word {at}");
        }
    }
}
