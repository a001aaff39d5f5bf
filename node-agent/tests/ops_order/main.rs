//! Any change of the world, written one map entry at a time: after every single write the look-ups that the programs
//! would make are made here, on the same contents.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod edits;
mod limits;
mod six;
mod world;

use aegis_common::{MAC_LEAVING, PodValue};
use aegis_core::model::Fence;
use aegis_core::policy::Pod;
use aegis_core::policy::names::HostPattern;
use aegis_core::slice::SliceSet;
use aegis_node_agent::desired::{Desired, desired};
use aegis_node_agent::groups::Group;
use aegis_node_agent::observed::{Observed, from_map, to_map};
use aegis_node_agent::ops::{Known, Named, Op, transition};
use aegis_node_agent::probe::Answer;
use ipnet::IpNet;
use proptest::prelude::*;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use world::{Fate, Flows, World, allocation, egress, fate, step, world, write};

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_moment_leaks(worlds in prop::collection::vec(world(), 1..5), restart in any::<bool>()) {
        let mut maps = Observed::default();
        let mut known = Known::default();
        let mut flows = Flows::default();
        let empty = World { pods: vec![], bindings: vec![], addresses: vec![None; 4], nodes: 0, sockets: (0, 0) };
        let mut former = (empty, Desired::default());
        for (epoch, world) in worlds.into_iter().enumerate() {
            // Nothing flows from addresses of this node, so whatever has left the world may go.
            known = Known {
                idle: (0..4).map(|number| egress(number).into()).collect(),
                flows: known.flows.filter(|_| !restart),
                ..Known::default()
            };
            let wanted = desired(&world.inputs(epoch as i64 + 1));
            step(&mut maps, &mut known, &mut flows, (&former.0, &former.1), (&world, &wanted))?;
            former = (world, wanted);
        }
    }
}

fn simple() -> World {
    World {
        pods: vec![(2, 0), (3, 1)],
        bindings: vec![(0, 0, 0, true, false)],
        addresses: vec![Some((0, vec![(0, 3), (1, 3)])), None, None, None],
        nodes: 2,
        sockets: (0, 0),
    }
}

fn after(world: &World, epoch: i64) -> (Observed, Known) {
    let mut maps = Observed::default();
    let change = transition(&desired(&world.inputs(epoch)), &maps, &Known::default());
    change.ops.iter().for_each(|op| maps.apply(op));
    (maps, Known { flows: Some(Named::default()), ..Known::default() })
}

/// Drawn once: a pod goes from one allocation to another, both through a gateway, while the first gets an address of this node's.
#[test]
fn what_needs_no_gateway_any_more_leaves_from_here() {
    let dedicated = |owner, blocks: [(u8, u8); 4]| Some((owner, blocks.to_vec()));
    let before = World {
        pods: vec![(6, 0)],
        bindings: vec![(0, 0, 0, true, false)],
        addresses: vec![None, dedicated(0, [(1, 0), (1, 0), (1, 3), (0, 0)]), None, None],
        nodes: 1,
        sockets: (0, 0),
    };
    let after = World {
        pods: vec![(6, 1)],
        bindings: vec![(2, 0, 1, true, false)],
        addresses: vec![
            None,
            None,
            dedicated(2, [(0, 0), (1, 0), (1, 0), (1, 3)]),
            dedicated(0, [(0, 0), (0, 0), (0, 0), (0, 3)]),
        ],
        ..before.clone()
    };
    let (mut maps, mut known) = (Observed::default(), Known::default());
    known.idle = (0..4).map(|number| egress(number).into()).collect();
    let mut flows = Flows::default();
    let (first, second) = (wanted(&before), desired(&after.inputs(2)));
    let empty = World { pods: vec![], bindings: vec![], addresses: vec![None; 4], nodes: 0, sockets: (0, 0) };
    step(&mut maps, &mut known, &mut flows, (&empty, &Desired::default()), (&before, &first)).unwrap();
    step(&mut maps, &mut known, &mut flows, (&before, &first), (&after, &second)).unwrap();
}

#[test]
fn a_new_pod_of_a_known_class_is_a_single_write() {
    let (maps, known) = after(&simple(), 1);
    let mut world = simple();
    world.pods.push((4, 0));
    let change = transition(&desired(&world.inputs(1)), &maps, &known);
    let address = Ipv4Addr::new(10, 244, 0, 4);
    let value = wanted(&world).policy.pods[&address];
    assert_eq!((value.class, value.incarnation), (1, aegis_common::incarnation("4")));
    assert_eq!(change.ops, [Op::SetPod { generation: maps.config.generation, address, value }]);
}

/// A name gets another address, and loses one: no new policy is made of it.
#[test]
fn addresses_of_a_name_are_single_writes() {
    let name = HostPattern::new("*.x.test").unwrap();
    let with = |lasts: &[u8], swapped: bool| {
        let mut inputs = simple().inputs(1);
        inputs.bindings[0].hosts = vec![name.clone()];
        if swapped {
            inputs.bindings[0].workloads.all = !inputs.bindings[0].workloads.all;
        }
        let addresses = lasts.iter().map(|last| Ipv4Addr::new(198, 18, 0, *last).into());
        inputs.resolved = (1, Arc::new([(name.clone(), addresses.collect())].into()));
        desired(&inputs)
    };
    let address = |last: u8| -> IpNet { IpAddr::from([198, 18, 0, last]).into() };
    let mut maps = Observed::default();
    let first = with(&[1], false);
    transition(&first, &maps, &Known::default()).ops.iter().for_each(|op| maps.apply(op));
    let generation = maps.config.generation;
    let class = maps.live().destinations[&address(1)];
    let known = Known { flows: Some(Named::default()), ..Known::default() };
    let ops = transition(&with(&[1, 2, 3], false), &maps, &known).ops;
    let set = |last| Op::SetDestination { generation, destination: address(last), class };
    assert_eq!(ops, [set(2), set(3)]);
    ops.iter().for_each(|op| maps.apply(op));
    let ops = transition(&with(&[2, 4], false), &maps, &known).ops;
    let gone = |last| Op::RemoveDestination { generation, destination: address(last) };
    assert_eq!(ops, [set(4), gone(1), gone(3)]);
    // Where pods change what they are in the same step, that is proved to be right.
    let ops = transition(&with(&[2, 3, 5], true), &maps, &known).ops;
    let (pod, class) = (Ipv4Addr::new(10, 244, 0, 3), 1);
    let value = PodValue { class, ..maps.live().pods[&pod] };
    let moved = Op::SetPod { generation, address: pod, value };
    assert_eq!(ops, [set(5), gone(1), moved, Op::Settle]);
}

fn wanted(world: &World) -> Desired {
    desired(&world.inputs(1))
}

#[test]
fn an_address_changes_hands_by_way_of_nobody() {
    let (maps, known) = after(&simple(), 1);
    let address = Ipv4Addr::new(10, 244, 0, 2);
    let mut inputs = simple().inputs(1);
    inputs.pods.iter_mut().filter(|pod| pod.addresses == [address]).for_each(|pod| pod.uid = "next".into());
    let value = PodValue { class: 1, incarnation: aegis_common::incarnation("next"), ..PodValue::default() };
    let generation = maps.config.generation;
    let leaving = PodValue { incarnation: 0, mac: MAC_LEAVING, ..maps.live().pods[&address] };
    let change = transition(&desired(&inputs), &maps, &known);
    assert_eq!(
        change.ops,
        [
            Op::SetPod { generation, address, value: leaving },
            Op::ForgetConnections { address: address.into() },
            Op::RemovePod { generation, address },
            Op::SetPod { generation, address, value }
        ]
    );
    // What was not forgotten, or not to the end, is forgotten before the next pod is named, also by another agent.
    for done in 1..=2 {
        let mut maps = maps.clone();
        change.ops[..done].iter().for_each(|op| maps.apply(op));
        let again = transition(&desired(&inputs), &maps, &Known::default());
        assert_eq!(again.ops, change.ops[1..]);
    }
    // The same where a new policy comes with it.
    inputs.bindings[0].cidrs = vec!["198.51.100.0/25".parse().unwrap()];
    let ops = transition(&desired(&inputs), &maps, &known).ops;
    let at = |wanted: &dyn Fn(&Op) -> bool| ops.iter().position(wanted).unwrap();
    let gone = at(&|op| *op == Op::RemovePod { generation, address });
    let forgotten = at(&|op| *op == Op::ForgetConnections { address: address.into() });
    let named = at(
        &|op| matches!(op, Op::SetPod { generation: g, address: a, .. } if (*g, *a) == (generation + 1, address)),
    );
    assert!(forgotten < gone && gone < named, "{ops:?}");
}

#[test]
fn pods_of_the_host_network_are_named_before_the_rest_is_held() {
    let (maps, known) = after(&simple(), 1);
    let mut inputs = simple().inputs(1);
    let host = |pod: &mut Pod| (pod.host_network, pod.addresses) = (true, vec![]);
    inputs.pods.iter_mut().for_each(host);
    inputs.group_roots = vec![Group { number: 10, levels: 2 }];
    let group = |number| Group { number, levels: 4 };
    inputs.groups =
        inputs.pods.iter().zip([9, 11]).map(|(pod, number)| (pod.uid.clone(), group(number))).collect();
    inputs.host_levels = 0b010;
    let wanted = desired(&inputs);
    let covered = wanted.policy.hosts[&9].class;
    assert!(covered != 0 && wanted.policy.hosts[&11].class == 0, "{:?}", wanted.policy.hosts);
    let change = transition(&wanted, &maps, &known);
    let hosts = |ops: &[Op]| -> Vec<(u64, bool)> {
        ops.iter()
            .filter_map(|op| match op {
                Op::SetHost { group, .. } if *group < 1 << 63 => Some((*group, true)),
                Op::RemoveHost { group, .. } if *group < 1 << 63 => Some((*group, false)),
                _ => None,
            })
            .collect()
    };
    assert_eq!(hosts(&change.ops), [(9, true), (11, true), (10, true)]);
    let levels = change.ops.iter().rev().find_map(|op| match op {
        Op::SetConfig(config) => Some(config.host_levels),
        _ => None,
    });
    assert_eq!(levels, Some(0b110));
    // And it is no longer held before they go.
    let mut maps = maps;
    change.ops.iter().for_each(|op| maps.apply(op));
    assert_eq!(transition(&wanted, &maps, &known).ops, []);
    inputs.host_levels = 0b110;
    inputs.group_roots.clear();
    inputs.groups.clear();
    assert_eq!(hosts(&transition(&desired(&inputs), &maps, &known).ops)[..1], [(10, false)]);
}

#[test]
fn an_address_that_can_grow_is_marked_until_it_cannot() {
    let world = simple();
    let (mut maps, known) = after(&world, 1);
    let mut next = wanted(&world);
    let mut ops = |grows| {
        next.addresses.get_mut(&egress(0)).unwrap().growing = grows;
        let ops = transition(&next, &maps, &known).ops;
        ops.iter().for_each(|op| maps.apply(op));
        ops
    };
    assert_eq!(ops(true), [Op::SetGrowing { address: egress(0) }]);
    assert_eq!(ops(true), []);
    assert_eq!(ops(false), [Op::RemoveGrowing { address: egress(0) }]);
}

#[test]
fn draining_takes_the_right_to_open_flows_and_leaves_the_slot() {
    let (mut maps, known) = after(&simple(), 1);
    let slot = maps.slots[&(0, 8)];
    let mut world = simple();
    world.addresses[0] = Some((0, vec![(0, 1), (1, 3)]));
    let wanted = desired(&world.inputs(2));
    assert_eq!(wanted.addresses[&egress(0)].draining, SliceSet::range(8, 15));
    transition(&wanted, &maps, &known).ops.iter().for_each(|op| maps.apply(op));
    assert_eq!(maps.holdings[&egress(0)].allowed, [0; 4]);
    assert_eq!(maps.slots[&(0, 8)].peer, slot.peer);
}

#[test]
fn a_node_whose_slices_drain_sends_through_others_without_a_gap() {
    let (mut maps, known) = after(&simple(), 1);
    let mut world = simple();
    world.addresses[0] = Some((0, vec![(0, 1), (1, 3)]));
    let (pod, origin) = (Ipv4Addr::new(10, 244, 0, 2), Ipv4Addr::new(198, 51, 100, 1));
    let own = Fate::Leaves([egress(0)].into(), [].into());
    let other = Fate::Leaves([].into(), [Ipv4Addr::new(192, 0, 2, 2)].into());
    assert_eq!(fate(&maps, pod, origin), own);
    for op in transition(&desired(&world.inputs(2)), &maps, &known).ops {
        maps.apply(&op);
        let now = fate(&maps, pod, origin);
        assert!(now == own || now == other, "{now:?} after {op:?}");
    }
    assert_eq!(fate(&maps, pod, origin), other);
    assert_eq!(maps.holdings[&egress(0)].allowed, [0; 4]);
    assert_eq!(maps.holdings[&egress(0)].epoch, 2);
}

#[test]
fn an_older_object_changes_nothing_and_is_reported() {
    let (maps, known) = after(&simple(), 7);
    let mut world = simple();
    world.addresses[0] = Some((0, vec![(1, 3), (0, 3)]));
    let change = transition(&desired(&world.inputs(6)), &maps, &known);
    assert_eq!(change.stale, [egress(0).into()].into());
    assert!(
        !change.ops.iter().any(|op| matches!(op, Op::SetSlot { .. } | Op::SetHolding { .. })),
        "{:?}",
        change.ops
    );
}

#[test]
fn an_address_without_object_keeps_its_flows_and_goes_when_they_have_ended() {
    let (mut maps, mut known) = after(&simple(), 1);
    let world = World { addresses: vec![None; 4], ..simple() };
    let wanted = desired(&world.inputs(1));
    let change = transition(&wanted, &maps, &known);
    change.ops.iter().for_each(|op| maps.apply(op));
    assert_eq!(change.orphaned, [egress(0).into()].into());
    assert_eq!(maps.holdings[&egress(0)].allowed, [0; 4], "no new flow");
    assert!(maps.addresses.contains_key(&egress(0)), "live flows go on");
    assert!(!maps.slots.is_empty());

    // Nothing flows here, but replies for the other owner still enter here.
    known = Known { idle: [egress(0).into()].into(), ..known };
    let change = transition(&wanted, &maps, &known);
    assert_eq!((change.orphaned, change.ops), ([egress(0).into()].into(), vec![]));
}

#[test]
fn an_address_goes_with_its_object_once_nobody_owns_a_slice() {
    let (mut maps, known) = after(&simple(), 1);
    let mut world = simple();
    // All slices rest, and then the operator deletes the object.
    world.addresses[0] = Some((0, vec![(0, 2), (1, 2)]));
    for world in [world, World { addresses: vec![None; 4], ..simple() }] {
        let change = transition(&desired(&world.inputs(2)), &maps, &known);
        change.ops.iter().for_each(|op| maps.apply(op));
    }
    assert!(maps.addresses.contains_key(&egress(0)), "a scan must show first that nothing flows");
    let known = Known { idle: [egress(0).into()].into(), ..known };
    let wanted = desired(&World { addresses: vec![None; 4], ..simple() }.inputs(2));
    transition(&wanted, &maps, &known).ops.iter().for_each(|op| maps.apply(op));
    assert!(maps.addresses.is_empty() && maps.slots.is_empty() && maps.holdings.is_empty());
}

#[test]
fn an_old_policy_goes_only_when_no_packet_is_judged_by_it_any_more() {
    let (maps, known) = after(&simple(), 1);
    let mut inputs = simple().inputs(1);
    inputs.bindings[0].cidrs = vec!["198.51.100.0/25".parse().unwrap()];
    let ops = transition(&desired(&inputs), &maps, &known).ops;
    let old = maps.config.generation;
    let switch =
        ops.iter().position(|op| matches!(op, Op::SetConfig(config) if config.generation != old)).unwrap();
    let settle = ops.iter().position(|op| *op == Op::Settle).unwrap();
    let removal = ops
        .iter()
        .position(|op| {
            matches!(op, Op::RemovePod { generation, .. } | Op::RemoveDestination { generation, .. }
                | Op::RemovePort { generation, .. } | Op::RemoveVerdict { generation, .. } if *generation == old)
        })
        .unwrap();
    assert!(switch < settle && settle < removal, "{ops:?}");
}

#[test]
fn leftovers_of_a_crash_between_two_generations_are_removed() {
    let (mut maps, known) = after(&simple(), 1);
    let clean = maps.clone();
    let generation = maps.config.generation + 1;
    maps.apply(&Op::SetPod {
        generation,
        address: Ipv4Addr::new(10, 244, 0, 9),
        value: PodValue { class: 3, incarnation: 1, ..PodValue::default() },
    });
    maps.apply(&Op::SetDestination { generation, destination: "0.0.0.0/0".parse().unwrap(), class: 9 });
    transition(&desired(&simple().inputs(1)), &maps, &known).ops.iter().for_each(|op| maps.apply(op));
    assert_eq!(maps, clean);
}

#[test]
fn the_checks_notice_writes_in_another_order() {
    let (maps, known) = after(&simple(), 1);
    let world = World { bindings: vec![(0, 1, 0, true, false)], ..simple() };
    let (old, new) = (desired(&simple().inputs(1)), desired(&world.inputs(1)));
    let ops = transition(&new, &maps, &known).ops;
    let none = Flows::default();
    let check = |ops: &[Op]| write(&mut maps.clone(), ops, &none, (&simple(), &old), (&world, &new));
    assert!(check(&ops).is_ok());
    // The switch of the policy before the policy is complete.
    let switch = ops.iter().position(|op| matches!(op, Op::SetConfig(_))).unwrap();
    let mut early = ops.clone();
    early[..=switch].rotate_right(1);
    assert!(check(&early).is_err());

    // A slot that changes hands before the right to open flows has ended.
    let world = World { addresses: vec![Some((0, vec![(1, 3), (0, 3)])), None, None, None], ..simple() };
    let new = desired(&world.inputs(2));
    let mut ops = transition(&new, &maps, &known).ops;
    let check = |ops: &[Op]| write(&mut maps.clone(), ops, &none, (&simple(), &old), (&world, &new));
    assert!(check(&ops).is_ok());
    let first = ops.iter().position(|op| matches!(op, Op::SetHolding { .. })).unwrap();
    ops.remove(first);
    assert!(check(&ops).is_err());
}

/// Sends through node 1, and 2 where `second`.
fn through(second: bool) -> World {
    let blocks = if second { vec![(1, 3), (2, 3)] } else { vec![(1, 3)] };
    World { addresses: vec![Some((0, blocks)), None, None, None], ..simple() }
}

#[test]
fn an_agent_that_starts_finds_its_allocations_again() {
    let draining = World { addresses: vec![Some((0, vec![(0, 1), (1, 1)])), None, None, None], ..simple() };
    for world in [simple(), through(false), draining] {
        let (maps, _) = after(&world, 1);
        assert_ne!(maps.addresses[&egress(0)].allocation, 0, "{world:?}");
        assert_eq!(maps.allocations[&0].name, to_map(egress(0)), "{world:?}");
        let change = transition(&desired(&world.inputs(1)), &maps, &Known::default());
        assert_eq!(change.ops, [], "{world:?}");
        assert_eq!(change.numbers, [(allocation(0), 0)].into(), "{world:?}");
    }
}

#[test]
fn an_allocation_of_which_nobody_holds_a_slice_keeps_its_name_and_opens_nothing() {
    let (mut maps, known) = after(&through(true), 1);
    let world = World { addresses: vec![Some((0, vec![(1, 1), (2, 1)])), None, None, None], ..simple() };
    let wanted = desired(&world.inputs(2));
    assert!(
        wanted.policy.verdicts.values().all(|verdict| verdict.allocation.is_none()),
        "new flows are refused"
    );
    transition(&wanted, &maps, &known).ops.iter().for_each(|op| maps.apply(op));
    let entry = maps.allocations[&0];
    assert_eq!((entry.name, entry.count, entry.gateway_count), (to_map(egress(0)), 0, 0));
    assert_eq!(maps.addresses[&egress(0)].allocation, 1, "packets of other nodes' pods find it");
    // The same where the object is gone, until no flow names the entry and another allocation needs it.
    let wanted = desired(&World { addresses: vec![None; 4], ..simple() }.inputs(2));
    transition(&wanted, &maps, &known).ops.iter().for_each(|op| maps.apply(op));
    assert_eq!(maps.allocations[&0], entry);
}

#[test]
fn the_name_of_an_allocation_stays_for_as_long_as_it_is_right() {
    let mut world = through(false);
    world.addresses.swap(0, 1);
    let (mut maps, known) = after(&world, 1);
    let holders = world.addresses[1].clone();
    let mut name = |addresses: [bool; 2]| {
        world.addresses[0] = holders.clone().filter(|_| addresses[0]);
        world.addresses[1] = holders.clone().filter(|_| addresses[1]);
        let change = transition(&desired(&world.inputs(1)), &maps, &known);
        change.ops.iter().for_each(|op| maps.apply(op));
        from_map(maps.allocations[&0].name)
    };
    assert_eq!(name([false, true]), egress(1));
    assert_eq!(name([true, true]), egress(1), "gateways may not know the first one yet");
    assert_eq!(name([true, false]), egress(0));
}

#[test]
fn a_list_of_gateways_changes_in_one_write() {
    let (maps, known) = after(&through(false), 1);
    let mut inputs = through(true).inputs(2);
    inputs.allocations.insert(allocation(0), Default::default());
    inputs.allocations.get_mut(&allocation(0)).unwrap().timeouts.udp = 30;
    let change = transition(&desired(&inputs), &maps, &known);
    let writes: Vec<_> = change
        .ops
        .iter()
        .filter_map(|op| match op {
            Op::SetAllocation { value, .. } => Some((value.gateway_count, value.timeouts.udp, value.name)),
            _ => None,
        })
        .collect();
    assert_eq!(writes, [(2, 30, to_map(egress(0)))]);
}

#[test]
fn a_node_that_is_gone_keeps_its_number_while_flows_leave_through_it() {
    let (mut maps, _) = after(&through(true), 1);
    let gone = Ipv4Addr::new(192, 0, 2, 3);
    let index = maps.peer_index[&gone];
    let mut world = through(false);
    world.nodes = 1;
    let mut turn = |flows: Option<Named>, answer: Option<Answer>| {
        let mut inputs = world.inputs(2);
        inputs.answers.extend(answer.map(|answer| (gone, answer)));
        let change = transition(&desired(&inputs), &maps, &Known { flows, ..Known::default() });
        change.ops.iter().for_each(|op| maps.apply(op));
        let peer = maps.peers.get(&index).map(|peer| (from_map(peer.address), peer.flags));
        (peer, maps.peer_index.contains_key(&gone), change.lingering.contains(&index))
    };
    let flows = || Some(Named { peers: [index].into(), ..Named::default() });
    assert_eq!(turn(flows(), None), (Some((gone, 0)), true, true));
    assert_eq!(turn(flows(), Some(Answer::Lost)), (Some((gone, 6)), true, true), "its flows are given up");
    assert_eq!(turn(None, None), (Some((gone, 6)), true, true), "nobody knows");
    assert_eq!(turn(Some(Named::default()), None), (Some((gone, 6)), false, true), "nothing begins");
    assert_eq!(turn(Some(Named::default()), None), (None, false, false));
}

#[test]
fn an_entry_becomes_anothers_only_when_nothing_names_it() {
    let (mut maps, _) = after(&through(false), 1);
    // Every entry has been used before.
    let retired = maps.allocations[&0];
    for index in 1..aegis_common::MAX_ALLOCATIONS {
        let value = aegis_common::AllocationValue { identity: u64::from(index), gateway_count: 0, ..retired };
        maps.apply(&Op::SetAllocation { index, value });
    }
    let mut world = through(false);
    world.addresses[1] = Some((1, vec![(1, 3)]));
    let number = |named: &[u32]| {
        let flows = Some(Named { allocations: named.iter().copied().collect(), ..Named::default() });
        let change = transition(&desired(&world.inputs(2)), &maps, &Known { flows, ..Known::default() });
        (change.numbers.get(&allocation(1)).copied(), change.full.len())
    };
    assert_eq!(number(&[]), (Some(1), 0));
    assert_eq!(number(&[1, 2]), (Some(3), 0));
    let all: Vec<u32> = (0..aegis_common::MAX_ALLOCATIONS).collect();
    assert_eq!(number(&all), (None, 1));
}

#[test]
fn an_address_that_moves_leaves_an_entry_that_is_whole() {
    let mut world = simple();
    world.addresses[1] = world.addresses[0].clone();
    let (maps, known) = after(&world, 1);
    world.addresses[1] = Some((1, vec![(0, 3)]));
    let change = transition(&desired(&world.inputs(2)), &maps, &known);
    let writes = change.ops.iter().filter_map(|op| match op {
        Op::SetAllocation { index, value } => Some((*index, value.count, value.name)),
        _ => None,
    });
    let name = to_map(egress(0));
    assert_eq!(writes.collect::<Vec<_>>(), [(0, 1, name), (1, 1, to_map(egress(1)))]);
}

#[test]
fn pods_move_to_another_allocation_before_their_own_ends() {
    let (maps, known) = after(&through(false), 1);
    let addresses = vec![Some((0, vec![(1, 1)])), Some((1, vec![(1, 3)])), None, None];
    let world = World { addresses, bindings: vec![(1, 0, 0, true, false)], ..simple() };
    let (old, new) = (desired(&through(false).inputs(1)), desired(&world.inputs(2)));
    let mut ops = transition(&new, &maps, &known).ops;
    let none = Flows::default();
    let check = |ops: &[Op]| write(&mut maps.clone(), ops, &none, (&through(false), &old), (&world, &new));
    check(&ops).unwrap();
    let end = ops.iter().position(|op| matches!(op, Op::SetAllocation { index: 0, .. })).unwrap();
    let end = ops.remove(end);
    ops.insert(0, end);
    assert!(check(&ops).is_err(), "the check notices");
}

#[test]
fn a_deadline_is_there_before_the_epoch_that_vouches_for_it() {
    let (mut maps, known) = after(&simple(), 1);
    // Half of it drains, so that the former epoch stays in force for a while.
    let mut world = simple();
    world.addresses[0] = Some((0, vec![(0, 1), (1, 3)]));
    let mut inputs = world.inputs(2);
    inputs.addresses.get_mut(&egress(0)).unwrap().fence = Some(Fence { after: 60, epoch: 2 });
    let change = transition(&desired(&inputs), &maps, &known);
    for op in &change.ops {
        maps.apply(op);
        let holding = maps.holdings[&egress(0)];
        assert!(holding.epoch < 2 || (holding.soft, holding.hard) == (45, 60), "{holding:?} after {op:?}");
    }
    assert_eq!(maps.holdings[&egress(0)].epoch, 2);
    // It stays when the object is gone, and goes with the fence.
    let mut gone = simple().inputs(3);
    gone.addresses.clear();
    transition(&desired(&gone), &maps, &known).ops.iter().for_each(|op| maps.apply(op));
    let holding = maps.holdings[&egress(0)];
    assert_eq!((holding.allowed, holding.hard), ([0; 4], 60), "its flows live on, as long as they may");
    transition(&desired(&world.inputs(4)), &maps, &known).ops.iter().for_each(|op| maps.apply(op));
    assert_eq!(maps.holdings[&egress(0)].hard, 0);
}

#[test]
fn nothing_older_is_followed_than_what_was_read_since_the_lease_was_acquired() {
    let known = Known { floor: Arc::new([(egress(0).into(), 3)].into()), ..Known::default() };
    let mut maps = Observed::default();
    let change = transition(&desired(&simple().inputs(2)), &maps, &known);
    change.ops.iter().for_each(|op| maps.apply(op));
    assert!(change.stale.contains(&egress(0).into()) && maps.holdings.is_empty() && maps.slots.is_empty());
    let change = transition(&desired(&simple().inputs(3)), &maps, &known);
    change.ops.iter().for_each(|op| maps.apply(op));
    assert!(change.stale.is_empty() && !maps.holdings.is_empty());
}

#[test]
fn of_an_address_that_went_while_the_lease_was_lost_nothing_is_owned_any_more() {
    let (mut maps, known) = after(&simple(), 1);
    let mut gone = simple().inputs(2);
    gone.addresses.clear();
    transition(&desired(&gone), &maps, &known).ops.iter().for_each(|op| maps.apply(op));
    let own = |maps: &Observed| {
        let owners = maps.slots.values().map(|slot| slot.peer == maps.config.own_peer);
        owners.filter(|own| *own).count()
    };
    assert_eq!((own(&maps), maps.slots.len()), (8, 16), "live flows live");
    let known = Known { lost: [egress(0).into()].into(), ..known };
    transition(&desired(&gone), &maps, &known).ops.iter().for_each(|op| maps.apply(op));
    assert_eq!((own(&maps), maps.slots.len()), (0, 8), "what other nodes own is steered to them");
}
