//! One address, three nodes, replies entering at each of them.

use aegis_tests::cluster::Cluster;
use aegis_tests::lab::plan::NODES;
use serde_json::json;

use crate::account::Account;
use crate::metrics::Packets;

/// TCP connections that each node's pod holds at a time, to one port of one origin.
const HELD: usize = 1000;
/// Datagrams, and echo requests, of each pod.
const OTHERS: u64 = 50;

#[tokio::test]
async fn three_nodes_share_one_address_and_every_reply_finds_its_way() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::create(&cluster, "headline", "ports: {perNode: {min: 16}}").await?;
    let names = NODES.map(|node| node.name());
    let pods = futures::future::try_join_all(names.iter().map(|node| account.pod(node, node))).await?;
    let origin = cluster.origin(0)?;
    origin.reset().await?;
    let mut capture = lab.capture(&["198.51.100.0/24"])?;
    let before = Packets::settled(&cluster).await?;

    futures::future::try_join_all(pods.iter().map(async |pod| {
        pod.open("held", origin.port(0), HELD).await?;
        for _ in 0..OTHERS {
            let udp = pod.call(json!({"do": "udp", "to": origin.port(0)})).await?;
            assert!(
                udp["source"].as_str().is_some_and(|s| s.starts_with(&format!("{}:", account.address))),
                "{udp}"
            );
        }
        let ping = pod.call(json!({"do": "ping", "to": origin.address(), "count": OTHERS})).await?;
        assert_eq!(ping["received"], OTHERS, "{ping}");
        anyhow::Ok(())
    }))
    .await?;
    // All 3,000 are open now: each answers once more.
    futures::future::try_join_all(pods.iter().map(|pod| pod.exchange("held", HELD))).await?;

    let after = Packets::settled(&cluster).await?;
    let report = capture.report()?;
    let summary = origin.summary().await?;
    let all = 3 * HELD as u64;
    assert_eq!((summary.tcp.total, summary.tcp.open, summary.tcp.tuples), (all, all, all), "{summary:?}");
    assert_eq!(summary.udp.total, 3 * OTHERS, "{summary:?}");
    assert!(
        summary.tcp.sources.keys().chain(summary.udp.sources.keys()).eq([&account.address; 2]),
        "{summary:?}"
    );

    assert!(report.is_only(account.address), "{:?}", report.sources);
    assert_eq!(report.nodes(account.address), names.into_iter().collect());
    assert_eq!(report.shared, 0, "5-tuples of two nodes: {:?}", report.shared_flows);
    assert_eq!((report.tcp_starts, report.reopened), (all, 0));

    for node in after.nodes() {
        let [steered, back, handed] =
            ["steered", "reverse", "steered_here"].map(|reason| after.since(&before, node, reason));
        println!(
            "{node}: {steered} replies steered away, {back} to its pods, {handed} of them from other nodes"
        );
        assert!(steered + back > handed, "no reply entered at {node}");
    }
    let [steered, back] = ["steered", "reverse"].map(|reason| after.total_since(&before, reason));
    assert!(2 * steered >= back, "{steered} of {back} replies were steered");
    account.end().await
}
