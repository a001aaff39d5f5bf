//! Tests of the translation.

use super::testing::object;
use super::*;
use crate::agents::AgentPod;
use aegis_core::egress::Egress;
use aegis_core::model::{AddressRequest, Delegate, Holding, State};
use aegis_core::slice::SliceSet;
use serde_json::{Value, json};
use std::sync::Arc;

fn prefix(name: &str, cidr: &str) -> Snapshot {
    let spec =
        json!({"spec": {"cidr": cidr, "account": "shop", "reserved": ["203.0.113.1", "203.0.113.4/30"]}});
    Snapshot { prefixes: vec![object(None, name, spec)], ..Snapshot::default() }
}

fn allocation(spec: Value) -> Snapshot {
    let spec = json!({"spec": spec});
    Snapshot {
        allocations: vec![object(Some("shop"), "partner", spec)],
        ..prefix("leased", "203.0.113.0/28")
    }
}

fn address(name: &str, allocation: &str, holdings: Value) -> Guarded<aegis_crds::EgressAddress> {
    let spec = json!({
        "address": name, "prefix": "leased", "allocationRef": {"namespace": "shop", "name": allocation}, "epoch": 9,
        "holdings": holdings,
    });
    object(None, name, json!({"spec": spec}))
}

fn see(snapshot: &Snapshot) -> World {
    translate(snapshot, &[], 1_000, 120)
}

fn messages(world: &World) -> Vec<&str> {
    world.problems.iter().map(|problem| problem.message.as_str()).collect()
}

#[test]
fn translates_prefix_and_allocation() {
    let world = see(&allocation(json!({
        "prefixes": ["leased"],
        "addresses": {"ipv4": 2},
        "sites": [{"name": "east", "nodeSelector": {"zone": "east"}}],
        "ports": {"first": 2048, "last": 4095, "perNode": {"min": 2, "max": 4}},
    })));
    assert!(world.problems.is_empty(), "{:?}", world.problems);
    let prefix = &world.inputs.prefixes[0];
    assert_eq!(prefix.created, 1_767_225_600);
    assert_eq!(prefix.reserved, ["203.0.113.1/32".parse().unwrap(), "203.0.113.4/30".parse().unwrap()]);
    let allocation = &world.inputs.allocations[0];
    assert_eq!(allocation.request, AddressRequest::Count(2));
    assert_eq!(allocation.slices, SliceSet::range(8, 15));
    assert_eq!((allocation.per_node_min, allocation.per_node_max), (2, 4));
    assert_eq!(
        (allocation.sites["east"].selector["zone"].as_str(), allocation.sites["east"].weight),
        ("east", 1)
    );
    assert!(!allocation.deleting && !prefix.deleting);
    assert_eq!((world.inputs.now, world.inputs.quarantine), (1_000, 120));
}

#[test]
fn of_ipv6_a_number_or_a_list_is_translated() {
    let request = |addresses| {
        let world = see(&allocation(json!({"prefixes": ["leased"], "addresses": addresses})));
        let allocation = &world.inputs.allocations[0];
        (allocation.request.clone(), allocation.ipv6)
    };
    assert_eq!(request(json!({"ipv4": 2, "ipv6": 1})), (AddressRequest::Count(2), 1));
    assert_eq!(request(json!({"ipv6": 3})), (AddressRequest::Count(0), 3));
    let listed = ["203.0.113.2", "2001:db8:1:2::/64", "2001:db8::7"];
    let explicit = listed.map(|it| it.parse().unwrap()).to_vec();
    assert_eq!(request(json!({"explicit": listed})), (AddressRequest::Explicit(explicit), 0));
    let world = see(&prefix("six", "2001:db8::/48"));
    assert_eq!(world.inputs.prefixes[0].cidr, "2001:db8::/48".parse().unwrap());
    let world = see(&prefix("one", "2001:db8::7/128"));
    assert_eq!(world.inputs.prefixes[0].cidr, "2001:db8::7/128".parse().unwrap());
}

#[test]
fn one_ipv6_address_is_an_address_under_a_name_of_its_own() {
    let held = json!([{"first": 4, "last": 11, "node": "n1", "epoch": 8, "state": "Held"}]);
    let spec = json!({"spec": {
        "address": "2001:db8::7", "prefix": "leased", "epoch": 9, "holdings": held,
        "allocationRef": {"namespace": "shop", "name": "partner"},
    }});
    let of = |name: &str| {
        let addresses = vec![object(None, name, spec.clone())];
        see(&Snapshot { addresses, ..allocation(json!({"prefixes": ["leased"]})) })
    };
    let name = "2001-0db8-0000-0000-0000-0000-0000-0007";
    let world = of(name);
    let single: Egress = "2001:db8::7".parse().unwrap();
    assert_eq!((world.observed[0].address, single.object_name().as_str()), (single, name));
    assert_eq!(super::spec(&world.observed[0]).address, "2001:db8::7");
    // Not under that of its /64.
    assert_eq!(of("2001-db8").unreadable, ["2001:db8::/64".parse::<Egress>().unwrap()]);
}

#[test]
fn a_64_is_an_address_under_a_name_of_its_own() {
    let held = json!([{"first": 4, "last": 4, "node": "n1", "epoch": 8, "state": "Held"}]);
    let spec = json!({"spec": {
        "address": "2001:db8:0:1::/64", "prefix": "leased", "epoch": 9, "holdings": held,
        "allocationRef": {"namespace": "shop", "name": "partner"},
    }});
    let of = |name: &str| {
        let addresses = vec![object(None, name, spec.clone())];
        see(&Snapshot { addresses, ..allocation(json!({"prefixes": ["leased"]})) })
    };
    let world = of("2001-db8-0-1");
    let network: Egress = "2001:db8:0:1::/64".parse().unwrap();
    assert_eq!(world.observed[0].address, network);
    assert_eq!(super::spec(&world.observed[0]).address, "2001:db8:0:1::/64");
    // One that does not fit its name is nobody's.
    let world = of("2001-db8-0-2");
    assert_eq!(world.unreadable, ["2001:db8:0:2::/64".parse::<Egress>().unwrap()]);
}

#[test]
fn wrong_objects_become_problems_that_name_the_field() {
    let cases = [
        (prefix("leased", "2001:db8::/65"), "spec.cidr"),
        (prefix("leased", "2001:db8::6/127"), "spec.cidr"),
        (prefix("leased", "203.0.113.1/24"), "spec.cidr"),
        (prefix("leased", "nonsense"), "spec.cidr"),
        (allocation(json!({"prefixes": ["leased"], "ports": {"first": 1000}})), "spec.ports"),
        (allocation(json!({"prefixes": ["leased"], "ports": {"first": 512, "last": 1023}})), "spec.ports"),
        (allocation(json!({"prefixes": ["leased"], "ports": {"first": 4096, "last": 2047}})), "spec.ports"),
        (allocation(json!({"prefixes": ["leased"], "ports": {"last": 65536}})), "spec.ports"),
        (
            allocation(json!({"prefixes": ["leased"], "ports": {"perNode": {"min": 3, "max": 2}}})),
            "spec.ports.perNode",
        ),
        (
            allocation(json!({"prefixes": ["leased"], "addresses": {"explicit": ["203.0.113.2", "x"]}})),
            "spec.addresses.explicit[1]",
        ),
        (allocation(json!({"prefixes": "leased"})), "cannot be read"),
    ];
    for (snapshot, field) in cases {
        let world = see(&snapshot);
        assert_eq!(world.problems.len(), 1, "{field}: {:?}", world.problems);
        assert!(world.problems[0].message.contains(field), "{}", world.problems[0].message);
        assert_eq!(world.problems[0].generation, Some(3));
    }
}

#[test]
fn wrong_bindings_become_problems() {
    let selector = |expression: Value| json!({"podSelector": {"matchExpressions": [expression]}});
    let all = json!({"allPods": true});
    let cases = [
        (all.clone(), json!({"cidrs": ["0.0.0.0/0", "203.0.113.1/24"]}), "spec.zone.cidrs[1]"),
        (all.clone(), json!({"cidrs": ["::/0", "2001:db8::/32", "2001:db8::1/64"]}), "spec.zone.cidrs[2]"),
        (
            all,
            json!({"cidrs": ["0.0.0.0/0"], "ports": [{"port": 9, "endPort": 8}]}),
            "spec.zone.ports[0].endPort",
        ),
        (selector(json!({"key": "a", "operator": "In"})), json!({"cidrs": []}), "matchExpressions[0].values"),
        (
            selector(json!({"key": "a", "operator": "Like"})),
            json!({"cidrs": []}),
            "matchExpressions[0].operator",
        ),
    ];
    for (workloads, zone, field) in cases {
        let spec = json!({"spec": {"allocationRef": {"name": "x"}, "workloads": workloads, "zone": zone}});
        let bindings = vec![object(Some("shop"), "bound", spec)];
        let world = see(&Snapshot { bindings, ..Snapshot::default() });
        assert!(messages(&world).concat().contains(field), "{field}: {:?}", world.problems);
    }
}

#[test]
fn addresses_go_there_and_back() {
    let holdings = json!([
        {"first": 4, "last": 11, "node": "n1", "epoch": 8, "state": "Held"},
        {"first": 12, "last": 12, "node": "n1", "epoch": 9, "state": "Draining"},
        {"first": 200, "last": 255, "node": "n2", "epoch": 9, "state": "Quarantined", "until": "2026-01-01T00:02:00Z"},
    ]);
    let addresses = vec![address("203.0.113.2", "partner", holdings)];
    let snapshot = Snapshot { addresses, ..allocation(json!({"prefixes": ["leased"]})) };
    let world = see(&snapshot);
    assert_eq!(world.observed, world.inputs.addresses);
    let model = &world.observed[0];
    assert_eq!(model.holdings[2].state, State::Quarantined { until: 1_767_225_720 });
    assert_eq!(spec(model), snapshot.addresses[0].0.as_ref().unwrap().spec);
}

#[test]
fn addresses_of_an_unreadable_allocation_are_frozen_and_kept_from_others() {
    let held = json!([{"first": 4, "last": 11, "node": "n1", "epoch": 8, "state": "Held"}]);
    let addresses =
        vec![address("203.0.113.2", "partner", held.clone()), address("203.0.113.3", "other", held)];
    let world = see(&Snapshot { addresses, ..allocation(json!({"prefixes": 5})) });
    assert_eq!(world.frozen.iter().map(|it| it.address.to_string()).collect::<Vec<_>>(), ["203.0.113.2"]);
    assert_eq!(world.inputs.addresses.len(), 1, "the other's stays in the plan");
    assert!(world.inputs.withheld.contains_key(&"203.0.113.2".parse().unwrap()));
}

#[test]
fn unreadable_addresses_are_kept_from_everybody() {
    let broken = [
        ("spec.address", address("203.0.113.3", "partner", json!([]))),
        (
            "spec.holdings[0]",
            address(
                "203.0.113.4",
                "partner",
                json!([{"first": 3, "last": 4, "node": "n", "epoch": 1, "state": "Held"}]),
            ),
        ),
        (
            "spec.holdings[0]",
            address(
                "203.0.113.4",
                "partner",
                json!([{"first": 4, "last": 256, "node": "n", "epoch": 1, "state": "Held"}]),
            ),
        ),
        (
            "spec.holdings[1]",
            address(
                "203.0.113.4",
                "partner",
                json!([
                    {"first": 4, "last": 8, "node": "n1", "epoch": 1, "state": "Held"},
                    {"first": 8, "last": 9, "node": "n2", "epoch": 1, "state": "Held"},
                ]),
            ),
        ),
        (
            "until",
            address(
                "203.0.113.4",
                "partner",
                json!([{"first": 4, "last": 4, "node": "n", "epoch": 1, "state": "Quarantined"}]),
            ),
        ),
        ("cannot be read", address("203.0.113.4", "partner", json!("none"))),
    ];
    for (index, (message, mut object)) in broken.into_iter().enumerate() {
        if index == 0 {
            let inner = Arc::get_mut(&mut object).unwrap().0.as_mut().unwrap();
            inner.metadata.name = Some("203.0.113.4".into());
        }
        let snapshot = Snapshot { addresses: vec![object], ..allocation(json!({"prefixes": ["leased"]})) };
        let world = see(&snapshot);
        assert!(messages(&world).concat().contains(message), "{message}: {:?}", world.problems);
        assert!(world.observed.is_empty() && world.frozen.is_empty());
        assert_eq!(world.unreadable, ["203.0.113.4".parse::<Egress>().unwrap()]);
        assert!(world.inputs.withheld.contains_key(&"203.0.113.4".parse().unwrap()));
    }
}

#[test]
fn lost_addresses_are_planned_with_but_not_observed() {
    let lost = Address {
        address: "203.0.113.9".parse().unwrap(),
        prefix: "leased".into(),
        allocation: AllocationName { account: "shop".into(), name: "partner".into() },
        epoch: 4,
        holdings: vec![Holding { first: 4, last: 4, node: "n1".into(), epoch: 4, state: State::Held }],
        fence: None,
    };
    let snapshot = allocation(json!({"prefixes": ["leased"]}));
    let world = translate(&snapshot, std::slice::from_ref(&lost), 0, 120);
    assert!(world.observed.is_empty());
    assert_eq!(world.inputs.addresses, std::slice::from_ref(&lost));
    // Back again, it is not there twice.
    let back = Snapshot { addresses: vec![address("203.0.113.9", "partner", json!([]))], ..snapshot };
    assert_eq!(translate(&back, &[lost], 0, 120).inputs.addresses.len(), 1);
}

fn node(body: Value) -> Guarded<k8s_openapi::api::core::v1::Node> {
    object(None, "n1", body)
}

fn report(status: Value) -> Guarded<crate::report::Report> {
    object(None, "n1", json!({"spec": {}, "status": status}))
}

fn ready(status: &str) -> Value {
    let condition = json!({
        "type": "Ready", "status": status, "reason": "X", "message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z",
    });
    json!([condition])
}

#[test]
fn a_node_whose_agent_has_no_pod_is_not_ready_whatever_it_reported() {
    let said = json!({"tunnelAddress": "192.0.2.1", "conditions": ready("True")});
    let leaving = json!({"tunnelAddress": "192.0.2.1", "conditions": ready("True"), "leaving": true});
    let agent = |node: &str, pod| Some([(node.to_owned(), pod)].into());
    let cases = [
        (None, &said, (true, false)),
        (agent("n1", AgentPod::Ready), &said, (true, false)),
        (agent("n1", AgentPod::Ending), &said, (false, false)),
        (agent("n2", AgentPod::Ready), &said, (false, false)),
        (None, &leaving, (false, true)),
        (agent("n1", AgentPod::Ending), &leaving, (false, true)),
        // Until the next agent has reported.
        (agent("n1", AgentPod::Ready), &leaving, (false, true)),
        // Ended before the slices were empty: nobody would tell that they are.
        (agent("n2", AgentPod::Ready), &leaving, (false, false)),
    ];
    for (agents, said, expected) in cases {
        let snapshot = Snapshot {
            nodes: vec![node(json!({}))],
            egress_nodes: vec![report(said.clone())],
            agents,
            ..Snapshot::default()
        };
        let node = &see(&snapshot).inputs.nodes[0];
        assert_eq!((node.ready, node.leaving), expected, "{:?} {said}", snapshot.agents);
        let kube = snapshot.nodes[0].0.as_ref().unwrap();
        let confirmed = super::node::confirmed(kube, &snapshot, &mut Vec::new()).unwrap();
        assert_eq!((confirmed.ready, confirmed.leaving), (false, expected.1));
    }
}

#[test]
fn node_is_ready_only_if_agent_and_cluster_say_so() {
    let good = json!({"tunnelAddress": "192.0.2.1", "conditions": ready("True")});
    let kube = |status: &str| json!({"status": {"conditions": [{"type": "Ready", "status": status}]}});
    let cases = [
        (json!({}), Some(good.clone()), true),
        (kube("True"), Some(good.clone()), true),
        (kube("Unknown"), Some(good.clone()), false),
        (kube("False"), Some(good.clone()), false),
        (json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}), Some(good), false),
        (json!({}), None, false),
        (json!({}), Some(json!({"tunnelAddress": "192.0.2.1", "conditions": ready("False")})), false),
        (json!({}), Some(json!({"conditions": ready("True")})), false),
        (json!({}), Some(json!({"tunnelAddress": "192.0.2.1"})), false),
        (json!({}), Some(json!({"demand": 5})), false),
    ];
    for (index, (kube, agent, expected)) in cases.into_iter().enumerate() {
        let egress_nodes = agent.map(report).into_iter().collect();
        let world = see(&Snapshot { nodes: vec![node(kube)], egress_nodes, ..Snapshot::default() });
        assert_eq!(world.inputs.nodes.len(), 1, "case {index}: the node is there in any case");
        assert_eq!(world.inputs.nodes[0].ready, expected, "case {index}");
    }
}

#[test]
fn node_is_gone_only_without_node_object_or_with_the_taint() {
    let good = json!({"tunnelAddress": "192.0.2.1", "conditions": ready("True")});
    let taint = |key: &str| json!({"spec": {"taints": [{"key": key, "effect": "NoExecute"}]}});
    let gone = |nodes: Vec<_>| {
        see(&Snapshot { nodes, egress_nodes: vec![report(good.clone())], ..Snapshot::default() })
            .inputs
            .nodes
            .is_empty()
    };
    assert!(gone(vec![]));
    assert!(gone(vec![node(taint("node.kubernetes.io/out-of-service"))]));
    assert!(!gone(vec![node(taint("node.kubernetes.io/unreachable"))]));
}

#[test]
fn report_is_translated() {
    let status = json!({
        "tunnelAddress": "192.0.2.1", "conditions": ready("True"),
        "demand": [{"allocation": {"namespace": "shop", "name": "partner"}, "slices": 9}],
        "addresses": [
            {"address": "203.0.113.2", "epoch": 5, "drained": [{"first": 4, "last": 6}, {"first": 250, "last": 999}]},
            {"address": "nonsense", "epoch": 5},
        ],
    });
    let world = see(&Snapshot {
        nodes: vec![node(json!({}))],
        egress_nodes: vec![report(status)],
        ..Snapshot::default()
    });
    let node = &world.inputs.nodes[0];
    assert_eq!(node.demand.values().copied().collect::<Vec<_>>(), [9]);
    let programmed = &node.programmed[&"203.0.113.2".parse::<Egress>().unwrap()];
    assert_eq!(programmed.epoch, 5);
    assert_eq!(programmed.drained, SliceSet::range(4, 6).union(SliceSet::range(250, 255)));
    assert!(messages(&world).concat().contains("nonsense"));
}

#[test]
fn a_report_that_says_no_more_than_what_stands_is_left_out() {
    let drained = json!([{"first": 4, "last": 4}]);
    let status = json!({
        "tunnelAddress": "192.0.2.1", "conditions": ready("True"),
        "addresses": [
            {"address": "203.0.113.1", "epoch": 9},
            {"address": "203.0.113.2", "epoch": 8},
            {"address": "203.0.113.3", "epoch": 10},
            {"address": "203.0.113.4", "epoch": 9, "fenced": true},
            {"address": "203.0.113.5", "epoch": 9, "drained": drained},
            {"address": "203.0.113.6", "epoch": 9},
        ],
    });
    let standing = (1..=5).map(|last| address(&format!("203.0.113.{last}"), "partner", json!([])));
    let world = see(&Snapshot {
        nodes: vec![node(json!({}))],
        egress_nodes: vec![report(status)],
        addresses: standing.collect(),
        ..Snapshot::default()
    });
    assert_eq!(world.observed.iter().map(|it| it.epoch).collect::<Vec<_>>(), [9; 5]);
    let kept = world.inputs.nodes[0].programmed.keys();
    assert_eq!(kept.map(|it| it.v4().unwrap().octets()[3]).collect::<Vec<_>>(), [3, 4, 5, 6]);
}

/// An address that n1 holds, and a copy of the nodes that lacks n1.
fn held_by_a_stranger() -> Snapshot {
    let held = json!([{"first": 4, "last": 11, "node": "n1", "epoch": 8, "state": "Held"}]);
    let good = json!({"tunnelAddress": "192.0.2.1", "conditions": ready("True")});
    Snapshot {
        addresses: vec![address("203.0.113.2", "partner", held)],
        egress_nodes: vec![report(good)],
        ..allocation(json!({"prefixes": ["leased"]}))
    }
}

fn confirmed(presence: Presence) -> (World, aegis_core::Plan) {
    let snapshot = held_by_a_stranger();
    let mut world = see(&snapshot);
    assert_eq!(world.absent(), ["n1".to_owned()].into());
    world.confirm(&[("n1".to_owned(), presence)].into(), &snapshot);
    let plan = aegis_core::plan(&world.inputs);
    aegis_core::audit(&world.inputs, &plan).unwrap();
    (world, plan)
}

#[test]
fn nothing_is_taken_from_a_node_before_the_api_server_says_that_it_is_gone() {
    let there = |body| Presence::There(Box::new(node(body).0.as_ref().unwrap().clone()));
    let (world, plan) = confirmed(there(json!({})));
    assert_eq!(plan.addresses, world.observed, "the copy was behind");
    assert!(world.absent().is_empty() && !world.inputs.nodes[0].ready);
    let (world, plan) = confirmed(Presence::Unknown);
    assert_eq!(plan.addresses, world.observed, "nobody knows");
    for gone in [
        Presence::Gone,
        there(
            json!({"spec": {"taints": [{"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute"}]}}),
        ),
    ] {
        let (_, plan) = confirmed(gone);
        assert!(matches!(plan.addresses[0].holdings[0].state, State::Quarantined { .. }));
    }
}

#[test]
fn an_unreadable_object_that_is_being_deleted_holds_nothing_up() {
    let deleting = json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["aegis.dev/in-use"]});
    let held = json!([{"first": 4, "last": 11, "node": "n1", "epoch": 8, "state": "Held"}]);
    let mut snapshot = Snapshot {
        addresses: vec![address("203.0.113.2", "partner", held)],
        nodes: vec![node(json!({}))],
        ..prefix("leased", "203.0.113.0/28")
    };
    let broken = json!({"spec": {"prefixes": 5}, "metadata": deleting});
    snapshot.allocations = vec![object(Some("shop"), "partner", broken)];
    let drains = |snapshot: &Snapshot| {
        let world = see(snapshot);
        assert_eq!(world.problems.len(), 1, "{:?}", world.problems);
        let plan = aegis_core::plan(&world.inputs);
        aegis_core::audit(&world.inputs, &plan).unwrap();
        plan.addresses[0].holdings[0].state == State::Draining
    };
    assert!(drains(&snapshot));
    let broken = json!({"spec": {"cidr": 5}, "metadata": deleting});
    snapshot.prefixes = vec![object(None, "leased", broken)];
    let spec =
        json!({"spec": {"prefixes": ["leased"]}, "metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
    snapshot.allocations = vec![object(Some("shop"), "partner", spec)];
    assert!(drains(&snapshot));
}

#[test]
fn addresses_and_ranges_of_a_node_are_translated() {
    let body = json!({
        "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "2001:db8::/64"]},
        "status": {"addresses": [
            {"type": "Hostname", "address": "n1"}, {"type": "InternalIP", "address": "192.0.2.1"},
            {"type": "ExternalIP", "address": "203.0.113.1"}, {"type": "InternalIP", "address": "2001:db8::1"},
        ]},
    });
    let world = see(&Snapshot { nodes: vec![node(body)], ..Snapshot::default() });
    let node = &world.inputs.nodes[0];
    assert_eq!(
        node.addresses,
        ["192.0.2.1", "203.0.113.1", "2001:db8::1"].map(|it| it.parse::<std::net::IpAddr>().unwrap())
    );
    assert_eq!(node.pod_ranges, ["10.1.0.0/24", "2001:db8::/64"].map(|it| it.parse().unwrap()));
}

fn delegated(delegation: Value) -> World {
    let spec = json!({"spec": {"cidr": "203.0.113.0/28", "account": "shop", "delegations": [delegation]}});
    let labels = json!({"metadata": {"labels": {"team": "money"}}});
    see(&Snapshot {
        prefixes: vec![object(None, "leased", spec)],
        allocations: vec![object(Some("bank"), "partner", json!({"spec": {"prefixes": ["leased"]}}))],
        namespaces: vec![object(None, "bank", labels), object(None, "no-account", json!({}))],
        ..Snapshot::default()
    })
}

#[test]
fn delegations_and_labels_of_namespaces_are_translated() {
    let world = delegated(json!({"name": "d", "account": "bank", "maxAddresses": 2}));
    assert!(world.problems.is_empty(), "{:?}", world.problems);
    assert_eq!(world.inputs.namespaces["bank"]["team"], "money");
    assert_eq!(world.inputs.namespaces.len(), 1, "others are nobody's business");
    let [delegation] = &world.inputs.prefixes[0].delegations[..] else {
        panic!("{:?}", world.inputs.prefixes)
    };
    assert_eq!((delegation.name.as_str(), delegation.max), ("d", 2));
    assert_eq!(delegation.to, Delegate::Account("bank".into()));
    let expressions = json!([{"key": "team", "operator": "In", "values": ["money"]}, {"key": "off", "operator": "DoesNotExist"}]);
    let world = delegated(
        json!({"name": "d", "namespaceSelector": {"matchExpressions": expressions}, "maxAddresses": 2}),
    );
    let Delegate::Namespaces(selector) = &world.inputs.prefixes[0].delegations[0].to else { panic!() };
    assert!(selector.matches(&world.inputs.namespaces["bank"]));
    assert!(!selector.matches(&[("off".to_owned(), String::new())].into()));
}

#[test]
fn wrong_delegations_become_problems() {
    let selector = |operator: &str| json!({"matchExpressions": [{"key": "team", "operator": operator}]});
    for (delegation, message) in [
        (json!({"name": "d", "maxAddresses": 2}), "spec.delegations[\"d\"]: must have either"),
        (
            json!({"name": "d", "account": "a", "namespaceSelector": selector("Exists"), "maxAddresses": 2}),
            "spec.delegations[\"d\"]: must have either",
        ),
        (
            json!({"name": "d", "namespaceSelector": selector("Gt"), "maxAddresses": 2}),
            "spec.delegations[\"d\"]: namespaceSelector.matchExpressions.operator: \"Gt\" is not In",
        ),
    ] {
        let world = delegated(delegation);
        let found = messages(&world);
        assert!(matches!(found[..], [found] if found.contains(message)), "{found:?}");
    }
}
