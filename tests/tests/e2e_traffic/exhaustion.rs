//! Every port in use: the next connection is refused at once, and the others do not notice.

use std::time::{Duration, Instant};

use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use serde_json::json;

use crate::account::Account;
use crate::metrics::Packets;

/// Ports of one slice.
const PORTS: usize = 256;
/// Longest time that a refusal may take, in milliseconds.
const AT_ONCE: f64 = 50.0;
/// A closed connection's port rests for a second; scans follow each other by a second, at most a few on a busy machine.
const PORTS_BACK: Duration = Duration::from_secs(15);
/// Refusals count for a minute; reports and conditions follow.
const CALM: Duration = Duration::from_secs(120);

#[tokio::test]
async fn a_full_address_refuses_at_once_and_recovers() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let allocation = "ports: {perNode: {min: 1, max: 1}}, timeouts: {tcpClosedSeconds: 1}";
    let account = Account::create(&cluster, "full", allocation).await?;
    let pod = account.pod("pod", &cluster.nodes().await?[0]).await?;
    let origin = cluster.origin(0)?;
    origin.reset().await?;
    pod.open("held", origin.port(0), PORTS).await?;
    pod.exchange("held", PORTS).await?;

    let before = Packets::settled(&cluster).await?;
    for _ in 0..5 {
        let refused = pod.call(json!({"do": "connect", "to": origin.port(0)})).await?;
        assert_eq!(refused["failure"], "refused", "{refused}");
        assert!(refused["ms"].as_f64().is_some_and(|ms| ms < AT_ONCE), "{refused}");
    }
    let after = Packets::settled(&cluster).await?;
    assert_eq!(after.since(&before, pod.node(), "refuse_no_port"), 5);
    assert_eq!(pod.source(origin.port(1)).await?, Ok(account.address), "another port of the origin has room");
    pod.exchange("held", PORTS).await?;
    let tcp = origin.summary().await?.tcp;
    assert_eq!((tcp.total, tcp.twice), (PORTS as u64 + 1, 0), "{tcp:?}");
    assert!(tcp.sources.keys().eq([&account.address]), "{tcp:?}");
    wait_for("CapacityLow", PATIENCE, async || {
        let low = account.condition("CapacityLow").await?;
        Ok(low.filter(|low| low.status == "True" && low.reason == "Exhausted"))
    })
    .await?;

    // The same for an alert: `aegis_operator_capacity_low`.
    let namespace = format!("namespace=\"{}\"", account.namespace.name());
    let alert = async || -> anyhow::Result<f64> {
        Ok(cluster.operator_metrics().await?.sum("aegis_operator_capacity_low", &[&namespace]))
    };
    wait_for("the operator's gauge", PATIENCE, async || Ok((alert().await? == 1.0).then_some(()))).await?;

    pod.call(json!({"do": "close", "name": "held"})).await?;
    let closed = Instant::now();
    let mut opened = 0;
    wait_for("every port to come back", PORTS_BACK, async || {
        let open = json!({"do": "open", "name": "again", "to": origin.port(0), "count": PORTS - opened});
        opened += pod.call(open).await?["opened"].as_u64().unwrap_or_default() as usize;
        Ok((opened == PORTS).then_some(()))
    })
    .await?;
    println!("all {PORTS} ports were in use again after {:?}", closed.elapsed());
    pod.exchange("again", PORTS).await?;
    pod.call(json!({"do": "close", "name": "again"})).await?;
    wait_for("CapacityLow to end", CALM, async || {
        Ok(account.condition("CapacityLow").await?.filter(|low| low.status == "False"))
    })
    .await?;
    wait_for("the operator's gauge to fall", PATIENCE, async || Ok((alert().await? == 0.0).then_some(())))
        .await?;
    account.end().await
}
