//! `EgressAllocation`: the dedicated addresses of an account and how nodes share them.

use crate::{Condition, schema};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
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
    validation = Rule::new("size(self.metadata.name) <= 63")
        .message("metadata.name must be at most 63 characters: labels and metrics carry it"),
    printcolumn = r#"{"name":"Addresses","type":"string","jsonPath":".status.summary"}"#,
    printcolumn = r#"{"name":"Nodes","type":"integer","jsonPath":".status.nodes"}"#,
    printcolumn = r#"{"name":"Allocated","type":"string","jsonPath":".status.conditions[?(@.type==\"Allocated\")].status"}"#,
    printcolumn = r#"{"name":"Programmed","type":"string","jsonPath":".status.conditions[?(@.type==\"Programmed\")].status"}"#,
    printcolumn = r#"{"name":"Capacity Low","type":"string","jsonPath":".status.conditions[?(@.type==\"CapacityLow\")].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct EgressAllocationSpec {
    /// Names of the `AegisPrefix` objects to take addresses from, in order of preference: one to eight,
    /// each of which must belong to this namespace or be delegated to it. Addresses of prefixes that are no longer named stay in use, since
    /// partners know them, until `addresses` asks for fewer.
    #[schemars(schema_with = "schema::prefix_names")]
    pub prefixes: Vec<String>,
    /// How many addresses, or exactly which. Left out, it is one IPv4 address.
    #[serde(default, skip_serializing_if = "AddressRequest::is_default")]
    pub addresses: AddressRequest,
    /// Where traffic may leave from: at most four sets of nodes, each with its share of the ports. Without sites every
    /// node may hold slices. Pods on other nodes leave through these, the nearest ones first: of the same zone, of the
    /// same region, then by the site's name; those whose ports are full come last. Over IPv6 they send nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub sites: Vec<Site>,
    /// Which ports of each IPv4 address, and of each single IPv6 one, are used and how nodes share them.
    #[serde(default)]
    pub ports: Ports,
    /// What counts as full.
    #[serde(default)]
    pub capacity: Capacity,
    /// How long idle flows keep their port.
    #[serde(default)]
    pub timeouts: FlowTimeouts,
    /// How much of the allocation one pod may take, so that it leaves the others some.
    #[serde(default, skip_serializing_if = "Limits::is_empty")]
    pub limits: Limits,
    /// When the ports of a node that does not answer go to others.
    #[serde(default)]
    pub fence: Fence,
}

/// How much of the allocation one pod may take. (How much of a node an account may take is not set here, but by the platform's
/// team in the chart: `agent.limits.account`.)
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// What each pod may take of the allocation, for itself. Without it a pod may take all that its node has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_pod: Option<PodLimits>,
}

impl Limits {
    fn is_empty(&self) -> bool {
        *self == Limits::default()
    }
}

/// What each pod may take of the allocation, for itself. A connection above it is refused at once: TCP is reset, the rest is
/// answered with "administratively prohibited". Connections that live are never touched, also not by a lower limit. `WithinLimits`
/// says when a limit is met.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.flows) || has(self.newFlowsPerSecond)", "must have flows, newFlowsPerSecond or both: leave perPod out for no limit"))]
pub struct PodLimits {
    /// Flows (connections, UDP and ping sessions) that a pod may have at a time, over all destinations. Each has a port of the
    /// allocation, also while that rests (`timeouts`). Left out: no limit. 1 to 1,000,000.
    #[schemars(range(min = 1, max = 1000000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows: Option<u32>,
    /// New flows that a pod may begin in each second, attempts in vain included. Left out: no limit. 1 to 1,000,000.
    #[schemars(range(min = 1, max = 1000000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_flows_per_second: Option<u32>,
}

/// When the ports of a node that does not answer go to others.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.afterSeconds) || self.mode == 'Time'")
    .message("spec.fence.afterSeconds counts with mode Time only: set mode to Time, or leave it out")
    .field_path(".afterSeconds"))]
pub struct Fence {
    /// `Confirmed`: nothing is taken from a node that may be alive. Its ports come back when it reports them empty, or
    /// when its Node is deleted or carries the taint `node.kubernetes.io/out-of-service`; traffic outlives an outage of
    /// the API server of any length. `Time`: the ports of a node that is lost come back by themselves, `afterSeconds` x
    /// 1.05 and a quarantine after it is found silent; in return a node that can't reach the API server for
    /// `afterSeconds` stops sending from this allocation.
    #[serde(default)]
    #[schemars(extend("maxLength" = 9))]
    pub mode: FenceMode,
    /// With mode `Time`: seconds without a renewal of its Lease after which a node sends nothing more from this
    /// allocation; after three quarters of it no new flow starts. 15 to 3,600; 60 if left out.
    #[schemars(range(min = 15, max = 3600))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_seconds: Option<u32>,
}

impl Fence {
    /// Seconds after which a node stops by itself, if it does.
    pub fn after(&self) -> Option<u32> {
        match self.mode {
            FenceMode::Confirmed => None,
            FenceMode::Time => Some(self.after_seconds.unwrap_or(60)),
        }
    }
}

/// How it is known that a node sends no more.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum FenceMode {
    /// It says so, or it is gone.
    #[default]
    Confirmed,
    /// Its own deadline has passed, too.
    Time,
}

/// How many addresses, or exactly which.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "(has(self.ipv4) || has(self.ipv6)) != has(self.explicit)",
    "must have either ipv4 or ipv6 or both of these (how many) or explicit (exactly which), and not both"
))]
pub struct AddressRequest {
    /// Number of IPv4 addresses, 1 to 16: any that are free, by preference of the prefixes. Fewer than before gives
    /// some back once nothing leaves from them: first those that no node holds, then those of prefixes that are no
    /// longer named, then the highest. A cluster has at most 1,024 addresses, and at most 1,024 allocations with
    /// addresses; older allocations come first.
    #[schemars(range(min = 1, max = 16))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<u32>,
    /// Number of IPv6 addresses, 1 to 16, in the same way: of a prefix up to /64 each is a /64, a prefix of one address (/128) gives
    /// that one. Every node of the sites has a part of each /64 (at most 252 nodes of one), and in it an address for each pod; ports,
    /// capacity and time-outs are nothing to it. Of a single address nodes share the ports as they do of an IPv4 one. A node without
    /// any slice sends nothing over IPv6: nobody else sends for it.
    #[schemars(range(min = 1, max = 16))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<u32>,
    /// Exactly these addresses (`203.0.113.7`, `2001:db8:1:2::/64`, `2001:db8::7` of a prefix of one address), 1 to 16, instead of `ipv4` and `ipv6`. Each must lie in
    /// one of the prefixes, not be reserved and belong to nobody else.
    #[schemars(schema_with = "schema::explicit_addresses")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub explicit: Vec<String>,
}

impl AddressRequest {
    // The API server must not write the default into the object: a later `explicit` would then meet an `ipv4` that
    // nobody wrote.
    fn is_default(&self) -> bool {
        *self == AddressRequest::default()
    }
}

impl Default for AddressRequest {
    fn default() -> Self {
        AddressRequest { ipv4: Some(1), ipv6: None, explicit: Vec::new() }
    }
}

/// A set of nodes from which an allocation may leave.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Site {
    /// Name of the site, unique in the allocation: a DNS label.
    #[schemars(schema_with = "schema::dns_label")]
    pub name: String,
    /// Labels that a node of the site must carry, all of them; at least one. To use every node leave `sites` out. A node
    /// that matches several sites belongs to the first by name.
    #[schemars(schema_with = "schema::node_selector")]
    pub node_selector: BTreeMap<String, String>,
    /// The site's share of the slices of each address, in proportion to the other sites' weights, 1 to 1,000: of two
    /// sites with the weights 1 and 3 the nodes of the first hold 63 of 252 slices together at most. A share is kept free
    /// for the site's nodes, also while it has none. With other weights only as many slices move as must, and only when
    /// no flow uses them any more.
    #[serde(default = "weight")]
    #[schemars(range(min = 1, max = 1000))]
    pub weight: u32,
}

fn weight() -> u32 {
    1
}

/// Which ports of each address are used and how nodes share them.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.first < self.last")
        .message("spec.ports.first must be less than spec.ports.last").field_path(".first"),
    validation = Rule::new("self.first >= self.last || self.perNode.min * 256 <= self.last + 1 - self.first")
        .message("spec.ports.perNode.min is more than the ports from first to last give: it counts slices of 256 ports")
        .field_path(".perNode")
)]
pub struct Ports {
    /// First port: a multiple of 256, at least 1024.
    #[serde(default = "first_port")]
    #[schemars(range(min = 1024, max = 65280))]
    #[x_kube(validation = ("self % 256 == 0", "must be a multiple of 256, for example 1024 or 32768: ports are shared out in slices of 256"))]
    pub first: u32,
    /// Last port, included: one less than a multiple of 256, at most 65535.
    #[serde(default = "last_port")]
    #[schemars(range(min = 1279, max = 65535))]
    #[x_kube(validation = ("(self + 1) % 256 == 0", "must be one less than a multiple of 256, for example 32767 or 65535: ports are shared out in slices of 256"))]
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

/// How many slices (256 ports each) a node holds of each address. Between `min` and `max` it is as many as its pods
/// need. Where an address has fewer than its nodes want, each gets its fair share: what others hold beyond theirs drains,
/// and goes over when no flow uses it any more.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.min <= self.max")
    .message("spec.ports.perNode.min must not be greater than spec.ports.perNode.max").field_path(".min"))]
pub struct PerNode {
    /// Slices that every node of the sites holds, whether it needs them or not: 256 connections to each origin for
    /// each slice. 1 to 252. Nothing is taken of them for others. All nodes together can't hold more than the 252 slices of an address: with the default, 31
    /// nodes fill one. Further nodes hold slices of the next address, or send through nodes that hold some; of IPv6 addresses they send
    /// nothing then.
    #[serde(default = "per_node_min")]
    #[schemars(range(min = 1, max = 252))]
    pub min: u32,
    /// Slices that a node can grow to when its pods need them; what it no longer needs it gives back. 1 to 252, not less
    /// than `min`. A lower value takes nothing away that is needed.
    #[serde(default = "per_node_max")]
    #[schemars(range(min = 1, max = 252))]
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
    /// Share of a node's ports towards one origin, in percent, above which `CapacityLow` turns true. 1 to 100.
    #[serde(default = "target_percent")]
    #[schemars(range(min = 1, max = 100))]
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
    /// Established TCP connections (RFC 5382 asks for at least 7,440). 240 to 864,000 (ten days).
    #[schemars(range(min = 240, max = 864000))]
    #[serde(default = "tcp_established")]
    pub tcp_established_seconds: u32,
    /// TCP connections being opened, or closed by one side only (RFC 5382 asks for at least 240). 30 to
    /// 3,600.
    #[schemars(range(min = 30, max = 3600))]
    #[serde(default = "tcp_transitory")]
    pub tcp_transitory_seconds: u32,
    /// TCP connections closed by both sides, or reset. 1 to 240.
    #[schemars(range(min = 1, max = 240))]
    #[serde(default = "tcp_closed")]
    pub tcp_closed_seconds: u32,
    /// UDP (RFC 4787 asks for at least 120, recommends 300). 30 to 86,400 (a day).
    #[schemars(range(min = 30, max = 86400))]
    #[serde(default = "udp")]
    pub udp_seconds: u32,
    /// ICMP echo (RFC 5508 asks for at least 60). 10 to 3,600.
    #[schemars(range(min = 10, max = 3600))]
    #[serde(default = "icmp")]
    pub icmp_seconds: u32,
    /// After that, how long a port rests before another connection may have it. The origin may still hold its end of the old
    /// one: a shorter rest risks that it refuses the new one, or takes late packets for the new one's, and in return a busy
    /// origin's ports are there again sooner. Ports of connections that were closed, or reset, do not rest. RFC 6888 asks for
    /// 120. 0 to 3,600.
    #[schemars(range(max = 3600))]
    #[serde(default = "rest")]
    pub rest_seconds: u32,
    /// How many ports may rest at a time on each node: of more, those that have rested longest may be had again early. Left
    /// out, there is no such limit. 0 to 1,000,000.
    #[schemars(range(max = 1000000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_resting_ports: Option<u32>,
}

impl Default for FlowTimeouts {
    fn default() -> Self {
        FlowTimeouts {
            tcp_established_seconds: tcp_established(),
            tcp_transitory_seconds: tcp_transitory(),
            tcp_closed_seconds: tcp_closed(),
            udp_seconds: udp(),
            icmp_seconds: icmp(),
            rest_seconds: rest(),
            max_resting_ports: None,
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
fn rest() -> u32 {
    120
}

/// What the operator has set aside.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressAllocationStatus {
    /// The dedicated addresses: what to hand to a partner.
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<AddressUse>,
    /// The addresses in one line.
    #[schemars(length(max = 2048))]
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub summary: String,
    /// Nodes that hold slices.
    #[serde(default)]
    pub nodes: u32,
    /// What became of each of `spec.sites`, by name.
    #[schemars(length(max = 4), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sites: Vec<SiteStatus>,
    /// `Accepted`, `Delegated`, `Allocated`, `Programmed`, `CapacityLow`, `WithinLimits`.
    #[schemars(schema_with = "schema::conditions")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// One dedicated address.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AddressUse {
    /// The address, or the /64.
    #[schemars(length(max = 43))]
    pub address: String,
    /// Prefix it comes from.
    #[schemars(length(max = 63))]
    pub prefix: String,
    /// Slices that nodes hold.
    #[serde(default)]
    pub slices_held: u32,
    /// Slices that nobody holds.
    #[serde(default)]
    pub slices_free: u32,
}

/// What became of a site.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SiteStatus {
    /// Name of the site.
    #[schemars(length(max = 63))]
    pub name: String,
    /// Weight that counts.
    #[serde(default)]
    pub weight: u32,
    /// Nodes that belong to it.
    #[serde(default)]
    pub nodes: u32,
    /// Those of them that are ready for slices, or hold some.
    #[serde(default)]
    pub nodes_ready: u32,
    /// Those of them that hold slices.
    #[serde(default)]
    pub nodes_holding: u32,
    /// Slices that its nodes may hold together, over all addresses.
    #[serde(default)]
    pub slices: u32,
    /// Slices that its nodes hold, over all addresses; also those that drain.
    #[serde(default)]
    pub slices_held: u32,
    /// Ports in use towards the busiest origin, in percent of what the node holds: that of its fullest node, about,
    /// in steps of ten.
    #[serde(default)]
    pub fill_percent: u32,
}
