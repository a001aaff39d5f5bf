//! The routes that say "here": `blackhole X/32` in a table of its own, for the routing daemon, and in the main table, so that
//! what XDP does not take is dropped instead of going back to the router that sent it. XDP takes packets before the kernel
//! looks at routes.

use netlink_packet_route::route::{RouteHeader, RouteMessage, RouteProtocol, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// Number by which routes of the agent are known (`ip route show table all proto 174`); no daemon uses it.
pub const PROTOCOL: u8 = 174;
/// The main table.
pub const MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;
/// Metric in the main table: any other route to the address wins, also for zebra, which takes the highest byte for a
/// distance, and 255 for "never".
const METRIC: u32 = 0xffff_0000;

/// A route of the agent: table and address.
pub type Key = (u32, Ipv4Addr);

/// The key of a route, if it is one of the agent's.
pub fn key(table: u32, header: &RouteHeader, address: Ipv4Addr) -> Option<Key> {
    let ours = header.protocol == RouteProtocol::Other(PROTOCOL)
        && header.kind == RouteType::BlackHole
        && header.destination_prefix_length == 32;
    ours.then_some((table, address))
}

/// The routes for addresses. Table 0: none.
pub fn wanted(table: u32, addresses: &BTreeSet<Ipv4Addr>) -> BTreeSet<Key> {
    let all = addresses.iter().filter(|_| table != 0);
    all.flat_map(|address| [(MAIN, *address), (table, *address)]).collect()
}

fn message((table, address): Key) -> RouteMessage {
    let builder = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(address, 32)
        .table_id(table)
        .protocol(RouteProtocol::Other(PROTOCOL))
        .kind(RouteType::BlackHole);
    if table == MAIN { builder.priority(METRIC).build() } else { builder.build() }
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
