use super::*;
use crate::files::{parse, state_of};

/// A pod of `shop`, which has addresses of two allocations.
const CLUSTER: &str = "
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {team: web}}}
---
{apiVersion: v1, kind: Node, metadata: {name: n1, uid: n}, spec: {},
 status: {addresses: [{type: InternalIP, address: 192.0.2.1}], conditions: [{type: Ready, status: 'True'}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop}, spec: {nodeName: n1, containers: []},
 status: {podIPs: [{ip: 10.244.1.7}]}}
---
{apiVersion: aegis.dev/v1alpha1, kind: AegisPrefix, metadata: {name: leased, uid: p, creationTimestamp: '2026-01-01T00:00:00Z'},
 spec: {cidr: 203.0.113.0/28, account: shop}}
---
{apiVersion: aegis.dev/v1alpha1, kind: EgressAllocation, metadata: {name: main, namespace: shop, uid: a, creationTimestamp: '2026-01-01T00:00:00Z'},
 spec: {prefixes: [leased]}}
---
{apiVersion: aegis.dev/v1alpha1, kind: EgressAllocation, metadata: {name: spare, namespace: shop, uid: b, creationTimestamp: '2026-01-02T00:00:00Z'},
 spec: {prefixes: [leased]}}
---
{apiVersion: aegis.dev/v1alpha1, kind: EgressNode, metadata: {name: n1}, spec: {}, status: {tunnelAddress: 192.0.2.1, version: x,
 addresses: [], bindings: [],
 conditions: [{type: Ready, status: 'True', reason: Ready, message: '', lastTransitionTime: '2026-01-01T00:00:00Z'}]}}
---
{apiVersion: aegis.dev/v1alpha1, kind: EgressPolicy, metadata: {name: regulated},
 spec: {precedence: 1, action: Deny, match: {identity: {namespaceSelector: {matchLabels: {tier: regulated}}}, destination: {cidrs: [198.51.100.0/24]}}}}
---
{apiVersion: aegis.dev/v1alpha1, kind: EgressPolicy, metadata: {name: rest},
 spec: {precedence: 9, match: {destination: {cidrs: [0.0.0.0/0]}}, egress: {primary: main}}}
";

fn planned(files: &str, delete: bool) -> Changes {
    let mut before = state_of(CLUSTER);
    before.now = 1_770_000_000;
    let mut found = Vec::new();
    parse("files", files, &mut found).unwrap();
    let Overlay { state: after, objects, notes } = overlay(&before, &found, "shop", delete).unwrap();
    changes(&before, &after, objects, notes).unwrap()
}

fn decisions(changes: &Changes) -> Vec<(String, &str, &str)> {
    changes.decisions.iter().map(|it| (it.whither(), it.before.as_str(), it.after.as_str())).collect()
}

#[test]
fn labels_of_a_namespace_change_what_policies_do_with_its_pods() {
    let label = |labels: &str| {
        format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: shop, labels: {labels}}}}}")
    };
    let regulated = planned(&label("{team: web, tier: regulated}"), false);
    assert_eq!(
        decisions(&regulated),
        [("198.51.100.0/24".to_owned(), "shop/main (policy rest)", "refused (policy regulated)")]
    );
    assert!(decisions(&planned(&label("{team: other}"), false)).is_empty());
}

#[test]
fn another_secondary_is_another_way_to_leave() {
    let policy = "
{apiVersion: aegis.dev/v1alpha1, kind: EgressPolicy, metadata: {name: rest},
 spec: {precedence: 9, match: {destination: {cidrs: [0.0.0.0/0]}}, egress: {primary: main, secondary: spare}}}
";
    let found = planned(policy, false);
    let (before, after) = ("shop/main (policy rest)", "shop/main, else shop/spare (policy rest)");
    let told = decisions(&found);
    assert!(told.iter().all(|it| (it.1, it.2) == (before, after)) && !told.is_empty(), "{told:?}");
}

#[test]
fn what_only_agents_know_the_addresses_of_is_said_of_what_changes() {
    let of = |name: &str, destination: &str| {
        format!(
            "{{apiVersion: aegis.dev/v1alpha1, kind: EgressPolicy, metadata: {{name: {name}}}, spec: {{precedence: 20, action: Deny, match: {{destination: {destination}}}}}}}"
        )
    };
    let application = "{apiVersion: aegis.dev/v1alpha1, kind: EgressApplication, metadata: {name: crm}, spec: {endpoints: [{hosts: [crm.example]}]}}";
    for (files, rule) in [
        (of("hosts", "{hosts: [partner.example]}"), Some("EgressPolicy hosts names hosts")),
        (of("far", "{countries: [DE]}"), Some("EgressPolicy far names countries")),
        (of("crm", "{applications: [crm]}") + "\n---\n" + application, Some("EgressPolicy crm names hosts")),
        (of("plain", "{cidrs: [192.0.2.0/24]}"), None),
    ] {
        let notes = planned(&files, false).notes;
        let told: Vec<&String> = notes.iter().filter(|note| note.contains("only the agents know")).collect();
        assert_eq!(told.len(), usize::from(rule.is_some()), "{notes:?}");
        assert!(told.iter().all(|note| rule.is_some_and(|rule| note.starts_with(rule))), "{told:?}");
    }
    // The node has no database, so this one refuses all that no policy before it decides.
    let first = of("far", "{countries: [DE]}").replace("precedence: 20", "precedence: 0");
    let told = planned(&first, false);
    assert!(decisions(&told).iter().any(|it| it.2 == "refused (policy far)"), "{:?}", told.decisions);
}

#[test]
fn a_pod_in_a_file_is_left_out_and_not_said_to_change_nothing() {
    let told = planned("{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop}}", false);
    assert_eq!(told.notes[0], "files: objects of kind Pod are not planned with, and are left out");
}
