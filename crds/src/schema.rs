//! Building blocks of the schemas that `schemars` cannot derive: text with CEL rules, lists of such text, and bounds
//! on foreign types. Every string has a greatest length and every list a greatest size, since the API server refuses
//! a CEL rule whose cost it cannot estimate. Messages name what to write instead; the API server adds the field.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

/// Label keys: an optional DNS subdomain (253), a slash, a name (63).
const LABEL_KEY: u32 = 317;

/// A string of at most `max` characters that obeys `rules` (CEL, message).
fn text(max: u32, rules: &[(&str, &str)]) -> Schema {
    json_schema!({
        "type": "string",
        "minLength": 1,
        "maxLength": max,
        "x-kubernetes-validations": validations(rules),
    })
}

fn validations(rules: &[(&str, &str)]) -> Value {
    rules.iter().map(|(rule, message)| json!({"rule": rule, "message": message})).collect()
}

/// A list of `items` that has no duplicates; the API server itself compares them.
fn set(items: Schema, min: u32, max: u32) -> Schema {
    json_schema!({
        "type": "array",
        "items": items,
        "minItems": min,
        "maxItems": max,
        "x-kubernetes-list-type": "set",
    })
}

/// A list of `items` that is replaced as a whole.
fn atomic(items: Schema, min: u32, max: u32, rules: &[(&str, &str)]) -> Schema {
    let mut schema = json_schema!({
        "type": "array",
        "items": items,
        "minItems": min,
        "maxItems": max,
        "x-kubernetes-list-type": "atomic",
    });
    if !rules.is_empty() {
        schema.insert("x-kubernetes-validations".into(), validations(rules));
    }
    schema
}

/// Name of a namespace, a service account's namespace, a site: a DNS label.
pub fn dns_label(_: &mut SchemaGenerator) -> Schema {
    text(
        63,
        &[(
            "!format.dns1123Label().validate(self).hasValue()",
            "must be a DNS label: at most 63 lower-case letters, digits and '-', and neither the first nor the last a '-'",
        )],
    )
}

/// Name of an object of this group: a DNS subdomain that is short enough for a label value.
pub fn object_name(_: &mut SchemaGenerator) -> Schema {
    subdomain(63)
}

/// Name of a node or a service account: a DNS subdomain.
pub fn long_name(_: &mut SchemaGenerator) -> Schema {
    subdomain(253)
}

fn subdomain(max: u32) -> Schema {
    text(
        max,
        &[(
            "!format.dns1123Subdomain().validate(self).hasValue()",
            "must be the name of an object: lower-case letters, digits, '-' and '.', and a letter or digit first and last",
        )],
    )
}

/// One egress address: an IPv4 address, an IPv6 /64, or an IPv6 address by itself.
pub fn egress_address(_: &mut SchemaGenerator) -> Schema {
    egress_text()
}

fn egress_text() -> Schema {
    text(
        CIDR,
        &[
            (
                "isIP(self) || isCIDR(self) && cidr(self).ip().family() == 6 && cidr(self).prefixLength() == 64",
                "must be an address such as 203.0.113.7 or 2001:db8::7, or an IPv6 range of length 64 such as 2001:db8:1:2::/64",
            ),
            NO_HOST_BITS,
            (
                "(!isCIDR(self) || string(cidr(self)) == self) && (!isIP(self) || string(ip(self)) == self)",
                "must be in its shortest form, in lower case, such as 2001:db8::7 or 2001:db8:1:2::/64: there is one name for each",
            ),
        ],
    )
}

/// Longest text of an IPv6 range.
const CIDR: u32 = 43;

const IS_CIDR: (&str, &str) =
    ("isCIDR(self)", "must be a range in CIDR notation such as 203.0.113.0/28 or 2001:db8:1::/48");
const NO_HOST_BITS: (&str, &str) = (
    "!isCIDR(self) || cidr(self) == cidr(self).masked()",
    "has host bits set: begin with the first address of the range, for example 203.0.113.0/28 and not 203.0.113.5/28",
);

/// `AegisPrefix.spec.cidr`.
pub fn prefix_cidr(_: &mut SchemaGenerator) -> Schema {
    text(
        CIDR,
        &[
            IS_CIDR,
            NO_HOST_BITS,
            (
                "!isCIDR(self) || cidr(self).ip().family() == 6 || cidr(self).prefixLength() >= 16",
                "is too wide: the prefix length must be from /16 to /32",
            ),
            (
                "!isCIDR(self) || cidr(self).ip().family() == 4 \
                 || cidr(self).prefixLength() >= 32 && cidr(self).prefixLength() <= 64 || cidr(self).prefixLength() == 128",
                "must have a prefix length from /32 to /64, of which an allocation gets a whole /64, or /128, which is one address: \
                 for several addresses without a /64 create an AegisPrefix of each",
            ),
            (
                "!isCIDR(self) || !['0.0.0.0/8', '127.0.0.0/8', '169.254.0.0/16', '224.0.0.0/4', '240.0.0.0/4']\
                 .exists(range, cidr(range).containsCIDR(self))",
                "must be unicast addresses that the network can route: not in 0.0.0.0/8, 127.0.0.0/8 (loopback), \
                 169.254.0.0/16 (link-local), 224.0.0.0/4 (multicast) or 240.0.0.0/4 (reserved)",
            ),
            (
                "!isCIDR(self) || cidr(self).ip().family() == 4 \
                 || ['2000::/3', 'fc00::/7'].exists(range, cidr(range).containsCIDR(self))",
                "must be unicast addresses that the network can route: in 2000::/3 (global) or fc00::/7 (unique local)",
            ),
            ("self == oldSelf", "can't be changed: create another AegisPrefix instead"),
        ],
    )
}

/// `AegisPrefix.spec.reserved`.
pub fn reserved(_: &mut SchemaGenerator) -> Schema {
    let item = text(
        CIDR,
        &[
            (
                "isIP(self) || isCIDR(self)",
                "must be an address such as 203.0.113.7 or a range such as 203.0.113.8/30 or 2001:db8:1:2::/64",
            ),
            NO_HOST_BITS,
        ],
    );
    set(item, 0, 64)
}

/// `ZoneBinding.spec.zone.cidrs`.
pub fn zone_cidrs(_: &mut SchemaGenerator) -> Schema {
    set(outside_cidr(), 1, 64)
}

/// `EgressPolicy.spec.match.destination.cidrs`, and those of applications.
pub fn policy_cidrs(_: &mut SchemaGenerator) -> Schema {
    set(outside_cidr(), 1, 256)
}

/// Host names. Written in one form, so that each is named once.
pub fn hosts(_: &mut SchemaGenerator) -> Schema {
    let item = text(
        253,
        &[
            (
                r"self.matches('^(\\*\\.)?[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*$')",
                "must be a host name such as api.example.com, or *.example.com for all names below example.com: labels of letters, \
                 digits, '-' and '_' with dots between, without a dot at the end, and '*' only as the whole first label",
            ),
            ("self == self.lowerAscii()", "must be in lower case: api.example.com, not API.Example.com"),
            (
                // Cheaper than to split it, to the API server's estimate.
                "!self.matches('[^.]{64}')",
                "has a label of more than 63 characters: no such name exists",
            ),
            ("!isIP(self)", "is an address: give it in cidrs, as 203.0.113.7/32"),
        ],
    );
    set(item, 1, 64)
}

fn outside_cidr() -> Schema {
    let outside = (
        "!isCIDR(self) || !['127.0.0.0/8', '169.254.0.0/16', '224.0.0.0/4', '::1/128', 'fe80::/10', 'ff00::/8']\
         .exists(range, cidr(range).containsCIDR(self))",
        "is never covered: 127.0.0.0/8 and ::1/128 (loopback), 169.254.0.0/16 and fe80::/10 (link-local) and 224.0.0.0/4 \
         and ff00::/8 (multicast) do not leave the node's network",
    );
    text(CIDR, &[IS_CIDR, NO_HOST_BITS, outside])
}

/// A range of any addresses.
pub fn cidr(_: &mut SchemaGenerator) -> Schema {
    text(CIDR, &[IS_CIDR, NO_HOST_BITS])
}

/// `EgressPolicy.spec.match.destination.applications`.
pub fn applications(_: &mut SchemaGenerator) -> Schema {
    set(subdomain(63), 1, 32)
}

/// `EgressPolicy.spec.match.sources`.
pub fn source_cidrs(_: &mut SchemaGenerator) -> Schema {
    set(text(CIDR, &[IS_CIDR, NO_HOST_BITS]), 1, 64)
}

/// `EgressPolicy.spec.match.identity.namespaces`.
pub fn namespaces(generator: &mut SchemaGenerator) -> Schema {
    set(dns_label(generator), 1, 64)
}

/// `EgressAllocation.spec.prefixes`: an order of preference, so not a set.
pub fn prefix_names(_: &mut SchemaGenerator) -> Schema {
    atomic(
        subdomain(63),
        1,
        8,
        &[("self.all(name, self.exists_one(other, other == name))", "names a prefix twice: name each once")],
    )
}

/// `EgressAllocation.spec.addresses.explicit`.
pub fn explicit_addresses(_: &mut SchemaGenerator) -> Schema {
    set(egress_text(), 1, 16)
}

/// Addresses in a status.
pub fn used_addresses(_: &mut SchemaGenerator) -> Schema {
    atomic(json_schema!({"type": "string", "maxLength": CIDR}), 0, 1024, &[])
}

/// `ZoneBinding.spec.workloads.serviceAccounts`.
pub fn service_accounts(_: &mut SchemaGenerator) -> Schema {
    set(subdomain(253), 1, 64)
}

/// Labels that must all be there; at least one, since an empty selector would select everything.
pub fn node_selector(_: &mut SchemaGenerator) -> Schema {
    let mut schema = labels();
    schema.insert("minProperties".into(), 1.into());
    schema
}

fn labels() -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 16,
        "additionalProperties": {"type": "string", "maxLength": 63},
        "x-kubernetes-map-type": "atomic",
        "x-kubernetes-validations": validations(&[
            (
                "self.all(key, !format.qualifiedName().validate(key).hasValue())",
                "has a key that is no label key: write name or example.com/name, with letters, digits, '-', '_' and '.'",
            ),
            (
                "self.all(key, !format.labelValue().validate(self[key]).hasValue())",
                "has a value that is no label value: letters, digits, '-', '_' and '.', at most 63",
            ),
        ]),
    })
}

/// `ZoneBinding.spec.workloads.podSelector`.
pub fn pod_selector(_: &mut SchemaGenerator) -> Schema {
    label_selector(
        "pod",
        16,
        "podSelector is empty: give matchLabels or matchExpressions, or say allPods: true to cover every pod",
    )
}

/// `EgressPolicy.spec.match.identity.podSelector`.
pub fn policy_selector(_: &mut SchemaGenerator) -> Schema {
    label_selector(
        "pod",
        16,
        "podSelector is empty: give matchLabels or matchExpressions, or leave it out to match every pod",
    )
}

/// `EgressPolicy.spec.match.identity.namespaceSelector`.
pub fn policy_namespace_selector(_: &mut SchemaGenerator) -> Schema {
    label_selector(
        "namespace",
        16,
        "namespaceSelector is empty: give matchLabels or matchExpressions, or leave it out to match every namespace",
    )
}

/// `EgressPolicy.spec.match.posture.nodeSelector`.
pub fn policy_node_selector(_: &mut SchemaGenerator) -> Schema {
    label_selector(
        "node",
        16,
        "nodeSelector is empty: give matchLabels or matchExpressions, or leave it out to match every node",
    )
}

/// Codes of ISO 3166-1, and XK, by which the databases know Kosovo.
const COUNTRIES: &str = "AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY \
    BZ CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO FR GA GB GD \
    GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP KE KG KH KI KM KN \
    KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR MS MT MU MV MW MX MY MZ NA NC NE \
    NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM \
    SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS YE YT \
    ZA ZM ZW XK";

/// `EgressPolicy.spec.match.destination.countries`.
pub fn countries(_: &mut SchemaGenerator) -> Schema {
    let known = format!("size(self) == 2 && '{COUNTRIES}'.contains(self) && !self.contains(' ')");
    let item = text(
        2,
        &[(
            known.as_str(),
            "must be an ISO 3166-1 alpha-2 code in capitals, such as NZ or DE; the United Kingdom is GB, Greece GR",
        )],
    );
    set(item, 1, 64)
}

/// `AegisPrefix.spec.delegations[].namespaceSelector`.
pub fn namespace_selector(_: &mut SchemaGenerator) -> Schema {
    label_selector(
        "namespace",
        // There are many delegations, and the API server counts what all of their rules may cost.
        8,
        "namespaceSelector is empty: give matchLabels or matchExpressions, or name one namespace by account",
    )
}

/// A `LabelSelector` of objects that are called `what`, with at most so many requirements, that selects something in particular;
/// or else `empty` is said.
fn label_selector(what: &str, requirements: u32, empty: &str) -> Schema {
    let mut match_labels = labels();
    match_labels
        .insert("description".into(), format!("Labels that a {what} must carry, all of them.").into());
    let value = json!({"type": "string", "maxLength": 63});
    json_schema!({
        "type": "object",
        "x-kubernetes-map-type": "atomic",
        "properties": {
            "matchLabels": match_labels,
            "matchExpressions": {
                "description": format!("Requirements on labels that a {what} must meet, all of them."),
                "type": "array",
                "maxItems": requirements,
                "x-kubernetes-list-type": "atomic",
                "items": {
                    "type": "object",
                    "required": ["key", "operator"],
                    "properties": {
                        "key": {
                            "description": "Key of the label.",
                            "type": "string",
                            "minLength": 1,
                            "maxLength": LABEL_KEY,
                            "x-kubernetes-validations": validations(&[(
                                "!format.qualifiedName().validate(self).hasValue()",
                                "must be a label key: name or example.com/name, with letters, digits, '-', '_' and '.'",
                            )]),
                        },
                        "operator": {
                            "description": format!(
                                "`In` and `NotIn` compare the label with `values`; `Exists` and `DoesNotExist` ask only \
                                 whether the {what} has the label."
                            ),
                            "type": "string",
                            "maxLength": 12,
                            "enum": ["In", "NotIn", "Exists", "DoesNotExist"],
                        },
                        "values": {
                            "description": "Values to compare with: at least one for `In` and `NotIn`, none for \
                                            `Exists` and `DoesNotExist`.",
                            "type": "array",
                            "items": value,
                            "maxItems": 16,
                            "x-kubernetes-list-type": "atomic",
                            "x-kubernetes-validations": validations(&[(
                                "self.all(value, !format.labelValue().validate(value).hasValue())",
                                "has an entry that is no label value: letters, digits, '-', '_' and '.', at most 63",
                            )]),
                        },
                    },
                    "x-kubernetes-validations": validations(&[(
                        "self.operator in ['In', 'NotIn'] ? has(self.values) && size(self.values) > 0 \
                         : !has(self.values) || size(self.values) == 0",
                        "values must be given with operator In and NotIn, and left out with Exists and DoesNotExist",
                    )]),
                },
            },
        },
        "x-kubernetes-validations": validations(&[(
            "(has(self.matchLabels) && size(self.matchLabels) > 0) \
             || (has(self.matchExpressions) && size(self.matchExpressions) > 0)",
            empty,
        )]),
    })
}

/// `status.conditions`: one of each type, so that each can be written alone.
pub fn conditions(generator: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": generator.subschema_for::<Condition>(),
        "maxItems": 8,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
    })
}
