//! From the observed to the desired state, one map write at a time, in an order in which no moment leaks.
//!
//! 1. What policy stands on grows: peers, slots, addresses, holdings, allocations.
//! 2. The policy: a whole new generation is written beside the live one, then one store of `CONFIG` makes it live.
//!    If nothing but pods differs, single writes to the live generation do.
//! 3. What policy no longer stands on shrinks, in the reverse order.
//!
//! Within a step a slot is owned before it may be used for new flows, and loses that right before it loses its owner.

use crate::desired::{Desired, EgressAddress, PeerLink, Policy};
use crate::observed::{
    DestinationEntry, Generation, Homes, NO_ALLOCATION, Observed, PortEntry, VerdictEntry, from_map, to_map,
};
use aegis_common::{
    ACTION_ALLOCATE, ADDRESSES_PER_ALLOCATION, AddressValue, AllocationValue, Config, HoldingValue,
    MAX_ADDRESSES, MAX_ALLOCATIONS, MAX_PEERS, MAX_POD_RANGES, PEER_SAME_L2, PeerValue, PodRange, SlotValue,
    VerdictValue,
};
use aegis_core::model::AllocationName;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// One write to one map.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(missing_docs, reason = "fields are named for the map's keys and values")]
pub enum Op {
    /// Writes `CONFIG`. With another generation in it this is the switch of the policy.
    SetConfig(Config),
    /// Writes `PEERS`; an address of 0 frees the entry.
    SetPeer { index: u32, value: PeerValue },
    /// Writes `PEER_INDEX`.
    IndexPeer { address: Ipv4Addr, index: u32 },
    /// Removes from `PEER_INDEX`.
    UnindexPeer { address: Ipv4Addr },
    /// Writes `SLOTS`.
    SetSlot { index: u32, slice: u8, value: SlotValue },
    /// Writes the 16 `HOMES` of an address.
    SetHomes { index: u32, homes: Homes },
    /// Writes `ADDRESSES`.
    SetAddress { address: Ipv4Addr, value: AddressValue },
    /// Removes from `ADDRESSES`.
    RemoveAddress { address: Ipv4Addr },
    /// Writes `HOLDINGS`.
    SetHolding { address: Ipv4Addr, value: HoldingValue },
    /// Removes from `HOLDINGS`.
    RemoveHolding { address: Ipv4Addr },
    /// Writes `ALLOCATIONS`.
    SetAllocation { index: u32, value: AllocationValue },
    /// Writes `PODS`.
    SetPod { generation: u32, address: Ipv4Addr, class: u32 },
    /// Removes from `PODS`.
    RemovePod { generation: u32, address: Ipv4Addr },
    /// Writes `DESTINATIONS`.
    SetDestination { generation: u32, destination: DestinationEntry, class: u32 },
    /// Removes from `DESTINATIONS`.
    RemoveDestination { generation: u32, destination: DestinationEntry },
    /// Writes `PORTS`.
    SetPort { generation: u32, port: PortEntry, class: u32 },
    /// Removes from `PORTS`.
    RemovePort { generation: u32, port: PortEntry },
    /// Writes `VERDICTS`.
    SetVerdict { generation: u32, verdict: VerdictEntry, value: VerdictValue },
    /// Removes from `VERDICTS`.
    RemoveVerdict { generation: u32, verdict: VerdictEntry },
}

/// What must happen, and what was refused.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Transition {
    /// Writes, in order.
    pub ops: Vec<Op>,
    /// Addresses of which an object older than the data plane was offered; they stay as they are.
    pub stale: BTreeSet<Ipv4Addr>,
    /// Addresses whose object is gone while flows live here; they take no new flow.
    pub orphaned: BTreeSet<Ipv4Addr>,
    /// Numbers of the allocations afterwards.
    pub numbers: BTreeMap<AllocationName, u32>,
    /// What found no room, by table.
    pub full: BTreeSet<&'static str>,
}

/// What the agent knows of the data plane beside the contents of its maps.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Egress addresses that carry no flow of this node; one that is no longer wanted is taken out only if it is here.
    pub idle: BTreeSet<Ipv4Addr>,
    /// Numbers of the allocations after the last transition; empty after a restart.
    pub numbers: BTreeMap<AllocationName, u32>,
}

/// How to come from `observed` to `desired`.
pub fn transition(desired: &Desired, observed: &Observed, known: &Known) -> Transition {
    let mut builder = Builder { observed, desired, known, plan: Transition::default() };
    let peers = builder.grow_peers();
    builder.write_base_config(&peers);
    let kept = builder.grow_addresses(&peers);
    let numbers = builder.grow_allocations(&kept);
    builder.write_policy(&peers, &numbers);
    builder.shrink_allocations(&numbers);
    builder.shrink_addresses(&kept);
    builder.shrink_peers(&peers);
    builder.plan.numbers = numbers;
    builder.plan
}

struct Builder<'a> {
    observed: &'a Observed,
    desired: &'a Desired,
    known: &'a Known,
    plan: Transition,
}

/// Numbers that are free: the lowest ones of `0..size` for which `taken` says no.
fn free_numbers(first: u32, size: u32, taken: impl Fn(u32) -> bool) -> impl Iterator<Item = u32> {
    (first..size).filter(move |number| !taken(*number))
}

impl Builder<'_> {
    fn push(&mut self, op: Op) {
        self.plan.ops.push(op);
    }

    /// Gives every peer an index that stays the same for as long as the peer is wanted.
    fn grow_peers(&mut self) -> BTreeMap<Ipv4Addr, u32> {
        let observed = self.observed;
        let mut free = free_numbers(1, MAX_PEERS, |index| observed.peers.contains_key(&index));
        let mut numbers = BTreeMap::new();
        for (address, link) in &self.desired.peers {
            let known = observed.peer_index.get(address).copied().filter(|index| {
                observed.peers.get(index).is_some_and(|peer| peer.address == to_map(*address))
            });
            let Some(index) = known.or_else(|| free.next()) else {
                self.plan.full.insert("peers");
                continue;
            };
            numbers.insert(*address, index);
            let current = observed.peers.get(&index).copied().unwrap_or_default();
            let value = match link {
                Some(link) => peer_value(*address, link),
                // Not resolved at the moment: what was known last is a better guess than nothing.
                None => PeerValue { address: to_map(*address), ..current },
            };
            if current != value {
                self.plan.ops.push(Op::SetPeer { index, value });
            }
            if observed.peer_index.get(address) != Some(&index) {
                self.plan.ops.push(Op::IndexPeer { address: *address, index });
            }
        }
        numbers
    }

    fn config(&self, peers: &BTreeMap<Ipv4Addr, u32>, generation: u32) -> Config {
        let settings = &self.desired.settings;
        let current = self.observed.config;
        let mut config = Config {
            generation,
            mark: settings.mark,
            tunnel_port: u32::from(settings.tunnel_port),
            hold_unknown: u32::from(settings.hold_unknown),
            refusals_per_second: settings.refusals_per_second,
            ..current
        };
        if let Some(address) = settings.tunnel_address {
            config.tunnel_address = to_map(address);
            config.own_peer = peers.get(&address).copied().unwrap_or(current.own_peer);
        }
        if let Some(mtu) = settings.tunnel_mtu {
            config.tunnel_mtu = mtu;
            config.mss = mtu.saturating_sub(40);
        }
        if !settings.pod_ranges.is_empty() {
            config.pod_ranges = [PodRange::default(); MAX_POD_RANGES];
            for (slot, range) in config.pod_ranges.iter_mut().zip(&settings.pod_ranges) {
                *slot = PodRange { network: to_map(range.network()), mask: to_map(range.netmask()) };
            }
            config.pod_range_count = settings.pod_ranges.len().min(MAX_POD_RANGES) as u32;
        }
        config
    }

    /// Settings that do not depend on the policy come first; those that do (what is held) change with it.
    fn write_base_config(&mut self, peers: &BTreeMap<Ipv4Addr, u32>) {
        let current = self.observed.config;
        let mut config = self.config(peers, current.generation);
        config.hold_unknown = current.hold_unknown;
        if current.hold_unknown == 0 {
            config.pod_ranges = current.pod_ranges;
            config.pod_range_count = current.pod_range_count;
        }
        if config != current {
            self.push(Op::SetConfig(config));
        }
    }

    /// Addresses whose desired state counts; the others (older than the data plane, or without room) stay as they are.
    fn grow_addresses(&mut self, peers: &BTreeMap<Ipv4Addr, u32>) -> BTreeMap<Ipv4Addr, u32> {
        let observed = self.observed;
        let used: BTreeSet<u32> = observed.addresses.values().map(|value| value.index).collect();
        let mut free = free_numbers(0, MAX_ADDRESSES, |index| used.contains(&index));
        let mut numbers = BTreeMap::new();
        for (address, wanted) in &self.desired.addresses {
            let holding = observed.holdings.get(address).copied().unwrap_or_default();
            if u64::try_from(wanted.epoch).unwrap_or(0) < holding.epoch {
                self.plan.stale.insert(*address);
                continue;
            }
            let existing = observed.addresses.get(address).map(|value| value.index);
            let Some(index) = existing.or_else(|| free.next()) else {
                self.plan.full.insert("addresses");
                continue;
            };
            numbers.insert(*address, index);
            self.grow_address(*address, index, wanted, holding, peers);
            if existing.is_none() {
                self.push(Op::SetAddress { address: *address, value: AddressValue { index, flags: 0 } });
            }
            let allowed = wanted.allowed.words();
            let value = HoldingValue { allowed, epoch: u64::try_from(wanted.epoch).unwrap_or(0) };
            if observed.holdings.get(address) != Some(&value) {
                self.push(Op::SetHolding { address: *address, value });
            }
        }
        numbers
    }

    fn grow_address(
        &mut self,
        address: Ipv4Addr,
        index: u32,
        wanted: &EgressAddress,
        holding: HoldingValue,
        peers: &BTreeMap<Ipv4Addr, u32>,
    ) {
        let observed = self.observed;
        // A slice stops taking new flows before its slot changes hands.
        let words = wanted.allowed.words();
        let shrunk = std::array::from_fn(|word| holding.allowed[word] & words[word]);
        let loses_owner = shrunk != holding.allowed;
        if loses_owner {
            self.push(Op::SetHolding {
                address,
                value: HoldingValue { allowed: shrunk, epoch: holding.epoch },
            });
        }
        let current: BTreeMap<u8, SlotValue> = observed.slots_of(index).collect();
        for slice in 0..=u8::MAX {
            let now = current.get(&slice).copied().unwrap_or_default();
            let value = match wanted.owners.get(&slice) {
                None => SlotValue::default(),
                Some(owner) => match owner.peer.and_then(|peer| peers.get(&peer)) {
                    Some(peer) => SlotValue { peer: *peer, epoch: owner.epoch },
                    // Nobody has told where the owner is: what the data plane knows of this very holding stays.
                    None if now.epoch == owner.epoch => now,
                    None => SlotValue::default(),
                },
            };
            if now != value {
                self.push(Op::SetSlot { index, slice, value });
            }
        }
        let mut homes = Homes::default();
        for (home, node) in homes.iter_mut().zip(&wanted.homes) {
            *home = peers.get(node).copied().unwrap_or(0);
        }
        if observed.homes.get(&index).copied().unwrap_or_default() != homes {
            self.push(Op::SetHomes { index, homes });
        }
    }

    /// Gives every allocation an index. An egress address belongs to one allocation only, so an entry that has an
    /// address of the allocation is the allocation's, also after a restart.
    fn grow_allocations(&mut self, kept: &BTreeMap<Ipv4Addr, u32>) -> BTreeMap<AllocationName, u32> {
        let observed = self.observed;
        let mut owner: BTreeMap<u32, u32> = BTreeMap::new();
        for (index, value) in &observed.allocations {
            let count = (value.count as usize).min(ADDRESSES_PER_ALLOCATION);
            owner.extend(value.addresses[..count].iter().map(|address| (*address, *index)));
        }
        // The live policy may still point at an entry that has run out of addresses: it must not become another's.
        let live = observed.generations.get(&observed.config.generation);
        let referenced: BTreeSet<u32> = live
            .iter()
            .flat_map(|live| live.verdicts.values())
            .filter(|verdict| verdict.action == ACTION_ALLOCATE)
            .map(|verdict| u32::from(verdict.allocation))
            .collect();
        let taken = |index: u32| {
            referenced.contains(&index)
                || observed.allocations.get(&index).is_some_and(|entry| entry.count != 0)
        };
        // Entries never used come first: flows of an allocation that ended still have their time-outs in theirs.
        let unused = free_numbers(0, MAX_ALLOCATIONS, |index| {
            taken(index) || observed.allocations.contains_key(&index)
        });
        let reused = free_numbers(0, MAX_ALLOCATIONS, |index| {
            taken(index) || !observed.allocations.contains_key(&index)
        });
        let mut free = unused.chain(reused);

        let mut numbers: BTreeMap<AllocationName, u32> = BTreeMap::new();
        let mut claimed: BTreeSet<u32> = BTreeSet::new();
        let others: BTreeSet<u32> = self.known.numbers.values().copied().collect();
        let mut growth = Vec::new();
        for (name, wanted) in &self.desired.allocations {
            let addresses: Vec<u32> =
                wanted.addresses.iter().filter(|a| kept.contains_key(a)).map(|a| to_map(*a)).collect();
            let mine = self
                .known
                .numbers
                .get(name)
                .copied()
                .filter(|index| observed.allocations.contains_key(index));
            let by_address = addresses.iter().filter_map(|address| owner.get(address)).copied();
            let by_address =
                by_address.filter(|index| !others.contains(index) && !claimed.contains(index)).min();
            let Some(index) = mine.or(by_address).or_else(|| free.find(|index| !others.contains(index)))
            else {
                self.plan.full.insert("allocations");
                continue;
            };
            claimed.insert(index);
            numbers.insert(name.clone(), index);
            let current = observed.allocations.get(&index).copied().unwrap_or(NO_ALLOCATION);
            let mut value = AllocationValue { addresses: [0; _], count: 0, timeouts: wanted.timeouts };
            for (slot, address) in value.addresses.iter_mut().zip(&addresses) {
                *slot = *address;
                value.count += 1;
            }
            if current != value {
                growth.push((index, current, value));
            }
        }
        // An address that moves between allocations leaves the one before it joins the other.
        for (index, current, value) in &growth {
            let shrunk = common(current, value);
            if shrunk != *current && shrunk != *value {
                self.push(Op::SetAllocation { index: *index, value: shrunk });
            }
        }
        for (index, entry) in &observed.allocations {
            let moved = entry.addresses[..(entry.count as usize).min(ADDRESSES_PER_ALLOCATION)]
                .iter()
                .any(|address| growth.iter().any(|(_, _, value)| value.addresses.contains(address)));
            if moved && !claimed.contains(index) {
                self.push(Op::SetAllocation {
                    index: *index,
                    value: AllocationValue { timeouts: entry.timeouts, ..NO_ALLOCATION },
                });
            }
        }
        for (index, _, value) in growth {
            self.push(Op::SetAllocation { index, value });
        }
        numbers
    }

    fn write_policy(&mut self, peers: &BTreeMap<Ipv4Addr, u32>, numbers: &BTreeMap<AllocationName, u32>) {
        let observed = self.observed;
        let number = observed.config.generation;
        let live = observed.live();
        let wanted = number_policy(&self.desired.policy, numbers);
        let same_rules = live.destinations == wanted.destinations
            && live.ports == wanted.ports
            && live.verdicts == wanted.verdicts;
        let next = if same_rules { number } else { number.wrapping_add(1) };

        for (generation, contents) in &observed.generations {
            if *generation != number {
                self.remove_generation(*generation, contents);
            }
        }
        if same_rules {
            for (address, _) in live.pods.iter().filter(|(address, _)| !wanted.pods.contains_key(address)) {
                self.push(Op::RemovePod { generation: number, address: *address });
            }
            for (address, class) in
                wanted.pods.iter().filter(|(address, class)| live.pods.get(address) != Some(class))
            {
                self.push(Op::SetPod { generation: number, address: *address, class: *class });
            }
        } else {
            self.write_generation(next, &wanted);
        }
        let before = self.plan.ops.iter().rev().find_map(|op| match op {
            Op::SetConfig(config) => Some(*config),
            _ => None,
        });
        let config = self.config(peers, next);
        if before.unwrap_or(observed.config) != config {
            self.push(Op::SetConfig(config));
        }
        if !same_rules {
            self.remove_generation(number, &live);
        }
    }

    fn write_generation(&mut self, generation: u32, contents: &Generation) {
        for (verdict, value) in &contents.verdicts {
            self.push(Op::SetVerdict { generation, verdict: *verdict, value: *value });
        }
        for (port, class) in &contents.ports {
            self.push(Op::SetPort { generation, port: *port, class: *class });
        }
        for (destination, class) in &contents.destinations {
            self.push(Op::SetDestination { generation, destination: *destination, class: *class });
        }
        for (address, class) in &contents.pods {
            self.push(Op::SetPod { generation, address: *address, class: *class });
        }
    }

    fn remove_generation(&mut self, generation: u32, contents: &Generation) {
        for address in contents.pods.keys() {
            self.push(Op::RemovePod { generation, address: *address });
        }
        for destination in contents.destinations.keys() {
            self.push(Op::RemoveDestination { generation, destination: *destination });
        }
        for port in contents.ports.keys() {
            self.push(Op::RemovePort { generation, port: *port });
        }
        for verdict in contents.verdicts.keys() {
            self.push(Op::RemoveVerdict { generation, verdict: *verdict });
        }
    }

    fn shrink_allocations(&mut self, numbers: &BTreeMap<AllocationName, u32>) {
        let used: BTreeSet<u32> = numbers.values().copied().collect();
        for (index, entry) in &self.observed.allocations {
            let count = (entry.count as usize).min(ADDRESSES_PER_ALLOCATION);
            // Entries whose address has a stale object are left alone, as the address is.
            let stale =
                entry.addresses[..count].iter().any(|address| self.plan.stale.contains(&from_map(*address)));
            let already =
                self.plan.ops.iter().any(|op| matches!(op, Op::SetAllocation { index: i, .. } if i == index));
            if used.contains(index) || stale || already || count == 0 {
                continue;
            }
            let value = AllocationValue { timeouts: entry.timeouts, ..NO_ALLOCATION };
            self.plan.ops.push(Op::SetAllocation { index: *index, value });
        }
    }

    fn shrink_addresses(&mut self, kept: &BTreeMap<Ipv4Addr, u32>) {
        let observed = self.observed;
        for (address, value) in &observed.addresses {
            if kept.contains_key(address) || self.plan.stale.contains(address) {
                continue;
            }
            if self.desired.addresses.contains_key(address) {
                continue;
            }
            let holding = observed.holdings.get(address).copied().unwrap_or_default();
            if holding.allowed != [0; 4] {
                self.push(Op::SetHolding {
                    address: *address,
                    value: HoldingValue { allowed: [0; 4], epoch: holding.epoch },
                });
            }
            if !self.known.idle.contains(address) || holding.allowed != [0; 4] {
                self.plan.orphaned.insert(*address);
                continue;
            }
            self.push(Op::RemoveHolding { address: *address });
            self.push(Op::RemoveAddress { address: *address });
            for (slice, _) in observed.slots_of(value.index) {
                self.push(Op::SetSlot { index: value.index, slice, value: SlotValue::default() });
            }
            if observed.homes.contains_key(&value.index) {
                self.push(Op::SetHomes { index: value.index, homes: Homes::default() });
            }
        }
    }

    /// A peer goes when no slot and no home of what stays points at it.
    fn shrink_peers(&mut self, numbers: &BTreeMap<Ipv4Addr, u32>) {
        let mut after = self.observed.clone();
        self.plan.ops.iter().for_each(|op| after.apply(op));
        let used: BTreeSet<u32> = after
            .slots
            .values()
            .map(|slot| slot.peer)
            .chain(after.homes.values().flatten().copied())
            .chain(numbers.values().copied())
            .chain([after.config.own_peer])
            .collect();
        for (address, index) in &self.observed.peer_index {
            if !used.contains(index) {
                self.push(Op::UnindexPeer { address: *address });
            }
        }
        for index in self.observed.peers.keys() {
            if !used.contains(index) {
                self.push(Op::SetPeer { index: *index, value: PeerValue::default() });
            }
        }
    }
}

/// The addresses of `current` that `value` keeps, with the new time-outs.
fn common(current: &AllocationValue, value: &AllocationValue) -> AllocationValue {
    let mut both = AllocationValue { timeouts: value.timeouts, ..NO_ALLOCATION };
    let count = (current.count as usize).min(ADDRESSES_PER_ALLOCATION);
    let kept = current.addresses[..count].iter().filter(|address| value.addresses.contains(address));
    for (slot, address) in both.addresses.iter_mut().zip(kept) {
        *slot = *address;
        both.count += 1;
    }
    both
}

/// The policy in numbers. An allocation without number (its table is full) becomes a refusal.
fn number_policy(policy: &Policy, numbers: &BTreeMap<AllocationName, u32>) -> Generation {
    let verdicts = policy.verdicts.iter().map(|(key, verdict)| {
        let number =
            verdict.allocation.as_ref().map(|name| numbers.get(name).and_then(|n| u16::try_from(*n).ok()));
        let value = match number {
            None => VerdictValue { action: verdict.action, allocation: 0, binding: verdict.binding },
            Some(Some(allocation)) => {
                VerdictValue { action: verdict.action, allocation, binding: verdict.binding }
            }
            Some(None) => {
                VerdictValue { action: aegis_common::ACTION_DENY, allocation: 0, binding: verdict.binding }
            }
        };
        (*key, value)
    });
    Generation {
        pods: policy.pods.clone(),
        destinations: policy.destinations.clone(),
        ports: policy.ports.clone(),
        verdicts: verdicts.collect(),
    }
}

/// Ways to peers that have changed, for the time during which nothing else is known: after a start while the API
/// server cannot be reached, what is pinned stays in force but must follow the network.
pub fn refresh_peers(observed: &Observed, links: &BTreeMap<Ipv4Addr, PeerLink>) -> Vec<Op> {
    let changed = |(index, peer): (&u32, &PeerValue)| {
        let value = peer_value(from_map(peer.address), links.get(&from_map(peer.address))?);
        (value != *peer).then_some(Op::SetPeer { index: *index, value })
    };
    observed.peers.iter().filter_map(changed).collect()
}

fn peer_value(address: Ipv4Addr, link: &PeerLink) -> PeerValue {
    PeerValue {
        address: to_map(address),
        mac: link.mac,
        flags: if link.same_l2 { PEER_SAME_L2 } else { 0 },
        ifindex: link.ifindex,
    }
}
