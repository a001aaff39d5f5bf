//! Nodes that are drained, removed and added, as an autoscaler does all the time.

use std::process::Command;

use aegis_tests::chaos::Load;
use aegis_tests::cluster::{Cluster, PATIENCE, settled, wait_for};
use aegis_tests::lab::capture::Capture;
use aegis_tests::lab::plan::{NODES, Node};
use aegis_tests::lab::{Lab, Undo};
use anyhow::{Context, ensure};

use crate::account::{Account, ZONE, only};
use crate::agents;

/// The node that comes and goes.
const LAST: Node = NODES[2];
/// How often.
const ROUNDS: usize = 2;

pub fn kubectl(lab: &Lab, arguments: &[&str]) -> anyhow::Result<String> {
    let mut kubectl = Command::new(lab.tools()?.join("kubectl"));
    let output = kubectl.env("KUBECONFIG", lab.kubeconfig()).args(arguments).output().context("kubectl")?;
    ensure!(output.status.success(), "kubectl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The traffic of the nodes that stay.
async fn load(account: &Account) -> anyhow::Result<Load> {
    let pods = futures::future::try_join_all(
        NODES[..2].iter().map(async |node| account.pod_on("stays", &node.name(), true).await),
    );
    Load::start(pods.await?, account.namespace.cluster().origin(0)?).await
}

/// Slices that the node that comes and goes holds.
async fn held(account: &Account) -> anyhow::Result<u32> {
    let address = account.egress_address().await?.context("the address is gone")?;
    let own = address
        .spec
        .holdings
        .iter()
        .filter(|it| it.node == LAST.name() && it.state == aegis_crds::HoldingState::Held);
    Ok(own.map(|it| it.last - it.first + 1).sum())
}

/// What the wire, the API and the nodes that stay say, for a failure that tells no more than that connections broke.
async fn evidence(cluster: &Cluster, account: &Account, capture: &mut Capture) -> anyhow::Result<String> {
    let seen = capture.report()?;
    let mut text = format!("resets: {:#?}\nsources: {:#?}\n", seen.resets, seen.sources);
    text += &format!("holdings: {}\n", account.holdings().await?);
    for node in &NODES[..2] {
        let counted = cluster.agent_metrics(&node.name()).await?.packets_by_reason();
        text += &format!("{}: {counted:?}\n", node.name());
    }
    Ok(text)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_a_node_breaks_no_flow_of_others_and_it_works_when_it_is_back() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "drain", 16).await?;
    account.bind_and_wait().await?;
    let leaves = account.pod_on("leaves", &LAST.name(), true).await?;
    leaves.open("held", cluster.origin(0)?.port(4), 100).await?;
    let load = load(&account).await?;
    let mut capture = lab.capture(&[ZONE])?;
    let back = Undo::by("the cordon", || kubectl(lab, &["uncordon", &LAST.name()]).map(drop));
    let name = LAST.name();
    kubectl(
        lab,
        &["drain", &name, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=90s"],
    )?;
    load.answers().await?;
    back.now()?;
    let new = account.pod_on("returns", &LAST.name(), true).await?;
    assert_eq!(new.source(cluster.origin(0)?.port(5)).await?, Ok(account.address));
    settled(&cluster, &[account.namespace.name()], 2 * PATIENCE).await?;
    load.unharmed(account.address).await?;
    only(&mut capture, account.address)?;
    account.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_come_and_go_give_their_slices_back_and_harm_nobody() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "scale", 16).await?;
    account.bind_and_wait().await?;
    let load = load(&account).await?;
    let mut capture = lab.capture(&[ZONE])?;
    for round in 0..ROUNDS {
        let pod = account.pod_on(&format!("round{round}"), &LAST.name(), true).await?;
        pod.open("held", cluster.origin(0)?.port(4), 100).await?;
        lab.remove_node(LAST).await?;
        // What a routing protocol does once it notices.
        let answered = async {
            lab.spread(&NODES[..2])?;
            load.answers().await
        };
        let result = match answered.await {
            Ok(()) => Ok(()),
            Err(error) => Err(error.context(evidence(&cluster, &account, &mut capture).await?)),
        };
        lab.add_node(LAST).await?;
        lab.spread(&NODES[..2])?;
        result?;
        agents::back(&cluster, lab, LAST, &[]).await?;
        lab.spread(&NODES)?;
        // Until the operator has planned for the node that is back, conditions tell of the time before.
        let share = format!("round {round}: the share of the node that is back");
        wait_for(&share, 3 * PATIENCE, async || Ok((held(&account).await? >= 16).then_some(()))).await?;
        settled(&cluster, &[account.namespace.name()], 3 * PATIENCE).await?;
    }
    load.unharmed(account.address).await?;
    only(&mut capture, account.address)?;
    account.end().await
}
