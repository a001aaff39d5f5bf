//! The program, and what is sent to it.

use crate::process::Process;
use crate::world::World;
use aegis_usage_report::{Figures, Key, Protocol, Report, Row, VERSION};
use http::{Request, StatusCode, header};
use kube::client::Body;
use kube::{Client, Config};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long anything may take on a slow machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A collector that runs as a child process.
pub struct Collector {
    pub process: Process,
    client: Client,
    probes: String,
    pub folder: PathBuf,
    pub log: PathBuf,
}

impl Collector {
    /// Starts one with a new store, and waits until it is ready.
    pub async fn start(world: &World, arguments: &[&str]) -> Collector {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let folder = world.folder().join(format!("collector-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&folder).expect("folder");
        Collector::start_in(world, folder, arguments).await
    }

    /// Starts one with the store of a folder.
    pub async fn start_in(world: &World, folder: PathBuf, arguments: &[&str]) -> Collector {
        let mut all = vec!["--listen=127.0.0.1:0".into(), "--metrics-listen=127.0.0.1:0".into()];
        all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        let (kubeconfig, database) = (world.collector().await, folder.join("use.db"));
        let environment = [("KUBECONFIG", kubeconfig.as_path()), ("AEGIS_DATABASE", database.as_path())];
        let log = folder.join("log");
        let _ = std::fs::remove_file(&log);
        let process = Process::spawn(&program(), &all, &environment, &log);
        let served = eventually("it listens", async || said(&log, "reports are taken")).await;
        let probes = eventually("it serves metrics", async || said(&log, "metrics are served")).await;
        let scheme = if served["tls"] == true { "https" } else { "http" };
        let url = format!("{scheme}://{}", served["address"].as_str().expect("address"));
        let client = client(&url, None);
        let probes = format!("http://{}", probes["address"].as_str().expect("address"));
        let collector = Collector { process, client, probes, folder, log };
        eventually("it is ready", async || collector.probe("/readyz").await).await;
        collector
    }

    /// A page beside the service.
    pub async fn probe(&self, path: &str) -> Result<String, String> {
        match get(&client(&self.probes, None), path).await {
            Ok((StatusCode::OK, page)) => Ok(page),
            other => Err(format!("{other:?}")),
        }
    }

    /// Value of a metric, as it stands in the page with its labels; 0 if it is not there.
    pub async fn metric(&self, name: &str) -> f64 {
        let page = self.probe("/metrics").await.expect("metrics");
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.trim().parse().expect(value))
    }

    /// Posts, and returns status and body.
    pub async fn post(&self, path: &str, token: &str, body: Value) -> (StatusCode, String) {
        self.try_post(path, token, body).await.expect("an answer")
    }

    pub async fn try_post(
        &self,
        path: &str,
        token: &str,
        body: Value,
    ) -> Result<(StatusCode, String), kube::Error> {
        let mut request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
        if !token.is_empty() {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        send(&self.client, request.body(Body::from(body.to_string().into_bytes())).expect("request")).await
    }

    /// Gets a page of the service, and returns status and body.
    pub async fn get(&self, path: &str, token: &str) -> (StatusCode, String) {
        let mut request = Request::get(path);
        if !token.is_empty() {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        send(&self.client, request.body(Body::empty()).expect("request")).await.expect("an answer")
    }

    pub async fn deliver(&self, token: &str, reports: &[Report]) -> (StatusCode, String) {
        self.post("/v1/reports", token, json!(reports)).await
    }

    pub async fn ask(&self, token: &str, question: &str) -> (StatusCode, Value) {
        let (status, body) = self.post("/v1/graphql", token, json!({ "query": question })).await;
        (status, serde_json::from_str(&body).unwrap_or(Value::String(body)))
    }

    /// Accounts and pods with ports in use that somebody sees.
    pub async fn sees(&self, token: &str, more: &str) -> Vec<(String, String)> {
        let (status, answer) = self.ask(token, &usage(&format!("by: [ACCOUNT, POD]{more}"))).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        let nodes = answer["data"]["usage"]["nodes"].as_array().unwrap_or_else(|| panic!("{answer}"));
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        nodes.iter().map(|node| (text(&node["by"][0]), text(&node["by"][1]))).collect()
    }
}

/// The program that is tested.
pub fn program() -> PathBuf {
    env!("CARGO_BIN_EXE_aegis-collector").into()
}

/// A client of a server whose certificate is by `authority`, in DER.
pub fn client(url: &str, authority: Option<Vec<u8>>) -> Client {
    let mut config = Config::new(url.parse().expect(url));
    config.root_cert = authority.map(|authority| vec![authority]);
    config.connect_timeout = Some(PATIENCE);
    config.read_timeout = Some(PATIENCE);
    // "Not now" is an answer, too.
    config.default_retry = false;
    Client::try_from(config).expect("client")
}

/// Status and body of a page.
pub async fn get(client: &Client, path: &str) -> Result<(StatusCode, String), kube::Error> {
    send(client, Request::get(path).body(Body::empty()).expect("request")).await
}

async fn send(client: &Client, request: Request<Body>) -> Result<(StatusCode, String), kube::Error> {
    let response = client.send(request).await?;
    let status = response.status();
    let body = response.into_body().collect_bytes().await?;
    Ok((status, String::from_utf8(body.to_vec()).expect("UTF-8")))
}

/// What was logged with these words.
pub fn said(log: &Path, words: &str) -> Result<Value, String> {
    let text = std::fs::read_to_string(log).map_err(|error| error.to_string())?;
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.into_iter().find(|line| line["message"] == words).ok_or_else(|| text.clone())
}

/// Waits until the check succeeds; fails the test with its last objection after a while.
pub async fn eventually<T>(what: &str, check: impl AsyncFn() -> Result<T, String>) -> T {
    let started = Instant::now();
    loop {
        match check().await {
            Ok(value) => return value,
            Err(error) if started.elapsed() > PATIENCE => panic!("{what}: not within {PATIENCE:?}: {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// A report with a number, of a slot that has just ended, with ports of these accounts in use.
pub fn report(node: &str, sequence: u64, accounts: &[&str]) -> Report {
    let from = jiff::Timestamp::now().as_second() / 10 * 10 - 10;
    let rows = accounts.iter().map(|account| Row {
        key: Key {
            address: Some(address(account)),
            origin: Some(([198, 51, 100, account.len() as u8], 443).into()),
            protocol: Protocol::Tcp,
            rule: format!("binding/{account}-rule"),
            account: (*account).into(),
            allocation: "partner".into(),
            site: String::new(),
            pod: format!("{account}-pod"),
        },
        figures: Figures { in_use: 4_242, peak: 4_242, refused: BTreeMap::new(), ..Figures::default() },
    });
    Report {
        version: VERSION,
        node: node.into(),
        boot: "boot".into(),
        sequence,
        from,
        to: from + 10,
        rows: rows.collect(),
    }
}

/// x has an address that the parent lends, y one of the range that somebody grabs in vain.
fn address(account: &str) -> std::net::IpAddr {
    if account == "x" { [192, 0, 2, 1].into() } else { [203, 0, 113, 77].into() }
}

/// A question about ports in use of the last hour.
pub fn usage(arguments: &str) -> String {
    let now = jiff::Timestamp::now().as_second() / 10 * 10 + 600;
    let at = |second: i64| jiff::Timestamp::from_second(second).expect("time");
    let (from, to) = (at(now - 3_600), at(now));
    format!(
        "{{ usage(from: \"{from}\", to: \"{to}\", level: TENS, figures: [{{measure: IN_USE, aggregation: MAX}}], {arguments}) \
         {{ nodes {{ by figures }} pageInfo {{ endCursor }} }} }}"
    )
}
