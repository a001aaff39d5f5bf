//! What the collector knows of the cluster: which account owns which prefix, which accounts there are, and what alerts need to know.

use aegis_crds::{AegisPrefix, EgressAddress, EgressAllocation, UsageAlert};
use aegis_usage::Prefix;
use futures::StreamExt;
use kube::api::Api;
use kube::core::DeserializeGuard;
use kube::runtime::WatchStreamExt;
use kube::runtime::reflector::{self, Store};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, watcher};
use kube::{Client, Resource, ResourceExt};
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;

/// The API server ends each watch after this many seconds, and it is resumed where it ended.
pub const WATCH_SECONDS: u32 = 30;

/// Pause between two attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// Local copies, kept current by watches.
#[derive(Clone)]
pub struct Cluster {
    prefixes: Store<DeserializeGuard<AegisPrefix>>,
    allocations: Store<DeserializeGuard<EgressAllocation>>,
    addresses: Store<DeserializeGuard<EgressAddress>>,
    alerts: Store<DeserializeGuard<UsageAlert>>,
    complete: Arc<AtomicBool>,
    alerting: Arc<AtomicBool>,
}

impl Cluster {
    /// Starts the watches, which run until they are aborted.
    pub fn start(client: &Client, tasks: &mut JoinSet<&'static str>) -> Cluster {
        let config = || watcher::Config::default().timeout(WATCH_SECONDS);
        let prefixes = watcher(Api::<DeserializeGuard<AegisPrefix>>::all(client.clone()), config());
        let allocations = watcher(Api::<DeserializeGuard<EgressAllocation>>::all(client.clone()), config());
        let addresses = watcher(Api::<DeserializeGuard<EgressAddress>>::all(client.clone()), config());
        let alerts = watcher(Api::<DeserializeGuard<UsageAlert>>::all(client.clone()), config());
        let cluster = Cluster {
            prefixes: copy("prefixes", prefixes, tasks),
            allocations: copy("allocations", allocations, tasks),
            addresses: copy("addresses", addresses, tasks),
            alerts: copy("alerts", alerts, tasks),
            complete: Arc::default(),
            alerting: Arc::default(),
        };
        let listed = cluster.clone();
        tokio::spawn(async move {
            let prefixes = listed.prefixes.wait_until_ready().await;
            let allocations = listed.allocations.wait_until_ready().await;
            listed.complete.store(prefixes.is_ok() && allocations.is_ok(), Ordering::Release);
            // Apart: who asks need not wait for a cluster that does not know the kind yet.
            let addresses = listed.addresses.wait_until_ready().await;
            let alerts = listed.alerts.wait_until_ready().await;
            listed.alerting.store(addresses.is_ok() && alerts.is_ok(), Ordering::Release);
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
}

/// The prefix, if the operator has accepted it: one that overlaps another must not show its account what goes on there.
fn owned(prefix: &AegisPrefix) -> Option<Prefix> {
    let conditions = prefix.status.iter().flat_map(|status| &status.conditions);
    let accepted =
        conditions.into_iter().any(|it| it.type_ == aegis_crds::type_::ACCEPTED && it.status == "True");
    let range = prefix.spec.cidr.parse().ok()?;
    accepted.then(|| Prefix { range, account: prefix.spec.account.clone() })
}

fn copy<K>(
    kind: &'static str,
    objects: impl futures::Stream<Item = watcher::Result<watcher::Event<K>>> + Send + 'static,
    tasks: &mut JoinSet<&'static str>,
) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + Send + Sync + 'static,
{
    let (reader, writer) = reflector::store();
    let objects = objects
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
