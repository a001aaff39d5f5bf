//! Replies change the node at which they enter, again and again, and no flow breaks: any node is a valid entry.

use std::time::Duration;

use aegis_tests::cluster::Cluster;
use aegis_tests::lab::plan::{NODES, Node};

use crate::account::{Account, HELD, none_failed, unbroken};

#[tokio::test]
async fn no_flow_breaks_when_the_return_path_changes_under_load() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::create(&cluster, lab, "moves").await?;
    let mut capture = lab.capture(&["198.51.100.0/24"])?;
    let pods = account.flows(&NODES).await?;
    let mut changes = 0;
    for _ in 0..3 {
        // Two of three next hops, then one, then all: each flow comes by another node at some time.
        for node in NODES {
            let others: Vec<Node> = NODES.into_iter().filter(|other| *other != node).collect();
            let neighbor = |node: &Node, down: bool| {
                format!("{}neighbor {} shutdown", if down { "" } else { "no " }, node.address())
            };
            for (commands, left) in [
                (vec![neighbor(&node, true)], others.clone()),
                (vec![neighbor(&others[0], true)], vec![others[1]]),
                (vec![neighbor(&node, false), neighbor(&others[0], false)], NODES.to_vec()),
            ] {
                let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
                lab.configure_router(&commands)?;
                account.hops(&left).await?;
                changes += 1;
                unbroken(&pods).await?;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    let opened = none_failed(&pods).await?;
    println!("{changes} changes: {} flows unbroken, {opened} opened, none failed", HELD * pods.len());
    let report = capture.report()?;
    assert!(report.is_only(account.address), "{:?}", report.sources);
    assert_eq!(report.shared, 0, "{:?}", report.shared_flows);
    account.end().await
}
