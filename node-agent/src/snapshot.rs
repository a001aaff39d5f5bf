//! From what is watched to what the desired state is made from.

use crate::args::Args;
use crate::cni::CniResult;
use crate::desired::{Inputs, Shared};
use crate::groups::Groups;
use crate::identity;
use crate::neighbour;
use crate::network::Network;
use crate::objects::{self, Most, NodeRecord, PodRecord};
use crate::probe::Answer;
use crate::watch::Cluster;
use aegis_core::gateway::FullNodes;
use aegis_core::policy::Room;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// What this node knows of itself.
#[derive(Clone, Debug, Default)]
pub struct Local<'a> {
    /// Tunnel address.
    pub tunnel_address: Option<Ipv4Addr>,
    /// Ranges of its pods.
    pub pod_ranges: Vec<IpNet>,
    /// CNI results.
    pub cni: &'a [CniResult],
    /// Control groups.
    pub groups: Groups,
    /// Levels at which the data plane looks for them.
    pub host_levels: u32,
    /// The kernel's network.
    pub network: Option<&'a Network>,
    /// Smallest MTU of the uplinks.
    pub uplink_mtu: Option<u32>,
    /// Established flows may take the fast path.
    pub fast_path: bool,
    /// How gateways answer.
    pub answers: BTreeMap<Ipv4Addr, Answer>,
    /// Room in the tables of the policy.
    pub room: Room,
    /// Room in the tables of flows, once it is known.
    pub shared: Option<Shared>,
    /// The agent is being taken off this node.
    pub leaving: bool,
    /// What carries out the policy of IPv6 stands.
    pub six: bool,
}

/// What is remembered of other nodes.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Where they were when they told it last: an `EgressNode` that is gone does not mean that the node is, as long as an
    /// address names it as a holder.
    tunnels: BTreeMap<String, Ipv4Addr>,
    /// Those that have no ports left.
    full: FullNodes,
}

/// Puts the inputs together.
pub fn inputs(args: &Args, cluster: &Cluster, local: &Local<'_>, memory: &mut Memory) -> Inputs {
    let objects = || cluster.addresses.objects.values();
    let addresses: BTreeMap<Ipv4Addr, _> =
        objects().filter_map(|object| Some((object.address.v4()?, object.clone()))).collect();
    let networks = objects().filter(|object| object.address.v4().is_none());
    let networks = networks.map(|object| (object.address, object.clone())).collect();
    let holds = |name: &String| objects().flat_map(|a| &a.holdings).any(|holding| holding.node == *name);
    let key = |name: &String| (String::new(), name.clone());
    let Memory { tunnels, full } = memory;
    tunnels.retain(|name, _| cluster.reports.objects.contains_key(&key(name)) || holds(name));
    for ((_, name), report) in &cluster.reports.objects {
        tunnels.extend(report.tunnel.map(|address| (name.clone(), address)));
    }
    full.follow(cluster.reports.objects.iter().flat_map(|((_, node), report)| {
        report.loads.iter().map(move |(allocation, load)| (node.as_str(), allocation, *load))
    }));
    // Of this node its own report may be one of the agent before.
    let leaving = |name: &String| match name == &args.node_name {
        true => local.leaving,
        false => cluster.reports.objects.get(&key(name)).is_some_and(|report| report.leaving),
    };
    let nodes = cluster.nodes.objects.iter().map(|((_, name), node)| {
        let draining = node.draining || leaving(name);
        (name.clone(), NodeRecord { draining, ..node.clone() })
    });
    let nodes: BTreeMap<String, NodeRecord> = nodes.collect();
    let peers =
        tunnels.values().copied().chain(nodes.values().filter_map(|node| node.addresses.first().copied()));
    let links = local.network.map(|network| neighbour::links(network, peers)).unwrap_or_default();
    let pods: Vec<PodRecord> = cluster.pods.objects.values().cloned().collect();
    let unreadable = cluster.unreadable_bindings();
    let unreadable = unreadable.map(|((account, name), _)| objects::unreadable_binding(account, name));
    let known = identity::resolve(&pods, local.cni, &local.groups.pods);
    Inputs {
        node: args.node_name.clone(),
        pods: known.pods,
        macs: known.macs,
        groups: known.groups,
        group_roots: local.groups.roots.clone(),
        host_levels: local.host_levels,
        bindings: cluster.bindings.objects.values().cloned().chain(unreadable).collect(),
        allocations: cluster.allocations.objects.values().cloned().collect(),
        addresses,
        networks,
        nodes,
        tunnels: tunnels.clone(),
        full: full.clone(),
        internal: cluster.services.objects.values().flatten().chain(&args.cluster_cidrs).copied().collect(),
        links,
        tunnel_address: local.tunnel_address,
        pod_ranges: local.pod_ranges.clone(),
        six: local.six,
        uplink_mtu: local.uplink_mtu,
        mark: args.mark,
        tunnel_port: args.tunnel_port,
        refusals_per_second: args.refusals_per_second,
        fast_path: local.fast_path,
        unknown_pods: args.unknown_pods,
        answers: local.answers.clone(),
        room: local.room,
        per_account: Most { flows: args.account_flows, per_second: args.account_new_flows },
        shared: local.shared.filter(|_| args.account_leaves_room),
        unsettled: BTreeMap::new(),
        in_vain: BTreeSet::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::desired;
    use crate::objects::Report;
    use aegis_common::ACTION_DENY;
    use clap::Parser;

    #[test]
    fn a_node_that_its_agent_is_leaving_drains_of_itself_only_this_agent_knows() {
        let args = Args::parse_from(["x", "--node-name", "n0"]);
        let mut cluster = Cluster::default();
        for name in ["n0", "n1", "n2"] {
            let report = Report { leaving: name != "n2", ..Report::default() };
            cluster.nodes.objects.insert((String::new(), name.to_owned()), NodeRecord::default());
            cluster.reports.objects.insert((String::new(), name.to_owned()), report);
        }
        for leaving in [false, true] {
            let local = Local { leaving, ..Local::default() };
            let nodes = inputs(&args, &cluster, &local, &mut Memory::default()).nodes;
            assert_eq!(["n0", "n1", "n2"].map(|name| nodes[name].draining), [leaving, true, false]);
        }
    }

    #[test]
    fn pods_of_an_account_with_a_binding_that_cannot_be_read_are_refused_what_nothing_else_covers() {
        const NOTHING: Vec<u16> = Vec::new();
        let args = Args::parse_from(["x", "--node-name", "n0"]);
        let mut cluster = Cluster::default();
        for (account, last) in [("shop", 2), ("other", 3)] {
            let addresses = vec![Ipv4Addr::new(10, 244, 1, last).into()];
            let pod =
                PodRecord { account: account.into(), uid: account.into(), addresses, ..Default::default() };
            cluster.pods.objects.insert((account.into(), "p".into()), pod);
        }
        let actions = |cluster: &Cluster| {
            let policy = desired(&inputs(&args, cluster, &Local::default(), &mut Memory::default())).policy;
            [2, 3].map(|last| {
                let class = policy.pods[&Ipv4Addr::new(10, 244, 1, last)].class;
                let of = policy.verdicts.iter().filter(|((pod, _, _), _)| *pod == class);
                of.map(|(_, verdict)| verdict.action).collect::<Vec<_>>()
            })
        };
        assert_eq!(actions(&cluster), [NOTHING, NOTHING]);
        let key = ("shop".to_owned(), "newer".to_owned());
        cluster.bindings.invalid.insert(key.clone(), "unknown field".into());
        assert_eq!(actions(&cluster), [vec![ACTION_DENY; 2], NOTHING], "of both families");
        // Once there is a form that can be read, it counts, even if a later one cannot be read again.
        let last = crate::objects::unreadable_binding("shop", "newer");
        cluster.bindings.objects.insert(key, aegis_core::policy::Binding { enabled: false, ..last });
        assert_eq!(actions(&cluster), [NOTHING, NOTHING]);
    }
}
