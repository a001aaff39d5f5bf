//! Allocations and bindings from creation to deletion, against a real API server. The tests play the agents.

#![allow(clippy::expect_used)] // Helpers of tests fail the test.

mod cluster;

use aegis_crds::{
    AegisPrefix, AllocationRef, Demand, EgressAddress, EgressAllocation, FINALIZER, HoldingState, Limited,
    ProgrammedBinding, ZoneBinding, reason, type_,
};
use cluster::objects::{SOON, first, slices};
use cluster::{Cluster, eventually};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn allocation_gets_addresses_and_slices() {
    let cluster = Cluster::start().await;
    let _operator = cluster.operator("a", &[]).await;
    let [one, two, three] = cluster.nodes(["n1", "n2", "n3"]).await;
    cluster.namespace("shop").await;
    cluster.prefix("leased", "203.0.113.0/28", "shop").await;
    cluster.allocation("shop", "partner", json!({"prefixes": ["leased"]})).await;

    let addresses = cluster.addresses("shop", "partner", 1).await;
    let held = slices(&addresses[0], HoldingState::Held);
    assert_eq!(held.into_iter().collect::<Vec<_>>(), [("n1".into(), 8), ("n2".into(), 8), ("n3".into(), 8)]);
    assert_eq!(first(&addresses), "203.0.113.0", "the whole prefix is usable");
    assert_eq!(addresses[0].labels().get("aegis.dev/account").map(String::as_str), Some("shop"));

    let allocations: Api<EgressAllocation> = cluster.in_account("shop");
    for condition in [type_::ACCEPTED, type_::ALLOCATED] {
        cluster.condition(&allocations, "partner", condition, "True", "").await;
    }
    cluster
        .condition(&allocations, "partner", type_::PROGRAMMED, "False", "0 of 3 nodes have 203.0.113.0")
        .await;
    let prefixes: Api<AegisPrefix> = cluster.all();
    cluster.condition(&prefixes, "leased", type_::ACCEPTED, "True", "").await;
    eventually("one of sixteen addresses is in use", SOON, async || {
        let status = prefixes.get("leased").await.expect("prefix").status.unwrap_or_default();
        if (status.used, status.addresses) == (1, 16) { Ok(()) } else { Err(status) }
    })
    .await;
    assert!(prefixes.get("leased").await.expect("prefix").finalizers().contains(&FINALIZER.to_owned()));
    assert!(
        allocations.get("partner").await.expect("allocation").finalizers().contains(&FINALIZER.to_owned())
    );

    one.report(&cluster).await;
    two.report(&cluster).await;
    cluster.condition(&allocations, "partner", type_::PROGRAMMED, "False", "2 of 3 nodes have").await;
    cluster.condition(&allocations, "partner", type_::PROGRAMMED, "False", "waiting for n3").await;
    three.report(&cluster).await;
    cluster.condition(&allocations, "partner", type_::PROGRAMMED, "True", "3 of 3 nodes").await;
    cluster
        .condition::<EgressAddress>(&cluster.all(), "203.0.113.0", type_::PROGRAMMED, "True", "3 of 3")
        .await;

    let status = allocations.get("partner").await.expect("allocation").status.expect("status");
    assert_eq!((status.summary.as_str(), status.nodes), ("203.0.113.0", 3));
    assert_eq!((status.addresses[0].slices_held, status.addresses[0].slices_free), (24, 228));

    // Nothing changes any more, so nothing is written any more.
    let version = async || allocations.get("partner").await.expect("allocation").resource_version();
    let before = version().await;
    for agent in [&one, &two, &three] {
        agent.report(&cluster).await;
    }
    cluster.namespace("unrelated").await;
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    assert_eq!(version().await, before);
    let events = cluster.events("shop", "partner").await;
    let allocated: Vec<_> = events.iter().filter(|(reason, _)| reason == reason::ALLOCATED).collect();
    assert_eq!(allocated.len(), 1, "{events:?}");
    assert!(allocated[0].1.contains("203.0.113.0"), "{events:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_64_is_given_a_number_for_each_node_and_goes_when_nobody_has_one() {
    let cluster = Cluster::start().await;
    let _operator = cluster.operator("a", &["--quarantine-seconds", "2"]).await;
    let [mut one, mut two] = cluster.nodes(["n1", "n2"]).await;
    cluster.namespace("shop").await;
    cluster.prefix("leased", "203.0.113.0/28", "shop").await;
    cluster.prefix("six", "2001:db8:1::/48", "shop").await;
    let both = json!({"prefixes": ["leased", "six"], "addresses": {"ipv4": 1, "ipv6": 1}});
    cluster.allocation("shop", "partner", both).await;

    let addresses = cluster.addresses("shop", "partner", 2).await;
    let network = addresses.iter().find(|it| it.name_any() == "2001-db8-1").expect("the first /64");
    assert_eq!((network.spec.address.as_str(), network.spec.prefix.as_str()), ("2001:db8:1::/64", "six"));
    let held = slices(network, HoldingState::Held);
    assert_eq!(held.into_iter().collect::<Vec<_>>(), [("n1".into(), 1), ("n2".into(), 1)]);
    let allocations: Api<EgressAllocation> = cluster.in_account("shop");
    cluster
        .condition(
            &allocations,
            "partner",
            type_::ALLOCATED,
            "True",
            "1 address on 2 nodes; 1 IPv6 /64 on 2 nodes",
        )
        .await;
    cluster.condition(&allocations, "partner", type_::PROGRAMMED, "False", "0 of 2 nodes").await;
    let status = allocations.get("partner").await.expect("allocation").status.expect("status");
    assert_eq!(status.summary, "203.0.113.0, 2001:db8:1::/64");
    assert_eq!((status.addresses[1].slices_held, status.addresses[1].slices_free), (2, 250));
    one.report(&cluster).await;
    two.report(&cluster).await;
    cluster.condition(&allocations, "partner", type_::PROGRAMMED, "True", "2 of 2 nodes").await;

    // It is asked for no more: each node says that it is empty, and it rests.
    let patch = Patch::Merge(json!({"spec": {"addresses": {"ipv6": null}}}));
    allocations.patch("partner", &PatchParams::default(), &patch).await.expect("patch");
    (one.drains, two.drains) = (true, true);
    eventually("the /64 is gone, the IPv4 address is not", SOON, async || {
        one.report(&cluster).await;
        two.report(&cluster).await;
        let left = cluster.addresses_now("shop", "partner").await?;
        let names: Vec<String> = left.iter().map(ResourceExt::name_any).collect();
        if names == ["203.0.113.0"] { Ok(()) } else { Err(format!("{names:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_of_one_ipv6_address_are_shared_like_those_of_ipv4() {
    let cluster = Cluster::start().await;
    let _operator = cluster.operator("a", &["--quarantine-seconds", "2"]).await;
    let [mut one, mut two] = cluster.nodes(["n1", "n2"]).await;
    cluster.namespace("shop").await;
    cluster.prefix("one", "2001:db8:7::9/128", "shop").await;
    let request = json!({"prefixes": ["one"], "addresses": {"ipv6": 1}, "ports": {"first": 32_768}});
    cluster.allocation("shop", "partner", request).await;

    let addresses = cluster.addresses("shop", "partner", 1).await;
    assert_eq!(addresses[0].name_any(), "2001-0db8-0007-0000-0000-0000-0000-0009");
    assert_eq!(addresses[0].spec.address, "2001:db8:7::9");
    let held = slices(&addresses[0], HoldingState::Held);
    assert_eq!(held.into_iter().collect::<Vec<_>>(), [("n1".into(), 8), ("n2".into(), 8)]);
    assert!(addresses[0].spec.holdings.iter().all(|it| it.first >= 128), "{:?}", addresses[0].spec.holdings);
    let allocations: Api<EgressAllocation> = cluster.in_account("shop");
    let good = "1 single IPv6 address on 2 nodes";
    cluster.condition(&allocations, "partner", type_::ALLOCATED, "True", good).await;
    let status = allocations.get("partner").await.expect("allocation").status.expect("status");
    assert_eq!(status.summary, "2001:db8:7::9");
    assert_eq!((status.addresses[0].slices_held, status.addresses[0].slices_free), (16, 112));
    one.report(&cluster).await;
    two.report(&cluster).await;
    cluster.condition(&allocations, "partner", type_::PROGRAMMED, "True", "2 of 2 nodes").await;

    allocations.delete("partner", &DeleteParams::default()).await.expect("delete");
    (one.drains, two.drains) = (true, true);
    eventually("the address is gone", SOON, async || {
        one.report(&cluster).await;
        two.report(&cluster).await;
        let left = cluster.addresses_now("shop", "partner").await?;
        if left.is_empty() { Ok(()) } else { Err(format!("{} left", left.len())) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn binding_tells_what_nodes_have_of_it() {
    let cluster = Cluster::start().await;
    let _operator = cluster.operator("a", &[]).await;
    let [mut one, mut two] = cluster.nodes(["n1", "n2"]).await;
    cluster.namespace("shop").await;
    let bindings: Api<ZoneBinding> = cluster.in_account("shop");
    let spec = json!({
        "allocationRef": {"name": "partner"}, "workloads": {"allPods": true}, "zone": {"cidrs": ["0.0.0.0/0"]},
    });
    cluster.binding("shop", "all", spec).await;
    let missing =
        cluster.condition(&bindings, "all", type_::ACCEPTED, "False", "spec.allocationRef.name").await;
    assert_eq!(missing.reason, reason::NOT_FOUND);
    assert!(missing.message.contains("\"partner\""), "{}", missing.message);

    cluster.prefix("leased", "203.0.113.0/28", "shop").await;
    cluster.allocation("shop", "partner", json!({"prefixes": ["leased"]})).await;
    cluster.condition(&bindings, "all", type_::ACCEPTED, "True", "").await;
    cluster.condition(&bindings, "all", type_::PROGRAMMED, "False", "0 of 2 nodes").await;
    let entry = |generation, pods| ProgrammedBinding {
        namespace: "shop".into(),
        name: "all".into(),
        generation,
        pods,
    };
    one.bindings = vec![entry(1, 3)];
    one.report(&cluster).await;
    cluster.condition(&bindings, "all", type_::PROGRAMMED, "False", "1 of 2 nodes").await;
    two.bindings = vec![entry(1, 4)];
    two.report(&cluster).await;
    cluster.condition(&bindings, "all", type_::PROGRAMMED, "True", "2 of 2 nodes").await;
    eventually("seven pods are covered", SOON, async || {
        let pods = bindings.get("all").await.expect("binding").status.unwrap_or_default().pods;
        if pods == 7 { Ok(()) } else { Err(pods) }
    })
    .await;

    // A new generation is not enforced before a node says so.
    let patch = Patch::Merge(json!({"spec": {"zone": {"cidrs": ["198.51.100.0/24"]}}}));
    bindings.patch("all", &PatchParams::default(), &patch).await.expect("patch");
    cluster.condition(&bindings, "all", type_::PROGRAMMED, "False", "0 of 2 nodes").await;
    two.ready = false;
    two.bindings = vec![];
    two.report(&cluster).await;
    one.bindings = vec![entry(2, 3)];
    one.report(&cluster).await;
    cluster
        .condition(&bindings, "all", type_::PROGRAMMED, "True", "n2 (its agent is not ready: no uplink)")
        .await;

    let patch = Patch::Merge(json!({"spec": {"enabled": false}}));
    bindings.patch("all", &PatchParams::default(), &patch).await.expect("patch");
    let off = cluster.condition(&bindings, "all", type_::PROGRAMMED, "False", "spec.enabled").await;
    assert_eq!(off.reason, reason::DISABLED);
}

#[tokio::test(flavor = "multi_thread")]
async fn capacity_low_comes_and_goes() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator("a", &[]).await;
    let mut agent = cluster.node("n1").await;
    cluster.namespace("shop").await;
    cluster.prefix("leased", "203.0.113.0/32", "shop").await;
    let spec = json!({"prefixes": ["leased"], "ports": {"perNode": {"min": 2, "max": 4}}});
    cluster.allocation("shop", "partner", spec).await;
    let allocations: Api<EgressAllocation> = cluster.in_account("shop");
    cluster.condition(&allocations, "partner", type_::CAPACITY_LOW, "False", "").await;

    let demand = |slices, fill_percent, refused| Demand {
        allocation: AllocationRef { namespace: "shop".into(), name: "partner".into() },
        slices,
        fill_percent,
        refused,
        reason: String::new(),
    };
    // A node that asks for more gets it.
    agent.demand = vec![demand(3, 70, 0)];
    agent.report(&cluster).await;
    eventually("three slices", SOON, async || {
        let held = slices(&cluster.addresses_now("shop", "partner").await?[0], HoldingState::Held);
        if held.get("n1") == Some(&3) { Ok(()) } else { Err(format!("{held:?}")) }
    })
    .await;
    agent.demand = vec![demand(4, 85, 0)];
    agent.report(&cluster).await;
    let low =
        cluster.condition(&allocations, "partner", type_::CAPACITY_LOW, "True", "node n1 uses 85 %").await;
    assert_eq!(low.reason, reason::ABOVE_TARGET);
    agent.demand = vec![demand(9, 100, 17)];
    agent.report(&cluster).await;
    let full =
        cluster.condition(&allocations, "partner", type_::CAPACITY_LOW, "True", "refused 10 or more").await;
    assert_eq!(full.reason, reason::EXHAUSTED);
    assert_eq!(full.last_transition_time, low.last_transition_time, "it was true before");
    let metric = r#"aegis_operator_capacity_low{namespace="shop",allocation="partner"}"#;
    eventually("the metric says so", SOON, async || match operator.metric(metric).await {
        Some(1.0) => Ok(()),
        other => Err(other),
    })
    .await;
    agent.demand = vec![demand(4, 20, 0)];
    agent.report(&cluster).await;
    cluster.condition(&allocations, "partner", type_::CAPACITY_LOW, "False", "").await;
    eventually("Events say so", SOON, async || {
        let events = cluster.events("shop", "partner").await;
        let told = |reason: &&str| events.iter().any(|(it, _)| it == reason);
        let reasons = [reason::ABOVE_TARGET, reason::EXHAUSTED, reason::CAPACITY_SUFFICIENT];
        if reasons.iter().all(told) { Ok(()) } else { Err(events) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn within_limits_names_the_pod_and_the_remedy() {
    let cluster = Cluster::start().await;
    let _operator = cluster.operator("a", &[]).await;
    let mut agent = cluster.node("n1").await;
    cluster.namespace("shop").await;
    cluster.prefix("leased", "203.0.113.0/32", "shop").await;
    let spec = json!({"prefixes": ["leased"], "limits": {"perPod": {"flows": 100}}});
    cluster.allocation("shop", "partner", spec).await;
    let allocations: Api<EgressAllocation> = cluster.in_account("shop");
    cluster.condition(&allocations, "partner", type_::WITHIN_LIMITS, "True", "no limit").await;

    agent.limited = vec![Limited {
        allocation: AllocationRef { namespace: "shop".into(), name: "partner".into() },
        pod_flows: 42,
        account_flows: 7,
        pod: "shop/web-0".into(),
        ..Limited::default()
    }];
    agent.report(&cluster).await;
    let words =
        "node n1 refused 40 or more new flows during the last minute, most of them of pod shop/web-0: a pod";
    let met = cluster.condition(&allocations, "partner", type_::WITHIN_LIMITS, "False", words).await;
    assert_eq!(met.reason, reason::POD_FLOWS);
    assert!(met.message.contains("raise spec.limits.perPod.flows"), "{}", met.message);
    agent.limited.clear();
    agent.report(&cluster).await;
    cluster.condition(&allocations, "partner", type_::WITHIN_LIMITS, "True", "no limit").await;
    eventually("Events say so", SOON, async || {
        let events = cluster.events("shop", "partner").await;
        let told = |reason: &&str| events.iter().any(|(it, _)| it == reason);
        if [reason::POD_FLOWS, reason::NOTHING_REFUSED].iter().all(told) { Ok(()) } else { Err(events) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_allocation_drains_before_it_goes() {
    let cluster = Cluster::start().await;
    let _operator = cluster.operator("a", &["--quarantine-seconds=2"]).await;
    let mut agents = cluster.nodes(["n1", "n2"]).await;
    cluster.namespace("shop").await;
    cluster.prefix("leased", "203.0.113.0/28", "shop").await;
    cluster.allocation("shop", "partner", json!({"prefixes": ["leased"]})).await;
    cluster.addresses("shop", "partner", 1).await;

    let allocations: Api<EgressAllocation> = cluster.in_account("shop");
    allocations.delete("partner", &DeleteParams::default()).await.expect("delete");
    cluster.all::<AegisPrefix>().delete("leased", &DeleteParams::default()).await.expect("delete");
    let address = eventually("slices drain", SOON, async || {
        let address = cluster.addresses_now("shop", "partner").await?.pop().ok_or("no address")?;
        let draining = slices(&address, HoldingState::Draining);
        if draining.len() == 2 { Ok(address) } else { Err(format!("{draining:?}")) }
    })
    .await;
    assert!(slices(&address, HoldingState::Held).is_empty());
    cluster.condition(&allocations, "partner", type_::ALLOCATED, "False", "being deleted").await;

    // No node says that its slices are empty: everything stays, for ever if need be.
    agents.iter().for_each(|agent| assert!(!agent.drains));
    for agent in &agents {
        agent.report(&cluster).await;
    }
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    let still = cluster.addresses("shop", "partner", 1).await;
    assert_eq!(still[0].spec, address.spec);

    for agent in &mut agents {
        agent.drains = true;
        agent.report(&cluster).await;
    }
    eventually("slices rest", SOON, async || {
        let address = cluster.addresses_now("shop", "partner").await?.pop().ok_or("no address")?;
        let resting = slices(&address, HoldingState::Quarantined);
        if resting.len() == 2 { Ok(()) } else { Err(format!("{resting:?}")) }
    })
    .await;
    eventually("all of it is gone", SOON, async || {
        let text = |error: kube::Error| error.to_string();
        let address = cluster.all::<EgressAddress>().get_opt("203.0.113.0").await.map_err(text)?.is_some();
        let allocation = allocations.get_opt("partner").await.map_err(text)?.is_some();
        let prefix = cluster.all::<AegisPrefix>().get_opt("leased").await.map_err(text)?.is_some();
        if address || allocation || prefix { Err(format!("{address} {allocation} {prefix}")) } else { Ok(()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slices_of_a_deleted_node_rest() {
    let cluster = Cluster::start().await;
    let _operator = cluster.operator("a", &[]).await;
    cluster.nodes(["n1", "n2"]).await;
    cluster.namespace("shop").await;
    cluster.prefix("leased", "203.0.113.0/28", "shop").await;
    cluster.allocation("shop", "partner", json!({"prefixes": ["leased"]})).await;
    let before = cluster.addresses("shop", "partner", 1).await.remove(0);

    // A report that vanishes says nothing about the node.
    let reports = cluster.all::<aegis_crds::EgressNode>();
    reports.delete("n2", &DeleteParams::default()).await.expect("delete");
    let allocations: Api<EgressAllocation> = cluster.in_account("shop");
    cluster
        .condition(&allocations, "partner", type_::PROGRAMMED, "False", "n2 (its agent has not reported)")
        .await;
    assert_eq!(cluster.addresses("shop", "partner", 1).await[0].spec, before.spec);

    let now = Timestamp::now().as_second();
    cluster.all::<Node>().delete("n2", &DeleteParams::default()).await.expect("delete");
    let after = eventually("the slices rest", SOON, async || {
        let address = cluster.addresses_now("shop", "partner").await?.pop().ok_or("no address")?;
        let resting = slices(&address, HoldingState::Quarantined);
        if resting.get("n2") == Some(&8) { Ok(address) } else { Err(format!("{resting:?}")) }
    })
    .await;
    assert_eq!(slices(&after, HoldingState::Held).get("n1"), Some(&8), "the other node keeps what it has");
    assert!(after.spec.epoch > before.spec.epoch);
    for holding in after.spec.holdings.iter().filter(|it| it.state == HoldingState::Quarantined) {
        let until = holding.until.as_ref().expect("until").0.as_second();
        assert!((now + 120..=now + 150).contains(&until), "{until} is not two minutes after {now}");
    }
}
