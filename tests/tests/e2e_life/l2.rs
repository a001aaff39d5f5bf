//! Addresses that are announced by L2: the router finds out by ARP who has them.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::Lab;
use aegis_tests::lab::plan::{NODES, Node};
use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::Node as NodeObject;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

use crate::account::{Account, ZONE, only};
use crate::agents;
use crate::gateways::failures;
use crate::inside::Inside;

/// Time for which one stays cut off, and for everything to settle afterwards.
const WHILE: Duration = Duration::from_secs(3);
const INTERVAL_MS: u64 = 10;
const LIVE: usize = 100;

/// An account whose address is announced by L2.
async fn account(cluster: &Cluster, lab: &Lab, name: &str) -> anyhow::Result<Account> {
    let account = Account::new(cluster, name, 4).await?;
    let (name, address) = (account.namespace.name(), account.address);
    let prefix = format!(
        "apiVersion: aegis.dev/v1alpha1\nkind: AegisPrefix\nmetadata: {{name: {name}}}\n\
         spec: {{cidr: {address}/32, account: {name}, announcement: {{mode: L2}}}}\n"
    );
    ensure!(lab.who_has(address)?.is_empty(), "somebody answers for {address} before it is announced");
    account.namespace.apply(&prefix).await?;
    account.bind_and_wait().await?;
    Ok(account)
}

/// The one node that answers, asked several times.
fn one(lab: &Lab, address: Ipv4Addr) -> anyhow::Result<Node> {
    let mut answers = Vec::new();
    for _ in 0..3 {
        answers.push(lab.who_has(address)?);
    }
    let first = answers.first().and_then(|nodes| nodes.first()).copied();
    let first = first.with_context(|| format!("nobody answers for {address}"))?;
    ensure!(answers.iter().all(|nodes| *nodes == [first]), "{address} is answered for by {answers:?}");
    Ok(first)
}

async fn somebody(lab: &Lab, address: Ipv4Addr) -> anyhow::Result<Node> {
    wait_for("one node to answer ARP", PATIENCE, async || Ok(one(lab, address).ok())).await
}

async fn unbroken(pods: &[Inside]) -> anyhow::Result<()> {
    for pod in pods {
        pod.exchange("held", LIVE).await.with_context(|| format!("flows of {}", pod.node()))?;
    }
    Ok(())
}

async fn stream(pod: &Inside, to: std::net::SocketAddrV4) -> anyhow::Result<()> {
    let stream =
        json!({"do": "stream", "name": "stream", "to": to, "interval_ms": INTERVAL_MS, "echo": true});
    pod.call(stream).await.map(drop)
}

/// Ends a stream: the longest gap between two answers, and how many datagrams were lost.
async fn gap(pod: &Inside) -> anyhow::Result<(Duration, u64)> {
    let end = pod.call(json!({"do": "stop", "name": "stream"})).await?;
    let gap = end["longest_gap_ms"].as_f64().context("no gap")?;
    Ok((Duration::from_secs_f64(gap / 1000.0), end["lost"].as_u64().context("no count")?))
}

#[tokio::test]
async fn an_address_on_the_link_moves_when_the_node_that_answers_is_cut_off_and_not_back()
-> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = account(&cluster, lab, "arp").await?;
    let address = account.address;
    let _link = lab.on_link(address)?;
    let origin = cluster.origin(0)?;
    let mut answering = somebody(lab, address).await?;
    let mut capture = lab.capture(&[ZONE])?;
    let pods = account.pods_on_all_nodes("flows").await?;
    for pod in &pods {
        pod.open("held", origin.port(0), LIVE).await?;
    }
    let mut gaps = Vec::new();
    for _ in 0..failures()? {
        let others: Vec<&Inside> = pods.iter().filter(|pod| pod.node() != answering.name()).collect();
        for pod in &others {
            stream(pod, origin.port(1)).await?;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        ensure!(
            lab.router_sends_to(address)? == Some(answering),
            "the router knows another than {answering:?}"
        );
        let cut = lab.without_link(answering)?;
        tokio::time::sleep(WHILE).await;
        for pod in others {
            let (gap, lost) = gap(pod).await?;
            println!(
                "{} was cut off: {} had no answer for {gap:?}, {lost} lost",
                answering.name(),
                pod.node()
            );
            gaps.push(gap);
        }
        let next = one(lab, address)?;
        ensure!(next != answering, "{} is cut off and answers", answering.name());
        ensure!(lab.router_sends_to(address)? == Some(next), "the router does not know of {}", next.name());
        let (healed, mut both) = (Instant::now(), Duration::ZERO);
        cut.now()?;
        while healed.elapsed() < WHILE {
            if lab.who_has(address)?.len() > 1 {
                both = healed.elapsed();
            }
        }
        println!("{} is back: two answered until {both:?} after that at most", answering.name());
        ensure!(one(lab, address)? == next, "{} took the address back", answering.name());
        answering = next;
        unbroken(&pods).await?;
    }
    gaps.sort_unstable();
    let quantile = |percent: usize| gaps[(gaps.len() * percent).div_ceil(100).max(1) - 1];
    println!(
        "{} failures of the node that answers ARP: the last flow was back after p50 {:?}, p99 {:?}, at most {:?}",
        gaps.len(),
        quantile(50),
        quantile(99),
        quantile(100)
    );
    // How soon is a figure; that it is sooner than an entry of a router's cache lives must hold anywhere.
    ensure!(quantile(100) < WHILE, "no answer came back before the node did");
    only(&mut capture, address)?;
    account.end().await
}

#[tokio::test]
async fn an_agent_that_hangs_or_restarts_moves_no_address_and_a_drain_moves_it_without_loss()
-> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = account(&cluster, lab, "arpdrain").await?;
    let address = account.address;
    let _link = lab.on_link(address)?;
    let origin = cluster.origin(0)?;
    let answering = somebody(lab, address).await?;
    let pods = account.pods_on_all_nodes("flows").await?;
    for pod in &pods {
        pod.open("held", origin.port(0), LIVE).await?;
        stream(pod, origin.port(1)).await?;
    }
    let agent = lab.without_agent(answering)?;
    let hangs = Instant::now();
    while hangs.elapsed() < WHILE {
        ensure!(lab.who_has(address)? == [answering], "without its agent");
    }
    agent.now()?;
    let before = lab.programs(answering, "aegis-node-agent")?;
    lab.kill_agent(answering)?;
    let killed = Instant::now();
    while killed.elapsed() < WHILE {
        ensure!(lab.who_has(address)? == [answering], "while its agent starts again");
    }
    agents::back(&cluster, lab, answering, &before).await?;
    ensure!(one(lab, address)? == answering, "after its agent has started again");

    let cordon = async |on: bool| {
        let nodes: Api<NodeObject> = Api::all(cluster.client());
        let patch = Patch::Merge(json!({"spec": {"unschedulable": on}}));
        nodes.patch(&answering.name(), &PatchParams::default(), &patch).await
    };
    cordon(true).await?;
    let drained = async {
        let next = wait_for("another node to answer", PATIENCE, async || {
            let nodes = lab.who_has(address)?;
            ensure!(!nodes.is_empty(), "nobody answers");
            Ok(nodes.first().copied().filter(|node| nodes.len() == 1 && *node != answering))
        })
        .await?;
        ensure!(lab.router_sends_to(address)? == Some(next), "the router does not know of {}", next.name());
        anyhow::Ok(next)
    };
    let drained = drained.await;
    cordon(false).await?;
    let next = drained?;
    tokio::time::sleep(WHILE).await;
    ensure!(one(lab, address)? == next, "it moved back");
    for pod in &pods {
        let (gap, lost) = gap(pod).await?;
        println!("{}: longest gap {gap:?}, {lost} lost", pod.node());
        ensure!(lost == 0, "{} lost {lost} datagrams", pod.node());
    }
    unbroken(&pods).await?;
    let metrics = cluster.agent_metrics(&next.name()).await?;
    let label = format!("address=\"{address}\"");
    assert_eq!(metrics.sum("aegis_answers_arp", &[&label]), 1.0);
    for other in NODES.into_iter().filter(|node| *node != next) {
        let metrics = cluster.agent_metrics(&other.name()).await?;
        assert_eq!(metrics.sum("aegis_answers_arp", &[&label]), 0.0, "{}", other.name());
    }
    account.end().await
}
