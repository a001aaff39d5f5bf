//! Egress addresses that are local, so that sockets can have them: by a route alone (`local X dev lo`), without an address on any
//! device. What comes in for them is looked at by XDP first.

use crate::announce::routes::PROTOCOL;
use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::route::{RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

/// `RT_TABLE_LOCAL`: the kernel asks it first.
const TABLE: u32 = 255;

/// The address of a route, if the agent has made it local.
pub fn key(table: u32, header: &RouteHeader, destination: IpNet) -> Option<Ipv4Addr> {
    let ours = table == TABLE
        && header.protocol == RouteProtocol::Other(PROTOCOL)
        && header.kind == RouteType::Local;
    match destination {
        IpNet::V4(range) if ours && range.prefix_len() == 32 => Some(range.addr()),
        _ => None,
    }
}

fn message(address: Ipv4Addr, loopback: u32) -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(address, 32)
        .table_id(TABLE)
        .protocol(RouteProtocol::Other(PROTOCOL))
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .output_interface(loopback)
        .build()
}

/// Makes these addresses local, and others that the agent had made so no more.
pub async fn bring(
    handle: &Handle,
    wanted: &BTreeSet<Ipv4Addr>,
    present: &BTreeSet<Ipv4Addr>,
) -> Result<(), rtnetlink::Error> {
    if wanted == present {
        return Ok(());
    }
    let mut links = handle.link().get().match_name("lo".to_owned()).execute();
    let loopback = links.try_next().await?.map_or(1, |link| link.header.index);
    for address in wanted.difference(present) {
        done(handle.route().add(message(*address, loopback)).execute().await, libc::EEXIST)?;
    }
    for address in present.difference(wanted) {
        done(handle.route().del(message(*address, loopback)).execute().await, libc::ESRCH)?;
    }
    Ok(())
}

/// What is as it should be already is no failure.
fn done(result: Result<(), rtnetlink::Error>, already: i32) -> Result<(), rtnetlink::Error> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -already => Ok(()),
        other => other,
    }
}
