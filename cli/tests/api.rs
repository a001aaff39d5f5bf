//! The program against a real API server, with the chart's roles: what it says is what it says of the same objects in files, it writes
//! nothing but what `drain` is for, and needs no other rights than the page names.
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

use aegis_cli::drain::LABEL;
use aegis_tests::apiserver::ApiServer;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Objects of Aegis that only Aegis writes, written by the test in its place.
const VALUES: [&str; 1] = ["admission.exemptGroups={system:masters}"];

/// What an administrator of the platform may read beside the objects of Aegis, as `docs/cli.md` says.
const READER: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: cluster-reader}
rules:
  - {apiGroups: [''], resources: [pods, nodes, namespaces], verbs: [get, list]}
  - {apiGroups: [networking.k8s.io], resources: [servicecidrs], verbs: [list]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: viewer-reads}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-reader}
subjects: [{kind: ServiceAccount, name: viewer, namespace: people}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: viewer-views}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: aegis-cluster-viewer}
subjects: [{kind: ServiceAccount, name: viewer, namespace: people}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: shop, namespace: shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: aegis-viewer}
subjects: [{kind: ServiceAccount, name: shop, namespace: people}]
";

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn golden(name: &str) -> String {
    std::fs::read_to_string(data(name)).expect("read")
}

/// Somebody with a kubeconfig.
struct Person {
    kubeconfig: PathBuf,
}

impl Person {
    /// Output, error output and exit code.
    fn run(&self, arguments: &[&str]) -> (String, String, i32) {
        let output = Command::new(env!("CARGO_BIN_EXE_kubectl-aegis"))
            .current_dir(data(""))
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(arguments)
            .output()
            .expect("run the program");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        (text(output.stdout), text(output.stderr), output.status.code().unwrap_or(-1))
    }

    fn says(&self, arguments: &[&str], code: i32) -> String {
        let (out, err, status) = self.run(arguments);
        assert_eq!(status, code, "{arguments:?}\n{out}{err}");
        out + &err
    }
}

/// A service account with a token of its own.
fn person(server: &ApiServer, name: &str) -> Person {
    let token = server.kubectl(&["create", "token", "-n", "people", name]).expect("token");
    let kubeconfig = server.kubeconfig_of(&format!("{name}.yaml"), token.trim()).expect("kubeconfig");
    Person { kubeconfig }
}

/// Puts the objects of the test's cluster into the API server.
fn provide(server: &ApiServer) {
    let apply = |objects: &Value| apply(server, objects);
    let accounts =
        [("people", "viewer"), ("people", "shop"), ("shop", "web"), ("shop", "worker"), ("bank", "default")];
    for namespace in ["people", "shop", "bank", "mill"] {
        apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}))
            .expect("namespace");
    }
    for (namespace, name) in accounts {
        let metadata = json!({"name": name, "namespace": namespace});
        apply(&json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})).expect("account");
    }
    provide_file(server, "cluster.yaml");
    server.kubectl_with(&["apply", "-f", "-"], READER).expect("roles");
}

fn apply(server: &ApiServer, objects: &Value) -> anyhow::Result<String> {
    server.kubectl_with(&["apply", "--server-side", "-f", "-"], &objects.to_string())
}

/// Puts the objects of a file into the API server, with their status.
fn provide_file(server: &ApiServer, name: &str) {
    let list: Value = serde_yaml_ng::from_str(&golden(name)).expect("YAML");
    for item in list["items"].as_array().expect("items") {
        // The API server makes its own ServiceCIDR.
        if item["kind"] == "ServiceCIDR" {
            continue;
        }
        let mut object = item.clone();
        let metadata = object["metadata"].as_object_mut().expect("metadata");
        for field in ["uid", "generation", "creationTimestamp"] {
            metadata.remove(field);
        }
        let status = object.as_object_mut().expect("object").remove("status");
        apply(server, &object).unwrap_or_else(|error| panic!("{object}: {error}"));
        let Some(status) = status else { continue };
        let (kind, name) =
            (object["kind"].as_str().expect("kind"), object["metadata"]["name"].as_str().expect("name"));
        let patch = json!({"status": status}).to_string();
        let mut arguments = vec!["patch", kind, name, "--subresource=status", "--type=merge", "-p", &patch];
        if let Some(namespace) = object["metadata"]["namespace"].as_str() {
            arguments.extend(["-n", namespace]);
        }
        server.kubectl(&arguments).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn answers_are_those_of_the_files_and_need_the_rights_that_the_page_names() {
    let server = ApiServer::shared(&VALUES).expect("an API server");
    provide(&server);
    let (viewer, shop) = (person(&server, "viewer"), person(&server, "shop"));
    let admin = Person { kubeconfig: server.kubeconfig() };

    assert_eq!(viewer.says(&["status"], 1), golden("status.txt"));
    assert_eq!(viewer.says(&["policies"], 0), golden("policies.txt"));
    assert_eq!(viewer.says(&["trace", "shop/web", "198.51.100.7:443"], 0), golden("trace-web.txt"));
    assert_eq!(
        viewer.says(&["trace", "-n", "shop", "worker", "198.51.100.7:80"], 0),
        golden("trace-worker.txt")
    );

    // An account sees its own; what its pods do depends on what it does not see.
    let own = shop.says(&["status", "-n", "shop"], 0);
    assert!(
        own.contains("shop/partners") && own.contains("only those of namespace shop may be read"),
        "{own}"
    );
    assert!(!own.contains("vault"), "{own}");
    let refused = shop.says(&["trace", "-n", "shop", "web", "198.51.100.7"], 2);
    assert!(refused.contains("the answer could be wrong") && refused.contains("egresspolicies"), "{refused}");

    // A plan writes nothing, and the API server checks what it is made from.
    let plan = admin.says(&["plan", "-f", "change.yaml"], 3);
    let offline = golden("plan.txt");
    let (offline, _) = offline.split_once("\nnote:").expect("a note");
    assert!(plan.contains(offline), "{plan}");
    assert!(server.kubectl(&["get", "egressallocation", "-n", "shop", "workers"]).is_err(), "it was stored");
    assert!(admin.says(&["plan", "-f", "cluster-policy.yaml"], 0).contains("nothing would change"));
    let wrong = admin.says(&["plan", "-f", "bad-rule.yaml"], 1);
    assert!(
        wrong.contains("the API server would refuse") && wrong.contains("egress must be given"),
        "{wrong}"
    );
    // The API server knows the prefix as it stands; as the files have it, it is delegated.
    let delegated = admin.says(&["plan", "-f", "delegation.yaml", "delegated.yaml"], 3);
    assert!(delegated.contains("apply the prefix of these files first"), "{delegated}");
    assert!(
        delegated.lines().any(|line| line.contains("mill/own") && line.ends_with("given")),
        "{delegated}"
    );
    let alone = admin.says(&["plan", "-f", "delegated.yaml"], 1);
    assert!(alone.contains("the API server would refuse") && alone.contains("not delegated"), "{alone}");
    let unchecked = viewer.says(&["plan", "-f", "change.yaml"], 3);
    assert!(unchecked.contains("not checked by the API server"), "{unchecked}");

    alerts(&admin);
    allowlists(&server, &viewer, &shop);
    // Without a collector, which the chart does not run by default.
    let none = viewer.says(&["usage"], 2);
    assert!(none.contains("there is no collector") && none.contains("usage.enabled=true"), "{none}");
    let refused = shop.says(&["usage", "-n", "shop"], 2);
    assert!(
        refused.contains("pods may not be listed") && refused.contains("aegis-collector-client"),
        "{refused}"
    );
    drains(&server, &admin, &viewer);
}

fn alerts(admin: &Person) {
    let plan = admin.says(&["plan", "-f", "alert.yaml"], 3);
    let offline = golden("plan-alert.txt");
    let (offline, _) = offline.split_once("\nnote:").expect("a note");
    assert!(plan.contains(offline), "{plan}");
    let wrong = admin.says(&["plan", "-f", "bad-alert.yaml"], 1);
    assert!(wrong.contains("says nothing to look at"), "{wrong}");
    // What only the API server knows.
    let name = admin.says(&["plan", "-f", "odd-alert.yaml"], 1);
    assert!(name.contains("the API server would refuse"), "{name}");
}

fn allowlists(server: &ApiServer, viewer: &Person, shop: &Person) {
    provide_file(server, "allowlist.yaml");
    for form in ["text", "csv"] {
        let list = viewer.says(&["allowlist", "mill/feed", "-o", form], 0);
        assert_eq!(list, golden(&format!("allowlist-{form}.txt")));
    }
    let rules = viewer.says(&["allowlist", "mill/feed", "-o", "nftables"], 0);
    assert!(rules.starts_with("# Egress addresses of mill/feed in context test, as of 20"), "{rules}");
    assert_eq!(
        viewer.says(&["allowlist", "-n", "shop", "partners", "bank/vault", "--family", "4"], 0),
        "203.0.113.0/31\nwarning: EgressAllocation bank/vault: Programmed (Pending): 2 of 3 nodes; n2 does not have it yet\n"
    );
    let everywhere = viewer.run(&["allowlist", "--all", "-A"]);
    assert_eq!(
        everywhere.0,
        "203.0.113.0/31\n203.0.113.20/31\n203.0.113.22/32\n203.0.113.25/32\n2001:db8:1:4::/63\n"
    );
    for (arguments, said) in [
        (["-n", "mill", "missing"], "there is no EgressAllocation missing in namespace mill"),
        (["-n", "mill", "idle"], "EgressAllocation mill/idle has no addresses"),
    ] {
        let (out, err, code) = viewer.run(&[&["allowlist"], &arguments[..]].concat());
        assert!(out.is_empty() && err.contains(said) && code == 2, "{out}{err}");
    }
    // The owner of an account needs no right to see whose other addresses are.
    assert_eq!(shop.says(&["allowlist", "shop/partners"], 0), "203.0.113.0/32\n");
    assert_eq!(shop.says(&["allowlist", "--all", "-n", "shop"], 0), "203.0.113.0/32\n");
    for (arguments, said) in [
        (["shop/partners", "bank/vault"], "egressallocations: may not be read in namespace bank"),
        (["--all", "-A"], "egressallocations: may not be read (egressallocations.aegis.dev is forbidden"),
    ] {
        let (out, err, code) = shop.run(&[&["allowlist"], &arguments[..]].concat());
        assert!(out.is_empty() && err.contains(said) && code == 2, "{out}{err}");
    }
}

fn drains(server: &ApiServer, admin: &Person, viewer: &Person) {
    let node = || -> Value {
        let text = server.kubectl(&["get", "node", "n1", "-o", "json"]).expect("node");
        serde_json::from_str(&text).expect("JSON")
    };
    let preview = viewer.says(&["drain", "n1", "--dry-run"], 0);
    for part in ["cordon the node", LABEL, "1 covered pod", "203.0.113.0"] {
        assert!(preview.contains(part), "{part:?} is not in {preview}");
    }
    assert!(node()["metadata"]["labels"][LABEL].is_null());
    assert!(viewer.says(&["drain", "n1", "--yes"], 1).contains("forbidden"));
    assert!(admin.says(&["drain", "n1"], 1).contains("nobody can be asked"));
    // Nobody drains anything here, so it does not come to an end.
    let waits = admin.says(&["drain", "node/n1", "--yes", "--timeout", "1"], 1);
    assert!(waits.contains("16 held, 0 draining") && waits.contains("not empty within 1 s"), "{waits}");
    // Programs read the answer alone.
    let (out, err, code) = admin.run(&["drain", "node/n1", "--yes", "--timeout", "1", "-o", "json"]);
    let answer: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"));
    assert_eq!((&answer["target"], code), (&json!("node n1"), 1));
    assert!(err.contains("not empty within 1 s"), "{err}");
    assert_eq!(
        (&node()["metadata"]["labels"][LABEL], &node()["spec"]["unschedulable"]),
        (&json!("true"), &json!(true))
    );
    // The agents' DaemonSet goes by that very label.
    let set = server
        .kubectl(&["get", "daemonset", "-n", "aegis-system", "aegis-node-agent", "-o", "json"])
        .expect("set");
    let set: Value = serde_json::from_str(&set).expect("JSON");
    let terms = set
        .pointer("/spec/template/spec/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution");
    let wanted =
        json!({"nodeSelectorTerms": [{"matchExpressions": [{"key": LABEL, "operator": "DoesNotExist"}]}]});
    assert_eq!(terms, Some(&wanted));
    admin.says(&["drain", "node/n1", "--undo", "--yes"], 0);
    assert!(node()["metadata"]["labels"][LABEL].is_null() && node()["spec"]["unschedulable"].is_null());

    let used = admin.says(&["drain", "-n", "shop", "allocation/partners", "--yes"], 1);
    assert!(used.contains("ZoneBinding shop/partners leaves from it"), "{used}");
    assert!(admin.says(&["drain", "nowhere"], 1).contains("neither a node nowhere nor an EgressAllocation"));
    admin.says(&["drain", "-n", "bank", "vault", "--yes", "--timeout", "0"], 0);
    let vault = server.kubectl(&[
        "get",
        "egressallocation",
        "-n",
        "bank",
        "vault",
        "-o",
        "jsonpath={.metadata.deletionTimestamp}",
    ]);
    assert!(!vault.expect("its finalizer keeps it").is_empty());
    assert!(admin.says(&["drain", "-n", "bank", "vault", "--undo"], 1).contains("cannot be undone"));
}

#[test]
fn a_cluster_that_does_not_answer_is_no_answer() {
    let nobody = Person { kubeconfig: "/nonexistent".into() };
    assert!(nobody.says(&["status"], 2).contains("error: "));
}
