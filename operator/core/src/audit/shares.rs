//! The slices of one address, counted: no site gets more than its quota, and what is taken from a node is more than it
//! needs, or more than its fair share while others lack some.

use super::{Unfit, Violation, World};
use crate::fence;
use crate::model::{Address, Allocation, Node, State};
use crate::site::quotas;
use std::collections::BTreeMap;

/// What one node of a site has of the address, of the slices that it may keep.
#[derive(Default)]
struct Count {
    site: usize,
    /// Slices held.
    before: u32,
    after: u32,
    draining: u32,
    /// A slice that the node gets new, or back.
    granted: Option<u8>,
    regained: Option<u8>,
    /// A slice that begins to drain though the node might keep it.
    taken: Option<u8>,
}

/// Checks the step from `before` to `after` of an address from which the allocation is served.
pub(super) fn check(
    world: &World,
    before: Option<&Address>,
    after: &Address,
    allocation: &Allocation,
) -> Vec<Violation> {
    if before == Some(after) {
        return Vec::new();
    }
    let Some(sites) = world.sites(allocation) else { return Vec::new() };
    let counts = count(sites, before, after, allocation);
    let quotas = quotas(&allocation.sites, allocation.slices);
    let address = after.address;
    let mut violations = Vec::new();
    for (node, count) in &counts {
        let site = || counts.values().filter(|other| other.site == count.site);
        let held: u32 = site().map(|it| it.after).sum();
        let draining: u32 = site().map(|it| it.draining).sum();
        let quota = quotas[count.site];
        let beyond = |new: bool| held + if new { draining } else { 0 } > quota;
        let granted = count.granted.filter(|_| beyond(true)).or(count.regained.filter(|_| beyond(false)));
        violations.extend(granted.map(|slice| Violation::Granted {
            address,
            slice,
            node: (*node).to_owned(),
            why: Unfit::Quota,
        }));
        let most = allocation.per_node_max.max(allocation.per_node_min);
        let granted = count.granted.or(count.regained).filter(|_| count.after > most);
        violations.extend(granted.map(|slice| Violation::Granted {
            address,
            slice,
            node: (*node).to_owned(),
            why: Unfit::Maximum,
        }));
        let Some(slice) = count.taken else { continue };
        violations.extend(
            Taking { world, sites, allocation, counts: &counts, quota, after, slice }.check(node, count),
        );
    }
    violations
}

fn count<'a>(
    sites: &BTreeMap<&str, usize>,
    before: Option<&'a Address>,
    after: &'a Address,
    allocation: &Allocation,
) -> BTreeMap<&'a str, Count> {
    let was = before.map(super::slices::by_slice).unwrap_or_default();
    let will = super::slices::by_slice(after);
    let mut counts: BTreeMap<&str, Count> = BTreeMap::new();
    for slice in allocation.slices.iter() {
        let (was, will) = (was.get(&slice), will.get(&slice));
        let mut at = |node: &'a str, note: &dyn Fn(&mut Count)| {
            if let Some(site) = sites.get(node) {
                note(counts.entry(node).or_insert_with(|| Count { site: *site, ..Count::default() }));
            }
        };
        if let Some(was) = was.filter(|was| was.state == State::Held) {
            at(&was.node, &|count| count.before += 1);
        }
        let Some(will) = will else { continue };
        let former = was.filter(|was| was.node == will.node).map(|was| was.state);
        match (former, will.state) {
            (Some(State::Held), State::Held) => at(&will.node, &|count| count.after += 1),
            (Some(State::Draining), State::Held) => at(&will.node, &|count| {
                (count.after, count.regained) = (count.after + 1, Some(slice));
            }),
            (_, State::Held) => at(&will.node, &|count| {
                (count.after, count.granted) = (count.after + 1, Some(slice));
            }),
            (Some(State::Held), State::Draining) => at(&will.node, &|count| {
                (count.draining, count.taken) = (count.draining + 1, Some(slice));
            }),
            (_, State::Draining) => at(&will.node, &|count| count.draining += 1),
            (_, State::Quarantined { .. }) => {}
        }
    }
    counts
}

/// A slice that a node might keep, and is to give back.
struct Taking<'a> {
    world: &'a World<'a>,
    sites: &'a BTreeMap<&'a str, usize>,
    allocation: &'a Allocation,
    counts: &'a BTreeMap<&'a str, Count>,
    /// Of the node's site.
    quota: u32,
    after: &'a Address,
    slice: u8,
}

impl Taking<'_> {
    fn check(&self, name: &str, count: &Count) -> Option<Violation> {
        let (address, slice, min) = (self.after.address, self.slice, self.allocation.per_node_min);
        let node = || name.to_owned();
        let unfounded = Some(Violation::NoReason { address, slice, node: node() });
        let Some(own) = self.world.nodes.get(name).filter(|node| self.takes(node)) else { return unfounded };
        if count.after >= min.max(self.demand(own)) {
            return None;
        }
        // It is wanted, so somebody else must lack some.
        if self.wanted(count.site) <= self.quota {
            return unfounded;
        }
        let others = || self.counts.iter().filter(|(_, other)| other.site == count.site);
        let takes = |name: &str| self.world.nodes.get(name).is_some_and(|node| self.takes(node));
        let minima: u32 =
            others().map(|(name, it)| if takes(name) { it.before.min(min) } else { it.before }).sum();
        if count.after < count.before.min(min) && minima <= self.quota {
            return Some(Violation::Minimum { address, slice, node: node() });
        }
        let richer = others().find(|(name, it)| takes(name) && it.after > min.max(count.after + 1));
        richer.map(|(other, _)| Violation::Unfair {
            address,
            slice,
            node: node(),
            other: (*other).to_owned(),
        })
    }

    /// Whether slices may be given to the node, and taken from it for others.
    fn takes(&self, node: &Node) -> bool {
        node.ready && fence::admits(self.after.fence, node)
    }

    fn demand(&self, node: &Node) -> u32 {
        node.demand.get(&self.allocation.name).copied().unwrap_or(0)
    }

    /// Slices that the site's nodes want together.
    fn wanted(&self, site: usize) -> u32 {
        let nodes = self.sites.iter().filter(|(_, of)| **of == site);
        let wanted = nodes.filter_map(|(name, _)| {
            let node = self.world.nodes.get(name)?;
            let before = self.counts.get(name).map_or(0, |count| count.before);
            Some(match self.takes(node) {
                true => {
                    let most = self.allocation.per_node_max.max(before);
                    self.demand(node).min(most).max(self.allocation.per_node_min)
                }
                false => before,
            })
        });
        wanted.sum()
    }
}
