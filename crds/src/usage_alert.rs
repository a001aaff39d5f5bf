//! `UsageAlert`: when an account is to be told about its use.

use crate::{Condition, LocalAllocationRef, reason, schema};
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// Tells an account (the namespace it lives in) when the ports of an address towards an origin are about to be used up, when
/// connections are refused, and when nobody can send from a site. Whatever is raised, and cleared later, is an item of the account's
/// feed (RSS and Atom), a Kubernetes Event of this object, and a metric. The collector of use watches it (`usage.enabled` of the chart):
/// without a collector nothing is raised, and `Accepted` is not set. What has no report is not taken for rest: while a node that
/// holds ports of the address does not report, nothing is cleared, and the time counts for nothing. At most 64 of a namespace count, the
/// first by name.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "aegis.dev",
    version = "v1alpha1",
    kind = "UsageAlert",
    plural = "usagealerts",
    shortname = "ualert",
    category = "aegis",
    namespaced,
    status = "UsageAlertStatus",
    derive = "PartialEq",
    validation = Rule::new("size(self.metadata.name) <= 63")
        .message("metadata.name must be at most 63 characters: metrics carry it"),
    printcolumn = r#"{"name":"Allocation","type":"string","jsonPath":".spec.allocationRef.name"}"#,
    printcolumn = r#"{"name":"Percent","type":"integer","jsonPath":".spec.portUse.percent"}"#,
    printcolumn = r#"{"name":"Accepted","type":"string","jsonPath":".status.conditions[?(@.type==\"Accepted\")].status"}"#,
    printcolumn = r#"{"name":"Firing","type":"integer","jsonPath":".status.firing"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = (
        "has(self.portUse) || has(self.refusals) || has(self.siteWithoutHolders)",
        "spec says nothing to look at: give spec.portUse, spec.refusals or spec.siteWithoutHolders, or several of these"
    ),
    validation = Rule::new("!has(self.origins) || has(self.portUse) || has(self.refusals)")
        .message("spec.origins narrows down spec.portUse and spec.refusals: give one of these, or leave origins out")
        .field_path(".origins")
)]
pub struct UsageAlertSpec {
    /// The allocation that is looked at, in the same namespace. Left out: all of the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation_ref: Option<LocalAllocationRef>,
    /// Only origins in one of these ranges are looked at, at most 32. Left out: all. Origins that an agent has summed, because they
    /// were too many to be told apart, are in none of them.
    #[schemars(length(min = 1, max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub origins: Vec<AlertOrigin>,
    /// Raised when the ports of an IPv4 address towards one origin are in use to this share. Each address, origin and protocol is
    /// looked at by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_use: Option<PortUseAlert>,
    /// Raised when connections are refused. Each address, origin, protocol and reason is looked at by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusals: Option<RefusalsAlert>,
    /// Raised when no node of a site of the allocation holds a slice, so that nothing leaves from there. Each site is looked at by
    /// itself; an allocation without `sites` is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site_without_holders: Option<SiteAlert>,
}

/// Some origins.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AlertOrigin {
    /// Range in CIDR notation without host bits; a single address is `198.51.100.7/32`.
    #[schemars(schema_with = "schema::cidr")]
    pub cidr: String,
    /// The port, 1 to 65535. Left out: any.
    #[schemars(range(min = 1, max = 65535))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// When the ports of an address towards an origin count as nearly used up.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.clearBelowPercent) || self.clearBelowPercent <= self.percent")
    .message("spec.portUse.clearBelowPercent must not be greater than spec.portUse.percent")
    .field_path(".clearBelowPercent"))]
pub struct PortUseAlert {
    /// Raised at this share of the ports that the allocation gives out of the address (`spec.ports`), over all nodes, in percent: 1 to
    /// 100.
    #[schemars(range(min = 1, max = 100))]
    pub percent: u32,
    /// For how many seconds without a break, in steps of 10 s: 0 to 86,400.
    #[serde(default = "port_use_for")]
    #[schemars(range(min = 0, max = 86400))]
    pub for_seconds: u32,
    /// Cleared below this share, in percent, 1 to `percent`: so it does not come and go where the share swings around the limit. Left
    /// out: ten points below `percent`, 1 at least.
    #[schemars(range(min = 1, max = 100))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clear_below_percent: Option<u32>,
}

/// Alerts of a namespace that count, the first by name.
pub const MOST_ALERTS: usize = 64;

impl UsageAlertSpec {
    /// Whether an alert with this spec counts, the reason and a message. `counts`: it is among the first of its namespace; `found`: whether
    /// the namespace has an allocation of that name.
    pub fn accepted(&self, counts: bool, found: &dyn Fn(&str) -> bool) -> (bool, &'static str, String) {
        if !counts {
            let message = format!(
                "the namespace has more than {MOST_ALERTS} UsageAlerts, and this one comes after them by name: delete some, or let one look at \
                 several allocations"
            );
            return (false, reason::LIMIT, message);
        }
        match &self.allocation_ref {
            Some(allocation) if !found(&allocation.name) => {
                let message = format!(
                    "there is no EgressAllocation {} in this namespace: create it, or name another one in spec.allocationRef",
                    allocation.name
                );
                (false, reason::NOT_FOUND, message)
            }
            _ => (true, reason::ACCEPTED, "use is looked at every 10 seconds".into()),
        }
    }
}

impl PortUseAlert {
    /// Below how many percent it is cleared.
    pub fn clear_below(&self) -> u32 {
        self.clear_below_percent.unwrap_or(self.percent.saturating_sub(10)).max(1)
    }
}

/// When refused connections count.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusalsAlert {
    /// Raised when more connections than this were refused within the window: 0 to 1,000,000,000.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1000000000))]
    pub more_than: u32,
    /// Length of the window in seconds, a multiple of 10: 10 to 1,800. Cleared when no more than `moreThan` are left in it.
    #[serde(default = "refusals_within")]
    #[schemars(range(min = 10, max = 1800))]
    #[x_kube(validation = ("self % 10 == 0", "must be a multiple of 10, for example 60 or 300: nodes report every 10 seconds"))]
    pub within_seconds: u32,
}

/// When a site from which nobody sends counts.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SiteAlert {
    /// For how many seconds: 0 to 86,400.
    #[serde(default = "site_for")]
    #[schemars(range(min = 0, max = 86400))]
    pub for_seconds: u32,
}

fn port_use_for() -> u32 {
    300
}

fn refusals_within() -> u32 {
    300
}

fn site_for() -> u32 {
    120
}

/// What the collector found.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UsageAlertStatus {
    /// Generation of the spec that this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// How many addresses and origins, or sites, it is raised for.
    #[serde(default)]
    pub firing: u32,
    /// How many exceed the limit, but not for long enough.
    #[serde(default)]
    pub pending: u32,
    /// `Accepted`; `Firing`, whose message names what it is raised for.
    #[schemars(schema_with = "schema::conditions")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
