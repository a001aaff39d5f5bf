//! Limits reach the entries of allocations, with whose they are.

use crate::world::{World, allocation, egress};
use aegis_common::AllocationValue;
use aegis_core::model::AllocationName;
use aegis_node_agent::desired::{Inputs, Shared, desired};
use aegis_node_agent::objects::{self, Most};
use aegis_node_agent::observed::Observed;
use aegis_node_agent::ops::{Known, transition};

/// The entry that each of two allocations gets: the second address is of the second one, and whose is asked for.
fn entries(account: &str) -> [AllocationValue; 2] {
    let world = World {
        pods: vec![(2, 0)],
        bindings: vec![(0, 0, 0, true, false)],
        addresses: vec![Some((0, vec![(0, 3)])), Some((1, vec![(0, 3)])), None, None],
        nodes: 1,
        sockets: (0, 0),
    };
    let second = AllocationName { account: account.to_owned(), ..allocation(1) };
    let mut inputs = Inputs {
        per_account: Most { flows: 9, per_second: 8 },
        shared: Some(Shared { flows: 1000, blocks: 100 }),
        ..world.inputs(1)
    };
    inputs.addresses.get_mut(&egress(1)).unwrap().allocation = second.clone();
    let limited = objects::Allocation { per_pod: Most { flows: 7, per_second: 6 }, ..Default::default() };
    inputs.allocations = [(allocation(0), limited), (second.clone(), Default::default())].into();
    let mut maps = Observed::default();
    let change = transition(&desired(&inputs), &maps, &Known::default());
    change.ops.iter().for_each(|op| maps.apply(op));
    [allocation(0), second].map(|name| maps.allocations[&change.numbers[&name]])
}

#[test]
fn limits_are_the_allocations_and_the_accounts() {
    let [first, second] = entries("bank");
    let own =
        |value: AllocationValue| (value.pod_flows, value.pod_rate, value.account_flows, value.account_rate);
    assert_eq!([own(first), own(second)], [(7, 6, 9, 8), (0, 0, 9, 8)]);
    assert!(first.account != 0 && second.account != 0 && first.account != second.account);
    let [first, second] = entries(&allocation(0).account);
    assert_eq!(first.account, second.account, "counted together");
}

#[test]
fn an_account_leaves_room_only_where_there_are_others() {
    let room = |account: &str| entries(account).map(|value| (value.room_flows, value.room_blocks));
    assert_eq!(room("bank"), [(1000, 100); 2]);
    assert_eq!(room(&allocation(0).account), [(0, 0); 2]);
}
