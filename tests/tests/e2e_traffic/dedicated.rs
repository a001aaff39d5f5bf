//! Nobody else sends from an egress address, and nobody gets in through it.

use std::net::SocketAddrV4;

use aegis_crds::EgressAddress;
use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use anyhow::Context;
use kube::api::Api;
use serde_json::json;

use crate::account::Account;
use crate::metrics::Packets;

/// Packets of each kind.
const COUNT: u64 = 5;

#[tokio::test]
async fn what_is_not_covered_keeps_the_nodes_address() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let account = Account::create(&cluster, "apart", "ports: {perNode: {min: 1}}").await?;
    let place = &cluster.nodes().await?[0];
    let bound = account.pod("bound", place).await?;
    let unbound = account.namespace.pod("unbound").on(place).start().await?;
    let (inside, outside) = (cluster.origin(0)?.port(0), cluster.origin(1)?.port(0));
    let node = bound.host();
    assert_eq!(bound.source(inside).await?, Ok(account.address));
    assert_eq!(bound.source(outside).await?, Ok(node), "outside the zone");
    assert_eq!(unbound.source(inside).await?, Ok(node), "a pod without the label");
    account.end().await
}

#[tokio::test]
async fn a_forged_egress_address_does_not_leave() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::create(&cluster, "forge", "ports: {perNode: {min: 1}}").await?;
    let bound = account.pod("bound", "n1").await?;
    let unbound = account.namespace.pod("unbound").on("n2").start().await?;
    // A port that the node holds would be the most convincing forgery.
    let port = own_port(&cluster, &account, "n1").await?;
    let forged = SocketAddrV4::new(account.address, port);
    let mut capture = lab.capture(&["198.51.100.0/24", "192.0.2.0/24"])?;
    let before = Packets::settled(&cluster).await?;
    for pod in [&bound, &unbound] {
        let mut sent = 0;
        for origin in [cluster.origin(0)?, cluster.origin(1)?] {
            for protocol in ["tcp", "tcp_ack", "udp", "icmp"] {
                let forge = json!({"do": "forge", "from": forged, "to": origin.port(0), "protocol": protocol,
                                   "count": COUNT});
                pod.call(forge).await?;
                sent += COUNT;
                let what = format!("{protocol} of {} to {} to be dropped", pod.name(), origin.address());
                wait_for(&what, PATIENCE, async || {
                    let dropped = Packets::read(&cluster).await?.since(&before, pod.node(), "drop_forged");
                    Ok((dropped == sent).then_some(()))
                })
                .await?;
            }
        }
    }
    let sources = capture.report()?.addresses();
    assert!(!sources.contains(&account.address), "{sources:?}");
    account.end().await
}

#[tokio::test]
async fn what_nobody_asked_for_reaches_no_pod_and_gets_no_answer() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::create(&cluster, "unasked", "ports: {perNode: {min: 1}}").await?;
    let pod = account.pod("bound", "n1").await?;
    let (asked, stranger) = (cluster.origin(0)?, cluster.origin(1)?);
    // A live flow of the pod: the stranger sends to its very port.
    let live = pod.call(json!({"do": "udp", "to": asked.port(0)})).await?;
    let live: SocketAddrV4 = live["source"].as_str().context("no source")?.parse()?;
    let nobodys = SocketAddrV4::new(account.address, nobodys_port(&cluster, &account).await?);
    let privileged = SocketAddrV4::new(account.address, 443);
    let mut capture = lab.capture(&["192.0.2.0/24"])?;

    for (to, reason) in [(live, "drop_no_flow"), (nobodys, "drop_no_owner"), (privileged, "drop_no_owner")] {
        for protocol in ["tcp", "tcp_ack", "udp"] {
            let before = Packets::settled(&cluster).await?;
            let from = SocketAddrV4::new(stranger.address(), 20_000);
            stranger
                .call(json!({"do": "forge", "from": from, "to": to, "protocol": protocol, "count": COUNT}))
                .await?;
            let what = format!("{protocol} to {to} to be dropped as {reason}");
            wait_for(&what, PATIENCE, async || {
                let after = Packets::read(&cluster).await?;
                assert_eq!(after.total_since(&before, "reverse"), 0, "{protocol} to {to} was let in");
                Ok((after.total_since(&before, reason) == COUNT).then_some(()))
            })
            .await?;
        }
        // As an ordinary program sees it: silence, no refusal.
        let tcp = stranger.call(json!({"do": "connect", "to": to, "timeout_ms": 500})).await?;
        assert_eq!(tcp["failure"], "timeout", "{to}: {tcp}");
        let udp = stranger.call(json!({"do": "udp", "to": to, "timeout_ms": 500})).await?;
        assert_eq!(udp["failure"], "timeout", "{to}: {udp}");
    }

    let before = Packets::settled(&cluster).await?;
    for identifier in [live.port(), nobodys.port(), 7] {
        let ping = json!({"do": "ping", "to": account.address, "identifier": identifier, "timeout_ms": 500});
        let ping = stranger.call(ping).await?;
        assert_eq!((&ping["received"], &ping["errors"]), (&json!(0), &json!([])), "{ping}");
    }
    let after = Packets::settled(&cluster).await?;
    let dropped = ["drop_no_flow", "drop_no_owner"].map(|reason| after.total_since(&before, reason));
    assert_eq!(dropped.iter().sum::<u64>(), 3, "echo requests: {dropped:?}");

    let report = capture.report()?;
    assert_eq!(report.sources.len(), 0, "something answered: {:?}", report.sources);
    let received = pod.call(json!({"do": "summary"})).await?;
    assert_eq!((&received["tcp"]["total"], &received["udp"]["total"]), (&json!(0), &json!(0)), "{received}");
    account.end().await
}

/// The first port of a node's first slice.
async fn own_port(cluster: &Cluster, account: &Account, node: &str) -> anyhow::Result<u16> {
    let holdings = holdings(cluster, account).await?;
    let held = holdings.iter().find(|(_, _, holder)| holder == node).context("the node holds nothing")?;
    Ok(u16::from(held.0) << 8)
}

/// A port of a slice that no node holds.
async fn nobodys_port(cluster: &Cluster, account: &Account) -> anyhow::Result<u16> {
    let holdings = holdings(cluster, account).await?;
    let free =
        (4..=u8::MAX).find(|slice| !holdings.iter().any(|(first, last, _)| (first..=last).contains(&slice)));
    Ok(u16::from(free.context("every slice is held")?) << 8)
}

/// First slice, last slice and node of each holding of the account's address.
async fn holdings(cluster: &Cluster, account: &Account) -> anyhow::Result<Vec<(u8, u8, String)>> {
    let addresses: Api<EgressAddress> = Api::all(cluster.client());
    let address = addresses.get(&account.address.to_string()).await?;
    let holdings = address.spec.holdings.into_iter();
    holdings.map(|held| Ok((held.first.try_into()?, held.last.try_into()?, held.node))).collect()
}
