//! The agents' packet counters, read as Prometheus reads them.

use std::collections::BTreeMap;
use std::time::Duration;

use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use anyhow::ensure;

/// An agent reads its counters about once a second.
const REFRESH: Duration = Duration::from_secs(2);

/// Packets by node and reason, at one time.
#[derive(Debug)]
pub struct Packets(BTreeMap<String, BTreeMap<String, u64>>);

impl Packets {
    /// Reads the counters of every node once all traffic before is in them: they have come to rest.
    pub async fn settled(cluster: &Cluster) -> anyhow::Result<Self> {
        let mut last = Self::read(cluster).await?;
        wait_for("the counters to rest", PATIENCE, async || {
            tokio::time::sleep(REFRESH).await;
            let now = Self::read(cluster).await?;
            let rest = now.caused_by_traffic() == last.caused_by_traffic();
            last = now;
            Ok(rest.then_some(()))
        })
        .await?;
        Ok(last)
    }

    /// Reads the counters of every node, through the API server. They may be a second old.
    pub async fn read(cluster: &Cluster) -> anyhow::Result<Self> {
        let nodes: BTreeMap<_, _> = cluster
            .all_agent_metrics()
            .await?
            .into_iter()
            .map(|(node, metrics)| (node, metrics.packets_by_reason()))
            .collect();
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

    /// Without the end of flows long after their traffic, and probes of gateways, which are sent for ever.
    fn caused_by_traffic(&self) -> Vec<(&String, &String, &u64)> {
        let all = self.0.iter().flat_map(|(node, reasons)| reasons.iter().map(move |(r, n)| (node, r, n)));
        all.filter(|(_, reason, _)| !["expired", "probed"].contains(&reason.as_str())).collect()
    }

    fn of(&self, node: &str, reason: &str) -> u64 {
        self.0.get(node).and_then(|reasons| reasons.get(reason)).copied().unwrap_or_default()
    }
}
