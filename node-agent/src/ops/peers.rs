//! `PEERS` and `PEER_INDEX`: an index is a node's for as long as anything names it, flows included.

use super::{Builder, Op, free_numbers};
use crate::desired::PeerLink;
use crate::observed::{Observed, from_map, to_map};
use crate::probe::Answer;
use aegis_common::{MAX_PEERS, PEER_LOST, PEER_SILENT, PeerValue};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

impl Builder<'_> {
    /// Gives every peer an index that stays the same for as long as the peer is wanted.
    pub(super) fn grow_peers(&mut self) -> BTreeMap<Ipv4Addr, u32> {
        let (observed, desired) = (self.observed, self.desired);
        let mut free = free_numbers(1, MAX_PEERS, |index| observed.peers.contains_key(&index));
        let mut numbers = BTreeMap::new();
        for (address, link) in &desired.peers {
            let known = observed.peer_index.get(address).copied().filter(|index| {
                observed.peers.get(index).is_some_and(|peer| peer.address == to_map(*address))
            });
            let Some(index) = known.or_else(|| free.next()) else {
                self.plan.full.insert("peers");
                continue;
            };
            numbers.insert(*address, index);
            let current = observed.peers.get(&index).copied().unwrap_or_default();
            let value = peer_value(*address, link.as_ref(), current, desired.answers.get(address));
            if current != value {
                self.plan.ops.push(Op::SetPeer { index, value });
            }
            if observed.peer_index.get(address) != Some(&index) {
                self.plan.ops.push(Op::IndexPeer { address: *address, index });
            }
        }
        // Nodes that are gone, but not for the flows that leave through them.
        let wanted: BTreeSet<u32> = numbers.values().copied().collect();
        for (index, current) in observed.peers.iter().filter(|(index, _)| !wanted.contains(index)) {
            let address = from_map(current.address);
            let value = peer_value(address, None, *current, desired.answers.get(&address));
            if *current != value {
                self.plan.ops.push(Op::SetPeer { index: *index, value });
            }
        }
        numbers
    }

    /// A peer goes when no slot, no home, no list of gateways and no flow names it: out of the index first, so that it can
    /// begin no more flows, and out of the table the next time.
    pub(super) fn shrink_peers(&mut self, numbers: &BTreeMap<Ipv4Addr, u32>) {
        let mut after = self.observed.clone();
        self.plan.ops.iter().for_each(|op| after.apply(op));
        let mut used = named(&after);
        used.extend(named(self.observed));
        used.extend(numbers.values().copied());
        let goes = |index: &u32| {
            let flows = self.known.flows.as_ref();
            !used.contains(index) && flows.is_some_and(|flows| !flows.peers.contains(index))
        };
        let indexed: BTreeSet<u32> = self.observed.peer_index.values().copied().collect();
        let unindex = self.observed.peer_index.iter().filter(|(_, index)| goes(index));
        let mut ops: Vec<Op> = unindex.map(|(address, _)| Op::UnindexPeer { address: *address }).collect();
        for index in self.observed.peers.keys().filter(|index| !numbers.values().any(|n| n == *index)) {
            if goes(index) && !indexed.contains(index) {
                ops.push(Op::SetPeer { index: *index, value: PeerValue::default() });
            } else if !named(&after).contains(index) {
                self.plan.lingering.insert(*index);
            }
        }
        self.plan.ops.extend(ops);
    }
}

/// Peers that the maps name.
fn named(maps: &Observed) -> BTreeSet<u32> {
    let slots = maps.slots.values().map(|slot| slot.peer);
    let gateways = maps.allocations.values().flat_map(|entry| entry.gateways).map(u32::from);
    let homes = maps.homes.values().flatten().copied();
    slots.chain(gateways).chain(homes).chain([maps.config.own_peer]).collect()
}

/// Ways to peers and answers of peers that have changed, for the time during which nothing else is known: after a start
/// while the API server cannot be reached, what is pinned stays in force but must follow the network.
pub fn refresh_peers(
    observed: &Observed,
    links: &BTreeMap<Ipv4Addr, PeerLink>,
    answers: &BTreeMap<Ipv4Addr, Answer>,
) -> Vec<Op> {
    let changed = |(index, peer): (&u32, &PeerValue)| {
        let address = from_map(peer.address);
        let value = peer_value(address, links.get(&address), *peer, answers.get(&address));
        (value != *peer).then_some(Op::SetPeer { index: *index, value })
    };
    observed.peers.iter().filter_map(changed).collect()
}

/// A peer as it should be entered. Where nobody knows better at the moment, what was known last stays: the way to it, and
/// whether it answers.
fn peer_value(
    address: Ipv4Addr,
    link: Option<&PeerLink>,
    current: PeerValue,
    answer: Option<&Answer>,
) -> PeerValue {
    let silence = match answer {
        None => current.flags & (PEER_SILENT | PEER_LOST),
        Some(Answer::Prompt) => 0,
        Some(Answer::Silent) => PEER_SILENT,
        Some(Answer::Lost) => PEER_SILENT | PEER_LOST,
    };
    let (mac, ifindex) = link.map_or((current.mac, current.ifindex), |link| (link.mac, link.ifindex));
    PeerValue { address: to_map(address), mac, ifindex, flags: silence }
}
