//! Whole addresses: who may take one, and when it may go.

use super::{Violation, World};
use crate::egress::{Egress, Kind};
use crate::model::{Address, AddressRequest, Delegate, Holding, MAX_ADDRESSES, Prefix, State};
use crate::plan::Plan;
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn check(world: &World, plan: &Plan) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (lower, higher) in plan.addresses.iter().zip(plan.addresses.iter().skip(1)) {
        if lower.address >= higher.address {
            violations.push(Violation::AddressOrder { address: higher.address });
        }
    }
    for after in &plan.addresses {
        let address = after.address;
        match world.before.get(&address) {
            Some(before) if (&before.allocation, &before.prefix) != (&after.allocation, &after.prefix) => {
                violations.push(Violation::AddressMoved { address });
            }
            Some(_) => {}
            None => {
                violations
                    .extend(refuse(world, plan, after).map(|why| Violation::AddressTaken { address, why }));
            }
        }
    }
    let planned: BTreeSet<Egress> = plan.addresses.iter().map(|after| after.address).collect();
    for before in world.before.values().filter(|before| !planned.contains(&before.address)) {
        let address = before.address;
        let rested = |holding: &Holding| match holding.state {
            State::Quarantined { until } => {
                !(holding.first..=holding.last).any(|slice| world.inputs.rests(address, slice, until))
            }
            State::Held | State::Draining => false,
        };
        if !before.holdings.iter().all(rested) {
            violations.push(Violation::AddressInUse { address });
        }
        if world.serving(before).is_some() {
            violations.push(Violation::AddressWanted { address });
        }
    }
    let after: BTreeMap<Egress, &Address> = plan.addresses.iter().map(|it| (it.address, it)).collect();
    for address in world.inputs.withheld.keys() {
        if world.before.get(address) != after.get(address) {
            violations.push(Violation::Withheld { address: *address });
        }
    }
    let (before, after) = (world.before.len(), after.len());
    if after > before && after > MAX_ADDRESSES {
        violations.push(Violation::TooManyAddresses { count: after });
    }
    violations
}

/// Which rule stands against a new address, if any.
fn refuse(world: &World, plan: &Plan, new: &Address) -> Option<&'static str> {
    let Some(allocation) = world.allocations.get(&new.allocation) else {
        return Some("its allocation does not exist");
    };
    let Some(prefix) = world.inputs.prefixes.iter().find(|prefix| prefix.name == new.prefix) else {
        return Some("its prefix does not exist");
    };
    let range = new.address.range();
    let older = |other: &Prefix| (other.created, &other.name) < (prefix.created, &prefix.name);
    let shared = |other: &Prefix| {
        other.cidr.contains(&prefix.cidr.network()) || prefix.cidr.contains(&other.cidr.network())
    };
    let account = &allocation.name.account;
    let most = most(world, prefix, account);
    let rules = [
        (!allocation.deleting, "its allocation is being deleted"),
        (!prefix.deleting, "its prefix is being deleted"),
        (allocation.prefixes.contains(&prefix.name), "its allocation does not name the prefix"),
        (most > 0, "its prefix belongs to another account"),
        (
            most == usize::MAX || has(world, plan, &prefix.name, account) <= most,
            "its account has as many addresses of the prefix as are delegated to it",
        ),
        (prefix.cidr.contains(&range), "it is not in its prefix"),
        (Kind::of(&prefix.cidr) == new.address.kind(), "its prefix has no addresses of its kind"),
        (!overlaps(world, plan, new.address), "it has addresses in common with another"),
        (
            !prefix.reserved.iter().any(|other| other.contains(&range) || range.contains(other)),
            "it is reserved",
        ),
        (
            !world.inputs.nodes.iter().any(|node| node.addresses.iter().any(|own| range.contains(own))),
            "it is a node's own",
        ),
        (
            !world.inputs.prefixes.iter().any(|other| older(other) && shared(other)),
            "its prefix overlaps an older one",
        ),
        (
            !world.inputs.nodes.iter().flat_map(|node| &node.pod_ranges).chain(&world.inputs.services).any(
                |range| range.contains(&prefix.cidr.network()) || prefix.cidr.contains(&range.network()),
            ),
            "its prefix overlaps pods or Services",
        ),
        match &allocation.request {
            AddressRequest::Explicit(list) => {
                (list.contains(&new.address), "its allocation does not list it")
            }
            AddressRequest::Count(_) => {
                let family = new.address.family();
                let has = world.has(&new.allocation).iter().filter(|it| it.family() == family).count();
                let count = allocation.count(family).unwrap_or(0);
                (has <= count as usize, "its allocation has as many as it asks for")
            }
        },
    ];
    rules.into_iter().find(|(holds, _)| !holds).map(|(_, why)| why)
}

/// Whether some other address has a part of this one, or did before, or is withheld: nodes may send from it.
fn overlaps(world: &World, plan: &Plan, address: Egress) -> bool {
    let planned = plan.addresses.iter().map(|it| it.address);
    let others = planned.chain(world.before.keys().copied()).chain(world.inputs.withheld.keys().copied());
    others.filter(|other| *other != address).any(|other| other.overlaps(address))
}

/// How many addresses of a prefix an account may have.
fn most(world: &World, prefix: &Prefix, account: &str) -> usize {
    if prefix.account == account {
        return usize::MAX;
    }
    let most = prefix.delegations.iter().filter(|delegation| match &delegation.to {
        Delegate::Account(name) => name == account,
        Delegate::Namespaces(selector) => {
            world.inputs.namespaces.get(account).is_some_and(|labels| selector.matches(labels))
        }
    });
    most.map(|delegation| delegation.max as usize).max().unwrap_or(0)
}

/// How many it would have.
fn has(world: &World, plan: &Plan, prefix: &str, account: &str) -> usize {
    let all = plan.addresses.iter().chain(&world.inputs.frozen);
    all.filter(|it| it.prefix == prefix && it.allocation.account == account).count()
}
