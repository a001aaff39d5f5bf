//! An account whose addresses, one of IPv4 and a /64, are announced by BGP.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use aegis_crds::{
    AegisPrefix, Condition, EgressAddress, EgressAllocation, EgressNode, HoldingState, ZoneBinding, type_,
};
use aegis_tests::cluster::{Cluster, Namespace, PATIENCE, Pod, explained, wait_for};
use aegis_tests::lab::plan::{NODES, Node};
use aegis_tests::lab::{Lab, Undo, routing};
use anyhow::{Context, ensure};
use ipnet::{IpNet, Ipv6Net};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use serde_json::{Value, json};

/// Flows that each pod of [`Account::flows`] holds.
pub const HELD: usize = 200;

/// The same over IPv6.
const HELD6: usize = 20;

/// A namespace with addresses of its own, and routing daemons for as long as it lives.
pub struct Account<'a> {
    pub lab: &'a Lab,
    pub cluster: &'a Cluster,
    pub namespace: Namespace,
    pub address: Ipv4Addr,
    pub network: Ipv6Net,
    _routing: Undo<'a>,
}

impl<'a> Account<'a> {
    /// Returns once the router has all nodes as next hops.
    pub async fn create(cluster: &'a Cluster, lab: &'a Lab, name: &str) -> anyhow::Result<Self> {
        Self::watched(cluster, lab, name, routing::PATIENT).await
    }

    /// The same with BFD that takes a node for lost after so many packets that are missing.
    pub async fn watched(
        cluster: &'a Cluster,
        lab: &'a Lab,
        name: &str,
        multiplier: u8,
    ) -> anyhow::Result<Self> {
        let namespace = cluster.namespace(name).await?;
        let (address, network) = free_ranges(cluster).await?;
        namespace
            .apply(&format!(
                r#"
apiVersion: aegis.dev/v1alpha1
kind: AegisPrefix
metadata: {{name: {account}}}
spec: {{cidr: {address}/32, account: {account}, announcement: {{mode: BGP}}}}
---
apiVersion: aegis.dev/v1alpha1
kind: AegisPrefix
metadata: {{name: {account}-six}}
spec: {{cidr: '{network}', account: {account}, announcement: {{mode: BGP}}}}
---
apiVersion: aegis.dev/v1alpha1
kind: EgressAllocation
metadata: {{name: partners}}
spec:
  prefixes: [{account}, {account}-six]
  addresses: {{ipv4: 1, ipv6: 1}}
  ports: {{perNode: {{min: 8}}}}
  timeouts: {{tcpEstablishedSeconds: 600, tcpTransitorySeconds: 30, tcpClosedSeconds: 2, udpSeconds: 30, restSeconds: 5}}
---
apiVersion: aegis.dev/v1alpha1
kind: ZoneBinding
metadata: {{name: partners}}
spec:
  allocationRef: {{name: partners}}
  workloads: {{podSelector: {{matchLabels: {{egress: dedicated}}}}}}
  zone: {{cidrs: [{zone}/32, '{zone6}/128']}}
"#,
                account = namespace.name(),
                zone = cluster.origin(0)?.address(),
                zone6 = cluster.origin(0)?.port6(0)?.ip(),
            ))
            .await?;
        let routing = lab.routing(multiplier)?;
        let account = Self { lab, cluster, namespace, address, network, _routing: routing };
        let allocations: Api<EgressAllocation> = account.namespace.api();
        let programmed = wait_for("the allocation to be programmed", PATIENCE, async || {
            let status = allocations.get("partners").await?.status.unwrap_or_default();
            let programmed =
                status.conditions.iter().any(|it| it.type_ == type_::PROGRAMMED && it.status == "True");
            Ok(programmed.then_some(()))
        });
        explained(cluster, &[account.namespace.name()], programmed.await).await?;
        let bindings: Api<ZoneBinding> = account.namespace.api();
        let programmed = wait_for(
            "the binding to be programmed, and each node to hold a part of the /64",
            PATIENCE,
            async || {
                let status = bindings.get("partners").await?.status.unwrap_or_default();
                let programmed =
                    status.conditions.iter().any(|it| it.type_ == type_::PROGRAMMED && it.status == "True");
                Ok((programmed && account.slices().await?.len() == NODES.len()).then_some(()))
            },
        );
        explained(cluster, &[account.namespace.name()], programmed.await).await?;
        account.hops(&NODES).await?;
        Ok(account)
    }

    /// Waits until the router sends to exactly these nodes, and what is for one of them alone to that one; returns how long that
    /// took.
    pub async fn hops(&self, nodes: &[Node]) -> anyhow::Result<Duration> {
        let begin = std::time::Instant::now();
        let v4: Vec<IpAddr> = nodes.iter().map(|node| node.address().into()).collect();
        let v6: Vec<IpAddr> = nodes.iter().map(|node| node.address6().into()).collect();
        let mut wanted = vec![(IpNet::from(IpAddr::V4(self.address)), v4), (self.network.into(), v6)];
        for (node, slice) in self.slices().await? {
            let on = nodes.contains(&node).then_some(IpAddr::V6(node.address6()));
            wanted.push((slice.into(), on.into_iter().collect()));
        }
        let mut last = Vec::new();
        wait_for("the next hops", PATIENCE, async || {
            last.clear();
            for (destination, _) in &wanted {
                last.push((*destination, self.lab.next_hops(*destination)?));
            }
            Ok((last == wanted).then_some(()))
        })
        .await
        .with_context(|| {
            let tells = self.lab.router_tells();
            format!("next hops: wanted {wanted:?}, they are {last:?}\n{tells}")
        })?;
        Ok(begin.elapsed())
    }

    /// The part of the /64 that each node holds.
    async fn slices(&self) -> anyhow::Result<Vec<(Node, Ipv6Net)>> {
        let addresses: Api<EgressAddress> = Api::all(self.cluster.client());
        let objects = addresses.list(&ListParams::default()).await?.items;
        let object = objects.into_iter().find(|object| object.spec.address == self.network.to_string());
        let holdings = object.context("the /64 has no object")?.spec.holdings;
        let mut slices = Vec::new();
        for holding in holdings.iter().filter(|holding| holding.state == HoldingState::Held) {
            let node =
                NODES.into_iter().find(|node| node.name() == holding.node).context("a strange node")?;
            let bits = self.network.addr().to_bits() | u128::from(u16::try_from(holding.first)?) << 48;
            slices.push((node, Ipv6Net::new(Ipv6Addr::from_bits(bits), 80)?));
        }
        Ok(slices)
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
            pod.open("held-six", origin.port6(0)?, HELD6).await?;
            let churn =
                json!({"do": "churn", "name": "new", "to": origin.port(1), "parallel": 2, "pause_ms": 10});
            pod.call(churn).await?;
            pods.push(pod);
        }
        Ok(pods)
    }

    /// The routes of the addresses in a node's kernel.
    pub fn routes(&self, node: Node) -> anyhow::Result<String> {
        let routes = |family: &str, root: String| {
            let words = [family, "route", "show", "table", "all", "root", &root, "proto", "174"];
            self.lab.exec(node, "ip", &words)
        };
        Ok(routes("-4", format!("{}/32", self.address))? + &routes("-6", self.network.to_string())?)
    }

    /// Says how the addresses are to be announced.
    pub async fn announce(&self, mode: &str) -> anyhow::Result<()> {
        let prefixes: Api<AegisPrefix> = Api::all(self.cluster.client());
        let patch = json!({"spec": {"announcement": {"mode": mode}}});
        for name in [self.namespace.name().to_owned(), format!("{}-six", self.namespace.name())] {
            prefixes.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
        }
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
        let six = pod.exchange("held-six", HELD6).await;
        six.with_context(|| format!("IPv6 flows of {}", pod.node()))?;
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

/// An address and a /64 that no prefix has.
async fn free_ranges(cluster: &Cluster) -> anyhow::Result<(Ipv4Addr, Ipv6Net)> {
    let prefixes: Api<AegisPrefix> = Api::all(cluster.client());
    let listed = prefixes.list(&ListParams::default()).await?;
    let taken: BTreeSet<String> = listed.items.into_iter().map(|prefix| prefix.spec.cidr).collect();
    let mut pool = (224..240).map(|last| Ipv4Addr::new(203, 0, 113, last));
    let address = pool.find(|address| !taken.contains(&format!("{address}/32")));
    let mut pool = (224..240).map(|last| Ipv6Addr::new(0x2001, 0xdb8, 0x203, last, 0, 0, 0, 0));
    let network = pool.find(|first| !taken.contains(&format!("{first}/64")));
    Ok((address.context("no address is free")?, Ipv6Net::new(network.context("no /64 is free")?, 64)?))
}
