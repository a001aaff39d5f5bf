//! A real etcd and kube-apiserver on loopback, with the operator's CRDs, for one test.
#![allow(dead_code)] // Each test binary uses a part of it.
#![allow(clippy::expect_used, clippy::panic)] // Helpers of tests fail the test.

pub mod objects;
pub mod process;
pub mod rights;

use aegis_crds::{
    AegisPrefix, EgressAddress, EgressAllocation, EgressApplication, EgressNode, EgressPolicy, ZoneBinding,
};
use k8s_openapi::ByteString;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, CustomResourceExt};
use process::{Process, free_port, log_file};
use serde_json::{Value, json};
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Mutex, MutexGuard};

/// User name of the operator's ServiceAccount, as the chart names it.
pub const OPERATOR: &str = "system:serviceaccount:aegis-system:aegis-operator";

/// One cluster at a time: each takes two cores for its start.
static ONE: Mutex<()> = Mutex::const_new(());

/// A control plane of its own.
pub struct Cluster {
    pub client: Client,
    pub dir: PathBuf,
    api_port: u16,
    etcd_port: u16,
    etcd: Process,
    api: Option<Process>,
    _one: MutexGuard<'static, ()>,
}

impl Cluster {
    /// Starts etcd and the API server, and installs the CRDs.
    pub async fn start() -> Cluster {
        let one = ONE.lock().await;
        let dir =
            std::env::temp_dir().join(format!("aegis-operator-test-{}-{}", std::process::id(), free_port()));
        std::fs::create_dir_all(&dir).expect("temporary directory");
        let (etcd_port, peer_port, api_port) = (free_port(), free_port(), free_port());
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let etcd = Process::spawn(
            &tool("etcd"),
            &[
                format!("--data-dir={}", dir.join("etcd").display()),
                format!("--listen-client-urls={}", url(etcd_port)),
                format!("--advertise-client-urls={}", url(etcd_port)),
                format!("--listen-peer-urls={}", url(peer_port)),
                format!("--initial-advertise-peer-urls={}", url(peer_port)),
                format!("--initial-cluster=default={}", url(peer_port)),
                "--unsafe-no-fsync".into(),
            ],
            &[],
            &log_file(&dir, "etcd"),
        );
        make_credentials(&dir, api_port);
        let client = client(&dir).await;
        let mut cluster = Cluster { client, dir, api_port, etcd_port, etcd, api: None, _one: one };
        cluster.start_api().await;
        cluster.install_crds().await;
        cluster
    }

    /// Starts the API server (again), and waits until it serves.
    pub async fn start_api(&mut self) {
        let arguments = [
            format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--service-account-key-file={}", self.dir.join("sa.pub").display()),
            format!("--service-account-signing-key-file={}", self.dir.join("sa.key").display()),
            "--service-cluster-ip-range=10.96.0.0/16".into(),
            format!("--cert-dir={}", self.dir.display()),
            format!("--token-auth-file={}", self.dir.join("tokens.csv").display()),
            "--authorization-mode=RBAC".into(),
            "--disable-admission-plugins=ServiceAccount".into(),
            "--endpoint-reconciler-type=none".into(),
            "--bind-address=127.0.0.1".into(),
            format!("--secure-port={}", self.api_port),
        ];
        self.api =
            Some(Process::spawn(&tool("kube-apiserver"), &arguments, &[], &log_file(&self.dir, "apiserver")));
        let client = self.client.clone();
        eventually("the API server serves", Duration::from_secs(90), async || {
            let request =
                http::Request::get("/readyz").body(Vec::new()).map_err(|error| error.to_string())?;
            client.request_text(request).await.map_err(|error| error.to_string())
        })
        .await;
    }

    /// Ends the API server; etcd keeps its data.
    pub fn stop_api(&mut self) {
        self.api = None;
    }

    /// What etcd has under a key, if that is JSON, as custom resources are.
    pub async fn etcd_get(&self, key: &str) -> Option<Value> {
        let answer = self.etcd("range", json!({"key": base64(key)})).await;
        let found: ByteString = serde_json::from_value(answer.pointer("/kvs/0/value")?.clone()).ok()?;
        serde_json::from_slice(&found.0).ok()
    }

    /// Writes JSON into etcd; the API server's watches deliver it.
    pub async fn etcd_put(&self, key: &str, value: &Value) {
        self.etcd("put", json!({"key": base64(key), "value": base64(&value.to_string())})).await;
    }

    async fn etcd(&self, call: &str, body: Value) -> Value {
        let (address, body) = (("127.0.0.1", self.etcd_port), body.to_string());
        let head = format!("POST /v3/kv/{call} HTTP/1.0\r\nContent-Length: {}\r\n\r\n", body.len());
        let mut stream = tokio::net::TcpStream::connect(address).await.expect("etcd");
        stream.write_all((head + &body).as_bytes()).await.expect("etcd");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("etcd");
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer of etcd");
        assert!(head.contains(" 200 "), "{answer}");
        serde_json::from_str(body).expect("JSON of etcd")
    }

    async fn install_crds(&self) {
        let crds: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        let all = [
            AegisPrefix::crd(),
            EgressAllocation::crd(),
            ZoneBinding::crd(),
            EgressAddress::crd(),
            EgressNode::crd(),
            EgressPolicy::crd(),
            EgressApplication::crd(),
        ];
        let expected = all.len();
        for crd in all {
            crds.create(&PostParams::default(), &crd).await.expect("CRD");
        }
        eventually("the CRDs are served", Duration::from_secs(30), async || {
            let list = crds.list(&Default::default()).await.map_err(|error| error.to_string())?;
            let established = list.items.iter().filter(|crd| {
                let conditions = crd.status.iter().filter_map(|status| status.conditions.as_ref()).flatten();
                conditions.into_iter().any(|it| it.type_ == "Established" && it.status == "True")
            });
            let count = established.count();
            if count == expected { Ok(()) } else { Err(format!("{count} of {expected} established")) }
        })
        .await;
    }

    /// Starts an operator that may do everything as a child process.
    pub async fn operator(&self, identity: &str, arguments: &[&str]) -> Operator {
        self.operator_as("admin", "default", identity, arguments).await
    }

    /// Starts an operator in the name of a user: `admin`, or `operator` with the rights that the chart gives it.
    pub async fn operator_as(
        &self,
        user: &str,
        namespace: &str,
        identity: &str,
        arguments: &[&str],
    ) -> Operator {
        let port = free_port();
        let mut all = vec![
            format!("--listen=127.0.0.1:{port}"),
            format!("--identity={identity}"),
            format!("--namespace={namespace}"),
        ];
        all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        let built = || env!("CARGO_BIN_EXE_aegis-operator").into();
        let program = PathBuf::from(std::env::var_os("AEGIS_OPERATOR").unwrap_or_else(built));
        let kubeconfig = self.dir.join(user);
        let environment = [("KUBECONFIG", kubeconfig.as_path())];
        let process = Process::spawn(&program, &all, &environment, &log_file(&self.dir, identity));
        let operator = Operator { process, port };
        eventually("the operator is ready", Duration::from_secs(30), async || operator.get("/readyz").await)
            .await;
        operator
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.api = None;
        self.etcd.kill();
        if std::thread::panicking() {
            eprintln!("logs of the failed test are in {}", self.dir.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// An operator that runs as a child process.
pub struct Operator {
    pub process: Process,
    pub port: u16,
}

impl Operator {
    /// Body of a page that it serves.
    pub async fn get(&self, path: &str) -> Result<String, String> {
        let text = |error: std::io::Error| error.to_string();
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await.map_err(text)?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: operator\r\n\r\n");
        stream.write_all(request.as_bytes()).await.map_err(text)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.map_err(text)?;
        match answer.split_once("\r\n\r\n") {
            Some((head, body)) if head.contains(" 200 ") => Ok(body.to_owned()),
            _ => Err(answer),
        }
    }

    /// Value of a metric, as it stands in the page with its labels.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let page = self.get("/metrics").await.ok()?;
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        line.trim().parse().ok()
    }

    /// Waits until it leads.
    pub async fn leads(&self) {
        eventually("the operator leads", Duration::from_secs(20), async || {
            match self.metric("aegis_operator_leader").await {
                Some(1.0) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }
}

/// Waits until the check succeeds; fails the test with its last objection after `limit`.
pub async fn eventually<T, E: Debug>(
    what: &str,
    limit: Duration,
    check: impl AsyncFn() -> Result<T, E>,
) -> T {
    let started = Instant::now();
    loop {
        match check().await {
            Ok(value) => return value,
            Err(error) if started.elapsed() > limit => panic!("{what}: not within {limit:?}: {error:?}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(25)).await,
        }
    }
}

/// Path of a Kubernetes program.
pub fn tool(name: &str) -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache/aegis/tools");
    let tools = std::env::var_os("AEGIS_TOOLS").map_or_else(home, PathBuf::from);
    let path = tools.join("bin").join(name);
    assert!(path.exists(), "{} is missing: `make setup` builds it, or set AEGIS_TOOLS", path.display());
    path
}

/// Text as etcd's JSON takes it.
fn base64(text: &str) -> Value {
    json!(ByteString(text.as_bytes().to_vec()))
}

fn make_credentials(dir: &Path, api_port: u16) {
    let openssl = |arguments: &[&str]| {
        let output = std::process::Command::new("openssl").args(arguments).current_dir(dir).output();
        let output = output.expect("openssl is needed to make a key");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    openssl(&["genrsa", "-out", "sa.key", "2048"]);
    openssl(&["rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub"]);
    let tokens =
        format!("admin,admin,admin,system:masters\noperator,{OPERATOR},operator,system:serviceaccounts\n");
    std::fs::write(dir.join("tokens.csv"), tokens).expect("tokens");
    for user in ["admin", "operator"] {
        let kubeconfig = format!(
            r#"apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: "https://127.0.0.1:{api_port}", insecure-skip-tls-verify: true}}}}]
users: [{{name: {user}, user: {{token: {user}}}}}]
contexts: [{{name: test, context: {{cluster: test, user: {user}}}}}]
current-context: test
"#
        );
        std::fs::write(dir.join(user), kubeconfig).expect("kubeconfig");
    }
}

async fn client(dir: &Path) -> Client {
    let kubeconfig = Kubeconfig::read_from(dir.join("admin")).expect("kubeconfig");
    let config =
        Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.expect("config");
    Client::try_from(config).expect("client")
}
