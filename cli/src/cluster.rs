//! Objects from a cluster, by the rights of whoever asks.

mod ask;
mod collector;
mod flows;
mod writes;

pub use ask::Agent;
pub use collector::{Collector, Place};
pub use flows::{Flow, Live, Which};

use crate::args::Connection;
use crate::state::{AGENT, State, is_part};
use aegis_world::agents;
use aegis_world::snapshot::Guarded;
use anyhow::{Context, Result, bail};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ListParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::DeserializeGuard;
use kube::{Client, Config, Resource};
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

/// Longest time that the API server may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// As which they are told.
const SYSTEM_PODS: &str = "pods of operator and agents";
/// Why a kind can't be read that the API server does not have.
const UNKNOWN_KIND: &str = "the cluster does not know this kind: is Aegis installed?";
/// Objects that are listed at a time.
const PAGE: u32 = 500;

/// A cluster and the namespace that counts where none is named.
#[derive(Clone)]
pub struct Cluster {
    /// Access to it.
    pub client: Client,
    /// The namespace of the context.
    pub namespace: String,
    /// The context, if a kubeconfig says one.
    pub context: Option<String>,
    /// That of Aegis.
    pub system: String,
}

/// Which pods are of interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pods<'a> {
    /// None.
    None,
    /// Those of one namespace.
    Of(&'a str),
    /// All.
    All,
}

/// What the kubeconfig says, and the context that counts.
async fn configure(connection: &Connection) -> Result<(Config, Option<String>)> {
    let options = KubeConfigOptions { context: connection.context.clone(), ..KubeConfigOptions::default() };
    let mut context = connection.context.clone();
    let config = match &connection.kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path)?;
            context = context.or_else(|| file.current_context.clone());
            Config::from_custom_kubeconfig(file, &options).await?
        }
        None if options.context.is_some() => Config::from_kubeconfig(&options).await?,
        None => {
            context = Kubeconfig::read().ok().and_then(|file| file.current_context);
            Config::infer().await?
        }
    };
    Ok((config, context))
}

impl Cluster {
    /// By kubeconfig and context, as kubectl goes by them.
    pub async fn connect(connection: &Connection) -> Result<Cluster> {
        let (config, context) = configure(connection).await?;
        let namespace = config.default_namespace.clone();
        let client = Client::try_from(config)?;
        Ok(Cluster { client, namespace, context, system: connection.system_namespace.clone() })
    }

    /// Everything that may be read. `namespace` is where namespaced kinds are looked for if they can't be listed everywhere.
    pub async fn state(&self, namespace: &str, pods: Pods<'_>) -> Result<State> {
        let mut reader = Reader { client: &self.client, namespace, missing: BTreeMap::new() };
        let mut state = State { now: Timestamp::now().as_second(), ..State::default() };
        let snapshot = &mut state.snapshot;
        snapshot.prefixes = reader.all("aegisprefixes").await?;
        snapshot.policies = reader.all("egresspolicies").await?;
        snapshot.applications = reader.all("egressapplications").await?;
        // A cluster with an older Aegis has none, which nobody can miss.
        if !reader.missing.contains_key("egresspolicies") {
            reader.missing.retain(|kind, why| *kind != "egressapplications" || *why != UNKNOWN_KIND);
        }
        snapshot.addresses = reader.all("egressaddresses").await?;
        snapshot.egress_nodes = reader.all("egressnodes").await?;
        snapshot.allocations = reader.namespaced("egressallocations").await?;
        snapshot.bindings = reader.namespaced("zonebindings").await?;
        snapshot.nodes = reader.all("nodes").await?;
        snapshot.namespaces = reader.all("namespaces").await?;
        snapshot.services = reader.all("servicecidrs").await?;
        state.pods = match pods {
            Pods::None => Vec::new(),
            Pods::Of(namespace) => plain(reader.within("pods", namespace).await?),
            Pods::All => plain(reader.namespaced("pods").await?),
        };
        let system: Vec<Guarded<Pod>> = reader.within(SYSTEM_PODS, &self.system).await?;
        state.system = plain(system);
        state.missing = reader.missing;
        if !state.missing.contains_key(SYSTEM_PODS) {
            let pods = state.system.iter().filter(|pod| is_part(pod, AGENT));
            state.snapshot.agents = Some(agents::by_node(pods));
        }
        Ok(state)
    }
}

impl Cluster {
    /// Allocations of these namespaces, or of all if none is named, with all EgressAddresses if these may be read.
    pub async fn allocations(&self, namespaces: &BTreeSet<&str>) -> Result<State> {
        let mut reader =
            Reader { client: &self.client, namespace: &self.namespace, missing: BTreeMap::new() };
        let mut state = State::default();
        if namespaces.is_empty() {
            state.snapshot.allocations = reader.all("egressallocations").await?;
        }
        for namespace in namespaces {
            state.snapshot.allocations.extend(reader.within("egressallocations", namespace).await?);
        }
        state.snapshot.addresses = reader.all("egressaddresses").await?;
        state.missing = reader.missing;
        Ok(state)
    }

    /// Adds alerts, which nobody but those who change them asks about. A cluster with an older Aegis has none, which nobody can miss.
    pub async fn alerts(&self, state: &mut State, namespace: &str) -> Result<()> {
        let missing = std::mem::take(&mut state.missing);
        let mut reader = Reader { client: &self.client, namespace, missing };
        state.alerts = reader.namespaced("usagealerts").await?;
        state.missing = reader.missing;
        state.missing.retain(|kind, why| *kind != "usagealerts" || *why != UNKNOWN_KIND);
        Ok(())
    }

    /// Adds Services and their endpoints, which few questions need.
    pub async fn services(&self, state: &mut State) -> Result<()> {
        let missing = std::mem::take(&mut state.missing);
        let mut reader = Reader { client: &self.client, namespace: &self.namespace, missing };
        state.service_objects = plain(reader.all("services").await?);
        state.endpoints = plain(reader.all("endpointslices").await?);
        state.missing = reader.missing;
        Ok(())
    }
}

fn plain<K: Clone>(objects: Vec<Guarded<K>>) -> Vec<K> {
    objects.into_iter().filter_map(|object| object.0.as_ref().ok().cloned()).collect()
}

struct Reader<'a> {
    client: &'a Client,
    namespace: &'a str,
    missing: BTreeMap<&'static str, String>,
}

impl Reader<'_> {
    /// All objects of a kind; none, with a note, if they may not be read.
    async fn all<K>(&mut self, kind: &'static str) -> Result<Vec<Guarded<K>>>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
    {
        match list(Api::all(self.client.clone())).await {
            Ok(objects) => Ok(objects),
            Err(Failure::Forbidden(why)) => {
                self.missing.insert(kind, format!("may not be read ({why})"));
                Ok(Vec::new())
            }
            Err(Failure::Absent) => {
                self.missing.insert(kind, UNKNOWN_KIND.to_owned());
                Ok(Vec::new())
            }
            Err(Failure::Other(error)) => Err(error).with_context(|| format!("list {kind}")),
        }
    }

    /// The same of a namespaced kind; those of the namespace alone, with a note, if that is all that may be read.
    async fn namespaced<K>(&mut self, kind: &'static str) -> Result<Vec<Guarded<K>>>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let all = self.all(kind).await?;
        if !self.missing.contains_key(kind) {
            return Ok(all);
        }
        let some = list(Api::namespaced(self.client.clone(), self.namespace)).await;
        let Ok(some) = some else { return Ok(all) };
        self.missing.insert(kind, format!("only those of namespace {} may be read", self.namespace));
        Ok(some)
    }

    /// Objects of one namespace.
    async fn within<K>(&mut self, kind: &'static str, namespace: &str) -> Result<Vec<Guarded<K>>>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
    {
        match list(Api::namespaced(self.client.clone(), namespace)).await {
            Ok(objects) => Ok(objects),
            Err(Failure::Other(error)) => Err(error).with_context(|| format!("list {kind}")),
            Err(Failure::Absent) => {
                self.missing.insert(kind, UNKNOWN_KIND.to_owned());
                Ok(Vec::new())
            }
            Err(Failure::Forbidden(_)) => {
                self.missing.insert(kind, format!("may not be read in namespace {namespace}"));
                Ok(Vec::new())
            }
        }
    }
}

enum Failure {
    Forbidden(String),
    Absent,
    Other(anyhow::Error),
}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Failure {
        match error {
            kube::Error::Api(status) if status.code == 403 => Failure::Forbidden(status.message.clone()),
            kube::Error::Api(status) if status.code == 404 => Failure::Absent,
            other => Failure::Other(other.into()),
        }
    }
}

async fn list<K>(api: Api<DeserializeGuard<K>>) -> Result<Vec<Guarded<K>>, Failure>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    let mut objects = Vec::new();
    let mut parameters = ListParams::default().limit(PAGE);
    loop {
        let page = tokio::time::timeout(PATIENCE, api.list(&parameters)).await;
        let page = page.map_err(|_| Failure::Other(anyhow::anyhow!("no answer within {PATIENCE:?}")))??;
        objects.extend(page.items.into_iter().map(Arc::new));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters = parameters.continue_token(&token),
            None => return Ok(objects),
        }
    }
}

impl State {
    /// Fails if one of these kinds could not be read in full: the answer would be wrong.
    pub fn require(&self, kinds: &[&str]) -> Result<()> {
        let lacking = self.missing.iter().filter(|(kind, _)| kinds.contains(kind));
        let lacking: Vec<String> = lacking.map(|(kind, why)| format!("{kind}: {why}")).collect();
        if !lacking.is_empty() {
            bail!(
                "the answer could be wrong, since not everything can be read that it depends on: {}",
                lacking.join("; ")
            );
        }
        Ok(())
    }
}
