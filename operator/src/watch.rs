//! Local copies of everything the operator reads, kept current by watches.

use crate::agents::Agents;
use crate::fence::Leases;
use crate::gate::Gate;
use crate::report::{Lists, Report};
use aegis_crds::{
    AegisPrefix, EgressAddress, EgressAllocation, EgressApplication, EgressPolicy, ZoneBinding,
};
pub use aegis_world::snapshot::{Guarded, Snapshot, by_name};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::Api;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::{self, Store};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event, watcher};
use kube::runtime::{WatchStreamExt, reflector::ObjectRef};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// The API server ends each watch after this many seconds, and it is resumed where it ended. A watch whose connection
/// died without a word is noticed five seconds later.
pub const WATCH_SECONDS: u32 = 30;

/// Objects that are listed at a time: of those that have thousands of lines, many would take much memory at once.
const PAGE: u32 = 50;

/// The local copies.
#[derive(Clone)]
pub struct Caches {
    prefixes: Store<DeserializeGuard<AegisPrefix>>,
    allocations: Store<DeserializeGuard<EgressAllocation>>,
    bindings: Store<DeserializeGuard<ZoneBinding>>,
    policies: Store<DeserializeGuard<EgressPolicy>>,
    applications: Store<DeserializeGuard<EgressApplication>>,
    addresses: Store<DeserializeGuard<EgressAddress>>,
    egress_nodes: Store<DeserializeGuard<Report>>,
    nodes: Store<DeserializeGuard<Node>>,
    namespaces: Store<DeserializeGuard<Namespace>>,
    services: Store<DeserializeGuard<ServiceCIDR>>,
    /// The nodes' Leases.
    pub leases: Leases,
    /// The agents' pods, if somebody is to look at them.
    pub agents: Option<Agents>,
    /// Told of every change, but of renewals.
    pub dirty: Arc<Notify>,
    /// Told of every change too, for whoever waits for the copies to catch up with a write.
    moved: Arc<Notify>,
    /// Highest resource version that the watch of addresses has delivered.
    addresses_seen: Arc<AtomicU64>,
}

/// A write of an `EgressAddress` that the watch has yet to deliver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pending {
    /// This resource version was written.
    Written(u64),
    /// The object with this name and uid was deleted.
    Deleted(String, String),
    /// The object with this name is not what the copy says: it has (or had) this resource version there, if any.
    Stale(String, Option<String>),
}

impl Caches {
    /// Starts the watches; the Leases are those of `namespace`. The tasks run until they are aborted.
    pub fn start(
        client: &Client,
        namespace: &str,
        gate: Arc<Gate>,
        tasks: &mut JoinSet<&'static str>,
    ) -> Caches {
        let dirty = Arc::new(Notify::new());
        let moved = Arc::new(Notify::new());
        let addresses_seen = Arc::new(AtomicU64::new(0));
        let signal = Signal { dirty: dirty.clone(), moved: moved.clone(), seen: Arc::default() };
        let mut lists = Lists::default();
        let address_signal = Signal { seen: addresses_seen.clone(), ..signal.clone() };
        Caches {
            prefixes: start(client, tasks, signal.clone(), |_: &mut AegisPrefix| ()),
            allocations: start(client, tasks, signal.clone(), |_: &mut EgressAllocation| ()),
            bindings: start(client, tasks, signal.clone(), |_: &mut ZoneBinding| ()),
            policies: start(client, tasks, signal.clone(), |_: &mut EgressPolicy| ()),
            applications: start(client, tasks, signal.clone(), |_: &mut EgressApplication| ()),
            addresses: start(client, tasks, address_signal, |_: &mut EgressAddress| ()),
            egress_nodes: start(client, tasks, signal.clone(), move |report| lists.share(report)),
            nodes: start(client, tasks, signal.clone(), strip_node),
            namespaces: start(client, tasks, signal.clone(), strip_namespace),
            services: start(client, tasks, signal, |_: &mut ServiceCIDR| ()),
            leases: Leases::start(client, namespace, gate, dirty.clone(), tasks),
            agents: None,
            dirty,
            moved,
            addresses_seen,
        }
    }

    /// Waits until each kind has been listed once: nothing may be planned before that.
    pub async fn complete(&self) -> Result<(), reflector::store::WriterDropped> {
        self.leases.complete().await;
        if let Some(agents) = &self.agents {
            agents.complete().await?;
        }
        self.prefixes.wait_until_ready().await?;
        self.allocations.wait_until_ready().await?;
        self.bindings.wait_until_ready().await?;
        self.policies.wait_until_ready().await?;
        self.applications.wait_until_ready().await?;
        self.addresses.wait_until_ready().await?;
        self.egress_nodes.wait_until_ready().await?;
        self.nodes.wait_until_ready().await?;
        self.namespaces.wait_until_ready().await?;
        self.services.wait_until_ready().await
    }

    /// What the copies hold now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            prefixes: self.prefixes.state(),
            allocations: self.allocations.state(),
            bindings: self.bindings.state(),
            policies: self.policies.state(),
            applications: self.applications.state(),
            addresses: self.addresses.state(),
            egress_nodes: self.egress_nodes.state(),
            nodes: self.nodes.state(),
            namespaces: self.namespaces.state(),
            services: self.services.state(),
            agents: self.agents.as_ref().map(Agents::nodes),
        }
    }

    /// Waits until the watch has delivered these writes, at most `limit`. False if it has not: whoever plans then may
    /// plan from old copies, which compare-and-swap makes harmless.
    pub async fn caught_up(&self, pending: &[Pending], limit: Duration) -> bool {
        let wait = async {
            loop {
                // Registered before looking, so that a change in between is not missed.
                let moved = self.moved.notified();
                if pending.iter().all(|write| self.has(write)) {
                    return;
                }
                moved.await;
            }
        };
        tokio::time::timeout(limit, wait).await.is_ok()
    }

    fn has(&self, pending: &Pending) -> bool {
        let stored = |name: &str| self.addresses.get(&ObjectRef::new(name));
        match pending {
            Pending::Written(version) => self.addresses_seen.load(Ordering::Acquire) >= *version,
            Pending::Deleted(name, uid) => {
                stored(name).is_none_or(|object| object.uid().as_ref() != Some(uid))
            }
            Pending::Stale(name, version) => {
                stored(name).and_then(|object| object.resource_version()) != *version
            }
        }
    }
}

#[derive(Clone)]
struct Signal {
    dirty: Arc<Notify>,
    moved: Arc<Notify>,
    seen: Arc<AtomicU64>,
}

impl Signal {
    fn changed<K: ResourceExt>(&self, event: &Event<K>) {
        if let Event::Apply(object) | Event::InitApply(object) | Event::Delete(object) = event
            && let Some(version) = object.resource_version().and_then(|version| version.parse().ok())
        {
            self.seen.fetch_max(version, Ordering::AcqRel);
        }
        // While a list is under way the copy does not change.
        if matches!(event, Event::Apply(_) | Event::Delete(_) | Event::InitDone) {
            self.dirty.notify_one();
            self.moved.notify_waiters();
        }
    }
}

fn start<K>(
    client: &Client,
    tasks: &mut JoinSet<&'static str>,
    signal: Signal,
    mut strip: impl FnMut(&mut K) + Send + 'static,
) -> Store<DeserializeGuard<K>>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let (reader, writer) = reflector::store();
    let kind: &'static str = std::any::type_name::<K>().rsplit("::").next().unwrap_or("object");
    let objects = watcher(
        Api::<DeserializeGuard<K>>::all(client.clone()),
        watcher::Config::default().timeout(WATCH_SECONDS).page_size(PAGE),
    )
    .backoff(CappedBackoff::default())
    .modify(move |object: &mut DeserializeGuard<K>| {
        // They are most of an object's size, and nobody here reads them.
        object.meta_mut().managed_fields = None;
        if let Ok(object) = &mut object.0 {
            strip(object);
        }
    })
    .reflect(writer);
    tasks.spawn(async move {
        let mut objects = std::pin::pin!(objects);
        while let Some(event) = objects.next().await {
            match event {
                Ok(event) => signal.changed(&event),
                Err(error) => tracing::warn!(kind, error = %error, "watch failed, trying again"),
            }
        }
        kind
    });
    reader
}

/// Keeps of a Node what planning reads: labels, taints, addresses, ranges of pods, and whether it is ready.
fn strip_node(node: &mut Node) {
    node.metadata.annotations = None;
    if let Some(status) = &mut node.status {
        let (conditions, addresses) = (status.conditions.take(), status.addresses.take());
        *status = Default::default();
        (status.conditions, status.addresses) = (conditions, addresses);
    }
}

/// Keeps of a Namespace its labels.
fn strip_namespace(namespace: &mut Namespace) {
    namespace.metadata.annotations = None;
    (namespace.spec, namespace.status) = (None, None);
}

/// 0.2 s, doubling up to 3 s: an API server that comes back is noticed soon.
pub struct CappedBackoff(Duration);

impl CappedBackoff {
    const FIRST: Duration = Duration::from_millis(200);
    const CAP: Duration = Duration::from_secs(3);
}

impl Default for CappedBackoff {
    fn default() -> Self {
        CappedBackoff(CappedBackoff::FIRST)
    }
}

impl Iterator for CappedBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let delay = self.0;
        self.0 = (self.0 * 2).min(CappedBackoff::CAP);
        Some(delay)
    }
}

impl Backoff for CappedBackoff {
    fn reset(&mut self) {
        *self = CappedBackoff::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_is_capped_and_resets() {
        let mut backoff = CappedBackoff::default();
        let delays: Vec<u64> =
            (0..8).filter_map(|_| backoff.next()).map(|delay| delay.as_millis() as u64).collect();
        assert_eq!(delays, [200, 400, 800, 1600, 3000, 3000, 3000, 3000]);
        backoff.reset();
        assert_eq!(backoff.next(), Some(Duration::from_millis(200)));
    }
}
