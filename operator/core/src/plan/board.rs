//! The slices of one address while a plan is made.

use crate::fence;
use crate::model::{Address, Fence, Holding, Node, Seconds, State};
use crate::slice::{FIRST, LAST, SliceSet};

/// All slices of one address.
pub(super) struct Board<'a> {
    before: &'a Address,
    /// Epoch of whatever this plan changes.
    next_epoch: i64,
    fence: Option<Fence>,
    slots: [Option<Slot<'a>>; 256],
}

/// A slice that is not free.
#[derive(Clone, Copy)]
pub(super) struct Slot<'a> {
    pub node: &'a str,
    pub epoch: i64,
    pub state: State,
}

impl<'a> Board<'a> {
    /// The address as it stands.
    pub fn new(before: &'a Address) -> Board<'a> {
        let mut slots = [None; 256];
        for holding in &before.holdings {
            for slice in holding.first..=holding.last {
                slots[usize::from(slice)] =
                    Some(Slot { node: &holding.node, epoch: holding.epoch, state: holding.state });
            }
        }
        Board { before, next_epoch: before.epoch + 1, fence: before.fence, slots }
    }

    /// The address that this is the board of.
    pub fn address(&self) -> &'a Address {
        self.before
    }

    /// Gives nodes that can't renew their Lease this deadline in seconds, or none.
    pub fn set_fence(&mut self, after: Option<Seconds>) {
        if self.before.fence.map(|fence| fence.after) != after {
            self.fence = after.map(|after| Fence { after, epoch: self.next_epoch });
        }
    }

    /// Whether slices may be given to the node.
    pub fn admits(&self, node: &Node) -> bool {
        fence::admits(self.fence, node)
    }

    /// Puts every slice that is not free through `step`: `None` frees it. A slice that comes back in another state
    /// begins anew with this plan's epoch.
    pub fn advance(&mut self, mut step: impl FnMut(u8, Slot<'a>) -> Option<State>) {
        for slice in 0..=LAST {
            let place = &mut self.slots[usize::from(slice)];
            let Some(slot) = *place else { continue };
            *place = step(slice, slot).map(|state| {
                let epoch = if state == slot.state { slot.epoch } else { self.next_epoch };
                Slot { state, epoch, ..slot }
            });
        }
    }

    /// Slices that are not free, ascending.
    pub fn slots(&self) -> impl Iterator<Item = (u8, &Slot<'a>)> {
        (0..=LAST).zip(&self.slots).filter_map(|(slice, slot)| Some((slice, slot.as_ref()?)))
    }

    /// Those of `slices` that are free.
    pub fn free(&self, slices: SliceSet) -> SliceSet {
        let usable = slices.intersection(SliceSet::range(FIRST, LAST));
        usable.difference(self.slots().map(|(slice, _)| slice).collect())
    }

    /// Gives the node `count` of the free ones among `slices`, or as many as there are.
    ///
    /// First beside what the node holds, upwards, then downwards: long runs keep the list of holdings short and
    /// leave whole gaps to others. A node that holds nothing beside a free slice begins in the longest gap: at its
    /// start if nobody can grow into it from below, else half-way, so that the neighbour below and the newcomer
    /// have the same room to grow. The half-way point is a multiple of `count` into the gap, which lets nodes of
    /// equal minimum tile the whole range without splinters.
    pub fn grant(&mut self, node: &'a str, count: u32, slices: SliceSet) {
        let mut free = self.free(slices);
        let mut left = count;
        while left > 0 {
            let Some((first, length)) =
                self.beside(node, free).map(|slice| (slice, 1)).or_else(|| self.gap(left, free))
            else {
                return;
            };
            for slice in (first..=LAST).take(length as usize) {
                self.slots[usize::from(slice)] =
                    Some(Slot { node, epoch: self.next_epoch, state: State::Held });
                free.remove(slice);
            }
            left -= length;
        }
    }

    /// A free slice next to one that the node holds.
    fn beside(&self, node: &str, free: SliceSet) -> Option<u8> {
        let above =
            free.iter().find(|slice| slice.checked_sub(1).is_some_and(|below| self.holds(node, below)));
        above.or_else(|| {
            free.iter().find(|slice| slice.checked_add(1).is_some_and(|above| self.holds(node, above)))
        })
    }

    /// First slice and length of a new run of at most `count`.
    fn gap(&self, count: u32, free: SliceSet) -> Option<(u8, u32)> {
        let length = |(first, last): (u8, u8)| u32::from(last - first) + 1;
        let runs = free.runs();
        // The longest; of equal ones the lowest.
        let gap = runs.into_iter().rev().max_by_key(|run| length(*run))?;
        let count = count.min(length(gap));
        let below = gap.0.checked_sub(1).and_then(|slice| self.slots[usize::from(slice)]);
        let offset = match below {
            Some(Slot { state: State::Held, .. }) => (length(gap) - count) / 2 / count * count,
            _ => 0,
        };
        Some((gap.0.saturating_add(offset as u8), count))
    }

    fn holds(&self, node: &str, slice: u8) -> bool {
        self.slots[usize::from(slice)].is_some_and(|slot| slot.node == node && slot.state == State::Held)
    }

    /// The address as it shall be: the same as before if nothing changed, else with the next epoch.
    pub fn finish(self) -> Address {
        let mut holdings: Vec<Holding> = Vec::new();
        for (slice, slot) in self.slots() {
            match holdings.last_mut() {
                Some(run)
                    if run.last.checked_add(1) == Some(slice)
                        && (run.node.as_str(), run.epoch, run.state)
                            == (slot.node, slot.epoch, slot.state) =>
                {
                    run.last = slice;
                }
                _ => holdings.push(Holding {
                    first: slice,
                    last: slice,
                    node: slot.node.to_owned(),
                    epoch: slot.epoch,
                    state: slot.state,
                }),
            }
        }
        if (&holdings, self.fence) == (&self.before.holdings, self.before.fence) {
            return self.before.clone();
        }
        Address { epoch: self.next_epoch, holdings, fence: self.fence, ..self.before.clone() }
    }
}
