//! What no rule is ever asked about.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::net::{Ipv4Addr, Ipv6Addr};

/// Destinations that never leave the cluster or the link, whatever a rule says.
pub fn never_covered() -> impl Iterator<Item = IpNet> {
    let v4 = [
        (Ipv4Addr::new(127, 0, 0, 0), 8),
        (Ipv4Addr::new(169, 254, 0, 0), 16),
        (Ipv4Addr::new(224, 0, 0, 0), 4),
        (Ipv4Addr::BROADCAST, 32),
    ];
    let v6 = [
        (Ipv6Addr::UNSPECIFIED, 128),
        (Ipv6Addr::LOCALHOST, 128),
        (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
        (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
    ];
    v4.into_iter()
        .map(|(address, length)| Ipv4Net::new_assert(address, length).into())
        .chain(v6.into_iter().map(|(address, length)| Ipv6Net::new_assert(address, length).into()))
}
