//! The reference page, `docs/reference/crds.md`, from the schemas.

use crate::manifest::text;
use serde_json::{Map, Value};
use std::fmt::Write;

const HEAD: &str = "<!-- Written by crdgen from the types in crds/src. Do not edit. -->

# Custom resources

API group `aegis.dev`, version `v1alpha1`. The same text is in `kubectl explain KIND.spec.field`. `kubectl get aegis -A`
lists all kinds. A field that is not marked *required* can be left out.

People write `AegisPrefix`, `EgressAllocation`, `ZoneBinding`, `EgressPolicy`, `EgressApplication` and `UsageAlert`; `EgressAddress` and
`EgressNode` are written by the operator and the node agents, and [admission](admission.md) keeps everybody else out.
";

/// The whole page.
pub fn page(definitions: &[Value]) -> String {
    let mut page = HEAD.to_owned();
    for definition in definitions {
        kind(&mut page, definition);
    }
    page
}

fn kind(page: &mut String, definition: &Value) {
    let spec = &definition["spec"];
    let names = &spec["names"];
    let schema = &spec["versions"][0]["schema"]["openAPIV3Schema"];
    let _ = write!(
        page,
        "\n## {}\n\n{}\n\nScope: {}. Short name: `{}`.\n\n",
        text(&names["kind"]),
        text(&schema["description"]),
        text(&spec["scope"]),
        text(&names["shortNames"][0]),
    );
    for message in messages(schema).chain(messages(&schema["properties"]["spec"])) {
        let _ = writeln!(page, "- {message}");
    }
    for part in ["spec", "status"] {
        let mut rows = String::new();
        fields(&mut rows, part, &schema["properties"][part]);
        if !rows.is_empty() {
            let _ = write!(page, "\n| field | type | description |\n|---|---|---|\n{rows}");
        }
    }
}

/// Rows for all fields below `schema`.
fn fields(rows: &mut String, path: &str, schema: &Value) {
    let Some(properties) = schema["properties"].as_object() else { return };
    let required: Vec<&str> =
        schema["required"].as_array().map(|names| names.iter().map(text).collect()).unwrap_or_default();
    let mut names: Vec<&String> = properties.keys().collect();
    names.sort();
    for name in names {
        let field = &properties[name];
        let path = format!("{path}.{name}");
        let mut description = vec![text(&field["description"]).replace('\n', " ")];
        if required.contains(&name.as_str()) {
            description.push("*Required.*".into());
        }
        if let Some(default) = field.get("default").filter(|default| !default.is_object()) {
            description.push(format!("Default `{default}`."));
        }
        let rules: Vec<String> = messages(field).chain(messages(&field["items"])).collect();
        if !rules.is_empty() {
            description.push(format!("Refused with: \"{}\".", rules.join("\"; \"")));
        }
        let description = description.join(" ").replace('|', "\\|");
        let _ = writeln!(rows, "| `{path}` | {} | {description} |", type_of(field).replace('|', "\\|"));
        if name == "conditions" {
            // The same in every object of Kubernetes.
            continue;
        }
        fields(rows, &path, field);
        fields(rows, &format!("{path}[]"), &field["items"]);
    }
}

fn messages(schema: &Value) -> impl Iterator<Item = String> {
    let rules = schema["x-kubernetes-validations"].as_array();
    rules.into_iter().flatten().map(|rule| text(&rule["message"]).to_owned())
}

fn type_of(schema: &Value) -> String {
    let Some(object) = schema.as_object() else { return String::new() };
    let limits = limits(object);
    match text(&schema["type"]) {
        "array" => format!("list of {}{limits}", type_of(&schema["items"])),
        "object" if schema.get("additionalProperties").is_some() => format!("map of strings{limits}"),
        "string" => match object.get("enum").and_then(Value::as_array) {
            Some(values) => {
                values.iter().map(|value| format!("`{}`", text(value))).collect::<Vec<_>>().join(" | ")
            }
            None => format!("{}{limits}", object.get("format").map(text).unwrap_or("string")),
        },
        other => format!("{other}{limits}"),
    }
}

fn limits(schema: &Map<String, Value>) -> String {
    let bounds = [
        ("minimum", "maximum", ""),
        ("minLength", "maxLength", " characters"),
        ("minItems", "maxItems", " entries"),
        ("minProperties", "maxProperties", " entries"),
    ];
    for (low, high, unit) in bounds {
        match (schema.get(low).filter(|low| low.as_u64() != Some(0)), schema.get(high)) {
            (Some(low), Some(high)) => return format!(", {low} to {high}{unit}"),
            (None, Some(high)) => return format!(", at most {high}{unit}"),
            (Some(low), None) => return format!(", at least {low}{unit}"),
            (None, None) => {}
        }
    }
    String::new()
}
