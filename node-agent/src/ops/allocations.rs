//! `ALLOCATIONS`: which entry is whose, and in which order addresses leave one and join another.

use super::{Builder, Op, free_numbers};
use crate::desired::Allocation;
use crate::observed::{NO_ALLOCATION, from_map, to_map};
use aegis_common::{
    ACTION_ALLOCATE, ADDRESSES_PER_ALLOCATION, AddressValue, AllocationValue, MAX_ALLOCATIONS, is_stand_in,
};
use aegis_core::model::AllocationName;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::Ipv4Addr;

impl Builder<'_> {
    /// Writes what allocations grow by; gives their numbers.
    pub(super) fn grow_allocations(
        &mut self,
        kept: &BTreeMap<Ipv4Addr, u32>,
        peers: &BTreeMap<Ipv4Addr, u32>,
    ) -> BTreeMap<AllocationName, u32> {
        let (observed, desired) = (self.observed, self.desired);
        let numbers = self.number_allocations();
        let values: BTreeMap<u32, AllocationValue> = numbers
            .iter()
            .filter_map(|(name, index)| {
                let wanted = desired.allocations.get(name)?;
                Some((*index, self.allocation_value(name, *index, wanted, kept, peers)))
            })
            .collect();
        self.unname_allocations(kept, &numbers);
        // An address that moves between allocations leaves the one before it joins the other.
        let mut current = observed.allocations.clone();
        for (index, entry) in &mut current {
            let joins = |address: &u32| {
                values.iter().any(|(other, value)| other != index && addresses(value).contains(address))
            };
            let stays: Vec<u32> =
                addresses(entry).iter().copied().filter(|address| !joins(address)).collect();
            if stays.len() < addresses(entry).len() {
                let rest = values.get(index).copied().unwrap_or_else(|| retired(entry));
                *entry = with_addresses(rest, &stays);
                self.push(Op::SetAllocation { index: *index, value: *entry });
            }
        }
        for (index, value) in values {
            if opens_nothing(&value) && current.contains_key(&index) {
                // The live policy may still send new flows there.
                self.ending.insert(index, value);
            } else if current.get(&index) != Some(&value) {
                self.push(Op::SetAllocation { index, value });
            }
        }
        numbers
    }

    /// Every allocation has an entry, which its identity names also after a restart. An entry is another's only when
    /// nothing names it any more: no verdict, no address, no live flow.
    fn number_allocations(&mut self) -> BTreeMap<AllocationName, u32> {
        let (observed, desired) = (self.observed, self.desired);
        let entries = observed.allocations.iter().filter(|(_, entry)| entry.identity != 0);
        let by_identity: BTreeMap<u64, u32> =
            entries.map(|(index, entry)| (entry.identity, *index)).collect();
        let identity = |name: &AllocationName| identity(name, observed.config.seed);
        let live = observed.generations.get(&observed.config.generation);
        let verdicts = live.iter().flat_map(|live| live.verdicts.values());
        // There may be a hundred thousand verdicts, of a few allocations.
        let mut named = vec![false; MAX_ALLOCATIONS as usize];
        for verdict in verdicts.filter(|verdict| verdict.action == ACTION_ALLOCATE) {
            for number in [verdict.allocation, verdict.secondary] {
                named.get_mut(usize::from(number)).into_iter().for_each(|named| *named = true);
            }
        }
        let mut in_use: BTreeSet<u32> = (0..).zip(&named).filter(|(_, it)| **it).map(|(it, _)| it).collect();
        in_use.extend(observed.addresses.values().filter_map(|address| address.allocation.checked_sub(1)));
        in_use.extend(desired.allocations.keys().filter_map(|name| by_identity.get(&identity(name))));
        let flows = self.known.flows.as_ref();
        // Entries never used come first: those of allocations that ended may be wanted back.
        let unused = free_numbers(0, MAX_ALLOCATIONS, |index| observed.allocations.contains_key(&index));
        let ended = observed.allocations.iter().filter(|(index, entry)| {
            opens_nothing(entry)
                && !observed.allocations6.contains_key(index)
                && !in_use.contains(index)
                && flows.is_some_and(|flows| !flows.allocations.contains(index))
        });
        let mut free = unused.chain(ended.map(|(index, _)| *index));

        // Should there be too many, those that local pods use come first.
        let verdicts = desired.policy.verdicts.values();
        let mut seen = HashSet::new();
        let local: BTreeSet<&AllocationName> = verdicts
            .flat_map(|verdict| verdict.allocations())
            .filter(|name| seen.insert(std::ptr::from_ref::<AllocationName>(name)))
            .collect();
        let (first, rest): (Vec<_>, Vec<_>) =
            desired.allocations.keys().partition(|name| local.contains(name));
        let mut taken = BTreeSet::new();
        let mut numbers = BTreeMap::new();
        for name in first.into_iter().chain(rest) {
            let identity = identity(name);
            // Two with one identity must not share an entry: the second has none.
            let own =
                taken.insert(identity).then(|| by_identity.get(&identity).copied().or_else(|| free.next()));
            match own.flatten() {
                Some(index) => _ = numbers.insert(name.clone(), index),
                None => _ = self.plan.full.insert("allocations"),
            }
        }
        numbers
    }

    fn allocation_value(
        &self,
        name: &AllocationName,
        index: u32,
        wanted: &Allocation,
        kept: &BTreeMap<Ipv4Addr, u32>,
        peers: &BTreeMap<Ipv4Addr, u32>,
    ) -> AllocationValue {
        // An address with a stale object stays where it is.
        let current = self.observed.allocations.get(&index).map(addresses).unwrap_or_default();
        let stale = current.iter().filter(|address| self.is_left(**address));
        let own = wanted.with_ports().filter(|address| kept.contains_key(address));
        let own: BTreeSet<Ipv4Addr> = own.chain(stale.map(|address| from_map(*address))).collect();
        let own: Vec<u32> = own.into_iter().map(to_map).collect();
        // The other nodes may not know a new address yet: the name stays for as long as it is right.
        let named = self.observed.allocations.get(&index).filter(|entry| entry.name != 0);
        let former = named.map(|entry| from_map(entry.name)).filter(|former| {
            let object = self.desired.addresses.get(former);
            object.is_some_and(|object| object.allocation.as_ref() == Some(name))
        });
        let mut value = AllocationValue {
            timeouts: wanted.timeouts,
            max_resting: wanted.max_resting,
            name: former.or(wanted.name).map_or(0, to_map),
            identity: identity(name, self.observed.config.seed),
            account: digest(name.account.bytes(), self.observed.config.seed),
            pod_flows: wanted.per_pod.flows,
            pod_rate: wanted.per_pod.per_second,
            account_flows: self.desired.per_account.flows,
            account_rate: self.desired.per_account.per_second,
            room_flows: self.desired.shared.map_or(0, |shared| shared.flows),
            room_blocks: self.desired.shared.map_or(0, |shared| shared.blocks),
            ..NO_ALLOCATION
        };
        let numbered = wanted.gateways.iter().enumerate().filter_map(|(rank, gateway)| {
            Some((rank < wanted.near, u16::try_from(*peers.get(gateway)?).ok()?))
        });
        for (slot, (near, gateway)) in value.gateways.iter_mut().zip(numbered) {
            *slot = gateway;
            value.gateway_count += 1;
            value.near_count += u16::from(near);
        }
        with_addresses(value, &own)
    }

    /// Whether an address has a stale object.
    fn is_left(&self, address: u32) -> bool {
        self.plan.stale.contains(&self.observed.egress(from_map(address)))
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

    /// Takes from allocations what they open flows by, where nothing is left. Their flows go on, so entries keep name and
    /// time-outs.
    pub(super) fn shrink_allocations(&mut self, numbers: &BTreeMap<AllocationName, u32>) {
        let used: BTreeSet<u32> = numbers.values().copied().collect();
        for (index, entry) in &self.observed.allocations {
            // Entries whose address has a stale object are left alone, as the address is.
            let stale = addresses(entry).iter().any(|address| self.is_left(*address));
            let value = match self.ending.get(index) {
                Some(value) => *value,
                None if used.contains(index) || stale => continue,
                None => retired(entry),
            };
            let mut writes = self.plan.ops.iter().rev();
            let written = writes.find_map(|op| match op {
                Op::SetAllocation { index: other, value } if other == index => Some(*value),
                _ => None,
            });
            if written.unwrap_or(*entry) != value {
                self.push(Op::SetAllocation { index: *index, value });
            }
        }
    }
}

/// What is set of an entry's addresses.
fn addresses(entry: &AllocationValue) -> &[u32] {
    let count = (entry.count as usize).saturating_add(entry.singles as usize);
    &entry.addresses[..count.min(ADDRESSES_PER_ALLOCATION)]
}

/// Whether no flow can be opened by an entry.
fn opens_nothing(entry: &AllocationValue) -> bool {
    (entry.count, entry.singles, entry.gateway_count) == (0, 0, 0)
}

fn with_addresses(entry: AllocationValue, own: &[u32]) -> AllocationValue {
    let mut entry = AllocationValue { addresses: NO_ALLOCATION.addresses, count: 0, singles: 0, ..entry };
    let (singles, v4): (Vec<u32>, Vec<u32>) = own.iter().partition(|address| is_stand_in(**address));
    for (slot, address) in entry.addresses.iter_mut().zip(v4.into_iter().chain(singles)) {
        *slot = address;
        let count = if is_stand_in(address) { &mut entry.singles } else { &mut entry.count };
        *count += 1;
    }
    entry
}

/// An entry from which nothing is opened any more.
fn retired(entry: &AllocationValue) -> AllocationValue {
    let AllocationValue { timeouts, max_resting, name, identity, account, .. } = *entry;
    AllocationValue { timeouts, max_resting, name, identity, account, ..NO_ALLOCATION }
}

/// What tells an allocation from all others, the same after a restart.
pub(super) fn identity(name: &AllocationName, seed: u32) -> u64 {
    digest(name.account.bytes().chain([b'/']).chain(name.name.bytes()), seed)
}

/// A digest (FNV-1a) that is never 0. It begins with the data plane's secret, so that nobody can choose a name that has the digest
/// of another's.
fn digest(text: impl Iterator<Item = u8>, seed: u32) -> u64 {
    let seed = u64::from(seed);
    let digest = text.fold(0xcbf2_9ce4_8422_2325 ^ seed ^ seed << 32, |digest, byte| {
        (digest ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    digest.max(1)
}
