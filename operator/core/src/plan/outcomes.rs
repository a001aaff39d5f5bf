//! What to tell the owners of allocations and prefixes.

use super::addresses::Assignment;
use super::delegated;
use super::holdings::{Share, Shares};
use super::{AllocationOutcome, PrefixOutcome, SiteOutcome, Verdict, plural};
use crate::delegation::Ledger;
use crate::egress::{Egress, Family, Kind};
use crate::model::{Address, Allocation, AllocationName, Inputs};
use crate::prefix::{Judged, Pool, Prefixes};
use crate::reason;
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn allocations(
    inputs: &Inputs,
    mut assignments: BTreeMap<AllocationName, Assignment>,
    mut shares: BTreeMap<AllocationName, Shares>,
    planned: &[Address],
    prefixes: &Prefixes,
    ledger: &Ledger,
) -> BTreeMap<AllocationName, AllocationOutcome> {
    let sources = delegated::sources(planned);
    let none = BTreeSet::new();
    let mut addresses: BTreeMap<&AllocationName, usize> = BTreeMap::new();
    for address in planned {
        *addresses.entry(&address.allocation).or_default() += 1;
    }
    let mut outcomes = BTreeMap::new();
    for allocation in &inputs.allocations {
        let Some(assignment) = assignments.remove(&allocation.name) else { continue };
        let mut shares = shares.remove(&allocation.name).unwrap_or_default();
        let addresses = addresses.remove(&allocation.name).unwrap_or_default();
        let outcome = AllocationOutcome {
            delegated: delegated::allocation(
                allocation,
                sources.get(&allocation.name).unwrap_or(&none),
                prefixes,
                ledger,
            ),
            allocated: allocated(allocation, &assignment, &shares, addresses),
            sites: told_of(&assignment, &mut shares).map(|share| share.sites).unwrap_or_default(),
            accepted: assignment.accepted,
        };
        outcomes.insert(allocation.name.clone(), outcome);
    }
    outcomes
}

/// Whether some address of a kind is to serve.
fn wants(assignment: &Assignment, kind: Kind) -> bool {
    assignment.wanted.iter().any(|address| address.kind() == kind)
}

/// The kind whose sites are told: ports are what runs short. Of one that wants nothing any more, what it has left.
fn told_of(assignment: &Assignment, shares: &mut Shares) -> Option<Share> {
    let order = [Kind::Address, Kind::Single, Kind::Network];
    let wanted = order.into_iter().find(|kind| wants(assignment, *kind) && shares.contains_key(kind));
    let left = || [Kind::Single, Kind::Network].into_iter().find(|kind| shares.contains_key(kind));
    let kind = wanted.or_else(left).unwrap_or(Kind::Address);
    shares.remove(&kind)
}

fn allocated(allocation: &Allocation, assignment: &Assignment, shares: &Shares, addresses: usize) -> Verdict {
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
    let wanted: Vec<Kind> = Kind::ALL.into_iter().filter(|kind| wants(assignment, *kind)).collect();
    // One that wants nothing at all is judged as it always was.
    let judged = if wanted.is_empty() { &[Kind::Address] } else { wanted.as_slice() };
    let mixed = judged.contains(&Kind::Network) && judged.contains(&Kind::Single);
    let mut told: Vec<String> = Vec::new();
    for (kind, share) in judged.iter().filter_map(|kind| Some((*kind, shares.get(kind)?))) {
        match serves(&allocation.of(kind), assignment, share, Serving { kind, mixed }) {
            Verdict::Good { message, .. } => told.push(message),
            bad => return bad,
        }
    }
    Verdict::good(reason::ALLOCATED, told.join("; ") + &foreign(assignment))
}

/// Of which addresses something is told.
#[derive(Clone, Copy)]
struct Serving {
    kind: Kind,
    /// There are both /64s and single IPv6 addresses.
    mixed: bool,
}

/// How the addresses of a kind serve.
fn serves(allocation: &Allocation, assignment: &Assignment, share: &Share, serving: Serving) -> Verdict {
    let kind = serving.kind;
    let wanted = assignment.wanted.iter().filter(|address| address.kind() == kind).count();
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
    if share.holders == 0 && wanted > 0 && allocation.per_node_min > 0 {
        return Verdict::bad(
            reason::NO_FREE_SLICE,
            match kind {
                Kind::Address | Kind::Single => {
                    "spec.ports: no node holds a slice, and none is free: those of former holders drain or rest; wait, widen spec.ports, or use more addresses"
                }
                Kind::Network => {
                    "spec.addresses.ipv6: no node holds a slice, and none is free: those of former holders drain or rest; wait, or ask for more"
                }
            },
        );
    }
    let (one, many) = match kind {
        Kind::Address => ("address", "addresses"),
        Kind::Network => ("IPv6 /64", "IPv6 /64s"),
        Kind::Single => ("single IPv6 address", "single IPv6 addresses"),
    };
    let mut message = format!("{} on {}", plural(wanted, one, many), plural(share.holders, "node", "nodes"));
    if wanted > 0 {
        message += &match kind {
            Kind::Address | Kind::Single => without(share, serving),
            Kind::Network => without_network(share, serving),
        };
        message += &fenced(share);
        message += &sites(allocation, share, kind);
    }
    Verdict::good(reason::ALLOCATED, message)
}

/// What of IPv6 a node sends nothing over that has no slice of a kind: nobody else sends for it.
fn nothing(serving: Serving) -> &'static str {
    match (serving.kind, serving.mixed) {
        (_, false) => "nothing over IPv6",
        (Kind::Single, true) => "nothing over IPv6 from single addresses",
        (_, true) => "nothing over IPv6 from /64s",
    }
}

/// Nodes that are no part of a /64.
fn without_network(share: &Share, serving: Serving) -> String {
    if share.without.count == 0 {
        return String::new();
    }
    let verbs = if share.without.count == 1 { "has no slice and sends" } else { "have no slice and send" };
    format!(
        "; {} {verbs} {}, as no slice is free: raise spec.addresses.ipv6, each /64 serves 252 nodes",
        share.without,
        nothing(serving)
    )
}

/// Nodes without slices of their own: no fault, but whoever wants it otherwise has to know how.
fn without(share: &Share, serving: Serving) -> String {
    let mut told = Vec::new();
    if share.without.count > 0 {
        let verbs =
            if share.without.count == 1 { "has no slice and sends" } else { "have no slice and send" };
        let how = if serving.kind == Kind::Address { "through others" } else { nothing(serving) };
        told.push(format!("{} {verbs} {how}", share.without));
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
fn sites(allocation: &Allocation, share: &Share, kind: Kind) -> String {
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
                if kind == Kind::Network {
                    return Some(format!(
                        "; spec.sites {name:?}: its weight gives it {quota} of each /64, which are fewer than its {usable} ready nodes; raise its weight, or spec.addresses.ipv6"
                    ));
                }
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
    let field = Egress::family(*first).field();
    let (dots, verbs) = if count > 1 {
        (", ...", "are not of spec.prefixes and stay")
    } else {
        ("", "is not of spec.prefixes and stays")
    };
    format!(
        "; {} ({first}{dots}) {verbs} in use: to replace one, raise {field}, hand the new address to your partners, and lower it again",
        plural(count, "address", "addresses"),
    )
}

pub(super) fn prefixes(
    inputs: &Inputs,
    prefixes: &Prefixes,
    planned: &[Address],
    ledger: &Ledger,
) -> BTreeMap<String, PrefixOutcome> {
    let mut used: BTreeMap<&str, Vec<(Egress, &AllocationName)>> = BTreeMap::new();
    for address in planned.iter().chain(&inputs.frozen) {
        used.entry(&address.prefix).or_default().push((address.address, &address.allocation));
    }
    let none = Vec::new();
    let ipv6: Vec<Egress> =
        planned.iter().map(|it| it.address).filter(|it| it.family() == Family::V6).collect();
    let outcome = |judged: &Judged| {
        let holders = used.get(judged.prefix.name.as_str()).unwrap_or(&none);
        let accepted = match &judged.accepted {
            Verdict::Bad { reason, message } if judged.prefix.deleting => {
                Verdict::bad(reason, format!("{message}{}", holding_up(holders)))
            }
            other => other.clone(),
        };
        let pool = Pool::new(judged);
        let own = holders.iter().map(|(address, _)| *address);
        // A /64 that stayed when its prefix went may have the address of another one.
        let strangers = ipv6.iter().copied().filter(|_| pool.kind.family() == Family::V6);
        let taken = own.chain(strangers).chain(inputs.withheld.keys().copied());
        let taken: BTreeSet<Egress> = taken.filter_map(|it| pool.blocked_by(it)).collect();
        let accounts = delegated::accounts(judged.prefix, holders, ledger);
        PrefixOutcome {
            accepted,
            delegated: delegated::prefix(&judged.prefix.account, &accounts),
            capacity: pool.capacity(),
            reserved: pool.reserved(),
            used: u32::try_from(holders.len()).unwrap_or(u32::MAX),
            free: pool.capacity().saturating_sub(u32::try_from(taken.len()).unwrap_or(u32::MAX)),
            accounts,
        }
    };
    prefixes.iter().map(|judged| (judged.prefix.name.clone(), outcome(judged))).collect()
}

/// Whose addresses keep a prefix that is being deleted.
fn holding_up(holders: &[(Egress, &AllocationName)]) -> String {
    let distinct: BTreeSet<&AllocationName> = holders.iter().map(|(_, allocation)| *allocation).collect();
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
