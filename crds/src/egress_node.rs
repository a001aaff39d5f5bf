//! `EgressNode`: what one node reports. Written by that node's agent only.

use crate::{AllocationRef, Condition, Observed, schema};
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// What the agent of one node reports: where its tunnel ends, what it has programmed, what its pods need. It bears
/// the node's name and belongs to the Node.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "aegis.dev",
    version = "v1alpha1",
    kind = "EgressNode",
    plural = "egressnodes",
    shortname = "enode",
    category = "aegis",
    status = "EgressNodeStatus",
    derive = "PartialEq",
    derive = "Default",
    printcolumn = r#"{"name":"Tunnel","type":"string","jsonPath":".status.tunnelAddress"}"#,
    printcolumn = r#"{"name":"Version","type":"string","jsonPath":".status.version"}"#,
    printcolumn = r#"{"name":"Pods","type":"integer","jsonPath":".status.coveredPods"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Announced","type":"string","jsonPath":".status.conditions[?(@.type==\"Announced\")].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct EgressNodeSpec {}

/// What the agent reports.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressNodeStatus {
    /// Address at which other nodes reach this one through the tunnel.
    #[schemars(length(max = 15))]
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tunnel_address: String,
    /// Devices through which traffic leaves, with how XDP runs on them.
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub uplinks: Vec<Uplink>,
    /// Version of the agent.
    #[schemars(length(max = 64))]
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// The agent is being taken off the node: it is given no new slices, those that it has drain, and it ends when none is left.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
    /// Local pods that some binding or policy covers.
    #[serde(default)]
    pub covered_pods: u32,
    /// Slices wanted, for each allocation that pods of this node use.
    #[schemars(length(max = 1024), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub demand: Vec<Demand>,
    /// New flows that limits have refused during the last minute, for each allocation of which there were any.
    #[schemars(length(max = 1024), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limited: Vec<Limited>,
    /// What is programmed, for each address.
    #[schemars(length(max = 4096), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<ProgrammedAddress>,
    /// Bindings that this node enforces, with the generation it has.
    #[schemars(length(max = 4096), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bindings: Vec<ProgrammedBinding>,
    /// Policies that this node enforces, with the generation it has.
    #[schemars(length(max = 1024), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<ProgrammedPolicy>,
    /// Host names of rules with pods here that have no address, though they were looked up.
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unresolved: Vec<UnresolvedHost>,
    /// `Ready`, `WithinLimits`: whether there is room for everything that is asked of this node, and, if it holds slices of a
    /// prefix that is announced by BGP or L2, `Announced`: whether the network has been told. With `agent.fastPath`, `FastPath`:
    /// whether established flows pass by the host stack here, or why not. Where policies name countries or a database of them is
    /// given, `CountriesKnown`: whether there is one, and from when. With `agent.nri.enabled`, `PodsWait`: whether the container
    /// runtime starts a pod only once the data plane knows it, or how pods are named otherwise.
    #[schemars(schema_with = "schema::conditions")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// A device through which traffic leaves.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Uplink {
    /// Name of the device.
    #[schemars(length(max = 15))]
    pub device: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// `Native`, or `Generic` where the driver has no XDP.
    #[schemars(length(max = 16))]
    pub xdp_mode: String,
}

/// Slices wanted by a node.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Demand {
    /// The allocation.
    pub allocation: AllocationRef,
    /// Slices wanted on this node.
    #[schemars(range(max = 252))]
    pub slices: u32,
    /// Ports in use towards the busiest origin, in percent of what this node holds. Told anew when it differs by 5 or more.
    #[serde(default)]
    pub fill_percent: u32,
    /// New flows refused for want of a port during the last minute.
    #[serde(default)]
    pub refused: u32,
    /// Why, in a few words.
    #[schemars(length(max = 256))]
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// New flows of an allocation that limits have refused during the last minute.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Limited {
    /// The allocation.
    pub allocation: AllocationRef,
    /// A pod had as many flows as `spec.limits.perPod.flows` of the allocation.
    #[serde(default, skip_serializing_if = "is_none")]
    pub pod_flows: u32,
    /// A pod had begun as many in the second as `spec.limits.perPod.newFlowsPerSecond`.
    #[serde(default, skip_serializing_if = "is_none")]
    pub pod_new_flows: u32,
    /// The account had as many flows on the node as it may (the chart's `agent.limits.account`).
    #[serde(default, skip_serializing_if = "is_none")]
    pub account_flows: u32,
    /// The account had begun as many in the second as it may there.
    #[serde(default, skip_serializing_if = "is_none")]
    pub account_new_flows: u32,
    /// The pod of this node whose flows they were for the most part: namespace/name. Left out if there is none, or it is gone.
    #[schemars(length(max = 317))]
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pod: String,
}

fn is_none(count: &u32) -> bool {
    *count == 0
}

/// What is programmed of one address.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProgrammedAddress {
    /// The address, or the /64.
    #[schemars(length(max = 43))]
    pub address: String,
    /// Epoch that the data plane has.
    pub epoch: i64,
    /// The data plane keeps the deadline of the address's fence. An agent that knows of no fences never says so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fenced: bool,
    /// Slices of this node that are draining and carry no flow any more.
    #[schemars(length(max = 252), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drained: Vec<SliceRange>,
}

/// Consecutive slices.
#[derive(KubeSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SliceRange {
    /// First slice.
    #[schemars(range(min = 4, max = 255))]
    pub first: u32,
    /// Last slice.
    #[schemars(range(min = 4, max = 255))]
    pub last: u32,
}

/// A binding as one node enforces it.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProgrammedBinding {
    /// Namespace of the binding.
    #[schemars(length(max = 63))]
    pub namespace: String,
    /// Name of the binding.
    #[schemars(length(max = 63))]
    pub name: String,
    /// `metadata.generation` that is enforced.
    pub generation: i64,
    /// Local pods that it covers.
    #[serde(default)]
    pub pods: u32,
}

/// A host name without an address.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UnresolvedHost {
    /// The name.
    #[schemars(length(max = 253))]
    pub host: String,
    /// There is none, by what the resolver says; otherwise nobody can tell.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub absent: bool,
    /// Why, in a few words.
    #[schemars(length(max = 256))]
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// A policy as one node enforces it.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProgrammedPolicy {
    /// Name of the policy.
    #[schemars(length(max = 63))]
    pub name: String,
    /// `metadata.generation` that is enforced.
    pub generation: i64,
    /// Local pods that match.
    #[serde(default)]
    pub pods: u32,
    /// With `mode: Observe`, what would have happened since the agent started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed: Option<Observed>,
}
