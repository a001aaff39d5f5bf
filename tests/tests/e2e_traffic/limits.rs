//! One pod takes what it may of its allocation, and one account of a node, and no more.

use std::net::SocketAddrV4;

use aegis_tests::cluster::{Cluster, PATIENCE, Pod, wait_for};
use aegis_tests::lab::Undo;
use serde_json::json;

use crate::account::Account;
use crate::metrics::Packets;

/// Flows that each pod, or each account on a node, may have.
const MOST: usize = 40;
/// Longest time that a refusal may take, in milliseconds.
const AT_ONCE: f64 = 50.0;

/// Ports rest for a second, so that what the pods had before soon counts no more.
const TIMEOUTS: &str = "timeouts: {tcpClosedSeconds: 1, restSeconds: 1}";

/// Opens as many connections as may be. What was there before counts until its port has rested.
async fn fill(pod: &Pod, name: &str, to: SocketAddrV4) -> anyhow::Result<()> {
    let mut opened = 0;
    wait_for("as many flows as there may be", PATIENCE, async || {
        let open = json!({"do": "open", "name": name, "to": to, "count": MOST - opened});
        opened += pod.call(open).await?["opened"].as_u64().unwrap_or_default() as usize;
        Ok((opened == MOST).then_some(()))
    })
    .await
}

/// Three new connections are refused at once, and counted.
async fn refused_at_once(cluster: &Cluster, pod: &Pod, node: &str, reason: &str) -> anyhow::Result<()> {
    let origin = cluster.origin(0)?;
    let before = Packets::settled(cluster).await?;
    for port in 0..3 {
        let refused = pod.call(json!({"do": "connect", "to": origin.port(port)})).await?;
        assert_eq!(refused["failure"], "refused", "{refused}");
        assert!(refused["ms"].as_f64().is_some_and(|ms| ms < AT_ONCE), "{refused}");
    }
    assert_eq!(Packets::settled(cluster).await?.since(&before, node, reason), 3);
    Ok(())
}

/// The allocation's condition says which limit is met, by which pod, and what to do.
async fn told(account: &Account, reason: &str, words: &[&str], pod: &str) -> anyhow::Result<()> {
    let condition = wait_for("WithinLimits", PATIENCE, async || {
        Ok(account.condition("WithinLimits").await?.filter(|condition| condition.status == "False"))
    })
    .await?;
    assert_eq!(condition.reason, reason);
    let pod = format!("{}/{pod}", account.namespace.name());
    for words in words.iter().chain([&pod.as_str()]) {
        assert!(condition.message.contains(words), "{words}: {}", condition.message);
    }
    Ok(())
}

#[tokio::test]
async fn a_pod_at_its_limit_is_refused_at_once_and_takes_nothing_from_others() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let limits = format!("limits: {{perPod: {{flows: {MOST}}}}}, {TIMEOUTS}");
    let account = Account::create(&cluster, "limited", &limits).await?;
    let other_account = Account::create(&cluster, "unlimited", "ports: {perNode: {min: 1}}").await?;
    let node = cluster.nodes().await?[0].clone();
    let (greedy, modest) = (account.pod("greedy", &node).await?, account.pod("modest", &node).await?);
    let stranger = other_account.pod("stranger", &node).await?;
    let origin = cluster.origin(0)?;
    origin.reset().await?;
    fill(&greedy, "held", origin.port(0)).await?;

    refused_at_once(&cluster, &greedy, &node, "refuse_pod_flows").await?;
    greedy.exchange("held", MOST).await?;
    // Another pod of the account has as many of its own, and another account is not concerned.
    fill(&modest, "held", origin.port(0)).await?;
    stranger.open("held", origin.port(0), MOST + 10).await?;
    told(&account, "PodFlows", &["raise spec.limits.perPod.flows", &node], "greedy").await?;
    let calm = other_account.condition("WithinLimits").await?;
    assert_eq!(calm.map(|condition| condition.status), Some("True".to_owned()));

    // What it closes it may open again.
    greedy.call(json!({"do": "close", "name": "held"})).await?;
    fill(&greedy, "again", origin.port(0)).await?;
    modest.exchange("held", MOST).await?;
    other_account.end().await?;
    account.end().await
}

#[tokio::test]
async fn an_account_at_its_limit_is_refused_at_once_and_takes_nothing_from_another() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::create(&cluster, "bounded", TIMEOUTS).await?;
    let other_account = Account::create(&cluster, "neighbour", TIMEOUTS).await?;
    let node = cluster.nodes().await?[0].clone();
    let (first, second) = (account.pod("first", &node).await?, account.pod("second", &node).await?);
    let stranger = other_account.pod("stranger", &node).await?;
    let origin = cluster.origin(0)?;
    origin.reset().await?;
    first.open("before", origin.port(0), MOST / 2).await?;

    let limit = "agent.limits.account.flows";
    let unlimited = Undo::by(limit, || lab.upgrade(&format!("{limit}=0")));
    lab.upgrade(&format!("{limit}={MOST}"))?;
    // What was there before counts, too: there is room for as many again, for both pods together.
    let mut opened = 0;
    wait_for("as many flows as the account may have", PATIENCE, async || {
        let open = json!({"do": "open", "name": "held", "to": origin.port(0), "count": MOST});
        opened += first.call(open).await?["opened"].as_u64().unwrap_or_default() as usize;
        assert!(opened <= MOST / 2, "{opened} more");
        Ok((opened == MOST / 2).then_some(()))
    })
    .await?;
    refused_at_once(&cluster, &second, &node, "refuse_account_flows").await?;
    first.exchange("before", MOST / 2).await?;
    told(&account, "AccountFlows", &["raise agent.limits.account.flows", &node], "first").await?;
    // Another account has as many on the same node, and this one on others.
    fill(&stranger, "held", origin.port(0)).await?;
    let elsewhere = account.pod("elsewhere", &cluster.nodes().await?[1]).await?;
    fill(&elsewhere, "held", origin.port(0)).await?;

    // A limit that goes takes no connection with it.
    unlimited.now()?;
    second.open("later", origin.port(0), MOST).await?;
    first.exchange("before", MOST / 2).await?;
    stranger.exchange("held", MOST).await?;
    other_account.end().await?;
    account.end().await
}
