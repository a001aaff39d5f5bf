//! Errors from the way and from the origin reach the pod that caused them.

use std::net::{Ipv4Addr, SocketAddrV4};

use aegis_tests::cluster::{Cluster, Pod};
use aegis_tests::lab::Lab;
use aegis_tests::lab::plan::{NODES, Node};
use anyhow::Context;
use serde_json::json;

use crate::account::Account;
use crate::metrics::Packets;

/// Where the pod runs.
const OWNER: Node = NODES[0];

#[tokio::test]
async fn a_closed_port_is_refused_and_the_router_tells_when_time_is_over() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::create(&cluster, "errors", "ports: {perNode: {min: 1}}").await?;
    let pod = account.pod("errors", &OWNER.name()).await?;
    let origin = cluster.origin(0)?;
    let closed = SocketAddrV4::new(origin.address(), 9);
    let namespace = network_namespace(lab, &pod)?;
    for entry in NODES {
        let _entry = lab.entry(account.address, entry)?;
        let before = Packets::settled(&cluster).await?;
        let udp = pod.call(json!({"do": "udp", "to": closed})).await?;
        assert_eq!(udp["failure"], "refused", "by {}: {udp}", entry.name());
        // The node is the first hop, the router the second, the origin the third.
        for (hops, received, errors) in [(1, 0, json!(["11/0"])), (2, 0, json!(["11/0"])), (3, 1, json!([]))]
        {
            set_hops(lab, &namespace, hops)?;
            let ping = pod.call(json!({"do": "ping", "to": origin.address()})).await?;
            assert_eq!(
                (&ping["received"], &ping["errors"]),
                (&json!(received), &errors),
                "{hops} hops by {}: {ping}",
                entry.name()
            );
        }
        set_hops(lab, &namespace, 64)?;
        // Port unreachable, time exceeded from the router, and the echo reply: each was translated back. (Origins of
        // earlier tests may still be sending to pods that have just gone.)
        let back = Packets::settled(&cluster).await?.since(&before, &OWNER.name(), "reverse");
        assert!(back >= 3, "{back} by {}", entry.name());
    }
    account.end().await
}

/// How many hops what the pod sends may take.
fn set_hops(lab: &Lab, namespace: &str, hops: u8) -> anyhow::Result<()> {
    let path = format!("--net=/run/netns/{namespace}");
    let write = format!("echo {hops} > /proc/sys/net/ipv4/ip_default_ttl");
    lab.exec(OWNER, "nsenter", &[&path, "sh", "-c", &write]).map(drop)
}

/// Name of the pod's network namespace on its node.
fn network_namespace(lab: &Lab, pod: &Pod) -> anyhow::Result<String> {
    let names = lab.exec(OWNER, "ls", &["/run/netns"])?;
    let has = |name: &&str| {
        let path = format!("--net=/run/netns/{name}");
        let addresses = lab.exec(OWNER, "nsenter", &[&path, "hostname", "-I"]).unwrap_or_default();
        addresses.split_whitespace().any(|address| address.parse::<Ipv4Addr>().ok() == Some(pod.address()))
    };
    Ok(names.lines().find(has).context("the pod has no network namespace")?.to_owned())
}
