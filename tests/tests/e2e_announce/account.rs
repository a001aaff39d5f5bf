//! An account whose address is announced by BGP.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use aegis_crds::{AegisPrefix, Condition, EgressAllocation, EgressNode, type_};
use aegis_tests::cluster::{Cluster, Namespace, PATIENCE, Pod, wait_for};
use aegis_tests::lab::plan::{NODES, Node};
use aegis_tests::lab::{Lab, Undo};
use anyhow::{Context, ensure};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use serde_json::{Value, json};

/// Flows that each pod of [`Account::flows`] holds.
pub const HELD: usize = 200;

/// A namespace with an address of its own, and routing daemons for as long as it lives.
pub struct Account<'a> {
    pub lab: &'a Lab,
    pub cluster: &'a Cluster,
    pub namespace: Namespace,
    pub address: Ipv4Addr,
    _routing: Undo<'a>,
}

impl<'a> Account<'a> {
    /// Returns once the router has all nodes as next hops.
    pub async fn create(cluster: &'a Cluster, lab: &'a Lab, name: &str) -> anyhow::Result<Self> {
        let namespace = cluster.namespace(name).await?;
        let address = free_address(cluster).await?;
        namespace
            .apply(&format!(
                r#"
apiVersion: aegis.dev/v1alpha1
kind: AegisPrefix
metadata: {{name: {account}}}
spec: {{cidr: {address}/32, account: {account}, announcement: {{mode: BGP}}}}
---
apiVersion: aegis.dev/v1alpha1
kind: EgressAllocation
metadata: {{name: partners}}
spec:
  prefixes: [{account}]
  addresses: {{ipv4: 1}}
  ports: {{perNode: {{min: 8}}}}
  timeouts: {{tcpEstablishedSeconds: 600, tcpTransitorySeconds: 30, tcpClosedSeconds: 2, udpSeconds: 30, restSeconds: 5}}
---
apiVersion: aegis.dev/v1alpha1
kind: ZoneBinding
metadata: {{name: partners}}
spec:
  allocationRef: {{name: partners}}
  workloads: {{podSelector: {{matchLabels: {{egress: dedicated}}}}}}
  zone: {{cidrs: [{zone}/32]}}
"#,
                account = namespace.name(),
                zone = cluster.origin(0)?.address(),
            ))
            .await?;
        let routing = lab.routing()?;
        let account = Self { lab, cluster, namespace, address, _routing: routing };
        let allocations: Api<EgressAllocation> = account.namespace.api();
        wait_for("the allocation to be programmed", PATIENCE, async || {
            let status = allocations.get("partners").await?.status.unwrap_or_default();
            let programmed =
                status.conditions.iter().any(|it| it.type_ == type_::PROGRAMMED && it.status == "True");
            Ok(programmed.then_some(()))
        })
        .await?;
        account.hops(&NODES).await?;
        Ok(account)
    }

    /// Waits until the router sends to exactly these nodes; returns how long that took.
    pub async fn hops(&self, nodes: &[Node]) -> anyhow::Result<Duration> {
        let begin = std::time::Instant::now();
        let wanted: Vec<Ipv4Addr> = nodes.iter().map(|node| node.address()).collect();
        let mut last = Vec::new();
        wait_for("the next hops", PATIENCE, async || {
            last = self.lab.next_hops(self.address)?;
            Ok((last == wanted).then_some(()))
        })
        .await
        .with_context(|| format!("next hops of {}: wanted {wanted:?}", self.address))?;
        Ok(begin.elapsed())
    }

    /// A bound pod on each of these nodes that holds [`HELD`] flows and opens new ones without end.
    pub async fn flows(&self, nodes: &[Node]) -> anyhow::Result<Vec<Pod>> {
        let origin = self.cluster.origin(0)?;
        let mut pods = Vec::new();
        for node in nodes {
            let name = node.name();
            let pod = self
                .namespace
                .pod(&format!("live-{name}"))
                .on(&name)
                .label("egress", "dedicated")
                .start()
                .await?;
            wait_for("the dedicated source", PATIENCE, async || {
                Ok((pod.source(origin.port(0)).await? == Ok(self.address)).then_some(()))
            })
            .await?;
            pod.open("held", origin.port(0), HELD).await?;
            let churn =
                json!({"do": "churn", "name": "new", "to": origin.port(1), "parallel": 2, "pause_ms": 10});
            pod.call(churn).await?;
            pods.push(pod);
        }
        Ok(pods)
    }

    /// The routes of the address in a node's kernel.
    pub fn routes(&self, node: Node) -> anyhow::Result<String> {
        let words =
            ["route", "show", "table", "all", "exact", &format!("{}/32", self.address), "proto", "174"];
        self.lab.exec(node, "ip", &words)
    }

    /// Says how the address is to be announced.
    pub async fn announce(&self, mode: &str) -> anyhow::Result<()> {
        let prefixes: Api<AegisPrefix> = Api::all(self.cluster.client());
        let patch = json!({"spec": {"announcement": {"mode": mode}}});
        prefixes.patch(self.namespace.name(), &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    /// Waits for the condition `Announced` of a node, with this status and reason, and a message that contains this.
    pub async fn announced(
        &self,
        node: Node,
        status: &str,
        reason: &str,
        message: &str,
    ) -> anyhow::Result<()> {
        let nodes: Api<EgressNode> = Api::all(self.cluster.client());
        let mut last: Option<Condition> = None;
        let found = wait_for("the condition Announced", PATIENCE, async || {
            let conditions = nodes.get(&node.name()).await?.status.unwrap_or_default().conditions;
            last = conditions.into_iter().find(|it| it.type_ == type_::ANNOUNCED);
            let matches =
                |it: &Condition| it.status == status && it.reason == reason && it.message.contains(message);
            Ok(last.as_ref().is_some_and(matches).then_some(()))
        })
        .await;
        found
            .with_context(|| format!("{}: wanted {status} {reason} {message:?}, it is {last:?}", node.name()))
    }

    /// Ends the pods; what else there is goes by itself.
    pub async fn end(self) -> anyhow::Result<()> {
        let pods: Api<k8s_openapi::api::core::v1::Pod> = self.namespace.api();
        pods.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
        wait_for("the end of the pods", PATIENCE, async || {
            Ok(pods.list(&ListParams::default()).await?.items.is_empty().then_some(()))
        })
        .await
    }
}

/// Every held flow still answers.
pub async fn unbroken(pods: &[Pod]) -> anyhow::Result<()> {
    for pod in pods {
        pod.exchange("held", HELD).await.with_context(|| format!("flows of {}", pod.node()))?;
    }
    Ok(())
}

/// Ends the new flows, none of which may have failed; returns how many there were.
pub async fn none_failed(pods: &[Pod]) -> anyhow::Result<u64> {
    let mut count = 0;
    for pod in pods {
        let end: Value = pod.call(json!({"do": "stop", "name": "new"})).await?;
        ensure!(end["failed"] == json!({}), "{}: new connections failed: {end}", pod.name());
        count +=
            end["answered"].as_u64().filter(|count| *count > 0).with_context(|| format!("none: {end}"))?;
    }
    Ok(count)
}

/// An address that no prefix has.
async fn free_address(cluster: &Cluster) -> anyhow::Result<Ipv4Addr> {
    let prefixes: Api<AegisPrefix> = Api::all(cluster.client());
    let listed = prefixes.list(&ListParams::default()).await?;
    let taken: BTreeSet<String> = listed.items.into_iter().map(|prefix| prefix.spec.cidr).collect();
    let mut pool = (224..240).map(|last| Ipv4Addr::new(203, 0, 113, last));
    pool.find(|address| !taken.contains(&format!("{address}/32"))).context("no address is free")
}
