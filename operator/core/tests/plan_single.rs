//! Single IPv6 addresses: their ports are cut like those of an IPv4 address.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use aegis_core::audit::{Unfit, Violation};
use aegis_core::egress::{Egress, Kind};
use aegis_core::model::*;
use aegis_core::slice::SliceSet;
use aegis_core::{Plan, reason};
use support::*;

const ONE: &str = "2001:db8:7::9";

/// The world with one IPv6 address beside the IPv4 prefix; allocation `a` wants it, and no IPv4 address.
fn single() -> Inputs {
    let mut inputs = world();
    inputs.prefixes.push(prefix("one", "2001:db8:7::9/128"));
    inputs.allocations[0].prefixes = vec!["one".into()];
    (inputs.allocations[0].request, inputs.allocations[0].ipv6) = (AddressRequest::Count(0), 1);
    inputs
}

/// As [`single`], of which the allocation wants an IPv4 address and a /64, too.
fn mixed() -> Inputs {
    let mut inputs = single();
    inputs.prefixes.push(prefix("six", "2001:db8::/62"));
    inputs.allocations[0].prefixes = ["p", "one", "six"].map(str::to_owned).to_vec();
    (inputs.allocations[0].request, inputs.allocations[0].ipv6) = (AddressRequest::Count(1), 2);
    inputs
}

/// The same with an IPv4 address in place of the single one.
fn alike() -> Inputs {
    let mut inputs = single();
    inputs.allocations[0].prefixes = vec!["p".into()];
    (inputs.allocations[0].request, inputs.allocations[0].ipv6) = (AddressRequest::Count(1), 0);
    inputs
}

fn of(plan: &Plan, kind: Kind) -> &Address {
    let mut found = plan.addresses.iter().filter(|it| it.address.kind() == kind);
    let one = found.next().unwrap_or_else(|| panic!("no {kind:?} in {plan:#?}"));
    assert!(found.next().is_none(), "{plan:#?}");
    one
}

fn allocated(plan: &Plan) -> (&'static str, &str) {
    let verdict = &plan.allocations[&name("a")].allocated;
    (verdict.reason(), verdict.message())
}

fn drained(inputs: &mut Inputs) {
    let addresses = inputs.addresses.clone();
    inputs.nodes.iter_mut().for_each(|node| report_drained(node, &addresses));
}

/// What happens to an address, as it was planned each time.
fn life(mut inputs: Inputs) -> Vec<Plan> {
    let mut plans = Vec::new();
    let mut next = |inputs: &mut Inputs| plans.push(advance(inputs));
    next(&mut inputs);
    // It grows, others join, and it shrinks again.
    inputs.nodes[0].demand = [(name("a"), 40)].into();
    next(&mut inputs);
    inputs.nodes.extend((4..9).map(|index| node(&format!("n{index}"))));
    inputs.nodes[1].demand = [(name("a"), 240)].into();
    next(&mut inputs);
    drained(&mut inputs);
    next(&mut inputs);
    inputs.now += QUARANTINE;
    next(&mut inputs);
    inputs.nodes[1].demand.clear();
    next(&mut inputs);
    drained(&mut inputs);
    next(&mut inputs);
    // A node goes, the ports become fewer, and the sites are cut anew.
    inputs.nodes.remove(2);
    next(&mut inputs);
    inputs.now += QUARANTINE;
    next(&mut inputs);
    inputs.allocations[0].slices = SliceSet::range(64, 127);
    inputs.allocations[0].per_node_max = 16;
    next(&mut inputs);
    inputs.nodes[0].labels = zone("a");
    inputs.nodes[3].labels = zone("b");
    inputs.allocations[0].sites =
        [("east".to_owned(), site("a", 1)), ("west".to_owned(), site("b", 3))].into();
    inputs.allocations[0].fence = Some(60);
    next(&mut inputs);
    drained(&mut inputs);
    next(&mut inputs);
    inputs.now += QUARANTINE;
    next(&mut inputs);
    inputs.allocations[0].deleting = true;
    next(&mut inputs);
    drained(&mut inputs);
    next(&mut inputs);
    inputs.now += QUARANTINE;
    next(&mut inputs);
    plans
}

#[test]
fn it_lives_like_an_ipv4_address() {
    let (six, four) = (life(single()), life(alike()));
    for (step, (six, four)) in six.iter().zip(&four).enumerate() {
        let holdings =
            |plan: &Plan| plan.addresses.iter().map(|it| (it.epoch, it.holdings.clone(), it.fence)).next();
        assert_eq!(holdings(six), holdings(four), "step {step}");
        let sites = |plan: &Plan| plan.allocations[&name("a")].sites.clone();
        assert_eq!((sites(six), six.wake), (sites(four), four.wake), "step {step}");
    }
    assert_eq!(of(&six[0], Kind::Single).address, ip(ONE));
    assert_eq!(held(of(&six[1], Kind::Single), "n1").len(), 40);
    assert!(six.last().unwrap().addresses.is_empty(), "it is deleted");
}

#[test]
fn every_node_has_its_ports() {
    let mut inputs = single();
    let plan = advance(&mut inputs);
    for node in ["n1", "n2", "n3"] {
        assert_eq!(held(of(&plan, Kind::Single), node).len(), 8);
    }
    assert_eq!(allocated(&plan), (reason::ALLOCATED, "1 single IPv6 address on 3 nodes"));
    let one = &plan.prefixes["one"];
    assert_eq!((one.capacity, one.used, one.free, one.reserved), (1, 1, 0, 0));
    assert!(
        one.accepted.message().starts_with("2001:db8:7::9/128 is available"),
        "{}",
        one.accepted.message()
    );
}

#[test]
fn a_slice_rests_between_two_nodes() {
    let mut inputs = single();
    let before = advance(&mut inputs);
    let gone = held(of(&before, Kind::Single), "n2");
    inputs.nodes.retain(|node| node.name != "n2");
    inputs.nodes[0].demand = [(name("a"), 252)].into();
    let resting = advance(&mut inputs);
    let own = |plan: &Plan| held(of(plan, Kind::Single), "n1");
    let is_resting = |state| matches!(state, State::Quarantined { .. });
    assert_eq!(slices_of(of(&resting, Kind::Single), "n2", is_resting), gone);
    inputs.now += QUARANTINE - 1;
    assert!(own(&advance(&mut inputs)).intersection(gone).is_empty());
    inputs.now += 1;
    let rested = advance(&mut inputs);
    assert_eq!(own(&rested).intersection(gone), gone);
    assert_eq!(own(&rested).len(), 252 - 8, "all but what the other has");
}

#[test]
fn each_address_of_an_allocation_goes_by_its_own_rules() {
    let mut inputs = mixed();
    (inputs.allocations[0].per_node_min, inputs.allocations[0].slices) = (20, SliceSet::range(30, 255));
    inputs.nodes[0].demand = [(name("a"), 100)].into();
    let plan = advance(&mut inputs);
    let [four, network, one] = Kind::ALL.map(|kind| of(&plan, kind));
    assert_eq!((one.address, network.address), (ip(ONE), ip("2001:db8::/64")));
    for node in ["n1", "n2", "n3"] {
        assert_eq!(held(four, node), held(one, node));
        assert_eq!(held(network, node).len(), 1);
    }
    assert_eq!((held(one, "n1").len(), held(one, "n2").len()), (100, 20));
    assert_eq!(
        allocated(&plan),
        (reason::ALLOCATED, "1 address on 3 nodes; 1 IPv6 /64 on 3 nodes; 1 single IPv6 address on 3 nodes")
    );
    assert_eq!(advance(&mut inputs).addresses, plan.addresses);
}

#[test]
fn prefixes_are_used_in_order_whatever_they_have() {
    let taken = |prefixes: &[&str], count| {
        let mut inputs = mixed();
        inputs.prefixes.push(prefix("two", "2001:db8:8::1/128"));
        inputs.allocations[0].prefixes = prefixes.iter().map(|name| (*name).to_owned()).collect();
        (inputs.allocations[0].request, inputs.allocations[0].ipv6) = (AddressRequest::Count(0), count);
        let plan = advance(&mut inputs);
        plan.addresses.iter().map(|it| it.address.to_string()).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(taken(&["six", "one"], 1), "2001:db8::/64");
    assert_eq!(taken(&["one", "six"], 1), "2001:db8:7::9");
    assert_eq!(taken(&["one", "six"], 3), "2001:db8::/64 2001:db8:0:1::/64 2001:db8:7::9");
    assert_eq!(taken(&["two", "one", "six"], 2), "2001:db8:7::9 2001:db8:8::1");
}

#[test]
fn fewer_gives_back_the_highest_and_that_drains_and_rests() {
    let mut inputs = mixed();
    advance(&mut inputs);
    inputs.allocations[0].ipv6 = 1;
    let plan = advance(&mut inputs);
    assert!(of(&plan, Kind::Single).holdings.iter().all(|it| it.state == State::Draining));
    assert!(of(&plan, Kind::Network).is_held());
    assert_eq!(allocated(&plan).1, "1 address on 3 nodes; 1 IPv6 /64 on 3 nodes");
    assert_eq!(advance(&mut inputs).addresses.len(), 3, "nobody has said anything");
    drained(&mut inputs);
    assert_eq!(advance(&mut inputs).addresses.len(), 3, "it rests");
    inputs.now += QUARANTINE;
    assert_eq!(advance(&mut inputs).addresses.len(), 2);
}

#[test]
fn a_list_names_it_and_not_as_a_part_of_a_64() {
    let mut inputs = mixed();
    let listed = ["192.0.2.3", "2001:db8:0:2::/64", ONE].map(ip);
    inputs.allocations[0].request = AddressRequest::Explicit(listed.to_vec());
    let plan = advance(&mut inputs);
    assert_eq!(plan.addresses.iter().map(|it| it.address).collect::<Vec<Egress>>(), listed);
    let refused = |address: &str| {
        let mut inputs = inputs.clone();
        inputs.allocations[0].request = AddressRequest::Explicit(vec![ip(address)]);
        advance(&mut inputs).allocations[&name("a")].accepted.message().to_owned()
    };
    assert!(
        refused("2001:db8:0:1::5").starts_with(
            "spec.addresses.explicit[0]: 2001:db8:0:1::5 is a part of 2001:db8:0:1::/64, and AegisPrefix \"six\" has whole /64s; \
             choose 2001:db8:0:1::/64, or have a prefix of 2001:db8:0:1::5/128"
        ),
        "{}",
        refused("2001:db8:0:1::5")
    );
    for other in ["2001:db8:7::/64", "2001:db8:7::8"] {
        let begin =
            format!("spec.addresses.explicit[0]: {other} is not in AegisPrefix \"p\", \"one\", \"six\"");
        assert!(refused(other).starts_with(&begin), "{}", refused(other));
    }
}

#[test]
fn what_is_missing_is_told_as_what_the_prefixes_have() {
    let told = |prefixes: &[&str]| {
        let mut inputs = mixed();
        inputs.allocations[0].prefixes = prefixes.iter().map(|name| (*name).to_owned()).collect();
        (inputs.allocations[0].request, inputs.allocations[0].ipv6) = (AddressRequest::Count(0), 6);
        let plan = advance(&mut inputs);
        let (reason, message) = allocated(&plan);
        assert_eq!(reason, reason::NO_FREE_ADDRESS);
        message.split(';').next().unwrap().to_owned()
    };
    assert_eq!(
        told(&["one"]),
        "spec.addresses.ipv6: 1 of 6 addresses allocated, no single IPv6 address is free in AegisPrefix \"one\""
    );
    assert_eq!(
        told(&["one", "six"]),
        "spec.addresses.ipv6: 5 of 6 addresses allocated, no /64, and no single IPv6 address, is free in AegisPrefix \"one\", \"six\""
    );
    assert!(told(&["six"]).contains("no /64 is free"), "{}", told(&["six"]));
}

#[test]
fn a_node_without_ports_sends_nothing_and_that_is_told() {
    let mut inputs = single();
    inputs.nodes = (0..40).map(|index| node(&format!("n{index:02}"))).collect();
    let plan = advance(&mut inputs);
    let (reason, message) = allocated(&plan);
    assert_eq!(reason, reason::ALLOCATED);
    assert_eq!(
        message,
        "1 single IPv6 address on 32 nodes; 8 nodes (n32, n33, n34, ...) have no slice and send nothing over IPv6, 1 node (n31) has \
         fewer than spec.ports.perNode.min, as no slice is free: use more addresses, lower spec.ports.perNode.min for nodes to come, \
         or widen spec.ports"
    );
    // Where it has a part of a /64 it is only the single address that it cannot use.
    let mut inputs = mixed();
    inputs.nodes = (0..40).map(|index| node(&format!("n{index:02}"))).collect();
    let plan = advance(&mut inputs);
    let message = allocated(&plan).1;
    assert!(
        message.contains("8 nodes (n32, n33, n34, ...) have no slice and send through others"),
        "{message}"
    );
    assert!(
        message.contains(
            "8 nodes (n32, n33, n34, ...) have no slice and send nothing over IPv6 from single addresses"
        ),
        "{message}"
    );
}

#[test]
fn sites_have_their_shares_of_it() {
    let mut inputs = single();
    inputs.allocations[0].sites =
        [("east".to_owned(), site("a", 1)), ("west".to_owned(), site("b", 3))].into();
    inputs.nodes[0].labels = zone("a");
    inputs.nodes[1].labels = zone("b");
    inputs.nodes.iter_mut().for_each(|node| node.demand = [(name("a"), 252)].into());
    let plan = advance(&mut inputs);
    let has = ["n1", "n2", "n3"].map(|node| held(of(&plan, Kind::Single), node).len());
    assert_eq!(has, [63, 189, 0]);
    let sites: Vec<_> =
        plan.allocations[&name("a")].sites.iter().map(|it| (it.name.as_str(), it.quota, it.held)).collect();
    assert_eq!(sites, [("east", 63, 63), ("west", 189, 189)]);
}

#[test]
fn one_is_delegated_and_used_up() {
    let mut inputs = single();
    inputs.prefixes[1].account = "owner".into();
    inputs.prefixes[1].delegations =
        vec![Delegation { name: "d".into(), to: Delegate::Account("shop".into()), max: 1 }];
    inputs.allocations.push(Allocation { created: 2, ..inputs.allocations[0].clone() });
    inputs.allocations[1].name = name("b");
    let plan = advance(&mut inputs);
    assert_eq!(plan.addresses.len(), 1);
    let second = &plan.allocations[&name("b")].allocated;
    assert_eq!(second.reason(), reason::DELEGATION_LIMIT, "{second:?}");
    assert!(!inputs.allocations[0].deleting && plan.allocations[&name("a")].allocated.is_good());
}

#[test]
fn a_nodes_own_address_is_no_egress_address() {
    let mut inputs = single();
    inputs.nodes[0].addresses = vec!["2001:db8:7::9".parse().unwrap()];
    let plan = advance(&mut inputs);
    assert!(plan.addresses.is_empty());
    assert_eq!(allocated(&plan).0, reason::NO_FREE_ADDRESS);
    inputs.nodes[0].addresses = vec!["2001:db8:7::a".parse().unwrap()];
    assert_eq!(advance(&mut inputs).addresses.len(), 1, "another of the same /64 does not matter");
}

/// Prefixes do not overlap, but addresses of one that is gone may still be in use.
#[test]
fn nobody_gets_an_address_of_a_64_that_is_in_use() {
    let mut inputs = mixed();
    let whole = Prefix { created: 5, ..prefix("whole", "2001:db8:7::/64") };
    inputs.prefixes.retain(|it| it.name != "one");
    inputs.prefixes.push(whole);
    inputs.allocations[0].prefixes = vec!["whole".into()];
    (inputs.allocations[0].request, inputs.allocations[0].ipv6) = (AddressRequest::Count(0), 1);
    let plan = advance(&mut inputs);
    assert_eq!(of(&plan, Kind::Network).address, ip("2001:db8:7::/64"));
    // Somebody took the prefix's finalizer away, and made another one of one address.
    inputs.prefixes.retain(|it| it.name != "whole");
    inputs.prefixes.push(prefix("one", "2001:db8:7::9/128"));
    inputs.allocations.push(Allocation { created: 2, ..inputs.allocations[0].clone() });
    (inputs.allocations[1].name, inputs.allocations[1].prefixes) = (name("b"), vec!["one".into()]);
    let plan = advance(&mut inputs);
    let second = |plan: &Plan| plan.allocations[&name("b")].allocated.clone();
    assert_eq!((plan.addresses.len(), second(&plan).reason()), (1, reason::NO_FREE_ADDRESS));
    assert_eq!(plan.prefixes["one"].free, 0);
    inputs.allocations[1].request = AddressRequest::Explicit(vec![ip(ONE)]);
    let told = second(&advance(&mut inputs)).message().to_owned();
    assert!(
        told.starts_with(
            "spec.addresses.explicit[0]: 2001:db8:7::9 has addresses in common with 2001:db8:7::/64, which belongs to"
        ),
        "{told}"
    );
    // The audit would not have it either.
    let mut plan = aegis_core::plan(&inputs);
    let new = Address {
        address: ip(ONE),
        prefix: "one".into(),
        allocation: name("b"),
        epoch: START,
        holdings: vec![],
        fence: None,
    };
    plan.addresses.push(new);
    plan.prefixes.get_mut("one").unwrap().used = 1;
    let found = aegis_core::audit(&inputs, &plan).unwrap_err();
    let why = "it has addresses in common with another";
    assert_eq!(found, [Violation::AddressTaken { address: ip(ONE), why }]);
    // It is free when nobody sends from the /64 any more.
    inputs.allocations[0].deleting = true;
    advance(&mut inputs);
    drained(&mut inputs);
    advance(&mut inputs);
    inputs.now += QUARANTINE;
    let gone = advance(&mut inputs);
    assert!(gone.addresses.is_empty());
    assert_eq!(of(&advance(&mut inputs), Kind::Single).address, ip(ONE));
}

#[test]
fn an_address_of_a_withheld_64_is_withheld() {
    let mut inputs = single();
    inputs.withheld = [(ip("2001:db8:7::/64"), None)].into();
    let plan = advance(&mut inputs);
    assert!(plan.addresses.is_empty());
    assert_eq!(plan.prefixes["one"].free, 0);
    inputs.allocations[0].request = AddressRequest::Explicit(vec![ip(ONE)]);
    let plan = advance(&mut inputs);
    assert_eq!(allocated(&plan).0, reason::WITHHELD);
    inputs.withheld.clear();
    assert_eq!(advance(&mut inputs).addresses.len(), 1);
}

#[test]
fn the_audit_knows_its_rules() {
    let mut inputs = single();
    inputs.allocations[0].slices = SliceSet::range(4, 99);
    inputs.allocations[0].per_node_max = 10;
    advance(&mut inputs);
    let audited = |change: &dyn Fn(&mut Address)| {
        let mut plan = aegis_core::plan(&inputs);
        plan.addresses[0].epoch += 1;
        change(&mut plan.addresses[0]);
        aegis_core::audit(&inputs, &plan).unwrap_err()
    };
    let more = |node: &'static str, first, last| {
        move |address: &mut Address| {
            let epoch = address.epoch;
            let held = Holding { first, last, node: node.into(), epoch, state: State::Held };
            address.holdings.push(held);
            address.holdings.sort_by_key(|it| it.first);
        }
    };
    let found = audited(&more("n1", 4, 4));
    assert!(found.contains(&Violation::TwoOwners { address: ip(ONE), slice: 4 }), "two owners: {found:?}");
    let found = audited(&more("n1", 200, 200));
    assert!(
        matches!(found[..], [Violation::Granted { slice: 200, why: Unfit::Slice, .. }]),
        "outside of spec.ports: {found:?}"
    );
    let found = audited(&more("n1", 70, 79));
    assert!(
        found.iter().all(|it| matches!(it, Violation::Granted { why: Unfit::Maximum, .. }))
            && !found.is_empty(),
        "more than perNode.max: {found:?}"
    );
    let found = audited(&|address| {
        let other = address.holdings.iter().find(|it| it.node != address.holdings[0].node);
        address.holdings[0].node = other.unwrap().node.clone();
    });
    assert!(found.iter().any(|it| matches!(it, Violation::Moved { .. })), "another's: {found:?}");
    let found = audited(&|address| drop(address.holdings.pop()));
    assert!(found.iter().any(|it| matches!(it, Violation::NotDrained { .. })), "taken away: {found:?}");
    let found = audited(&|address| {
        address.holdings[0].state = State::Draining;
        address.holdings[0].epoch = address.epoch;
    });
    assert!(
        found.iter().any(|it| matches!(it, Violation::Minimum { .. } | Violation::NoReason { .. })),
        "less than perNode.min: {found:?}"
    );
    let mut plan = aegis_core::plan(&inputs);
    plan.addresses[0].epoch -= 1;
    let found = aegis_core::audit(&inputs, &plan).unwrap_err();
    assert!(matches!(found[..], [Violation::AddressEpoch { .. }]), "the epoch goes back: {found:?}");
    // Early out of the quarantine.
    inputs.nodes.retain(|node| node.name != "n2");
    advance(&mut inputs);
    inputs.now += QUARANTINE - 1;
    let mut plan = aegis_core::plan(&inputs);
    let address = &mut plan.addresses[0];
    address.epoch += 1;
    address.holdings.retain(|it| it.state == State::Held);
    plan.wake = None;
    let found = aegis_core::audit(&inputs, &plan).unwrap_err();
    assert!(found.iter().all(|it| matches!(it, Violation::Quarantine { .. })), "{found:?}");
}

#[test]
fn the_audit_knows_of_what_kind_the_addresses_of_a_prefix_are() {
    let mut inputs = mixed();
    inputs.allocations[0].ipv6 = 3;
    let mut plan = aegis_core::plan(&inputs);
    let network = plan.addresses.iter_mut().find(|it| it.address == ip("2001:db8:0:1::/64")).unwrap();
    (network.address, network.holdings) = (ip("2001:db8:0:1::5"), vec![]);
    plan.addresses.sort_by_key(|it| it.address);
    let found = aegis_core::audit(&inputs, &plan).unwrap_err();
    let why = "its prefix has no addresses of its kind";
    assert_eq!(found, [Violation::AddressTaken { address: ip("2001:db8:0:1::5"), why }]);
}
