//! From what is watched to what the desired state is made from.

use crate::args::Args;
use crate::cni::CniResult;
use crate::desired::{Inputs, Shared};
use crate::groups::Groups;
use crate::identity;
use crate::neighbour;
use crate::network::Network;
use crate::nri::Told;
use crate::objects::{Most, NodeRecord, PodRecord};
use crate::probe::Answer;
use crate::singles;
use crate::watch::Cluster;
use aegis_core::egress::Kind;
use aegis_core::gateway::FullNodes;
use aegis_core::model::Address;
use aegis_core::policy::{Applications, Binding, Countries, Pod, Room};
use aegis_crds::{rules, services};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

/// What this node knows of itself.
#[derive(Clone, Debug, Default)]
pub struct Local<'a> {
    /// Tunnel address.
    pub tunnel_address: Option<Ipv4Addr>,
    /// Ranges of its pods.
    pub pod_ranges: Vec<IpNet>,
    /// CNI results.
    pub cni: &'a [CniResult],
    /// What the container runtime says.
    pub told: Told,
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
    /// Ranges of countries.
    pub countries: Option<Arc<Countries>>,
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

/// What stands for rules that cannot be read. Nobody knows whom a policy covers: it may be any pod.
fn unreadable(cluster: &Cluster, pods: &[Pod]) -> Vec<Binding> {
    let accounts: BTreeSet<&String> = pods.iter().map(|pod| &pod.account).collect();
    let bindings = cluster.bindings.unreadable();
    let bindings = bindings.map(|((account, name), _)| rules::unreadable_binding(account, name));
    let policies = cluster.policies.unreadable().flat_map(|((_, name), _)| {
        accounts.iter().map(move |account| rules::unreadable_binding(account, name))
    });
    bindings.chain(policies).collect()
}

/// The applications that some policy names.
fn applications(cluster: &Cluster) -> Applications {
    let named = cluster.policies.objects.values().flat_map(|policy| &policy.applications);
    let known = named.filter_map(|name| {
        let endpoints = cluster.applications.objects.get(&(String::new(), name.clone()))?;
        Some((name.clone(), endpoints.clone()))
    });
    known.collect()
}

/// Gives pods the labels of their namespaces. A pod may be heard of before its namespace: where a policy asks for these labels, nobody
/// knows yet what the pod may, and it waits as one that nobody has named.
fn with_namespaces(pods: Vec<Pod>, cluster: &Cluster) -> Vec<Pod> {
    let policies = || cluster.policies.objects.values();
    if !policies().any(|policy| policy.identity.namespace_selector.is_some()) {
        return pods;
    }
    let enforced = policies().filter(|policy| !policy.observes);
    let matters = enforced.clone().any(|policy| policy.identity.namespace_selector.is_some());
    let labelled = pods.into_iter().filter_map(|pod| {
        let labels = cluster.namespaces.objects.get(&(String::new(), pod.account.clone()));
        match labels {
            Some(labels) => Some(Pod { namespace_labels: labels.clone(), ..pod }),
            None => (!matters).then_some(pod),
        }
    });
    labelled.collect()
}

/// Puts the inputs together.
pub fn inputs(args: &Args, cluster: &Cluster, local: &Local<'_>, memory: &mut Memory) -> Inputs {
    let objects = || cluster.addresses.objects.values();
    let mut addresses: BTreeMap<Ipv4Addr, Address> = BTreeMap::new();
    for object in objects() {
        if let Some(key) = singles::key(object.address) {
            // Should two have one stand-in: the first keeps it, and the other is told as not programmed.
            addresses.entry(key).or_insert_with(|| object.clone());
        }
    }
    let networks = objects().filter(|object| object.address.kind() == Kind::Network);
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
    let mut known = identity::resolve(&pods, local.cni, &local.told, &local.groups.pods);
    known.pods = with_namespaces(known.pods, cluster);
    let own = cluster.nodes.objects.get(&key(&args.node_name));
    let facts = own.and_then(|node| node.facts.as_deref()).cloned().unwrap_or_default();
    let unreadable = unreadable(cluster, &known.pods);
    Inputs {
        node: args.node_name.clone(),
        pods: known.pods,
        macs: known.macs,
        groups: known.groups,
        group_roots: local.groups.roots.clone(),
        host_levels: local.host_levels,
        facts,
        countries: local.countries.clone(),
        policies: cluster.policies.objects.values().cloned().collect(),
        applications: applications(cluster),
        bindings: cluster.bindings.objects.values().cloned().chain(unreadable).collect(),
        allocations: cluster.allocations.objects.values().cloned().collect(),
        addresses,
        networks,
        nodes,
        tunnels: tunnels.clone(),
        full: full.clone(),
        services: services::ports(
            cluster.service_ports.objects.iter(),
            cluster.service_endpoints.objects.iter(),
        ),
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
        uses: BTreeMap::new(),
        in_vain: BTreeSet::new(),
        resolved: Default::default(),
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
    fn a_pod_whose_namespace_is_not_known_waits_where_a_policy_asks_for_its_labels() {
        let args = Args::parse_from(["x", "--node-name", "n0"]);
        let mut cluster = Cluster::default();
        for account in ["shop", "new"] {
            let pod = PodRecord { account: account.into(), uid: account.into(), ..Default::default() };
            cluster.pods.objects.insert((account.into(), "p".into()), pod);
        }
        let labels: aegis_core::selector::Labels = [("tier".to_owned(), "gold".to_owned())].into();
        cluster.namespaces.objects.insert((String::new(), "shop".into()), labels.clone());
        let known = |cluster: &Cluster| {
            let pods = inputs(&args, cluster, &Local::default(), &mut Memory::default()).pods;
            pods.into_iter().map(|pod| (pod.account, pod.namespace_labels)).collect::<Vec<_>>()
        };
        assert_eq!(known(&cluster).len(), 2, "nobody asks");
        for (observes, expected) in [(true, 2), (false, 1)] {
            let object = serde_json::json!({
                "apiVersion": "aegis.dev/v1alpha1", "kind": "EgressPolicy", "metadata": {"name": "p"},
                "spec": {
                    "precedence": 1, "action": "Deny", "mode": if observes { "Observe" } else { "Enforce" },
                    "match": {"identity": {"namespaceSelector": {"matchLabels": {"tier": "gold"}}}},
                },
            });
            let policy = aegis_crds::rules::policy(&serde_json::from_value(object).unwrap()).unwrap();
            cluster.policies.objects.insert((String::new(), "p".into()), policy);
            let pods = known(&cluster);
            assert_eq!(pods.len(), expected);
            assert!(pods.contains(&("shop".to_owned(), labels.clone())));
        }
    }

    #[test]
    fn an_application_that_could_never_be_read_is_missing_and_one_that_could_be_once_stays() {
        let args = Args::parse_from(["x", "--node-name", "n0"]);
        let mut cluster = Cluster::default();
        let object = serde_json::json!({
            "apiVersion": "aegis.dev/v1alpha1", "kind": "EgressPolicy", "metadata": {"name": "p"},
            "spec": {"precedence": 1, "action": "Default", "match": {"destination": {"applications": ["crm"]}}},
        });
        let policy = aegis_crds::rules::policy(&serde_json::from_value(object).unwrap()).unwrap();
        cluster.policies.objects.insert((String::new(), "p".into()), policy);
        let addresses = vec![Ipv4Addr::new(10, 244, 1, 2).into()];
        let pod = PodRecord { account: "shop".into(), uid: "1".into(), addresses, ..Default::default() };
        cluster.pods.objects.insert(("shop".into(), "p".into()), pod);
        let actions = |cluster: &Cluster| -> Vec<u16> {
            let policy = desired(&inputs(&args, cluster, &Local::default(), &mut Memory::default())).policy;
            policy.verdicts.values().map(|verdict| verdict.action).collect()
        };
        let key = (String::new(), "crm".to_owned());
        cluster.applications.invalid.insert(key.clone(), "unknown field".into());
        assert_eq!(actions(&cluster), [ACTION_DENY; 2], "of both families");
        let endpoint = aegis_core::policy::Endpoint {
            cidrs: vec!["198.51.100.0/24".parse().unwrap()],
            ..Default::default()
        };
        cluster.applications.objects.insert(key, vec![endpoint]);
        assert_eq!(actions(&cluster), [0u16; 0], "the policy lets it pass");
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
        let last = rules::unreadable_binding("shop", "newer");
        cluster.bindings.objects.insert(key, Binding { enabled: false, ..last });
        assert_eq!(actions(&cluster), [NOTHING, NOTHING]);
    }
}
