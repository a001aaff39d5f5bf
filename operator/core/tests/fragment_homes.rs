//! All nodes send the fragments of a datagram to the same place, and few homes move when nodes come and go.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use aegis_core::fragment_homes;
use aegis_core::model::*;
use std::collections::BTreeSet;
use support::*;

fn address(nodes: &[&str], state: State) -> Address {
    let holdings = (4..).zip(nodes).map(|(slice, node)| Holding {
        first: slice,
        last: slice,
        node: (*node).into(),
        epoch: 1,
        state,
    });
    let holdings = holdings.collect();
    Address {
        address: ip("192.0.2.1"),
        prefix: "p".into(),
        allocation: name("a"),
        epoch: 1,
        holdings,
        fence: None,
    }
}

#[test]
fn sixteen_homes_spread_over_the_nodes() {
    let homes = fragment_homes(&address(&["n1", "n2", "n3"], State::Held));
    assert_eq!(homes.len(), 16);
    assert_eq!(homes.iter().collect::<BTreeSet<_>>().len(), 3, "{homes:?}");
}

#[test]
fn nobody_sends_no_home() {
    assert!(fragment_homes(&address(&[], State::Held)).is_empty());
    assert!(fragment_homes(&address(&["n1"], State::Quarantined { until: 1 })).is_empty());
    assert_eq!(fragment_homes(&address(&["n1"], State::Draining)).len(), 16);
}

#[test]
fn neither_order_nor_epoch_matters() {
    let mut other = address(&["n3", "n1", "n2"], State::Held);
    other.epoch = 9;
    assert_eq!(fragment_homes(&other), fragment_homes(&address(&["n1", "n2", "n3"], State::Held)));
}

#[test]
fn a_node_that_goes_moves_only_its_own_homes() {
    let before = fragment_homes(&address(&["n1", "n2", "n3"], State::Held));
    let after = fragment_homes(&address(&["n1", "n3"], State::Held));
    for (before, after) in before.iter().zip(&after).filter(|(before, _)| *before != "n2") {
        assert_eq!(before, after);
    }
}

/// Nodes of different versions must agree: a change of the hash is a change of the protocol.
#[test]
fn the_hash_is_fixed() {
    let homes = fragment_homes(&address(&["n1", "n2", "n3"], State::Held));
    assert_eq!(homes.join(" "), "n1 n2 n1 n2 n3 n2 n3 n3 n1 n3 n3 n3 n1 n3 n1 n3");
}
