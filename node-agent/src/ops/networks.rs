//! `NETWORKS` and `ALLOCATIONS6`: egress /64s. Who owns which slice of them is in `SLOTS`, as for IPv4.
//!
//! A /64 says itself which allocation it is dedicated to, and programs use none that does not agree with the allocation's list: so
//! neither one that moves, nor a flow that has chosen it before, leaves from what has become another's.

use super::allocations::identity;
use super::{Builder, Op, free_numbers};
use crate::observed::{from_network, to_network};
use aegis_common::{Allocation6Value, MAX_ADDRESSES, NETWORKS_PER_ALLOCATION, NetworkValue};
use aegis_core::egress::Egress;
use aegis_core::model::AllocationName;
use aegis_core::slice::SliceSet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

impl Builder<'_> {
    /// Indices of the /64s whose desired state counts; the others stay as they are, as addresses do.
    pub(super) fn grow_networks(
        &mut self,
        addresses: &BTreeMap<Ipv4Addr, u32>,
        peers: &BTreeMap<Ipv4Addr, u32>,
    ) -> BTreeMap<Egress, u32> {
        let (observed, desired) = (self.observed, self.desired);
        let mut used = self.used_indices();
        used.extend(addresses.values());
        let mut free = free_numbers(0, MAX_ADDRESSES, |index| used.contains(&index));
        let mut numbers = BTreeMap::new();
        for (network, wanted) in &desired.networks {
            let existing = observed.networks.get(network).copied();
            let mut now = existing.unwrap_or_default();
            if self.is_stale(*network, wanted, now.epoch) {
                continue;
            }
            let Some(index) = existing.map(|now| now.index).or_else(|| free.next()) else {
                self.plan.full.insert("addresses");
                continue;
            };
            numbers.insert(*network, index);
            // The slice stops taking new flows before it changes hands.
            let own = wanted.allowed.union(wanted.draining);
            if now.open != 0 && open(&now).difference(own) != SliceSet::EMPTY {
                now.open = 0;
                self.push(Op::SetNetwork { network: *network, value: now });
            }
            self.write_slots(index, wanted, peers);
            let name = wanted.allocation.as_ref();
            let slice = wanted.allowed.iter().next();
            let (soft, hard) = wanted.deadlines.map_or((0, 0), |deadlines| (deadlines.soft, deadlines.hard));
            let value = NetworkValue {
                epoch: u64::try_from(wanted.epoch).unwrap_or(0),
                identity: name.map_or(0, |name| identity(name, observed.config.seed)),
                index,
                slice: slice.map_or(0, u16::from),
                open: u16::from(slice.is_some()),
                soft,
                hard,
            };
            // What begins to drain may open flows until the allocation has another way.
            let kept = wanted.rights().meanwhile(open(&now));
            let first = match slice {
                None if !kept.is_empty() => {
                    NetworkValue { epoch: now.epoch, slice: now.slice, open: now.open, ..value }
                }
                _ => value,
            };
            if existing.is_none() || now != first {
                self.push(Op::SetNetwork { network: *network, value: first });
            }
            if first != value {
                self.drains.push(Op::SetNetwork { network: *network, value });
            }
        }
        numbers
    }

    /// Writes from which /64s allocations open flows. Lists that become empty wait until no policy leads there.
    pub(super) fn grow_allocations6(
        &mut self,
        kept: &BTreeMap<Egress, u32>,
        numbers: &BTreeMap<AllocationName, u32>,
    ) {
        let observed = self.observed;
        for (name, index) in numbers {
            let Some(wanted) = self.desired.allocations.get(name) else { continue };
            let current = observed.allocations6.get(index);
            let identity = identity(name, observed.config.seed);
            let own = wanted.networks.iter().copied().filter(|network| kept.contains_key(network));
            // One with a stale object stays where it is.
            let former = current.filter(|entry| entry.identity == identity).into_iter().flat_map(networks);
            let stale = former.filter(|network| self.plan.stale.contains(network));
            let own: BTreeSet<Egress> = own.chain(stale).collect();
            let value = entry(identity, &own);
            let op = Op::SetAllocation6 { index: *index, value };
            match current {
                Some(current) if *current == value => {}
                None if value.count == 0 => {}
                Some(_) if value.count == 0 => self.drains.push(op),
                _ => self.push(op),
            }
        }
    }

    /// Takes out what has no object any more, as with addresses, and what allocations that are gone open flows by.
    pub(super) fn shrink_networks(
        &mut self,
        kept: &BTreeMap<Egress, u32>,
        numbers: &BTreeMap<AllocationName, u32>,
    ) {
        let observed = self.observed;
        let used: BTreeSet<u32> = numbers.values().copied().collect();
        for (index, entry) in observed.allocations6.iter().filter(|(index, _)| !used.contains(index)) {
            if !networks(entry).any(|network| self.plan.stale.contains(&network)) {
                self.push(Op::SetAllocation6 { index: *index, value: Allocation6Value::default() });
            }
        }
        for (network, value) in &observed.networks {
            if kept.contains_key(network) || self.desired.networks.contains_key(network) {
                continue;
            }
            if value.open != 0 {
                self.push(Op::SetNetwork { network: *network, value: NetworkValue { open: 0, ..*value } });
            }
            if self.known.lost.contains(network) {
                self.disown(value.index);
            }
            let owned = observed.slots_of(value.index).next().is_some();
            if owned || !self.known.idle.contains(network) || value.open != 0 {
                self.plan.orphaned.insert(*network);
                continue;
            }
            self.push(Op::RemoveNetwork { network: *network });
        }
    }
}

/// The slice from which a /64 opens flows.
fn open(value: &NetworkValue) -> SliceSet {
    match u8::try_from(value.slice) {
        Ok(slice) if value.open != 0 => SliceSet::range(slice, slice),
        _ => SliceSet::EMPTY,
    }
}

/// The /64s of an entry.
fn networks(entry: &Allocation6Value) -> impl Iterator<Item = Egress> + '_ {
    entry.networks.iter().take(entry.count as usize).map(|network| from_network(*network))
}

fn entry(identity: u64, own: &BTreeSet<Egress>) -> Allocation6Value {
    let mut value = Allocation6Value::default();
    let own = own.iter().filter_map(|network| to_network(*network)).take(NETWORKS_PER_ALLOCATION);
    for (slot, network) in value.networks.iter_mut().zip(own) {
        (*slot, value.identity) = (network, identity);
        value.count += 1;
    }
    value
}
