//! What the agents count, read through the API server's proxy.

use anyhow::Context;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};

use super::Cluster;

/// Port of the chart's `agent.metricsPort`.
const PORT: u16 = 9411;
/// Namespace of the chart.
const NAMESPACE: &str = "aegis-system";

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

    /// Packets with this reason.
    pub fn packets(&self, reason: &str) -> u64 {
        self.sum("aegis_packets_total", &[&format!("reason=\"{reason}\"")]) as u64
    }
}

impl Cluster {
    /// What the agent of a node counts.
    pub async fn agent_metrics(&self, node: &str) -> anyhow::Result<Metrics> {
        let pods: Api<Pod> = Api::namespaced(self.client(), NAMESPACE);
        let on_node = ListParams::default()
            .labels("app.kubernetes.io/name=aegis-node-agent")
            .fields(&format!("spec.nodeName={node}"));
        let listed = pods.list(&on_node).await?;
        let pod = listed.items.first().with_context(|| format!("node {node} has no agent"))?;
        let name = pod.metadata.name.clone().unwrap_or_default();
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{name}:{PORT}/proxy/metrics");
        let request = http::Request::get(path).body(Vec::new())?;
        let text = self.client().request_text(request).await.with_context(|| format!("metrics of {name}"))?;
        Ok(Metrics { text })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_summed_by_name_and_label() {
        let text = "# HELP x y\naegis_packets_total{reason=\"steered\"} 3\naegis_packets_total{reason=\"reverse\"} 4\n\
                    aegis_packets_total_extra{reason=\"steered\"} 9\naegis_ready 1\n";
        let metrics = Metrics { text: text.into() };
        assert_eq!(metrics.packets("steered"), 3);
        assert_eq!(metrics.sum("aegis_packets_total", &[]), 7.0);
        assert_eq!(metrics.sum("aegis_ready", &[]), 1.0);
        assert_eq!(metrics.sum("absent", &[]), 0.0);
    }
}
