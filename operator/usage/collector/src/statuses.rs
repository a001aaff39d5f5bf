//! The status of alerts.

use crate::alerts::{CONTROLLER, limit};
use crate::watch::Cluster;
use aegis_crds::{Condition, MOST_ALERTS, UsageAlert, UsageAlertStatus, reason, type_};
use aegis_usage::alert::{Key, MOST_RULES, Standing};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Api, Patch, PatchParams};
use kube::core::DeserializeGuard;
use kube::{Client, Resource, ResourceExt};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

type Alerts = [Arc<DeserializeGuard<UsageAlert>>];

/// Namespace, name and identity of an alert.
type Identity = (String, String, String);

/// What is told is what is done.
const _: () = assert!(MOST_ALERTS == MOST_RULES);

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

fn identity(alert: &DeserializeGuard<UsageAlert>) -> Identity {
    (alert.namespace().unwrap_or_default(), alert.name_any(), alert.uid().unwrap_or_default())
}

/// Alerts that count, as they do for the store: the first of each namespace by name.
fn counting(alerts: &Alerts) -> BTreeSet<Identity> {
    let readable = alerts
        .iter()
        .filter(|alert| alert.0.as_ref().is_ok_and(|alert| alert.metadata.deletion_timestamp.is_none()));
    let sorted: BTreeSet<Identity> = readable.map(|alert| identity(alert)).collect();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    let mut counts = |namespace: &str| {
        let place = places.entry(namespace.into()).or_default();
        *place += 1;
        *place <= MOST_ALERTS
    };
    sorted.into_iter().filter(|(namespace, _, _)| counts(namespace)).collect()
}

/// What the store knows of the alerts that count.
pub fn stands(alerts: &Alerts, standings: Vec<Standing>) -> BTreeMap<Identity, Stand> {
    let mut stands: BTreeMap<_, Stand> =
        counting(alerts).into_iter().map(|identity| (identity, Stand::default())).collect();
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
    stands: &BTreeMap<Identity, Stand>,
    now: i64,
) -> Result<(), kube::Error> {
    let allocations: BTreeSet<(String, String)> =
        cluster.allocations().iter().map(|it| (it.namespace().unwrap_or_default(), it.name_any())).collect();
    let mut failed = Ok(());
    for alert in alerts {
        let identity = identity(alert);
        let namespace = identity.0.clone();
        let readable = alert.0.as_ref();
        if readable.is_ok_and(|alert| alert.metadata.deletion_timestamp.is_some()) {
            continue;
        }
        let counts = stands.contains_key(&identity);
        let stand = stands.get(&identity).cloned().unwrap_or_default();
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
    alert.spec.accepted(counts, found)
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
    fn alerts_that_do_not_count_have_no_figures() {
        let alert = |namespace: &str, number: usize| {
            let object = serde_json::json!({
                "apiVersion": "aegis.dev/v1alpha1", "kind": "UsageAlert", "spec": {"refusals": {}},
                "metadata": {"name": format!("a{number:03}"), "namespace": namespace, "uid": number.to_string()},
            });
            Arc::new(serde_json::from_value::<DeserializeGuard<UsageAlert>>(object).expect("an alert"))
        };
        let mut alerts: Vec<_> = (0..MOST_ALERTS + 3).rev().map(|number| alert("many", number)).collect();
        alerts.push(alert("one", 900));
        let stands = stands(&alerts, Vec::new());
        let of = |namespace: &str| {
            stands.keys().filter(|it| it.0 == namespace).map(|it| it.1.clone()).collect::<Vec<_>>()
        };
        assert_eq!(of("one"), ["a900"]);
        assert_eq!(of("many"), (0..MOST_ALERTS).map(|number| format!("a{number:03}")).collect::<Vec<_>>());
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
