//! What people read: the examples, `kubectl explain` and the columns of `kubectl get`.

use crate::server;
use aegis_tests::apiserver::repository;
use serde::Deserialize;
use serde_json::Value;
use std::fs;

#[test]
fn every_example_can_be_applied() {
    let server = server();
    let folder = repository().join("examples");
    let mut ranges: Vec<ipnet::IpNet> = Vec::new();
    for entry in fs::read_dir(&folder).expect("list the examples") {
        let path = entry.expect("list the examples").path();
        let file = path.to_str().expect("the path is UTF-8");
        let text = fs::read_to_string(&path).expect(file);
        server.kubectl_with(&["apply", "-f", "-"], &text).unwrap_or_else(|error| panic!("{file}: {error}"));
        for document in serde_yaml_ng::Deserializer::from_str(&text) {
            let object = Value::deserialize(document).expect(file);
            if let Some(cidr) = object["spec"]["cidr"].as_str() {
                ranges.push(cidr.parse().expect(file));
            }
        }
    }
    assert!(ranges.len() >= 8, "only {} prefixes in {}", ranges.len(), folder.display());
    // Of two prefixes that overlap the newer one is not accepted, and examples are tried side by side.
    ranges.sort();
    assert!(
        ranges.windows(2).all(|pair| pair[0].broadcast() < pair[1].network()),
        "they overlap: {ranges:?}"
    );
}

#[test]
fn every_field_is_explained() {
    let server = server();
    for kind in [
        "aegisprefix",
        "egressallocation",
        "zonebinding",
        "egresspolicy",
        "egressapplication",
        "usagealert",
        "egressaddress",
        "egressnode",
    ] {
        let text = server.kubectl(&["explain", kind, "--recursive"]).expect("explain");
        assert!(text.contains("DESCRIPTION:"), "{kind}:\n{text}");
        let text = server.kubectl(&["get", "--raw", "/openapi/v3/apis/aegis.dev/v1alpha1"]).expect("OpenAPI");
        let document: Value = serde_json::from_str(&text).expect("OpenAPI is JSON");
        let schemas = document["components"]["schemas"].as_object().expect("schemas");
        let (_, schema) = schemas
            .iter()
            .find(|(name, _)| name.to_lowercase() == format!("dev.aegis.v1alpha1.{kind}"))
            .unwrap_or_else(|| panic!("{kind} is not in the API server's OpenAPI document"));
        let mut silent = Vec::new();
        for part in ["spec", "status"] {
            undescribed(&format!("{kind}.{part}"), &schema["properties"][part], &mut silent);
        }
        assert!(silent.is_empty(), "no description: {}", silent.join(", "));
    }
}

fn undescribed(path: &str, schema: &Value, silent: &mut Vec<String>) {
    if schema["description"].as_str().unwrap_or_default().trim().is_empty() {
        silent.push(path.to_owned());
    }
    for parent in [schema, &schema["items"]] {
        for (name, field) in parent["properties"].as_object().into_iter().flatten() {
            undescribed(&format!("{path}.{name}"), field, silent);
        }
    }
}

#[test]
fn kinds_have_short_names_columns_and_a_category() {
    let server = server();
    for (short, columns) in [
        ("apfx", ["CIDR", "ACCOUNT", "USED", "AGE"]),
        ("ealloc", ["ADDRESSES", "NODES", "CAPACITY LOW", "AGE"]),
        ("zbind", ["ALLOCATION", "ENABLED", "PROGRAMMED", "AGE"]),
        ("epol", ["ORDER", "PRECEDENCE", "ACTION", "AGE"]),
        ("eapp", ["POLICIES", "ACCEPTED", "DESCRIPTION", "AGE"]),
        ("ualert", ["ALLOCATION", "ACCEPTED", "FIRING", "AGE"]),
        ("eaddr", ["ALLOCATION", "EPOCH", "HELD", "AGE"]),
        ("enode", ["TUNNEL", "VERSION", "READY", "AGE"]),
    ] {
        let path = match short {
            "apfx" => "aegisprefixes",
            "ealloc" => "egressallocations",
            "zbind" => "zonebindings",
            "epol" => "egresspolicies",
            "eapp" => "egressapplications",
            "ualert" => "usagealerts",
            "eaddr" => "egressaddresses",
            _ => "egressnodes",
        };
        let crd =
            server.kubectl(&["get", "crd", &format!("{path}.aegis.dev"), "-o", "json"]).expect("get the CRD");
        let crd: Value = serde_json::from_str(&crd).expect("JSON");
        assert_eq!(crd["spec"]["names"]["shortNames"][0], short);
        assert_eq!(crd["spec"]["names"]["categories"][0], "aegis");
        let names: Vec<String> = crd["spec"]["versions"][0]["additionalPrinterColumns"]
            .as_array()
            .expect("columns")
            .iter()
            .filter_map(|column| Some(column["name"].as_str()?.to_uppercase()))
            .collect();
        assert!(columns.iter().all(|column| names.iter().any(|name| name == column)), "{short}: {names:?}");
    }
}
