//! `ADDRESSES`, `SLOTS`, `HOMES` and `HOLDINGS`: who owns which ports.

use super::{Builder, Op, free_numbers};
use crate::desired::EgressAddress;
use crate::observed::Homes;
use aegis_common::{AddressValue, BindValue, Config6, HoldingValue, MAX_ADDRESSES, SlotValue};
use aegis_core::egress::Egress;
use aegis_core::holding::may_follow;
use aegis_core::slice::SliceSet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

impl Builder<'_> {
    /// Addresses whose desired state counts; the others (older than the data plane, or without room) stay as they are.
    pub(super) fn grow_addresses(&mut self, peers: &BTreeMap<Ipv4Addr, u32>) -> BTreeMap<Ipv4Addr, u32> {
        let observed = self.observed;
        let used = self.used_indices();
        let mut free = free_numbers(0, MAX_ADDRESSES, |index| used.contains(&index));
        let mut numbers = BTreeMap::new();
        for (address, wanted) in &self.desired.addresses {
            let holding = observed.holdings.get(address).copied().unwrap_or_default();
            if self.is_stale(wanted.egress(*address), wanted, holding.epoch) {
                continue;
            }
            let existing = observed.addresses.get(address).map(|value| value.index);
            let Some(index) = existing.or_else(|| free.next()) else {
                self.plan.full.insert("addresses");
                continue;
            };
            numbers.insert(*address, index);
            self.grow_single(*address, wanted);
            let bound = self.shrink_binds(*address, wanted);
            self.grow_address(*address, index, wanted, holding, peers);
            if existing.is_none() {
                self.push(Op::SetAddress { address: *address, value: AddressValue { index, allocation: 0 } });
            }
            let allowed = wanted.allowed.words();
            let (soft, hard) = wanted.deadlines.map_or((0, 0), |deadlines| (deadlines.soft, deadlines.hard));
            let epoch = u64::try_from(wanted.epoch).unwrap_or(0);
            let value = HoldingValue { allowed, epoch, soft, hard };
            // What begins to drain may open flows until the allocation has another way.
            let kept = wanted.rights().meanwhile(SliceSet::from_words(holding.allowed));
            let kept = kept.difference(wanted.kept).words();
            let now = if kept == allowed {
                value
            } else {
                HoldingValue { allowed: kept, epoch: holding.epoch, ..value }
            };
            if observed.holdings.get(address) != Some(&now) {
                self.push(Op::SetHolding { address: *address, value: now });
            }
            let binds = BindValue { open: wanted.bound.words(), kept: wanted.kept.words() };
            if binds != bound {
                self.push(Op::SetBinds { address: *address, value: binds });
            }
            match (wanted.growing, observed.growing.contains(address)) {
                (true, false) => self.push(Op::SetGrowing { address: *address }),
                (false, true) => self.push(Op::RemoveGrowing { address: *address }),
                _ => {}
            }
            if now != value {
                self.drains.push(Op::SetHolding { address: *address, value });
            }
        }
        numbers
    }

    /// Makes a single IPv6 address known, before anything leaves from it.
    fn grow_single(&mut self, stand_in: Ipv4Addr, wanted: &EgressAddress) {
        let Some(address) = wanted.single else { return };
        let config = self.present_config6();
        if config.singles == 0 {
            self.push(Op::SetConfig6(Config6 { singles: 1, ..config }));
        }
        if self.observed.singles.get(&stand_in) != Some(&address) {
            self.push(Op::SetSingle { stand_in, address });
        }
    }

    /// Takes from sockets what they are not to have any more, before somebody else gets it. Gives what is left.
    fn shrink_binds(&mut self, address: Ipv4Addr, wanted: &EgressAddress) -> BindValue {
        let Some(before) = self.observed.binds.get(&address).copied() else { return BindValue::default() };
        let both =
            |words: [u64; 4], slices: SliceSet| SliceSet::from_words(words).intersection(slices).words();
        let rest = BindValue { open: both(before.open, wanted.bound), kept: both(before.kept, wanted.kept) };
        if rest.kept == [0; 4] {
            self.push(Op::RemoveBinds { address });
        } else if rest != before {
            self.push(Op::SetBinds { address, value: rest });
        }
        rest
    }

    /// Indices into `SLOTS` that are in use, by addresses of either family.
    pub(super) fn used_indices(&self) -> BTreeSet<u32> {
        let addresses = self.observed.addresses.values().map(|value| value.index);
        addresses.chain(self.observed.networks.values().map(|value| value.index)).collect()
    }

    /// Whether an object is older than what the data plane has, which is noted.
    pub(super) fn is_stale(&mut self, own: Egress, wanted: &EgressAddress, programmed: u64) -> bool {
        let programmed = i64::try_from(programmed).unwrap_or(i64::MAX);
        let floor = self.known.floor.get(&own).copied().unwrap_or(i64::MIN);
        let stale = !may_follow(wanted.epoch, programmed.max(floor));
        if stale {
            self.plan.stale.insert(own);
        }
        stale
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
        let words = wanted.allowed.union(wanted.draining).words();
        let shrunk = std::array::from_fn(|word| holding.allowed[word] & words[word]);
        let loses_owner = shrunk != holding.allowed;
        if loses_owner {
            self.push(Op::SetHolding { address, value: HoldingValue { allowed: shrunk, ..holding } });
        }
        self.write_slots(index, wanted, peers);
        let mut homes = Homes::default();
        for (home, node) in homes.iter_mut().zip(&wanted.homes) {
            *home = peers.get(node).copied().unwrap_or(0);
        }
        if observed.homes.get(&index).copied().unwrap_or_default() != homes {
            self.push(Op::SetHomes { index, homes });
        }
    }

    /// Writes who owns which slice.
    pub(super) fn write_slots(
        &mut self,
        index: u32,
        wanted: &EgressAddress,
        peers: &BTreeMap<Ipv4Addr, u32>,
    ) {
        let current: BTreeMap<u8, SlotValue> = self.observed.slots_of(index).collect();
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
    }

    /// An address without object is taken out if the operator has deleted it, which it does only when nobody owns a slice any
    /// more. Otherwise somebody else has deleted the object, and flows live on here or, steered, elsewhere.
    pub(super) fn shrink_addresses(&mut self, kept: &BTreeMap<Ipv4Addr, u32>) {
        let observed = self.observed;
        self.plan.ops.append(&mut self.drains);
        for (address, value) in &observed.addresses {
            let own = observed.egress(*address);
            if kept.contains_key(address) || self.plan.stale.contains(&own) {
                continue;
            }
            if self.desired.addresses.contains_key(address) {
                continue;
            }
            if observed.growing.contains(address) {
                self.push(Op::RemoveGrowing { address: *address });
            }
            let holding = observed.holdings.get(address).copied().unwrap_or_default();
            if holding.allowed != [0; 4] {
                self.push(Op::SetHolding {
                    address: *address,
                    value: HoldingValue { allowed: [0; 4], ..holding },
                });
            }
            match observed.binds.get(address) {
                Some(_) if self.known.lost.contains(&own) => self.push(Op::RemoveBinds { address: *address }),
                Some(binds) if binds.open != [0; 4] => {
                    let value = BindValue { open: [0; 4], ..*binds };
                    self.push(Op::SetBinds { address: *address, value });
                }
                _ => {}
            }
            if self.known.lost.contains(&own) {
                self.disown(value.index);
            }
            let owned = observed.slots_of(value.index).next().is_some();
            if owned || !self.known.idle.contains(&own) || holding.allowed != [0; 4] {
                self.plan.orphaned.insert(own);
                continue;
            }
            if observed.binds.contains_key(address) {
                self.push(Op::RemoveBinds { address: *address });
            }
            self.push(Op::RemoveHolding { address: *address });
            self.push(Op::RemoveAddress { address: *address });
            if observed.singles.contains_key(address) {
                self.push(Op::RemoveSingle { stand_in: *address });
            }
            if observed.homes.contains_key(&value.index) {
                self.push(Op::SetHomes { index: value.index, homes: Homes::default() });
            }
        }
    }

    /// Takes this node's slices of an address from it: flows in them are ended then.
    pub(super) fn disown(&mut self, index: u32) {
        let own = self.observed.config.own_peer;
        for (slice, _) in self.observed.slots_of(index).filter(|(_, slot)| slot.peer == own) {
            self.push(Op::SetSlot { index, slice, value: SlotValue::default() });
        }
    }
}
