//! `EgressPolicy`.

use crate::server;
use aegis_tests::admission::{Wrong, all_accepted, all_rejected, manifest};

fn policy(spec: &str) -> String {
    manifest("EgressPolicy", "case", spec)
}

fn list(count: usize, item: impl Fn(usize) -> String) -> String {
    (0..count).map(item).collect::<Vec<_>>().join(", ")
}

#[test]
fn wrong_policies_are_rejected() {
    let case = |name, spec: &str, field, message| Wrong { name, manifest: policy(spec), field, message };
    let matching = |name, matching: &str, field, message| {
        case(name, &format!("precedence: 1, action: Deny, match: {{{matching}}}"), field, message)
    };
    let egress = |name, egress: &str, field, message| {
        case(name, &format!("precedence: 1, egress: {{{egress}}}"), field, message)
    };
    all_rejected(
        &server(),
        &[
            case("no precedence", "action: Deny", "spec.precedence", "Required value"),
            case(
                "a negative precedence",
                "precedence: -1, action: Deny",
                "spec.precedence",
                "greater than or equal to 0",
            ),
            case(
                "too high a precedence",
                "precedence: 1000001, action: Deny",
                "spec.precedence",
                "less than or equal to 1000000",
            ),
            case(
                "an unknown action",
                "precedence: 1, action: Drop",
                "spec.action",
                "supported values: \"Egress\", \"Default\", \"Deny\"",
            ),
            case("nothing to leave from", "precedence: 1", "spec", "egress must be given with action Egress"),
            case(
                "an egress that is denied",
                "precedence: 1, action: Deny, egress: {primary: a}",
                "spec",
                "left out with Default and Deny",
            ),
            case(
                "an unknown field",
                "precedence: 1, action: Deny, countries: [NZ]",
                "spec.countries",
                "unknown field",
            ),
            case(
                "an unknown mode",
                "precedence: 1, action: Deny, mode: Audit",
                "spec.mode",
                "supported values: \"Enforce\", \"Observe\"",
            ),
            egress("no primary", "", "spec.egress.primary", "Required value"),
            egress(
                "a primary that is no name",
                "primary: 'a/b'",
                "spec.egress.primary",
                "must be the name of an object",
            ),
            egress(
                "an allocation of another account",
                "primary: a, namespace: bank",
                "spec.egress.namespace",
                "unknown field",
            ),
            egress(
                "twice the same",
                "primary: a, secondary: a",
                "spec.egress.secondary",
                "must be another allocation than primary",
            ),
            matching(
                "a namespace that is none",
                "identity: {namespaces: ['A']}",
                "spec.match.identity.namespaces[0]",
                "must be a DNS label",
            ),
            matching(
                "no namespaces",
                "identity: {namespaces: []}",
                "spec.match.identity.namespaces",
                "at least 1 items",
            ),
            matching(
                "an empty selector of namespaces",
                "identity: {namespaceSelector: {}}",
                "spec.match.identity.namespaceSelector",
                "leave it out to match every namespace",
            ),
            matching(
                "an empty posture",
                "posture: {}",
                "spec.match.posture",
                "leave posture out to match any",
            ),
            matching(
                "an empty selector of nodes",
                "posture: {nodeSelector: {}}",
                "spec.match.posture.nodeSelector",
                "leave it out to match every node",
            ),
            matching(
                "a requirement without values",
                "posture: {nodeSelector: {matchExpressions: [{key: attested, operator: NotIn}]}}",
                "spec.match.posture.nodeSelector.matchExpressions[0]",
                "values must be given with operator In and NotIn",
            ),
            matching(
                "a condition without status",
                "posture: {nodeConditions: [{type: Ready}]}",
                "spec.match.posture.nodeConditions[0].status",
                "Required value",
            ),
            matching(
                "a status that is none",
                "posture: {podConditions: [{type: Ready, status: Maybe}]}",
                "spec.match.posture.podConditions[0].status",
                "supported values: \"True\", \"False\", \"Unknown\"",
            ),
            matching(
                "a condition with two statuses",
                "posture: {nodeConditions: [{type: Ready, status: 'True'}, {type: Ready, status: 'False'}]}",
                "spec.match.posture.nodeConditions[1]",
                "Duplicate value",
            ),
            matching(
                "no conditions",
                "posture: {nodeConditions: []}",
                "spec.match.posture.nodeConditions",
                "at least 1 items",
            ),
            matching(
                "a country in small letters",
                "destination: {countries: [nz]}",
                "spec.match.destination.countries[0]",
                "must be an ISO 3166-1 alpha-2 code in capitals",
            ),
            matching(
                "a country by another code",
                "destination: {countries: [DE, UK]}",
                "spec.match.destination.countries[1]",
                "the United Kingdom is GB",
            ),
            matching(
                "a country by its name",
                "destination: {countries: [France]}",
                "spec.match.destination.countries[0]",
                "may not be more than 2",
            ),
            matching(
                "the same country twice",
                "destination: {countries: [NZ, NZ]}",
                "spec.match.destination.countries[1]",
                "Duplicate value",
            ),
            matching(
                "no countries",
                "destination: {countries: []}",
                "spec.match.destination.countries",
                "at least 1 items",
            ),
            matching(
                "service accounts of any namespace",
                "identity: {serviceAccounts: [a]}",
                "spec.match.identity",
                "serviceAccounts need namespaces",
            ),
            matching(
                "an empty selector",
                "identity: {podSelector: {}}",
                "spec.match.identity.podSelector",
                "leave it out to match every pod",
            ),
            matching(
                "a source with host bits",
                "sources: [10.0.0.1/8]",
                "spec.match.sources[0]",
                "has host bits set",
            ),
            matching(
                "a source that is no range",
                "sources: [10.0.0.1]",
                "spec.match.sources[0]",
                "must be a range in CIDR notation",
            ),
            matching("no sources", "sources: []", "spec.match.sources", "at least 1 items"),
            matching(
                "an empty destination",
                "destination: {}",
                "spec.match.destination",
                "leave destination out to match all",
            ),
            matching(
                "a destination with host bits",
                "destination: {cidrs: [198.51.100.7/24]}",
                "spec.match.destination.cidrs[0]",
                "has host bits set",
            ),
            matching(
                "loopback",
                "destination: {cidrs: [127.0.0.0/8]}",
                "spec.match.destination.cidrs[0]",
                "is never covered",
            ),
            matching(
                "the same destination twice",
                "destination: {cidrs: [198.51.100.0/24, 198.51.100.0/24]}",
                "spec.match.destination.cidrs[1]",
                "Duplicate value",
            ),
            matching(
                "a name that is none",
                "destination: {hosts: ['*example.com']}",
                "spec.match.destination.hosts[0]",
                "must be a host name such as",
            ),
            matching(
                "too many names",
                &format!("destination: {{hosts: [{}]}}", list(65, |n| format!("h{n}.example"))),
                "spec.match.destination.hosts",
                "must have at most 64 items",
            ),
            matching(
                "a port of zero",
                "destination: {ports: [{port: 0}]}",
                "spec.match.destination.ports[0].port",
                "greater than or equal to 1",
            ),
            matching(
                "an end before the start",
                "destination: {ports: [{port: 9, endPort: 8}]}",
                "spec.match.destination.ports[0].endPort",
                "must not be less than port",
            ),
            matching(
                "an application that has no name",
                "destination: {applications: [Ledger]}",
                "spec.match.destination.applications[0]",
                "must be the name of an object",
            ),
            matching(
                "an application twice",
                "destination: {applications: [ledger, ledger]}",
                "spec.match.destination.applications[1]",
                "Duplicate value",
            ),
            matching(
                "no applications",
                "destination: {applications: []}",
                "spec.match.destination.applications",
                "at least 1 items",
            ),
            matching(
                "too many applications",
                &format!("destination: {{applications: [{}]}}", list(33, |n| format!("a{n}"))),
                "spec.match.destination.applications",
                "must have at most 32 items",
            ),
            matching(
                "ports beside applications",
                "destination: {applications: [ledger], ports: [{port: 443}]}",
                "spec.match.destination",
                "ports can't be given with applications",
            ),
            matching(
                "too many destinations",
                &format!(
                    "destination: {{cidrs: [{}]}}",
                    list(257, |n| format!("20.{}.{}.0/24", n / 256, n % 256))
                ),
                "spec.match.destination.cidrs",
                "must have at most 256 items",
            ),
        ],
    )
    .unwrap();
}

#[test]
fn right_policies_are_accepted() {
    let right = |name, spec: &str| (name, policy(spec));
    all_accepted(
        &server(),
        &[
            right("everything is denied", "precedence: 1000000, action: Deny"),
            right("everything leaves from one allocation", "precedence: 0, egress: {primary: a}"),
            right("with another one in reserve", "precedence: 0, action: Egress, egress: {primary: a, secondary: b}"),
            right("with the node's address", "precedence: 7, action: Default, match: {sources: [10.244.1.0/24, 'fd00::/8']}"),
            right(
                "all of an identity",
                "precedence: 7, action: Deny, match: {identity: {namespaces: [shop], podSelector: {matchLabels: {app: web}}, \
                 serviceAccounts: [web, 'system.web'], hostNetwork: true}}",
            ),
            right(
                "posture and countries, to be observed",
                "precedence: 7, action: Deny, mode: Observe, match: {identity: {namespaceSelector: {matchLabels: {tier: gold}}}, \
                 posture: {nodeSelector: {matchExpressions: [{key: attested, operator: DoesNotExist}]}, \
                 nodeConditions: [{type: example.com/Attested, status: Unknown}], podConditions: [{type: Ready, status: 'True'}]}, \
                 destination: {countries: [NZ, GB, XK]}}",
            ),
            right(
                "64 names and as many ranges as may be",
                &format!(
                    "precedence: 7, action: Deny, match: {{destination: {{hosts: [{}], cidrs: [{}]}}}}",
                    list(64, |n| format!("'*.{}.{n}.example'", "a".repeat(60))),
                    list(256, |n| format!("20.{n}.0.0/16"))
                ),
            ),
            right(
                "applications beside ranges, names and countries",
                &format!(
                    "precedence: 7, action: Deny, match: {{destination: {{cidrs: [198.51.100.0/24], hosts: [a.example], \
                     countries: [NZ], applications: [{}]}}}}",
                    list(32, |n| format!("a{n}.b"))
                ),
            ),
            right("names alone", "precedence: 7, action: Default, match: {destination: {hosts: [_a.b-c.example]}}"),
            right(
                "256 ranges of 32 ports",
                &format!(
                    "precedence: 7, action: Deny, match: {{destination: {{cidrs: [{}], ports: [{}]}}}}",
                    list(256, |n| format!("20.{n}.0.0/16")),
                    list(32, |n| format!("{{port: {}, endPort: 65535}}", n + 1))
                ),
            ),
        ],
    )
    .unwrap();
}
