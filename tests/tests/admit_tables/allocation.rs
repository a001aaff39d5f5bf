//! `EgressAllocation`.

use crate::server;
use aegis_tests::admission::{Wrong, all_accepted, all_rejected, namespaced};

fn allocation(spec: &str) -> String {
    namespaced("EgressAllocation", "shop", "case", spec)
}

/// A list of as many quoted words.
fn words(count: usize, word: impl Fn(usize) -> String) -> String {
    (0..count).map(|index| format!("'{}'", word(index))).collect::<Vec<_>>().join(", ")
}

#[test]
fn wrong_allocations_are_rejected() {
    let case = |name, spec: &str, field, message| Wrong { name, manifest: allocation(spec), field, message };
    let with =
        |name, spec: &str, field, message| case(name, &format!("prefixes: [p], {spec}"), field, message);
    let site = |name: &str| format!("{{name: {name}, nodeSelector: {{zone: {name}}}}}");
    let five = ["a", "b", "c", "d", "e"].map(site).join(", ");
    all_rejected(
        &server(),
        &[
            case("no prefixes", "addresses: {ipv4: 1}", "spec.prefixes", "Required value"),
            case(
                "an empty list of prefixes",
                "prefixes: []",
                "spec.prefixes",
                "should have at least 1 items",
            ),
            case(
                "nine prefixes",
                &format!("prefixes: [{}]", words(9, |n| format!("p{n}"))),
                "spec.prefixes",
                "must have at most 8 items",
            ),
            case("a prefix twice", "prefixes: [p, q, p]", "spec.prefixes", "names a prefix twice"),
            case(
                "a prefix that is no name",
                "prefixes: [P_1]",
                "spec.prefixes[0]",
                "must be the name of an object",
            ),
            case(
                "a prefix name that is too long",
                &format!("prefixes: [{}]", "p".repeat(64)),
                "spec.prefixes[0]",
                "Too long: may not be more than 63",
            ),
            case(
                "a range in place of a prefix name",
                "prefixes: [203.0.113.0/28]",
                "spec.prefixes[0]",
                "must be the name of an object",
            ),
            with("no address", "addresses: {ipv4: 0}", "spec.addresses.ipv4", "greater than or equal to 1"),
            with(
                "a deadline without mode Time",
                "fence: {afterSeconds: 60}",
                "spec.fence.afterSeconds",
                "set mode to Time",
            ),
            with(
                "a deadline that is too short",
                "fence: {mode: Time, afterSeconds: 14}",
                "spec.fence.afterSeconds",
                "greater than or equal to 15",
            ),
            with(
                "a deadline that is too long",
                "fence: {mode: Time, afterSeconds: 3601}",
                "spec.fence.afterSeconds",
                "less than or equal to 3600",
            ),
            with("an unknown fence", "fence: {mode: Never}", "spec.fence.mode", "Unsupported value"),
            with(
                "seventeen addresses",
                "addresses: {ipv4: 17}",
                "spec.addresses.ipv4",
                "less than or equal to 16",
            ),
            with(
                "half an address",
                "addresses: {ipv4: 1.5}",
                "spec.addresses.ipv4",
                "must be of type integer",
            ),
            with(
                "neither number nor list",
                "addresses: {}",
                "spec.addresses",
                "(how many) or explicit (exactly which)",
            ),
            with(
                "number and list",
                "addresses: {ipv4: 1, explicit: [203.0.113.1]}",
                "spec.addresses",
                "and not both",
            ),
            with("no /64", "addresses: {ipv6: 0}", "spec.addresses.ipv6", "greater than or equal to 1"),
            with(
                "seventeen /64s",
                "addresses: {ipv6: 17}",
                "spec.addresses.ipv6",
                "less than or equal to 16",
            ),
            with(
                "number of /64s and list",
                "addresses: {ipv6: 1, explicit: [203.0.113.1]}",
                "spec.addresses",
                "and not both",
            ),
            with(
                "explicit: empty",
                "addresses: {explicit: []}",
                "spec.addresses.explicit",
                "should have at least 1 items",
            ),
            with(
                "explicit: a range",
                "addresses: {explicit: [203.0.113.0/30]}",
                "spec.addresses.explicit[0]",
                "must be an address such as 203.0.113.7",
            ),
            with(
                "explicit: one address of IPv6 as a range",
                "addresses: {explicit: ['2001:db8::1/128']}",
                "spec.addresses.explicit[0]",
                "or an IPv6 range of length 64",
            ),
            with(
                "explicit: one address of IPv6, not in its shortest form",
                "addresses: {explicit: ['2001:db8:0::1']}",
                "spec.addresses.explicit[0]",
                "must be in its shortest form",
            ),
            with(
                "explicit: IPv6, not in its shortest form",
                "addresses: {explicit: ['2001:DB8:0:0::/64']}",
                "spec.addresses.explicit[0]",
                "must be in its shortest form",
            ),
            with(
                "explicit: one twice",
                "addresses: {explicit: [203.0.113.1, 203.0.113.1]}",
                "spec.addresses.explicit[1]",
                "Duplicate value",
            ),
            with(
                "explicit: seventeen",
                &format!("addresses: {{explicit: [{}]}}", words(17, |n| format!("203.0.113.{n}"))),
                "spec.addresses.explicit",
                "must have at most 16 items",
            ),
            with("five sites", &format!("sites: [{five}]"), "spec.sites", "must have at most 4 items"),
            with(
                "a site twice",
                &format!("sites: [{0}, {0}]", site("a")),
                "spec.sites[1]",
                "Duplicate value",
            ),
            with(
                "a site without a name",
                "sites: [{nodeSelector: {zone: a}}]",
                "spec.sites[0].name",
                "Required value",
            ),
            with(
                "a site whose name is no label",
                "sites: [{name: Zone A, nodeSelector: {zone: a}}]",
                "spec.sites[0].name",
                "must be a DNS label",
            ),
            with(
                "a site without a selector",
                "sites: [{name: a}]",
                "spec.sites[0].nodeSelector",
                "Required value",
            ),
            with(
                "a site with an empty selector",
                "sites: [{name: a, nodeSelector: {}}]",
                "spec.sites[0].nodeSelector",
                "at least 1 properties",
            ),
            with(
                "a site with a wrong label key",
                "sites: [{name: a, nodeSelector: {'a b': c}}]",
                "spec.sites[0].nodeSelector",
                "has a key that is no label key",
            ),
            with(
                "a site with a wrong label value",
                "sites: [{name: a, nodeSelector: {a: 'b c'}}]",
                "spec.sites[0].nodeSelector",
                "has a value that is no label value",
            ),
            with(
                "a site without any share",
                "sites: [{name: a, nodeSelector: {a: b}, weight: 0}]",
                "spec.sites[0].weight",
                "greater than or equal to 1",
            ),
            with(
                "a weight that is too large",
                "sites: [{name: a, nodeSelector: {a: b}, weight: 1001}]",
                "spec.sites[0].weight",
                "less than or equal to 1000",
            ),
            with(
                "a weight that is no number",
                "sites: [{name: a, nodeSelector: {a: b}, weight: most}]",
                "spec.sites[0].weight",
                "must be of type integer",
            ),
            with(
                "ports below 1024",
                "ports: {first: 768}",
                "spec.ports.first",
                "greater than or equal to 1024",
            ),
            with(
                "a first port within a slice",
                "ports: {first: 1025}",
                "spec.ports.first",
                "must be a multiple of 256",
            ),
            with(
                "a first port that is too high",
                "ports: {first: 65536}",
                "spec.ports.first",
                "less than or equal to 65280",
            ),
            with(
                "a last port within a slice",
                "ports: {last: 65000}",
                "spec.ports.last",
                "must be one less than a multiple of 256",
            ),
            with(
                "a last port that is too high",
                "ports: {last: 65791}",
                "spec.ports.last",
                "less than or equal to 65535",
            ),
            with(
                "a reversed range",
                "ports: {first: 32768, last: 16383}",
                "spec.ports.first",
                "must be less than spec.ports.last",
            ),
            with(
                "no slice for each node",
                "ports: {perNode: {min: 0}}",
                "spec.ports.perNode.min",
                "greater than or equal to 1",
            ),
            with(
                "253 slices",
                "ports: {perNode: {max: 253}}",
                "spec.ports.perNode.max",
                "less than or equal to 252",
            ),
            with(
                "min above max",
                "ports: {perNode: {min: 9, max: 8}}",
                "spec.ports.perNode.min",
                "must not be greater than spec.ports.perNode.max",
            ),
            with(
                "min above the default of max",
                "ports: {perNode: {min: 300}}",
                "spec.ports.perNode.min",
                "less than or equal to 252",
            ),
            with(
                "min above the ports",
                "ports: {first: 32768, last: 33791, perNode: {min: 5}}",
                "spec.ports.perNode",
                "is more than the ports from first to last give",
            ),
            with(
                "a target of 0 percent",
                "capacity: {targetPercent: 0}",
                "spec.capacity.targetPercent",
                "greater than or equal to 1",
            ),
            with(
                "a target above 100 percent",
                "capacity: {targetPercent: 101}",
                "spec.capacity.targetPercent",
                "less than or equal to 100",
            ),
            with(
                "TCP dies early",
                "timeouts: {tcpEstablishedSeconds: 239}",
                "spec.timeouts.tcpEstablishedSeconds",
                "greater than or equal to 240",
            ),
            with(
                "TCP lives for ever",
                "timeouts: {tcpEstablishedSeconds: 864001}",
                "spec.timeouts.tcpEstablishedSeconds",
                "less than or equal to 864000",
            ),
            with(
                "no time to open",
                "timeouts: {tcpTransitorySeconds: 29}",
                "spec.timeouts.tcpTransitorySeconds",
                "greater than or equal to 30",
            ),
            with(
                "no rest",
                "timeouts: {tcpClosedSeconds: 0}",
                "spec.timeouts.tcpClosedSeconds",
                "greater than or equal to 1",
            ),
            with(
                "too long a rest",
                "timeouts: {tcpClosedSeconds: 241}",
                "spec.timeouts.tcpClosedSeconds",
                "less than or equal to 240",
            ),
            with(
                "UDP dies early",
                "timeouts: {udpSeconds: 29}",
                "spec.timeouts.udpSeconds",
                "greater than or equal to 30",
            ),
            with(
                "ICMP dies early",
                "timeouts: {icmpSeconds: 9}",
                "spec.timeouts.icmpSeconds",
                "greater than or equal to 10",
            ),
            with(
                "ports rest for too long",
                "timeouts: {restSeconds: 3601}",
                "spec.timeouts.restSeconds",
                "less than or equal to 3600",
            ),
            with(
                "ports rest for less than no time",
                "timeouts: {restSeconds: -1}",
                "spec.timeouts.restSeconds",
                "greater than or equal to 0",
            ),
            with(
                "more ports rest than there are",
                "timeouts: {maxRestingPorts: 1000001}",
                "spec.timeouts.maxRestingPorts",
                "less than or equal to 1000000",
            ),
            with(
                "limits of nothing",
                "limits: {perPod: {}}",
                "spec.limits.perPod",
                "must have flows, newFlowsPerSecond or both",
            ),
            with(
                "no flow at all",
                "limits: {perPod: {flows: 0}}",
                "spec.limits.perPod.flows",
                "greater than or equal to 1",
            ),
            with(
                "more flows than there are",
                "limits: {perPod: {flows: 1000001}}",
                "spec.limits.perPod.flows",
                "less than or equal to 1000000",
            ),
            with(
                "no new flow at all",
                "limits: {perPod: {newFlowsPerSecond: 0}}",
                "spec.limits.perPod.newFlowsPerSecond",
                "greater than or equal to 1",
            ),
            with(
                "too many new flows",
                "limits: {perPod: {newFlowsPerSecond: 1000001}}",
                "spec.limits.perPod.newFlowsPerSecond",
                "less than or equal to 1000000",
            ),
            with(
                "the account's limit, which is the platform's",
                "limits: {account: {flows: 5}}",
                "spec.limits.account",
                "unknown field",
            ),
            with(
                "a time-out with a unit",
                "timeouts: {udpSeconds: 30s}",
                "spec.timeouts.udpSeconds",
                "must be of type integer",
            ),
            Wrong {
                name: "a name that is too long",
                manifest: namespaced("EgressAllocation", "shop", &"n".repeat(64), "prefixes: [p]"),
                field: "metadata.name",
                message: "at most 63 characters",
            },
        ],
    )
    .unwrap();
}

#[test]
fn right_allocations_are_accepted() {
    let right = |name, spec: &str| (name, allocation(spec));
    all_accepted(
        &server(),
        &[
            right("nothing but a prefix", "prefixes: [p]"),
            right("eight prefixes", &format!("prefixes: [{}]", words(8, |n| format!("p{n}")))),
            right("sixteen addresses", "prefixes: [p], addresses: {ipv4: 16}"),
            right("sixteen /64s", "prefixes: [p], addresses: {ipv6: 16}"),
            right("both kinds", "prefixes: [p], addresses: {ipv4: 2, ipv6: 1}"),
            right(
                "a list of all kinds",
                "prefixes: [p], addresses: {explicit: [203.0.113.1, '2001:db8:1:2::/64', '2001:db8::7']}",
            ),
            right(
                "sixteen explicit addresses",
                &format!(
                    "prefixes: [p], addresses: {{explicit: [{}]}}",
                    words(16, |n| format!("203.0.113.{n}"))
                ),
            ),
            right(
                "four sites",
                "prefixes: [p], sites: [{name: a, nodeSelector: {z: a}}, {name: b, nodeSelector: {z: b}}, {name: c, nodeSelector: {z: c}}, {name: d, nodeSelector: {topology.kubernetes.io/zone: d, empty: ''}}]",
            ),
            right(
                "the least and the greatest weight",
                "prefixes: [p], sites: [{name: a, nodeSelector: {z: a}, weight: 1}, {name: b, nodeSelector: {z: b}, weight: 1000}]",
            ),
            right(
                "one slice",
                "prefixes: [p], ports: {first: 65280, last: 65535, perNode: {min: 1, max: 1}}",
            ),
            right("limits of pods", "prefixes: [p], limits: {perPod: {flows: 1, newFlowsPerSecond: 1000000}}"),
            right("a limit on flows", "prefixes: [p], limits: {perPod: {flows: 1000000}}"),
            right("a limit on new flows", "prefixes: [p], limits: {perPod: {newFlowsPerSecond: 1}}"),
            right("no limits, in words", "prefixes: [p], limits: {}"),
            right("a fence by time", "prefixes: [p], fence: {mode: Time}"),
            right("the longest fence", "prefixes: [p], fence: {mode: Time, afterSeconds: 3600}"),
            right("no fence, in words", "prefixes: [p], fence: {mode: Confirmed}"),
            right("all slices for one node", "prefixes: [p], ports: {perNode: {min: 252}}"),
            right(
                "the shortest time-outs",
                "prefixes: [p], timeouts: {tcpEstablishedSeconds: 240, tcpTransitorySeconds: 30, tcpClosedSeconds: 1, udpSeconds: 30, icmpSeconds: 10, restSeconds: 0, maxRestingPorts: 0}",
            ),
            right(
                "the longest time-outs",
                "prefixes: [p], timeouts: {tcpEstablishedSeconds: 864000, tcpTransitorySeconds: 3600, tcpClosedSeconds: 240, udpSeconds: 86400, icmpSeconds: 3600, restSeconds: 3600, maxRestingPorts: 1000000}",
            ),
        ],
    )
    .unwrap();
}

#[test]
fn what_is_left_out_has_its_default() {
    let server = server();
    let text = server
        .kubectl_with(
            &["create", "--dry-run=server", "-o", "json", "-f", "-"],
            &allocation("prefixes: [p], ports: {first: 2048}"),
        )
        .expect("it is right");
    let object: serde_json::Value = serde_json::from_str(&text).expect("kubectl writes JSON");
    let spec = &object["spec"];
    assert_eq!(
        spec["ports"],
        serde_json::json!({"first": 2048, "last": 65535, "perNode": {"min": 8, "max": 252}})
    );
    assert_eq!(spec["capacity"]["targetPercent"], 80);
    assert_eq!(spec["timeouts"]["tcpEstablishedSeconds"], 7440);
    assert_eq!(
        (&spec["timeouts"]["restSeconds"], spec["timeouts"].get("maxRestingPorts")),
        (&120.into(), None)
    );
    // Not written into the object, or a later list of addresses would meet a number that nobody gave.
    assert_eq!(spec.get("addresses"), None);
}

#[test]
fn a_number_of_addresses_can_become_a_list() {
    let server = server();
    let with = |spec: &str| namespaced("EgressAllocation", "shop", "becomes-a-list", spec);
    for spec in [
        "prefixes: [p]",
        "prefixes: [p], addresses: {explicit: [203.0.113.1, 203.0.113.2]}",
        "prefixes: [p], addresses: {ipv4: 3}",
        "prefixes: [p]",
    ] {
        server.kubectl_with(&["apply", "-f", "-"], &with(spec)).expect(spec);
    }
    server.kubectl(&["delete", "ealloc", "becomes-a-list", "-n", "shop"]).expect("delete");
    for spec in [
        "prefixes: [p]",
        "prefixes: [p], addresses: {explicit: [203.0.113.1, 203.0.113.2]}",
        "prefixes: [p], addresses: {ipv4: 3}",
        "prefixes: [p]",
    ] {
        server.kubectl_with(&["apply", "--server-side", "-f", "-"], &with(spec)).expect(spec);
    }
}
