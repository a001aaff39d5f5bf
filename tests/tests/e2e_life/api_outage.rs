//! No API server for a minute.

use std::time::{Duration, Instant};

use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::plan::NODES;
use anyhow::ensure;

use crate::account::{Account, BOUND, ZONE, only};
use crate::agents;

const OUTAGE: Duration = Duration::from_secs(60);
/// From the API server's answer until what is written then is in force.
const RECOVERY: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_minute_without_api_server_breaks_nothing() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "outage", 8).await?;
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
        let mut killed = None;
        while begin.elapsed() < OUTAGE {
            for pod in &pods {
                pod.exchange("held", 200).await?;
                ensure!(
                    pod.source(origin.port(2)).await? == Ok(account.address),
                    "a new connection of {}",
                    pod.pod.name()
                );
            }
            if killed.is_none() && begin.elapsed() > OUTAGE / 4 {
                killed = Some(lab.kill_agent(NODES[0])?);
            }
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        let running = lab.programs(NODES[0], "aegis-node-agent")?;
        ensure!(
            running.len() == 1 && Some(running[0]) != killed,
            "the killed agent is not back: {running:?}"
        );
        only(&mut capture, account.address)
    };
    let result = outage.await;
    lab.start_api_server().await?;
    let begin = Instant::now();
    result?;

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
        pod.unbroken_churn("new").await?;
    }
    for node in NODES {
        agents::back(&cluster, lab, node, &[]).await?;
    }
    // The operator too works again.
    Account::new(&cluster, "after", 1).await?;
    account.end().await
}
