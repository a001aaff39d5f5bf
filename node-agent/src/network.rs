//! What the kernel knows of this node's IPv4 network: devices, addresses, routes, neighbours; and of IPv6 the agent's own routes.
//! Read as a whole, by rtnetlink, whenever a notification says that something changed.

use crate::announce::routes;
use crate::{local, rule};
use futures::TryStreamExt;
use ipnet::{IpNet, Ipv4Net};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{LinkAttribute, LinkFlags};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use rtnetlink::{Handle, IpVersion, MulticastGroup, RouteMessageBuilder};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Why the network could not be read.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No netlink socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[from] std::io::Error),
    /// A dump failed.
    #[error("cannot read {what}: {source}")]
    Dump {
        /// What was read.
        what: &'static str,
        /// Reason.
        source: rtnetlink::Error,
    },
}

/// A network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// MTU.
    pub mtu: u32,
    /// MAC; zero for devices without.
    pub mac: [u8; 6],
    /// It is up.
    pub up: bool,
    /// It is `lo`.
    pub loopback: bool,
}

/// A unicast route of the main table; one for each next hop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub destination: Ipv4Net,
    /// Gateway, unless the destination is on the link.
    pub gateway: Option<Ipv4Addr>,
    /// Interface index.
    pub device: u32,
    /// Lower wins.
    pub metric: u32,
}

/// The network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// Devices by index.
    pub devices: BTreeMap<u32, Device>,
    /// Addresses: interface index, address.
    pub addresses: Vec<(u32, Ipv4Addr)>,
    /// Routes.
    pub routes: Vec<Route>,
    /// Neighbours with a valid MAC, by interface index and address.
    pub neighbours: BTreeMap<(u32, Ipv4Addr), [u8; 6]>,
    /// Routes of the agent itself, of any table.
    pub announced: BTreeSet<routes::Key>,
    /// The agent's own IPv6 rules.
    pub rules: BTreeSet<rule::Key>,
    /// Addresses that the agent has made local.
    pub local: BTreeSet<Ipv4Addr>,
}

impl Network {
    /// The best route to an address: longest prefix, then lowest metric.
    pub fn route(&self, to: Ipv4Addr) -> Option<&Route> {
        let matching = self.routes.iter().filter(|route| route.destination.contains(&to));
        matching.min_by_key(|route| (32 - route.destination.prefix_len(), route.metric, route.device))
    }

    /// Index of the device with a name.
    pub fn device(&self, name: &str) -> Option<&Device> {
        self.devices.values().find(|device| device.name == name)
    }
}

/// Groups whose notifications mean that the network is to be read again.
pub const GROUPS: [MulticastGroup; 6] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv6Rule,
    MulticastGroup::Neigh,
];

/// Reads the network.
pub async fn read(handle: &Handle) -> Result<Network, NetworkError> {
    let mut network = Network::default();
    let failed = |what| move |source| NetworkError::Dump { what, source };

    let mut links = handle.link().get().execute();
    while let Some(link) = links.try_next().await.map_err(failed("devices"))? {
        let mut device = Device {
            index: link.header.index,
            up: link.header.flags.contains(LinkFlags::Up),
            loopback: link.header.flags.contains(LinkFlags::Loopback),
            ..Device::default()
        };
        for attribute in link.attributes {
            match attribute {
                LinkAttribute::IfName(name) => device.name = name,
                LinkAttribute::Mtu(mtu) => device.mtu = mtu,
                LinkAttribute::Address(mac) => device.mac = mac.try_into().unwrap_or_default(),
                _ => {}
            }
        }
        network.devices.insert(device.index, device);
    }

    let mut addresses = handle.address().get().execute();
    while let Some(address) = addresses.try_next().await.map_err(failed("addresses"))? {
        // On a point-to-point device `Address` is the other end; `Local` is always this one.
        let local = address.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(IpAddr::V4(local)) => Some(*local),
            _ => None,
        });
        network.addresses.extend(local.map(|local| (address.header.index, local)));
    }

    let mut routes = handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
    while let Some(route) = routes.try_next().await.map_err(failed("routes"))? {
        if let Some((table, to)) = destination(&route) {
            network.announced.extend(routes::key(table, &route.header, to));
            network.local.extend(local::key(table, &route.header, to));
        }
        if route.header.table != RouteHeader::RT_TABLE_MAIN || route.header.kind != RouteType::Unicast {
            continue;
        }
        add_routes(&mut network.routes, route.header.destination_prefix_length, &route.attributes);
    }

    let mut routes = handle.route().get(RouteMessageBuilder::<Ipv6Addr>::new().build()).execute();
    while let Some(route) = routes.try_next().await.map_err(failed("IPv6 routes"))? {
        network
            .announced
            .extend(destination(&route).and_then(|(table, to)| routes::key(table, &route.header, to)));
    }

    let mut rules = handle.rule().get(IpVersion::V6).execute();
    while let Some(rule) = rules.try_next().await.map_err(failed("IPv6 rules"))? {
        network.rules.extend(rule::key(&rule));
    }

    let neighbours = handle.neighbours().get().set_address_family(AddressFamily::Inet);
    let mut neighbours = neighbours.execute();
    while let Some(neighbour) = neighbours.try_next().await.map_err(failed("neighbours"))? {
        let valid = matches!(
            neighbour.header.state,
            NeighbourState::Reachable
                | NeighbourState::Stale
                | NeighbourState::Delay
                | NeighbourState::Probe
                | NeighbourState::Permanent
        );
        let address = neighbour.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(*address),
            _ => None,
        });
        let mac = neighbour.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(mac) => <[u8; 6]>::try_from(mac.as_slice()).ok(),
            _ => None,
        });
        if let (true, Some(address), Some(mac)) = (valid, address, mac) {
            network.neighbours.insert((neighbour.header.ifindex, address), mac);
        }
    }
    Ok(network)
}

/// Table and destination of a route.
fn destination(route: &RouteMessage) -> Option<(u32, IpNet)> {
    let (mut table, mut address) = (u32::from(route.header.table), None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(to)) => address = Some(IpAddr::V4(*to)),
            RouteAttribute::Destination(RouteAddress::Inet6(to)) => address = Some(IpAddr::V6(*to)),
            // The header has room for 255 only.
            RouteAttribute::Table(number) => table = *number,
            _ => {}
        }
    }
    Some((table, IpNet::new(address?, route.header.destination_prefix_length).ok()?))
}

fn add_routes(routes: &mut Vec<Route>, length: u8, attributes: &[RouteAttribute]) {
    let mut address = Ipv4Addr::UNSPECIFIED;
    let mut gateway = None;
    let mut device = None;
    let mut metric = 0;
    let mut hops = Vec::new();
    for attribute in attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(destination)) => address = *destination,
            RouteAttribute::Gateway(RouteAddress::Inet(via)) => gateway = Some(*via),
            RouteAttribute::Oif(index) => device = Some(*index),
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::MultiPath(next_hops) => {
                hops.extend(next_hops.iter().map(|hop| {
                    let via = hop.attributes.iter().find_map(|attribute| match attribute {
                        RouteAttribute::Gateway(RouteAddress::Inet(via)) => Some(*via),
                        _ => None,
                    });
                    (via, hop.interface_index)
                }));
            }
            _ => {}
        }
    }
    let Ok(destination) = Ipv4Net::new(address, length) else { return };
    hops.extend(device.map(|device| (gateway, device)));
    routes.extend(hops.into_iter().map(|(gateway, device)| Route { destination, gateway, device, metric }));
}
