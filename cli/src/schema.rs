//! Checks an object against the schema of its kind, as far as that can be done without an API server: unknown and missing fields,
//! types, choices, lengths and ranges. Patterns and CEL rules are the API server's.

use aegis_crds::{AegisPrefix, EgressAllocation, EgressApplication, EgressPolicy, UsageAlert, ZoneBinding};
use anyhow::{Context, Result};
use kube::{CustomResourceExt, Resource};
use serde_json::{Value, json};

/// What is wrong with an object of one of the kinds that people write: path of the field, and what it should be.
pub fn faults(kind: &str, object: &Value) -> Result<Vec<String>> {
    let definition = match kind {
        _ if kind == AegisPrefix::kind(&()) => AegisPrefix::crd(),
        _ if kind == EgressAllocation::kind(&()) => EgressAllocation::crd(),
        _ if kind == ZoneBinding::kind(&()) => ZoneBinding::crd(),
        _ if kind == EgressPolicy::kind(&()) => EgressPolicy::crd(),
        _ if kind == EgressApplication::kind(&()) => EgressApplication::crd(),
        _ if kind == UsageAlert::kind(&()) => UsageAlert::crd(),
        _ => return Ok(Vec::new()),
    };
    let definition = serde_json::to_value(definition)?;
    let mut schema = definition
        .pointer("/spec/versions/0/schema/openAPIV3Schema")
        .cloned()
        .with_context(|| format!("{kind} has no schema"))?;
    for field in ["apiVersion", "kind", "metadata"] {
        schema["properties"][field] = json!({});
    }
    let mut faults = Vec::new();
    let version = definition.pointer("/spec/versions/0/name").and_then(Value::as_str).unwrap_or_default();
    let wanted = format!(
        "{}/{version}",
        definition.pointer("/spec/group").and_then(Value::as_str).unwrap_or_default()
    );
    if object.get("apiVersion").and_then(Value::as_str) != Some(&wanted) {
        faults.push(format!("apiVersion: must be {wanted}"));
    }
    if object.pointer("/metadata/name").and_then(Value::as_str).is_none() {
        faults.push("metadata.name: must be given".to_owned());
    }
    check(&schema, object, "", &mut faults);
    Ok(faults)
}

fn check(schema: &Value, value: &Value, path: &str, faults: &mut Vec<String>) {
    let mut fault =
        |text: String| faults.push(format!("{}: {text}", if path.is_empty() { "object" } else { path }));
    if value.is_null() {
        return;
    }
    let is = match schema.get("type").and_then(Value::as_str) {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("number") => value.is_number(),
        _ => true,
    };
    if !is {
        let wanted = schema.get("type").and_then(Value::as_str).unwrap_or_default();
        return fault(format!("must be of type {wanted}"));
    }
    if let Some(choices) = schema.get("enum").and_then(Value::as_array)
        && !choices.contains(value)
    {
        let choices: Vec<&str> = choices.iter().filter_map(Value::as_str).collect();
        fault(format!("{value} is none of {}", choices.join(", ")));
    }
    let limit = |name: &str| schema.get(name).and_then(Value::as_f64);
    let size = match value {
        Value::Array(items) => Some((items.len() as f64, "minItems", "maxItems", " entries")),
        Value::String(text) => Some((text.chars().count() as f64, "minLength", "maxLength", " characters")),
        Value::Number(number) => number.as_f64().map(|it| (it, "minimum", "maximum", "")),
        _ => None,
    };
    if let Some((size, least, most, unit)) = size {
        if let Some(least) = limit(least).filter(|least| size < *least) {
            fault(format!("must be at least {least}{unit}"));
        }
        if let Some(most) = limit(most).filter(|most| size > *most) {
            fault(format!("must be at most {most}{unit}"));
        }
    }
    match value {
        Value::Array(items) => {
            let Some(schema) = schema.get("items") else { return };
            for (index, item) in items.iter().enumerate() {
                check(schema, item, &format!("{path}[{index}]"), faults);
            }
        }
        Value::Object(fields) => {
            let known = schema.get("properties").and_then(Value::as_object);
            let required = schema.get("required").and_then(Value::as_array).into_iter().flatten();
            for name in required.filter_map(Value::as_str).filter(|name| !fields.contains_key(*name)) {
                faults.push(format!("{}: must be given", join(path, name)));
            }
            let Some(known) = known else { return };
            let free = schema.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
            for (name, value) in fields {
                match known.get(name) {
                    Some(schema) => check(schema, value, &join(path, name), faults),
                    None if free => {}
                    None => faults.push(format!("{}: there is no such field", join(path, name))),
                }
            }
        }
        _ => {}
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_schema_can_tell_is_told_with_the_field() {
        let object = json!({
            "apiVersion": "aegis.dev/v1", "kind": "EgressPolicy", "metadata": {},
            "spec": {
                "precedence": 2_000_000, "action": "Refuse", "egres": {"primary": "a"},
                "match": {"destination": {"cidrs": "198.51.100.0/24", "ports": [{"port": 0}, {"protocol": "SCTP"}]}},
            },
        });
        let faults = faults("EgressPolicy", &object).unwrap();
        for wanted in [
            "apiVersion: must be aegis.dev/v1alpha1",
            "metadata.name: must be given",
            "spec.precedence: must be at most 1000000",
            "spec.action: \"Refuse\" is none of Egress, Default, Deny",
            "spec.egres: there is no such field",
            "spec.match.destination.cidrs: must be of type array",
            "spec.match.destination.ports[0].port: must be at least 1",
            "spec.match.destination.ports[1].protocol: \"SCTP\" is none of TCP, UDP, ICMP",
        ] {
            assert!(faults.iter().any(|fault| fault == wanted), "{wanted:?} is not in {faults:#?}");
        }
        assert_eq!(faults.len(), 8, "{faults:#?}");
    }

    #[test]
    fn every_example_is_right() {
        let examples = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        let found = crate::files::read(&[examples]).unwrap();
        let ours = found.iter().filter(|it| it.value["apiVersion"] == "aegis.dev/v1alpha1");
        let mut checked = 0;
        for object in ours {
            assert_eq!(faults(object.kind(), &object.value).unwrap(), [""; 0], "{}", object.place);
            checked += 1;
        }
        assert!(checked > 20, "only {checked} objects");
    }
}
