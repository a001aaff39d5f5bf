//! API objects as the plain data that rules work on.

use aegis_common::{ANY_NUMBER, Timeouts};
use aegis_core::gateway::{self, Load, Place};
use aegis_core::model::{Address, AllocationName, Fence, Holding, Seconds, State};
use aegis_core::policy::{self, Conditions, NodeFacts};
use aegis_core::slice::{self, SliceSet};
use aegis_crds::rules::{self, FieldError, wrong};
use aegis_crds::{AllocationRef, EgressAddress, EgressAllocation, EgressNode, HoldingState};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// Taint by which an administrator vouches that a node is powered off.
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// Annotation of the pod that stands for a static one: the UID that kubelet has given that.
const STATIC_UID: &str = "kubernetes.io/config.mirror";

/// A pod of this node, with the addresses that its status names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodRecord {
    /// Namespace.
    pub account: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Service account.
    pub service_account: String,
    /// Addresses of the status.
    pub addresses: Vec<IpAddr>,
    /// Has the node's addresses.
    pub host_network: bool,
    /// The UID by which kubelet knows it: that of a static pod is not the API's.
    pub kubelet_uid: String,
    /// Creation time.
    pub created: Seconds,
    /// Has ended: its address may already be another's.
    pub finished: bool,
    /// Its conditions.
    pub conditions: Conditions,
}

/// What the agent needs of a Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeRecord {
    /// UID.
    pub uid: String,
    /// Ranges of its pods.
    pub pod_ranges: Vec<IpNet>,
    /// Internal addresses; the tunnel ends at one of these.
    pub addresses: Vec<Ipv4Addr>,
    /// Those of IPv6.
    pub addresses6: Vec<Ipv6Addr>,
    /// Where it is.
    pub place: Place,
    /// Its labels, see [`gateway::label`].
    pub labels: Arc<[u64]>,
    /// On its way out of the cluster: cordoned, being deleted, or tainted as out of service. In what the agent goes by also one that
    /// its agent is leaving.
    pub draining: bool,
    /// Its kubelet does not say that it is ready.
    pub lost: bool,
    /// What policies may ask of it; of this node alone.
    pub facts: Option<Arc<NodeFacts>>,
}

/// What the agent needs of another node's report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Its tunnel address.
    pub tunnel: Option<Ipv4Addr>,
    /// Allocations of which it has little room left, or none.
    pub loads: BTreeMap<AllocationName, Load>,
    /// Its agent is being taken off it.
    pub leaving: bool,
}

/// How much somebody may take; 0 = no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Most {
    /// Flows at a time.
    pub flows: u32,
    /// New ones in each second.
    pub per_second: u32,
}

/// What the agent needs of an allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allocation {
    /// Labels that the nodes of each site carry (see [`gateway::label`]), in the order of the sites' names.
    pub sites: Vec<Vec<u64>>,
    /// Their names, in the same order.
    pub site_names: Vec<String>,
    /// Time-outs of its flows.
    pub timeouts: Timeouts,
    /// Ports that may rest at a time on a node.
    pub max_resting: u32,
    /// What one pod may take; 0 = no limit.
    pub per_pod: Most,
    /// Slices of each address that may be used.
    pub slices: SliceSet,
    /// Slices of each address that a node can grow to.
    pub per_node_max: u32,
}

fn seconds(time: Option<&Time>) -> Seconds {
    time.map_or(0, |time| time.0.as_second())
}

fn text(value: Option<&String>) -> String {
    value.cloned().unwrap_or_default()
}

fn created(metadata: &ObjectMeta) -> Seconds {
    seconds(metadata.creation_timestamp.as_ref())
}

/// Reads a Pod.
pub fn pod(pod: &Pod) -> PodRecord {
    // Labels of the namespace come with the watch of namespaces.
    let policy::Pod {
        account, name, uid, labels, service_account, addresses, host_network, conditions, ..
    } = rules::pod(pod);
    let annotation = pod.metadata.annotations.as_ref().and_then(|all| all.get(STATIC_UID));
    PodRecord {
        kubelet_uid: annotation.cloned().unwrap_or_else(|| uid.clone()),
        account,
        name,
        uid,
        labels,
        service_account,
        addresses,
        host_network,
        created: created(&pod.metadata),
        finished: rules::is_finished(pod),
        conditions,
    }
}

/// Reads a Node.
pub fn node(node: &Node) -> NodeRecord {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for address in rules::node_addresses(node) {
        match address {
            IpAddr::V4(address) => v4.push(address),
            IpAddr::V6(address) => v6.push(address),
        }
    }
    NodeRecord {
        uid: text(node.metadata.uid.as_ref()),
        pod_ranges: rules::pod_ranges(node),
        addresses: v4,
        addresses6: v6,
        place: rules::place(node),
        labels: labels(node.metadata.labels.iter().flatten()).collect(),
        draining: is_draining(node),
        lost: is_lost(node),
        facts: None,
    }
}

fn is_draining(node: &Node) -> bool {
    let spec = node.spec.as_ref();
    let taints = spec.and_then(|spec| spec.taints.as_ref()).into_iter().flatten();
    let mut keys = taints.map(|taint| taint.key.as_str());
    node.metadata.deletion_timestamp.is_some()
        || spec.and_then(|spec| spec.unschedulable) == Some(true)
        || keys.any(|key| key == OUT_OF_SERVICE)
}

/// A node that has no such condition, as when it has just joined, is not lost.
fn is_lost(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status != "True")
}

/// Reads an EgressNode.
pub fn report(object: &EgressNode) -> Report {
    let Some(status) = object.status.as_ref() else { return Report::default() };
    let loads = status.demand.iter().map(|demand| {
        let AllocationRef { namespace, name } = &demand.allocation;
        let name = AllocationName { account: namespace.clone(), name: name.clone() };
        (name, Load::of(demand.fill_percent, demand.refused))
    });
    Report {
        tunnel: status.tunnel_address.parse().ok(),
        loads: loads.filter(|(_, load)| *load > Load::Easy).collect(),
        leaving: status.leaving,
    }
}

fn labels<'a>(labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> impl Iterator<Item = u64> {
    labels.into_iter().map(|(key, value)| gateway::label(key, value))
}

impl Allocation {
    /// Place of a node's site among the names of the sites. Without sites all nodes are one.
    pub fn site_of(&self, node: &NodeRecord) -> usize {
        let belongs = |site: &Vec<u64>| site.iter().all(|label| node.labels.contains(label));
        self.sites.iter().position(belongs).unwrap_or(self.sites.len())
    }
}

/// Reads an EgressAllocation.
pub fn allocation(object: &EgressAllocation) -> (AllocationName, Allocation) {
    let name = AllocationName {
        account: text(object.metadata.namespace.as_ref()),
        name: text(object.metadata.name.as_ref()),
    };
    let timeouts = &object.spec.timeouts;
    let timeouts = Timeouts {
        tcp_established: timeouts.tcp_established_seconds,
        tcp_transitory: timeouts.tcp_transitory_seconds,
        tcp_closed: timeouts.tcp_closed_seconds,
        udp: timeouts.udp_seconds,
        icmp: timeouts.icmp_seconds,
        rest: timeouts.rest_seconds,
    };
    let max_resting = object.spec.timeouts.max_resting_ports.unwrap_or(ANY_NUMBER);
    let by_name: BTreeMap<&String, _> =
        object.spec.sites.iter().map(|site| (&site.name, &site.node_selector)).collect();
    let (site_names, sites) =
        by_name.into_iter().map(|(name, selector)| (name.clone(), labels(selector).collect())).unzip();
    let ports = &object.spec.ports;
    let slice = |port: u32| u8::try_from(port / slice::PORTS).unwrap_or(slice::LAST);
    let slices = SliceSet::range(slice(ports.first).max(slice::FIRST), slice(ports.last));
    let per_node_max = ports.per_node.max;
    let per_pod = object.spec.limits.per_pod.as_ref().map_or(Most::default(), |limits| Most {
        flows: limits.flows.unwrap_or_default(),
        per_second: limits.new_flows_per_second.unwrap_or_default(),
    });
    (name, Allocation { sites, site_names, timeouts, max_resting, per_pod, slices, per_node_max })
}

/// Reads an EgressAddress.
pub fn address(object: &EgressAddress) -> Result<Address, FieldError> {
    let spec = &object.spec;
    let slice =
        |field, value: u32| u8::try_from(value).map_err(|_| wrong(field, &value.to_string(), "at most 255"));
    let holdings: Result<Vec<Holding>, FieldError> = spec
        .holdings
        .iter()
        .map(|holding| {
            Ok(Holding {
                first: slice("spec.holdings.first", holding.first)?,
                last: slice("spec.holdings.last", holding.last)?,
                node: holding.node.clone(),
                epoch: holding.epoch,
                state: match holding.state {
                    HoldingState::Held => State::Held,
                    HoldingState::Draining => State::Draining,
                    HoldingState::Quarantined => State::Quarantined {
                        until: holding.until.as_ref().map_or(Seconds::MAX, |t| seconds(Some(t))),
                    },
                },
            })
        })
        .collect();
    Ok(Address {
        address: spec
            .address
            .parse()
            .map_err(|_| wrong("spec.address", &spec.address, "an IPv4 address or a /64"))?,
        prefix: spec.prefix.clone(),
        allocation: AllocationName {
            account: spec.allocation_ref.namespace.clone(),
            name: spec.allocation_ref.name.clone(),
        },
        epoch: spec.epoch,
        holdings: holdings?,
        fence: spec.fence.map(|fence| Fence { after: fence.after_seconds.into(), epoch: fence.epoch }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn node_with(heartbeat: &str, ready: &str) -> Node {
        let conditions: Value =
            json!([{"type": "Ready", "status": ready, "lastHeartbeatTime": heartbeat, "reason": "x"}]);
        let object = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": "n", "labels": {"attested": "yes"}, "resourceVersion": heartbeat},
            "status": {"conditions": conditions},
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn a_heartbeat_changes_nothing_that_policies_ask_for() {
        let before = rules::node_facts(&node_with("2026-11-01T00:00:00Z", "True"));
        assert_eq!(before.labels["attested"], "yes");
        assert_eq!(before.conditions["Ready"], "True");
        assert_eq!(before, rules::node_facts(&node_with("2026-11-01T00:05:00Z", "True")));
        assert_ne!(before, rules::node_facts(&node_with("2026-11-01T00:05:00Z", "Unknown")));
    }

    #[test]
    fn a_pod_is_read_with_its_conditions() {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "shop"},
            "status": {"conditions": [{"type": "Ready", "status": "False"}]},
        });
        let pod = pod(&serde_json::from_value(object).unwrap());
        assert_eq!(pod.conditions, [("Ready".to_owned(), "False".to_owned())].into());
    }
}
