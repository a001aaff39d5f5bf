//! `EgressAddress`: the API server itself keeps a slice from having two owners, and an epoch from going back.

use crate::{server, update};
use aegis_tests::admission::{Wrong, all_accepted, all_rejected, manifest};

const HEAD: &str = "prefix: p, allocationRef: {namespace: shop, name: a}";

/// An EgressAddress of that epoch with holdings as (first, last, node, epoch).
fn address(name: &str, epoch: i64, holdings: &[(u32, u32, &str, i64)]) -> String {
    let holdings: Vec<String> = holdings
        .iter()
        .map(|(first, last, node, epoch)| {
            format!("{{first: {first}, last: {last}, node: {node}, epoch: {epoch}, state: Held}}")
        })
        .collect();
    raw(name, epoch, &holdings.join(", "))
}

fn raw(name: &str, epoch: i64, holdings: &str) -> String {
    manifest(
        "EgressAddress",
        name,
        &format!("address: {name}, {HEAD}, epoch: {epoch}, holdings: [{holdings}]"),
    )
}

#[test]
fn wrong_addresses_are_rejected() {
    let holdings = |name, holdings: &[(u32, u32, &str, i64)], field, message| Wrong {
        name,
        manifest: address("203.0.113.1", 1, holdings),
        field,
        message,
    };
    let one = |name, holding: &str, field, message| Wrong {
        name,
        manifest: raw("203.0.113.1", 1, holding),
        field,
        message,
    };
    let other = |name, object: &str, spec: &str, field, message| Wrong {
        name,
        manifest: manifest("EgressAddress", object, spec),
        field,
        message,
    };
    let many: Vec<(u32, u32, &str, i64)> =
        (4..=256).map(|slice| (slice.min(255), slice.min(255), "n1", 1)).collect();
    all_rejected(
        &server(),
        &[
            holdings(
                "two owners of a slice",
                &[(4, 11, "n1", 1), (11, 19, "n2", 1)],
                "spec.holdings",
                "a slice has one owner",
            ),
            holdings(
                "the same slices twice",
                &[(4, 11, "n1", 1), (4, 11, "n2", 1)],
                "spec.holdings",
                "a slice has one owner",
            ),
            holdings(
                "one range within another",
                &[(4, 19, "n1", 1), (8, 9, "n2", 1), (20, 21, "n1", 1)],
                "spec.holdings",
                "a slice has one owner",
            ),
            holdings(
                "not sorted",
                &[(12, 19, "n1", 1), (4, 11, "n2", 1)],
                "spec.holdings",
                "must be sorted by first",
            ),
            holdings(
                "a slice below 1024",
                &[(3, 11, "n1", 1)],
                "spec.holdings[0].first",
                "greater than or equal to 4",
            ),
            holdings(
                "a slice beyond the last port",
                &[(250, 256, "n1", 1)],
                "spec.holdings[0].last",
                "less than or equal to 255",
            ),
            holdings(
                "a reversed range",
                &[(11, 4, "n1", 1)],
                "spec.holdings[0].first",
                "must not be greater than last",
            ),
            holdings("newer than the address", &[(4, 11, "n1", 2)], "spec.holdings", "newer than spec.epoch"),
            holdings(
                "a node that is no name",
                &[(4, 11, "N_1", 1)],
                "spec.holdings[0].node",
                "must be the name of an object",
            ),
            holdings("253 holdings", &many, "spec.holdings", "must have at most 252 items"),
            one(
                "an unknown state",
                "{first: 4, last: 5, node: n1, epoch: 1, state: Free}",
                "spec.holdings[0].state",
                "Unsupported value",
            ),
            one(
                "quarantine without an end",
                "{first: 4, last: 5, node: n1, epoch: 1, state: Quarantined}",
                "spec.holdings[0]",
                "until must be given with state Quarantined",
            ),
            one(
                "an end without quarantine",
                "{first: 4, last: 5, node: n1, epoch: 1, state: Held, until: '2030-01-01T00:00:00Z'}",
                "spec.holdings[0]",
                "and with no other",
            ),
            one(
                "an end that is no time",
                "{first: 4, last: 5, node: n1, epoch: 1, state: Quarantined, until: soon}",
                "spec.holdings[0].until",
                "must be of type date-time",
            ),
            other(
                "another name than the address",
                "other",
                &format!("address: 203.0.113.1, {HEAD}, epoch: 1"),
                "metadata.name",
                "must equal spec.address",
            ),
            other(
                "a range in place of an address",
                "203.0.113.1",
                &format!("address: 203.0.113.1/32, {HEAD}, epoch: 1"),
                "spec.address",
                "must be an address such as 203.0.113.7",
            ),
            other(
                "a word in place of an address",
                "one",
                &format!("address: one, {HEAD}, epoch: 1"),
                "spec.address",
                "must be an address such as 203.0.113.7",
            ),
            other(
                "an IPv6 range that is no /64",
                "2001-db8",
                &format!("address: '2001:db8::/63', {HEAD}, epoch: 1"),
                "spec.address",
                "or an IPv6 range of length 64",
            ),
            other(
                "a /64 under a name of another",
                "2001-db8-0-2",
                &format!("address: '2001:db8:0:1::/64', {HEAD}, epoch: 1"),
                "metadata.name",
                "must equal spec.address",
            ),
            other(
                "one IPv6 address under the name of its /64",
                "2001-db8",
                &format!("address: '2001:db8::', {HEAD}, epoch: 1"),
                "metadata.name",
                "must equal spec.address",
            ),
            other(
                "one IPv6 address under a short name",
                "2001-db8--7",
                &format!("address: '2001:db8::7', {HEAD}, epoch: 1"),
                "metadata.name",
                "all eight groups of four digits",
            ),
            other(
                "one IPv6 address under the name of another",
                "2001-0db8-0000-0000-0000-0000-0000-0008",
                &format!("address: '2001:db8::7', {HEAD}, epoch: 1"),
                "metadata.name",
                "must equal spec.address",
            ),
            other(
                "one IPv6 address in another spelling",
                "2001-0db8-0000-0000-0000-0000-0000-0007",
                &format!("address: '2001:DB8:0::7', {HEAD}, epoch: 1"),
                "spec.address",
                "must be in its shortest form",
            ),
            other(
                "one IPv6 address as a range",
                "2001-0db8-0000-0000-0000-0000-0000-0007",
                &format!("address: '2001:db8::7/128', {HEAD}, epoch: 1"),
                "spec.address",
                "or an IPv6 range of length 64",
            ),
            other(
                "two owners of ports of one IPv6 address",
                "2001-0db8-0000-0000-0000-0000-0000-0007",
                &format!(
                    "address: '2001:db8::7', {HEAD}, epoch: 1, holdings: [\
                     {{first: 4, last: 11, node: n1, epoch: 1, state: Held}}, \
                     {{first: 11, last: 12, node: n2, epoch: 1, state: Held}}]"
                ),
                "spec.holdings",
                "a slice has one owner",
            ),
            other(
                "two owners of a number of a /64",
                "2001-db8-0-1",
                &format!(
                    "address: '2001:db8:0:1::/64', {HEAD}, epoch: 1, holdings: [\
                     {{first: 4, last: 4, node: n1, epoch: 1, state: Held}}, \
                     {{first: 4, last: 4, node: n2, epoch: 1, state: Held}}]"
                ),
                "spec.holdings",
                "a slice has one owner",
            ),
            other(
                "a negative epoch",
                "203.0.113.1",
                &format!("address: 203.0.113.1, {HEAD}, epoch: -1"),
                "spec.epoch",
                "greater than or equal to 0",
            ),
            other(
                "a fence that is newer than the address",
                "203.0.113.1",
                &format!("address: 203.0.113.1, {HEAD}, epoch: 1, fence: {{afterSeconds: 60, epoch: 2}}"),
                "spec.fence",
                "is newer than spec.epoch",
            ),
            other(
                "a fence of two hours",
                "203.0.113.1",
                &format!("address: 203.0.113.1, {HEAD}, epoch: 1, fence: {{afterSeconds: 7200, epoch: 1}}"),
                "spec.fence.afterSeconds",
                "less than or equal to 3600",
            ),
            other(
                "no allocation",
                "203.0.113.1",
                "address: 203.0.113.1, prefix: p, epoch: 1",
                "spec.allocationRef",
                "Required value",
            ),
        ],
    )
    .unwrap();
}

#[test]
fn right_addresses_are_accepted() {
    let all: Vec<(u32, u32, String)> = (4..=255).map(|slice| (slice, slice, format!("n{slice}"))).collect();
    let all: Vec<(u32, u32, &str, i64)> =
        all.iter().map(|(first, last, node)| (*first, *last, node.as_str(), 7)).collect();
    all_accepted(
        &server(),
        &[
            ("nobody holds anything", address("203.0.113.1", 0, &[])),
            ("252 nodes", address("203.0.113.1", 7, &all)),
            (
                "neighbours",
                address("203.0.113.1", 3, &[(4, 11, "n1", 1), (12, 19, "n2", 3), (255, 255, "n1", 2)]),
            ),
            (
                "quarantine",
                raw(
                    "203.0.113.1",
                    1,
                    "{first: 4, last: 5, node: n1, epoch: 1, state: Quarantined, until: '2030-01-01T00:00:00Z'}",
                ),
            ),
            (
                "a /64",
                manifest(
                    "EgressAddress",
                    "2001-db8-0-1",
                    &format!(
                        "address: '2001:db8:0:1::/64', {HEAD}, epoch: 1, \
                         holdings: [{{first: 4, last: 4, node: n1, epoch: 1, state: Held}}]"
                    ),
                ),
            ),
            (
                "one IPv6 address",
                manifest(
                    "EgressAddress",
                    "2001-0db8-0000-0000-0000-0000-0000-0007",
                    &format!(
                        "address: '2001:db8::7', {HEAD}, epoch: 1, \
                         holdings: [{{first: 4, last: 11, node: n1, epoch: 1, state: Held}}]"
                    ),
                ),
            ),
            (
                "one IPv6 address, the first of a /64",
                manifest(
                    "EgressAddress",
                    "2001-0db8-0001-0002-0000-0000-0000-0000",
                    &format!("address: '2001:db8:1:2::', {HEAD}, epoch: 1"),
                ),
            ),
            (
                "a /64 whose text is short",
                manifest(
                    "EgressAddress",
                    "2001-db8",
                    &format!("address: '2001:db8::/64', {HEAD}, epoch: 1"),
                ),
            ),
            ("draining", raw("203.0.113.1", 1, "{first: 4, last: 5, node: n1, epoch: 1, state: Draining}")),
        ],
    )
    .unwrap();
}

#[test]
fn an_epoch_never_goes_back_and_grows_with_the_holdings() {
    let server = server();
    let name = "203.0.113.2";
    let before = address(name, 5, &[(4, 11, "n1", 5)]);
    let error = update(&server, &before, &address(name, 4, &[])).expect_err("an older epoch");
    assert!(error.contains("spec.epoch can't go back"), "{error}");
    let replace =
        |text: &str| server.kubectl_with(&["replace", "-f", "-"], text).map_err(|error| error.to_string());
    let error =
        replace(&address(name, 5, &[(4, 11, "n2", 5)])).expect_err("another holder at the same epoch");
    assert!(error.contains("spec.holdings changed, so spec.epoch must grow"), "{error}");
    let error = replace(&address(name, 4, &[(4, 11, "n1", 4)])).expect_err("back, with the same slices");
    assert!(error.contains("spec.epoch can't go back"), "{error}");
    replace(&before).expect("nothing changed");
    replace(&address(name, 6, &[(4, 11, "n2", 6)])).expect("a newer epoch");
}

#[test]
fn a_fence_changes_with_the_epoch_only() {
    let server = server();
    let name = "203.0.113.4";
    let with = |epoch: i64, fence: &str| {
        manifest("EgressAddress", name, &format!("address: {name}, {HEAD}, epoch: {epoch}{fence}"))
    };
    let fence = |after: u32, epoch: i64| format!(", fence: {{afterSeconds: {after}, epoch: {epoch}}}");
    let replace = |epoch, fence: &str| {
        server.kubectl_with(&["replace", "-f", "-"], &with(epoch, fence)).map_err(|error| error.to_string())
    };
    server.kubectl_with(&["create", "-f", "-"], &with(5, "")).expect("it is right");
    let refused = |epoch, fence: &str| {
        let error = replace(epoch, fence).expect_err(fence);
        assert!(error.contains("spec.fence") && error.contains("spec.fence changed"), "{error}");
    };
    refused(5, &fence(60, 5));
    refused(6, &fence(60, 5));
    replace(6, &fence(60, 6)).expect("set with a newer epoch");
    replace(6, &fence(60, 6)).expect("nothing changed");
    replace(7, &fence(60, 6)).expect("something else changed");
    refused(7, &fence(15, 6));
    refused(7, &fence(15, 7));
    refused(8, &fence(60, 7));
    refused(7, "");
    replace(8, &fence(15, 8)).expect("changed with a newer epoch");
    replace(9, "").expect("taken away with a newer epoch");
}

#[test]
fn an_address_is_dedicated_for_life() {
    let server = server();
    let name = "203.0.113.3";
    let with = |spec: &str| manifest("EgressAddress", name, &format!("epoch: 1, {spec}"));
    let before = with("address: 203.0.113.3, prefix: p, allocationRef: {namespace: shop, name: a}");
    server.kubectl_with(&["create", "-f", "-"], &before).expect("it is right");
    for (spec, field) in [
        ("address: 203.0.113.4, prefix: p, allocationRef: {namespace: shop, name: a}", "spec.address"),
        ("address: 203.0.113.3, prefix: q, allocationRef: {namespace: shop, name: a}", "spec.prefix"),
        ("address: 203.0.113.3, prefix: p, allocationRef: {namespace: bank, name: a}", "spec.allocationRef"),
        ("address: 203.0.113.3, prefix: p, allocationRef: {namespace: shop, name: b}", "spec.allocationRef"),
    ] {
        let error = server.kubectl_with(&["replace", "-f", "-"], &with(spec)).expect_err(spec).to_string();
        assert!(error.contains(field) && error.contains("can't be changed"), "{error}");
    }
}
