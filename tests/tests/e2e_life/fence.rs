//! Allocations that take a lost node's ports by time.

use std::time::{Duration, Instant};

use aegis_crds::{EgressNode, HoldingState, type_};
use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::Undo;
use aegis_tests::lab::plan::{NODES, Node};
use anyhow::{Context, ensure};
use kube::api::Api;

use crate::account::{Account, ZONE, only};
use crate::inside::Inside;

const LOST: Node = NODES[2];
const LIVE: usize = 50;
/// Deadline of the allocations here, and what it adds up to until a lost node's slices are free: the operator notices after as
/// long, waits for a little longer, and the slices rest.
const AFTER: Duration = Duration::from_secs(15);
const REGRANTED: Duration = Duration::from_secs(120);
const FENCE: &str = "fence: {mode: Time, afterSeconds: 15}";

async fn holds(account: &Account, node: Node) -> anyhow::Result<Vec<HoldingState>> {
    let address = account.egress_address().await?.context("the address is gone")?;
    let of_node = address.spec.holdings.iter().filter(|holding| holding.node == node.name());
    Ok(of_node.map(|holding| holding.state).collect())
}

async fn slices(account: &Account, node: Node) -> anyhow::Result<u32> {
    let address = account.egress_address().await?.context("the address is gone")?;
    let of_node = address.spec.holdings.iter().filter(|holding| holding.node == node.name());
    Ok(of_node.map(|holding| holding.last - holding.first + 1).sum())
}

async fn lease_held(cluster: &Cluster, node: Node) -> anyhow::Result<bool> {
    let nodes: Api<EgressNode> = Api::all(cluster.client());
    let status = nodes.get(&node.name()).await?.status.unwrap_or_default();
    Ok(status.conditions.iter().any(|it| it.type_ == type_::LEASE_HELD && it.status == "True"))
}

async fn unbroken(pods: &[Inside]) -> anyhow::Result<()> {
    for pod in pods {
        pod.exchange("held", LIVE).await.with_context(|| format!("flows of {}", pod.node()))?;
    }
    Ok(())
}

#[tokio::test]
async fn a_node_that_hangs_past_its_deadline_sends_nothing_from_what_others_have_got() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    // A third of the ports for each: whoever is to get more must get the lost node's.
    // Not all of them, or the lost node would find none when it is back.
    let thirds = "first: 1024, last: 4095, perNode: {min: 4, max: 6}";
    let account = Account::with_ports(&cluster, "fence", thirds, FENCE).await?;
    account.bind_and_wait().await?;
    for node in NODES {
        wait_for("its Lease", PATIENCE, async || Ok(lease_held(&cluster, node).await?.then_some(()))).await?;
    }
    let to = cluster.origin(0)?;
    let pods = account.pods_on_all_nodes("live").await?;
    for pod in &pods {
        pod.open("held", to.port(0), LIVE).await?;
    }
    // What it sends all the time, and would go on to send.
    pods[2].churn("new", to.port(1)).await?;

    let frozen = lab.frozen(LOST)?;
    // From here on whatever it sends from its former ports would be told from what others send.
    let mut capture = lab.capture(&[ZONE])?;
    let routes = Undo::by("the narrow route", || lab.spread(&NODES));
    lab.spread(&NODES[..2])?;
    let begin = Instant::now();
    let mut rested = false;
    wait_for("its slices to be free", REGRANTED, async || {
        unbroken(&pods[..2]).await?;
        let states = holds(&account, LOST).await?;
        rested |= states.contains(&HoldingState::Quarantined);
        Ok(states.is_empty().then_some(()))
    })
    .await?;
    println!("free after {:?}", begin.elapsed());
    ensure!(rested, "the slices did not rest");
    ensure!(begin.elapsed() > 2 * AFTER, "taken before its deadline: {:?}", begin.elapsed());
    for pod in &pods[..2] {
        ensure!(pod.source(to.port(2)).await? == Ok(account.address));
    }
    // Another node needs more than it has, and gets and uses ports of the lost one.
    pods[0].open("many", to.port(0), 700).await?;
    wait_for("slices of the lost node for another one", PATIENCE, async || {
        Ok((slices(&account, NODES[0]).await? > 4).then_some(()))
    })
    .await?;
    pods[0].open("more", to.port(0), 400).await?;

    // It goes on as if nothing had been.
    frozen.now()?;
    let end = Instant::now() + Duration::from_secs(10);
    while Instant::now() < end {
        unbroken(&pods[..2]).await?;
        pods[0].exchange("more", 400).await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    // It gets slices again, and its pods leave from the address as before.
    // Its watches may first have to notice that their connections are gone.
    wait_for("new slices of the node that came back", 3 * PATIENCE, async || {
        let held = holds(&account, LOST).await?.contains(&HoldingState::Held);
        Ok((held && lease_held(&cluster, LOST).await?).then_some(()))
    })
    .await?;
    wait_for("its pods' new flows", PATIENCE, async || {
        Ok((pods[2].source(to.port(2)).await? == Ok(account.address)).then_some(()))
    })
    .await?;
    // Announced once it has caught up: until then it steers by what it knew.
    routes.now()?;
    unbroken(&pods[..2]).await?;
    pods[0].exchange("many", 700).await?;
    pods[0].exchange("more", 400).await?;
    // No source port was ever seen of two nodes.
    only(&mut capture, account.address)?;
    account.end().await
}

#[tokio::test]
async fn without_api_server_a_fenced_allocation_stops_and_goes_on_after_and_others_notice_nothing()
-> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let fenced = Account::with(&cluster, "fence-api", 4, FENCE).await?;
    let confirmed = Account::new(&cluster, "no-fence", 4).await?;
    let to = cluster.origin(0)?;
    let mut pods = Vec::new();
    for account in [&fenced, &confirmed] {
        account.bind_and_wait().await?;
        let pod = account.pod_on("live", &NODES[0].name(), true).await?;
        pod.open("held", to.port(0), LIVE).await?;
        pods.push(pod);
    }
    wait_for("the Lease", PATIENCE, async || Ok(lease_held(&cluster, NODES[0]).await?.then_some(()))).await?;

    lab.stop_api_server()?;
    let outage = async {
        let begin = Instant::now();
        wait_for("the fenced one to stop", 2 * AFTER, async || {
            pods[1].exchange("held", LIVE).await?;
            Ok(pods[0].source(to.port(2)).await?.is_err().then_some(()))
        })
        .await?;
        println!("no new flow after {:?}", begin.elapsed());
        tokio::time::sleep((AFTER + Duration::from_secs(2)).saturating_sub(begin.elapsed())).await;
        let mut capture = lab.capture(&[ZONE])?;
        for _ in 0..5 {
            ensure!(pods[0].source(to.port(2)).await?.is_err(), "a new flow of the fenced one");
            ensure!(pods[1].source(to.port(2)).await? == Ok(confirmed.address));
            pods[1].exchange("held", LIVE).await?;
        }
        only(&mut capture, confirmed.address)
    };
    let result = outage.await;
    lab.start_api_server().await?;
    result?;
    wait_for("the fenced one's new flows", PATIENCE, async || {
        Ok((pods[0].source(to.port(2)).await? == Ok(fenced.address)).then_some(()))
    })
    .await?;
    // Nobody took the Lease over: nobody could.
    for pod in &pods {
        pod.exchange("held", LIVE).await?;
    }
    fenced.end().await?;
    confirmed.end().await
}
