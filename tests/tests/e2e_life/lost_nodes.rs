//! Nodes that go, come back, are cut off, or hang.

use std::time::Duration;

use aegis_crds::{EgressAddress, HoldingState};
use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::Undo;
use aegis_tests::lab::plan::{NODES, Node};
use anyhow::Context;

use crate::account::{Account, ZONE, only};
use crate::agents;
use crate::inside::Inside;

/// The node that the tests take away.
const LOST: Node = NODES[2];
const LIVE: usize = 200;

async fn live_pods(account: &Account) -> anyhow::Result<Vec<Inside>> {
    let to = account.namespace.cluster().origin(0)?.port(0);
    let pods = account.pods_on_all_nodes("live").await?;
    for pod in &pods {
        pod.open("held", to, LIVE).await?;
    }
    Ok(pods)
}

async fn unbroken(pods: &[Inside]) -> anyhow::Result<()> {
    for pod in pods {
        pod.exchange("held", LIVE).await.with_context(|| format!("flows of {}", pod.node()))?;
    }
    Ok(())
}

fn states(address: &EgressAddress, node: Node) -> Vec<HoldingState> {
    let of_node = address.spec.holdings.iter().filter(|holding| holding.node == node.name());
    of_node.map(|holding| holding.state).collect()
}

#[tokio::test]
async fn slices_of_a_node_that_is_gone_rest_and_it_comes_back_as_new() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "gone", 4).await?;
    account.bind_and_wait().await?;
    let pods = live_pods(&account).await?;
    let mut capture = lab.capture(&[ZONE])?;
    for pod in &pods[..2] {
        pod.churn("new", cluster.origin(0)?.port(1)).await?;
    }
    lab.remove_node(LOST).await?;
    // What a routing protocol does once it notices.
    lab.spread(&NODES[..2])?;
    let gone = async {
        unbroken(&pods[..2]).await?;
        // Seen at least once between Held and free: nobody may send from these ports before they have rested.
        wait_for("its slices to rest", PATIENCE, async || {
            let address = account.egress_address().await?.context("the address is gone")?;
            let states = states(&address, LOST);
            let rest = !states.is_empty() && states.iter().all(|state| *state == HoldingState::Quarantined);
            Ok(rest.then_some(()))
        })
        .await?;
        for pod in &pods[..2] {
            pod.unbroken_churn("new").await?;
        }
        unbroken(&pods[..2]).await
    };
    let result = gone.await;
    lab.add_node(LOST).await?;
    lab.spread(&NODES[..2])?;
    result?;
    agents::back(&cluster, lab, LOST, &[]).await?;
    // Announced once it is ready.
    lab.spread(&NODES)?;
    unbroken(&pods[..2]).await?;
    account.programmed_allocation().await?;
    let new = account.pod_on("new", &LOST.name(), true).await?;
    let source = new.source(cluster.origin(0)?.port(0)).await?;
    assert_eq!(source, Ok(account.address));
    unbroken(&pods[..2]).await?;
    only(&mut capture, account.address)?;
    account.end().await
}

#[tokio::test]
async fn a_link_that_is_cut_or_a_node_that_hangs_harms_no_other_node() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "hang", 4).await?;
    account.bind_and_wait().await?;
    let pods = live_pods(&account).await?;
    let mut capture = lab.capture(&[ZONE])?;
    for fault in ["cut", "freeze"] {
        let lost = if fault == "cut" { lab.without_link(LOST)? } else { lab.frozen(LOST)? };
        // What a routing protocol does once it notices.
        let routes = Undo::by("the narrow route", || lab.spread(&NODES));
        lab.spread(&NODES[..2])?;
        let meanwhile = async {
            for pod in &pods[..2] {
                pod.churn(fault, cluster.origin(0)?.port(1)).await?;
            }
            for _ in 0..5 {
                unbroken(&pods[..2]).await?;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            for pod in &pods[..2] {
                pod.unbroken_churn(fault).await?;
            }
            anyhow::Ok(())
        };
        meanwhile.await?;
        lost.now()?;
        routes.now()?;
        // The node's own flows waited.
        unbroken(&pods).await?;
    }
    only(&mut capture, account.address)?;
    account.end().await
}
