//! `AegisPrefix`.

use crate::{server, update};
use aegis_tests::admission::{Wrong, all_accepted, all_rejected, manifest};

fn prefix(spec: &str) -> String {
    manifest("AegisPrefix", "wrong", spec)
}

#[test]
fn wrong_prefixes_are_rejected() {
    let cidr = |name, cidr: &str, message| Wrong {
        name,
        manifest: prefix(&format!("account: shop, cidr: '{cidr}'")),
        field: "spec.cidr",
        message,
    };
    let reserved = |name, reserved: &str, message| Wrong {
        name,
        manifest: prefix(&format!("account: shop, cidr: 203.0.113.0/28, reserved: [{reserved}]")),
        field: "spec.reserved",
        message,
    };
    let delegated = |name, delegation: &str, message| Wrong {
        name,
        manifest: prefix(&format!("account: shop, cidr: 203.0.113.0/28, delegations: [{{{delegation}}}]")),
        field: "spec.delegations",
        message,
    };
    let other = |name, manifest: String, field, message| Wrong { name, manifest, field, message };
    let many: Vec<String> = (0..65).map(|low| format!("203.0.113.{low}")).collect();
    all_rejected(
        &server(),
        &[
            cidr("not an address at all", "documentation", "must be a range in CIDR notation"),
            cidr("an address without a length", "203.0.113.1", "must be a range in CIDR notation"),
            cidr("an octet above 255", "203.0.256.0/28", "must be a range in CIDR notation"),
            cidr("a length above 32", "203.0.113.0/33", "must be a range in CIDR notation"),
            cidr("a leading zero", "203.0.113.00/28", "must be a range in CIDR notation"),
            cidr("IPv6: longer than /64", "2001:db8::/65", "from /32 to /64"),
            cidr("IPv6: a /112", "2001:db8::/112", "from /32 to /64"),
            cidr("IPv6: two addresses", "2001:db8::8/127", "for several addresses without a /64 create an AegisPrefix of each"),
            cidr("IPv6: an address without a length", "2001:db8::7", "must be a range in CIDR notation"),
            cidr("IPv6: wider than /32", "2001:d00::/24", "from /32 to /64"),
            cidr("IPv6: one link-local address", "fe80::7/128", "2000::/3 (global) or fc00::/7 (unique local)"),
            cidr("IPv6: loopback", "::1/128", "2000::/3 (global) or fc00::/7 (unique local)"),
            cidr("IPv6: unspecified", "::/128", "2000::/3 (global) or fc00::/7 (unique local)"),
            cidr("IPv6: one multicast address", "ff05::1/128", "2000::/3 (global) or fc00::/7 (unique local)"),
            cidr("IPv6: host bits set", "2001:db8::1/64", "begin with the first address of the range"),
            cidr("IPv6: link-local", "fe80::/64", "2000::/3 (global) or fc00::/7 (unique local)"),
            cidr("IPv6: multicast", "ff05::/64", "2000::/3 (global) or fc00::/7 (unique local)"),
            cidr("an IPv4-mapped range", "::ffff:cb00:7100/124", "must be a range in CIDR notation"),
            cidr("a blank before", " 203.0.113.0/28", "must be a range in CIDR notation"),
            cidr("empty", "", "should be at least 1 chars long"),
            cidr("host bits set", "203.0.113.5/28", "begin with the first address of the range"),
            cidr("wider than /16", "10.0.0.0/8", "from /16 to /32"),
            cidr("everything", "0.0.0.0/0", "from /16 to /32"),
            cidr("loopback", "127.0.0.0/24", "127.0.0.0/8 (loopback)"),
            cidr("link-local", "169.254.169.254/32", "169.254.0.0/16 (link-local)"),
            cidr("multicast", "224.0.0.0/24", "224.0.0.0/4 (multicast)"),
            cidr("broadcast", "255.255.255.255/32", "240.0.0.0/4 (reserved)"),
            cidr("this network", "0.0.0.0/24", "not in 0.0.0.0/8"),
            other("no range", prefix("account: shop"), "spec.cidr", "Required value"),
            other(
                "a range that is a number",
                prefix("account: shop, cidr: 203"),
                "spec.cidr",
                "must be of type string",
            ),
            other("no account", prefix("cidr: 203.0.113.0/28"), "spec.account", "Required value"),
            other(
                "an empty account",
                prefix("cidr: 203.0.113.0/28, account: ''"),
                "spec.account",
                "at least 1 chars",
            ),
            other(
                "an account that is no namespace name",
                prefix("cidr: 203.0.113.0/28, account: Shop_1"),
                "spec.account",
                "must be a DNS label",
            ),
            other(
                "an account that is too long",
                prefix(&format!("cidr: 203.0.113.0/28, account: {}", "a".repeat(64))),
                "spec.account",
                "Too long: may not be more than 63",
            ),
            other(
                "a name that is too long",
                manifest("AegisPrefix", &"n".repeat(64), "account: shop, cidr: 203.0.113.0/28"),
                "metadata.name",
                "at most 63 characters",
            ),
            other(
                "a field that does not exist",
                prefix("account: shop, cidr: 203.0.113.0/28, owner: shop"),
                "spec.owner",
                "unknown field",
            ),
            other(
                "a source that is none",
                prefix("account: shop, cidr: 203.0.113.0/28, source: Stolen"),
                "spec.source",
                "supported values",
            ),
            other(
                "an own range without a proof",
                prefix("account: shop, cidr: 203.0.113.0/28, source: BringYourOwn"),
                "spec.source",
                "spec.proof must say with source BringYourOwn",
            ),
            other(
                "an empty proof",
                prefix("account: shop, cidr: 203.0.113.0/28, source: BringYourOwn, proof: ''"),
                "spec.proof",
                "at least 1 chars",
            ),
            other(
                "a proof that is an essay",
                prefix(&format!("account: shop, cidr: 203.0.113.0/28, proof: {}", "a".repeat(254))),
                "spec.proof",
                "may not be more than 253",
            ),
            delegated("a delegation to nobody", "name: d, maxAddresses: 1", "must say to whom"),
            delegated(
                "a delegation to a name and to labels",
                "name: d, maxAddresses: 1, account: bank, namespaceSelector: {matchLabels: {a: b}}",
                "must say to whom",
            ),
            delegated(
                "a delegation to the owner",
                "name: d, maxAddresses: 1, account: shop",
                "names spec.account, which may take every address as it is",
            ),
            delegated("a delegation without a number", "name: d, account: bank", "maxAddresses: Required value"),
            delegated("a delegation without a name", "maxAddresses: 1, account: bank", "name: Required value"),
            delegated("of no address", "name: d, maxAddresses: 0, account: bank", "greater than or equal to 1"),
            delegated("of too many", "name: d, maxAddresses: 1025, account: bank", "less than or equal to 1024"),
            delegated(
                "of more than there are",
                "name: d, maxAddresses: 17, account: bank",
                "has a maxAddresses above the number of addresses in spec.cidr",
            ),
            other(
                "IPv6: of more /64s than there are",
                prefix("account: shop, cidr: '2001:db8::/62', delegations: [{name: d, maxAddresses: 5, account: bank}]"),
                "spec.delegations",
                "has a maxAddresses above the number of addresses in spec.cidr",
            ),
            other(
                "IPv6: of more than one of one address",
                prefix("account: shop, cidr: '2001:db8::7/128', delegations: [{name: d, maxAddresses: 2, account: bank}]"),
                "spec.delegations",
                "which is one address: delegate 1",
            ),
            other(
                "IPv6: reserved beside the one address",
                prefix("account: shop, cidr: '2001:db8::7/128', reserved: ['2001:db8::8']"),
                "spec.reserved",
                "has an entry outside spec.cidr",
            ),
            delegated(
                "one name twice",
                "name: d, maxAddresses: 1, account: bank}, {name: d, maxAddresses: 2, account: till",
                "Duplicate value",
            ),
            delegated("an empty selector", "name: d, maxAddresses: 1, namespaceSelector: {}", "namespaceSelector is empty"),
            delegated(
                "a selector with an operator that is none",
                "name: d, maxAddresses: 1, namespaceSelector: {matchExpressions: [{key: a, operator: Gt, values: ['1']}]}",
                "supported values",
            ),
            delegated(
                "a selector without the values that it needs",
                "name: d, maxAddresses: 1, namespaceSelector: {matchExpressions: [{key: a, operator: In}]}",
                "values must be given with operator In and NotIn",
            ),
            delegated("an account that is no namespace name", "name: d, maxAddresses: 1, account: No_1", "must be a DNS label"),
            other(
                "too many delegations",
                prefix(&format!(
                    "account: shop, cidr: 203.0.113.0/28, delegations: [{}]",
                    (0..65).map(|it| format!("{{name: d{it}, account: a{it}, maxAddresses: 1}}")).collect::<Vec<_>>().join(", ")
                )),
                "spec.delegations",
                "must have at most 64 items",
            ),
            other(
                "an announcement that nobody makes",
                prefix("account: shop, cidr: 203.0.113.0/28, announcement: {mode: OSPF}"),
                "spec.announcement.mode",
                "supported values",
            ),
            other(
                "no spec",
                "{apiVersion: aegis.dev/v1alpha1, kind: AegisPrefix, metadata: {name: wrong}}".into(),
                "spec",
                "Required value",
            ),
            reserved("reserved: no address", "gateway", "must be an address such as 203.0.113.7 or a range"),
            reserved("reserved: another family", "'2001:db8::1'", "has an entry outside spec.cidr"),
            reserved("reserved: host bits", "203.0.113.5/30", "has host bits set"),
            reserved("reserved: an address outside", "203.0.113.16", "has an entry outside spec.cidr"),
            reserved("reserved: a range outside", "203.0.113.16/30", "has an entry outside spec.cidr"),
            reserved(
                "reserved: a range wider than the prefix",
                "203.0.113.0/27",
                "has an entry outside spec.cidr",
            ),
            reserved("reserved: one twice", "203.0.113.1, 203.0.113.1", "Duplicate value"),
            reserved(
                "reserved: too many",
                Box::leak(many.join(", ").into_boxed_str()),
                "must have at most 64 items",
            ),
        ],
    )
    .unwrap();
}

#[test]
fn right_prefixes_are_accepted() {
    let right = |name, spec: &str| (name, manifest("AegisPrefix", "right", spec));
    all_accepted(
        &server(),
        &[
            right("a small range", "account: shop, cidr: 203.0.113.0/28"),
            right("one address", "account: shop, cidr: 203.0.113.7/32"),
            right("announced by BGP", "account: shop, cidr: 203.0.113.0/28, announcement: {mode: BGP}"),
            right("announced by ARP", "account: shop, cidr: 203.0.113.0/28, announcement: {mode: L2}"),
            right("an announcement without a mode", "account: shop, cidr: 203.0.113.0/28, announcement: {}"),
            right("the widest", "account: shop, cidr: 10.7.0.0/16"),
            right(
                "reserved addresses and ranges",
                "account: shop, cidr: 203.0.113.0/24, reserved: [203.0.113.0, 203.0.113.8/29, 203.0.113.255/32]",
            ),
            right("IPv6, one /64", "account: shop, cidr: '2001:db8:1:2::/64'"),
            right("IPv6, one address", "account: shop, cidr: '2001:db8:1:2::7/128'"),
            right("IPv6, the first address of a /64", "account: shop, cidr: '2001:db8:1:2::/128'"),
            right(
                "IPv6, one address, reserved and delegated",
                "account: shop, cidr: '2001:db8::7/128', reserved: ['2001:db8::7'], \
                 delegations: [{name: a, account: bank, maxAddresses: 1}]",
            ),
            right(
                "IPv6, the widest, with reserved ones",
                "account: shop, cidr: '2001:db8::/32', reserved: ['2001:db8::/64', '2001:db8:7::1']",
            ),
            right("IPv6, unique local", "account: shop, cidr: 'fd12:3456:789a::/48'"),
            right("leased, with a reference", "account: shop, cidr: 203.0.113.0/28, source: Leased, proof: contract 7"),
            right("brought", "account: shop, cidr: 203.0.113.0/28, source: BringYourOwn, proof: 'ROA AS64500, LOA 2026-04'"),
            right(
                "delegated by name, as much as there is, and by labels",
                "account: shop, cidr: 203.0.113.0/30, delegations: [{name: a, account: bank, maxAddresses: 4}, \
                 {name: b, maxAddresses: 1, namespaceSelector: {matchLabels: {team: money}, \
                 matchExpressions: [{key: tier, operator: In, values: [gold]}, {key: off, operator: DoesNotExist}]}}]",
            ),
            right(
                "delegated from the widest",
                "account: shop, cidr: 10.7.0.0/16, delegations: [{name: a, account: bank, maxAddresses: 1024}]",
            ),
            right(
                "IPv6, delegated",
                "account: shop, cidr: '2001:db8::/32', delegations: [{name: a, account: bank, maxAddresses: 1024}]",
            ),
            right(
                "IPv6, one /64, delegated",
                "account: shop, cidr: '2001:db8::/64', delegations: [{name: a, account: bank, maxAddresses: 1}]",
            ),
            right(
                "IPv6, announced by BGP",
                "account: shop, cidr: '2001:db8:1::/48', announcement: {mode: BGP}",
            ),
            right(
                "IPv6, announced to neighbours",
                "account: shop, cidr: '2001:db8:2::/64', announcement: {mode: L2}",
            ),
            right("an account that is a number", "account: '42', cidr: 203.0.113.0/28"),
            (
                "a name of 63 characters",
                manifest("AegisPrefix", &"n".repeat(63), "account: shop, cidr: 203.0.113.0/28"),
            ),
        ],
    )
    .unwrap();
}

#[test]
fn the_range_of_a_prefix_never_changes() {
    let server = server();
    let with = |spec: &str| manifest("AegisPrefix", "immutable", spec);
    let error = update(
        &server,
        &with("account: shop, cidr: 203.0.113.0/28"),
        &with("account: shop, cidr: 203.0.113.0/27"),
    )
    .expect_err("the range changed");
    assert!(error.contains("spec.cidr") && error.contains("create another AegisPrefix instead"), "{error}");
    let apply = |spec: &str| server.kubectl_with(&["replace", "-f", "-"], &with(spec));
    apply(
        "account: bank, cidr: 203.0.113.0/28, reserved: [203.0.113.1], announcement: {mode: BGP}, source: BringYourOwn, \
         proof: LOA, delegations: [{name: a, account: shop, maxAddresses: 2}]",
    )
    .expect("the rest may change");
}
