//! A cluster with the chart, accounts, people and agents' pods.

use crate::collector::PATIENCE;
use aegis_tests::apiserver::{ApiServer, NAMESPACE};
use k8s_openapi::ByteString;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
use kube::Client;
use kube::api::{Api, PostParams};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{Mutex, MutexGuard};

/// Audience of the collector's tokens.
pub const AUDIENCE: &str = "aegis-collector";

/// The agents' service account, as the chart names it.
pub const AGENT: &str = "aegis-node-agent";

/// Namespace of the people who ask.
pub const PEOPLE: &str = "people";

const VALUES: [&str; 2] = ["usage.enabled=true", "admission.exemptGroups={system:masters}"];

/// Accounts x and y, the owner of a prefix, and somebody whose prefix is not accepted; for each a person that may see it.
const ACCOUNTS: [&str; 4] = ["x", "y", "parent", "grab"];

/// One test at a time: each takes processors for its processes, and one of them stops the API server.
static ONE: Mutex<()> = Mutex::const_new(());

/// The cluster, which all tests share.
pub struct World {
    pub api: Arc<ApiServer>,
    pub client: Client,
    _one: MutexGuard<'static, ()>,
}

impl World {
    pub async fn start() -> World {
        // Before it is this test's turn, so that the server lives on from one to the next.
        let api = ApiServer::shared(&VALUES).expect("start the API server");
        let one = ONE.lock().await;
        let client = api.client().await.expect("client");
        let world = World { api, client, _one: one };
        if world.api.kubectl(&["get", "namespace", PEOPLE]).is_err() {
            world.fill();
        }
        world
    }

    /// Makes what the tests need.
    fn fill(&self) {
        let mut objects: Vec<Value> = Vec::new();
        let binding = |kind: &str, name: &str, role: &str, person: &str| {
            json!({
                "apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": name},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
                "subjects": [{"kind": "ServiceAccount", "name": person, "namespace": PEOPLE}],
            })
        };
        let mut people = vec!["auditor", "platform", "nobody"];
        people.extend(ACCOUNTS);
        for namespace in [PEOPLE].iter().chain(&ACCOUNTS) {
            objects.push(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}));
        }
        for person in people {
            let metadata = json!({"name": person, "namespace": PEOPLE});
            objects.push(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}));
        }
        let metadata = json!({"name": AGENT, "namespace": PEOPLE});
        objects.push(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}));
        for account in ACCOUNTS {
            objects.push(in_namespace(account, binding("RoleBinding", "views", "aegis-viewer", account)));
        }
        for account in ["x", "y"] {
            let audits = binding("RoleBinding", "audits", "aegis-viewer", "auditor");
            objects.push(in_namespace(account, audits));
        }
        let all = binding("ClusterRoleBinding", "platform-views", "aegis-cluster-viewer", "platform");
        objects.push(all);
        for account in ["x", "y"] {
            objects.push(json!({
                "apiVersion": "aegis.dev/v1alpha1", "kind": "EgressAllocation",
                "metadata": {"name": "partner", "namespace": account}, "spec": {"prefixes": ["later"]},
            }));
        }
        objects.push(prefix("lent", "192.0.2.0/28", "parent"));
        objects.push(prefix("grabbed", "203.0.113.0/24", "grab"));
        for (pod, namespace) in [("agent-n1", NAMESPACE), ("agent-gone", NAMESPACE), ("other-n1", PEOPLE)] {
            objects.push(agent_pod(pod, namespace, "n1"));
        }
        objects.push(agent_pod("agent-y-node", NAMESPACE, "y-node"));
        for node in ["n1", "y-node"] {
            objects.push(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}}));
        }
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.api.provide(&list.to_string()).expect("objects");
        for (name, accepted) in [("lent", "True"), ("grabbed", "False")] {
            let condition = json!({
                "type": "Accepted", "status": accepted, "reason": "Test", "message": "by the test",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            });
            let patch = json!({"status": {"conditions": [condition]}}).to_string();
            let arguments = ["patch", "apfx", name, "--subresource=status", "--type=merge", "-p", &patch];
            self.api.kubectl(&arguments).expect("status");
        }
        // The API server's own copies of what has just been given: a refusal would be remembered.
        for (person, scope) in [("platform", "--all-namespaces"), ("auditor", "--namespace=y")] {
            let person = format!("--as=system:serviceaccount:{PEOPLE}:{person}");
            let may = ["auth", "can-i", "get", "egressallocations.aegis.dev/usage", &person, scope];
            let limit = Instant::now() + PATIENCE;
            while self.api.kubectl(&may).is_err() {
                assert!(Instant::now() < limit, "{person} has no right");
            }
        }
    }

    /// A token of a service account: for which audience, and of which pod.
    pub async fn token(&self, account: &str, audience: &str, pod: Option<&str>) -> String {
        let (namespace, name) = account.split_once('/').expect("namespace and name");
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), namespace);
        let bound = pod.map(|pod| BoundObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            name: Some(pod.into()),
            uid: None,
        });
        let audiences = (!audience.is_empty()).then(|| vec![audience.to_owned()]);
        let spec = TokenRequestSpec { audiences, bound_object_ref: bound, expiration_seconds: Some(3_600) };
        let request = TokenRequest { spec: Some(spec), ..TokenRequest::default() };
        let made = accounts.create_token_request(name, &PostParams::default(), &request).await;
        made.expect(account).status.and_then(|status| status.token).expect("a token")
    }

    /// A new token of the agent's pod on a node.
    pub async fn agent(&self, node: &str) -> String {
        let pod = format!("agent-{node}");
        self.token(&format!("{NAMESPACE}/{AGENT}"), AUDIENCE, Some(&pod)).await
    }

    /// A new token of somebody who asks.
    pub async fn person(&self, name: &str) -> String {
        self.token(&format!("{PEOPLE}/{name}"), AUDIENCE, None).await
    }

    /// A token as it was, but for the time: signed by the same key, and over since an hour.
    pub fn expired(&self, token: &str) -> String {
        let (head, rest) = token.split_once('.').expect("a token");
        let payload = rest.split('.').next().expect("a payload");
        let mut claims: Value = serde_json::from_slice(&unpack(payload)).expect("claims");
        for claim in ["iat", "nbf", "exp"] {
            claims[claim] = (claims[claim].as_i64().expect(claim) - 2 * 3_600).into();
        }
        let text = format!("{head}.{}", pack(claims.to_string().as_bytes()));
        let key = self.folder().join("sa.key");
        let file = self.folder().join("claims");
        std::fs::write(&file, &text).expect("write");
        let mut openssl = Command::new("openssl");
        openssl.args(["dgst", "-sha256", "-sign"]).arg(key).arg(file);
        let output = openssl.output().expect("openssl");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        format!("{text}.{}", pack(&output.stdout))
    }

    /// The API server's folder, which goes with it.
    pub fn folder(&self) -> PathBuf {
        self.api.folder().into()
    }

    /// The chart's certificate in a folder of that name, and the arguments by which a collector uses it.
    pub async fn certificate(&self, name: &str) -> (PathBuf, [String; 2]) {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), NAMESPACE);
        let secret =
            secrets.get("aegis-collector-tls").await.expect("the chart's Secret").data.expect("data");
        let folder = self.folder().join(name);
        std::fs::create_dir(&folder).expect("folder");
        for (name, bytes) in &secret {
            std::fs::write(folder.join(name), &bytes.0).expect("write");
        }
        let argument = |flag: &str, file: &str| format!("--{flag}={}", folder.join(file).display());
        let arguments = [argument("tls-cert", "tls.crt"), argument("tls-key", "tls.key")];
        (folder, arguments)
    }

    /// Credentials of the collector's own account, with which it runs in a cluster.
    pub async fn collector(&self) -> PathBuf {
        let token = self.token(&format!("{NAMESPACE}/aegis-collector"), "", None).await;
        self.api.kubeconfig_of("collector", &token).expect("write")
    }
}

fn in_namespace(namespace: &str, mut object: Value) -> Value {
    object["metadata"]["namespace"] = namespace.into();
    object
}

fn prefix(name: &str, cidr: &str, account: &str) -> Value {
    json!({
        "apiVersion": "aegis.dev/v1alpha1", "kind": "AegisPrefix", "metadata": {"name": name},
        "spec": {"cidr": cidr, "account": account},
    })
}

fn agent_pod(name: &str, namespace: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "nodeName": node, "serviceAccountName": AGENT, "automountServiceAccountToken": false,
            "containers": [{"name": "agent", "image": "agent"}],
        },
    })
}

/// Base64 as tokens have it.
fn pack(bytes: &[u8]) -> String {
    let text = json!(ByteString(bytes.to_vec()));
    text.as_str().expect("text").trim_end_matches('=').replace('+', "-").replace('/', "_")
}

fn unpack(text: &str) -> Vec<u8> {
    let mut text = text.replace('-', "+").replace('_', "/");
    text.extend(std::iter::repeat_n('=', (4 - text.len() % 4) % 4));
    serde_json::from_value::<ByteString>(text.into()).expect("base64").0
}
