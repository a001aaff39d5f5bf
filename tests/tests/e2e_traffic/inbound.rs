//! Connections that others open to a bound pod are none of Aegis's business.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use aegis_tests::cluster::{Cluster, wait_for};
use aegis_tests::lab::plan::NODES;
use anyhow::Context;
use serde_json::json;

use crate::account::Account;

#[tokio::test]
async fn inbound_connections_are_answered_from_the_address_they_came_to() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::create(&cluster, "inbound", "ports: {perNode: {min: 1}}").await?;
    let pod = account.pod("server", "n2").await?;
    let service = account
        .namespace
        .apply(
            "apiVersion: v1\nkind: Service\nmetadata: {name: server}\n\
             spec: {type: NodePort, selector: {app: server}, ports: [{port: 8080}]}\n",
        )
        .await?;
    let port = service[0].data["spec"]["ports"][0]["nodePort"].as_u64().context("no node port")? as u16;
    // The origin is in the binding's zone: what the pod sends it by itself is covered.
    let origin = cluster.origin(0)?;
    let mut capture = lab.capture(&["198.51.100.0/24"])?;
    let mut doors = vec![SocketAddrV4::new(pod.address(), 8080)];
    doors.extend(NODES.map(|node| SocketAddrV4::new(node.address(), port)));
    for door in &doors {
        let connect = json!({"do": "connect", "to": door, "timeout_ms": 1000});
        wait_for(&format!("a connection to {door}"), Duration::from_secs(20), async || {
            Ok((origin.call(connect.clone()).await?["ok"] == true).then_some(()))
        })
        .await?;
        for _ in 0..20 {
            let answer = origin.call(connect.clone()).await?;
            assert_eq!(answer["ok"], true, "{door}: {answer}");
        }
    }
    // A connected socket takes answers from the address it asked only.
    let udp = origin.call(json!({"do": "udp", "to": doors[0], "timeout_ms": 1000})).await?;
    assert_eq!(udp["ok"], true, "{udp}");
    let ping = origin.call(json!({"do": "ping", "to": pod.address(), "count": 3})).await?;
    assert_eq!(ping["received"], 3, "{ping}");
    let expected: BTreeSet<Ipv4Addr> = doors.iter().map(|door| *door.ip()).collect();
    assert_eq!(capture.report()?.addresses(), expected);

    // Its own connections are dedicated all the while.
    assert_eq!(pod.source(origin.port(0)).await?, Ok(account.address));
    account.end().await
}
