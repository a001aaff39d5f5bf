//! Status of an `EgressPolicy`.

use super::conditions::{Clock, Wanted};
use super::fleet::{Fleet, list};
use super::hosts;
use aegis_core::policy::{self, Applications, Exit, Identity, impossible, in_order, shadowed};
use aegis_core::selector::Labels;
use aegis_crds::{EgressPolicy, EgressPolicyStatus, PolicyMode, reason, type_};
use kube::ResourceExt;
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// The order in which policies are asked, and what follows from it.
pub struct Order<'a> {
    /// Place of each, from 1 on, and what it says.
    places: BTreeMap<&'a str, (u32, &'a policy::EgressPolicy)>,
    /// Those that can never decide, with the one that does.
    shadowed: BTreeMap<&'a str, &'a str>,
    /// Applications that can be read.
    applications: &'a Applications,
}

impl<'a> Order<'a> {
    /// Of all policies and applications that can be read.
    pub fn of(policies: &'a [policy::EgressPolicy], applications: &'a Applications) -> Order<'a> {
        let places = in_order(policies).into_iter().zip(1..);
        let places = places.map(|(policy, place)| (policy.name.as_str(), (place, policy))).collect();
        Order { places, shadowed: shadowed(policies, applications), applications }
    }
}

/// Objects that policies may name.
pub struct Named<'a> {
    /// Allocations, by namespace and name.
    pub allocations: HashSet<(String, String)>,
    /// Those of them from which some node may start flows.
    pub serving: HashSet<(String, String)>,
    /// Applications, whether they can be read or not.
    pub applications: BTreeSet<String>,
    /// Namespaces, with their labels.
    pub namespaces: BTreeMap<&'a str, &'a Labels>,
}

impl Named<'_> {
    /// Namespaces that a policy chooses, by labels existing ones. `None` where it chooses neither by name nor by labels: all of them,
    /// most without a pod that it is about.
    fn chosen<'a>(&'a self, identity: &'a Identity) -> Option<Vec<&'a str>> {
        let names = &identity.namespaces;
        match &identity.namespace_selector {
            None => (!names.is_empty()).then(|| names.iter().map(String::as_str).collect()),
            Some(selector) => {
                let named = |name: &str| names.is_empty() || names.iter().any(|it| it == name);
                let chosen =
                    self.namespaces.iter().filter(|(name, labels)| named(name) && selector.matches(labels));
                Some(chosen.map(|(name, _)| *name).collect())
            }
        }
    }
}

/// The new status; `None` while the policy is not part of the order.
pub fn status(
    object: &EgressPolicy,
    old: &EgressPolicyStatus,
    order: &Order<'_>,
    named: &Named<'_>,
    fleet: &Fleet<'_>,
    clock: &Clock,
) -> Option<EgressPolicyStatus> {
    let name = object.name_any();
    let (place, policy) = *order.places.get(name.as_str())?;
    let observes = object.spec.mode == PolicyMode::Observe;
    let chosen = named.chosen(&policy.identity);
    let nothing = matches_nothing(policy, named, chosen.as_deref());
    let nothing = nothing.map(|why| Wanted::bad(type_::EFFECTIVE, reason::MATCHES_NOTHING, &why));
    let effective = nothing.unwrap_or_else(|| match order.shadowed.get(name.as_str()) {
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
    });
    let all = order.places.len();
    let accepted = without_application(object, order.applications, &named.applications)
        .or_else(|| without_allocation(policy, named, chosen.as_deref()))
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
    let programmed =
        unserved(policy, named, chosen.as_deref()).unwrap_or_else(|| fleet.programmed_rule(object));
    let wanted = [accepted, effective, programmed].into_iter().chain(countries).chain(resolved);
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

/// Why a policy matches nothing, whatever its order, as far as that can be told without looking at pods.
fn matches_nothing(
    policy: &policy::EgressPolicy,
    named: &Named<'_>,
    chosen: Option<&[&str]>,
) -> Option<String> {
    if let Some(field) = impossible(policy) {
        return Some(format!("matches nothing: what {field} asks for contradicts itself; correct it"));
    }
    if chosen.is_none_or(|chosen| chosen.iter().any(|name| named.namespaces.contains_key(*name))) {
        return None;
    }
    let Identity { namespaces, namespace_selector, .. } = &policy.identity;
    let why = match (namespaces.is_empty(), namespace_selector) {
        (false, None) => "spec.match.identity.namespaces: there is no such namespace",
        (true, _) => "spec.match.identity.namespaceSelector: no namespace has such labels",
        (false, Some(_)) => {
            "spec.match.identity: no namespace of spec.match.identity.namespaces has the labels of namespaceSelector"
        }
    };
    Some(format!("matches nothing at present: {why}; correct it, unless one is yet to come"))
}

/// Those of the chosen namespaces of which this is true; `None` where there are none, or none are chosen.
fn of_chosen<'n>(chosen: Option<&[&'n str]>, lacks: impl Fn(&str) -> bool) -> Option<Vec<&'n str>> {
    let lacking: Vec<&str> = chosen?.iter().filter(|namespace| lacks(namespace)).copied().collect();
    (!lacking.is_empty()).then_some(lacking)
}

/// What to say of one that chooses namespaces in which there is no such allocation. Where it chooses none, it cannot be told.
fn without_allocation(
    policy: &policy::EgressPolicy,
    named: &Named<'_>,
    chosen: Option<&[&str]>,
) -> Option<Wanted> {
    let Exit::Allocations { primary, secondary } = &policy.exit else { return None };
    let exists =
        |namespace: &str, name: &String| named.allocations.contains(&(namespace.to_owned(), name.clone()));
    let neither =
        |namespace: &str| !std::iter::once(primary).chain(secondary).any(|name| exists(namespace, name));
    let message = if let Some(lacking) = of_chosen(chosen, neither) {
        format!(
            "spec.egress.primary: no such EgressAllocation in {}: pods there that match are refused; create it, or leave these \
             namespaces out",
            list(&lacking)
        )
    } else {
        let lacking = of_chosen(chosen, |namespace| !exists(namespace, primary))?;
        format!(
            "spec.egress.primary: no such EgressAllocation in {}: pods there leave from the secondary, {:?}; create it, or name \
             another",
            list(&lacking),
            secondary.as_deref().unwrap_or_default()
        )
    };
    Some(Wanted::bad(type_::ACCEPTED, reason::NOT_FOUND, &message))
}

/// What to say of one whose allocations are there, and have nothing to leave from: what nodes enforce is that nothing leaves, which is
/// not what was asked for.
fn unserved(policy: &policy::EgressPolicy, named: &Named<'_>, chosen: Option<&[&str]>) -> Option<Wanted> {
    let Exit::Allocations { primary, secondary } = &policy.exit else { return None };
    let lacking = of_chosen(chosen, |namespace| {
        let any = |of: &HashSet<(String, String)>| {
            std::iter::once(primary)
                .chain(secondary)
                .any(|name| of.contains(&(namespace.to_owned(), name.clone())))
        };
        any(&named.allocations) && !any(&named.serving)
    })?;
    let message = format!(
        "spec.egress: no node holds a slice of the allocations in {}, as their conditions explain: pods there that match are refused \
         until one does",
        list(&lacking)
    );
    Some(Wanted::bad(type_::PROGRAMMED, reason::UNAVAILABLE, &message))
}
