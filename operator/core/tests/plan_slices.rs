//! Which node holds which slices, and what the owners are told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use aegis_core::model::*;
use aegis_core::slice::SliceSet;
use aegis_core::{Plan, plan, reason};
use support::*;

fn allocated(plan: &Plan) -> (&'static str, &str) {
    let verdict = &plan.allocations[&name("a")].allocated;
    (verdict.reason(), verdict.message())
}

fn runs(address: &Address, node: &str) -> Vec<(u8, u8)> {
    held(address, node).runs()
}

#[test]
fn only_ready_nodes_of_the_sites_hold_slices() {
    let mut inputs = world();
    inputs.allocations[0].sites = [("s1".to_owned(), zone("a")), ("s2".to_owned(), zone("b"))].into();
    for (node, at) in inputs.nodes.iter_mut().zip(["a", "b", "c"]) {
        node.labels = zone(at);
    }
    inputs.nodes[1].ready = false;
    let plan = advance(&mut inputs);
    assert_eq!(allocated(&plan), (reason::ALLOCATED, "1 address on 1 node"));
    assert_eq!(held(&plan.addresses[0], "n2").len() + held(&plan.addresses[0], "n3").len(), 0);
    inputs.nodes[1].ready = true;
    assert_eq!(held(&advance(&mut inputs).addresses[0], "n2").len(), 8);
    // No longer ready: keeps all, and gets no more.
    inputs.nodes[1].ready = false;
    inputs.nodes[1].demand.insert(name("a"), 20);
    let plan = advance(&mut inputs);
    assert_eq!(held(&plan.addresses[0], "n2").len(), 8);
    assert_eq!(allocated(&plan).1, "1 address on 2 nodes");
}

#[test]
fn no_node_is_told() {
    let mut inputs = world();
    inputs.allocations[0].sites = [("s1".to_owned(), zone("a"))].into();
    let none = plan(&inputs);
    assert_eq!(allocated(&none).0, reason::NO_NODE);
    assert!(allocated(&none).1.starts_with("spec.sites: no node matches"));
    inputs.nodes[0] = Node { labels: zone("a"), ready: false, ..node("n1") };
    let unready = plan(&inputs);
    assert_eq!(allocated(&unready).0, reason::NO_NODE);
    assert!(allocated(&unready).1.contains("none has a ready agent"));
}

#[test]
fn a_node_that_leaves_the_sites_drains_and_may_come_back() {
    let mut inputs = world();
    inputs.allocations[0].sites = [("s1".to_owned(), zone("a"))].into();
    inputs.nodes.iter_mut().for_each(|node| node.labels = zone("a"));
    let before = advance(&mut inputs).addresses.remove(0);
    inputs.nodes[1].labels = zone("b");
    let after = advance(&mut inputs).addresses.remove(0);
    assert_eq!(slices_of(&after, "n2", |state| state == State::Draining), held(&before, "n2"));
    assert_eq!(held(&after, "n1"), held(&before, "n1"));
    assert_eq!(after.epoch, before.epoch + 1);
    assert_eq!(after.holdings.iter().filter(|it| it.epoch == after.epoch).count(), 1);
    inputs.nodes[1].labels = zone("a");
    let back = advance(&mut inputs).addresses.remove(0);
    assert_eq!(held(&back, "n2"), held(&before, "n2"));
    assert_eq!(back.epoch, after.epoch + 1);
    // A report from the first draining says nothing about a later one.
    report_drained(&mut inputs.nodes[1], &[after]);
    inputs.nodes[1].labels = zone("b");
    advance(&mut inputs);
    let again = advance(&mut inputs).addresses.remove(0);
    assert_eq!(slices_of(&again, "n2", |state| state == State::Draining), held(&before, "n2"));
}

#[test]
fn slices_of_a_node_that_is_gone_rest_and_are_given_anew() {
    let mut inputs = world();
    inputs.allocations[0].slices = SliceSet::range(4, 27);
    let before = advance(&mut inputs).addresses.remove(0);
    inputs.nodes[0] = node("n9");
    let plan = advance(&mut inputs);
    assert_eq!(held(&plan.addresses[0], "n9").len(), 0);
    assert_eq!(allocated(&plan).0, reason::ALLOCATED, "it sends through the others until then");
    let told = "1 address on 2 nodes; 1 node (n9) has no slice and sends through others, as no slice is free";
    assert!(allocated(&plan).1.starts_with(told), "{}", allocated(&plan).1);
    assert_eq!(plan.wake, Some(START + QUARANTINE));
    inputs.now += QUARANTINE;
    let plan = advance(&mut inputs);
    assert_eq!(held(&plan.addresses[0], "n9"), held(&before, "n1"));
}

#[test]
fn ports_that_are_no_longer_used_drain() {
    let mut inputs = world();
    inputs.nodes.truncate(1);
    advance(&mut inputs);
    inputs.allocations[0].slices = SliceSet::range(6, 255);
    let after = advance(&mut inputs).addresses.remove(0);
    assert_eq!(slices_of(&after, "n1", |state| state == State::Draining), SliceSet::range(4, 5));
    assert_eq!(held(&after, "n1"), SliceSet::range(6, 13), "and are replaced");
}

#[test]
fn slices_that_drain_and_new_ones_beside_them_are_two_holdings() {
    let mut inputs = world();
    inputs.nodes.truncate(1);
    advance(&mut inputs);
    inputs.allocations[0].slices = SliceSet::range(12, 255);
    let after = advance(&mut inputs).addresses.remove(0);
    let holdings: Vec<(u8, u8, State)> =
        after.holdings.iter().map(|it| (it.first, it.last, it.state)).collect();
    assert_eq!(holdings, [(4, 11, State::Draining), (12, 19, State::Held)]);
}

#[test]
fn a_gap_parts_holdings_that_are_equal_otherwise() {
    let mut inputs = world();
    inputs.nodes.truncate(1);
    advance(&mut inputs);
    inputs.allocations[0].deleting = true;
    advance(&mut inputs);
    let standing = inputs.addresses.clone();
    report_drained(&mut inputs.nodes[0], &standing);
    inputs.nodes[0].programmed.values_mut().for_each(|it| it.drained = SliceSet::range(6, 8));
    advance(&mut inputs);
    inputs.now += QUARANTINE;
    let after = advance(&mut inputs).addresses.remove(0);
    let holdings: Vec<(u8, u8, State)> =
        after.holdings.iter().map(|it| (it.first, it.last, it.state)).collect();
    assert_eq!(holdings, [(4, 5, State::Draining), (9, 11, State::Draining)]);
}

#[test]
fn the_minimum_of_all_comes_before_demand_and_the_first_names_before_the_last() {
    let mut inputs = world();
    inputs.allocations[0].slices = SliceSet::range(4, 25);
    inputs.nodes[0].demand.insert(name("a"), 100);
    let plan = advance(&mut inputs);
    let address = &plan.addresses[0];
    assert_eq!(["n1", "n2", "n3"].map(|node| held(address, node).len()), [8, 8, 6]);
    let told = "1 address on 3 nodes; 1 node (n3) has fewer than spec.ports.perNode.min, as no slice is free";
    assert!(allocated(&plan).1.starts_with(told), "{}", allocated(&plan).1);
}

#[test]
fn demand_is_met_in_fair_rounds_up_to_the_maximum() {
    let mut inputs = world();
    inputs.allocations[0].slices = SliceSet::range(4, 55);
    inputs.allocations[0].per_node_max = 20;
    for (node, demand) in inputs.nodes.iter_mut().zip([200, 12, 200]) {
        node.demand.insert(name("a"), demand);
    }
    let address = advance(&mut inputs).addresses.remove(0);
    assert_eq!(["n1", "n2", "n3"].map(|node| held(&address, node).len()), [20, 12, 20]);
    inputs.allocations[0].slices = SliceSet::range(4, 58);
    inputs.allocations[0].per_node_max = 40;
    let address = advance(&mut inputs).addresses.remove(0);
    assert_eq!(["n1", "n2", "n3"].map(|node| held(&address, node).len()), [22, 12, 21]);
}

#[test]
fn a_maximum_takes_nothing_away_and_yields_to_the_minimum() {
    let mut inputs = world();
    inputs.nodes[0].demand.insert(name("a"), 20);
    let before = advance(&mut inputs).addresses;
    inputs.allocations[0].per_node_max = 4;
    assert_eq!(advance(&mut inputs).addresses, before);
    inputs.nodes.push(node("n4"));
    assert_eq!(held(&advance(&mut inputs).addresses[0], "n4").len(), 8);
}

#[test]
fn a_node_that_is_not_ready_gets_back_what_drains() {
    let mut inputs = world();
    let before = advance(&mut inputs).addresses.remove(0);
    inputs.allocations[0].sites = [("s1".to_owned(), zone("a"))].into();
    assert_eq!(held(&advance(&mut inputs).addresses[0], "n1").len(), 0);
    inputs.nodes[0] = Node { labels: zone("a"), ready: false, ..node("n1") };
    assert_eq!(held(&advance(&mut inputs).addresses[0], "n1"), held(&before, "n1"));
}

#[test]
fn demand_counts_for_each_address() {
    let mut inputs = world();
    inputs.allocations[0].request = AddressRequest::Count(2);
    inputs.nodes[0].demand.insert(name("a"), 21);
    let plan = advance(&mut inputs);
    assert_eq!(plan.addresses.iter().map(|it| held(it, "n1").len()).collect::<Vec<_>>(), [21, 21]);
    // A demand that shrinks takes nothing away.
    inputs.nodes[0].demand.clear();
    assert_eq!(advance(&mut inputs).addresses, plan.addresses);
}

#[test]
fn a_node_grows_in_place() {
    let mut inputs = world();
    for demand in [12, 20, 60] {
        for node in &mut inputs.nodes {
            node.demand.insert(name("a"), demand);
        }
        let address = advance(&mut inputs).addresses.remove(0);
        for node in ["n1", "n2", "n3"] {
            assert_eq!(held(&address, node).len(), demand);
            assert_eq!(runs(&address, node).len(), 1, "{node} at {demand}: {address:#?}");
        }
    }
}

#[test]
fn equal_minima_tile_an_address_without_splinters() {
    let mut inputs = world();
    inputs.nodes = (0..31).map(|index| node(&format!("n{index:02}"))).collect();
    let address = advance(&mut inputs).addresses.remove(0);
    assert_eq!(address.holdings.len(), 31);
    assert!(address.holdings.iter().all(|it| it.last - it.first == 7));
}

#[test]
fn two_hundred_and_fifty_two_nodes_fit_into_one_address() {
    let mut inputs = world();
    inputs.nodes = (0..253).map(|index| node(&format!("n{index:03}"))).collect();
    inputs.allocations[0].per_node_min = 1;
    let plan = advance(&mut inputs);
    assert_eq!(plan.addresses[0].holdings.len(), 252);
    let told = "1 address on 252 nodes; 1 node (n252) has no slice and sends through others";
    assert!(allocated(&plan).1.starts_with(told), "{}", allocated(&plan).1);
}

#[test]
fn what_nobody_owns_any_more_drains_too() {
    let mut inputs = world();
    advance(&mut inputs);
    inputs.allocations.clear();
    let plan = advance(&mut inputs);
    assert!(plan.addresses[0].holdings.iter().all(|it| it.state == State::Draining));
    inputs.nodes.clear();
    advance(&mut inputs);
    inputs.now += QUARANTINE;
    assert_eq!(advance(&mut inputs).addresses, []);
}

#[test]
fn a_second_address_serves_those_whom_the_first_one_left_without() {
    let mut inputs = world();
    inputs.nodes = (0..40).map(|index| node(&format!("n{index:02}"))).collect();
    let plan = advance(&mut inputs);
    let told = "1 address on 32 nodes; 8 nodes (n32, n33, n34, ...) have no slice and send through others, 1 node (n31) has fewer";
    assert!(allocated(&plan).1.starts_with(told), "{}", allocated(&plan).1);
    inputs.allocations[0].request = AddressRequest::Count(2);
    let first = plan.addresses[0].clone();
    let plan = advance(&mut inputs);
    assert_eq!(plan.addresses[0], first, "nothing moves");
    assert_eq!(allocated(&plan), (reason::ALLOCATED, "2 addresses on 40 nodes"));
    for node in (32..40).map(|index| format!("n{index}")) {
        assert_eq!(held(&plan.addresses[1], &node).len(), 8, "{node}");
    }
    assert_eq!(held(&plan.addresses[1], "n31").len(), 8, "had four only");
    // A node that comes later has nothing: whatever becomes free is its before anybody else's.
    inputs.nodes.push(node("n99"));
    inputs.nodes.retain(|node| node.name != "n00");
    advance(&mut inputs);
    inputs.now += QUARANTINE;
    let plan = advance(&mut inputs);
    assert_eq!(held(&plan.addresses[0], "n99").len(), 8);
}

#[test]
fn nobody_holding_anything_is_an_error() {
    let mut inputs = world();
    inputs.allocations[0].slices = SliceSet::range(4, 11);
    inputs.nodes.truncate(1);
    advance(&mut inputs);
    inputs.nodes = vec![node("n9")];
    let plan = advance(&mut inputs);
    assert_eq!(allocated(&plan).0, reason::NO_FREE_SLICE);
}

#[test]
fn a_rest_ends_when_both_clocks_say_so() {
    let mut inputs = world();
    inputs.allocations[0].slices = SliceSet::range(4, 27);
    advance(&mut inputs);
    inputs.nodes[0] = node("n9");
    advance(&mut inputs);
    inputs.now += 10 * QUARANTINE;
    let address = inputs.addresses[0].address;
    inputs.unrested = [(address, SliceSet::range(4, 5))].into();
    let plan = advance(&mut inputs);
    let resting = slices_of(&plan.addresses[0], "n1", |state| matches!(state, State::Quarantined { .. }));
    assert_eq!(resting, SliceSet::range(4, 5), "seen resting for a moment only");
    assert_eq!(held(&plan.addresses[0], "n9"), SliceSet::range(6, 11));
    inputs.unrested.clear();
    assert_eq!(held(&advance(&mut inputs).addresses[0], "n9"), SliceSet::range(4, 11));
}
