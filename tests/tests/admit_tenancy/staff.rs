//! What those try who lend prefixes, who own one, and the agent of a node.

use crate::attempts::{Attempt, address, attempt, greedy, kind, prefix};
use crate::people::{GROUP, allocation, allocations, bindings, prefix_patch};
use aegis_tests::apiserver::NAMESPACE;
use serde_json::{Value, json};

/// The owner of a prefix may read it, and no other; it does not change it.
pub fn owner() -> Vec<Attempt> {
    let all = format!("{GROUP}/aegisprefixes");
    vec![
        attempt("shop", "GET", &all, Value::Null, "cannot list resource \"aegisprefixes\""),
        attempt("shop", "GET", format!("{all}/own"), Value::Null, "cannot get resource \"aegisprefixes\""),
        attempt(
            "shop",
            "PATCH",
            format!("{all}/leased"),
            prefix_patch(json!([])),
            "cannot patch resource \"aegisprefixes\"",
        ),
        attempt(
            "shop",
            "DELETE",
            format!("{all}/leased"),
            Value::Null,
            "cannot delete resource \"aegisprefixes\"",
        ),
    ]
}

/// Who lends prefixes does not write what is others', nor nonsense.
pub fn lender() -> Vec<Attempt> {
    let all = format!("{GROUP}/aegisprefixes");
    let leased = format!("{all}/leased");
    let wrong =
        |spec: Value, message: &'static str| attempt("lender", "POST", &all, prefix("wrong", spec), message);
    let base =
        |delegations: Value| json!({"cidr": "192.0.2.0/30", "account": "shop", "delegations": delegations});
    let selector = json!({"matchLabels": {"team": "money"}});
    vec![
        attempt(
            "lender",
            "PATCH",
            format!("{leased}/status"),
            json!({"status": {"used": 0}}),
            "cannot patch resource \"aegisprefixes/status\"",
        ),
        attempt(
            "lender",
            "POST",
            format!("{GROUP}/egressaddresses"),
            address("203.0.113.1"),
            "cannot create resource \"egressaddresses\"",
        ),
        attempt(
            "lender",
            "POST",
            allocations("bank"),
            allocation("more", json!({"prefixes": ["leased"]})),
            "cannot create resource \"egressallocations\"",
        ),
        attempt(
            "lender",
            "PATCH",
            &leased,
            json!({"spec": {"cidr": "203.0.113.0/27"}}),
            "create another AegisPrefix instead",
        ),
        wrong(
            base(json!([{"name": "d", "maxAddresses": 1}])),
            "either account (a namespace by name) or namespaceSelector",
        ),
        wrong(
            base(json!([{"name": "d", "account": "bank", "namespaceSelector": selector, "maxAddresses": 1}])),
            "either account (a namespace by name) or namespaceSelector",
        ),
        wrong(
            base(json!([{"name": "d", "account": "shop", "maxAddresses": 1}])),
            "spec.delegations names spec.account",
        ),
        wrong(
            base(json!([{"name": "d", "account": "bank", "maxAddresses": 5}])),
            "maxAddresses above the number of addresses",
        ),
        wrong(
            base(json!([{"name": "d", "account": "bank", "maxAddresses": 0}])),
            "should be greater than or equal to 1",
        ),
        wrong(base(json!([{"name": "d", "account": "bank"}])), "maxAddresses: Required value"),
        wrong(
            base(json!([{"name": "d", "namespaceSelector": {}, "maxAddresses": 1}])),
            "namespaceSelector is empty",
        ),
        wrong(
            json!({"cidr": "192.0.2.0/30", "account": "shop", "source": "BringYourOwn"}),
            "spec.proof must say with source BringYourOwn",
        ),
    ]
}

/// The agent of node n1, by the token of its pod.
pub fn agent() -> Vec<Attempt> {
    let nodes = format!("{GROUP}/egressnodes");
    let addresses = format!("{GROUP}/egressaddresses");
    let prefixes = format!("{GROUP}/aegisprefixes");
    let leases = format!("/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases");
    let lease = |name: &str, holder: &str| {
        json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name},
            "spec": {"holderIdentity": holder, "leaseDurationSeconds": 60},
        })
    };
    let status = || json!({"status": {"conditions": []}});
    let only = "EgressNode n2 is written by the node agent on node n2 only";
    let other = || kind("EgressNode", "n2", json!({}));
    vec![
        attempt("agent", "POST", &nodes, other(), only),
        attempt("agent", "APPLY", format!("{nodes}/n2"), other(), only),
        attempt("agent", "APPLY", format!("{nodes}/n2?force=true"), other(), only),
        attempt(
            "agent",
            "DELETE",
            format!("{nodes}/n1"),
            Value::Null,
            "cannot delete resource \"egressnodes\"",
        ),
        attempt(
            "agent",
            "PUT",
            format!("{nodes}/n1"),
            kind("EgressNode", "n1", json!({})),
            "cannot update resource \"egressnodes\"",
        ),
        attempt(
            "agent",
            "POST",
            &addresses,
            address("203.0.113.1"),
            "cannot create resource \"egressaddresses\"",
        ),
        attempt(
            "agent",
            "PATCH",
            format!("{addresses}/203.0.113.1"),
            json!({"spec": {"epoch": 9}}),
            "cannot patch resource \"egressaddresses\"",
        ),
        attempt(
            "agent",
            "PATCH",
            format!("{addresses}/203.0.113.1/status"),
            status(),
            "cannot patch resource \"egressaddresses/status\"",
        ),
        attempt(
            "agent",
            "DELETE",
            format!("{addresses}/203.0.113.1"),
            Value::Null,
            "cannot delete resource \"egressaddresses\"",
        ),
        attempt(
            "agent",
            "POST",
            &prefixes,
            prefix("mine", json!({"cidr": "192.0.2.0/30", "account": "bank"})),
            "cannot create resource \"aegisprefixes\"",
        ),
        attempt(
            "agent",
            "PATCH",
            format!("{prefixes}/leased"),
            prefix_patch(greedy()),
            "cannot patch resource \"aegisprefixes\"",
        ),
        attempt(
            "agent",
            "PATCH",
            format!("{prefixes}/leased/status"),
            status(),
            "cannot patch resource \"aegisprefixes/status\"",
        ),
        attempt(
            "agent",
            "DELETE",
            format!("{prefixes}/leased"),
            Value::Null,
            "cannot delete resource \"aegisprefixes\"",
        ),
        attempt(
            "agent",
            "POST",
            allocations("bank"),
            allocation("more", json!({"prefixes": ["leased"]})),
            "cannot create resource \"egressallocations\"",
        ),
        attempt(
            "agent",
            "PATCH",
            format!("{}/standing", allocations("bank")),
            json!({"spec": {"addresses": {"ipv4": 9}}}),
            "cannot patch resource \"egressallocations\"",
        ),
        attempt(
            "agent",
            "PATCH",
            format!("{}/standing/status", allocations("bank")),
            status(),
            "cannot patch resource \"egressallocations/status\"",
        ),
        attempt(
            "agent",
            "DELETE",
            format!("{}/standing", allocations("bank")),
            Value::Null,
            "cannot delete resource \"egressallocations\"",
        ),
        attempt(
            "agent",
            "PATCH",
            format!("{}/any", bindings("bank")),
            json!({"spec": {"enabled": false}}),
            "cannot patch resource \"zonebindings\"",
        ),
        attempt(
            "agent",
            "PATCH",
            format!("{}/any/status", bindings("bank")),
            status(),
            "cannot patch resource \"zonebindings/status\"",
        ),
        attempt(
            "agent",
            "POST",
            &leases,
            lease("aegis-node-n2", "n2"),
            "is written by the operator and the agent of its node only",
        ),
        attempt(
            "agent",
            "POST",
            &leases,
            lease("aegis-node-n1", "n2"),
            "an agent can't name another holder of its Lease than its node",
        ),
        attempt(
            "agent",
            "POST",
            &leases,
            lease("aegis-operator", "n1"),
            "is written by the operator and the agent of its node only",
        ),
        attempt(
            "agent",
            "POST",
            "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases",
            lease("aegis-node-n1", "n1"),
            "cannot create resource \"leases\"",
        ),
        attempt(
            "agent",
            "DELETE",
            format!("{leases}/aegis-node-n1"),
            Value::Null,
            "cannot delete resource \"leases\"",
        ),
        attempt(
            "agent",
            "PATCH",
            "/api/v1/nodes/n1",
            json!({"metadata": {"labels": {"a": "b"}}}),
            "cannot patch resource \"nodes\"",
        ),
        attempt(
            "agent",
            "DELETE",
            format!("/api/v1/namespaces/{NAMESPACE}/pods/agent-n2"),
            Value::Null,
            "cannot delete resource \"pods\"",
        ),
        attempt("agent", "GET", "/api/v1/secrets", Value::Null, "cannot list resource \"secrets\""),
        attempt(
            "agent",
            "PATCH",
            "/api/v1/namespaces/kube-system",
            json!({"metadata": {"labels": {"a": "b"}}}),
            "cannot patch resource \"namespaces\"",
        ),
    ]
}
