//! What to tell the owners of allocations and prefixes.

use super::addresses::Assignment;
use super::holdings::Share;
use super::{AllocationOutcome, PrefixOutcome, Verdict};
use crate::model::{Address, Allocation, AllocationName, Inputs};
use crate::prefix::{Pool, Prefixes};
use crate::reason;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

pub(super) fn allocations(
    inputs: &Inputs,
    mut assignments: BTreeMap<AllocationName, Assignment>,
    mut shares: BTreeMap<AllocationName, Share>,
    planned: &[Address],
) -> BTreeMap<AllocationName, AllocationOutcome> {
    let mut addresses: BTreeMap<&AllocationName, Vec<Ipv4Addr>> = BTreeMap::new();
    for address in planned {
        addresses.entry(&address.allocation).or_default().push(address.address);
    }
    let mut outcomes = BTreeMap::new();
    for allocation in &inputs.allocations {
        let Some(assignment) = assignments.remove(&allocation.name) else { continue };
        let share = shares.remove(&allocation.name).unwrap_or_default();
        let addresses = addresses.remove(&allocation.name).unwrap_or_default();
        let outcome = AllocationOutcome {
            allocated: allocated(allocation, &assignment, &share, &addresses),
            accepted: assignment.accepted,
            finished: allocation.deleting && addresses.is_empty(),
            addresses,
            nodes: share.nodes,
        };
        outcomes.insert(allocation.name.clone(), outcome);
    }
    outcomes
}

fn allocated(
    allocation: &Allocation,
    assignment: &Assignment,
    share: &Share,
    addresses: &[Ipv4Addr],
) -> Verdict {
    if allocation.deleting {
        return Verdict::bad(
            reason::DRAINING,
            match addresses {
                [] => "being deleted, nothing is held any more".to_owned(),
                _ => format!(
                    "being deleted: {} kept until live flows have ended and the ports have rested",
                    plural(addresses.len(), "address is", "addresses are")
                ),
            },
        );
    }
    if let Some(missing) = &assignment.missing {
        return missing.clone();
    }
    if share.nodes.is_empty() && share.all_unready {
        return Verdict::bad(
            reason::NO_NODE,
            "spec.sites: nodes match, but none has a ready agent; see `kubectl get egressnodes`",
        );
    }
    if share.nodes.is_empty() {
        return Verdict::bad(
            reason::NO_NODE,
            "spec.sites: no node matches; change a nodeSelector or label nodes to match it",
        );
    }
    if !share.short.is_empty() {
        return Verdict::bad(
            reason::NO_FREE_SLICE,
            format!(
                "spec.ports.perNode.min: {} ({}) below {} slices of each address, none is free; lower it, widen spec.ports, or use more addresses",
                plural(share.short.len(), "node is", "nodes are"),
                some_of(&share.short),
                allocation.per_node_min
            ),
        );
    }
    Verdict::good(
        reason::ALLOCATED,
        format!(
            "{} on {}",
            plural(assignment.wanted.len(), "address", "addresses"),
            plural(share.nodes.len(), "node", "nodes")
        ),
    )
}

pub(super) fn prefixes(prefixes: &Prefixes, planned: &[Address]) -> BTreeMap<String, PrefixOutcome> {
    let mut used: BTreeMap<&str, u32> = BTreeMap::new();
    for address in planned {
        *used.entry(&address.prefix).or_default() += 1;
    }
    let outcome = |name: &str, capacity, accepted: &Verdict| {
        let used = used.get(name).copied().unwrap_or(0);
        PrefixOutcome { accepted: accepted.clone(), capacity, used, in_use: used > 0 }
    };
    prefixes
        .iter()
        .map(|judged| {
            let name = &judged.prefix.name;
            (name.clone(), outcome(name, Pool::new(judged.prefix).capacity(), &judged.accepted))
        })
        .collect()
}

fn plural(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// The first names; a condition's message must stay short however many nodes there are.
fn some_of(names: &BTreeSet<String>) -> String {
    let first: Vec<&str> = names.iter().take(3).map(String::as_str).collect();
    let dots = if names.len() > first.len() { ", ..." } else { "" };
    format!("{}{dots}", first.join(", "))
}
