//! Injects the faults of a schedule.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use futures::future::join_all;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

use super::Account;
use super::schedule::{Event, Fault, Kind};
use crate::cluster::{Cluster, Inside};
use crate::lab::plan::{NODES, Node};
use crate::lab::{Lab, NAMESPACE, Undo};

/// Connections of a burst: more than a node's first slices have ports.
const BURST: usize = 1200;

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was injected, and undone if there is something to undo.
    Done,
    /// What it is about was just away.
    Skipped,
}

/// What the faults need.
pub struct Faults<'a> {
    lab: &'a Lab,
    cluster: &'a Cluster,
    loaded: &'a Account,
    beside: &'a Account,
    others: &'a [Inside],
    victim: Node,
    count: AtomicU32,
}

impl<'a> Faults<'a> {
    pub fn new(
        lab: &'a Lab,
        cluster: &'a Cluster,
        loaded: &'a Account,
        beside: &'a Account,
        others: &'a [Inside],
        victim: usize,
    ) -> anyhow::Result<Faults<'a>> {
        let victim = *NODES.get(victim).context("no such node")?;
        Ok(Faults { lab, cluster, loaded, beside, others, victim, count: AtomicU32::new(0) })
    }

    /// Injects all, each in its time; those that last go on beside the next.
    pub async fn all(&self, events: &[Event]) -> Vec<(Kind, anyhow::Result<Outcome>)> {
        let begin = Instant::now();
        join_all(events.iter().map(|event| async move {
            let at = Duration::from_secs(event.at.into());
            tokio::time::sleep(at.saturating_sub(begin.elapsed())).await;
            println!("{:4} s: {}", event.at, event.fault);
            let outcome = self.inject(event.fault).await;
            if !matches!(outcome, Ok(Outcome::Done)) {
                let why =
                    outcome.as_ref().err().map_or("nothing there".to_owned(), |error| format!("{error:#}"));
                println!("{:4} s: {}: {why}", event.at, event.fault);
            }
            (event.fault.kind(), outcome)
        }))
        .await
    }

    async fn inject(&self, fault: Fault) -> anyhow::Result<Outcome> {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let long = |seconds: u32| tokio::time::sleep(Duration::from_secs(seconds.into()));
        match fault {
            // None may run just now, or two, while they are rolled or after another kill.
            Fault::KillAgent(node) => Ok(if_there(self.lab.kill_agent(NODES[node]))),
            Fault::KillOperator(which) => {
                let nodes = self.lab.operator_nodes()?;
                let Some(node) = nodes.get(which % nodes.len().max(1)) else { return Ok(Outcome::Skipped) };
                Ok(if_there(self.lab.kill_operator(*node)))
            }
            Fault::StopApiServer(seconds) => {
                self.lab.stop_api_server()?;
                long(seconds).await;
                self.lab.start_api_server().await?;
                Ok(Outcome::Done)
            }
            Fault::Freeze(seconds) => {
                let frozen = self.lab.frozen(self.victim)?;
                self.without_victim(frozen, seconds).await
            }
            Fault::Cut(seconds) => {
                let cut = self.lab.without_link(self.victim)?;
                self.without_victim(cut, seconds).await
            }
            Fault::RollAgents => {
                let sets: Api<DaemonSet> = Api::namespaced(self.cluster.client(), NAMESPACE);
                let stamp = json!({"kubectl.kubernetes.io/restartedAt": format!("chaos-{number}-{:?}", std::process::id())});
                let patch = json!({"spec": {"template": {"metadata": {"annotations": stamp}}}});
                let (parameters, patch) = (PatchParams::default(), Patch::Merge(patch));
                patiently(async || {
                    Ok(sets.patch("aegis-node-agent", &parameters, &patch).await.map(drop)?)
                })
                .await?;
                Ok(Outcome::Done)
            }
            Fault::EditBeside => {
                let more = if number.is_multiple_of(2) { ", 198.51.100.128/29" } else { "" };
                let cidrs = format!("{}{more}", self.beside.zone);
                patiently(async || self.beside.bind(&cidrs, !number.is_multiple_of(3)).await).await?;
                Ok(Outcome::Done)
            }
            Fault::EditLoaded => {
                let cidrs = format!("{}, 192.0.2.{}/29", self.loaded.zone, 128 + number % 16 * 8);
                patiently(async || self.loaded.bind(&cidrs, true).await).await?;
                Ok(Outcome::Done)
            }
            Fault::Burst(node, seconds) => {
                let pod = self.others.get(node).context("no such pod")?;
                let to = self.cluster.origin(1)?.port(0);
                let name = format!("burst-{number}");
                pod.call(json!({"do": "open", "name": name, "to": to, "count": BURST, "timeout_ms": 3000}))
                    .await?;
                long(seconds).await;
                pod.call(json!({"do": "close", "name": name})).await?;
                Ok(Outcome::Done)
            }
        }
    }

    /// For as long as the victim is away, nothing enters at it, as a routing protocol would see to.
    async fn without_victim(&self, fault: Undo<'_>, seconds: u32) -> anyhow::Result<Outcome> {
        let alive: Vec<Node> = NODES.into_iter().filter(|node| *node != self.victim).collect();
        let routes = Undo::by("the narrow route", || self.lab.spread(&NODES));
        self.lab.spread(&alive)?;
        tokio::time::sleep(Duration::from_secs(seconds.into())).await;
        fault.now()?;
        routes.now()?;
        Ok(Outcome::Done)
    }
}

/// A write to an API server that may just have started.
async fn patiently(mut write: impl AsyncFnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match write().await {
            Err(_) if Instant::now() < end => tokio::time::sleep(Duration::from_millis(500)).await,
            other => return other,
        }
    }
}

fn if_there(killed: anyhow::Result<i32>) -> Outcome {
    if killed.is_ok() { Outcome::Done } else { Outcome::Skipped }
}
