//! `kubectl aegis plan`: what would change if objects were applied. The planner of the operator and the rules of the agents are run on
//! what stands, with and without the objects; nothing is written.

mod alerts;
mod decisions;
mod overlay;
mod settle;
#[cfg(test)]
mod tests;

pub use alerts::Watch;
pub use overlay::{Overlay, Planned, overlay};

use crate::decision::{Decider, full};
use crate::output::{Answer, Table, notes, sections};
use crate::state::State;
use aegis_core::audit::audit;
use aegis_core::model::{Address, AllocationName, Inputs, Lease, State as Holds};
use aegis_core::plan::{Plan, Verdict, plan};
use aegis_core::policy::{EgressPolicy, in_order, shadowed};
use anyhow::{Result, bail};
pub use decisions::DecisionChange;
use serde::Serialize;
use settle::settle;
use std::collections::{BTreeMap, BTreeSet};

/// What would change.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Changes {
    /// Something would.
    pub changes: bool,
    /// The objects of the files.
    pub objects: Vec<Planned>,
    /// Addresses that allocations get or give back.
    pub addresses: Vec<AddressChange>,
    /// Slices that nodes get or give back, over all addresses.
    pub slices: Vec<SliceChange>,
    /// What alerts would watch that are created or changed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub alerts: Vec<Watch>,
    /// What prefixes, allocations and alerts would say that they do not say now.
    pub conditions: Vec<ConditionChange>,
    /// Policies whose place or shadow changes.
    pub policies: Vec<PolicyChange>,
    /// Pods whose packets leave in another way.
    pub decisions: Vec<DecisionChange>,
    /// What could not be looked at.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// An address that comes or goes.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AddressChange {
    /// The address.
    pub address: String,
    /// Its allocation.
    pub allocation: String,
    /// `given`, `taken`, or `drains`: taken when no flow uses it any more.
    pub change: &'static str,
}

/// Slices of a node that change.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SliceChange {
    /// The address.
    pub address: String,
    /// The node.
    pub node: String,
    /// Slices that it holds without the objects.
    pub before: u32,
    /// Slices that it holds with them, at once.
    pub at_once: u32,
    /// Slices of it that drain then.
    pub draining: u32,
    /// Slices that it holds when what drains has drained and rested.
    pub after: u32,
}

/// A condition that turns.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConditionChange {
    /// `AegisPrefix NAME`, `EgressAllocation NAMESPACE/NAME` or `UsageAlert NAMESPACE/NAME`.
    pub object: String,
    /// Type of the condition.
    pub condition: &'static str,
    /// Its status.
    pub status: bool,
    /// Its reason.
    pub reason: &'static str,
    /// What is the case, and what to do.
    pub message: String,
}

/// A policy whose place changes.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyChange {
    /// Its name.
    pub name: String,
    /// Its place without the objects.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<usize>,
    /// Its place with them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<usize>,
    /// The one before it that decides about everything that it matches, then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shadowed_by: Option<String>,
}

/// Plans both.
pub fn changes(
    before: &State,
    after: &State,
    objects: Vec<Planned>,
    mut notes: Vec<String>,
) -> Result<Changes> {
    let known = before.world().problems;
    let new = after.world().problems.into_iter().filter(|it| !known.contains(it));
    let new: Vec<String> = new.map(|it| format!("{}: {}", it.target, it.message)).collect();
    if !new.is_empty() {
        bail!("the objects make no sense:\n  {}", new.join("\n  "));
    }
    let (old, new) = (planned(before)?, planned(after)?);
    let (old_end, new_end) = (settle(&old.inputs, &old.plan), settle(&new.inputs, &new.plan));
    let addresses = addresses(&old.plan, &new.plan, &new_end);
    let slices = slices(&old_end, &new.plan, &new_end);
    let mut conditions = conditions(&old.plan, &new.plan);
    let (alerts, told) = alerts::alerts(before, after, &objects);
    conditions.extend(told);
    let (old_decider, new_decider) =
        (Decider::of(before).with_addresses(old_end), Decider::of(after).with_addresses(new_end));
    let policies = places(&old_decider, &new_decider);
    let decisions = decisions::changes([(before, &old_decider), (after, &new_decider)], &mut notes);
    let changed = objects.iter().any(|it| it.change != "unchanged");
    let changes = changed
        || !(addresses.is_empty()
            && slices.is_empty()
            && conditions.is_empty()
            && policies.is_empty()
            && decisions.is_empty());
    notes.extend(after.rules().lacking());
    notes.extend(unseen(before, after, &objects));
    notes.extend(after.notes());
    Ok(Changes { changes, objects, addresses, slices, alerts, conditions, policies, decisions, notes })
}

/// Rules among the objects whose destinations only the agents know: what they change is told for no destination.
fn unseen(before: &State, after: &State, objects: &[Planned]) -> BTreeSet<String> {
    let changed = objects.iter().filter(|it| it.change != "unchanged");
    let changed: BTreeSet<&str> = changed.map(|it| it.object.as_str()).collect();
    let notes = |state: &State| -> Vec<String> {
        let rules = state.rules();
        let told = rules.unseen(&[]).filter(|it| it.names.iter().any(|name| changed.contains(name.as_str())));
        told.map(|it| it.note).collect()
    };
    // Of what is deleted the state before tells.
    notes(before).into_iter().chain(notes(after)).collect()
}

struct Made {
    inputs: Inputs,
    plan: Plan,
}

fn planned(state: &State) -> Result<Made> {
    let mut inputs = state.world().inputs;
    // Only the operator knows who renews his Lease: what is ready does.
    inputs.nodes.iter_mut().filter(|node| node.ready).for_each(|node| node.lease = Lease::Own);
    let plan = plan(&inputs);
    if let Err(violations) = audit(&inputs, &plan) {
        let violations: Vec<String> = violations.iter().map(ToString::to_string).collect();
        bail!("the operator would refuse this plan, since it breaks an invariant: {}", violations.join("; "));
    }
    Ok(Made { inputs, plan })
}

fn addresses(old: &Plan, new: &Plan, end: &[Address]) -> Vec<AddressChange> {
    let by = |addresses: &[Address]| -> BTreeMap<_, _> {
        addresses.iter().map(|it| (it.address, it.allocation.clone())).collect()
    };
    let (before, at_once, end) = (by(&old.addresses), by(&new.addresses), by(end));
    let all: BTreeSet<_> = before.keys().chain(at_once.keys()).collect();
    let mut changes = Vec::new();
    for address in all {
        let mut tell = |name: &AllocationName, change| {
            changes.push(AddressChange { address: address.to_string(), allocation: full(name), change });
        };
        match (before.get(address), at_once.get(address)) {
            (Some(old), None) => tell(old, "taken"),
            (Some(old), Some(_)) if end.get(address).is_none_or(|it| it != old) => tell(old, "drains"),
            (None, Some(new)) => tell(new, "given"),
            _ => {}
        }
    }
    changes
}

fn slices(before: &[Address], at_once: &Plan, end: &[Address]) -> Vec<SliceChange> {
    let count = |addresses: &[Address], state: Holds| {
        let mut counts: BTreeMap<(String, String), u32> = BTreeMap::new();
        for address in addresses {
            for holding in address.holdings.iter().filter(|it| it.state == state) {
                let key = (address.address.to_string(), holding.node.clone());
                *counts.entry(key).or_default() += u32::from(holding.last) + 1 - u32::from(holding.first);
            }
        }
        counts
    };
    let held = [before, &at_once.addresses, end].map(|addresses| count(addresses, Holds::Held));
    let draining = count(&at_once.addresses, Holds::Draining);
    let keys: BTreeSet<_> = held.iter().flat_map(BTreeMap::keys).collect();
    let of = |counts: &BTreeMap<(String, String), u32>, key: &(String, String)| {
        counts.get(key).copied().unwrap_or_default()
    };
    let change = |key: &(String, String)| SliceChange {
        address: key.0.clone(),
        node: key.1.clone(),
        before: of(&held[0], key),
        at_once: of(&held[1], key),
        draining: of(&draining, key),
        after: of(&held[2], key),
    };
    let changes = keys.into_iter().map(change);
    changes.filter(|it| it.before != it.after || it.before != it.at_once).collect()
}

fn conditions(old: &Plan, new: &Plan) -> Vec<ConditionChange> {
    let mut changes = Vec::new();
    let mut compare = |object: String, condition, old: Option<&Verdict>, new: &Verdict| {
        let same = match old {
            Some(old) => old.is_good() == new.is_good() && (new.is_good() || old.message() == new.message()),
            None => new.is_good(),
        };
        if !same {
            changes.push(ConditionChange {
                object,
                condition,
                status: new.is_good(),
                reason: new.reason(),
                message: new.message().to_owned(),
            });
        }
    };
    for (name, outcome) in &new.allocations {
        let before = old.allocations.get(name);
        let object = || format!("EgressAllocation {}", full(name));
        compare(object(), "Accepted", before.map(|it| &it.accepted), &outcome.accepted);
        compare(object(), "Delegated", before.map(|it| &it.delegated), &outcome.delegated);
        compare(object(), "Allocated", before.map(|it| &it.allocated), &outcome.allocated);
    }
    for (name, outcome) in &new.prefixes {
        let before = old.prefixes.get(name);
        let object = || format!("AegisPrefix {name}");
        compare(object(), "Accepted", before.map(|it| &it.accepted), &outcome.accepted);
        compare(object(), "Delegated", before.map(|it| &it.delegated), &outcome.delegated);
    }
    changes
}

fn places(old: &Decider<'_>, new: &Decider<'_>) -> Vec<PolicyChange> {
    let places = |policies: &[EgressPolicy]| -> BTreeMap<String, usize> {
        in_order(policies).into_iter().map(|policy| policy.name.clone()).zip(1..).collect()
    };
    let (before, after) = (places(&old.policies), places(&new.policies));
    let old_shadows = shadowed(&old.policies, &old.applications);
    let new_shadows = shadowed(&new.policies, &new.applications);
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let change = |name: &String| {
        let shadow = new_shadows.get(name.as_str()).copied();
        let (was, is) = (before.get(name).copied(), after.get(name).copied());
        let turned = old_shadows.get(name.as_str()).copied() != shadow;
        let moved = was != is;
        (moved || turned).then(|| PolicyChange {
            name: name.clone(),
            before: was,
            after: is,
            shadowed_by: shadow.map(str::to_owned),
        })
    };
    let mut changes: Vec<PolicyChange> = names.into_iter().filter_map(change).collect();
    changes.sort_by_key(|it| (it.after.unwrap_or(usize::MAX), it.before));
    changes
}

impl Answer for Changes {
    fn table(&self) -> String {
        let mut objects = Table::new(["OBJECT", "CHANGE"]);
        for it in &self.objects {
            objects.row([it.object.clone(), it.change.to_owned()]);
        }
        let mut addresses = Table::new(["ADDRESS", "ALLOCATION", "CHANGE"]);
        for it in &self.addresses {
            addresses.row([it.address.clone(), it.allocation.clone(), it.change.to_owned()]);
        }
        let mut slices =
            Table::new(["SLICES OF", "NODE", "BEFORE", "AT ONCE", "DRAINING", "WHEN ALL HAS DRAINED"]);
        for it in &self.slices {
            slices.row([
                it.address.clone(),
                it.node.clone(),
                it.before.to_string(),
                it.at_once.to_string(),
                it.draining.to_string(),
                it.after.to_string(),
            ]);
        }
        let mut alerts = Table::new(["ALERT", "WATCHES", "RAISED", "CLEARED"]);
        for it in &self.alerts {
            alerts.row([it.alert.clone(), it.watches.clone(), it.raised.clone(), it.cleared.clone()]);
        }
        let mut conditions = Table::new(["WOULD SAY", "CONDITION", "STATUS", "REASON", "MESSAGE"]);
        for it in &self.conditions {
            conditions.row([
                it.object.clone(),
                it.condition.to_owned(),
                if it.status { "True" } else { "False" }.to_owned(),
                it.reason.to_owned(),
                it.message.clone(),
            ]);
        }
        let mut policies = Table::new(["POLICY", "ORDER BEFORE", "AFTER", "SHADOWED BY"]);
        let place = |place: Option<usize>| place.map(|it| it.to_string()).unwrap_or_default();
        for it in &self.policies {
            let shadow = it.shadowed_by.clone().unwrap_or_default();
            policies.row([it.name.clone(), place(it.before), place(it.after), shadow]);
        }
        let mut decisions = Table::new(["PODS", "TO", "BEFORE", "AFTER"]);
        for it in &self.decisions {
            decisions.row([it.who(), it.whither(), it.before.clone(), it.after.clone()]);
        }
        let nothing = if self.changes { "" } else { "nothing would change" };
        sections([
            objects.text(),
            nothing.to_owned(),
            addresses.text(),
            slices.text(),
            alerts.text(),
            conditions.text(),
            policies.text(),
            decisions.text(),
            notes(&self.notes),
        ])
    }
}
