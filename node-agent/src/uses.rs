//! What this node's slices of an egress address are used for: most for translation, whose ports bitmaps give, and some for sockets
//! that have the address themselves, whose ports the kernel's table of sockets gives. No slice has two uses at a time: it changes
//! from one to the other like from one node to another, by way of being drained and having rested. Pure.

use aegis_common::BindValue;
use aegis_core::holding::Rights;
use aegis_core::slice::SliceSet;
use std::cmp::Reverse;

/// Slices that are not for translation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// Sockets are given ports of these.
    pub open: SliceSet,
    /// These, and the ones in which sockets are left.
    pub kept: SliceSet,
    /// On the way from translation to sockets: from these nothing is opened.
    pub leaving: SliceSet,
}

/// What is known of an address's slices.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// What the node may do with them.
    pub rights: Rights,
    /// Those from which the programs may open flows at present.
    pub allowed: SliceSet,
    /// Those with a port that some flow has, or that rests.
    pub flows: SliceSet,
    /// The look at the flows shows all that were opened before `allowed` was as it is.
    pub settled: bool,
    /// Those with a socket, or with one that was closed a short while ago; `None` = nobody knows.
    pub sockets: Option<SliceSet>,
}

/// How many of the `held` slices are for sockets, where translation wants so many, and sockets so many. Translation keeps at
/// least one: what no socket can be bound for is translated.
pub fn share(held: u32, translation: u32, sockets: u32) -> u32 {
    let Some(most) = held.checked_sub(1).filter(|most| *most > 0 && sockets > 0) else { return 0 };
    if translation.saturating_add(sockets) <= held {
        return sockets.min(most);
    }
    let part = u64::from(held) * u64::from(sockets) / (u64::from(translation) + u64::from(sockets));
    u32::try_from(part).unwrap_or(most).clamp(1, most)
}

impl Uses {
    /// As the data plane has it.
    pub fn found(value: &BindValue) -> Uses {
        let (open, kept) = (SliceSet::from_words(value.open), SliceSet::from_words(value.kept));
        Uses { open: open.intersection(kept), kept, leaving: SliceSet::EMPTY }
    }

    /// Slices from which flows may be opened, of those from which the node may open anything.
    pub fn translated(&self, open: SliceSet) -> SliceSet {
        open.difference(self.kept).difference(self.leaving)
    }

    /// A step towards `share` slices for sockets.
    pub fn next(&self, seen: &Seen, share: u32) -> Uses {
        let Rights { open: mine, draining } = seen.rights;
        let kept = self.kept.intersection(mine.union(draining));
        let mut open = self.open.intersection(kept).intersection(mine);
        let mut kept = match seen.sockets {
            Some(busy) => open.union(kept.intersection(busy)),
            None => kept,
        };
        let is_busy = |slice: &u8| seen.sockets.is_none_or(|busy| busy.contains(*slice));
        let mut given_back: Vec<u8> = open.iter().collect();
        given_back.sort_by_key(|slice| (is_busy(slice), Reverse(*slice)));
        for slice in given_back.into_iter().take(open.len().saturating_sub(share) as usize) {
            open.remove(slice);
        }
        for slice in kept.intersection(mine).difference(open).iter() {
            if open.len() < share {
                open.insert(slice);
            }
        }
        let empty = self.leaving.difference(seen.flows).difference(seen.allowed);
        for slice in empty.intersection(mine).difference(kept).iter().filter(|_| seen.settled) {
            if open.len() < share {
                open.insert(slice);
                kept.insert(slice);
            }
        }
        Uses { open, kept, leaving: self.leaving(seen, mine.difference(kept), share - open.len()) }
    }

    /// The slices that shall leave translation: best those from which nothing has been opened yet.
    fn leaving(&self, seen: &Seen, translated: SliceSet, missing: u32) -> SliceSet {
        let mut candidates: Vec<u8> = translated.iter().collect();
        candidates.sort_by_key(|slice| {
            let (busy, opens) = (seen.flows.contains(*slice), seen.allowed.contains(*slice));
            (busy, opens, !self.leaving.contains(*slice), Reverse(*slice))
        });
        let most = translated.len().saturating_sub(1).min(missing);
        candidates.into_iter().take(most as usize).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(slices: &[u8]) -> SliceSet {
        slices.iter().copied().collect()
    }

    #[test]
    fn translation_keeps_what_it_needs_or_its_part_and_always_one() {
        let cases =
            [(0, 1, 1), (1, 1, 1), (2, 1, 1), (8, 1, 3), (8, 4, 8), (3, 12, 1), (8, 1, 64), (8, 2, 0)];
        assert_eq!(cases.map(|(held, nat, bind)| share(held, nat, bind)), [0, 0, 1, 3, 5, 1, 7, 0]);
    }

    #[test]
    fn a_slice_is_for_sockets_when_no_flow_is_left_and_for_translation_when_no_socket_is() {
        let rights = Rights { open: set(&[4, 5]), draining: SliceSet::EMPTY };
        let seen = Seen { rights, allowed: set(&[4, 5]), flows: set(&[4, 5]), ..Seen::default() };
        let uses = Uses::default().next(&seen, 1);
        assert_eq!(uses, Uses { leaving: set(&[5]), ..Uses::default() });
        assert_eq!(uses.translated(rights.open), set(&[4]));
        let seen = Seen { allowed: set(&[4]), ..seen };
        assert_eq!(uses.next(&seen, 1), uses, "flows are left");
        let seen = Seen { flows: set(&[4]), ..seen };
        assert_eq!(uses.next(&seen, 1), uses, "some may have been opened since");
        let bound = uses.next(&Seen { settled: true, ..seen }, 1);
        assert_eq!(bound, Uses { open: set(&[5]), kept: set(&[5]), leaving: SliceSet::EMPTY });

        let drains = bound.next(&seen, 0);
        assert_eq!(drains, Uses { kept: set(&[5]), ..Uses::default() });
        assert_eq!(drains.next(&seen, 0), drains, "nobody has looked");
        assert_eq!(drains.next(&Seen { sockets: Some(set(&[5])), ..seen }, 0), drains);
        assert_eq!(drains.next(&seen, 1), bound, "it is wanted again");
        assert_eq!(drains.next(&Seen { sockets: Some(SliceSet::EMPTY), ..seen }, 0), Uses::default());
    }

    #[test]
    fn new_slices_come_first_and_idle_ones_go_first() {
        let rights = Rights { open: SliceSet::range(4, 7), draining: SliceSet::EMPTY };
        let seen =
            Seen { rights, allowed: set(&[4, 6, 7]), flows: set(&[4, 6]), settled: true, ..Seen::default() };
        let uses = Uses::default().next(&seen, 2);
        assert_eq!(uses.leaving, set(&[5, 7]), "the new one, and the idle one");
        let many =
            Uses { open: SliceSet::range(4, 6), kept: SliceSet::range(4, 6), leaving: SliceSet::EMPTY };
        let seen = Seen { sockets: Some(set(&[4, 6])), ..seen };
        let fewer = many.next(&seen, 1);
        assert_eq!(
            (fewer.open, fewer.kept),
            (set(&[4]), SliceSet::range(4, 6)),
            "a program may just be at it"
        );
        assert_eq!(fewer.next(&seen, 1).kept, set(&[4, 6]));
    }

    #[test]
    fn what_is_to_leave_the_node_is_for_no_new_socket_and_what_has_left_for_none() {
        let both = set(&[4, 5]);
        let uses = Uses { open: both, kept: both, leaving: SliceSet::EMPTY };
        let rights = Rights { open: set(&[6, 7]), draining: set(&[4]) };
        let next = uses.next(&Seen { rights, ..Seen::default() }, 2);
        assert_eq!((next.open, next.kept), (SliceSet::EMPTY, set(&[4])));
    }

    /// What happens on a node.
    #[derive(Clone, Debug)]
    enum Event {
        Rights { open: u8, draining: u8 },
        Share(u32),
        Flow(u8, bool),
        Socket(u8, bool),
        Look,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            1 => any::<(u8, u8)>().prop_map(|(open, draining)| Event::Rights { open, draining: draining & !open }),
            1 => (0u32..8).prop_map(Event::Share),
            4 => (4u8..12, any::<bool>()).prop_map(|(slice, begins)| Event::Flow(slice, begins)),
            4 => (4u8..12, any::<bool>()).prop_map(|(slice, begins)| Event::Socket(slice, begins)),
            6 => Just(Event::Look),
        ]
    }

    fn slices(bits: u8) -> SliceSet {
        (0..8).filter(|bit| bits >> bit & 1 == 1).map(|bit| bit + 4).collect()
    }

    proptest! {
        #[test]
        fn no_slice_ever_has_flows_and_sockets(events in prop::collection::vec(event(), 1..200)) {
            let (mut uses, mut rights, mut wanted) = (Uses::default(), Rights::default(), 0);
            let (mut flows, mut sockets, mut allowed) = (SliceSet::EMPTY, SliceSet::EMPTY, SliceSet::EMPTY);
            for event in events.into_iter().chain([Event::Look]) {
                match event {
                    Event::Rights { open, draining } => {
                        rights = Rights { open: slices(open), draining: slices(draining) };
                        // What the node does not own any more, another program ends.
                        let own = rights.open.union(rights.draining);
                        (flows, sockets) = (flows.intersection(own), sockets.intersection(own));
                    }
                    Event::Share(share) => wanted = share,
                    Event::Flow(slice, true) if allowed.contains(slice) => _ = flows.insert(slice),
                    Event::Flow(slice, _) => _ = flows.remove(slice),
                    Event::Socket(slice, true) if uses.open.contains(slice) => _ = sockets.insert(slice),
                    Event::Socket(slice, _) => _ = sockets.remove(slice),
                    Event::Look => {}
                }
                let seen = Seen { rights, allowed, flows, settled: true, sockets: Some(sockets) };
                uses = uses.next(&seen, share(rights.open.len(), 1, wanted));
                allowed = uses.translated(rights.open);
                prop_assert!(allowed.intersection(uses.kept).is_empty());
                prop_assert!(uses.open.difference(uses.kept).is_empty());
                prop_assert!(uses.kept.difference(rights.open.union(rights.draining)).is_empty());
                prop_assert!(flows.intersection(uses.kept).is_empty(), "{uses:?}");
                prop_assert!(sockets.difference(uses.kept).is_empty(), "{uses:?}");
                let only_sockets = rights.open.difference(uses.kept).is_empty();
                prop_assert!(rights.open.is_empty() || only_sockets || !allowed.is_empty());
            }
            // When all has ended, each use has its part.
            for _ in 0..3 {
                let none = SliceSet::EMPTY;
                let seen = Seen { rights, allowed, flows: none, settled: true, sockets: Some(none) };
                uses = uses.next(&seen, share(rights.open.len(), 1, wanted));
                allowed = uses.translated(rights.open);
            }
            prop_assert_eq!(uses.open.len(), share(rights.open.len(), 1, wanted));
            prop_assert_eq!((uses.kept, uses.leaving), (uses.open, SliceSet::EMPTY));
        }
    }
}
