//! `make demo`: one IPv4 address, used by three nodes at once, shown with real traffic.
//!
//! Starts the lab, installs the chart, applies `examples/quickstart.yaml`, opens connections from pods on all three nodes to
//! both origins, and prints what the nodes, the origins and the wire saw. The last line is `demo: ok`, or what failed. Its lab
//! is its own: one that is left from a killed run is removed first, and an interrupt ends it like success and failure do.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use aegis_crds::{EgressAddress, EgressAllocation};
use aegis_tests::cluster::{Cluster, Metrics, Origin, PATIENCE, Pod, Summaries, wait_for};
use aegis_tests::lab::capture::Report;
use aegis_tests::lab::plan::NODES;
use aegis_tests::lab::{Lab, images, node_init};
use anyhow::{Context, anyhow, bail};
use clap::Parser;
use kube::Api;
use tokio::signal::unix::{SignalKind, signal};

/// Shows one address on three nodes.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Name of the lab.
    #[arg(long, default_value = "aegis-demo")]
    instance: String,
    /// Connections that the pod on each node opens to each origin.
    #[arg(long, default_value_t = 1000)]
    connections: usize,
    /// Leave the lab running; the next demo removes it.
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    if let Err(error) = node_init::run_if_asked() {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    let arguments = Arguments::parse();
    let begin = Instant::now();
    let outcome = tokio::select! {
        biased;
        signal = interrupted() => signal.and_then(|signal| Err(anyhow!("interrupted by {signal}"))),
        outcome = run(&arguments) => outcome,
    };
    let ended = if arguments.keep { Ok(()) } else { Lab::down(&arguments.instance) };
    if let Err(error) = &ended {
        eprintln!("the lab does not end: {error:#}");
    }
    println!("\n{:.0} s in all", begin.elapsed().as_secs_f64());
    match outcome.and(ended.context("the lab does not end")) {
        Ok(()) => {
            println!("demo: ok");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("demo: failed: {}", one_line(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

/// Ends when somebody wants the demo to end, with the signal's name.
async fn interrupted() -> anyhow::Result<&'static str> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
    })
}

/// What other programs say in many lines, in one: nothing may follow the demo's last line.
fn one_line(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join(" | ")
}

async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    Lab::down(&arguments.instance)?;
    images::compile(&["aegis-probe", "aegis-operator", "aegis-node-agent"])?;
    let lab = Lab::up(&arguments.instance).await?;
    lab.install(&[])?;
    let cluster = Cluster::of_lab(&lab).await?;

    println!("\nkubectl apply -f examples/quickstart.yaml");
    let manifest = images::workspace().join("examples/quickstart.yaml");
    cluster.apply(&std::fs::read_to_string(&manifest)?).await?;
    let egress = dedicated_address(&cluster).await?;
    println!("account shop has the egress address {egress}");

    let shop = cluster.adopt("shop").await?;
    let start = |node: String| {
        let builder = shop.pod(&format!("payments-{node}")).label("app", "payments").on(&node);
        async move { builder.start().await }
    };
    let pods = futures::future::try_join_all(NODES.map(|node| start(node.name()))).await?;
    let origins = [cluster.origin(0)?, cluster.origin(1)?];
    for origin in &origins {
        origin.reset().await?;
    }
    let mut capture = lab.capture(&["198.51.100.0/24", "192.0.2.0/24"])?;
    let before = all_metrics(&cluster).await?;

    traffic(&pods, &origins, arguments.connections).await?;

    let after = counted_metrics(&cluster, arguments.connections * pods.len() * origins.len()).await?;
    let summaries = [origins[0].summary().await?, origins[1].summary().await?];
    let report = capture.report()?;
    print_nodes(&cluster, egress, &before, &after).await?;
    print_origins(&origins, &summaries);
    print_wire(&report, egress);
    judge(egress, &summaries, &report, &before, &after, arguments.connections)
}

/// The address that the allocation of the quickstart got.
async fn dedicated_address(cluster: &Cluster) -> anyhow::Result<Ipv4Addr> {
    let allocations: Api<EgressAllocation> = Api::namespaced(cluster.client(), "shop");
    wait_for("the allocation to be programmed", PATIENCE, async || {
        let status = allocations.get("partners").await?.status.unwrap_or_default();
        let programmed = status.conditions.iter().any(|c| c.type_ == "Programmed" && c.status == "True");
        let address = status.addresses.first().map(|used| used.address.clone());
        Ok(address.filter(|_| programmed).map(|address| address.parse()).transpose()?)
    })
    .await
}

async fn traffic(pods: &[Pod], origins: &[Origin], connections: usize) -> anyhow::Result<()> {
    for origin in origins {
        let to = origin.port(0);
        println!("{} pods open {connections} connections each to {to}", pods.len());
        let name = to.to_string();
        let open = pods.iter().map(|pod| pod.open(&name, to, connections));
        futures::future::try_join_all(open).await?;
    }
    println!("all are open at the same time; a byte there and back on each");
    for origin in origins {
        let name = origin.port(0).to_string();
        let exchange = pods.iter().map(|pod| pod.exchange(&name, connections));
        futures::future::try_join_all(exchange).await?;
    }
    Ok(())
}

async fn all_metrics(cluster: &Cluster) -> anyhow::Result<Vec<Metrics>> {
    futures::future::try_join_all(NODES.map(|node| {
        let cluster = cluster.clone();
        async move { cluster.agent_metrics(&node.name()).await }
    }))
    .await
}

/// The metrics once every port that is held has been counted (agents count every second or so), or after ten seconds as they
/// are then.
async fn counted_metrics(cluster: &Cluster, held: usize) -> anyhow::Result<Vec<Metrics>> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let all = all_metrics(cluster).await?;
        let ports: f64 = all.iter().map(|metrics| metrics.sum("aegis_ports_in_use", &[])).sum();
        if ports >= held as f64 || Instant::now() > end {
            return Ok(all);
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// Packets counted between two scrapes.
fn counted(before: &Metrics, after: &Metrics, reason: &str) -> u64 {
    after.packets(reason).saturating_sub(before.packets(reason))
}

async fn print_nodes(
    cluster: &Cluster,
    egress: Ipv4Addr,
    before: &[Metrics],
    after: &[Metrics],
) -> anyhow::Result<()> {
    let addresses: Api<EgressAddress> = Api::all(cluster.client());
    let address = addresses.get(&egress.to_string()).await?;
    println!("\nnode  slices  ports in use  new flows  replies taken in  of them from another node");
    for (at, node) in NODES.iter().enumerate() {
        let name = node.name();
        let held = address.spec.holdings.iter().filter(|holding| holding.node == name);
        let slices: u32 = held.map(|holding| holding.last - holding.first + 1).sum();
        let count = |reason| counted(&before[at], &after[at], reason);
        println!(
            "{name:4} {slices:7} {:13} {:10} {:17} {:26}",
            after[at].sum("aegis_ports_in_use", &[]),
            count("new_flow"),
            count("reverse"),
            count("steered_here"),
        );
    }
    Ok(())
}

fn print_origins(origins: &[Origin], summaries: &[Summaries]) {
    println!("\norigin          connections  open now  source addresses  5-tuples used twice");
    for (origin, summary) in origins.iter().zip(summaries) {
        let tcp = &summary.tcp;
        let sources: Vec<String> = tcp.sources.keys().map(Ipv4Addr::to_string).collect();
        println!(
            "{:15} {:11} {:9}  {:16} {:20}",
            origin.address().to_string(),
            tcp.total,
            tcp.open,
            sources.join(", "),
            tcp.twice
        );
    }
}

fn print_wire(report: &Report, egress: Ipv4Addr) {
    let (nodes, others) = (report.nodes(egress), strangers(report, egress));
    println!("\non the wire towards the origins, {} packets in both directions:", report.packets);
    println!("  nodes that sent from {egress}: {}", nodes.into_iter().collect::<Vec<_>>().join(", "));
    println!("  5-tuples sent by two nodes: {}", report.shared);
    println!("  packets with another source: {others}");
}

fn strangers(report: &Report, egress: Ipv4Addr) -> u64 {
    report.sources.iter().filter(|source| source.address != egress).map(|source| source.packets).sum()
}

fn judge(
    egress: Ipv4Addr,
    summaries: &[Summaries],
    report: &Report,
    before: &[Metrics],
    after: &[Metrics],
    connections: usize,
) -> anyhow::Result<()> {
    let wanted = (connections * NODES.len()) as u64;
    for summary in summaries {
        let tcp = &summary.tcp;
        if (tcp.open, tcp.twice) != (wanted, 0) || tcp.sources.keys().ne([&egress]) {
            bail!("an origin saw {tcp:?}, wanted {wanted} connections from {egress} only");
        }
    }
    let all: BTreeSet<String> = NODES.iter().map(|node| node.name()).collect();
    if report.nodes(egress) != all {
        bail!("not every node sent from {egress}");
    }
    if report.shared != 0 {
        bail!("two nodes sent from the same 5-tuple: {:?}", report.shared_flows);
    }
    let others = strangers(report, egress);
    if others != 0 {
        bail!("{others} packets left with another source");
    }
    let total = |reason| -> u64 { before.iter().zip(after).map(|(b, a)| counted(b, a, reason)).sum() };
    let (replies, steered) = (total("reverse"), total("steered_here"));
    println!("  replies that entered at another node and were steered: {steered} of {replies}");
    if steered * 2 < replies {
        bail!("fewer than half of the replies were steered");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_error_stays_in_the_last_line() {
        assert_eq!(one_line("helm: failed:\n\n  Error: no\n"), "helm: failed: | Error: no");
    }
}
