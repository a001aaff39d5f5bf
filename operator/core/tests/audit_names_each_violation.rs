//! A good plan, broken in one way at a time: the audit must say what is wrong with it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use aegis_core::audit::{Unfit, Violation};
use aegis_core::egress::Egress;
use aegis_core::model::*;
use aegis_core::plan::Plan;
use aegis_core::slice::SliceSet;
use aegis_core::{audit, plan};
use std::net::Ipv4Addr;
use support::*;

const A: &str = "192.0.2.0";

/// Slices 4..=11 of 192.0.2.0 are held by n1; then n2 joins (not ready), and n1 drains 8..=11, which it has
/// reported. What a plan from here does to 8..=11 is to let them rest.
fn drained() -> Inputs {
    let mut inputs = Inputs { nodes: vec![node("n1")], ..world() };
    advance(&mut inputs);
    inputs.allocations[0].slices = SliceSet::range(4, 7);
    inputs.allocations[0].per_node_min = 4;
    advance(&mut inputs);
    let addresses = inputs.addresses.clone();
    report_drained(&mut inputs.nodes[0], &addresses);
    inputs.nodes.push(Node { ready: false, ..node("n2") });
    inputs
}

/// As [`drained`], a minute after 8..=11 began to rest.
fn resting() -> Inputs {
    let mut inputs = drained();
    advance(&mut inputs);
    inputs.now += QUARANTINE / 2;
    inputs
}

/// As [`resting`], with nothing left to be done.
fn settled() -> Inputs {
    let mut inputs = resting();
    inputs.now += QUARANTINE;
    advance(&mut inputs);
    inputs
}

/// The violations of the plan from `inputs` after `break_it`.
fn violations(inputs: Inputs, break_it: impl FnOnce(&mut Plan)) -> Vec<Violation> {
    violations_with(inputs, |_, plan| break_it(plan))
}

fn violations_with(mut inputs: Inputs, break_it: impl FnOnce(&mut Inputs, &mut Plan)) -> Vec<Violation> {
    let mut plan = plan(&inputs);
    audit(&inputs, &plan).unwrap();
    break_it(&mut inputs, &mut plan);
    audit(&inputs, &plan).expect_err("the audit finds nothing")
}

fn at(slice: u8) -> impl Fn(&Holding) -> bool {
    move |holding| (holding.first..=holding.last).contains(&slice)
}

/// Changes the whole holding at `slice`, as a change of its own epoch.
fn change(plan: &mut Plan, slice: u8, change: impl FnOnce(&mut Holding)) {
    let address = &mut plan.addresses[0];
    address.epoch += 1;
    let holding = address.holdings.iter_mut().find(|holding| at(slice)(holding)).unwrap();
    holding.epoch = address.epoch;
    change(holding);
    plan.wake = plan.addresses.iter().flat_map(|it| &it.holdings).filter_map(until).min();
}

fn until(holding: &Holding) -> Option<Seconds> {
    match holding.state {
        State::Quarantined { until } => Some(until),
        _ => None,
    }
}

fn free(plan: &mut Plan, slice: u8) {
    let address = &mut plan.addresses[0];
    address.epoch += 1;
    address.holdings.retain(|holding| !at(slice)(holding));
    plan.wake = plan.addresses.iter().flat_map(|it| &it.holdings).filter_map(until).min();
}

fn give(plan: &mut Plan, first: u8, last: u8, node: &str, state: State) {
    let address = &mut plan.addresses[0];
    address.epoch += 1;
    address.holdings.push(Holding { first, last, node: node.into(), epoch: address.epoch, state });
    address.holdings.sort_by_key(|holding| holding.first);
}

/// Whether each violation is of this kind, for all of a run of slices.
macro_rules! assert_only {
    ($violations:expr, $pattern:pat) => {
        let violations: Vec<Violation> = $violations;
        assert!(violations.iter().all(|violation| matches!(violation, $pattern)), "{violations:#?}");
        assert!(!violations.is_empty());
    };
}

#[test]
fn good_plans_pass() {
    for inputs in [drained(), resting(), settled()] {
        audit(&inputs, &plan(&inputs)).unwrap();
    }
}

#[test]
fn two_owners() {
    let found = violations(settled(), |plan| give(plan, 7, 7, "n1", State::Held));
    assert!(found.contains(&Violation::TwoOwners { address: ip(A), slice: 7 }), "{found:#?}");
}

#[test]
fn two_owners_within_one_list_of_other_nodes() {
    let found = violations(settled(), |plan| give(plan, 4, 5, "n2", State::Held));
    assert!(found.contains(&Violation::TwoOwners { address: ip(A), slice: 4 }), "{found:#?}");
}

#[test]
fn not_sorted() {
    let mut inputs = settled();
    inputs.allocations[0].slices = SliceSet::range(4, 255);
    inputs.allocations[0].per_node_min = 8;
    assert_only!(
        violations(inputs, |plan| plan.addresses[0].holdings.reverse()),
        Violation::NotSorted { slice: 4, .. }
    );
}

#[test]
fn not_merged() {
    let found = violations(settled(), |plan| {
        let address = &mut plan.addresses[0];
        address.epoch += 1;
        let mut half = address.holdings[0].clone();
        (address.holdings[0].last, half.first) = (5, 6);
        address.holdings.insert(1, half);
    });
    assert_only!(found, Violation::NotMerged { slice: 6, .. });
}

#[test]
fn below_the_first_usable_slice_or_reversed() {
    let found = violations(settled(), |plan| give(plan, 3, 3, "n1", State::Held));
    assert!(found.contains(&Violation::NotSlices { address: ip(A), first: 3, last: 3 }), "{found:#?}");
    let found = violations(settled(), |plan| give(plan, 9, 8, "n1", State::Held));
    assert_only!(found, Violation::NotSlices { first: 9, last: 8, .. });
}

#[test]
fn too_many_holdings() {
    let found = violations(settled(), |plan| {
        (0..252).for_each(|_| give(plan, 9, 8, "n1", State::Held));
    });
    assert!(found.contains(&Violation::TooManyHoldings { address: ip(A), count: 253 }), "{found:#?}");
}

#[test]
fn epoch_of_the_address() {
    assert_only!(
        violations(settled(), |plan| plan.addresses[0].epoch -= 1),
        Violation::AddressEpoch { changed: false, .. }
    );
    assert_only!(
        violations(settled(), |plan| plan.addresses[0].epoch += 1),
        Violation::AddressEpoch { changed: false, .. }
    );
    let found =
        violations_with(drained(), |inputs, plan| plan.addresses[0].epoch = inputs.addresses[0].epoch);
    assert!(found.iter().any(|it| matches!(it, Violation::AddressEpoch { changed: true, .. })), "{found:#?}");
}

#[test]
fn epoch_of_a_slice() {
    // Unchanged, but with the new epoch.
    let found = violations(drained(), |plan| plan.addresses[0].holdings[0].epoch = plan.addresses[0].epoch);
    assert_only!(found, Violation::SliceEpoch { slice: 4..=7, .. });
    // Changed, but with the former epoch.
    let found = violations(drained(), |plan| plan.addresses[0].holdings[1].epoch -= 1);
    assert_only!(found, Violation::SliceEpoch { slice: 8..=11, .. });
}

#[test]
fn moved_from_node_to_node() {
    let mut inputs = settled();
    inputs.nodes[1].ready = true;
    assert_only!(
        violations(inputs, |plan| change(plan, 4, |holding| holding.node = "n2".into())),
        Violation::Moved { slice: 4..=7, .. }
    );
}

#[test]
fn moved_while_it_drains_or_rests() {
    let give_to_n2 = |plan: &mut Plan| {
        change(plan, 8, |holding| (holding.node, holding.state) = ("n2".into(), State::Held));
    };
    assert_only!(violations(drained(), give_to_n2), Violation::Moved { slice: 8..=11, .. });
    assert_only!(violations(resting(), give_to_n2), Violation::Moved { slice: 8..=11, .. });
}

#[test]
fn drains_without_a_reason() {
    assert_only!(
        violations(settled(), |plan| change(plan, 4, |holding| holding.state = State::Draining)),
        Violation::NoReason { slice: 4..=7, .. }
    );
}

#[test]
fn freed_while_held() {
    assert_only!(violations(settled(), |plan| free(plan, 4)), Violation::NotDrained { slice: 4..=7, .. });
}

#[test]
fn rests_while_held() {
    let rest = |plan: &mut Plan| {
        change(plan, 4, |holding| holding.state = State::Quarantined { until: START + 9 * QUARANTINE });
    };
    assert_only!(violations(settled(), rest), Violation::NotDrained { slice: 4..=7, .. });
    // That no flow is left in a slice means nothing while new ones may start.
    let mut idle = settled();
    idle.nodes[0].programmed.values_mut().for_each(|it| {
        (it.epoch, it.drained) = (i64::MAX, SliceSet::range(0, 255));
    });
    assert_only!(violations(idle, rest), Violation::NotDrained { slice: 4..=7, .. });
}

#[test]
fn held_again_without_a_right() {
    assert_only!(
        violations(drained(), |plan| change(plan, 8, |holding| holding.state = State::Held)),
        Violation::Granted { slice: 8..=11, why: Unfit::Slice, .. }
    );
}

#[test]
fn rests_without_a_report_or_with_a_stale_one() {
    let silent = |inputs: &mut Inputs| inputs.nodes[0].programmed.clear();
    let stale = |inputs: &mut Inputs| inputs.nodes[0].programmed.values_mut().for_each(|it| it.epoch -= 1);
    let partial = |inputs: &mut Inputs| {
        inputs.nodes[0].programmed.values_mut().for_each(|it| it.drained = SliceSet::range(8, 10));
    };
    for (lose, slices) in [(&silent as &dyn Fn(&mut Inputs), 8..=11), (&stale, 8..=11), (&partial, 11..=11)] {
        let found = violations_with(drained(), |inputs, _| lose(inputs));
        let expected: Vec<Violation> =
            slices.map(|slice| Violation::NotDrained { address: ip(A), slice, node: "n1".into() }).collect();
        assert_eq!(found, expected);
    }
}

#[test]
fn freed_while_it_drains() {
    assert_only!(violations(drained(), |plan| free(plan, 8)), Violation::NotDrained { slice: 8..=11, .. });
}

#[test]
fn rests_too_briefly() {
    let hurry = |plan: &mut Plan| {
        change(plan, 8, |holding| holding.state = State::Quarantined { until: START + QUARANTINE - 1 });
    };
    assert_only!(violations(drained(), hurry), Violation::Quarantine { slice: 8..=11, .. });
    assert_only!(violations(resting(), hurry), Violation::Quarantine { slice: 8..=11, .. });
}

#[test]
fn freed_or_held_while_it_rests() {
    assert_only!(violations(resting(), |plan| free(plan, 8)), Violation::Quarantine { slice: 8..=11, .. });
    assert_only!(
        violations(resting(), |plan| change(plan, 8, |holding| holding.state = State::Held)),
        Violation::Quarantine { slice: 8..=11, .. }
    );
    assert_only!(
        violations(resting(), |plan| change(plan, 8, |holding| holding.state = State::Draining)),
        Violation::Quarantine { slice: 8..=11, .. }
    );
}

#[test]
fn drains_or_rests_from_nowhere() {
    for state in [State::Draining, State::Quarantined { until: START + 9 * QUARANTINE }] {
        let found = violations(settled(), |plan| {
            give(plan, 9, 9, "n1", state);
            plan.wake = plan.addresses[0].holdings.iter().filter_map(until).min();
        });
        assert_only!(found, Violation::FromNowhere { slice: 9, .. });
    }
}

#[test]
fn given_to_whom_it_must_not_be_given() {
    let grant = |prepare: fn(&mut Inputs), slice: u8, node: &'static str| {
        let mut inputs = settled();
        inputs.allocations[0].slices = SliceSet::range(4, 20);
        inputs.allocations[0].per_node_max = 5;
        violations_with(inputs, |inputs, plan| {
            give(plan, slice, slice, node, State::Held);
            prepare(inputs);
        })
    };
    assert_only!(grant(|_| {}, 21, "n1"), Violation::Granted { slice: 21, why: Unfit::Slice, .. });
    assert_only!(grant(|_| {}, 9, "n2"), Violation::Granted { slice: 9, why: Unfit::NotReady, .. });
    assert_only!(grant(|_| {}, 9, "n3"), Violation::Granted { slice: 9, why: Unfit::NoNode, .. });
    let sites = |inputs: &mut Inputs| {
        inputs.nodes[0].labels = zone("a");
        inputs.nodes[1] = Node { labels: zone("b"), ..node("n2") };
        inputs.allocations[0].sites = [("site".to_owned(), site("a", 1))].into();
    };
    assert_only!(grant(sites, 9, "n2"), Violation::Granted { slice: 9, why: Unfit::Sites, .. });
    let deleting = |inputs: &mut Inputs| inputs.allocations[0].deleting = true;
    assert_only!(grant(deleting, 9, "n1"), Violation::Granted { slice: 9, why: Unfit::Address, .. });
    let surplus = |inputs: &mut Inputs| inputs.allocations[0].request = AddressRequest::Count(0);
    assert_only!(grant(surplus, 9, "n1"), Violation::Granted { slice: 9, why: Unfit::Address, .. });
    let smaller = |inputs: &mut Inputs| inputs.allocations[0].per_node_max = 4;
    assert_only!(grant(smaller, 9, "n1"), Violation::Granted { slice: 9, why: Unfit::Maximum, .. });
}

/// Adds a new address to the plan.
fn take(plan: &mut Plan, address: Egress, prefix: &str) {
    let new = Address {
        address,
        prefix: prefix.into(),
        allocation: name("a"),
        epoch: START,
        holdings: vec![],
        fence: None,
    };
    plan.addresses.push(new);
    plan.addresses.sort_by_key(|address| address.address);
    let used = |name: &str| plan.addresses.iter().filter(|it| it.prefix == name).count() as u32;
    let used: Vec<u32> = plan.prefixes.keys().map(|name| used(name)).collect();
    plan.prefixes.values_mut().zip(used).for_each(|(outcome, used)| outcome.used = used);
}

#[test]
fn an_address_that_must_not_be_taken() {
    let taken = |prepare: &dyn Fn(&mut Inputs), address: &str| {
        let mut found = violations_with(settled(), |inputs, plan| {
            inputs.allocations[0].request = AddressRequest::Count(2);
            take(plan, ip(address), "p");
            prepare(inputs);
        });
        assert_eq!(found.len(), 1, "{found:#?}");
        match found.remove(0) {
            Violation::AddressTaken { why, .. } => why,
            other => panic!("{other}"),
        }
    };
    let with = |change: fn(&mut Prefix)| move |inputs: &mut Inputs| change(&mut inputs.prefixes[0]);
    let next = "192.0.2.1";
    assert_eq!(taken(&|_| {}, "192.0.2.4"), "it is not in its prefix");
    assert_eq!(taken(&with(|prefix| prefix.deleting = true), next), "its prefix is being deleted");
    assert_eq!(
        taken(&with(|prefix| prefix.account = "bank".into()), next),
        "its prefix belongs to another account"
    );
    assert_eq!(
        taken(&with(|prefix| prefix.reserved = vec!["192.0.2.0/31".parse().unwrap()]), next),
        "it is reserved"
    );
    // It has one, and would have two.
    let lent = |max| {
        move |inputs: &mut Inputs| {
            let delegation = Delegation { name: "d".into(), to: Delegate::Account("shop".into()), max };
            (inputs.prefixes[0].account, inputs.prefixes[0].delegations) = ("bank".into(), vec![delegation]);
        }
    };
    assert_eq!(
        taken(&lent(1), next),
        "its account has as many addresses of the prefix as are delegated to it"
    );
    let other = |inputs: &mut Inputs| inputs.allocations[0].prefixes = vec!["q".into()];
    assert_eq!(taken(&other, next), "its allocation does not name the prefix");
    let enough = |inputs: &mut Inputs| inputs.allocations[0].request = AddressRequest::Count(1);
    assert_eq!(taken(&enough, next), "its allocation has as many as it asks for");
    let listed = |inputs: &mut Inputs| {
        inputs.allocations[0].request = AddressRequest::Explicit(vec![ip(A), ip("192.0.2.2")]);
    };
    assert_eq!(taken(&listed, next), "its allocation does not list it");
    let missing = |inputs: &mut Inputs| inputs.prefixes.clear();
    assert_eq!(taken(&missing, next), "its prefix does not exist");
    let own = |inputs: &mut Inputs| inputs.nodes[0].addresses.push("192.0.2.1".parse().unwrap());
    assert_eq!(taken(&own, next), "it is a node's own");
    let pods = |inputs: &mut Inputs| inputs.nodes[0].pod_ranges.push("192.0.0.0/16".parse().unwrap());
    assert_eq!(taken(&pods, next), "its prefix overlaps pods or Services");
}

#[test]
fn an_address_of_a_prefix_that_overlaps_an_older_one() {
    let found = violations_with(settled(), |inputs, plan| {
        inputs.allocations[0].request = AddressRequest::Count(2);
        take(plan, ip("192.0.2.1"), "p");
        let older = Prefix { created: 0, ..prefix("q", "192.0.2.0/24") };
        inputs.prefixes.push(older);
        let outcome = plan.prefixes["p"].clone();
        plan.prefixes.insert("q".into(), aegis_core::PrefixOutcome { used: 0, ..outcome });
    });
    assert_only!(found, Violation::AddressTaken { why: "its prefix overlaps an older one", .. });
}

#[test]
fn an_address_for_nobody() {
    let found = violations_with(settled(), |inputs, plan| {
        inputs.prefixes.push(prefix("q", "198.51.100.0/30"));
        take(plan, ip("192.0.2.1"), "p");
        plan.addresses[1].allocation = name("b");
        plan.prefixes.insert("q".into(), aegis_core::PrefixOutcome { used: 0, ..plan.prefixes["p"].clone() });
    });
    assert_only!(found, Violation::AddressTaken { why: "its allocation does not exist", .. });
    let found = violations_with(settled(), |inputs, plan| {
        take(plan, ip("192.0.2.1"), "p");
        inputs.allocations[0].deleting = true;
    });
    assert_only!(found, Violation::AddressTaken { why: "its allocation is being deleted", .. });
}

#[test]
fn an_address_that_changes_hands_or_goes() {
    let found = violations(settled(), |plan| plan.addresses[0].allocation = name("b"));
    assert!(found.contains(&Violation::AddressMoved { address: ip(A) }), "{found:#?}");
    let found = violations(settled(), |plan| plan.addresses[0].prefix = "q".into());
    assert!(found.contains(&Violation::AddressMoved { address: ip(A) }), "{found:#?}");
    let found = violations(settled(), |plan| plan.addresses.clear());
    assert!(found.contains(&Violation::AddressInUse { address: ip(A) }), "{found:#?}");
    assert!(found.contains(&Violation::AddressWanted { address: ip(A) }), "{found:#?}");
    // Only quarantined slices are left, and still the address must stay.
    let mut inputs = settled();
    inputs.allocations[0].deleting = true;
    inputs.nodes.clear();
    advance(&mut inputs);
    let found = violations(inputs, |plan| plan.addresses.clear());
    assert!(found.contains(&Violation::AddressInUse { address: ip(A) }), "{found:#?}");
}

#[test]
fn a_withheld_address_that_changes_or_is_made() {
    let withhold = |inputs: &mut Inputs, address: &str| {
        inputs.withheld.insert(ip(address), None);
    };
    let found = violations_with(drained(), |inputs, _| withhold(inputs, A));
    assert_only!(found, Violation::Withheld { .. });
    let found = violations_with(settled(), |inputs, plan| {
        inputs.allocations[0].request = AddressRequest::Count(2);
        take(plan, ip("192.0.2.1"), "p");
        withhold(inputs, "192.0.2.1");
    });
    assert_only!(found, Violation::Withheld { .. });
}

#[test]
fn freed_though_nobody_has_seen_it_rest() {
    let mut inputs = resting();
    inputs.now += QUARANTINE;
    let found = violations_with(inputs, |inputs, _| {
        inputs.unrested.insert(ip(A), SliceSet::range(8, 8));
    });
    assert_only!(found, Violation::Quarantine { slice: 8, .. });
}

#[test]
fn more_addresses_than_nodes_have_room_for() {
    let mut inputs = settled();
    inputs.prefixes[0].cidr = "192.0.0.0/16".parse().unwrap();
    let found = violations_with(inputs, |inputs, plan| {
        inputs.allocations[0].request = AddressRequest::Count(2_000);
        for index in 0..MAX_ADDRESSES as u32 {
            let address = Ipv4Addr::from_bits(Ipv4Addr::new(192, 0, 4, 0).to_bits() + index);
            take(plan, address.into(), "p");
        }
    });
    assert_eq!(found, [Violation::TooManyAddresses { count: MAX_ADDRESSES + 1 }]);
}

#[test]
fn the_same_address_twice() {
    let found = violations(settled(), |plan| plan.addresses.push(plan.addresses[0].clone()));
    assert!(found.contains(&Violation::AddressOrder { address: ip(A) }), "{found:#?}");
}

#[test]
fn what_people_are_told() {
    let found = violations(settled(), |plan| plan.allocations.clear());
    assert_eq!(found, [Violation::Untold { allocation: name("a") }]);
    let found = violations(settled(), |plan| plan.prefixes.values_mut().for_each(|it| it.used = 0));
    assert_eq!(found, [Violation::PrefixUse { prefix: "p".into() }]);
    assert_eq!(violations(resting(), |plan| plan.wake = None), [Violation::Wake]);
    assert_eq!(violations(settled(), |plan| plan.wake = Some(START)), [Violation::Wake]);
}

#[test]
fn messages_name_address_slice_and_node() {
    let found = violations(settled(), |plan| free(plan, 4));
    assert_eq!(found[0].to_string(), "192.0.2.0 slice 4: leaves node \"n1\", which may still send from it");
}
