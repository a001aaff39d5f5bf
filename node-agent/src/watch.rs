//! What the API server says, kept as plain data.
//!
//! Each kind has a watch of its own that survives outages of any length: until a new list is complete, the old
//! contents stay. An object that cannot be read keeps its last good form and is reported.

use crate::objects::{self, Allocation, NodeRecord, PodRecord, Report};
use aegis_core::model::{Address, AllocationName};
use aegis_core::policy::{Binding, EgressPolicy as Policy, Endpoint};
use aegis_core::selector::Labels;
use aegis_crds::rules;
use aegis_crds::services::{self, EndpointRecord, ServiceRecord};
use aegis_crds::{
    AegisPrefix, AnnouncementMode, EgressAddress, EgressAllocation, EgressApplication, EgressNode,
    EgressPolicy, ZoneBinding,
};
use futures::{Stream, StreamExt};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::Api;
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::watcher::{self, Event};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// Seconds after which the server ends an idle watch; five more and the client takes the connection for dead.
const WATCH_SECONDS: u32 = 60;
/// Reports are asked for in so many at a time: with a thousand addresses each takes some 60 KiB, and a page of them is in memory
/// at once, while hardly anything of it is kept.
const PAGE: u32 = 50;
/// A watch that has failed and then is silent for this long works again: attempts to connect take less, and nothing tells of
/// one that succeeds before the next event.
const CALM: Duration = Duration::from_secs(15);

/// Namespace (empty for cluster-scoped kinds) and name.
pub type Key = (String, String);

/// Objects of one kind.
#[derive(Clone, Debug)]
pub struct Table<T> {
    /// A whole list has been received since the agent started.
    pub listed: bool,
    /// Objects.
    pub objects: BTreeMap<Key, T>,
    /// Objects that could not be read, with the reason.
    pub invalid: BTreeMap<Key, String>,
    /// Why the watch does not work at the moment.
    pub error: Option<String>,
    incoming: Option<(BTreeMap<Key, T>, BTreeMap<Key, String>)>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Table {
            listed: false,
            objects: BTreeMap::new(),
            invalid: BTreeMap::new(),
            error: None,
            incoming: None,
        }
    }
}

impl<T> Table<T> {
    /// Objects of which no form could ever be read, with the reason: what they mean is not known.
    pub fn unreadable(&self) -> impl Iterator<Item = (&Key, &String)> {
        self.invalid.iter().filter(|(key, _)| !self.objects.contains_key(*key))
    }
}

impl<T: Clone + PartialEq> Table<T> {
    /// True if it did not work until now.
    fn works_again(&mut self, kind: &str) -> bool {
        let failed = self.error.take().is_some();
        if failed {
            tracing::info!(kind, "watch works again");
        }
        failed
    }

    /// Takes an event; true if something that matters has changed.
    pub fn handle(&mut self, event: Event<(Key, Result<T, String>)>) -> bool {
        match event {
            Event::Init => {
                self.incoming = Some(Default::default());
                false
            }
            Event::InitApply((key, object)) => {
                let (objects, invalid) = self.incoming.get_or_insert_default();
                match object {
                    Ok(object) => _ = objects.insert(key, object),
                    Err(reason) => {
                        objects.extend(self.objects.get(&key).cloned().map(|object| (key.clone(), object)));
                        invalid.insert(key, reason);
                    }
                }
                false
            }
            Event::InitDone => {
                let (objects, invalid) = self.incoming.take().unwrap_or_default();
                let changed = !self.listed || self.objects != objects || self.invalid != invalid;
                (self.objects, self.invalid, self.listed) = (objects, invalid, true);
                changed
            }
            Event::Apply((key, Ok(object))) => {
                let was_invalid = self.invalid.remove(&key).is_some();
                let changed = self.objects.get(&key) != Some(&object);
                self.objects.insert(key, object);
                changed || was_invalid
            }
            Event::Apply((key, Err(reason))) => self.invalid.insert(key, reason.clone()) != Some(reason),
            Event::Delete((key, _)) => {
                self.objects.remove(&key).is_some() | self.invalid.remove(&key).is_some()
            }
        }
    }
}

/// Everything that is watched.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    /// Pods of this node.
    pub pods: Table<PodRecord>,
    /// Labels of Namespaces.
    pub namespaces: Table<Labels>,
    /// EgressPolicies.
    pub policies: Table<Policy>,
    /// EgressApplications.
    pub applications: Table<Vec<Endpoint>>,
    /// ZoneBindings.
    pub bindings: Table<Binding>,
    /// EgressAllocations.
    pub allocations: Table<(AllocationName, Allocation)>,
    /// EgressAddresses.
    pub addresses: Table<Address>,
    /// Reports of all nodes (EgressNodes).
    pub reports: Table<Report>,
    /// Nodes.
    pub nodes: Table<NodeRecord>,
    /// ServiceCIDRs.
    pub services: Table<Vec<IpNet>>,
    /// Services; of most only the address matters.
    pub service_ports: Table<ServiceRecord>,
    /// EndpointSlices that the control plane has not written.
    pub service_endpoints: Table<EndpointRecord>,
    /// How the addresses of each AegisPrefix are announced. The data plane does not wait for it.
    pub prefixes: Table<AnnouncementMode>,
}

impl Cluster {
    /// Every kind that the data plane depends on has been listed once: only then is it known what must *not* be in the data plane.
    pub fn listed(&self) -> bool {
        self.missing().next().is_none()
    }

    /// Kinds that have not been listed since the agent started.
    pub fn missing(&self) -> impl Iterator<Item = &'static str> {
        let kinds = [
            ("Pod", self.pods.listed),
            ("Namespace", self.namespaces.listed),
            ("EgressPolicy", self.policies.listed),
            ("EgressApplication", self.applications.listed),
            ("ZoneBinding", self.bindings.listed),
            ("EgressAllocation", self.allocations.listed),
            ("EgressAddress", self.addresses.listed),
            ("EgressNode", self.reports.listed),
            ("Node", self.nodes.listed),
            ("ServiceCIDR", self.services.listed),
            ("Service", self.service_ports.listed),
            ("EndpointSlice", self.service_endpoints.listed),
        ];
        kinds.into_iter().filter(|(_, listed)| !listed).map(|(kind, _)| kind)
    }

    /// Watches that do not work at the moment, with the reason.
    pub fn errors(&self) -> BTreeMap<&'static str, String> {
        let kinds = [
            ("Pod", &self.pods.error),
            ("Namespace", &self.namespaces.error),
            ("EgressPolicy", &self.policies.error),
            ("EgressApplication", &self.applications.error),
            ("ZoneBinding", &self.bindings.error),
            ("EgressAllocation", &self.allocations.error),
            ("EgressAddress", &self.addresses.error),
            ("EgressNode", &self.reports.error),
            ("Node", &self.nodes.error),
            ("ServiceCIDR", &self.services.error),
            ("Service", &self.service_ports.error),
            ("EndpointSlice", &self.service_endpoints.error),
            ("AegisPrefix", &self.prefixes.error),
        ];
        kinds.into_iter().filter_map(|(kind, error)| Some((kind, error.clone()?))).collect()
    }

    /// Objects that could not be read: kind, key, reason.
    pub fn invalid(&self) -> Vec<(&'static str, &Key, &str)> {
        fn of<'a, T>(
            kind: &'static str,
            table: &'a Table<T>,
        ) -> impl Iterator<Item = (&'static str, &'a Key, &'a str)> {
            table.invalid.iter().map(move |(key, reason)| (kind, key, reason.as_str()))
        }
        of("Pod", &self.pods)
            .chain(of("Namespace", &self.namespaces))
            .chain(of("EgressPolicy", &self.policies))
            .chain(of("EgressApplication", &self.applications))
            .chain(of("ZoneBinding", &self.bindings))
            .chain(of("EgressAllocation", &self.allocations))
            .chain(of("EgressAddress", &self.addresses))
            .chain(of("EgressNode", &self.reports))
            .chain(of("Node", &self.nodes))
            .chain(of("ServiceCIDR", &self.services))
            .chain(of("Service", &self.service_ports))
            .chain(of("EndpointSlice", &self.service_endpoints))
            .chain(of("AegisPrefix", &self.prefixes))
            .collect()
    }
}

/// The watched state, shared by the watches and the controller.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    cluster: Arc<Mutex<Cluster>>,
    changed: Arc<Notify>,
}

impl Shared {
    /// Access to the state; nothing is awaited while it is locked.
    pub fn lock(&self) -> MutexGuard<'_, Cluster> {
        self.cluster.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves when something has changed since the last call.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// Starts all watches; they end with the set.
pub fn start(client: &Client, node: &str, shared: &Shared) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let own = watcher::Config::default().fields(&format!("spec.nodeName={node}")).timeout(WATCH_SECONDS);
    let all = watcher::Config::default().timeout(WATCH_SECONDS);
    tasks.spawn(keep(
        client.clone(),
        own,
        shared.clone(),
        |c| &mut c.pods,
        |o: &Pod| Ok(objects::pod(o)),
        Need::Always,
        CALM,
    ));
    // Their metadata alone is asked for, and of that the labels alone are kept.
    let namespaces = Api::<PartialObjectMeta<Namespace>>::all(client.clone());
    tasks.spawn(follow(
        watcher::watcher(namespaces, all.clone()),
        "Namespace",
        shared.clone(),
        |c| &mut c.namespaces,
        |mut namespace: PartialObjectMeta<Namespace>| {
            let labels = namespace.metadata.labels.take().unwrap_or_default();
            ((String::new(), namespace.name_any()), Ok(labels))
        },
        Need::Always,
        CALM,
    ));
    tasks.spawn(keep(
        client.clone(),
        all.clone(),
        shared.clone(),
        |c| &mut c.policies,
        |o: &EgressPolicy| rules::policy(o).map_err(|error| error.to_string()),
        // A server whose definitions are older than this agent knows no policies.
        Need::IfServed,
        CALM,
    ));
    tasks.spawn(keep(
        client.clone(),
        all.clone(),
        shared.clone(),
        |c| &mut c.applications,
        |o: &EgressApplication| rules::application(o).map_err(|error| error.to_string()),
        // Nor applications.
        Need::IfServed,
        CALM,
    ));
    tasks.spawn(keep(
        client.clone(),
        all.clone(),
        shared.clone(),
        |c| &mut c.bindings,
        |o: &ZoneBinding| rules::binding(o).map_err(|error| error.to_string()),
        Need::Always,
        CALM,
    ));
    tasks.spawn(keep(
        client.clone(),
        all.clone(),
        shared.clone(),
        |c| &mut c.allocations,
        |o: &EgressAllocation| Ok(objects::allocation(o)),
        Need::Always,
        CALM,
    ));
    tasks.spawn(keep(
        client.clone(),
        all.clone(),
        shared.clone(),
        |c| &mut c.addresses,
        |o: &EgressAddress| objects::address(o).map_err(|error| error.to_string()),
        Need::Always,
        CALM,
    ));
    tasks.spawn(keep(
        client.clone(),
        all.clone().page_size(PAGE),
        shared.clone(),
        |c| &mut c.reports,
        |o: &EgressNode| Ok(objects::report(o)),
        Need::Always,
        CALM,
    ));
    let own = node.to_owned();
    tasks.spawn(keep(
        client.clone(),
        all.clone(),
        shared.clone(),
        |c| &mut c.nodes,
        move |o: &Node| {
            let facts = (o.name_any() == own).then(|| Arc::new(rules::node_facts(o)));
            Ok(NodeRecord { facts, ..objects::node(o) })
        },
        Need::Always,
        CALM,
    ));
    tasks.spawn(keep(
        client.clone(),
        all.clone(),
        shared.clone(),
        |c| &mut c.prefixes,
        |o: &AegisPrefix| Ok(o.spec.announcement.mode),
        Need::Always,
        CALM,
    ));
    tasks.spawn(keep(
        client.clone(),
        all.clone(),
        shared.clone(),
        |c| &mut c.service_ports,
        |o: &Service| Ok(services::service(o)),
        Need::Always,
        CALM,
    ));
    tasks.spawn(keep(
        client.clone(),
        all.clone().labels(services::WRITTEN_BY_OTHERS),
        shared.clone(),
        |c| &mut c.service_endpoints,
        |o: &EndpointSlice| Ok(services::endpoints(o)),
        Need::Always,
        CALM,
    ));
    tasks.spawn(keep(
        client.clone(),
        all,
        shared.clone(),
        |c| &mut c.services,
        |o: &ServiceCIDR| Ok(rules::service_ranges(o)),
        Need::IfServed,
        CALM,
    ));
    tasks
}

/// Whether the API server must know the kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    Always,
    /// Older servers do not: then there are no such objects.
    IfServed,
}

async fn keep<K, T>(
    client: Client,
    config: watcher::Config,
    shared: Shared,
    table: impl Fn(&mut Cluster) -> &mut Table<T> + Send,
    read: impl Fn(&K) -> Result<T, String> + Send,
    need: Need,
    calm: Duration,
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
    T: Clone + PartialEq + Send,
{
    let kind = K::kind(&()).into_owned();
    let api: Api<DeserializeGuard<K>> = Api::all(client);
    let events = watcher::watcher(api, config);
    let logged = kind.clone();
    let convert = move |guard: DeserializeGuard<K>| {
        let kind = logged.as_str();
        let key = (guard.namespace().unwrap_or_default(), guard.name_any());
        let object = guard.0.map_err(|invalid| invalid.error).and_then(|object| read(&object));
        if let Err(reason) = &object {
            tracing::warn!(
                kind,
                namespace = key.0,
                name = key.1,
                reason,
                "cannot read object; its last form stays"
            );
        }
        (key, object)
    };
    follow(events, &kind, shared, table, convert, need, calm).await;
}

/// Follows the events of a watch until they end.
async fn follow<O, T>(
    events: impl Stream<Item = watcher::Result<Event<O>>> + Send,
    kind: &str,
    shared: Shared,
    table: impl Fn(&mut Cluster) -> &mut Table<T> + Send,
    convert: impl Fn(O) -> (Key, Result<T, String>) + Send,
    need: Need,
    calm: Duration,
) where
    O: Send,
    T: Clone + PartialEq + Send,
{
    let mut events = std::pin::pin!(events);
    let mut pause = Pause::default();
    // Whether a list is under way: its silence means nothing.
    let mut listing = true;
    loop {
        let event = match tokio::time::timeout(calm, events.next()).await {
            Ok(Some(event)) => event,
            Ok(None) => return,
            Err(_) if listing => continue,
            Err(_) => {
                if table(&mut shared.lock()).works_again(kind) {
                    shared.changed.notify_one();
                }
                continue;
            }
        };
        match &event {
            Ok(Event::Init) => listing = true,
            Ok(Event::InitDone) => listing = false,
            _ => {}
        }
        let wait = match &event {
            // `Init` is only the intention to list.
            Ok(Event::Init) => None,
            Ok(_) => {
                pause.reset();
                None
            }
            Err(error) => Some(pause.after(error)),
        };
        let changed = {
            let mut cluster = shared.lock();
            let table = table(&mut cluster);
            match event {
                Ok(event) => {
                    let connected = !matches!(event, Event::Init) && table.works_again(kind);
                    connected | table.handle(map(event, &convert))
                }
                Err(watcher::Error::InitialListFailed(kube::Error::Api(status)))
                    if status.code == 404 && need == Need::IfServed =>
                {
                    !std::mem::replace(&mut table.listed, true)
                }
                Err(error) => {
                    let reason = error.to_string();
                    let changed = table.error.as_ref() != Some(&reason);
                    if changed {
                        tracing::warn!(kind, reason, "watch failed; what is known stays in force");
                        table.error = Some(reason);
                    }
                    changed
                }
            }
        };
        if changed {
            shared.changed.notify_one();
        }
        if let Some(wait) = wait {
            tokio::time::sleep(wait).await;
        }
    }
}

fn map<A, B>(event: Event<A>, convert: impl Fn(A) -> B) -> Event<B> {
    match event {
        Event::Apply(object) => Event::Apply(convert(object)),
        Event::Delete(object) => Event::Delete(convert(object)),
        Event::Init => Event::Init,
        Event::InitApply(object) => Event::InitApply(convert(object)),
        Event::InitDone => Event::InitDone,
    }
}

/// Pause before the next attempt: 0.2 s, doubling up to 3 s while the server does not answer.
#[derive(Debug, Default)]
struct Pause {
    step: u32,
}

impl Pause {
    fn after(&mut self, error: &watcher::Error) -> Duration {
        if expired(error) {
            // It answers again, and only wants to be asked for everything.
            self.step = 0;
        }
        self.step = (self.step + 1).min(5);
        (Duration::from_millis(100) * 2u32.pow(self.step)).min(Duration::from_secs(3))
    }

    fn reset(&mut self) {
        self.step = 0;
    }
}

/// Whether the server no longer knows the version from which the watch was to go on (410).
fn expired(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchError(status) => status.code == 410,
        watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 410,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::body::Body;
    use axum::extract::Request;
    use axum::http::StatusCode;
    use axum::response::IntoResponse;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn object(name: &str, value: u32) -> (Key, Result<u32, String>) {
        ((String::new(), name.to_owned()), Ok(value))
    }

    #[test]
    fn the_old_contents_stay_until_a_new_list_is_complete() {
        let mut table = Table::default();
        for event in [Event::Init, Event::InitApply(object("a", 1))] {
            assert!(!table.handle(event));
        }
        assert!(!table.listed);
        assert!(table.handle(Event::InitDone));
        assert!(table.listed);
        table.handle(Event::Init);
        table.handle(Event::InitApply(object("b", 2)));
        assert_eq!(table.objects.len(), 1, "a list that is not complete counts for nothing");
        assert!(table.handle(Event::InitDone));
        assert_eq!(table.objects.values().copied().collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn an_object_that_cannot_be_read_keeps_its_last_form() {
        let mut table = Table::default();
        table.handle(Event::Apply(object("a", 1)));
        let broken = || ((String::new(), "a".to_owned()), Err("no".to_owned()));
        assert!(table.handle(Event::Apply(broken())));
        assert!(!table.handle(Event::Apply(broken())), "the same reason is no change");
        assert_eq!((table.objects.len(), table.invalid.len()), (1, 1));
        for event in [Event::Init, Event::InitApply(broken()), Event::InitDone] {
            table.handle(event);
        }
        assert_eq!((table.objects.len(), table.invalid.len()), (1, 1));
        assert!(table.handle(Event::Apply(object("a", 1))));
        assert!(table.invalid.is_empty());
        assert!(table.handle(Event::Delete(object("a", 1))));
        assert!(table.objects.is_empty());
    }

    /// An API server that lists nothing, refuses the first watch, and is silent on the second.
    fn silent_server() -> (Client, Arc<AtomicU32>) {
        let watches = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&watches);
        let server = Router::new().fallback(move |request: Request| {
            let is_watch = request.uri().query().is_some_and(|query| query.contains("watch="));
            let number = if is_watch { counted.fetch_add(1, Ordering::AcqRel) + 1 } else { 0 };
            async move {
                let list =
                    r#"{"apiVersion":"v1","kind":"List","metadata":{"resourceVersion":"5"},"items":[]}"#;
                match number {
                    0 => list.into_response(),
                    1 => StatusCode::SERVICE_UNAVAILABLE.into_response(),
                    _ => {
                        let silence = futures::stream::pending::<Result<String, std::io::Error>>();
                        Body::from_stream(silence).into_response()
                    }
                }
            }
        });
        (Client::new(server, "default"), watches)
    }

    #[tokio::test]
    async fn a_watch_that_goes_on_without_an_event_works_again() {
        let (client, watches) = silent_server();
        let shared = Shared::default();
        let task = tokio::spawn(keep(
            client,
            watcher::Config::default(),
            shared.clone(),
            |c| &mut c.nodes,
            |o: &Node| Ok(objects::node(o)),
            Need::Always,
            Duration::from_secs(2),
        ));
        let wait_for = async |what: &str, reached: &dyn Fn(&Table<NodeRecord>) -> bool| {
            for _ in 0..3000 {
                if reached(&shared.lock().nodes) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            panic!("{what}: {:?}", shared.lock().nodes);
        };
        wait_for("the failure", &|table| table.error.is_some()).await;
        wait_for("the end of the failure", &|table| table.error.is_none()).await;
        assert_eq!(watches.load(Ordering::Acquire), 2);
        task.abort();
    }

    #[test]
    fn the_same_object_again_is_no_change() {
        let mut table = Table::default();
        assert!(table.handle(Event::Apply(object("a", 1))));
        assert!(!table.handle(Event::Apply(object("a", 1))));
        assert!(table.handle(Event::Apply(object("a", 2))));
    }

    fn failure(code: u16) -> watcher::Error {
        let status = kube::core::Status { code, ..Default::default() };
        watcher::Error::WatchError(Box::new(status))
    }

    #[test]
    fn the_pause_grows_to_three_seconds_and_is_short_once_the_server_answers() {
        let mut pause = Pause::default();
        let waits: Vec<u128> = (0..7).map(|_| pause.after(&failure(500)).as_millis()).collect();
        assert_eq!(waits, [200, 400, 800, 1600, 3000, 3000, 3000]);
        assert_eq!(pause.after(&failure(410)).as_millis(), 200);
        pause.after(&failure(500));
        pause.reset();
        assert_eq!(pause.after(&failure(500)).as_millis(), 200);
    }
}
