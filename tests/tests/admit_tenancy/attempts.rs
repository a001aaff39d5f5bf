//! What is tried, by whom, and the words of the refusal.

use crate::people::{GROUP, Request, allocation, allocations, bindings, prefix_patch};
use crate::staff;
use aegis_tests::apiserver::NAMESPACE;
use serde_json::{Value, json};

/// Something that must be refused.
pub struct Attempt {
    pub who: &'static str,
    pub request: Request,
    pub message: &'static str,
}

pub fn attempt(
    who: &'static str,
    method: &'static str,
    path: impl Into<String>,
    body: Value,
    message: &'static str,
) -> Attempt {
    Attempt { who, request: Request { method, path: path.into(), body, impersonate: None }, message }
}

/// All of them.
pub fn all() -> Vec<Attempt> {
    let mut all = prefixes();
    all.extend(machinery());
    all.extend(policies());
    all.extend(other_accounts());
    all.extend(rights());
    all.extend(delegations());
    all.extend(staff::owner());
    all.extend(staff::lender());
    all.extend(staff::agent());
    all
}

pub fn kind(kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": "aegis.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

pub fn prefix(name: &str, spec: Value) -> Value {
    kind("AegisPrefix", name, spec)
}

pub fn address(name: &str) -> Value {
    let spec = json!({"address": name, "prefix": "leased", "epoch": 1, "holdings": [], "allocationRef": {"namespace": "bank", "name": "standing"}});
    kind("EgressAddress", name, spec)
}

pub fn greedy() -> Value {
    json!([{"name": "bank", "account": "bank", "maxAddresses": 16}])
}

/// Path of an account's alerts.
fn alerts(account: &str) -> String {
    format!("{GROUP}/namespaces/{account}/usagealerts")
}

/// An account to which a prefix is delegated neither sees nor changes any.
fn prefixes() -> Vec<Attempt> {
    let all = format!("{GROUP}/aegisprefixes");
    let leased = format!("{all}/leased");
    let own = prefix("mine", json!({"cidr": "203.0.113.0/29", "account": "bank"}));
    let wider = prefix("leased", json!({"cidr": "203.0.113.0/28", "account": "bank"}));
    vec![
        attempt("bank", "GET", &all, Value::Null, "cannot list resource \"aegisprefixes\""),
        attempt("bank", "GET", &leased, Value::Null, "cannot get resource \"aegisprefixes\""),
        attempt(
            "bank",
            "GET",
            format!("{all}?watch=1"),
            Value::Null,
            "cannot watch resource \"aegisprefixes\"",
        ),
        attempt("bank", "POST", &all, own, "cannot create resource \"aegisprefixes\""),
        attempt("bank", "PUT", &leased, wider, "cannot update resource \"aegisprefixes\""),
        attempt("bank", "PATCH", &leased, prefix_patch(greedy()), "cannot patch resource \"aegisprefixes\""),
        attempt(
            "bank",
            "PATCH",
            format!("{leased}/status"),
            json!({"status": {"used": 0}}),
            "cannot patch resource \"aegisprefixes/status\"",
        ),
        attempt("bank", "DELETE", &leased, Value::Null, "cannot delete resource \"aegisprefixes\""),
        attempt("bank", "DELETE", &all, Value::Null, "cannot deletecollection resource \"aegisprefixes\""),
    ]
}

/// Nor what the machinery writes.
fn machinery() -> Vec<Attempt> {
    let addresses = format!("{GROUP}/egressaddresses");
    let one = format!("{addresses}/203.0.113.1");
    let nodes = format!("{GROUP}/egressnodes");
    let status = |of: &str| format!("{of}/status");
    let empty = || json!({"status": {"conditions": []}});
    vec![
        attempt("bank", "GET", &addresses, Value::Null, "cannot list resource \"egressaddresses\""),
        attempt("bank", "GET", &one, Value::Null, "cannot get resource \"egressaddresses\""),
        attempt(
            "bank",
            "POST",
            &addresses,
            address("203.0.113.1"),
            "cannot create resource \"egressaddresses\"",
        ),
        attempt(
            "bank",
            "PATCH",
            &one,
            json!({"spec": {"epoch": 9}}),
            "cannot patch resource \"egressaddresses\"",
        ),
        attempt("bank", "PATCH", status(&one), empty(), "cannot patch resource \"egressaddresses/status\""),
        attempt("bank", "DELETE", &one, Value::Null, "cannot delete resource \"egressaddresses\""),
        attempt("bank", "GET", &nodes, Value::Null, "cannot list resource \"egressnodes\""),
        attempt(
            "bank",
            "POST",
            &nodes,
            kind("EgressNode", "n9", json!({})),
            "cannot create resource \"egressnodes\"",
        ),
        attempt(
            "bank",
            "PATCH",
            status(&format!("{nodes}/n1")),
            empty(),
            "cannot patch resource \"egressnodes/status\"",
        ),
        attempt(
            "bank",
            "DELETE",
            format!("{nodes}/n1"),
            Value::Null,
            "cannot delete resource \"egressnodes\"",
        ),
        attempt(
            "bank",
            "PATCH",
            status(&format!("{}/standing", allocations("bank"))),
            json!({"status": {"addresses": [{"address": "203.0.113.9", "prefix": "leased"}]}}),
            "cannot patch resource \"egressallocations/status\"",
        ),
        attempt(
            "bank",
            "PATCH",
            status(&format!("{}/one", bindings("bank"))),
            empty(),
            "cannot patch resource \"zonebindings/status\"",
        ),
    ]
}

/// Nor the policies of the cluster, nor what they name.
fn policies() -> Vec<Attempt> {
    let applications = format!("{GROUP}/egressapplications");
    let crm = kind("EgressApplication", "crm", json!({"endpoints": [{"cidrs": ["198.51.100.0/24"]}]}));
    let all = format!("{GROUP}/egresspolicies");
    let mine = kind("EgressPolicy", "mine", json!({"precedence": 1, "action": "Deny"}));
    vec![
        attempt("bank", "GET", &applications, Value::Null, "cannot list resource \"egressapplications\""),
        attempt("bank", "POST", &applications, crm, "cannot create resource \"egressapplications\""),
        attempt(
            "agent",
            "PATCH",
            format!("{applications}/any"),
            json!({"spec": {"endpoints": []}}),
            "cannot patch resource \"egressapplications\"",
        ),
        attempt("bank", "GET", &all, Value::Null, "cannot list resource \"egresspolicies\""),
        attempt("bank", "POST", &all, mine, "cannot create resource \"egresspolicies\""),
        attempt(
            "bank",
            "PATCH",
            format!("{all}/any"),
            json!({"spec": {"precedence": 9}}),
            "cannot patch resource \"egresspolicies\"",
        ),
        attempt(
            "bank",
            "DELETE",
            format!("{all}/any"),
            Value::Null,
            "cannot delete resource \"egresspolicies\"",
        ),
        attempt(
            "agent",
            "DELETE",
            format!("{all}/any"),
            Value::Null,
            "cannot delete resource \"egresspolicies\"",
        ),
        attempt(
            "agent",
            "PATCH",
            format!("{all}/any/status"),
            json!({"status": {"conditions": []}}),
            "cannot patch resource \"egresspolicies/status\"",
        ),
    ]
}

/// Two accounts on one prefix: neither sees or changes what is the other's.
fn other_accounts() -> Vec<Attempt> {
    let (theirs, of_kiosk) = (allocations("shop"), allocations("kiosk"));
    let zones = bindings("shop");
    let binding = kind(
        "ZoneBinding",
        "mine",
        json!({"allocationRef": {"name": "standing"}, "workloads": {"allPods": true}, "zone": {"cidrs": ["0.0.0.0/0"]}}),
    );
    let mine = || allocation("mine", json!({"prefixes": ["leased"]}));
    let cannot = |verb: &str, resource: &str, namespace: &str| -> &'static str {
        let group = if resource == "events" { "events.k8s.io" } else { "aegis.dev" };
        let text = format!(
            "cannot {verb} resource \"{resource}\" in API group \"{group}\" in the namespace \"{namespace}\""
        );
        Box::leak(text.into_boxed_str())
    };
    let (alerts, own) = (alerts("shop"), alerts("bank"));
    let alert = || kind("UsageAlert", "mine", json!({"refusals": {}}));
    vec![
        attempt("bank", "GET", &alerts, Value::Null, cannot("list", "usagealerts", "shop")),
        attempt("bank", "POST", &alerts, alert(), cannot("create", "usagealerts", "shop")),
        // What it is raised for says the collector alone.
        attempt(
            "bank",
            "PATCH",
            format!("{own}/any/status"),
            json!({"status": {"firing": 9}}),
            cannot("patch", "usagealerts/status", "bank"),
        ),
        attempt("bank", "GET", &theirs, Value::Null, cannot("list", "egressallocations", "shop")),
        attempt(
            "bank",
            "GET",
            format!("{theirs}/any"),
            Value::Null,
            cannot("get", "egressallocations", "shop"),
        ),
        attempt("bank", "POST", &theirs, mine(), cannot("create", "egressallocations", "shop")),
        attempt("bank", "POST", &of_kiosk, mine(), cannot("create", "egressallocations", "kiosk")),
        attempt(
            "kiosk",
            "GET",
            allocations("bank"),
            Value::Null,
            cannot("list", "egressallocations", "bank"),
        ),
        attempt(
            "kiosk",
            "PATCH",
            format!("{}/standing", allocations("bank")),
            json!({"spec": {"addresses": {"ipv4": 16}}}),
            cannot("patch", "egressallocations", "bank"),
        ),
        attempt(
            "kiosk",
            "DELETE",
            format!("{}/standing", allocations("bank")),
            Value::Null,
            cannot("delete", "egressallocations", "bank"),
        ),
        // The owner of a prefix has no right over the allocations of those it lends to.
        attempt(
            "shop",
            "DELETE",
            format!("{}/standing", allocations("bank")),
            Value::Null,
            cannot("delete", "egressallocations", "bank"),
        ),
        attempt(
            "bank",
            "DELETE",
            &theirs,
            Value::Null,
            cannot("deletecollection", "egressallocations", "shop"),
        ),
        attempt("bank", "GET", &zones, Value::Null, cannot("list", "zonebindings", "shop")),
        attempt("bank", "POST", &zones, binding, cannot("create", "zonebindings", "shop")),
        attempt(
            "bank",
            "PATCH",
            format!("{zones}/any"),
            json!({"spec": {"enabled": false}}),
            cannot("patch", "zonebindings", "shop"),
        ),
        attempt(
            "bank",
            "DELETE",
            format!("{zones}/any"),
            Value::Null,
            cannot("delete", "zonebindings", "shop"),
        ),
        attempt(
            "bank",
            "GET",
            format!("{GROUP}/egressallocations"),
            Value::Null,
            "cannot list resource \"egressallocations\" in API group \"aegis.dev\" at the cluster scope",
        ),
        attempt(
            "bank",
            "GET",
            format!("{GROUP}/zonebindings"),
            Value::Null,
            "cannot list resource \"zonebindings\" in API group \"aegis.dev\" at the cluster scope",
        ),
        // Events about prefixes are in this namespace.
        attempt(
            "bank",
            "GET",
            "/apis/events.k8s.io/v1/namespaces/default/events",
            Value::Null,
            cannot("list", "events", "default"),
        ),
    ]
}

/// Ways to more rights.
fn rights() -> Vec<Attempt> {
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "mine"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "aegis-prefix-admin"},
        "subjects": [{"kind": "ServiceAccount", "name": "owner", "namespace": "bank"}],
    });
    let token =
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": []}});
    let minting = |account: &str| format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{account}/token");
    let policies = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings/aegis-delegation";
    let mut impersonating =
        attempt("bank", "GET", format!("{GROUP}/egressaddresses"), Value::Null, "cannot impersonate");
    impersonating.request.impersonate = Some("system:serviceaccount:aegis-system:aegis-operator");
    vec![
        attempt(
            "bank",
            "POST",
            format!("{rbac}/clusterrolebindings"),
            binding,
            "cannot create resource \"clusterrolebindings\"",
        ),
        attempt(
            "bank",
            "POST",
            minting("aegis-operator"),
            token.clone(),
            "cannot create resource \"serviceaccounts/token\"",
        ),
        attempt(
            "bank",
            "POST",
            minting("aegis-node-agent"),
            token,
            "cannot create resource \"serviceaccounts/token\"",
        ),
        attempt(
            "bank",
            "DELETE",
            policies,
            Value::Null,
            "cannot delete resource \"validatingadmissionpolicybindings\"",
        ),
        // The label that would give it a share.
        attempt(
            "bank",
            "PATCH",
            "/api/v1/namespaces/bank",
            json!({"metadata": {"labels": {"tier": "gold"}}}),
            "cannot patch resource \"namespaces\"",
        ),
        attempt(
            "bank",
            "PATCH",
            format!("/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/aegis-node-n1"),
            json!({"spec": {"holderIdentity": "bank"}}),
            "cannot patch resource \"leases\"",
        ),
        impersonating,
    ]
}

/// What is not delegated is refused at once, by whatever way it is written.
fn delegations() -> Vec<Attempt> {
    let names = |prefixes: Value| allocation("more", json!({"prefixes": prefixes}));
    let post = |who: &'static str, prefixes: Value, message: &'static str| {
        attempt(who, "POST", allocations(who), names(prefixes), message)
    };
    let standing = |account: &str| format!("{}/standing", allocations(account));
    let to = |prefixes: Value| json!({"spec": {"prefixes": prefixes}});
    let leased = "AegisPrefix leased is not delegated to account thief: name another";
    let explicit = json!({"prefixes": ["leased"], "addresses": {"explicit": ["203.0.113.4"]}});
    vec![
        post("thief", json!(["leased"]), "EgressAllocation thief/more spec.prefixes: AegisPrefix leased"),
        post("thief", json!(["leased"]), leased),
        post("thief", json!(["later", "leased"]), leased),
        attempt("thief", "POST", allocations("thief"), allocation("more", explicit), leased),
        attempt("thief", "PATCH", standing("thief"), to(json!(["leased"])), leased),
        attempt("thief", "PATCH", standing("thief"), to(json!(["later", "leased"])), leased),
        attempt("thief", "APPLY", format!("{}/more", allocations("thief")), names(json!(["leased"])), leased),
        attempt(
            "thief",
            "APPLY",
            format!("{}?force=true", standing("thief")),
            allocation("standing", json!({"prefixes": ["leased"]})),
            leased,
        ),
        post("bank", json!(["private"]), "AegisPrefix private is not delegated to account bank"),
        post("bank", json!(["own"]), "AegisPrefix own is not delegated to account bank"),
        attempt(
            "bank",
            "PATCH",
            standing("bank"),
            to(json!(["leased", "private"])),
            "AegisPrefix private is not delegated to account bank",
        ),
        post("shop", json!(["own"]), "AegisPrefix own is not delegated to account shop"),
        // By labels: another value, one too many, a value that is excluded, none at all.
        post("silver", json!(["leased"]), "AegisPrefix leased is not delegated to account silver"),
        post("silver", json!(["graded"]), "AegisPrefix graded is not delegated to account silver"),
        post("suspended", json!(["graded"]), "AegisPrefix graded is not delegated to account suspended"),
        post("kiosk", json!(["elsewhere"]), "AegisPrefix elsewhere is not delegated to account kiosk"),
        post("thief", json!(["elsewhere"]), "AegisPrefix elsewhere is not delegated to account thief"),
        post("gold", json!(["leased"]), "AegisPrefix leased is not delegated to account gold"),
        // Nobody takes more than an allocation can have.
        attempt(
            "bank",
            "POST",
            allocations("bank"),
            allocation("more", json!({"prefixes": ["leased"], "addresses": {"ipv4": 17}})),
            "spec.addresses.ipv4",
        ),
    ]
}
