//! Status of an `EgressApplication`.

use super::conditions::{Clock, Wanted};
use crate::watch::Guarded;
use aegis_crds::{EgressApplicationStatus, EgressPolicy, reason, type_};
use kube::ResourceExt;
use std::collections::BTreeMap;

/// Most policies that a message names.
const NAMED: usize = 3;

/// Names of the policies that name each application, ascending.
pub fn users(policies: &[Guarded<EgressPolicy>]) -> BTreeMap<&str, Vec<String>> {
    let mut users: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for policy in policies.iter().filter_map(|policy| policy.0.as_ref().ok()) {
        for application in policy.spec.matches.applications() {
            users.entry(application).or_default().push(policy.name_any());
        }
    }
    users.values_mut().for_each(|policies| policies.sort_unstable());
    users
}

/// The new status, of one that these policies name.
pub fn status(old: &EgressApplicationStatus, policies: &[String], clock: &Clock) -> EgressApplicationStatus {
    let message = match policies.len() {
        0 => "no EgressPolicy names it".to_owned(),
        all @ 1..=NAMED => format!("{all} EgressPolicy objects name it: {}", policies.join(", ")),
        all => format!(
            "{all} EgressPolicy objects name it: {} and {} more",
            policies[..NAMED].join(", "),
            all - NAMED
        ),
    };
    let accepted = Wanted::good(type_::ACCEPTED, reason::ACCEPTED, &message);
    EgressApplicationStatus {
        policies: u32::try_from(policies.len()).unwrap_or(u32::MAX),
        conditions: clock.settle(&old.conditions, vec![accepted]),
    }
}
