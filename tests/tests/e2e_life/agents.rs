//! The agents' pods.

use std::time::Duration;

use aegis_tests::cluster::{Cluster, PATIENCE, explained, wait_for};
use aegis_tests::lab::plan::Node;
use aegis_tests::lab::{Lab, NAMESPACE};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams, Patch, PatchParams};
use serde_json::{Value, json};

/// Name of the chart's DaemonSet.
const AGENTS: &str = "aegis-node-agent";

/// Waits until the node's agent is ready and is no process of `before`.
pub async fn back(cluster: &Cluster, lab: &Lab, node: Node, before: &[i32]) -> anyhow::Result<()> {
    let pods: Api<Pod> = Api::namespaced(cluster.client(), NAMESPACE);
    let on_node = ListParams::default().fields(&format!("spec.nodeName={}", node.name()));
    let mut started = None;
    let ready = wait_for(&format!("the agent of {}", node.name()), 2 * PATIENCE, async || {
        let running = lab.programs(node, AGENTS)?;
        if running.len() != 1 || before.contains(&running[0]) {
            return Ok(None);
        }
        // The kubelet tells what became of a container with some delay: an old "ready" must not count.
        let since = *started.get_or_insert_with(std::time::Instant::now);
        let listed = pods.list(&on_node).await?.items.into_iter();
        let mut agents =
            listed.filter(|pod| pod.metadata.name.as_ref().is_some_and(|name| name.starts_with(AGENTS)));
        let ready = agents.any(|pod| {
            let conditions = pod.status.and_then(|status| status.conditions).unwrap_or_default();
            conditions.iter().any(|it| it.type_ == "Ready" && it.status == "True")
        });
        Ok((ready && since.elapsed() > Duration::from_secs(1)).then_some(()))
    })
    .await;
    explained(cluster, &[], ready).await
}

/// Has the DaemonSet want no agent on a node until [`allow`]. With OnDelete the change of the template touches no other node's agent.
pub async fn exclude(cluster: &Cluster, node: Node) -> anyhow::Result<()> {
    let elsewhere = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": [node.name()]}]}
    ]}}});
    patch(cluster, json!({"type": "OnDelete", "rollingUpdate": null}), elsewhere).await
}

/// Waits until a node has no agent and no pod of one; `meanwhile` is called again and again.
pub async fn gone(
    cluster: &Cluster,
    lab: &Lab,
    node: Node,
    patience: Duration,
    meanwhile: impl Fn(),
) -> anyhow::Result<()> {
    let gone = wait_for(&format!("the end of the agent of {}", node.name()), patience, async || {
        meanwhile();
        let pods: Api<Pod> = Api::namespaced(cluster.client(), NAMESPACE);
        let on_node = ListParams::default().fields(&format!("spec.nodeName={}", node.name()));
        let agent = |pod: &Pod| pod.metadata.name.as_ref().is_some_and(|name| name.starts_with(AGENTS));
        let left = pods.list(&on_node).await?.items.iter().any(agent);
        Ok((!left && lab.programs(node, AGENTS)?.is_empty()).then_some(()))
    })
    .await;
    explained(cluster, &[], gone).await
}

/// Kills the agent of a node and lets no other come until [`allow`].
pub async fn forbid(cluster: &Cluster, lab: &Lab, node: Node) -> anyhow::Result<()> {
    // Not to be restarted, the pod must go.
    exclude(cluster, node).await?;
    gone(cluster, lab, node, PATIENCE, || drop(lab.kill_agent(node))).await
}

/// Process of a node's agent, if there is one.
pub fn process(lab: &Lab, node: Node) -> anyhow::Result<Option<i32>> {
    Ok(lab.programs(node, AGENTS)?.first().copied())
}

/// Undoes [`exclude`] and [`forbid`] and waits until all agents are ready: where the chart's template says more than an empty one, other
/// nodes get new pods too, one after the other.
pub async fn allow(cluster: &Cluster, lab: &Lab, node: Node) -> anyhow::Result<()> {
    patch(cluster, json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}}), Value::Null)
        .await?;
    back(cluster, lab, node, &[]).await?;
    let sets: Api<DaemonSet> = Api::namespaced(cluster.client(), NAMESPACE);
    let ready = wait_for("the agents of all nodes", 4 * PATIENCE, async || {
        let set = sets.get(AGENTS).await?;
        let (generation, status) = (set.metadata.generation, set.status.unwrap_or_default());
        let all = Some(status.desired_number_scheduled);
        let rolled_out = status.observed_generation == generation && status.updated_number_scheduled == all;
        Ok((rolled_out && status.number_available == all).then_some(()))
    })
    .await;
    explained(cluster, &[], ready).await
}

async fn patch(cluster: &Cluster, strategy: Value, affinity: Value) -> anyhow::Result<()> {
    let sets: Api<DaemonSet> = Api::namespaced(cluster.client(), NAMESPACE);
    let patch = json!({"spec": {"updateStrategy": strategy, "template": {"spec": {"affinity": affinity}}}});
    sets.patch(AGENTS, &PatchParams::default(), &Patch::Merge(patch)).await?;
    Ok(())
}
