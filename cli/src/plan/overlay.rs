//! Objects of files laid over those that stand.

use super::alerts;
use crate::files::Found;
use crate::schema;
use crate::state::State;
use aegis_crds::{AegisPrefix, EgressAllocation, EgressApplication, EgressPolicy, UsageAlert, ZoneBinding};
use aegis_world::snapshot::Guarded;
use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::jiff::Timestamp;
use kube::core::DeserializeGuard;
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::sync::Arc;

/// What becomes of an object of the files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Planned {
    /// Kind, and namespace and name.
    pub object: String,
    /// `created`, `changed`, `deleted` or `unchanged`.
    pub change: &'static str,
}

/// The state with the objects.
pub struct Overlay {
    /// That.
    pub state: State,
    /// What became of each object.
    pub objects: Vec<Planned>,
    /// What is left out.
    pub notes: Vec<String>,
}

/// Lays objects over a state, each in place of the one of the same name; or takes them out of it.
pub fn overlay(state: &State, found: &[Found], namespace: &str, delete: bool) -> Result<Overlay> {
    let faults = found.iter().map(|object| {
        let mut faults = schema::faults(object.kind(), &object.value)?;
        // Where the fields are right, what they say together.
        if faults.is_empty() && object.kind() == UsageAlert::kind(&()) {
            faults = alerts::faults(&read(&object.value, object)?);
        }
        Ok(faults.into_iter().map(|fault| format!("{} ({}): {fault}", object.place, name(object))).collect())
    });
    let faults: Vec<Vec<String>> = faults.collect::<Result<_>>()?;
    let faults: Vec<String> = faults.into_iter().flatten().collect();
    if !faults.is_empty() {
        bail!("the objects are not right:\n  {}", faults.join("\n  "));
    }
    let mut overlay = Overlay { state: state.clone(), objects: Vec::new(), notes: Vec::new() };
    let now = Timestamp::from_second(state.now)?.to_string();
    for object in found {
        let snapshot = &mut overlay.state.snapshot;
        let scene = Scene { namespace, now: &now, delete };
        let change = match object.kind() {
            kind if kind == AegisPrefix::kind(&()) => {
                scene.lay(&mut snapshot.prefixes, object, false, true)?
            }
            kind if kind == EgressPolicy::kind(&()) => {
                scene.lay(&mut snapshot.policies, object, false, false)?
            }
            kind if kind == EgressApplication::kind(&()) => {
                scene.lay(&mut snapshot.applications, object, false, false)?
            }
            kind if kind == EgressAllocation::kind(&()) => {
                scene.lay(&mut snapshot.allocations, object, true, true)?
            }
            kind if kind == ZoneBinding::kind(&()) => {
                scene.lay(&mut snapshot.bindings, object, true, false)?
            }
            kind if kind == UsageAlert::kind(&()) => {
                scene.lay(&mut overlay.state.alerts, object, true, false)?
            }
            // Its labels may be what a prefix is delegated by.
            "Namespace" if !delete => {
                scene.lay::<Namespace>(&mut snapshot.namespaces, object, false, false)?
            }
            "EgressAddress" | "EgressNode" => {
                bail!("{}: {} objects are written by Aegis itself", object.place, object.kind())
            }
            kind => {
                overlay.notes.push(format!(
                    "{}: objects of kind {kind} are not planned with, and are left out",
                    object.place
                ));
                continue;
            }
        };
        overlay.objects.push(change);
    }
    Ok(overlay)
}

fn name(object: &Found) -> String {
    format!("{} {}", object.kind(), object.metadata("name").unwrap_or("without a name"))
}

struct Scene<'a> {
    namespace: &'a str,
    now: &'a str,
    delete: bool,
}

impl Scene<'_> {
    fn lay<K>(
        &self,
        objects: &mut Vec<Guarded<K>>,
        found: &Found,
        namespaced: bool,
        drains: bool,
    ) -> Result<Planned>
    where
        K: Resource<DynamicType = ()> + Clone + Serialize + DeserializeOwned,
    {
        let namespace = namespaced.then(|| found.metadata("namespace").unwrap_or(self.namespace));
        let name = found.metadata("name").unwrap_or_default();
        let title = match namespace {
            Some(namespace) => format!("{} {namespace}/{name}", found.kind()),
            None => format!("{} {name}", found.kind()),
        };
        let place =
            objects.iter().position(|it| it.name_any() == name && it.namespace().as_deref() == namespace);
        let old = place.and_then(|place| objects.get(place)).map(|it| it.0.as_ref());
        let planned = |change| Ok(Planned { object: title.clone(), change });
        let mut value = match (&old, self.delete) {
            (None, true) => return planned("unchanged"),
            // Without a finalizer it is gone at once; else when what it has is empty.
            (Some(_), true) if !drains => {
                place.map(|place| objects.remove(place));
                return planned("deleted");
            }
            (Some(Ok(old)), true) => {
                let mut value = serde_json::to_value(old)?;
                value["metadata"]["deletionTimestamp"] = json!(self.now);
                value
            }
            (Some(Err(_)), true) => bail!("{title} cannot be read as it stands"),
            (_, false) => found.value.clone(),
        };
        let meta = &mut value["metadata"];
        meta["namespace"] = json!(namespace);
        let change = match &old {
            _ if self.delete => "deleted",
            None => {
                meta["uid"] = json!(format!("planned-{title}"));
                meta["creationTimestamp"] = json!(self.now);
                meta["generation"] = json!(1);
                "created"
            }
            Some(Ok(old)) => {
                let before = serde_json::to_value(old)?;
                for field in ["uid", "creationTimestamp", "deletionTimestamp", "generation", "finalizers"] {
                    meta[field] = before["metadata"][field].clone();
                }
                let labels = meta.get("labels").cloned().unwrap_or_default();
                value["status"] = before["status"].clone();
                // As it is read: what a file leaves out is there by default.
                let after: K = read(&value, found)?;
                let after = serde_json::to_value(after)?;
                let same = after["spec"] == before["spec"];
                if same && (found.kind() != "Namespace" || labels == before["metadata"]["labels"]) {
                    return planned("unchanged");
                }
                if !same {
                    let generation = old.meta().generation.unwrap_or_default() + 1;
                    value["metadata"]["generation"] = json!(generation);
                }
                "changed"
            }
            Some(Err(_)) => "changed",
        };
        let object: K = read(&value, found)?;
        let object = Arc::new(DeserializeGuard(Ok(object)));
        match place {
            Some(place) => objects[place] = object,
            None => objects.push(object),
        }
        planned(change)
    }
}

fn read<K: DeserializeOwned>(value: &Value, found: &Found) -> Result<K> {
    serde_json::from_value(value.clone()).with_context(|| format!("{} ({})", found.place, name(found)))
}
