//! `EgressAllocation`: the dedicated addresses of an account and how nodes share them.

use crate::Condition;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Dedicated egress addresses of an account (the namespace it lives in). Every node of the sites sends from the same
/// addresses at the same time; each has ports of its own.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "aegis.dev",
    version = "v1alpha1",
    kind = "EgressAllocation",
    plural = "egressallocations",
    shortname = "ealloc",
    category = "aegis",
    namespaced,
    status = "EgressAllocationStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Addresses","type":"string","jsonPath":".status.summary"}"#,
    printcolumn = r#"{"name":"Nodes","type":"integer","jsonPath":".status.nodes"}"#,
    printcolumn = r#"{"name":"Allocated","type":"string","jsonPath":".status.conditions[?(@.type==\"Allocated\")].status"}"#,
    printcolumn = r#"{"name":"Programmed","type":"string","jsonPath":".status.conditions[?(@.type==\"Programmed\")].status"}"#,
    printcolumn = r#"{"name":"Capacity Low","type":"string","jsonPath":".status.conditions[?(@.type==\"CapacityLow\")].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct EgressAllocationSpec {
    /// Names of the `AegisPrefix` objects to take addresses from, in order of preference.
    pub prefixes: Vec<String>,
    /// How many addresses, or exactly which.
    #[serde(default)]
    pub addresses: AddressRequest,
    /// Where traffic may leave from: at most four sets of nodes. Without sites every node may hold slices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sites: Vec<Site>,
    /// Which ports of each address are used and how nodes share them.
    #[serde(default)]
    pub ports: Ports,
    /// What counts as full.
    #[serde(default)]
    pub capacity: Capacity,
    /// How long idle flows keep their port.
    #[serde(default)]
    pub timeouts: FlowTimeouts,
}

/// How many addresses, or exactly which.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AddressRequest {
    /// Number of IPv4 addresses, 1 to 16. With `explicit` it must be left out or equal the length of that list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<u32>,
    /// Exactly these addresses, each of which must lie in one of the prefixes and belong to nobody else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub explicit: Vec<String>,
}

impl Default for AddressRequest {
    fn default() -> Self {
        AddressRequest { ipv4: Some(1), explicit: Vec::new() }
    }
}

/// A set of nodes from which an allocation may leave.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Site {
    /// Name of the site, unique in the allocation.
    pub name: String,
    /// Labels that a node of the site must carry, all of them. Empty means every node.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
}

/// Which ports of each address are used and how nodes share them.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ports {
    /// First port: a multiple of 256, at least 1024.
    #[serde(default = "first_port")]
    pub first: u32,
    /// Last port: one less than a multiple of 256, at most 65535.
    #[serde(default = "last_port")]
    pub last: u32,
    /// How many slices (256 ports each) a node holds of each address.
    #[serde(default)]
    pub per_node: PerNode,
}

impl Default for Ports {
    fn default() -> Self {
        Ports { first: first_port(), last: last_port(), per_node: PerNode::default() }
    }
}

/// How many slices (256 ports each) a node holds of each address.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PerNode {
    /// Slices that every node of the sites holds, whether it needs them or not: 256 connections to each origin for
    /// each slice.
    #[serde(default = "per_node_min")]
    pub min: u32,
    /// Slices that a node can grow to when its pods need them.
    #[serde(default = "per_node_max")]
    pub max: u32,
}

impl Default for PerNode {
    fn default() -> Self {
        PerNode { min: per_node_min(), max: per_node_max() }
    }
}

/// What counts as full.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Capacity {
    /// Share of a node's ports towards one origin, in percent, above which `CapacityLow` turns true.
    #[serde(default = "target_percent")]
    pub target_percent: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Capacity { target_percent: target_percent() }
    }
}

/// Seconds without a packet after which a flow ends and its port may be used again.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowTimeouts {
    /// Established TCP connections (RFC 5382 asks for at least 7,440).
    #[serde(default = "tcp_established")]
    pub tcp_established_seconds: u32,
    /// TCP connections being opened, or closed by one side only (RFC 5382 asks for at least 240).
    #[serde(default = "tcp_transitory")]
    pub tcp_transitory_seconds: u32,
    /// TCP connections closed by both sides, or reset.
    #[serde(default = "tcp_closed")]
    pub tcp_closed_seconds: u32,
    /// UDP (RFC 4787 asks for at least 120, recommends 300).
    #[serde(default = "udp")]
    pub udp_seconds: u32,
    /// ICMP echo (RFC 5508 asks for at least 60).
    #[serde(default = "icmp")]
    pub icmp_seconds: u32,
}

impl Default for FlowTimeouts {
    fn default() -> Self {
        FlowTimeouts {
            tcp_established_seconds: tcp_established(),
            tcp_transitory_seconds: tcp_transitory(),
            tcp_closed_seconds: tcp_closed(),
            udp_seconds: udp(),
            icmp_seconds: icmp(),
        }
    }
}

fn first_port() -> u32 {
    1024
}
fn last_port() -> u32 {
    65535
}
fn per_node_min() -> u32 {
    8
}
fn per_node_max() -> u32 {
    252
}
fn target_percent() -> u32 {
    80
}
fn tcp_established() -> u32 {
    7440
}
fn tcp_transitory() -> u32 {
    240
}
fn tcp_closed() -> u32 {
    10
}
fn udp() -> u32 {
    300
}
fn icmp() -> u32 {
    60
}

/// What the operator has set aside.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressAllocationStatus {
    /// The dedicated addresses: what to hand to a partner.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<AddressUse>,
    /// The addresses in one line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub summary: String,
    /// Nodes that hold slices.
    #[serde(default)]
    pub nodes: u32,
    /// `Accepted`, `Allocated`, `Programmed`, `CapacityLow`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// One dedicated address.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AddressUse {
    /// The address.
    pub address: String,
    /// Prefix it comes from.
    pub prefix: String,
    /// Slices that nodes hold.
    #[serde(default)]
    pub slices_held: u32,
    /// Slices that nobody holds.
    #[serde(default)]
    pub slices_free: u32,
}
