//! Takes commands and carries them out; groups and jobs live on when the caller is gone.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::task::AbortHandle;

use crate::command::Command;
use crate::connections::{self, Churn, milliseconds};
use crate::datagrams::{self, Question, Stream};
use crate::listener::{self, Shared};
use crate::{failure, forge, ping, transfer};

/// A job that runs until it is stopped.
struct Job {
    tasks: Vec<AbortHandle>,
    statistics: Box<dyn Fn() -> Value + Send + Sync>,
}

impl Drop for Job {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// What outlives one command.
#[derive(Default)]
struct Server {
    records: Shared,
    groups: tokio::sync::Mutex<HashMap<String, Vec<TcpStream>>>,
    jobs: Mutex<HashMap<String, Job>>,
}

/// Serves until SIGTERM.
pub fn run(ports: &str, control: &str) -> anyhow::Result<()> {
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let server = Arc::new(Server::default());
        for port in range(ports)? {
            listener::start(port, &server.records)?;
        }
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            result = accept(control, server) => result,
            _ = terminate.recv() => Ok(()),
        }
    })
}

/// `7000-7009` or `8080`.
fn range(text: &str) -> anyhow::Result<std::ops::RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last): (u16, u16) = (first.parse()?, last.parse()?);
    if first > last {
        bail!("ports {text}: the first is above the last");
    }
    Ok(first..=last)
}

/// Thousands of connections need more descriptors than the usual soft limit.
fn raise_descriptor_limit() {
    // SAFETY: the structure is passed by pointer and outlives both calls.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

async fn accept(control: &str, server: Arc<Server>) -> anyhow::Result<()> {
    if control.starts_with('/') {
        let _ = std::fs::remove_file(control);
        let listener = UnixListener::bind(control).with_context(|| format!("listen on {control}"))?;
        loop {
            let (stream, _) = listener.accept().await?;
            tokio::spawn(converse(stream, server.clone()));
        }
    }
    let listener = TcpListener::bind(control).await.with_context(|| format!("listen on {control}"))?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(converse(stream, server.clone()));
    }
}

async fn converse(stream: impl AsyncRead + AsyncWrite, server: Arc<Server>) {
    let (reader, mut writer) = tokio::io::split(stream);
    let mut lines = tokio::io::BufReader::new(reader).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let answer = match serde_json::from_str(&line) {
            Ok(command) => server.carry_out(command).await,
            Err(error) => Err(error.into()),
        };
        let mut text = answer.unwrap_or_else(|error| json!({"error": format!("{error:#}")})).to_string();
        text.push('\n');
        if writer.write_all(text.as_bytes()).await.is_err() {
            return;
        }
    }
}

impl Server {
    async fn carry_out(&self, command: Command) -> anyhow::Result<Value> {
        let ms = Duration::from_millis;
        Ok(match command {
            Command::Hello => json!({"ok": true}),
            Command::Open { name, to, count, parallel, timeout_ms } => {
                let (streams, answer) = connections::open(to, count, parallel, ms(timeout_ms)).await;
                self.groups.lock().await.entry(name).or_default().extend(streams);
                answer
            }
            Command::Exchange { name, timeout_ms } => {
                let mut streams = self.take_group(&name).await?;
                let answer = connections::exchange(&mut streams, ms(timeout_ms)).await;
                self.groups.lock().await.entry(name).or_default().append(&mut streams);
                answer
            }
            Command::Close { name, reset, count } => {
                let mut streams = self.take_group(&name).await?;
                let rest = streams.split_off(count.unwrap_or(streams.len()).min(streams.len()));
                if !rest.is_empty() {
                    self.groups.lock().await.insert(name, rest);
                }
                connections::close(streams, reset)
            }
            Command::Connect { to, timeout_ms } => connections::connect(to, ms(timeout_ms)).await,
            Command::Udp { to, connected, bytes, reply_bytes, port, timeout_ms } => {
                datagrams::ask(&Question { to, connected, bytes, reply_bytes, port, limit: ms(timeout_ms) })
                    .await
            }
            Command::Ping { to, count, bytes, identifier, timeout_ms } => {
                tokio::task::spawn_blocking(move || ping::ping(to, count, bytes, identifier, ms(timeout_ms)))
                    .await??
            }
            Command::Download { to, bytes, timeout_ms } => {
                transferred(bytes, failure::within(ms(timeout_ms), transfer::download(to, bytes))).await
            }
            Command::Upload { to, bytes, timeout_ms } => {
                transferred(bytes, failure::within(ms(timeout_ms), transfer::upload(to, bytes))).await
            }
            Command::Forge { from, to, protocol, count } => {
                json!({"sent": forge::send(from, to, protocol, count)?})
            }
            Command::Churn { name, to, parallel, pause_ms, timeout_ms } => {
                let statistics = Arc::new(Mutex::new(Churn::default()));
                let task =
                    || tokio::spawn(connections::churn(to, ms(pause_ms), ms(timeout_ms), statistics.clone()));
                let tasks = (0..parallel.max(1)).map(|_| task().abort_handle()).collect();
                self.start(name, tasks, move || lock(&statistics).answer())?
            }
            Command::Stream { name, to, interval_ms, bytes, echo } => {
                let statistics = Arc::new(Mutex::new(Stream::new()));
                let task =
                    tokio::spawn(datagrams::stream(to, ms(interval_ms), bytes, echo, statistics.clone()));
                self.start(name, vec![task.abort_handle()], move || lock(&statistics).answer())?
            }
            Command::Statistics { name } => {
                let jobs = lock(&self.jobs);
                (jobs.get(&name).with_context(|| format!("no job {name:?}"))?.statistics)()
            }
            Command::Stop { name } => {
                let job = lock(&self.jobs).remove(&name).with_context(|| format!("no job {name:?}"))?;
                (job.statistics)()
            }
            Command::Summary => {
                let records = listener::lock(&self.records);
                json!({"tcp": records.tcp(), "udp": records.udp()})
            }
            Command::Records { source } => {
                let records = listener::lock(&self.records);
                json!({"tcp": records.connections(source), "udp": records.datagrams(source)})
            }
            Command::Reset => {
                listener::lock(&self.records).reset();
                json!({})
            }
        })
    }

    async fn take_group(&self, name: &str) -> anyhow::Result<Vec<TcpStream>> {
        self.groups.lock().await.remove(name).with_context(|| format!("no connections {name:?}"))
    }

    fn start(
        &self,
        name: String,
        tasks: Vec<AbortHandle>,
        statistics: impl Fn() -> Value + Send + Sync + 'static,
    ) -> anyhow::Result<Value> {
        let job = Job { tasks, statistics: Box::new(statistics) };
        let mut jobs = lock(&self.jobs);
        if jobs.contains_key(&name) {
            bail!("job {name:?} runs already");
        }
        jobs.insert(name, job);
        Ok(json!({}))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn transferred(bytes: u64, work: impl Future<Output = std::io::Result<()>>) -> Value {
    let begin = Instant::now();
    let result = work.await;
    let ms = milliseconds(begin.elapsed());
    match result {
        Ok(()) => json!({"ok": true, "bytes": bytes, "ms": ms}),
        Err(error) => json!({"ok": false, "bytes": bytes, "ms": ms, "failure": failure::kind(&error)}),
    }
}

/// Sends one command to a running `serve` and prints the answer; a refused command is an error.
pub fn call(control: &str, request: &str) -> anyhow::Result<()> {
    let answer = if control.starts_with('/') {
        ask(std::os::unix::net::UnixStream::connect(control)?, request)?
    } else {
        ask(std::net::TcpStream::connect(control)?, request)?
    };
    println!("{answer}");
    let value: Value = serde_json::from_str(&answer).context("the answer is no JSON")?;
    match value.get("error").and_then(Value::as_str) {
        Some(error) => bail!("{error}"),
        None => Ok(()),
    }
}

fn ask(mut stream: impl Read + Write, request: &str) -> anyhow::Result<String> {
    // The request may be spread over lines; the protocol wants one.
    let request: Value = serde_json::from_str(request).context("the request is no JSON")?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    if answer.is_empty() {
        bail!("no answer");
    }
    Ok(answer.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_ranges() {
        assert_eq!(range("7000-7009").unwrap(), 7000..=7009);
        assert_eq!(range("8080").unwrap(), 8080..=8080);
        for bad in ["2-1", "x", "1-70000", ""] {
            assert!(range(bad).is_err(), "{bad}");
        }
    }

    /// The real server and the real client on loopback.
    #[tokio::test]
    async fn connections_are_held_exchanged_and_recorded() {
        // A port that is free right now may be somebody else's a moment later; then another one will do.
        let start = |_| {
            let port = std::net::TcpListener::bind("127.0.0.1:0").ok()?.local_addr().ok()?.port();
            let server = Server::default();
            listener::start(port, &server.records).ok()?;
            Some((port, server))
        };
        let (port, server) = (0..20).find_map(start).unwrap();
        let run = async |text: String| server.carry_out(serde_json::from_str(&text).unwrap()).await.unwrap();
        let to = format!("127.0.0.1:{port}");
        let opened = run(format!(r#"{{"do":"open","name":"g","to":"{to}","count":20}}"#)).await;
        assert_eq!(opened["opened"], 20, "{opened}");
        assert_eq!(run(r#"{"do":"exchange","name":"g"}"#.into()).await["answered"], 20);
        let seen = run(format!(r#"{{"do":"connect","to":"{to}"}}"#)).await;
        assert_eq!(seen["source"], seen["local"], "{seen}");
        let udp = run(format!(r#"{{"do":"udp","to":"{to}","connected":false}}"#)).await;
        assert!(udp["source"].as_str().unwrap().starts_with("127.0.0.1:"), "{udp}");
        let big = run(format!(r#"{{"do":"udp","to":"{to}","reply_bytes":4000}}"#)).await;
        assert_eq!(big["received"], 4000);
        let summary = run(r#"{"do":"summary"}"#.into()).await;
        assert_eq!(summary["tcp"]["total"], 21, "{summary}");
        assert_eq!(summary["udp"]["tuples"], 2, "{summary}");
        assert_eq!(run(r#"{"do":"close","name":"g","count":5}"#.into()).await["closed"], 5);
        assert_eq!(run(r#"{"do":"close","name":"g","reset":true}"#.into()).await["closed"], 15);
        let refused = run(r#"{"do":"connect","to":"127.0.0.1:9"}"#.into()).await;
        assert_eq!(refused["failure"], "refused");
    }
}
