//! A test's own namespace, and everything it applied.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use k8s_openapi::api::core::v1::{Namespace as NamespaceObject, ServiceAccount};
use kube::api::{Api, DeleteParams, DynamicObject, ObjectMeta, PostParams};
use kube::discovery::ApiResource;

use super::{Cluster, PATIENCE, PodBuilder, apply, wait_for};

/// Deleted, with what was applied through it, at the end of the test, also when it fails.
///
/// `AEGIS_KEEP=1` keeps it for a look at a failure.
pub struct Namespace {
    cluster: Cluster,
    name: String,
    /// Cluster-wide objects applied through this namespace.
    elsewhere: Mutex<Vec<(ApiResource, String)>>,
    ended: bool,
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
        let accounts: Api<ServiceAccount> = Api::namespaced(cluster.client(), &name);
        let namespace = Self { cluster: cluster.clone(), name, elsewhere: Mutex::default(), ended: false };
        // Pods are refused until the namespace has its ServiceAccount.
        wait_for("the ServiceAccount", PATIENCE, async || Ok(accounts.get_opt("default").await?)).await?;
        Ok(namespace)
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
            if !one.namespaced {
                self.elsewhere.lock().unwrap_or_else(PoisonError::into_inner).push((one.resource, name));
            }
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

    /// Deletes everything and waits until it is gone, so that the next test finds its prefixes free.
    pub async fn end(mut self) -> anyhow::Result<()> {
        self.ended = true;
        if keep() {
            return Ok(());
        }
        let elsewhere = self.elsewhere();
        delete(&self.cluster.client, &self.name, &elsewhere).await?;
        let namespaces: Api<NamespaceObject> = Api::all(self.cluster.client());
        let what = format!("the end of namespace {}", self.name);
        wait_for(&what, PATIENCE, async || Ok(namespaces.get_opt(&self.name).await?.is_none().then_some(())))
            .await?;
        for (resource, name) in &elsewhere {
            let api = apply::api(&self.cluster.client, resource, None);
            let what = format!("the end of {} {name}", resource.kind);
            wait_for(&what, PATIENCE, async || Ok(api.get_opt(name).await?.is_none().then_some(()))).await?;
        }
        Ok(())
    }

    pub(super) fn probe_image(&self) -> &str {
        &self.cluster.probe_image
    }

    fn elsewhere(&self) -> Vec<(ApiResource, String)> {
        self.elsewhere.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if self.ended || keep() {
            return;
        }
        // The test's runtime may be ending with it: a thread with a runtime of its own deletes. The connections of the
        // test's client belong to the old runtime, hence a new client.
        let (lab, name, elsewhere) = (self.cluster.lab.clone(), self.name.clone(), self.elsewhere());
        let thread = std::thread::spawn(move || -> anyhow::Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let client = match lab {
                    Some(lab) => crate::lab::client(&lab.kubeconfig()).await?,
                    None => kube::Client::try_default().await?,
                };
                delete(&client, &name, &elsewhere).await
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

async fn delete(
    client: &kube::Client,
    namespace: &str,
    elsewhere: &[(ApiResource, String)],
) -> anyhow::Result<()> {
    let parameters = DeleteParams::background();
    let namespaces: Api<NamespaceObject> = Api::all(client.clone());
    gone(namespaces.delete(namespace, &parameters).await.map(drop))?;
    for (resource, name) in elsewhere {
        gone(apply::api(client, resource, None).delete(name, &parameters).await.map(drop))?;
    }
    Ok(())
}

/// What is gone already need not be deleted.
fn gone(result: kube::Result<()>) -> anyhow::Result<()> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => Ok(other?),
    }
}
