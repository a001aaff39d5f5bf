//! What the data plane should hold, as a pure function of what the agent knows.

mod address;
mod allocation;
mod policy;

pub use address::{Deadlines, EgressAddress, Owner};
pub use allocation::Allocation;
pub use policy::{Policy, Verdict};

use crate::args::UnknownPods;
use crate::groups::Group;
use crate::objects::{self, Most, NodeRecord};
use crate::probe::Answer;
use crate::singles;
use crate::uses::Uses;
use aegis_common::TUNNEL_OVERHEAD;
use aegis_core::egress::Egress;
use aegis_core::gateway::FullNodes;
use aegis_core::model::{Address, AllocationName};
use aegis_core::policy::names::{HostPattern, Resolved};
use aegis_core::policy::{
    Applications, Binding, Countries, EgressPolicy, NodeFacts, Pod, Room, RuleName, ServicePort,
    never_covered,
};
use aegis_core::slice::SliceSet;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

/// Everything that the desired state is made from.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// Name of this node.
    pub node: String,
    /// Pods of this node with the addresses that are theirs now.
    pub pods: Vec<Pod>,
    /// MAC that belongs to each pod's address, where the CNI has told it.
    pub macs: BTreeMap<IpAddr, [u8; 6]>,
    /// Ports of Services to which somebody has written endpoints, with these.
    pub services: Vec<ServicePort>,
    /// Control group of each pod, where there is one yet, by UID.
    pub groups: BTreeMap<String, Group>,
    /// Groups in which the pods' are.
    pub group_roots: Vec<Group>,
    /// Levels of the hierarchy at which the data plane looks for groups already.
    pub host_levels: u32,
    /// What policies may ask of this node.
    pub facts: NodeFacts,
    /// Ranges of countries, once there is a database of them.
    pub countries: Option<Arc<Countries>>,
    /// All policies.
    pub policies: Vec<EgressPolicy>,
    /// The applications that they name, as far as they are known.
    pub applications: Applications,
    /// All bindings.
    pub bindings: Vec<Binding>,
    /// All allocations.
    pub allocations: BTreeMap<AllocationName, objects::Allocation>,
    /// All egress addresses that have ports, by their keys (see [`singles`](crate::singles)).
    pub addresses: BTreeMap<Ipv4Addr, Address>,
    /// All egress addresses that are an IPv6 /64.
    pub networks: BTreeMap<Egress, Address>,
    /// All nodes.
    pub nodes: BTreeMap<String, NodeRecord>,
    /// Tunnel addresses of the nodes, as their agents report them.
    pub tunnels: BTreeMap<String, Ipv4Addr>,
    /// Nodes that have no ports left, as their agents report it.
    pub full: FullNodes,
    /// Ranges of services, and whatever else is inside the cluster.
    pub internal: Vec<IpNet>,
    /// Way to each peer, as far as the kernel knows it.
    pub links: BTreeMap<Ipv4Addr, PeerLink>,
    /// This node's tunnel address.
    pub tunnel_address: Option<Ipv4Addr>,
    /// Ranges of this node's pods.
    pub pod_ranges: Vec<IpNet>,
    /// What carries out the policy of IPv6 stands, so that packets may be looked at.
    pub six: bool,
    /// Smallest MTU of the uplinks.
    pub uplink_mtu: Option<u32>,
    /// Bit of the packet mark.
    pub mark: u32,
    /// UDP port of the tunnel.
    pub tunnel_port: u16,
    /// Refusals per second and CPU.
    pub refusals_per_second: u32,
    /// Established flows take the fast path.
    pub fast_path: bool,
    /// What happens to addresses that nobody has named yet.
    pub unknown_pods: UnknownPods,
    /// How the gateways that are probed answer, by tunnel address.
    pub answers: BTreeMap<Ipv4Addr, Answer>,
    /// Room in the tables of the policy.
    pub room: Room,
    /// What one account may take of this node.
    pub per_account: Most,
    /// Flows and bitmaps of ports that fit into this node's tables, of which accounts leave each other some; `None`: they need not.
    pub shared: Option<Shared>,
    /// Slices that this node does not open yet, since others have not heard of them.
    pub unsettled: BTreeMap<Ipv4Addr, SliceSet>,
    /// What slices of this node's are used for, where not all are for translation.
    pub uses: BTreeMap<Ipv4Addr, Uses>,
    /// Addresses of which this node has asked for more in vain.
    pub in_vain: BTreeSet<Ipv4Addr>,
    /// Addresses that host names are known to have, and the number of this knowledge.
    pub resolved: (u64, Arc<Resolved>),
}

/// What all accounts share on a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shared {
    /// Flows.
    pub flows: u32,
    /// Bitmaps of ports.
    pub blocks: u32,
}

/// The way to a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerLink {
    /// MAC of the next hop.
    pub mac: [u8; 6],
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
    /// How those of them answer that are probed.
    pub answers: BTreeMap<Ipv4Addr, Answer>,
    /// Egress addresses.
    pub addresses: BTreeMap<Ipv4Addr, EgressAddress>,
    /// Egress /64s.
    pub networks: BTreeMap<Egress, EgressAddress>,
    /// Allocations that have an egress address.
    pub allocations: BTreeMap<AllocationName, Allocation>,
    /// What one account may take of this node.
    pub per_account: Most,
    /// Of what they leave each other some.
    pub shared: Option<Shared>,
    /// The policy.
    pub policy: Policy,
    /// Rules that cover local pods, in the order of their numbers.
    pub rules: Vec<RuleName>,
    /// Local pods that each enforced rule covers.
    pub covered: BTreeMap<RuleName, u32>,
    /// Allocations from which local pods are to leave.
    pub named: BTreeSet<AllocationName>,
    /// Local pods that some rule covers.
    pub covered_pods: u32,
    /// Covered pods of the host network whose control group is not known: they leave with the node's address.
    pub groupless: u32,
    /// Allocations of which sockets of local pods have addresses.
    pub bound: BTreeSet<AllocationName>,
    /// Accounts whose rules find no room: their covered pods are refused.
    pub refused: BTreeSet<String>,
    /// Policies that only observe find no room, and count nothing.
    pub unobserved: bool,
    /// Addresses of local pods that no rule with host names covers.
    pub nameless: BTreeSet<IpAddr>,
    /// Host names of rules that cover local pods.
    pub looked_up: BTreeSet<HostPattern>,
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
    /// Levels at which the data plane looks for the group of a socket of this node's; 0 = it looks at none. What was once looked at
    /// stays so: connections of pods of the host network live on.
    pub host_levels: u32,
    /// Refusals per second and CPU.
    pub refusals_per_second: u32,
    /// Established flows take the fast path.
    pub fast_path: bool,
    /// Ranges of this node's pods, as few as say the same.
    pub pod_ranges: Vec<Ipv4Net>,
    /// Those of IPv6.
    pub pod_ranges6: Vec<Ipv6Net>,
    /// IPv6 packets are to be looked at.
    pub six: bool,
}

/// Whether the cluster has to do with IPv6 on this node: pods with such an address or a range for them, a /64, or a rule that
/// names IPv6 destinations.
pub fn needs_six(inputs: &Inputs) -> bool {
    let mut addresses = inputs.pods.iter().flat_map(|pod| &pod.addresses);
    let bindings = inputs.bindings.iter().filter(|binding| binding.enabled).flat_map(|it| &it.cidrs);
    // What only observes changes nothing, this neither.
    let mut policies = inputs.policies.iter().filter(|policy| !policy.observes);
    let endpoints = |name: &String| inputs.applications.get(name).into_iter().flatten();
    let parts = policies.clone().flat_map(|policy| &policy.applications).flat_map(endpoints);
    let mut zones = bindings
        .chain(policies.clone().flat_map(|policy| &policy.cidrs))
        .chain(parts.flat_map(|endpoint| &endpoint.cidrs));
    let missing = |name: &String| !inputs.applications.contains_key(name);
    !inputs.networks.is_empty()
        || inputs.addresses.keys().any(|key| singles::is(*key))
        || addresses.any(IpAddr::is_ipv6)
        || inputs.pod_ranges.iter().chain(&inputs.internal).any(|range| matches!(range, IpNet::V6(_)))
        || zones.any(|range| matches!(range, IpNet::V6(_)))
        || policies.any(|policy| !policy.countries.is_empty() || policy.applications.iter().any(missing))
}

/// The ranges of one family.
pub fn of_v4(ranges: &[IpNet]) -> Vec<Ipv4Net> {
    ranges.iter().filter_map(|range| if let IpNet::V4(range) = range { Some(*range) } else { None }).collect()
}

/// The ranges of the other.
pub fn of_v6(ranges: &[IpNet]) -> Vec<Ipv6Net> {
    ranges.iter().filter_map(|range| if let IpNet::V6(range) = range { Some(*range) } else { None }).collect()
}

/// Everything inside the cluster: pods and addresses of all nodes, services, and what never leaves the link.
pub fn internal(inputs: &Inputs) -> Vec<IpNet> {
    let nodes = inputs.nodes.values();
    let mut all: Vec<IpNet> = nodes
        .flat_map(|node| {
            let v4 = node.addresses.iter().map(|address| IpAddr::V4(*address));
            let own = v4.chain(node.addresses6.iter().map(|address| IpAddr::V6(*address)));
            node.pod_ranges.iter().copied().chain(own.map(IpNet::from))
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

/// Tunnel address of a node: what its agent reports, or else the node's own address, since a report that is missing
/// does not mean that the node is.
pub(crate) fn tunnel_of(inputs: &Inputs, node: &str) -> Option<Ipv4Addr> {
    if node == inputs.node && inputs.tunnel_address.is_some() {
        return inputs.tunnel_address;
    }
    let reported = inputs.tunnels.get(node).copied();
    reported.or_else(|| inputs.nodes.get(node)?.addresses.first().copied())
}

fn peers(inputs: &Inputs) -> BTreeMap<Ipv4Addr, Option<PeerLink>> {
    let objects = inputs.addresses.values().chain(inputs.networks.values());
    let holders = objects.flat_map(|address| &address.holdings).map(|holding| &holding.node);
    let names: BTreeSet<&String> = inputs.tunnels.keys().chain(holders).collect();
    names
        .into_iter()
        .filter_map(|name| tunnel_of(inputs, name))
        .chain(inputs.tunnel_address)
        .map(|address| (address, inputs.links.get(&address).copied()))
        .collect()
}

/// The desired state. The same inputs give the same state.
pub fn desired(inputs: &Inputs) -> Desired {
    let objects = inputs.addresses.iter();
    let addresses: BTreeMap<Ipv4Addr, EgressAddress> = objects
        .map(|(address, object)| (*address, address::egress_address(inputs, *address, object)))
        .collect();
    let networks: BTreeMap<Egress, EgressAddress> = inputs
        .networks
        .iter()
        .map(|(network, object)| (*network, address::egress_network(inputs, object)))
        .collect();
    let allocations = allocation::allocations(inputs, &addresses, &networks);
    let any_rule = inputs.policies.iter().any(|policy| !policy.observes)
        || inputs.bindings.iter().any(|binding| binding.enabled);
    let hold_unknown = inputs.unknown_pods == UnknownPods::Hold && any_rule;
    let compiled = policy::compile(inputs, &allocations, hold_unknown);
    // One alone may have everything.
    let accounts: BTreeSet<&String> = allocations.keys().map(|name| &name.account).collect();
    let shared = inputs.shared.filter(|_| accounts.len() > 1);
    Desired {
        settings: Settings {
            mark: inputs.mark,
            tunnel_address: inputs.tunnel_address,
            tunnel_port: inputs.tunnel_port,
            hold_unknown,
            host_levels: compiled.host_levels,
            tunnel_mtu: inputs.uplink_mtu.map(|mtu| mtu.saturating_sub(TUNNEL_OVERHEAD)),
            refusals_per_second: inputs.refusals_per_second,
            fast_path: inputs.fast_path,
            pod_ranges: Ipv4Net::aggregate(&of_v4(&inputs.pod_ranges)),
            pod_ranges6: Ipv6Net::aggregate(&of_v6(&inputs.pod_ranges)),
            six: inputs.six && needs_six(inputs),
        },
        peers: peers(inputs),
        answers: inputs.answers.clone(),
        addresses,
        networks,
        allocations,
        per_account: inputs.per_account,
        shared,
        policy: compiled.policy,
        rules: compiled.rules,
        covered: compiled.covered,
        named: compiled.named,
        covered_pods: compiled.covered_pods,
        groupless: compiled.groupless,
        bound: compiled.bound,
        refused: compiled.refused,
        unobserved: compiled.unobserved,
        nameless: compiled.nameless,
        looked_up: compiled.looked_up,
    }
}

#[cfg(test)]
mod tests;
