//! `EgressAddress`: one dedicated address and the nodes that hold its slices. Written by the operator only.

use crate::{Condition, schema};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One dedicated egress address (an IPv4 address, an IPv6 /64, or an IPv6 address by itself) and which node may send from which of its slices. The
/// operator writes it; people read it. All holdings live in this one object, so that one compare-and-swap keeps every slice
/// with one owner.
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
    validation = Rule::new(
        "isIP(self.spec.address) && ip(self.spec.address).family() == 6 \
         ? self.metadata.name.matches('^[0-9a-f]{4}(-[0-9a-f]{4}){7}$') && isIP(self.metadata.name.replace('-', ':')) \
           && ip(self.metadata.name.replace('-', ':')) == ip(self.spec.address) \
         : self.metadata.name == self.spec.address.replace('::/64', '').replace(':', '-')"
    ).message("metadata.name must equal spec.address; of a /64 without ::/64, and with - in place of :; of a single IPv6 address with \
               all eight groups of four digits, and with - in place of :"),
    printcolumn = r#"{"name":"Account","type":"string","jsonPath":".spec.allocationRef.namespace"}"#,
    printcolumn = r#"{"name":"Allocation","type":"string","jsonPath":".spec.allocationRef.name"}"#,
    printcolumn = r#"{"name":"Prefix","type":"string","jsonPath":".spec.prefix"}"#,
    printcolumn = r#"{"name":"Epoch","type":"integer","jsonPath":".spec.epoch"}"#,
    printcolumn = r#"{"name":"Held","type":"integer","jsonPath":".status.slicesHeld"}"#,
    printcolumn = r#"{"name":"Programmed","type":"string","jsonPath":".status.conditions[?(@.type==\"Programmed\")].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.epoch >= oldSelf.epoch")
        .message("spec.epoch can't go back: read the object again and plan from what it says").field_path(".epoch"),
    validation = Rule::new("self.epoch > oldSelf.epoch || self.holdings == oldSelf.holdings")
        .message("spec.holdings changed, so spec.epoch must grow").field_path(".epoch"),
    validation = Rule::new("self.holdings.all(holding, holding.epoch <= self.epoch)")
        .message("spec.holdings has a holding that is newer than spec.epoch").field_path(".holdings"),
    validation = Rule::new("!has(self.fence) || self.fence.epoch <= self.epoch")
        .message("spec.fence is newer than spec.epoch").field_path(".fence"),
    validation = Rule::new(
        "has(self.fence) ? has(oldSelf.fence) && self.fence == oldSelf.fence || self.fence.epoch > oldSelf.epoch \
         : !has(oldSelf.fence) || self.epoch > oldSelf.epoch"
    ).message("spec.fence changed, so spec.epoch must grow, and spec.fence.epoch must be above what spec.epoch was")
        .field_path(".fence")
)]
pub struct EgressAddressSpec {
    /// The address; the object bears it as its name too (`2001-db8-1-2` stands for `2001:db8:1:2::/64`,
    /// `2001-0db8-0000-0000-0000-0000-0000-0007` for `2001:db8::7`).
    #[schemars(schema_with = "schema::egress_address")]
    #[x_kube(validation = ("self == oldSelf", "can't be changed: an EgressAddress is one address for life"))]
    pub address: String,
    /// `AegisPrefix` it comes from.
    #[schemars(schema_with = "schema::object_name")]
    #[x_kube(validation = ("self == oldSelf", "can't be changed: delete the EgressAddress when nobody holds a slice"))]
    pub prefix: String,
    /// Allocation that it is dedicated to.
    #[x_kube(validation = ("self == oldSelf", "can't be changed: a dedicated address never moves to another account"))]
    pub allocation_ref: AllocationRef,
    /// Grows with every change of `holdings` and never goes back, so that nodes can tell which of two versions is
    /// the newer one.
    #[schemars(range(min = 0))]
    pub epoch: i64,
    /// Who holds which slices: sorted by `first`, disjoint, at most 252. Slices in no holding are free. Of an IPv4 address, and of
    /// a single IPv6 one, a slice is 256 consecutive ports. Of a /64 it is the node's number: the addresses in which bits 64 to 79 are this
    /// number are the node's.
    #[serde(default)]
    #[schemars(length(max = 252), extend("x-kubernetes-list-type" = "atomic"))]
    #[x_kube(validation = (
        "self.map(h, h.first).isSorted() && self.all(i, h, i == 0 || self[i-1].last < h.first)",
        "must be sorted by first and disjoint: a slice has one owner"
    ))]
    pub holdings: Vec<Holding>,
    /// Until when a node that can't renew its Lease may send. Left out, the end of its rights is always confirmed: by its
    /// own report, or because its Node is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<AddressFence>,
}

/// A deadline for nodes that can't renew their Lease.
#[derive(KubeSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AddressFence {
    /// Seconds from the last renewal after which a node sends nothing more from this address; after three quarters of
    /// it no new flow starts.
    #[schemars(range(min = 15, max = 3600))]
    pub after_seconds: u32,
    /// Epoch of the address at which this fence was set: a node that has programmed it keeps the deadline.
    #[schemars(range(min = 0))]
    pub epoch: i64,
}

/// Names an `EgressAllocation` in any namespace.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AllocationRef {
    /// Namespace (account) of the allocation.
    #[schemars(schema_with = "schema::dns_label")]
    pub namespace: String,
    /// Name of the allocation.
    #[schemars(schema_with = "schema::object_name")]
    pub name: String,
}

/// The right of one node to send from some consecutive slices.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.first <= self.last").message("first must not be greater than last")
        .field_path(".first"),
    validation = ("has(self.until) == (self.state == 'Quarantined')", "until must be given with state Quarantined, and with no other")
)]
pub struct Holding {
    /// First slice, 4 to 255: its ports, where it has some, begin at 256 times this number.
    #[schemars(range(min = 4, max = 255))]
    pub first: u32,
    /// Last slice, from `first` to 255.
    #[schemars(range(min = 4, max = 255))]
    pub last: u32,
    /// Node that holds, or last held, the slices.
    #[schemars(schema_with = "schema::long_name")]
    pub node: String,
    /// Epoch of the address at which this holding began. A node refuses an older one than it knows.
    #[schemars(range(min = 0))]
    pub epoch: i64,
    /// `Held`: new flows may start. `Draining`: live flows go on, none starts. `Quarantined`: nobody sends, until
    /// `until`.
    #[schemars(extend("maxLength" = 11))]
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
    #[schemars(schema_with = "schema::conditions")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
