//! What to tell people: the status of each object, from the plan and from what agents report. Pure; `statuses` writes
//! it.

mod allocation;
mod application;
mod capacity;
mod conditions;
mod fleet;
mod hosts;
mod limits;
mod policy;
mod prefix;
#[cfg(test)]
mod tests;

use crate::events::Notice;
use crate::object::{Target, version};
use crate::watch::{Guarded, Snapshot};
use crate::world::World;
use aegis_core::egress::Egress;
use aegis_core::plan::{AllocationOutcome, Plan, Verdict};
use aegis_crds::{Condition, EgressAddressStatus, ZoneBinding, ZoneBindingStatus, reason, type_};
use conditions::{Clock, Wanted, notices, turned};
use fleet::Fleet;
use k8s_openapi::jiff::Timestamp;
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashSet};

/// What the planning loop found.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// What it planned from.
    pub world: World,
    /// The plan.
    pub plan: Plan,
    /// Addresses of the plan that could not be written (yet), with what to tell if that lasts: their allocations wait.
    pub unwritten: BTreeMap<Egress, Option<String>>,
}

/// A status to write.
#[derive(Clone, Debug)]
pub struct StatusChange {
    /// The object.
    pub target: Target,
    /// Resource version at which the object was read.
    pub version: u64,
    /// The new status.
    pub status: Value,
    /// Whether some condition turned, or there was no status yet. Other changes (counts) can wait a little.
    pub urgent: bool,
    /// What to publish as Events.
    pub notices: Vec<Notice>,
}

/// Compares the status that each object has with the one it should have, and returns those that differ. An object
/// that has changed since the plan was made waits for the next plan.
pub fn changes(current: &Snapshot, view: &View, now: Timestamp) -> Vec<StatusChange> {
    let fleet = Fleet::of(current);
    let shares = fleet::shares(view);
    let scribe =
        Scribe { view, now, broken: view.world.problems.iter().map(|it| it.target.uid.as_str()).collect() };
    let prefixes = current.prefixes.iter().filter_map(|object| {
        let (object, clock) = scribe.open(object)?;
        let outcome = view.plan.prefixes.get(&object.name_any())?;
        let old = object.status.clone().unwrap_or_default();
        let new = prefix::status(outcome, &old, &clock);
        let mut notices = notices(&old.conditions, &new.conditions);
        // These name accounts and allocations, and whoever may read the Events of namespace `default` need not be one who may
        // know them.
        notices.retain(|it| {
            ![reason::DRAINING, reason::DELEGATED, reason::DELEGATION_WITHDRAWN].contains(&it.reason.as_str())
        });
        change(object, &old, &new, (&old.conditions, &new.conditions), notices)
    });
    let allocations = current.allocations.iter().filter_map(|object| {
        let (object, clock) = scribe.open(object)?;
        let old = object.status.clone().unwrap_or_default();
        let new = allocation::status(object, &old, view, &fleet, &shares, &clock)?;
        let mut notices = notices(&old.conditions, &new.conditions);
        notices.iter_mut().filter(|notice| notice.reason == reason::ALLOCATED).for_each(|notice| {
            notice.note = format!("{}: {}", new.summary, notice.note);
        });
        let mut change = change(object, &old, &new, (&old.conditions, &new.conditions), notices)?;
        change.urgent |= old.summary != new.summary;
        Some(change)
    });
    let existing = current.allocations.iter();
    let named = policy::Named {
        allocations: existing.map(|it| (it.namespace().unwrap_or_default(), it.name_any())).collect(),
        serving: shares
            .iter()
            .filter(|(_, share)| share.serves())
            .map(|(name, _)| (name.account.clone(), name.name.clone()))
            .collect(),
        applications: current.applications.iter().map(|it| it.name_any()).collect(),
        namespaces: current
            .namespaces
            .iter()
            .filter_map(|it| Some((it.meta().name.as_deref()?, it.labels())))
            .collect(),
    };
    let bindings = current.bindings.iter().filter_map(|object| {
        let (object, clock) = scribe.open(object)?;
        let old = object.status.clone().unwrap_or_default();
        let name = fleet::allocation_of(object);
        let allocation = Named {
            exists: named.allocations.contains(&(name.account.clone(), name.name.clone())),
            outcome: view.plan.allocations.get(&name),
            serves: shares.get(&name).is_some_and(fleet::Share::serves),
        };
        let wanted = binding(object, &fleet, &allocation);
        let conditions = clock.settle(&old.conditions, wanted);
        let notices = notices(&old.conditions, &conditions);
        let new = ZoneBindingStatus { pods: fleet.pods(object), conditions };
        change(object, &old, &new, (&old.conditions, &new.conditions), notices)
    });
    let order = policy::Order::of(&view.world.policies, &view.world.applications);
    let policies = current.policies.iter().filter_map(|object| {
        let (object, clock) = scribe.open(object)?;
        let old = object.status.clone().unwrap_or_default();
        let new = policy::status(object, &old, &order, &named, &fleet, &clock)?;
        let notices = notices(&old.conditions, &new.conditions);
        change(object, &old, &new, (&old.conditions, &new.conditions), notices)
    });
    let users = application::users(&current.policies);
    let applications = current.applications.iter().filter_map(|object| {
        let (object, clock) = scribe.open(object)?;
        let old = object.status.clone().unwrap_or_default();
        let policies = users.get(object.name_any().as_str()).map(Vec::as_slice).unwrap_or_default();
        let new = application::status(&old, policies, &clock);
        let notices = notices(&old.conditions, &new.conditions);
        change(object, &old, &new, (&old.conditions, &new.conditions), notices)
    });
    let addresses = current.addresses.iter().filter_map(|object| {
        let (object, clock) = scribe.open(object)?;
        let old = object.status.clone().unwrap_or_default();
        let wanted = vec![fleet.programmed_address(object)];
        let new = EgressAddressStatus {
            slices_held: fleet::slices_held(object),
            conditions: clock.settle(&old.conditions, wanted),
        };
        change(object, &old, &new, (&old.conditions, &new.conditions), Vec::new())
    });
    let rules = bindings.chain(policies).chain(applications);
    allocations.chain(rules).chain(prefixes).chain(addresses).collect()
}

/// Allocations whose `CapacityLow` is true, or not, by namespace and name.
pub fn capacity_low(current: &Snapshot) -> BTreeMap<(String, String), bool> {
    let readable = current.allocations.iter().filter_map(|object| object.0.as_ref().ok());
    let low = readable.map(|object| {
        let conditions = object.status.iter().flat_map(|status| &status.conditions);
        let low = conditions.into_iter().any(|it| it.type_ == type_::CAPACITY_LOW && it.status == "True");
        ((object.namespace().unwrap_or_default(), object.name_any()), low)
    });
    low.collect()
}

/// The status of an object that cannot be read, or makes no sense, for a merge patch: all else in it stays.
pub fn invalid(generation: Option<i64>, message: &str, now: Timestamp) -> Value {
    let wanted = Wanted::bad(type_::ACCEPTED, reason::INVALID, message);
    json!({"status": {"conditions": Clock { generation, now }.settle(&[], vec![wanted])}})
}

struct Scribe<'a> {
    view: &'a View,
    now: Timestamp,
    /// Objects with a problem; they are told elsewhere.
    broken: HashSet<&'a str>,
}

impl Scribe<'_> {
    /// The object, if it can be read and is as the plan saw it.
    fn open<'o, K: Resource>(&self, object: &'o Guarded<K>) -> Option<(&'o K, Clock)> {
        let object = object.0.as_ref().ok()?;
        let uid = object.meta().uid.as_deref().unwrap_or_default();
        let generation = object.meta().generation;
        let current = self.view.world.generations.get(uid).copied() == generation;
        (current && !self.broken.contains(uid)).then_some((object, Clock { generation, now: self.now }))
    }
}

fn change<K, S>(
    object: &K,
    old: &S,
    new: &S,
    (before, after): (&[Condition], &[Condition]),
    notices: Vec<Notice>,
) -> Option<StatusChange>
where
    K: Resource<DynamicType = ()>,
    S: Serialize + PartialEq,
{
    if old == new {
        return None;
    }
    Some(StatusChange {
        target: Target::of::<K>(object.meta()),
        version: version(object.meta()),
        // These types have string keys and finite numbers only: they always serialize.
        status: serde_json::to_value(new).ok()?,
        urgent: turned(before, after),
        notices,
    })
}

fn verdict(type_: &'static str, verdict: &Verdict) -> Wanted {
    Wanted {
        type_,
        status: verdict.is_good(),
        reason: verdict.reason(),
        message: verdict.message().to_owned(),
    }
}

/// The allocation that a binding names.
struct Named<'a> {
    exists: bool,
    /// Missing although it exists: it cannot be read or makes no sense.
    outcome: Option<&'a AllocationOutcome>,
    /// Some node may start flows from it.
    serves: bool,
}

fn binding(object: &ZoneBinding, fleet: &Fleet, allocation: &Named) -> Vec<Wanted> {
    let name = &object.spec.allocation_ref.name;
    let meanwhile = match object.spec.when_unavailable {
        aegis_crds::WhenUnavailable::Drop => "until then new covered flows are refused",
        aegis_crds::WhenUnavailable::UseNodeAddress => {
            "until then new covered flows leave with the node's address"
        }
    };
    let field = format!("spec.allocationRef.name: EgressAllocation {name:?}");
    let refused = |reason, message| Wanted::bad(type_::ACCEPTED, reason, message);
    let accepted = match allocation.outcome {
        _ if !allocation.exists => refused(
            reason::NOT_FOUND,
            &format!(
                "{field} does not exist in namespace {:?}; create it or name another; {meanwhile}",
                object.namespace().unwrap_or_default()
            ),
        ),
        None if allocation.serves => refused(
            reason::INVALID,
            &format!("{field} is invalid, as its conditions explain; repair it: what it has stays in use"),
        ),
        None => refused(
            reason::INVALID,
            &format!("{field} is invalid, as its conditions explain; repair it or name another; {meanwhile}"),
        ),
        Some(outcome) if outcome.allocated.reason() == reason::DRAINING => refused(
            reason::DRAINING,
            &format!("{field} is being deleted: live flows go on; name another; {meanwhile}"),
        ),
        Some(_) => {
            Wanted::good(type_::ACCEPTED, reason::ACCEPTED, &format!("leaves from EgressAllocation {name:?}"))
        }
    };
    let programmed = match allocation.outcome {
        _ if !object.spec.enabled => {
            Wanted::bad(type_::PROGRAMMED, reason::DISABLED, "switched off by spec.enabled: false")
        }
        // What the nodes enforce is that nothing leaves, which is not what was asked for.
        _ if !allocation.serves => {
            let why = match allocation.outcome {
                Some(outcome) if !outcome.allocated.is_good() => outcome.allocated.message(),
                _ => accepted.message.as_str(),
            };
            let message = format!("EgressAllocation {name:?} has nothing to leave from ({why}); {meanwhile}");
            Wanted::bad(type_::PROGRAMMED, reason::UNAVAILABLE, &message)
        }
        _ => fleet.programmed_rule(object),
    };
    let resolved = hosts::resolved("spec.zone.hosts", &object.spec.zone.hosts, fleet);
    [accepted, programmed].into_iter().chain(resolved).collect()
}
