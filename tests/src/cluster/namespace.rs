//! A test's own namespace, and everything it applied.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::core::v1::{Namespace as NamespaceObject, Pod, ServiceAccount};
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, ObjectMeta, PostParams};
use kube::discovery::ApiResource;

use super::{Cluster, PATIENCE, PodBuilder, apply, wait_for};

/// How long a namespace may wait for its ServiceAccount. After an outage of the API server the controller manager makes it, which
/// waits up to a minute before it tries to reach the server again.
const ACCOUNT_PATIENCE: Duration = Duration::from_secs(180);

/// Deleted, with what was applied through it, at the end of the test, also when it fails.
///
/// `AEGIS_KEEP=1` keeps it for a look at a failure.
pub struct Namespace {
    cluster: Cluster,
    name: String,
    /// Everything applied through this namespace, in order.
    applied: Mutex<Vec<Reference>>,
    ended: bool,
}

/// One applied object.
#[derive(Clone)]
struct Reference {
    resource: ApiResource,
    namespace: Option<String>,
    name: String,
}

impl Reference {
    fn api(&self, client: &kube::Client) -> Api<DynamicObject> {
        apply::api(client, &self.resource, self.namespace.as_deref())
    }
}

impl Namespace {
    pub(super) async fn create(cluster: &Cluster, prefix: &str) -> anyhow::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{prefix}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let object = NamespaceObject {
            metadata: ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() },
            ..NamespaceObject::default()
        };
        let namespaces: Api<NamespaceObject> = Api::all(cluster.client());
        namespaces.create(&PostParams::default(), &object).await.context("create a namespace")?;
        let namespace = Self { cluster: cluster.clone(), name, applied: Mutex::default(), ended: false };
        namespace.takes_pods().await?;
        Ok(namespace)
    }

    pub(super) async fn adopt(cluster: &Cluster, name: &str) -> anyhow::Result<Self> {
        // Ended from the start: its drop deletes nothing.
        let namespace =
            Self { cluster: cluster.clone(), name: name.to_owned(), applied: Mutex::default(), ended: true };
        namespace.takes_pods().await?;
        Ok(namespace)
    }

    /// Pods are refused until the namespace has its ServiceAccount.
    async fn takes_pods(&self) -> anyhow::Result<()> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.cluster.client(), &self.name);
        wait_for("the ServiceAccount", ACCOUNT_PATIENCE, async || Ok(accounts.get_opt("default").await?))
            .await?;
        Ok(())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The cluster it is in.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Applies manifests. Objects without a namespace go into this one; cluster-wide ones are deleted with it.
    pub async fn apply(&self, yaml: &str) -> anyhow::Result<Vec<DynamicObject>> {
        let mut applied = Vec::new();
        for object in apply::documents(yaml)? {
            let name = object.metadata.name.clone().unwrap_or_default();
            let one = apply::apply(&self.cluster.client, object, &self.name)
                .await
                .with_context(|| format!("apply {name}"))?;
            let namespace = one.object.metadata.namespace.clone();
            let reference = Reference { resource: one.resource, namespace, name };
            self.applied.lock().unwrap_or_else(PoisonError::into_inner).push(reference);
            applied.push(one.object);
        }
        Ok(applied)
    }

    /// Access to objects of a kind in this namespace.
    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.cluster.client(), &self.name)
    }

    /// A pod that runs the probe; see [`PodBuilder`].
    pub fn pod(&self, name: &str) -> PodBuilder<'_> {
        PodBuilder::new(self, name)
    }

    /// Deletes everything, latest first, and waits until all but the namespace itself is gone (the controller takes
    /// its time for that): the next test finds its prefixes free.
    pub async fn end(mut self) -> anyhow::Result<()> {
        self.ended = true;
        if keep() {
            return Ok(());
        }
        let client = self.cluster.client();
        let pods: Api<Pod> = self.api();
        pods.delete_collection(&DeleteParams::default().grace_period(0), &ListParams::default()).await?;
        for reference in self.latest_first() {
            let api = reference.api(&client);
            gone(api.delete(&reference.name, &DeleteParams::background()).await.map(drop))?;
            let what = format!("the end of {} {}", reference.resource.kind, reference.name);
            wait_for(&what, PATIENCE, async || {
                Ok(api.get_opt(&reference.name).await?.is_none().then_some(()))
            })
            .await?;
        }
        end_of_pods(&pods).await?;
        delete(&client, &self.name, &[]).await
    }

    pub(super) fn probe_image(&self) -> &str {
        &self.cluster.probe_image
    }

    fn latest_first(&self) -> Vec<Reference> {
        let applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        applied.iter().rev().cloned().collect()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if self.ended || keep() {
            return;
        }
        // The test's runtime may be ending with it: a thread with a runtime of its own deletes. The connections of the
        // test's client belong to the old runtime, hence a new client.
        let (lab, name, applied) = (self.cluster.lab.clone(), self.name.clone(), self.latest_first());
        let thread = std::thread::spawn(move || -> anyhow::Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let client = match lab {
                    Some(lab) => crate::lab::client(&lab.kubeconfig()).await?,
                    None => kube::Client::try_default().await?,
                };
                delete(&client, &name, &applied).await?;
                // What its pods still send would be taken for the next test's.
                end_of_pods(&Api::namespaced(client, &name)).await
            })
        });
        if let Ok(Err(error)) = thread.join() {
            eprintln!("namespace {} stays: {error:#}", self.name);
        }
    }
}

fn keep() -> bool {
    std::env::var_os("AEGIS_KEEP").is_some_and(|value| value != "0")
}

async fn delete(client: &kube::Client, namespace: &str, applied: &[Reference]) -> anyhow::Result<()> {
    let parameters = DeleteParams::background();
    for reference in applied {
        gone(reference.api(client).delete(&reference.name, &parameters).await.map(drop))?;
    }
    let namespaces: Api<NamespaceObject> = Api::all(client.clone());
    gone(namespaces.delete(namespace, &parameters).await.map(drop))
}

async fn end_of_pods(pods: &Api<Pod>) -> anyhow::Result<()> {
    pods.delete_collection(&DeleteParams::default().grace_period(0), &ListParams::default()).await?;
    wait_for("the end of the pods", PATIENCE, async || {
        Ok(pods.list(&ListParams::default()).await?.items.is_empty().then_some(()))
    })
    .await
}

/// What is gone already need not be deleted.
fn gone(result: kube::Result<()>) -> anyhow::Result<()> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => Ok(other?),
    }
}
