//! Who may write what the machinery writes: the policies of the chart, with real tokens.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

use aegis_tests::admission::manifest;
use aegis_tests::apiserver::{ApiServer, NAMESPACE};
use serde_json::Value;
use std::sync::Arc;
use std::time::{Duration, Instant};

const OPERATOR: &str = "system:serviceaccount:aegis-system:aegis-operator";
const AGENT: &str = "system:serviceaccount:aegis-system:aegis-node-agent";
/// The garbage collector under both of its names; the latter where the controller manager uses one identity for all.
const COLLECTORS: [&str; 2] =
    ["system:serviceaccount:kube-system:generic-garbage-collector", "system:kube-controller-manager"];

/// The shared server with the chart's policies in force, and nodes n1 and n2, each with a pod of the agent.
fn server() -> Arc<ApiServer> {
    let server =
        ApiServer::shared(&["admission.exemptGroups={storage-repair}"]).expect("start the API server");
    for node in ["n1", "n2"] {
        let objects = format!(
            "{{apiVersion: v1, kind: Node, metadata: {{name: {node}}}}}
---
{{apiVersion: v1, kind: Pod, metadata: {{namespace: {NAMESPACE}, name: agent-{node}}},
 spec: {{nodeName: {node}, serviceAccountName: aegis-node-agent, containers: [{{name: agent, image: agent}}]}}}}"
        );
        server.provide(&objects).expect("create a node and its agent's pod");
    }
    // The API server takes new policies up within a second or so.
    let limit = Instant::now() + Duration::from_secs(30);
    for probe in [address("203.0.113.99", 1), node("probe"), lease("probe", "probe")] {
        while server.kubectl_with(&["create", "--dry-run=server", "-f", "-"], &probe).is_ok() {
            assert!(Instant::now() < limit, "the policies are not in force after 30 s");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    server
}

fn address(address: &str, epoch: u32) -> String {
    let spec =
        format!("address: {address}, prefix: p, allocationRef: {{namespace: shop, name: a}}, epoch: {epoch}");
    manifest("EgressAddress", address, &spec)
}

fn node(name: &str) -> String {
    manifest("EgressNode", name, "")
}

/// The Lease of a node with a holder.
fn lease(name: &str, holder: &str) -> String {
    format!(
        "{{apiVersion: coordination.k8s.io/v1, kind: Lease, metadata: {{namespace: {NAMESPACE}, name: aegis-node-{name}}},
 spec: {{holderIdentity: {holder}, leaseDurationSeconds: 60}}}}"
    )
}

/// kubectl with the identity and the rights of somebody.
struct Caller<'a> {
    server: &'a ApiServer,
    flags: Vec<String>,
}

impl Caller<'_> {
    fn run(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        let mut all: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        all.extend(arguments);
        self.server.kubectl_with(&all, input).map_err(|error| error.to_string())
    }

    /// Creates or replaces by server-side apply, as the agents do.
    fn apply(&self, manifest: &str) -> Result<String, String> {
        self.run(&["apply", "--server-side", "-f", "-"], manifest)
    }

    fn create(&self, manifest: &str) -> Result<String, String> {
        self.run(&["create", "-f", "-"], manifest)
    }

    /// Replaces as the operator does, by compare-and-swap: the administrator reads the version, since a writer need
    /// not be able to.
    fn replace(&self, kind: &str, manifest: &str) -> Result<String, String> {
        self.replace_in(kind, &[], manifest)
    }

    fn replace_in(&self, kind: &str, namespace: &[&str], manifest: &str) -> Result<String, String> {
        let mut object: Value = serde_yaml_ng::from_str(manifest).expect("the manifest is YAML");
        let name = object["metadata"]["name"].as_str().expect("a name").to_owned();
        let version =
            [&["get", kind, &name, "-o", "jsonpath={.metadata.resourceVersion}"], namespace].concat();
        object["metadata"]["resourceVersion"] =
            self.server.kubectl(&version).expect("read the version").into();
        self.run(&["replace", "-f", "-"], &object.to_string())
    }

    /// Writes the status as the machinery does, by server-side apply; `kubectl patch` would want to read it first.
    fn status(&self, object: &str) -> Result<String, String> {
        let (kind, name) = object.split_once('/').expect("kind/name");
        let kind = if kind == "enode" { "EgressNode" } else { "EgressAddress" };
        let text = format!(
            "{{apiVersion: aegis.dev/v1alpha1, kind: {kind}, metadata: {{name: {name}}}, status: {{conditions: []}}}}"
        );
        self.run(&["apply", "--server-side", "--subresource=status", "-f", "-"], &text)
    }

    fn delete(&self, object: &str) -> Result<String, String> {
        self.run(&["delete", "--wait=false", object], "")
    }
}

/// Somebody whose password we need not know.
fn impersonating<'a>(server: &'a ApiServer, user: &str, groups: &[&str]) -> Caller<'a> {
    let groups = groups.iter().map(|group| format!("--as-group={group}"));
    Caller { server, flags: [format!("--as={user}")].into_iter().chain(groups).collect() }
}

fn admin(server: &ApiServer) -> Caller<'_> {
    Caller { server, flags: Vec::new() }
}

/// Whoever has a token that the API server made for a service account, bound to an object or to nothing. The
/// administrator's credentials are left out, so that the token alone speaks.
fn token<'a>(server: &'a ApiServer, account: &str, bound_to: Option<(&str, &str)>) -> Caller<'a> {
    let mut arguments =
        vec!["create".to_owned(), "token".into(), account.into(), "-n".into(), NAMESPACE.into()];
    if let Some((kind, name)) = bound_to {
        arguments.extend([format!("--bound-object-kind={kind}"), format!("--bound-object-name={name}")]);
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let token = server.kubectl(&arguments).expect("create a token");
    Caller { server, flags: vec![format!("--token={}", token.trim()), "--user=nobody".into()] }
}

#[track_caller]
fn refused(result: Result<String, String>, message: &str) {
    let error = result.expect_err("it should be refused");
    assert!(error.contains("ValidatingAdmissionPolicy") && error.contains(message), "{error}");
}

#[test]
fn only_the_operator_writes_addresses() {
    let server = server();
    let operator = token(&server, "aegis-operator", None);
    let who = operator.run(&["auth", "whoami"], "").expect("who am I");
    assert!(who.contains(OPERATOR) && !who.contains("system:masters"), "{who}");

    let only = "EgressAddress 203.0.113.1 is written by the operator only";
    refused(admin(&server).create(&address("203.0.113.1", 1)), only);
    operator.create(&address("203.0.113.1", 1)).expect("the operator creates");
    operator.replace("eaddr", &address("203.0.113.1", 2)).expect("the operator updates");
    operator.status("eaddr/203.0.113.1").expect("the operator writes status");
    refused(admin(&server).replace("eaddr", &address("203.0.113.1", 3)), only);
    refused(admin(&server).status("eaddr/203.0.113.1"), only);
    refused(admin(&server).delete("eaddr/203.0.113.1"), only);
    // An agent has no such right in the first place; with the rights of an administrator it is refused all the same.
    refused(impersonating(&server, AGENT, &["system:masters"]).delete("eaddr/203.0.113.1"), only);
    operator.delete("eaddr/203.0.113.1").expect("the operator deletes");
}

#[test]
fn an_agent_writes_its_own_node_only() {
    let server = server();
    let agent = token(&server, "aegis-node-agent", Some(("Pod", "agent-n1")));
    agent.apply(&node("n1")).expect("its own node");
    agent.status("enode/n1").expect("its own status");
    let only = "EgressNode n2 is written by the node agent on node n2 only";
    refused(agent.create(&node("n2")), only);
    let other = token(&server, "aegis-node-agent", Some(("Pod", "agent-n2")));
    other.apply(&node("n2")).expect("the other one's own node");
    refused(agent.status("enode/n2"), only);
    refused(agent.apply(&node("n2")), only);
    refused(admin(&server).status("enode/n2"), only);
    refused(admin(&server).delete("enode/n2"), only);

    // A token that no pod is bound to names no node, and one of another account proves nothing.
    refused(token(&server, "aegis-node-agent", None).status("enode/n2"), only);
    let flags = ["--as-user-extra=authentication.kubernetes.io/node-name=n2"];
    let mut stranger =
        impersonating(&server, "system:serviceaccount:kube-system:default", &["system:masters"]);
    stranger.flags.extend(flags.map(str::to_owned));
    refused(stranger.status("enode/n2"), only);

    // The way around that the reference names: an administrator may act as the agent of a node.
    let mut repair = impersonating(&server, AGENT, &["system:masters"]);
    repair.flags.extend(flags.map(str::to_owned));
    repair.status("enode/n2").expect("an administrator in the agent's name");
    repair.delete("enode/n2").expect("an administrator in the agent's name");
}

#[test]
fn an_agent_renews_its_own_lease_only() {
    let server = server();
    let here = ["-n", NAMESPACE];
    let agent = token(&server, "aegis-node-agent", Some(("Pod", "agent-n1")));
    let operator = token(&server, "aegis-operator", None);
    agent.create(&lease("n1", "n1")).expect("its own Lease");
    agent.replace_in("lease", &here, &lease("n1", "n1")).expect("renews it");
    let holder = "an agent can't name another holder of its Lease than its node";
    refused(agent.replace_in("lease", &here, &lease("n1", "aegis-operator")), holder);
    refused(agent.replace_in("lease", &here, &lease("n1", "\"\"")), holder);
    let only = "is written by the operator and the agent of its node only";
    refused(agent.create(&lease("n2", "n1")), only);
    refused(token(&server, "aegis-node-agent", None).create(&lease("n2", "n2")), only);
    refused(admin(&server).replace_in("lease", &here, &lease("n1", "n1")), only);
    refused(admin(&server).run(&["delete", "lease", "aegis-node-n1", "-n", NAMESPACE], ""), only);
    // Not the one by which the operators agree on a leader either.
    let leader = lease("n1", "n1").replace("aegis-node-n1", "aegis-operator");
    refused(agent.create(&leader), only);
    operator.create(&lease("n2", "aegis-operator")).expect("the operator takes over");
    let other = token(&server, "aegis-node-agent", Some(("Pod", "agent-n2")));
    other.replace_in("lease", &here, &lease("n2", "n2")).expect("a version that it knows");
    let collector = impersonating(&server, COLLECTORS[0], &["system:masters"]);
    for name in ["aegis-node-n1", "aegis-node-n2"] {
        collector.run(&["delete", "lease", name, "-n", NAMESPACE], "").expect("goes with its node");
    }
    // Other Leases are nobody's business here.
    let other = lease("n1", "n1").replace("aegis-node-n1", "somebody");
    admin(&server).create(&other).expect("another Lease");
    admin(&server).run(&["delete", "lease", "somebody", "-n", NAMESPACE], "").expect("delete");
}

#[test]
fn the_garbage_collector_may_delete_but_not_change() {
    let server = server();
    let operator = impersonating(&server, OPERATOR, &[]);
    for (number, collector) in COLLECTORS.into_iter().enumerate() {
        // Without the group it has no right in this cluster to be refused by a policy.
        let collector = impersonating(&server, collector, &["system:masters"]);
        let name = format!("203.0.113.1{number}");
        operator.create(&address(&name, 1)).expect("the operator creates");
        refused(collector.replace("eaddr", &address(&name, 2)), "is written by the operator only");
        collector.delete(&format!("eaddr/{name}")).expect("it deletes an address");

        let mut agent = impersonating(&server, AGENT, &[]);
        agent.flags.push(format!("--as-user-extra=authentication.kubernetes.io/node-name=gone-{number}"));
        agent.create(&node(&format!("gone-{number}"))).expect("the agent creates");
        refused(collector.status(&format!("enode/gone-{number}")), "is written by the node agent");
        collector.delete(&format!("enode/gone-{number}")).expect("it deletes a node");
    }
}

#[test]
fn an_exempt_group_may_write() {
    let server = server();
    let repair = impersonating(&server, "jane", &["storage-repair", "system:masters"]);
    repair.create(&address("203.0.113.20", 1)).expect("create");
    refused(impersonating(&server, "joe", &["system:masters"]).delete("eaddr/203.0.113.20"), "not by joe");
    repair.delete("eaddr/203.0.113.20").expect("delete");
}

#[test]
fn people_write_what_is_theirs() {
    let server = server();
    let prefix = manifest("AegisPrefix", "people", "account: shop, cidr: 203.0.113.0/28");
    admin(&server).create(&prefix).expect("policies leave prefixes alone");
}

#[test]
fn an_application_that_a_policy_names_stays() {
    let server = server();
    let application = manifest("EgressApplication", "kept", "endpoints: [{cidrs: [198.51.100.0/24]}]");
    let spec = "precedence: 1, action: Deny, match: {destination: {applications: [kept, other]}}";
    let policies = [
        manifest("EgressPolicy", "keeper", spec),
        manifest("EgressPolicy", "bare", "precedence: 1, action: Deny"),
    ];
    let admin = admin(&server);
    admin.create(&application).expect("an application");
    policies.iter().for_each(|policy| drop(admin.create(policy).expect("a policy")));
    // The API server hears of policies within a second or so.
    let limit = Instant::now() + Duration::from_secs(30);
    let eventually = |what: &str, reached: &dyn Fn(Result<String, String>) -> bool| {
        while !reached(admin.run(&["delete", "--dry-run=server", "eapp/kept"], "")) {
            assert!(Instant::now() < limit, "{what}: not after 30 s");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let told = "EgressApplication kept is named by EgressPolicy keeper";
    eventually("the deletion is refused", &|answer| answer.is_err_and(|error| error.contains(told)));
    refused(admin.delete("eapp/kept"), told);
    refused(admin.run(&["delete", "eapp", "--all", "--wait=false"], ""), told);
    let repair = impersonating(&server, "jane", &["storage-repair", "system:masters"]);
    repair.run(&["delete", "--dry-run=server", "eapp/kept"], "").expect("an exempt group may");
    admin.delete("epol/keeper").expect("delete the policy");
    eventually("nobody names it", &|answer| answer.is_ok());
    admin.delete("eapp/kept").expect("delete");
    admin.delete("epol/bare").expect("delete");
}

#[test]
fn rights_end_where_the_work_ends() {
    let server = server();
    let operator = impersonating(&server, OPERATOR, &[]);
    let agent = impersonating(&server, AGENT, &[]);
    let can = |caller: &Caller<'_>, arguments: &[&str]| {
        let arguments: Vec<&str> = ["auth", "can-i"].iter().chain(arguments).copied().collect();
        caller.run(&arguments, "").is_ok()
    };
    for (verb, resource, operator_may, agent_may) in [
        ("watch", "egressaddresses.aegis.dev", true, true),
        ("list", "aegisprefixes.aegis.dev", true, true),
        ("watch", "egressapplications.aegis.dev", true, true),
        ("patch", "egressapplications.aegis.dev", false, false),
        ("create", "egressaddresses.aegis.dev", true, false),
        ("delete", "egressaddresses.aegis.dev", true, false),
        ("patch", "egressallocations.aegis.dev", true, false),
        ("delete", "egressallocations.aegis.dev", false, false),
        ("create", "egressnodes.aegis.dev", false, true),
        ("delete", "egressnodes.aegis.dev", false, false),
        ("list", "pods", false, true),
        ("delete", "pods", false, false),
        ("get", "secrets", false, false),
        ("list", "configmaps", false, false),
        ("patch", "nodes", false, false),
        ("create", "events.events.k8s.io", true, false),
    ] {
        assert_eq!(can(&operator, &[verb, resource, "-A"]), operator_may, "operator: {verb} {resource}");
        assert_eq!(can(&agent, &[verb, resource, "-A"]), agent_may, "agent: {verb} {resource}");
    }
    assert!(can(&operator, &["update", "lease/aegis-operator", "-n", NAMESPACE]));
    assert!(!can(&operator, &["update", "lease/other", "-n", "kube-system"]));
    for verb in ["create", "get", "update"] {
        assert!(can(&agent, &[verb, "leases", "-n", NAMESPACE]), "agent: {verb} leases");
        assert!(!can(&agent, &[verb, "leases", "-n", "kube-system"]), "agent: {verb} leases elsewhere");
    }
    assert!(!can(&agent, &["delete", "leases", "-n", NAMESPACE]));
}
