//! Nodes that do not renew their Lease: the Lease is taken over, their slices go to others, and they get it back. With
//! the rights that the chart gives.

#![allow(clippy::expect_used)] // Helpers of tests fail the test.

mod cluster;

use aegis_core::fence::{LABEL, lease_name};
use aegis_crds::{EgressAddress, EgressAllocation, HoldingState, type_};
use cluster::objects::{Agent, SOON, slices};
use cluster::rights::{NAMESPACE, install_rights};
use cluster::{Cluster, Operator, eventually};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use serde_json::json;
use std::time::{Duration, Instant};

/// The shortest deadline that there is.
const AFTER: Duration = Duration::from_secs(15);
/// What is waited for after a take-over: a twentieth more.
const WAIT: Duration = Duration::from_millis(15_750);
/// More than either, on a busy machine.
const LONG: Duration = Duration::from_secs(60);

/// A cluster with the account `shop`, whose allocation `partner` has the shortest fence, and an operator.
async fn start(nodes: &[&str]) -> (Cluster, Operator, Vec<Agent>) {
    let cluster = Cluster::start().await;
    cluster.namespace(NAMESPACE).await;
    install_rights(&cluster).await;
    let operator = operator(&cluster, "a").await;
    let mut agents = Vec::new();
    for node in nodes {
        agents.push(cluster.node(node).await);
    }
    cluster.namespace("shop").await;
    cluster.prefix("leased", "203.0.113.0/28", "shop").await;
    let fence = json!({"mode": "Time", "afterSeconds": AFTER.as_secs()});
    cluster.allocation("shop", "partner", json!({"prefixes": ["leased"], "fence": fence})).await;
    (cluster, operator, agents)
}

async fn operator(cluster: &Cluster, name: &str) -> Operator {
    let operator = cluster.operator_as("operator", NAMESPACE, name, &["--quarantine-seconds=1"]).await;
    operator.leads().await;
    operator
}

/// A node's agent acquires its Lease, or renews it.
async fn renew(client: &Client, node: &str) -> Result<Lease, kube::Error> {
    let api: Api<Lease> = Api::namespaced(client.clone(), NAMESPACE);
    let name = lease_name(node);
    let spec = LeaseSpec {
        holder_identity: Some(node.to_owned()),
        renew_time: Some(MicroTime(Timestamp::now())),
        lease_duration_seconds: Some(15),
        ..LeaseSpec::default()
    };
    match api.get_opt(&name).await? {
        Some(lease) => api.replace(&name, &PostParams::default(), &Lease { spec: Some(spec), ..lease }).await,
        None => {
            let metadata = ObjectMeta {
                name: Some(name),
                labels: Some([(LABEL.0.to_owned(), LABEL.1.to_owned())].into()),
                ..ObjectMeta::default()
            };
            api.create(&PostParams::default(), &Lease { metadata, spec: Some(spec) }).await
        }
    }
}

/// Renews a node's Lease every other second until the test ends, whatever happens to the API server meanwhile.
fn keep_renewing(client: &Client, node: &str) -> tokio::task::JoinHandle<()> {
    let (client, node) = (client.clone(), node.to_owned());
    tokio::spawn(async move {
        loop {
            let _ = renew(&client, &node).await;
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    })
}

/// Who holds a node's Lease; nobody is "".
async fn holder(cluster: &Cluster, node: &str) -> Result<String, String> {
    let api: Api<Lease> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    let lease = api.get_opt(&lease_name(node)).await.map_err(|error| error.to_string())?;
    let lease = lease.ok_or("no Lease")?;
    Ok(lease.spec.and_then(|spec| spec.holder_identity).unwrap_or_default())
}

async fn holder_becomes(cluster: &Cluster, node: &str, expected: &str, limit: Duration) {
    eventually(&format!("the Lease of {node} is held by {expected:?}"), limit, async || {
        let holder = holder(cluster, node).await?;
        if holder == expected { Ok(()) } else { Err(holder) }
    })
    .await;
}

async fn address(cluster: &Cluster) -> Result<EgressAddress, String> {
    cluster.addresses_now("shop", "partner").await?.pop().ok_or_else(|| "no address".to_owned())
}

/// Waits until exactly these nodes hold slices.
async fn holders_become(cluster: &Cluster, expected: &[&str], limit: Duration) {
    eventually(&format!("{expected:?} hold slices"), limit, async || {
        let held = slices(&address(cluster).await?, HoldingState::Held);
        let held: Vec<&str> = held.keys().map(String::as_str).collect();
        if held == expected { Ok(()) } else { Err(format!("{held:?} do")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_node_loses_its_slices_after_its_deadline_and_gets_its_lease_back() {
    let (cluster, operator, agents) = start(&["n1", "n2", "n3"]).await;
    let allocations: Api<EgressAllocation> = cluster.in_account("shop");
    cluster.condition(&allocations, "partner", type_::ALLOCATED, "False", "spec.fence").await;
    assert!(address(&cluster).await.expect("address").spec.holdings.is_empty(), "nobody holds its Lease yet");
    let renewing = keep_renewing(&cluster.client, "n1");
    for node in ["n2", "n3"] {
        renew(&cluster.client, node).await.expect("acquire");
    }
    holders_become(&cluster, &["n1", "n2", "n3"], SOON).await;
    let renewed = Instant::now();
    for node in ["n2", "n3"] {
        renew(&cluster.client, node).await.expect("renew");
    }
    let fenced = address(&cluster).await.expect("address");
    assert_eq!(fenced.spec.fence.map(|fence| fence.after_seconds), Some(15));
    // The agent of n3 is of a version that knows no deadlines.
    let mut unfenced = fenced.clone();
    unfenced.spec.fence = None;
    for (agent, address) in agents.iter().zip([&fenced, &fenced, &unfenced]) {
        agent.report_of(&cluster, std::slice::from_ref(address)).await;
    }

    holder_becomes(&cluster, "n2", "aegis-operator", LONG).await;
    let taken = Instant::now();
    assert!(taken - renewed >= AFTER, "{:?}", taken - renewed);
    assert_eq!(slices(&address(&cluster).await.expect("address"), HoldingState::Held).len(), 3);
    eventually("an Event tells of it", SOON, async || {
        let events = cluster.events("default", "n2").await;
        let found = events.iter().any(|(reason, note)| reason == "NodeFenced" && note.contains("for 15 s"));
        if found { Ok(()) } else { Err(events) }
    })
    .await;
    let late = renew_as_seen_before(&cluster, "n2").await;
    assert!(late.contains("Conflict") || late.contains("modified"), "{late}");

    holders_become(&cluster, &["n1", "n3"], LONG).await;
    let lost = taken.elapsed();
    println!("slices of the silent node rest {lost:?} after the take-over of its Lease");
    // What is seen a moment late is the take-over, not the loss.
    assert!(lost + Duration::from_secs(1) >= WAIT, "{lost:?}");
    holder_becomes(&cluster, "n2", "", SOON).await;
    cluster.condition(&allocations, "partner", type_::ALLOCATED, "True", "n2").await;
    assert_eq!(holder(&cluster, "n1").await.as_deref(), Ok("n1"), "it renews");
    assert_eq!(holder(&cluster, "n3").await.as_deref(), Ok("n3"), "it keeps no deadline");
    assert_eq!(operator.metric("aegis_operator_node_leases{state=\"free\"}").await, Some(1.0));

    renew(&cluster.client, "n2").await.expect("acquire");
    holders_become(&cluster, &["n1", "n2", "n3"], SOON).await;
    renewing.abort();
    let page = operator.get("/metrics").await.expect("metrics");
    assert!(!page.contains("aegis_operator_api_errors_total{"), "{page}");
    let log = std::fs::read_to_string(cluster.dir.join("a.log")).expect("log");
    assert!(!log.contains("orbidden"), "{log}");
}

/// A renewal that was sent before the take-over and arrives now: what the API server says to it.
async fn renew_as_seen_before(cluster: &Cluster, node: &str) -> String {
    let api: Api<Lease> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    let mut lease = api.get(&lease_name(node)).await.expect("lease");
    let version: u64 = lease.metadata.resource_version.take().expect("version").parse().expect("number");
    lease.metadata.resource_version = Some((version - 1).to_string());
    lease.spec.as_mut().expect("spec").holder_identity = Some(node.to_owned());
    let written = api.replace(&lease_name(node), &PostParams::default(), &lease).await;
    written.expect_err("it was taken over").to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn another_operator_waits_anew() {
    let (cluster, mut first, agents) = start(&["n1", "n2"]).await;
    let renewing = keep_renewing(&cluster.client, "n1");
    renew(&cluster.client, "n2").await.expect("acquire");
    holders_become(&cluster, &["n1", "n2"], SOON).await;
    for agent in &agents {
        agent.report(&cluster).await;
    }
    holder_becomes(&cluster, "n2", "aegis-operator", LONG).await;
    tokio::time::sleep(WAIT / 2).await;
    first.process.kill();
    let started = Instant::now();
    let _second = operator(&cluster, "b").await;
    holders_become(&cluster, &["n1"], LONG).await;
    assert!(started.elapsed() >= WAIT, "{:?}", started.elapsed());
    holder_becomes(&cluster, "n2", "", SOON).await;
    renewing.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_the_api_server_is_not_the_nodes_silence() {
    let (mut cluster, operator, agents) = start(&["n1", "n2"]).await;
    let renewing = ["n1", "n2"].map(|node| keep_renewing(&cluster.client, node));
    holders_become(&cluster, &["n1", "n2"], SOON).await;
    for agent in &agents {
        agent.report(&cluster).await;
    }
    cluster.stop_api();
    tokio::time::sleep(AFTER + Duration::from_secs(5)).await;
    cluster.start_api().await;
    operator.leads().await;
    let back = Instant::now();
    while back.elapsed() < AFTER + Duration::from_secs(3) {
        for node in ["n1", "n2"] {
            assert_eq!(holder(&cluster, node).await.as_deref(), Ok(node), "{:?} after", back.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    renewing.iter().for_each(tokio::task::JoinHandle::abort);
}
