//! The status of alerts.

use crate::alerts::{CONTROLLER, limit};
use crate::watch::Cluster;
use aegis_crds::{Condition, UsageAlert, UsageAlertStatus, reason, type_};
use aegis_usage::alert::{Key, MOST_RULES, Standing};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Api, Patch, PatchParams};
use kube::core::DeserializeGuard;
use kube::{Client, Resource, ResourceExt};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

type Alerts = [Arc<DeserializeGuard<UsageAlert>>];

/// Things that a message names.
const NAMED: usize = 3;

/// How it stands with an alert.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stand {
    /// Things that it is raised for.
    pub firing: u32,
    /// Things that exceed its limits, but not for long enough.
    pub pending: u32,
    /// Nodes that hold ports of the account and do not report.
    pub silent: u32,
    /// The first of what it is raised for.
    pub named: Vec<String>,
}

/// By namespace, name and identity: what the store knows of the alerts that there are.
pub fn stands(alerts: &Alerts, standings: Vec<Standing>) -> BTreeMap<(String, String, String), Stand> {
    let identity = |alert: &Arc<DeserializeGuard<UsageAlert>>| {
        (alert.namespace().unwrap_or_default(), alert.name_any(), alert.uid().unwrap_or_default())
    };
    let mut stands: BTreeMap<_, Stand> =
        alerts.iter().map(|alert| (identity(alert), Stand::default())).collect();
    for Standing { account, silent, tracks, .. } in standings {
        for ((_, _, _), stand) in stands.iter_mut().filter(|((namespace, _, _), _)| *namespace == account) {
            stand.silent = silent;
        }
        for (key, track) in tracks {
            let Some(stand) = stands.get_mut(&(account.clone(), key.alert.clone(), key.uid.clone())) else {
                continue;
            };
            let Some(raised) = track.raised else {
                stand.pending += 1;
                continue;
            };
            stand.firing += 1;
            if stand.named.len() < NAMED {
                let since = jiff::Timestamp::from_second(raised).unwrap_or_default();
                stand.named.push(format!("{} since {since}", subject(&key)));
            }
        }
    }
    stands
}

fn subject(key: &Key) -> String {
    let Key { kind, allocation, address, origin, protocol, reason, site, .. } = key;
    let mut words = vec![limit(*kind).to_owned()];
    words.extend(address.map(|it| it.to_string()).or_else(|| Some(allocation.clone())));
    words.extend(origin.map(|it| format!("to {it} ({})", protocol.name())));
    words.extend((!reason.is_empty()).then(|| reason.clone()));
    words.extend((!site.is_empty()).then(|| format!("site {site}")));
    words.join(" ")
}

/// Writes the status of alerts whose status is another one.
///
/// # Errors
/// The API server does not take one; the others are written.
pub async fn write(
    client: &Client,
    cluster: &Cluster,
    alerts: &Alerts,
    stands: &BTreeMap<(String, String, String), Stand>,
    now: i64,
) -> Result<(), kube::Error> {
    let allocations: BTreeSet<(String, String)> =
        cluster.allocations().iter().map(|it| (it.namespace().unwrap_or_default(), it.name_any())).collect();
    let mut sorted: Vec<_> = alerts.iter().collect();
    sorted.sort_by_key(|alert| (alert.namespace(), alert.name_any()));
    let mut place: BTreeMap<String, usize> = BTreeMap::new();
    let mut failed = Ok(());
    for alert in sorted {
        let namespace = alert.namespace().unwrap_or_default();
        let identity = (namespace.clone(), alert.name_any(), alert.uid().unwrap_or_default());
        let stand = stands.get(&identity).cloned().unwrap_or_default();
        let readable = alert.0.as_ref();
        let counts = match readable {
            Ok(alert) if alert.metadata.deletion_timestamp.is_none() => {
                let place = place.entry(namespace.clone()).or_default();
                *place += 1;
                *place <= MOST_RULES
            }
            Ok(_) => continue,
            Err(_) => false,
        };
        let found = |name: &str| allocations.contains(&(namespace.clone(), name.to_owned()));
        let accepted = accepted(readable.map_err(|error| error.error.to_string()), counts, &found);
        let before = readable.ok().and_then(|alert| alert.status.clone()).unwrap_or_default();
        let status = status(alert.meta().generation, accepted, &stand, &before, now);
        if status == before {
            continue;
        }
        let patch = serde_json::json!({
            "apiVersion": UsageAlert::api_version(&()), "kind": UsageAlert::kind(&()),
            "metadata": {"name": identity.1, "namespace": namespace}, "status": status,
        });
        let api: Api<DeserializeGuard<UsageAlert>> = Api::namespaced(client.clone(), &namespace);
        let params = PatchParams::apply(CONTROLLER).force();
        match api.patch_status(&identity.1, &params, &Patch::Apply(patch)).await {
            Ok(_) => {}
            // It is gone.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => failed = Err(error),
        }
    }
    failed
}

/// Status, reason and message of a condition.
type Verdict = (bool, &'static str, String);

fn accepted(alert: Result<&UsageAlert, String>, counts: bool, found: &dyn Fn(&str) -> bool) -> Verdict {
    let alert = match alert {
        Ok(alert) => alert,
        Err(error) => return (false, reason::INVALID, format!("it cannot be read: {error}")),
    };
    if !counts {
        let message = format!(
            "the namespace has more than {MOST_RULES} UsageAlerts, and this one comes after them by name: delete some, or let one look at \
             several allocations"
        );
        return (false, reason::LIMIT, message);
    }
    match &alert.spec.allocation_ref {
        Some(allocation) if !found(&allocation.name) => {
            let message = format!(
                "there is no EgressAllocation {} in this namespace: create it, or name another one in spec.allocationRef",
                allocation.name
            );
            (false, reason::NOT_FOUND, message)
        }
        _ => (true, reason::ACCEPTED, "use is looked at every 10 seconds".into()),
    }
}

fn status(
    generation: Option<i64>,
    accepted: Verdict,
    stand: &Stand,
    before: &UsageAlertStatus,
    now: i64,
) -> UsageAlertStatus {
    let mut words = stand.named.clone();
    let more = stand.firing as usize - stand.named.len();
    words.extend((more > 0).then(|| format!("{more} more")));
    let mut message = match stand.firing {
        0 => "no limit is exceeded for long enough".to_owned(),
        _ => words.join("; "),
    };
    if stand.silent > 0 {
        message += &format!(
            ". {} nodes that hold ports of the account do not report: what they may have to do with is not cleared",
            stand.silent
        );
    }
    let firing = match stand.firing {
        0 => (false, reason::QUIET, message),
        _ => (true, reason::RAISED, message),
    };
    let condition = |kind: &str, (is, reason, message): Verdict| {
        let status = if is { "True" } else { "False" };
        let same = before.conditions.iter().find(|it| it.type_ == kind && it.status == status);
        Condition {
            type_: kind.into(),
            status: status.into(),
            reason: reason.into(),
            message,
            observed_generation: generation,
            last_transition_time: same.map_or_else(
                || Time(jiff::Timestamp::from_second(now).unwrap_or_default()),
                |same| same.last_transition_time.clone(),
            ),
        }
    };
    UsageAlertStatus {
        observed_generation: generation,
        firing: stand.firing,
        pending: stand.pending,
        conditions: vec![condition(type_::ACCEPTED, accepted), condition(type_::FIRING, firing)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_keeps_its_time_while_it_is_the_same() {
        let quiet = (true, reason::ACCEPTED, String::new());
        let first = status(Some(1), quiet.clone(), &Stand::default(), &UsageAlertStatus::default(), 100);
        let second = status(Some(1), quiet.clone(), &Stand::default(), &first, 200);
        assert_eq!(first, second, "nothing is written");
        let stand = Stand { firing: 5, pending: 1, silent: 2, named: vec!["a".into(), "b".into()] };
        let third = status(Some(2), quiet, &stand, &second, 300);
        let time =
            |status: &UsageAlertStatus, at: usize| status.conditions[at].last_transition_time.0.as_second();
        assert_eq!((time(&third, 0), time(&third, 1)), (100, 300));
        assert_eq!((third.firing, third.pending, third.observed_generation), (5, 1, Some(2)));
        let message = &third.conditions[1].message;
        assert!(message.starts_with("a; b; 3 more. 2 nodes"), "{message}");
    }

    #[test]
    fn what_is_wrong_is_told() {
        let alert = |allocation: Option<&str>| {
            let spec = serde_json::json!({"refusals": {}, "allocationRef": allocation.map(|name| serde_json::json!({"name": name}))});
            UsageAlert::new("a", serde_json::from_value(spec).expect("a spec"))
        };
        let found = |name: &str| name == "partner";
        let told = |alert: &UsageAlert, counts| accepted(Ok(alert), counts, &found).1;
        assert_eq!(told(&alert(None), true), reason::ACCEPTED);
        assert_eq!(told(&alert(Some("partner")), true), reason::ACCEPTED);
        assert_eq!(told(&alert(Some("other")), true), reason::NOT_FOUND);
        assert_eq!(told(&alert(None), false), reason::LIMIT);
        assert_eq!(accepted(Err("spec.x".into()), false, &found).1, reason::INVALID);
    }
}
