//! What must survive: replicas that die, an API server that is away, objects that somebody deletes.

#![allow(clippy::expect_used)] // Helpers of tests fail the test.

mod cluster;

use aegis_crds::{EgressAddress, EgressAllocation, HoldingState, type_};
use cluster::objects::{SOON, slices};
use cluster::{Cluster, eventually};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Client, CustomResourceExt, ResourceExt};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

fn one_address() -> Value {
    json!({"prefixes": ["leased"]})
}

async fn account(cluster: &Cluster) {
    cluster.namespace("shop").await;
    cluster.prefix("leased", "203.0.113.0/28", "shop").await;
}

async fn holder(client: &Client) -> Option<String> {
    let leases: Api<Lease> = Api::namespaced(client.clone(), "default");
    leases.get_opt("aegis-operator").await.expect("lease")?.spec?.holder_identity
}

#[tokio::test(flavor = "multi_thread")]
async fn second_replica_takes_over() {
    let cluster = Cluster::start().await;
    let mut first = cluster.operator("first", &[]).await;
    first.leads().await;
    let second = cluster.operator("second", &[]).await;
    cluster.nodes(["n1", "n2"]).await;
    account(&cluster).await;
    cluster.allocation("shop", "one", one_address()).await;
    cluster.addresses("shop", "one", 1).await;
    assert_eq!(holder(&cluster.client).await.as_deref(), Some("first"));
    assert_eq!(second.metric("aegis_operator_leader").await, Some(0.0));
    assert_eq!(second.metric("aegis_operator_plans_total").await, Some(0.0), "only the leader plans");

    first.process.kill();
    let killed = Instant::now();
    cluster.allocation("shop", "two", one_address()).await;
    // The lease lasts ten seconds from the last renewal, and nobody may be earlier than that.
    cluster.addresses("shop", "two", 1).await;
    let took = killed.elapsed();
    println!("take-over after kill -9: {took:?}");
    assert!(took > Duration::from_secs(7) && took < Duration::from_secs(40), "{took:?}");
    assert_eq!(holder(&cluster.client).await.as_deref(), Some("second"));

    // A leader that comes back is a follower.
    let mut back = cluster.operator("first", &[]).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(back.metric("aegis_operator_leader").await, Some(0.0));

    // One that is asked to stop hands over at once.
    let mut second = second;
    second.process.signal(Signal::SIGTERM);
    assert!(second.process.wait(), "ends well");
    let asked = Instant::now();
    back.leads().await;
    let took = asked.elapsed();
    println!("take-over after SIGTERM: {took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    cluster.allocation("shop", "three", one_address()).await;
    cluster.addresses("shop", "three", 1).await;
    back.process.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_leader_does_not_write_when_it_thaws() {
    let cluster = Cluster::start().await;
    let first = cluster.operator("first", &[]).await;
    first.leads().await;
    let second = cluster.operator("second", &[]).await;
    cluster.nodes(["n1", "n2"]).await;
    account(&cluster).await;
    first.process.signal(Signal::SIGSTOP);
    second.leads().await;
    let plans = async || second.metric("aegis_operator_plans_total").await;
    cluster.allocation("shop", "one", one_address()).await;
    cluster.addresses("shop", "one", 1).await;
    first.process.signal(Signal::SIGCONT);
    eventually("it knows that it does not lead", SOON, async || {
        match first.metric("aegis_operator_leader").await {
            Some(0.0) => Ok(()),
            other => Err(other),
        }
    })
    .await;
    assert!(plans().await > Some(0.0));
    let before = first.metric("aegis_operator_plans_total").await;
    cluster.allocation("shop", "two", one_address()).await;
    cluster.addresses("shop", "two", 1).await;
    assert_eq!(first.metric("aegis_operator_plans_total").await, before);
    assert_eq!(holder(&cluster.client).await.as_deref(), Some("second"));
}

#[tokio::test(flavor = "multi_thread")]
async fn api_server_away_for_twenty_seconds() {
    let mut cluster = Cluster::start().await;
    let mut operator = cluster.operator("a", &[]).await;
    operator.leads().await;
    let agents = cluster.nodes(["n1", "n2"]).await;
    account(&cluster).await;
    cluster.allocation("shop", "one", one_address()).await;
    cluster.programmed(&agents.each_ref(), "shop", "one").await;
    let before = cluster.addresses("shop", "one", 1).await;

    cluster.stop_api();
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(operator.metric("aegis_operator_leader").await, Some(0.0), "it stopped writing long ago");
    assert!(operator.get("/healthz").await.is_ok(), "an outage is no reason to restart");
    cluster.start_api().await;
    let back = Instant::now();
    // Written before the operator can have noticed that the server is back.
    cluster.allocation("shop", "two", one_address()).await;
    cluster.all::<Node>().delete("n2", &DeleteParams::default()).await.expect("delete");
    let two = cluster.addresses("shop", "two", 1).await;
    println!("planned {:?} after the API server was back", back.elapsed());
    assert_ne!(two[0].name_any(), before[0].name_any());
    eventually("the deleted node's slices rest", SOON, async || {
        let one = cluster.addresses_now("shop", "one").await?.pop().ok_or("lost")?;
        let resting = slices(&one, HoldingState::Quarantined);
        if resting.get("n2") == Some(&8) { Ok(()) } else { Err(format!("{resting:?}")) }
    })
    .await;
    let one = cluster.addresses("shop", "one", 1).await;
    assert_eq!(slices(&one[0], HoldingState::Held).get("n1"), Some(&8), "nothing was lost");
    operator.process.signal(Signal::SIGTERM);
    assert!(operator.process.wait());
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_addresses_are_written_again_as_they_were() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator("a", &[]).await;
    operator.leads().await;
    cluster.nodes(["n1", "n2"]).await;
    account(&cluster).await;
    cluster.allocation("shop", "one", one_address()).await;
    let before = cluster.addresses("shop", "one", 1).await.remove(0);
    let api: Api<EgressAddress> = cluster.all();
    api.delete(&before.name_any(), &DeleteParams::default()).await.expect("delete");
    let again = eventually("it is back", SOON, async || {
        let found = cluster.addresses_now("shop", "one").await?.pop().ok_or("gone")?;
        if found.uid() != before.uid() { Ok(found) } else { Err("still the old one".to_owned()) }
    })
    .await;
    assert_eq!(again.spec, before.spec);
    assert_eq!(operator.metric("aegis_operator_addresses_vanished_total").await, Some(1.0));
    eventually("an Event says so", SOON, async || {
        let events = cluster.events("default", "aegis-operator").await;
        if events
            .iter()
            .any(|(reason, note)| reason == "AddressesVanished" && note.contains(&before.name_any()))
        {
            Ok(())
        } else {
            Err(events)
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_crd_does_not_lose_what_nodes_hold() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator("a", &[]).await;
    operator.leads().await;
    cluster.nodes(["n1", "n2"]).await;
    account(&cluster).await;
    cluster.allocation("shop", "one", json!({"prefixes": ["leased"], "addresses": {"ipv4": 3}})).await;
    let mut before = cluster.addresses("shop", "one", 3).await;
    let crds: Api<CustomResourceDefinition> = cluster.all();
    crds.delete(EgressAddress::crd_name(), &DeleteParams::default()).await.expect("delete");
    eventually("the operator says so", SOON, async || {
        match operator.metric("aegis_operator_addresses_vanished_total").await {
            Some(3.0) => Ok(()),
            other => Err(other),
        }
    })
    .await;
    eventually("the CRD is there again", SOON, async || {
        crds.create(&PostParams::default(), &EgressAddress::crd()).await.map_err(|error| error.to_string())
    })
    .await;
    let mut after = cluster.addresses("shop", "one", 3).await;
    before.sort_by_key(ResourceExt::name_any);
    after.sort_by_key(ResourceExt::name_any);
    for (before, after) in before.iter().zip(&after) {
        assert_ne!(before.uid(), after.uid());
        assert_eq!(before.spec, after.spec);
    }
}

/// Objects that vanish, or become older ones, while no leader is there to remember them.
#[tokio::test(flavor = "multi_thread")]
async fn what_nodes_send_from_is_given_to_nobody_whatever_became_of_its_object() {
    let cluster = Cluster::start().await;
    let mut operator = cluster.operator("a", &[]).await;
    operator.leads().await;
    let agents = cluster.nodes(["n1", "n2"]).await;
    account(&cluster).await;
    cluster.allocation("shop", "gone", one_address()).await;
    cluster.addresses("shop", "gone", 1).await;
    cluster.allocation("shop", "older", one_address()).await;
    for name in ["gone", "older"] {
        cluster.programmed(&agents.each_ref(), "shop", name).await;
    }
    let older = cluster.addresses("shop", "older", 1).await.remove(0);
    let gone = cluster.addresses("shop", "gone", 1).await.remove(0);
    let allocations: Api<EgressAllocation> = cluster.in_account("shop");
    operator.process.signal(Signal::SIGTERM);
    assert!(operator.process.wait());

    let addresses: Api<EgressAddress> = cluster.all();
    for address in [&gone, &older] {
        addresses.delete(&address.name_any(), &DeleteParams::default()).await.expect("delete");
    }
    // As it was in a backup, before n2 came.
    let mut restored = EgressAddress::new(&older.name_any(), older.spec.clone());
    restored.spec.epoch -= 1;
    restored.spec.holdings.truncate(1);
    restored.spec.holdings.iter_mut().for_each(|holding| holding.epoch = restored.spec.epoch);
    addresses.create(&PostParams::default(), &restored).await.expect("restore");

    let operator = cluster.operator("b", &[]).await;
    operator.leads().await;
    let told = cluster.condition(&allocations, "gone", type_::ALLOCATED, "False", "0 of 1 addresses").await;
    assert_eq!(told.reason, aegis_crds::reason::WITHHELD);
    let status = allocations.get("gone").await.expect("get").status.expect("status");
    assert_eq!(status.summary, gone.name_any(), "it is still its");
    cluster.allocation("shop", "later", one_address()).await;
    let later = cluster.addresses("shop", "later", 1).await.remove(0);
    assert!(![gone.name_any(), older.name_any()].contains(&later.name_any()));
    assert_eq!(addresses.get(&older.name_any()).await.expect("get").spec, restored.spec, "left as it is");
    assert!(addresses.get_opt(&gone.name_any()).await.expect("get").is_none());

    // The nodes have let go.
    for agent in &agents {
        agent.report_of(&cluster, &[]).await;
    }
    let again = cluster.addresses("shop", "gone", 1).await.remove(0);
    assert_eq!(again.name_any(), gone.name_any());
    assert!(again.spec.epoch > gone.spec.epoch);
    cluster.condition(&allocations, "gone", type_::ALLOCATED, "True", "").await;
    eventually("the older one is planned again", SOON, async || {
        let held = slices(&addresses.get(&older.name_any()).await.expect("get"), HoldingState::Held);
        if held.len() == 2 { Ok(()) } else { Err(held) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_writer_is_met_by_planning_again() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator("a", &[]).await;
    operator.leads().await;
    let agents = cluster.nodes(["n1", "n2"]).await;
    account(&cluster).await;
    // Somebody else keeps touching the objects while the operator changes them.
    let client = cluster.client.clone();
    let toucher = tokio::spawn(async move {
        let api: Api<EgressAddress> = Api::all(client);
        for round in 0.. {
            let patch = Patch::Merge(json!({"metadata": {"annotations": {"test": format!("{round}")}}}));
            for address in api.list(&ListParams::default()).await.expect("list") {
                let _ = api.patch(&address.name_any(), &PatchParams::default(), &patch).await;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    cluster.allocation("shop", "one", json!({"prefixes": ["leased"], "addresses": {"ipv4": 4}})).await;
    cluster.addresses("shop", "one", 4).await;
    for (expected, name) in (agents.len() + 1..).zip(["n3", "n4", "n5", "n6"]) {
        cluster.node(name).await;
        eventually("each node has its slices of each address", SOON, async || {
            let found = cluster.addresses_now("shop", "one").await?;
            let held: Vec<usize> = found.iter().map(|it| slices(it, HoldingState::Held).len()).collect();
            if held == [expected; 4] { Ok(()) } else { Err(format!("{held:?}")) }
        })
        .await;
    }
    toucher.abort();
    for address in cluster.addresses("shop", "one", 4).await {
        assert!(address.annotations().contains_key("test"), "others' metadata is kept");
        let starts: Vec<(u32, u32)> = address.spec.holdings.iter().map(|it| (it.first, it.last)).collect();
        assert!(starts.windows(2).all(|pair| pair[0].1 < pair[1].0), "{starts:?}");
    }
}
