//! What operator and agents write is for machines: each line is one JSON object.

use aegis_tests::cluster::Cluster;
use aegis_tests::lab::NAMESPACE;
use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams, LogParams};
use serde_json::Value;

#[tokio::test]
async fn every_line_of_the_logs_is_json() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let pods: Api<Pod> = Api::namespaced(cluster.client(), NAMESPACE);
    let mut lines = 0;
    for pod in pods.list(&ListParams::default()).await? {
        let name = pod.metadata.name.context("a pod has no name")?;
        let log = pods.logs(&name, &LogParams::default()).await?;
        ensure!(!log.is_empty(), "{name} writes nothing");
        for line in log.lines() {
            let object: Value = serde_json::from_str(line).with_context(|| format!("{name}: {line}"))?;
            let has = |key: &str| object.get(key).is_some_and(Value::is_string);
            ensure!(has("timestamp") && has("level"), "{name}: neither time nor level: {line}");
            lines += 1;
        }
    }
    println!("{lines} lines");
    Ok(())
}
