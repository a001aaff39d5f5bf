//! CRD manifests from the types.

use aegis_crds::{
    AegisPrefix, EgressAddress, EgressAllocation, EgressApplication, EgressNode, EgressPolicy, UsageAlert,
    ZoneBinding,
};
use anyhow::{Context, Result};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::{Map, Value, json};

/// The definitions of all kinds as JSON, cleaned of what the derivation leaves behind.
pub fn definitions() -> Result<Vec<Value>> {
    [
        AegisPrefix::crd(),
        EgressAllocation::crd(),
        ZoneBinding::crd(),
        EgressPolicy::crd(),
        EgressApplication::crd(),
        UsageAlert::crd(),
        EgressAddress::crd(),
        EgressNode::crd(),
    ]
    .iter()
    .map(clean)
    .collect()
}

/// `<plural>.yaml`.
pub fn file_name(definition: &Value) -> String {
    format!("{}.yaml", text(&definition["spec"]["names"]["plural"]))
}

/// The manifest, keys sorted: the same bytes from every build.
pub fn yaml(definition: &Value) -> Result<String> {
    let body = serde_yaml_ng::to_string(&sorted(definition)).context("write YAML")?;
    Ok(format!("# Written by crdgen from the types in crds/src. Do not edit.\n{body}"))
}

/// The manifest as a template of the chart. Helm neither upgrades what is in a chart's `crds/` nor should it delete
/// the definitions, and with them every holding, when the release goes: hence a template that is kept.
pub fn template(definition: &Value) -> Result<String> {
    let mut definition = definition.clone();
    definition["metadata"]["annotations"] = json!({"helm.sh/resource-policy": "keep"});
    definition["metadata"]["labels"] = json!({"app.kubernetes.io/part-of": "aegis"});
    Ok(format!("{{{{- if .Values.crds.install }}}}\n{}{{{{- end }}}}\n", yaml(&definition)?))
}

/// A JSON string, or nothing.
pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn clean(definition: &CustomResourceDefinition) -> Result<Value> {
    let mut value = serde_json::to_value(definition).context("turn the definition into JSON")?;
    let versions = value["spec"]["versions"].as_array_mut().context("the definition has no versions")?;
    for version in versions {
        let root = &mut version["schema"]["openAPIV3Schema"];
        // The derivation writes "Auto-generated derived type"; the manual for the kind is the spec's.
        root["description"] = root["properties"]["spec"]["description"].clone();
        clean_schema(root);
    }
    Ok(value)
}

fn clean_schema(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            // An explicit null is then dropped by the API server, as if the field were left out.
            if object.get("nullable").is_some_and(Value::is_boolean) {
                object.remove("nullable");
            }
            // Kubernetes does not know the unsigned formats, and warns of them.
            let format = match object.get("format").and_then(Value::as_str) {
                Some("uint8" | "uint16" | "int32") => Some("int32"),
                Some("uint32" | "uint64" | "uint") => Some("int64"),
                _ => None,
            };
            if let Some(format) = format {
                object.insert("format".into(), format.into());
            }
            for value in object.values_mut() {
                clean_schema(value);
            }
        }
        Value::Array(values) => values.iter_mut().for_each(clean_schema),
        Value::Number(number) => {
            // Bounds are floating point numbers in the definition's type.
            if let Some(float) = number.as_f64()
                && number.is_f64()
                && float.fract() == 0.0
                && float.abs() < 1e15
            {
                *schema = Value::from(float as i64);
            }
        }
        _ => {}
    }
}

fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(object) => {
            let mut keys: Vec<&String> = object.keys().collect();
            keys.sort();
            Value::Object(
                keys.into_iter().map(|key| (key.clone(), sorted(&object[key]))).collect::<Map<_, _>>(),
            )
        }
        Value::Array(values) => Value::Array(values.iter().map(sorted).collect()),
        other => other.clone(),
    }
}
