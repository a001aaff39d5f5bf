//! How many slices of an address a node wants, and for how long flows may wait for them. Time is passed in.
//!
//! Wants grow at once, ahead of the ports that are in use, and shrink slowly. They move in steps of a third to a half, since
//! every change of them is written and read by every node.

use crate::holding::Rights;
use crate::model::Address;
use crate::slice::{self, SliceSet};

/// Milliseconds of any steady clock.
pub type Millis = u64;

/// Share of the held ports above which more are wanted.
pub const TARGET: (u32, u32) = (6, 10);
/// Slices of an address that can be used, and so that can be asked for.
pub const MOST: u32 = (slice::LAST - slice::FIRST) as u32 + 1;
/// For how long a flow may wait for slices that do not come: TCP tries again after one second and after three.
pub const PATIENCE: Millis = 3_000;

/// How a node stands with an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Ports in use towards the busiest origin. A port that rests counts: it is not to be had.
    pub ports: u32,
    /// The same a moment from now, should they go on growing like in the moment before.
    pub soon: u32,
    /// Slices that the node holds.
    pub held: u32,
    /// New flows of the allocation found no port since the last look, and wait.
    pub waited: bool,
}

/// Slices that are needed, as a step. A full address for which flows wait is to be doubled: nobody knows how many wait.
pub fn need(look: &Look) -> u32 {
    let ports = u64::from(look.ports.max(look.soon));
    let target = u64::from(slice::PORTS) * u64::from(TARGET.0);
    let by_ports = (ports * u64::from(TARGET.1)).div_ceil(target);
    let full = u64::from(look.ports) * 10 >= u64::from(look.held) * u64::from(slice::PORTS) * 9;
    let doubled = if look.waited && full { u64::from(look.held) * 2 } else { 0 };
    step(u32::try_from(by_ports.max(doubled)).unwrap_or(u32::MAX))
}

/// The lowest of 1, 2, 3, 4, 6, 8, 12, 16, ... that is not below, at most [`MOST`].
fn step(slices: u32) -> u32 {
    if slices <= 1 {
        return 1;
    }
    let power = slices.min(MOST).next_power_of_two();
    let between = power / 4 * 3;
    if slices <= between { between } else { power.min(MOST) }
}

/// What an allocation wants on a node, of each of its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growth {
    wants: u32,
    /// The most that was needed in this window.
    needed: u32,
    window_began: Millis,
}

impl Growth {
    /// An agent that starts begins with what the node holds, which is what it may have needed.
    pub fn begin(held: u32, now: Millis) -> Growth {
        Growth { wants: held.clamp(1, MOST), needed: 0, window_began: now }
    }

    /// Takes in what is needed now; gives what is wanted, at most `most` slices. After a window in which less was needed all
    /// the time, half is given up, or what was not needed if that is less.
    pub fn look(&mut self, need: u32, most: u32, window: Millis, now: Millis) -> u32 {
        self.needed = self.needed.max(need);
        self.wants = self.wants.max(need);
        if now.saturating_sub(self.window_began) >= window {
            self.wants = self.needed.max(self.wants / 2);
            (self.needed, self.window_began) = (need, now);
        }
        self.wants = self.wants.clamp(1, most.clamp(1, MOST));
        self.wants
    }

    /// Slices that are wanted, by the last look.
    pub fn wants(&self) -> u32 {
        self.wants
    }

    /// Nothing but the least was wanted or needed for a while.
    pub fn is_idle(&self) -> bool {
        self.wants == 1 && self.needed <= 1
    }
}

/// How long a node has asked for more of an address in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    held: u32,
    since: Millis,
}

impl Patience {
    /// It begins with the first look.
    pub fn begin(held: u32, now: Millis) -> Patience {
        Patience { held, since: now }
    }

    /// Whether nothing has come for so long that nothing is to be expected: the address, the site's share or the operator
    /// cannot give more.
    pub fn is_over(&mut self, wants: u32, held: u32, now: Millis) -> bool {
        if held >= wants || held != self.held {
            *self = Patience { held, since: now };
        }
        now.saturating_sub(self.since) >= PATIENCE
    }
}

/// Whether a node could be given more slices of an address, as far as the address's object tells: some of the `usable` ones
/// are nobody's, or its own that drain.
pub fn has_room(object: &Address, node: &str, usable: SliceSet, most: u32) -> bool {
    let own = Rights::of(object, node);
    let holdings = object.holdings.iter().map(|holding| SliceSet::range(holding.first, holding.last));
    let taken = holdings.fold(SliceSet::EMPTY, SliceSet::union).difference(own.draining);
    own.open.len() < most && !usable.difference(taken).is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{AllocationName, Holding, State};
    use std::net::Ipv4Addr;

    const WINDOW: Millis = 600_000;

    fn used(ports: u32) -> Look {
        Look { ports, held: 8, ..Look::default() }
    }

    #[test]
    fn more_is_needed_above_sixty_percent_in_steps() {
        let needs = [0, 153, 154, 307, 308, 1228, 1229, 2048, 30_000, 64_000].map(|ports| need(&used(ports)));
        assert_eq!(needs, [1, 1, 2, 2, 3, 8, 12, 16, 252, 252]);
        let steps: Vec<u32> = (0..=300).map(step).collect();
        assert!(steps.iter().zip(0..).all(|(step, slices)| *step >= slices.min(MOST)));
        let mut distinct = steps.clone();
        distinct.dedup();
        assert_eq!(distinct, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 252]);
    }

    #[test]
    fn what_will_be_in_use_soon_counts() {
        assert_eq!(need(&Look { soon: 4000, ..used(400) }), 32);
        assert_eq!(need(&Look { soon: 100, ..used(400) }), 3, "what shrinks may grow again");
    }

    #[test]
    fn an_address_for_which_flows_wait_doubles_if_it_is_the_full_one() {
        let waits = |ports| need(&Look { waited: true, held: 64, ports, soon: ports });
        assert_eq!(waits(16_000), 128);
        assert_eq!(waits(5_000), 48, "it is another address's flows that wait");
        let small = Look { waited: true, held: 1, ports: 250, soon: 250 };
        assert_eq!(need(&small), 2);
    }

    #[test]
    fn wants_grow_at_once_and_halve_after_each_window_that_needed_less() {
        let mut growth = Growth::begin(1, 0);
        let mut look = |need, now| growth.look(need, 252, WINDOW, now);
        assert_eq!(look(32, 1_000), 32);
        assert_eq!([2_000, WINDOW - 1].map(|now| look(1, now)), [32, 32]);
        assert_eq!(look(1, WINDOW), 32, "it was needed in this window");
        assert_eq!([2, 3, 4].map(|window| look(1, window * WINDOW)), [16, 8, 4]);
        assert_eq!(look(6, 4 * WINDOW + 1), 6);
        assert_eq!([5, 6, 7].map(|window| look(1, window * WINDOW)), [6, 3, 1]);
        assert!(growth.is_idle());
    }

    #[test]
    fn what_is_needed_is_kept_however_long_it_lasts() {
        let mut growth = Growth::begin(16, 0);
        let wants: Vec<u32> = (1..20).map(|window| growth.look(12, 252, WINDOW, window * WINDOW)).collect();
        assert_eq!(wants, [12; 19]);
        assert_eq!(growth.look(64, 24, WINDOW, 20 * WINDOW), 24, "never more than a node may have");
    }

    #[test]
    fn a_flow_waits_while_slices_come_and_no_longer() {
        let mut patience = Patience::begin(4, 0);
        let mut over = |wants, held, now| patience.is_over(wants, held, now);
        assert!(!over(4, 4, 0) && !over(4, 4, 60_000), "nothing was asked for");
        assert!(!over(8, 4, 60_100) && !over(8, 4, 62_999));
        assert!(over(8, 4, 63_000));
        assert!(!over(8, 6, 64_000), "some have come");
        assert!(!over(8, 6, 66_999) && over(8, 6, 67_000) && over(16, 6, 68_000));
        assert!(!over(6, 6, 69_000));
    }

    #[test]
    fn there_is_room_while_slices_are_free_and_the_node_may_have_more() {
        let usable = SliceSet::range(4, 11);
        let object = |holdings: &[(u8, u8, &str, State)]| Address {
            address: Ipv4Addr::new(203, 0, 113, 1).into(),
            prefix: "p".into(),
            allocation: AllocationName { account: "a".into(), name: "x".into() },
            epoch: 7,
            fence: None,
            holdings: holdings
                .iter()
                .map(|(first, last, node, state)| Holding {
                    first: *first,
                    last: *last,
                    node: (*node).into(),
                    epoch: 7,
                    state: *state,
                })
                .collect(),
        };
        let some = object(&[(4, 6, "n1", State::Held), (7, 10, "n2", State::Held)]);
        assert!(has_room(&some, "n1", usable, 4) && !has_room(&some, "n1", usable, 3));
        let rests = State::Quarantined { until: 9 };
        let none =
            object(&[(4, 6, "n1", State::Held), (7, 10, "n2", State::Draining), (11, 11, "n3", rests)]);
        assert!(!has_room(&none, "n1", usable, 252));
        assert!(has_room(&none, "n2", usable, 252), "its own may come back");
    }
}
