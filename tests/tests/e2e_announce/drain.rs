//! A node that drains leaves the announcement to the others.

use std::process::Command;

use aegis_tests::cluster::Cluster;
use aegis_tests::lab::Undo;
use aegis_tests::lab::plan::NODES;
use anyhow::ensure;

use crate::account::{Account, none_failed, unbroken};

#[tokio::test]
async fn a_drained_node_is_left_out_and_comes_back() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::create(&cluster, lab, "drain").await?;
    let pods = account.flows(&[NODES[0], NODES[2]]).await?;
    let kubectl = |arguments: &[&str]| {
        let mut kubectl = Command::new(lab.tools()?.join("kubectl"));
        kubectl.env("KUBECONFIG", lab.kubeconfig()).args(arguments);
        let output = kubectl.output()?;
        ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        anyhow::Ok(())
    };
    let node = NODES[1].name();
    let undo = Undo::by("the drain", || kubectl(&["uncordon", &node]));
    let drain = ["drain", &node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=90s"];
    kubectl(&drain)?;
    account.hops(&[NODES[0], NODES[2]]).await?;
    account.announced(NODES[1], "False", "Draining", "others announce").await?;
    unbroken(&pods).await?;

    // All nodes cordoned, as when a cluster gets new ones: somebody must go on.
    let others = Undo::by("the cordon", || kubectl(&["uncordon", "n1", "n3"]));
    kubectl(&["cordon", "n1", "n3"])?;
    account.hops(&NODES).await?;
    unbroken(&pods).await?;
    others.now()?;
    account.hops(&[NODES[0], NODES[2]]).await?;

    undo.now()?;
    account.hops(&NODES).await?;
    unbroken(&pods).await?;
    none_failed(&pods).await?;
    account.end().await
}
