//! Which addresses allocations get and give back, and what the owners are told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use aegis_core::egress::Egress;
use aegis_core::model::*;
use aegis_core::{Change, Plan, diff, plan, reason};
use support::*;

fn addresses(plan: &Plan, allocation: &str) -> Vec<Egress> {
    plan.addresses.iter().filter(|it| it.allocation == name(allocation)).map(|it| it.address).collect()
}

fn accepted(plan: &Plan) -> (&'static str, &str) {
    let verdict = &plan.allocations[&name("a")].accepted;
    (verdict.reason(), verdict.message())
}

fn allocated(plan: &Plan) -> (&'static str, &str) {
    let verdict = &plan.allocations[&name("a")].allocated;
    (verdict.reason(), verdict.message())
}

fn runs(address: &Address, node: &str) -> Vec<(u8, u8)> {
    held(address, node).runs()
}

#[test]
fn three_nodes_share_an_address() {
    let plan = advance(&mut world());
    let [address] = &plan.addresses[..] else { panic!("{plan:#?}") };
    assert_eq!((address.address, address.prefix.as_str()), (ip("192.0.2.0"), "p"));
    for node in ["n1", "n2", "n3"] {
        assert_eq!(held(address, node).len(), 8);
        assert_eq!(runs(address, node).len(), 1);
    }
    assert_eq!(address.holdings[0].first, 4);
    assert!(address.holdings.iter().all(|holding| holding.epoch == address.epoch));
    assert_eq!(accepted(&plan), (reason::ACCEPTED, "takes addresses from AegisPrefix \"p\""));
    assert_eq!(allocated(&plan), (reason::ALLOCATED, "1 address on 3 nodes"));
    assert_eq!(plan.prefixes["p"].capacity, 4);
    assert_eq!(plan.prefixes["p"].used, 1);
    assert_eq!(plan.wake, None);
}

#[test]
fn every_address_of_a_prefix_is_used() {
    let mut inputs = world();
    inputs.allocations[0].request = AddressRequest::Count(4);
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "a"), ["192.0.2.0", "192.0.2.1", "192.0.2.2", "192.0.2.3"].map(ip));
    assert!(plan.allocations[&name("a")].allocated.is_good());
}

#[test]
fn reserved_addresses_are_not_used_and_the_shortage_is_told() {
    let mut inputs = world();
    inputs.allocations[0].request = AddressRequest::Count(4);
    inputs.prefixes[0].reserved = vec!["192.0.2.0/32".parse().unwrap(), "192.0.2.2/32".parse().unwrap()];
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "a"), ["192.0.2.1", "192.0.2.3"].map(ip));
    assert_eq!(plan.prefixes["p"].capacity, 2);
    let (reason, message) = allocated(&plan);
    assert_eq!(reason, reason::NO_FREE_ADDRESS);
    assert!(message.starts_with("spec.addresses.ipv4: 2 of 4 addresses allocated"), "{message}");
    // What is allocated stays, also when it is reserved later.
    inputs.prefixes[0].reserved.push("192.0.2.1/32".parse().unwrap());
    assert_eq!(addresses(&advance(&mut inputs), "a"), ["192.0.2.1", "192.0.2.3"].map(ip));
}

#[test]
fn prefixes_are_used_in_order_of_preference() {
    let mut inputs = world();
    inputs.prefixes.push(prefix("q", "192.0.2.200/31"));
    inputs.allocations[0].prefixes = vec!["q".into(), "p".into()];
    inputs.allocations[0].request = AddressRequest::Count(3);
    assert_eq!(addresses(&advance(&mut inputs), "a"), ["192.0.2.0", "192.0.2.200", "192.0.2.201"].map(ip));
}

#[test]
fn older_allocations_choose_first() {
    let mut inputs = world();
    inputs.prefixes[0].cidr = "192.0.2.0/31".parse().unwrap();
    inputs.allocations = vec![
        Allocation { created: 3, ..allocation("a") },
        Allocation { created: 2, ..allocation("z") },
        Allocation { created: 2, ..allocation("b") },
    ];
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "b"), [ip("192.0.2.0")]);
    assert_eq!(addresses(&plan, "z"), [ip("192.0.2.1")]);
    assert!(addresses(&plan, "a").is_empty());
    assert_eq!(allocated(&plan).0, reason::NO_FREE_ADDRESS);
}

#[test]
fn explicit_addresses_are_exactly_those() {
    let mut inputs = world();
    inputs.allocations.push(Allocation {
        request: AddressRequest::Explicit(vec![ip("192.0.2.3"), ip("192.0.2.0"), ip("192.0.2.3")]),
        ..allocation("b")
    });
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "a"), [ip("192.0.2.0")]);
    assert_eq!(addresses(&plan, "b"), [ip("192.0.2.3")]);
    let told = &plan.allocations[&name("b")].allocated;
    assert_eq!(told.reason(), reason::NO_FREE_ADDRESS);
    let expected = "spec.addresses.explicit[1]: 192.0.2.0 belongs to EgressAllocation shop/a; ";
    assert!(told.message().starts_with(expected), "{}", told.message());
}

#[test]
fn explicit_addresses_outside_the_prefixes_or_reserved_are_refused() {
    let mut inputs = world();
    inputs.allocations[0].request = AddressRequest::Explicit(vec![ip("192.0.2.1"), ip("192.0.2.4")]);
    let plan = advance(&mut inputs);
    assert_eq!(
        accepted(&plan),
        (
            reason::INVALID,
            "spec.addresses.explicit[1]: 192.0.2.4 is not in AegisPrefix \"p\"; choose an address of these prefixes"
        )
    );
    assert_eq!(allocated(&plan), accepted(&plan));
    assert_eq!(plan.addresses, []);
    inputs.allocations[0].request = AddressRequest::Explicit(vec![ip("192.0.2.1")]);
    inputs.prefixes[0].reserved = vec!["192.0.2.0/31".parse().unwrap()];
    assert_eq!(
        accepted(&advance(&mut inputs)).1,
        "spec.addresses.explicit[0]: 192.0.2.1 is reserved in AegisPrefix \"p\" (spec.reserved, or a node's own address); choose another address"
    );
}

#[test]
fn a_prefix_that_cannot_be_used_is_named() {
    let mut inputs = world();
    inputs.allocations[0].prefixes = vec!["p".into(), "foo".into()];
    let missing = "spec.prefixes[1]: AegisPrefix \"foo\" does not exist; create it or name another";
    assert_eq!(accepted(&plan(&inputs)), (reason::NOT_FOUND, missing));
    inputs.prefixes.push(Prefix { account: "bank".into(), ..prefix("foo", "198.51.100.0/24") });
    assert_eq!(accepted(&plan(&inputs)).0, reason::NOT_PERMITTED);
    assert!(!accepted(&plan(&inputs)).1.contains("bank"), "another account is none of their business");
    inputs.prefixes[1] = Prefix { created: 2, ..prefix("foo", "192.0.2.0/24") };
    let told = plan(&inputs);
    assert_eq!(accepted(&told).0, reason::OVERLAP);
    let message = told.prefixes["foo"].accepted.message();
    assert!(
        message.starts_with("spec.cidr: 192.0.2.0/24 overlaps 192.0.2.0/30 of AegisPrefix \"p\""),
        "{message}"
    );
    assert!(told.prefixes["p"].accepted.is_good(), "the older one counts");
    assert_eq!(told.addresses, [], "nothing is taken while something is wrong");
    inputs.prefixes[1] = Prefix { deleting: true, ..prefix("foo", "198.51.100.0/24") };
    assert_eq!(
        accepted(&plan(&inputs)),
        (reason::DRAINING, "spec.prefixes[1]: AegisPrefix \"foo\" is being deleted; name another")
    );
    inputs.allocations[0].prefixes.clear();
    assert_eq!(accepted(&plan(&inputs)).0, reason::INVALID);
}

#[test]
fn of_prefixes_of_the_same_age_the_first_by_name_counts() {
    let mut inputs = world();
    inputs.prefixes = vec![prefix("q", "192.0.2.0/30"), prefix("p", "192.0.2.0/29")];
    let plan = plan(&inputs);
    assert!(plan.prefixes["p"].accepted.is_good());
    assert!(!plan.prefixes["q"].accepted.is_good());
}

#[test]
fn an_allocation_keeps_what_it_has_when_its_prefix_goes_or_changes_hands() {
    for ruin in [|it: &mut Vec<Prefix>| it.clear(), |it: &mut Vec<Prefix>| it[0].account = "bank".into()] {
        let mut inputs = world();
        let before = advance(&mut inputs);
        ruin(&mut inputs.prefixes);
        let after = advance(&mut inputs);
        assert_eq!(after.addresses, before.addresses);
        assert!(accepted(&after).1.ends_with("(the addresses that are allocated already stay in use)"));
        assert!(after.allocations[&name("a")].allocated.is_good());
        // A node that comes later gets its share too.
        inputs.nodes.push(node("n4"));
        assert_eq!(held(&advance(&mut inputs).addresses[0], "n4").len(), 8);
    }
}

#[test]
fn fewer_addresses_the_highest_drains_and_goes() {
    let mut inputs = world();
    inputs.allocations[0].request = AddressRequest::Count(2);
    advance(&mut inputs);
    inputs.allocations[0].request = AddressRequest::Count(1);
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "a").len(), 2, "until it is drained");
    let states = |address: &Address| address.holdings.iter().map(|it| it.state).collect::<Vec<_>>();
    assert_eq!(states(&plan.addresses[0]), [State::Held; 3]);
    assert_eq!(states(&plan.addresses[1]), [State::Draining; 3]);
    // It is wanted again: what drains comes back.
    let mut again = inputs.clone();
    again.allocations[0].request = AddressRequest::Count(2);
    let back = advance(&mut again);
    assert_eq!(states(&back.addresses[1]), [State::Held; 3]);
    assert!(back.addresses[1].holdings.iter().all(|it| it.epoch == back.addresses[1].epoch));

    let standing = inputs.addresses.clone();
    inputs.nodes.iter_mut().for_each(|node| report_drained(node, &standing));
    let resting = advance(&mut inputs);
    assert_eq!(resting.wake, Some(START + QUARANTINE));
    assert_eq!(addresses(&resting, "a").len(), 2, "until it has rested");
    inputs.now += QUARANTINE - 1;
    assert_eq!(addresses(&advance(&mut inputs), "a").len(), 2);
    inputs.now += 1;
    let observed = inputs.addresses.clone();
    let last = advance(&mut inputs);
    assert_eq!(addresses(&last, "a"), [ip("192.0.2.0")]);
    assert_eq!(diff(&observed, &last), [Change::Delete(ip("192.0.2.1"))]);
}

#[test]
fn explicit_addresses_are_never_surplus() {
    let mut inputs = world();
    inputs.allocations[0].request = AddressRequest::Count(3);
    advance(&mut inputs);
    inputs.allocations[0].request = AddressRequest::Explicit(vec![ip("192.0.2.2")]);
    let plan = advance(&mut inputs);
    let drains = |address: &Address| address.holdings.iter().all(|it| it.state == State::Draining);
    assert_eq!(plan.addresses.iter().map(drains).collect::<Vec<_>>(), [true, true, false]);
}

#[test]
fn a_deleted_allocation_finishes_when_nothing_is_held() {
    let mut inputs = world();
    advance(&mut inputs);
    inputs.allocations[0].deleting = true;
    let finished = |plan: &Plan| addresses(plan, "a").is_empty();
    let plan = advance(&mut inputs);
    assert!(!finished(&plan));
    assert_eq!(allocated(&plan).0, reason::DRAINING);
    // Two nodes report, the third is gone.
    let standing = inputs.addresses.clone();
    inputs.nodes.pop();
    inputs.nodes.iter_mut().for_each(|node| report_drained(node, &standing));
    assert!(!finished(&advance(&mut inputs)));
    inputs.now += QUARANTINE;
    let plan = advance(&mut inputs);
    assert!(finished(&plan));
    assert_eq!(plan.addresses, []);
    assert_eq!(plan.prefixes["p"].used, 0);
}

#[test]
fn an_allocation_that_never_had_anything_finishes_at_once() {
    let mut inputs = world();
    inputs.allocations[0].deleting = true;
    assert!(addresses(&plan(&inputs), "a").is_empty());
}

#[test]
fn an_address_made_again_has_a_higher_epoch() {
    let mut inputs = world();
    let first = advance(&mut inputs).addresses[0].epoch;
    inputs.addresses.clear();
    inputs.now += 1;
    assert!(advance(&mut inputs).addresses[0].epoch > first);
}

#[test]
fn diff_deletes_before_it_writes() {
    let mut inputs = world();
    inputs.allocations[0].request = AddressRequest::Count(3);
    let plan = advance(&mut inputs);
    let mut observed = plan.addresses.clone();
    observed[0].epoch -= 1;
    observed[1].address = ip("192.0.2.200");
    assert_eq!(
        diff(&observed, &plan),
        [
            Change::Delete(ip("192.0.2.200")),
            Change::Replace(plan.addresses[0].clone()),
            Change::Create(plan.addresses[1].clone())
        ]
    );
    assert_eq!(diff(&plan.addresses, &plan), []);
}

#[test]
fn of_fewer_addresses_the_one_in_use_stays() {
    let mut inputs = world();
    inputs.allocations[0].request = AddressRequest::Explicit(vec![ip("192.0.2.2")]);
    advance(&mut inputs);
    inputs.allocations[0].request = AddressRequest::Count(2);
    advance(&mut inputs);
    // The lower one is new, and nobody holds anything of it yet.
    inputs.addresses[0].holdings.clear();
    inputs.allocations[0].request = AddressRequest::Count(1);
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "a"), [ip("192.0.2.2")]);
    assert!(plan.addresses[0].is_held());
}

#[test]
fn an_address_of_a_prefix_that_is_no_longer_named_is_told_and_goes_first() {
    let mut inputs = world();
    inputs.prefixes.push(prefix("q", "198.51.100.0/30"));
    advance(&mut inputs);
    inputs.allocations[0].prefixes = vec!["q".into()];
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "a"), [ip("192.0.2.0")], "partners know it");
    let told = "1 address (192.0.2.0) is not of spec.prefixes and stays in use: to replace one, raise";
    assert!(allocated(&plan).1.contains(told), "{}", allocated(&plan).1);
    inputs.prefixes[0].deleting = true;
    let message = advance(&mut inputs).prefixes["p"].accepted.message().to_owned();
    assert!(message.contains("1 EgressAllocation has addresses of it (shop/a)"), "{message}");
    inputs.allocations[0].request = AddressRequest::Count(2);
    assert_eq!(addresses(&advance(&mut inputs), "a").len(), 2);
    inputs.allocations[0].request = AddressRequest::Count(1);
    let plan = advance(&mut inputs);
    assert_eq!(plan.addresses.iter().map(Address::is_held).collect::<Vec<_>>(), [false, true]);
}

#[test]
fn a_withheld_address_is_nobodys_and_stays_as_it_is() {
    let mut inputs = world();
    let before = advance(&mut inputs).addresses.remove(0);
    let message = "192.0.2.0: nodes send from it".to_owned();
    inputs.withheld = [(ip("192.0.2.0"), Some(message.clone())), (ip("192.0.2.1"), None)].into();
    // It stands: neither a node that goes nor one that comes, nor a deletion, changes it.
    inputs.nodes = vec![node("n2"), node("n9")];
    assert_eq!(advance(&mut inputs).addresses, std::slice::from_ref(&before));
    assert_eq!(allocated(&advance(&mut inputs)), (reason::WITHHELD, message.as_str()));
    let mut deleted = inputs.clone();
    deleted.allocations[0].deleting = true;
    assert_eq!(allocated(&plan(&deleted)), (reason::DRAINING, format!("being deleted: {message}").as_str()));
    assert_eq!(advance(&mut deleted).addresses, std::slice::from_ref(&before));
    let mut orphaned = inputs.clone();
    orphaned.allocations.clear();
    assert_eq!(advance(&mut orphaned).addresses, [before]);

    // It does not stand: others take what is free beside it, and whoever had it waits for it.
    inputs.addresses.clear();
    inputs.allocations[0].listed = [ip("192.0.2.0")].into();
    inputs.allocations.push(allocation("b"));
    let plan = advance(&mut inputs);
    assert!(addresses(&plan, "a").is_empty());
    assert_eq!(allocated(&plan), (reason::WITHHELD, message.as_str()));
    assert_eq!(addresses(&plan, "b"), [ip("192.0.2.2")]);
    inputs.allocations[0].listed.clear();
    inputs.allocations[0].request = AddressRequest::Explicit(vec![ip("192.0.2.1")]);
    assert!(allocated(&advance(&mut inputs)).1.contains("as soon as no node sends from it any more"));
    inputs.withheld.clear();
    inputs.nodes[0]
        .programmed
        .insert(ip("192.0.2.1"), Programmed { epoch: START + 500, ..Default::default() });
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "a"), [ip("192.0.2.1")]);
    assert!(plan.addresses[0].epoch > START + 500, "above what a node has");

    inputs.addresses.clear();
    inputs.nodes[0].programmed.clear();
    inputs.epochs.insert(ip("192.0.2.1"), START + 900);
    let plan = advance(&mut inputs);
    let again = plan.addresses.iter().find(|it| it.address == ip("192.0.2.1")).unwrap();
    assert!(again.epoch > START + 900, "above what a node had");
}

#[test]
fn nodes_have_room_for_so_many_addresses_and_allocations() {
    let mut inputs = Inputs { nodes: vec![node("n1")], now: START, ..Inputs::default() };
    inputs.prefixes = vec![prefix("p", "10.0.0.0/16")];
    let many = |request, count: usize| -> Vec<Allocation> {
        let named = |index| Allocation {
            request: AddressRequest::Count(request),
            ..allocation(&format!("a{index:04}"))
        };
        (0..count).map(named).collect()
    };
    inputs.allocations = many(16, MAX_ADDRESSES / 16 + 1);
    let full = advance(&mut inputs);
    assert_eq!(full.addresses.len(), MAX_ADDRESSES);
    let told = &full.allocations[&name("a0064")].allocated;
    assert_eq!(told.reason(), reason::LIMIT);
    assert!(told.message().contains("1024 egress addresses"), "{}", told.message());
    assert_eq!(advance(&mut inputs).addresses, full.addresses);
    inputs.addresses.clear();
    inputs.allocations = many(1, MAX_ALLOCATIONS + 1);
    let full = advance(&mut inputs);
    assert_eq!(full.addresses.len(), MAX_ALLOCATIONS);
    assert_eq!(full.allocations[&name("a1024")].allocated.reason(), reason::LIMIT, "the oldest come first");
}

#[test]
fn nodes_own_addresses_and_ranges_of_pods_are_not_given_out() {
    let mut inputs = world();
    inputs.nodes[1].addresses = vec!["192.0.2.0".parse().unwrap()];
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "a"), [ip("192.0.2.1")]);
    assert_eq!(plan.prefixes["p"].capacity, 3);
    assert!(
        plan.prefixes["p"].accepted.message().contains("1 address that nodes have themselves (192.0.2.0)")
    );
    inputs.nodes[2].pod_ranges = vec!["192.0.2.0/24".parse().unwrap()];
    inputs.allocations.push(allocation("b"));
    let plan = advance(&mut inputs);
    let told = &plan.prefixes["p"].accepted;
    assert_eq!(told.reason(), reason::OVERLAPS_PODS);
    assert!(told.message().contains("192.0.2.0/24, the pods of node \"n3\""), "{}", told.message());
    assert_eq!(addresses(&plan, "a"), [ip("192.0.2.1")], "what is allocated stays");
    assert!(addresses(&plan, "b").is_empty());
    inputs.nodes[2].pod_ranges.clear();
    inputs.services = vec!["192.0.2.0/24".parse().unwrap()];
    let told = advance(&mut inputs).prefixes["p"].accepted.clone();
    assert_eq!(told.reason(), reason::OVERLAPS_SERVICES);
    assert!(told.message().contains("overlaps 192.0.2.0/24, addresses of Services"), "{}", told.message());
}

#[test]
fn who_lost_its_objects_gets_the_same_addresses_again() {
    let mut inputs = world();
    inputs.allocations[0].request = AddressRequest::Count(2);
    inputs.allocations[0].listed = ["192.0.2.2", "198.51.100.1"].map(ip).into();
    inputs.allocations.push(Allocation { created: 0, ..allocation("b") });
    let plan = advance(&mut inputs);
    assert_eq!(addresses(&plan, "b"), [ip("192.0.2.0")]);
    assert_eq!(addresses(&plan, "a"), [ip("192.0.2.1"), ip("192.0.2.2")], "what is in no prefix is nobody's");
}
