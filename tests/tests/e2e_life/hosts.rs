//! Pods of the host network: covered like others, though their address is the node's.

use std::net::Ipv4Addr;

use aegis_crds::{ZoneBinding, type_};
use aegis_tests::cluster::{Cluster, PATIENCE, Pod, wait_for};
use aegis_tests::lab::images;
use aegis_tests::lab::plan::{NODES, Node};
use anyhow::{Context, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

use crate::account::{Account, BOUND, ZONE, holds, only};

/// Connections that each pod holds.
const LIVE: usize = 100;
/// The same of those that have the address themselves: all find room in one slice.
const SOCKETS: usize = 40;
/// Bytes each way.
const BULK: u64 = 20_000_000;

async fn pods(account: &Account, name: &str) -> anyhow::Result<Vec<Pod>> {
    futures::future::try_join_all(NODES.map(async |node| {
        let builder = account.namespace.pod(&format!("{name}-{}", node.name())).on(&node.name());
        builder.host_network().label(BOUND.0, BOUND.1).start().await
    }))
    .await
}

async fn traffic(cluster: &Cluster, account: &Account, pods: &[Pod]) -> anyhow::Result<()> {
    let lab = cluster.lab().context("the lab")?;
    let origin = cluster.origin(0)?;
    for pod in pods {
        assert_eq!(pod.address(), pod.host(), "in the node's network");
        pod.open("held", origin.port(0), LIVE).await?;
        let ping = pod.call(json!({"do": "ping", "to": origin.address(), "count": 3})).await?;
        assert_eq!(ping["received"], 3, "{}: {ping}", pod.node());
    }
    for entry in NODES {
        let _entry = lab.entry(account.address, entry)?;
        for pod in pods {
            let place = format!("{} entering at {}", pod.node(), entry.name());
            pod.exchange("held", LIVE).await?;
            for way in ["download", "upload"] {
                let answer = pod.call(json!({"do": way, "to": origin.port(2), "bytes": BULK})).await?;
                assert_eq!(answer["ok"], true, "{way} {place}: {answer}");
            }
            for bytes in [1300, 4000] {
                let ask = json!({"do": "udp", "to": origin.port(1), "bytes": bytes, "reply_bytes": bytes});
                wait_for(&place, PATIENCE, async || {
                    Ok((pod.call(ask.clone()).await?["received"] == bytes).then_some(()))
                })
                .await?;
            }
        }
    }
    Ok(())
}

/// Lets the pods' sockets have the address themselves, and translates again.
async fn bind(cluster: &Cluster, account: &Account, pods: &[Pod]) -> anyhow::Result<()> {
    let (lab, origin) = (cluster.lab().context("the lab")?, cluster.origin(0)?);
    let mode = async |mode: &str| {
        let patch = Patch::Merge(json!({"spec": {"mode": mode}}));
        account.bindings().patch("partners", &PatchParams::default(), &patch).await
    };
    mode("Bind").await?;
    for pod in pods {
        wait_for(&format!("a bound socket on {}", pod.node()), PATIENCE, async || {
            ensure!(pod.source(origin.port(0)).await? == Ok(account.address), "never another source");
            let metrics = cluster.agent_metrics(pod.node()).await?;
            Ok((metrics.packets("bound") > 0).then_some(()))
        })
        .await?;
    }
    for entry in NODES {
        let _entry = lab.entry(account.address, entry)?;
        for pod in pods {
            let name = format!("bound-{}", entry.name());
            pod.open(&name, origin.port(0), SOCKETS).await?;
            pod.exchange(&name, SOCKETS).await?;
            for way in ["download", "upload"] {
                let answer = pod.call(json!({"do": way, "to": origin.port(2), "bytes": BULK})).await?;
                ensure!(answer["ok"] == true, "{way} {} at {}: {answer}", pod.node(), entry.name());
            }
        }
    }
    for pod in pods {
        let mut last = String::new();
        // Agents read their counters now and then.
        let what = format!("the bound sockets of {} to be counted", pod.node());
        let counted = wait_for(&what, PATIENCE, async || {
            let metrics = cluster.agent_metrics(pod.node()).await?;
            let (bound, refused) = (metrics.packets("bound"), metrics.packets("refuse_no_socket_port"));
            last = format!("{bound} bound, {refused} refused");
            Ok((bound >= (NODES.len() * SOCKETS) as u64).then_some(()))
        });
        counted.await.with_context(|| last.clone())?;
    }
    mode("Nat").await?;
    for pod in pods {
        pod.exchange("held", LIVE).await?;
        for entry in NODES {
            pod.exchange(&format!("bound-{}", entry.name()), SOCKETS).await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn pods_of_the_host_network_leave_from_the_address_from_their_first_packet_on() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "hosts", 4).await?;
    account.bind_and_wait().await?;
    let origin = cluster.origin(0)?;
    let mut capture = lab.capture(&[ZONE])?;
    // The very first that each node has: nothing was looked at there before.
    let to = [origin.address().to_string(), "7000".to_owned()];
    for round in 0..5 {
        let firsts = NODES.map(async |node| {
            let builder = account.namespace.pod(&format!("first-{round}-{}", node.name())).on(&node.name());
            builder.host_network().label(BOUND.0, BOUND.1).run(&["whoami", &to[0], &to[1]]).await
        });
        for (ok, source) in futures::future::try_join_all(firsts).await? {
            assert!(ok && source.starts_with(&format!("{}:", account.address)), "{source}");
        }
    }
    let pods = pods(&account, "hosts").await?;
    wait_for("the binding to count them", PATIENCE, async || {
        let status = account.bindings().get("partners").await?.status.unwrap_or_default();
        Ok((status.pods as usize == pods.len()).then_some(()))
    })
    .await?;
    traffic(&cluster, &account, &pods).await?;
    only(&mut capture, account.address)?;
    bind(&cluster, &account, &pods).await?;
    only(&mut capture, account.address)?;

    // Others of the node are none of it, nor is a pod that is not covered any more but for what it has open.
    let [first, ..] = &pods[..] else { anyhow::bail!("no pods") };
    first.set_label(BOUND.0, None).await?;
    wait_for("the pod to be uncovered", PATIENCE, async || {
        Ok((first.source(origin.port(0)).await? == Ok(first.host())).then_some(()))
    })
    .await?;
    first.exchange("held", LIVE).await?;
    let seen =
        lab.exec(NODES[0], images::probe_binary().to_str().context("path")?, &["whoami", &to[0], &to[1]])?;
    ensure!(!seen.starts_with(&format!("{}:", account.address)), "the node's own: {seen}");
    account.end().await
}

#[tokio::test]
async fn pods_of_the_host_network_send_through_a_gateway() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let holder: Node = NODES[0];
    let sites =
        format!("sites: [{{name: zone, nodeSelector: {{topology.kubernetes.io/zone: {}}}}}]", holder.zone());
    let account = Account::with(&cluster, "hosts-gateway", 8, &sites).await?;
    account.bind_and_wait().await?;
    let mut capture = lab.capture(&[ZONE])?;
    let pods = pods(&account, "hosts").await?;
    traffic(&cluster, &account, &pods).await?;
    let report = only(&mut capture, account.address)?;
    assert_eq!(report.nodes(account.address), [holder.name()].into(), "only the holder sends");
    account.end().await
}

#[tokio::test]
async fn the_forward_proxy_of_the_examples_serves_its_namespace() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let origin = cluster.origin(0)?;
    let manifest = std::fs::read_to_string(images::workspace().join("examples/forward-proxy.yaml"))?;
    // The lab has no registry: its own proxy takes the place of the one that is named.
    let image = manifest.lines().find(|line| line.trim().starts_with("image:")).context("an image")?;
    let own = format!(
        "          image: {}\n          command: [/probe, proxy, --port, \"3128\"]",
        lab.probe_image()?
    );
    cluster.apply(&manifest.replace(image, &own)).await?;
    let namespace = cluster.adopt("forward-proxy").await?;
    let daemons: Api<DaemonSet> = namespace.api();
    wait_for("the proxies", PATIENCE, async || {
        let status = daemons.get("proxy").await?.status.unwrap_or_default();
        Ok((status.number_ready == NODES.len() as i32).then_some(()))
    })
    .await?;
    let bindings: Api<ZoneBinding> = namespace.api();
    wait_for("the binding", PATIENCE, async || {
        let binding = bindings.get("proxy").await?;
        let status = binding.status.unwrap_or_default();
        let programmed = holds(&status.conditions, type_::PROGRAMMED, binding.metadata.generation);
        Ok((programmed && status.pods as usize == NODES.len()).then_some(()))
    })
    .await?;
    let services: Api<Service> = namespace.api();
    let service = services.get("proxy").await?.spec.and_then(|spec| spec.cluster_ip).context("an address")?;
    let (proxy, to) = (format!("{service}:3128"), origin.address().to_string());
    for node in NODES {
        let client = namespace.pod(&format!("client-{}", node.name())).on(&node.name());
        let (ok, through) = client.run(&["whoami", "--through", &proxy, &to, "7000"]).await?;
        ensure!(ok, "{through}");
        let source: Ipv4Addr = through.split(':').next().unwrap_or_default().parse()?;
        assert!((208..224).contains(&source.octets()[3]), "{source} is of the prefix");
    }
    Ok(())
}
