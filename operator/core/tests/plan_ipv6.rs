//! IPv6: an allocation gets /64s, and each node of its sites a slice of each.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use aegis_core::egress::{Egress, Family};
use aegis_core::model::*;
use aegis_core::{Plan, reason};
use std::collections::BTreeSet;
use support::*;

/// The world with a prefix of four /64s beside the IPv4 one; allocation `a` wants an address of each kind.
fn dual() -> Inputs {
    let mut inputs = world();
    inputs.prefixes.push(prefix("six", "2001:db8::/62"));
    inputs.allocations[0].prefixes.push("six".into());
    inputs.allocations[0].ipv6 = 1;
    inputs
}

fn networks(plan: &Plan) -> Vec<&Address> {
    plan.addresses.iter().filter(|it| it.address.family() == Family::V6).collect()
}

fn allocated(plan: &Plan) -> (&'static str, &str) {
    let verdict = &plan.allocations[&name("a")].allocated;
    (verdict.reason(), verdict.message())
}

/// The slices of an address, with who holds them.
fn numbers(address: &Address) -> Vec<(u8, String)> {
    address.holdings.iter().map(|it| (it.first, it.node.clone())).collect()
}

#[test]
fn every_node_gets_one_slice_of_a_64_whatever_the_ports_are() {
    let mut inputs = dual();
    (inputs.allocations[0].per_node_min, inputs.allocations[0].slices) =
        (20, aegis_core::slice::SliceSet::range(30, 255));
    let plan = advance(&mut inputs);
    let [network] = networks(&plan)[..] else { panic!("{plan:#?}") };
    assert_eq!((network.address, network.prefix.as_str()), (ip("2001:db8::/64"), "six"));
    let nodes: BTreeSet<String> = numbers(network).into_iter().map(|(_, node)| node).collect();
    assert_eq!(nodes, ["n1", "n2", "n3"].map(str::to_owned).into());
    assert!(network.holdings.iter().all(|it| it.first == it.last && it.state == State::Held));
    assert_eq!(allocated(&plan), (reason::ALLOCATED, "1 address on 3 nodes; 1 IPv6 /64 on 3 nodes"));
    assert_eq!((plan.prefixes["six"].capacity, plan.prefixes["six"].used), (4, 1));
    // Demand is of ports.
    inputs.nodes[0].demand = [(name("a"), 100)].into();
    let again = advance(&mut inputs);
    assert_eq!(networks(&again), networks(&plan));
}

#[test]
fn ipv6_alone_needs_no_ipv4_address() {
    let mut inputs = dual();
    inputs.allocations[0].request = AddressRequest::Count(0);
    let plan = advance(&mut inputs);
    assert_eq!(plan.addresses.len(), 1);
    assert_eq!(allocated(&plan), (reason::ALLOCATED, "1 IPv6 /64 on 3 nodes"));
}

#[test]
fn a_list_names_both_kinds() {
    let mut inputs = dual();
    let listed = ["192.0.2.3", "2001:db8:0:2::/64"].map(ip);
    inputs.allocations[0].request = AddressRequest::Explicit(listed.to_vec());
    let plan = advance(&mut inputs);
    assert_eq!(plan.addresses.iter().map(|it| it.address).collect::<Vec<Egress>>(), listed);
    inputs.allocations[0].request = AddressRequest::Explicit(vec![ip("2001:db8:0:4::/64")]);
    let plan = advance(&mut inputs);
    let accepted = plan.allocations[&name("a")].accepted.message();
    assert!(accepted.starts_with("spec.addresses.explicit[0]: 2001:db8:0:4::/64 is not in"), "{accepted}");
}

#[test]
fn what_is_missing_is_told_by_its_field() {
    let mut inputs = dual();
    inputs.allocations[0].ipv6 = 5;
    let plan = advance(&mut inputs);
    assert_eq!(networks(&plan).len(), 4);
    let (reason, message) = allocated(&plan);
    assert_eq!(reason, reason::NO_FREE_ADDRESS);
    let begin =
        "spec.addresses.ipv6: 4 of 5 addresses allocated, no /64 is free in AegisPrefix \"p\", \"six\"";
    assert!(message.starts_with(begin), "{message}");
}

#[test]
fn a_number_stays_with_its_node_and_rests_between_two() {
    let mut inputs = dual();
    let before = advance(&mut inputs);
    let before = numbers(networks(&before)[0]);
    // A node that joins, and one whose agent is away, change nothing for the others.
    inputs.nodes.push(node("n0"));
    inputs.nodes[1].ready = false;
    let joined = advance(&mut inputs);
    let joined = numbers(networks(&joined)[0]);
    assert!(before.iter().all(|it| joined.contains(it)) && joined.len() == 4, "{before:?} {joined:?}");
    // The number of one that is gone is nobody's for as long as a slice rests.
    let gone = joined.iter().find(|(_, node)| node == "n2").unwrap().0;
    inputs.nodes.retain(|node| node.name != "n2");
    inputs.nodes.extend((10..270).map(|index| node(&format!("n{index}"))));
    let crowded = advance(&mut inputs);
    let of_gone = networks(&crowded)[0].holdings.iter().find(|it| it.first == gone).unwrap();
    assert!(of_gone.node == "n2" && matches!(of_gone.state, State::Quarantined { .. }), "{of_gone:?}");
    let (reason, message) = allocated(&crowded);
    assert_eq!(reason, reason::ALLOCATED);
    assert!(
        message.contains("send nothing over IPv6") && message.contains("spec.addresses.ipv6"),
        "{message}"
    );
    inputs.now += QUARANTINE;
    let rested = advance(&mut inputs);
    assert_ne!(networks(&rested)[0].holdings.iter().find(|it| it.first == gone).unwrap().node, "n2");
}

#[test]
fn a_64_serves_252_nodes_and_two_serve_more() {
    let mut inputs = dual();
    inputs.nodes = (0..300).map(|index| node(&format!("n{index:03}"))).collect();
    inputs.allocations[0].ipv6 = 2;
    let plan = advance(&mut inputs);
    let holders: BTreeSet<String> =
        networks(&plan).iter().flat_map(|it| numbers(it)).map(|(_, node)| node).collect();
    assert_eq!(holders.len(), 300);
    assert!(!allocated(&plan).1.contains("over IPv6"), "{}", allocated(&plan).1);
}

#[test]
fn a_64_goes_when_its_nodes_have_said_that_it_is_empty_and_it_has_rested() {
    let mut inputs = dual();
    advance(&mut inputs);
    inputs.allocations[0].ipv6 = 0;
    let draining = advance(&mut inputs);
    assert!(networks(&draining)[0].holdings.iter().all(|it| it.state == State::Draining));
    assert_eq!(networks(&advance(&mut inputs)).len(), 1, "nobody has said anything");
    let addresses = inputs.addresses.clone();
    inputs.nodes.iter_mut().for_each(|node| report_drained(node, &addresses));
    assert_eq!(networks(&advance(&mut inputs)).len(), 1, "it rests");
    inputs.now += QUARANTINE;
    assert!(networks(&advance(&mut inputs)).is_empty());
    assert_eq!(inputs.addresses.len(), 1, "the IPv4 address stays");
}

#[test]
fn sites_share_the_nodes_of_a_64() {
    let mut inputs = dual();
    inputs.allocations[0].sites = [("east".to_owned(), site("a", 1))].into();
    inputs.nodes[0].labels = zone("a");
    let plan = advance(&mut inputs);
    assert_eq!(numbers(networks(&plan)[0]), [(4, "n1".to_owned())]);
}

#[test]
fn the_audit_knows_what_a_node_may_have_of_a_64() {
    use aegis_core::audit::{Unfit, Violation};
    let mut inputs = dual();
    advance(&mut inputs);
    let audited = |change: &dyn Fn(&mut Address)| {
        let mut plan = aegis_core::plan(&inputs);
        let network = plan.addresses.iter_mut().find(|it| it.address.family() == Family::V6).unwrap();
        network.epoch += 1;
        change(network);
        aegis_core::audit(&inputs, &plan).unwrap_err()
    };
    let more = |node: &'static str, slice| {
        move |network: &mut Address| {
            let epoch = network.epoch;
            let held = Holding { first: slice, last: slice, node: node.into(), epoch, state: State::Held };
            network.holdings.push(held);
        }
    };
    let found = audited(&more("n1", 200));
    assert!(
        matches!(found[..], [Violation::Granted { slice: 200, why: Unfit::Maximum, .. }]),
        "two numbers: {found:?}"
    );
    let found = audited(&|network| network.holdings[0].node = "n2".into());
    assert!(found.iter().any(|it| matches!(it, Violation::Moved { .. })), "another's number: {found:?}");
    let found = audited(&|network| drop(network.holdings.pop()));
    assert!(found.iter().any(|it| matches!(it, Violation::NotDrained { .. })), "taken away: {found:?}");
}
