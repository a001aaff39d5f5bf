//! Policy: from bindings and pods to the tables that a node's data plane looks up.
//!
//! IPv4 and IPv6 have tables of their own for pods and destinations, but classes in common, so that there is one table of verdicts.
//!
//! A packet costs three look-ups (pod -> class, destination -> class, port -> class) and one of the verdict for the
//! three classes. Everything that takes thought (which binding wins) is done here, once for each combination of
//! classes; a combination without a verdict passes with the node's address.

mod ports;

use crate::egress::Family;
use crate::model::AllocationName;
use ipnet::IpNet;
use ports::PortClasses;
pub use ports::{PortPrefix, PortRange};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Namespace and name of a `ZoneBinding`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BindingName {
    /// Namespace, which is the account.
    pub account: String,
    /// Name.
    pub name: String,
}

/// A `ZoneBinding`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Name.
    pub name: BindingName,
    /// Allocation to leave from.
    pub allocation: AllocationName,
    /// Switched on.
    pub enabled: bool,
    /// Which pods of the account.
    pub workloads: Workloads,
    /// Which destinations.
    pub cidrs: Vec<IpNet>,
    /// Which destination ports; empty = all, and other protocols too.
    pub ports: Vec<PortRange>,
    /// While the allocation is not usable on this node, leave with the node's address instead of being refused.
    pub use_node_address: bool,
    /// `metadata.generation`; no part of the rules, it is what the agent reports as enforced.
    pub generation: i64,
}

/// Which pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workloads {
    /// Labels that the pod carries.
    pub labels: BTreeMap<String, String>,
    /// Further conditions on its labels.
    pub expressions: Vec<Expression>,
    /// Service accounts, one of which it runs as; empty = any.
    pub service_accounts: Vec<String>,
    /// All pods of the account.
    pub all: bool,
}

/// A condition on labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expression {
    /// Key of the label.
    pub key: String,
    /// What is asked of it.
    pub operator: Operator,
    /// Values for `In` and `NotIn`.
    pub values: Vec<String>,
}

/// Operator of an [`Expression`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// The label has one of the values.
    In,
    /// The label is missing or has none of the values.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is missing.
    DoesNotExist,
}

/// A pod of this node that runs (one that has ended no longer owns its address and must be left out).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Namespace, which is the account.
    pub account: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Service account that it runs as.
    pub service_account: String,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// Has the node's addresses, not one of its own.
    pub host_network: bool,
}

/// What a node's policy is made from. Order does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyInputs {
    /// All bindings.
    pub bindings: Vec<Binding>,
    /// The pods of this node.
    pub pods: Vec<Pod>,
    /// Ranges inside the cluster (pods, services, nodes): never covered.
    pub internal: Vec<IpNet>,
    /// Allocations that this node can send from over IPv4.
    pub usable: BTreeSet<AllocationName>,
    /// Those that it can send from over IPv6.
    pub usable6: BTreeSet<AllocationName>,
}

/// Most entries that each table of a [`NodePolicy`] may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// `destinations`, of each family.
    pub destinations: usize,
    /// `ports`.
    pub ports: usize,
    /// `verdicts`.
    pub verdicts: usize,
}

impl Default for Room {
    /// Room for everything.
    fn default() -> Room {
        Room { destinations: usize::MAX, ports: usize::MAX, verdicts: usize::MAX }
    }
}

/// What a node must enforce.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePolicy {
    /// Class of each local pod address; 0 = no binding covers it.
    pub pods: BTreeMap<IpAddr, u32>,
    /// Class of each pod of the host network, which has no address of its own, by its UID.
    pub hosts: BTreeMap<String, u32>,
    /// Longest-prefix table of destinations; no match = not covered.
    pub destinations: BTreeMap<IpNet, Destination>,
    /// Longest-prefix table of destination ports; no match (and ICMP) = class 0.
    pub ports: BTreeMap<PortPrefix, u32>,
    /// What happens, by pod, destination and port class; no entry = pass. `Pass` is present only where it stands in
    /// the way of another binding that would cover the packet.
    pub verdicts: BTreeMap<(u32, u32, u32), Action>,
    /// Enabled bindings by name; the index is the binding's number.
    pub bindings: Vec<BindingName>,
    /// Local pods that each enabled binding covers.
    pub covered: BTreeMap<BindingName, u32>,
}

/// What a destination is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Inside the cluster.
    Internal,
    /// In zones; the class is at least 1.
    Class(u32),
}

/// What happens to a new flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// It leaves with the node's address.
    Pass,
    /// It leaves from an address of the allocation.
    Allocate {
        /// The allocation.
        allocation: AllocationName,
        /// Number of the binding that says so.
        binding: usize,
    },
    /// It is refused: the allocation has nothing to leave from on this node.
    Deny {
        /// Number of the binding that says so.
        binding: usize,
    },
}

/// Compiles. Of the bindings that cover a packet the one with the longest matching range counts, then the first by
/// name.
pub fn compile(inputs: &PolicyInputs) -> NodePolicy {
    compile_within(inputs, &Room::default()).unwrap_or_default()
}

/// Compiles; `None` if it does not fit. A table that is too large is not made first.
pub fn compile_within(inputs: &PolicyInputs, room: &Room) -> Option<NodePolicy> {
    let mut bindings: Vec<&Binding> = inputs.bindings.iter().filter(|binding| binding.enabled).collect();
    bindings.sort_by(|a, b| a.name.cmp(&b.name));
    let mut policy = NodePolicy {
        bindings: bindings.iter().map(|binding| binding.name.clone()).collect(),
        covered: bindings.iter().map(|binding| (binding.name.clone(), 0)).collect(),
        ..NodePolicy::default()
    };

    let pod_classes = classify_pods(inputs, &bindings, &mut policy);
    // Only bindings with a pod on this node take up room in its tables.
    let here: BTreeSet<usize> = pod_classes.iter().flatten().copied().collect();
    let destinations = classify_destinations(inputs, &bindings, &here, &mut policy);
    let ports = PortClasses::new(here.iter().map(|number| (*number, bindings[*number].ports.as_slice())));
    policy.ports = ports.prefixes();
    let six = policy.destinations.keys().filter(|range| Family::of(range) == Family::V6).count();
    if six.max(policy.destinations.len() - six) > room.destinations || policy.ports.len() > room.ports {
        return None;
    }

    for (pod_class, members) in (1..).zip(&pod_classes) {
        for (destination, destination_class) in &destinations {
            let mut candidates: Vec<(Reverse<u8>, usize)> = members
                .iter()
                .filter_map(|number| {
                    Some((Reverse(longest(&bindings[*number].cidrs, destination)?), *number))
                })
                .collect();
            candidates.sort_unstable();
            for port_class in 0..=ports.count() {
                let mut matching = candidates
                    .iter()
                    .map(|(_, number)| *number)
                    .filter(|number| bindings[*number].ports.is_empty() || ports.has(port_class, *number))
                    .peekable();
                let Some(winner) = matching.peek().copied() else { continue };
                let family = Family::of(destination);
                if matching.any(|number| !passes(inputs, bindings[number], family)) {
                    let action = action(inputs, bindings[winner], winner, family);
                    policy.verdicts.insert((pod_class, *destination_class, port_class), action);
                    if policy.verdicts.len() > room.verdicts {
                        return None;
                    }
                }
            }
        }
    }
    Some(policy)
}

/// Fills `pods`, `hosts` and `covered`. Pods with the same bindings share a class; gives the bindings of class 1, 2, ...
fn classify_pods(inputs: &PolicyInputs, bindings: &[&Binding], policy: &mut NodePolicy) -> Vec<Vec<usize>> {
    let mut by_account: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (number, binding) in bindings.iter().enumerate() {
        by_account.entry(&binding.name.account).or_default().push(number);
    }
    let mut pods: Vec<&Pod> = inputs.pods.iter().collect();
    pods.sort_by(|a, b| (&a.account, &a.name, &a.uid).cmp(&(&b.account, &b.name, &b.uid)));
    let members: Vec<Vec<usize>> = pods
        .iter()
        .map(|pod| {
            let of_account = by_account.get(pod.account.as_str()).into_iter().flatten().copied();
            of_account.filter(|number| bindings[*number].workloads.matches(pod)).collect()
        })
        .collect();
    let classes: BTreeSet<&Vec<usize>> = members.iter().filter(|members| !members.is_empty()).collect();
    let numbers: BTreeMap<&Vec<usize>, u32> = classes.iter().copied().zip(1..).collect();
    for (pod, members) in pods.iter().zip(&members) {
        for number in members {
            *policy.covered.entry(bindings[*number].name.clone()).or_default() += 1;
        }
        let class = numbers.get(members).copied().unwrap_or(0);
        if pod.host_network {
            policy.hosts.insert(pod.uid.clone(), class);
            continue;
        }
        for address in &pod.addresses {
            policy.pods.entry(*address).or_insert(class);
        }
    }
    classes.into_iter().cloned().collect()
}

/// Fills `destinations`. Each distinct range of a zone is a class, except those inside the cluster: as the longer
/// ones they would win over the internal range. Gives range and class.
fn classify_destinations(
    inputs: &PolicyInputs,
    bindings: &[&Binding],
    here: &BTreeSet<usize>,
    policy: &mut NodePolicy,
) -> Vec<(IpNet, u32)> {
    let internal: BTreeSet<IpNet> = inputs.internal.iter().map(IpNet::trunc).collect();
    let zones: BTreeSet<IpNet> = here
        .iter()
        .flat_map(|number| &bindings[*number].cidrs)
        .map(IpNet::trunc)
        .filter(|zone| !internal.iter().any(|range| range.contains(zone)))
        .collect();
    let classes: Vec<(IpNet, u32)> = zones.into_iter().zip(1..).collect();
    policy.destinations.extend(internal.into_iter().map(|range| (range, Destination::Internal)));
    policy.destinations.extend(classes.iter().map(|(zone, class)| (*zone, Destination::Class(*class))));
    classes
}

/// Length of the longest of the ranges that contain the whole destination. A packet whose longest match is
/// `destination` is in exactly these ranges.
fn longest(cidrs: &[IpNet], destination: &IpNet) -> Option<u8> {
    cidrs
        .iter()
        .map(IpNet::trunc)
        .filter(|cidr| cidr.contains(destination))
        .map(|cidr| cidr.prefix_len())
        .max()
}

/// Whether what the binding covers leaves with the node's address, since there is nothing else to leave from.
fn passes(inputs: &PolicyInputs, binding: &Binding, family: Family) -> bool {
    binding.use_node_address && !inputs.is_usable(&binding.allocation, family)
}

impl PolicyInputs {
    fn is_usable(&self, allocation: &AllocationName, family: Family) -> bool {
        match family {
            Family::V4 => self.usable.contains(allocation),
            Family::V6 => self.usable6.contains(allocation),
        }
    }
}

fn action(inputs: &PolicyInputs, binding: &Binding, number: usize, family: Family) -> Action {
    if inputs.is_usable(&binding.allocation, family) {
        Action::Allocate { allocation: binding.allocation.clone(), binding: number }
    } else if passes(inputs, binding, family) {
        Action::Pass
    } else {
        Action::Deny { binding: number }
    }
}
