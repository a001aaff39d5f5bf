//! Talks to a pod of the lab from within its node: at once, and also while the API server is away. Elsewhere through the
//! API server, like everybody.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::{Cluster, Pod};
use crate::lab::plan::Node;
use crate::lab::{Lab, images};

/// A pod, and in the lab the network namespace it lives in.
#[derive(Clone)]
pub struct Inside {
    /// The pod.
    pub pod: Pod,
    door: Option<Door>,
}

/// The lab's way into a pod.
#[derive(Clone)]
struct Door {
    lab: Lab,
    node: Node,
    namespace: String,
}

impl Inside {
    /// Finds the way into a pod.
    pub fn of(cluster: &Cluster, pod: Pod) -> anyhow::Result<Self> {
        if !cluster.is_lab() {
            return Ok(Self { pod, door: None });
        }
        let lab = cluster.lab().context("needs the lab")?.clone();
        let node = Node::named(pod.node())?;
        let find = format!(
            "for n in /run/netns/*; do nsenter --net=$n ip -o -4 addr show | grep -qF ' {}/' && echo $n; done; true",
            pod.address()
        );
        let found = lab.exec(node, "sh", &["-c", &find])?;
        let namespace = found.lines().next().context("the pod has no network namespace")?.to_owned();
        Ok(Self { pod, door: Some(Door { lab, node, namespace }) })
    }

    /// Its node.
    pub fn node(&self) -> &str {
        self.pod.node()
    }

    /// Its node's address.
    pub fn host(&self) -> Ipv4Addr {
        self.pod.host()
    }

    /// As [`Pod::call`].
    pub async fn call(&self, command: Value) -> anyhow::Result<Value> {
        let Some(door) = &self.door else { return self.pod.call(command).await };
        let mut probe = door.command(&images::probe_binary().display().to_string())?;
        probe.args(["call", &command.to_string()]);
        let output = tokio::task::spawn_blocking(move || probe.output()).await??;
        ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        let answer: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("{command}: {}", String::from_utf8_lossy(&output.stdout)))?;
        match answer.get("error") {
            Some(error) => bail!("{}: {command}: {error}", self.pod.name()),
            None => Ok(answer),
        }
    }

    /// As [`Pod::open`].
    pub async fn open(&self, name: &str, to: impl Into<SocketAddr>, count: usize) -> anyhow::Result<()> {
        let to: SocketAddr = to.into();
        let answer = self.call(json!({"do": "open", "name": name, "to": to, "count": count})).await?;
        ensure!(answer["opened"] == count, "{}: opened of {count}: {answer}", self.pod.name());
        Ok(())
    }

    /// As [`Pod::exchange`].
    pub async fn exchange(&self, name: &str, count: usize) -> anyhow::Result<()> {
        let answer = self.call(json!({"do": "exchange", "name": name})).await?;
        ensure!(answer["answered"] == count, "{}: answered of {count}: {answer}", self.pod.name());
        Ok(())
    }

    /// As [`Pod::source`].
    pub async fn source(&self, to: SocketAddrV4) -> anyhow::Result<Result<Ipv4Addr, String>> {
        let answer = self.call(json!({"do": "connect", "to": to})).await?;
        Ok(match answer["source"].as_str() {
            Some(source) => Ok(*source.parse::<SocketAddrV4>()?.ip()),
            None => Err(answer["failure"].as_str().unwrap_or("no failure named").to_owned()),
        })
    }

    /// The same over IPv6.
    pub async fn source6(&self, to: SocketAddrV6) -> anyhow::Result<Result<Ipv6Addr, String>> {
        let answer = self.call(json!({"do": "connect", "to": to})).await?;
        Ok(match answer["source"].as_str() {
            Some(source) => Ok(*source.parse::<SocketAddrV6>()?.ip()),
            None => Err(answer["failure"].as_str().unwrap_or("no failure named").to_owned()),
        })
    }

    /// Runs a program of this machine in the pod's network, and returns whether it succeeded and what it printed. Only in
    /// the lab.
    pub async fn program(&self, program: &str, arguments: &[&str]) -> anyhow::Result<(bool, String)> {
        let door = self.door.as_ref().context("needs the lab")?;
        let mut command = door.command(program)?;
        command.args(arguments);
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
    }

    /// Starts to make connections without end, a few at a time.
    pub async fn churn(&self, name: &str, to: SocketAddrV4) -> anyhow::Result<()> {
        self.call(json!({"do": "churn", "name": name, "to": to, "parallel": 2, "pause_ms": 10}))
            .await
            .map(drop)
    }

    /// Ends [`Inside::churn`] and returns how many connections there were; none may have failed.
    pub async fn unbroken_churn(&self, name: &str) -> anyhow::Result<u64> {
        let end = self.call(json!({"do": "stop", "name": name})).await?;
        ensure!(end["failed"] == json!({}), "{}: new connections failed: {end}", self.pod.name());
        end["answered"].as_u64().filter(|count| *count > 0).with_context(|| format!("no connection: {end}"))
    }
}

impl Door {
    fn command(&self, program: &str) -> anyhow::Result<Command> {
        let mut command = self.lab.command(self.node, "nsenter")?;
        command.arg(format!("--net={}", self.namespace)).arg("--").arg(program);
        Ok(command)
    }
}
