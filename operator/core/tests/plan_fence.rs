//! Addresses with a fence: what planning takes from nodes that can't renew their Lease, and what it gives to whom.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use aegis_core::audit::{Unfit, Violation};
use aegis_core::fence;
use aegis_core::model::*;
use aegis_core::reason;
use aegis_core::slice::SliceSet;
use std::time::Duration;
use support::*;

const AFTER: Seconds = 60;

/// Three nodes that hold their Lease, and an allocation with a fence, as programmed everywhere.
fn fenced() -> Inputs {
    let mut inputs = world();
    inputs.allocations[0].fence = Some(AFTER);
    inputs.nodes.iter_mut().for_each(|node| node.lease = Lease::Own);
    advance(&mut inputs);
    report(&mut inputs);
    inputs
}

fn report(inputs: &mut Inputs) {
    let addresses = inputs.addresses.clone();
    inputs.nodes.iter_mut().for_each(|node| report_drained(node, &addresses));
}

fn taken(waited: Duration) -> Lease {
    Lease::Taken { waited }
}

fn resting(address: &Address, node: &str) -> SliceSet {
    slices_of(address, node, |state| matches!(state, State::Quarantined { .. }))
}

#[test]
fn a_fence_is_set_changed_and_taken_away_with_an_epoch_of_its_own() {
    let mut inputs = world();
    let steps = [(None, None), (Some(60), Some(1)), (Some(60), Some(1)), (Some(15), Some(2)), (None, None)];
    inputs.nodes.iter_mut().for_each(|node| node.lease = Lease::Own);
    advance(&mut inputs);
    let first = inputs.addresses[0].epoch;
    for (after, epoch) in steps {
        inputs.allocations[0].fence = after;
        let before = inputs.addresses[0].clone();
        advance(&mut inputs);
        let address = &inputs.addresses[0];
        let expected = after.zip(epoch).map(|(after, epoch)| Fence { after, epoch: first + epoch });
        assert_eq!(address.fence, expected);
        assert_eq!(address.epoch, before.epoch + i64::from(before.fence != address.fence));
        assert_eq!(address.holdings, before.holdings, "nobody loses anything by it");
    }
}

#[test]
fn the_fence_of_an_allocation_that_goes_stays() {
    let mut inputs = fenced();
    inputs.allocations[0].deleting = true;
    inputs.allocations[0].fence = None;
    advance(&mut inputs);
    assert_eq!(inputs.addresses[0].fence.unwrap().after, AFTER);
    inputs.allocations.clear();
    advance(&mut inputs);
    assert_eq!(inputs.addresses[0].fence.unwrap().after, AFTER);
}

#[test]
fn a_node_whose_lease_was_taken_keeps_its_slices_until_its_deadline_has_passed() {
    let mut inputs = fenced();
    let held_before = held(&inputs.addresses[0], "n1");
    for lease in [Lease::Own, Lease::Free, taken(fence::wait(AFTER) - Duration::from_millis(1))] {
        inputs.nodes[0].lease = lease;
        advance(&mut inputs);
        assert_eq!(held(&inputs.addresses[0], "n1"), held_before, "{lease:?}");
    }
    inputs.nodes[0].lease = taken(fence::wait(AFTER));
    let plan = advance(&mut inputs);
    assert_eq!(resting(&inputs.addresses[0], "n1"), held_before);
    assert_eq!(plan.wake, Some(START + QUARANTINE), "they rest as ever");
    inputs.now += QUARANTINE;
    inputs.nodes[1].demand.insert(name("a"), 252);
    advance(&mut inputs);
    assert_eq!(
        held(&inputs.addresses[0], "n2").intersection(held_before),
        held_before,
        "somebody else has them"
    );
}

#[test]
fn draining_slices_are_taken_the_same_way() {
    let mut inputs = fenced();
    inputs.allocations[0].sites = [("s".to_owned(), site("z", 1))].into();
    advance(&mut inputs);
    let draining = slices_of(&inputs.addresses[0], "n1", |state| state == State::Draining);
    assert_eq!(draining.len(), 8);
    inputs.nodes[0].lease = taken(fence::wait(AFTER));
    advance(&mut inputs);
    assert_eq!(resting(&inputs.addresses[0], "n1"), draining);
}

#[test]
fn time_says_nothing_of_a_node_that_does_not_keep_the_deadline() {
    let mut inputs = fenced();
    inputs.nodes[0].lease = taken(10 * fence::wait(AFTER));
    let (address, epoch) = (inputs.addresses[0].address, inputs.addresses[0].fence.unwrap().epoch);
    let programmed = |epoch, fenced| Programmed { epoch, fenced, ..Programmed::default() };
    for report in [None, Some(programmed(epoch - 1, true)), Some(programmed(epoch, false))] {
        inputs.nodes[0].programmed = report.map(|it| (address, it)).into_iter().collect();
        advance(&mut inputs);
        assert_eq!(held(&inputs.addresses[0], "n1").len(), 8, "{:?}", inputs.nodes[0].programmed);
    }
    inputs.nodes[0].programmed = [(address, programmed(epoch, true))].into();
    let other = inputs.allocations[0].fence.take();
    advance(&mut inputs);
    advance(&mut inputs);
    assert_eq!(held(&inputs.addresses[0], "n1").len(), 8, "nor without a fence");
    inputs.allocations[0].fence = other;
    advance(&mut inputs);
    advance(&mut inputs);
    assert_eq!(held(&inputs.addresses[0], "n1").len(), 8, "nor by a former one");
}

#[test]
fn only_nodes_that_hold_their_lease_get_slices() {
    let mut inputs = world();
    inputs.allocations[0].fence = Some(AFTER);
    let plan = advance(&mut inputs);
    assert_eq!(inputs.addresses[0].holdings, []);
    assert_eq!(plan.allocations[&name("a")].allocated.reason(), reason::NO_LEASE);
    inputs.nodes[0].lease = Lease::Own;
    inputs.nodes[1].lease = taken(Duration::ZERO);
    inputs.nodes[1].demand.insert(name("a"), 20);
    let plan = advance(&mut inputs);
    let counts = ["n1", "n2", "n3"].map(|node| held(&inputs.addresses[0], node).len());
    assert_eq!(counts, [8, 0, 0]);
    assert_eq!(
        plan.allocations[&name("a")].allocated.message(),
        "1 address on 1 node; 1 node (n2) is fenced: the slices there go to others; 1 node (n3) does not hold its Lease and gets no slices"
    );
    inputs.allocations[0].fence = None;
    advance(&mut inputs);
    let counts = ["n1", "n2", "n3"].map(|node| held(&inputs.addresses[0], node).len());
    assert_eq!(counts, [8, 20, 8], "without a fence a Lease means nothing");
}

/// What the audit says of a plan made from one world when it judges it by another one.
fn judged(planned: impl FnOnce(&mut Inputs), by: impl FnOnce(&mut Inputs)) -> Vec<Violation> {
    let (mut inputs, mut other) = (fenced(), fenced());
    planned(&mut inputs);
    by(&mut other);
    let plan = aegis_core::plan(&inputs);
    aegis_core::audit(&inputs, &plan).unwrap();
    aegis_core::audit(&other, &plan).expect_err("the audit finds nothing")
}

#[test]
fn the_audit_lets_nothing_be_taken_before_its_time() {
    let waited = |waited| move |inputs: &mut Inputs| inputs.nodes[0].lease = taken(waited);
    let enough = waited(fence::wait(AFTER));
    let only = |found: Vec<Violation>| {
        assert!(
            found.iter().all(|it| matches!(it, Violation::NotDrained { node, .. } if node == "n1")),
            "{found:#?}"
        );
    };
    only(judged(enough, waited(fence::wait(AFTER) - Duration::from_millis(1))));
    only(judged(enough, |inputs| inputs.nodes[0].lease = Lease::Free));
    only(judged(enough, |inputs| {
        enough(inputs);
        inputs.nodes[0].programmed.clear();
    }));
    only(judged(enough, |inputs| {
        enough(inputs);
        inputs.nodes[0].programmed.values_mut().for_each(|it| it.fenced = false);
    }));
}

#[test]
fn the_audit_lets_nobody_get_slices_without_a_lease() {
    let wants = |inputs: &mut Inputs| _ = inputs.nodes[0].demand.insert(name("a"), 9);
    let found = judged(wants, |inputs| inputs.nodes[0].lease = Lease::Free);
    assert!(matches!(found[..], [Violation::Granted { why: Unfit::NoLease, .. }]), "{found:#?}");
}

#[test]
fn the_audit_lets_no_fence_change_but_with_the_allocation() {
    let fence = |fence| move |inputs: &mut Inputs| inputs.allocations[0].fence = fence;
    for (planned, by) in [(Some(15), Some(AFTER)), (Some(AFTER), Some(15)), (None, Some(AFTER))] {
        let found = judged(fence(planned), fence(by));
        assert!(matches!(found[..], [Violation::Fence { .. }]), "{found:#?}");
    }
    let mut inputs = fenced();
    inputs.allocations[0].fence = Some(15);
    let mut plan = aegis_core::plan(&inputs);
    plan.addresses[0].fence.as_mut().unwrap().epoch -= 1;
    let found = aegis_core::audit(&inputs, &plan).unwrap_err();
    assert!(matches!(found[..], [Violation::Fence { .. }]), "{found:#?}");
}
