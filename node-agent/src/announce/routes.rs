//! The routes that say "here": blackholes in a table of its own, for the routing daemon, and in the main table, so that
//! what XDP does not take is dropped instead of going back to the router that sent it. XDP takes packets before the kernel
//! looks at routes.
//!
//! Of a /64 each holder announces all of it, so that any node is an entry, and the /80 of its slice, so that packets enter at
//! the node that they are for where the network keeps so many routes.

use aegis_core::egress::Egress;
use ipnet::{IpNet, Ipv6Net};
use netlink_packet_route::route::{RouteHeader, RouteMessage, RouteProtocol, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

/// Number by which routes of the agent are known (`ip route show table all proto 174`); no daemon uses it.
pub const PROTOCOL: u8 = 174;
/// The main table.
pub const MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;
/// Metric in the main table: any other route to the address wins, also for zebra, which takes the highest byte for a
/// distance, and 255 for "never".
const METRIC: u32 = 0xffff_0000;
/// The same for IPv6, of which FRR before 10 reads no other table than the main one: zebra takes the route if there is no other
/// (a distance of 254), and bgpd knows it by the rest, 16711680.
const METRIC6: u32 = 0xfeff_0000;
/// Length of the prefix of a slice of a /64.
const SLICE_LENGTH: u8 = 80;

/// A route of the agent: table and destination.
pub type Key = (u32, IpNet);

/// The destinations of the routes to an egress address, of which this node holds these slices.
pub fn of(egress: Egress, slices: impl Iterator<Item = u8>) -> BTreeSet<IpNet> {
    let slice = |slice: u8| match egress {
        Egress::V4(_) | Egress::Single(_) => None,
        Egress::V6(network) => {
            let first = Ipv6Addr::from_bits(u128::from(network) << 64 | u128::from(slice) << 48);
            Some(Ipv6Net::new_assert(first, SLICE_LENGTH).into())
        }
    };
    std::iter::once(egress.range()).chain(slices.filter_map(slice)).collect()
}

/// The egress address that a route of the agent's is to.
pub fn egress(destination: IpNet) -> Egress {
    match destination {
        IpNet::V6(range) if range.prefix_len() == 128 => Egress::Single(range.addr()),
        _ => Egress::containing(destination.addr()),
    }
}

/// The key of a route, if it is one of the agent's.
pub fn key(table: u32, header: &RouteHeader, destination: IpNet) -> Option<Key> {
    let ours = header.protocol == RouteProtocol::Other(PROTOCOL) && header.kind == RouteType::BlackHole;
    let whole = match destination {
        IpNet::V4(range) => range.prefix_len() == 32,
        IpNet::V6(range) => matches!(range.prefix_len(), 64 | SLICE_LENGTH | 128),
    };
    (ours && whole).then_some((table, destination))
}

/// The routes to these destinations. Table 0: none.
pub fn wanted<'a>(table: u32, destinations: impl IntoIterator<Item = &'a IpNet>) -> BTreeSet<Key> {
    let all = destinations.into_iter().filter(|_| table != 0);
    all.flat_map(|destination| [(MAIN, *destination), (table, *destination)]).collect()
}

fn message((table, destination): Key) -> RouteMessage {
    match destination {
        IpNet::V4(range) => {
            let builder = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(range.addr(), range.prefix_len())
                .table_id(table)
                .protocol(RouteProtocol::Other(PROTOCOL))
                .kind(RouteType::BlackHole);
            if table == MAIN { builder.priority(METRIC).build() } else { builder.build() }
        }
        IpNet::V6(range) => {
            let builder = RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(range.addr(), range.prefix_len())
                .table_id(table)
                .protocol(RouteProtocol::Other(PROTOCOL))
                .kind(RouteType::BlackHole);
            if table == MAIN { builder.priority(METRIC6).build() } else { builder.build() }
        }
    }
}

/// Brings the kernel from what is present to what is wanted. Routes of others are not touched: where one is in the way, the
/// result says so. What the network is told comes last when it begins and first when it ends.
pub async fn bring(
    handle: &Handle,
    wanted: &BTreeSet<Key>,
    present: &BTreeSet<Key>,
) -> BTreeMap<Key, String> {
    let mut errors = BTreeMap::new();
    let outer_first = |key: &&Key| key.0 == MAIN;
    let mut gone: Vec<&Key> = present.difference(wanted).collect();
    gone.sort_by_key(outer_first);
    for key in gone {
        // One that somebody else has just removed is what was wanted.
        match handle.route().del(message(*key)).execute().await {
            Err(error) if !is(&error, libc::ESRCH) => _ = errors.insert(*key, error.to_string()),
            _ => {}
        }
    }
    let mut new: Vec<&Key> = wanted.difference(present).collect();
    new.sort_by_key(|key| key.0 != MAIN);
    for key in new {
        if let Err(error) = handle.route().add(message(*key)).execute().await {
            errors.insert(*key, error.to_string());
        }
    }
    errors
}

fn is(error: &rtnetlink::Error, code: i32) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == -code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_64_the_whole_and_the_own_slices_have_routes() {
        let routes = |egress: &str, slices: &[u8]| -> Vec<String> {
            let all = of(egress.parse().unwrap(), slices.iter().copied());
            all.iter().map(ToString::to_string).collect()
        };
        assert_eq!(routes("203.0.113.7", &[4, 5]), ["203.0.113.7/32"]);
        let expected = ["2001:db8:1:2::/64", "2001:db8:1:2:4::/80", "2001:db8:1:2:ff::/80"];
        assert_eq!(routes("2001:db8:1:2::/64", &[4, 255]), expected);
    }
}
