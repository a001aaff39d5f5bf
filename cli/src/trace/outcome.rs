//! What happens to a new flow, in words.

use super::{Outcome, demand, policy_of, title};
use crate::decision::{Decider, full};
use crate::state::{State, lacks};
use aegis_core::egress::{Egress, Family, Kind};
use aegis_core::gateway::Load;
use aegis_core::model::AllocationName;
use aegis_core::policy::{Action, Explanation, Step};
use std::collections::BTreeSet;

/// What happens to a new flow, in words, with what to do if it is refused.
pub(super) fn outcome(
    state: &State,
    decider: &Decider<'_>,
    told: &Explanation,
    decides: Option<&Step>,
    node: Option<&str>,
    family: Family,
) -> (Outcome, String) {
    if let Some(range) = told.internal {
        return (Outcome::Internal, format!("{range} is inside the cluster: no rule is asked"));
    }
    let Some(step) = decides else {
        return (Outcome::NodeAddress, "no rule matches: it leaves with the node's address".to_owned());
    };
    let rule = title(&step.rule);
    if let Some(name) = policy_of(decider, step).and_then(|policy| lacks(policy, &decider.applications)) {
        let why = format!("EgressApplication {name} is not known: create it, repair it, or name another");
        return (Outcome::Refused, format!("{rule}: it is refused, since {why}"));
    }
    let countries = policy_of(decider, step).is_some_and(|policy| !policy.countries.is_empty());
    if let Some(node) = node.filter(|node| countries && !decider.knows_countries(Some(node))) {
        let why =
            format!("node {node} has no database of countries: give it one by the chart's agent.countries");
        return (Outcome::Refused, format!("{rule}: it is refused, since {why}"));
    }
    match &told.action {
        Action::Allocate { allocation, secondary, .. } => {
            let place = step.allocations.iter().position(|(name, _)| *name == **allocation);
            let instead = match (place, secondary) {
                (Some(1..), _) => format!(", since {}", lacking(state, step, node, family)),
                (_, Some(secondary)) => second(state, allocation, secondary, node, family),
                // The secondary is the one that cannot be left from.
                (_, None) if step.allocations.len() > 1 => {
                    format!("; nothing stands in for it, since {}", lacking(state, step, node, family))
                }
                (_, None) => String::new(),
            };
            (Outcome::Egress, format!("{rule}: it leaves from {}{instead}", full(allocation)))
        }
        Action::Pass if step.allocations.is_empty() => {
            (Outcome::NodeAddress, format!("{rule}: it leaves with the node's address"))
        }
        Action::Pass => {
            let why = lacking(state, step, node, family);
            (
                Outcome::NodeAddress,
                format!("{rule}: it leaves with the node's address, as whenUnavailable says, since {why}"),
            )
        }
        Action::Deny { .. } if step.allocations.is_empty() => {
            (Outcome::Refused, format!("{rule}: it is refused, as action Deny says"))
        }
        Action::Deny { .. } => {
            (Outcome::Refused, format!("{rule}: it is refused, since {}", lacking(state, step, node, family)))
        }
    }
}

/// When it leaves from the secondary instead.
fn second(
    state: &State,
    primary: &AllocationName,
    secondary: &AllocationName,
    node: Option<&str>,
    family: Family,
) -> String {
    let (first, second) = (full(primary), full(secondary));
    if family == Family::V6 {
        let kinds = kinds(state, primary, family);
        let what = match (kinds.contains(&Kind::Network), kinds.contains(&Kind::Single)) {
            (_, false) => "part of a /64",
            (false, true) => "IPv6 ports",
            (true, true) => "part of a /64 and no IPv6 ports",
        };
        return format!(", or from {second} while the node has no {what} of {first}");
    }
    let demand = node.and_then(|node| Some((node, demand(state, node, primary)?)));
    let none_left = demand.filter(|(_, it)| Load::of(it.fill_percent, it.refused) == Load::Full);
    match none_left {
        Some((node, _)) => format!(
            ", of which node {node} has hardly a port left towards the busiest origin: where none is free, from {second}"
        ),
        None => format!(", or from {second} where no port of {first} is free towards the destination"),
    }
}

/// What an allocation has of a family.
fn kinds(state: &State, name: &AllocationName, family: Family) -> BTreeSet<Kind> {
    let own = crate::state::readable(&state.snapshot.addresses).into_iter().map(|it| &it.spec);
    let own =
        own.filter(|it| it.allocation_ref.namespace == name.account && it.allocation_ref.name == name.name);
    let kinds = own.filter_map(|it| Some(it.address.parse::<Egress>().ok()?.kind()));
    kinds.filter(|kind| kind.family() == family).collect()
}

/// Why the allocations of a rule cannot be left from.
fn lacking(state: &State, step: &Step, node: Option<&str>, family: Family) -> String {
    let kind = match family {
        Family::V4 => "IPv4 address",
        Family::V6 => "IPv6 address",
    };
    let why = |name: &AllocationName| {
        let full = full(name);
        let object = crate::state::readable(&state.snapshot.allocations).into_iter().find(|it| {
            it.metadata.namespace.as_deref() == Some(&name.account)
                && it.metadata.name.as_deref() == Some(&name.name)
        });
        if name.name.is_empty() {
            return "the rule cannot be read: repair or delete it".to_owned();
        }
        let Some(object) = object else {
            return format!("there is no EgressAllocation {full}: create it, or name another");
        };
        if object.metadata.deletion_timestamp.is_some() {
            return format!("{full} is being deleted");
        }
        let kinds = kinds(state, name, family);
        match (kinds.is_empty(), node) {
            (true, _) => format!(
                "{full} has no {kind}: see `kubectl describe egressallocation -n {} {}`",
                name.account, name.name
            ),
            (false, Some(node)) if kinds.contains(&Kind::Single) => {
                let what = if kinds.len() > 1 { "part of the /64s and no IPv6 ports" } else { "IPv6 ports" };
                format!(
                    "node {node} has no {what} of {full}: it must be in its sites, its agent ready, and a slice free for it"
                )
            }
            (false, Some(node)) if family == Family::V6 => {
                format!(
                    "node {node} has no part of the /64s of {full}: it must be in its sites, and its agent ready"
                )
            }
            (false, _) => format!("no node holds slices of {full}: see its condition Allocated"),
        }
    };
    let lacking = step.allocations.iter().filter(|(_, usable)| !usable);
    lacking.map(|(name, _)| why(name)).collect::<Vec<_>>().join("; and ")
}
