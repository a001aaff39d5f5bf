//! The Leases of nodes as the watch shows them, and when each was seen to change.

use crate::gate::Gate;
use crate::object::version;
use crate::watch::{CappedBackoff, WATCH_SECONDS};
use aegis_core::fence::{Holder, LABEL, Sighting, Sightings};
use futures::StreamExt;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// Local copies of the Leases, by name. They are kept apart from the other copies: nodes renew all the time, and nothing
/// has to be planned then.
#[derive(Clone)]
pub struct Leases {
    known: Arc<Mutex<Known>>,
    gate: Arc<Gate>,
    listed: Arc<Notify>,
    /// Told of changes of holders.
    dirty: Arc<Notify>,
}

#[derive(Default)]
struct Known {
    complete: bool,
    leases: BTreeMap<String, Lease>,
    sightings: Sightings,
    /// Names in the list that is under way.
    listing: BTreeSet<String>,
}

impl Leases {
    /// Starts the watch. The task runs until it is aborted.
    pub fn start(
        client: &Client,
        namespace: &str,
        gate: Arc<Gate>,
        dirty: Arc<Notify>,
        tasks: &mut JoinSet<&'static str>,
    ) -> Leases {
        let leases = Leases { known: Arc::default(), gate, listed: Arc::default(), dirty };
        let labels = format!("{}={}", LABEL.0, LABEL.1);
        let config = watcher::Config::default().labels(&labels).timeout(WATCH_SECONDS);
        let api = Api::<Lease>::namespaced(client.clone(), namespace);
        let events = watcher(api, config).backoff(CappedBackoff::default());
        let watching = leases.clone();
        tasks.spawn(async move {
            let mut events = std::pin::pin!(events);
            while let Some(event) = events.next().await {
                match event {
                    Ok(event) => watching.happened(event),
                    Err(error) => {
                        tracing::warn!(kind = "Lease", error = %error, "watch failed, trying again");
                        // Renewals were not seen, or not possible.
                        watching.begin();
                    }
                }
            }
            "Lease"
        });
        leases
    }

    /// Waits until all have been listed once.
    pub async fn complete(&self) {
        loop {
            // Registered before looking, so that the end of the list is not missed.
            let listed = self.listed.notified();
            if self.known().complete {
                return;
            }
            listed.await;
        }
    }

    /// Begins anew to count how long nodes have not renewed.
    pub fn begin(&self) {
        let now = self.gate.now();
        self.known().sightings.begin(now);
    }

    /// Whether there is no Lease.
    pub fn is_empty(&self) -> bool {
        self.known().leases.is_empty()
    }

    /// All sightings as they are now. Nodes (given by the names of their Leases) without one are taken note of.
    pub fn sightings<'a>(&self, nodes: impl Iterator<Item = &'a str>, now: Duration) -> Sightings {
        let mut known = self.known();
        for name in nodes.filter(|name| !known.leases.contains_key(*name)).collect::<Vec<_>>() {
            known.sightings.saw(name, 0, Holder::Nobody, now);
        }
        known.sightings.clone()
    }

    /// The Lease of that very sighting; `None` inside if there was none.
    pub fn get(&self, name: &str, seen: Sighting) -> Option<Option<Lease>> {
        let known = self.known();
        let lease = known.leases.get(name).cloned();
        (known.sightings.get(name) == Some(seen)).then_some(lease)
    }

    /// The operator has written a Lease.
    pub fn wrote(&self, lease: Lease) {
        let now = self.gate.now();
        self.known().note(lease, now);
    }

    /// The operator has written once more a Lease that it held.
    pub fn confirmed(&self, from: Sighting, lease: Lease) {
        let (now, name, version) = (self.gate.now(), lease.name_any(), version(&lease.metadata));
        let mut known = self.known();
        if known.sightings.get(&name) == Some(from) {
            known.note(lease, now);
        }
        known.sightings.confirmed(&name, from, version);
    }

    fn happened(&self, event: Event<Lease>) {
        let now = self.gate.now();
        let mut known = self.known();
        let changed = match event {
            Event::Init => {
                known.listing.clear();
                false
            }
            Event::InitApply(lease) => {
                known.listing.insert(lease.name_any());
                known.note(lease, now)
            }
            Event::InitDone => {
                let listing = std::mem::take(&mut known.listing);
                known.leases.retain(|name, _| listing.contains(name));
                known.sightings.retain(|name| listing.contains(name));
                known.complete = true;
                self.listed.notify_waiters();
                true
            }
            Event::Apply(lease) => known.note(lease, now),
            Event::Delete(lease) => {
                let name = lease.name_any();
                known.leases.remove(&name);
                known.sightings.retain(|other| other != name);
                true
            }
        };
        drop(known);
        if changed {
            self.dirty.notify_one();
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// Takes note of a Lease; true if it has another holder.
    fn note(&mut self, mut lease: Lease, now: Duration) -> bool {
        lease.metadata.managed_fields = None;
        let name = lease.name_any();
        let holder = holder(&lease);
        let before = self.leases.get(&name).map(self::holder);
        self.sightings.saw(&name, version(&lease.metadata), holder, now);
        self.leases.insert(name, lease);
        before != Some(holder)
    }
}

fn holder(lease: &Lease) -> Holder {
    let identity = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
    Holder::of(identity.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::coordination::v1::LeaseSpec;
    use kube::api::ObjectMeta;

    fn leases() -> Leases {
        Leases {
            known: Arc::default(),
            gate: Arc::new(Gate::new()),
            listed: Arc::default(),
            dirty: Arc::default(),
        }
    }

    fn lease(version: u64, holder: &str) -> Lease {
        Lease {
            metadata: ObjectMeta {
                name: Some("aegis-node-n1".into()),
                resource_version: Some(version.to_string()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec { holder_identity: Some(holder.into()), ..LeaseSpec::default() }),
        }
    }

    fn seen(leases: &Leases) -> Option<Sighting> {
        leases.known().sightings.get("aegis-node-n1")
    }

    async fn is_dirty(leases: &Leases) -> bool {
        tokio::time::timeout(Duration::from_millis(1), leases.dirty.notified()).await.is_ok()
    }

    #[tokio::test]
    async fn renewals_are_no_reason_to_plan_but_changes_of_holders_are() {
        let leases = leases();
        leases.happened(Event::Init);
        leases.happened(Event::InitApply(lease(5, "n1")));
        assert!(tokio::time::timeout(Duration::from_millis(1), leases.complete()).await.is_err());
        leases.happened(Event::InitDone);
        leases.complete().await;
        assert!(is_dirty(&leases).await);
        leases.happened(Event::Apply(lease(6, "n1")));
        assert_eq!(seen(&leases).unwrap().version, 6);
        assert!(!is_dirty(&leases).await);
        leases.happened(Event::Apply(lease(7, "aegis-operator")));
        assert!(is_dirty(&leases).await);
        leases.happened(Event::Delete(lease(8, "aegis-operator")));
        assert!(is_dirty(&leases).await);
        assert_eq!(seen(&leases), None);
    }

    #[test]
    fn what_a_new_list_lacks_is_gone() {
        let leases = leases();
        leases.happened(Event::Apply(lease(5, "n1")));
        leases.happened(Event::Init);
        assert!(seen(&leases).is_some(), "the list is under way");
        leases.happened(Event::InitDone);
        assert_eq!(seen(&leases), None);
        let sightings = leases.sightings(["aegis-node-n1"].into_iter(), Duration::from_secs(9));
        let missing = sightings.get("aegis-node-n1").unwrap();
        assert_eq!((missing.version, missing.since), (0, Duration::from_secs(9)));
        assert_eq!(leases.get("aegis-node-n1", missing), Some(None));
    }

    #[test]
    fn a_lease_is_written_only_as_it_was_judged() {
        let leases = leases();
        leases.happened(Event::Apply(lease(5, "aegis-operator")));
        let judged = seen(&leases).unwrap();
        assert!(leases.get("aegis-node-n1", judged).is_some());
        leases.confirmed(judged, lease(6, "aegis-operator"));
        assert_eq!(seen(&leases).unwrap(), Sighting { version: 6, ..judged }, "held without a break");
        assert_eq!(leases.get("aegis-node-n1", judged), None);
        leases.wrote(lease(7, ""));
        leases.confirmed(judged, lease(6, "aegis-operator"));
        assert_eq!(seen(&leases).unwrap().version, 7, "an answer that comes late");
    }
}
