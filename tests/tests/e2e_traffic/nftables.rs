//! Beside other rules of the node, and without our own.

use std::time::{Duration, Instant};

use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::plan::{NODES, Node};
use aegis_tests::lab::{Lab, Undo};
use serde_json::json;

use crate::account::Account;
use crate::metrics::Packets;

/// Where the pod runs, and where replies enter.
const OWNER: Node = NODES[0];
const OTHER: Node = NODES[1];
/// How long the node is without our table.
const WITHOUT: Duration = Duration::from_millis(1500);
/// How long the agent may take to put its table back, once it can.
const BACK: Duration = Duration::from_secs(1);

/// A firewall of the kind that CNIs install, until the value's end.
fn firewall(lab: &Lab) -> anyhow::Result<Undo<'_>> {
    let rules = "table ip firewall {
        chain forward {
            type filter hook forward priority filter; policy drop;
            ct state established,related accept;
            iifname \"cni0\" ct state new accept;
        }
    }";
    lab.exec(OWNER, "sh", &["-c", &format!("nft -f - <<'END'\n{rules}\nEND")])?;
    let remove = || lab.exec(OWNER, "nft", &["delete", "table", "ip", "firewall"]).map(drop);
    Ok(Undo::by("the firewall", remove))
}

#[tokio::test]
async fn a_firewall_of_the_node_sees_ordinary_connections() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::create(&cluster, "firewall", "ports: {perNode: {min: 1}}").await?;
    let pod = account.pod("pod", &OWNER.name()).await?;
    let origin = cluster.origin(0)?;
    let inbound = json!({"do": "connect", "to": format!("{}:8080", pod.address()), "timeout_ms": 500});
    assert_eq!(origin.call(inbound.clone()).await?["ok"], true);
    pod.open("before", origin.port(0), 50).await?;
    let firewall = firewall(lab)?;
    assert_eq!(origin.call(inbound).await?["failure"], "timeout", "the firewall does nothing");
    for entry in [OWNER, OTHER] {
        let _entry = lab.entry(account.address, entry)?;
        pod.exchange("before", 50).await?;
        let name = entry.name();
        pod.open(&name, origin.port(1), 50).await?;
        pod.exchange(&name, 50).await?;
        let udp = pod.call(json!({"do": "udp", "to": origin.port(0)})).await?;
        assert_eq!(udp["ok"], true, "{udp}");
        let ping = pod.call(json!({"do": "ping", "to": origin.address(), "count": 3})).await?;
        assert_eq!(ping["received"], 3, "{ping}");
        let closed = pod.call(json!({"do": "udp", "to": format!("{}:9", origin.address())})).await?;
        assert_eq!(closed["failure"], "refused", "an error belongs to its connection: {closed}");
    }
    firewall.now()?;
    account.end().await
}

#[tokio::test]
async fn without_our_table_nothing_leaks_until_the_agent_puts_it_back() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::create(&cluster, "table", "ports: {perNode: {min: 8}}").await?;
    let pod = account.pod("pod", &OWNER.name()).await?;
    let origin = cluster.origin(0)?;
    let mut capture = lab.capture(&["198.51.100.0/24"])?;
    pod.call(json!({"do": "stream", "name": "old", "to": origin.port(0), "interval_ms": 2})).await?;
    pod.call(json!({"do": "churn", "name": "new", "to": origin.port(1), "parallel": 4, "pause_ms": 2, "timeout_ms": 2500})).await?;
    // A table that is not there is an error.
    let table = || lab.exec(OWNER, "nft", &["list", "table", "ip", "aegis"]).unwrap_or_default();
    let whole = table().lines().count();
    for verb in ["flush", "delete"] {
        let before = Packets::read(&cluster).await?;
        // Without an agent that puts it back at once, packets do meet a node without our table.
        let suspended = lab.without_agent(OWNER)?;
        lab.exec(OWNER, "nft", &[verb, "table", "ip", "aegis"])?;
        let gone = Instant::now();
        while gone.elapsed() < WITHOUT {
            let connect = json!({"do": "connect", "to": origin.port(3), "timeout_ms": 300});
            let answer = pod.call(connect).await?;
            assert_ne!(
                answer["ok"], true,
                "{verb}: nothing translates it, and yet it came through: {answer}"
            );
        }
        assert!(table().lines().count() < whole, "{verb}: somebody put the table back:\n{}", table());
        let seen = capture.report()?;
        assert!(seen.is_only(account.address), "{verb}: {:?}", seen.sources);
        suspended.now()?;
        let goes_on = Instant::now();
        while table().lines().count() < whole {
            assert!(goes_on.elapsed() < BACK, "{verb}: the table is not back:\n{}", table());
        }
        println!("{verb}: the table was back after {:?}", goes_on.elapsed());
        wait_for("what was dropped meanwhile", PATIENCE, async || {
            let dropped = Packets::read(&cluster).await?.since(&before, &OWNER.name(), "drop_leak");
            Ok((dropped > 0).then_some(()))
        })
        .await?;
        // Flows that began meanwhile send again: long enough for a second and a third SYN.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let seen = capture.report()?;
        assert!(seen.is_only(account.address), "{verb}: {:?}", seen.sources);
        assert_eq!(pod.source(origin.port(2)).await?, Ok(account.address), "{verb}");
    }
    let stream = pod.call(json!({"do": "stop", "name": "old"})).await?;
    let churn = pod.call(json!({"do": "stop", "name": "new"})).await?;
    println!("stream: {stream}\nchurn: {churn}");
    assert!(stream["received"].as_u64() > Some(500), "the sender was idle: {stream}");
    assert!(churn["answered"].as_u64() > Some(100), "the opener was idle: {churn}");
    account.end().await
}
