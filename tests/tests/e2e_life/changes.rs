//! Edits of objects while connections go on.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use anyhow::ensure;
use kube::api::DeleteParams;
use serde_json::json;

use crate::account::{Account, BOUND, PROMPT, ZONE, only};
use crate::inside::Inside;

/// Edits in a row.
const EDITS: usize = 50;

/// Waits until a new connection has this source, at most [`PROMPT`].
async fn follows(pod: &Inside, to: SocketAddrV4, source: Ipv4Addr, what: &str) -> anyhow::Result<()> {
    let begin = Instant::now();
    wait_for(what, PATIENCE, async || Ok((pod.source(to).await? == Ok(source)).then_some(()))).await?;
    println!("{what}: new connections followed in {} ms", begin.elapsed().as_millis());
    ensure!(begin.elapsed() < PROMPT, "{what}: {:?}", begin.elapsed());
    Ok(())
}

#[tokio::test]
async fn each_way_to_switch_off_and_on_is_prompt_and_breaks_nothing() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let account = Account::new(&cluster, "switch", 4).await?;
    account.bind_and_wait().await?;
    let nodes = cluster.nodes().await?;
    let pod = account.pod_on("switched", &nodes[1 % nodes.len()], true).await?;
    let (node, to) = (pod.host(), cluster.origin(0)?.port(0));
    let selector = format!("{}: {}", BOUND.0, BOUND.1);
    let mut live = Vec::new();
    for way in ["label", "enabled", "deletion"] {
        follows(&pod, to, account.address, &format!("{way}, on")).await?;
        let dedicated = format!("{way}-dedicated");
        pod.open(&dedicated, to, 50).await?;
        match way {
            "label" => pod.pod.set_label(BOUND.0, None).await?,
            "enabled" => account.apply_binding(&selector, &account.zone, "enabled: false").await?,
            _ => drop(account.bindings().delete("partners", &DeleteParams::default()).await?),
        }
        follows(&pod, to, node, &format!("{way}, off")).await?;
        let plain = format!("{way}-plain");
        pod.open(&plain, to, 50).await?;
        live.extend([dedicated, plain]);
        for group in &live {
            pod.exchange(group, 50).await?;
        }
        match way {
            "label" => pod.pod.set_label(BOUND.0, Some(BOUND.1)).await?,
            _ => account.bind().await?,
        }
    }
    follows(&pod, to, account.address, "at last, on").await?;
    for group in &live {
        pod.exchange(group, 50).await?;
    }
    account.end().await
}

#[tokio::test]
async fn fifty_edits_in_a_row_leak_nothing() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "edits", 8).await?;
    account.bind_and_wait().await?;
    let pods = account.pods_on_all_nodes("busy").await?;
    let origin = cluster.origin(0)?;
    let mut capture = lab.capture(&[ZONE])?;
    for pod in &pods {
        pod.open("held", origin.port(1), 100).await?;
        pod.churn("new", origin.port(0)).await?;
    }
    let matching = format!("podSelector: {{matchLabels: {{{}: {}}}}}", BOUND.0, BOUND.1);
    let existing = format!("podSelector: {{matchExpressions: [{{key: {}, operator: Exists}}]}}", BOUND.0);
    // Whatever is written, the pods and the origin's port stay covered.
    let variants = [
        (&matching, "cidrs: [198.51.100.0/24]"),
        (&matching, "cidrs: [198.51.100.10/32, 192.0.2.0/24]"),
        (&existing, "cidrs: [198.51.100.0/25, 198.51.100.128/25]"),
        (&existing, "cidrs: [198.51.100.0/24], ports: [{port: 7000}]"),
        (
            &matching,
            "cidrs: [198.51.100.0/24], ports: [{port: 6000, endPort: 7009}, {protocol: UDP, port: 7000}]",
        ),
        (&existing, "cidrs: [0.0.0.0/0]"),
        (&matching, "cidrs: [0.0.0.0/0, 198.51.100.10/32], ports: [{port: 1, endPort: 65535}]"),
    ];
    for edit in 0..EDITS {
        let (workloads, zone) = variants[edit % variants.len()];
        account.apply_binding_with(workloads, zone, "enabled: true").await?;
        // The pods' own labels change too; the one that binds has any value.
        if workloads == &existing {
            pods[edit % pods.len()].pod.set_label("edit", Some(&edit.to_string())).await?;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    account.bind_and_wait().await?;
    for pod in &pods {
        let made = pod.unbroken_churn("new").await?;
        println!("{}: {made} connections meanwhile", pod.pod.name());
        pod.exchange("held", 100).await?;
    }
    only(&mut capture, account.address)?;
    account.end().await
}

#[tokio::test]
async fn connections_that_begin_while_a_binding_is_switched_break_nothing() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let account = Account::new(&cluster, "flicker", 80).await?;
    account.bind_and_wait().await?;
    let pods = account.pods_on_all_nodes("busy").await?;
    let to = cluster.origin(0)?.port(0);
    for pod in &pods {
        // Without a pause: a change is to meet packets between the programs.
        pod.call(json!({"do": "churn", "name": "new", "to": to, "parallel": 8, "pause_ms": 0})).await?;
    }
    let selector = format!("{}: {}", BOUND.0, BOUND.1);
    for edit in 0..EDITS {
        account.apply_binding(&selector, ZONE, &format!("enabled: {}", edit % 2 != 0)).await?;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for pod in &pods {
        println!("{}: {} connections meanwhile", pod.pod.name(), pod.unbroken_churn("new").await?);
    }
    account.end().await
}
