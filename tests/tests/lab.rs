//! The lab itself: its network, its recorder and its faults, without Aegis. What the other tests build on.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use aegis_tests::cluster::{Cluster, Namespace, Pod, wait_for};
use aegis_tests::lab::plan::{NODES, Node};
use anyhow::Context;
use serde_json::json;

/// Connections that each pod holds to an origin: what the demo needs.
const HELD: usize = 2000;

async fn pods(namespace: &Namespace) -> anyhow::Result<Vec<Pod>> {
    let start = |node: Node| namespace.pod(&format!("pod-{}", node.name())).on(&node.name()).start();
    futures::future::try_join_all(NODES.map(start)).await
}

#[tokio::test]
async fn pods_leave_with_their_nodes_address_and_the_recorder_sees_it() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let namespace = cluster.namespace("lab").await?;
    let pods = pods(&namespace).await?;
    let origin = cluster.origin(0)?;
    origin.reset().await?;
    let mut capture = lab.capture(&["198.51.100.0/24"])?;

    for (pod, node) in pods.iter().zip(NODES) {
        pod.open("held", origin.port(0), HELD).await?;
        pod.exchange("held", HELD).await?;
        assert_eq!(pod.source(origin.port(1)).await?, Ok(node.address()));
        let ping = pod.call(json!({"do": "ping", "to": origin.address(), "count": 3})).await?;
        assert_eq!(ping["received"], 3, "{ping}");
        for connected in [true, false] {
            let udp = pod.call(json!({"do": "udp", "to": origin.port(2), "connected": connected})).await?;
            assert!(
                udp["source"].as_str().is_some_and(|s| s.starts_with(&format!("{}:", node.address()))),
                "{udp}"
            );
        }
        let large = pod.call(json!({"do": "udp", "to": origin.port(2), "reply_bytes": 9000})).await?;
        assert_eq!(large["received"], 9000, "{large}");
        let gone = pod.call(json!({"do": "connect", "to": SocketAddrV4::new(origin.address(), 9)})).await?;
        assert_eq!(gone["failure"], "refused", "{gone}");
    }

    let held = 3 * HELD as u64;
    let summary = origin.summary().await?;
    assert_eq!((summary.tcp.total, summary.tcp.open, summary.tcp.twice), (held + 3, held, 0));
    let addresses: BTreeSet<Ipv4Addr> = NODES.iter().map(|node| node.address()).collect();
    assert_eq!(summary.tcp.sources.keys().copied().collect::<BTreeSet<_>>(), addresses);
    let report = capture.report()?;
    assert_eq!(report.addresses(), addresses);
    assert_eq!(report.shared, 0, "{:?}", report.shared_flows);
    assert!(report.tcp_starts >= held + 3, "{report:?}");
    for node in NODES {
        assert_eq!(report.nodes(node.address()), [node.name()].into());
    }
    namespace.end().await
}

#[tokio::test]
async fn bulk_data_arrives_whole_with_offloads_on_and_off() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let namespace = cluster.namespace("bulk").await?;
    let pod = namespace.pod("bulk").on("n1").start().await?;
    let origin = cluster.origin(0)?;
    let mut capture = lab.capture(&["198.51.100.0/24"])?;
    for usual in [true, false, true] {
        let _off = (!usual).then(|| lab.without_offloads(NODES[0])).transpose()?;
        for way in ["upload", "download"] {
            let answer = pod.call(json!({"do": way, "to": origin.port(0), "bytes": 100_000_000})).await?;
            assert_eq!(answer["ok"], true, "{way}, usual offloads {usual}: {answer}");
            println!("{way} of 100 MB, usual offloads {usual}: {} ms", answer["ms"]);
        }
    }
    let seen: u64 = capture.report()?.traffic.iter().map(|traffic| traffic.bytes).sum();
    assert!(seen > 600_000_000, "the recorder saw only {seen} bytes");
    namespace.end().await
}

#[tokio::test]
async fn origins_reach_pods_and_nodes() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let namespace = cluster.namespace("inbound").await?;
    let pod = namespace.pod("server").on("n2").start().await?;
    let service = namespace
        .apply(
            "apiVersion: v1\nkind: Service\nmetadata: {name: server}\n\
             spec: {type: NodePort, selector: {app: server}, ports: [{port: 8080}]}\n",
        )
        .await?;
    let port = service[0].data["spec"]["ports"][0]["nodePort"].as_u64().context("no node port")? as u16;
    let origin = cluster.origin(1)?;
    let mut doors = vec![SocketAddrV4::new(pod.address(), 8080)];
    doors.extend(NODES.map(|node| SocketAddrV4::new(node.address(), port)));
    for door in doors {
        wait_for("a connection from outside", Duration::from_secs(20), async || {
            let answer = origin.call(json!({"do": "connect", "to": door, "timeout_ms": 1000})).await?;
            Ok((answer["ok"] == true).then_some(()))
        })
        .await
        .with_context(|| format!("to {door}"))?;
    }
    namespace.end().await
}

#[tokio::test]
async fn the_routers_choice_of_node_can_be_set() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    // An address that nothing else uses: packets to it go to the node that the router chooses, and die there.
    let address = Ipv4Addr::new(203, 0, 113, 254);
    let origin = cluster.origin(0)?;
    let mut capture = lab.capture(&["203.0.113.254/32"])?;
    let mut packets_to_nodes = async || -> anyhow::Result<BTreeSet<String>> {
        capture.reset()?;
        for port in 0..64_u16 {
            let from = SocketAddrV4::new(origin.address(), 20_000 + port);
            let to = SocketAddrV4::new(address, 30_000);
            origin.call(json!({"do": "forge", "from": from, "to": to, "protocol": "udp"})).await?;
        }
        let report = capture.report()?;
        let to_node = report.traffic.iter().filter(|t| t.direction == "out" && t.packets >= 5);
        Ok(to_node.map(|traffic| traffic.device.clone()).collect())
    };
    assert_eq!(packets_to_nodes().await?.len(), 3, "ECMP uses every node");
    for node in NODES {
        let _entry = lab.entry(address, node)?;
        assert!(packets_to_nodes().await?.contains(&node.name()));
    }
    Ok(())
}

#[tokio::test]
async fn a_pod_can_forge_without_aegis() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let namespace = cluster.namespace("forge").await?;
    let pod = namespace.pod("forger").on("n3").start().await?;
    let origin = cluster.origin(0)?;
    let mut capture = lab.capture(&["198.51.100.0/24"])?;
    // The CNI translates its own range only: without Aegis, what a pod forges is what the wire shows. A test that
    // finds nothing forged with Aegis can therefore fail.
    let forged = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 253), 4000);
    pod.call(json!({"do": "forge", "from": forged, "to": origin.port(0), "protocol": "udp", "count": 4}))
        .await?;
    wait_for("the forged packets", Duration::from_secs(5), async || {
        Ok(capture.report()?.addresses().contains(forged.ip()).then_some(()))
    })
    .await?;
    namespace.end().await
}

/// Whether a pod reaches an origin now.
async fn reaches(pod: &Pod, origin: SocketAddrV4) -> anyhow::Result<bool> {
    let answer = pod.call(json!({"do": "connect", "to": origin, "timeout_ms": 1000})).await?;
    Ok(answer["ok"] == true)
}

#[tokio::test]
async fn a_cut_link_carries_nothing_until_it_is_restored() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let namespace = cluster.namespace("cut").await?;
    let pod = namespace.pod("cut").on("n1").start().await?;
    let origin = cluster.origin(0)?;
    pod.call(json!({"do": "stream", "name": "s", "to": origin.port(0), "interval_ms": 10})).await?;
    let cut = lab.without_link(NODES[0])?;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    cut.now()?;
    wait_for("the pod to be reached again", Duration::from_secs(20), async || reached(&pod, &origin).await)
        .await?;
    let statistics = pod.call(json!({"do": "stop", "name": "s"})).await?;
    assert!(statistics["longest_gap_ms"].as_f64().context("no gap")? >= 1400.0, "{statistics}");
    assert!(statistics["received"].as_u64().context("no count")? > 10, "{statistics}");
    namespace.end().await
}

async fn reached(pod: &Pod, origin: &aegis_tests::cluster::Origin) -> anyhow::Result<Option<()>> {
    Ok(reaches(pod, origin.port(0)).await.unwrap_or(false).then_some(()))
}

#[tokio::test]
async fn a_frozen_node_does_nothing_until_it_thaws() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let namespace = cluster.namespace("freeze").await?;
    let pod = namespace.pod("frozen").on("n2").start().await?;
    let origin = cluster.origin(0)?;
    let server = SocketAddrV4::new(pod.address(), 8080);
    let connect = json!({"do": "connect", "to": server, "timeout_ms": 500});
    assert_eq!(origin.call(connect.clone()).await?["ok"], true);
    let node = lab.frozen(NODES[1])?;
    let frozen = origin.call(connect.clone()).await?;
    node.now()?;
    assert_eq!(frozen["failure"], "timeout", "{frozen}");
    wait_for("the pod to be reached again", Duration::from_secs(20), async || reached(&pod, &origin).await)
        .await?;
    namespace.end().await
}

#[tokio::test]
async fn traffic_outlives_the_api_server() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let namespace = cluster.namespace("api").await?;
    let pod = namespace.pod("api").on("n3").start().await?;
    let origin = cluster.origin(0)?;
    pod.open("held", origin.port(0), 50).await?;
    lab.stop_api_server()?;
    let without = pod.exchange("held", 50).await;
    lab.start_api_server().await?;
    assert!(without.is_err(), "commands to pods need the API server");
    wait_for("exec to work again", Duration::from_secs(30), async || Ok(pod.exchange("held", 50).await.ok()))
        .await?;
    namespace.end().await
}

#[tokio::test]
async fn a_node_goes_and_comes_back() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let nodes: kube::Api<k8s_openapi::api::core::v1::Node> = kube::Api::all(cluster.client());
    lab.remove_node(NODES[2]).await?;
    assert!(nodes.get_opt("n3").await?.is_none());
    assert!(lab.exec(NODES[2], "true", &[]).is_err());
    lab.add_node(NODES[2]).await?;
    let namespace = cluster.namespace("back").await?;
    let pod = namespace.pod("back").on("n3").start().await?;
    assert_eq!(pod.source(cluster.origin(1)?.port(0)).await?, Ok(NODES[2].address()));
    namespace.end().await
}

#[tokio::test]
async fn images_that_no_container_uses_stay_however_full_the_disk_is() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    if cluster.lab().is_none() {
        return Ok(());
    }
    for node in NODES {
        let path = format!("/api/v1/nodes/{}/proxy/configz", node.name());
        let config: serde_json::Value =
            cluster.client().request(http::Request::get(path).body(Vec::new())?).await?;
        let threshold = &config["kubeletconfig"]["imageGCHighThresholdPercent"];
        assert_eq!(threshold, 100, "{}", node.name());
    }
    Ok(())
}
