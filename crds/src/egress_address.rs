//! `EgressAddress`: one dedicated address and the nodes that hold its slices. Written by the operator only.

use crate::Condition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One dedicated egress address and which node may send from which of its ports. The operator writes it; people read
/// it. All holdings live in this one object, so that one compare-and-swap keeps every port with one owner.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "aegis.dev",
    version = "v1alpha1",
    kind = "EgressAddress",
    plural = "egressaddresses",
    shortname = "eaddr",
    category = "aegis",
    status = "EgressAddressStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Account","type":"string","jsonPath":".spec.allocationRef.namespace"}"#,
    printcolumn = r#"{"name":"Allocation","type":"string","jsonPath":".spec.allocationRef.name"}"#,
    printcolumn = r#"{"name":"Prefix","type":"string","jsonPath":".spec.prefix"}"#,
    printcolumn = r#"{"name":"Epoch","type":"integer","jsonPath":".spec.epoch"}"#,
    printcolumn = r#"{"name":"Held","type":"integer","jsonPath":".status.slicesHeld"}"#,
    printcolumn = r#"{"name":"Programmed","type":"string","jsonPath":".status.conditions[?(@.type==\"Programmed\")].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct EgressAddressSpec {
    /// The address; the object bears it as its name too.
    pub address: String,
    /// `AegisPrefix` it comes from.
    pub prefix: String,
    /// Allocation that it is dedicated to.
    pub allocation_ref: AllocationRef,
    /// Grows with every change of `holdings`.
    pub epoch: i64,
    /// Who holds which slices: sorted by `first`, disjoint. Slices in no holding are free.
    #[serde(default)]
    pub holdings: Vec<Holding>,
}

/// Names an `EgressAllocation` in any namespace.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AllocationRef {
    /// Namespace (account) of the allocation.
    pub namespace: String,
    /// Name of the allocation.
    pub name: String,
}

/// The right of one node to send from some consecutive slices.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Holding {
    /// First slice, 4 to 255: its ports begin at 256 times this number.
    pub first: u32,
    /// Last slice, from `first` to 255.
    pub last: u32,
    /// Node that holds, or last held, the slices.
    pub node: String,
    /// Epoch of the address at which this holding began. A node refuses an older one than it knows.
    pub epoch: i64,
    /// `Held`: new flows may start. `Draining`: live flows go on, none starts. `Quarantined`: nobody sends, until
    /// `until`.
    pub state: HoldingState,
    /// When a quarantined holding becomes free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Time>,
}

/// State of a holding.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HoldingState {
    /// New flows may start.
    Held,
    /// Live flows go on, none starts.
    Draining,
    /// Nobody sends, until a time.
    Quarantined,
}

/// What the nodes report of this address.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressAddressStatus {
    /// Slices that nodes hold.
    #[serde(default)]
    pub slices_held: u32,
    /// `Programmed`: how many nodes have the current epoch.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
