//! Nodes: the Node object says that it exists, the `EgressNode` of the same name what its agent does.

use super::Problem;
use crate::agents::AgentPod;
use crate::object::Target;
use crate::report::{self, Report, ReportStatus};
use crate::snapshot::{Snapshot, by_name};
use aegis_core::egress::Egress;
use aegis_core::model::{AllocationName, Lease, Node, Programmed};
use aegis_crds::type_;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node as KubeNode;
use kube::{Resource, ResourceExt};
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr};

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
    let mut news = News::of(snapshot);
    let mut nodes: Vec<Node> = Vec::new();
    for object in &snapshot.nodes {
        let report = reports.get(&object.name_any()).copied();
        nodes.extend(match &object.0 {
            Ok(node) => {
                let agent = snapshot.agent(&object.name_any());
                let standing = (is_ready(node, report, agent), is_leaving(report, agent));
                model(node, report, standing, &mut news, problems)
            }
            Err(_) => {
                let metadata = object.meta().clone();
                let unread = KubeNode { metadata, ..KubeNode::default() };
                model(&unread, report, (false, false), &mut news, problems)
            }
        });
    }
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    nodes
}

/// A node as the API server has it: not ready, since the copies do not show it yet; nothing if it is out of service.
pub fn confirmed(node: &KubeNode, snapshot: &Snapshot, problems: &mut Vec<Problem>) -> Option<Node> {
    let report = by_name(&snapshot.egress_nodes).get(&node.name_any()).copied();
    let leaving = is_leaving(report, snapshot.agent(&node.name_any()));
    model(node, report, (false, leaving), &mut News::of(snapshot), problems)
}

/// What planning can learn from, of the lists that reports have in common: thousands of nodes with a thousand addresses each
/// say little else than that they have what stands, or do not have it yet, and that would be most of what a plan is made from.
struct News {
    /// Epochs of the addresses that stand.
    epochs: HashMap<Egress, i64>,
    /// By list.
    found: HashMap<*const report::Programmed, Vec<report::Programmed>>,
}

impl News {
    fn of(snapshot: &Snapshot) -> News {
        let objects = snapshot.addresses.iter().filter_map(|object| object.0.as_ref().ok());
        let epochs = objects.filter_map(|it| Some((it.spec.address.parse().ok()?, it.spec.epoch)));
        News { epochs: epochs.collect(), found: HashMap::new() }
    }

    fn within(&mut self, list: &[report::Programmed]) -> &[report::Programmed] {
        let News { epochs, found } = self;
        let plain = |entry: &report::Programmed| {
            !entry.fenced && epochs.get(&entry.address).is_some_and(|epoch| entry.epoch <= *epoch)
        };
        found.entry(list.as_ptr()).or_insert_with(|| list.iter().filter(|it| !plain(it)).copied().collect())
    }
}

fn model(
    node: &KubeNode,
    report: Option<&Report>,
    (ready, leaving): (bool, bool),
    news: &mut News,
    problems: &mut Vec<Problem>,
) -> Option<Node> {
    if is_out_of_service(node) {
        return None;
    }
    let name = node.name_any();
    let status = report.and_then(|report| report.status.as_ref());
    problems.extend(report.iter().flat_map(|report| unreadable(report)));
    Some(Node {
        labels: node.labels().clone(),
        addresses: addresses(node),
        pod_ranges: pod_ranges(node),
        ready,
        leaving,
        demand: status.map(demand).unwrap_or_default(),
        programmed: status.map(|status| programmed(status, news)).unwrap_or_default(),
        lease: Lease::Free,
        name,
    })
}

fn addresses(node: &KubeNode) -> Vec<IpAddr> {
    let addresses = node.status.iter().filter_map(|status| status.addresses.as_ref()).flatten();
    let own = addresses.filter(|it| matches!(it.type_.as_str(), "InternalIP" | "ExternalIP"));
    own.filter_map(|it| it.address.parse().ok()).collect()
}

fn pod_ranges(node: &KubeNode) -> Vec<IpNet> {
    let spec = node.spec.iter();
    let ranges = spec.flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr));
    let mut ranges: Vec<IpNet> = ranges.filter_map(|range| range.parse().ok()).collect();
    ranges.sort_unstable();
    ranges.dedup();
    ranges
}

/// Whether new slices may be given to the node: its agent says that it is ready to forward, and the cluster has not
/// lost the node.
pub fn is_ready(node: &KubeNode, report: Option<&Report>, agent: AgentPod) -> bool {
    node.metadata.deletion_timestamp.is_none()
        && !is_out_of_service(node)
        && !is_lost(node)
        && agent_state(report, agent).is_ok()
}

/// Whether the agent waits for the node's slices to be empty. What it said last does not count once its pod is gone: nobody
/// would tell that they are.
fn is_leaving(report: Option<&Report>, agent: AgentPod) -> bool {
    let status = report.and_then(|report| report.status.as_ref());
    agent != AgentPod::Missing && status.is_some_and(|status| status.told.leaving)
}

/// Why the agent of a node is not ready, in a few words.
pub fn agent_state(report: Option<&Report>, agent: AgentPod) -> Result<(), String> {
    if is_leaving(report, agent) {
        return Err(
            "its agent is being taken off the node, and ends when the node's slices are empty".to_owned()
        );
    }
    if agent != AgentPod::Ready {
        return Err("its agent's pod is gone or not ready".to_owned());
    }
    let Some(status) = report.and_then(|report| report.status.as_ref()) else {
        return Err("its agent has not reported".to_owned());
    };
    let told = &status.told;
    match told.conditions.iter().find(|condition| condition.type_ == type_::READY) {
        Some(ready) if ready.status != "True" => Err(format!("its agent is not ready: {}", ready.message)),
        None => Err("its agent is starting".to_owned()),
        Some(_) if told.tunnel_address.parse::<Ipv4Addr>().is_err() => {
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

fn demand(status: &ReportStatus) -> BTreeMap<AllocationName, u32> {
    let wanted = status.told.demand.iter().map(|demand| {
        let name = &demand.allocation;
        (AllocationName { account: name.namespace.clone(), name: name.name.clone() }, demand.slices)
    });
    wanted.collect()
}

fn programmed(status: &ReportStatus, news: &mut News) -> BTreeMap<Egress, Programmed> {
    let drained = status.drained.iter().filter_map(|(address, _)| {
        let at = status.addresses.binary_search_by_key(address, |entry| entry.address).ok()?;
        status.addresses.get(at).copied()
    });
    let entries = news.within(&status.addresses).iter().copied().chain(drained);
    let programmed = |entry: report::Programmed| Programmed {
        epoch: entry.epoch,
        drained: status.drained(entry.address),
        fenced: entry.fenced,
    };
    entries.map(|entry| (entry.address, programmed(entry))).collect()
}

fn unreadable(report: &Report) -> impl Iterator<Item = Problem> {
    let texts = report.status.iter().flat_map(|status| &status.unreadable);
    texts.map(|text| Problem {
        target: Target::of::<Report>(report.meta()),
        generation: report.meta().generation,
        message: format!("status.addresses of {}: {text:?} is no address and no IPv6 /64", report.name_any()),
    })
}
