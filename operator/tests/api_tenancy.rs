//! Accounts that share a prefix, from delegation to withdrawal and back, against a real API server. The tests play the agents.

#![allow(clippy::expect_used)] // Helpers of tests fail the test.

mod cluster;

use aegis_crds::{
    AegisPrefix, AegisPrefixStatus, Demand, EgressAddress, EgressAllocation, HoldingState, reason, type_,
};
use aegis_crds::{AllocationRef, Condition};
use cluster::objects::{SOON, slices};
use cluster::process::{Process, free_port, log_file};
use cluster::{Cluster, eventually, tool};
use k8s_openapi::api::core::v1::Namespace;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

impl Cluster {
    /// Prefix `leased` of sixteen addresses that account `shop` owns.
    async fn lend(&self, delegations: Value) {
        let object = json!({
            "apiVersion": "aegis.dev/v1alpha1", "kind": "AegisPrefix", "metadata": {"name": "leased"},
            "spec": {"cidr": "203.0.113.0/28", "account": "shop", "delegations": delegations},
        });
        let object: AegisPrefix = serde_json::from_value(object).expect("prefix");
        self.all().create(&PostParams::default(), &object).await.expect("prefix");
    }

    async fn delegate(&self, delegations: Value) {
        let patch = Patch::Merge(json!({"spec": {"delegations": delegations}}));
        self.all::<AegisPrefix>().patch("leased", &PatchParams::default(), &patch).await.expect("delegate");
    }

    async fn label(&self, namespace: &str, team: Value) {
        let patch = Patch::Merge(json!({"metadata": {"labels": {"team": team}}}));
        self.all::<Namespace>().patch(namespace, &PatchParams::default(), &patch).await.expect("label");
    }

    async fn ask(&self, account: &str, count: u32) {
        let patch = Patch::Merge(json!({"spec": {"addresses": {"ipv4": count}}}));
        let api: Api<EgressAllocation> = self.in_account(account);
        api.patch("partner", &PatchParams::default(), &patch).await.expect("ask");
    }

    /// Waits for a condition of `account/partner`.
    async fn told(&self, account: &str, type_: &str, status: &str, part: &str) -> Condition {
        self.condition::<EgressAllocation>(&self.in_account(account), "partner", type_, status, part).await
    }

    async fn lender_told(&self, status: &str, part: &str) -> Condition {
        self.condition::<AegisPrefix>(&self.all(), "leased", type_::DELEGATED, status, part).await
    }

    /// Waits until the prefix's status says that each account has so many addresses.
    async fn used(&self, expected: &[(&str, u32)]) -> AegisPrefixStatus {
        let expected: BTreeMap<&str, u32> = expected.iter().copied().collect();
        eventually("the prefix tells who has what", SOON, async || {
            let status = self.all::<AegisPrefix>().get("leased").await.expect("prefix").status;
            let status = status.ok_or("no status")?;
            let found: BTreeMap<&str, u32> =
                status.accounts.iter().map(|it| (it.account.as_str(), it.used)).collect();
            if found == expected && status.used + status.free == status.addresses {
                Ok(status.clone())
            } else {
                Err(format!("{status:?}"))
            }
        })
        .await
    }
}

fn names(addresses: &[EgressAddress]) -> Vec<String> {
    addresses.iter().map(ResourceExt::name_any).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_withdrawal_takes_nothing_away_both_sides_are_told_and_it_heals() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator("a", &["--quarantine-seconds=1"]).await;
    let mut agent = cluster.node("n1").await;
    for account in ["shop", "bank", "kiosk"] {
        cluster.namespace(account).await;
    }
    cluster.label("kiosk", json!("money")).await;
    let by_name = |max: u32| json!({"name": "bank", "account": "bank", "maxAddresses": max});
    let by_label =
        json!({"name": "money", "namespaceSelector": {"matchLabels": {"team": "money"}}, "maxAddresses": 1});
    cluster.lend(json!([by_name(2), by_label])).await;
    let two = json!({"prefixes": ["leased"], "addresses": {"ipv4": 2}, "ports": {"perNode": {"min": 2}}});
    for account in ["shop", "bank", "kiosk"] {
        cluster.allocation(account, "partner", two.clone()).await;
    }

    // Each has what it may have.
    let had = cluster.addresses("bank", "partner", 2).await;
    cluster.addresses("shop", "partner", 2).await;
    cluster.addresses("kiosk", "partner", 1).await;
    let status = cluster.used(&[("bank", 2), ("kiosk", 1), ("shop", 2)]).await;
    let listed = status.accounts.iter().find(|it| it.account == "bank").expect("bank");
    assert_eq!((listed.delegation.as_deref(), listed.max_addresses), (Some("bank"), Some(2)));
    assert_eq!(listed.allocations[0].name, "partner");
    assert_eq!(listed.allocations[0].addresses, names(&had));
    let limit = cluster.told("kiosk", type_::ALLOCATED, "False", "has 1 of the 1 addresses").await;
    assert_eq!(limit.reason, reason::DELEGATION_LIMIT);
    cluster.told("kiosk", type_::DELEGATED, "True", "1 of at most 1 of AegisPrefix \"leased\"").await;
    cluster.told("shop", type_::DELEGATED, "True", "needs no delegation").await;
    cluster.lender_told("True", "2 accounts have 3 addresses by delegation").await;
    let page = operator.get("/metrics").await.expect("metrics");
    for line in [
        "aegis_operator_addresses{prefix=\"leased\",namespace=\"bank\",right=\"delegated\"} 2",
        "aegis_operator_addresses{prefix=\"leased\",namespace=\"shop\",right=\"owner\"} 2",
        "aegis_operator_prefix_addresses{prefix=\"leased\",state=\"free\"} 11",
    ] {
        assert!(page.contains(line), "{line}: {page}");
    }

    // One is withdrawn, the other loses its label.
    cluster.delegate(json!([by_label])).await;
    let bank =
        cluster.told("bank", type_::DELEGATED, "False", "AegisPrefix \"leased\" is not delegated").await;
    assert_eq!(bank.reason, reason::DELEGATION_WITHDRAWN);
    assert_eq!(cluster.told("bank", type_::ACCEPTED, "False", "").await.reason, reason::DELEGATION_WITHDRAWN);
    cluster.told("bank", type_::ALLOCATED, "True", "2 addresses on 1 node").await;
    cluster.lender_told("False", "account \"bank\" has 2 addresses (bank/partner) where none is").await;
    cluster.label("kiosk", json!("other")).await;
    cluster.told("kiosk", type_::DELEGATED, "False", "not delegated to account \"kiosk\" any more").await;
    cluster.lender_told("False", "account \"kiosk\" has 1 address (kiosk/partner)").await;

    // Nothing new, and full service of what there is: slices grow with demand.
    cluster.ask("bank", 4).await;
    let denied = cluster.told("bank", type_::ALLOCATED, "False", "").await;
    assert_eq!(denied.reason, reason::DELEGATION_WITHDRAWN);
    let allocation = AllocationRef { namespace: "bank".into(), name: "partner".into() };
    agent.demand =
        vec![Demand { allocation, slices: 9, fill_percent: 60, refused: 0, reason: String::new() }];
    agent.report(&cluster).await;
    eventually("its slices grow", SOON, async || {
        let now = cluster.addresses_now("bank", "partner").await?;
        let held: Vec<u32> =
            now.iter().filter_map(|it| slices(it, HoldingState::Held).get("n1").copied()).collect();
        if names(&now) == names(&had) && held == [9, 9] { Ok(()) } else { Err(format!("{held:?}")) }
    })
    .await;

    // An account reads nothing of the others in what is its own.
    for (account, others) in [("bank", ["shop", "kiosk"]), ("kiosk", ["shop", "bank"])] {
        let api: Api<EgressAllocation> = cluster.in_account(account);
        let text = json!(api.get("partner").await.expect("allocation")).to_string();
        assert!(others.iter().all(|other| !text.contains(other)), "{account}: {text}");
        for event in cluster.events(account, "partner").await {
            assert!(others.iter().all(|other| !event.1.contains(other)), "{account}: {event:?}");
        }
    }
    // Nor does anybody who may read the Events of namespace `default`, where those of prefixes are.
    for event in cluster.events("default", "leased").await {
        assert!(!event.1.contains("bank"), "{event:?}");
    }

    // Again, and more.
    cluster.delegate(json!([by_name(4), by_label])).await;
    cluster.label("kiosk", json!("money")).await;
    cluster.addresses("bank", "partner", 4).await;
    cluster.told("bank", type_::DELEGATED, "True", "4 of at most 4").await;
    cluster.told("bank", type_::ACCEPTED, "True", "").await;
    cluster.told("kiosk", type_::DELEGATED, "True", "").await;
    cluster.lender_told("True", "").await;

    // A lower number takes nothing away either; what is given back is not had again.
    cluster.delegate(json!([by_name(1), by_label])).await;
    cluster
        .told("bank", type_::DELEGATED, "False", "has 4 addresses of AegisPrefix \"leased\", of which 1 is")
        .await;
    cluster.lender_told("False", "account \"bank\" has 4 addresses (bank/partner) where 1 is").await;
    cluster.ask("bank", 1).await;
    agent.demand.clear();
    agent.drains = true;
    eventually("three go", SOON, async || {
        agent.report(&cluster).await;
        let left = cluster.addresses_now("bank", "partner").await?.len();
        if left == 1 { Ok(()) } else { Err(left.to_string()) }
    })
    .await;
    cluster.lender_told("True", "").await;
    cluster.told("bank", type_::DELEGATED, "True", "1 of at most 1").await;
    cluster.ask("bank", 2).await;
    let limit = cluster.told("bank", type_::ALLOCATED, "False", "has 1 of the 1 addresses").await;
    assert_eq!(limit.reason, reason::DELEGATION_LIMIT);
    cluster.used(&[("bank", 1), ("kiosk", 1), ("shop", 2)]).await;

    // All is given back.
    for account in ["shop", "bank", "kiosk"] {
        let api: Api<EgressAllocation> = cluster.in_account(account);
        api.delete("partner", &DeleteParams::default()).await.expect("delete");
    }
    eventually("every address comes back", SOON, async || {
        agent.report(&cluster).await;
        let left = cluster.readable_addresses().await.map_err(|error| error.to_string())?;
        if left.is_empty() { Ok(()) } else { Err(format!("{:?}", names(&left))) }
    })
    .await;
    assert_eq!(cluster.used(&[]).await.free, 16);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_goes_while_nobody_looks_gives_its_addresses_back() {
    let cluster = Cluster::start().await;
    let _controller = namespace_controller(&cluster);
    let operator = cluster.operator("a", &["--quarantine-seconds=1"]).await;
    let mut agent = cluster.node("n1").await;
    cluster.namespace("shop").await;
    cluster.namespace("bank").await;
    let team =
        json!({"name": "money", "namespaceSelector": {"matchLabels": {"team": "money"}}, "maxAddresses": 16});
    cluster.label("bank", json!("money")).await;
    cluster.lend(json!([team])).await;
    let spec = json!({"prefixes": ["leased"], "addresses": {"ipv4": 16}});
    cluster.allocation("bank", "partner", spec.clone()).await;
    cluster.addresses("bank", "partner", 16).await;
    agent.report(&cluster).await;

    // The operator is down. The delegation goes, and so does the namespace, as far as it can.
    drop(operator);
    cluster.delegate(json!([])).await;
    let namespaces: Api<Namespace> = cluster.all();
    let before = namespaces.get("bank").await.expect("namespace").uid();
    namespaces.delete("bank", &DeleteParams::default()).await.expect("delete");
    let allocations: Api<EgressAllocation> = cluster.in_account("bank");
    eventually("the allocation is being deleted", SOON, async || {
        let object = allocations.get("partner").await.expect("held by its finalizer");
        object.metadata.deletion_timestamp.map(drop).ok_or("not yet")
    })
    .await;
    assert_eq!(
        cluster.addresses_now("bank", "partner").await.expect("addresses").len(),
        16,
        "nothing is lost"
    );

    let _operator = cluster.operator("b", &["--quarantine-seconds=1"]).await;
    agent.drains = true;
    eventually("the namespace is gone", Duration::from_secs(60), async || {
        agent.report(&cluster).await;
        match namespaces.get_opt("bank").await {
            Ok(None) => Ok(()),
            other => Err(format!("{:?}", other.map(|it| it.and_then(|it| it.status)))),
        }
    })
    .await;
    assert!(cluster.readable_addresses().await.expect("addresses").is_empty());
    assert_eq!(cluster.used(&[]).await.free, 16);

    // One of the same name is another one: without the label it gets nothing, with it all.
    cluster.delegate(json!([team])).await;
    cluster.namespace("bank").await;
    assert_ne!(namespaces.get("bank").await.expect("namespace").uid(), before);
    cluster.allocation("bank", "partner", spec).await;
    let refused = cluster.told("bank", type_::ACCEPTED, "False", "").await;
    assert_eq!(refused.reason, reason::NOT_PERMITTED);
    cluster.label("bank", json!("money")).await;
    cluster.addresses("bank", "partner", 16).await;
    cluster.told("bank", type_::DELEGATED, "True", "16 of at most 16").await;
}

/// What deletes the objects of a namespace that is deleted.
fn namespace_controller(cluster: &Cluster) -> Process {
    let arguments = [
        format!("--kubeconfig={}", cluster.dir.join("admin").display()),
        format!("--cert-dir={}", cluster.dir.display()),
        format!("--secure-port={}", free_port()),
        "--controllers=namespace-controller".into(),
        "--leader-elect=false".into(),
    ];
    Process::spawn(&tool("kube-controller-manager"), &arguments, &[], &log_file(&cluster.dir, "controllers"))
}
