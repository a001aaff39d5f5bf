//! Agents that are taken off their nodes, against a real API server. The test plays agents and kubelets.

#![allow(clippy::expect_used)] // Helpers of tests fail the test.

mod cluster;

use aegis_crds::{EgressAllocation, HoldingState, type_};
use cluster::objects::{SOON, slices};
use cluster::{Cluster, eventually};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::json;

/// A ready agent's pod.
async fn pod(cluster: &Cluster, node: &str) -> Api<Pod> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), "default");
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": node, "labels": {"app": "agent"}},
        "spec": {"nodeName": node, "containers": [{"name": "agent", "image": "agent"}], "tolerations": [{"operator": "Exists"}]},
    });
    let pod = serde_json::from_value(pod).expect("pod");
    eventually("the pod", SOON, async || pods.create(&PostParams::default(), &pod).await).await;
    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    pods.patch_status(node, &PatchParams::default(), &Patch::Merge(ready)).await.expect("ready");
    pods
}

#[tokio::test(flavor = "multi_thread")]
async fn slices_of_a_node_that_its_agent_is_leaving_become_free_while_its_pod_is_there() {
    let cluster = Cluster::start().await;
    let _operator = cluster.operator("a", &["--quarantine-seconds=1", "--agent-pods=app=agent"]).await;
    let [_, mut leaving, mut killed] = cluster.nodes(["n1", "n2", "n3"]).await;
    let mut pods = pod(&cluster, "n1").await;
    for node in ["n2", "n3"] {
        pods = pod(&cluster, node).await;
    }
    cluster.namespace("shop").await;
    cluster.prefix("leased", "203.0.113.0/28", "shop").await;
    cluster.allocation("shop", "partner", json!({"prefixes": ["leased"]})).await;
    let allocations: Api<EgressAllocation> = cluster.in_account("shop");
    let have = async |state, expected: &[(&str, u32)]| {
        eventually(&format!("{state:?}: {expected:?}"), SOON, async || {
            let address = cluster.addresses_now("shop", "partner").await?.pop().ok_or("no address")?;
            let found = slices(&address, state);
            let same = found.iter().map(|(node, count)| (node.as_str(), *count)).eq(expected.iter().copied());
            if same { Ok(()) } else { Err(format!("{found:?}")) }
        })
        .await;
    };
    have(HoldingState::Held, &[("n1", 8), ("n2", 8), ("n3", 8)]).await;

    // As the DaemonSet controller does; the kubelet lets the pod be for as long as the agent runs.
    pods.delete("n2", &DeleteParams::default().grace_period(600)).await.expect("delete");
    leaving.leaving = true;
    leaving.report(&cluster).await;
    have(HoldingState::Draining, &[("n2", 8)]).await;
    cluster
        .condition(
            &allocations,
            "partner",
            type_::ALLOCATED,
            "True",
            "n2 (its agent is being taken off the node",
        )
        .await;
    leaving.drains = true;
    leaving.report(&cluster).await;
    have(HoldingState::Draining, &[]).await;
    have(HoldingState::Quarantined, &[]).await;
    have(HoldingState::Held, &[("n1", 8), ("n3", 8)]).await;

    // One that is killed meanwhile says no more that they are empty: they are the node's again.
    pods.delete("n3", &DeleteParams::default().grace_period(600)).await.expect("delete");
    killed.leaving = true;
    killed.report(&cluster).await;
    have(HoldingState::Draining, &[("n3", 8)]).await;
    pods.delete("n3", &DeleteParams::default().grace_period(0)).await.expect("delete");
    have(HoldingState::Held, &[("n1", 8), ("n3", 8)]).await;

    // The agents are back.
    for (node, agent) in [("n2", &mut leaving), ("n3", &mut killed)] {
        pods.delete(node, &DeleteParams::default().grace_period(0)).await.ok();
        pod(&cluster, node).await;
        (agent.leaving, agent.drains) = (false, false);
        agent.report(&cluster).await;
    }
    have(HoldingState::Held, &[("n1", 8), ("n2", 8), ("n3", 8)]).await;
}
