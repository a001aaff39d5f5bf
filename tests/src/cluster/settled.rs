//! Whether everything is as its objects say.

use std::time::{Duration, Instant};

use aegis_crds::{EgressAddress, EgressAllocation, EgressNode, HoldingState, ZoneBinding, type_};
use anyhow::bail;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{Api, ListParams};

use super::Cluster;
use crate::lab::NAMESPACE;
use crate::lab::plan::NODES;

/// Waits until agents and operators are all in place and ready, the objects of these namespaces are in force, and no slice of
/// theirs drains. An error says what does not settle.
pub async fn settled(cluster: &Cluster, namespaces: &[&str], limit: Duration) -> anyhow::Result<()> {
    let end = Instant::now() + limit;
    loop {
        let unsettled = now(cluster, namespaces).await;
        if unsettled.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("not settled within {limit:?}: {}", unsettled.join(", "));
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// The error of a wait for agents or for objects of these namespaces, with all that is not as it should be.
pub async fn explained<T>(
    cluster: &Cluster,
    namespaces: &[&str],
    waited: anyhow::Result<T>,
) -> anyhow::Result<T> {
    match waited {
        Err(error) => Err(error.context(now(cluster, namespaces).await.join(", "))),
        waited => waited,
    }
}

/// What has not settled now.
async fn now(cluster: &Cluster, namespaces: &[&str]) -> Vec<String> {
    match tokio::time::timeout(Duration::from_secs(20), unsettled(cluster, namespaces)).await {
        Ok(Ok(unsettled)) => unsettled,
        Ok(Err(error)) => vec![format!("{error:#}")],
        Err(_) => vec!["the API server does not answer".to_owned()],
    }
}

async fn unsettled(cluster: &Cluster, namespaces: &[&str]) -> anyhow::Result<Vec<String>> {
    let client = cluster.client();
    let all = ListParams::default();
    let mut waiting = Vec::new();
    let agents = Api::<DaemonSet>::namespaced(client.clone(), NAMESPACE).get("aegis-node-agent").await?;
    let (generation, status) = (agents.metadata.generation, agents.status.unwrap_or_default());
    let wanted = NODES.len() as i32;
    if status.observed_generation != generation
        || status.updated_number_scheduled != Some(wanted)
        || status.number_ready != wanted
    {
        waiting.push(format!(
            "{} of {wanted} agents ready, {:?} new",
            status.number_ready, status.updated_number_scheduled
        ));
    }
    let deployments = Api::<Deployment>::namespaced(client.clone(), NAMESPACE);
    let operators = deployments.get("aegis-operator").await?;
    let collector = deployments.get_opt("aegis-collector").await?;
    for found in [Some(operators), collector].into_iter().flatten() {
        let name = found.metadata.name.unwrap_or_default();
        let wanted = found.spec.and_then(|spec| spec.replicas).unwrap_or(1);
        let ready = found.status.and_then(|status| status.ready_replicas).unwrap_or(0);
        if wanted != ready {
            waiting.push(format!("{ready} of {wanted} {name} ready"));
        }
    }
    if !waiting.is_empty() {
        let pods = Api::<Pod>::namespaced(client.clone(), NAMESPACE).list(&all).await?.items;
        waiting.extend(pods.iter().map(described));
    }
    let nodes = Api::<EgressNode>::all(client.clone()).list(&all).await?.items;
    let ready = |node: &&EgressNode| {
        let conditions = node.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
        conditions.iter().any(|it| it.type_ == "Ready" && it.status == "True")
    };
    let count = nodes.iter().filter(ready).count();
    if count != NODES.len() {
        waiting.push(format!("{count} of {} EgressNodes ready", NODES.len()));
    }
    for namespace in namespaces {
        for it in Api::<EgressAllocation>::namespaced(client.clone(), namespace).list(&all).await?.items {
            let conditions = it.status.map(|status| status.conditions).unwrap_or_default();
            for type_ in [type_::ALLOCATED, type_::PROGRAMMED] {
                if let Some(why) = lacks(&conditions, type_, it.metadata.generation) {
                    waiting.push(format!("allocation {namespace}: {why}"));
                }
            }
        }
        for it in Api::<ZoneBinding>::namespaced(client.clone(), namespace).list(&all).await?.items {
            let conditions = it.status.map(|status| status.conditions).unwrap_or_default();
            if it.spec.enabled
                && let Some(why) = lacks(&conditions, type_::PROGRAMMED, it.metadata.generation)
            {
                waiting.push(format!("binding {namespace}: {why}"));
            }
        }
    }
    for it in Api::<EgressAddress>::all(client).list(&all).await?.items {
        let ours = namespaces.contains(&it.spec.allocation_ref.namespace.as_str());
        let draining: u32 = it
            .spec
            .holdings
            .iter()
            .filter(|holding| ours && holding.state == HoldingState::Draining)
            .map(|holding| holding.last - holding.first + 1)
            .sum();
        if draining > 0 {
            waiting.push(format!("{draining} slices of {} drain", it.spec.address));
        }
    }
    Ok(waiting)
}

/// What is known of a pod of the release.
fn described(pod: &Pod) -> String {
    let status = pod.status.clone().unwrap_or_default();
    let containers = status.container_statuses.unwrap_or_default();
    let waits = containers.iter().filter_map(|it| it.state.as_ref()?.waiting.as_ref()?.reason.as_deref());
    let waits: Vec<&str> = waits.collect();
    format!(
        "pod {} on {} is {}{}, {} of {} containers ready{}, {} restarts",
        pod.metadata.name.as_deref().unwrap_or_default(),
        pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or("no node"),
        status.phase.unwrap_or_default(),
        if pod.metadata.deletion_timestamp.is_some() { " and being deleted" } else { "" },
        containers.iter().filter(|it| it.ready).count(),
        containers.len(),
        if waits.is_empty() { String::new() } else { format!(" ({})", waits.join(", ")) },
        containers.iter().map(|it| it.restart_count).sum::<i32>()
    )
}

/// Why a condition does not hold for this generation.
fn lacks(conditions: &[Condition], type_: &str, generation: Option<i64>) -> Option<String> {
    let Some(found) = conditions.iter().find(|it| it.type_ == type_) else {
        return Some(format!("no {type_}"));
    };
    let holds = found.status == "True" && found.observed_generation == generation;
    (!holds).then(|| format!("{type_} is {}: {}", found.status, found.message))
}
