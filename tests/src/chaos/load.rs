//! The traffic that must not notice: connections held, datagrams streamed and new connections made, from every node.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::future::try_join_all;
use serde_json::{Value, json};

use crate::cluster::{Inside, Origin};

/// Connections that a node's pod holds.
pub const HELD: usize = 640;
/// Streams of datagrams of a node's pod.
pub const STREAMS: usize = 30;
/// Between two datagrams of a stream.
const INTERVAL_MS: u64 = 200;
/// What an exchange may take: longer than an outage, after which TCP needs its time to try again.
const LIMIT_MS: u64 = 30_000;
/// Ports of the origin: all nodes use the same, so that two owners of a port would meet there.
const TCP: [u16; 2] = [0, 1];
const UDP: u16 = 2;
const NEW: u16 = 3;

/// The pods of the loaded account, one on each node in order, and the origin that they talk to.
pub struct Load {
    pods: Vec<Inside>,
    origin: Origin,
}

/// What was lost of one node's flows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Losses {
    /// Connections that were held and are broken.
    pub connections: usize,
    /// Streams that get no answer any more, or were refused.
    pub streams: usize,
    /// New connections that failed.
    pub new: u64,
    /// New connections that were made.
    pub made: u64,
    /// The slowest of these.
    pub slowest: Duration,
    /// Datagrams sent, and answers to them.
    pub datagrams: (u64, u64),
    /// Longest time without an answer on any stream.
    pub gap: Duration,
    /// How the failures are called.
    pub failures: Vec<String>,
}

impl Losses {
    /// Flows that are broken, or never came about.
    pub fn broken(&self) -> u64 {
        self.connections as u64 + self.streams as u64 + self.new
    }
}

fn stream(number: usize) -> String {
    format!("stream-{number}")
}

fn held(port: u16) -> String {
    format!("held-{port}")
}

impl Load {
    /// Opens all flows.
    pub async fn start(pods: Vec<Inside>, origin: Origin) -> anyhow::Result<Load> {
        origin.reset().await?;
        let load = Load { pods, origin };
        try_join_all(load.pods.iter().map(|pod| load.open(pod))).await?;
        Ok(load)
    }

    fn to(&self, port: u16) -> SocketAddrV4 {
        self.origin.port(port)
    }

    async fn open(&self, pod: &Inside) -> anyhow::Result<()> {
        for port in TCP {
            pod.open(&held(port), self.to(port), HELD / TCP.len()).await?;
        }
        for number in 0..STREAMS {
            let to = self.to(UDP);
            let begin = json!({"do": "stream", "name": stream(number), "to": to, "interval_ms": INTERVAL_MS, "echo": true});
            pod.call(begin).await?;
        }
        pod.call(json!({"do": "churn", "name": "new", "to": self.to(NEW), "parallel": 1, "pause_ms": 100, "timeout_ms": LIMIT_MS}))
            .await
            .map(drop)
    }

    /// How many flows there are, without the new connections.
    pub fn flows(&self) -> usize {
        self.pods.len() * (HELD + STREAMS)
    }

    /// A byte there and back on every connection that a node holds; how many did not answer.
    pub async fn silent(&self, node: usize) -> anyhow::Result<(usize, Vec<String>)> {
        let pod = self.pods.get(node).context("no such pod")?;
        let (mut silent, mut failures) = (0, Vec::new());
        for port in TCP {
            let answer =
                pod.call(json!({"do": "exchange", "name": held(port), "timeout_ms": LIMIT_MS})).await?;
            let answered = answer["answered"].as_u64().context("no count")? as usize;
            silent += (HELD / TCP.len()).saturating_sub(answered);
            if answer["failed"] != json!({}) {
                failures.push(format!("held: {}", answer["failed"]));
            }
        }
        Ok((silent, failures))
    }

    /// Fails unless every held connection of all nodes answers.
    pub async fn answers(&self) -> anyhow::Result<()> {
        for (node, pod) in self.pods.iter().enumerate() {
            let (silent, why) = self.silent(node).await?;
            ensure!(silent == 0, "{silent} connections of {} do not answer: {why:?}", pod.node());
        }
        Ok(())
    }

    /// Ends the load of all nodes and fails if anything was lost.
    pub async fn unharmed(&self, egress: Ipv4Addr) -> anyhow::Result<()> {
        for (node, pod) in self.pods.iter().enumerate() {
            let losses = self.end(node).await?;
            println!("{}: {losses:?}", pod.node());
            ensure!(losses.broken() == 0, "{}: {losses:?}", pod.node());
        }
        let strangers = self.strangers(egress).await?;
        ensure!(strangers.is_empty(), "{strangers:?}");
        Ok(())
    }

    /// Ends the load of a node and says what was lost.
    pub async fn end(&self, node: usize) -> anyhow::Result<Losses> {
        let pod = self.pods.get(node).context("no such pod")?;
        let (connections, failures) = self.silent(node).await?;
        let mut losses = Losses { connections, failures, ..Losses::default() };
        let received = async || -> anyhow::Result<Vec<Value>> {
            let mut all = Vec::new();
            for number in 0..STREAMS {
                all.push(pod.call(json!({"do": "statistics", "name": stream(number)})).await?);
            }
            Ok(all)
        };
        let before = received().await?;
        tokio::time::sleep(Duration::from_millis(INTERVAL_MS * 10)).await;
        for (number, before) in before.iter().enumerate() {
            let end = pod.call(json!({"do": "stop", "name": stream(number)})).await?;
            let refused = end["failed"] != json!({});
            if refused {
                losses.failures.push(format!("{}: {}", stream(number), end["failed"]));
            }
            let alive = end["received"].as_u64() > before["received"].as_u64();
            losses.streams += usize::from(refused || !alive);
            losses.datagrams.0 += end["sent"].as_u64().unwrap_or_default();
            losses.datagrams.1 += end["received"].as_u64().unwrap_or_default();
            losses.gap = losses.gap.max(milliseconds(&end["longest_gap_ms"]));
        }
        let new = pod.call(json!({"do": "stop", "name": "new"})).await?;
        losses.made = new["answered"].as_u64().context("no count")?;
        losses.new = new["connections"].as_u64().context("no count")? - losses.made;
        losses.slowest = milliseconds(&new["slowest_ms"]);
        if losses.new > 0 {
            losses.failures.push(format!("new: {}", new["failed"]));
        }
        ensure!(losses.made > 0, "node {} made no new connection", pod.node());
        Ok(losses)
    }

    /// The origin's view: what is wrong with who came. Every held connection and every stream came from the egress address,
    /// from one port, which nobody else used.
    pub async fn strangers(&self, egress: Ipv4Addr) -> anyhow::Result<Vec<String>> {
        let summary = self.origin.summary().await?;
        let records = self.origin.call(json!({"do": "records"})).await?;
        let mut wrong = Vec::new();
        for (protocol, summary) in [("TCP", &summary.tcp), ("UDP", &summary.udp)] {
            for (source, count) in summary.sources.iter().filter(|(source, _)| **source != egress) {
                wrong.push(format!("{count} by {protocol} from {source}"));
            }
        }
        let streams = (self.pods.len() * STREAMS) as u64;
        if summary.udp.tuples != streams {
            wrong.push(format!("{streams} streams came from {} sources", summary.udp.tuples));
        }
        let ports = TCP.map(|port| self.to(port).port());
        let mut came: Vec<(u64, String)> = records["tcp"]
            .as_array()
            .context("no records")?
            .iter()
            .filter_map(|it| Some((it["port"].as_u64()?, it["source"].as_str()?.to_owned())))
            .filter(|(port, _)| ports.iter().any(|held| u64::from(*held) == *port))
            .collect();
        let connections = came.len();
        came.sort();
        came.dedup();
        if connections != self.pods.len() * HELD || came.len() != connections {
            wrong.push(format!(
                "{} connections were held, {connections} came, from {} sources",
                self.pods.len() * HELD,
                came.len()
            ));
        }
        Ok(wrong)
    }
}

fn milliseconds(value: &Value) -> Duration {
    Duration::from_secs_f64(value.as_f64().unwrap_or_default() / 1000.0)
}
