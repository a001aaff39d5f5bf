//! One pod takes what it may of its allocation, and no more.

use std::net::SocketAddrV4;

use aegis_tests::cluster::{Cluster, PATIENCE, Pod, wait_for};
use serde_json::json;

use crate::account::Account;
use crate::metrics::Packets;

/// Flows that each pod may have.
const MOST: usize = 40;
/// Longest time that a refusal may take, in milliseconds.
const AT_ONCE: f64 = 50.0;

/// Opens as many connections as a pod may have. What it had before counts until its port has rested.
async fn fill(pod: &Pod, name: &str, to: SocketAddrV4) -> anyhow::Result<()> {
    let mut opened = 0;
    wait_for("as many flows as a pod may have", PATIENCE, async || {
        let open = json!({"do": "open", "name": name, "to": to, "count": MOST - opened});
        opened += pod.call(open).await?["opened"].as_u64().unwrap_or_default() as usize;
        Ok((opened == MOST).then_some(()))
    })
    .await
}

#[tokio::test]
async fn a_pod_at_its_limit_is_refused_at_once_and_takes_nothing_from_others() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let limits =
        format!("limits: {{perPod: {{flows: {MOST}}}}}, timeouts: {{tcpClosedSeconds: 1, restSeconds: 1}}");
    let account = Account::create(&cluster, "limited", &limits).await?;
    let other_account = Account::create(&cluster, "unlimited", "ports: {perNode: {min: 1}}").await?;
    let node = cluster.nodes().await?[0].clone();
    let (greedy, modest) = (account.pod("greedy", &node).await?, account.pod("modest", &node).await?);
    let stranger = other_account.pod("stranger", &node).await?;
    let origin = cluster.origin(0)?;
    origin.reset().await?;
    fill(&greedy, "held", origin.port(0)).await?;

    let before = Packets::settled(&cluster).await?;
    for port in 0..3 {
        let refused = greedy.call(json!({"do": "connect", "to": origin.port(port)})).await?;
        assert_eq!(refused["failure"], "refused", "{refused}");
        assert!(refused["ms"].as_f64().is_some_and(|ms| ms < AT_ONCE), "{refused}");
    }
    let after = Packets::settled(&cluster).await?;
    assert_eq!(after.since(&before, &node, "refuse_pod_flows"), 3);
    greedy.exchange("held", MOST).await?;
    // Another pod of the account has as many of its own, and another account is not concerned.
    fill(&modest, "held", origin.port(0)).await?;
    stranger.open("held", origin.port(0), MOST + 10).await?;
    let condition = wait_for("WithinLimits", PATIENCE, async || {
        Ok(account.condition("WithinLimits").await?.filter(|condition| condition.status == "False"))
    })
    .await?;
    assert_eq!(condition.reason, "PodFlows");
    assert!(condition.message.contains("spec.limits.perPod.flows"), "{}", condition.message);
    assert!(condition.message.contains(&node), "{}", condition.message);
    let calm = other_account.condition("WithinLimits").await?;
    assert_eq!(calm.map(|condition| condition.status), Some("True".to_owned()));

    // What it closes it may open again.
    greedy.call(json!({"do": "close", "name": "held"})).await?;
    fill(&greedy, "again", origin.port(0)).await?;
    modest.exchange("held", MOST).await?;
    other_account.end().await?;
    account.end().await
}
