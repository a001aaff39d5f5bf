//! What the data plane should hold, as a pure function of what the agent knows.

use crate::args::UnknownPods;
use crate::objects::{Allocation, NodeRecord};
use crate::probe::Answer;
use aegis_common::{
    ACTION_ALLOCATE, ACTION_DENY, ACTION_PASS, ADDRESSES_PER_ALLOCATION, DESTINATION_INTERNAL,
    MAX_POD_RANGES, PodValue, TUNNEL_OVERHEAD, Timeouts, incarnation,
};
use aegis_core::gateway::{self, Place};
use aegis_core::model::{Address, AllocationName, State};
use aegis_core::policy::{self, Action, Binding, BindingName, Destination, Pod, PolicyInputs};
use aegis_core::slice::SliceSet;
use ipnet::Ipv4Net;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// Everything that the desired state is made from.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// Name of this node.
    pub node: String,
    /// Pods of this node with the addresses that are theirs now.
    pub pods: Vec<Pod>,
    /// MAC that belongs to each pod's address, where the CNI has told it.
    pub macs: BTreeMap<Ipv4Addr, [u8; 6]>,
    /// All bindings.
    pub bindings: Vec<Binding>,
    /// All allocations.
    pub allocations: BTreeMap<AllocationName, Allocation>,
    /// All egress addresses.
    pub addresses: BTreeMap<Ipv4Addr, Address>,
    /// All nodes.
    pub nodes: BTreeMap<String, NodeRecord>,
    /// Tunnel addresses of the nodes, as their agents report them.
    pub tunnels: BTreeMap<String, Ipv4Addr>,
    /// Ranges of services, and whatever else is inside the cluster.
    pub internal: Vec<Ipv4Net>,
    /// Way to each peer, as far as the kernel knows it.
    pub links: BTreeMap<Ipv4Addr, PeerLink>,
    /// This node's tunnel address.
    pub tunnel_address: Option<Ipv4Addr>,
    /// Ranges of this node's pods.
    pub pod_ranges: Vec<Ipv4Net>,
    /// Smallest MTU of the uplinks.
    pub uplink_mtu: Option<u32>,
    /// Bit of the packet mark.
    pub mark: u32,
    /// UDP port of the tunnel.
    pub tunnel_port: u16,
    /// Refusals per second and CPU.
    pub refusals_per_second: u32,
    /// What happens to addresses that nobody has named yet.
    pub unknown_pods: UnknownPods,
    /// Gateways that do not answer, by tunnel address.
    pub silent: BTreeMap<Ipv4Addr, Answer>,
}

/// The way to a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerLink {
    /// MAC of the next hop.
    pub mac: [u8; 6],
    /// The next hop is the peer itself.
    pub same_l2: bool,
    /// Interface index of the uplink.
    pub ifindex: u32,
}

/// The desired state, still in names and addresses; `ops` gives them numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Desired {
    /// Settings.
    pub settings: Settings,
    /// Tunnel addresses of all nodes, this one included, with the way to them where it is known.
    pub peers: BTreeMap<Ipv4Addr, Option<PeerLink>>,
    /// Those of them that are gateways and do not answer.
    pub silent: BTreeMap<Ipv4Addr, Answer>,
    /// Egress addresses.
    pub addresses: BTreeMap<Ipv4Addr, EgressAddress>,
    /// Allocations that can be used here.
    pub allocations: BTreeMap<AllocationName, UsableAllocation>,
    /// The policy.
    pub policy: Policy,
    /// Bindings in the order of their numbers.
    pub bindings: Vec<BindingName>,
    /// Local pods that each binding covers.
    pub covered: BTreeMap<BindingName, u32>,
    /// Local pods that some binding covers.
    pub covered_pods: u32,
}

/// Settings that the agent derives. Fields that are `None` keep the value that the data plane has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Bit of the packet mark.
    pub mark: u32,
    /// This node's tunnel address.
    pub tunnel_address: Option<Ipv4Addr>,
    /// UDP port of the tunnel.
    pub tunnel_port: u16,
    /// Unknown addresses are held.
    pub hold_unknown: bool,
    /// Largest IPv4 packet that fits into the tunnel.
    pub tunnel_mtu: Option<u32>,
    /// Refusals per second and CPU.
    pub refusals_per_second: u32,
    /// Ranges of this node's pods.
    pub pod_ranges: Vec<Ipv4Net>,
}

/// An egress address as this node should know it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EgressAddress {
    /// Allocation that it is dedicated to.
    pub allocation: Option<AllocationName>,
    /// Epoch of the object.
    pub epoch: i64,
    /// Owner of each slice that has one.
    pub owners: BTreeMap<u8, Owner>,
    /// Tunnel addresses at which fragments meet: 16, or none.
    pub homes: Vec<Ipv4Addr>,
    /// Slices from which this node may open flows.
    pub allowed: SliceSet,
    /// Slices of this node that are to become empty.
    pub draining: SliceSet,
}

/// Owner of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its tunnel address; `None` when nobody has told it, in which case the slot stays as it is.
    pub peer: Option<Ipv4Addr>,
    /// Epoch of the holding.
    pub epoch: u32,
}

/// An allocation with slices on this node, or on others through which it can send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsableAllocation {
    /// Addresses in which this node may open flows, sorted.
    pub addresses: Vec<Ipv4Addr>,
    /// Without any such address: tunnel addresses of the nodes to send through, best first.
    pub gateways: Vec<Ipv4Addr>,
    /// How many of the gateways are nearer than the rest.
    pub near: usize,
    /// One of the allocation's addresses, by which gateways know it.
    pub name: Ipv4Addr,
    /// Time-outs.
    pub timeouts: Timeouts,
}

/// The policy with allocations by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Local pods by address.
    pub pods: BTreeMap<Ipv4Addr, PodValue>,
    /// Class of destinations.
    pub destinations: BTreeMap<(Ipv4Addr, u8), u32>,
    /// Class of ports.
    pub ports: BTreeMap<(u8, u16, u8), u32>,
    /// What happens.
    pub verdicts: BTreeMap<(u32, u32, u32), Verdict>,
}

/// What happens to a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// `ACTION_*`.
    pub action: u16,
    /// For `ACTION_ALLOCATE`.
    pub allocation: Option<AllocationName>,
    /// Number of the binding.
    pub binding: u32,
}

/// Destinations that never leave the cluster or the link, whatever a binding says.
fn never_covered() -> impl Iterator<Item = Ipv4Net> {
    [(Ipv4Addr::new(127, 0, 0, 0), 8), (Ipv4Addr::new(169, 254, 0, 0), 16), (Ipv4Addr::new(224, 0, 0, 0), 4)]
        .into_iter()
        .chain([(Ipv4Addr::BROADCAST, 32)])
        .map(|(address, length)| Ipv4Net::new_assert(address, length))
}

/// Everything inside the cluster: pods and addresses of all nodes, services, and what never leaves the link.
pub fn internal(inputs: &Inputs) -> Vec<Ipv4Net> {
    let nodes = inputs.nodes.values();
    let mut all: Vec<Ipv4Net> = nodes
        .flat_map(|node| {
            let own = node.addresses.iter().map(|address| Ipv4Net::from(*address));
            node.pod_ranges.iter().copied().chain(own)
        })
        .chain(inputs.pod_ranges.iter().copied())
        .chain(inputs.internal.iter().copied())
        .chain(never_covered())
        .map(|network| network.trunc())
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// The desired state. The same inputs give the same state.
pub fn desired(inputs: &Inputs) -> Desired {
    let addresses: BTreeMap<Ipv4Addr, EgressAddress> =
        inputs.addresses.iter().map(|(address, object)| (*address, egress_address(inputs, object))).collect();
    let allocations = usable_allocations(inputs, &addresses);
    let compiled = policy::compile(&PolicyInputs {
        bindings: inputs.bindings.clone(),
        pods: inputs.pods.clone(),
        internal: internal(inputs),
        usable: allocations.keys().cloned().collect(),
    });

    let covered_classes: BTreeSet<u32> = compiled
        .verdicts
        .iter()
        .filter(|(_, action)| !matches!(action, Action::Pass))
        .map(|((pod, _, _), _)| *pod)
        .collect();
    let covered_addresses: BTreeSet<Ipv4Addr> = compiled
        .pods
        .iter()
        .filter(|(_, class)| covered_classes.contains(class))
        .map(|(pod, _)| *pod)
        .collect();
    let covered_pods = inputs
        .pods
        .iter()
        .filter(|pod| pod.addresses.iter().any(|own| covered_addresses.contains(own)))
        .count();

    Desired {
        settings: Settings {
            mark: inputs.mark,
            tunnel_address: inputs.tunnel_address,
            tunnel_port: inputs.tunnel_port,
            hold_unknown: inputs.unknown_pods == UnknownPods::Hold
                && inputs.bindings.iter().any(|b| b.enabled),
            tunnel_mtu: inputs.uplink_mtu.map(|mtu| mtu.saturating_sub(TUNNEL_OVERHEAD)),
            refusals_per_second: inputs.refusals_per_second,
            pod_ranges: inputs.pod_ranges.iter().copied().take(MAX_POD_RANGES).collect(),
        },
        peers: peers(inputs),
        silent: inputs.silent.clone(),
        addresses,
        allocations,
        covered_pods: u32::try_from(covered_pods).unwrap_or(u32::MAX),
        policy: Policy {
            pods: pods(&compiled.pods, &inputs.pods),
            destinations: compiled
                .destinations
                .iter()
                .map(|(network, destination)| {
                    let class = match destination {
                        Destination::Internal => DESTINATION_INTERNAL,
                        Destination::Class(class) => *class,
                    };
                    ((network.network(), network.prefix_len()), class)
                })
                .collect(),
            ports: compiled
                .ports
                .iter()
                .map(|(prefix, class)| ((prefix.protocol, prefix.port, prefix.length), *class))
                .collect(),
            verdicts: compiled.verdicts.into_iter().map(|(key, action)| (key, verdict(action))).collect(),
        },
        bindings: compiled.bindings,
        covered: compiled.covered,
    }
}

/// Class and incarnation of each address; no two pods have the same one.
fn pods(classes: &BTreeMap<Ipv4Addr, u32>, pods: &[Pod]) -> BTreeMap<Ipv4Addr, PodValue> {
    let owners = pods.iter().filter(|pod| !pod.host_network).flat_map(|pod| {
        let incarnation = incarnation(&pod.uid);
        pod.addresses.iter().map(move |address| (*address, incarnation))
    });
    let owners: BTreeMap<Ipv4Addr, u32> = owners.collect();
    classes
        .iter()
        .map(|(address, class)| {
            let incarnation = owners.get(address).copied().unwrap_or_default();
            (*address, PodValue { class: *class, incarnation, ..PodValue::default() })
        })
        .collect()
}

fn verdict(action: Action) -> Verdict {
    let number = |binding: usize| u32::try_from(binding).unwrap_or(u32::MAX);
    match action {
        Action::Pass => Verdict { action: ACTION_PASS, allocation: None, binding: 0 },
        Action::Deny { binding } => {
            Verdict { action: ACTION_DENY, allocation: None, binding: number(binding) }
        }
        Action::Allocate { allocation, binding } => {
            Verdict { action: ACTION_ALLOCATE, allocation: Some(allocation), binding: number(binding) }
        }
    }
}

/// Tunnel address of a node: what its agent reports, or else the node's own address, since a report that is missing
/// does not mean that the node is.
fn tunnel_of(inputs: &Inputs, node: &str) -> Option<Ipv4Addr> {
    if node == inputs.node && inputs.tunnel_address.is_some() {
        return inputs.tunnel_address;
    }
    let reported = inputs.tunnels.get(node).copied();
    reported.or_else(|| inputs.nodes.get(node)?.addresses.first().copied())
}

fn peers(inputs: &Inputs) -> BTreeMap<Ipv4Addr, Option<PeerLink>> {
    let holders =
        inputs.addresses.values().flat_map(|address| &address.holdings).map(|holding| &holding.node);
    let names: BTreeSet<&String> = inputs.tunnels.keys().chain(holders).collect();
    names
        .into_iter()
        .filter_map(|name| tunnel_of(inputs, name))
        .chain(inputs.tunnel_address)
        .map(|address| (address, inputs.links.get(&address).copied()))
        .collect()
}

fn egress_address(inputs: &Inputs, object: &Address) -> EgressAddress {
    let mut address = EgressAddress {
        allocation: Some(object.allocation.clone()),
        epoch: object.epoch,
        ..EgressAddress::default()
    };
    for holding in &object.holdings {
        let own = holding.node == inputs.node;
        let slices = SliceSet::range(holding.first, holding.last);
        match holding.state {
            State::Quarantined { .. } => continue,
            State::Held if own => address.allowed = address.allowed.union(slices),
            State::Draining if own => address.draining = address.draining.union(slices),
            State::Held | State::Draining => {}
        }
        let peer = tunnel_of(inputs, &holding.node);
        let owner = Owner { peer, epoch: u32::try_from(holding.epoch).unwrap_or(u32::MAX) };
        address.owners.extend(slices.iter().map(|slice| (slice, owner)));
    }
    let homes = aegis_core::fragment_homes(object);
    let resolved: Option<Vec<Ipv4Addr>> = homes.iter().map(|node| tunnel_of(inputs, node)).collect();
    address.homes = resolved.unwrap_or_default();
    address
}

fn usable_allocations(
    inputs: &Inputs,
    addresses: &BTreeMap<Ipv4Addr, EgressAddress>,
) -> BTreeMap<AllocationName, UsableAllocation> {
    let mut objects: BTreeMap<&AllocationName, Vec<&Address>> = BTreeMap::new();
    for object in inputs.addresses.values() {
        objects.entry(&object.allocation).or_default().push(object);
    }
    let allocation = |(name, objects): (&AllocationName, Vec<&Address>)| {
        let may_open =
            |object: &&&Address| addresses.get(&object.address).is_some_and(|own| !own.allowed.is_empty());
        let own: Vec<Ipv4Addr> = objects
            .iter()
            .filter(may_open)
            .map(|object| object.address)
            .take(ADDRESSES_PER_ALLOCATION)
            .collect();
        let (gateways, near) = if own.is_empty() { gateways(inputs, &objects) } else { (Vec::new(), 0) };
        let usable = !own.is_empty() || !gateways.is_empty();
        let timeouts = inputs.allocations.get(name).map(|allocation| allocation.timeouts);
        let allocation = UsableAllocation {
            addresses: own,
            gateways,
            near,
            name: objects.first()?.address,
            timeouts: timeouts.unwrap_or_default(),
        };
        usable.then_some((name.clone(), allocation))
    };
    objects.into_iter().filter_map(allocation).collect()
}

/// Tunnel addresses of the nodes to send through, and how many of them are near.
fn gateways(inputs: &Inputs, objects: &[&Address]) -> (Vec<Ipv4Addr>, usize) {
    let place = |node: &str| inputs.nodes.get(node).map(|node| node.place.clone()).unwrap_or_default();
    let holders: BTreeMap<&str, Place> = objects
        .iter()
        .flat_map(|object| &object.holdings)
        .filter(|holding| holding.state == State::Held && tunnel_of(inputs, &holding.node).is_some())
        .map(|holding| (holding.node.as_str(), place(&holding.node)))
        .collect();
    let chosen = gateway::choose(&inputs.node, &place(&inputs.node), &holders);
    let addresses = chosen.nodes.iter().filter_map(|node| tunnel_of(inputs, node));
    (addresses.collect(), chosen.near)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aegis_core::model::Holding;
    use aegis_core::policy::Workloads;

    const OWN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
    const EGRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

    fn name() -> AllocationName {
        AllocationName { account: "shop".into(), name: "main".into() }
    }

    fn inputs(holdings: &[(u8, u8, &str, State)]) -> Inputs {
        let holdings = holdings.iter().map(|(first, last, node, state)| Holding {
            first: *first,
            last: *last,
            node: (*node).into(),
            epoch: 7,
            state: *state,
        });
        let address = Address {
            address: EGRESS,
            prefix: "p".into(),
            allocation: name(),
            epoch: 9,
            holdings: holdings.collect(),
        };
        Inputs {
            node: "own".into(),
            addresses: [(EGRESS, address)].into(),
            tunnels: [("far".to_owned(), FAR)].into(),
            tunnel_address: Some(OWN),
            ..Inputs::default()
        }
    }

    fn binding(enabled: bool) -> Binding {
        Binding {
            name: BindingName { account: "shop".into(), name: "b".into() },
            allocation: name(),
            enabled,
            workloads: Workloads { all: true, ..Workloads::default() },
            cidrs: vec!["0.0.0.0/0".parse().unwrap()],
            ports: Vec::new(),
            use_node_address: false,
            generation: 1,
        }
    }

    fn pod() -> Pod {
        Pod {
            account: "shop".into(),
            name: "p".into(),
            uid: "u".into(),
            addresses: vec![Ipv4Addr::new(10, 244, 1, 2)],
            ..Pod::default()
        }
    }

    #[test]
    fn each_state_of_a_holding_means_what_it_says() {
        let quarantined = State::Quarantined { until: 0 };
        let wanted = desired(&inputs(&[
            (4, 5, "own", State::Held),
            (6, 7, "own", State::Draining),
            (8, 9, "own", quarantined),
            (10, 11, "far", State::Held),
            (12, 13, "far", State::Draining),
        ]));
        let address = &wanted.addresses[&EGRESS];
        assert_eq!(address.allowed, SliceSet::range(4, 5), "new flows");
        assert_eq!(address.draining, SliceSet::range(6, 7));
        let owners: Vec<(u8, Option<Ipv4Addr>)> =
            address.owners.iter().map(|(slice, owner)| (*slice, owner.peer)).collect();
        let own = [4, 5, 6, 7].map(|slice| (slice, Some(OWN)));
        let far = [10, 11, 12, 13].map(|slice| (slice, Some(FAR)));
        assert_eq!(owners, [own, far].concat(), "nobody owns what is quarantined");
        assert_eq!(address.homes.len(), 16);
    }

    #[test]
    fn a_holder_that_nobody_has_heard_of_keeps_its_slots_unresolved() {
        let mut inputs = inputs(&[(4, 4, "lost", State::Held)]);
        assert_eq!(desired(&inputs).addresses[&EGRESS].owners[&4], Owner { peer: None, epoch: 7 });
        // The Node object tells where it is, even if its agent does not.
        let node = NodeRecord { addresses: vec![FAR], ..NodeRecord::default() };
        inputs.nodes.insert("lost".into(), node);
        let wanted = desired(&inputs);
        assert_eq!(wanted.addresses[&EGRESS].owners[&4].peer, Some(FAR));
        assert!(wanted.peers.contains_key(&FAR));
    }

    #[test]
    fn unknown_addresses_are_held_while_a_binding_is_enabled() {
        let hold = |unknown_pods, enabled: Option<bool>| {
            let bindings = enabled.map(binding).into_iter().collect();
            desired(&Inputs { unknown_pods, bindings, ..inputs(&[]) }).settings.hold_unknown
        };
        assert!(hold(UnknownPods::Hold, Some(true)));
        assert!(!hold(UnknownPods::Hold, Some(false)) && !hold(UnknownPods::Hold, None));
        assert!(!hold(UnknownPods::Pass, Some(true)));
    }

    #[test]
    fn covered_pods_without_slices_here_are_refused() {
        let verdicts = |holdings: &[(u8, u8, &str, State)]| {
            let wanted =
                desired(&Inputs { bindings: vec![binding(true)], pods: vec![pod()], ..inputs(holdings) });
            assert_eq!(wanted.covered_pods, 1);
            wanted.policy.verdicts.into_values().map(|verdict| verdict.action).collect::<Vec<_>>()
        };
        assert_eq!(verdicts(&[(4, 4, "far", State::Held)]), [ACTION_ALLOCATE], "through a gateway");
        assert_eq!(verdicts(&[(4, 4, "far", State::Draining)]), [ACTION_DENY]);
        assert_eq!(verdicts(&[(4, 4, "lost", State::Held)]), [ACTION_DENY], "nobody knows where it is");
        assert_eq!(verdicts(&[(4, 4, "own", State::Draining)]), [ACTION_DENY]);
        assert_eq!(verdicts(&[(4, 4, "own", State::Held)]), [ACTION_ALLOCATE]);
    }

    #[test]
    fn gateways_are_for_those_who_hold_nothing() {
        let through = |holdings: &[(u8, u8, &str, State)]| {
            let usable = desired(&inputs(holdings)).allocations.remove(&name()).unwrap();
            (usable.addresses, usable.gateways, usable.near, usable.name)
        };
        assert_eq!(through(&[(4, 4, "far", State::Held)]), (vec![], vec![FAR], 1, EGRESS));
        assert_eq!(
            through(&[(4, 4, "far", State::Held), (5, 5, "own", State::Held)]),
            (vec![EGRESS], vec![], 0, EGRESS)
        );
        assert_eq!(
            through(&[(4, 4, "far", State::Held), (5, 5, "own", State::Draining)]),
            (vec![], vec![FAR], 1, EGRESS),
            "what drains opens nothing any more"
        );
    }

    #[test]
    fn the_cluster_itself_is_never_covered() {
        let mut inputs = inputs(&[]);
        let node = NodeRecord {
            addresses: vec![FAR],
            pod_ranges: vec!["10.244.2.0/24".parse().unwrap()],
            ..NodeRecord::default()
        };
        inputs.nodes.insert("far".into(), node);
        inputs.internal = vec!["10.96.0.0/16".parse().unwrap()];
        let wanted = desired(&Inputs { bindings: vec![binding(true)], pods: vec![pod()], ..inputs });
        let internal: Vec<String> = wanted
            .policy
            .destinations
            .iter()
            .filter(|(_, class)| **class == DESTINATION_INTERNAL)
            .map(|((address, length), _)| format!("{address}/{length}"))
            .collect();
        for range in
            ["10.244.2.0/24", "192.0.2.2/32", "10.96.0.0/16", "169.254.0.0/16", "127.0.0.0/8", "224.0.0.0/4"]
        {
            assert!(internal.iter().any(|found| found == range), "{range} in {internal:?}");
        }
    }
}
