//! What to tell the owners of allocations and prefixes.

use super::addresses::Assignment;
use super::holdings::Share;
use super::{AllocationOutcome, PrefixOutcome, SiteOutcome, Verdict, plural};
use crate::model::{Address, Allocation, AllocationName, Inputs};
use crate::prefix::{Judged, Pool, Prefixes};
use crate::reason;
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn allocations(
    inputs: &Inputs,
    mut assignments: BTreeMap<AllocationName, Assignment>,
    mut shares: BTreeMap<AllocationName, Share>,
    planned: &[Address],
) -> BTreeMap<AllocationName, AllocationOutcome> {
    let mut addresses: BTreeMap<&AllocationName, usize> = BTreeMap::new();
    for address in planned {
        *addresses.entry(&address.allocation).or_default() += 1;
    }
    let mut outcomes = BTreeMap::new();
    for allocation in &inputs.allocations {
        let Some(assignment) = assignments.remove(&allocation.name) else { continue };
        let share = shares.remove(&allocation.name).unwrap_or_default();
        let addresses = addresses.remove(&allocation.name).unwrap_or_default();
        let outcome = AllocationOutcome {
            allocated: allocated(allocation, &assignment, &share, addresses),
            accepted: assignment.accepted,
            sites: share.sites,
        };
        outcomes.insert(allocation.name.clone(), outcome);
    }
    outcomes
}

fn allocated(allocation: &Allocation, assignment: &Assignment, share: &Share, addresses: usize) -> Verdict {
    if allocation.deleting {
        let withheld = assignment.missing.as_ref().map(|told| format!("being deleted: {}", told.message()));
        return Verdict::bad(
            reason::DRAINING,
            match addresses {
                _ if withheld.is_some() => withheld.unwrap_or_default(),
                0 => "being deleted, nothing is held any more".to_owned(),
                _ => format!(
                    "being deleted: {} kept until live flows have ended and the ports have rested",
                    plural(addresses, "address is", "addresses are")
                ),
            },
        );
    }
    if let Some(missing) = &assignment.missing {
        return missing.clone();
    }
    if share.holders == 0 && share.all_unready {
        return Verdict::bad(
            reason::NO_NODE,
            "spec.sites: nodes match, but none has a ready agent; see `kubectl get egressnodes`",
        );
    }
    if share.holders == 0 && share.no_member {
        return Verdict::bad(
            reason::NO_NODE,
            "spec.sites: no node matches (those that their agents are leaving do not count); change a nodeSelector or label nodes to match it",
        );
    }
    if share.holders == 0 && share.without.count == 0 && share.leaseless.count + share.fenced.count > 0 {
        return Verdict::bad(
            reason::NO_LEASE,
            "spec.fence: no node holds slices, as none holds its Lease (yet); see `kubectl get leases -A -l app.kubernetes.io/component=node-lease`",
        );
    }
    if share.holders == 0 && !assignment.wanted.is_empty() && allocation.per_node_min > 0 {
        return Verdict::bad(
            reason::NO_FREE_SLICE,
            "spec.ports: no node holds a slice, and none is free: those of former holders drain or rest; wait, widen spec.ports, or use more addresses",
        );
    }
    let mut message = format!(
        "{} on {}",
        plural(assignment.wanted.len(), "address", "addresses"),
        plural(share.holders, "node", "nodes")
    );
    if !assignment.wanted.is_empty() {
        message += &without(share);
        message += &fenced(share);
        message += &sites(allocation, share);
    }
    message += &foreign(assignment);
    Verdict::good(reason::ALLOCATED, message)
}

/// Nodes without slices of their own: no fault, but whoever wants it otherwise has to know how.
fn without(share: &Share) -> String {
    let mut told = Vec::new();
    if share.without.count > 0 {
        let verbs =
            if share.without.count == 1 { "has no slice and sends" } else { "have no slice and send" };
        told.push(format!("{} {verbs} through others", share.without));
    }
    if share.below.count > 0 {
        let verb = if share.below.count == 1 { "has" } else { "have" };
        told.push(format!("{} {verb} fewer than spec.ports.perNode.min", share.below));
    }
    if told.is_empty() {
        return String::new();
    }
    format!(
        "; {}, as no slice is free: use more addresses, lower spec.ports.perNode.min for nodes to come, or widen spec.ports",
        told.join(", ")
    )
}

/// Nodes that lost what they held, or get nothing, as they do not renew their Lease.
fn fenced(share: &Share) -> String {
    let mut told = String::new();
    if share.fenced.count > 0 {
        let verbs = if share.fenced.count == 1 { "is" } else { "are" };
        told += &format!("; {} {verbs} fenced: the slices there go to others", share.fenced);
    }
    if share.leaseless.count > 0 {
        let verbs = if share.leaseless.count == 1 {
            "does not hold its Lease and gets"
        } else {
            "do not hold their Leases and get"
        };
        told += &format!("; {} {verbs} no slices", share.leaseless);
    }
    told
}

/// Sites whose share of the slices is of no use, or too small. Without a second site there is no share.
fn sites(allocation: &Allocation, share: &Share) -> String {
    if share.sites.len() < 2 {
        return String::new();
    }
    let told = share.sites.iter().filter_map(|site| {
        let (name, quota) = (&site.name, plural(site.quota as usize, "slice", "slices"));
        Some(match site {
            SiteOutcome { nodes: 0, .. } => format!(
                "; spec.sites {name:?}: no node matches, so that its {quota} of each address are not used; change its nodeSelector, label nodes to match it, or remove it"
            ),
            SiteOutcome { usable: 0, .. } => format!(
                "; spec.sites {name:?}: nodes match, but none has a ready agent; see `kubectl get egressnodes`"
            ),
            SiteOutcome { usable, quota: share, short: true, .. }
                if *share < usable.saturating_mul(allocation.per_node_min) =>
            {
                format!(
                    "; spec.sites {name:?}: its weight gives it {quota} of each address, which are fewer than spec.ports.perNode.min ({}) for each of its {usable} ready nodes; raise its weight, lower spec.ports.perNode.min, or use more addresses",
                    allocation.per_node_min
                )
            }
            _ => return None,
        })
    });
    told.collect()
}

/// Addresses of prefixes that `spec.prefixes` no longer names stay: partners know them.
fn foreign(assignment: &Assignment) -> String {
    let count = assignment.foreign.len();
    let Some(first) = assignment.foreign.first() else { return String::new() };
    let (dots, verbs) = if count > 1 {
        (", ...", "are not of spec.prefixes and stay")
    } else {
        ("", "is not of spec.prefixes and stays")
    };
    format!(
        "; {} ({first}{dots}) {verbs} in use: to replace one, raise spec.addresses.ipv4, hand the new address to your partners, and lower it again",
        plural(count, "address", "addresses"),
    )
}

pub(super) fn prefixes(prefixes: &Prefixes, planned: &[Address]) -> BTreeMap<String, PrefixOutcome> {
    let mut used: BTreeMap<&str, Vec<&AllocationName>> = BTreeMap::new();
    for address in planned {
        used.entry(&address.prefix).or_default().push(&address.allocation);
    }
    let none = Vec::new();
    let outcome = |judged: &Judged| {
        let holders = used.get(judged.prefix.name.as_str()).unwrap_or(&none);
        let accepted = match &judged.accepted {
            Verdict::Bad { reason, message } if judged.prefix.deleting => {
                Verdict::bad(reason, format!("{message}{}", holding_up(holders)))
            }
            other => other.clone(),
        };
        PrefixOutcome {
            accepted,
            capacity: Pool::new(judged).capacity(),
            used: u32::try_from(holders.len()).unwrap_or(u32::MAX),
        }
    };
    prefixes.iter().map(|judged| (judged.prefix.name.clone(), outcome(judged))).collect()
}

/// Whose addresses keep a prefix that is being deleted.
fn holding_up(holders: &[&AllocationName]) -> String {
    let distinct: BTreeSet<&AllocationName> = holders.iter().copied().collect();
    if distinct.is_empty() {
        return String::new();
    }
    let first: Vec<String> =
        distinct.iter().take(3).map(|it| format!("{}/{}", it.account, it.name)).collect();
    let dots = if distinct.len() > first.len() { ", ..." } else { "" };
    format!(
        "; {} ({}{dots}): delete them, or let them take addresses of another prefix",
        plural(
            distinct.len(),
            "EgressAllocation has addresses of it",
            "EgressAllocations have addresses of it"
        ),
        first.join(", ")
    )
}
