//! Who acts: each with a token that the API server made.

use aegis_tests::apiserver::{ApiServer, NAMESPACE};
use kube::config::AuthInfo;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Path of the resources.
pub const GROUP: &str = "/apis/aegis.dev/v1alpha1";

/// Accounts with the labels of their namespaces. Each has a service account `owner` that may do there what `aegis-editor` says.
const ACCOUNTS: [(&str, &str); 7] = [
    ("shop", ""),
    ("bank", ""),
    ("kiosk", "team: money"),
    ("thief", ""),
    ("gold", "tier: gold, team: red"),
    ("silver", "tier: silver"),
    ("suspended", "tier: gold, suspended: 'yes'"),
];

const PREFIXES: &str = "{apiVersion: aegis.dev/v1alpha1, kind: AegisPrefix, metadata: {name: leased}, spec: {
  cidr: 203.0.113.0/28, account: shop, delegations: [
    {name: bank, account: bank, maxAddresses: 2},
    {name: money, namespaceSelector: {matchLabels: {team: money}}, maxAddresses: 1}]}}
---
{apiVersion: aegis.dev/v1alpha1, kind: AegisPrefix, metadata: {name: private}, spec: {cidr: 203.0.113.16/28, account: shop}}
---
{apiVersion: aegis.dev/v1alpha1, kind: AegisPrefix, metadata: {name: graded}, spec: {
  cidr: 203.0.113.32/28, account: shop, delegations: [{name: gold, maxAddresses: 1, namespaceSelector: {matchExpressions: [
    {key: tier, operator: In, values: [gold, platinum]}, {key: suspended, operator: DoesNotExist}]}}]}}
---
{apiVersion: aegis.dev/v1alpha1, kind: AegisPrefix, metadata: {name: elsewhere}, spec: {
  cidr: 203.0.113.48/28, account: shop, delegations: [{name: others, maxAddresses: 1, namespaceSelector: {matchExpressions: [
    {key: team, operator: NotIn, values: [money]}, {key: team, operator: Exists}]}}]}}
---
{apiVersion: aegis.dev/v1alpha1, kind: AegisPrefix, metadata: {name: own}, spec: {
  cidr: 203.0.113.64/28, account: elsewhere, source: BringYourOwn, proof: ROA-64}}
---
{apiVersion: aegis.dev/v1alpha1, kind: EgressAllocation, metadata: {name: standing, namespace: bank}, spec: {prefixes: [leased]}}
---
{apiVersion: aegis.dev/v1alpha1, kind: EgressAllocation, metadata: {name: standing, namespace: thief}, spec: {prefixes: [later]}}";

/// The owner of `leased` may read that one prefix: the way that docs/operations.md shows. And somebody lends prefixes.
const GRANTS: &str =
    "{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole, metadata: {name: read-leased}, rules: [
  {apiGroups: [aegis.dev], resources: [aegisprefixes], resourceNames: [leased], verbs: [get, list, watch]}]}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: read-leased},
 roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: read-leased},
 subjects: [{kind: ServiceAccount, name: owner, namespace: shop}]}
---
{apiVersion: v1, kind: Namespace, metadata: {name: platform}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: lender, namespace: platform}}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: lender},
 roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: aegis-prefix-admin},
 subjects: [{kind: ServiceAccount, name: lender, namespace: platform}]}";

/// What somebody asks of the API server.
pub struct Request {
    pub method: &'static str,
    pub path: String,
    pub body: Value,
    /// In whose name, if it is not one's own.
    pub impersonate: Option<&'static str>,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path)?;
        if !self.body.is_null() {
            write!(f, " {}", self.body)?;
        }
        self.impersonate.map_or(Ok(()), |user| write!(f, " as {user}"))
    }
}

/// A client with one token.
pub struct Caller(kube::Client);

impl Caller {
    /// The answer, or the message of the refusal.
    pub async fn run(&self, request: &Request) -> Result<Value, String> {
        let (method, kind) = match request.method {
            "PATCH" => ("PATCH", "application/merge-patch+json"),
            "APPLY" => ("PATCH", "application/apply-patch+yaml"),
            other => (other, "application/json"),
        };
        let separator = if request.path.contains('?') { '&' } else { '?' };
        let path = match request.method {
            "APPLY" => format!("{}{separator}fieldManager=tests", request.path),
            _ => request.path.clone(),
        };
        let mut builder = http::Request::builder().method(method).uri(path).header("Content-Type", kind);
        if let Some(user) = request.impersonate {
            builder = builder.header("Impersonate-User", user);
        }
        let body = if request.body.is_null() { Vec::new() } else { request.body.to_string().into_bytes() };
        let request = builder.body(body).expect("a request");
        match self.0.request::<Value>(request).await {
            Ok(value) => Ok(value),
            Err(kube::Error::Api(status)) => Err(status.message),
            Err(error) => panic!("the API server does not answer: {error}"),
        }
    }

    async fn call(&self, method: &'static str, path: &str, body: Value) -> Result<Value, String> {
        self.run(&Request { method, path: path.to_owned(), body, impersonate: None }).await
    }

    pub async fn get(&self, path: &str) -> Result<Value, String> {
        self.call("GET", path, Value::Null).await
    }

    pub async fn create(&self, path: &str, body: Value) -> Result<Value, String> {
        self.call("POST", path, body).await
    }

    pub async fn patch(&self, path: &str, body: Value) -> Result<Value, String> {
        self.call("PATCH", path, body).await
    }

    pub async fn apply(&self, path: &str, body: Value) -> Result<Value, String> {
        self.call("APPLY", path, body).await
    }

    pub async fn delete(&self, path: &str) -> Result<Value, String> {
        self.call("DELETE", path, Value::Null).await
    }
}

/// Everybody, and the server that they talk to.
pub struct People {
    callers: BTreeMap<&'static str, Caller>,
    _server: Arc<ApiServer>,
}

impl People {
    pub async fn new() -> People {
        let server = ApiServer::shared(&[]).expect("start the API server");
        let mut objects = GRANTS.to_owned();
        for (name, labels) in ACCOUNTS {
            objects += &format!(
                "\n---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}, labels: {{{labels}}}}}}}
---
{{apiVersion: v1, kind: ServiceAccount, metadata: {{name: owner, namespace: {name}}}}}
---
{{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {{name: owner, namespace: {name}}},
 roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: aegis-editor}},
 subjects: [{{kind: ServiceAccount, name: owner, namespace: {name}}}]}}"
            );
        }
        for node in ["n1", "n2"] {
            objects += &format!(
                "\n---\n{{apiVersion: v1, kind: Node, metadata: {{name: {node}}}}}
---
{{apiVersion: v1, kind: Pod, metadata: {{namespace: {NAMESPACE}, name: agent-{node}}},
 spec: {{nodeName: {node}, serviceAccountName: aegis-node-agent, containers: [{{name: agent, image: agent}}]}}}}"
            );
        }
        server.provide(&objects).expect("create accounts and rights");
        server.provide(PREFIXES).expect("create prefixes");
        let mut callers = BTreeMap::new();
        callers.insert("admin", Caller(server.client().await.expect("client")));
        let pod = ["--bound-object-kind=Pod", "--bound-object-name=agent-n1"];
        callers.insert("agent", caller(&server, "aegis-node-agent", NAMESPACE, &pod).await);
        callers.insert("lender", caller(&server, "lender", "platform", &[]).await);
        for (name, _) in ACCOUNTS {
            callers.insert(name, caller(&server, "owner", name, &[]).await);
        }
        let people = People { callers, _server: server };
        people.ready().await;
        people
    }

    /// The API server takes policies, and what they are about, up within a second or so.
    async fn ready(&self) {
        for (who, prefix) in
            [("thief", "leased"), ("thief", "private"), ("thief", "graded"), ("thief", "elsewhere")]
        {
            let path = format!("{}?dryRun=All", allocations(who));
            let body = allocation("probe", json!({"prefixes": [prefix]}));
            self.eventually("the policy is in force", async || {
                match self.of(who).create(&path, body.clone()).await {
                    Err(error) if error.contains("is not delegated to account") => Ok(()),
                    other => Err(format!("{other:?}")),
                }
            })
            .await;
        }
        let other = json!({"apiVersion": "aegis.dev/v1alpha1", "kind": "EgressNode", "metadata": {"name": "probe"}, "spec": {}});
        let path = format!("{GROUP}/egressnodes?dryRun=All");
        self.eventually("the agents' policy is in force", async || {
            match self.of("agent").create(&path, other.clone()).await {
                Err(error) if error.contains("is written by the node agent") => Ok(()),
                found => Err(format!("{found:?}")),
            }
        })
        .await;
    }

    /// Repeats until it succeeds, at most 30 s.
    pub async fn eventually<T>(&self, what: &str, check: impl AsyncFn() -> Result<T, String>) -> T {
        let limit = Instant::now() + Duration::from_secs(30);
        loop {
            match check().await {
                Ok(found) => return found,
                Err(error) => assert!(Instant::now() < limit, "{what}: not within 30 s: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    pub fn of(&self, who: &str) -> &Caller {
        self.callers.get(who).unwrap_or_else(|| panic!("nobody is called {who}"))
    }

    pub fn admin(&self) -> &Caller {
        self.of("admin")
    }
}

async fn caller(server: &ApiServer, account: &str, namespace: &str, more: &[&str]) -> Caller {
    let arguments = [&["create", "token", account, "-n", namespace], more].concat();
    let token = server.kubectl(&arguments).expect("create a token").trim().to_owned();
    let file = kube::config::Kubeconfig::read_from(server.kubeconfig()).expect("kubeconfig");
    let mut config =
        kube::Config::from_custom_kubeconfig(file, &Default::default()).await.expect("configuration");
    config.auth_info = AuthInfo { token: Some(token.into()), ..AuthInfo::default() };
    Caller(kube::Client::try_from(config).expect("client"))
}

/// An `EgressAllocation`.
pub fn allocation(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "aegis.dev/v1alpha1", "kind": "EgressAllocation", "metadata": {"name": name}, "spec": spec})
}

/// A change of a prefix's delegations.
pub fn prefix_patch(delegations: Value) -> Value {
    json!({"spec": {"delegations": delegations}})
}

/// Path of an account's allocations.
pub fn allocations(account: &str) -> String {
    format!("{GROUP}/namespaces/{account}/egressallocations")
}

/// Path of an account's bindings.
pub fn bindings(account: &str) -> String {
    format!("{GROUP}/namespaces/{account}/zonebindings")
}
