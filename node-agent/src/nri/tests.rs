//! The plugin against a runtime that speaks the protocol as the reference does: one call at a time, and closed when it is late.

use super::frame::{self, Decoder, REQUEST, RESPONSE, TO_PLUGIN, TO_RUNTIME};
use super::messages::{
    Configure, Configured, OfPod, PLUGIN, PodSandbox, RUNTIME, Register, Request, Response, StateChange,
    Status, Synchronize, Synchronized, UNIMPLEMENTED,
};
use super::{Hook, Known, Plugin, Sandboxes, SessionError, keep};
use crate::metrics::Metrics;
use aegis_common::incarnation;
use prost::Message;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

const LIMIT: Duration = Duration::from_secs(10);
/// For so long the runtime waits for a plugin: containerd for 2 seconds unless it is told otherwise.
const PATIENCE: Duration = Duration::from_millis(800);
const A: &str = "10.244.1.7";

/// The runtime's end of a connection.
struct Runtime<S> {
    stream: S,
    decoder: Decoder,
    calls: u32,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Runtime<S> {
    /// Takes the registration and configures the plugin.
    async fn accept(stream: S) -> Runtime<S> {
        let mut runtime = Runtime { stream, decoder: Decoder::default(), calls: 0 };
        runtime.registration(None).await;
        let configure = Configure { runtime: "containerd".into(), version: "v2.4.2".into() };
        let answer = runtime.ask("Configure", &configure).await;
        assert_eq!(Configured::decode(answer.payload.as_slice()).unwrap().events, 0b111);
        runtime
    }

    async fn registration(&mut self, refusal: Option<Status>) {
        let (connection, message) = self.message().await;
        assert_eq!((connection, message.kind, message.stream), (TO_RUNTIME, REQUEST, 1));
        let request = Request::decode(message.body.as_slice()).unwrap();
        assert_eq!((request.service.as_str(), request.method.as_str()), (RUNTIME, "RegisterPlugin"));
        let register = Register::decode(request.payload.as_slice()).unwrap();
        assert_eq!((register.name.as_str(), register.index.as_str()), ("aegis", "90"));
        let response = Response { status: refusal, payload: Vec::new() };
        self.send(TO_RUNTIME, 1, RESPONSE, &response).await;
    }

    async fn send(&mut self, connection: u32, stream: u32, kind: u8, message: &impl Message) {
        let message = frame::Message { stream, kind, body: message.encode_to_vec() };
        self.stream.write_all(&frame::encode(connection, &message)).await.unwrap();
    }

    async fn message(&mut self) -> (u32, frame::Message) {
        let mut byte = [0];
        loop {
            assert_eq!(self.stream.read(&mut byte).await.unwrap(), 1, "closed");
            if let Some(message) = self.decoder.push(&byte).unwrap().pop() {
                return message;
            }
        }
    }

    async fn call(&mut self, service: &str, method: &str, message: &impl Message) -> Response {
        self.calls += 2;
        let (stream, payload) = (self.calls - 1, message.encode_to_vec());
        let timeout_nano = PATIENCE.as_nanos() as i64;
        let request = Request { service: service.into(), method: method.into(), payload, timeout_nano };
        self.send(TO_PLUGIN, stream, REQUEST, &request).await;
        let (connection, message) = self.message().await;
        assert_eq!((connection, message.kind, message.stream), (TO_PLUGIN, RESPONSE, stream));
        Response::decode(message.body.as_slice()).unwrap()
    }

    async fn ask(&mut self, method: &str, message: &impl Message) -> Response {
        let response = self.call(PLUGIN, method, message).await;
        assert_eq!(response.status, None, "{method}");
        response
    }

    async fn of_pod(&mut self, method: &str, pod: &PodSandbox) {
        self.ask(method, &OfPod { pod: Some(pod.clone()) }).await;
    }
}

fn pod(id: &str, uid: &str) -> PodSandbox {
    let ips = vec![A.into()];
    PodSandbox { id: id.into(), uid: uid.into(), name: "cart-0".into(), pid: 7, ips, ..PodSandbox::default() }
}

/// The data plane knows that this pod has the address.
fn know(sandboxes: &Sandboxes, uid: Option<&str>) {
    let address: IpAddr = A.parse().unwrap();
    let addresses = uid.map(|uid| (address, incarnation(uid))).into_iter().collect();
    sandboxes.publish(|known| {
        *known = Known { addresses, able: true };
        true
    });
}

fn plugin(sandboxes: &Sandboxes) -> (Plugin, Metrics) {
    let metrics = Metrics::default();
    (Plugin::new(sandboxes.clone(), metrics.clone(), LIMIT, || ()), metrics)
}

/// A plugin, and the runtime that has configured it.
async fn connected() -> (Runtime<DuplexStream>, Sandboxes, Metrics, JoinHandle<Result<(), SessionError>>) {
    let sandboxes = Sandboxes::default();
    know(&sandboxes, None);
    let (plugin, metrics) = plugin(&sandboxes);
    let (here, there) = duplex(1 << 16);
    let serving = tokio::spawn(async move { plugin.serve(there).await });
    (Runtime::accept(here).await, sandboxes, metrics, serving)
}

fn uids(sandboxes: &Sandboxes) -> Vec<String> {
    sandboxes.told(|_| true, 0).sandboxes.into_iter().map(|it| it.uid).collect()
}

#[tokio::test]
async fn a_pod_starts_once_the_data_plane_knows_it() {
    let (mut runtime, sandboxes, metrics, _serving) = connected().await;
    assert_eq!(sandboxes.hook(), Hook::Connected("containerd v2.4.2".into()));
    let knowing = {
        let sandboxes = sandboxes.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(200)).await;
            assert_eq!(uids(&sandboxes), ["u1"]);
            know(&sandboxes, Some("u1"));
        })
    };
    let begin = tokio::time::Instant::now();
    runtime.of_pod("RunPodSandbox", &pod("s1", "u1")).await;
    knowing.await.unwrap();
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(200) && took < PATIENCE * 3 / 4, "{took:?}");
    // Known already.
    runtime.of_pod("RunPodSandbox", &pod("s1", "u1")).await;
    let text = metrics.encode().unwrap();
    assert!(
        text.contains("aegis_runtime_hook_seconds_count{event=\"run\",outcome=\"in_force\"} 2"),
        "{text}"
    );
}

#[tokio::test]
async fn a_stopped_pods_address_is_given_back_once_the_data_plane_has_forgotten_the_pod() {
    let (mut runtime, sandboxes, _metrics, _serving) = connected().await;
    know(&sandboxes, Some("u1"));
    runtime.of_pod("RunPodSandbox", &pod("s1", "u1")).await;
    let forgetting = {
        let sandboxes = sandboxes.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let told = sandboxes.told(|_| true, 0);
            assert_eq!(told.ended, [(A.parse().unwrap(), "u1".to_owned())].into());
            know(&sandboxes, None);
        })
    };
    runtime.of_pod("StopPodSandbox", &pod("s1", "u1")).await;
    assert!(forgetting.is_finished());
    forgetting.await.unwrap();
    runtime.of_pod("RemovePodSandbox", &pod("s1", "u1")).await;
    assert!(uids(&sandboxes).is_empty());
}

#[tokio::test]
async fn a_pod_that_stays_unknown_starts_before_the_runtime_would_close_the_connection() {
    let (mut runtime, _sandboxes, metrics, _serving) = connected().await;
    let begin = tokio::time::Instant::now();
    runtime.of_pod("RunPodSandbox", &pod("s1", "u1")).await;
    let took = begin.elapsed();
    assert!(took >= PATIENCE * 3 / 4 && took < PATIENCE, "{took:?}");
    let text = metrics.encode().unwrap();
    assert!(text.contains("aegis_runtime_hook_seconds_count{event=\"run\",outcome=\"late\"} 1"), "{text}");
}

#[tokio::test]
async fn older_runtimes_say_the_same_as_changes_of_state() {
    let (mut runtime, sandboxes, _metrics, _serving) = connected().await;
    know(&sandboxes, Some("u1"));
    runtime.ask("StateChange", &StateChange { event: 1, pod: Some(pod("s1", "u1")) }).await;
    assert_eq!(uids(&sandboxes), ["u1"]);
    for event in [-1, 0, 5, 33, i32::MAX] {
        runtime.ask("StateChange", &StateChange { event, pod: Some(pod("s9", "u9")) }).await;
    }
    assert_eq!(uids(&sandboxes), ["u1"]);
    know(&sandboxes, None);
    runtime.ask("StateChange", &StateChange { event: 2, pod: Some(pod("s1", "u1")) }).await;
    assert!(uids(&sandboxes).is_empty());
}

#[tokio::test]
async fn what_there_was_before_comes_in_parts_and_without_the_dead() {
    let (mut runtime, sandboxes, _metrics, _serving) = connected().await;
    let dead = PodSandbox { pid: 0, ..pod("s0", "u0") };
    for (pods, more) in [(vec![dead, pod("s1", "u1")], true), (vec![pod("s2", "u2")], false)] {
        let answer = runtime.ask("Synchronize", &Synchronize { pods, more }).await;
        assert_eq!(Synchronized::decode(answer.payload.as_slice()).unwrap().more, more);
    }
    assert_eq!(uids(&sandboxes), ["u1", "u2"]);
}

#[tokio::test]
async fn what_is_not_known_is_refused_and_changes_nothing() {
    let (mut runtime, _sandboxes, _metrics, _serving) = connected().await;
    for (service, method) in [(PLUGIN, "CreateContainer"), ("other", "RunPodSandbox")] {
        let response = runtime.call(service, method, &OfPod::default()).await;
        assert_eq!(response.status.unwrap().code, UNIMPLEMENTED);
    }
    let garbage = Request { payload: vec![0xff; 3], ..Request::default() };
    let garbled = runtime.call(PLUGIN, "RunPodSandbox", &garbage).await;
    assert!(garbled.status.is_some() || garbled.payload.is_empty());
    runtime.ask("Shutdown", &OfPod::default()).await;
}

#[tokio::test]
async fn a_runtime_that_refuses_or_leaves_ends_the_connection() {
    let begin = || {
        let (plugin, _) = plugin(&Sandboxes::default());
        let (here, there) = duplex(1 << 16);
        (here, tokio::spawn(async move { plugin.serve(there).await }))
    };
    let (stream, serving) = begin();
    let mut runtime = Runtime { stream, decoder: Decoder::default(), calls: 0 };
    runtime.registration(Some(Status { code: 3, message: "invalid plugin index".into() })).await;
    let error = serving.await.unwrap().unwrap_err();
    assert!(matches!(&error, SessionError::Refused(why) if why == "invalid plugin index"), "{error}");

    let (stream, serving) = begin();
    drop(stream);
    assert!(serving.await.unwrap().is_err());

    let (runtime, _sandboxes, _metrics, serving) = connected().await;
    drop(runtime);
    assert!(matches!(serving.await.unwrap(), Err(SessionError::Closed)));
}

#[tokio::test]
async fn a_connection_that_is_lost_is_made_again_and_a_socket_waited_for() {
    let folder = std::env::temp_dir().join(format!("aegis-nri-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let socket: PathBuf = folder.join("nri.sock");
    let sandboxes = Sandboxes::default();
    let (plugin, _metrics) = plugin(&sandboxes);
    let (path, shared) = (socket.clone(), sandboxes.clone());
    let keeping = tokio::spawn(async move { keep(&path, &plugin, &shared).await });
    let is = async |hook: fn(&Hook) -> bool| {
        let reached = async {
            while !hook(&sandboxes.hook()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LIMIT, reached).await.unwrap_or_else(|_| panic!("{:?}", sandboxes.hook()));
    };
    is(|hook| *hook == Hook::NoSocket).await;
    let listener = UnixListener::bind(&socket).unwrap();
    for _ in 0..2 {
        let (stream, _) = listener.accept().await.unwrap();
        let mut runtime = Runtime::accept(stream).await;
        is(|hook| matches!(hook, Hook::Connected(_))).await;
        // What a late plugin sees: the runtime closes.
        know(&sandboxes, Some("u1"));
        runtime.of_pod("RunPodSandbox", &pod("s1", "u1")).await;
        drop(runtime);
        is(|hook| matches!(hook, Hook::Lost(_))).await;
        assert_eq!(uids(&sandboxes), ["u1"], "pods that run keep their names");
    }
    keeping.abort();
    std::fs::remove_dir_all(&folder).unwrap();
}
