//! A single IPv6 address: every node sends from it at once, by ports, as from an IPv4 address.

use std::net::Ipv6Addr;

use aegis_crds::{AegisPrefix, HoldingState};
use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::plan::{NODES, Node, ROUTER6};
use anyhow::{Context, ensure};
use ipnet::Ipv6Net;
use kube::api::{Api, DeleteParams, ListParams};
use serde_json::json;

use crate::inside::Inside;
use crate::ipv6::{Account, Pinned, Watch};
use crate::programs::Way;

/// Connections that each pod holds at a time, to one port of one origin.
const HELD: usize = 500;
/// Longest time for which something is waited for that must not come.
const SILENCE_MS: u64 = 700;

/// An account with an address that no prefix has: what failed before may still drain.
async fn account(cluster: &Cluster, name: &str, mode: &str, more: &str) -> anyhow::Result<Account> {
    let prefixes: Api<AegisPrefix> = Api::all(cluster.client());
    let taken = prefixes.list(&ListParams::default()).await?.items;
    let taken: Vec<String> = taken.into_iter().map(|it| it.spec.cidr).collect();
    let mut pool = (1..64u16).map(|last| Ipv6Addr::new(0x2001, 0xdb8, 0x203, 0xff, 0, 0, 0, last));
    let free = pool.find(|address| !taken.contains(&format!("{address}/128")));
    let address = Ipv6Net::new(free.context("no address is free")?, 128)?;
    Account::of(cluster, name, address, mode, more).await
}

/// A bound pod on each node.
async fn pods(account: &Account) -> anyhow::Result<Vec<Inside>> {
    let pod = async |node: Node| account.pod(&format!("bound-{}", node.name()), node, true).await;
    futures::future::try_join_all(NODES.map(pod)).await
}

#[tokio::test]
async fn all_nodes_send_from_one_address_and_answers_find_them_wherever_they_enter() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = account(&cluster, "single", "None", ", ports: {perNode: {min: 4}}").await?;
    let origin = cluster.origin(0)?;
    let to = origin.port6(0)?;
    let pods = pods(&account).await?;
    let watch = Watch::new(lab, account.network, *to.ip())?;
    let entry = Pinned(lab, account.network);
    for node in NODES {
        entry.to(&[node])?;
        for pod in &pods {
            let context = || format!("{} entering at {}", pod.node(), node.name());
            let source = pod.source6(to).await?.map_err(anyhow::Error::msg).with_context(context)?;
            ensure!(source == account.network.addr(), "{}: {source}", context());
            let udp = pod.call(json!({"do": "udp", "to": to})).await?;
            let seen = udp["source"].as_str().with_context(|| format!("{}: {udp}", context()))?;
            ensure!(*seen.parse::<std::net::SocketAddrV6>()?.ip() == source, "{}: {udp}", context());
            for way in ["download", "upload"] {
                let transfer = pod.call(json!({"do": way, "to": to, "bytes": 2_000_000})).await?;
                ensure!(transfer["ok"] == true, "{}: {way}: {transfer}", context());
            }
            // Whole, and in fragments, which meet at one node. (The origin may have to learn first what fits into the tunnel.)
            for size in ["56", "4000"] {
                let words = ["-6", "-c", "3", "-W", "2", "-s", size, &to.ip().to_string()];
                let (answered, text) = pod.program("ping", &words).await?;
                ensure!(answered, "{}: {text}", context());
            }
        }
    }
    // All at once, each with a port of its own.
    entry.to(&NODES)?;
    origin.reset().await?;
    futures::future::try_join_all(pods.iter().map(|pod| pod.open("held", to, HELD))).await?;
    futures::future::try_join_all(pods.iter().map(|pod| pod.exchange("held", HELD))).await?;
    let tcp = origin.call(json!({"do": "summary"})).await?["tcp"].clone();
    let all = NODES.len() * HELD;
    ensure!((&tcp["open"], &tcp["tuples"]) == (&json!(all), &json!(all)), "{tcp}");
    watch.only()?;

    // Nobody gets in who was not asked: neither by a port that lives, nor by one of the pod's own.
    let stranger = cluster.origin(1)?;
    let object = account.object().await?.context("no object")?;
    let slice = object.spec.holdings.iter().find(|it| it.node == pods[0].node()).context("no slice")?.first;
    for port in [slice * 256, slice * 256 + 100, 8080] {
        for question in ["connect", "udp"] {
            let to = format!("[{}]:{port}", account.network.addr());
            let answer = stranger.call(json!({"do": question, "to": to, "timeout_ms": SILENCE_MS})).await?;
            ensure!(answer["failure"] == "timeout", "{question} to {to}: {answer}");
        }
    }
    // An agent that is killed breaks nothing, and the next one finds it all.
    let killed = lab.kill_agent(NODES[0])?;
    wait_for("the agent to be back", PATIENCE, async || {
        pods[0].exchange("held", HELD).await?;
        ensure!(pods[0].source6(to).await? == Ok(account.network.addr()), "also without an agent");
        let agents = lab.programs(NODES[0], "aegis-node-agent")?;
        Ok(agents.first().copied().filter(|agent| *agent != killed))
    })
    .await?;
    for pod in &pods {
        pod.exchange("held", HELD).await?;
    }
    ensure!(watch.counts()?.1 == 0, "from elsewhere");
    Ok(())
}

#[tokio::test]
async fn a_single_address_is_full_at_its_last_port_and_drains_with_its_last_flow() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = account(&cluster, "single-full", "None", ", ports: {perNode: {min: 1, max: 1}}").await?;
    let to = cluster.origin(0)?.port6(0)?;
    let pod = account.pod("bound", NODES[1], true).await?;
    let watch = Watch::new(lab, account.network, *to.ip())?;
    pod.open("held", to, 256).await?;
    let failure = pod.source6(to).await?;
    ensure!(failure == Err("refused".to_owned()), "the 257th: {failure:?}");
    let other = cluster.origin(0)?.port6(1)?;
    ensure!(pod.source6(other).await? == Ok(account.network.addr()), "another port of the origin");
    // Agents count now and then.
    let own = format!("address=\"{}\"", account.network.addr());
    wait_for("the ports to be counted", PATIENCE, async || {
        let used = cluster.agent_metrics(pod.node()).await?.sum("aegis_ports_in_use", &[&own]);
        Ok((257.0..260.0).contains(&used).then_some(()))
    })
    .await?;

    account.allocations().delete("partners", &DeleteParams::default()).await?;
    let states = async || -> anyhow::Result<Vec<(String, HoldingState)>> {
        let object = account.object().await?.context("the address is gone")?;
        Ok(object.spec.holdings.iter().map(|it| (it.node.clone(), it.state)).collect())
    };
    wait_for("the other nodes' slices to rest", PATIENCE, async || {
        let resting = states().await?.into_iter().filter(|(_, it)| *it == HoldingState::Quarantined);
        Ok((resting.count() == NODES.len() - 1).then_some(()))
    })
    .await?;
    ensure!(states().await?.contains(&(pod.node().to_owned(), HoldingState::Draining)), "it has flows");
    pod.exchange("held", 256).await?;
    pod.call(json!({"do": "close", "name": "held"})).await?;
    wait_for("the last slice to rest", std::time::Duration::from_secs(120), async || {
        Ok(states().await?.iter().all(|(_, state)| *state == HoldingState::Quarantined).then_some(()))
    })
    .await?;
    ensure!(pod.source6(to).await? == Err("refused".to_owned()), "no leak");
    ensure!(watch.counts()?.1 == 0, "from elsewhere");
    Ok(())
}

#[tokio::test]
async fn programs_work_from_a_single_address_that_a_node_answers_for_on_the_link() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = account(&cluster, "single-link", "L2", "").await?;
    let _link = lab.on_link6(account.network)?;
    let to = cluster.origin(0)?.port6(0)?;
    let pods = pods(&account).await?;
    let watch = Watch::new(lab, account.network, *to.ip())?;
    for pod in &pods {
        let source =
            wait_for("an answer by way of the link", PATIENCE, async || Ok(pod.source6(to).await?.ok()));
        ensure!(source.await? == account.network.addr(), "{}", pod.node());
    }
    let answers = lab.router_sends_to(account.network.addr())?.context("the router knows nobody")?;
    // What comes back to the one enters at its own node, to the other elsewhere.
    for pod in &pods[..2] {
        let way = Way {
            lab,
            pod,
            to: (*to.ip()).into(),
            source: account.network.addr().into(),
            router: ROUTER6.into(),
            place: format!("{} by {}", pod.node(), answers.name()),
        };
        way.all().await?;
    }
    watch.only()
}
