//! Slices go where they are needed: to each site its share, to each node what its pods use, and back when they do not.

use std::net::SocketAddrV4;
use std::time::Duration;

use aegis_crds::{EgressAllocationStatus, HoldingState, SiteStatus};
use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::capture::Capture;
use aegis_tests::lab::plan::{NODES, Node};
use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::account::{Account, ZONE, only};
use crate::inside::Inside;

/// Ports of a slice.
const PORTS: usize = 256;
/// A peak of use counts for a minute, then the slices drain.
const CALM: Duration = Duration::from_secs(150);

/// Slices of the account's address that a node has in a state.
async fn slices(account: &Account, node: &str, state: HoldingState) -> anyhow::Result<u32> {
    let object = account.egress_address().await?.context("the address has no object")?;
    let own = object.spec.holdings.iter().filter(|it| it.node == node && it.state == state);
    Ok(own.map(|holding| holding.last + 1 - holding.first).sum())
}

async fn holds(account: &Account, node: Node, count: u32) -> anyhow::Result<()> {
    let what = format!("{} to hold {count} slices", node.name());
    wait_for(&what, PATIENCE, async || {
        Ok((slices(account, &node.name(), HoldingState::Held).await? == count).then_some(()))
    })
    .await
}

/// Opens as many connections as asked for; slices that are still to come make it take more than one attempt.
async fn open(pod: &Inside, name: &str, to: SocketAddrV4, count: usize) -> anyhow::Result<()> {
    let mut opened = 0;
    wait_for(&format!("{count} connections"), PATIENCE, async || {
        let more = json!({"do": "open", "name": name, "to": to, "count": count - opened});
        opened += pod.call(more).await?["opened"].as_u64().unwrap_or_default() as usize;
        Ok((opened == count).then_some(()))
    })
    .await
}

async fn sites(account: &Account) -> anyhow::Result<Vec<SiteStatus>> {
    let status: Option<EgressAllocationStatus> = account.allocations().get("partners").await?.status;
    Ok(status.unwrap_or_default().sites)
}

#[tokio::test]
async fn sites_have_their_shares_and_pods_elsewhere_leave_through_the_near_one_while_it_has_room()
-> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let [outside, large, small] = NODES;
    // Both are as near to the third node, so that their names decide. Four slices of each address: one for `east`.
    let site = |name: &str, node: Node, weight| {
        format!(
            "{{name: {name}, weight: {weight}, nodeSelector: {{topology.kubernetes.io/zone: {}}}}}",
            node.zone()
        )
    };
    let more = format!("sites: [{}, {}]", site("west", large, 3), site("east", small, 1));
    let account =
        Account::with_ports(&cluster, "sites", "first: 1024, last: 2047, perNode: {min: 1}", &more).await?;
    account.bind_and_wait().await?;
    let origin = cluster.origin(0)?;

    let pod = account.pod_on("through", &outside.name(), true).await?;
    let mut capture = lab.capture(&[ZONE])?;
    pod.open("held", origin.port(0), 100).await?;
    let by = |capture: &mut Capture| anyhow::Ok(only(capture, account.address)?.nodes(account.address));
    assert_eq!(by(&mut capture)?, [small.name()].into(), "the first site by name");

    // All of its ports but a few: what is new leaves through the other site, and what is old stays.
    pod.open("more", origin.port(0), 148).await?;
    wait_for("new connections to leave through the other site", PATIENCE, async || {
        let mut capture = lab.capture(&[ZONE])?;
        let answer: Value = pod.call(json!({"do": "connect", "to": origin.port(1)})).await?;
        ensure!(answer["failure"].is_null(), "{answer}");
        Ok((by(&mut capture)? == [large.name()].into()).then_some(()))
    })
    .await?;
    pod.exchange("held", 100).await?;
    pod.exchange("more", 148).await?;

    // A node grows up to its site's share.
    let local = account.pod_on("local", &large.name(), true).await?;
    open(&local, "grow", origin.port(2), 3 * PORTS - 8).await?;
    holds(&account, large, 3).await?;
    let shares = wait_for("the sites' status", PATIENCE, async || {
        let shares: Vec<_> = sites(&account)
            .await?
            .into_iter()
            .map(|it| (it.name, it.nodes_holding, it.slices, it.slices_held))
            .collect();
        Ok((shares == [("east".to_owned(), 1, 1, 1), ("west".to_owned(), 1, 3, 3)]).then_some(shares))
    })
    .await?;
    println!("{shares:?}");
    holds(&account, small, 1).await?;
    account.end().await
}

#[tokio::test]
async fn slices_that_are_no_longer_used_go_back() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let account = Account::new(&cluster, "shrink", 1).await?;
    account.bind_and_wait().await?;
    let node = NODES[0];
    let pod = account.pod_on("busy", &node.name(), true).await?;
    let origin = cluster.origin(0)?;
    // So that something lives in what the node keeps.
    pod.open("live", origin.port(1), 20).await?;
    open(&pod, "busy", origin.port(0), 2 * PORTS).await?;
    wait_for("the node to grow", PATIENCE, async || {
        Ok((slices(&account, &node.name(), HoldingState::Held).await? >= 3).then_some(()))
    })
    .await?;
    pod.call(json!({"do": "close", "name": "busy"})).await?;
    let begin = std::time::Instant::now();
    wait_for("the node to give back what it does not use", CALM, async || {
        let held = slices(&account, &node.name(), HoldingState::Held).await?;
        let draining = slices(&account, &node.name(), HoldingState::Draining).await?;
        Ok((held == 1 && draining == 0).then_some(()))
    })
    .await?;
    println!("one slice again after {:?}", begin.elapsed());
    pod.exchange("live", 20).await?;
    account.end().await
}
