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
            cidr("IPv6: wider than /32", "2001:d00::/24", "from /32 to /64"),
            cidr("IPv6: host bits set", "2001:db8::1/64", "begin with the first address of the range"),
            cidr("IPv6: link-local", "fe80::/64", "2000::/3 (global) or fc00::/7 (unique local)"),
            cidr("IPv6: multicast", "ff05::/64", "2000::/3 (global) or fc00::/7 (unique local)"),
            other(
                "IPv6: an announcement that nobody makes",
                prefix("account: shop, cidr: '2001:db8::/48', announcement: {mode: L2}"),
                "spec.announcement",
                "must be None for an IPv6 prefix",
            ),
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
                prefix("account: shop, cidr: 203.0.113.0/28, source: Leased"),
                "spec.source",
                "unknown field",
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
            right(
                "IPv6, the widest, with reserved ones",
                "account: shop, cidr: '2001:db8::/32', reserved: ['2001:db8::/64', '2001:db8:7::1']",
            ),
            right("IPv6, unique local", "account: shop, cidr: 'fd12:3456:789a::/48'"),
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
    apply("account: bank, cidr: 203.0.113.0/28, reserved: [203.0.113.1], announcement: {mode: BGP}")
        .expect("the rest may change");
}
