//! One connection to the runtime: registers, then answers what the runtime asks until the connection ends.

use super::frame::{self, Decoder, FrameError, REQUEST, RESPONSE, TO_PLUGIN, TO_RUNTIME};
use super::messages::{
    Configure, Configured, INVALID_ARGUMENT, OfPod, PLUGIN, PodSandbox, REMOVE_POD_SANDBOX, RUN_POD_SANDBOX,
    RUNTIME, Register, Request, Response, STOP_POD_SANDBOX, StateChange, Status, Synchronize, Synchronized,
    UNIMPLEMENTED,
};
use super::now;
use super::sandboxes::{Hook, Outcome, Sandboxes};
use crate::metrics::Metrics;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use prost::Message;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Name by which the runtime knows the plugin.
const NAME: &str = "aegis";
/// Its place among other plugins, which may still refuse the pod: behind most.
const INDEX: &str = "90";
/// The call by which it registers.
const REGISTRATION: u32 = 1;
/// Time for the runtime to configure a plugin that registers, and to tell it of all sandboxes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a connection has ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Reading or writing failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The peer does not keep to the protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A message cannot be read.
    #[error("not a message of the protocol: {0}")]
    Decode(#[from] prost::DecodeError),
    /// The runtime does not want the plugin.
    #[error("the runtime refuses to register the agent: {0}")]
    Refused(String),
    /// It says nothing.
    #[error("the runtime has not configured the agent in time")]
    Silent,
    /// It has closed the connection: it has ended, or this agent was slower than it waits.
    #[error("the runtime has closed the connection")]
    Closed,
}

/// What the runtime talks to.
pub struct Plugin {
    sandboxes: Sandboxes,
    metrics: Metrics,
    /// Longest time that a pod waits.
    limit: Duration,
    changed: Box<dyn Fn() + Send + Sync>,
    /// Parts of a list of all sandboxes that is not complete.
    parts: Mutex<Vec<PodSandbox>>,
}

impl Plugin {
    /// `changed` is called when the runtime has said something.
    pub fn new(
        sandboxes: Sandboxes,
        metrics: Metrics,
        limit: Duration,
        changed: impl Fn() + Send + Sync + 'static,
    ) -> Plugin {
        Plugin { sandboxes, metrics, limit, changed: Box::new(changed), parts: Mutex::default() }
    }

    /// Serves a connection until it ends.
    pub async fn serve(&self, stream: impl AsyncRead + AsyncWrite) -> Result<(), SessionError> {
        let (mut reader, mut writer) = tokio::io::split(stream);
        self.parts().clear();
        let register = Register { name: NAME.to_owned(), index: INDEX.to_owned() };
        let register = Request {
            service: RUNTIME.to_owned(),
            method: "RegisterPlugin".to_owned(),
            payload: register.encode_to_vec(),
            timeout_nano: i64::try_from(PATIENCE.as_nanos()).unwrap_or_default(),
        };
        let message = frame::Message { stream: REGISTRATION, kind: REQUEST, body: register.encode_to_vec() };
        writer.write_all(&frame::encode(TO_RUNTIME, &message)).await?;

        let mut decoder = Decoder::default();
        let mut answers: FuturesUnordered<BoxFuture<'_, (u32, Response)>> = FuturesUnordered::new();
        let mut buffer = vec![0; 1 << 16];
        let silent = tokio::time::sleep(PATIENCE);
        tokio::pin!(silent);
        loop {
            let registered = matches!(self.sandboxes.hook(), Hook::Connected(_));
            tokio::select! {
                read = reader.read(&mut buffer) => {
                    let length = read?;
                    if length == 0 {
                        return Err(SessionError::Closed);
                    }
                    for (connection, message) in decoder.push(&buffer[..length])? {
                        match (connection, message.kind, message.stream) {
                            (TO_RUNTIME, RESPONSE, REGISTRATION) => registered_by(&message.body)?,
                            (TO_PLUGIN, REQUEST, stream) => {
                                let request = Request::decode(message.body.as_slice())?;
                                answers.push(async move { (stream, self.answer(&request).await) }.boxed());
                            }
                            // Of a later version: nothing that was asked for.
                            _ => {}
                        }
                    }
                }
                Some((stream, response)) = answers.next() => {
                    let message = frame::Message { stream, kind: RESPONSE, body: response.encode_to_vec() };
                    writer.write_all(&frame::encode(TO_PLUGIN, &message)).await?;
                }
                () = &mut silent, if !registered => return Err(SessionError::Silent),
            }
        }
    }

    async fn answer(&self, request: &Request) -> Response {
        let answered = match request.service.as_str() {
            PLUGIN => self.call(request).await,
            _ => Ok(None),
        };
        match answered {
            Ok(Some(payload)) => Response { status: None, payload },
            Ok(None) => failed(UNIMPLEMENTED, format!("{}/{}", request.service, request.method)),
            Err(error) => failed(INVALID_ARGUMENT, error.to_string()),
        }
    }

    /// `None`: there is no such method.
    async fn call(&self, request: &Request) -> Result<Option<Vec<u8>>, prost::DecodeError> {
        let payload = request.payload.as_slice();
        let pod = |payload| OfPod::decode(payload).map(|message| message.pod.unwrap_or_default());
        let limit = limit(self.limit, request.timeout_nano);
        match request.method.as_str() {
            "Configure" => {
                let configure = Configure::decode(payload)?;
                tracing::info!(
                    runtime = configure.runtime,
                    version = configure.version,
                    "pods wait for the data plane to know them"
                );
                let runtime = format!("{} {}", configure.runtime, configure.version);
                self.sandboxes.set_hook(Hook::Connected(runtime.trim().to_owned()));
                let events = RUN_POD_SANDBOX | STOP_POD_SANDBOX | REMOVE_POD_SANDBOX;
                return Ok(Some(Configured { events }.encode_to_vec()));
            }
            "Synchronize" => {
                let list = Synchronize::decode(payload)?;
                return Ok(Some(self.synchronize(list).encode_to_vec()));
            }
            "RunPodSandbox" => self.run(&pod(payload)?, limit).await,
            "StopPodSandbox" => self.stop(&pod(payload)?, limit).await,
            "RemovePodSandbox" => self.remove(&pod(payload)?),
            "StateChange" => {
                let change = StateChange::decode(payload)?;
                let pod = change.pod.unwrap_or_default();
                // Numbers are from 1 on.
                match change.event.checked_sub(1).and_then(|event| 1i32.checked_shl(event.cast_unsigned())) {
                    Some(RUN_POD_SANDBOX) => self.run(&pod, limit).await,
                    Some(STOP_POD_SANDBOX) => self.stop(&pod, limit).await,
                    Some(REMOVE_POD_SANDBOX) => self.remove(&pod),
                    _ => {}
                }
            }
            "Shutdown" => {}
            _ => return Ok(None),
        }
        // The answers of all of these are empty.
        Ok(Some(Vec::new()))
    }

    fn synchronize(&self, list: Synchronize) -> Synchronized {
        let more = list.more;
        let mut parts = self.parts();
        parts.extend(list.pods);
        if !more {
            self.sandboxes.replaced(&parts, now());
            parts.clear();
            (self.changed)();
        }
        Synchronized { more }
    }

    async fn run(&self, pod: &PodSandbox, limit: Duration) {
        let begin = Instant::now();
        let waits = self.sandboxes.started(pod, now());
        (self.changed)();
        let Some(naming) = waits else { return };
        let outcome = self.sandboxes.in_force(&naming, limit).await;
        self.metrics.runtime_waited("run", outcome.word(), begin.elapsed().as_secs_f64());
        if outcome != Outcome::InForce {
            tracing::warn!(
                namespace = pod.namespace,
                name = pod.name,
                outcome = outcome.word(),
                "the pod starts before the data plane knows it; what it sends out of the cluster is held until then"
            );
        }
    }

    async fn stop(&self, pod: &PodSandbox, limit: Duration) {
        let begin = Instant::now();
        let waits = self.sandboxes.stopped(pod, now());
        (self.changed)();
        let Some(naming) = waits else { return };
        let outcome = self.sandboxes.over(&naming, limit).await;
        self.metrics.runtime_waited("stop", outcome.word(), begin.elapsed().as_secs_f64());
    }

    fn remove(&self, pod: &PodSandbox) {
        self.sandboxes.removed(pod);
        (self.changed)();
    }

    fn parts(&self) -> std::sync::MutexGuard<'_, Vec<PodSandbox>> {
        self.parts.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The runtime closes a plugin that is later than it waits, and all pods after that would start without it.
fn limit(limit: Duration, timeout_nano: i64) -> Duration {
    match u64::try_from(timeout_nano) {
        Ok(patience @ 1..) => limit.min(Duration::from_nanos(patience) * 3 / 4),
        _ => limit,
    }
}

fn registered_by(body: &[u8]) -> Result<(), SessionError> {
    match Response::decode(body)?.status {
        Some(status) if status.code != 0 => Err(SessionError::Refused(status.message)),
        _ => Ok(()),
    }
}

fn failed(code: i32, message: String) -> Response {
    Response { status: Some(Status { code, message }), payload: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_waits_for_less_than_the_runtime_does() {
        let two = Duration::from_secs(2);
        assert_eq!(limit(two, 0), two);
        assert_eq!(limit(two, -1), two);
        assert_eq!(limit(two, 2_000_000_000), Duration::from_millis(1500));
        assert_eq!(limit(two, 20_000_000_000), two);
    }
}
