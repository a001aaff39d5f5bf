//! Objects from files: YAML or JSON, one or many in a file, lists as `kubectl get -o yaml` writes them, whole folders, `-`.

use crate::state::{AGENT, OPERATOR, State, is_part};
use aegis_crds::{
    AegisPrefix, EgressAddress, EgressAllocation, EgressApplication, EgressNode, EgressPolicy, UsageAlert,
    ZoneBinding,
};
use aegis_world::agents;
use aegis_world::snapshot::Guarded;
use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::Resource;
use kube::core::DeserializeGuard;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An object with where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// File, and which object in it if there are several.
    pub place: String,
    /// The object.
    pub value: Value,
}

impl Found {
    /// `kind`, as it stands there.
    pub fn kind(&self) -> &str {
        self.value.get("kind").and_then(Value::as_str).unwrap_or_default()
    }

    /// A field of the metadata.
    pub fn metadata(&self, field: &str) -> Option<&str> {
        self.value.get("metadata")?.get(field)?.as_str()
    }
}

/// Reads files, folders (their `.yaml`, `.yml` and `.json`) and `-`, in this order.
pub fn read(paths: &[PathBuf]) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    for path in paths {
        if path == Path::new("-") {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("read the standard input")?;
            parse("standard input", &text, &mut found)?;
        } else if path.is_dir() {
            let entries = std::fs::read_dir(path).with_context(|| format!("list {}", path.display()))?;
            let mut inside: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
            inside.retain(|it| {
                it.extension().is_some_and(|end| ["yaml", "yml", "json"].iter().any(|known| end == *known))
            });
            inside.sort();
            inside.iter().try_for_each(|file| read_file(file, &mut found))?;
        } else {
            read_file(path, &mut found)?;
        }
    }
    Ok(found)
}

fn read_file(path: &Path, found: &mut Vec<Found>) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    parse(&path.display().to_string(), &text, found)
}

/// Adds all objects of a text.
pub fn parse(place: &str, text: &str, found: &mut Vec<Found>) -> Result<()> {
    let before = found.len();
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let value = Value::deserialize(document).with_context(|| format!("{place}: no YAML"))?;
        add(place, value, found)?;
    }
    if found.len() > before + 1 {
        let numbered = found.iter_mut().skip(before).zip(1..);
        numbered.for_each(|(object, number)| object.place = format!("{place}, object {number}"));
    }
    Ok(())
}

fn add(place: &str, value: Value, found: &mut Vec<Found>) -> Result<()> {
    let kind = value.get("kind").and_then(Value::as_str);
    match (value.get("items").and_then(Value::as_array), kind) {
        // An empty document, as a comment before the first separator makes one.
        _ if value.is_null() => Ok(()),
        (Some(items), Some(kind)) if kind.ends_with("List") => {
            items.iter().try_for_each(|item| add(place, item.clone(), found))
        }
        (_, Some(_)) => {
            found.push(Found { place: place.to_owned(), value });
            Ok(())
        }
        (_, None) => bail!("{place}: an object without kind"),
    }
}

/// A state from files. Kinds that have nothing to do with it are left out.
pub fn state(paths: &[PathBuf]) -> Result<State> {
    let mut state = State::default();
    for object in read(paths)? {
        place(&mut state, &object)?;
    }
    let looking = state.system.iter().any(|pod| is_part(pod, AGENT));
    state.snapshot.agents =
        looking.then(|| agents::by_node(state.system.iter().filter(|it| is_part(it, AGENT))));
    Ok(state)
}

/// Puts an object in its place; false if it is of a kind that is nothing to anybody here.
pub fn place(state: &mut State, object: &Found) -> Result<bool> {
    let snapshot = &mut state.snapshot;
    match object.kind() {
        kind if kind == AegisPrefix::kind(&()) => snapshot.prefixes.push(guarded(object)?),
        kind if kind == EgressAllocation::kind(&()) => snapshot.allocations.push(guarded(object)?),
        kind if kind == ZoneBinding::kind(&()) => snapshot.bindings.push(guarded(object)?),
        kind if kind == EgressPolicy::kind(&()) => snapshot.policies.push(guarded(object)?),
        kind if kind == EgressApplication::kind(&()) => snapshot.applications.push(guarded(object)?),
        kind if kind == UsageAlert::kind(&()) => state.alerts.push(guarded(object)?),
        kind if kind == EgressAddress::kind(&()) => snapshot.addresses.push(guarded(object)?),
        kind if kind == EgressNode::kind(&()) => snapshot.egress_nodes.push(guarded(object)?),
        "Node" => snapshot.nodes.push(guarded::<Node>(object)?),
        "Namespace" => snapshot.namespaces.push(guarded::<Namespace>(object)?),
        "ServiceCIDR" => snapshot.services.push(guarded::<ServiceCIDR>(object)?),
        "Pod" => {
            let pod: Pod = typed(object)?;
            if is_part(&pod, AGENT) || is_part(&pod, OPERATOR) {
                state.system.push(pod.clone());
            }
            state.pods.push(pod);
        }
        "Service" => state.service_objects.push(typed::<Service>(object)?),
        "EndpointSlice" => state.endpoints.push(typed::<EndpointSlice>(object)?),
        _ => return Ok(false),
    }
    Ok(true)
}

/// The state of objects in a text.
#[cfg(test)]
pub(crate) fn state_of(objects: &str) -> State {
    let mut found = Vec::new();
    let mut state = State::default();
    assert!(parse("here", objects, &mut found).is_ok());
    found.iter().for_each(|object| assert!(place(&mut state, object).is_ok_and(|known| known)));
    state
}

fn typed<K: DeserializeOwned>(object: &Found) -> Result<K> {
    serde_json::from_value(object.value.clone())
        .with_context(|| format!("{}: {}", object.place, object.kind()))
}

fn guarded<K>(object: &Found) -> Result<Guarded<K>>
where
    K: Resource + DeserializeOwned,
{
    Ok(Arc::new(typed::<DeserializeGuard<K>>(object)?))
}
