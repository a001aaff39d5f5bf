//! `ALLOCATIONS`: which entry is whose, and in which order addresses leave one and join another.

use super::{Builder, Op, free_numbers};
use crate::observed::{NO_ALLOCATION, from_map, to_map};
use aegis_common::{
    ACTION_ALLOCATE, ADDRESSES_PER_ALLOCATION, AddressValue, AllocationValue, MAX_ALLOCATIONS,
};
use aegis_core::model::AllocationName;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

impl Builder<'_> {
    /// Gives every allocation an index. An egress address belongs to one allocation only, so an entry that has an
    /// address of the allocation is the allocation's, also after a restart.
    pub(super) fn grow_allocations(
        &mut self,
        kept: &BTreeMap<Ipv4Addr, u32>,
        peers: &BTreeMap<Ipv4Addr, u32>,
    ) -> BTreeMap<AllocationName, u32> {
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
                || observed
                    .allocations
                    .get(&index)
                    .is_some_and(|entry| entry.count != 0 || entry.gateway_count != 0)
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
        // An address with a stale object stays where it is.
        let stale = self.plan.stale.clone();
        let counts = |address: &Ipv4Addr| kept.contains_key(address) || stale.contains(address);
        let mut growth = Vec::new();
        for (name, wanted) in &self.desired.allocations {
            let addresses: Vec<u32> =
                wanted.addresses.iter().filter(|a| counts(a)).map(|a| to_map(*a)).collect();
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
            let mut value = AllocationValue {
                timeouts: wanted.timeouts,
                name: to_map(wanted.name),
                near_count: wanted.near as u16,
                ..NO_ALLOCATION
            };
            let gateways =
                wanted.gateways.iter().filter_map(|gateway| u16::try_from(*peers.get(gateway)?).ok());
            for (slot, gateway) in value.gateways.iter_mut().zip(gateways) {
                *slot = gateway;
                value.gateway_count += 1;
            }
            for (slot, address) in value.addresses.iter_mut().zip(&addresses) {
                *slot = *address;
                value.count += 1;
            }
            if current != value {
                growth.push((index, current, value));
            }
        }
        self.unname_allocations(kept, &numbers);
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

    /// Addresses must not name an entry that is about to become another allocation's.
    fn unname_allocations(
        &mut self,
        kept: &BTreeMap<Ipv4Addr, u32>,
        numbers: &BTreeMap<AllocationName, u32>,
    ) {
        for (address, index) in kept {
            let now = self.observed.addresses.get(address).map_or(0, |value| value.allocation);
            if now != 0 && now != self.number_of(address, numbers) {
                let value = AddressValue { index: *index, allocation: 0 };
                self.push(Op::SetAddress { address: *address, value });
            }
        }
    }

    /// Tells the programs which allocation each address is of, once its entry is there.
    pub(super) fn name_allocations(
        &mut self,
        kept: &BTreeMap<Ipv4Addr, u32>,
        numbers: &BTreeMap<AllocationName, u32>,
    ) {
        for (address, index) in kept {
            let now = self.observed.addresses.get(address).map_or(0, |value| value.allocation);
            let allocation = self.number_of(address, numbers);
            if allocation != 0 && now != allocation {
                let value = AddressValue { index: *index, allocation };
                self.push(Op::SetAddress { address: *address, value });
            }
        }
    }

    /// 1 + number of the allocation that an address is of; 0 = it has none.
    fn number_of(&self, address: &Ipv4Addr, numbers: &BTreeMap<AllocationName, u32>) -> u32 {
        let object = self.desired.addresses.get(address);
        let number = object.and_then(|object| numbers.get(object.allocation.as_ref()?));
        number.map_or(0, |number| number + 1)
    }

    pub(super) fn shrink_allocations(&mut self, numbers: &BTreeMap<AllocationName, u32>) {
        let used: BTreeSet<u32> = numbers.values().copied().collect();
        for (index, entry) in &self.observed.allocations {
            let count = (entry.count as usize).min(ADDRESSES_PER_ALLOCATION);
            // Entries whose address has a stale object are left alone, as the address is.
            let stale =
                entry.addresses[..count].iter().any(|address| self.plan.stale.contains(&from_map(*address)));
            let already =
                self.plan.ops.iter().any(|op| matches!(op, Op::SetAllocation { index: i, .. } if i == index));
            if used.contains(index) || stale || already || (count == 0 && entry.gateway_count == 0) {
                continue;
            }
            let value = AllocationValue { timeouts: entry.timeouts, ..NO_ALLOCATION };
            self.plan.ops.push(Op::SetAllocation { index: *index, value });
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
