//! `AegisPrefix`: a range of addresses that an account may allocate from.

use crate::{Condition, schema};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A range of egress addresses, leased to or brought by an account. Allocations of that account, and of accounts to which it
/// is delegated, take their dedicated addresses from it. The whole CIDR is usable: unlike a subnet, a prefix has no network or broadcast address. Of an IPv6
/// prefix, what an allocation takes as one address is a /64, unless the prefix is one address.
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
    printcolumn = r#"{"name":"Source","type":"string","jsonPath":".spec.source"}"#,
    printcolumn = r#"{"name":"Proof","type":"string","jsonPath":".spec.proof","priority":1}"#,
    printcolumn = r#"{"name":"Announcement","type":"string","jsonPath":".spec.announcement.mode"}"#,
    printcolumn = r#"{"name":"Used","type":"integer","jsonPath":".status.used"}"#,
    printcolumn = r#"{"name":"Free","type":"integer","jsonPath":".status.free"}"#,
    printcolumn = r#"{"name":"Addresses","type":"integer","jsonPath":".status.addresses"}"#,
    printcolumn = r#"{"name":"Accepted","type":"string","jsonPath":".status.conditions[?(@.type==\"Accepted\")].status"}"#,
    printcolumn = r#"{"name":"Delegated","type":"string","jsonPath":".status.conditions[?(@.type==\"Delegated\")].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new(
    "!isCIDR(self.cidr) || !has(self.reserved) || self.reserved.all(entry, \
     isIP(entry) ? cidr(self.cidr).containsIP(entry) : !isCIDR(entry) || cidr(self.cidr).containsCIDR(entry))"
).message("spec.reserved has an entry outside spec.cidr: name only addresses of this prefix").field_path(".reserved"))]
#[x_kube(validation = Rule::new("!has(self.source) || self.source != 'BringYourOwn' || has(self.proof)")
    .message("spec.proof must say with source BringYourOwn what shows that the account may have the range announced, \
              for example the name of an LOA or a ROA").field_path(".source"))]
#[x_kube(validation = Rule::new(
    "!has(self.delegations) || self.delegations.all(it, !has(it.account) || it.account != self.account)"
).message("spec.delegations names spec.account, which may take every address as it is: leave that delegation out")
    .field_path(".delegations"))]
#[x_kube(validation = Rule::new(
    "!has(self.delegations) || !isCIDR(self.cidr) || cidr(self.cidr).prefixLength() != 128 \
     || self.delegations.all(it, it.maxAddresses == 1)"
).message("spec.delegations has a maxAddresses above the number of addresses in spec.cidr, which is one address: delegate 1")
    .field_path(".delegations"))]
#[x_kube(validation = Rule::new(
    "!has(self.delegations) || !isCIDR(self.cidr) || cidr(self.cidr).prefixLength() == 128 \
     || (cidr(self.cidr).ip().family() == 4 ? 32 - cidr(self.cidr).prefixLength() : 64 - cidr(self.cidr).prefixLength()) >= 10 \
     || (cidr(self.cidr).ip().family() == 4 ? 32 - cidr(self.cidr).prefixLength() : 64 - cidr(self.cidr).prefixLength()) < 0 \
     || self.delegations.all(it, it.maxAddresses <= [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]\
     [cidr(self.cidr).ip().family() == 4 ? 32 - cidr(self.cidr).prefixLength() : 64 - cidr(self.cidr).prefixLength()])"
).message("spec.delegations has a maxAddresses above the number of addresses in spec.cidr: delegate at most as many as there are")
    .field_path(".delegations"))]
pub struct AegisPrefixSpec {
    /// Range in CIDR notation without host bits: IPv4 from /16 (the widest) to /32, for example `203.0.113.0/28`, or IPv6
    /// from /32 to /64, for example `2001:db8:1::/48`, or one IPv6 address (`2001:db8::7/128`) for hosts that the provider gives
    /// a single one and no /64. Prefer a /64: over it every protocol leaves and nothing runs out, while from a single address, as from an
    /// IPv4 one, only TCP, UDP and ICMPv6 echo leave, by ports that nodes share (`spec.ports` of the allocation) and that can run
    /// out. The range can't be changed later: create another prefix instead. Prefixes must not overlap; where two do, the older one
    /// (by creation time, then by name) counts and the newer one is not accepted. Nor must a prefix overlap the pods of
    /// a node (`spec.podCIDRs` of the Node) or addresses of Services (ServiceCIDR objects); addresses of nodes that lie in it are reserved by themselves.
    #[schemars(schema_with = "schema::prefix_cidr")]
    pub cidr: String,
    /// Addresses (`203.0.113.1`) or ranges (`203.0.113.4/30`) within `cidr` that must not be allocated, for example
    /// because they are in use elsewhere. At most 64. Of an IPv6 prefix up to /64 each /64 goes of which a part is reserved. Reserving an address that an allocation holds already does not
    /// take it away.
    #[schemars(schema_with = "schema::reserved")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reserved: Vec<String>,
    /// Account (namespace) that owns the prefix: its allocations may take every address. Others may only by `delegations`; one
    /// that owned it before, too, and keeps what it has.
    #[schemars(schema_with = "schema::dns_label")]
    pub account: String,
    /// Where the range comes from. `Leased`: from the provider, which has it announced. `BringYourOwn`: it is the account's,
    /// which must show in `proof` that it may have it announced here. It makes no other difference.
    #[schemars(extend("maxLength" = 12))]
    #[serde(default)]
    pub source: PrefixSource,
    /// What shows that the account may use the range: the name of a letter of authorization (LOA), of a route origin
    /// authorization (ROA), of a contract. It is for those who audit, and nobody checks it. Required with `BringYourOwn`; 1 to
    /// 253 characters.
    #[schemars(length(min = 1, max = 253))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<String>,
    /// Other accounts that may take addresses, each up to a number; at most 64. An account to which several apply may take as
    /// many as the greatest of them. Without one that applies any more, or with a lower `maxAddresses`, an account keeps what it has, in
    /// full service, and gets no further address; the condition `Delegated` tells both sides. Addresses are not set aside: who
    /// comes first has them, up to its number.
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub delegations: Vec<Delegation>,
    /// How the network learns which nodes take packets for the addresses of this prefix. May be changed at any time:
    /// holdings and flows stay as they are.
    #[serde(default)]
    pub announcement: Announcement,
}

/// Where the range of a prefix comes from.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PrefixSource {
    /// From the provider.
    #[default]
    Leased,
    /// From the account itself.
    BringYourOwn,
}

/// Lets other accounts take addresses of a prefix.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "has(self.account) != has(self.namespaceSelector)",
    "must say to whom: either account (a namespace by name) or namespaceSelector (namespaces by their labels)"
))]
pub struct Delegation {
    /// Name of the delegation, unique in the prefix: a DNS label.
    #[schemars(schema_with = "schema::dns_label")]
    pub name: String,
    /// The account, by name. A namespace that is deleted and made again is the same account.
    #[schemars(schema_with = "schema::dns_label")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
    /// Every account whose namespace has such labels, now and later: who may label namespaces decides who they are. It must
    /// not be empty.
    #[schemars(schema_with = "schema::namespace_selector")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_selector: Option<LabelSelector>,
    /// Most addresses (of an IPv6 prefix up to /64, /64s) that an account may have of the prefix, over all of its allocations. With
    /// `namespaceSelector` that is each account's own number. 1 to 1,024, and not more than the prefix has.
    #[schemars(range(min = 1, max = 1024))]
    pub max_addresses: u32,
}

/// How the addresses of a prefix are announced.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Announcement {
    /// `BGP`: every node that holds slices of an address puts a route to it into a routing table of the kernel
    /// (180, unless the agents are told otherwise), from which FRR or BIRD announces it; of a /64 the whole of it, and the /80 that
    /// is the node's own. `L2`: one of the nodes that
    /// hold slices answers ARP for the address, or neighbour solicitations for the IPv6 address or the addresses of the /64. `None`: neither; the network routes the addresses to the nodes by itself,
    /// for example by static routes or a cloud's route table.
    #[serde(default)]
    pub mode: AnnouncementMode,
}

/// Who tells the network where an address is.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum AnnouncementMode {
    /// Every holder, by BGP.
    BGP,
    /// One holder, by ARP or to neighbour solicitations.
    L2,
    /// Nobody: the network routes it.
    #[default]
    None,
}

/// What the operator found.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AegisPrefixStatus {
    /// Addresses of the prefix that can be allocated (reserved ones do not count); of an IPv6 prefix up to /64, /64s.
    #[serde(default)]
    pub addresses: u32,
    /// Addresses that are reserved: by `spec.reserved`, or since they are a node's own.
    #[serde(default)]
    pub reserved: u32,
    /// Addresses that allocations hold.
    #[serde(default)]
    pub used: u32,
    /// Addresses that an allocation can get.
    #[serde(default)]
    pub free: u32,
    /// Who has addresses, by account.
    #[schemars(length(max = 1024), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub accounts: Vec<AccountUse>,
    /// `Accepted`, `Delegated`.
    #[schemars(schema_with = "schema::conditions")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// What an account has of a prefix.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AccountUse {
    /// The account.
    #[schemars(length(max = 63))]
    pub account: String,
    /// `Owner`: `spec.account`. `Delegated`: by one of `spec.delegations`. `Withdrawn`: none of them applies any more.
    pub right: AccountRight,
    /// The delegation that counts.
    #[schemars(length(max = 63))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delegation: Option<String>,
    /// How many it may have by that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_addresses: Option<u32>,
    /// How many it has, also those that drain.
    pub used: u32,
    /// Its allocations that have addresses, by name.
    #[schemars(length(max = 1024), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allocations: Vec<AllocationUse>,
}

/// By which right an account has addresses of a prefix.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum AccountRight {
    /// It owns the prefix.
    #[default]
    Owner,
    /// The prefix is delegated to it.
    Delegated,
    /// The prefix is not delegated to it any more.
    Withdrawn,
}

/// What an allocation has of a prefix.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AllocationUse {
    /// Name.
    #[schemars(length(max = 63))]
    pub name: String,
    /// The addresses, or /64s.
    #[schemars(schema_with = "schema::used_addresses")]
    pub addresses: Vec<String>,
}
