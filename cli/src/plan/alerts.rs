//! What UsageAlerts of the files would watch, and whether they would count.

use super::{ConditionChange, Planned};
use crate::state::{State, readable};
use crate::usage::period::words;
use aegis_crds::{AlertOrigin, EgressAllocation, MOST_ALERTS, UsageAlert, UsageAlertSpec, type_};
use ipnet::IpNet;
use kube::{Resource, ResourceExt};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// A limit that an alert keeps an eye on.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Watch {
    /// `NAMESPACE/NAME` of the alert.
    pub alert: String,
    /// What it looks at.
    pub watches: String,
    /// When it is raised.
    pub raised: String,
    /// When it is cleared.
    pub cleared: String,
}

/// What is wrong with an alert that no schema says. The API server asks the same by CEL.
pub fn faults(alert: &UsageAlert) -> Vec<String> {
    let spec = &alert.spec;
    let mut faults = Vec::new();
    let mut fault = |wrong: bool, text: &str| {
        if wrong {
            faults.push(text.to_owned());
        }
    };
    fault(alert.name_any().len() > 63, "metadata.name: must be at most 63 characters");
    let (ports, refusals) = (spec.port_use.as_ref(), spec.refusals.as_ref());
    fault(
        ports.is_none() && refusals.is_none() && spec.site_without_holders.is_none(),
        "spec: says nothing to look at: give spec.portUse, spec.refusals or spec.siteWithoutHolders",
    );
    fault(
        !spec.origins.is_empty() && ports.is_none() && refusals.is_none(),
        "spec.origins: narrows down spec.portUse and spec.refusals: give one of these, or leave origins out",
    );
    fault(
        ports.is_some_and(|it| it.clear_below_percent.is_some_and(|below| below > it.percent)),
        "spec.portUse.clearBelowPercent: must not be greater than spec.portUse.percent",
    );
    fault(
        refusals.is_some_and(|it| it.within_seconds % 10 != 0),
        "spec.refusals.withinSeconds: must be a multiple of 10",
    );
    for (number, origin) in spec.origins.iter().enumerate() {
        let range = origin.cidr.parse::<IpNet>().ok().filter(|range| *range == range.trunc());
        if range.is_none() {
            faults.push(format!(
                "spec.origins[{number}].cidr: must be a range in CIDR notation without host bits"
            ));
        }
    }
    faults
}

/// What alerts would watch that are created or changed, and what would be told of them and of others that it concerns.
pub fn alerts(before: &State, after: &State, objects: &[Planned]) -> (Vec<Watch>, Vec<ConditionChange>) {
    let planned: BTreeSet<&str> =
        objects.iter().filter(|it| it.change != "unchanged").map(|it| it.object.as_str()).collect();
    let (old, new) = (verdicts(before), verdicts(after));
    let mut changes = Vec::new();
    for (title, (is, reason, message)) in &new {
        let same = match old.get(title) {
            Some((was, _, said)) => was == is && (*is || said == message),
            None => *is,
        };
        if !same {
            changes.push(ConditionChange {
                object: title.clone(),
                condition: type_::ACCEPTED,
                status: *is,
                reason,
                message: message.clone(),
            });
        }
    }
    let counted = |alert: &&UsageAlert| {
        let title = title(alert);
        planned.contains(title.as_str()) && new.get(&title).is_some_and(|it| it.0)
    };
    let mut found: Vec<&UsageAlert> = readable(&after.alerts).into_iter().filter(counted).collect();
    found.sort_by_key(|it| title(it));
    (found.into_iter().flat_map(|alert| watches(alert, after)).collect(), changes)
}

fn title(alert: &UsageAlert) -> String {
    format!("{} {}", UsageAlert::kind(&()), full(alert))
}

fn full(object: &impl ResourceExt) -> String {
    format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any())
}

/// Whether each alert counts, by title.
fn verdicts(state: &State) -> BTreeMap<String, (bool, &'static str, String)> {
    let allocations: BTreeSet<String> = state.snapshot.allocations.iter().map(|it| full(&**it)).collect();
    let mut alerts = readable(&state.alerts);
    alerts.sort_by_key(|it| (it.namespace(), it.name_any()));
    let mut place: BTreeMap<String, usize> = BTreeMap::new();
    let verdict = |alert: &UsageAlert| {
        let namespace = alert.namespace().unwrap_or_default();
        let place = place.entry(namespace.clone()).or_default();
        *place += 1;
        let found = |name: &str| allocations.contains(&format!("{namespace}/{name}"));
        (title(alert), alert.spec.accepted(*place <= MOST_ALERTS, &found))
    };
    alerts.into_iter().map(verdict).collect()
}

fn watches(alert: &UsageAlert, state: &State) -> Vec<Watch> {
    let UsageAlertSpec { allocation_ref, origins, port_use, refusals, site_without_holders } = &alert.spec;
    let own = |it: &&EgressAllocation| {
        it.namespace() == alert.namespace()
            && allocation_ref.as_ref().is_none_or(|wanted| wanted.name == it.name_any())
    };
    let mut allocations: Vec<&EgressAllocation> =
        readable(&state.snapshot.allocations).into_iter().filter(own).collect();
    allocations.sort_by_key(|it| it.name_any());
    let whither = whither(origins);
    let watch = |watches, raised, cleared| Watch { alert: full(alert), watches, raised, cleared };
    let mut all = Vec::new();
    for allocation in allocations {
        let name = full(allocation);
        if let Some(limit) = port_use {
            let ports = &allocation.spec.ports;
            let count = u64::from((ports.last + 1).saturating_sub(ports.first));
            let share = |percent: u32| (count * u64::from(percent)).div_ceil(100);
            all.push(watch(
                format!("ports of each IPv4 address of {name} towards each origin{whither}"),
                format!(
                    "{} of {count} ({} %) in use{}",
                    share(limit.percent),
                    limit.percent,
                    lasting(limit.for_seconds)
                ),
                format!("below {} ({} %)", share(limit.clear_below()), limit.clear_below()),
            ));
        }
        if let Some(limit) = refusals {
            all.push(watch(
                format!("refused flows of {name} towards each origin{whither}, by reason"),
                format!("more than {} within {}", limit.more_than, words(limit.within_seconds.into())),
                format!("no more than {} are left", limit.more_than),
            ));
        }
        if let Some(limit) = site_without_holders {
            let sites: Vec<&str> = allocation.spec.sites.iter().map(|it| it.name.as_str()).collect();
            let sites =
                if sites.is_empty() { "it has no sites: all nodes".to_owned() } else { sites.join(", ") };
            all.push(watch(
                format!("each site of {name} ({sites})"),
                format!("no node of it holds a slice{}", lasting(limit.for_seconds)),
                "one holds some".to_owned(),
            ));
        }
    }
    all
}

fn lasting(seconds: u32) -> String {
    if seconds == 0 { String::new() } else { format!(" for {}", words(seconds.into())) }
}

fn whither(origins: &[AlertOrigin]) -> String {
    let origin = |it: &AlertOrigin| match it.port {
        Some(port) => format!("{} port {port}", it.cidr),
        None => it.cidr.clone(),
    };
    let origins: Vec<String> = origins.iter().map(origin).collect();
    if origins.is_empty() { String::new() } else { format!(" in {}", origins.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn alert(spec: Value) -> UsageAlert {
        let object = json!({
            "apiVersion": "aegis.dev/v1alpha1", "kind": "UsageAlert", "metadata": {"name": "a", "namespace": "shop"}, "spec": spec,
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn what_no_schema_says_is_found() {
        for (spec, said) in [
            (json!({}), "says nothing to look at"),
            (
                json!({"siteWithoutHolders": {}, "origins": [{"cidr": "192.0.2.0/24"}]}),
                "spec.origins: narrows down",
            ),
            (json!({"portUse": {"percent": 50, "clearBelowPercent": 60}}), "clearBelowPercent"),
            (json!({"refusals": {"withinSeconds": 65}}), "multiple of 10"),
            (json!({"refusals": {}, "origins": [{"cidr": "192.0.2.1/24"}]}), "spec.origins[0].cidr"),
        ] {
            let faults = faults(&alert(spec.clone()));
            assert!(faults.len() == 1 && faults[0].contains(said), "{spec}: {faults:?}");
        }
        let right = json!({"refusals": {}, "portUse": {"percent": 50, "clearBelowPercent": 50}, "origins": [{"cidr": "192.0.2.1/32"}]});
        assert_eq!(faults(&alert(right)), [""; 0]);
        let mut long = alert(json!({"refusals": {}}));
        long.metadata.name = Some("a".repeat(64));
        assert!(faults(&long)[0].starts_with("metadata.name"));
    }
}
