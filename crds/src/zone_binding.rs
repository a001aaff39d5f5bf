//! `ZoneBinding`: which pods leave from which allocation, towards which destinations.

use crate::{Condition, schema};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Binds workloads of a namespace to an allocation of the same namespace, for traffic to a zone (a set of
/// destinations). Traffic inside the cluster is never covered. Where several bindings cover a packet, the one with the
/// longest matching destination counts, then the first by name.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "aegis.dev",
    version = "v1alpha1",
    kind = "ZoneBinding",
    plural = "zonebindings",
    shortname = "zbind",
    category = "aegis",
    namespaced,
    status = "ZoneBindingStatus",
    derive = "PartialEq",
    validation = Rule::new("size(self.metadata.name) <= 63")
        .message("metadata.name must be at most 63 characters: labels and metrics carry it"),
    printcolumn = r#"{"name":"Allocation","type":"string","jsonPath":".spec.allocationRef.name"}"#,
    printcolumn = r#"{"name":"Enabled","type":"boolean","jsonPath":".spec.enabled"}"#,
    printcolumn = r#"{"name":"Pods","type":"integer","jsonPath":".status.pods"}"#,
    printcolumn = r#"{"name":"Accepted","type":"string","jsonPath":".status.conditions[?(@.type==\"Accepted\")].status"}"#,
    printcolumn = r#"{"name":"Programmed","type":"string","jsonPath":".status.conditions[?(@.type==\"Programmed\")].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct ZoneBindingSpec {
    /// Set to false to switch the binding off without deleting it. Established flows keep their source.
    #[serde(default = "enabled")]
    pub enabled: bool,
    /// The allocation, in the same namespace.
    pub allocation_ref: LocalAllocationRef,
    /// Which pods. Of those in the host network what their own sockets send is covered, not the rest of what the node sends.
    pub workloads: Workloads,
    /// Which destinations.
    pub zone: Zone,
    /// What happens to new flows while there is nothing to leave from (no address, or no slice on any node).
    /// `Drop` refuses them. `UseNodeAddress` lets them leave with the node's address.
    #[serde(default)]
    pub when_unavailable: WhenUnavailable,
    /// `Nat` translates all that is covered. With `Bind`, TCP connections of pods in the host network are not translated: their sockets
    /// get the egress address and a port of it when they connect, so that they know both, and no packet is rewritten. For that the
    /// node sets slices apart, one at first; while it has none, and for everything else that is covered (other protocols, other
    /// pods, sockets that the application has bound itself), it translates as ever. If no port of these slices is free
    /// towards a destination, `connect` fails at once with `EADDRNOTAVAIL`. Established connections stay as they are when this changes.
    #[serde(default, skip_serializing_if = "BindingMode::is_nat")]
    pub mode: BindingMode,
}

/// Names an `EgressAllocation` in the same namespace.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LocalAllocationRef {
    /// Name of the allocation.
    #[schemars(schema_with = "schema::object_name")]
    pub name: String,
}

/// Which pods of the namespace. A pod must match everything that is given.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "(has(self.allPods) && self.allPods) != (has(self.podSelector) || has(self.serviceAccounts))",
    "must say which pods: either allPods: true, or podSelector or serviceAccounts or both of these"
))]
pub struct Workloads {
    /// Pods with these labels. It must not be empty: say `allPods` to mean every pod.
    #[schemars(schema_with = "schema::pod_selector")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_selector: Option<LabelSelector>,
    /// Pods that run as one of these service accounts, at most 64.
    #[schemars(schema_with = "schema::service_accounts")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub service_accounts: Vec<String>,
    /// All pods of the namespace, also those that will come. It excludes the other two.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub all_pods: bool,
}

/// A set of destinations.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.cidrs) || has(self.hosts)", "is empty: give cidrs or hosts, or both"))]
pub struct Zone {
    /// Ranges in CIDR notation without host bits, of IPv4 or IPv6; `0.0.0.0/0` is everything outside the cluster over
    /// IPv4, `::/0` over IPv6: name both to cover both. What a range of one family covers leaves from the allocation's
    /// addresses of that family, so an allocation without any refuses it (or see `whenUnavailable`). At most 64, none
    /// twice; they may be left out where `hosts` are given. Loopback, link-local and multicast ranges are refused, since they are
    /// never covered.
    #[schemars(schema_with = "schema::zone_cidrs")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cidrs: Vec<String>,
    /// Host names, at most 64: whatever addresses they have, of IPv4 or IPv6, are destinations too. `api.example.com` is that name;
    /// `*.example.com` is every name below `example.com`, with any number of labels, but not `example.com` itself. An address
    /// counts from when a pod of the node has been told it by the cluster's DNS (which the pod is told only then), or, of a name
    /// without `*`, has been found by the node itself. So names are for pods that ask the cluster's DNS: one that asks another
    /// resolver, or over TLS or HTTPS, goes where no name leads. Of pods in the host network only names without `*` count.
    #[schemars(schema_with = "schema::hosts")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// Protocols and ports, all if none is given, at most 32. With any, nothing else is covered: ping, for example, leaves with the
    /// node's address unless `protocol: ICMP` is among them.
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<ZonePort>,
}

/// A port, a range of ports, or a whole protocol.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.protocol != 'ICMP' || !(has(self.port) || has(self.endPort))")
    .message("must be left out with protocol ICMP, which has no ports").field_path(".port"))]
#[x_kube(validation = Rule::new("!has(self.endPort) || has(self.port)")
    .message("endPort needs port, the first of the range").field_path(".endPort"))]
#[x_kube(validation = Rule::new("!has(self.endPort) || !has(self.port) || self.endPort >= self.port")
    .message("endPort must not be less than port").field_path(".endPort"))]
pub struct ZonePort {
    /// `TCP`, `UDP`, or `ICMP`: ping, of IPv4 and IPv6.
    #[serde(default)]
    pub protocol: Protocol,
    /// The port, or the first of the range: 1 to 65535. Left out, all of the protocol.
    #[schemars(range(min = 1, max = 65535))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The last port of the range, included; left out, it is `port` alone.
    #[schemars(range(min = 1, max = 65535))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_port: Option<u16>,
}

/// Transport protocol.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP.
    #[default]
    TCP,
    /// UDP.
    UDP,
    /// ICMP and ICMPv6.
    ICMP,
}

/// How connections get their source.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum BindingMode {
    /// Packets are translated.
    #[default]
    Nat,
    /// Sockets of pods in the host network have the egress address themselves.
    Bind,
}

impl BindingMode {
    fn is_nat(&self) -> bool {
        *self == BindingMode::Nat
    }
}

/// What happens to new flows while there is nothing to leave from.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum WhenUnavailable {
    /// Refuse them.
    #[default]
    Drop,
    /// Let them leave with the node's address.
    UseNodeAddress,
}

fn enabled() -> bool {
    true
}

/// What the operator and the nodes found.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ZoneBindingStatus {
    /// Pods covered, over all nodes.
    #[serde(default)]
    pub pods: u32,
    /// `Accepted`, `Programmed`; with `hosts` also `Resolved`: whether nodes with pods that are covered find addresses of each name.
    #[schemars(schema_with = "schema::conditions")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
