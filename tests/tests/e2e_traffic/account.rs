//! An account with one dedicated address, as every test of traffic needs it.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use aegis_crds::{AegisPrefix, Condition, EgressAddress, EgressAllocation};
use aegis_tests::cluster::{Cluster, Namespace, PATIENCE, Pod, explained, wait_for};
use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::Pod as PodObject;
use kube::api::{Api, DeleteParams, ListParams};

/// Name of the allocation and of the binding.
const PARTNERS: &str = "partners";
/// Last bytes of the addresses of 203.0.113.0/24 that these tests take from.
const CANDIDATES: std::ops::Range<u8> = 32..224;

/// A namespace with a prefix of one address, an allocation of it, and a binding of its pods with the label
/// `egress: dedicated` to the first origin's network.
pub struct Account {
    /// The namespace.
    pub namespace: Namespace,
    /// The egress address.
    pub address: Ipv4Addr,
}

impl Account {
    /// Creates all of it and waits until every node can send. `allocation` is the rest of the allocation's `spec`, in
    /// YAML's flow style: `ports: {perNode: {min: 16}}`.
    pub async fn create(cluster: &Cluster, name: &str, allocation: &str) -> anyhow::Result<Self> {
        let namespace = cluster.namespace(name).await?;
        let address = free_address(cluster).await?;
        let zone = cluster.origin(0)?.address();
        namespace
            .apply(&format!(
                r#"
apiVersion: aegis.dev/v1alpha1
kind: AegisPrefix
metadata: {{name: {account}}}
spec: {{cidr: {address}/32, account: {account}}}
---
apiVersion: aegis.dev/v1alpha1
kind: EgressAllocation
metadata: {{name: {PARTNERS}}}
spec: {{prefixes: [{account}], addresses: {{ipv4: 1}}, {allocation}}}
---
apiVersion: aegis.dev/v1alpha1
kind: ZoneBinding
metadata: {{name: {PARTNERS}}}
spec:
  allocationRef: {{name: {PARTNERS}}}
  workloads: {{podSelector: {{matchLabels: {{egress: dedicated}}}}}}
  zone: {{cidrs: [{zone}/32]}}
"#,
                account = namespace.name()
            ))
            .await?;
        let account = Self { namespace, address };
        let programmed = wait_for("the allocation to be programmed", PATIENCE, async || {
            let condition = account.condition("Programmed").await?;
            Ok(condition.filter(|condition| condition.status == "True"))
        });
        explained(cluster, &[account.namespace.name()], programmed.await).await?;
        Ok(account)
    }

    /// Starts a pod that the binding covers.
    pub async fn pod(&self, name: &str, node: &str) -> anyhow::Result<Pod> {
        let pod = self.namespace.pod(name).on(node).label("egress", "dedicated").start().await?;
        let source = pod.source(self.namespace.cluster().origin(0)?.port(9)).await?;
        ensure!(source == Ok(self.address), "pod {name} on {node}: leaves from {source:?}");
        Ok(pod)
    }

    /// A condition of the allocation.
    pub async fn condition(&self, kind: &str) -> anyhow::Result<Option<Condition>> {
        let allocations: Api<EgressAllocation> = self.namespace.api();
        let status = allocations.get(PARTNERS).await?.status.unwrap_or_default();
        Ok(status.conditions.into_iter().find(|condition| condition.type_ == kind))
    }

    /// Deletes all of it. Waits for the pods, so that the next test's captures have nothing of them, but not for the
    /// address to come to rest (quarantine): the next test takes another.
    pub async fn end(self) -> anyhow::Result<()> {
        let pods: Api<PodObject> = self.namespace.api();
        let everything = ListParams::default();
        pods.delete_collection(&DeleteParams::default().grace_period(0), &everything).await?;
        wait_for("the end of the pods", PATIENCE, async || {
            Ok(pods.list(&everything).await?.items.is_empty().then_some(()))
        })
        .await
    }
}

/// An address that no prefix and no earlier test has.
async fn free_address(cluster: &Cluster) -> anyhow::Result<Ipv4Addr> {
    let prefixes: Api<AegisPrefix> = Api::all(cluster.client());
    let addresses: Api<EgressAddress> = Api::all(cluster.client());
    let everything = ListParams::default();
    let mut taken = BTreeSet::new();
    for prefix in prefixes.list(&everything).await? {
        let range: ipnet::Ipv4Net = prefix.spec.cidr.parse().context("the prefix is no CIDR")?;
        taken.extend(range.network().octets()[3]..=range.broadcast().octets()[3]);
    }
    for address in addresses.list(&everything).await? {
        let address: Ipv4Addr = address.spec.address.parse().context("the egress address is no address")?;
        taken.insert(address.octets()[3]);
    }
    let free = CANDIDATES.into_iter().find(|last| !taken.contains(last));
    Ok(Ipv4Addr::new(203, 0, 113, free.context("every address is taken or at rest")?))
}
