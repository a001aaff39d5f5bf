//! Growth by demand: from nothing to a full address without one connection that fails, and on to the next address only then.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::time::Instant;

use aegis_crds::{AegisPrefix, EgressAddress, EgressNode, HoldingState};
use aegis_tests::cluster::{Cluster, PATIENCE, Summaries, Summary, wait_for};
use aegis_tests::lab::plan::{NODES, ORIGINS};
use aegis_tests::lab::{Lab, images};
use anyhow::{Context, ensure};
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use serde_json::json;

use crate::account::{Account, allocation, prefix};
use crate::autoscaler::kubectl;
use crate::inside::Inside;

/// Ports of a slice.
const PORTS: u32 = 256;
/// Usable slices of an address.
const USABLE: u32 = 252;
/// Slices of the first test, unless `AEGIS_GROWTH` gives another number (up to all 252): 18,432 connections.
const SLICES: u32 = 74;
/// Connections of one process: descriptors are often limited to 20,000.
const EACH: u32 = 16_000;
/// Port of the origin that [`Servers`] serve.
const PORT: u16 = 7100;
/// Longest time that a refusal may take, in milliseconds.
const AT_ONCE: f64 = 50.0;

/// An account of which every node begins with one slice of each address, and may get all `slices`.
async fn account(cluster: &Cluster, name: &str, addresses: u8, slices: u32) -> anyhow::Result<Account> {
    let namespace = cluster.namespace(name).await?;
    let prefixes: Api<AegisPrefix> = Api::all(cluster.client());
    let taken: BTreeSet<String> =
        prefixes.list(&ListParams::default()).await?.items.into_iter().map(|it| it.spec.cidr).collect();
    let length = 33 - addresses;
    let mut pool = (128u8..160).step_by(addresses.into()).map(|last| Ipv4Addr::new(203, 0, 113, last));
    let address = pool.find(|it| !taken.contains(&format!("{it}/{length}"))).context("no address is free")?;
    let name = namespace.name();
    namespace.apply(&prefix(name, &format!("{address}/{length}"), name)).await?;
    let spec = format!(
        "{{prefixes: [{name}], addresses: {{ipv4: {addresses}}}, \
         ports: {{first: 1024, last: {}, perNode: {{min: 1, max: {slices}}}}}, \
         timeouts: {{tcpTransitorySeconds: 30, tcpClosedSeconds: 2}}}}",
        1023 + slices * PORTS
    );
    namespace.apply(&allocation("partners", &spec)).await?;
    let zone = format!("{}/32", cluster.origin(0)?.address());
    let account = Account { namespace, address, zone };
    account.programmed_allocation().await?;
    account.bind_and_wait().await?;
    // A node whose agent has just come back after an earlier test gets its slice a moment later. And what earlier tests have left is gone
    // by then: its drains are written by the same operator and agents, to an API server that may just have come back.
    let all: Api<EgressAddress> = Api::all(cluster.client());
    wait_for("a slice of each address for every node, and no drains", PATIENCE, async || {
        let found = all.list(&ListParams::default()).await?.items.into_iter();
        let (own, others): (Vec<EgressAddress>, Vec<EgressAddress>) =
            found.partition(|it| it.spec.allocation_ref.namespace == account.namespace.name());
        let everywhere = |address: &EgressAddress| NODES.iter().all(|node| held(address, &node.name()) == 1);
        let rests = |it: &EgressAddress| it.spec.holdings.iter().all(|it| it.state == HoldingState::Held);
        let given = own.len() == usize::from(addresses) && own.iter().all(everywhere);
        Ok((given && others.iter().all(rests)).then_some(()))
    })
    .await?;
    Ok(account)
}

/// Processes that serve one port of the first origin together.
struct Servers {
    processes: Vec<Child>,
    sockets: Vec<PathBuf>,
    port: SocketAddrV4,
}

impl Servers {
    fn start(lab: &Lab, count: u32) -> anyhow::Result<Self> {
        let [first, _] = ORIGINS;
        let port = SocketAddrV4::new(first.address, PORT);
        let mut servers = Self { processes: Vec::new(), sockets: Vec::new(), port };
        for index in 0..count {
            let socket = lab.origin_socket(&format!("growth{index}"));
            let mut command = lab.command_in(first.name, &images::probe_binary().display().to_string());
            command.args([
                "serve",
                &format!("--ports={PORT}-{PORT}"),
                &format!("--control={}", socket.display()),
            ]);
            servers.processes.push(command.spawn()?);
            servers.sockets.push(socket);
        }
        Ok(servers)
    }

    /// What all of them saw.
    fn summaries(&self) -> anyhow::Result<Vec<Summary>> {
        let summary = |socket: &PathBuf| -> anyhow::Result<Summary> {
            let mut stream = UnixStream::connect(socket)?;
            stream.write_all(b"{\"do\": \"summary\"}\n")?;
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line)?;
            Ok(serde_json::from_str::<Summaries>(&line)?.tcp)
        };
        self.sockets.iter().map(summary).collect()
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
        for socket in &self.sockets {
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// Slices that a node holds of an address.
fn held(address: &EgressAddress, node: &str) -> u32 {
    let own = address.spec.holdings.iter();
    let own = own.filter(|it| it.node == node && it.state == HoldingState::Held);
    own.map(|it| it.last - it.first + 1).sum()
}

/// Opens connections and holds them: none may fail.
async fn open(pod: &Inside, name: &str, to: SocketAddrV4, count: u32) -> anyhow::Result<()> {
    let open =
        json!({"do": "open", "name": name, "to": to, "count": count, "parallel": 100, "timeout_ms": 30_000});
    let answer = pod.call(open).await?;
    ensure!(answer["opened"] == count, "{}, {name}: of {count}: {answer}", pod.pod.name());
    println!("{}: {answer}", pod.pod.name());
    Ok(())
}

/// What was asked for, what was given, and what both sides said: for a failure that tells no more than that flows were refused.
async fn evidence(cluster: &Cluster, account: &Account) -> anyhow::Result<String> {
    let lab = cluster.lab().context("there are logs of a lab only")?;
    let node: EgressNode = Api::all(cluster.client()).get("n1").await?;
    let addresses = Api::<EgressAddress>::all(cluster.client()).list(&ListParams::default()).await?;
    let own = addresses.iter().filter(|it| it.spec.allocation_ref.namespace == account.namespace.name());
    let mut text = format!("demand: {:#?}\n", node.status.map(|status| status.demand));
    own.for_each(|address| text += &format!("holdings: {:?}\n", address.spec));
    let mut pods = Api::<Pod>::all(cluster.client()).list(&ListParams::default()).await?.items;
    pods.retain(|pod| {
        pod.labels().get("app.kubernetes.io/name").is_some_and(|name| name.starts_with("aegis-"))
    });
    for pod in pods {
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let logs =
            kubectl(lab, &["logs", "--namespace", &namespace, &name, "--all-containers", "--since=60s"])?;
        text += &format!("{name}:\n{logs}\n");
    }
    Ok(text)
}

/// With the evidence, if it is a failure.
async fn told<T>(cluster: &Cluster, account: &Account, result: anyhow::Result<T>) -> anyhow::Result<T> {
    match result {
        Ok(value) => Ok(value),
        Err(error) => Err(error.context(evidence(cluster, account).await?)),
    }
}

/// `AEGIS_GROWTH=252 cargo test -p aegis-tests --test e2e_life growth -- --nocapture` fills a whole address.
#[tokio::test]
async fn growth_to_a_full_address_fails_no_connection() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let slices: u32 = std::env::var("AEGIS_GROWTH").map_or(Ok(SLICES), |it| it.parse())?;
    ensure!(slices <= USABLE, "an address has {USABLE} slices");
    let account = account(&cluster, "growth", 1, slices).await?;
    let origin = cluster.origin(0)?;
    // The two other nodes keep the slice that each begins with.
    let count = (slices - 2) * PORTS;
    let servers = Servers::start(lab, count.div_ceil(EACH) + 1)?;
    wait_for("the servers", PATIENCE, async || Ok(servers.summaries().ok())).await?;
    let pods = try_join_all(
        (0..count.div_ceil(EACH))
            .map(async |index| account.pod_on(&format!("grows{index}"), "n1", true).await),
    )
    .await?;
    let before = account.egress_address().await?.context("no address")?;
    ensure!(held(&before, "n1") == 1, "{:?}", before.spec.holdings);
    let dropped = async || -> anyhow::Result<u64> {
        Ok(cluster.agent_metrics("n1").await?.packets("drop_waiting_for_slice"))
    };
    let (waited, begin) = (dropped().await?, Instant::now());
    let share = |index: u32| (count - index * EACH).min(EACH);
    let opened = try_join_all(
        pods.iter().zip(0..).map(async |(pod, index)| open(pod, "held", servers.port, share(index)).await),
    );
    told(&cluster, &account, opened.await).await?;
    let took = begin.elapsed();

    let after = account.egress_address().await?.context("no address")?;
    ensure!(held(&after, "n1") == slices - 2, "{:?}", after.spec.holdings);
    for pod in &pods {
        let refused = pod.call(json!({"do": "connect", "to": servers.port})).await?;
        ensure!(refused["failure"] == "refused", "the address is full: {refused}");
        ensure!(refused["ms"].as_f64().is_some_and(|ms| ms < AT_ONCE), "{refused}");
        ensure!(pod.pod.source(origin.port(1)).await? == Ok(account.address), "another port has room");
    }
    let seen = servers.summaries()?;
    ensure!(seen.iter().map(|tcp| tcp.open).sum::<u64>() == u64::from(count), "{seen:?}");
    for tcp in seen {
        ensure!(tcp.twice == 0 && tcp.sources.keys().eq([&account.address]), "{tcp:?}");
    }
    println!(
        "growth: {count} connections of one node to one origin in {:.1} s, none failed; {} slices came in {} writes of the \
         address; {} SYNs waited for them",
        took.as_secs_f64(),
        slices - 3,
        after.spec.epoch - before.spec.epoch,
        dropped().await? - waited,
    );
    for pod in &pods {
        pod.call(json!({"do": "close", "name": "held", "reset": true})).await?;
    }
    account.end().await
}

#[tokio::test]
async fn growth_goes_on_to_the_next_address_when_the_first_is_full() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    if !cluster.is_lab() {
        return Ok(());
    }
    // Of each address the other two nodes keep one slice, so this one gets four.
    let (slices, full) = (6, 4 * PORTS);
    let account = account(&cluster, "spill", 2, slices).await?;
    let origin = cluster.origin(0)?;
    origin.reset().await?;
    let pod = account.pod_on("grows", "n1", true).await?;
    told(&cluster, &account, open(&pod, "first", origin.port(0), full).await).await?;
    let tcp = origin.summary().await?.tcp;
    ensure!(tcp.sources.len() == 1, "a pod keeps its address while that has room: {tcp:?}");
    told(&cluster, &account, open(&pod, "second", origin.port(0), full).await).await?;
    let tcp = origin.summary().await?.tcp;
    ensure!(tcp.sources.values().eq([&u64::from(full); 2]) && tcp.twice == 0, "{tcp:?}");
    let refused = wait_for("a refusal at once", PATIENCE, async || {
        let answer = pod.call(json!({"do": "connect", "to": origin.port(0)})).await?;
        Ok((answer["failure"] == "refused").then_some(answer))
    })
    .await?;
    ensure!(refused["ms"].as_f64().is_some_and(|ms| ms < AT_ONCE), "{refused}");
    for name in ["first", "second"] {
        pod.call(json!({"do": "close", "name": name, "reset": true})).await?;
    }
    account.end().await
}
