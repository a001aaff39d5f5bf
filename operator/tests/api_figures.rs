//! Figures of the operator, on a build that is optimised:
//! `cargo build --release -p aegis-operator`, then
//! `AEGIS_OPERATOR=target/release/aegis-operator cargo test -p aegis-operator --test api_figures -- --ignored --nocapture`
//! (with the whole path of the program).

#![allow(clippy::expect_used)] // Helpers of tests fail the test.

mod cluster;

use aegis_crds::{EgressAddress, EgressAllocation, HoldingState, type_};
use cluster::objects::slices;
use cluster::{Cluster, Operator, eventually};
use futures::{StreamExt, TryStreamExt, stream};
use kube::api::{ListParams, WatchEvent, WatchParams};
use serde_json::json;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(120);

/// Percentiles of durations, in ms.
fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |share: usize| times[(times.len() * share).div_ceil(100) - 1].as_secs_f64() * 1e3;
    format!("p50 {:.0} ms, p99 {:.0} ms, of {}", at(50), at(99), times.len())
}

/// Time from creating an allocation until a watch delivers its address with slices.
async fn latencies(cluster: &Cluster, nodes: usize, count: usize) -> Vec<Duration> {
    let addresses = cluster.all::<EgressAddress>();
    let version = addresses.list(&ListParams::default()).await.expect("list").metadata.resource_version;
    let events = addresses.watch(&WatchParams::default(), &version.expect("version")).await.expect("watch");
    let mut events = std::pin::pin!(events);
    let mut times = Vec::new();
    for index in 0..count {
        let name = format!("timed-{index}");
        let started = Instant::now();
        cluster
            .allocation("shop", &name, json!({"prefixes": ["leased"], "ports": {"perNode": {"min": 1}}}))
            .await;
        while let Some(event) = events.try_next().await.expect("event") {
            if let WatchEvent::Added(address) | WatchEvent::Modified(address) = event
                && address.spec.allocation_ref.name == name
                && slices(&address, HoldingState::Held).len() == nodes
            {
                break;
            }
        }
        times.push(started.elapsed());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    times
}

async fn told(cluster: &Cluster, operator: &Operator, what: &str) {
    let page = operator.get("/metrics").await.expect("metrics");
    let value = |name: &str| -> f64 {
        let line = page.lines().find_map(|line| line.strip_prefix(name)).unwrap_or(" 0");
        line.trim().parse().unwrap_or_default()
    };
    let plans = value("aegis_operator_plan_duration_seconds_count ");
    let seconds = value("aegis_operator_plan_duration_seconds_sum ");
    println!(
        "{what}: resident {} MiB; {plans} plans, {:.2} ms each; {} EgressAddress objects",
        operator.process.resident() / 1024,
        seconds / plans * 1e3,
        cluster.all::<EgressAddress>().list(&ListParams::default()).await.expect("list").items.len(),
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures, and takes minutes"]
async fn small_world() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator("a", &[]).await;
    operator.leads().await;
    cluster.nodes(["n1", "n2", "n3"]).await;
    cluster.namespace("shop").await;
    cluster.prefix("leased", "203.0.113.0/24", "shop").await;
    let times = latencies(&cluster, 3, 50).await;
    println!("from creating an allocation to its EgressAddress: {}", percentiles(times));
    tokio::time::sleep(Duration::from_secs(3)).await;
    told(&cluster, &operator, "3 nodes, 50 allocations").await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures, and takes minutes"]
async fn thousand_nodes() {
    let cluster = Cluster::start().await;
    cluster.namespace("shop").await;
    cluster.prefix("leased", "10.1.0.0/16", "shop").await;
    let names: Vec<String> = (0..1_000).map(|index| format!("node-{index:04}")).collect();
    let agents: Vec<_> = stream::iter(&names).map(|name| cluster.node(name)).buffered(8).collect().await;
    // An address has 252 slices, so that 252 nodes get one each.
    for index in 0..200 {
        let spec = json!({"prefixes": ["leased"], "ports": {"perNode": {"min": 1}}});
        cluster.allocation("shop", &format!("wide-{index}"), spec).await;
    }
    let operator = cluster.operator("a", &[]).await;
    operator.leads().await;
    let started = Instant::now();
    let written = async || {
        let found =
            cluster.all::<EgressAddress>().list(&ListParams::default()).await.map_err(|it| it.to_string())?;
        let count = found.items.len();
        if count == 200 { Ok(()) } else { Err(format!("{count} written")) }
    };
    eventually("200 addresses with 252 holders each", LONG, written).await;
    println!("200 addresses with 252 holders each written within {:.1} s", started.elapsed().as_secs_f64());
    told(&cluster, &operator, "1,000 nodes, before the agents report").await;

    let addresses = cluster.readable_addresses().await.expect("addresses");
    let started = Instant::now();
    stream::iter(&agents).for_each_concurrent(8, |agent| agent.report_of(&cluster, &addresses)).await;
    println!("1,000 reports of 200 addresses each took {:.1} s", started.elapsed().as_secs_f64());
    let reported = Instant::now();
    let allocations = cluster.in_account::<EgressAllocation>("shop");
    eventually("all is programmed", LONG, async || {
        let list = allocations.list(&ListParams::default()).await.map_err(|it| it.to_string())?;
        let programmed = list.items.iter().filter(|allocation| {
            let conditions = allocation.status.iter().flat_map(|status| &status.conditions);
            conditions.into_iter().any(|it| it.type_ == type_::PROGRAMMED && it.status == "True")
        });
        let count = programmed.count();
        if count == 200 { Ok(()) } else { Err(format!("{count} of 200")) }
    })
    .await;
    println!("all statuses told it {:.1} s after the last report", reported.elapsed().as_secs_f64());
    told(&cluster, &operator, "1,000 nodes, 200 addresses, all reported").await;
    let times = latencies(&cluster, 252, 20).await;
    println!("from creating an allocation to its EgressAddress: {}", percentiles(times));
    told(&cluster, &operator, "1,000 nodes, 220 addresses").await;
}
