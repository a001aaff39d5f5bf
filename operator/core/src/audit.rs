//! Checks a plan against what stood before, apart from the planner's code: what it finds is a mistake of the
//! planner, or objects that a stranger wrote, and in both cases the plan must not be applied.

mod addresses;
mod shares;
mod slices;
mod violation;

use crate::egress::{Egress, Kind};
use crate::model::{Address, AddressRequest, Allocation, AllocationName, Inputs, Node, State};
use crate::plan::Plan;
use crate::selector::{Labels, serves};
use std::collections::{BTreeMap, BTreeSet};
pub use violation::{Unfit, Violation};

/// Checks every step from `inputs.addresses` to the plan.
///
/// # Errors
/// All violations found, sorted by address.
pub fn audit(inputs: &Inputs, plan: &Plan) -> Result<(), Vec<Violation>> {
    let world = World::new(inputs, plan);
    let mut violations = addresses::check(&world, plan);
    for after in &plan.addresses {
        violations.extend(slices::check(&world, world.before.get(&after.address).copied(), after));
    }
    violations.extend(check_outcomes(&world, plan));
    if violations.is_empty() { Ok(()) } else { Err(violations) }
}

/// The inputs, by name.
struct World<'a> {
    inputs: &'a Inputs,
    nodes: BTreeMap<&'a str, &'a Node>,
    allocations: BTreeMap<&'a AllocationName, &'a Allocation>,
    /// The same as they are for /64s, of those that have one.
    of_networks: BTreeMap<&'a AllocationName, Allocation>,
    before: BTreeMap<Egress, &'a Address>,
    /// Addresses of each allocation, ascending, before and after.
    had: BTreeMap<&'a AllocationName, Vec<Egress>>,
    has: BTreeMap<&'a AllocationName, Vec<Egress>>,
    /// Which nodes belong to which site, by the selectors of the sites, which most allocations have in common.
    sites: BTreeMap<Vec<&'a Labels>, BTreeMap<&'a str, usize>>,
}

impl<'a> World<'a> {
    fn new(inputs: &'a Inputs, plan: &'a Plan) -> World<'a> {
        let before: BTreeMap<Egress, &Address> =
            inputs.addresses.iter().map(|address| (address.address, address)).collect();
        let changed = plan.addresses.iter().filter(|it| before.get(&it.address) != Some(it));
        World {
            inputs,
            nodes: inputs.nodes.iter().map(|node| (node.name.as_str(), node)).collect(),
            allocations: inputs.allocations.iter().map(|allocation| (&allocation.name, allocation)).collect(),
            of_networks: of_networks(inputs, plan),
            sites: sites(inputs, &changed.map(|it| &it.allocation).collect()),
            before,
            had: by_allocation(&inputs.addresses),
            has: by_allocation(&plan.addresses),
        }
    }

    /// The site of each node that is in one of the allocation's, as its place among their names.
    fn sites<'s>(&'s self, allocation: &'s Allocation) -> Option<&'s BTreeMap<&'s str, usize>> {
        self.sites.get(&selectors(allocation))
    }

    /// Addresses that the allocation would have.
    fn has(&self, allocation: &AllocationName) -> &[Egress] {
        self.has.get(allocation).map_or(&[], Vec::as_slice)
    }

    /// The allocation, if it is to serve from this address: it is not being deleted, and the address is listed or,
    /// where a number is asked for, among the first that it had: in use, of a prefix that it names, and low.
    fn serving(&self, address: &Address) -> Option<&Allocation> {
        let family = address.address.family();
        let allocation = match address.address.has_ports() {
            true => self.allocations.get(&address.allocation).copied(),
            false => self.of_networks.get(&address.allocation),
        };
        let allocation = allocation.filter(|allocation| !allocation.deleting)?;
        let had = self.had.get(&allocation.name).map_or(&[] as &[_], Vec::as_slice);
        let rank = |it: &Address| (!it.is_held(), !allocation.prefixes.contains(&it.prefix), it.address);
        let first = |it: &Address| {
            let before = had.iter().filter(|other| other.family() == family);
            let before = before.filter_map(|other| self.before.get(other));
            before.filter(|other| rank(other) < rank(it)).count()
        };
        let wanted = match (&allocation.request, allocation.count(family)) {
            (AddressRequest::Explicit(list), _) => list.contains(&address.address),
            (_, count) => {
                let count = count.unwrap_or(0) as usize;
                self.before.get(&address.address).is_some_and(|it| first(it) < count)
            }
        };
        // A new address is counted by `addresses::check`: it need not be the highest one.
        (wanted || !self.before.contains_key(&address.address)).then_some(allocation)
    }
}

fn selectors(allocation: &Allocation) -> Vec<&Labels> {
    allocation.sites.values().map(|site| &site.selector).collect()
}

fn of_networks<'a>(inputs: &'a Inputs, plan: &Plan) -> BTreeMap<&'a AllocationName, Allocation> {
    let addresses = inputs.addresses.iter().chain(&plan.addresses);
    let with: BTreeSet<&AllocationName> =
        addresses.filter(|it| !it.address.has_ports()).map(|address| &address.allocation).collect();
    let with = inputs.allocations.iter().filter(|it| with.contains(&it.name));
    with.map(|it| (&it.name, it.of(Kind::Network).into_owned())).collect()
}

/// Only of allocations of which an address changes: it takes longer than all the rest.
fn sites<'a>(
    inputs: &'a Inputs,
    changed: &BTreeSet<&AllocationName>,
) -> BTreeMap<Vec<&'a Labels>, BTreeMap<&'a str, usize>> {
    let mut known: BTreeMap<Vec<&Labels>, BTreeMap<&str, usize>> = BTreeMap::new();
    for allocation in inputs.allocations.iter().filter(|it| changed.contains(&it.name)) {
        known.entry(selectors(allocation)).or_insert_with(|| {
            let site = |node: &'_ Node| serves(&allocation.sites, node);
            inputs.nodes.iter().filter_map(|node| Some((node.name.as_str(), site(node)?))).collect()
        });
    }
    known
}

fn by_allocation(addresses: &[Address]) -> BTreeMap<&AllocationName, Vec<Egress>> {
    let mut grouped: BTreeMap<&AllocationName, Vec<Egress>> = BTreeMap::new();
    for address in addresses {
        grouped.entry(&address.allocation).or_default().push(address.address);
    }
    for addresses in grouped.values_mut() {
        addresses.sort_unstable();
    }
    grouped
}

/// What people and finalizers are told must be true of the plan.
fn check_outcomes(world: &World, plan: &Plan) -> Vec<Violation> {
    let mut violations = Vec::new();
    for allocation in &world.inputs.allocations {
        let name = &allocation.name;
        if !plan.allocations.contains_key(name) {
            violations.push(Violation::Untold { allocation: name.clone() });
        }
    }
    for prefix in &world.inputs.prefixes {
        let all = plan.addresses.iter().chain(&world.inputs.frozen);
        let used = all.filter(|address| address.prefix == prefix.name).count();
        if plan.prefixes.get(&prefix.name).is_none_or(|outcome| outcome.used as usize != used) {
            violations.push(Violation::PrefixUse { prefix: prefix.name.clone() });
        }
    }
    let quarantines =
        plan.addresses.iter().flat_map(|address| &address.holdings).filter_map(|it| match it.state {
            State::Quarantined { until } => Some(until),
            State::Held | State::Draining => None,
        });
    if quarantines.min() != plan.wake {
        violations.push(Violation::Wake);
    }
    violations
}
