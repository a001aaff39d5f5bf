//! `ZoneBinding`.

use crate::server;
use aegis_tests::admission::{Wrong, all_accepted, all_rejected, namespaced};

fn binding(spec: &str) -> String {
    namespaced("ZoneBinding", "shop", "case", spec)
}

fn list(count: usize, item: impl Fn(usize) -> String) -> String {
    (0..count).map(item).collect::<Vec<_>>().join(", ")
}

#[test]
fn wrong_bindings_are_rejected() {
    let case = |name, spec: &str, field, message| Wrong { name, manifest: binding(spec), field, message };
    let workloads = |name, workloads: &str, field, message| {
        case(
            name,
            &format!(
                "allocationRef: {{name: a}}, zone: {{cidrs: [198.51.100.0/24]}}, workloads: {{{workloads}}}"
            ),
            field,
            message,
        )
    };
    let zone = |name, zone: &str, field, message| {
        case(
            name,
            &format!("allocationRef: {{name: a}}, workloads: {{allPods: true}}, zone: {{{zone}}}"),
            field,
            message,
        )
    };
    let ports = |name, port: &str, field, message| {
        zone(name, &format!("cidrs: [198.51.100.0/24], ports: [{port}]"), field, message)
    };
    let rest = "workloads: {allPods: true}, zone: {cidrs: [198.51.100.0/24]}";
    all_rejected(
        &server(),
        &[
            case("no allocation", rest, "spec.allocationRef", "Required value"),
            case(
                "an allocation without a name",
                &format!("{rest}, allocationRef: {{}}"),
                "spec.allocationRef.name",
                "Required value",
            ),
            case(
                "an allocation with an empty name",
                &format!("{rest}, allocationRef: {{name: ''}}"),
                "spec.allocationRef.name",
                "at least 1 chars",
            ),
            case(
                "an allocation that is no name",
                &format!("{rest}, allocationRef: {{name: 'a/b'}}"),
                "spec.allocationRef.name",
                "must be the name of an object",
            ),
            case(
                "an allocation in another namespace",
                &format!("{rest}, allocationRef: {{name: a, namespace: bank}}"),
                "spec.allocationRef.namespace",
                "unknown field",
            ),
            case(
                "an allocation name that is too long",
                &format!("{rest}, allocationRef: {{name: {}}}", "a".repeat(64)),
                "spec.allocationRef.name",
                "Too long",
            ),
            case(
                "no workloads",
                "allocationRef: {name: a}, zone: {cidrs: [198.51.100.0/24]}",
                "spec.workloads",
                "Required value",
            ),
            case(
                "no zone",
                "allocationRef: {name: a}, workloads: {allPods: true}",
                "spec.zone",
                "Required value",
            ),
            case(
                "enabled is a word",
                &format!("{rest}, allocationRef: {{name: a}}, enabled: 'yes'"),
                "spec.enabled",
                "must be of type boolean",
            ),
            case(
                "an unknown fallback",
                &format!("{rest}, allocationRef: {{name: a}}, whenUnavailable: Pass"),
                "spec.whenUnavailable",
                "supported values: \"Drop\", \"UseNodeAddress\"",
            ),
            case(
                "a mode that there is not",
                &format!("{rest}, allocationRef: {{name: a}}, mode: Snat"),
                "spec.mode",
                "supported values: \"Nat\", \"Bind\"",
            ),
            workloads("empty workloads", "", "spec.workloads", "must say which pods"),
            workloads("allPods: false alone", "allPods: false", "spec.workloads", "must say which pods"),
            workloads(
                "all pods and a selector",
                "allPods: true, podSelector: {matchLabels: {a: b}}",
                "spec.workloads",
                "must say which pods",
            ),
            workloads(
                "all pods and service accounts",
                "allPods: true, serviceAccounts: [a]",
                "spec.workloads",
                "must say which pods",
            ),
            workloads(
                "an empty selector",
                "podSelector: {}",
                "spec.workloads.podSelector",
                "podSelector is empty",
            ),
            workloads(
                "a selector of empty parts",
                "podSelector: {matchLabels: {}, matchExpressions: []}",
                "spec.workloads.podSelector",
                "say allPods: true",
            ),
            workloads(
                "a wrong label key",
                "podSelector: {matchLabels: {'/a': b}}",
                "spec.workloads.podSelector.matchLabels",
                "has a key that is no label key",
            ),
            workloads(
                "a wrong label value",
                "podSelector: {matchLabels: {a: -b}}",
                "spec.workloads.podSelector.matchLabels",
                "has a value that is no label value",
            ),
            workloads(
                "too long a label value",
                &format!("podSelector: {{matchLabels: {{a: {}}}}}", "b".repeat(64)),
                "spec.workloads.podSelector.matchLabels.a",
                "Too long",
            ),
            workloads(
                "seventeen labels",
                &format!("podSelector: {{matchLabels: {{{}}}}}", list(17, |n| format!("l{n}: a"))),
                "spec.workloads.podSelector.matchLabels",
                "must have at most 16 items",
            ),
            workloads(
                "an unknown operator",
                "podSelector: {matchExpressions: [{key: a, operator: Gt, values: ['1']}]}",
                "spec.workloads.podSelector.matchExpressions[0].operator",
                "Unsupported value",
            ),
            workloads(
                "In without values",
                "podSelector: {matchExpressions: [{key: a, operator: In}]}",
                "spec.workloads.podSelector.matchExpressions[0]",
                "values must be given",
            ),
            workloads(
                "NotIn with no values",
                "podSelector: {matchExpressions: [{key: a, operator: NotIn, values: []}]}",
                "spec.workloads.podSelector.matchExpressions[0]",
                "values must be given",
            ),
            workloads(
                "Exists with values",
                "podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}",
                "spec.workloads.podSelector.matchExpressions[0]",
                "left out with Exists",
            ),
            workloads(
                "an expression with a wrong key",
                "podSelector: {matchExpressions: [{key: 'a b', operator: Exists}]}",
                "spec.workloads.podSelector.matchExpressions[0].key",
                "must be a label key",
            ),
            workloads(
                "an expression with a wrong value",
                "podSelector: {matchExpressions: [{key: a, operator: In, values: ['b c']}]}",
                "spec.workloads.podSelector.matchExpressions[0].values",
                "no label value",
            ),
            workloads(
                "an empty list of service accounts",
                "serviceAccounts: []",
                "spec.workloads.serviceAccounts",
                "should have at least 1 items",
            ),
            workloads(
                "a service account that is no name",
                "serviceAccounts: ['shop:settlement']",
                "spec.workloads.serviceAccounts[0]",
                "must be the name of an object",
            ),
            workloads(
                "a service account twice",
                "serviceAccounts: [a, a]",
                "spec.workloads.serviceAccounts[1]",
                "Duplicate value",
            ),
            workloads(
                "65 service accounts",
                &format!("serviceAccounts: [{}]", list(65, |n| format!("s{n}"))),
                "spec.workloads.serviceAccounts",
                "must have at most 64 items",
            ),
            zone(
                "loopback",
                "cidrs: [198.51.100.0/24, 127.0.0.0/8]",
                "spec.zone.cidrs[1]",
                "is never covered",
            ),
            zone(
                "one address of loopback",
                "cidrs: [127.0.0.53/32]",
                "spec.zone.cidrs[0]",
                "is never covered",
            ),
            zone("link-local", "cidrs: [169.254.169.254/32]", "spec.zone.cidrs[0]", "is never covered"),
            zone("multicast", "cidrs: [239.0.0.0/8]", "spec.zone.cidrs[0]", "is never covered"),
            zone("nowhere", "ports: [{port: 443}]", "spec.zone", "is empty: give cidrs or hosts, or both"),
            zone("an empty list of ranges", "cidrs: []", "spec.zone.cidrs", "should have at least 1 items"),
            zone(
                "65 ranges",
                &format!("cidrs: [{}]", list(65, |n| format!("198.51.100.{n}/32"))),
                "spec.zone.cidrs",
                "must have at most 64 items",
            ),
            zone(
                "an address without a length",
                "cidrs: [198.51.100.1]",
                "spec.zone.cidrs[0]",
                "must be a range in CIDR notation",
            ),
            zone(
                "a host name",
                "cidrs: [bank.example]",
                "spec.zone.cidrs[0]",
                "must be a range in CIDR notation",
            ),
            zone(
                "IPv6 with host bits",
                "cidrs: ['2001:db8:1::1/48']",
                "spec.zone.cidrs[0]",
                "has host bits set",
            ),
            zone(
                "an IPv6 address",
                "cidrs: ['2001:db8::1']",
                "spec.zone.cidrs[0]",
                "must be a range in CIDR notation",
            ),
            zone("IPv6 loopback", "cidrs: ['::1/128']", "spec.zone.cidrs[0]", "is never covered"),
            zone("IPv6 link-local", "cidrs: ['fe80::/64']", "spec.zone.cidrs[0]", "is never covered"),
            zone("IPv6 multicast", "cidrs: ['ff02::/16']", "spec.zone.cidrs[0]", "is never covered"),
            zone(
                "host bits",
                "cidrs: [198.51.100.0/24, 192.0.2.1/24]",
                "spec.zone.cidrs[1]",
                "has host bits set",
            ),
            zone(
                "a range twice",
                "cidrs: [198.51.100.0/24, 198.51.100.0/24]",
                "spec.zone.cidrs[1]",
                "Duplicate value",
            ),
            zone("no host names", "hosts: []", "spec.zone.hosts", "should have at least 1 items"),
            zone("an empty name", "hosts: ['']", "spec.zone.hosts[0]", "should be at least 1 chars long"),
            zone("everything", "hosts: ['*']", "spec.zone.hosts[0]", "must be a host name such as"),
            zone(
                "a wildcard in the middle",
                "hosts: [a.example, 'a.*.example']",
                "spec.zone.hosts[1]",
                "'*' only as the whole first label",
            ),
            zone(
                "half a wildcard",
                "hosts: ['a*.example']",
                "spec.zone.hosts[0]",
                "'*' only as the whole first label",
            ),
            zone(
                "a dot at the end",
                "hosts: [bank.example.]",
                "spec.zone.hosts[0]",
                "without a dot at the end",
            ),
            zone("two dots", "hosts: [bank..example]", "spec.zone.hosts[0]", "must be a host name such as"),
            zone(
                "a hyphen at an end",
                "hosts: [bank-.example]",
                "spec.zone.hosts[0]",
                "must be a host name such as",
            ),
            zone(
                "a URL",
                "hosts: ['https://bank.example/']",
                "spec.zone.hosts[0]",
                "must be a host name such as",
            ),
            zone("capitals", "hosts: [Bank.example]", "spec.zone.hosts[0]", "must be in lower case"),
            zone("an address as a name", "hosts: [198.51.100.7]", "spec.zone.hosts[0]", "give it in cidrs"),
            zone(
                "a label that is too long",
                &format!("hosts: [{}.example]", "a".repeat(64)),
                "spec.zone.hosts[0]",
                "more than 63 characters",
            ),
            zone(
                "a name that is too long",
                &format!("hosts: [{}example]", "a.".repeat(124)),
                "spec.zone.hosts[0]",
                "may not be more than 253 bytes",
            ),
            zone("a name twice", "hosts: [a.example, a.example]", "spec.zone.hosts[1]", "Duplicate value"),
            zone(
                "65 names",
                &format!("hosts: [{}]", list(65, |n| format!("h{n}.example"))),
                "spec.zone.hosts",
                "must have at most 64 items",
            ),
            ports("port 0", "{port: 0}", "spec.zone.ports[0].port", "greater than or equal to 1"),
            ports("port 65536", "{port: 65536}", "spec.zone.ports[0].port", "less than or equal to 65535"),
            ports(
                "a port that is a word",
                "{port: https}",
                "spec.zone.ports[0].port",
                "must be of type integer",
            ),
            ports(
                "a port of ICMP",
                "{protocol: ICMP, port: 8}",
                "spec.zone.ports[0].port",
                "must be left out with protocol ICMP, which has no ports",
            ),
            ports(
                "an end without a beginning",
                "{endPort: 443}",
                "spec.zone.ports[0].endPort",
                "endPort needs port, the first of the range",
            ),
            ports(
                "a reversed range",
                "{port: 443, endPort: 80}",
                "spec.zone.ports[0].endPort",
                "must not be less than port",
            ),
            ports(
                "an end beyond 65535",
                "{port: 443, endPort: 70000}",
                "spec.zone.ports[0].endPort",
                "less than or equal to 65535",
            ),
            ports(
                "an unknown protocol",
                "{protocol: SCTP, port: 1}",
                "spec.zone.ports[0].protocol",
                "supported values: \"TCP\", \"UDP\", \"ICMP\"",
            ),
            ports(
                "33 ports",
                Box::leak(list(33, |n| format!("{{port: {}}}", n + 1)).into_boxed_str()),
                "spec.zone.ports",
                "must have at most 32 items",
            ),
            Wrong {
                name: "a name that is too long",
                manifest: namespaced(
                    "ZoneBinding",
                    "shop",
                    &"n".repeat(64),
                    &format!("{rest}, allocationRef: {{name: a}}"),
                ),
                field: "metadata.name",
                message: "at most 63 characters",
            },
        ],
    )
    .unwrap();
}

#[test]
fn right_bindings_are_accepted() {
    let right = |name, workloads: &str, zone: &str, more: &str| {
        (
            name,
            binding(&format!(
                "allocationRef: {{name: a}}, workloads: {{{workloads}}}, zone: {{{zone}}}{more}"
            )),
        )
    };
    let cidrs = "cidrs: [198.51.100.0/24]";
    all_accepted(
        &server(),
        &[
            right("all pods", "allPods: true", cidrs, ""),
            right(
                "labels",
                "podSelector: {matchLabels: {app: a, example.com/tier: '', app.kubernetes.io/name: x}}",
                cidrs,
                "",
            ),
            right(
                "expressions",
                "podSelector: {matchExpressions: [{key: a, operator: In, values: [b, '']}, {key: c, operator: DoesNotExist}, {key: d, operator: Exists, values: []}]}",
                cidrs,
                "",
            ),
            right("service accounts", "serviceAccounts: [a, b.c]", cidrs, ""),
            right(
                "labels and service accounts",
                "podSelector: {matchLabels: {a: b}}, serviceAccounts: [a]",
                cidrs,
                "",
            ),
            right(
                "allPods: false beside labels",
                "allPods: false, podSelector: {matchLabels: {a: b}}",
                cidrs,
                "",
            ),
            right("everything", "allPods: true", "cidrs: [0.0.0.0/0, '::/0']", ""),
            right(
                "64 IPv6 ranges",
                "allPods: true",
                &format!("cidrs: [{}]", list(64, |n| format!("'2001:db8:{n}:ffff:ffff:ffff:ffff:ffff/128'"))),
                "",
            ),
            right("a range that contains ones that are never covered", "allPods: true", "cidrs: [128.0.0.0/1]", ""),
            right(
                "64 ranges",
                "allPods: true",
                &format!("cidrs: [{}]", list(64, |n| format!("198.51.100.{n}/32"))),
                "",
            ),
            right(
                "32 ports",
                "allPods: true",
                &format!(
                    "{cidrs}, ports: [{}]",
                    list(32, |n| format!("{{port: {}, endPort: 65535}}", n + 1))
                ),
                "",
            ),
            right(
                "one port as a range, UDP",
                "allPods: true",
                &format!("{cidrs}, ports: [{{protocol: UDP, port: 53, endPort: 53}}]"),
                "",
            ),
            right(
                "switched off, with a fallback",
                "allPods: true",
                cidrs,
                ", enabled: false, whenUnavailable: UseNodeAddress",
            ),
            right("sockets with addresses", "allPods: true", cidrs, ", mode: Bind"),
            right("translation", "allPods: true", cidrs, ", mode: Nat"),
        ],
    )
    .unwrap();
}
