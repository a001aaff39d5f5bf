//! Nodes without slices send through those that hold some.

use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::plan::{NODES, Node};
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::time::Duration;

use crate::account::{Account, PROMPT, ZONE, only};
use crate::inside::Inside;

/// Connections that a pod holds through a gateway.
const LIVE: usize = 300;
/// Bytes each way through a gateway.
const BULK: u64 = 50_000_000;
/// Flows of which some take the gateway that fails, and some the other.
const STREAMS: u16 = 10;
const INTERVAL_MS: u64 = 10;
/// How often a gateway fails.
const FAILURES: usize = 5;

/// An allocation that may leave from these nodes only.
async fn account(cluster: &Cluster, name: &str, holders: &[Node]) -> anyhow::Result<Account> {
    let zones = holders.iter().map(|node| {
        format!("{{name: zone-{0}, nodeSelector: {{topology.kubernetes.io/zone: {0}}}}}", node.zone())
    });
    let sites = format!("sites: [{}]", zones.collect::<Vec<_>>().join(", "));
    let account = Account::with(cluster, name, 16, &sites).await?;
    account.bind_and_wait().await?;
    Ok(account)
}

#[tokio::test]
async fn a_node_outside_the_sites_sends_through_a_holder() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let holder = NODES[0];
    let account = account(&cluster, "gateway", &[holder]).await?;
    let origin = cluster.origin(0)?;
    origin.reset().await?;
    let mut capture = lab.capture(&[ZONE])?;
    let pods = account.pods_on_all_nodes("through").await?;
    for pod in &pods {
        pod.open("held", origin.port(0), LIVE).await?;
        let udp = pod.call(json!({"do": "udp", "to": origin.port(1)})).await?;
        ensure!(
            udp["source"].as_str().is_some_and(|source| source.starts_with(&format!("{}:", account.address))),
            "{}: {udp}",
            pod.node()
        );
        let ping = pod.call(json!({"do": "ping", "to": origin.address(), "count": 5})).await?;
        assert_eq!(ping["received"], 5, "{}: {ping}", pod.node());
    }
    // Replies enter at each node, the holder translates them, and the pod's node takes them in.
    for entry in NODES {
        let _entry = lab.entry(account.address, entry)?;
        for pod in &pods {
            pod.exchange("held", LIVE).await?;
            for way in ["download", "upload"] {
                let answer = pod.call(json!({"do": way, "to": origin.port(2), "bytes": BULK})).await?;
                let what = format!("{way} of {BULK} bytes by {} entering at {}", pod.node(), entry.name());
                assert_eq!(answer["ok"], true, "{what}: {answer}");
                println!("{what}: {} ms", answer["ms"]);
            }
            // The largest datagram that is not fragmented on the way, and one that is.
            for bytes in [1300, 1472, 4000] {
                let ask = json!({"do": "udp", "to": origin.port(1), "bytes": bytes, "reply_bytes": bytes});
                let what = format!("{bytes} bytes by {} entering at {}", pod.node(), entry.name());
                wait_for(&what, PATIENCE, async || {
                    Ok((pod.call(ask.clone()).await?["received"] == bytes).then_some(()))
                })
                .await?;
            }
        }
    }
    let tcp = origin.summary().await?.tcp;
    assert_eq!(tcp.twice, 0, "{tcp:?}");
    let report = only(&mut capture, account.address)?;
    let devices: Vec<&str> = report.sources.iter().map(|source| source.device.as_str()).collect();
    assert_eq!(devices, [holder.name()], "only the holder sends to the origin");
    let metrics = cluster.agent_metrics(&holder.name()).await?;
    assert!(metrics.packets("guest") > 0 && metrics.packets("returned") > 0);
    account.end().await
}

#[tokio::test]
async fn a_gateway_that_fails_is_replaced_within_a_second() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let [first, second, outside] = NODES;
    let account = account(&cluster, "failover", &[first, second]).await?;
    let origin = cluster.origin(0)?;
    let pod = account.pod_on("through", &outside.name(), true).await?;
    // What comes back must not enter at the node that fails; a routing protocol sees to that.
    let entry = lab.entry(account.address, outside)?;
    let mut capture = lab.capture(&[ZONE])?;
    let (mut moved, mut kept) = (Vec::new(), 0);
    for round in 0..FAILURES {
        let fails = NODES[round % 2];
        for number in 0..STREAMS {
            let to = origin.port(number % 10);
            let stream = json!({"do": "stream", "name": name(number), "to": to, "interval_ms": INTERVAL_MS, "echo": true});
            pod.call(stream).await?;
        }
        pod.call(json!({"do": "churn", "name": "new", "to": origin.port(0), "parallel": 2, "pause_ms": 5, "timeout_ms": 400}))
            .await?;
        tokio::time::sleep(PROMPT).await;
        let cut = lab.without_link(fails)?;
        tokio::time::sleep(3 * PROMPT).await;
        let gaps = gaps(&pod).await;
        let new = pod.call(json!({"do": "stop", "name": "new"})).await;
        cut.now()?;
        for (gap, lost) in gaps? {
            // A flow of the other gateway loses nothing at all.
            if lost <= 1 {
                kept += 1;
            } else {
                moved.push(gap);
            }
        }
        println!("new connections while {} failed: {}", fails.name(), new?);
        wait_for("the gateway to answer again", PATIENCE, async || {
            let metrics = cluster.agent_metrics(&outside.name()).await?;
            Ok((metrics.sum("aegis_silent_gateways", &[]) == 0.0).then_some(()))
        })
        .await?;
    }
    entry.now()?;
    moved.sort_unstable();
    let quantile = |percent: usize| moved.get((moved.len() * percent).div_ceil(100).max(1) - 1);
    println!(
        "{} flows moved: p50 {:?}, p99 {:?}; {kept} lost nothing",
        moved.len(),
        quantile(50),
        quantile(99)
    );
    ensure!(
        !moved.is_empty() && kept > 0,
        "{} flows moved, {kept} kept: both gateways were to be used",
        moved.len()
    );
    let longest = moved.last().context("nothing moved")?;
    ensure!(*longest < PROMPT, "a flow was back after {longest:?} only");
    only(&mut capture, account.address)?;
    account.end().await
}

fn name(number: u16) -> String {
    format!("stream-{number}")
}

/// Ends the streams: the longest gap between two answers of each, and how many datagrams had none.
async fn gaps(pod: &Inside) -> anyhow::Result<Vec<(Duration, u64)>> {
    let mut gaps = Vec::new();
    for number in 0..STREAMS {
        let end: Value = pod.call(json!({"do": "stop", "name": name(number)})).await?;
        let (sent, received) = (end["sent"].as_u64(), end["received"].as_u64());
        let lost = sent.zip(received).map(|(sent, received)| sent.saturating_sub(received));
        let gap = end["longest_gap_ms"].as_f64().context("no gap")?;
        gaps.push((Duration::from_secs_f64(gap / 1000.0), lost.context("no counts")?));
    }
    Ok(gaps)
}
