//! A plan that gives a site more than its share, or takes from a node what it needs: the audit must say so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use aegis_core::audit;
use aegis_core::audit::{Unfit, Violation};
use aegis_core::model::*;
use aegis_core::slice::SliceSet;
use support::*;

/// Twenty slices, ten each for zone `a` (n1, n2) and zone `b` (n3); two at least for each node.
fn shared(holdings: &[(u8, u8, &str, State)]) -> Inputs {
    let mut inputs = world();
    inputs.allocations[0].slices = SliceSet::range(4, 23);
    inputs.allocations[0].per_node_min = 2;
    inputs.allocations[0].sites = [("s1".to_owned(), site("a", 1)), ("s2".to_owned(), site("b", 1))].into();
    for (node, at) in inputs.nodes.iter_mut().zip(["a", "a", "b"]) {
        node.labels = zone(at);
    }
    advance(&mut inputs);
    inputs.addresses[0].holdings = list(holdings, inputs.addresses[0].epoch);
    inputs
}

fn list(holdings: &[(u8, u8, &str, State)], epoch: i64) -> Vec<Holding> {
    let holding = |(first, last, node, state): &(u8, u8, &str, State)| Holding {
        first: *first,
        last: *last,
        node: (*node).into(),
        epoch,
        state: *state,
    };
    holdings.iter().map(holding).collect()
}

fn want(inputs: &mut Inputs, demands: [u32; 3]) {
    for (node, demand) in inputs.nodes.iter_mut().zip(demands) {
        node.demand.insert(name("a"), demand);
    }
}

/// What the audit finds in a step to these holdings. Those that do not change have the former epoch.
fn step(inputs: &Inputs, to: &[(u8, u8, &str, State)]) -> Vec<Violation> {
    let mut plan = aegis_core::plan(inputs);
    let before = &inputs.addresses[0];
    let mut after = Address { epoch: before.epoch + 1, ..before.clone() };
    after.holdings = list(to, after.epoch);
    for holding in &mut after.holdings {
        let kept = |it: &&Holding| {
            (it.first..=it.last).contains(&holding.first)
                && (&it.node, it.state) == (&holding.node, holding.state)
        };
        holding.epoch = before.holdings.iter().find(kept).map_or(after.epoch, |it| it.epoch);
    }
    plan.addresses[0] = after;
    plan.wake = None;
    audit(inputs, &plan).err().unwrap_or_default()
}

use State::{Draining, Held};

#[test]
fn more_than_the_sites_share() {
    let inputs = shared(&[(4, 8, "n1", Held), (9, 12, "n2", Held), (14, 15, "n3", Held)]);
    assert_eq!(
        step(&inputs, &[(4, 8, "n1", Held), (9, 12, "n2", Held), (13, 13, "n2", Held), (14, 15, "n3", Held)]),
        []
    );
    let found = step(
        &inputs,
        &[
            (4, 8, "n1", Held),
            (9, 12, "n2", Held),
            (13, 13, "n2", Held),
            (14, 15, "n3", Held),
            (16, 16, "n1", Held),
        ],
    );
    let given = |slice, node: &str| Violation::Granted {
        address: inputs.addresses[0].address,
        slice,
        node: node.into(),
        why: Unfit::Quota,
    };
    assert_eq!(found, [given(16, "n1"), given(13, "n2")]);
}

#[test]
fn what_drains_is_part_of_the_share_and_may_come_back() {
    let inputs = shared(&[(4, 8, "n1", Held), (9, 13, "n2", Draining), (14, 15, "n3", Held)]);
    assert_eq!(step(&inputs, &[(4, 8, "n1", Held), (9, 13, "n2", Held), (14, 15, "n3", Held)]), []);
    let given = [(4, 8, "n1", Held), (9, 13, "n2", Draining), (14, 15, "n3", Held), (16, 17, "n2", Held)];
    let found = step(&inputs, &given);
    assert!(matches!(found[..], [Violation::Granted { slice: 17, why: Unfit::Quota, .. }]), "{found:?}");
}

#[test]
fn taken_though_there_is_enough_for_all() {
    let mut inputs = shared(&[(4, 8, "n1", Held), (9, 10, "n2", Held), (14, 15, "n3", Held)]);
    let less = [(4, 7, "n1", Held), (8, 8, "n1", Draining), (9, 10, "n2", Held), (14, 15, "n3", Held)];
    assert_eq!(step(&inputs, &less), [], "it does not want them");
    want(&mut inputs, [5, 5, 0]);
    assert!(matches!(step(&inputs, &less)[..], [Violation::NoReason { slice: 8, .. }]));
    want(&mut inputs, [5, 6, 0]);
    assert_eq!(step(&inputs, &less), [], "others want more than there is");
    want(&mut inputs, [5, 5, 200]);
    assert!(matches!(step(&inputs, &less)[..], [Violation::NoReason { slice: 8, .. }]), "another site does");
    inputs.nodes[0] = Node { ready: false, labels: zone("a"), ..node("n1") };
    assert!(matches!(step(&inputs, &less)[..], [Violation::NoReason { slice: 8, .. }]), "it does not report");
}

#[test]
fn taken_of_the_minimum() {
    let mut inputs = shared(&[(4, 5, "n1", Held), (6, 13, "n2", Held), (14, 15, "n3", Held)]);
    want(&mut inputs, [10, 10, 0]);
    let less = [(4, 4, "n1", Held), (5, 5, "n1", Draining), (6, 13, "n2", Held), (14, 15, "n3", Held)];
    assert!(matches!(step(&inputs, &less)[..], [Violation::Minimum { slice: 5, .. }]));
    // A share that is too small for the minima of all.
    inputs.allocations[0].sites.get_mut("s2").unwrap().weight = 1000;
    let least = [(4, 5, "n1", Draining), (6, 13, "n2", Draining), (14, 15, "n3", Held)];
    assert_eq!(step(&inputs, &least), []);
}

#[test]
fn taken_from_one_while_another_keeps_more() {
    let mut inputs = shared(&[(4, 7, "n1", Held), (8, 13, "n2", Held), (14, 15, "n3", Held)]);
    want(&mut inputs, [10, 10, 0]);
    let less = [(4, 6, "n1", Held), (7, 7, "n1", Draining), (8, 13, "n2", Held), (14, 15, "n3", Held)];
    let found = step(&inputs, &less);
    assert!(matches!(&found[..], [Violation::Unfair { slice: 7, other, .. }] if other == "n2"), "{found:?}");
    assert!(found[0].to_string().contains("while node \"n2\" keeps more"), "{}", found[0]);
    let fair = [(4, 7, "n1", Held), (8, 12, "n2", Held), (13, 13, "n2", Draining), (14, 15, "n3", Held)];
    assert_eq!(step(&inputs, &fair), []);
}
