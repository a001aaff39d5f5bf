//! Policies that can never decide.

use super::in_order;
use super::posture::asks_less;
use super::rules::{EgressPolicy, Identity, Rule};
use super::terms::{Applications, Term};
use ipnet::IpNet;
use std::collections::BTreeMap;

/// Policies of which everything is decided by one that comes before, with the first such. It is what can be told from the policies
/// and applications alone, for whatever pods: that several together leave nothing is not. One that only observes decides nothing, and shadows none.
pub fn shadowed<'a>(policies: &'a [EgressPolicy], applications: &Applications) -> BTreeMap<&'a str, &'a str> {
    let ordered = in_order(policies);
    let by = |(place, policy): (usize, &&'_ EgressPolicy)| -> Option<usize> {
        ordered.iter().take(place).position(|before| !before.observes && covers(before, policy, applications))
    };
    let found = ordered.iter().enumerate().filter_map(|(place, policy)| Some((place, by((place, policy))?)));
    found.map(|(place, before)| (ordered[place].name.as_str(), ordered[before].name.as_str())).collect()
}

/// Whether whatever the one matches is matched by the other.
fn covers(wide: &EgressPolicy, narrow: &EgressPolicy, applications: &Applications) -> bool {
    identifies(&wide.identity, &narrow.identity)
        && wide.posture.covers(&narrow.posture)
        && all_within(&wide.sources, &narrow.sources)
        && reaches(wide, narrow, applications)
}

/// Whether the destinations of the one are destinations of the other, each part of them of one part.
fn reaches(wide: &EgressPolicy, narrow: &EgressPolicy, applications: &Applications) -> bool {
    let terms = |policy| Term::of(Rule::Policy(policy), applications);
    let wide = terms(wide);
    terms(narrow).iter().all(|narrow| wide.iter().any(|wide| wide.contains(narrow)))
}

fn identifies(wide: &Identity, narrow: &Identity) -> bool {
    (wide.host_network || !narrow.host_network)
        && is_part(&narrow.namespaces, &wide.namespaces)
        && asks_less(wide.namespace_selector.as_ref(), narrow.namespace_selector.as_ref())
        && is_part(&narrow.service_accounts, &wide.service_accounts)
        && wide.labels.iter().all(|(key, value)| narrow.labels.get(key) == Some(value))
        && wide.expressions.iter().all(|expression| narrow.expressions.contains(expression))
}

/// Whether a choice lies within another one; an empty one is everything.
fn is_part(narrow: &[String], wide: &[String]) -> bool {
    wide.is_empty() || !narrow.is_empty() && narrow.iter().all(|entry| wide.contains(entry))
}

fn all_within(wide: &[IpNet], narrow: &[IpNet]) -> bool {
    let within = |range: &IpNet| wide.iter().any(|around| around.contains(range));
    wide.is_empty() || !narrow.is_empty() && narrow.iter().all(within)
}
