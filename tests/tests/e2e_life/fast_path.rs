//! The fast path is switched on and off under load: refused where conntrack is strict, taken where it is not, and nobody notices.

use std::time::Duration;

use aegis_crds::{EgressNode, type_};
use aegis_tests::chaos::Load;
use aegis_tests::cluster::{Cluster, PATIENCE, settled, wait_for};
use aegis_tests::lab::plan::NODES;
use anyhow::ensure;
use kube::api::Api;

use crate::account::{Account, ZONE, only};

/// Until all agents are replaced and everything is in force again.
const LIMIT: Duration = Duration::from_secs(180);
/// What an agent may take to notice a sysctl.
const NOTICED: Duration = Duration::from_secs(60);

/// Waits until every node says this of its fast path.
async fn says(cluster: &Cluster, status: &str, reason: &str) -> anyhow::Result<()> {
    let nodes: Api<EgressNode> = Api::all(cluster.client());
    wait_for(&format!("FastPath {status} on every node"), NOTICED, async || {
        for node in NODES {
            let status_of = nodes.get_status(&node.name()).await?.status.unwrap_or_default();
            let said = status_of.conditions.iter().find(|it| it.type_ == type_::FAST_PATH);
            if !said.is_some_and(|it| it.status == status && it.reason == reason) {
                return Ok(None);
            }
        }
        Ok(Some(()))
    })
    .await
}

/// Packets out and in that took it, on all nodes.
async fn fast(cluster: &Cluster) -> anyhow::Result<Vec<(u64, u64)>> {
    let metrics = cluster.all_agent_metrics().await?;
    Ok(metrics.values().map(|it| (it.packets("fast_out"), it.packets("fast_in"))).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn established_flows_take_the_fast_path_where_it_is_safe_and_nobody_notices() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "fast", 16).await?;
    account.bind_and_wait().await?;
    let pods = account.pods_on_all_nodes("live").await?;
    let mut capture = lab.capture(&[ZONE])?;
    let load = Load::start(pods, cluster.origin(0)?).await?;
    let namespaces = [account.namespace.name()];

    lab.upgrade("agent.fastPath=true")?;
    settled(&cluster, &namespaces, LIMIT).await?;
    says(&cluster, "False", "ConntrackStrict").await?;
    load.answers().await?;
    ensure!(fast(&cluster).await?.iter().all(|packets| *packets == (0, 0)), "where conntrack is strict");

    let liberal = |value: u8| {
        NODES.iter().try_for_each(|node| {
            let setting = format!("net.netfilter.nf_conntrack_tcp_be_liberal={value}");
            let done = lab.command_in(&node.name(), "sysctl").args(["-qw", &setting]).status()?;
            ensure!(done.success(), "{setting} on {}", node.name());
            Ok(())
        })
    };
    liberal(1)?;
    says(&cluster, "True", "EstablishedFlows").await?;
    wait_for("packets on the fast path of every node", PATIENCE, async || {
        load.answers().await?;
        Ok(fast(&cluster).await?.iter().all(|(out, back)| *out > 100 && *back > 100).then_some(()))
    })
    .await?;
    println!("out and in by the fast path: {:?}", fast(&cluster).await?);

    lab.upgrade("agent.fastPath=false")?;
    settled(&cluster, &namespaces, LIMIT).await?;
    load.unharmed(account.address).await?;
    only(&mut capture, account.address)?;
    account.end().await?;
    liberal(0)
}
