//! What the elections depend on, from what the agent knows.

use super::super::{Facts, held, holders, slices_of};
use super::election::{Mac, Seat, Wanted};
use crate::desired::{Inputs, tunnel_of};
use crate::network::Network;
use crate::observed::{from_map6, to_map6, to_network};
use aegis_common::egress_address;
use aegis_core::egress::Egress;
use aegis_core::model::Address;
use aegis_crds::AnnouncementMode;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

/// Addresses of mode `L2`, with who may answer for each: holders on a link of this node that do not drain, or that drain
/// like all others. One of `answering` stays so for as long as its object or its prefix is gone but the data plane has it:
/// that alone says nothing about its flows. `suffixes`: this node's pods, by which they are known in a /64.
pub fn wanted(
    facts: &Facts<'_>,
    inputs: &Inputs,
    network: &Network,
    uplinks: &BTreeMap<u32, Mac>,
    answering: &BTreeSet<Egress>,
    suffixes: &BTreeMap<Ipv6Addr, u32>,
) -> Wanted {
    let of_mode = |address: &Egress| facts.mode(*address) == Some(AnnouncementMode::L2);
    let unknown = |address: &Egress| facts.mode(*address).is_none();
    let own = held(facts, AnnouncementMode::L2);
    let kept = answering
        .iter()
        .copied()
        .filter(|address| of_mode(address) || unknown(address) && facts.programmed.contains(address));
    let addresses: BTreeSet<Egress> = own.iter().copied().chain(kept).collect();
    if addresses.is_empty() {
        return Wanted::default();
    }
    let on_link = |node: &str| {
        let route = tunnel_of(inputs, node).and_then(|tunnel| network.route(tunnel));
        route.is_some_and(|route| route.gateway.is_none() && uplinks.contains_key(&route.device))
    };
    let seat = |address: &Egress| {
        let Some(object) = facts.object(*address) else {
            return Seat { stands: true, ..Seat::default() };
        };
        let remains = |name: &str| facts.nodes.get(name).is_none_or(|node| !node.draining);
        let others = holders(object).into_iter().filter(|name| *name != facts.node && on_link(name));
        let (staying, leaving): (BTreeSet<&str>, BTreeSet<&str>) = others.partition(|name| remains(name));
        let fit = facts.entry && facts.programmed.contains(address);
        let stays = !facts.drains() || staying.is_empty();
        let others = if staying.is_empty() { leaving } else { staying };
        Seat {
            stands: unknown(address) || fit && stays && own.contains(address),
            others: others.into_iter().map(str::to_owned).collect(),
            pods: of_pods(facts, object, suffixes),
        }
    };
    let seats = addresses.iter().map(|address| (*address, seat(address))).collect();
    let holders = addresses.iter().filter_map(|address| facts.object(*address)).flat_map(holders);
    let nodes: BTreeSet<&str> = holders.chain(facts.nodes.keys().map(String::as_str)).collect();
    let tunnels: BTreeMap<String, Ipv4Addr> = nodes
        .into_iter()
        .filter(|node| *node != facts.node)
        .filter_map(|node| Some((node.to_owned(), tunnel_of(inputs, node)?)))
        .collect();
    let mac = |(node, tunnel): (&String, &Ipv4Addr)| {
        let found = uplinks.keys().filter_map(|index| network.neighbours.get(&(*index, *tunnel)));
        found.map(|mac| (*mac, node.clone())).collect::<Vec<_>>()
    };
    let macs = tunnels.iter().flat_map(mac).collect();
    Wanted { node: facts.node.to_owned(), seats, tunnels, macs }
}

/// The addresses in a /64 of this node's pods.
fn of_pods(facts: &Facts<'_>, object: &Address, suffixes: &BTreeMap<Ipv6Addr, u32>) -> BTreeSet<Ipv6Addr> {
    let Some(network) = to_network(object.address) else { return BTreeSet::new() };
    let slices = slices_of(object, facts.node);
    let addresses = slices.flat_map(|slice| {
        suffixes.iter().map(move |(pod, suffix)| {
            from_map6(egress_address(&to_map6(*pod), network, u16::from(slice), *suffix))
        })
    });
    addresses.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{Device, Route};
    use crate::objects::NodeRecord;
    use aegis_core::model::{AllocationName, Holding, State};
    use ipnet::Ipv4Net;

    const A: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
    /// 2001:db8:1:2::/64
    const C: Egress = Egress::V6(0x2001_0db8_0001_0002);
    const UPLINK: u32 = 2;
    const MAC: Mac = [2, 0, 0, 0, 0, 1];

    struct World {
        inputs: Inputs,
        network: Network,
        modes: BTreeMap<String, AnnouncementMode>,
        answering: BTreeSet<Egress>,
        entry: bool,
    }

    /// This node is n1. n2 and n3 are on its link, n4 is behind a router.
    fn world() -> World {
        let node = |last| NodeRecord { addresses: vec![Ipv4Addr::new(10, 0, 0, last)], ..Default::default() };
        let holding = |(slice, node): (u8, &str)| Holding {
            first: slice,
            last: slice,
            node: node.to_owned(),
            epoch: 1,
            state: State::Held,
        };
        let object = Address {
            address: A.into(),
            prefix: "p".into(),
            allocation: AllocationName { account: "shop".into(), name: "main".into() },
            epoch: 1,
            fence: None,
            holdings: [(4, "n1"), (5, "n2"), (6, "n3"), (7, "n4")].map(holding).into(),
        };
        let route = |net: &str, gateway| Route {
            destination: net.parse::<Ipv4Net>().unwrap(),
            gateway,
            device: UPLINK,
            metric: 0,
        };
        let router = Some(Ipv4Addr::new(10, 0, 0, 254));
        World {
            inputs: Inputs {
                node: "n1".into(),
                addresses: [(A, object)].into(),
                nodes: [("n1", 1), ("n2", 2), ("n3", 3), ("n4", 100)]
                    .map(|(name, last)| (name.to_owned(), node(last)))
                    .into(),
                tunnel_address: Some(Ipv4Addr::new(10, 0, 0, 1)),
                ..Inputs::default()
            },
            network: Network {
                devices: [(UPLINK, Device { index: UPLINK, mac: MAC, ..Device::default() })].into(),
                routes: vec![route("10.0.0.0/27", None), route("0.0.0.0/0", router)],
                neighbours: [((UPLINK, Ipv4Addr::new(10, 0, 0, 2)), [2, 0, 0, 0, 0, 2])].into(),
                ..Network::default()
            },
            modes: [("p".to_owned(), AnnouncementMode::L2)].into(),
            answering: BTreeSet::new(),
            entry: true,
        }
    }

    impl World {
        fn wanted(&self) -> Wanted {
            let facts = Facts {
                node: "n1",
                addresses: &self.inputs.addresses,
                networks: &self.inputs.networks,
                modes: &self.modes,
                nodes: &self.inputs.nodes,
                programmed: &[A.into(), C].into(),
                entry: self.entry,
            };
            let suffixes = [("fd00::1:5".parse().unwrap(), 0x0001_0005u32.to_be())].into();
            wanted(&facts, &self.inputs, &self.network, &[(UPLINK, MAC)].into(), &self.answering, &suffixes)
        }

        fn drain(&mut self, nodes: &[&str]) {
            for name in nodes {
                self.inputs.nodes.get_mut(*name).unwrap().draining = true;
            }
        }

        /// Whether this node stands, and who else.
        fn seat(&self) -> Option<(bool, Vec<String>)> {
            let wanted = self.wanted();
            let seat = wanted.seats.get(&A.into())?;
            Some((seat.stands, seat.others.iter().cloned().collect()))
        }
    }

    fn others(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn holders_on_the_link_stand() {
        let world = world();
        assert_eq!(world.seat(), Some((true, others(&["n2", "n3"]))));
        let wanted = world.wanted();
        assert_eq!(wanted.macs, [([2, 0, 0, 0, 0, 2], "n2".to_owned())].into());
        assert_eq!(wanted.tunnels["n3"], Ipv4Addr::new(10, 0, 0, 3));
    }

    #[test]
    fn who_drains_or_takes_nothing_does_not_stand_unless_all_drain() {
        let mut world = world();
        world.drain(&["n2"]);
        assert_eq!(world.seat(), Some((true, others(&["n3"]))));
        world.drain(&["n1"]);
        assert_eq!(world.seat(), Some((false, others(&["n3"]))));
        world.drain(&["n3"]);
        assert_eq!(world.seat(), Some((true, others(&["n2", "n3"]))));
        world.entry = false;
        assert!(!world.seat().unwrap().0, "it takes nothing");
    }

    #[test]
    fn only_the_mode_l2_counts_and_what_is_unknown_stays() {
        let mut world = world();
        world.modes.insert("p".into(), AnnouncementMode::BGP);
        world.answering.insert(A.into());
        assert_eq!(world.wanted(), Wanted::default(), "another mode is known");
        world.modes.clear();
        assert_eq!(world.seat().map(|seat| seat.0), Some(true), "its prefix is gone");
        world.inputs.addresses.clear();
        assert_eq!(world.seat(), Some((true, vec![])), "its object is gone");
        world.answering.clear();
        assert_eq!(world.wanted(), Wanted::default(), "nobody has to begin");
    }

    #[test]
    fn who_has_no_slices_any_more_hands_over() {
        let mut world = world();
        world.inputs.addresses.get_mut(&A).unwrap().holdings.remove(0);
        assert_eq!(world.seat(), None);
        world.answering.insert(A.into());
        assert_eq!(world.seat(), Some((false, others(&["n2", "n3"]))));
    }

    #[test]
    fn of_a_64_a_holder_knows_where_its_own_pods_are() {
        let mut world = world();
        let object = world.inputs.addresses.remove(&A).unwrap();
        world.inputs.networks = [(C, Address { address: C, ..object })].into();
        let wanted = world.wanted();
        let seat = &wanted.seats[&C];
        assert!(seat.stands && seat.others.len() == 2, "{seat:?}");
        // This node's slice is 4, and bits 80 to 95 are whatever keeps the sum.
        let pods: Vec<[u16; 8]> = seat.pods.iter().map(Ipv6Addr::segments).collect();
        assert!(matches!(pods[..], [[0x2001, 0xdb8, 1, 2, 4, _, 1, 5]]), "{:?}", seat.pods);
    }
}
