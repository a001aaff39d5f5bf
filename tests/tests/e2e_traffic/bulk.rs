//! Much data, and large packets, over a steered path: the replies enter at a node that does not own the port, and
//! the tunnel takes 36 of the 1,500 bytes.

use aegis_tests::cluster::{Cluster, PATIENCE, Pod, wait_for};
use aegis_tests::lab::plan::{NODES, Node};
use serde_json::json;

use crate::account::Account;
use crate::metrics::Packets;

/// Large replies asked for, one after another.
const ASKED: u64 = 20;
/// Bytes each way.
const BYTES: u64 = 200_000_000;
/// Where the pod runs, and where replies enter.
const OWNER: Node = NODES[0];
const OTHER: Node = NODES[1];

#[tokio::test]
async fn bulk_data_arrives_whole_over_a_steered_path() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::create(&cluster, "bulk", "ports: {perNode: {min: 1}}").await?;
    let pod = account.pod("bulk", &OWNER.name()).await?;
    let _entry = lab.entry(account.address, OTHER)?;
    transfer(&cluster, &pod, "default offloads").await?;
    let off = lab.without_offloads(OWNER)?;
    transfer(&cluster, &pod, "no offloads").await?;
    off.now()?;
    account.end().await
}

/// Sends and receives; the probe compares digests.
async fn transfer(cluster: &Cluster, pod: &Pod, what: &str) -> anyhow::Result<()> {
    let origin = cluster.origin(0)?;
    for way in ["upload", "download"] {
        let before = Packets::settled(cluster).await?;
        let answer = pod.call(json!({"do": way, "to": origin.port(0), "bytes": BYTES})).await?;
        assert_eq!(answer["ok"], true, "{way}, {what}: {answer}");
        let steered = Packets::settled(cluster).await?.since(&before, &OTHER.name(), "steered");
        println!("{way} of {BYTES} bytes, {what}: {} ms, {steered} packets steered", answer["ms"]);
        let least = if way == "download" { BYTES / 1500 } else { 1 };
        assert!(steered >= least, "{way}, {what}: only {steered} packets were steered");
    }
    Ok(())
}

#[tokio::test]
async fn large_datagrams_pass_whole_or_in_fragments() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::create(&cluster, "large", "ports: {perNode: {min: 1}}").await?;
    let pod = account.pod("large", &OWNER.name()).await?;
    let origin = cluster.origin(0)?;
    for entry in NODES {
        let _entry = lab.entry(account.address, entry)?;
        let mut before = Packets::settled(&cluster).await?;
        // 1,472 fills a packet that may not be fragmented on its way; the others come in fragments from the start.
        for bytes in [1472, 8000] {
            // The origin may still know the narrow path from before.
            lab.command_in("o1", "ip").args(["route", "flush", "cache"]).status()?;
            let mut lost = 0;
            for _ in 0..ASKED {
                let ask =
                    json!({"do": "udp", "to": origin.port(0), "reply_bytes": bytes, "timeout_ms": 3000});
                lost += u64::from(pod.call(ask).await?["received"] != bytes);
            }
            let after = Packets::settled(&cluster).await?;
            let too_big = after.total_since(&before, "too_big");
            before = after;
            let what = format!("replies of {bytes} bytes by {}", entry.name());
            println!("{what}: {lost} lost, {too_big} too big for the tunnel");
            // The reply that did not fit tells the origin that the path is narrow: it is the only one lost.
            assert!(lost <= 1, "{what}: {lost} of {ASKED} lost");
            assert_eq!(lost, too_big, "{what}: not lost because it was too big");
            if bytes == 1472 {
                assert_eq!(lost == 1, entry != OWNER, "{what}: {lost} lost");
            }
        }
        for bytes in [1472, 2000, 8000] {
            let answer = pod.call(json!({"do": "udp", "to": origin.port(0), "bytes": bytes})).await?;
            let source = answer["source"].as_str().unwrap_or_default();
            assert!(source.starts_with(&format!("{}:", account.address)), "{bytes} bytes out: {answer}");
        }
        // The echo comes back as large as it went; the first may be too large.
        wait_for("large echo replies", PATIENCE, async || {
            let ping =
                json!({"do": "ping", "to": origin.address(), "count": 5, "bytes": 2000, "timeout_ms": 2000});
            Ok((pod.call(ping).await?["received"] == 5).then_some(()))
        })
        .await?;
    }
    account.end().await
}
