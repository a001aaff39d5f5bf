//! `UsageAlert`.

use crate::server;
use aegis_tests::admission::{Wrong, all_accepted, all_rejected, namespaced};

fn alert(spec: &str) -> String {
    namespaced("UsageAlert", "shop", "case", spec)
}

#[test]
fn wrong_alerts_are_rejected() {
    let case = |name, spec: &str, field, message| Wrong { name, manifest: alert(spec), field, message };
    let origins = |count: usize| {
        let all: Vec<String> = (0..count).map(|number| format!("{{cidr: 20.{number}.0.0/16}}")).collect();
        all.join(", ")
    };
    all_rejected(
        &server(),
        &[
            case("nothing to look at", "allocationRef: {name: partner}", "spec", "says nothing to look at"),
            case("nothing at all", "", "spec", "says nothing to look at"),
            case("no percent", "portUse: {forSeconds: 60}", "spec.portUse.percent", "Required value"),
            case("0 percent", "portUse: {percent: 0}", "spec.portUse.percent", "greater than or equal to 1"),
            case(
                "101 percent",
                "portUse: {percent: 101}",
                "spec.portUse.percent",
                "less than or equal to 100",
            ),
            case("a share", "portUse: {percent: 0.8}", "spec.portUse.percent", "must be of type integer"),
            case(
                "cleared above",
                "portUse: {percent: 80, clearBelowPercent: 81}",
                "spec.portUse.clearBelowPercent",
                "must not be greater than spec.portUse.percent",
            ),
            case(
                "cleared never",
                "portUse: {percent: 80, clearBelowPercent: 0}",
                "spec.portUse.clearBelowPercent",
                "greater than or equal to 1",
            ),
            case(
                "longer than a day",
                "portUse: {percent: 80, forSeconds: 86401}",
                "spec.portUse.forSeconds",
                "less than or equal to 86400",
            ),
            case(
                "a duration",
                "portUse: {percent: 80, forSeconds: 5m}",
                "spec.portUse.forSeconds",
                "must be of type integer",
            ),
            case(
                "less than none",
                "refusals: {moreThan: -1}",
                "spec.refusals.moreThan",
                "greater than or equal to 0",
            ),
            case(
                "no window",
                "refusals: {withinSeconds: 0}",
                "spec.refusals.withinSeconds",
                "greater than or equal to 10",
            ),
            case(
                "a window between reports",
                "refusals: {withinSeconds: 65}",
                "spec.refusals.withinSeconds",
                "must be a multiple of 10",
            ),
            case(
                "too long a window",
                "refusals: {withinSeconds: 1810}",
                "spec.refusals.withinSeconds",
                "less than or equal to 1800",
            ),
            case(
                "a site for more than a day",
                "siteWithoutHolders: {forSeconds: 90000}",
                "spec.siteWithoutHolders.forSeconds",
                "less than or equal to 86400",
            ),
            case(
                "origins of a site",
                "siteWithoutHolders: {}, origins: [{cidr: 198.51.100.0/24}]",
                "spec.origins",
                "narrows down spec.portUse and spec.refusals",
            ),
            case("no origins", "refusals: {}, origins: []", "spec.origins", "at least 1 items"),
            case(
                "too many origins",
                &format!("refusals: {{}}, origins: [{}]", origins(33)),
                "spec.origins",
                "must have at most 32 items",
            ),
            case(
                "an origin without a range",
                "refusals: {}, origins: [{port: 443}]",
                "spec.origins[0].cidr",
                "Required",
            ),
            case(
                "an origin as an address",
                "refusals: {}, origins: [{cidr: 198.51.100.7}]",
                "spec.origins[0].cidr",
                "must be a range in CIDR notation",
            ),
            case(
                "host bits",
                "refusals: {}, origins: [{cidr: 198.51.100.7/24}]",
                "spec.origins[0].cidr",
                "has host bits set",
            ),
            case(
                "port 0",
                "refusals: {}, origins: [{cidr: 198.51.100.0/24, port: 0}]",
                "spec.origins[0].port",
                "greater than or equal to 1",
            ),
            case(
                "no name of an allocation",
                "refusals: {}, allocationRef: {name: Partner}",
                "spec.allocationRef.name",
                "must be the name of an object",
            ),
            case("an unknown field", "refusals: {}, feed: rss", "spec.feed", "unknown field"),
            Wrong {
                name: "too long a name",
                manifest: namespaced("UsageAlert", "shop", &"a".repeat(64), "refusals: {}"),
                field: "metadata.name",
                message: "must be at most 63 characters",
            },
        ],
    )
    .unwrap();
}

#[test]
fn right_alerts_are_accepted() {
    let right = |name, spec: &str| (name, alert(spec));
    let origins: Vec<String> =
        (0..32).map(|number| format!("{{cidr: 20.{number}.0.0/16, port: 443}}")).collect();
    all_accepted(
        &server(),
        &[
            right("ports", "portUse: {percent: 80}"),
            right("ports at once, without hysteresis", "portUse: {percent: 1, forSeconds: 0, clearBelowPercent: 1}"),
            right("refusals, as they are by default", "refusals: {}"),
            right("sites", "siteWithoutHolders: {forSeconds: 0}"),
            right(
                "all there is",
                &format!(
                    "allocationRef: {{name: partner}}, origins: [{}], portUse: {{percent: 100, forSeconds: 86400, clearBelowPercent: 100}}, \
                     refusals: {{moreThan: 1000000000, withinSeconds: 1800}}, siteWithoutHolders: {{}}",
                    origins.join(", ")
                ),
            ),
            right("IPv6", "refusals: {}, origins: [{cidr: '2001:db8::/32'}, {cidr: '0.0.0.0/0', port: 65535}]"),
        ],
    )
    .unwrap();
}

#[test]
fn what_is_left_out_is_filled_in() {
    let server = server();
    let manifest = namespaced(
        "UsageAlert",
        "shop",
        "filled",
        "portUse: {percent: 80}, refusals: {}, siteWithoutHolders: {}",
    );
    server.kubectl_with(&["apply", "-f", "-"], &manifest).expect("create");
    let path = "jsonpath={.spec.portUse.forSeconds} {.spec.refusals.moreThan} {.spec.refusals.withinSeconds} {.spec.siteWithoutHolders.forSeconds}";
    let found = server.kubectl(&["get", "ualert", "filled", "-n", "shop", "-o", path]).expect("get");
    assert_eq!(found.trim(), "300 0 300 120");
}
