//! Upgrades with live flows: `helm upgrade` to agents whose maps have another layout.

use std::time::{Duration, Instant};

use aegis_tests::chaos::Load;
use aegis_tests::cluster::{Cluster, Metrics, settled};
use aegis_tests::lab::plan::NODES;
use anyhow::ensure;
use futures::future::try_join_all;

use crate::account::{Account, ZONE, only};

/// Until all agents are replaced and everything is in force again.
const LIMIT: Duration = Duration::from_secs(180);

async fn carried(cluster: &Cluster) -> anyhow::Result<Vec<(f64, f64)>> {
    let metrics: Vec<Metrics> =
        try_join_all(NODES.map(async |node| cluster.agent_metrics(&node.name()).await)).await?;
    Ok(metrics.iter().map(|it| (it.packets("carried") as f64, it.packets("not_carried") as f64)).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_to_another_layout_of_the_maps_breaks_no_flow() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "upgrade", 16).await?;
    account.bind_and_wait().await?;
    let pods = account.pods_on_all_nodes("live").await?;
    let mut capture = lab.capture(&[ZONE])?;
    let load = Load::start(pods, cluster.origin(0)?).await?;
    let namespaces = [account.namespace.name()];
    // There and back: each time all agents find the maps of another series.
    for arguments in ["--pin-series=1", "--pin-series=0"] {
        let begin = Instant::now();
        lab.upgrade(&format!("agent.extraArgs={{{arguments}}}"))?;
        settled(&cluster, &namespaces, LIMIT).await?;
        println!("upgraded in {:?}: carried and lost {:?}", begin.elapsed(), carried(&cluster).await?);
        load.answers().await?;
        for (flows, lost) in carried(&cluster).await? {
            // Held connections and streams at least; beside them new ones.
            ensure!(
                flows as usize >= load.flows() / NODES.len() && lost == 0.0,
                "{flows} carried, {lost} lost"
            );
        }
    }
    load.unharmed(account.address).await?;
    only(&mut capture, account.address)?;
    account.end().await
}
