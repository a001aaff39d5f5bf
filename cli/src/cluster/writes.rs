//! What is asked of the API server beside reading: to check objects without storing them, and to drain.

use super::Cluster;
use crate::drain::{LABEL, Target};
use crate::files::Found;
use crate::state::State;
use aegis_crds::{AegisPrefix, EgressAllocation, EgressApplication, EgressPolicy, UsageAlert, ZoneBinding};
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
                Err(kube::Error::Api(status)) => {
                    match not_a_fault(status.code, &status.message, object, found) {
                        Some(note) => notes.push(format!("{}: {note}", object.place)),
                        None => faults.push(format!("{}: {}", object.place, status.message)),
                    }
                }
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

/// What to say of a refusal that says nothing against the object: who asks may not write it, or another object of the files has to be
/// there first.
fn not_a_fault(code: u16, message: &str, object: &Found, found: &[Found]) -> Option<String> {
    if code == 403 && !message.contains("ValidatingAdmissionPolicy") {
        return Some(format!("not checked by the API server ({message})"));
    }
    let prefixes = found.iter().filter(|it| it.kind() == AegisPrefix::kind(&()));
    let mut names = prefixes.filter_map(|it| it.metadata("name"));
    // In a dry run the API server knows the prefix as it stands. Whether it is delegated then, the planner tells.
    let delegates = |name: &&str| message.contains(&format!("AegisPrefix {name} is not delegated"));
    let name = names.find(delegates).filter(|_| object.kind() == EgressAllocation::kind(&()))?;
    Some(format!(
        "refused by the API server as long as AegisPrefix {name} does not delegate to its account: apply the prefix of these files first"
    ))
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
        _ if kind == UsageAlert::kind(&()) => Some((ApiResource::erase::<UsageAlert>(&()), true)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_no_fault_where_a_prefix_of_the_files_mends_it() {
        let mut found = Vec::new();
        let files = "
{apiVersion: aegis.dev/v1alpha1, kind: AegisPrefix, metadata: {name: leased}}
---
{apiVersion: aegis.dev/v1alpha1, kind: EgressAllocation, metadata: {name: mine, namespace: mill}}
";
        crate::files::parse("files", files, &mut found).unwrap();
        let [prefix, allocation] = &found[..] else { panic!("two objects") };
        let refused = |name: &str| {
            format!(
                "egressallocations.aegis.dev \"mine\" is forbidden: ValidatingAdmissionPolicy 'aegis-delegation' with binding 'aegis-delegation' denied request: EgressAllocation mill/mine spec.prefixes: AegisPrefix {name} is not delegated to account mill: name another, or have its owner delegate it"
            )
        };
        let told = |message: &str, object| not_a_fault(403, message, object, &found);
        let note = told(&refused("leased"), allocation).expect("no fault");
        assert!(note.contains("AegisPrefix leased does not delegate"), "{note}");
        assert_eq!(told(&refused("other"), allocation), None);
        assert_eq!(not_a_fault(403, &refused("leased"), allocation, std::slice::from_ref(allocation)), None);
        assert_eq!(told(&refused("leased"), prefix), None);
        assert!(told("may not create", allocation).is_some_and(|it| it.contains("not checked")));
        assert_eq!(not_a_fault(422, "egress must be given", allocation, &found), None);
    }
}
