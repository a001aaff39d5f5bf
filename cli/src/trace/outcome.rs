//! What happens to a new flow, in words.

use super::{Outcome, demand, policy_of, title};
use crate::decision::{Decider, full};
use crate::state::{State, lacks};
use aegis_core::egress::Family;
use aegis_core::gateway::Load;
use aegis_core::model::AllocationName;
use aegis_core::policy::{Action, Explanation, Step};

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
        return format!(", or from {second} while the node has no part of a /64 of {first}");
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

/// Why the allocations of a rule cannot be left from.
fn lacking(state: &State, step: &Step, node: Option<&str>, family: Family) -> String {
    let kind = match family {
        Family::V4 => "IPv4 address",
        Family::V6 => "IPv6 /64",
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
        let addresses = state.snapshot.addresses.iter().filter_map(|it| it.0.as_ref().ok());
        let mut own = addresses.filter(|it| {
            it.spec.allocation_ref.namespace == name.account && it.spec.allocation_ref.name == name.name
        });
        let has = own.any(|it| it.spec.address.contains(':') == (family == Family::V6));
        match (has, node) {
            (false, _) => format!(
                "{full} has no {kind}: see `kubectl describe egressallocation -n {} {}`",
                name.account, name.name
            ),
            (true, Some(node)) if family == Family::V6 => {
                format!(
                    "node {node} has no part of the /64s of {full}: it must be in its sites, and its agent ready"
                )
            }
            (true, _) => format!("no node holds slices of {full}: see its condition Allocated"),
        }
    };
    let lacking = step.allocations.iter().filter(|(_, usable)| !usable);
    lacking.map(|(name, _)| why(name)).collect::<Vec<_>>().join("; and ")
}
