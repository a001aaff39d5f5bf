//! The agents' packet counters, read as Prometheus reads them.

use std::collections::BTreeMap;
use std::time::Duration;

use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::NAMESPACE;
use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};

/// Where an agent serves its metrics.
const PORT: u16 = 9411;

/// An agent reads its counters about once a second.
const REFRESH: Duration = Duration::from_secs(2);

/// Packets by node and reason, at one time.
#[derive(Debug, PartialEq, Eq)]
pub struct Packets(BTreeMap<String, BTreeMap<String, u64>>);

impl Packets {
    /// Reads the counters of every node once all traffic before is in them: they have come to rest.
    pub async fn settled(cluster: &Cluster) -> anyhow::Result<Self> {
        let mut last = Self::read(cluster).await?;
        wait_for("the counters to rest", PATIENCE, async || {
            tokio::time::sleep(REFRESH).await;
            let now = Self::read(cluster).await?;
            let rest = now == last;
            last = now;
            Ok(rest.then_some(()))
        })
        .await?;
        Ok(last)
    }

    /// Reads the counters of every node, through the API server. They may be a second old.
    pub async fn read(cluster: &Cluster) -> anyhow::Result<Self> {
        let client = cluster.client();
        let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
        let agents = ListParams::default().labels("app.kubernetes.io/name=aegis-node-agent");
        let mut nodes = BTreeMap::new();
        for pod in pods.list(&agents).await? {
            let name = pod.metadata.name.context("the agent's pod has no name")?;
            let node = pod.spec.and_then(|spec| spec.node_name).context("the agent's pod has no node")?;
            let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{name}:{PORT}/proxy/metrics");
            let request = http::Request::get(path).body(Vec::new())?;
            nodes.insert(node, parse(&client.request_text(request).await?));
        }
        ensure!(!nodes.is_empty(), "no agent runs");
        Ok(Self(nodes))
    }

    /// Names of the nodes.
    pub fn nodes(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// How many on a node since an earlier time.
    pub fn since(&self, earlier: &Self, node: &str, reason: &str) -> u64 {
        self.of(node, reason).saturating_sub(earlier.of(node, reason))
    }

    /// How many on all nodes since an earlier time.
    pub fn total_since(&self, earlier: &Self, reason: &str) -> u64 {
        self.nodes().map(|node| self.since(earlier, node, reason)).sum()
    }

    fn of(&self, node: &str, reason: &str) -> u64 {
        self.0.get(node).and_then(|reasons| reasons.get(reason)).copied().unwrap_or_default()
    }
}

/// Lines such as `aegis_packets_total{reason="steered"} 7`.
fn parse(text: &str) -> BTreeMap<String, u64> {
    let line = |line: &str| -> Option<(String, u64)> {
        let rest = line.strip_prefix("aegis_packets_total{reason=\"")?;
        let (reason, count) = rest.split_once("\"} ")?;
        // The end of flows long after their traffic, and probes of gateways, which are sent for ever.
        if ["expired", "probed"].contains(&reason) {
            return None;
        }
        Some((reason.to_owned(), count.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}
