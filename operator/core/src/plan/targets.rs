//! How many slices of an address each node is to hold.
//!
//! A site's quota is filled in this order: what nodes hold that are not ready; the minimum of those that hold it, of
//! those that can have it back, and of the others; then whatever nodes want beyond it. Where the quota does not reach
//! for all that is wanted, nobody gets more than a level that is the same for all (max-min fairness). Who holds more than
//! this gives gives the rest back; who wants less gets what it wants. Since only numbers count, and ties go to those
//! that hold the slices already, a plan that follows from the result of another asks for nothing else.

use super::members::{Has, Members, Standing};
use crate::model::Allocation;
use crate::slice::SliceSet;
use std::cmp::{Ordering, Reverse};
use std::collections::BTreeMap;

/// Slices of an address; more cannot be wanted.
const ALL: u32 = 256;

/// What the members of an allocation want of each address.
pub(super) struct Wants<'w, 'a> {
    pub allocation: &'w Allocation,
    pub members: &'w Members<'a>,
    /// By site.
    pub quotas: &'w [u32],
    /// Slices asked for by members that ask for more than the minimum, by site and place.
    demand: Vec<BTreeMap<usize, u32>>,
}

impl<'w, 'a> Wants<'w, 'a> {
    pub fn new(
        allocation: &'w Allocation,
        members: &'w Members<'a>,
        quotas: &'w [u32],
        demands: &[(&str, u32)],
    ) -> Wants<'w, 'a> {
        let mut demand = vec![BTreeMap::new(); quotas.len()];
        for (node, slices) in demands.iter().filter(|(_, slices)| *slices > allocation.per_node_min) {
            if let Some(place) = members.place(node) {
                demand[members.site(place)].insert(place, *slices);
            }
        }
        Wants { allocation, members, quotas, demand }
    }

    /// How many slices of an address each member is to hold, by place. `had` is what
    /// they have of it, `total` how many each holds of all addresses: where one address has not enough for all, the
    /// next one serves those that went without. `takes`: slices of this address may be given to the node, and taken from it.
    pub fn targets(&self, had: &Standing, total: &[u32], takes: impl Fn(usize) -> bool) -> Vec<u32> {
        let (min, members) = (self.allocation.per_node_min, self.members);
        let mut filling =
            Filling { members, room: self.quotas.to_vec(), targets: vec![0; members.all.len()] };
        // Nothing is taken from a node that does not report.
        for (place, has) in had.iter().filter(|(place, _)| !takes(*place)) {
            filling.keep(place, has.held.len());
        }
        let ready = had.iter().filter(|(place, _)| takes(*place));
        let mut ready: Vec<(Reverse<u32>, usize)> =
            ready.map(|(place, has)| (Reverse(has.held.len().min(min)), place)).collect();
        ready.sort_unstable();
        for (Reverse(held), place) in ready {
            filling.raise(place, held);
        }
        for (place, has) in had.iter().filter(|(_, has)| !has.draining.is_empty()) {
            filling.raise(place, (has.held.len() + has.draining.len()).min(min));
        }
        if filling.room.iter().any(|room| *room > 0) {
            let mut lacking: Vec<usize> =
                members.ready.iter().copied().filter(|it| filling.lacks(*it, min) && takes(*it)).collect();
            lacking.sort_by_key(|place| (total[*place], *place));
            for place in lacking {
                filling.raise(place, min);
            }
        }
        for (site, demand) in self.demand.iter().enumerate().filter(|(_, demand)| !demand.is_empty()) {
            let demand = demand.iter().filter(|(place, _)| takes(**place)).map(|(place, it)| (*place, *it));
            self.share_rest(demand, had, filling.room[site], &mut filling);
        }
        filling.targets
    }

    /// Shares what is left of a site's quota once everybody has the minimum.
    fn share_rest(
        &self,
        demand: impl Iterator<Item = (usize, u32)>,
        had: &Standing,
        room: u32,
        filling: &mut Filling,
    ) {
        if room == 0 {
            return;
        }
        let min = self.allocation.per_node_min;
        let wanted: Vec<(usize, u32)> = demand
            .map(|(place, demand)| {
                // A maximum takes nothing away.
                let most = self.allocation.per_node_max.max(had.holds(place)).min(ALL);
                (place, demand.min(most).saturating_sub(min))
            })
            .collect();
        let above = |level: u32| wanted.iter().map(|(_, wanted)| *wanted.min(&level)).sum::<u32>();
        let level = highest(|level| above(level) <= room);
        let left = room - above(level);
        // A slice more than the level goes to those that have it, can have it back, come first by name.
        let mut first: Vec<usize> =
            wanted.iter().filter(|(_, wanted)| *wanted > level).map(|(place, _)| *place).collect();
        first.sort_by_key(|place| {
            let Has { held, draining } = had.get(*place);
            (held.len() <= min + level, held.len() + draining.len() <= min + level, *place)
        });
        first.truncate(left as usize);
        let more = |place: &usize| u32::from(first.contains(place));
        for (place, wanted) in &wanted {
            filling.raise(*place, min + (*wanted).min(level + more(place)));
        }
    }
}

/// The highest level of those up to [`ALL`] that fits; none fits above one that does not.
fn highest(fits: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut high) = (0, ALL + 1);
    while low + 1 < high {
        let middle = u32::midpoint(low, high);
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}

/// Targets while they are made up.
struct Filling<'w, 'a> {
    members: &'w Members<'a>,
    /// What is left of each site's quota.
    room: Vec<u32>,
    targets: Vec<u32>,
}

impl Filling<'_, '_> {
    /// Whatever the quota is.
    fn keep(&mut self, place: usize, count: u32) {
        let room = &mut self.room[self.members.site(place)];
        *room = room.saturating_sub(count);
        self.targets[place] = count;
    }

    /// Up to `count`, as far as the quota goes.
    fn raise(&mut self, place: usize, count: u32) {
        let room = &mut self.room[self.members.site(place)];
        let target = &mut self.targets[place];
        let more = count.saturating_sub(*target).min(*room);
        *room -= more;
        *target += more;
    }

    fn lacks(&self, place: usize, count: u32) -> bool {
        self.room[self.members.site(place)] > 0 && self.targets[place] < count
    }
}

/// Slices that stay with their nodes, or become theirs again, on the way to the targets.
pub(super) fn staying(had: &Standing, targets: &[u32]) -> SliceSet {
    let mut staying = SliceSet::EMPTY;
    for (place, Has { held, draining }) in had.iter() {
        let (target, holds) = (targets[place], held.len());
        let own = match target.cmp(&holds) {
            Ordering::Less => without(held, holds - target),
            Ordering::Equal => held,
            Ordering::Greater => held.union(draining.iter().take((target - holds) as usize).collect()),
        };
        staying = staying.union(own);
    }
    staying
}

/// The slices but `count` of them: the shortest runs go first, and of a run its end, where it grew last. What is left
/// is whole, and so is the gap.
fn without(mut slices: SliceSet, mut count: u32) -> SliceSet {
    let mut runs = slices.runs();
    runs.sort_by_key(|(first, last)| (last - first, Reverse(*first)));
    for slice in runs.into_iter().flat_map(|(first, last)| (first..=last).rev()) {
        if count == 0 {
            break;
        }
        count -= u32::from(slices.remove(slice));
    }
    slices
}
