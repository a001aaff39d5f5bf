//! Deletion of what is in use.

use std::time::Duration;

use aegis_crds::{AegisPrefix, FINALIZER, HoldingState};
use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::plan::NODES;
use anyhow::Context;
use kube::api::{Api, DeleteParams};
use serde_json::json;

use crate::account::{Account, ZONE, only};

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
