//! Which devices lead out of the node and which lead to its pods. Pure.

use crate::network::{Device, Network};
use ipnet::Ipv4Net;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// The devices that programs belong on, by interface index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// Traffic leaves the node here.
    pub uplinks: BTreeMap<u32, Device>,
    /// Pods' packets enter here.
    pub pods: BTreeMap<u32, Device>,
}

/// Chooses. Uplinks are the devices named, or else those of the default routes and of the node's own address.
/// Pod-facing devices are those that the routes into the pod ranges, and to the addresses of pods outside of them,
/// name: a bridge, or one veth for each pod, whatever the CNI.
pub fn devices(
    network: &Network,
    named: &[String],
    node_address: Option<Ipv4Addr>,
    pod_ranges: &[Ipv4Net],
    pod_addresses: &[Ipv4Addr],
) -> Devices {
    let known = |index: &u32| network.devices.get(index).filter(|device| !device.loopback);
    let collect = |devices: Vec<&Device>| -> BTreeMap<u32, Device> {
        devices.into_iter().map(|device| (device.index, device.clone())).collect()
    };

    let uplinks = if named.is_empty() {
        let default = network.routes.iter().filter(|route| route.destination.prefix_len() == 0);
        let own = network.addresses.iter().filter(|(_, address)| Some(*address) == node_address);
        collect(
            default.map(|route| &route.device).chain(own.map(|(index, _)| index)).filter_map(known).collect(),
        )
    } else {
        collect(named.iter().filter_map(|name| network.device(name)).collect())
    };

    let in_ranges = network.routes.iter().filter(|route| {
        route.gateway.is_none() && pod_ranges.iter().any(|range| range.contains(&route.destination))
    });
    let to_pods = pod_addresses.iter().filter_map(|address| network.route(*address));
    // A pod that is reached through a route as wide as the default one is not reached yet.
    let to_pods = to_pods.filter(|route| route.gateway.is_none() && route.destination.prefix_len() > 0);
    let pods = in_ranges.chain(to_pods).filter_map(|route| known(&route.device));
    let mut pods = collect(pods.collect());
    pods.retain(|index, _| !uplinks.contains_key(index));
    Devices { uplinks, pods }
}

/// Devices that are named as uplinks and are not there.
pub fn absent<'a>(network: &Network, named: &'a [String]) -> Vec<&'a str> {
    named.iter().filter(|name| network.device(name).is_none()).map(String::as_str).collect()
}

impl Devices {
    /// Smallest MTU of the uplinks.
    pub fn uplink_mtu(&self) -> Option<u32> {
        self.uplinks.values().map(|device| device.mtu).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::Route;

    fn device(index: u32, name: &str, mtu: u32) -> (u32, Device) {
        (
            index,
            Device {
                index,
                name: name.into(),
                mtu,
                mac: [2, 0, 0, 0, 0, index as u8],
                up: true,
                loopback: name == "lo",
            },
        )
    }

    fn route(destination: &str, gateway: Option<&str>, device: u32) -> Route {
        let gateway = gateway.map(|gateway| gateway.parse().unwrap());
        Route { destination: destination.parse().unwrap(), gateway, device, metric: 0 }
    }

    fn node() -> Network {
        Network {
            devices: [
                device(1, "lo", 65536),
                device(2, "eth0", 1500),
                device(3, "eth1", 9000),
                device(4, "cni0", 1450),
            ]
            .into(),
            addresses: vec![(2, Ipv4Addr::new(192, 0, 2, 1)), (3, Ipv4Addr::new(198, 51, 100, 1))],
            routes: vec![
                route("0.0.0.0/0", Some("192.0.2.254"), 2),
                route("10.244.1.0/24", None, 4),
                route("10.244.2.0/24", Some("192.0.2.2"), 2),
            ],
            ..Network::default()
        }
    }

    fn names(devices: &BTreeMap<u32, Device>) -> Vec<&str> {
        devices.values().map(|device| device.name.as_str()).collect()
    }

    fn range() -> Vec<Ipv4Net> {
        vec!["10.244.1.0/24".parse().unwrap()]
    }

    #[test]
    fn the_default_route_and_the_own_address_name_the_uplinks() {
        let found = devices(&node(), &[], Some(Ipv4Addr::new(198, 51, 100, 1)), &range(), &[]);
        assert_eq!(names(&found.uplinks), ["eth0", "eth1"]);
        assert_eq!(found.uplink_mtu(), Some(1500));
    }

    #[test]
    fn named_uplinks_replace_the_guess() {
        let found = devices(&node(), &["eth1".into(), "gone0".into()], None, &range(), &[]);
        assert_eq!(names(&found.uplinks), ["eth1"]);
        assert_eq!(absent(&node(), &["eth1".into(), "gone0".into()]), ["gone0"]);
    }

    #[test]
    fn the_route_to_the_range_names_the_bridge() {
        assert_eq!(names(&devices(&node(), &[], None, &range(), &[]).pods), ["cni0"]);
    }

    #[test]
    fn routes_to_single_pods_name_their_veths() {
        let mut network = node();
        network.routes.retain(|route| route.device != 4);
        network.devices.extend([
            device(7, "cali7", 1500),
            device(8, "cali8", 1500),
            device(9, "cali9", 1500),
        ]);
        network.routes.extend([route("10.244.1.7/32", None, 7), route("10.244.1.8/32", None, 8)]);
        network.routes.push(route("10.99.0.9/32", None, 9));
        let outside = [Ipv4Addr::new(10, 99, 0, 9)];
        assert_eq!(
            names(&devices(&network, &[], None, &range(), &outside).pods),
            ["cali7", "cali8", "cali9"]
        );
    }

    #[test]
    fn before_the_first_pod_there_is_no_pod_device() {
        let mut network = node();
        network.routes.retain(|route| route.device != 4);
        let pod = [Ipv4Addr::new(10, 244, 1, 5)];
        assert_eq!(devices(&network, &[], None, &range(), &pod).pods, BTreeMap::new());
    }
}
