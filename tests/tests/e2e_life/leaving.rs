//! Nodes that their agent is taken off while they go on working.

use aegis_crds::{EgressNode, HoldingState};
use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::Undo;
use aegis_tests::lab::plan::{NODES, Node};
use anyhow::{Context, ensure};
use kube::api::Api;
use serde_json::json;

use crate::account::{Account, ZONE, only};
use crate::agents;

const LEFT: Node = NODES[2];
/// Few enough for slices of the node to be empty.
const LIVE: usize = 2;

/// Slices that a node has in some states.
async fn slices(account: &Account, node: Node, states: &[HoldingState]) -> anyhow::Result<u32> {
    let address = account.egress_address().await?.context("the address is gone")?;
    let of_node = address.spec.holdings.iter().filter(|it| it.node == node.name());
    Ok(of_node.filter(|it| states.contains(&it.state)).map(|it| it.last - it.first + 1).sum())
}

async fn leaving(cluster: &Cluster, node: Node) -> anyhow::Result<bool> {
    let nodes: Api<EgressNode> = Api::all(cluster.client());
    Ok(nodes.get(&node.name()).await?.status.unwrap_or_default().leaving)
}

async fn says(account: &Account, words: &str) -> anyhow::Result<()> {
    wait_for(&format!("a condition to say {words:?}"), PATIENCE, async || {
        let status = account.allocations().get("partners").await?.status.unwrap_or_default();
        Ok(status.conditions.iter().any(|it| it.message.contains(words)).then_some(()))
    })
    .await
}

#[tokio::test]
async fn an_agent_that_is_taken_off_its_node_stays_until_the_nodes_connections_have_ended()
-> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    // A third of the ports for each: whoever is to get more must get those of the node that is left. Not all of them, or that would
    // find none when its agent is back.
    let thirds = "first: 1024, last: 4095, perNode: {min: 4, max: 6}";
    let account = Account::with_ports(&cluster, "leaving", thirds, "").await?;
    account.bind_and_wait().await?;
    let to = cluster.origin(0)?;
    let pods = account.pods_on_all_nodes("live").await?;
    for pod in &pods {
        pod.open("held", to.port(0), LIVE).await?;
    }
    let unbroken = async || {
        for pod in &pods {
            pod.exchange("held", LIVE).await.with_context(|| format!("flows of {}", pod.node()))?;
            ensure!(pod.source(to.port(2)).await? == Ok(account.address), "a new flow of {}", pod.node());
        }
        anyhow::Ok(())
    };
    let agent = agents::process(lab, LEFT)?.context("the node has no agent")?;
    let mut capture = lab.capture(&[ZONE])?;
    let routes = Undo::by("the narrow route", || lab.spread(&NODES));
    let away = async {
        agents::exclude(&cluster, LEFT).await?;
        // What a routing protocol does once the agent has withdrawn its routes.
        lab.spread(&NODES[..2])?;
        wait_for("its slices to drain, and most to be free", PATIENCE, async || {
            unbroken().await?;
            let all = [HoldingState::Held, HoldingState::Draining, HoldingState::Quarantined];
            let held = slices(&account, LEFT, &[HoldingState::Held]).await?;
            let left = slices(&account, LEFT, &all).await?;
            Ok((held == 0 && (1..=LIVE as u32).contains(&left)).then_some(()))
        })
        .await?;
        ensure!(leaving(&cluster, LEFT).await?, "the node does not say that its agent leaves");
        says(&account, &format!("{} (its agent is being taken off the node", LEFT.name())).await?;
        // Another node needs more than it has, and gets and uses ports of that node.
        pods[0].open("many", to.port(1), 700).await?;
        wait_for("slices for another node", PATIENCE, async || {
            Ok((slices(&account, NODES[0], &[HoldingState::Held]).await? > 4).then_some(()))
        })
        .await?;
        unbroken().await?;
        ensure!(agents::process(lab, LEFT)? == Some(agent), "its agent went, or was replaced");

        pods[2].call(json!({"do": "close", "name": "held"})).await?;
        // Ports of pods of other suites rest for 120 s.
        agents::gone(&cluster, lab, LEFT, 4 * PATIENCE, || {}).await?;
        let sending = [HoldingState::Held, HoldingState::Draining];
        ensure!(slices(&account, LEFT, &sending).await? == 0, "its agent went before its slices were empty");
        // Without an agent its pods go on leaving through another node.
        ensure!(
            pods[2].source(to.port(2)).await? == Ok(account.address),
            "a new flow of a node without agent"
        );
        pods[2].open("held", to.port(0), LIVE).await
    };
    let result = away.await;
    agents::allow(&cluster, lab, LEFT).await?;
    result?;
    wait_for("slices of the node whose agent is back", PATIENCE, async || {
        unbroken().await?;
        let held = slices(&account, LEFT, &[HoldingState::Held]).await?;
        Ok((held > 0 && !leaving(&cluster, LEFT).await?).then_some(()))
    })
    .await?;
    // Announced once it has caught up: until then it steers by what it knew.
    routes.now()?;
    unbroken().await?;
    pods[0].exchange("many", 700).await?;
    only(&mut capture, account.address)?;
    account.end().await
}
