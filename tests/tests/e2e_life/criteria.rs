//! Policies by labels of namespaces, by posture, by application and by country, policies that only observe, and what is counted of them.

use std::net::SocketAddrV4;
use std::time::Duration;

use aegis_crds::{EgressApplication, reason, type_};
use aegis_tests::cluster::{Cluster, PATIENCE, wait_for};
use aegis_tests::lab::plan::NODES;
use aegis_tests::mmdb;
use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::json;

use crate::account::Account;
use crate::inside::Inside;
use crate::policies::{Policies, is_refused, leaves};

/// 2026-11-01.
const BUILT: u64 = 1_793_491_200;

/// Waits until new connections are refused.
async fn refused(pod: &Inside, to: SocketAddrV4, what: &str) -> anyhow::Result<()> {
    let limit = Duration::from_secs(5);
    wait_for(what, limit, async || {
        Ok((pod.source(to).await?.err().as_deref() == Some("refused")).then_some(()))
    })
    .await
}

#[tokio::test]
async fn policies_go_by_the_state_of_things() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let account = Account::new(&cluster, "criteria", 4).await?;
    let name = account.namespace.name().to_owned();
    let nodes = cluster.nodes().await?;
    let pod = account.pod_on("judged", &nodes[0], false).await?;
    let (host, origin) = (pod.host(), cluster.origin(0)?.port(0));
    let policies = Policies::of(&account);
    leaves(&pod, origin, host, "nobody says anything").await?;

    let namespaces: Api<Namespace> = Api::all(cluster.client());
    let label = async |value: Option<&str>| {
        let patch = json!({"metadata": {"labels": {"tier": value}}});
        namespaces.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await
    };
    let selector = "namespaceSelector: {matchLabels: {tier: closed}}";
    let status = policies.enforce_matching("tier", 10, selector, "", "action: Deny").await?;
    ensure!(status.pods == 0, "{status:?}");
    leaves(&pod, origin, host, "the namespace has no label").await?;
    label(Some("closed")).await?;
    refused(&pod, origin, "the namespace is labelled").await?;
    label(None).await?;
    leaves(&pod, origin, host, "the label is gone").await?;
    policies.delete("tier").await?;

    let hosts: Api<Node> = Api::all(cluster.client());
    let key = format!("example.com/{name}");
    let attest = async |value: Option<&str>| {
        let patch = json!({"metadata": {"labels": {&key: value}}});
        hosts.patch(&nodes[0], &PatchParams::default(), &Patch::Merge(patch)).await
    };
    let unattested = format!(
        "posture: {{nodeSelector: {{matchExpressions: [{{key: {key}, operator: NotIn, values: ['yes']}}]}}, \
         nodeConditions: [{{type: Ready, status: 'True'}}], podConditions: [{{type: Attested, status: Unknown}}]}}"
    );
    policies.enforce_matching("posture", 10, "", &unattested, "action: Deny").await?;
    is_refused(&pod, origin, "the node is not attested").await?;
    attest(Some("yes")).await?;
    leaves(&pod, origin, host, "the node is attested").await?;
    attest(None).await?;
    refused(&pod, origin, "the node is not attested any more").await?;
    policies.delete("posture").await?;
    leaves(&pod, origin, host, "nobody says anything any more").await?;
    by_application(&account, &policies, &pod).await?;
    account.end().await
}

/// An application is missing, comes, and changes.
async fn by_application(account: &Account, policies: &Policies<'_>, pod: &Inside) -> anyhow::Result<()> {
    let cluster = account.namespace.cluster();
    let (host, origin) = (pod.host(), cluster.origin(0)?);
    let (first, second) = (origin.port(0), origin.port(1));
    let name = policies.name("service");
    let named = format!("destination: {{applications: [{name}]}}");
    policies.enforce_matching("named", 10, "", &named, "egress: {primary: partners}").await?;
    is_refused(pod, first, "nobody knows the application").await?;
    wait_for("the condition", PATIENCE, async || {
        let policy = policies.api.get(&policies.name("named")).await?;
        let conditions = policy.status.context("no status")?.conditions;
        let lacks = |it: &Condition| it.reason == reason::NOT_FOUND && it.message.contains(&name);
        Ok(conditions.iter().any(lacks).then_some(()))
    })
    .await?;
    let applications: Api<EgressApplication> = Api::all(cluster.client());
    let at = async |port: u16| {
        let part = json!({"cidrs": [format!("{}/32", origin.address())], "ports": [{"port": port}]});
        let application = json!({
            "apiVersion": "aegis.dev/v1alpha1", "kind": "EgressApplication", "metadata": {"name": name},
            "spec": {"endpoints": [part]},
        });
        applications.patch(&name, &PatchParams::apply("aegis-tests"), &Patch::Apply(application)).await
    };
    at(first.port()).await?;
    leaves(pod, first, account.address, "it belongs to the application").await?;
    leaves(pod, second, host, "another port does not").await?;
    at(second.port()).await?;
    leaves(pod, second, account.address, "it does now").await?;
    leaves(pod, first, host, "it does not any more").await?;
    policies.delete("named").await?;
    leaves(pod, second, host, "nobody names it any more").await?;
    wait_for("the application to be given up", PATIENCE, async || {
        Ok(applications.delete(&name, &DeleteParams::default()).await.is_ok().then_some(()))
    })
    .await
}

#[tokio::test]
async fn policies_go_by_country_and_some_only_observe() -> anyhow::Result<()> {
    let Some(cluster) = Cluster::connect().await? else { return Ok(()) };
    let Some(lab) = cluster.lab() else { return Ok(()) };
    let account = Account::new(&cluster, "countries", 4).await?;
    let nodes = cluster.nodes().await?;
    let pod = account.pod_on("abroad", &nodes[0], false).await?;
    let (host, near, far) = (pod.host(), cluster.origin(0)?.port(0), cluster.origin(1)?.port(0));
    let policies = Policies::of(&account);

    let known = NODES.iter().all(|node| lab.has_countries(*node));
    let egress = "egress: {primary: partners}";
    let country = "destination: {countries: [NZ]}";
    let status = policies.enforce_matching("country", 20, "", country, egress).await?;
    if !known {
        // It may be there that the pod goes.
        is_refused(&pod, near, "without a database").await?;
        is_refused(&pod, far, "without a database").await?;
        let condition = status.conditions.iter().find(|it| it.type_ == type_::COUNTRIES_KNOWN);
        let condition = condition.context("not judged")?;
        ensure!(
            condition.status == "False" && condition.message.contains("agent.countries"),
            "{condition:?}"
        );
    }
    let at = |origin: SocketAddrV4| format!("{}/32", origin.ip()).parse();
    lab.give_countries(&mmdb::countries(BUILT, &[(at(near)?, "NZ"), (at(far)?, "FR")]))?;
    wait_for("countries", PATIENCE, async || Ok((pod.source(far).await? == Ok(host)).then_some(()))).await?;
    leaves(&pod, near, account.address, "in the country").await?;
    wait_for("the condition", PATIENCE, async || {
        let policy = policies.api.get(&policies.name("country")).await?;
        let conditions = policy.status.context("no status")?.conditions;
        Ok(conditions.iter().any(|it| it.reason == reason::DATABASE_READ).then_some(()))
    })
    .await?;

    // What only observes comes first, and changes nothing.
    let observe = "action: Deny, mode: Observe";
    policies.enforce_matching("trial", 10, "", country, observe).await?;
    let trial = policies.name("trial");
    let before = cluster.agent_metrics(&nodes[0]).await?;
    leaves(&pod, near, account.address, "as if nobody observed").await?;
    leaves(&pod, far, host, "as if nobody observed").await?;
    pod.open("observed", near, 20).await?;
    let labels = [&*format!("policy=\"{trial}\""), "result=\"denied\""];
    let counted = wait_for("what was observed", PATIENCE, async || {
        let now = cluster.agent_metrics(&nodes[0]).await?;
        let counted = now.sum("aegis_policy_observed_flows_total", &labels);
        Ok((counted >= 21.0).then_some(counted))
    })
    .await?;
    ensure!(counted <= 22.0, "{counted} of 21 (or one more, where the first was too early)");
    ensure!(before.sum("aegis_policy_observed_flows_total", &labels) == 0.0);
    wait_for("the status", PATIENCE, async || {
        let policy = policies.api.get(&trial).await?;
        let observed = policy.status.and_then(|status| status.observed);
        Ok(observed.filter(|it| it.flows >= 16 && it.refused == it.flows))
    })
    .await?;

    // Enforced, it refuses, by name.
    policies.enforce_matching("trial", 10, "", country, "action: Deny").await?;
    is_refused(&pod, near, "now it is enforced").await?;
    leaves(&pod, far, host, "elsewhere").await?;
    let denied = [&*format!("name=\"{trial}\""), "result=\"denied\"", "kind=\"policy\""];
    wait_for("what was denied", PATIENCE, async || {
        let now = cluster.agent_metrics(&nodes[0]).await?;
        let denied = now.sum("aegis_rule_flows_total", &denied) >= 1.0;
        Ok((denied && now.packets("refuse_policy") > before.packets("refuse_policy")).then_some(()))
    })
    .await?;
    pod.exchange("observed", 20).await?;
    for name in ["trial", "country"] {
        policies.delete(name).await?;
    }
    account.end().await
}
