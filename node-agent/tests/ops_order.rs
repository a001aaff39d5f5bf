//! Any change of the world, written one map entry at a time: after every single write the look-ups that the programs
//! would make are made here, on the same contents.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

use aegis_common::{ACTION_ALLOCATE, ACTION_DENY, DESTINATION_INTERNAL, PodValue};
use aegis_core::model::{Address, AllocationName, Holding, State};
use aegis_core::policy::{Binding, BindingName, Pod, Workloads};
use aegis_core::slice::SliceSet;
use aegis_node_agent::desired::{Desired, Inputs, desired};
use aegis_node_agent::objects::NodeRecord;
use aegis_node_agent::observed::{Observed, from_map, to_map};
use aegis_node_agent::ops::{Known, Op, transition};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

const OWN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// One state of the cluster, small enough to be drawn at random.
#[derive(Clone, Debug)]
struct World {
    /// Class of label and enabled pods: (address, label).
    pods: Vec<(u8, u8)>,
    /// (allocation, destination, label, enabled, falls back to the node's address)
    bindings: Vec<(u8, u8, u8, bool, bool)>,
    /// By address: allocation, and by block of eight slices (holder, state).
    addresses: Vec<Option<Dedicated>>,
    /// Nodes beside this one that exist.
    nodes: u8,
}

/// Allocation and, for each block of eight slices, (holder, state).
type Dedicated = (u8, Vec<(u8, u8)>);

fn world() -> impl Strategy<Value = World> {
    let pods = prop::collection::vec((2u8..8, 0u8..3), 0..5);
    let bindings =
        prop::collection::vec((0u8..3, 0u8..3, 0u8..3, any::<bool>(), prop::bool::weighted(0.2)), 0..5);
    let blocks = prop::collection::vec((0u8..4, 0u8..4), 4);
    let addresses = prop::collection::vec(prop::option::weighted(0.8, (0u8..3, blocks)), 4);
    (pods, bindings, addresses, 0u8..4).prop_map(|(pods, bindings, addresses, nodes)| World {
        pods,
        bindings,
        addresses,
        nodes,
    })
}

fn allocation(number: u8) -> AllocationName {
    AllocationName { account: "shop".into(), name: format!("a{number}") }
}

fn egress(number: usize) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, number as u8 + 1)
}

const ZONES: [&str; 3] = ["0.0.0.0/0", "198.51.100.0/24", "198.51.100.128/25"];
const DESTINATIONS: [Ipv4Addr; 4] = [
    Ipv4Addr::new(198, 51, 100, 1),
    Ipv4Addr::new(198, 51, 100, 200),
    Ipv4Addr::new(203, 0, 113, 200),
    Ipv4Addr::new(10, 96, 0, 1),
];

impl World {
    fn inputs(&self, epoch: i64) -> Inputs {
        let pods: BTreeMap<u8, u8> = self.pods.iter().copied().collect();
        let node = |number: u8| {
            let record =
                NodeRecord { addresses: vec![Ipv4Addr::new(192, 0, 2, number + 1)], ..NodeRecord::default() };
            (format!("n{number}"), record)
        };
        let addresses = self.addresses.iter().enumerate().filter_map(|(number, object)| {
            let (owner, blocks) = object.as_ref()?;
            let holdings = blocks.iter().enumerate().filter_map(|(block, (node, state))| {
                let state = match state {
                    0 => return None,
                    1 => State::Draining,
                    2 => State::Quarantined { until: 0 },
                    _ => State::Held,
                };
                let first = 8 + 8 * block as u8;
                Some(Holding { first, last: first + 7, node: format!("n{node}"), epoch, state })
            });
            let address = Address {
                address: egress(number),
                prefix: "p".into(),
                allocation: allocation(*owner),
                epoch,
                holdings: holdings.collect(),
            };
            Some((egress(number), address))
        });
        Inputs {
            node: "n0".into(),
            pods: pods
                .iter()
                .map(|(address, label)| Pod {
                    account: "shop".into(),
                    name: format!("pod{address}"),
                    uid: format!("{address}"),
                    labels: [("app".to_owned(), format!("l{label}"))].into(),
                    addresses: vec![Ipv4Addr::new(10, 244, 0, *address)],
                    ..Pod::default()
                })
                .collect(),
            bindings: self
                .bindings
                .iter()
                .enumerate()
                .map(|(number, (owner, zone, label, enabled, fall_back))| Binding {
                    name: BindingName { account: "shop".into(), name: format!("b{number}") },
                    allocation: allocation(*owner),
                    enabled: *enabled,
                    workloads: Workloads {
                        labels: [("app".to_owned(), format!("l{label}"))].into(),
                        ..Workloads::default()
                    },
                    cidrs: vec![ZONES[*zone as usize].parse().unwrap()],
                    ports: Vec::new(),
                    use_node_address: *fall_back,
                    generation: 1,
                })
                .collect(),
            addresses: addresses.collect(),
            nodes: (0..=self.nodes).map(node).collect(),
            internal: vec!["10.96.0.0/16".parse().unwrap()],
            tunnel_address: Some(OWN),
            pod_ranges: vec!["10.244.0.0/24".parse().unwrap()],
            uplink_mtu: Some(1500),
            mark: 0x1000,
            tunnel_port: 6081,
            refusals_per_second: 100,
            ..Inputs::default()
        }
    }

    /// Addresses that each allocation has.
    fn owned(&self, name: &AllocationName) -> BTreeSet<Ipv4Addr> {
        let objects = self.addresses.iter().enumerate();
        objects
            .filter(|(_, object)| object.as_ref().is_some_and(|(owner, _)| allocation(*owner) == *name))
            .map(|(number, _)| egress(number))
            .collect()
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Fate {
    /// Leaves with the node's address.
    Pass,
    /// Goes no further.
    Held,
    /// Refused.
    Deny,
    /// Leaves from one of these.
    Leaves(BTreeSet<Ipv4Addr>),
}

/// What the programs would do.
fn fate(maps: &Observed, pod: Ipv4Addr, destination: Ipv4Addr) -> Fate {
    let live = maps.live();
    let best = live
        .destinations
        .iter()
        .filter(|((network, length), _)| {
            ipnet::Ipv4Net::new(*network, *length).unwrap().contains(&destination)
        })
        .max_by_key(|((_, length), _)| *length)
        .map(|(_, class)| *class);
    if best == Some(DESTINATION_INTERNAL) {
        return Fate::Pass;
    }
    let Some(named) = live.pods.get(&pod) else {
        let config = maps.config;
        let ranges = &config.pod_ranges[..config.pod_range_count as usize];
        let inside = ranges.iter().any(|range| to_map(pod) & range.mask == range.network);
        return if config.hold_unknown == 1 && inside { Fate::Held } else { Fate::Pass };
    };
    let Some(verdict) = best.and_then(|best| live.verdicts.get(&(named.class, best, 0))) else {
        return Fate::Pass;
    };
    match verdict.action {
        ACTION_DENY => Fate::Deny,
        ACTION_ALLOCATE => {
            let entry = maps.allocations.get(&u32::from(verdict.allocation));
            let addresses =
                entry.map(|entry| entry.addresses[..entry.count as usize].to_vec()).unwrap_or_default();
            let usable = addresses.into_iter().map(from_map).filter(|address| {
                maps.holdings.get(address).is_some_and(|holding| holding.allowed != [0; 4])
                    && maps.addresses.contains_key(address)
            });
            Fate::Leaves(usable.collect())
        }
        _ => Fate::Pass,
    }
}

/// A slice from which flows may be opened is owned by this node.
fn own_what_is_allowed(maps: &Observed) -> Result<(), TestCaseError> {
    for (address, holding) in &maps.holdings {
        for slice in 0..=255u8 {
            if holding.allowed[usize::from(slice >> 6)] >> (slice & 63) & 1 == 1 {
                let index = maps.addresses.get(address).map(|value| value.index);
                // A new address is announced after its holdings are complete at the latest.
                let Some(index) = index else {
                    return Err(TestCaseError::fail(format!("{address} is allowed but unknown")));
                };
                let owner = maps.slots.get(&(index, slice)).map(|slot| slot.peer);
                prop_assert_eq!(owner, Some(maps.config.own_peer), "{} slice {}", address, slice);
            }
        }
    }
    Ok(())
}

fn policy_of(wanted: &Desired, pod: Ipv4Addr, destination: Ipv4Addr) -> Option<AllocationName> {
    let class = wanted.policy.pods.get(&pod)?.class;
    let best = wanted
        .policy
        .destinations
        .iter()
        .filter(|((network, length), _)| {
            ipnet::Ipv4Net::new(*network, *length).unwrap().contains(&destination)
        })
        .max_by_key(|((_, length), _)| *length)?;
    wanted.policy.verdicts.get(&(class, *best.1, 0))?.allocation.clone()
}

/// Steps through one change and checks every state in between.
fn step(
    maps: &mut Observed,
    known: &mut Known,
    before: (&World, &Desired),
    after: (&World, &Desired),
) -> Result<(), TestCaseError> {
    let change = transition(after.1, maps, known);
    prop_assert!(change.full.is_empty());
    write(maps, &change.ops, before, after)?;
    known.numbers = change.numbers;

    // What is there now is what was wanted.
    for pod in pods() {
        for destination in DESTINATIONS {
            if let Some(name) = policy_of(after.1, pod, destination) {
                let Fate::Leaves(sources) = fate(maps, pod, destination) else {
                    return Err(TestCaseError::fail(format!(
                        "{pod} to {destination} has nothing to leave from"
                    )));
                };
                let usable: BTreeSet<Ipv4Addr> =
                    after.1.allocations[&name].addresses.iter().copied().collect();
                prop_assert_eq!(sources, usable);
            }
        }
    }
    if !change.orphaned.is_empty() {
        // What has just lost its right to open flows goes the next time.
        return step(maps, known, after, after);
    }
    let again = transition(after.1, maps, known);
    prop_assert!(again.ops.is_empty(), "the second time there is nothing to do, but {:?}", again.ops);
    Ok(())
}

/// All addresses that pods may have.
fn pods() -> impl Iterator<Item = Ipv4Addr> {
    (2..8).map(|last| Ipv4Addr::new(10, 244, 0, last))
}

/// Writes one by one, and looks at every state in between.
fn write(
    maps: &mut Observed,
    ops: &[Op],
    before: (&World, &Desired),
    after: (&World, &Desired),
) -> Result<(), TestCaseError> {
    let old = maps.clone();
    let mut new = maps.clone();
    ops.iter().for_each(|op| new.apply(op));
    for op in ops {
        maps.apply(op);
        own_what_is_allowed(maps)?;
        for pod in &pods().collect::<Vec<_>>() {
            for destination in DESTINATIONS {
                let (was, now, will) = (
                    fate(&old, *pod, destination),
                    fate(maps, *pod, destination),
                    fate(&new, *pod, destination),
                );
                if was != Fate::Pass && will != Fate::Pass {
                    prop_assert_ne!(&now, &Fate::Pass, "leak of {} to {} after {:?}", pod, destination, op);
                }
                // (A pod that comes or goes may be held while it is not known.)
                let stays = old.live().pods.contains_key(pod) == new.live().pods.contains_key(pod);
                if was == Fate::Pass && will == Fate::Pass && stays {
                    prop_assert_eq!(&now, &Fate::Pass, "{} to {} cut after {:?}", pod, destination, op);
                }
                if was != Fate::Held && will != Fate::Held && stays {
                    prop_assert_ne!(&now, &Fate::Held, "{} to {} held after {:?}", pod, destination, op);
                }
                if let Fate::Leaves(sources) = &now {
                    let mut right = BTreeSet::new();
                    for name in
                        [before.1, after.1].iter().filter_map(|wanted| policy_of(wanted, *pod, destination))
                    {
                        right.extend(before.0.owned(&name));
                        right.extend(after.0.owned(&name));
                    }
                    prop_assert!(
                        sources.is_subset(&right),
                        "{} to {} leaves from {:?}, right are {:?}, after {:?}",
                        pod,
                        destination,
                        sources,
                        right,
                        op
                    );
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 80, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_moment_leaks(worlds in prop::collection::vec(world(), 1..5), restart in any::<bool>()) {
        let mut maps = Observed::default();
        let mut known = Known::default();
        let empty = World { pods: vec![], bindings: vec![], addresses: vec![None; 4], nodes: 0 };
        let mut former = (empty, Desired::default());
        for (epoch, world) in worlds.into_iter().enumerate() {
            // Nothing flows here, so whatever has left the world may go.
            known.idle = (0..4).map(egress).collect();
            if restart {
                known.numbers.clear();
            }
            let wanted = desired(&world.inputs(epoch as i64 + 1));
            step(&mut maps, &mut known, (&former.0, &former.1), (&world, &wanted))?;
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
    }
}

fn after(world: &World, epoch: i64) -> (Observed, Known) {
    let mut maps = Observed::default();
    let change = transition(&desired(&world.inputs(epoch)), &maps, &Known::default());
    change.ops.iter().for_each(|op| maps.apply(op));
    (maps, Known { numbers: change.numbers, ..Known::default() })
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
    let change = transition(&desired(&inputs), &maps, &known);
    assert_eq!(
        change.ops,
        [
            Op::RemovePod { generation, address },
            Op::ForgetConnections { address },
            Op::SetPod { generation, address, value }
        ]
    );
    // The same where a new policy comes with it.
    inputs.bindings[0].cidrs = vec!["198.51.100.0/25".parse().unwrap()];
    let ops = transition(&desired(&inputs), &maps, &known).ops;
    let at = |wanted: Op| ops.iter().position(|op| *op == wanted).unwrap();
    let gone = at(Op::RemovePod { generation, address });
    let forgotten = at(Op::ForgetConnections { address });
    let named = at(Op::SetPod { generation: generation + 1, address, value });
    assert!(gone < forgotten && forgotten < named, "{ops:?}");
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
fn an_older_object_changes_nothing_and_is_reported() {
    let (maps, known) = after(&simple(), 7);
    let mut world = simple();
    world.addresses[0] = Some((0, vec![(1, 3), (0, 3)]));
    let change = transition(&desired(&world.inputs(6)), &maps, &known);
    assert_eq!(change.stale, [egress(0)].into());
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
    assert_eq!(change.orphaned, [egress(0)].into());
    assert_eq!(maps.holdings[&egress(0)].allowed, [0; 4], "no new flow");
    assert!(maps.addresses.contains_key(&egress(0)), "live flows go on");
    assert!(!maps.slots.is_empty());

    known = Known { idle: [egress(0)].into(), ..known };
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
    maps.apply(&Op::SetDestination { generation, destination: (Ipv4Addr::UNSPECIFIED, 0), class: 9 });
    transition(&desired(&simple().inputs(1)), &maps, &known).ops.iter().for_each(|op| maps.apply(op));
    assert_eq!(maps, clean);
}

#[test]
fn the_checks_notice_writes_in_another_order() {
    let (maps, known) = after(&simple(), 1);
    let world = World { bindings: vec![(0, 1, 0, true, false)], ..simple() };
    let (old, new) = (desired(&simple().inputs(1)), desired(&world.inputs(1)));
    let ops = transition(&new, &maps, &known).ops;
    let check = |ops: &[Op]| write(&mut maps.clone(), ops, (&simple(), &old), (&world, &new));
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
    let check = |ops: &[Op]| write(&mut maps.clone(), ops, (&simple(), &old), (&world, &new));
    assert!(check(&ops).is_ok());
    let first = ops.iter().position(|op| matches!(op, Op::SetHolding { .. })).unwrap();
    ops.remove(first);
    assert!(check(&ops).is_err());
}
