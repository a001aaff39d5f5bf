//! The collector's own service and store, over HTTPS on loopback, that can be away, slow, or say no.

use crate::support::{NODE, T0, folder};
use aegis_usage::{Access, Denied, Level, Metrics, Pending, Prefix, Store, Viewer};
use aegis_usage_report::Report;
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::net::TcpSocket;
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

/// The time at the collector: all that the tests report is over, and not old.
pub const NOW: i64 = T0 + 3_600;

/// How long anything may take on a slow machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What becomes of a delivery.
#[derive(Clone)]
pub enum Step {
    /// It is answered so, with a Retry-After.
    Say(u16, Option<&'static str>),
    /// It is taken, and the answer gets lost.
    Lose,
    /// It is never answered.
    Hang,
    /// It is taken once somebody says so.
    Wait(Arc<Notify>),
}

/// When a delivery came, and the numbers of its reports.
pub type Came = (Instant, Vec<u64>);

/// What happens to those that come, one after the other; afterwards all are taken.
#[derive(Clone, Default)]
pub struct Script {
    pub steps: Arc<Mutex<VecDeque<Step>>>,
    /// A delivery with the report of this number is not understood.
    pub poison: Arc<Mutex<Option<u64>>>,
    /// Tokens that are believed.
    pub tokens: Arc<Mutex<BTreeSet<String>>>,
    /// Those that came.
    pub came: Arc<Mutex<Vec<Came>>>,
}

impl Script {
    pub fn believe(&self, tokens: &[&str]) {
        *self.tokens.lock().unwrap() = tokens.iter().map(|it| (*it).to_owned()).collect();
    }

    pub fn then(&self, steps: impl IntoIterator<Item = Step>) {
        self.steps.lock().unwrap().extend(steps);
    }
}

impl Access for Script {
    fn node<'a>(&'a self, token: &'a str) -> Pending<'a, Result<String, Denied>> {
        let known = self.tokens.lock().unwrap().contains(token);
        Box::pin(async move { if known { Ok(NODE.to_owned()) } else { Err(Denied::Unknown) } })
    }

    fn viewer<'a>(&'a self, _: &'a str, _: &'a [String]) -> Pending<'a, Result<Viewer, Denied>> {
        Box::pin(async { Err(Denied::Forbidden) })
    }

    fn prefixes(&self) -> Vec<Prefix> {
        Vec::new()
    }
}

async fn play(State(script): State<Script>, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let body = to_bytes(body, 1 << 24).await.unwrap();
    let reports: Vec<Report> = serde_json::from_slice(&body).unwrap();
    let numbers: Vec<u64> = reports.iter().map(|report| report.sequence).collect();
    script.came.lock().unwrap().push((Instant::now(), numbers.clone()));
    let poison = *script.poison.lock().unwrap();
    if poison.is_some_and(|poison| numbers.contains(&poison)) {
        return (StatusCode::BAD_REQUEST, "not a list of reports\n").into_response();
    }
    let step = script.steps.lock().unwrap().pop_front();
    let request = Request::from_parts(head, Body::from(body));
    match step {
        None => next.run(request).await,
        Some(Step::Say(status, wait)) => {
            let mut response = StatusCode::from_u16(status).unwrap().into_response();
            if let Some(wait) = wait {
                response.headers_mut().insert(header::RETRY_AFTER, wait.parse().unwrap());
            }
            response
        }
        Some(Step::Lose) => {
            assert_eq!(next.run(request).await.status(), StatusCode::OK);
            StatusCode::BAD_GATEWAY.into_response()
        }
        Some(Step::Hang) => std::future::pending().await,
        Some(Step::Wait(until)) => {
            until.notified().await;
            next.run(request).await
        }
    }
}

/// A certificate for 127.0.0.1 that is its own authority.
pub struct Certificate {
    pub chain: PathBuf,
    key: PathBuf,
}

impl Certificate {
    pub fn new(folder: &Path, name: &str) -> Certificate {
        let (chain, key) = (folder.join(format!("{name}.crt")), folder.join(format!("{name}.key")));
        let mut openssl = Command::new("openssl");
        openssl.args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ]);
        openssl.args(["-subj", &format!("/CN={name}"), "-addext", "subjectAltName=IP:127.0.0.1"]);
        openssl
            .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout"])
            .arg(&key)
            .arg("-out")
            .arg(&chain);
        let output = openssl.output().expect("openssl");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Certificate { chain, key }
    }

    fn acceptor(&self) -> TlsAcceptor {
        let chain: Vec<_> = CertificateDer::pem_file_iter(&self.chain).unwrap().map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_file(&self.key).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config =
            ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        TlsAcceptor::from(Arc::new(config.with_no_client_auth().with_single_cert(chain, key).unwrap()))
    }
}

/// The service at an address that stays its own while it is away.
pub struct Service {
    pub store: Arc<Store>,
    pub script: Script,
    pub address: SocketAddr,
    router: Router,
    /// Bound, but it does not listen: whoever connects is refused, and nobody else gets the port.
    _held: TcpSocket,
    folder: TempDir,
    running: Option<JoinHandle<()>>,
}

impl Service {
    pub fn new() -> Service {
        let folder = folder("collector");
        let store = Arc::new(Store::sqlite(folder.path().join("use.db"), PATIENCE).unwrap());
        let script = Script::default();
        script.believe(&["token"]);
        let access = Arc::new(script.clone());
        let router = aegis_usage::router(store.clone(), access, Arc::new(|| NOW), Metrics::new());
        let router = router.layer(from_fn_with_state(script.clone(), play));
        let held = socket(([127, 0, 0, 1], 0).into());
        let address = held.local_addr().unwrap();
        Service { store, script, address, router, _held: held, folder, running: None }
    }

    pub fn certificate(&self, name: &str) -> Certificate {
        Certificate::new(self.folder.path(), name)
    }

    /// Begins to serve.
    pub fn start(&mut self, certificate: &Certificate) {
        let (acceptor, router) = (certificate.acceptor(), self.router.clone());
        let listener = socket(self.address).listen(128).unwrap();
        self.running = Some(tokio::spawn(async move {
            // They end with it.
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, router) = (acceptor.clone(), router.clone());
                connections.spawn(async move {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        let service = TowerToHyperService::new(router);
                        let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                    }
                });
            }
        }));
    }

    /// Ends at once, with all connections.
    pub async fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.abort();
            let _ = running.await;
        }
    }

    /// Begins of the slots that the node has reported, each with how many reports, in order.
    pub fn covered(&self) -> Vec<(i64, i64)> {
        let covered = self.store.coverage(Level::Tens, T0, T0 + 7_200, 10_000).unwrap();
        covered.iter().map(|it| (it.slot, it.samples)).collect()
    }

    /// Numbers of the first and last report of each gap.
    pub fn gaps(&self) -> Vec<(i64, i64)> {
        let gaps = self.store.gaps(T0, T0 + 7_200, 10_000).unwrap();
        gaps.iter().map(|it| (it.first, it.last)).collect()
    }
}

fn socket(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.set_reuseport(true).unwrap();
    socket.bind(address).unwrap();
    socket
}
