//! Tests of statuses.

use super::*;
use crate::world::testing::object;
use crate::world::translate;
use aegis_core::plan::plan;
use k8s_openapi::api::core::v1::Node;
use std::sync::Arc;

const NOW: i64 = 1_800_000_000;

fn now() -> Timestamp {
    Timestamp::from_second(NOW).unwrap()
}

fn snapshot(nodes: &[&str]) -> Snapshot {
    let report = |name: &&str| {
        let ready = json!({
            "type": "Ready", "status": "True", "reason": "X", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z",
        });
        object(
            None,
            name,
            json!({"spec": {}, "status": {"tunnelAddress": "192.0.2.1", "conditions": [ready]}}),
        )
    };
    Snapshot {
        prefixes: vec![object(
            None,
            "leased",
            json!({"spec": {"cidr": "203.0.113.0/28", "account": "shop"}}),
        )],
        allocations: vec![object(Some("shop"), "partner", json!({"spec": {"prefixes": ["leased"]}}))],
        nodes: nodes.iter().map(|name| object::<Node>(None, name, json!({}))).collect(),
        egress_nodes: nodes.iter().map(report).collect(),
        ..Snapshot::default()
    }
}

fn view(snapshot: &Snapshot) -> View {
    let world = translate(snapshot, &[], NOW, 120);
    View { plan: plan(&world.inputs), world, ..View::default() }
}

/// The snapshot once a change is written.
fn written(snapshot: &Snapshot, changes: &[StatusChange]) -> Snapshot {
    let mut after = snapshot.clone();
    for change in changes {
        match change.target.resource.kind.as_str() {
            "AegisPrefix" => put(&mut after.prefixes, change),
            "EgressAllocation" => put(&mut after.allocations, change),
            "ZoneBinding" => put(&mut after.bindings, change),
            kind => panic!("{kind}"),
        }
    }
    after
}

fn put<K>(objects: &mut [Guarded<K>], change: &StatusChange)
where
    K: Resource + serde::de::DeserializeOwned + Serialize + Clone,
{
    for object in objects.iter_mut().filter(|it| it.meta().uid.as_ref() == Some(&change.target.uid)) {
        let mut value = serde_json::to_value(object.0.as_ref().unwrap()).unwrap();
        value["status"] = change.status.clone();
        *object = Arc::new(serde_json::from_value(value).unwrap());
    }
}

fn condition<'a>(changes: &'a [StatusChange], kind: &str, type_: &str) -> &'a Value {
    let change = changes.iter().find(|change| change.target.resource.kind == kind).unwrap();
    change.status["conditions"].as_array().unwrap().iter().find(|it| it["type"] == type_).unwrap()
}

#[test]
fn what_was_written_is_not_written_again() {
    let before = snapshot(&["n1", "n2"]);
    let view = view(&before);
    let first = changes(&before, &view, now());
    assert_eq!(first.len(), 2, "{first:?}");
    assert!(first.iter().all(|change| change.urgent));
    let later = Timestamp::from_second(NOW + 1_000).unwrap();
    assert!(changes(&written(&before, &first), &view, later).is_empty());
}

#[test]
fn transition_time_changes_with_the_status_only() {
    let before = snapshot(&[]);
    let first = changes(&before, &view(&before), now());
    assert_eq!(condition(&first, "EgressAllocation", "Allocated")["reason"], reason::NO_NODE);
    let mut after = written(&before, &first);
    (after.nodes, after.egress_nodes) = (snapshot(&["n1"]).nodes, snapshot(&["n1"]).egress_nodes);
    let later = Timestamp::from_second(NOW + 1_000).unwrap();
    let second = changes(&after, &view(&after), later);
    let time = |changes: &[StatusChange], type_| {
        condition(changes, "EgressAllocation", type_)["lastTransitionTime"].clone()
    };
    assert_ne!(time(&first, "Allocated"), time(&second, "Allocated"));
    assert_eq!(time(&first, "Accepted"), time(&second, "Accepted"));
    let notices: Vec<&str> = second.iter().flat_map(|it| &it.notices).map(|it| it.reason.as_str()).collect();
    assert_eq!(notices, [reason::ALLOCATED], "only what turned is news");
    assert!(second[0].notices[0].note.starts_with("203.0.113.0: "), "{:?}", second[0].notices);
}

#[test]
fn object_that_changed_since_the_plan_waits() {
    let before = snapshot(&["n1"]);
    let view = view(&before);
    let mut after = before.clone();
    let spec = json!({"spec": {"prefixes": ["leased"]}, "metadata": {"generation": 4}});
    after.allocations = vec![object(Some("shop"), "partner", spec)];
    let found = changes(&after, &view, now());
    assert!(found.iter().all(|change| change.target.resource.kind == "AegisPrefix"), "{found:?}");
}

#[test]
fn allocation_waits_for_its_addresses_to_be_written() {
    let before = snapshot(&["n1"]);
    let mut view = view(&before);
    view.unwritten = view.plan.addresses.iter().map(|address| address.address).collect();
    let found = changes(&before, &view, now());
    assert!(found.iter().all(|change| change.target.resource.kind == "AegisPrefix"), "{found:?}");
}

#[test]
fn observed_generation_is_the_planned_one() {
    let before = snapshot(&["n1"]);
    let found = changes(&before, &view(&before), now());
    assert_eq!(condition(&found, "EgressAllocation", "Programmed")["observedGeneration"], 3);
}

#[test]
fn message_names_a_few_nodes_only() {
    let names: Vec<String> = (0..9).map(|index| format!("n{index}")).collect();
    let before = snapshot(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let found = changes(&before, &view(&before), now());
    let message = condition(&found, "EgressAllocation", "Programmed")["message"].as_str().unwrap().to_owned();
    assert_eq!(message, "0 of 9 nodes have 203.0.113.0; waiting for n0, n1, n2 and 6 more");
}

#[test]
fn agent_that_is_not_ready_is_named_with_its_reason() {
    let mut before = snapshot(&["n1", "n2"]);
    let view = view(&before);
    before.egress_nodes.truncate(1);
    let found = changes(&before, &view, now());
    let message = condition(&found, "EgressAllocation", "Programmed")["message"].as_str().unwrap().to_owned();
    assert!(message.contains("n2 (its agent has not reported)"), "{message}");
}

#[test]
fn invalid_object_gets_one_condition() {
    let status = invalid(Some(5), "spec.cidr: wrong", now());
    let condition = &status["status"]["conditions"][0];
    assert_eq!((condition["type"].as_str(), condition["status"].as_str()), (Some("Accepted"), Some("False")));
    assert_eq!(
        (condition["reason"].as_str(), condition["observedGeneration"].as_i64()),
        (Some("Invalid"), Some(5))
    );
}
