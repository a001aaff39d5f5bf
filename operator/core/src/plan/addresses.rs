//! Which addresses each allocation has, gains and gives back.

use super::Verdict;
use crate::delegation::{Ledger, Right};
use crate::egress::{Egress, Family, Kind};
use crate::model::{
    Address, AddressRequest, Allocation, AllocationName, Inputs, MAX_ADDRESSES, MAX_ALLOCATIONS,
};
use crate::prefix::{Pool, Prefixes};
use crate::reason;
use std::collections::{BTreeMap, BTreeSet};

/// The addresses of one allocation.
pub(super) struct Assignment {
    /// Whether new addresses may be taken.
    pub accepted: Verdict,
    /// Addresses to serve from. Any other that the allocation has drains.
    pub wanted: BTreeSet<Egress>,
    /// Those of `wanted` that do not exist yet, with the prefix each is taken from.
    pub fresh: BTreeMap<Egress, String>,
    /// Why fewer are wanted than were asked for.
    pub missing: Option<Verdict>,
    /// Its addresses of prefixes that it no longer names.
    pub foreign: Vec<Egress>,
}

/// Older allocations choose first, then by name. What an allocation has stays with it; an address that exists in
/// any state is free for nobody until its object is gone.
pub(super) fn assign(inputs: &Inputs, prefixes: &Prefixes) -> BTreeMap<AllocationName, Assignment> {
    let mut existing: BTreeMap<&AllocationName, BTreeMap<Egress, &Address>> = BTreeMap::new();
    for address in &inputs.addresses {
        existing.entry(&address.allocation).or_default().insert(address.address, address);
    }
    let holder: BTreeMap<Egress, &AllocationName> =
        inputs.addresses.iter().map(|address| (address.address, &address.allocation)).collect();
    let mut desk = Desk {
        prefixes,
        pools: prefixes.iter().map(|judged| (judged.prefix.name.as_str(), Pool::new(judged))).collect(),
        next: BTreeMap::new(),
        addresses: holder.len() + inputs.withheld.keys().filter(|it| !holder.contains_key(it)).count(),
        allocations: existing.len(),
        holder,
        withheld: &inputs.withheld,
        ledger: Ledger::new(inputs, &inputs.addresses),
    };
    let mut oldest_first: Vec<&Allocation> = inputs.allocations.iter().collect();
    oldest_first.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
    oldest_first
        .into_iter()
        .map(|allocation| {
            let existing = existing.remove(&allocation.name).unwrap_or_default();
            (allocation.name.clone(), desk.serve(allocation, existing))
        })
        .collect()
}

/// Hands out addresses while a plan is made.
struct Desk<'a> {
    prefixes: &'a Prefixes<'a>,
    pools: BTreeMap<&'a str, Pool>,
    /// By prefix: no address before this place is free. Addresses are only ever taken while a plan is made.
    next: BTreeMap<&'a str, u128>,
    holder: BTreeMap<Egress, &'a AllocationName>,
    withheld: &'a BTreeMap<Egress, Option<String>>,
    /// How many addresses there are, and how many allocations that have some: nodes have room for so many only.
    addresses: usize,
    allocations: usize,
    /// How many addresses of each prefix each account has, with those taken while this plan is made.
    ledger: Ledger<'a>,
}

/// Which of its addresses of a family an allocation keeps when it asks for fewer: those in use first, of these the ones
/// of prefixes that it names, then the lowest.
fn by_use<'a>(
    allocation: &Allocation,
    family: Family,
    existing: &BTreeMap<Egress, &'a Address>,
) -> Vec<&'a Address> {
    let mut sorted: Vec<&Address> =
        existing.values().copied().filter(|it| it.address.family() == family).collect();
    sorted.sort_by_key(|it| (!it.is_held(), !allocation.prefixes.contains(&it.prefix), it.address));
    sorted
}

impl<'a> Desk<'a> {
    fn serve(&mut self, allocation: &'a Allocation, existing: BTreeMap<Egress, &'a Address>) -> Assignment {
        let named = |it: &&&Address| allocation.prefixes.contains(&it.prefix);
        let mut assignment = Assignment {
            accepted: self.accept(allocation, &existing),
            wanted: BTreeSet::new(),
            fresh: BTreeMap::new(),
            missing: None,
            foreign: existing.values().filter(|it| !named(it)).map(|it| it.address).collect(),
        };
        // What is told of an address that it has, or had, explains more than that one is missing.
        let own = existing.keys().chain(&allocation.listed).copied();
        let told = own.filter_map(|address| self.withheld.get(&address)?.as_ref()).next();
        let told = told.map(|message| Verdict::bad(reason::WITHHELD, message.clone()));
        if allocation.deleting {
            assignment.missing = told;
            return assignment;
        }
        match &allocation.request {
            AddressRequest::Count(_) => {
                for family in Family::ALL {
                    self.serve_count(allocation, family, &existing, &mut assignment);
                }
            }
            AddressRequest::Explicit(list) => {
                self.serve_explicit(allocation, list, &existing, &mut assignment)
            }
        }
        if assignment.missing.is_some() && !assignment.accepted.is_good() {
            assignment.missing = Some(assignment.accepted.clone());
        }
        assignment.missing = told.or(assignment.missing);
        assignment
    }

    /// Keeps existing addresses, then takes those that it had (their objects are lost), then the lowest free ones. An
    /// address that it had and that is withheld now is not replaced: its partners know that one.
    fn serve_count(
        &mut self,
        allocation: &'a Allocation,
        family: Family,
        existing: &BTreeMap<Egress, &'a Address>,
        assignment: &mut Assignment,
    ) {
        let count = allocation.count(family).unwrap_or(0) as usize;
        let kept = by_use(allocation, family, existing).into_iter().take(count).map(|it| it.address);
        let mut served = kept.len();
        assignment.wanted.extend(kept);
        let lost = allocation.listed.iter().filter(|it| it.family() == family);
        let lost = lost.filter(|it| !existing.contains_key(it)).copied();
        let (had, mut lost): (Vec<Egress>, Vec<Egress>) = lost.partition(|it| self.withheld.contains_key(it));
        lost.reverse();
        let had = had.len();
        while served < count {
            let told = format!("{}: {served} of {count} addresses allocated", family.field());
            if served + had >= count {
                assignment.missing.get_or_insert(Verdict::bad(
                    reason::WITHHELD,
                    format!("{told}, the rest is given out as soon as no node sends from it any more"),
                ));
                return;
            }
            if let Some(full) = self.full(assignment.wanted.is_empty()) {
                assignment.missing.get_or_insert(Verdict::bad(reason::LIMIT, format!("{told}: {full}")));
                return;
            }
            let free = match assignment.accepted.is_good() {
                true => {
                    self.take_again(allocation, &mut lost).or_else(|| self.take_lowest(allocation, family))
                }
                false => None,
            };
            let Some((address, prefix)) = free else {
                if let Some(limit) = self.delegation_against(allocation, family) {
                    let limit = Verdict::bad(reason::DELEGATION_LIMIT, format!("{told}: {limit}"));
                    assignment.missing.get_or_insert(limit);
                    return;
                }
                assignment.missing.get_or_insert(Verdict::bad(
                    reason::NO_FREE_ADDRESS,
                    format!(
                        "{told}, no {} is free in {}; add a prefix to spec.prefixes, lower the count, or delete an allocation that is not used",
                        self.what(allocation, family),
                        quoted(&allocation.prefixes)
                    ),
                ));
                return;
            };
            self.took(allocation, assignment, address, prefix);
            served += 1;
        }
    }

    /// What the prefixes of an allocation have of a family.
    fn what(&self, allocation: &Allocation, family: Family) -> &'static str {
        let named = allocation.prefixes.iter().filter_map(|name| self.pools.get(name.as_str()));
        let kinds: BTreeSet<Kind> = named.map(|pool| pool.kind).filter(|it| it.family() == family).collect();
        match family {
            Family::V4 => "address",
            Family::V6 if !kinds.contains(&Kind::Single) => "/64",
            Family::V6 if !kinds.contains(&Kind::Network) => "single IPv6 address",
            Family::V6 => "/64, and no single IPv6 address,",
        }
    }

    /// Why no further address can be taken, if so. `first`: the allocation has none yet.
    fn full(&self, first: bool) -> Option<String> {
        let (count, what) = match () {
            () if self.addresses >= MAX_ADDRESSES => (MAX_ADDRESSES, "egress addresses"),
            () if first && self.allocations >= MAX_ALLOCATIONS => {
                (MAX_ALLOCATIONS, "allocations with addresses")
            }
            () => return None,
        };
        Some(format!(
            "the cluster has {count} {what}, and its nodes have room for no more; ask for fewer, or delete allocations that are not used"
        ))
    }

    /// Why no further address of a family can be taken from some prefix of the allocation, if so: because of a delegation.
    fn delegation_against(&self, allocation: &Allocation, family: Family) -> Option<String> {
        let of_family =
            |name: &&String| self.pools.get(name.as_str()).is_some_and(|it| it.kind.family() == family);
        let mut names = allocation.prefixes.iter().filter(of_family);
        names.find_map(|name| self.delegation_of(allocation, name))
    }

    /// The same of one prefix.
    fn delegation_of(&self, allocation: &Allocation, prefix: &str) -> Option<String> {
        self.ledger.against(self.prefixes.get(prefix)?.prefix, &allocation.name.account)
    }

    fn took(
        &mut self,
        allocation: &'a Allocation,
        assignment: &mut Assignment,
        address: Egress,
        prefix: &'a str,
    ) {
        self.ledger.take(prefix, &allocation.name.account);
        self.addresses += 1;
        self.allocations += usize::from(assignment.wanted.is_empty());
        assignment.wanted.insert(address);
        assignment.fresh.insert(address, prefix.to_owned());
    }

    /// Keeps and takes exactly what is listed.
    fn serve_explicit(
        &mut self,
        allocation: &'a Allocation,
        list: &[Egress],
        existing: &BTreeMap<Egress, &'a Address>,
        assignment: &mut Assignment,
    ) {
        assignment.wanted = list.iter().filter(|it| existing.contains_key(it)).copied().collect();
        for (index, address) in list.iter().enumerate().filter(|(_, it)| !existing.contains_key(it)) {
            let field = format!("spec.addresses.explicit[{index}]: {address}");
            if let Some(told) = self.withheld_with(*address) {
                let message = told.clone().unwrap_or_else(|| {
                    format!("{field} is given out as soon as no node sends from it any more")
                });
                assignment.missing.get_or_insert(Verdict::bad(reason::WITHHELD, message));
                continue;
            }
            let full = self.full(assignment.wanted.is_empty());
            match self.holder_of(*address) {
                Some((held, holder)) if held == *address && *holder == allocation.name => {} // listed twice
                Some((held, holder)) => {
                    // Which other accounts there are, and what they have, is nobody else's business.
                    let whose = match holder.account == allocation.name.account {
                        true => format!("belongs to EgressAllocation {}/{}", holder.account, holder.name),
                        false => "is in use by another account".to_owned(),
                    };
                    let with = match held == *address {
                        true => String::new(),
                        false => format!(" has addresses in common with {held}, which"),
                    };
                    let message = format!(
                        "{field}{with} {whose}; choose another address, or wait until that has given it back"
                    );
                    assignment.missing.get_or_insert(Verdict::bad(reason::NO_FREE_ADDRESS, message));
                }
                None => match self.prefix_of(allocation, *address) {
                    Some(prefix) if assignment.accepted.is_good() => {
                        let limit = full.map(|full| (reason::LIMIT, full)).or_else(|| {
                            Some((reason::DELEGATION_LIMIT, self.delegation_of(allocation, prefix)?))
                        });
                        if let Some((reason, limit)) = limit {
                            let limit = Verdict::bad(reason, format!("{field}: {limit}"));
                            assignment.missing.get_or_insert(limit);
                            continue;
                        }
                        self.holder.insert(*address, &allocation.name);
                        self.took(allocation, assignment, *address, prefix);
                    }
                    _ => assignment.missing = Some(assignment.accepted.clone()),
                },
            }
        }
    }

    /// Takes the next one of addresses that the allocation had, if it is free.
    fn take_again(
        &mut self,
        allocation: &'a Allocation,
        lost: &mut Vec<Egress>,
    ) -> Option<(Egress, &'a str)> {
        while let Some(address) = lost.pop() {
            if let Some(prefix) = self.prefix_of(allocation, address)
                && self.holder_of(address).is_none()
                && self.withheld_with(address).is_none()
                && self.delegation_of(allocation, prefix).is_none()
            {
                self.holder.insert(address, &allocation.name);
                return Some((address, prefix));
            }
        }
        None
    }

    /// Takes the lowest free address of the first prefix of the family that has one.
    fn take_lowest(&mut self, allocation: &'a Allocation, family: Family) -> Option<(Egress, &'a str)> {
        for name in &allocation.prefixes {
            let Some(pool) = self.pools.get(name.as_str()).filter(|it| it.kind.family() == family) else {
                continue;
            };
            if self.delegation_of(allocation, name).is_some() {
                continue;
            }
            let from = self.next.get(name.as_str()).copied().unwrap_or(0);
            // Without a free address nothing below the very last one is free.
            let free =
                pool.lowest_free(from, |it| self.holder_of(it).is_some() || self.withheld_with(it).is_some());
            self.next.insert(name, free.map_or(u128::MAX, Egress::place));
            if let Some(address) = free {
                self.holder.insert(address, &allocation.name);
                return Some((address, name));
            }
        }
        None
    }

    /// Who has an address, or one that overlaps it. Prefixes do not overlap, but addresses of one that went may have stayed.
    fn holder_of(&self, address: Egress) -> Option<(Egress, &'a AllocationName)> {
        let ranges = address.overlapping().into_iter();
        ranges.flat_map(|range| self.holder.range(range)).next().map(|(held, holder)| (*held, *holder))
    }

    /// What is told of an address that nobody gets, since it is withheld, or one that overlaps it.
    fn withheld_with(&self, address: Egress) -> Option<&'a Option<String>> {
        let withheld = self.withheld;
        address.overlapping().into_iter().flat_map(|range| withheld.range(range)).next().map(|(_, told)| told)
    }

    /// Name of the allocation's first prefix in which the address can be allocated.
    fn prefix_of(&self, allocation: &'a Allocation, address: Egress) -> Option<&'a str> {
        let usable = |name: &str| {
            self.pools.get(name).is_some_and(|pool| pool.contains(address) && !pool.is_reserved(address))
        };
        allocation.prefixes.iter().map(String::as_str).find(|name| usable(name))
    }

    /// Names the first thing that is wrong. Addresses that the allocation has already are not questioned.
    fn accept(&self, allocation: &Allocation, existing: &BTreeMap<Egress, &Address>) -> Verdict {
        let refused = self.refuse_prefixes(allocation).or_else(|| self.refuse_explicit(allocation, existing));
        let Some((reason, mut message)) = refused else {
            return Verdict::good(
                reason::ACCEPTED,
                format!("takes addresses from {}", quoted(&allocation.prefixes)),
            );
        };
        if !existing.is_empty() {
            message += " (the addresses that are allocated already stay in use)";
        }
        Verdict::Bad { reason, message }
    }

    fn refuse_prefixes(&self, allocation: &Allocation) -> Option<(&'static str, String)> {
        if allocation.prefixes.is_empty() {
            return Some((reason::INVALID, "spec.prefixes: names no AegisPrefix; name at least one".into()));
        }
        allocation.prefixes.iter().enumerate().find_map(|(index, name)| {
            let field = format!("spec.prefixes[{index}]: AegisPrefix {name:?}");
            let Some(judged) = self.prefixes.get(name) else {
                return Some((
                    reason::NOT_FOUND,
                    format!("{field} does not exist; create it or name another"),
                ));
            };
            let account = &allocation.name.account;
            if self.ledger.right(judged.prefix, account) == Right::Nothing {
                // Says nothing about the owner: which accounts exist is nobody else's business.
                let (reason, what) = match self.ledger.used(name, account) {
                    0 => (reason::NOT_PERMITTED, "is another account's, and not delegated to"),
                    _ => (reason::DELEGATION_WITHDRAWN, "is not delegated any more to"),
                };
                return Some((
                    reason,
                    format!("{field} {what} {account:?}; name another, or have its owner delegate it"),
                ));
            }
            if judged.accepted.is_good() {
                return None;
            }
            let message = if judged.prefix.deleting {
                format!("{field} is being deleted; name another")
            } else {
                // Its own condition says which prefix it overlaps; that one may be of another account.
                format!("{field} is not accepted, as its conditions explain; repair it or name another")
            };
            Some((judged.accepted.reason(), message))
        })
    }

    /// The /64 of a single address and the first prefix of the allocation that has it.
    fn whole(&self, allocation: &'a Allocation, address: Egress) -> Option<(&'a str, Egress)> {
        let Egress::Single(single) = address else { return None };
        let whole = Egress::containing(single.into());
        let has = |name: &&String| self.pools.get(name.as_str()).is_some_and(|pool| pool.contains(whole));
        allocation.prefixes.iter().find(has).map(|name| (name.as_str(), whole))
    }

    fn refuse_explicit(
        &self,
        allocation: &Allocation,
        existing: &BTreeMap<Egress, &Address>,
    ) -> Option<(&'static str, String)> {
        let AddressRequest::Explicit(list) = &allocation.request else { return None };
        list.iter().enumerate().filter(|(_, address)| !existing.contains_key(address)).find_map(|(index, address)| {
            let field = format!("spec.addresses.explicit[{index}]: {address}");
            let containing = |name: &&String| self.pools.get(name.as_str()).is_some_and(|pool| pool.contains(*address));
            match allocation.prefixes.iter().find(containing) {
                None if let Some((name, whole)) = self.whole(allocation, *address) => Some((
                    reason::INVALID,
                    format!("{field} is a part of {whole}, and AegisPrefix {name:?} has whole /64s; choose {whole}, or have a prefix of {address}/128"),
                )),
                None => Some((
                    reason::INVALID,
                    format!("{field} is not in {}; choose an address of these prefixes", quoted(&allocation.prefixes)),
                )),
                Some(name) if self.prefix_of(allocation, *address).is_none() => Some((
                    reason::INVALID,
                    format!("{field} is reserved in AegisPrefix {name:?} (spec.reserved, or a node's own address); choose another address"),
                )),
                Some(_) => None,
            }
        })
    }
}

/// `AegisPrefix "a", "b"`.
fn quoted(prefixes: &[String]) -> String {
    let names: Vec<String> = prefixes.iter().map(|name| format!("{name:?}")).collect();
    format!("AegisPrefix {}", names.join(", "))
}
