//! Small worlds for the tests.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use aegis_core::egress::Egress;
use aegis_core::model::*;
use aegis_core::slice::SliceSet;
use std::collections::{BTreeMap, BTreeSet};

/// When all of the tests begin.
pub const START: Seconds = 1_000_000;

pub fn ip(text: &str) -> Egress {
    text.parse().unwrap()
}

pub fn prefix(name: &str, cidr: &str) -> Prefix {
    Prefix {
        name: name.into(),
        created: 1,
        cidr: cidr.parse().unwrap(),
        reserved: vec![],
        account: "shop".into(),
        delegations: vec![],
        deleting: false,
    }
}

pub fn name(name: &str) -> AllocationName {
    AllocationName { account: "shop".into(), name: name.into() }
}

/// One address of prefix `p`, at least 8 slices for each node.
pub fn allocation(allocation: &str) -> Allocation {
    Allocation {
        name: name(allocation),
        created: 1,
        prefixes: vec!["p".into()],
        request: AddressRequest::Count(1),
        ipv6: 0,
        sites: BTreeMap::new(),
        slices: SliceSet::range(4, 255),
        per_node_min: 8,
        per_node_max: 252,
        fence: None,
        listed: BTreeSet::new(),
        deleting: false,
    }
}

pub fn node(name: &str) -> Node {
    Node { name: name.into(), ready: true, ..Node::default() }
}

pub fn zone(zone: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("zone".to_owned(), zone.to_owned())])
}

/// A site of the nodes of a zone.
pub fn site(at: &str, weight: u32) -> Site {
    Site { selector: zone(at), weight }
}

/// Prefix `p` of four addresses, allocation `a` of one, and three nodes.
pub fn world() -> Inputs {
    Inputs {
        prefixes: vec![prefix("p", "192.0.2.0/30")],
        allocations: vec![allocation("a")],
        nodes: vec![node("n1"), node("n2"), node("n3")],
        addresses: vec![],
        now: START,
        ..Inputs::default()
    }
}

/// Plans, has the plan audited, applies it and gives it back.
pub fn advance(inputs: &mut Inputs) -> aegis_core::Plan {
    let plan = aegis_core::plan(inputs);
    if let Err(violations) = aegis_core::audit(inputs, &plan) {
        panic!("{violations:#?}\nbefore: {inputs:#?}\nplan: {plan:#?}");
    }
    inputs.addresses.clone_from(&plan.addresses);
    plan
}

/// What the node's agent reports once it has programmed everything and no flow is left in its draining slices.
pub fn report_drained(node: &mut Node, addresses: &[Address]) {
    node.programmed = addresses
        .iter()
        .map(|address| {
            let drained = slices_of(address, &node.name, |state| state == State::Draining);
            (address.address, Programmed { epoch: address.epoch, drained, fenced: address.fence.is_some() })
        })
        .collect();
}

/// Slices of the node in some states.
pub fn slices_of(address: &Address, node: &str, wanted: impl Fn(State) -> bool) -> SliceSet {
    let holdings = address.holdings.iter().filter(|holding| holding.node == node && wanted(holding.state));
    holdings.flat_map(|holding| holding.first..=holding.last).collect()
}

/// Slices that the node may start flows from.
pub fn held(address: &Address, node: &str) -> SliceSet {
    slices_of(address, node, |state| state == State::Held)
}

/// Slices that are not free.
pub fn occupied(address: &Address) -> SliceSet {
    address.holdings.iter().flat_map(|holding| holding.first..=holding.last).collect()
}
