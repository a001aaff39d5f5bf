//! `AegisPrefix`: a range of addresses that an account may allocate from.

use crate::Condition;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// A range of egress addresses, leased to or brought by an account. Allocations of that account take their dedicated
/// addresses from it. The whole CIDR is usable: unlike a subnet, a prefix has no network or broadcast address.
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
    printcolumn = r#"{"name":"CIDR","type":"string","jsonPath":".spec.cidr"}"#,
    printcolumn = r#"{"name":"Account","type":"string","jsonPath":".spec.account"}"#,
    printcolumn = r#"{"name":"Used","type":"integer","jsonPath":".status.used"}"#,
    printcolumn = r#"{"name":"Addresses","type":"integer","jsonPath":".status.addresses"}"#,
    printcolumn = r#"{"name":"Accepted","type":"string","jsonPath":".status.conditions[?(@.type==\"Accepted\")].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct AegisPrefixSpec {
    /// IPv4 range in CIDR notation without host bits, for example `203.0.113.0/28`. From /16 (the widest) to /32. It
    /// can't be changed later: create another prefix instead. Prefixes must not overlap; where two do, the older one
    /// (by creation time, then by name) counts and the newer one is not accepted.
    #[x_kube(validation = ("isCIDR(self) && cidr(self).ip().family() == 4", "spec.cidr must be an IPv4 CIDR such as 203.0.113.0/28"))]
    pub cidr: String,
    /// Addresses or ranges within `cidr` that must not be allocated, for example one that is in use elsewhere.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reserved: Vec<String>,
    /// Account (namespace) that owns the prefix. Only allocations in this namespace can use it.
    pub account: String,
}

/// What the operator found.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AegisPrefixStatus {
    /// Addresses of the prefix that can be allocated (reserved ones do not count).
    #[serde(default)]
    pub addresses: u32,
    /// Addresses that allocations hold.
    #[serde(default)]
    pub used: u32,
    /// `Accepted`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
