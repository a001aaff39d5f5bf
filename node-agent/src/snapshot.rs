//! From what is watched to what the desired state is made from.

use crate::args::Args;
use crate::cni::CniResult;
use crate::desired::Inputs;
use crate::identity;
use crate::neighbour;
use crate::network::Network;
use crate::objects::PodRecord;
use crate::probe::Answer;
use crate::watch::Cluster;
use aegis_core::policy::Room;
use ipnet::Ipv4Net;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// What this node knows of itself.
#[derive(Clone, Debug, Default)]
pub struct Local<'a> {
    /// Tunnel address.
    pub tunnel_address: Option<Ipv4Addr>,
    /// Ranges of its pods.
    pub pod_ranges: Vec<Ipv4Net>,
    /// CNI results.
    pub cni: &'a [CniResult],
    /// The kernel's network.
    pub network: Option<&'a Network>,
    /// Smallest MTU of the uplinks.
    pub uplink_mtu: Option<u32>,
    /// How gateways answer.
    pub answers: BTreeMap<Ipv4Addr, Answer>,
    /// Room in the tables of the policy.
    pub room: Room,
}

/// Puts the inputs together. `tunnels` remembers where nodes were when they told it last: an `EgressNode` that is gone
/// does not mean that the node is, as long as an address names it as a holder.
pub fn inputs(
    args: &Args,
    cluster: &Cluster,
    local: &Local<'_>,
    tunnels: &mut BTreeMap<String, Ipv4Addr>,
) -> Inputs {
    let addresses: BTreeMap<Ipv4Addr, _> =
        cluster.addresses.objects.values().map(|object| (object.address, object.clone())).collect();
    let holds =
        |name: &String| addresses.values().flat_map(|a| &a.holdings).any(|holding| holding.node == *name);
    let key = |name: &String| (String::new(), name.clone());
    tunnels.retain(|name, _| cluster.tunnels.objects.contains_key(&key(name)) || holds(name));
    for ((_, name), address) in &cluster.tunnels.objects {
        tunnels.extend(address.map(|address| (name.clone(), address)));
    }
    let nodes: BTreeMap<String, _> =
        cluster.nodes.objects.iter().map(|((_, name), node)| (name.clone(), node.clone())).collect();
    let peers =
        tunnels.values().copied().chain(nodes.values().filter_map(|node| node.addresses.first().copied()));
    let links =
        local.network.map(|network| neighbour::links(network, peers, args.tunnel_only)).unwrap_or_default();
    let pods: Vec<PodRecord> = cluster.pods.objects.values().cloned().collect();
    let known = identity::resolve(&pods, local.cni);
    Inputs {
        node: args.node_name.clone(),
        pods: known.pods,
        macs: known.macs,
        bindings: cluster.bindings.objects.values().cloned().collect(),
        allocations: cluster.allocations.objects.values().cloned().collect(),
        addresses,
        nodes,
        tunnels: tunnels.clone(),
        internal: cluster.services.objects.values().flatten().chain(&args.cluster_cidrs).copied().collect(),
        links,
        tunnel_address: local.tunnel_address,
        pod_ranges: local.pod_ranges.clone(),
        uplink_mtu: local.uplink_mtu,
        mark: args.mark,
        tunnel_port: args.tunnel_port,
        refusals_per_second: args.refusals_per_second,
        unknown_pods: args.unknown_pods,
        answers: local.answers.clone(),
        room: local.room,
    }
}
