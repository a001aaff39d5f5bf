//! What agents and operators count, read through the API server's proxy.

use std::collections::BTreeMap;

use anyhow::Context;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};

use super::Cluster;
use crate::lab::NAMESPACE;

/// Port of the chart's `agent.metricsPort`.
const AGENT: u16 = 9411;
/// Port of the operator.
const OPERATOR: u16 = 8080;

/// One scrape.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    text: String,
}

impl Metrics {
    /// Sum of all series of this name that carry all these labels: `("aegis_packets_total", &["reason=\"steered\""])`.
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let of_name = self.text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            rest.starts_with(['{', ' ']).then_some(rest)
        });
        of_name
            .filter(|rest| labels.iter().all(|label| rest.contains(label)))
            .filter_map(|rest| rest.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// Buckets of a histogram, over all series that carry all these labels: upper bound in microseconds, and how many are below it.
    pub fn buckets(&self, name: &str, labels: &[&str]) -> BTreeMap<u64, f64> {
        let bound = |line: &str| -> Option<f64> {
            let rest = line.strip_prefix(name)?.strip_prefix("_bucket{")?;
            rest.split_once("le=\"")?.1.split_once('"')?.0.parse().ok()
        };
        let mut buckets = BTreeMap::new();
        for line in self.text.lines().filter(|line| labels.iter().all(|label| line.contains(label))) {
            let count = line.rsplit(' ').next().and_then(|count| count.parse::<f64>().ok());
            if let (Some(bound), Some(count)) = (bound(line), count) {
                *buckets.entry((bound * 1e6) as u64).or_default() += count;
            }
        }
        buckets
    }

    /// All series of `aegis_packets_total` by reason.
    pub fn packets_by_reason(&self) -> BTreeMap<String, u64> {
        let line = |line: &str| -> Option<(String, u64)> {
            let rest = line.strip_prefix("aegis_packets_total{reason=\"")?;
            let (reason, count) = rest.split_once("\"} ")?;
            Some((reason.to_owned(), count.parse().ok()?))
        };
        self.text.lines().filter_map(line).collect()
    }

    /// Packets with this reason.
    pub fn packets(&self, reason: &str) -> u64 {
        self.sum("aegis_packets_total", &[&format!("reason=\"{reason}\"")]) as u64
    }
}

impl Cluster {
    /// What the agent of a node counts.
    pub async fn agent_metrics(&self, node: &str) -> anyhow::Result<Metrics> {
        let on_node = ListParams::default()
            .labels("app.kubernetes.io/name=aegis-node-agent")
            .fields(&format!("spec.nodeName={node}"));
        let (_, metrics) = self
            .scrape(&on_node, AGENT)
            .await?
            .into_iter()
            .next()
            .with_context(|| format!("node {node} has no agent"))?;
        Ok(metrics)
    }

    /// What the agents count, by node.
    pub async fn all_agent_metrics(&self) -> anyhow::Result<BTreeMap<String, Metrics>> {
        self.scrape(&ListParams::default().labels("app.kubernetes.io/name=aegis-node-agent"), AGENT).await
    }

    /// What the operators count: the series of all replicas together.
    pub async fn operator_metrics(&self) -> anyhow::Result<Metrics> {
        let operators = ListParams::default().labels("app.kubernetes.io/name=aegis-operator");
        let all = self.scrape(&operators, OPERATOR).await?;
        Ok(Metrics { text: all.into_values().map(|metrics| metrics.text).collect() })
    }

    /// The metrics of pods, by node.
    async fn scrape(&self, which: &ListParams, port: u16) -> anyhow::Result<BTreeMap<String, Metrics>> {
        let pods: Api<Pod> = Api::namespaced(self.client(), NAMESPACE);
        let mut found = BTreeMap::new();
        for pod in pods.list(which).await? {
            let name = pod.metadata.name.context("the pod has no name")?;
            let node = pod.spec.and_then(|spec| spec.node_name).context("the pod has no node")?;
            let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{name}:{port}/proxy/metrics");
            let request = http::Request::get(path).body(Vec::new())?;
            let text =
                self.client().request_text(request).await.with_context(|| format!("metrics of {name}"))?;
            found.insert(node, Metrics { text });
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_summed_by_their_bounds() {
        let text = "x_bucket{le=\"0.001\",a=\"1\"} 3\nx_bucket{le=\"0.001\",a=\"2\"} 4\nx_bucket{le=\"+Inf\",a=\"1\"} 5\nx_sum 7\n";
        let metrics = Metrics { text: text.into() };
        assert_eq!(metrics.buckets("x", &[]), [(1000, 7.0), (u64::MAX, 5.0)].into());
        assert_eq!(metrics.buckets("x", &["a=\"1\""]), [(1000, 3.0), (u64::MAX, 5.0)].into());
    }

    #[test]
    fn series_are_summed_by_name_and_label() {
        let text = "# HELP x y\naegis_packets_total{reason=\"steered\"} 3\naegis_packets_total{reason=\"reverse\"} 4\n\
                    aegis_packets_total_extra{reason=\"steered\"} 9\naegis_ready 1\n";
        let metrics = Metrics { text: text.into() };
        assert_eq!(metrics.packets("steered"), 3);
        assert_eq!(metrics.packets_by_reason(), [("steered".into(), 3), ("reverse".into(), 4)].into());
        assert_eq!(metrics.sum("aegis_packets_total", &[]), 7.0);
        assert_eq!(metrics.sum("aegis_ready", &[]), 1.0);
        assert_eq!(metrics.sum("absent", &[]), 0.0);
    }
}
