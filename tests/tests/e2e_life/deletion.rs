//! Deletion of what is in use.

use std::time::Duration;

use aegis_crds::{AegisPrefix, FINALIZER, HoldingState};
use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::NAMESPACE;
use aegis_tests::lab::plan::NODES;
use anyhow::{Context, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use serde_json::json;

use crate::account::{Account, BOUND, ZONE, only};
use crate::inside::Inside;

/// A quarantine that a test waits for. The usual one is two minutes.
const SHORT_REST: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_deleted_allocation_drains_and_goes_with_its_last_flow() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "deleted", 2).await?;
    account.bind_and_wait().await?;
    let origin = cluster.origin(0)?;
    let pods = account.pods_on_all_nodes("live").await?;
    let mut capture = lab.capture(&[ZONE])?;
    for pod in &pods {
        pod.open("held", origin.port(0), 50).await?;
    }

    let prefixes: Api<AegisPrefix> = Api::all(cluster.client());
    let name = account.namespace.name();
    prefixes.delete(name, &DeleteParams::default()).await?;
    account.allocations().delete("partners", &DeleteParams::default()).await?;
    for pod in &pods {
        let failure = wait_for("new connections to be refused", PATIENCE, async || {
            Ok(pod.source(origin.port(0)).await?.err())
        })
        .await?;
        assert_eq!(failure, "refused", "at once, not by a time-out");
        pod.exchange("held", 50).await?;
    }
    let states = async || -> anyhow::Result<Vec<HoldingState>> {
        let address = account.egress_address().await?.context("the address is gone")?;
        Ok(address.spec.holdings.iter().map(|holding| holding.state).collect())
    };
    // Slices without flows rest by and by; those with flows drain for as long as these live.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let live = states().await?;
    assert!(live.contains(&HoldingState::Draining) && !live.contains(&HoldingState::Held), "{live:?}");
    for finalizers in [
        prefixes.get(name).await?.metadata.finalizers,
        account.allocations().get("partners").await?.metadata.finalizers,
    ] {
        assert!(finalizers.is_some_and(|all| all.iter().any(|it| it == FINALIZER)));
    }
    for pod in &pods {
        pod.exchange("held", 50).await?;
        pod.call(json!({"do": "close", "name": "held"})).await?;
    }
    only(&mut capture, account.address)?;

    let until = wait_for("the last slices to rest", PATIENCE, async || {
        let address = account.egress_address().await?.context("gone without a rest")?;
        let resting = address.spec.holdings.iter().all(|holding| holding.state == HoldingState::Quarantined);
        Ok(resting.then(|| address.spec.holdings.iter().filter_map(|holding| holding.until.clone()).max()))
    })
    .await?
    .context("rests without an end")?;
    let now = k8s_openapi::jiff::Timestamp::now();
    if until.0.duration_since(now).unsigned_abs() > SHORT_REST {
        println!("not waited for the end of the quarantine at {}", until.0);
        return account.end().await;
    }
    wait_for("the objects to go", PATIENCE, async || {
        let left = account.egress_address().await?.is_some()
            || prefixes.get_opt(name).await?.is_some()
            || account.allocations().get_opt("partners").await?.is_some();
        Ok((!left).then_some(()))
    })
    .await?;
    // The binding names an allocation that is gone: covered traffic is still refused, and does not leak.
    assert_eq!(pods[0].source(origin.port(0)).await?, Err("refused".to_owned()), "on {}", NODES[0].name());
    account.end().await
}

/// For how long pods of a namespace that is deleted go on.
const LINGERS: Duration = Duration::from_secs(6);

/// Lets so many operators run, and waits until they do.
async fn operators(cluster: &Cluster, count: i32) -> anyhow::Result<i32> {
    let deployments: Api<Deployment> = Api::namespaced(cluster.client(), NAMESPACE);
    let operator = deployments.get("aegis-operator").await?;
    let before = operator.spec.and_then(|spec| spec.replicas).context("no replicas")?;
    let patch = Patch::Merge(json!({"spec": {"replicas": count}}));
    deployments.patch("aegis-operator", &PatchParams::default(), &patch).await?;
    wait_for(&format!("{count} operators"), PATIENCE, async || {
        let status = deployments.get("aegis-operator").await?.status.unwrap_or_default();
        let (all, ready) = (status.replicas.unwrap_or(0), status.ready_replicas.unwrap_or(0));
        Ok((all == count && ready == count).then_some(()))
    })
    .await?;
    Ok(before)
}

#[tokio::test]
async fn a_namespace_that_goes_while_no_operator_runs_leaks_nothing_and_its_address_comes_back()
-> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "gone", 2).await?;
    account.bind_and_wait().await?;
    let origin = cluster.origin(0)?;
    for node in NODES {
        let builder = account.namespace.pod(&format!("live-{}", node.name())).on(&node.name());
        let builder = builder.label(BOUND.0, BOUND.1).lingers(LINGERS);
        let pod = Inside::of(&cluster, builder.start().await?)?;
        pod.churn("new", origin.port(1)).await?;
    }
    let mut capture = lab.capture(&[ZONE])?;
    let before = operators(&cluster, 0).await?;
    let goes = async {
        let namespaces: Api<Namespace> = Api::all(cluster.client());
        namespaces.delete(account.namespace.name(), &DeleteParams::default()).await?;
        let pods: Api<Pod> = account.namespace.api();
        tokio::time::sleep(LINGERS / 2).await;
        ensure!(pods.list(&ListParams::default()).await?.items.len() == NODES.len(), "pods went at once");
        wait_for("the end of the pods", PATIENCE, async || {
            Ok(pods.list(&ListParams::default()).await?.items.is_empty().then_some(()))
        })
        .await?;
        ensure!(account.egress_address().await?.is_some(), "the address went without an operator");
        only(&mut capture, account.address).map(drop)
    };
    let result = goes.await;
    operators(&cluster, before).await?;
    result?;
    wait_for("the address to come back", 2 * PATIENCE, async || {
        Ok(account.egress_address().await?.is_none().then_some(()))
    })
    .await
}
