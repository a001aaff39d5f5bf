//! From the very first packet, and not a packet earlier than that for what lives already.

use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::plan::NODES;
use anyhow::Context;
use serde_json::json;

use crate::account::{Account, BOUND, PROMPT, ZONE, only};

/// Pods that start at once on each node.
const STARTING: usize = 4;

#[tokio::test]
async fn a_new_pod_has_the_dedicated_source_from_its_first_packet() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "first", 4).await?;
    account.bind_and_wait().await?;
    let origin = cluster.origin(0)?;
    origin.reset().await?;
    let mut capture = lab.capture(&[ZONE])?;
    let (to, port) = (origin.address().to_string(), origin.port(0).port().to_string());
    let command = ["whoami", &to, &port];

    let starts = NODES.iter().flat_map(|node| (0..STARTING).map(move |index| (node.name(), index)));
    let ends = starts.map(|(node, index)| {
        let pod = account.namespace.pod(&format!("starts-{node}-{index}")).on(&node).label(BOUND.0, BOUND.1);
        pod.run(&command)
    });
    for (succeeded, output) in futures::future::try_join_all(ends).await? {
        assert!(succeeded, "{output}");
        assert!(output.starts_with(&format!("{}:", account.address)), "{output}");
    }

    let report = only(&mut capture, account.address)?;
    assert_eq!(report.tcp_starts as usize, NODES.len() * STARTING, "{report:?}");
    assert_eq!(origin.summary().await?.tcp.total as usize, NODES.len() * STARTING);
    account.end().await
}

#[tokio::test]
async fn a_binding_takes_new_connections_and_leaves_live_ones_alone() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let account = Account::new(&cluster, "change", 4).await?;
    let origin = cluster.origin(0)?;
    let pod = account.pod_on("there", &cluster.nodes().await?[0], true).await?;
    let node = pod.host();
    assert_eq!(pod.source(origin.port(0)).await?, Ok(node));
    origin.reset().await?;
    pod.open("old", origin.port(0), 100).await?;
    // Of the two UDP flows one is never answered: to conntrack it stays new for as long as it lives.
    for (name, port, echo) in [("answered", 1, true), ("silent", 2, false)] {
        pod.call(
            json!({"do": "stream", "name": name, "to": origin.port(port), "interval_ms": 20, "echo": echo}),
        )
        .await?;
    }

    let begin = std::time::Instant::now();
    account.bind().await?;
    wait_for("a dedicated source", PATIENCE, async || {
        Ok((pod.source(origin.port(0)).await? == Ok(account.address)).then_some(()))
    })
    .await?;
    let took = begin.elapsed();
    println!("first dedicated connection {} ms after the binding", took.as_millis());
    assert!(took < PROMPT, "{took:?}");

    pod.open("new", origin.port(0), 100).await?;
    tokio::time::sleep(PROMPT).await;
    pod.exchange("old", 100).await?;
    pod.exchange("new", 100).await?;
    let ended: Vec<u64> = [stop(&pod, "answered").await?, stop(&pod, "silent").await?].into();
    for (port, sent) in [(origin.port(1).port(), ended[0]), (origin.port(2).port(), ended[1])] {
        // The last one may still be on its way.
        let records = wait_for("every datagram", PATIENCE, async || {
            let all = origin.call(json!({"do": "records"})).await?;
            let datagrams = all["udp"].as_array().context("no UDP records")?;
            let of_port: Vec<_> = datagrams.iter().filter(|it| it["port"] == port).cloned().collect();
            let count: u64 = of_port.iter().filter_map(|it| it["count"].as_u64()).sum();
            Ok((count >= sent).then_some(of_port))
        })
        .await
        .with_context(|| {
            format!("{sent} were sent to port {port}: a flow of before the binding lost some")
        })?;
        assert_eq!(records.len(), 1, "a flow from before the binding keeps its source: {records:?}");
        let source = records[0]["source"].as_str().unwrap_or_default();
        assert!(source.starts_with(&format!("{node}:")), "{records:?}");
    }
    account.end().await
}

/// Ends a stream and returns how many datagrams it sent.
async fn stop(pod: &crate::inside::Inside, name: &str) -> anyhow::Result<u64> {
    let end = pod.call(json!({"do": "stop", "name": name})).await?;
    end["sent"].as_u64().context("no count")
}
