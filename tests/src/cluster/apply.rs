//! Manifests of any kind, applied on the server's side.

use anyhow::Context;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::discovery::{ApiCapabilities, ApiResource, Scope, oneshot};
use serde::Deserialize;

/// Field manager of the tests.
const MANAGER: &str = "aegis-tests";

/// One applied object.
pub struct Applied {
    /// As the server returned it.
    pub object: DynamicObject,
    /// Its kind.
    pub resource: ApiResource,
}

/// The documents of a YAML text.
pub fn documents(yaml: &str) -> anyhow::Result<Vec<DynamicObject>> {
    serde_yaml_ng::Deserializer::from_str(yaml)
        .map(|document| serde_yaml_ng::Value::deserialize(document).context("parse YAML"))
        .filter(|value| !matches!(value, Ok(serde_yaml_ng::Value::Null)))
        .map(|value| serde_yaml_ng::from_value(value?).context("the document is no Kubernetes object"))
        .collect()
}

/// Applies one object with strict field validation, as kubectl does. Without a namespace it goes into `namespace`.
pub async fn apply(
    client: &kube::Client,
    mut object: DynamicObject,
    namespace: &str,
) -> anyhow::Result<Applied> {
    let types = object.types.as_ref().context("the object has no apiVersion and kind")?;
    let kind = GroupVersionKind::try_from(types)?;
    let (resource, capabilities): (ApiResource, ApiCapabilities) = oneshot::pinned_kind(client, &kind)
        .await
        .with_context(|| format!("kind {} is unknown", kind.kind))?;
    if capabilities.scope == Scope::Namespaced {
        object.metadata.namespace.get_or_insert_with(|| namespace.to_owned());
    }
    let name = object.metadata.name.clone().context("the object has no name")?;
    let api = api(client, &resource, object.metadata.namespace.as_deref());
    let parameters = PatchParams {
        field_validation: Some(kube::api::ValidationDirective::Strict),
        ..PatchParams::apply(MANAGER)
    };
    let object = api.patch(&name, &parameters.force(), &Patch::Apply(&object)).await?;
    Ok(Applied { object, resource })
}

/// Access to objects of a kind, in a namespace or cluster-wide.
pub fn api(client: &kube::Client, resource: &ApiResource, namespace: Option<&str>) -> Api<DynamicObject> {
    match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, resource),
        None => Api::all_with(client.clone(), resource),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_split_and_empty_ones_skipped() {
        let yaml = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n---\n# nothing\n---\napiVersion: v1\n\
                    kind: Secret\nmetadata: {name: b}\n";
        let names: Vec<String> =
            documents(yaml).unwrap().into_iter().map(|object| object.metadata.name.unwrap()).collect();
        assert_eq!(names, ["a", "b"]);
        assert!(documents("a: [").is_err());
    }
}
