use super::*;
use crate::files::state_of;
use std::fmt::Write;

/// A pod of `shop` on node n1, which holds slices of two allocations, and a policy.
fn state(policy: &str, conditions: &str, fill: u32) -> State {
    let mut objects = format!(
        "
{{apiVersion: v1, kind: Node, metadata: {{name: n1, labels: {{zone: a}}}}}}
---
{{apiVersion: v1, kind: Pod, metadata: {{name: web, namespace: shop}}, spec: {{nodeName: n1, containers: []}},
 status: {{podIPs: [{{ip: 10.244.1.7}}]}}}}
---
{{apiVersion: aegis.dev/v1alpha1, kind: EgressNode, metadata: {{name: n1}}, spec: {{}}, status: {{tunnelAddress: 192.0.2.1, version: x,
 addresses: [], bindings: [],
 demand: [{{allocation: {{namespace: shop, name: main}}, slices: 8, fillPercent: {fill}, refused: 0, reason: x}}],
 conditions: [{conditions}]}}}}
---
{{apiVersion: aegis.dev/v1alpha1, kind: EgressPolicy, metadata: {{name: p}}, spec: {policy}}}
"
    );
    for (number, name) in ["main", "spare"].iter().enumerate() {
        let address = format!("203.0.113.{number}");
        write!(
            objects,
            "---
{{apiVersion: aegis.dev/v1alpha1, kind: EgressAddress, metadata: {{name: {address}}}, spec: {{address: {address}, prefix: x,
 allocationRef: {{namespace: shop, name: {name}}}, epoch: 1, holdings: [{{first: 4, last: 11, node: n1, epoch: 1, state: Held}}]}}}}
"
        )
        .unwrap();
    }
    state_of(&objects)
}

fn ask(state: &State) -> Trace {
    let packet = Packet { destination: "198.51.100.7".parse().unwrap(), protocol: 6, port: Some(443) };
    let found = Found { packets: vec![packet], ..Found::default() };
    let told = traces(state, &Subject::Pod("shop".into(), "web".into()), &found).unwrap();
    told.traces.into_iter().next().unwrap()
}

#[test]
fn a_policy_with_countries_refuses_where_the_node_has_no_database() {
    let policy = "{precedence: 1, action: Default, match: {destination: {countries: [DE]}}}";
    let condition = |status: &str, reason: &str, message: &str| {
        format!(
            "{{type: CountriesKnown, status: '{status}', reason: {reason}, message: {message}, lastTransitionTime: '2026-01-01T00:00:00Z'}}"
        )
    };
    for conditions in [String::new(), condition("False", "NoDatabase", "none")] {
        let told = ask(&state(policy, &conditions, 0));
        assert_eq!(told.outcome, Outcome::Refused, "{}", told.message);
        assert!(
            told.message.contains("policy p: it is refused, since node n1 has no database"),
            "{}",
            told.message
        );
    }
    let told = ask(&state(policy, &condition("True", "DatabaseRead", "built"), 0));
    assert_eq!((told.outcome, told.by), (Outcome::NodeAddress, None));
    let told = ask(&state(policy, &condition("False", "DatabaseUnreadable", "torn"), 0));
    assert!(told.notes.iter().any(|note| note == "countries on node n1: torn"), "{:?}", told.notes);
}

#[test]
fn the_secondary_is_named_where_it_may_be_left_from() {
    let policy = |egress: &str| {
        format!("{{precedence: 1, match: {{destination: {{cidrs: [0.0.0.0/0]}}}}, egress: {egress}}}")
    };
    for (egress, fill, said) in [
        ("{primary: main}", 99, "policy p: it leaves from shop/main"),
        (
            "{primary: main, secondary: spare}",
            10,
            "policy p: it leaves from shop/main, or from shop/spare where no port of shop/main is free towards the destination",
        ),
        (
            "{primary: main, secondary: spare}",
            99,
            "policy p: it leaves from shop/main, of which node n1 has hardly a port left towards the busiest origin: where none is free, from shop/spare",
        ),
        (
            "{primary: gone, secondary: spare}",
            0,
            "policy p: it leaves from shop/spare, since there is no EgressAllocation shop/gone: create it, or name another",
        ),
        (
            "{primary: main, secondary: gone}",
            0,
            "policy p: it leaves from shop/main; nothing stands in for it, since there is no EgressAllocation shop/gone: create it, or name another",
        ),
    ] {
        let told = ask(&state(&policy(egress), "", fill));
        assert_eq!(told.message, said);
        let table = told.table();
        let spare =
            table.contains("   else from shop/spare:\n   203.0.113.1: 1024-3071 (8 slices of the node");
        assert_eq!(spare, egress == "{primary: main, secondary: spare}", "{table}");
    }
}
