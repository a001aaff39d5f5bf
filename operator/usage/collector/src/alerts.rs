//! Alerts: what accounts want to be told is put to the store every ten seconds, and what comes of it written as events and status.

use crate::statuses;
use crate::watch::Cluster;
use aegis_crds::{EgressAddress, EgressAllocation, HoldingState, UsageAlert, UsageAlertSpec};
use aegis_usage::alert::{Account, Allocation, Happening, Item, Kind, PortUse, Refusals, Rule, Told};
use aegis_usage::{Clock, Metrics, Store};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Api, ObjectMeta, PostParams};
use kube::core::Status;
use kube::{Client, Resource, ResourceExt};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// How often use is looked at: agents report as often.
const EVERY: Duration = Duration::from_secs(10);

/// Events that are written in one go, those of all accounts in turn; more are left for the next.
const EVENTS: u32 = 100;

/// Older happenings are in the feed only: events are about now.
const RECENT: i64 = 3_600;

/// Most bytes of an event's note.
const NOTE: usize = 1_024;

/// Who writes events and status.
pub const CONTROLLER: &str = "aegis.dev/collector";

/// Looks at use, and tells, for ever.
pub async fn watch(client: Client, cluster: Cluster, store: Arc<Store>, clock: Clock, metrics: Metrics) {
    let began = clock();
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut counted = BTreeSet::new();
    loop {
        ticks.tick().await;
        if !cluster.is_alerting() {
            continue;
        }
        let done = once(&client, &cluster, &store, (clock(), began), &metrics, &mut counted).await;
        if let Err(error) = done {
            metrics.alerts_failed();
            tracing::warn!(%error, "alerts are not all told; they will be the next time");
        }
    }
}

/// Why not all was told.
#[derive(Debug, thiserror::Error)]
enum AlertError {
    /// An object that the operator, or a newer version, wrote.
    #[error("{0} cannot be read: is the collector older than the resource definitions?")]
    Unreadable(String),
    /// The store.
    #[error("the store fails: {0}")]
    Store(#[from] aegis_usage::Error),
    /// The API server.
    #[error("the API server does not take {what}: {source}")]
    Api {
        /// What was written.
        what: &'static str,
        /// Why not.
        source: Box<kube::Error>,
    },
    /// A thread ended.
    #[error("{0}")]
    Thread(#[from] tokio::task::JoinError),
}

async fn once(
    client: &Client,
    cluster: &Cluster,
    store: &Arc<Store>,
    (now, began): (i64, i64),
    metrics: &Metrics,
    counted: &mut BTreeSet<(String, String)>,
) -> Result<(), AlertError> {
    // Noted now, so that it is not when somebody first asks that a prefix has a new owner.
    let prefixes = cluster.prefixes();
    blocking(store, move |store| store.owned(&prefixes, now)).await?;
    let alerts: Vec<_> = cluster.alerts();
    let accounts = accounts(cluster, &alerts)?;
    let (standings, items) = blocking(store, move |store| store.watch(&accounts, now, began)).await?;
    for item in &items {
        metrics.happened(&item.account, &item.key.alert);
    }
    let stands = statuses::stands(&alerts, standings);
    let figures = stands.iter().map(|((namespace, name, _), stand)| {
        ((namespace.clone(), name.clone()), (i64::from(stand.firing), i64::from(stand.pending)))
    });
    metrics.alerts(counted, &figures.collect());
    let told = tell(client, store, now).await;
    let written = statuses::write(client, cluster, &alerts, &stands, now).await;
    told?;
    written.map_err(|source| AlertError::Api { what: "a status", source: Box::new(source) })
}

/// Writes an event for each item of which there is none. An event has its item's name, so that the same twice is one. What the API server
/// does not take of an account is left for the next time, and keeps nothing of others back.
async fn tell(client: &Client, store: &Arc<Store>, now: i64) -> Result<(), AlertError> {
    let (mut left, mut failed) = (BTreeSet::new(), None);
    for told in blocking(store, |store| store.untold(EVENTS)).await? {
        let account = told.item.account.clone();
        if left.contains(&account) {
            continue;
        }
        if told.item.published >= now - RECENT {
            let events: Api<Event> = Api::namespaced(client.clone(), &account);
            match events.create(&PostParams::default(), &event(&told)).await {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if is_settled(&status) => {
                    tracing::debug!(%account, why = status.message, "there is no event of an alert");
                }
                Err(source) => {
                    // Who does not answer at all answers for no other account either.
                    let answered = matches!(source, kube::Error::Api(_));
                    failed.get_or_insert(AlertError::Api { what: "an event", source: Box::new(source) });
                    left.insert(account);
                    if answered {
                        continue;
                    }
                    break;
                }
            }
        }
        blocking(store, move |store| store.tell(&told)).await?;
    }
    failed.map_or(Ok(()), Err)
}

/// Whether an event that was not taken never will be, or need not: it is there, or its namespace is gone or going, or it cannot be written as it
/// is.
fn is_settled(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    let ending = causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating");
    [404, 409, 422].contains(&status.code) || (status.code == 403 && ending)
}

fn event(told: &Told) -> Event {
    let item = &told.item;
    let (reason, kind) = match item.happening {
        Happening::Raised => ("AlertRaised", "Warning"),
        Happening::Cleared => ("AlertCleared", "Normal"),
    };
    let time = jiff::Timestamp::from_second(item.published).unwrap_or_default();
    let name = item.key.alert.clone();
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{}", item.id.get(..16).unwrap_or(&item.id))),
            namespace: Some(item.account.clone()),
            ..ObjectMeta::default()
        },
        action: Some("Evaluate".into()),
        event_time: Some(MicroTime(time)),
        note: Some(note(item)),
        reason: Some(reason.into()),
        regarding: Some(ObjectReference {
            api_version: Some(UsageAlert::api_version(&()).into_owned()),
            kind: Some(UsageAlert::kind(&()).into_owned()),
            name: Some(name),
            namespace: Some(item.account.clone()),
            uid: Some(item.key.uid.clone()),
            ..ObjectReference::default()
        }),
        reporting_controller: Some(CONTROLLER.into()),
        reporting_instance: Some(
            std::env::var("HOSTNAME").ok().filter(|it| !it.is_empty()).unwrap_or("collector".into()),
        ),
        type_: Some(kind.into()),
        ..Event::default()
    }
}

fn note(item: &Item) -> String {
    let mut note = format!("{}. {}", item.title(), item.text().join(" "));
    let end = (0..=NOTE).rev().find(|at| note.is_char_boundary(*at)).unwrap_or(0);
    note.truncate(end);
    note
}

async fn blocking<T: Send + 'static>(
    store: &Arc<Store>,
    work: impl FnOnce(&Store) -> Result<T, aegis_usage::Error> + Send + 'static,
) -> Result<T, AlertError> {
    let store = store.clone();
    Ok(tokio::task::spawn_blocking(move || work(&store)).await??)
}

/// All accounts with allocations or alerts. Nothing is looked at while an object cannot be read: what is not known is not guessed.
fn accounts(
    cluster: &Cluster,
    alerts: &[Arc<kube::core::DeserializeGuard<UsageAlert>>],
) -> Result<Vec<Account>, AlertError> {
    let mut accounts: BTreeMap<String, Account> = BTreeMap::new();
    let unreadable = |kind: &str, name: String| AlertError::Unreadable(format!("{kind} {name}"));
    for guard in cluster.allocations() {
        let namespace = guard.namespace().unwrap_or_default();
        let read = guard
            .0
            .as_ref()
            .map_err(|_| unreadable("EgressAllocation", format!("{namespace}/{}", guard.name_any())))?;
        accounts.entry(namespace).or_default().allocations.insert(read.name_any(), allocation(read));
    }
    for guard in cluster.addresses() {
        let read = guard.0.as_ref().map_err(|_| unreadable("EgressAddress", guard.name_any()))?;
        let of = &read.spec.allocation_ref;
        let account = accounts.get_mut(&of.namespace);
        let (Some(allocation), Some(address)) =
            (account.and_then(|it| it.allocations.get_mut(&of.name)), address(read))
        else {
            continue;
        };
        if address.is_ipv6() && !read.spec.address.contains('/') {
            allocation.singles.insert(address);
        }
        allocation.addresses.insert(address, holders(read));
    }
    for guard in alerts {
        let account = accounts.entry(guard.namespace().unwrap_or_default()).or_default();
        // One that cannot be read says so in its status.
        if let Ok(alert) = &guard.0
            && alert.metadata.deletion_timestamp.is_none()
        {
            account.rules.push(rule(alert.name_any(), alert.uid().unwrap_or_default(), &alert.spec));
        }
    }
    for (name, account) in &mut accounts {
        account.name = name.clone();
        account.rules.sort_by(|one, other| one.name.cmp(&other.name));
    }
    Ok(accounts.into_values().collect())
}

fn rule(name: String, uid: String, spec: &UsageAlertSpec) -> Rule {
    let port_use = spec.port_use.as_ref().map(|limit| PortUse {
        percent: limit.percent.into(),
        clear_below: limit.clear_below().into(),
        wait: limit.for_seconds.into(),
    });
    let refusals = spec
        .refusals
        .as_ref()
        .map(|limit| Refusals { more_than: limit.more_than.into(), within: limit.within_seconds.into() });
    // The API server lets no other ranges in.
    let origins = spec.origins.iter().filter_map(|it| Some((it.cidr.parse().ok()?, it.port)));
    Rule {
        name,
        uid,
        allocation: spec.allocation_ref.as_ref().map(|it| it.name.clone()),
        origins: origins.collect(),
        port_use,
        refusals,
        site_without_holders: spec.site_without_holders.as_ref().map(|it| it.for_seconds.into()),
    }
}

fn allocation(object: &EgressAllocation) -> Allocation {
    let ports = &object.spec.ports;
    let sites = object.status.iter().flat_map(|status| match object.spec.sites.is_empty() {
        true => vec![(String::new(), status.nodes)],
        false => status.sites.iter().map(|site| (site.name.clone(), site.slices_held)).collect(),
    });
    Allocation {
        ports: (i64::from(ports.last) - i64::from(ports.first) + 1).max(0),
        singles: BTreeSet::new(),
        addresses: BTreeMap::new(),
        sites: sites.collect(),
    }
}

/// The address, or the first one of the /64: as agents report it.
fn address(object: &EgressAddress) -> Option<IpAddr> {
    object.spec.address.split('/').next()?.parse().ok()
}

/// Nodes with ports of it that may be in use.
fn holders(object: &EgressAddress) -> BTreeSet<String> {
    let live = object.spec.holdings.iter().filter(|it| it.state != HoldingState::Quarantined);
    live.map(|holding| holding.node.clone()).collect()
}

/// The words of a limit.
pub fn limit(kind: Kind) -> &'static str {
    match kind {
        Kind::PortUse => "portUse",
        Kind::Refusals => "refusals",
        Kind::SiteWithoutHolders => "siteWithoutHolders",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_will_never_be_taken_is_settled() {
        let settled = |code: u16, cause: &str| {
            let status = serde_json::json!({"code": code, "details": {"causes": [{"reason": cause}]}});
            is_settled(&serde_json::from_value(status).expect("a status"))
        };
        for (code, cause) in [(404, ""), (409, ""), (422, "FieldValueInvalid"), (403, "NamespaceTerminating")]
        {
            assert!(settled(code, cause), "{code} {cause}");
        }
        for (code, cause) in [(403, ""), (401, ""), (429, ""), (500, "NamespaceTerminating")] {
            assert!(!settled(code, cause), "{code} {cause}");
        }
    }
}
