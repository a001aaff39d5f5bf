//! IPv6: pods with addresses of both families, an allocation with a /64.

use std::net::Ipv6Addr;
use std::time::Duration;

use aegis_crds::{AegisPrefix, EgressAddress, EgressAllocation, HoldingState, ZoneBinding, type_};
use aegis_tests::cluster::{Cluster, Namespace, PATIENCE, explained, wait_for};
use aegis_tests::lab::Lab;
use aegis_tests::lab::plan::{NODES, Node, ROUTER6};
use anyhow::{Context, bail, ensure};
use ipnet::Ipv6Net;
use kube::api::{Api, DeleteParams, ListParams};
use serde_json::json;

use crate::account::{BOUND, allocation, holds, prefix};
use crate::inside::Inside;
use crate::policies::Policies;
use crate::programs::Way;

/// Longest time for which something is waited for that must not come.
const SILENCE_MS: u64 = 700;

/// A namespace with a /64 or a single address, and a binding of the first origin's range.
pub struct Account {
    pub namespace: Namespace,
    pub network: Ipv6Net,
}

impl Account {
    async fn new(cluster: &Cluster, name: &str) -> anyhow::Result<Account> {
        Account::announced(cluster, name, "None").await
    }

    async fn announced(cluster: &Cluster, name: &str, mode: &str) -> anyhow::Result<Account> {
        let network = free_network(cluster).await?;
        Account::of(cluster, name, network, mode, "").await
    }

    /// The same with what it has, how that is announced, and more fields of the allocation.
    pub async fn of(
        cluster: &Cluster,
        name: &str,
        network: Ipv6Net,
        mode: &str,
        more: &str,
    ) -> anyhow::Result<Account> {
        let namespace = cluster.namespace(name).await?;
        let name = namespace.name();
        let announcement = format!("{name}, announcement: {{mode: {mode}}}");
        namespace.apply(&prefix(name, &format!("'{network}'"), &announcement)).await?;
        let spec = format!(
            "{{prefixes: [{name}], addresses: {{ipv6: 1}}, timeouts: {{tcpEstablishedSeconds: 600, \
             tcpTransitorySeconds: 30, tcpClosedSeconds: 2, udpSeconds: 30, icmpSeconds: 10, restSeconds: 5}}{more}}}"
        );
        namespace.apply(&allocation("partners", &spec)).await?;
        let zone = cluster.origin(0)?.port6(0)?;
        let binding = format!(
            "apiVersion: aegis.dev/v1alpha1\nkind: ZoneBinding\nmetadata: {{name: partners}}\nspec:\n  \
             allocationRef: {{name: partners}}\n  workloads: {{podSelector: {{matchLabels: {{{}: {}}}}}}}\n  \
             zone: {{cidrs: ['{}/128']}}\n",
            BOUND.0,
            BOUND.1,
            zone.ip()
        );
        namespace.apply(&binding).await?;
        let account = Account { namespace, network };
        let (allocations, bindings) = (account.allocations(), account.bindings());
        let programmed = wait_for("the address and the binding to be programmed", PATIENCE, async || {
            let (allocation, binding) = (allocations.get("partners").await?, bindings.get("partners").await?);
            // A node whose agent has just been started anew gets its slice a moment later, and until then opens nothing.
            let held = account.object().await?.map_or(0, |object| object.spec.holdings.len());
            if held < NODES.len() {
                return Ok(None);
            }
            let generation = allocation.metadata.generation;
            let conditions = allocation.status.map(|status| status.conditions).unwrap_or_default();
            let all = [type_::ALLOCATED, type_::PROGRAMMED];
            let allocated = all.iter().all(|type_| holds(&conditions, type_, generation));
            let generation = binding.metadata.generation;
            let conditions = binding.status.map(|status| status.conditions).unwrap_or_default();
            Ok((allocated && holds(&conditions, type_::PROGRAMMED, generation)).then_some(()))
        });
        explained(account.namespace.cluster(), &[account.namespace.name()], programmed.await).await?;
        Ok(account)
    }

    pub fn allocations(&self) -> Api<EgressAllocation> {
        self.namespace.api()
    }

    fn bindings(&self) -> Api<ZoneBinding> {
        self.namespace.api()
    }

    pub async fn object(&self) -> anyhow::Result<Option<EgressAddress>> {
        let addresses: Api<EgressAddress> = Api::all(self.namespace.cluster().client());
        let all = addresses.list(&ListParams::default()).await?.items;
        let own = match self.network.prefix_len() {
            128 => self.network.addr().to_string(),
            _ => self.network.to_string(),
        };
        Ok(all.into_iter().find(|object| object.spec.address == own))
    }

    pub async fn pod(&self, name: &str, node: Node, bound: bool) -> anyhow::Result<Inside> {
        let builder = self.namespace.pod(name).on(&node.name());
        let builder = if bound { builder.label(BOUND.0, BOUND.1) } else { builder };
        Inside::of(self.namespace.cluster(), builder.start().await?)
    }
}

/// A /64 of the lab's range that no prefix has: what failed before may still drain.
async fn free_network(cluster: &Cluster) -> anyhow::Result<Ipv6Net> {
    let prefixes: Api<AegisPrefix> = Api::all(cluster.client());
    let taken: Vec<String> =
        prefixes.list(&ListParams::default()).await?.items.into_iter().map(|it| it.spec.cidr).collect();
    let mut pool = (1..64u16).map(|last| Ipv6Addr::new(0x2001, 0xdb8, 0x203, last, 0, 0, 0, 0));
    let free = pool.find(|address| !taken.contains(&format!("{address}/64")));
    Ok(Ipv6Net::new(free.context("no /64 is free")?, 64)?)
}

/// Counts on the router what nodes send to an origin, from an account's addresses and from elsewhere, until it is dropped. Errors about what the origin
/// sends to others are not counted: of a test before, it may still be trying to end connections with a /64 that nobody has any more.
pub struct Watch<'a> {
    lab: &'a Lab,
    table: String,
}

impl<'a> Watch<'a> {
    pub fn new(lab: &'a Lab, network: Ipv6Net, to: Ipv6Addr) -> anyhow::Result<Watch<'a>> {
        let table = format!("w{}", network.addr().segments()[3]);
        // Behind the error's own 8 bytes is the packet, 24 bytes into which is where it went.
        let about_others = format!("@th,256,64 != {:#x}", network.addr().to_bits() >> 64);
        let rules = format!(
            "table ip6 {table} {{ counter right {{}}; counter wrong {{}}; \
             set strangers {{ typeof ip6 saddr . meta l4proto; flags dynamic; size 64; }}; \
             chain pre {{ type filter hook prerouting priority raw; \
             iif lan ip6 daddr {to} ip6 saddr {network} counter name right accept; \
             iif lan ip6 daddr {to} icmpv6 type {{ 1, 2, 3, 4 }} {about_others} accept; \
             iif lan ip6 daddr {to} counter name wrong add @strangers {{ ip6 saddr . meta l4proto }}; }}; }}"
        );
        let watch = Watch { lab, table };
        let output = watch.lab.command_in("router", "nft").arg(&rules).output()?;
        ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
        Ok(watch)
    }

    /// Packets from the /64, and others.
    pub fn counts(&self) -> anyhow::Result<(u64, u64)> {
        let mut nft = self.lab.command_in("router", "nft");
        let output = nft.args(["-j", "list", "counters", "table", "ip6", &self.table]).output()?;
        let listing: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let all = listing["nftables"].as_array().context("no counters")?;
        let count = |name: &str| {
            let found = all.iter().find(|it| it["counter"]["name"] == name);
            found.and_then(|it| it["counter"]["packets"].as_u64()).context("no counter")
        };
        Ok((count("right")?, count("wrong")?))
    }

    /// Nothing but packets from the /64.
    pub fn only(&self) -> anyhow::Result<()> {
        let (right, wrong) = self.counts()?;
        if right > 0 && wrong == 0 {
            return Ok(());
        }
        let mut nft = self.lab.command_in("router", "nft");
        let strangers = nft.args(["list", "set", "ip6", &self.table, "strangers"]).output()?;
        bail!("{right} packets from the /64, {wrong} from {}", String::from_utf8_lossy(&strangers.stdout))
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        let _ = self.lab.command_in("router", "nft").args(["delete", "table", "ip6", &self.table]).output();
    }
}

/// A route of an account's addresses that goes with the value.
pub struct Pinned<'a>(pub &'a Lab, pub Ipv6Net);

impl Pinned<'_> {
    pub fn to(&self, nodes: &[Node]) -> anyhow::Result<()> {
        self.0.pin6(self.1, nodes)
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        let _ = self.0.pin6(self.1, &[]);
    }
}

#[tokio::test]
async fn pods_leave_from_their_64_and_answers_find_them_wherever_they_enter() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "six").await?;
    let (origin, elsewhere) = (cluster.origin(0)?.port6(0)?, cluster.origin(1)?.port6(0)?);
    let pods = futures::future::try_join_all(
        NODES.map(async |node| account.pod(&format!("bound-{}", node.name()), node, true).await),
    )
    .await?;
    let free = account.pod("free", NODES[0], false).await?;
    let watch = Watch::new(lab, account.network, *origin.ip())?;
    let entry = Pinned(lab, account.network);
    let mut sources = std::collections::BTreeSet::new();
    for node in NODES {
        entry.to(&[node])?;
        for pod in &pods {
            let context = || format!("{} entering at {}", pod.node(), node.name());
            let source = pod.source6(origin).await?.map_err(anyhow::Error::msg).with_context(context)?;
            assert!(account.network.contains(&source), "{}: {source}", context());
            sources.insert(source);
            let udp = pod.call(json!({"do": "udp", "to": origin})).await?;
            let seen = udp["source"].as_str().with_context(|| format!("{}: {udp}", context()))?;
            assert_eq!(seen.parse::<std::net::SocketAddrV6>()?.ip(), &source, "one address for each pod");
            // More than one packet each way, of full size.
            let bytes = 2_000_000;
            for way in ["download", "upload"] {
                let transfer = pod.call(json!({"do": way, "to": origin, "bytes": bytes})).await?;
                assert_eq!(transfer["ok"], true, "{}: {way}: {transfer}", context());
            }
            let (answered, text) =
                pod.program("ping", &["-6", "-c", "2", "-W", "2", &origin.ip().to_string()]).await?;
            assert!(answered, "{}: {text}", context());
            // In fragments, which is nothing to the programs. (The origin may have to learn first what fits into the tunnel.)
            let big = ["-6", "-c", "3", "-W", "2", "-s", "4000", &origin.ip().to_string()];
            let (answered, text) = pod.program("ping", &big).await?;
            assert!(answered, "{}: {text}", context());
        }
    }
    assert_eq!(sources.len(), pods.len(), "each pod has the same address throughout: {sources:?}");
    watch.only()?;
    // What is not covered keeps the node's address.
    let node = NODES[0].address6();
    assert_eq!(free.source6(origin).await?, Ok(node), "a pod without the label");
    assert_eq!(pods[0].source6(elsewhere).await?, Ok(node), "outside the zone");
    Ok(())
}

#[tokio::test]
async fn policies_decide_over_ipv6_and_their_secondary_too() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "ruled-six").await?;
    let origin = cluster.origin(0)?.port6(0)?;
    let pod = account.pod("ruled", NODES[0], false).await?;
    let policies = Policies::about(&account.namespace);
    let zone = format!("cidrs: ['{}/128']", origin.ip());
    let enforce = async |what: &str| policies.enforce("ruled", 10, &zone, what).await;
    assert_eq!(pod.source6(origin).await?, Ok(NODES[0].address6()), "nothing covers it yet");
    enforce("action: Deny").await?;
    assert_eq!(pod.source6(origin).await?, Err("refused".to_owned()));
    enforce("egress: {primary: partners}").await?;
    let own = pod.source6(origin).await?.map_err(anyhow::Error::msg)?;
    assert!(account.network.contains(&own), "{own}");
    let watch = Watch::new(lab, account.network, *origin.ip())?;
    pod.open("held", origin, 20).await?;
    enforce("egress: {primary: missing, secondary: partners}").await?;
    assert_eq!(pod.source6(origin).await?, Ok(own), "from the secondary, as it was from the primary");
    enforce("egress: {primary: missing}").await?;
    assert_eq!(pod.source6(origin).await?, Err("refused".to_owned()));
    pod.exchange("held", 20).await?;
    watch.only()?;
    enforce("action: Default").await?;
    assert_eq!(pod.source6(origin).await?, Ok(NODES[0].address6()));
    Ok(())
}

#[tokio::test]
async fn nobody_gets_in_through_a_64_who_was_not_asked() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(_) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "unasked-six").await?;
    let (asked, stranger) = (cluster.origin(0)?, cluster.origin(1)?);
    let pod = account.pod("bound", NODES[0], true).await?;
    pod.call(json!({"do": "reset"})).await?;
    let source = pod.source6(asked.port6(0)?).await?.map_err(anyhow::Error::msg)?;
    // The port on which the pod itself serves, and the address that it was asked from a moment ago.
    for from in [&asked, &stranger] {
        let to = format!("[{source}]:8080");
        for question in ["connect", "udp"] {
            let answer = from.call(json!({"do": question, "to": to, "timeout_ms": SILENCE_MS})).await?;
            assert_eq!(answer["failure"], "timeout", "{question}: {answer}");
        }
    }
    let summary = pod.call(json!({"do": "summary"})).await?;
    assert_eq!((&summary["tcp"]["total"], &summary["udp"]["total"]), (&json!(0), &json!(0)), "{summary}");
    // What it asks for still comes.
    assert_eq!(pod.source6(asked.port6(1)?).await?, Ok(source));
    Ok(())
}

#[tokio::test]
async fn a_64_drains_with_its_last_flow_and_nothing_new_leaves() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "drained-six").await?;
    let origin = cluster.origin(0)?.port6(0)?;
    let pod = account.pod("bound", NODES[1], true).await?;
    let watch = Watch::new(lab, account.network, *origin.ip())?;
    pod.open("held", origin, 20).await?;
    account.allocations().delete("partners", &DeleteParams::default()).await?;
    let failure =
        wait_for("new connections to be refused", PATIENCE, async || Ok(pod.source6(origin).await?.err()))
            .await?;
    assert_eq!(failure, "refused", "at once, not by a time-out");
    // What is idle elsewhere rests; the node with the connections keeps its slice for as long as these live.
    let states = async || -> anyhow::Result<Vec<(String, HoldingState)>> {
        let object = account.object().await?.context("the /64 is gone")?;
        Ok(object.spec.holdings.iter().map(|it| (it.node.clone(), it.state)).collect())
    };
    wait_for("the other nodes' slices to rest", PATIENCE, async || {
        let rest = states().await?;
        let rest = rest.iter().filter(|(_, state)| *state == HoldingState::Quarantined).count();
        Ok((rest == NODES.len() - 1).then_some(()))
    })
    .await?;
    assert!(
        states().await?.contains(&(pod.node().to_owned(), HoldingState::Draining)),
        "{:?}",
        states().await?
    );
    pod.exchange("held", 20).await?;
    pod.call(json!({"do": "close", "name": "held"})).await?;
    wait_for("the last slice to rest", Duration::from_secs(120), async || {
        Ok(states().await?.iter().all(|(_, state)| *state == HoldingState::Quarantined).then_some(()))
    })
    .await?;
    assert_eq!(pod.source6(origin).await?, Err("refused".to_owned()), "no leak");
    assert_eq!(watch.counts()?.1, 0, "from elsewhere");
    Ok(())
}

#[tokio::test]
async fn programs_that_everybody_uses_work_over_ipv6() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "programs-six").await?;
    let origin = cluster.origin(0)?.port6(0)?;
    let pod = account.pod("bound", NODES[0], true).await?;
    let source = pod.source6(origin).await?.map_err(anyhow::Error::msg)?;
    let watch = Watch::new(lab, account.network, *origin.ip())?;
    let entry = Pinned(lab, account.network);
    // What comes back enters at the pod's own node, and at another.
    for node in [NODES[0], NODES[2]] {
        entry.to(&[node])?;
        let way = Way {
            lab,
            pod: &pod,
            to: (*origin.ip()).into(),
            source: source.into(),
            router: ROUTER6.into(),
            place: format!("entering at {}", node.name()),
        };
        way.all().await?;
    }
    watch.only()?;
    Ok(())
}

#[tokio::test]
async fn an_agent_that_is_killed_breaks_nothing_over_ipv6() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "killed-six").await?;
    let origin = cluster.origin(0)?.port6(0)?;
    let pod = account.pod("bound", NODES[0], true).await?;
    let source = pod.source6(origin).await?.map_err(anyhow::Error::msg)?;
    let watch = Watch::new(lab, account.network, *origin.ip())?;
    pod.open("held", origin, 20).await?;
    for _ in 0..2 {
        let killed = lab.kill_agent(NODES[0])?;
        let back = wait_for("the agent to be back", PATIENCE, async || {
            pod.exchange("held", 20).await?;
            assert_eq!(pod.source6(origin).await?, Ok(source), "the same address, also without an agent");
            let agents = lab.programs(NODES[0], "aegis-node-agent")?;
            Ok(agents.first().copied().filter(|agent| *agent != killed))
        });
        back.await?;
        // It finds everything as it was.
        for _ in 0..20 {
            pod.exchange("held", 20).await?;
            assert_eq!(pod.source6(origin).await?, Ok(source));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    assert_eq!(watch.counts()?.1, 0, "from elsewhere");
    Ok(())
}

#[tokio::test]
async fn a_64_on_the_link_moves_when_the_node_that_answers_is_cut_off() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::announced(&cluster, "neighbour-six", "L2").await?;
    let _link = lab.on_link6(account.network)?;
    let origin = cluster.origin(0)?;
    let watch = Watch::new(lab, account.network, *origin.port6(0)?.ip())?;
    let pods = futures::future::try_join_all(
        NODES.map(async |node| account.pod(&format!("bound-{}", node.name()), node, true).await),
    )
    .await?;
    let mut sources = Vec::new();
    for pod in &pods {
        let source = wait_for("an answer by way of the link", PATIENCE, async || {
            Ok(pod.source6(origin.port6(0)?).await?.ok())
        });
        sources.push(source.await?);
        pod.open("held", origin.port6(0)?, 20).await?;
    }
    let answering = |sources: &[Ipv6Addr]| -> anyhow::Result<Node> {
        let nodes: Vec<Option<Node>> =
            sources.iter().map(|source| lab.router_sends_to(*source)).collect::<anyhow::Result<_>>()?;
        let first = nodes.first().copied().flatten().context("the router knows nobody")?;
        ensure!(nodes.iter().all(|node| *node == Some(first)), "the router knows several: {nodes:?}");
        Ok(first)
    };
    let first = answering(&sources)?;
    for pod in pods.iter().filter(|pod| pod.node() != first.name()) {
        pod.call(json!({"do": "stream", "name": "stream", "to": origin.port6(1)?, "interval_ms": 10, "echo": true}))
            .await?;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let cut = lab.without_link(first)?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut left = Vec::new();
    for (pod, source) in pods.iter().zip(&sources).filter(|(pod, _)| pod.node() != first.name()) {
        let end = pod.call(json!({"do": "stop", "name": "stream"})).await?;
        let gap = end["longest_gap_ms"].as_f64().context("no gap")?;
        println!("{} was cut off: {} had no answer for {gap} ms", first.name(), pod.node());
        ensure!(gap < 2900.0, "{}: no answer came back before the node did: {end}", pod.node());
        left.push(*source);
    }
    let next = answering(&left)?;
    ensure!(next != first, "{} is cut off", first.name());
    cut.now()?;
    // The one that was away leaves it at that.
    tokio::time::sleep(Duration::from_secs(3)).await;
    ensure!(answering(&left)? == next, "{} took the /64 back", first.name());
    for pod in &pods {
        pod.exchange("held", 20).await.with_context(|| format!("flows of {}", pod.node()))?;
    }
    assert_eq!(watch.counts()?.1, 0, "from elsewhere");
    Ok(())
}
