//! Tests of statuses.

use super::*;
use crate::report::Report;
use crate::world::testing::object;
use crate::world::translate;
use aegis_core::plan::plan;
use k8s_openapi::api::core::v1::Node;
use std::sync::Arc;

const NOW: i64 = 1_800_000_000;

fn now() -> Timestamp {
    Timestamp::from_second(NOW).unwrap()
}

/// What the agent of a node reports: that it is ready ("True") or not, and more.
fn report(node: &str, ready: &str, more: Value) -> Guarded<Report> {
    let ready = json!({
        "type": "Ready", "status": ready, "reason": "X", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z",
    });
    let mut status = json!({"tunnelAddress": "192.0.2.1", "conditions": [ready]});
    more.as_object().unwrap().iter().for_each(|(key, field)| status[key] = field.clone());
    object(None, node, json!({"spec": {}, "status": status}))
}

fn snapshot(nodes: &[&str]) -> Snapshot {
    Snapshot {
        prefixes: vec![object(
            None,
            "leased",
            json!({"spec": {"cidr": "203.0.113.0/28", "account": "shop"}}),
        )],
        allocations: vec![object(Some("shop"), "partner", json!({"spec": {"prefixes": ["leased"]}}))],
        nodes: nodes.iter().map(|name| object::<Node>(None, name, json!({}))).collect(),
        egress_nodes: nodes.iter().map(|node| report(node, "True", json!({}))).collect(),
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
    view.unwritten = view.plan.addresses.iter().map(|address| (address.address, None)).collect();
    let found = changes(&before, &view, now());
    assert!(found.iter().all(|change| change.target.resource.kind == "AegisPrefix"), "{found:?}");
    // What goes on failing is told.
    view.unwritten.values_mut().for_each(|told| *told = Some("quota exceeded".into()));
    let found = changes(&before, &view, now());
    let allocated = condition(&found, "EgressAllocation", "Allocated");
    assert_eq!(
        (allocated["status"].as_str(), allocated["reason"].as_str()),
        (Some("False"), Some("NotWritten"))
    );
    assert!(allocated["message"].as_str().unwrap().contains("quota exceeded"), "{allocated}");
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

/// The snapshot with a binding that names the allocation, and all that the plan says written.
fn bound(mut snapshot: Snapshot) -> Snapshot {
    let spec = json!({"allocationRef": {"name": "partner"}, "workloads": {"allPods": true}, "zone": {"cidrs": ["0.0.0.0/0"]}});
    snapshot.bindings = vec![object(Some("shop"), "bound", json!({"spec": spec}))];
    snapshot
}

/// The binding's conditions: status and reason of `Accepted` and of `Programmed`, and both messages.
fn told_binding(snapshot: &Snapshot) -> (Vec<String>, String) {
    let found = changes(snapshot, &view(snapshot), now());
    let conditions = ["Accepted", "Programmed"].map(|type_| condition(&found, "ZoneBinding", type_).clone());
    let text = |it: &Value, key: &str| it[key].as_str().unwrap().to_owned();
    let words =
        conditions.iter().map(|it| format!("{} {}", text(it, "status"), text(it, "reason"))).collect();
    (words, conditions.iter().map(|it| text(it, "message")).collect::<Vec<_>>().join(" | "))
}

#[test]
fn a_binding_says_what_is_the_matter_with_its_allocation() {
    let mut good = bound(snapshot(&["n1"]));
    let bindings = json!([{"namespace": "shop", "name": "bound", "generation": 3}]);
    good.egress_nodes = vec![report("n1", "True", json!({"bindings": bindings}))];
    assert_eq!(told_binding(&good).0, ["True Accepted", "True Programmed"]);

    let allocation = |body| vec![object(Some("shop"), "partner", body)];
    let missing = Snapshot { allocations: Vec::new(), ..good.clone() };
    let (words, message) = told_binding(&missing);
    assert_eq!(words, ["False NotFound", "False Unavailable"]);
    assert!(message.contains("create it"), "{message}");

    let invalid = Snapshot { allocations: allocation(json!({"spec": {"prefixes": 5}})), ..good.clone() };
    let (words, message) = told_binding(&invalid);
    assert_eq!(words, ["False Invalid", "False Unavailable"]);
    assert!(!message.contains("create it"), "it exists: {message}");

    let deletion =
        json!({"spec": {"prefixes": ["leased"]}, "metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
    let deleting = Snapshot { allocations: allocation(deletion), ..good.clone() };
    assert_eq!(told_binding(&deleting).0, ["False Draining", "False Unavailable"]);

    let nowhere = json!({"spec": {"prefixes": ["nowhere"]}});
    let (words, message) = told_binding(&Snapshot { allocations: allocation(nowhere), ..good });
    assert_eq!(words, ["True Accepted", "False Unavailable"]);
    assert!(message.contains("\"nowhere\" does not exist") && message.contains("are refused"), "{message}");
}

#[test]
fn a_rule_with_names_says_which_have_no_address_and_where() {
    let mut snapshot = snapshot(&["n1", "n2"]);
    let zone = json!({"hosts": ["a.test", "*.b.test"]});
    let spec = json!({"allocationRef": {"name": "partner"}, "workloads": {"allPods": true}, "zone": zone});
    snapshot.bindings = vec![object(Some("shop"), "b", json!({"spec": spec}))];
    let resolved = |snapshot: &Snapshot| {
        let changes = changes(snapshot, &view(snapshot), now());
        let condition = condition(&changes, "ZoneBinding", "Resolved");
        let text = |field: &str| condition[field].as_str().unwrap().to_owned();
        (text("status"), text("reason"), text("message"))
    };
    assert_eq!(resolved(&snapshot).0, "True");
    let absent = json!({"host": "a.test", "absent": true, "message": "no such name (NXDOMAIN)"});
    let other = json!({"host": "other.test", "message": "silence"});
    snapshot.egress_nodes[0] = report("n1", "True", json!({"unresolved": [absent, other]}));
    let (status, reason, message) = resolved(&snapshot);
    assert_eq!((status.as_str(), reason.as_str()), ("False", "HostNotFound"));
    assert!(
        message.starts_with("spec.zone.hosts: \"a.test\" has no address on n1 (no such name (NXDOMAIN))"),
        "{message}"
    );
    assert!(!message.contains("other.test"), "another rule's");
    let silent = json!({"host": "a.test", "message": "192.0.2.10: no answer"});
    snapshot.egress_nodes[1] = report("n2", "True", json!({"unresolved": [silent]}));
    let (_, reason, message) = resolved(&snapshot);
    assert_eq!(reason, "ResolverFailed", "there may be an address");
    assert!(message.contains("on n1, n2") && message.contains("agent.dns.servers"), "{message}");
}

#[test]
fn a_drain_that_hangs_names_the_nodes_and_the_remedy() {
    let mut before = snapshot(&["n1", "n2"]);
    let holdings = json!([
        {"first": 4, "last": 4, "node": "n1", "epoch": 8, "state": "Draining"},
        {"first": 5, "last": 5, "node": "n2", "epoch": 8, "state": "Draining"},
        {"first": 6, "last": 6, "node": "n3", "epoch": 8, "state": "Quarantined", "until": "2027-01-15T08:01:00Z"},
        {"first": 7, "last": 7, "node": "n3", "epoch": 8, "state": "Quarantined", "until": "2027-01-15T08:01:30Z"},
    ]);
    let spec = json!({"spec": {
        "address": "203.0.113.2", "prefix": "leased", "allocationRef": {"namespace": "shop", "name": "partner"},
        "epoch": 8, "holdings": holdings,
    }});
    before.addresses = vec![object(None, "203.0.113.2", spec)];
    let deletion =
        json!({"spec": {"prefixes": ["leased"]}, "metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
    before.allocations = vec![object(Some("shop"), "partner", deletion)];
    before.egress_nodes.truncate(1);
    let found = changes(&before, &view(&before), now());
    for type_ in ["Allocated", "Programmed"] {
        let message = condition(&found, "EgressAllocation", type_)["message"].as_str().unwrap();
        for part in [
            "n1 (live flows)",
            "n2 (its agent has not reported)",
            "out-of-service",
            "rested at 2027-01-15T08:01:00Z",
        ] {
            assert!(message.contains(part), "{type_}: {message}");
        }
    }
}

#[test]
fn an_agent_that_restarts_changes_no_status() {
    let mut before = bound(snapshot(&["n1", "n2"]));
    let report = |ready: &str| {
        let has = json!({
            "addresses": [{"address": "203.0.113.0", "epoch": NOW + 1}],
            "bindings": [{"namespace": "shop", "name": "bound", "generation": 3}],
        });
        self::report("n2", ready, has)
    };
    let mut view = view(&before);
    before.egress_nodes[1] = report("True");
    let spec = crate::world::spec(&view.plan.addresses[0]);
    before.addresses = vec![object(None, "203.0.113.0", json!({"spec": spec}))];
    view.world.generations.insert("uid-203.0.113.0".into(), 3);
    let messages = |snapshot: &Snapshot| {
        let found = changes(snapshot, &view, now());
        ["EgressAllocation", "ZoneBinding", "EgressAddress"]
            .map(|kind| condition(&found, kind, "Programmed")["message"].as_str().unwrap().to_owned())
    };
    let ready = messages(&before);
    assert!(ready[2].starts_with("1 of 2 nodes"), "{ready:?}");
    before.egress_nodes[1] = report("False");
    assert_eq!(messages(&before), ready);
}

#[test]
fn a_withheld_address_stays_in_the_status_of_whom_it_was() {
    let mut before = snapshot(&["n1"]);
    let status = json!({"addresses": [{"address": "203.0.113.0", "prefix": "leased", "slicesHeld": 8}]});
    before.allocations =
        vec![object(Some("shop"), "partner", json!({"spec": {"prefixes": ["leased"]}, "status": status}))];
    let mut world = translate(&before, &[], NOW, 120);
    world.inputs.withheld.insert("203.0.113.0".parse().unwrap(), None);
    let view = View { plan: plan(&world.inputs), world, ..View::default() };
    assert!(view.plan.addresses.is_empty(), "and it gets no other in its place");
    let found = changes(&before, &view, now());
    let change = found.iter().find(|change| change.target.resource.kind == "EgressAllocation").unwrap();
    assert_eq!(change.status["addresses"][0]["address"], "203.0.113.0");
    assert_eq!(condition(&found, "EgressAllocation", "Allocated")["reason"], reason::WITHHELD);
}

/// The allocation has two sites: n1 is in zone `a`, the others are in zone `b`.
fn in_sites(mut snapshot: Snapshot) -> Snapshot {
    let site = |name, zone, weight| json!({"name": name, "nodeSelector": {"zone": zone}, "weight": weight});
    let spec = json!({"prefixes": ["leased"], "sites": [site("west", "b", 3), site("east", "a", 1)]});
    snapshot.allocations = vec![object(Some("shop"), "partner", json!({"spec": spec}))];
    let names: Vec<String> = snapshot.nodes.iter().map(|node| node.name_any()).collect();
    let node = |name: &String| {
        let zone = if name == "n1" { "a" } else { "b" };
        object(None, name, json!({"metadata": {"labels": {"zone": zone}}}))
    };
    snapshot.nodes = names.iter().map(node).collect();
    snapshot
}

fn status<'a>(changes: &'a [StatusChange], kind: &str) -> Option<&'a Value> {
    changes.iter().find(|change| change.target.resource.kind == kind).map(|change| &change.status)
}

/// What node n1 reports of the allocation.
fn with_demand(mut snapshot: Snapshot, fill: u32, refused: u32) -> Snapshot {
    let name = json!({"namespace": "shop", "name": "partner"});
    let demand = json!([{"allocation": name, "slices": 8, "fillPercent": fill, "refused": refused}]);
    snapshot.egress_nodes[0] = report("n1", "True", json!({"demand": demand}));
    snapshot
}

#[test]
fn each_site_has_a_status() {
    let before = with_demand(in_sites(snapshot(&["n1", "n2", "n3"])), 47, 0);
    let view = view(&before);
    let first = changes(&before, &view, now());
    let east = json!({
        "name": "east", "weight": 1, "nodes": 1, "nodesReady": 1, "nodesHolding": 1,
        "slices": 63, "slicesHeld": 8, "fillPercent": 40,
    });
    let west = json!({
        "name": "west", "weight": 3, "nodes": 2, "nodesReady": 2, "nodesHolding": 2,
        "slices": 189, "slicesHeld": 16, "fillPercent": 0,
    });
    assert_eq!(status(&first, "EgressAllocation").unwrap()["sites"], json!([east, west]));
    // Small changes of the fill, and agents that restart, are no news.
    let mut after = with_demand(written(&before, &first), 38, 0);
    let view = self::view(&after);
    after.egress_nodes[1] = report("n2", "False", json!({}));
    let sites = |snapshot: &Snapshot| {
        let found = changes(snapshot, &view, now());
        status(&found, "EgressAllocation").map(|status| status["sites"].clone())
    };
    assert!(sites(&after).is_none_or(|sites| sites == json!([east, west])), "{:?}", sites(&after));
    let fuller = sites(&with_demand(after, 61, 0)).unwrap();
    assert_eq!(fuller[0]["fillPercent"], 60);
}

#[test]
fn capacity_is_low_in_the_site_that_is_full() {
    let before = with_demand(in_sites(snapshot(&["n1", "n2"])), 97, 0);
    let found = changes(&before, &view(&before), now());
    let low = condition(&found, "EgressAllocation", "CapacityLow");
    assert_eq!(low["status"], "True");
    let message = low["message"].as_str().unwrap();
    assert!(message.starts_with("node n1 of site \"east\" uses 95 %"), "{message}");
}

#[test]
fn a_prefix_that_is_not_delegated_is_told_once_and_nobody_else_hears_who_has_what() {
    let mut before = snapshot(&["n1"]);
    before.prefixes =
        vec![object(None, "leased", json!({"spec": {"cidr": "203.0.113.0/28", "account": "bank"}}))];
    let found = changes(&before, &view(&before), now());
    let notices: Vec<&str> = found.iter().flat_map(|it| &it.notices).map(|it| it.reason.as_str()).collect();
    assert_eq!(notices, [reason::NOT_PERMITTED], "one for three conditions");
    for type_ in ["Accepted", "Delegated", "Allocated"] {
        assert_eq!(condition(&found, "EgressAllocation", type_)["reason"], reason::NOT_PERMITTED);
    }

    // It has one, and the prefix changes hands.
    let mut after = snapshot(&["n1"]);
    after.addresses = vec![object(
        None,
        "203.0.113.0",
        json!({"spec": {
            "address": "203.0.113.0", "prefix": "leased", "epoch": 1, "holdings": [],
            "allocationRef": {"namespace": "shop", "name": "partner"},
        }}),
    )];
    after.prefixes = before.prefixes;
    let found = changes(&after, &view(&after), now());
    let status = status(&found, "AegisPrefix").unwrap();
    assert_eq!(status["accounts"][0]["right"], "Withdrawn");
    assert_eq!(status["accounts"][0]["allocations"][0]["addresses"], json!(["203.0.113.0"]));
    let told = condition(&found, "AegisPrefix", "Delegated");
    assert!(told["message"].as_str().unwrap().contains("(shop/partner) where none is"), "{told}");
    let prefix = found.iter().find(|it| it.target.resource.kind == "AegisPrefix").unwrap();
    assert!(prefix.notices.is_empty(), "{:?}", prefix.notices);
}

#[test]
fn a_policy_names_the_application_that_it_lacks_and_an_application_who_names_it() {
    let mut before = snapshot(&["n1"]);
    let policy = |name: &str, mode: &str| {
        let destination = json!({"destination": {"applications": ["crm"]}});
        let spec = json!({"precedence": 1, "action": "Deny", "mode": mode, "match": destination});
        object(None, name, json!({"spec": spec}))
    };
    before.policies = vec![policy("a", "Enforce")];
    let lacks = changes(&before, &view(&before), now());
    let accepted = condition(&lacks, "EgressPolicy", "Accepted");
    assert_eq!((&accepted["status"], &accepted["reason"]), (&"False".into(), &"NotFound".into()));
    assert_eq!(
        accepted["message"],
        "spec.match.destination.applications: EgressApplication \"crm\" does not exist; create it or name another; until then \
         pods that match otherwise are refused whatever no policy before this one decides"
    );

    let endpoint = json!({"hosts": ["crm.test"]});
    before.applications = vec![object(None, "crm", json!({"spec": {"endpoints": [endpoint]}}))];
    let unresolved = json!({"unresolved": [{"host": "crm.test", "absent": true, "message": "no such name"}]});
    before.egress_nodes = vec![report("n1", "True", unresolved)];
    let found = changes(&before, &view(&before), now());
    assert_eq!(condition(&found, "EgressPolicy", "Accepted")["status"], "True");
    assert_eq!(
        condition(&found, "EgressPolicy", "Resolved")["reason"],
        "HostNotFound",
        "its names are the policy's"
    );
    assert_eq!(status(&found, "EgressApplication").unwrap()["policies"], 1);
    before.policies = ["a", "b", "c", "d"].map(|name| policy(name, "Observe")).into();
    let found = changes(&before, &view(&before), now());
    let accepted = condition(&found, "EgressApplication", "Accepted");
    assert_eq!(accepted["message"], "4 EgressPolicy objects name it: a, b, c and 1 more");
    assert_eq!(accepted["status"], "True");
}

#[test]
fn a_policy_that_matches_nothing_or_refuses_all_that_it_matches_says_so() {
    let mut before = snapshot(&["n1"]);
    let labels = |team: &str| json!({"metadata": {"labels": {"team": team}}});
    before.namespaces = vec![object(None, "shop", labels("web")), object(None, "bank", labels("web"))];
    let egress = |identity: Value, egress: Value| {
        let spec =
            json!({"precedence": 1, "action": "Egress", "egress": egress, "match": {"identity": identity}});
        object(None, "p", json!({"spec": spec}))
    };
    let mut told = |policy, type_: &str| {
        before.policies = vec![policy];
        let found = changes(&before, &view(&before), now());
        let condition = condition(&found, "EgressPolicy", type_);
        let field = |name: &str| condition[name].as_str().unwrap().to_owned();
        (field("reason"), field("message"))
    };
    let partner = || json!({"primary": "partner"});

    let contradiction = json!({"podSelector": {"matchLabels": {"app": "a"},
        "matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}});
    let (reason, message) = told(egress(contradiction, partner()), "Effective");
    assert_eq!(reason, "MatchesNothing");
    assert!(message.contains("spec.match.identity.podSelector asks for contradicts itself"), "{message}");
    for (identity, why) in [
        (json!({"namespaces": ["shpo"]}), "namespaces: there is no such namespace"),
        (json!({"namespaceSelector": {"matchLabels": {"team": "wbe"}}}), "no namespace has such labels"),
    ] {
        let (reason, message) = told(egress(identity, partner()), "Effective");
        assert!(reason == "MatchesNothing" && message.contains(why), "{message}");
    }
    let by_labels = || json!({"namespaceSelector": {"matchLabels": {"team": "web"}}});
    assert_eq!(told(egress(by_labels(), partner()), "Effective").0, "Effective");

    let (reason, message) = told(egress(by_labels(), partner()), "Accepted");
    assert_eq!(reason, "NotFound");
    assert!(
        message.contains("no such EgressAllocation in bank: pods there that match are refused"),
        "{message}"
    );
    let typo = json!({"primary": "partnre", "secondary": "partner"});
    let (reason, message) = told(egress(json!({"namespaces": ["shop"]}), typo), "Accepted");
    assert_eq!(reason, "NotFound");
    assert!(message.contains("in shop: pods there leave from the secondary, \"partner\""), "{message}");
    // Whom it is about where it chooses no namespace, nobody can tell.
    assert_eq!(
        told(egress(json!({"podSelector": {"matchLabels": {"a": "b"}}}), partner()), "Accepted").0,
        "Accepted"
    );
    assert_eq!(told(egress(json!({"namespaces": ["shop"]}), partner()), "Programmed").0, "Pending");

    // Without a node nobody holds a slice.
    before.nodes.clear();
    let spec = json!({"precedence": 1, "action": "Egress", "egress": partner(), "match": {"identity": {"namespaces": ["shop"]}}});
    before.policies = vec![object(None, "p", json!({"spec": spec}))];
    let found = changes(&before, &view(&before), now());
    let programmed = condition(&found, "EgressPolicy", "Programmed");
    assert_eq!(programmed["reason"], "Unavailable");
    assert!(
        programmed["message"].as_str().unwrap().contains("no node holds a slice of the allocations in shop")
    );
}

#[test]
fn a_policy_says_what_it_observed_and_where_countries_are_not_known() {
    let mut before = snapshot(&["n1", "n2"]);
    let country = json!({"destination": {"countries": ["NZ"]}});
    let spec = json!({"precedence": 1, "action": "Deny", "mode": "Observe", "match": country});
    before.policies = vec![object(None, "trial", json!({"spec": spec}))];
    let known = |status: &str, reason: &str| {
        let message = format!("{reason}, as n2 says");
        let time = "2026-01-01T00:00:00Z";
        json!({"type": "CountriesKnown", "status": status, "reason": reason, "message": message, "lastTransitionTime": time})
    };
    let tell = |before: &mut Snapshot, n2: Value| {
        let of = |flows, condition| {
            let observed = json!({"flows": flows, "refused": flows});
            let policy = json!({"name": "trial", "generation": 1, "pods": 1, "observed": observed});
            json!({"policies": [policy], "conditions": [condition]})
        };
        let n1 = report("n1", "True", of(5, known("True", "DatabaseRead")));
        before.egress_nodes = vec![n1, report("n2", "True", of(7, n2))];
        changes(before, &view(before), now())
    };
    let first = tell(&mut before, known("False", "NoDatabase"));
    let countries = condition(&first, "EgressPolicy", "CountriesKnown");
    assert_eq!((&countries["status"], &countries["reason"]), (&"False".into(), &"NoDatabase".into()));
    assert_eq!(
        countries["message"],
        "1 of 2 nodes have read their database of countries; not n2: NoDatabase, as n2 says"
    );
    let effective = condition(&first, "EgressPolicy", "Effective");
    assert_eq!((&effective["status"], &effective["reason"]), (&"False".into(), &"Observing".into()));
    let change = first.iter().find(|change| change.target.resource.kind == "EgressPolicy").unwrap();
    assert_eq!(change.status["observed"], json!({"flows": 12, "refused": 12}), "{}", change.status);
    let second = tell(&mut before, known("True", "DatabaseRead"));
    assert_eq!(condition(&second, "EgressPolicy", "CountriesKnown")["status"], "True");

    before.policies = vec![object(None, "trial", json!({"spec": {"precedence": 1, "action": "Deny"}}))];
    let third = changes(&before, &view(&before), now());
    let change = third.iter().find(|change| change.target.resource.kind == "EgressPolicy").unwrap();
    assert!(change.status.get("observed").is_none(), "it decides: {}", change.status);
    assert_eq!(condition(&third, "EgressPolicy", "Effective")["status"], "True");
}
