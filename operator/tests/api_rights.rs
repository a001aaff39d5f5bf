//! The rights that the chart gives the operator are enough, and nobody else may write what is the operator's.

#![allow(clippy::expect_used)] // Helpers of tests fail the test.

mod cluster;

use aegis_crds::{AegisPrefix, EgressAddress, EgressAllocation, HoldingState, type_};
use cluster::objects::{SOON, slices};
use cluster::rights::{NAMESPACE, install_rights};
use cluster::{Cluster, eventually};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kube::{Client, Config, ResourceExt};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn chart_gives_the_operator_what_it_needs() {
    let cluster = Cluster::start().await;
    cluster.namespace(NAMESPACE).await;
    install_rights(&cluster).await;
    let arguments = ["--quarantine-seconds=1"];
    let operator = cluster.operator_as("operator", NAMESPACE, "a", &arguments).await;
    operator.leads().await;
    let mut agent = cluster.node("n1").await;
    cluster.namespace("shop").await;
    cluster.prefix("leased", "203.0.113.0/28", "shop").await;
    let zone = json!({"allocationRef": {"name": "partner"}, "workloads": {"allPods": true}, "zone": {"cidrs": ["0.0.0.0/0"]}});
    cluster.binding("shop", "all", zone).await;
    cluster.allocation("shop", "partner", json!({"prefixes": ["leased"]})).await;
    let address = cluster.addresses("shop", "partner", 1).await.remove(0);
    cluster.programmed(&[&agent], "shop", "partner").await;
    let allocations: Api<EgressAllocation> = cluster.in_account("shop");
    cluster
        .condition::<EgressAddress>(&cluster.all(), &address.name_any(), type_::PROGRAMMED, "True", "")
        .await;
    cluster.condition::<AegisPrefix>(&cluster.all(), "leased", type_::ACCEPTED, "True", "").await;
    eventually("an Event tells of it", SOON, async || {
        let events = cluster.events("shop", "partner").await;
        if events.is_empty() { Err(()) } else { Ok(()) }
    })
    .await;

    // A user with every right in RBAC is refused by the policy.
    let mut config = config(&cluster).await;
    config.auth_info = impersonate("cluster-owner");
    let stranger = Client::try_from(config).expect("client");
    let grant = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "owner"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "cluster-owner"}],
    });
    let grant: k8s_openapi::api::rbac::v1::ClusterRoleBinding =
        serde_json::from_value(grant).expect("binding");
    Api::all(cluster.client.clone()).create(&PostParams::default(), &grant).await.expect("binding");
    let addresses: Api<EgressAddress> = Api::all(stranger);
    eventually("the grant counts", SOON, async || addresses.list(&ListParams::default()).await).await;
    let refused = addresses.delete(&address.name_any(), &DeleteParams::default()).await.expect_err("refused");
    assert!(refused.to_string().contains("written by the operator only"), "{refused}");

    // A node that is gone is asked for before its slices go to others.
    cluster.node("n2").await;
    let held = async || {
        let address = cluster.addresses_now("shop", "partner").await?.pop().ok_or("no address")?;
        Ok::<_, String>(slices(&address, HoldingState::Held).contains_key("n2"))
    };
    let waits = async |expected| match held().await? {
        held if held == expected => Ok(()),
        held => Err(format!("held: {held}")),
    };
    eventually("n2 gets slices", SOON, async || waits(true).await).await;
    cluster.all::<Node>().delete("n2", &DeleteParams::default()).await.expect("delete");
    eventually("n2 loses them", SOON, async || waits(false).await).await;

    allocations.delete("partner", &DeleteParams::default()).await.expect("delete");
    agent.drains = true;
    eventually("it drains and goes", SOON, async || {
        agent.report(&cluster).await;
        match allocations.get_opt("partner").await {
            Ok(None) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let page = operator.get("/metrics").await.expect("metrics");
    assert!(!page.contains("aegis_operator_api_errors_total{"), "{page}");
    let log = std::fs::read_to_string(cluster.dir.join("a.log")).expect("log");
    assert!(!log.contains("orbidden"), "{log}");
}

async fn config(cluster: &Cluster) -> Config {
    let kubeconfig = kube::config::Kubeconfig::read_from(cluster.dir.join("admin")).expect("kubeconfig");
    Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await.expect("config")
}

fn impersonate(user: &str) -> kube::config::AuthInfo {
    let fields = json!({"token": "admin", "as": user});
    serde_json::from_value(fields).expect("user")
}
