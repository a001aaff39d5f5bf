//! The slices of one address: one owner each, and no step of their life left out.

use super::{Unfit, Violation, World, shares};
use crate::fence;
use crate::model::{Address, Allocation, Fence, Holding, State};
use crate::selector::matches_sites;
use crate::slice::FIRST;
use std::collections::{BTreeMap, BTreeSet};

/// Most holdings that an `EgressAddress` may have.
const MAX_HOLDINGS: usize = 252;

pub(super) fn check(world: &World, before: Option<&Address>, after: &Address) -> Vec<Violation> {
    let mut violations = check_list(after);
    violations.extend(check_address_epoch(before, after));
    violations.extend(check_fence(world, before, after));
    let was: BTreeMap<u8, &Holding> = before.map(by_slice).unwrap_or_default();
    let will: BTreeMap<u8, &Holding> = by_slice(after);
    let serving = world.serving(after);
    for slice in was.keys().chain(will.keys()).collect::<BTreeSet<_>>() {
        let (was, will) = (was.get(slice).copied(), will.get(slice).copied());
        violations.extend(Step { world, after, serving, slice: *slice }.check(was, will));
    }
    violations.extend(serving.iter().flat_map(|it| shares::check(world, before, after, it)));
    violations
}

/// The list by itself: sorted, disjoint, merged, of usable slices.
fn check_list(after: &Address) -> Vec<Violation> {
    let address = after.address;
    let mut violations = Vec::new();
    if after.holdings.len() > MAX_HOLDINGS {
        violations.push(Violation::TooManyHoldings { address, count: after.holdings.len() });
    }
    let mut owned = BTreeSet::new();
    for Holding { first, last, .. } in &after.holdings {
        if first > last || *first < FIRST {
            violations.push(Violation::NotSlices { address, first: *first, last: *last });
        }
        let twice = (*first..=*last).find(|slice| !owned.insert(*slice));
        violations.extend(twice.map(|slice| Violation::TwoOwners { address, slice }));
    }
    for (low, high) in after.holdings.iter().zip(after.holdings.iter().skip(1)) {
        let slice = high.first;
        if low.first > high.first {
            violations.push(Violation::NotSorted { address, slice });
        }
        let same = (&low.node, low.epoch, low.state) == (&high.node, high.epoch, high.state);
        if same && u32::from(low.last) + 1 == u32::from(high.first) {
            violations.push(Violation::NotMerged { address, slice });
        }
    }
    violations
}

/// Grows with every change, never goes back.
fn check_address_epoch(before: Option<&Address>, after: &Address) -> Option<Violation> {
    let stays = |it: &Address| (&it.holdings, it.fence) == (&after.holdings, after.fence);
    let changed = !before.is_some_and(stays);
    let before = before.map_or(0, |before| before.epoch);
    let right = if changed { after.epoch > before } else { after.epoch == before };
    (!right).then_some(Violation::AddressEpoch {
        address: after.address,
        before,
        after: after.epoch,
        changed,
    })
}

/// The fence is that of the allocation, and a new one has this very epoch. That of an allocation which is gone or going
/// stays, and so does that of a withheld address.
fn check_fence(world: &World, before: Option<&Address>, after: &Address) -> Option<Violation> {
    let stood = before.and_then(|before| before.fence);
    let withheld = world.inputs.withheld.contains_key(&after.address);
    let allocation = world.allocations.get(&after.allocation).filter(|it| !it.deleting && !withheld);
    let expected = match allocation.map(|it| it.fence) {
        Some(wanted) if stood.map(|fence| fence.after) != wanted => {
            wanted.map(|wanted| Fence { after: wanted, epoch: after.epoch })
        }
        _ => stood,
    };
    (after.fence != expected).then_some(Violation::Fence { address: after.address })
}

pub(super) fn by_slice(address: &Address) -> BTreeMap<u8, &Holding> {
    let slices = |holding: &Holding| holding.first..=holding.last;
    address.holdings.iter().flat_map(|holding| slices(holding).map(move |slice| (slice, holding))).collect()
}

/// One slice from before to after.
struct Step<'a> {
    world: &'a World<'a>,
    after: &'a Address,
    /// The allocation, if it is to serve from the address.
    serving: Option<&'a Allocation>,
    slice: u8,
}

impl Step<'_> {
    fn check(&self, was: Option<&Holding>, will: Option<&Holding>) -> Vec<Violation> {
        let (address, slice) = (self.after.address, self.slice);
        let mut violations: Vec<Violation> = self.check_life(was, will).into_iter().collect();
        if let Some(will) = will {
            let kept = was.filter(|was| (&was.node, was.state) == (&will.node, will.state));
            let expected = kept.map_or(self.after.epoch, |was| was.epoch);
            if will.epoch != expected {
                violations.push(Violation::SliceEpoch { address, slice, epoch: will.epoch, expected });
            }
        }
        violations
    }

    /// Free -> Held -> Draining -> Quarantined -> Free, back from Draining to Held, and from both to Quarantined
    /// when the node is gone.
    fn check_life(&self, was: Option<&Holding>, will: Option<&Holding>) -> Option<Violation> {
        let (address, slice) = (self.after.address, self.slice);
        let inputs = self.world.inputs;
        let now = inputs.now;
        // What has rested long enough is free.
        let rests = |until| inputs.rests(address, slice, until);
        let was = was.filter(|was| {
            !matches!(was.state, State::Quarantined { until } if !rests(until)) || will == Some(was)
        });
        let (was, will) = match (was, will) {
            (None, None) => return None,
            (None, Some(will)) if will.state == State::Held => return self.check_grant(will, true),
            (None, Some(_)) => return Some(Violation::FromNowhere { address, slice }),
            (Some(was), None) => {
                return Some(match was.state {
                    State::Quarantined { .. } => Violation::Quarantine { address, slice },
                    State::Held | State::Draining => self.not_drained(was),
                });
            }
            (Some(was), Some(will)) => (was, will),
        };
        if was.node != will.node {
            let (from, to) = (was.node.clone(), will.node.clone());
            return Some(Violation::Moved { address, slice, from, to });
        }
        match (was.state, will.state) {
            (State::Held, State::Held) | (State::Draining, State::Draining) => None,
            (State::Draining, State::Held) => self.check_grant(will, false),
            // Why it is taken from a node that might keep it is looked at in `shares`.
            (State::Held, State::Draining) => None,
            (State::Held | State::Draining, State::Quarantined { until }) => {
                if !self.is_empty(was) {
                    Some(self.not_drained(was))
                } else {
                    (until < now + inputs.quarantine).then_some(Violation::Quarantine { address, slice })
                }
            }
            (State::Quarantined { until: was }, State::Quarantined { until: will }) => {
                (will < was).then_some(Violation::Quarantine { address, slice })
            }
            (State::Quarantined { .. }, State::Held | State::Draining) => {
                Some(Violation::Quarantine { address, slice })
            }
        }
    }

    /// Nobody sends from the slice any more: the node is gone, has reported so since it began to drain, or its deadline
    /// has passed.
    fn is_empty(&self, was: &Holding) -> bool {
        let Some(node) = self.world.nodes.get(was.node.as_str()) else { return true };
        if self.world.before.get(&self.after.address).is_some_and(|it| fence::has_passed(it, node)) {
            return true;
        }
        let report = node.programmed.get(&self.after.address).filter(|report| report.epoch >= was.epoch);
        was.state == State::Draining && report.is_some_and(|report| report.drained.contains(self.slice))
    }

    /// Why the node must not hold the slice, if so.
    fn unfit(&self, node: &str) -> Option<Unfit> {
        let Some(allocation) = self.serving else { return Some(Unfit::Address) };
        match self.world.nodes.get(node) {
            _ if !allocation.slices.contains(self.slice) => Some(Unfit::Slice),
            None => Some(Unfit::NoNode),
            Some(node) if !matches_sites(allocation, node) => Some(Unfit::Sites),
            Some(_) => None,
        }
    }

    fn check_grant(&self, will: &Holding, new: bool) -> Option<Violation> {
        let unready = || {
            let ready = self.world.nodes.get(will.node.as_str()).is_some_and(|node| node.ready);
            (new && !ready).then_some(Unfit::NotReady)
        };
        let leaseless = || {
            let node = self.world.nodes.get(will.node.as_str());
            (new && !node.is_some_and(|it| fence::admits(self.after.fence, it))).then_some(Unfit::NoLease)
        };
        let why = self.unfit(&will.node).or_else(unready).or_else(leaseless)?;
        let (address, slice, node) = (self.after.address, self.slice, will.node.clone());
        Some(Violation::Granted { address, slice, node, why })
    }

    fn not_drained(&self, was: &Holding) -> Violation {
        Violation::NotDrained { address: self.after.address, slice: self.slice, node: was.node.clone() }
    }
}
