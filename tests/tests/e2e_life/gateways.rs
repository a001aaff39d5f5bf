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
/// Three probes and the wait for the last one's answer take longer: a flow without such a gap has not moved.
const NOTICED: Duration = Duration::from_millis(400);

/// An allocation that may leave from these nodes only.
async fn account(cluster: &Cluster, name: &str, holders: &[Node]) -> anyhow::Result<Account> {
    let zones = holders.iter().map(|node| {
        format!("{{name: zone-{0}, nodeSelector: {{topology.kubernetes.io/zone: {0}}}}}", node.zone())
    });
    let sites = format!("sites: [{}]", zones.collect::<Vec<_>>().join(", "));
    let account = Account::with(cluster, name, 16, &sites).await?;
    account.bind_and_wait().await?;
    // A node whose agent has just come back after an earlier test gets its slices a moment later.
    wait_for("the slices of all holders", PATIENCE, async || {
        let address = account.egress_address().await?.context("the address is gone")?;
        let holds = |node: &Node| address.spec.holdings.iter().any(|holding| holding.node == node.name());
        Ok(holders.iter().all(holds).then_some(()))
    })
    .await?;
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
    assert_eq!(report.nodes(account.address), [holder.name()].into(), "only the holder sends to the origin");
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
    let (mut back, mut moved, mut kept) = (Vec::new(), 0, 0);
    for round in 0..failures()? {
        let [fails, survives] = [NODES[round % 2], NODES[1 - round % 2]];
        for number in 0..STREAMS {
            let to = origin.port(number % 10);
            let stream = json!({"do": "stream", "name": name(number), "to": to, "interval_ms": INTERVAL_MS, "echo": true});
            pod.call(stream).await?;
        }
        pod.call(json!({"do": "churn", "name": "new", "to": origin.port(0), "parallel": 2, "pause_ms": 5, "timeout_ms": 400}))
            .await?;
        tokio::time::sleep(PROMPT).await;
        let holdings = account.holdings().await?;
        let cut = lab.without_link(fails)?;
        let mut since = lab.capture(&[ZONE])?;
        tokio::time::sleep(PROMPT).await;
        // However long it takes here: the link stays cut until then.
        wait_for("every flow to be back", PATIENCE, async || {
            let before = received(&pod).await?;
            tokio::time::sleep(Duration::from_millis(100)).await;
            Ok(received(&pod).await?.iter().zip(&before).all(|(now, before)| now > before).then_some(()))
        })
        .await?;
        let gaps = gaps(&pod).await;
        let new = pod.call(json!({"do": "stop", "name": "new"})).await;
        let sent = only(&mut since, account.address)?;
        assert_eq!(sent.nodes(account.address), [survives.name()].into(), "{} failed", fails.name());
        assert_eq!(account.holdings().await?, holdings, "nobody's slices change for it");
        cut.now()?;
        let (gone, stayed): (Vec<_>, Vec<_>) =
            gaps?.into_iter().partition(|(gap, lost)| *gap > NOTICED && *lost > 0);
        for (gap, lost) in &stayed {
            ensure!(
                *lost == 0,
                "{lost} lost by a flow whose longest gap was {gap:?}: it had the other gateway"
            );
        }
        (moved, kept) = (moved + gone.len(), kept + stayed.len());
        back.extend(gone.into_iter().map(|(gap, _)| gap).max());
        println!("new connections while {} failed: {}", fails.name(), new?);
        wait_for("the gateway to answer again", PATIENCE, async || {
            let metrics = cluster.agent_metrics(&outside.name()).await?;
            Ok((metrics.sum("aegis_silent_gateways", &[]) == 0.0).then_some(()))
        })
        .await?;
    }
    entry.now()?;
    back.sort_unstable();
    let quantile = |percent: usize| back.get((back.len() * percent).div_ceil(100).max(1) - 1).copied();
    println!(
        "{} failures: the last flow was back after p50 {:?}, p99 {:?}, at most {:?}; {moved} flows moved, {kept} lost nothing",
        back.len(),
        quantile(50).unwrap_or_default(),
        quantile(99).unwrap_or_default(),
        back.last().copied().unwrap_or_default()
    );
    ensure!(moved > 0 && kept > 0, "{moved} flows moved, {kept} kept: both gateways were to be used");
    // Not the longest: that depends on what else the machine does. `make figures` prints it.
    let median = quantile(50).context("nothing moved")?;
    ensure!(median < PROMPT, "half of the times a flow was back after {median:?} only");
    only(&mut capture, account.address)?;
    account.end().await
}

/// How often a node fails: [`FAILURES`], or what the environment (`AEGIS_FAILURES`) says.
pub fn failures() -> anyhow::Result<usize> {
    std::env::var("AEGIS_FAILURES").map_or(Ok(FAILURES), |count| count.parse().context("AEGIS_FAILURES"))
}

fn name(number: u16) -> String {
    format!("stream-{number}")
}

/// How many answers each of the streams has had.
async fn received(pod: &Inside) -> anyhow::Result<Vec<u64>> {
    let mut counts = Vec::new();
    for number in 0..STREAMS {
        let now: Value = pod.call(json!({"do": "statistics", "name": name(number)})).await?;
        counts.push(now["received"].as_u64().context("no count")?);
    }
    Ok(counts)
}

/// Ends the streams: the longest gap between two answers of each, and how many datagrams were lost.
async fn gaps(pod: &Inside) -> anyhow::Result<Vec<(Duration, u64)>> {
    let mut gaps = Vec::new();
    for number in 0..STREAMS {
        let end: Value = pod.call(json!({"do": "stop", "name": name(number)})).await?;
        let gap = end["longest_gap_ms"].as_f64().context("no gap")?;
        gaps.push((Duration::from_secs_f64(gap / 1000.0), end["lost"].as_u64().context("no count")?));
    }
    Ok(gaps)
}
