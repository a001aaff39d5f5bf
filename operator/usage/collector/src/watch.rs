//! What the collector knows of the cluster: which account owns which prefix, which accounts there are, what is told of their allocations and
//! addresses and of policies, and what alerts need to know.

use crate::objects;
use aegis_core::selector::Labels;
use aegis_crds::{AegisPrefix, EgressAddress, EgressAllocation, EgressPolicy, UsageAlert};
use aegis_usage::{Prefix, cluster};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::WatchStreamExt;
use kube::runtime::reflector::{self, Store};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, watcher};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// The API server ends each watch after this many seconds, and it is resumed where it ended.
pub const WATCH_SECONDS: u32 = 30;

/// Pause between two attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// For how long questions are answered from the same objects: a page asks several at once.
const FRESH: Duration = Duration::from_secs(1);

/// Local copies, kept current by watches.
#[derive(Clone)]
pub struct Cluster {
    prefixes: Watched<AegisPrefix>,
    allocations: Watched<EgressAllocation>,
    addresses: Watched<EgressAddress>,
    policies: Watched<EgressPolicy>,
    alerts: Watched<UsageAlert>,
    nodes: Store<PartialObjectMeta<Node>>,
    /// Prefixes and allocations, by which it is decided who sees what, have been listed.
    complete: Arc<AtomicBool>,
    /// And so have the objects that only are told about.
    listed: Arc<AtomicBool>,
    /// And what alerts need to know.
    alerting: Arc<AtomicBool>,
    told: Arc<Mutex<Option<Told>>>,
}

/// Objects, readable or not.
type Watched<K> = Store<DeserializeGuard<K>>;

/// What was made of them, and when.
type Told = (Instant, Arc<cluster::Cluster>);

impl Cluster {
    /// Starts the watches, which run until they are aborted.
    pub fn start(client: &Client, tasks: &mut JoinSet<&'static str>) -> Cluster {
        let cluster = Cluster {
            prefixes: copy("prefixes", Api::all(client.clone()), tasks),
            allocations: copy("allocations", Api::all(client.clone()), tasks),
            addresses: copy("addresses", Api::all(client.clone()), tasks),
            policies: copy("policies", Api::all(client.clone()), tasks),
            alerts: copy("alerts", Api::all(client.clone()), tasks),
            nodes: copy("nodes", Api::all(client.clone()), tasks),
            complete: Arc::default(),
            listed: Arc::default(),
            alerting: Arc::default(),
            told: Arc::default(),
        };
        let it = cluster.clone();
        tokio::spawn(async move {
            let (prefixes, allocations) =
                tokio::join!(it.prefixes.wait_until_ready(), it.allocations.wait_until_ready());
            it.complete.store(prefixes.is_ok() && allocations.is_ok(), Ordering::Release);
            let (addresses, policies, nodes) = tokio::join!(
                it.addresses.wait_until_ready(),
                it.policies.wait_until_ready(),
                it.nodes.wait_until_ready()
            );
            it.listed.store(addresses.is_ok() && policies.is_ok() && nodes.is_ok(), Ordering::Release);
            // Apart: who asks need not wait for a cluster that does not know the kind yet.
            let alerts = it.alerts.wait_until_ready().await;
            it.alerting.store(addresses.is_ok() && alerts.is_ok(), Ordering::Release);
        });
        cluster
    }

    /// Everything has been listed once: before that nobody knows what is missing.
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Prefixes that count, and whose they are.
    pub fn prefixes(&self) -> Vec<Prefix> {
        let prefixes = self.prefixes.state();
        prefixes.iter().filter_map(|prefix| owned(prefix.0.as_ref().ok()?)).collect()
    }

    /// What alerts are about has been listed once, too.
    pub fn is_alerting(&self) -> bool {
        self.is_complete() && self.alerting.load(Ordering::Acquire)
    }

    /// Alerts, readable or not.
    pub fn alerts(&self) -> Vec<Arc<DeserializeGuard<UsageAlert>>> {
        self.alerts.state()
    }

    /// Allocations, readable or not.
    pub fn allocations(&self) -> Vec<Arc<DeserializeGuard<EgressAllocation>>> {
        self.allocations.state()
    }

    /// Addresses, readable or not.
    pub fn addresses(&self) -> Vec<Arc<DeserializeGuard<EgressAddress>>> {
        self.addresses.state()
    }

    /// Namespaces with allocations or prefixes.
    pub fn accounts(&self) -> BTreeSet<String> {
        let owners = self.prefixes().into_iter().map(|prefix| prefix.account);
        let users = self.allocations.state().into_iter().filter_map(|allocation| allocation.namespace());
        owners.chain(users).collect()
    }

    /// What is told of objects, not older than [`FRESH`]. None: not all of them have been listed.
    pub fn told(&self) -> Option<Arc<cluster::Cluster>> {
        if !self.is_complete() || !self.listed.load(Ordering::Acquire) {
            return None;
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, known)) = told.as_ref().filter(|(since, _)| since.elapsed() < FRESH) {
            return Some(known.clone());
        }
        let (allocations, addresses, policies) =
            (self.allocations.state(), self.addresses.state(), self.policies.state());
        let nodes = self.nodes.state();
        let labels = |it: &PartialObjectMeta<Node>| -> Labels { it.labels().clone() };
        let nodes: BTreeMap<String, Labels> = nodes.iter().map(|it| (it.name_any(), labels(it))).collect();
        let known = Arc::new(objects::cluster(
            allocations.iter().filter_map(|it| it.0.as_ref().ok()),
            addresses.iter().filter_map(|it| it.0.as_ref().ok()),
            policies.iter().filter_map(|it| it.0.as_ref().ok()),
            &nodes,
        ));
        *told = Some((Instant::now(), known.clone()));
        Some(known)
    }
}

/// The prefix, if the operator has accepted it: one that overlaps another must not show its account what goes on there.
fn owned(prefix: &AegisPrefix) -> Option<Prefix> {
    let conditions = prefix.status.iter().flat_map(|status| &status.conditions);
    let accepted =
        conditions.into_iter().any(|it| it.type_ == aegis_crds::type_::ACCEPTED && it.status == "True");
    let range = prefix.spec.cidr.parse().ok()?;
    // One that has been edited may have been another account's.
    let unedited = prefix.metadata.generation == Some(1);
    let made = prefix.metadata.creation_timestamp.as_ref().filter(|_| unedited);
    let since = made.map(|time| time.0.as_second());
    accepted.then(|| Prefix { range, account: prefix.spec.account.clone(), since })
}

fn copy<K>(kind: &'static str, api: Api<K>, tasks: &mut JoinSet<&'static str>) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (reader, writer) = reflector::store();
    let objects = watcher(api, watcher::Config::default().timeout(WATCH_SECONDS))
        .backoff(Steady)
        // They are most of an object's size, and nobody here reads them.
        .modify(|object: &mut K| object.meta_mut().managed_fields = None)
        .reflect(writer);
    tasks.spawn(async move {
        let mut objects = std::pin::pin!(objects);
        while let Some(event) = objects.next().await {
            if let Err(error) = event {
                tracing::warn!(kind, %error, "watch failed, trying again");
            }
        }
        kind
    });
    reader
}

/// The same pause each time: an API server that comes back is noticed soon.
struct Steady;

impl Iterator for Steady {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(PAUSE)
    }
}

impl Backoff for Steady {
    fn reset(&mut self) {}
}
