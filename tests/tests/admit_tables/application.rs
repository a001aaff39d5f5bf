//! `EgressApplication`.

use crate::server;
use aegis_tests::admission::{Wrong, all_accepted, all_rejected, manifest};

fn application(spec: &str) -> String {
    manifest("EgressApplication", "case", spec)
}

fn list(count: usize, item: impl Fn(usize) -> String) -> String {
    (0..count).map(item).collect::<Vec<_>>().join(", ")
}

#[test]
fn wrong_applications_are_rejected() {
    let case = |name, spec: &str, field, message| Wrong { name, manifest: application(spec), field, message };
    let part = |name, part: &str, field, message| {
        case(name, &format!("endpoints: [{{hosts: [a.example]}}, {{{part}}}]"), field, message)
    };
    all_rejected(
        &server(),
        &[
            case("no parts", "description: x", "spec.endpoints", "Required value"),
            case("an empty list of parts", "endpoints: []", "spec.endpoints", "at least 1 items"),
            case(
                "too many parts",
                &format!("endpoints: [{}]", list(33, |n| format!("{{cidrs: [20.{n}.0.0/16]}}"))),
                "spec.endpoints",
                "must have at most 32 items",
            ),
            case(
                "too long a description",
                &format!("description: {}, endpoints: [{{hosts: [a.example]}}]", "x".repeat(257)),
                "spec.description",
                "may not be more than 256",
            ),
            part("an empty part", "", "spec.endpoints[1]", "is empty: give cidrs, hosts or ports"),
            part("an unknown field", "countries: [NZ]", "spec.endpoints[1].countries", "unknown field"),
            part(
                "a range with host bits",
                "cidrs: [198.51.100.7/24]",
                "spec.endpoints[1].cidrs[0]",
                "has host bits set",
            ),
            part("loopback", "cidrs: [127.0.0.0/8]", "spec.endpoints[1].cidrs[0]", "is never covered"),
            part(
                "the same range twice",
                "cidrs: [198.51.100.0/24, 198.51.100.0/24]",
                "spec.endpoints[1].cidrs[1]",
                "Duplicate value",
            ),
            part(
                "too many ranges",
                &format!("cidrs: [{}]", list(257, |n| format!("20.{}.{}.0/24", n / 256, n % 256))),
                "spec.endpoints[1].cidrs",
                "must have at most 256 items",
            ),
            part(
                "a name that is none",
                "hosts: ['*example.com']",
                "spec.endpoints[1].hosts[0]",
                "must be a host name such as",
            ),
            part("a port of zero", "ports: [{port: 0}]", "spec.endpoints[1].ports[0].port", "equal to 1"),
            part(
                "an end before the start",
                "ports: [{port: 9, endPort: 8}]",
                "spec.endpoints[1].ports[0].endPort",
                "must not be less than port",
            ),
        ],
    )
    .unwrap();
}

#[test]
fn right_applications_are_accepted() {
    let right = |name, spec: &str| (name, application(spec));
    all_accepted(
        &server(),
        &[
            right(
                "parts of every kind",
                "description: A partner's API, endpoints: [{cidrs: [198.51.100.0/24, '2001:db8::/32'], ports: [{port: 443}]}, \
                 {hosts: ['*.example.com']}, {ports: [{protocol: UDP, port: 53}]}]",
            ),
            right(
                "as many parts as may be, with many ranges, names and ports each",
                &format!(
                    "endpoints: [{}]",
                    list(32, |part| format!(
                        "{{cidrs: [{}], hosts: [{}], ports: [{}]}}",
                        list(256, |n| format!("20.{part}.{n}.0/24")),
                        list(64, |n| format!("'*.{}.{n}.example'", "a".repeat(60))),
                        list(32, |n| format!("{{port: {}, endPort: 65535}}", n + 1))
                    ))
                ),
            ),
        ],
    )
    .unwrap();
}
