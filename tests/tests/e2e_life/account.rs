//! One account with one address, as most tests need it.

use std::net::Ipv4Addr;
use std::time::Duration;

use aegis_crds::{EgressAddress, EgressAllocation, ZoneBinding, type_};
use aegis_tests::cluster::{Cluster, Namespace, Origin, PATIENCE, wait_for};
use aegis_tests::lab::capture::{Capture, Report};
use aegis_tests::lab::plan::{NODES, Node};
use anyhow::ensure;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::Api;

use crate::inside::Inside;

/// What a change of an object may take until new connections follow it.
pub const PROMPT: Duration = Duration::from_secs(1);
/// The range of the first origin, which every binding here covers.
pub const ZONE: &str = "198.51.100.0/24";
/// Label of the pods that [`Account::bind`] binds.
pub const BOUND: (&str, &str) = ("egress", "dedicated");

/// A namespace with a prefix of one address and an allocation of it, both named `partners`.
pub struct Account {
    pub namespace: Namespace,
    pub address: Ipv4Addr,
}

impl Account {
    /// Without a binding; every node holds `slices` slices when it returns.
    pub async fn new(cluster: &Cluster, name: &str, address: Ipv4Addr, slices: u32) -> anyhow::Result<Self> {
        let namespace = cluster.namespace(name).await?;
        namespace
            .apply(&format!(
                "apiVersion: aegis.dev/v1alpha1\n\
                 kind: AegisPrefix\n\
                 metadata: {{name: {name}}}\n\
                 spec: {{cidr: {address}/32, account: {name}}}\n\
                 ---\n\
                 apiVersion: aegis.dev/v1alpha1\n\
                 kind: EgressAllocation\n\
                 metadata: {{name: partners}}\n\
                 spec: {{prefixes: [{name}], addresses: {{ipv4: 1}}, ports: {{perNode: {{min: {slices}}}}}}}\n",
                name = namespace.name()
            ))
            .await?;
        let account = Self { namespace, address };
        account.programmed_allocation().await?;
        Ok(account)
    }

    /// Applies the binding `partners`: pods with the label [`BOUND`], towards [`ZONE`].
    pub async fn bind(&self) -> anyhow::Result<()> {
        self.apply_binding(&format!("{}: {}", BOUND.0, BOUND.1), ZONE, "").await
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

    /// Waits until every node enforces the binding as it is.
    pub async fn programmed_binding(&self) -> anyhow::Result<()> {
        let bindings = self.bindings();
        wait_for("the binding to be programmed", PATIENCE, async || {
            let binding = bindings.get("partners").await?;
            let conditions = binding.status.map(|status| status.conditions).unwrap_or_default();
            Ok(holds(&conditions, type_::PROGRAMMED, binding.metadata.generation).then_some(()))
        })
        .await
    }

    /// Waits until every node has its slices.
    pub async fn programmed_allocation(&self) -> anyhow::Result<()> {
        let allocations = self.allocations();
        wait_for("the allocation to be programmed", PATIENCE, async || {
            let allocation = allocations.get("partners").await?;
            let generation = allocation.metadata.generation;
            let conditions = allocation.status.map(|status| status.conditions).unwrap_or_default();
            let all = [type_::ALLOCATED, type_::PROGRAMMED];
            Ok(all.iter().all(|type_| holds(&conditions, type_, generation)).then_some(()))
        })
        .await
    }

    /// A bound pod on each node, to be talked to without the API server.
    pub async fn pods_on_all_nodes(&self, name: &str) -> anyhow::Result<Vec<Inside>> {
        futures::future::try_join_all(NODES.map(|node| self.pod_on(name, node, true))).await
    }

    /// A pod on a node, bound or not.
    pub async fn pod_on(&self, name: &str, node: Node, bound: bool) -> anyhow::Result<Inside> {
        let builder = self.namespace.pod(&format!("{name}-{}", node.name())).on(&node.name());
        let builder = if bound { builder.label(BOUND.0, BOUND.1) } else { builder };
        Inside::of(self.namespace.cluster(), builder.start().await?)
    }
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
    ensure!(report.addresses() == [address].into(), "not only {address} on the wire: {:#?}", report.sources);
    ensure!(report.shared == 0, "5-tuples from two nodes: {:?}", report.shared_flows);
    Ok(report)
}

/// When the origin last saw a connection from this source, in milliseconds since the Unix epoch.
pub async fn last_connection(origin: &Origin, source: Ipv4Addr) -> anyhow::Result<u64> {
    let records = origin.call(serde_json::json!({"do": "records", "source": source})).await?;
    let all = records["tcp"].as_array().into_iter().flatten();
    Ok(all.filter_map(|record| record["opened_ms"].as_u64()).max().unwrap_or(0))
}
