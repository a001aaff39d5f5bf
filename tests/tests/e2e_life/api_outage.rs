//! No API server for a minute, or for as long as `AEGIS_OUTAGE_SECONDS` says.

use std::time::{Duration, Instant};

use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::plan::NODES;
use anyhow::{Context, ensure};
use serde_json::json;

use crate::account::{Account, BOUND, ZONE, only};
use crate::agents;

fn outage() -> anyhow::Result<Duration> {
    let seconds = std::env::var("AEGIS_OUTAGE_SECONDS").map_or(Ok(60), |seconds| seconds.parse());
    Ok(Duration::from_secs(seconds.context("AEGIS_OUTAGE_SECONDS")?))
}
/// From the API server's answer until what is written then is in force.
const RECOVERY: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_minute_without_api_server_breaks_nothing() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let length = outage()?;
    let account = Account::new(&cluster, "outage", 16).await?;
    account.bind_and_wait().await?;
    let origin = cluster.origin(0)?;
    let pods = account.pods_on_all_nodes("live").await?;
    let mut capture = lab.capture(&[ZONE])?;
    for pod in &pods {
        pod.open("held", origin.port(0), 200).await?;
        pod.churn("new", origin.port(1)).await?;
    }

    lab.stop_api_server()?;
    let outage = async {
        let begin = Instant::now();
        let mut killed = Vec::new();
        while begin.elapsed() < length {
            for pod in &pods {
                pod.exchange("held", 200).await?;
                let new = pod.source(origin.port(2)).await?;
                ensure!(new == Ok(account.address), "a new connection of {}: {new:?}", pod.pod.name());
                let udp = pod.call(json!({"do": "udp", "to": origin.port(3)})).await?;
                let from = udp["source"].as_str().and_then(|source| source.split(':').next());
                let egress = account.address.to_string();
                ensure!(from == Some(egress.as_str()), "a datagram of {}: {udp}", pod.pod.name());
            }
            // Every node's agent dies once, one after the other.
            if let Some(node) = NODES.get(killed.len())
                && begin.elapsed() > length * (killed.len() as u32 + 1) / 5
            {
                killed.push(lab.kill_agent(*node)?);
            }
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        for node in NODES {
            let running = lab.programs(node, "aegis-node-agent")?;
            ensure!(
                running.len() == 1 && !killed.contains(&running[0]),
                "the killed agent of {} is not back: {running:?}",
                node.name()
            );
        }
        only(&mut capture, account.address)
    };
    let result = outage.await;
    lab.start_api_server().await?;
    let begin = Instant::now();
    result?;
    println!("no API server for {length:?}, every agent killed once: nothing broke");

    // What is written now is the first thing that agents and operator hear of.
    let selector = format!("{}: {}", BOUND.0, BOUND.1);
    account.apply_binding(&selector, ZONE, "enabled: false").await?;
    for pod in &pods {
        wait_for("the change", PATIENCE, async || {
            Ok((pod.source(origin.port(2)).await? == Ok(pod.host())).then_some(()))
        })
        .await?;
    }
    println!("a change right after the outage is in force on every node after {:?}", begin.elapsed());
    ensure!(begin.elapsed() < RECOVERY, "{:?}", begin.elapsed());
    for pod in &pods {
        pod.exchange("held", 200).await?;
        println!("{}: {} new connections", pod.node(), pod.unbroken_churn("new").await?);
    }
    for node in NODES {
        agents::back(&cluster, lab, node, &[]).await?;
    }
    // The operator too works again.
    Account::new(&cluster, "after", 1).await?;
    account.end().await
}
