//! Status of an `EgressPolicy`.

use super::conditions::{Clock, Wanted};
use super::fleet::Fleet;
use super::hosts;
use aegis_core::policy::{self, Applications, in_order, shadowed};
use aegis_crds::{EgressPolicy, EgressPolicyStatus, PolicyMode, reason, type_};
use kube::ResourceExt;
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// The order in which policies are asked, and what follows from it.
pub struct Order<'a> {
    /// Place of each, from 1 on.
    places: BTreeMap<&'a str, u32>,
    /// Those that can never decide, with the one that does.
    shadowed: BTreeMap<&'a str, &'a str>,
    /// Applications that can be read.
    applications: &'a Applications,
}

impl<'a> Order<'a> {
    /// Of all policies and applications that can be read.
    pub fn of(policies: &'a [policy::EgressPolicy], applications: &'a Applications) -> Order<'a> {
        let places = in_order(policies).into_iter().map(|policy| policy.name.as_str()).zip(1..).collect();
        Order { places, shadowed: shadowed(policies, applications), applications }
    }
}

/// Objects that policies may name.
pub struct Named {
    /// Allocations, by namespace and name.
    pub allocations: HashSet<(String, String)>,
    /// Applications, whether they can be read or not.
    pub applications: BTreeSet<String>,
}

/// The new status; `None` while the policy is not part of the order.
pub fn status(
    object: &EgressPolicy,
    old: &EgressPolicyStatus,
    order: &Order<'_>,
    named: &Named,
    fleet: &Fleet<'_>,
    clock: &Clock,
) -> Option<EgressPolicyStatus> {
    let name = object.name_any();
    let place = *order.places.get(name.as_str())?;
    let observes = object.spec.mode == PolicyMode::Observe;
    let effective = match order.shadowed.get(name.as_str()) {
        None if observes => Wanted::bad(
            type_::EFFECTIVE,
            reason::OBSERVING,
            "changes nothing: status.observed and the metric aegis_policy_observed_flows_total count what it would decide about; \
             to enforce it, set spec.mode to Enforce",
        ),
        None => Wanted::good(
            type_::EFFECTIVE,
            reason::EFFECTIVE,
            "no policy before it decides about all that it matches",
        ),
        Some(before) => Wanted::bad(
            type_::EFFECTIVE,
            reason::SHADOWED,
            &format!(
                "never decides: EgressPolicy {before:?} comes before it and matches all that it matches; lower spec.precedence \
                 below that one's, or delete one of them"
            ),
        ),
    };
    let all = order.places.len();
    let accepted = without_application(object, order.applications, &named.applications)
        .or_else(|| without_allocation(object, &named.allocations))
        .unwrap_or_else(|| {
            let message = format!("number {place} of {all} policies in order");
            Wanted::good(type_::ACCEPTED, reason::ACCEPTED, &message)
        });
    let destination = object.spec.matches.destination.as_ref();
    let countries = destination.filter(|it| !it.countries.is_empty()).map(|_| fleet.knows_countries());
    let own = destination.iter().flat_map(|it| &it.hosts).cloned();
    let applications = object.spec.matches.applications().iter();
    let endpoints = applications.filter_map(|name| order.applications.get(name)).flatten();
    let theirs = endpoints.flat_map(|endpoint| &endpoint.hosts).map(|host| host.as_str().to_owned());
    let resolved = hosts::resolved("spec.match.destination", &own.chain(theirs).collect::<Vec<_>>(), fleet);
    let wanted =
        [accepted, effective, fleet.programmed_rule(object)].into_iter().chain(countries).chain(resolved);
    let conditions = clock.settle(&old.conditions, wanted.collect());
    let observed = observes.then(|| fleet.observed(&name));
    Some(EgressPolicyStatus { order: place, pods: fleet.pods(object), observed, conditions })
}

/// What to say of a policy that names an application of which nothing is known.
fn without_application(
    object: &EgressPolicy,
    known: &Applications,
    standing: &BTreeSet<String>,
) -> Option<Wanted> {
    let missing = object.spec.matches.applications().iter().find(|name| !known.contains_key(*name))?;
    let meanwhile = match object.spec.mode {
        PolicyMode::Enforce => {
            "pods that match otherwise are refused whatever no policy before this one decides"
        }
        PolicyMode::Observe => "nothing is counted",
    };
    let (reason, fault) = if standing.contains(missing) {
        (reason::INVALID, "is invalid, as its conditions explain; repair it or name another")
    } else {
        (reason::NOT_FOUND, "does not exist; create it or name another")
    };
    let field = "spec.match.destination.applications";
    let message = format!("{field}: EgressApplication {missing:?} {fault}; until then {meanwhile}");
    Some(Wanted::bad(type_::ACCEPTED, reason, &message))
}

/// What to say of one that names namespaces of which none of its allocations is. Where it names no namespaces, it cannot be told.
fn without_allocation(object: &EgressPolicy, existing: &HashSet<(String, String)>) -> Option<Wanted> {
    let egress = object.spec.egress.as_ref()?;
    let exists = |namespace: &str, name: &String| existing.contains(&(namespace.to_owned(), name.clone()));
    let namespaces = object.spec.matches.identity.iter().flat_map(|identity| &identity.namespaces);
    let lacking = namespaces.map(String::as_str).filter(|namespace| {
        !std::iter::once(&egress.primary).chain(&egress.secondary).any(|it| exists(namespace, it))
    });
    let lacking: Vec<&str> = lacking.collect();
    let message = format!(
        "spec.egress.primary: no such EgressAllocation in {}: pods there that match are refused; create it, or leave these \
         namespaces out",
        lacking.join(", ")
    );
    (!lacking.is_empty()).then(|| Wanted::bad(type_::ACCEPTED, reason::NOT_FOUND, &message))
}
