//! `EgressPolicy`: ordered rules of the cluster, by which somebody else than the account says where its pods leave.

use crate::{Condition, ZonePort, schema};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Says where packets leave that match: from an allocation of the pod's own namespace, with the node's address, or not at all.
/// Policies are asked in one order, the lowest `precedence` first and equal ones by name, and the first that matches decides; only
/// what none of them matches is left to `ZoneBinding`s. Traffic inside the cluster never matches. Established flows keep
/// what they began with.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "aegis.dev",
    version = "v1alpha1",
    kind = "EgressPolicy",
    plural = "egresspolicies",
    shortname = "epol",
    category = "aegis",
    status = "EgressPolicyStatus",
    derive = "PartialEq",
    validation = Rule::new("size(self.metadata.name) <= 63")
        .message("metadata.name must be at most 63 characters: labels and metrics carry it"),
    printcolumn = r#"{"name":"Order","type":"integer","jsonPath":".status.order"}"#,
    printcolumn = r#"{"name":"Precedence","type":"integer","jsonPath":".spec.precedence"}"#,
    printcolumn = r#"{"name":"Action","type":"string","jsonPath":".spec.action"}"#,
    printcolumn = r#"{"name":"Mode","type":"string","jsonPath":".spec.mode"}"#,
    printcolumn = r#"{"name":"Primary","type":"string","jsonPath":".spec.egress.primary"}"#,
    printcolumn = r#"{"name":"Pods","type":"integer","jsonPath":".status.pods"}"#,
    printcolumn = r#"{"name":"Accepted","type":"string","jsonPath":".status.conditions[?(@.type==\"Accepted\")].status"}"#,
    printcolumn = r#"{"name":"Programmed","type":"string","jsonPath":".status.conditions[?(@.type==\"Programmed\")].status"}"#,
    printcolumn = r#"{"name":"Effective","type":"string","jsonPath":".status.conditions[?(@.type==\"Effective\")].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "has(self.egress) == (self.action == 'Egress')",
    "egress must be given with action Egress, and left out with Default and Deny"
))]
pub struct EgressPolicySpec {
    /// Place among the policies: the lowest comes first, equal ones by name. 0 to 1000000.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub precedence: i32,
    /// What it is about. A packet must match everything that is given; left out, it matches everything that pods send to the outside.
    #[serde(default, skip_serializing_if = "Match::is_empty", rename = "match")]
    pub matches: Match,
    /// `Egress` lets it leave from the allocations of `egress`, `Default` with the node's address, and `Deny` refuses it.
    #[serde(default)]
    pub action: PolicyAction,
    /// Where it leaves from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<PolicyEgress>,
    /// `Enforce` does it. `Observe` changes nothing, and counts the new flows that the policy would decide about: the metric
    /// `aegis_policy_observed_flows_total` and `status.observed` tell how many, and what would have become of them.
    #[serde(default)]
    pub mode: PolicyMode,
}

/// Whether a policy does something.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PolicyMode {
    /// It decides.
    #[default]
    Enforce,
    /// It counts what it would decide about.
    Observe,
}

/// What a policy is about.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Match {
    /// Which pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
    /// In which state the pods and their nodes are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub posture: Option<Posture>,
    /// Ranges that the pod's address must be in, at most 64, in CIDR notation without host bits. Pods of the host network match none.
    #[schemars(schema_with = "schema::source_cidrs")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<String>,
    /// Which destinations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<PolicyDestination>,
}

impl Match {
    fn is_empty(&self) -> bool {
        *self == Match::default()
    }

    /// Names of the applications that it names.
    pub fn applications(&self) -> &[String] {
        self.destination.as_ref().map_or(&[], |destination| &destination.applications)
    }
}

/// Which pods of the cluster.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "!has(self.serviceAccounts) || has(self.namespaces)",
    "serviceAccounts need namespaces: two namespaces may each have a service account of that name"
))]
pub struct Identity {
    /// Namespaces, one of which the pod is in; at most 64. Left out: any.
    #[schemars(schema_with = "schema::namespaces")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<String>,
    /// Labels of the namespace that the pod is in. With `namespaces`, both must match.
    #[schemars(schema_with = "schema::policy_namespace_selector")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_selector: Option<LabelSelector>,
    /// Labels of the pod.
    #[schemars(schema_with = "schema::policy_selector")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_selector: Option<LabelSelector>,
    /// Service accounts, as one of which the pod runs; at most 64. Left out: any.
    #[schemars(schema_with = "schema::service_accounts")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub service_accounts: Vec<String>,
    /// Pods of the host network match too: what their own sockets send. They are left out unless this is said, so that a policy
    /// for all pods does not cut off what the nodes themselves depend on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_network: bool,
}

/// In which state pods and their nodes are: all that is given must hold. A change counts for new flows at once.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "has(self.nodeSelector) || has(self.nodeConditions) || has(self.podConditions)",
    "is empty: give nodeSelector, nodeConditions or podConditions, or leave posture out to match any"
))]
pub struct Posture {
    /// Labels of the node that the pod runs on. Nodes that lack a label are `DoesNotExist`, and `NotIn` whatever values.
    #[schemars(schema_with = "schema::policy_node_selector")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<LabelSelector>,
    /// Conditions of the node, at most 8. One that the node does not have is `Unknown`.
    #[schemars(length(min = 1, max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub node_conditions: Vec<ConditionMatch>,
    /// Conditions of the pod, at most 8. One that the pod does not have is `Unknown`.
    #[schemars(length(min = 1, max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pod_conditions: Vec<ConditionMatch>,
}

/// A condition of a node or a pod.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConditionMatch {
    /// Its type, as in `status.conditions` of the object.
    #[serde(rename = "type")]
    #[schemars(length(min = 1, max = 316))]
    pub type_: String,
    /// The status that it must have.
    pub status: ConditionStatus,
}

/// Status of a condition.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not hold.
    False,
    /// Nobody knows, or nobody has said.
    Unknown,
}

/// Which destinations: one of `cidrs`, `countries` and `hosts`, and one of `ports`; or what belongs to one of `applications`.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "has(self.cidrs) || has(self.countries) || has(self.hosts) || has(self.ports) || has(self.applications)",
    "is empty: give cidrs, countries, hosts, ports or applications, or leave destination out to match all"
))]
#[x_kube(validation = (
    "!has(self.applications) || !has(self.ports)",
    "ports can't be given with applications, which have their own: put them into an EgressApplication, or write a second policy"
))]
pub struct PolicyDestination {
    /// Ranges in CIDR notation without host bits, of IPv4 or IPv6, at most 256. Left out, and no `countries`, `hosts` or
    /// `applications` either: everything outside of the cluster, over both.
    #[schemars(schema_with = "schema::policy_cidrs")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cidrs: Vec<String>,
    /// Countries in which the destination is, as ISO 3166-1 alpha-2 codes in capitals (`NZ`; the United Kingdom is `GB`), at most
    /// 64. The agents know them from the database of the chart's `agent.countries`. While a node has none, its pods that match
    /// otherwise are refused whatever no policy before this one decides.
    #[schemars(schema_with = "schema::countries")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub countries: Vec<String>,
    /// Protocols and ports, at most 32. Left out: all. With any, nothing else matches. They can't be given together with
    /// `applications`.
    #[schemars(length(min = 1, max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<ZonePort>,
    /// Host names, at most 64, whose addresses match as those in `cidrs` do: `api.example.com`, or `*.example.com` for every name
    /// below `example.com`. See `ZoneBinding.spec.zone.hosts` for which addresses are known. One that is not matches nothing, so
    /// `Deny` by name keeps nobody from an address that he knows from elsewhere: deny everything, and let names through.
    #[schemars(schema_with = "schema::hosts")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// Names of `EgressApplication`s, at most 32, whose destinations match at their own ports, beside what the other fields name. While
    /// one of them is missing, nobody knows what the policy is about: its pods that match otherwise are refused whatever no policy before
    /// this one decides.
    #[schemars(schema_with = "schema::applications")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub applications: Vec<String>,
}

/// What happens to packets that match.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PolicyAction {
    /// Leave from an allocation.
    #[default]
    Egress,
    /// Leave with the node's address.
    Default,
    /// Be refused.
    Deny,
}

/// Allocations of the namespace of the pod that sends: an account leaves from its own addresses alone, whoever wrote the policy. Pods
/// of namespaces without an allocation of that name are refused.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.secondary) || self.secondary != self.primary")
    .message("secondary must be another allocation than primary").field_path(".secondary"))]
pub struct PolicyEgress {
    /// Name of the allocation to leave from.
    #[schemars(schema_with = "schema::object_name")]
    pub primary: String,
    /// Name of the one to leave from where the primary has nothing to leave from: no such allocation, no address of the packet's
    /// family, no node that holds a slice of it, or no port towards the packet's destination. What waits for a slice of the
    /// primary that is being granted waits; what a limit refuses is refused. A node that sends through a gateway learns from that
    /// that it has no port, and the connection goes by the secondary when its first packet is sent again, a second later. Established
    /// flows stay where they are.
    #[schemars(schema_with = "schema::object_name")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secondary: Option<String>,
}

/// What the operator and the nodes found.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressPolicyStatus {
    /// Place in the order in which policies are asked, from 1 on.
    #[serde(default)]
    pub order: u32,
    /// Pods that match, over all nodes.
    #[serde(default)]
    pub pods: u32,
    /// With `mode: Observe`, what would have happened, as far as the nodes have told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed: Option<Observed>,
    /// `Accepted`; `Effective`: whether it can ever decide, or which policy before it always does; `Programmed`; of a policy that
    /// names countries, `CountriesKnown`: whether every node has a database of them; of one that names hosts, `Resolved`: whether nodes
    /// with pods that match find addresses of each name.
    #[schemars(schema_with = "schema::conditions")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// New flows that a policy would have decided about. The numbers are those of the agents since each has started, told in coarse
/// steps: the metrics have them exactly.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Observed {
    /// All of them.
    #[serde(default)]
    pub flows: u64,
    /// Those that would have been refused: by `action: Deny`, or for want of something to leave from.
    #[serde(default)]
    pub refused: u64,
}
