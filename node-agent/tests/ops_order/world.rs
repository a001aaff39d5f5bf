//! A small world, what the programs would do by the maps' contents, and what must hold after each write.

use aegis_common::{ACTION_ALLOCATE, ACTION_DENY, ACTION_FORBID, DESTINATION_INTERNAL, MAC_LEAVING};
use aegis_core::model::{Address, AllocationName, Holding, State};
use aegis_core::policy::{Binding, BindingName, Pod, Workloads};
use aegis_core::slice::SliceSet;
use aegis_node_agent::desired::{Desired, Inputs};
use aegis_node_agent::objects::NodeRecord;
use aegis_node_agent::observed::{Observed, from_map, to_map};
use aegis_node_agent::ops::{Known, Named, Op, transition};
use aegis_node_agent::uses::Uses;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

const OWN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// One state of the cluster, small enough to be drawn at random.
#[derive(Clone, Debug)]
pub struct World {
    /// Class of label and enabled pods: (address, label).
    pub pods: Vec<(u8, u8)>,
    /// (allocation, destination, label, enabled, falls back to the node's address)
    pub bindings: Vec<(u8, u8, u8, bool, bool)>,
    /// By address: allocation, and by block of eight slices (holder, state).
    pub addresses: Vec<Option<Dedicated>>,
    /// Nodes beside this one that exist.
    pub nodes: u8,
    /// Blocks of this node's that are for sockets, a bit each: those of which they are given ports, and those in which some are.
    pub sockets: (u8, u8),
}

/// Allocation and, for each block of eight slices, (holder, state).
pub type Dedicated = (u8, Vec<(u8, u8)>);

pub fn world() -> impl Strategy<Value = World> {
    let pods = prop::collection::vec((2u8..8, 0u8..3), 0..5);
    let bindings =
        prop::collection::vec((0u8..3, 0u8..3, 0u8..3, any::<bool>(), prop::bool::weighted(0.2)), 0..5);
    let blocks = prop::collection::vec((0u8..4, 0u8..4), 4);
    let addresses = prop::collection::vec(prop::option::weighted(0.8, (0u8..3, blocks)), 4);
    let sockets = prop_oneof![3 => Just((0, 0)), 1 => (0u8..16, 0u8..16)];
    (pods, bindings, addresses, 0u8..4, sockets).prop_map(|(pods, bindings, addresses, nodes, sockets)| {
        World { pods, bindings, addresses, nodes, sockets }
    })
}

pub fn allocation(number: u8) -> AllocationName {
    AllocationName { account: "shop".into(), name: format!("a{number}") }
}

pub fn egress(number: usize) -> Ipv4Addr {
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
    pub fn inputs(&self, epoch: i64) -> Inputs {
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
                address: egress(number).into(),
                prefix: "p".into(),
                allocation: allocation(*owner),
                epoch,
                holdings: holdings.collect(),
                fence: None,
            };
            Some((egress(number), address))
        });
        let blocks = |bits: u8| -> SliceSet {
            (0..4)
                .filter(|block| bits >> block & 1 == 1)
                .flat_map(|block| 8 + 8 * block..16 + 8 * block)
                .collect()
        };
        let (open, kept) = (blocks(self.sockets.0), blocks(self.sockets.0 | self.sockets.1));
        let uses = Uses { open, kept, leaving: SliceSet::EMPTY };
        Inputs {
            node: "n0".into(),
            uses: (0..self.addresses.len()).map(|number| (egress(number), uses)).collect(),
            pods: pods
                .iter()
                .map(|(address, label)| Pod {
                    account: "shop".into(),
                    name: format!("pod{address}"),
                    uid: format!("{address}"),
                    labels: [("app".to_owned(), format!("l{label}"))].into(),
                    addresses: vec![Ipv4Addr::new(10, 244, 0, *address).into()],
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
                    hosts: Vec::new(),
                    use_node_address: *fall_back,
                    binds: false,
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
pub enum Fate {
    /// Leaves with the node's address.
    Pass,
    /// Goes no further.
    Held,
    /// Refused.
    Deny,
    /// Leaves from one of these addresses, or through one of these nodes where there is none.
    Leaves(BTreeSet<Ipv4Addr>, BTreeSet<Ipv4Addr>),
}

/// What the programs would do.
pub fn fate(maps: &Observed, pod: Ipv4Addr, destination: Ipv4Addr) -> Fate {
    let live = maps.live();
    let best = live
        .destinations
        .iter()
        .filter(|(range, _)| range.contains(&IpAddr::V4(destination)))
        .max_by_key(|(range, _)| range.prefix_len())
        .map(|(_, class)| *class);
    if best == Some(DESTINATION_INTERNAL) {
        return Fate::Pass;
    }
    let named = live.pods.get(&pod).filter(|named| named.mac != MAC_LEAVING);
    let Some(named) = named else {
        let config = maps.config;
        let ranges = &config.pod_ranges[..config.pod_range_count as usize];
        let inside = ranges.iter().any(|range| to_map(pod) & range.mask == range.network);
        return if config.hold_unknown == 1 && inside { Fate::Held } else { Fate::Pass };
    };
    let Some(verdict) = best.and_then(|best| live.verdicts.get(&(named.class, best, 0))) else {
        return Fate::Pass;
    };
    match verdict.action {
        ACTION_DENY | ACTION_FORBID => Fate::Deny,
        ACTION_ALLOCATE => {
            let entry = maps.allocations.get(&u32::from(verdict.allocation));
            let addresses =
                entry.map(|entry| entry.addresses[..entry.count as usize].to_vec()).unwrap_or_default();
            let usable = addresses.into_iter().map(from_map).filter(|address| {
                maps.holdings.get(address).is_some_and(|holding| holding.allowed != [0; 4])
                    && maps.addresses.contains_key(address)
            });
            let gateways = entry.map(|entry| entry.gateways[..entry.gateway_count as usize].to_vec());
            let gateways = gateways.unwrap_or_default().into_iter();
            let gateways = gateways.filter_map(|peer| maps.peers.get(&u32::from(peer)));
            Fate::Leaves(usable.collect(), gateways.map(|peer| from_map(peer.address)).collect())
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

/// A slice in which there may be sockets is owned by this node, and no flow may be opened from it.
fn one_use(maps: &Observed) -> Result<(), TestCaseError> {
    for (address, binds) in &maps.binds {
        let (open, kept) = (SliceSet::from_words(binds.open), SliceSet::from_words(binds.kept));
        prop_assert!(!kept.is_empty() && open.difference(kept).is_empty());
        let allowed =
            maps.holdings.get(address).map(|it| SliceSet::from_words(it.allowed)).unwrap_or_default();
        prop_assert!(allowed.intersection(kept).is_empty(), "{} has two uses of some", address);
        let index = maps.addresses.get(address).map(|value| value.index);
        for slice in kept.iter() {
            let owner = index.and_then(|index| maps.slots.get(&(index, slice))).map(|slot| slot.peer);
            prop_assert_eq!(owner, Some(maps.config.own_peer), "{} slice {} of sockets", address, slice);
        }
    }
    Ok(())
}

/// Packets of other nodes' pods find the allocation of an address that stays with it, whatever else is written.
fn names_stay(old: &Observed, maps: &Observed, before: &World, after: &World) -> Result<(), TestCaseError> {
    for (number, (was, will)) in before.addresses.iter().zip(&after.addresses).enumerate() {
        let (Some(was), Some(will)) = (was, will) else { continue };
        let named = |maps: &Observed| maps.addresses.get(&egress(number)).map(|value| value.allocation);
        if was.0 == will.0 && named(old).is_some_and(|named| named != 0) {
            prop_assert_eq!(named(maps), named(old), "the allocation of {}", egress(number));
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
        .filter(|(range, _)| range.contains(&IpAddr::V4(destination)))
        .max_by_key(|(range, _)| range.prefix_len())?;
    wanted.policy.verdicts.get(&(class, *best.1, 0))?.allocations().next().cloned()
}

/// Connections that never end.
#[derive(Clone, Debug, Default)]
pub struct Flows {
    /// Of pods here through another node: allocation, its number, the node, its number.
    through: BTreeSet<(AllocationName, u32, Ipv4Addr, u32)>,
    /// Addresses that an allocation has ever had, by which its gateways know it.
    names: BTreeMap<AllocationName, BTreeSet<Ipv4Addr>>,
}

impl Flows {
    /// Addresses of a new world.
    fn learn(&mut self, world: &World, wanted: &Desired) {
        for name in wanted.allocations.keys() {
            self.names.entry(name.clone()).or_default().extend(world.owned(name));
        }
    }

    /// Opens one for each way that there is.
    fn open(&mut self, wanted: &Desired, maps: &Observed, numbers: &BTreeMap<AllocationName, u32>) {
        for (name, allocation) in &wanted.allocations {
            for gateway in &allocation.gateways {
                self.through.insert((name.clone(), numbers[name], *gateway, maps.peer_index[gateway]));
            }
        }
    }

    /// What a scan finds.
    pub fn named(&self) -> Named {
        Named {
            peers: self.through.iter().map(|flow| flow.3).collect(),
            allocations: self.through.iter().map(|flow| flow.1).collect(),
        }
    }

    /// Packets still reach the node that translates them, under a name of their own allocation.
    fn live(&self, maps: &Observed) -> Result<(), TestCaseError> {
        for (allocation, number, gateway, peer) in &self.through {
            let name = maps.allocations.get(number).map_or(0, |entry| entry.name);
            prop_assert!(
                self.names[allocation].contains(&from_map(name)),
                "{:?} is sent as {}",
                allocation,
                from_map(name)
            );
            prop_assert_eq!(maps.peers.get(peer).map(|peer| from_map(peer.address)), Some(*gateway));
            prop_assert_eq!(maps.peer_index.get(gateway), Some(peer), "what it returns is taken in");
        }
        Ok(())
    }
}

/// Steps through one change and checks every state in between.
pub fn step(
    maps: &mut Observed,
    known: &mut Known,
    flows: &mut Flows,
    before: (&World, &Desired),
    after: (&World, &Desired),
) -> Result<(), TestCaseError> {
    let change = transition(after.1, maps, known);
    prop_assert!(change.full.is_empty());
    flows.learn(after.0, after.1);
    write(maps, &change.ops, flows, before, after)?;
    for (name, number) in &change.numbers {
        let of = |flow: &&(AllocationName, u32, Ipv4Addr, u32)| flow.0 == *name;
        let before = flows.through.iter().find(of).map_or(*number, |flow| flow.1);
        prop_assert_eq!(*number, before, "{:?} has another number now", name);
    }
    flows.open(after.1, maps, &change.numbers);
    known.flows = Some(flows.named());

    // What is there now is what was wanted.
    for pod in pods() {
        for destination in DESTINATIONS {
            if let Some(name) = policy_of(after.1, pod, destination) {
                let Fate::Leaves(sources, gateways) = fate(maps, pod, destination) else {
                    return Err(TestCaseError::fail(format!(
                        "{pod} to {destination} has nothing to leave from"
                    )));
                };
                let wanted = &after.1.allocations[&name];
                prop_assert_eq!(sources, wanted.addresses.iter().copied().collect());
                prop_assert_eq!(gateways, wanted.gateways.iter().copied().collect());
            }
        }
    }
    // What nobody can begin to use any more goes the next time, and the numbers of peers the time after.
    for _ in 0..3 {
        let rest = transition(after.1, maps, known);
        write(maps, &rest.ops, flows, after, after)?;
    }
    let again = transition(after.1, maps, known);
    prop_assert!(again.ops.is_empty(), "in the end there is nothing to do, but {:?}", again.ops);
    Ok(())
}

/// All addresses that pods may have.
pub fn pods() -> impl Iterator<Item = Ipv4Addr> {
    (2..8).map(|last| Ipv4Addr::new(10, 244, 0, last))
}

/// Writes one by one, and looks at every state in between.
pub fn write(
    maps: &mut Observed,
    ops: &[Op],
    flows: &Flows,
    before: (&World, &Desired),
    after: (&World, &Desired),
) -> Result<(), TestCaseError> {
    let old = maps.clone();
    let mut new = maps.clone();
    ops.iter().for_each(|op| new.apply(op));
    for op in ops {
        maps.apply(op);
        own_what_is_allowed(maps)?;
        one_use(maps)?;
        flows.live(maps)?;
        names_stay(&old, maps, before.0, after.0)?;
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
                if let (Fate::Leaves(_, one), Fate::Leaves(_, other)) = (&was, &will)
                    && !one.is_empty()
                    && !other.is_empty()
                {
                    // Meanwhile it may leave from here.
                    let on =
                        matches!(&now, Fate::Leaves(own, others) if !own.is_empty() || !others.is_empty());
                    prop_assert!(on, "{} to {} has no way after {:?}", pod, destination, op);
                }
                if let Fate::Leaves(sources, _) = &now {
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
