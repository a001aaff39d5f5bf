//! Objects for tests.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use crate::snapshot::Guarded;
use kube::Resource;
use kube::core::DeserializeGuard;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::sync::Arc;

/// An object as the API server would send it.
pub fn object<K: Resource<DynamicType = ()> + DeserializeOwned>(
    namespace: Option<&str>,
    name: &str,
    body: Value,
) -> Guarded<K> {
    let mut value = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {
            "name": name, "namespace": namespace, "uid": format!("uid-{name}"), "generation": 3,
            "creationTimestamp": "2026-01-01T00:00:00Z", "resourceVersion": "7",
        },
    });
    let fields = body.as_object().cloned().unwrap_or_default();
    for (key, field) in fields {
        match (key.as_str(), field) {
            ("metadata", Value::Object(extra)) => {
                extra.into_iter().for_each(|(key, field)| value["metadata"][key] = field);
            }
            (_, field) => value[key] = field,
        }
    }
    Arc::new(serde_json::from_value::<DeserializeGuard<K>>(value).unwrap())
}
