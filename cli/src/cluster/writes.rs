//! What is asked of the API server beside reading: to check objects without storing them, and to drain.

use super::Cluster;
use crate::drain::{LABEL, Target};
use crate::files::Found;
use crate::state::State;
use aegis_crds::{AegisPrefix, EgressAllocation, EgressApplication, EgressPolicy, ZoneBinding};
use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::ApiResource;
use kube::{Resource, ResourceExt};
use serde_json::json;

/// As whom it writes.
const MANAGER: &str = "kubectl-aegis";

impl Cluster {
    /// Lets the API server check objects, without storing them: all rules of their fields and of admission. Gives what could not be
    /// checked.
    pub async fn check(
        &self,
        state: &State,
        found: &[Found],
        namespace: &str,
        delete: bool,
    ) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        let mut faults = Vec::new();
        for object in found.iter().filter(|_| !delete) {
            let Some((resource, namespaced)) = resource(object.kind()) else { continue };
            let namespace = namespaced.then(|| object.metadata("namespace").unwrap_or(namespace));
            let exists = |name: &str| state.snapshot.namespaces.iter().any(|it| it.name_any() == name);
            if let Some(name) = namespace.filter(|name| !exists(name)) {
                notes.push(format!(
                    "{}: the API server can't check objects of namespace {name}, which does not exist yet",
                    object.place
                ));
                continue;
            }
            let api: Api<DynamicObject> = match namespace {
                Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
                None => Api::all_with(self.client.clone(), &resource),
            };
            match self.try_write(&api, object).await {
                Ok(()) => {}
                Err(kube::Error::Api(status))
                    if status.code == 403 && !status.message.contains("ValidatingAdmissionPolicy") =>
                {
                    notes.push(format!(
                        "{}: not checked by the API server ({})",
                        object.place, status.message
                    ));
                }
                Err(kube::Error::Api(status)) => faults.push(format!("{}: {}", object.place, status.message)),
                Err(error) => return Err(error).context("let the API server check the objects"),
            }
        }
        if !faults.is_empty() {
            bail!("the API server would refuse:\n  {}", faults.join("\n  "));
        }
        Ok(notes)
    }

    async fn try_write(&self, api: &Api<DynamicObject>, object: &Found) -> Result<(), kube::Error> {
        let name = object.metadata("name").unwrap_or_default();
        let new: DynamicObject =
            serde_json::from_value(object.value.clone()).map_err(kube::Error::SerdeError)?;
        let parameters = PostParams { dry_run: true, field_manager: Some(MANAGER.to_owned()) };
        match api.get_opt(name).await? {
            None => api.create(&parameters, &new).await.map(drop),
            Some(old) => {
                let mut changed = old;
                changed.data["spec"] = new.data["spec"].clone();
                changed.metadata.managed_fields = None;
                api.replace(name, &parameters, &changed).await.map(drop)
            }
        }
    }

    /// Drains, or lets a node work again.
    pub async fn drain(&self, target: &Target, undo: bool) -> Result<()> {
        match target {
            Target::Node(name) => {
                let nodes: Api<Node> = Api::all(self.client.clone());
                let label = if undo { json!(null) } else { json!("true") };
                // Both at once, so that it is never half done.
                let patch = json!({"metadata": {"labels": {LABEL: label}}, "spec": {"unschedulable": !undo}});
                let parameters =
                    PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
                nodes
                    .patch(name, &parameters, &Patch::Merge(patch))
                    .await
                    .with_context(|| format!("cordon and label node {name}"))?;
            }
            Target::Allocation(namespace, name) => {
                let api: Api<EgressAllocation> = Api::namespaced(self.client.clone(), namespace);
                api.delete(name, &DeleteParams::default())
                    .await
                    .with_context(|| format!("delete EgressAllocation {namespace}/{name}"))?;
            }
        }
        Ok(())
    }
}

/// How the API server names a kind, and whether its objects are in namespaces.
fn resource(kind: &str) -> Option<(ApiResource, bool)> {
    match kind {
        _ if kind == AegisPrefix::kind(&()) => Some((ApiResource::erase::<AegisPrefix>(&()), false)),
        _ if kind == EgressPolicy::kind(&()) => Some((ApiResource::erase::<EgressPolicy>(&()), false)),
        _ if kind == EgressApplication::kind(&()) => {
            Some((ApiResource::erase::<EgressApplication>(&()), false))
        }
        _ if kind == EgressAllocation::kind(&()) => Some((ApiResource::erase::<EgressAllocation>(&()), true)),
        _ if kind == ZoneBinding::kind(&()) => Some((ApiResource::erase::<ZoneBinding>(&()), true)),
        _ => None,
    }
}
