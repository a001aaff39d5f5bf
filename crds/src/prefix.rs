//! `AegisPrefix`: a range of addresses that an account may allocate from.

use crate::{Condition, schema};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A range of egress addresses, leased to or brought by an account. Allocations of that account take their dedicated
/// addresses from it. The whole CIDR is usable: unlike a subnet, a prefix has no network or broadcast address. Of an IPv6
/// prefix, what an allocation takes as one address is a /64.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "aegis.dev",
    version = "v1alpha1",
    kind = "AegisPrefix",
    plural = "aegisprefixes",
    shortname = "apfx",
    category = "aegis",
    status = "AegisPrefixStatus",
    derive = "PartialEq",
    validation = Rule::new("size(self.metadata.name) <= 63")
        .message("metadata.name must be at most 63 characters: labels and metrics carry it"),
    printcolumn = r#"{"name":"CIDR","type":"string","jsonPath":".spec.cidr"}"#,
    printcolumn = r#"{"name":"Account","type":"string","jsonPath":".spec.account"}"#,
    printcolumn = r#"{"name":"Announcement","type":"string","jsonPath":".spec.announcement.mode"}"#,
    printcolumn = r#"{"name":"Used","type":"integer","jsonPath":".status.used"}"#,
    printcolumn = r#"{"name":"Addresses","type":"integer","jsonPath":".status.addresses"}"#,
    printcolumn = r#"{"name":"Accepted","type":"string","jsonPath":".status.conditions[?(@.type==\"Accepted\")].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new(
    "!isCIDR(self.cidr) || !has(self.reserved) || self.reserved.all(entry, \
     isIP(entry) ? cidr(self.cidr).containsIP(entry) : !isCIDR(entry) || cidr(self.cidr).containsCIDR(entry))"
).message("spec.reserved has an entry outside spec.cidr: name only addresses of this prefix").field_path(".reserved"))]
#[x_kube(validation = Rule::new(
    "!isCIDR(self.cidr) || cidr(self.cidr).ip().family() == 4 || !has(self.announcement) \
     || !has(self.announcement.mode) || self.announcement.mode == 'None'"
).message("spec.announcement.mode must be None for an IPv6 prefix: nodes announce IPv4 addresses only, so have the network route it")
    .field_path(".announcement"))]
pub struct AegisPrefixSpec {
    /// Range in CIDR notation without host bits: IPv4 from /16 (the widest) to /32, for example `203.0.113.0/28`, or IPv6
    /// from /32 to /64, for example `2001:db8:1::/48`. It can't be changed later: create another prefix instead. Prefixes must not overlap; where two do, the older one
    /// (by creation time, then by name) counts and the newer one is not accepted. Nor must a prefix overlap the pods of
    /// a node (`spec.podCIDRs` of the Node); addresses of nodes that lie in it are reserved by themselves.
    #[schemars(schema_with = "schema::prefix_cidr")]
    pub cidr: String,
    /// Addresses (`203.0.113.1`) or ranges (`203.0.113.4/30`) within `cidr` that must not be allocated, for example
    /// because they are in use elsewhere. At most 64. Of an IPv6 prefix each /64 goes of which a part is reserved. Reserving an address that an allocation holds already does not
    /// take it away.
    #[schemars(schema_with = "schema::reserved")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reserved: Vec<String>,
    /// Account (namespace) that owns the prefix. Only allocations in this namespace can use it.
    #[schemars(schema_with = "schema::dns_label")]
    pub account: String,
    /// How the network learns which nodes take packets for the addresses of this prefix. May be changed at any time:
    /// holdings and flows stay as they are. Of an IPv6 prefix it must be `None`.
    #[serde(default)]
    pub announcement: Announcement,
}

/// How the addresses of a prefix are announced.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Announcement {
    /// `BGP`: every node that holds slices of an address puts a route to it into a routing table of the kernel
    /// (180, unless the agents are told otherwise), from which FRR or BIRD announces it. `L2`: one of the nodes that
    /// hold slices answers ARP for the address. `None`: neither; the network routes the addresses to the nodes by itself,
    /// for example by static routes or a cloud's route table.
    #[serde(default)]
    pub mode: AnnouncementMode,
}

/// Who tells the network where an address is.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum AnnouncementMode {
    /// Every holder, by BGP.
    BGP,
    /// One holder, by ARP.
    L2,
    /// Nobody: the network routes it.
    #[default]
    None,
}

/// What the operator found.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AegisPrefixStatus {
    /// Addresses of the prefix that can be allocated (reserved ones do not count); of an IPv6 prefix, /64s.
    #[serde(default)]
    pub addresses: u32,
    /// Addresses that allocations hold.
    #[serde(default)]
    pub used: u32,
    /// `Accepted`.
    #[schemars(schema_with = "schema::conditions")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
