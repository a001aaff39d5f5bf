//! The operator in a large cluster: how soon it is ready, how soon it reacts, what it keeps. In the tests 300 nodes and 60
//! addresses, with limits; `make bench` runs it with 5,000 and 1,000 and prints figures:
//! `AEGIS_SCALE=5000x1000 cargo test -p aegis-operator --test api_scale -- --nocapture` (`AEGIS_OPERATOR` names an optimised
//! operator by its whole path).

#![allow(clippy::expect_used, clippy::panic)] // Helpers of tests fail the test.

mod cluster;

use aegis_crds::{EgressAddress, EgressAllocation, EgressNode, EgressNodeSpec, HoldingState, type_};
use cluster::objects::{Agent, slices};
use cluster::{Cluster, Operator, eventually};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use std::fmt::Display;
use std::time::{Duration, Instant};

/// Nodes are in so many groups, and each allocation is for one of them, in turn.
const GROUPS: usize = 40;
/// What the chart lets the operator have, in KiB.
const MEMORY_LIMIT: u64 = 512 * 1024;
const LONG: Duration = Duration::from_secs(600);

/// Nodes and addresses.
fn size() -> (usize, usize) {
    let text = std::env::var("AEGIS_SCALE").unwrap_or_else(|_| "300x60".into());
    let (nodes, addresses) = text.split_once('x').expect("AEGIS_SCALE is NODESxADDRESSES");
    (nodes.parse().expect("nodes"), addresses.parse().expect("addresses"))
}

fn node_name(index: usize) -> String {
    format!("node-{index:04}")
}

fn allocation_name(index: usize) -> String {
    format!("allocation-{index:04}")
}

/// Nodes of a group.
fn members(nodes: usize, group: usize) -> usize {
    (0..nodes).filter(|node| node % GROUPS == group).count()
}

/// A Node about as a kubelet writes it.
async fn create_node(cluster: &Cluster, index: usize) {
    let mut labels: Vec<(String, String)> =
        (0..12).map(|it| (format!("example.com/label-{it}"), format!("value-{it}"))).collect();
    labels.push(("example.com/group".into(), (index % GROUPS).to_string()));
    let node = Node {
        metadata: ObjectMeta {
            name: Some(node_name(index)),
            labels: Some(labels.into_iter().collect()),
            ..Default::default()
        },
        ..Default::default()
    };
    cluster.all::<Node>().create(&PostParams::default(), &node).await.expect("node");
}

/// Writes what all agents report straight into etcd, in the form in which the API server keeps it: through the API server it
/// takes minutes, which are no part of what is measured. The first agent's report, which has to be there, is the pattern.
async fn report_all(cluster: &Cluster, nodes: usize) {
    let pattern = cluster.etcd_get(&key(0)).await.expect("the first agent's report");
    let puts = (1..nodes).map(|index| {
        let mut report: Value = pattern.clone();
        report["metadata"]["name"] = json!(node_name(index));
        report["metadata"]["uid"] = json!(format!("00000000-0000-4000-8000-{index:012}"));
        let [_, _, high, low] = u32::try_from(index).expect("index").to_be_bytes();
        report["status"]["tunnelAddress"] = json!(format!("172.16.{high}.{low}"));
        async move { cluster.etcd_put(&key(index), &report).await }
    });
    stream::iter(puts).buffer_unordered(8).collect::<Vec<()>>().await;
}

fn key(index: usize) -> String {
    format!("/registry/aegis.dev/egressnodes/{}", node_name(index))
}

async fn want(cluster: &Cluster, node: usize, allocation: &str, slices: u32) {
    let demand = json!([{"allocation": {"namespace": "shop", "name": allocation}, "slices": slices}]);
    let patch = Patch::Merge(json!({"status": {"demand": demand}}));
    let api = cluster.all::<EgressNode>();
    api.patch_status(&node_name(node), &PatchParams::default(), &patch).await.expect("demand");
}

async fn addresses(cluster: &Cluster) -> Result<Vec<EgressAddress>, String> {
    Ok(cluster.all::<EgressAddress>().list(&ListParams::default()).await.map_err(|it| it.to_string())?.items)
}

/// Waits for the address of one allocation to pass a check, looking at it alone.
async fn address_of(cluster: &Cluster, name: &str, check: impl Fn(&EgressAddress) -> bool) {
    let api = cluster.all::<EgressAddress>();
    eventually("the address changes", LONG, async || {
        let address = api.get(name).await.map_err(|it| it.to_string())?;
        if check(&address) { Ok(()) } else { Err(format!("{:?}", address.spec.holdings)) }
    })
    .await;
}

/// Prints how long something took.
fn took(what: impl Display, started: Instant) {
    println!("{what} {:.2} s", started.elapsed().as_secs_f64());
}

async fn told(what: &str, operator: &Operator) {
    let plans = operator.metric("aegis_operator_plan_duration_seconds_count").await.unwrap_or_default();
    let seconds = operator.metric("aegis_operator_plan_duration_seconds_sum").await.unwrap_or_default();
    println!(
        "{what}: resident {} MiB, at most {} MiB so far; {plans} plans, {:.0} ms each with translation and audit",
        operator.process.resident() / 1024,
        operator.process.peak() / 1024,
        seconds / plans.max(1.0) * 1e3
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_cluster() {
    let (nodes, count) = size();
    let mut cluster = Cluster::start().await;
    cluster.namespace("shop").await;
    cluster.prefix("leased", "203.0.0.0/16", "shop").await;
    let started = Instant::now();
    stream::iter(0..nodes).for_each_concurrent(16, |index| create_node(&cluster, index)).await;
    took(format!("{nodes} Nodes created in"), started);
    let started = Instant::now();
    let create = async |index: usize| {
        let site =
            json!([{"name": "group", "nodeSelector": {"example.com/group": (index % GROUPS).to_string()}}]);
        let spec = json!({"prefixes": ["leased"], "sites": site, "ports": {"perNode": {"min": 1}}});
        cluster.allocation("shop", &allocation_name(index), spec).await;
    };
    stream::iter(0..count).for_each_concurrent(16, create).await;
    took(format!("{count} EgressAllocations created in"), started);
    let first = Agent {
        node: node_name(0),
        ready: true,
        demand: vec![],
        limited: vec![],
        drains: false,
        leaving: false,
        bindings: vec![],
    };
    let object = EgressNode::new(&first.node, EgressNodeSpec {});
    cluster.all::<EgressNode>().create(&PostParams::default(), &object).await.expect("report");
    first.report_of(&cluster, &[]).await;
    report_all(&cluster, nodes).await;

    let started = Instant::now();
    let operator = cluster.operator("a", &[]).await;
    took("operator ready in", started);
    let holders = |address: &EgressAddress| slices(address, HoldingState::Held).len();
    let all = eventually("every allocation has its address, with all nodes of its group", LONG, async || {
        let found = addresses(&cluster).await?;
        let granted = |it: &&EgressAddress| {
            let index: usize = it.spec.allocation_ref.name[11..].parse().unwrap_or_default();
            holders(it) == members(nodes, index % GROUPS)
        };
        let good = found.iter().filter(granted).count();
        if good == count { Ok(found) } else { Err(format!("{good} of {count}")) }
    })
    .await;
    took(format!("{count} EgressAddresses written, from the operator's start, in"), started);
    told("before the agents report", &operator).await;

    first.report_of(&cluster, &all).await;
    let started = Instant::now();
    report_all(&cluster, nodes).await;
    took(
        format!("reports of all nodes on all addresses, {} bytes each, in etcd in", {
            let report = cluster.etcd_get(&key(0)).await.expect("report");
            report.to_string().len()
        }),
        started,
    );
    let allocations = cluster.in_account::<EgressAllocation>("shop");
    let status = |it: &EgressAllocation| {
        let conditions = it.status.iter().flat_map(|status| &status.conditions);
        conditions.into_iter().any(|it| it.type_ == type_::PROGRAMMED && it.status == "True")
    };
    eventually("every allocation is programmed", LONG, async || {
        let list = allocations.list(&ListParams::default()).await.map_err(|it| it.to_string())?;
        let good = list.items.iter().filter(|it| status(it)).count();
        if good == count { Ok(()) } else { Err(format!("{good} of {count}")) }
    })
    .await;
    took("all of it told in the statuses after", started);
    told("all agents have reported", &operator).await;

    let name = |allocation: usize| {
        let found = all.iter().find(|it| it.spec.allocation_ref.name == allocation_name(allocation));
        found.expect("address").name_any()
    };
    let has = |node: usize, slices_wanted: u32| {
        move |it: &EgressAddress| slices(it, HoldingState::Held).get(&node_name(node)) == Some(&slices_wanted)
    };
    let mut times = Vec::new();
    for wanted in 2..7 {
        let started = Instant::now();
        want(&cluster, 1, &allocation_name(1), wanted).await;
        address_of(&cluster, &name(1), has(1, wanted)).await;
        times.push(started.elapsed());
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    times.sort();
    println!(
        "one demand met in {:.2} s (median of 5, worst {:.2} s)",
        times[2].as_secs_f64(),
        times[4].as_secs_f64()
    );
    told("after that", &operator).await;

    let events = cluster.all::<EgressAddress>();
    let version = events.list(&ListParams::default().limit(1)).await.expect("list").metadata.resource_version;
    let stream = events.watch(&Default::default(), &version.expect("version")).await.expect("watch");
    let mut stream = std::pin::pin!(stream);
    let started = Instant::now();
    cluster.all::<Node>().delete(&node_name(2), &DeleteParams::default()).await.expect("delete");
    let theirs = (0..count).filter(|it| it % GROUPS == 2).count();
    let mut rests = 0;
    while rests < theirs {
        let event = tokio::time::timeout(LONG, stream.try_next()).await.expect("no slices of the node rest");
        if let Some(kube::api::WatchEvent::Modified(address)) = event.expect("event")
            && slices(&address, HoldingState::Quarantined).contains_key(&node_name(2))
        {
            rests += 1;
            if rests == 1 {
                took("the first slices of a node that is gone rest after", started);
            }
        }
    }
    took(format!("those of all its {theirs} addresses after"), started);
    told("after that", &operator).await;

    cluster.stop_api();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let started = Instant::now();
    cluster.start_api().await;
    took("API server back in", started);
    let started = Instant::now();
    want(&cluster, 1, &allocation_name(1), 9).await;
    address_of(&cluster, &name(1), has(1, 9)).await;
    took("one demand met, once it serves again, after", started);
    told("after that", &operator).await;
    // The others have kept what they had.
    let after = addresses(&cluster).await.expect("addresses");
    assert_eq!(after.len(), count);
    for (before, after) in all.iter().zip(&after).filter(|(it, _)| {
        !["0001", "0002"].contains(&&it.spec.allocation_ref.name[11..])
            && it.spec.allocation_ref.name[11..].parse::<usize>().is_ok_and(|index| index % GROUPS > 2)
    }) {
        assert_eq!(before.spec, after.spec, "an address that nothing happened to has changed");
    }
    if std::env::var_os("AEGIS_SCALE").is_none() {
        let peak = operator.process.peak();
        assert!(peak < MEMORY_LIMIT / 2, "{peak} KiB for {nodes} nodes and {count} addresses");
    }
}
