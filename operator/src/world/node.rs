//! Nodes: the Node object says that it exists, the `EgressNode` of the same name what its agent does.

use super::Problem;
use crate::object::Target;
use crate::watch::{Snapshot, by_name};
use aegis_core::model::{AllocationName, Lease, Node, Programmed};
use aegis_core::slice::SliceSet;
use aegis_crds::{EgressNode, EgressNodeStatus, ProgrammedAddress, type_};
use ipnet::Ipv4Net;
use k8s_openapi::api::core::v1::Node as KubeNode;
use kube::{Resource, ResourceExt};
use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;

/// Taint by which an administrator vouches that a node is powered off: what it held may be given to others.
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// What the API server itself says of a node that the local copies do not have, or call out of service.
#[derive(Clone, Debug)]
pub enum Presence {
    /// It does not exist.
    Gone,
    /// It exists.
    There(Box<KubeNode>),
    /// The API server did not answer.
    Unknown,
}

/// All nodes, in the order of their names. A node without a report, or with one that cannot be read, is there all
/// the same: it is not ready, and keeps what it holds.
pub fn models(snapshot: &Snapshot, problems: &mut Vec<Problem>) -> Vec<Node> {
    let reports = by_name(&snapshot.egress_nodes);
    let epochs = epochs(snapshot);
    let mut nodes: Vec<Node> = Vec::new();
    for object in &snapshot.nodes {
        let report = reports.get(&object.name_any()).copied();
        nodes.extend(match &object.0 {
            Ok(node) => {
                let ready = is_ready(node, report, snapshot.has_agent(&object.name_any()));
                model(node, report, ready, &epochs, problems)
            }
            Err(_) => {
                let metadata = object.meta().clone();
                model(&KubeNode { metadata, ..KubeNode::default() }, report, false, &epochs, problems)
            }
        });
    }
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    nodes
}

/// A node as the API server has it: not ready, since the copies do not show it yet; nothing if it is out of service.
pub fn confirmed(node: &KubeNode, snapshot: &Snapshot, problems: &mut Vec<Problem>) -> Option<Node> {
    let report = by_name(&snapshot.egress_nodes).get(&node.name_any()).copied();
    model(node, report, false, &epochs(snapshot), problems)
}

/// Epochs of the addresses that stand.
fn epochs(snapshot: &Snapshot) -> HashMap<&str, i64> {
    let objects = snapshot.addresses.iter().filter_map(|object| object.0.as_ref().ok());
    objects.map(|object| (object.spec.address.as_str(), object.spec.epoch)).collect()
}

fn model(
    node: &KubeNode,
    report: Option<&EgressNode>,
    ready: bool,
    epochs: &HashMap<&str, i64>,
    problems: &mut Vec<Problem>,
) -> Option<Node> {
    if is_out_of_service(node) {
        return None;
    }
    let name = node.name_any();
    let status = report.and_then(|report| report.status.as_ref());
    Some(Node {
        labels: node.labels().clone(),
        addresses: addresses(node),
        pod_ranges: pod_ranges(node),
        ready,
        demand: status.map(demand).unwrap_or_default(),
        programmed: status
            .map(|status| programmed(status, &name, report, epochs, problems))
            .unwrap_or_default(),
        lease: Lease::Free,
        name,
    })
}

fn addresses(node: &KubeNode) -> Vec<Ipv4Addr> {
    let addresses = node.status.iter().filter_map(|status| status.addresses.as_ref()).flatten();
    let own = addresses.filter(|it| matches!(it.type_.as_str(), "InternalIP" | "ExternalIP"));
    own.filter_map(|it| it.address.parse().ok()).collect()
}

fn pod_ranges(node: &KubeNode) -> Vec<Ipv4Net> {
    let spec = node.spec.iter();
    let ranges = spec.flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr));
    let mut ranges: Vec<Ipv4Net> = ranges.filter_map(|range| range.parse().ok()).collect();
    ranges.dedup();
    ranges
}

/// Whether new slices may be given to the node: its agent says that it is ready to forward, and the cluster has not
/// lost the node.
pub fn is_ready(node: &KubeNode, report: Option<&EgressNode>, has_agent: bool) -> bool {
    node.metadata.deletion_timestamp.is_none()
        && !is_out_of_service(node)
        && !is_lost(node)
        && agent_state(report, has_agent).is_ok()
}

/// Why the agent of a node is not ready, in a few words.
pub fn agent_state(report: Option<&EgressNode>, has_agent: bool) -> Result<(), String> {
    if !has_agent {
        return Err("its agent's pod is gone or not ready".to_owned());
    }
    let Some(status) = report.and_then(|report| report.status.as_ref()) else {
        return Err("its agent has not reported".to_owned());
    };
    match status.conditions.iter().find(|condition| condition.type_ == type_::READY) {
        Some(ready) if ready.status != "True" => Err(format!("its agent is not ready: {}", ready.message)),
        None => Err("its agent is starting".to_owned()),
        Some(_) if status.tunnel_address.parse::<Ipv4Addr>().is_err() => {
            Err("its agent has no tunnel address".to_owned())
        }
        Some(_) => Ok(()),
    }
}

fn is_out_of_service(node: &KubeNode) -> bool {
    let taints = node.spec.iter().filter_map(|spec| spec.taints.as_ref()).flatten();
    taints.into_iter().any(|taint| taint.key == OUT_OF_SERVICE)
}

/// The cluster says that the node is not ready, or has not heard of it for long. No condition at all is no verdict.
fn is_lost(node: &KubeNode) -> bool {
    let conditions = node.status.iter().filter_map(|status| status.conditions.as_ref()).flatten();
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status != "True")
}

fn demand(status: &EgressNodeStatus) -> BTreeMap<AllocationName, u32> {
    let wanted = status.demand.iter().map(|demand| {
        let name = &demand.allocation;
        (AllocationName { account: name.namespace.clone(), name: name.name.clone() }, demand.slices)
    });
    wanted.collect()
}

/// What planning can learn from: thousands of nodes with a thousand addresses each say little else than that they have what
/// stands, or do not have it yet, and that would be most of what a plan is made from.
fn programmed(
    status: &EgressNodeStatus,
    node: &str,
    report: Option<&EgressNode>,
    epochs: &HashMap<&str, i64>,
    problems: &mut Vec<Problem>,
) -> BTreeMap<Ipv4Addr, Programmed> {
    let plain = |entry: &&ProgrammedAddress| {
        let stands = epochs.get(entry.address.as_str()).is_some_and(|epoch| entry.epoch <= *epoch);
        stands && !entry.fenced && entry.drained.is_empty()
    };
    let entries = status.addresses.iter().filter(|entry| !plain(entry)).filter_map(|entry| {
        match entry.address.parse() {
            Ok(address) => Some((
                address,
                Programmed { epoch: entry.epoch, drained: drained(entry), fenced: entry.fenced },
            )),
            Err(_) => {
                problems.extend(report.map(|report| Problem {
                    target: Target::of::<EgressNode>(report.meta()),
                    generation: report.meta().generation,
                    message: format!("status.addresses of {node}: {:?} is no IPv4 address", entry.address),
                }));
                None
            }
        }
    });
    entries.collect()
}

fn drained(entry: &ProgrammedAddress) -> SliceSet {
    let slices = entry.drained.iter().flat_map(|range| range.first..=range.last.min(255));
    slices.filter_map(|slice| u8::try_from(slice).ok()).collect()
}
