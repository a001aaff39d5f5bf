//! Single IPv6 addresses in the agent. Wherever an egress address is a key that has ports, such a one has its stand-in there, as in
//! the maps (see `aegis_common::stand_in`): planning writes, sweeps, demand and fences need not tell it from an IPv4 address.

use crate::observed::{from_map, from_map6, to_map, to_map6};
use aegis_common::is_stand_in;
use aegis_core::egress::Egress;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Which address each stand-in is of.
pub type Singles = BTreeMap<Ipv4Addr, Ipv6Addr>;

/// The stand-in of a single IPv6 address: the same on every node.
pub fn stand_in(address: Ipv6Addr) -> Ipv4Addr {
    from_map(aegis_common::stand_in(&to_map6(address), 0))
}

/// The key of an egress address that has ports: itself, or its stand-in. A /64 has none.
pub fn key(egress: Egress) -> Option<Ipv4Addr> {
    match egress {
        Egress::V4(address) => Some(address),
        Egress::Single(address) => Some(stand_in(address)),
        Egress::V6(_) => None,
    }
}

/// Whether a key is a stand-in.
pub fn is(key: Ipv4Addr) -> bool {
    is_stand_in(to_map(key))
}

/// The egress address that has a key.
pub fn egress(key: Ipv4Addr, singles: &Singles) -> Egress {
    singles.get(&key).map_or(Egress::V4(key), |address| Egress::Single(*address))
}

/// What a map says of stand-ins.
pub fn entry(stand_in: u32, address: aegis_common::Address6) -> (Ipv4Addr, Ipv6Addr) {
    (from_map(stand_in), from_map6(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_address_is_found_again_by_its_stand_in() {
        let address: Ipv6Addr = "2001:db8::7".parse().unwrap();
        let single = Egress::Single(address);
        let own = key(single).unwrap();
        assert!(is(own) && own.octets()[0] >= 240);
        assert_eq!(egress(own, &[(own, address)].into()), single);
        let v4 = Egress::V4(Ipv4Addr::new(203, 0, 113, 1));
        assert_eq!(key(v4).map(|key| egress(key, &Singles::new())), Some(v4));
        assert_eq!(key(Egress::V6(1)), None);
    }
}
