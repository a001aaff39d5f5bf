//! Traffic from every node while a seeded schedule breaks and changes things, and what came of it.
//!
//! Flows of nodes that were alive all along must not notice: an agent, an operator or the API server that dies, nodes beside
//! that hang or are cut off, a rollout, edits, slices that come and go.

mod faults;
mod history;
mod load;
mod schedule;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use aegis_crds::AegisPrefix;
use anyhow::{Context, ensure};
use futures::future::try_join_all;
use kube::api::{Api, ListParams};

pub use self::history::{History, Watch};
pub use self::load::{Load, Losses};
pub use self::schedule::{Event, Fault, Kind, Schedule};

use self::faults::{Faults, Outcome};
use crate::cluster::{Cluster, Inside, Namespace, settled};
use crate::lab::Lab;
use crate::lab::plan::NODES;

/// Label of bound pods.
const BOUND: (&str, &str) = ("egress", "dedicated");
/// The range of the origin that the load goes to.
const ZONE: &str = "198.51.100.0/24";
/// Slices of the loaded account on each node, enough for all it does: they must not move.
const SLICES: u32 = 16;
/// After the schedule: until every object has settled.
const SETTLES: Duration = Duration::from_secs(180);
/// Between two looks at the held connections.
const LOOK: Duration = Duration::from_secs(3);

/// A run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// For how long things go wrong.
    pub seconds: u32,
    /// Of the schedule.
    pub seed: u64,
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Length with start and end.
    pub took: Duration,
    /// Flows that were held all along, new connections not counted.
    pub flows: usize,
    /// How often each fault was injected, and how often it could not be (its object was just away).
    pub faults: BTreeMap<Kind, (u32, u32)>,
    /// By node.
    pub losses: Vec<Losses>,
    /// Name of the node that hung and was cut off.
    pub victim: String,
    /// Until every object had settled, after the last fault.
    pub settled: Duration,
    /// Slices that changed hands or state, and versions of objects that tell so.
    pub slices: (u64, u64),
    /// What must not be.
    pub failures: Vec<String>,
}

impl Report {
    /// In lines, for people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let injected: u32 = self.faults.values().map(|(done, _)| done).sum();
        let _ = writeln!(
            text,
            "{:.0} s, {injected} faults, {} flows held by {} nodes, victim {}, settled after {:.1} s",
            self.took.as_secs_f64(),
            self.flows,
            self.losses.len(),
            self.victim,
            self.settled.as_secs_f64()
        );
        for (kind, (done, skipped)) in &self.faults {
            let skipped = if *skipped > 0 { format!(" ({skipped} could not be)") } else { String::new() };
            let _ = writeln!(text, "  {kind:?}: {done}{skipped}");
        }
        for (node, losses) in NODES.iter().zip(&self.losses) {
            let _ = writeln!(
                text,
                "{}: {} held and {} streams broken, {} of {} new connections failed, slowest {:.1} s; {} of {} datagrams \
                 answered, longest gap {:.1} s",
                node.name(),
                losses.connections,
                losses.streams,
                losses.new,
                losses.made + losses.new,
                losses.slowest.as_secs_f64(),
                losses.datagrams.1,
                losses.datagrams.0,
                losses.gap.as_secs_f64()
            );
        }
        let _ =
            writeln!(text, "{} changes of slices in {} versions of objects", self.slices.0, self.slices.1);
        text
    }
}

/// Runs it on a lab with Aegis. An error means that it could not be run; what it found is in the report.
pub async fn run(lab: &Lab, options: Options) -> anyhow::Result<Report> {
    let begin = Instant::now();
    let cluster = Cluster::of_lab(lab).await?;
    let schedule = Schedule::new(options.seed, options.seconds, NODES.len());
    println!(
        "seed {}: {} events in {} s, victim {}",
        options.seed,
        schedule.events.len(),
        options.seconds,
        NODES[schedule.victim].name()
    );
    let watch = Watch::start(cluster.client());
    let loaded = Account::new(&cluster, "chaos", ZONE, SLICES).await?;
    let beside = Account::new(&cluster, "beside", "192.0.2.0/24", 1).await?;
    for account in [&loaded, &beside] {
        settled(&cluster, &[account.namespace.name()], SETTLES).await?;
    }
    let pods = loaded.pods(&cluster).await?;
    let others = beside.pods(&cluster).await?;
    let mut capture = lab.capture(&[ZONE])?;
    let load = Load::start(pods, cluster.origin(0)?).await?;
    println!("{} flows are up after {:.0} s", load.flows(), begin.elapsed().as_secs_f64());

    let faults = Faults::new(lab, &cluster, &loaded, &beside, &others, schedule.victim)?;
    let mut report =
        Report { flows: load.flows(), victim: NODES[schedule.victim].name(), ..Report::default() };
    let (outcomes, looks) = tokio::join!(faults.all(&schedule.events), look(&load, &schedule));
    for (kind, outcome) in outcomes {
        let count = report.faults.entry(kind).or_default();
        match outcome {
            Ok(Outcome::Done) => count.0 += 1,
            Ok(Outcome::Skipped) => count.1 += 1,
            Err(error) => {
                report.failures.push(format!("{kind:?} could not be injected or undone: {error:#}"))
            }
        }
    }
    looks?;

    let last = Instant::now();
    let accounts = [loaded.namespace.name(), beside.namespace.name()];
    if let Err(error) = settled(&cluster, &accounts, SETTLES).await {
        report.failures.push(format!("{error:#}"));
    }
    report.settled = last.elapsed();
    report.losses = try_join_all((0..NODES.len()).map(|node| load.end(node))).await?;
    for (index, losses) in report.losses.iter().enumerate() {
        if losses.broken() > 0 {
            let what = format!(
                "{}: {} flows broken: {}",
                NODES[index].name(),
                losses.broken(),
                losses.failures.join(", ")
            );
            if index == schedule.victim {
                println!("the victim, {what}");
            } else {
                report.failures.push(what);
            }
        }
    }
    for wrong in load.strangers(loaded.address).await? {
        report.failures.push(format!("at the origin: {wrong}"));
    }
    match capture.report() {
        Ok(seen) => {
            if !seen.is_only(loaded.address) {
                report.failures.push(format!("on the wire: {:?}", seen.sources));
            }
            if seen.shared > 0 {
                report.failures.push(format!("5-tuples from two nodes: {:?}", seen.shared_flows));
            }
        }
        Err(error) => report.failures.push(format!("{error:#}")),
    }
    let history = watch.history();
    report.slices = (history.changes, history.versions);
    report.failures.extend(history.violations);
    report.took = begin.elapsed();
    // Both namespaces go by themselves: ports of pods that are gone rest first.
    Ok(report)
}

/// Looks at the held connections, so that none is idle for long, and says when some of a node that is alive all along were slow to
/// answer: they may, while packets are lost; in the end none may be broken.
async fn look(load: &Load, schedule: &Schedule) -> anyhow::Result<()> {
    let end = schedule.events.last().map_or(0, |event| event.at);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(end.into()) {
        for (node, named) in NODES.iter().enumerate() {
            let asked = Instant::now();
            // The victim's probe does not answer while it hangs.
            let looked = load.silent(node).await;
            if node == schedule.victim {
                continue;
            }
            let (silent, failures) = looked?;
            if silent > 0 {
                println!(
                    "{:4.0} s: {silent} connections of {} did not answer: {failures:?}",
                    begin.elapsed().as_secs_f64(),
                    named.name()
                );
            } else if asked.elapsed() > Duration::from_secs(2) {
                println!(
                    "{:4.0} s: {} waited {:.1} s for its connections",
                    begin.elapsed().as_secs_f64(),
                    named.name(),
                    asked.elapsed().as_secs_f64()
                );
            }
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// A namespace with an address of its own.
struct Account {
    namespace: Namespace,
    address: Ipv4Addr,
    zone: String,
}

impl Account {
    async fn new(cluster: &Cluster, name: &str, zone: &str, slices: u32) -> anyhow::Result<Account> {
        let namespace = cluster.namespace(name).await?;
        let address = free_address(cluster).await?;
        let account = Account { namespace, address, zone: zone.to_owned() };
        let name = account.namespace.name();
        let objects = format!(
            "apiVersion: aegis.dev/v1alpha1
kind: AegisPrefix
metadata: {{name: {name}}}
spec: {{cidr: {address}/32, account: {name}}}
---
apiVersion: aegis.dev/v1alpha1
kind: EgressAllocation
metadata: {{name: partners}}
spec:
  prefixes: [{name}]
  addresses: {{ipv4: 1}}
  ports: {{perNode: {{min: {slices}}}}}
  timeouts: {{tcpEstablishedSeconds: 600, tcpTransitorySeconds: 60, tcpClosedSeconds: 2, udpSeconds: 60}}
"
        );
        account.namespace.apply(&objects).await?;
        account.bind(&account.zone, true).await?;
        Ok(account)
    }

    /// Applies the account's binding.
    async fn bind(&self, cidrs: &str, enabled: bool) -> anyhow::Result<()> {
        let binding = format!(
            "apiVersion: aegis.dev/v1alpha1
kind: ZoneBinding
metadata: {{name: partners}}
spec:
  enabled: {enabled}
  allocationRef: {{name: partners}}
  workloads: {{podSelector: {{matchLabels: {{{}: {}}}}}}}
  zone: {{cidrs: [{cidrs}]}}
",
            BOUND.0, BOUND.1
        );
        self.namespace.apply(&binding).await.map(drop)
    }

    /// A bound pod on each node.
    async fn pods(&self, cluster: &Cluster) -> anyhow::Result<Vec<Inside>> {
        try_join_all(NODES.map(|node| async move {
            let name = format!("pod-{}", node.name());
            let pod = self.namespace.pod(&name).on(&node.name()).label(BOUND.0, BOUND.1).start().await?;
            Inside::of(cluster, pod)
        }))
        .await
    }
}

/// An address that no prefix has, beside those that the other tests use.
async fn free_address(cluster: &Cluster) -> anyhow::Result<Ipv4Addr> {
    let prefixes: Api<AegisPrefix> = Api::all(cluster.client());
    let listed = prefixes.list(&ListParams::default()).await?;
    let taken = |address: &Ipv4Addr| listed.items.iter().any(|it| it.spec.cidr == format!("{address}/32"));
    (200..240)
        .map(|last| Ipv4Addr::new(203, 0, 113, last))
        .find(|it| !taken(it))
        .context("no address is free")
}

/// Fails with what a report says is wrong.
pub fn judge(report: &Report) -> anyhow::Result<()> {
    ensure!(report.failures.is_empty(), "{}", report.failures.join("; "));
    ensure!(report.faults.values().any(|(done, _)| *done > 0), "nothing was injected");
    Ok(())
}
