//! `EgressApplication`: destinations that belong together, under a name that policies use.

use crate::{Condition, ZonePort, schema};
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// An application outside of the cluster, as a list of ranges, host names and ports that is written once: `EgressPolicy` names it in
/// `spec.match.destination.applications`. A change of the list counts for all policies that name it at once; established flows keep
/// what they began with. While an application that a policy names is missing, nobody knows what the policy is about: its pods are
/// refused whatever no policy before it decides. So its deletion is refused while a policy names it.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "aegis.dev",
    version = "v1alpha1",
    kind = "EgressApplication",
    plural = "egressapplications",
    shortname = "eapp",
    category = "aegis",
    status = "EgressApplicationStatus",
    derive = "PartialEq",
    validation = Rule::new("size(self.metadata.name) <= 63")
        .message("metadata.name must be at most 63 characters: policies name it"),
    printcolumn = r#"{"name":"Policies","type":"integer","jsonPath":".status.policies"}"#,
    printcolumn = r#"{"name":"Accepted","type":"string","jsonPath":".status.conditions[?(@.type==\"Accepted\")].status"}"#,
    printcolumn = r#"{"name":"Description","type":"string","jsonPath":".spec.description"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct EgressApplicationSpec {
    /// What it is, for people: at most 256 characters.
    #[schemars(length(min = 1, max = 256))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Its parts, 1 to 32: a packet that matches one of them belongs to the application.
    #[schemars(length(min = 1, max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub endpoints: Vec<ApplicationEndpoint>,
}

/// A part of an application: one of `cidrs` and `hosts`, and one of `ports`.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "has(self.cidrs) || has(self.hosts) || has(self.ports)",
    "is empty: give cidrs, hosts or ports"
))]
pub struct ApplicationEndpoint {
    /// Ranges in CIDR notation without host bits, of IPv4 or IPv6, at most 256. Left out, and no `hosts` either: everything outside of
    /// the cluster, over both.
    #[schemars(schema_with = "schema::policy_cidrs")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cidrs: Vec<String>,
    /// Host names, at most 64, whose addresses match as those in `cidrs` do: `api.example.com`, or `*.example.com` for every name
    /// below `example.com`. See `ZoneBinding.spec.zone.hosts` for which addresses are known.
    #[schemars(schema_with = "schema::hosts")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// Protocols and ports, at most 32. Left out: all. With any, nothing else matches.
    #[schemars(length(min = 1, max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<ZonePort>,
}

/// What the operator found.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressApplicationStatus {
    /// Policies that name it.
    #[serde(default)]
    pub policies: u32,
    /// `Accepted`; its message says which policies name it.
    #[schemars(schema_with = "schema::conditions")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
