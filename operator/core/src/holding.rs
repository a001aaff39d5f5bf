//! What a node makes of an address's object: from which slices it may open flows, whether it may follow the object at
//! all, and which slices it can vouch for as empty. Agents go by these rules, and the model checks them with the
//! planner's.

use crate::model::{Address, State};
use crate::slice::SliceSet;

/// Slices of one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    /// From these it may open flows.
    pub open: SliceSet,
    /// These are to become empty: flows that live go on.
    pub draining: SliceSet,
}

impl Rights {
    /// What the object gives to the node.
    pub fn of(object: &Address, node: &str) -> Rights {
        let mut rights = Rights::default();
        for holding in object.holdings.iter().filter(|holding| holding.node == node) {
            let slices = SliceSet::range(holding.first, holding.last);
            match holding.state {
                State::Held => rights.open = rights.open.union(slices),
                State::Draining => rights.draining = rights.draining.union(slices),
                State::Quarantined { .. } => {}
            }
        }
        rights
    }

    /// Slices from which flows may be opened on the way here from `before`: what begins to drain goes on until the
    /// allocation has another way. While these differ from `open`, the former epoch stays in force.
    pub fn meanwhile(&self, before: SliceSet) -> SliceSet {
        self.open.union(before.intersection(self.draining))
    }

    /// Slices to report as drained: those that are to become empty and carry no flow, once the data plane has the very
    /// epoch that these rights come from. `busy` is what a scan found that shows every flow opened under any former
    /// right; without such a scan nothing is known.
    pub fn drained(&self, epoch: i64, programmed: Option<i64>, busy: Option<SliceSet>) -> SliceSet {
        match busy {
            Some(busy) if programmed == Some(epoch) => self.draining.difference(busy),
            _ => SliceSet::EMPTY,
        }
    }
}

/// Whether a data plane that has the epoch `programmed` may follow an object of the epoch `offered`: never an older
/// one, whose slices may be somebody else's by now.
pub fn may_follow(offered: i64, programmed: i64) -> bool {
    offered >= programmed
}

/// Whether a node's report of an address speaks against what the API server has: the node follows an epoch that no
/// object has (`known`: that of the object, or the last one of an object that went as it should).
pub fn contradicts(reported: i64, known: Option<i64>) -> bool {
    known.is_none_or(|epoch| epoch < reported)
}

/// How long slices that are new to a node rest before it opens flows from them, in milliseconds: replies may enter at any
/// node, and one that has not heard of the new owner drops them.
pub const SETTLE: u64 = 500;

/// The slices of one address that a node has, and which of them are new. Times are milliseconds of any steady clock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settling {
    mine: SliceSet,
    /// New slices, with the time from which they may be opened.
    fresh: Vec<(SliceSet, u64)>,
}

impl Settling {
    /// These the node had all along.
    pub fn found(mine: SliceSet) -> Settling {
        Settling { mine, fresh: Vec::new() }
    }

    /// Takes in what the node has now; gives what it does not open yet. It does at once where there is nothing else to open
    /// from, or `hurry` says that there is no room.
    pub fn look(&mut self, rights: &Rights, hurry: bool, now: u64) -> SliceSet {
        let mine = rights.open.union(rights.draining);
        let new = mine.difference(self.mine);
        if !new.is_empty() {
            self.fresh.push((new, now + SETTLE));
        }
        self.mine = mine;
        self.fresh.iter_mut().for_each(|(slices, _)| *slices = slices.intersection(mine));
        self.fresh.retain(|(slices, at)| !slices.is_empty() && *at > now);
        let waits = self.fresh.iter().fold(SliceSet::EMPTY, |all, (slices, _)| all.union(*slices));
        if hurry || rights.open.difference(waits).is_empty() {
            self.fresh.clear();
            return SliceSet::EMPTY;
        }
        waits
    }

    /// When to look again.
    pub fn next(&self) -> Option<u64> {
        self.fresh.iter().map(|(_, at)| *at).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{AllocationName, Holding};
    use std::net::Ipv4Addr;

    fn rights() -> Rights {
        let holding =
            |first, last, node: &str, state| Holding { first, last, node: node.into(), epoch: 7, state };
        let object = Address {
            address: Ipv4Addr::new(203, 0, 113, 1).into(),
            prefix: "p".into(),
            allocation: AllocationName { account: "a".into(), name: "x".into() },
            epoch: 7,
            holdings: vec![
                holding(4, 5, "n1", State::Held),
                holding(6, 9, "n1", State::Draining),
                holding(10, 11, "n2", State::Draining),
                holding(12, 13, "n1", State::Quarantined { until: 0 }),
            ],
            fence: None,
        };
        Rights::of(&object, "n1")
    }

    #[test]
    fn a_node_opens_from_what_it_holds_and_for_a_while_from_what_begins_to_drain() {
        let rights = rights();
        assert_eq!((rights.open, rights.draining), (SliceSet::range(4, 5), SliceSet::range(6, 9)));
        assert_eq!(rights.meanwhile(SliceSet::range(8, 13)), [4, 5, 8, 9].into_iter().collect());
    }

    #[test]
    fn only_a_scan_under_the_very_epoch_shows_what_is_drained() {
        let (rights, busy) = (rights(), SliceSet::range(4, 6));
        assert_eq!(rights.drained(7, Some(7), Some(busy)), SliceSet::range(7, 9));
        assert!(rights.drained(7, Some(6), Some(busy)).is_empty());
        assert!(rights.drained(7, Some(8), Some(busy)).is_empty());
        assert!(rights.drained(7, None, Some(busy)).is_empty());
        assert!(rights.drained(7, Some(7), None).is_empty());
    }

    #[test]
    fn new_slices_are_opened_when_others_have_heard_of_them() {
        let open = |first, last| Rights { open: SliceSet::range(first, last), draining: SliceSet::EMPTY };
        let mut settling = Settling::default();
        assert!(settling.look(&open(4, 5), false, 0).is_empty(), "there is nothing else");
        assert_eq!(settling.look(&open(4, 7), false, 100), SliceSet::range(6, 7));
        assert_eq!(settling.look(&open(4, 9), false, 300), SliceSet::range(6, 9));
        assert_eq!(settling.next(), Some(600));
        assert_eq!(settling.look(&open(4, 9), false, 600), SliceSet::range(8, 9));
        assert!(settling.look(&open(4, 9), true, 601).is_empty(), "there is no room");
        assert!(settling.look(&open(4, 9), false, 602).is_empty(), "what was opened stays open");
        assert_eq!(settling.next(), None);
        assert_eq!(settling.look(&open(4, 10), false, 700), SliceSet::range(10, 10));
        assert!(settling.look(&open(10, 10), false, 701).is_empty(), "all else is gone");
    }

    #[test]
    fn slices_that_drain_are_known_to_all() {
        let drains = Rights { open: SliceSet::range(4, 5), draining: SliceSet::range(6, 7) };
        let mut settling = Settling::found(SliceSet::range(4, 7));
        assert!(settling.look(&drains, false, 0).is_empty());
        let back = Rights { open: SliceSet::range(4, 7), draining: SliceSet::EMPTY };
        assert!(settling.look(&back, false, 1).is_empty(), "they come back");
        assert_eq!(
            settling.look(&Rights { open: SliceSet::range(4, 8), ..back }, false, 2),
            SliceSet::range(8, 8)
        );
    }

    #[test]
    fn an_older_object_is_not_followed() {
        assert!(may_follow(7, 7) && may_follow(8, 7) && !may_follow(6, 7));
    }

    #[test]
    fn a_report_of_an_epoch_that_no_object_has_is_a_contradiction() {
        assert!(contradicts(7, None) && contradicts(7, Some(6)));
        assert!(!contradicts(7, Some(7)) && !contradicts(7, Some(8)));
    }
}
