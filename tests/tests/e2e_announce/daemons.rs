//! The agents ask FRR and BIRD, and say so when one of them does not answer.

use std::process::Command;

use aegis_tests::cluster::Cluster;
use aegis_tests::lab::plan::{NODES, Node};
use aegis_tests::lab::{Lab, NAMESPACE, Undo, routing};
use anyhow::ensure;

use crate::account::{Account, none_failed, unbroken};

/// Tells the agents whom to ask.
fn ask(lab: &Lab, daemon: &str, folder: &str) -> anyhow::Result<()> {
    let mut helm = Command::new(lab.tools()?.join("helm"));
    helm.env("KUBECONFIG", lab.kubeconfig())
        .args(["upgrade", "aegis"])
        .arg(aegis_tests::lab::images::workspace().join("charts/aegis"))
        .args(["--namespace", NAMESPACE, "--reuse-values", "--wait", "--timeout", "120s"])
        .arg(format!("--set=agent.announcement.routingDaemon={daemon}"))
        .arg(format!("--set=agent.announcement.socketFolder={folder}"));
    let output = helm.output()?;
    ensure!(output.status.success(), "helm: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A daemon of a node hangs: nobody but its agent notices, and the node goes on.
async fn hangs(account: &Account<'_>, node: Node, program: &str) -> anyhow::Result<()> {
    // Not until the agent that asks has taken the place of the one before.
    let told = "told of 2 of 2 addresses; 1 of 1 BGP sessions are up";
    account.announced(node, "True", "Announced", told).await?;
    let frozen = account.lab.frozen_daemon(node, program)?;
    let name = if program == "bird" { "BIRD" } else { program };
    account.announced(node, "False", "RoutingDaemonSilent", &format!("{name} does not answer")).await?;
    let metrics = account.cluster.agent_metrics(&node.name()).await?;
    ensure!(metrics.sum("aegis_routing_daemon_answers", &[]) == 0.0, "the metric says that it answers");
    frozen.now()?;
    account.announced(node, "True", "Announced", told).await
}

#[tokio::test]
async fn a_daemon_that_hangs_is_reported_and_its_node_goes_on() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::create(&cluster, lab, "daemons").await?;
    let pods = account.flows(&NODES).await?;
    let undo = Undo::by("the question", || ask(lab, "None", "/run/frr"));
    ask(lab, "FRR", "/run/frr")?;
    hangs(&account, NODES[0], "zebra").await?;
    hangs(&account, NODES[1], "bgpd").await?;
    // There is no FRR.
    account.announced(routing::BIRD, "False", "RoutingDaemonSilent", "zebra does not run").await?;
    unbroken(&pods).await?;
    ask(lab, "BIRD", "/run/bird")?;
    hangs(&account, routing::BIRD, "bird").await?;
    unbroken(&pods).await?;
    none_failed(&pods).await?;
    undo.now()?;
    account.end().await
}
