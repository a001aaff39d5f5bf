//! From the observed to the desired state, one map write at a time, in an order in which no moment leaks.
//!
//! 1. What policy stands on grows: peers, slots, addresses, holdings, allocations.
//! 2. The policy: a whole new generation is written beside the live one, then one store of `CONFIG` makes it live.
//!    If nothing but pods differs, single writes to the live generation do. The old generation goes when every packet
//!    that was being judged by it is through.
//! 3. What policy no longer stands on shrinks, in the reverse order.
//!
//! Within a step a slot is owned before it may be used for new flows, and loses that right before it loses its owner.

mod allocations;
mod policy;

use crate::desired::{Desired, EgressAddress, PeerLink};
use crate::observed::{DestinationEntry, Homes, Observed, PortEntry, VerdictEntry, from_map, to_map};
use crate::probe::Answer;
use aegis_common::{
    AddressValue, AllocationValue, Config, HoldingValue, MAX_ADDRESSES, MAX_PEERS, MAX_POD_RANGES, PEER_LOST,
    PEER_SAME_L2, PEER_SILENT, PeerValue, PodRange, PodValue, SlotValue, VerdictValue,
};
use aegis_core::model::AllocationName;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// One write to one map, or one other step.
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
    /// Waits until every packet that may have met what was there before is through. What is no longer looked up may go.
    Settle,
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
    SetPod { generation: u32, address: Ipv4Addr, value: PodValue },
    /// Removes from `PODS`.
    RemovePod { generation: u32, address: Ipv4Addr },
    /// Removes a gone pod's connections from conntrack: the next pod with its address is to be judged anew.
    ForgetConnections { address: Ipv4Addr },
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
    let numbers = builder.grow_allocations(&kept, &peers);
    builder.name_allocations(&kept, &numbers);
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
        let (observed, desired) = (self.observed, self.desired);
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
                None => {
                    let flags = current.flags & PEER_SAME_L2;
                    PeerValue { address: to_map(*address), flags, ..current }
                }
            };
            let value = PeerValue { flags: value.flags | silence(desired.silent.get(address)), ..value };
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
                self.push(Op::SetAddress { address: *address, value: AddressValue { index, allocation: 0 } });
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
        let gateways = after.allocations.values().flat_map(|entry| entry.gateways).map(u32::from);
        let used: BTreeSet<u32> = after
            .slots
            .values()
            .map(|slot| slot.peer)
            .chain(gateways)
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

fn silence(answer: Option<&Answer>) -> u16 {
    match answer {
        None | Some(Answer::Prompt) => 0,
        Some(Answer::Silent) => PEER_SILENT,
        Some(Answer::Lost) => PEER_SILENT | PEER_LOST,
    }
}

/// Ways to peers that have changed, for the time during which nothing else is known: after a start while the API
/// server cannot be reached, what is pinned stays in force but must follow the network.
pub fn refresh_peers(observed: &Observed, links: &BTreeMap<Ipv4Addr, PeerLink>) -> Vec<Op> {
    let changed = |(index, peer): (&u32, &PeerValue)| {
        let value = peer_value(from_map(peer.address), links.get(&from_map(peer.address))?);
        let value = PeerValue { flags: value.flags | peer.flags & (PEER_SILENT | PEER_LOST), ..value };
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
