//! Who announces: every holder, for as long as it takes packets, whatever becomes of its agent.

use std::net::{IpAddr, SocketAddrV4};
use std::process::Command;
use std::time::Duration;

use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::plan::NODES;
use aegis_tests::lab::{Undo, like_a_wire};
use anyhow::ensure;
use serde_json::json;

use crate::account::{Account, none_failed, unbroken};

#[tokio::test]
async fn every_holder_announces_while_the_prefix_says_so() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::create(&cluster, lab, "holders").await?;
    let pods = account.flows(&NODES).await?;
    for node in NODES {
        let routes = account.routes(node)?;
        let metrics = ["metric 4294901760", "metric 4278124544"];
        assert!(routes.contains("table 180") && metrics.iter().all(|it| routes.contains(it)), "{routes}");
    }

    // Somebody removes a route of the agent's.
    let address = format!("{}/32", account.address);
    lab.exec(NODES[0], "ip", &["route", "del", "blackhole", &address, "table", "180"])?;
    wait_for("the route to be put back", PATIENCE, async || {
        Ok(account.routes(NODES[0])?.contains("table 180").then_some(()))
    })
    .await?;
    account.hops(&NODES).await?;

    // An edit of the prefix is followed both ways, and the address stays where it is.
    account.announce("None").await?;
    account.hops(&[]).await?;
    assert_eq!(account.routes(NODES[2])?, "");
    lab.spread(&NODES)?;
    unbroken(&pods).await?;
    account.announce("BGP").await?;
    account.hops(&NODES).await?;
    lab.spread(&[])?;

    // What XDP does not know does not loop, and what it does know it takes before the kernel looks at routes: the
    // flows above. A pod's packets to the address end at its node.
    let to = SocketAddrV4::new(account.address, 5000);
    let answer = pods[0].call(json!({"do": "connect", "to": to})).await?;
    assert!(answer["failure"].is_string(), "nobody listens there: {answer}");

    // Neither an agent that is killed nor one that starts again takes the address from the network.
    lab.kill_agent(NODES[1])?;
    for _ in 0..50 {
        for destination in [IpAddr::V4(account.address).into(), account.network.into()] {
            let hops = lab.next_hops(destination)?;
            ensure!(hops.len() == NODES.len(), "{destination}: {hops:?}\n{}", lab.router_tells());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    unbroken(&pods).await?;
    println!("new flows meanwhile: {}", none_failed(&pods).await?);
    account.end().await
}

#[tokio::test]
async fn a_node_that_cannot_take_packets_withdraws() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::create(&cluster, lab, "unready").await?;
    let node = NODES[1];
    let pods = account.flows(&[NODES[0], NODES[2]]).await?;
    let ip = |line: &str| {
        let namespace = lab.plan().namespace(&node.name());
        let mut command = Command::new("ip");
        command.args(["-n", &namespace]).args(line.split(' '));
        anyhow::ensure!(command.status()?.success(), "ip {line}");
        anyhow::Ok(())
    };
    // An uplink whose XDP belongs to somebody else.
    let undo = Undo::by("the device extra", || ip("link del extra"));
    ip("link add extra type veth peer name other")?;
    ip("link set other up")?;
    ip("link set extra up")?;
    let network = std::path::PathBuf::from("/run/netns").join(lab.plan().namespace(&node.name()));
    like_a_wire(&network, "extra")?;
    ip("route add default dev extra metric 4000")?;
    account.hops(&[NODES[0], NODES[2]]).await?;
    account.announced(node, "False", "NotProgrammed", "0 of 2 addresses").await?;
    unbroken(&pods).await?;
    undo.now()?;
    account.hops(&NODES).await?;
    account.announced(node, "True", "Announced", "2 of 2 addresses").await?;
    none_failed(&pods).await?;
    account.end().await
}
