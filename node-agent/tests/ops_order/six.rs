//! The same over IPv6: what the programs would do by the maps' contents, after every single write.

use aegis_common::{
    ACTION_ALLOCATE, ACTION_DENY, ACTION_FORBID, DESTINATION_INTERNAL, MAC_LEAVING, NetworkValue, Pod6Value,
    SlotValue,
};
use aegis_core::egress::Egress;
use aegis_core::model::{Address, Fence, Holding, State};
use aegis_core::policy::{Binding, BindingName, Pod, Workloads};
use aegis_core::slice::SliceSet;
use aegis_node_agent::desired::{Desired, Inputs, desired};
use aegis_node_agent::objects::NodeRecord;
use aegis_node_agent::observed::{Observed, from_map, from_network, to_map6};
use aegis_node_agent::ops::{Known, Named, Op, transition};
use aegis_node_agent::singles;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::world::allocation;

/// A state of the cluster.
#[derive(Clone, Debug)]
struct World {
    /// By address: label and which of the pods that have it one after the other.
    pods: BTreeMap<u16, (u8, u8)>,
    /// (allocation, zone, label)
    bindings: Vec<(u8, u8, u8)>,
    /// By /64: allocation, and the state of this node's slice and of another's.
    networks: Vec<Option<(u8, u8, u8)>>,
    /// The same of a single address.
    single: Option<(u8, u8, u8)>,
    six: bool,
}

fn world() -> impl Strategy<Value = World> {
    (
        prop::collection::btree_map(2u16..7, (0u8..2, 0u8..2), 0..5),
        prop::collection::vec((0u8..2, 0u8..3, 0u8..2), 0..4),
        prop::collection::vec(prop::option::weighted(0.8, (0u8..2, 0u8..4, 0u8..4)), 3),
        prop::option::of((0u8..2, 0u8..4, 0u8..4)),
        prop::bool::weighted(0.9),
    )
        .prop_map(|(pods, bindings, networks, single, six)| World {
            pods,
            bindings,
            networks,
            single,
            six,
        })
}

const ZONES: [&str; 3] = ["2000::/3", "2001:db8:f::/48", "2001:db8:f:8000::/49"];
const DESTINATIONS: [&str; 4] = ["2001:db8:f::1", "2001:db8:f:9000::1", "2001:db8:a::1", "fd00:10:96::1"];

fn network(number: usize) -> Egress {
    format!("2001:db8:1:{number}::/64").parse().unwrap()
}

fn single() -> Egress {
    "2001:db8:1:9::7".parse().unwrap()
}

/// Every second one ends as another does.
fn pod(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, number, 0, 0, number / 2)
}

fn state(number: u8) -> Option<State> {
    [State::Held, State::Draining, State::Quarantined { until: 0 }].get(usize::from(number)).copied()
}

impl World {
    fn inputs(&self, epoch: i64) -> Inputs {
        let holding = |slice, node: &str, number| {
            let state = state(number)?;
            Some(Holding { first: slice, last: slice, node: node.into(), epoch, state })
        };
        let object = |address: Egress, object: &Option<(u8, u8, u8)>| {
            let (owner, own, far) = (*object)?;
            let holdings = [holding(4, "n0", own), holding(5, "n1", far)].into_iter().flatten();
            let object = Address {
                address,
                prefix: "p".into(),
                allocation: allocation(owner),
                epoch,
                holdings: holdings.collect(),
                fence: None,
            };
            Some((address, object))
        };
        let networks = self.networks.iter().enumerate();
        let networks = networks.filter_map(|(number, it)| object(network(number), it));
        let single = object(single(), &self.single);
        let addresses = single.and_then(|(own, object)| Some((singles::key(own)?, object)));
        let node = |number: u8| {
            let addresses = vec![Ipv4Addr::new(192, 0, 2, number + 1)];
            (format!("n{number}"), NodeRecord { addresses, ..NodeRecord::default() })
        };
        let label = |number: &u8| BTreeMap::from([("app".to_owned(), format!("l{number}"))]);
        let pods = self.pods.iter().map(|(number, (app, which))| Pod {
            account: "shop".into(),
            name: format!("pod{number}"),
            uid: format!("{number} {which}"),
            labels: label(app),
            addresses: vec![pod(*number).into()],
            ..Pod::default()
        });
        let bindings = self.bindings.iter().enumerate().map(|(number, (owner, zone, app))| Binding {
            name: BindingName { account: "shop".into(), name: format!("b{number}") },
            allocation: allocation(*owner),
            enabled: true,
            workloads: Workloads { labels: label(app), ..Workloads::default() },
            cidrs: vec![ZONES[usize::from(*zone)].parse().unwrap()],
            ports: Vec::new(),
            hosts: Vec::new(),
            use_node_address: false,
            binds: false,
            generation: 1,
        });
        Inputs {
            node: "n0".into(),
            pods: pods.collect(),
            bindings: bindings.collect(),
            networks: networks.collect(),
            addresses: addresses.into_iter().collect(),
            nodes: (0..=1).map(node).collect(),
            internal: vec!["fd00:10:96::/112".parse().unwrap()],
            tunnel_address: Some(Ipv4Addr::new(192, 0, 2, 1)),
            pod_ranges: vec!["10.244.0.0/24".parse().unwrap(), "fd00:10:244:1::/64".parse().unwrap()],
            six: self.six,
            mark: 0x1000,
            tunnel_port: 6081,
            ..Inputs::default()
        }
    }

    /// /64s that an allocation has, and the single address.
    fn owned(&self, name: &str) -> BTreeSet<Egress> {
        let objects = self.networks.iter().enumerate();
        let own = objects.filter(|(_, it)| it.is_some_and(|(owner, ..)| allocation(owner).name == name));
        let single = self.single.filter(|(owner, ..)| allocation(*owner).name == name).map(|_| single());
        own.map(|(number, _)| network(number)).chain(single).collect()
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Fate {
    Pass,
    Held,
    Deny,
    /// Leaves from one of these.
    Leaves(BTreeSet<Egress>),
}

/// What the programs would do with a new flow.
fn fate(maps: &Observed, pod: Ipv6Addr, destination: IpAddr) -> Fate {
    if maps.config6.active == 0 {
        return Fate::Pass;
    }
    let live = maps.live();
    let best = live.destinations.iter().filter(|(range, _)| range.contains(&destination));
    let best = best.max_by_key(|(range, _)| range.prefix_len()).map(|(_, class)| *class);
    if best == Some(DESTINATION_INTERNAL) {
        return Fate::Pass;
    }
    let Some(named) = live.pods6.get(&pod).filter(|named| named.mac != MAC_LEAVING) else {
        let ranges = &maps.config6.pod_ranges[..maps.config6.pod_range_count as usize];
        let inside = ranges
            .iter()
            .any(|range| (0..4).all(|word| to_map6(pod)[word] & range.mask[word] == range.network[word]));
        return if maps.config.hold_unknown == 1 && inside { Fate::Held } else { Fate::Pass };
    };
    let Some(verdict) = best.and_then(|best| live.verdicts.get(&(named.class, best, 0))) else {
        return Fate::Pass;
    };
    match verdict.action {
        ACTION_DENY | ACTION_FORBID => Fate::Deny,
        ACTION_ALLOCATE => {
            let entry = maps.allocations6.get(&u32::from(verdict.allocation)).copied().unwrap_or_default();
            let listed = entry.networks[..entry.count as usize].iter().map(|network| from_network(*network));
            let listed = listed.filter(|network| is_open(maps, network, entry.identity));
            Fate::Leaves(listed.chain(open_singles(maps, u32::from(verdict.allocation))).collect())
        }
        _ => Fate::Pass,
    }
}

fn is_open(maps: &Observed, network: &Egress, identity: u64) -> bool {
    maps.networks.get(network).is_some_and(|value| {
        value.open == 1 && value.identity == identity && owner(maps, value) == Some(maps.config.own_peer)
    })
}

/// Single addresses in whose ports an allocation can open flows.
fn open_singles(maps: &Observed, allocation: u32) -> Vec<Egress> {
    let Some(entry) = maps.allocations.get(&allocation) else { return Vec::new() };
    let (first, count) = (entry.count as usize, entry.singles as usize);
    let own = entry.addresses[first..first + count].iter().map(|address| from_map(*address));
    let is_open = |own: &Ipv4Addr| {
        let slices = maps.holdings.get(own).map_or(SliceSet::EMPTY, |it| SliceSet::from_words(it.allowed));
        let index = maps.addresses.get(own).map(|value| value.index);
        let is_owned =
            |slice| maps.slots.get(&(index?, slice)).filter(|slot| slot.peer == maps.config.own_peer);
        maps.config6.singles == 1 && slices.iter().any(|slice| is_owned(slice).is_some())
    };
    // What its stand-in is of is known before anything leaves.
    own.filter(is_open).map(|own| maps.egress(own)).collect()
}

fn owner(maps: &Observed, value: &NetworkValue) -> Option<u32> {
    maps.slots.get(&(value.index, value.slice as u8)).map(|slot| slot.peer)
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
    let right: BTreeSet<Egress> = [before, after]
        .iter()
        .flat_map(|(world, _)| (0..2).flat_map(|number| world.owned(&allocation(number).name)))
        .collect();
    for op in ops {
        maps.apply(op);
        for (network, value) in maps.networks.iter().filter(|(_, value)| value.open == 1) {
            prop_assert_eq!(owner(maps, value), Some(maps.config.own_peer), "{} after {:?}", network, op);
        }
        let indices: BTreeSet<u32> = maps.networks.values().map(|value| value.index).collect();
        prop_assert_eq!(indices.len(), maps.networks.len(), "two /64s have one index");
        for (address, named) in &maps.live().pods6 {
            let suffix = u32::from_be(named.suffix);
            prop_assert_eq!(maps.suffixes.get(&suffix), Some(address), "suffix {} after {:?}", suffix, op);
        }
        for pod in (2..7).map(pod) {
            for destination in DESTINATIONS.map(|it| it.parse().unwrap()) {
                let [was, now, will] = [&old, &*maps, &new].map(|maps| fate(maps, pod, destination));
                let context = || format!("{pod} to {destination} after {op:?}: {was:?}, {now:?}, {will:?}");
                let incarnation = |maps: &Observed| maps.live().pods6.get(&pod).map(|it| it.incarnation);
                let stays = incarnation(&old) == incarnation(&new);
                if was != Fate::Pass && will != Fate::Pass {
                    prop_assert_ne!(&now, &Fate::Pass, "leak, {}", context());
                }
                if was == Fate::Pass && will == Fate::Pass && stays {
                    prop_assert_eq!(&now, &Fate::Pass, "cut, {}", context());
                }
                if was != Fate::Held && will != Fate::Held && stays {
                    prop_assert_ne!(&now, &Fate::Held, "held, {}", context());
                }
                if let Fate::Leaves(sources) = &now {
                    prop_assert!(sources.is_subset(&right), "{}", context());
                }
                // (One that goes to another allocation in a single step is out of use for a moment.)
                let identity = |maps: &Observed, own: &Egress| match singles::key(*own) {
                    Some(key) => maps.addresses.get(&key).map(|it| u64::from(it.allocation)),
                    None => maps.networks.get(own).map(|it| it.identity),
                };
                if let (Fate::Leaves(was), Fate::Leaves(will)) = (&was, &will)
                    && stays
                    && was.intersection(will).any(|it| identity(&old, it) == identity(&new, it))
                {
                    let open = matches!(&now, Fate::Leaves(now) if !now.is_empty());
                    prop_assert!(open, "gap, {}", context());
                }
            }
        }
    }
    Ok(())
}

fn known() -> Known {
    Known {
        idle: (0..3).map(network).chain([single()]).collect(),
        flows: Some(Named::default()),
        ..Known::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_moment_leaks_over_ipv6(worlds in prop::collection::vec(world(), 1..5)) {
        let mut maps = Observed::default();
        let empty = World { pods: BTreeMap::new(), bindings: vec![], networks: vec![None; 3], single: None, six: false };
        let mut former = (empty, Desired::default());
        for (epoch, world) in worlds.into_iter().enumerate() {
            let wanted = desired(&world.inputs(epoch as i64 + 1));
            let change = transition(&wanted, &maps, &known());
            prop_assert!(change.full.is_empty());
            let (before, after) = ((&former.0, &former.1), (&world, &wanted));
            write(&mut maps, &change.ops, before, after)?;
            // What is there now is what was wanted.
            for (name, number) in &change.numbers {
                let entry = maps.allocations6.get(number).copied().unwrap_or_default();
                let listed: Vec<Egress> =
                    entry.networks[..entry.count as usize].iter().map(|it| from_network(*it)).collect();
                prop_assert_eq!(&listed, &wanted.allocations[name].networks);
                prop_assert!(listed.iter().all(|network| is_open(&maps, network, entry.identity)));
                let listed = open_singles(&maps, *number);
                let wanted = wanted.allocations[name].singles.iter().map(|own| maps.egress(*own));
                prop_assert!(!world.six || listed.iter().copied().eq(wanted), "{:?}", listed);
            }
            prop_assert_eq!(maps.suffixes.len(), wanted.policy.pods6.len());
            for _ in 0..3 {
                let rest = transition(&wanted, &maps, &known());
                write(&mut maps, &rest.ops, after, after)?;
            }
            let again = transition(&wanted, &maps, &known());
            prop_assert!(again.ops.is_empty(), "in the end there is nothing to do, but {:?}", again.ops);
            let with_ports = maps.addresses.keys().filter(|own| singles::is(**own));
            prop_assert!(with_ports.eq(maps.singles.keys()), "{:?}", maps.singles);
            prop_assert!(world.single.is_none() || maps.singles.len() == 1);
            former = (world, wanted);
        }
    }
}

/// A pod that is covered, and a /64 of which this node and another have a slice each.
fn simple() -> World {
    World {
        pods: [(2, (0, 0))].into(),
        bindings: vec![(0, 0, 0)],
        networks: vec![Some((0, 0, 0)), None, None],
        single: None,
        six: true,
    }
}

fn after(world: &World, epoch: i64) -> Observed {
    let mut maps = Observed::default();
    let change = transition(&desired(&world.inputs(epoch)), &maps, &Known::default());
    change.ops.iter().for_each(|op| maps.apply(op));
    maps
}

fn follow(maps: &mut Observed, world: &World, epoch: i64) -> Vec<Op> {
    let ops = transition(&desired(&world.inputs(epoch)), maps, &known()).ops;
    ops.iter().for_each(|op| maps.apply(op));
    ops
}

#[test]
fn a_single_address_is_known_before_anything_leaves_from_it_and_until_nothing_does() {
    let world = World { networks: vec![None; 3], single: Some((0, 0, 0)), ..simple() };
    let mut maps = Observed::default();
    let ops = follow(&mut maps, &world, 1);
    let at = |is: fn(&Op) -> bool| ops.iter().position(is).unwrap();
    let known = at(|op| matches!(op, Op::SetSingle { .. }));
    assert!(at(|op| matches!(op, Op::SetConfig6(config) if config.singles == 1)) < known);
    assert!(known < at(|op| matches!(op, Op::SetAllocation { value, .. } if value.singles == 1)));
    assert_eq!(open_singles(&maps, 0), [single()]);
    let destination = DESTINATIONS[0].parse().unwrap();
    assert_eq!(fate(&maps, pod(2), destination), Fate::Leaves([single()].into()));
    // It drains, rests, and goes.
    follow(&mut maps, &World { single: Some((0, 1, 0)), ..world.clone() }, 2);
    assert_eq!((open_singles(&maps, 0), maps.singles.len()), (vec![], 1));
    follow(&mut maps, &World { single: Some((0, 2, 2)), ..world.clone() }, 3);
    let ops = follow(&mut maps, &World { single: None, ..world.clone() }, 3);
    let at = |is: fn(&Op) -> bool| ops.iter().position(is).unwrap();
    assert!(at(|op| matches!(op, Op::RemoveAddress { .. })) < at(|op| matches!(op, Op::RemoveSingle { .. })));
    follow(&mut maps, &World { single: None, ..world }, 3);
    assert_eq!((maps.singles.len(), maps.config6.singles), (0, 0));
}

#[test]
fn packets_are_looked_at_when_everything_else_is_there() {
    let mut maps = Observed::default();
    let ops = follow(&mut maps, &simple(), 1);
    let at = |is: fn(&Op) -> bool| ops.iter().position(is).unwrap();
    let active = at(|op| matches!(op, Op::SetConfig6(config) if config.active == 1));
    assert!(at(|op| matches!(op, Op::SetConfig(config) if config.generation == 1)) < active);
    assert!(at(|op| matches!(op, Op::SetAllocation6 { .. })) < active);
    assert!(at(|op| matches!(op, Op::SetNetwork { .. })) < at(|op| matches!(op, Op::SetAllocation6 { .. })));
    // An agent that starts finds it all again, and never stops looking.
    assert_eq!(follow(&mut maps, &simple(), 1), []);
    follow(&mut maps, &World { six: false, ..simple() }, 1);
    assert_eq!(maps.config6.active, 1);
}

#[test]
fn draining_ends_what_is_new_and_leaves_slot_and_identity() {
    let mut maps = after(&simple(), 1);
    let (before, slots) = (maps.networks[&network(0)], maps.slots.clone());
    assert_eq!((before.slice, before.open), (4, 1));
    follow(&mut maps, &World { networks: vec![Some((0, 1, 0)), None, None], ..simple() }, 2);
    let now = maps.networks[&network(0)];
    assert_eq!((now.open, now.identity, now.index, now.epoch), (0, before.identity, before.index, 2));
    let peers =
        |slots: &BTreeMap<(u32, u8), SlotValue>| slots.values().map(|slot| slot.peer).collect::<Vec<_>>();
    assert_eq!(peers(&maps.slots), peers(&slots), "live flows go on");
    // Its object goes when it is empty, and so does its entry.
    follow(&mut maps, &World { networks: vec![Some((0, 2, 2)), None, None], ..simple() }, 3);
    follow(&mut maps, &World { networks: vec![None; 3], ..simple() }, 3);
    assert!(maps.networks.is_empty() && maps.slots.is_empty(), "{:?}", maps.networks);
}

#[test]
fn a_64_without_object_keeps_its_flows_until_they_have_ended() {
    let mut maps = after(&simple(), 1);
    let gone = desired(&World { networks: vec![None; 3], ..simple() }.inputs(1));
    let change = transition(&gone, &maps, &Known::default());
    change.ops.iter().for_each(|op| maps.apply(op));
    assert_eq!(change.orphaned, [network(0)].into());
    assert_eq!((maps.networks[&network(0)].open, maps.slots.len()), (0, 2));
    // Of one that went while the Lease was lost nothing is this node's any more.
    let known = Known { lost: [network(0)].into(), ..Known::default() };
    transition(&gone, &maps, &known).ops.iter().for_each(|op| maps.apply(op));
    assert_eq!(maps.slots.len(), 1, "what another node owns is steered to it");
}

#[test]
fn an_older_object_of_a_64_changes_nothing_and_its_deadlines_come_with_the_epoch() {
    let mut maps = after(&simple(), 7);
    let older = World { networks: vec![Some((1, 1, 0)), None, None], ..simple() };
    let change = transition(&desired(&older.inputs(6)), &maps, &known());
    assert_eq!(change.stale, [network(0)].into());
    assert!(!change.ops.iter().any(|op| matches!(op, Op::SetNetwork { .. } | Op::SetSlot { .. })));
    let mut fenced = simple().inputs(8);
    fenced.networks.get_mut(&network(0)).unwrap().fence = Some(Fence { after: 60, epoch: 8 });
    for op in transition(&desired(&fenced), &maps, &known()).ops {
        maps.apply(&op);
        let value = maps.networks[&network(0)];
        assert!(value.epoch < 8 || (value.soft, value.hard) == (45, 60), "{value:?} after {op:?}");
    }
    assert_eq!(maps.networks[&network(0)].epoch, 8);
}

#[test]
fn a_suffix_is_free_when_the_connections_of_its_pod_are_forgotten() {
    let mut maps = after(&simple(), 1);
    let (address, generation) = (pod(2), maps.config.generation);
    let suffix = 1;
    assert_eq!(maps.suffixes, [(suffix, address)].into());
    let leaving = Pod6Value { incarnation: 0, mac: MAC_LEAVING, ..maps.live().pods6[&address] };
    let ops = follow(&mut maps, &World { pods: BTreeMap::new(), ..simple() }, 1);
    let at = |op: Op| ops.iter().position(|it| *it == op).unwrap();
    let order = [
        at(Op::SetPod6 { generation, address, value: leaving }),
        at(Op::ForgetConnections { address: address.into() }),
        at(Op::RemovePod6 { generation, address }),
        at(Op::RemoveSuffix { suffix }),
    ];
    assert!(order.is_sorted(), "{ops:?}");
}
