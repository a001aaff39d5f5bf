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
    inputs.allocations[0].sites = [("s1".to_owned(), site("a", 1)), ("s2".to_owned(), site("b", 1))].into();
    for (node, at) in inputs.nodes.iter_mut().zip(["a", "b", "c"]) {
        node.labels = zone(at);
    }
    inputs.nodes[1].ready = false;
    let plan = advance(&mut inputs);
    assert_eq!(
        allocated(&plan),
        (
            reason::ALLOCATED,
            "1 address on 1 node; spec.sites \"s2\": nodes match, but none has a ready agent; see `kubectl get egressnodes`"
        )
    );
    assert_eq!(held(&plan.addresses[0], "n2").len() + held(&plan.addresses[0], "n3").len(), 0);
    inputs.nodes[1].ready = true;
    assert_eq!(held(&advance(&mut inputs).addresses[0], "n2").len(), 8);
    // No longer ready: keeps all, and gets no more.
    inputs.nodes[1].ready = false;
    inputs.nodes[1].demand.insert(name("a"), 20);
    let plan = advance(&mut inputs);
    assert_eq!(held(&plan.addresses[0], "n2").len(), 8);
    assert_eq!(allocated(&plan).1, "1 address on 2 nodes", "that an agent restarts is no news");
}

#[test]
fn no_node_is_told() {
    let mut inputs = world();
    inputs.allocations[0].sites = [("s1".to_owned(), site("a", 1))].into();
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
    inputs.allocations[0].sites = [("s1".to_owned(), site("a", 1))].into();
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
fn slices_of_a_node_that_its_agent_is_leaving_drain_and_go_to_others() {
    let mut inputs = world();
    // Eight for each, and none left over.
    inputs.allocations[0].slices = SliceSet::range(4, 27);
    let before = advance(&mut inputs).addresses.remove(0);
    inputs.nodes[0].demand.insert(name("a"), 16);
    (inputs.nodes[2].leaving, inputs.nodes[2].ready) = (true, false);
    inputs.nodes[2].demand.insert(name("a"), 16);
    let draining = advance(&mut inputs).addresses.remove(0);
    assert_eq!(slices_of(&draining, "n3", |state| state == State::Draining), held(&before, "n3"));
    report_drained(&mut inputs.nodes[2], &[draining]);
    advance(&mut inputs);
    inputs.now += QUARANTINE;
    let after = advance(&mut inputs).addresses.remove(0);
    assert_eq!(held(&after, "n1"), held(&before, "n1").union(held(&before, "n3")));
    // It stays: as for any node that has not enough.
    (inputs.nodes[2].leaving, inputs.nodes[2].ready) = (false, true);
    let lacks = advance(&mut inputs).addresses.remove(0);
    report_drained(&mut inputs.nodes[0], &[lacks]);
    advance(&mut inputs);
    inputs.now += QUARANTINE;
    assert_eq!(held(&advance(&mut inputs).addresses[0], "n3").len(), 8);
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
    inputs.allocations[0].sites = [("s1".to_owned(), site("a", 1))].into();
    assert_eq!(held(&advance(&mut inputs).addresses[0], "n1").len(), 0);
    inputs.nodes[0] = Node { labels: zone("a"), ready: false, ..node("n1") };
    assert_eq!(held(&advance(&mut inputs).addresses[0], "n1"), held(&before, "n1"));
}

/// Plans until nothing changes, with all flows over at once and all rests.
fn settled(inputs: &mut Inputs) -> Address {
    for _ in 0..10 {
        let before = inputs.addresses.clone();
        inputs.nodes.iter_mut().for_each(|node| report_drained(node, &before));
        inputs.now += QUARANTINE;
        let address = advance(inputs).addresses.remove(0);
        if inputs.addresses == before {
            return address;
        }
    }
    panic!("goes on and on: {:#?}", inputs.addresses);
}

fn counts<const N: usize>(address: &Address, nodes: [&str; N]) -> [u32; N] {
    nodes.map(|node| held(address, node).len())
}

#[test]
fn who_has_much_gives_to_who_lacks_the_minimum_and_no_more_than_that() {
    let mut inputs = world();
    inputs.allocations[0].slices = SliceSet::range(4, 33);
    inputs.nodes[0].demand.insert(name("a"), 200);
    let address = advance(&mut inputs).addresses.remove(0);
    assert_eq!(counts(&address, ["n1", "n2", "n3"]), [14, 8, 8]);
    inputs.nodes.push(node("n4"));
    let address = advance(&mut inputs).addresses.remove(0);
    assert_eq!(
        counts(&address, ["n1", "n2", "n3", "n4"]),
        [8, 8, 8, 0],
        "what drains is n4's, once it is empty"
    );
    assert_eq!(slices_of(&address, "n1", |it| it == State::Draining).len(), 6);
    assert_eq!(advance(&mut inputs).addresses[0], address, "and nothing else until then");
    let address = settled(&mut inputs);
    assert_eq!(counts(&address, ["n1", "n2", "n3", "n4"]), [8, 8, 8, 6], "nobody gives of the minimum");
}

#[test]
fn who_wants_more_gets_its_share_of_what_others_hold_beyond_theirs() {
    let mut inputs = world();
    inputs.nodes[0].demand.insert(name("a"), 252);
    let address = settled(&mut inputs);
    assert_eq!(counts(&address, ["n1", "n2", "n3"]), [236, 8, 8]);
    // Less than its share: n1 gives just as much as n2 wants.
    inputs.nodes[1].demand.insert(name("a"), 20);
    let address = settled(&mut inputs);
    assert_eq!(counts(&address, ["n1", "n2", "n3"]), [224, 20, 8]);
    // More than there is for both: the same for each, and an odd slice stays where it is.
    inputs.nodes[1].demand.insert(name("a"), 252);
    inputs.nodes[2].demand.insert(name("a"), 9);
    let address = settled(&mut inputs);
    assert_eq!(counts(&address, ["n1", "n2", "n3"]), [122, 121, 9]);
    // n2 needs no more than before: n1 has it back.
    inputs.nodes[1].demand.insert(name("a"), 20);
    let address = settled(&mut inputs);
    assert_eq!(counts(&address, ["n1", "n2", "n3"]), [223, 20, 9]);
}

#[test]
fn an_odd_slice_stays_where_it_is() {
    let mut inputs = world();
    inputs.nodes.truncate(2);
    (inputs.allocations[0].slices, inputs.allocations[0].per_node_min) = (SliceSet::range(4, 24), 1);
    inputs.nodes[1].demand.insert(name("a"), 252);
    assert_eq!(counts(&settled(&mut inputs), ["n1", "n2"]), [1, 20]);
    inputs.nodes[0].demand.insert(name("a"), 252);
    assert_eq!(counts(&settled(&mut inputs), ["n1", "n2"]), [10, 11], "not to the first by name");
}

/// Zones `a` and `b` with weights, three nodes in `a` and one in `b`.
fn two_sites(weights: [u32; 2]) -> Inputs {
    let mut inputs = world();
    inputs.nodes.push(node("n4"));
    for (node, at) in inputs.nodes.iter_mut().zip(["a", "a", "a", "b"]) {
        node.labels = zone(at);
    }
    weigh(&mut inputs, weights);
    inputs
}

fn weigh(inputs: &mut Inputs, [a, b]: [u32; 2]) {
    inputs.allocations[0].sites = [("s1".to_owned(), site("a", a)), ("s2".to_owned(), site("b", b))].into();
}

const FOUR: [&str; 4] = ["n1", "n2", "n3", "n4"];

#[test]
fn a_site_has_its_share_by_weight() {
    let mut inputs = two_sites([1, 3]);
    for node in &mut inputs.nodes {
        node.demand.insert(name("a"), 252);
    }
    let address = settled(&mut inputs);
    assert_eq!(counts(&address, FOUR), [21, 21, 21, 189]);
    let before = address;
    // Other weights move what they must: 63 slices, all of which were n4's.
    weigh(&mut inputs, [1, 1]);
    let address = advance(&mut inputs).addresses.remove(0);
    assert_eq!(counts(&address, FOUR), [21, 21, 21, 126]);
    for node in ["n1", "n2", "n3"] {
        assert_eq!(held(&address, node), held(&before, node));
    }
    let address = settled(&mut inputs);
    assert_eq!(counts(&address, FOUR), [42, 42, 42, 126]);
    for node in FOUR {
        let (kept, had) = (held(&address, node).intersection(held(&before, node)), held(&before, node));
        assert_eq!(kept.len(), had.len().min(held(&address, node).len()), "{node} keeps what it can");
    }
    weigh(&mut inputs, [1, 3]);
    assert_eq!(counts(&settled(&mut inputs), FOUR), [21, 21, 21, 189]);
}

#[test]
fn a_share_is_not_lent_to_other_sites() {
    let mut inputs = two_sites([1, 1]);
    inputs.nodes[0].demand.insert(name("a"), 252);
    inputs.nodes[3].ready = false;
    assert_eq!(counts(&settled(&mut inputs), FOUR), [110, 8, 8, 0]);
    inputs.nodes[3].ready = true;
    inputs.nodes[3].demand.insert(name("a"), 252);
    assert_eq!(counts(&settled(&mut inputs), FOUR), [110, 8, 8, 126]);
}

#[test]
fn what_drains_is_a_sites_own_until_it_is_empty() {
    let mut inputs = two_sites([1, 1]);
    (inputs.allocations[0].slices, inputs.allocations[0].per_node_min) = (SliceSet::range(4, 23), 2);
    inputs.nodes[0].demand.insert(name("a"), 10);
    assert_eq!(counts(&settled(&mut inputs), FOUR), [6, 2, 2, 2]);
    inputs.nodes[0].demand.clear();
    inputs.nodes[1].demand.insert(name("a"), 10);
    let address = advance(&mut inputs).addresses.remove(0);
    assert_eq!(counts(&address, FOUR), [2, 2, 2, 2], "what is free is the other site's");
    assert_eq!(counts(&settled(&mut inputs), FOUR), [2, 6, 2, 2]);
}

#[test]
fn a_node_of_several_sites_belongs_to_the_first_by_name() {
    let mut inputs = two_sites([1, 1]);
    inputs.nodes[3].demand.insert(name("a"), 252);
    // "s1" selects all of them now.
    inputs.nodes.iter_mut().for_each(|node| drop(node.labels.insert("all".into(), "yes".into())));
    inputs.allocations[0].sites.get_mut("s1").unwrap().selector =
        [("all".to_owned(), "yes".to_owned())].into();
    let plan = advance(&mut inputs);
    assert_eq!(counts(&plan.addresses[0], FOUR), [8, 8, 8, 102]);
    let told = allocated(&plan).1;
    assert!(told.contains("spec.sites \"s2\": no node matches, so that its 126 slices"), "{told}");
    let sites = &plan.allocations[&name("a")].sites;
    let figures = |at: usize| (sites[at].nodes, sites[at].usable, sites[at].holders, sites[at].held);
    assert_eq!((figures(0), figures(1)), ((4, 4, 4, 126), (0, 0, 0, 0)));
}

#[test]
fn a_share_that_is_too_small_for_the_minima_is_told() {
    let mut inputs = two_sites([1, 12]);
    let plan = advance(&mut inputs);
    assert_eq!(counts(&plan.addresses[0], FOUR), [8, 8, 3, 8]);
    let told = allocated(&plan).1;
    let part = "spec.sites \"s1\": its weight gives it 19 slices of each address, which are fewer than spec.ports.perNode.min (8) for each of its 3 ready nodes";
    assert!(told.contains(part), "{told}");
    // An even smaller one: who is first by name keeps the minimum.
    weigh(&mut inputs, [1, 20]);
    assert_eq!(counts(&settled(&mut inputs), FOUR), [8, 4, 0, 8]);
    inputs.nodes[3] = Node { labels: zone("b"), ready: false, ..node("n5") };
    let plan = advance(&mut inputs);
    let told = allocated(&plan).1;
    assert!(told.contains("spec.sites \"s2\": nodes match, but none has a ready agent"), "{told}");
}

#[test]
fn demand_counts_for_each_address() {
    let mut inputs = world();
    inputs.allocations[0].request = AddressRequest::Count(2);
    inputs.nodes[0].demand.insert(name("a"), 21);
    let plan = advance(&mut inputs);
    assert_eq!(plan.addresses.iter().map(|it| held(it, "n1").len()).collect::<Vec<_>>(), [21, 21]);
}

#[test]
fn what_a_node_no_longer_wants_drains_and_comes_back_while_it_does() {
    let mut inputs = world();
    inputs.nodes[0].demand.insert(name("a"), 60);
    advance(&mut inputs);
    for (demand, held_and_draining) in [(30, (30, 30)), (5, (8, 52)), (40, (40, 20)), (41, (41, 19))] {
        inputs.nodes[0].demand.insert(name("a"), demand);
        let address = advance(&mut inputs).addresses.remove(0);
        let (own, drains) =
            (held(&address, "n1"), slices_of(&address, "n1", |state| state == State::Draining));
        assert_eq!((own.len(), drains.len()), held_and_draining, "wants {demand}");
        assert_eq!((own.runs().len(), drains.runs().len()), (1, 1), "long runs: {address:#?}");
    }
    // What is empty rests, and a node that wants more by then gets other slices.
    let standing = inputs.addresses.clone();
    report_drained(&mut inputs.nodes[0], &standing);
    advance(&mut inputs);
    inputs.nodes[0].demand.insert(name("a"), 50);
    let address = advance(&mut inputs).addresses.remove(0);
    assert_eq!(held(&address, "n1").len(), 50);
    assert_eq!(slices_of(&address, "n1", |it| matches!(it, State::Quarantined { .. })).len(), 19);
}

#[test]
fn short_runs_are_given_back_first() {
    let mut inputs = world();
    inputs.allocations[0].per_node_min = 2;
    inputs.nodes.truncate(1);
    inputs.nodes[0].demand.insert(name("a"), 10);
    advance(&mut inputs);
    let holding = |first, last| Holding { first, last, node: "n1".into(), epoch: 1, state: State::Held };
    inputs.addresses[0].holdings = vec![holding(4, 9), holding(20, 21), holding(30, 31)];
    inputs.nodes[0].demand.insert(name("a"), 7);
    let address = advance(&mut inputs).addresses.remove(0);
    assert_eq!(held(&address, "n1").runs(), [(4, 9), (20, 20)]);
}

#[test]
fn a_node_that_does_not_report_keeps_what_it_has() {
    let mut inputs = world();
    inputs.nodes[0].demand.insert(name("a"), 60);
    let before = advance(&mut inputs).addresses;
    inputs.nodes[0] = Node { ready: false, ..node("n1") };
    assert_eq!(advance(&mut inputs).addresses, before);
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
