//! One account with one address, as most tests need it.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use aegis_crds::{AegisPrefix, EgressAddress, EgressAllocation, ZoneBinding, type_};
use aegis_tests::cluster::{Cluster, Namespace, PATIENCE, explained, wait_for};
use aegis_tests::lab::capture::{Capture, Report};
use aegis_tests::lab::plan::NODES;
use anyhow::{Context, ensure};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{Api, DeleteParams, ListParams};
use serde_json::Value;

use crate::inside::Inside;

/// What a change of an object may take until new connections follow it.
pub const PROMPT: Duration = Duration::from_secs(1);
/// In the lab, the range of the first origin, which every binding here covers.
pub const ZONE: &str = "198.51.100.0/24";
/// Label of the pods that [`Account::bind`] binds.
pub const BOUND: (&str, &str) = ("egress", "dedicated");

/// A namespace with a prefix of one address and an allocation of it, both named `partners`.
pub struct Account {
    pub namespace: Namespace,
    pub address: Ipv4Addr,
    /// What [`Account::bind`] covers: the first origin.
    pub zone: String,
}

impl Account {
    /// Without a binding; every node holds `slices` slices when it returns.
    pub async fn new(cluster: &Cluster, name: &str, slices: u32) -> anyhow::Result<Self> {
        Self::with(cluster, name, slices, "").await
    }

    /// The same with further fields of the allocation's specification: every node that may hold slices does.
    pub async fn with(cluster: &Cluster, name: &str, slices: u32, more: &str) -> anyhow::Result<Self> {
        Self::with_ports(cluster, name, &format!("perNode: {{min: {slices}}}"), more).await
    }

    /// The same with `spec.ports`.
    pub async fn with_ports(cluster: &Cluster, name: &str, ports: &str, more: &str) -> anyhow::Result<Self> {
        let namespace = cluster.namespace(name).await?;
        let name = namespace.name().to_owned();
        let cidr = format!("{}/32", free_address(cluster).await?);
        namespace.apply(&prefix(&name, &cidr, &name)).await?;
        Self::on_prefix(namespace, &name, ports, more).await
    }

    /// The same in a namespace that may leave from a prefix, with whichever address of that it gets.
    pub async fn on_prefix(
        namespace: Namespace,
        prefix: &str,
        ports: &str,
        more: &str,
    ) -> anyhow::Result<Self> {
        // Short times, so that the address is soon free again once its pods are gone.
        let spec = format!(
            "{{prefixes: [{prefix}], addresses: {{ipv4: 1}}, ports: {{{ports}}}, \
             timeouts: {{tcpEstablishedSeconds: 600, tcpTransitorySeconds: 30, tcpClosedSeconds: 2, udpSeconds: 30, restSeconds: 5}}, {more}}}"
        );
        let zone = format!("{}/32", namespace.cluster().origin(0)?.address());
        let mut account = Self { namespace, address: Ipv4Addr::UNSPECIFIED, zone };
        account.namespace.apply(&allocation("partners", &spec)).await?;
        account.programmed_allocation().await?;
        let status = account.allocations().get("partners").await?.status.unwrap_or_default();
        account.address = status.addresses.first().context("it has no address")?.address.parse()?;
        Ok(account)
    }

    /// Applies the binding `partners`: pods with the label [`BOUND`], towards the first origin.
    pub async fn bind(&self) -> anyhow::Result<()> {
        self.apply_binding(&format!("{}: {}", BOUND.0, BOUND.1), &self.zone, "").await
    }

    /// The same, and waits until every node enforces it.
    pub async fn bind_and_wait(&self) -> anyhow::Result<()> {
        self.bind().await?;
        self.programmed_binding().await
    }

    /// The binding `partners` with other labels, ranges and further fields of the specification (`"enabled: false"`).
    pub async fn apply_binding(&self, labels: &str, cidrs: &str, more: &str) -> anyhow::Result<()> {
        self.apply_binding_with(
            &format!("podSelector: {{matchLabels: {{{labels}}}}}"),
            &format!("cidrs: [{cidrs}]"),
            more,
        )
        .await
    }

    /// The binding `partners` with these workloads and this zone.
    pub async fn apply_binding_with(&self, workloads: &str, zone: &str, more: &str) -> anyhow::Result<()> {
        let binding = format!(
            "apiVersion: aegis.dev/v1alpha1\n\
             kind: ZoneBinding\n\
             metadata: {{name: partners}}\n\
             spec:\n  allocationRef: {{name: partners}}\n  workloads: {{{workloads}}}\n  zone: {{{zone}}}\n  {more}\n"
        );
        self.namespace.apply(&binding).await.map(drop)
    }

    /// Ends the pods and waits for that, so that their last packets are not taken for another test's. What else there
    /// is goes by itself.
    pub async fn end(self) -> anyhow::Result<()> {
        let pods: Api<Pod> = self.namespace.api();
        pods.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
        wait_for("the end of the pods", PATIENCE, async || {
            Ok(pods.list(&ListParams::default()).await?.items.is_empty().then_some(()))
        })
        .await
    }

    pub fn bindings(&self) -> Api<ZoneBinding> {
        self.namespace.api()
    }

    pub fn allocations(&self) -> Api<EgressAllocation> {
        self.namespace.api()
    }

    /// The object with the address's holdings, if there is one.
    pub async fn egress_address(&self) -> anyhow::Result<Option<EgressAddress>> {
        let addresses: Api<EgressAddress> = Api::all(self.namespace.cluster().client());
        Ok(addresses.get_opt(&self.address.to_string()).await?)
    }

    /// Who holds which slices of the address, and its epoch.
    pub async fn holdings(&self) -> anyhow::Result<Value> {
        let object = self.egress_address().await?.context("the address has no object")?;
        Ok(serde_json::to_value(object.spec)?)
    }

    /// Waits until every node enforces the binding as it is.
    pub async fn programmed_binding(&self) -> anyhow::Result<()> {
        let bindings = self.bindings();
        let programmed = wait_for("the binding to be programmed", PATIENCE, async || {
            let binding = bindings.get("partners").await?;
            let conditions = binding.status.map(|status| status.conditions).unwrap_or_default();
            Ok(holds(&conditions, type_::PROGRAMMED, binding.metadata.generation).then_some(()))
        });
        explained(self.namespace.cluster(), &[self.namespace.name()], programmed.await).await
    }

    /// Waits until every node has its slices.
    pub async fn programmed_allocation(&self) -> anyhow::Result<()> {
        let allocations = self.allocations();
        let programmed = wait_for("the allocation to be programmed", PATIENCE, async || {
            let allocation = allocations.get("partners").await?;
            let generation = allocation.metadata.generation;
            let conditions = allocation.status.map(|status| status.conditions).unwrap_or_default();
            let all = [type_::ALLOCATED, type_::PROGRAMMED];
            Ok(all.iter().all(|type_| holds(&conditions, type_, generation)).then_some(()))
        });
        explained(self.namespace.cluster(), &[self.namespace.name()], programmed.await).await
    }

    /// Waits until the account is told this of its right to the prefix.
    pub async fn told_of_its_right(&self, status: &str, reason: &str) -> anyhow::Result<()> {
        let allocations = self.allocations();
        wait_for("the account to be told", PATIENCE, async || {
            let found = allocations.get("partners").await?.status.unwrap_or_default().conditions;
            let found = found.iter().find(|it| it.type_ == type_::DELEGATED);
            Ok(found.filter(|it| it.status == status && it.reason == reason).map(drop))
        })
        .await
    }

    /// A bound pod on each node, to be talked to without the API server.
    pub async fn pods_on_all_nodes(&self, name: &str) -> anyhow::Result<Vec<Inside>> {
        futures::future::try_join_all(NODES.map(async |node| self.pod_on(name, &node.name(), true).await))
            .await
    }

    /// A pod on a node, bound or not.
    pub async fn pod_on(&self, name: &str, node: &str, bound: bool) -> anyhow::Result<Inside> {
        let builder = self.namespace.pod(&format!("{name}-{node}")).on(node);
        let builder = if bound { builder.label(BOUND.0, BOUND.1) } else { builder };
        Inside::of(self.namespace.cluster(), builder.start().await?)
    }
}

/// An `AegisPrefix`.
pub fn prefix(name: &str, cidr: &str, account: &str) -> String {
    format!(
        "apiVersion: aegis.dev/v1alpha1\nkind: AegisPrefix\nmetadata: {{name: {name}}}\n\
         spec: {{cidr: {cidr}, account: {account}}}\n"
    )
}

/// An `EgressAllocation`.
pub fn allocation(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: aegis.dev/v1alpha1\nkind: EgressAllocation\nmetadata: {{name: {name}}}\nspec: {spec}\n"
    )
}

/// An address that no prefix has: what failed before may still drain.
pub async fn free_address(cluster: &Cluster) -> anyhow::Result<Ipv4Addr> {
    free_range(cluster, 1).await
}

/// The first of two of which no prefix has any, a /31.
pub async fn free_pair(cluster: &Cluster) -> anyhow::Result<Ipv4Addr> {
    free_range(cluster, 2).await
}

async fn free_range(cluster: &Cluster, size: u8) -> anyhow::Result<Ipv4Addr> {
    let prefixes: Api<AegisPrefix> = Api::all(cluster.client());
    let all = prefixes.list(&ListParams::default()).await?.items;
    let taken: Vec<IpNet> = all.iter().filter_map(|prefix| prefix.spec.cidr.parse().ok()).collect();
    let address = |last| Ipv4Addr::new(203, 0, 113, last);
    let is_free = |last| !taken.iter().any(|range| range.contains(&IpAddr::from(address(last))));
    let mut pool = (64..128u8).step_by(size.into());
    let first = pool.find(|first| (*first..first + size).all(is_free)).context("no address is free")?;
    Ok(address(first))
}

/// Whether a condition is true and about the present generation.
pub fn holds(conditions: &[Condition], type_: &str, generation: Option<i64>) -> bool {
    conditions
        .iter()
        .any(|it| it.type_ == type_ && it.status == "True" && it.observed_generation == generation)
}

/// Fails if the recorder saw anything but the egress address towards the recorded destinations.
pub fn only(capture: &mut Capture, address: Ipv4Addr) -> anyhow::Result<Report> {
    let report = capture.report()?;
    ensure!(report.is_only(address), "not only {address} on the wire: {:#?}", report.sources);
    ensure!(report.shared == 0, "5-tuples from two nodes: {:?}", report.shared_flows);
    Ok(report)
}
